//! What an application has written before its tunnel stands.

use bytes::Bytes;
use futures_util::FutureExt;
use net::{testing::TestCa, tls, tls::Policy};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    rig::{DEADLINE, Rig, connect, rig_with, soon},
    rig_or_skip,
};

struct Unanswered {
    body: h2::RecvStream,
    connection: h2::server::Connection<tls::Stream<TcpStream>, Bytes>,
    _held: (Rig, TcpStream, h2::server::SendResponse<Bytes>),
}

/// In place of node `b`'s tunnel, a peer that has been sent a CONNECT, and does not answer it: what comes is what goes ahead.
async fn unanswered(mut rig: Rig) -> Unanswered {
    let (listener, certificate) = rig.in_place_of_node_b().await;
    let mut client = connect(&rig.a, rig.address()).await;
    client.write_all(b"first").await.unwrap();
    let (tcp, _) = soon(listener.accept()).await.unwrap();
    let accepted = tls::accept(tcp, certificate.server_config(), DEADLINE).await;
    let handshake = h2::server::handshake(accepted.unwrap().0);
    let mut connection = soon(handshake).await.unwrap();
    let (request, answer) = soon(connection.accept()).await.unwrap().unwrap();
    Unanswered {
        body: request.into_body(),
        connection,
        _held: (rig, client, answer),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_with_the_connect() {
    let mut peer = unanswered(rig_or_skip!()).await;
    let data = soon(async {
        tokio::select! {
            data = peer.body.data() => data.unwrap().unwrap(),
            _ = peer.connection.accept() => panic!("the connection ended"),
        }
    });
    assert_eq!(data.await, "first");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_for_the_answer_where_that_is_set() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let settings = [("LEYLINE_DATA_WITH_CONNECT", "false")];
    let Some(rig) = rig_with(ca, &settings).await else {
        return;
    };
    let mut peer = unanswered(rig).await;
    let mut pings = peer.connection.ping_pong().unwrap();
    // Whatever was sent at once comes before the answer to this.
    soon(async {
        tokio::select! {
            pong = pings.ping(h2::Ping::opaque()) => { pong.unwrap(); }
            _ = peer.connection.accept() => panic!("the connection ended"),
        }
    })
    .await;
    assert!(peer.body.data().now_or_never().is_none(), "it is there");
}
