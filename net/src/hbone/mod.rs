//! HBONE: one TCP connection of an application is one HTTP/2 CONNECT stream over mutual TLS (RFC 9113 8.5).
//!
//! [`serve`] takes an accepted TLS connection and yields CONNECT requests; [`Pool`] dials peers, shares connections
//! and yields [`Stream`]s; [`Client`] is one connection without a pool, for a tunnel inside a tunnel. No type of the
//! HTTP/2 library is public, so the framing can be replaced.

mod ahead;
mod client;
mod connection;
mod pool;
mod server;
mod sizes;
mod stream;

use std::time::Duration;

pub use client::{Client, ConnectError, ConnectHead, DialError, Driver, Tunnel};
pub use pool::{Dialer, Pool, PoolConfig, PoolStats, Target};
pub use server::{ConnectRequest, NotConnect, ServeEnd, ServeError, serve};
pub use sizes::Sizes;
pub use stream::{RecvHalf, ResetCode, SendHalf, Stream, StreamError};

#[cfg(test)]
mod tests;

/// How both ends run HTTP/2. The defaults are what peers expect; each end announces its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes in flight toward us on one stream (`HTTP2_STREAM_WINDOW_SIZE`).
    pub stream_window_bytes: u32,
    /// Bytes in flight toward us on one connection, with few streams open.
    pub connection_window_bytes: u32,
    /// To what the connection's window grows with the number of streams, so that a few streams nobody reads do not
    /// stop the others. No more than that: it does not (`HTTP2_CONNECTION_WINDOW_SIZE` is set).
    pub max_connection_window_bytes: u32,
    /// The largest frame we accept (`HTTP2_FRAME_SIZE`).
    pub frame_bytes: u32,
    /// Bytes that one stream may queue for the socket.
    pub send_buffer_bytes: usize,
    /// Largest header list that a server accepts; a client accepts a quarter of it.
    pub header_list_bytes: u32,
    /// Streams that a server lets a client have open at once.
    pub max_streams: u32,
    /// Silence after which the peer is pinged.
    pub ping_after: Duration,
    /// How long a ping may stay unanswered, with nothing else arriving or leaving, before the connection is dropped.
    pub ping_timeout: Duration,
    /// How long the peer's HTTP/2 preface may take.
    pub preface_deadline: Duration,
    /// A server closes a connection that has carried no stream for this long.
    pub unused_deadline: Duration,
}

/// The content of one DATA frame that fills `count` TLS records with its head (RFC 9113 4.1, RFC 8446 5.1).
pub(crate) const fn data_of_records(count: usize) -> usize {
    (count << 14) - 9
}

/// The largest piece that is worth sending at once. Fifteen records leave in four segments of 64 KiB, to the next node as to the
/// application, where sixteen take five.
pub(crate) const LARGEST_DATA: usize = data_of_records(15);

impl Default for Config {
    fn default() -> Self {
        const MIB: u32 = 1024 * 1024;
        Self {
            stream_window_bytes: 4 * MIB,
            connection_window_bytes: 16 * MIB,
            max_connection_window_bytes: 128 * MIB,
            frame_bytes: MIB,
            // Two of the pieces that a copy reads, and no small one behind them.
            send_buffer_bytes: 2 * LARGEST_DATA,
            header_list_bytes: 64 * 1024,
            max_streams: 200,
            ping_after: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            preface_deadline: Duration::from_secs(10),
            unused_deadline: Duration::from_secs(600),
        }
    }
}
