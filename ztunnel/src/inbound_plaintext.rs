//! Connections that reach a pod as they are (15006): authorized as nobody's, and carried where policies allow that.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use futures_util::FutureExt;
use mesh::{
    flow::{Direction, EndReason, FlowRecord, Party, peer_workload},
    inbound::{InboundTarget, PlaintextFacts, plaintext},
    outcome::{Reason, Refusal},
    view::MeshView,
    workload::Workload,
};
use net::{report::Chain, socket};
use tokio::{net::TcpStream, sync::OwnedSemaphorePermit};

use crate::{
    application,
    authorize::authorize,
    flow::{Early, Flow, Live},
    pod::{Pod, WAIT},
    reset, socks5,
    stages::begin_and_carry,
};

/// One plaintext connection to the pod.
struct Inbound {
    pod: Arc<Pod>,
    peer: SocketAddr,
    original: SocketAddr,
    accepted: Instant,
}

/// Serves one accepted connection to its end.
pub(crate) fn serve(
    pod: Arc<Pod>,
    stream: TcpStream,
    peer: SocketAddr,
) -> impl Future<Output = ()> + Send {
    let open = pod.node.metrics.socket(Direction::Inbound);
    let begun = begin(pod, stream, peer);
    begin_and_carry(begun, |(room, stream, (flow, application))| {
        let carried = flow.carry(stream, application.into());
        carried.map(|()| drop(room))
    })
    .map(|()| drop(open))
}

/// The client's connection and the application's, with the pod's room for them. A failure has been told.
async fn begin(
    pod: Arc<Pod>,
    stream: TcpStream,
    peer: SocketAddr,
) -> Option<(OwnedSemaphorePermit, TcpStream, (Flow, TcpStream))> {
    let peer = socket::unmapped(peer);
    let adopted = pod.sockets.adopt(&stream);
    let original = match adopted.and_then(|()| socket::original_destination(&stream, peer)) {
        Ok(original) => original,
        // The peer is gone already.
        Err(error) => {
            tracing::debug!(%peer, %error, "inbound plaintext connection");
            return None;
        }
    };
    let inbound = Inbound {
        pod,
        peer,
        original,
        accepted: Instant::now(),
    };
    let Ok(room) = inbound.admit() else {
        reset::reset(stream);
        return None;
    };
    match inbound.establish().await {
        Some(established) => Some((room, stream, established)),
        None => {
            reset::reset(stream);
            None
        }
    }
}

/// Where the connection was going is nowhere in the pod.
#[derive(Debug, thiserror::Error)]
#[error("{0} is no address of the pod")]
struct Foreign(IpAddr);

impl Inbound {
    fn early(&self) -> Early<'_> {
        Early {
            pod: &self.pod,
            direction: Direction::Inbound,
            source: self.peer,
            destination: self.original,
            client: None,
        }
    }

    /// Room for the connection, if it is one for the pod. What is not is told here.
    ///
    /// The redirect takes whatever reaches the pod's interface, wherever it was sent to: to carry that on would make
    /// the pod a relay for its neighbours.
    fn admit(&self) -> Result<OwnedSemaphorePermit, ()> {
        let metrics = &self.pod.node.metrics;
        let to = self.original.ip();
        if !self.pod.sockets.is_local(to) {
            let reason = EndReason::Refused(Reason::AddressMismatch);
            self.early().failed(metrics, reason, &Foreign(to));
            return Err(());
        }
        let room = self.pod.enter();
        room.map_err(|error| self.early().failed(metrics, EndReason::TooMany, &error))
    }

    /// Decides, authorizes and dials; tells the failure where there is one.
    async fn establish(&self) -> Option<(Flow, TcpStream)> {
        let metrics = &self.pod.node.metrics;
        let (record, target, view) = match self.decide().await {
            Ok(decided) => decided,
            Err(refusal) => {
                self.early().refused(metrics, &refusal);
                return None;
            }
        };
        let live = self.live(&record, &target, &view);
        drop(view);
        let registration = self.pod.inbound.register(live);
        let authorized = authorize(&self.pod, &registration.what().facts()).await;
        let mut flow = Flow::open(metrics, registration);
        match authorized {
            Ok(by) => flow.allowed(by.as_ref()),
            Err(denied) => {
                flow.finish_denied(&denied);
                return None;
            }
        }
        let dial = application::Dial {
            pod: &self.pod,
            client: self.peer,
            identity: None,
            target: &target,
            tunnelled: false,
        };
        let dialled = tokio::select! {
            biased;
            denied = flow.cut() => {
                flow.finish_cut(&denied);
                return None;
            }
            dialled = dial.connect() => dialled,
        };
        match dialled {
            Ok(dialled) => Some((flow, dialled.into_stream())),
            Err(error) => {
                flow.finish(error.end_reason(), Some(Chain(&error).to_string()));
                None
            }
        }
    }

    async fn decide(&self) -> Result<(Arc<Workload>, InboundTarget, Arc<MeshView>), Refusal> {
        let deadline = tokio::time::Instant::now() + WAIT;
        let node = &self.pod.node;
        let decide = |view: &Arc<MeshView>| {
            node.record(view, &self.pod.binding).and_then(|workload| {
                let facts = PlaintextFacts {
                    workload: workload.clone(),
                    original_dst: self.original,
                    socks5: node.config.socks5.then_some(socks5::PORT),
                };
                plaintext(view, &facts).map(|target| (workload, target))
            })
        };
        let ((record, target), view) = node.state.decide(deadline, decide).await?;
        Ok((record, target, view))
    }

    fn live(&self, workload: &Arc<Workload>, target: &InboundTarget, view: &MeshView) -> Live {
        let network = &self.pod.node.config.node.network;
        let source = peer_workload(view, network, self.peer.ip(), None);
        let own = workload.identity();
        let parties = &self.pod.node.metrics.parties;
        let source = source.map_or_else(Party::default, |it| parties.of_workload(it, None));
        let destination = parties.of_workload(workload, Some(&own));
        let (source, destination) = ((source, self.peer), (destination, self.original));
        let record = FlowRecord {
            service: target.service.as_deref().map(Into::into),
            ..FlowRecord::between(Direction::Inbound, source, destination)
        };
        Live::new(record, target.destination, self.accepted)
    }
}
