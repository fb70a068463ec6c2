//! Who may connect, at first and later.

use std::net::SocketAddr;

use mesh::{
    policy::{Action, Match, PolicyScope, StringMatch},
    view::Resource,
};
use net::{socket::SourceAddress, testing::TestCa, tls::Policy};
use tokio::net::TcpStream;

use crate::{
    rig::{
        Rig, connect_is_reset, connect_outside_the_mesh, connect_outside_the_mesh_is_reset,
        eventually, is_reset, outside_the_mesh, passes, policy, policy_of, rig_with, soon,
    },
    rig_or_skip,
};

const CLIENT: &str = "cluster.local/ns/ns/sa/sa-a";

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
async fn policy_is_heeded_while_a_tunnel_drains() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    // Only policy ends it: the drain would not, within this test.
    let patient = [("CONNECTION_TERMINATION_DEADLINE", "10m")];
    let Some(mut rig) = rig_with(ca, &patient).await else {
        return;
    };
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    rig.node_b.begin_stop();
    let tunnel_port = SocketAddr::new(rig.b.v4, 15008);
    eventually("it drains", async || {
        let sockets = outside_the_mesh(&rig.a);
        let tried = sockets.connect(tunnel_port, SourceAddress::Own).await;
        tried.is_err()
    })
    .await;
    passes(&mut client, &mut server, b"still open").await;
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

#[tokio::test(flavor = "multi_thread")]
async fn an_open_connection_is_cut_when_a_policy_that_is_named_later_never_comes() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    let mut workload = rig.workload_b();
    workload.authorization_policies = vec!["ns/missing".parse().unwrap()];
    rig.publish([Resource::Workload(workload)]);
    passes(&mut client, &mut server, b"it may still come").await;
    is_reset(&mut client).await;
    is_reset(&mut server).await;
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
