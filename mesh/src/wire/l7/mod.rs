//! `leyline.waypoint.v1`: what a waypoint is told of requests.
//!
//! What cannot be understood takes the closed side, each in its own small place: a rule of a route answers 500, a
//! backend's share is answered 500, TLS to a backend fails, an ALLOW rule never matches, a DENY or CUSTOM rule always
//! does, an issuer's tokens are refused. Only a resource without a usable key, or whose place is not known, is
//! rejected as a whole.

use std::{collections::BTreeMap, str::FromStr, time::Duration};

use http::{HeaderName, StatusCode};
use ipnet::IpNet;
use proto::waypoint as wire;

use super::{InvalidResource, Problem, port};
use crate::{
    l7::{
        name::Target,
        pattern::Pattern,
        route::TextMatch,
        served::{AppProtocol, Resolution, ServedService, ServedWorkload, WorkloadLabels},
        view::Resource,
    },
    names::{NamespacedHostname, Str, WorkloadUid},
};

mod backend;
mod config;
mod filter;
mod policy;
mod route;
#[cfg(test)]
mod tests;
mod told;

type Result<T> = std::result::Result<T, InvalidResource>;

impl TryFrom<wire::Resource> for Resource {
    type Error = InvalidResource;

    fn try_from(wire: wire::Resource) -> Result<Self> {
        use wire::resource::Kind;
        match &wire.kind {
            Some(Kind::Config(it)) => read("config", it).map(Self::Config),
            Some(Kind::Service(it)) => read("service", it).map(Self::Service),
            Some(Kind::Workload(it)) => read("workload", it).map(Self::Workload),
            Some(Kind::Labels(it)) => read("labels", it).map(Self::Labels),
            Some(Kind::Route(it)) => read("route", it).map(Self::Route),
            Some(Kind::Backend(it)) => read("backend", it).map(|it| Self::Backend(Box::new(it))),
            Some(Kind::Policy(it)) => read("policy", it).map(Self::Policy),
            Some(Kind::Authentication(it)) => read("authentication", it).map(Self::Authentication),
            Some(Kind::Telemetry(it)) => read("telemetry", it).map(Self::Telemetry),
            None => Err(missing("kind")),
        }
    }
}

impl From<&Resource> for wire::Resource {
    fn from(resource: &Resource) -> Self {
        use wire::resource::Kind;
        let kind = match resource {
            Resource::Config(it) => Kind::Config(it.into()),
            Resource::Service(it) => Kind::Service(it.into()),
            Resource::Workload(it) => Kind::Workload(it.into()),
            Resource::Labels(it) => Kind::Labels(it.into()),
            Resource::Route(it) => Kind::Route(it.into()),
            Resource::Backend(it) => Kind::Backend((&**it).into()),
            Resource::Policy(it) => Kind::Policy(it.into()),
            Resource::Authentication(it) => Kind::Authentication(it.into()),
            Resource::Telemetry(it) => Kind::Telemetry(it.into()),
        };
        Self { kind: Some(kind) }
    }
}

fn missing(field: &str) -> InvalidResource {
    InvalidResource::new(field, Problem::Missing)
}

/// A message, with its field named in what is wrong with it.
fn read<'a, W, T>(field: &str, wire: &'a W) -> Result<T>
where
    T: TryFrom<&'a W, Error = InvalidResource>,
{
    T::try_from(wire).map_err(|it| it.within(field))
}

fn optional<'a, W, T>(field: &str, wire: Option<&'a W>) -> Result<Option<T>>
where
    T: TryFrom<&'a W, Error = InvalidResource>,
{
    wire.map(|it| read(field, it)).transpose()
}

fn required<'a, W, T>(field: &str, wire: Option<&'a W>) -> Result<T>
where
    T: TryFrom<&'a W, Error = InvalidResource>,
{
    optional(field, wire)?.ok_or_else(|| missing(field))
}

fn list<'a, W, T>(field: &str, wire: &'a [W]) -> Result<Vec<T>>
where
    T: TryFrom<&'a W, Error = InvalidResource>,
{
    let items = wire.iter().enumerate();
    exactly(items.map(|(at, it)| read(&format!("{field}[{at}]"), it)))
}

/// A list without room to spare: what a waypoint knows stays, and the usual list has one entry or none.
fn exactly<T>(items: impl ExactSizeIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let mut list = Vec::with_capacity(items.len());
    for item in items {
        list.push(item?);
    }
    Ok(list)
}

fn parsed<T: FromStr>(field: &str, text: &str) -> Result<T>
where
    Problem: From<T::Err>,
{
    text.parse()
        .map_err(|error: T::Err| InvalidResource::new(field, error))
}

fn parsed_list<T: FromStr>(field: &str, texts: &[String]) -> Result<Vec<T>>
where
    Problem: From<T::Err>,
{
    let items = texts.iter().enumerate();
    exactly(items.map(|(at, it)| parsed(&format!("{field}[{at}]"), it)))
}

fn header_name(field: &str, text: &str) -> Result<HeaderName> {
    HeaderName::from_str(text)
        .map_err(|_| InvalidResource::new(field, Problem::HeaderName(text.to_owned())))
}

fn status(field: &str, number: u32) -> Result<StatusCode> {
    let code = u16::try_from(number).ok();
    code.and_then(|code| StatusCode::from_u16(code).ok())
        .ok_or_else(|| InvalidResource::new(field, Problem::Status(number)))
}

fn statuses(field: &str, numbers: &[u32]) -> Result<Vec<StatusCode>> {
    numbers.iter().map(|it| status(field, *it)).collect()
}

fn small(field: &str, number: u32) -> Result<u16> {
    port(number).map_err(|problem| InvalidResource::new(field, problem))
}

fn optional_port(wire: Option<u32>) -> Result<Option<u16>> {
    wire.map(|it| small("port", it)).transpose()
}

/// A range without host bits. An IPv4-mapped one becomes IPv4.
fn range(field: &str, text: &str) -> Result<IpNet> {
    let net: Option<IpNet> = text.parse().ok();
    let canonical = net.and_then(|net| match (net, net.addr().to_canonical()) {
        (IpNet::V6(_), address @ std::net::IpAddr::V4(_)) => {
            IpNet::new(address, net.prefix_len().checked_sub(96)?).ok()
        }
        _ => Some(net),
    });
    canonical
        .map(|net| net.trunc())
        .ok_or_else(|| InvalidResource::new(field, Problem::Range(text.to_owned())))
}

fn ranges(field: &str, texts: &[String]) -> Result<Vec<IpNet>> {
    texts.iter().map(|it| range(field, it)).collect()
}

/// Negative and out of range: told.
fn duration(field: &str, wire: prost_types::Duration) -> Result<Duration> {
    wire.try_into()
        .map_err(|_| InvalidResource::new(field, Problem::Duration))
}

fn optional_duration(field: &str, wire: Option<prost_types::Duration>) -> Result<Option<Duration>> {
    wire.map(|it| duration(field, it)).transpose()
}

fn required_duration(field: &str, wire: Option<prost_types::Duration>) -> Result<Duration> {
    optional_duration(field, wire)?.ok_or_else(|| missing(field))
}

fn pattern(field: &str, text: &str) -> Result<Pattern> {
    Pattern::new(text).map_err(|error| InvalidResource::new(field, error))
}

fn texts(wire: &[String]) -> Vec<Str> {
    wire.iter().map(|it| it.as_str().into()).collect()
}

fn text(wire: Option<&String>) -> Option<Str> {
    wire.map(|it| it.as_str().into())
}

fn pairs(wire: &[wire::Pair]) -> Vec<(Str, Option<Str>)> {
    wire.iter().map(pair).collect()
}

fn pair(wire: &wire::Pair) -> (Str, Option<Str>) {
    (wire.key.as_str().into(), text(wire.value.as_ref()))
}

/// Pairs whose value is always there.
fn full_pairs(wire: &[wire::Pair]) -> Vec<(Str, Str)> {
    let full = |it: &wire::Pair| {
        let value = it.value.as_deref().unwrap_or_default();
        (it.key.as_str().into(), value.into())
    };
    wire.iter().map(full).collect()
}

fn by_port<'a, W, T>(field: &str, wire: &'a BTreeMap<u32, W>) -> Result<BTreeMap<u16, T>>
where
    T: TryFrom<&'a W, Error = InvalidResource>,
{
    let entry = |(key, value): (&u32, &'a W)| {
        let field = format!("{field}[{key}]");
        Ok((small(&field, *key)?, read(&field, value)?))
    };
    wire.iter().map(entry).collect()
}

// And back.

fn wire_list<'a, T, W: From<&'a T>>(items: &'a [T]) -> Vec<W> {
    items.iter().map(W::from).collect()
}

fn wire_optional<'a, T, W: From<&'a T>>(item: Option<&'a T>) -> Option<W> {
    item.map(W::from)
}

fn wire_texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

fn wire_text(item: Option<&Str>) -> Option<String> {
    item.map(ToString::to_string)
}

/// Longer than the wire can tell: its longest.
fn wire_duration(time: Duration) -> prost_types::Duration {
    time.try_into().unwrap_or(prost_types::Duration {
        seconds: i64::MAX,
        nanos: 0,
    })
}

fn wire_pairs<K: ToString, V: ToString>(items: &[(K, Option<V>)]) -> Vec<wire::Pair> {
    let pairs = items.iter().map(|(key, value)| wire::Pair {
        key: key.to_string(),
        value: value.as_ref().map(ToString::to_string),
    });
    pairs.collect()
}

fn wire_full_pairs<K: ToString, V: ToString>(items: &[(K, V)]) -> Vec<wire::Pair> {
    let pairs = items.iter().map(|(key, value)| wire::Pair {
        key: key.to_string(),
        value: Some(value.to_string()),
    });
    pairs.collect()
}

fn wire_by_port<'a, T, W: From<&'a T>>(items: &'a BTreeMap<u16, T>) -> BTreeMap<u32, W> {
    let entries = items
        .iter()
        .map(|(key, value)| (u32::from(*key), value.into()));
    entries.collect()
}

fn wire_statuses(items: &[StatusCode]) -> Vec<u32> {
    items.iter().map(|it| it.as_u16().into()).collect()
}

impl TryFrom<&wire::Target> for Target {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Target) -> Result<Self> {
        use wire::target::Kind;
        match &wire.kind {
            Some(Kind::Waypoint(())) => Ok(Self::Waypoint),
            Some(Kind::Service(key)) => parsed("service", key).map(Self::Service),
            None => Err(missing("kind")),
        }
    }
}

impl From<&Target> for wire::Target {
    fn from(target: &Target) -> Self {
        use wire::target::Kind;
        let kind = match target {
            Target::Waypoint => Kind::Waypoint(()),
            Target::Service(key) => Kind::Service(key.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::TextMatch> for TextMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::TextMatch) -> Result<Self> {
        use wire::text_match::Kind;
        match &wire.kind {
            Some(Kind::Exact(it)) => Ok(Self::Exact(it.as_str().into())),
            Some(Kind::Prefix(it)) => Ok(Self::Prefix(it.as_str().into())),
            Some(Kind::Regex(it)) => pattern("regex", it).map(Self::Regex),
            Some(Kind::Present(())) => Ok(Self::Present),
            None => Err(missing("kind")),
        }
    }
}

impl From<&TextMatch> for wire::TextMatch {
    fn from(value: &TextMatch) -> Self {
        use wire::text_match::Kind;
        let kind = match value {
            TextMatch::Exact(it) => Kind::Exact(it.to_string()),
            TextMatch::Prefix(it) => Kind::Prefix(it.to_string()),
            TextMatch::Regex(it) => Kind::Regex(it.source().to_owned()),
            TextMatch::Present => Kind::Present(()),
        };
        Self { kind: Some(kind) }
    }
}

/// A protocol that is not known is sniffed; a resolution that is not known is by what the mesh view has.
impl TryFrom<&wire::Service> for ServedService {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Service) -> Result<Self> {
        let port = |(number, protocol): (&u32, &i32)| {
            let field = format!("ports[{number}]");
            Ok((small(&field, *number)?, app_protocol(*protocol)))
        };
        Ok(Self {
            service: parsed("service", &wire.service)?,
            bound: wire.bound,
            ports: wire.ports.iter().map(port).collect::<Result<_>>()?,
            resolution: resolution(wire.resolution),
            external: wire.external,
        })
    }
}

fn app_protocol(number: i32) -> AppProtocol {
    use wire::AppProtocol as Wire;
    match Wire::try_from(number).unwrap_or_default() {
        Wire::Unknown => AppProtocol::Unknown,
        Wire::Http => AppProtocol::Http,
        Wire::Http2 => AppProtocol::Http2,
        Wire::Grpc => AppProtocol::Grpc,
        Wire::GrpcWeb => AppProtocol::GrpcWeb,
        Wire::Tls => AppProtocol::Tls,
        Wire::Tcp => AppProtocol::Tcp,
    }
}

fn wire_app_protocol(protocol: AppProtocol) -> wire::AppProtocol {
    use wire::AppProtocol as Wire;
    match protocol {
        AppProtocol::Unknown => Wire::Unknown,
        AppProtocol::Http => Wire::Http,
        AppProtocol::Http2 => Wire::Http2,
        AppProtocol::Grpc => Wire::Grpc,
        AppProtocol::GrpcWeb => Wire::GrpcWeb,
        AppProtocol::Tls => Wire::Tls,
        AppProtocol::Tcp => Wire::Tcp,
    }
}

fn resolution(number: i32) -> Resolution {
    use wire::Resolution as Wire;
    match Wire::try_from(number).unwrap_or_default() {
        Wire::Static => Resolution::Static,
        Wire::Original => Resolution::None,
        Wire::Dns => Resolution::Dns,
        Wire::DnsRoundRobin => Resolution::DnsRoundRobin,
        Wire::DynamicDns => Resolution::DynamicDns,
    }
}

fn wire_resolution(resolution: Resolution) -> wire::Resolution {
    use wire::Resolution as Wire;
    match resolution {
        Resolution::Static => Wire::Static,
        Resolution::None => Wire::Original,
        Resolution::Dns => Wire::Dns,
        Resolution::DnsRoundRobin => Wire::DnsRoundRobin,
        Resolution::DynamicDns => Wire::DynamicDns,
    }
}

impl From<&ServedService> for wire::Service {
    fn from(served: &ServedService) -> Self {
        let ports = served.ports.iter();
        let ports = ports.map(|(port, it)| (u32::from(*port), wire_app_protocol(*it).into()));
        Self {
            service: served.service.to_string(),
            bound: served.bound,
            ports: ports.collect(),
            resolution: wire_resolution(served.resolution).into(),
            external: served.external,
        }
    }
}

fn uid(wire: &str) -> Result<WorkloadUid> {
    if wire.is_empty() {
        return Err(missing("uid"));
    }
    Ok(WorkloadUid(wire.into()))
}

impl TryFrom<&wire::Workload> for ServedWorkload {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Workload) -> Result<Self> {
        Ok(Self {
            uid: uid(&wire.uid)?,
        })
    }
}

impl From<&ServedWorkload> for wire::Workload {
    fn from(served: &ServedWorkload) -> Self {
        Self {
            uid: served.uid.to_string(),
        }
    }
}

fn labels(wire: &BTreeMap<String, String>) -> BTreeMap<Str, Str> {
    let pairs = wire.iter();
    pairs
        .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
        .collect()
}

fn wire_labels(labels: &BTreeMap<Str, Str>) -> BTreeMap<String, String> {
    let pairs = labels.iter();
    pairs
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect()
}

impl TryFrom<&wire::Labels> for WorkloadLabels {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Labels) -> Result<Self> {
        Ok(Self {
            uid: uid(&wire.uid)?,
            labels: labels(&wire.labels),
        })
    }
}

impl From<&WorkloadLabels> for wire::Labels {
    fn from(it: &WorkloadLabels) -> Self {
        Self {
            uid: it.uid.to_string(),
            labels: wire_labels(&it.labels),
        }
    }
}

fn service_port(service: &str, port: u32) -> Result<(NamespacedHostname, u16)> {
    Ok((parsed("service", service)?, small("port", port)?))
}
