use std::{sync::Arc, time::Duration};

use ::http::{HeaderValue, Request, Response, Uri};
use mesh::{l7::config::AuthorizerBody, names::NamespacedHostname};
use parking_lot::Mutex;
use prost::Message;
use proto::{
    envoy::service::auth::v3::{
        CheckRequest, CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse,
        check_response::HttpResponse,
    },
    xds_core::{HeaderValue as Told, HeaderValueOption, QueryParameter},
};

use super::*;
use crate::service_call::{Answer, Answering, Call};

/// What an authorizer does when it is asked.
#[derive(Clone)]
enum Does {
    Answers(u16, HeaderMap, Bytes),
    IsSilent,
    IsDown,
}

struct Authorizer {
    does: Does,
    asked: Arc<Mutex<Option<Call>>>,
}

impl Transport for Authorizer {
    fn call(&self, call: Call) -> Answering {
        *self.asked.lock() = Some(call);
        let does = self.does.clone();
        Box::pin(async move {
            match does {
                Does::IsSilent => std::future::pending().await,
                Does::IsDown => Err(CallError::Unreachable("connection refused".to_owned())),
                Does::Answers(status, headers, body) => {
                    let mut head = Response::new(()).into_parts().0;
                    head.status = StatusCode::from_u16(status).unwrap();
                    head.headers = headers.clone();
                    Ok(Answer {
                        head,
                        body,
                        trailers: HeaderMap::new(),
                    })
                }
            }
        })
    }
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    let pairs = pairs.iter().map(|(name, value)| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        )
    });
    pairs.collect()
}

fn grpc() -> AuthorizerProtocol {
    AuthorizerProtocol::Grpc {
        allowed_headers: Vec::new(),
    }
}

fn http(told_on_deny: &[&str]) -> AuthorizerProtocol {
    let list = |it: &[&str]| it.iter().map(|&it| it.into()).collect();
    AuthorizerProtocol::Http {
        path_prefix: "/check".into(),
        allowed_headers: list(&["x-told", "x-b-*"]),
        add_headers: vec![(HeaderName::from_static("x-mesh"), "leyline".into())],
        to_upstream: list(&["x-user"]),
        to_client_on_deny: list(told_on_deny),
        to_client_on_allow: list(&["x-note"]),
    }
}

fn authorizer(protocol: AuthorizerProtocol) -> ExternalAuthorizer {
    ExternalAuthorizer {
        service: NamespacedHostname {
            namespace: "auth".into(),
            hostname: "authz.auth.svc.cluster.local".into(),
        },
        port: 9000,
        protocol,
        timeout: Duration::from_secs(2),
        fail_open: false,
        status_on_error: 403,
        body: None,
    }
}

fn request() -> Parts {
    let request = Request::builder()
        .method("POST")
        .uri("http://web.default/a?b=1&c=2")
        .header("x-told", "1")
        .header("x-told", "2")
        .header("x-b-3", "3")
        .header("x-secret", "s")
        .header("authorization", "Bearer t")
        .header("content-length", "4")
        .header("x-request-id", "id-1");
    request.body(()).unwrap().into_parts().0
}

/// The verdict, and what the authorizer was asked.
async fn ask_of(
    does: Does,
    authorizer: &ExternalAuthorizer,
    body: Option<Body>,
) -> (Verdict, Call) {
    let asked = Arc::new(Mutex::new(None));
    let transport = Authorizer {
        does,
        asked: Arc::clone(&asked),
    };
    let parts = request();
    let question = Question {
        parts: &parts,
        authority: "web.default",
        scheme: "http",
        body,
        source: "10.0.0.9:4000".parse().unwrap(),
        source_principal: "spiffe://cluster.local/ns/a/sa/client",
        destination: "10.96.0.1:80".parse().unwrap(),
        destination_principal: "spiffe://cluster.local/ns/a/sa/waypoint",
        start: SystemTime::UNIX_EPOCH + Duration::from_millis(1_500),
    };
    let verdict = ask(&transport, "authz", authorizer, &question).await;
    let call = asked.lock().take().unwrap();
    (verdict, call)
}

fn check_answer(response: &CheckResponse) -> Does {
    let message = response.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0][..], &length, &message].concat();
    Does::Answers(200, headers(&[("grpc-status", "0")]), body.into())
}

fn option(key: &str, value: &str, append: Option<bool>) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(Told {
            key: key.to_owned(),
            value: value.to_owned(),
            raw_value: Vec::new(),
        }),
        append,
        ..HeaderValueOption::default()
    }
}

fn status(code: i32) -> Option<proto::google::rpc::Status> {
    Some(proto::google::rpc::Status {
        code,
        ..proto::google::rpc::Status::default()
    })
}

#[track_caller]
fn denied(verdict: Verdict) -> Denial {
    match verdict {
        Verdict::Deny(denial) => denial,
        Verdict::Allow(edits) => panic!("allowed: {edits:?}"),
    }
}

#[track_caller]
fn allowed(verdict: Verdict) -> Edits {
    match verdict {
        Verdict::Allow(edits) => edits,
        Verdict::Deny(denial) => panic!("denied: {denial:?}"),
    }
}

#[tokio::test]
async fn a_grpc_authorizer_is_told_of_the_request() {
    let (verdict, call) = ask_of(
        check_answer(&CheckResponse::default()),
        &authorizer(grpc()),
        None,
    )
    .await;
    assert_eq!(allowed(verdict), Edits::default());
    assert!(call.http2);
    assert_eq!(
        call.request.uri().path(),
        "/envoy.service.auth.v3.Authorization/Check"
    );
    let told = CheckRequest::decode(&call.request.body()[5..]).unwrap();
    let told = told.attributes.unwrap();
    assert_eq!(
        told.source.unwrap().principal,
        "spiffe://cluster.local/ns/a/sa/client"
    );
    let request = told.request.unwrap();
    assert_eq!(request.time.unwrap().nanos, 500_000_000);
    let http = request.http.unwrap();
    assert_eq!(
        (http.method.as_str(), http.path.as_str(), http.size),
        ("POST", "/a?b=1&c=2", 4)
    );
    assert_eq!(
        (http.host.as_str(), http.id.as_str()),
        ("web.default", "id-1")
    );
    assert_eq!(http.headers["x-told"], "1,2");
    assert_eq!(http.headers["x-secret"], "s");
    assert_eq!(http.headers[":authority"], "web.default");
}

#[tokio::test]
async fn a_grpc_authorizer_is_told_listed_headers_and_the_body_alone() {
    let mut authorizer = authorizer(AuthorizerProtocol::Grpc {
        allowed_headers: vec!["X-Told".into()],
    });
    for (as_bytes, text, raw) in [(false, "ab", &b""[..]), (true, "", b"ab")] {
        authorizer.body = Some(AuthorizerBody {
            max_bytes: 2,
            allow_partial: true,
            as_bytes,
        });
        let body = Body {
            bytes: Bytes::from_static(b"ab"),
            partial: true,
        };
        let answer = check_answer(&CheckResponse::default());
        let (_, call) = ask_of(answer, &authorizer, Some(body)).await;
        let told = CheckRequest::decode(&call.request.body()[5..]).unwrap();
        let http = told.attributes.unwrap().request.unwrap().http.unwrap();
        assert!(!http.headers.contains_key("x-secret"));
        assert_eq!(http.headers["x-envoy-auth-partial-body"], "true");
        assert_eq!((http.body.as_str(), &*http.raw_body), (text, raw));
    }
}

#[tokio::test]
async fn an_approval_changes_request_and_response() {
    let parameter = |key: &str, value: &str| QueryParameter {
        key: key.to_owned(),
        value: value.to_owned(),
    };
    let ok = OkHttpResponse {
        headers: vec![
            option("x-user", "me", None),
            option("x-told", "3", Some(true)),
            option("host", "elsewhere", None),
            option(":path", "/root", None),
            option("content-length", "0", None),
        ],
        headers_to_remove: vec!["authorization".to_owned(), "host".to_owned()],
        response_headers_to_add: vec![option("x-note", "n", Some(true))],
        query_parameters_to_set: vec![parameter("b", "2")],
        query_parameters_to_remove: vec!["c".to_owned()],
        ..OkHttpResponse::default()
    };
    let response = CheckResponse {
        status: status(0),
        http_response: Some(HttpResponse::OkResponse(ok)),
        ..CheckResponse::default()
    };
    let (verdict, _) = ask_of(check_answer(&response), &authorizer(grpc()), None).await;
    let edits = allowed(verdict);
    let mut parts = request();
    edits.apply(&mut parts.uri, &mut parts.headers);
    assert_eq!(
        parts.uri,
        "http://web.default/a?b=2".parse::<Uri>().unwrap()
    );
    assert_eq!(parts.headers["x-user"], "me");
    assert_eq!(parts.headers.get_all("x-told").iter().count(), 3);
    assert_eq!(parts.headers["content-length"], "4");
    assert!(!parts.headers.contains_key("authorization"));
    assert!(!parts.headers.contains_key("host"));
    let mut of_response = HeaderMap::new();
    edits::change(&mut of_response, &edits.response);
    assert_eq!(of_response, headers(&[("x-note", "n")]));
}

#[tokio::test]
async fn a_refusal_is_the_clients_answer() {
    let denied_response = DeniedHttpResponse {
        status: Some(HttpStatus { code: 401 }),
        headers: vec![option("www-authenticate", "Basic", None)],
        body: "who are you?".to_owned(),
    };
    let response = |code, http_response| CheckResponse {
        status: status(code),
        http_response,
        ..CheckResponse::default()
    };
    let full = Some(HttpResponse::DeniedResponse(denied_response));
    for code in [7, 0] {
        let answer = check_answer(&response(code, full.clone()));
        let (verdict, _) = ask_of(answer, &authorizer(grpc()), None).await;
        let denial = denied(verdict);
        assert_eq!(denial.status, 401);
        assert_eq!(denial.headers, headers(&[("www-authenticate", "Basic")]));
        assert_eq!(
            (&*denial.body, denial.details),
            (&b"who are you?"[..], "ext_authz_denied")
        );
    }
    let (verdict, _) = ask_of(check_answer(&response(16, None)), &authorizer(grpc()), None).await;
    assert_eq!(denied(verdict).status, 403);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_answer_refuses_unless_it_fails_open() {
    let broken = |headers: HeaderMap, body: &'static [u8]| {
        Does::Answers(200, headers, Bytes::from_static(body))
    };
    let ok = || headers(&[("grpc-status", "0")]);
    let rows = [
        (grpc(), Does::IsSilent),
        (grpc(), Does::IsDown),
        (grpc(), Does::Answers(503, HeaderMap::new(), Bytes::new())),
        (grpc(), broken(HeaderMap::new(), b"\0\0\0\0\0")),
        (
            grpc(),
            broken(headers(&[("grpc-status", "14")]), b"\0\0\0\0\0"),
        ),
        (grpc(), broken(ok(), b"")),
        (grpc(), broken(ok(), b"\x01\0\0\0\0")),
        (grpc(), broken(ok(), b"\0\0\0\0\x05x")),
        (grpc(), broken(ok(), b"\0\0\0\0\x01\xff")),
        (http(&[]), Does::IsSilent),
        (http(&[]), Does::IsDown),
        (
            http(&[]),
            Does::Answers(500, HeaderMap::new(), Bytes::new()),
        ),
    ];
    for (protocol, does) in rows {
        let mut authorizer = authorizer(protocol);
        let (verdict, _) = ask_of(does.clone(), &authorizer, None).await;
        let denial = denied(verdict);
        assert_eq!(
            (denial.status.as_u16(), denial.details),
            (403, "ext_authz_error")
        );
        authorizer.status_on_error = 503;
        let (verdict, _) = ask_of(does.clone(), &authorizer, None).await;
        assert_eq!(denied(verdict).status, 503);
        authorizer.status_on_error = 200;
        let (verdict, _) = ask_of(does.clone(), &authorizer, None).await;
        assert_eq!(
            denied(verdict).status,
            403,
            "a failure is never an approval"
        );
        authorizer.fail_open = true;
        let (verdict, _) = ask_of(does, &authorizer, None).await;
        assert_eq!(allowed(verdict), Edits::default());
    }
}

#[tokio::test]
async fn an_http_authorizer_gets_a_request_like_the_clients() {
    let answer = Does::Answers(
        200,
        headers(&[("x-user", "me"), ("x-other", "o"), ("x-note", "n")]),
        Bytes::new(),
    );
    let (verdict, call) = ask_of(answer, &authorizer(http(&[])), None).await;
    assert!(!call.http2);
    assert_eq!(call.request.method(), "POST");
    assert_eq!(call.request.uri(), "http://web.default/check/a?b=1&c=2");
    let told = call.request.headers();
    assert_eq!(told.get_all("x-told").iter().count(), 2);
    assert_eq!(
        (&told["x-b-3"], &told["x-mesh"]),
        (&"3".parse().unwrap(), &"leyline".parse().unwrap())
    );
    assert!(told.contains_key("authorization"));
    assert!(!told.contains_key("x-secret") && !told.contains_key("content-length"));
    let edits = allowed(verdict);
    assert_eq!(edits.request.len(), 1);
    assert_eq!(edits.request[0].name, "x-user");
    assert_eq!(edits.response[0].name, "x-note");
}

#[tokio::test]
async fn an_http_refusal_tells_what_is_listed() {
    let answer = || {
        let told = headers(&[
            ("location", "/login"),
            ("x-why", "w"),
            ("x-other", "o"),
            ("connection", "close"),
        ]);
        Does::Answers(302, told, Bytes::from_static(b"no"))
    };
    let (verdict, _) = ask_of(answer(), &authorizer(http(&[])), None).await;
    let denial = denied(verdict);
    assert_eq!((denial.status.as_u16(), &*denial.body), (302, &b"no"[..]));
    assert_eq!(
        denial.headers,
        headers(&[("location", "/login"), ("x-why", "w"), ("x-other", "o")])
    );
    let (verdict, _) = ask_of(answer(), &authorizer(http(&["X-Why"])), None).await;
    assert_eq!(
        denied(verdict).headers,
        headers(&[("location", "/login"), ("x-why", "w")])
    );
    let redirect = Does::Answers(204, HeaderMap::new(), Bytes::new());
    let (verdict, _) = ask_of(redirect, &authorizer(http(&[])), None).await;
    assert_eq!(denied(verdict).status, 204, "200 alone is an approval");
}
