//! Virtual addresses for ServiceEntries that have none, so that clients' connections can be told apart by address.
//!
//! Deterministic: an address follows from the names alone, whichever order objects come in, but for collisions, where the
//! older entry keeps it. Nothing needs to be written anywhere for the same folder to give the same addresses again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh::names::Str;

use crate::{
    crd::Resolution,
    object::{Name, ServiceEntry},
};

const V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(240, 240, 0, 0), 16);
const V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0), 48);

/// A host of a ServiceEntry.
pub type Host = (Name, Str);

/// The addresses of every host that needs some: one of each family.
pub fn allocate(entries: &[Arc<ServiceEntry>]) -> BTreeMap<Host, Vec<IpAddr>> {
    let mut oldest_first: Vec<&ServiceEntry> = entries.iter().map(|entry| &**entry).collect();
    oldest_first.sort_by_key(|entry| entry.meta.age());
    let mut taken: BTreeSet<IpAddr> = entries.iter().flat_map(|entry| written(entry)).collect();
    let hosts: Vec<(Host, &ServiceEntry)> =
        oldest_first.iter().flat_map(|entry| needy(entry)).collect();
    let mut given: BTreeMap<Host, Vec<IpAddr>> = BTreeMap::new();
    for (host, entry) in &hosts {
        given.insert(host.clone(), kept(entry, &host.1, &mut taken));
    }
    for (host, _) in &hosts {
        let addresses = given.entry(host.clone()).or_default();
        for v4 in [true, false] {
            if !addresses.iter().any(|address| address.is_ipv4() == v4) {
                addresses.extend(free(host, v4, &mut taken));
            }
        }
        addresses.sort();
    }
    given
}

/// Addresses that users wrote themselves: never given to another.
fn written(entry: &ServiceEntry) -> Vec<IpAddr> {
    let addresses = entry.spec.addresses.iter();
    addresses
        .filter_map(|address| address.parse().ok())
        .collect()
}

fn needy(entry: &ServiceEntry) -> Vec<(Host, &ServiceEntry)> {
    let opted_out = entry
        .meta
        .label("networking.istio.io/enable-autoallocate-ip")
        .is_some_and(|text| &**text == "false");
    if opted_out || entry.spec.resolution == Resolution::None || !entry.spec.addresses.is_empty() {
        return Vec::new();
    }
    let wildcards = entry.spec.resolution == Resolution::DynamicDns;
    let hosts = entry
        .spec
        .hosts
        .iter()
        .filter(|host| wildcards || !host.contains('*'));
    hosts
        .map(|host| ((entry.meta.name.clone(), host.as_str().into()), entry))
        .collect()
}

/// What an earlier allocation gave, where nobody older has it.
fn kept(entry: &ServiceEntry, host: &str, taken: &mut BTreeSet<IpAddr>) -> Vec<IpAddr> {
    let earlier = entry
        .allocated
        .iter()
        .filter(|allocated| allocated.host == host);
    earlier
        .filter_map(|allocated| allocated.value.parse().ok())
        .filter(|address| in_range(*address) && taken.insert(*address))
        .collect()
}

fn in_range(address: IpAddr) -> bool {
    [IpNet::V4(V4), IpNet::V6(V6)]
        .iter()
        .any(|range| range.contains(&address))
}

/// The address that the names hash to, or the next one that is free. `None`: the range is full.
fn free((name, host): &Host, v4: bool, taken: &mut BTreeSet<IpAddr>) -> Option<IpAddr> {
    let hash = twox_hash::XxHash64::oneshot(0, format!("{name}/{host}").as_bytes());
    let last: u16 = 0xffff - 1;
    let start = u16::try_from(hash % u64::from(last)).unwrap_or_default();
    (0..last)
        .map(|step| {
            let number = u16::try_from((u32::from(start) + u32::from(step)) % u32::from(last))
                .unwrap_or_default()
                + 1;
            address(v4, number)
        })
        .find(|address| taken.insert(*address))
}

fn address(v4: bool, number: u16) -> IpAddr {
    match v4 {
        true => IpAddr::V4(Ipv4Addr::from(u32::from(V4.network()) | u32::from(number))),
        false => IpAddr::V6(Ipv6Addr::from(
            u128::from(V6.network()) | u128::from(number),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{crd::AllocatedAddress, object::Meta};

    fn entry(name: &str, host: &str) -> ServiceEntry {
        let mut entry = ServiceEntry {
            meta: Meta {
                name: Name::new("a", name),
                ..Meta::default()
            },
            ..ServiceEntry::default()
        };
        entry.spec.hosts = vec![host.to_owned()];
        entry.spec.resolution = Resolution::Dns;
        entry
    }

    fn given(entries: Vec<ServiceEntry>) -> BTreeMap<Host, Vec<IpAddr>> {
        allocate(&entries.into_iter().map(Arc::new).collect::<Vec<_>>())
    }

    #[test]
    fn the_same_names_get_the_same_addresses_whatever_else_there_is() {
        let alone = given(vec![entry("x", "x.example.com")]);
        let addresses = alone.values().next().unwrap();
        assert!(addresses.len() == 2 && addresses.iter().all(|address| in_range(*address)));
        let mut others: Vec<_> = (0..50)
            .map(|n| entry(&format!("o{n}"), "o.example.com"))
            .collect();
        others.push(entry("x", "x.example.com"));
        let host = (Name::new("a", "x"), "x.example.com".into());
        assert_eq!(&given(others)[&host], addresses);
    }

    #[test]
    fn addresses_are_never_shared() {
        let all = given(
            (0..2000)
                .map(|n| entry(&format!("e{n}"), "h.example.com"))
                .collect(),
        );
        let distinct: BTreeSet<_> = all.values().flatten().collect();
        assert_eq!(distinct.len(), 4000);
    }

    #[test]
    fn an_earlier_allocation_is_kept_and_a_written_address_goes_first() {
        let host = (Name::new("a", "x"), Str::from("x.example.com"));
        let earlier: IpAddr = "240.240.7.7".parse().unwrap();
        let mut kept = entry("x", "x.example.com");
        kept.allocated = vec![AllocatedAddress {
            value: earlier.to_string(),
            host: "x.example.com".into(),
        }];
        assert!(given(vec![kept.clone()])[&host].contains(&earlier));
        let mut written = entry("w", "w.example.com");
        written.spec.addresses = vec![earlier.to_string()];
        assert!(!given(vec![kept, written])[&host].contains(&earlier));
    }

    #[test]
    fn entries_that_need_none_get_none() {
        let mut resolved_by_client = entry("x", "x.example.com");
        resolved_by_client.spec.resolution = Resolution::None;
        let wildcard = entry("w", "*.example.com");
        let mut opted_out = entry("o", "o.example.com");
        opted_out.meta.labels = Arc::new(
            [(
                "networking.istio.io/enable-autoallocate-ip".into(),
                "false".into(),
            )]
            .into(),
        );
        assert!(given(vec![resolved_by_client, wildcard, opted_out]).is_empty());
    }
}
