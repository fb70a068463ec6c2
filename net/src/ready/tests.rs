use axum::{body::Body, http::Request};
use http_body_util::BodyExt;
use tower::ServiceExt;

use super::*;

async fn ask(ready: &Ready, method: &str, path: &str) -> (u16, String) {
    let request = Request::builder().method(method).uri(path);
    let request = request.body(Body::empty()).expect("a request");
    let response = router(ready.clone()).oneshot(request).await;
    let (parts, body) = response.expect("infallible").into_parts();
    let body = body.collect().await.expect("a body").to_bytes();
    let text = String::from_utf8(body.to_vec()).expect("text");
    (parts.status.as_u16(), text)
}

#[tokio::test]
async fn names_the_pending_gates_sorted() {
    let ready = Ready::new();
    let manager = ready.gate("workload proxy manager");
    let state = ready.gate("state manager");
    let expected = "not ready, pending: state manager, workload proxy manager\n";
    assert_eq!(ask(&ready, "GET", PATH).await, (500, expected.to_owned()));
    state.open();
    let expected = "not ready, pending: workload proxy manager\n";
    assert_eq!(ask(&ready, "GET", PATH).await, (500, expected.to_owned()));
    manager.open();
    assert_eq!(ask(&ready, "GET", PATH).await, (200, "ready\n".to_owned()));
    manager.close();
    assert_eq!(ask(&ready, "GET", PATH).await.0, 500);
}

#[tokio::test]
async fn says_what_closed_gates_wait_for_and_nothing_of_open_ones() {
    let ready = Ready::new();
    let manager = ready.gate("workload proxy manager");
    let state = ready.gate("state manager");
    state.explain("connection refused");
    manager.explain("no node agent");
    let expected = "not ready, pending: state manager, workload proxy manager\n\
        state manager: connection refused\nworkload proxy manager: no node agent\n";
    assert_eq!(ask(&ready, "GET", PATH).await, (500, expected.to_owned()));
    state.open();
    let expected =
        "not ready, pending: workload proxy manager\nworkload proxy manager: no node agent\n";
    assert_eq!(ask(&ready, "GET", PATH).await, (500, expected.to_owned()));
    manager.open();
    assert_eq!(ask(&ready, "GET", PATH).await, (200, "ready\n".to_owned()));
}

#[tokio::test]
async fn other_methods_and_paths_are_refused() {
    let ready = Ready::new();
    assert_eq!(ask(&ready, "POST", PATH).await.0, 405);
    assert_eq!(ask(&ready, "HEAD", PATH).await.0, 405);
    assert_eq!(ask(&ready, "GET", "/").await.0, 404);
}

#[tokio::test]
async fn a_dropped_gate_stays_closed_and_a_dismissed_one_is_gone() {
    let ready = Ready::new();
    drop(ready.gate("proxy"));
    assert_eq!(ready.pending(), ["proxy"]);
    ready.gate("dns proxy").dismiss();
    assert_eq!(ready.pending(), ["proxy"]);
}

#[tokio::test]
async fn waiting_ends_with_the_last_gate() {
    let ready = Ready::new();
    let gate = ready.gate("proxy");
    let waiter = tokio::spawn({
        let ready = ready.clone();
        async move { ready.wait().await }
    });
    gate.open();
    waiter.await.expect("no panic");
    assert!(ready.is_ready());
}
