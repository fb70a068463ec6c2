//! What applications answer on connections that the tunnel opened with a client's address: it returns to the tunnel.

use std::{io::ErrorKind, net::SocketAddr};

use cni::{
    apply::Nft,
    rules::{ACCEPTED_MARK, CONNECTION_MARK, PodRules, Stage, TUNNEL_MARK},
};
use net::{
    socket::{Factory, SocketError, SourceAddress},
    sysctl::Sysctl,
};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{
    flows::ping,
    rig::{PATIENCE, POD_V4, POD_V6, Rig, eventually, listen, run, run_with_input, v4, v6},
};

/// A pod in the mesh.
async fn enrolled() -> Option<Rig> {
    let rig = Rig::new()?;
    let nft = Nft::find().expect("nft, as the rig has found it");
    nft.apply(&rig.pod, &PodRules::default(), Stage::Redirect)
        .await
        .expect("apply");
    Some(rig)
}

/// Each family's: where the application is, and where a client that is somewhere else.
fn families(port: u16) -> [(SocketAddr, SocketAddr); 2] {
    [
        (v4(POD_V4, port), v4([192, 0, 2, 7].into(), 0)),
        (v6(POD_V6, port), v6("2001:db8::7", 0)),
    ]
}

/// As the tunnel does.
async fn open(rig: &Rig, to: SocketAddr, client: SocketAddr) -> Result<TcpStream, SocketError> {
    let tunnel = Factory {
        netns: Some(rig.pod.clone()),
        mark: Some(TUNNEL_MARK),
        ..Factory::default()
    };
    let connecting = tunnel.connect(to, SourceAddress::Required(client.ip()));
    timeout(PATIENCE, connecting).await.expect("in time")
}

/// Connections of both families are accepted with this mark, and answered.
async fn answers_with(rig: &Rig, listener: &TcpListener, mark: u32) {
    for (to, client) in families(8080) {
        let tunnel = open(rig, to, client).await.expect("connect");
        assert_eq!(accepted(listener, tunnel, client).await, mark);
    }
}

/// The application's end, which echoes what `tunnel` says once it has told its mark.
async fn accepted(listener: &TcpListener, mut tunnel: TcpStream, client: SocketAddr) -> u32 {
    let accepting = timeout(PATIENCE, listener.accept());
    let (mut application, from) = accepting.await.expect("in time").expect("a connection");
    assert_eq!(from.ip().to_canonical(), client.ip());
    let mark = SockRef::from(&application).mark().expect("a mark");
    let echoing = tokio::spawn(async move {
        let (mut read, mut write) = application.split();
        tokio::io::copy(&mut read, &mut write).await
    });
    ping(&mut tunnel).await.expect("an answer");
    echoing.abort();
    mark
}

#[tokio::test]
async fn an_accepted_socket_answers_with_the_mark_of_the_connection() {
    let Some(rig) = enrolled().await else { return };
    let listener = listen(&rig.pod, "[::]:8080");
    answers_with(&rig, &listener, CONNECTION_MARK).await;
    let restored = run(
        &rig.pod,
        "nft list chain inet istio-ambient-mangle istio-output",
    );
    let restored = restored.expect("list");
    assert!(
        restored.contains("packets 0 bytes 0"),
        "no packet was marked by a rule: {restored}"
    );
}

#[tokio::test]
async fn a_listener_with_a_mark_of_its_own_is_answered_for_by_the_rule() {
    let Some(rig) = enrolled().await else { return };
    let listener = listen(&rig.pod, "[::]:8080");
    SockRef::from(&listener).set_mark(0x77).expect("marked");
    answers_with(&rig, &listener, 0x77).await;
}

#[tokio::test]
async fn where_sockets_inherit_no_mark_the_rule_answers_for_them() {
    let Some(rig) = enrolled().await else { return };
    let sysctl = Sysctl::open().expect("/proc");
    sysctl.set(&rig.pod, ACCEPTED_MARK, "0").expect("set");
    let listener = listen(&rig.pod, "[::]:8080");
    answers_with(&rig, &listener, 0).await;
}

#[tokio::test]
async fn a_refusal_returns_too() {
    let Some(rig) = enrolled().await else { return };
    for (to, client) in families(8080) {
        let error = open(&rig, to, client).await.expect_err("nobody listens");
        assert_eq!(error.io_kind(), ErrorKind::ConnectionRefused, "{to}");
    }
}

/// The first attempt is lost on its way, as where an application's queue is full. NAT sees no first packet in the second.
#[tokio::test]
async fn a_repeated_attempt_is_answered_too() {
    const LOSS: &str = "table inet loss {
        chain in { type filter hook input priority 0; tcp dport 8080 counter drop; }
    }";
    let Some(rig) = enrolled().await else { return };
    let listener = listen(&rig.pod, "[::]:8080");
    for (to, client) in families(8080) {
        run_with_input(&rig.pod, "nft -f -", LOSS);
        let lost = eventually("the attempt is lost", async || {
            let listed = run(&rig.pod, "nft list table inet loss").expect("list");
            !listed.contains("packets 0 bytes 0")
        });
        let found = async {
            lost.await;
            run(&rig.pod, "nft delete table inet loss").expect("delete");
        };
        let (tunnel, ()) = tokio::join!(open(&rig, to, client), found);
        let mark = accepted(&listener, tunnel.expect("connect"), client).await;
        assert_eq!(mark, TUNNEL_MARK, "that of the attempt as it was sent");
    }
}
