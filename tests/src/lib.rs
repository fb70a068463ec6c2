//! The rig: a mesh of two nodes on this machine, driven only by what a user has, the `leyline` command and a folder of YAML.
//!
//! Each [`Mesh`] has its own folder, name and namespaces, and ends with its value, also when a test panics.

pub mod cluster;
pub mod figures;
pub mod process;
pub mod program;
pub mod yaml;

use std::{
    fmt::Display,
    fs,
    io::{BufRead, BufReader, Read},
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

/// How long a condition that the mesh promises within milliseconds may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// The nodes that every mesh of the rig has.
pub const NODES: [&str; 2] = ["node1", "node2"];

/// A running mesh.
pub struct Mesh {
    name: String,
    folder: TempDir,
    stopped: bool,
}

/// Which mesh to start.
#[derive(Default)]
pub struct Options {
    /// Node and path of another ztunnel to run there.
    pub ztunnel: Vec<(String, PathBuf)>,
    /// The mesh's configuration, as YAML.
    pub mesh_config: Option<String>,
}

impl Options {
    /// Tunnels that a shell starts after it has done what `prepare` says: on each node ours, or the program at the path.
    /// Valid as long as the folder.
    pub fn prepared(prepare: &str, ztunnel: &[(&str, Option<PathBuf>)]) -> Result<(TempDir, Self)> {
        let folder = open_folder()?;
        let mut options = Self::default();
        for (node, other) in ztunnel {
            let line = match other {
                None => format!("{} ztunnel", leyline().display()),
                Some(path) => format!("{} proxy ztunnel", path.display()),
            };
            let program = folder.path().join(format!("ztunnel-{node}"));
            program::script(&format!("#!/bin/sh\n{prepare} && exec {line}\n"), &program)?;
            options.ztunnel.push(((*node).to_owned(), program));
        }
        Ok((folder, options))
    }
}

impl Mesh {
    /// A mesh with an empty folder, not started.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "t{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let mesh = Self {
            name,
            folder: open_folder()?,
            stopped: true,
        };
        fs::create_dir(mesh.objects())?;
        fs::set_permissions(mesh.objects(), fs::Permissions::from_mode(0o755))?;
        Ok(mesh)
    }

    /// Starts it, and waits until its parts and the pods are ready.
    pub fn up(&mut self, options: &Options) -> Result<()> {
        let mut command = self.leyline("up");
        command.arg(self.objects()).arg("--detach");
        for (node, path) in &options.ztunnel {
            command
                .arg("--ztunnel")
                .arg(format!("{node}={}", path.display()));
        }
        if let Some(yaml) = &options.mesh_config {
            self.configure(yaml)?;
            command.arg("--mesh-config").arg(self.mesh_config());
        }
        self.stopped = false;
        run(&mut command).with_context(|| self.evidence()).map(drop)
    }

    fn mesh_config(&self) -> PathBuf {
        self.folder.path().join("mesh-config.yaml")
    }

    /// Replaces the mesh's configuration, of a mesh that has one.
    pub fn configure(&self, yaml: &str) -> Result<()> {
        fs::write(self.mesh_config(), yaml).context("write the mesh's configuration")
    }

    /// A command of `leyline local` for this mesh.
    pub fn leyline(&self, command: &str) -> Command {
        let mut line = Command::new(leyline());
        line.args(["local", command, "--name", &self.name])
            .stdin(Stdio::null());
        // The rig must know where the mesh keeps its files.
        line.env_remove("XDG_RUNTIME_DIR");
        line
    }

    /// The folder that the mesh watches.
    pub fn objects(&self) -> PathBuf {
        self.folder.path().join("objects")
    }

    /// Puts a program of the tests where the pods' user may run it; its path.
    pub fn install(&self, program: &str) -> Result<String> {
        let name = Path::new(program)
            .file_name()
            .context("a program has a name")?;
        let path = self.folder.path().join(name);
        if !path.exists() {
            program::copy(Path::new(program), &path)?;
        }
        Ok(path.display().to_string())
    }

    /// Writes a file of the watched folder, at once and whole.
    pub fn write(&self, file: &str, yaml: &str) -> Result<()> {
        let whole = self.folder.path().join(file);
        fs::write(&whole, yaml)?;
        fs::rename(&whole, self.objects().join(file)).with_context(|| format!("write {file}"))
    }

    /// Removes a file of the watched folder.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.objects().join(file)).with_context(|| format!("remove {file}"))
    }

    /// Runs a command in a pod (`namespace/name`) to its end.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<Output> {
        let mut line = self.leyline("exec");
        line.arg(pod).arg("--").args(command);
        line.output().with_context(|| format!("exec in {pod}"))
    }

    /// The same; its output, if it succeeds.
    pub fn succeed(&self, pod: &str, command: &[&str]) -> Result<String> {
        let output = self.exec(pod, command)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{command:?} in {pod}: {}: {text}{}",
            output.status,
            stderr(&output)
        );
        Ok(text)
    }

    /// The same; the line of JSON that it prints.
    pub fn json(&self, pod: &str, command: &[&str]) -> Result<Value> {
        let text = self.succeed(pod, command)?;
        serde_json::from_str(text.trim()).with_context(|| format!("{command:?} printed {text:?}"))
    }

    /// Starts a command in a pod and goes on.
    pub fn spawn(&self, pod: &str, command: &[&str]) -> Result<Running> {
        let mut line = self.leyline("exec");
        line.arg(pod).arg("--").args(command);
        Running::start(&mut line).with_context(|| format!("exec in {pod}"))
    }

    /// `leyline local label`.
    pub fn label(&self, object: &str, label: &str) -> Result<()> {
        run(self.leyline("label").args([object, label])).map(drop)
    }

    /// What a part (`controlplane`, `ztunnel-node1`, ...) or a pod has printed so far.
    pub fn logs(&self, of: &str) -> Result<String> {
        run(self.leyline("logs").arg(of))
    }

    /// `leyline local status`.
    pub fn status(&self) -> Result<Value> {
        let text = run(self.leyline("status").args(["-o", "json"]))?;
        serde_json::from_str(&text).with_context(|| format!("status printed {text:?}"))
    }

    /// The first address of a pod (`namespace/name`).
    pub fn pod_ip(&self, pod: &str) -> Result<IpAddr> {
        Ok(self.pod_ips(pod)?[0])
    }

    /// All addresses of a pod, IPv4 first.
    pub fn pod_ips(&self, pod: &str) -> Result<Vec<IpAddr>> {
        let found = self.pod(pod)?;
        let list = found["ips"]
            .as_array()
            .with_context(|| format!("{pod} has no addresses: {found}"))?;
        let ips = list
            .iter()
            .filter_map(|ip| ip.as_str()?.parse().ok())
            .collect::<Vec<IpAddr>>();
        ensure!(!ips.is_empty(), "{pod} has no address: {found}");
        Ok(ips)
    }

    /// A pod (`namespace/name`) as `status` shows it.
    pub fn pod(&self, pod: &str) -> Result<Value> {
        let status = self.status()?;
        let pods = status["pods"].as_array().context("status has pods")?;
        let named = |value: &&Value| {
            format!("{}/{}", text(&value["namespace"]), text(&value["name"])) == pod
        };
        pods.iter()
            .find(named)
            .cloned()
            .with_context(|| format!("no pod {pod} in {status}"))
    }

    /// A condition of an object, as `status` shows it: `(status, reason, message)`.
    pub fn condition(
        &self,
        kind: &str,
        object: &str,
        condition: &str,
    ) -> Result<(String, String, String)> {
        let status = self.status()?;
        let objects = status["objects"].as_array().context("status has objects")?;
        let named = |value: &&Value| {
            text(&value["kind"]) == kind
                && format!("{}/{}", text(&value["namespace"]), text(&value["name"])) == object
        };
        let found = objects
            .iter()
            .find(named)
            .with_context(|| format!("no {kind} {object} in {status}"))?;
        let conditions = found["conditions"]
            .as_array()
            .context("an object has conditions")?;
        let one = conditions
            .iter()
            .find(|value| text(&value["type"]) == condition);
        let one = one.with_context(|| format!("no condition {condition} in {found}"))?;
        Ok((
            text(&one["status"]),
            text(&one["reason"]),
            text(&one["message"]),
        ))
    }

    /// Kills a part as a crash would; the supervisor starts it again.
    pub fn kill(&self, part: &str) -> Result<()> {
        run(self.leyline("kill").arg(part)).map(drop)
    }

    /// Keeps a part from running, until [`Mesh::resume`].
    pub fn stop(&self, part: &str) -> Result<()> {
        run(self.leyline("kill").args(["--hold", part])).map(drop)
    }

    /// Lets a part run again.
    pub fn resume(&self, part: &str) -> Result<()> {
        run(self.leyline("restart").arg(part)).map(drop)
    }

    /// The mesh's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The mesh's supervisor, as the machine sees it: the first process of its own process namespace.
    pub fn supervisor(&self) -> Result<process::Process> {
        process::supervisor(&self.name)
    }

    /// A copy of the certificate authority's root and key that a pod can read, for the tests that forge certificates.
    pub fn authority(&self) -> Result<String> {
        let supervisor = self.supervisor()?;
        let target = self.folder.path().join("authority.pem");
        fs::copy(supervisor.runtime()?.join("ca/ca.pem"), &target).context("copy the authority")?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644))?;
        Ok(target.display().to_string())
    }

    /// The metrics of a node's tunnel.
    pub fn metrics(&self, node: &str) -> Result<String> {
        self.admin(&format!("ztunnel-{node}"), "/metrics")
    }

    /// What a part's admin port answers for a path.
    pub fn admin(&self, part: &str, path: &str) -> Result<String> {
        run(self.leyline("admin").args([part, path]))
    }

    /// Stops the mesh, and says whether that went well.
    pub fn down(mut self) -> Result<()> {
        self.stopped = true;
        run(&mut self.leyline("down")).map(drop)
    }

    /// Waits until `condition` holds; its last complaint otherwise, with what the parts have logged.
    #[track_caller]
    pub fn eventually<T>(&self, claim: &str, condition: impl FnMut() -> Result<T>) -> T {
        match until(SOON, condition) {
            Ok(value) => value,
            Err(error) => panic!("not in {SOON:?}: {claim}: {error:#}\n{}", self.evidence()),
        }
    }

    /// The ends of the parts' logs, for a failure's message.
    pub fn evidence(&self) -> String {
        let mut text = String::new();
        for part in [
            "controlplane",
            "ztunnel-node1",
            "ztunnel-node2",
            "cni-agent-node1",
            "cni-agent-node2",
        ] {
            let log = self.logs(part).unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(25)..].join("\n");
            text.push_str(&format!("--- {part}\n{tail}\n"));
        }
        text
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if !self.stopped
            && let Err(error) = run(&mut self.leyline("down"))
        {
            eprintln!("down: {error:#}");
        }
    }
}

/// A command that runs in a pod. It is killed with its value.
pub struct Running {
    child: Child,
    /// Ends the programs that end with their input.
    pub stdin: Option<ChildStdin>,
    /// What it prints.
    pub stdout: BufReader<std::process::ChildStdout>,
}

impl Running {
    /// Starts a command, with pipes for all it reads and writes.
    pub fn start(line: &mut Command) -> Result<Self> {
        let mut child = line
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("its output is a pipe")?);
        Ok(Self {
            child,
            stdin,
            stdout,
        })
    }

    /// Its next line; an error when it has ended.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        if line.is_empty() {
            bail!("it has ended: {}", self.complaint());
        }
        Ok(line.trim_end().to_owned())
    }

    /// Its next line, as JSON.
    pub fn json(&mut self) -> Result<Value> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("it printed {line:?}"))
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Closes its input and waits for its end; what else it printed, if it succeeds.
    pub fn finish(mut self) -> Result<String> {
        drop(self.stdin.take());
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {rest}{}", self.complaint());
        Ok(rest)
    }

    fn complaint(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            // What it managed to say is enough.
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again, every 20 ms, until `condition` holds or `deadline` has passed; then its last error.
pub fn until<T>(deadline: Duration, mut condition: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// An error unless `text` holds `part`.
pub fn holds(text: &str, part: impl Display) -> Result<()> {
    let part = part.to_string();
    ensure!(
        text.contains(&part),
        "{part:?} is not in:\n{}",
        last(text, 40)
    );
    Ok(())
}

pub(crate) fn last(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The `leyline` under test: `LEYLINE_BIN`, or what cargo built beside this test.
pub fn leyline() -> PathBuf {
    if let Some(path) = std::env::var_os("LEYLINE_BIN") {
        return path.into();
    }
    // A test stands in target/PROFILE/deps, a program one folder above.
    let own = std::env::current_exe().expect("a program has a path");
    let beside = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("leyline"));
    let built = beside.into_iter().find(|path| path.is_file());
    built.expect("set LEYLINE_BIN, or cargo build -p leyline-cli")
}

/// A folder that the pods' user may enter, unlike a temporary folder's default.
fn open_folder() -> Result<TempDir> {
    let folder = tempfile::Builder::new().prefix("leyline-test-").tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    Ok(folder)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Runs a command to its end; what it prints, if it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        stderr(&output)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
