//! One connection as it is told: its metrics, its access line and its place in dumps come from one record.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use mesh::{
    authorize::{AuthorizationFacts, RuleRef},
    flow::{Direction, EndReason, FlowRecord, Party, PartyLabels, Security, peer_workload},
    headers::{Baggage, TraceId},
    identity::Identity,
    names::NetworkAddress,
    outbound::Hop,
    outcome::{Object, Outcome, Refusal},
    view::MeshView,
};
use net::{
    connections,
    copy::{self, Counters, Side},
    log::access,
    metrics,
    report::Chain,
    socket,
};
use parking_lot::Mutex;
use tokio::net::TcpStream;

use crate::{
    authorize::Denied,
    metrics::{Metrics, Telling},
    pod::Pod,
    revocations::RestsOn,
};

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
    /// Correlates both ends' logs.
    pub(crate) trace: Option<TraceId>,
    /// Inbound: what the client has proven to be.
    pub(crate) identity: Option<Identity>,
    pub(crate) accepted: Instant,
    /// What its tunnel was proven with.
    pub(crate) rests_on: Option<RestsOn>,
    allowed_by: Mutex<Option<Box<RuleRef>>>,
    /// The other end's telling of the same bytes, where one task passes them on for both.
    pub(crate) twin: Option<Arc<Live>>,
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
            trace: None,
            identity: None,
            accepted,
            rests_on: None,
            allowed_by: Mutex::new(None),
            twin: None,
            counters: Counters::default(),
            counted: Counted::default(),
            series: Mutex::new(None),
        }
    }

    /// What policies are asked about. Of an inbound connection: no other is asked about.
    pub(crate) fn facts(&self) -> AuthorizationFacts {
        AuthorizationFacts::new(self.identity.clone(), self.record.source_addr, self.actual)
    }

    fn counters(&self) -> &Counters {
        match &self.twin {
            Some(twin) => &twin.counters,
            None => &self.counters,
        }
    }

    /// The rule that allows it, where one does.
    pub(crate) fn allowed_by(&self) -> Option<RuleRef> {
        self.allowed_by.lock().as_deref().cloned()
    }

    /// Notes the rule that allows it, as of the last time that policies were asked.
    pub(crate) fn set_allowed_by(&self, rule: Option<&RuleRef>) {
        let mut known = self.allowed_by.lock();
        if known.as_deref() != rule {
            *known = rule.map(|it| Box::new(it.clone()));
        }
    }

    /// Adds the bytes since the last call to the metrics. Called at each scrape, and at the end.
    pub(crate) fn count_bytes(&self) {
        let since = |now: u64, before: &AtomicU64| {
            now.saturating_sub(before.fetch_max(now, Ordering::Relaxed))
        };
        let series = self.series.lock();
        let Some(series) = &*series else { return };
        series.received(since(self.counters().received(), &self.counted.received));
        series.sent(since(self.counters().sent(), &self.counted.sent));
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
            received_bytes: self.counters().received(),
            sent_bytes: self.counters().sent(),
            duration: self.accepted.elapsed(),
            ..self.record.clone()
        }
    }
}

/// An open connection that is counted, and will be told at its end, also when it is dropped half-way.
#[derive(Debug)]
pub(crate) struct Flow {
    registration: Registration,
    telling: Arc<Telling>,
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
            telling: metrics.telling.clone(),
            finished: false,
        }
    }

    /// Policies allow it; by this rule, where one said so.
    pub(crate) fn allowed(&self, by: Option<&RuleRef>) {
        self.registration.what().set_allowed_by(by);
    }

    /// What is told of it.
    pub(crate) fn live(&self) -> &Arc<Live> {
        self.registration.what()
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
        flow.begin();
        let mut pair = copy::Pair::new(downstream, upstream);
        async move {
            let mut denied = None;
            let end = {
                let cancel = pin!(async { denied = Some(flow.registration.cut().await) });
                pair.copy(&live.counters, cancel).await
            };
            // Both applications learn of it first.
            drop(pair);
            match denied {
                Some(denied) => flow.finish_cut(&denied),
                None => flow.finish_copy(end),
            }
        }
    }

    /// As [`Flow::carry`], for both ends of a connection within the node: `self` tells of the client's, `inbound` of the
    /// server's. `lost` ends it as the loss of its tunnel would.
    pub(crate) async fn carry_within(
        self,
        mut inbound: Flow,
        (client, server): (TcpStream, TcpStream),
        lost: impl Future<Output = ()>,
    ) {
        self.begin();
        inbound.begin();
        let live = inbound.registration.what().clone();
        let gone = inbound.registration.removed();
        let mut denied = None;
        let end = {
            let forbidden = async { denied = Some(inbound.registration.cut().await) };
            let cancel = async {
                tokio::select! {
                    () = forbidden => {}
                    () = gone => {}
                    () = lost => {}
                }
            };
            copy::bidirectional(client, server, &live.counters, cancel).await
        };
        let (reason, error) = told(end);
        match denied {
            Some(denied) => inbound.finish_cut(&denied),
            None if reason == EndReason::Drained => drop(inbound),
            None => inbound.finish(reason, error.clone()),
        }
        match reason {
            // To the client's end, what happened to the server's is a reset.
            EndReason::Drained => self.finish(EndReason::DestinationReset, None),
            reason => self.finish(reason, error),
        }
    }

    fn begin(&self) {
        let live = self.registration.what();
        let allowed_by = live.allowed_by();
        let record = || live.record.clone();
        self.telling.flows.opened(record, allowed_by.as_ref());
    }

    fn finish_copy(self, end: copy::End) {
        let (reason, error) = told(end);
        self.finish(reason, error);
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
        let record = FlowRecord {
            decided_by: decided_by.map(Box::new),
            end: Some(reason),
            error,
            ..live.snapshot()
        };
        if reason.is_failure() {
            self.telling.refused(record.direction, reason);
        }
        let allowed_by = live.allowed_by();
        self.telling.flows.ended(&record, allowed_by.as_ref());
        access::complete(&record);
    }
}

/// What an end is called, and its error in full where there is one.
fn told(end: copy::End) -> (EndReason, Option<String>) {
    match end {
        copy::End::Finished(_) => (EndReason::Complete, None),
        copy::End::Reset(Side::Downstream) => (EndReason::SourceReset, None),
        copy::End::Reset(Side::Upstream) => (EndReason::DestinationReset, None),
        copy::End::Failed(_, error) => (lost(&error), Some(Chain(&error).to_string())),
        copy::End::Cancelled => (EndReason::Drained, None),
    }
}

/// What the loss of a connection under way is called. The system's errors are of plain connections: tunnels have their own.
fn lost(error: &io::Error) -> EndReason {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    match (error.raw_os_error(), socket::connect_kind(error)) {
        (Some(_), TimedOut) => EndReason::ConnectTimedOut,
        (Some(_), HostUnreachable | NetworkUnreachable) => EndReason::ConnectUnreachable,
        _ => EndReason::TunnelLost,
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
pub(crate) struct Early<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) direction: Direction,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    /// Inbound: who connects, once that is proven.
    pub(crate) client: Option<Proven<'a>>,
}

/// Who the client of a tunnel is.
#[derive(Clone, Copy)]
pub(crate) struct Proven<'a> {
    pub(crate) identity: &'a Identity,
    pub(crate) security: Security,
    /// Where it says that it comes from, through a gateway.
    pub(crate) network: Option<&'a str>,
}

impl Early<'_> {
    /// Counts and logs that it was refused, for a reason of the closed list.
    pub(crate) fn refused(&self, metrics: &Metrics, refusal: &Refusal) {
        let reason = EndReason::Refused(refusal.reason);
        self.tell(metrics, reason, refusal.object.clone(), refusal);
    }

    /// Counts and logs that it failed before anything could be decided.
    pub(crate) fn failed(
        &self,
        metrics: &Metrics,
        reason: EndReason,
        error: &dyn std::error::Error,
    ) {
        self.tell(metrics, reason, None, &Chain(error));
    }

    fn tell(
        &self,
        metrics: &Metrics,
        reason: EndReason,
        decided_by: Option<Object>,
        error: &dyn fmt::Display,
    ) {
        let view = self.pod.node.state.view();
        let (ours, other) = (self.ours(&view), self.other(&view));
        let (source, destination) = match self.direction {
            Direction::Outbound => (ours, other),
            Direction::Inbound | Direction::Waypoint => (other, ours),
        };
        let mut record = FlowRecord {
            source,
            destination,
            decided_by: decided_by.map(Box::new),
            end: Some(reason),
            error: Some(error.to_string()),
            ..FlowRecord::new(self.direction, self.source, self.destination)
        };
        if let Some(client) = self.client {
            (record.hop, record.security) = (Hop::Hbone, client.security);
        }
        metrics.telling.refused(self.direction, reason);
        metrics.telling.flows.ended(&record, None);
        access::failed(&record);
    }

    /// The pod, as far as it is known: its name at least.
    fn ours(&self, view: &MeshView) -> Party {
        let binding = &self.pod.binding;
        match self.pod.node.record(view, binding) {
            Outcome::Go(record) => {
                let proven = self.client.map(|_| record.identity());
                Party::of_workload(&record, proven.as_ref())
            }
            Outcome::Refuse(_) | Outcome::Need(_) => Party {
                pod: Some(binding.name.clone()),
                labels: Arc::new(PartyLabels {
                    namespace: Some(binding.namespace.clone()),
                    ..PartyLabels::default()
                }),
            },
        }
    }

    /// Whose address the other end has, for telemetry: of it all, the identity alone is proven, if that.
    fn other(&self, view: &MeshView) -> Party {
        let network = &self.pod.node.config.node.network;
        let found = match self.direction {
            Direction::Outbound => view.workload_at(&NetworkAddress {
                network: network.clone(),
                address: self.destination.ip().to_canonical(),
            }),
            Direction::Inbound | Direction::Waypoint => {
                let told = self.client.and_then(|it| it.network);
                peer_workload(view, network, self.source.ip(), told)
            }
        };
        let identity = self.client.map(|it| it.identity);
        match found {
            Some(workload) => Party::of_workload(workload, identity),
            None => Party::of_baggage(&Baggage::default(), identity),
        }
    }
}

#[cfg(test)]
mod tests {
    use net::{copy::Side, hbone::StreamError};

    use super::*;

    #[test]
    fn a_plain_connection_that_is_lost_is_no_tunnel_that_is() {
        const ETIMEDOUT: i32 = 110;
        const EHOSTUNREACH: i32 = 113;
        const EACCES: i32 = 13;
        let tunnels: io::Error = StreamError::Broken(io::ErrorKind::TimedOut).into();
        for (error, expected) in [
            (tunnels, EndReason::TunnelLost),
            (
                io::Error::from_raw_os_error(ETIMEDOUT),
                EndReason::ConnectTimedOut,
            ),
            (
                io::Error::from_raw_os_error(EHOSTUNREACH),
                EndReason::ConnectUnreachable,
            ),
            // ICMPv6: administratively prohibited.
            (
                io::Error::from_raw_os_error(EACCES),
                EndReason::ConnectUnreachable,
            ),
        ] {
            let text = Chain(&error).to_string();
            let (reason, told) = told(copy::End::Failed(Side::Upstream, error));
            assert_eq!((reason, told), (expected, Some(text)));
        }
    }
}
