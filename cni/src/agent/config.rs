//! The agent's settings, read once and checked all together.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use crate::{
    facts::Policy,
    install,
    rules::{self, ProbeAddresses, host::ProbeSource},
    selectors::Enablement,
};

/// The host's `/proc`, as mounted in the agent's container.
const HOST_PROC: &str = "/host/proc";
/// The node's network namespace: that of its first process.
const HOST_NETNS: &str = "/host/proc/1/ns/net";
/// Istio's name of the agents' DaemonSet.
const DAEMON_SET: &str = "istio-cni-node";
/// The node's cgroup namespace, likewise.
const HOST_CGROUPS: &str = "/host/proc/1/ns/cgroup";
/// The list of our own, where one is wanted.
const OWNED_FILE: &str = "02-istio-cni.conflist";
/// Istio's ports of the agent.
const HEALTH_PORT: u16 = 8000;
const METRICS_PORT: u16 = 15014;

/// Everything that the agent is told from outside.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens for tunnels (`ZTUNNEL_UDS_ADDRESS`).
    pub zds_socket: PathBuf,
    /// Which pods take part, and how.
    pub policy: Policy,
    /// How the node's probes are recognised (`LEYLINE_PROBE_SOURCE`: `mark:0x2000`, `uid:0`, `cgroup:kubelet.slice`);
    /// `None`: the kubelet is looked for.
    pub probe_source: Option<ProbeSource>,
    /// The host's `/proc`, to look for the kubelet in (`LEYLINE_HOST_PROC`).
    pub host_proc: PathBuf,
    /// The node's network namespace; `None`: the agent's own (`LEYLINE_HOST_NETNS`).
    pub host_netns: Option<PathBuf>,
    /// The node's cgroup namespace; `None`: the agent's own (`LEYLINE_HOST_CGROUP_NAMESPACE`).
    pub host_cgroups: Option<PathBuf>,
    /// Where health and metrics are served: `LEYLINE_CNI_ADMIN_ADDRESS`, else on a cluster Istio's two ports.
    pub admin: Vec<SocketAddr>,
    /// Folder of [`crate::local`] (`LEYLINE_LOCAL_FOLDER`); the source of pods where there is no cluster.
    pub local_folder: Option<PathBuf>,
    /// The cluster, where there is one: `NODE_NAME` is set and no folder is.
    pub cluster: Option<Cluster>,
    /// Version shown in `istio_build`: the chart's (`CURRENT_AGENT_VERSION`), else the program's own.
    pub version: String,
    /// Limits of enrolment.
    pub timing: Timing,
}

/// What an agent on Kubernetes is told besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// The node whose pods it enrols (`NODE_NAME`).
    pub node: String,
    /// The runtime's files of network namespaces, as mounted (`LEYLINE_HOST_NETNS_FOLDER`).
    pub netns_folder: PathBuf,
    /// What agent and plugin share with the host (`LEYLINE_CNI_RUN_FOLDER`).
    pub run_folder: PathBuf,
    /// How the plugin is installed; `None`: it is not (`LEYLINE_CNI_INSTALL=false`).
    pub install: Option<install::Settings>,
    /// The agent's own namespace (`POD_NAMESPACE`).
    pub namespace: String,
    /// Its DaemonSet (`LEYLINE_CNI_DAEMONSET`), whose end is the mesh's on this node.
    pub daemon_set: String,
    /// Leave the node whenever the agent stops (`AMBIENT_DISABLE_SAFE_UPGRADE`).
    pub always_leave: bool,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// One step of one pod: rules, host set, annotation. An announcement has the codec's own deadline.
    pub step: Duration,
    /// First pause after a failed step; doubles.
    pub retry_first: Duration,
    /// Longest pause between tries.
    pub retry_longest: Duration,
    /// A leaving pod keeps its tunnel at least this long, so that peers learn first (`LEYLINE_LEAVE_GRACE`: seconds, with
    /// or without an `s`).
    pub leave_least: Duration,
    /// A leaving pod loses its tunnel after this long, whatever still flows.
    pub leave_most: Duration,
    /// How often a leaving pod's sockets are counted.
    pub leave_poll: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            step: Duration::from_secs(5),
            retry_first: Duration::from_millis(50),
            retry_longest: Duration::from_secs(5),
            leave_least: Duration::from_secs(5),
            leave_most: Duration::from_secs(60),
            leave_poll: Duration::from_millis(500),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            zds_socket: net::zds::SOCKET_PATH.into(),
            policy: Policy::default(),
            probe_source: None,
            host_proc: "/proc".into(),
            host_netns: None,
            host_cgroups: None,
            admin: Vec::new(),
            local_folder: None,
            cluster: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            timing: Timing::default(),
        }
    }
}

/// Every setting that could not be read.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(pub Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "settings: {}", self.0.join("; "))
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads the environment through `lookup`. Istio's names where it has one.
    ///
    /// # Errors
    /// All bad settings at once.
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let mut read = Reader {
            lookup,
            bad: Vec::new(),
        };
        let base = Config::default();
        let local_folder: Option<PathBuf> = read.parse("LEYLINE_LOCAL_FOLDER");
        let policy = read.policy(base.policy);
        let cluster = match local_folder {
            Some(_) => None,
            None => read.cluster(&policy),
        };
        let on_cluster = cluster.is_some();
        let host_proc = if on_cluster { HOST_PROC } else { "/proc" };
        let host_netns = on_cluster.then(|| HOST_NETNS.into());
        let host_cgroups = on_cluster.then(|| HOST_CGROUPS.into());
        let config = Config {
            zds_socket: read.or("ZTUNNEL_UDS_ADDRESS", base.zds_socket),
            policy,
            probe_source: read.parse("LEYLINE_PROBE_SOURCE"),
            host_proc: read.or("LEYLINE_HOST_PROC", host_proc.into()),
            host_netns: read.parse("LEYLINE_HOST_NETNS").or(host_netns),
            host_cgroups: read.parse("LEYLINE_HOST_CGROUP_NAMESPACE").or(host_cgroups),
            admin: read.admin(on_cluster),
            local_folder,
            cluster,
            version: read.or("CURRENT_AGENT_VERSION", base.version),
            timing: Timing {
                leave_least: read
                    .or("LEYLINE_LEAVE_GRACE", Seconds::of(base.timing.leave_least))
                    .into(),
                ..base.timing
            },
        };
        if read.bad.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError(read.bad))
        }
    }
}

/// What `leave-cluster` is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaveCluster {
    /// The agents' namespace (`POD_NAMESPACE`).
    pub namespace: String,
    /// Their DaemonSet (`LEYLINE_CNI_DAEMONSET`, or `DAEMONSET`).
    pub daemon_set: String,
    /// How long they are waited for (`LEAVE_TIMEOUT`: seconds, with or without an `s`).
    pub patience: Duration,
}

impl LeaveCluster {
    /// Reads the environment through `lookup`.
    ///
    /// # Errors
    /// All bad settings at once.
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let mut read = Reader {
            lookup,
            bad: Vec::new(),
        };
        let set = read.text("LEYLINE_CNI_DAEMONSET");
        let set = set.or_else(|| read.text("DAEMONSET"));
        let patience: Seconds = read.or("LEAVE_TIMEOUT", Seconds(120));
        let leave = LeaveCluster {
            namespace: read.own_namespace(),
            daemon_set: set.unwrap_or_else(|| DAEMON_SET.to_owned()),
            patience: patience.into(),
        };
        if read.bad.is_empty() {
            Ok(leave)
        } else {
            Err(ConfigError(read.bad))
        }
    }
}

struct Seconds(u64);

impl Seconds {
    fn of(time: Duration) -> Self {
        Seconds(time.as_secs())
    }
}

impl From<Seconds> for Duration {
    fn from(seconds: Seconds) -> Self {
        Duration::from_secs(seconds.0)
    }
}

impl FromStr for Seconds {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_suffix('s').unwrap_or(text).parse().map(Seconds)
    }
}

struct Reader<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    bad: Vec<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|text| !text.is_empty())
    }

    fn parse<T: FromStr<Err: fmt::Display>>(&mut self, name: &str) -> Option<T> {
        let text = self.text(name)?;
        text.parse()
            .map_err(|error| self.bad.push(format!("{name}={text:?}: {error}")))
            .ok()
    }

    fn policy(&mut self, base: Policy) -> Policy {
        let excluded = self.text("EXCLUDE_NAMESPACES");
        let excluded =
            excluded.map(|list| list.split(',').map(|name| name.trim().to_owned()).collect());
        let enabled = self.or("AMBIENT_ENABLED", true);
        let enablement = self.or("AMBIENT_ENABLEMENT_SELECTOR", base.enablement);
        Policy {
            enablement: if enabled {
                enablement
            } else {
                Enablement::nobody()
            },
            excluded_namespaces: excluded.unwrap_or(base.excluded_namespaces),
            dns_capture: self.or("AMBIENT_DNS_CAPTURE", base.dns_capture),
            ipv6: self.or("AMBIENT_IPV6", base.ipv6),
            probes: ProbeAddresses {
                v4: self.or::<Ipv4Addr>("HOST_PROBE_SNAT_IP", rules::PROBE_SOURCE_V4),
                v6: self.or::<Ipv6Addr>("HOST_PROBE_SNAT_IPV6", rules::PROBE_SOURCE_V6),
            },
        }
    }

    fn cluster(&mut self, policy: &Policy) -> Option<Cluster> {
        let node = self.text("NODE_NAME")?;
        Some(Cluster {
            node,
            netns_folder: self.or("LEYLINE_HOST_NETNS_FOLDER", "/host/var/run/netns".into()),
            run_folder: self.or("LEYLINE_CNI_RUN_FOLDER", "/var/run/istio-cni".into()),
            install: self.install(policy),
            namespace: self.own_namespace(),
            daemon_set: self.or("LEYLINE_CNI_DAEMONSET", DAEMON_SET.into()),
            always_leave: self.or("AMBIENT_DISABLE_SAFE_UPGRADE", false),
        })
    }

    fn own_namespace(&mut self) -> String {
        self.or("POD_NAMESPACE", "istio-system".into())
    }

    fn install(&mut self, policy: &Policy) -> Option<install::Settings> {
        if !self.or("LEYLINE_CNI_INSTALL", true) {
            return None;
        }
        let file = self.or("ISTIO_OWNED_CNI_CONF_FILENAME", OWNED_FILE.to_owned());
        let way = if !self.or("CHAINED_CNI_PLUGIN", true) {
            install::Way::Standalone
        } else if self.or("ISTIO_OWNED_CNI_CONFIG", false) {
            install::Way::Owned { file }
        } else {
            install::Way::Chained
        };
        let run_folder: String = self.or("LEYLINE_CNI_RUN_FOLDER", "/var/run/istio-cni".into());
        Some(install::Settings {
            plugin: self.or("LEYLINE_CNI_PLUGIN_SOURCE", "/opt/cni/bin/istio-cni".into()),
            bin_folder: self.or("LEYLINE_HOST_CNI_BIN", "/host/opt/cni/bin".into()),
            config_folder: self.or("LEYLINE_HOST_CNI_CONF", "/host/etc/cni/net.d".into()),
            config_name: self.text("CNI_CONF_NAME"),
            way,
            group_may_read: self.or("CNI_CONF_GROUP_READ", false),
            entry: install::Entry {
                run_folder,
                ambient_enabled: self.or("AMBIENT_ENABLED", true),
                excluded_namespaces: policy.excluded_namespaces.clone(),
                agent_namespace: self.own_namespace(),
            },
        })
    }

    fn admin(&mut self, on_cluster: bool) -> Vec<SocketAddr> {
        if let Some(address) = self.parse("LEYLINE_CNI_ADMIN_ADDRESS") {
            return vec![address];
        }
        if !on_cluster {
            return Vec::new();
        }
        let ports = [HEALTH_PORT, self.or("MONITORING_PORT", METRICS_PORT)];
        ports
            .map(|port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))
            .to_vec()
    }

    fn or<T: FromStr<Err: fmt::Display>>(&mut self, name: &str, otherwise: T) -> T {
        self.parse(name).unwrap_or(otherwise)
    }
}

/// Why a text names no probe source.
#[derive(Debug, thiserror::Error)]
#[error("expected mark:NUMBER, uid:NUMBER or cgroup:PATH")]
pub struct ParseProbeSourceError;

impl FromStr for ProbeSource {
    type Err = ParseProbeSourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, value) = text.split_once(':').ok_or(ParseProbeSourceError)?;
        match kind {
            "mark" => number(value)
                .filter(|mark| *mark != 0)
                .map(ProbeSource::Mark),
            "uid" => number(value).map(ProbeSource::Uid),
            "cgroup" => cgroup(value),
            _ => None,
        }
        .ok_or(ParseProbeSourceError)
    }
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The level counts from the root of the version 2 hierarchy, so the mount's own folder `unified` is no part of it.
fn cgroup(path: &str) -> Option<ProbeSource> {
    let path = path.trim_matches('/');
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '{' | '}');
    let depth = path
        .strip_prefix("unified/")
        .unwrap_or(path)
        .split('/')
        .count();
    let usable = !path.is_empty() && path.chars().all(plain);
    usable.then_some(ProbeSource::Cgroup {
        path: path.to_owned(),
        level: u32::try_from(depth).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Telemetry;

    #[test]
    fn an_empty_environment_is_the_default() {
        let config = Config::from_lookup(&|_| None).expect("defaults");
        assert_eq!(
            config.zds_socket,
            PathBuf::from("/var/run/ztunnel/ztunnel.sock")
        );
        assert_eq!(config.probe_source, None);
    }

    #[test]
    fn a_node_name_means_a_cluster_and_a_folder_means_none() {
        let read = |folder: bool| {
            let lookup = move |name: &str| match name {
                "NODE_NAME" => Some("node1".to_owned()),
                "LEYLINE_LOCAL_FOLDER" => folder.then(|| "/run/x".to_owned()),
                "MONITORING_PORT" => Some("15099".to_owned()),
                _ => None,
            };
            Config::from_lookup(&lookup).expect("settings")
        };
        let config = read(false);
        let cluster = config.cluster.expect("a cluster");
        assert_eq!(cluster.node, "node1");
        assert_eq!(config.host_netns, Some("/host/proc/1/ns/net".into()));
        let ports: Vec<u16> = config.admin.iter().map(SocketAddr::port).collect();
        assert_eq!(ports, [8000, 15099]);
        let local = read(true);
        assert_eq!((local.cluster, local.host_netns), (None, None));
    }

    #[test]
    fn the_charts_version_is_shown_as_the_agents() {
        let shown = |chart: Option<&str>| {
            let lookup = |name: &str| chart.filter(|_| name == "CURRENT_AGENT_VERSION");
            let config = Config::from_lookup(&|name| lookup(name).map(str::to_owned));
            Telemetry::new(&config.expect("settings").version).text()
        };
        let line = |tag: &str| format!("istio_build{{component=\"cni\",tag=\"{tag}\"}} 1\n");
        assert!(shown(Some("2.0")).contains(&line("2.0")));
        assert!(shown(None).contains(&line(env!("CARGO_PKG_VERSION"))));
    }

    #[test]
    fn without_ambient_nobody_takes_part() {
        let off = |name: &str| (name == "AMBIENT_ENABLED").then(|| "false".to_owned());
        let policy = Config::from_lookup(&off).expect("settings").policy;
        assert_eq!(policy.enablement, Enablement::nobody());
    }

    #[test]
    fn every_bad_setting_is_named_at_once() {
        let lookup = |name: &str| match name {
            "AMBIENT_IPV6" => Some("perhaps".to_owned()),
            "HOST_PROBE_SNAT_IP" => Some("::1".to_owned()),
            "LEYLINE_PROBE_SOURCE" => Some("guess".to_owned()),
            _ => None,
        };
        let ConfigError(bad) = Config::from_lookup(&lookup).expect_err("bad settings");
        assert_eq!(bad.len(), 3, "{bad:?}");
    }

    #[test]
    fn probe_sources_are_read() {
        let table = [
            ("mark:0x2000", Some(ProbeSource::Mark(0x2000))),
            ("uid:1001", Some(ProbeSource::Uid(1001))),
            (
                "cgroup:/kubelet.slice/kubelet",
                Some(ProbeSource::Cgroup {
                    path: "kubelet.slice/kubelet".into(),
                    level: 2,
                }),
            ),
            (
                "cgroup:unified/kubelet",
                Some(ProbeSource::Cgroup {
                    path: "unified/kubelet".into(),
                    level: 1,
                }),
            ),
            ("cgroup:a\"b", None),
            ("mark:0", None),
            ("mark", None),
        ];
        for (text, expected) in table {
            assert_eq!(text.parse().ok(), expected, "{text}");
        }
    }
}
