//! What one cluster is told of another: its global services, their workloads, and the gateways into its network.
//!
//! A workload of the same network is reached as any other. Those of another network are not: for each service there, one
//! workload without addresses stands per gateway, and is reached through that gateway ("split horizon").

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh::names::Str;
use proto::workload::{
    self as wire, GatewayAddress, PortList, TunnelProtocol, WorkloadStatus, WorkloadType,
    gateway_address::Destination,
};

use super::{address_of, network::NetworkGateway};

/// One thing that a cluster tells others of.
#[derive(Clone, Debug, PartialEq)]
pub enum Exported {
    /// A global service.
    Service(Arc<wire::Service>),
    /// A workload, with those of its services that are global; it has one at least.
    Workload(Arc<wire::Workload>),
    /// A way into the cluster's network.
    Gateway(NetworkGateway),
}

/// Names what a cluster tells of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExportKey {
    /// `namespace/hostname`.
    Service(Str),
    /// Its uid.
    Workload(Str),
    /// Namespace and name of the Gateway.
    Gateway(Str),
}

/// What there is of a service in one other network, over all clusters there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Beyond {
    /// What its healthy workloads can take together.
    healthy: u32,
    /// What all of them can take.
    all: u32,
    /// Its ports, as any of the workloads has them.
    ports: PortList,
    /// Who its workloads are, as SPIFFE names.
    pub identities: BTreeSet<String>,
}

/// Of a workload, what other clusters are told: without services that are not global, and without policies, which its own
/// cluster enforces. `None`: nothing, for no service of it is global.
pub fn exported_workload(
    mut workload: wire::Workload,
    is_global: impl Fn(&str) -> bool,
) -> Option<wire::Workload> {
    workload.services.retain(|service, _| is_global(service));
    workload.authorization_policies.clear();
    (!workload.services.is_empty()).then_some(workload)
}

/// Sums up the workloads of a service in another network. Only what speaks HBONE can be at the end of a tunnel through the
/// gateway: others do not count.
pub fn beyond(service: &str, workloads: &[Arc<wire::Workload>]) -> Beyond {
    let mut sum = Beyond::default();
    let mut ports = BTreeMap::new();
    let speak =
        |workload: &&Arc<wire::Workload>| workload.tunnel_protocol() == TunnelProtocol::Hbone;
    for workload in workloads.iter().filter(speak) {
        // One when it says nothing, as for any endpoint.
        let capacity = workload.capacity.unwrap_or(1);
        sum.all = sum.all.saturating_add(capacity);
        if workload.status() == WorkloadStatus::Healthy {
            sum.healthy = sum.healthy.saturating_add(capacity);
        }
        let of_service = workload.services.get(service);
        for port in of_service.iter().flat_map(|list| &list.ports) {
            ports.entry(port.service_port).or_insert(*port);
        }
        sum.identities.insert(identity(workload));
    }
    sum.ports.ports = ports.into_values().collect();
    sum
}

/// Who a workload is, as a SPIFFE name.
pub fn identity(workload: &wire::Workload) -> String {
    let domain = match workload.trust_domain.as_str() {
        "" => "cluster.local",
        other => other,
    };
    let (namespace, account) = (&workload.namespace, &workload.service_account);
    format!("spiffe://{domain}/ns/{namespace}/sa/{account}")
}

/// The workloads that stand for a service in another network: one per gateway into it, which share its capacity. Where all of
/// the service's workloads are unready, so are they: traffic that has somewhere else to go goes there.
pub fn split_horizon(
    network: &str,
    service: &str,
    beyond: &Beyond,
    gateways: &[Arc<NetworkGateway>],
) -> Vec<wire::Workload> {
    let mut ways: BTreeMap<String, &GatewayAddress> = BTreeMap::new();
    for gateway in gateways {
        // The others lead to the same place.
        if let Some(address) = gateway.addresses.first() {
            ways.entry(way(gateway, address)).or_insert(address);
        }
    }
    let is_healthy = beyond.healthy > 0;
    let capacity = match is_healthy {
        true => beyond.healthy,
        false => beyond.all,
    };
    let shares = shares(capacity, ways.len());
    let parts = ways.into_iter().zip(shares);
    let used = parts.filter(|(_, share)| *share > 0);
    used.map(|((way, address), share)| {
        let uid = format!("{network}/SplitHorizonWorkload/{way}/{service}");
        wire::Workload {
            name: uid.clone(),
            uid,
            namespace: namespace_of(service).to_owned(),
            network: network.to_owned(),
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            workload_type: WorkloadType::Pod.into(),
            network_gateway: Some(address.clone()),
            capacity: Some(share),
            services: [(service.to_owned(), beyond.ports.clone())].into(),
            status: match is_healthy {
                true => WorkloadStatus::Healthy.into(),
                false => WorkloadStatus::Unhealthy.into(),
            },
            ..wire::Workload::default()
        }
    })
    .collect()
}

/// As even as whole numbers can be; together `capacity`.
fn shares(capacity: u32, ways: usize) -> impl Iterator<Item = u32> {
    let ways = u32::try_from(ways).unwrap_or(u32::MAX).max(1);
    let (each, left) = (capacity / ways, capacity % ways);
    (0..ways).map(move |index| each + u32::from(index < left))
}

fn way(gateway: &NetworkGateway, reference: &GatewayAddress) -> String {
    let address = match &reference.destination {
        Some(Destination::Address(it)) => {
            address_of(&it.address).map_or_else(String::new, |ip| ip.to_string())
        }
        Some(Destination::Hostname(it)) => it.hostname.clone(),
        None => String::new(),
    };
    format!("{}/{address}", gateway.name)
}

fn namespace_of(service: &str) -> &str {
    service.split('/').next().unwrap_or_default()
}

/// One service of what several clusters say of it, `own` first where this cluster has it: addresses of all, each with its
/// network, names of all. Everything else is said by the first.
pub fn merged(
    own: Option<&wire::Service>,
    others: &[Arc<wire::Service>],
    identities: &BTreeSet<String>,
) -> Option<wire::Service> {
    let mut all = own.into_iter().chain(others.iter().map(AsRef::as_ref));
    let mut service = all.next()?.clone();
    for other in all {
        for address in &other.addresses {
            if !service.addresses.contains(address) {
                service.addresses.push(address.clone());
            }
        }
        for name in &other.subject_alt_names {
            if !service.subject_alt_names.contains(name) {
                service.subject_alt_names.push(name.clone());
            }
        }
    }
    let missing: Vec<String> = identities
        .iter()
        .filter(|name| !service.subject_alt_names.contains(name))
        .cloned()
        .collect();
    service.subject_alt_names.extend(missing);
    Some(service)
}
