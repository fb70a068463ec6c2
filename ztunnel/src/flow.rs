//! One connection as it is told: its metrics, its access line and its place in dumps come from the same record.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use mesh::{
    authorize::AuthorizationFacts,
    headers::Baggage,
    identity::Identity,
    names::Str,
    outbound::Hop,
    outcome::{Reason, Refusal},
    service::Service,
    workload::Workload,
};
use net::{
    copy::{self, Counters, Side},
    log::{Access, Carried, Direction},
};
use serde::Serialize;

use crate::{
    connections::Registration,
    metrics::{Metrics, TcpLabels},
};

/// Which side tells: the metric label `reporter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reporter {
    /// The client's node tunnel.
    Source,
    /// The server's.
    Destination,
}

impl Reporter {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    fn direction(self) -> Direction {
        match self {
            Self::Source => Direction::Outbound,
            Self::Destination => Direction::Inbound,
        }
    }
}

/// How a connection ended: the metric label `response_flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EndReason {
    /// Both sides were done, or one of the applications reset it.
    Fine,
    /// A policy forbade it, at its beginning or later.
    Denied,
    /// The destination could not be reached, or failed.
    Connect,
    /// TLS with the next hop failed.
    Tls,
    /// HTTP/2 with the next hop failed.
    Http2,
    /// Nothing answered on the HBONE port.
    NetworkPolicy,
    /// There is no certificate to speak with.
    Identity,
    /// We were told to end first.
    Ended,
}

impl EndReason {
    /// As Istio's dashboards know it.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::Fine | Self::Ended => "-",
            Self::Denied => "DENY",
            Self::Connect => "CONNECT",
            Self::Tls => "TLS_FAILURE",
            Self::Http2 => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::Identity => "IDENTITY_ERROR",
        }
    }
}

/// How bytes travel between the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Protocol {
    /// As they are.
    #[serde(rename = "TCP")]
    Tcp,
    /// In a tunnel.
    #[serde(rename = "HBONE")]
    Hbone,
    /// In two.
    #[serde(rename = "DOUBLEHBONE")]
    DoubleHbone,
}

impl From<Hop> for Protocol {
    fn from(hop: Hop) -> Self {
        match hop {
            Hop::Tcp => Self::Tcp,
            Hop::Hbone => Self::Hbone,
            Hop::DoubleHbone => Self::DoubleHbone,
        }
    }
}

/// What is known of one end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Party {
    /// Pod name, for the log; the canonical service where there is no record.
    pub(crate) name: Option<Str>,
    pub(crate) workload: Option<Str>,
    pub(crate) canonical_service: Option<Str>,
    pub(crate) canonical_revision: Option<Str>,
    pub(crate) namespace: Option<Str>,
    pub(crate) app: Option<Str>,
    pub(crate) cluster: Option<Str>,
    pub(crate) region: Option<Str>,
    pub(crate) zone: Option<Str>,
    /// For the metrics' `*_principal`.
    pub(crate) principal: Option<Identity>,
    /// For the log: only what mutual TLS proved.
    pub(crate) proven: Option<Identity>,
}

fn told(text: &Str) -> Option<Str> {
    (!text.is_empty()).then(|| text.clone())
}

impl From<&Workload> for Party {
    fn from(workload: &Workload) -> Self {
        Self {
            name: told(&workload.name).or_else(|| told(&workload.canonical_name)),
            workload: told(&workload.workload_name),
            canonical_service: told(&workload.canonical_name),
            canonical_revision: told(&workload.canonical_revision),
            namespace: told(&workload.namespace),
            app: told(&workload.canonical_name),
            cluster: told(&workload.cluster_id),
            region: told(&workload.locality.region),
            zone: told(&workload.locality.zone),
            principal: None,
            proven: None,
        }
    }
}

impl From<&Baggage> for Party {
    /// `*_app` is the workload's name here, as upstream has it.
    fn from(baggage: &Baggage) -> Self {
        Self {
            name: baggage.service_name.clone(),
            workload: baggage.workload_name.clone(),
            canonical_service: baggage.service_name.clone(),
            canonical_revision: baggage.service_version.clone(),
            namespace: baggage.namespace.clone(),
            app: baggage.workload_name.clone(),
            cluster: baggage.cluster.clone(),
            region: baggage.region.clone(),
            zone: baggage.zone.clone(),
            principal: None,
            proven: None,
        }
    }
}

/// One connection, while it is open and when it ends.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) reporter: Reporter,
    pub(crate) protocol: Protocol,
    /// The client's end of the accepted connection.
    pub(crate) source_address: SocketAddr,
    /// The log's `dst.addr`: the TCP next hop outbound, where the peer connected to inbound.
    pub(crate) destination_address: SocketAddr,
    /// Where the application wanted to go, or where its bytes go.
    pub(crate) original: SocketAddr,
    pub(crate) authority: Option<String>,
    pub(crate) source: Party,
    pub(crate) destination: Party,
    pub(crate) service: Option<Arc<Service>>,
    pub(crate) trace: Option<String>,
    /// Inbound: what policies are asked about.
    pub(crate) facts: Option<AuthorizationFacts>,
    pub(crate) accepted: Instant,
    pub(crate) counters: Counters,
    pub(crate) counted: Counted,
}

/// How much of the counters the metrics hold already.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Live {
    pub(crate) fn labels(&self, flag: &'static str) -> TcpLabels {
        TcpLabels::of(self, flag)
    }

    /// Bytes since the last call: received, sent.
    pub(crate) fn uncounted(&self) -> (u64, u64) {
        let since = |now: u64, before: &AtomicU64| {
            now.saturating_sub(before.fetch_max(now, Ordering::Relaxed))
        };
        (
            since(self.counters.received(), &self.counted.received),
            since(self.counters.sent(), &self.counted.sent),
        )
    }

    fn carried(&self) -> Carried {
        let (received, sent) = (self.counters.received(), self.counters.sent());
        // The log speaks from the local workload's point of view, the counters from the accepting side's.
        let (bytes_sent, bytes_received) = match self.reporter {
            Reporter::Source => (received, sent),
            Reporter::Destination => (sent, received),
        };
        Carried {
            bytes_sent,
            bytes_received,
            duration: self.accepted.elapsed(),
        }
    }

    fn with_access<R>(&self, policy: Option<&str>, tell: impl FnOnce(&Access<'_>) -> R) -> R {
        let proven = |party: &Party| party.proven.as_ref().map(ToString::to_string);
        let (source_identity, destination_identity) =
            (proven(&self.source), proven(&self.destination));
        let (source, destination) = (&self.source, &self.destination);
        tell(&Access {
            source_workload: source.name.as_deref(),
            source_namespace: source.namespace.as_deref(),
            source_cluster: source.cluster.as_deref(),
            source_identity: source_identity.as_deref(),
            hbone_authority: self.authority.as_deref(),
            destination_service: self.service.as_ref().map(|service| &*service.hostname),
            destination_workload: destination.name.as_deref(),
            destination_namespace: destination.namespace.as_deref(),
            destination_cluster: destination.cluster.as_deref(),
            destination_identity: destination_identity.as_deref(),
            policy,
            ..Access::new(
                self.reporter.direction(),
                self.source_address,
                self.destination_address,
            )
        })
    }
}

/// An open connection that is counted and will be told at its end, also when it is dropped half-way.
pub(crate) struct Flow {
    registration: Registration<Live>,
    metrics: Metrics,
    finished: bool,
}

impl Flow {
    /// Counts and logs its beginning.
    pub(crate) fn open(metrics: &Metrics, registration: Registration<Live>) -> Self {
        let live = registration.what();
        metrics.opened(live);
        live.with_access(None, |access| access.opened());
        Self {
            registration,
            metrics: metrics.clone(),
            finished: false,
        }
    }

    pub(crate) fn live(&self) -> &Arc<Live> {
        self.registration.what()
    }

    /// Resolves when a policy comes to forbid the connection. Not to be awaited again then.
    pub(crate) async fn cut(&mut self) -> Refusal {
        self.registration.cut().await
    }

    /// Copies until both ends are done, one fails, or a policy forbids it; then tells the end.
    pub(crate) async fn carry(mut self, down: impl Into<copy::Endpoint>, up: copy::Endpoint) {
        let live = self.live().clone();
        let mut refusal = None;
        let end = {
            let cancel = async { refusal = Some(self.registration.cut().await) };
            copy::bidirectional(down, up, &live.counters, cancel).await
        };
        match (end, refusal) {
            (_, Some(refusal)) => self.finish_cut(&refusal),
            (copy::End::Finished(_), None) => self.finish(EndReason::Fine, None),
            (copy::End::Reset(side), None) => self.finish(EndReason::Fine, Some(&reset_by(side))),
            (copy::End::Failed(side, error), None) => {
                let error = Failed { side, error };
                self.finish(EndReason::Connect, Some(&error));
            }
            (copy::End::Cancelled, None) => self.finish(EndReason::Ended, None),
        }
    }

    /// A policy, or the workload it applies to, has changed.
    fn finish_cut(self, refusal: &Refusal) {
        let text = format!("connection closed due to policy change: {refusal}");
        self.finish_denied(refusal, &text);
    }

    /// A policy forbade it.
    pub(crate) fn finish_denied(mut self, refusal: &Refusal, text: &dyn fmt::Display) {
        let policy = policy_of(refusal);
        self.end(EndReason::Denied, Some(text), policy.as_deref());
    }

    /// Tells the end.
    pub(crate) fn finish(mut self, reason: EndReason, error: Option<&dyn fmt::Display>) {
        self.end(reason, error, None);
    }

    fn end(&mut self, reason: EndReason, error: Option<&dyn fmt::Display>, policy: Option<&str>) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let live = self.registration.what();
        self.metrics.closed(live, reason);
        live.with_access(policy, |access| access.complete(&live.carried(), error));
    }
}

impl Drop for Flow {
    /// The task was dropped: the drain's deadline has passed, the pod is gone, or the tunnel under it broke.
    fn drop(&mut self) {
        self.end(
            EndReason::Ended,
            Some(&"the connection was ended before it was done"),
            None,
        );
    }
}

/// The policy behind a refusal, as the log names it.
fn policy_of(refusal: &Refusal) -> Option<String> {
    match (&refusal.object, refusal.reason) {
        (Some(mesh::outcome::Object::Policy(key)), _) => Some(key.to_string()),
        (_, Reason::PolicyNotAllowed) => Some("none of the ALLOW policies".to_owned()),
        _ => None,
    }
}

fn reset_by(side: Side) -> &'static str {
    match side {
        Side::Downstream => "connection reset by the client",
        Side::Upstream => "connection reset by the server",
    }
}

struct Failed {
    side: Side,
    error: std::io::Error,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Downstream => "client",
            Side::Upstream => "server",
        };
        write!(f, "connection to the {side} broke: {}", self.error)
    }
}

/// What is told of a connection about which nothing but its two ends is known: it was refused first.
pub(crate) struct Early {
    pub(crate) reporter: Reporter,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl Early {
    /// Counts and logs that it was refused, for a reason of the closed list.
    pub(crate) fn refused(&self, metrics: &Metrics, refusal: &Refusal) {
        metrics.refused(self.reporter, refusal.reason.into());
        self.access().failed(refusal);
    }

    /// Counts and logs that it failed before anything could be decided.
    pub(crate) fn failed(
        &self,
        metrics: &Metrics,
        reason: EarlyFailure,
        error: &dyn std::error::Error,
    ) {
        metrics.refused(self.reporter, reason.into());
        self.access().failed(&crate::report::Chain(error));
    }

    fn access(&self) -> Access<'static> {
        Access::new(self.reporter.direction(), self.source, self.destination)
    }
}

/// What fails before there is a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EarlyFailure {
    /// TLS was not what it must be.
    Tls,
    /// HTTP/2 was not.
    Http2,
    /// No certificate to speak with.
    Certificate,
    /// A system call failed.
    System,
}
