//! A service that another waypoint serves is reached through that one, which alone decides about it, and nothing goes
//! round.

use std::collections::BTreeMap;

use http::HeaderName;
use mesh::{
    l7::{backend::Subset, route::TcpRule, served::WorkloadLabels},
    names::Str,
    service::Service,
    workload::GatewayDestination,
};

use super::*;

const OTHER: &str = "10.9.0.2";

/// Another waypoint; it tells each of its CONNECTs and greets. It keeps to the subset `kept`, whatever it is asked for.
async fn other_waypoint(rig: &mut Rig, asked: &Asked, kept: Option<&'static str>) -> Workload {
    let asked = Arc::clone(asked);
    let mut waypoint = rig
        .hbone_endpoint("other-waypoint", move |request: ConnectRequest| {
            let asked = Arc::clone(&asked);
            async move {
                let header = |name: &str| request.headers().get(name).cloned();
                let (via, source) = (header("x-leyline-via"), header("x-istio-source"));
                let told = format!("{} {via:?} {source:?}", request.authority());
                asked.lock().push(told);
                let kept = kept.map(|it| (SUBSET, it.parse().unwrap()));
                let mut stream = request.accept(kept.into_iter().collect()).unwrap();
                stream.write_all(b"from the other").await.unwrap();
                stream.shutdown().await.unwrap();
                let _ = stream.read(&mut [0]).await;
            }
        })
        .await;
    waypoint.services.clear();
    rig.tell_mesh(vec![waypoint.clone().into()]);
    waypoint
}

/// A service that `waypoint` serves, and an endpoint that answers whoever goes around it.
async fn other_service(rig: &Rig, waypoint: Option<&Workload>) {
    let address = tls_server(rig, "other", 8444, "gone around").await;
    behind(rig, "other", address);
    let host = "other.shop.svc.cluster.local";
    let mut service = Service::new("other".into(), "shop".into(), host.into());
    service.ports = [(443, 8444)].into_iter().collect();
    service.vips = vec![format!("/{OTHER}").parse().unwrap()];
    let address = waypoint.map_or("127.0.0.254".parse().unwrap(), |it| it.addresses[0]);
    service.waypoint = Some(GatewayAddress {
        destination: GatewayDestination::Address(format!("/{address}").parse().unwrap()),
        hbone_mtls_port: HBONE_PORT,
    });
    rig.tell_mesh(vec![service.into()]);
}

const SUBSET: HeaderName = HeaderName::from_static("x-leyline-subset");

fn routed(backend: route::Backend) -> Resource {
    Resource::Route(Route {
        key: ObjectRef {
            kind: "TCPRoute".into(),
            namespace: "shop".into(),
            name: "to-other".into(),
        },
        created: 0,
        attachments: vec![Attachment {
            service: key(),
            port: None,
            callers: Callers::All,
        }],
        rules: Rules::Tcp(vec![TcpRule {
            name: None,
            port: None,
            destinations: Vec::new(),
            source: None,
            backends: vec![(1, backend)],
        }]),
    })
}

#[tokio::test]
async fn a_service_of_another_waypoint_is_reached_through_it() {
    let mut rig = Rig::new();
    rig.serve(&[(90, AppProtocol::Tcp)]);
    let asked = Asked::default();
    let waypoint = other_waypoint(&mut rig, &asked, None).await;
    other_service(&rig, Some(&waypoint)).await;
    rig.tell(vec![routed(to("other"))]);
    let (client, address) = (rig.ca.identity("shop", "client"), format!("{VIP}:90"));
    let mut headers = HeaderMap::new();
    for (came, expected) in [
        ("", "shop/web.shop.svc.cluster.local"),
        ("a/b.svc", "a/b.svc, shop/web.shop.svc.cluster.local"),
    ] {
        headers.insert("x-leyline-via", came.parse().unwrap());
        let tunnel = rig.connect_as(&client, &address, headers.clone());
        let stream = tunnel.await.unwrap().stream;
        assert_eq!(all(stream).await.unwrap(), "from the other");
        let told = asked.lock().pop().unwrap();
        assert_eq!(told, format!("{OTHER}:443 Some({expected:?}) None"));
    }
}

#[tokio::test]
async fn a_service_whose_waypoint_is_not_there_is_not_reached_around_it() {
    let rig = Rig::new();
    rig.serve(&[(90, AppProtocol::Tcp)]);
    other_service(&rig, None).await;
    rig.tell(vec![routed(to("other"))]);
    let refused = rig.connect(&format!("{VIP}:90")).await;
    let refused = format!("{:?}", refused.err().unwrap());
    assert!(refused.contains("503"), "{refused}");
}

#[tokio::test]
async fn what_two_waypoints_pass_to_each_other_ends() {
    let rig = Rig::new();
    rig.serve(&[(90, AppProtocol::Tcp)]);
    let (client, address) = (rig.ca.identity("shop", "client"), format!("{VIP}:90"));
    let long = (0..9).map(|at| format!("a/{at}")).collect::<Vec<_>>();
    for came in ["a/b, shop/web.shop.svc.cluster.local", &long.join(",")] {
        let headers = [("x-leyline-via", came)];
        let headers = headers.map(|(name, it)| (name.parse().unwrap(), it.parse().unwrap()));
        let tunnel = rig.connect_as(&client, &address, headers.into_iter().collect());
        let refused = format!("{:?}", tunnel.await.err().unwrap());
        assert!(refused.contains("403"), "{refused}");
    }
}

fn subset(backend: route::Backend, name: &str) -> route::Backend {
    match backend {
        route::Backend::Service { service, port, .. } => route::Backend::Service {
            service,
            port,
            subset: Some(name.into()),
        },
        invalid @ route::Backend::Invalid(_) => invalid,
    }
}

#[tokio::test]
async fn a_subset_is_left_to_the_services_waypoint_and_only_to_one_that_keeps_to_it() {
    for (kept, reached) in [(Some("v1"), true), (Some("v2"), false), (None, false)] {
        let mut rig = Rig::new();
        rig.serve(&[(90, AppProtocol::Tcp)]);
        let waypoint = other_waypoint(&mut rig, &Asked::default(), kept).await;
        other_service(&rig, Some(&waypoint)).await;
        rig.tell(vec![routed(subset(to("other"), "v1"))]);
        let tunnel = rig.connect(&format!("{VIP}:90")).await;
        match (tunnel, reached) {
            (Ok(tunnel), true) => assert_eq!(all(tunnel.stream).await.unwrap(), "from the other"),
            (Err(error), false) => assert!(format!("{error:?}").contains("503"), "{error:?}"),
            (other, _) => panic!("{kept:?}: {other:?}"),
        }
    }
}

fn labels(version: &str) -> BTreeMap<Str, Str> {
    BTreeMap::from([("version".into(), version.into())])
}

/// An endpoint's labels.
fn labelled(name: &str, version: &str) -> Resource {
    Resource::Labels(WorkloadLabels {
        uid: WorkloadUid(format!("Kubernetes//Pod/shop/{name}").into()),
        labels: labels(version),
    })
}

/// The service's endpoints: one of `v1`, one of `v2`, and how each tells itself.
async fn versions(rig: &Rig) {
    let mut subsets = BTreeMap::new();
    for name in ["v1", "v2"] {
        let (address, listener) = loopback(90).await;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(name.as_bytes()).await;
            }
        });
        rig.plain_endpoint(name, address);
        rig.tell(vec![labelled(name, name)]);
        let subset = Subset {
            labels: labels(name),
            policy: None,
            ports: BTreeMap::new(),
        };
        subsets.insert(name.into(), subset);
    }
    rig.tell(vec![Resource::Backend(Box::new(BackendPolicy {
        service: key(),
        sources: Vec::new(),
        policy: TrafficPolicy::default(),
        ports: BTreeMap::new(),
        subsets,
    }))]);
}

/// Who answers another waypoint that asks for `subset`, and what it is told that we keep to.
async fn answer(rig: &Rig, subset: &str) -> Result<(String, String), String> {
    let headers = [(SUBSET, subset.parse().unwrap())].into_iter().collect();
    let (client, address) = (
        rig.ca.identity("shop", "other-waypoint"),
        format!("{VIP}:90"),
    );
    let tunnel = rig.connect_as(&client, &address, headers);
    let tunnel = tunnel.await.map_err(|error| format!("{error:?}"))?;
    let kept = tunnel.headers[SUBSET].to_str().unwrap().to_owned();
    Ok((all(tunnel.stream).await.unwrap(), kept))
}

#[tokio::test]
async fn another_waypoint_that_asks_for_a_subset_gets_its_endpoints_and_nobody_a_made_up_one() {
    let rig = Rig::new();
    rig.serve(&[(90, AppProtocol::Tcp)]);
    versions(&rig).await;
    for name in ["v1", "v2", "v1", "v1", "v2", "v2"] {
        let answered = answer(&rig, name).await.unwrap();
        assert_eq!(answered, (name.to_owned(), name.to_owned()));
    }
    let refused = answer(&rig, "v3").await.unwrap_err();
    assert!(refused.contains("503"), "{refused}");
    // Endpoints are in a subset by the labels that they have now.
    rig.tell(vec![labelled("v2", "v1"), labelled("v1", "v2")]);
    assert_eq!(answer(&rig, "v1").await.unwrap().0, "v2");
    rig.tell(vec![labelled("v2", "v2"), labelled("v1", "v1")]);
    // Where the service's own routes choose, they do.
    let web = route::Backend::Service {
        service: key(),
        port: 90,
        subset: None,
    };
    rig.tell(vec![routed(subset(web.clone(), "v2"))]);
    assert_eq!(answer(&rig, "v1").await.unwrap().0, "v2");
    rig.tell(vec![routed(web)]);
    assert_eq!(answer(&rig, "v1").await.unwrap().0, "v1");
}
