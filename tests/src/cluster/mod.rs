//! A real Kubernetes cluster on this machine, without a container engine; or the user's own, where KUBECONFIG names one.
//!
//! Everything of the cluster runs below one process, the first of namespaces of its own (network, mounts, processes), and so does
//! each node below it. When that process ends, all of them end, with their interfaces, rules and mounts; what is left are cgroup
//! folders and the state folder, which [`Cluster::down`] removes by what is recorded there, also after a crash. The machine's own
//! network is not touched: the API server is reached over a listener on its loopback ([`forward`]).

pub mod bed;
pub mod conformance;
pub mod files;
pub mod forward;
pub mod kubectl;
pub mod machine;
pub mod part;
pub mod pki;
pub mod plan;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::IpAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use self::{
    kubectl::Kube,
    machine::{folder, ip, sysctl},
    part::{Enter, Parts, Spec, inside},
    pki::Authority,
    plan::{Families, OUTSIDE_V4, OUTSIDE_V6, Settings},
};
use crate::{stderr, until};

/// The part that holds the cluster's namespaces, in which the API server runs.
pub const HOLDER: &str = "cluster";

/// A name that the cluster's DNS answers with the address of the cluster's outside ([`plan::OUTSIDE_V4`]).
pub const OUTSIDE_HOST: &str = "outside.test";

/// How long the parts of a cluster may take to come up on a busy machine.
const UP: Duration = Duration::from_secs(120);

/// The cluster's images carry this registry's name; nothing is ever pulled.
pub const HUB: &str = "leyline.dev";

/// A cluster of the rig.
#[derive(Clone, Debug)]
pub struct Cluster {
    state: PathBuf,
    settings: Settings,
    programs: PathBuf,
    parts: Parts,
}

/// What is recorded of a cluster, beside its parts.
#[derive(Debug, Serialize, Deserialize)]
struct Recorded {
    settings: Settings,
    programs: PathBuf,
    /// The cluster's folder in the cgroup hierarchies.
    cgroup: PathBuf,
}

/// Where a cluster keeps its state unless told otherwise: `LEYLINE_CLUSTER`, or below cargo's folder.
pub fn default_state() -> Result<PathBuf> {
    match std::env::var_os("LEYLINE_CLUSTER") {
        Some(state) => Ok(state.into()),
        None => Ok(machine::target()?.join("cluster/run")),
    }
}

impl Cluster {
    /// Starts a cluster, and waits until its nodes and its DNS are ready. What a crash has left in `state` goes first.
    pub fn up(state: &Path, settings: Settings) -> Result<Self> {
        machine::check()?;
        let programs = machine::programs()?;
        let images = machine::images(&programs)?;
        let parts = Parts::new(state);
        ensure!(
            !parts.runs(HOLDER),
            "a cluster runs in {}: take it down first",
            state.display()
        );
        Self::down(state)?;
        folder(state)?;
        let cluster = Self {
            state: state.canonicalize()?,
            settings,
            programs,
            parts,
        };
        cluster.record()?;
        cluster
            .start(&images)
            .with_context(|| format!("logs are in {}/log", state.display()))?;
        Ok(cluster)
    }

    /// The cluster that runs in `state`.
    pub fn attach(state: &Path) -> Result<Self> {
        let recorded = recorded(state)?;
        let parts = Parts::new(state);
        ensure!(parts.runs(HOLDER), "no cluster runs in {}", state.display());
        Ok(Self {
            state: state.canonicalize()?,
            settings: recorded.settings,
            programs: recorded.programs,
            parts,
        })
    }

    /// Ends whatever of a cluster runs or is left in `state`, and removes the folder.
    pub fn down(state: &Path) -> Result<()> {
        let parts = Parts::new(state);
        // The holders take all that runs inside with them: nodes first, so that each is seen to end.
        let mut names = parts.names();
        names.retain(|name| name != HOLDER);
        for name in names.iter().filter(|name| !name.contains('-')) {
            parts.kill(name)?;
        }
        for name in names.iter().filter(|name| name.contains('-')) {
            parts.kill(name)?;
        }
        if parts.names().iter().any(|name| name == HOLDER) {
            parts.kill(HOLDER)?;
        }
        if let Ok(recorded) = recorded(state) {
            machine::remove_cgroup(&recorded.cgroup)?;
        }
        match fs::remove_dir_all(state) {
            Err(error) if state.exists() => {
                Err(error).with_context(|| format!("remove {}", state.display()))
            }
            _ => Ok(()),
        }
    }

    fn record(&self) -> Result<()> {
        let recorded = Recorded {
            settings: self.settings.clone(),
            programs: self.programs.clone(),
            cgroup: format!("leyline-rig-{}", std::process::id()).into(),
        };
        let text = serde_json::to_vec_pretty(&recorded)?;
        Ok(fs::write(self.state.join("cluster.json"), text)?)
    }

    fn start(&self, images: &[PathBuf]) -> Result<()> {
        self.write_keys()?;
        self.start_holder()?;
        for (index, node) in (1..).zip(self.settings.node_names()) {
            self.start_node_holder(index, &node)?;
        }
        self.start_control_plane()?;
        // Each node has images to unpack, which takes most of the time.
        thread::scope(|scope| {
            let starts: Vec<_> = (1..)
                .zip(self.settings.node_names())
                .map(|(index, node)| scope.spawn(move || self.start_node(index, &node, images)))
                .collect();
            for start in starts {
                start.join().map_err(|_| anyhow!("a node panicked"))??;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        self.start_dns()
    }

    // --- what the rest is made of

    /// The cluster's folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Its processes: `etcd`, `apiserver`, `controller-manager`, `scheduler`, `forward`, and for each node `NODE`,
    /// `NODE-containerd`, `NODE-kubelet`, `NODE-proxy`.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The folder of kubectl and helm.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// The administrator's kubeconfig, for this machine.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state.join("admin.conf")
    }

    /// kubectl, as the administrator.
    pub fn kube(&self) -> Kube {
        Kube::new(self.programs.join("kubectl"), self.kubeconfig())
    }

    /// What a shell needs to use the cluster.
    pub fn shell_environment(&self) -> String {
        format!(
            "export KUBECONFIG={} LEYLINE_CLUSTER={} PATH={}:\"$PATH\"\n",
            self.kubeconfig().display(),
            self.state.display(),
            self.programs.display()
        )
    }

    fn node_folder(&self, node: &str) -> PathBuf {
        self.state.join(node)
    }

    fn pki(&self) -> PathBuf {
        self.state.join("pki")
    }

    /// Runs `action` on a thread in the network namespace of a node, or of [`HOLDER`]: sockets that it opens are there.
    pub fn on_network<T: Send>(
        &self,
        of: &str,
        action: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        inside(self.parts.pid(of)?, Enter::Network, action)
    }

    /// Runs a command in all namespaces of a node, or of [`HOLDER`].
    pub fn run_on(&self, node: &str, line: &[&str]) -> Result<Output> {
        let (program, arguments) = line.split_first().context("a program")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(self.environment(node))
            .stdin(Stdio::null());
        inside(self.parts.pid(node)?, Enter::All, || {
            command.output().with_context(|| format!("{command:?}"))
        })
    }

    /// The same; what it prints, if it succeeds.
    pub fn succeed_on(&self, node: &str, line: &[&str]) -> Result<String> {
        let output = self.run_on(node, line)?;
        ensure!(
            output.status.success(),
            "{line:?} on {node}: {}: {}",
            output.status,
            stderr(&output)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// PATH, for what runs in a node or beside the API server.
    fn environment(&self, of: &str) -> BTreeMap<String, String> {
        let programs = match of {
            HOLDER => self.programs.display().to_string(),
            _ => "/opt/rig/bin".to_owned(),
        };
        let path =
            format!("{programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        BTreeMap::from([
            ("PATH".to_owned(), path),
            ("HOME".to_owned(), "/root".to_owned()),
        ])
    }

    fn spec(&self, name: &str, holder: &str, line: Vec<String>) -> Spec {
        Spec {
            name: name.to_owned(),
            inside: Some((holder.to_owned(), Enter::All)),
            cgroups: Vec::new(),
            line,
            environment: self.environment(holder),
        }
    }

    // --- keys

    fn write_keys(&self) -> Result<()> {
        let folder = self.pki();
        machine::folder(&folder)?;
        let authority = Authority::new()?;
        authority.write(&folder)?;
        pki::write_token_key(&folder)?;
        let mut addresses = vec![self.settings.api_address(), [127, 0, 0, 1].into()];
        addresses.extend(self.settings.kubernetes_addresses());
        let hosts = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "localhost",
        ];
        authority.issue(
            &folder,
            "apiserver",
            ("kube-apiserver", None),
            &addresses,
            &hosts,
        )?;
        let admin = ("admin", Some("system:masters"));
        authority.issue(&folder, "admin", admin, &[], &[])?;
        for (file, user) in [
            ("controller-manager", "system:kube-controller-manager"),
            ("scheduler", "system:kube-scheduler"),
        ] {
            authority.issue(&folder, file, (user, None), &[], &[])?;
            self.write_kubeconfig(file)?;
        }
        for (index, node) in (1..).zip(self.settings.node_names()) {
            self.write_node_keys(&authority, index, &node)?;
        }
        Ok(())
    }

    fn write_kubeconfig(&self, user: &str) -> Result<()> {
        let folder = self.pki().display().to_string();
        let text = files::kubeconfig(&self.settings.api_server(), &folder, user);
        Ok(fs::write(self.state.join(format!("{user}.conf")), text)?)
    }

    fn write_node_keys(&self, authority: &Authority, index: u8, node: &str) -> Result<()> {
        let folder = self.node_folder(node).join("pki");
        machine::folder(&folder)?;
        authority.write_certificate(&folder)?;
        let user = format!("system:node:{node}");
        let addresses = self.settings.node_addresses(index);
        let group = Some("system:nodes");
        authority.issue(&folder, "kubelet", (&user, group), &addresses, &[node])?;
        authority.issue(&folder, "kube-proxy", ("system:kube-proxy", None), &[], &[])?;
        for user in ["kubelet", "kube-proxy"] {
            let text = files::kubeconfig(&self.settings.api_server(), "/node/pki", user);
            fs::write(self.node_folder(node).join(format!("{user}.conf")), text)?;
        }
        Ok(())
    }

    // --- namespaces and networks

    fn start_holder(&self) -> Result<()> {
        // The first process of a namespace reaps; its own /proc makes it the first also to those who look.
        let script =
            "hostname cluster; mount -t proc proc /proc; while :; do sleep 86400 & wait; done";
        let mut spec = self.spec(HOLDER, HOLDER, words(&["/bin/sh", "-c", script]));
        spec.inside = None;
        self.parts.start_apart(spec)?;
        let dual = self.settings.families != Families::V4;
        self.on_network(HOLDER, || {
            let v6 = if dual {
                format!("address add {OUTSIDE_V6}/64 dev nodes nodad\n")
            } else {
                String::new()
            };
            ip(&format!(
                "link set lo up\nlink add nodes type bridge\nlink set nodes up\naddress add {OUTSIDE_V4}/24 dev nodes\n{v6}"
            ))?;
            forward_packets()
        })
    }

    fn start_node_holder(&self, index: u8, node: &str) -> Result<()> {
        let folder = self.node_folder(node);
        self.write_node_files(index, node)?;
        let script = machine::repository().join("tests/cluster/node.sh");
        let line = [
            "/bin/sh".as_ref(),
            script.as_path(),
            folder.as_path(),
            self.programs.as_path(),
        ];
        let line = line.map(|word| word.display().to_string()).to_vec();
        let mut spec = self.spec(node, HOLDER, line);
        // A node's log is the cluster's to see.
        spec.environment = self.environment(HOLDER);
        self.parts.start_apart(spec)?;
        self.connect_node(index, node)?;
        until(UP, || {
            self.succeed_on(node, &["/bin/sh", "-c", "test -e /run/up"])
                .with_context(|| format!("{node} does not come up"))
        })
        .map(drop)
    }

    /// A link between the bridge and the node, and the routes to all other nodes' pods.
    fn connect_node(&self, index: u8, node: &str) -> Result<()> {
        let pid = self.parts.pid(node)?;
        let addresses = self.settings.node_addresses(index);
        let networks = self.settings.pod_networks(index);
        self.on_network(HOLDER, || {
            // A node that lost power leaves its link until the kernel has taken its namespace down, which has no deadline;
            // the first time there is none to delete.
            let _ = ip(&format!("link delete {node}\n"));
            // Booted again it has the address that it had, as hardware does: the others know it for as long as 45 s (IPv6's
            // neighbours, RFC 4861 6.3.4), and would send to one that is gone.
            let mut lines = format!(
                "link add {node} type veth peer name eth0 address 02:00:00:00:00:{index:02x} netns {pid}\n\
                 link set {node} master nodes up\n"
            );
            for (address, network) in addresses.iter().zip(&networks) {
                lines.push_str(&format!("route replace {network} via {address}\n"));
            }
            ip(&lines)
        })?;
        self.on_network(node, || {
            let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
            for address in &addresses {
                lines.push_str(&match address {
                    IpAddr::V4(_) => format!(
                        "address add {address}/24 dev eth0\nroute add default via {OUTSIDE_V4}\n"
                    ),
                    IpAddr::V6(_) => format!(
                        "address add {address}/64 dev eth0 nodad\nroute add default via {OUTSIDE_V6}\n"
                    ),
                });
            }
            ip(&lines)?;
            forward_packets()
        })?;
        self.route_between(index, node)
    }

    /// Pods' packets go from node to node, not by way of the outside.
    fn route_between(&self, index: u8, node: &str) -> Result<()> {
        for (other, name) in (1..index).zip(self.settings.node_names()) {
            for (at, to) in [(node, other), (name.as_str(), index)] {
                let addresses = self.settings.node_addresses(to);
                let lines: String = addresses
                    .iter()
                    .zip(self.settings.pod_networks(to))
                    .map(|(address, network)| format!("route replace {network} via {address}\n"))
                    .collect();
                self.on_network(at, || ip(&lines))?;
            }
        }
        Ok(())
    }

    // --- the control plane

    fn start_control_plane(&self) -> Result<()> {
        let data = self.state.join("etcd");
        let etcd = [
            "etcd",
            "--data-dir",
            &data.display().to_string(),
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--unsafe-no-fsync",
        ]
        .map(str::to_owned);
        self.start_part("etcd", &etcd)?;
        self.start_part("apiserver", &self.api_server_line())?;
        self.start_forward()?;
        let kube = self.kube();
        until(UP, || kube.run(&["get", "--raw", "/readyz"]).map(drop))
            .context("the API server is not ready")?;
        self.start_part("controller-manager", &self.controller_manager_line())?;
        let kubeconfig = self.state.join("scheduler.conf");
        let scheduler = [
            "kube-scheduler".to_owned(),
            format!("--kubeconfig={}", kubeconfig.display()),
            "--leader-elect=false".to_owned(),
            "--kube-api-qps=200".to_owned(),
            "--kube-api-burst=400".to_owned(),
        ];
        self.start_part("scheduler", &scheduler)
    }

    fn start_part(&self, name: &str, line: &[String]) -> Result<()> {
        let mut line = line.to_vec();
        line[0] = self.programs.join(&line[0]).display().to_string();
        self.parts.start(self.spec(name, HOLDER, line))
    }

    fn api_server_line(&self) -> Vec<String> {
        let pki = self.pki();
        let pki = pki.display();
        vec![
            "kube-apiserver".to_owned(),
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--advertise-address={}", self.settings.api_address()),
            format!("--bind-address={}", self.any_address()),
            "--secure-port=6443".to_owned(),
            format!("--tls-cert-file={pki}/apiserver.crt"),
            format!("--tls-private-key-file={pki}/apiserver.key"),
            format!("--client-ca-file={pki}/ca.crt"),
            format!("--service-account-key-file={pki}/sa.pub"),
            format!("--service-account-signing-key-file={pki}/sa.key"),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!(
                "--service-cluster-ip-range={}",
                self.settings.service_networks()
            ),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
            // It runs beside the nodes, without kube-proxy: webhooks are reached by endpoint.
            "--enable-aggregator-routing=true".to_owned(),
            format!("--kubelet-client-certificate={pki}/admin.crt"),
            format!("--kubelet-client-key={pki}/admin.key"),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ]
    }

    fn any_address(&self) -> &'static str {
        match self.settings.families {
            Families::V4 => "0.0.0.0",
            Families::V6 | Families::Dual => "::",
        }
    }

    fn controller_manager_line(&self) -> Vec<String> {
        let pki = self.pki();
        let pki = pki.display();
        vec![
            "kube-controller-manager".to_owned(),
            format!(
                "--kubeconfig={}/controller-manager.conf",
                self.state.display()
            ),
            format!("--service-account-private-key-file={pki}/sa.key"),
            format!("--root-ca-file={pki}/ca.crt"),
            format!("--cluster-signing-cert-file={pki}/ca.crt"),
            format!("--cluster-signing-key-file={pki}/ca.key"),
            "--use-service-account-credentials".to_owned(),
            "--allocate-node-cidrs=false".to_owned(),
            "--leader-elect=false".to_owned(),
            "--kube-api-qps=200".to_owned(),
            "--kube-api-burst=400".to_owned(),
        ]
    }

    /// Gives the API server a port on this machine's loopback.
    fn start_forward(&self) -> Result<()> {
        let own = machine::cluster_program()?;
        let to = match self.settings.api_address() {
            IpAddr::V4(address) => format!("{address}:6443"),
            IpAddr::V6(address) => format!("[{address}]:6443"),
        };
        let netns = format!("/proc/{}/ns/net", self.parts.pid(HOLDER)?);
        let port = self.state.join("api.port");
        let line = [
            own.display().to_string(),
            "forward".to_owned(),
            netns,
            to,
            port.display().to_string(),
        ];
        let mut spec = self.spec("forward", HOLDER, line.to_vec());
        spec.inside = Some((HOLDER.to_owned(), Enter::Processes));
        self.parts.start(spec)?;
        let port = until(UP, || {
            fs::read_to_string(&port).context("the forwarder has no port yet")
        })?;
        let folder = self.pki().display().to_string();
        let server = format!("https://127.0.0.1:{}", port.trim());
        let text = files::kubeconfig(&server, &folder, "admin");
        Ok(fs::write(self.kubeconfig(), text)?)
    }

    // --- nodes

    fn cgroup(&self, node: &str, part: &str) -> Result<PathBuf> {
        Ok(recorded(&self.state)?.cgroup.join(node).join(part))
    }

    fn write_node_files(&self, index: u8, node: &str) -> Result<()> {
        let own = self.node_folder(node);
        for child in [
            "root",
            "etc/cni/net.d",
            "etc-work",
            "tmp",
            "cni/bin",
            "containerd",
            "var/lib/kubelet",
            "var/log/pods",
            "var/tmp",
        ] {
            folder(&own.join(child))?;
        }
        if !own.join("var/run").is_symlink() {
            symlink("/run", own.join("var/run"))?;
        }
        for plugin in ["bridge", "host-local", "loopback", "portmap"] {
            fs::copy(self.programs.join(plugin), own.join("cni/bin").join(plugin))?;
        }
        let pods = self.cgroup(node, "pods")?;
        machine::make_cgroup(&pods)?;
        for part in ["kubelet", "runtime"] {
            let cgroup = self.cgroup(node, part)?;
            folder(&machine::cgroup2(&cgroup)?)?;
        }
        let snapshotter = machine::snapshotter(&own)?;
        let pause = format!("{HUB}/pause:dev");
        let pods = Path::new("/").join(pods).display().to_string();
        let network = own.join("etc/cni/net.d/10-rig.conflist");
        fs::write(network, files::cni(&self.settings, index))?;
        fs::write(
            own.join("kubelet.yaml"),
            files::kubelet(&self.settings, &pods),
        )?;
        fs::write(
            own.join("containerd.toml"),
            files::containerd(snapshotter, &pause),
        )?;
        fs::write(
            own.join("proxy.yaml"),
            files::kube_proxy(&self.settings, node),
        )?;
        Ok(fs::write(own.join("resolv.conf"), "")?)
    }

    fn start_node(&self, index: u8, node: &str, images: &[PathBuf]) -> Result<()> {
        let containerd = words(&["/opt/rig/bin/containerd", "-c", "/node/containerd.toml"]);
        self.start_node_part(node, "containerd", "runtime", containerd)?;
        until(UP, || {
            self.ctr(node, &["version"], None)
                .with_context(|| format!("containerd of {node}"))
        })?;
        for image in images {
            self.load_on(node, image)?;
        }
        let addresses = self.settings.node_addresses(index);
        let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        let kubelet = vec![
            "/opt/rig/bin/kubelet".to_owned(),
            "--config=/node/kubelet.yaml".to_owned(),
            "--kubeconfig=/node/kubelet.conf".to_owned(),
            format!("--hostname-override={node}"),
            format!("--node-ip={}", addresses.join(",")),
        ];
        self.start_node_part(node, "kubelet", "kubelet", kept_up(kubelet))?;
        let proxy = words(&["/opt/rig/bin/kube-proxy", "--config=/node/proxy.yaml"]);
        self.start_node_part(node, "proxy", "runtime", kept_up(proxy))
    }

    fn start_node_part(
        &self,
        node: &str,
        part: &str,
        cgroup: &str,
        line: Vec<String>,
    ) -> Result<()> {
        let mut spec = self.spec(&format!("{node}-{part}"), node, line);
        spec.cgroups = vec![machine::cgroup2(&self.cgroup(node, cgroup)?)?];
        self.parts.start(spec)
    }

    /// Runs `action` on a thread in the network namespace of a pod (`namespace/name`).
    pub fn in_pod<T: Send>(
        &self,
        kube: &Kube,
        pod: &str,
        action: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let (namespace, name) = pod.split_once('/').context("namespace/name")?;
        let found = kube.json(&["pod", "-n", namespace, name])?;
        let uid = found["metadata"]["uid"].as_str().context("a uid")?;
        let process = part::find_by_cgroup(&format!("/pod{uid}/"))
            .with_context(|| format!("no process of {pod}"))?;
        inside(process, Enter::Network, action)
    }

    /// Ends a node as a loss of power would: all its processes at once.
    pub fn kill_node(&self, node: &str) -> Result<()> {
        self.parts.kill(node)?;
        for part in ["containerd", "kubelet", "proxy"] {
            // They ended with it; this waits until that is seen.
            self.parts.kill(&format!("{node}-{part}"))?;
        }
        // Power takes the pods' cgroups along. A kubelet that starts waits 3 s for each that it finds and no runtime knows.
        let pods = self.cgroup(node, "pods")?;
        machine::remove_cgroup(&pods)?;
        machine::make_cgroup(&pods)
    }

    /// Boots a node that was killed, with what its disk held.
    pub fn boot_node(&self, node: &str) -> Result<()> {
        let names = self.settings.node_names();
        let position = names.iter().position(|name| name == node);
        let index = u8::try_from(position.context("a node of the cluster")? + 1)?;
        // Its end of the link went with its namespace.
        self.start_node_holder(index, node)?;
        for other in (1..=self.settings.nodes).filter(|other| *other > index) {
            self.route_between(other, &format!("node{other}"))?;
        }
        self.start_node(index, node, &[])
    }

    /// Imports image archives on every node.
    pub fn load(&self, archives: &[PathBuf]) -> Result<()> {
        for node in self.settings.node_names() {
            for archive in archives {
                self.load_on(&node, archive)?;
            }
        }
        Ok(())
    }

    fn load_on(&self, node: &str, archive: &Path) -> Result<()> {
        let file = File::open(archive).with_context(|| archive.display().to_string())?;
        self.ctr(node, &["-n", "k8s.io", "images", "import", "-"], Some(file))
            .with_context(|| format!("load {} on {node}", archive.display()))
    }

    fn ctr(&self, node: &str, arguments: &[&str], input: Option<File>) -> Result<()> {
        let mut command = Command::new("/opt/rig/bin/ctr");
        command
            .args(["-a", "/run/containerd/containerd.sock"])
            .args(arguments)
            .env_clear()
            .envs(self.environment(node))
            .stdin(input.map_or_else(Stdio::null, Stdio::from));
        let output = inside(self.parts.pid(node)?, Enter::All, || {
            command.output().with_context(|| format!("{command:?}"))
        })?;
        ensure!(output.status.success(), "{}", stderr(&output));
        Ok(())
    }

    // --- DNS

    fn start_dns(&self) -> Result<()> {
        let mut hosts = format!("{OUTSIDE_V4} {OUTSIDE_HOST}");
        if self.settings.families != Families::V4 {
            hosts.push_str(&format!("\n        {OUTSIDE_V6} {OUTSIDE_HOST}"));
        }
        let image = format!("{HUB}/coredns:dev");
        let kube = self.kube();
        kube.apply(&files::dns(&self.settings, &image, &hosts))?;
        for node in self.settings.node_names() {
            let name = format!("node/{node}");
            until(UP, || kube.run(&["get", &name]).map(drop))?;
            kube.run(&["wait", "--for=condition=Ready", "--timeout=120s", &name])?;
        }
        let rollout = [
            "-n",
            "kube-system",
            "rollout",
            "status",
            "deployment/coredns",
        ];
        kube.run(&[&rollout[..], &["--timeout=120s"]].concat())
            .map(drop)
    }
}

fn recorded(state: &Path) -> Result<Recorded> {
    let path = state.join("cluster.json");
    let bytes = fs::read(&path).with_context(|| format!("no cluster in {}", state.display()))?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Started again whenever it ends, as a node's service manager does: a kubelet gives up on what it does not find ready.
fn kept_up(line: Vec<String>) -> Vec<String> {
    let mut kept = words(&[
        "/bin/sh",
        "-c",
        "while :; do \"$@\"; sleep 1; done",
        "kept-up",
    ]);
    kept.extend(line);
    kept
}

/// The thread's network namespace forwards, as a node's and a router's does.
fn forward_packets() -> Result<()> {
    for (name, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/conf/all/route_localnet", "1"),
        ("ipv6/conf/all/forwarding", "1"),
    ] {
        // A machine without IPv6 has no such file; a cluster of IPv4 needs none.
        if Path::new("/proc/sys/net").join(name).exists() {
            sysctl(name, value)?;
        }
    }
    Ok(())
}
