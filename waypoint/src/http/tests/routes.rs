//! What a request is told by what its route says: the cases of the Gateway API's mesh conformance, as tables.

use std::time::Duration;

use http::{HeaderValue, StatusCode, Version};
use mesh::l7::{
    config::{ProxyHeaders, WaypointConfig},
    route::{
        Action, Backend as Target, Cors, DirectResponse, HeaderEdit, HeaderMatch, HttpMatch,
        HttpRule, OriginMatch, PathMatch, PathRewrite, Redirect, RedirectPort, Rewrite,
        SessionCarrier, SessionPersistence, TextMatch, WeightedBackend,
    },
    served::AppProtocol,
    view,
};

use super::rig::{Answer, Backend, PORT, Rig, full};

pub(super) fn to(service: &str) -> Target {
    Target::Service {
        service: format!("demo/{service}.demo.svc.cluster.local")
            .parse()
            .unwrap(),
        port: PORT,
        subset: None,
    }
}

fn rule(path: PathMatch, action: Action) -> HttpRule {
    let matches = vec![HttpMatch {
        path: Some(path),
        ..HttpMatch::default()
    }];
    HttpRule::new(matches, action)
}

fn forward(service: &str) -> Action {
    Action::Forward(vec![WeightedBackend::new(1, to(service))])
}

fn segments(prefix: &str) -> PathMatch {
    PathMatch::Segments(prefix.into())
}

/// Two services, each with one endpoint that tells its name.
pub(super) async fn two() -> (Rig, Backend, Backend) {
    let (v1, v2) = (
        Backend::echo(Version::HTTP_11, "v1").await,
        Backend::echo(Version::HTTP_11, "v2").await,
    );
    let rig = Rig::new(Version::HTTP_11, &[]).await;
    let service = |name: &str| format!("demo/{name}.demo.svc.cluster.local");
    rig.serve(&service("v1"), AppProtocol::Http, &[&v1]);
    rig.serve(&service("v2"), AppProtocol::Http, &[&v2]);
    (rig, v1, v2)
}

#[tokio::test]
async fn the_most_specific_rule_is_taken_and_none_is_404() {
    let (rig, _v1, _v2) = two().await;
    let mut by_header = rule(segments("/two"), forward("v1"));
    by_header.matches[0].headers = vec![HeaderMatch {
        name: "version".parse().unwrap(),
        value: TextMatch::Exact("one".into()),
    }];
    rig.route(vec![
        rule(segments("/"), forward("v1")),
        rule(segments("/two"), forward("v2")),
        by_header,
    ]);
    let mut client = rig.client(Version::HTTP_11).await;
    for (path, version, expected) in [
        ("/", "", "v1"),
        ("/two", "", "v2"),
        ("/two/more", "", "v2"),
        ("/twofold", "", "v1"),
        ("/two", "one", "v1"),
        ("/x/../two", "", "v2"),
        ("/%74wo", "", "v2"),
    ] {
        let request = client.request("GET", path).header("version", version);
        let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
        assert_eq!(answer.header("x-backend"), expected, "{path} {version}");
    }
    rig.route(vec![rule(segments("/two"), forward("v2"))]);
    let answer = client.get("/other").await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn what_leads_nowhere_is_500_and_only_for_its_share() {
    let (rig, _v1, _v2) = two().await;
    let invalid = |weight| WeightedBackend::new(weight, Target::Invalid("no such".into()));
    let share = vec![WeightedBackend::new(1, to("v1")), invalid(1)];
    rig.route(vec![
        rule(segments("/share"), Action::Forward(share)),
        rule(segments("/invalid"), Action::Forward(vec![invalid(1)])),
        rule(
            segments("/zero"),
            Action::Forward(vec![WeightedBackend::new(0, to("v1"))]),
        ),
        rule(segments("/empty"), Action::Forward(Vec::new())),
        rule(segments("/unknown"), forward("nobody")),
        rule(
            segments("/broken"),
            Action::Invalid("not understood".into()),
        ),
    ]);
    let mut client = rig.client(Version::HTTP_11).await;
    for path in ["/invalid", "/zero", "/empty", "/unknown", "/broken"] {
        let status = client.get(path).await.status;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{path}");
    }
    let mut statuses = Vec::new();
    for _ in 0..60 {
        statuses.push(client.get("/share").await.status);
    }
    assert!(statuses.contains(&StatusCode::OK));
    assert!(statuses.contains(&StatusCode::INTERNAL_SERVER_ERROR));
}

#[tokio::test]
async fn weights_are_shares() {
    let (rig, v1, v2) = two().await;
    rig.route(vec![rule(
        segments("/"),
        Action::Forward(vec![
            WeightedBackend::new(9, to("v1")),
            WeightedBackend::new(1, to("v2")),
        ]),
    )]);
    let mut client = rig.client(Version::HTTP_11).await;
    for _ in 0..500 {
        client.get("/").await;
    }
    assert_eq!(v1.requests() + v2.requests(), 500);
    assert!((20..=90).contains(&v2.requests()), "{}", v2.requests());
}

#[tokio::test]
async fn headers_are_edited_by_the_rule_before_the_backend() {
    let (rig, _v1, _v2) = two().await;
    let header =
        |name: &str, value: &'static str| (name.parse().unwrap(), HeaderValue::from_static(value));
    let mut backend = WeightedBackend::new(1, to("v1"));
    backend.request_headers.add = vec![header("x-edit", "backend")];
    backend.response_headers.set = vec![header("x-answer", "backend")];
    let mut edited = rule(segments("/"), Action::Forward(vec![backend]));
    edited.request_headers = HeaderEdit {
        set: vec![header("x-edit", "rule")],
        add: Vec::new(),
        remove: vec!["x-gone".parse().unwrap()],
    };
    edited.response_headers.add = vec![header("x-answer", "rule")];
    rig.route(vec![edited]);
    let mut client = rig.client(Version::HTTP_11).await;
    let request = client
        .request("GET", "/")
        .header("x-edit", "client")
        .header("x-gone", "1");
    let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
    let values = |name: &str| {
        let all = answer.headers.get_all(name).iter();
        let all: Vec<_> = all.map(|it| it.to_str().unwrap().to_owned()).collect();
        all.join(",")
    };
    assert_eq!(values("x-got-x-edit").replace(", ", ","), "rule,backend");
    assert_eq!(values("x-answer").replace(", ", ","), "backend,rule");
    assert_eq!(answer.header("x-got-x-gone"), "");
}

#[tokio::test]
async fn paths_and_hosts_are_rewritten_and_the_query_stays() {
    let (rig, _v1, _v2) = two().await;
    let rewritten = |prefix: &str, path: PathRewrite, host: Option<&str>| {
        let mut rule = rule(segments(prefix), forward("v1"));
        rule.rewrite = Some(Rewrite {
            authority: host.map(Into::into),
            path: Some(path),
        });
        rule
    };
    rig.route(vec![
        rewritten("/prefix", PathRewrite::Prefix("/one".into()), None),
        rewritten(
            "/strip",
            PathRewrite::Prefix("/".into()),
            Some("other.example"),
        ),
        rewritten("/full", PathRewrite::Full("/whole".into()), None),
    ]);
    rig.tell([view::Resource::Config(WaypointConfig {
        headers: ProxyHeaders {
            forwarded_host: true,
            forwarded_port: true,
            ..ProxyHeaders::default()
        },
        ..WaypointConfig::default()
    })]);
    let mut client = rig.client(Version::HTTP_11).await;
    for (path, target, host) in [
        ("/prefix/a?q=1", "/one/a?q=1", "echo"),
        ("/prefix", "/one", "echo"),
        ("/strip/a", "/a", "other.example"),
        ("/strip", "/", "other.example"),
        ("/full/a?q", "/whole?q", "echo"),
    ] {
        let answer = client.get(path).await;
        assert_eq!(answer.header("x-target"), target, "{path}");
        assert_eq!(answer.header("x-got-host"), host, "{path}");
        assert_eq!(answer.header("x-got-x-envoy-original-path"), path);
        let told = if host == "echo" { "" } else { "echo" };
        assert_eq!(answer.header("x-got-x-forwarded-host"), told, "{path}");
        assert_eq!(answer.header("x-got-x-forwarded-port"), "80");
    }
}

#[tokio::test]
async fn redirects_and_fixed_responses_need_no_backend() {
    let rig = Rig::new(Version::HTTP_11, &[]).await;
    let redirect = Redirect {
        scheme: Some("https".into()),
        hostname: Some("example.org".into()),
        path: Some(PathRewrite::Prefix("/new".into())),
        port: RedirectPort::Derived,
        status: StatusCode::PERMANENT_REDIRECT,
    };
    let fixed = DirectResponse {
        status: StatusCode::IM_A_TEAPOT,
        body: b"short and stout".to_vec(),
    };
    rig.route(vec![
        rule(segments("/old"), Action::Redirect(redirect)),
        rule(segments("/tea"), Action::Respond(fixed)),
    ]);
    let mut client = rig.client(Version::HTTP_2).await;
    let answer = client.get("/old/a?q=1").await;
    assert_eq!(answer.status, StatusCode::PERMANENT_REDIRECT);
    assert_eq!(answer.header("location"), "https://example.org/new/a?q=1");
    let answer = client.get("/tea").await;
    assert_eq!(answer.status, StatusCode::IM_A_TEAPOT);
    assert_eq!(answer.body, "short and stout");
}

#[tokio::test]
async fn preflights_are_answered_here_and_answers_are_marked() {
    let (rig, v1, _v2) = two().await;
    let mut crossing = rule(segments("/"), forward("v1"));
    crossing.cors = Some(Cors {
        allow_origins: vec![OriginMatch::Wildcard("https://*.example".into())],
        allow_methods: vec!["GET".into(), "PUT".into()],
        ..Cors::default()
    });
    rig.route(vec![crossing]);
    let mut client = rig.client(Version::HTTP_11).await;
    let preflight = client
        .request("OPTIONS", "/")
        .header("origin", "https://a.example")
        .header("access-control-request-method", "PUT");
    let answer = Answer::of(client.send(preflight.body(full("")).unwrap()).await).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(
        answer.header("access-control-allow-origin"),
        "https://a.example"
    );
    assert_eq!(v1.requests(), 0);
    let request = client
        .request("GET", "/")
        .header("origin", "https://a.example");
    let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
    assert_eq!(answer.header("x-backend"), "v1");
    assert_eq!(
        answer.header("access-control-allow-origin"),
        "https://a.example"
    );
}

#[tokio::test]
async fn a_session_keeps_its_endpoint_through_new_weights() {
    let (rig, _v1, _v2) = two().await;
    let weighted = |v1, v2| {
        let mut kept = rule(
            segments("/"),
            Action::Forward(vec![
                WeightedBackend::new(v1, to("v1")),
                WeightedBackend::new(v2, to("v2")),
            ]),
        );
        kept.session = Some(SessionPersistence {
            carrier: SessionCarrier::Cookie {
                name: "sticky".into(),
                path: None,
                permanent: true,
            },
            absolute_timeout: Some(Duration::from_secs(60)),
        });
        vec![kept]
    };
    rig.route(weighted(1, 0));
    let mut client = rig.client(Version::HTTP_11).await;
    let first = client.get("/").await;
    let set = first.header("set-cookie").to_owned();
    assert!(
        set.starts_with("sticky=") && set.contains("Max-Age="),
        "{set}"
    );
    let cookie = set.split(';').next().unwrap().to_owned();
    rig.route(weighted(1, 99));
    for _ in 0..20 {
        let request = client.request("GET", "/").header("cookie", &cookie);
        let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
        assert_eq!(answer.header("x-backend"), "v1");
        assert_eq!(answer.header("set-cookie"), "", "it is no news");
    }
    rig.route(weighted(0, 1));
    let request = client.request("GET", "/").header("cookie", &cookie);
    let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
    assert_eq!(answer.header("x-backend"), "v2", "its backend is gone");
    assert!(answer.header("set-cookie").starts_with("sticky="));
}
