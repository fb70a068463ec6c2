//! Ways to a destination that are not straight: another endpoint, a waypoint, another network's gateway.

use std::{net::SocketAddr, time::Duration};

use http::HeaderMap;
use mesh::{
    names::WorkloadUid,
    service::Service,
    view::Resource,
    workload::{GatewayAddress, TunnelProtocol, Workload},
};
use net::{
    copy::{self, Counters},
    hbone,
    socket::SourceAddress,
    tls,
};
use tokio::net::TcpListener;

use crate::{
    rig::{APP_PORT, Rig, VIP, connect, listen, outside_the_mesh, passes, soon},
    rig_or_skip,
};

fn service(yaml: serde_json::Value) -> Service {
    serde_json::from_value(yaml).expect("a service")
}

fn plain_workload(name: &str, services: &[(&Service, u16)]) -> Workload {
    let uid = WorkloadUid(format!("Kubernetes//Pod/ns/{name}").into());
    let mut workload = Workload::new(uid, name.into(), "ns".into());
    for (service, port) in services {
        workload
            .services
            .insert(service.key(), [(80, *port)].into_iter().collect());
    }
    workload
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_refuses_is_passed_over() {
    let rig = rig_or_skip!();
    let web = service(serde_json::json!({
        "name": "web", "namespace": "ns", "hostname": "web.ns.svc.cluster.local",
        "vips": ["/10.96.0.7"], "ports": {"80": APP_PORT},
    }));
    // In the service, outside the mesh, and nobody listens there.
    let mut dead = plain_workload("dead", &[(&web, APP_PORT)]);
    dead.addresses = vec!["127.0.0.77".parse().unwrap()].into();
    dead.tunnel_protocol = TunnelProtocol::None;
    rig.publish([Resource::Workload(dead)]);
    let listener = rig.listen();
    for _ in 0..20 {
        let (mut client, accepted) =
            soon(async { tokio::join!(connect(&rig.a, VIP.parse().unwrap()), listener.accept()) })
                .await;
        let (mut server, _) = accepted.unwrap();
        passes(&mut client, &mut server, b"found").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_with_a_waypoint_is_reached_through_it() {
    let rig = rig_or_skip!();
    let waypoint: GatewayAddress = serde_json::from_value(serde_json::json!({
        "destination": "/10.210.0.2", "hboneMtlsPort": 15008,
    }))
    .unwrap();
    let mut api = service(serde_json::json!({
        "name": "api", "namespace": "ns", "hostname": "api.ns.svc.cluster.local",
        "vips": ["/10.96.0.8"], "ports": {"8080": 1},
    }));
    api.waypoint = Some(waypoint);
    rig.publish([Resource::Service(api)]);
    // Pod b stands in for the waypoint: it takes the service's address for its own.
    let listener = rig.listen();
    let to: SocketAddr = "10.96.0.8:8080".parse().unwrap();
    let (mut client, accepted) =
        soon(async { tokio::join!(connect(&rig.a, to), listener.accept()) }).await;
    let (mut server, _) = accepted.unwrap();
    passes(&mut client, &mut server, b"through the waypoint").await;
    passes(&mut server, &mut client, b"and back").await;
}

/// A gateway in pod `a`'s namespace: ends the outer tunnel, and passes its bytes on to pod `b`'s HBONE port.
fn spawn_gateway(rig: &Rig, listener: TcpListener) {
    let certificate = rig.ca.certificate(&rig.ca.identity("ns", "sa-a"));
    let sockets = outside_the_mesh(&rig.a);
    let behind = SocketAddr::new(rig.b.v4, 15008);
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let deadline = Duration::from_secs(5);
        let accepted = tls::accept(tcp, certificate.server_config(), deadline).await;
        let (stream, peer) = accepted.unwrap();
        let handler = move |request: hbone::ConnectRequest| {
            let sockets = sockets.clone();
            async move {
                assert_eq!(
                    request.authority().to_string(),
                    "far.ns.svc.cluster.local:80"
                );
                let behind = sockets.connect(behind, SourceAddress::Own).await.unwrap();
                let stream = request.accept(HeaderMap::new()).unwrap();
                let never = std::future::pending();
                copy::bidirectional(stream, behind, &Counters::default(), never).await;
            }
        };
        let config = hbone::Config::default();
        let _ = hbone::serve(stream, peer, &config, std::future::pending(), handler).await;
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn another_network_is_reached_through_its_gateway_in_two_tunnels() {
    let rig = rig_or_skip!();
    let far = service(serde_json::json!({
        "name": "far", "namespace": "ns", "hostname": "far.ns.svc.cluster.local",
        "vips": ["/10.96.0.9"], "ports": {"80": APP_PORT},
        "subjectAltNames": ["spiffe://cluster.local/ns/ns/sa/sa-b"],
    }));
    let mut remote = plain_workload("remote", &[(&far, APP_PORT)]);
    remote.network = "far-away".into();
    remote.tunnel_protocol = TunnelProtocol::Hbone;
    remote.network_gateway = serde_json::from_value(serde_json::json!({
        "destination": "/10.210.0.1", "hboneMtlsPort": 15009,
    }))
    .unwrap();
    // Over there, pod b serves it.
    let mut served = rig.workload_b();
    served
        .services
        .insert(far.key(), [(80, APP_PORT)].into_iter().collect());
    let here = [Resource::Service(far.clone()), Resource::Workload(remote)];
    let there = [Resource::Service(far), Resource::Workload(served)];
    for (node, resources) in [(&rig.node_a, here), (&rig.node_b, there)] {
        node.state.publish(mesh::view::Update {
            upserts: resources.into(),
            removals: Vec::new(),
        });
    }
    spawn_gateway(&rig, listen(&rig.a, "10.210.0.1:15009".parse().unwrap()));
    let listener = rig.listen();
    let to: SocketAddr = "10.96.0.9:80".parse().unwrap();
    let (mut client, accepted) =
        soon(async { tokio::join!(connect(&rig.a, to), listener.accept()) }).await;
    let (mut server, _) = accepted.unwrap();
    passes(&mut client, &mut server, b"far away").await;
    passes(&mut server, &mut client, b"and back").await;
}
