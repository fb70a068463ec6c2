//! Pods, agents and tunnels that come and go.

use std::{io::ErrorKind, net::SocketAddr};

use net::{socket::SourceAddress, zds::Request};

use crate::{
    rig::{eventually, is_reset, listen_once_free, node::uid, outside_the_mesh, passes, soon},
    rig_or_skip,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_open_connections_end_and_then_the_tunnel_ends() {
    let mut rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    rig.node_b.begin_stop();
    let tunnel_port = SocketAddr::new(rig.b.v4, 15008);
    eventually("the listener is closed", async || {
        let tried = outside_the_mesh(&rig.a)
            .connect(tunnel_port, SourceAddress::Own)
            .await;
        tried.is_err_and(|error| error.io_kind() == ErrorKind::ConnectionRefused)
    })
    .await;
    passes(&mut client, &mut server, b"while draining").await;
    drop((client, server));
    soon(rig.node_b.stop()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_leaves_takes_its_connections_along() {
    let mut rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    let leave = Request::Delete { uid: uid(&rig.a) };
    rig.node_a.agent.call(leave).await;
    is_reset(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_served_while_there_is_no_agent_and_kept_when_it_is_back() {
    let mut rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    rig.node_b.agent.reconnected().await;
    passes(&mut client, &mut server, b"no snapshot yet").await;
    let keep = Request::Keep { uid: uid(&rig.b) };
    rig.node_b.agent.call(keep).await;
    rig.node_b.agent.call(Request::SnapshotSent).await;
    passes(&mut client, &mut server, b"kept").await;
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"a new one").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_breaks_the_protocol_loses_its_connection_and_nothing_else() {
    let mut rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    let second = rig.node_b.agent.link().call(&Request::SnapshotSent);
    assert!(soon(second).await.is_err(), "a second snapshot");
    rig.node_b.agent.reconnected().await;
    passes(&mut client, &mut server, b"still served").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_the_snapshot_leaves_out_is_gone() {
    let mut rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    rig.node_b.agent.reconnected().await;
    rig.node_b.agent.call(Request::SnapshotSent).await;
    is_reset(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminating_pod_serves_what_is_open_and_what_still_comes() {
    let mut rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    let terminating = Request::Drain { uid: uid(&rig.b) };
    rig.node_b.agent.call(terminating).await;
    for _ in 0..3 {
        let (mut late_client, mut late_server) = rig.pair().await;
        passes(&mut late_client, &mut late_server, b"late").await;
    }
    passes(&mut client, &mut server, b"still open").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_port_is_told_and_retried() {
    let mut rig = rig_or_skip!();
    let leave = Request::Delete { uid: uid(&rig.b) };
    rig.node_b.agent.call(leave).await;
    // Not shared: a socket without SO_REUSEPORT in the way.
    let held = listen_once_free(&rig.b, "0.0.0.0:15006".parse().unwrap()).await;
    let add = rig.node_b.agent.try_add(&rig.b).await;
    let told = format!("{:?}", add.unwrap_err());
    assert!(told.contains("15006"), "{told}");
    drop(held);
    // Retried every 5 s, without a word from the agent.
    let tunnel_port = SocketAddr::new(rig.b.v4, 15008);
    eventually("the listener is open", async || {
        let sockets = outside_the_mesh(&rig.a);
        let tried = sockets.connect(tunnel_port, SourceAddress::Own).await;
        tried.is_ok()
    })
    .await;
}
