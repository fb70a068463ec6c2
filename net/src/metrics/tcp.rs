//! The `istio_tcp_*` families.
//!
//! A flow finds its series once, when it opens, and then only adds to counters. Series are bounded: those of workloads
//! that are gone are dropped on request, and at the limit those that no flow uses make room, least recently used first.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use mesh::flow::{Direction, ResponseFlag};
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder},
    metrics::{MetricType, counter::ConstCounter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Label sets kept at a time, beyond those of open flows.
pub const MAX_SERIES: usize = 10_000;
/// Label sets that are found without a look at their texts; at more, all are forgotten.
const RECENT: usize = 1024;

/// Labels of a TCP flow, but for `response_flags`, which is known at its end.
pub trait Labels: Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static {
    /// Where the labels are, in place of what they say. While labels live, whatever has their key is equal to them; what is
    /// equal may have another one.
    type Key: Copy + Eq + Hash + Send + Sync;

    /// Costs no look at the texts.
    fn key(&self) -> Self::Key;

    /// Calls `each` with every name and value, in the order of node-tunnel.md 1.7, `response_flags` in its place.
    fn each(&self, flag: ResponseFlag, each: &mut dyn FnMut(&str, &str));
}

/// The families. Cheap to clone.
pub struct Tcp<L: Labels>(Arc<Inner<L>>);

struct Inner<L: Labels> {
    series: Mutex<Known<L>>,
    /// Orders uses; wraps never.
    clock: AtomicU64,
    sockets: Family<Sockets, Gauge>,
    /// Of `sockets`, those that were asked for, by direction: an accepted connection does not look its gauge up.
    gauges: [OnceLock<Gauge>; 3],
}

struct Known<L: Labels> {
    all: HashMap<L, Arc<Series>>,
    /// A short cut to some of `all`. The labels are kept so that nothing else comes to be where they are.
    recent: HashMap<L::Key, (L, Weak<Series>)>,
}

impl<L: Labels> Known<L> {
    fn find(&mut self, labels: &L) -> Option<Arc<Series>> {
        let key = labels.key();
        let recent = self.recent.get(&key);
        if let Some(found) = recent.and_then(|(_, series)| series.upgrade()) {
            return Some(found);
        }
        let found = self.all.get(labels)?.clone();
        self.remember(labels, &found);
        Some(found)
    }

    fn remember(&mut self, labels: &L, series: &Arc<Series>) {
        if self.recent.len() >= RECENT {
            self.recent.clear();
        }
        let entry = (labels.clone(), Arc::downgrade(series));
        self.recent.insert(labels.key(), entry);
    }

    fn enter(&mut self, labels: &L) -> Arc<Series> {
        if self.all.len() >= MAX_SERIES {
            make_room(&mut self.all);
        }
        let new = Arc::new(Series::default());
        self.all.insert(labels.clone(), Arc::clone(&new));
        self.remember(labels, &new);
        new
    }
}

#[derive(Default)]
struct Series {
    opened: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    closed: [AtomicU64; ResponseFlag::ALL.len()],
    used: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sockets {
    reporter: &'static str,
}

impl<L: Labels> Clone for Tcp<L> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<L: Labels> fmt::Debug for Tcp<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tcp").finish_non_exhaustive()
    }
}

impl<L: Labels> Tcp<L> {
    /// New families in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let new = Self(Arc::new(Inner {
            series: Mutex::new(Known {
                all: HashMap::new(),
                recent: HashMap::new(),
            }),
            clock: AtomicU64::new(0),
            sockets: Family::default(),
            gauges: Default::default(),
        }));
        registry.register_collector(Box::new(new.clone()));
        registry.register(
            "istio_tcp_sockets_open",
            "Accepted sockets that are open",
            new.0.sockets.clone(),
        );
        new
    }

    /// Counts a flow as opened.
    pub fn open(&self, labels: &L) -> Flow {
        let series = self.series(labels);
        series.opened.fetch_add(1, Relaxed);
        Flow {
            series,
            ended: false,
        }
    }

    /// Counts a flow that failed before it carried anything, as closed and failed.
    pub fn fail(&self, labels: &L, flag: ResponseFlag) {
        self.series(labels).closed[index(flag)].fetch_add(1, Relaxed);
    }

    /// Counts an accepted socket for as long as the guard lives.
    pub fn socket(&self, direction: Direction) -> SocketGuard {
        let gauge = self.0.gauges[direction as usize].get_or_init(|| {
            let reporter = direction.reporter();
            let gauge = self.0.sockets.get_or_create(&Sockets { reporter });
            gauge.clone()
        });
        gauge.inc();
        SocketGuard(gauge.clone())
    }

    /// Drops series that `keep` refuses and that no open flow uses: to be called when workloads go.
    pub fn retain(&self, mut keep: impl FnMut(&L) -> bool) {
        let mut known = self.0.series.lock();
        known.recent.clear();
        let all = &mut known.all;
        all.retain(|labels, series| Arc::strong_count(series) > 1 || keep(labels));
    }

    fn series(&self, labels: &L) -> Arc<Series> {
        let now = self.0.clock.fetch_add(1, Relaxed);
        let mut known = self.0.series.lock();
        let series = match known.find(labels) {
            Some(found) => found,
            None => known.enter(labels),
        };
        series.used.store(now, Relaxed);
        series
    }
}

/// Drops the least recently used tenth of what no flow uses.
fn make_room<L: Labels>(all: &mut HashMap<L, Arc<Series>>) {
    let idle = all.values().filter(|series| Arc::strong_count(series) == 1);
    let mut uses: Vec<u64> = idle.map(|series| series.used.load(Relaxed)).collect();
    let drop = (uses.len() / 10).max(1).min(uses.len());
    let Some(last) = drop.checked_sub(1) else {
        return;
    };
    let (_, limit, _) = uses.select_nth_unstable(last);
    let limit = *limit;
    all.retain(|_, series| Arc::strong_count(series) > 1 || series.used.load(Relaxed) > limit);
}

fn index(flag: ResponseFlag) -> usize {
    flag as usize
}

/// One open flow's counters. Dropping it counts the flow as closed without a flag.
pub struct Flow {
    series: Arc<Series>,
    ended: bool,
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flow")
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Flow {
    /// Counts payload bytes of the request: downstream to upstream.
    pub fn received(&self, bytes: u64) {
        self.series.received.fetch_add(bytes, Relaxed);
    }

    /// Counts payload bytes of the response: upstream to downstream.
    pub fn sent(&self, bytes: u64) {
        self.series.sent.fetch_add(bytes, Relaxed);
    }

    /// Counts the flow as closed, and as failed where the flag says so.
    pub fn close(mut self, flag: ResponseFlag) {
        self.ended = true;
        self.series.closed[index(flag)].fetch_add(1, Relaxed);
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if !self.ended {
            self.series.closed[index(ResponseFlag::None)].fetch_add(1, Relaxed);
        }
    }
}

/// Counts a socket as open while it lives.
#[derive(Debug)]
pub struct SocketGuard(Gauge);

impl Drop for SocketGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

struct Pairs<'a, L> {
    labels: &'a L,
    flag: ResponseFlag,
}

impl<L: Labels> EncodeLabelSet for Pairs<'_, L> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let mut result = Ok(());
        self.labels.each(self.flag, &mut |name, value| {
            let label = (name, value);
            let encoded = EncodeLabel::encode(&label, encoder.encode_label());
            result = result.and(encoded);
        });
        result
    }
}

type Row<L> = (L, Arc<Series>);

impl<L: Labels> Collector for Tcp<L> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // A copy, so that opening flows do not wait for a scrape.
        let rows: Vec<Row<L>> = {
            let known = self.0.series.lock();
            let rows = known.all.iter();
            rows.map(|(labels, series)| (labels.clone(), Arc::clone(series)))
                .collect()
        };
        let closed = |series: &Series, flag: ResponseFlag| series.closed[index(flag)].load(Relaxed);
        family(
            &mut encoder,
            "istio_tcp_connections_opened",
            "Connections opened",
            &rows,
            |series, flag| (flag == ResponseFlag::None).then(|| series.opened.load(Relaxed)),
        )?;
        family(
            &mut encoder,
            "istio_tcp_connections_closed",
            "Connections closed",
            &rows,
            |series, flag| Some(closed(series, flag)).filter(|n| *n > 0),
        )?;
        family(
            &mut encoder,
            "istio_tcp_received_bytes",
            "Payload bytes of requests",
            &rows,
            |series, flag| (flag == ResponseFlag::None).then(|| series.received.load(Relaxed)),
        )?;
        family(
            &mut encoder,
            "istio_tcp_sent_bytes",
            "Payload bytes of responses",
            &rows,
            |series, flag| (flag == ResponseFlag::None).then(|| series.sent.load(Relaxed)),
        )?;
        family(
            &mut encoder,
            "istio_tcp_connections_failed",
            "Connections that failed",
            &rows,
            |series, flag| {
                Some(closed(series, flag)).filter(|n| *n > 0 && flag != ResponseFlag::None)
            },
        )
    }
}

fn family<L: Labels>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: &[Row<L>],
    value: impl Fn(&Series, ResponseFlag) -> Option<u64>,
) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, series) in rows {
        for flag in ResponseFlag::ALL {
            if let Some(value) = value(series, flag) {
                let counter = ConstCounter::new(value);
                counter.encode(metric.encode_family(&Pairs { labels, flag })?)?;
            }
        }
    }
    Ok(())
}
