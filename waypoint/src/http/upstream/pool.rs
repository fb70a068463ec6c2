//! HTTP connections to one endpoint.
//!
//! HTTP/1.1 connections carry one request at a time and come back when the response has been read to its end and the
//! request has been sent to its end; all others are closed (RFC 9112 9.3). HTTP/2 connections are shared up to a
//! number of streams.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh::l7::backend::Http2Keepalive;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::super::{arriving::Arriving, body::Upload, hygiene::MAX_HEADERS};

/// Streams on one HTTP/2 connection; then another is opened.
const MAX_STREAMS: u32 = 100;
/// Idle HTTP/1.1 connections to one endpoint that are kept.
const MAX_IDLE: usize = 128;
/// How long a connection may take to become idle after its response was read.
const SETTLE: Duration = Duration::from_millis(10);
/// Largest head of a response, in bytes.
const MAX_HEAD: usize = 60 * 1024;

/// How connections of a pool are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolLimits {
    /// Then an idle connection is closed.
    pub(crate) idle_timeout: Duration,
    /// Then a connection is closed.
    pub(crate) max_requests: Option<u32>,
    /// Streams at once on a connection.
    pub(crate) max_streams: Option<u32>,
    /// PINGs on connections of HTTP/2.
    pub(crate) pings: Http2Keepalive,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(3600),
            max_requests: None,
            max_streams: None,
            pings: Http2Keepalive {
                interval: Duration::from_secs(30),
                timeout: Duration::from_secs(20),
            },
        }
    }
}

/// The connections to one endpoint in one version of HTTP and with one kind of TLS.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    idle: Mutex<Vec<Idle>>,
    shared: Mutex<Vec<Arc<Shared>>>,
    /// Held while an HTTP/2 connection is made, so that requests which wait for one share it.
    dialing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Upload>,
    requests: u32,
    since: Instant,
}

#[derive(Debug)]
struct Shared {
    sender: http2::SendRequest<Upload>,
    streams: AtomicU32,
    requests: AtomicU32,
    retired: AtomicBool,
    idle_since: Mutex<Instant>,
}

/// The right to send one request.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<Pool>,
    limits: PoolLimits,
    carrier: Carrier,
    /// Whether the connection has carried a request before.
    pub(crate) reused: bool,
}

#[derive(Debug)]
enum Carrier {
    Http1 {
        sender: http1::SendRequest<Upload>,
        requests: u32,
    },
    Http2(Stream),
}

/// A stream of a shared connection; counted while it lives.
#[derive(Debug)]
struct Stream(Arc<Shared>);

impl Drop for Stream {
    fn drop(&mut self) {
        if self.0.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            *self.0.idle_since.lock() = Instant::now();
        }
    }
}

/// What is left of a lease while the response is read.
#[derive(Debug)]
pub(crate) struct Held(Option<Lease>);

/// Whether the connection is done with the last exchange. Its task may not have noticed yet; one whose request is
/// still being sent is not waited for.
async fn settled(sender: &mut http1::SendRequest<Upload>) -> bool {
    let ready = tokio::time::timeout(SETTLE, sender.ready());
    matches!(ready.await, Ok(Ok(())))
}

impl Pool {
    /// A connection of HTTP/1.1 that is there, or none.
    pub(crate) async fn idle(self: &Arc<Self>, limits: PoolLimits) -> Option<Lease> {
        loop {
            let mut idle = self.idle.lock().pop()?;
            let fresh = idle.since.elapsed() < limits.idle_timeout;
            let usable = fresh && !idle.sender.is_closed();
            if usable && (idle.sender.is_ready() || settled(&mut idle.sender).await) {
                return Some(Lease {
                    pool: Arc::clone(self),
                    limits,
                    reused: true,
                    carrier: Carrier::Http1 {
                        sender: idle.sender,
                        requests: idle.requests,
                    },
                });
            }
        }
    }

    /// A stream of a connection of HTTP/2 that is there, or none.
    pub(crate) fn stream(self: &Arc<Self>, limits: PoolLimits) -> Option<Lease> {
        let most = limits.max_streams.unwrap_or(MAX_STREAMS).min(MAX_STREAMS);
        let mut shared = self.shared.lock();
        shared.retain(|it| !it.sender.is_closed() && !it.retired.load(Ordering::Relaxed));
        let least = shared
            .iter()
            .filter(|it| it.streams.load(Ordering::Relaxed) < most)
            .min_by_key(|it| it.streams.load(Ordering::Relaxed))?;
        Some(self.lease(least, limits))
    }

    fn lease(self: &Arc<Self>, shared: &Arc<Shared>, limits: PoolLimits) -> Lease {
        shared.streams.fetch_add(1, Ordering::AcqRel);
        let requests = shared.requests.fetch_add(1, Ordering::Relaxed) + 1;
        if limits.max_requests.is_some_and(|most| requests >= most) {
            shared.retired.store(true, Ordering::Relaxed);
        }
        Lease {
            pool: Arc::clone(self),
            limits,
            reused: requests > 1,
            carrier: Carrier::Http2(Stream(Arc::clone(shared))),
        }
    }

    /// Waits for the turn to make a connection of HTTP/2; another look at [`Pool::stream`] comes first.
    pub(crate) async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.dialing.lock().await
    }

    /// Makes `io` a connection of HTTP/1.1.
    ///
    /// # Errors
    /// None in practice: HTTP/1.1 has no handshake.
    pub(crate) async fn open_http1<S>(
        self: &Arc<Self>,
        io: S,
        limits: PoolLimits,
    ) -> hyper::Result<Lease>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD)
            .handshake(TokioIo::new(io))
            .await?;
        // Ends with its connection, which ends when its sender is dropped.
        tokio::spawn(connection.with_upgrades());
        Ok(Lease {
            pool: Arc::clone(self),
            limits,
            reused: false,
            carrier: Carrier::Http1 {
                sender,
                requests: 0,
            },
        })
    }

    /// Makes `io` a connection of HTTP/2 that others may share.
    ///
    /// # Errors
    /// If the peer does not speak it.
    pub(crate) async fn open_http2<S>(
        self: &Arc<Self>,
        io: S,
        limits: PoolLimits,
    ) -> hyper::Result<Lease>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let pings = limits.pings;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(256 * 1024)
            .initial_connection_window_size(1024 * 1024)
            .max_header_list_size(64 * 1024)
            .max_send_buf_size(256 * 1024)
            .keep_alive_interval(Some(pings.interval).filter(|it| !it.is_zero()))
            .keep_alive_timeout(pings.timeout)
            .handshake(TokioIo::new(io))
            .await?;
        // Ends with its connection, which ends when all senders and streams are dropped.
        tokio::spawn(connection);
        let shared = Arc::new(Shared {
            sender,
            streams: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            retired: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        });
        let lease = self.lease(&shared, limits);
        self.shared.lock().push(shared);
        Ok(lease)
    }

    /// Closes connections that nothing has used for `limits.idle_timeout`.
    pub(crate) fn sweep(&self, limits: PoolLimits) {
        let idle = |since: Instant| since.elapsed() >= limits.idle_timeout;
        self.idle
            .lock()
            .retain(|it| !idle(it.since) && !it.sender.is_closed());
        self.shared.lock().retain(|it| {
            let unused = it.streams.load(Ordering::Acquire) == 0 && idle(*it.idle_since.lock());
            !unused && !it.sender.is_closed()
        });
    }

    /// Connections that are kept: idle ones of HTTP/1.1, shared ones of HTTP/2.
    pub(crate) fn len(&self) -> (usize, usize) {
        (self.idle.lock().len(), self.shared.lock().len())
    }
}

/// A try that had no response.
#[derive(Debug)]
pub(crate) struct SendError {
    /// The cause.
    pub(crate) error: hyper::Error,
    /// The request, if no byte of it was sent.
    pub(crate) unsent: Option<Box<Request<Upload>>>,
}

impl Lease {
    /// Sends `request` and waits for the head of its response. Dropped while it waits, it closes the connection
    /// (HTTP/1.1) or resets the stream (HTTP/2).
    ///
    /// # Errors
    /// If none comes.
    pub(crate) async fn send(
        mut self,
        request: Request<Upload>,
    ) -> Result<(Response<Arriving>, Held), SendError> {
        let sent = match &mut self.carrier {
            Carrier::Http1 { sender, requests } => {
                *requests += 1;
                sender.try_send_request(request).await
            }
            Carrier::Http2(stream) => stream.0.sender.clone().try_send_request(request).await,
        };
        match sent {
            Ok(response) => {
                let version = response.version();
                let response = response.map(|it| Arriving::new(it, version));
                Ok((response, Held(Some(self))))
            }
            Err(mut failed) => Err(SendError {
                unsent: failed.take_message().map(Box::new),
                error: failed.into_error(),
            }),
        }
    }
}

impl Held {
    /// The response was read to its end. `complete`: the request was sent to its end too, and the connection is
    /// still one of HTTP.
    pub(crate) fn finish(&mut self, complete: bool) {
        let Some(lease) = self.0.take() else { return };
        let Carrier::Http1 { sender, requests } = lease.carrier else {
            return;
        };
        let spent = lease.limits.max_requests.is_some_and(|it| requests >= it);
        if !complete || spent || sender.is_closed() {
            return;
        }
        let mut idle = lease.pool.idle.lock();
        if idle.len() < MAX_IDLE {
            idle.push(Idle {
                sender,
                requests,
                since: Instant::now(),
            });
        }
    }
}
