//! What is to become of a request once its route is known: to which cluster, in which form, within which limits.

use std::{sync::Arc, time::Duration};

use http::Version;
use mesh::l7::{
    backend::UpstreamVersion,
    route::{RetryOn, RetryPolicy},
    served::AppProtocol,
};
use tokio::time::Instant;

use super::{
    exchange::Exchange,
    filter::{
        hash,
        session::{self, Session},
    },
    grpc,
    life::Underway,
    upstream::{ClusterKey, cluster::Cluster, members::Members},
};
use crate::snapshot::Snapshot;

/// How a request is forwarded.
pub(super) struct Plan {
    pub(super) cluster: Arc<Cluster>,
    pub(super) members: Arc<Members>,
    /// The version of HTTP that the endpoint gets.
    pub(super) version: Version,
    pub(super) retry: RetryPolicy,
    pub(super) per_try: Option<Duration>,
    /// When the whole response must be there.
    pub(super) deadline: Option<Instant>,
    /// Of the request, where endpoints are chosen by one.
    pub(super) hash: Option<u64>,
    /// The client's session, where the rule or the service keeps one.
    pub(super) session: Option<Session>,
    /// Whether the number of the try is told to the endpoint.
    pub(super) tell_attempt: bool,
}

impl Plan {
    /// The plan for a request to the endpoints of `key`.
    pub(super) fn new(exchange: &mut Exchange, underway: &Underway, key: &ClusterKey) -> Self {
        let snapshot = Arc::clone(&exchange.snapshot);
        let cluster = exchange.connection.waypoint.http.upstreams.cluster(key);
        let members = cluster.members(&snapshot);
        let rule = exchange.rule();
        let own = rule.and_then(|it| it.retry.clone());
        let retry = own.unwrap_or_else(|| default_retry(&snapshot));
        let timeouts = rule.map(|it| it.timeouts).unwrap_or_default();
        Self {
            version: version(exchange, underway, &members),
            per_try: retry.per_try_timeout.or(timeouts.per_try),
            deadline: deadline(exchange, underway, timeouts.request),
            tell_attempt: snapshot
                .l7
                .config()
                .is_some_and(|it| it.headers.attempt_count),
            hash: hash::of_request(exchange, &underway.parts, &members.policy.balancer),
            session: session::of_request(exchange, &underway.parts.headers, &members),
            retry,
            members,
            cluster,
        }
    }
}

/// Two more tries where it is certain that nothing was processed (Istio's default policy).
fn default_retry(snapshot: &Snapshot) -> RetryPolicy {
    let configured = snapshot.l7.config().and_then(|it| it.default_retry.clone());
    configured.unwrap_or_else(|| RetryPolicy {
        attempts: 2,
        on: RetryOn {
            connect_failure: true,
            refused_stream: true,
            grpc_statuses: vec![1, 14],
            ..RetryOn::default()
        },
        backoff: Duration::from_millis(25),
        per_try_timeout: None,
        ignore_previous: true,
        remote_localities: false,
    })
}

/// The time that route and client give, the shorter of both.
fn deadline(exchange: &Exchange, underway: &Underway, route: Option<Duration>) -> Option<Instant> {
    let client = match exchange.is_grpc() {
        true => grpc::timeout(&underway.parts.headers),
        false => None,
    };
    let shorter = match (route, client) {
        (Some(route), Some(client)) => Some(route.min(client)),
        (one, other) => one.or(other),
    };
    shorter.map(|it| exchange.started + it)
}

/// By what the port is declared to speak, and what DestinationRule says; gRPC has no form in HTTP/1.1.
fn version(exchange: &Exchange, underway: &Underway, members: &Members) -> Version {
    let client = underway.parts.version;
    if exchange.is_grpc() || underway.web.is_some() {
        return Version::HTTP_2;
    }
    match (members.policy.pool.http_version, members.protocol) {
        (UpstreamVersion::Http2, _) => Version::HTTP_2,
        (UpstreamVersion::Client, _) => client,
        (UpstreamVersion::Declared, protocol) => match protocol {
            AppProtocol::Http => Version::HTTP_11,
            AppProtocol::Http2 | AppProtocol::Grpc | AppProtocol::GrpcWeb => Version::HTTP_2,
            AppProtocol::Unknown | AppProtocol::Tls | AppProtocol::Tcp => client,
        },
    }
}
