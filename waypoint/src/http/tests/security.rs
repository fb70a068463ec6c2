//! Who may: tokens, policies, external authorizers; and limits and faults.

use std::time::Duration;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use mesh::{
    l7::{
        authorization::{
            Either, OperationMatch, PathTemplate, PolicyAction, PolicyRule, RequestPolicy,
            SourceMatch, ValueMatch,
        },
        config::{
            AuthorizerBody, AuthorizerProtocol, ExternalAuthorizer, Normalization, ProxyHeaders,
            WaypointConfig,
        },
        name::Target,
        request_authentication::{Jwks, JwtRule, RequestAuthentication, TokenPlace},
        route::{Abort, Action, Fault, HttpRule, RateLimit, WeightedBackend},
        served::AppProtocol,
        view::Resource,
    },
    names::PolicyKey,
};
use proto::envoy::service::auth::v3::{
    CheckRequest, CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse,
    check_response::HttpResponse,
};

use super::rig::{Answer, AnyBody, Backend, PORT, Rig, SERVICE, full};

fn key(name: &str) -> PolicyKey {
    PolicyKey {
        namespace: "demo".into(),
        name: name.into(),
    }
}

fn any<T>(values: Vec<T>) -> Either<T> {
    Either {
        values,
        not_values: Vec::new(),
    }
}

fn policy(name: &str, action: PolicyAction, rules: Vec<PolicyRule>) -> Resource {
    Resource::Policy(RequestPolicy {
        key: key(name),
        targets: vec![Target::Service(SERVICE.parse().unwrap())],
        action,
        dry_run: false,
        rules,
        faults: Vec::new(),
    })
}

fn to_path(path: &str) -> PolicyRule {
    PolicyRule {
        to: vec![OperationMatch {
            paths: any(vec![PathTemplate::Value(ValueMatch::Exact(path.into()))]),
            ..OperationMatch::default()
        }],
        ..PolicyRule::default()
    }
}

fn from_user() -> PolicyRule {
    PolicyRule {
        from: vec![SourceMatch {
            request_principals: any(vec![ValueMatch::Present]),
            ..SourceMatch::default()
        }],
        ..PolicyRule::default()
    }
}

async fn rig_of(version: Version) -> (Rig, Backend) {
    let echo = Backend::echo(version, "one").await;
    (Rig::new(version, &[&echo]).await, echo)
}

/// A rule that leads to the service, changed.
fn rule(change: impl FnOnce(&mut HttpRule)) -> HttpRule {
    let backend = mesh::l7::route::Backend::Service {
        service: SERVICE.parse().unwrap(),
        port: PORT,
        subset: None,
    };
    let action = Action::Forward(vec![WeightedBackend::new(1, backend)]);
    let mut rule = HttpRule::new(Vec::new(), action);
    change(&mut rule);
    rule
}

#[tokio::test]
async fn a_denied_path_is_refused_however_it_is_written() {
    let (rig, echo) = rig_of(Version::HTTP_11).await;
    rig.tell([policy(
        "no-admin",
        PolicyAction::Deny,
        vec![to_path("/admin")],
    )]);
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/").await.status, StatusCode::OK);
    for path in [
        "/admin",
        "/admin?x=1",
        "/a/../admin",
        "/./admin",
        "/%61dmin",
    ] {
        let answer = client.get(path).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{path}");
        assert_eq!(answer.body, "RBAC: access denied");
    }
    assert_eq!(echo.requests(), 1);
}

#[tokio::test]
async fn a_grpc_client_is_told_permission_denied() {
    let (rig, _echo) = rig_of(Version::HTTP_2).await;
    rig.tell([policy("nobody", PolicyAction::Allow, Vec::new())]);
    let mut client = rig.client(Version::HTTP_2).await;
    let request = client.request("POST", "/pkg.Service/Method");
    let request = request.header("content-type", "application/grpc");
    let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("grpc-status"), "7");
    assert_eq!(answer.header("grpc-message"), "RBAC: access denied");
}

#[tokio::test]
async fn a_request_that_no_rule_matches_is_refused_before_it_is_told_so() {
    let (rig, _echo) = rig_of(Version::HTTP_11).await;
    let exact = mesh::l7::route::PathMatch::Exact("/there".into());
    rig.route(vec![rule(|rule| {
        rule.matches = vec![mesh::l7::route::HttpMatch {
            path: Some(exact),
            ..mesh::l7::route::HttpMatch::default()
        }];
    })]);
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/elsewhere").await.status, StatusCode::NOT_FOUND);
    rig.tell([policy("nobody", PolicyAction::Allow, Vec::new())]);
    assert_eq!(client.get("/elsewhere").await.status, StatusCode::FORBIDDEN);
}

struct Issuer(Ed25519KeyPair);

impl Issuer {
    fn new() -> Self {
        Self(Ed25519KeyPair::generate().unwrap())
    }

    fn rule(&self) -> JwtRule {
        let x = URL_SAFE_NO_PAD.encode(self.0.public_key().as_ref());
        let keys = serde_json::json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}]});
        JwtRule {
            issuer: "https://issuer".into(),
            audiences: Vec::new(),
            keys: Jwks::Keys(keys.to_string().into()),
            keys_from: Some("https://issuer/keys".into()),
            from: Vec::new(),
            payload_header: None,
            claim_headers: vec![("x-sub".parse().unwrap(), vec!["sub".into()])],
            forward_token: false,
            space_delimited_claims: Vec::new(),
            timeout: Duration::from_secs(5),
        }
    }

    fn token(&self, group: &str) -> String {
        let encode = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = encode(serde_json::json!({"alg": "EdDSA"}));
        let claims = serde_json::json!({"iss": "https://issuer", "sub": "me", "group": group});
        let message = format!("{header}.{}", encode(claims));
        let signature = self.0.sign(message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }
}

fn authentication(rule: JwtRule) -> Resource {
    Resource::Authentication(RequestAuthentication {
        key: key("jwt"),
        targets: vec![Target::Waypoint],
        rules: vec![rule],
    })
}

#[tokio::test]
async fn users_with_a_token_may_and_others_may_not() {
    let (rig, _echo) = rig_of(Version::HTTP_11).await;
    let issuer = Issuer::new();
    rig.tell([
        authentication(issuer.rule()),
        policy("users", PolicyAction::Allow, vec![from_user()]),
    ]);
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/").await.status, StatusCode::FORBIDDEN);
    let mut send = async |token: &str| {
        let request = client.request("GET", "/").header("x-sub", "root");
        let request = request.header("authorization", format!("Bearer {token}"));
        Answer::of(client.send(request.body(full("")).unwrap()).await).await
    };
    let answer = send(&issuer.token("a")).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.header("x-got-x-sub"), "me");
    assert_eq!(answer.header("x-got-authorization"), "");
    for bad in [Issuer::new().token("a"), "x".to_owned()] {
        let answer = send(&bad).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        assert!(
            answer
                .header("www-authenticate")
                .starts_with("Bearer realm=\"http://echo/\"")
        );
        assert!(answer.body.starts_with(b"Jwt "));
    }
}

#[tokio::test]
async fn a_control_plane_that_has_not_fetched_keys_yet_takes_none_away() {
    let (rig, _echo) = rig_of(Version::HTTP_11).await;
    let issuer = Issuer::new();
    let without = |from: Option<&str>| {
        authentication(JwtRule {
            keys: Jwks::Unavailable("not fetched yet".into()),
            keys_from: from.map(Into::into),
            ..issuer.rule()
        })
    };
    let mut client = rig.client(Version::HTTP_11).await;
    let mut status_after = async |resource: Resource| {
        rig.tell([resource]);
        let token = format!("Bearer {}", issuer.token("a"));
        let request = client.request("GET", "/").header("authorization", token);
        let answer = client.send(request.body(full("")).unwrap()).await;
        Answer::of(answer).await.status
    };
    let own = Some("https://issuer/keys");
    assert_eq!(status_after(without(own)).await, StatusCode::UNAUTHORIZED);
    let fetched = authentication(issuer.rule());
    assert_eq!(status_after(fetched).await, StatusCode::OK);
    assert_eq!(status_after(without(own)).await, StatusCode::OK);
    let moved = without(Some("https://other/keys"));
    assert_eq!(status_after(moved).await, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn routes_are_selected_by_verified_claims() {
    let (rig, _echo) = rig_of(Version::HTTP_11).await;
    let issuer = Issuer::new();
    let place = TokenPlace::Query("token".into());
    rig.tell([authentication(JwtRule {
        from: vec![place],
        ..issuer.rule()
    })]);
    let exact = mesh::l7::route::TextMatch::Exact("staff".into());
    rig.route(vec![rule(|rule| {
        rule.matches = vec![mesh::l7::route::HttpMatch {
            claims: vec![(vec!["group".into()], exact)],
            ..mesh::l7::route::HttpMatch::default()
        }];
    })]);
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/").await.status, StatusCode::NOT_FOUND);
    let others = client
        .get(&format!("/?token={}", issuer.token("others")))
        .await;
    assert_eq!(others.status, StatusCode::NOT_FOUND);
    let staff = client
        .get(&format!("/a?token={}&b=1", issuer.token("staff")))
        .await;
    assert_eq!(staff.status, StatusCode::OK);
    assert!(staff.header("x-target").ends_with("/a?b=1"), "{staff:?}");
}

fn config(protocol: AuthorizerProtocol) -> Resource {
    // Longer than any answer takes, on any machine.
    config_within(Duration::from_secs(20), protocol)
}

fn config_within(timeout: Duration, protocol: AuthorizerProtocol) -> Resource {
    let authorizer = ExternalAuthorizer {
        service: "demo/authz.demo.svc.cluster.local".parse().unwrap(),
        port: PORT,
        protocol,
        timeout,
        fail_open: false,
        status_on_error: 403,
        body: None,
    };
    Resource::Config(WaypointConfig {
        trust_domain_aliases: Vec::new(),
        normalization: Normalization::default(),
        authorizers: [("authz".into(), authorizer)].into(),
        log_providers: [].into(),
        trace_providers: [].into(),
        access_logs: Vec::new(),
        tracing: Vec::new(),
        sampling_per_million: 0,
        forward_client_identity: false,
        default_retry: None,
        headers: ProxyHeaders::default(),
        histogram_buckets: Vec::new(),
    })
}

/// Refuses `/no` and does not answer `/slow`.
async fn grpc_authorizer(request: Request<Incoming>) -> Response<AnyBody> {
    use http_body_util::BodyExt;
    let bytes = request.into_body().collect().await.unwrap().to_bytes();
    let check: CheckRequest = prost::Message::decode(&bytes[5..]).unwrap();
    let attributes = check.attributes.unwrap();
    let path = attributes.request.unwrap().http.unwrap().path;
    if path == "/slow" {
        std::future::pending::<()>().await;
    }
    let denied = DeniedHttpResponse {
        status: Some(HttpStatus { code: 418 }),
        body: "not you".to_owned(),
        ..DeniedHttpResponse::default()
    };
    let header = proto::xds_core::HeaderValueOption {
        header: Some(proto::xds_core::HeaderValue {
            key: "x-user".to_owned(),
            value: attributes.source.unwrap().principal,
            raw_value: Vec::new(),
        }),
        ..proto::xds_core::HeaderValueOption::default()
    };
    let ok = OkHttpResponse {
        headers: vec![header.clone()],
        response_headers_to_add: vec![header],
        ..OkHttpResponse::default()
    };
    let answer = CheckResponse {
        http_response: Some(match path.as_str() {
            "/no" => HttpResponse::DeniedResponse(denied),
            _ => HttpResponse::OkResponse(ok),
        }),
        ..CheckResponse::default()
    };
    let message = prost::Message::encode_to_vec(&answer);
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0][..], &length, &message].concat();
    Response::builder()
        .header("grpc-status", "0")
        .body(full(body))
        .unwrap()
}

#[tokio::test]
async fn a_grpc_authorizer_of_the_mesh_decides() {
    let (rig, echo) = rig_of(Version::HTTP_11).await;
    let authorizer = Backend::start(Version::HTTP_2, grpc_authorizer).await;
    let grpc = AuthorizerProtocol::Grpc {
        allowed_headers: Vec::new(),
    };
    let custom = PolicyAction::Custom("authz".into());
    rig.tell([
        config(grpc.clone()),
        policy("ask", custom, vec![PolicyRule::default()]),
    ]);
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(
        client.get("/").await.status,
        StatusCode::FORBIDDEN,
        "nobody to ask"
    );
    let name = "demo/authz.demo.svc.cluster.local";
    rig.serve(name, AppProtocol::Grpc, &[&authorizer]);
    let answer = client.get("/").await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    let client_identity = "spiffe://cluster.local/ns/web/sa/client";
    assert_eq!(answer.header("x-got-x-user"), client_identity);
    assert_eq!(answer.header("x-user"), client_identity);
    let answer = client.get("/no").await;
    assert_eq!(
        (answer.status.as_u16(), &*answer.body),
        (418, &b"not you"[..])
    );
    rig.tell([config_within(Duration::from_millis(100), grpc)]);
    assert_eq!(client.get("/slow").await.status, StatusCode::FORBIDDEN);
    assert_eq!(echo.requests(), 1);
}

#[tokio::test]
async fn a_body_that_an_authorizer_must_see_and_is_too_long_is_413() {
    let (rig, echo) = rig_of(Version::HTTP_11).await;
    let authorizer = Backend::start(Version::HTTP_2, grpc_authorizer).await;
    let name = "demo/authz.demo.svc.cluster.local";
    rig.serve(name, AppProtocol::Grpc, &[&authorizer]);
    let Resource::Config(mut config) = config(AuthorizerProtocol::Grpc {
        allowed_headers: Vec::new(),
    }) else {
        panic!("a configuration");
    };
    for authorizer in config.authorizers.values_mut() {
        authorizer.body = Some(AuthorizerBody {
            max_bytes: 8,
            allow_partial: false,
            as_bytes: false,
        });
    }
    let custom = PolicyAction::Custom("authz".into());
    rig.tell([
        Resource::Config(config),
        policy("ask", custom, vec![PolicyRule::default()]),
    ]);
    let mut client = rig.client(Version::HTTP_2).await;
    for (body, expected) in [("8 bytes.", 200), ("nine of it", 413)] {
        let request = client.request("POST", "/").body(full(body)).unwrap();
        assert_eq!(client.send(request).await.status().as_u16(), expected);
    }
    assert_eq!(echo.requests(), 1);
}

#[tokio::test]
async fn an_http_authorizer_of_a_route_decides() {
    let (rig, echo) = rig_of(Version::HTTP_11).await;
    let authorizer = Backend::start(Version::HTTP_11, async |request: Request<Incoming>| {
        let allowed = request.uri() == "/check/yes" && request.headers()["host"] == "echo";
        let status = if allowed { 200 } else { 401 };
        Response::builder()
            .status(status)
            .body(full("asked"))
            .unwrap()
    })
    .await;
    rig.serve(
        "demo/authz.demo.svc.cluster.local",
        AppProtocol::Http,
        &[&authorizer],
    );
    rig.tell([config(AuthorizerProtocol::Http {
        path_prefix: "/check".into(),
        allowed_headers: Vec::new(),
        add_headers: Vec::new(),
        to_upstream: Vec::new(),
        to_client_on_deny: Vec::new(),
        to_client_on_allow: Vec::new(),
    })]);
    rig.route(vec![rule(|rule| {
        rule.external_authorizer = Some("authz".into())
    })]);
    let mut client = rig.client(Version::HTTP_2).await;
    assert_eq!(client.get("/yes").await.status, StatusCode::OK);
    let answer = client.get("/no").await;
    assert_eq!(
        (answer.status.as_u16(), &*answer.body),
        (401, &b"asked"[..])
    );
    assert_eq!(echo.requests(), 1);
    rig.route(vec![rule(|rule| {
        rule.external_authorizer = Some("nobody".into())
    })]);
    assert_eq!(client.get("/yes").await.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn requests_beyond_a_limit_are_told_when_to_come_again() {
    let (rig, echo) = rig_of(Version::HTTP_11).await;
    rig.route(vec![rule(|rule| {
        rule.rate_limit = Some(RateLimit {
            max_tokens: 2,
            tokens_per_fill: 1,
            fill_interval: Duration::from_secs(3_600),
        });
    })]);
    let mut client = rig.client(Version::HTTP_11).await;
    for _ in 0..2 {
        assert_eq!(client.get("/").await.status, StatusCode::OK);
    }
    let answer = client.get("/").await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(answer.header("x-envoy-ratelimited"), "true");
    assert_eq!(answer.header("x-ratelimit-limit"), "2");
    assert_eq!(answer.header("x-ratelimit-remaining"), "0");
    assert_eq!(answer.header("x-ratelimit-reset"), "3600");
    assert_eq!(echo.requests(), 2);
}

#[tokio::test]
async fn faults_delay_and_abort() {
    let (rig, echo) = rig_of(Version::HTTP_11).await;
    let faulty = |abort| {
        vec![rule(|rule| {
            rule.fault = Some(Fault {
                delay: Some((1_000_000, Duration::from_millis(20))),
                abort: Some((1_000_000, abort)),
            });
        })]
    };
    rig.route(faulty(Abort::Http(StatusCode::IM_A_TEAPOT)));
    let mut client = rig.client(Version::HTTP_2).await;
    let began = std::time::Instant::now();
    let answer = client.get("/").await;
    assert!(began.elapsed() >= Duration::from_millis(20));
    assert_eq!(answer.status, StatusCode::IM_A_TEAPOT);
    assert_eq!(answer.body, "fault filter abort");
    rig.route(faulty(Abort::Grpc(8)));
    let request = client.request("POST", "/s/m");
    let request = request.header("content-type", "application/grpc");
    let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
    assert_eq!(answer.header("grpc-status"), "8");
    assert_eq!(echo.requests(), 0);
}
