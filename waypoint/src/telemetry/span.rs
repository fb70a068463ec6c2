//! The span of a request: its name and attributes, as Istio's waypoints tell them (waypoint 2.15).

use std::{sync::Arc, time::SystemTime};

use mesh::{
    flow::Party,
    l7::{log_format::Environment, record::RequestRecord, telemetry::TagSource},
    names::Str,
};

use super::{Node, plan::Tracing};

/// Longest text of an attribute where the provider says nothing, in bytes.
pub(super) const MAX_TAG: usize = 256;

/// A span that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpanData {
    pub(super) name: String,
    pub(super) trace_id: u128,
    pub(super) span_id: u64,
    pub(super) parent_id: Option<u64>,
    pub(super) state: String,
    pub(super) start: SystemTime,
    pub(super) end: SystemTime,
    pub(super) attributes: Vec<(Str, String)>,
    pub(super) failed: bool,
}

impl SpanData {
    /// None: the request is not traced.
    pub(super) fn new(
        record: &RequestRecord,
        node: &Node,
        tracing: &Tracing,
        environment: &dyn Environment,
    ) -> Option<Arc<Self>> {
        let span = record.span.as_ref().filter(|span| span.sampled)?;
        let state = span.state.as_ref().and_then(|it| it.to_str().ok());
        let host = record.service.as_ref().map(|it| &*it.hostname);
        let host = host.unwrap_or(&record.authority);
        let mut attributes = attributes(record);
        attributes.push(("node_id".into(), node.id.to_string()));
        if tracing.istio_tags {
            attributes.extend(istio(record, node));
        }
        for (name, source) in &tracing.tags {
            if let Some(value) = tag(source, record, environment) {
                attributes.push((name.clone(), value));
            }
        }
        Some(Arc::new(Self {
            name: format!("{host}:{}/*", record.port),
            trace_id: span.trace_id,
            span_id: span.span_id,
            parent_id: span.parent_id,
            state: state.unwrap_or_default().to_owned(),
            start: record.start,
            end: record.start + record.duration.unwrap_or_default(),
            attributes,
            failed: record.failed(),
        }))
    }
}

fn attributes(record: &RequestRecord) -> Vec<(Str, String)> {
    let agent = record.request_headers.get(http::header::USER_AGENT);
    let agent = agent.and_then(|it| it.to_str().ok()).unwrap_or("-");
    let cluster = record.upstream_cluster.as_deref().unwrap_or("-");
    let peer = record.client.map(|it| it.ip().to_string());
    let path = record.received_path();
    let url = format!("{}://{}{path}", record.scheme, record.authority);
    let mut all = vec![
        ("component", "proxy".to_owned()),
        ("http.url", url),
        ("http.method", record.method.to_string()),
        ("downstream_cluster", "-".to_owned()),
        ("user_agent", agent.to_owned()),
        ("http.protocol", record.protocol().to_owned()),
        ("peer.address", peer.unwrap_or_else(|| "-".to_owned())),
        ("request_size", record.bytes_received.to_string()),
        ("response_size", record.bytes_sent.to_string()),
        ("http.status_code", record.status.unwrap_or(0).to_string()),
        ("response_flags", record.flags.to_string()),
        ("upstream_cluster", cluster.to_owned()),
        ("upstream_cluster.name", cluster.to_owned()),
    ];
    if let Some(id) = record.request_id() {
        all.push(("guid:x-request-id", id.to_owned()));
    }
    if let Some(status) = record.grpc_status.filter(|_| record.grpc) {
        all.push(("grpc.status_code", status.to_string()));
    }
    if record.failed() {
        all.push(("error", "true".to_owned()));
    }
    all.into_iter()
        .map(|(name, value)| (name.into(), value))
        .collect()
}

fn istio(record: &RequestRecord, node: &Node) -> Vec<(Str, String)> {
    let own = [
        ("istio.canonical_service", &*node.workload),
        ("istio.canonical_revision", "latest"),
        ("istio.mesh_id", &*node.mesh_id),
        ("istio.namespace", &*node.namespace),
        ("istio.cluster_id", &*node.cluster),
    ];
    let own = own.map(|(name, value)| (name.into(), value.to_owned()));
    let mut all: Vec<_> = own.into();
    all.extend(party("source", &record.source));
    all.extend(party("destination", &record.destination));
    all
}

fn party(side: &str, party: &Party) -> Vec<(Str, String)> {
    let labels = &party.labels;
    let known = [
        ("workload", &labels.workload),
        ("namespace", &labels.namespace),
        ("cluster_id", &labels.cluster),
        ("canonical_service", &labels.canonical_service),
        ("canonical_revision", &labels.canonical_revision),
        ("app", &labels.canonical_service),
        ("app_version", &labels.canonical_revision),
        ("instance_name", &party.pod),
    ];
    let known = known.into_iter().filter_map(|(name, value)| {
        let value = value.as_ref()?;
        Some((format!("istio.{side}_{name}").into(), value.to_string()))
    });
    known.collect()
}

fn tag(
    source: &TagSource,
    record: &RequestRecord,
    environment: &dyn Environment,
) -> Option<String> {
    let (found, default) = match source {
        TagSource::Literal(text) => return Some(text.to_string()),
        TagSource::Environment(name, default) => (environment.variable(name), default),
        TagSource::Header(name, default) => {
            let value = record.request_headers.get(&**name);
            let value = value.map(|it| String::from_utf8_lossy(it.as_bytes()).into_owned());
            (value, default)
        }
    };
    found.or_else(|| default.as_ref().map(ToString::to_string))
}

/// Cuts a text at a character's end.
pub(super) fn cut(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}
