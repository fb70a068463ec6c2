//! Spans and log lines as OpenTelemetry's collectors take them.

use std::time::SystemTime;

use mesh::names::Str;
use proto::opentelemetry::proto::{
    collector::{logs::v1::ExportLogsServiceRequest, trace::v1::ExportTraceServiceRequest},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span::SpanKind, status::StatusCode},
};

use super::{
    Node,
    span::{SpanData, cut},
};

/// gRPC method.
pub(super) const EXPORT_SPANS: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// gRPC method.
pub(super) const EXPORT_LOGS: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// A line for a collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogData {
    pub(super) time: SystemTime,
    pub(super) body: String,
    pub(super) attributes: Vec<(Str, String)>,
    pub(super) trace: Option<(u128, u64)>,
}

fn text(text: &str) -> AnyValue {
    AnyValue {
        value: Some(Value::StringValue(text.to_owned())),
    }
}

fn pair(name: &str, value: &str) -> KeyValue {
    KeyValue {
        key: name.to_owned(),
        value: Some(text(value)),
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

fn resource(node: &Node, extra: &[(&str, &str)]) -> Resource {
    let service = format!("{}.{}", node.workload, node.namespace);
    let mut attributes = vec![pair("service.name", &service)];
    attributes.extend(extra.iter().map(|(name, value)| pair(name, value)));
    Resource {
        attributes,
        dropped_attributes_count: 0,
    }
}

fn scope() -> InstrumentationScope {
    InstrumentationScope {
        name: "leyline".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    }
}

/// `longest`: of an attribute, in bytes.
pub(super) fn spans(
    spans: &[impl AsRef<SpanData>],
    node: &Node,
    longest: usize,
) -> ExportTraceServiceRequest {
    let spans = spans.iter().map(|it| span(it.as_ref(), longest)).collect();
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource(node, &[])),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope()),
                spans,
                schema_url: String::new(),
            }],
            schema_url: String::new(),
        }],
    }
}

fn span(data: &SpanData, longest: usize) -> Span {
    let attributes = data.attributes.iter();
    let code = match data.failed {
        true => StatusCode::Error,
        false => StatusCode::Unset,
    };
    Span {
        trace_id: data.trace_id.to_be_bytes().to_vec(),
        span_id: data.span_id.to_be_bytes().to_vec(),
        trace_state: data.state.clone(),
        parent_span_id: data
            .parent_id
            .map_or_else(Vec::new, |id| id.to_be_bytes().to_vec()),
        name: data.name.clone(),
        kind: SpanKind::Server.into(),
        start_time_unix_nano: nanos(data.start),
        end_time_unix_nano: nanos(data.end),
        attributes: attributes
            .map(|(name, value)| pair(name, cut(value, longest)))
            .collect(),
        status: Some(Status {
            message: String::new(),
            code: code.into(),
        }),
        flags: 1,
    }
}

pub(super) fn logs(lines: &[LogData], node: &Node, log_name: &str) -> ExportLogsServiceRequest {
    let extra = [
        ("log_name", log_name),
        ("cluster_name", &*node.cluster),
        ("node_name", &*node.id),
    ];
    ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs {
            resource: Some(resource(node, &extra)),
            scope_logs: vec![ScopeLogs {
                scope: Some(scope()),
                log_records: lines.iter().map(log).collect(),
                schema_url: String::new(),
            }],
            schema_url: String::new(),
        }],
    }
}

fn log(line: &LogData) -> LogRecord {
    let attributes = line.attributes.iter();
    let (trace, span) = match line.trace {
        Some((trace, span)) => (trace.to_be_bytes().to_vec(), span.to_be_bytes().to_vec()),
        None => (Vec::new(), Vec::new()),
    };
    LogRecord {
        time_unix_nano: nanos(line.time),
        body: Some(text(&line.body)),
        attributes: attributes.map(|(name, value)| pair(name, value)).collect(),
        trace_id: trace,
        span_id: span,
        ..LogRecord::default()
    }
}
