use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use axum::{body::Body, http::Request, routing::get};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tower::ServiceExt;

use super::*;
use crate::{drain, fixture::SOON};

fn admin() -> (Admin, Arc<AtomicUsize>) {
    let quits = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&quits);
    let quit = Arc::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let (subscriber, log) = log::subscriber(&log::Options::default(), io::sink()).expect("good");
    // The handle works as long as the subscriber lives.
    Box::leak(Box::new(subscriber));
    (Admin::new("ztunnel", Some(log), quit), quits)
}

async fn ask(router: &Router, method: &str, path: &str) -> (u16, String) {
    let request = Request::builder().method(method).uri(path);
    let request = request.body(Body::empty()).expect("a request");
    let response = router.clone().oneshot(request).await.expect("infallible");
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.expect("a body");
    let text = String::from_utf8(body.to_bytes().to_vec());
    (status, text.expect("text"))
}

#[tokio::test]
async fn the_dump_is_pretty_json_of_all_sections() {
    let (admin, _) = admin();
    let router = admin
        .section("workloads", || json!([]))
        .section("config", || json!({"network": ""}))
        .router();
    let (status, text) = ask(&router, "GET", "/config_dump").await;
    assert_eq!(status, 200);
    let expected = "{\n  \"config\": {\n    \"network\": \"\"\n  },\n  \"workloads\": []\n}";
    assert_eq!(text, expected);
    let request = Request::builder().method("POST").uri("/config_dump");
    let request = request.body(Body::empty()).expect("a request");
    let response = router.oneshot(request).await.expect("infallible");
    assert_eq!(response.status(), StatusCode::OK, "by any method");
    assert_eq!(response.headers()["content-type"], "application/json");
}

#[tokio::test]
async fn a_section_that_panics_fails_its_request_only() {
    let (admin, _) = admin();
    let router = admin.section("bad", || panic!("on purpose")).router();
    assert_eq!(ask(&router, "GET", "/config_dump").await.0, 500);
    assert_eq!(ask(&router, "GET", "/").await.0, 200);
}

#[tokio::test]
async fn logging_is_shown_changed_and_refused() {
    let router = admin().0.router();
    let current = |filter: &str| (200, format!("current log level is {filter}\n"));
    assert_eq!(ask(&router, "POST", "/logging").await, current("info"));
    for (query, expected) in [
        ("level=debug", "debug"),
        ("level=xds=trace,warn", "xds=trace,warn"),
        ("level=xds%3Dinfo", "warn,xds=info"),
        ("reset", "info"),
        ("reset=true&level=dns=debug", "info,dns=debug"),
    ] {
        let answer = ask(&router, "POST", &format!("/logging?{query}")).await;
        assert_eq!(answer, current(expected), "{query}");
    }
    let (status, text) = ask(&router, "POST", "/logging?level=xds:debug").await;
    assert_eq!(status, 400);
    assert!(
        text.contains("\"xds:debug\" is neither") && text.ends_with(LOGGING_HELP),
        "{text}"
    );
    let answer = ask(&router, "GET", "/logging").await;
    assert_eq!(answer, (405, LOGGING_HELP.to_owned()));
}

#[tokio::test]
async fn only_a_post_quits() {
    let (admin, quits) = admin();
    let router = admin.router();
    assert_eq!(ask(&router, "GET", "/quitquitquit").await.0, 405);
    assert_eq!(quits.load(Ordering::Relaxed), 0);
    let answer = ask(&router, "POST", "/quitquitquit").await;
    assert_eq!(answer, (200, "shutdown now\n".to_owned()));
    assert_eq!(quits.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn further_paths_are_served_and_listed_and_others_are_unknown() {
    let (admin, _) = admin();
    let router = admin
        .route(
            "/explain",
            "why a connection is allowed",
            get(|| async { "because" }),
        )
        .router();
    assert_eq!(ask(&router, "GET", "/explain").await.1, "because");
    let (_, index) = ask(&router, "GET", "/").await;
    for text in [
        "/explain",
        "why a connection is allowed",
        "/config_dump",
        "/logging",
    ] {
        assert!(index.contains(text), "{text} in {index}");
    }
    assert_eq!(ask(&router, "GET", "/nothing").await.0, 404);
}

#[tokio::test]
async fn a_client_that_sends_no_header_is_dropped_and_a_drain_does_not_wait_for_us() {
    let listeners = crate::socket::Factory::default().listen_loopback(0);
    let listeners = listeners.expect("a port");
    let address = listeners[0].local_addr().expect("bound");
    let (trigger, watch) = drain::channel();
    tokio::spawn(serve(listeners, admin().0, watch));
    // Before it is connected to: its patience runs from when it accepts.
    let start = Instant::now();
    let mut slow = TcpStream::connect(address).await.expect("listening");
    slow.write_all(b"GET / HTTP/1.1\r\n").await.expect("open");
    let mut rest = Vec::new();
    let read = timeout(SOON, slow.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "dropped within {:?}", http1::HEADER_TIMEOUT);
    assert!(start.elapsed() >= http1::HEADER_TIMEOUT / 2);
    let ended = trigger.drain(drain::Mode::graceful(SOON)).await;
    assert_eq!(ended, drain::Completion::Finished);
    let mut client = TcpStream::connect(address).await.expect("still there");
    let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    client.write_all(request).await.expect("open");
    client.read_to_end(&mut rest).await.expect("an answer");
    assert!(rest.starts_with(b"HTTP/1.1 200"));
}

#[tokio::test]
async fn profiles_are_told_how_to_be_taken_and_bad_questions_are_refused() {
    let router = admin().0.router();
    let (status, text) = ask(
        &router,
        "GET",
        "/debug/pprof/profile?seconds=7&frequency=49",
    )
    .await;
    assert_eq!(status, 501);
    assert!(text.contains("-F 49") && text.contains("sleep 7"), "{text}");
    for query in ["seconds=0", "seconds=301", "frequency=1001", "frequency=x"] {
        let (status, text) = ask(&router, "GET", &format!("/debug/pprof/profile?{query}")).await;
        assert_eq!(status, 400, "{query}: {text}");
    }
    assert_eq!(ask(&router, "GET", "/debug/pprof/heap").await.0, 500);
    let path = "/debug/pprof/heap/profiling";
    let inactive = (200, "heap profiling active: false\n".to_owned());
    assert_eq!(ask(&router, "GET", path).await, inactive);
    let activate = format!("{path}?activate=true");
    assert_eq!(ask(&router, "POST", &activate).await.0, 500);
    assert!(ask(&router, "GET", "/").await.1.contains(path));
}
