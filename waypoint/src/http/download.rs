//! A response on its way to the client, and the end of the request that goes with it.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header::CONNECTION, response};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use mesh::l7::response_flags::Flag;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    arriving::Arriving,
    body::{Body, BodyError},
    exchange::Exchange,
    filter::{self, grpc_web},
    grpc, hygiene, reply,
    served::Busy,
    telemetry,
    upstream::{Permit, pool::Held},
};

/// How long nothing may move in either direction.
pub(super) const STREAM_IDLE: Duration = Duration::from_secs(300);

/// How a request ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ending {
    /// Bytes of the request's body.
    pub(crate) request_bytes: u64,
    /// Bytes of the response's body.
    pub(crate) response_bytes: u64,
    /// gRPC messages of the response.
    pub(crate) response_messages: u64,
    /// gRPC messages of the request.
    pub(crate) request_messages: u64,
    /// `grpc-status`, of headers or trailers.
    pub(crate) grpc_status: Option<u16>,
    /// From the head of the request to the end of the response.
    pub(crate) duration: Duration,
    /// And to the end of its body; none: there was none yet.
    pub(crate) request_duration: Option<Duration>,
}

/// A request until it is over: dropped before, the client went away.
pub(super) struct Ongoing {
    state: Option<Box<State>>,
}

struct State {
    exchange: Exchange,
    ending: Ending,
    body: Body,
    held: Option<Held>,
    permit: Option<Permit>,
    /// When the response must be over.
    deadline: Option<Instant>,
    _busy: Busy,
}

impl Ongoing {
    pub(super) fn new(exchange: Exchange, busy: Busy) -> Self {
        Self {
            state: Some(Box::new(State {
                exchange,
                ending: Ending::default(),
                body: Body::empty(),
                held: None,
                permit: None,
                deadline: None,
                _busy: busy,
            })),
        }
    }

    fn state(&mut self) -> &mut State {
        self.state.as_mut().expect("taken only when it is over")
    }

    pub(super) fn exchange(&mut self) -> &mut Exchange {
        &mut self.state().exchange
    }

    /// The body whose bytes are told.
    pub(super) fn carries(&mut self, body: Body) {
        self.state().body = body;
    }

    /// What the response holds until it is over.
    pub(super) fn holds(&mut self, held: Held, permit: Permit) {
        let state = self.state();
        state.held = Some(held);
        state.permit = Some(permit);
    }

    /// Moves it elsewhere; nothing is left here to tell.
    pub(super) fn take(&mut self) -> Self {
        Self {
            state: self.state.take(),
        }
    }

    /// When the response must be over.
    pub(super) fn ends_by(&mut self, deadline: Option<Instant>) {
        self.state().deadline = deadline;
    }

    /// Completes the head that the client is told, and notes it.
    pub(super) fn answered(&mut self, parts: &mut response::Parts) {
        let state = self.state();
        filter::response::apply(&state.exchange, &mut parts.headers);
        telemetry::responded(&mut state.exchange, parts);
        state.exchange.status = parts.status.as_u16();
        state.ending.grpc_status = grpc::status(&parts.headers);
    }

    /// Bytes that went to the client outside of a response's body: of an upgraded connection.
    pub(super) fn tunnelled(&mut self, received: u64, sent: u64) {
        let state = self.state();
        state.ending.request_bytes = received;
        state.ending.response_bytes = sent;
    }

    /// It is over as it should be, or failed as its flags tell. `reusable`: the connection to the endpoint may be.
    pub(super) fn finish(&mut self, reusable: bool) {
        let Some(state) = self.state.take() else {
            return;
        };
        let State {
            mut exchange,
            mut ending,
            body,
            held,
            permit,
            ..
        } = *state;
        if let Some(mut held) = held {
            held.finish(reusable && body.complete());
        }
        let flags = exchange.flags;
        if flags.contains(Flag::UpstreamConnectionTermination)
            || flags.contains(Flag::UpstreamRemoteReset)
        {
            permit.iter().for_each(Permit::failed);
        }
        drop(permit);
        ending.request_bytes += body.received();
        ending.request_messages = body.messages();
        ending.duration = exchange.started.elapsed();
        let ended = body.ended(exchange.started);
        ending.request_duration = ended.map(|it| it.duration_since(exchange.started));
        telemetry::finished(&mut exchange, &ending);
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        if let Some(state) = &mut self.state {
            state.exchange.flag(Flag::DownstreamConnectionTermination);
            if state.exchange.details.is_empty() {
                state.exchange.details = "downstream_remote_disconnect".into();
            }
            self.finish(false);
        }
    }
}

/// The body of a response.
pub(crate) struct Download {
    inner: Inner,
    ongoing: Ongoing,
    messages: grpc::MessageCounter,
    counted: bool,
    timer: Option<Pin<Box<Sleep>>>,
    moved: bool,
}

enum Inner {
    Full(Bytes),
    Stream(Arriving),
    Web(Box<grpc_web::Encoder>),
    Over,
}

/// The response took longer than the request may.
#[derive(Debug, thiserror::Error)]
#[error("the response took too long")]
struct TooSlow;

impl Download {
    /// A response that is all there.
    pub(super) fn full(bytes: Bytes, ongoing: Ongoing) -> Self {
        Self::new(Inner::Full(bytes), ongoing)
    }

    /// No body, of a request that is told elsewhere.
    pub(super) fn none() -> Self {
        Self {
            inner: Inner::Over,
            ongoing: Ongoing { state: None },
            messages: grpc::MessageCounter::default(),
            counted: false,
            timer: None,
            moved: false,
        }
    }

    /// A response as it arrives.
    pub(super) fn stream(incoming: Arriving, ongoing: Ongoing) -> Self {
        Self::new(Inner::Stream(incoming), ongoing)
    }

    /// A response of gRPC for a client of gRPC-Web.
    pub(super) fn web(encoder: grpc_web::Encoder, ongoing: Ongoing) -> Self {
        Self::new(Inner::Web(Box::new(encoder)), ongoing)
    }

    fn new(inner: Inner, mut ongoing: Ongoing) -> Self {
        let counted = ongoing.exchange().is_grpc();
        let mut download = Self {
            inner,
            ongoing,
            messages: grpc::MessageCounter::default(),
            counted,
            timer: None,
            moved: false,
        };
        if download.inner.is_over() {
            download.over();
        }
        download
    }

    fn over(&mut self) {
        self.inner = Inner::Over;
        self.ongoing.finish(true);
    }

    fn failed(&mut self, flag: Flag, details: &'static str) {
        self.inner = Inner::Over;
        let exchange = self.ongoing.exchange();
        exchange.flag(flag);
        exchange.details = details.into();
        self.ongoing.finish(false);
    }

    fn data(&mut self, data: &Bytes) {
        self.moved = true;
        let counted = self.counted;
        let state = self.ongoing.state();
        state.ending.response_bytes += data.len() as u64;
        if counted {
            state.ending.response_messages += self.messages.count(data);
        }
        if self.inner.is_over() {
            self.over();
        }
    }

    fn trailers(&mut self, trailers: &mut HeaderMap) {
        hygiene::strip_forbidden_trailers(trailers);
        let state = self.ongoing.state();
        state.ending.grpc_status = grpc::status(trailers).or(state.ending.grpc_status);
        self.over();
    }

    /// Ends a response that takes too long, or in which nothing moves.
    fn poll_time(&mut self, cx: &mut Context<'_>) -> Poll<(Flag, &'static str)> {
        let idle = Instant::now() + STREAM_IDLE;
        let deadline = self.ongoing.state().deadline;
        let next = deadline.map_or(idle, |it| it.min(idle));
        let timer = match &mut self.timer {
            Some(timer) => {
                if std::mem::take(&mut self.moved) {
                    timer.as_mut().reset(next);
                }
                timer
            }
            none => none.insert(Box::pin(sleep_until(next))),
        };
        if timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        match deadline.is_some_and(|it| it <= Instant::now()) {
            true => Poll::Ready((Flag::UpstreamRequestTimeout, "response_timeout")),
            false => Poll::Ready((Flag::StreamIdleTimeout, "stream_idle_timeout")),
        }
    }
}

impl Inner {
    fn is_over(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_empty(),
            Self::Stream(incoming) => incoming.is_end_stream(),
            Self::Web(_) => false,
            Self::Over => true,
        }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Stream(incoming) => Pin::new(incoming).poll_frame(cx),
            Self::Web(encoder) => encoder.poll_frame(cx),
            Self::Over => Poll::Ready(None),
        }
    }
}

impl HttpBody for Download {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match this.inner.poll_frame(cx) {
            Poll::Pending => match this.poll_time(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready((flag, details)) => {
                    this.failed(flag, details);
                    Poll::Ready(Some(Err(TooSlow.into())))
                }
            },
            Poll::Ready(None) => {
                this.over();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                this.failed(broken(&error), "upstream_reset_after_response_started");
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(Some(Ok(mut frame))) => {
                if let Some(data) = frame.data_ref() {
                    let data = data.clone();
                    this.data(&data);
                } else if let Some(trailers) = frame.trailers_mut() {
                    this.trailers(trailers);
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.inner, Inner::Over)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Stream(incoming) => incoming.size_hint(),
            Inner::Web(_) => SizeHint::default(),
            Inner::Over => SizeHint::with_exact(0),
        }
    }
}

/// Who broke a response off.
fn broken(error: &BodyError) -> Flag {
    let source = error.downcast_ref::<hyper::Error>();
    match source.and_then(super::forward::h2_error) {
        Some(it) if it.is_reset() => Flag::UpstreamRemoteReset,
        _ => Flag::UpstreamConnectionTermination,
    }
}

impl Download {
    /// A local answer.
    pub(super) fn reply(reply: reply::Reply, mut ongoing: Ongoing) -> http::Response<Self> {
        let exchange = ongoing.exchange();
        exchange.flags.merge(reply.flags);
        if !reply.details.is_empty() {
            exchange.details = reply.details.clone();
        }
        let head_only = exchange
            .head
            .as_ref()
            .is_some_and(|it| it.method == http::Method::HEAD);
        let refused = reply.flags.contains(Flag::DownstreamProtocolError);
        let rendered = reply.render(exchange.is_grpc());
        let (mut parts, bytes) = rendered.into_parts();
        ongoing.answered(&mut parts);
        if refused {
            // Whatever follows such a request is not to be trusted (HTTP/2 has its own ways: hyper drops it there).
            parts
                .headers
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let bytes = if head_only { Bytes::new() } else { bytes };
        http::Response::from_parts(parts, Self::full(bytes, ongoing))
    }
}
