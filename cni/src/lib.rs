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
            if asks_for_iptables(lookup) {
                tracing::warn!(
                    "NATIVE_NFTABLES=false has no effect: redirection is always by nftables, which works beside iptables"
                );
            }
            run(Config::from_lookup(lookup)?, stop).await
        }
        Task::LeaveCluster => leave_cluster(lookup).await,
    }
}

/// Whether the backend is asked for that only upstream's agent has.
fn asks_for_iptables(lookup: &dyn Fn(&str) -> Option<String>) -> bool {
    lookup("NATIVE_NFTABLES")
        .is_some_and(|text| matches!(&*text, "0" | "f" | "F" | "false" | "FALSE" | "False"))
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
