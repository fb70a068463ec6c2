//! Gateways of other networks: who takes traffic for workloads that cannot be reached by their own addresses.
//!
//! A Gateway of class `istio-remote` with the label `topology.istio.io/network` describes one. All of them are used: the
//! workloads of a network are spread over its gateways by their names, so that the same workload keeps its gateway.

use std::{net::IpAddr, sync::Arc};

use mesh::names::Str;
use proto::workload::{
    self as wire, GatewayAddress, NamespacedHostname, TunnelProtocol, WorkloadStatus, WorkloadType,
    gateway_address::Destination,
};

use super::{Settings, network_address};
use crate::{
    crd::Listener,
    gateway::{
        class::{UNMANAGED_CONTROLLER, is_east_west},
        names::NETWORK,
    },
    object::{Gateway, GatewayClass, Name},
};

const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
const TRUST_DOMAIN: &str = "gateway.istio.io/trust-domain";

/// A way into another network.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkGateway {
    /// The Gateway that describes it.
    pub name: Name,
    /// The network behind it.
    pub network: Str,
    /// Its addresses, as workloads refer to them. Not empty.
    pub addresses: Vec<GatewayAddress>,
    /// Its identity: service account and trust domain, empty for the mesh's own.
    account: String,
    trust_domain: String,
}

impl NetworkGateway {
    /// What a Gateway says of another network; `None`: it is something else, or names no address.
    pub fn new(gateway: &Gateway, class: Option<&GatewayClass>) -> Option<Self> {
        let class_name = gateway.spec.gateway_class_name.as_str();
        let unmanaged =
            class.is_some_and(|class| class.spec.controller_name == UNMANAGED_CONTROLLER);
        if class_name != "istio-remote" && !unmanaged {
            return None;
        }
        let network = gateway.meta.label(NETWORK)?.clone();
        let port = gateway.spec.listeners.iter().find_map(hbone_port)?;
        Self::at(gateway, network, port)
    }

    /// Of another cluster: its gateway for traffic from other networks, if that is what this is and it has an address. Its network
    /// is the label's, else the cluster's own.
    pub fn east_west(
        gateway: &Gateway,
        class: Option<&GatewayClass>,
        network: &Str,
    ) -> Option<Self> {
        let controller = class.map(|class| class.spec.controller_name.as_str());
        if !is_east_west(&gateway.spec.gateway_class_name, controller) {
            return None;
        }
        let label = gateway.meta.label(NETWORK).unwrap_or(network).clone();
        let port = gateway.spec.listeners.iter().find_map(tunnel_port)?;
        Self::at(gateway, label, port)
    }

    fn at(gateway: &Gateway, network: Str, port: u32) -> Option<Self> {
        let Name { namespace, name } = &gateway.meta.name;
        let refer = |address: String| reference(namespace, &network, &address, port);
        let addresses: Vec<_> = addresses(gateway).into_iter().map(refer).collect();
        let annotated = |key: &str| gateway.meta.annotation(key).map(ToString::to_string);
        (!addresses.is_empty()).then(|| Self {
            account: annotated(SERVICE_ACCOUNT).unwrap_or_else(|| name.to_string()),
            trust_domain: annotated(TRUST_DOMAIN).unwrap_or_default(),
            name: gateway.meta.name.clone(),
            network,
            addresses,
        })
    }

    /// Names of the workloads that its references by address lead to.
    pub fn uids(&self) -> Vec<Str> {
        let uid = |reference: &GatewayAddress| Some(self.address_and_uid(reference)?.1);
        self.addresses.iter().filter_map(uid).collect()
    }

    fn address_and_uid(&self, reference: &GatewayAddress) -> Option<(Vec<u8>, Str)> {
        let Some(Destination::Address(address)) = &reference.destination else {
            return None;
        };
        let text = super::address_of(&address.address)?;
        let port = reference.hbone_mtls_port;
        let uid = format!("NetworkGateway/{}/{text}/{port}", self.network);
        Some((address.address.clone(), uid.into()))
    }

    /// One of the workloads that its references lead to.
    pub fn workload(&self, settings: &Settings, uid: &str) -> Option<wire::Workload> {
        let all = self.addresses.iter();
        let mut found = all.filter_map(|reference| self.address_and_uid(reference));
        let (address, _) = found.find(|(_, own)| **own == *uid)?;
        Some(wire::Workload {
            uid: uid.to_owned(),
            name: uid.to_owned(),
            namespace: self.name.namespace.to_string(),
            addresses: vec![address],
            network: self.network.to_string(),
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            trust_domain: match self.trust_domain.as_str() {
                "" => settings.wire_trust_domain(),
                "cluster.local" => String::new(),
                other => other.to_owned(),
            },
            service_account: self.account.clone(),
            canonical_name: self.name.name.to_string(),
            canonical_revision: "latest".to_owned(),
            workload_name: self.name.name.to_string(),
            workload_type: WorkloadType::Pod.into(),
            status: WorkloadStatus::Healthy.into(),
            ..wire::Workload::default()
        })
    }
}

/// The gateway through which a workload of another network is reached: the same for the same workload while the gateways
/// stay the same. Of each, the first of its addresses counts: the others lead to the same place.
pub fn choose(gateways: &[Arc<NetworkGateway>], uid: &str) -> Option<GatewayAddress> {
    let mut all: Vec<&GatewayAddress> = Vec::new();
    for first in gateways.iter().filter_map(|it| it.addresses.first()) {
        if !all.contains(&first) {
            all.push(first);
        }
    }
    let count = u64::try_from(all.len()).ok().filter(|count| *count > 0)?;
    let hash = twox_hash::XxHash64::oneshot(0, uid.as_bytes());
    let index = usize::try_from(hash % count).unwrap_or_default();
    all.get(index).copied().cloned()
}

fn hbone_port(listener: &Listener) -> Option<u32> {
    let port = u16::try_from(listener.port)
        .ok()
        .filter(|port| *port != 0)?;
    (listener.protocol == "HBONE").then_some(port.into())
}

/// Listeners whose tunnel ends at the gateway.
fn tunnel_port(listener: &Listener) -> Option<u32> {
    let ends_tls = || {
        let mode = listener.tls.get("mode").and_then(|mode| mode.as_str());
        listener.protocol == "TLS" && mode.is_none_or(|mode| mode == "Terminate")
    };
    hbone_port(listener).or_else(|| {
        let port = u16::try_from(listener.port).ok();
        port.filter(|port| *port != 0 && ends_tls()).map(u32::from)
    })
}

/// What the status has, else (in a folder, where nobody writes one) the spec.
fn addresses(gateway: &Gateway) -> Vec<String> {
    let told = gateway
        .addresses
        .iter()
        .map(|address| address.value.clone());
    let told: Vec<String> = told.collect();
    if !told.is_empty() {
        return told;
    }
    let written = gateway.spec.addresses.as_array().into_iter().flatten();
    written
        .filter_map(|address| Some(address.get("value")?.as_str()?.to_owned()))
        .collect()
}

fn reference(namespace: &Str, network: &Str, address: &str, port: u32) -> GatewayAddress {
    let destination = match address.parse::<IpAddr>() {
        Ok(ip) => Destination::Address(network_address(network, ip)),
        Err(_) => Destination::Hostname(NamespacedHostname {
            namespace: namespace.to_string(),
            hostname: address.to_owned(),
        }),
    };
    GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: port,
    }
}
