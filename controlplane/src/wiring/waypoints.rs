//! What waypoints are told, as derived collections: each waypoint (by its Gateway) has resources of its own.

use std::{collections::BTreeMap, sync::Arc};

use mesh::{
    l7::{served::ServedWorkload, view::Resource as Told},
    names::{Str, WorkloadUid},
};

use super::{Facts, Inputs, Joins, Made, gateway_api::Authorizers};
use crate::{
    graph::{Collection, Graph, Runs},
    object::{Name, ObjectRef},
    output::{Resource, ResourceKey},
    translate::l7::{
        self, Key,
        backend::{self, Overlay},
        config, keyed, references, served,
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

/// All that waypoints are told; `specified`: what came of routes, policies and settings.
pub(super) fn resources(
    graph: &mut Graph,
    joins: &Joins,
    made: &Collection<ObjectRef, Made>,
    specified: &PerWaypoint,
    overlays: &Collection<Str, Overlay>,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Collection<ResourceKey, Resource> {
    let services = services(graph, joins, specified);
    let backends = backends(graph, &services, overlays);
    let workloads = workloads(graph, made);
    let all = graph.join(&[specified, &services, &backends, &workloads]);
    let (encoded, counted) = graph.derive(&all, |_, (gateway, _), told| {
        let resource = l7::resource(gateway, told);
        vec![(resource.key(), resource)]
    });
    runs.insert("waypoint resources", counted);
    encoded
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

/// Services that are bound to a waypoint, and those that its other resources lead to.
fn services(graph: &mut Graph, joins: &Joins, specified: &PerWaypoint) -> PerWaypoint {
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
    let needs = graph.join(&[&bound, &named]);
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
    services: &PerWaypoint,
    overlays: &Collection<Str, Overlay>,
) -> PerWaypoint {
    let overlays = overlays.clone();
    let (backends, _) = graph.derive(services, move |cx, (gateway, _), told| {
        let Told::Service(service) = &***told else {
            return Vec::new();
        };
        let overlay = cx.get(&overlays, &service.service.to_string().into());
        let policy = backend::merge(&service.service, None, overlay.as_deref());
        let policy = policy.map(|policy| keyed(gateway, Told::Backend(Box::new(policy))));
        policy.into_iter().collect()
    });
    backends
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
