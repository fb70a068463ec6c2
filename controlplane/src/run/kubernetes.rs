//! What a control plane on Kubernetes has beside a folder's: informers that feed the world, and writers.

use std::{sync::Arc, time::Duration};

use kube::Client;
use mesh::names::Str;
use net::{drain, report::Chain};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

use crate::{
    ca::{Current, serving::ServingCertificate},
    cluster::{Discovery, ca_store::CaStore, writers::Writers},
    config::{ClusterConfig, Config, mesh::MeshConfig, networks},
    gateway::{self, Deployed, Mesh},
    metrics::Metrics,
    object::{Kind, labels_of},
    run::remotes::{self, Reading, Remotes},
    serve::registry::Registry,
    source::cluster::{self, Event, Feed, Troubles, client::client_of},
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
    /// What is known of other clusters.
    pub remotes: remotes::Told,
    restart: Arc<Notify>,
    _informers: JoinSet<()>,
    _remotes: JoinSet<()>,
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
    /// Starts the informers and the world that they feed; follows the mesh's configuration, `mesh` at first. What the API
    /// server tells is counted in `metrics`.
    pub fn start(
        client: &Client,
        config: Config,
        mesh: MeshConfig,
        metrics: &Metrics,
    ) -> Result<(World, Self), StartError> {
        let selectors = Selectors::new(mesh.discovery_selectors.clone());
        let settings = config.settings();
        let (root, revision) = (settings.root_namespace.clone(), settings.revision.clone());
        let (reading, read) = watch::channel(Reading {
            settings: settings.clone(),
            selectors: selectors.clone(),
        });
        let mut kinds = cluster::kinds();
        let is_alone = !settings.has_others;
        if !is_alone {
            // Those that name other clusters.
            kinds.insert(Kind::Secret);
        }
        let (world, feed) = World::fed(kinds, settings, selectors.clone())?;
        let troubles = Troubles::default();
        let mut informers = cluster::start(
            client,
            &revision,
            &feed,
            &troubles,
            metrics.kubernetes_events(),
        );
        let namespace = config.cluster.as_ref().map(|it| it.namespace.clone());
        let others = Remotes {
            client: client.clone(),
            namespace: namespace.unwrap_or_else(|| root.to_string()),
            feed: feed.clone(),
            reading: read,
            connect: Arc::new(|kubeconfig| {
                Box::pin(async move { client_of((*kubeconfig).clone()).await })
            }),
            troubles: troubles.clone(),
            timeouts: metrics.remote_timeouts(),
            audiences: config.token_audiences.clone(),
        };
        // Where nobody asks for it, the account may not read Secrets.
        let (remotes, others) = match is_alone {
            true => (remotes::Told::nobody(), JoinSet::new()),
            false => others.start(),
        };
        let (found, discovery) = watch::channel(chosen(root.clone(), selectors));
        let restart = Arc::new(Notify::new());
        let follower = Follower {
            config,
            known: mesh,
            root,
            feed,
            discovery: found,
            reading,
            restart: restart.clone(),
        };
        informers.spawn(follower.follow());
        let source = Self {
            troubles,
            discovery,
            remotes,
            restart,
            _informers: informers,
            _remotes: others,
        };
        Ok((world, source))
    }
}

/// Ends when the mesh's configuration says what can only take effect with a new start; never where it is not followed.
/// Kubernetes starts what has ended. Replicas do not end at once: each kubelet brings a new ConfigMap in its own time.
pub async fn must_restart(source: Option<&Source>) {
    match source {
        Some(source) => source.restart.notified().await,
        None => std::future::pending().await,
    }
}

fn chosen(root: Str, selectors: Selectors) -> Discovery {
    Arc::new(move |name, labels| world::selects(&selectors, &root, name, &labels_of(labels)))
}

/// Follows the file of the mesh's configuration.
struct Follower {
    config: Config,
    known: MeshConfig,
    root: Str,
    feed: Feed,
    discovery: watch::Sender<Discovery>,
    /// How other clusters are read.
    reading: watch::Sender<Reading>,
    restart: Arc<Notify>,
}

impl Follower {
    /// Says of networks what serves instead of them, whenever they are others.
    async fn tell_networks(&self, told: &mut Vec<String>) {
        let file = self.config.cluster.as_ref();
        let Some(file) = file.map(|it| it.networks_config.clone()) else {
            return;
        };
        let read = tokio::task::spawn_blocking(move || networks::load(&file)).await;
        let now = match read {
            Ok(Ok(now)) => now,
            Ok(Err(error)) => vec![Chain(&error).to_string()],
            Err(_) => return,
        };
        if now != *told {
            for instead in &now {
                tracing::warn!(instead, "meshNetworks has no effect");
            }
            *told = now;
        }
    }

    /// Looks at the file until nobody listens any more. A state with mistakes changes nothing.
    async fn follow(mut self) {
        let file = self
            .config
            .cluster
            .as_ref()
            .map(|it| it.mesh_config.clone());
        let Some(file) = file else {
            return;
        };
        let mut networks = Vec::new();
        loop {
            self.tell_networks(&mut networks).await;
            tokio::time::sleep(LOOK).await;
            let file = file.clone();
            let read = tokio::task::spawn_blocking(move || MeshConfig::load(&file)).await;
            let goes_on = match read {
                Ok(Ok(now)) if now != self.known => self.take(now).await,
                Ok(Err(error)) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "the mesh's last good configuration stays in force");
                    true
                }
                _ => true,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// False: there is nothing left to do.
    async fn take(&mut self, now: MeshConfig) -> bool {
        let fields = self.known.needs_restart(&now);
        if !fields.is_empty() {
            let fields = fields.join(", ");
            tracing::warn!(
                fields,
                "the mesh's configuration is another one in what is read at the start: ending, to start with it"
            );
            self.restart.notify_one();
            return false;
        }
        let before = self.config.settings();
        self.config.take_mesh(&now);
        let is_selected_otherwise = now.discovery_selectors != self.known.discovery_selectors;
        self.known = now;
        let settings = self.config.settings();
        if settings != before {
            tracing::info!("the mesh is configured otherwise");
            self.reading
                .send_modify(|it| it.settings.clone_from(&settings));
            let settings = Box::new(settings);
            if self.feed.send(Event::Settings(settings)).await.is_err() {
                return false;
            }
        }
        if is_selected_otherwise {
            tracing::info!("other discovery selectors");
            let selectors = Selectors::new(self.known.discovery_selectors.clone());
            let chosen = chosen(self.root.clone(), selectors.clone());
            self.discovery.send_replace(chosen);
            self.reading
                .send_modify(|it| it.selectors.clone_from(&selectors));
            return self.feed.send(Event::Selectors(selectors)).await.is_ok();
        }
        true
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser as _;
    use tokio::sync::mpsc;

    use super::*;
    use crate::config::Args;

    fn config(file: &Path) -> Config {
        let file = file.display();
        let args = ["controlplane".to_owned(), format!("--meshConfig={file}")];
        Config::try_from(Args::parse_from(args)).unwrap()
    }

    /// Paused time passes while nothing else is to be done: each look at the file comes at once.
    #[tokio::test(start_paused = true)]
    async fn the_meshs_configuration_is_followed_and_another_trust_domain_asks_for_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mesh");
        std::fs::write(&file, "trustDomain: example.org\n").unwrap();
        let mut config = config(&file);
        let known = config.read_mesh().unwrap();
        let reading = Reading {
            settings: config.settings(),
            selectors: Selectors::default(),
        };
        let (feed, mut events) = mpsc::channel(8);
        let restart = Arc::new(Notify::new());
        let follower = Follower {
            root: "istio-system".into(),
            discovery: watch::channel(chosen("istio-system".into(), Selectors::default())).0,
            config,
            known,
            feed,
            reading: watch::channel(reading).0,
            restart: restart.clone(),
        };
        let follows = tokio::spawn(follower.follow());

        let aliases = "trustDomain: example.org\ntrustDomainAliases: [old.example]\n";
        std::fs::write(&file, aliases).unwrap();
        let Some(Event::Settings(settings)) = events.recv().await else {
            panic!("no other settings");
        };
        assert_eq!(settings.trust_domain_aliases[0].as_str(), "old.example");

        // A state with mistakes changes nothing, and the next good one counts.
        std::fs::write(&file, "trustDomain: [").unwrap();
        tokio::time::sleep(LOOK * 3).await;
        assert!(events.try_recv().is_err() && !follows.is_finished());
        std::fs::write(&file, "trustDomain: example.com\n").unwrap();
        restart.notified().await;
        assert!(events.recv().await.is_none(), "nothing else is told");
    }
}
