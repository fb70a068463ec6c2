//! Workloads: running instances, with their addresses and identity.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    dump::{is_default, workload_services},
    identity::{Identity, TrustDomain},
    names::{
        NamespacedHostname, NetworkAddress, ParseKeyError, PolicyKey, Str, Texts, WorkloadUid,
        serde_as_text,
    },
};

/// One running instance (Istio workload.proto `Workload`), checked and normalised.
///
/// Its JSON is `config_dump`'s. There `services` is a list of keys, since a dump tells an endpoint's ports with the
/// service; a local file gives a map with the ports. Both are read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Primary key.
    pub uid: WorkloadUid,
    /// Name of the pod or entry; how a node tunnel binds its pods to their records.
    pub name: Str,
    /// Namespace, which the identity names too.
    pub namespace: Str,
    /// Addresses in the order of the wire; never IPv4-mapped; empty for workloads known by host name or behind a gateway.
    #[serde(rename = "workloadIps", default)]
    pub addresses: Vec<IpAddr>,
    /// A name to resolve when there are no addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Str>,
    /// The network the addresses belong to; empty for the default one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub network: Str,
    /// How to reach it.
    #[serde(rename = "protocol", default)]
    pub tunnel_protocol: TunnelProtocol,
    /// Trust domain of the identity.
    #[serde(default)]
    pub trust_domain: TrustDomain,
    /// Service account of the identity; `default` where the wire has none.
    #[serde(default = "default_service_account")]
    pub service_account: Str,
    /// Waypoint for traffic addressed to the workload's own address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// How other networks reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<GatewayAddress>,
    /// Node it runs on; empty when unknown.
    #[serde(default, skip_serializing_if = "is_default")]
    pub node: Str,
    /// Telemetry: canonical service.
    #[serde(default, skip_serializing_if = "is_default")]
    pub canonical_name: Str,
    /// Telemetry: canonical revision.
    #[serde(default, skip_serializing_if = "is_default")]
    pub canonical_revision: Str,
    /// Telemetry: what owns it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub workload_type: WorkloadType,
    /// Telemetry: name of the owner.
    #[serde(default, skip_serializing_if = "is_default")]
    pub workload_name: Str,
    /// Terminates HBONE itself.
    #[serde(default, skip_serializing_if = "is_default")]
    pub native_tunnel: bool,
    /// How its application wants tunnelled connections handed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services it is an endpoint of, with its ports for each.
    #[serde(
        default,
        with = "workload_services",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub services: BTreeMap<NamespacedHostname, PortMap>,
    /// Selector-scoped policies that apply to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub authorization_policies: Vec<PolicyKey>,
    /// Whether it should be sent traffic.
    #[serde(default)]
    pub status: Health,
    /// Cluster it runs in.
    #[serde(default = "default_cluster_id")]
    pub cluster_id: Str,
    /// Where it runs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub locality: Locality,
    /// Whether its address is its own or its node's.
    #[serde(default)]
    pub network_mode: NetworkMode,
    /// Load balancing weight; 0: never chosen.
    #[serde(default = "default_capacity")]
    pub capacity: u32,
    /// How its resolver is set up, where not as Kubernetes does by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<Arc<PodDns>>,
}

/// How a pod's resolver is set up: Kubernetes' `dnsPolicy` and `dnsConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodDns {
    /// Whether the cluster's own name servers and search domains come first.
    #[serde(default)]
    pub cluster_first: bool,
    /// Search domains after these: lower case, no dot at either end; at most [`PodDns::MAX_SEARCHES`].
    #[serde(default)]
    pub searches: Vec<Str>,
    /// Name servers after the cluster's; at most [`PodDns::MAX_NAMESERVERS`].
    #[serde(default)]
    pub nameservers: Vec<IpAddr>,
}

impl PodDns {
    /// As many as Kubernetes allows.
    pub const MAX_SEARCHES: usize = 32;
    /// As many as Kubernetes allows.
    pub const MAX_NAMESERVERS: usize = 3;

    /// From the texts of a pod's spec; what is no address, or beyond what Kubernetes allows, is left out, as kubelet
    /// would not have started such a pod. `None`: it says what is so by default.
    pub fn new(cluster_first: bool, searches: &[String], nameservers: &[String]) -> Option<Self> {
        if cluster_first && searches.is_empty() && nameservers.is_empty() {
            return None;
        }
        let domain = |it: &String| it.trim_matches('.').to_ascii_lowercase();
        let domains = searches.iter().map(domain).filter(|it| !it.is_empty());
        let servers = nameservers.iter().filter_map(|it| it.parse().ok());
        Some(Self {
            cluster_first,
            searches: domains.map(Into::into).take(Self::MAX_SEARCHES).collect(),
            nameservers: servers.take(Self::MAX_NAMESERVERS).collect(),
        })
    }
}

impl Workload {
    /// Keeps once what others say in the same words. Records of one cluster differ in little but their names.
    pub fn share(&mut self, texts: &mut Texts) {
        self.trust_domain.share(texts);
        let Locality {
            region,
            zone,
            subzone,
        } = &mut self.locality;
        for text in [
            &mut self.namespace,
            &mut self.network,
            &mut self.service_account,
            &mut self.node,
            &mut self.canonical_name,
            &mut self.canonical_revision,
            &mut self.workload_name,
            &mut self.cluster_id,
            region,
            zone,
            subzone,
        ] {
            texts.share(text);
        }
    }

    /// A healthy record outside the mesh, with one share of the load and every other field at its default.
    pub fn new(uid: WorkloadUid, name: Str, namespace: Str) -> Self {
        Self {
            uid,
            name,
            namespace,
            addresses: Vec::new(),
            hostname: None,
            network: Str::default(),
            tunnel_protocol: TunnelProtocol::None,
            trust_domain: TrustDomain::default(),
            service_account: default_service_account(),
            waypoint: None,
            network_gateway: None,
            node: Str::default(),
            canonical_name: Str::default(),
            canonical_revision: Str::default(),
            workload_type: WorkloadType::default(),
            workload_name: Str::default(),
            native_tunnel: false,
            application_tunnel: None,
            services: BTreeMap::new(),
            authorization_policies: Vec::new(),
            status: Health::default(),
            cluster_id: default_cluster_id(),
            locality: Locality::default(),
            network_mode: NetworkMode::default(),
            capacity: default_capacity(),
            dns: None,
        }
    }

    /// Its addresses, each with the network; none for a host-network workload, whose address is its node's.
    pub fn own_addresses(&self) -> impl Iterator<Item = NetworkAddress> {
        let own = self.network_mode == NetworkMode::Standard;
        let addresses = self.addresses.iter().filter(move |_| own);
        addresses.map(|address| NetworkAddress {
            network: self.network.clone(),
            address: *address,
        })
    }

    /// The identity that its certificate must show.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }
}

/// What an empty `Workload.service_account` means.
pub const DEFAULT_SERVICE_ACCOUNT: &str = "default";
/// What an empty `Workload.cluster_id` means.
pub const DEFAULT_CLUSTER: &str = "Kubernetes";

/// Service port to target port. A target of 0 stands for "named, see the endpoint" in a service's own map.
pub type PortMap = BTreeMap<u16, u16>;

/// Istio workload.proto `TunnelProtocol`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TunnelProtocol {
    /// Plain TCP.
    #[default]
    #[serde(rename = "TCP")]
    None,
    /// HBONE on port 15008.
    #[serde(rename = "HBONE")]
    Hbone,
    /// LEGACY_ISTIO_MTLS, or a number this version does not know: the peer asks for a protection that we cannot
    /// give. Traffic to it is refused. Upstream rejects the whole record, after which its address counts as outside
    /// the mesh and is dialled in plaintext; a record that is kept and refused fails closed instead.
    #[serde(rename = "UNSUPPORTED")]
    Unsupported,
}

/// Istio workload.proto `WorkloadStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Health {
    /// May be chosen.
    #[default]
    Healthy,
    /// Chosen only where the service says [`crate::service::HealthPolicy::AllowAll`].
    Unhealthy,
}

/// Istio workload.proto `WorkloadType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadType {
    /// A Deployment.
    #[default]
    Deployment,
    /// A CronJob.
    CronJob,
    /// A Pod.
    Pod,
    /// A Job.
    Job,
}

/// Istio workload.proto `NetworkMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NetworkMode {
    /// The address is the workload's own.
    #[default]
    Standard,
    /// The address is its node's: never found by address.
    HostNetwork,
}

/// Istio workload.proto `Locality`. Empty strings equal empty strings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Locality {
    /// For example a cloud region.
    pub region: Str,
    /// For example an availability zone.
    pub zone: Str,
    /// For example a rack.
    pub subzone: Str,
}

/// Istio workload.proto `ApplicationTunnel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationTunnel {
    /// What precedes the application's bytes.
    pub protocol: ApplicationProtocol,
    /// Overrides the destination port.
    pub port: Option<u16>,
}

/// Istio workload.proto `ApplicationTunnel.Protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ApplicationProtocol {
    /// Nothing.
    None,
    /// A PROXY protocol version 2 header.
    Proxy,
}

/// Istio workload.proto `GatewayAddress`: a waypoint or a network gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayAddress {
    /// Where it is.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    pub hbone_mtls_port: u16,
}

/// Istio workload.proto `GatewayAddress.destination`. Written `namespace/hostname` or `network/ip`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service, by name.
    Hostname(NamespacedHostname),
    /// A workload or a service, by address.
    Address(NetworkAddress),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(key) => key.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl FromStr for GatewayDestination {
    type Err = ParseKeyError;

    /// An IP address after the slash makes an address, anything else a name.
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        match text.parse() {
            Ok(address) => Ok(Self::Address(address)),
            Err(_) => text.parse().map(Self::Hostname),
        }
    }
}

serde_as_text!(GatewayDestination);

fn default_service_account() -> Str {
    DEFAULT_SERVICE_ACCOUNT.into()
}

fn default_cluster_id() -> Str {
    DEFAULT_CLUSTER.into()
}

fn default_capacity() -> u32 {
    1
}
