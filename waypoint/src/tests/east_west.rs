//! A gateway between networks: outer tunnels end at it, inner ones at the pods behind it. Real TLS on loopback.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, StatusCode};
use mesh::{headers, identity::Identity, l7::served::AppProtocol, workload::Workload};
use net::{
    hbone::{self, ConnectHead, ConnectRequest, Tunnel},
    tls,
};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::task::AbortOnDropHandle;

use super::refusal;
use crate::testing::{DEADLINE, Rig, VIP, soon};

const AUTHORITY: &str = "web.shop.svc.cluster.local:80";

fn gateway() -> Rig {
    Rig::with(&[("LEYLINE_ROLE", "east-west")])
}

/// Who asked for what, at the end of the inner tunnel.
type Seen = Arc<Mutex<Vec<(String, Identity)>>>;

/// Says its name, then what it hears.
async fn answer(name: &'static str, seen: Seen, request: ConnectRequest) {
    let peer = request.peer().identity.clone();
    seen.lock().push((request.authority().to_string(), peer));
    let Ok(mut stream) = request.accept(HeaderMap::new()) else {
        return;
    };
    let _ = stream.write_all(name.as_bytes()).await;
    let (mut send, mut recv) = stream.into_halves();
    let _ = tokio::io::copy(&mut recv, &mut send).await;
    let _ = send.shutdown().await;
}

async fn endpoint(rig: &mut Rig, name: &'static str, seen: &Seen) -> Workload {
    let seen = seen.clone();
    rig.hbone_endpoint(name, move |request| answer(name, seen.clone(), request))
        .await
}

/// The inner tunnel, within the outer one.
struct Inner {
    tunnel: Tunnel,
    _driver: AbortOnDropHandle<()>,
}

async fn inner(rig: &Rig, outer: Tunnel, client: &Identity, server: &Identity) -> Inner {
    let expected = Arc::from([server.clone()]);
    let config = rig.certificate(client).client_config(&expected);
    let (io, peer) = soon(tls::connect(outer.stream, config, DEADLINE))
        .await
        .expect("TLS with the pod");
    let (client, driver) = soon(hbone::Client::handshake(
        io,
        peer,
        &hbone::Config::default(),
    ))
    .await
    .expect("HTTP/2 with the pod");
    let driver = AbortOnDropHandle::new(tokio::spawn(driver));
    let head = ConnectHead {
        authority: AUTHORITY.parse().expect("an authority"),
        headers: HeaderMap::new(),
    };
    Inner {
        tunnel: soon(client.connect(head, DEADLINE))
            .await
            .expect("the inner tunnel"),
        _driver: driver,
    }
}

#[tokio::test]
async fn the_inner_tunnel_reaches_the_pod_with_its_clients_identity() {
    let mut rig = gateway();
    rig.serve(&[(80, AppProtocol::Http)]);
    let seen = Seen::default();
    endpoint(&mut rig, "web-1", &seen).await;
    let (client, server) = (
        rig.ca.identity("far", "buyer"),
        rig.ca.identity("shop", "web"),
    );
    let outer = rig
        .connect_as(&client, AUTHORITY, HeaderMap::new())
        .await
        .expect("the outer tunnel");
    assert_eq!(outer.peer.identity, rig.identity());
    let inner = inner(&rig, outer, &client, &server).await;
    assert_eq!(inner.tunnel.peer.identity, server);
    let mut stream = inner.tunnel.stream;
    stream.write_all(b":hello").await.unwrap();
    // Half of it closed, the other half still tells.
    stream.shutdown().await.unwrap();
    let mut told = String::new();
    soon(stream.read_to_string(&mut told)).await.unwrap();
    assert_eq!(told, "web-1:hello");
    assert_eq!(*seen.lock(), [(AUTHORITY.to_owned(), client)]);
}

#[tokio::test]
async fn what_is_no_name_of_a_global_service_is_refused() {
    let mut rig = gateway();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let seen = Seen::default();
    let pod = endpoint(&mut rig, "web-1", &seen).await;
    let own = rig.address.to_string();
    let of_pod = format!("{}:80", pod.addresses[0]);
    for (authority, status) in [
        ("web.shop.svc.cluster.local:81", StatusCode::NOT_FOUND),
        ("other.shop.svc.cluster.local:80", StatusCode::NOT_FOUND),
        (&format!("{VIP}:80"), StatusCode::NOT_FOUND),
        (&of_pod, StatusCode::NOT_FOUND),
        (&own, StatusCode::NOT_FOUND),
        ("127.0.0.1:15000", StatusCode::NOT_FOUND),
    ] {
        assert_eq!(refusal(&rig, authority).await, status, "{authority}");
    }
    assert!(seen.lock().is_empty());
}

#[tokio::test]
async fn endpoints_of_other_networks_are_never_dialled() {
    let mut rig = gateway();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let seen = Seen::default();
    let pod = endpoint(&mut rig, "web-1", &seen).await;
    let mut elsewhere = pod;
    elsewhere.network = "elsewhere".into();
    rig.tell_mesh(vec![elsewhere.into()]);
    let status = refusal(&rig, AUTHORITY).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(seen.lock().is_empty());
}

#[tokio::test]
async fn an_endpoint_that_is_gone_is_not_the_last_word() {
    let mut rig = gateway();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let seen = Seen::default();
    let (nobody, listener) = crate::testing::loopback(mesh::outbound::HBONE_PORT).await;
    drop(listener);
    let mut gone = rig.plain_endpoint("web-0", nobody);
    gone.tunnel_protocol = mesh::workload::TunnelProtocol::Hbone;
    rig.tell_mesh(vec![gone.into()]);
    endpoint(&mut rig, "web-1", &seen).await;
    let client = rig.ca.identity("far", "buyer");
    for _ in 0..8 {
        let outer = rig.connect_as(&client, AUTHORITY, HeaderMap::new()).await;
        let server = rig.ca.identity("shop", "web");
        let mut inner = inner(&rig, outer.expect("an endpoint"), &client, &server).await;
        let mut name = [0; 5];
        soon(inner.tunnel.stream.read_exact(&mut name))
            .await
            .unwrap();
        assert_eq!(&name, b"web-1");
    }
}

#[tokio::test]
async fn a_service_that_is_global_no_more_loses_its_connections() {
    let mut rig = gateway();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let seen = Seen::default();
    endpoint(&mut rig, "web-1", &seen).await;
    let (client, server) = (
        rig.ca.identity("far", "buyer"),
        rig.ca.identity("shop", "web"),
    );
    let outer = rig.connect_as(&client, AUTHORITY, HeaderMap::new()).await;
    let mut inner = inner(&rig, outer.expect("the outer tunnel"), &client, &server).await;
    let mut name = [0; 5];
    soon(inner.tunnel.stream.read_exact(&mut name))
        .await
        .unwrap();
    rig.snapshots.apply(mesh::l7::view::Update {
        upserts: Vec::new(),
        removals: rig
            .snapshots
            .load()
            .l7
            .services()
            .map(|served| {
                mesh::l7::view::Resource::Service((**served).clone())
                    .name()
                    .into()
            })
            .collect(),
    });
    let mut rest = Vec::new();
    let end = soon(inner.tunnel.stream.read_to_end(&mut rest)).await;
    assert!(end.is_err() || rest.is_empty());
    assert_eq!(refusal(&rig, AUTHORITY).await, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_tunnel_of_a_waypoint_goes_to_the_pods_and_others_to_the_services_waypoint() {
    let mut rig = gateway();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let seen = Seen::default();
    endpoint(&mut rig, "web-1", &seen).await;
    let snapshot = rig.snapshots.load();
    let web = snapshot.mesh.services().next().expect("one service");
    let mut web = (**web).clone();
    let gateway = "shop/wp.shop.svc.cluster.local".parse();
    web.waypoint = Some(mesh::workload::GatewayAddress {
        destination: gateway.expect("a destination"),
        hbone_mtls_port: mesh::outbound::HBONE_PORT,
    });
    rig.tell_mesh(vec![web.into()]);
    // Its waypoint is not there: closed.
    let status = refusal(&rig, AUTHORITY).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    let mut passed = HeaderMap::new();
    passed.insert(headers::ISTIO_SOURCE, HeaderValue::from_static("waypoint"));
    let (client, server) = (rig.ca.identity("far", "wp"), rig.ca.identity("shop", "web"));
    let outer = rig.connect_as(&client, AUTHORITY, passed).await;
    let inner = inner(&rig, outer.expect("the outer tunnel"), &client, &server).await;
    assert_eq!(inner.tunnel.peer.identity, server);
}
