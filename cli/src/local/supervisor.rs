//! The supervisor: PID 1's child in the mesh's own namespaces. It makes the network, starts the parts, keeps the world as
//! the folder says and answers requests. When it ends, for whatever reason, the kernel ends everything with it.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use controlplane::source::watch::{Change, Watcher};
use futures_util::StreamExt;
use inotify::{Inotify, WatchMask};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    address,
    control::{self, Asked},
    dns,
    fabric::{self, Station},
    logs::Log,
    netns::Netns,
    observe,
    parts::{self, CONTROL_PLANE, PartHandle, Settings},
    pod::PodNews,
    runtime::{self, Runtime, write_atomically},
    shim,
    tokens::{Bearer, LIFETIME_SECONDS, Minter},
    world::{self, LivePod, Node, World},
};
use crate::roles::asked_to_end;

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "leyline-supervisor";
/// The variable that holds the [`Plan`] as JSON.
pub(super) const VARIABLE: &str = "LEYLINE_SUPERVISOR";

/// What mesh to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Its name.
    pub name: String,
    /// Its runtime folder.
    pub root: PathBuf,
    /// The user's folder, absolute.
    pub folder: PathBuf,
    /// The file of the mesh's configuration, absolute.
    pub mesh_config: Option<PathBuf>,
    /// How many nodes.
    pub nodes: u8,
    /// Programs to run as a node's tunnel instead of our own, by node.
    pub tunnels: BTreeMap<String, PathBuf>,
    /// Whether it runs in a user namespace.
    pub rootless: bool,
    /// Where to tell how it goes: a [`News`] in each line.
    pub report: RawFd,
    /// The lock of the runtime folder, held as long as the supervisor lives.
    pub lock: RawFd,
}

/// What the supervisor tells whoever started it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum News {
    /// A step of starting was taken.
    Step(String),
    /// Everything runs.
    Ready,
    /// Something that the user should know.
    Note(String),
    /// It cannot go on.
    Failed(String),
}

/// Tells [`News`].
#[derive(Clone, Debug)]
pub(super) struct Teller {
    pipe: Arc<Mutex<Option<fs::File>>>,
}

impl Teller {
    fn tell(&self, news: &News) {
        tracing::info!(?news, "told");
        let mut pipe = self.pipe.lock();
        let line = serde_json::to_string(news).unwrap_or_default();
        // Once nobody listens (`up --detach` has returned), nobody is told.
        if pipe
            .as_mut()
            .is_some_and(|pipe| writeln!(pipe, "{line}").is_err())
        {
            *pipe = None;
        }
    }
}

/// The role's entry.
pub(crate) fn main() -> ExitCode {
    let Ok(plan) = std::env::var(VARIABLE)
        .map_err(drop)
        .and_then(|text| serde_json::from_str::<Plan>(&text).map_err(drop))
    else {
        eprintln!("leyline: this role is for leyline itself");
        return ExitCode::FAILURE;
    };
    let (report, _lock) = (inherited(plan.report), inherited(plan.lock));
    let teller = Teller {
        pipe: Arc::new(Mutex::new(Some(report.into()))),
    };
    match start(&plan, &teller) {
        Ok(code) => code,
        Err(error) => {
            teller.tell(&News::Failed(format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// A descriptor that was handed over by its number. Nothing that is started from here inherits it.
#[allow(unsafe_code, reason = "the descriptor was handed over as a number")]
fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: whoever started this role opened the descriptor for it and owns it no more.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // It can fail only for what is no descriptor, and that shows at its first use.
    let _ = nix::fcntl::fcntl(
        &fd,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    );
    fd
}

fn start(plan: &Plan, teller: &Teller) -> Result<ExitCode> {
    let mut keep = vec![plan.root.clone(), plan.folder.clone()];
    let files = plan.tunnels.values().chain(&plan.mesh_config);
    keep.extend(files.filter_map(|path| Some(path.parent()?.to_owned())));
    shim::private_world(&keep)?;
    offer_this_program().context("offer leyline to pods")?;
    let code = shim::supervise(|| {
        let result = serve(plan, teller);
        if let Err(error) = &result {
            teller.tell(&News::Failed(format!("{error:#}")));
        }
        Ok(u8::from(result.is_err()))
    })?;
    // What went wrong has been told already.
    Ok(if code == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Pods find this program as `leyline`, wherever it lies and whoever may enter that folder.
fn offer_this_program() -> Result<()> {
    let target = Path::new(shim::SHARED_PROGRAM);
    target.parent().map(fs::create_dir_all).transpose()?;
    fs::write(target, "")?;
    // By its path: the link itself leads into the mount namespace that this process was started from.
    let own = fs::read_link(shim::OWN_PROGRAM)?;
    let flags = nix::mount::MsFlags::MS_BIND;
    if nix::mount::mount(Some(&own), target, None::<&str>, flags, None::<&str>).is_err() {
        // Its file was replaced since (a new build): what runs is still there to be copied.
        fs::copy(shim::OWN_PROGRAM, target)?;
    }
    Ok(())
}

fn serve(plan: &Plan, teller: &Teller) -> Result<()> {
    let executor = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    executor.block_on(async {
        let log = net::log::init(&net::log::Options::default()).context("start logging")?;
        let result = run(plan, teller).await;
        log.flush();
        result
    })
}

/// Something happened.
enum Event {
    Folder(Vec<Change>),
    Pod(PodNews),
    Enrolment(String),
    Asked(Asked),
}

async fn run(plan: &Plan, teller: &Teller) -> Result<()> {
    let mut end = std::pin::pin!(asked_to_end()?);
    let (events, mut happened) = mpsc::unbounded_channel();
    let mut mesh = tokio::select! {
        mesh = Mesh::bring_up(plan, teller, &events, &mut happened) => mesh?,
        // What was started so far ends with this process.
        () = &mut end => return Ok(()),
    };
    teller.tell(&News::Ready);
    let mut refresh = tokio::time::interval(Duration::from_secs(LIFETIME_SECONDS / 4));
    while !mesh.down {
        let mut changed = false;
        tokio::select! {
            event = happened.recv() => match event {
                Some(event) => changed |= mesh.take(event, teller),
                None => break,
            },
            () = &mut end => break,
            _ = refresh.tick() => mesh.write_tokens()?,
        }
        while let Ok(event) = happened.try_recv() {
            changed |= mesh.take(event, teller);
        }
        if changed {
            mesh.reconcile(teller);
        }
    }
    mesh.stop(&mut happened).await;
    Ok(())
}

fn asked_into(
    events: &mpsc::UnboundedSender<Event>,
) -> impl Fn(Asked) + Send + Sync + Clone + 'static {
    let events = events.clone();
    move |asked| drop(events.send(Event::Asked(asked)))
}

fn watch_folder(folder: &Path, events: &mpsc::UnboundedSender<Event>) -> Result<()> {
    let mut watcher = Watcher::new(&[folder.to_owned()])?;
    let first = watcher.rescan()?;
    let _ = events.send(Event::Folder(first));
    let events = events.clone();
    std::thread::Builder::new()
        .name("folder".to_owned())
        .spawn(move || {
            // Never readable: this thread ends with the process. (A closed pipe's end would wake it at once.)
            let Ok((wake, _held)) = nix::unistd::pipe() else {
                return;
            };
            while let Ok(changes) = watcher.next(&wake) {
                if !changes.is_empty() && events.send(Event::Folder(changes)).is_err() {
                    return;
                }
            }
            tracing::error!("the folder is no longer watched");
        })?;
    Ok(())
}

fn watch_enrolments(world: &World, events: &mpsc::UnboundedSender<Event>) -> Result<()> {
    let inotify = Inotify::init()?;
    let mut nodes = BTreeMap::new();
    for node in world.nodes.keys() {
        let folder = cni::local::enrolments_folder(&world.runtime.node(node));
        let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::DELETE;
        let watch = inotify.watches().add(folder, mask)?;
        nodes.insert(watch.get_watch_descriptor_id(), node.clone());
    }
    let mut stream = inotify.into_event_stream(vec![0; 16 << 10])?;
    let events = events.clone();
    tokio::spawn(async move {
        while let Some(Ok(event)) = stream.next().await {
            let node = nodes.get(&event.wd.get_watch_descriptor_id());
            // An overflow names no folder: then all are read.
            let read = node.map_or_else(
                || nodes.values().cloned().collect(),
                |node| vec![node.clone()],
            );
            for node in read {
                let _ = events.send(Event::Enrolment(node));
            }
        }
    });
    Ok(())
}

/// The running mesh.
pub(super) struct Mesh {
    /// Its folder.
    pub runtime: Runtime,
    /// What runs on it.
    pub world: World,
    /// Its own processes.
    pub parts: BTreeMap<String, PartHandle>,
    /// How it was asked for.
    pub plan: Plan,
    /// The control plane's namespace.
    pub control: Netns,
    minter: Arc<Minter>,
    control_handle: tokio::runtime::Handle,
    down: bool,
}

impl Mesh {
    /// The network, then the parts, then the pods that the folder asks for.
    async fn bring_up(
        plan: &Plan,
        teller: &Teller,
        events: &mpsc::UnboundedSender<Event>,
        happened: &mut mpsc::UnboundedReceiver<Event>,
    ) -> Result<Self> {
        let mut mesh = Self::build(plan, teller, events).await?;
        control::listen(&mesh.runtime.control_socket(), asked_into(events))
            .context("open the control socket")?;
        mesh.start_parts(plan, teller).await?;
        watch_folder(&plan.folder, events).context("watch the folder")?;
        watch_enrolments(&mesh.world, events).context("watch the agents' folders")?;
        mesh.first_round(happened, teller).await?;
        Ok(mesh)
    }

    async fn build(
        plan: &Plan,
        teller: &Teller,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Result<Self> {
        let runtime = Runtime::at(plan.root.clone());
        let control = Netns::create("control").context("create a network namespace")?;
        let mut nodes = Vec::new();
        for number in 1..=plan.nodes {
            let netns =
                Netns::create(&world::name(number)).context("create a network namespace")?;
            let folder = runtime.node(&world::name(number));
            runtime::private_folder(&folder)?;
            runtime::private_folder(&cni::local::pods_folder(&folder))?;
            runtime::private_folder(&cni::local::enrolments_folder(&folder))?;
            let handle = netns.runtime().context("enter a network namespace")?;
            nodes.push(Node::new(number, netns, handle));
        }
        lay_link(&control, &nodes)
            .await
            .context("lay the link between the nodes")?;
        let names: Vec<String> = nodes.iter().map(|node| node.name.clone()).collect();
        parts::prepare(&names)?;
        teller.tell(&News::Step(format!(
            "network: {} and the link between them",
            names.join(", ")
        )));
        let zone = dns::Zone::default();
        let control_handle = control.runtime().context("enter a network namespace")?;
        dns::serve(&control_handle, &zone);
        let minter = Minter::new()?;
        write_atomically(&runtime.key_set(), minter.key_set().to_string().as_bytes())?;
        let (news, mut told) = mpsc::unbounded_channel();
        let events = events.clone();
        tokio::spawn(async move {
            while let Some(news) = told.recv().await {
                let _ = events.send(Event::Pod(news));
            }
        });
        let minter = Arc::new(minter);
        let rootless = plan.rootless;
        let world = World::new(runtime.clone(), nodes, zone, news, rootless, minter.clone());
        let mesh = Self {
            runtime,
            world,
            parts: BTreeMap::new(),
            plan: plan.clone(),
            control,
            minter,
            control_handle,
            down: false,
        };
        mesh.write_tokens()?;
        Ok(mesh)
    }

    /// A token for every tunnel, replaced well before it runs out.
    fn write_tokens(&self) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        for node in self.world.nodes.keys() {
            let bearer = Bearer {
                namespace: "istio-system".to_owned(),
                service_account: "ztunnel".to_owned(),
                pod: parts::tunnel(node),
                pod_uid: observe::tunnel_uid(node),
                node: node.clone(),
            };
            let token = self.minter.mint(&bearer, now)?;
            write_atomically(&self.runtime.node(node).join("token"), token.as_bytes())?;
        }
        self.world.renew_tokens()
    }

    async fn start_parts(&mut self, plan: &Plan, teller: &Teller) -> Result<()> {
        // The control plane reads who may ask for what: that must be there first.
        self.world.reconcile();
        let runtime = self.runtime.clone();
        let settings = |name, of_control_plane| -> Result<_> {
            let resolver = runtime.etc().join(name);
            fs::write(&resolver, observe::parts_resolv_conf(of_control_plane))?;
            Ok(Settings {
                runtime: &runtime,
                folder: &plan.folder,
                mesh_config: plan.mesh_config.as_deref(),
                files: vec![(resolver, PathBuf::from("/etc/resolv.conf"))],
            })
        };
        let control_plane = settings("control.resolv.conf", true)?;
        let settings = settings("parts.resolv.conf", false)?;
        let part = control_plane.control_plane(&self.control, self.control_handle.clone());
        self.start_part(part)?;
        self.await_ready(CONTROL_PLANE, teller).await?;
        // Waypoints have waited for its authority.
        self.world.reconcile();
        teller.tell(&News::Step("control plane".to_owned()));
        let (mut agents, mut tunnels) = (Vec::new(), Vec::new());
        for node in self.world.nodes.values() {
            let program = plan.tunnels.get(&node.name).map(PathBuf::as_path);
            agents.push(settings.agent(&node.name, &node.netns, node.handle.clone()));
            tunnels.push(settings.tunnel(
                &node.name,
                node.number,
                &node.netns,
                node.handle.clone(),
                program,
            ));
        }
        // Each agent before its tunnel, which would otherwise complain that there is none.
        for parts in [agents, tunnels] {
            let names: Vec<String> = parts.iter().map(|part| part.name.clone()).collect();
            parts
                .into_iter()
                .try_for_each(|part| self.start_part(part))?;
            for name in names {
                self.await_started(&name).await?;
            }
        }
        for name in self.parts.keys() {
            self.await_ready(name, teller).await?;
        }
        teller.tell(&News::Step("agents and tunnels".to_owned()));
        Ok(())
    }

    fn start_part(&mut self, part: parts::Part) -> Result<()> {
        let log = Log::open(self.runtime.part_log(&part.name)).context("open a log")?;
        self.parts
            .insert(part.name.clone(), PartHandle::start(part, log));
        Ok(())
    }

    /// Until an agent listens for its tunnel; a tunnel has nothing that need be waited for.
    async fn await_started(&self, name: &str) -> Result<()> {
        const PATIENCE: Duration = Duration::from_secs(2);
        let part = self
            .parts
            .get(name)
            .context("a part that was just started is known")?;
        let Some(socket) = part.part.task.environment.get(parts::ZDS_SOCKET_VARIABLE) else {
            return Ok(());
        };
        let listening = async {
            while !Path::new(socket).exists() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        // One that is slow delays nothing else: the tunnel tries again.
        let _ = tokio::time::timeout(PATIENCE, listening).await;
        Ok(())
    }

    async fn await_ready(&self, name: &str, teller: &Teller) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(20);
        const PATIENCE: Duration = Duration::from_secs(3);
        let mut told = false;
        let started = Instant::now();
        let part = self
            .parts
            .get(name)
            .context("a part that was just started is known")?;
        loop {
            let state = part.state();
            if state.ready {
                return Ok(());
            }
            if started.elapsed() > PATIENCE && !told {
                told = true;
                let why = state.reason.clone().unwrap_or_default();
                teller.tell(&News::Note(format!("waiting for {name}: {why}")));
            }
            if started.elapsed() > LIMIT {
                let log =
                    super::logs::tail(&self.runtime.part_log(name), Some(15)).unwrap_or_default();
                bail!(
                    "{name} is not ready after {LIMIT:?}: {}\n{log}",
                    state.reason.unwrap_or_default()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Until the pods that the folder asks for run, or it is clear which do not.
    async fn first_round(
        &mut self,
        happened: &mut mpsc::UnboundedReceiver<Event>,
        teller: &Teller,
    ) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(15);
        let deadline = tokio::time::Instant::now() + LIMIT;
        let mut read = false;
        while !(self.down || read && self.world.pods.values().all(LivePod::settled)) {
            let event = tokio::time::timeout_at(deadline, happened.recv()).await;
            let Ok(Some(event)) = event else { break };
            read |= matches!(event, Event::Folder(_));
            if self.take(event, teller) {
                self.reconcile(teller);
            }
        }
        let pods = &self.world.pods;
        let ready = pods.values().filter(|pod| pod.state().ready).count();
        let all = pods.len() + self.world.unplaced.len();
        teller.tell(&News::Step(format!("pods: {ready} of {all} ready")));
        Ok(())
    }

    /// Takes an event in. Whether the world must be looked at again.
    fn take(&mut self, event: Event, teller: &Teller) -> bool {
        match event {
            Event::Folder(changes) => {
                self.world.folder.apply(changes);
                self.reread(teller);
                true
            }
            Event::Pod(PodNews { uid, ended }) => {
                if ended {
                    self.world.remove(&uid);
                }
                true
            }
            Event::Enrolment(node) => self.world.read_enrolments(&node),
            Event::Asked(asked) => {
                let (changed, down) = control::answer(self, asked);
                self.down |= down;
                if changed {
                    self.reread(teller);
                }
                changed
            }
        }
    }

    fn reread(&mut self, teller: &Teller) {
        for note in self.world.read() {
            teller.tell(&News::Note(note));
        }
    }

    fn reconcile(&mut self, teller: &Teller) {
        for note in tokio::task::block_in_place(|| self.world.reconcile()) {
            teller.tell(&News::Note(note));
        }
    }

    /// Stops pods, then parts. Bounded in time: what does not end by itself ends with the namespaces.
    async fn stop(&mut self, happened: &mut mpsc::UnboundedReceiver<Event>) {
        const LIMIT: Duration = Duration::from_secs(5);
        self.world.stop_pods();
        let gone = async {
            while !self.world.pods.is_empty() {
                if let Some(Event::Pod(PodNews { uid, ended: true })) = happened.recv().await {
                    self.world.pods.remove(&uid);
                }
            }
        };
        let _ = tokio::time::timeout(LIMIT, gone).await;
        let parts = self.parts.values().map(PartHandle::stop);
        let _ = tokio::time::timeout(LIMIT, futures_util::future::join_all(parts)).await;
    }
}

async fn lay_link(control: &Netns, nodes: &[Node]) -> std::io::Result<()> {
    let mut stations = vec![Station {
        netns: control,
        address: address::CONTROL,
        node: None,
    }];
    stations.extend(nodes.iter().map(|node| Station {
        netns: &node.netns,
        address: address::node(node.number),
        node: Some(node.number),
    }));
    fabric::lay(&stations).await
}
