//! What a waypoint serves: the services and workloads that are bound to it, and the protocols of their ports.

use std::collections::BTreeMap;

use crate::names::{NamespacedHostname, Str, WorkloadUid};

/// A service that the waypoint serves, or that its routes lead to. Its addresses and endpoints are in the mesh view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedService {
    /// Key.
    pub service: NamespacedHostname,
    /// Whether clients may address it through this waypoint; false: a backend of its routes only.
    pub bound: bool,
    /// Its ports. A port that is not here is refused.
    pub ports: BTreeMap<u16, AppProtocol>,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Whether its endpoints are outside the mesh (ServiceEntry `MESH_EXTERNAL`).
    pub external: bool,
}

/// A workload that the waypoint serves by its own address (`istio.io/waypoint-for: workload` or `all`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServedWorkload {
    /// Key.
    pub uid: WorkloadUid,
}

/// Labels of a workload, where subsets, locality or telemetry need them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadLabels {
    /// Key.
    pub uid: WorkloadUid,
    /// As on the pod.
    pub labels: BTreeMap<Str, Str>,
}

/// The protocol of a port (Kubernetes `appProtocol`, else the name's prefix).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    /// Not declared: sniffed.
    #[default]
    Unknown,
    /// HTTP/1.1 (clients may speak HTTP/2 with prior knowledge).
    Http,
    /// HTTP/2, also `kubernetes.io/h2c`.
    Http2,
    /// gRPC.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// TLS of the application, passed through.
    Tls,
    /// Opaque.
    Tcp,
}

/// How a service's endpoints are found (ServiceEntry `resolution`; Kubernetes services are `Static`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// They are in the mesh view; those with a host name and no address are resolved.
    #[default]
    Static,
    /// The address that the client dialled.
    None,
    /// As `Static`, all answers are used.
    Dns,
    /// As `Static`, the first answer is used.
    DnsRoundRobin,
    /// Wildcard hosts: the request's host or SNI is resolved, if it is within the wildcard.
    DynamicDns,
}
