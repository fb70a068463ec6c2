//! What is told of requests (Istio Telemetry API, merged by the control plane): the model.

use super::name::Target;
use crate::names::{PolicyKey, Str};

/// Telemetry of one target. The one of the service wins over the waypoint's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telemetry {
    /// The most specific object that it was merged from.
    pub key: PolicyKey,
    /// What it is for; exactly these.
    pub targets: Vec<Target>,
    /// Metrics.
    pub metrics: MetricOptions,
    /// None: as the waypoint's configuration says.
    pub access_logs: Option<Vec<AccessLogging>>,
    /// None: as the waypoint's configuration says.
    pub tracing: Option<Tracing>,
}

/// Options of metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetricOptions {
    /// In order; later ones win.
    pub overrides: Vec<MetricOverride>,
}

/// Changes of one metric or of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricOverride {
    /// The metric's name on the wire of Prometheus (`istio_requests_total`); none: all.
    pub metric: Option<Str>,
    /// Whether it is not kept at all.
    pub disabled: bool,
    /// By label: none removes it, else a CEL expression is its value.
    pub tags: Vec<(Str, Option<Str>)>,
}

/// One access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLogging {
    /// Names of [`LogProvider`](super::config::LogProvider)s.
    pub providers: Vec<Str>,
    /// Whether it is off.
    pub disabled: bool,
    /// A CEL expression; requests for which it is not true are left out.
    pub filter: Option<Str>,
}

/// Tracing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tracing {
    /// Names of [`TraceProvider`](super::config::TraceProvider)s.
    pub providers: Vec<Str>,
    /// Parts per million of requests without a decision of their own; none: as configured.
    pub sampling_per_million: Option<u32>,
    /// Whether no spans are sent.
    pub disabled: bool,
    /// Further attributes of spans.
    pub tags: Vec<(Str, TagSource)>,
    /// Whether headers are not touched.
    pub propagation_disabled: bool,
    /// Whether requests are chosen by chance alone, and not by their ids.
    pub sampling_by_chance: bool,
    /// Whether spans are without Istio's own tags.
    pub istio_tags_disabled: bool,
}

/// Where an attribute's value comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TagSource {
    /// This.
    Literal(Str),
    /// An environment variable of the waypoint, and its default.
    Environment(Str, Option<Str>),
    /// A request's header, and its default.
    Header(Str, Option<Str>),
}
