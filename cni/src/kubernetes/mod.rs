//! Pods and their enrolment on Kubernetes: the API server is the source of pods, an annotation is where enrolment is
//! told.

mod facts;
mod farewell;
mod gate;
mod sink;
mod source;
mod world;

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use kube::Client;
use net::ready::Ready;
use tokio::sync::{mpsc, watch};

pub use farewell::leave_cluster;
pub use sink::AnnotationSink;
pub use source::KubernetesSource;

use crate::{
    agent::{self, Cluster, Config, Ending, Extras, RunError, Service},
    install, plugin_server,
    sandboxes::{Places, Sandboxes},
    telemetry::Telemetry,
    zds_server::chain,
};
use gate::Gate;
use source::Known;

/// What the agent remembers of pods' sandboxes, in its run folder.
const MEMORY: &str = "leyline-pods.json";
/// Sandboxes that wait for the agent's attention.
const ADMISSIONS: usize = 64;

/// Why the agent cannot work on a cluster.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Where the plugin would ask.
    #[error("listen for the plugin")]
    Listen(#[source] io::Error),
    /// The agent itself.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The agents' DaemonSet could not be deleted, or its pods not be listed.
    #[error("end the node agents")]
    Leave(#[source] Box<kube::Error>),
    /// Agents did not end in time.
    #[error("{left} node agents are still there after {patience:?}")]
    AgentsStay {
        /// How many.
        left: usize,
        /// How long they were waited for.
        patience: Duration,
    },
}

/// Runs the agent for one node of the cluster that `client` speaks to, until `stop`.
///
/// # Errors
/// [`Error`].
pub async fn run(
    client: Client,
    config: Config,
    cluster: &Cluster,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let places = Places {
        netns_folder: cluster.netns_folder.clone(),
        host_proc: config.host_proc.clone(),
        memory: Some(cluster.run_folder.join(MEMORY)),
    };
    let known = Known::new(Arc::new(Sandboxes::new(places)), config.policy.clone());
    let (leave, leaving) = watch::channel(false);
    let sink = AnnotationSink::new(client.clone(), leaving.clone());
    let source = KubernetesSource::new(client.clone(), &cluster.node, known.clone());
    let telemetry = Telemetry::new(&config.version);
    let (admissions, admitted) = mpsc::channel(ADMISSIONS);
    let gate = Gate {
        client: client.clone(),
        node: cluster.node.clone(),
        known,
        admissions,
        leaving: leaving.clone(),
        telemetry: telemetry.clone(),
    };
    let plugins = plugin_server::Server::bind(&cluster.run_folder).map_err(Error::Listen)?;
    let ready = Ready::new();
    let mut services: Vec<Service> = vec![Box::pin(plugins.run(Arc::new(gate)))];
    if let Some(settings) = &cluster.install {
        let installed = ready.gate("the CNI plugin on the node");
        let keeper = install::Keeper::new(settings.clone(), installed, telemetry.clone());
        services.push(Box::pin(keeper.run(leaving)));
    }
    let extras = Extras {
        telemetry,
        ready,
        admissions: admitted,
        services,
    };
    let stop = async {
        stop.await;
        let ending = farewell::ending(client, cluster).await;
        leave.send_replace(ending == Ending::Leave);
        ending
    };
    let result = agent::run_with(config, source, sink, extras, stop).await;
    if *leave.borrow() {
        clean_up(cluster);
    }
    Ok(result?)
}

/// What is left on the node when no pod needs it any more. Each failure is told and holds up nothing.
fn clean_up(cluster: &Cluster) {
    if let Some(settings) = &cluster.install {
        let removed = install::remove_entry(settings).and(install::remove_plugin(settings));
        if let Err(error) = removed {
            tracing::error!(error = chain(&error), "remove the CNI plugin");
        }
    }
    for name in [
        plugin_server::EVENT_SOCKET,
        plugin_server::LOG_SOCKET,
        MEMORY,
    ] {
        remove(&cluster.run_folder.join(name));
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "clean up");
        }
        _ => {}
    }
}
