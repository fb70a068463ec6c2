//! What is told of requests to one service: the Telemetry that applies and the waypoint's settings, made ready once.

use std::sync::Arc;

use mesh::{
    l7::{
        config::{LogProvider, TraceProtocol, TraceProvider, WaypointConfig},
        expression::{Expression, Wanted},
        log_format::{Environment, Format},
        record::RequestRecord,
        telemetry::{AccessLogging, MetricOverride, TagSource, Telemetry},
        trace::Propagation,
    },
    names::{NamespacedHostname, Str},
};

use super::metrics::{Metric, Metrics};

/// What is told of requests.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The headers that it looks at.
    pub(super) wanted: Wanted,
    pub(super) logs: Vec<Log>,
    pub(super) tracing: Option<Tracing>,
    pub(super) metrics: Vec<MetricGroup>,
}

/// One access log.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) filter: Option<Expression>,
    pub(super) format: Format,
    pub(super) sink: Sink,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sink {
    /// Our own output: no file of a container is one that somebody reads.
    Output,
    /// OTLP.
    Collector(LogCollector),
}

/// A collector of logs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct LogCollector {
    pub(super) service: NamespacedHostname,
    pub(super) port: u16,
    pub(super) log_name: Str,
}

/// How requests are traced.
#[derive(Debug)]
pub(super) struct Tracing {
    pub(super) providers: Vec<(Str, TraceProvider)>,
    pub(super) propagation: Option<Propagation>,
    pub(super) per_million: u32,
    /// Whether equal request ids have equal decisions.
    pub(super) by_request_id: bool,
    /// Whether spans have Istio's own tags.
    pub(super) istio_tags: bool,
    pub(super) tags: Vec<(Str, TagSource)>,
}

/// Families with the same changes of labels.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetricGroup {
    metrics: Metrics,
    /// None: taken away. An expression that cannot be read is told as `unknown`.
    tags: Vec<(Str, Option<Option<Expression>>)>,
}

impl MetricGroup {
    pub(super) fn metrics(&self) -> Metrics {
        self.metrics
    }

    /// The labels that are changed, for a request.
    pub(super) fn changed(&self, record: &RequestRecord) -> Arc<[(Str, Option<Str>)]> {
        let tags = self.tags.iter().map(|(name, tag)| {
            let value = tag.as_ref().map(|expression| {
                let value = expression.as_ref().and_then(|it| it.evaluate(record));
                value.map_or_else(|| "unknown".into(), |it| it.to_string().into())
            });
            (name.clone(), value)
        });
        tags.collect()
    }
}

impl Plan {
    /// `told`: the most specific Telemetry of the service.
    pub(super) fn new(
        config: Option<&WaypointConfig>,
        told: Option<&Telemetry>,
        environment: &dyn Environment,
    ) -> Self {
        let overrides = told.map_or(&[][..], |it| &it.metrics.overrides);
        let Some(config) = config else {
            return Self {
                metrics: metric_groups(overrides),
                ..Self::default()
            };
        };
        let mut plan = Self {
            wanted: Wanted::default(),
            logs: logs(config, told, environment),
            tracing: tracing(config, told),
            metrics: metric_groups(overrides),
        };
        plan.want();
        plan
    }

    fn want(&mut self) {
        let id = http::HeaderName::from_static("x-request-id");
        Wanted::add(&mut self.wanted.request, &id);
        for log in &self.logs {
            log.format.wanted(&mut self.wanted);
            log.filter.iter().for_each(|it| it.wanted(&mut self.wanted));
        }
        for (_, tag) in self.metrics.iter().flat_map(|group| &group.tags) {
            let expression = tag.iter().flatten();
            expression.for_each(|it| it.wanted(&mut self.wanted));
        }
        let Some(tracing) = &self.tracing else {
            return;
        };
        Wanted::add(&mut self.wanted.request, &http::header::USER_AGENT);
        for (_, source) in &tracing.tags {
            if let TagSource::Header(name, _) = source
                && let Ok(name) = name.parse()
            {
                Wanted::add(&mut self.wanted.request, &name);
            }
        }
    }
}

fn logs(
    config: &WaypointConfig,
    told: Option<&Telemetry>,
    environment: &dyn Environment,
) -> Vec<Log> {
    let settings;
    let wanted = match told.and_then(|it| it.access_logs.as_ref()) {
        Some(wanted) => wanted,
        None => {
            settings = [AccessLogging {
                providers: config.access_logs.clone(),
                disabled: false,
                filter: None,
            }];
            &settings[..]
        }
    };
    let wanted = wanted.iter().filter(|it| !it.disabled);
    let pairs = wanted.flat_map(|it| it.providers.iter().map(move |name| (it, name)));
    pairs
        .filter_map(|(wanted, name)| log(config.log_providers.get(name)?, wanted, environment))
        .collect()
}

/// None: the filter cannot be read, and no request is one that it lets pass; the control plane has said so.
fn log(
    provider: &LogProvider,
    wanted: &AccessLogging,
    environment: &dyn Environment,
) -> Option<Log> {
    let filter = match &wanted.filter {
        Some(source) => Some(Expression::parse(source).ok()?),
        None => None,
    };
    let (format, sink) = match provider {
        LogProvider::File { format, .. } => (format, Sink::Output),
        LogProvider::OpenTelemetry {
            service,
            port,
            log_name,
            format,
        } => {
            let collector = LogCollector {
                service: service.clone(),
                port: *port,
                log_name: log_name.clone(),
            };
            (format, Sink::Collector(collector))
        }
    };
    // A format that cannot be read was refused by the control plane; the default still tells what happened.
    let default = || Format::new(&mesh::l7::config::LogFormat::DefaultText, environment);
    let format = Format::new(format, environment).or_else(|_| default());
    Some(Log {
        filter,
        format: format.ok()?,
        sink,
    })
}

fn tracing(config: &WaypointConfig, told: Option<&Telemetry>) -> Option<Tracing> {
    let own = told.and_then(|it| it.tracing.as_ref());
    let names = match own.filter(|it| !it.providers.is_empty()) {
        Some(own) => &own.providers,
        None => &config.tracing,
    };
    let found = |name: &Str| Some((name.clone(), config.trace_providers.get(name)?.clone()));
    let providers: Vec<_> = names.iter().filter_map(found).collect();
    let propagation = providers
        .iter()
        .map(|(_, provider)| match provider.protocol {
            TraceProtocol::OtlpGrpc | TraceProtocol::OtlpHttp(_) => Propagation::W3c,
            TraceProtocol::Zipkin { with_w3c: true, .. } => Propagation::Both,
            TraceProtocol::Zipkin { .. } => Propagation::B3,
        });
    let propagation = propagation.reduce(|one, other| match one == other {
        true => one,
        false => Propagation::Both,
    })?;
    let silent = own.is_some_and(|it| it.disabled);
    let untouched = own.is_some_and(|it| it.propagation_disabled);
    Some(Tracing {
        providers: if silent { Vec::new() } else { providers },
        propagation: (!untouched).then_some(propagation),
        per_million: own
            .and_then(|it| it.sampling_per_million)
            .unwrap_or(config.sampling_per_million),
        by_request_id: own.is_none_or(|it| !it.sampling_by_chance),
        istio_tags: own.is_none_or(|it| !it.istio_tags_disabled),
        tags: own.map(|it| it.tags.clone()).unwrap_or_default(),
    })
}

/// Families with equal changes share a series.
fn metric_groups(overrides: &[MetricOverride]) -> Vec<MetricGroup> {
    let mut groups: Vec<MetricGroup> = Vec::new();
    for metric in Metric::ALL {
        let Some(tags) = tags_of(metric, overrides) else {
            continue;
        };
        match groups.iter_mut().find(|group| group.tags == tags) {
            Some(group) => group.metrics = group.metrics.with(metric),
            None => groups.push(MetricGroup {
                metrics: Metrics::NONE.with(metric),
                tags,
            }),
        }
    }
    groups
}

type Tags = Vec<(Str, Option<Option<Expression>>)>;

/// None: it is disabled.
fn tags_of(metric: Metric, overrides: &[MetricOverride]) -> Option<Tags> {
    let mut tags: Tags = Vec::new();
    let mut disabled = false;
    let named = |it: &&MetricOverride| {
        let name = it.metric.as_deref();
        name.is_none_or(|name| name == metric.name())
    };
    for it in overrides.iter().filter(named) {
        disabled = it.disabled;
        for (name, value) in &it.tags {
            tags.retain(|(earlier, _)| earlier != name);
            let value = value.as_ref().map(|source| Expression::parse(source).ok());
            tags.push((name.clone(), value));
        }
    }
    (!disabled).then_some(tags)
}

#[cfg(test)]
pub(super) mod tests;
