//! The node agent: facts about pods in, enrolment out.
//!
//! Start: the program `nft` is found, the node's rules are written, all pods of the node are read and each takes up
//! where an earlier agent left it; only then may tunnels connect, so that their first snapshot is complete. Nothing
//! that an enrolled pod depends on is touched by a restart, and nothing is undone when the agent stops.

mod admin;
mod config;
mod pods;

use std::{
    fmt,
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use net::{
    netns::{Netns, NetnsError},
    ready::{Gate, Ready},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

pub use config::{Cluster, Config, ConfigError, ParseProbeSourceError, Timing};

use crate::{
    apply::{ApplyError, MissingTool, Nft},
    enrol::Shared,
    facts::PodEvent,
    host, kubelet,
    rules::host::ProbeSource,
    telemetry::Telemetry,
    zds_server::{self, Refusal, Tunnels, chain},
};
use pods::Pods;

/// Tries of the node's rules, a second apart: at boot the kubelet's cgroup may come later than the agent.
const HOST_TRIES: usize = 20;
const HOST_PAUSE: Duration = Duration::from_secs(1);
/// Where `nft` looks cgroups up.
const CGROUPS: &str = "/sys/fs/cgroup";
/// How many `nft` processes may run in pods' namespaces at once.
const WRITERS: usize = 8;

/// Where facts about this node's pods come from. The first event is a [`PodEvent::Snapshot`].
pub trait PodSource: Send + 'static {
    /// The next event; `None` when there will be none any more. Must be cancel-safe.
    fn next(&mut self) -> impl Future<Output = Option<PodEvent>> + Send;
}

/// How far a pod's enrolment is, as told outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// Rules in place, tunnel ready, probes pass: peers may speak HBONE to it.
    Enabled,
    /// Not yet, or not any more: the reason says what is missing.
    Pending {
        /// For people.
        reason: String,
    },
    /// Not in the mesh.
    None,
}

/// A pod as the outside names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// Kubernetes uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Where enrolment is told: the pod's annotation, or a file.
pub trait EnrolmentSink: Send + Sync + 'static {
    /// Tells it. Setting the same twice must be harmless; an error is retried.
    fn set(
        &self,
        pod: &PodRef,
        enrolment: &Enrolment,
    ) -> impl Future<Output = Result<(), SinkError>> + Send;
}

/// Telling a pod's enrolment failed.
#[derive(Debug, thiserror::Error)]
#[error("tell the enrolment of {pod}")]
pub struct SinkError {
    /// The pod.
    pub pod: PodRef,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Why the agent cannot work.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A program is missing.
    #[error(transparent)]
    Tool(#[from] MissingTool),
    /// The node's namespace cannot be opened.
    #[error("open the node's network namespace")]
    HostNetns(#[source] NetnsError),
    /// Nobody's probes to let pass.
    #[error(
        "no kubelet is running, and LEYLINE_PROBE_SOURCE does not say how probes are recognised"
    )]
    NoKubelet,
    /// The node's rules cannot be written.
    #[error("write the node's rules")]
    HostRules(#[source] ApplyError),
    /// The socket for tunnels cannot be had.
    #[error("serve node tunnels")]
    Listen(#[source] io::Error),
    /// The address for health and metrics cannot be had.
    #[error("listen for health and metrics at {address}")]
    Admin {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Facts about pods stopped coming.
    #[error("the source of pods ended")]
    SourceEnded,
}

/// Runs the agent until `stop`. Enrolled pods stay enrolled when it stops.
///
/// Needs CAP_NET_ADMIN and CAP_SYS_ADMIN in the user namespace that owns the node's and the pods' namespaces.
///
/// # Errors
/// [`RunError`].
pub async fn run<S: PodSource, K: EnrolmentSink>(
    config: Config,
    source: S,
    sink: K,
    stop: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let telemetry = Telemetry::new();
    let gates = Gates::new();
    let mut background = JoinSet::new();
    for &address in &config.admin {
        let listener = bind(address)
            .await
            .map_err(|source| RunError::Admin { address, source })?;
        background.spawn(admin::serve(
            listener,
            gates.ready.clone(),
            telemetry.clone(),
        ));
    }
    tokio::select! {
        result = work(config, source, sink, telemetry, gates, &mut background) => result,
        () = stop => {
            tracing::info!("stopping; enrolled pods stay as they are");
            Ok(())
        }
    }
}

/// A host without IPv6 has no wildcard of both families.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED => {
            let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
            TcpListener::bind(v4).await.map_err(|_| error)
        }
        result => result,
    }
}

struct Gates {
    ready: Ready,
    tool: Gate,
    host: Gate,
    pods: Gate,
    zds: Gate,
}

impl Gates {
    fn new() -> Self {
        let ready = Ready::new();
        Gates {
            tool: ready.gate("the nft program"),
            host: ready.gate("the node's rules"),
            pods: ready.gate("the list of pods"),
            zds: ready.gate("the socket for node tunnels"),
            ready,
        }
    }
}

async fn work<S: PodSource, K: EnrolmentSink>(
    config: Config,
    mut source: S,
    sink: K,
    telemetry: Telemetry,
    gates: Gates,
    background: &mut JoinSet<()>,
) -> Result<(), RunError> {
    // A descriptor for each pod, and some for each run of nft.
    if let Err(error) = net::socket::raise_open_files_limit() {
        tracing::warn!(%error, "raise the limit of open files");
    }
    let nft = Nft::find()?;
    gates.tool.open();
    let host_netns = match &config.host_netns {
        Some(path) => Netns::open(path),
        None => Netns::current(),
    };
    let host = host_netns.map_err(RunError::HostNetns)?;
    let probes = install_host(&config, &nft, &host, background).await?;
    gates.host.open();
    let (tunnels, refusals) = zds_server::tunnels();
    let shared = Arc::new(Shared {
        nft,
        host,
        tunnels: tunnels.clone(),
        probes: probes.clone(),
        sink,
        timing: config.timing,
        writers: Semaphore::new(WRITERS),
        telemetry: telemetry.clone(),
    });
    let mut pods = Pods::new(config.policy.clone(), shared);
    let first = source.next().await.ok_or(RunError::SourceEnded)?;
    pods.adopt(first).await;
    probes.keep_only(pods.uids()).await;
    gates.pods.open();
    let server = tunnels
        .listen(&config.zds_socket)
        .map_err(RunError::Listen)?;
    background.spawn(server.run());
    background.spawn(count_tunnels(tunnels, telemetry));
    gates.zds.open();
    tracing::info!(socket = %config.zds_socket.display(), "ready for node tunnels");
    follow(source, refusals, pods).await
}

async fn install_host(
    config: &Config,
    nft: &Nft,
    netns: &Netns,
    background: &mut JoinSet<()>,
) -> Result<host::ProbeSets, RunError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match try_install_host(config, nft, netns).await {
            Ok((probes, keeper)) => {
                background.spawn(keeper.run());
                return Ok(probes);
            }
            Err(error) if tries == HOST_TRIES => return Err(error),
            Err(error) => tracing::warn!(error = chain(&error), "will be retried"),
        }
        tokio::time::sleep(HOST_PAUSE).await;
    }
}

async fn try_install_host(
    config: &Config,
    nft: &Nft,
    netns: &Netns,
) -> Result<(host::ProbeSets, host::Keeper), RunError> {
    let source = match &config.probe_source {
        Some(source) => source.clone(),
        None => kubelet::find(&config.host_proc, CGROUPS.as_ref()).ok_or(RunError::NoKubelet)?,
    };
    if let ProbeSource::Uid(uid) = source {
        tracing::warn!(
            uid,
            "probes are recognised by user: every process of that user on this node passes to pods"
        );
    }
    let installed = host::install(
        nft.clone(),
        Some(netns.clone()),
        &source,
        &config.policy.probes,
    )
    .await;
    installed.map_err(RunError::HostRules)
}

async fn follow<S: PodSource, K: EnrolmentSink>(
    mut source: S,
    mut refusals: mpsc::Receiver<Refusal>,
    mut pods: Pods<K>,
) -> Result<(), RunError> {
    loop {
        tokio::select! {
            event = source.next() => pods.take(event.ok_or(RunError::SourceEnded)?),
            Some(refusal) = refusals.recv() => pods.refused(&refusal),
            Some(uid) = pods.ended() => pods.forget(&uid),
        }
    }
}

async fn count_tunnels(tunnels: Tunnels, telemetry: Telemetry) {
    let mut connected = tunnels.connected();
    loop {
        let now = *connected.borrow_and_update();
        telemetry.tunnels(now);
        if connected.changed().await.is_err() {
            return;
        }
    }
}
