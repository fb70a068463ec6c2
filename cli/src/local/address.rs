//! Who gets which address in the embedded mesh. Pure: pools hand out and take back, nothing here touches an interface.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An address of each family. Everything in the embedded mesh is dual stack.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Dual {
    /// The IPv4 address, which comes first wherever a list is written.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Dual {
    /// Both, IPv4 first.
    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Both as text, IPv4 first.
    pub fn texts(self) -> [String; 2] {
        self.both().map(|ip| ip.to_string())
    }
}

/// Where the control plane and the cluster's DNS server live, on the link that joins the nodes.
pub const CONTROL: Dual = link(2);
/// The supervisor's own address on that link.
pub const HOST: Dual = link(1);
/// The DNS server's virtual address, which every pod's `resolv.conf` names.
pub const CLUSTER_DNS: Dual = service(10);
/// Prefix lengths of the link between the nodes.
pub const LINK_PREFIX: (u8, u8) = (24, 64);
/// Prefix lengths of one node's pods.
pub const POD_PREFIX: (u8, u8) = (24, 64);
/// The network of services' virtual addresses: its first addresses, to be used with [`SERVICE_PREFIX`].
pub const SERVICE_NETWORK: Dual = service(0);
/// Prefix lengths of services' virtual addresses.
pub const SERVICE_PREFIX: (u8, u8) = (16, 112);
/// How many nodes fit on the link.
pub const MAX_NODES: u8 = 200;

const fn link(host: u8) -> Dual {
    Dual {
        v4: Ipv4Addr::new(10, 100, 0, host),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x100, 0, 0, 0, 0, host as u16),
    }
}

const fn service(index: u16) -> Dual {
    let [high, low] = index.to_be_bytes();
    Dual {
        v4: Ipv4Addr::new(10, 96, high, low),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, index),
    }
}

/// Address of node `number` (from 1) on the link.
pub const fn node(number: u8) -> Dual {
    link(10 + number)
}

/// The network of the pods of node `number`: its first addresses, to be used with [`POD_PREFIX`].
pub const fn pod_network(number: u8) -> Dual {
    pod(number, 0)
}

/// The address that pods of node `number` use as their gateway. IPv6 pods use a link-local one.
pub const fn pod_gateway(number: u8) -> Dual {
    pod(number, 1)
}

const fn pod(node: u8, host: u8) -> Dual {
    Dual {
        v4: Ipv4Addr::new(10, 244, node, host),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, node as u16, 0, 0, 0, host as u16),
    }
}

/// The pods' addresses of one node. An address that was given back is the last to be given out again, so that nobody
/// who still remembers the old pod talks to a new one.
#[derive(Debug)]
pub struct PodPool {
    node: u8,
    taken: [bool; 256],
    next: u8,
}

impl PodPool {
    const FIRST: u8 = 2;
    const LAST: u8 = 254;

    /// All the addresses of node `number`, free.
    pub fn new(node: u8) -> Self {
        Self {
            node,
            taken: [false; 256],
            next: Self::FIRST,
        }
    }

    /// Takes a free address; `None` when the node is full (253 pods).
    pub fn take(&mut self) -> Option<Dual> {
        let span = usize::from(Self::LAST - Self::FIRST) + 1;
        for _ in 0..span {
            let host = self.next;
            self.next = if host == Self::LAST {
                Self::FIRST
            } else {
                host + 1
            };
            if !self.taken[usize::from(host)] {
                self.taken[usize::from(host)] = true;
                return Some(pod(self.node, host));
            }
        }
        None
    }

    /// Gives an address back. One that is not of this pool is ignored.
    pub fn release(&mut self, address: Dual) {
        let [_, _, node, host] = address.v4.octets();
        if node == self.node {
            self.taken[usize::from(host)] = false;
        }
    }
}

/// Services' virtual addresses, chosen by name, so that a service has the same one at every start.
#[derive(Debug, Default)]
pub struct ServicePool {
    by_index: BTreeMap<u16, String>,
}

impl ServicePool {
    const FIRST: u16 = 0x0100;
    const LAST: u16 = 0xfffe;

    /// The address of the service called `key` (`namespace/name`), taken now if it has none yet. `None` when all are taken.
    pub fn take(&mut self, key: &str) -> Option<Dual> {
        let span = u64::from(Self::LAST - Self::FIRST) + 1;
        let start = stable_hash(key.as_bytes()) % span;
        for step in 0..span {
            let offset =
                u16::try_from((start + step) % span).expect("a remainder of a 16-bit span");
            let index = Self::FIRST + offset;
            match self.by_index.get(&index) {
                Some(owner) if owner != key => {}
                _ => {
                    self.by_index.insert(index, key.to_owned());
                    return Some(service(index));
                }
            }
        }
        None
    }

    /// Gives back what services that are no more had.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.by_index.retain(|_, owner| keep(owner));
    }
}

/// FNV-1a, 64 bits: the same in every build, unlike the standard library's hasher.
pub fn stable_hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The service's IPv6 address for its IPv4 one, where the user chose only the latter.
pub fn service_v6(v4: Ipv4Addr) -> Ipv6Addr {
    let [_, _, high, low] = v4.octets();
    service(u16::from_be_bytes([high, low])).v6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_pod_address_is_the_last_to_be_given_again() {
        let mut pool = PodPool::new(2);
        let first = pool.take().unwrap();
        assert_eq!(first.texts(), ["10.244.2.2", "fd00:10:244:2::2"]);
        pool.release(first);
        let others: Vec<_> = (0..252).map(|_| pool.take().unwrap()).collect();
        assert!(!others.contains(&first));
        assert_eq!(pool.take(), Some(first));
        assert_eq!(pool.take(), None);
    }

    #[test]
    fn a_service_keeps_its_address_and_shares_it_with_nobody() {
        let mut pool = ServicePool::default();
        let keys: Vec<String> = (0..2000).map(|n| format!("ns/svc-{n}")).collect();
        let addresses: Vec<_> = keys.iter().map(|key| pool.take(key).unwrap()).collect();
        let distinct: std::collections::BTreeSet<_> = addresses.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(pool.take("ns/svc-7"), Some(addresses[7]));
        assert!(!addresses.contains(&CLUSTER_DNS));
        let mut again = ServicePool::default();
        assert_eq!(again.take("ns/svc-0"), Some(addresses[0]));
    }

    #[test]
    fn families_of_a_service_share_their_index() {
        let address = service(0x1234);
        assert_eq!(service_v6(address.v4), address.v6);
        assert_eq!(address.texts(), ["10.96.18.52", "fd00:10:96::1234"]);
    }
}
