//! HTTP/1.1 for the process's own endpoints: readiness, metrics, admin.
//!
//! Pods and the network reach two of them: connections on which nothing is asked must not keep out whoever asks.

mod waiting;

use std::{convert::Infallible, time::Duration};

use axum::Router;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;
use tracing::debug;

use crate::{accept, drain};
use waiting::{Place, Waiting};

/// A client that has not sent its header by then is dropped (node-tunnel.md 1.6).
pub(crate) const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// Room for the header, in bytes (node-tunnel.md 1.6; also hyper's least).
const HEADER_BUFFER: usize = 8 * 1024;
/// Connections at a time; these endpoints serve kubelets, scrapers and operators.
const CONNECTIONS: usize = 256;
/// Of them on which nothing is being answered: at more, the one that has been so longest is closed.
const MOST_WAITING: usize = CONNECTIONS / 2;

/// Serves `router` until the drain is forced: these endpoints stay open while traffic drains, to be asked about it, and
/// do not hold the drain open themselves.
pub(crate) async fn serve(listener: TcpListener, router: Router, drain: drain::Watch) {
    serve_patiently(listener, router, drain, HEADER_TIMEOUT).await;
}

async fn serve_patiently(
    listener: TcpListener,
    router: Router,
    drain: drain::Watch,
    patience: Duration,
) {
    let options = accept::Options::named("http").limited_to(CONNECTIONS);
    let waiting = Waiting::at_most(MOST_WAITING);
    // The loop itself never sees the drain: it is dropped when the drain is forced.
    let (_stay_open, never) = drain::channel();
    let serving = accept::serve(listener, options, never, move |stream, _peer| {
        let (router, place) = (router.clone(), waiting.place());
        async move {
            tokio::select! {
                () = place.lost() => debug!("http connection ended: others came after it"),
                () = converse(stream, router, place.clone(), patience) => {}
            }
        }
    });
    drain.release().until_forced(serving).await;
}

/// Answers requests on one connection.
async fn converse(stream: TcpStream, router: Router, place: Place, patience: Duration) {
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (router, busy) = (router.clone(), place.take());
        async move {
            let request = request.map(axum::body::Body::new);
            let Ok(response) = router.oneshot(request).await;
            Ok::<_, Infallible>(response.map(|body| busy.until_sent(body)))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(HEADER_BUFFER)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        debug!(%error, "http connection ended early");
    }
}

#[cfg(test)]
mod tests;
