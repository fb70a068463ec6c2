//! What an idle connection costs: its task's future, for as long as the connection is open. Handshakes and decisions are
//! boxed apart, and gone by then.

use std::{future::Future, net::SocketAddr, sync::Arc};

use net::drain;
use tokio::net::TcpStream;

use crate::{flow::Live, handshakes::Slot, inbound, inbound_plaintext, outbound, pod::Pod};

/// Bytes. Raise it only knowing that every open connection pays.
const LIMIT: usize = 896;
/// As [`LIMIT`]: what dumps, logs and metrics know of a connection. With the counts of its `Arc` it must fit into 512 bytes.
const LIMIT_TOLD: usize = 496;

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
    let told = size_of::<Live>();
    assert!(
        told <= LIMIT_TOLD,
        "what is told of a connection: {told} bytes"
    );
    // One per tunnel, which many connections share; most of it is the HTTP/2 connection.
    assert!(inbound <= 16 << 10, "inbound tunnel: {inbound} bytes");
}
