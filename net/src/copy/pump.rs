//! One direction of a copy, for each kind of source and sink.

#![allow(
    unsafe_code,
    reason = "reads into memory that nothing has cleared first"
)]

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    mem::MaybeUninit,
    net::Shutdown,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::Either;
use tokio::{
    io::Interest,
    net::TcpStream,
    task::coop,
    time::{Sleep, sleep},
};

use super::{Fault, Sink, Source, Watch};
use crate::hbone::{LARGEST_DATA, RecvHalf, ResetCode, SendHalf, StreamError, data_of_records};

/// How much is read at once: after silence onto the stack, then copied to its exact size; into a buffer while reads come back
/// full.
const READS: [usize; 4] = [1024, data_of_records(1), data_of_records(4), LARGEST_DATA];
/// Pieces below this size are joined while the sink is blocked: each piece costs its sender's budget for small frames
/// until it is taken, and an exhausted budget ends the whole connection.
const SMALL_PIECE: usize = 1024;

/// Passes bytes on until the source ends, and then ends the sink.
///
/// Not an `async fn`, nor are the two that most connections consist of: that would keep room for the arguments twice, for as
/// long as the connection lives. The other two are boxed, as they are larger.
pub(super) fn run<'a>(
    source: Source<'a>,
    sink: Sink<'a>,
    counter: &'a AtomicU64,
) -> impl Future<Output = Result<(), Fault>> + 'a {
    match (source, sink) {
        (Source::Tcp(from), Sink::Tunnel(to)) => {
            Either::Left(Either::Left(tcp_to_tunnel(from, to, counter)))
        }
        (Source::Tunnel(from), Sink::Tcp(to)) => {
            Either::Left(Either::Right(tunnel_to_tcp(from, to, counter)))
        }
        (Source::Tcp(from), Sink::Tcp(to)) => {
            Either::Right(Either::Left(Box::pin(tcp_to_tcp(from, to, counter))))
        }
        (Source::Tunnel(from), Sink::Tunnel(to)) => {
            Either::Right(Either::Right(Box::pin(tunnel_to_tunnel(from, to, counter))))
        }
    }
}

fn count(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
}

fn sink_error(error: StreamError) -> Fault {
    Fault::Sink(error.into())
}

/// What a read of a TCP connection brought.
enum Read {
    Data(Bytes),
    End,
}

/// Reads with a buffer that is as large as the flow deserves, and none while it is silent.
struct Reader {
    buffer: BytesMut,
    /// Which of [`READS`] is next; at the first no buffer is held.
    level: usize,
    doubt: Doubt,
    /// When a socket in [`Doubt::Unsure`] is read again. Boxed: a connection that is silent has none.
    again: Option<Pin<Box<Sleep>>>,
}

/// Whether a socket that was read short is empty.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doubt {
    /// It said so, or will tell what comes.
    None,
    /// A read stops at urgent data as it does where there is no more, and nothing tells of what is behind. The urgent
    /// byte itself no ordinary read brings, here as for an application (tcp(7)).
    Unsure,
    /// To be read whatever the runtime knows of it.
    ReadAnyway,
}

/// After this much silence a socket that was read short is read again. To ask each time would cost each message a call.
const READ_AGAIN: Duration = Duration::from_millis(200);

impl Reader {
    fn new() -> Self {
        Self {
            buffer: BytesMut::new(),
            level: 0,
            doubt: Doubt::None,
            again: None,
        }
    }

    /// Waits until there may be something to read.
    fn poll_arrived(&mut self, tcp: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let arrived = tcp.poll_read_ready(cx);
        match self.doubt {
            Doubt::Unsure if arrived.is_pending() => self.poll_again(cx).map(Ok),
            Doubt::ReadAnyway => Poll::Ready(Ok(())),
            Doubt::None | Doubt::Unsure => arrived,
        }
    }

    fn poll_again(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let again = self
            .again
            .get_or_insert_with(|| Box::pin(sleep(READ_AGAIN)));
        ready!(again.as_mut().poll(cx));
        self.again = None;
        self.doubt = Doubt::ReadAnyway;
        Poll::Ready(())
    }

    /// Bytes that the next read takes at most.
    fn size(&self) -> usize {
        READS[self.level]
    }

    /// Reads what there is, at most `limit` bytes.
    fn poll_read(
        &mut self,
        tcp: &TcpStream,
        cx: &mut Context<'_>,
        limit: usize,
    ) -> Poll<io::Result<Read>> {
        loop {
            ready!(self.poll_arrived(tcp, cx))?;
            match self.try_read(tcp, limit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// As [`Reader::poll_read`], once something may have arrived: `WouldBlock` when there is nothing.
    fn try_read(&mut self, tcp: &TcpStream, limit: usize) -> io::Result<Read> {
        let wanted = self.size().min(limit);
        let doubt = std::mem::replace(&mut self.doubt, Doubt::None);
        let data = if self.level == 0 {
            let mut first = [MaybeUninit::uninit(); READS[0]];
            let read = receive(tcp, &mut first[..wanted], doubt)?;
            Bytes::copy_from_slice(initialised(&first[..read]))
        } else {
            self.buffer.reserve(wanted);
            let read = receive(tcp, &mut self.buffer.spare_capacity_mut()[..wanted], doubt)
                .inspect_err(|_| self.buffer = BytesMut::new())?;
            // SAFETY: `receive` has written the first `read` bytes of the spare capacity, and the buffer was empty:
            // everything that it held before was split off.
            unsafe { self.buffer.set_len(read) };
            self.buffer.split().freeze()
        };
        self.fit(wanted, data.len());
        if data.len() < wanted {
            self.doubt = Doubt::Unsure;
        }
        Ok(match data.is_empty() {
            true => Read::End,
            false => Read::Data(data),
        })
    }

    /// Sizes the next read by this one.
    fn fit(&mut self, wanted: usize, read: usize) {
        let size = self.size();
        if read == size {
            self.level = (self.level + 1).min(READS.len() - 1);
        } else if read < size / 8 && wanted == size {
            self.level = self.level.saturating_sub(1);
        }
    }
}

/// Receives what there is. A short read empties the socket, so it ends the readiness as well and saves asking again:
/// what comes later, a FIN included, makes a new one.
fn receive(tcp: &TcpStream, into: &mut [MaybeUninit<u8>], doubt: Doubt) -> io::Result<usize> {
    if doubt == Doubt::ReadAnyway {
        return socket2::SockRef::from(tcp).recv(into);
    }
    let mut short = None;
    let result = tcp.try_io(Interest::READABLE, || {
        let read = socket2::SockRef::from(tcp).recv(into)?;
        if 0 < read && read < into.len() {
            short = Some(read);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(read)
    });
    short.map_or(result, Ok)
}

/// Sends what there is room for. With `end_follows` the last of it waits for the shutdown, so that both are one segment.
fn transmit(tcp: &TcpStream, bytes: &[u8], end_follows: bool) -> io::Result<usize> {
    if !end_follows {
        return tcp.try_write(bytes);
    }
    tcp.try_io(Interest::WRITABLE, || {
        socket2::SockRef::from(tcp).send_with_flags(bytes, libc::MSG_MORE | libc::MSG_NOSIGNAL)
    })
}

fn initialised(bytes: &[MaybeUninit<u8>]) -> &[u8] {
    // SAFETY: callers pass what `receive` has written, and `MaybeUninit<u8>` has the layout of `u8`.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
}

fn tcp_to_tunnel<'a>(
    from: &'a TcpStream,
    to: &'a mut SendHalf,
    counter: &'a AtomicU64,
) -> impl Future<Output = Result<(), Fault>> + 'a {
    let mut reader = Reader::new();
    async move {
        loop {
            let room = match poll_fn(|cx| poll_room(&mut reader, from, to, cx)).await {
                // Boxed: an idle connection must not keep room for a wait that it is not in.
                Ok(None) => Box::pin(room_or_broken(&mut reader, from, to)).await,
                Ok(Some(room)) => Ok(room),
                Err(fault) => Err(fault),
            };
            match room {
                Ok(room) => match reader.try_read(from, room) {
                    Ok(Read::Data(data)) => {
                        count(counter, data.len());
                        let rest = to.not_sent_ahead(data);
                        if !rest.is_empty() {
                            to.send(rest).map_err(sink_error)?;
                        }
                    }
                    Ok(Read::End) => return to.finish().map_err(sink_error),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(Fault::Source(error)),
                },
                // The peer has said all and wants no more, which is no failure.
                Err(Fault::Sink(error)) if is_no_error(&error) => return Ok(()),
                Err(fault) => return Err(fault),
            }
        }
    }
}

fn is_no_error(error: &io::Error) -> bool {
    let tunnel = error.get_ref().and_then(|e| e.downcast_ref());
    matches!(tunnel, Some(StreamError::Reset(ResetCode::NO_ERROR)))
}

/// Waits for bytes from TCP; answers how many there is room for in the tunnel, or `None` where it has none, and wakes when
/// it has. Room is reserved only while there are bytes, as what one stream holds other streams lack.
fn poll_room(
    reader: &mut Reader,
    from: &TcpStream,
    to: &mut SendHalf,
    cx: &mut Context<'_>,
) -> Poll<Result<Option<usize>, Fault>> {
    if let Poll::Ready(error) = to.poll_reset(cx) {
        return Poll::Ready(Err(sink_error(error)));
    }
    match reader.poll_arrived(from, cx) {
        Poll::Ready(Ok(())) => Poll::Ready(match to.poll_capacity(cx, reader.size()) {
            Poll::Ready(room) => room.map(Some).map_err(sink_error),
            Poll::Pending => Ok(None),
        }),
        Poll::Ready(Err(error)) => Poll::Ready(Err(Fault::Source(error))),
        Poll::Pending => {
            to.release();
            Poll::Pending
        }
    }
}

/// The wait for room may be long; the application may have given up meanwhile.
async fn room_or_broken(
    reader: &mut Reader,
    from: &TcpStream,
    to: &mut SendHalf,
) -> Result<usize, Fault> {
    let room = poll_fn(|cx| match ready!(poll_room(reader, from, to, cx)) {
        Ok(Some(room)) => Poll::Ready(Ok(room)),
        Ok(None) => Poll::Pending,
        Err(fault) => Poll::Ready(Err(fault)),
    });
    tokio::select! {
        biased;
        room = room => room,
        error = Watch::Tcp(from).broken() => Err(Fault::Source(error)),
    }
}

/// What has come out of a tunnel and not gone into TCP yet.
#[derive(Default)]
struct Backlog {
    /// Not kept once it is written: the shortest piece holds all the memory that it was cut from.
    current: Option<Bytes>,
    /// Boxed: only a connection that is blocked has any.
    behind: Option<Box<Behind>>,
    ended: bool,
}

#[derive(Default)]
struct Behind {
    pieces: VecDeque<Bytes>,
    /// Small pieces that came last, joined.
    tail: BytesMut,
}

fn tunnel_to_tcp<'a>(
    from: &'a mut RecvHalf,
    to: &'a TcpStream,
    counter: &'a AtomicU64,
) -> impl Future<Output = Result<(), Fault>> + 'a {
    let mut backlog = Backlog::default();
    poll_fn(move |cx| {
        ready!(backlog.poll_pass(from, to, counter, cx))?;
        Poll::Ready(shut_down(to))
    })
}

impl Backlog {
    fn poll_pass(
        &mut self,
        from: &mut RecvHalf,
        to: &TcpStream,
        counter: &AtomicU64,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Fault>> {
        loop {
            if self.current.is_none() {
                let next = ready!(self.poll_next(from, cx)).transpose();
                self.current = next.map_err(|error| Fault::Source(error.into()))?;
            }
            let end_follows = self.ends_with_current(from);
            let Some(current) = &mut self.current else {
                return Poll::Ready(Ok(()));
            };
            // A flow that is always ready must not keep the others of its thread waiting.
            let budget = ready!(coop::poll_proceed(cx));
            match transmit(to, current, end_follows) {
                Ok(written) => {
                    budget.made_progress();
                    current.advance(written);
                    if current.is_empty() {
                        self.current = None;
                    }
                    from.credit(written);
                    count(counter, written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.collect(from, cx).map_err(Fault::Source)?;
                    ready!(to.poll_write_ready(cx)).map_err(Fault::Sink)?;
                }
                Err(error) => return Poll::Ready(Err(Fault::Sink(error))),
            }
        }
    }

    /// Whether the end comes right after what is written now.
    fn ends_with_current(&self, from: &RecvHalf) -> bool {
        self.behind.is_none() && (self.ended || from.has_ended())
    }

    fn poll_next(
        &mut self,
        from: &mut RecvHalf,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, StreamError>>> {
        match self.behind.as_deref_mut().and_then(Behind::next) {
            Some(piece) => return Poll::Ready(Some(Ok(piece))),
            None => self.behind = None,
        }
        if self.ended {
            return Poll::Ready(None);
        }
        from.poll_uncredited(cx)
    }

    /// Takes what there is out of the tunnel while the sink is blocked, with no credit until it is written, so that
    /// the stream's window bounds what is held.
    fn collect(&mut self, from: &mut RecvHalf, cx: &mut Context<'_>) -> io::Result<()> {
        while !self.ended {
            match from.poll_uncredited(cx) {
                Poll::Ready(Some(Ok(data))) => self.behind.get_or_insert_default().push(data),
                Poll::Ready(Some(Err(error))) => return Err(error.into()),
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => break,
            }
        }
        Ok(())
    }
}

impl Behind {
    fn push(&mut self, data: Bytes) {
        if data.len() < SMALL_PIECE {
            return self.tail.extend_from_slice(&data);
        }
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.pieces.push_back(data);
    }

    fn next(&mut self) -> Option<Bytes> {
        let tail = &mut self.tail;
        let last = || (!tail.is_empty()).then(|| std::mem::take(tail).freeze());
        self.pieces.pop_front().or_else(last)
    }
}

/// Waits for room in `to`. It may be blocked for good; the application behind `from` may have given up meanwhile.
async fn writable_or_broken(from: &TcpStream, to: &TcpStream) -> Result<(), Fault> {
    tokio::select! {
        writable = to.writable() => writable.map_err(Fault::Sink),
        error = Watch::Tcp(from).broken() => Err(Fault::Source(error)),
    }
}

async fn tcp_to_tcp(from: &TcpStream, to: &TcpStream, counter: &AtomicU64) -> Result<(), Fault> {
    let mut reader = Reader::new();
    loop {
        coop::consume_budget().await;
        let read = poll_fn(|cx| reader.poll_read(from, cx, LARGEST_DATA)).await;
        let mut data = match read.map_err(Fault::Source)? {
            Read::Data(data) => data,
            Read::End => return shut_down(to),
        };
        while !data.is_empty() {
            match to.try_write(&data) {
                Ok(written) => {
                    data.advance(written);
                    count(counter, written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Boxed: an idle connection must not keep room for a wait that it is not in.
                    Box::pin(writable_or_broken(from, to)).await?;
                }
                Err(error) => return Err(Fault::Sink(error)),
            }
        }
    }
}

async fn tunnel_to_tunnel(
    from: &mut RecvHalf,
    to: &mut SendHalf,
    counter: &AtomicU64,
) -> Result<(), Fault> {
    loop {
        coop::consume_budget().await;
        let next = poll_fn(|cx| match to.poll_reset(cx) {
            Poll::Ready(error) => Poll::Ready(Err(sink_error(error))),
            Poll::Pending => from.poll_uncredited(cx).map(Ok),
        });
        let mut data = match next.await? {
            Some(Ok(data)) => data,
            Some(Err(error)) => return Err(Fault::Source(error.into())),
            None => return to.finish().map_err(sink_error),
        };
        while !data.is_empty() {
            let room = poll_fn(|cx| to.poll_capacity(cx, data.len())).await;
            let piece = data.split_to(room.map_err(sink_error)?.min(data.len()));
            let bytes = piece.len();
            to.send(piece).map_err(sink_error)?;
            from.credit(bytes);
            count(counter, bytes);
        }
    }
}

/// Passes an end on: FIN, with the other direction still open.
fn shut_down(to: &TcpStream) -> Result<(), Fault> {
    match socket2::SockRef::from(to).shutdown(Shutdown::Write) {
        Ok(()) => Ok(()),
        // The peer is gone already; a reset shows in the other direction.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        Err(error) => Err(Fault::Sink(error)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::{pause, timeout},
    };

    use super::{super::tests::Tunnels, *};
    use crate::testing::tcp_pair;

    #[tokio::test]
    async fn a_piece_that_is_written_is_let_go() {
        let mut tunnels = Tunnels::new().await;
        let (mut near, far) = tunnels.open().await;
        let (delivered, mut server) = tcp_pair().await;
        let (_send, mut from) = far.into_halves();
        let (mut backlog, counter) = (Backlog::default(), AtomicU64::new(0));
        let pass = poll_fn(|cx| backlog.poll_pass(&mut from, &delivered, &counter, cx));
        near.write_all(b"all").await.unwrap();
        let mut got = [0; 3];
        tokio::select! {
            _ = pass => panic!("more may come"),
            read = server.read_exact(&mut got) => assert_eq!(read.unwrap(), 3),
        }
        assert_eq!(&got, b"all");
        assert_eq!(backlog.current, None);
    }

    #[tokio::test]
    async fn a_connection_that_falls_silent_gives_its_buffer_back() {
        const ALL: usize = 100_000;
        let (mut client, server) = tcp_pair().await;
        client.write_all(&[7; ALL]).await.unwrap();
        let mut reader = Reader::new();
        let mut got = 0;
        while got < ALL {
            let read = poll_fn(|cx| reader.poll_read(&server, cx, LARGEST_DATA)).await;
            let Ok(Read::Data(data)) = read else {
                panic!("neither an end nor an error")
            };
            got += data.len();
        }
        assert!(reader.buffer.capacity() > 0);
        pause();
        let more = poll_fn(|cx| reader.poll_read(&server, cx, LARGEST_DATA));
        assert!(timeout(2 * READ_AGAIN, more).await.is_err());
        assert_eq!(reader.buffer.capacity(), 0);
    }
}
