use axum::{body::Body, http::Request};
use http_body_util::BodyExt;
use mesh::flow::Direction;
use tower::ServiceExt;

use super::*;
use crate::testing::{assert_line, encoded};

mod grammar;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Row(&'static str, u32);

impl Labels for Row {
    type Key = (&'static str, u32);

    fn key(&self) -> Self::Key {
        (self.0, self.1)
    }

    fn each(&self, flag: ResponseFlag, each: &mut dyn FnMut(&str, &str)) {
        each("reporter", self.0);
        each("response_flags", flag.as_str());
    }
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

/// Labels whose text is looked at with a count.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Read(Arc<str>);

thread_local! {
    static READ: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

impl std::hash::Hash for Read {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        READ.set(READ.get() + 1);
        self.0.hash(state);
    }
}

impl Labels for Read {
    type Key = usize;

    fn key(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    fn each(&self, flag: ResponseFlag, each: &mut dyn FnMut(&str, &str)) {
        each("reporter", &self.0);
        each("response_flags", flag.as_str());
    }
}

#[test]
fn labels_that_were_used_before_are_found_without_a_look_at_their_texts() {
    let mut registry = Registry::default();
    let tcp = Tcp::register(&mut registry);
    let web = Read("web".into());
    drop(tcp.open(&web));
    let before = READ.get();
    let count = crate::allocations::Count::start();
    drop(tcp.open(&web));
    assert_eq!((READ.get(), count.allocations()), (before, 0));
    // Equal ones that are elsewhere count the same, and so do these once their series was dropped.
    drop(tcp.open(&Read("web".into())));
    assert!(READ.get() > before);
    let opened = "istio_tcp_connections_opened_total{reporter=\"web\",response_flags=\"-\"}";
    assert_line(&encoded(&registry), &format!("{opened} 3"));
    tcp.retain(|_| false);
    drop(tcp.open(&web));
    assert_line(&encoded(&registry), &format!("{opened} 1"));
}

#[test]
fn labels_of_a_flow_are_known_by_where_they_are() {
    let party = |workload: &str| {
        Arc::new(mesh::flow::PartyLabels {
            workload: Some(workload.into()),
            ..Default::default()
        })
    };
    let service = |name: &str| {
        Some(ServiceName {
            hostname: name.into(),
            namespace: "a".into(),
            name: name.into(),
        })
    };
    let labels = TcpLabels {
        direction: Direction::Inbound,
        source: party("a"),
        destination: party("b"),
        service: service("web"),
        security: Security::MutualTls,
    };
    assert_eq!(labels.key(), labels.clone().key());
    let one = || labels.clone();
    for other in [
        TcpLabels {
            direction: Direction::Outbound,
            ..one()
        },
        TcpLabels {
            source: party("c"),
            ..one()
        },
        TcpLabels {
            destination: party("c"),
            ..one()
        },
        TcpLabels {
            service: service("db"),
            ..one()
        },
        TcpLabels {
            service: None,
            ..one()
        },
        TcpLabels {
            security: Security::Plaintext,
            ..one()
        },
    ] {
        assert_ne!(labels.key(), other.key(), "{other:?}");
    }
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

/// The kinds of families that a process may have, with what is hard to write in a text.
fn every_kind() -> Exposition {
    use prometheus_client::{metrics::counter::Counter, registry::Unit};
    let mut registry = Registry::default();
    registry.register("a_seen", "Things that were seen", Counter::<u64>::default());
    let size = Gauge::<i64>::default();
    registry.register_with_unit("a_size", "How large", Unit::Bytes, size);
    let odd = Family::<Vec<(String, String)>, Counter>::default();
    let label = ("k".to_owned(), "# not \\ a \" comment".to_owned());
    odd.get_or_create(&vec![label]).inc();
    registry.register("a_odd", "Labels", odd);
    struct Own;
    impl Families for Own {
        fn write(&self, text: &mut Text<'_>) {
            text.counters("a_own", "Written by itself");
            text.counter(&[("k".into(), "a \"\\\n".into())], 7);
            text.histograms("a_time", "Durations");
            let bucket = |bound, count, exemplar| Bucket {
                bound,
                count,
                exemplar,
            };
            let exemplar = Exemplar {
                trace_id: 0xabc,
                span_id: 0xd,
                value: 3.5,
                at: std::time::UNIX_EPOCH + std::time::Duration::from_millis(1_500),
            };
            let buckets = [
                bucket(1.0, 2, None),
                bucket(5.0, 1, Some(exemplar)),
                bucket(f64::INFINITY, 0, None),
            ];
            text.histogram(&[("k".into(), "v".into())], 4.5, &buckets);
        }
    }
    Exposition::from(Arc::new(registry)).with(Arc::new(Own))
}

#[test]
fn openmetrics_has_exemplars_and_an_end_and_the_classic_text_neither() {
    let open = every_kind().text(Format::OpenMetrics).expect("text");
    for line in [
        "# TYPE a_seen counter",
        "# UNIT a_size_bytes bytes",
        "# TYPE a_own counter",
        "a_own_total{k=\"a \\\"\\\\\\n\"} 7",
        "# TYPE a_time histogram",
        "a_time_sum{k=\"v\"} 4.5",
        "a_time_count{k=\"v\"} 3",
        "a_time_bucket{le=\"1.0\",k=\"v\"} 2",
        "a_time_bucket{le=\"5.0\",k=\"v\"} 3 # {trace_id=\"00000000000000000000000000000abc\",\
         span_id=\"000000000000000d\"} 3.5 1.500",
        "a_time_bucket{le=\"+Inf\",k=\"v\"} 3",
    ] {
        assert_line(&open, line);
    }
    assert!(open.ends_with("# EOF\n"));
    let classic = every_kind().text(Format::Classic).expect("text");
    for line in [
        "# HELP a_seen_total Things that were seen.",
        "# TYPE a_seen_total counter",
        "# TYPE a_size_bytes gauge",
        "# TYPE a_own_total counter",
        "a_time_bucket{le=\"5.0\",k=\"v\"} 3",
    ] {
        assert_line(&classic, line);
    }
    assert!(
        !classic.contains("EOF") && !classic.contains("trace_id"),
        "{classic}"
    );
}

#[test]
fn both_texts_are_what_their_grammar_allows() {
    let of_samples = |text: &str| {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let samples = samples.map(|line| line.split(" # {trace_id").next().unwrap_or(line));
        samples.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut told = Vec::new();
    for format in [Format::Classic, Format::OpenMetrics] {
        let text = every_kind().text(format).expect("text");
        grammar::check(&text, format);
        told.push(of_samples(&text));
    }
    assert_eq!(told[0], told[1]);
    for (wrong, format) in [
        (
            "# TYPE a counter\na_total 1 # {t=\"1\"} 1\n",
            Format::Classic,
        ),
        ("# TYPE a counter\na_total 1\n", Format::Classic),
        (
            "# TYPE a_total counter\na_total 1\n# EOF\n",
            Format::OpenMetrics,
        ),
        ("# TYPE a counter\na_total 1\n", Format::OpenMetrics),
        ("# TYPE a gauge\na{b=\"c} 1\n# EOF\n", Format::OpenMetrics),
        (
            "# TYPE a gauge\na 1\n# TYPE a gauge\na 1\n# EOF\n",
            Format::OpenMetrics,
        ),
        ("a 1\n", Format::Classic),
    ] {
        let checked = std::panic::catch_unwind(|| grammar::check(wrong, format));
        assert!(checked.is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn a_scraper_gets_the_text_that_it_accepts() {
    let router = router(Arc::new(Registry::default()));
    // As Prometheus 3 asks.
    let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
        application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
        text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    for (path, accept, format) in [
        ("/metrics", None, Format::Classic),
        ("/stats/prometheus", Some("*/*"), Format::Classic),
        ("/stats/prometheus", Some(prometheus), Format::OpenMetrics),
        (
            "/metrics",
            Some("text/plain;q=0.5, application/openmetrics-text;version=1.0.0"),
            Format::OpenMetrics,
        ),
        (
            "/metrics",
            Some("application/openmetrics-text;q=0, text/plain"),
            Format::Classic,
        ),
        (
            "/metrics",
            Some("application/openmetrics-text;q=0.2, text/plain"),
            Format::Classic,
        ),
        (
            "/metrics",
            Some("application/openmetrics-text;version=2.0.0"),
            Format::Classic,
        ),
        (
            "/metrics",
            Some("application/openmetrics-text"),
            Format::OpenMetrics,
        ),
    ] {
        let mut request = Request::builder().uri(path);
        if let Some(accept) = accept {
            request = request.header("accept", accept);
        }
        let request = request.body(Body::empty()).expect("a request");
        let response = router.clone().oneshot(request).await.expect("infallible");
        let kind = &response.headers()["content-type"];
        assert_eq!(*kind, format.content_type(), "{accept:?}");
        let body = response.into_body().collect().await.expect("a body");
        let expected = match format {
            Format::OpenMetrics => "# EOF\n",
            Format::Classic => "",
        };
        assert_eq!(body.to_bytes(), expected);
    }
    let request = Request::builder().uri("/").body(Body::empty());
    let response = router.oneshot(request.expect("a request")).await;
    assert_eq!(response.expect("infallible").status(), 404);
}

#[tokio::test]
async fn a_scraper_that_asks_for_gzip_gets_the_same_text_in_it() {
    let mut registry = Registry::default();
    register_build(&mut registry, "ztunnel", "1");
    let exposed = Exposition::from(Arc::new(registry));
    let plain = exposed.text(Format::Classic).expect("text");
    let request = Request::builder()
        .uri("/metrics")
        .header("accept-encoding", "gzip, deflate");
    let request = request.body(Body::empty()).expect("a request");
    let response = router(exposed).oneshot(request).await;
    let response = response.expect("infallible");
    assert_eq!(response.headers()["content-encoding"], "gzip");
    let kind = &response.headers()["content-type"];
    assert_eq!(*kind, Format::Classic.content_type());
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
    assert_line(&text, "tokio_num_workers 2");
    for name in ["tokio_global_queue_depth", "tokio_num_alive_tasks"] {
        let told = text
            .lines()
            .any(|line| line.starts_with(&format!("{name} ")));
        assert!(told, "{name} in {text}");
    }
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
