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
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, Instant},
};

use net::{
    netns::{Netns, NetnsError},
    ready::{Gate, Ready},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot, watch},
    task::JoinSet,
};

pub use config::{Cluster, Config, ConfigError, LeaveCluster, ParseProbeSourceError, Timing};

use crate::{
    apply::{ApplyError, MissingTool, Nft},
    enrol::{Shared, Standing},
    facts::{PodEvent, PodFacts},
    host, kubelet,
    rules::host::ProbeSource,
    telemetry::Telemetry,
    zds_server::{self, Refusal, Tunnels, chain},
};
use pods::Pods;

/// Tries of the node's rules, a second apart: at boot the kubelet's cgroup may come later than the agent.
const HOST_TRIES: usize = 20;
const HOST_PAUSE: Duration = Duration::from_secs(1);
/// How much longer than the longest leave of a pod the leave of a node may take.
const LEAVE_SLACK: Duration = Duration::from_secs(10);
/// How often it is looked at.
const LEAVE_LOOK: Duration = Duration::from_millis(100);
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

/// How the agent should end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The next agent takes over: enrolled pods stay enrolled.
    Stay,
    /// The mesh leaves the node: every pod is taken out of it, then the node's rules are removed.
    Leave,
}

/// A pod whose sandbox is being made, and who waits for it.
pub(crate) struct Admission {
    pub(crate) pod: PodFacts,
    /// How far the pod is; dropped where it cannot be followed.
    pub(crate) standing: oneshot::Sender<watch::Receiver<Standing>>,
}

/// Work beside the agent's own, for as long as it runs.
pub(crate) type Service = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What only some agents have.
pub(crate) struct Extras {
    pub(crate) telemetry: Telemetry,
    pub(crate) ready: Ready,
    pub(crate) admissions: mpsc::Receiver<Admission>,
    /// Work that begins when all pods are known.
    pub(crate) services: Vec<Service>,
}

impl Extras {
    fn none(config: &Config) -> Self {
        Extras {
            telemetry: Telemetry::new(&config.version),
            ready: Ready::new(),
            admissions: mpsc::channel(1).1,
            services: Vec::new(),
        }
    }
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
    let stay = async {
        stop.await;
        Ending::Stay
    };
    let extras = Extras::none(&config);
    run_with(config, source, sink, extras, stay).await
}

/// As [`run`], with what only some agents have.
pub(crate) async fn run_with<S: PodSource, K: EnrolmentSink>(
    config: Config,
    source: S,
    sink: K,
    extras: Extras,
    stop: impl Future<Output = Ending>,
) -> Result<(), RunError> {
    let gates = Gates::new(&extras.ready);
    let mut background = JoinSet::new();
    for &address in &config.admin {
        let listener = bind(address)
            .await
            .map_err(|source| RunError::Admin { address, source })?;
        let (ready, telemetry) = (extras.ready.clone(), extras.telemetry.clone());
        background.spawn(admin::serve(listener, ready, telemetry));
    }
    let mut stop = pin!(stop);
    let begun = begin(config, source, sink, extras, gates, &mut background);
    let mut agent = tokio::select! {
        begun = begun => begun?,
        _ = &mut stop => {
            tracing::info!("stopping before the pods were known; they stay as they are");
            return Ok(());
        }
    };
    let ending = tokio::select! {
        result = agent.follow() => return result,
        ending = &mut stop => ending,
    };
    if ending == Ending::Leave {
        return agent.leave().await;
    }
    tracing::info!("stopping; enrolled pods stay as they are");
    Ok(())
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
    tool: Gate,
    host: Gate,
    pods: Gate,
    zds: Gate,
}

impl Gates {
    fn new(ready: &Ready) -> Self {
        Gates {
            tool: ready.gate("the nft program"),
            host: ready.gate("the node's rules"),
            pods: ready.gate("the list of pods"),
            zds: ready.gate("the socket for node tunnels"),
        }
    }
}

/// An agent that has begun its work.
struct Agent<S, K> {
    source: S,
    pods: Pods<K>,
    refusals: mpsc::Receiver<Refusal>,
    admissions: mpsc::Receiver<Admission>,
    nft: Nft,
    host: Netns,
    /// How long leaving pods are waited for.
    patience: Duration,
}

async fn begin<S: PodSource, K: EnrolmentSink>(
    config: Config,
    mut source: S,
    sink: K,
    extras: Extras,
    gates: Gates,
    background: &mut JoinSet<()>,
) -> Result<Agent<S, K>, RunError> {
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
    let telemetry = extras.telemetry;
    let shared = Arc::new(Shared {
        nft: nft.clone(),
        host: host.clone(),
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
    for service in extras.services {
        background.spawn(service);
    }
    tracing::info!(socket = %config.zds_socket.display(), "ready for node tunnels");
    Ok(Agent {
        source,
        pods,
        refusals,
        admissions: extras.admissions,
        nft,
        host,
        patience: config.timing.leave_most + LEAVE_SLACK,
    })
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
        None => find_kubelet(config).ok_or(RunError::NoKubelet)?,
    };
    if let ProbeSource::Uid(uid) = source {
        tracing::warn!(
            uid,
            "probes are recognised by user: every process of that user on this node passes to pods"
        );
    }
    let installed = host::install(
        nft.in_cgroup_namespace(config.host_cgroups.clone()),
        Some(netns.clone()),
        &source,
        &config.policy.probes,
    )
    .await;
    installed.map_err(RunError::HostRules)
}

fn find_kubelet(config: &Config) -> Option<ProbeSource> {
    let find = || kubelet::find(&config.host_proc, CGROUPS.as_ref());
    let Some(path) = &config.host_cgroups else {
        return find();
    };
    kubelet::in_namespace(path, find).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "enter the node's cgroup namespace");
        find()
    })
}

impl<S: PodSource, K: EnrolmentSink> Agent<S, K> {
    /// Until the source of pods ends.
    async fn follow(&mut self) -> Result<(), RunError> {
        loop {
            self.step().await?;
        }
    }

    async fn step(&mut self) -> Result<(), RunError> {
        tokio::select! {
            event = self.source.next() => self.pods.take(event.ok_or(RunError::SourceEnded)?),
            Some(admission) = self.admissions.recv() => {
                if let Some(standing) = self.pods.admit(admission.pod) {
                    let _ = admission.standing.send(standing);
                }
            }
            Some(refusal) = self.refusals.recv() => self.pods.refused(&refusal),
            Some(uid) = self.pods.ended() => self.pods.forget(&uid),
        }
        Ok(())
    }

    /// Every pod leaves as one does whose label goes; then nothing of ours is left on the node.
    async fn leave(mut self) -> Result<(), RunError> {
        tracing::info!(pods = self.pods.remaining(), "the mesh leaves this node");
        self.pods.release();
        let give_up = Instant::now() + self.patience;
        while self.pods.remaining() > 0 && Instant::now() < give_up {
            let _ = tokio::time::timeout(LEAVE_LOOK, self.step()).await;
        }
        match self.pods.remaining() {
            0 => tracing::info!("all pods are out of the mesh"),
            pods => tracing::error!(pods, "pods are not out of the mesh in time; restart them"),
        }
        let removed = host::uninstall(&self.nft, Some(&self.host)).await;
        removed.map_err(RunError::HostRules)
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
