use serde_json::{Value, json};

use super::*;
use crate::{
    fixture::{pod, service, view},
    service::PortNames,
};

/// What upstream's node tunnel writes, with a key that this version does not know.
fn upstream() -> Value {
    json!({
        "workloads": [{
            "workloadIps": ["10.0.0.1"],
            "waypoint": {"destination": "a/waypoint.a.svc.cluster.local", "hboneMtlsPort": 15008},
            "networkGateway": {"destination": "net-2/10.9.9.9", "hboneMtlsPort": 15009},
            "protocol": "HBONE",
            "networkMode": "Standard",
            "uid": "Kubernetes//Pod/a/web-1",
            "name": "web-1",
            "namespace": "a",
            "trustDomain": "cluster.local",
            "serviceAccount": "web",
            "workloadName": "web",
            "workloadType": "pod",
            "canonicalName": "web",
            "canonicalRevision": "v1",
            "node": "n1",
            "applicationTunnel": {"protocol": "PROXY", "port": null},
            "authorizationPolicies": ["a/p"],
            "status": "Healthy",
            "clusterId": "Kubernetes",
            "locality": {"region": "r", "zone": "z", "subzone": ""},
            "services": ["a/web.a.svc.cluster.local"],
            "capacity": 1,
            "keyOfAVersionToCome": true
        }],
        "services": [{
            "name": "web",
            "namespace": "a",
            "hostname": "web.a.svc.cluster.local",
            "vips": ["/10.1.0.1"],
            "cidrVips": [{"network": "", "cidr": "10.2.0.0/16"}],
            "ports": {"80": 0},
            "endpoints": {
                "Kubernetes//Pod/a/web-1": {
                    "workloadUid": "Kubernetes//Pod/a/web-1",
                    "port": {"80": 8080},
                    "status": "Healthy"
                }
            },
            "subjectAltNames": ["spiffe://cluster.local/ns/a/sa/web"],
            "waypoint": {"destination": "/10.0.0.9", "hboneMtlsPort": 15008},
            "weightedWaypoints": [
                {"destination": {"destination": "/10.0.0.9", "hboneMtlsPort": 15008}, "weight": 2}
            ],
            "loadBalancer": {
                "routingPreferences": ["Network"], "mode": "Failover", "healthPolicy": "AllowAll"
            },
            "ipFamilies": "IPv4",
            "canonical": true,
            "visibility": "Namespace"
        }],
        "policies": [{
            "name": "p",
            "namespace": "a",
            "scope": "WorkloadSelector",
            "action": "Allow",
            "rules": [[[{"principals": [{"Exact": "x"}, {"Presence": []}], "notSourceIps": ["10.0.0.0/8"]}]]],
            "dryRun": false
        }],
        "stagedServices": {
            "b/late": {
                "Kubernetes//Pod/a/web-1": {
                    "workloadUid": "Kubernetes//Pod/a/web-1", "port": {"1": 2}, "status": "Healthy"
                }
            }
        }
    })
}

#[test]
fn a_dump_is_read_with_its_ports_and_written_as_it_was() {
    let dump: ConfigDump = serde_json::from_value(upstream()).unwrap();
    let view = dump.into_view();
    let key = "a/web.a.svc.cluster.local".parse().unwrap();
    let endpoints = view.endpoints(&key);
    assert_eq!(endpoints.iter().next().unwrap().ports()[&80], 8080);
    let mut expected = upstream();
    let workload = &mut expected["workloads"][0];
    workload
        .as_object_mut()
        .unwrap()
        .remove("keyOfAVersionToCome");
    // The staged service is the workload's too, of which upstream's list would tell.
    workload["services"] = json!(["a/web.a.svc.cluster.local", "b/late"]);
    assert_eq!(
        serde_json::to_value(ConfigDump::from(&view)).unwrap(),
        expected
    );
}

/// `upstream()` with one value changed, read and written.
fn rewritten(place: &str, value: &Value) -> Option<Value> {
    let mut dump = upstream();
    let (above, key) = place.rsplit_once('/').unwrap();
    dump.pointer_mut(above).unwrap()[key] = value.clone();
    let read: ConfigDump = serde_json::from_value(dump).unwrap();
    let written = serde_json::to_value(ConfigDump::from(&read.into_view())).unwrap();
    written.pointer(place).cloned()
}

#[test]
fn every_word_is_upstreams() {
    for (place, words) in [
        ("/workloads/0/protocol", &["TCP", "HBONE"][..]),
        ("/workloads/0/networkMode", &["Standard", "HostNetwork"]),
        ("/workloads/0/workloadType", &["cronjob", "pod", "job"]),
        ("/workloads/0/status", &["Healthy", "Unhealthy"]),
        (
            "/workloads/0/applicationTunnel/protocol",
            &["NONE", "PROXY"],
        ),
        (
            "/services/0/loadBalancer/mode",
            &["Standard", "Strict", "Failover", "Passthrough"],
        ),
        (
            "/services/0/loadBalancer/healthPolicy",
            &["OnlyHealthy", "AllowAll"],
        ),
        ("/services/0/ipFamilies", &["Dual", "IPv4", "IPv6"]),
        ("/services/0/visibility", &["Public", "Namespace"]),
        (
            "/policies/0/scope",
            &["Global", "Namespace", "WorkloadSelector"],
        ),
        ("/policies/0/action", &["Allow", "Deny"]),
    ] {
        for word in words {
            let word = json!(word);
            assert_eq!(rewritten(place, &word), Some(word.clone()), "{place}");
        }
    }
    let preferences = json!(["Region", "Zone", "Subzone", "Node", "Cluster", "Network"]);
    let written = rewritten("/services/0/loadBalancer/routingPreferences", &preferences);
    assert_eq!(written, Some(preferences));
}

#[test]
fn what_is_left_out_by_default_is_told_where_it_is_not() {
    for (key, value) in [
        ("hostname", json!("db.example.com")),
        ("network", json!("net-2")),
        ("nativeTunnel", json!(true)),
        ("trustDomain", json!("td.example")),
        ("serviceAccount", json!("sa")),
        ("capacity", json!(0)),
        ("clusterId", json!("c-2")),
        (
            "applicationTunnel",
            json!({"protocol": "NONE", "port": 15088}),
        ),
    ] {
        let place = format!("/workloads/0/{key}");
        assert_eq!(rewritten(&place, &value), Some(value), "{key}");
    }
}

#[test]
fn every_match_of_a_policy_has_upstreams_form() {
    let texts = json!([{"Exact": "e"}, {"Prefix": "p"}, {"Suffix": "s"}, {"Presence": []}]);
    let (networks, ports) = (json!(["10.0.0.0/8", "fd00::/64"]), json!([80, 443]));
    let accounts = json!([{"namespace": "a", "serviceAccount": "web"}]);
    let rules = json!([[[{
        "namespaces": texts, "notNamespaces": texts, "principals": texts, "notPrincipals": texts,
        "sourceIps": networks, "notSourceIps": networks,
        "destinationIps": networks, "notDestinationIps": networks,
        "destinationPorts": ports, "notDestinationPorts": ports,
        "serviceAccounts": accounts, "notServiceAccounts": accounts
    }]]]);
    assert_eq!(rewritten("/policies/0/rules", &rules), Some(rules.clone()));
    let yes = json!(true);
    assert_eq!(rewritten("/policies/0/dryRun", &yes), Some(yes.clone()));
}

#[test]
fn defaults_are_left_out_but_for_those_that_readers_rely_on() {
    let plain = Workload::new(WorkloadUid("u".into()), "w".into(), "a".into());
    let expected = json!({
        "uid": "u", "name": "w", "namespace": "a", "workloadIps": [], "protocol": "TCP",
        "networkMode": "Standard", "status": "Healthy", "clusterId": "Kubernetes", "capacity": 1,
        "trustDomain": "cluster.local", "serviceAccount": "default"
    });
    assert_eq!(serde_json::to_value(&plain).unwrap(), expected);
    let expected = json!({
        "name": "web", "namespace": "a", "hostname": "web", "vips": [], "ports": {}, "endpoints": {},
        "subjectAltNames": [], "canonical": false, "visibility": "Public"
    });
    assert_eq!(
        serde_json::to_value(service("a/web", &[], &[])).unwrap(),
        expected
    );
}

#[test]
fn null_is_absence() {
    let nulls = json!({
        "name": "web", "namespace": "a", "hostname": "web", "vips": [], "ports": {}, "endpoints": {},
        "subjectAltNames": [], "waypoint": null, "loadBalancer": null, "ipFamilies": null,
        "canonical": false, "visibility": "Public"
    });
    let read: Service = serde_json::from_value(nulls).unwrap();
    assert_eq!(read, service("a/web", &[], &[]));
}

#[test]
fn a_local_file_names_ports_with_the_workload() {
    let file: LocalFile = serde_json::from_value(json!({
        "workloads": [{
            "uid": "u", "name": "w", "namespace": "a", "workloadIps": ["127.0.0.2"], "protocol": "HBONE",
            "services": {"a/web": {"80": 8080}}
        }],
        "services": [{"name": "web", "namespace": "a", "hostname": "web", "vips": ["/127.0.0.3"], "ports": {"80": 80}}]
    }))
    .unwrap();
    let mut view = MeshView::default();
    view.apply(file.into_update());
    let endpoints = view.endpoints(&"a/web".parse().unwrap());
    assert_eq!(endpoints.iter().next().unwrap().ports()[&80], 8080);
}

#[test]
fn a_port_that_is_none_is_an_error() {
    for ports in [json!({"x": 1}), json!({"65536": 1}), json!({"80": 65_536})] {
        let file = json!({"name": "w", "namespace": "a", "hostname": "w", "ports": ports});
        assert!(serde_json::from_value::<Service>(file).is_err(), "{ports}");
    }
}

#[test]
fn a_view_survives_its_dump() {
    let resources = [
        Resource::from(pod("a/w1", &["10.0.0.1"]).serving("a/web", &[(80, 1)])),
        pod("a/w2", &["fd00::1"]).serving("a/web", &[]).into(),
        Service {
            port_names: PortNames::new([(80, "http")]).map(Into::into),
            ..service("a/web", &["10.1.0.1"], &[(80, 0)])
        }
        .into(),
    ];
    let dump = ConfigDump::from(&view(resources));
    let text = serde_json::to_string(&dump).unwrap();
    assert!(text.contains(r#""portNames":{"80":"http"}"#), "{text}");
    let read: ConfigDump = serde_json::from_str(&text).unwrap();
    assert_eq!(ConfigDump::from(&read.into_view()), dump);
}
