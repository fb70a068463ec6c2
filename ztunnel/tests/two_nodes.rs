//! Two node tunnels and a pod of each: what applications see of the mesh.

mod rig;

use std::{io::ErrorKind, net::SocketAddr};

use mesh::{
    policy::{Action, Match, PolicyScope, StringMatch},
    view::Resource,
};
use net::socket::SourceAddress;
use rig::{
    APP_PORT, Rig, VIP, connect, connect_is_reset, connect_outside_the_mesh,
    connect_outside_the_mesh_is_reset, eventually, is_reset, listen, outside_the_mesh, passes,
    policy, policy_of, rig, soon,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const CLIENT: &str = "cluster.local/ns/ns/sa/sa-a";

macro_rules! rig_or_skip {
    () => {
        match rig().await {
            Some(rig) => rig,
            None => return,
        }
    };
}

fn reset(stream: TcpStream) {
    stream.set_zero_linger().expect("SO_LINGER");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_sees_its_client_and_each_half_ends_by_itself() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    let seen = server.peer_addr().unwrap();
    assert_eq!(seen.ip(), rig.a.v4);
    passes(&mut client, &mut server, b"ping").await;
    soon(client.shutdown()).await.unwrap();
    let mut rest = Vec::new();
    soon(server.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
    passes(&mut server, &mut client, b"still here").await;
    drop(server);
    soon(client.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_address_and_ipv6_lead_to_the_pod() {
    let rig = rig_or_skip!();
    let listener = listen(&rig.b, "[::]:8080".parse().unwrap());
    let v6 = SocketAddr::new(rig.b.v6, APP_PORT);
    for to in [VIP.parse().unwrap(), v6] {
        let (mut client, accepted) =
            soon(async { tokio::join!(connect(&rig.a, to), listener.accept()) }).await;
        let (mut server, _) = accepted.unwrap();
        passes(&mut client, &mut server, b"hello").await;
        passes(&mut server, &mut client, b"hello yourself").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_told_as_a_reset_both_ways() {
    let rig = rig_or_skip!();
    {
        let (mut client, mut server) = rig.pair().await;
        passes(&mut client, &mut server, b"x").await;
        reset(server);
        is_reset(&mut client).await;
    }
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    reset(client);
    is_reset(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_where_nobody_listens_is_a_reset() {
    let rig = rig_or_skip!();
    connect_is_reset(&rig.a, rig.address()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_identity_is_reset_and_an_allowed_one_passes() {
    let rig = rig_or_skip!();
    let _listener = rig.listen();
    rig.publish([Resource::Policy(policy("deny-a", Action::Deny, CLIENT))]);
    connect_is_reset(&rig.a, rig.address()).await;
    rig.remove_policy("ns/deny-a");
    drop(_listener);
    rig.publish([Resource::Policy(policy("allow-a", Action::Allow, CLIENT))]);
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"allowed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_connection_is_cut_when_a_policy_comes_to_forbid_it() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    let other = "cluster.local/ns/ns/sa/other";
    rig.publish([Resource::Policy(policy("deny-other", Action::Deny, other))]);
    passes(&mut client, &mut server, b"not concerned").await;
    rig.publish([Resource::Policy(policy("deny-a", Action::Deny, CLIENT))]);
    is_reset(&mut client).await;
    is_reset(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_connection_is_cut_when_its_workload_comes_under_a_policy() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    let mut selected = policy("deny-a", Action::Deny, CLIENT);
    selected.scope = PolicyScope::WorkloadSelector;
    let key = selected.key.clone();
    rig.publish([Resource::Policy(selected)]);
    passes(&mut client, &mut server, b"not selected").await;
    let mut workload = rig.workload_b();
    workload.authorization_policies = vec![key];
    rig.publish([Resource::Workload(workload)]);
    is_reset(&mut client).await;
    is_reset(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_never_comes_denies() {
    let rig = rig_or_skip!();
    let _listener = rig.listen();
    let mut workload = rig.workload_b();
    workload.authorization_policies = vec!["ns/missing".parse().unwrap()];
    rig.publish([Resource::Workload(workload)]);
    connect_is_reset(&rig.a, rig.address()).await;
}

fn strict() -> Resource {
    let unproven = Match {
        not_principals: vec![StringMatch::Presence],
        ..Match::default()
    };
    Resource::Policy(policy_of("strict", Action::Deny, unproven))
}

/// Connects without the mesh at the client's side; answers both ends.
async fn plaintext(rig: &Rig) -> (TcpStream, TcpStream) {
    let listener = rig.listen();
    let to = rig.address();
    let connecting = connect_outside_the_mesh(&rig.a, to);
    let (client, accepted) = soon(async { tokio::join!(connecting, listener.accept()) }).await;
    (client, accepted.unwrap().0)
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_passes_until_it_is_forbidden() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = plaintext(&rig).await;
    assert_eq!(server.peer_addr().unwrap().ip(), rig.a.v4);
    passes(&mut client, &mut server, b"in the clear").await;
    rig.publish([strict()]);
    is_reset(&mut client).await;
    let _listener = rig.listen();
    connect_outside_the_mesh_is_reset(&rig.a, rig.address()).await;
    drop(_listener);
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"over the mesh").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_bytes_arrive_as_they_were_sent() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    let bytes: Vec<u8> = (0..8_000_000_u32).map(|n| (n % 251) as u8).collect();
    let expected = bytes.clone();
    let sending = async move {
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        client
    };
    let mut received = Vec::new();
    let (_client, read) =
        soon(async { tokio::join!(sending, server.read_to_end(&mut received)) }).await;
    read.unwrap();
    assert!(received == expected, "the bytes differ");
}

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
