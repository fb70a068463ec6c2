//! What the two tunnels are told, from a file each: nothing of a control plane's own choices is in it, and where a branch
//! needs it, one tunnel is told what the other is not.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Value, json};

/// Both addresses of each pod, IPv4 first.
pub(super) type Addresses = BTreeMap<&'static str, [IpAddr; 2]>;

/// The pods, by node, and what each listens on.
pub(super) const PODS: [(&str, &str, Option<u16>); 10] = [
    ("client", "node1", None),
    ("backend", "node1", Some(9001)),
    ("server", "node2", Some(9001)),
    ("late", "node2", Some(9001)),
    ("closed", "node2", Some(9001)),
    ("unsure", "node2", Some(9001)),
    ("proxied", "node2", Some(9002)),
    ("tunnelled", "node2", Some(9002)),
    ("walled", "node2", Some(9001)),
    ("gateway", "node2", None),
];

/// Where a pod runs.
pub(super) fn node_of(pod: &str) -> Option<&'static str> {
    let mut pods = PODS.iter();
    pods.find(|(name, ..)| *name == pod)
        .map(|(_, node, _)| *node)
}

/// Who the server is.
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

fn host(service: &str) -> String {
    format!("{service}.shop.svc.cluster.local")
}

fn merged(mut base: Value, more: Value) -> Value {
    let (Value::Object(base_fields), Value::Object(more)) = (&mut base, more) else {
        unreachable!("both are objects")
    };
    base_fields.extend(more);
    base
}

fn gateway(destination: &str) -> Value {
    json!({ "destination": destination, "hboneMtlsPort": 15008 })
}

/// The virtual address of the service at a place of [`addressed`].
fn vip(place: usize) -> String {
    format!("240.1.0.{}", place + 1)
}

/// The virtual addresses, by the services' names.
pub(super) fn vips(addresses: &Addresses) -> impl Iterator<Item = (&'static str, String)> {
    let all = addressed("node1", addresses).into_iter().enumerate();
    all.map(|(place, (name, _))| (name, vip(place)))
}

fn service(place: usize, name: &str, more: Value) -> Value {
    let base = json!({
        "name": name, "namespace": "shop", "hostname": host(name),
        "vips": [format!("/{}", vip(place))], "ports": { "9000": 9001 },
    });
    merged(base, more)
}

/// A service that only waypoints and gateways are named by.
fn way(name: &str) -> Value {
    json!({
        "name": name, "namespace": "shop", "hostname": host(name), "vips": [], "ports": { "15008": 15008 },
    })
}

/// The names that the server is an endpoint of, by itself.
const SERVERS: [&str; 13] = [
    "direct",
    "named",
    "v6",
    "strict",
    "failover",
    "waypointed",
    "by-address",
    "weighted",
    "unwaypointed",
    "weightless-waypoints",
    "passing-waypointed",
    "other-waypoint",
    "unmapped",
];

fn served(names: &[&str]) -> Value {
    let ports = |name: &&str| {
        let ports = if *name == "unmapped" {
            json!({})
        } else {
            json!({ "9000": 9001 })
        };
        (format!("shop/{}", host(name)), ports)
    };
    names
        .iter()
        .map(ports)
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn with_hbone(mut services: Value, name: &str) -> Value {
    services[format!("shop/{}", host(name))] = json!({ "15008": 15008 });
    services
}

/// The record of a pod.
fn pod(name: &str, node: &str, addresses: &Addresses, more: Value) -> Value {
    let base = json!({
        "uid": format!("Kubernetes//Pod/shop/{name}"), "name": name, "namespace": "shop", "serviceAccount": name,
        "workloadIps": addresses[name], "protocol": "HBONE", "node": node, "canonicalName": name,
        "trustDomain": "cluster.local", "services": {},
    });
    merged(base, more)
}

/// A record beside that of the server's pod, with its addresses.
fn beside(name: &str, addresses: &Addresses, more: Value) -> Value {
    let base = json!({
        "uid": format!("beside/{name}"), "name": name, "namespace": "shop", "serviceAccount": "server",
        "workloadIps": addresses["server"], "protocol": "HBONE", "services": served(&[name]),
        "trustDomain": "cluster.local",
    });
    merged(base, more)
}

/// An endpoint of another network.
fn remote(name: &str, service: Value, more: Value) -> Value {
    let base = json!({
        "uid": format!("elsewhere/SplitHorizonWorkload/{name}"), "name": name, "namespace": "shop",
        "serviceAccount": "server", "network": "elsewhere", "protocol": "HBONE", "workloadIps": [], "services": service,
    });
    merged(base, more)
}

fn workloads(addresses: &Addresses, domain: &str) -> Vec<Value> {
    let nodes: BTreeMap<_, _> = PODS.iter().map(|(name, node, _)| (*name, *node)).collect();
    let pod = |name: &str, more| pod(name, nodes[name], addresses, more);
    let far = || gateway("shop/way-over.shop.svc.cluster.local");
    vec![
        pod("client", json!({ "trustDomain": domain })),
        pod(
            "backend",
            json!({ "waypoint": gateway("shop/waypoint.shop.svc.cluster.local") }),
        ),
        pod(
            "server",
            json!({
                "services": with_hbone(served(&SERVERS), "waypoint"), "authorizationPolicies": ["shop/not-9003"],
            }),
        ),
        pod(
            "late",
            json!({ "protocol": "TCP", "authorizationPolicies": ["shop/no-plaintext-9003"] }),
        ),
        pod(
            "closed",
            json!({ "authorizationPolicies": ["shop/only-nobody"] }),
        ),
        pod(
            "unsure",
            json!({ "authorizationPolicies": ["shop/unheard-of"] }),
        ),
        pod(
            "proxied",
            json!({ "applicationTunnel": { "protocol": "PROXY", "port": 9002 } }),
        ),
        pod(
            "tunnelled",
            json!({ "applicationTunnel": { "protocol": "NONE", "port": 9002 } }),
        ),
        pod("walled", json!({})),
        pod(
            "gateway",
            json!({ "services": with_hbone(json!({}), "way-over") }),
        ),
        beside("unhealthy", addresses, json!({ "status": "Unhealthy" })),
        beside("tolerant", addresses, json!({ "status": "Unhealthy" })),
        beside("weightless", addresses, json!({ "capacity": 0 })),
        beside(
            "impostor",
            addresses,
            json!({ "serviceAccount": "somebody" }),
        ),
        beside(
            "vouched",
            addresses,
            json!({ "serviceAccount": "somebody" }),
        ),
        // Addresses that nobody has: only their waypoint can make something of them.
        beside(
            "behind",
            addresses,
            json!({
                "workloadIps": ["240.1.1.1"], "services": {}, "waypoint": gateway("shop/waypoint.shop.svc.cluster.local"),
            }),
        ),
        beside(
            "forsaken",
            addresses,
            json!({
                "workloadIps": ["240.1.1.2"], "services": {}, "waypoint": gateway("shop/nobody.shop.svc.cluster.local"),
            }),
        ),
        remote(
            "far",
            served(&["far", "untrusted", "far-unheard"]),
            json!({ "networkGateway": far() }),
        ),
        remote("gatewayless", served(&["gatewayless"]), json!({})),
        remote(
            "waypoint",
            with_hbone(json!({}), "far-waypoint"),
            json!({ "networkGateway": far() }),
        ),
        remote(
            "near-gateway",
            served(&["near-gateway"]),
            json!({
                "networkGateway": gateway(&format!("/{}", addresses["gateway"][0])),
            }),
        ),
    ]
}

/// The services that have an address, and what each has beside it: all that the first node is told of, of which the second
/// is not told the last.
fn addressed(node: &str, addresses: &Addresses) -> Vec<(&'static str, Value)> {
    let to = |name: &str| gateway(&format!("shop/{}", host(name)));
    let waypoint = json!({ "waypoint": to("waypoint") });
    let server = json!([SERVER]);
    let balanced = |mode, preferences: &[&str]| {
        json!({
            "loadBalancer": { "routingPreferences": preferences, "mode": mode, "healthPolicy": "OnlyHealthy" },
        })
    };
    let guarded = |more: Value| {
        merged(
            merged(json!({ "ports": { "9001": 9001 } }), waypoint.clone()),
            more,
        )
    };
    let weighted = |weight: u32| {
        json!({
            "weightedWaypoints": [{ "destination": to("waypoint"), "weight": weight }],
        })
    };
    let passing = balanced("Passthrough", &[]);
    let mut all = vec![
        ("direct", json!({})),
        ("named", json!({ "ports": { "9000": 0 } })),
        ("v6", json!({ "ipFamilies": "IPv6" })),
        ("empty", json!({})),
        ("unhealthy", json!({})),
        (
            "tolerant",
            json!({
                "loadBalancer": { "routingPreferences": [], "mode": "Standard", "healthPolicy": "AllowAll" },
            }),
        ),
        ("weightless", json!({})),
        ("strict", balanced("Strict", &["Node"])),
        ("failover", balanced("Failover", &["Network", "Node"])),
        (
            "passing",
            merged(
                passing.clone(),
                json!({
                    "vips": [format!("/{}", addresses["plain"][0])], "ports": { "9001": 9001 },
                }),
            ),
        ),
        ("waypointed", guarded(json!({}))),
        (
            "by-address",
            guarded(json!({ "waypoint": gateway(&format!("/{}", addresses["server"][0])) })),
        ),
        (
            "weighted",
            merged(weighted(1), json!({ "ports": { "9001": 9001 } })),
        ),
        ("unwaypointed", json!({ "waypoint": to("nobody") })),
        ("weightless-waypoints", guarded(weighted(0))),
        ("passing-waypointed", guarded(passing)),
        ("far", json!({ "subjectAltNames": server })),
        ("near-gateway", json!({ "subjectAltNames": server })),
        ("gatewayless", json!({ "subjectAltNames": server })),
        ("untrusted", json!({})),
        ("far-guarded", json!({ "waypoint": to("far-waypoint") })),
        ("impostor", json!({})),
        ("vouched", json!({ "subjectAltNames": server })),
        ("unmapped", json!({ "ports": { "9000": 0 } })),
    ];
    // The client's tunnel takes the server for the waypoint; the server's own knows nothing of it.
    let misled = if node == "node1" {
        waypoint.clone()
    } else {
        json!({})
    };
    all.push(("other-waypoint", misled));
    if node == "node1" {
        all.push(("far-unheard", json!({ "subjectAltNames": server })));
    }
    all
}

fn services(node: &str, addresses: &Addresses) -> Vec<Value> {
    let server = json!({ "subjectAltNames": [SERVER] });
    let ways = [
        way("waypoint"),
        way("way-over"),
        merged(way("far-waypoint"), server),
    ];
    let addressed = addressed(node, addresses).into_iter().enumerate();
    let addressed = addressed.map(|(place, (name, more))| service(place, name, more));
    ways.into_iter().chain(addressed).collect()
}

/// Upstream reads a match as a tagged value of YAML, and a port as a number, which JSON does not have: put in for these at
/// the end.
const NOBODY: &str = "match: nobody";
const PRESENCE: &str = "match: presence";
const PUT_IN: [(&str, &str); 5] = [
    (
        "\"match: nobody\"",
        "!Exact cluster.local/ns/shop/sa/nobody",
    ),
    ("\"match: presence\"", "!Presence []"),
    ("\"9000\":", "9000: "),
    ("\"9001\":", "9001: "),
    ("\"15008\":", "15008: "),
];

fn policy(name: &str, action: &str, clauses: Value) -> Value {
    json!({
        "name": name, "namespace": "shop", "scope": "WorkloadSelector", "action": action, "rules": [clauses], "dryRun": false,
    })
}

fn policies() -> Vec<Value> {
    let nobody = json!([[{ "principals": [NOBODY] }]]);
    let plaintext = json!([[{ "notPrincipals": [PRESENCE], "destinationPorts": [9003] }]]);
    vec![
        policy(
            "not-9003",
            "Deny",
            json!([[{ "destinationPorts": [9003] }]]),
        ),
        policy("no-plaintext-9003", "Deny", plaintext),
        policy("only-nobody", "Allow", nobody),
    ]
}

/// What the tunnel of a node is told, where the client is of the trust domain `domain`.
pub(super) fn told(node: &str, addresses: &Addresses, domain: &str) -> String {
    let all = json!({
        "workloads": workloads(addresses, domain), "services": services(node, addresses), "policies": policies(),
    });
    let put_in = |text: String, (stand_in, tagged)| text.replace(stand_in, tagged);
    PUT_IN.into_iter().fold(all.to_string(), put_in)
}
