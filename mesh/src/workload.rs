//! Workloads: running instances, with their addresses and identity.

use std::{collections::BTreeMap, net::IpAddr};

use crate::{
    identity::{Identity, TrustDomain},
    names::{NamespacedHostname, NetworkAddress, PolicyKey, Str, WorkloadUid},
};

/// One running instance (Istio workload.proto `Workload`), checked and normalised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Primary key.
    pub uid: WorkloadUid,
    /// Name of the pod or entry; how a node tunnel binds its pods to their records.
    pub name: Str,
    /// Namespace, which the identity names too.
    pub namespace: Str,
    /// Addresses in the order of the wire; never IPv4-mapped; empty for workloads known by host name or behind a gateway.
    pub addresses: Vec<IpAddr>,
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
    /// Node it runs on; empty when unknown.
    pub node: Str,
    /// Telemetry: canonical service.
    pub canonical_name: Str,
    /// Telemetry: canonical revision.
    pub canonical_revision: Str,
    /// Telemetry: what owns it.
    pub workload_type: WorkloadType,
    /// Telemetry: name of the owner.
    pub workload_name: Str,
    /// Terminates HBONE itself.
    pub native_tunnel: bool,
    /// How its application wants tunnelled connections handed over.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services it is an endpoint of, with its ports for each.
    pub services: BTreeMap<NamespacedHostname, PortMap>,
    /// Selector-scoped policies that apply to it.
    pub authorization_policies: Vec<PolicyKey>,
    /// Whether it should be sent traffic.
    pub status: Health,
    /// Cluster it runs in.
    pub cluster_id: Str,
    /// Where it runs.
    pub locality: Locality,
    /// Whether its address is its own or its node's.
    pub network_mode: NetworkMode,
    /// Load balancing weight; 0: never chosen.
    pub capacity: u32,
}

impl Workload {
    /// The identity that its certificate must show.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }
}

/// Service port to target port. A target of 0 stands for "named, see the endpoint" in a service's own map.
pub type PortMap = BTreeMap<u16, u16>;

/// Istio workload.proto `TunnelProtocol`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TunnelProtocol {
    /// Plain TCP.
    #[default]
    None,
    /// HBONE on port 15008.
    Hbone,
}

/// Istio workload.proto `WorkloadStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// May be chosen.
    #[default]
    Healthy,
    /// Chosen only where the service says [`crate::service::HealthPolicy::AllowAll`].
    Unhealthy,
}

/// Istio workload.proto `WorkloadType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// The address is the workload's own.
    #[default]
    Standard,
    /// The address is its node's: never found by address.
    HostNetwork,
}

/// Istio workload.proto `Locality`. Empty strings equal empty strings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    /// For example a cloud region.
    pub region: Str,
    /// For example an availability zone.
    pub zone: Str,
    /// For example a rack.
    pub subzone: Str,
}

/// Istio workload.proto `ApplicationTunnel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// What precedes the application's bytes.
    pub protocol: ApplicationProtocol,
    /// Overrides the destination port.
    pub port: Option<u16>,
}

/// Istio workload.proto `ApplicationTunnel.Protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplicationProtocol {
    /// Nothing.
    None,
    /// A PROXY protocol version 2 header.
    Proxy,
}

/// Istio workload.proto `GatewayAddress`: a waypoint or a network gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Where it is.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    pub hbone_mtls_port: u16,
}

/// Istio workload.proto `GatewayAddress.destination`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service, by name.
    Hostname(NamespacedHostname),
    /// A workload or a service, by address.
    Address(NetworkAddress),
}
