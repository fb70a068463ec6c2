//! Histograms that requests add to without a lock, and their bounds.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use mesh::l7::config::WaypointConfig;
use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

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
}

impl Histogram {
    pub(super) fn new(bounds: &Arc<[f64]>) -> Self {
        Self {
            bounds: Arc::clone(bounds),
            buckets: (0..=bounds.len()).map(|_| AtomicU64::default()).collect(),
            sum: AtomicU64::default(),
        }
    }

    pub(super) fn observe(&self, thousandths: u64) {
        #[allow(clippy::cast_precision_loss, reason = "bounds are far below 2^53")]
        let value = thousandths as f64 / 1000.0;
        let at = self.bounds.iter().position(|bound| value <= *bound);
        self.buckets[at.unwrap_or(self.bounds.len())].fetch_add(1, Relaxed);
        self.sum.fetch_add(thousandths, Relaxed);
    }

    pub(super) fn encode(&self, encoder: &mut MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Relaxed));
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        #[allow(
            clippy::cast_precision_loss,
            reason = "a sum of milliseconds or bytes; precision beyond 2^53 does not matter"
        )]
        let sum = self.sum.load(Relaxed) as f64 / 1000.0;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }
}
