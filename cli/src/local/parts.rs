//! The mesh's own processes: one control plane, and a tunnel and an agent on every node. Each is started again when it
//! ends, and can be stopped on purpose to see what the rest does.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
};

use super::{
    address, http,
    logs::Log,
    netns::Netns,
    probe,
    process::{Running, stopped},
    runtime::Runtime,
    shim::{self, Task, World},
};

/// Name of the control plane among the parts.
pub const CONTROL_PLANE: &str = "controlplane";
/// Where the control plane serves xDS and certificates.
pub(super) const XDS_PORT: u16 = 15012;
/// Where the control plane answers people and programs.
const CONTROL_ADMIN_PORT: u16 = 15014;
/// Where a tunnel says whether it is ready.
const TUNNEL_READY_PORT: u16 = 15021;
/// Where a tunnel's metrics are.
const TUNNEL_METRICS_PORT: u16 = 15020;
/// Where a tunnel answers people.
const TUNNEL_ADMIN_PORT: u16 = 15000;
/// Where an agent says whether it is ready.
const AGENT_PORT: u16 = 8000;
/// Among which all of these are: no connection gets one of them for its own end, or a part that starts would find it taken.
pub(super) const PORTS: [RangeInclusive<u16>; 2] = [AGENT_PORT..=AGENT_PORT, 15000..=15099];

/// Tells an agent where to listen for its tunnel.
pub(super) const ZDS_SOCKET_VARIABLE: &str = "ZTUNNEL_UDS_ADDRESS";

/// Name of a node's tunnel among the parts.
pub fn tunnel(node: &str) -> String {
    format!("ztunnel-{node}")
}

/// Name of a node's agent among the parts.
pub fn agent(node: &str) -> String {
    format!("cni-agent-{node}")
}

/// What a part is and how it is looked after.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// How it is started.
    pub task: Task,
    /// A runtime in its namespace.
    pub netns: Handle,
    /// Where it says whether it is ready.
    pub ready: (SocketAddr, &'static str),
    /// Its other endpoints, by the port's name.
    pub admin: BTreeMap<&'static str, SocketAddr>,
}

/// What a part does now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartState {
    /// It runs.
    pub running: bool,
    /// It says that it is ready.
    pub ready: bool,
    /// Stopped on purpose.
    pub held: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// Why it is not ready.
    pub reason: Option<String>,
    /// Process id inside the mesh, through which it can be entered.
    pub pid: Option<i32>,
}

/// What can be done to a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// End it at once, as a crash would; it is started again.
    Kill,
    /// End it at once and leave it down.
    Hold,
    /// Ask it to end, if it runs, and start it.
    Restart,
}

/// A part as the supervisor holds it.
#[derive(Debug)]
pub struct PartHandle {
    /// What it is.
    pub part: Part,
    actions: mpsc::UnboundedSender<Action>,
    state: Arc<Mutex<PartState>>,
    stop: watch::Sender<bool>,
    ended: watch::Receiver<bool>,
}

impl PartHandle {
    /// Starts looking after a part.
    pub fn start(part: Part, log: Log) -> Self {
        let (actions, asked) = mpsc::unbounded_channel();
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = watch::channel(false);
        let state = Arc::<Mutex<PartState>>::default();
        let keeper = Keeper {
            part: part.clone(),
            log,
            state: state.clone(),
            held: false,
        };
        tokio::spawn(async move {
            keeper.run(asked, stopped).await;
            end.send_replace(true);
        });
        Self {
            part,
            actions,
            state,
            stop,
            ended,
        }
    }

    /// Its state now.
    pub fn state(&self) -> PartState {
        self.state.lock().clone()
    }

    /// Does something to it; what is returned tells when it is done.
    pub(super) fn act(&self, action: Action) -> Acting {
        let acting = Acting {
            before: self.state().pid,
            state: self.state.clone(),
            action,
        };
        // Fails only when the mesh is going down, and then there is nothing left to do.
        let _ = self.actions.send(action);
        acting
    }

    /// Asks it to end for good, and waits until it has.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }
}

/// An action under way.
#[derive(Debug)]
pub(super) struct Acting {
    before: Option<i32>,
    state: Arc<Mutex<PartState>>,
    action: Action,
}

impl Acting {
    /// Waits until the action has had its effect, which is bounded by the part's time to end.
    pub(super) async fn done(self) {
        let limit = tokio::time::Instant::now() + GRACE * 2;
        while !self.is_done() && tokio::time::Instant::now() < limit {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn is_done(&self) -> bool {
        let state = self.state.lock();
        match self.action {
            Action::Kill => state.pid != self.before || state.pid.is_none(),
            Action::Hold => state.held,
            Action::Restart => state.running && state.pid != self.before,
        }
    }
}

/// How long a part may take to end when asked.
const GRACE: Duration = Duration::from_secs(8);

struct Keeper {
    part: Part,
    log: Log,
    state: Arc<Mutex<PartState>>,
    held: bool,
}

/// What to do after a process has ended.
enum Next {
    Start,
    Hold,
    Stop,
}

impl Keeper {
    async fn run(
        mut self,
        mut asked: mpsc::UnboundedReceiver<Action>,
        mut stop: watch::Receiver<bool>,
    ) {
        const FIRST: Duration = Duration::from_millis(100);
        const LONGEST: Duration = Duration::from_secs(5);
        let mut pause = FIRST;
        loop {
            let started = Instant::now();
            match self.once(&mut asked, &mut stop).await {
                Next::Stop => return,
                Next::Hold => {
                    self.held = true;
                    self.change(|state| {
                        *state = PartState {
                            held: true,
                            restarts: state.restarts,
                            reason: Some("stopped on purpose".to_owned()),
                            ..PartState::default()
                        }
                    });
                    loop {
                        tokio::select! {
                            action = asked.recv() => if action == Some(Action::Restart) { break },
                            () = stopped(&mut stop) => return,
                        }
                    }
                    self.held = false;
                    self.change(|state| state.held = false);
                    pause = FIRST;
                    continue;
                }
                Next::Start => {}
            }
            if started.elapsed() > Duration::from_secs(10) {
                pause = FIRST;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stopped(&mut stop) => return,
            }
            pause = (pause * 2).min(LONGEST);
            self.change(|state| state.restarts += 1);
        }
    }

    fn change(&self, change: impl FnOnce(&mut PartState)) {
        change(&mut self.state.lock());
    }

    async fn once(
        &self,
        asked: &mut mpsc::UnboundedReceiver<Action>,
        stop: &mut watch::Receiver<bool>,
    ) -> Next {
        let mut running = match Running::logged(&self.part.task, &self.log) {
            Ok(running) => running,
            Err(error) => {
                self.change(|state| state.reason = Some(format!("cannot start: {error}")));
                return Next::Start;
            }
        };
        let pid = running.shim();
        self.change(|state| {
            (state.running, state.pid, state.reason) =
                (true, Some(pid), Some("starting".to_owned()))
        });
        let next = tokio::select! {
            code = running.ended() => {
                self.log.note(&format!("{} ended with {code}", self.part.name));
                self.change(|state| state.reason = Some(format!("ended with {code}")));
                Next::Start
            }
            () = stopped(stop) => {
                running.stop(GRACE).await;
                Next::Stop
            }
            action = asked.recv() => match action {
                Some(Action::Kill) => {
                    running.signal(Signal::SIGKILL);
                    running.ended().await;
                    Next::Start
                }
                Some(Action::Hold) => {
                    running.signal(Signal::SIGKILL);
                    running.ended().await;
                    Next::Hold
                }
                Some(Action::Restart) => {
                    running.stop(GRACE).await;
                    Next::Start
                }
                None => Next::Stop,
            },
            never = self.watch() => never,
        };
        self.change(|state| (state.running, state.ready, state.pid) = (false, false, None));
        next
    }

    async fn watch(&self) -> Next {
        let (address, path) = self.part.ready;
        loop {
            let answer = http::request(
                &self.part.netns,
                "GET",
                address,
                path,
                Duration::from_secs(1),
            )
            .await;
            let (ready, reason) = match answer {
                Ok(answer) if answer.status == 200 => (true, None),
                Ok(answer) => (false, Some(answer.body.trim().to_owned())),
                Err(error) => (false, Some(error.to_string())),
            };
            self.change(|state| (state.ready, state.reason) = (ready, reason));
            tokio::time::sleep(if ready {
                Duration::from_millis(500)
            } else {
                Duration::from_millis(20)
            })
            .await;
        }
    }
}

/// What parts are started with.
#[derive(Clone, Debug)]
pub struct Settings<'a> {
    /// The mesh's folder.
    pub runtime: &'a Runtime,
    /// The user's folder.
    pub folder: &'a Path,
    /// The file of the mesh's configuration.
    pub mesh_config: Option<&'a Path>,
    /// Files mounted over the machine's.
    pub files: Vec<(PathBuf, PathBuf)>,
}

impl Settings<'_> {
    fn task(&self, netns: &Netns, command: Vec<String>, environment: &[(&str, String)]) -> Task {
        let inherited = ["RUST_BACKTRACE", "RUST_LOG"]
            .iter()
            .filter_map(|name| Some((*name, std::env::var(name).ok()?)));
        let path = std::env::var("PATH").unwrap_or_default();
        let own = [("PATH", format!("{path}:/usr/sbin:/sbin"))];
        let all = own
            .into_iter()
            .chain(inherited)
            .chain(environment.iter().cloned());
        Task {
            netns: Some(netns.path().to_owned()),
            world: World::Part,
            files: self.files.clone(),
            hide: Vec::new(),
            hostname: None,
            user: None,
            directory: "/".into(),
            command,
            environment: all.map(|(name, value)| (name.to_owned(), value)).collect(),
            terminal: false,
        }
    }

    /// The control plane, in its own namespace.
    pub fn control_plane(&self, netns: &Netns, handle: Handle) -> Part {
        let admin = SocketAddr::new(address::CONTROL.v4.into(), CONTROL_ADMIN_PORT);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let folders = format!("{}:{}", text(self.folder), text(&self.runtime.state()));
        let environment = [
            ("LEYLINE_FOLDERS", folders),
            ("LEYLINE_XDS_LISTEN", format!("[::]:{XDS_PORT}")),
            ("LEYLINE_ADMIN_LISTEN", admin.to_string()),
            ("LEYLINE_CA_DIR", text(&self.runtime.authority())),
            ("LEYLINE_JWKS", text(&self.runtime.key_set())),
            (
                "LEYLINE_SERVING_NAMES",
                format!(
                    "istiod.istio-system.svc,localhost,{}",
                    address::CONTROL.texts().join(",")
                ),
            ),
        ];
        let mut command = this_program("controlplane");
        if let Some(file) = self.mesh_config {
            command.extend(["--meshConfig".to_owned(), text(file)]);
        }
        Part {
            name: CONTROL_PLANE.to_owned(),
            task: self.task(netns, command, &environment),
            netns: handle,
            ready: (admin, "/ready"),
            admin: BTreeMap::from([("admin", admin), ("metrics", admin)]),
        }
    }

    /// A node's tunnel: `program` instead of our own where given.
    pub fn tunnel(
        &self,
        node: &str,
        number: u8,
        netns: &Netns,
        handle: Handle,
        program: Option<&Path>,
    ) -> Part {
        let server = SocketAddr::new(address::CONTROL.v4.into(), XDS_PORT);
        let folder = self.runtime.node(node);
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let root = text(self.runtime.authority().join("root-cert.pem"));
        let environment = [
            ("XDS_ADDRESS", format!("https://{server}")),
            ("CA_ADDRESS", format!("https://{server}")),
            ("XDS_ROOT_CA", root.clone()),
            ("CA_ROOT_CA", root),
            ("AUTH_TOKEN", text(folder.join("token"))),
            ("NODE_NAME", node.to_owned()),
            ("CLUSTER_ID", "Kubernetes".to_owned()),
            ("INPOD_UDS", zds_socket(node)),
            ("INSTANCE_IP", address::node(number).v4.to_string()),
            ("POD_NAME", tunnel(node)),
            ("POD_NAMESPACE", "istio-system".to_owned()),
            ("SERVICE_ACCOUNT", "ztunnel".to_owned()),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "3".to_owned()),
            ("LEYLINE_SAME_NODE", "true".to_owned()),
        ];
        let command = match program {
            Some(program) => vec![
                text(program.to_owned()),
                "proxy".to_owned(),
                "ztunnel".to_owned(),
            ],
            None => this_program("ztunnel"),
        };
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Part {
            name: tunnel(node),
            task: self.task(netns, command, &environment),
            netns: handle,
            ready: (local(TUNNEL_READY_PORT), "/healthz/ready"),
            admin: BTreeMap::from([
                ("admin", local(TUNNEL_ADMIN_PORT)),
                ("metrics", local(TUNNEL_METRICS_PORT)),
            ]),
        }
    }

    /// A node's agent.
    pub fn agent(&self, node: &str, netns: &Netns, handle: Handle) -> Part {
        let admin = SocketAddr::from(([127, 0, 0, 1], AGENT_PORT));
        let environment = [
            ("NODE_NAME", node.to_owned()),
            (ZDS_SOCKET_VARIABLE, zds_socket(node)),
            (
                "LEYLINE_LOCAL_FOLDER",
                self.runtime.node(node).to_string_lossy().into_owned(),
            ),
            ("LEYLINE_PROBE_SOURCE", format!("mark:{:#x}", probe::MARK)),
            ("LEYLINE_CNI_ADMIN_ADDRESS", admin.to_string()),
        ];
        Part {
            name: agent(node),
            task: self.task(netns, this_program("cni-agent"), &environment),
            netns: handle,
            ready: (admin, "/readyz"),
            admin: BTreeMap::from([("admin", admin), ("metrics", admin)]),
        }
    }
}

/// Where a node's agent and tunnel meet: on the private `/run`, because a socket's path must be short.
fn zds_socket(node: &str) -> String {
    format!("/run/leyline/{node}/ztunnel.sock")
}

/// Folders that the parts expect.
pub fn prepare(nodes: &[String]) -> std::io::Result<()> {
    nodes
        .iter()
        .try_for_each(|node| std::fs::create_dir_all(format!("/run/leyline/{node}")))
}

/// This program in another role.
fn this_program(role: &str) -> Vec<String> {
    vec![shim::OWN_PROGRAM.to_owned(), role.to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_connection_gets_the_port_of_a_part() {
        for port in [
            XDS_PORT,
            CONTROL_ADMIN_PORT,
            TUNNEL_READY_PORT,
            TUNNEL_METRICS_PORT,
            TUNNEL_ADMIN_PORT,
            AGENT_PORT,
        ] {
            assert!(PORTS.iter().any(|range| range.contains(&port)), "{port}");
        }
    }
}
