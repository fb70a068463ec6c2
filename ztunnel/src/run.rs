//! The whole node tunnel put together: what it follows, what it serves, and how it ends.

use std::{future::Future, io, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use net::{
    admin,
    ca::{CaClient, CaConfig, Certificates, CertificatesConfig, Impersonation, Issuer},
    clock::SystemClock,
    dns::{ResolvConf, Resolver},
    drain, hbone,
    lanes::Lanes,
    log,
    mesh_state::MeshState,
    metrics, process,
    ready::{self, Ready},
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
    runtime::Handle,
    sync::{Notify, Semaphore},
    task::{JoinHandle, JoinSet},
};

use crate::{
    application::{OriginalSourceError, check_original_source},
    config::{Config, HBONE_PORT, LocalState, Mode, OriginalSource, Remote},
    dump,
    identities::Identities,
    local_state::{self, Loaded, LocalStateError},
    metrics::Metrics,
    neighbours::Neighbours,
    pod::{Node, Pod},
    pods::{Dedicated, Leaving, Published, Running, follow_agent},
};

/// The setting that names the CA.
const CA_ADDRESS: &str = "CA_ADDRESS";
/// A CA request is given up after this time.
const CA_DEADLINE: Duration = Duration::from_secs(10);
/// A control plane that accepts a stream and says nothing is left for another try after this time.
const XDS_ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Why the node tunnel does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A listener in our own namespace cannot be opened.
    #[error("open the {name} listener")]
    Listen {
        /// Which.
        name: &'static str,
        /// Why.
        source: SocketError,
    },
    /// What is asked for takes a right that we do not have.
    #[error(transparent)]
    OriginalSource(#[from] OriginalSourceError),
    /// The control plane's address makes no sense.
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
    /// The local mesh state cannot be used.
    #[error("local mesh state")]
    LocalState(#[from] LocalStateError),
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

/// Runs the node tunnel on the current runtime until SIGTERM, SIGINT or `POST /quitquitquit`, then drains.
///
/// # Errors
/// [`RunError`], before anything is served.
pub async fn run(config: Config) -> Result<(), RunError> {
    run_on(config, Lanes::here(), None).await
}

/// The same, with the data plane on runtimes of its own.
pub(crate) async fn run_on(
    config: Config,
    lanes: Lanes,
    logs: Option<log::Handle>,
) -> Result<(), RunError> {
    let stop = process::told_to_end().map_err(RunError::Signals)?;
    let tunnel = Tunnel {
        lanes,
        logs,
        ..Tunnel::new(config)
    };
    tunnel.run_until(stop).await
}

/// A node tunnel to be run, with what its caller may bring in place of what [`Config`] names.
pub struct Tunnel {
    config: Config,
    lanes: Lanes,
    logs: Option<log::Handle>,
    state: MeshState,
    issuer: Option<Arc<dyn Issuer>>,
}

impl Tunnel {
    /// A node tunnel on the current runtime.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            lanes: Lanes::here(),
            logs: None,
            state: MeshState::new(),
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

    /// Reads mesh state that somebody else may also write.
    pub fn with_state(self, state: MeshState) -> Self {
        Self { state, ..self }
    }

    /// Runs until `stop` resolves or `POST /quitquitquit` is received, then drains.
    ///
    /// # Errors
    /// [`RunError`], before anything is served.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), RunError> {
        tracing::info!(
            version = net::version::line("ztunnel"),
            node = self.config.node.name.as_deref(),
            network = &*self.config.node.network,
            "ztunnel starts"
        );
        let mut running = self.start()?;
        tokio::select! {
            () = stop => {}
            () = running.quit.notified() => tracing::info!("told to quit: draining"),
        }
        running.drain().await;
        Ok(())
    }

    fn start(self) -> Result<Started, RunError> {
        check_original_source(self.config.inpod.original_source, &Factory::default())?;
        let ready = Ready::new();
        let (services, of_services) = drain::channel();
        let (pods_drain, of_pods) = drain::channel();
        let published: Arc<ArcSwap<Published>> = Arc::default();
        let mut registry = Registry::default();
        let counting = published.clone();
        let metrics = Metrics::register(
            &mut registry,
            &self.config.node.istio_version,
            Arc::new(move || count_bytes(&counting.load())),
        );
        metrics::register_process(&mut registry, self.lanes.handles().cloned().collect());
        let listeners = OwnListeners::open(&self.config, self.lanes.home())?;
        let own = listeners.hbone;
        let mut tasks = JoinSet::new();
        let followed = self.follow_state(&mut registry, &ready, &of_services, &mut tasks)?;
        let config = Arc::new(self.config);
        let policy = tls_policy(&config);
        let issuer = match (self.issuer, &config.ca) {
            (Some(issuer), _) => issuer,
            (None, Some(remote)) => ca_client(remote, &config, &policy)?,
            (None, None) => return Err(RunError::NoIssuer),
        };
        // The data plane's runtime owns the tasks of certificates: a busy control plane must not delay them.
        let _in_data = self.lanes.home().enter();
        let issuer = metrics.counted(issuer);
        let certificates =
            Certificates::new(issuer, Arc::new(SystemClock), CertificatesConfig::default());
        metrics::register_certificates(&mut registry, certificates.clone());
        let revocations = policy.revocations().clone();
        if let Some(path) = &config.tls.revocations {
            let known = revocation_file::load(path, &revocations)?;
            tasks.spawn(revocation_file::follow(
                path.clone(),
                known,
                revocations.clone(),
            ));
        }
        Metrics::revocations(&mut registry, &revocations);
        let node = make_node(
            config.clone(),
            self.state,
            certificates,
            metrics,
            revocations,
            self.lanes.clone(),
        );
        if let Some(path) = config.ca.as_ref().and_then(Remote::root_file) {
            tasks.spawn(node.certificates.clone().follow_root(path.to_owned()));
        }
        let own = own.map(|listener| serve_ourselves(&node, listener));
        let agent = serve_pods(&node, &ready, published.clone(), of_pods)?;
        let readiness = ready::serve(listeners.readiness, ready, of_services.clone());
        self.lanes.home().spawn(readiness);
        let stats = metrics::serve(listeners.stats, Arc::new(registry), of_services.clone());
        tasks.spawn(stats);
        let quit = Arc::new(Notify::new());
        let endpoint = dump::endpoint(&node, published, self.logs, quit.clone(), followed);
        tasks.spawn(admin::serve(listeners.admin, endpoint, of_services));
        Ok(Started {
            deadline: config.drain_deadline,
            services,
            pods_drain,
            agent,
            own,
            quit,
            _tasks: tasks,
        })
    }

    /// Starts following the control plane and the local file; answers what the latter says, for dumps.
    fn follow_state(
        &self,
        registry: &mut Registry,
        ready: &Ready,
        drain: &drain::Watch,
        tasks: &mut JoinSet<()>,
    ) -> Result<local_state::Current, RunError> {
        let gate = ready.gate("state manager");
        let current = local_state::Current::new(ArcSwap::from_pointee(local_state::nothing()));
        if self.config.xds.is_some() {
            self.state.withhold();
        }
        if let Some(local) = &self.config.local_state {
            let Loaded { file, json } = local_state::load(local)?;
            current.store(Arc::new(json));
            self.state.publish(file.clone().into_update());
            if let LocalState::File(path) = local {
                let (path, state, current) = (path.clone(), self.state.clone(), current.clone());
                tasks.spawn(local_state::follow(path, state, file, current));
            }
        }
        let Some(remote) = &self.config.xds else {
            gate.open();
            return Ok(current);
        };
        let metrics = xds::Metrics::register(registry);
        let config = xds_config(&self.config, remote, gate, metrics)?;
        let (client, demand) = xds::Client::new(config, self.state.handler());
        if self.config.xds_on_demand {
            self.state.fetch_through(demand);
        }
        tasks.spawn(client.run(drain.clone()));
        Ok(current)
    }
}

/// A running node tunnel.
struct Started {
    deadline: Duration,
    services: drain::Trigger,
    pods_drain: drain::Trigger,
    agent: JoinHandle<Leaving>,
    own: Option<Running>,
    quit: Arc<Notify>,
    /// Admin, metrics, xDS: end with us.
    _tasks: JoinSet<()>,
}

impl Started {
    /// Closes listeners at once, lets connections end until the deadline, then ends what is left.
    async fn drain(&mut self) {
        let mode = drain::Mode::graceful(self.deadline);
        self.pods_drain.start(mode);
        let mut draining = JoinSet::new();
        match (&mut self.agent).await {
            Ok(leaving) => drop(draining.spawn(leaving.drain(mode))),
            Err(error) => tracing::error!(%error, "the agent's task failed"),
        }
        if let Some(own) = self.own.take() {
            draining.spawn(own.drain(mode));
        }
        while draining.join_next().await.is_some() {}
        tracing::info!("drained");
        self.services.start(drain::Mode::Immediate);
    }
}

/// The pods that the agent names, or the one workload that we are for.
fn serve_pods(
    node: &Arc<Node>,
    ready: &Ready,
    published: Arc<ArcSwap<Published>>,
    drain: drain::Watch,
) -> Result<JoinHandle<Leaving>, RunError> {
    let data = node.lanes.home();
    match &node.config.mode {
        Mode::Shared => {
            let gate = ready.gate("workload proxy manager");
            Ok(data.spawn(follow_agent(node.clone(), gate, published, drain)))
        }
        Mode::Dedicated(workload) => {
            let sockets = Factory {
                mark: node.config.inpod.mark,
                ..own_sockets(&node.config)
            };
            let gates = ["proxy", "dns proxy"].map(|name| ready.gate(name));
            let started = Dedicated::start(node, workload.clone(), sockets);
            let started = started.map_err(|source| RunError::Listen {
                name: "workload's",
                source,
            })?;
            for gate in gates {
                gate.open();
            }
            Ok(data.spawn(started.run(published, drain)))
        }
    }
}

fn count_bytes(published: &Published) {
    for pod in &published.up {
        for registry in [&pod.inbound, &pod.outbound] {
            for (_, live) in registry.open() {
                live.count_bytes();
            }
        }
    }
}

/// The listeners of our own namespace.
struct OwnListeners {
    admin: Vec<TcpListener>,
    stats: TcpListener,
    readiness: TcpListener,
    /// For ourselves as a workload.
    hbone: Option<TcpListener>,
}

impl OwnListeners {
    fn open(config: &Config, data: &Handle) -> Result<Self, RunError> {
        let sockets = own_sockets(config);
        let named = |name| move |source| RunError::Listen { name, source };
        let admin = config.listen.admin.iter();
        let admin = admin
            .map(|address| sockets.listen(*address))
            .collect::<Result<_, _>>()
            .map_err(named("admin"))?;
        let stats = sockets.listen(config.listen.stats);
        let stats = stats.map_err(named("metrics"))?;
        let _in_data = data.enter();
        let readiness = sockets.listen(config.listen.readiness);
        let readiness = readiness.map_err(named("readiness"))?;
        let hbone = match config.node.own_workload() {
            Some(_) if config.proxy_enabled && config.mode == Mode::Shared => {
                let opened = sockets.listen_any(HBONE_PORT);
                Some(opened.map_err(named("own HBONE"))?)
            }
            _ => None,
        };
        Ok(Self {
            admin,
            stats,
            readiness,
            hbone,
        })
    }
}

/// Unmarked: nothing is redirected in our own namespace.
fn own_sockets(config: &Config) -> Factory {
    Factory {
        ipv6: config.inpod.ipv6,
        keepalive: config.keepalive(),
        ..Factory::default()
    }
}

pub(crate) fn make_node(
    config: Arc<Config>,
    state: MeshState,
    certificates: Certificates,
    metrics: Metrics,
    revocations: Revocations,
    lanes: Lanes,
) -> Arc<Node> {
    let upstreams = ResolvConf::new(config.dns.resolv_conf.clone(), config.inpod.ipv6);
    let upstreams = Arc::new(upstreams);
    Arc::new(Node {
        resolver: Resolver::new(own_sockets(&config), upstreams.clone(), config.inpod.ipv6),
        identities: Identities::new(certificates.clone()),
        http2: hbone::Config::sized(&config.http2.sizes),
        max_pod_connections: max_pod_connections(&config),
        lanes,
        config,
        state,
        certificates,
        metrics,
        revocations,
        neighbours: Neighbours::default(),
        upstreams,
    })
}

/// No pod takes more than half of what there is room for.
fn max_pod_connections(config: &Config) -> usize {
    config
        .max_pod_connections
        .unwrap_or_else(|| (process::most_connections() / 2).clamp(1, Semaphore::MAX_PERMITS))
}

/// Our own metrics and readiness over HBONE, with policy.
fn serve_ourselves(node: &Arc<Node>, listener: TcpListener) -> Running {
    let binding = node.config.node.own_workload();
    let binding = binding.expect("the listener was opened for our own workload");
    let sockets = own_sockets(&node.config);
    let never = OriginalSource::Never;
    let pod = Pod::new(node.clone(), "self".into(), binding, sockets, never);
    Running::start_self(pod, listener)
}

fn tls_policy(config: &Config) -> tls::Policy {
    let versions = match config.tls.tls12 {
        true => tls::Versions::Tls12And13,
        false => tls::Versions::Tls13,
    };
    let key_exchange = match config.tls.post_quantum_only {
        true => tls::KeyExchange::PostQuantum,
        false => tls::KeyExchange::Default,
    };
    let policy = tls::Policy::new(versions, key_exchange, Arc::new(SystemClock));
    policy.with_domain_names(config.tls.domain_names.iter().cloned())
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
    let client = CaClient::new(ca_config(remote, config, policy)?);
    let failed = |source| RunError::ControlPlane {
        setting: CA_ADDRESS,
        source,
    };
    Ok(Arc::new(client.map_err(failed)?))
}

fn ca_config(remote: &Remote, config: &Config, policy: &tls::Policy) -> Result<CaConfig, RunError> {
    Ok(CaConfig {
        control_plane: control_plane_of(CA_ADDRESS, remote, policy)?,
        token: (&remote.token).into(),
        cluster_id: config.node.cluster_id.to_string(),
        headers: remote.headers.clone(),
        lifetime: config.secret_ttl,
        impersonation: match config.mode {
            Mode::Shared => Impersonation::Workloads,
            Mode::Dedicated(_) => Impersonation::No,
        },
        deadline: CA_DEADLINE,
    })
}

fn xds_config(
    config: &Config,
    remote: &Remote,
    gate: ready::Gate,
    metrics: xds::Metrics,
) -> Result<xds::Config, RunError> {
    const SETTING: &str = "XDS_ADDRESS";
    let control_plane = control_plane_of(SETTING, remote, &tls_policy(config))?;
    // Once now, so that a bad address ends the start and not each connection.
    control_plane::channel(control_plane.clone()).map_err(|source| RunError::ControlPlane {
        setting: SETTING,
        source,
    })?;
    let node = &config.node;
    let addresses = match config.xds_on_demand {
        true => xds::Mode::OnDemand,
        false => xds::Mode::Wildcard,
    };
    let mut metadata = vec![("clusterid".to_owned(), node.cluster_id.to_string())];
    metadata.extend(remote.headers.iter().cloned());
    Ok(xds::Config {
        connect: Arc::new(move || Ok(control_plane::channel(control_plane.clone())?)),
        token: remote.token.for_xds(),
        metadata,
        node: xds::Node {
            kind: xds::NodeKind::Ztunnel,
            instance_ip: node.instance_ip.to_string(),
            pod_name: node.pod_name.to_string(),
            pod_namespace: node.pod_namespace.to_string(),
            node_name: node.name.as_deref().unwrap_or_default().to_owned(),
            metadata: node.metadata.clone(),
        },
        subscriptions: vec![
            xds::Subscription {
                type_url: proto::ADDRESS_TYPE_URL,
                mode: addresses,
            },
            xds::Subscription {
                type_url: proto::AUTHORIZATION_TYPE_URL,
                mode: xds::Mode::Wildcard,
            },
        ],
        answer_deadline: XDS_ANSWER_DEADLINE,
        ready: Some(gate),
        metrics,
    })
}

#[cfg(test)]
mod tests {
    use net::{
        ca::Token,
        report::Chain,
        testing::{
            TestCa, reckless_classic_client, reckless_client, tcp_pair, without_network_rights,
        },
    };

    use super::*;
    use crate::fixture;

    fn config(settings: &[(&str, &str)]) -> Config {
        let always = [
            ("XDS_ADDRESS", "http://cp.mesh:15010"),
            ("CA_ADDRESS", "http://ca.mesh:15010"),
            ("CLUSTER_ID", "c-1"),
            ("AUTH_TOKEN", "hunter2"),
        ];
        fixture::config(&[&always, settings].concat())
    }

    fn asked_of_the_ca(settings: &[(&str, &str)]) -> CaConfig {
        let config = config(settings);
        let remote = config.ca.as_ref().expect("there is one");
        ca_config(remote, &config, &tls::Policy::default()).expect("good")
    }

    #[test]
    fn the_ca_is_asked_as_the_settings_say() {
        let asked = asked_of_the_ca(&[("SECRET_TTL", "1h"), ("ALT_CA_HOSTNAME", "other.mesh")]);
        assert_eq!(asked.control_plane.address, "http://ca.mesh:15010");
        assert_eq!(asked.control_plane.hostname.as_deref(), Some("other.mesh"));
        assert!(asked.token == Token::Text("hunter2".to_owned()));
        assert_eq!(asked.cluster_id, "c-1");
        assert_eq!(asked.lifetime, Duration::from_secs(3600));
        assert_eq!(asked.impersonation, Impersonation::Workloads);
        let of_one = [
            ("PROXY_MODE", "dedicated"),
            ("PROXY_WORKLOAD_INFO", "shop/web-1/web"),
        ];
        let asked = asked_of_the_ca(&of_one);
        assert_eq!(asked.impersonation, Impersonation::No, "for itself");
    }

    fn asked_of_the_control_plane(config: &mut Config) -> xds::Config {
        let mut remote = config.xds.take().expect("there is one");
        remote.headers = vec![("x-tenant".to_owned(), "one".to_owned())];
        let metrics = xds::Metrics::register(&mut Registry::default());
        let gate = Ready::new().gate("state manager");
        xds_config(config, &remote, gate, metrics).expect("good")
    }

    #[tokio::test]
    async fn the_control_plane_is_told_who_asks_as_the_settings_say() {
        let named = [
            ("INSTANCE_IP", "10.0.0.9"),
            ("POD_NAME", "zt-1"),
            ("POD_NAMESPACE", "mesh"),
            ("NODE_NAME", "node-1"),
            ("ISTIO_META_DNS_CAPTURE", "true"),
        ];
        let asked = asked_of_the_control_plane(&mut config(&named));
        let id = "ztunnel~10.0.0.9~zt-1.mesh~mesh.svc.cluster.local";
        assert_eq!(asked.node.id(), id);
        assert_eq!(asked.node.node_name, "node-1");
        assert_eq!(asked.node.metadata["DNS_CAPTURE"], "true");
        assert!(asked.token == Some(xds::Token::Static("hunter2".to_owned())));
        let metadata = [("clusterid", "c-1"), ("x-tenant", "one")];
        let metadata = metadata.map(|(name, text)| (name.to_owned(), text.to_owned()));
        assert_eq!(asked.metadata, metadata);
    }

    #[tokio::test]
    async fn addresses_come_all_or_on_demand_and_policies_always_all_and_after_them() {
        for (setting, mode) in [
            ("false", xds::Mode::Wildcard),
            ("true", xds::Mode::OnDemand),
        ] {
            let mut config = config(&[("XDS_ON_DEMAND", setting)]);
            let asked = asked_of_the_control_plane(&mut config).subscriptions;
            let asked: Vec<_> = asked.iter().map(|it| (it.type_url, it.mode)).collect();
            let expected = [
                ("type.googleapis.com/istio.workload.Address", mode),
                (
                    "type.googleapis.com/istio.security.Authorization",
                    xds::Mode::Wildcard,
                ),
            ];
            assert_eq!(asked, expected);
        }
    }

    #[tokio::test]
    async fn sockets_and_tunnels_of_pods_are_as_the_settings_say() {
        let node = fixture::node_with(&[
            ("PACKET_MARK", "7"),
            ("INPOD_PORT_REUSE", "false"),
            ("IPV6_ENABLED", "false"),
            ("KEEPALIVE_TIME", "1m"),
            ("HTTP2_STREAM_WINDOW_SIZE", "70000"),
            ("HTTP2_CONNECTION_WINDOW_SIZE", "80000"),
            ("HTTP2_FRAME_SIZE", "20000"),
            ("LEYLINE_MAX_POD_CONNECTIONS", "9"),
        ]);
        let http2 = &node.http2;
        let sizes = [
            http2.stream_window_bytes,
            http2.connection_window_bytes,
            http2.max_connection_window_bytes,
            http2.frame_bytes,
        ];
        assert_eq!(sizes, [70_000, 80_000, 80_000, 20_000]);
        assert_eq!(node.max_pod_connections, 9);
        let here = net::netns::Netns::current().expect("there is one");
        let sockets = node.pod_sockets(here);
        assert_eq!(sockets.mark, Some(7));
        assert!(!sockets.reuse_port && !sockets.ipv6);
        let time = sockets.keepalive.expect("on").time;
        assert_eq!(time, Duration::from_secs(60));
    }

    #[tokio::test]
    async fn who_may_not_show_clients_addresses_and_has_to_does_not_start() {
        let tunnel = Tunnel::new(config(&[("ENABLE_ORIG_SRC", "true")]));
        let here = Handle::current();
        let started = without_network_rights(|| {
            let _here = here.enter();
            tunnel.start().map(|_| ())
        });
        let told = Chain(&started.expect_err("no right to")).to_string();
        for part in ["ENABLE_ORIG_SRC is true", "CAP_NET_ADMIN", "IP_TRANSPARENT"] {
            assert!(told.contains(part), "{part} is not in {told}");
        }
    }

    #[test]
    fn the_right_to_show_clients_addresses_is_asked_for_where_it_is_needed() {
        use OriginalSource::{BestEffort, Never, Required};
        let sockets = Factory::default();
        let may = |asked| check_original_source(asked, &sockets).is_ok();
        let without = without_network_rights(|| [Required, BestEffort, Never].map(may));
        assert_eq!(without, [false, true, true]);
    }

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_classic_key_exchange_is_refused_where_the_settings_say_so() {
        for (settings, taken) in [(&[][..], true), (&[("COMPLIANCE_POLICY", "pqc")], false)] {
            let ca = TestCa::new("cluster.local", &tls_policy(&config(settings)));
            let server = ca.certificate(&ca.identity("a", "server"));
            let client = ca.sign(&ca.leaf(&ca.identity("a", "client")));
            let client = reckless_classic_client(Some(client), &[b"h2"]);
            let (near, far) = tcp_pair().await;
            let (_client, served) = tokio::join!(
                tls::connect(near, client, SOON),
                tls::accept(far, server.server_config(), SOON)
            );
            assert_eq!(served.is_ok(), taken, "{settings:?}");
        }
    }

    #[tokio::test]
    async fn a_client_of_the_domains_other_name_is_taken_where_the_settings_say_so() {
        let renamed = ("TRUST_DOMAIN", "new.example");
        let alias = ("LEYLINE_TRUST_DOMAIN_ALIASES", "old.example");
        for (settings, taken) in [(&[renamed][..], false), (&[renamed, alias], true)] {
            let policy = tls_policy(&config(settings));
            let ca = TestCa::new("new.example", &policy);
            let server = ca.certificate(&ca.identity("a", "server"));
            let mut old = ca.identity("a", "client");
            old.trust_domain = "old.example".parse().expect("a domain");
            let client = reckless_client(Some(ca.sign(&ca.leaf(&old))), &[b"h2"]);
            let (near, far) = tcp_pair().await;
            let (_client, served) = tokio::join!(
                tls::connect(near, client, SOON),
                tls::accept(far, server.server_config(), SOON)
            );
            assert_eq!(served.is_ok(), taken, "{settings:?}");
        }
    }

    #[test]
    fn an_older_version_of_tls_is_spoken_only_where_the_settings_say_so() {
        for (setting, spoken) in [("false", false), ("true", true)] {
            let policy = tls_policy(&config(&[("TLS12_ENABLED", setting)]));
            let told = format!("{policy:?}");
            assert!(told.contains("TLSv1_3"), "{told}");
            assert_eq!(told.contains("TLSv1_2"), spoken, "{told}");
        }
    }
}
