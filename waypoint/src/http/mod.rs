//! HTTP through the waypoint: one tunnelled connection is served, each request lives through the phases of
//! [`life`], and is sent to a backend that [`upstream`] knows.

mod action;
mod arriving;
mod body;
mod download;
mod engine;
mod exchange;
mod failure;
mod filter;
mod forward;
mod frames;
mod grpc;
mod guard;
mod hygiene;
mod interim;
mod life;
mod patience;
mod plan;
mod reply;
mod retry;
mod route;
mod served;
mod server;
mod telemetry;
pub(crate) mod transport;
mod upgrade;
pub(crate) mod upstream;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use net::drain;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::MissedTickBehavior,
};

pub(crate) use engine::Engine;

use crate::{connection::Connection, detect::HttpVersion, waypoint::Waypoint};

/// How often idle connections are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// Closes connections that were idle for too long, for as long as it runs.
pub(crate) async fn sweep(waypoint: Arc<Waypoint>) {
    let mut every = tokio::time::interval(SWEEP);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        waypoint.http.sweep();
    }
}

/// Serves one connection to its end. When the drain begins it tells the client and lets what is open finish.
pub(crate) async fn serve<S>(
    stream: S,
    version: HttpVersion,
    connection: Arc<Connection>,
    drain: drain::Watch,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match version {
        HttpVersion::Http1 => server::http1(stream, connection, drain).await,
        HttpVersion::Http2 => server::http2(stream, connection, drain).await,
    }
}
