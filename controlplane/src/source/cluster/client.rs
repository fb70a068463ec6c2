//! The client of the Kubernetes API.

use std::path::{Path, PathBuf};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file.
    #[error("read the kubeconfig {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: kube::config::KubeconfigError,
    },
    /// What a Secret has.
    #[error("take in the kubeconfig")]
    Kubeconfig(#[source] kube::config::KubeconfigError),
    /// Not in a pod.
    #[error(
        "find the API server from inside a pod (outside of one, give --kubeconfig, or --folder for a folder)"
    )]
    InCluster(#[source] kube::config::InClusterError),
    /// TLS, or credentials.
    #[error("set up the client of the API server")]
    Client(#[source] kube::Error),
}

/// A client by a kubeconfig, or by what every pod is given. Asks nothing of the API server yet.
pub async fn client(kubeconfig: Option<&Path>) -> Result<Client, ClientError> {
    let mut config = match kubeconfig {
        None => Config::incluster().map_err(ClientError::InCluster)?,
        Some(path) => from_file(path).await.map_err(|source| ClientError::File {
            path: path.to_owned(),
            source,
        })?,
    };
    // Whoever asks decides what is tried again, and when.
    config.default_retry = false;
    Client::try_from(config).map_err(ClientError::Client)
}

/// A client by a kubeconfig that was checked to read no files and run no programs. Asks nothing of the API server yet.
pub async fn client_of(kubeconfig: Kubeconfig) -> Result<Client, ClientError> {
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .map_err(ClientError::Kubeconfig)?;
    config.default_retry = false;
    Client::try_from(config).map_err(ClientError::Client)
}

async fn from_file(path: &Path) -> Result<Config, kube::config::KubeconfigError> {
    let file = Kubeconfig::read_from(path)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await
}
