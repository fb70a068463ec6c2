//! What the tests of several modules share: a node that knows nothing yet, and what is logged.

use std::sync::Arc;

use mesh::{names::WorkloadUid, outcome::LocalWorkload, workload::Workload};
use net::{
    ca::{Certificates, CertificatesConfig},
    clock::SystemClock,
    lanes::Lanes,
    log::Format,
    mesh_state::MeshState,
    testing::{self, TestCa},
    tls,
};
use prometheus_client::registry::Registry;

use crate::{config::Config, metrics::Metrics, pod::Node, run::make_node};

/// What these settings say.
pub(crate) fn config(settings: &[(&str, &str)]) -> Config {
    let lookup = |name: &str| {
        let found = settings.iter().find(|(known, _)| *known == name);
        found.map(|(_, text)| (*text).to_owned())
    };
    Config::from_lookup(&lookup).expect("good settings")
}

/// On the current runtime, with a CA of its own and no control plane.
pub(crate) fn node() -> Arc<Node> {
    node_with(&[])
}

/// The same with more settings.
pub(crate) fn node_with(settings: &[(&str, &str)]) -> Arc<Node> {
    counted_node(settings, &mut Registry::default())
}

/// The same, whose metrics `registry` shows.
pub(crate) fn counted_node(settings: &[(&str, &str)], registry: &mut Registry) -> Arc<Node> {
    let always = [("FAKE_CA", "true"), ("XDS_ADDRESS", "")];
    let config = config(&[&always, settings].concat());
    let policy = tls::Policy::default();
    let issuer = Arc::new(TestCa::new("cluster.local", &policy));
    let clock = Arc::new(SystemClock);
    make_node(
        Arc::new(config),
        MeshState::new(),
        Certificates::new(issuer, clock, CertificatesConfig::default()),
        Metrics::register(registry, "", Arc::new(|| {})),
        policy.revocations().clone(),
        Lanes::here(),
    )
}

/// Pod `web-1` of account `web` in namespace `shop`, as the agent names it.
pub(crate) fn binding() -> LocalWorkload {
    LocalWorkload {
        name: "web-1".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
    }
}

/// The record of [`binding`].
pub(crate) fn workload() -> Workload {
    let uid = WorkloadUid("Kubernetes//Pod/shop/web-1".into());
    let mut it = Workload::new(uid, "web-1".into(), "shop".into());
    it.service_account = "web".into();
    it.set_workload_name("web".into());
    it.canonical_name = "web-canonical".into();
    it.canonical_revision = "v2".into();
    it
}

/// The plain lines that `logging` writes at `filter`, without their time.
pub(crate) fn lines(filter: &str, logging: impl FnOnce()) -> Vec<String> {
    let lines = testing::lines(Format::Plain, filter, logging);
    let untimed = lines.iter().filter_map(|line| line.split_once('\t'));
    untimed.map(|(_, rest)| rest.to_owned()).collect()
}
