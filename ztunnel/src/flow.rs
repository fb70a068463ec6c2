//! One connection as it is told: its metrics, its access line and its place in dumps come from one record.

use std::{
    fmt,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use mesh::{
    authorize::AuthorizationFacts,
    flow::{EndReason, FlowRecord, ResponseFlag, Security, TcpLabels},
    names::Str,
    outcome::Refusal,
};
use net::{
    copy::{self, Counters, Side},
    log::{Access, Carried, Direction},
    metrics,
};
use parking_lot::Mutex;

use crate::{authorize::Denied, connections::Registration, metrics::Metrics, report::Chain};

/// One connection, from the moment it is known whose it is.
#[derive(Debug)]
pub(crate) struct Live {
    /// As it was when it opened; the end is not in it.
    pub(crate) record: FlowRecord,
    /// Outbound: where the application wanted to go. Inbound: where its bytes go.
    pub(crate) actual: SocketAddr,
    /// Inbound: the host name that the CONNECT named.
    pub(crate) asked_host: Option<Str>,
    /// Correlates both ends' logs.
    pub(crate) trace: Option<String>,
    /// Inbound: what policies are asked about.
    pub(crate) facts: Option<AuthorizationFacts>,
    pub(crate) accepted: Instant,
    counters: Counters,
    counted: Counted,
    series: Mutex<Option<metrics::Flow>>,
}

/// How much of the counters the metrics hold already.
#[derive(Debug, Default)]
struct Counted {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Live {
    pub(crate) fn new(record: FlowRecord, actual: SocketAddr, accepted: Instant) -> Self {
        Self {
            record,
            actual,
            asked_host: None,
            trace: None,
            facts: None,
            accepted,
            counters: Counters::default(),
            counted: Counted::default(),
            series: Mutex::new(None),
        }
    }

    /// Adds the bytes since the last call to the metrics. Called at each scrape, and at the end.
    pub(crate) fn count_bytes(&self) {
        let since = |now: u64, before: &AtomicU64| {
            now.saturating_sub(before.fetch_max(now, Ordering::Relaxed))
        };
        let series = self.series.lock();
        let Some(series) = &*series else { return };
        series.received(since(self.counters.received(), &self.counted.received));
        series.sent(since(self.counters.sent(), &self.counted.sent));
    }

    /// The record as of now.
    pub(crate) fn snapshot(&self) -> FlowRecord {
        FlowRecord {
            received_bytes: self.counters.received(),
            sent_bytes: self.counters.sent(),
            duration: self.accepted.elapsed(),
            ..self.record.clone()
        }
    }
}

/// An open connection that is counted, and will be told at its end, also when it is dropped half-way.
#[derive(Debug)]
pub(crate) struct Flow {
    registration: Registration<Live>,
    finished: bool,
}

impl Flow {
    /// Counts and logs its beginning.
    pub(crate) fn open(metrics: &Metrics, registration: Registration<Live>) -> Self {
        let live = registration.what();
        let series = metrics.open(live.record.labels());
        *live.series.lock() = Some(series);
        with_access(&live.record, |access| access.opened());
        Self {
            registration,
            finished: false,
        }
    }

    /// Resolves when a policy comes to forbid the connection. Not to be awaited again then.
    pub(crate) async fn cut(&mut self) -> Box<Denied> {
        self.registration.cut().await
    }

    /// Copies until both ends are done, one fails, or a policy forbids it; then tells the end.
    ///
    /// Not an `async fn`: that would keep room for its arguments twice, for as long as the connection lives.
    pub(crate) fn carry(
        self,
        downstream: impl Into<copy::Endpoint>,
        upstream: copy::Endpoint,
    ) -> impl Future<Output = ()> {
        let live = self.registration.what().clone();
        let mut flow = self;
        let (downstream, upstream) = (downstream.into(), upstream);
        async move {
            let mut denied = None;
            let end = {
                let cancel = async { denied = Some(flow.registration.cut().await) };
                copy::bidirectional(downstream, upstream, &live.counters, cancel).await
            };
            match denied {
                Some(denied) => flow.finish_cut(&denied),
                None => flow.finish_copy(end),
            }
        }
    }

    fn finish_copy(self, end: copy::End) {
        match end {
            copy::End::Finished(_) => self.finish(EndReason::Complete, None),
            copy::End::Reset(Side::Downstream) => self.finish(EndReason::SourceReset, None),
            copy::End::Reset(Side::Upstream) => self.finish(EndReason::DestinationReset, None),
            copy::End::Failed(_, error) => {
                self.finish(EndReason::TunnelLost, Some(Chain(&error).to_string()));
            }
            copy::End::Cancelled => self.finish(EndReason::Drained, None),
        }
    }

    /// It was allowed once; a policy, or the workload that it applies to, has changed.
    pub(crate) fn finish_cut(mut self, denied: &Denied) {
        let reason = EndReason::PolicyChanged;
        self.end(
            reason,
            denied.policies(),
            Some(format!("{reason}: {denied}")),
        );
    }

    /// A policy forbids it.
    pub(crate) fn finish_denied(mut self, denied: &Denied) {
        let reason = EndReason::Refused(denied.refusal.reason);
        self.end(reason, denied.policies(), Some(denied.to_string()));
    }

    /// Tells the end; `error` in full where there is one.
    pub(crate) fn finish(mut self, reason: EndReason, error: Option<String>) {
        self.end(reason, None, error);
    }

    fn end(&mut self, reason: EndReason, policy: Option<String>, error: Option<String>) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let live = self.registration.what();
        live.count_bytes();
        if let Some(series) = live.series.lock().take() {
            series.close(flag(reason.flag()));
        }
        let error = error.or_else(|| reason.is_failure().then(|| reason.to_string()));
        let usual = reason == EndReason::Complete || error.is_some();
        let end = (!usual).then(|| reason.to_string());
        let told = Told {
            policy: policy.as_deref(),
            end: end.as_deref(),
            error: error.as_deref(),
        };
        told.tell(&live.snapshot());
    }
}

impl Drop for Flow {
    /// The task was dropped: the drain's deadline has passed, the pod is gone, or the tunnel under it ended.
    fn drop(&mut self) {
        let reason = match self.registration.is_removed() {
            true => EndReason::PodRemoved,
            false => EndReason::Drained,
        };
        self.end(reason, None, None);
    }
}

/// What the access line says of an end, beside what the record holds.
struct Told<'a> {
    policy: Option<&'a str>,
    end: Option<&'a str>,
    error: Option<&'a str>,
}

impl Told<'_> {
    fn tell(&self, record: &FlowRecord) {
        let (bytes_sent, bytes_received) = match record.direction {
            mesh::flow::Direction::Outbound => (record.received_bytes, record.sent_bytes),
            mesh::flow::Direction::Inbound => (record.sent_bytes, record.received_bytes),
        };
        let carried = Carried {
            bytes_sent,
            bytes_received,
            duration: record.duration,
        };
        with_access(record, |access| {
            let access = Access {
                policy: self.policy,
                end: self.end,
                ..*access
            };
            let error = self.error.as_ref().map(|error| error as &dyn fmt::Display);
            access.complete(&carried, error);
        });
    }
}

fn with_access<R>(record: &FlowRecord, tell: impl FnOnce(&Access<'_>) -> R) -> R {
    let authority = record.authority.as_ref().map(ToString::to_string);
    let proven = record.security != Security::Plaintext;
    let (source, destination) = (&record.source, &record.destination);
    let (from, to) = (&source.labels, &destination.labels);
    let name = |party: &'_ mesh::flow::Party| {
        let labels = &party.labels;
        party
            .pod
            .clone()
            .or_else(|| labels.canonical_service.clone())
    };
    let (source_name, destination_name) = (name(source), name(destination));
    tell(&Access {
        source_workload: source_name.as_deref(),
        source_namespace: from.namespace.as_deref(),
        source_cluster: from.cluster.as_deref(),
        source_identity: from.principal.as_deref().filter(|_| proven),
        hbone_authority: authority.as_deref(),
        destination_service: record.service.as_ref().map(|service| &*service.hostname),
        destination_workload: destination_name.as_deref(),
        destination_namespace: to.namespace.as_deref(),
        destination_cluster: to.cluster.as_deref(),
        destination_identity: to.principal.as_deref().filter(|_| proven),
        ..Access::new(
            direction(record.direction),
            record.source_addr,
            record.destination_addr,
        )
    })
}

fn direction(direction: mesh::flow::Direction) -> Direction {
    match direction {
        mesh::flow::Direction::Outbound => Direction::Outbound,
        mesh::flow::Direction::Inbound => Direction::Inbound,
    }
}

fn flag(flag: ResponseFlag) -> metrics::Flag {
    match flag {
        ResponseFlag::None => metrics::Flag::None,
        ResponseFlag::Deny => metrics::Flag::Deny,
        ResponseFlag::Connect => metrics::Flag::Connect,
        ResponseFlag::TlsFailure => metrics::Flag::TlsFailure,
        ResponseFlag::H2HandshakeFailure => metrics::Flag::H2HandshakeFailure,
        ResponseFlag::NetworkPolicy => metrics::Flag::NetworkPolicy,
        ResponseFlag::IdentityError => metrics::Flag::IdentityError,
        ResponseFlag::CertRevoked => metrics::Flag::CertRevoked,
    }
}

/// The labels of a series: all but the flag, which is known at the end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Series(pub(crate) TcpLabels);

impl metrics::Labels for Series {
    fn each<'a>(&'a self, flag: &'a str, each: &mut dyn FnMut(&'a str, &'a str)) {
        for (name, value) in self.0.pairs() {
            let value = if name == "response_flags" {
                flag
            } else {
                value
            };
            each(name, value);
        }
    }
}

/// What is told of a connection about which nothing but its two ends is known: it was refused first.
#[derive(Debug)]
pub(crate) struct Early {
    pub(crate) direction: mesh::flow::Direction,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl Early {
    /// Counts and logs that it was refused, for a reason of the closed list.
    pub(crate) fn refused(&self, metrics: &Metrics, refusal: &Refusal) {
        metrics.refused(self.direction, EndReason::Refused(refusal.reason));
        self.access().failed(refusal);
    }

    /// Counts and logs that it failed before anything could be decided.
    pub(crate) fn failed(
        &self,
        metrics: &Metrics,
        reason: EndReason,
        error: &dyn std::error::Error,
    ) {
        metrics.refused(self.direction, reason);
        self.access().failed(&Chain(error));
    }

    fn access(&self) -> Access<'static> {
        Access::new(direction(self.direction), self.source, self.destination)
    }
}
