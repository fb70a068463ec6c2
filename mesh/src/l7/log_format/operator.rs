//! What an operator tells of a request.

use std::{
    borrow::Cow,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName};

use super::{date::Date, metadata::Metadata};
use crate::{
    flow::Security,
    l7::{
        condition::parameter,
        expression::{Attribute, Expression, Value, Wanted},
        record::{RequestRecord, joined},
    },
    names::Str,
};

/// One operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    /// Without arguments.
    Plain(Plain),
    /// `START_TIME(format)`.
    StartTime(Option<Str>),
    /// `EMIT_TIME(format)`: when the line is written.
    EmitTime(Option<Str>),
    /// `REQ_WITHOUT_QUERY(header?other)`, `PATH(NQ)`.
    WithoutQuery(Header, Option<Header>),
    /// `QUERY_PARAM(name)`, decoded.
    QueryParameter(Str),
    /// `FILTER_STATE(peer:FIELD:name)`.
    Attribute(Attribute),
    /// `METADATA(type:namespace:key)`.
    Metadata(Metadata),
    /// State of Envoy that nothing here fills, as it is written.
    Nothing(Str),
    /// `REQ(header?other)`.
    Request(Header, Option<Header>),
    /// `RESP(header?other)`.
    Response(Header, Option<Header>),
    /// `TRAILER(header?other)`.
    Trailer(Header, Option<Header>),
    /// `CEL(expression)`.
    Expression(Box<Expression>),
}

/// A header, or what Envoy gives as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Header {
    Method,
    Path,
    Authority,
    Scheme,
    Status,
    OriginalPath,
    ServiceTime,
    Named(HeaderName),
}

/// An operator without arguments, named after its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    Protocol,
    Code,
    CodeDetails,
    TerminationDetails,
    Flags,
    GrpcName,
    GrpcNumber,
    BytesReceived,
    BytesSent,
    HeaderBytesReceived,
    HeaderBytesSent,
    WireBytesReceived,
    WireBytesSent,
    Duration,
    RequestDuration,
    ResponseDuration,
    ResponseTxDuration,
    Client,
    ClientAddress,
    ClientPort,
    Local,
    LocalAddress,
    LocalPort,
    Upstream,
    UpstreamAddress,
    UpstreamPort,
    UpstreamLocal,
    UpstreamLocalAddress,
    UpstreamLocalPort,
    UpstreamCluster,
    UpstreamFailure,
    UpstreamUriSan,
    Attempts,
    ClientUriSan,
    TlsVersion,
    ServerName,
    RouteName,
    TraceId,
    SpanId,
    StreamId,
    ConnectionId,
}

pub(super) fn plain(name: &str) -> Option<Plain> {
    use Plain as P;
    Some(match name {
        "PROTOCOL" => P::Protocol,
        "RESPONSE_CODE" => P::Code,
        "RESPONSE_CODE_DETAILS" => P::CodeDetails,
        "CONNECTION_TERMINATION_DETAILS" => P::TerminationDetails,
        "RESPONSE_FLAGS" => P::Flags,
        "GRPC_STATUS_NUMBER" => P::GrpcNumber,
        "BYTES_RECEIVED" => P::BytesReceived,
        "BYTES_SENT" => P::BytesSent,
        "DOWNSTREAM_HEADER_BYTES_RECEIVED" => P::HeaderBytesReceived,
        "DOWNSTREAM_HEADER_BYTES_SENT" => P::HeaderBytesSent,
        "DOWNSTREAM_WIRE_BYTES_RECEIVED" => P::WireBytesReceived,
        "DOWNSTREAM_WIRE_BYTES_SENT" => P::WireBytesSent,
        "DURATION" => P::Duration,
        "REQUEST_DURATION" => P::RequestDuration,
        "RESPONSE_DURATION" => P::ResponseDuration,
        "RESPONSE_TX_DURATION" => P::ResponseTxDuration,
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => P::Client,
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT"
        | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => P::ClientAddress,
        "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => P::ClientPort,
        "DOWNSTREAM_LOCAL_ADDRESS" | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS" => P::Local,
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT"
        | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT" => P::LocalAddress,
        "DOWNSTREAM_LOCAL_PORT" | "DOWNSTREAM_DIRECT_LOCAL_PORT" => P::LocalPort,
        // Endpoints have no names of their own here.
        "UPSTREAM_HOST" | "UPSTREAM_HOST_NAME" | "UPSTREAM_REMOTE_ADDRESS" => P::Upstream,
        "UPSTREAM_HOST_NAME_WITHOUT_PORT" | "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => {
            P::UpstreamAddress
        }
        "UPSTREAM_REMOTE_PORT" => P::UpstreamPort,
        "UPSTREAM_LOCAL_ADDRESS" => P::UpstreamLocal,
        "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => P::UpstreamLocalAddress,
        "UPSTREAM_LOCAL_PORT" => P::UpstreamLocalPort,
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => P::UpstreamCluster,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => P::UpstreamFailure,
        "UPSTREAM_PEER_URI_SAN" => P::UpstreamUriSan,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => P::Attempts,
        "DOWNSTREAM_PEER_URI_SAN" => P::ClientUriSan,
        "DOWNSTREAM_TLS_VERSION" => P::TlsVersion,
        "REQUESTED_SERVER_NAME" => P::ServerName,
        "ROUTE_NAME" => P::RouteName,
        "TRACE_ID" => P::TraceId,
        "SPAN_ID" => P::SpanId,
        "STREAM_ID" => P::StreamId,
        "CONNECTION_ID" => P::ConnectionId,
        _ => return None,
    })
}

impl Operator {
    pub(super) fn value<'a>(&'a self, record: &'a RequestRecord) -> Option<Value<'a>> {
        let first = |first: &'a Header, other: &'a Option<Header>, headers: &'a HeaderMap| {
            let found = first.value(record, headers);
            found.or_else(|| other.as_ref()?.value(record, headers))
        };
        match self {
            Self::Plain(plain) => plain.value(record),
            Self::StartTime(format) => time(record.start, format.as_deref()),
            Self::EmitTime(format) => {
                let end = record.start + record.duration.unwrap_or_default();
                time(end, format.as_deref())
            }
            Self::WithoutQuery(name, other) => {
                first(name, other, &record.request_headers).map(without_query)
            }
            Self::QueryParameter(name) => {
                let (_, query) = record.path.split_once('?')?;
                parameter(query, name).map(Value::Text)
            }
            Self::Attribute(attribute) => attribute.value(record),
            Self::Metadata(metadata) => metadata.value(record),
            Self::Nothing(_) => None,
            Self::Request(name, other) => first(name, other, &record.request_headers),
            Self::Response(name, other) => first(name, other, &record.response_headers),
            Self::Trailer(name, other) => first(name, other, &record.response_trailers),
            Self::Expression(expression) => expression.evaluate(record),
        }
    }

    pub(super) fn wanted(&self, wanted: &mut Wanted) {
        let (names, first, other) = match self {
            Self::Request(first, other) | Self::WithoutQuery(first, other) => {
                (&mut wanted.request, first, other)
            }
            Self::Response(first, other) => (&mut wanted.response, first, other),
            Self::Trailer(first, other) => (&mut wanted.trailers, first, other),
            Self::Expression(expression) => return expression.wanted(wanted),
            Self::Attribute(attribute) => return attribute.wanted(wanted),
            Self::Plain(_)
            | Self::StartTime(_)
            | Self::EmitTime(_)
            | Self::QueryParameter(_)
            | Self::Metadata(_)
            | Self::Nothing(_) => return,
        };
        for header in [Some(first), other.as_ref()].into_iter().flatten() {
            header.wanted(names);
        }
    }
}

fn time(time: SystemTime, format: Option<&str>) -> Option<Value<'static>> {
    let date = Date::of(time);
    Some(owned(match format {
        None => date.rfc3339(),
        Some(format) => date.format(format),
    }))
}

fn without_query(value: Value<'_>) -> Value<'_> {
    let before = |text: &str| text.find('?').unwrap_or(text.len());
    match value {
        Value::Text(Cow::Borrowed(text)) => Value::Text(Cow::Borrowed(&text[..before(text)])),
        Value::Text(Cow::Owned(mut text)) => {
            text.truncate(before(&text));
            Value::Text(Cow::Owned(text))
        }
        other => other,
    }
}

fn owned(text: String) -> Value<'static> {
    Value::Text(Cow::Owned(text))
}

fn text(text: &str) -> Option<Value<'_>> {
    (!text.is_empty()).then_some(Value::Text(Cow::Borrowed(text)))
}

fn optional(it: Option<&Str>) -> Option<Value<'_>> {
    it.and_then(|it| text(it))
}

fn int(value: u64) -> Option<Value<'static>> {
    Some(Value::Int(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn millis(duration: Option<Duration>) -> Option<Value<'static>> {
    int(u64::try_from(duration?.as_millis()).unwrap_or(u64::MAX))
}

fn address(address: Option<SocketAddr>) -> Option<Value<'static>> {
    address.map(|it| owned(it.to_string()))
}

fn ip(address: Option<SocketAddr>) -> Option<Value<'static>> {
    address.map(|it| owned(it.ip().to_string()))
}

fn port(address: Option<SocketAddr>) -> Option<Value<'static>> {
    address.and_then(|it| int(it.port().into()))
}

impl Header {
    fn value<'a>(&'a self, record: &'a RequestRecord, headers: &'a HeaderMap) -> Option<Value<'a>> {
        match self {
            Self::Method => text(record.method.as_str()),
            Self::Path => text(&record.path),
            Self::Authority => text(&record.authority),
            Self::Scheme => text(&record.scheme),
            Self::Status => record.status.map(|it| owned(it.to_string())),
            Self::OriginalPath => record.original_path.as_deref().and_then(text),
            Self::ServiceTime => {
                let sent = record.request_duration.unwrap_or_default();
                let waited = record.response_duration?.saturating_sub(sent);
                Some(owned(waited.as_millis().to_string()))
            }
            Self::Named(name) => joined(headers, name).map(Value::Text),
        }
    }

    fn wanted(&self, names: &mut Vec<HeaderName>) {
        if let Self::Named(name) = self {
            Wanted::add(names, name);
        }
    }
}

impl Plain {
    fn value(self, record: &RequestRecord) -> Option<Value<'_>> {
        match self {
            Self::Protocol => text(record.protocol()),
            Self::Code => int(record.status.unwrap_or(0).into()),
            Self::CodeDetails => record.details.as_deref().and_then(text),
            Self::TerminationDetails => record.termination_details.as_deref().and_then(text),
            Self::Flags => Some(owned(record.flags.to_string())),
            Self::GrpcName => record.grpc_status.map(|it| owned(grpc_name(it))),
            Self::GrpcNumber => int(record.grpc_status?.into()),
            Self::BytesReceived => int(record.bytes_received),
            Self::BytesSent => int(record.bytes_sent),
            Self::HeaderBytesReceived => int(record.request_header_bytes),
            Self::HeaderBytesSent => int(record.response_header_bytes),
            Self::WireBytesReceived => int(record.request_size()),
            Self::WireBytesSent => int(record.response_size()),
            Self::Duration => millis(record.duration),
            Self::RequestDuration => millis(record.request_duration),
            Self::ResponseDuration => millis(record.response_duration),
            Self::ResponseTxDuration => {
                millis(record.duration?.checked_sub(record.response_duration?))
            }
            other => other.of_peers(record).or_else(|| other.of_ids(record)),
        }
    }

    fn of_peers(self, record: &RequestRecord) -> Option<Value<'_>> {
        match self {
            Self::Client => address(record.client),
            Self::ClientAddress => ip(record.client),
            Self::ClientPort => port(record.client),
            Self::Local => address(record.local),
            Self::LocalAddress => ip(record.local),
            Self::LocalPort => port(record.local),
            Self::Upstream => address(record.upstream),
            Self::UpstreamAddress => ip(record.upstream),
            Self::UpstreamPort => port(record.upstream),
            Self::UpstreamLocal => address(record.upstream_local),
            Self::UpstreamLocalAddress => ip(record.upstream_local),
            Self::UpstreamLocalPort => port(record.upstream_local),
            Self::UpstreamCluster => optional(record.upstream_cluster.as_ref()),
            Self::UpstreamFailure => record.upstream_failure.as_deref().and_then(text),
            Self::UpstreamUriSan => optional(record.destination.labels.principal.as_ref()),
            Self::ClientUriSan => optional(record.source.labels.principal.as_ref()),
            _ => None,
        }
    }

    fn of_ids(self, record: &RequestRecord) -> Option<Value<'_>> {
        let mtls = record.security == Security::MutualTls;
        match self {
            Self::Attempts => int(record.attempts.into()),
            Self::TlsVersion => mtls.then_some(Value::Text(Cow::Borrowed("TLSv1.3"))),
            Self::ServerName => optional(record.server_name.as_ref()),
            Self::RouteName => optional(record.route.as_ref()),
            Self::TraceId => record
                .span
                .as_ref()
                .map(|it| owned(format!("{:032x}", it.trace_id))),
            Self::SpanId => record
                .span
                .as_ref()
                .map(|it| owned(format!("{:016x}", it.span_id))),
            Self::StreamId => record.request_id().and_then(text),
            Self::ConnectionId => int(record.connection),
            _ => None,
        }
    }
}

/// Names of gRPC's statuses, as Envoy logs them.
const GRPC_NAMES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

fn grpc_name(status: u32) -> String {
    let name = usize::try_from(status)
        .ok()
        .and_then(|at| GRPC_NAMES.get(at));
    name.map_or_else(|| status.to_string(), |name| (*name).to_owned())
}
