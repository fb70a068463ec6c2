//! What is told of requests: the hooks that the life of a request calls.

use std::{borrow::Cow, sync::Arc};

use http::{request, response};
use mesh::{
    flow::{Party, ServiceName},
    l7::{
        dispatch::Target,
        record::{RequestRecord, cluster_name},
    },
    names::Str,
};

use super::{
    download::Ending,
    exchange::{Exchange, Kind, Upstream},
};

/// The head is understood, and the request has its id. Must not block.
pub(super) fn start(exchange: &mut Exchange, parts: &mut request::Parts) {
    let draw = exchange.draw();
    let snapshot = Arc::clone(&exchange.snapshot);
    let service = exchange.connection.service.as_ref();
    let options = snapshot.l7.telemetry_for(service);
    let telemetry = &exchange.connection.waypoint.telemetry;
    let config = snapshot.l7.config();
    let observed = telemetry.observe(config, options, &mut parts.headers, draw);
    exchange.observed = Some(Box::new(observed));
}

/// The head of the response is known. Must not block.
pub(super) fn responded(exchange: &mut Exchange, parts: &mut response::Parts) {
    if let Some(observed) = &mut exchange.observed {
        observed.response(&parts.headers);
    }
}

/// The request is over. Must not block.
pub(super) fn finished(exchange: &mut Exchange, ending: &Ending) {
    // None: it was refused before its head was understood. Metrics tell it all the same.
    let observed = exchange.observed.take();
    let record = record(exchange, ending);
    let waypoint = &exchange.connection.waypoint;
    match observed {
        Some(observed) => waypoint.telemetry.tell(*observed, record),
        None => {
            let snapshot = &exchange.snapshot;
            let options = snapshot
                .l7
                .telemetry_for(exchange.connection.service.as_ref());
            let config = snapshot.l7.config();
            waypoint.telemetry.tell_unread(config, options, record);
        }
    }
}

fn record(exchange: &Exchange, ending: &Ending) -> RequestRecord {
    let connection = &exchange.connection;
    let upstream = exchange.upstream.as_ref();
    let since = |at: tokio::time::Instant| at.duration_since(exchange.started);
    let mut record = RequestRecord {
        source: connection.source.clone(),
        destination: upstream.map(destination).unwrap_or_default(),
        service: match &connection.target {
            Target::Service { service, .. } => Some(ServiceName::from(&**service)),
            Target::Workload { .. } => None,
        },
        port: connection.target.port(),
        client: Some(connection.client),
        local: Some(connection.destination),
        start: exchange.wall,
        bytes_received: ending.request_bytes,
        request_messages: ending.request_messages,
        status: (exchange.status > 0).then_some(exchange.status),
        grpc_status: ending.grpc_status.map(u32::from),
        flags: exchange.flags,
        details: details(exchange),
        bytes_sent: ending.response_bytes,
        response_messages: ending.response_messages,
        duration: Some(ending.duration),
        request_duration: ending.request_duration,
        response_duration: exchange.responded.map(since),
        upstream: upstream.and_then(|it| it.address),
        upstream_cluster: upstream.and_then(cluster),
        upstream_failure: exchange.failure.clone(),
        attempts: exchange.attempts,
        route: Some(route(exchange)),
        rule_of: exchange.route.as_ref().map(|it| Arc::clone(&it.route)),
        claims: exchange.claims.clone(),
        ..RequestRecord::default()
    };
    if let Some(head) = &exchange.head {
        record.method = head.method.clone();
        record.path = head.original.to_string();
        record.scheme = Cow::Borrowed(head.scheme);
        record.authority = head.authority.to_string();
        record.version = head.version;
        record.grpc = head.kind == Kind::Grpc;
    }
    record
}

fn destination(upstream: &Upstream) -> Party {
    let Some(workload) = &upstream.workload else {
        return Party::default();
    };
    let identity = upstream.peer.clone().unwrap_or_else(|| workload.identity());
    Party::of_workload(workload, Some(&identity))
}

fn cluster(upstream: &Upstream) -> Option<Str> {
    let hostname = &upstream.service.as_ref()?.hostname;
    let name = cluster_name(hostname, upstream.port, upstream.subset.as_deref());
    Some(name.into())
}

fn details(exchange: &Exchange) -> Option<Cow<'static, str>> {
    match (exchange.details.is_empty(), exchange.responded) {
        (false, _) => Some(exchange.details.clone()),
        (true, Some(_)) => Some(Cow::Borrowed("via_upstream")),
        (true, None) => None,
    }
}

/// The rule's own name, else its route's; `default` where no route concerns the request.
fn route(exchange: &Exchange) -> Str {
    let Some(selected) = &exchange.route else {
        return "default".into();
    };
    match selected.name() {
        Some(name) => name.into(),
        None => {
            let key = &selected.route.key;
            format!("{}.{}.{}", key.namespace, key.name, selected.rule).into()
        }
    }
}
