use mesh::explain::Verdict;
use serde_json::json;

use super::*;

/// Two pods and a service, as a tunnel dumps them, upstream's or ours.
fn tunnel(policies: Value) -> Tunnel {
    Tunnel::read(&Dump::new(dumped(policies)).unwrap()).unwrap()
}

/// The same, where the service has a waypoint.
fn tunnel_with_waypoint() -> Tunnel {
    let mut value = dumped(json!([]));
    let mut waypoint = value["workloads"][1].clone();
    for (field, text) in [
        ("uid", "Kubernetes//Pod/shop/waypoint-1"),
        ("name", "waypoint-1"),
        ("workloadName", "waypoint"),
        ("serviceAccount", "waypoint"),
    ] {
        waypoint[field] = text.into();
    }
    waypoint["workloadIps"] = json!(["10.244.1.9"]);
    waypoint["services"] = json!([]);
    value["workloads"].as_array_mut().unwrap().push(waypoint);
    value["services"][0]["waypoint"] =
        json!({"destination": "/10.244.1.9", "hboneMtlsPort": 15008});
    Tunnel::read(&Dump::new(value).unwrap()).unwrap()
}

fn dumped(policies: Value) -> Value {
    let pod = |name: &str, namespace: &str, ip: &str, node: &str, services: Value| {
        json!({
            "uid": format!("Kubernetes//Pod/{namespace}/{name}"), "name": name, "namespace": namespace,
            "workloadIps": [ip], "protocol": "HBONE", "networkMode": "Standard", "serviceAccount": name.split('-').next(),
            "workloadName": name.split('-').next(), "workloadType": "deployment", "trustDomain": "cluster.local",
            "node": node, "status": "Healthy", "clusterId": "Kubernetes", "capacity": 1, "services": services
        })
    };
    json!({
        "workloads": [
            pod("client-1", "shop", "10.244.0.5", "node1", json!([])),
            pod("orders-1", "shop", "10.244.1.7", "node2", json!(["shop/orders.shop.svc.cluster.local"]))
        ],
        "services": [{
            "name": "orders", "namespace": "shop", "hostname": "orders.shop.svc.cluster.local", "vips": ["/10.96.0.7"],
            "ports": {"7000": 7000}, "subjectAltNames": [], "canonical": true,
            "endpoints": {"Kubernetes//Pod/shop/orders-1": {
                "workloadUid": "Kubernetes//Pod/shop/orders-1", "port": {"7000": 7000}, "status": "Healthy"
            }}
        }],
        "policies": policies,
        "certificates": [{"identity": "spiffe://cluster.local/ns/shop/sa/client", "state": "Available", "certChain": [], "rootCerts": []}],
        "workloadState": {"u": {"state": "Up", "info": {"name": "client-1", "namespace": "shop", "serviceAccount": "client"}}},
        "config": {"clusterDomain": "cluster.local"}
    })
}

fn policies() -> Value {
    json!([{
        "name": "only-web", "namespace": "shop", "scope": "Namespace", "action": "Allow", "dryRun": false,
        "rules": [[[{"principals": [{"Exact": "cluster.local/ns/shop/sa/web"}]}]]]
    }])
}

fn known(policies: Value) -> Known {
    Known {
        source: tunnel(policies.clone()),
        others: BTreeMap::from([("node2".to_owned(), tunnel(policies))]),
        waypoints: BTreeMap::new(),
    }
}

#[test]
fn a_source_and_a_destination_have_many_names() {
    let known = known(json!([]));
    for source in [
        "client-1.shop",
        "shop/client-1",
        "deployment/client.shop",
        "client",
        "10.244.0.5",
    ] {
        for destination in [
            "orders:7000",
            "orders.shop:7000",
            "orders.shop.svc.cluster.local:7000",
            "10.96.0.7:7000",
            "service/orders:7000",
            "svc/orders.shop:7000",
            "10.244.1.7:7000",
            "pod/orders-1:7000",
            "orders-1.shop:7000",
        ] {
            let it = known.explain(source, destination, "shop", None).unwrap();
            assert_eq!(
                it.verdict,
                Verdict::Allow,
                "{source} {destination}: {it:#?}"
            );
            assert_eq!(
                it.paths[0].endpoint, "shop/orders-1",
                "{source} {destination}"
            );
        }
    }
}

#[test]
fn what_names_nothing_is_an_error() {
    let known = known(json!([]));
    let wrong = [
        ("nobody.shop", "orders:7000"),
        ("10.9.9.9", "orders:7000"),
        ("client-1.shop", "orders"),
        ("client-1.shop", "orders:0"),
        ("client-1.shop", "fd00::1:80"),
        ("client-1.shop", "pod/nobody:80"),
    ];
    for (source, destination) in wrong {
        assert!(
            known.explain(source, destination, "shop", None).is_err(),
            "{source} {destination}"
        );
    }
}

#[test]
fn a_denial_is_shown_with_its_object_and_the_failed_condition() {
    let it = known(policies())
        .explain("client-1.shop", "orders:7000", "shop", None)
        .unwrap();
    assert_eq!(
        show::text(&it, Some("policy.yaml:1")),
        "\
DENY  shop/client-1 -> orders:7000
  denied: allow policies exist, but none allowed: AuthorizationPolicy shop/only-web
  decided by AuthorizationPolicy shop/only-web (policy.yaml:1)

  ok  source    pod shop/client-1 on node node1, 10.244.0.5
  ok  dns       orders means service shop/orders.shop.svc.cluster.local: 10.96.0.7
  ok  capture   captured by the tunnel of node1
  ok  identity  spiffe://cluster.local/ns/shop/sa/client, certificate held

DENY  endpoint shop/orders-1 on node2
  ok  next hop  HBONE to 10.244.1.7:15008 of shop/orders-1, service shop/orders.shop.svc.cluster.local, which must prove spiffe://cluster.local/ns/shop/sa/orders
  ok  inbound   shop/orders-1 gets it on 10.244.1.7:7000 with the identity spiffe://cluster.local/ns/shop/sa/client
  no  policy    denied: allow policies exist, but none allowed: AuthorizationPolicy shop/only-web
                shop/only-web rule 0: principal cluster.local/ns/shop/sa/client is not among the principals cluster.local/ns/shop/sa/web
"
    );
}

#[test]
fn the_json_says_where_the_object_stands() {
    let it = known(policies())
        .explain("client-1.shop", "orders:7000", "shop", None)
        .unwrap();
    let text = shown(&it, Form::Json, &|by| Some(format!("{}.yaml:1", by.name))).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["verdict"], "DENY");
    assert_eq!(json["decidedBy"]["name"], "only-web");
    assert_eq!(json["decidedBy"]["place"], "only-web.yaml:1");
}

#[test]
fn a_request_is_asked_of_where_any_part_of_it_is_given() {
    let asks = |method: Option<&str>, headers: &[&str]| Asks {
        method: method.map(str::to_owned),
        headers: headers.iter().map(|&it| it.to_owned()).collect(),
        ..Asks::default()
    };
    assert_eq!(asks(None, &[]).request().unwrap(), None);
    let it = asks(None, &["x-a: 1", "x-b=2:3", "x-a:  4 "])
        .request()
        .unwrap();
    let it = it.unwrap();
    assert_eq!((it.method.as_str(), &*it.path, it.host), ("GET", "/", None));
    let values: Vec<_> = it.headers.get_all("x-a").iter().collect();
    assert_eq!(values, ["1", "4"]);
    assert_eq!(it.headers["x-b"], "2:3");
    for (method, headers) in [
        (Some("G ET"), &[][..]),
        (None, &["x"]),
        (None, &["a b: c"]),
        (None, &["x: a\nb"]),
    ] {
        assert!(
            asks(method, headers).request().is_err(),
            "{method:?} {headers:?}"
        );
    }
}

/// The dump of a waypoint that answers `/old` with a redirect.
fn waypoint_dump() -> Value {
    use mesh::l7::{
        route::{
            Action, Attachment, Callers, HttpMatch, HttpRule, Order, PathMatch, Redirect,
            RedirectPort, Route, Rules,
        },
        served::{AppProtocol, Resolution, ServedService},
        view::{Resource, Update, View},
    };
    let service: mesh::names::NamespacedHostname =
        "shop/orders.shop.svc.cluster.local".parse().unwrap();
    let redirect = Redirect {
        scheme: None,
        hostname: Some("new".into()),
        path: None,
        port: RedirectPort::ProtocolDefault,
        status: http::StatusCode::FOUND,
    };
    let old = HttpMatch {
        path: Some(PathMatch::Segments("/old".into())),
        ..HttpMatch::default()
    };
    let route = Route {
        key: "HTTPRoute/shop/orders".parse().unwrap(),
        created: 0,
        attachments: vec![Attachment {
            service: service.clone(),
            port: None,
            callers: Callers::All,
        }],
        rules: Rules::Http {
            order: Order::Precedence,
            rules: vec![HttpRule::new(vec![old], Action::Redirect(redirect))],
        },
    };
    let served = ServedService {
        service,
        bound: true,
        ports: BTreeMap::from([(7000, AppProtocol::Http)]),
        resolution: Resolution::Static,
        external: false,
    };
    let mut view = View::default();
    view.apply(Update {
        upserts: vec![Resource::Service(served), Resource::Route(route)],
        removals: vec![],
    });
    json!({"l7": mesh::l7::dump::dump(&view)})
}

#[test]
fn a_waypoints_dump_is_asked_of_the_request() {
    let mut known = known(json!([]));
    known.source = tunnel_with_waypoint();
    let pod = "shop/waypoint-1".to_owned();
    let request = Request {
        method: http::Method::GET,
        host: None,
        path: "/old/x".into(),
        headers: http::HeaderMap::new(),
    };
    let ask = |known: &Known| {
        let request = Some(request.clone());
        known
            .explain("client-1.shop", "orders:7000", "shop", request)
            .unwrap()
    };
    let first = ask(&known);
    let mut tried = BTreeSet::new();
    assert_eq!(next_waypoint(&first, &mut tried), Some(pod.clone()));
    assert_eq!(next_waypoint(&first, &mut tried), None, "asked once");
    known
        .waypoints
        .insert(pod, requests(&waypoint_dump()).unwrap());
    assert_eq!(
        show::text(&ask(&known), None),
        "\
ALLOW  shop/client-1 -> orders:7000
  answered 302 Found: http://new/old/x
  decided by HTTPRoute shop/orders, rule 0

  ok  source    pod shop/client-1 on node node1, 10.244.0.5
  ok  dns       orders means service shop/orders.shop.svc.cluster.local: 10.96.0.7
  ok  capture   captured by the tunnel of node1
  ok  identity  spiffe://cluster.local/ns/shop/sa/client, certificate held

ALLOW  endpoint shop/waypoint-1 on node2
  ok  next hop  HBONE to 10.244.1.9:15008 of shop/waypoint-1, the waypoint, service shop/orders.shop.svc.cluster.local, which must prove spiffe://cluster.local/ns/shop/sa/waypoint
  ok  waypoint  waypoint shop/waypoint-1 decides on GET /old/x
  ok  route     HTTPRoute shop/orders, rule 0
  ok  policy    allowed: no ALLOW policy applies to these requests, and no DENY policy matches
  ok  route     answered 302 Found: http://new/old/x
"
    );
    assert!(requests(&json!({})).is_err(), "a tunnel's dump is none");
}
