//! The same over TLS, HTTP/2 and gRPC, with tonic's client.

use proto::{
    ADDRESS_TYPE_URL as ADDRESS, AUTHORIZATION_TYPE_URL as POLICY, xds::DeltaDiscoveryRequest,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tonic::Code;

use tokio::time::Instant;

use super::{POD_1, POD_2};
use crate::{
    serve::subscriber::ACK_PATIENCE,
    testing::{Plane, Subscriber, bearer, csr, names, node, pod, policy, service},
};

#[tokio::test]
async fn a_node_tunnel_gets_the_world_then_changes_in_order() {
    let plane = Plane::start().await;
    plane.apply(
        &[
            policy("old", 0),
            pod(1, "node-1", &[], "x"),
            service("web", 1),
        ],
        &[],
    );
    let mut proxy = plane.subscriber().await;
    proxy.subscribe_all();
    let (policies, addresses) = (proxy.acked().await, proxy.acked().await);
    assert_eq!(
        (&*policies.type_url, names(&policies)),
        (POLICY, vec!["shop/old"])
    );
    assert_eq!(
        names(&addresses),
        [POD_1, "shop/web.shop.svc.cluster.local"]
    );
    let sent = &addresses.resources[0];
    let any = sent.resource.as_ref().unwrap();
    assert_eq!(any.type_url, ADDRESS);
    let hash = twox_hash::XxHash64::oneshot(0, &any.value);
    assert_eq!(sent.version, format!("{hash:x}"));
    assert!(sent.aliases.is_empty(), "only readers on demand need them");

    plane.apply(
        &[policy("new", 0), pod(2, "node-1", &[], "x")],
        &[&policy("old", 0)],
    );
    let told = [
        proxy.acked().await,
        proxy.acked().await,
        proxy.acked().await,
    ];
    assert_eq!(names(&told[0]), ["shop/new"]);
    assert_eq!(names(&told[1]), [POD_2]);
    assert_eq!(told[2].removed_resources, ["shop/old"]);
    let nonces: std::collections::HashSet<_> = told.iter().map(|it| &it.nonce).collect();
    assert_eq!(nonces.len(), 3);
}

#[tokio::test]
async fn a_large_world_arrives_whole() {
    let plane = Plane::start().await;
    let long = "x".repeat(50_000);
    let world: Vec<_> = (0..250)
        .map(|n| pod(n, "node-1", &[], &format!("{long}{n}")))
        .collect();
    plane.apply(&world, &[]);
    let mut proxy = plane.subscriber().await;
    proxy.subscribe(ADDRESS, &[], &[]);
    let told = proxy.acked().await;
    assert_eq!(told.resources.len(), 250);
    let known = |name: &str| world.iter().find(|it| &*it.name == name).unwrap();
    let same = |got: &proto::xds::Resource| {
        *got.resource.as_ref().unwrap().value == *known(&got.name).body
    };
    assert!(told.resources.iter().all(same));
}

#[tokio::test]
async fn a_request_with_the_versions_of_a_large_world_is_read() {
    let plane = Plane::start().await;
    let one = pod(1, "node-1", &[], "x");
    plane.apply(std::slice::from_ref(&one), &[]);
    let mut proxy = plane.subscriber().await;
    let name = |n: usize| format!("Kubernetes//Pod/{}/pod-{n}", "n".repeat(40));
    let gone = (0..100_000).map(|n| (name(n), "0123456789abcdef".to_owned()));
    let versions = gone.chain([(POD_1.to_owned(), one.version.to_string())]);
    proxy.send(
        ADDRESS,
        DeltaDiscoveryRequest {
            initial_resource_versions: versions.collect(),
            ..Default::default()
        },
    );
    let told = proxy.acked().await;
    assert_eq!(told.removed_resources.len(), 100_000);
    assert!(told.resources.is_empty());
}

#[tokio::test]
async fn on_demand_answers_are_always_given_and_carry_aliases() {
    let plane = Plane::start().await;
    plane.apply(&[pod(1, "elsewhere", &[], "x")], &[]);
    let mut proxy = plane.subscriber().await;
    proxy.subscribe(ADDRESS, &["*"], &["*"]);
    let nothing = proxy.acked().await;
    assert!(nothing.resources.is_empty() && nothing.removed_resources.is_empty());
    proxy.subscribe(ADDRESS, &["/10.1.0.1", "/10.1.0.77"], &[]);
    let told = proxy.acked().await;
    assert_eq!(names(&told), [POD_1]);
    assert_eq!(told.resources[0].aliases, ["/10.1.0.1"]);
    assert_eq!(told.removed_resources, ["/10.1.0.77"]);
}

#[tokio::test]
async fn refused_resources_are_seen_in_the_registry() {
    let plane = Plane::start().await;
    plane.apply(&[policy("bad", 0)], &[]);
    let mut proxy = plane.subscriber().await;
    proxy.subscribe(POLICY, &[], &[]);
    let told = proxy.next().await;
    proxy.nack(&told, "shop/bad: unknown action");
    // An answer to a later request proves that the refusal was taken in.
    proxy.subscribe(POLICY, &["shop/none"], &[]);
    proxy.next().await;
    let rejections = plane.registry.rejections();
    let refused = &rejections[&(POLICY.into(), "shop/bad".into())];
    assert_eq!(refused[0].proxy, "ztunnel-1.istio-system");
    assert_eq!(refused[0].reason, "unknown action");
    let text = plane.metrics.text();
    assert!(text.contains("pilot_total_xds_rejects{type=\"wads\"} 1"));
}

#[tokio::test]
async fn only_node_tunnels_and_waypoints_may_read_the_mesh() {
    let plane = Plane::start().await;
    let token = |namespace, account| plane.issuer.token(namespace, account, "pod");
    for (what, token, code) in [
        ("nobody", String::new(), Code::Unauthenticated),
        ("a forged token", "a.b.c".to_owned(), Code::Unauthenticated),
        (
            "an ordinary pod",
            token("shop", "web"),
            Code::PermissionDenied,
        ),
        (
            "the same name elsewhere",
            token("shop", "ztunnel"),
            Code::PermissionDenied,
        ),
    ] {
        let refused = plane.subscriber_as(&token).await.err().expect(what);
        assert_eq!(refused.code(), code, "{what}");
    }
    let mut waypoint = plane
        .subscriber_as(&token("shop", "waypoint"))
        .await
        .unwrap();
    let id = "waypoint~10.1.0.2~waypoint-1.shop~shop.svc.cluster.local".to_owned();
    waypoint.node = Some(proto::xds_core::Node {
        id,
        ..Default::default()
    });
    waypoint.subscribe(ADDRESS, &[], &[]);
    waypoint.acked().await;

    // A waypoint's account makes nobody a node tunnel.
    let mut posing = plane
        .subscriber_as(&token("shop", "waypoint"))
        .await
        .unwrap();
    let id = "ztunnel~10.1.0.2~waypoint-1.shop~shop.svc.cluster.local".to_owned();
    posing.node = Some(proto::xds_core::Node {
        id,
        ..Default::default()
    });
    posing.subscribe(ADDRESS, &[], &[]);
    let refused = posing.message().await.expect_err("posing as a node tunnel");
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn the_first_request_must_say_who_it_is_and_not_lie() {
    let plane = Plane::start().await;
    let id = |id: &str| proto::xds_core::Node {
        id: id.to_owned(),
        ..Default::default()
    };
    let another_account = proto::xds_core::Node {
        metadata: Some(crate::testing::texts(&[("SERVICE_ACCOUNT", "other")])),
        ..node()
    };
    for (what, node, code) in [
        ("no node", None, Code::InvalidArgument),
        ("no id", Some(id("")), Code::InvalidArgument),
        ("another form", Some(id("ztunnel-1")), Code::InvalidArgument),
        (
            "another namespace",
            Some(id("ztunnel~1.2.3.4~z.shop~x")),
            Code::PermissionDenied,
        ),
        (
            "another account",
            Some(another_account),
            Code::PermissionDenied,
        ),
    ] {
        let mut proxy = plane.subscriber().await;
        proxy.node = node;
        proxy.subscribe(ADDRESS, &[], &[]);
        let refused = proxy.message().await.expect_err(what);
        assert_eq!(refused.code(), code, "{what}: {refused}");
    }
}

#[tokio::test]
async fn a_client_certificate_of_the_mesh_is_a_proof_too() {
    let plane = Plane::start().await;
    plane
        .pods
        .put("istio-system", "ztunnel-1", "ztunnel", "node-1");
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let mut ask = csr(None);
    ask.csr = request.pem().unwrap();
    let chain = plane.certificate(&plane.node_token(), ask).await.unwrap();
    let certificate = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    let key = || PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let channel = plane
        .channel(Some((vec![certificate.clone()], key())))
        .await;
    let mut proxy = Subscriber::open(channel.clone(), "").await.unwrap();
    proxy.subscribe(ADDRESS, &[], &[]);
    proxy.acked().await;

    // But it is bound to no pod, so it gets nobody else's certificate.
    let web = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";
    let mut client =
        proto::ca::istio_certificate_service_client::IstioCertificateServiceClient::new(channel);
    let refused = client.create_certificate(bearer(csr(Some(web)), "")).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_client_certificate_of_others_is_refused() {
    let (plane, others) = (Plane::start().await, Plane::start().await);
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let mut ask = csr(None);
    ask.csr = request.pem().unwrap();
    let chain = others.certificate(&others.node_token(), ask).await.unwrap();
    let certificate = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let roots = plane.authority.load().root_store().unwrap();
    let channel =
        crate::testing::channel(plane.address, roots, Some((vec![certificate], key))).await;
    let opened = match channel {
        Ok(channel) => Subscriber::open(channel, "").await.map(drop),
        Err(_) => Err(tonic::Status::unavailable("no connection")),
    };
    assert!(opened.is_err());
}

#[tokio::test]
async fn a_drain_tells_proxies_to_come_back_elsewhere() {
    let plane = Plane::start().await;
    let mut proxy = plane.subscriber().await;
    proxy.subscribe(ADDRESS, &[], &[]);
    proxy.acked().await;
    let grace = net::drain::Mode::graceful(crate::testing::DEADLINE);
    let drained = tokio::spawn(async move { plane.drain.drain(grace).await });
    assert_eq!(proxy.message().await.unwrap_err().code(), Code::Unavailable);
    drop(proxy);
    assert_eq!(drained.await.unwrap(), net::drain::Completion::Finished);
}

#[tokio::test]
async fn a_proxy_that_ends_its_half_ends_the_stream() {
    let plane = Plane::start().await;
    let mut proxy = plane.subscriber().await;
    proxy.subscribe(ADDRESS, &[], &[]);
    proxy.acked().await;
    proxy.close();
    assert!(proxy.message().await.unwrap().is_none());
}

#[tokio::test]
async fn a_reader_that_does_not_acknowledge_gets_one_merged_response() {
    let plane = Plane::start().await;
    let long = "x".repeat(100_000);
    let variant = |n: usize| pod(1, "node-1", &[], &format!("{long}{n}"));
    plane.apply(&[variant(0)], &[]);
    let mut proxy = plane.subscriber().await;
    // Before anything is sent: the patience with silence begins at that.
    let silent = Instant::now();
    proxy.subscribe(ADDRESS, &[], &[]);
    let unacked = proxy.next().await;
    let mut other = plane.subscriber().await;
    other.subscribe(ADDRESS, &[], &[]);
    other.acked().await;
    for n in 1..50 {
        plane.apply(&[variant(n)], &[]);
        // Another reader has had it, so this one could have.
        while *other.acked().await.resources[0].version != *variant(n).version {}
    }
    proxy.ack(&unacked);
    // One response, and on a slow machine one more for each time that the patience with its silence was at its end.
    for responses in 0.. {
        let merged = proxy.acked().await;
        let patience = silent.elapsed().as_secs() / ACK_PATIENCE.as_secs();
        assert!(responses <= patience, "more than one response at a time");
        assert_eq!(merged.resources.len(), 1);
        if *merged.resources[0].version == *variant(49).version {
            break;
        }
    }
    proxy.subscribe(ADDRESS, &["none"], &[]);
    assert_eq!(
        proxy.acked().await.removed_resources,
        ["none"],
        "nothing was queued"
    );
}
