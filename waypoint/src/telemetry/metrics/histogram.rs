//! Histograms that requests add to without a lock, and their bounds.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use mesh::l7::config::WaypointConfig;
use net::metrics::{Bucket, Exemplar, Pairs, Text};
use parking_lot::Mutex;

use super::family::Metric;

/// Upper bounds of histograms, as Istio's: milliseconds or bytes.
const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Upper bounds of the histograms.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bounds {
    pub(super) duration: Arc<[f64]>,
    pub(super) request_bytes: Arc<[f64]>,
    pub(super) response_bytes: Arc<[f64]>,
}

impl Bounds {
    pub(super) fn of(config: Option<&WaypointConfig>) -> Self {
        let of = |metric: Metric| {
            let own = config.and_then(|config| config.bounds_of(metric.name()));
            Arc::from(own.unwrap_or(&BOUNDS))
        };
        Self {
            duration: of(Metric::Duration),
            request_bytes: of(Metric::RequestBytes),
            response_bytes: of(Metric::ResponseBytes),
        }
    }
}

#[derive(Debug)]
pub(super) struct Histogram {
    bounds: Arc<[f64]>,
    /// One more than there are bounds.
    buckets: Box<[AtomicU64]>,
    /// Thousandths.
    sum: AtomicU64,
    /// The last of each bucket that has had one; no more than there are buckets.
    exemplars: Mutex<Vec<(usize, Exemplar)>>,
}

impl Histogram {
    pub(super) fn new(bounds: &Arc<[f64]>) -> Self {
        Self {
            bounds: Arc::clone(bounds),
            buckets: (0..=bounds.len()).map(|_| AtomicU64::default()).collect(),
            sum: AtomicU64::default(),
            exemplars: Mutex::default(),
        }
    }

    pub(super) fn observe(&self, thousandths: u64) {
        #[allow(clippy::cast_precision_loss, reason = "bounds are far below 2^53")]
        let value = thousandths as f64 / 1000.0;
        self.buckets[self.place(value)].fetch_add(1, Relaxed);
        self.sum.fetch_add(thousandths, Relaxed);
    }

    /// Keeps one for the bucket that it is in. Rare: only requests that are traced have one.
    pub(super) fn keep(&self, exemplar: Exemplar) {
        let at = self.place(exemplar.value);
        // Another one that comes at the same time is as good.
        let Some(mut kept) = self.exemplars.try_lock() else {
            return;
        };
        match kept.iter_mut().find(|(bucket, _)| *bucket == at) {
            Some((_, known)) => *known = exemplar,
            None => kept.push((at, exemplar)),
        }
    }

    fn place(&self, value: f64) -> usize {
        let at = self.bounds.iter().position(|bound| value <= *bound);
        at.unwrap_or(self.bounds.len())
    }

    pub(super) fn write(&self, text: &mut Text<'_>, labels: &Pairs<'_>) {
        let kept = self.exemplars.lock().clone();
        let of = |at: usize| kept.iter().find(|(bucket, _)| *bucket == at);
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets = bounds.zip(&self.buckets).enumerate();
        let buckets = buckets.map(|(at, (bound, count))| Bucket {
            bound,
            count: count.load(Relaxed),
            exemplar: of(at).map(|(_, exemplar)| *exemplar),
        });
        #[allow(
            clippy::cast_precision_loss,
            reason = "a sum of milliseconds or bytes; precision beyond 2^53 does not matter"
        )]
        let sum = self.sum.load(Relaxed) as f64 / 1000.0;
        text.histogram(labels, sum, &buckets.collect::<Vec<_>>());
    }
}
