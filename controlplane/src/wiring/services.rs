//! What makes services, and which of several counts.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh::names::Str;

use super::{Facts, Inputs, Offer, reference};
use crate::{
    graph::{Collection, Context, Graph, Runs},
    object::{Kind, Name, ObjectRef, ServiceEntry},
    translate::{
        allocate,
        service::{self, Claim, ClaimKey},
        waypoint::{Bound, Traffic},
    },
};

pub(super) type Allocated = Collection<allocate::Host, Vec<IpAddr>>;

/// One computation for all entries: addresses must differ from each other.
pub(super) fn allocations(graph: &mut Graph, inputs: &Inputs) -> Allocated {
    let all = inputs.entries.index(|_, _| vec![()]);
    let all = graph.group(&all);
    let (allocated, _) = graph.derive(&all, |_, (), entries| {
        allocate::allocate(entries).into_iter().collect()
    });
    allocated
}

pub(super) fn offers(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
    allocated: &Allocated,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Collection<ObjectRef, Offer> {
    let known = facts.clone();
    let (of_services, counted) = graph.derive(&inputs.services, move |cx, name, service| {
        let bound = known.bind(cx, &service.meta, Traffic::Service);
        let namespace = known.namespace(cx, &name.namespace);
        let network = known.network(cx);
        let claim = service::of_service(
            &known.settings,
            &network,
            service,
            namespace.as_deref(),
            &bound,
        );
        let offer = Offer {
            served: Some(service::served(service)),
            claims: claim.into_iter().map(Arc::new).collect(),
            bound,
            visibility: None,
        };
        vec![(reference(Kind::Service, name), offer)]
    });
    runs.insert("services", counted);
    let (known, given) = (facts.clone(), allocated.clone());
    let (of_entries, counted) = graph.derive(&inputs.entries, move |cx, name, entry| {
        let visibility = known.visibility(cx, &name.namespace);
        let namespace = known.namespace(cx, &name.namespace);
        let (namespace, network) = (namespace.as_deref(), known.network(cx));
        let addresses = |host: &str| addresses(cx, &given, name, host);
        let wire = visibility.unwrap_or_default().wire();
        let bound = match wire {
            Some(_) => known.bind_entry(cx, &entry.meta, Traffic::Service),
            None => Bound::default(),
        };
        let claims = wire.map_or_else(Vec::new, |wire| {
            service::of_service_entry(&network, entry, namespace, &bound, wire, addresses)
        });
        let offer = Offer {
            claims: claims.into_iter().map(Arc::new).collect(),
            bound,
            served: None,
            visibility,
        };
        vec![(reference(Kind::ServiceEntry, name), offer)]
    });
    runs.insert("serviceentries", counted);
    graph.join(&[&of_services, &of_entries])
}

pub(super) fn addresses(
    cx: &Context<'_>,
    allocated: &Allocated,
    name: &Name,
    host: &str,
) -> Vec<IpAddr> {
    let given = cx.get(allocated, &(name.clone(), host.into()));
    given
        .map(|addresses| (*addresses).clone())
        .unwrap_or_default()
}

/// The claim that counts, per `namespace/hostname`.
pub(super) fn winners(
    graph: &mut Graph,
    offers: &Collection<ObjectRef, Offer>,
) -> Collection<Str, Arc<Claim>> {
    let (claims, _) = graph.derive(offers, |_, _, offer| {
        let keyed = offer
            .claims
            .iter()
            .map(|claim| (claim.key(), claim.clone()));
        keyed
            .collect::<BTreeMap<ClaimKey, Arc<Claim>>>()
            .into_iter()
            .collect()
    });
    let by_service = claims.index(|_, claim| vec![claim.service_key()]);
    let rivals = graph.group(&by_service);
    let (winners, _) = graph.derive(&rivals, |_, key, claims| {
        let claims: Vec<Arc<Claim>> = claims.iter().map(|claim| (**claim).clone()).collect();
        let winner = service::winner(&claims);
        winner
            .map(|winner| (key.clone(), winner))
            .into_iter()
            .collect()
    });
    winners
}

/// The claims that count for the hosts of an entry.
pub(super) fn won(
    cx: &Context<'_>,
    winners: &Collection<Str, Arc<Claim>>,
    entry: &ServiceEntry,
) -> BTreeMap<Str, Arc<Claim>> {
    let namespace = &entry.meta.name.namespace;
    let winner = |host: &String| {
        let winner = cx.get(winners, &format!("{namespace}/{host}").into())?;
        Some((Str::from(host.as_str()), (*winner).clone()))
    };
    entry.spec.hosts.iter().filter_map(winner).collect()
}
