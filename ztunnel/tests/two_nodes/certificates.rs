//! Identities in hand before they are needed, renewed while they are, and forgotten after.

use std::time::Duration;

use http::HeaderMap;
use net::{
    hbone::ConnectHead,
    testing::TestCa,
    tls::{Policy, WorkloadCertificate},
    zds::Request,
};

use crate::{
    hostile::{ask, peer},
    rig::{DEADLINE, eventually, node::uid, passes, rig_with, soon},
    rig_or_skip,
    telemetry::{dump, metric},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_there_before_the_first_connection_and_gone_with_the_pod() {
    let mut rig = rig_or_skip!();
    let states = async || -> Vec<String> {
        let dump = dump(&rig).await;
        let certificates = dump["certificates"].as_array().unwrap();
        certificates
            .iter()
            .map(|it| it["state"].as_str().unwrap().to_owned())
            .collect()
    };
    eventually("the certificate is there", async || {
        states().await == ["Available"]
    })
    .await;
    let leave = Request::Delete { uid: uid(&rig.b) };
    rig.node_b.agent.call(leave).await;
    eventually("the certificate is gone", async || {
        let dump = dump(&rig).await;
        dump["certificates"].as_array().unwrap().is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_serves_new_connections_and_old_ones_live_on() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let Some(rig) = rig_with(ca.with_lifetime(Duration::from_secs(4)), &[]).await else {
        return;
    };
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    // Both pods' first certificates, and the next ones.
    eventually("both are renewed", async || rig.ca.issued() >= 4).await;
    let (mut new_client, mut new_server) = rig.pair().await;
    passes(&mut new_client, &mut new_server, b"new").await;
    passes(&mut client, &mut server, b"old").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_whose_certificate_is_revoked_is_closed_and_not_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca-crl.pem");
    let ca = TestCa::new("cluster.local", &Policy::default());
    let setting = ("CRL_PATH", path.to_str().unwrap());
    let Some(rig) = rig_with(ca, &[setting]).await else {
        return;
    };
    let listener = rig.listen();
    let (leaf, key) = rig.ca.sign(&rig.ca.leaf(&rig.ca.identity("ns", "sa-a")));
    let list = rig.ca.revoke(&[&leaf]);
    let certificate =
        WorkloadCertificate::new(&Policy::default(), vec![leaf], key, rig.ca.trust()).unwrap();
    let client = peer(&rig, &certificate).await.expect("a good peer");
    let head = ConnectHead {
        authority: "10.210.0.2:8080".parse().unwrap(),
        headers: HeaderMap::new(),
    };
    let _open = client.connect(head, DEADLINE).await.expect("served");

    std::fs::write(&path, list).unwrap();
    eventually("the tunnel is closed", async || {
        soon(ask(&client, "10.210.0.2:8080")).await.is_err()
    })
    .await;
    let revoked = [
        "response_flags=\"CERT_REVOKED\"",
        "reporter=\"destination\"",
    ];
    eventually("the stream that was open is counted so", async || {
        let failed = "istio_tcp_connections_failed_total";
        metric(rig.node_b.stats, failed, &revoked).await > 0
    })
    .await;
    // TLS 1.3 tells a client of its refusal with the first read.
    if let Some(client) = peer(&rig, &certificate).await {
        assert!(soon(ask(&client, "10.210.0.2:8080")).await.is_err());
    }
    drop(listener);
    let (mut other, mut server) = rig.pair().await;
    passes(&mut other, &mut server, b"others are unharmed").await;
}
