//! What is told of requests: metrics and spans.

use std::time::Duration;

use http::{Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mesh::l7::{
    config::{Normalization, ProxyHeaders, TraceProtocol, TraceProvider, WaypointConfig},
    served::AppProtocol,
    view::Resource,
};
use prometheus_client::encoding::text;
use proto::opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest;
use tokio::sync::mpsc;

use super::rig::{Backend, PORT, Rig, full};

fn scrape(rig: &Rig) -> String {
    let mut out = String::new();
    text::encode(&mut out, &rig.registry).unwrap();
    out
}

#[tokio::test]
async fn every_request_is_counted_with_what_became_of_it() {
    let echo = Backend::echo(Version::HTTP_11, "one").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/").await.status, StatusCode::OK);
    assert_eq!(client.get("/").await.status, StatusCode::OK);
    let nobody = Rig::new(Version::HTTP_11, &[]).await;
    let mut refused = nobody.client(Version::HTTP_11).await;
    assert_eq!(
        refused.get("/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    let line = |rig: &Rig| {
        let text = scrape(rig);
        let mut lines = text
            .lines()
            .filter(|it| it.starts_with("istio_requests_total{"));
        lines.next().map(str::to_owned).unwrap_or_default()
    };
    let told = line(&rig);
    for part in [
        "reporter=\"waypoint\"",
        "destination_workload_namespace=\"demo\"",
        "destination_principal=\"spiffe://cluster.local/ns/demo/sa/",
        "destination_service=\"echo.demo.svc.cluster.local\"",
        "destination_service_name=\"echo\"",
        "request_protocol=\"http\",response_code=\"200\",response_flags=\"-\"",
        "connection_security_policy=\"mutual_tls\"} 2",
    ] {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    let told = line(&nobody);
    assert!(
        told.contains("response_code=\"503\",response_flags=\"UH\""),
        "{told}"
    );
}

#[tokio::test]
async fn a_span_reaches_the_collector_through_the_mesh() {
    let (heard, mut spans) = mpsc::channel(1);
    let collector = Backend::start(Version::HTTP_2, move |request: Request<Incoming>| {
        let heard = heard.clone();
        async move {
            let path = request.uri().path().to_owned();
            let bytes = request.into_body().collect().await.unwrap().to_bytes();
            let told: ExportTraceServiceRequest = prost::Message::decode(&bytes[5..]).unwrap();
            heard.send((path, told)).await.unwrap();
            let response = Response::builder().header("grpc-status", "0");
            response.body(full(vec![0; 5])).unwrap()
        }
    })
    .await;
    let echo = Backend::echo(Version::HTTP_11, "one").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    rig.serve(
        "demo/otel.demo.svc.cluster.local",
        AppProtocol::Grpc,
        &[&collector],
    );
    rig.tell([Resource::Config(config())]);
    let mut client = rig.client(Version::HTTP_11).await;
    let answer = client.get("/traced").await;
    let sent = answer.header("x-got-traceparent").to_owned();
    let within = tokio::time::timeout(Duration::from_secs(10), spans.recv());
    let (path, told) = within.await.expect("in time").expect("a span");
    assert_eq!(
        path,
        "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
    );
    let span = &told.resource_spans[0].scope_spans[0].spans[0];
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|it| format!("{it:02x}"))
            .collect::<String>()
    };
    assert_eq!(
        sent,
        format!("00-{}-{}-01", hex(&span.trace_id), hex(&span.span_id))
    );
    assert_eq!(span.name, "echo.demo.svc.cluster.local:80/*");
    assert!(
        span.attributes
            .iter()
            .any(|it| it.key == "guid:x-request-id")
    );
}

fn config() -> WaypointConfig {
    let provider = TraceProvider {
        service: "demo/otel.demo.svc.cluster.local".parse().unwrap(),
        port: PORT,
        protocol: TraceProtocol::OtlpGrpc,
        max_tag_length: 0,
        timeout: None,
        headers: Vec::new(),
    };
    WaypointConfig {
        trust_domain_aliases: Vec::new(),
        normalization: Normalization::default(),
        authorizers: [].into(),
        log_providers: [].into(),
        trace_providers: [("otel".into(), provider)].into(),
        access_logs: Vec::new(),
        tracing: vec!["otel".into()],
        sampling_per_million: 1_000_000,
        forward_client_identity: false,
        default_retry: None,
        headers: ProxyHeaders::default(),
    }
}
