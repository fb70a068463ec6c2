//! Counts the frames of a client's HTTP/2, below the library that reads them.
//!
//! The library bounds what streams, heads and resets cost. What it does not count is frames that carry nothing, which cost
//! time, and bodies in crumbs: each frame of a body that nobody reads yet costs some hundred bytes beside what it holds,
//! and a window of a mebibyte lets a client send a million of them. A client that goes beyond either bound is cut off.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

/// What a client opens its connection with, before frames (RFC 9113 3.4).
const PREFACE: usize = 24;
/// Bytes of a frame's header (RFC 9113 4.1).
const HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
/// A frame of a body that is no longer than this is a crumb.
const CRUMB: usize = 64;
/// Crumbs until we have told that bodies were read. Clients whose messages are as small as can be send 90,000 of them in
/// the half of a window after which that is told.
const MAX_CRUMBS: u32 = 100_000;
/// Frames that carry nothing, at once and each second.
const MAX_IDLE: u32 = 10_000;
const IDLE_PER_SECOND: u32 = 1_000;
/// One more for each so many bytes that we send: a client tells of each frame that it has read it.
const BYTES_PER_IDLE: usize = 1_024;

/// A client's connection of HTTP/2.
pub(super) struct Frames<S> {
    inner: S,
    incoming: Parse,
    outgoing: Parse,
    counts: Counts,
}

/// Where in the frames a stream of bytes is.
enum Parse {
    Header([u8; HEADER], usize),
    /// So many bytes that are not looked at.
    Skip(usize),
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Parse {
    fn new(skip: usize) -> Self {
        Self::Skip(skip)
    }

    /// Tells each frame whose header ends within these bytes.
    fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            match self {
                Self::Skip(0) => *self = Self::Header([0; HEADER], 0),
                Self::Skip(left) => {
                    let passed = bytes.len().min(*left);
                    *left -= passed;
                    bytes = &bytes[passed..];
                }
                Self::Header(header, have) => {
                    let taken = bytes.len().min(HEADER - *have);
                    header[*have..*have + taken].copy_from_slice(&bytes[..taken]);
                    *have += taken;
                    bytes = &bytes[taken..];
                    if *have == HEADER {
                        let frame = Frame::read(header);
                        *self = Self::Skip(frame.length);
                        each(frame);
                    }
                }
            }
        }
    }
}

impl Frame {
    fn read(header: &[u8; HEADER]) -> Self {
        let [a, b, c, kind, flags, stream @ ..] = *header;
        Self {
            length: usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c),
            kind,
            flags,
            stream: u32::from_be_bytes(stream) & 0x7fff_ffff,
        }
    }
}

/// What may still come.
struct Counts {
    crumbs: u32,
    idle: u32,
    /// When `idle` was last given its share of each second.
    since: Instant,
    sent: usize,
    over: bool,
}

impl Counts {
    fn received(&mut self, frame: Frame) {
        match frame.kind {
            HEADERS => {}
            DATA if frame.flags & END_STREAM != 0 => {}
            DATA if frame.length == 0 => self.spend(),
            DATA if frame.length <= CRUMB => {
                self.crumbs += 1;
                self.over |= self.crumbs > MAX_CRUMBS;
            }
            DATA => {}
            _ => self.spend(),
        }
    }

    fn spend(&mut self) {
        if self.idle == 0 {
            self.refill(Instant::now());
        }
        match self.idle.checked_sub(1) {
            Some(left) => self.idle = left,
            None => self.over = true,
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.duration_since(self.since).min(Duration::from_secs(60));
        let due = passed.as_millis() * u128::from(IDLE_PER_SECOND) / 1_000;
        if due > 0 {
            self.since = now;
        }
        self.add(u32::try_from(due).unwrap_or(MAX_IDLE));
    }

    fn add(&mut self, idle: u32) {
        self.idle = self.idle.saturating_add(idle).min(MAX_IDLE);
    }

    /// Bodies have been read: only then does the library widen the connection's window.
    fn told(&mut self, frame: Frame) {
        if frame.kind == WINDOW_UPDATE && frame.stream == 0 {
            self.crumbs = 0;
        }
    }

    fn wrote(&mut self, bytes: usize) {
        self.sent += bytes;
        self.add(u32::try_from(self.sent / BYTES_PER_IDLE).unwrap_or(MAX_IDLE));
        self.sent %= BYTES_PER_IDLE;
    }
}

impl<S> Frames<S> {
    pub(super) fn new(inner: S) -> Self {
        Self {
            inner,
            incoming: Parse::new(PREFACE),
            outgoing: Parse::new(0),
            counts: Counts {
                crumbs: 0,
                idle: MAX_IDLE,
                since: Instant::now(),
                sent: 0,
                over: false,
            },
        }
    }

    fn wrote<'a>(&mut self, mut left: usize, pieces: impl Iterator<Item = &'a [u8]>) {
        self.counts.wrote(left);
        for piece in pieces {
            let written = &piece[..piece.len().min(left)];
            left -= written.len();
            self.outgoing.feed(written, |it| self.counts.told(it));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Frames<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        let new = &buf.filled()[before..];
        this.incoming.feed(new, |it| this.counts.received(it));
        match this.counts.over {
            true => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a flood of frames",
            ))),
            false => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Frames<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.wrote(written, std::iter::once(buf));
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, bufs))?;
        self.wrote(written, bufs.iter().map(|it| &**it));
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
        [&head, body].concat()
    }

    /// What a connection reads of these bytes until it ends, `piece` bytes at a time, after `answers` was written.
    async fn read(bytes: &[u8], piece: usize, answers: &[u8]) -> io::Result<usize> {
        let whole = [&[b'p'; PREFACE], bytes].concat();
        let mut frames = Frames::new(tokio::io::join(&whole[..], tokio::io::sink()));
        let (mut read, mut buffer) = (0, vec![0; piece]);
        loop {
            frames.write_all(answers).await?;
            match frames.read(&mut buffer).await? {
                0 => return Ok(read),
                more => read += more,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn frames_that_carry_nothing_are_counted_wherever_they_are_cut() {
        let number = usize::try_from(MAX_IDLE).unwrap();
        for (kind, body) in [
            (6, &[0; 8][..]),
            (4, &[]),
            (DATA, &[]),
            (WINDOW_UPDATE, &[0; 4]),
            // PRIORITY (RFC 9113 6.3).
            (2, &[0; 5]),
        ] {
            let one = frame(kind, 0, 1, body);
            for piece in [7, 4096] {
                let enough = read(&one.repeat(number), piece, &[]).await;
                assert_eq!(enough.unwrap(), PREFACE + one.len() * number);
                let more = read(&one.repeat(number + 1), piece, &[]).await;
                assert_eq!(more.unwrap_err().kind(), io::ErrorKind::InvalidData);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_we_send_and_time_that_passes_let_more_of_them_come() {
        let number = usize::try_from(MAX_IDLE).unwrap();
        let updates = frame(WINDOW_UPDATE, 0, 0, &[0; 4]).repeat(number + 100);
        let sent = frame(DATA, 0, 1, &[0; 4096]);
        assert!(read(&updates, 1024, &sent).await.is_ok());
        let mut counts = Frames::new(()).counts;
        let ping = Frame {
            length: 8,
            kind: 6,
            flags: 0,
            stream: 0,
        };
        for _ in 0..MAX_IDLE {
            counts.received(ping);
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..IDLE_PER_SECOND {
            counts.received(ping);
        }
        assert!(!counts.over);
        counts.received(ping);
        assert!(counts.over);
    }

    #[tokio::test(start_paused = true)]
    async fn crumbs_of_bodies_that_nobody_reads_have_an_end() {
        let number = usize::try_from(MAX_CRUMBS).unwrap();
        let crumbs = frame(DATA, 0, 1, b"x").repeat(number + 1);
        let cut = read(&crumbs, 64 * 1024, &[]).await;
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let consumed = frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1, 0]);
        assert!(read(&crumbs, 64 * 1024, &consumed).await.is_ok());
        let large = frame(DATA, 0, 1, &[b'x'; CRUMB + 1]).repeat(number + 1);
        assert!(read(&large, 1 << 20, &[]).await.is_ok());
    }
}
