use std::{collections::VecDeque, time::SystemTime};

use http::{HeaderMap, Response};
use mesh::l7::trace::Span;
use proto::opentelemetry::proto::collector::{
    logs::v1::ExportLogsServiceRequest, trace::v1::ExportTraceServiceRequest,
};

use super::{
    super::plan::{
        Tracing,
        tests::{provider, service},
    },
    *,
};
use crate::service_call::{Answer, Answering};

/// Answers calls in turn, and keeps them.
#[derive(Default)]
struct Collector {
    calls: Mutex<Vec<Call>>,
    /// Statuses; then 200.
    statuses: Mutex<VecDeque<u16>>,
    heard: tokio::sync::Notify,
}

impl Transport for Collector {
    fn call(&self, call: Call) -> Answering {
        let status = self.statuses.lock().pop_front().unwrap_or(200);
        let body = match call.http2 {
            true => Bytes::from_static(&[0, 0, 0, 0, 0]),
            false => Bytes::new(),
        };
        self.calls.lock().push(call);
        self.heard.notify_one();
        let response = Response::builder().status(status).body(()).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        Box::pin(async move {
            Ok(Answer {
                head: response.into_parts().0,
                body,
                trailers,
            })
        })
    }
}

fn node() -> Node {
    Node {
        id: "waypoint~10.0.0.1~w.default".into(),
        workload: "waypoint".into(),
        namespace: "default".into(),
        cluster: "Kubernetes".into(),
        ..Node::default()
    }
}

fn span() -> Arc<SpanData> {
    Arc::new(SpanData {
        name: "web:80/*".to_owned(),
        trace_id: 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00,
        span_id: 0x0102_0304_0506_0708,
        parent_id: Some(0x1112_1314_1516_1718),
        state: String::new(),
        start: SystemTime::UNIX_EPOCH + Duration::from_micros(1_000_001),
        end: SystemTime::UNIX_EPOCH + Duration::from_micros(1_000_003),
        attributes: vec![("component".into(), "proxy".to_owned())],
        failed: true,
    })
}

fn exporters(transport: &Arc<Collector>) -> Exporters {
    let transport: Arc<dyn Transport> = transport.clone();
    Exporters::register(&mut Registry::default(), Arc::new(node()), transport)
}

/// The fields of the protocol, written by hand: tag, length, content.
fn expected_span() -> Vec<u8> {
    let mut span = Vec::new();
    let mut field = |head: &[u8], body: &[u8]| {
        span.extend_from_slice(head);
        span.extend_from_slice(body);
    };
    field(
        &[0x0a, 16],
        &0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00_u128.to_be_bytes(),
    );
    field(&[0x12, 8], &[1, 2, 3, 4, 5, 6, 7, 8]);
    field(
        &[0x22, 8],
        &[0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18],
    );
    field(&[0x2a, 8], b"web:80/*");
    field(&[0x30], &[2]);
    field(&[0x39], &1_000_001_000_u64.to_le_bytes());
    field(&[0x41], &1_000_003_000_u64.to_le_bytes());
    field(&[0x4a, 20, 0x0a, 9], b"component");
    field(&[0x12, 7, 0x0a, 5], b"proxy");
    field(&[0x7a, 2], &[0x18, 2]);
    field(&[0x85, 0x01], &1_u32.to_le_bytes());
    span
}

#[test]
fn spans_for_opentelemetry_are_the_protocols_bytes() {
    let message = otlp::spans(&[span()], &node(), MAX_TAG);
    let bytes = prost::Message::encode_to_vec(&message);
    let expected = expected_span();
    let at = bytes.windows(expected.len()).position(|it| it == expected);
    assert!(at.is_some(), "{bytes:02x?}");
    let service = b"\n\x0cservice.name\x12\x12\n\x10waypoint.default";
    assert!(bytes.windows(service.len()).any(|it| it == service));
}

#[test]
fn spans_for_zipkin_are_its_json() {
    let bytes = zipkin::spans(&[span()], &node(), 3).unwrap();
    assert_eq!(
        String::from_utf8(bytes).unwrap(),
        "[{\"traceId\":\"112233445566778899aabbccddeeff00\",\"id\":\"0102030405060708\",\
         \"parentId\":\"1112131415161718\",\"name\":\"web:80/*\",\"kind\":\"SERVER\",\"timestamp\":1000001,\
         \"duration\":2,\"localEndpoint\":{\"serviceName\":\"waypoint.default\"},\"tags\":{\"component\":\"pro\"}}]"
    );
}

#[tokio::test(start_paused = true)]
async fn spans_reach_the_collector_in_batches() {
    let collector = Arc::new(Collector::default());
    let exporters = exporters(&collector);
    let queue = exporters.spans(&"otel".into(), &provider(TraceProtocol::OtlpGrpc));
    for _ in 0..3 {
        queue.tell(span());
    }
    collector.heard.notified().await;
    let calls = std::mem::take(&mut *collector.calls.lock());
    assert_eq!(calls.len(), 1);
    let call = &calls[0];
    assert_eq!(
        (&call.service, call.port, call.http2),
        (&service("collector"), 4317, true)
    );
    assert_eq!(call.request.uri().path(), otlp::EXPORT_SPANS);
    assert_eq!(call.request.headers()["content-type"], "application/grpc");
    let message = &call.request.body()[5..];
    assert_eq!(
        call.request.body()[..5],
        [
            &[0],
            &u32::try_from(message.len()).unwrap().to_be_bytes()[..]
        ]
        .concat()
    );
    let message: ExportTraceServiceRequest = prost::Message::decode(message).unwrap();
    assert_eq!(message.resource_spans[0].scope_spans[0].spans.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn each_form_of_spans_goes_to_its_path() {
    let zipkin = TraceProtocol::Zipkin {
        path: "/api/v2/spans".into(),
        with_w3c: false,
    };
    for (protocol, path, kind) in [
        (
            TraceProtocol::OtlpHttp("/v1/traces".into()),
            "/v1/traces",
            "application/x-protobuf",
        ),
        (zipkin, "/api/v2/spans", "application/json"),
    ] {
        let collector = Arc::new(Collector::default());
        let mut provider = provider(protocol);
        provider.headers = vec![("x-token".parse().unwrap(), "t".into())];
        let exporters = exporters(&collector);
        let queue = exporters.spans(&"p".into(), &provider);
        queue.tell(span());
        collector.heard.notified().await;
        let calls = collector.calls.lock();
        assert_eq!(calls[0].request.uri().path(), path);
        assert_eq!(calls[0].request.headers()["content-type"], kind);
        assert_eq!(calls[0].request.headers()["x-token"], "t");
        assert!(!calls[0].http2);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_collector_does_not_take_is_dropped_and_counted() {
    let collector = Arc::new(Collector::default());
    collector.statuses.lock().push_back(503);
    let exporters = exporters(&collector);
    let provider = provider(TraceProtocol::OtlpHttp("/v1/traces".into()));
    let queue = exporters.spans(&"otel".into(), &provider);
    queue.tell(span());
    collector.heard.notified().await;
    queue.tell(span());
    collector.heard.notified().await;
    tokio::task::yield_now().await;
    let (sent, dropped) = exporters.counters("span", "otel");
    assert_eq!((sent.get(), dropped.get()), (1, 1));
}

/// A collector that never answers.
struct Silent;

impl Transport for Silent {
    fn call(&self, _: Call) -> Answering {
        Box::pin(std::future::pending())
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_full_drops_and_never_waits() {
    let transport: Arc<dyn Transport> = Arc::new(Silent);
    let exporters = Exporters::register(&mut Registry::default(), Arc::new(node()), transport);
    let queue = exporters.spans(&"otel".into(), &provider(TraceProtocol::OtlpGrpc));
    for _ in 0..QUEUE + 5 {
        queue.tell(span());
    }
    assert_eq!(queue.dropped.get(), 5);
    let same = exporters.spans(&"otel".into(), &provider(TraceProtocol::OtlpGrpc));
    assert!(same.sender.same_channel(&queue.sender));
}

#[tokio::test(start_paused = true)]
async fn lines_reach_the_collector_with_their_trace() {
    let collector = Arc::new(Collector::default());
    let exporters = exporters(&collector);
    let queue = exporters.logs(&LogCollector {
        service: service("logs"),
        port: 4317,
        log_name: "access".into(),
    });
    queue.tell(LogData {
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
        body: "GET /".to_owned(),
        attributes: vec![("code".into(), "200".to_owned())],
        trace: Some((1, 2)),
    });
    collector.heard.notified().await;
    let calls = collector.calls.lock();
    assert_eq!(calls[0].request.uri().path(), otlp::EXPORT_LOGS);
    let message: ExportLogsServiceRequest =
        prost::Message::decode(&calls[0].request.body()[5..]).unwrap();
    let logs = &message.resource_logs[0];
    let names = logs.resource.as_ref().unwrap().attributes.iter();
    assert!(names.clone().any(|it| it.key == "log_name"));
    let record = &logs.scope_logs[0].log_records[0];
    assert_eq!(record.time_unix_nano, 1_000_000_000);
    assert_eq!(record.span_id, 2_u64.to_be_bytes());
    assert_eq!(record.attributes[0].key, "code");
}

#[test]
fn a_request_that_is_not_sampled_has_no_span() {
    let draw = mesh::draw::Draw(1);
    let record = |sampled| mesh::l7::record::RequestRecord {
        span: Some(Span::new(None, sampled, draw)),
        ..mesh::l7::record::RequestRecord::default()
    };
    let nowhere = mesh::l7::log_format::Nowhere;
    let tracing = |istio_tags| Tracing {
        providers: Vec::new(),
        propagation: None,
        per_million: 0,
        by_request_id: true,
        istio_tags,
        tags: Vec::new(),
    };
    assert!(SpanData::new(&record(false), &node(), &tracing(true), &nowhere).is_none());
    let plain = SpanData::new(&record(true), &node(), &tracing(false), &nowhere).unwrap();
    let names = plain.attributes.iter().map(|(name, _)| name);
    assert!(names.clone().all(|it| !it.starts_with("istio.")));
    assert!(names.clone().any(|it| **it == *"node_id"));
    let span = SpanData::new(&record(true), &node(), &tracing(true), &nowhere).unwrap();
    assert!(span.failed, "no response is a failure");
    assert!(
        span.attributes
            .contains(&("component".into(), "proxy".to_owned()))
    );
    assert!(
        span.attributes
            .contains(&("istio.namespace".into(), "default".to_owned()))
    );
}
