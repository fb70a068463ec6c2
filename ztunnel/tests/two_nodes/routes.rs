//! Ways to a destination that are not straight: another endpoint, a waypoint, another network's gateway.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
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
    testing::TestCa,
    tls::{self, Policy, WorkloadCertificate},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};

use crate::{
    rig::{
        APP_PORT, DEADLINE, Rig, VIP, connect, connect_is_reset, eventually, listen,
        outside_the_mesh, passes, rig_with, soon,
    },
    rig_or_skip,
    telemetry::metric,
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

/// A CONNECT that a peer of ours was sent.
type Asked = (String, HeaderMap);

/// Serves tunnels with this certificate: what is asked is told, then answered by `carry`.
fn spawn_peer<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    certificate: Arc<WorkloadCertificate>,
    carry: impl Fn(hbone::ConnectRequest) -> F + Send + Sync + 'static,
) -> mpsc::UnboundedReceiver<Asked> {
    let (tell, told) = mpsc::unbounded_channel();
    let handler = Arc::new(move |request: hbone::ConnectRequest| {
        let asked = (request.authority().to_string(), request.headers().clone());
        let _ = tell.send(asked);
        carry(request)
    });
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (tls, handler) = (certificate.server_config(), handler.clone());
            tokio::spawn(async move {
                let (stream, peer) = tls::accept(tcp, tls, DEADLINE).await.unwrap();
                let config = hbone::Config::default();
                let never = std::future::pending();
                let handler = move |request| handler(request);
                let _ = hbone::serve(stream, peer, &config, never, handler, |_| {}).await;
            });
        }
    });
    told
}

/// A gateway in pod `a`'s namespace: ends the outer tunnel, and passes its bytes on to pod `b`'s HBONE port.
fn spawn_gateway(rig: &Rig) -> mpsc::UnboundedReceiver<Asked> {
    let listener = listen(&rig.a, "10.210.0.1:15009".parse().unwrap());
    let certificate = rig.ca.certificate(&rig.ca.identity("ns", "sa-a"));
    let sockets = outside_the_mesh(&rig.a);
    let behind = SocketAddr::new(rig.b.v4, 15008);
    spawn_peer(listener, certificate, move |request| {
        let sockets = sockets.clone();
        async move {
            let behind = sockets.connect(behind, SourceAddress::Own).await.unwrap();
            let stream = request.accept(HeaderMap::new()).unwrap();
            let never = std::future::pending();
            copy::bidirectional(stream, behind, &Counters::default(), never).await;
        }
    })
}

/// What the pod behind [`spawn_echo`] tells of itself.
const TOLD: &str = "k8s.cluster.name=c-2,k8s.namespace.name=ns,k8s.deployment.name=far-web,\
    service.name=far-canonical,service.version=v9,cloud.region=r2,cloud.availability_zone=z2";

/// In place of node `b`'s tunnel, which is gone: answers, and sends back what it is sent.
async fn spawn_echo(rig: &mut Rig) -> mpsc::UnboundedReceiver<Asked> {
    let (listener, certificate) = rig.in_place_of_node_b().await;
    spawn_peer(listener, certificate, |request| async move {
        let baggage = [(
            HeaderName::from_static("baggage"),
            HeaderValue::from_static(TOLD),
        )];
        echo(request.accept(baggage.into_iter().collect()).unwrap()).await;
    })
}

/// A service at `10.96.0.11:80` with five endpoints, which are one pod, each with a port of its own, by which it is told apart.
fn publish_many(rig: &Rig) {
    let many = service(serde_json::json!({
        "name": "many", "namespace": "ns", "hostname": "many.ns.svc.cluster.local",
        "vips": ["/10.96.0.11"], "ports": {"80": APP_PORT},
    }));
    let endpoints = (1..=5).map(|n| {
        let mut endpoint = plain_workload(&format!("many-{n}"), &[(&many, 9000 + n)]);
        endpoint.addresses = vec![rig.b.v4].into();
        endpoint.tunnel_protocol = TunnelProtocol::Hbone;
        endpoint.service_account = "sa-b".into();
        Resource::Workload(endpoint)
    });
    rig.publish(endpoints.chain([Resource::Service(many.clone())]));
}

#[tokio::test(flavor = "multi_thread")]
async fn three_endpoints_are_tried_and_no_more() {
    let mut rig = rig_or_skip!();
    let (listener, certificate) = rig.in_place_of_node_b().await;
    let mut asked = spawn_peer(listener, certificate, |request| async move {
        request.refuse(StatusCode::SERVICE_UNAVAILABLE);
    });
    publish_many(&rig);
    connect_is_reset(&rig.a, "10.96.0.11:80".parse().unwrap()).await;
    let mut tried = BTreeSet::new();
    while let Ok((authority, _)) = asked.try_recv() {
        assert!(tried.insert(authority), "one of them twice");
    }
    assert_eq!(tried.len(), 3, "{tried:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_first_reaches_the_endpoint_that_takes_it_and_once() {
    let mut rig = rig_or_skip!();
    let (listener, certificate) = rig.in_place_of_node_b().await;
    let refusals = AtomicUsize::new(2);
    let mut asked = spawn_peer(listener, certificate, move |request| {
        let less = |left: usize| left.checked_sub(1);
        let refuse = refusals.fetch_update(Relaxed, Relaxed, less).is_ok();
        async move {
            match refuse {
                true => request.refuse(StatusCode::SERVICE_UNAVAILABLE),
                false => echo(request.accept(HeaderMap::new()).unwrap()).await,
            }
        }
    });
    publish_many(&rig);
    let mut client = connect(&rig.a, "10.96.0.11:80".parse().unwrap()).await;
    client.write_all(b"first").await.unwrap();
    client.shutdown().await.unwrap();
    let mut echoed = Vec::new();
    soon(client.read_to_end(&mut echoed)).await.unwrap();
    assert_eq!(echoed, b"first");
    for _ in 0..3 {
        assert!(asked.try_recv().is_ok(), "three were asked");
    }
}

async fn echo(stream: hbone::Stream) {
    let (mut send, mut recv) = stream.into_halves();
    let _ = tokio::io::copy(&mut recv, &mut send).await;
    let _ = send.shutdown().await;
}

/// The request's headers that are ours to set.
fn told(asked: &Asked) -> [Option<&str>; 3] {
    let text = |name: &str| asked.1.get(name).map(|it| it.to_str().unwrap());
    ["baggage", "forwarded", "x-forwarded-network"].map(text)
}

/// `00-`, 32 and 16 hexadecimal digits, `-00`.
fn is_traceparent(text: &str) -> bool {
    let digits: Vec<_> = text.split('-').collect();
    let hex = |text: &str| text.bytes().all(|it| b"0123456789abcdef".contains(&it));
    let lengths: Vec<_> = digits.iter().map(|it| it.len()).collect();
    lengths == [2, 32, 16, 2] && digits.iter().all(|it| hex(it)) && text.ends_with("-00")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_is_told_where_to_and_from_whom_and_for_which_service() {
    let mut rig = rig_or_skip!();
    let mut peer = spawn_echo(&mut rig).await;
    let mut traces = Vec::new();
    for (to, host) in [
        (rig.address(), ""),
        (VIP.parse().unwrap(), ";host=web.ns.svc.cluster.local"),
    ] {
        let client = connect(&rig.a, to).await;
        let asked = soon(peer.recv()).await.unwrap();
        assert_eq!(asked.0, "10.210.0.2:8080", "the pod, whatever was dialled");
        let [baggage, forwarded, network] = told(&asked);
        let expected = "k8s.cluster.name=Kubernetes,k8s.namespace.name=ns,\
            k8s.deployment.name=a,service.name=a";
        assert_eq!(baggage, Some(expected));
        let expected = format!("for=\"{}\"{host}", client.local_addr().unwrap());
        assert_eq!(forwarded, Some(&*expected));
        assert_eq!(network, None, "none but the inner of two tunnels tells it");
        let trace = asked.1["traceparent"].to_str().unwrap().to_owned();
        assert!(is_traceparent(&trace), "{trace}");
        traces.push(trace);
    }
    assert_ne!(traces[0], traces[1], "each connection has its own");
}

/// Service `far` at `10.96.0.9`, which pod `b` serves behind the gateway. Node `a` is in `network`.
fn publish_far(rig: &Rig, network: &str) {
    let far = |vip: &str| {
        service(serde_json::json!({
            "name": "far", "namespace": "ns", "hostname": "far.ns.svc.cluster.local",
            "vips": [vip], "ports": {"80": APP_PORT},
            "subjectAltNames": ["spiffe://cluster.local/ns/ns/sa/sa-b"],
        }))
    };
    let near = far(&format!("{network}/10.96.0.9"));
    let mut client = rig.workload_a();
    client.network = network.into();
    let mut remote = plain_workload("remote", &[(&near, APP_PORT)]);
    remote.network = "far-away".into();
    remote.tunnel_protocol = TunnelProtocol::Hbone;
    remote.network_gateway = serde_json::from_value(serde_json::json!({
        "destination": format!("{network}/10.210.0.1"), "hboneMtlsPort": 15009,
    }))
    .unwrap();
    // Over there, pod b serves it.
    let there = far("/10.96.0.9");
    let mut served = rig.workload_b();
    let ports = [(80, APP_PORT)].into_iter().collect();
    served.services.insert(there.key(), ports);
    let here = vec![near.into(), client.into(), remote.into()];
    let there = vec![there.into(), served.into()];
    for (node, upserts) in [(&rig.node_a, here), (&rig.node_b, there)] {
        node.state.publish(mesh::view::Update {
            upserts,
            removals: Vec::new(),
        });
    }
}

const FAR: &str = "10.96.0.9:80";

#[tokio::test(flavor = "multi_thread")]
async fn another_network_is_reached_through_its_gateway_in_two_tunnels() {
    let rig = rig_or_skip!();
    publish_far(&rig, "");
    let mut gateway = spawn_gateway(&rig);
    let listener = rig.listen();
    let to: SocketAddr = FAR.parse().unwrap();
    let (mut client, accepted) =
        soon(async { tokio::join!(connect(&rig.a, to), listener.accept()) }).await;
    let (mut server, _) = accepted.unwrap();
    passes(&mut client, &mut server, b"far away").await;
    passes(&mut server, &mut client, b"and back").await;
    let (authority, _) = soon(gateway.recv()).await.unwrap();
    assert_eq!(authority, "far.ns.svc.cluster.local:80");
}

#[tokio::test(flavor = "multi_thread")]
async fn both_tunnels_ask_for_the_service_and_the_inner_one_tells_the_network() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let Some(mut rig) = rig_with(ca, &[("NETWORK", "here")]).await else {
        return;
    };
    publish_far(&rig, "here");
    let (mut outer, mut inner) = (spawn_gateway(&rig), spawn_echo(&mut rig).await);
    let client = connect(&rig.a, FAR.parse().unwrap()).await;
    let (outer, inner) = (
        soon(outer.recv()).await.unwrap(),
        soon(inner.recv()).await.unwrap(),
    );
    assert_eq!(outer.0, "far.ns.svc.cluster.local:80");
    assert_eq!(inner.0, outer.0);
    let forwarded = format!(
        "for=\"{}\";host=far.ns.svc.cluster.local",
        client.local_addr().unwrap()
    );
    for (asked, expected) in [(&outer, None), (&inner, Some("here"))] {
        let [baggage, by, network] = told(asked);
        assert!(baggage.is_some_and(|it| it.contains("service.name=a")));
        assert_eq!((by, network), (Some(&*forwarded), expected));
    }
    assert_eq!(outer.1["traceparent"], inner.1["traceparent"]);
    // Who is behind a gateway is known by what it proves and tells, for want of a record.
    let labels = [
        "destination_workload=\"far-web\"",
        "destination_canonical_service=\"far-canonical\"",
        "destination_canonical_revision=\"v9\"",
        "destination_app=\"far-web\"",
        "destination_cluster=\"c-2\"",
        "destination_principal=\"spiffe://cluster.local/ns/ns/sa/sa-b\"",
        "destination_service_name=\"far\"",
        "destination_region=\"r2\"",
        "destination_zone=\"z2\"",
    ];
    let opened = "istio_tcp_connections_opened_total";
    eventually("it is counted", async || {
        metric(rig.node_a.stats, opened, &labels).await == 1
    })
    .await;
}
