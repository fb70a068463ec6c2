//! How services are reached.

use std::collections::BTreeMap;

use http::uri::Authority;
use proto::waypoint as wire;

use super::{
    InvalidResource, Result, by_port, full_pairs, header_name, labels, list, missing, optional,
    optional_duration, pairs, parsed, parsed_list, read, required_duration, small, statuses, text,
    wire_by_port, wire_duration, wire_full_pairs, wire_labels, wire_list, wire_optional,
    wire_pairs, wire_statuses, wire_text, wire_texts,
};
use crate::l7::backend::{
    BackendPolicy, BackendTls, Balancer, ClientCertificate, ConnectionPool, Distribution, HashKey,
    HashTable, Http2Keepalive, Locality, OutlierDetection, Pem, RetryBudget, SubjectAltName,
    Subset, TrafficPolicy, UpstreamVersion, Warmup,
};
use crate::{names::Str, wire::Problem};

impl TryFrom<&wire::BackendPolicy> for BackendPolicy {
    type Error = InvalidResource;

    fn try_from(wire: &wire::BackendPolicy) -> Result<Self> {
        let subset = |(name, it): (&String, _)| {
            let place = format!("subsets[{name}]");
            Ok((name.as_str().into(), read(&place, it)?))
        };
        Ok(Self {
            service: parsed("service", &wire.service)?,
            sources: parsed_list("sources", &wire.sources)?,
            policy: optional("policy", wire.policy.as_ref())?.unwrap_or_default(),
            ports: by_port("ports", &wire.ports)?,
            subsets: wire
                .subsets
                .iter()
                .map(subset)
                .collect::<Result<BTreeMap<_, _>>>()?,
        })
    }
}

impl From<&BackendPolicy> for wire::BackendPolicy {
    fn from(it: &BackendPolicy) -> Self {
        let subsets = it.subsets.iter();
        Self {
            service: it.service.to_string(),
            sources: wire_texts(&it.sources),
            policy: Some((&it.policy).into()),
            ports: wire_by_port(&it.ports),
            subsets: subsets
                .map(|(name, it)| (name.to_string(), it.into()))
                .collect(),
        }
    }
}

impl TryFrom<&wire::Subset> for Subset {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Subset) -> Result<Self> {
        Ok(Self {
            labels: labels(&wire.labels),
            policy: optional("policy", wire.policy.as_ref())?,
            ports: by_port("ports", &wire.ports)?,
        })
    }
}

impl From<&Subset> for wire::Subset {
    fn from(it: &Subset) -> Self {
        Self {
            labels: wire_labels(&it.labels),
            policy: wire_optional(it.policy.as_ref()),
            ports: wire_by_port(&it.ports),
        }
    }
}

/// A choice of endpoints that is not known takes its default; TLS that is not understood fails every connection.
impl TryFrom<&wire::TrafficPolicy> for TrafficPolicy {
    type Error = InvalidResource;

    fn try_from(wire: &wire::TrafficPolicy) -> Result<Self> {
        let proxy = wire.proxy_protocol.map(|it| small("proxy_protocol", it));
        Ok(Self {
            balancer: balancer(wire.balancer.as_ref())?,
            locality: wire.locality.as_ref().and_then(locality),
            warmup: optional("warmup", wire.warmup.as_ref())?,
            pool: optional("pool", wire.pool.as_ref())?.unwrap_or_default(),
            outlier: optional("outlier", wire.outlier.as_ref())?,
            tls: wire.tls.as_ref().map(tls),
            proxy_protocol: proxy.transpose()?.map(|it| if it == 1 { 1 } else { 2 }),
            forward_to: forward_to(wire.forward_to.as_deref())?,
            retry_budget: optional("retry_budget", wire.retry_budget.as_ref())?,
            session: optional("session", wire.session.as_ref())?,
        })
    }
}

impl From<&TrafficPolicy> for wire::TrafficPolicy {
    fn from(it: &TrafficPolicy) -> Self {
        let pool = (it.pool != ConnectionPool::default()).then(|| (&it.pool).into());
        Self {
            balancer: Some((&it.balancer).into()),
            locality: wire_optional(it.locality.as_ref()),
            warmup: wire_optional(it.warmup.as_ref()),
            pool,
            outlier: wire_optional(it.outlier.as_ref()),
            tls: wire_optional(it.tls.as_ref()),
            proxy_protocol: it.proxy_protocol.map(Into::into),
            forward_to: wire_text(it.forward_to.as_ref()),
            retry_budget: wire_optional(it.retry_budget.as_ref()),
            session: wire_optional(it.session.as_ref()),
        }
    }
}

/// A host and a port: it becomes a line of a request.
fn forward_to(wire: Option<&str>) -> Result<Option<Str>> {
    let read = |text: &str| {
        let authority: Option<Authority> = text.parse().ok();
        match authority.filter(|it| it.port_u16().is_some()) {
            Some(authority) => Ok(authority.as_str().into()),
            None => Err(InvalidResource::new(
                "forward_to",
                Problem::Authority(text.to_owned()),
            )),
        }
    };
    wire.map(read).transpose()
}

fn balancer(wire: Option<&wire::Balancer>) -> Result<Balancer> {
    use wire::balancer::Kind;
    Ok(match wire.and_then(|it| it.kind.as_ref()) {
        Some(Kind::LeastRequest(())) | None => Balancer::LeastRequest,
        Some(Kind::RoundRobin(())) => Balancer::RoundRobin,
        Some(Kind::Random(())) => Balancer::Random,
        Some(Kind::Passthrough(())) => Balancer::Passthrough,
        Some(Kind::ConsistentHash(it)) => consistent_hash(it)?,
    })
}

/// Without a key that is known there is nothing to hash, and any endpoint does.
fn consistent_hash(wire: &wire::ConsistentHash) -> Result<Balancer> {
    use wire::consistent_hash::{Key, Table};
    let key = match &wire.key {
        Some(Key::Header(it)) => HashKey::Header(header_name("balancer.header", it)?),
        Some(Key::Cookie(it)) => HashKey::Cookie {
            name: it.name.as_str().into(),
            path: text(it.path.as_ref()),
            ttl: optional_duration("balancer.cookie.ttl", it.ttl)?,
            attributes: pairs(&it.attributes),
        },
        Some(Key::SourceIp(())) => HashKey::SourceIp,
        Some(Key::Query(it)) => HashKey::Query(it.as_str().into()),
        None => return Ok(Balancer::Random),
    };
    let table = match wire.table {
        Some(Table::Ring(it)) => HashTable::Ring(it),
        Some(Table::Maglev(it)) => HashTable::Maglev(it),
        None => HashTable::Ring(1024),
    };
    Ok(Balancer::ConsistentHash { key, table })
}

impl From<&Balancer> for wire::Balancer {
    fn from(it: &Balancer) -> Self {
        use wire::balancer::Kind;
        let kind = match it {
            Balancer::LeastRequest => Kind::LeastRequest(()),
            Balancer::RoundRobin => Kind::RoundRobin(()),
            Balancer::Random => Kind::Random(()),
            Balancer::Passthrough => Kind::Passthrough(()),
            Balancer::ConsistentHash { key, table } => {
                Kind::ConsistentHash(wire_consistent_hash(key, *table))
            }
        };
        Self { kind: Some(kind) }
    }
}

fn wire_consistent_hash(key: &HashKey, table: HashTable) -> wire::ConsistentHash {
    use wire::consistent_hash::{Key, Table};
    let key = match key {
        HashKey::Header(it) => Key::Header(it.to_string()),
        HashKey::Cookie {
            name,
            path,
            ttl,
            attributes,
        } => Key::Cookie(wire::HashCookie {
            name: name.to_string(),
            path: wire_text(path.as_ref()),
            ttl: ttl.map(wire_duration),
            attributes: wire_pairs(attributes),
        }),
        HashKey::SourceIp => Key::SourceIp(()),
        HashKey::Query(it) => Key::Query(it.to_string()),
    };
    let table = match table {
        HashTable::Ring(it) => Table::Ring(it),
        HashTable::Maglev(it) => Table::Maglev(it),
    };
    wire::ConsistentHash {
        key: Some(key),
        table: Some(table),
    }
}

/// None: not known.
fn locality(wire: &wire::Locality) -> Option<Locality> {
    use wire::locality::Kind;
    let distribution = |it: &wire::Distribution| Distribution {
        from: it.from.as_str().into(),
        to: it
            .to
            .iter()
            .map(|it| (it.locality.as_str().into(), it.percent))
            .collect(),
    };
    Some(match wire.kind.as_ref()? {
        Kind::Off(()) => Locality::Off,
        Kind::Failover(it) => Locality::Failover(full_pairs(&it.regions)),
        Kind::Priority(it) => Locality::Priority(pairs(&it.labels)),
        Kind::Distribute(it) => {
            Locality::Distribute(it.distributions.iter().map(distribution).collect())
        }
    })
}

impl From<&Locality> for wire::Locality {
    fn from(it: &Locality) -> Self {
        use wire::locality::Kind;
        let kind = match it {
            Locality::Off => Kind::Off(()),
            Locality::Failover(it) => Kind::Failover(wire::Failover {
                regions: wire_full_pairs(it),
            }),
            Locality::Priority(it) => Kind::Priority(wire::Priority {
                labels: wire_pairs(it),
            }),
            Locality::Distribute(it) => Kind::Distribute(wire::Distribute {
                distributions: wire_list(it),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl From<&Distribution> for wire::Distribution {
    fn from(it: &Distribution) -> Self {
        let shares = it.to.iter().map(|(locality, percent)| wire::Share {
            locality: locality.to_string(),
            percent: *percent,
        });
        Self {
            from: it.from.to_string(),
            to: shares.collect(),
        }
    }
}

impl TryFrom<&wire::Warmup> for Warmup {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Warmup) -> Result<Self> {
        Ok(Self {
            duration: required_duration("duration", wire.duration)?,
            minimum_percent: wire.minimum_percent,
            aggression_milli: wire.aggression_milli,
        })
    }
}

impl From<&Warmup> for wire::Warmup {
    fn from(it: &Warmup) -> Self {
        Self {
            duration: Some(wire_duration(it.duration)),
            minimum_percent: it.minimum_percent,
            aggression_milli: it.aggression_milli,
        }
    }
}

impl TryFrom<&wire::ConnectionPool> for ConnectionPool {
    type Error = InvalidResource;

    fn try_from(wire: &wire::ConnectionPool) -> Result<Self> {
        let keepalive = |it: &wire::Keepalive| {
            let time = optional_duration("keepalive.time", it.time)?;
            let interval = optional_duration("keepalive.interval", it.interval)?;
            Ok((it.probes, time, interval))
        };
        Ok(Self {
            max_connections: wire.max_connections,
            connect_timeout: optional_duration("connect_timeout", wire.connect_timeout)?,
            keepalive: wire.keepalive.as_ref().map(keepalive).transpose()?,
            max_connection_duration: optional_duration(
                "max_connection_duration",
                wire.max_connection_duration,
            )?,
            tcp_idle_timeout: optional_duration("tcp_idle_timeout", wire.tcp_idle_timeout)?,
            max_pending_requests: wire.max_pending_requests,
            max_requests: wire.max_requests,
            max_requests_per_connection: wire.max_requests_per_connection,
            max_retries: wire.max_retries,
            http_idle_timeout: optional_duration("http_idle_timeout", wire.http_idle_timeout)?,
            http_version: version(wire.http_version),
            max_concurrent_streams: wire.max_concurrent_streams,
            http2_keepalive: optional("http2_keepalive", wire.http2_keepalive.as_ref())?,
        })
    }
}

fn version(number: i32) -> UpstreamVersion {
    match wire::UpstreamVersion::try_from(number).unwrap_or_default() {
        wire::UpstreamVersion::Declared => UpstreamVersion::Declared,
        wire::UpstreamVersion::Upgraded => UpstreamVersion::Http2,
        wire::UpstreamVersion::Client => UpstreamVersion::Client,
    }
}

impl From<&ConnectionPool> for wire::ConnectionPool {
    fn from(it: &ConnectionPool) -> Self {
        let keepalive = it
            .keepalive
            .map(|(probes, time, interval)| wire::Keepalive {
                probes,
                time: time.map(wire_duration),
                interval: interval.map(wire_duration),
            });
        let version = match it.http_version {
            UpstreamVersion::Declared => wire::UpstreamVersion::Declared,
            UpstreamVersion::Http2 => wire::UpstreamVersion::Upgraded,
            UpstreamVersion::Client => wire::UpstreamVersion::Client,
        };
        Self {
            max_connections: it.max_connections,
            connect_timeout: it.connect_timeout.map(wire_duration),
            keepalive,
            max_connection_duration: it.max_connection_duration.map(wire_duration),
            tcp_idle_timeout: it.tcp_idle_timeout.map(wire_duration),
            max_pending_requests: it.max_pending_requests,
            max_requests: it.max_requests,
            max_requests_per_connection: it.max_requests_per_connection,
            max_retries: it.max_retries,
            http_idle_timeout: it.http_idle_timeout.map(wire_duration),
            http_version: version.into(),
            max_concurrent_streams: it.max_concurrent_streams,
            http2_keepalive: wire_optional(it.http2_keepalive.as_ref()),
        }
    }
}

impl TryFrom<&wire::Http2Keepalive> for Http2Keepalive {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Http2Keepalive) -> Result<Self> {
        Ok(Self {
            interval: required_duration("interval", wire.interval)?,
            timeout: required_duration("timeout", wire.timeout)?,
        })
    }
}

impl From<&Http2Keepalive> for wire::Http2Keepalive {
    fn from(it: &Http2Keepalive) -> Self {
        Self {
            interval: Some(wire_duration(it.interval)),
            timeout: Some(wire_duration(it.timeout)),
        }
    }
}

impl TryFrom<&wire::OutlierDetection> for OutlierDetection {
    type Error = InvalidResource;

    fn try_from(wire: &wire::OutlierDetection) -> Result<Self> {
        Ok(Self {
            consecutive_5xx: wire.consecutive_5xx,
            consecutive_gateway_errors: wire.consecutive_gateway_errors,
            consecutive_local_failures: wire.consecutive_local_failures,
            interval: required_duration("interval", wire.interval)?,
            base_ejection_time: required_duration("base_ejection_time", wire.base_ejection_time)?,
            max_ejection_percent: wire.max_ejection_percent,
            min_health_percent: wire.min_health_percent,
            error_codes: statuses("error_codes", &wire.error_codes)?,
        })
    }
}

impl From<&OutlierDetection> for wire::OutlierDetection {
    fn from(it: &OutlierDetection) -> Self {
        Self {
            consecutive_5xx: it.consecutive_5xx,
            consecutive_gateway_errors: it.consecutive_gateway_errors,
            consecutive_local_failures: it.consecutive_local_failures,
            interval: Some(wire_duration(it.interval)),
            base_ejection_time: Some(wire_duration(it.base_ejection_time)),
            max_ejection_percent: it.max_ejection_percent,
            min_health_percent: it.min_health_percent,
            error_codes: wire_statuses(&it.error_codes),
        }
    }
}

fn tls(wire: &wire::BackendTls) -> BackendTls {
    use wire::backend_tls::Kind;
    match &wire.kind {
        Some(Kind::Verify(it)) => verified(it)
            .unwrap_or_else(|fault| BackendTls::Invalid(fault.within("tls").to_string().into())),
        Some(Kind::Insecure(it)) => BackendTls::Insecure {
            sni: text(it.sni.as_ref()),
            client: it.client.as_ref().map(certificate),
        },
        Some(Kind::Invalid(it)) => BackendTls::Invalid(it.as_str().into()),
        None => BackendTls::Invalid(missing("tls.kind").to_string().into()),
    }
}

fn verified(wire: &wire::VerifiedTls) -> Result<BackendTls> {
    Ok(BackendTls::Verify {
        sni: text(wire.sni.as_ref()),
        roots: pem(wire.roots.as_ref(), wire.roots_file.as_ref()),
        revoked: pem(wire.revoked.as_ref(), wire.revoked_file.as_ref()),
        subject_alt_names: list("subject_alt_names", &wire.subject_alt_names)?,
        client: wire.client.as_ref().map(certificate),
    })
}

fn certificate(wire: &wire::ClientCertificate) -> ClientCertificate {
    let given = |inline: &Vec<u8>, file: Option<&String>| {
        let file = file.map(|path| Pem::File(path.as_str().into()));
        file.unwrap_or_else(|| Pem::Inline(inline.clone()))
    };
    ClientCertificate {
        chain: given(&wire.chain, wire.chain_file.as_ref()),
        key: given(&wire.key, wire.key_file.as_ref()),
    }
}

fn pem(inline: Option<&Vec<u8>>, file: Option<&String>) -> Option<Pem> {
    let file = file.map(|path| Pem::File(path.as_str().into()));
    file.or_else(|| inline.map(|pem| Pem::Inline(pem.clone())))
}

fn inline(pem: Option<&Pem>) -> Option<Vec<u8>> {
    match pem? {
        Pem::Inline(pem) => Some(pem.clone()),
        Pem::File(_) => None,
    }
}

fn file(pem: Option<&Pem>) -> Option<String> {
    match pem? {
        Pem::Inline(_) => None,
        Pem::File(path) => Some(path.to_string()),
    }
}

impl From<&ClientCertificate> for wire::ClientCertificate {
    fn from(it: &ClientCertificate) -> Self {
        Self {
            chain: inline(Some(&it.chain)).unwrap_or_default(),
            key: inline(Some(&it.key)).unwrap_or_default(),
            chain_file: file(Some(&it.chain)),
            key_file: file(Some(&it.key)),
        }
    }
}

impl From<&BackendTls> for wire::BackendTls {
    fn from(it: &BackendTls) -> Self {
        use wire::backend_tls::Kind;
        let kind = match it {
            BackendTls::Verify {
                sni,
                roots,
                revoked,
                subject_alt_names,
                client,
            } => Kind::Verify(wire::VerifiedTls {
                sni: wire_text(sni.as_ref()),
                roots: inline(roots.as_ref()),
                roots_file: file(roots.as_ref()),
                revoked: inline(revoked.as_ref()),
                revoked_file: file(revoked.as_ref()),
                subject_alt_names: wire_list(subject_alt_names),
                client: wire_optional(client.as_ref()),
            }),
            BackendTls::Insecure { sni, client } => Kind::Insecure(wire::UnverifiedTls {
                sni: wire_text(sni.as_ref()),
                client: wire_optional(client.as_ref()),
            }),
            BackendTls::Invalid(it) => Kind::Invalid(it.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::SubjectAltName> for SubjectAltName {
    type Error = InvalidResource;

    fn try_from(wire: &wire::SubjectAltName) -> Result<Self> {
        use wire::subject_alt_name::Kind;
        match &wire.kind {
            Some(Kind::Hostname(it)) => Ok(Self::Hostname(it.as_str().into())),
            Some(Kind::Uri(it)) => Ok(Self::Uri(it.as_str().into())),
            None => Err(missing("kind")),
        }
    }
}

impl From<&SubjectAltName> for wire::SubjectAltName {
    fn from(it: &SubjectAltName) -> Self {
        use wire::subject_alt_name::Kind;
        let kind = match it {
            SubjectAltName::Hostname(it) => Kind::Hostname(it.to_string()),
            SubjectAltName::Uri(it) => Kind::Uri(it.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::RetryBudget> for RetryBudget {
    type Error = InvalidResource;

    fn try_from(wire: &wire::RetryBudget) -> Result<Self> {
        Ok(Self {
            percent: wire.percent,
            interval: required_duration("interval", wire.interval)?,
            min_retries: wire.min_retries,
        })
    }
}

impl From<&RetryBudget> for wire::RetryBudget {
    fn from(it: &RetryBudget) -> Self {
        Self {
            percent: it.percent,
            interval: Some(wire_duration(it.interval)),
            min_retries: it.min_retries,
        }
    }
}
