use std::collections::BTreeMap;

use time::macros::datetime;

use super::*;
use crate::operator::status::{Proxy, State, Synced};

fn pod(name: &str, node: &str) -> PodFacts {
    PodFacts {
        name: name.to_owned(),
        node: node.to_owned(),
        ready: true,
        problem: None,
    }
}

fn proxy(name: &str, state: State) -> Proxy {
    let synced = Synced {
        state,
        sent_time: None,
        error: None,
    };
    Proxy {
        name: format!("{name}.istio-system"),
        cluster: "Kubernetes".to_owned(),
        istiod: "istiod-1".to_owned(),
        version: "0.1.0".to_owned(),
        kind: "ztunnel".to_owned(),
        types: BTreeMap::from([("WDS".to_owned(), synced)]),
        differences: None,
    }
}

/// A mesh of one node in which all is well.
fn well() -> Facts {
    let crds = [
        "authorizationpolicies.security.istio.io",
        "peerauthentications.security.istio.io",
        "serviceentries.networking.istio.io",
        "workloadentries.networking.istio.io",
        "gateways.gateway.networking.k8s.io",
        "gatewayclasses.gateway.networking.k8s.io",
    ];
    Facts {
        url: "https://10.0.0.1:6443".to_owned(),
        kubernetes: "v1.36.1".to_owned(),
        crds: Some(crds.map(str::to_owned).into()),
        forbidden: Vec::new(),
        nodes: vec![NodeFacts {
            name: "n1".to_owned(),
            ready: true,
            kernel: "6.1.0-18-amd64".to_owned(),
            system: "linux".to_owned(),
        }],
        control_planes: vec![pod("istiod-1", "n1")],
        webhook: Some(Webhook {
            name: "istio-validator-istio-system".to_owned(),
            trusted: true,
            policy: "Fail".to_owned(),
        }),
        agents: vec![pod("istio-cni-node-1", "n1")],
        tunnels: vec![pod("ztunnel-1", "n1")],
        proxies: Ok(vec![proxy("ztunnel-1", State::Synced)]),
        outside: Vec::new(),
        enrolled: 3,
        certificates: vec![CertificateFacts {
            tunnel: "ztunnel-1".to_owned(),
            identity: "spiffe://cluster.local/ns/a/sa/b".to_owned(),
            state: "Available".to_owned(),
            leaf_ends: Some(datetime!(2026-01-02 0:00 UTC)),
            root_ends: Some(datetime!(2036-01-01 0:00 UTC)),
        }],
        unread: Vec::new(),
        now: datetime!(2026-01-01 12:00 UTC),
    }
}

fn checked(facts: &Facts) -> Vec<Check> {
    let mut checks = evaluate::prerequisites(facts);
    checks.extend(evaluate::mesh(facts));
    checks
}

/// What one change of a well mesh comes to: the only check that is not passed.
#[track_caller]
fn comes_to(change: impl FnOnce(&mut Facts), code: &str, result: Outcome, told: &str) {
    let mut facts = well();
    change(&mut facts);
    let checks = checked(&facts);
    let bad: Vec<_> = checks
        .iter()
        .filter(|it| it.result != Outcome::Pass)
        .collect();
    let [one] = bad.as_slice() else {
        panic!("{bad:#?}");
    };
    assert_eq!((one.code, one.result), (code, result), "{one:?}");
    assert!(
        one.message.contains(told),
        "{told:?} not in {:?}",
        one.message
    );
    assert!(
        one.hint.as_ref().is_some_and(|it| !it.is_empty()),
        "{one:?}"
    );
}

#[test]
fn a_well_mesh_passes_every_check_in_order() {
    let checks = checked(&well());
    assert_eq!(worst(&checks), Outcome::Pass, "{checks:#?}");
    let codes: Vec<_> = checks.iter().map(|it| it.code).collect();
    let mut sorted = codes.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(codes, sorted, "codes are unique and ascend");
}

#[test]
fn each_fault_is_told_by_its_own_check() {
    use Outcome::{Fail, Warn};
    comes_to(
        |it| it.kubernetes = "v1.25.3".to_owned(),
        "LEY-102",
        Fail,
        "too old",
    );
    comes_to(
        |it| it.forbidden.push("list nodes".to_owned()),
        "LEY-103",
        Warn,
        "list nodes",
    );
    comes_to(|it| it.nodes[0].ready = false, "LEY-104", Warn, "n1");
    comes_to(
        |it| it.nodes[0].kernel = "5.4.0".to_owned(),
        "LEY-104",
        Warn,
        "5.4.0",
    );
    comes_to(|it| it.crds = None, "LEY-105", Warn, "not known");
    let crd = "authorizationpolicies.security.istio.io";
    comes_to(
        |it| it.crds.as_mut().unwrap().retain(|it| it != crd),
        "LEY-105",
        Fail,
        crd,
    );
    let crd = "gateways.gateway.networking.k8s.io";
    comes_to(
        |it| it.crds.as_mut().unwrap().retain(|it| it != crd),
        "LEY-105",
        Warn,
        crd,
    );
    comes_to(
        |it| it.control_planes.clear(),
        "LEY-201",
        Fail,
        "none is installed",
    );
    comes_to(
        |it| {
            it.control_planes[0].ready = false;
            it.control_planes[0].problem = Some("discovery: CrashLoopBackOff".to_owned());
        },
        "LEY-201",
        Fail,
        "CrashLoopBackOff",
    );
    comes_to(|it| it.webhook = None, "LEY-202", Warn, "none");
    comes_to(
        |it| it.webhook.as_mut().unwrap().trusted = false,
        "LEY-202",
        Warn,
        "no certificate authority",
    );
    comes_to(|it| it.agents.clear(), "LEY-203", Fail, "n1: no pod");
    comes_to(
        |it| it.agents[0].ready = false,
        "LEY-203",
        Fail,
        "istio-cni-node-1",
    );
    comes_to(
        |it| it.proxies = Ok(vec![proxy("ztunnel-1", State::Stale)]),
        "LEY-205",
        Warn,
        "behind",
    );
    comes_to(
        |it| it.proxies = Ok(vec![proxy("ztunnel-1", State::Error)]),
        "LEY-205",
        Fail,
        "refuse",
    );
    comes_to(
        |it| it.proxies = Ok(Vec::new()),
        "LEY-205",
        Fail,
        "not connected",
    );
    comes_to(
        |it| it.outside.push("a/web".to_owned()),
        "LEY-301",
        Fail,
        "a/web",
    );
    comes_to(
        |it| it.certificates[0].state = "Unavailable: no".to_owned(),
        "LEY-302",
        Fail,
        "not issued",
    );
    comes_to(
        |it| it.now = datetime!(2026-01-03 0:00 UTC),
        "LEY-302",
        Fail,
        "expired",
    );
    let soon = Some(datetime!(2026-01-20 0:00 UTC));
    comes_to(
        |it| it.certificates[0].root_ends = soon,
        "LEY-302",
        Warn,
        "2026-01-20",
    );
    comes_to(
        |it| it.unread.push("ztunnel-1".to_owned()),
        "LEY-302",
        Warn,
        "ztunnel-1",
    );
}

#[test]
fn versions_that_differ_are_told() {
    let mut other = proxy("waypoint-1", State::Synced);
    other.version = "0.2.0".to_owned();
    comes_to(
        |it| it.proxies.as_mut().unwrap().push(other),
        "LEY-206",
        Outcome::Warn,
        "0.1.0, 0.2.0",
    );
}

#[test]
fn an_empty_cluster_is_told_to_install_and_nothing_else() {
    let mut facts = well();
    facts.control_planes.clear();
    facts.tunnels.clear();
    let checks = evaluate::mesh(&facts);
    let codes: Vec<_> = checks
        .iter()
        .map(|it| (it.code, it.hint.as_deref()))
        .collect();
    assert_eq!(codes, [("LEY-201", Some("leyline install"))]);
}

#[test]
fn the_text_names_what_failed_with_its_hint() {
    let mut facts = well();
    facts.outside = (0..7).map(|at| format!("shop/web-{at}")).collect();
    let text = text(&evaluate::mesh(&facts)[7..]);
    assert_eq!(
        text,
        "\
no  LEY-301  pods in the mesh   labelled, and not in the mesh: shop/web-0, shop/web-1, shop/web-2, shop/web-3, shop/web-4 and 2 more
                                hint: see the log of istio-cni-node on the pod's node; host-network pods never join
ok  LEY-302  certificates       1 certificate, all valid

2 checks: 1 failed, 0 warnings
"
    );
}

#[test]
fn only_pods_that_can_join_are_waited_for() {
    let ambient = BTreeSet::from(["shop".to_owned()]);
    let pod = |namespace: &str, labels: serde_json::Value, host: bool| -> Pod {
        let spec = json!({"containers": [], "hostNetwork": host});
        let metadata = json!({"name": "x", "namespace": namespace, "labels": labels});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
    };
    let cases = [
        ("shop", json!({}), false, true),
        ("shop", json!({MODE: "none"}), false, false),
        ("shop", json!({}), true, false),
        (
            "shop",
            json!({"gateway.istio.io/managed": "istio.io-mesh-controller"}),
            false,
            false,
        ),
        ("other", json!({}), false, false),
        ("other", json!({MODE: "ambient"}), false, true),
    ];
    for (namespace, labels, host, expected) in cases {
        let case = format!("{namespace} {labels} {host}");
        assert_eq!(
            should_be_enrolled(&pod(namespace, labels, host), &ambient),
            expected,
            "{case}"
        );
    }
}
