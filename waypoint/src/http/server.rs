//! HTTP/1.1 and HTTP/2 as servers on one tunnelled connection, with limits on what a client may cost.

use std::{pin::pin, sync::Arc, time::Duration};

use http::Request;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use net::drain;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    download::STREAM_IDLE, frames::Frames, guard::Guard, hygiene::MAX_HEADERS,
    interim::Interjecting, life, patience::Patience, served::Served,
};
use crate::{connection::Connection, inbound::until_old};

/// Start line and headers of a request, in bytes.
const MAX_HEAD: usize = 60 * 1024;
/// A head must be there this long after the connection began or the last response ended.
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);
/// Bytes that are read ahead of a slow reader, and written ahead of a slow client.
const BUFFER: usize = 64 * 1024;
/// Streams at once on a connection.
const MAX_STREAMS: u32 = 100;
/// Bytes in flight toward us on one stream and on one connection.
const WINDOWS: (u32, u32) = (256 * 1024, 1024 * 1024);
/// Streams that the client opened and reset, and that were not looked at yet (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;
/// Streams that we reset for the client's errors (CVE-2025-8671).
const MAX_ERROR_RESETS: usize = 100;

/// Serves HTTP/1.1 until the client ends, or the drain has told it so with a response.
pub(super) async fn http1<S>(stream: S, connection: Arc<Connection>, drain: drain::Watch)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let served = Served::new(connection, drain);
    let service =
        service_fn(|request: Request<Incoming>| life::respond(Arc::clone(&served), request));
    let stream = Patience::new(stream, STREAM_IDLE);
    let stream = Interjecting::new(stream, served.interim.clone());
    let stream = Guard::new(stream, MAX_HEAD);
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD)
        .max_buf_size(BUFFER.max(MAX_HEAD + 4096))
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut serving = pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = served.abandoned() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    told(ended, &served.connection);
}

/// Serves HTTP/2 until the client ends, or the drain lets the last stream end.
pub(super) async fn http2<S>(stream: S, connection: Arc<Connection>, mut drain: drain::Watch)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let served = Served::new(connection, drain.clone());
    let service =
        service_fn(|request: Request<Incoming>| life::respond(Arc::clone(&served), request));
    let stream = Frames::new(Patience::new(stream, STREAM_IDLE));
    let serving = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        .max_header_list_size(64 * 1024)
        .max_send_buf_size(256 * 1024)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .enable_connect_protocol()
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = async {
            tokio::select! {
                _ = drain.started() => {}
                () = until_old(served.age) => {}
            }
        } => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    told(ended, &served.connection);
}

fn told(ended: hyper::Result<()>, connection: &Connection) {
    if let Err(error) = ended {
        tracing::debug!(client = %connection.client, %error, "a client's HTTP connection ended");
    }
}
