//! Looks at each head of HTTP/1.1 before the parser does.
//!
//! The parser forgives what RFC 9112 lets it forgive: a length beside a transfer coding (6.3), a length told twice, lines
//! that end in a bare LF (2.2). Programs that read such a request differently are how requests are smuggled; so they are
//! refused here. Nothing of a head reaches the parser before all of it was looked at, and a head has its time. What a
//! body holds is passed on without a copy.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BufMut, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tokio_util::io::poll_read_buf;

/// From the first byte of a head to its last.
const HEAD_DEADLINE: Duration = Duration::from_secs(60);
/// The line that begins a chunk.
const MAX_CHUNK_LINE: usize = 16 * 1024;
/// Bytes that are read at once.
const PIECE: usize = 8 * 1024;
/// For how long a client that is not listened to any more may go on talking, so that it gets to read why: a connection that is
/// reset while it sends may take the answer with it (RFC 9112 9.6).
const LINGER: Duration = Duration::from_secs(5);
/// What no parser takes for a head: answered 400.
const REFUSED: &[u8] = b"\0\r\n\r\n";

/// A client's connection of HTTP/1.1.
pub(super) struct Guard<S> {
    inner: S,
    /// Not handed on yet; the first `approved` bytes may be.
    pending: BytesMut,
    approved: usize,
    state: State,
    max_head: usize,
    deadline: Option<Pin<Box<Sleep>>>,
    linger: Option<Pin<Box<Sleep>>>,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    /// So many bytes of a body.
    Body(u64),
    ChunkLine,
    /// So many bytes of a chunk and its end.
    Chunk(u64),
    Trailers,
    /// Anything: the connection may stop being HTTP, or the parser has to say what is wrong.
    Opaque,
    /// The rest of a head that is too long: the parser says so.
    TooLong,
    /// Nothing.
    Over,
}

impl<S> Guard<S> {
    /// Heads longer than `max_head` are the parser's to refuse.
    pub(super) fn new(inner: S, max_head: usize) -> Self {
        Self {
            inner,
            pending: BytesMut::new(),
            approved: 0,
            state: State::Head,
            max_head,
            deadline: None,
            linger: None,
        }
    }

    /// Approves as much of what is pending as is known to be in order. False: more is needed.
    fn inspect(&mut self) -> bool {
        let mut at = 0;
        while at < self.pending.len() && self.state != State::Over {
            let rest = &self.pending[at..];
            match step(self.state, rest, self.max_head) {
                Step::Take(bytes, state) => {
                    at += bytes;
                    self.state = state;
                }
                Step::More => break,
                Step::Refuse => {
                    self.pending.truncate(at);
                    self.pending.put_slice(REFUSED);
                    at = self.pending.len();
                    self.state = State::Over;
                }
            }
        }
        self.approved = at;
        at > 0
    }
}

enum Step {
    /// So many bytes are in order; then comes this.
    Take(usize, State),
    More,
    Refuse,
}

fn step(state: State, rest: &[u8], max_head: usize) -> Step {
    match state {
        State::Head => head(rest, max_head),
        State::Body(left) => take(rest, left, State::Head, State::Body),
        State::Chunk(left) => take(rest, left, State::ChunkLine, State::Chunk),
        State::ChunkLine => match line(rest) {
            Some(line) => match chunk_size(&rest[..line]) {
                Some(0) => Step::Take(line, State::Trailers),
                Some(size) => Step::Take(line, State::Chunk(size + 2)),
                None => Step::Refuse,
            },
            None if rest.len() > MAX_CHUNK_LINE => Step::Refuse,
            None => Step::More,
        },
        State::Trailers => match line(rest) {
            Some(2) => Step::Take(2, State::Head),
            Some(line) => Step::Take(line, State::Trailers),
            None if rest.len() > max_head => Step::Take(rest.len(), State::TooLong),
            None => Step::More,
        },
        State::Opaque => Step::Take(rest.len(), State::Opaque),
        State::TooLong => Step::Take(rest.len(), State::TooLong),
        State::Over => Step::More,
    }
}

fn take(rest: &[u8], left: u64, then: State, still: impl Fn(u64) -> State) -> Step {
    let taken = usize::try_from(left).map_or(rest.len(), |it| it.min(rest.len()));
    match left - taken as u64 {
        0 => Step::Take(taken, then),
        left => Step::Take(taken, still(left)),
    }
}

/// The length of the first line with its end.
fn line(rest: &[u8]) -> Option<usize> {
    rest.windows(2)
        .position(|it| it == b"\r\n")
        .map(|it| it + 2)
}

/// The number before extensions (RFC 9112 7.1).
fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.iter().take_while(|it| it.is_ascii_hexdigit()).count();
    let (size, rest) = line.split_at(digits);
    let size = std::str::from_utf8(size).ok()?;
    let clean = matches!(rest.first(), Some(b'\r' | b';' | b' ' | b'\t'));
    let size = u64::from_str_radix(size, 16).ok()?;
    (clean && size < u64::MAX - 2).then_some(size)
}

fn head(rest: &[u8], max_head: usize) -> Step {
    // Empty lines before a head are passed over (RFC 9112 2.2).
    if rest.starts_with(b"\r\n") {
        return Step::Take(2, State::Head);
    }
    let mut framing = Framing::default();
    let mut begin = 0;
    while let Some(end) = rest[begin..].iter().position(|it| *it == b'\n') {
        let line = &rest[begin..begin + end];
        let Some(line) = line.strip_suffix(b"\r") else {
            return Step::Refuse;
        };
        let first = begin == 0;
        begin += end + 1;
        if line.is_empty() {
            return match framing.next() {
                Some(state) => Step::Take(begin, state),
                None => Step::Refuse,
            };
        }
        if !first {
            framing.note(line);
        }
    }
    match rest.len() > max_head {
        true => Step::Take(rest.len(), State::TooLong),
        false => Step::More,
    }
}

/// What a head says of the body.
#[derive(Default)]
struct Framing {
    lengths: u32,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

impl Framing {
    fn note(&mut self, line: &[u8]) {
        // Most headers are told by their first letter not to matter.
        if !matches!(line.first(), Some(b'c' | b'C' | b't' | b'T' | b'u' | b'U')) {
            return;
        }
        let Some(colon) = line.iter().position(|it| *it == b':') else {
            return;
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            self.lengths += 1;
            let text = std::str::from_utf8(value).ok();
            self.length = text.and_then(|it| it.parse().ok());
        }
        self.chunked |= name.eq_ignore_ascii_case(b"transfer-encoding");
        self.upgrade |= name.eq_ignore_ascii_case(b"upgrade");
    }

    /// What comes after the head; none: it can be read in two ways.
    fn next(&self) -> Option<State> {
        match (self.lengths, self.chunked, self.length) {
            (0, false, _) if self.upgrade => Some(State::Opaque),
            (0, false, _) | (1, false, Some(0)) => Some(State::Head),
            (0, true, _) => Some(State::ChunkLine),
            (1, false, Some(length)) => Some(State::Body(length)),
            // The parser says what is wrong with a length that is none.
            (1, false, None) => Some(State::Opaque),
            _ => None,
        }
    }
}

impl<S: AsyncRead + Unpin> Guard<S> {
    /// Reads a body into the parser's own buffer. None: what comes is not all body, or some is pending.
    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Option<Poll<io::Result<()>>> {
        let (left, then): (u64, fn(u64) -> State) = match self.state {
            State::Body(left) => (left, |left| match left {
                0 => State::Head,
                left => State::Body(left),
            }),
            State::Chunk(left) => (left, |left| match left {
                0 => State::ChunkLine,
                left => State::Chunk(left),
            }),
            State::Opaque => (u64::MAX, |_| State::Opaque),
            State::TooLong => (u64::MAX, |_| State::TooLong),
            _ => return None,
        };
        let room = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buf.remaining());
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(room));
        let polled = Pin::new(&mut self.inner).poll_read(cx, &mut part);
        let read = part.filled().len();
        buf.advance(read);
        self.state = then(left - read as u64);
        Some(polled)
    }

    /// Whether the client is in the middle of what it says, and the connection has not stopped being HTTP.
    fn is_cut_short(&self) -> bool {
        match self.state {
            State::Head | State::Opaque => false,
            State::Body(_)
            | State::ChunkLine
            | State::Chunk(_)
            | State::Trailers
            | State::TooLong
            | State::Over => true,
        }
    }

    /// Hears the client out, without listening, until it ends or for [`LINGER`].
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let linger = &mut self.linger;
        let linger = linger.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        if linger.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let mut thrown = [0; PIECE];
        loop {
            let mut piece = ReadBuf::new(&mut thrown);
            match ready!(Pin::new(&mut self.inner).poll_read(cx, &mut piece)) {
                Ok(()) if !piece.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
    }

    /// Waits for more of a head, and not forever.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.pending.reserve(PIECE);
        let polled = poll_read_buf(Pin::new(&mut self.inner), cx, &mut self.pending);
        if polled.is_pending() && self.state == State::Head && !self.pending.is_empty() {
            let deadline = &mut self.deadline;
            let deadline = deadline.get_or_insert_with(|| Box::pin(sleep(HEAD_DEADLINE)));
            ready!(deadline.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guard<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.approved > 0 {
                this.deadline = None;
                let given = this.approved.min(buf.remaining());
                buf.put_slice(&this.pending[..given]);
                this.pending.advance(given);
                this.approved -= given;
                return Poll::Ready(Ok(()));
            }
            if this.state == State::Over {
                return Poll::Ready(Ok(()));
            }
            if this.pending.is_empty()
                && let Some(polled) = this.poll_body(cx, buf)
            {
                return polled;
            }
            if this.inspect() {
                continue;
            }
            if ready!(this.poll_more(cx))? == 0 {
                // What there is of a head is the parser's to judge.
                this.approved = this.pending.len();
                this.state = State::Over;
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
        if this.is_cut_short() {
            ready!(this.poll_linger(cx));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    /// What the parser gets of `bytes`, which arrive in pieces of `size`.
    async fn passed(bytes: &[u8], size: usize) -> Vec<u8> {
        let pieces: Vec<_> = bytes
            .chunks(size)
            .map(|it| Ok::<_, io::Error>(it.to_vec()))
            .collect();
        let stream = futures_util::stream::iter(pieces);
        let stream = futures_util::StreamExt::map(stream, |it| it.map(bytes::Bytes::from));
        let mut guard = Guard::new(tokio_util::io::StreamReader::new(stream), 60 * 1024);
        let mut out = Vec::new();
        guard.read_to_end(&mut out).await.unwrap();
        out
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_goes_on_talking_gets_to_read_the_answer() {
        use tokio::io::AsyncWriteExt;

        let (mut client, server) = tokio::io::duplex(1024);
        let mut guard = Guard::new(server, 60 * 1024);
        let served = tokio::spawn(async move {
            let mut read = vec![0; 64 * 1024];
            guard.read_exact(&mut read).await.unwrap();
            guard.write_all(b"431").await.unwrap();
            guard.shutdown().await.unwrap();
        });
        let head = [b"GET / HTTP/1.1\r\nx: ".as_slice(), &[b'a'; 512 * 1024]].concat();
        // All of it is taken, though nobody listens any more.
        client.write_all(&head).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"431");
        drop(client);
        served.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_in_order_passes_unchanged_however_it_is_cut() {
        let bytes = b"\r\nPOST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nab\ncdGET / HTTP/1.1\r\n\r\n\
            POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3;x=\"y\"\r\na\nb\r\n0\r\nt: 1\r\n\r\n\
            GET / HTTP/1.1\r\nupgrade: websocket\r\n\r\nanything\n\n";
        for size in 1..=bytes.len() {
            assert_eq!(passed(bytes, size).await, bytes, "in pieces of {size}");
        }
    }

    #[tokio::test]
    async fn what_can_be_read_in_two_ways_does_not_reach_the_parser() {
        let good = "GET / HTTP/1.1\r\n\r\n";
        for bad in [
            "POST / HTTP/1.1\r\ncontent-length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na",
            "GET / HTTP/1.1\nhost: a\n\n",
            "GET / HTTP/1.1\r\nhost: a\n\r\n",
            "GET / HTTP/1.1\r\nx: a\n y\r\n\r\n",
        ] {
            let bytes = [good, bad, good].concat();
            let expected = [good.as_bytes(), REFUSED].concat();
            for size in [1, 7, bytes.len()] {
                assert_eq!(passed(bytes.as_bytes(), size).await, expected, "{bad:?}");
            }
        }
    }
}
