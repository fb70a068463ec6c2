//! Routes and policies of the Gateway API as derived collections.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh::{
    l7::{
        backend::BackendTls,
        config::ExternalAuthorizer,
        route::{Attachment, Route, Rules},
        view::Resource as Told,
    },
    names::{NamespacedHostname, Str},
};

use super::{Inputs, Joins, Offer, istio::Targets, reference, waypoints::PerWaypoint};
use crate::{
    crd::gateway_api::BackendObjectRef,
    graph::{Collection, Context, Data, Graph, Index, Runs},
    object::{Kind, Name, ObjectRef, Sourced},
    output::ParentStatus,
    translate::{
        l7::{
            backend::Overlay,
            gateway_api::{
                self as translate, Resolved, RouteObject, Unresolved,
                attach::{self, Attached, Effect, Lookup},
                backend_tls::{self, Traffic, Wish},
                status,
            },
        },
        service::Claim,
    },
};

/// What the Gateway API comes to at the waypoints.
pub(super) struct GatewayApi {
    /// Routes, of all waypoints.
    pub(super) resources: PerWaypoint,
    /// What is said of routes and policies.
    pub(super) parents: Collection<ObjectRef, Parents>,
    /// How services' endpoints are reached.
    pub(super) overlays: Collection<Str, Overlay>,
    /// Routes with external authorizers, by waypoint.
    pub(super) authorizers: Authorizers,
}

/// What is said of an object, per parent.
pub type Parents = Arc<Vec<ParentStatus>>;

/// Routes by the waypoints that get them.
#[derive(Clone)]
pub(super) struct Authorizers(Index<Name, ObjectRef, Outcome>);

/// What a route comes to.
#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    route: Option<Arc<Told>>,
    waypoints: BTreeSet<Name>,
    parents: Parents,
    authorizers: BTreeMap<Str, ExternalAuthorizer>,
}

/// What parents and backends are looked up in.
#[derive(Clone)]
struct World {
    joins: Joins,
    targets: Targets,
    offers: Collection<ObjectRef, Offer>,
    by_host: Index<Str, Str, Arc<Claim>>,
}

/// What routes are attached to.
#[derive(Clone)]
pub(super) struct Attachments {
    world: World,
    all: Collection<ObjectRef, Attached>,
    by_service: Index<NamespacedHostname, ObjectRef, Attached>,
}

impl Attachments {
    pub(super) fn new(
        graph: &mut Graph,
        inputs: &Inputs,
        joins: &Joins,
        offers: &Collection<ObjectRef, Offer>,
        targets: &Targets,
    ) -> Self {
        let world = World {
            joins: joins.clone(),
            targets: targets.clone(),
            offers: offers.clone(),
            by_host: joins.winners.index(|_, claim| vec![claim.hostname.clone()]),
        };
        let seen = world.clone();
        let (all, _) = graph.derive(&inputs.routes, move |cx, object, route| {
            let lookup = Seen { world: &seen, cx };
            vec![(object.clone(), attach::attach(&route.object, &lookup))]
        });
        let by_service = all.index(|_, attached| attached.services().into_iter().collect());
        Self {
            world,
            all,
            by_service,
        }
    }

    /// The routes that take effect on a service in the place of `kind`s of a namespace, with the ports where they do.
    pub(super) fn in_front(
        &self,
        cx: &Context<'_>,
        kind: Kind,
        namespace: &Str,
        service: &NamespacedHostname,
    ) -> Vec<(ObjectRef, BTreeSet<u16>)> {
        let (of, from) = (service.clone(), namespace.clone());
        let filter = move |other: &Attached| !other.shadows(kind, &from, &of).is_empty();
        let others = cx.find_where(&self.by_service, service, filter);
        let ports = |(route, other): (ObjectRef, Arc<Attached>)| {
            (route, other.shadows(kind, namespace, service))
        };
        others.into_iter().map(ports).collect()
    }
}

struct Seen<'w, 'c> {
    world: &'w World,
    cx: &'w Context<'c>,
}

impl Lookup for Seen<'_, '_> {
    fn services(&self, kind: Kind, name: &Name) -> Option<Vec<Arc<Claim>>> {
        let offer = self.cx.get(&self.world.offers, &reference(kind, name))?;
        let claims = offer.claims.iter().filter(|claim| {
            let winner = self.winner(&claim.service_key());
            winner.is_some_and(|winner| winner.key() == claim.key())
        });
        Some(claims.cloned().collect())
    }

    fn is_waypoint(&self, name: &Name) -> bool {
        self.world.targets.is_waypoint_gateway(self.cx, name)
    }
}

impl Seen<'_, '_> {
    fn winner(&self, service: &Str) -> Option<Arc<Claim>> {
        let winner = self.cx.get(&self.world.joins.winners, service)?;
        Some((*winner).clone())
    }

    fn backend(&self, namespace: &Str, wanted: &BackendObjectRef) -> Resolved {
        let group = wanted.group.as_deref().unwrap_or_default();
        let kind = wanted.kind.as_deref().unwrap_or("Service");
        let namespace = wanted
            .namespace
            .as_deref()
            .map_or_else(|| namespace.clone(), Into::into);
        let name = Name::new(namespace.clone(), wanted.name.as_str());
        let claim = match (group, kind) {
            ("" | "core", "Service") => self.services(Kind::Service, &name),
            ("networking.istio.io", "ServiceEntry") => self.services(Kind::ServiceEntry, &name),
            ("networking.istio.io", "Hostname") => self.host(&namespace, &wanted.name),
            _ => {
                let message = format!("{kind} {name} is no Service, ServiceEntry or Hostname");
                return Err(unresolved("InvalidKind", message));
            }
        };
        let claim = claim.and_then(|claims| claims.into_iter().next());
        let Some(claim) = claim else {
            let message = format!("there is no {kind} {name}");
            return Err(unresolved("BackendNotFound", message));
        };
        let port = port(&claim, wanted.port)
            .map_err(|problem| unresolved("BackendNotFound", format!("{kind} {name} {problem}")))?;
        Ok((service(&claim), port))
    }

    /// A host name's service: of the own namespace, else the canonical one, else the first that is seen from everywhere.
    fn host(&self, namespace: &Str, host: &str) -> Option<Vec<Arc<Claim>>> {
        let found = self.cx.find(&self.world.by_host, &host.into());
        let claims: Vec<Arc<Claim>> = found
            .into_iter()
            .map(|(_, claim)| (*claim).clone())
            .collect();
        let own = claims
            .iter()
            .find(|claim| claim.meta.name.namespace == *namespace);
        let canonical = || {
            let mut canonical = claims.iter();
            canonical.find(|claim| crate::translate::service::is_canonical(claim, &claims))
        };
        own.or_else(canonical).map(|claim| vec![claim.clone()])
    }
}

fn unresolved(reason: &'static str, message: String) -> Unresolved {
    Unresolved { reason, message }
}

fn service(claim: &Claim) -> NamespacedHostname {
    crate::translate::l7::served::key(claim)
}

fn port(claim: &Claim, wanted: Option<i32>) -> Result<u16, String> {
    let known = |number: u16| claim.ports.iter().any(|port| port.port == number);
    match (wanted, &claim.ports[..]) {
        (Some(number), _) => {
            let found = u16::try_from(number).ok().filter(|number| known(*number));
            found.ok_or_else(|| format!("has no port {number}"))
        }
        (None, [only]) if claim.kind == Kind::ServiceEntry => Ok(only.port),
        (None, _) => Err("is named without a port".to_owned()),
    }
}

/// The Gateway API's part of the graph.
pub(super) fn gateway_api(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    attachments: &Attachments,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> GatewayApi {
    let world = attachments.world.clone();
    let routes = routes(graph, inputs, attachments, runs);
    let (resources, _) = graph.derive(&routes, |_, _, outcome| {
        let told = outcome.route.iter().flat_map(|route| {
            let name: Str = route.name().into();
            let key = move |waypoint: &Name| ((waypoint.clone(), name.clone()), route.clone());
            outcome.waypoints.iter().map(key)
        });
        told.collect()
    });
    let (of_routes, _) = graph.derive(&routes, |_, object, outcome| told(object, &outcome.parents));
    let tls = tls_policies(graph, inputs);
    let traffic = traffic_policies(graph, inputs);
    let by_waypoint = routes.index(|_, outcome| match outcome.authorizers.is_empty() {
        true => Vec::new(),
        false => outcome.waypoints.iter().cloned().collect(),
    });
    let of_tls = policy_statuses(graph, &tls, &world, Kind::BackendTlsPolicy);
    let of_traffic = policy_statuses(graph, &traffic, &world, Kind::BackendTrafficPolicy);
    GatewayApi {
        resources,
        parents: graph.join(&[&of_routes, &of_tls, &of_traffic]),
        overlays: overlays(graph, joins, &tls, &traffic),
        authorizers: Authorizers(by_waypoint),
    }
}

fn told(object: &ObjectRef, parents: &Parents) -> Vec<(ObjectRef, Parents)> {
    match parents.is_empty() {
        true => Vec::new(),
        false => vec![(object.clone(), parents.clone())],
    }
}

impl Authorizers {
    /// Those that a waypoint's routes name.
    pub(super) fn of(
        &self,
        cx: &Context<'_>,
        waypoint: &Name,
    ) -> BTreeMap<Str, ExternalAuthorizer> {
        let routes = cx.find(&self.0, waypoint);
        let all = routes
            .iter()
            .flat_map(|(_, outcome)| outcome.authorizers.clone());
        all.collect()
    }
}

fn routes(
    graph: &mut Graph,
    inputs: &Inputs,
    attachments: &Attachments,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Collection<ObjectRef, Outcome> {
    let all = attachments.clone();
    let (routes, counted) = graph.derive(&inputs.routes, move |cx, object, route| {
        let world = &all.world;
        let lookup = Seen { world, cx };
        let attached = cx.get(&all.all, object);
        let outcome = attached.map(|attached| outcome(&lookup, &all, route, &attached));
        outcome
            .map(|outcome| (object.clone(), outcome))
            .into_iter()
            .collect()
    });
    runs.insert("routes", counted);
    routes
}

fn outcome(
    lookup: &Seen<'_, '_>,
    all: &Attachments,
    route: &Sourced<RouteObject>,
    attached: &Attached,
) -> Outcome {
    let (kind, namespace) = (attached.kind, &attached.namespace);
    let shadowed = |service: &NamespacedHostname| {
        let others = all.in_front(lookup.cx, kind, namespace, service);
        others.into_iter().flat_map(|(_, ports)| ports).collect()
    };
    let effects: Vec<Effect> = attached
        .parents
        .iter()
        .map(|parent| attach::effect(namespace, parent, shadowed))
        .collect();
    let resolver = |wanted: &BackendObjectRef| lookup.backend(namespace, wanted);
    let translated = translate::translate(route, &resolver);
    let rules = match &translated.rules {
        Rules::Http { rules, .. } => rules.len(),
        Rules::Tls(rules) => rules.len(),
        Rules::Tcp(rules) => rules.len(),
    };
    let parents = attached
        .parents
        .iter()
        .zip(&effects)
        .filter_map(|(parent, effect)| {
            Some(ParentStatus {
                reference: status::parent(&parent.reference),
                conditions: attach::conditions(parent, effect, &translated, rules)?,
            })
        });
    let mut attachments: Vec<Attachment> = Vec::new();
    for attachment in effects.iter().flat_map(|effect| &effect.attachments) {
        if !attachments.contains(attachment) {
            attachments.push(attachment.clone());
        }
    }
    let parents = Arc::new(parents.collect());
    let route = (rules > 0 && !attachments.is_empty()).then(|| {
        Arc::new(Told::Route(Route {
            key: route.object.key(),
            created: route.object.meta().created.unwrap_or(i64::MAX),
            attachments,
            rules: translated.rules,
        }))
    });
    Outcome {
        route,
        waypoints: effects
            .into_iter()
            .flat_map(|effect| effect.waypoints)
            .collect(),
        parents,
        authorizers: translated.authorizers,
    }
}

fn tls_policies(graph: &mut Graph, inputs: &Inputs) -> Collection<Name, Wish<BackendTls>> {
    let maps = inputs.config_maps.clone();
    let (wishes, _) = graph.derive(&inputs.backend_tls, move |cx, name, policy| {
        let roots = |map: &Name| cx.get(&maps, map).and_then(|map| map.roots.clone());
        vec![(name.clone(), backend_tls::tls(policy, roots))]
    });
    wishes
}

fn traffic_policies(graph: &mut Graph, inputs: &Inputs) -> Collection<Name, Wish<Traffic>> {
    let (wishes, _) = graph.derive(&inputs.backend_traffic, |_, name, policy| {
        vec![(name.clone(), backend_tls::traffic(policy))]
    });
    wishes
}

type ByTarget<T> = Index<(Kind, Name), Name, Wish<T>>;

fn by_target<T: Data>(wishes: &Collection<Name, Wish<T>>) -> ByTarget<T> {
    wishes.index(|_, wish| {
        let targets: BTreeSet<_> = wish
            .attached()
            .map(|it| (it.kind, it.name.clone()))
            .collect();
        targets.into_iter().collect()
    })
}

/// What is said of policies, per target.
fn policy_statuses<T: Data>(
    graph: &mut Graph,
    wishes: &Collection<Name, Wish<T>>,
    world: &World,
    kind: Kind,
) -> Collection<ObjectRef, Parents> {
    let (by_target, world) = (by_target(wishes), world.clone());
    let (statuses, _) = graph.derive(wishes, move |cx, name, wish| {
        let lookup = Seen { world: &world, cx };
        let mut said = Vec::new();
        for (written, target) in &wish.targets {
            let Some(target) = target else { continue };
            let rivals = cx.find(&by_target, &(target.kind, target.name.clone()));
            let older = rivals.iter().find(|(rival, other)| {
                rival != name
                    && other.goes_before(wish)
                    && other.attached().any(|theirs| theirs == target)
            });
            let waypoints = lookup
                .services(target.kind, &target.name)
                .and_then(|claims| {
                    let has_port = claims
                        .iter()
                        .any(|claim| has_section(claim, target.section.as_ref()));
                    let all = claims
                        .iter()
                        .flat_map(|claim| claim.served_by.iter().cloned());
                    has_port.then(|| all.collect())
                });
            let older = older.map(|(rival, _)| rival);
            said.push(ParentStatus {
                reference: status::ancestor(&name.namespace, written),
                conditions: backend_tls::conditions(wish, older, waypoints.as_ref()),
            });
        }
        told(&reference(kind, name), &Arc::new(said))
    });
    statuses
}

fn has_section(claim: &Claim, section: Option<&Str>) -> bool {
    section.is_none_or(|section| claim.ports.iter().any(|port| port.name == *section))
}

/// What counts for each service.
fn overlays(
    graph: &mut Graph,
    joins: &Joins,
    tls: &Collection<Name, Wish<BackendTls>>,
    traffic: &Collection<Name, Wish<Traffic>>,
) -> Collection<Str, Overlay> {
    let (tls, traffic) = (by_target(tls), by_target(traffic));
    let (overlays, _) = graph.derive(&joins.winners, move |cx, key, claim| {
        let target = (claim.kind, claim.meta.name.clone());
        let mut overlay = Overlay::default();
        for (section, wish) in oldest(cx, &tls, &target) {
            overlay.sources.push(wish.source.clone());
            let ports = claim
                .ports
                .iter()
                .filter(|port| Some(&port.name) == section.as_ref());
            match &section {
                None => overlay.tls = Some(wish.asks.clone()),
                Some(_) => overlay
                    .tls_of_ports
                    .extend(ports.map(|port| (port.port, wish.asks.clone()))),
            }
        }
        for (section, wish) in oldest(cx, &traffic, &target) {
            if section.is_none() {
                overlay.sources.push(wish.source.clone());
                overlay.retry_budget = wish.asks.retry_budget;
                overlay.session.clone_from(&wish.asks.session);
            }
        }
        overlay.sources.dedup();
        let said = overlay != Overlay::default();
        said.then(|| (key.clone(), overlay)).into_iter().collect()
    });
    overlays
}

/// The oldest wish for a service, and for each of its ports.
fn oldest<T: Data>(
    cx: &Context<'_>,
    wishes: &ByTarget<T>,
    target: &(Kind, Name),
) -> BTreeMap<Option<Str>, Arc<Wish<T>>> {
    let mut found: BTreeMap<Option<Str>, Arc<Wish<T>>> = BTreeMap::new();
    for (_, wish) in cx.find(wishes, target) {
        let here = wish
            .attached()
            .filter(|it| (it.kind, &it.name) == (target.0, &target.1));
        for section in here.map(|it| it.section.clone()).collect::<BTreeSet<_>>() {
            let known = found.get(&section);
            if known.is_none_or(|known| wish.goes_before(known)) {
                found.insert(section, wish.clone());
            }
        }
    }
    found
}
