//! Start, readiness and end of the whole control plane.
//!
//! Order: certificate authority and keys (a bad one ends the start before anything is served), listeners, the world
//! (whole, so that a proxy that comes back is never told that everything is gone), then service. The end is the other
//! way round: not ready, no new connections, streams told to go elsewhere, then nothing.

pub mod kubernetes;
pub mod remotes;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::Router;
use net::{
    accept,
    clock::SystemClock,
    drain,
    tls::{KeyExchange, Originator, Policy, Versions},
};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, WAYPOINT_TYPE_URL,
    ca::istio_certificate_service_server::IstioCertificateServiceServer,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

use crate::{
    admin::{self, Admin, Guard},
    auth::{Authentication, Authenticator, Jwks, JwksError, Review},
    ca::{
        self, CertificateService, Current,
        serving::{ServingCertificate, ServingError},
    },
    cluster::{
        Discovery,
        ca_store::{CaSettings, CaStore, StoreError},
        writers::admit,
    },
    clusters::Clusters,
    config::{
        CaSource, Config, ServiceAccount,
        mesh::{MeshConfig, MeshConfigError},
    },
    credentials,
    keys::{self, Fetcher, Reach},
    metrics::Metrics,
    output::{Changes, GatewayProxy, Subscription},
    serve::{DiscoveryService, Limits, access::Access, registry::Registry, store::Store},
    source::cluster::{
        Troubles,
        client::{ClientError, client},
    },
    tls::{self, Services, TlsError},
    translate::l7::istio::mesh::MeshSettings,
    world::{Settings, StartError, World},
};

/// Connections at a time: design point 2,000 nodes, and as many again while they come back.
const MAX_CONNECTIONS: usize = 16_384;

/// A request for a certificate is a few KiB.
const MAX_CSR_MESSAGE: usize = 256 * 1024;

/// A control plane whose authority is loaded and whose listeners are bound.
pub struct ControlPlane {
    config: Config,
    authority: Arc<Current>,
    serving: Arc<ServingCertificate>,
    tokens: Option<Arc<dyn Authenticator>>,
    mesh: MeshConfig,
    client: Option<kube::Client>,
    ca: Keys,
    xds: TcpListener,
    admin: Option<TcpListener>,
    /// Readiness on an address of its own.
    readiness: Option<TcpListener>,
    /// Admission reviews.
    webhook: Option<TcpListener>,
}

impl fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlPlane")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Why the control plane could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The certificate authority.
    #[error("load the certificate authority")]
    Ca(#[from] ca::LoadError),
    /// The certificate authority of a cluster.
    #[error("load the certificate authority")]
    CaStore(#[from] StoreError),
    /// Its own certificate.
    #[error("make the control plane's own certificate")]
    Serving(#[from] ServingError),
    /// TLS.
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    /// Keys for tokens.
    #[error("load the keys that check tokens")]
    Jwks(#[from] JwksError),
    /// The API server.
    #[error("find the API server")]
    Client(#[from] ClientError),
    /// The mesh's configuration.
    #[error("take in the mesh's configuration")]
    Mesh(#[from] MeshConfigError),
    /// A listener could not be had.
    #[error("listen on {address}")]
    Listen {
        /// The wanted address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The folders.
    #[error("compute the world")]
    World(#[from] StartError),
    /// A thread of ours panicked.
    #[error("a task of the start panicked")]
    Panic(#[from] tokio::task::JoinError),
}

/// Runs the control plane until `shutdown` completes, then ends open streams within the configured grace.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RunError> {
    let mut shutdown = std::pin::pin!(shutdown);
    let plane = tokio::select! {
        bound = ControlPlane::bind(config) => bound?,
        () = &mut shutdown => return Ok(()),
    };
    plane.serve(shutdown).await
}

impl ControlPlane {
    /// Loads the certificate authority and the keys, binds the listeners; nothing is served yet.
    pub async fn bind(mut config: Config) -> Result<Self, RunError> {
        let mesh = config.read_mesh()?;
        let client = match &config.cluster {
            Some(cluster) => Some(client(cluster.kubeconfig.as_deref()).await?),
            None => None,
        };
        let ca = Keys::load(&config, client.as_ref()).await?;
        let authority = ca.current();
        let names = config.serving_names.clone();
        let serving = Arc::new(ServingCertificate::issue(authority.clone(), names)?);
        let audiences = config.token_audiences.clone();
        let tokens: Option<Arc<dyn Authenticator>> = match (&config.jwks, &client) {
            (Some(path), _) => Some(Arc::new(Jwks::open(path.clone(), audiences)?)),
            (None, Some(client)) => Some(Arc::new(Review::new(client.clone(), audiences))),
            (None, None) => None,
        };
        let (readiness, webhook) = match &config.cluster {
            Some(cluster) => (
                Some(listen(cluster.ready_listen).await?),
                Some(listen(cluster.https_listen).await?),
            ),
            None => (None, None),
        };
        Ok(Self {
            xds: listen(config.xds_listen).await?,
            admin: Some(listen(config.admin_listen).await?),
            readiness,
            webhook,
            config,
            mesh,
            client,
            ca,
            authority,
            serving,
            tokens,
        })
    }

    /// Where delta xDS and certificates are served.
    pub fn xds_address(&self) -> io::Result<SocketAddr> {
        self.xds.local_addr()
    }

    /// Where the admin API is served.
    pub fn admin_address(&self) -> io::Result<SocketAddr> {
        let listener = self.admin.as_ref();
        listener.map_or_else(
            || Err(io::ErrorKind::NotConnected.into()),
            TcpListener::local_addr,
        )
    }

    /// Where readiness is told, if it has an address of its own.
    pub fn readiness_address(&self) -> Option<io::Result<SocketAddr>> {
        self.readiness.as_ref().map(TcpListener::local_addr)
    }

    /// Computes the world and serves it until `shutdown` completes.
    pub async fn serve(
        mut self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), RunError> {
        let mut shutdown = std::pin::pin!(shutdown);
        let metrics = Metrics::new();
        let (world, source) = self.world(&metrics).await?;
        let (root, chain) = self.authority.load().expiries();
        metrics.expiries(root, chain);
        let (trigger, drain) = drain::channel();
        let parts = Parts {
            world: world.clone(),
            store: Arc::new(Store::default()),
            registry: Registry::new(metrics.clone()),
            metrics,
            ready: Arc::new(AtomicBool::new(false)),
            troubles: source.as_ref().map(|source| source.troubles.clone()),
            remotes: source.as_ref().map(|source| source.remotes.status.clone()),
            clusters: self.clusters(source.as_ref()),
            discovery: source.as_ref().map(|source| source.discovery.clone()),
        };
        let mut tasks = self.admin_tasks(&parts);
        if let Some(listener) = self.webhook.take() {
            // Reviews need no world: objects can be written while it is computed.
            let (serving, metrics) = (self.serving.clone(), parts.metrics.clone());
            tasks.spawn(admit(listener, serving, metrics, drain.clone()));
        }
        tokio::select! {
            () = world.listed() => {}
            () = &mut shutdown => return Ok(()),
        }
        let read = (world.clone(), self.client.clone());
        tasks.spawn(credentials::keep(read.0, read.1));
        let fetching = keys::keep(world.clone(), Arc::new(self.fetcher()), self.kept_keys());
        tasks.spawn(fetching);
        tokio::select! {
            () = credentials::answered(&world) => {}
            () = &mut shutdown => return Ok(()),
        }
        let mut changes = world.subscribe();
        if let Some(first) = changes.try_next() {
            take(&parts.store, &parts.metrics, &first);
        }
        tasks.spawn(self.serving.clone().renew());
        tasks.spawn(follow(changes, parts.store.clone(), parts.metrics.clone()));
        let writers = self.writers(&parts, &drain);
        let acceptor = Arc::new(tls::Acceptor::new(
            self.authority.clone(),
            self.serving.clone(),
        )?);
        let services = parts.services(&self, &drain);
        let options = accept::Options::named("xds").limited_to(MAX_CONNECTIONS);
        let connections = drain.clone();
        let listener = tokio::spawn(accept::serve(
            self.xds,
            options,
            drain,
            move |stream, peer| {
                tls::serve(
                    stream,
                    peer,
                    acceptor.current(),
                    services.clone(),
                    connections.clone(),
                )
            },
        ));
        parts.ready.store(true, Ordering::Release);
        tracing::info!("ready");
        tokio::select! {
            () = shutdown => {}
            () = kubernetes::must_restart(source.as_ref()) => {}
        }
        tracing::info!("ending");
        parts.ready.store(false, Ordering::Release);
        trigger
            .drain(drain::Mode::graceful(self.config.shutdown_grace))
            .await;
        listener.await?;
        if let Some(writers) = writers {
            kubernetes::join(writers).await;
        }
        tasks.shutdown().await;
        Ok(())
    }

    /// Where keys of tokens outlive this process.
    fn kept_keys(&self) -> keys::Place {
        match (&self.client, &self.config.cluster, &self.config.ca.source) {
            (Some(client), Some(cluster), _) => {
                let (namespace, revision) = (&cluster.namespace, &cluster.revision);
                keys::Place::in_cluster(client.clone(), namespace, revision)
            }
            (_, _, CaSource::SelfSigned(folder)) => keys::Place::Folder(folder.clone()),
            _ => keys::Place::Nowhere,
        }
    }

    /// Fetches keys of tokens. A folder's mesh is on one machine, with its issuers.
    fn fetcher(&self) -> Fetcher {
        let (versions, exchange) = (Versions::Tls12And13, KeyExchange::Default);
        let policy = Policy::new(versions, exchange, Arc::new(SystemClock));
        let reach = match self.config.cluster {
            Some(_) => Reach::Others,
            None => Reach::Local,
        };
        Fetcher::new(Originator::new(policy), reach)
    }

    /// The world, and what feeds it if it is not a folder's.
    async fn world(
        &self,
        metrics: &Metrics,
    ) -> Result<(World, Option<kubernetes::Source>), RunError> {
        let settings = self.config.settings();
        match (&self.client, &self.config.cluster) {
            (Some(client), Some(_)) => {
                let (config, mesh) = (self.config.clone(), self.mesh.clone());
                let (world, source) = kubernetes::Source::start(client, config, mesh, metrics)?;
                Ok((world, Some(source)))
            }
            _ => {
                let folders = self.config.folders.clone();
                let start = move || World::start(&folders, settings);
                Ok((tokio::task::spawn_blocking(start).await??, None))
            }
        }
    }

    /// Readiness, metrics and debugging: served before the world is whole, so that one can see what it waits for.
    fn admin_tasks(&mut self, parts: &Parts) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let admin = Arc::new(parts.admin(&self.config, self.tokens.clone()));
        if let Some(listener) = self.readiness.take() {
            let router = admin::readiness_router(admin.clone());
            tasks.spawn(async move { serve_admin(listener, router).await });
        }
        if let Some(listener) = self.admin.take() {
            tasks.spawn(async move { serve_admin(listener, admin::router(admin)).await });
        }
        tasks
    }

    fn clusters(&self, source: Option<&kubernetes::Source>) -> Clusters {
        let own = &self.config.cluster_id;
        match source {
            Some(source) => Clusters::new(own, source.remotes.members.clone()),
            None => Clusters::alone(own),
        }
    }

    fn writers(&self, parts: &Parts, drain: &drain::Watch) -> Option<JoinSet<()>> {
        let context = kubernetes::Context {
            client: self.client.clone()?,
            world: parts.world.clone(),
            settings: Arc::new(self.config.settings()),
            config: Arc::new(self.config.clone()),
            cluster: Arc::new(self.config.cluster.clone()?),
            ca: self.ca.store()?,
            discovery: parts.discovery.clone()?,
            authority: self.authority.clone(),
            serving: self.serving.clone(),
            metrics: parts.metrics.clone(),
            registry: parts.registry.clone(),
            drain: drain.clone(),
        };
        Some(kubernetes::writers(&context))
    }
}

/// The signing keys, by where they are kept.
enum Keys {
    Folder(Arc<Current>),
    Cluster(Arc<CaStore>),
}

impl Keys {
    async fn load(config: &Config, client: Option<&kube::Client>) -> Result<Self, RunError> {
        let (ca, trust_domain) = (config.ca.clone(), config.trust_domain.clone());
        if let (CaSource::Cluster(dir), Some(client), Some(cluster)) =
            (&ca.source, client, &config.cluster)
        {
            let settings = CaSettings {
                namespace: cluster.namespace.clone(),
                trust_domain,
                plug_in: Some(dir.clone()),
                default_ttl: ca.default_ttl,
                max_ttl: ca.max_ttl,
            };
            let store = CaStore::load(client.clone(), settings).await?;
            return Ok(Self::Cluster(Arc::new(store)));
        }
        let loading = tokio::task::spawn_blocking(move || ca::load(&ca, &trust_domain));
        Ok(Self::Folder(Current::new(loading.await??)))
    }

    fn current(&self) -> Arc<Current> {
        match self {
            Self::Folder(current) => current.clone(),
            Self::Cluster(store) => store.current(),
        }
    }

    fn store(&self) -> Option<Arc<CaStore>> {
        match self {
            Self::Folder(_) => None,
            Self::Cluster(store) => Some(store.clone()),
        }
    }
}

impl Config {
    /// Reads the mesh's configuration, which says more than flags do.
    fn read_mesh(&mut self) -> Result<MeshConfig, RunError> {
        let file = self.cluster.as_ref().map(|cluster| &cluster.mesh_config);
        let Some(file) = file.or(self.mesh_config.as_ref()) else {
            return Ok(MeshConfig::default());
        };
        let mesh = MeshConfig::load(file)?;
        self.take_mesh(&mesh);
        Ok(mesh)
    }

    /// Takes the mesh's configuration in. What is wrong in it, or without effect, is logged.
    fn take_mesh(&mut self, mesh: &MeshConfig) {
        if let Some(cluster) = &mut self.cluster {
            cluster.entry_visibility.clone_from(&mesh.entry_visibility);
            cluster.service_scopes.clone_from(&mesh.service_scopes);
            cluster
                .trust_domain_aliases
                .clone_from(&mesh.trust_domain_aliases);
        }
        if !mesh.without_effect.is_empty() {
            let fields = mesh.without_effect.join(", ");
            tracing::info!(
                fields,
                "fields of the mesh's configuration without effect here"
            );
        }
        if let Some(trust_domain) = &mesh.trust_domain {
            self.trust_domain.clone_from(trust_domain);
        }
        if let Some(root) = &mesh.root_namespace {
            self.root_namespace.clone_from(root);
        }
        let mut problems = Vec::new();
        let settings = MeshSettings::read(&self.settings(), &mesh.document, &mut problems);
        for problem in problems {
            tracing::warn!(problem, "the mesh's configuration has a mistake");
        }
        self.mesh = Some(Arc::new(settings));
    }

    fn settings(&self) -> Settings {
        let defaults = Settings::default();
        let cluster = self.cluster.as_ref();
        Settings {
            revision: cluster.map_or(defaults.revision, |it| it.revision.as_str().into()),
            failure: cluster.map_or(defaults.failure, |it| it.failure),
            send_dry_run: cluster.is_some_and(|it| it.send_dry_run),
            trust_domain: self.trust_domain.clone(),
            cluster_id: self.cluster_id.as_str().into(),
            network: self.network.as_str().into(),
            cluster_domain: self.cluster_domain.as_str().into(),
            root_namespace: self.root_namespace.as_str().into(),
            entry_visibility: cluster.and_then(|it| it.entry_visibility.clone()),
            service_scopes: cluster.and_then(|it| it.service_scopes.clone()),
            // A folder is small: whatever is in it is taken account of.
            has_others: cluster.is_none_or(|it| it.gateways.is_multi_network()),
            is_remote: false,
            system_namespace: cluster.map(|it| it.namespace.as_str().into()),
            trust_domain_aliases: cluster
                .map(|it| it.trust_domain_aliases.clone())
                .unwrap_or_default(),
            mesh: self.mesh.clone(),
        }
    }
}

/// What the services share.
struct Parts {
    world: World,
    store: Arc<Store>,
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    ready: Arc<AtomicBool>,
    /// What of the API server cannot be watched, where it is the source.
    troubles: Option<Troubles>,
    /// What is known of other clusters.
    remotes: Option<remotes::Status>,
    /// Who vouches for whom.
    clusters: Clusters,
    /// Which namespaces the mesh looks at.
    discovery: Option<watch::Receiver<Discovery>>,
}

impl Parts {
    fn services(&self, plane: &ControlPlane, drain: &drain::Watch) -> Services {
        let config = &plane.config;
        let authentication = Authentication {
            trust_domain: config.trust_domain.clone(),
            tokens: plane.tokens.clone(),
            clusters: self.clusters.clone(),
        };
        let (nodes, clusters) = (&config.trusted_node_accounts, self.clusters.clone());
        let access = Access::new(nodes, clusters, gateway_of(&self.world));
        let discovery = DiscoveryService::new(
            self.store.clone(),
            self.registry.clone(),
            authentication.clone(),
            access.clone(),
            Limits {
                streams_per_second: config.max_streams_per_second,
                max_age: config.max_stream_age,
            },
            self.metrics.clone(),
            drain.clone(),
        );
        let certificates = CertificateService {
            authority: plane.authority.clone(),
            authentication,
            access,
            pods: Arc::new(self.world.clone()),
            trust_domain: config.trust_domain.clone(),
            metrics: self.metrics.clone(),
        };
        Services {
            discovery,
            certificates: IstioCertificateServiceServer::new(certificates)
                .max_decoding_message_size(MAX_CSR_MESSAGE),
        }
    }

    fn admin(&self, config: &Config, tokens: Option<Arc<dyn Authenticator>>) -> Admin {
        let guard = config.cluster.as_ref().map(|cluster| Guard {
            authentication: Authentication {
                trust_domain: config.trust_domain.clone(),
                tokens,
                // Who looks at this cluster's mesh is of this cluster.
                clusters: Clusters::alone(&config.cluster_id),
            },
            namespaces: [cluster.namespace.clone()]
                .into_iter()
                .chain(cluster.debug_namespaces.clone())
                .collect(),
        });
        Admin {
            guard,
            world: self.world.clone(),
            store: self.store.clone(),
            registry: self.registry.clone(),
            metrics: self.metrics.clone(),
            ready: self.ready.clone(),
            troubles: self.troubles.clone(),
            remotes: self.remotes.clone(),
            cluster_id: config.cluster_id.clone(),
            cluster_domain: config.cluster_domain.clone(),
        }
    }
}

/// Whose proxies run in a world.
fn gateway_of(
    world: &World,
) -> impl Fn(&ServiceAccount, Option<&str>) -> Option<GatewayProxy> + Send + Sync + use<> {
    let world = world.clone();
    move |account, pod| world.gateway_of(&account.namespace, &account.name, pod)
}

/// Takes batches from the world into the store, forever.
async fn follow(mut changes: Subscription, store: Arc<Store>, metrics: Arc<Metrics>) {
    loop {
        let batch = changes.next().await;
        take(&store, &metrics, &batch);
    }
}

fn take(store: &Store, metrics: &Metrics, batch: &Changes) {
    store.apply(batch);
    let services = store.services();
    for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, WAYPOINT_TYPE_URL] {
        let upserts = batch.upserts.iter().filter(|it| it.type_url == type_url);
        let removals = batch.removals.iter().filter(|it| it.type_url == type_url);
        metrics.changed(type_url, upserts.count() + removals.count(), services);
    }
}

async fn serve_admin(listener: TcpListener, router: Router) {
    let router = router.into_make_service_with_connect_info::<SocketAddr>();
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(error = &error as &dyn std::error::Error, "admin API ended");
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, RunError> {
    let mut listener = TcpListener::bind(address).await;
    // Every address of a machine without IPv6.
    if listener.is_err() && address.ip() == Ipv6Addr::UNSPECIFIED {
        listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await;
    }
    listener.map_err(|source| RunError::Listen { address, source })
}
