//! Pods and their enrolment on Kubernetes: the API server is the source of pods, an annotation is where enrolment is
//! told.

mod facts;
mod sink;
mod source;
mod world;

use std::sync::Arc;

use kube::Client;

pub use sink::AnnotationSink;
pub use source::KubernetesSource;

use crate::{
    agent::{self, Cluster, Config, RunError},
    sandboxes::{Places, Sandboxes},
};
use source::Known;

/// What the agent remembers of pods' sandboxes, in its run folder.
const MEMORY: &str = "leyline-pods.json";

/// Runs the agent for one node of the cluster that `client` speaks to, until `stop`.
///
/// # Errors
/// [`RunError`].
pub async fn run(
    client: Client,
    config: Config,
    cluster: &Cluster,
    stop: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let places = Places {
        netns_folder: cluster.netns_folder.clone(),
        host_proc: config.host_proc.clone(),
        memory: Some(cluster.run_folder.join(MEMORY)),
    };
    let known = Known::new(Arc::new(Sandboxes::new(places)), config.policy.clone());
    let sink = AnnotationSink::new(client.clone());
    let source = KubernetesSource::new(client, &cluster.node, known);
    agent::run(config, source, sink, stop).await
}
