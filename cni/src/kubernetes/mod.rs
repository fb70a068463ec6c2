//! Pods and their enrolment on Kubernetes: the API server is the source of pods, an annotation is where enrolment is
//! told.

mod facts;
mod gate;
mod sink;
mod source;
mod world;

use std::{io, sync::Arc};

use kube::Client;
use net::ready::Ready;
use tokio::sync::{mpsc, watch};

pub use sink::AnnotationSink;
pub use source::KubernetesSource;

use crate::{
    agent::{self, Cluster, Config, Ending, Extras, RunError},
    plugin_server,
    sandboxes::{Places, Sandboxes},
    telemetry::Telemetry,
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
    let sink = AnnotationSink::new(client.clone());
    let source = KubernetesSource::new(client.clone(), &cluster.node, known.clone());
    let telemetry = Telemetry::new();
    let (admissions, admitted) = mpsc::channel(ADMISSIONS);
    let (_leave, leaving) = watch::channel(false);
    let gate = Gate {
        client,
        node: cluster.node.clone(),
        known,
        admissions,
        leaving,
        telemetry: telemetry.clone(),
    };
    let plugins = plugin_server::Server::bind(&cluster.run_folder).map_err(Error::Listen)?;
    let extras = Extras {
        telemetry,
        ready: Ready::new(),
        admissions: admitted,
        services: vec![Box::pin(plugins.run(Arc::new(gate)))],
    };
    let stop = async {
        stop.await;
        Ending::Stay
    };
    Ok(agent::run_with(config, source, sink, extras, stop).await?)
}
