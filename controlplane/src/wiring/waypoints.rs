//! What waypoints are told, as derived collections: each waypoint (by its Gateway) has resources of its own.

use std::{collections::BTreeMap, sync::Arc};

use mesh::{
    l7::{served::ServedWorkload, view::Resource as Told},
    names::{Str, WorkloadUid},
};

use super::{Facts, Inputs, Joins, Made};
use crate::{
    graph::{Collection, Graph, Runs},
    object::{Name, ObjectRef},
    output::{Resource, ResourceKey},
    translate::l7::{self, Key, config, keyed, references, served},
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
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Collection<ResourceKey, Resource> {
    let services = services(graph, joins, specified);
    let workloads = workloads(graph, made);
    let all = graph.join(&[specified, &services, &workloads]);
    let (encoded, counted) = graph.derive(&all, |_, (gateway, _), told| {
        let resource = l7::resource(gateway, told);
        vec![(resource.key(), resource)]
    });
    runs.insert("waypoint resources", counted);
    encoded
}

/// The settings of each waypoint.
pub(super) fn configs(graph: &mut Graph, inputs: &Inputs, facts: &Facts) -> PerWaypoint {
    let (settings, waypoints) = (facts.settings.clone(), facts.waypoints.clone());
    let (configs, _) = graph.derive(&inputs.gateways, move |cx, name, gateway| {
        let waypoint = cx.get(&waypoints, name);
        let config = waypoint.map(|_| config::config(&settings, gateway));
        let keyed = config.map(|config| keyed(name, Told::Config(config)));
        keyed.into_iter().collect()
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
