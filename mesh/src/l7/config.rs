//! What holds for a whole waypoint: its Gateway's and MeshConfig's settings.

use std::{collections::BTreeMap, time::Duration};

use http::HeaderName;

use crate::{
    identity::TrustDomain,
    names::{NamespacedHostname, Str},
};

/// Settings of one waypoint; one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WaypointConfig {
    /// Accepted in clients' certificates beside the own one; principals of these and of the own one are the same.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// `meshConfig.pathNormalization`.
    pub normalization: Normalization,
    /// By name.
    pub authorizers: BTreeMap<Str, ExternalAuthorizer>,
    /// By name.
    pub log_providers: BTreeMap<Str, LogProvider>,
    /// By name.
    pub trace_providers: BTreeMap<Str, TraceProvider>,
    /// Where no Telemetry says otherwise: names of log providers.
    pub access_logs: Vec<Str>,
    /// Where no Telemetry says otherwise: names of trace providers.
    pub tracing: Vec<Str>,
    /// Parts per million; Istio's default is 10,000 (1%).
    pub sampling_per_million: u32,
    /// Whether the inner request gets `x-forwarded-client-cert` with the client's identity
    /// (`ambient.istio.io/xfcc-include-client-identity`).
    pub forward_client_identity: bool,
    /// In the place of the default retry policy (`meshConfig.defaultHttpRetryPolicy`).
    pub default_retry: Option<super::route::RetryPolicy>,
    /// Of `x-request-id`, `server`, ... (ProxyConfig `proxyHeaders`).
    pub headers: ProxyHeaders,
    /// Bounds of histograms other than the usual ones (`sidecar.istio.io/statsHistogramBuckets`).
    pub histogram_buckets: Vec<HistogramBuckets>,
}

/// Bounds of some histograms.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramBuckets {
    /// What the metrics' names begin with; the longest that fits counts.
    pub prefix: Str,
    /// Upper bounds, ascending, finite; not empty.
    pub bounds: Vec<f64>,
}

// Bounds are finite.
impl Eq for HistogramBuckets {}

impl HistogramBuckets {
    /// At most this many bounds: each is a series of every label set.
    pub const MOST: usize = 64;

    /// None where the bounds are none, are too many, or do not ascend from above 0.
    pub fn new(prefix: &str, bounds: Vec<f64>) -> Option<Self> {
        let ascend = bounds.windows(2).all(|two| two[0] < two[1]);
        let finite = bounds.iter().all(|it| it.is_finite() && *it > 0.0);
        let fits = !bounds.is_empty() && bounds.len() <= Self::MOST && ascend && finite;
        fits.then(|| Self {
            prefix: prefix.into(),
            bounds,
        })
    }
}

impl WaypointConfig {
    /// Bounds of a histogram other than the usual ones. Names are as Envoy has them too: `istiocustom.istio_request_bytes`.
    pub fn bounds_of(&self, metric: &str) -> Option<&[f64]> {
        let of_envoy = format!("istiocustom.{metric}");
        let fits = |it: &&HistogramBuckets| {
            metric.starts_with(&*it.prefix) || of_envoy.starts_with(&*it.prefix)
        };
        let all = self.histogram_buckets.iter().filter(fits);
        let longest = all.max_by_key(|it| it.prefix.len());
        longest.map(|it| &*it.bounds)
    }
}

/// `meshConfig.pathNormalization.normalization`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Normalization {
    /// Nothing.
    None,
    /// RFC 3986, backslashes are slashes.
    #[default]
    Base,
    /// And `//` is `/`.
    MergeSlashes,
    /// `%2F` and `%5C` are decoded first.
    DecodeAndMergeSlashes,
}

/// ProxyConfig `proxyHeaders`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyHeaders {
    /// No `x-request-id` is made.
    pub request_id_disabled: bool,
    /// None: passed through; else this value.
    pub server: Option<Str>,
    /// Whether `x-envoy-attempt-count` is added.
    pub attempt_count: bool,
    /// Whether `x-envoy-upstream-service-time` and such are added.
    pub debug_headers: bool,
    /// Whether `x-forwarded-host` tells the host that was asked for, where another one is in its place.
    pub forwarded_host: bool,
    /// Whether `x-forwarded-port` tells the port that was asked for.
    pub forwarded_port: bool,
}

/// An external authorizer (`meshConfig.extensionProviders`, HTTPRoute filter ExternalAuth).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalAuthorizer {
    /// Its service.
    pub service: NamespacedHostname,
    /// Its port.
    pub port: u16,
    /// How it is asked.
    pub protocol: AuthorizerProtocol,
    /// Of one question.
    pub timeout: Duration,
    /// Whether requests pass while it does not answer; the user's explicit choice.
    pub fail_open: bool,
    /// The answer while it does not answer.
    pub status_on_error: u16,
    /// How much of the body it gets.
    pub body: Option<AuthorizerBody>,
}

/// The part of a body that an authorizer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AuthorizerBody {
    /// In bytes.
    pub max_bytes: u32,
    /// Whether a longer body is cut; else it is answered 413.
    pub allow_partial: bool,
    /// As bytes (gRPC).
    pub as_bytes: bool,
}

/// How an authorizer is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthorizerProtocol {
    /// `envoy.service.auth.v3.Authorization/Check`. Headers that are sent; empty: all.
    Grpc {
        /// Lower case; `x-*`: prefix.
        allowed_headers: Vec<Str>,
    },
    /// A request like the client's, to `path_prefix` and its path.
    Http {
        /// May be empty.
        path_prefix: Str,
        /// Of the client's request, beside `host`, `:method`, `:path`, `content-length`, `authorization`; `x-*`: prefix.
        allowed_headers: Vec<Str>,
        /// Added to the question.
        add_headers: Vec<(HeaderName, Str)>,
        /// Of the answer, to the backend; `x-*`: prefix.
        to_upstream: Vec<Str>,
        /// Of a refusal, to the client; empty: all; `x-*`: prefix.
        to_client_on_deny: Vec<Str>,
        /// Of an approval, to the client; `x-*`: prefix.
        to_client_on_allow: Vec<Str>,
    },
}

/// Where access logs go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogProvider {
    /// A file of the waypoint; `/dev/stdout`.
    File {
        /// Path.
        path: Str,
        /// Its lines.
        format: LogFormat,
    },
    /// OTLP logs over gRPC.
    OpenTelemetry {
        /// Its service.
        service: NamespacedHostname,
        /// Its port.
        port: u16,
        /// Name of the log.
        log_name: Str,
        /// The body's text and attributes.
        format: LogFormat,
    },
}

/// A line of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Istio's default text.
    DefaultText,
    /// Istio's default JSON.
    DefaultJson,
    /// With `%COMMAND(arguments):length%`.
    Text(Str),
    /// Keys in order, values with `%COMMAND%`.
    Json(Vec<(Str, Str)>),
}

/// Where spans go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceProvider {
    /// Its service.
    pub service: NamespacedHostname,
    /// Its port.
    pub port: u16,
    /// In what form.
    pub protocol: TraceProtocol,
    /// Longest text of an attribute, in bytes; 0: 256.
    pub max_tag_length: u32,
    /// Of one export.
    pub timeout: Option<Duration>,
    /// Added to each export.
    pub headers: Vec<(HeaderName, Str)>,
}

/// The form of spans.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TraceProtocol {
    /// OTLP over gRPC.
    OtlpGrpc,
    /// OTLP over HTTP to this path.
    OtlpHttp(Str),
    /// Zipkin v2 JSON to this path.
    Zipkin {
        /// `/api/v2/spans`.
        path: Str,
        /// Whether W3C headers are propagated beside B3.
        with_w3c: bool,
    },
}
