//! The live view of connections: a [`Journal`] that the data plane writes and that operators follow over HTTP, one line
//! of JSON per event.
//!
//! Writing never waits for a reader. With no reader, an opened or closed connection costs one look at a flag.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::RawQuery,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use mesh::{
    authorize::RuleRef,
    flow::FlowRecord,
    journal::{Begin, Event, Interest, Journal, Missed, ReaderId, TooManyReaders, What},
};
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};
use serde::Serialize;
use tokio::{sync::Notify, time::timeout};

#[cfg(test)]
mod tests;

/// Events that one read takes, and so about what one write to a reader holds.
const BATCH: usize = 256;
/// A reader to whom nothing happens is written to this often, so that one that is gone is noticed.
const ALIVE: Duration = Duration::from_secs(10);

/// The record of this process's connections. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Flows(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    journal: Mutex<Journal>,
    /// Whether the journal wants traffic: looked at for every connection, without the lock.
    traffic: AtomicBool,
    news: Notify,
}

impl Flows {
    /// Tells that bytes begin to flow; the record is made only where somebody wants it.
    pub fn opened(&self, record: impl FnOnce() -> FlowRecord, allowed_by: Option<&RuleRef>) {
        if self.0.traffic.load(Ordering::Relaxed) {
            self.tell(What::Opened, record(), allowed_by);
        }
    }

    /// Tells how a connection ended, also one that never was. Says nothing of one that has not ended.
    pub fn ended(&self, record: &FlowRecord, allowed_by: Option<&RuleRef>) {
        let Some(end) = record.end else { return };
        let what = What::of_end(end);
        if what != What::Closed || self.0.traffic.load(Ordering::Relaxed) {
            self.tell(what, record.clone(), allowed_by);
        }
    }

    fn tell(&self, what: What, record: FlowRecord, allowed_by: Option<&RuleRef>) {
        let now = SystemTime::now();
        let allowed_by = allowed_by.cloned();
        self.0.journal.lock().tell(what, now, record, allowed_by);
        self.0.news.notify_waiters();
    }

    /// Registers how much readers were too slow for.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(Dropped(self.clone())));
    }

    /// The refusals and failures that are kept, for `/refusals`.
    pub async fn refusals(self) -> Response {
        let kept: Vec<_> = self.0.journal.lock().failures().cloned().collect();
        let told: Vec<_> = kept.iter().map(|it| Line::of(it)).collect();
        Json(told).into_response()
    }

    /// A stream of lines, for `/flows`. `?only=failures` leaves traffic out; `?kept` begins with the refusals and
    /// failures that are kept.
    pub async fn stream(self, RawQuery(query): RawQuery) -> Response {
        let asked = query.as_deref().unwrap_or_default();
        let (interest, begin) = match parse(asked) {
            Ok(asked) => asked,
            Err(unknown) => {
                let text = format!("{unknown} is not known: only=failures and kept are\n");
                return (StatusCode::BAD_REQUEST, text).into_response();
            }
        };
        match self.follow(interest, begin) {
            Ok(reader) => {
                let lines = stream::unfold(reader, |mut reader| async {
                    let lines = reader.lines().await;
                    Some((Ok::<_, Infallible>(lines), reader))
                });
                let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
                (kind, Body::from_stream(lines)).into_response()
            }
            Err(full) => (StatusCode::SERVICE_UNAVAILABLE, format!("{full}\n")).into_response(),
        }
    }

    /// Enters a reader, until what is answered is dropped.
    ///
    /// # Errors
    /// There are as many as may be.
    pub fn follow(&self, interest: Interest, begin: Begin) -> Result<Reader, TooManyReaders> {
        let mut journal = self.0.journal.lock();
        let id = journal.follow(interest, begin)?;
        self.0.set_traffic(&journal);
        Ok(Reader {
            flows: self.clone(),
            id,
            greeted: false,
        })
    }
}

impl Inner {
    fn set_traffic(&self, journal: &Journal) {
        self.traffic
            .store(journal.wants_traffic(), Ordering::Relaxed);
    }
}

/// What a query asks for, or the word of it that makes no sense.
fn parse(query: &str) -> Result<(Interest, Begin), &str> {
    let (mut interest, mut begin) = (Interest::All, Begin::Now);
    for word in query.split('&').filter(|it| !it.is_empty()) {
        match word {
            "only=failures" => interest = Interest::Failures,
            "kept" | "kept=true" => begin = Begin::Kept,
            unknown => return Err(unknown),
        }
    }
    Ok((interest, begin))
}

/// Somebody who follows [`Flows`]. Dropping it takes it off.
#[derive(Debug)]
pub struct Reader {
    flows: Flows,
    id: ReaderId,
    greeted: bool,
}

impl Drop for Reader {
    fn drop(&mut self) {
        let inner = &self.flows.0;
        let mut journal = inner.journal.lock();
        journal.unfollow(self.id);
        inner.set_traffic(&journal);
    }
}

impl Reader {
    /// The next lines, at least one; an `alive` line first of all, and where nothing happens for a while. Cancel-safe:
    /// what has been read is answered at once.
    pub async fn lines(&mut self) -> Bytes {
        if !std::mem::replace(&mut self.greeted, true) {
            return line(&Other::Alive);
        }
        timeout(ALIVE, self.news())
            .await
            .unwrap_or_else(|_| line(&Other::Alive))
    }

    async fn news(&self) -> Bytes {
        let inner = &self.flows.0;
        loop {
            let mut told = std::pin::pin!(inner.news.notified());
            // Before the look, or what happens right after it would be missed.
            told.as_mut().enable();
            let news = inner.journal.lock().read(self.id, BATCH);
            let mut text = Vec::new();
            if !news.missed.is_empty() {
                text.extend_from_slice(&line(&Other::Missed(&news.missed)));
            }
            for event in &news.events {
                text.extend_from_slice(&line(&Line::of(event)));
            }
            if !text.is_empty() {
                return text.into();
            }
            told.await;
        }
    }
}

fn line(of: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec(of).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

/// An event as it is told.
#[derive(Serialize)]
struct Line<'a> {
    event: What,
    /// RFC 3339, in UTC.
    time: String,
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first: Option<String>,
    /// From the closed list, in the words of logs and metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// The policies that decided, `namespace/name`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    policies: Vec<String>,
    #[serde(flatten)]
    record: &'a FlowRecord,
}

impl<'a> Line<'a> {
    fn of(event: &'a Event) -> Self {
        let record = &*event.record;
        let refused_by = record.decided_by.iter().flat_map(|it| it.policies());
        let allowed_by = event.allowed_by.iter().map(|it| &it.policy);
        Self {
            event: event.what,
            time: rfc3339(event.at),
            count: event.count,
            first: (event.count > 1).then(|| rfc3339(event.first)),
            reason: record.end.map(|it| it.to_string()),
            policies: refused_by
                .chain(allowed_by)
                .map(ToString::to_string)
                .collect(),
            record,
        }
    }
}

/// A line that is no event of a connection.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Other<'a> {
    Alive,
    Missed(&'a Missed),
}

fn rfc3339(time: SystemTime) -> String {
    const FORM: &[time::format_description::BorrowedFormatItem<'_>] = time::macros::format_description!(
        "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
    );
    let formatted = time::OffsetDateTime::from(time).format(FORM);
    formatted.unwrap_or_default()
}

#[derive(Debug)]
struct Dropped(Flows);

impl Collector for Dropped {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (traffic, failures) = self.0.0.journal.lock().dropped();
        let help = "Events that a reader of /flows was too slow for; it was told how many";
        let name = "leyline_flow_events_dropped";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (kind, dropped) in [("traffic", traffic), ("failure", failures)] {
            let labels = [("kind", kind)];
            ConstCounter::new(dropped).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
