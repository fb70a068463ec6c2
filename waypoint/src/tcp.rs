//! Connections that are passed on as bytes: opaque TCP, and TLS of the application.

mod choose;

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use mesh::{
    draw::Draw,
    flow::{Direction, EndReason, FlowRecord, Party, Security},
    outbound::Hop,
    outcome::Refusal,
    workload::Workload,
};
use net::{
    hbone::{ConnectRequest, ResetCode, Stream},
    report::Chain,
};

use crate::{
    authorize,
    backend::{ConnectError, Connected, Failure, Tls, Upstream, keepalive},
    connection::Connection,
    flow::{Flow, Live, Times},
    http::upstream::Permit,
    inbound::status,
};
use choose::{Choice, Tried, choose};

/// A connection on which nothing moves for so long is ended, where no policy says otherwise (waypoint.md 4.6).
const IDLE: Duration = Duration::from_secs(3600);
/// Until bytes can be sent, where no policy says otherwise.
const CONNECT: Duration = Duration::from_secs(10);
/// Endpoints that are tried, where one refuses before it got a byte.
const TRIES: usize = 3;

/// What is passed on.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// Bytes.
    Tcp,
    /// TLS of the application, with the name that its client asks for.
    Tls(Option<String>),
}

impl Kind {
    fn sni(&self) -> Option<&str> {
        match self {
            Self::Tcp => None,
            Self::Tls(name) => name.as_deref(),
        }
    }
}

/// Passes one stream on, to its end.
pub(crate) async fn serve(stream: Stream, connection: Arc<Connection>, kind: Kind) {
    let passing = Passing { connection, kind };
    // Boxed: what leads to a connection needs far more room than carrying it does.
    let established = Box::pin(passing.establish()).await;
    match established {
        Ok(established) => established.carry(stream).await,
        Err(_) => stream.reset(ResetCode::CONNECT_ERROR),
    }
}

/// The same, where nothing has to be read first: the client is answered once the endpoint stands, or why it does not.
pub(crate) async fn serve_request(mut request: ConnectRequest, connection: Arc<Connection>) {
    let kind = Kind::Tcp;
    let passing = Passing { connection, kind };
    let established = {
        let mut establishing = Box::pin(passing.establish());
        tokio::select! {
            biased;
            established = &mut establishing => established,
            () = request.cancelled() => return,
        }
    };
    let established = match established {
        Ok(established) => established,
        Err(status) => return request.refuse(status),
    };
    let told = passing.connection.response_headers(&established.endpoint);
    match request.accept(told) {
        Ok(stream) => established.carry(stream).await,
        Err(_) => established.flow.finish(EndReason::SourceReset, None),
    }
}

/// A connection to an endpoint, ready to be carried.
struct Established {
    flow: Flow,
    connected: Connected,
    /// The endpoint; where it is none of the mesh's, ourselves.
    endpoint: Arc<Workload>,
    times: Times,
    /// Counts it as one of the service's.
    permit: Option<Permit>,
}

impl Established {
    async fn carry(self, stream: Stream) {
        let Self {
            flow,
            connected,
            times,
            permit,
            ..
        } = self;
        match connected.stream.into_endpoint() {
            Ok((upstream, inner)) => {
                flow.carry(stream, upstream, times).await;
                drop(inner);
            }
            Err(tls) => flow.carry_through(stream, tls, times).await,
        }
        drop(permit);
    }
}

struct Passing {
    connection: Arc<Connection>,
    kind: Kind,
}

impl Passing {
    /// Decides and dials; tells the failure where there is one, and answers the status that tells the client.
    async fn establish(&self) -> Result<Established, StatusCode> {
        let snapshot = self.connection.waypoint.snapshots.load();
        let sni = self.kind.sni();
        if let Err(refusal) = authorize::connection(&snapshot, &self.connection, sni) {
            return Err(self.refused(refusal));
        }
        let draw = Draw(rand::random());
        let mut tried = Tried::default();
        loop {
            let mut choice = match choose(&self.connection, &snapshot, &self.kind, draw, &tried) {
                Ok(choice) => choice,
                Err(refusal) => return Err(self.refused(refusal)),
            };
            match self.connect(&choice).await {
                Ok(connected) => {
                    let flow = self.open(Some(&choice), Some(&connected));
                    // What changed meanwhile: from here on the watch knows of the connection.
                    let now = self.connection.waypoint.snapshots.load();
                    if let Err(refusal) = authorize::connection(&now, &self.connection, sni) {
                        let status = status(refusal.reason.waypoint_status());
                        flow.finish_refused(refusal);
                        return Err(status);
                    }
                    let pool = choice.policy().map(|policy| policy.pool);
                    let idle = pool.and_then(|pool| pool.tcp_idle_timeout);
                    return Ok(Established {
                        flow,
                        connected,
                        endpoint: choice.workload().unwrap_or(&snapshot.own).clone(),
                        times: Times {
                            idle: idle.unwrap_or(IDLE),
                            longest: pool.and_then(|pool| pool.max_connection_duration),
                        },
                        permit: choice.connected(),
                    });
                }
                Err(error) => {
                    choice.failed();
                    let left = tried.len() + 1 < TRIES;
                    if again(&error) && left && tried.add(&choice) {
                        let error = Chain(&error).to_string();
                        tracing::debug!(error, "endpoint refused, trying another one");
                        continue;
                    }
                    self.failed(&choice, &error);
                }
            }
            return Err(StatusCode::SERVICE_UNAVAILABLE);
        }
    }

    fn refused(&self, refusal: Refusal) -> StatusCode {
        let status = status(refusal.reason.waypoint_status());
        self.open(None, None).finish_refused(refusal);
        status
    }

    fn failed(&self, choice: &Choice, error: &ConnectError) {
        let flow = self.open(Some(choice), None);
        flow.finish(error.end_reason(), Some(Chain(error).to_string()));
    }

    async fn connect(&self, choice: &Choice) -> Result<Connected, ConnectError> {
        let policy = choice.policy();
        let host = choice.service.as_ref().map_or("", |it| &*it.hostname);
        let tls = policy.and_then(|policy| policy.tls.as_ref());
        let upstream = Upstream {
            service: choice.service.as_ref(),
            destination: choice.destination,
            endpoint: choice.endpoint.clone(),
            client: Some(self.connection.client),
            trace: self.connection.trace,
            tls: tls.map(|settings| Tls {
                settings,
                host: self.kind.sni().unwrap_or(host),
                alpn: &[],
            }),
            proxy_protocol: policy.and_then(|policy| policy.proxy_protocol),
            forward_to: policy.and_then(|policy| policy.forward_to.as_deref()),
            keepalive: policy.and_then(|policy| keepalive(&policy.pool)),
            deadline: policy
                .and_then(|policy| policy.pool.connect_timeout)
                .unwrap_or(CONNECT),
        };
        self.connection.waypoint.backend.connect(&upstream).await
    }

    fn open(&self, choice: Option<&Choice>, connected: Option<&Connected>) -> Flow {
        let connection = &self.connection;
        let waypoint = &connection.waypoint;
        let dialled = connected.map_or(connection.destination, |it| it.address);
        let service = connection.target.service();
        let record = FlowRecord {
            source: connection.source.clone(),
            destination: destination(choice, connected),
            authority: Some(connection.authority.clone()),
            service: service.map(|service| (&**service).into()),
            hop: connected.map_or(Hop::Hbone, |it| it.hop),
            // Of the way from the client, which its certificate has proven.
            security: Security::MutualTls,
            ..FlowRecord::new(Direction::Waypoint, connection.client, dialled)
        };
        let record = waypoint.metrics.parties.shared(record);
        let live = Live::new(record, Arc::clone(connection), self.kind.sni());
        Flow::open(&waypoint.metrics, waypoint.connections.register(live))
    }
}

/// Another endpoint may be tried: this one failed before it got a byte, which it gets once its tunnel is answered.
fn again(error: &ConnectError) -> bool {
    match error.failure() {
        Failure::Connect => true,
        Failure::Reset => matches!(error, ConnectError::Tunnel { .. }),
        _ => false,
    }
}

/// Who is at the other end: the endpoint's record; behind a gateway, what the peer told of itself.
fn destination(choice: Option<&Choice>, connected: Option<&Connected>) -> Party {
    let proven = connected.and_then(|connected| connected.peer.as_ref());
    let told = connected.and_then(|connected| connected.baggage.as_ref());
    let workload = choice.and_then(Choice::workload);
    match (connected.map(|connected| connected.hop), told, workload) {
        (Some(Hop::DoubleHbone), Some(baggage), _) => Party::of_baggage(baggage, proven),
        (_, _, Some(workload)) => {
            let identity = workload.identity();
            Party::of_workload(workload, proven.or(Some(&identity)))
        }
        _ => Party::default(),
    }
}

/// A refusal that names the service.
fn refused(reason: mesh::outcome::Reason, key: mesh::names::NamespacedHostname) -> Refusal {
    Refusal::by(reason, mesh::outcome::Object::Service(key))
}
