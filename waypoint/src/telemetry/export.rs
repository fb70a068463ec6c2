//! Sending spans and log lines away: a bounded queue per collector, and one task that empties it in batches.
//!
//! Whoever tells never waits. What finds the queue full is dropped and counted, and so is a batch that the collector
//! did not take: traces and logs are told at most once.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, header};
use mesh::{
    l7::config::{TraceProtocol, TraceProvider},
    names::Str,
};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::{sync::mpsc, time::timeout};

use super::{
    Node,
    otlp::{self, LogData},
    plan::LogCollector,
    span::{MAX_TAG, SpanData},
    zipkin,
};
use crate::service_call::{self, Call, CallError, Transport};

/// What may wait for a collector.
const QUEUE: usize = 2_048;
/// The most that is sent at once.
const BATCH: usize = 512;
/// How long a batch waits for more.
const LINGER: Duration = Duration::from_secs(1);
/// Time for an export where the provider says nothing.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer of a collector, in bytes.
const MAX_ANSWER: usize = 64 * 1024;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Told {
    kind: &'static str,
    collector: String,
}

/// Queues to collectors. A queue lives as long as a plan uses it.
pub(super) struct Exporters {
    transport: Arc<dyn Transport>,
    node: Arc<Node>,
    spans: Mutex<HashMap<Key, mpsc::WeakSender<Arc<SpanData>>>>,
    logs: Mutex<HashMap<LogCollector, mpsc::WeakSender<LogData>>>,
    sent: Family<Told, Counter>,
    dropped: Family<Told, Counter>,
}

/// A provider's name, and the text of all of it: providers of one name may follow each other.
type Key = (Str, String);

/// A queue to one collector.
#[derive(Clone, Debug)]
pub(super) struct Queue<T> {
    sender: mpsc::Sender<T>,
    dropped: Counter,
}

impl<T> Queue<T> {
    /// Adds one, or drops and counts it.
    pub(super) fn tell(&self, item: T) {
        if self.sender.try_send(item).is_err() {
            self.dropped.inc();
        }
    }
}

impl Exporters {
    pub(super) fn register(
        registry: &mut Registry,
        node: Arc<Node>,
        transport: Arc<dyn Transport>,
    ) -> Self {
        let new = Self {
            transport,
            node,
            spans: Mutex::default(),
            logs: Mutex::default(),
            sent: Family::default(),
            dropped: Family::default(),
        };
        registry.register(
            "leyline_telemetry_sent",
            "Spans and log lines that a collector has taken",
            new.sent.clone(),
        );
        registry.register(
            "leyline_telemetry_dropped",
            "Spans and log lines that found no room, or that a collector did not take",
            new.dropped.clone(),
        );
        new
    }

    fn counters(&self, kind: &'static str, collector: &str) -> (Counter, Counter) {
        let told = Told {
            kind,
            collector: collector.to_owned(),
        };
        let sent = self.sent.get_or_create(&told).clone();
        let dropped = self.dropped.get_or_create(&told).clone();
        (sent, dropped)
    }

    /// The queue of a trace provider. Must be called within a runtime.
    pub(super) fn spans(&self, name: &Str, provider: &TraceProvider) -> Queue<Arc<SpanData>> {
        let (sent, dropped) = self.counters("span", name);
        let mut all = self.spans.lock();
        all.retain(|_, it| it.strong_count() > 0);
        let key = (name.clone(), format!("{provider:?}"));
        if let Some(sender) = all.get(&key).and_then(mpsc::WeakSender::upgrade) {
            return Queue { sender, dropped };
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        all.insert(key, sender.downgrade());
        let (node, provider) = (Arc::clone(&self.node), provider.clone());
        let limit = provider.timeout.unwrap_or(TIMEOUT);
        let task = Task {
            transport: Arc::clone(&self.transport),
            collector: name.clone(),
            limit,
            sent,
            dropped: dropped.clone(),
        };
        tokio::spawn(task.run(receiver, move |batch| span_call(batch, &provider, &node)));
        Queue { sender, dropped }
    }

    /// The queue of a collector of logs. Must be called within a runtime.
    pub(super) fn logs(&self, collector: &LogCollector) -> Queue<LogData> {
        let (sent, dropped) = self.counters("log", &collector.service.hostname);
        let mut all = self.logs.lock();
        all.retain(|_, it| it.strong_count() > 0);
        if let Some(sender) = all.get(collector).and_then(mpsc::WeakSender::upgrade) {
            return Queue { sender, dropped };
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        all.insert(collector.clone(), sender.downgrade());
        let (node, to) = (Arc::clone(&self.node), collector.clone());
        let task = Task {
            transport: Arc::clone(&self.transport),
            collector: to.service.hostname.clone(),
            limit: TIMEOUT,
            sent,
            dropped: dropped.clone(),
        };
        tokio::spawn(task.run(receiver, move |batch| Some(log_call(batch, &to, &node))));
        Queue { sender, dropped }
    }
}

struct Task {
    transport: Arc<dyn Transport>,
    collector: Str,
    limit: Duration,
    sent: Counter,
    dropped: Counter,
}

impl Task {
    /// Until the last queue is dropped and everything was tried once.
    async fn run<T>(self, mut receiver: mpsc::Receiver<T>, call: impl Fn(&[T]) -> Option<Call>) {
        let mut batch = Vec::new();
        let mut failing = false;
        loop {
            if receiver.recv_many(&mut batch, BATCH).await == 0 {
                return;
            }
            let more = async {
                while batch.len() < BATCH {
                    let room = BATCH - batch.len();
                    if receiver.recv_many(&mut batch, room).await == 0 {
                        return;
                    }
                }
            };
            // Whichever comes first, a full batch or the end of the wait: both are as good.
            let _ = timeout(LINGER, more).await;
            let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
            let result = match call(&batch) {
                Some(call) => self.send(call).await,
                None => Err(CallError::Protocol("the batch cannot be written")),
            };
            batch.clear();
            match &result {
                Ok(()) => self.sent.inc_by(count),
                Err(_) => self.dropped.inc_by(count),
            };
            self.report(result, &mut failing);
        }
    }

    async fn send(&self, call: Call) -> Result<(), CallError> {
        let grpc = call.http2;
        let answer = service_call::within(&*self.transport, call, self.limit).await?;
        if grpc {
            return service_call::grpc_message::<()>(&answer);
        }
        match answer.head.status.is_success() {
            true => Ok(()),
            false => Err(CallError::Status(
                answer.head.status.as_u16().into(),
                String::new(),
            )),
        }
    }

    /// Once when it begins to fail, once when it works again.
    fn report(&self, result: Result<(), CallError>, failing: &mut bool) {
        match result {
            Err(error) if !*failing => {
                *failing = true;
                tracing::warn!(collector = %self.collector, %error, "telemetry is not taken");
            }
            Ok(()) if *failing => {
                *failing = false;
                tracing::info!(collector = %self.collector, "telemetry is taken again");
            }
            _ => {}
        }
    }
}

fn longest(provider: &TraceProvider) -> usize {
    match usize::try_from(provider.max_tag_length) {
        Ok(0) | Err(_) => MAX_TAG,
        Ok(length) => length,
    }
}

/// None: it cannot be written.
fn span_call(batch: &[Arc<SpanData>], provider: &TraceProvider, node: &Node) -> Option<Call> {
    let (service, port) = (&provider.service, provider.port);
    let longest = longest(provider);
    let post = |path: &str, kind: &'static str, body: Vec<u8>| {
        let mut request = service_call::post(service, port, path, Bytes::from(body));
        let kind = HeaderValue::from_static(kind);
        request.headers_mut().insert(header::CONTENT_TYPE, kind);
        request
    };
    let mut request: Request<Bytes> = match &provider.protocol {
        TraceProtocol::OtlpGrpc => {
            let message = otlp::spans(batch, node, longest);
            service_call::grpc_request(service, port, otlp::EXPORT_SPANS, &message)
        }
        TraceProtocol::OtlpHttp(path) => {
            let message = otlp::spans(batch, node, longest);
            let body = prost::Message::encode_to_vec(&message);
            post(path, "application/x-protobuf", body)
        }
        TraceProtocol::Zipkin { path, .. } => {
            let body = zipkin::spans(batch, node, longest).ok()?;
            post(path, "application/json", body)
        }
    };
    for (name, value) in &provider.headers {
        if let Ok(value) = HeaderValue::from_str(value) {
            request.headers_mut().insert(name, value);
        }
    }
    Some(Call {
        service: service.clone(),
        port,
        http2: provider.protocol == TraceProtocol::OtlpGrpc,
        request,
        max_answer: MAX_ANSWER,
    })
}

fn log_call(batch: &[LogData], to: &LogCollector, node: &Node) -> Call {
    let message = otlp::logs(batch, node, &to.log_name);
    Call {
        service: to.service.clone(),
        port: to.port,
        http2: true,
        request: service_call::grpc_request(&to.service, to.port, otlp::EXPORT_LOGS, &message),
        max_answer: MAX_ANSWER,
    }
}

#[cfg(test)]
mod tests;
