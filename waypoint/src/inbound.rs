//! HBONE in: peers proven, CONNECTs dispatched, streams handed to what they speak.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use http::StatusCode;
use mesh::{
    authority::Authority,
    authorize::{AuthorizationFacts, Decision, authorize_selected},
    flow::EndReason,
    headers::{self, Traceparent},
    l7::{
        dispatch::{DispatchFacts, Target, dispatch, dispatch_inner},
        served::AppProtocol,
        via::{self, Via},
    },
    names::Str,
    outcome::{Object, Reason, Refusal},
};
use net::{
    ca::FetchError,
    drain,
    hbone::{self, ConnectRequest, NotConnect, ResetCode, ServeError},
    report::Chain,
    socket,
    tls::{self, HandshakeError, PeerIdentity, Revocations},
};
use tokio::net::TcpStream;

use crate::{
    config::Role,
    connection::{Connection, header_texts, source_of},
    detect::{self, Protocol},
    flow::Early,
    limits::Counted,
    overload::Overloaded,
    snapshot::Snapshot,
    tcp,
    waypoint::Waypoint,
};

/// TLS handshake, either side.
pub(crate) const TLS_DEADLINE: Duration = Duration::from_secs(10);
/// How long a CONNECT waits for what is not known: the client's node may have heard of a binding before we did.
const WAIT: Duration = Duration::from_secs(1);

/// For how long a connection that comes while we drain takes streams.
const LATECOMER: Duration = Duration::from_secs(2);

/// Why a connection ended before its streams.
#[derive(Debug, thiserror::Error)]
enum RefusedConnection {
    #[error("too many handshakes at one time")]
    TooManyHandshakes,
    #[error("no certificate of our own")]
    Certificate(#[from] FetchError),
    #[error("TLS with the peer")]
    Tls(#[from] HandshakeError),
    #[error("{0} has as many connections as one identity may have")]
    TooMany(mesh::identity::Identity),
}

impl RefusedConnection {
    fn end_reason(&self) -> EndReason {
        match self {
            Self::TooManyHandshakes | Self::TooMany(_) => EndReason::TooMany,
            Self::Certificate(_) => EndReason::NoCertificate,
            Self::Tls(_) => EndReason::TlsFailed,
        }
    }
}

/// One peer's connection.
struct Inbound {
    waypoint: Arc<Waypoint>,
    revocations: Revocations,
    client: SocketAddr,
    local: SocketAddr,
    drain: drain::Watch,
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(
    waypoint: Arc<Waypoint>,
    revocations: Revocations,
    tcp: TcpStream,
    client: SocketAddr,
    drain: drain::Watch,
) {
    let _open = waypoint.metrics.socket();
    let client = socket::unmapped(client);
    let local = match tcp.local_addr() {
        Ok(local) => socket::unmapped(local),
        // The peer is gone already.
        Err(error) => return tracing::debug!(%client, %error, "inbound connection"),
    };
    let inbound = Arc::new(Inbound {
        waypoint,
        revocations,
        client,
        local,
        drain,
    });
    // Boxed: a handshake needs far more room than an idle connection.
    match Box::pin(inbound.prove(tcp)).await {
        Ok((stream, peer, counted)) => {
            inbound.serve_streams(stream, peer).await;
            drop(counted);
        }
        Err(error) => {
            let early = inbound.early();
            early.failed(&inbound.waypoint.metrics, error.end_reason(), &error);
        }
    }
}

impl Inbound {
    fn early(&self) -> Early {
        Early {
            source: self.client,
            destination: self.local,
        }
    }

    async fn prove(
        &self,
        tcp: TcpStream,
    ) -> Result<(tls::Stream<TcpStream>, PeerIdentity, Counted), RefusedConnection> {
        let waypoint = &self.waypoint;
        let turn = waypoint.handshakes.turn().await;
        let turn = turn.ok_or(RefusedConnection::TooManyHandshakes)?;
        let certificate = waypoint.certificate().await?;
        let (stream, peer) = tls::accept(tcp, certificate.server_config(), TLS_DEADLINE).await?;
        drop(turn);
        let counted = waypoint.peers.enter(&peer.identity);
        let counted = counted.ok_or_else(|| RefusedConnection::TooMany(peer.identity.clone()))?;
        Ok((stream, peer, counted))
    }

    async fn serve_streams(self: &Arc<Self>, stream: tls::Stream<TcpStream>, peer: PeerIdentity) {
        let goodbye = self.goodbye(&peer);
        let this = self.clone();
        let handler = move |request| serve_stream(this.clone(), request);
        let http2 = &self.waypoint.http2;
        let chain = Arc::clone(&peer.chain);
        let refused = |error: &NotConnect| {
            let metrics = &self.waypoint.metrics;
            self.early().failed(metrics, EndReason::BadRequest, error);
        };
        let serving = hbone::serve(stream, peer, http2, goodbye, handler, refused);
        let served = tokio::select! {
            served = serving => served,
            // Its streams end with the connection, at once.
            () = self.revocations.until_revoked(&chain) => {
                tracing::info!(client = %self.client, "the peer's certificate is revoked: its tunnel is closed");
                return;
            }
        };
        match served {
            Ok(end) => tracing::debug!(client = %self.client, ?end, "HBONE connection ended"),
            Err(error) => self.connection_failed(&error),
        }
    }

    /// When the peer is to come again: we drain, its certificate ends, or the connection is old, so that new replicas
    /// get their share.
    fn goodbye(&self, peer: &PeerIdentity) -> impl Future<Output = ()> + use<> {
        let left = peer.not_after.duration_since(SystemTime::now());
        let age = age_limit(self.waypoint.config.max_connection_age, rand::random());
        let drain = self.drain.clone().release();
        async move {
            tokio::select! {
                () = until_drained(drain) => {}
                () = tokio::time::sleep(left.unwrap_or_default()) => {}
                () = until_old(age) => {}
            }
        }
    }

    /// Streams tell their own ends; here is told what never came to streams, or abused them.
    fn connection_failed(&self, error: &ServeError) {
        match error.end_reason() {
            Some(reason) => {
                let early = self.early();
                early.failed(&self.waypoint.metrics, reason, error);
            }
            None => {
                let error = Chain(error).to_string();
                tracing::debug!(client = %self.client, error, "HBONE connection broke");
            }
        }
    }
}

/// Within a fifth of `limit`, so that connections that were opened together do not end together.
pub(crate) fn age_limit(limit: Duration, chance: u32) -> Duration {
    let spread = f64::from(chance) / f64::from(u32::MAX) - 0.5;
    limit.mul_f64(1.0 + 0.4 * spread)
}

/// Resolves when the drain begins; for a connection that comes after that, once its client has had time for what it came for.
async fn until_drained(mut drain: drain::Watch) {
    let late = drain.mode().is_some();
    drain.started().await;
    if late {
        tokio::time::sleep(LATECOMER).await;
    }
}

pub(crate) async fn until_old(age: Duration) {
    match age.is_zero() {
        true => std::future::pending().await,
        false => tokio::time::sleep(age).await,
    }
}

/// One CONNECT.
async fn serve_stream(inbound: Arc<Inbound>, request: ConnectRequest) {
    let drain = inbound.drain.clone();
    // Boxed: what leads to a connection needs far more room than carrying it does.
    let opened = Box::pin(inbound.open(request)).await;
    drop(inbound);
    match opened {
        None => {}
        Some(Opened::Unanswered(connection, request)) => {
            tcp::serve_request(request, connection).await;
        }
        Some(Opened::Spoken(connection, stream, protocol)) => match protocol {
            Protocol::Http(version) => crate::http::serve(stream, version, connection, drain).await,
            Protocol::Tls(name) => tcp::serve(stream, connection, tcp::Kind::Tls(name)).await,
            Protocol::Tcp => tcp::serve(stream, connection, tcp::Kind::Tcp).await,
        },
    }
}

/// How far a CONNECT has come.
enum Opened {
    /// Nothing has to be read before its endpoint is dialled: it is answered once that stands.
    Unanswered(Arc<Connection>, ConnectRequest),
    /// Accepted, and what is spoken is known.
    Spoken(Arc<Connection>, hbone::Stream, Protocol),
}

impl Inbound {
    /// Dispatches, answers, and tells what is spoken. What fails is told here.
    async fn open(&self, request: ConnectRequest) -> Option<Opened> {
        let accepted = Instant::now();
        let metrics = &self.waypoint.metrics;
        if self.waypoint.overload.is_full() {
            self.early()
                .failed(metrics, EndReason::TooMany, &Overloaded);
            request.refuse(StatusCode::SERVICE_UNAVAILABLE);
            return None;
        }
        let dispatched = self.dispatch(&request).await;
        let admitted = dispatched.and_then(|(target, snapshot)| {
            self.admit(&request, &snapshot)?;
            let via = way(&request, &target)?;
            let subset = match self.waypoint.config.node.role {
                Role::Waypoint => subset(&request, &target, &snapshot)?,
                Role::EastWest => None,
            };
            Ok((target, snapshot, via, subset))
        });
        let (target, snapshot, via, subset) = match admitted {
            Ok(admitted) => admitted,
            Err(refusal) => {
                self.early().refused(metrics, &refusal);
                request.refuse(status(refusal.reason.waypoint_status()));
                return None;
            }
        };
        let connection =
            Arc::new(self.connection(&request, (target, via, subset), &snapshot, accepted));
        let declared = match self.waypoint.config.node.role {
            Role::Waypoint => declared(&connection, &snapshot),
            // The inner tunnel is not ours to look into.
            Role::EastWest => AppProtocol::Tcp,
        };
        if declared == AppProtocol::Tcp {
            return Some(Opened::Unanswered(connection, request));
        }
        let mut stream = match request.accept(connection.response_headers(&snapshot.own)) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(client = %self.client, %error, "the client is gone");
                return None;
            }
        };
        let detected = detect::detect(
            &mut stream,
            detect::Port {
                service: connection.service.as_ref(),
                number: connection.target.port(),
                declared,
            },
            &self.waypoint.server_first,
            self.waypoint.config.detection_deadline,
        );
        match detected.await {
            Ok(protocol) => Some(Opened::Spoken(connection, stream, protocol)),
            Err(error) => {
                let error = Chain(&error).to_string();
                tracing::debug!(client = %self.client, error, "nothing was said");
                stream.reset(ResetCode::CANCEL);
                None
            }
        }
    }

    async fn dispatch(&self, request: &ConnectRequest) -> Result<(Target, Arc<Snapshot>), Refusal> {
        let node = &self.waypoint.config.node;
        let facts = DispatchFacts {
            authority: request.authority(),
            local: self.local.ip(),
            network: &node.network,
            namespace: &node.namespace,
        };
        let deadline = tokio::time::Instant::now() + WAIT;
        let dispatch = match node.role {
            Role::Waypoint => dispatch,
            Role::EastWest => dispatch_inner,
        };
        let decide = |snapshot: &Arc<Snapshot>| dispatch(&snapshot.mesh, &snapshot.l7, &facts);
        self.waypoint.snapshots.decide(deadline, decide).await
    }

    /// Asks the policies whose selectors pick this waypoint's own pod, before anything of what is tunnelled is read.
    fn admit(&self, request: &ConnectRequest, snapshot: &Snapshot) -> Result<(), Refusal> {
        let identity = Some(request.peer().identity.clone());
        let facts = AuthorizationFacts::new(identity, self.client, self.local);
        match authorize_selected(&snapshot.mesh, &snapshot.own, &facts) {
            Decision::Allow { .. } => Ok(()),
            Decision::Deny { refusal, .. } => Err(refusal),
            Decision::Need(key) => Err(Refusal::by(Reason::PolicyUnknown, Object::Policy(key))),
        }
    }

    fn connection(
        &self,
        request: &ConnectRequest,
        (target, via, subset): (Target, Via, Option<Str>),
        snapshot: &Snapshot,
        accepted: Instant,
    ) -> Connection {
        let told = request.headers();
        let trace = header_texts(told, headers::TRACEPARENT).next();
        let sender = header_texts(told, headers::ISTIO_SOURCE).next();
        let waypoint = &self.waypoint;
        Connection {
            accepted,
            client: self.client,
            peer: Arc::clone(request.peer()),
            authority: request.authority().clone(),
            service: target.service().map(|service| service.key()),
            destination: destination(&target, self.local.ip(), request.authority()),
            trace: trace.and_then(Traceparent::parse),
            passed_waypoint: sender == Some("waypoint"),
            via,
            subset,
            source: source_of(waypoint, snapshot, self.client, request.peer(), told),
            target,
            waypoint: Arc::clone(waypoint),
        }
    }
}

/// The way that it has come by, its target included. What has been passed on from this service before goes round.
fn way(request: &ConnectRequest, target: &Target) -> Result<Via, Refusal> {
    let via = Via::parse(header_texts(request.headers(), via::HEADER));
    match target.service().map(|service| service.key()) {
        Some(service) if !via.admits(&service) => {
            Err(Refusal::by(Reason::Recursion, Object::Service(service)))
        }
        Some(service) => Ok(via.onward(&service)),
        None => Ok(via),
    }
}

/// The subset of the service's endpoints that another waypoint's route asks for. What this narrows is a choice among
/// endpoints that the client may reach anyway, after all policies, so that whoever is proven may ask.
fn subset(
    request: &ConnectRequest,
    target: &Target,
    snapshot: &Snapshot,
) -> Result<Option<Str>, Refusal> {
    let asked = header_texts(request.headers(), via::SUBSET).next();
    let (Some(asked), Some(service)) = (asked, target.service()) else {
        return Ok(None);
    };
    let key = service.key();
    let backend = snapshot.l7.backend(&key);
    // Names are those that are known, so that nobody fills the memory with others.
    match backend.and_then(|it| it.subsets.get_key_value(asked)) {
        Some((name, _)) => Ok(Some(name.clone())),
        None => Err(Refusal::by(Reason::NoHealthyUpstream, Object::Service(key))),
    }
}

/// What the port speaks; where nothing but TCP routes are attached, bytes.
fn declared(connection: &Connection, snapshot: &Snapshot) -> AppProtocol {
    match snapshot.l7.treats_as_tcp(&connection.facts(snapshot, None)) {
        true => AppProtocol::Tcp,
        false => connection.target.protocol(),
    }
}

/// Where the client went. A service that has no address is told as at ours.
fn destination(target: &Target, local: IpAddr, authority: &Authority) -> SocketAddr {
    match (target, authority) {
        (_, Authority::Address(address)) => *address,
        (Target::Service { address, port, .. }, _) => (address.unwrap_or(local), *port).into(),
        (Target::Workload { address, .. }, _) => *address,
    }
}

pub(crate) fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_spread_by_a_fifth_either_way() {
        let limit = Duration::from_secs(100);
        for (chance, expected) in [(0, 80), (u32::MAX / 2, 99), (u32::MAX, 120)] {
            assert_eq!(age_limit(limit, chance).as_secs(), expected);
        }
        assert!(age_limit(Duration::ZERO, 7).is_zero());
    }
}
