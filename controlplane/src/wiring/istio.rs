//! The Istio API at L7 as derived collections.

use std::{collections::BTreeSet, sync::Arc};

use mesh::{l7::view::Resource, names::NamespacedHostname};

use super::{Facts, Inputs, Joins, Offer, reference};
use crate::{
    gateway::class,
    graph::{Collection, Context, Graph, Index},
    object::{Gateway, GatewayClass, Kind, Name, ObjectRef},
    translate::l7::{
        self,
        istio::authorization,
        target::{Aim, Found, aim},
    },
};

/// What the Istio API comes to at the waypoints.
pub(super) struct Istio {
    /// Resources of all waypoints.
    pub(super) resources: Collection<l7::Key, Arc<Resource>>,
    /// What AuthorizationPolicies with targets come to.
    pub(super) policies: Collection<Name, authorization::Outcome>,
}

/// What targets are looked up in.
#[derive(Clone)]
pub(super) struct Targets {
    facts: Facts,
    offers: Collection<ObjectRef, Offer>,
    winners: Collection<mesh::names::Str, Arc<super::Claim>>,
    gateways: Collection<Name, Gateway>,
    classes: Collection<mesh::names::Str, GatewayClass>,
    gateways_of_class: Index<mesh::names::Str, Name, Gateway>,
}

impl Targets {
    pub(super) fn new(
        inputs: &Inputs,
        joins: &Joins,
        offers: &Collection<ObjectRef, Offer>,
    ) -> Self {
        let class =
            |_: &Name, gateway: &Gateway| vec![gateway.spec.gateway_class_name.as_str().into()];
        Self {
            facts: joins.facts.clone(),
            offers: offers.clone(),
            winners: joins.winners.clone(),
            gateways: inputs.gateways.clone(),
            classes: inputs.classes.clone(),
            gateways_of_class: inputs.gateways.index(class),
        }
    }

    /// What the targets of a policy come to.
    pub(super) fn aim<'t>(
        &self,
        cx: &Context<'_>,
        namespace: &str,
        targets: impl IntoIterator<Item = &'t crate::crd::TargetRef>,
    ) -> Aim {
        aim(&self.facts.settings, namespace, targets, |kind, name| {
            self.look(cx, kind, name)
        })
    }

    fn look(&self, cx: &Context<'_>, kind: Kind, name: &Name) -> Found {
        match kind {
            Kind::Service | Kind::ServiceEntry => self.services(cx, &reference(kind, name)),
            Kind::Gateway => match cx.get(&self.gateways, name) {
                None => Found::Absent,
                Some(gateway) if self.is_waypoint(cx, &gateway.spec.gateway_class_name) => {
                    Found::Waypoints(vec![name.clone()])
                }
                Some(_) => Found::NoWaypoint,
            },
            _ => self.of_class(cx, name),
        }
    }

    fn of_class(&self, cx: &Context<'_>, name: &Name) -> Found {
        let class = &name.name;
        if cx.get(&self.classes, class).is_none() && !class::is_waypoint(class, None) {
            return Found::Absent;
        }
        if !self.is_waypoint(cx, class) {
            return Found::NoWaypoint;
        }
        let gateways = cx.find(&self.gateways_of_class, class);
        Found::Waypoints(gateways.into_iter().map(|(name, _)| name).collect())
    }

    /// Whether a Gateway is a waypoint.
    pub(super) fn is_waypoint_gateway(&self, cx: &Context<'_>, name: &Name) -> bool {
        let gateway = cx.get(&self.gateways, name);
        gateway.is_some_and(|gateway| self.is_waypoint(cx, &gateway.spec.gateway_class_name))
    }

    fn is_waypoint(&self, cx: &Context<'_>, class: &str) -> bool {
        let found = cx.get(&self.classes, &class.into());
        let controller = found.map(|class| class.spec.controller_name.clone());
        class::is_waypoint(class, controller.as_deref())
    }

    fn services(&self, cx: &Context<'_>, object: &ObjectRef) -> Found {
        let Some(offer) = cx.get(&self.offers, object) else {
            return Found::Absent;
        };
        let mut services = BTreeSet::new();
        for claim in &offer.claims {
            let winner = cx.get(&self.winners, &claim.service_key());
            if winner.is_some_and(|winner| winner.key() == claim.key()) {
                services.insert(NamespacedHostname {
                    namespace: claim.meta.name.namespace.clone(),
                    hostname: claim.hostname.clone(),
                });
            }
        }
        Found::Services(
            services.into_iter().collect(),
            offer.bound.served_by.clone(),
        )
    }
}

pub(super) fn istio(graph: &mut Graph, inputs: &Inputs, targets: &Targets) -> Istio {
    let aimed = targets.clone();
    let (policies, _) = graph.derive(&inputs.policies, move |cx, name, policy| {
        let spec = &policy.object.spec;
        let refs = spec.target_refs.iter().chain(&spec.target_ref);
        let aim = aimed.aim(cx, &name.namespace, refs);
        match aim.is_aimed() {
            true => vec![(
                name.clone(),
                authorization::translate(policy, &aim, |_| false),
            )],
            false => Vec::new(),
        }
    });
    let (of_policies, _) = graph.derive(&policies, |_, _, outcome| outcome.resources.clone());
    Istio {
        resources: graph.join(&[&of_policies]),
        policies,
    }
}
