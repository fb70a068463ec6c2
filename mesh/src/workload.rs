//! Workloads: running instances, with their addresses and identity.

use std::{
    fmt,
    net::IpAddr,
    ops::{Deref, DerefMut},
    str::FromStr,
    sync::Arc,
};

use litemap::LiteMap;
use serde::{Deserialize, Serialize};

use crate::{
    identity::{Identity, TrustDomain},
    names::{
        NamespacedHostname, NetworkAddress, ParseKeyError, PolicyKey, Str, Texts, WorkloadUid,
        serde_as_text,
    },
    service::{PortNames, Service},
    shared::Shared,
};

mod addresses;
mod document;

pub use addresses::Addresses;

/// One running instance (Istio workload.proto `Workload`), checked and normalised.
///
/// What it has in common with others is its [`Template`], whose fields read as its own; a tunnel knows records by the hundred
/// thousand. To write one of them copies a template that others share.
///
/// Its JSON is `config_dump`'s (see the `document` module).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "document::Document", into = "document::Document")]
pub struct Workload {
    /// Primary key.
    pub uid: WorkloadUid,
    /// Name of the pod or entry; how a node tunnel binds its pods to their records.
    pub name: Str,
    /// Addresses in the order of the wire; never IPv4-mapped; empty for workloads known by host name or behind a gateway.
    pub addresses: Addresses,
    /// Node it runs on; empty when unknown.
    pub node: Str,
    /// Where it runs.
    pub locality: Arc<Locality>,
    /// Whether it should be sent traffic.
    pub status: Health,
    /// What it has in common with others.
    pub template: Arc<Template>,
}

/// What the workloads of one controller, as a rule, have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Template {
    /// Namespace, which the identity names too.
    pub namespace: Str,
    /// A name to resolve when there are no addresses.
    pub hostname: Option<Str>,
    /// The network the addresses belong to; empty for the default one.
    pub network: Str,
    /// How to reach it.
    pub tunnel_protocol: TunnelProtocol,
    /// Trust domain of the identity.
    pub trust_domain: TrustDomain,
    /// Service account of the identity; `default` where the wire has none.
    pub service_account: Str,
    /// Waypoint for traffic addressed to the workload's own address.
    pub waypoint: Option<GatewayAddress>,
    /// How other networks reach it.
    pub network_gateway: Option<GatewayAddress>,
    /// Telemetry: canonical service.
    pub canonical_name: Str,
    /// Telemetry: canonical revision.
    pub canonical_revision: Str,
    /// Telemetry: what owns it.
    pub workload_type: WorkloadType,
    /// Telemetry: name of the owner; `None`: it is the record's own. Read it by [`Workload::workload_name`].
    pub owner_name: Option<Str>,
    /// Terminates HBONE itself.
    pub native_tunnel: bool,
    /// How its application wants tunnelled connections handed over.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services it is an endpoint of, with its ports for each.
    pub services: PortsOfServices,
    /// Selector-scoped policies that apply to it.
    pub authorization_policies: Vec<PolicyKey>,
    /// Cluster it runs in.
    pub cluster_id: Str,
    /// Whether its address is its own or its node's.
    pub network_mode: NetworkMode,
    /// Load balancing weight; 0: never chosen.
    pub capacity: u32,
    /// How its resolver is set up, where not as Kubernetes does by default.
    pub dns: Option<Arc<PodDns>>,
}

impl Deref for Workload {
    type Target = Template;

    fn deref(&self) -> &Template {
        &self.template
    }
}

impl DerefMut for Workload {
    fn deref_mut(&mut self) -> &mut Template {
        Arc::make_mut(&mut self.template)
    }
}

/// What records have in common, each kept once.
#[derive(Clone, Debug, Default)]
pub struct Commons {
    texts: Texts,
    localities: Shared<Locality, 64>,
    templates: Shared<Template, 256>,
    pub(crate) port_names: Shared<PortNames, 64>,
}

/// How a pod's resolver is set up, and its own name: Kubernetes' `dnsPolicy`, `dnsConfig`, `hostname` and `subdomain`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
    /// Its own name, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<PodHost>,
}

/// A name of a pod below that of a headless service, which is its `subdomain`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodHost {
    /// The service's short name, in the pod's namespace.
    pub subdomain: Str,
    /// The pod's `hostname`; `None`: its record's name, which all pods of a StatefulSet can have in common.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Str>,
}

impl PodHost {
    /// What a pod called `pod` says; `None` where it has no name of its own.
    pub fn new(pod: &str, hostname: &str, subdomain: &str) -> Option<Self> {
        let whole = !hostname.is_empty() && !subdomain.is_empty();
        whole.then(|| Self {
            subdomain: subdomain.into(),
            name: (hostname != pod).then(|| hostname.into()),
        })
    }
}

impl PodDns {
    /// As many as Kubernetes allows.
    pub const MAX_SEARCHES: usize = 32;
    /// As many as Kubernetes allows.
    pub const MAX_NAMESERVERS: usize = 3;

    /// From the texts of a pod's spec; what is no address, or beyond what Kubernetes allows, is left out, as kubelet
    /// would not have started such a pod. `None`: it says what is so by default.
    pub fn new(
        cluster_first: bool,
        searches: &[String],
        nameservers: &[String],
        host: Option<PodHost>,
    ) -> Option<Self> {
        if cluster_first && searches.is_empty() && nameservers.is_empty() && host.is_none() {
            return None;
        }
        let domain = |it: &String| it.trim_matches('.').to_ascii_lowercase();
        let domains = searches.iter().map(domain).filter(|it| !it.is_empty());
        let servers = nameservers.iter().filter_map(|it| it.parse().ok());
        Some(Self {
            cluster_first,
            searches: domains.map(Into::into).take(Self::MAX_SEARCHES).collect(),
            nameservers: servers.take(Self::MAX_NAMESERVERS).collect(),
            host,
        })
    }
}

impl Workload {
    /// Keeps once what other records have too.
    pub fn share(&mut self, commons: &mut Commons) {
        commons.texts.share(&mut self.node);
        commons.localities.share(&mut self.locality);
        let (templates, texts) = (&mut commons.templates, &mut commons.texts);
        templates.share_prepared(&mut self.template, |new| Arc::make_mut(new).share(texts));
    }

    /// A healthy record outside the mesh, with one share of the load and every other field at its default.
    pub fn new(uid: WorkloadUid, name: Str, namespace: Str) -> Self {
        Self::of_template(uid, name, Template::new(namespace))
    }

    /// A healthy record of unknown place.
    pub fn of_template(uid: WorkloadUid, name: Str, template: Template) -> Self {
        Self {
            uid,
            name,
            addresses: Addresses::default(),
            node: Str::default(),
            locality: Arc::default(),
            status: Health::default(),
            template: Arc::new(template),
        }
    }

    /// Telemetry: name of the owner, say of a Deployment (Istio workload.proto `Workload.workload_name`).
    pub fn workload_name(&self) -> &Str {
        self.owner_name.as_ref().unwrap_or(&self.name)
    }

    /// Has `owner` for [`Self::workload_name`].
    pub fn set_workload_name(&mut self, owner: Str) {
        self.owner_name = owner_name(&self.name, owner);
    }

    /// Its own name below that of a headless service (Kubernetes: `hostname`, where `subdomain` is the service).
    pub fn host_below(&self, service: &Service) -> Option<&Str> {
        let host = self.dns.as_ref()?.host.as_ref()?;
        let below = self.namespace == service.namespace && host.subdomain == service.name;
        below.then(|| host.name.as_ref().unwrap_or(&self.name))
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
}

/// [`Template::owner_name`] of the record `name` that `owner` has.
pub(crate) fn owner_name(name: &str, owner: impl Into<Str> + AsRef<str>) -> Option<Str> {
    (owner.as_ref() != name).then(|| owner.into())
}

impl Template {
    /// Outside the mesh, with one share of the load and every other field at its default.
    pub fn new(namespace: Str) -> Self {
        Self {
            namespace,
            hostname: None,
            network: Str::default(),
            tunnel_protocol: TunnelProtocol::None,
            trust_domain: TrustDomain::default(),
            service_account: default_service_account(),
            waypoint: None,
            network_gateway: None,
            canonical_name: Str::default(),
            canonical_revision: Str::default(),
            workload_type: WorkloadType::default(),
            owner_name: Some(Str::default()),
            native_tunnel: false,
            application_tunnel: None,
            services: PortsOfServices::new(),
            authorization_policies: Vec::new(),
            cluster_id: default_cluster_id(),
            network_mode: NetworkMode::default(),
            capacity: default_capacity(),
            dns: None,
        }
    }

    /// As [`Texts::share`].
    fn share(&mut self, texts: &mut Texts) {
        self.trust_domain.share(texts);
        for text in [
            &mut self.namespace,
            &mut self.network,
            &mut self.service_account,
            &mut self.canonical_name,
            &mut self.canonical_revision,
            &mut self.cluster_id,
        ] {
            texts.share(text);
        }
        if let Some(owner) = &mut self.owner_name {
            texts.share(owner);
        }
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
pub type PortMap = LiteMap<u16, u16>;

/// What services a workload is an endpoint of, with its ports for each.
pub type PortsOfServices = LiteMap<NamespacedHostname, PortMap>;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ApplicationTunnel {
    /// What precedes the application's bytes.
    pub protocol: ApplicationProtocol,
    /// Overrides the destination port.
    pub port: Option<u16>,
}

/// Istio workload.proto `ApplicationTunnel.Protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A record as it is read from the wire, where nothing is shared yet.
    fn record(name: &str, owner: &str) -> Workload {
        let uid = WorkloadUid(format!("cluster//Pod/ns/{name}").into());
        let mut record = Workload::new(uid, name.into(), "ns".into());
        record.set_workload_name(owner.into());
        record
    }

    #[test]
    fn records_share_a_template_whether_one_owner_has_them_or_each_is_its_own() {
        let mut commons = Commons::default();
        let mut shared = |name, owner| {
            let mut record = record(name, owner);
            record.share(&mut commons);
            record
        };
        let [a, b] = [shared("web-1", "web"), shared("web-2", "web")];
        let [c, d] = [shared("db", "db"), shared("vm", "vm")];
        assert!(Arc::ptr_eq(&a.template, &b.template));
        assert!(Arc::ptr_eq(&c.template, &d.template));
        let names = [&a, &b, &c, &d].map(|it| &**it.workload_name());
        assert_eq!(names, ["web", "web", "db", "vm"]);
    }

    #[test]
    fn addresses_keep_their_order_and_number() {
        let all: Vec<IpAddr> = (1..4).map(|last| [10, 0, 0, last].into()).collect();
        for count in 0..=all.len() {
            let kept = Addresses::from(all[..count].to_vec());
            assert_eq!(*kept, all[..count]);
            assert_eq!(Vec::from(kept), all[..count]);
        }
    }
}
