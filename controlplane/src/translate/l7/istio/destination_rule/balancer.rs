//! Choice of an endpoint.

use mesh::{
    l7::backend::{Balancer, Distribution, HashKey, HashTable, Locality, Warmup},
    names::Str,
};

use super::whole;
use crate::{
    crd::istio::{self as crd, SimpleLb},
    translate::l7::istio::read::{duration, header, interval},
    validate::Findings,
};

/// Envoy's and Istio's defaults.
const RING_SIZE: u32 = 1024;
const TABLE_SIZE: u32 = 65_537;

/// `simple` and `consistentHash`.
pub(super) fn balancer(
    it: &crd::LoadBalancerSettings,
    path: &str,
    found: &mut Findings,
) -> Balancer {
    if it.simple.is_some() && it.consistent_hash.is_some() {
        found.error(path, "only one of simple and consistentHash may be set");
    }
    if let Some(hash) = &it.consistent_hash {
        let path = format!("{path}.consistentHash");
        return match hash_key(hash, &path, found) {
            Some(key) => Balancer::ConsistentHash {
                key,
                table: hash_table(hash, &path, found),
            },
            None => Balancer::default(),
        };
    }
    match it.simple.unwrap_or_default() {
        SimpleLb::Unspecified | SimpleLb::LeastConn | SimpleLb::LeastRequest => {
            Balancer::LeastRequest
        }
        SimpleLb::RoundRobin => Balancer::RoundRobin,
        SimpleLb::Random => Balancer::Random,
        SimpleLb::Passthrough => Balancer::Passthrough,
    }
}

fn hash_key(it: &crd::ConsistentHashLb, path: &str, found: &mut Findings) -> Option<HashKey> {
    let mut keys = Vec::new();
    if let Some(name) = &it.http_header_name {
        keys.extend(header(name, &format!("{path}.httpHeaderName"), found).map(HashKey::Header));
    }
    if let Some(cookie) = &it.http_cookie {
        if cookie.name.is_empty() {
            found.error(format!("{path}.httpCookie.name"), "is missing");
        }
        let attributes = cookie.attributes.iter().map(|attribute| {
            let value = Str::from(attribute.value.as_str());
            (
                attribute.name.as_str().into(),
                (!value.is_empty()).then_some(value),
            )
        });
        keys.push(HashKey::Cookie {
            name: cookie.name.as_str().into(),
            path: (!cookie.path.is_empty()).then(|| cookie.path.as_str().into()),
            ttl: duration(
                cookie.ttl.as_ref(),
                &format!("{path}.httpCookie.ttl"),
                found,
            ),
            attributes: attributes.collect(),
        });
    }
    if it.use_source_ip == Some(true) {
        keys.push(HashKey::SourceIp);
    }
    if let Some(name) = &it.http_query_parameter_name {
        keys.push(HashKey::Query(name.as_str().into()));
    }
    if keys.len() != 1 {
        found.error(
            path,
            "needs one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName",
        );
    }
    keys.pop()
}

fn hash_table(it: &crd::ConsistentHashLb, path: &str, found: &mut Findings) -> HashTable {
    let bounded = |size: u64, field: &str, found: &mut Findings| match u32::try_from(size) {
        // Envoy's own bound of a ring.
        Ok(size) if size <= 8_388_608 => Some(size),
        _ => {
            found.error(format!("{path}.{field}"), "is more than 8388608");
            None
        }
    };
    if let Some(maglev) = &it.maglev {
        let size = maglev.table_size.filter(|size| *size != 0);
        let size = size.and_then(|size| bounded(size, "maglev.tableSize", found));
        let size = size.unwrap_or(TABLE_SIZE);
        if !is_prime(size) {
            found.error(
                format!("{path}.maglev.tableSize"),
                format!("{size} is no prime"),
            );
            return HashTable::Maglev(TABLE_SIZE);
        }
        return HashTable::Maglev(size);
    }
    let ring = it
        .ring_hash
        .as_ref()
        .and_then(|ring| ring.minimum_ring_size);
    let size = ring.or(it.minimum_ring_size).filter(|size| *size != 0);
    let size = size.and_then(|size| bounded(size, "ringHash.minimumRingSize", found));
    HashTable::Ring(size.unwrap_or(RING_SIZE))
}

fn is_prime(number: u32) -> bool {
    let number = u64::from(number);
    number > 1
        && (2..)
            .take_while(|d| d * d <= number)
            .all(|d| number % d != 0)
}

/// `localityLbSetting`.
pub(super) fn locality(
    it: &crd::LocalityLbSetting,
    path: &str,
    found: &mut Findings,
) -> Option<Locality> {
    let path = format!("{path}.localityLbSetting");
    if it.enabled == Some(false) {
        return Some(Locality::Off);
    }
    let ways = [
        !it.distribute.is_empty(),
        !it.failover.is_empty(),
        !it.failover_priority.is_empty(),
    ];
    let both = ways[0] && (ways[1] || ways[2]);
    if both {
        found.error(
            &path,
            "distribute cannot be combined with failover or failoverPriority",
        );
    }
    if ways[0] {
        let shares = it.distribute.iter().enumerate();
        return Some(Locality::Distribute(
            shares
                .map(|(index, it)| distribution(it, &format!("{path}.distribute[{index}]"), found))
                .collect(),
        ));
    }
    if ways[2] {
        let labels = it
            .failover_priority
            .iter()
            .map(|label| match label.split_once('=') {
                Some((label, value)) => (Str::from(label), Some(Str::from(value))),
                None => (Str::from(label.as_str()), None),
            });
        return Some(Locality::Priority(labels.collect()));
    }
    for (index, pair) in it.failover.iter().enumerate() {
        if pair.from.is_empty() || pair.from == pair.to || pair.from.contains(['/', '*']) {
            found.error(
                format!("{path}.failover[{index}]"),
                "names two regions that differ",
            );
        }
    }
    let pairs = it
        .failover
        .iter()
        .map(|pair| (pair.from.as_str().into(), pair.to.as_str().into()));
    (ways[1] || it.enabled == Some(true)).then(|| Locality::Failover(pairs.collect()))
}

fn distribution(it: &crd::Distribute, path: &str, found: &mut Findings) -> Distribution {
    let sum: u64 = it.to.values().map(|share| u64::from(*share)).sum();
    if sum != 100 {
        found.error(
            format!("{path}.to"),
            format!("the shares make {sum}, not 100"),
        );
    }
    Distribution {
        from: it.from.as_str().into(),
        to: it
            .to
            .iter()
            .map(|(to, share)| (to.as_str().into(), *share))
            .collect(),
    }
}

/// `warmup`, and the older form.
pub(super) fn warmup(
    it: &crd::LoadBalancerSettings,
    path: &str,
    found: &mut Findings,
) -> Option<Warmup> {
    let older = it.warmup_duration_secs.as_ref();
    let Some(warmup) = &it.warmup else {
        let duration = interval(older, &format!("{path}.warmupDurationSecs"), found)?;
        return Some(Warmup {
            duration,
            minimum_percent: 10,
            aggression_milli: 1000,
        });
    };
    if warmup.duration.is_none() {
        found.error(format!("{path}.warmup.duration"), "is missing");
    }
    let percent = warmup.minimum_percent.unwrap_or(10.0);
    if !(0.0..=100.0).contains(&percent) {
        found.error(
            format!("{path}.warmup.minimumPercent"),
            "is no percentage from 0 to 100",
        );
    }
    let aggression = warmup.aggression.unwrap_or(1.0);
    if !(1.0..=1000.0).contains(&aggression) {
        found.error(
            format!("{path}.warmup.aggression"),
            "is not between 1 and 1000",
        );
    }
    Some(Warmup {
        duration: interval(
            warmup.duration.as_ref(),
            &format!("{path}.warmup.duration"),
            found,
        )?,
        minimum_percent: whole(percent.clamp(0.0, 100.0)),
        aggression_milli: whole(aggression.clamp(1.0, 1000.0) * 1000.0),
    })
}
