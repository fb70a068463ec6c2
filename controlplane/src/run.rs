//! Start, readiness and end of the whole control plane.
//!
//! Order: certificate authority and keys (a bad one ends the start before anything is served), listeners, the world
//! (whole, so that a proxy that comes back is never told that everything is gone), then service. The end is the other
//! way round: not ready, no new connections, streams told to go elsewhere, then nothing.

#[cfg(test)]
mod tests;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use net::{accept, drain};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    ca::istio_certificate_service_server::IstioCertificateServiceServer,
};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    admin::{self, Admin},
    auth::{Authentication, Authenticator, Jwks, JwksError},
    ca::{
        self, CertificateService, Current,
        serving::{ServingCertificate, ServingError},
    },
    config::Config,
    metrics::Metrics,
    output::{Changes, Subscription},
    serve::{DiscoveryService, access::Access, registry::Registry, store::Store},
    tls::{self, Services, TlsError},
    world::{Settings, StartError, World},
};

/// Connections at a time: design point 2,000 nodes, and as many again while they come back.
const MAX_CONNECTIONS: usize = 16_384;

/// A request for a certificate is a few KiB.
const MAX_CSR_MESSAGE: usize = 256 * 1024;

/// A control plane whose authority is loaded and whose listeners are bound.
#[derive(Debug)]
pub struct ControlPlane {
    config: Config,
    authority: Arc<Current>,
    serving: Arc<ServingCertificate>,
    tokens: Option<Arc<dyn Authenticator>>,
    xds: TcpListener,
    admin: TcpListener,
}

/// Why the control plane could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The certificate authority.
    #[error("load the certificate authority")]
    Ca(#[from] ca::LoadError),
    /// Its own certificate.
    #[error("make the control plane's own certificate")]
    Serving(#[from] ServingError),
    /// TLS.
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    /// Keys for tokens.
    #[error("load the keys that check tokens")]
    Jwks(#[from] JwksError),
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
    ControlPlane::bind(config).await?.serve(shutdown).await
}

impl ControlPlane {
    /// Loads the certificate authority and the keys, binds the listeners; nothing is served yet.
    pub async fn bind(config: Config) -> Result<Self, RunError> {
        let (ca, trust_domain) = (config.ca.clone(), config.trust_domain.clone());
        let authority = tokio::task::spawn_blocking(move || ca::load(&ca, &trust_domain));
        let authority = Current::new(authority.await??);
        let names = config.serving_names.clone();
        let serving = Arc::new(ServingCertificate::issue(authority.clone(), names)?);
        let tokens: Option<Arc<dyn Authenticator>> = match &config.jwks {
            Some(path) => Some(Arc::new(Jwks::open(
                path.clone(),
                config.token_audiences.clone(),
            )?)),
            None => None,
        };
        Ok(Self {
            xds: listen(config.xds_listen).await?,
            admin: listen(config.admin_listen).await?,
            config,
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
        self.admin.local_addr()
    }

    /// Computes the world and serves it until `shutdown` completes.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), RunError> {
        let (folders, settings) = (self.config.folders.clone(), self.config.settings());
        let world = tokio::task::spawn_blocking(move || World::start(&folders, settings)).await??;
        let metrics = Metrics::new();
        let (root, chain) = self.authority.load().expiries();
        metrics.expiries(root, chain);
        let store = Arc::new(Store::default());
        let mut changes = world.subscribe();
        if let Some(first) = changes.try_next() {
            take(&store, &metrics, &first);
        }
        let registry = Registry::new(metrics.clone());
        let acceptor = Arc::new(tls::Acceptor::new(
            self.authority.clone(),
            self.serving.clone(),
        )?);
        let (trigger, drain) = drain::channel();
        let parts = Parts {
            world,
            store,
            registry,
            metrics,
            ready: Arc::new(AtomicBool::new(true)),
        };
        let services = parts.services(&self, &drain);
        let mut tasks = JoinSet::new();
        tasks.spawn(self.serving.clone().renew());
        tasks.spawn(follow(changes, parts.store.clone(), parts.metrics.clone()));
        let admin = parts.admin(&self.config);
        tasks.spawn(async move { serve_admin(self.admin, admin).await });
        let options = accept::Options {
            name: "xds",
            limit: Some(MAX_CONNECTIONS),
        };
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
        tracing::info!("ready");
        shutdown.await;
        tracing::info!("ending");
        parts.ready.store(false, Ordering::Release);
        trigger
            .drain(drain::Mode::graceful(self.config.shutdown_grace))
            .await;
        listener.await?;
        tasks.shutdown().await;
        Ok(())
    }
}

impl Config {
    fn settings(&self) -> Settings {
        Settings {
            trust_domain: self.trust_domain.clone(),
            cluster_id: self.cluster_id.as_str().into(),
            network: self.network.as_str().into(),
            cluster_domain: self.cluster_domain.as_str().into(),
            root_namespace: self.root_namespace.as_str().into(),
            ..Settings::default()
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
}

impl Parts {
    fn services(&self, plane: &ControlPlane, drain: &drain::Watch) -> Services {
        let config = &plane.config;
        let authentication = Authentication {
            trust_domain: config.trust_domain.clone(),
            tokens: plane.tokens.clone(),
        };
        // Nothing deploys waypoints yet; until then no account is one's.
        let access = Access::new(&config.trusted_node_accounts, |_| false);
        let discovery = DiscoveryService::new(
            self.store.clone(),
            self.registry.clone(),
            authentication.clone(),
            access.clone(),
            config.max_streams_per_second,
            self.metrics.clone(),
            drain.clone(),
        );
        let certificates = CertificateService {
            authority: plane.authority.clone(),
            authentication,
            access,
            pods: Arc::new(self.world.clone()),
            trust_domain: config.trust_domain.clone(),
            cluster_id: config.cluster_id.clone(),
            metrics: self.metrics.clone(),
        };
        Services {
            discovery,
            certificates: IstioCertificateServiceServer::new(certificates)
                .max_decoding_message_size(MAX_CSR_MESSAGE),
        }
    }

    fn admin(&self, config: &Config) -> Admin {
        Admin {
            world: self.world.clone(),
            store: self.store.clone(),
            registry: self.registry.clone(),
            metrics: self.metrics.clone(),
            ready: self.ready.clone(),
            cluster_id: config.cluster_id.clone(),
            cluster_domain: config.cluster_domain.clone(),
        }
    }
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
    for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL] {
        let upserts = batch.upserts.iter().filter(|it| it.type_url == type_url);
        let removals = batch.removals.iter().filter(|it| it.type_url == type_url);
        metrics.changed(type_url, upserts.count() + removals.count(), services);
    }
}

async fn serve_admin(listener: TcpListener, admin: Admin) {
    if let Err(error) = axum::serve(listener, admin::router(admin)).await {
        tracing::error!(error = &error as &dyn std::error::Error, "admin API ended");
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, RunError> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| RunError::Listen { address, source })
}
