//! The whole waypoint put together: what it follows, what it serves, and how it ends.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use net::{
    accept, admin,
    ca::{
        CaClient, CaConfig, CertificateState, Certificates, CertificatesConfig, Impersonation,
        Issuer,
    },
    clock::SystemClock,
    drain, hbone, log, metrics, process,
    ready::{self, Gate, Ready},
    settings::RemoteError,
    socket::{Factory, SocketError},
    tls::{
        self, Revocations, control_plane,
        revocation_file::{self, RevocationsError},
    },
    xds,
};
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::Notify,
    task::{JoinHandle, JoinSet},
};

use crate::{
    authentication::Authentication,
    authorize,
    backend::Backend,
    config::{Config, Remote},
    detect::ServerFirst,
    dump,
    http::transport::MeshTransport,
    inbound,
    limits::{Handshakes, Peers},
    metrics::Metrics,
    overload::{self, Overload},
    snapshot::Snapshots,
    telemetry::{self, Output, Telemetry},
    waypoint::Waypoint,
};

/// A CA request is given up after this time.
const CA_DEADLINE: Duration = Duration::from_secs(10);
/// A control plane that accepts a stream and says nothing is left for another try after this time.
const XDS_ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Why the waypoint does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A listener cannot be opened.
    #[error("open the {name} listener")]
    Listen {
        /// Which.
        name: &'static str,
        /// Why.
        source: SocketError,
    },
    /// The control plane cannot be dialled.
    #[error("{setting}")]
    ControlPlane {
        /// The setting that names it.
        setting: &'static str,
        /// Why.
        source: control_plane::ControlPlaneError,
    },
    /// The address is no URI.
    #[error("{setting} is not an address")]
    Address {
        /// The setting.
        setting: &'static str,
        /// Why.
        source: RemoteError,
    },
    /// The list of revoked certificates cannot be used.
    #[error("CRL_PATH")]
    Revocations(#[from] RevocationsError),
    /// Certificates have no source.
    #[error("FAKE_CA is set and no issuer was brought: that is for tests")]
    NoIssuer,
    /// Signals cannot be listened for.
    #[error("listen for signals")]
    Signals(#[source] io::Error),
}

/// Runs the waypoint on the current runtime until SIGTERM, SIGINT or `POST /quitquitquit`, then drains.
///
/// # Errors
/// [`RunError`], before anything is served.
pub async fn run(config: Config) -> Result<(), RunError> {
    run_with(config, None).await
}

/// The same, with log levels that can be changed.
pub(crate) async fn run_with(config: Config, logs: Option<log::Handle>) -> Result<(), RunError> {
    let stop = process::told_to_end().map_err(RunError::Signals)?;
    let process = Process {
        logs,
        ..Process::new(config)
    };
    process.run_until(stop).await
}

/// A waypoint to be run, with what its caller may bring in place of what [`Config`] names.
pub struct Process {
    config: Config,
    logs: Option<log::Handle>,
    snapshots: Snapshots,
    issuer: Option<Arc<dyn Issuer>>,
}

impl Process {
    /// As the settings say.
    pub fn new(config: Config) -> Self {
        Self {
            snapshots: Snapshots::new(&config.node),
            config,
            logs: None,
            issuer: None,
        }
    }

    /// Asks `issuer` for certificates, and not the CA of the settings.
    pub fn with_issuer(self, issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer: Some(issuer),
            ..self
        }
    }

    /// Knows what somebody else writes.
    #[cfg(test)]
    pub(crate) fn with_snapshots(self, snapshots: Snapshots) -> Self {
        Self { snapshots, ..self }
    }

    /// Runs until `stop` resolves or `POST /quitquitquit` is received, then drains.
    ///
    /// # Errors
    /// [`RunError`], before anything is served.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), RunError> {
        let running = self.start()?;
        tokio::select! {
            () = stop => {}
            () = running.quit.notified() => tracing::info!("told to quit: draining"),
        }
        running.drain().await;
        Ok(())
    }

    /// Opens everything. Must be called inside the runtime that will serve it.
    pub(crate) fn start(self) -> Result<Running, RunError> {
        let node = &self.config.node;
        let (pod, namespace) = (&*node.pod_name, &*node.namespace);
        tracing::info!(
            version = net::version::line("waypoint"),
            pod,
            namespace,
            "waypoint starts"
        );
        let ready = Ready::new();
        let own = ready.gate("not draining");
        own.open();
        let (services, of_services) = drain::channel();
        let (traffic, of_traffic) = drain::channel();
        let mut registry = Registry::default();
        let mut tasks = JoinSet::new();
        let listeners = Listeners::open(&self.config)?;
        let policy = tls::Policy::default();
        let revocations = policy.revocations().clone();
        if let Some(path) = &self.config.revocations {
            let known = revocation_file::load(path, &revocations)?;
            tasks.spawn(revocation_file::follow(
                path.clone(),
                known,
                revocations.clone(),
            ));
        }
        self.follow(&policy, &mut registry, &ready, &of_services, &mut tasks)?;
        let issuer = self.issuer(&policy)?;
        let clock = Arc::new(SystemClock);
        let certificates = Certificates::new(issuer, clock, CertificatesConfig::default());
        let config = Arc::new(self.config);
        if let Some(path) = config.ca.as_ref().and_then(Remote::root_file) {
            tasks.spawn(certificates.clone().follow_root(path.to_owned()));
        }
        let waypoint = assemble(
            config.clone(),
            self.snapshots,
            certificates,
            self.logs.clone(),
            &mut registry,
        );
        tasks.spawn(certified(waypoint.clone(), ready.gate("certificate")));
        tasks.spawn(crate::http::sweep(waypoint.clone()));
        tasks.spawn(overload::watch(waypoint.clone()));
        tasks.spawn(authorize::watch(
            waypoint.clone(),
            of_traffic.clone().release(),
        ));
        let address = listeners.hbone.local_addr().ok();
        drop(of_traffic);
        let (listening, of_listening) = drain::channel();
        let accepting = Accepting {
            waypoint: waypoint.clone(),
            revocations,
            traffic: traffic.clone(),
        };
        let accepting = tokio::spawn(accepting.serve(listeners.hbone, of_listening));
        let readiness = ready::serve(listeners.readiness, ready.clone(), of_services.clone());
        tasks.spawn(readiness);
        let exposed =
            metrics::Exposition::from(Arc::new(registry)).with(waypoint.telemetry.families());
        let stats = metrics::serve(listeners.stats, exposed, of_services.clone());
        tasks.spawn(stats);
        let quit = Arc::new(Notify::new());
        let endpoint = dump::endpoint(&waypoint, self.logs, quit.clone());
        tasks.spawn(admin::serve(listeners.admin, endpoint, of_services));
        Ok(Running {
            config,
            address,
            own,
            #[cfg(test)]
            ready,
            services,
            traffic,
            listening,
            accepting,
            quit,
            _tasks: tasks,
        })
    }

    fn issuer(&self, policy: &tls::Policy) -> Result<Arc<dyn Issuer>, RunError> {
        match (&self.issuer, &self.config.ca) {
            (Some(issuer), _) => Ok(Arc::clone(issuer)),
            (None, Some(remote)) => ca_client(remote, &self.config, policy),
            (None, None) => Err(RunError::NoIssuer),
        }
    }

    /// Starts following the control plane.
    fn follow(
        &self,
        policy: &tls::Policy,
        registry: &mut Registry,
        ready: &Ready,
        drain: &drain::Watch,
        tasks: &mut JoinSet<()>,
    ) -> Result<(), RunError> {
        let gate = ready.gate("state manager");
        let Some(remote) = &self.config.xds else {
            gate.open();
            return Ok(());
        };
        self.snapshots.withhold();
        let metrics = xds::Metrics::register(registry);
        let config = xds_config(&self.config, remote, policy, gate, metrics)?;
        let (client, _demand) = xds::Client::new(config, self.snapshots.handler());
        tasks.spawn(client.run(drain.clone()));
        Ok(())
    }
}

/// A running waypoint.
pub(crate) struct Running {
    config: Arc<Config>,
    /// Where HBONE is served.
    address: Option<SocketAddr>,
    /// Closed when it is to end.
    own: Gate,
    #[cfg(test)]
    ready: Ready,
    services: drain::Trigger,
    /// Held open by each connection.
    traffic: drain::Trigger,
    listening: drain::Trigger,
    accepting: JoinHandle<()>,
    quit: Arc<Notify>,
    /// Admin, metrics, xDS: end with us.
    _tasks: JoinSet<()>,
}

impl Running {
    /// Where HBONE is served.
    #[cfg(test)]
    pub(crate) fn address(&self) -> SocketAddr {
        self.address.expect("a listener has an address")
    }

    /// What it waits for.
    #[cfg(test)]
    pub(crate) fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Tells when clients are told to go.
    #[cfg(test)]
    pub(crate) fn draining(&self) -> drain::Watch {
        self.traffic.watch().release()
    }

    /// Not ready; once everyone has heard of it, GOAWAY to all; what is open may end until the deadline.
    ///
    /// Who has not heard of it, because the control plane is slow or away, may still come: nobody is refused as long as
    /// anyone is served.
    pub(crate) async fn drain(self) {
        let began = Instant::now();
        self.own.close();
        tokio::time::sleep(self.config.drain.propagation).await;
        let mode = drain::Mode::graceful(self.config.drain.deadline);
        self.traffic.start(mode);
        let _ = tokio::time::timeout(self.config.drain.deadline, self.traffic.finished()).await;
        self.listening.start(mode);
        if let Err(error) = self.accepting.await {
            tracing::error!(%error, "the HBONE listener's task failed");
        }
        tracing::info!(took = ?began.elapsed(), address = ?self.address, "drained");
        self.services.start(drain::Mode::Immediate);
    }
}

struct Listeners {
    hbone: TcpListener,
    admin: Vec<TcpListener>,
    stats: TcpListener,
    readiness: TcpListener,
}

impl Listeners {
    fn open(config: &Config) -> Result<Self, RunError> {
        let sockets = Factory::default();
        let listen = |name, address: SocketAddr| {
            let opened = match address.ip().is_unspecified() && address.is_ipv6() {
                true => sockets.listen_any(address.port()),
                false => sockets.listen(address),
            };
            opened.map_err(|source| RunError::Listen { name, source })
        };
        let admin = config.listen.admin.iter();
        Ok(Self {
            hbone: listen("HBONE", config.listen.hbone)?,
            admin: admin
                .map(|address| listen("admin", *address))
                .collect::<Result<_, _>>()?,
            stats: listen("metrics", config.listen.stats)?,
            readiness: listen("readiness", config.listen.readiness)?,
        })
    }
}

pub(crate) fn assemble(
    config: Arc<Config>,
    snapshots: Snapshots,
    certificates: Certificates,
    logs: Option<log::Handle>,
    registry: &mut Registry,
) -> Arc<Waypoint> {
    let connections: Arc<crate::flow::Registry> = Arc::default();
    let counting = connections.clone();
    let before_scrape = move || {
        for (_, live) in counting.open() {
            live.count_bytes();
        }
    };
    let version = &config.node.istio_version;
    let metrics = Metrics::register(registry, version, Arc::new(before_scrape));
    metrics::register_process(registry, Vec::new());
    let http2 = hbone::Config {
        max_streams: config.http2.max_streams,
        ..hbone::Config::sized(&config.http2.sizes)
    };
    let outside = tls::Policy::new(
        tls::Versions::Tls12And13,
        tls::KeyExchange::Default,
        Arc::new(SystemClock),
    );
    let backend = Backend::new(
        config.clone(),
        snapshots.clone(),
        certificates.clone(),
        http2.clone(),
        tls::Originator::new(outside),
    );
    let node = telemetry_node(&config);
    let output = logs.map(|logs| Box::new(AccessLog(logs)) as Box<dyn Output>);
    Arc::new_cyclic(|waypoint| Waypoint {
        authentication: Authentication::default(),
        telemetry: {
            let transport = Arc::new(MeshTransport::of(waypoint.clone()));
            Telemetry::register(registry, node, output, transport)
        },
        identity: config.node.identity(),
        backend,
        connections,
        server_first: ServerFirst::default(),
        handshakes: Handshakes::new(config.limits.handshakes),
        peers: Peers::new(config.limits.connections_per_identity),
        overload: Overload::new(config.limits.memory),
        http2,
        metrics,
        http: crate::http::Engine::new(),
        snapshots,
        certificates,
        config,
    })
}

/// Access logs share the one writer of our output.
struct AccessLog(log::Handle);

impl Output for AccessLog {
    fn line(&self, line: &[u8]) -> bool {
        self.0.line(line)
    }
}

fn telemetry_node(config: &Config) -> telemetry::Node {
    let node = &config.node;
    let (ip, pod, namespace) = (&node.instance_ip, &node.pod_name, &node.namespace);
    let domain = &node.cluster_domain;
    telemetry::Node {
        pod: pod.clone(),
        id: format!("waypoint~{ip}~{pod}.{namespace}~{namespace}.svc.{domain}").into(),
        workload: node.gateway.clone(),
        namespace: namespace.clone(),
        cluster: node.cluster_id.clone(),
        mesh_id: node.trust_domain.as_str().into(),
    }
}

fn max_connections(config: &Config) -> usize {
    let most = config.limits.connections;
    most.unwrap_or_else(|| process::most_connections().max(1))
}

/// Takes in connections of HBONE.
struct Accepting {
    waypoint: Arc<Waypoint>,
    revocations: Revocations,
    traffic: drain::Trigger,
}

impl Accepting {
    async fn serve(self, listener: TcpListener, drain: drain::Watch) {
        let options = accept::Options::named("hbone")
            .limited_to(max_connections(&self.waypoint.config).min(1 << 20));
        let handler = move |tcp, peer| {
            let (waypoint, revocations) = (self.waypoint.clone(), self.revocations.clone());
            inbound::serve(waypoint, revocations, tcp, peer, self.traffic.watch())
        };
        accept::serve(listener, options, drain, handler).await;
    }
}

/// Opens the gate once we can prove who we are, and says why we cannot.
async fn certified(waypoint: Arc<Waypoint>, gate: Gate) {
    waypoint.certificates.prefetch(&waypoint.identity);
    let Some(mut states) = waypoint.certificates.watch(&waypoint.identity) else {
        return gate.explain("the certificate is not kept");
    };
    loop {
        match &*states.borrow_and_update() {
            CertificateState::Available(_) => return gate.open(),
            state => gate.explain(state.to_string()),
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

fn control_plane_of(
    setting: &'static str,
    remote: &Remote,
    policy: &tls::Policy,
) -> Result<control_plane::Config, RunError> {
    let made = remote.control_plane(policy);
    made.map_err(|source| RunError::Address { setting, source })
}

fn ca_client(
    remote: &Remote,
    config: &Config,
    policy: &tls::Policy,
) -> Result<Arc<dyn Issuer>, RunError> {
    const SETTING: &str = "CA_ADDRESS";
    let client = CaClient::new(CaConfig {
        control_plane: control_plane_of(SETTING, remote, policy)?,
        token: (&remote.token).into(),
        cluster_id: config.node.cluster_id.to_string(),
        headers: remote.headers.clone(),
        lifetime: config.secret_ttl,
        impersonation: Impersonation::No,
        deadline: CA_DEADLINE,
    });
    let failed = |source| RunError::ControlPlane {
        setting: SETTING,
        source,
    };
    Ok(Arc::new(client.map_err(failed)?))
}

fn xds_config(
    config: &Config,
    remote: &Remote,
    policy: &tls::Policy,
    gate: Gate,
    metrics: xds::Metrics,
) -> Result<xds::Config, RunError> {
    const SETTING: &str = "XDS_ADDRESS";
    let control_plane = control_plane_of(SETTING, remote, policy)?;
    // Once now, so that a bad address ends the start and not each connection.
    control_plane::channel(control_plane.clone()).map_err(|source| RunError::ControlPlane {
        setting: SETTING,
        source,
    })?;
    let node = &config.node;
    let mut metadata = vec![("clusterid".to_owned(), node.cluster_id.to_string())];
    metadata.extend(remote.headers.iter().cloned());
    let wildcard = |type_url| xds::Subscription {
        type_url,
        mode: xds::Mode::Wildcard,
    };
    Ok(xds::Config {
        connect: xds::connect_to(control_plane),
        token: remote.token.for_xds(),
        metadata,
        node: xds::Node {
            kind: xds::NodeKind::Waypoint,
            instance_ip: node.instance_ip.to_string(),
            pod_name: node.pod_name.to_string(),
            pod_namespace: node.namespace.to_string(),
            node_name: node.name.to_string(),
            metadata: node.metadata.clone(),
        },
        subscriptions: vec![
            wildcard(proto::ADDRESS_TYPE_URL),
            wildcard(proto::AUTHORIZATION_TYPE_URL),
            wildcard(proto::WAYPOINT_TYPE_URL),
        ],
        answer_deadline: XDS_ANSWER_DEADLINE,
        ready: Some(gate),
        metrics,
    })
}
