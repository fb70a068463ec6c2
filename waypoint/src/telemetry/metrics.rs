//! The `istio_requests_total` family.
//!
//! A request finds its series once, at its end, and adds to atomic counters. Series are bounded: those that nothing has
//! used for a while are dropped when the metrics are asked for, and beyond the bound all requests count in one series
//! that says so.

mod encode;
mod family;
mod histogram;
mod policies;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use mesh::{
    l7::{config::WaypointConfig, record::RequestRecord},
    names::Str,
};
use net::metrics::Exemplar;
use parking_lot::RwLock;
use prometheus_client::{metrics::counter::Counter, registry::Registry};

use super::labels::Labels;
pub(crate) use family::{Metric, Metrics};
use histogram::{Bounds, Histogram};
pub(crate) use policies::PolicyMatches;

/// Label sets kept at a time.
const MAX_SERIES: usize = 4_000;
/// How long a label set that nothing uses is kept.
const IDLE: Duration = Duration::from_secs(30 * 60);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Labels(Metrics, Labels),
    /// What did not find room.
    Overflow,
}

/// The families. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Requests(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    series: RwLock<HashMap<Key, Arc<Series>>>,
    /// Of series that are made from now on.
    bounds: RwLock<Bounds>,
    began: Instant,
    overflowed: Counter,
}

#[derive(Debug)]
struct Series {
    requests: AtomicU64,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
    request_messages: AtomicU64,
    response_messages: AtomicU64,
    /// Seconds since the families began.
    used: AtomicU64,
}

impl Series {
    fn new(bounds: &Bounds) -> Self {
        Self {
            requests: AtomicU64::default(),
            duration: Histogram::new(&bounds.duration),
            request_bytes: Histogram::new(&bounds.request_bytes),
            response_bytes: Histogram::new(&bounds.response_bytes),
            request_messages: AtomicU64::default(),
            response_messages: AtomicU64::default(),
            used: AtomicU64::default(),
        }
    }
}

impl Requests {
    /// New families in `registry`.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let new = Self(Arc::new(Inner {
            series: RwLock::default(),
            bounds: RwLock::new(Bounds::of(None)),
            began: Instant::now(),
            overflowed: Counter::default(),
        }));
        registry.register(
            "leyline_request_series_overflowed",
            "Requests that were counted without their labels, since there were too many label sets",
            new.0.overflowed.clone(),
        );
        new
    }

    /// Takes over what a configuration says of bounds. Where they are others, counting begins anew, as after a restart.
    pub(crate) fn configure(&self, config: Option<&WaypointConfig>) {
        let bounds = Bounds::of(config);
        let mut current = self.0.bounds.write();
        if *current != bounds {
            *current = bounds;
            self.0.series.write().clear();
        }
    }

    /// Counts a request that has ended, in these families and with these labels changed.
    pub(crate) fn count(
        &self,
        record: &RequestRecord,
        metrics: Metrics,
        changed: Arc<[(Str, Option<Str>)]>,
    ) {
        if metrics == Metrics::NONE {
            return;
        }
        let series = self.series(Key::Labels(metrics, Labels::new(record, changed)));
        let micros = record.duration.unwrap_or_default().as_micros();
        let bytes = |bytes: u64| bytes.saturating_mul(1000);
        series.requests.fetch_add(1, Relaxed);
        series
            .duration
            .observe(u64::try_from(micros).unwrap_or(u64::MAX));
        if let Some(exemplar) = exemplar(record) {
            series.duration.keep(exemplar);
        }
        series.request_bytes.observe(bytes(record.request_size()));
        series.response_bytes.observe(bytes(record.response_size()));
        series
            .request_messages
            .fetch_add(record.request_messages, Relaxed);
        series
            .response_messages
            .fetch_add(record.response_messages, Relaxed);
    }

    fn series(&self, key: Key) -> Arc<Series> {
        let now = self.0.began.elapsed().as_secs();
        let found = self.0.series.read().get(&key).cloned();
        let series = found.unwrap_or_else(|| self.add(key));
        series.used.store(now, Relaxed);
        series
    }

    fn add(&self, key: Key) -> Arc<Series> {
        // Before the series, as where bounds change.
        let bounds = self.0.bounds.read();
        let mut all = self.0.series.write();
        let room = all.len() < MAX_SERIES || all.contains_key(&key);
        let key = match room {
            true => key,
            false => {
                self.0.overflowed.inc();
                Key::Overflow
            }
        };
        let series = all.entry(key);
        Arc::clone(series.or_insert_with(|| Arc::new(Series::new(&bounds))))
    }

    /// Drops what nothing has used for a while; `now` in seconds since the families began.
    fn forget(&self, now: u64) {
        if let Some(limit) = now.checked_sub(IDLE.as_secs()) {
            let used = |series: &Series| series.used.load(Relaxed) >= limit;
            self.0.series.write().retain(|_, series| used(series));
        }
    }

    fn rows(&self) -> Vec<(Key, Arc<Series>)> {
        // A copy, so that requests do not wait for a scrape.
        let all = self.0.series.read();
        all.iter()
            .map(|(key, series)| (key.clone(), Arc::clone(series)))
            .collect()
    }
}

/// The trace of a request whose span is sent.
fn exemplar(record: &RequestRecord) -> Option<Exemplar> {
    let span = record.span.as_ref().filter(|it| it.sampled)?;
    let duration = record.duration?;
    Some(Exemplar {
        trace_id: span.trace_id,
        span_id: span.span_id,
        value: duration.as_secs_f64() * 1000.0,
        at: record.start + duration,
    })
}

impl Key {
    fn has(&self, metric: Metric) -> bool {
        match self {
            // Messages are gRPC's alone.
            Self::Labels(metrics, labels) => {
                let messages = matches!(metric, Metric::RequestMessages | Metric::ResponseMessages);
                metrics.contains(metric) && (!messages || labels.is_grpc())
            }
            Self::Overflow => true,
        }
    }

    fn pairs(&self) -> Vec<(Cow<'_, str>, Cow<'_, str>)> {
        match self {
            Self::Labels(_, labels) => labels.pairs(),
            Self::Overflow => vec![
                (Cow::Borrowed("reporter"), Cow::Borrowed("waypoint")),
                (Cow::Borrowed("overflow"), Cow::Borrowed("true")),
            ],
        }
    }
}
