//! What an application has written before its tunnel stands.

use bytes::Bytes;
use futures_util::FutureExt;
use net::{testing::TestCa, tls, tls::Policy};
use tokio::io::AsyncWriteExt;

use crate::{
    rig::{DEADLINE, Rig, connect, rig_with, soon},
    rig_or_skip,
};

/// In place of node `b`'s tunnel: what has come by the time that a peer has been told everything that came with the CONNECT,
/// which it has not answered.
async fn with_the_connect(mut rig: Rig) -> Option<Bytes> {
    let (listener, certificate) = rig.in_place_of_node_b().await;
    let mut client = connect(&rig.a, rig.address()).await;
    client.write_all(b"first").await.unwrap();
    let (tcp, _) = soon(listener.accept()).await.unwrap();
    let accepted = tls::accept(tcp, certificate.server_config(), DEADLINE).await;
    let handshake = h2::server::handshake(accepted.unwrap().0);
    let mut connection = soon(handshake).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    let (request, _answer) = soon(connection.accept()).await.unwrap().unwrap();
    // Whatever was sent at once comes before the answer to this.
    soon(async {
        tokio::select! {
            pong = pings.ping(h2::Ping::opaque()) => { pong.unwrap(); }
            _ = connection.accept() => panic!("the connection ended"),
        }
    })
    .await;
    let data = request.into_body().data().now_or_never().flatten();
    data.map(|data| data.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_with_the_connect() {
    let rig = rig_or_skip!();
    assert_eq!(with_the_connect(rig).await.as_deref(), Some(&b"first"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_for_the_answer_where_that_is_set() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let settings = [("LEYLINE_DATA_WITH_CONNECT", "false")];
    let Some(rig) = rig_with(ca, &settings).await else {
        return;
    };
    assert_eq!(with_the_connect(rig).await, None);
}
