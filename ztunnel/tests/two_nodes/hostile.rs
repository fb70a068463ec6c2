//! Peers on the HBONE port that are not what they should be: refused, and nobody else notices.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, StatusCode};
use mesh::identity::Identity;
use net::{
    hbone::{Client, Config, ConnectError, ConnectHead},
    socket::SourceAddress,
    testing::TestCa,
    tls::{self, Policy, WorkloadCertificate},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    rig::{
        Rig, application, connect_is_reset, connect_outside_the_mesh_is_reset, eventually,
        network::in_pod, outside_the_mesh, passes, rig_with, soon,
    },
    rig_or_skip,
    telemetry::metric,
};

fn tunnel_port(rig: &Rig) -> SocketAddr {
    SocketAddr::new(rig.b.v4, 15008)
}

/// A peer at pod `b`'s HBONE port, with this certificate.
pub(crate) async fn peer(rig: &Rig, certificate: &WorkloadCertificate) -> Option<Client> {
    let sockets = outside_the_mesh(&rig.a);
    let tcp = sockets.connect(tunnel_port(rig), SourceAddress::Own);
    let tcp = soon(tcp).await.unwrap();
    let expected: Arc<[Identity]> = vec![rig.ca.identity("ns", "sa-b")].into();
    let config = certificate.client_config(&expected);
    let connected = tls::connect(tcp, config, Duration::from_secs(5)).await;
    let (io, identity) = connected.ok()?;
    let (client, driver) = Client::handshake(io, identity, &Config::default())
        .await
        .ok()?;
    tokio::spawn(driver);
    Some(client)
}

pub(crate) async fn ask(client: &Client, authority: &str) -> Result<(), ConnectError> {
    let head = ConnectHead {
        authority: authority.parse().unwrap(),
        headers: HeaderMap::new(),
    };
    client
        .connect(head, Duration::from_secs(15))
        .await
        .map(|_| ())
}

#[track_caller]
fn status(answer: Result<(), ConnectError>) -> StatusCode {
    match answer {
        Ok(()) => StatusCode::OK,
        Err(ConnectError::Refused { status, .. }) => status,
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_decides_the_status() {
    let rig = rig_or_skip!();
    let _listener = rig.listen();
    let certificate = rig.ca.certificate(&rig.ca.identity("ns", "sa-a"));
    let client = peer(&rig, &certificate).await.expect("a good peer");
    for (authority, expected) in [
        ("10.210.0.2:8080", 200),
        // Not the pod's address.
        ("10.210.0.9:8080", 400),
        // The tunnel's own ports.
        ("10.210.0.2:15006", 503),
        ("10.210.0.2:15008", 503),
        // Nobody listens.
        ("10.210.0.2:9999", 503),
        ("web.ns.svc.cluster.local:80", 200),
        ("web.ns.svc.cluster.local:81", 503),
        ("nowhere.ns.svc.cluster.local:80", 503),
    ] {
        let answer = soon(ask(&client, authority)).await;
        assert_eq!(status(answer).as_u16(), expected, "{authority}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_peer_is_answered_401() {
    let rig = rig_or_skip!();
    let _listener = rig.listen();
    let principal = "cluster.local/ns/ns/sa/sa-a";
    let deny = crate::rig::policy("deny-a", mesh::policy::Action::Deny, principal);
    rig.publish([mesh::view::Resource::Policy(deny)]);
    let certificate = rig.ca.certificate(&rig.ca.identity("ns", "sa-a"));
    let client = peer(&rig, &certificate).await.expect("a good peer");
    let answer = soon(ask(&client, "10.210.0.2:8080")).await;
    assert_eq!(status(answer), StatusCode::UNAUTHORIZED);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_peers_are_refused_and_others_are_unharmed() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    // Another root, for the same trust domain and for another one.
    for domain in ["cluster.local", "example.com"] {
        let stranger = TestCa::new(domain, &Policy::default());
        let certificate = stranger.certificate(&stranger.identity("ns", "sa-a"));
        assert!(peer(&rig, &certificate).await.is_none(), "{domain}");
    }
    // What is no TLS.
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        b"PRI * HTTP/2.0",
    ] {
        let sockets = outside_the_mesh(&rig.a);
        let mut tcp = sockets
            .connect(tunnel_port(&rig), SourceAddress::Own)
            .await
            .unwrap();
        tcp.write_all(bytes).await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut rest = Vec::new();
        // Ended, in whatever way.
        let _ = soon(tcp.read_to_end(&mut rest)).await;
    }
    passes(&mut client, &mut server, b"unharmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_peers_do_not_keep_others_out() {
    let rig = rig_or_skip!();
    let _listener = rig.listen();
    net::socket::raise_open_files_limit().unwrap();
    let sockets = outside_the_mesh(&rig.a);
    // More than a pod has handshakes at a time.
    let mut silent = Vec::new();
    for _ in 0..1100 {
        let tcp = sockets.connect(tunnel_port(&rig), SourceAddress::Own);
        silent.push(soon(tcp).await.unwrap());
    }
    let certificate = rig.ca.certificate(&rig.ca.identity("ns", "sa-a"));
    let client = soon(peer(&rig, &certificate)).await.expect("let in");
    let answer = soon(ask(&client, "10.210.0.2:8080")).await;
    assert_eq!(status(answer), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_takes_no_new_streams_after_its_peers_certificate_has_ended() {
    let rig = rig_or_skip!();
    let _listener = rig.listen();
    let mut leaf = rig.ca.leaf(&rig.ca.identity("ns", "sa-a"));
    leaf.not_after = SystemTime::now() + Duration::from_secs(3);
    let (leaf, key) = rig.ca.sign(&leaf);
    let certificate =
        WorkloadCertificate::new(&Policy::default(), vec![leaf], key, rig.ca.trust()).unwrap();
    let client = peer(&rig, &certificate).await.expect("a good peer");
    let answer = soon(ask(&client, "10.210.0.2:8080")).await;
    assert_eq!(status(answer), StatusCode::OK);
    eventually("the tunnel is closed to it", async || {
        let answer = soon(ask(&client, "10.210.0.2:8080")).await;
        matches!(answer, Err(ConnectError::Stream { .. }))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_no_relay_for_what_was_sent_elsewhere_through_it() {
    let rig = rig_or_skip!();
    const ELSEWHERE: &str = "203.0.113.7";
    // The chart's redirection takes whatever reaches the pod, wherever it was sent to.
    let rule =
        "add rule inet capture prerouting ip daddr 203.0.113.7 tcp dport 80 redirect to :15006";
    in_pod(&rig.b, &["nft", rule]).unwrap();
    let via = rig.b.v4.to_string();
    in_pod(&rig.a, &["ip", "route", "add", ELSEWHERE, "via", &via]).unwrap();
    let to = format!("{ELSEWHERE}:80").parse().unwrap();
    connect_outside_the_mesh_is_reset(&rig.a, to).await;
    eventually("it is counted", async || {
        let labels = ["reporter=\"destination\""];
        metric(
            rig.node_b.stats,
            "leyline_connections_refused_total",
            &labels,
        )
        .await
            == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_pod_has_so_many_connections_and_no_more() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let Some(rig) = rig_with(ca, &[("LEYLINE_MAX_POD_CONNECTIONS", "3")]).await else {
        return;
    };
    let mut open = Vec::new();
    for _ in 0..3 {
        let (mut client, mut server) = rig.pair().await;
        passes(&mut client, &mut server, b"x").await;
        open.push((client, server));
    }
    connect_is_reset(&rig.a, rig.address()).await;
    let labels = ["reason=\"too many connections of the pod\""];
    let refused = "leyline_connections_refused_total";
    assert_eq!(metric(rig.node_a.stats, refused, &labels).await, 1);
    for (client, server) in &mut open {
        passes(client, server, b"still open").await;
    }
    drop(open);
    // Where the ends have been noticed there is room again.
    let listener = rig.listen();
    let sockets = application(&rig.a);
    eventually("there is room again", async || {
        let accepted = async {
            let mut byte = [0];
            let (mut server, _) = listener.accept().await.expect("listening");
            server.read(&mut byte).await.is_ok()
        };
        let sent = async {
            let Ok(mut client) = sockets.connect(rig.address(), SourceAddress::Own).await else {
                return false;
            };
            // Until it is reset, or for as long as it takes to be served.
            client.write_all(b"x").await.is_ok() && client.read(&mut [0]).await.is_ok()
        };
        tokio::select! {
            served = accepted => served,
            sent = sent => sent,
        }
    })
    .await;
}
