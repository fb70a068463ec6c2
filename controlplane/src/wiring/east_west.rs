//! What gateways between networks are told: the services of the whole mesh, their workloads in the gateway's network, the
//! waypoints in front of them, and the policies over the gateway's own pods. Nothing more.

use std::{collections::BTreeSet, sync::Arc};

use mesh::names::Str;
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    workload::{self as wire, gateway_address::Destination},
};

use super::{Facts, Inputs, Joins, remote::decoded};
use crate::{
    graph::{Collection, Context, Graph, Index},
    object::Name,
    output::{Resource, ResourceKey},
    translate::{
        alias, remote::exported_workload, scope::Scope, service::Claim, waypoint, workload_resource,
    },
};

/// What is on the inner side of gateways between networks.
pub(super) struct Inner {
    facts: Facts,
    /// Services that gateways know: global ones (`true`), and those of the waypoints in front of them.
    known: Collection<Str, Vec<Arc<bool>>>,
    /// Addresses of waypoints in front of global services that are no service's: a pod's own, as it is found by them.
    ahead: Ahead,
    /// The global services, per gateway.
    reached: Collection<(Name, Str), ()>,
    /// Workloads that are a gateway themselves, by uid.
    instances: Collection<Str, Name>,
}

impl Inner {
    /// Empty where there are no other clusters or networks.
    pub(super) fn new(graph: &mut Graph, inputs: &Inputs, joins: &Joins) -> Self {
        let facts = joins.facts.clone();
        // A cluster that is alone keeps no account of what gateways might be told.
        if is_alone(&facts) {
            return Self {
                facts,
                known: graph.source().clone(),
                ahead: graph.source().clone(),
                reached: graph.source().clone(),
                instances: graph.source().clone(),
            };
        }
        let (known, ahead) = known(graph, joins);
        let gateways = facts.east_west.clone();
        let (reached, _) = graph.derive(&known, move |cx, service, why| {
            let is_global = why.iter().any(|global| **global);
            let all = cx.find(&gateways, &()).into_iter();
            let to = |(gateway, _)| ((gateway, service.clone()), ());
            all.filter(|_| is_global).map(to).collect()
        });
        let (of_gateways, cluster) = (
            facts.east_west.collection().clone(),
            facts.settings.cluster_id.clone(),
        );
        let (instances, _) = graph.derive(&inputs.pods, move |cx, name, pod| {
            let gateway = waypoint::instance_of(&pod.meta);
            let gateway = gateway.filter(|it| cx.get(&of_gateways, it).is_some());
            let uid = format!("{cluster}//Pod/{}/{}", name.namespace, name.name);
            gateway.map(|it| (uid.into(), it)).into_iter().collect()
        });
        Self {
            facts,
            known,
            ahead,
            reached,
            instances,
        }
    }

    /// The services that a gateway takes other networks to.
    pub(super) fn reached(&self) -> &Collection<(Name, Str), ()> {
        &self.reached
    }

    /// What gateways get of all that there is.
    pub(super) fn resources(
        &self,
        graph: &mut Graph,
        everyones: &[&Collection<ResourceKey, Resource>],
    ) -> Collection<ResourceKey, Resource> {
        if is_alone(&self.facts) {
            return graph.source().clone();
        }
        let everyones = &graph.join(everyones);
        let telling = Telling {
            known: self.known.clone(),
            ahead: self.ahead.clone(),
            instances: self.instances.clone(),
            policies: self.policies(graph, everyones),
        };
        let gateways = self.facts.east_west.clone();
        let (told, _) = graph.derive(everyones, move |cx, key, resource| {
            let gateways = cx.find(&gateways, &());
            let told = |(gateway, network): (Name, Arc<Str>)| {
                let told = telling.told(cx, key, resource, (&gateway, &network))?;
                let told = Resource {
                    scope: Some(Arc::new(gateway)),
                    ..told
                };
                Some((told.key(), told))
            };
            gateways.into_iter().filter_map(told).collect()
        });
        told
    }

    /// The policies that gateways' own pods name, and which gateway's.
    fn policies(
        &self,
        graph: &mut Graph,
        everyones: &Collection<ResourceKey, Resource>,
    ) -> Index<Str, (Str, Name), ()> {
        let everyones = everyones.clone();
        let (named, _) = graph.derive(&self.instances, move |cx, uid, gateway| {
            let key = ResourceKey {
                type_url: ADDRESS_TYPE_URL,
                scope: None,
                name: uid.clone(),
            };
            let workload = cx.get(&everyones, &key).and_then(|it| decoded(&it));
            let policies = workload.map_or_else(Vec::new, |it| it.authorization_policies);
            let named = |policy: String| ((Str::from(policy), Name::clone(gateway)), ());
            policies.into_iter().map(named).collect()
        });
        named.index(|(policy, _), ()| vec![policy.clone()])
    }
}

/// Whether nobody comes here from another network.
fn is_alone(facts: &Facts) -> bool {
    !facts.settings.has_others || facts.settings.is_remote
}

/// Whom waypoints' own addresses stand in front of.
type Ahead = Collection<Str, Vec<Arc<()>>>;

/// Global services and those of the waypoints in front of them; and the addresses of waypoints that are no service's.
fn known(graph: &mut Graph, joins: &Joins) -> (Collection<Str, Vec<Arc<bool>>>, Ahead) {
    let facts = joins.facts.clone();
    let by_address = joins.winners.index(|_, claim| {
        let addresses = claim.service.addresses.iter();
        addresses.map(of_address).collect()
    });
    let services = by_address.clone();
    let (needed, _) = graph.derive(&joins.winners, move |cx, key, claim| {
        if facts.scope(cx, claim) != Scope::Global {
            return Vec::new();
        }
        let waypoints = waypoints(&claim.service);
        let waypoints = waypoints.flat_map(|it| behind(cx, &services, it));
        let of_waypoint = |service| ((service, key.clone()), false);
        let mut needed: Vec<_> = waypoints.map(of_waypoint).collect();
        needed.push(((key.clone(), key.clone()), true));
        needed.sort();
        needed.dedup();
        needed
    });
    let facts = joins.facts.clone();
    let (addresses, _) = graph.derive(&joins.winners, move |cx, key, claim| {
        if facts.scope(cx, claim) != Scope::Global {
            return Vec::new();
        }
        let addresses = waypoints(&claim.service).filter_map(address);
        let of_none = addresses.filter(|it| cx.find(&by_address, &of_address(it)).is_empty());
        let found: BTreeSet<Str> = of_none.filter_map(alias).collect();
        let found = found.into_iter();
        found.map(|address| ((address, key.clone()), ())).collect()
    });
    (
        graph.group(&needed.index(|(service, _), _| vec![service.clone()])),
        graph.group(&addresses.index(|(address, _), ()| vec![address.clone()])),
    )
}

fn waypoints(service: &wire::Service) -> impl Iterator<Item = &wire::GatewayAddress> {
    let weighted = service.weighted_waypoints.iter();
    let weighted = weighted.filter_map(|it| it.destination.as_ref());
    service.waypoint.iter().chain(weighted)
}

fn address(waypoint: &wire::GatewayAddress) -> Option<&wire::NetworkAddress> {
    match &waypoint.destination {
        Some(Destination::Address(address)) => Some(address),
        Some(Destination::Hostname(_)) | None => None,
    }
}

/// A network and an address of it.
type Place = (String, Vec<u8>);

fn of_address(address: &wire::NetworkAddress) -> Place {
    (address.network.clone(), address.address.to_vec())
}

/// The service behind a waypoint's reference: by its name, or by an address that it has.
fn behind(
    cx: &Context<'_>,
    by_address: &Index<Place, Str, Arc<Claim>>,
    waypoint: &wire::GatewayAddress,
) -> Vec<Str> {
    match &waypoint.destination {
        Some(Destination::Hostname(host)) => {
            vec![format!("{}/{}", host.namespace, host.hostname).into()]
        }
        Some(Destination::Address(address)) => {
            let found = cx.find(by_address, &of_address(address)).into_iter();
            found.map(|(service, _)| service).collect()
        }
        None => Vec::new(),
    }
}

struct Telling {
    known: Collection<Str, Vec<Arc<bool>>>,
    ahead: Ahead,
    instances: Collection<Str, Name>,
    policies: Index<Str, (Str, Name), ()>,
}

impl Telling {
    /// What a gateway is told of a resource that is everyone's; `None`: nothing.
    fn told(
        &self,
        cx: &Context<'_>,
        key: &ResourceKey,
        resource: &Resource,
        (gateway, network): (&Name, &Str),
    ) -> Option<Resource> {
        match key.type_url {
            ADDRESS_TYPE_URL if self.is_known(cx, &key.name) => Some(resource.clone()),
            ADDRESS_TYPE_URL => self.workload(cx, resource, gateway, network),
            AUTHORIZATION_TYPE_URL => {
                let named = cx.find(&self.policies, &key.name);
                let is_its = named.iter().any(|((_, by), _)| by == gateway);
                is_its.then(|| resource.clone())
            }
            _ => None,
        }
    }

    fn is_known(&self, cx: &Context<'_>, service: &Str) -> bool {
        cx.get(&self.known, service).is_some()
    }

    fn workload(
        &self,
        cx: &Context<'_>,
        resource: &Resource,
        gateway: &Name,
        network: &Str,
    ) -> Option<Resource> {
        let instance = cx.get(&self.instances, &resource.name);
        let is_its_own = instance.is_some_and(|it| *it == *gateway);
        let mut aliases = resource.aliases.iter();
        let is_ahead = aliases.any(|it| cx.get(&self.ahead, it).is_some());
        let reached = || resource.services.iter().any(|it| self.is_known(cx, it));
        if !is_its_own && !is_ahead && !reached() {
            return None;
        }
        let mut workload = decoded(resource)?;
        let known = |service: &str| self.is_known(cx, &service.into());
        if is_its_own {
            workload.services.retain(|service, _| known(service));
            return Some(workload_resource(&workload));
        }
        let is_here = *workload.network == **network;
        if is_ahead && is_here {
            workload.services.retain(|service, _| known(service));
            workload.authorization_policies.clear();
            return Some(workload_resource(&workload));
        }
        let told = is_here.then(|| exported_workload(workload, known))?;
        told.map(|told| workload_resource(&told))
    }
}
