//! Telemetry to what a waypoint tells of requests, merged: the root namespace's, the waypoint's namespace's, that of its
//! class, that of its Gateway, that of a service.
//!
//! Each level replaces what it names: access logs as a whole, tracing field by field; changes of metrics are added. A
//! waypoint is a server: what is for clients only has no effect.

use std::collections::BTreeMap;

use mesh::{
    l7::{
        expression::Expression,
        name::Target,
        telemetry::{AccessLogging, MetricOptions, MetricOverride, TagSource, Telemetry, Tracing},
    },
    names::{PolicyKey, Str},
};

use super::read::per_million;
use crate::{
    crd::istio::{self as crd, IstioMetric, TagOperation, TelemetrySpec, WorkloadMode},
    object::{Name, Telemetry as Object},
    translate::{l7, l7::keyed},
    validate::Findings,
};

/// A Telemetry that concerns a waypoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// The object.
    pub object: std::sync::Arc<Object>,
    /// Services; empty: everything that passes the waypoint.
    pub services: Vec<Target>,
}

/// The resources of one waypoint. `levels`: those for everything, the least specific first, then those for services.
pub fn resources(
    waypoint: &Name,
    levels: &[Level],
) -> Vec<(l7::Key, std::sync::Arc<mesh::l7::view::Resource>)> {
    let mut base = Merged::default();
    let mut whole: Option<PolicyKey> = None;
    for level in levels.iter().filter(|level| level.services.is_empty()) {
        base.lay_over(&level.object.spec);
        whole = Some(key(&level.object));
    }
    let mut found: BTreeMap<PolicyKey, Telemetry> = BTreeMap::new();
    if let Some(key) = whole {
        let targets = vec![Target::Waypoint];
        found.insert(key.clone(), base.clone().finished(key, targets));
    }
    for level in levels.iter().filter(|level| !level.services.is_empty()) {
        let key = key(&level.object);
        match found.get_mut(&key) {
            // The waypoint's most specific one has targets among its services too.
            Some(known) => known.targets.extend(level.services.iter().cloned()),
            None => {
                let mut merged = base.clone();
                merged.lay_over(&level.object.spec);
                found.insert(key.clone(), merged.finished(key, level.services.clone()));
            }
        }
    }
    let resource = |telemetry| keyed(waypoint, mesh::l7::view::Resource::Telemetry(telemetry));
    found.into_values().map(resource).collect()
}

fn key(object: &Object) -> PolicyKey {
    PolicyKey {
        namespace: object.meta.name.namespace.clone(),
        name: object.meta.name.name.clone(),
    }
}

/// The parts of several levels.
#[derive(Clone, Debug, Default)]
struct Merged {
    metrics: MetricOptions,
    access_logs: Option<Vec<AccessLogging>>,
    tracing: Option<Tracing>,
}

impl Merged {
    fn lay_over(&mut self, spec: &TelemetrySpec) {
        let none = &mut Findings::default();
        self.metrics.overrides.extend(overrides(spec, none));
        let inherited: Vec<Str> = self
            .access_logs
            .iter()
            .flatten()
            .flat_map(|it| it.providers.clone())
            .collect();
        let logs: Vec<AccessLogging> = spec
            .access_logging
            .iter()
            .filter(|it| is_for_servers(it.matches.as_ref()))
            .map(|it| access_logging(it, &inherited))
            .collect();
        if !logs.is_empty() {
            self.access_logs = Some(logs);
        }
        for it in spec
            .tracing
            .iter()
            .filter(|it| is_for_servers(it.matches.as_ref()))
        {
            tracing(it, self.tracing.get_or_insert_default(), "", none);
        }
    }

    fn finished(self, key: PolicyKey, targets: Vec<Target>) -> Telemetry {
        Telemetry {
            key,
            targets,
            metrics: self.metrics,
            access_logs: self.access_logs,
            tracing: self.tracing,
        }
    }
}

fn is_for_servers(it: Option<&crd::ModeSelector>) -> bool {
    it.is_none_or(|it| it.mode != WorkloadMode::Client)
}

fn names(providers: &[crd::ProviderRef]) -> Vec<Str> {
    providers
        .iter()
        .map(|provider| provider.name.as_str().into())
        .collect()
}

fn access_logging(it: &crd::AccessLogging, inherited: &[Str]) -> AccessLogging {
    let own = names(&it.providers);
    AccessLogging {
        providers: if own.is_empty() {
            inherited.to_vec()
        } else {
            own
        },
        disabled: it.disabled.unwrap_or_default(),
        filter: it
            .filter
            .as_ref()
            .map(|filter| filter.expression.as_str().into()),
    }
}

fn tracing(it: &crd::Tracing, merged: &mut Tracing, path: &str, found: &mut Findings) {
    if !it.providers.is_empty() {
        merged.providers = names(&it.providers);
    }
    if let Some(percent) = it.random_sampling_percentage {
        let path = format!("{path}.randomSamplingPercentage");
        merged.sampling_per_million = per_million(percent, &path, found);
    }
    if let Some(disabled) = it.disable_span_reporting {
        merged.disabled = disabled;
    }
    if let Some(disabled) = it.disable_context_propagation {
        merged.propagation_disabled = disabled;
    }
    if let Some(follows) = it.use_request_id_for_trace_sampling {
        merged.sampling_by_chance = !follows;
    }
    if let Some(wanted) = it.enable_istio_tags {
        merged.istio_tags_disabled = !wanted;
    }
    if !it.custom_tags.is_empty() {
        let tags = it.custom_tags.iter();
        merged.tags = tags
            .filter_map(|(name, tag)| {
                let source = tag_source(tag, &format!("{path}.customTags.{name}"), found)?;
                Some((name.as_str().into(), source))
            })
            .collect();
    }
}

fn tag_source(it: &crd::CustomTag, path: &str, found: &mut Findings) -> Option<TagSource> {
    let given = [
        it.literal.is_some(),
        it.environment.is_some(),
        it.header.is_some(),
        it.formatter.is_some(),
    ];
    if given.into_iter().filter(|given| *given).count() != 1 {
        found.error(path, "needs one of literal, environment and header");
        return None;
    }
    let named = |it: &crd::NamedTag, way: &str, found: &mut Findings| {
        if it.name.is_empty() {
            found.error(format!("{path}.{way}.name"), "is empty");
        }
        let default = (!it.default_value.is_empty()).then(|| it.default_value.as_str().into());
        (Str::from(it.name.as_str()), default)
    };
    if let Some(it) = &it.literal {
        if it.value.is_empty() {
            found.error(format!("{path}.literal.value"), "is empty");
        }
        return Some(TagSource::Literal(it.value.as_str().into()));
    }
    if let Some(it) = &it.environment {
        let (name, default) = named(it, "environment", found);
        return Some(TagSource::Environment(name, default));
    }
    if let Some(it) = &it.header {
        let (name, default) = named(it, "header", found);
        return Some(TagSource::Header(name, default));
    }
    found.warning(
        format!("{path}.formatter"),
        "has no effect at a waypoint: the tag is left out",
    );
    None
}

fn overrides(spec: &TelemetrySpec, found: &mut Findings) -> Vec<MetricOverride> {
    let mut overrides = Vec::new();
    for (index, metrics) in spec.metrics.iter().enumerate() {
        let others = !metrics.providers.is_empty()
            && metrics
                .providers
                .iter()
                .all(|provider| provider.name != "prometheus");
        if others {
            found.warning(
                format!("spec.metrics[{index}].providers"),
                "has no effect: waypoints tell metrics to Prometheus only",
            );
            continue;
        }
        if metrics.reporting_interval.is_some() {
            found.warning(
                format!("spec.metrics[{index}].reportingInterval"),
                "has no effect: TCP metrics are told every 5 s",
            );
        }
        for (place, it) in metrics.overrides.iter().enumerate() {
            let path = format!("spec.metrics[{index}].overrides[{place}]");
            overrides.extend(metric_override(it, &path, found));
        }
    }
    overrides
}

/// `None`: for clients only.
fn metric_override(
    it: &crd::MetricsOverrides,
    path: &str,
    found: &mut Findings,
) -> Option<MetricOverride> {
    let mut tags = Vec::new();
    for (tag, change) in &it.tag_overrides {
        let path = format!("{path}.tagOverrides.{tag}");
        let value = change.value.as_str();
        match change.operation {
            TagOperation::Remove if !value.is_empty() => {
                found.error(format!("{path}.value"), "REMOVE has no value")
            }
            TagOperation::Upsert if value.is_empty() => {
                found.error(format!("{path}.value"), "UPSERT needs a value")
            }
            TagOperation::Remove => tags.push((tag.as_str().into(), None)),
            TagOperation::Upsert => {
                expression(value, &format!("{path}.value"), found);
                tags.push((tag.as_str().into(), Some(value.into())));
            }
        }
    }
    let none = crd::MetricSelector::default();
    let selector = it.matches.as_ref().unwrap_or(&none);
    if selector.mode == WorkloadMode::Client {
        return None;
    }
    let custom = selector.custom_metric.as_deref().map(Str::from);
    Some(MetricOverride {
        metric: custom.or_else(|| metric(selector.metric.unwrap_or_default()).map(Str::from)),
        disabled: it.disabled.unwrap_or_default(),
        tags,
    })
}

/// The name on the wire of Prometheus; `None`: all.
fn metric(metric: IstioMetric) -> Option<&'static str> {
    Some(match metric {
        IstioMetric::AllMetrics => return None,
        IstioMetric::RequestCount => "istio_requests_total",
        IstioMetric::RequestDuration => "istio_request_duration_milliseconds",
        IstioMetric::RequestSize => "istio_request_bytes",
        IstioMetric::ResponseSize => "istio_response_bytes",
        IstioMetric::TcpOpenedConnections => "istio_tcp_connections_opened_total",
        IstioMetric::TcpClosedConnections => "istio_tcp_connections_closed_total",
        IstioMetric::TcpSentBytes => "istio_tcp_sent_bytes_total",
        IstioMetric::TcpReceivedBytes => "istio_tcp_received_bytes_total",
        IstioMetric::GrpcRequestMessages => "istio_request_messages_total",
        IstioMetric::GrpcResponseMessages => "istio_response_messages_total",
    })
}

fn expression(text: &str, path: &str, found: &mut Findings) {
    if let Err(error) = Expression::parse(text) {
        found.warning(
            path,
            format!("{text:?} cannot be evaluated by waypoints: {error}"),
        );
    }
}

/// What admission says.
pub fn check(spec: &TelemetrySpec, found: &mut Findings) {
    overrides(spec, found);
    for (index, it) in spec.tracing.iter().enumerate() {
        tracing(
            it,
            &mut Tracing::default(),
            &format!("spec.tracing[{index}]"),
            found,
        );
        if it.providers.len() > 1 {
            found.error(
                format!("spec.tracing[{index}].providers"),
                "has more than one",
            );
        }
    }
    for (index, it) in spec.access_logging.iter().enumerate() {
        let path = format!("spec.accessLogging[{index}].filter.expression");
        match &it.filter {
            Some(filter) if filter.expression.is_empty() => found.error(path, "is empty"),
            Some(filter) => expression(&filter.expression, &path, found),
            None => {}
        }
    }
}

/// The providers that an object names, to say which are not there.
pub fn providers(spec: &TelemetrySpec) -> Vec<&str> {
    let logs = spec.access_logging.iter().flat_map(|it| &it.providers);
    let traces = spec.tracing.iter().flat_map(|it| &it.providers);
    logs.chain(traces)
        .map(|provider| provider.name.as_str())
        .collect()
}
