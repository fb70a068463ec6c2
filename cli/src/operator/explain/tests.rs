use mesh::explain::Verdict;
use serde_json::json;

use super::*;

/// Two pods and a service, as a tunnel dumps them, upstream's or ours.
fn tunnel(policies: Value) -> Tunnel {
    let pod = |name: &str, namespace: &str, ip: &str, node: &str, services: Value| {
        json!({
            "uid": format!("Kubernetes//Pod/{namespace}/{name}"), "name": name, "namespace": namespace,
            "workloadIps": [ip], "protocol": "HBONE", "networkMode": "Standard", "serviceAccount": name.split('-').next(),
            "workloadName": name.split('-').next(), "workloadType": "deployment", "trustDomain": "cluster.local",
            "node": node, "status": "Healthy", "clusterId": "Kubernetes", "capacity": 1, "services": services
        })
    };
    let value = json!({
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
    });
    Tunnel::read(&Dump::new(value).unwrap()).unwrap()
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
            let it = known.explain(source, destination, "shop").unwrap();
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
            known.explain(source, destination, "shop").is_err(),
            "{source} {destination}"
        );
    }
}

#[test]
fn a_denial_is_shown_with_its_object_and_the_failed_condition() {
    let it = known(policies())
        .explain("client-1.shop", "orders:7000", "shop")
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
        .explain("client-1.shop", "orders:7000", "shop")
        .unwrap();
    let text = shown(&it, Form::Json, &|by| Some(format!("{}.yaml:1", by.name))).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["verdict"], "DENY");
    assert_eq!(json["decidedBy"]["name"], "only-web");
    assert_eq!(json["decidedBy"]["place"], "only-web.yaml:1");
}
