//! HTTP through the waypoint: one tunnelled connection is served, each request lives through the phases of
//! [`life`], and is sent to a backend that [`upstream`] knows.

mod action;
mod body;
mod download;
mod engine;
mod exchange;
mod failure;
mod filter;
mod forward;
mod grpc;
mod hygiene;
mod life;
mod plan;
mod reply;
mod retry;
mod route;
mod server;
mod telemetry;
mod upgrade;
mod upstream;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use net::drain;
use tokio::io::{AsyncRead, AsyncWrite};

pub(crate) use engine::Engine;

use crate::{connection::Connection, detect::HttpVersion};

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
