//! One connection that is carried as bytes, as it is told: metrics, access line and place in dumps come from one record.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mesh::{
    flow::{Direction, EndReason, FlowRecord},
    outcome::{Object, Refusal},
};
use net::{
    connections,
    copy::{self, Counters, Side},
    hbone,
    log::access,
    metrics,
    report::Chain,
};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{connection::Connection, metrics::Metrics};

/// Open connections, cut by refusals of policies.
pub(crate) type Registry = connections::Registry<Live, Refusal>;
type Registration = connections::Registration<Live, Refusal>;

/// One connection that is open.
pub(crate) struct Live {
    connection: Arc<Connection>,
    /// Of TLS that is passed through.
    sni: Option<String>,
    /// As it was when it opened; the end is not in it.
    record: FlowRecord,
    accepted: Instant,
    counters: Counters,
    counted_received: AtomicU64,
    counted_sent: AtomicU64,
    series: Mutex<Option<metrics::Flow>>,
}

impl Live {
    pub(crate) fn new(record: FlowRecord, connection: Arc<Connection>, sni: Option<&str>) -> Self {
        Self {
            record,
            sni: sni.map(str::to_owned),
            accepted: connection.accepted,
            connection,
            counters: Counters::default(),
            counted_received: AtomicU64::new(0),
            counted_sent: AtomicU64::new(0),
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
        series.received(since(self.counters.received(), &self.counted_received));
        series.sent(since(self.counters.sent(), &self.counted_sent));
    }

    /// What policies are asked about.
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The name that the application's TLS asks for.
    pub(crate) fn sni(&self) -> Option<&str> {
        self.sni.as_deref()
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

    /// Copies until both ends are done or one fails, its time is over, or a policy forbids it; then tells the end.
    pub(crate) async fn carry(
        mut self,
        downstream: hbone::Stream,
        upstream: copy::Endpoint,
        times: Times,
    ) {
        let live = self.registration.what().clone();
        let mut why = None;
        let end = {
            let cancel = self.cancelled(&live, times, &mut why);
            copy::bidirectional(downstream, upstream, &live.counters, cancel).await
        };
        self.finish_carried(end, why);
    }

    /// The same, where the endpoint speaks TLS with us.
    pub(crate) async fn carry_through(
        mut self,
        downstream: hbone::Stream,
        upstream: impl AsyncRead + AsyncWrite + Unpin,
        times: Times,
    ) {
        let live = self.registration.what().clone();
        let mut why = None;
        let end = {
            let cancel = self.cancelled(&live, times, &mut why);
            copy::through(downstream, upstream, &live.counters, cancel).await
        };
        self.finish_carried(end, why);
    }

    async fn cancelled(&mut self, live: &Live, times: Times, why: &mut Option<Cut>) {
        *why = Some(tokio::select! {
            refusal = self.registration.cut() => Cut::Policy(refusal),
            () = idle_for(&live.counters, times.idle) => Cut::Idle(times.idle),
            () = over(times.longest) => Cut::Old(times.longest.unwrap_or_default()),
        });
    }

    fn finish_carried(self, end: copy::End, why: Option<Cut>) {
        match (end, why) {
            (copy::End::Cancelled, Some(why)) => self.finish_cut(why),
            (end, _) => self.finish_copy(end),
        }
    }

    fn finish_cut(mut self, why: Cut) {
        match why {
            Cut::Idle(after) => {
                let error = format!("nothing was sent for {after:?}");
                self.end(EndReason::Idle, None, Some(error));
            }
            Cut::Old(after) => {
                let error = format!("the policy's maxConnectionDuration of {after:?} is over");
                self.end(EndReason::Drained, None, Some(error));
            }
            Cut::Policy(refusal) => {
                let error = format!("{}: {refusal}", EndReason::PolicyChanged);
                self.end(EndReason::PolicyChanged, refusal.object, Some(error));
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

    /// A decision refused it.
    pub(crate) fn finish_refused(mut self, refusal: Refusal) {
        let error = refusal.to_string();
        self.end(
            EndReason::Refused(refusal.reason),
            refusal.object,
            Some(error),
        );
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
        live.count_bytes();
        if let Some(series) = live.series.lock().take() {
            series.close(reason.flag());
        }
        access::complete(&FlowRecord {
            decided_by: decided_by.map(Box::new),
            end: Some(reason),
            error,
            ..live.snapshot()
        });
    }
}

impl Drop for Flow {
    /// The task was dropped: the drain's deadline has passed, or the tunnel under it ended.
    fn drop(&mut self) {
        self.end(EndReason::Drained, None, None);
    }
}

/// How long a connection may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// Without a byte.
    pub(crate) idle: Duration,
    /// At all; none: as long as its ends like.
    pub(crate) longest: Option<Duration>,
}

async fn over(longest: Option<Duration>) {
    match longest.filter(|it| !it.is_zero()) {
        None => std::future::pending().await,
        Some(longest) => tokio::time::sleep(longest).await,
    }
}

enum Cut {
    Idle(Duration),
    Old(Duration),
    Policy(Refusal),
}

/// Resolves once no byte has moved for `idle`. Looks twice in that time, so that it may take up to half as long again.
async fn idle_for(counters: &Counters, idle: Duration) {
    let moved = || (counters.received(), counters.sent());
    let mut before = moved();
    let mut quiet = 0;
    while quiet < 2 {
        tokio::time::sleep(idle / 2).await;
        let now = moved();
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
    }
}

/// What is told of a stream about which nothing but its two ends is known: it was refused first.
#[derive(Debug)]
pub(crate) struct Early {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl Early {
    /// Counts and logs that it was refused, for a reason of the closed list.
    pub(crate) fn refused(&self, metrics: &Metrics, refusal: &Refusal) {
        metrics.refused(EndReason::Refused(refusal.reason));
        self.tell(refusal);
    }

    /// Counts and logs that it failed before anything could be decided.
    pub(crate) fn failed(
        &self,
        metrics: &Metrics,
        reason: EndReason,
        error: &dyn std::error::Error,
    ) {
        metrics.refused(reason);
        self.tell(&Chain(error));
    }

    fn tell(&self, error: &dyn fmt::Display) {
        access::failed(&FlowRecord {
            error: Some(error.to_string()),
            ..FlowRecord::new(Direction::Waypoint, self.source, self.destination)
        });
    }
}
