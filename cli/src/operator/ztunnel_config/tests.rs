use serde_json::json;
use time::macros::datetime;

use super::*;

/// What upstream's tunnel writes (1.30), shortened; the services as the map that older ones wrote.
fn upstream() -> Dump {
    let value = json!({
        "workloads": [
            {
                "workloadIps": ["10.244.1.7"], "protocol": "HBONE", "networkMode": "Standard",
                "uid": "Kubernetes//Pod/shop/web-1", "name": "web-1", "namespace": "shop", "node": "node2",
                "waypoint": {"destination": "shop/waypoint.shop.svc.cluster.local", "hboneMtlsPort": 15008},
                "status": "Healthy", "clusterId": "Kubernetes", "capacity": 1, "keyToCome": 1
            },
            {
                "workloadIps": [], "hostname": "example.com", "protocol": "TCP", "name": "ext", "namespace": "shop",
                "uid": "x", "waypoint": {"destination": "/10.9.9.9", "hboneMtlsPort": 15008}
            },
            {
                "workloadIps": ["10.244.0.4", "fd00::4"], "protocol": "HBONE", "uid": "Kubernetes//Pod/clients/client",
                "name": "client", "namespace": "clients", "node": "node1"
            }
        ],
        "services": {
            "shop/web": {
                "name": "web", "namespace": "shop", "hostname": "web.shop.svc.cluster.local", "vips": ["/10.96.0.7"],
                "ports": {"80": 8080}, "endpoints": {
                    "a": {"workloadUid": "a", "status": "Healthy"}, "b": {"workloadUid": "b", "status": "Unhealthy"},
                    "c": {"workloadUid": "c"}
                }
            },
            "shop/waypoint": {
                "name": "waypoint", "namespace": "shop", "hostname": "waypoint.shop.svc.cluster.local",
                "vips": ["net-1/10.96.0.9", "net-1/fd00:96::9"], "endpoints": {}
            }
        },
        "policies": [
            {"name": "p", "namespace": "shop", "scope": "Namespace", "action": "Allow", "rules": [], "dryRun": false}
        ],
        "certificates": [
            {
                "identity": "spiffe://cluster.local/ns/shop/sa/web", "state": "Available",
                "certChain": [
                    {"pem": "", "serialNumber": "7", "validFrom": "2026-01-01T00:00:00Z", "expirationTime": "2026-01-02T00:00:00Z"},
                    {"pem": "", "serialNumber": "8", "validFrom": "2025-01-01T00:00:00Z", "expirationTime": "2035-01-01T00:00:00Z"}
                ],
                "rootCerts": [
                    {"pem": "", "serialNumber": "9", "validFrom": "2025-01-01T00:00:00Z", "expirationTime": "2035-01-01T00:00:00Z"}
                ]
            },
            {
                "identity": "spiffe://cluster.local/ns/a/sa/b", "state": "Unavailable: no answer", "certChain": [], "rootCerts": []
            }
        ],
        "workloadState": {
            "uid-1": {
                "state": "Up", "info": {"name": "web-1", "namespace": "shop", "serviceAccount": "web"},
                "connections": {
                    "inbound": [{"src": "10.244.0.4:40000", "originalDst": null, "actualDst": "10.244.1.7:8080", "protocol": "HBONE"}],
                    "outbound": [
                        {"src": "10.244.1.7:41000", "originalDst": "10.96.0.7:80", "actualDst": "[fd00::4]:8080", "protocol": "TCP"}
                    ]
                }
            },
            "uid-2": {"state": "Pending", "info": {"name": "late", "namespace": "shop", "serviceAccount": "web"}}
        }
    });
    Dump::new(value).unwrap()
}

#[track_caller]
fn shows(listing: Listing, expected: &str) {
    assert_eq!(screen::table(&listing.rows), expected);
}

#[test]
fn workloads_are_told_with_their_waypoints() {
    let all = tables::workloads(&upstream(), &WorkloadFilter::default()).unwrap();
    assert_eq!(all.json[1]["keyToCome"], json!(null));
    shows(
        all,
        "\
NAMESPACE  POD NAME  ADDRESS             NODE   WAYPOINT  PROTOCOL
clients    client    10.244.0.4,fd00::4  node1  None      HBONE
shop       ext       example.com                NA        TCP
shop       web-1     10.244.1.7          node2  waypoint  HBONE
",
    );
}

#[test]
fn a_filter_keeps_what_it_says_with_every_key_that_was_read() {
    let dump = upstream();
    let count = |filter: WorkloadFilter| tables::workloads(&dump, &filter).unwrap().rows.len() - 1;
    let text = |text: &str| Some(text.to_owned());
    let by = WorkloadFilter::default;
    assert_eq!(
        count(WorkloadFilter {
            namespace: text("shop"),
            ..by()
        }),
        2
    );
    assert_eq!(
        count(WorkloadFilter {
            node: text("node1"),
            ..by()
        }),
        1
    );
    assert_eq!(
        count(WorkloadFilter {
            address: text("fd00::4"),
            ..by()
        }),
        1
    );
    let pod = Some(("web-1".to_owned(), "shop".to_owned()));
    let one = tables::workloads(&dump, &WorkloadFilter { pod, ..by() }).unwrap();
    assert_eq!((one.rows.len(), &one.json[0]["keyToCome"]), (2, &json!(1)));
}

#[test]
fn services_are_told_with_their_healthy_endpoints() {
    shows(
        tables::services(&upstream(), None).unwrap(),
        "\
NAMESPACE  SERVICE NAME  SERVICE VIP           WAYPOINT  ENDPOINTS
shop       waypoint      10.96.0.9,fd00:96::9  None      0/0
shop       web           10.96.0.7             None      2/3
",
    );
}

#[test]
fn policies_are_told_with_action_and_scope() {
    shows(
        tables::policies(&upstream(), Some("shop")).unwrap(),
        "NAMESPACE  POLICY NAME  ACTION  SCOPE\nshop       p            Allow   Namespace\n",
    );
    assert_eq!(
        tables::policies(&upstream(), Some("other"))
            .unwrap()
            .rows
            .len(),
        1
    );
}

#[test]
fn certificates_are_valid_between_their_dates() {
    shows(
        tables::certificates(&upstream(), datetime!(2026-01-01 12:00 UTC)).unwrap(),
        "\
CERTIFICATE NAME                       TYPE          STATUS       VALID CERT  SERIAL NUMBER  NOT AFTER             NOT BEFORE
spiffe://cluster.local/ns/a/sa/b       Leaf          Unavailable  false
spiffe://cluster.local/ns/shop/sa/web  Leaf          Available    true        7              2026-01-02T00:00:00Z  2026-01-01T00:00:00Z
spiffe://cluster.local/ns/shop/sa/web  Intermediate  Available    true        8              2035-01-01T00:00:00Z  2025-01-01T00:00:00Z
spiffe://cluster.local/ns/shop/sa/web  Root          Available    true        9              2035-01-01T00:00:00Z  2025-01-01T00:00:00Z
",
    );
    let late = tables::certificates(&upstream(), datetime!(2026-01-03 0:00 UTC)).unwrap();
    assert_eq!(late.rows[2][3], "false");
}

#[test]
fn connections_are_told_by_name_or_raw() {
    let filter = |raw: bool| ConnectionFilter {
        inbound: true,
        outbound: true,
        raw,
        ..ConnectionFilter::default()
    };
    shows(
        tables::connections(&upstream(), &filter(false)).unwrap(),
        "\
WORKLOAD    DIRECTION  LOCAL             REMOTE                REMOTE TARGET                  PROTOCOL
web-1.shop  Inbound    web-1.shop:8080   client.clients:40000                                 HBONE
web-1.shop  Outbound   web-1.shop:41000  client.clients:8080   web.shop.svc.cluster.local:80  TCP
",
    );
    let raw = tables::connections(&upstream(), &filter(true)).unwrap();
    assert_eq!(raw.rows[1][3], "10.244.0.4:40000");
}

#[test]
fn what_is_no_dump_is_refused() {
    for text in ["[]", "{}", "{\"clusters\": []}", "no"] {
        assert!(Dump::parse(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn a_level_is_sent_in_the_tunnels_form() {
    assert_eq!(log_path(None, false), "/logging");
    assert_eq!(log_path(Some("debug"), false), "/logging?level=debug");
    let path = log_path(Some("info,hbone::pool:debug"), true);
    assert_eq!(path, "/logging?level=info,hbone::pool%3Ddebug&reset");
}
