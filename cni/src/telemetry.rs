//! The agent's metrics. Names are Istio's where it has one (`spec/cni.md` 10).

use std::{sync::Arc, time::Duration};

use net::metrics::{Exposition, register_build};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Seconds; the aim is 0.2 from the label to carried traffic.
const JOIN_BUCKETS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0];

/// Seconds; the aim is 0.05 for all but one sandbox in a hundred.
const WAIT_BUCKETS: [f64; 11] = [
    0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    step: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    response_code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InstallLabels {
    result: &'static str,
}

/// Counts and times. Clones are the same.
#[derive(Clone)]
pub(crate) struct Telemetry {
    registry: Arc<Registry>,
    events: Family<EventLabels, Counter>,
    failures: Family<StepLabels, Counter>,
    answers: Family<AnswerLabels, Counter>,
    waits: Histogram,
    installs: Family<InstallLabels, Counter>,
    install_ready: Gauge,
    tunnels: Gauge,
    pods: Gauge,
    join: Histogram,
}

impl Telemetry {
    pub(crate) fn new(version: &str) -> Self {
        let mut telemetry = Telemetry {
            registry: Arc::default(),
            events: Family::default(),
            failures: Family::default(),
            answers: Family::default(),
            waits: Histogram::new(WAIT_BUCKETS),
            installs: Family::default(),
            install_ready: Gauge::default(),
            tunnels: Gauge::default(),
            pods: Gauge::default(),
            join: Histogram::new(JOIN_BUCKETS),
        };
        let mut registry = Registry::default();
        register_build(&mut registry, "cni", version);
        telemetry.register(&mut registry);
        telemetry.registry = Arc::new(registry);
        telemetry
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "nodeagent_reconcile_events",
            "Events about pods",
            self.events.clone(),
        );
        registry.register(
            "ztunnel_connected",
            "Node tunnels connected",
            self.tunnels.clone(),
        );
        let pods = "Pods of this node that the agent follows";
        registry.register("leyline_cni_pods", pods, self.pods.clone());
        let answers = "Questions of the CNI plugin, by the answer";
        registry.register("istio_cni_plugin_requests", answers, self.answers.clone());
        let waits = "Seconds that a sandbox waited for the answer to its plugin";
        registry.register(
            "leyline_cni_sandbox_wait_seconds",
            waits,
            self.waits.clone(),
        );
        let installs = "Installations of the CNI plugin, by their outcome";
        registry.register("istio_cni_installs", installs, self.installs.clone());
        let ready = "The CNI plugin is installed";
        registry.register("istio_cni_install_ready", ready, self.install_ready.clone());
        let failures = "Enrolment steps that failed and were retried";
        registry.register("leyline_cni_step_failures", failures, self.failures.clone());
        let join = "Seconds from wanted to enabled";
        registry.register("leyline_cni_join_seconds", join, self.join.clone());
    }

    pub(crate) fn event(&self, r#type: &'static str) {
        self.events.get_or_create(&EventLabels { r#type }).inc();
    }

    pub(crate) fn step_failed(&self, step: &'static str) {
        self.failures.get_or_create(&StepLabels { step }).inc();
    }

    pub(crate) fn plugin_answered(&self, response_code: u16, took: Duration) {
        self.waits.observe(took.as_secs_f64());
        let labels = AnswerLabels { response_code };
        self.answers.get_or_create(&labels).inc();
    }

    pub(crate) fn installed(&self, result: &'static str) {
        self.installs.get_or_create(&InstallLabels { result }).inc();
    }

    pub(crate) fn install_ready(&self, ready: bool) {
        self.install_ready.set(ready.into());
    }

    pub(crate) fn tunnels(&self, connected: usize) {
        self.tunnels
            .set(i64::try_from(connected).unwrap_or(i64::MAX));
    }

    pub(crate) fn pods(&self, followed: usize) {
        self.pods.set(i64::try_from(followed).unwrap_or(i64::MAX));
    }

    /// A pod was enabled; `took` is absent where it already was wanted before.
    pub(crate) fn joined(&self, took: Option<Duration>) {
        if let Some(took) = took {
            self.join.observe(took.as_secs_f64());
        }
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
}
