//! Connections that reach a pod over HBONE (15008): proven, decided, authorized, dialled, and carried.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use futures_util::FutureExt;
use http::{HeaderMap, StatusCode};
use mesh::{
    authority::Authority,
    flow::{Direction, EndReason, FlowRecord, Party, Security, peer_workload},
    headers::{self, Traceparent},
    identity::Identity,
    inbound::{InboundTarget, TunnelFacts, tunnel},
    outbound::Hop,
    outcome::Refusal,
    view::MeshView,
    workload::Workload,
};
use net::{
    drain,
    hbone::{self, ConnectRequest, NotConnect, ServeError},
    metrics::Parties,
    report::Chain,
    socket,
    tls::{self, PeerIdentity},
};
use tokio::{net::TcpStream, sync::OwnedSemaphorePermit};

use crate::{
    application::{self, DialError, Dialled},
    authorize::authorize,
    connect::{header_texts, parse_baggage, response_headers},
    flow::{Early, Flow, Live, Proven},
    handshakes::Slot,
    pod::{Pod, TLS_DEADLINE, TooMany, WAIT},
    revocations::RestsOn,
    socks5,
    stages::begin_and_carry,
};

/// One peer's connection to the pod's HBONE port.
struct Inbound {
    pod: Arc<Pod>,
    peer: SocketAddr,
    local: SocketAddr,
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(
    pod: Arc<Pod>,
    tcp: TcpStream,
    peer: SocketAddr,
    slot: Slot,
    drain: drain::Watch,
) {
    let _open = pod.node.metrics.socket(Direction::Inbound);
    let peer = socket::unmapped(peer);
    let local = pod.sockets.adopt(&tcp).and_then(|()| tcp.local_addr());
    let local = match local {
        Ok(local) => socket::unmapped(local),
        // The peer is gone already.
        Err(error) => return tracing::debug!(%peer, %error, "inbound connection"),
    };
    let inbound = Arc::new(Inbound { pod, peer, local });
    // Boxed: a handshake needs far more room than an idle connection.
    if let Some((stream, identity)) = Box::pin(inbound.handshake(tcp, slot)).await {
        inbound.serve_streams(stream, identity, drain).await;
    }
}

/// What a client asks for, and who it is.
pub(crate) struct Asked<'a> {
    pub(crate) authority: &'a Authority,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) identity: &'a Identity,
    pub(crate) security: Security,
    pub(crate) rests_on: RestsOn,
}

impl<'a> Asked<'a> {
    fn client(&self) -> Proven<'a> {
        let mut networks = header_texts(self.headers, headers::FORWARDED_NETWORK);
        Proven {
            identity: self.identity,
            security: self.security,
            network: networks.next(),
        }
    }
}

/// A connection within the node, admitted and dialled.
pub(crate) struct Admitted {
    pub(crate) flow: Flow,
    pub(crate) application: TcpStream,
    /// The destination's room for it.
    pub(crate) room: OwnedSemaphorePermit,
}

/// Answers a client of the same node as a CONNECT of it would be answered; what is refused is told here.
///
/// # Errors
/// The status that a tunnel would have answered.
pub(crate) async fn admit_neighbour(
    pod: Arc<Pod>,
    client: SocketAddr,
    local: SocketAddr,
    asked: Asked<'_>,
) -> Result<Admitted, StatusCode> {
    const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
    let identity = asked.identity.clone();
    let peer = client;
    let inbound = Inbound { pod, peer, local };
    let room = inbound.enter(|| asked.client()).ok_or(UNAVAILABLE)?;
    let (flow, decided) = inbound.admit(asked).await.map_err(status)?;
    match decided.dial(&inbound, identity).await {
        Ok(dialled) => match dialled.introduce().await {
            Ok(application) => Ok(Admitted {
                flow,
                application,
                room,
            }),
            Err(error) => {
                flow.finish(EndReason::DestinationReset, Some(Chain(&error).to_string()));
                Err(UNAVAILABLE)
            }
        },
        Err(error) => {
            flow.finish(error.end_reason(), Some(Chain(&error).to_string()));
            Err(UNAVAILABLE)
        }
    }
}

/// One CONNECT.
fn serve_stream(inbound: Arc<Inbound>, request: ConnectRequest) -> impl Future<Output = ()> + Send {
    begin_and_carry(
        begin(inbound, request),
        |(room, (flow, stream, application))| {
            let carried = flow.carry(stream, application.into());
            carried.map(|()| drop(room))
        },
    )
}

/// An answered CONNECT, with the pod's room for it. A failure has been told.
async fn begin(
    inbound: Arc<Inbound>,
    request: ConnectRequest,
) -> Option<(OwnedSemaphorePermit, (Flow, hbone::Stream, TcpStream))> {
    let Some(room) = inbound.enter(|| inbound.asked(&request).client()) else {
        request.refuse(StatusCode::SERVICE_UNAVAILABLE);
        return None;
    };
    Some((room, inbound.answer(request).await?))
}

impl Inbound {
    fn early(&self) -> Early<'_> {
        Early {
            pod: &self.pod,
            direction: Direction::Inbound,
            source: self.peer,
            destination: self.local,
            client: None,
        }
    }

    /// As [`Inbound::early`], of whoever has proven itself.
    fn early_of<'a>(&'a self, client: Proven<'a>) -> Early<'a> {
        Early {
            client: Some(client),
            ..self.early()
        }
    }

    /// The pod's room for one connection more. That there is none is told here.
    fn enter<'a>(&'a self, client: impl FnOnce() -> Proven<'a>) -> Option<OwnedSemaphorePermit> {
        let told = |error: &TooMany| {
            let metrics = &self.pod.node.metrics;
            self.early_of(client())
                .failed(metrics, EndReason::TooMany, error);
        };
        self.pod.enter().inspect_err(told).ok()
    }

    /// Proves who both ends are, unless others have to be let in. What fails is told here.
    async fn handshake(
        &self,
        tcp: TcpStream,
        slot: Slot,
    ) -> Option<(tls::Stream<TcpStream>, PeerIdentity)> {
        let under_way = self.pod.handshakes.begin(slot);
        tokio::select! {
            biased;
            proven = self.prove(tcp) => proven,
            error = under_way.gives_way() => {
                let metrics = &self.pod.node.metrics;
                self.early().failed(metrics, EndReason::TlsFailed, &error);
                None
            }
        }
    }

    async fn prove(&self, tcp: TcpStream) -> Option<(tls::Stream<TcpStream>, PeerIdentity)> {
        let metrics = &self.pod.node.metrics;
        let record = match self.pod.record().await {
            Ok((record, _)) => record,
            Err(refusal) => {
                self.early().refused(metrics, &refusal);
                return None;
            }
        };
        let certificate = match self.pod.certificate(&record.identity()).await {
            Ok(certificate) => certificate,
            Err(error) => {
                let reason = EndReason::NoCertificate;
                self.early().failed(metrics, reason, &error);
                return None;
            }
        };
        match tls::accept(tcp, certificate.server_config(), TLS_DEADLINE).await {
            Ok(accepted) => Some(accepted),
            Err(error) => {
                self.early().failed(metrics, EndReason::TlsFailed, &error);
                None
            }
        }
    }

    async fn serve_streams(
        self: Arc<Self>,
        stream: tls::Stream<TcpStream>,
        peer: PeerIdentity,
        mut drain: drain::Watch,
    ) {
        let mut farewell = self.pod.farewell.watch();
        // Who comes after the farewell is still served: some clients learn late of a pod's end.
        let is_late = farewell.mode().is_some();
        let left = peer.not_after.duration_since(SystemTime::now());
        let certified = tokio::time::sleep(left.unwrap_or_default());
        let goodbye = async move {
            tokio::select! {
                _ = drain.started() => {}
                _ = farewell.started(), if !is_late => {}
                // Streams that are open live on; whoever wants another proves itself anew.
                () = certified => {}
            }
        };
        let this = self.clone();
        let handler = move |request| serve_stream(this.clone(), request);
        let http2 = &self.pod.node.http2;
        let (chain, identity) = (Arc::clone(&peer.chain), peer.identity.clone());
        // Of the connection, without a request that makes sense.
        let early = || {
            self.early_of(Proven {
                identity: &identity,
                security: Security::MutualTls,
                network: None,
            })
        };
        let refused = |error: &NotConnect| {
            let metrics = &self.pod.node.metrics;
            early().failed(metrics, EndReason::BadRequest, error);
        };
        let serving = hbone::serve(stream, peer, http2, goodbye, handler, refused);
        let served = tokio::select! {
            served = serving => served,
            // Its streams end with the connection, at once.
            () = self.pod.node.revocations.until_revoked(&chain) => {
                tracing::info!(peer = %self.peer, "the peer's certificate is revoked: its tunnel is closed");
                return;
            }
        };
        match served {
            Ok(end) => tracing::debug!(peer = %self.peer, ?end, "HBONE connection ended"),
            Err(error) => self.connection_failed(&early(), &error),
        }
    }

    /// Streams tell their own ends; here is told what never came to streams, or abused them.
    fn connection_failed(&self, early: &Early<'_>, error: &ServeError) {
        let metrics = &self.pod.node.metrics;
        match error.end_reason() {
            Some(reason) => early.failed(metrics, reason, error),
            None => {
                let error = Chain(error).to_string();
                tracing::debug!(peer = %self.peer, error, "HBONE connection broke");
            }
        }
    }

    fn asked<'a>(&self, request: &'a ConnectRequest) -> Asked<'a> {
        let peer = request.peer();
        Asked {
            authority: request.authority(),
            headers: request.headers(),
            identity: &peer.identity,
            security: Security::MutualTls,
            rests_on: RestsOn::new(peer.chain.clone(), &self.pod.node.revocations),
        }
    }

    async fn answer(
        &self,
        mut request: ConnectRequest,
    ) -> Option<(Flow, hbone::Stream, TcpStream)> {
        let (mut flow, decided) = match self.admit(self.asked(&request)).await {
            Ok(admitted) => admitted,
            Err(code) => {
                request.refuse(status(code));
                return None;
            }
        };
        let dialled = tokio::select! {
            biased;
            denied = flow.cut() => {
                flow.finish_cut(&denied);
                request.refuse(StatusCode::UNAUTHORIZED);
                return None;
            }
            dialled = decided.dial(self, request.peer().identity.clone()) => dialled,
            () = request.cancelled() => {
                flow.finish(EndReason::SourceReset, None);
                return None;
            }
        };
        match dialled {
            Ok(dialled) => self.accept(request, flow, dialled, &decided.record).await,
            Err(error) => {
                flow.finish(error.end_reason(), Some(Chain(&error).to_string()));
                request.refuse(StatusCode::SERVICE_UNAVAILABLE);
                None
            }
        }
    }

    /// Decides and authorizes; answers the flow that is open then, or the status that refuses, which is told already.
    async fn admit(&self, asked: Asked<'_>) -> Result<(Flow, Decided), u16> {
        let metrics = &self.pod.node.metrics;
        let decided = self.decide(&asked).await.map_err(|refusal| {
            self.early_of(asked.client()).refused(metrics, &refusal);
            refusal.reason.connect_status()
        })?;
        let registration = self.pod.inbound.register(self.live(asked, &decided));
        let authorized = authorize(&self.pod, &registration.what().facts()).await;
        let flow = Flow::open(metrics, registration);
        match authorized {
            Ok(by) => flow.allowed(by.as_ref()),
            Err(denied) => {
                let code = denied.refusal.reason.connect_status();
                flow.finish_denied(&denied);
                return Err(code);
            }
        }
        Ok((flow, decided))
    }

    async fn accept(
        &self,
        request: ConnectRequest,
        flow: Flow,
        dialled: Dialled,
        record: &Arc<Workload>,
    ) -> Option<(Flow, hbone::Stream, TcpStream)> {
        let headers = match self.pod.node.config.response_baggage {
            true => response_headers(&self.pod, record),
            false => http::HeaderMap::new(),
        };
        match request.accept(headers) {
            Ok(stream) => match dialled.introduce().await {
                Ok(application) => Some((flow, stream, application)),
                Err(error) => {
                    flow.finish(EndReason::DestinationReset, Some(Chain(&error).to_string()));
                    stream.reset(hbone::ResetCode::CONNECT_ERROR);
                    None
                }
            },
            Err(_) => {
                flow.finish(EndReason::SourceReset, None);
                None
            }
        }
    }

    async fn decide(&self, asked: &Asked<'_>) -> Result<Decided, Refusal> {
        let deadline = tokio::time::Instant::now() + WAIT;
        let node = &self.pod.node;
        let forwarded = header_texts(asked.headers, headers::FORWARDED);
        let forwarded_host = forwarded.filter_map(headers::forwarded_host).next();
        let authority = asked.authority.clone();
        let decide = |view: &Arc<MeshView>| {
            node.record(view, &self.pod.binding).and_then(|workload| {
                let facts = TunnelFacts {
                    workload: workload.clone(),
                    network: node.config.node.network.clone(),
                    local: self.local,
                    authority: authority.clone(),
                    forwarded_host: forwarded_host.clone(),
                    socks5: node.config.socks5.then_some(socks5::PORT),
                };
                tunnel(view, &facts).map(|target| (workload, target))
            })
        };
        let ((record, target), view) = node.state.decide(deadline, decide).await?;
        Ok(Decided {
            record,
            target,
            view,
            accepted: Instant::now(),
        })
    }

    fn live(&self, asked: Asked<'_>, decided: &Decided) -> Live {
        let identity = asked.identity;
        let own = decided.record.identity();
        let source = self.source(&asked, &decided.view);
        let destination = self.parties().of_workload(&decided.record, Some(&own));
        let record = FlowRecord {
            authority: Some(asked.authority.clone()),
            service: decided.target.service.as_deref().map(Into::into),
            hop: Hop::Hbone,
            security: asked.security,
            ..FlowRecord::between(
                Direction::Inbound,
                (source, self.peer),
                (destination, self.local),
            )
        };
        let trace = header_texts(asked.headers, headers::TRACEPARENT).next();
        let trace = trace
            .and_then(Traceparent::parse)
            .unwrap_or_else(|| Traceparent::new(rand::random(), rand::random()));
        let mut live = Live::new(record, decided.target.destination, decided.accepted);
        live.trace = Some(trace.trace_id());
        live.identity = Some(identity.clone());
        live.rests_on = Some(asked.rests_on);
        live
    }

    fn parties(&self) -> &Parties {
        &self.pod.node.metrics.parties
    }

    /// Who connects, for telemetry: the record of its address, unless it came through a gateway; then what it tells.
    fn source(&self, asked: &Asked<'_>, view: &MeshView) -> Party {
        let identity = asked.identity;
        let node = &self.pod.node.config.node;
        match peer_workload(view, &node.network, self.peer.ip(), asked.client().network) {
            Some(workload) => self.parties().of_workload(workload, Some(identity)),
            None => {
                let believed = self.pod.node.config.response_baggage;
                let baggage = believed.then(|| parse_baggage(asked.headers)).flatten();
                let told = Party::of_baggage(&baggage.unwrap_or_default(), Some(identity));
                self.parties().kept(told)
            }
        }
    }
}

#[cfg(test)]
pub(crate) fn size_of_stream_task() -> usize {
    fn of<F: Future>(_: impl Fn(Arc<Inbound>, ConnectRequest) -> F) -> usize {
        size_of::<F>()
    }
    of(serve_stream)
}

/// Where a CONNECT ends, and on which view that was decided.
struct Decided {
    record: Arc<Workload>,
    target: InboundTarget,
    view: Arc<MeshView>,
    accepted: Instant,
}

impl Decided {
    async fn dial(&self, inbound: &Inbound, identity: Identity) -> Result<Dialled, DialError> {
        let dial = application::Dial {
            pod: &inbound.pod,
            client: inbound.peer,
            identity: Some(identity),
            target: &self.target,
            tunnelled: self.record.application_tunnel.is_some(),
        };
        dial.connect().await
    }
}

fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
}
