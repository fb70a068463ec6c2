//! What a control plane on Kubernetes has beside a folder's: informers that feed the world, and writers.

use std::{sync::Arc, time::Duration};

use kube::Client;
use net::drain;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    ca::{Current, serving::ServingCertificate},
    cluster::{Discovery, ca_store::CaStore, writers::Writers},
    config::{ClusterConfig, Config},
    metrics::Metrics,
    serve::registry::Registry,
    source::cluster::{self, Troubles},
    world::{Settings, StartError, World},
};

/// How long writers may take to end.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// The informers behind a world; they end with it.
#[derive(Debug)]
pub struct Source {
    /// What cannot be watched.
    pub troubles: Troubles,
    _informers: JoinSet<()>,
}

/// What those who write to the cluster are given.
#[derive(Clone)]
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What there is, and what is to be said of it.
    pub world: World,
    /// The mesh.
    pub settings: Arc<Settings>,
    /// All settings.
    pub config: Arc<Config>,
    /// Those of a control plane on Kubernetes.
    pub cluster: Arc<ClusterConfig>,
    /// Where the keys of the certificate authority are kept.
    pub ca: Arc<CaStore>,
    /// Which namespaces the mesh looks at.
    pub discovery: watch::Receiver<Discovery>,
    /// Who signs.
    pub authority: Arc<Current>,
    /// The certificate to serve webhooks with.
    pub serving: Arc<ServingCertificate>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Connected proxies.
    pub registry: Arc<Registry>,
    /// The end.
    pub drain: drain::Watch,
}

impl Source {
    /// Starts the informers and the world that they feed.
    pub fn start(client: &Client, settings: Settings) -> Result<(World, Self), StartError> {
        let (world, feed) = World::fed(cluster::kinds(), settings)?;
        let troubles = Troubles::default();
        let informers = cluster::start(client, &feed, &troubles);
        let source = Self {
            troubles,
            _informers: informers,
        };
        Ok((world, source))
    }
}

/// Starts everything that writes to the cluster. Called on every replica once the first world is whole; who writes is
/// decided by leadership. The tasks end by themselves when the drain starts.
pub fn writers(context: &Context) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let writers = Writers {
        client: context.client.clone(),
        namespace: context.cluster.namespace.clone(),
        revision: context.cluster.revision.clone(),
        identity: context.cluster.pod.clone(),
        ca: context.ca.clone(),
        world: context.world.clone(),
        discovery: context.discovery.clone(),
        metrics: context.metrics.clone(),
    };
    let election = writers.election();
    let mut drain = context.drain.clone();
    tasks.spawn(async move {
        let stop = async {
            drain.started().await;
        };
        writers.run(election, stop).await;
    });
    tasks
}

/// Lets writers end by themselves (they give their lease back), and ends those that do not.
pub async fn join(mut tasks: JoinSet<()>) {
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WRITES, all).await.is_err() {
        tasks.shutdown().await;
    }
}
