//! What is told of requests: metrics and spans.

use std::{sync::Arc, time::Duration};

use http::{Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mesh::l7::{
    config::{
        LogFormat, LogProvider, Normalization, ProxyHeaders, TraceProtocol, TraceProvider,
        WaypointConfig,
    },
    served::AppProtocol,
    view::Resource,
};
use net::metrics::{Exposition, Format};
use parking_lot::Mutex;
use proto::opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest;
use tokio::sync::mpsc;

use super::rig::{Answer, Backend, PORT, Rig, SERVICE, full};

fn scrape(rig: &Rig) -> String {
    let exposed = Exposition::from(Arc::clone(&rig.registry));
    let exposed = exposed.with(rig.waypoint.telemetry.families());
    exposed.text(Format::OpenMetrics).unwrap()
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

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A waypoint before a server that echoes, with its access log in this format.
async fn logging(logs: &net::log::Handle, format: LogFormat) -> (Rig, Backend) {
    let echo = Backend::echo(Version::HTTP_11, "one").await;
    let rig = Rig::logging(Some(logs.clone())).await;
    rig.serve(SERVICE, AppProtocol::Http, &[&echo]);
    let file = LogProvider::File {
        path: "/dev/stdout".into(),
        format,
    };
    rig.tell([Resource::Config(WaypointConfig {
        log_providers: [("file".into(), file)].into(),
        access_logs: vec!["file".into()],
        tracing: Vec::new(),
        ..config()
    })]);
    (rig, echo)
}

#[tokio::test]
async fn every_request_is_a_line_of_the_access_log() {
    let written = Written::default();
    let options = net::log::Options::default();
    let (_subscriber, logs) = net::log::subscriber(&options, written.clone()).unwrap();
    let (rig, _echo) = logging(&logs, LogFormat::DefaultText).await;
    let mut client = rig.client(Version::HTTP_2).await;
    let request = client
        .request("POST", "/a?b=1")
        .header("user-agent", "probe");
    let request = request.header("x-request-id", "id-1");
    let sent = client.send(request.body(full("hello")).unwrap()).await;
    assert_eq!(Answer::of(sent).await.body, "hello");
    logs.flush();
    let text = String::from_utf8(written.0.lock().clone()).unwrap();
    let (_, line) = text.trim_end().split_once("] ").expect("a line");
    let times = line.split(' ').nth(9).unwrap();
    assert!(times.parse::<u64>().is_ok(), "{line}");
    for part in [
        "\"POST /a?b=1 HTTP/2\" 200 - via_upstream - \"-\" 5 5 ",
        "\"-\" \"probe\" \"id-1\" \"echo\" \"127.0.0.1:",
        "inbound-vip|80|http|echo.demo.svc.cluster.local - 10.1.0.1:80 10.0.0.9:4000 - default",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[tokio::test]
async fn the_access_log_tells_when_the_body_had_come() {
    let written = Written::default();
    let options = net::log::Options::default();
    let (_subscriber, logs) = net::log::subscriber(&options, written.clone()).unwrap();
    let (rig, _echo) = logging(
        &logs,
        LogFormat::Text("%REQUEST_DURATION% of %DURATION%".into()),
    )
    .await;
    let mut client = rig.client(Version::HTTP_11).await;
    for body in ["", "hello"] {
        let request = client.request("POST", "/").body(full(body)).unwrap();
        assert_eq!(Answer::of(client.send(request).await).await.body, body);
    }
    logs.flush();
    let text = String::from_utf8(written.0.lock().clone()).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    for line in text.lines() {
        let (request, whole) = line.split_once(" of ").expect("both");
        let number = |text: &str| text.parse::<u64>().expect("milliseconds");
        assert!(number(request) <= number(whole), "{line}");
    }
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
        histogram_buckets: Vec::new(),
    }
}
