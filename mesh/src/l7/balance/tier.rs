//! How much an endpoint is preferred: 0 most.

use super::{
    super::backend::{Distribution, Locality},
    Candidate, Source,
};
use crate::{
    names::Str,
    select::rank,
    service::{LoadBalancingMode, Scope, Service},
    view::Place,
    workload::{self, Workload},
};

/// The tier of an endpoint; none: it is not used.
pub(super) fn of(
    service: Option<&Service>,
    locality: Option<&Locality>,
    source: Source<'_>,
    candidate: Candidate<'_>,
) -> Option<usize> {
    match locality {
        Some(Locality::Off) => Some(0),
        Some(Locality::Failover(regions)) => Some(nearness(regions, source, candidate)),
        Some(Locality::Priority(labels)) => Some(missed(labels, source, candidate)),
        Some(Locality::Distribute(_)) => Some(0),
        None => service.map_or(Some(0), |it| preferred(it, source, candidate)),
    }
}

/// By the service's own preferences.
fn preferred(service: &Service, source: Source<'_>, candidate: Candidate<'_>) -> Option<usize> {
    let balancing = &service.load_balancing;
    let place = Place::from(candidate.workload);
    let here = !source.workload.node.is_empty() && candidate.workload.node == source.workload.node;
    let rank = rank(balancing, &place, source.workload, here)?;
    // Ranks grow with preference.
    let most = match balancing.mode {
        LoadBalancingMode::Failover => {
            let network = balancing.routing_preferences.first() == Some(&Scope::Network);
            balancing.routing_preferences.len() * if network { 2 } else { 1 }
        }
        _ => 0,
    };
    Some(most.saturating_sub(rank))
}

/// Same subzone, zone, region, elsewhere; from a region that names its successor, other regions last.
fn nearness(regions: &[(Str, Str)], source: Source<'_>, candidate: Candidate<'_>) -> usize {
    let (here, there) = (&source.workload.locality, &candidate.workload.locality);
    if here.region != there.region {
        let next = regions.iter().find(|(from, _)| *from == here.region);
        return match next {
            Some((_, to)) if *to != there.region => 4,
            _ => 3,
        };
    }
    match (here.zone == there.zone, here.subzone == there.subzone) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    }
}

/// How many labels are left after the leading ones that fit.
fn missed(labels: &[(Str, Option<Str>)], source: Source<'_>, candidate: Candidate<'_>) -> usize {
    let fits = |(name, wanted): &&(Str, Option<Str>)| {
        let there = value(name, candidate);
        match wanted {
            Some(wanted) => there == Some(&**wanted),
            None => there == value(name, source),
        }
    };
    labels.len() - labels.iter().take_while(fits).count()
}

/// A label's value; those of the topology are known of every workload.
fn value<'a>(name: &str, of: Candidate<'a>) -> Option<&'a str> {
    let workload: &Workload = of.workload;
    let known = match name {
        "topology.kubernetes.io/region" => &workload.locality.region,
        "topology.kubernetes.io/zone" => &workload.locality.zone,
        "topology.istio.io/subzone" => &workload.locality.subzone,
        "topology.istio.io/network" => &workload.network,
        "topology.istio.io/cluster" => &workload.cluster_id,
        "kubernetes.io/hostname" => &workload.node,
        other => return of.labels?.get(other).map(|it| &**it),
    };
    Some(known)
}

/// The shares from where the waypoint is; none: all endpoints are alike.
pub(super) fn distribution<'a>(
    locality: Option<&'a Locality>,
    source: Source<'_>,
) -> Option<&'a Distribution> {
    match locality {
        Some(Locality::Distribute(all)) => all.iter().find(|it| lies_in(&source, &it.from)),
        _ => None,
    }
}

/// Whether a workload is in `region/zone/subzone`, with `*` at the end or parts left out.
pub(super) fn lies_in(candidate: &Candidate<'_>, pattern: &str) -> bool {
    let workload::Locality {
        region,
        zone,
        subzone,
    } = &*candidate.workload.locality;
    let mut parts = [region, zone, subzone].into_iter();
    pattern.split('/').all(|wanted| {
        let part = parts.next();
        wanted == "*" || part.is_some_and(|it| **it == *wanted)
    })
}
