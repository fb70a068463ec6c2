use std::{collections::BTreeMap, sync::Arc};

use http::{HeaderName, StatusCode};

use super::*;
use crate::{
    dns,
    explain::{Destination, Explanation, Node, Nodes, Question, explain},
    fixture::{gateway, pod, service, view},
    l7::{
        authorization::{
            Either, OperationMatch, PathTemplate, PolicyAction, PolicyRule, RequestPolicy,
            ValueMatch,
        },
        backend::{BackendPolicy, Subset, TrafficPolicy},
        fixture::{backend, rule},
        name::Target,
        route::{
            Attachment, Callers, DirectResponse, HeaderMatch, HttpMatch, Order, PathMatch,
            Redirect, RedirectPort, Rules, TextMatch,
        },
        served::{Resolution, ServedService, WorkloadLabels},
        view::{Resource, Update},
    },
    names::WorkloadUid,
    view::MeshView,
};

const WEB: &str = "a/web.a.svc.cluster.local";
const CANARY: &str = "a/canary";
const WAYPOINT: &str = "a/waypoint.a.svc.cluster.local";

/// A client, a waypoint, and two services behind it.
fn shop() -> MeshView {
    view(objects())
}

fn objects() -> Vec<crate::view::Resource> {
    let mut web = service(WEB, &["10.1.0.1"], &[(80, 8080)]);
    web.waypoint = Some(gateway(WAYPOINT, 15008));
    vec![
        pod("a/client", &["10.0.0.1"]).into(),
        web.into(),
        service(CANARY, &["10.1.0.2"], &[(80, 8080)]).into(),
        service(WAYPOINT, &["10.1.0.7"], &[(15008, 15008)]).into(),
        pod("a/web-1", &["10.0.0.2"])
            .serving(WEB, &[(80, 8080)])
            .into(),
        pod("a/canary-1", &["10.0.0.3"])
            .serving(CANARY, &[(80, 8080)])
            .into(),
        {
            let mut it = pod("a/waypoint", &["10.0.0.7"]).serving(WAYPOINT, &[(15008, 15008)]);
            it.native_tunnel = true;
            it
        }
        .into(),
    ]
}

fn served(protocol: AppProtocol) -> Resource {
    bound(WEB, protocol)
}

fn bound(service: &str, protocol: AppProtocol) -> Resource {
    Resource::Service(ServedService {
        service: service.parse().unwrap(),
        bound: true,
        ports: BTreeMap::from([(80, protocol)]),
        resolution: Resolution::Static,
        external: false,
    })
}

fn route(rules: Vec<HttpRule>) -> Resource {
    route_of(WEB, rules)
}

fn route_of(service: &str, rules: Vec<HttpRule>) -> Resource {
    Resource::Route(Route {
        key: "HTTPRoute/a/web".parse().unwrap(),
        created: 0,
        attachments: vec![Attachment {
            service: service.parse().unwrap(),
            port: None,
            callers: Callers::All,
        }],
        rules: Rules::Http {
            order: Order::Precedence,
            rules,
        },
    })
}

fn policy(action: PolicyAction, path: &str) -> Resource {
    let paths = Either {
        values: vec![PathTemplate::Value(ValueMatch::Exact(path.into()))],
        not_values: vec![],
    };
    let operation = OperationMatch {
        paths,
        ..OperationMatch::default()
    };
    Resource::Policy(RequestPolicy {
        key: "a/p".parse().unwrap(),
        targets: vec![Target::Service(WEB.parse().unwrap())],
        action,
        dry_run: false,
        rules: vec![PolicyRule {
            to: vec![operation],
            ..PolicyRule::default()
        }],
        faults: vec![],
    })
}

/// The waypoint's view alone.
struct Waypoint(View);

impl Nodes for Waypoint {
    fn node(&self, _: &str) -> Option<Node<'_>> {
        None
    }

    fn waypoint(&self, pod: &Workload) -> Option<&View> {
        (*pod.name == *"waypoint").then_some(&self.0)
    }
}

/// What the client asks.
fn asked(mesh: &MeshView, name: &str, path: &str, headers: HeaderMap) -> Question {
    let client = mesh.workloads().find(|it| *it.name == *"client").unwrap();
    Question {
        source: Arc::clone(client),
        destination: Destination::Name(name.into()),
        port: 80,
        names: dns::Settings::default(),
        request: Some(Request {
            method: Method::GET,
            host: None,
            path: path.into(),
            headers,
        }),
    }
}

fn explained(
    resources: Vec<Resource>,
    path: &str,
    headers: &[(&'static str, &str)],
) -> Explanation {
    let mesh = shop();
    let mut waypoint = View::default();
    waypoint.apply(Update {
        upserts: resources,
        removals: vec![],
    });
    let headers = headers
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
    let question = asked(&mesh, "web", path, headers.collect());
    let node = Node {
        view: &mesh,
        certificates: None,
        pods: None,
    };
    explain(node, &Waypoint(waypoint), &question)
}

/// Verdict, decider, endpoints, and what the waypoint's steps say.
#[track_caller]
fn check(it: &Explanation, verdict: Verdict, by: Option<&str>, endpoints: &[&str], told: &str) {
    let decided = it.decided_by.as_ref().map(ToString::to_string);
    let found: Vec<_> = it.paths.iter().map(|it| it.endpoint.as_str()).collect();
    assert_eq!(
        (it.verdict, decided.as_deref(), found.as_slice()),
        (verdict, by, endpoints),
        "{it:#?}"
    );
    let mut details = it.paths[0].steps.iter().map(|it| &it.detail);
    assert!(
        details.any(|it| it.contains(told)),
        "{told:?} not in {it:#?}"
    );
    assert!(
        it.paths
            .iter()
            .all(|it| it.waypoint.as_deref() == Some("a/waypoint"))
    );
}

fn http() -> Resource {
    served(AppProtocol::Http)
}

fn on(path: &str) -> HttpMatch {
    HttpMatch {
        path: Some(PathMatch::Segments(path.into())),
        ..HttpMatch::default()
    }
}

#[test]
fn the_rule_and_the_backends_of_a_request_are_told() {
    let canary = HttpMatch {
        headers: vec![HeaderMatch {
            name: HeaderName::from_static("x-canary"),
            value: TextMatch::Exact("1".into()),
        }],
        ..on("/")
    };
    let web = rule("web.a.svc.cluster.local", vec![on("/")]);
    let routes = || {
        vec![
            http(),
            route(vec![rule("canary", vec![canary.clone()]), web.clone()]),
        ]
    };
    let it = explained(routes(), "/x", &[]);
    let by = Some("HTTPRoute a/web, rule 1");
    check(
        &it,
        Verdict::Allow,
        by,
        &["a/web-1"],
        &format!("100% to {WEB}:80"),
    );
    let it = explained(routes(), "/x", &[("x-canary", "1")]);
    let by = Some("HTTPRoute a/web, rule 0");
    check(
        &it,
        Verdict::Allow,
        by,
        &["a/canary-1"],
        "100% to a/canary:80",
    );
    let mut both = rule("canary", vec![]);
    if let (Action::Forward(all), Action::Forward(more)) =
        (&mut both.action, backend("web.a.svc.cluster.local"))
    {
        all.extend(
            more.into_iter()
                .map(|it| WeightedBackend { weight: 3, ..it }),
        );
    }
    let it = explained(vec![http(), route(vec![both])], "/", &[]);
    let endpoints = &["a/canary-1", "a/web-1"];
    check(
        &it,
        Verdict::Allow,
        by,
        endpoints,
        "25% to a/canary:80, 75% to",
    );
}

#[test]
fn what_a_waypoint_answers_itself_ends_there() {
    let at = &["a/waypoint"];
    let by = Some("HTTPRoute a/web, rule 0");
    let act = |action| vec![http(), route(vec![HttpRule::new(vec![on("/x")], action)])];
    let redirect = Action::Redirect(Redirect {
        scheme: Some("https".into()),
        hostname: None,
        path: None,
        port: RedirectPort::Derived,
        status: StatusCode::FOUND,
    });
    let it = explained(act(redirect), "/x?q=1", &[]);
    let told = "answered 302 Found: https://web.a.svc.cluster.local/x?q=1";
    check(&it, Verdict::Allow, by, at, told);
    let respond = Action::Respond(DirectResponse {
        status: StatusCode::IM_A_TEAPOT,
        body: vec![],
    });
    check(
        &explained(act(respond), "/x", &[]),
        Verdict::Allow,
        by,
        at,
        "answered 418",
    );
    let invalid = || Action::Invalid("no such filter".into());
    check(
        &explained(act(invalid()), "/x", &[]),
        Verdict::Deny,
        by,
        at,
        "500: no such filter",
    );
    check(
        &explained(act(invalid()), "/y", &[]),
        Verdict::Deny,
        None,
        at,
        "answered 404",
    );
    check(
        &explained(act(invalid()), "/../y", &[]),
        Verdict::Deny,
        None,
        at,
        "answered 400",
    );
    let nobody = Action::Forward(vec![]);
    check(
        &explained(act(nobody), "/x", &[]),
        Verdict::Deny,
        by,
        at,
        "no backend has a weight",
    );
}

#[test]
fn the_policy_that_decides_is_told_with_its_rule() {
    let by = Some("AuthorizationPolicy a/p, rule 0");
    let denied = || vec![http(), policy(PolicyAction::Deny, "/x")];
    check(
        &explained(denied(), "/x", &[]),
        Verdict::Deny,
        by,
        &["a/waypoint"],
        "denied by",
    );
    check(
        &explained(denied(), "/y", &[]),
        Verdict::Allow,
        None,
        &["a/web-1"],
        "no route is attached",
    );
    let allowed = || vec![http(), policy(PolicyAction::Allow, "/x")];
    check(
        &explained(allowed(), "/x", &[]),
        Verdict::Allow,
        by,
        &["a/web-1"],
        "allowed by",
    );
    let none = "ALLOW policies apply";
    check(
        &explained(allowed(), "/y", &[]),
        Verdict::Deny,
        None,
        &["a/waypoint"],
        none,
    );
    let custom = vec![http(), policy(PolicyAction::Custom("ext".into()), "/x")];
    check(
        &explained(custom, "/x", &[]),
        Verdict::Deny,
        by,
        &["a/waypoint"],
        "no settings name",
    );
}

#[test]
fn a_port_that_is_not_http_is_judged_as_a_connection() {
    let tcp = || served(AppProtocol::Tcp);
    let it = explained(vec![tcp()], "/x", &[]);
    check(&it, Verdict::Allow, None, &["a/web-1"], "not HTTP there");
    let by = Some("AuthorizationPolicy a/p, rule 0");
    let it = explained(vec![tcp(), policy(PolicyAction::Deny, "/y")], "/x", &[]);
    check(&it, Verdict::Deny, by, &["a/waypoint"], "denied by");
}

#[test]
fn a_service_that_the_waypoint_does_not_serve_is_refused() {
    let it = explained(vec![], "/", &[]);
    check(
        &it,
        Verdict::Deny,
        None,
        &["a/waypoint"],
        "does not serve service",
    );
}

const OUTSIDE: &str = "a/outside.a.svc.cluster.local";
const EDGE: &str = "a/edge.a.svc.cluster.local";

/// The views of two waypoints, by the names of their pods.
struct Two(View, View);

impl Nodes for Two {
    fn node(&self, _: &str) -> Option<Node<'_>> {
        None
    }

    fn waypoint(&self, pod: &Workload) -> Option<&View> {
        match &*pod.name {
            "edge" => Some(&self.0),
            "waypoint" => Some(&self.1),
            _ => None,
        }
    }
}

fn view_of(upserts: Vec<Resource>) -> View {
    let mut view = View::default();
    view.apply(Update {
        upserts,
        removals: vec![],
    });
    view
}

/// A route of `outside`, whose waypoint is `edge`, sends to subset v2 of `web`, whose waypoint is `waypoint`.
fn explained_past_two(inner: Vec<Resource>) -> Explanation {
    let mut outside = service(OUTSIDE, &["10.1.0.3"], &[(80, 8080)]);
    outside.waypoint = Some(gateway(EDGE, 15008));
    let mut edge = pod("a/edge", &["10.0.0.8"]).serving(EDGE, &[(15008, 15008)]);
    edge.native_tunnel = true;
    let mut all = objects();
    all.extend([
        outside.into(),
        service(EDGE, &["10.1.0.8"], &[(15008, 15008)]).into(),
        edge.into(),
        pod("a/web-2", &["10.0.0.4"])
            .serving(WEB, &[(80, 8080)])
            .into(),
    ]);
    let mesh = view(all);
    let to_v2 = Backend::Service {
        service: WEB.parse().unwrap(),
        port: 80,
        subset: Some("v2".into()),
    };
    let action = Action::Forward(vec![WeightedBackend::new(1, to_v2)]);
    let outer = vec![
        bound(OUTSIDE, AppProtocol::Http),
        route_of(OUTSIDE, vec![HttpRule::new(vec![], action)]),
    ];
    let nodes = Two(view_of(outer), view_of(inner));
    let node = Node {
        view: &mesh,
        certificates: None,
        pods: None,
    };
    explain(
        node,
        &nodes,
        &asked(&mesh, "outside", "/", HeaderMap::new()),
    )
}

/// What `web`'s waypoint knows of its subset v2: one pod is of it.
fn with_v2() -> Vec<Resource> {
    let labels = |version: &str| BTreeMap::from([("version".into(), version.into())]);
    let of = |pod: &str, version: &str| {
        Resource::Labels(WorkloadLabels {
            uid: WorkloadUid(format!("Kubernetes//Pod/a/{pod}").into()),
            labels: labels(version),
        })
    };
    let v2 = Subset {
        labels: labels("v2"),
        policy: None,
        ports: BTreeMap::new(),
    };
    vec![
        http(),
        of("web-1", "v1"),
        of("web-2", "v2"),
        Resource::Backend(Box::new(BackendPolicy {
            service: WEB.parse().unwrap(),
            sources: vec![],
            policy: TrafficPolicy::default(),
            ports: BTreeMap::new(),
            subsets: BTreeMap::from([("v2".into(), v2)]),
        })),
    ]
}

#[test]
fn a_subset_behind_another_waypoint_is_that_waypoints_to_choose_from() {
    let it = explained_past_two(with_v2());
    let found: Vec<_> = it.paths.iter().map(|it| it.endpoint.as_str()).collect();
    assert_eq!(found, ["a/web-2"], "{it:#?}");
    let path = &it.paths[0];
    assert_eq!(path.waypoint.as_deref(), Some("a/edge"));
    assert_eq!(path.further_waypoints, ["a/waypoint"]);
    let told: Vec<_> = path.steps.iter().map(|it| it.detail.as_str()).collect();
    assert!(
        told.contains(&"the waypoint is asked for subset v2"),
        "{told:#?}"
    );
    // Who has no such subset has no endpoint for it.
    let it = explained_past_two(vec![http()]);
    assert_eq!(it.verdict, Verdict::Deny, "{it:#?}");
}

#[test]
fn policies_of_the_second_waypoint_are_asked_of_the_first() {
    let denies = policy(PolicyAction::Deny, "/");
    let it = explained_past_two([with_v2(), vec![denies]].concat());
    let by = it.decided_by.as_ref().map(ToString::to_string);
    assert_eq!(
        (it.verdict, by.as_deref()),
        (Verdict::Deny, Some("AuthorizationPolicy a/p, rule 0")),
        "{it:#?}"
    );
}

#[test]
fn what_goes_round_between_two_waypoints_is_refused_where_it_closes() {
    let back = Backend::Service {
        service: OUTSIDE.parse().unwrap(),
        port: 80,
        subset: None,
    };
    let action = Action::Forward(vec![WeightedBackend::new(1, back)]);
    let it = explained_past_two(vec![http(), route(vec![HttpRule::new(vec![], action)])]);
    assert_eq!(it.verdict, Verdict::Deny, "{it:#?}");
    let told = &it.paths[0].steps.last().unwrap().detail;
    assert!(
        told.starts_with("refused by waypoint a/edge: it came by"),
        "{told}"
    );
}
