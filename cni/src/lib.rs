//! Enrolment: brings pods of this node into the mesh and out of it again.
//!
//! The agent decides which pods take part, hands their network namespaces to the node tunnel (ZDS), writes the
//! redirection rules into them, lets the node's probes pass and tells the cluster. It never carries a workload's
//! bytes and never holds a workload's key.

pub mod agent;
pub mod apply;
mod enrol;
pub mod facts;
pub mod host;
pub mod kubelet;
pub mod local;
mod netlink;
pub mod rules;
mod telemetry;
pub mod zds_server;

use agent::{Config, RunError};

/// Why the agent's process ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no source of pods.
    #[error("no source of pods: set LEYLINE_LOCAL_FOLDER to the node's folder")]
    NoSource,
    /// The folder cannot be used.
    #[error("use the folder {}", folder.display())]
    Folder {
        /// The folder.
        folder: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The agent cannot work.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Runs the agent as `config` says until `stop`.
///
/// # Errors
/// [`Error`].
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> Result<(), Error> {
    let folder = config.local_folder.clone().ok_or(Error::NoSource)?;
    let failed = |source| Error::Folder {
        folder: folder.clone(),
        source,
    };
    let sink = local::FolderSink::new(&folder).map_err(failed)?;
    let source = local::FolderSource::new(&folder).map_err(failed)?;
    Ok(agent::run(config, source, sink, stop).await?)
}
