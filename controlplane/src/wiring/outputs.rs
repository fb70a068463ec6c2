//! What comes of it all: resources for proxies, conditions for objects.

use std::{collections::BTreeMap, sync::Arc};

use proto::{security::Authorization, workload as wire};

use super::{
    Conditions, Inputs, Joins, Made, Offer,
    istio::Istio,
    joins::waypoint_policy_name,
    reference,
    remote::Additions,
    services::{Allocated, addresses, won},
};
use crate::{
    graph::{Collection, Graph},
    object::{Kind, ObjectRef},
    output::{Condition, Resource, ResourceKey},
    translate::{
        peer, policy, policy_resource,
        service::{self, Claim},
        service_resource,
    },
};

pub(super) fn resources(
    graph: &mut Graph,
    joins: &Joins,
    made: &Collection<ObjectRef, Made>,
    inputs: &Inputs,
    additions: Additions,
) -> [Collection<ResourceKey, Resource>; 6] {
    let keyed = |resource: Resource| (resource.key(), resource);
    let (workloads, _) = graph.derive_shared(made, move |_, _, made| {
        let resources = made.resources.iter();
        let keyed = resources.map(|resource| (resource.key(), resource.clone()));
        keyed.collect::<BTreeMap<_, _>>().into_iter().collect()
    });
    let by_host = joins.winners.index(|_, claim| vec![claim.hostname.clone()]);
    let (services, _) = graph.derive(&joins.winners, move |cx, _, claim| {
        let same = cx.find(&by_host, &claim.hostname);
        let same: Vec<Arc<Claim>> = same
            .into_iter()
            .map(|(_, claim)| (*claim).clone())
            .collect();
        let service = wire::Service {
            canonical: service::is_canonical(claim, &same),
            ..claim.service.clone()
        };
        let service = additions.merge(cx, claim, service);
        vec![keyed(service_resource(&service))]
    });
    let encode = move |policy: Option<&Authorization>| {
        policy.map(policy_resource).map(keyed).into_iter().collect()
    };
    let policies = joins.policies_of_namespace.collection();
    let (policies, _) = graph.derive(policies, move |_, _, outcome| {
        encode(outcome.authorization.as_ref())
    });
    let peers = joins.peers_of_namespace.collection();
    let (peers, _) = graph.derive(peers, move |_, _, outcome| {
        encode(outcome.authorization.as_ref())
    });
    let any_peer = inputs.peers.index(|_, _| vec![()]);
    let any_peer = graph.group(&any_peer);
    let settings = joins.facts.settings.clone();
    let (strict, _) = graph.derive(&any_peer, move |_, (), _| {
        encode(Some(&peer::static_strict(&settings)))
    });
    let settings = joins.facts.settings.clone();
    let (waypoints, _) = graph.derive(&joins.accounts, move |_, gateway, accounts| {
        let name = waypoint_policy_name(gateway);
        encode(Some(&policy::for_waypoint(
            &settings,
            &gateway.namespace,
            name,
            accounts,
        )))
    });
    [workloads, services, policies, peers, strict, waypoints]
}

pub(super) fn conditions(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    offers: &Collection<ObjectRef, Offer>,
    made: &Collection<ObjectRef, Made>,
    allocated: &Allocated,
    istio: &Istio,
) -> Collection<ObjectRef, Conditions> {
    let (services, _) = graph.derive(offers, |_, object, offer| {
        let of_service = object.kind == Kind::Service;
        let said = offer
            .served
            .iter()
            .chain(&offer.bound.condition)
            .filter(|_| of_service);
        let mut said: Vec<Condition> = said.cloned().collect();
        // There are as many as services.
        said.shrink_to_fit();
        told(object.clone(), said)
    });
    let (winners, given, offers) = (joins.winners.clone(), allocated.clone(), offers.clone());
    let (entries, _) = graph.derive(&inputs.entries, move |cx, name, entry| {
        let object = reference(Kind::ServiceEntry, name);
        let Some(offer) = cx.get(&offers, &object) else {
            return Vec::new();
        };
        let won = won(cx, &winners, entry);
        let won = won
            .into_iter()
            .map(|(host, claim)| (host, claim.key()))
            .collect();
        let addresses = |host: &str| addresses(cx, &given, name, host);
        told(
            object,
            service::entry_conditions(entry, &offer.bound, offer.visibility, &won, addresses),
        )
    });
    let (made, _) = graph.derive(made, |_, object, made| {
        told(object.clone(), made.conditions.clone())
    });
    let policies = joins.policies_of_namespace.collection();
    let at_waypoints = istio.policies.clone();
    let (policies, _) = graph.derive(policies, move |cx, name, outcome| {
        let mut said = outcome.conditions.clone();
        let at_waypoints = cx.get(&at_waypoints, name);
        said.extend(at_waypoints.and_then(|outcome| outcome.condition.clone()));
        told(reference(Kind::AuthorizationPolicy, name), said)
    });
    let peers = joins.peers_of_namespace.collection();
    let (peers, _) = graph.derive(peers, |_, name, outcome| {
        told(
            reference(Kind::PeerAuthentication, name),
            outcome.conditions.clone(),
        )
    });
    graph.join(&[
        &services,
        &entries,
        &made,
        &policies,
        &peers,
        &istio.conditions,
    ])
}

/// Objects of which there is nothing to say have no entry, so that one object may be told of by one computation only.
pub(super) fn told(
    object: ObjectRef,
    conditions: impl Into<Conditions>,
) -> Vec<(ObjectRef, Conditions)> {
    let conditions = conditions.into();
    match conditions.is_empty() {
        true => Vec::new(),
        false => vec![(object, conditions)],
    }
}
