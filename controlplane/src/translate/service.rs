//! Services and ServiceEntries to the mesh's services: one per host name, and which of several claims on a host name counts.

use std::{cmp::Ordering, collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh::{l7::served as l7, names::Str};
use proto::workload::{self as wire, IpFamilies, LoadBalancing, load_balancing};

use super::{
    Settings, bytes_of, condition, network_address,
    port::{PortSpec, is_grpc_web, protocol, protocol_of},
    visibility::Visibility,
    waypoint::Bound,
};
use crate::{
    crd::{Location, Resolution, ServiceEntryPort},
    object::{Kind, Labels, Meta, Name, Service, ServiceEntry, ServicePort, TargetPort, labels_of},
    output::{Condition, Truth},
};

/// How addresses of Unix sockets start.
pub const UNIX: &str = "unix://";

/// One object's claim to be the service of a host name.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    /// Kind of the object: Service or ServiceEntry.
    pub kind: Kind,
    /// Its names and labels.
    pub meta: Meta,
    /// The host name.
    pub hostname: Str,
    /// The wire form, complete but for `canonical`.
    pub service: wire::Service,
    /// Labels that select its endpoints; `None`: its endpoints are written by others.
    pub selector: Option<Arc<Labels>>,
    /// Its ports, to join endpoints with.
    pub ports: Vec<PortSpec>,
    /// How a waypoint finds its endpoints.
    pub resolution: l7::Resolution,
    /// Whether its endpoints are outside the mesh.
    pub external: bool,
    /// The waypoints its traffic goes through.
    pub waypoints: Vec<Name>,
    /// The waypoints that have to know of it: those, and one that is not ready yet.
    pub served_by: Vec<Name>,
}

/// Names a claim.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClaimKey {
    /// Kind of the object.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
    /// The host name.
    pub hostname: Str,
}

impl Claim {
    /// Its key.
    pub fn key(&self) -> ClaimKey {
        ClaimKey {
            kind: self.kind,
            name: self.meta.name.clone(),
            hostname: self.hostname.clone(),
        }
    }

    /// The resource's name: `namespace/hostname`.
    pub fn service_key(&self) -> Str {
        format!("{}/{}", self.meta.name.namespace, self.hostname).into()
    }

    /// Whether it selects what has these labels.
    pub fn selects(&self, labels: &Labels) -> bool {
        self.selector.as_ref().is_some_and(|selector| {
            !selector.is_empty() && crate::object::selects(selector, labels)
        })
    }
}

/// The better claim first: a Kubernetes Service, else the oldest ServiceEntry.
pub fn rank(a: &Claim, b: &Claim) -> Ordering {
    let entry = |claim: &Claim| claim.kind != Kind::Service;
    (entry(a), a.meta.age()).cmp(&(entry(b), b.meta.age()))
}

/// The claim that counts among those of one host name in one namespace.
pub fn winner(claims: &[Arc<Claim>]) -> Option<Arc<Claim>> {
    claims.iter().min_by(|a, b| rank(a, b)).cloned()
}

/// Whether this one is the host name's canonical service in the whole mesh, given the winners of every namespace.
pub fn is_canonical(claim: &Claim, winners: &[Arc<Claim>]) -> bool {
    if claim.kind == Kind::Service {
        return true;
    }
    let private = |claim: &Claim| claim.service.visibility() == wire::Visibility::Namespace;
    let best = winners
        .iter()
        .filter(|other| !private(other))
        .min_by(|a, b| rank(a, b));
    best.is_some_and(|best| best.key() == claim.key())
}

/// A Kubernetes Service; `None` for ExternalName, which is a DNS record and no service.
pub fn of_service(
    settings: &Settings,
    network: &str,
    service: &Service,
    namespace: Option<&Meta>,
    bound: &Bound,
) -> Option<Claim> {
    if service.external_name {
        return None;
    }
    let Name {
        namespace: in_namespace,
        name,
    } = &service.meta.name;
    let hostname = settings.service_hostname(in_namespace, name);
    let ports: Vec<PortSpec> = service.ports.iter().map(PortSpec::from).collect();
    let wire = wire::Service {
        name: name.to_string(),
        namespace: in_namespace.to_string(),
        hostname: hostname.clone(),
        addresses: service
            .cluster_ips
            .iter()
            .map(|ip| network_address(network, *ip))
            .collect(),
        ports: ports.iter().map(PortSpec::of_service).collect(),
        port_names: port_names(&ports),
        load_balancing: load_balancing_of(service, namespace),
        ip_families: ip_families(&service.ip_families).into(),
        ..bound_to(bound)
    };
    Some(Claim {
        kind: Kind::Service,
        meta: service.meta.clone(),
        hostname: hostname.into(),
        service: wire,
        selector: (!service.selector.is_empty()).then(|| service.selector.clone()),
        ports,
        resolution: l7::Resolution::Static,
        external: false,
        waypoints: bound.names.clone(),
        served_by: bound.served_by.clone(),
    })
}

/// A ServiceEntry: one claim per host.
pub fn of_service_entry(
    network: &str,
    entry: &ServiceEntry,
    namespace: Option<&Meta>,
    bound: &Bound,
    visibility: wire::Visibility,
    allocated: impl Fn(&str) -> Vec<IpAddr>,
) -> Vec<Claim> {
    let spec = &entry.spec;
    let ports: Vec<PortSpec> = spec.ports.iter().filter_map(entry_port).collect();
    let selector = spec.workload_selector.as_ref();
    let selector = selector.map(|selector| Arc::new(labels_of(&selector.labels)));
    // A wildcard host cannot be resolved by a node tunnel: only behind a waypoint, and only with DYNAMIC_DNS.
    let usable = |host: &&String| !host.contains('*') || spec.resolution == Resolution::DynamicDns;
    let claim = |host: &String| {
        let wire = wire::Service {
            name: entry.meta.name.name.to_string(),
            namespace: entry.meta.name.namespace.to_string(),
            hostname: host.clone(),
            addresses: entry_addresses(network, entry, &allocated(host)),
            ports: ports.iter().map(PortSpec::of_service).collect(),
            port_names: port_names(&ports),
            subject_alt_names: spec.subject_alt_names.clone(),
            load_balancing: entry_load_balancing(entry, namespace),
            visibility: visibility.into(),
            ..bound_to(bound)
        };
        Claim {
            kind: Kind::ServiceEntry,
            meta: entry.meta.clone(),
            hostname: host.as_str().into(),
            service: wire,
            selector: selector.clone(),
            ports: ports.clone(),
            resolution: resolution(spec.resolution),
            external: spec.location == Location::MeshExternal,
            waypoints: bound.names.clone(),
            served_by: bound.served_by.clone(),
        }
    };
    spec.hosts.iter().filter(usable).map(claim).collect()
}

fn resolution(written: Resolution) -> l7::Resolution {
    match written {
        Resolution::None => l7::Resolution::None,
        Resolution::Static => l7::Resolution::Static,
        Resolution::Dns => l7::Resolution::Dns,
        Resolution::DnsRoundRobin => l7::Resolution::DnsRoundRobin,
        Resolution::DynamicDns => l7::Resolution::DynamicDns,
    }
}

fn port_names(ports: &[PortSpec]) -> Vec<wire::service::PortName> {
    let named = ports.iter().filter(|port| !port.name.is_empty());
    let told = named.map(|port| wire::service::PortName {
        service_port: port.port.into(),
        name: port.name.to_string(),
    });
    told.collect()
}

fn bound_to(bound: &Bound) -> wire::Service {
    wire::Service {
        waypoint: bound.waypoint.clone(),
        weighted_waypoints: bound.weighted.clone(),
        ingress_use_waypoint: bound.ingress,
        ..wire::Service::default()
    }
}

impl From<&ServicePort> for PortSpec {
    fn from(port: &ServicePort) -> Self {
        Self {
            name: port.name.clone(),
            port: port.port,
            target: port.target.clone(),
            protocol: protocol_of(port.app_protocol.as_deref(), &port.name),
            grpc_web: is_grpc_web(port.app_protocol.as_deref(), &port.name),
        }
    }
}

fn entry_port(port: &ServiceEntryPort) -> Option<PortSpec> {
    let number = |n: u32| u16::try_from(n).ok().filter(|n| *n != 0);
    Some(PortSpec {
        name: port.name.as_str().into(),
        port: number(port.number)?,
        target: number(port.target_port).map_or(TargetPort::Same, TargetPort::Number),
        protocol: protocol(&port.protocol),
        grpc_web: is_grpc_web(Some(&port.protocol), ""),
    })
}

fn entry_addresses(
    network: &str,
    entry: &ServiceEntry,
    allocated: &[IpAddr],
) -> Vec<wire::NetworkAddress> {
    let written = entry
        .spec
        .addresses
        .iter()
        .filter_map(|text| cidr_or_address(text));
    let address = |(address, length): (IpAddr, Option<u8>)| wire::NetworkAddress {
        network: network.to_owned(),
        address: bytes_of(address),
        length: length.map(u32::from),
    };
    let written: Vec<_> = written.map(address).collect();
    match written.is_empty() {
        true => allocated
            .iter()
            .map(|ip| network_address(network, *ip))
            .collect(),
        false => written,
    }
}

/// An address, or a range without its host bits. A range of one address is an address.
fn cidr_or_address(text: &str) -> Option<(IpAddr, Option<u8>)> {
    if let Ok(address) = text.parse() {
        return Some((address, None));
    }
    let range: IpNet = text.parse().ok()?;
    let length = (range.prefix_len() != range.max_prefix_len()).then_some(range.prefix_len());
    Some((range.network(), length))
}

fn ip_families(families: &[Str]) -> IpFamilies {
    let has = |family: &str| families.iter().any(|found| **found == *family);
    match (has("IPv4"), has("IPv6")) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

fn load_balancing_of(service: &Service, namespace: Option<&Meta>) -> Option<LoadBalancing> {
    use load_balancing::{Mode, Scope};
    let mut balancing = match service.local_only {
        true => preferring(&[Scope::Node], Mode::Strict),
        false => {
            let asked = service.traffic_distribution.as_ref();
            let annotated = || distribution_annotation(&service.meta, namespace);
            asked.or_else(annotated).and_then(|text| distribution(text))
        }
    };
    if service.publish_not_ready {
        let all = balancing.get_or_insert_default();
        all.health_policy = load_balancing::HealthPolicy::AllowAll.into();
    }
    balancing
}

fn entry_load_balancing(entry: &ServiceEntry, namespace: Option<&Meta>) -> Option<LoadBalancing> {
    if entry.spec.resolution == Resolution::None {
        return Some(LoadBalancing {
            mode: load_balancing::Mode::Passthrough.into(),
            health_policy: load_balancing::HealthPolicy::AllowAll.into(),
            ..LoadBalancing::default()
        });
    }
    distribution_annotation(&entry.meta, namespace).and_then(|text| distribution(text))
}

fn distribution_annotation<'m>(meta: &'m Meta, namespace: Option<&'m Meta>) -> Option<&'m Str> {
    const KEY: &str = "networking.istio.io/traffic-distribution";
    let inherited = || namespace.and_then(|namespace| namespace.annotation(KEY));
    meta.annotation(KEY).or_else(inherited)
}

fn distribution(text: &str) -> Option<LoadBalancing> {
    use load_balancing::{Mode, Scope};
    let zone = [Scope::Network, Scope::Region, Scope::Zone];
    let node = [
        Scope::Network,
        Scope::Region,
        Scope::Zone,
        Scope::Subzone,
        Scope::Node,
    ];
    match text.to_ascii_lowercase().as_str() {
        "preferclose" | "prefersamezone" => preferring(&zone, Mode::Failover),
        "prefersamenode" => preferring(&node, Mode::Failover),
        _ => None,
    }
}

fn preferring(
    scopes: &[load_balancing::Scope],
    mode: load_balancing::Mode,
) -> Option<LoadBalancing> {
    Some(LoadBalancing {
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        ..LoadBalancing::default()
    })
}

/// What there is to say of a Kubernetes Service beside its waypoint.
pub fn served(service: &Service) -> Condition {
    let served = |status, reason, message: &'static str| {
        condition("leyline.dev/Served", status, reason, message)
    };
    if service.external_name {
        return served(
            Truth::False,
            "ExternalName",
            "an alias in DNS, which the mesh does not send to proxies",
        );
    }
    if service.ports.is_empty() {
        return served(
            Truth::False,
            "NoTcpPort",
            "no TCP port: other protocols are not carried",
        );
    }
    match service.cluster_ips.is_empty() {
        true => served(
            Truth::True,
            "Headless",
            "known by name and by its endpoints' addresses",
        ),
        false => served(Truth::True, "Served", "known by name and address"),
    }
}

/// What there is to say of a ServiceEntry whose hosts were claimed: `won` names, per host, the object that counts.
/// `visibility`: where the mesh has a rule for it.
pub fn entry_conditions(
    entry: &ServiceEntry,
    bound: &Bound,
    visibility: Option<Visibility>,
    won: &BTreeMap<Str, ClaimKey>,
    allocated: impl Fn(&str) -> Vec<IpAddr>,
) -> Vec<Condition> {
    let said = visibility.map(Visibility::condition);
    if visibility == Some(Visibility::None) {
        return said.into_iter().collect();
    }
    let mut conditions: Vec<Condition> = bound.condition.iter().cloned().chain(said).collect();
    conditions.push(claimed(entry, won));
    conditions.extend(sockets(entry));
    conditions.extend(waypoint_missing(entry, bound));
    conditions.extend(addresses_allocated(entry, allocated));
    conditions
}

fn claimed(entry: &ServiceEntry, won: &BTreeMap<Str, ClaimKey>) -> Condition {
    let ours = |key: &ClaimKey| key.kind == Kind::ServiceEntry && key.name == entry.meta.name;
    let lost = |host: &String| match won.get(host.as_str()) {
        Some(key) if ours(key) => None,
        Some(key) => Some(format!(
            "{host} belongs to {} {}",
            key.kind.as_str(),
            key.name
        )),
        None => Some(format!(
            "{host} is a wildcard, which needs resolution DYNAMIC_DNS"
        )),
    };
    let lost: Vec<String> = entry.spec.hosts.iter().filter_map(lost).collect();
    match lost.is_empty() {
        true => condition(
            "HostsClaimed",
            Truth::True,
            "Claimed",
            "every host is served by this object",
        ),
        false => condition("HostsClaimed", Truth::False, "NotInForce", lost.join("; ")),
    }
}

/// Endpoints that are Unix sockets: only a proxy beside the process could dial them.
fn sockets(entry: &ServiceEntry) -> Option<Condition> {
    let endpoints = entry.spec.endpoints.iter();
    let sockets: Vec<&str> = endpoints
        .map(|endpoint| endpoint.address.as_str())
        .filter(|address| address.starts_with(UNIX))
        .collect();
    (!sockets.is_empty()).then(|| {
        let message = format!(
            "left out, for no node tunnel can reach a Unix socket: {}",
            sockets.join(", ")
        );
        condition("EndpointsServed", Truth::False, "UnixSocket", message)
    })
}

fn waypoint_missing(entry: &ServiceEntry, bound: &Bound) -> Option<Condition> {
    let missing = |reason, message: &'static str| {
        Some(condition(
            "istio.io/WaypointMissing",
            Truth::True,
            reason,
            message,
        ))
    };
    if bound.names.is_empty() && entry.spec.hosts.iter().any(|host| host.contains('*')) {
        let message = "wildcard hosts have no effect until a waypoint is bound";
        return missing("NoWaypointForWildcardService", message);
    }
    let racing = entry
        .meta
        .annotation("istio.io/connect-strategy")
        .is_some_and(|strategy| &**strategy == "RACE_FIRST_TCP_CONNECT");
    if bound.names.is_empty() && racing {
        let message = "the connect strategy has no effect without a waypoint";
        return missing("NoWaypointForRacingConnectStrategy", message);
    }
    None
}

fn addresses_allocated(
    entry: &ServiceEntry,
    allocated: impl Fn(&str) -> Vec<IpAddr>,
) -> Option<Condition> {
    let given: Vec<String> = entry
        .spec
        .hosts
        .iter()
        .flat_map(|host| {
            allocated(host)
                .into_iter()
                .map(move |ip| format!("{host} {ip}"))
        })
        .collect();
    (!given.is_empty()).then(|| {
        condition(
            "AddressesAllocated",
            Truth::True,
            "Allocated",
            given.join(", "),
        )
    })
}
