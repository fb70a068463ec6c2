//! Words to write a small mesh with, for tests. Pods are in namespace `a` on node `n1` unless a test says otherwise.

use std::net::SocketAddr;

use crate::{
    identity::Identity,
    names::{Str, WorkloadUid},
    service::Service,
    view::{MeshView, Resource, Update},
    workload::{GatewayAddress, TunnelProtocol, Workload},
};

/// An in-mesh pod `namespace/name` at these addresses, with service account `name`.
pub(crate) fn pod(key: &str, addresses: &[&str]) -> Workload {
    let (namespace, name) = key.split_once('/').unwrap();
    let uid = WorkloadUid(format!("Kubernetes//Pod/{key}").into());
    {
        let mut it = Workload::new(uid, name.into(), namespace.into());
        it.addresses = addresses.iter().map(|it| it.parse().unwrap()).collect();
        it.tunnel_protocol = TunnelProtocol::Hbone;
        it.service_account = name.into();
        it.node = "n1".into();
        it
    }
}

impl Workload {
    /// Makes it an endpoint of `namespace/hostname`, with its own ports.
    pub(crate) fn serving(mut self, service: &str, ports: &[(u16, u16)]) -> Self {
        let ports = ports.iter().copied().collect();
        self.services.insert(service.parse().unwrap(), ports);
        self
    }
}

/// A service `namespace/hostname` at these addresses.
pub(crate) fn service(key: &str, vips: &[&str], ports: &[(u16, u16)]) -> Service {
    let (namespace, hostname) = key.split_once('/').unwrap();
    let name: Str = hostname.split('.').next().unwrap().into();
    Service {
        vips: vips
            .iter()
            .map(|it| format!("/{it}").parse().unwrap())
            .collect(),
        ports: ports.iter().copied().collect(),
        ..Service::new(name, namespace.into(), hostname.into())
    }
}

/// `namespace/hostname` or `network/ip`.
pub(crate) fn gateway(destination: &str, port: u16) -> GatewayAddress {
    GatewayAddress {
        destination: destination.parse().unwrap(),
        hbone_mtls_port: port,
    }
}

pub(crate) fn view(resources: impl IntoIterator<Item = Resource>) -> MeshView {
    let mut view = MeshView::default();
    apply(&mut view, resources);
    view
}

pub(crate) fn apply(view: &mut MeshView, resources: impl IntoIterator<Item = Resource>) {
    view.apply(Update {
        upserts: resources.into_iter().collect(),
        removals: Vec::new(),
    });
}

pub(crate) fn identity(namespace: &str, account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
        .parse()
        .unwrap()
}

pub(crate) fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
