//! What both ends of a connection share: how many streams it carries, whether its peer is alive, how big its window is.

use std::{
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use h2::{Ping, PingPong};
use parking_lot::Mutex;
use rustls::AlertDescription;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

use super::Config;

/// Streams that we have reset are remembered for this long, this many of them, so that what is in flight toward them is
/// no error of the peer. h2 ends a connection after [`ERROR_RESETS`] of such errors, and applications reset often.
pub(super) const RESET_MEMORY: Duration = Duration::from_secs(5);
/// See [`RESET_MEMORY`]. Each costs some 500 bytes while it is remembered.
pub(super) const REMEMBERED_RESETS: usize = 10_000;
/// Streams that we reset because of the peer's errors, over the life of a connection, beyond which it ends.
pub(super) const ERROR_RESETS: usize = 1024;

/// What small DATA frames that nobody has read yet may cost a connection, in bytes: h2 counts 256 for each, less what it
/// carries, and ends the connection beyond. An application that writes small messages to one that is busy must not cost
/// the others on its connection theirs, so this is what the window may hold at most, and not what it holds at first.
pub(super) fn small_frames_budget(config: &Config) -> usize {
    let window = usize::try_from(config.max_connection_window_bytes);
    window.unwrap_or(usize::MAX).min(SMALL_FRAMES) * 255
}

/// Frames of one byte that may wait, however many the window lets come: h2 keeps them in one list, of 250 bytes for each,
/// that doubles when it is full. This is a little less than a full one of 2^17, which takes 33 MB, and 49 while it grows
/// to that.
const SMALL_FRAMES: usize = 130_000;

/// The state of one connection that its streams and its owner look at.
#[derive(Debug)]
pub(super) struct ConnectionState {
    streams: AtomicUsize,
    unused_since: Mutex<Instant>,
    /// The alert with which the peer ended TLS, which is all we learn when it refuses our certificate.
    alert: Mutex<Option<AlertDescription>>,
    read: AtomicU64,
    written: AtomicU64,
    blocked: AtomicBool,
    /// A ping is not answered yet.
    in_doubt: AtomicBool,
    /// Requests that the client took back before they were answered.
    abandoned: AtomicU64,
}

impl ConnectionState {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            streams: AtomicUsize::new(0),
            unused_since: Mutex::new(Instant::now()),
            alert: Mutex::new(None),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            blocked: AtomicBool::new(false),
            in_doubt: AtomicBool::new(false),
            abandoned: AtomicU64::new(0),
        })
    }

    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Acquire)
    }

    /// Since when no stream has been open; the present while one is.
    pub(super) fn unused_since(&self) -> Instant {
        if self.streams() > 0 {
            return Instant::now();
        }
        *self.unused_since.lock()
    }

    pub(super) fn alert(&self) -> Option<AlertDescription> {
        *self.alert.lock()
    }

    /// Whether the peer may be gone: it was silent, and owes an answer to a ping.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.in_doubt.load(Ordering::Relaxed)
    }

    pub(super) fn abandon(&self) {
        self.abandoned.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn abandoned(&self) -> u64 {
        self.abandoned.load(Ordering::Relaxed)
    }

    pub(super) fn open(self: &Arc<Self>) -> StreamGuard {
        self.streams.fetch_add(1, Ordering::AcqRel);
        StreamGuard(Arc::clone(self))
    }
}

/// Counts one stream for as long as it lives.
#[derive(Debug)]
pub(super) struct StreamGuard(Arc<ConnectionState>);

impl StreamGuard {
    pub(super) fn connection(&self) -> &ConnectionState {
        &self.0
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        if self.0.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            *self.0.unused_since.lock() = Instant::now();
        }
    }
}

/// Pings a peer that has been silent, or takes nothing, and says when it must be given up.
///
/// A connection on which bytes move costs no pings: what arrives proves the peer as well as an answer does.
pub(super) struct Keepalive {
    state: Arc<ConnectionState>,
    pinger: PingPong,
    timer: Pin<Box<Sleep>>,
    seen: (u64, u64),
    after: Duration,
    timeout: Duration,
}

impl Keepalive {
    pub(super) fn new(state: &Arc<ConnectionState>, pinger: PingPong, config: &Config) -> Self {
        Self {
            state: Arc::clone(state),
            pinger,
            timer: Box::pin(sleep(config.ping_after)),
            seen: (0, 0),
            after: config.ping_after,
            timeout: config.ping_timeout,
        }
    }

    /// Ready when the peer has to be given up.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_waiting() && self.pinger.poll_pong(cx).is_ready() {
            self.wait(false);
            self.rearm(self.after);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let moved = self.moved();
            let waited = self.is_waiting();
            if moved {
                self.rearm(if waited { self.timeout } else { self.after });
            } else if waited {
                return Poll::Ready(());
            } else {
                let sent = self.pinger.send_ping(Ping::opaque()).is_ok();
                self.rearm(self.timeout);
                let waiting = sent && self.pinger.poll_pong(cx).is_pending();
                self.wait(waiting);
            }
        }
        Poll::Pending
    }

    fn is_waiting(&self) -> bool {
        self.state.is_in_doubt()
    }

    fn wait(&self, for_pong: bool) {
        self.state.in_doubt.store(for_pong, Ordering::Relaxed);
    }

    /// Whether the peer has shown life since the last look: it took bytes, or it sent some while we had none waiting.
    fn moved(&mut self) -> bool {
        let state = &self.state;
        let now = (
            state.read.load(Ordering::Relaxed),
            state.written.load(Ordering::Relaxed),
        );
        let blocked = state.blocked.load(Ordering::Relaxed);
        let moved = if blocked {
            now.1 != self.seen.1
        } else {
            now.0 != self.seen.0
        };
        self.seen = now;
        moved
    }

    fn rearm(&mut self, after: Duration) {
        self.timer.as_mut().reset(Instant::now() + after);
    }
}

/// The connection's window for a number of streams: large enough that a quarter of it is never one stream's, and that
/// streams nobody reads leave room for the others.
pub(super) fn window_for(config: &Config, streams: usize) -> u32 {
    let streams = u32::try_from(streams).unwrap_or(u32::MAX);
    // In steps, so that the window is not announced anew for each stream.
    let wanted = (streams.saturating_add(8) / 8 * 8).saturating_mul(config.stream_window_bytes);
    let most = config
        .max_connection_window_bytes
        .clamp(config.connection_window_bytes, (1 << 31) - 1);
    wanted.clamp(config.connection_window_bytes, most)
}

/// A transport that tells the [`ConnectionState`] what moves through it.
#[derive(Debug)]
pub(super) struct Metered<IO> {
    pub(super) io: IO,
    pub(super) state: Arc<ConnectionState>,
}

impl<IO> Metered<IO> {
    fn wrote(&self, result: &Poll<io::Result<usize>>) {
        match result {
            Poll::Ready(Ok(bytes)) => {
                let bytes = u64::try_from(*bytes).unwrap_or(u64::MAX);
                self.state.written.fetch_add(bytes, Ordering::Relaxed);
                self.state.blocked.store(false, Ordering::Relaxed);
            }
            Poll::Pending => self.state.blocked.store(true, Ordering::Relaxed),
            Poll::Ready(Err(_)) => {}
        }
    }

    fn failed(&self, error: &io::Error) {
        let tls = error.get_ref().and_then(|e| e.downcast_ref());
        if let Some(rustls::Error::AlertReceived(alert)) = tls {
            *self.state.alert.lock() = Some(*alert);
        }
    }
}

impl<IO: AsyncRead + Unpin> Metered<IO> {
    /// A peer that refuses our certificate sends an alert and hangs up. Whoever writes then may notice the second first:
    /// the failure waits until the alert has been read, which a connection that has been hung up on soon lets us.
    fn once_heard<T>(
        &mut self,
        result: Poll<io::Result<T>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        let Poll::Ready(Err(error)) = &result else {
            return result;
        };
        let hung_up = matches!(error.kind(), BrokenPipe | ConnectionReset);
        // One that has been in HTTP/2 has taken our certificate.
        if !hung_up || self.state.read.load(Ordering::Relaxed) > 0 {
            return result;
        }
        let mut byte = [0];
        match Pin::new(&mut self.io).poll_read(cx, &mut ReadBuf::new(&mut byte)) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(error)) => self.failed(&error),
            Poll::Ready(Ok(())) => {}
        }
        result
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Metered<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        match &result {
            Poll::Ready(Ok(())) => {
                let bytes = u64::try_from(buf.filled().len() - before).unwrap_or(u64::MAX);
                self.state.read.fetch_add(bytes, Ordering::Relaxed);
            }
            Poll::Ready(Err(error)) => self.failed(error),
            Poll::Pending => {}
        }
        result
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Metered<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buf);
        self.wrote(&result);
        self.once_heard(result, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.wrote(&result);
        self.once_heard(result, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_flush(cx);
        self.once_heard(result, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
