//! Connections that a pod opens (15001): decided, dialled, and carried.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::Either};
use mesh::{
    draw::Draw,
    flow::{Direction, EndReason, FlowRecord, Party, Security},
    headers::Traceparent,
    names::{NetworkAddress, WorkloadUid},
    outbound::{Hop, NextHop, OutboundFacts, Route, Target, next_hop},
    outcome::{Need, Outcome, Reason, Refusal},
    view::MeshView,
    workload::Workload,
};
use net::{metrics::Parties, report::Chain, socket};
use tokio::{net::TcpStream, sync::OwnedSemaphorePermit};

use crate::{
    connect::{ConnectError, Onward, Outgoing, Within},
    flow::{Early, Flow, Live},
    pod::{Pod, WAIT},
    reset,
    revocations::RestsOn,
    stages::begin_and_carry,
};

/// Endpoints that are tried for one connection.
const TRIES: usize = 3;
/// Draws of chance to find one that has not been tried.
const DRAWS: usize = 16;
/// After this time in vain the client rather knows.
const RETRY_WITHIN: Duration = Duration::from_secs(5);

/// One connection of the pod.
pub(crate) struct Outbound<'a> {
    pod: Arc<Pod>,
    client: SocketAddr,
    original: SocketAddr,
    accepted: Instant,
    /// The client's connection, where what it wrote already may go ahead.
    application: Option<&'a TcpStream>,
}

/// A decision, with every name in it resolved.
struct Routed {
    source: Arc<Workload>,
    hop: NextHop,
    address: SocketAddr,
}

/// A connection that stands: how it is told, and its other end.
pub(crate) type Established = (Flow, Onward);

/// Serves one accepted connection to its end.
pub(crate) fn serve(
    pod: Arc<Pod>,
    stream: TcpStream,
    peer: SocketAddr,
) -> impl Future<Output = ()> + Send {
    let open = pod.node.metrics.socket(Direction::Outbound);
    let begun = begin(pod, stream, peer);
    begin_and_carry(begun, |(room, stream, established)| {
        carry(stream, established).map(|()| drop(room))
    })
    .map(|()| drop(open))
}

/// The client's connection and where it is carried, with the pod's room for it. A failure has been told.
async fn begin(
    pod: Arc<Pod>,
    stream: TcpStream,
    peer: SocketAddr,
) -> Option<(OwnedSemaphorePermit, TcpStream, Established)> {
    let client = socket::unmapped(peer);
    let adopted = pod.sockets.adopt(&stream);
    let original = adopted.and_then(|()| socket::original_destination(&stream, peer));
    let original = match original {
        Ok(original) => original,
        // The client is gone already.
        Err(error) => {
            tracing::debug!(%client, %error, "outbound connection");
            return None;
        }
    };
    let ahead = pod.node.config.data_with_connect;
    let outbound = Outbound {
        application: ahead.then_some(&stream),
        ..Outbound::new(pod, client, original)
    };
    let room = match outbound.pod.enter() {
        Ok(room) => room,
        Err(error) => {
            let metrics = &outbound.pod.node.metrics;
            outbound.early().failed(metrics, EndReason::TooMany, &error);
            reset::reset(stream);
            return None;
        }
    };
    match outbound.establish().await {
        Ok(established) => Some((room, stream, established)),
        Err(_) => {
            reset::reset(stream);
            None
        }
    }
}

/// Carries a connection that stands to its end.
pub(crate) fn carry(
    stream: TcpStream,
    (flow, onward): Established,
) -> impl Future<Output = ()> + Send {
    match onward {
        Onward::Out(connected) => {
            let (endpoint, inner) = connected.into_parts();
            Either::Left(flow.carry(stream, endpoint).map(|()| drop(inner)))
        }
        // Boxed: it is the larger of the two, and the rarer where nodes are many.
        Onward::Within(within) => Either::Right(Box::pin(carry_within(flow, stream, *within))),
    }
}

async fn carry_within(flow: Flow, client: TcpStream, within: Within) {
    let Within {
        admitted, rests_on, ..
    } = within;
    let _room = admitted.room;
    let sockets = (client, admitted.application);
    let revoked = rests_on.until_revoked();
    flow.carry_within(admitted.flow, sockets, revoked).await;
}

impl Outbound<'_> {
    /// Accepted now, from `client` of the pod, to `original`.
    pub(crate) fn new(pod: Arc<Pod>, client: SocketAddr, original: SocketAddr) -> Self {
        Self {
            pod,
            client,
            original,
            accepted: Instant::now(),
            application: None,
        }
    }

    /// Decides and dials. A failure has been told when it is answered.
    pub(crate) async fn establish(&self) -> Result<Established, EndReason> {
        let routed = match self.route(draw()).await {
            Ok(routed) => routed,
            Err(refusal) => {
                self.early().refused(&self.pod.node.metrics, &refusal);
                return Err(EndReason::Refused(refusal.reason));
            }
        };
        let trace = Traceparent::new(rand::random(), rand::random());
        let (routed, connected) = self.connect(routed, trace).await;
        let flow = self.open(&routed, connected.as_ref().ok(), trace);
        match connected {
            Ok(connected) => Ok((flow, connected)),
            Err(error) => {
                let reason = error.end_reason();
                flow.finish(reason, Some(Chain(&error).to_string()));
                Err(reason)
            }
        }
    }

    fn early(&self) -> Early<'_> {
        Early {
            pod: &self.pod,
            direction: Direction::Outbound,
            source: self.client,
            destination: self.original,
            client: None,
        }
    }

    /// The next hop, once the pod's record is there and names are resolved.
    async fn route(&self, draw: Draw) -> Result<Routed, Refusal> {
        let (source, hop) = self.decide(draw, Demanded::Not).await?;
        match &hop.target {
            Target::Address(address) => {
                let address = *address;
                Ok(Routed {
                    source,
                    hop,
                    address,
                })
            }
            Target::Hostname {
                hostname,
                port,
                prefer_ipv6,
            } => {
                self.pod.node.metrics.resolved(&source, hostname);
                let addresses = self.pod.node.resolver.resolve(hostname).await;
                let address = choose(&addresses, *prefer_ipv6, draw)
                    .ok_or_else(|| Need::Dns(hostname.clone()).unmet())?;
                let port = *port;
                Ok(Routed {
                    source,
                    hop: hop.resolved(address),
                    address: (address, port).into(),
                })
            }
        }
    }

    async fn decide(
        &self,
        draw: Draw,
        demanded: Demanded,
    ) -> Result<(Arc<Workload>, NextHop), Refusal> {
        let deadline = tokio::time::Instant::now() + WAIT;
        let decide = |view: &Arc<MeshView>| self.decide_on(view, draw, demanded);
        let decided = self.pod.node.state.decide(deadline, decide).await;
        match decided {
            Ok((go, _)) => Ok(go),
            // The control plane does not know the address: it is outside the mesh.
            Err(refusal)
                if refusal.reason == Reason::NoAddress
                    && demanded == Demanded::Not
                    && self.pod.node.config.xds_on_demand =>
            {
                Box::pin(self.decide(draw, Demanded::InVain)).await
            }
            Err(refusal) => Err(refusal),
        }
    }

    fn decide_on(
        &self,
        view: &MeshView,
        draw: Draw,
        demanded: Demanded,
    ) -> Outcome<(Arc<Workload>, NextHop)> {
        let node = &self.pod.node;
        let source = match node.record(view, &self.pod.binding) {
            Outcome::Go(source) => source,
            Outcome::Refuse(refusal) => return Outcome::Refuse(refusal),
            Outcome::Need(need) => return Outcome::Need(need),
        };
        let facts = OutboundFacts {
            source: source.clone(),
            network: node.config.node.network.clone(),
            client: self.client,
            original_dst: self.original,
        };
        match next_hop(view, &facts, draw) {
            Outcome::Go(hop)
                if hop.route == Route::UnknownPassthrough
                    && node.config.xds_on_demand
                    && demanded == Demanded::Not =>
            {
                Outcome::Need(Need::Resource(self.resource_name().into()))
            }
            outcome => outcome.map(|hop| (source, hop)),
        }
    }

    fn resource_name(&self) -> String {
        NetworkAddress {
            network: self.pod.node.config.node.network.clone(),
            address: self.original.ip(),
        }
        .to_string()
    }

    /// Dials; where an endpoint of a service fails before it got a byte, another one is tried.
    async fn connect(
        &self,
        first: Routed,
        trace: Traceparent,
    ) -> (Routed, Result<Onward, ConnectError>) {
        let mut routed = first;
        let mut tried = Vec::new();
        loop {
            let connected = self.dial(&routed, trace).await;
            let Err(error) = &connected else {
                return (routed, connected);
            };
            let uid = routed.hop.workload.as_ref().map(|w| w.uid.clone());
            let again = error.is_of_this_endpoint()
                && routed.hop.service.is_some()
                && tried.len() + 1 < TRIES
                && self.accepted.elapsed() < RETRY_WITHIN;
            tried.extend(uid.filter(|_| again));
            let another = match again {
                true => self.route_around(&tried).await,
                false => None,
            };
            let Some(another) = another else {
                return (routed, connected);
            };
            tracing::debug!(
                error = Chain(error).to_string(),
                "endpoint failed, trying another one"
            );
            routed = another;
        }
    }

    async fn dial(&self, routed: &Routed, trace: Traceparent) -> Result<Onward, ConnectError> {
        let outgoing = Outgoing {
            pod: &self.pod,
            source: &routed.source,
            client: self.client,
            application: self.application,
            hop: &routed.hop,
            address: routed.address,
            trace,
        };
        outgoing.connect().await
    }

    /// A next hop to a workload that has not been tried.
    async fn route_around(&self, tried: &[WorkloadUid]) -> Option<Routed> {
        for _ in 0..DRAWS {
            let routed = self.route(draw()).await.ok()?;
            let uid = &routed.hop.workload.as_ref()?.uid;
            if !tried.contains(uid) {
                return Some(routed);
            }
        }
        None
    }

    fn rests_on(&self, connected: Option<&Onward>) -> Option<RestsOn> {
        match connected? {
            Onward::Within(within) => Some(within.rests_on.clone()),
            Onward::Out(connected) => {
                let chain = connected.peer.as_ref()?.chain.clone();
                Some(RestsOn::new(chain, &self.pod.node.revocations))
            }
        }
    }

    fn open(&self, routed: &Routed, connected: Option<&Onward>, trace: Traceparent) -> Flow {
        let hop = &routed.hop;
        let secured = hop.hop != Hop::Tcp;
        let own = routed.source.identity();
        let parties = &self.pod.node.metrics.parties;
        let source = parties.of_workload(&routed.source, secured.then_some(&own));
        let destination = destination(parties, hop, connected);
        let record = FlowRecord {
            authority: hop.authority.clone(),
            service: hop.service.as_deref().map(Into::into),
            hop: hop.hop,
            security: match connected {
                Some(Onward::Within(_)) => Security::SameNode,
                _ if secured => Security::MutualTls,
                _ => Security::Plaintext,
            },
            ..FlowRecord::between(
                Direction::Outbound,
                (source, self.client),
                (destination, routed.address),
            )
        };
        let mut live = Live::new(record, self.original, self.accepted);
        live.trace = secured.then(|| trace.trace_id());
        live.rests_on = self.rests_on(connected);
        live.twin = match connected {
            Some(Onward::Within(within)) => Some(within.admitted.flow.live().clone()),
            _ => None,
        };
        Flow::open(&self.pod.node.metrics, self.pod.outbound.register(live))
    }
}

/// Who is at the other end: the next hop's record; behind a gateway, what the peer told of itself and what TLS proved.
fn destination(parties: &Parties, hop: &NextHop, connected: Option<&Onward>) -> Party {
    let peer = connected.and_then(Onward::peer);
    let proven = peer.map(|peer| &peer.identity);
    let told = connected.and_then(Onward::baggage);
    match (hop.hop, told, hop.workload.as_ref()) {
        (Hop::DoubleHbone, Some(baggage), _) => parties.kept(Party::of_baggage(baggage, proven)),
        (_, _, Some(workload)) => {
            let identity = workload.identity();
            parties.of_workload(workload, proven.or(Some(&identity)))
        }
        _ => Party::default(),
    }
}

/// Whether the control plane has been asked about the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Demanded {
    Not,
    InVain,
}

fn draw() -> Draw {
    Draw(rand::random())
}

/// One address of the preferred family, else of the other, by chance.
fn choose(addresses: &[IpAddr], prefer_ipv6: bool, draw: Draw) -> Option<IpAddr> {
    let (preferred, others): (Vec<IpAddr>, Vec<IpAddr>) = addresses
        .iter()
        .partition(|address| address.is_ipv6() == prefer_ipv6);
    let from = if preferred.is_empty() {
        others
    } else {
        preferred
    };
    let bound = u64::try_from(from.len()).ok()?;
    let chosen = draw.below(bound)?;
    from.get(usize::try_from(chosen).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_family_comes_first() {
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let v6: IpAddr = "fd00::1".parse().unwrap();
        let draw = Draw(7);
        assert_eq!(choose(&[v4, v6], true, draw), Some(v6));
        assert_eq!(choose(&[v4, v6], false, draw), Some(v4));
        assert_eq!(choose(&[v4], true, draw), Some(v4));
        assert_eq!(choose(&[], true, draw), None);
    }
}
