//! Which endpoint of a service, which of its ports, and which of its addresses (node-tunnel 4.2).

use std::net::IpAddr;

use crate::{
    draw::Draw,
    names::Str,
    service::{HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service},
    view::{Endpoint, Endpoints, Place, Run},
    workload::{TunnelProtocol, Workload},
};

#[cfg(test)]
mod tests;

/// What a service is looked up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// An application's connection: the port must be one of the service's.
    Traffic,
    /// A waypoint or gateway: an endpoint with an application tunnel may serve a port that the service does not name.
    Gateway,
}

/// The endpoint that was drawn, and its port.
#[derive(Clone, Copy, Debug)]
pub struct Selected<'a> {
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Where it listens for the service port that was asked for.
    pub port: u16,
}

/// How a workload can be dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// At this address of its own.
    Ip(IpAddr),
    /// At what this name resolves to.
    Hostname(Str),
    /// Not itself: only through its network's gateway.
    Gateway,
}

/// Draws an endpoint of `service` for its port `port`, by capacity among those that its load balancing prefers for
/// `source`. `None`: no such port, or no endpoint to choose. A capacity of 0 is never chosen.
///
/// Cost: O(places + endpoints / 128) where most endpoints are usable.
pub fn select<'a>(
    service: &Service,
    endpoints: &'a Endpoints,
    source: &Workload,
    port: u16,
    purpose: Purpose,
    draw: Draw,
) -> Option<Selected<'a>> {
    let everyone = |_: &Workload| true;
    select_among(service, endpoints, source, port, purpose, draw, &everyone)
}

/// The same, among the endpoints that `is_candidate` holds for.
pub(crate) fn select_among<'a>(
    service: &Service,
    endpoints: &'a Endpoints,
    source: &Workload,
    port: u16,
    purpose: Purpose,
    draw: Draw,
    is_candidate: &dyn Fn(&Workload) -> bool,
) -> Option<Selected<'a>> {
    if purpose == Purpose::Traffic && !service.ports.contains_key(&port) {
        return None;
    }
    let usable = |endpoint: &'a Endpoint| {
        let port = target_port(endpoint, service, port, purpose)?;
        let workload = &endpoint.workload;
        let reachable = is_usable(workload, service.ip_families, &source.network);
        (reachable && is_candidate(workload)).then_some(Selected { endpoint, port })
    };
    let ranked = ranked(&service.load_balancing, endpoints, source);
    ranked
        .into_iter()
        .find_map(|runs| draw_from(&runs, draw, &usable))
}

/// Endpoint's map, then the service's target, then (for an application tunnel of its own port) the port itself.
pub(crate) fn target_port(
    endpoint: &Endpoint,
    service: &Service,
    port: u16,
    purpose: Purpose,
) -> Option<u16> {
    let mapped = endpoint.ports().get(&port).filter(|port| **port > 0);
    let target = service.ports.get(&port).filter(|port| **port > 0);
    let tunnel = endpoint.workload.application_tunnel;
    let own = tunnel.is_some_and(|it| it.port.is_some() || purpose == Purpose::Gateway);
    mapped.or(target).copied().or_else(|| own.then_some(port))
}

pub(crate) fn is_usable(workload: &Workload, families: IpFamilies, network: &str) -> bool {
    let remote = &*workload.network != network && workload.network_gateway.is_some();
    let addressed = workload.addresses.iter().any(|it| families.allows(*it));
    let supported = workload.tunnel_protocol != TunnelProtocol::Unsupported;
    supported && (addressed || workload.hostname.is_some() || remote)
}

/// The runs of endpoints from most to least preferred. Only a failover goes on to the next where one has no usable
/// endpoint; the others have one rank.
fn ranked<'a>(
    balancing: &LoadBalancing,
    endpoints: &'a Endpoints,
    source: &Workload,
) -> Vec<Vec<Run<'a>>> {
    let preferences = &balancing.routing_preferences;
    let mut ranked: Vec<(usize, Run<'_>)> = Vec::new();
    for (place, group) in endpoints.groups() {
        if place.unhealthy && balancing.health_policy == HealthPolicy::OnlyHealthy {
            continue;
        }
        let rank = |on_node| rank(balancing, place, source, on_node);
        if balancing.mode == LoadBalancingMode::Standard || !preferences.contains(&Scope::Node) {
            ranked.extend(group.all().filter_map(|run| Some((rank(false)?, run))));
        } else {
            let (here, elsewhere) = group.by_node(&source.node);
            ranked.extend(here.into_iter().filter_map(|run| Some((rank(true)?, run))));
            ranked.extend(
                elsewhere
                    .into_iter()
                    .filter_map(|run| Some((rank(false)?, run))),
            );
        }
    }
    ranked.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    let ranks = ranked.chunk_by(|(a, _), (b, _)| a == b);
    ranks
        .map(|runs| runs.iter().map(|(_, run)| *run).collect())
        .collect()
}

/// How well a place fits; `None`: not at all.
pub(crate) fn rank(
    balancing: &LoadBalancing,
    place: &Place,
    source: &Workload,
    on_node: bool,
) -> Option<usize> {
    let preferences = &balancing.routing_preferences;
    let fits = |scope: &Scope| scope_matches(*scope, place, source, on_node);
    match balancing.mode {
        LoadBalancingMode::Standard | LoadBalancingMode::Passthrough => Some(0),
        LoadBalancingMode::Strict => preferences.iter().all(fits).then_some(0),
        LoadBalancingMode::Failover => Some(leading_matches(preferences, fits)),
    }
}

/// The number of leading preferences that match. A leading NETWORK that does not match is passed over, and one that
/// does outweighs all the others.
fn leading_matches(preferences: &[Scope], fits: impl Fn(&Scope) -> bool) -> usize {
    let leading = |scopes: &[Scope]| scopes.iter().take_while(|scope| fits(scope)).count();
    match preferences {
        [Scope::Network, rest @ ..] => {
            let bonus = if fits(&Scope::Network) {
                preferences.len()
            } else {
                0
            };
            bonus + leading(rest)
        }
        all => leading(all),
    }
}

/// Each compares its own string only; empty equals empty.
fn scope_matches(scope: Scope, place: &Place, source: &Workload, on_node: bool) -> bool {
    match scope {
        Scope::Region => place.locality.region == source.locality.region,
        Scope::Zone => place.locality.zone == source.locality.zone,
        Scope::Subzone => place.locality.subzone == source.locality.subzone,
        Scope::Node => on_node,
        Scope::Cluster => place.cluster == source.cluster_id,
        Scope::Network => place.network == source.network,
    }
}

/// Draws until an endpoint is usable; after a few misses looks at every one, so that the answer is exact.
fn draw_from<'a>(
    runs: &[Run<'a>],
    mut draw: Draw,
    usable: &impl Fn(&'a Endpoint) -> Option<Selected<'a>>,
) -> Option<Selected<'a>> {
    let total = runs.iter().map(|run| run.weight).sum();
    for _ in 0..8 {
        let (now, later) = draw.split();
        let drawn = at(runs, now.below(total)?)?;
        if let Some(selected) = usable(drawn) {
            return Some(selected);
        }
        draw = later;
    }
    let all = runs.iter().flat_map(|run| run.endpoints);
    let usable: Vec<_> = all.filter_map(usable).collect();
    let weights: Vec<_> = usable
        .iter()
        .map(|it| it.endpoint.workload.capacity)
        .collect();
    draw.weighted(&weights).map(|at| usable[at])
}

/// The endpoint at this point of the cumulated weights.
fn at<'a>(runs: &[Run<'a>], mut rest: u64) -> Option<&'a Endpoint> {
    for run in runs {
        if rest >= run.weight {
            rest -= run.weight;
            continue;
        }
        return run.endpoints.iter().find(|it| {
            let weight = u64::from(it.workload.capacity);
            let hit = rest < weight;
            rest = rest.saturating_sub(weight);
            hit
        });
    }
    None
}

/// Which address of `workload` to dial for a connection that was addressed to `wanted`: that one if it is the
/// workload's; else one that `families` allows, of the same family if there is one; else its host name; else only its
/// gateway.
pub fn reach(workload: &Workload, families: IpFamilies, wanted: IpAddr) -> Option<Reach> {
    let addresses = &workload.addresses;
    if addresses.contains(&wanted) {
        return Some(Reach::Ip(wanted));
    }
    let allowed = || addresses.iter().filter(|it| families.allows(**it));
    let same = allowed().find(|it| it.is_ipv4() == wanted.is_ipv4());
    if let Some(address) = same.or_else(|| allowed().next()) {
        return Some(Reach::Ip(*address));
    }
    if let Some(hostname) = &workload.hostname {
        return Some(Reach::Hostname(hostname.clone()));
    }
    workload.network_gateway.as_ref().map(|_| Reach::Gateway)
}
