//! Objects in, resources and conditions out. Pure: the graph fetches the facts, the functions here decide.
//!
//! What comes out are the wire's own messages and not `mesh`'s types, because the wire carries more than a node tunnel
//! uses (application protocols, ingress waypoints); that `mesh::wire` takes every one of them is tested.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use bytes::Bytes;
use mesh::{identity::TrustDomain, names::Str};
use prost::Message;
use proto::{security::Authorization, workload as wire};

use crate::{
    intern,
    output::{Condition, Resource, Truth},
};

pub mod allocate;
pub mod l7;
pub mod network;
pub mod peer;
pub mod policy;
pub mod port;
pub mod remote;
pub mod scope;
pub mod service;
pub mod visibility;
pub mod waypoint;
pub mod workload;

/// What translation needs to know of the mesh beside the objects.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The mesh's own trust domain.
    pub trust_domain: TrustDomain,
    /// Other names of the mesh's trust domain: a policy that names one of them means all of them.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// This cluster's id.
    pub cluster_id: Str,
    /// The namespace of the control plane, where there is one; else the root namespace stands for it.
    pub system_namespace: Option<Str>,
    /// The network of this cluster's pods; empty: as the system namespace's label `topology.istio.io/network` says.
    pub network: Str,
    /// `cluster.local` in most clusters.
    pub cluster_domain: Str,
    /// Where mesh-wide policies live: `istio-system` in most meshes.
    pub root_namespace: Str,
    /// Objects labelled `istio.io/rev` with another revision are left alone.
    pub revision: Str,
    /// What becomes of traffic whose protection cannot be had.
    pub failure: FailurePolicy,
    /// Send dry-run policies. Node tunnels that do not know the field enforce them.
    pub send_dry_run: bool,
    /// From where hosts of ServiceEntries are seen; `None`: from everywhere, and nothing is said of it.
    pub entry_visibility: Option<visibility::EntryVisibility>,
    /// Which services are global; `None`: no rules were configured.
    pub service_scopes: Option<Vec<scope::ScopeRule>>,
    /// There may be other clusters in the mesh.
    pub has_others: bool,
    /// This is another cluster, of which [`remote::Exported`] is wanted and nothing else.
    pub is_remote: bool,
    /// What holds for all waypoints; `None`: nothing was configured.
    pub mesh: Option<Arc<l7::istio::mesh::MeshSettings>>,
}

/// What becomes of traffic whose protection cannot be had: a waypoint that is missing, a rule that L4 cannot judge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailurePolicy {
    /// It is refused.
    #[default]
    Closed,
    /// As Istio does, for a migration: missing waypoints are passed by, rules that L4 cannot judge have no effect.
    AsIstio,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
            system_namespace: None,
            cluster_id: "Kubernetes".into(),
            network: "".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            revision: "default".into(),
            failure: FailurePolicy::Closed,
            send_dry_run: false,
            entry_visibility: None,
            service_scopes: None,
            has_others: false,
            is_remote: false,
            mesh: None,
        }
    }
}

impl Settings {
    /// A principal, or the start of one, under every name of the mesh's trust domain if it has one of them; else as it is.
    /// Forms that leave the trust domain open are as they are.
    pub fn in_every_name(&self, principal: &str) -> Vec<String> {
        let own = std::iter::once(&self.trust_domain);
        let mut all = own.chain(&self.trust_domain_aliases);
        let names = all.clone().map(TrustDomain::as_str);
        match principal.split_once('/') {
            Some((domain, rest))
                if !self.trust_domain_aliases.is_empty() && all.any(|it| it.as_str() == domain) =>
            {
                names.map(|name| format!("{name}/{rest}")).collect()
            }
            _ => vec![principal.to_owned()],
        }
    }

    /// The trust domain as the wire has it: empty for the default one.
    pub fn wire_trust_domain(&self) -> String {
        match self.trust_domain.as_str() {
            "cluster.local" => String::new(),
            other => other.to_owned(),
        }
    }

    /// The host name of a Kubernetes service.
    pub fn service_hostname(&self, namespace: &str, name: &str) -> String {
        format!("{name}.{namespace}.svc.{}", self.cluster_domain)
    }
}

/// A condition.
pub fn condition(
    type_: &'static str,
    status: Truth,
    reason: &'static str,
    message: impl Into<Cow<'static, str>>,
) -> Condition {
    Condition {
        type_,
        status,
        reason,
        message: message.into(),
    }
}

/// An address as the wire has it: 4 or 16 bytes, never an IPv4-mapped one.
pub fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address.to_canonical() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn network_address(network: &str, address: IpAddr) -> wire::NetworkAddress {
    wire::NetworkAddress {
        network: network.to_owned(),
        address: bytes_of(address),
        length: None,
    }
}

/// Encodes a workload.
pub fn workload_resource(workload: &wire::Workload) -> Resource {
    let shared = workload.network_mode() == wire::NetworkMode::HostNetwork;
    let addresses = workload.addresses.iter().filter(|_| !shared);
    let alias = |bytes: &Vec<u8>| found_by(&workload.network, bytes);
    let message = wire::Address {
        r#type: Some(wire::address::Type::Workload(workload.clone())),
    };
    Resource {
        aliases: addresses.filter_map(alias).collect(),
        node: (!workload.node.is_empty()).then(|| intern::text(&workload.node)),
        services: workload
            .services
            .keys()
            .map(|key| intern::text(key))
            .collect(),
        ..encoded(proto::ADDRESS_TYPE_URL, &workload.uid, &message)
    }
}

/// What an address is found by on demand, where it is one.
pub fn alias(address: &wire::NetworkAddress) -> Option<Str> {
    found_by(&address.network, &address.address)
}

fn found_by(network: &str, address: &[u8]) -> Option<Str> {
    Some(format!("{network}/{}", address_of(address)?).into())
}

/// Encodes a service.
pub fn service_resource(service: &wire::Service) -> Resource {
    let alias = |vip: &wire::NetworkAddress| {
        let address = address_of(&vip.address)?;
        Some(match vip.length {
            Some(length) => format!("{}/{address}/{length}", vip.network).into(),
            None => format!("{}/{address}", vip.network).into(),
        })
    };
    let name = format!("{}/{}", service.namespace, service.hostname);
    let message = wire::Address {
        r#type: Some(wire::address::Type::Service(service.clone())),
    };
    Resource {
        aliases: service.addresses.iter().filter_map(alias).collect(),
        ..encoded(proto::ADDRESS_TYPE_URL, &name, &message)
    }
}

/// Encodes a policy.
pub fn policy_resource(policy: &Authorization) -> Resource {
    let name = format!("{}/{}", policy.namespace, policy.name);
    encoded(proto::AUTHORIZATION_TYPE_URL, &name, policy)
}

fn encoded(type_url: &'static str, name: &str, message: &impl Message) -> Resource {
    let body = Bytes::from(message.encode_to_vec());
    let version = format!("{:x}", twox_hash::XxHash64::oneshot(0, &body));
    Resource {
        type_url,
        scope: None,
        name: name.into(),
        aliases: Box::default(),
        version: version.into(),
        body,
        node: None,
        services: Box::default(),
    }
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
