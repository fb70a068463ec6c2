use std::time::Duration;

use mesh::{
    draw::Draw,
    flow::{Party, PartyLabels, ServiceName},
    l7::{response_flags::Flag, trace::Span},
};
use net::metrics::{Families, Format, Text};

use mesh::l7::config::HistogramBuckets;

use super::*;
use crate::telemetry::plan::tests::config;

fn record() -> RequestRecord {
    let party = |name: &str| Party {
        pod: None,
        labels: Arc::new(PartyLabels {
            workload: Some(format!("{name}-v1").into()),
            canonical_service: Some(name.into()),
            canonical_revision: Some("v1".into()),
            namespace: Some("default".into()),
            principal: Some(format!("spiffe://cluster.local/ns/default/sa/{name}").into()),
            cluster: Some("Kubernetes".into()),
            place: None,
            by_baggage: false,
        }),
    };
    RequestRecord {
        source: party("client"),
        destination: party("web"),
        service: Some(ServiceName {
            hostname: "web.default.svc.cluster.local".into(),
            namespace: "default".into(),
            name: "web".into(),
        }),
        status: Some(200),
        duration: Some(Duration::from_micros(2_500)),
        bytes_sent: 100,
        ..RequestRecord::default()
    }
}

fn scrape(requests: &Requests) -> String {
    told(requests, Format::OpenMetrics)
}

fn told(requests: &Requests, format: Format) -> String {
    let mut text = String::new();
    requests.write(&mut Text::new(&mut text, format));
    text
}

const LABELS: &str = "reporter=\"waypoint\",source_workload=\"client-v1\",source_canonical_service=\"client\",\
    source_canonical_revision=\"v1\",source_workload_namespace=\"default\",\
    source_principal=\"spiffe://cluster.local/ns/default/sa/client\",source_app=\"client\",source_version=\"v1\",\
    source_cluster=\"Kubernetes\",destination_workload=\"web-v1\",destination_workload_namespace=\"default\",\
    destination_principal=\"spiffe://cluster.local/ns/default/sa/web\",destination_app=\"web\",\
    destination_version=\"v1\",destination_service=\"web.default.svc.cluster.local\",\
    destination_service_name=\"web\",destination_service_namespace=\"default\",\
    destination_canonical_service=\"web\",destination_canonical_revision=\"v1\",\
    destination_cluster=\"Kubernetes\",request_protocol=\"http\",response_code=\"200\",response_flags=\"-\",\
    connection_security_policy=\"mutual_tls\"";

#[test]
fn requests_are_counted_with_istios_labels_in_its_order() {
    let requests = Requests::register(&mut Registry::default());
    requests.count(&record(), Metrics::ALL, [].into());
    requests.count(&record(), Metrics::ALL, [].into());
    let text = scrape(&requests);
    for line in [
        format!("istio_requests_total{{{LABELS}}} 2\n"),
        format!("istio_request_duration_milliseconds_sum{{{LABELS}}} 5.0\n"),
        format!("istio_request_duration_milliseconds_bucket{{le=\"1.0\",{LABELS}}} 0\n"),
        format!("istio_request_duration_milliseconds_bucket{{le=\"5.0\",{LABELS}}} 2\n"),
        format!("istio_request_duration_milliseconds_bucket{{le=\"3600000.0\",{LABELS}}} 2\n"),
        format!("istio_request_duration_milliseconds_bucket{{le=\"+Inf\",{LABELS}}} 2\n"),
        format!("istio_response_bytes_sum{{{LABELS}}} 200.0\n"),
        format!("istio_request_bytes_count{{{LABELS}}} 2\n"),
    ] {
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
}

#[test]
fn grpc_and_failures_are_told() {
    let requests = Requests::register(&mut Registry::default());
    let failed = RequestRecord {
        grpc: true,
        grpc_status: Some(14),
        request_messages: 3,
        flags: Flag::NoHealthyUpstream.into(),
        destination: Party::default(),
        ..record()
    };
    requests.count(&failed, Metrics::ALL, [].into());
    let text = scrape(&requests);
    let tail = "request_protocol=\"grpc\",response_code=\"200\",grpc_response_status=\"14\",\
        response_flags=\"UH\",connection_security_policy=\"mutual_tls\"} ";
    assert!(text.contains(&format!("{tail}3\n")), "{text}");
    assert!(text.contains("destination_workload=\"unknown\""), "{text}");
}

#[test]
fn a_telemetry_changes_labels_and_takes_families_away() {
    let requests = Requests::register(&mut Registry::default());
    let changed = [
        ("source_principal".into(), None),
        ("response_code".into(), Some("2xx".into())),
        ("host".into(), Some("web".into())),
    ];
    let only = Metrics::NONE.with(Metric::Requests);
    requests.count(&record(), only, changed.into());
    let text = scrape(&requests);
    assert!(text.contains("response_code=\"2xx\""), "{text}");
    assert!(
        text.contains("connection_security_policy=\"mutual_tls\",host=\"web\"} 1"),
        "{text}"
    );
    assert!(!text.contains("source_principal"), "{text}");
    assert!(!text.contains("istio_request_bytes_count"), "{text}");
    requests.count(&record(), Metrics::NONE, [].into());
    assert_eq!(requests.rows().len(), 1);
}

#[test]
fn histograms_have_the_bounds_that_the_waypoint_is_told() {
    let requests = Requests::register(&mut Registry::default());
    requests.count(&record(), Metrics::ALL, [].into());
    let buckets = |prefix, bounds: &[f64]| HistogramBuckets::new(prefix, bounds.into()).unwrap();
    let config = WaypointConfig {
        histogram_buckets: vec![
            buckets("istiocustom", &[2.0, 8.0]),
            buckets("istio_request_bytes", &[64.0]),
        ],
        ..config()
    };
    requests.configure(Some(&config));
    requests.count(&record(), Metrics::ALL, [].into());
    let text = scrape(&requests);
    let of = |metric: &str| -> Vec<&str> {
        let start = format!("{metric}_bucket{{le=\"");
        let lines = text.lines().filter_map(|line| line.strip_prefix(&*start));
        lines.filter_map(|line| line.split('"').next()).collect()
    };
    assert_eq!(
        of("istio_request_duration_milliseconds"),
        ["2.0", "8.0", "+Inf"]
    );
    assert_eq!(of("istio_response_bytes"), ["2.0", "8.0", "+Inf"]);
    assert_eq!(of("istio_request_bytes"), ["64.0", "+Inf"]);
    // Nothing changed: counting goes on.
    requests.configure(Some(&config));
    requests.count(&record(), Metrics::ALL, [].into());
    let counted = format!("istio_requests_total{{{LABELS}}} 2\n");
    assert!(scrape(&requests).contains(&counted), "{text}");
}

#[test]
fn label_sets_are_bounded() {
    let requests = Requests::register(&mut Registry::default());
    for at in 0..MAX_SERIES + 10 {
        let changed = [("id".into(), Some(at.to_string().into()))];
        requests.count(&record(), Metrics::ALL, changed.into());
    }
    assert_eq!(requests.rows().len(), MAX_SERIES + 1);
    let rows = requests.rows();
    let (_, rest) = rows.iter().find(|(key, _)| *key == Key::Overflow).unwrap();
    assert_eq!(rest.requests.load(Relaxed), 10);
    assert_eq!(requests.0.overflowed.get(), 10);
}

#[test]
fn what_nothing_uses_is_forgotten() {
    let requests = Requests::register(&mut Registry::default());
    requests.count(&record(), Metrics::ALL, [].into());
    requests.forget(IDLE.as_secs());
    assert_eq!(requests.rows().len(), 1);
    requests.forget(IDLE.as_secs() + 1);
    assert!(requests.rows().is_empty());
}

#[test]
fn a_request_that_is_traced_stands_for_those_of_its_bucket() {
    let requests = Requests::register(&mut Registry::default());
    let traced = |millis: u64, sampled: bool| RequestRecord {
        duration: Some(Duration::from_millis(millis)),
        span: Some(Span::new(None, sampled, Draw(millis))),
        start: std::time::UNIX_EPOCH,
        ..record()
    };
    let last = format!("{:032x}", traced(3, true).span.unwrap().trace_id);
    for (millis, sampled) in [(2, true), (3, true), (4, false), (200, true)] {
        requests.count(&traced(millis, sampled), Metrics::ALL, [].into());
    }
    let text = scrape(&requests);
    let found: Vec<&str> = text.lines().filter(|line| line.contains(" # {")).collect();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found[0].contains("le=\"5.0\"") && found[0].contains(&last),
        "{found:?}"
    );
    assert!(found[0].ends_with("} 3.0 0.003"), "{found:?}");
    assert!(
        found[1].contains("le=\"250.0\"") && found[1].ends_with("} 200.0 0.200"),
        "{found:?}"
    );
    assert!(
        found
            .iter()
            .all(|line| line.starts_with("istio_request_duration_milliseconds_bucket"))
    );
    let classic = told(&requests, Format::Classic);
    assert!(!classic.contains(" # {"), "{classic}");
    assert!(
        classic.contains("# TYPE istio_requests_total counter\n"),
        "{classic}"
    );
}
