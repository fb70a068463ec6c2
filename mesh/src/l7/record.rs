//! One request, told once: the log line, the metrics and the span are all views of a [`RequestRecord`].

use std::{
    borrow::Cow,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, Method, Version};

use super::{request::Claims, response_flags::Flags, route::Route, trace::Span};
use crate::{
    flow::{Party, Security, ServiceName},
    names::Str,
};

/// One request and its response. Filled in as things become known; what stays `None` is told as unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRecord {
    /// Number of the CONNECT stream that it came on.
    pub connection: u64,
    /// The client.
    pub source: Party,
    /// The endpoint that answered, or the last that was tried.
    pub destination: Party,
    /// The service that the client addressed.
    pub service: Option<ServiceName>,
    /// Its port.
    pub port: u16,
    /// What protects the bytes on their way here.
    pub security: Security,
    /// The client's address.
    pub client: Option<SocketAddr>,
    /// The address that the client dialled.
    pub local: Option<SocketAddr>,
    /// SNI, where the client's own TLS was looked into.
    pub server_name: Option<Str>,

    /// When its head had arrived.
    pub start: SystemTime,
    /// Method.
    pub method: Method,
    /// Path and query as forwarded.
    pub path: String,
    /// Path and query as they came, where they were rewritten.
    pub original_path: Option<String>,
    /// `http` or `https`.
    pub scheme: Cow<'static, str>,
    /// Host and port as the client sent them.
    pub authority: String,
    /// The client's version of HTTP.
    pub version: Version,
    /// Whether it is gRPC by its content type.
    pub grpc: bool,
    /// Headers of the request; at least those that formats, filters and tags name.
    pub request_headers: HeaderMap,
    /// Body, in bytes.
    pub bytes_received: u64,
    /// Heads of the request as on the wire, in bytes.
    pub request_header_bytes: u64,
    /// gRPC messages of the client.
    pub request_messages: u64,

    /// Status; none: no response was sent.
    pub status: Option<u16>,
    /// `grpc-status`.
    pub grpc_status: Option<u32>,
    /// What went wrong.
    pub flags: Flags,
    /// Why this status (`via_upstream`, `rbac_access_denied_matched_policy[...]`).
    pub details: Option<Cow<'static, str>>,
    /// Why the client's connection was ended.
    pub termination_details: Option<Cow<'static, str>>,
    /// Headers of the response; at least those that formats, filters and tags name.
    pub response_headers: HeaderMap,
    /// The same of its trailers.
    pub response_trailers: HeaderMap,
    /// Body, in bytes.
    pub bytes_sent: u64,
    /// Head of the response as on the wire, in bytes.
    pub response_header_bytes: u64,
    /// gRPC messages of the backend.
    pub response_messages: u64,

    /// From the start to the last byte of the response.
    pub duration: Option<Duration>,
    /// From the start to the last byte of the request.
    pub request_duration: Option<Duration>,
    /// From the start to the first byte of the backend's response.
    pub response_duration: Option<Duration>,

    /// The endpoint's address.
    pub upstream: Option<SocketAddr>,
    /// Istio's name of the service, port and subset: see [`cluster_name`].
    pub upstream_cluster: Option<Str>,
    /// Our address towards it.
    pub upstream_local: Option<SocketAddr>,
    /// Why no connection to a backend came about.
    pub upstream_failure: Option<String>,
    /// How often the request was sent.
    pub attempts: u32,
    /// The rule that matched.
    pub route: Option<Str>,
    /// The object of that rule.
    pub rule_of: Option<Arc<Route>>,
    /// What the request's verified token says.
    pub claims: Option<Arc<Claims>>,
    /// The request's own span, where it is traced.
    pub span: Option<Span>,
}

impl Default for RequestRecord {
    fn default() -> Self {
        Self {
            connection: 0,
            source: Party::default(),
            destination: Party::default(),
            service: None,
            port: 0,
            security: Security::MutualTls,
            client: None,
            local: None,
            server_name: None,
            start: SystemTime::UNIX_EPOCH,
            method: Method::GET,
            path: String::new(),
            original_path: None,
            scheme: Cow::Borrowed("http"),
            authority: String::new(),
            version: Version::HTTP_11,
            grpc: false,
            request_headers: HeaderMap::new(),
            bytes_received: 0,
            request_header_bytes: 0,
            request_messages: 0,
            status: None,
            grpc_status: None,
            flags: Flags::default(),
            details: None,
            termination_details: None,
            response_headers: HeaderMap::new(),
            response_trailers: HeaderMap::new(),
            bytes_sent: 0,
            response_header_bytes: 0,
            response_messages: 0,
            duration: None,
            request_duration: None,
            response_duration: None,
            upstream: None,
            upstream_cluster: None,
            upstream_local: None,
            upstream_failure: None,
            attempts: 0,
            route: None,
            rule_of: None,
            claims: None,
            span: None,
        }
    }
}

impl RequestRecord {
    /// `HTTP/1.1`, `HTTP/2`.
    pub fn protocol(&self) -> &'static str {
        match self.version {
            Version::HTTP_09 => "HTTP/0.9",
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2",
            Version::HTTP_3 => "HTTP/3",
            _ => "HTTP/1.1",
        }
    }

    /// The path as it came.
    pub fn received_path(&self) -> &str {
        self.original_path.as_deref().unwrap_or(&self.path)
    }

    /// The id that ties logs and spans together.
    pub fn request_id(&self) -> Option<&str> {
        self.request_headers.get("x-request-id")?.to_str().ok()
    }

    /// Whether it counts as an error in traces: a 5xx, no response, or a gRPC status other than OK.
    pub fn failed(&self) -> bool {
        let failed_grpc = self.grpc_status.is_some_and(|status| status != 0);
        self.status.is_none_or(|status| status >= 500) || failed_grpc
    }

    /// The request on the wire: heads and body, in bytes.
    pub fn request_size(&self) -> u64 {
        self.bytes_received
            .saturating_add(self.request_header_bytes)
    }

    /// The response on the wire: head and body, in bytes.
    pub fn response_size(&self) -> u64 {
        self.bytes_sent.saturating_add(self.response_header_bytes)
    }
}

/// The bytes of headers as Envoy counts them: names and values.
pub fn header_bytes(headers: &HeaderMap) -> u64 {
    let sizes = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len());
    u64::try_from(sizes.sum::<usize>()).unwrap_or(u64::MAX)
}

/// All values of a header with commas between; none: it is not there. Bytes that are no UTF-8 are replaced.
pub fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter();
    let first = String::from_utf8_lossy(values.next()?.as_bytes());
    Some(values.fold(first, |joined, next| {
        let next = String::from_utf8_lossy(next.as_bytes());
        Cow::Owned(joined.into_owned() + "," + &next)
    }))
}

/// `UPSTREAM_CLUSTER` as Istio's waypoints tell it: `inbound-vip|port|http/subset|host`.
pub fn cluster_name(hostname: &str, port: u16, subset: Option<&str>) -> String {
    match subset {
        Some(subset) => format!("inbound-vip|{port}|http/{subset}|{hostname}"),
        None => format!("inbound-vip|{port}|http|{hostname}"),
    }
}
