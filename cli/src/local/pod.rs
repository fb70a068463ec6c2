//! One pod's life: its init containers in turn, then its containers side by side, probed, restarted and in the end
//! stopped. A task of its own; it tells the supervisor what it sees and is told only to stop.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    logs::Log,
    plan::{ContainerPlan, Place, PodPlan},
    probe::{self, Rhythm},
    process::{ExitCode, Running, stopped},
    runtime::Runtime,
    shim::{Task, User, World},
};

/// Everything that a pod's task needs.
#[derive(Clone, Debug)]
pub(super) struct Sandbox {
    /// Which pod.
    pub plan: Arc<PodPlan>,
    /// Where it runs.
    pub place: Place,
    /// Its network namespace.
    pub netns: PathBuf,
    /// A runtime in its node's namespace, from where probes are sent.
    pub node: Handle,
    /// Where its logs go.
    pub runtime: Runtime,
    /// Files mounted over the machine's.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Whether becoming another user needs a nested user namespace.
    pub rootless: bool,
}

impl Sandbox {
    /// The machine's `/run` and the mesh's own folder.
    fn hidden(&self) -> Vec<PathBuf> {
        let own = self
            .runtime
            .root()
            .parent()
            .unwrap_or(self.runtime.root())
            .to_owned();
        let run = PathBuf::from("/run");
        if own.starts_with(&run) {
            vec![run]
        } else {
            vec![run, own]
        }
    }
}

/// How far a container is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ContainerState {
    /// Whether it runs now.
    pub running: bool,
    /// Whether its readiness probe (if any) succeeds.
    pub ready: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// How it last ended.
    pub last_exit: Option<ExitCode>,
    /// Why it is not running, or not ready.
    pub reason: Option<String>,
    /// Through which its world is entered while it runs.
    pub shim: Option<i32>,
}

/// How far a pod is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PodState {
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    pub phase: Phase,
    /// By container, init containers too.
    pub containers: BTreeMap<String, ContainerState>,
    /// Whether every container is ready.
    pub ready: bool,
    /// Why the pod cannot run at all.
    pub message: Option<String>,
}

impl PodState {
    /// Whether there is nothing more to wait for: it runs as it should, has ended, or fails again and again.
    pub(super) fn settled(&self) -> bool {
        let failing = |container: &ContainerState| container.restarts > 0 && !container.ready;
        let ended = matches!(self.phase, Phase::Succeeded | Phase::Failed);
        self.ready || ended || self.containers.values().any(failing)
    }
}

/// `status.phase`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Being set up.
    #[default]
    Pending,
    /// At least one container runs or will run again.
    Running,
    /// All ended well and none will run again.
    Succeeded,
    /// All ended, not all well, and none will run again.
    Failed,
}

impl Phase {
    /// As Kubernetes writes it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// A pod's task as the supervisor holds it.
#[derive(Debug)]
pub(super) struct PodHandle {
    stop: watch::Sender<bool>,
    state: Arc<Mutex<PodState>>,
}

/// What a pod's task tells: that its state changed, or (`ended`) that every process of it is gone for good.
#[derive(Clone, Debug)]
pub(super) struct PodNews {
    /// Unique id of the pod.
    pub uid: String,
    /// Nothing of it runs any more, because it was told to stop.
    pub ended: bool,
}

impl PodHandle {
    /// Starts the pod's task.
    pub(super) fn start(
        sandbox: Sandbox,
        containers: Containers,
        news: mpsc::UnboundedSender<PodNews>,
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let state = Arc::new(Mutex::new(PodState::default()));
        let uid = sandbox.place.uid.clone();
        let main = containers
            .iter()
            .flat_map(|(_, main)| main)
            .map(|container| container.name.clone())
            .collect();
        let report = Report {
            state: state.clone(),
            news,
            uid,
            main,
        };
        tokio::spawn(run(Arc::new(sandbox), containers, report, stopped));
        Self { stop, state }
    }

    /// Tells the pod to stop. It says so when it has.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Its state now.
    pub(super) fn state(&self) -> PodState {
        self.state.lock().clone()
    }
}

/// The containers of a pod, or why it has none.
pub(super) type Containers = Result<(Vec<ContainerPlan>, Vec<ContainerPlan>), String>;

#[derive(Clone)]
struct Report {
    state: Arc<Mutex<PodState>>,
    news: mpsc::UnboundedSender<PodNews>,
    uid: String,
    /// The containers that must all be ready for the pod to be.
    main: Arc<[String]>,
}

impl Report {
    fn change(&self, change: impl FnOnce(&mut PodState)) {
        let mut state = self.state.lock();
        let before = state.clone();
        change(&mut state);
        let ready = |name: &String| {
            state
                .containers
                .get(name)
                .is_some_and(|container| container.ready)
        };
        state.ready = state.phase == Phase::Running && self.main.iter().all(ready);
        if *state != before {
            let _ = self.news.send(PodNews {
                uid: self.uid.clone(),
                ended: false,
            });
        }
    }

    fn container(&self, name: &str, change: impl FnOnce(&mut ContainerState)) {
        self.change(|state| {
            change(state.containers.entry(name.to_owned()).or_default());
        });
    }
}

type Stop = watch::Receiver<bool>;

async fn run(sandbox: Arc<Sandbox>, containers: Containers, report: Report, mut stop: Stop) {
    match containers {
        Ok((init, main)) => live(&sandbox, init, main, &report, &mut stop).await,
        Err(message) => report.change(|state| state.message = Some(message)),
    }
    stopped(&mut stop).await;
    let _ = report.news.send(PodNews {
        uid: report.uid.clone(),
        ended: true,
    });
}

async fn live(
    sandbox: &Arc<Sandbox>,
    init: Vec<ContainerPlan>,
    main: Vec<ContainerPlan>,
    report: &Report,
    stop: &mut Stop,
) {
    for container in init.iter().chain(&main) {
        report.container(&container.name, |_| {});
    }
    let mut tasks = JoinSet::new();
    for container in init {
        let sidecar = container.sidecar;
        let name = container.name.clone();
        let life = keep_running(
            sandbox.clone(),
            container,
            report.clone(),
            stop.clone(),
            sidecar.into(),
        );
        if sidecar {
            tasks.spawn(life);
            continue;
        }
        let code = life.await;
        if *stop.borrow() {
            while tasks.join_next().await.is_some() {}
            return;
        }
        if code != 0 {
            report.change(|state| {
                state.phase = Phase::Failed;
                state.message = Some(format!("init container {name} ended with {code}"));
            });
            return;
        }
    }
    report.change(|state| state.phase = Phase::Running);
    let mut main_tasks = JoinSet::new();
    for container in main {
        let life = keep_running(
            sandbox.clone(),
            container,
            report.clone(),
            stop.clone(),
            Kind::Main,
        );
        main_tasks.spawn(life);
    }
    let mut worst = 0;
    while let Some(ended) = main_tasks.join_next().await {
        worst = worst.max(ended.unwrap_or(-1));
    }
    report.change(|state| {
        state.phase = if worst == 0 {
            Phase::Succeeded
        } else {
            Phase::Failed
        };
    });
    tasks.shutdown().await;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Main,
    Init,
    Sidecar,
}

impl From<bool> for Kind {
    fn from(sidecar: bool) -> Self {
        if sidecar { Self::Sidecar } else { Self::Init }
    }
}

/// Runs a container until it need not run again: its last exit code. Restarts wait 0.2 s, then twice as long each time up
/// to 10 s, from the start again after a minute of health. (Kubernetes waits 10 s to 5 min; here somebody is watching.)
async fn keep_running(
    sandbox: Arc<Sandbox>,
    container: ContainerPlan,
    report: Report,
    mut stop: Stop,
    kind: Kind,
) -> ExitCode {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(10);
    let policy = sandbox
        .plan
        .spec()
        .restart_policy
        .unwrap_or_else(|| "Always".to_owned());
    let mut pause = FIRST;
    loop {
        let started = Instant::now();
        let code = run_once(&sandbox, &container, &report, &mut stop).await;
        let again = match (kind, policy.as_str()) {
            (Kind::Sidecar, _) | (Kind::Main, "Always") => true,
            (Kind::Init, "Always" | "OnFailure") | (Kind::Main, "OnFailure") => code != 0,
            _ => false,
        };
        if !again || *stop.borrow() {
            return code;
        }
        if started.elapsed() > Duration::from_secs(60) {
            pause = FIRST;
        }
        report.container(&container.name, |state| {
            let why = state
                .reason
                .take()
                .unwrap_or_else(|| format!("ended with {code}"));
            state.reason = Some(format!("{why} (starts again in {pause:?})"));
        });
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopped(&mut stop) => return code,
        }
        pause = (pause * 2).min(LONGEST);
        report.container(&container.name, |state| state.restarts += 1);
    }
}

/// How a container ended, with what it said last, which is often why.
fn last_words(sandbox: &Sandbox, container: &str, code: ExitCode) -> String {
    const SHOWN: usize = 120;
    let path = sandbox.runtime.container_log(&sandbox.plan.key, container);
    let text = super::logs::tail(&path, Some(1)).unwrap_or_default();
    let line = text.trim().trim_start_matches("leyline: ");
    let line: String = line.chars().take(SHOWN).collect();
    let separator = if line.is_empty() { "" } else { ": " };
    format!("ended with {code}{separator}{line}")
}

async fn run_once(
    sandbox: &Arc<Sandbox>,
    container: &ContainerPlan,
    report: &Report,
    stop: &mut Stop,
) -> ExitCode {
    let log = Log::open(
        sandbox
            .runtime
            .container_log(&sandbox.plan.key, &container.name),
    );
    let started = log.and_then(|log| Running::logged(&task(sandbox, container, None), &log));
    let mut running = match started {
        Ok(running) => running,
        Err(error) => {
            report.container(&container.name, |state| {
                state.reason = Some(format!("cannot start: {error}"))
            });
            return 126;
        }
    };
    let shim = running.shim();
    report.container(&container.name, |state| {
        state.running = true;
        state.shim = Some(shim);
        state.ready = container.readiness.is_none() && container.startup.is_none();
        state.reason = None;
    });
    let grace = grace(sandbox);
    let code = tokio::select! {
        code = running.ended() => code,
        () = stopped(stop) => {
            report.container(&container.name, |state| state.ready = false);
            running.stop(grace).await
        }
        reason = probe_all(sandbox, container, report, shim) => {
            tracing::info!(pod = %sandbox.plan.key, container = container.name, reason, "restart an unhealthy container");
            running.stop(grace).await
        }
    };
    let why = (code != 0).then(|| last_words(sandbox, &container.name, code));
    report.container(&container.name, |state| {
        *state = ContainerState {
            restarts: state.restarts,
            last_exit: Some(code),
            reason: why,
            ..ContainerState::default()
        };
    });
    code
}

fn grace(sandbox: &Sandbox) -> Duration {
    let seconds = sandbox
        .plan
        .spec()
        .termination_grace_period_seconds
        .unwrap_or(30);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// The shim's task for a container, or (`inside`) for a command within one that runs.
pub(super) fn task(
    sandbox: &Sandbox,
    container: &ContainerPlan,
    inside: Option<(i32, Vec<String>)>,
) -> Task {
    let (world, command) = match inside {
        Some((shim, command)) => (World::Inside(shim), command),
        None => (World::Container, container.command.clone()),
    };
    Task {
        netns: Some(sandbox.netns.clone()),
        world,
        files: sandbox.files.clone(),
        hide: sandbox.hidden(),
        hostname: Some(super::plan::hostname(&sandbox.plan)),
        user: Some(User {
            uid: container.uid,
            gid: container.gid,
            nested: sandbox.rootless,
        }),
        directory: container.directory.clone().into(),
        command,
        environment: container.environment.clone(),
        terminal: false,
    }
}

/// Probes a running container until liveness fails for good: then the reason. Ends with the container (its shim).
async fn probe_all(
    sandbox: &Sandbox,
    container: &ContainerPlan,
    report: &Report,
    shim: i32,
) -> String {
    if let Some(startup) = &container.startup
        && let Err(reason) = until_started(sandbox, container, startup, shim).await
    {
        return reason;
    }
    if container.readiness.is_none() {
        report.container(&container.name, |state| {
            state.ready = state.running && state.shim == Some(shim)
        });
    }
    let readiness = async {
        match &container.readiness {
            Some(probe) => watch_readiness(sandbox, container, probe, report, shim).await,
            None => std::future::pending().await,
        }
    };
    let liveness = async {
        match &container.liveness {
            Some(probe) => until_unhealthy(sandbox, container, probe, shim).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        never = readiness => never,
        reason = liveness => reason,
    }
}

type ApiProbe = k8s_openapi::api::core::v1::Probe;

async fn until_started(
    sandbox: &Sandbox,
    container: &ContainerPlan,
    probe: &ApiProbe,
    shim: i32,
) -> Result<(), String> {
    let rhythm = Rhythm::of(probe);
    tokio::time::sleep(rhythm.initial_delay).await;
    let mut failures = 0;
    loop {
        match once(sandbox, container, probe, rhythm, shim).await {
            Ok(()) => return Ok(()),
            Err(reason) => {
                failures += 1;
                if failures >= rhythm.failures {
                    return Err(format!("startup probe: {reason}"));
                }
            }
        }
        tokio::time::sleep(rhythm.period).await;
    }
}

async fn until_unhealthy(
    sandbox: &Sandbox,
    container: &ContainerPlan,
    probe: &ApiProbe,
    shim: i32,
) -> String {
    let rhythm = Rhythm::of(probe);
    tokio::time::sleep(rhythm.initial_delay).await;
    let mut failures = 0;
    loop {
        match once(sandbox, container, probe, rhythm, shim).await {
            Ok(()) => failures = 0,
            Err(reason) => {
                failures += 1;
                if failures >= rhythm.failures {
                    return format!("liveness probe: {reason}");
                }
            }
        }
        tokio::time::sleep(rhythm.period).await;
    }
}

async fn watch_readiness(
    sandbox: &Sandbox,
    container: &ContainerPlan,
    probe: &ApiProbe,
    report: &Report,
    shim: i32,
) -> String {
    /// Until it is ready for the first time, a container is asked more often than it says: somebody is waiting.
    const EAGER: Duration = Duration::from_millis(100);
    let rhythm = Rhythm::of(probe);
    tokio::time::sleep(rhythm.initial_delay).await;
    let (mut successes, mut failures, mut been_ready) = (0, 0, false);
    loop {
        let result = once(sandbox, container, probe, rhythm, shim).await;
        match &result {
            Ok(()) => (successes, failures) = (successes + 1, 0),
            Err(_) => (successes, failures) = (0, failures + 1),
        }
        let own = |state: &ContainerState| state.running && state.shim == Some(shim);
        if successes >= rhythm.successes {
            been_ready = true;
            report.container(&container.name, |state| {
                state.ready = own(state);
                state.reason = None;
            });
        } else if failures >= rhythm.failures || !been_ready {
            let reason = result
                .err()
                .map(|reason| format!("readiness probe: {reason}"));
            report.container(&container.name, |state| {
                if own(state) {
                    state.ready = false;
                    state.reason = reason;
                }
            });
        }
        tokio::time::sleep(if been_ready {
            rhythm.period
        } else {
            rhythm.period.min(EAGER)
        })
        .await;
    }
}

async fn once(
    sandbox: &Sandbox,
    container: &ContainerPlan,
    probe: &ApiProbe,
    rhythm: Rhythm,
    shim: i32,
) -> Result<(), String> {
    let call = probe::call(probe, sandbox.place.address.v4.into(), &container.ports)
        .map_err(|error| error.to_string())?;
    let result = match call {
        probe::Call::Exec(command) => {
            run_command(sandbox, container, command, rhythm.timeout, shim).await
        }
        call => probe::send(&sandbox.node, call, rhythm.timeout).await,
    };
    result.map_err(|error| describe(&error))
}

fn describe(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

async fn run_command(
    sandbox: &Sandbox,
    container: &ContainerPlan,
    command: Vec<String>,
    limit: Duration,
    shim: i32,
) -> Result<(), probe::ProbeError> {
    let task = task(sandbox, container, Some((shim, command)));
    let mut running =
        Running::silent(&task).map_err(|error| probe::ProbeError::Invalid(error.to_string()))?;
    match tokio::time::timeout(limit, running.ended()).await {
        Ok(0) => Ok(()),
        Ok(code) => Err(probe::ProbeError::Exit(code)),
        Err(_) => Err(probe::ProbeError::TimedOut(limit)),
    }
}
