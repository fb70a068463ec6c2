//! The dialling end: one connection, over which CONNECTs open streams.

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::task::noop_waker_ref;
use h2::client::{Connection, SendRequest};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use mesh::{authority::Authority, flow::EndReason};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};

use super::{
    Config, Stream, StreamError, ahead,
    connection::{
        ConnectionState, ERROR_RESETS, Keepalive, Metered, REMEMBERED_RESETS, RESET_MEMORY,
        StreamGuard, small_frames_budget, window_for,
    },
};
use crate::{
    socket::connect_end,
    tls::{HandshakeError, PeerIdentity},
};

/// What a CONNECT says.
#[derive(Clone, Debug)]
pub struct ConnectHead {
    /// The destination.
    pub authority: Authority,
    /// `baggage`, `forwarded`, `traceparent`, `x-forwarded-network`.
    pub headers: HeaderMap,
}

/// An open tunnel: what a peer answered with 200.
#[derive(Debug)]
pub struct Tunnel {
    /// The connection's bytes.
    pub stream: Stream,
    /// The response's headers: `baggage`.
    pub headers: HeaderMap,
    /// Who answered, as its certificate proves.
    pub peer: Arc<PeerIdentity>,
}

/// Why there is no connection to a peer. Shared by everyone who waited for it.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nothing answered at all: often a NetworkPolicy that does not admit port 15008.
    #[error("connect to {destination} timed out after {after:?}; may port {} be blocked?", destination.port())]
    TcpTimeout {
        /// Where.
        destination: SocketAddr,
        /// The deadline.
        after: Duration,
    },
    /// Refused, unreachable, or no socket to be had.
    #[error("connect to {destination}")]
    Tcp {
        /// Where.
        destination: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Connected, but not with whom was expected, or not at all over TLS.
    #[error("TLS with {destination}")]
    Tls {
        /// Where.
        destination: SocketAddr,
        /// Why.
        source: HandshakeError,
    },
    /// TLS stood, HTTP/2 did not.
    #[error("HTTP/2 with {destination}")]
    Http {
        /// Where.
        destination: SocketAddr,
        /// Why.
        source: StreamError,
    },
    /// The pool was closed: its pod is gone.
    #[error("the connection pool is closed")]
    PoolClosed,
}

/// Why a CONNECT opened no stream.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// The destination's host name cannot stand in a request.
    #[error("{0} cannot be asked for")]
    Authority(Authority),
    /// There is no connection to the peer.
    #[error("no connection to the peer")]
    Dial(#[source] Arc<DialError>),
    /// The peer ended TLS when it saw our certificate.
    #[error("{peer} refused our certificate with the alert {alert:?}", peer = peer.identity)]
    CertificateRefused {
        /// Who.
        peer: Arc<PeerIdentity>,
        /// Its words.
        alert: rustls::AlertDescription,
    },
    /// The application reset its connection before anything was sent.
    #[error("the application is gone")]
    Application(io::ErrorKind),
    /// The peer answered, and not with 200: 401 and 403 are its policy, 503 its destination.
    #[error("{peer} refused CONNECT with {status}", peer = peer.identity)]
    Refused {
        /// Who.
        peer: Arc<PeerIdentity>,
        /// Its answer.
        status: StatusCode,
    },
    /// The peer did not answer.
    #[error("{peer} did not answer CONNECT within {after:?}", peer = peer.identity)]
    Late {
        /// Who.
        peer: Arc<PeerIdentity>,
        /// The deadline.
        after: Duration,
    },
    /// The stream or its connection ended before the answer.
    #[error("the tunnel to {peer} ended before its answer", peer = peer.identity)]
    Stream {
        /// Who.
        peer: Arc<PeerIdentity>,
        /// Bytes of the application that had been sent with the CONNECT.
        ahead: usize,
        /// How.
        #[source]
        source: StreamError,
    },
}

impl DialError {
    /// What the metric and the log line say.
    pub fn end_reason(&self) -> EndReason {
        match self {
            Self::TcpTimeout { .. } => EndReason::TunnelTimedOut,
            // The kernel's own patience may be the shorter one (TCP_USER_TIMEOUT).
            Self::Tcp { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
                EndReason::TunnelTimedOut
            }
            Self::Tcp { source, .. } => connect_end(source.kind()),
            Self::Tls { .. } => EndReason::TlsFailed,
            Self::Http { .. } => EndReason::Http2Failed,
            Self::PoolClosed => EndReason::PodRemoved,
        }
    }
}

impl ConnectError {
    /// What the metric and the log line say.
    pub fn end_reason(&self) -> EndReason {
        match self {
            Self::Authority(_) => EndReason::BadRequest,
            Self::Dial(dial) => dial.end_reason(),
            Self::CertificateRefused { .. } => EndReason::TlsFailed,
            Self::Refused { status, .. } => EndReason::PeerRefused(status.as_u16()),
            Self::Late { .. } | Self::Stream { .. } => EndReason::TunnelLost,
            Self::Application(_) => EndReason::SourceReset,
        }
    }

    /// Whether bytes of the application may have reached the other one, so that nobody else may be sent them. A peer that
    /// refuses has not passed them on.
    pub fn may_have_delivered(&self) -> bool {
        match self {
            Self::Stream { ahead, .. } => *ahead > 0 && !self.is_unprocessed(),
            Self::Late { .. } => true,
            _ => false,
        }
    }

    /// Whether the peer certainly did not act on the CONNECT, so that it may be sent again.
    pub(super) fn is_unprocessed(&self) -> bool {
        use super::ResetCode;
        matches!(
            self,
            Self::Stream {
                source: StreamError::Reset(ResetCode::REFUSED_STREAM)
                    | StreamError::GoAway(ResetCode::NO_ERROR),
                ..
            }
        )
    }
}

/// One connection to a peer. Cheap to clone; it ends when the clones and the streams are gone.
#[derive(Clone, Debug)]
pub struct Client {
    requests: SendRequest<Bytes>,
    state: Arc<ConnectionState>,
    peer: Arc<PeerIdentity>,
}

/// Moves a connection's bytes. It must be polled, in a task of its own; dropping it ends the connection.
///
/// Resolves when the connection is over: closed by either side, broken, or given up because the peer is silent.
pub struct Driver(Pin<Box<dyn Future<Output = ()> + Send>>);

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx)
    }
}

impl Client {
    /// Who is at the other end.
    pub fn peer(&self) -> &Arc<PeerIdentity> {
        &self.peer
    }

    /// Speaks HTTP/2 over `io`, on which TLS stands with `peer`. Does not wait for the peer's answer.
    pub async fn handshake<IO>(
        io: IO,
        peer: PeerIdentity,
        config: &Config,
    ) -> Result<(Self, Driver), StreamError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let state = ConnectionState::new();
        let io = Metered {
            io,
            state: Arc::clone(&state),
        };
        let (requests, connection) = builder(config).handshake(io).await?;
        let driver = Driver(Box::pin(drive(
            connection,
            Arc::clone(&state),
            config.clone(),
        )));
        let peer = Arc::new(peer);
        let client = Self {
            requests,
            state,
            peer,
        };
        Ok((client, driver))
    }

    /// Opens one stream, within `deadline`. Cancelling resets what was sent.
    pub async fn connect(
        &self,
        head: ConnectHead,
        deadline: Duration,
    ) -> Result<Tunnel, ConnectError> {
        self.connect_counted(head, None, deadline, self.state.open())
            .await
    }

    pub(super) async fn connect_counted(
        &self,
        head: ConnectHead,
        application: Option<&TcpStream>,
        deadline: Duration,
        guard: StreamGuard,
    ) -> Result<Tunnel, ConnectError> {
        let answered = timeout(deadline, self.request(head, application, guard)).await;
        answered.unwrap_or_else(|_| {
            Err(ConnectError::Late {
                peer: Arc::clone(&self.peer),
                after: deadline,
            })
        })
    }

    async fn request(
        &self,
        head: ConnectHead,
        application: Option<&TcpStream>,
        guard: StreamGuard,
    ) -> Result<Tunnel, ConnectError> {
        let mut requests = self.requests.clone();
        poll_fn(|cx| requests.poll_ready(cx))
            .await
            .map_err(|error| self.failed(error, 0))?;
        let first = self.first_bytes(application)?;
        let (response, mut send) = requests
            .send_request(request(head)?, false)
            .map_err(|error| self.failed(error, 0))?;
        let mut ahead = first.len();
        // The connection moves beside this: a peer that has refused already takes nothing more, and has got none of it. What it
        // said counts, and not that.
        if ahead > 0 && send.send_data(first, false).is_err() {
            ahead = 0;
        }
        let response = response.await;
        let response = response.map_err(|error| self.failed(error, ahead))?;
        let peer = Arc::clone(&self.peer);
        if response.status() != StatusCode::OK {
            let status = response.status();
            return Err(ConnectError::Refused { peer, status });
        }
        let (head, recv) = response.into_parts();
        Ok(Tunnel {
            stream: Stream::ahead(send, recv, guard, ahead),
            headers: head.headers,
            peer,
        })
    }

    /// What can go with the CONNECT. Nothing where the peer may be gone: what it might have passed on nobody else may be
    /// sent, and without it the CONNECT may be tried elsewhere.
    fn first_bytes(&self, application: Option<&TcpStream>) -> Result<Bytes, ConnectError> {
        let application = application.filter(|_| !self.state.is_in_doubt());
        let first = application.map(ahead::waiting).transpose();
        let first = first.map_err(|error| ConnectError::Application(error.kind()))?;
        Ok(first.unwrap_or_default())
    }

    fn failed(&self, error: h2::Error, ahead: usize) -> ConnectError {
        let peer = Arc::clone(&self.peer);
        match self.state.alert() {
            Some(alert) => ConnectError::CertificateRefused { peer, alert },
            None => ConnectError::Stream {
                peer,
                ahead,
                source: error.into(),
            },
        }
    }

    /// Whether new streams may be opened: no GOAWAY has arrived, and the connection stands.
    pub fn is_usable(&mut self) -> bool {
        let mut cx = Context::from_waker(noop_waker_ref());
        !matches!(self.requests.poll_ready(&mut cx), Poll::Ready(Err(_)))
    }

    pub(super) fn state(&self) -> &Arc<ConnectionState> {
        &self.state
    }

    /// How many streams the peer lets us have open.
    pub(super) fn peer_limit(&self) -> usize {
        self.requests.current_max_send_streams()
    }
}

fn request(head: ConnectHead) -> Result<Request<()>, ConnectError> {
    let text = head.authority.to_string();
    let authority = http::uri::Authority::try_from(text)
        .map_err(|_| ConnectError::Authority(head.authority))?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::from(authority);
    *request.headers_mut() = head.headers;
    Ok(request)
}

fn builder(config: &Config) -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(config.stream_window_bytes)
        .initial_connection_window_size(config.connection_window_bytes)
        .max_frame_size(config.frame_bytes)
        .max_header_list_size(config.header_list_bytes / 4)
        .max_send_buffer_size(config.send_buffer_bytes)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(small_frames_budget(config))
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(RESET_MEMORY)
        .enable_push(false);
    builder
}

async fn drive<IO>(
    mut connection: Connection<Metered<IO>, Bytes>,
    state: Arc<ConnectionState>,
    config: Config,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let pinger = connection.ping_pong().expect("taken once");
    let mut keepalive = Keepalive::new(&state, pinger, &config);
    let mut window = config.connection_window_bytes;
    poll_fn(|cx| {
        if keepalive.poll(cx).is_ready() {
            tracing::debug!("the peer is gone: no answer to a ping");
            return Poll::Ready(());
        }
        let wanted = window_for(&config, state.streams());
        if wanted > window {
            window = wanted;
            connection.set_target_window_size(wanted);
        }
        Pin::new(&mut connection).poll(cx).map(|ended| {
            if let Err(error) = ended {
                tracing::debug!(%error, "an HBONE connection ended");
            }
        })
    })
    .await;
}
