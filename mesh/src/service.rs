//! Services: stable names and virtual addresses over workloads.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    dump::ServiceShape,
    identity::Identity,
    names::{NamespacedHostname, NetworkAddress, Str},
    workload::{Commons, GatewayAddress, PortMap},
};

/// A service (Istio workload.proto `Service`), checked and normalised. Its endpoints live in the view.
///
/// Its JSON is `config_dump`'s, with no endpoints (see [`crate::dump`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ServiceShape", into = "ServiceShape")]
pub struct Service {
    /// Telemetry: short name.
    pub name: Str,
    /// Primary key, first half.
    pub namespace: Str,
    /// Primary key, second half. May be a wildcard `*.example.com` (DNS only).
    pub hostname: Str,
    /// Virtual host addresses.
    pub vips: Vec<NetworkAddress>,
    /// Virtual address ranges.
    pub cidr_vips: Vec<CidrVip>,
    /// Service port to target port; 0: named, each endpoint maps it.
    pub ports: PortMap,
    /// Names of its ports; `None` where none is known. Istio's control plane tells none.
    pub port_names: Option<Arc<PortNames>>,
    /// Identities that its endpoints may also show.
    pub subject_alt_names: Vec<Identity>,
    /// Waypoint for traffic addressed to the service.
    pub waypoint: Option<GatewayAddress>,
    /// One is drawn by weight; empty or all zero: `waypoint`.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How an endpoint is chosen.
    pub load_balancing: LoadBalancing,
    /// Restricts the addresses and the DNS records that are used.
    pub ip_families: IpFamilies,
    /// Wins ties for a name or an address.
    pub canonical: bool,
    /// Who sees it.
    pub visibility: Visibility,
}

impl Service {
    /// A public service with no address, port or waypoint; the rest is filled in.
    pub fn new(name: Str, namespace: Str, hostname: Str) -> Self {
        Self {
            name,
            namespace,
            hostname,
            vips: Vec::new(),
            cidr_vips: Vec::new(),
            ports: PortMap::new(),
            port_names: None,
            subject_alt_names: Vec::new(),
            waypoint: None,
            weighted_waypoints: Vec::new(),
            load_balancing: LoadBalancing::default(),
            ip_families: IpFamilies::default(),
            canonical: false,
            visibility: Visibility::default(),
        }
    }

    /// Whether clients of namespace `client` see it; for others it is as if absent.
    pub fn visible_to(&self, client: &str) -> bool {
        self.visibility == Visibility::Public || &*self.namespace == client
    }

    /// Keeps once what other services have too.
    pub fn share(&mut self, commons: &mut Commons) {
        if let Some(names) = &mut self.port_names {
            commons.port_names.share(names);
        }
    }

    /// The port of this name, in any case.
    pub fn port_named(&self, name: &str) -> Option<u16> {
        let names = self.port_names.as_ref()?;
        let mut named = names.0.iter();
        let found = named.find(|(_, it)| it.eq_ignore_ascii_case(name));
        found.map(|(port, _)| *port)
    }

    /// The primary key.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname {
            namespace: self.namespace.clone(),
            hostname: self.hostname.clone(),
        }
    }
}

/// Names of service ports; most services have the same few.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PortNames(Box<[(u16, Str)]>);

impl PortNames {
    /// `None` where there are none; an empty name is none.
    pub fn new<T: AsRef<str>>(named: impl IntoIterator<Item = (u16, T)>) -> Option<Self> {
        let named = named.into_iter();
        let named = named.filter(|(_, name)| !name.as_ref().is_empty());
        let names: Box<[_]> = named.map(|(port, it)| (port, it.as_ref().into())).collect();
        (!names.is_empty()).then_some(Self(names))
    }

    /// Each port with its name.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Str)> {
        self.0.iter().map(|(port, name)| (*port, name))
    }
}

/// A virtual address range in a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CidrVip {
    /// The network's id; empty for the default network.
    pub network: Str,
    /// The range.
    pub cidr: IpNet,
}

/// A waypoint and its share of the connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub destination: GatewayAddress,
    /// Relative share.
    pub weight: u32,
}

/// Istio workload.proto `LoadBalancing`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancing {
    /// What an endpoint should share with the client, most important first.
    pub routing_preferences: Vec<Scope>,
    /// How the preferences bind.
    pub mode: LoadBalancingMode,
    /// Whether unhealthy endpoints count.
    pub health_policy: HealthPolicy,
}

/// Istio workload.proto `LoadBalancing.Scope`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// Same region.
    Region,
    /// Same zone string.
    Zone,
    /// Same subzone string.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

/// Istio workload.proto `LoadBalancing.Mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoadBalancingMode {
    /// All endpoints alike.
    #[default]
    Standard,
    /// Only endpoints that match every preference.
    Strict,
    /// The endpoints that match the most leading preferences.
    Failover,
    /// No endpoint is chosen: the original destination is dialled.
    Passthrough,
}

/// Istio workload.proto `LoadBalancing.HealthPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthPolicy {
    /// Healthy endpoints only.
    #[default]
    OnlyHealthy,
    /// All endpoints.
    AllowAll,
}

/// Istio workload.proto `IPFamilies`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpFamilies {
    /// Whatever there is.
    #[default]
    Automatic,
    /// IPv4.
    #[serde(rename = "IPv4")]
    Ipv4Only,
    /// IPv6.
    #[serde(rename = "IPv6")]
    Ipv6Only,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether an address of this family may be used for the service.
    pub fn allows(self, address: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::Ipv4Only => address.is_ipv4(),
            Self::Ipv6Only => address.is_ipv6(),
        }
    }
}

/// Istio workload.proto `Visibility`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Visibility {
    /// Everyone.
    #[default]
    Public,
    /// Clients of its own namespace; for others it is as if absent.
    Namespace,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_with_the_same_names_of_ports_have_them_once() {
        let mut commons = Commons::default();
        let mut shared = |names: &[(u16, &str)]| {
            let mut service = Service::new("a".into(), "b".into(), "c".into());
            service.port_names = PortNames::new(names.iter().copied()).map(Arc::new);
            service.share(&mut commons);
            service.port_names
        };
        let one = shared(&[(80, "http"), (81, "")]).expect("named");
        let two = shared(&[(80, "http")]).expect("named");
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(shared(&[(80, "")]), None);
    }
}
