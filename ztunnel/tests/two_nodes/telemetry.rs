//! What operators see.

use std::net::SocketAddr;

use net::hbone::ConnectError;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    hostile,
    rig::{
        Rig, connect, connect_is_reset, eventually, listen_once_free, node::uid, passes, policy,
        soon,
    },
    rig_or_skip,
};

pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
    request(address, "GET", path).await
}

/// The answer's body, if it is a good one.
pub(crate) async fn request(address: SocketAddr, method: &str, path: &str) -> String {
    let mut stream = soon(TcpStream::connect(address)).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    soon(stream.read_to_string(&mut answer)).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.to_owned()
}

/// The sum of a metric's series that carry all these labels.
pub(crate) async fn metric(stats: SocketAddr, name: &str, labels: &[&str]) -> u64 {
    let text = get(stats, "/metrics").await;
    let series = text.lines().filter(|line| {
        line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label))
    });
    series
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum()
}

/// Waits until it has this value: what applications see of a connection is counted just after they see it.
pub(crate) async fn counts(stats: SocketAddr, name: &str, labels: &[&str], expected: u64) {
    let what = format!("{name}{labels:?} is {expected}");
    eventually(&what, async || {
        metric(stats, name, labels).await == expected
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_count_the_same_connection_and_its_bytes() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, &[7; 1000]).await;
    passes(&mut server, &mut client, &[7; 300]).await;
    let common = [
        "source_principal=\"spiffe://cluster.local/ns/ns/sa/sa-a\"",
        "destination_principal=\"spiffe://cluster.local/ns/ns/sa/sa-b\"",
        "connection_security_policy=\"mutual_tls\"",
        "source_workload=\"a\"",
        "destination_workload=\"b\"",
        "request_protocol=\"tcp\"",
    ];
    for (stats, reporter) in [
        (rig.node_a.stats, "reporter=\"source\""),
        (rig.node_b.stats, "reporter=\"destination\""),
    ] {
        let labels: Vec<&str> = common.iter().copied().chain([reporter]).collect();
        // While the connection is open.
        for (name, expected) in [
            ("istio_tcp_connections_opened_total", 1),
            ("istio_tcp_received_bytes_total", 1000),
            ("istio_tcp_sent_bytes_total", 300),
            ("istio_tcp_connections_closed_total", 0),
        ] {
            counts(stats, name, &labels, expected).await;
        }
        assert_eq!(
            metric(stats, "istio_tcp_sockets_open", &[reporter]).await,
            1
        );
    }
    drop((client, server));
    let closed = "istio_tcp_connections_closed_total";
    eventually("it is counted as closed", async || {
        metric(rig.node_b.stats, closed, &[]).await == 1
            && metric(rig.node_a.stats, closed, &[]).await == 1
    })
    .await;
    eventually("the application's socket is closed", async || {
        metric(rig.node_a.stats, "istio_tcp_sockets_open", &[]).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_and_an_early_refusal_are_counted() {
    let rig = rig_or_skip!();
    let client = "cluster.local/ns/ns/sa/sa-a";
    let deny = policy("deny-a", mesh::policy::Action::Deny, client);
    rig.publish([mesh::view::Resource::Policy(deny)]);
    connect_is_reset(&rig.a, rig.address()).await;
    let denied = ["response_flags=\"DENY\"", "reporter=\"destination\""];
    let failed = "istio_tcp_connections_failed_total";
    eventually("the denial is counted", async || {
        metric(rig.node_b.stats, failed, &denied).await == 1
    })
    .await;
    // A service address whose port nobody serves.
    connect_is_reset(&rig.a, "10.96.0.7:81".parse().unwrap()).await;
    let refused = "leyline_connections_refused_total";
    let reason = ["reason=\"no healthy upstream\"", "reporter=\"source\""];
    assert_eq!(metric(rig.node_a.stats, refused, &reason).await, 1);
}

pub(crate) async fn dump(rig: &Rig) -> serde_json::Value {
    dump_of(rig.node_b.admin).await
}

async fn dump_of(admin: SocketAddr) -> serde_json::Value {
    let text = get(admin, "/config_dump").await;
    serde_json::from_str(&text).expect("JSON")
}

fn keys(of: &serde_json::Value) -> Vec<&str> {
    let keys = of.as_object().expect("an object").keys();
    keys.map(String::as_str).collect()
}

/// To the second, in UTC: `2026-01-02T03:04:05Z`.
fn is_time(text: &str) -> bool {
    let form = |c: char| if c.is_ascii_digit() { '0' } else { c };
    text.chars().map(form).eq("0000-00-00T00:00:00Z".chars())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dump_tells_certificates_and_the_build_as_istioctl_reads_them() {
    let rig = rig_or_skip!();
    // Once a connection stands, there is a certificate.
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    let dump = dump(&rig).await;
    let certificate = &dump["certificates"][0];
    let expected = ["certChain", "identity", "rootCerts", "state"];
    assert_eq!(keys(certificate), expected);
    for chain in ["certChain", "rootCerts"] {
        let one = &certificate[chain][0];
        let text = |key: &str| one[key].as_str().expect(key);
        let begin = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t";
        assert!(text("pem").starts_with(begin), "base64 of PEM: {one}");
        let serial = text("serialNumber");
        assert!(serial.bytes().all(|it| it.is_ascii_digit()), "{serial}");
        for time in ["validFrom", "expirationTime"] {
            assert!(is_time(text(time)), "{one}");
        }
    }
    let expected = [
        "buildProfile",
        "buildStatus",
        "cryptoProvider",
        "gitRevision",
        "istioVersion",
        "rustVersion",
        "version",
    ];
    assert_eq!(keys(&dump["version"]), expected);
    let nothing = serde_json::json!({"workloads": [], "services": [], "policies": []});
    assert_eq!(dump["staticConfig"], nothing);
    let names: Vec<_> = (0..2)
        .map(|n| dump["workloads"][n]["name"].clone())
        .collect();
    assert_eq!(names, ["a", "b"], "sorted");
    let listed = &dump["workloads"][1]["services"];
    assert_eq!(*listed, serde_json::json!(["ns/web.ns.svc.cluster.local"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dump_tells_where_a_connection_was_to_go_and_where_it_went() {
    let mut rig = rig_or_skip!();
    let listener = rig.listen();
    let vip = crate::rig::VIP.parse().unwrap();
    let (client, accepted) =
        soon(async { tokio::join!(connect(&rig.a, vip), listener.accept()) }).await;
    let (mut client, mut server) = (client, accepted.unwrap().0);
    passes(&mut client, &mut server, b"x").await;
    let expected = serde_json::json!([{
        "src": client.local_addr().unwrap().to_string(),
        "originalDst": crate::rig::VIP,
        "actualDst": SocketAddr::new(rig.b.v4, 15008).to_string(),
        "protocol": "HBONE",
    }]);
    // The server's end may have what went with the CONNECT before the client's end has the answer.
    eventually("the connection is told", async || {
        let dump = dump_of(rig.node_a.admin).await;
        dump["workloadState"][uid(&rig.a)]["connections"]["outbound"] == expected
    })
    .await;
    // A pod that cannot be served yet: its port is somebody's who does not share it.
    let leave = net::zds::Request::Delete { uid: uid(&rig.a) };
    rig.node_a.agent.call(leave).await;
    let _in_the_way = listen_once_free(&rig.a, "0.0.0.0:15006".parse().unwrap()).await;
    assert!(rig.node_a.agent.try_add(&rig.a).await.is_err());
    let expected = serde_json::json!({
        "state": "Pending", "info": {"name": "a", "namespace": "ns", "serviceAccount": "sa-a"},
    });
    eventually("the pod is told as one that waits", async || {
        dump_of(rig.node_a.admin).await["workloadState"][uid(&rig.a)] == expected
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dump_has_the_keys_that_istioctl_reads() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    let dump = dump(&rig).await;
    let mut keys: Vec<&str> = dump
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    let expected = [
        "certificates",
        "config",
        "policies",
        "services",
        "stagedServices",
        "staticConfig",
        "version",
        "workloadState",
        "workloads",
    ];
    assert_eq!(keys, expected);
    let certificate = &dump["certificates"][0];
    assert_eq!(
        certificate["identity"],
        "spiffe://cluster.local/ns/ns/sa/sa-b"
    );
    assert_eq!(certificate["state"], "Available");
    assert_eq!(certificate["certChain"].as_array().unwrap().len(), 1);
    let pod = &dump["workloadState"][uid(&rig.b)];
    assert_eq!(pod["state"], "Up");
    assert_eq!(pod["info"]["serviceAccount"], "sa-b");
    let inbound = &pod["connections"]["inbound"][0];
    assert_eq!(inbound["protocol"], "HBONE");
    assert_eq!(inbound["actualDst"], rig.address().to_string());
    assert_eq!(inbound["originalDst"], serde_json::Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn open_connections_are_shown_with_both_identities() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"12345").await;
    let shown = async |admin| -> serde_json::Value {
        serde_json::from_str(&get(admin, "/connections").await).unwrap()
    };
    eventually("its bytes are shown", async || {
        shown(rig.node_a.admin).await[0]["received_bytes"] == 5
    })
    .await;
    let open = shown(rig.node_a.admin).await;
    let one = &open[0];
    assert_eq!(one["pod"], uid(&rig.a));
    let principal = |end: &str| one[end]["labels"]["principal"].clone();
    assert_eq!(principal("source"), "spiffe://cluster.local/ns/ns/sa/sa-a");
    let destination = principal("destination");
    assert_eq!(destination, "spiffe://cluster.local/ns/ns/sa/sa-b");
    // By one trace, both ends of it are found.
    let there = shown(rig.node_b.admin).await;
    assert!(one["traceId"].is_string(), "{one}");
    assert_eq!(there[0]["traceId"], one["traceId"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_is_lost_with_the_agent_and_comes_back_with_its_snapshot() {
    let mut rig = rig_or_skip!();
    assert_eq!(get(rig.node_b.readiness, "/healthz/ready").await, "ready\n");
    rig.node_b.agent.reconnected().await;
    let readiness = rig.node_b.readiness;
    eventually("it is not ready", async || {
        let mut stream = TcpStream::connect(readiness).await.unwrap();
        let request = b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.contains("not ready, pending: workload proxy manager\n")
    })
    .await;
    rig.node_b.agent.add(&rig.b).await;
    rig.node_b.agent.call(net::zds::Request::SnapshotSent).await;
    assert_eq!(get(readiness, "/healthz/ready").await, "ready\n");
}

/// An endless answer, and what has been read of it.
struct Live {
    stream: TcpStream,
    text: String,
}

impl Live {
    async fn follow(admin: SocketAddr, path: &str) -> Self {
        let mut stream = soon(TcpStream::connect(admin)).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let text = String::new();
        let mut live = Self { stream, text };
        // From its first line on, nothing is missed.
        live.tells(&["\"event\":\"alive\""]).await;
        live
    }

    /// Reads until all of these have been told.
    async fn tells(&mut self, wanted: &[&str]) {
        let mut buffer = vec![0; 64 << 10];
        let reading = async {
            while !wanted.iter().all(|it| self.text.contains(it)) {
                let length = self.stream.read(&mut buffer).await.expect("it goes on");
                assert_ne!(length, 0, "it ended: {}", self.text);
                let read = String::from_utf8_lossy(&buffer[..length]);
                self.text.push_str(&read);
            }
        };
        let read = tokio::time::timeout(crate::rig::DEADLINE, reading).await;
        assert!(read.is_ok(), "{wanted:?} not told: {}", self.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_followed_as_they_open_close_and_are_denied() {
    let rig = rig_or_skip!();
    let client = "cluster.local/ns/ns/sa/sa-a";
    let allow = policy("allow-a", mesh::policy::Action::Allow, client);
    rig.publish([mesh::view::Resource::Policy(allow)]);
    let mut live = Live::follow(rig.node_b.admin, "/flows").await;
    let (mut client_end, mut server_end) = rig.pair().await;
    passes(&mut client_end, &mut server_end, b"12345").await;
    let opened = [
        "\"event\":\"opened\"",
        "\"policies\":[\"ns/allow-a\"]",
        "spiffe://cluster.local/ns/ns/sa/sa-a",
    ];
    live.tells(&opened).await;
    let open = get(rig.node_b.admin, "/connections").await;
    let open: serde_json::Value = serde_json::from_str(&open).unwrap();
    let by = serde_json::json!({"policy": "ns/allow-a", "rule": 0});
    assert_eq!(open[0]["allowedBy"], by);
    drop((client_end, server_end));
    live.tells(&["\"event\":\"closed\"", "\"received_bytes\":5"])
        .await;
    let deny = policy("deny-a", mesh::policy::Action::Deny, client);
    rig.publish([mesh::view::Resource::Policy(deny)]);
    for _ in 0..3 {
        connect_is_reset(&rig.a, rig.address()).await;
    }
    let denied = ["\"event\":\"refused\"", "\"policies\":[\"ns/deny-a\"]"];
    live.tells(&denied).await;
    eventually("three denials are one entry that counts", async || {
        let kept = get(rig.node_b.admin, "/refusals").await;
        let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
        kept.as_array().unwrap().len() == 1 && kept[0]["count"] == 3
    })
    .await;
    let mut late = Live::follow(rig.node_b.admin, "/flows?only=failures&kept").await;
    late.tells(&["\"count\":3"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_before_routing_is_told_with_its_pod_and_reason() {
    let rig = rig_or_skip!();
    // A service address whose port nobody serves.
    connect_is_reset(&rig.a, "10.96.0.7:81".parse().unwrap()).await;
    let kept = get(rig.node_a.admin, "/refusals").await;
    let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
    let one = &kept[0];
    assert_eq!(one["reason"], "no healthy upstream");
    assert_eq!(one["source"]["pod"], "a");
    assert_eq!(one["destination_addr"], "10.96.0.7:81");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tunnel_refuses_before_routing_is_told_with_the_identity_that_is_proven() {
    let rig = rig_or_skip!();
    let certificate = rig.ca.certificate(&rig.ca.identity("ns", "sa-a"));
    let client = hostile::peer(&rig, &certificate)
        .await
        .expect("a good peer");
    // Not the pod's address.
    let answer = soon(hostile::ask(&client, "10.210.0.9:8080")).await;
    assert!(matches!(answer, Err(ConnectError::Refused { .. })));
    let kept = get(rig.node_b.admin, "/refusals").await;
    let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
    let one = &kept[0];
    assert_eq!(one["source"]["pod"], "a");
    for (end, account) in [("source", "sa-a"), ("destination", "sa-b")] {
        let principal = format!("spiffe://cluster.local/ns/ns/sa/{account}");
        assert_eq!(one[end]["labels"]["principal"], principal);
    }
    assert_eq!(one["security"], "mutual_tls");
}
