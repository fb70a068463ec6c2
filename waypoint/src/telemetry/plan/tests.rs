use std::collections::BTreeMap;

use mesh::{
    l7::{
        config::{LogFormat, Normalization, ProxyHeaders},
        log_format::Nowhere,
        name::Target,
        telemetry::{self, MetricOptions},
    },
    names::PolicyKey,
};

use super::*;

pub(in crate::telemetry) fn service(name: &str) -> NamespacedHostname {
    NamespacedHostname {
        namespace: "observability".into(),
        hostname: format!("{name}.observability.svc.cluster.local").into(),
    }
}

pub(in crate::telemetry) fn provider(protocol: TraceProtocol) -> TraceProvider {
    TraceProvider {
        service: service("collector"),
        port: 4317,
        protocol,
        max_tag_length: 0,
        timeout: None,
        headers: Vec::new(),
    }
}

pub(in crate::telemetry) fn config() -> WaypointConfig {
    let file = LogProvider::File {
        path: "/dev/stdout".into(),
        format: LogFormat::Text("%REQ(:PATH)% %REQ(x-tenant)% %RESPONSE_CODE%".into()),
    };
    let collector = LogProvider::OpenTelemetry {
        service: service("logs"),
        port: 4317,
        log_name: "access".into(),
        format: LogFormat::Json(vec![("code".into(), "%RESPONSE_CODE%".into())]),
    };
    let zipkin = TraceProtocol::Zipkin {
        path: "/api/v2/spans".into(),
        with_w3c: false,
    };
    WaypointConfig {
        trust_domain_aliases: Vec::new(),
        normalization: Normalization::default(),
        authorizers: BTreeMap::new(),
        log_providers: [("file".into(), file), ("otel".into(), collector)].into(),
        trace_providers: [
            ("otel".into(), provider(TraceProtocol::OtlpGrpc)),
            ("zipkin".into(), provider(zipkin)),
        ]
        .into(),
        access_logs: vec!["file".into()],
        tracing: vec!["otel".into()],
        sampling_per_million: 10_000,
        forward_client_identity: false,
        default_retry: None,
        headers: ProxyHeaders::default(),
        histogram_buckets: Vec::new(),
    }
}

pub(in crate::telemetry) fn options() -> Telemetry {
    Telemetry {
        key: PolicyKey {
            namespace: "default".into(),
            name: "web".into(),
        },
        targets: vec![Target::Waypoint],
        metrics: MetricOptions::default(),
        access_logs: None,
        tracing: None,
    }
}

fn plan(told: &Telemetry) -> Plan {
    Plan::new(Some(&config()), Some(told), &Nowhere)
}

#[test]
fn without_a_telemetry_the_configuration_holds() {
    let plan = Plan::new(Some(&config()), None, &Nowhere);
    assert_eq!(plan.logs.len(), 1);
    assert_eq!(plan.logs[0].sink, Sink::Output);
    let tracing = plan.tracing.unwrap();
    assert_eq!(tracing.per_million, 10_000);
    assert_eq!(tracing.propagation, Some(Propagation::W3c));
    assert_eq!(plan.metrics.len(), 1);
    assert_eq!(plan.metrics[0].metrics(), Metrics::ALL);
    assert_eq!(
        plan.wanted.request,
        ["x-request-id", "x-tenant", "user-agent"]
    );
    assert!(Plan::new(None, None, &Nowhere).logs.is_empty());
}

#[test]
fn a_telemetry_chooses_its_logs_and_traces() {
    let log = |provider: &str, disabled, filter: Option<&str>| AccessLogging {
        providers: vec![provider.into()],
        disabled,
        filter: filter.map(Into::into),
    };
    let told = Telemetry {
        access_logs: Some(vec![
            log("otel", false, Some("response.code >= 400")),
            log("file", true, None),
            log("absent", false, None),
            log("file", false, Some("no expression (")),
        ]),
        tracing: Some(telemetry::Tracing {
            providers: vec!["zipkin".into(), "otel".into()],
            sampling_per_million: Some(1_000_000),
            ..telemetry::Tracing::default()
        }),
        ..options()
    };
    let plan = plan(&told);
    assert_eq!(
        plan.logs.len(),
        1,
        "a filter that cannot be read lets nothing pass"
    );
    assert!(matches!(plan.logs[0].sink, Sink::Collector(_)));
    let tracing = plan.tracing.unwrap();
    assert_eq!(tracing.propagation, Some(Propagation::Both));
    assert_eq!(tracing.per_million, 1_000_000);
    assert_eq!(tracing.providers.len(), 2);
}

#[test]
fn tracing_can_be_silent_or_leave_headers_alone() {
    let with = |disabled, propagation_disabled| Telemetry {
        tracing: Some(telemetry::Tracing {
            disabled,
            propagation_disabled,
            ..telemetry::Tracing::default()
        }),
        ..options()
    };
    let silent = plan(&with(true, false)).tracing.unwrap();
    assert!(silent.providers.is_empty());
    assert_eq!(silent.propagation, Some(Propagation::W3c));
    assert_eq!(plan(&with(false, true)).tracing.unwrap().propagation, None);
}

#[test]
fn tracing_follows_request_ids_and_tells_istios_tags_unless_told_otherwise() {
    let usual = plan(&options()).tracing.unwrap();
    assert!(usual.by_request_id && usual.istio_tags);
    let told = Telemetry {
        tracing: Some(telemetry::Tracing {
            sampling_by_chance: true,
            istio_tags_disabled: true,
            ..telemetry::Tracing::default()
        }),
        ..options()
    };
    let other = plan(&told).tracing.unwrap();
    assert!(!other.by_request_id && !other.istio_tags);
}

#[test]
fn overrides_of_metrics_apply_in_order_and_share_series() {
    let change = |metric: Option<&str>, disabled, tags: &[(&str, Option<&str>)]| MetricOverride {
        metric: metric.map(Into::into),
        disabled,
        tags: tags
            .iter()
            .map(|(name, value)| ((*name).into(), value.map(Into::into)))
            .collect(),
    };
    let overrides = [
        change(
            None,
            false,
            &[("source_principal", None), ("host", Some("request.host"))],
        ),
        change(Some("istio_request_bytes"), true, &[]),
        change(Some("istio_requests_total"), false, &[("host", Some("f("))]),
    ];
    let groups = metric_groups(&overrides);
    assert_eq!(groups.len(), 2);
    assert!(
        groups
            .iter()
            .all(|it| !it.metrics().contains(Metric::RequestBytes))
    );
    let record = RequestRecord {
        authority: "web".to_owned(),
        ..RequestRecord::default()
    };
    let value = |metric| {
        let group = groups
            .iter()
            .find(|it| it.metrics().contains(metric))
            .unwrap();
        let changed = group.changed(&record);
        assert!(changed.contains(&("source_principal".into(), None)));
        changed
            .iter()
            .find(|it| &*it.0 == "host")
            .unwrap()
            .1
            .clone()
    };
    assert_eq!(value(Metric::Requests).as_deref(), Some("unknown"));
    assert_eq!(value(Metric::Duration).as_deref(), Some("web"));
    let off = [change(None, true, &[])];
    assert!(metric_groups(&off).is_empty());
}
