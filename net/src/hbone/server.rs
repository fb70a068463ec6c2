//! The accepting end: CONNECT requests out of a TLS connection.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use mesh::{authority::Authority, flow::EndReason};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
    time::{Instant, Sleep, sleep, timeout},
};

use super::{
    Config, ResetCode, Stream, StreamError,
    connection::{
        ConnectionState, ERROR_RESETS, Keepalive, Metered, REMEMBERED_RESETS, RESET_MEMORY,
        StreamGuard, small_frames_budget, window_for,
    },
};
use crate::tls::PeerIdentity;

/// How many requests a client may take back before they are answered: at once, and then per second (CVE-2023-44487).
const ABANDONED_BURST: u64 = 500;
const ABANDONED_PER_SECOND: u64 = 100;

/// How long handlers of a connection that has ended may take to notice.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a connection ended without a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeEnd {
    /// The client closed it.
    Closed,
    /// It was drained, and its last stream has ended.
    Drained,
    /// It carried no stream for [`Config::unused_deadline`].
    Unused,
}

/// Why a connection ended with a fault. Its streams ended with it.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No HTTP/2 preface within the deadline.
    #[error("no HTTP/2 preface within {after:?}")]
    Preface {
        /// The deadline.
        after: Duration,
    },
    /// The peer did not answer, or took nothing, for too long.
    #[error("the peer is gone: no answer to a ping")]
    Silent,
    /// The peer took back too many requests.
    #[error("the peer opens streams and resets them")]
    RapidReset,
    /// The peer broke the rules of HTTP/2, or those of ours that bound it, and was cut off.
    #[error("the peer is cut off, as it breaks the rules of HTTP/2")]
    Rules(#[source] StreamError),
    /// It broke under us, or the peer ended it with a fault of its own.
    #[error("the HTTP/2 connection failed")]
    Http(#[source] StreamError),
}

impl ServeError {
    /// What the metric and the log line say; `None` where the streams tell their own ends.
    pub fn end_reason(&self) -> Option<EndReason> {
        match self {
            Self::Preface { .. } => Some(EndReason::Http2Failed),
            Self::RapidReset | Self::Rules(_) => Some(EndReason::BadRequest),
            Self::Silent | Self::Http(_) => None,
        }
    }
}

impl From<h2::Error> for ServeError {
    fn from(error: h2::Error) -> Self {
        match error.is_library() && error.is_go_away() {
            true => Self::Rules(error.into()),
            false => Self::Http(error.into()),
        }
    }
}

/// A request that no tunnel can come of: it is answered 400, and nobody is asked.
#[derive(Debug, thiserror::Error)]
#[error("{method} {target} is no CONNECT to HOST:PORT")]
pub struct NotConnect {
    method: Method,
    /// As much of it as a line should hold.
    target: String,
}

/// Characters of a target that are told. A peer may send 64 KiB of them.
const TARGET_TOLD: usize = 128;

impl NotConnect {
    fn new(method: Method, uri: &Uri) -> Self {
        let target = uri.to_string().chars().take(TARGET_TOLD).collect();
        Self { method, target }
    }
}

/// A CONNECT that waits for its answer. Dropping it unanswered resets the stream.
#[derive(Debug)]
pub struct ConnectRequest {
    authority: Authority,
    headers: HeaderMap,
    peer: Arc<PeerIdentity>,
    body: h2::RecvStream,
    answer: SendResponse<Bytes>,
    guard: StreamGuard,
}

impl ConnectRequest {
    /// The destination that the client asks for.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The request's headers: `baggage`, `forwarded`, `traceparent`, `x-forwarded-network`.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Who asks, as its certificate proves.
    pub fn peer(&self) -> &Arc<PeerIdentity> {
        &self.peer
    }

    /// Waits until the client gives up. Race it against connecting upstream.
    pub async fn cancelled(&mut self) {
        // Either a reset or the end of the connection.
        let _ = poll_fn(|cx| self.answer.poll_reset(cx)).await;
        self.guard.connection().abandon();
    }

    /// Answers 200 with `headers`; what follows is the connection's bytes. Fails when the client is gone.
    pub fn accept(mut self, headers: HeaderMap) -> Result<Stream, StreamError> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let sent = self.answer.send_response(response, false);
        let send = sent.inspect_err(|_| self.guard.connection().abandon())?;
        Ok(Stream::new(send, self.body, self.guard))
    }

    /// Answers `status` and ends the stream.
    pub fn refuse(mut self, status: StatusCode) {
        refuse(&mut self.answer, status);
    }

    /// Too many handlers of streams that are gone still run: the client may try again.
    fn turn_away(mut self) {
        self.answer.send_reset(ResetCode::REFUSED_STREAM.reason());
    }
}

/// Ends a stream with `status`. That the client is gone already changes nothing.
fn refuse(answer: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    let _ = answer.send_response(response, true);
}

/// Serves one connection until it ends: each CONNECT runs `handler` in a task of its own, owned by this future.
///
/// When `drain` is ready the client gets GOAWAY, and streams that are open go on. Dropping this future ends the
/// connection and every stream. Requests that are no CONNECT, or name no destination, are answered 400 here and told to
/// `refused`.
pub async fn serve<IO, D, H, F>(
    io: IO,
    peer: PeerIdentity,
    config: &Config,
    drain: D,
    handler: H,
    refused: impl Fn(&NotConnect) + Send,
) -> Result<ServeEnd, ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send,
    D: Future<Output = ()> + Send,
    H: Fn(ConnectRequest) -> F + Send,
    F: Future<Output = ()> + Send + 'static,
{
    let state = ConnectionState::new();
    let io = Metered {
        io,
        state: Arc::clone(&state),
    };
    let handshake = builder(config).handshake(io);
    let mut connection = timeout(config.preface_deadline, handshake)
        .await
        .map_err(|_| ServeError::Preface {
            after: config.preface_deadline,
        })?
        .map_err(ServeError::from)?;
    let pinger = connection.ping_pong().expect("taken once");
    let mut serving = Serving {
        keepalive: Keepalive::new(&state, pinger, config),
        connection,
        config,
        peer: Arc::new(peer),
        window: config.connection_window_bytes,
        unused: Box::pin(sleep(config.unused_deadline)),
        end: ServeEnd::Closed,
        abandoned: Abandoned::new(),
        state,
    };
    // Streams beyond `max_streams` are refused by h2, so the rest are handlers of streams that were reset.
    let most_handlers = usize::try_from(config.max_streams).map_or(usize::MAX, |n| n * 2);
    let mut tasks = JoinSet::new();
    let mut drain = pin!(drain);
    let end = loop {
        tokio::select! {
            biased;
            () = &mut drain, if serving.end == ServeEnd::Closed => serving.shut_down(ServeEnd::Drained),
            // Before the connection, which is looked at once more after it.
            Some(ended) = tasks.join_next() => report(ended),
            event = poll_fn(|cx| serving.poll_event(cx, &refused)) => match event {
                Ok(Some(request)) if tasks.len() >= most_handlers => request.turn_away(),
                Ok(Some(request)) => { tasks.spawn(handler(request)); }
                Ok(None) => break Ok(serving.end),
                Err(error) => break Err(error),
            },
        }
    };
    drop(serving);
    // Streams that are left fail now; their handlers get a moment to see that, and to tell it.
    let telling = async {
        while let Some(ended) = tasks.join_next().await {
            report(ended);
        }
    };
    let _ = timeout(LAST_WORDS, telling).await;
    end
}

/// A handler that panicked took its stream with it, and nothing else.
fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a stream's handler failed");
    }
}

fn builder(config: &Config) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(config.stream_window_bytes)
        .initial_connection_window_size(config.connection_window_bytes)
        .max_frame_size(config.frame_bytes)
        .max_header_list_size(config.header_list_bytes)
        .max_concurrent_streams(config.max_streams)
        .max_send_buffer_size(config.send_buffer_bytes)
        // What a client may have open it may also take back at once.
        .max_pending_accept_reset_streams(usize::try_from(config.max_streams).unwrap_or(usize::MAX))
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(small_frames_budget(config))
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(RESET_MEMORY);
    builder
}

/// A budget for requests that are taken back, refilled over time.
struct Abandoned {
    spent: u64,
    seen: u64,
    refilled: Instant,
}

impl Abandoned {
    fn new() -> Self {
        Self {
            spent: 0,
            seen: 0,
            refilled: Instant::now(),
        }
    }

    /// Whether `total` requests taken back over the connection's life are too many by now.
    fn too_many(&mut self, total: u64) -> bool {
        let seconds = self.refilled.elapsed().as_secs();
        if seconds > 0 {
            self.refilled += Duration::from_secs(seconds);
            self.spent = self
                .spent
                .saturating_sub(seconds.saturating_mul(ABANDONED_PER_SECOND));
        }
        self.spent += total - self.seen;
        self.seen = total;
        self.spent > ABANDONED_BURST
    }
}

/// One connection and what watches over it.
struct Serving<'a, IO> {
    connection: Connection<Metered<IO>, Bytes>,
    keepalive: Keepalive,
    state: Arc<ConnectionState>,
    config: &'a Config,
    peer: Arc<PeerIdentity>,
    window: u32,
    unused: Pin<Box<Sleep>>,
    end: ServeEnd,
    abandoned: Abandoned,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Serving<'_, IO> {
    /// The next request, `None` when the connection has ended.
    fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        refused: &impl Fn(&NotConnect),
    ) -> Poll<Result<Option<ConnectRequest>, ServeError>> {
        if self.keepalive.poll(cx).is_ready() {
            return Poll::Ready(Err(ServeError::Silent));
        }
        self.poll_unused(cx);
        loop {
            let accepted = match self.connection.poll_accept(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(Ok(None)),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(self.ended(error)),
                Poll::Ready(Some(Ok(accepted))) => accepted,
            };
            if self.abandoned.too_many(self.state.abandoned()) {
                self.connection
                    .abrupt_shutdown(ResetCode::ENHANCE_YOUR_CALM.reason());
                // Whatever the socket takes of the GOAWAY goes out; the connection is dropped right after.
                let _ = self.connection.poll_closed(cx);
                return Poll::Ready(Err(ServeError::RapidReset));
            }
            match self.check(accepted) {
                Ok(request) => return Poll::Ready(Ok(Some(request))),
                Err(error) => refused(&error),
            }
        }
    }

    /// A client that goes away without a word has closed the connection, unless it left streams behind.
    fn ended(&self, error: h2::Error) -> Result<Option<ConnectRequest>, ServeError> {
        let gone = error.is_io() && self.state.streams() == 0;
        if gone || error.reason() == Some(h2::Reason::NO_ERROR) {
            return Ok(None);
        }
        Err(error.into())
    }

    fn check(
        &mut self,
        (request, mut answer): (Request<h2::RecvStream>, SendResponse<Bytes>),
    ) -> Result<ConnectRequest, NotConnect> {
        let (head, body) = request.into_parts();
        let connect =
            head.method == Method::CONNECT && head.extensions.get::<h2::ext::Protocol>().is_none();
        let authority = head.uri.authority().map(http::uri::Authority::as_str);
        let authority = authority.filter(|_| connect).map(str::parse::<Authority>);
        let Some(Ok(authority)) = authority else {
            refuse(&mut answer, StatusCode::BAD_REQUEST);
            return Err(NotConnect::new(head.method, &head.uri));
        };
        let guard = self.state.open();
        self.fit_window();
        Ok(ConnectRequest {
            authority,
            headers: head.headers,
            peer: Arc::clone(&self.peer),
            body,
            answer,
            guard,
        })
    }

    fn fit_window(&mut self) {
        let window = window_for(self.config, self.state.streams());
        if window > self.window {
            self.window = window;
            self.connection.set_target_window_size(window);
        }
    }

    fn poll_unused(&mut self, cx: &mut Context<'_>) {
        while self.end == ServeEnd::Closed && self.unused.as_mut().poll(cx).is_ready() {
            let since = self.state.unused_since();
            if since.elapsed() >= self.config.unused_deadline {
                self.shut_down(ServeEnd::Unused);
            } else {
                let next = since + self.config.unused_deadline;
                self.unused.as_mut().reset(next);
            }
        }
    }

    fn shut_down(&mut self, end: ServeEnd) {
        self.end = end;
        self.connection.graceful_shutdown();
    }
}
