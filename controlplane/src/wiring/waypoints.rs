//! What waypoints are told, as derived collections: each waypoint (by its Gateway) has resources of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh::{
    l7::{
        served::{ServedWorkload, WorkloadLabels},
        view::Resource as Told,
    },
    names::{Str, WorkloadUid},
};

use super::{
    Facts, Inputs, Joins, Made, callers, east_west::Inner, gateway_api::Authorizers, istio::Rules,
};
use crate::{
    graph::{Collection, Context, Graph, Runs},
    object::{Kind, Labels, Name, ObjectRef, Pod, ServiceEntry, WorkloadEntry},
    output::{Resource, ResourceKey},
    translate::{
        Settings,
        l7::{
            self, Key,
            backend::{self, Overlay},
            config, keyed, references, served,
        },
        workload,
    },
};

/// What a waypoint is told, by its Gateway and by the resource's name.
pub(super) type PerWaypoint = Collection<Key, Arc<Told>>;

/// Why a waypoint must know a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Need {
    /// Its clients come through it.
    Bound,
    /// A resource of this name leads to it.
    Named(Str),
}

/// All that waypoints are told, and how endpoints are reached; `specified`: what came of routes, policies and settings.
pub(super) fn resources(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    made: &Collection<ObjectRef, Made>,
    (specified, inner): (&PerWaypoint, &Inner),
    overlays: &Collection<Str, Overlay>,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> (Collection<ResourceKey, Resource>, PerWaypoint) {
    let facts = &joins.facts;
    let services = services(graph, joins, specified, inner);
    let rules = Rules::new(inputs, facts);
    let backends = backends(graph, joins, rules, &services, overlays);
    let workloads = workloads(graph, made);
    let callers = callers::labels(graph, inputs, &facts.settings, specified);
    let labels = labels(graph, inputs, facts, made, (&backends, &callers));
    let all = graph.join(&[specified, &services, &backends, &workloads, &labels]);
    let (encoded, counted) = graph.derive(&all, |_, (gateway, _), told| {
        let resource = l7::resource(gateway, told);
        vec![(resource.key(), resource)]
    });
    runs.insert("waypoint resources", counted);
    (encoded, backends)
}

/// The settings of each waypoint.
pub(super) fn configs(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
    authorizers: &Authorizers,
) -> PerWaypoint {
    let (settings, waypoints) = (facts.settings.clone(), facts.waypoints.clone());
    let authorizers = authorizers.clone();
    let (configs, _) = graph.derive(&inputs.gateways, move |cx, name, gateway| {
        if cx.get(&waypoints, name).is_none() {
            return Vec::new();
        }
        let mut config = config::config(&settings, gateway);
        config.authorizers.extend(authorizers.of(cx, name));
        vec![keyed(name, Told::Config(config))]
    });
    configs
}

/// Services that are bound to a waypoint, those that its other resources lead to, and those that a gateway between networks
/// takes other networks to.
fn services(
    graph: &mut Graph,
    joins: &Joins,
    specified: &PerWaypoint,
    inner: &Inner,
) -> PerWaypoint {
    let (bound, _) = graph.derive(&joins.winners, |_, service, claim| {
        let need = |gateway: &Name| ((gateway.clone(), service.clone(), Need::Bound), true);
        claim.served_by.iter().map(need).collect()
    });
    let (named, _) = graph.derive(specified, |_, (gateway, name), told| {
        let services = references::services(told).into_iter();
        let key = |service| {
            (
                gateway.clone(),
                Str::from(format!("{service}")),
                Need::Named(name.clone()),
            )
        };
        services.map(|service| (key(service), false)).collect()
    });
    let (reached, _) = graph.derive(inner.reached(), |_, (gateway, service), _| {
        vec![((gateway.clone(), service.clone(), Need::Bound), true)]
    });
    let needs = graph.join(&[&bound, &named, &reached]);
    let by_service =
        needs.index(|(gateway, service, _), _| vec![(gateway.clone(), service.clone())]);
    let needed = graph.group(&by_service);
    let winners = joins.winners.clone();
    let (services, _) = graph.derive(&needed, move |cx, (gateway, service), needs| {
        let bound = needs.iter().any(|bound| **bound);
        let claim = cx.get(&winners, service);
        let told = claim.map(|claim| Told::Service(served::service(&claim, bound)));
        told.map(|told| keyed(gateway, told)).into_iter().collect()
    });
    services
}

/// How the endpoints of the services that a waypoint knows are reached.
fn backends(
    graph: &mut Graph,
    joins: &Joins,
    rules: Rules,
    services: &PerWaypoint,
    overlays: &Collection<Str, Overlay>,
) -> PerWaypoint {
    let (overlays, winners) = (overlays.clone(), joins.winners.clone());
    let east_west = joins.facts.east_west.collection().clone();
    let (backends, _) = graph.derive(services, move |cx, (gateway, _), told| {
        let Told::Service(service) = &***told else {
            return Vec::new();
        };
        // What ends in an inner tunnel is reached as its other end says.
        if cx.get(&east_west, gateway).is_some() {
            return Vec::new();
        }
        let key = service.service.to_string().into();
        let overlay = cx.get(&overlays, &key);
        let claim = cx.get(&winners, &key);
        let ruled = claim.and_then(|claim| rules.policy(cx, gateway, &claim));
        let policy = backend::merge(&service.service, ruled.as_ref(), overlay.as_deref());
        let policy = policy.map(|policy| keyed(gateway, Told::Backend(Box::new(policy))));
        policy.into_iter().collect()
    });
    backends
}

/// Labels of the endpoints of services whose policies ask for them (subsets, and locality by labels), and of `callers`.
fn labels(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
    made: &Collection<ObjectRef, Made>,
    (backends, callers): (&PerWaypoint, &Collection<callers::Asked, Arc<Labels>>),
) -> PerWaypoint {
    let by_service = made.index(|_, made| {
        let services = made.resources.iter().flat_map(|it| it.services.iter());
        let services: BTreeSet<Str> = services.cloned().collect();
        services.into_iter().collect()
    });
    let objects = Objects {
        settings: facts.settings.clone(),
        pods: inputs.pods.clone(),
        workload_entries: inputs.workload_entries.clone(),
        entries: inputs.entries.clone(),
    };
    let (asked, _) = graph.derive(backends, move |cx, (gateway, _), told| {
        let service = match &***told {
            Told::Backend(policy) if policy.asks_labels() => policy.service.to_string(),
            _ => return Vec::new(),
        };
        let service = Str::from(service);
        let mut all = BTreeMap::new();
        for (object, made) in cx.find(&by_service, &service) {
            let members = made
                .resources
                .iter()
                .filter(|it| it.services.contains(&service));
            for workload in members {
                let labels = objects.labels(cx, &object, &workload.name);
                let key = (gateway.clone(), workload.name.clone(), service.clone());
                all.insert(key, labels);
            }
        }
        all.into_iter().collect()
    });
    let asked = graph.join(&[&asked, callers]);
    let by_workload = asked.index(|(gateway, uid, _), _| vec![(gateway.clone(), uid.clone())]);
    let by_workload = graph.group(&by_workload);
    let (labels, _) = graph.derive(&by_workload, |_, (gateway, uid), labels| {
        let told = labels.first().map(|labels| {
            Told::Labels(WorkloadLabels {
                uid: WorkloadUid(uid.clone()),
                labels: (***labels).clone(),
            })
        });
        told.map(|told| keyed(gateway, told)).into_iter().collect()
    });
    labels
}

/// The objects that workloads are made of.
struct Objects {
    settings: Arc<Settings>,
    pods: Collection<Name, Pod>,
    workload_entries: Collection<Name, WorkloadEntry>,
    entries: Collection<Name, ServiceEntry>,
}

impl Objects {
    /// The labels of a workload, by the object that it was made of.
    fn labels(&self, cx: &Context<'_>, object: &ObjectRef, uid: &str) -> Arc<Labels> {
        let name = &object.name;
        let found = match object.kind {
            Kind::Pod => cx.get(&self.pods, name).map(|pod| pod.meta.labels.clone()),
            Kind::WorkloadEntry => cx
                .get(&self.workload_entries, name)
                .map(|entry| Arc::new(workload::entry_labels(&entry))),
            Kind::ServiceEntry => cx
                .get(&self.entries, name)
                .map(|entry| Arc::new(workload::labels_of_inline(&self.settings, &entry, uid))),
            _ => None,
        };
        found.unwrap_or_default()
    }
}

/// Workloads that are served by their own addresses.
fn workloads(graph: &mut Graph, made: &Collection<ObjectRef, Made>) -> PerWaypoint {
    let (workloads, _) = graph.derive(made, |_, _, made| {
        let of_workload = |uid: &Str| {
            let told = Told::Workload(ServedWorkload {
                uid: WorkloadUid(uid.clone()),
            });
            made.served_by
                .iter()
                .map(move |gateway| keyed(gateway, told.clone()))
        };
        let uids = made.resources.iter().map(|resource| &resource.name);
        uids.flat_map(of_workload).collect()
    });
    workloads
}
