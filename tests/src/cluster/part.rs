//! The processes of a cluster, by what is recorded of them: a later call, also of another process, finds and ends exactly these.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::until;

/// Which of a process's namespaces to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Enter {
    /// All that it has: mounts, network, processes and host name.
    All,
    /// Its network alone.
    Network,
    /// Its processes alone: what runs there ends with it, but sees the machine.
    Processes,
}

/// A process to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Its name among the cluster's parts, and its log's.
    pub name: String,
    /// The part whose namespaces it runs in, and which of them.
    pub inside: Option<(String, Enter)>,
    /// Folders of the cgroup hierarchies to run in.
    pub cgroups: Vec<PathBuf>,
    /// Program and arguments.
    pub line: Vec<String>,
    /// Its whole environment: nothing of ours is passed on.
    pub environment: BTreeMap<String, String>,
}

/// A process that was started.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: i32,
    /// Ticks from boot to its start: a number that is used again is another process's.
    started: u64,
    spec: Spec,
}

/// The records of a cluster's processes, a file each.
#[derive(Clone, Debug)]
pub struct Parts {
    records: PathBuf,
    logs: PathBuf,
}

impl Parts {
    /// Those below a cluster's folder.
    pub fn new(state: &Path) -> Self {
        Self {
            records: state.join("parts"),
            logs: state.join("log"),
        }
    }

    /// Starts a process and records it. Its output is added to `log/NAME.log`.
    pub fn start(&self, spec: Spec) -> Result<()> {
        let name = spec.name.clone();
        self.try_start(spec)
            .with_context(|| format!("start {name}"))
    }

    fn try_start(&self, spec: Spec) -> Result<()> {
        let child = self.spawn(&spec)?;
        let pid = i32::try_from(child.id())?;
        self.record(child, pid, spec)
    }

    /// Starts and records a process in namespaces of its own, of which it is the first: all that runs there ends with it.
    pub fn start_apart(&self, mut spec: Spec) -> Result<()> {
        let line = [
            "/usr/bin/unshare",
            "--mount",
            "--net",
            "--pid",
            "--uts",
            "--fork",
            "--kill-child",
            "--propagation=private",
        ];
        let mut line = line.map(str::to_owned).to_vec();
        line.append(&mut spec.line);
        spec.line = line;
        let name = spec.name.clone();
        let outer = self.spawn(&spec).with_context(|| format!("start {name}"))?;
        let pid = outer.id();
        // `unshare` stays outside, and waits: it is the parent of the one that counts.
        let inner = until(Duration::from_secs(20), || {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            let child = children.split_whitespace().next();
            Ok(child.context("nothing runs apart yet")?.parse()?)
        })?;
        self.record(outer, inner, spec)
    }

    fn spawn(&self, spec: &Spec) -> Result<Child> {
        let command = self.command(spec)?;
        match &spec.inside {
            None => spawn(command),
            Some((holder, enter)) => inside(self.pid(holder)?, *enter, || spawn(command)),
        }
    }

    /// The command of a part. Its log is opened here, as a node does not see the folder.
    fn command(&self, spec: &Spec) -> Result<Command> {
        fs::create_dir_all(&self.logs)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.logs.join(format!("{}.log", spec.name)))?;
        let (program, arguments) = spec.line.split_first().context("a program")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(&spec.environment)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        Ok(command)
    }

    fn record(&self, mut child: Child, pid: i32, spec: Spec) -> Result<()> {
        for folder in &spec.cgroups {
            fs::write(folder.join("cgroup.procs"), pid.to_string())
                .with_context(|| format!("put {} in {}", spec.name, folder.display()))?;
        }
        let started = started(pid).with_context(|| format!("{} has ended", spec.name))?;
        let path = self.file(&spec.name);
        let record = Record { pid, started, spec };
        fs::create_dir_all(&self.records)?;
        fs::write(&path, serde_json::to_vec_pretty(&record)?)?;
        // Whoever started it reaps it.
        thread::spawn(move || child.wait());
        Ok(())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.records.join(format!("{name}.json"))
    }

    fn read(&self, name: &str) -> Result<Record> {
        let bytes = fs::read(self.file(name)).with_context(|| format!("no part {name}"))?;
        serde_json::from_slice(&bytes).with_context(|| format!("the record of {name}"))
    }

    /// The process of a part that runs.
    pub fn pid(&self, name: &str) -> Result<i32> {
        let record = self.read(name)?;
        ensure!(record.runs(), "{name} does not run");
        Ok(record.pid)
    }

    /// Whether it runs.
    pub fn runs(&self, name: &str) -> bool {
        self.pid(name).is_ok()
    }

    /// The names of all parts that were ever started.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.records) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
            .collect();
        names.sort();
        names
    }

    /// Kills a part, as a crash would, and waits for its end. One that does not run is left alone.
    pub fn kill(&self, name: &str) -> Result<()> {
        let record = self.read(name)?;
        if !record.runs() {
            return Ok(());
        }
        match kill(Pid::from_raw(record.pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => bail!("kill {name}: {error}"),
        }
        until(Duration::from_secs(20), || {
            ensure!(!record.runs(), "{name} ({}) does not end", record.pid);
            Ok(())
        })
    }

    /// Starts a part again, as it was started before.
    pub fn restart(&self, name: &str) -> Result<()> {
        let record = self.read(name)?;
        ensure!(!record.runs(), "{name} runs");
        self.start(record.spec)
    }
}

impl Record {
    fn runs(&self) -> bool {
        started(self.pid) == Some(self.started)
    }
}

/// When a process started, in ticks from boot; nothing where it has ended, also where nobody has asked for its end yet.
fn started(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the name, in brackets, may hold anything; the state follows it, and the start is the 20th from there.
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z" && state != "X").then_some(started)
}

/// A process whose cgroup's path holds `text`.
pub fn find_by_cgroup(text: &str) -> Option<i32> {
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers.into_iter().find(|pid| {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"));
        cgroups.is_ok_and(|cgroups| cgroups.contains(text))
    })
}

fn spawn(mut command: Command) -> Result<Child> {
    command.spawn().with_context(|| format!("{command:?}"))
}

/// Runs `action` on a thread that has entered namespaces of the process `pid`; so does what it starts.
pub fn inside<T: Send>(
    pid: i32,
    enter: Enter,
    action: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let open = |kind: &str| {
        File::open(format!("/proc/{pid}/ns/{kind}")).with_context(|| format!("process {pid}"))
    };
    // Opened before the first is entered, after which /proc may be another.
    let kinds: &[(&str, CloneFlags)] = match enter {
        Enter::All => &[
            ("pid", CloneFlags::CLONE_NEWPID),
            ("net", CloneFlags::CLONE_NEWNET),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ],
        Enter::Network => &[("net", CloneFlags::CLONE_NEWNET)],
        Enter::Processes => &[("pid", CloneFlags::CLONE_NEWPID)],
    };
    let files = kinds
        .iter()
        .map(|(kind, flag)| Ok((open(kind)?, *flag)))
        .collect::<Result<Vec<_>>>()?;
    on_a_thread(move || {
        // A mount namespace is only for a thread whose root and folder are its own.
        unshare(CloneFlags::CLONE_FS)?;
        for (file, flag) in files {
            setns(file, flag).context("enter a namespace")?;
        }
        action()
    })
}

/// A thread takes the change of namespace with it when it ends.
fn on_a_thread<T: Send>(action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(action).join())
        .map_err(|_| anyhow!("a thread of the rig panicked"))?
}
