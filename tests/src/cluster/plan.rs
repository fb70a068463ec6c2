//! What a cluster of the rig looks like: its settings, and every address that follows from them. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The addresses that pods and Services have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both, IPv4 first.
    Dual,
}

/// How kube-proxy writes its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// With nftables.
    Nftables,
    /// With iptables.
    Iptables,
}

/// Which cluster to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How many nodes, `node1` and on; 1 to 50.
    pub nodes: u8,
    /// Address families.
    pub families: Families,
    /// kube-proxy's mode.
    pub proxy: ProxyMode,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            nodes: 2,
            families: Families::Dual,
            proxy: ProxyMode::Nftables,
        }
    }
}

/// Where the node network ends: the API server's side, and whoever is outside the mesh.
pub const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The same, IPv6.
pub const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x77, 0, 0, 0, 0, 1);

/// The most pods that a node takes.
pub const MAX_PODS: u32 = 400;

impl Settings {
    /// The nodes' names, in order.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.nodes).map(|node| format!("node{node}")).collect()
    }

    /// The API server's address inside the cluster: of the first family.
    pub fn api_address(&self) -> IpAddr {
        match self.families {
            Families::V6 => OUTSIDE_V6.into(),
            Families::V4 | Families::Dual => OUTSIDE_V4.into(),
        }
    }

    /// The API server, for those inside the cluster.
    pub fn api_server(&self) -> String {
        match self.api_address() {
            IpAddr::V4(address) => format!("https://{address}:6443"),
            IpAddr::V6(address) => format!("https://[{address}]:6443"),
        }
    }

    /// The addresses of a node, first family first.
    pub fn node_addresses(&self, node: u8) -> Vec<IpAddr> {
        let v4 = Ipv4Addr::new(10, 77, 0, 10 + node).into();
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x77, 0, 0, 0, 0, 0x10 + u16::from(node)).into();
        self.of_families(v4, v6)
    }

    /// The networks of a node's pods: a /22, and a /64.
    pub fn pod_networks(&self, node: u8) -> Vec<String> {
        self.of_families(
            format!("10.244.{}.0/22", u16::from(node) * 4),
            format!("fd00:10:244:{node:x}::/64"),
        )
    }

    /// The networks of all pods.
    pub fn cluster_networks(&self) -> String {
        let networks = self.of_families("10.244.0.0/16", "fd00:10:244::/48");
        networks.join(",")
    }

    /// The networks of Services.
    pub fn service_networks(&self) -> String {
        let networks = self.of_families("10.96.0.0/16", "fd00:10:96::/112");
        networks.join(",")
    }

    /// The `kubernetes` Service: the first address of each network.
    pub fn kubernetes_addresses(&self) -> Vec<IpAddr> {
        self.of_families(
            Ipv4Addr::new(10, 96, 0, 1).into(),
            Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1).into(),
        )
    }

    /// The cluster's DNS.
    pub fn dns_address(&self) -> IpAddr {
        match self.families {
            Families::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa).into(),
            Families::V4 | Families::Dual => Ipv4Addr::new(10, 96, 0, 10).into(),
        }
    }

    fn of_families<T>(&self, v4: T, v6: T) -> Vec<T> {
        match self.families {
            Families::V4 => vec![v4],
            Families::V6 => vec![v6],
            Families::Dual => vec![v4, v6],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_different_nodes_do_not_overlap() {
        let settings = Settings {
            nodes: 50,
            ..Settings::default()
        };
        let mut seen = Vec::new();
        for node in 1..=settings.nodes {
            for network in settings.pod_networks(node) {
                assert!(!seen.contains(&network), "{network} is given twice");
                seen.push(network);
            }
        }
        assert_eq!(seen[0], "10.244.4.0/22");
        assert_eq!(seen[1], "fd00:10:244:1::/64");
    }

    #[test]
    fn a_cluster_of_one_family_has_no_address_of_the_other() {
        for (families, v4) in [(Families::V4, true), (Families::V6, false)] {
            let settings = Settings {
                families,
                ..Settings::default()
            };
            let mut addresses = settings.node_addresses(1);
            addresses.extend(settings.kubernetes_addresses());
            addresses.extend([settings.api_address(), settings.dns_address()]);
            assert!(addresses.iter().all(|address| address.is_ipv4() == v4));
        }
    }
}
