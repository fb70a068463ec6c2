use std::time::Duration;

use mesh::l7::telemetry::AccessLogging;
use parking_lot::Mutex;

use super::{
    plan::tests::{config, options},
    *,
};
use crate::service_call::{Answering, Call};

struct Silent;

impl Transport for Silent {
    fn call(&self, _: Call) -> Answering {
        Box::pin(std::future::pending())
    }
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Output for Lines {
    fn line(&self, line: &[u8]) -> bool {
        let mut lines = self.0.lock();
        lines.push(String::from_utf8(line.to_vec()).unwrap());
        lines.len() <= 2
    }
}

fn telemetry() -> (Telemetry, Lines) {
    let lines = Lines::default();
    let output: Box<dyn Output> = Box::new(lines.clone());
    let mut registry = Registry::default();
    let new = Telemetry::register(
        &mut registry,
        Node::default(),
        Some(output),
        Arc::new(Silent),
    );
    (new, lines)
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    let pairs = pairs.iter().map(|(name, value)| {
        let value = http::HeaderValue::from_static(value);
        (http::HeaderName::from_static(name), value)
    });
    pairs.collect()
}

fn ended(status: u16) -> RequestRecord {
    RequestRecord {
        path: "/x".to_owned(),
        status: Some(status),
        duration: Some(Duration::from_millis(1)),
        ..RequestRecord::default()
    }
}

#[tokio::test]
async fn a_request_is_logged_with_what_was_remembered_of_it() {
    let (telemetry, lines) = telemetry();
    let config = Arc::new(config());
    let mut of_request = headers(&[("x-tenant", "blue"), ("cookie", "secret")]);
    let mut observed = telemetry.observe(Some(&config), None, &mut of_request, Draw(1));
    observed.response(&headers(&[("x-y", "z")]));
    assert_eq!(observed.request_headers, headers(&[("x-tenant", "blue")]));
    assert!(
        of_request.contains_key("traceparent"),
        "a trace begins here"
    );
    telemetry.tell(observed, ended(200));
    assert_eq!(*lines.0.lock(), ["/x blue 200"]);
}

#[tokio::test]
async fn a_filter_leaves_requests_out_and_lost_lines_are_counted() {
    let (telemetry, lines) = telemetry();
    let config = Arc::new(config());
    let mut options = options();
    options.access_logs = Some(vec![AccessLogging {
        providers: vec!["file".into()],
        disabled: false,
        filter: Some("response.code >= 400".into()),
    }]);
    let options = Arc::new(options);
    for status in [200, 404, 500, 503] {
        let mut empty = HeaderMap::new();
        let observed = telemetry.observe(Some(&config), Some(&options), &mut empty, Draw(1));
        telemetry.tell(observed, ended(status));
    }
    assert_eq!(*lines.0.lock(), ["/x - 404", "/x - 500", "/x - 503"]);
    assert_eq!(telemetry.lost_lines.get(), 1);
}

#[tokio::test]
async fn the_clients_decision_on_its_trace_holds() {
    let (telemetry, _) = telemetry();
    let config = Arc::new(config());
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut of_request = headers(&[("traceparent", parent)]);
    let observed = telemetry.observe(Some(&config), None, &mut of_request, Draw(1));
    let span = observed.span.unwrap();
    assert!(span.sampled);
    let sent = of_request["traceparent"].to_str().unwrap();
    assert_eq!(
        sent,
        format!(
            "00-4bf92f3577b34da6a3ce929d0e0e4736-{:016x}-01",
            span.span_id
        )
    );
}

#[tokio::test]
async fn plans_are_made_once_and_forgotten_with_what_they_came_of() {
    let (telemetry, _) = telemetry();
    let first = Arc::new(config());
    let told = Arc::new(options());
    let one = telemetry.ready(Some(&first), Some(&told));
    assert!(Arc::ptr_eq(
        &one,
        &telemetry.ready(Some(&first), Some(&told))
    ));
    for _ in 0..5 {
        telemetry.ready(Some(&first), Some(&Arc::new(options())));
    }
    assert!(telemetry.plans.read().by_options.len() <= 2);
    let second = Arc::new(config());
    assert!(!Arc::ptr_eq(
        &one,
        &telemetry.ready(Some(&second), Some(&told))
    ));
    assert_eq!(telemetry.plans.read().by_options.len(), 1);
}
