//! The attributes of a request (Envoy's attribute list, and Istio's peers), as far as a waypoint knows them.

use std::{borrow::Cow, net::SocketAddr};

use http::{HeaderMap, HeaderName};

use super::{Value, int};
use crate::{
    flow::{Party, Security},
    l7::record::{RequestRecord, joined},
    names::Str,
};

/// Headers that somebody wants to look at after the request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Of the request.
    pub request: Vec<HeaderName>,
    /// Of the response.
    pub response: Vec<HeaderName>,
    /// Of the response's trailers.
    pub trailers: Vec<HeaderName>,
}

impl Wanted {
    /// Adds a name once.
    pub fn add(names: &mut Vec<HeaderName>, name: &HeaderName) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }

    /// The wanted ones of `headers`.
    pub fn select(names: &[HeaderName], headers: &HeaderMap) -> HeaderMap {
        let mut selected = HeaderMap::with_capacity(names.len());
        for name in names {
            for value in headers.get_all(name) {
                selected.append(name.clone(), value.clone());
            }
        }
        selected
    }
}

/// One attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// Of the record as a whole.
    Plain(Plain),
    /// `request.headers['name']`.
    RequestHeader(HeaderName),
    /// `response.headers['name']`.
    ResponseHeader(HeaderName),
    /// `response.trailers['name']`.
    Trailer(HeaderName),
    /// `downstream_peer.*`.
    Source(Peer),
    /// `upstream_peer.*`.
    Destination(Peer),
}

/// An attribute without a name of its own in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "each is the attribute that it is named after, see `plain`"
)]
pub enum Plain {
    RequestPath,
    RequestUrlPath,
    RequestHost,
    RequestScheme,
    RequestMethod,
    RequestTime,
    RequestId,
    RequestProtocol,
    RequestQuery,
    RequestDuration,
    RequestSize,
    RequestTotalSize,
    ResponseCode,
    ResponseCodeDetails,
    ResponseFlags,
    ResponseGrpcStatus,
    ResponseSize,
    ResponseTotalSize,
    ResponseBackendLatency,
    SourceAddress,
    SourcePort,
    DestinationAddress,
    DestinationPort,
    ConnectionId,
    ConnectionMtls,
    ConnectionServerName,
    ConnectionTlsVersion,
    ConnectionUriSan,
    ConnectionTerminationDetails,
    UpstreamAddress,
    UpstreamPort,
    UpstreamUriSan,
    UpstreamFailure,
    UpstreamLocalAddress,
    UpstreamAttempts,
    ClusterName,
    RouteName,
}

/// What is known of a peer's workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// `.name`: the pod.
    Name,
    /// `.workload`.
    Workload,
    /// `.namespace`.
    Namespace,
    /// `.cluster_id`.
    Cluster,
    /// `.app`, `.service`, `.canonical_name`.
    Service,
    /// `.version`, `.revision`.
    Revision,
    /// `.principal`.
    Principal,
}

impl Attribute {
    /// A field of what Envoy's filter state holds of a peer; its key with or without the prefix that it once had.
    pub(crate) fn of_filter_state(key: &str, field: &str) -> Option<Self> {
        match key.strip_prefix("wasm.").unwrap_or(key) {
            "downstream_peer" => Some(Self::Source(Peer::of(field)?)),
            "upstream_peer" => Some(Self::Destination(Peer::of(field)?)),
            _ => None,
        }
    }

    pub(super) fn of(path: &[&str]) -> Option<Self> {
        let header = |name: &str| name.parse::<HeaderName>().ok();
        Some(match path {
            ["request", "headers", name] => Self::RequestHeader(header(name)?),
            ["response", "headers", name] => Self::ResponseHeader(header(name)?),
            ["response", "trailers", name] => Self::Trailer(header(name)?),
            ["request", "referer"] => Self::RequestHeader(http::header::REFERER),
            ["request", "useragent"] => Self::RequestHeader(http::header::USER_AGENT),
            ["filter_state", key, field] => Self::of_filter_state(key, field)?,
            [key @ ("downstream_peer" | "upstream_peer"), field] => {
                Self::of_filter_state(key, field)?
            }
            [root, field] => Self::Plain(plain(root, field)?),
            _ => return None,
        })
    }

    pub(crate) fn wanted(&self, wanted: &mut Wanted) {
        match self {
            Self::RequestHeader(name) => Wanted::add(&mut wanted.request, name),
            Self::ResponseHeader(name) => Wanted::add(&mut wanted.response, name),
            Self::Trailer(name) => Wanted::add(&mut wanted.trailers, name),
            Self::Plain(_) | Self::Source(_) | Self::Destination(_) => {}
        }
    }

    pub(crate) fn value<'a>(&'a self, record: &'a RequestRecord) -> Option<Value<'a>> {
        match self {
            Self::Plain(plain) => plain.value(record),
            Self::RequestHeader(name) => header(&record.request_headers, name),
            Self::ResponseHeader(name) => header(&record.response_headers, name),
            Self::Trailer(name) => header(&record.response_trailers, name),
            Self::Source(peer) => peer.value(&record.source),
            Self::Destination(peer) => peer.value(&record.destination),
        }
    }
}

fn plain(root: &str, field: &str) -> Option<Plain> {
    use Plain as P;
    Some(match (root, field) {
        ("request", "path") => P::RequestPath,
        ("request", "url_path") => P::RequestUrlPath,
        ("request", "host") => P::RequestHost,
        ("request", "scheme") => P::RequestScheme,
        ("request", "method") => P::RequestMethod,
        ("request", "time") => P::RequestTime,
        ("request", "id") => P::RequestId,
        ("request", "protocol") => P::RequestProtocol,
        ("request", "query") => P::RequestQuery,
        ("request", "duration") => P::RequestDuration,
        ("request", "size") => P::RequestSize,
        ("request", "total_size") => P::RequestTotalSize,
        ("response", "code") => P::ResponseCode,
        ("response", "code_details") => P::ResponseCodeDetails,
        ("response", "flags") => P::ResponseFlags,
        ("response", "grpc_status") => P::ResponseGrpcStatus,
        ("response", "size") => P::ResponseSize,
        ("response", "total_size") => P::ResponseTotalSize,
        ("response", "backend_latency") => P::ResponseBackendLatency,
        ("source", "address") => P::SourceAddress,
        ("source", "port") => P::SourcePort,
        ("destination", "address") => P::DestinationAddress,
        ("destination", "port") => P::DestinationPort,
        ("connection", "id") => P::ConnectionId,
        ("connection", "mtls") => P::ConnectionMtls,
        ("connection", "requested_server_name") => P::ConnectionServerName,
        ("connection", "tls_version") => P::ConnectionTlsVersion,
        ("connection", "uri_san_peer_certificate") => P::ConnectionUriSan,
        ("connection", "termination_details") => P::ConnectionTerminationDetails,
        ("upstream", "address") => P::UpstreamAddress,
        ("upstream", "port") => P::UpstreamPort,
        ("upstream", "uri_san_peer_certificate") => P::UpstreamUriSan,
        ("upstream", "transport_failure_reason") => P::UpstreamFailure,
        ("upstream", "local_address") => P::UpstreamLocalAddress,
        ("upstream", "request_attempt_count") => P::UpstreamAttempts,
        ("xds", "cluster_name") => P::ClusterName,
        ("xds", "route_name") => P::RouteName,
        _ => return None,
    })
}

fn text(text: &str) -> Option<Value<'_>> {
    Some(Value::Text(Cow::Borrowed(text)))
}

fn shared(text: Option<&Str>) -> Option<Value<'_>> {
    text.map(|it| Value::Text(Cow::Borrowed(&**it)))
}

fn owned(text: &impl ToString) -> Value<'static> {
    Value::Text(Cow::Owned(text.to_string()))
}

fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Value<'a>> {
    joined(headers, name).map(Value::Text)
}

fn port(address: Option<SocketAddr>) -> Option<Value<'static>> {
    address.map(|it| int(it.port()))
}

impl Plain {
    fn value(self, record: &RequestRecord) -> Option<Value<'_>> {
        let (path, query) = match record.path.split_once('?') {
            Some((path, query)) => (path, query),
            None => (record.path.as_str(), ""),
        };
        match self {
            Self::RequestPath => text(&record.path),
            Self::RequestUrlPath => text(path),
            Self::RequestHost => text(&record.authority),
            Self::RequestScheme => text(&record.scheme),
            Self::RequestMethod => text(record.method.as_str()),
            Self::RequestTime => Some(Value::Time(record.start)),
            Self::RequestId => record.request_id().and_then(text),
            Self::RequestProtocol => text(record.protocol()),
            Self::RequestQuery => text(query),
            Self::RequestDuration => record.duration.map(Value::Duration),
            Self::RequestSize => Some(int(record.bytes_received)),
            Self::RequestTotalSize => Some(int(record.request_size())),
            Self::SourceAddress => record.client.as_ref().map(owned),
            Self::SourcePort => port(record.client),
            Self::DestinationAddress => record.local.as_ref().map(owned),
            Self::DestinationPort => port(record.local),
            other => other.of_response(record).or_else(|| other.of_peers(record)),
        }
    }

    fn of_response(self, record: &RequestRecord) -> Option<Value<'_>> {
        match self {
            Self::ResponseCode => record.status.map(int),
            Self::ResponseCodeDetails => record.details.as_deref().and_then(text),
            Self::ResponseFlags => Some(int(record.flags.bits())),
            Self::ResponseGrpcStatus => record.grpc_status.map(int),
            Self::ResponseSize => Some(int(record.bytes_sent)),
            Self::ResponseTotalSize => Some(int(record.response_size())),
            Self::ResponseBackendLatency => {
                let sent = record.request_duration?;
                let latency = record.response_duration?.checked_sub(sent)?;
                Some(Value::Duration(latency))
            }
            _ => None,
        }
    }

    fn of_peers(self, record: &RequestRecord) -> Option<Value<'_>> {
        let mtls = record.security == Security::MutualTls;
        match self {
            Self::ConnectionId => Some(int(record.connection)),
            Self::ConnectionMtls => Some(Value::Bool(mtls)),
            Self::ConnectionServerName => shared(record.server_name.as_ref()),
            Self::ConnectionTlsVersion => mtls.then_some(Value::Text(Cow::Borrowed("TLSv1.3"))),
            Self::ConnectionUriSan => shared(record.source.labels.principal.as_ref()),
            Self::ConnectionTerminationDetails => {
                record.termination_details.as_deref().and_then(text)
            }
            Self::UpstreamAddress => record.upstream.as_ref().map(owned),
            Self::UpstreamPort => port(record.upstream),
            Self::UpstreamUriSan => shared(record.destination.labels.principal.as_ref()),
            Self::UpstreamFailure => record.upstream_failure.as_deref().and_then(text),
            Self::UpstreamLocalAddress => record.upstream_local.as_ref().map(owned),
            Self::UpstreamAttempts => Some(int(record.attempts)),
            Self::ClusterName => shared(record.upstream_cluster.as_ref()),
            Self::RouteName => shared(record.route.as_ref()),
            _ => None,
        }
    }
}

impl Peer {
    fn of(field: &str) -> Option<Self> {
        Some(match field {
            "name" => Self::Name,
            "workload" => Self::Workload,
            "namespace" => Self::Namespace,
            "cluster_id" | "cluster" => Self::Cluster,
            "app" | "service" | "canonical_name" => Self::Service,
            "version" | "revision" => Self::Revision,
            "principal" => Self::Principal,
            _ => return None,
        })
    }

    fn value(self, party: &Party) -> Option<Value<'_>> {
        let labels = &party.labels;
        let field = match self {
            Self::Name => &party.pod,
            Self::Workload => &labels.workload,
            Self::Namespace => &labels.namespace,
            Self::Cluster => &labels.cluster,
            Self::Service => &labels.canonical_service,
            Self::Revision => &labels.canonical_revision,
            Self::Principal => &labels.principal,
        };
        shared(field.as_ref())
    }
}
