//! Services as a waypoint serves them.

use mesh::{
    l7::served::{AppProtocol, ServedService},
    names::NamespacedHostname,
};
use proto::workload::AppProtocol as Wire;

use crate::translate::{port::PortSpec, service::Claim};

/// A service that a waypoint serves (`bound`), or that only its routes lead to.
pub fn service(claim: &Claim, bound: bool) -> ServedService {
    let ports = claim.ports.iter();
    ServedService {
        service: key(claim),
        bound,
        ports: ports.map(|port| (port.port, protocol(port))).collect(),
        resolution: claim.resolution,
        external: claim.external,
    }
}

/// Its key in the model.
pub fn key(claim: &Claim) -> NamespacedHostname {
    NamespacedHostname {
        namespace: claim.meta.name.namespace.clone(),
        hostname: claim.hostname.clone(),
    }
}

fn protocol(port: &PortSpec) -> AppProtocol {
    match port.protocol {
        Wire::Grpc if port.grpc_web => AppProtocol::GrpcWeb,
        Wire::Grpc => AppProtocol::Grpc,
        Wire::Http11 => AppProtocol::Http,
        Wire::Http2 => AppProtocol::Http2,
        Wire::Tls => AppProtocol::Tls,
        Wire::Tcp => AppProtocol::Tcp,
        Wire::Unknown => AppProtocol::Unknown,
    }
}
