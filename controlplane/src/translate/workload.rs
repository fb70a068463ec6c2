//! Pods, WorkloadEntries, inline endpoints and bare EndpointSlice addresses to the mesh's workloads.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh::{names::Str, wire::pod_dns_extension};
use proto::workload::{
    self as wire, ApplicationTunnel, Locality, NetworkMode, PortList, TunnelProtocol,
    WorkloadStatus, WorkloadType,
};

use super::{
    Settings, bytes_of, condition,
    service::{Claim, UNIX},
    waypoint::Bound,
};
use crate::{
    crd::{Resolution, WorkloadEntrySpec},
    gateway::names::NETWORK,
    object::{
        EndpointSlice, Kind, Labels, Meta, Name, Pod, ServiceEntry, SliceEndpoint, WorkloadEntry,
        labels_of,
    },
    output::{Condition, Truth},
};

/// The services of a workload with its ports for each, as the wire has them.
pub type Services = BTreeMap<String, PortList>;

/// What a workload is told from beside its own object.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// The mesh.
    pub settings: &'a Settings,
    /// The network of the cluster.
    pub network: &'a str,
    /// Its namespace, where there is such an object.
    pub namespace: Option<&'a Meta>,
    /// Its services.
    pub services: Services,
    /// Its waypoint.
    pub bound: &'a Bound,
    /// The selector policies that apply to it, sorted.
    pub policies: Vec<Str>,
}

/// A workload, and what to say of its object.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// `None`: it is not part of the mesh, for the reason in the conditions.
    pub workload: Option<wire::Workload>,
    /// Of the object.
    pub conditions: Vec<Condition>,
}

/// A pod. `tunnel`: how the waypoint it is an instance of wants connections handed over.
pub fn of_pod(
    pod: &Pod,
    node: Option<&Meta>,
    tunnel: Option<ApplicationTunnel>,
    around: Surroundings<'_>,
) -> Outcome {
    let out = |reason, message: &'static str| Outcome {
        workload: None,
        conditions: vec![in_mesh(Truth::False, reason, message)],
    };
    if pod.ended {
        return out("Ended", "the pod has ended");
    }
    if pod.addresses.is_empty() {
        return out("NoAddress", "the pod has no address yet");
    }
    let addresses: Result<Vec<IpAddr>, _> = pod.addresses.iter().map(|ip| ip.parse()).collect();
    let Ok(addresses) = addresses else {
        return out(
            "BadAddress",
            "status.podIPs holds something that is no address",
        );
    };
    let (protocol, native) = pod_tunnel(pod);
    let (canonical_name, canonical_revision, workload_name) =
        telemetry(&pod.meta, &owner_name(pod));
    let workload = wire::Workload {
        uid: pod_uid(around.settings, &pod.meta.name),
        addresses: addresses.into_iter().map(bytes_of).collect(),
        tunnel_protocol: protocol.into(),
        native_tunnel: native,
        service_account: pod.service_account.to_string(),
        node: pod.node.to_string(),
        locality: node.and_then(node_locality),
        network_mode: mode(pod.host_network).into(),
        status: health(pod.ready && !pod.meta.deleting).into(),
        application_tunnel: tunnel,
        canonical_name,
        canonical_revision,
        workload_name,
        extensions: pod.dns.iter().map(|it| pod_dns_extension(it)).collect(),
        network: pod_network(pod, &around),
        ..common(&pod.meta, &around)
    };
    let mut conditions = vec![pod_condition(pod, protocol, &around)];
    conditions.extend(around.bound.condition.clone());
    Outcome {
        workload: Some(workload),
        conditions,
    }
}

fn common(meta: &Meta, around: &Surroundings<'_>) -> wire::Workload {
    wire::Workload {
        name: meta.name.name.to_string(),
        namespace: meta.name.namespace.to_string(),
        network: around.network.to_owned(),
        trust_domain: around.settings.wire_trust_domain(),
        cluster_id: around.settings.cluster_id.to_string(),
        workload_type: WorkloadType::Pod.into(),
        services: around.services.clone(),
        waypoint: around.bound.waypoint.clone(),
        authorization_policies: around.policies.iter().map(|key| key.to_string()).collect(),
        ..wire::Workload::default()
    }
}

/// Where there are several networks, a pod may say which one it is of, also behind this cluster's API server.
fn pod_network(pod: &Pod, around: &Surroundings<'_>) -> String {
    let label = pod.meta.label(NETWORK).map(|it| &**it);
    let said = label.filter(|it| around.settings.has_others && !it.is_empty());
    said.unwrap_or(around.network).to_owned()
}

/// What the agent says of the pod, and what the pod says of itself.
fn pod_tunnel(pod: &Pod) -> (TunnelProtocol, bool) {
    if native_tunnel(&pod.meta.labels) {
        return (TunnelProtocol::Hbone, true);
    }
    let redirected = pod.meta.annotation("ambient.istio.io/redirection");
    match redirected.is_some_and(|state| &**state == "enabled") {
        true => (TunnelProtocol::Hbone, false),
        false => (TunnelProtocol::None, false),
    }
}

fn native_tunnel(labels: &Labels) -> bool {
    labels
        .get("networking.istio.io/tunnel")
        .is_some_and(|tunnel| &**tunnel == "http")
}

fn pod_condition(pod: &Pod, protocol: TunnelProtocol, around: &Surroundings<'_>) -> Condition {
    if protocol == TunnelProtocol::Hbone {
        let mut message = "its traffic is carried over mutual TLS".to_owned();
        let waypoints = around
            .policies
            .iter()
            .filter(|key| key.contains(WAYPOINT_POLICY));
        for key in waypoints {
            message +=
                &format!("; beside those whom ALLOW policies name, {key} lets its waypoint in");
        }
        return in_mesh(Truth::True, "Hbone", message);
    }
    if pod.host_network {
        let message = "it uses its node's network, which is not redirected";
        return in_mesh(Truth::False, "HostNetwork", message);
    }
    match wanted(&pod.meta, around.namespace) {
        true => in_mesh(
            Truth::False,
            "Waiting",
            "reached in plain text until the node's agent has enrolled it",
        ),
        false => in_mesh(
            Truth::False,
            "NotAsked",
            "reached in plain text: neither it nor its namespace has the label istio.io/dataplane-mode=ambient",
        ),
    }
}

/// What the names of policies that let waypoints in start with.
pub const WAYPOINT_POLICY: &str = "istio_allow_waypoint_";

/// The pod's label wins over its namespace's.
fn wanted(pod: &Meta, namespace: Option<&Meta>) -> bool {
    const KEY: &str = "istio.io/dataplane-mode";
    let label = pod
        .label(KEY)
        .or_else(|| namespace.and_then(|namespace| namespace.label(KEY)));
    label.is_some_and(|mode| &**mode == "ambient")
}

fn in_mesh(
    status: Truth,
    reason: &'static str,
    message: impl Into<Cow<'static, str>>,
) -> Condition {
    condition("leyline.dev/InMesh", status, reason, message)
}

fn mode(host_network: bool) -> NetworkMode {
    match host_network {
        true => NetworkMode::HostNetwork,
        false => NetworkMode::Standard,
    }
}

fn health(ready: bool) -> WorkloadStatus {
    match ready {
        true => WorkloadStatus::Healthy,
        false => WorkloadStatus::Unhealthy,
    }
}

fn node_locality(node: &Meta) -> Option<Locality> {
    let label = |key: &str| node.label(key).map(ToString::to_string).unwrap_or_default();
    let locality = Locality {
        region: label("topology.kubernetes.io/region"),
        zone: label("topology.kubernetes.io/zone"),
        subzone: label("topology.istio.io/subzone"),
    };
    (locality != Locality::default()).then_some(locality)
}

/// `region/zone/subzone`.
fn written_locality(text: &str) -> Option<Locality> {
    let mut parts = text.splitn(3, '/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    let locality = Locality {
        region: next(),
        zone: next(),
        subzone: next(),
    };
    (locality != Locality::default()).then_some(locality)
}

/// The name of what the user created: a Deployment's ReplicaSet and a CronJob's Job are only steps on the way.
fn owner_name(pod: &Pod) -> Str {
    let Some((kind, name)) = &pod.owner else {
        return pod.meta.name.name.clone();
    };
    let shortened = match &**kind {
        "ReplicaSet" => match pod.meta.label("pod-template-hash") {
            Some(hash) => name
                .strip_suffix(&**hash)
                .and_then(|start| start.strip_suffix('-')),
            None => None,
        },
        // A CronJob's jobs end in the minute they were due.
        "Job" => name
            .rsplit_once('-')
            .filter(|(_, minute)| minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit()))
            .map(|(start, _)| start),
        _ => None,
    };
    shortened
        .filter(|start| !start.is_empty())
        .unwrap_or(name)
        .into()
}

/// Canonical name, canonical revision and workload name.
fn telemetry(meta: &Meta, owner: &str) -> (String, String, String) {
    telemetry_of(&meta.labels, owner)
}

fn telemetry_of(labels: &Labels, owner: &str) -> (String, String, String) {
    let first = |keys: &[&str]| {
        keys.iter()
            .find_map(|key| labels.get(*key))
            .map(ToString::to_string)
    };
    let name = first(&["service.istio.io/workload-name"]).unwrap_or_else(|| owner.to_owned());
    let canonical = first(&[
        "service.istio.io/canonical-name",
        "app.kubernetes.io/name",
        "app",
    ]);
    let revision = first(&[
        "service.istio.io/canonical-revision",
        "app.kubernetes.io/version",
        "version",
    ]);
    (
        canonical.unwrap_or_else(|| name.clone()),
        revision.unwrap_or_else(|| "latest".to_owned()),
        name,
    )
}

/// The services of a pod: those that select it, and those that adopt it through an EndpointSlice.
pub fn pod_services(
    pod: &Pod,
    selecting: &[Arc<Claim>],
    adopting: &[(Arc<Claim>, Arc<EndpointSlice>)],
) -> Services {
    let mut services = joined(selecting, |claim| {
        claim
            .ports
            .iter()
            .filter_map(|port| port.resolve(&pod.named_ports))
            .collect()
    });
    for (claim, slice) in adopting {
        let ports = slice_ports(claim, slice);
        services.insert(claim.service_key().to_string(), ports);
    }
    services
}

fn joined(claims: &[Arc<Claim>], ports: impl Fn(&Claim) -> Vec<wire::Port>) -> Services {
    let entry = |claim: &Arc<Claim>| {
        (
            claim.service_key().to_string(),
            PortList {
                ports: ports(claim),
            },
        )
    };
    claims.iter().map(entry).collect()
}

/// Slice ports are joined with the service's by name.
fn slice_ports(claim: &Claim, slice: &EndpointSlice) -> PortList {
    let port = |spec: &super::port::PortSpec| Some(spec.at(*slice.ports.get(&spec.name)?));
    PortList {
        ports: claim.ports.iter().filter_map(port).collect(),
    }
}

/// Whether an endpoint of a slice stands for this pod.
pub fn stands_for(endpoint: &SliceEndpoint, pod: &Meta) -> bool {
    endpoint.pod.as_ref().is_some_and(|(name, uid)| {
        *name == pod.name.name && (uid.is_none() || pod.uid.is_none() || *uid == pod.uid)
    })
}

/// Labels that select a WorkloadEntry: the object's own lie over those of its spec.
pub fn entry_labels(entry: &WorkloadEntry) -> Labels {
    let mut labels = labels_of(&entry.spec.labels);
    labels.extend(
        entry
            .meta
            .labels
            .iter()
            .map(|(key, value)| (key.clone(), value.clone())),
    );
    labels
}

/// The services of a WorkloadEntry.
pub fn entry_services(spec: &WorkloadEntrySpec, selecting: &[Arc<Claim>]) -> Services {
    let named = entry_ports(spec);
    joined(selecting, |claim| match claim.kind {
        Kind::Service => claim
            .ports
            .iter()
            .filter_map(|port| port.resolve(&named))
            .collect(),
        _ => claim
            .ports
            .iter()
            .map(|port| port.resolve_by_port_name(&named))
            .collect(),
    })
}

fn entry_ports(spec: &WorkloadEntrySpec) -> BTreeMap<Str, u16> {
    let port = |(name, number): (&String, &u32)| {
        Some((name.as_str().into(), u16::try_from(*number).ok()?))
    };
    spec.ports.iter().filter_map(port).collect()
}

/// What names the workload of a pod.
pub fn pod_uid(settings: &Settings, Name { namespace, name }: &Name) -> String {
    format!("{}//Pod/{namespace}/{name}", settings.cluster_id)
}

/// What names the workload of a WorkloadEntry.
pub fn entry_uid(settings: &Settings, Name { namespace, name }: &Name) -> String {
    let cluster = &settings.cluster_id;
    format!("{cluster}/networking.istio.io/WorkloadEntry/{namespace}/{name}")
}

/// A WorkloadEntry.
pub fn of_workload_entry(entry: &WorkloadEntry, around: Surroundings<'_>) -> Outcome {
    if entry.spec.address.starts_with(UNIX) {
        let message = "no node tunnel can reach a Unix socket";
        return Outcome {
            workload: None,
            conditions: vec![condition(
                "EndpointsServed",
                Truth::False,
                "UnixSocket",
                message,
            )],
        };
    }
    let name = &entry.meta.name.name;
    let uid = entry_uid(around.settings, &entry.meta.name);
    let labels = entry_labels(entry);
    let workload = of_endpoint(uid, &entry.meta, &entry.spec, &labels, name, &around);
    Outcome {
        workload: Some(workload),
        conditions: around.bound.condition.iter().cloned().collect(),
    }
}

fn of_endpoint(
    uid: String,
    meta: &Meta,
    spec: &WorkloadEntrySpec,
    labels: &Labels,
    owner: &str,
    around: &Surroundings<'_>,
) -> wire::Workload {
    let (canonical_name, canonical_revision, workload_name) = telemetry_of(labels, owner);
    let address: Option<IpAddr> = spec.address.parse().ok();
    let native = native_tunnel(labels);
    let tunnel = match native {
        true => TunnelProtocol::Hbone,
        false => TunnelProtocol::None,
    };
    let network = match spec.network.as_str() {
        "" => around.network,
        network => network,
    };
    wire::Workload {
        uid,
        addresses: address.map(bytes_of).into_iter().collect(),
        hostname: match address {
            Some(_) => String::new(),
            None => spec.address.clone(),
        },
        network: network.to_owned(),
        tunnel_protocol: tunnel.into(),
        native_tunnel: native,
        service_account: match spec.service_account.as_str() {
            "" => "default".to_owned(),
            account => account.to_owned(),
        },
        locality: written_locality(&spec.locality),
        status: WorkloadStatus::Healthy.into(),
        capacity: spec.weight,
        canonical_name,
        canonical_revision,
        workload_name,
        ..common(meta, around)
    }
}

/// The inline endpoints of a ServiceEntry, or the one that stands for a host resolved by name. `claims`: what it won.
pub fn of_service_entry(
    entry: &ServiceEntry,
    claims: &[Arc<Claim>],
    around: &Surroundings<'_>,
) -> Vec<wire::Workload> {
    let spec = &entry.spec;
    if claims.is_empty() || spec.workload_selector.is_some() {
        return Vec::new();
    }
    let name = &entry.meta.name.name;
    let uid = |address: &str| inline_uid(around.settings, entry, address);
    let make = |endpoint: &WorkloadEntrySpec, claims: &[Arc<Claim>], bound: &Bound| {
        let around = Surroundings {
            services: entry_services(endpoint, claims),
            policies: around.policies.clone(),
            bound,
            ..*around
        };
        let labels = inline_labels(entry, endpoint);
        of_endpoint(
            uid(&endpoint.address),
            &entry.meta,
            endpoint,
            &labels,
            name,
            &around,
        )
    };
    if !spec.endpoints.is_empty() {
        let endpoints = spec.endpoints.iter();
        let endpoints = endpoints.filter(|endpoint| !endpoint.address.starts_with(UNIX));
        return endpoints
            .map(|endpoint| make(endpoint, claims, around.bound))
            .collect();
    }
    let by_name = [
        Resolution::Dns,
        Resolution::DnsRoundRobin,
        Resolution::DynamicDns,
    ];
    if !by_name.contains(&spec.resolution) {
        return Vec::new();
    }
    let implicit = |claim: &Arc<Claim>| {
        let endpoint = WorkloadEntrySpec {
            address: claim.hostname.to_string(),
            ..WorkloadEntrySpec::default()
        };
        make(&endpoint, std::slice::from_ref(claim), &Bound::default())
    };
    claims.iter().map(implicit).collect()
}

fn inline_uid(settings: &Settings, entry: &ServiceEntry, address: &str) -> String {
    let Name { namespace, name } = &entry.meta.name;
    let cluster = &settings.cluster_id;
    format!("{cluster}/networking.istio.io/ServiceEntry/{namespace}/{name}/{address}")
}

/// The labels of the inline endpoint of this uid; those of the entry itself where it has no endpoint written out.
pub fn labels_of_inline(settings: &Settings, entry: &ServiceEntry, uid: &str) -> Labels {
    let mut endpoints = entry.spec.endpoints.iter();
    let found = endpoints.find(|endpoint| inline_uid(settings, entry, &endpoint.address) == uid);
    match found {
        Some(endpoint) => inline_labels(entry, endpoint),
        None => (*entry.meta.labels).clone(),
    }
}

fn inline_labels(entry: &ServiceEntry, endpoint: &WorkloadEntrySpec) -> Labels {
    let mut labels: Labels = (*entry.meta.labels).clone();
    let own = endpoint.labels.iter();
    labels.extend(own.map(|(key, value)| (Str::from(key.as_str()), Str::from(value.as_str()))));
    labels
}

/// The endpoints of a slice that stand for no pod, for the service of the slice.
pub fn of_slice(
    slice: &EndpointSlice,
    claim: &Claim,
    settings: &Settings,
    network: &str,
) -> Vec<wire::Workload> {
    let Name { namespace, name } = &slice.meta.name;
    let cluster = &settings.cluster_id;
    let services = Services::from([(claim.service_key().to_string(), slice_ports(claim, slice))]);
    let bare = slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.pod.is_none());
    let addressed =
        bare.flat_map(|endpoint| endpoint.addresses.iter().map(move |ip| (endpoint, *ip)));
    let workload = |(endpoint, address): (&SliceEndpoint, IpAddr)| {
        let (canonical_name, canonical_revision, workload_name) =
            telemetry(&slice.meta, &claim.meta.name.name);
        wire::Workload {
            uid: format!("{cluster}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/{address}"),
            name: name.to_string(),
            namespace: namespace.to_string(),
            addresses: vec![bytes_of(address)],
            network: network.to_owned(),
            trust_domain: settings.wire_trust_domain(),
            cluster_id: cluster.to_string(),
            workload_type: WorkloadType::Pod.into(),
            status: health(endpoint.ready).into(),
            network_mode: NetworkMode::HostNetwork.into(),
            services: services.clone(),
            canonical_name,
            canonical_revision,
            workload_name,
            ..wire::Workload::default()
        }
    };
    addressed.map(workload).collect()
}
