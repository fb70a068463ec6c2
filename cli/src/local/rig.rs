//! An embedded mesh for programs: started on a folder of its own, looked at and handled from outside, and gone with the
//! value that holds it. The demo and our tests run on it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use parking_lot::Mutex;
use serde_json::Value;

use super::{
    client::{Client, parse_labels},
    logs,
    objects::Key,
    parts::Action,
    protocol::{Request, Status},
};

/// What mesh to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `leyline` program.
    pub program: PathBuf,
    /// How many nodes.
    pub nodes: u8,
    /// Programs to run as a node's tunnel instead of our own, by node.
    pub tunnels: BTreeMap<String, PathBuf>,
    /// The folder's files at the start, by name.
    pub files: BTreeMap<String, String>,
    /// Environment of the mesh's own processes beside what is inherited; `RUST_LOG`, say.
    pub environment: BTreeMap<String, String>,
}

impl Options {
    /// Two nodes, nothing on them.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            nodes: 2,
            tunnels: BTreeMap::new(),
            files: BTreeMap::new(),
            environment: BTreeMap::new(),
        }
    }

    /// With one more file.
    #[must_use]
    pub fn file(mut self, name: &str, yaml: &str) -> Self {
        self.files.insert(name.to_owned(), yaml.to_owned());
        self
    }
}

/// A running mesh.
#[derive(Debug)]
pub struct Rig {
    child: Child,
    /// While it is open the mesh goes on: when we are killed, the mesh ends too.
    hold: Option<ChildStdin>,
    client: Client,
    folder: tempfile::TempDir,
    said: Arc<Mutex<Vec<String>>>,
}

/// How a command in a pod ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: u8,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Output {
    /// Whether it ended with 0.
    pub fn succeeded(&self) -> bool {
        self.code == 0
    }
}

/// The longest that starting may take.
const START: Duration = Duration::from_secs(60);
/// The longest that a command may take.
const COMMAND: Duration = Duration::from_secs(60);

impl Rig {
    /// Starts a mesh and waits until it is up.
    pub fn start(options: &Options) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let folder = tempfile::Builder::new()
            .prefix("leyline-")
            .tempdir()
            .context("make a folder")?;
        // Rootless or not, the supervisor reads it; nobody else needs to.
        for (name, text) in &options.files {
            fs::write(folder.path().join(name), text).with_context(|| format!("write {name}"))?;
        }
        let name = format!(
            "rig-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let mut command = Command::new(&options.program);
        command.args([
            "local",
            "up",
            "--until-input-ends",
            "--name",
            &name,
            "--nodes",
            &options.nodes.to_string(),
        ]);
        for (node, program) in &options.tunnels {
            command
                .arg("--ztunnel")
                .arg(format!("{node}={}", program.display()));
        }
        command.arg(folder.path()).envs(&options.environment);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("start {}", options.program.display()))?;
        let said = Arc::<Mutex<Vec<String>>>::default();
        collect(child.stdout.take(), &said);
        collect(child.stderr.take(), &said);
        let hold = child.stdin.take();
        let client = await_up(&mut child, &said, &name);
        let client = client.inspect_err(|_| end(&mut child))?;
        Ok(Self {
            child,
            hold,
            client,
            folder,
            said,
        })
    }

    /// The folder that the mesh follows.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file of the folder in one step.
    pub fn write(&self, name: &str, yaml: &str) -> Result<()> {
        super::runtime::write_atomically(&self.folder().join(name), yaml.as_bytes())
            .with_context(|| format!("write {name}"))
    }

    /// Removes a file of the folder.
    pub fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.folder().join(name)).with_context(|| format!("remove {name}"))
    }

    /// The mesh's name, for `leyline local --name`.
    pub fn name(&self) -> &str {
        self.client.name()
    }

    /// What `up` has printed so far.
    pub fn said(&self) -> String {
        self.said.lock().join("\n")
    }

    /// Everything about the mesh.
    pub fn status(&self) -> Result<Status> {
        self.client.status()
    }

    /// Changes labels as `leyline local label` does: `key=value`, `key-`.
    pub fn label(&self, target: &str, labels: &[&str]) -> Result<()> {
        let labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
        self.client.ask(&Request::Label {
            target: target.to_owned(),
            labels: parse_labels(&labels)?,
        })?;
        Ok(())
    }

    /// Does something to a part.
    pub fn part(&self, part: &str, action: Action) -> Result<()> {
        self.client.ask(&Request::Part {
            part: part.to_owned(),
            action,
        })?;
        Ok(())
    }

    /// Runs a command in a pod (`NAMESPACE/POD`) or on a node, and waits for its end.
    pub fn exec(&self, target: &str, command: &[&str]) -> Result<Output> {
        self.spawn(target, command)?.finish(COMMAND)
    }

    /// Starts a command in a pod or on a node.
    pub fn spawn(&self, target: &str, command: &[&str]) -> Result<Running> {
        Running::start(&self.client, target, command)
    }

    /// Asks a part: `GET` of a path on its admin (or `metrics`, `ready`) endpoint. The status and the body.
    pub fn get(&self, part: &str, endpoint: &str, path: &str) -> Result<(u64, String)> {
        self.admin(part, endpoint, "GET", path)
    }

    /// Asks a part with any method.
    pub fn admin(
        &self,
        part: &str,
        endpoint: &str,
        method: &str,
        path: &str,
    ) -> Result<(u64, String)> {
        let [part, endpoint, method, path] = [part, endpoint, method, path].map(str::to_owned);
        let answer = self.client.ask(&Request::Admin {
            part,
            endpoint,
            method,
            path,
        })?;
        Ok((
            answer["status"].as_u64().unwrap_or(0),
            answer["body"].as_str().unwrap_or_default().to_owned(),
        ))
    }

    /// The log of a part.
    pub fn part_log(&self, part: &str) -> String {
        logs::tail(&self.client.runtime().part_log(part), None).unwrap_or_default()
    }

    /// The log of a pod's container.
    pub fn pod_log(&self, namespace: &str, pod: &str, container: &str) -> String {
        logs::tail(
            &self
                .client
                .runtime()
                .container_log(&Key::new(namespace, pod), container),
            None,
        )
        .unwrap_or_default()
    }

    /// Waits until the status is as wanted: how long it took. An error after `limit`, with what was seen last.
    pub fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Status) -> bool,
    ) -> Result<Duration> {
        until(what, limit, || {
            let status = self.status()?;
            if wanted(&status) {
                Ok(None)
            } else {
                Ok(Some(brief(&status)))
            }
        })
    }

    /// Waits until every pod of a namespace is in the mesh (`yes`) or out of it (`no`).
    pub fn wait_for_mesh(&self, namespace: &str, mesh: &str, limit: Duration) -> Result<Duration> {
        let what = format!("pods of {namespace}: mesh = {mesh}");
        self.wait_for(&what, limit, |status| {
            let mut pods = status
                .pods
                .iter()
                .filter(|pod| pod.namespace == namespace)
                .peekable();
            pods.peek().is_some() && pods.all(|pod| pod.mesh == mesh)
        })
    }

    /// Waits until every pod is ready.
    pub fn wait_ready(&self, limit: Duration) -> Result<Duration> {
        self.wait_for("every pod ready", limit, |status| {
            status.pods.iter().all(|pod| pod.ready)
        })
    }

    /// What is worth reading after a failure: the ends of all logs.
    pub fn logs(&self) -> String {
        let files = fs::read_dir(self.client.runtime().logs())
            .into_iter()
            .flatten()
            .flatten();
        let mut paths: Vec<PathBuf> = files.map(|entry| entry.path()).collect();
        paths.sort();
        let tail = |path: &PathBuf| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            format!(
                "==> {name}\n{}",
                logs::tail(path, Some(40)).unwrap_or_default()
            )
        };
        paths.iter().map(tail).collect()
    }

    /// Stops the mesh and waits until it has ended.
    pub fn stop(mut self) -> Result<()> {
        drop(self.hold.take());
        let ended = until("the mesh to end", Duration::from_secs(20), || {
            Ok(self
                .child
                .try_wait()?
                .is_none()
                .then(|| "it still runs".to_owned()))
        });
        ended.map(drop)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}\n{}", self.said(), self.logs());
        }
        drop(self.hold.take());
        let gone = until("", Duration::from_secs(10), || {
            Ok(self.child.try_wait()?.is_none().then(String::new))
        });
        if gone.is_err() {
            end(&mut self.child);
        }
    }
}

fn end(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = child.wait();
}

fn collect(from: Option<impl Read + Send + 'static>, lines: &Arc<Mutex<Vec<String>>>) {
    let lines = lines.clone();
    if let Some(from) = from {
        thread::spawn(move || {
            BufReader::new(from)
                .lines()
                .map_while(Result::ok)
                .for_each(|line| lines.lock().push(line));
        });
    }
}

fn await_up(child: &mut Child, said: &Mutex<Vec<String>>, name: &str) -> Result<Client> {
    let up = until("the mesh to come up", START, || {
        if said
            .lock()
            .iter()
            .any(|line| line.starts_with("The mesh is up"))
        {
            return Ok(None);
        }
        if child.try_wait()?.is_some() {
            bail!("the mesh did not come up:\n{}", said.lock().join("\n"));
        }
        Ok(Some(said.lock().join("\n")))
    });
    up.and_then(|_| Client::named(name))
}

/// Asks until `missing` answers that nothing is: how long it took. An error after `limit`, with what was missing last.
pub fn until(
    what: &str,
    limit: Duration,
    mut missing: impl FnMut() -> Result<Option<String>>,
) -> Result<Duration> {
    let started = Instant::now();
    loop {
        let Some(last) = missing()? else {
            return Ok(started.elapsed());
        };
        if started.elapsed() > limit {
            bail!("waited {limit:?} for {what}; last seen: {last}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn brief(status: &Status) -> String {
    let pods = status.pods.iter().map(|pod| {
        format!(
            "{}/{} ready={} mesh={} {}",
            pod.namespace,
            pod.name,
            pod.ready,
            pod.mesh,
            pod.reason.as_deref().unwrap_or("")
        )
    });
    let parts = status
        .parts
        .iter()
        .filter(|(_, part)| !part.ready)
        .map(|(name, part)| format!("{name}: {:?}", part.reason));
    pods.chain(parts).collect::<Vec<_>>().join("; ")
}

/// A command that runs in a pod or on a node. Dropped, it is ended.
#[derive(Debug)]
pub struct Running {
    input: Option<File>,
    stdout: Arc<Mutex<Vec<String>>>,
    stderr: Arc<Mutex<Vec<String>>>,
    code: Arc<Mutex<Option<Result<u8, String>>>>,
    connection: std::os::unix::net::UnixStream,
}

impl Running {
    fn start(client: &Client, target: &str, command: &[&str]) -> Result<Self> {
        let (input, input_here) = nix::unistd::pipe().context("make a pipe")?;
        let (output_here, output) = nix::unistd::pipe().context("make a pipe")?;
        let (error_here, error) = nix::unistd::pipe().context("make a pipe")?;
        let request = Request::Exec {
            target: target.to_owned(),
            container: None,
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            terminal: false,
            term: None,
        };
        let connection = client.start_exec(&request, [&input, &output, &error])?;
        drop((input, output, error));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = [
            (File::from(output_here), Arc::clone(&stdout)),
            (File::from(error_here), Arc::clone(&stderr)),
        ];
        let code = Arc::<Mutex<Option<Result<u8, String>>>>::default();
        let (waiting, ended) = (connection.try_clone()?, code.clone());
        thread::spawn(move || {
            let copies = readers.map(|(from, to): (File, Arc<Mutex<Vec<String>>>)| {
                thread::spawn(move || {
                    let lines = BufReader::new(from).split(b'\n').map_while(Result::ok);
                    lines.for_each(|line| {
                        to.lock().push(String::from_utf8_lossy(&line).into_owned())
                    });
                })
            });
            let answer = Client::finish_exec(&waiting);
            copies.into_iter().for_each(|copy| drop(copy.join()));
            *ended.lock() = Some(answer.map_err(|error| format!("{error:#}")));
        });
        Ok(Self {
            input: Some(input_here.into()),
            stdout,
            stderr,
            code,
            connection,
        })
    }

    /// The lines it has printed so far.
    pub fn lines(&self) -> Vec<String> {
        self.stdout.lock().clone()
    }

    /// Writes to its standard input.
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.input
            .as_mut()
            .context("its input is closed")?
            .write_all(text.as_bytes())
            .context("write to the command")
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        self.code.lock().is_none()
    }

    /// Closes its standard input and waits for its end.
    pub fn finish(mut self, limit: Duration) -> Result<Output> {
        self.close_input();
        until("the command to end", limit, || {
            Ok(self.is_running().then(|| self.lines().join("\n")))
        })?;
        let code = self
            .code
            .lock()
            .clone()
            .context("an ended command has a code")?;
        let text = |lines: &Mutex<Vec<String>>| {
            lines
                .lock()
                .iter()
                .map(|line| format!("{line}\n"))
                .collect()
        };
        match code {
            Ok(code) => Ok(Output {
                code,
                stdout: text(&self.stdout),
                stderr: text(&self.stderr),
            }),
            Err(error) => bail!(error),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.connection.shutdown(std::net::Shutdown::Both);
    }
}

/// The conditions that the control plane reports of an object, by type: status, reason and message.
pub fn conditions(
    status: &Status,
    kind: &str,
    namespace: &str,
    name: &str,
) -> BTreeMap<String, (String, String, String)> {
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let object = status.objects.iter().find(|object| {
        text(object, "kind") == kind
            && text(object, "namespace") == namespace
            && text(object, "name") == name
    });
    let conditions = object
        .and_then(|object| object["conditions"].as_array())
        .into_iter()
        .flatten();
    conditions
        .map(|condition| {
            let told = (
                text(condition, "status"),
                text(condition, "reason"),
                text(condition, "message"),
            );
            (text(condition, "type"), told)
        })
        .collect()
}
