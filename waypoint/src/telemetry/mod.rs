//! What is told of requests: metrics, access logs, spans, all of one [`RequestRecord`] at the end of each request.

mod export;
mod labels;
mod metrics;
mod otlp;
mod plan;
mod span;
mod zipkin;

use std::{collections::HashMap, fmt, sync::Arc};

use http::HeaderMap;
use mesh::{
    draw::Draw,
    l7::{
        config::WaypointConfig,
        expression::Wanted,
        log_format::Environment,
        record::{RequestRecord, header_bytes},
        telemetry::Telemetry as Options,
        trace,
    },
    names::Str,
};
use net::metrics::Families;
use parking_lot::RwLock;
use prometheus_client::{metrics::counter::Counter, registry::Registry};

use crate::service_call::Transport;
use export::{Exporters, Queue};
use metrics::{PolicyMatches, Requests};
use otlp::LogData;
use plan::{Plan, Sink};
use span::SpanData;

/// Who tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// Name of the pod.
    pub(crate) pod: Str,
    /// As on xDS.
    pub(crate) id: Str,
    /// The Gateway.
    pub(crate) workload: Str,
    pub(crate) namespace: Str,
    pub(crate) cluster: Str,
    pub(crate) mesh_id: Str,
}

/// Takes lines of access logs. Never waits; false: there was no room.
pub(crate) trait Output: Send + Sync + 'static {
    fn line(&self, line: &[u8]) -> bool;
}

/// Tells of requests. One per process.
pub(crate) struct Telemetry {
    node: Arc<Node>,
    output: Option<Box<dyn Output>>,
    requests: Requests,
    exporters: Exporters,
    lost_lines: Counter,
    /// Policies that matched and changed nothing.
    pub(crate) policies: PolicyMatches,
    plans: RwLock<Plans>,
}

/// Plans as of one configuration, by the address of the Telemetry that they were made of.
#[derive(Default)]
struct Plans {
    config: Option<Arc<WaypointConfig>>,
    by_options: HashMap<usize, (Option<Arc<Options>>, Arc<Ready>)>,
}

/// A plan with its queues.
struct Ready {
    plan: Plan,
    spans: Vec<Queue<Arc<SpanData>>>,
    logs: Vec<Option<Queue<LogData>>>,
}

/// What is kept of a request until it is told.
pub(crate) struct Observed {
    ready: Arc<Ready>,
    span: Option<trace::Span>,
    request_headers: HeaderMap,
    request_header_bytes: u64,
    response_headers: HeaderMap,
    response_header_bytes: u64,
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observed")
            .field("span", &self.span)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// The process's own environment, for formats and tags that ask for it.
struct Process<'a>(&'a Node);

impl Environment for Process<'_> {
    fn hostname(&self) -> Option<String> {
        Some(self.0.pod.to_string())
    }

    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }
}

impl Telemetry {
    /// What scrapers read of requests.
    pub(crate) fn families(&self) -> Arc<dyn Families> {
        Arc::new(self.requests.clone())
    }

    /// `output`: where access logs go that name a file; none: nowhere.
    pub(crate) fn register(
        registry: &mut Registry,
        node: Node,
        output: Option<Box<dyn Output>>,
        transport: Arc<dyn Transport>,
    ) -> Self {
        let node = Arc::new(node);
        let new = Self {
            output,
            requests: Requests::register(registry),
            exporters: Exporters::register(registry, Arc::clone(&node), transport),
            lost_lines: Counter::default(),
            policies: PolicyMatches::register(registry),
            plans: RwLock::default(),
            node,
        };
        registry.register(
            "leyline_access_log_lines_lost",
            "Lines of access logs that found the output busy",
            new.lost_lines.clone(),
        );
        new
    }

    /// Begins to observe a request: remembers what will be told, and continues or begins its trace in its headers,
    /// which must hold the request's id by now. Must be called within a runtime.
    pub(crate) fn observe(
        &self,
        config: Option<&Arc<WaypointConfig>>,
        options: Option<&Arc<Options>>,
        headers: &mut HeaderMap,
        draw: Draw,
    ) -> Observed {
        let ready = self.ready(config, options);
        let request_headers = Wanted::select(&ready.plan.wanted.request, headers);
        let request_header_bytes = header_bytes(headers);
        let span = begin(&ready.plan, headers, draw);
        Observed {
            ready,
            span,
            request_headers,
            request_header_bytes,
            response_headers: HeaderMap::new(),
            response_header_bytes: 0,
        }
    }

    fn ready(
        &self,
        config: Option<&Arc<WaypointConfig>>,
        options: Option<&Arc<Options>>,
    ) -> Arc<Ready> {
        let address = options.map_or(0, |it| Arc::as_ptr(it) as usize);
        {
            let plans = self.plans.read();
            if same(plans.config.as_ref(), config)
                && let Some((_, ready)) = plans.by_options.get(&address)
            {
                return Arc::clone(ready);
            }
        }
        let mut plans = self.plans.write();
        if !same(plans.config.as_ref(), config) {
            *plans = Plans {
                config: config.cloned(),
                ..Plans::default()
            };
            self.requests.configure(config.map(|it| &**it));
        }
        let live =
            |it: &Option<Arc<Options>>| it.as_ref().is_none_or(|it| Arc::strong_count(it) > 1);
        plans.by_options.retain(|_, (options, _)| live(options));
        let ready = Arc::new(self.make_ready(config, options));
        let entry = (options.cloned(), Arc::clone(&ready));
        plans.by_options.insert(address, entry);
        ready
    }

    fn make_ready(
        &self,
        config: Option<&Arc<WaypointConfig>>,
        options: Option<&Arc<Options>>,
    ) -> Ready {
        let environment = Process(&self.node);
        let plan = Plan::new(
            config.map(|it| &**it),
            options.map(|it| &**it),
            &environment,
        );
        let providers = plan.tracing.iter().flat_map(|it| &it.providers);
        let spans = providers.map(|(name, provider)| self.exporters.spans(name, provider));
        let logs = plan.logs.iter().map(|log| match &log.sink {
            Sink::Output => None,
            Sink::Collector(collector) => Some(self.exporters.logs(collector)),
        });
        Ready {
            spans: spans.collect(),
            logs: logs.collect(),
            plan,
        }
    }

    /// Tells of a request that has ended and whose head was not understood: there is nothing of it to remember.
    pub(crate) fn tell_unread(
        &self,
        config: Option<&Arc<WaypointConfig>>,
        options: Option<&Arc<Options>>,
        record: RequestRecord,
    ) {
        let observed = Observed {
            ready: self.ready(config, options),
            span: None,
            request_headers: HeaderMap::new(),
            request_header_bytes: 0,
            response_headers: HeaderMap::new(),
            response_header_bytes: 0,
        };
        self.tell(observed, record);
    }

    /// Tells of a request that has ended.
    pub(crate) fn tell(&self, observed: Observed, mut record: RequestRecord) {
        record.request_headers = observed.request_headers;
        record.request_header_bytes += observed.request_header_bytes;
        record.response_headers = observed.response_headers;
        record.response_header_bytes += observed.response_header_bytes;
        record.span = observed.span;
        let ready = &*observed.ready;
        for group in &ready.plan.metrics {
            let changed = group.changed(&record);
            self.requests.count(&record, group.metrics(), changed);
        }
        self.log(ready, &record);
        self.trace(ready, &record);
    }

    fn log(&self, ready: &Ready, record: &RequestRecord) {
        for (log, queue) in ready.plan.logs.iter().zip(&ready.logs) {
            if log.filter.as_ref().is_some_and(|it| !it.holds(record)) {
                continue;
            }
            let mut line = String::with_capacity(512);
            match queue {
                None => {
                    log.format.render(record, &mut line);
                    let output = self.output.as_ref();
                    if output.is_some_and(|output| !output.line(line.as_bytes())) {
                        self.lost_lines.inc();
                    }
                }
                Some(queue) => {
                    let attributes = log.format.fields(record);
                    if attributes.is_empty() {
                        log.format.render(record, &mut line);
                    }
                    let span = record.span.as_ref();
                    queue.tell(LogData {
                        time: record.start,
                        body: line,
                        attributes,
                        trace: span.map(|it| (it.trace_id, it.span_id)),
                    });
                }
            }
        }
    }

    fn trace(&self, ready: &Ready, record: &RequestRecord) {
        let Some(tracing) = ready
            .plan
            .tracing
            .as_ref()
            .filter(|_| !ready.spans.is_empty())
        else {
            return;
        };
        let environment = Process(&self.node);
        if let Some(span) = SpanData::new(record, &self.node, tracing, &environment) {
            ready
                .spans
                .iter()
                .for_each(|queue| queue.tell(Arc::clone(&span)));
        }
    }
}

fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

fn begin(plan: &Plan, headers: &mut HeaderMap, draw: Draw) -> Option<trace::Span> {
    let tracing = plan.tracing.as_ref()?;
    let (choice, ids) = draw.split();
    let id = headers.get("x-request-id").and_then(|it| it.to_str().ok());
    let id = id.filter(|_| tracing.by_request_id);
    let how = tracing.propagation.unwrap_or(trace::Propagation::Both);
    let sampled = trace::decision_alone(how, headers)
        .unwrap_or_else(|| trace::sampled(id, tracing.per_million, choice));
    let span = trace::Span::new(trace::extract(how, headers), sampled, ids);
    if let Some(how) = tracing.propagation {
        span.inject(how, headers);
    }
    Some(span)
}

impl Observed {
    /// Remembers what will be told of a response's head.
    pub(crate) fn response(&mut self, headers: &HeaderMap) {
        self.response_header_bytes = header_bytes(headers);
        self.response_headers = Wanted::select(&self.ready.plan.wanted.response, headers);
    }
}

#[cfg(test)]
mod tests;
