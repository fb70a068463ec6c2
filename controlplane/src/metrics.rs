//! The control plane's metrics: every name, label and type in this one file (control-plane.md section 14).
//!
//! Upstream's counters carry no `_total`, and the shipped dashboards query those names, so [`Count`] is written without
//! the suffix that OpenMetrics gives counters.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use crate::object;
use net::metrics::Exposition;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder},
    metrics::{
        MetricType, TypedMetric,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, WAYPOINT_TYPE_URL, WORKLOAD_TYPE_URL};

/// Seconds.
const TIMES: [f64; 10] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 3.0, 10.0];
/// Bytes.
const SIZES: [f64; 7] = [1.0, 1e4, 1e5, 1e6, 4e6, 1e7, 4e7];

/// A number that only grows, under a name without `_total`. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Count(Arc<AtomicU64>);

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    proxies: Family<Proxies, Gauge>,
    pushes: Family<Kind, Count>,
    push_time: Histogram,
    config_size: Family<Kind, Histogram>,
    expired_nonce: Family<Kind, Count>,
    rejects: Family<Kind, Count>,
    inbound_updates: Family<Kind, Count>,
    triggers: Family<Kind, Count>,
    queue_time: Histogram,
    internal_errors: Count,
    convergence: Histogram,
    send_time: Histogram,
    services: Gauge,
    idle_services: Gauge,
    virtual_services: Gauge,
    certificates: Certificates,
    reviews: Reviews,
    kubernetes: KubernetesEvents,
    clusters: Family<ClusterType, Gauge>,
    remotes: Family<RemoteSync, Gauge>,
    remote_timeouts: Count,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClusterType {
    cluster_type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RemoteSync {
    remote_cluster_id: String,
    state: &'static str,
}

/// Reviews of the admission webhook.
#[derive(Debug, Clone, Default)]
struct Reviews {
    passed: Count,
    refused: Count,
    unanswered: Count,
    configured: Count,
    not_configured: Family<Reason, Count>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// What the API server told: of Kubernetes' own kinds, and of the mesh's. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct KubernetesEvents {
    own: Family<KubernetesEvent, Count>,
    custom: Family<KubernetesEvent, Count>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KubernetesEvent {
    r#type: &'static str,
    event: &'static str,
}

#[derive(Debug, Clone, Default)]
struct Certificates {
    csr: Count,
    unauthenticated: Count,
    unparsable: Count,
    id_refused: Count,
    sign_errors: Family<SignError, Count>,
    issued: Count,
    root_expiry: Gauge,
    chain_expiry: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Proxies {
    version: String,
    r#type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    r#type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignError {
    error: &'static str,
}

/// What became of a request for a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CsrOutcome {
    /// Signed.
    Issued,
    /// The caller has not proven who it is.
    Unauthenticated,
    /// The caller may not have the identity it asks for.
    IdentityRefused,
    /// The request does not parse, or is not signed by its key, or the key is too weak.
    BadRequest,
    /// The lifetime is too long.
    TtlTooLong,
    /// Signing failed.
    Internal,
}

/// Values that are true only at the moment they are read.
#[derive(Debug)]
struct Clocks {
    started: Instant,
    root_expiry: Gauge,
    chain_expiry: Gauge,
}

impl Metrics {
    fn register_clusters(&self, registry: &mut Registry) {
        let clusters = self.clusters.clone();
        let local = ClusterType {
            cluster_type: "local",
        };
        clusters.get_or_create(&local).set(1);
        registry.register(
            "istiod_managed_clusters",
            "Clusters whose objects are watched",
            clusters,
        );
        registry.register(
            "istiod_remote_cluster_sync_status",
            "How far each other cluster is: 1 for its state",
            self.remotes.clone(),
        );
        registry.register(
            "remote_cluster_sync_timeouts_total",
            "Other clusters that the start did not wait for any longer",
            self.remote_timeouts.clone(),
        );
    }

    /// Other clusters as they are now: their names, and how far each is.
    pub fn other_clusters<'a>(&self, known: impl Iterator<Item = (&'a str, &'static str)>) {
        self.remotes.clear();
        let mut count = 0;
        for (cluster, state) in known {
            let remote = RemoteSync {
                remote_cluster_id: cluster.to_owned(),
                state,
            };
            self.remotes.get_or_create(&remote).set(1);
            count += 1;
        }
        let remote = ClusterType {
            cluster_type: "remote",
        };
        self.clusters.get_or_create(&remote).set(count);
    }

    /// Counts other clusters that the start did not wait for any longer.
    pub fn remote_timeouts(&self) -> Count {
        self.remote_timeouts.clone()
    }

    /// All metrics, registered.
    pub fn new() -> Arc<Self> {
        let mut metrics = Self {
            registry: Arc::default(),
            proxies: Family::default(),
            pushes: Family::default(),
            push_time: Histogram::new(TIMES),
            config_size: Family::new_with_constructor(|| Histogram::new(SIZES)),
            expired_nonce: Family::default(),
            rejects: Family::default(),
            inbound_updates: Family::default(),
            triggers: Family::default(),
            queue_time: Histogram::new(TIMES),
            internal_errors: Count::default(),
            convergence: Histogram::new(TIMES),
            send_time: Histogram::new(TIMES),
            services: Gauge::default(),
            idle_services: Gauge::default(),
            virtual_services: Gauge::default(),
            certificates: Certificates::default(),
            reviews: Reviews::default(),
            kubernetes: KubernetesEvents::default(),
            clusters: Family::default(),
            remotes: Family::default(),
            remote_timeouts: Count::default(),
        };
        let mut registry = Registry::default();
        metrics.register_xds(&mut registry);
        metrics.certificates.register(&mut registry);
        metrics.reviews.register(&mut registry);
        metrics.kubernetes.register(&mut registry);
        net::metrics::register_process(&mut registry, Vec::new());
        let tag = env!("CARGO_PKG_VERSION");
        let build = Family::<[(&str, &str); 2], Gauge>::default();
        build
            .get_or_create(&[("component", "pilot"), ("tag", tag)])
            .set(1);
        registry.register("istio_build", "Version of this component", build);
        metrics.register_clusters(&mut registry);
        let info = Family::<[(&str, &str); 1], Gauge>::default();
        info.get_or_create(&[("version", tag)]).set(1);
        registry.register("pilot_info", "Version of this control plane", info);
        registry.register_collector(Box::new(Clocks {
            started: Instant::now(),
            root_expiry: metrics.certificates.root_expiry.clone(),
            chain_expiry: metrics.certificates.chain_expiry.clone(),
        }));
        metrics.registry = Arc::new(registry);
        Arc::new(metrics)
    }

    fn register_xds(&self, registry: &mut Registry) {
        let mut counts = |name: &str, help: &str, family: &Family<Kind, Count>| {
            registry.register(name, help, family.clone());
        };
        counts("pilot_xds_pushes", "Responses sent", &self.pushes);
        counts(
            "pilot_xds_expired_nonce",
            "Acknowledgements of no awaited response",
            &self.expired_nonce,
        );
        counts(
            "pilot_total_xds_rejects",
            "Responses that a proxy rejected",
            &self.rejects,
        );
        counts(
            "pilot_inbound_updates",
            "Changes of the world",
            &self.inbound_updates,
        );
        counts(
            "pilot_push_triggers",
            "Batches of changes that lead to responses",
            &self.triggers,
        );
        registry.register("pilot_xds", "Connected proxies", self.proxies.clone());
        registry.register(
            "pilot_services",
            "Services in the mesh",
            self.services.clone(),
        );
        registry.register(
            "pilot_total_xds_internal_errors",
            "Streams ended by a fault of ours",
            self.internal_errors.clone(),
        );
        registry.register(
            "pilot_xds_push_time",
            "Seconds to compute what a proxy is owed",
            self.push_time.clone(),
        );
        registry.register(
            "pilot_xds_config_size_bytes",
            "Size of responses",
            self.config_size.clone(),
        );
        registry.register(
            "pilot_proxy_queue_time",
            "Seconds from a change to the moment at which it is a proxy's turn",
            self.queue_time.clone(),
        );
        registry.register(
            "pilot_proxy_convergence_time",
            "Seconds from a change to its sending",
            self.convergence.clone(),
        );
        registry.register(
            "pilot_xds_send_time",
            "Seconds until a proxy's connection has taken what it was owed",
            self.send_time.clone(),
        );
        registry.register(
            "pilot_eds_no_instances",
            "Services without a workload",
            self.idle_services.clone(),
        );
        registry.register(
            "pilot_virt_services",
            "VirtualServices",
            self.virtual_services.clone(),
        );
    }

    /// What there is at the moment at which one looks: services without a workload, and VirtualServices.
    pub(crate) fn counted(&self, idle_services: usize, virtual_services: usize) {
        let value = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.idle_services.set(value(idle_services));
        self.virtual_services.set(value(virtual_services));
    }

    /// What the API server told.
    pub fn kubernetes_events(&self) -> &KubernetesEvents {
        &self.kubernetes
    }

    /// All of it, for scrapers.
    pub(crate) fn exposed(&self) -> Exposition {
        self.registry.clone().into()
    }

    #[cfg(test)]
    pub(crate) fn text(&self) -> String {
        let text = self.exposed().text(net::metrics::Format::OpenMetrics);
        text.expect("metrics can be written")
    }

    pub(crate) fn connected(&self, kind: &str, version: &str, change: i64) {
        let labels = Proxies {
            version: version.to_owned(),
            r#type: proxy_type(kind),
        };
        self.proxies.get_or_create(&labels).inc_by(change);
    }

    pub(crate) fn pushed(&self, type_url: &str, bytes: usize) {
        let kind = kind(type_url);
        self.pushes.get_or_create(&kind).increment();
        let bytes = f64::from(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.config_size.get_or_create(&kind).observe(bytes);
    }

    pub(crate) fn computed(&self, took: Duration) {
        self.push_time.observe(took.as_secs_f64());
    }

    pub(crate) fn queued(&self, during: Duration) {
        self.queue_time.observe(during.as_secs_f64());
    }

    pub(crate) fn converged(&self, after: Duration) {
        self.convergence.observe(after.as_secs_f64());
    }

    pub(crate) fn sent(&self, after: Duration) {
        self.send_time.observe(after.as_secs_f64());
    }

    pub(crate) fn stale_nonce(&self, type_url: &str) {
        self.expired_nonce
            .get_or_create(&kind(type_url))
            .increment();
    }

    pub(crate) fn rejected(&self, type_url: &str) {
        self.rejects.get_or_create(&kind(type_url)).increment();
    }

    pub(crate) fn internal_error(&self) {
        self.internal_errors.increment();
    }

    pub(crate) fn changed(&self, type_url: &str, changes: usize, services: usize) {
        if changes > 0 {
            self.triggers.get_or_create(&kind(type_url)).increment();
        }
        self.inbound_updates
            .get_or_create(&kind(type_url))
            .add(u64::try_from(changes).unwrap_or(u64::MAX));
        self.services
            .set(i64::try_from(services).unwrap_or(i64::MAX));
    }

    pub(crate) fn csr(&self, outcome: CsrOutcome) {
        let metrics = &self.certificates;
        metrics.csr.increment();
        let sign_error = |error| {
            metrics
                .sign_errors
                .get_or_create(&SignError { error })
                .increment()
        };
        match outcome {
            CsrOutcome::Issued => metrics.issued.increment(),
            CsrOutcome::Unauthenticated => metrics.unauthenticated.increment(),
            CsrOutcome::IdentityRefused => metrics.id_refused.increment(),
            CsrOutcome::BadRequest => metrics.unparsable.increment(),
            CsrOutcome::TtlTooLong => sign_error("ttl"),
            CsrOutcome::Internal => sign_error("sign"),
        }
    }

    /// An object was reviewed.
    pub(crate) fn reviewed(&self, passed: bool) {
        match passed {
            true => self.reviews.passed.increment(),
            false => self.reviews.refused.increment(),
        }
    }

    /// A request to the webhook could not be answered with a review.
    pub(crate) fn review_failed(&self) {
        self.reviews.unanswered.increment();
    }

    /// The configuration of the webhook was written, or was not to be.
    pub(crate) fn webhook_configured(&self, result: Result<(), &kube::Error>) {
        match result {
            Ok(()) => self.reviews.configured.increment(),
            Err(error) => {
                let reason = reason(error);
                let errors = self
                    .reviews
                    .not_configured
                    .get_or_create(&Reason { reason });
                errors.increment();
            }
        }
    }

    /// Sets when the root and the signing certificate end, in seconds since the epoch.
    pub(crate) fn expiries(&self, root: i64, chain: i64) {
        self.certificates.root_expiry.set(root);
        self.certificates.chain_expiry.set(chain);
    }
}

impl KubernetesEvents {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "pilot_k8s_reg_events",
            "Changes of Kubernetes' own objects",
            self.own.clone(),
        );
        registry.register(
            "pilot_k8s_cfg_events",
            "Changes of the mesh's objects",
            self.custom.clone(),
        );
    }

    /// `change`: `add`, `update` or `delete`.
    pub(crate) fn count(&self, kind: object::Kind, change: &'static str) {
        let events = match kind {
            object::Kind::Namespace
            | object::Kind::Node
            | object::Kind::Pod
            | object::Kind::Service
            | object::Kind::EndpointSlice => &self.own,
            _ => &self.custom,
        };
        let event = KubernetesEvent {
            r#type: kind.as_str(),
            event: change,
        };
        events.get_or_create(&event).increment();
    }
}

impl Reviews {
    fn register(&self, registry: &mut Registry) {
        for (name, help, count) in [
            ("passed", "Objects that admission let pass", &self.passed),
            ("failed", "Objects that admission refused", &self.refused),
            (
                "http_error",
                "Requests to the webhook that were no review",
                &self.unanswered,
            ),
        ] {
            registry.register(format!("galley_validation_{name}"), help, count.clone());
        }
        registry.register(
            "galley_validation_config_updates",
            "Writes of the webhook's configuration",
            self.configured.clone(),
        );
        registry.register(
            "galley_validation_config_update_error",
            "Writes of the webhook's configuration that failed",
            self.not_configured.clone(),
        );
    }
}

impl Certificates {
    fn register(&self, registry: &mut Registry) {
        let mut count = |name: &str, help: &str, count: &Count| {
            registry.register(format!("citadel_server_{name}"), help, count.clone());
        };
        count("csr_count", "Requests for certificates", &self.csr);
        count(
            "authentication_failure_count",
            "Requests by callers who have not proven who they are",
            &self.unauthenticated,
        );
        count(
            "csr_parsing_err_count",
            "Requests that were no acceptable CSR",
            &self.unparsable,
        );
        count(
            "id_extraction_err_count",
            "Requests for an identity that the caller may not have",
            &self.id_refused,
        );
        count(
            "success_cert_issuance_count",
            "Certificates issued",
            &self.issued,
        );
        registry.register(
            "citadel_server_csr_sign_err_count",
            "Requests that could not be signed",
            self.sign_errors.clone(),
        );
        for (name, help, gauge) in [
            (
                "root_cert",
                "When the root ends, in Unix seconds",
                &self.root_expiry,
            ),
            (
                "cert_chain",
                "When the signing certificate ends, in Unix seconds",
                &self.chain_expiry,
            ),
        ] {
            let name = format!("citadel_server_{name}_expiry_timestamp");
            registry.register(name, help, gauge.clone());
        }
    }
}

impl Count {
    /// One more.
    pub fn increment(&self) {
        self.add(1);
    }

    fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }
}

impl TypedMetric for Count {
    const TYPE: MetricType = MetricType::Unknown;
}

impl EncodeMetric for Count {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let value = i64::try_from(self.0.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
        encoder.encode_gauge(&value)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl Collector for Clocks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        let up = i64::try_from(self.started.elapsed().as_secs()).unwrap_or(i64::MAX);
        for (name, help, value) in [
            ("istiod_uptime_seconds", "Seconds since the start", up),
            (
                "citadel_server_root_cert_expiry_seconds",
                "Seconds until the root ends",
                self.root_expiry.get() - now,
            ),
            (
                "citadel_server_cert_chain_expiry_seconds",
                "Seconds until the signing certificate ends",
                self.chain_expiry.get() - now,
            ),
        ] {
            let gauge = ConstGauge::new(value);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

/// Upstream's short names of the types; one more for what a client makes up.
fn kind(type_url: &str) -> Kind {
    let r#type = match type_url {
        ADDRESS_TYPE_URL => "wds",
        WORKLOAD_TYPE_URL => "workload",
        AUTHORIZATION_TYPE_URL => "wads",
        WAYPOINT_TYPE_URL => "waypoint",
        _ => "other",
    };
    Kind { r#type }
}

/// The API server's own words, of which those are labels that are known: a number of series that nobody can raise.
fn reason(error: &kube::Error) -> &'static str {
    const KNOWN: [&str; 10] = [
        "Conflict",
        "Forbidden",
        "InternalError",
        "Invalid",
        "NotFound",
        "ServerTimeout",
        "ServiceUnavailable",
        "Timeout",
        "TooManyRequests",
        "Unauthorized",
    ];
    let said = match error {
        kube::Error::Api(status) => status.reason.as_str(),
        _ => "",
    };
    let known = KNOWN.into_iter().find(|known| *known == said);
    known.unwrap_or("Unknown")
}

/// Known proxy types only: labels never hold what a client makes up.
fn proxy_type(text: &str) -> &'static str {
    match text {
        "ztunnel" => "ztunnel",
        "waypoint" => "waypoint",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_dashboards_query() {
        let metrics = Metrics::new();
        metrics.pushed(ADDRESS_TYPE_URL, 300);
        metrics.changed(ADDRESS_TYPE_URL, 3, 1);
        metrics.changed(WAYPOINT_TYPE_URL, 0, 1);
        metrics.queued(Duration::from_millis(2));
        metrics.sent(Duration::from_millis(2));
        metrics.counted(2, 3);
        metrics.webhook_configured(Ok(()));
        metrics.webhook_configured(Err(&kube::Error::LinesCodecMaxLineLengthExceeded));
        metrics.csr(CsrOutcome::Issued);
        metrics.csr(CsrOutcome::TtlTooLong);
        let events = metrics.kubernetes_events();
        events.count(object::Kind::Pod, "update");
        events.count(object::Kind::AuthorizationPolicy, "add");
        let text = metrics.text();
        for line in [
            "pilot_xds_pushes{type=\"wds\"} 1",
            "citadel_server_csr_count 2",
            "citadel_server_success_cert_issuance_count 1",
            "citadel_server_csr_sign_err_count{error=\"ttl\"} 1",
            "pilot_services 1",
            "pilot_inbound_updates{type=\"wds\"} 3",
            "pilot_push_triggers{type=\"wds\"} 1",
            "pilot_proxy_queue_time_count 1",
            "pilot_xds_send_time_count 1",
            "pilot_eds_no_instances 2",
            "pilot_virt_services 3",
            "galley_validation_config_updates 1",
            "galley_validation_config_update_error{reason=\"Unknown\"} 1",
            "pilot_k8s_reg_events{type=\"Pod\",event=\"update\"} 1",
            "pilot_k8s_cfg_events{type=\"AuthorizationPolicy\",event=\"add\"} 1",
            "istiod_managed_clusters{cluster_type=\"local\"} 1",
            "# EOF",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}\n{text}");
        }
    }
}
