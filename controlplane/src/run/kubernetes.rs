//! What a control plane on Kubernetes has beside a folder's: informers that feed the world, and writers.

use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};

use kube::Client;
use mesh::names::Str;
use net::drain;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    ca::{Current, serving::ServingCertificate},
    cluster::{Discovery, ca_store::CaStore, writers::Writers},
    config::{ClusterConfig, Config, mesh::MeshConfig},
    gateway::{self, Deployed, Mesh},
    metrics::{KubernetesEvents, Metrics},
    serve::registry::Registry,
    source::cluster::{self, Event, Troubles},
    world::{self, Selectors, Settings, StartError, World},
};

/// How often the file of the mesh's configuration is looked at; kubelet brings changes of a ConfigMap within a minute.
const LOOK: Duration = Duration::from_secs(5);
/// How long writers may take to end.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// The informers behind a world; they end with it.
pub struct Source {
    /// What cannot be watched.
    pub troubles: Troubles,
    /// Which namespaces the mesh looks at.
    pub discovery: watch::Receiver<Discovery>,
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
    /// Starts the informers and the world that they feed; follows the mesh's configuration, `mesh` at first, in `file`.
    /// What the API server tells is counted in `events`.
    pub fn start(
        client: &Client,
        settings: Settings,
        file: PathBuf,
        mesh: MeshConfig,
        events: &KubernetesEvents,
    ) -> Result<(World, Self), StartError> {
        let selectors = Selectors::new(mesh.discovery_selectors.clone());
        let (root, revision) = (settings.root_namespace.clone(), settings.revision.clone());
        let (world, feed) = World::fed(cluster::kinds(), settings, selectors.clone())?;
        let troubles = Troubles::default();
        let mut informers = cluster::start(client, &revision, &feed, &troubles, events);
        let (found, discovery) = watch::channel(chosen(root.clone(), selectors));
        informers.spawn(follow(file, mesh, move |selectors| {
            found.send_replace(chosen(root.clone(), selectors.clone()));
            let feed = feed.clone();
            async move { feed.send(Event::Selectors(selectors)).await.is_ok() }
        }));
        let source = Self {
            troubles,
            discovery,
            _informers: informers,
        };
        Ok((world, source))
    }
}

fn chosen(root: Str, selectors: Selectors) -> Discovery {
    Arc::new(move |name, labels| {
        let labels = labels.iter();
        let labels = labels.map(|(key, value)| (key.as_str().into(), value.as_str().into()));
        world::selects(&selectors, &root, name, &labels.collect())
    })
}

/// Follows the file of the mesh's configuration and tells of other selectors. A state with mistakes changes nothing.
async fn follow<F: Future<Output = bool>>(
    path: PathBuf,
    mut known: MeshConfig,
    mut tell: impl FnMut(Selectors) -> F,
) {
    loop {
        tokio::time::sleep(LOOK).await;
        let file = path.clone();
        let read = tokio::task::spawn_blocking(move || MeshConfig::load(&file)).await;
        let now = match read {
            Ok(Ok(now)) if now != known => now,
            Ok(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the mesh's last good configuration stays in force");
                continue;
            }
            _ => continue,
        };
        let fields = known.needs_restart(&now);
        if !fields.is_empty() {
            tracing::warn!(
                fields = fields.join(", "),
                file = %path.display(),
                "these fields of the mesh's configuration are read at the start: restart the control plane (kubectl rollout restart) for them to take effect"
            );
        }
        let is_other = now.discovery_selectors != known.discovery_selectors;
        known = now;
        if is_other {
            tracing::info!("other discovery selectors");
            if !tell(Selectors::new(known.discovery_selectors.clone())).await {
                return;
            }
        }
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
    let (client, gateways) = (context.client.clone(), Arc::new(deployed(context)));
    let leadership = election.1.clone();
    tasks.spawn(async move {
        let work = || gateway::run::run(client.clone(), gateways.clone());
        leadership.while_leading("gateways", work).await;
    });
    let mut drain = context.drain.clone();
    tasks.spawn(async move {
        let stop = async {
            drain.started().await;
        };
        writers.run(election, stop).await;
    });
    tasks
}

fn deployed(context: &Context) -> Deployed {
    let config = &context.config;
    context.cluster.gateways.of(Mesh {
        revision: context.cluster.revision.clone(),
        system_namespace: context.cluster.namespace.clone(),
        cluster_domain: config.cluster_domain.clone(),
        cluster_id: config.cluster_id.clone(),
        trust_domain: config.trust_domain.to_string(),
        network: config.network.clone(),
    })
}

/// Lets writers end by themselves (they give their lease back), and ends those that do not.
pub async fn join(mut tasks: JoinSet<()>) {
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WRITES, all).await.is_err() {
        tasks.shutdown().await;
    }
}
