//! What settings change: each test would pass with the default, and fails where the setting is not heeded.

use std::net::SocketAddr;

use hickory_proto::rr::RecordType;
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh::{
    view::Resource,
    workload::{ApplicationProtocol, ApplicationTunnel},
};
use net::{
    hbone::{ConnectHead, Tunnel},
    socket::{Factory, SourceAddress},
    testing::TestCa,
    tls::Policy,
};
use tokio::{io::AsyncReadExt, net::TcpListener};

use crate::{
    hostile::peer,
    names,
    rig::{APP_PORT, DEADLINE, Rig, application, listen, outside_the_mesh, passes, rig_with, soon},
    telemetry::metric,
};

async fn rig(settings: &[(&str, &str)]) -> Option<Rig> {
    rig_with(TestCa::new("cluster.local", &Policy::default()), settings).await
}

/// Whether somebody listens at the pod's own address.
async fn listens(rig: &Rig, address: SocketAddr) -> bool {
    let sockets = outside_the_mesh(&rig.a);
    let connected = soon(sockets.connect(address, SourceAddress::Own)).await;
    connected.is_ok()
}

/// A CONNECT to the application of pod `b`, by a peer that is no tunnel of ours.
async fn ask(rig: &Rig) -> Tunnel {
    ask_with(rig, HeaderMap::new()).await
}

async fn ask_with(rig: &Rig, headers: HeaderMap) -> Tunnel {
    let certificate = rig.ca.certificate(&rig.ca.identity("ns", "sa-a"));
    let client = peer(rig, &certificate).await.expect("a good peer");
    let head = ConnectHead {
        authority: rig.address().to_string().parse().unwrap(),
        headers,
    };
    client.connect(head, DEADLINE).await.expect("served")
}

#[tokio::test(flavor = "multi_thread")]
async fn applications_see_the_pod_itself_where_clients_addresses_are_not_kept() {
    let Some(rig) = rig(&[("ENABLE_ORIG_SRC", "false")]).await else {
        return;
    };
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    assert_eq!(server.peer_addr().unwrap().ip(), rig.b.v4);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_proxy_names_are_still_answered() {
    let Some(rig) = rig(&[("ENABLE_PROXY", "false")]).await else {
        return;
    };
    for port in [15001, 15006, 15008] {
        let address = SocketAddr::new(rig.b.v4, port);
        assert!(!listens(&rig, address).await, "{port}");
    }
    let reply = names::ask(&rig, "web.", RecordType::A).await;
    assert!(reply.metadata.authoritative && reply.answers.len() == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_dns_connections_are_still_carried() {
    let Some(rig) = rig(&[("ISTIO_META_DNS_CAPTURE", "false")]).await else {
        return;
    };
    let dns = "127.0.0.1:15053".parse().unwrap();
    let asked = soon(application(&rig.a).connect(dns, SourceAddress::Own)).await;
    assert!(asked.is_err(), "nobody listens there");
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_answered_on_the_port_that_metadata_says() {
    let Some(rig) = rig(&[("ISTIO_META_DNS_PROXY_ADDR", "localhost:5353")]).await else {
        return;
    };
    let here = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let sockets = application(&rig.a);
    assert!(
        soon(sockets.connect(here(5353), SourceAddress::Own))
            .await
            .is_ok()
    );
    assert!(
        soon(sockets.connect(here(15053), SourceAddress::Own))
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_ports_are_shared_unless_that_is_off() {
    for (setting, shared) in [("true", true), ("false", false)] {
        let Some(rig) = rig(&[("INPOD_PORT_REUSE", setting)]).await else {
            return;
        };
        let successor = Factory {
            reuse_port: true,
            ..application(&rig.b)
        };
        let joined = successor.listen(SocketAddr::new(rig.b.v4, 15008));
        assert_eq!(joined.is_ok(), shared, "{setting}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ipv6_there_are_neither_listeners_nor_records_of_it() {
    for (setting, there) in [("true", true), ("false", false)] {
        let Some(rig) = rig(&[("IPV6_ENABLED", setting)]).await else {
            return;
        };
        let tunnel = |address| SocketAddr::new(address, 15008);
        assert!(listens(&rig, tunnel(rig.b.v4)).await);
        assert_eq!(listens(&rig, tunnel(rig.b.v6)).await, there, "{setting}");
        let headless = {
            let mut it = rig.workload_b();
            let key = "ns/db.ns.svc.cluster.local".parse().unwrap();
            it.services.insert(key, [(80, 80)].into_iter().collect());
            it
        };
        let service = serde_json::json!({
            "name": "db", "namespace": "ns", "hostname": "db.ns.svc.cluster.local", "ports": {"80": 80},
        });
        let service = serde_json::from_value(service).expect("a service");
        rig.publish([Resource::Service(service), Resource::Workload(headless)]);
        for (kind, expected) in [(RecordType::A, true), (RecordType::AAAA, there)] {
            let reply = names::ask(&rig, "db.", kind).await;
            assert!(reply.metadata.authoritative);
            assert_eq!(!reply.answers.is_empty(), expected, "{setting} {kind}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_tells_of_the_pod_unless_that_is_off() {
    for (setting, told) in [("true", true), ("false", false)] {
        let Some(rig) = rig(&[("ENABLE_RESPONSE_BAGGAGE", setting)]).await else {
            return;
        };
        let _listener = rig.listen();
        let answered = ask(&rig).await;
        let baggage = answered.headers.get("baggage");
        assert_eq!(baggage.is_some(), told, "{setting}");
        let names_it = baggage.is_none_or(|it| it.to_str().unwrap().contains("service.name=b"));
        assert!(names_it, "{baggage:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_network_is_known_by_its_baggage_unless_that_is_off() {
    for (setting, known) in [("true", "elsewhere"), ("false", "unknown")] {
        let Some(rig) = rig(&[("ENABLE_RESPONSE_BAGGAGE", setting)]).await else {
            return;
        };
        let _listener = rig.listen();
        let headers = [
            ("x-forwarded-network", "far-away"),
            ("baggage", "k8s.deployment.name=elsewhere"),
        ];
        let headers = headers.map(|(name, text)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(text),
            )
        });
        let _tunnel = ask_with(&rig, headers.into_iter().collect()).await;
        let workload = format!("source_workload=\"{known}\"");
        // Whatever it tells: who it is, it has proven.
        let labels = [
            &*workload,
            "source_principal=\"spiffe://cluster.local/ns/ns/sa/sa-a\"",
        ];
        let opened = metric(
            rig.node_b.stats,
            "istio_tcp_connections_opened_total",
            &labels,
        );
        assert_eq!(opened.await, 1, "{setting}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_tunnel_ends_on_loopback_unless_that_is_off() {
    for (setting, at) in [("true", "127.0.0.1"), ("false", "10.210.0.2")] {
        let Some(rig) = rig(&[("LOCALHOST_APP_TUNNEL", setting)]).await else {
            return;
        };
        let tunnelled = {
            let mut it = rig.workload_b();
            it.application_tunnel = Some(ApplicationTunnel {
                protocol: ApplicationProtocol::Proxy,
                port: None,
            });
            it
        };
        rig.publish([Resource::Workload(tunnelled)]);
        let at = SocketAddr::new(at.parse().unwrap(), APP_PORT);
        let listener: TcpListener = listen(&rig.b, at);
        let (_tunnel, accepted) = soon(async { tokio::join!(ask(&rig), listener.accept()) }).await;
        let (mut server, _) = accepted.unwrap();
        let mut header = [0; 12];
        soon(server.read_exact(&mut header)).await.unwrap();
        assert_eq!(&header, b"\r\n\r\n\0\r\nQUIT\n", "{setting}");
    }
}
