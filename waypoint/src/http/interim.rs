//! Interim responses (RFC 9110 15.2), such as 103 Early Hints, from a backend of HTTP/1.1 to a client of HTTP/1.1.
//!
//! The HTTP library gives interim responses to its clients, and has no way to send them as a server; so they are written
//! between its own writes, on the connection below it. That is right only while a request waits for its answer and all
//! that was written before has gone out: an interim response that comes at another time is left out, which the RFC allows.
//! HTTP/2 gives us no such place.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header::CONTENT_LENGTH};
use mesh::l7::edit;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Interim responses to one request that are passed on.
const MOST: u32 = 16;
/// Bytes of one.
const LARGEST: usize = 16 * 1024;

/// Where the interim responses to a connection's current request go. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interim(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    /// Which request is waiting for its answer; none: none is.
    current: Option<u64>,
    requests: u64,
    told: u32,
    bytes: BytesMut,
    waker: Option<Waker>,
}

/// The way of one request's interim responses; ends with the request's answer.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    interim: Interim,
    request: u64,
}

impl Interim {
    /// A request has begun to wait for its answer.
    pub(super) fn open(&self) -> Way {
        let mut waiting = self.0.lock();
        waiting.requests += 1;
        waiting.told = 0;
        waiting.bytes.clear();
        waiting.current = Some(waiting.requests);
        Way {
            interim: self.clone(),
            request: waiting.requests,
        }
    }

    fn close(&self) {
        let mut waiting = self.0.lock();
        waiting.current = None;
        waiting.bytes.clear();
    }

    /// What is to be written now.
    fn take(&self, cx: &Context<'_>) -> Option<Bytes> {
        let mut waiting = self.0.lock();
        waiting.current?;
        if waiting.bytes.is_empty() {
            let known = waiting.waker.as_ref();
            if known.is_none_or(|it| !it.will_wake(cx.waker())) {
                waiting.waker = Some(cx.waker().clone());
            }
            return None;
        }
        Some(waiting.bytes.split().freeze())
    }
}

impl Way {
    /// Passes one on, if its request still waits. 101 is no interim response here, and 100 is the library's own to send.
    pub(super) fn tell(&self, status: StatusCode, headers: &HeaderMap) {
        if !status.is_informational()
            || matches!(
                status,
                StatusCode::CONTINUE | StatusCode::SWITCHING_PROTOCOLS
            )
        {
            return;
        }
        let text = text(status, headers);
        let mut waiting = self.interim.0.lock();
        let is_waited_for = waiting.current == Some(self.request);
        if !is_waited_for || waiting.told >= MOST || text.len() > LARGEST {
            return;
        }
        waiting.told += 1;
        waiting.bytes.put_slice(&text);
        if let Some(waker) = waiting.waker.take() {
            waker.wake();
        }
    }
}

/// Closes the way of a connection's current request when it is dropped: its answer is there, or nobody waits for it.
#[derive(Debug)]
pub(super) struct Closing(pub(super) Interim);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A head without a body, without what belongs to one hop.
fn text(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut headers = headers.clone();
    edit::strip_hop_by_hop(&mut headers);
    headers.remove(CONTENT_LENGTH);
    let reason = status.canonical_reason().unwrap_or_default();
    let mut text = format!("HTTP/1.1 {} {reason}\r\n", status.as_u16()).into_bytes();
    for (name, value) in &headers {
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(b"\r\n");
    text
}

/// A connection of HTTP/1.1 on which interim responses are written between the library's own writes.
pub(super) struct Interjecting<S> {
    inner: S,
    interim: Interim,
    /// Everything that the library has written so far has gone out.
    clean: bool,
    /// What was begun, and must be finished before the library writes again.
    begun: Bytes,
}

impl<S: AsyncWrite + Unpin> Interjecting<S> {
    pub(super) fn new(inner: S, interim: Interim) -> Self {
        Self {
            inner,
            interim,
            clean: true,
            begun: Bytes::new(),
        }
    }

    /// Writes what waits, as far as it goes. What the connection says of it, the library will hear at its next write.
    fn interject(&mut self, cx: &mut Context<'_>) {
        while self.clean {
            if self.begun.is_empty() {
                match self.interim.take(cx) {
                    Some(bytes) => self.begun = bytes,
                    None => return,
                }
            }
            if !matches!(self.poll_begun(cx), Poll::Ready(Ok(()))) {
                return;
            }
            if !matches!(
                Pin::new(&mut self.inner).poll_flush(cx),
                Poll::Ready(Ok(()))
            ) {
                return;
            }
        }
    }

    /// Writes the rest of what was begun.
    fn poll_begun(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.begun.is_empty() {
            let written = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.begun))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.begun.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Interjecting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.interject(cx);
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Interjecting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_begun(cx))?;
        self.clean = false;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_begun(cx))?;
        self.clean = false;
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_begun(cx))?;
        ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
        self.clean = true;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_begun(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
