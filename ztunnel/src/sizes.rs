//! What an idle connection costs: its task's future, for as long as the connection is open. Handshakes and decisions are
//! boxed apart, and gone by then.

use std::{future::Future, net::SocketAddr, sync::Arc};

use net::drain;
use tokio::net::TcpStream;

use crate::{handshakes::Slot, inbound, inbound_plaintext, outbound, pod::Pod};

/// Bytes. Raise it only knowing that every open connection pays.
const LIMIT: usize = 1088;

fn of_three<A, B, C, F: Future>(_: impl Fn(A, B, C) -> F) -> usize {
    size_of::<F>()
}

fn of_five<A, B, C, D, E, F: Future>(_: impl Fn(A, B, C, D, E) -> F) -> usize {
    size_of::<F>()
}

#[test]
fn an_idle_connections_task_is_small() {
    let outbound = of_three::<Arc<Pod>, TcpStream, SocketAddr, _>(outbound::serve);
    let plaintext = of_three::<Arc<Pod>, TcpStream, SocketAddr, _>(inbound_plaintext::serve);
    let inbound = of_five::<Arc<Pod>, TcpStream, SocketAddr, Slot, drain::Watch, _>(inbound::serve);
    let stream = inbound::size_of_stream_task();
    for (name, size) in [
        ("outbound", outbound),
        ("inbound plaintext", plaintext),
        ("inbound stream", stream),
    ] {
        assert!(size <= LIMIT, "{name}: {size} bytes");
    }
    // One per tunnel, which many connections share; most of it is the HTTP/2 connection.
    assert!(inbound <= 16 << 10, "inbound tunnel: {inbound} bytes");
}
