//! The processes of a mesh as the machine sees them: what they hold in memory and have spent.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};

use crate::Mesh;

/// A process, by its number on the machine.
#[derive(Clone, Copy, Debug)]
pub struct Process(pub i32);

/// The supervisor of the mesh called `name`: what `leyline-supervisor NAME` runs as, first in its namespace.
pub fn supervisor(name: &str) -> Result<Process> {
    let first = |process: &Process| {
        let status = fs::read_to_string(process.file("status")).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let inner = numbers.and_then(|numbers| numbers.split_whitespace().nth(1));
        inner == Some("1")
            && process
                .words()
                .ends_with(&["leyline-supervisor".to_owned(), name.to_owned()])
    };
    let found = all()?.into_iter().find(first);
    found.with_context(|| format!("no supervisor of the mesh {name} runs"))
}

fn all() -> Result<Vec<Process>> {
    let entries = fs::read_dir("/proc")?.flatten();
    Ok(entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(Process)
        .collect())
}

/// The process with this command line.
pub fn running(words: &[&str]) -> Result<Process> {
    let same = |process: &Process| process.words() == words;
    let found = all()?.into_iter().find(same);
    found.with_context(|| format!("{words:?} does not run"))
}

/// Runs a command of the machine in the network of a pod (`namespace/name`): a firewall's, say.
pub fn in_network_of(mesh: &Mesh, pod: &str, command: &[&str]) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let own = 100_000 + std::process::id();
    let mark = format!("{own}.{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let inside = ["sleep", mark.as_str()];
    let _inside = mesh.spawn(pod, &inside)?;
    let process = mesh.eventually("a process is in the pod", || running(&inside));
    let output = process.in_network(command)?;
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(())
}

/// The tunnels of the mesh whose supervisor is `supervisor`, by the name of their node.
pub fn tunnels(supervisor: Process) -> Result<Vec<(String, Process)>> {
    let own = supervisor.pid_namespace()?;
    let mut found = Vec::new();
    for process in all()? {
        let same = process
            .pid_namespace()
            .is_ok_and(|namespace| namespace == own);
        if let Some(node) = process.environment("NODE_NAME").filter(|_| same)
            && process.is_tunnel()
        {
            found.push((node, process));
        }
    }
    ensure!(
        !found.is_empty(),
        "no tunnel runs in the namespace of {supervisor:?}"
    );
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// The processes of the mesh whose supervisor is `supervisor` that run in a role (`ztunnel`, `waypoint`, `controlplane`).
pub fn of_role(supervisor: Process, role: &str) -> Result<Vec<Process>> {
    let in_role = |process: &Process| {
        let words = process.words();
        words.iter().take(2).any(|word| word.ends_with(role))
    };
    let all = all()?.into_iter();
    Ok(all
        .filter(|process| in_role(process) && process.descends_from(supervisor))
        .collect())
}

/// How deep a process tree is looked at.
const GENERATIONS: usize = 32;

impl Process {
    fn descends_from(self, ancestor: Process) -> bool {
        let mut one = Some(self);
        for _ in 0..GENERATIONS {
            match one {
                Some(process) if process.0 == ancestor.0 => return true,
                Some(process) => one = process.parent(),
                None => return false,
            }
        }
        false
    }

    fn parent(self) -> Option<Process> {
        let text = fs::read_to_string(self.file("status")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        line.trim().parse().ok().map(Process)
    }

    fn file(self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.0).into()
    }

    fn pid_namespace(self) -> Result<PathBuf> {
        // The supervisor is the first process of its namespace: its own link names it.
        Ok(fs::read_link(self.file("ns/pid"))?)
    }

    fn environment(self, name: &str) -> Option<String> {
        let all = fs::read(self.file("environ")).ok()?;
        let text = String::from_utf8_lossy(&all);
        text.split('\0')
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
            .map(str::to_owned)
    }

    fn is_tunnel(self) -> bool {
        self.words()
            .iter()
            .take(2)
            .any(|word| word.ends_with("ztunnel"))
    }

    /// Its command line.
    pub fn words(self) -> Vec<String> {
        let line = fs::read(self.file("cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&line);
        text.trim_end_matches('\0')
            .split('\0')
            .map(str::to_owned)
            .collect()
    }

    /// The folder of the mesh whose supervisor it is, as the machine sees it.
    pub fn runtime(self) -> Result<PathBuf> {
        let name = self.words().pop().context("a supervisor names its mesh")?;
        let user = nix::unistd::geteuid();
        Ok(PathBuf::from(format!("/run/leyline-{user}/{name}")))
    }

    /// Resident memory in bytes.
    pub fn resident(self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    /// The most resident memory that it has had since then, beyond what it has now, in bytes.
    pub fn growth(self) -> Result<impl FnOnce() -> Result<u64>> {
        fs::write(self.file("clear_refs"), "5").context("reset the peak of memory")?;
        let before = self.resident()?;
        Ok(move || Ok(self.memory("VmHWM:")?.saturating_sub(before)))
    }

    fn memory(self, name: &'static str) -> Result<u64> {
        let text = fs::read_to_string(self.file("status"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let line = line.context(name)?;
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes << 10)
    }

    /// Runs a program of this machine in its network namespace.
    pub fn in_network(self, command: &[&str]) -> Result<Output> {
        let mut line = Command::new("nsenter");
        line.arg("--target").arg(self.0.to_string()).arg("--net");
        Ok(line.args(command).output()?)
    }

    /// Open files.
    pub fn files(self) -> Result<usize> {
        Ok(fs::read_dir(self.file("fd"))?.count())
    }

    /// Seconds of processor time, its own and the kernel's for it.
    pub fn cpu(self) -> Result<f64> {
        let text = fs::read_to_string(self.file("stat"))?;
        // The name, in brackets, may hold anything; the 12th and 13th fields after it are utime and stime.
        let after = text.rsplit_once(") ").context("stat")?.1;
        let ticks = after
            .split(' ')
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u32>().ok())
            .map(f64::from);
        // USER_HZ is 100 on every Linux architecture that Rust supports.
        Ok(ticks.sum::<f64>() / 100.0)
    }
}
