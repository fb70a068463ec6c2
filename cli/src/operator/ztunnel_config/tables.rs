//! The tables of `ztunnel-config`: columns and words are istioctl's.

use std::collections::HashMap;

use anyhow::Result;
use serde_json::Value;
use time::OffsetDateTime;

use super::dump::{
    Certificate, Certificates, Connection, Dump, Gateway, PodInfo, Policy, Service, Workload,
};

/// What is asked for, as people and as programs get it.
pub(crate) struct Listing {
    /// The heading first.
    pub rows: Vec<Vec<String>>,
    /// The same items as they were read.
    pub json: Value,
}

fn heading(columns: &[&str]) -> Vec<Vec<String>> {
    vec![columns.iter().map(|it| (*it).to_owned()).collect()]
}

/// Which workloads.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkloadFilter {
    /// One of its addresses.
    pub address: Option<String>,
    pub namespace: Option<String>,
    pub node: Option<String>,
    /// A pod, by `(name, namespace)`.
    pub pod: Option<(String, String)>,
}

impl WorkloadFilter {
    fn keeps(&self, it: &Workload) -> bool {
        let pod = self.pod.as_ref();
        self.address
            .as_ref()
            .is_none_or(|address| it.workload_ips.contains(address))
            && self
                .namespace
                .as_ref()
                .is_none_or(|wanted| it.namespace == *wanted)
            && self.node.as_ref().is_none_or(|wanted| it.node == *wanted)
            && pod.is_none_or(|(name, namespace)| it.name == *name && it.namespace == *namespace)
    }
}

/// Workloads, by namespace, name and address.
pub(crate) fn workloads(dump: &Dump, filter: &WorkloadFilter) -> Result<Listing> {
    let mut kept = dump.items::<Workload>("workloads")?;
    let waypoints = Waypoints::of(dump)?;
    kept.retain(|(_, it)| filter.keeps(it));
    let key = |it: &Workload| {
        (
            it.namespace.clone(),
            it.name.clone(),
            it.workload_ips.clone(),
        )
    };
    kept.sort_by_key(|(_, it)| key(it));
    let mut rows = heading(&[
        "NAMESPACE",
        "POD NAME",
        "ADDRESS",
        "NODE",
        "WAYPOINT",
        "PROTOCOL",
    ]);
    rows.extend(kept.iter().map(|(_, it)| {
        vec![
            it.namespace.clone(),
            it.name.clone(),
            address_of(it),
            it.node.clone(),
            waypoints.name(it.waypoint.as_ref()),
            it.protocol.clone(),
        ]
    }));
    Ok(listing(rows, kept))
}

fn listing<T>(rows: Vec<Vec<String>>, kept: Vec<(Value, T)>) -> Listing {
    Listing {
        rows,
        json: kept.into_iter().map(|(value, _)| value).collect(),
    }
}

fn address_of(workload: &Workload) -> String {
    if workload.workload_ips.is_empty() {
        return workload.hostname.clone();
    }
    workload.workload_ips.join(",")
}

/// The names of what waypoint references lead to.
struct Waypoints(HashMap<String, String>);

impl Waypoints {
    fn of(dump: &Dump) -> Result<Self> {
        let mut names = HashMap::new();
        for (_, service) in dump.items::<Service>("services")? {
            let key = format!("{}/{}", service.namespace, service.hostname);
            for reference in service.vips.iter().chain([&key]) {
                names.insert(reference.clone(), service.name.clone());
            }
        }
        Ok(Self(names))
    }

    fn name(&self, waypoint: Option<&Gateway>) -> String {
        let Some(waypoint) = waypoint else {
            return "None".to_owned();
        };
        let known = self.0.get(&waypoint.destination);
        known.map_or_else(|| "NA".to_owned(), Clone::clone)
    }
}

/// Services, by namespace, name and address.
pub(crate) fn services(dump: &Dump, namespace: Option<&str>) -> Result<Listing> {
    let mut kept = dump.items::<Service>("services")?;
    let waypoints = Waypoints::of(dump)?;
    kept.retain(|(_, it)| namespace.is_none_or(|wanted| it.namespace == wanted));
    kept.sort_by_key(|(_, it)| (it.namespace.clone(), it.name.clone(), it.hostname.clone()));
    let mut rows = heading(&[
        "NAMESPACE",
        "SERVICE NAME",
        "SERVICE VIP",
        "WAYPOINT",
        "ENDPOINTS",
    ]);
    rows.extend(kept.iter().map(|(_, it)| {
        vec![
            it.namespace.clone(),
            it.name.clone(),
            vips(it),
            waypoints.name(it.waypoint.as_ref()),
            endpoints(it),
        ]
    }));
    Ok(listing(rows, kept))
}

/// `network/ip` without the network.
fn vips(service: &Service) -> String {
    let exact = service
        .vips
        .iter()
        .map(|it| it.split_once('/').map_or(&**it, |(_, ip)| ip));
    let ranges = service.cidr_vips.iter().map(|it| &*it.cidr);
    exact.chain(ranges).collect::<Vec<_>>().join(",")
}

fn endpoints(service: &Service) -> String {
    let unhealthy = |it: &&super::dump::Endpoint| it.status.as_deref() == Some("Unhealthy");
    let all = service.endpoints.len();
    let healthy = all - service.endpoints.values().filter(unhealthy).count();
    format!("{healthy}/{all}")
}

/// Policies, by namespace and name.
pub(crate) fn policies(dump: &Dump, namespace: Option<&str>) -> Result<Listing> {
    let mut kept = dump.items::<Policy>("policies")?;
    kept.retain(|(_, it)| namespace.is_none_or(|wanted| it.namespace == wanted));
    kept.sort_by_key(|(_, it)| (it.namespace.clone(), it.name.clone()));
    let mut rows = heading(&["NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"]);
    rows.extend(kept.iter().map(|(_, it)| {
        [&it.namespace, &it.name, &it.action, &it.scope]
            .map(Clone::clone)
            .to_vec()
    }));
    Ok(listing(rows, kept))
}

/// Certificates, by identity: the leaf, what signed it, and the roots.
pub(crate) fn certificates(dump: &Dump, now: OffsetDateTime) -> Result<Listing> {
    let mut kept = dump.items::<Certificates>("certificates")?;
    kept.sort_by_key(|(_, it)| it.identity.clone());
    let mut rows = heading(&[
        "CERTIFICATE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ]);
    for (_, it) in &kept {
        let status = it.state.split(':').next().unwrap_or_default();
        if it.cert_chain.is_empty() && it.root_certs.is_empty() {
            let nothing = Certificate::default();
            rows.push(certificate(&it.identity, "Leaf", status, &nothing, now));
        }
        for (at, certified) in it.cert_chain.iter().enumerate() {
            let kind = if at == 0 { "Leaf" } else { "Intermediate" };
            rows.push(certificate(&it.identity, kind, status, certified, now));
        }
        for root in &it.root_certs {
            rows.push(certificate(&it.identity, "Root", status, root, now));
        }
    }
    Ok(listing(rows, kept))
}

fn certificate(
    identity: &str,
    kind: &str,
    status: &str,
    it: &Certificate,
    now: OffsetDateTime,
) -> Vec<String> {
    let valid = match (instant(&it.valid_from), instant(&it.expiration_time)) {
        (Some(from), Some(to)) => from <= now && now < to,
        _ => false,
    };
    vec![
        identity.to_owned(),
        kind.to_owned(),
        status.to_owned(),
        valid.to_string(),
        it.serial_number.clone(),
        it.expiration_time.clone(),
        it.valid_from.clone(),
    ]
}

pub(crate) fn instant(text: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()
}

/// Which connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConnectionFilter {
    pub inbound: bool,
    pub outbound: bool,
    pub namespace: Option<String>,
    /// A pod, by `(name, namespace)`.
    pub pod: Option<(String, String)>,
    /// Addresses and not names.
    pub raw: bool,
}

impl ConnectionFilter {
    fn keeps(&self, it: &PodInfo) -> bool {
        let pod = self.pod.as_ref();
        self.namespace
            .as_ref()
            .is_none_or(|wanted| it.namespace == *wanted)
            && pod.is_none_or(|(name, namespace)| it.name == *name && it.namespace == *namespace)
    }
}

/// Open connections, by pod and direction.
pub(crate) fn connections(dump: &Dump, filter: &ConnectionFilter) -> Result<Listing> {
    let names = match filter.raw {
        true => HashMap::new(),
        false => names(dump)?,
    };
    let mut rows = heading(&[
        "WORKLOAD",
        "DIRECTION",
        "LOCAL",
        "REMOTE",
        "REMOTE TARGET",
        "PROTOCOL",
    ]);
    let mut json = serde_json::Map::new();
    for (uid, pod) in dump.pods()? {
        let info = pod.info.clone().unwrap_or_default();
        if !filter.keeps(&info) {
            continue;
        }
        json.insert(uid.clone(), dump.0["workloadState"][&uid].clone());
        let workload = format!("{}.{}", info.name, info.namespace);
        let inbound = pod.connections.inbound.iter().filter(|_| filter.inbound);
        let outbound = pod.connections.outbound.iter().filter(|_| filter.outbound);
        let inbound = inbound.map(|it| inbound_row(&workload, it, &names));
        let outbound = outbound.map(|it| outbound_row(&workload, it, &names));
        let mut own: Vec<_> = inbound.chain(outbound).collect();
        own.sort();
        rows.extend(own);
    }
    rows[1..].sort();
    Ok(Listing {
        rows,
        json: Value::Object(json),
    })
}

fn inbound_row(pod: &str, it: &Connection, names: &HashMap<String, String>) -> Vec<String> {
    vec![
        pod.to_owned(),
        "Inbound".to_owned(),
        named(&it.actual_dst, names),
        named(&it.src, names),
        it.original_dst.clone().unwrap_or_default(),
        it.protocol.clone(),
    ]
}

fn outbound_row(pod: &str, it: &Connection, names: &HashMap<String, String>) -> Vec<String> {
    let target = it.original_dst.as_deref().unwrap_or_default();
    vec![
        pod.to_owned(),
        "Outbound".to_owned(),
        named(&it.src, names),
        named(&it.actual_dst, names),
        named(target, names),
        it.protocol.clone(),
    ]
}

/// What addresses belong to: `pod.namespace` and services' host names.
fn names(dump: &Dump) -> Result<HashMap<String, String>> {
    let mut names = HashMap::new();
    for (_, it) in dump.items::<Service>("services")? {
        for vip in &it.vips {
            let ip = vip.split_once('/').map_or(&**vip, |(_, ip)| ip);
            names.insert(ip.to_owned(), it.hostname.clone());
        }
    }
    for (_, it) in dump.items::<Workload>("workloads")? {
        for ip in it.workload_ips {
            names.insert(ip, format!("{}.{}", it.name, it.namespace));
        }
    }
    Ok(names)
}

/// An address with its name in place of the IP.
fn named(address: &str, names: &HashMap<String, String>) -> String {
    let Some((ip, port)) = address.rsplit_once(':') else {
        return address.to_owned();
    };
    let ip = ip.trim_start_matches('[').trim_end_matches(']');
    match names.get(ip) {
        Some(name) => format!("{name}:{port}"),
        None => address.to_owned(),
    }
}
