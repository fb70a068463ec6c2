//! A service that another waypoint serves is reached through that one, which alone decides about it, and nothing goes
//! round.

use mesh::{l7::route::TcpRule, service::Service, workload::GatewayDestination};

use super::*;

const OTHER: &str = "10.9.0.2";

/// Another waypoint; it tells each of its CONNECTs and greets.
async fn other_waypoint(rig: &mut Rig, asked: &Asked) -> Workload {
    let asked = Arc::clone(asked);
    let mut waypoint = rig
        .hbone_endpoint("other-waypoint", move |request: ConnectRequest| {
            let asked = Arc::clone(&asked);
            async move {
                let header = |name: &str| request.headers().get(name).cloned();
                let (via, source) = (header("x-leyline-via"), header("x-istio-source"));
                let told = format!("{} {via:?} {source:?}", request.authority());
                asked.lock().push(told);
                let mut stream = request.accept(HeaderMap::new()).unwrap();
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

fn routed() -> Resource {
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
            source_namespace: None,
            backends: vec![(1, to("other"))],
        }]),
    })
}

#[tokio::test]
async fn a_service_of_another_waypoint_is_reached_through_it() {
    let mut rig = Rig::new();
    rig.serve(&[(90, AppProtocol::Tcp)]);
    let asked = Asked::default();
    let waypoint = other_waypoint(&mut rig, &asked).await;
    other_service(&rig, Some(&waypoint)).await;
    rig.tell(vec![routed()]);
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
    rig.tell(vec![routed()]);
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
