//! One tunnelled connection: two half-streams, each of which ends on its own.

use std::{
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::StreamGuard;

/// Why a stream was reset (RFC 9113 7).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResetCode(u32);

impl ResetCode {
    /// Nothing was wrong: the sender just wants no more.
    pub const NO_ERROR: Self = Self(0);
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: Self = Self(1);
    /// Something failed inside the sender.
    pub const INTERNAL_ERROR: Self = Self(2);
    /// Not processed at all: safe to try again elsewhere.
    pub const REFUSED_STREAM: Self = Self(7);
    /// The sender wants the stream no longer.
    pub const CANCEL: Self = Self(8);
    /// The TCP connection behind a CONNECT was reset (RFC 9113 8.5).
    pub const CONNECT_ERROR: Self = Self(10);
    /// The peer costs too much.
    pub const ENHANCE_YOUR_CALM: Self = Self(11);

    /// The code on the wire.
    pub fn code(self) -> u32 {
        self.0
    }

    pub(super) fn reason(self) -> Reason {
        Reason::from(self.0)
    }
}

impl From<Reason> for ResetCode {
    fn from(reason: Reason) -> Self {
        Self(u32::from(reason))
    }
}

impl fmt::Debug for ResetCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.reason(), f)
    }
}

impl fmt::Display for ResetCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.reason(), f)
    }
}

/// How a stream ended other than by its end.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    /// RST_STREAM arrived, or was sent.
    #[error("the stream was reset with {0}")]
    Reset(ResetCode),
    /// The connection ended with GOAWAY, the stream with it.
    #[error("the connection was ended with {0}")]
    GoAway(ResetCode),
    /// The connection broke under the stream.
    #[error("the connection broke ({0})")]
    Broken(io::ErrorKind),
}

impl From<h2::Error> for StreamError {
    fn from(error: h2::Error) -> Self {
        let code = error
            .reason()
            .map_or(ResetCode::INTERNAL_ERROR, ResetCode::from);
        match error.get_io() {
            Some(io) => Self::Broken(io.kind()),
            None if error.is_go_away() => Self::GoAway(code),
            None if error.is_reset() => Self::Reset(code),
            // What remains is our own misuse of a stream that is already over.
            None => Self::Broken(io::ErrorKind::BrokenPipe),
        }
    }
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        let kind = match error {
            StreamError::Reset(_) => io::ErrorKind::ConnectionReset,
            StreamError::GoAway(_) => io::ErrorKind::ConnectionAborted,
            StreamError::Broken(kind) => kind,
        };
        Self::new(kind, error)
    }
}

/// A tunnelled connection. Dropping it before both halves have ended resets it with CANCEL.
///
/// Through `AsyncRead` and `AsyncWrite`, or without copies through [`Stream::into_halves`]. `shutdown` ends our half
/// and leaves the peer's open.
#[derive(Debug)]
pub struct Stream {
    send: SendHalf,
    recv: RecvHalf,
}

/// The half toward the peer.
#[derive(Debug)]
pub struct SendHalf {
    inner: h2::SendStream<Bytes>,
    finished: bool,
    /// Bytes of the application that went with the CONNECT, and have not been read yet.
    ahead: u16,
    _guard: Arc<StreamGuard>,
}

/// The half from the peer.
#[derive(Debug)]
pub struct RecvHalf {
    inner: h2::RecvStream,
    chunk: Bytes,
    _guard: Arc<StreamGuard>,
}

impl Stream {
    pub(super) fn new(
        send: h2::SendStream<Bytes>,
        recv: h2::RecvStream,
        guard: StreamGuard,
    ) -> Self {
        Self::ahead(send, recv, guard, 0)
    }

    /// A stream on which the first `ahead` bytes of the application are under way.
    pub(super) fn ahead(
        send: h2::SendStream<Bytes>,
        recv: h2::RecvStream,
        guard: StreamGuard,
        ahead: usize,
    ) -> Self {
        let guard = Arc::new(guard);
        Self {
            send: SendHalf {
                inner: send,
                finished: false,
                ahead: u16::try_from(ahead).expect("no more than ahead::MOST"),
                _guard: Arc::clone(&guard),
            },
            recv: RecvHalf {
                inner: recv,
                chunk: Bytes::new(),
                _guard: guard,
            },
        }
    }

    /// Takes the halves apart, for two owners. The stream lives until both are dropped.
    pub fn into_halves(self) -> (SendHalf, RecvHalf) {
        (self.send, self.recv)
    }

    /// Waits until more than `seen` bytes have arrived, or the peer has ended its half, and shows all that have: they stay
    /// to be read. Their credit is the peer's only then, so that it bounds what can be peeked at. Cancel-safe.
    pub async fn peek(&mut self, seen: usize) -> Result<&[u8], StreamError> {
        let recv = &mut self.recv;
        poll_fn(|cx| recv.poll_peek(cx, seen)).await?;
        Ok(&recv.chunk)
    }

    /// Bytes that have arrived and not been taken.
    #[cfg(test)]
    pub(super) fn recv_used(&mut self) -> usize {
        self.recv.inner.flow_control().used_capacity()
    }

    /// Resets the stream with `code`. What was queued is dropped.
    pub fn reset(mut self, code: ResetCode) {
        self.send.reset(code);
    }
}

impl SendHalf {
    /// Waits until at least one byte may be sent; answers how many, at most `want`.
    ///
    /// The credit stays reserved for this stream until it is used or [`SendHalf::release`]d.
    pub fn poll_capacity(
        &mut self,
        cx: &mut Context<'_>,
        want: usize,
    ) -> Poll<Result<usize, StreamError>> {
        self.inner.reserve_capacity(want);
        let ready = self.inner.capacity();
        if ready > 0 {
            return Poll::Ready(Ok(ready.min(want)));
        }
        match ready!(self.inner.poll_capacity(cx)) {
            Some(Ok(capacity)) => Poll::Ready(Ok(capacity.min(want))),
            Some(Err(error)) => Poll::Ready(Err(error.into())),
            None => Poll::Ready(match self.poll_reset(cx) {
                Poll::Ready(error) => Err(error),
                Poll::Pending => Err(StreamError::Broken(io::ErrorKind::BrokenPipe)),
            }),
        }
    }

    /// Queues `data`, which goes out at once. Send no more than [`SendHalf::poll_capacity`] allowed: more is queued.
    pub fn send(&mut self, data: Bytes) -> Result<(), StreamError> {
        Ok(self.inner.send_data(data, false)?)
    }

    /// What of `data`, which is the next that the application wrote, has not gone with the CONNECT.
    pub(crate) fn not_sent_ahead(&mut self, mut data: Bytes) -> Bytes {
        let sent = data.len().min(usize::from(self.ahead));
        self.ahead -= u16::try_from(sent).expect("no more than `ahead`");
        data.advance(sent);
        data
    }

    /// Gives back credit that was reserved and not used, so that other streams can have it.
    pub fn release(&mut self) {
        self.inner.reserve_capacity(0);
    }

    /// Ends this half (END_STREAM) after what was queued. Does nothing the second time.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        if self.finished {
            return Ok(());
        }
        self.finished = true;
        Ok(self.inner.send_data(Bytes::new(), true)?)
    }

    /// Resets the whole stream with `code`. What was queued is dropped.
    pub fn reset(&mut self, code: ResetCode) {
        self.inner.send_reset(code.reason());
    }

    /// Waits until the peer resets the stream, or the connection ends.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match ready!(self.inner.poll_reset(cx)) {
            Ok(reason) => Poll::Ready(StreamError::Reset(reason.into())),
            Err(error) => Poll::Ready(error.into()),
        }
    }
}

impl RecvHalf {
    /// The next piece of data, or `None` after the peer's END_STREAM. The peer's credit is returned at once.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, StreamError>>> {
        let data = ready!(self.poll_uncredited(cx));
        if let Some(Ok(data)) = &data {
            self.credit(data.len());
        }
        Poll::Ready(data)
    }

    /// As [`RecvHalf::poll_data`], but the peer may send no more in its place until [`RecvHalf::credit`] says so.
    pub fn poll_uncredited(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, StreamError>>> {
        if self.chunk.is_empty() {
            return self.poll_arrived(cx);
        }
        Poll::Ready(Some(Ok(std::mem::take(&mut self.chunk))))
    }

    fn poll_peek(&mut self, cx: &mut Context<'_>, seen: usize) -> Poll<Result<(), StreamError>> {
        while self.chunk.len() <= seen {
            match ready!(self.poll_arrived(cx)) {
                Some(Ok(data)) if self.chunk.is_empty() => self.chunk = data,
                Some(Ok(data)) => self.chunk = [&self.chunk[..], &data].concat().into(),
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => break,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_arrived(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, StreamError>>> {
        loop {
            match ready!(self.inner.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() && !self.inner.is_end_stream() => {}
                Some(Ok(data)) if data.is_empty() => return Poll::Ready(None),
                Some(Ok(data)) => return Poll::Ready(Some(Ok(data))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => return Poll::Ready(None),
            }
        }
    }

    /// Whether all that the peer sent has been taken, its END_STREAM included.
    pub fn has_ended(&self) -> bool {
        self.chunk.is_empty() && self.inner.is_end_stream()
    }

    /// Returns credit for `bytes` that were consumed.
    pub fn credit(&mut self, bytes: usize) {
        // Fails only when more is returned than was received, or the stream is over and needs none.
        let _ = self.inner.flow_control().release_capacity(bytes);
    }
}

impl AsyncRead for RecvHalf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.chunk.is_empty() {
            match ready!(self.poll_uncredited(cx)) {
                Some(data) => self.chunk = data?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = self.chunk.len().min(buf.remaining());
        buf.put_slice(&self.chunk[..taken]);
        self.chunk.advance(taken);
        if self.chunk.is_empty() {
            // The shortest piece holds all the memory that it was cut from.
            self.chunk = Bytes::new();
        }
        self.credit(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SendHalf {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let allowed = ready!(self.poll_capacity(cx, buf.len()))?;
        let taken = allowed.min(buf.len());
        self.send(Bytes::copy_from_slice(&buf[..taken]))?;
        self.release();
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's task writes whatever is queued as soon as the socket takes it.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish().map_err(io::Error::from))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.recv).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.send).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.send).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.send).poll_shutdown(cx)
    }
}
