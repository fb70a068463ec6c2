//! What the cluster's suite runs on: one cluster with the mesh installed, shared by all tests of a run. It is the user's where
//! KUBECONFIG names one, the rig's that runs where LEYLINE_CLUSTER says so, and else one of its own, which ends with the run.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    io::{self, Write as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Cluster, HUB, default_state, kubectl::Kube, machine, plan::Settings};
use crate::{Running, run, until};

/// The mesh's own namespace.
pub const SYSTEM: &str = "istio-system";

/// How long something that the mesh promises within a second may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

/// The shared cluster.
pub struct Bed {
    kube: Kube,
    helm: PathBuf,
    rig: Option<Cluster>,
    nodes: Vec<String>,
    /// Takes the cluster down when this process has ended, in whatever way.
    _keeper: Option<Child>,
}

/// Tests that change nothing that others see hold it for reading; those that break the cluster or the mesh, for writing.
static TURN: RwLock<()> = RwLock::new(());
static BED: OnceLock<Result<Bed, String>> = OnceLock::new();

/// The bed, for a test that keeps to its own namespaces. Other such tests run at the same time.
pub fn shared() -> Result<(RwLockReadGuard<'static, ()>, &'static Bed)> {
    // A test that failed has left nothing that others rely on.
    let turn = TURN.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    Ok((turn, bed()?))
}

/// The bed, for a test that breaks what others stand on, and mends it.
pub fn alone() -> Result<(RwLockWriteGuard<'static, ()>, &'static Bed)> {
    let turn = TURN
        .write()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    Ok((turn, bed()?))
}

fn bed() -> Result<&'static Bed> {
    let made = BED.get_or_init(|| Bed::start().map_err(|error| format!("{error:#}")));
    made.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// Says that a test is not run here, and how many that makes; also where the harness keeps what passing tests print to itself.
pub fn not_run(test: &str, why: &str) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    let line = format!("NOT RUN ({count} so far): {test}: {why}\n");
    // Nobody is left to be told.
    let _ = io::stderr().write_all(line.as_bytes());
}

impl Bed {
    fn start() -> Result<Self> {
        let began = Instant::now();
        let mut bed = match std::env::var_os("KUBECONFIG") {
            Some(path) if std::env::var_os("LEYLINE_CLUSTER").is_none() => {
                Self::of_user(path.into())
            }
            _ => Self::of_rig()?,
        };
        let nodes = bed.kube.json(&["nodes"])?;
        let nodes = nodes["items"].as_array().context("a list of nodes")?;
        bed.nodes = nodes
            .iter()
            .map(|node| text(&node["metadata"]["name"]))
            .collect();
        bed.nodes.sort();
        eprintln!("cluster: up after {:.1} s", began.elapsed().as_secs_f64());
        bed.define_gateway_api()?;
        bed.install(&[])?;
        eprintln!("cluster: mesh after {:.1} s", began.elapsed().as_secs_f64());
        Ok(bed)
    }

    fn of_user(kubeconfig: PathBuf) -> Self {
        Self {
            kube: Kube::new("kubectl".into(), kubeconfig),
            helm: "helm".into(),
            rig: None,
            nodes: Vec::new(),
            _keeper: None,
        }
    }

    fn of_rig() -> Result<Self> {
        let state = default_state()?;
        let running = Cluster::attach(&state).ok();
        let mut keeper = None;
        let cluster = match running.filter(|_| std::env::var_os("LEYLINE_CLUSTER").is_some()) {
            Some(cluster) => {
                // It may have an older one of the tests' own image.
                cluster.load(&machine::images(cluster.programs())?)?;
                cluster
            }
            None => {
                // What a crashed run has left goes first, running or not.
                Cluster::down(&state)?;
                keeper = Some(keep(&state)?);
                Cluster::up(&state, Settings::default())?
            }
        };
        Ok(Self {
            kube: cluster.kube(),
            helm: cluster.programs().join("helm"),
            rig: Some(cluster),
            nodes: Vec::new(),
            _keeper: keeper,
        })
    }

    /// kubectl.
    pub fn kube(&self) -> &Kube {
        &self.kube
    }

    /// The nodes' names, sorted.
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// The cluster's own machinery, where it is the rig's; otherwise says by name what is not run.
    pub fn rig(&self, test: &str) -> Option<&Cluster> {
        if self.rig.is_none() {
            not_run(
                test,
                "it needs the rig's own nodes, and KUBECONFIG names another cluster",
            );
        }
        self.rig.as_ref()
    }

    /// A node for clients, and another for servers where there is one.
    pub fn node(&self, index: usize) -> &str {
        &self.nodes[index % self.nodes.len()]
    }

    /// Image archives, onto every node of the rig; a user has loaded them.
    pub fn load(&self, archives: &[PathBuf]) -> Result<()> {
        match &self.rig {
            Some(rig) => rig.load(archives),
            None => Ok(()),
        }
    }

    // --- the mesh

    /// The Gateway API's own definitions of its kinds, which clusters have before a mesh; a user's cluster has its own.
    fn define_gateway_api(&self) -> Result<()> {
        if self.rig.is_none() {
            let found = self
                .kube
                .run(&["get", "crd", "httproutes.gateway.networking.k8s.io"]);
            return found
                .map(drop)
                .context("the cluster of KUBECONFIG needs the Gateway API's own definitions");
        }
        let folder = machine::built("crds")?.display().to_string();
        self.kube
            .run(&["apply", "--server-side", "--force-conflicts", "-f", &folder])?;
        let established = "--for=condition=Established";
        self.kube
            .run(&["wait", "crd", "--all", established, "--timeout=120s"])
            .map(drop)
    }

    /// `leyline install`, with more values (`name=value`), which waits until every part is ready. On the rig, the images are
    /// made from the `leyline` under test first; a user has loaded them (deploy/images/build).
    pub fn install(&self, values: &[&str]) -> Result<()> {
        if self.rig.is_some() {
            self.load(&mesh_images()?)?;
        }
        self.leyline_install(values, &[])
    }

    /// The same, of the control plane of another revision beside the mesh.
    pub fn install_revision(&self, revision: &str) -> Result<()> {
        self.leyline_install(&[], &["--revision", revision])
    }

    fn leyline_install(&self, values: &[&str], flags: &[&str]) -> Result<()> {
        let helm = self.helm.display().to_string();
        let mut line = words(&["install", "--yes", "--readiness-timeout", "5m", "--helm"]);
        line.push(helm);
        line.extend(words(flags));
        for value in chart_values(values) {
            line.extend(["--set".to_owned(), value]);
        }
        self.leyline(&line)
            .map(drop)
            .with_context(|| self.evidence())
    }

    /// `leyline uninstall --revision`.
    pub fn uninstall_revision(&self, revision: &str) -> Result<()> {
        let helm = self.helm.display().to_string();
        let line = [
            "uninstall",
            "--yes",
            "--helm",
            &helm,
            "--revision",
            revision,
        ];
        self.leyline(&line).map(drop)
    }

    /// `helm upgrade --install`, without waiting.
    pub fn helm(&self, values: &[&str]) -> Result<()> {
        let mut helm = self.helm_command("upgrade");
        helm.args(["--install", "--create-namespace", "leyline"])
            .arg(machine::repository().join("deploy/charts/leyline"));
        for value in chart_values(values) {
            helm.args(["--set", &value]);
        }
        run(&mut helm).map(drop)
    }

    /// `helm uninstall`, to its end.
    pub fn uninstall(&self) -> Result<()> {
        run(self.helm_command("uninstall").args(["leyline", "--wait"])).map(drop)
    }

    fn helm_command(&self, command: &str) -> Command {
        let mut helm = Command::new(&self.helm);
        helm.arg(command)
            .args(["--namespace", SYSTEM])
            .arg("--kubeconfig")
            .arg(self.kube.kubeconfig())
            .stdin(Stdio::null());
        helm
    }

    /// Runs `leyline` against the cluster; what it prints.
    pub fn leyline<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<String> {
        run(&mut self.leyline_command(arguments))
    }

    /// The same, for a command whose exit status is an answer: its output, and whether it says that all is well.
    pub fn ask_leyline<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<(bool, Value)> {
        let mut leyline = self.leyline_command(arguments);
        let output = leyline.args(["--output", "json"]).output()?;
        let value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{leyline:?}: {}", crate::stderr(&output)))?;
        Ok((output.status.success(), value))
    }

    fn leyline_command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut leyline = Command::new(crate::leyline());
        leyline
            .args(arguments)
            .arg("--kubeconfig")
            .arg(self.kube.kubeconfig())
            .stdin(Stdio::null());
        leyline
    }

    /// The pod of a DaemonSet of the mesh (`ztunnel`, `istio-cni-node`) on a node: the newest.
    pub fn daemon(&self, daemon_set: &str, node: &str) -> Result<String> {
        let label = match daemon_set {
            "istio-cni-node" => "k8s-app=istio-cni-node",
            _ => "app=ztunnel",
        };
        let on = format!("--field-selector=spec.nodeName={node}");
        let pods = self.kube.json(&["pods", "-n", SYSTEM, "-l", label, &on])?;
        let pods = pods["items"].as_array().context("a list of pods")?;
        let born = |pod: &&Value| text(&pod["metadata"]["creationTimestamp"]);
        let newest = pods.iter().max_by_key(born);
        let newest = newest.with_context(|| format!("no {daemon_set} on {node}"))?;
        Ok(text(&newest["metadata"]["name"]))
    }

    /// What the node tunnel of a node has printed.
    pub fn ztunnel_log(&self, node: &str) -> Result<String> {
        let pod = self.daemon("ztunnel", node)?;
        self.kube.run(&["-n", SYSTEM, "logs", &pod, "--tail=2000"])
    }

    // --- pods and traffic

    /// Runs a command of the tests' image in a pod (`namespace/name`) and goes on. On the rig it is started in the pod's network
    /// from outside, so that it lives on while the API server is down.
    pub fn spawn(&self, pod: &str, line: &[&str]) -> Result<Running> {
        match &self.rig {
            Some(rig)
                if line.first() == Some(&"load") && !line.iter().any(|word| is_name(word)) =>
            {
                let program = machine::beside("load")?;
                let mut command = Command::new(program);
                command.args(&line[1..]);
                rig.in_pod(&self.kube, pod, || Running::start(&mut command))
            }
            _ => self.kube.spawn(pod, line),
        }
    }

    /// New connections to an address, `rate` a second, until [`Traffic::finish`].
    pub fn new_connections(&self, pod: &str, address: &str, rate: u32) -> Result<Traffic> {
        let rate = rate.to_string();
        let line = [
            "load",
            "connect",
            address,
            "--seconds",
            "0",
            "--parallel",
            "8",
            "--rate",
            &rate,
        ];
        Ok(Traffic(self.spawn(pod, &line)?))
    }

    /// Connections to an address that stay open and speak all the time, until [`Traffic::finish`]. All are open on return.
    pub fn held_connections(&self, pod: &str, address: &str, count: u32) -> Result<Traffic> {
        let count = count.to_string();
        let mut running = self.spawn(pod, &["load", "live", address, "--connections", &count])?;
        running.json()?;
        Ok(Traffic(running))
    }

    /// One connection over which a few bytes go to and fro; an error when it is refused or cut.
    pub fn ping(&self, pod: &str, address: &str) -> Result<()> {
        let line = ["load", "ping", address, "--count", "3"];
        self.kube.succeed(pod, &line).map(drop)
    }

    /// An error if the pod reaches the address.
    pub fn refused(&self, pod: &str, address: &str) -> Result<()> {
        let output = self
            .kube
            .exec(pod, &["load", "ping", address, "--count", "1"])?;
        ensure!(!output.status.success(), "{pod} reached {address}");
        Ok(())
    }

    /// An address of a pod (`namespace/name`).
    pub fn pod_ip(&self, pod: &str) -> Result<String> {
        let (namespace, name) = pod.split_once('/').context("namespace/name")?;
        let found = self.kube.json(&["pod", "-n", namespace, name])?;
        let ip = text(&found["status"]["podIP"]);
        ensure!(!ip.is_empty(), "{pod} has no address");
        Ok(ip)
    }

    // --- waiting, and what to show when it was in vain

    /// Waits until `condition` holds; its last complaint otherwise, with what the parts have logged.
    #[track_caller]
    pub fn eventually<T>(&self, claim: &str, condition: impl FnMut() -> Result<T>) -> T {
        match until(SOON, condition) {
            Ok(value) => value,
            Err(error) => panic!("not in {SOON:?}: {claim}: {error:#}\n{}", self.evidence()),
        }
    }

    fn namespaces_of_waypoints(&self) -> BTreeSet<String> {
        let found = self.kube.json(&["gateways", "-A"]);
        let items = found
            .map(|found| found["items"].clone())
            .unwrap_or_default();
        let items = items.as_array().cloned().unwrap_or_default();
        let namespaces = items
            .iter()
            .map(|item| text(&item["metadata"]["namespace"]));
        namespaces.collect()
    }

    /// The ends of the parts' logs, what is amiss with pods, and the last events.
    pub fn evidence(&self) -> String {
        let mut shown = String::new();
        let mut show = |title: &str, arguments: &[&str], lines: usize| {
            let all = self.kube.run(arguments);
            let all = all.unwrap_or_else(|error| format!("{error:#}"));
            shown.push_str(&format!("--- {title}\n{}\n", crate::last(&all, lines)));
        };
        show("pods", &["get", "pods", "-A", "-o", "wide"], 60);
        let events = ["get", "events", "-A", "--sort-by=.lastTimestamp"];
        show("events", &events, 20);
        for label in ["app=istiod", "k8s-app=istio-cni-node", "app=ztunnel"] {
            let logs = ["-n", SYSTEM, "logs", "-l", label, "--tail=25", "--prefix"];
            show(label, &logs, 60);
        }
        for namespace in self.namespaces_of_waypoints() {
            let label = "gateway.networking.k8s.io/gateway-name";
            let logs = [
                "-n",
                &namespace,
                "logs",
                "-l",
                label,
                "--tail=25",
                "--prefix",
            ];
            show(&format!("waypoints of {namespace}"), &logs, 60);
        }
        shown
    }
}

/// Load that runs in a pod.
pub struct Traffic(Running);

impl Traffic {
    /// Ends it; what came of it, as `load` prints it.
    pub fn finish(self) -> Result<Value> {
        let text = self.0.finish()?;
        serde_json::from_str(text.trim()).with_context(|| format!("load printed {text:?}"))
    }

    /// Ends new connections: an error if one failed, or if fewer than `least` were made. How many there were.
    pub fn none_failed(self, least: u64) -> Result<u64> {
        let found = self.finish()?;
        let made = found["connections"].as_u64().context("a number")?;
        ensure!(
            found["failed"] == 0 && made >= least,
            "new connections (at least {least} expected): {found}"
        );
        Ok(made)
    }

    /// Ends held connections: how many there were, and how long after the load's start the first was cut, if one was.
    pub fn lives(self) -> Result<(u64, Option<Duration>)> {
        let found = self.finish()?;
        let count = |name: &str| found[name].as_u64().context("a number");
        // "after 28.381 s: ..."
        let errors = found["errors"].as_array().context("a list")?;
        let times = errors.iter().filter_map(|error| {
            let time = error.as_str()?.strip_prefix("after ")?.split(' ').next()?;
            time.parse().ok().map(Duration::from_secs_f64)
        });
        Ok((count("live")? + count("cut")?, times.min()))
    }

    /// Ends held connections: an error if one was cut.
    pub fn none_cut(self) -> Result<u64> {
        let found = self.finish()?;
        ensure!(found["cut"] == 0, "held connections: {found}");
        found["live"].as_u64().context("a number")
    }
}

fn keep(state: &std::path::Path) -> Result<Child> {
    use std::os::unix::process::CommandExt;
    let keeper = Command::new(machine::cluster_program()?)
        .arg("--state")
        .arg(state)
        .arg("keep")
        .stdin(Stdio::piped())
        // Not ours: it must outlive a terminal's interrupt.
        .process_group(0)
        .spawn();
    keeper.context("start the cluster's keeper")
}

/// The mesh's images, made from the `leyline` under test where it is newer.
fn mesh_images() -> Result<Vec<PathBuf>> {
    let out = machine::target()?.join("cluster/images");
    let leyline = crate::leyline();
    let plugin = machine::plugin()?;
    let names = ["controlplane", "ztunnel", "waypoint", "cni"];
    let archives = names.map(|name| out.join(format!("{name}.tar")));
    if !archives
        .iter()
        .all(|archive| machine::is_newer(archive, &[&leyline, &plugin]))
    {
        fs::create_dir_all(&out)?;
        let mut build = Command::new(machine::repository().join("deploy/images/build"));
        // Nothing is sent anywhere: packing would take longer than all else of an installation.
        build
            .arg("--no-gzip")
            .arg("--multi")
            .arg(&leyline)
            .arg("--plugin")
            .arg(plugin);
        run(build.arg("--out").arg(&out))?;
    }
    Ok(archives.to_vec())
}

/// Whether a word may be the name of a host, and not an address: the pod's own DNS is needed for it.
fn is_name(word: &str) -> bool {
    word.rsplit_once(':').is_some_and(|(host, _)| {
        host.trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_err()
    })
}

/// The chart's values (`name=value`) for this cluster's images, and more.
fn chart_values(more: &[&str]) -> Vec<String> {
    let images = [format!("global.hub={HUB}"), "global.tag=dev".to_owned()];
    images.into_iter().chain(words(more)).collect()
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
