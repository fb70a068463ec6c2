use axum::{body::Body, http::Request};
use http_body_util::BodyExt;
use mesh::flow::Direction;
use tower::ServiceExt;

use super::*;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Row(&'static str, u32);

impl Labels for Row {
    fn each(&self, flag: ResponseFlag, each: &mut dyn FnMut(&str, &str)) {
        each("reporter", self.0);
        each("response_flags", flag.as_str());
    }
}

fn encoded(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).expect("encodes");
    text
}

#[track_caller]
fn assert_line(text: &str, line: &str) {
    assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
}

#[test]
fn flows_are_counted_under_istios_names() {
    let mut registry = Registry::default();
    let tcp = Tcp::register(&mut registry);
    let row = Row("source", 0);
    let flow = tcp.open(&row);
    flow.received(5);
    flow.sent(7);
    flow.close(ResponseFlag::None);
    tcp.open(&row).close(ResponseFlag::Deny);
    drop(tcp.open(&row));
    let _socket = tcp.socket(Direction::Outbound);
    let text = encoded(&registry);
    assert_line(&text, "# TYPE istio_tcp_connections_opened counter");
    let counted = |name: &str, flag: &str, n: u64| {
        let labels = format!("{{reporter=\"source\",response_flags=\"{flag}\"}}");
        assert_line(&text, &format!("istio_tcp_{name}_total{labels} {n}"));
    };
    counted("connections_opened", "-", 3);
    counted("connections_closed", "-", 2);
    counted("connections_closed", "DENY", 1);
    counted("connections_failed", "DENY", 1);
    counted("received_bytes", "-", 5);
    counted("sent_bytes", "-", 7);
    assert!(!text.contains("failed_total{reporter=\"source\",response_flags=\"-\"}"));
    assert_line(&text, "istio_tcp_sockets_open{reporter=\"source\"} 1");
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn series_of_workloads_that_are_gone_are_dropped_unless_in_use() {
    let mut registry = Registry::default();
    let tcp = Tcp::register(&mut registry);
    let open = tcp.open(&Row("open", 0));
    drop(tcp.open(&Row("gone", 0)));
    drop(tcp.open(&Row("kept", 0)));
    tcp.retain(|row| row.0 == "kept");
    let text = encoded(&registry);
    assert!(text.contains("open") && text.contains("kept"));
    assert!(!text.contains("\"gone\""), "{text}");
    drop(open);
}

#[test]
fn series_are_bounded_and_the_used_ones_stay() {
    let mut registry = Registry::default();
    let tcp = Tcp::register(&mut registry);
    let row = |n| Row("source", n);
    let first = tcp.open(&row(0));
    first.received(1);
    for n in 1..u32::try_from(MAX_SERIES).expect("small") * 2 {
        drop(tcp.open(&row(n)));
    }
    let text = encoded(&registry);
    let series = text.matches("connections_opened_total").count();
    assert!(series <= MAX_SERIES, "{series}");
    assert!(text.contains("received_bytes_total{reporter=\"source\",response_flags=\"-\"} 1\n"));
}

#[test]
fn the_process_tells_its_descriptors_and_its_build() {
    let mut registry = Registry::default();
    register_process(&mut registry, Vec::new());
    register_build(&mut registry, "ztunnel", "1.2.3");
    let text = encoded(&registry);
    assert_line(&text, "istio_build{component=\"ztunnel\",tag=\"1.2.3\"} 1");
    for name in [
        "process_open_fds",
        "process_max_fds",
        "process_resident_memory_bytes",
    ] {
        let line = text.lines().find(|l| l.starts_with(&format!("{name} ")));
        let value = line.and_then(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
        assert!(value.is_some_and(|value| value > 0), "{name} in {text}");
    }
}

#[tokio::test]
async fn the_content_type_follows_what_is_accepted() {
    let router = router(Arc::new(Registry::default()));
    for (path, accept, expected) in [
        ("/metrics", None, PLAIN),
        ("/stats/prometheus", Some("*/*"), PLAIN),
        (
            "/stats/prometheus",
            Some("text/plain;q=0.5, application/openmetrics-text;version=1.0.0"),
            OPENMETRICS_FULL,
        ),
    ] {
        let mut request = Request::builder().uri(path);
        if let Some(accept) = accept {
            request = request.header("accept", accept);
        }
        let request = request.body(Body::empty()).expect("a request");
        let response = router.clone().oneshot(request).await.expect("infallible");
        assert_eq!(response.headers()["content-type"], expected);
        let body = response.into_body().collect().await.expect("a body");
        assert_eq!(body.to_bytes(), "# EOF\n");
    }
    let request = Request::builder().uri("/").body(Body::empty());
    let response = router.oneshot(request.expect("a request")).await;
    assert_eq!(response.expect("infallible").status(), 404);
}

#[tokio::test]
async fn a_scraper_that_asks_for_gzip_gets_the_same_text_in_it() {
    let mut registry = Registry::default();
    register_build(&mut registry, "ztunnel", "1");
    let plain = encoded(&registry);
    let request = Request::builder()
        .uri("/metrics")
        .header("accept-encoding", "gzip, deflate");
    let request = request.body(Body::empty()).expect("a request");
    let response = router(Arc::new(registry)).oneshot(request).await;
    let response = response.expect("infallible");
    assert_eq!(response.headers()["content-encoding"], "gzip");
    assert_eq!(response.headers()["content-type"], PLAIN);
    let body = response.into_body().collect().await.expect("a body");
    let bytes = body.to_bytes();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut text)
        .expect("gzip");
    assert_eq!(text, plain);
}

#[tokio::test]
async fn every_worker_tells_what_it_has_done() {
    let mut registry = Registry::default();
    let here = tokio::runtime::Handle::current();
    register_process(&mut registry, vec![here.clone(), here]);
    let text = encoded(&registry);
    for name in [
        "tokio_worker_total_busy_duration_seconds_total",
        "tokio_worker_park_count_total",
        "tokio_worker_park_unpark_count_total",
    ] {
        for worker in 0..2 {
            let start = format!("{name}{{worker=\"{worker}\"}} ");
            let told = text.lines().any(|line| line.starts_with(&start));
            assert!(told, "{start} in {text}");
        }
    }
}
