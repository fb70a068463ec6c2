//! One connection as it is told: its metrics, its access line and its place in dumps come from one record.

use std::{
    fmt,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use mesh::{
    authorize::AuthorizationFacts,
    flow::{Direction, EndReason, FlowRecord},
    names::Str,
    outcome::{Object, Refusal},
};
use net::{
    connections,
    copy::{self, Counters, Side},
    log::access,
    metrics,
    report::Chain,
};
use parking_lot::Mutex;

use crate::{authorize::Denied, metrics::Metrics, revocations::RestsOn};

/// Open connections, cut by policies.
pub(crate) type Registry = connections::Registry<Live, Box<Denied>>;
type Registration = connections::Registration<Live, Box<Denied>>;

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
    /// What its tunnel was proven with.
    pub(crate) rests_on: Option<RestsOn>,
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
            rests_on: None,
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

    /// A tunnel whose certificate is revoked is dropped, which looks like any other loss from here.
    fn true_end(&self, seen: EndReason) -> EndReason {
        let lost = matches!(
            seen,
            EndReason::Drained
                | EndReason::TunnelLost
                | EndReason::SourceReset
                | EndReason::DestinationReset
        );
        match &self.rests_on {
            Some(certificates) if lost && certificates.is_revoked() => {
                EndReason::CertificateRevoked
            }
            _ => seen,
        }
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
    registration: Registration,
    finished: bool,
}

impl Flow {
    /// Counts and logs its beginning.
    pub(crate) fn open(metrics: &Metrics, registration: Registration) -> Self {
        let live = registration.what();
        let series = metrics.open(&live.record.labels());
        *live.series.lock() = Some(series);
        access::opened(&live.record);
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
    pub(crate) fn finish_cut(self, denied: &Denied) {
        let reason = EndReason::PolicyChanged;
        self.finish_by(reason, denied, format!("{reason}: {denied}"));
    }

    /// A policy forbids it.
    pub(crate) fn finish_denied(self, denied: &Denied) {
        let reason = EndReason::Refused(denied.refusal.reason);
        self.finish_by(reason, denied, denied.to_string());
    }

    fn finish_by(mut self, reason: EndReason, denied: &Denied, error: String) {
        self.end(reason, denied.refusal.object.clone(), Some(error));
    }

    /// Tells the end; `error` in full where there is one.
    pub(crate) fn finish(mut self, reason: EndReason, error: Option<String>) {
        self.end(reason, None, error);
    }

    fn end(&mut self, reason: EndReason, decided_by: Option<Object>, error: Option<String>) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let live = self.registration.what();
        let reason = live.true_end(reason);
        live.count_bytes();
        if let Some(series) = live.series.lock().take() {
            series.close(reason.flag());
        }
        access::complete(&FlowRecord {
            decided_by,
            end: Some(reason),
            error,
            ..live.snapshot()
        });
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

/// What is told of a connection about which nothing but its two ends is known: it was refused first.
#[derive(Debug)]
pub(crate) struct Early {
    pub(crate) direction: Direction,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl Early {
    /// Counts and logs that it was refused, for a reason of the closed list.
    pub(crate) fn refused(&self, metrics: &Metrics, refusal: &Refusal) {
        metrics.refused(self.direction, EndReason::Refused(refusal.reason));
        self.tell(refusal);
    }

    /// Counts and logs that it failed before anything could be decided.
    pub(crate) fn failed(
        &self,
        metrics: &Metrics,
        reason: EndReason,
        error: &dyn std::error::Error,
    ) {
        metrics.refused(self.direction, reason);
        self.tell(&Chain(error));
    }

    fn tell(&self, error: &dyn fmt::Display) {
        access::failed(&FlowRecord {
            error: Some(error.to_string()),
            ..FlowRecord::new(self.direction, self.source, self.destination)
        });
    }
}
