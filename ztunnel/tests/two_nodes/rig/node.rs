//! A node: its tunnel, and the agent that hands it its pod.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use net::{
    ca::Issuer,
    mesh_state::MeshState,
    testing::TestCa,
    zds::{AgentConnection, CallError, Listener, Request, WorkloadInfo},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
    task::JoinHandle,
};
use ztunnel::{Config, Tunnel};

use super::{network::Pod, soon};

pub(crate) struct Node {
    pub(crate) state: MeshState,
    /// Where metrics are.
    pub(crate) stats: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) readiness: SocketAddr,
    pub(crate) agent: Agent,
    stop: Option<oneshot::Sender<()>>,
    tunnel: JoinHandle<()>,
    process: Process,
}

/// The agent's end of ZDS.
pub(crate) struct Agent {
    connection: Option<AgentConnection>,
    listener: Listener,
    _folder: tempfile::TempDir,
}

/// A tunnel that has been started, and has no pods yet.
pub(crate) struct Begun {
    pub(crate) readiness: SocketAddr,
    pub(crate) listener: Listener,
    state: MeshState,
    stats: SocketAddr,
    admin: SocketAddr,
    folder: tempfile::TempDir,
    stop: oneshot::Sender<()>,
    tunnel: JoinHandle<()>,
    process: Process,
}

impl Begun {
    /// `state`: what it knows, or will.
    pub(crate) fn new(
        name: &'static str,
        issuer: Arc<dyn Issuer>,
        state: MeshState,
        more: &[(&str, &str)],
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("zds.sock");
        let listener = Listener::bind(&socket).expect("a ZDS socket");
        let [stats, admin, readiness] = own_addresses();
        let mut settings: HashMap<String, String> = [
            ("NODE_NAME", name.to_owned()),
            ("XDS_ADDRESS", String::new()),
            ("FAKE_CA", "true".to_owned()),
            ("INPOD_UDS", socket.display().to_string()),
            ("LEYLINE_STATS_ADDRESS", stats.to_string()),
            ("LEYLINE_ADMIN_ADDRESS", admin.to_string()),
            ("LEYLINE_READINESS_ADDRESS", readiness.to_string()),
        ]
        .map(|(name, text)| (name.to_owned(), text))
        .into();
        settings.extend(more.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let config = Config::from_lookup(&|name| settings.get(name).cloned()).expect("settings");
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let knows = state.clone();
        let tunnel = runtime.spawn(async move {
            let tunnel = Tunnel::new(config).with_issuer(issuer).with_state(knows);
            let stop = async { stopped.await.unwrap_or(()) };
            tunnel.run_until(stop).await.expect("the tunnel runs");
        });
        Self {
            readiness,
            listener,
            state,
            stats,
            admin,
            folder,
            stop,
            tunnel,
            process: Process(Some(runtime)),
        }
    }

    /// Enrols the pod: when this returns, the pod's listeners are open.
    pub(crate) async fn enrol(self, pod: &Pod) -> Node {
        let mut node = self.connected().await;
        node.agent.add(pod).await;
        node.agent.call(Request::SnapshotSent).await;
        node
    }

    /// With its agent, and no pods yet.
    pub(crate) async fn connected(self) -> Node {
        let incoming = soon(self.listener.accept())
            .await
            .expect("the tunnel connects");
        let connection = soon(AgentConnection::greet(incoming)).await.expect("Hello");
        let agent = Agent {
            connection: Some(connection),
            listener: self.listener,
            _folder: self.folder,
        };
        Node {
            state: self.state,
            stats: self.stats,
            admin: self.admin,
            readiness: self.readiness,
            agent,
            stop: Some(self.stop),
            tunnel: self.tunnel,
            process: self.process,
        }
    }
}

impl Node {
    /// Starts the tunnel, with more settings, and enrols the pod.
    pub(crate) async fn start_with(
        name: &'static str,
        ca: &Arc<TestCa>,
        pod: &Pod,
        more: &[(&str, &str)],
    ) -> Self {
        let begun = Begun::new(name, ca.clone(), MeshState::new(), more);
        begun.enrol(pod).await
    }

    /// Drains and ends the tunnel.
    pub(crate) async fn stop(mut self) {
        self.begin_stop();
        soon(&mut self.tunnel).await.expect("the tunnel ends");
    }

    /// Ends the tunnel with all that it holds; when this returns, nothing of it is left.
    pub(crate) async fn crash(&mut self) {
        if let Some(runtime) = self.process.0.take() {
            let ended =
                tokio::task::spawn_blocking(move || runtime.shutdown_timeout(super::DEADLINE));
            ended.await.expect("it ends");
        }
    }

    /// Begins the drain.
    pub(crate) fn begin_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }
}

/// The tunnel's own runtime. Dropping it kills the tunnel: every socket is closed where it stands, and nobody is told.
struct Process(Option<Runtime>);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Agent {
    pub(crate) async fn add(&mut self, pod: &Pod) {
        let added = self.try_add(pod).await;
        added.unwrap_or_else(|error| panic!("Add: {error:?}"));
    }

    /// The tunnel's own answer.
    pub(crate) async fn try_add(&mut self, pod: &Pod) -> Result<(), CallError> {
        let add = add_request(pod);
        soon(self.link().call(&add)).await
    }

    pub(crate) async fn call(&mut self, request: Request) {
        let called = soon(self.link().call(&request)).await;
        called.unwrap_or_else(|error| panic!("{request:?}: {error:?}"));
    }

    /// The connection to the tunnel.
    pub(crate) fn link(&mut self) -> &mut AgentConnection {
        self.connection.as_mut().expect("connected")
    }

    /// Hangs up, and takes the tunnel's next connection.
    pub(crate) async fn reconnected(&mut self) {
        self.connection = None;
        let incoming = soon(self.listener.accept()).await.expect("it comes back");
        let greeted = soon(AgentConnection::greet(incoming)).await;
        self.connection = Some(greeted.expect("Hello"));
    }
}

pub(crate) fn add_request(pod: &Pod) -> Request {
    Request::Add {
        uid: uid(pod),
        info: WorkloadInfo {
            name: pod.name.to_owned(),
            namespace: "ns".to_owned(),
            service_account: format!("sa-{}", pod.name),
        },
        netns: pod.netns.clone(),
    }
}

pub(crate) fn uid(pod: &Pod) -> String {
    format!("uid-{}", pod.name)
}

/// Of a loopback address that no other node of this process has, nor another process: a port that is merely free now may be
/// somebody's before the tunnel listens on it.
pub(crate) fn own_addresses() -> [SocketAddr; 3] {
    static NODES: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    let node = NODES.fetch_add(1, Ordering::Relaxed);
    let address = Ipv4Addr::new(127, high | 1, low, node);
    [15020, 15000, 15021].map(|port| SocketAddr::from((address, port)))
}
