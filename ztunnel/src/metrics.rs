//! Every metric of the node tunnel, registered here. Names and labels are Istio's; ours begin with `leyline_`.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use mesh::{
    flow::{Direction, EndReason, TcpLabels},
    identity::Identity,
    names::Str,
    workload::Workload,
};
use net::{
    ca::{Issuer, Issuing},
    flows::Flows,
    metrics::{self, Parties, Tcp, UNKNOWN},
    tls::{PeerEnd, Revocations},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};

const DNS_BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// The families. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Metrics {
    tcp: Tcp<TcpLabels>,
    /// The ends that open connections are told with.
    pub(crate) parties: Parties,
    pub(crate) telling: Arc<Telling>,
    on_demand_dns: Family<OnDemandDnsLabels, Counter>,
    certificate_requests: Family<ResultLabel, Counter>,
    pub(crate) dns: DnsMetrics,
    pub(crate) pods: PodMetrics,
}

/// Where the ends of connections are told, for as long as they live.
#[derive(Debug, Default)]
pub(crate) struct Telling {
    /// The live view.
    pub(crate) flows: Flows,
    refused: Family<RefusedLabels, Counter>,
}

impl Telling {
    /// Counts a connection that was refused, or failed.
    pub(crate) fn refused(&self, direction: Direction, reason: EndReason) {
        let labels = RefusedLabels {
            reporter: direction.reporter(),
            reason: reason.label(),
            response_flags: reason.flag().as_str(),
        };
        self.refused.get_or_create(&labels).inc();
    }
}

/// `success`, or `failure`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// Asks another issuer, and counts.
struct Counted {
    issuer: Arc<dyn Issuer>,
    requests: Family<ResultLabel, Counter>,
}

impl Issuer for Counted {
    fn issue(&self, identity: Identity) -> Issuing {
        let (asked, requests) = (self.issuer.issue(identity), self.requests.clone());
        Box::pin(async move {
            let issued = asked.await;
            let result = match &issued {
                Ok(_) => "success",
                Err(_) => "failure",
            };
            requests.get_or_create(&ResultLabel { result }).inc();
            issued
        })
    }
}

/// `istio_crl_policy_rejections_total` and `istio_crl_untracked_connections_total`.
#[derive(Debug)]
struct Refusals(Revocations);

impl Collector for Refusals {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Handshakes refused because a certificate of the peer is revoked";
        let name = "istio_crl_policy_rejections";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (reporter, end) in [
            ("destination", PeerEnd::Client),
            ("source", PeerEnd::Server),
        ] {
            let labels = [("reporter", reporter)];
            let refused = ConstCounter::new(self.0.refused(end));
            refused.encode(family.encode_family(&labels)?)?;
        }
        let help = "Connections that a later revocation would not find: none, as each keeps its certificates";
        let name = "istio_crl_untracked_connections";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for reporter in ["destination", "source"] {
            let labels = [("reporter", reporter)];
            ConstCounter::new(0u64).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Pods, as the ZDS client counts them.
#[derive(Clone, Default)]
pub(crate) struct PodMetrics {
    active: Gauge,
    pending: Gauge,
    started: Counter,
    stopped: Counter,
}

/// Questions of pods.
#[derive(Clone)]
pub(crate) struct DnsMetrics {
    requests: Family<DnsLabels, Counter>,
    upstream_requests: Family<DnsLabels, Counter>,
    upstream_failures: Family<DnsLabels, Counter>,
    upstream_duration: Family<DnsLabels, Histogram, fn() -> Histogram>,
    dropped: Family<ClientLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reporter: &'static str,
    reason: Cow<'static, str>,
    response_flags: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OnDemandDnsLabels {
    source_workload: String,
    source_canonical_service: String,
    source_canonical_revision: String,
    source_workload_namespace: String,
    source_principal: String,
    source_app: String,
    source_version: String,
    source_cluster: String,
    hostname: String,
}

/// Whose question, of which type, over which transport.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct DnsLabels {
    request_query_type: String,
    request_protocol: &'static str,
    #[prometheus(flatten)]
    client: ClientLabels,
}

/// Whose question, all that is known where nobody has read it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClientLabels {
    source_canonical_service: String,
    source_canonical_revision: String,
}

impl ClientLabels {
    fn new(client: Option<&Workload>) -> Self {
        let text = |field: fn(&Workload) -> &Str| {
            client.map_or_else(|| UNKNOWN.to_owned(), |client| or_unknown(field(client)))
        };
        Self {
            source_canonical_service: text(|client| &client.canonical_name),
            source_canonical_revision: text(|client| &client.canonical_revision),
        }
    }
}

fn or_unknown(text: &Str) -> String {
    match text.is_empty() {
        true => UNKNOWN.to_owned(),
        false => text.to_string(),
    }
}

/// Types with a label value of their own; a client can ask for any of 65536.
const COUNTED_TYPES: [&str; 12] = [
    "a", "aaaa", "any", "cname", "https", "mx", "ns", "ptr", "soa", "srv", "svcb", "txt",
];

impl DnsLabels {
    pub(crate) fn new(kind: &str, protocol: &'static str, client: Option<&Workload>) -> Self {
        let counted = COUNTED_TYPES.contains(&kind);
        Self {
            request_query_type: if counted { kind } else { "other" }.to_owned(),
            request_protocol: protocol,
            client: ClientLabels::new(client),
        }
    }
}

impl Metrics {
    /// Registers everything. `before_scrape` brings the byte counters of open connections up to date.
    pub(crate) fn register(
        registry: &mut Registry,
        istio_version: &str,
        before_scrape: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        metrics::register_build(registry, "ztunnel", istio_version);
        // Collectors are asked in the order of their registration: this one before the TCP families.
        metrics::before_scrape(registry, before_scrape);
        let new = Self {
            tcp: Tcp::register(registry),
            parties: Parties::default(),
            telling: Arc::default(),
            on_demand_dns: Family::default(),
            certificate_requests: Family::default(),
            dns: DnsMetrics::register(registry),
            pods: PodMetrics::register(registry),
        };
        registry.register(
            "leyline_connections_refused",
            "Connections that were refused or failed, also before anything but their ends was known, by reason",
            new.telling.refused.clone(),
        );
        new.telling.flows.register(registry);
        registry.register(
            "istio_on_demand_dns",
            "Resolutions of workloads that have a host name and no address",
            new.on_demand_dns.clone(),
        );
        registry.register(
            "leyline_certificate_requests",
            "Requests for workloads' certificates that the CA has answered or not",
            new.certificate_requests.clone(),
        );
        new
    }

    /// Enters what revocations refuse; they count it themselves.
    pub(crate) fn revocations(registry: &mut Registry, revocations: &Revocations) {
        registry.register_collector(Box::new(Refusals(revocations.clone())));
    }

    /// The same issuer, with its requests counted.
    pub(crate) fn counted(&self, issuer: Arc<dyn Issuer>) -> Arc<dyn Issuer> {
        Arc::new(Counted {
            issuer,
            requests: self.certificate_requests.clone(),
        })
    }

    /// Counts a connection as opened; what is returned counts the rest.
    pub(crate) fn open(&self, labels: &TcpLabels) -> metrics::Flow {
        self.tcp.open(labels)
    }

    /// Counts an accepted socket while the guard lives.
    pub(crate) fn socket(&self, direction: Direction) -> metrics::SocketGuard {
        self.tcp.socket(direction)
    }

    /// Counts the resolution of a workload's host name.
    pub(crate) fn resolved(&self, source: &Workload, hostname: &str) {
        let canonical_service = or_unknown(&source.canonical_name);
        let canonical_revision = or_unknown(&source.canonical_revision);
        let labels = OnDemandDnsLabels {
            source_workload: or_unknown(source.workload_name()),
            source_canonical_service: canonical_service.clone(),
            source_canonical_revision: canonical_revision.clone(),
            source_workload_namespace: or_unknown(&source.namespace),
            source_principal: source.identity().to_string(),
            source_app: canonical_service,
            source_version: canonical_revision,
            source_cluster: or_unknown(&source.cluster_id),
            hostname: hostname.to_owned(),
        };
        self.on_demand_dns.get_or_create(&labels).inc();
    }
}

impl DnsMetrics {
    fn register(registry: &mut Registry) -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(DNS_BUCKETS);
        let new = Self {
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            upstream_duration: Family::new_with_constructor(histogram),
            dropped: Family::default(),
        };
        registry.register(
            "istio_dns_requests",
            "Questions received",
            new.requests.clone(),
        );
        registry.register(
            "istio_dns_upstream_requests",
            "Questions forwarded to a name server",
            new.upstream_requests.clone(),
        );
        registry.register(
            "istio_dns_upstream_failures",
            "Forwarded questions that no name server could answer",
            new.upstream_failures.clone(),
        );
        registry.register(
            "istio_dns_upstream_request_duration_seconds",
            "Time to the answer of a name server",
            new.upstream_duration.clone(),
        );
        registry.register(
            "leyline_dns_questions_dropped",
            "Questions over UDP that were dropped unread, as too many of one pod were being answered",
            new.dropped.clone(),
        );
        new
    }

    pub(crate) fn asked(&self, labels: &DnsLabels) {
        self.requests.get_or_create(labels).inc();
    }

    /// Counts a question that was dropped unread.
    pub(crate) fn dropped(&self, client: Option<&Workload>) {
        let labels = ClientLabels::new(client);
        self.dropped.get_or_create(&labels).inc();
    }

    pub(crate) fn forwarded(&self, labels: &DnsLabels, took: Duration, answered: bool) {
        self.upstream_requests.get_or_create(labels).inc();
        if !answered {
            self.upstream_failures.get_or_create(labels).inc();
        }
        let histogram = self.upstream_duration.get_or_create(labels);
        histogram.observe(took.as_secs_f64());
    }
}

impl PodMetrics {
    fn register(registry: &mut Registry) -> Self {
        let new = Self::default();
        registry.register(
            "workload_manager_active_proxy_count",
            "Pods that are served",
            new.active.clone(),
        );
        registry.register(
            "workload_manager_pending_proxy_count",
            "Pods that cannot be served yet",
            new.pending.clone(),
        );
        registry.register(
            "workload_manager_proxies_started",
            "Pods whose listeners were opened",
            new.started.clone(),
        );
        registry.register(
            "workload_manager_proxies_stopped",
            "Pods whose listeners were closed",
            new.stopped.clone(),
        );
        new
    }

    pub(crate) fn set(&self, running: usize, pending: usize) {
        self.active.set(i64::try_from(running).unwrap_or(i64::MAX));
        self.pending.set(i64::try_from(pending).unwrap_or(i64::MAX));
    }

    pub(crate) fn started(&self) {
        self.started.inc();
    }

    pub(crate) fn stopped(&self) {
        self.stopped.inc();
    }
}

#[cfg(test)]
mod tests {
    use net::testing::{assert_line, encoded};

    use super::*;

    use crate::fixture;

    /// What a scrape shows once `count` has counted.
    fn told(count: impl FnOnce(&Metrics)) -> String {
        let mut registry = Registry::default();
        count(&Metrics::register(&mut registry, "1.2.3", Arc::new(|| {})));
        encoded(&registry)
    }

    #[test]
    fn questions_are_counted_under_istios_names_and_labels() {
        let client = fixture::workload();
        let told = told(|metrics| {
            let labels = DnsLabels::new("aaaa", "udp", Some(&client));
            metrics.dns.asked(&labels);
            metrics
                .dns
                .forwarded(&labels, Duration::from_millis(5), true);
            metrics
                .dns
                .forwarded(&labels, Duration::from_millis(500), false);
            metrics.dns.asked(&DnsLabels::new("type65280", "tcp", None));
        });
        let labels = "request_query_type=\"aaaa\",request_protocol=\"udp\",\
            source_canonical_service=\"web-canonical\",source_canonical_revision=\"v2\"";
        assert_line(&told, &format!("istio_dns_requests_total{{{labels}}} 1"));
        assert_line(
            &told,
            &format!("istio_dns_upstream_requests_total{{{labels}}} 2"),
        );
        assert_line(
            &told,
            &format!("istio_dns_upstream_failures_total{{{labels}}} 1"),
        );
        let took = "istio_dns_upstream_request_duration_seconds";
        assert_line(&told, &format!("{took}_count{{{labels}}} 2"));
        for (bound, count) in [
            ("0.0005", 0),
            ("0.001", 0),
            ("0.01", 1),
            ("0.1", 1),
            ("1.0", 2),
            ("5.0", 2),
            ("+Inf", 2),
        ] {
            assert_line(
                &told,
                &format!("{took}_bucket{{le=\"{bound}\",{labels}}} {count}"),
            );
        }
        let of_nobody = "request_query_type=\"other\",request_protocol=\"tcp\",\
            source_canonical_service=\"unknown\",source_canonical_revision=\"unknown\"";
        assert_line(&told, &format!("istio_dns_requests_total{{{of_nobody}}} 1"));
    }

    #[test]
    fn questions_that_are_dropped_are_counted_with_whose_they_were() {
        let client = fixture::workload();
        let told = told(|metrics| {
            metrics.dns.dropped(Some(&client));
            metrics.dns.dropped(Some(&client));
            metrics.dns.dropped(None);
        });
        let name = "leyline_dns_questions_dropped_total";
        for (service, revision, count) in [("web-canonical", "v2", 2), ("unknown", "unknown", 1)] {
            let labels = format!(
                "source_canonical_service=\"{service}\",source_canonical_revision=\"{revision}\""
            );
            assert_line(&told, &format!("{name}{{{labels}}} {count}"));
        }
    }

    #[test]
    fn pods_are_counted_under_istios_names() {
        let told = told(|metrics| {
            metrics.pods.started();
            metrics.pods.started();
            metrics.pods.started();
            metrics.pods.stopped();
            metrics.pods.set(2, 4);
        });
        for line in [
            "workload_manager_active_proxy_count 2",
            "workload_manager_pending_proxy_count 4",
            "workload_manager_proxies_started_total 3",
            "workload_manager_proxies_stopped_total 1",
        ] {
            assert_line(&told, line);
        }
    }

    #[test]
    fn resolutions_of_workloads_are_counted_under_istios_name_and_labels() {
        let told = told(|metrics| metrics.resolved(&fixture::workload(), "db.example"));
        let line = "istio_on_demand_dns_total{source_workload=\"web\",\
            source_canonical_service=\"web-canonical\",source_canonical_revision=\"v2\",\
            source_workload_namespace=\"shop\",\
            source_principal=\"spiffe://cluster.local/ns/shop/sa/web\",\
            source_app=\"web-canonical\",source_version=\"v2\",source_cluster=\"Kubernetes\",\
            hostname=\"db.example\"} 1";
        assert_line(&told, line);
    }

    #[test]
    fn refusals_are_counted_by_reason_and_the_build_is_told() {
        let told = told(|metrics| {
            metrics
                .telling
                .refused(Direction::Inbound, EndReason::TlsFailed);
            for status in [451, 452] {
                let answered = EndReason::PeerRefused(status);
                metrics.telling.refused(Direction::Outbound, answered);
            }
        });
        assert_line(
            &told,
            "leyline_connections_refused_total{reporter=\"destination\",\
            reason=\"tls handshake failed\",response_flags=\"TLS_FAILURE\"} 1",
        );
        assert_line(
            &told,
            "leyline_connections_refused_total{reporter=\"source\",\
            reason=\"http status: 4xx\",response_flags=\"CONNECT\"} 2",
        );
        assert_line(&told, "istio_build{component=\"ztunnel\",tag=\"1.2.3\"} 1");
    }

    #[test]
    fn revocations_are_counted_under_istios_names() {
        let mut registry = Registry::default();
        Metrics::revocations(&mut registry, &Revocations::default());
        let told = encoded(&registry);
        for name in [
            "istio_crl_policy_rejections_total",
            "istio_crl_untracked_connections_total",
        ] {
            for reporter in ["source", "destination"] {
                let line = format!("{name}{{reporter=\"{reporter}\"}} 0");
                assert_line(&told, &line);
            }
        }
    }
}
