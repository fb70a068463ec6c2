use super::*;
use crate::{
    fixture::{gateway, pod, service, view},
    policy::{Action, AuthorizationPolicy, Clause, Match, PolicyScope, Rule, StringMatch},
    view::{MeshView, Resource},
};

/// No tunnel but the source's.
struct Nobody;

impl Nodes for Nobody {
    fn node(&self, _: &str) -> Option<Node<'_>> {
        None
    }
}

/// One tunnel more.
struct Other(&'static str, MeshView);

impl Nodes for Other {
    fn node(&self, name: &str) -> Option<Node<'_>> {
        (name == self.0).then(|| only(&self.1))
    }
}

fn only(view: &MeshView) -> Node<'_> {
    Node {
        view,
        certificates: None,
        pods: None,
    }
}

const WEB: &str = "a/web.a.svc.cluster.local";

/// A client and a service of two pods, on two nodes.
fn shop() -> Vec<Resource> {
    let web = |name: &str, ip: &str, node: &str| {
        let mut it = pod(name, &[ip]).serving(WEB, &[(80, 8080)]);
        it.node = node.into();
        it.service_account = "web".into();
        it
    };
    vec![
        pod("a/client", &["10.0.0.1"]).into(),
        service(WEB, &["10.1.0.1"], &[(80, 0)]).into(),
        web("a/web-1", "10.0.0.2", "n1").into(),
        web("a/web-2", "10.0.1.2", "n2").into(),
        {
            let mut it = pod("b/outsider", &["10.0.0.9"]);
            it.tunnel_protocol = TunnelProtocol::None;
            it
        }
        .into(),
    ]
}

fn policy(key: &str, action: Action, scope: PolicyScope, matches: Vec<Match>) -> Resource {
    let clause = Clause { matches };
    let rule = Rule {
        clauses: vec![clause],
    };
    Resource::Policy(AuthorizationPolicy {
        key: key.parse().unwrap(),
        scope,
        action,
        rules: vec![rule],
        dry_run: false,
        faults: Vec::new(),
    })
}

fn principal(text: &str) -> Match {
    Match {
        principals: vec![StringMatch::Exact(text.into())],
        ..Match::default()
    }
}

fn ask(view: &MeshView, source: &str, destination: &str, port: u16) -> Question {
    let mut workloads = view.workloads();
    let source = workloads.find(|it| format!("{}/{}", it.namespace, it.name) == source);
    let destination = match destination.parse() {
        Ok(address) => Destination::Address(address),
        Err(_) => Destination::Name(destination.into()),
    };
    Question {
        source: Arc::clone(source.unwrap()),
        destination,
        port,
        names: dns::Settings::default(),
        request: None,
    }
}

fn explained(resources: Vec<Resource>, source: &str, destination: &str, port: u16) -> Explanation {
    let view = view(resources);
    explain(only(&view), &Nobody, &ask(&view, source, destination, port))
}

fn with(mut resources: Vec<Resource>, more: impl IntoIterator<Item = Resource>) -> Vec<Resource> {
    resources.extend(more);
    resources
}

#[track_caller]
fn says(explanation: &Explanation, verdict: Verdict, by: Option<&str>, told: &str) {
    assert_eq!(explanation.verdict, verdict, "{explanation:#?}");
    let decided_by = explanation.decided_by.as_ref().map(ToString::to_string);
    assert_eq!(decided_by.as_deref(), by, "{explanation:#?}");
    assert!(
        explanation.summary.contains(told),
        "{told:?} not in {:?}",
        explanation.summary
    );
}

#[test]
fn without_policies_every_endpoint_of_a_service_allows() {
    for name in ["web", "web.a", "web.a.svc.cluster.local", "10.1.0.1"] {
        let it = explained(shop(), "a/client", name, 80);
        says(&it, Verdict::Allow, None, "no ALLOW policy applies");
        let endpoints: Vec<_> = it.paths.iter().map(|it| it.endpoint.as_str()).collect();
        assert_eq!(endpoints, ["a/web-1", "a/web-2"], "{name}");
    }
}

#[test]
fn the_rule_that_decides_is_named() {
    let allow = policy(
        "a/p",
        Action::Allow,
        PolicyScope::Namespace,
        vec![principal("cluster.local/ns/a/sa/client")],
    );
    let it = explained(with(shop(), [allow.clone()]), "a/client", "web", 80);
    says(
        &it,
        Verdict::Allow,
        Some("AuthorizationPolicy a/p, rule 0"),
        "allowed by",
    );
    let deny = policy(
        "a/no",
        Action::Deny,
        PolicyScope::Namespace,
        vec![Match {
            destination_ports: vec![8080],
            ..Match::default()
        }],
    );
    let it = explained(with(shop(), [allow, deny]), "a/client", "web", 80);
    says(
        &it,
        Verdict::Deny,
        Some("AuthorizationPolicy a/no, rule 0"),
        "denied by",
    );
}

#[test]
fn what_no_policy_allows_is_told_with_the_conditions_that_failed() {
    let only_other = Match {
        destination_ports: vec![9090],
        ..principal("cluster.local/ns/a/sa/other")
    };
    let allow = policy(
        "a/p",
        Action::Allow,
        PolicyScope::Namespace,
        vec![only_other],
    );
    let it = explained(with(shop(), [allow]), "a/client", "web", 80);
    says(
        &it,
        Verdict::Deny,
        Some("AuthorizationPolicy a/p"),
        "none allowed",
    );
    let last = it.paths[0].steps.last().unwrap();
    let expected = "a/p rule 0: principal cluster.local/ns/a/sa/client is not among the principals \
                    cluster.local/ns/a/sa/other and port 8080 is not among the ports 9090";
    assert_eq!(last.more, [expected]);
}

#[test]
fn a_pod_outside_the_mesh_proves_no_identity() {
    let strict = policy(
        "istio-system/istio_converted_static_strict",
        Action::Deny,
        PolicyScope::Global,
        vec![Match {
            not_principals: vec![StringMatch::Presence],
            ..Match::default()
        }],
    );
    let it = explained(with(shop(), [strict.clone()]), "b/outsider", "web.a", 80);
    let by = Some("PeerAuthentication in STRICT mode");
    says(&it, Verdict::Deny, by, "plaintext is not accepted");
    let it = explained(with(shop(), [strict]), "a/client", "web.a", 80);
    says(&it, Verdict::Allow, None, "no ALLOW policy applies");
    let it = explained(shop(), "b/outsider", "web.a", 80);
    says(&it, Verdict::Allow, None, "no ALLOW policy applies");
    assert!(
        it.steps
            .iter()
            .any(|it| it.step == Stage::Capture && it.outcome == Mark::Warn)
    );
}

#[test]
fn endpoints_that_differ_are_told_apart() {
    let mut resources = shop();
    for resource in &mut resources {
        if let Resource::Workload(it) = resource
            && &*it.name == "web-2"
        {
            it.authorization_policies.push("a/p".parse().unwrap());
        }
    }
    let allow = policy(
        "a/p",
        Action::Allow,
        PolicyScope::WorkloadSelector,
        vec![principal("x")],
    );
    let it = explained(with(resources, [allow]), "a/client", "web", 80);
    says(
        &it,
        Verdict::Mixed,
        Some("AuthorizationPolicy a/p"),
        "1 of 2 endpoints refuse",
    );
    let verdicts: Vec<_> = it.paths.iter().map(|it| it.verdict).collect();
    assert_eq!(verdicts, [Verdict::Allow, Verdict::Deny]);
}

#[test]
fn the_destinations_own_tunnel_decides_where_it_is_known() {
    let here = view(shop());
    let deny = policy(
        "a/new",
        Action::Deny,
        PolicyScope::Namespace,
        vec![principal("cluster.local/ns/a/sa/client")],
    );
    let there = Other("n2", view(with(shop(), [deny])));
    let it = explain(
        only(&here),
        &there,
        &ask(&here, "a/client", "10.0.1.2", 8080),
    );
    says(
        &it,
        Verdict::Deny,
        Some("AuthorizationPolicy a/new, rule 0"),
        "denied by",
    );
    let it = explain(
        only(&here),
        &there,
        &ask(&here, "a/client", "10.0.0.2", 8080),
    );
    says(&it, Verdict::Allow, None, "");
    let inbound = &it.paths[0].steps[1];
    assert_eq!(
        (inbound.step, inbound.outcome),
        (Stage::Inbound, Mark::Warn)
    );
}

#[test]
fn routes_without_an_end_refuse_with_their_object() {
    let missing = {
        let mut it = pod("a/behind", &["10.0.0.5"]);
        it.waypoint = Some(gateway("a/gone.a.svc.cluster.local", 15008));
        it
    };
    let empty = service("a/empty.a.svc.cluster.local", &["10.1.0.2"], &[(80, 8080)]);
    let resources = with(shop(), [missing.into(), empty.into()]);
    let by = Some("Service a/gone.a.svc.cluster.local");
    let it = explained(resources.clone(), "a/client", "10.0.0.5", 8080);
    says(&it, Verdict::Deny, by, "required waypoint not found");
    let by = Some("Service a/empty.a.svc.cluster.local");
    let it = explained(resources.clone(), "a/client", "empty", 80);
    says(&it, Verdict::Deny, by, "0 of its 0 endpoints are healthy");
    let by = Some("Service a/web.a.svc.cluster.local");
    let it = explained(resources, "a/client", "web", 81);
    says(&it, Verdict::Deny, by, "it has no port 81, but 80");
}

#[test]
fn behind_a_waypoint_policy_sees_the_waypoints_identity() {
    let mut resources = shop();
    for resource in &mut resources {
        if let Resource::Service(it) = resource {
            it.waypoint = Some(gateway("a/waypoint.a.svc.cluster.local", 15008));
        }
    }
    let name = "a/waypoint.a.svc.cluster.local";
    let waypoint = {
        let mut it = pod("a/waypoint", &["10.0.0.7"]).serving(name, &[(15008, 15008)]);
        it.native_tunnel = true;
        it
    };
    let waypoint_service = service(name, &["10.1.0.7"], &[(15008, 15008)]);
    let resources = with(resources, [waypoint.into(), waypoint_service.into()]);
    let it = explained(resources.clone(), "a/client", "web", 80);
    says(&it, Verdict::Allow, None, "no ALLOW policy applies");
    assert!(
        it.paths
            .iter()
            .all(|it| it.steps.iter().any(|it| it.step == Stage::Waypoint))
    );
    let selects_client = policy(
        "a/p",
        Action::Allow,
        PolicyScope::Namespace,
        vec![principal("cluster.local/ns/a/sa/client")],
    );
    let it = explained(with(resources, [selects_client]), "a/client", "web", 80);
    says(
        &it,
        Verdict::Deny,
        Some("AuthorizationPolicy a/p"),
        "none allowed",
    );
    let told = &it.paths[0].steps.last().unwrap().more[0];
    assert!(
        told.contains("principal cluster.local/ns/a/sa/waypoint"),
        "{told}"
    );
}

#[test]
fn what_the_mesh_does_not_know_is_passed_or_unknown() {
    let it = explained(shop(), "a/client", "192.0.2.7", 443);
    says(&it, Verdict::Allow, None, "outside the mesh");
    let it = explained(shop(), "a/client", "example.com", 443);
    says(&it, Verdict::Unknown, None, "no name of the mesh");
    let it = explained(shop(), "a/client", "10.0.0.1", 8080);
    says(&it, Verdict::Allow, None, "the pod itself");
    let it = explained(shop(), "a/client", "10.0.0.9", 8080);
    says(&it, Verdict::Allow, None, "not in the mesh");
}

#[test]
fn a_source_without_a_certificate_reaches_nobody() {
    let view = view(shop());
    let identity = "spiffe://cluster.local/ns/a/sa/client".to_owned();
    let certificates =
        BTreeMap::from([(identity, "Unavailable: no answer from the CA".to_owned())]);
    let node = Node {
        certificates: Some(&certificates),
        ..only(&view)
    };
    let it = explain(node, &Nobody, &ask(&view, "a/client", "web", 80));
    says(&it, Verdict::Deny, None, "no answer from the CA");
}

#[test]
fn a_pod_that_its_tunnel_does_not_have_is_warned_of() {
    let view = view(shop());
    let pods = BTreeMap::new();
    let node = Node {
        pods: Some(&pods),
        ..only(&view)
    };
    let it = explain(node, &Nobody, &ask(&view, "a/client", "web", 80));
    let capture = it
        .steps
        .iter()
        .find(|it| it.step == Stage::Capture)
        .unwrap();
    assert_eq!(capture.outcome, Mark::Warn);
}

#[test]
fn the_json_is_versioned() {
    let it = explained(shop(), "a/client", "10.0.0.9", 8080);
    let json = serde_json::to_value(&it).unwrap();
    assert_eq!(json["apiVersion"], "explain.leyline.dev/v1");
    assert_eq!(
        (&json["verdict"], &json["source"]),
        (&"ALLOW".into(), &"a/client".into())
    );
    assert_eq!(json["paths"][0]["steps"][0]["step"], "next-hop");
    assert_eq!(json["paths"][0]["steps"][0]["outcome"], "pass");
}
