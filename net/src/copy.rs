//! Bytes both ways between two connections, faithfully: an end is passed on as an end, a reset as a reset.
//!
//! Buffers exist only while bytes move. A TCP side is read when it is readable and the other side has room, first into
//! a small exact piece and, while reads come back full, into up to 240 KiB. What a tunnel delivers is written as it
//! is. Nothing waits for more bytes to come: whatever has arrived is passed on at once.

mod pump;
mod through;

use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{io::Interest, net::TcpStream};

use crate::hbone::{RecvHalf, ResetCode, SendHalf, Stream, StreamError};

pub use through::through;

#[cfg(test)]
mod tests;

/// One end of a copy.
#[derive(Debug)]
pub enum Endpoint {
    /// A plain connection.
    Tcp(TcpStream),
    /// A tunnelled one.
    Tunnel(Stream),
}

impl From<TcpStream> for Endpoint {
    fn from(tcp: TcpStream) -> Self {
        Self::Tcp(tcp)
    }
}

impl From<Stream> for Endpoint {
    fn from(stream: Stream) -> Self {
        Self::Tunnel(stream)
    }
}

/// Payload bytes that have been passed on, readable while the copy runs.
#[derive(Debug, Default)]
pub struct Counters {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Counters {
    /// From downstream to upstream: the request.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// From upstream to downstream: the response.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// An end of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Where the connection was accepted.
    Downstream,
    /// Where it was dialled.
    Upstream,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }
}

/// How a copy ended.
#[derive(Debug)]
pub enum End {
    /// Both sides ended their half; this one first.
    Finished(Side),
    /// This side reset the connection, and the other was told so.
    Reset(Side),
    /// This side broke in another way (time-out, no route, a tunnel that ended under it), and the other was reset.
    Failed(Side, io::Error),
    /// The caller's signal; both sides were reset.
    Cancelled,
}

/// Copies until both directions have ended, one side fails, or `cancel` is ready. When it returns both connections are
/// closed, as a [`Pair`] closes them.
pub fn bidirectional(
    downstream: impl Into<Endpoint>,
    upstream: impl Into<Endpoint>,
    counters: &Counters,
    cancel: impl Future<Output = ()>,
) -> impl Future<Output = End> {
    // Not an `async fn`: that would keep room for its arguments twice, for as long as the connection lives.
    let mut pair = Pair::new(downstream, upstream);
    async move { pair.copy(counters, pin!(cancel)).await }
}

/// Two connections, the bytes of one meant for the other. Dropping it closes both: by a reset, unless the copy came to an
/// end that was one, as a transfer that was cut must not look complete.
pub struct Pair {
    downstream: Cut,
    upstream: Cut,
}

impl Pair {
    /// Nothing is copied yet.
    pub fn new(downstream: impl Into<Endpoint>, upstream: impl Into<Endpoint>) -> Self {
        Self {
            downstream: Cut::unless_done(downstream.into()),
            upstream: Cut::unless_done(upstream.into()),
        }
    }

    /// Copies until both directions have ended, one side fails, or `cancel` is ready, which cuts at once: TCP by RST, a
    /// tunnel by RST_STREAM(CANCEL). To be called once; the ends are passed on when the pair is dropped.
    pub async fn copy(
        &mut self,
        counters: &Counters,
        cancel: Pin<&mut impl Future<Output = ()>>,
    ) -> End {
        let (down, up) = (&mut self.downstream, &mut self.upstream);
        let end = run(&mut down.ends, &mut up.ends, counters, cancel).await;
        (down.reset, up.reset) = match &end {
            End::Finished(_) => (None, None),
            End::Cancelled => (Some(ResetCode::CANCEL), Some(ResetCode::CANCEL)),
            End::Reset(side) | End::Failed(side, _) => {
                let told = Some(ResetCode::CONNECT_ERROR);
                match side {
                    Side::Downstream => (None, told),
                    Side::Upstream => (told, None),
                }
            }
        };
        end
    }
}

/// A connection that ends with a reset unless the copy says otherwise.
struct Cut {
    ends: Ends,
    reset: Option<ResetCode>,
}

impl Cut {
    fn unless_done(endpoint: Endpoint) -> Self {
        Self {
            ends: Ends::of(endpoint),
            reset: Some(ResetCode::CANCEL),
        }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.ends.close(self.reset);
    }
}

/// A connection taken apart, so that both directions can be worked on at once.
enum Ends {
    Tcp(TcpStream),
    Tunnel(SendHalf, RecvHalf),
}

impl Ends {
    fn of(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Tcp(tcp) => Self::Tcp(tcp),
            Endpoint::Tunnel(stream) => {
                let (send, recv) = stream.into_halves();
                Self::Tunnel(send, recv)
            }
        }
    }

    fn split(&mut self) -> (Source<'_>, Sink<'_>) {
        match self {
            Self::Tcp(tcp) => (Source::Tcp(tcp), Sink::Tcp(tcp)),
            Self::Tunnel(send, recv) => (Source::Tunnel(recv), Sink::Tunnel(send)),
        }
    }

    /// Ends it with a reset where the other side has to be told of one; without, once it is dropped.
    fn close(&mut self, reset: Option<ResetCode>) {
        match (self, reset) {
            (Self::Tcp(tcp), Some(_)) => {
                // With no time to linger, close sends RST in place of FIN. It fails only on a socket that is closed.
                let _ = socket2::SockRef::from(&*tcp).set_linger(Some(Duration::ZERO));
            }
            (Self::Tunnel(send, _), Some(code)) => send.reset(code),
            (Self::Tcp(_) | Self::Tunnel(..), None) => {}
        }
    }
}

/// The half of a connection that bytes come from.
enum Source<'a> {
    Tcp(&'a TcpStream),
    Tunnel(&'a mut RecvHalf),
}

/// The half that they go to.
enum Sink<'a> {
    Tcp(&'a TcpStream),
    Tunnel(&'a mut SendHalf),
}

/// What stopped one direction.
enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

impl Fault {
    /// As the end of a copy whose direction has its source at `from`.
    fn end(self, from: Side) -> End {
        let (side, error) = match self {
            Self::Source(error) => (from, error),
            Self::Sink(error) => (from.other(), error),
        };
        if is_reset(&error) {
            End::Reset(side)
        } else {
            End::Failed(side, error)
        }
    }
}

/// Whether the other application ended the connection by force, as against the network between.
fn is_reset(error: &io::Error) -> bool {
    let tunnel = error.get_ref().and_then(|e| e.downcast_ref());
    match tunnel {
        Some(StreamError::Reset(_)) => true,
        Some(StreamError::GoAway(_) | StreamError::Broken(_)) => false,
        None => matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        ),
    }
}

async fn run(
    downstream: &mut Ends,
    upstream: &mut Ends,
    counters: &Counters,
    mut cancel: Pin<&mut impl Future<Output = ()>>,
) -> End {
    let (down_source, down_sink) = downstream.split();
    let (up_source, up_sink) = upstream.split();
    // A side whose own half has ended is watched for a later reset by nobody else.
    let down_watch = Watch::of(&down_source);
    let up_watch = Watch::of(&up_source);
    let mut request = pin!(pump::run(down_source, up_sink, &counters.received));
    let mut response = pin!(pump::run(up_source, down_sink, &counters.sent));
    let (first, result) = tokio::select! {
        biased;
        () = &mut cancel => return End::Cancelled,
        result = &mut request => (Side::Downstream, result),
        result = &mut response => (Side::Upstream, result),
    };
    if let Err(fault) = result {
        return fault.end(first);
    }
    // Boxed: a connection that is open both ways must not keep room for a wait that it is not in.
    match first {
        Side::Downstream => Box::pin(last_half(first, response, down_watch, cancel)).await,
        Side::Upstream => Box::pin(last_half(first, request, up_watch, cancel)).await,
    }
}

/// Copies what is left once `first` has ended its half, whose connection may still break.
async fn last_half(
    first: Side,
    rest: impl Future<Output = Result<(), Fault>>,
    ended: Watch<'_>,
    cancel: impl Future<Output = ()>,
) -> End {
    let (side, result) = tokio::select! {
        biased;
        () = cancel => return End::Cancelled,
        result = rest => (first.other(), result),
        error = ended.broken() => (first, Err(Fault::Source(error))),
    };
    match result {
        Ok(()) => End::Finished(first),
        Err(fault) => fault.end(side),
    }
}

/// Notices that a connection broke after it has delivered its last byte.
#[derive(Clone, Copy)]
enum Watch<'a> {
    Tcp(&'a TcpStream),
    /// A tunnel's sending half reports resets by itself.
    Tunnel,
}

impl<'a> Watch<'a> {
    fn of(source: &Source<'a>) -> Self {
        match source {
            Source::Tcp(tcp) => Self::Tcp(tcp),
            Source::Tunnel(_) => Self::Tunnel,
        }
    }

    /// Ready only when the connection broke.
    async fn broken(self) -> io::Error {
        if let Self::Tcp(tcp) = self
            && tcp.ready(Interest::ERROR).await.is_ok()
            && let Ok(Some(error)) = tcp.take_error()
        {
            return error;
        }
        poll_fn(|_| std::task::Poll::Pending).await
    }
}
