//! Spans as Zipkin's collectors take them (API v2, JSON).

use std::{collections::BTreeMap, time::SystemTime};

use serde::Serialize;

use super::{
    Node,
    span::{SpanData, cut},
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ZipkinSpan<'a> {
    trace_id: String,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_id: Option<String>,
    name: &'a str,
    kind: &'static str,
    /// Microseconds since 1970.
    timestamp: u64,
    /// Microseconds; at least 1.
    duration: u64,
    local_endpoint: Endpoint,
    tags: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    service_name: String,
}

/// `longest`: of a tag, in bytes.
pub(super) fn spans(
    spans: &[impl AsRef<SpanData>],
    node: &Node,
    longest: usize,
) -> Result<Vec<u8>, serde_json::Error> {
    let spans: Vec<_> = spans
        .iter()
        .map(|it| span(it.as_ref(), node, longest))
        .collect();
    serde_json::to_vec(&spans)
}

fn span<'a>(data: &'a SpanData, node: &Node, longest: usize) -> ZipkinSpan<'a> {
    let micros = |it: std::time::Duration| u64::try_from(it.as_micros()).unwrap_or(u64::MAX);
    let start = data.start.duration_since(SystemTime::UNIX_EPOCH);
    let took = data.end.duration_since(data.start);
    let tags = data.attributes.iter();
    ZipkinSpan {
        trace_id: format!("{:032x}", data.trace_id),
        id: format!("{:016x}", data.span_id),
        parent_id: data.parent_id.map(|id| format!("{id:016x}")),
        name: &data.name,
        kind: "SERVER",
        timestamp: micros(start.unwrap_or_default()),
        duration: micros(took.unwrap_or_default()).max(1),
        local_endpoint: Endpoint {
            service_name: format!("{}.{}", node.workload, node.namespace),
        },
        tags: tags
            .map(|(name, value)| (&**name, cut(value, longest)))
            .collect(),
    }
}
