//! SOCKS5, as an application of a pod speaks it.

use net::{testing::TestCa, tls::Policy};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    rig::{self, Rig, connect, passes, policy, rig_with, soon},
    telemetry::{counts, metric},
};

async fn rig() -> Option<Rig> {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let settings = [
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
        // Nobody outside is asked.
        ("LEYLINE_RESOLV_CONF", "/dev/null"),
    ];
    rig_with(ca, &settings).await
}

/// A request for a name from pod `a`, and the code with which it is answered.
async fn ask(rig: &Rig, name: &str, port: u16) -> (TcpStream, u8) {
    let mut stream = connect(&rig.a, "127.0.0.1:15080".parse().unwrap()).await;
    let mut request = vec![5, 1, 0, 5, 1, 0, 3];
    request.push(u8::try_from(name.len()).unwrap());
    request.extend(name.as_bytes());
    request.extend(port.to_be_bytes());
    soon(stream.write_all(&request)).await.unwrap();
    let mut answer = [0; 12];
    soon(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer[..3], [5, 0, 5]);
    (stream, answer[3])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_reached_over_mutual_tls_as_any_connection_is() {
    let Some(rig) = rig().await else { return };
    let listener = rig.listen();
    let ((mut client, code), mut server) = soon(async {
        tokio::join!(ask(&rig, "web", 80), async {
            listener.accept().await.unwrap().0
        })
    })
    .await;
    assert_eq!(code, 0);
    passes(&mut client, &mut server, b"there").await;
    passes(&mut server, &mut client, b"back").await;
    let labels = [
        "reporter=\"source\"",
        "connection_security_policy=\"mutual_tls\"",
        "destination_service_name=\"web\"",
    ];
    let opened = "istio_tcp_connections_opened_total";
    counts(rig.node_a.stats, opened, &labels, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_that_is_served_is_answered_and_counted() {
    let Some(rig) = rig().await else { return };
    let refused = "leyline_connections_refused_total";
    let reason = ["reason=\"invalid CONNECT request\"", "reporter=\"source\""];
    // BIND; authentication is a must; version 4.
    let bind = [5, 1, 0, 5, 2, 0, 1, 10, 0, 0, 1, 0, 80];
    for (count, request, answer) in [
        (1, &bind[..], &[5, 0, 5, 7][..]),
        (2, &[5, 1, 2], &[5, 0xff]),
        (3, &[4, 1, 0, 80, 10, 0, 0, 1, 0], &[]),
    ] {
        let mut stream = connect(&rig.a, "127.0.0.1:15080".parse().unwrap()).await;
        soon(stream.write_all(request)).await.unwrap();
        let mut told = vec![0; answer.len()];
        soon(stream.read_exact(&mut told)).await.unwrap();
        assert_eq!(told, answer);
        rig::eventually("it is counted", async || {
            metric(rig.node_a.stats, refused, &reason).await == count
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_is_told_why_it_is_not_connected() {
    let Some(rig) = rig().await else { return };
    // Nobody listens.
    assert_eq!(ask(&rig, "web", 80).await.1, 1);
    // No such port, no such name, ourselves.
    assert_eq!(ask(&rig, "web", 81).await.1, 4);
    assert_eq!(ask(&rig, "nowhere.invalid", 80).await.1, 4);
    assert_eq!(ask(&rig, "127.0.0.1", 15080).await.1, 2);
    let client = "cluster.local/ns/ns/sa/sa-a";
    let deny = policy("deny-a", mesh::policy::Action::Deny, client);
    rig.publish([mesh::view::Resource::Policy(deny)]);
    let _listener = rig.listen();
    assert_eq!(ask(&rig, "web", 80).await.1, 2);
    let refused = "leyline_connections_refused_total";
    let denied = ["reason=\"explicitly denied\""];
    rig::eventually("the denial is counted", async || {
        metric(rig.node_b.stats, refused, &denied).await == 1
    })
    .await;
}
