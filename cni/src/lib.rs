//! Enrolment: brings pods of this node into the mesh and out of it again.
//!
//! The agent decides which pods take part, hands their network namespaces to the node tunnel (ZDS), writes the
//! redirection rules into them, lets the node's probes pass and tells the cluster. It never carries a workload's
//! bytes and never holds a workload's key.

pub mod agent;
pub mod apply;
pub mod command;
mod enrol;
pub mod facts;
pub mod host;
pub mod install;
pub mod kubelet;
pub mod kubernetes;
pub mod local;
mod netlink;
pub mod plugin_server;
pub mod rules;
pub mod sandboxes;
pub mod selectors;
mod telemetry;
pub mod zds_server;

use agent::{Config, RunError};
use command::{Command, Task};

/// Why the agent's process ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no source of pods.
    #[error(
        "no source of pods: set NODE_NAME to the node (Kubernetes), or LEYLINE_LOCAL_FOLDER to the node's folder"
    )]
    NoSource,
    /// The API server's address or the agent's account is not there.
    #[error("find the API server")]
    Account(#[source] Box<kube::config::InClusterError>),
    /// The API server cannot be spoken to.
    #[error("prepare a client of the API server")]
    Client(#[source] Box<kube::Error>),
    /// The folder cannot be used.
    #[error("use the folder {}", folder.display())]
    Folder {
        /// The folder.
        folder: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// On the cluster.
    #[error(transparent)]
    Cluster(#[from] kubernetes::Error),
    /// Settings are wrong.
    #[error(transparent)]
    Settings(#[from] agent::ConfigError),
    /// The agent cannot work.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// What the process does: `command` with the environment that `lookup` reads, until `stop`.
///
/// # Errors
/// [`Error`].
pub async fn main(
    command: &Command,
    lookup: &(dyn Fn(&str) -> Option<String> + Sync),
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    if !command.ignored.is_empty() {
        tracing::info!(arguments = ?command.ignored, "arguments without effect here");
    }
    match command.task {
        Task::Agent => {
            for (setting, why) in without_effect(lookup) {
                tracing::warn!(
                    setting,
                    why,
                    "a setting of Istio's agent has no effect here"
                );
            }
            run(Config::from_lookup(lookup)?, stop).await
        }
        Task::LeaveCluster => leave_cluster(lookup).await,
    }
}

/// Settings that ask for what only Istio's agent does, and why it is not done here.
fn without_effect(
    lookup: &dyn Fn(&str) -> Option<String>,
) -> impl Iterator<Item = (&'static str, &'static str)> {
    const NFTABLES: &str = "redirection is always by nftables, which works beside iptables";
    type Asks = fn(&str) -> bool;
    let asked: [(&str, Asks, &str); 5] = [
        ("NATIVE_NFTABLES", is_false, NFTABLES),
        ("FORCE_IPTABLES_BINARY", |_| true, NFTABLES),
        (
            "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP",
            is_false,
            "rules are always read at the start, and written where they are not as they should be",
        ),
        (
            "KUBECONFIG_MODE",
            |_| true,
            "no kubeconfig is written: the plugin asks the agent alone",
        ),
        (
            "REPAIR_ENABLED",
            |text| !is_false(text),
            "pods of sidecars, which may need to be repaired, are left alone",
        ),
    ];
    let given = |setting| lookup(setting).filter(|text| !text.is_empty());
    let found = asked.map(|(setting, asks, why)| {
        let asks = given(setting).is_some_and(|text| asks(&text));
        asks.then_some((setting, why))
    });
    found.into_iter().flatten()
}

fn is_false(text: &str) -> bool {
    matches!(text, "0" | "f" | "F" | "false" | "FALSE" | "False")
}

async fn leave_cluster(lookup: &(dyn Fn(&str) -> Option<String> + Sync)) -> Result<(), Error> {
    let leave = agent::LeaveCluster::from_lookup(lookup)?;
    let (namespace, daemon_set) = (&leave.namespace, &leave.daemon_set);
    Ok(kubernetes::leave_cluster(client()?, namespace, daemon_set, leave.patience).await?)
}

fn client() -> Result<kube::Client, Error> {
    let account = kube::Config::incluster().map_err(|error| Error::Account(Box::new(error)))?;
    kube::Client::try_from(account).map_err(|error| Error::Client(Box::new(error)))
}

/// Runs the agent as `config` says until `stop`.
///
/// # Errors
/// [`Error`].
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> Result<(), Error> {
    if let Some(cluster) = config.cluster.clone() {
        return on_cluster(config, cluster, stop).await;
    }
    let folder = config.local_folder.clone().ok_or(Error::NoSource)?;
    let failed = |source| Error::Folder {
        folder: folder.clone(),
        source,
    };
    let sink = local::FolderSink::new(&folder).map_err(failed)?;
    let source = local::FolderSource::new(&folder).map_err(failed)?;
    Ok(agent::run(config, source, sink, stop).await?)
}

async fn on_cluster(
    config: Config,
    cluster: agent::Cluster,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    Ok(kubernetes::run(client()?, config, &cluster, stop).await?)
}

#[cfg(test)]
mod tests {
    use super::without_effect;

    #[test]
    fn what_only_istios_agent_does_is_named_where_it_is_asked_for() {
        let named = |given: &[(&str, &str)]| {
            let lookup = |name: &str| {
                let found = given.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let found = without_effect(&lookup);
            found.map(|(setting, _)| setting).collect::<Vec<_>>()
        };
        let defaults = [
            ("NATIVE_NFTABLES", "true"),
            ("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP", "true"),
            ("REPAIR_ENABLED", "false"),
            ("FORCE_IPTABLES_BINARY", ""),
        ];
        assert!(named(&defaults).is_empty());
        let others = [
            ("NATIVE_NFTABLES", "0"),
            ("FORCE_IPTABLES_BINARY", "legacy"),
            ("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP", "False"),
            ("KUBECONFIG_MODE", "0600"),
            ("REPAIR_ENABLED", "true"),
        ];
        assert_eq!(named(&others), others.map(|(setting, _)| setting));
    }
}
