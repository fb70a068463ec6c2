#![allow(unsafe_code, reason = "fork and ioctl have no safe wrapper")]
//! The small process between the supervisor and what it runs. It enters the namespaces, gives up every privilege and
//! executes; for containers it also stays as PID 1 of theirs, so that a killed container leaves no child behind.
//!
//! It is this very program in the role `leyline-shim`, told what to do by one environment variable, with one thread.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    os::fd::AsRawFd,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Gid, Pid, Uid, fork},
};
use serde::{Deserialize, Serialize};

use super::sandbox;

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "leyline-shim";
/// The variable that holds the [`Task`] as JSON.
pub(super) const VARIABLE: &str = "LEYLINE_SHIM";

/// What to run, where and as whom.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// The network namespace; the supervisor's own when absent.
    pub netns: Option<PathBuf>,
    /// How much of its own world the process gets.
    pub world: World,
    /// Files and folders mounted over others, `(from, to)`, seen by this process and its children only.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Folders that appear empty, to this process and its children only.
    pub hide: Vec<PathBuf>,
    /// Host name inside; the machine's when absent.
    pub hostname: Option<String>,
    /// User and group to become, without any capability; absent for the mesh's own parts.
    pub user: Option<User>,
    /// Working directory.
    pub directory: PathBuf,
    /// The program (looked up in `PATH`) and its arguments.
    pub command: Vec<String>,
    /// The whole environment.
    pub environment: BTreeMap<String, String>,
    /// Whether standard input is a terminal that should control the process.
    pub terminal: bool,
}

/// How much of its own world a process gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum World {
    /// Its own mounts: a part of the mesh.
    Part,
    /// Its own mounts, process ids, host name and IPC: a pod's container.
    Container,
    /// That of the container whose shim has this process id.
    Inside(i32),
}

/// A user without privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id, not 0.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Whether the mesh runs in a user namespace of one id, where becoming another user means nesting one more.
    pub nested: bool,
}

/// This very program, whatever became of its file since it was started.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";
/// The same where pods find it, whoever may enter the folder that it lies in.
pub(super) const SHARED_PROGRAM: &str = "/run/leyline/bin/leyline";
/// Exit code for what could not be executed, as shells use it.
const CANNOT_EXECUTE: u8 = 126;
/// Exit code for a program that does not exist, as shells use it.
const NOT_FOUND: u8 = 127;

/// The role's entry: ends with the exit code of what it ran.
pub(crate) fn main() -> ExitCode {
    match read_task().and_then(run) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("leyline: {error:#}");
            ExitCode::from(CANNOT_EXECUTE)
        }
    }
}

fn read_task() -> Result<Task> {
    let text =
        std::env::var(VARIABLE).context("this role is for leyline itself: its task is missing")?;
    serde_json::from_str(&text).context("read the task")
}

fn run(task: Task) -> Result<u8> {
    match task.world {
        World::Part => {
            enter_netns(&task)?;
            private_mounts(&task)?;
            execute(&task)
        }
        World::Container => {
            enter_netns(&task)?;
            unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
                .context("create the container's namespaces")?;
            private_mounts(&task)?;
            if let Some(hostname) = &task.hostname {
                nix::unistd::sethostname(hostname).context("set the host name")?;
            }
            in_child(|| container_init(&task))
        }
        World::Inside(shim) => {
            join(shim).context("enter the container")?;
            in_child(|| execute(&task))
        }
    }
}

fn enter_netns(task: &Task) -> Result<()> {
    let Some(path) = &task.netns else {
        return Ok(());
    };
    let namespace = File::open(path).with_context(|| format!("open {}", path.display()))?;
    setns(namespace, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", path.display()))
}

/// Own mounts. A part goes on seeing namespaces that the supervisor names later; a pod sees nothing of the mesh's own
/// files, which in a user namespace belong to the very user that the pod runs as.
fn private_mounts(task: &Task) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("create a mount namespace")?;
    let propagation = if matches!(task.world, World::Part) {
        MsFlags::MS_SLAVE
    } else {
        MsFlags::MS_PRIVATE
    };
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | propagation,
        None::<&str>,
    )
    .context("separate the mounts")?;
    let open =
        |path: &PathBuf| File::open(path).with_context(|| format!("open {}", path.display()));
    let files = task
        .files
        .iter()
        .map(|(from, to)| Ok((open(from)?, to)))
        .collect::<Result<Vec<_>>>()?;
    for path in &task.hide {
        let options = Some("mode=1777,size=64m");
        mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            options,
        )
        .with_context(|| format!("hide {}", path.display()))?;
    }
    for (from, to) in &files {
        mountable(to, from.metadata().is_ok_and(|it| it.is_dir()));
        let from = format!("/proc/self/fd/{}", from.as_raw_fd());
        mount(
            Some(from.as_str()),
            *to,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("mount on {}", to.display()))?;
    }
    Ok(())
}

/// Joins the world of a container through its shim: the shim itself is in all of its namespaces but the PID one, which
/// it holds for its children.
fn join(shim: i32) -> Result<()> {
    const NAMESPACES: [(&str, CloneFlags); 5] = [
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("pid_for_children", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let folder = PathBuf::from(format!("/proc/{shim}/ns"));
    let open = |(name, flag)| {
        Ok((
            File::open(folder.join(name)).context("the container has ended")?,
            flag,
        ))
    };
    let files = NAMESPACES
        .into_iter()
        .map(open)
        .collect::<Result<Vec<_>>>()?;
    for (file, flag) in files {
        setns(file, flag)?;
    }
    Ok(())
}

/// PID 1 of the container: its own `/proc`, then the program as a child, whose exit code is the container's.
fn container_init(task: &Task) -> Result<u8> {
    // Where a container engine masks /proc, the kernel refuses a fresh one to a user namespace; the old one then stays.
    let _ = mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        MsFlags::empty(),
        None::<&str>,
    );
    in_child(|| execute(task))
}

/// Runs `body` in a child, passes signals on to it, reaps orphans, and ends as the child ends. The child dies with us.
pub(super) fn in_child(body: impl FnOnce() -> Result<u8>) -> Result<u8> {
    let signals = forwarded();
    signals.thread_block().context("block signals")?;
    // SAFETY: there is one thread, so the child may do anything.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => wait(child, &signals),
        ForkResult::Child => {
            let code = child_body(&signals, body).unwrap_or_else(|error| {
                eprintln!("leyline: {error:#}");
                CANNOT_EXECUTE
            });
            std::process::exit(i32::from(code))
        }
    }
}

fn child_body(signals: &SigSet, body: impl FnOnce() -> Result<u8>) -> Result<u8> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("ask to die with the parent")?;
    signals.thread_unblock().context("unblock signals")?;
    body()
}

fn forwarded() -> SigSet {
    use Signal::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
    [
        SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH,
    ]
    .into_iter()
    .collect()
}

fn wait(child: Pid, signals: &SigSet) -> Result<u8> {
    loop {
        match signals.wait().context("wait for a signal")? {
            Signal::SIGCHLD => {
                if let Some(code) = reap(child)? {
                    return Ok(code);
                }
            }
            signal => {
                let _ = kill(child, signal);
            }
        }
    }
}

/// Collects everything that has ended; the exit code once `child` is among it.
fn reap(child: Pid) -> Result<Option<u8>> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                return Ok(Some(u8::try_from(code & 0xff)?));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Ok(Some(u8::try_from(128 + (signal as i32))?));
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => bail!("wait for the container: {error}"),
        }
    }
}

fn execute(task: &Task) -> Result<u8> {
    if task.terminal {
        control_terminal().context("take the terminal")?;
    } else {
        // Already a leader when started by a supervisor that did so: no loss.
        let _ = nix::unistd::setsid();
    }
    if let Some(user) = task.user {
        become_user(user)?;
    }
    std::env::set_current_dir(&task.directory)
        .with_context(|| format!("change to directory {}", task.directory.display()))?;
    replace(task)
}

fn control_terminal() -> nix::Result<()> {
    nix::unistd::setsid()?;
    // SAFETY: TIOCSCTTY takes an integer, no pointer.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
    Ok(())
}

/// Becomes an ordinary user for good: no capability now, none to be had from a file, none from another namespace that
/// matters (a nested user namespace owns no network).
fn become_user(user: User) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    if user.nested {
        unshare(CloneFlags::CLONE_NEWUSER).context("create the pod's user namespace")?;
        sandbox::map_ids(Uid::from_raw(0), Gid::from_raw(0), user.uid)
            .context("map the pod's user")?;
    }
    drop_bounding_set()?;
    if !user.nested {
        nix::unistd::setgroups(&[gid]).context("drop supplementary groups")?;
        nix::unistd::setresgid(gid, gid, gid).context("become the pod's group")?;
        nix::unistd::setresuid(uid, uid, uid).context("become the pod's user")?;
    }
    nix::sys::prctl::set_no_new_privs().context("give up new privileges")
}

fn drop_bounding_set() -> Result<()> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes integers only.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match Errno::result(dropped) {
            Ok(_) => {}
            // The kernel knows no capability of this number: all are done.
            Err(Errno::EINVAL) => break,
            Err(error) => bail!("drop capability {capability}: {error}"),
        }
    }
    Ok(())
}

fn replace(task: &Task) -> Result<u8> {
    let text =
        |text: &str| CString::new(text).with_context(|| format!("{text:?} holds a zero byte"));
    let name = task.command.first().context("the command is empty")?;
    let shown = |word: &String| text(if word == OWN_PROGRAM { "leyline" } else { word });
    let arguments = task.command.iter().map(shown).collect::<Result<Vec<_>>>()?;
    let pairs = task
        .environment
        .iter()
        .map(|(key, value)| text(&format!("{key}={value}")));
    let environment = pairs.collect::<Result<Vec<_>>>()?;
    let mut refused = None;
    for path in candidates(
        name,
        task.environment.get("PATH").map_or("", String::as_str),
    ) {
        let program = CString::new(path.as_os_str().as_bytes())?;
        match nix::unistd::execve(&program, &arguments, &environment) {
            Ok(never) => match never {},
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(error) => refused = refused.or(Some((path, error))),
        }
    }
    explain(name, task, refused)
}

fn explain(name: &str, task: &Task, refused: Option<(PathBuf, Errno)>) -> Result<u8> {
    match (refused, task.user) {
        (Some((path, Errno::EACCES)), Some(user)) => eprintln!(
            "leyline: execute {}: permission denied for user {} (pods do not run as root; securityContext.runAsUser \
             chooses another user)",
            path.display(),
            user.uid
        ),
        (Some((path, error)), _) => eprintln!("leyline: execute {}: {error}", path.display()),
        (None, _) => {
            eprintln!("leyline: execute {name}: not found in PATH");
            return Ok(NOT_FOUND);
        }
    }
    Ok(CANNOT_EXECUTE)
}

fn candidates(name: &str, path: &str) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![name.into()];
    }
    path.split(':')
        .filter(|folder| !folder.is_empty())
        .map(|folder| Path::new(folder).join(name))
        .collect()
}

/// PID 1 of the mesh: everything that lost its parent is reaped here, and when the supervisor (a child) ends, this ends
/// and the kernel ends the rest.
pub(super) fn supervise(body: impl FnOnce() -> Result<u8>) -> Result<u8> {
    in_child(body)
}

/// Mounts that no other process of the machine sees: nothing of the machine's `/run` is touched from here on but what
/// `keep` names.
pub(super) fn private_world(keep: &[PathBuf]) -> Result<()> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("make mounts private")?;
    let held = keep
        .iter()
        .filter(|path| path.starts_with("/run") || path.starts_with("/var/run"));
    let held = held
        .map(|path| Ok((path, File::open(path)?)))
        .collect::<std::io::Result<Vec<_>>>()?;
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        Some("mode=755"),
    )
    .context("mount a private /run")?;
    // Names made in it later are seen by the parts too.
    mount(
        None::<&str>,
        "/run",
        None::<&str>,
        MsFlags::MS_SHARED,
        None::<&str>,
    )
    .context("share /run with the parts")?;
    for (path, file) in held {
        fs::create_dir_all(path)?;
        let from = format!("/proc/self/fd/{}", file.as_raw_fd());
        mount(
            Some(from.as_str()),
            path,
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            None::<&str>,
        )
        .with_context(|| format!("keep {}", path.display()))?;
    }
    // As for containers: an old /proc is good enough where a fresh one is refused.
    let _ = mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        MsFlags::empty(),
        None::<&str>,
    );
    for name in ["hosts", "resolv.conf"] {
        mountable(&Path::new("/etc").join(name), false);
    }
    Ok(())
}

/// Makes something to be mounted on where there is nothing: in `/run`, which is empty, and where `/etc/resolv.conf` often
/// leads. Elsewhere it would be the machine's own folder, which stays as it is.
fn mountable(path: &Path, is_folder: bool) {
    let target = fs::read_link(path).map_or_else(
        |_| path.to_owned(),
        |link| path.parent().unwrap_or(path).join(link),
    );
    let in_run = target.components().any(|part| part.as_os_str() == "run");
    if in_run && !target.exists() {
        // What fails here is told by the mount that follows.
        if is_folder {
            let _ = fs::create_dir_all(&target);
        } else {
            let _ = target.parent().map(fs::create_dir_all);
            let _ = File::create(&target);
        }
    }
}
