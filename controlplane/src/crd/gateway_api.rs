//! The route and policy kinds of the Gateway API (v1.6, standard and experimental channel), as waypoints serve them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Custom;

/// An object that a route is attached to.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ParentRef {
    /// API group; the Gateway API's own when absent.
    pub group: Option<String>,
    /// `Gateway` when absent.
    pub kind: Option<String>,
    /// The route's own when absent.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// A listener's, or for a Service a port's name.
    pub section_name: Option<String>,
    /// One of its ports; none: all.
    pub port: Option<i32>,
}

/// A reference to an object that may be in another namespace, with a port.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendObjectRef {
    /// API group; core when absent.
    pub group: Option<String>,
    /// `Service` when absent.
    pub kind: Option<String>,
    /// Name; for the kind `Hostname`, a host name.
    pub name: String,
    /// The route's own when absent.
    pub namespace: Option<String>,
    /// Its port.
    pub port: Option<i32>,
}

/// `HTTPRoute`.
pub type HttpRoute = Custom<HttpRouteSpec, RouteStatus>;
/// `GRPCRoute`.
pub type GrpcRoute = Custom<GrpcRouteSpec, RouteStatus>;
/// `TLSRoute`.
pub type TlsRoute = Custom<TlsRouteSpec, RouteStatus>;
/// `TCPRoute`.
pub type TcpRoute = Custom<TcpRouteSpec, RouteStatus>;

/// What is said of a route, per parent and controller.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct RouteStatus {
    /// Entries of all controllers.
    pub parents: Value,
}

/// What an `HTTPRoute` says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRouteSpec {
    /// What it is attached to.
    pub parent_refs: Vec<ParentRef>,
    /// Gateways of a scope; none are served here.
    pub use_default_gateways: Option<String>,
    /// For Gateways; no restriction for services.
    pub hostnames: Vec<String>,
    /// In order.
    pub rules: Vec<HttpRouteRule>,
}

/// `HTTPRoute.rules[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRouteRule {
    /// For logs and `sectionName`.
    pub name: Option<String>,
    /// ORed; none: every request.
    pub matches: Vec<HttpRouteMatch>,
    /// In order.
    pub filters: Vec<HttpRouteFilter>,
    /// By weight.
    pub backend_refs: Vec<HttpBackendRef>,
    /// Time limits.
    pub timeouts: Option<HttpRouteTimeouts>,
    /// Tries.
    pub retry: Option<HttpRouteRetry>,
    /// Keeps a client at its endpoint.
    pub session_persistence: Option<SessionPersistence>,
}

/// `HTTPRoute.rules[].matches[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRouteMatch {
    /// `PathPrefix /` when absent.
    pub path: Option<HttpPathMatch>,
    /// The first of a name counts.
    pub headers: Vec<HttpHeaderMatch>,
    /// The first of a name counts.
    pub query_params: Vec<HttpHeaderMatch>,
    /// `GET`.
    pub method: Option<String>,
}

/// On a path.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct HttpPathMatch {
    /// `Exact`, `PathPrefix` (when absent), `RegularExpression`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// `/` when absent.
    pub value: Option<String>,
}

/// On a header or a query parameter.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct HttpHeaderMatch {
    /// `Exact` (when absent), `RegularExpression`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// Its name.
    pub name: String,
    /// On its value.
    pub value: String,
}

/// A filter: what its type names is set.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct HttpRouteFilter {
    #[serde(rename = "type")]
    pub type_: String,
    pub request_header_modifier: Option<HeaderModifier>,
    pub response_header_modifier: Option<HeaderModifier>,
    pub request_mirror: Option<RequestMirror>,
    pub request_redirect: Option<RequestRedirect>,
    pub url_rewrite: Option<UrlRewrite>,
    pub cors: Option<CorsFilter>,
    pub external_auth: Option<ExternalAuth>,
    pub extension_ref: Option<ExtensionRef>,
}

/// Changes of headers.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct HeaderModifier {
    pub set: Vec<HeaderValue>,
    pub add: Vec<HeaderValue>,
    pub remove: Vec<String>,
}

/// A header.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct HeaderValue {
    pub name: String,
    pub value: String,
}

/// Copies requests.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RequestMirror {
    /// To whom.
    pub backend_ref: BackendObjectRef,
    /// How many of 100.
    pub percent: Option<i32>,
    /// How many.
    pub fraction: Option<Fraction>,
}

/// A share.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct Fraction {
    /// So many.
    pub numerator: i32,
    /// Of so many; 100 when absent.
    pub denominator: Option<i32>,
}

/// Answers with a redirect.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct RequestRedirect {
    pub scheme: Option<String>,
    pub hostname: Option<String>,
    pub path: Option<PathModifier>,
    pub port: Option<i32>,
    pub status_code: Option<i32>,
}

/// A new path.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct PathModifier {
    #[serde(rename = "type")]
    pub type_: String,
    pub replace_full_path: Option<String>,
    pub replace_prefix_match: Option<String>,
}

/// Changes host and path.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct UrlRewrite {
    pub hostname: Option<String>,
    pub path: Option<PathModifier>,
}

/// Cross-origin requests.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct CorsFilter {
    pub allow_origins: Vec<String>,
    pub allow_credentials: Option<bool>,
    pub allow_methods: Vec<String>,
    pub allow_headers: Vec<String>,
    pub expose_headers: Vec<String>,
    pub max_age: Option<i32>,
}

/// Asks a server before the request goes on (GEP-1494).
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExternalAuth {
    /// `GRPC` or `HTTP`.
    pub protocol: String,
    /// The server.
    pub backend_ref: BackendObjectRef,
    /// For GRPC.
    pub grpc: Option<GrpcAuth>,
    /// For HTTP.
    pub http: Option<HttpAuth>,
    /// Part of the body.
    pub forward_body: Option<ForwardBody>,
}

/// `externalAuth.grpc`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcAuth {
    /// Headers that are sent.
    pub allowed_headers: Vec<String>,
}

/// `externalAuth.http`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpAuth {
    /// Put before the request's path.
    pub path: Option<String>,
    /// Headers that are sent.
    pub allowed_headers: Vec<String>,
    /// Headers of the answer that the backend gets.
    pub allowed_response_headers: Vec<String>,
}

/// `externalAuth.forwardBody`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ForwardBody {
    /// In bytes; 0: none.
    pub max_size: u32,
}

/// Somebody's own filter.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct ExtensionRef {
    pub group: String,
    pub kind: String,
    pub name: String,
}

/// `HTTPRoute.rules[].backendRefs[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "as BackendObjectRef")]
pub struct HttpBackendRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub name: String,
    pub namespace: Option<String>,
    pub port: Option<i32>,
    /// Relative share; 1 when absent.
    pub weight: Option<i32>,
    /// For this backend alone.
    pub filters: Vec<HttpRouteFilter>,
}

impl HttpBackendRef {
    /// What it refers to.
    pub fn object(&self) -> BackendObjectRef {
        BackendObjectRef {
            group: self.group.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            port: self.port,
        }
    }
}

/// `HTTPRoute.rules[].timeouts`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRouteTimeouts {
    /// Of the whole request (GEP-2257).
    pub request: Option<String>,
    /// Of one try.
    pub backend_request: Option<String>,
}

/// `HTTPRoute.rules[].retry`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct HttpRouteRetry {
    /// Statuses, 400 to 599.
    pub codes: Vec<i32>,
    /// Beside the first.
    pub attempts: Option<i32>,
    /// The least wait.
    pub backoff: Option<String>,
}

/// Keeps a client at its endpoint (GEP-1619).
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SessionPersistence {
    /// Name of the cookie or header (older releases).
    pub session_name: Option<String>,
    /// Ends the session.
    pub absolute_timeout: Option<String>,
    /// Ends it without requests; not supported.
    pub idle_timeout: Option<String>,
    /// `Cookie` (when absent) or `Header`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// Older releases' name of `cookie`.
    pub cookie_config: Option<CookieConfig>,
    /// Of a cookie.
    pub cookie: Option<CookieConfig>,
    /// Of a header.
    pub header: Option<HeaderConfig>,
}

/// `sessionPersistence.cookie`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CookieConfig {
    /// Its name.
    pub name: Option<String>,
    /// Its path.
    pub path: Option<String>,
    /// `Session` (when absent) or `Permanent`.
    pub lifetime_type: Option<String>,
}

/// `sessionPersistence.header`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct HeaderConfig {
    /// Its name.
    pub name: Option<String>,
}

/// What a `GRPCRoute` says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "as HttpRouteSpec")]
pub struct GrpcRouteSpec {
    pub parent_refs: Vec<ParentRef>,
    pub use_default_gateways: Option<String>,
    pub hostnames: Vec<String>,
    pub rules: Vec<GrpcRouteRule>,
}

/// `GRPCRoute.rules[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "as HttpRouteRule")]
pub struct GrpcRouteRule {
    pub name: Option<String>,
    pub matches: Vec<GrpcRouteMatch>,
    pub filters: Vec<GrpcRouteFilter>,
    pub backend_refs: Vec<GrpcBackendRef>,
    pub session_persistence: Option<SessionPersistence>,
}

/// `GRPCRoute.rules[].matches[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct GrpcRouteMatch {
    /// Service and method.
    pub method: Option<GrpcMethodMatch>,
    /// The first of a name counts.
    pub headers: Vec<HttpHeaderMatch>,
}

/// On a method.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct GrpcMethodMatch {
    /// `Exact` (when absent), `RegularExpression`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// Fully qualified.
    pub service: Option<String>,
    /// The method.
    pub method: Option<String>,
}

/// A filter of a `GRPCRoute`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct GrpcRouteFilter {
    #[serde(rename = "type")]
    pub type_: String,
    pub request_header_modifier: Option<HeaderModifier>,
    pub response_header_modifier: Option<HeaderModifier>,
    pub request_mirror: Option<RequestMirror>,
    pub extension_ref: Option<ExtensionRef>,
}

impl From<&GrpcRouteFilter> for HttpRouteFilter {
    fn from(filter: &GrpcRouteFilter) -> Self {
        Self {
            type_: filter.type_.clone(),
            request_header_modifier: filter.request_header_modifier.clone(),
            response_header_modifier: filter.response_header_modifier.clone(),
            request_mirror: filter.request_mirror.clone(),
            extension_ref: filter.extension_ref.clone(),
            ..Self::default()
        }
    }
}

/// `GRPCRoute.rules[].backendRefs[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "as HttpBackendRef")]
pub struct GrpcBackendRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub name: String,
    pub namespace: Option<String>,
    pub port: Option<i32>,
    pub weight: Option<i32>,
    pub filters: Vec<GrpcRouteFilter>,
}

impl From<&GrpcBackendRef> for HttpBackendRef {
    fn from(backend: &GrpcBackendRef) -> Self {
        Self {
            group: backend.group.clone(),
            kind: backend.kind.clone(),
            name: backend.name.clone(),
            namespace: backend.namespace.clone(),
            port: backend.port,
            weight: backend.weight,
            filters: backend.filters.iter().map(HttpRouteFilter::from).collect(),
        }
    }
}

/// What a `TLSRoute` says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "as HttpRouteSpec")]
pub struct TlsRouteSpec {
    pub parent_refs: Vec<ParentRef>,
    pub use_default_gateways: Option<String>,
    /// SNI names.
    pub hostnames: Vec<String>,
    pub rules: Vec<StreamRule>,
}

/// What a `TCPRoute` says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "as HttpRouteSpec")]
pub struct TcpRouteSpec {
    pub parent_refs: Vec<ParentRef>,
    pub use_default_gateways: Option<String>,
    pub rules: Vec<StreamRule>,
}

/// `TLSRoute.rules[]`, `TCPRoute.rules[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "as HttpRouteRule")]
pub struct StreamRule {
    pub name: Option<String>,
    pub backend_refs: Vec<StreamBackendRef>,
}

/// `TLSRoute.rules[].backendRefs[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "as HttpBackendRef")]
pub struct StreamBackendRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub name: String,
    pub namespace: Option<String>,
    pub port: Option<i32>,
    pub weight: Option<i32>,
}

impl From<&StreamBackendRef> for HttpBackendRef {
    fn from(backend: &StreamBackendRef) -> Self {
        Self {
            group: backend.group.clone(),
            kind: backend.kind.clone(),
            name: backend.name.clone(),
            namespace: backend.namespace.clone(),
            port: backend.port,
            weight: backend.weight,
            filters: Vec::new(),
        }
    }
}

/// `ReferenceGrant`.
pub type ReferenceGrant = Custom<ReferenceGrantSpec, Value>;

/// Which objects of other namespaces may refer to some of this one.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct ReferenceGrantSpec {
    /// ORed.
    pub from: Vec<GrantFrom>,
    /// ORed.
    pub to: Vec<GrantTo>,
}

/// `ReferenceGrant.from[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct GrantFrom {
    pub group: String,
    pub kind: String,
    pub namespace: String,
}

/// `ReferenceGrant.to[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct GrantTo {
    /// API group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// One object; none: all of the kind.
    pub name: Option<String>,
}

/// A target of a policy, in the policy's own namespace.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyTargetRef {
    /// API group; empty for core.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// A port's name.
    pub section_name: Option<String>,
}

/// `BackendTLSPolicy`.
pub type BackendTlsPolicy = Custom<BackendTlsPolicySpec, PolicyStatus>;

/// What is said of a policy, per ancestor and controller.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct PolicyStatus {
    /// Entries of all controllers.
    pub ancestors: Value,
}

/// TLS to a backend.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTlsPolicySpec {
    /// Services.
    pub target_refs: Vec<PolicyTargetRef>,
    /// How the backend proves itself.
    pub validation: BackendTlsValidation,
    /// An implementation's own.
    pub options: Value,
}

/// `BackendTLSPolicy.validation`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTlsValidation {
    /// ConfigMaps with `ca.crt`.
    pub ca_certificate_refs: Vec<LocalObjectRef>,
    /// `System`.
    #[serde(rename = "wellKnownCACertificates")]
    pub well_known_ca_certificates: Option<String>,
    /// The SNI, and the certificate's name where no other is given.
    pub hostname: String,
    /// One of these must be in the certificate.
    pub subject_alt_names: Vec<SubjectAltName>,
}

/// An object of the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct LocalObjectRef {
    pub group: String,
    pub kind: String,
    pub name: String,
}

/// `BackendTLSPolicy.validation.subjectAltNames[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct SubjectAltName {
    /// `Hostname` or `URI`.
    #[serde(rename = "type")]
    pub type_: String,
    /// For `Hostname`.
    pub hostname: Option<String>,
    /// For `URI`.
    pub uri: Option<String>,
}

/// `XBackendTrafficPolicy`.
pub type BackendTrafficPolicy = Custom<BackendTrafficPolicySpec, PolicyStatus>;

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTrafficPolicySpec {
    /// Services.
    pub target_refs: Vec<PolicyTargetRef>,
    /// How many retries may be.
    pub retry_constraint: Option<RetryConstraint>,
    /// Keeps a client at its endpoint.
    pub session_persistence: Option<SessionPersistence>,
}

/// `XBackendTrafficPolicy.retryConstraint`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryConstraint {
    /// A share of requests.
    pub budget: Option<Budget>,
    /// Always allowed.
    pub min_retry_rate: Option<RequestRate>,
}

/// `retryConstraint.budget`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct Budget {
    /// 20 when absent.
    pub percent: Option<i32>,
    /// 10 s when absent.
    pub interval: Option<String>,
}

/// `retryConstraint.minRetryRate`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct RequestRate {
    /// 10 when absent.
    pub count: Option<i32>,
    /// 1 s when absent.
    pub interval: Option<String>,
}
