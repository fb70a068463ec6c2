//! Routes: what becomes of a request to a service. One form for HTTPRoute, GRPCRoute, TLSRoute, TCPRoute and
//! VirtualService.

use std::{collections::BTreeMap, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};

use super::{name::ObjectRef, pattern::Pattern, request::ConnectionFacts};
use crate::names::{NamespacedHostname, Str};

/// One route object, attached to services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The object; its kind decides precedence between kinds (Gateway API: GRPCRoute, HTTPRoute, TLSRoute, TCPRoute).
    pub key: ObjectRef,
    /// Its creation, in seconds since 1970: the older wins a tie.
    pub created: i64,
    /// What it is attached to; at least one, unique.
    pub attachments: Vec<Attachment>,
    /// Its rules.
    pub rules: Rules,
}

/// The front end that a route is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attachment {
    /// The service.
    pub service: NamespacedHostname,
    /// One of its ports; none: all of a protocol that fits.
    pub port: Option<u16>,
    /// Whose requests it applies to.
    pub callers: Callers,
}

/// Whose requests a route applies to (GAMMA, producer and consumer routes).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Callers {
    /// Everyone's: the route's namespace is the service's.
    All,
    /// Those of workloads of this namespace; shadows routes for all.
    Namespace(Str),
}

/// Rules of one protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rules {
    /// HTTP and gRPC.
    Http {
        /// How rules are ordered among each other and with other routes of the service.
        order: Order,
        /// At least one.
        rules: Vec<HttpRule>,
    },
    /// TLS by SNI; first match wins.
    Tls(Vec<TlsRule>),
    /// TCP; first match wins.
    Tcp(Vec<TcpRule>),
}

/// How HTTP rules are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// By the precedence of the Gateway API (HTTPRouteRule.matches, GRPCRouteRule.matches), then age, name, position.
    Precedence,
    /// As written (VirtualService): first match wins.
    Written,
}

/// One rule. No match: every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRule {
    /// For logs and `sectionName`.
    pub name: Option<Str>,
    /// ORed.
    pub matches: Vec<HttpMatch>,
    /// Applied to the request before a backend's own edits.
    pub request_headers: HeaderEdit,
    /// Applied to the response after a backend's own edits.
    pub response_headers: HeaderEdit,
    /// Changes host and path of the forwarded request.
    pub rewrite: Option<Rewrite>,
    /// Copies of the request.
    pub mirrors: Vec<Mirror>,
    /// Cross-origin requests.
    pub cors: Option<Cors>,
    /// Delays and aborts on purpose.
    pub fault: Option<Fault>,
    /// A bound on requests, per replica.
    pub rate_limit: Option<RateLimit>,
    /// Asked before the request is forwarded (HTTPRoute filter ExternalAuth): the name of an
    /// [`ExternalAuthorizer`](super::config::ExternalAuthorizer).
    pub external_authorizer: Option<Str>,
    /// Time limits.
    pub timeouts: Timeouts,
    /// None: the default policy (2 tries on failures that prove that nothing was processed).
    pub retry: Option<RetryPolicy>,
    /// Keeps a client at its endpoint.
    pub session: Option<SessionPersistence>,
    /// What becomes of the request.
    pub action: Action,
}

impl HttpRule {
    /// A rule that does nothing but its action.
    pub fn new(matches: Vec<HttpMatch>, action: Action) -> Self {
        Self {
            name: None,
            matches,
            request_headers: HeaderEdit::default(),
            response_headers: HeaderEdit::default(),
            rewrite: None,
            mirrors: Vec::new(),
            cors: None,
            fault: None,
            rate_limit: None,
            external_authorizer: None,
            timeouts: Timeouts::default(),
            retry: None,
            session: None,
            action,
        }
    }
}

/// What becomes of a request that a rule matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Forwarded to one backend, drawn by weight. Empty or all weights 0: answered 500.
    Forward(Vec<WeightedBackend>),
    /// Answered with a redirect.
    Redirect(Redirect),
    /// Answered with a fixed response.
    Respond(DirectResponse),
    /// The rule could not be translated: answered 500. The text is for the log.
    Invalid(Str),
}

/// Conditions, ANDed. Empty: every request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpMatch {
    /// On the path without its query, normalised.
    pub path: Option<PathMatch>,
    /// Compare without regard to case (VirtualService `ignoreUriCase`).
    pub ignore_path_case: bool,
    /// The request's method.
    pub method: Option<TextMatch>,
    /// `http` or `https`.
    pub scheme: Option<TextMatch>,
    /// Host and port as the client sent them.
    pub authority: Option<TextMatch>,
    /// Unique names. Several values of a header are joined by commas first.
    pub headers: Vec<HeaderMatch>,
    /// None of these may match.
    pub without_headers: Vec<HeaderMatch>,
    /// Unique names; the first value of a repeated parameter counts.
    pub query: Vec<QueryMatch>,
    /// The service's port.
    pub port: Option<u16>,
    /// Who calls; none: anyone.
    pub source: Option<Box<CallerMatch>>,
    /// Verified JWT claims (VirtualService `@request.auth.claims`): path of names, and the match.
    pub claims: Vec<(Vec<Str>, TextMatch)>,
    /// Only requests that are gRPC over HTTP/2 (GRPCRoute).
    pub grpc: bool,
}

/// Who calls. Both hold; empty: anyone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallerMatch {
    /// Namespace of the caller, as its certificate proves (VirtualService `sourceNamespace`).
    pub namespace: Option<Str>,
    /// All are the caller's (VirtualService `sourceLabels`). A caller whose labels are not known has none.
    pub labels: BTreeMap<Str, Str>,
}

impl CallerMatch {
    /// None where it asks for nothing.
    pub fn new(namespace: Option<Str>, labels: BTreeMap<Str, Str>) -> Option<Box<Self>> {
        let asks = namespace.is_some() || !labels.is_empty();
        asks.then(|| Box::new(Self { namespace, labels }))
    }

    /// Whether it is the caller of `connection`.
    pub fn holds(&self, connection: &ConnectionFacts<'_>) -> bool {
        let namespace = self.namespace.as_deref();
        let has = |(name, value): (&Str, &Str)| {
            let labels = connection.source_labels;
            labels.is_some_and(|it| it.get(name) == Some(value))
        };
        namespace.is_none_or(|it| Some(it) == connection.namespace()) && self.labels.iter().all(has)
    }
}

/// On a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    /// The whole path, case-sensitive.
    Exact(Str),
    /// Whole segments (Gateway API `PathPrefix`); without a trailing slash unless it is `/`.
    Segments(Str),
    /// Plain text (VirtualService `prefix`).
    Prefix(Str),
    /// The whole path by expression.
    Regex(Pattern),
    /// gRPC, `/{service}/{method}`: at least one is given.
    Grpc {
        /// Fully qualified service.
        service: Option<TextMatch>,
        /// Method.
        method: Option<TextMatch>,
    },
}

/// On a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextMatch {
    /// The whole text.
    Exact(Str),
    /// Its start.
    Prefix(Str),
    /// The whole text by expression.
    Regex(Pattern),
    /// There is one.
    Present,
}

/// On a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderMatch {
    /// Lower case.
    pub name: HeaderName,
    /// On its value.
    pub value: TextMatch,
}

/// On a query parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryMatch {
    /// Case-sensitive.
    pub name: Str,
    /// On its value, percent-decoded.
    pub value: TextMatch,
}

/// Changes of headers: set, then add, then remove.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdit {
    /// Replaces all values. `host` (as `:authority`) may be set on requests.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Adds a value.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Removes all values.
    pub remove: Vec<HeaderName>,
}

/// Changes of host and path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// The new host.
    pub authority: Option<Str>,
    /// The new path.
    pub path: Option<PathRewrite>,
}

/// A new path; the query stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    /// Replaces all of it.
    Full(Str),
    /// Replaces the prefix that was matched, by segments (Gateway API) or as text (VirtualService), as the rule's
    /// match is.
    Prefix(Str),
    /// Replaces what the expression matches; `\1` is its first group.
    Regex {
        /// Not anchored.
        pattern: Pattern,
        /// With `\0` to `\9`.
        replacement: Str,
    },
}

/// Where a request may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedBackend {
    /// Relative share; 0: none.
    pub weight: u32,
    /// The backend.
    pub backend: Backend,
    /// After the rule's.
    pub request_headers: HeaderEdit,
    /// Before the rule's.
    pub response_headers: HeaderEdit,
    /// In the place of the rule's.
    pub rewrite: Option<Rewrite>,
    /// Answers instead of forwarding.
    pub redirect: Option<Redirect>,
    /// Beside the rule's.
    pub mirrors: Vec<Mirror>,
}

impl WeightedBackend {
    /// A backend that is forwarded to as it is.
    pub fn new(weight: u32, backend: Backend) -> Self {
        Self {
            weight,
            backend,
            request_headers: HeaderEdit::default(),
            response_headers: HeaderEdit::default(),
            rewrite: None,
            redirect: None,
            mirrors: Vec::new(),
        }
    }
}

/// A route's target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// The endpoints of a service's port.
    Service {
        /// The service.
        service: NamespacedHostname,
        /// Its port.
        port: u16,
        /// DestinationRule subset.
        subset: Option<Str>,
    },
    /// The reference leads nowhere: its share is answered 500. The text is for the log.
    Invalid(Str),
}

/// Copies requests, response dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// To whom.
    pub backend: Backend,
    /// Parts per million of the requests.
    pub per_million: u32,
    /// Whether `-shadow` is added to the host (VirtualService).
    pub shadow_host: bool,
}

/// A redirect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// None: the request's.
    pub scheme: Option<Str>,
    /// None: the request's.
    pub hostname: Option<Str>,
    /// None: the request's.
    pub path: Option<PathRewrite>,
    /// Which port the location names.
    pub port: RedirectPort,
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
}

/// The port in a redirect's location; 80 with http and 443 with https are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RedirectPort {
    /// Of the scheme if one is given, else the service's port that was asked (Gateway API).
    Derived,
    /// This.
    Port(u16),
    /// The one in the request's host (VirtualService `FROM_REQUEST_PORT`).
    FromRequest,
    /// The scheme's default (VirtualService `FROM_PROTOCOL_DEFAULT`).
    ProtocolDefault,
}

/// A fixed response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectResponse {
    /// 200 to 599.
    pub status: StatusCode,
    /// At most 1 MiB.
    pub body: Vec<u8>,
}

/// Cross-origin requests (Gateway API HTTPCORSFilter, Istio CorsPolicy).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    /// ORed; none: no origin is allowed.
    pub allow_origins: Vec<OriginMatch>,
    /// Whether credentials are.
    pub allow_credentials: bool,
    /// `*`: any.
    pub allow_methods: Vec<Str>,
    /// `*`: any.
    pub allow_headers: Vec<Str>,
    /// Told to the browser.
    pub expose_headers: Vec<Str>,
    /// How long a browser may keep the answer, in seconds.
    pub max_age: Option<u32>,
    /// Whether a preflight that does not match goes on to the backend (Istio's default) or is answered without CORS
    /// headers (Gateway API).
    pub forward_unmatched_preflights: bool,
}

/// On an origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OriginMatch {
    /// `*`.
    Any,
    /// As written; `*` within it stands for any text without `/` (Gateway API).
    Wildcard(Str),
    /// VirtualService `StringMatch`.
    Text(TextMatch),
}

/// Faults on purpose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Parts per million of the requests wait so long.
    pub delay: Option<(u32, Duration)>,
    /// Parts per million of the requests are answered so.
    pub abort: Option<(u32, Abort)>,
}

/// The answer of an abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Abort {
    /// An HTTP status.
    Http(StatusCode),
    /// A gRPC status.
    Grpc(u16),
}

/// A token bucket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RateLimit {
    /// Its size.
    pub max_tokens: u32,
    /// What comes with each fill.
    pub tokens_per_fill: u32,
    /// Time between fills; at least 1 ms.
    pub fill_interval: Duration,
}

/// Time limits; none: without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Timeouts {
    /// From the request's headers to the end of the response, over all tries.
    pub request: Option<Duration>,
    /// Of one try.
    pub per_try: Option<Duration>,
}

/// When a request is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Beside the first; 0: never.
    pub attempts: u32,
    /// Which failures.
    pub on: RetryOn,
    /// First wait; doubles, with jitter, up to ten times it.
    pub backoff: Duration,
    /// Of one try, in the place of the rule's.
    pub per_try_timeout: Option<Duration>,
    /// Whether endpoints that failed are avoided.
    pub ignore_previous: bool,
    /// Whether endpoints of farther localities may be used for a retry.
    pub remote_localities: bool,
}

/// Failures that are tried again (Istio HTTPRetry.retryOn, Gateway API HTTPRouteRetry).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// No connection could be made.
    pub connect_failure: bool,
    /// The backend refused the stream before processing (REFUSED_STREAM, GOAWAY).
    pub refused_stream: bool,
    /// Reset or closed before response headers.
    pub reset: bool,
    /// The same, if the request has not been sent.
    pub reset_before_request: bool,
    /// The try ran out of its time.
    pub per_try_timeout: bool,
    /// Any 5xx, and no response at all.
    pub any_5xx: bool,
    /// 502, 503, 504.
    pub gateway_error: bool,
    /// 409.
    pub retriable_4xx: bool,
    /// These.
    pub status_codes: Vec<StatusCode>,
    /// gRPC statuses, in the header or trailers-only response: 1, 4, 13, 8, 14 by name.
    pub grpc_statuses: Vec<u16>,
    /// Also methods that are not idempotent, on failures after the request was sent: the user's explicit policy.
    pub non_idempotent: bool,
}

/// Keeps a client at its endpoint (Gateway API SessionPersistence).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionPersistence {
    /// What carries the session.
    pub carrier: SessionCarrier,
    /// Ends it.
    pub absolute_timeout: Option<Duration>,
}

/// What carries a session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SessionCarrier {
    /// A cookie of this name; permanent cookies tell `Max-Age`.
    Cookie {
        /// Name.
        name: Str,
        /// Path.
        path: Option<Str>,
        /// Whether it outlives the browser's session.
        permanent: bool,
    },
    /// A header of this name.
    Header(HeaderName),
}

/// A rule on TLS connections that are passed through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsRule {
    /// For logs.
    pub name: Option<Str>,
    /// ORed; a name or `*.suffix`; none: any.
    pub sni: Vec<Str>,
    /// The service's port.
    pub port: Option<u16>,
    /// Who calls; none: anyone.
    pub source: Option<Box<CallerMatch>>,
    /// The service's address, within any; none: any.
    pub destinations: Vec<ipnet::IpNet>,
    /// One is drawn by weight for each connection.
    pub backends: Vec<(u32, Backend)>,
}

/// A rule on TCP connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpRule {
    /// For logs.
    pub name: Option<Str>,
    /// The service's port.
    pub port: Option<u16>,
    /// Who calls; none: anyone.
    pub source: Option<Box<CallerMatch>>,
    /// The service's address, within any; none: any.
    pub destinations: Vec<ipnet::IpNet>,
    /// One is drawn by weight for each connection.
    pub backends: Vec<(u32, Backend)>,
}
