//! The `istio_requests_total` family.
//!
//! A request finds its series once, at its end, and adds to atomic counters. Series are bounded: those that nothing has
//! used for a while are dropped when the metrics are asked for, and beyond the bound all requests count in one series
//! that says so.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
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
use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder, NoLabelSet,
    },
    metrics::{MetricType, counter::ConstCounter, counter::Counter, family::Family},
    registry::Registry,
};

use super::labels::Labels;

/// Label sets kept at a time.
const MAX_SERIES: usize = 4_000;
/// How long a label set that nothing uses is kept.
const IDLE: Duration = Duration::from_secs(30 * 60);

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

/// One of the families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    Requests,
    Duration,
    RequestBytes,
    ResponseBytes,
    RequestMessages,
    ResponseMessages,
}

impl Metric {
    pub(crate) const ALL: [Self; 6] = [
        Self::Requests,
        Self::Duration,
        Self::RequestBytes,
        Self::ResponseBytes,
        Self::RequestMessages,
        Self::ResponseMessages,
    ];

    /// The name as Prometheus shows it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Requests => "istio_requests_total",
            Self::Duration => "istio_request_duration_milliseconds",
            Self::RequestBytes => "istio_request_bytes",
            Self::ResponseBytes => "istio_response_bytes",
            Self::RequestMessages => "istio_request_messages_total",
            Self::ResponseMessages => "istio_response_messages_total",
        }
    }

    fn help(self) -> &'static str {
        match self {
            Self::Requests => "Requests",
            Self::Duration => "From the head of the request to the end of the response",
            Self::RequestBytes => "Heads and bodies of requests",
            Self::ResponseBytes => "Heads and bodies of responses",
            Self::RequestMessages => "gRPC messages of clients",
            Self::ResponseMessages => "gRPC messages of backends",
        }
    }
}

/// A set of families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Metrics(u8);

impl Metrics {
    /// All of them.
    #[cfg(test)]
    pub(crate) const ALL: Self = Self(0b11_1111);
    /// None of them.
    pub(crate) const NONE: Self = Self(0);

    pub(crate) fn with(self, metric: Metric) -> Self {
        Self(self.0 | 1 << (metric as u8))
    }

    pub(crate) fn contains(self, metric: Metric) -> bool {
        self.0 & 1 << (metric as u8) != 0
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Labels(Metrics, Labels),
    /// What did not find room.
    Overflow,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Matched {
    result: &'static str,
    policy: String,
}

/// Counts AUDIT policies and policies on trial that matched. Bounded by the policies that the control plane tells.
#[derive(Clone, Debug, Default)]
pub(crate) struct PolicyMatches(Family<Matched, Counter>);

impl PolicyMatches {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let new = Self::default();
        registry.register(
            "leyline_policy_matches",
            "Requests that an AUDIT policy or a policy on trial matched, by what it would have meant",
            new.0.clone(),
        );
        new
    }

    /// `policy`: `namespace/name`.
    pub(crate) fn count(&self, result: &'static str, policy: &str) {
        let policy = policy.to_owned();
        self.0.get_or_create(&Matched { result, policy }).inc();
    }
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

/// Upper bounds of the histograms.
#[derive(Clone, Debug, PartialEq)]
struct Bounds {
    duration: Arc<[f64]>,
    request_bytes: Arc<[f64]>,
    response_bytes: Arc<[f64]>,
}

impl Bounds {
    fn of(config: Option<&WaypointConfig>) -> Self {
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

#[derive(Debug)]
struct Histogram {
    bounds: Arc<[f64]>,
    /// One more than there are bounds.
    buckets: Box<[AtomicU64]>,
    /// Thousandths.
    sum: AtomicU64,
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

impl Histogram {
    fn new(bounds: &Arc<[f64]>) -> Self {
        Self {
            bounds: Arc::clone(bounds),
            buckets: (0..=bounds.len()).map(|_| AtomicU64::default()).collect(),
            sum: AtomicU64::default(),
        }
    }

    fn observe(&self, thousandths: u64) {
        #[allow(clippy::cast_precision_loss, reason = "bounds are far below 2^53")]
        let value = thousandths as f64 / 1000.0;
        let at = self.bounds.iter().position(|bound| value <= *bound);
        self.buckets[at.unwrap_or(self.bounds.len())].fetch_add(1, Relaxed);
        self.sum.fetch_add(thousandths, Relaxed);
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
        registry.register_collector(Box::new(new.clone()));
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

#[derive(Debug)]
struct Pairs<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl EncodeLabelSet for Pairs<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, value) in &self.0 {
            EncodeLabel::encode(&(&**name, &**value), encoder.encode_label())?;
        }
        Ok(())
    }
}

impl Collector for Requests {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.forget(self.0.began.elapsed().as_secs());
        let rows = self.rows();
        for metric in Metric::ALL {
            encode(metric, &rows, &mut encoder)?;
        }
        Ok(())
    }
}

fn encode(
    metric: Metric,
    rows: &[(Key, Arc<Series>)],
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let counter = matches!(
        metric,
        Metric::Requests | Metric::RequestMessages | Metric::ResponseMessages
    );
    let kind = if counter {
        MetricType::Counter
    } else {
        MetricType::Histogram
    };
    // The encoder adds the suffix of counters itself.
    let name = metric.name();
    let name = name.strip_suffix("_total").unwrap_or(name);
    let mut family = encoder.encode_descriptor(name, metric.help(), None, kind)?;
    for (key, series) in rows.iter().filter(|(key, _)| key.has(metric)) {
        let pairs = Pairs(key.pairs());
        let mut encoder = family.encode_family(&pairs)?;
        match metric {
            Metric::Requests => count(&series.requests, encoder)?,
            Metric::RequestMessages => count(&series.request_messages, encoder)?,
            Metric::ResponseMessages => count(&series.response_messages, encoder)?,
            Metric::Duration => series.duration.encode(&mut encoder)?,
            Metric::RequestBytes => series.request_bytes.encode(&mut encoder)?,
            Metric::ResponseBytes => series.response_bytes.encode(&mut encoder)?,
        }
    }
    Ok(())
}

fn count(
    value: &AtomicU64,
    encoder: prometheus_client::encoding::MetricEncoder<'_>,
) -> Result<(), fmt::Error> {
    ConstCounter::new(value.load(Relaxed)).encode(encoder)
}

impl Histogram {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::MetricEncoder<'_>,
    ) -> Result<(), fmt::Error> {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh::{
        flow::{Party, PartyLabels, ServiceName},
        l7::response_flags::Flag,
    };
    use prometheus_client::encoding::text;

    use mesh::l7::config::HistogramBuckets;

    use super::*;
    use crate::telemetry::plan::tests::config;

    fn record() -> RequestRecord {
        let party = |name: &str| Party {
            pod: None,
            labels: Arc::new(PartyLabels {
                workload: Some(format!("{name}-v1").into()),
                canonical_service: Some(name.into()),
                canonical_revision: Some("v1".into()),
                namespace: Some("default".into()),
                principal: Some(format!("spiffe://cluster.local/ns/default/sa/{name}").into()),
                cluster: Some("Kubernetes".into()),
                place: None,
            }),
        };
        RequestRecord {
            source: party("client"),
            destination: party("web"),
            service: Some(ServiceName {
                hostname: "web.default.svc.cluster.local".into(),
                namespace: "default".into(),
                name: "web".into(),
            }),
            status: Some(200),
            duration: Some(Duration::from_micros(2_500)),
            bytes_sent: 100,
            ..RequestRecord::default()
        }
    }

    fn scrape(registry: &Registry) -> String {
        let mut text = String::new();
        text::encode(&mut text, registry).unwrap();
        text
    }

    const LABELS: &str = "reporter=\"waypoint\",source_workload=\"client-v1\",source_canonical_service=\"client\",\
        source_canonical_revision=\"v1\",source_workload_namespace=\"default\",\
        source_principal=\"spiffe://cluster.local/ns/default/sa/client\",source_app=\"client\",source_version=\"v1\",\
        source_cluster=\"Kubernetes\",destination_workload=\"web-v1\",destination_workload_namespace=\"default\",\
        destination_principal=\"spiffe://cluster.local/ns/default/sa/web\",destination_app=\"web\",\
        destination_version=\"v1\",destination_service=\"web.default.svc.cluster.local\",\
        destination_service_name=\"web\",destination_service_namespace=\"default\",\
        destination_canonical_service=\"web\",destination_canonical_revision=\"v1\",\
        destination_cluster=\"Kubernetes\",request_protocol=\"http\",response_code=\"200\",response_flags=\"-\",\
        connection_security_policy=\"mutual_tls\"";

    #[test]
    fn requests_are_counted_with_istios_labels_in_its_order() {
        let mut registry = Registry::default();
        let requests = Requests::register(&mut registry);
        requests.count(&record(), Metrics::ALL, [].into());
        requests.count(&record(), Metrics::ALL, [].into());
        let text = scrape(&registry);
        for line in [
            format!("istio_requests_total{{{LABELS}}} 2\n"),
            format!("istio_request_duration_milliseconds_sum{{{LABELS}}} 5.0\n"),
            format!("istio_request_duration_milliseconds_bucket{{le=\"1.0\",{LABELS}}} 0\n"),
            format!("istio_request_duration_milliseconds_bucket{{le=\"5.0\",{LABELS}}} 2\n"),
            format!("istio_request_duration_milliseconds_bucket{{le=\"3600000.0\",{LABELS}}} 2\n"),
            format!("istio_request_duration_milliseconds_bucket{{le=\"+Inf\",{LABELS}}} 2\n"),
            format!("istio_response_bytes_sum{{{LABELS}}} 200.0\n"),
            format!("istio_request_bytes_count{{{LABELS}}} 2\n"),
        ] {
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn grpc_and_failures_are_told() {
        let mut registry = Registry::default();
        let requests = Requests::register(&mut registry);
        let failed = RequestRecord {
            grpc: true,
            grpc_status: Some(14),
            request_messages: 3,
            flags: Flag::NoHealthyUpstream.into(),
            destination: Party::default(),
            ..record()
        };
        requests.count(&failed, Metrics::ALL, [].into());
        let text = scrape(&registry);
        let tail = "request_protocol=\"grpc\",response_code=\"200\",grpc_response_status=\"14\",\
            response_flags=\"UH\",connection_security_policy=\"mutual_tls\"} ";
        assert!(text.contains(&format!("{tail}3\n")), "{text}");
        assert!(text.contains("destination_workload=\"unknown\""), "{text}");
    }

    #[test]
    fn a_telemetry_changes_labels_and_takes_families_away() {
        let mut registry = Registry::default();
        let requests = Requests::register(&mut registry);
        let changed = [
            ("source_principal".into(), None),
            ("response_code".into(), Some("2xx".into())),
            ("host".into(), Some("web".into())),
        ];
        let only = Metrics::NONE.with(Metric::Requests);
        requests.count(&record(), only, changed.into());
        let text = scrape(&registry);
        assert!(text.contains("response_code=\"2xx\""), "{text}");
        assert!(
            text.contains("connection_security_policy=\"mutual_tls\",host=\"web\"} 1"),
            "{text}"
        );
        assert!(!text.contains("source_principal"), "{text}");
        assert!(!text.contains("istio_request_bytes_count"), "{text}");
        requests.count(&record(), Metrics::NONE, [].into());
        assert_eq!(requests.rows().len(), 1);
    }

    #[test]
    fn histograms_have_the_bounds_that_the_waypoint_is_told() {
        let mut registry = Registry::default();
        let requests = Requests::register(&mut registry);
        requests.count(&record(), Metrics::ALL, [].into());
        let buckets =
            |prefix, bounds: &[f64]| HistogramBuckets::new(prefix, bounds.into()).unwrap();
        let config = WaypointConfig {
            histogram_buckets: vec![
                buckets("istiocustom", &[2.0, 8.0]),
                buckets("istio_request_bytes", &[64.0]),
            ],
            ..config()
        };
        requests.configure(Some(&config));
        requests.count(&record(), Metrics::ALL, [].into());
        let text = scrape(&registry);
        let of = |metric: &str| -> Vec<&str> {
            let start = format!("{metric}_bucket{{le=\"");
            let lines = text.lines().filter_map(|line| line.strip_prefix(&*start));
            lines.filter_map(|line| line.split('"').next()).collect()
        };
        assert_eq!(
            of("istio_request_duration_milliseconds"),
            ["2.0", "8.0", "+Inf"]
        );
        assert_eq!(of("istio_response_bytes"), ["2.0", "8.0", "+Inf"]);
        assert_eq!(of("istio_request_bytes"), ["64.0", "+Inf"]);
        // Nothing changed: counting goes on.
        requests.configure(Some(&config));
        requests.count(&record(), Metrics::ALL, [].into());
        let counted = format!("istio_requests_total{{{LABELS}}} 2\n");
        assert!(scrape(&registry).contains(&counted), "{text}");
    }

    #[test]
    fn label_sets_are_bounded() {
        let mut registry = Registry::default();
        let requests = Requests::register(&mut registry);
        for at in 0..MAX_SERIES + 10 {
            let changed = [("id".into(), Some(at.to_string().into()))];
            requests.count(&record(), Metrics::ALL, changed.into());
        }
        assert_eq!(requests.rows().len(), MAX_SERIES + 1);
        let rows = requests.rows();
        let (_, rest) = rows.iter().find(|(key, _)| *key == Key::Overflow).unwrap();
        assert_eq!(rest.requests.load(Relaxed), 10);
        assert_eq!(requests.0.overflowed.get(), 10);
    }

    #[test]
    fn what_nothing_uses_is_forgotten() {
        let requests = Requests::register(&mut Registry::default());
        requests.count(&record(), Metrics::ALL, [].into());
        requests.forget(IDLE.as_secs());
        assert_eq!(requests.rows().len(), 1);
        requests.forget(IDLE.as_secs() + 1);
        assert!(requests.rows().is_empty());
    }
}
