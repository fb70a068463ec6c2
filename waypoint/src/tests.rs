//! The frame as a whole: real HBONE on loopback, in one process.

mod east_west;
mod readiness;
mod refusals;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderMap, StatusCode};
use mesh::l7::{
    authorization::{PolicyAction, RequestPolicy},
    name::Target,
    route::{Attachment, Backend, CallerMatch, Callers, Route, Rules, TcpRule},
    served::{AppProtocol, WorkloadLabels},
    view::Resource,
};
use mesh::policy::{Action, AuthorizationPolicy, PolicyScope};
use net::hbone::{ConnectError, ConnectRequest, ResetCode};
use parking_lot::Mutex;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::testing::{Rig, VIP, soon};

/// Says its name, then echoes.
async fn echo(name: &'static str, request: ConnectRequest) {
    let Ok(mut stream) = request.accept(HeaderMap::new()) else {
        return;
    };
    let _ = stream.write_all(name.as_bytes()).await;
    let (mut send, mut recv) = stream.into_halves();
    let _ = tokio::io::copy(&mut recv, &mut send).await;
    let _ = send.shutdown().await;
}

async fn ask(rig: &Rig, authority: &str, question: &str) -> std::io::Result<String> {
    let tunnel = rig.connect(authority).await.expect("a tunnel");
    let mut stream = tunnel.stream;
    stream.write_all(question.as_bytes()).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    soon(stream.read_to_string(&mut answer)).await?;
    Ok(answer)
}

async fn refusal(rig: &Rig, authority: &str) -> StatusCode {
    match rig.connect(authority).await {
        Err(ConnectError::Refused { status, .. }) => status,
        other => panic!("{authority}: {other:?}"),
    }
}

#[tokio::test]
async fn bytes_reach_the_endpoint_and_come_back_with_both_ends() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let seen = Arc::new(Mutex::new(None));
    let endpoint = {
        let seen = seen.clone();
        let handler = move |request: ConnectRequest| {
            let headers = request.headers().clone();
            let peer = request.peer().identity.clone();
            *seen.lock() = Some((request.authority().to_string(), peer, headers));
            echo("web:", request)
        };
        rig.hbone_endpoint("web-1", handler).await
    };
    let answer = ask(&rig, &format!("{VIP}:80"), "hello").await.unwrap();
    assert_eq!(answer, "web:hello");
    let (authority, peer, headers) = seen.lock().take().expect("one CONNECT");
    assert_eq!(authority, format!("{}:80", endpoint.addresses[0]));
    assert_eq!(peer, rig.identity());
    let forwarded = headers["forwarded"].to_str().unwrap();
    assert!(
        forwarded.contains("host=web.shop.svc.cluster.local"),
        "{forwarded}"
    );
    assert!(forwarded.contains("for=\"127.0.0.1:"), "{forwarded}");
}

#[tokio::test]
async fn what_is_not_served_is_refused_with_its_status() {
    let rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let own = rig.address.to_string();
    for (authority, status) in [
        (format!("{VIP}:81"), StatusCode::NOT_FOUND),
        ("10.96.0.9:80".to_owned(), StatusCode::NOT_FOUND),
        (own, StatusCode::FORBIDDEN),
        ("127.0.0.1:15000".to_owned(), StatusCode::FORBIDDEN),
    ] {
        assert_eq!(refusal(&rig, &authority).await, status, "{authority}");
    }
}

#[tokio::test]
async fn a_binding_that_is_told_a_moment_later_is_waited_for() {
    let mut rig = Rig::new();
    rig.hbone_endpoint("web-1", |request| echo("web:", request))
        .await;
    let authority = format!("{VIP}:80");
    let told = async {
        tokio::task::yield_now().await;
        rig.serve(&[(80, AppProtocol::Tcp)]);
    };
    let (answer, ()) = tokio::join!(ask(&rig, &authority, "x"), told);
    assert_eq!(answer.unwrap(), "web:x");
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_not_the_last_word() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let refuse =
        |request: ConnectRequest| async { request.refuse(StatusCode::SERVICE_UNAVAILABLE) };
    rig.hbone_endpoint("web-1", refuse).await;
    rig.hbone_endpoint("web-2", |request| echo("two:", request))
        .await;
    for _ in 0..8 {
        let answer = ask(&rig, &format!("{VIP}:80"), "x").await.unwrap();
        assert_eq!(answer, "two:x");
    }
}

#[tokio::test]
async fn a_service_without_endpoints_is_told_as_unavailable() {
    let rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let status = refusal(&rig, &format!("{VIP}:80")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn resets_pass_both_ways() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let reset = |request: ConnectRequest| async {
        let mut stream = request.accept(HeaderMap::new()).unwrap();
        let _ = stream.read_u8().await;
        stream.reset(ResetCode::CONNECT_ERROR);
    };
    rig.hbone_endpoint("web-1", reset).await;
    let tunnel = rig.connect(&format!("{VIP}:80")).await.unwrap();
    let mut stream = tunnel.stream;
    stream.write_all(b"x").await.unwrap();
    let error = soon(stream.read_u8()).await.unwrap_err();
    assert_eq!(
        error.kind(),
        std::io::ErrorKind::ConnectionReset,
        "{error:?}"
    );
}

#[tokio::test]
async fn who_speaks_first_is_served_on_an_undeclared_port_too() {
    let mut rig = Rig::new();
    rig.serve(&[(7777, AppProtocol::Unknown)]);
    rig.hbone_endpoint("web-1", |request| echo("220 hello\n", request))
        .await;
    for _ in 0..2 {
        let tunnel = rig.connect(&format!("{VIP}:7777")).await.unwrap();
        let mut stream = tunnel.stream;
        let mut greeting = [0; 10];
        soon(stream.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 hello\n");
    }
}

#[tokio::test]
async fn a_tcp_route_leads_elsewhere_and_one_to_nowhere_is_closed() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("web:", request))
        .await;
    let key: mesh::names::NamespacedHostname = "shop/web.shop.svc.cluster.local".parse().unwrap();
    let route = |backend: Backend| {
        Resource::Route(Route {
            key: mesh::l7::name::ObjectRef {
                kind: "TCPRoute".into(),
                namespace: "shop".into(),
                name: "r".into(),
            },
            created: 0,
            attachments: vec![Attachment {
                service: key.clone(),
                port: None,
                callers: Callers::All,
            }],
            rules: Rules::Tcp(vec![TcpRule {
                name: None,
                port: None,
                source: None,
                destinations: Vec::new(),
                backends: vec![(1, backend)],
            }]),
        })
    };
    let back = Backend::Service {
        service: key.clone(),
        port: 80,
        subset: None,
    };
    rig.tell(vec![route(back)]);
    let authority = format!("{VIP}:80");
    assert_eq!(ask(&rig, &authority, "x").await.unwrap(), "web:x");
    rig.tell(vec![route(Backend::Invalid("nowhere".into()))]);
    let status = refusal(&rig, &authority).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_rule_for_labels_is_for_the_pod_that_proves_who_it_is_and_no_other_at_its_address() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("web:", request))
        .await;
    let mut rules = Vec::new();
    for (labels, port) in [(&["canary"][..], 80), (&[], 1)] {
        let labels = labels.iter().map(|it| ((*it).into(), "x".into()));
        let backend = Backend::Service {
            service: "shop/web.shop.svc.cluster.local".parse().unwrap(),
            port,
            subset: None,
        };
        rules.push(TcpRule {
            name: None,
            port: None,
            source: CallerMatch::new(None, labels.collect()),
            destinations: Vec::new(),
            backends: vec![(1, backend)],
        });
    }
    rig.tell(vec![Resource::Route(Route {
        key: mesh::l7::name::ObjectRef {
            kind: "VirtualService".into(),
            namespace: "shop".into(),
            name: "v".into(),
        },
        created: 0,
        attachments: vec![Attachment {
            service: "shop/web.shop.svc.cluster.local".parse().unwrap(),
            port: None,
            callers: Callers::All,
        }],
        rules: Rules::Tcp(rules),
    })]);
    let mut client = rig.plain_endpoint("client-1", "127.0.0.1".parse().unwrap());
    client.services.clear();
    client.service_account = "client".into();
    rig.tell_mesh(vec![client.clone().into()]);
    let authority = format!("{VIP}:80");
    let labelled = |labels: &[&str]| {
        let labels = labels.iter().map(|it| ((*it).into(), "x".into()));
        Resource::Labels(WorkloadLabels {
            uid: client.uid.clone(),
            labels: labels.collect(),
        })
    };
    let nowhere = StatusCode::SERVICE_UNAVAILABLE;
    assert_eq!(refusal(&rig, &authority).await, nowhere);
    rig.tell(vec![labelled(&["canary", "more"])]);
    assert_eq!(ask(&rig, &authority, "x").await.unwrap(), "web:x");
    // Whoever is at that address otherwise, whatever it tells of itself.
    let stranger = rig.ca.identity("shop", "stranger");
    let told = [("baggage", "k8s.pod.name=client-1,service.name=canary")];
    let told = told.map(|(name, it)| (name.parse().unwrap(), it.parse().unwrap()));
    let other = rig.connect_as(&stranger, &authority, told.into_iter().collect());
    assert!(matches!(
        other.await,
        Err(ConnectError::Refused { status, .. }) if status == nowhere
    ));
    rig.tell(vec![labelled(&["more"])]);
    assert_eq!(refusal(&rig, &authority).await, nowhere);
}

/// A stream that is open, and whose server has answered.
async fn echoing(rig: &Rig, authority: &str) -> net::hbone::Stream {
    let mut open = rig.connect(authority).await.unwrap().stream;
    open.write_all(b"a").await.unwrap();
    assert_eq!(soon(open.read_u8()).await.unwrap(), b'a');
    open
}

#[tokio::test]
async fn a_drain_lets_open_streams_end_and_serves_who_has_not_heard_of_it() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("", request))
        .await;
    let authority = format!("{VIP}:80");
    let mut open = echoing(&rig, &authority).await;
    let running = rig.running.take().expect("it runs");
    let mut draining = running.draining();
    let drain = tokio::spawn(running.drain());
    soon(draining.started()).await;
    // Another identity is another connection, where the pool's own has been told to go.
    let other = rig.ca.identity("shop", "other");
    let late = rig.connect_as(&other, &authority, HeaderMap::new()).await;
    let mut late = late.expect("it is taken in").stream;
    late.write_all(b"c").await.unwrap();
    assert_eq!(soon(late.read_u8()).await.unwrap(), b'c');
    drop(late);
    assert_eq!(ask(&rig, &authority, "again").await.unwrap(), "again");
    open.write_all(b"b").await.unwrap();
    assert_eq!(soon(open.read_u8()).await.unwrap(), b'b');
    open.shutdown().await.unwrap();
    assert_eq!(soon(open.read(&mut [0])).await.unwrap(), 0);
    drop(open);
    // The last has gone, and with it the listener.
    soon(drain).await.unwrap();
    let late = tokio::net::TcpStream::connect(rig.address).await;
    assert!(late.is_err(), "{late:?}");
}

#[tokio::test]
async fn a_drain_with_nobody_there_ends_at_once() {
    let mut rig = Rig::new();
    let running = rig.running.take().expect("it runs");
    soon(running.drain()).await;
}

#[tokio::test]
async fn one_identity_cannot_have_all_connections() {
    let mut rig = Rig::with(&[("LEYLINE_MAX_CONNECTIONS_PER_IDENTITY", "1")]);
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("", request))
        .await;
    let authority = format!("{VIP}:80");
    let (one, two) = (rig.ca.identity("a", "x"), rig.ca.identity("a", "y"));
    let _first = rig
        .connect_as(&one, &authority, HeaderMap::new())
        .await
        .unwrap();
    // Another certificate of the same identity is another connection.
    let again = rig.connect_as(&one, &authority, HeaderMap::new()).await;
    assert!(again.is_err(), "{again:?}");
    rig.connect_as(&two, &authority, HeaderMap::new())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_policy_refuses_and_cuts_what_it_had_allowed() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("", request))
        .await;
    let authority = format!("{VIP}:80");
    let mut open = echoing(&rig, &authority).await;
    rig.tell(vec![deny_all()]);
    let error = soon(open.read_u8()).await.unwrap_err();
    assert_eq!(
        error.kind(),
        std::io::ErrorKind::ConnectionReset,
        "{error:?}"
    );
    assert_eq!(refusal(&rig, &authority).await, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_policy_that_selects_the_waypoints_own_pod_closes_its_door() {
    let mut rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("", request))
        .await;
    let authority = format!("{VIP}:80");
    rig.connect(&authority).await.unwrap();
    let own = (*rig.snapshots.load().own).clone();
    rig.tell_mesh(vec![
        AuthorizationPolicy {
            key: "shop/none".parse().unwrap(),
            scope: PolicyScope::WorkloadSelector,
            action: Action::Allow,
            rules: Vec::new(),
            dry_run: false,
            faults: Vec::new(),
        }
        .into(),
        {
            let mut it = own;
            it.authorization_policies = vec!["shop/none".parse().unwrap()];
            it
        }
        .into(),
    ]);
    assert_eq!(refusal(&rig, &authority).await, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn nothing_new_is_taken_on_when_memory_is_used_up() {
    let mut rig = Rig::with(&[("LEYLINE_MEMORY_LIMIT", "1")]);
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("", request))
        .await;
    let status = refusal(&rig, &format!("{VIP}:80")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_revoked_client_is_refused_and_its_open_tunnel_cut() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("revoked.pem");
    let mut rig = Rig::with(&[("CRL_PATH", list.to_str().unwrap())]);
    rig.serve(&[(80, AppProtocol::Tcp)]);
    rig.hbone_endpoint("web-1", |request| echo("", request))
        .await;
    let authority = format!("{VIP}:80");
    let mut open = echoing(&rig, &authority).await;
    let client = rig.ca.identity("shop", "client");
    let revoked = rig.certificate(&client);
    let pem = BASE64_STANDARD.decode(&revoked.chain()[0].pem).unwrap();
    let leaf = CertificateDer::from_pem_slice(&pem).unwrap();
    std::fs::write(&list, rig.ca.revoke(&[&leaf])).unwrap();
    let cut = soon(open.read_u8()).await;
    assert!(cut.is_err(), "{cut:?}");
    let again = rig.connect(&authority).await;
    assert!(again.is_err(), "{again:?}");
    let other = rig.ca.identity("shop", "other");
    let other = rig.connect_as(&other, &authority, HeaderMap::new()).await;
    assert!(other.is_ok(), "{other:?}");
}

/// Nothing is allowed where an ALLOW policy has no rules.
fn deny_all() -> Resource {
    Resource::Policy(RequestPolicy {
        key: "shop/none".parse().unwrap(),
        targets: vec![Target::Waypoint],
        action: PolicyAction::Allow,
        dry_run: false,
        rules: Vec::new(),
        faults: Vec::new(),
    })
}
