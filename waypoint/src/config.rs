//! The settings of a waypoint, read once at start-up from an injected lookup.
//!
//! Names are those that Istio's control plane and ours put into a waypoint's pod; what is ours alone begins with
//! `LEYLINE_`. Durations are written as `5s`, `3m`, `1h`; switches as `true` or `false`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use mesh::{
    identity::{Identity, TrustDomain},
    names::Str,
    outcome::LocalWorkload,
};
pub use net::settings::{BadSetting, ConfigError, Lookup, Remote, RootCert, Token};
use net::{
    hbone,
    settings::{Reader, parse_cpus, variable},
};
use serde::Serialize;

/// Everything that can be set.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// Where and as whom we run.
    pub node: Node,
    /// Where resources come from; `None`: from the caller, for tests.
    pub xds: Option<Remote>,
    /// Who signs our certificate; `None` (`FAKE_CA`): an issuer that the caller brings, for tests.
    pub ca: Option<Remote>,
    /// Lifetime of certificates that is asked for; the CA may give less (`SECRET_TTL`).
    pub secret_ttl: Duration,
    /// The list of revoked certificates (`CRL_PATH`).
    pub revocations: Option<PathBuf>,
    /// Listeners.
    pub listen: Listen,
    /// HTTP/2 of HBONE.
    pub http2: Http2,
    /// What one peer, and all together, may cost.
    pub limits: Limits,
    /// How it ends.
    pub drain: Drain,
    /// After about this time a connection is told to come again, so that replicas share the load (`LEYLINE_MAX_CONNECTION_AGE`;
    /// 0: never).
    pub max_connection_age: Duration,
    /// How long an undeclared protocol may take to show (`LEYLINE_PROTOCOL_DETECTION_TIMEOUT`).
    pub detection_deadline: Duration,
    /// Names the name servers (`LEYLINE_RESOLV_CONF`).
    pub resolv_conf: PathBuf,
    /// Log lines.
    pub log: Log,
    /// Threads.
    pub worker_threads: usize,
}

/// What is done with traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Tunnels end here, and requests are routed.
    #[default]
    Waypoint,
    /// Outer tunnels of other networks end here; the inner ones are passed on as they are.
    EastWest,
}

/// Where and as whom we run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Our pod (`POD_NAME`).
    pub pod_name: Str,
    /// Its namespace (`POD_NAMESPACE`).
    pub namespace: Str,
    /// Its service account (`SERVICE_ACCOUNT`).
    pub service_account: Str,
    /// Its address (`INSTANCE_IP`).
    pub instance_ip: Str,
    /// Kubernetes node (`NODE_NAME`, `ISTIO_META_NODE_NAME`).
    pub name: Str,
    /// Cluster (`CLUSTER_ID`, `ISTIO_META_CLUSTER_ID`).
    pub cluster_id: Str,
    /// Network; empty for the default one (`NETWORK`, `ISTIO_META_NETWORK`).
    pub network: Str,
    /// DNS suffix (`CLUSTER_DOMAIN`).
    pub cluster_domain: Str,
    /// Our trust domain (`TRUST_DOMAIN`).
    pub trust_domain: TrustDomain,
    /// Name of the Gateway (`GATEWAY_NAME`, `ISTIO_META_WORKLOAD_NAME`).
    pub gateway: Str,
    /// What is done with traffic (`LEYLINE_ROLE`).
    pub role: Role,
    /// Version shown in `istio_build` (`ISTIO_META_ISTIO_VERSION`).
    pub istio_version: String,
    /// Told to the control plane.
    pub metadata: BTreeMap<String, serde_json::Value>,
}

impl Node {
    /// Who we are to others.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// How our record is found.
    pub fn binding(&self) -> LocalWorkload {
        LocalWorkload {
            name: self.pod_name.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }
}

/// Listeners. Port 0 takes any.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listen {
    /// HBONE (`LEYLINE_HBONE_ADDRESS`).
    pub hbone: SocketAddr,
    /// Admin: loopback only (`LEYLINE_ADMIN_ADDRESS`).
    pub admin: Vec<SocketAddr>,
    /// Metrics (`LEYLINE_STATS_ADDRESS`).
    pub stats: SocketAddr,
    /// Readiness (`LEYLINE_READINESS_ADDRESS`).
    pub readiness: SocketAddr,
}

/// HTTP/2 of HBONE.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Http2 {
    /// Streams that one connection of a peer may have open (`LEYLINE_MAX_STREAMS_PER_CONNECTION`).
    pub max_streams: u32,
    /// Streams on one of our pooled connections (`POOL_MAX_STREAMS_PER_CONNECTION`).
    pub pool_max_streams: u16,
    /// When an unused pooled connection is released (`POOL_UNUSED_RELEASE_TIMEOUT`).
    pub unused_release: Duration,
    /// Windows and frames.
    #[serde(flatten)]
    pub sizes: hbone::Sizes,
}

/// What one peer, and all together, may cost.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Connections of one identity (`LEYLINE_MAX_CONNECTIONS_PER_IDENTITY`).
    pub connections_per_identity: usize,
    /// Connections altogether; `None`: half of the files that we may open (`LEYLINE_MAX_CONNECTIONS`).
    pub connections: Option<usize>,
    /// TLS handshakes at one time (`LEYLINE_MAX_HANDSHAKES`).
    pub handshakes: usize,
    /// Bytes of memory near which nothing new is taken on (`LEYLINE_MEMORY_LIMIT`); `None`: what our control group is given.
    pub memory: Option<u64>,
}

/// How it ends.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// From not ready to GOAWAY: others must hear of it (`MINIMUM_DRAIN_DURATION`,
    /// `TERMINATION_DRAIN_DURATION_SECONDS`).
    pub propagation: Duration,
    /// What is open may last so long after that (from `TERMINATION_GRACE_PERIOD_SECONDS`).
    pub deadline: Duration,
}

/// Log lines.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Log {
    /// A `tracing` filter (`RUST_LOG`).
    pub filter: String,
    /// JSON lines (`LOG_FORMAT`).
    pub json: bool,
}

const HBONE_PORT: u16 = mesh::outbound::HBONE_PORT;
const DEFAULT_SECRET_TTL: Duration = Duration::from_secs(24 * 3600);
const DEFAULT_AGE: Duration = Duration::from_secs(30 * 60);
const DEFAULT_DETECTION: Duration = Duration::from_millis(150);
const DEFAULT_UNUSED_RELEASE: Duration = Duration::from_secs(300);
const DEFAULT_PROPAGATION: Duration = Duration::from_secs(5);
/// What Kubernetes gives where nothing is said.
const DEFAULT_GRACE: u64 = 30;

impl Config {
    /// Reads the process environment.
    ///
    /// # Errors
    /// Every bad setting at once.
    pub fn from_env() -> Result<Self, ConfigError> {
        let names: Vec<String> = std::env::vars_os()
            .filter_map(|(name, _)| name.into_string().ok())
            .collect();
        Self::from_reader(Reader::new(&variable, &names))
    }

    /// Reads settings through `lookup`. Settings that are families of names (`XDS_HEADER_*`, `ISTIO_METAJSON_*`) are
    /// only seen by [`Config::from_env`].
    ///
    /// # Errors
    /// Every bad setting at once.
    pub fn from_lookup(lookup: Lookup<'_>) -> Result<Self, ConfigError> {
        Self::from_reader(Reader::new(lookup, &[]))
    }

    fn from_reader(mut read: Reader<'_>) -> Result<Self, ConfigError> {
        let in_kubernetes = read.some_text("KUBERNETES_SERVICE_HOST").is_some();
        let control_plane = match in_kubernetes {
            true => "https://istiod.istio-system.svc:15012",
            false => "https://localhost:15012",
        };
        let config = Self {
            node: read_node(&mut read),
            xds: Remote::read(&mut read, "XDS", control_plane, in_kubernetes),
            ca: read_ca(&mut read, control_plane, in_kubernetes),
            secret_ttl: read.duration_or("SECRET_TTL", DEFAULT_SECRET_TTL),
            revocations: read.some_text("CRL_PATH").map(PathBuf::from),
            listen: read_listen(&mut read),
            http2: read_http2(&mut read),
            limits: Limits {
                connections_per_identity: read
                    .parse_or("LEYLINE_MAX_CONNECTIONS_PER_IDENTITY", 1000),
                connections: read.parse("LEYLINE_MAX_CONNECTIONS"),
                handshakes: read.parse_or("LEYLINE_MAX_HANDSHAKES", 1024),
                memory: read.parse("LEYLINE_MEMORY_LIMIT"),
            },
            drain: read_drain(&mut read),
            max_connection_age: read.duration_or("LEYLINE_MAX_CONNECTION_AGE", DEFAULT_AGE),
            detection_deadline: read
                .duration_or("LEYLINE_PROTOCOL_DETECTION_TIMEOUT", DEFAULT_DETECTION),
            resolv_conf: read
                .text_or("LEYLINE_RESOLV_CONF", "/etc/resolv.conf")
                .into(),
            log: read_log(&mut read),
            worker_threads: read_worker_threads(&mut read),
        };
        config.check(&mut read);
        read.finish(config)
    }

    fn check(&self, read: &mut Reader<'_>) {
        let needed = [
            ("POD_NAME", &self.node.pod_name),
            ("POD_NAMESPACE", &self.node.namespace),
            ("SERVICE_ACCOUNT", &self.node.service_account),
        ];
        for (name, text) in needed {
            if text.is_empty() {
                read.reject(name, "empty: a waypoint has an identity of its own");
            }
        }
        for (name, limit) in [
            ("LEYLINE_MAX_HANDSHAKES", self.limits.handshakes),
            (
                "LEYLINE_MAX_CONNECTIONS_PER_IDENTITY",
                self.limits.connections_per_identity,
            ),
            (
                "LEYLINE_MAX_CONNECTIONS",
                self.limits.connections.unwrap_or(1),
            ),
        ] {
            if limit == 0 {
                read.reject(name, "at least 1 expected");
            }
        }
    }
}

fn read_node(read: &mut Reader<'_>) -> Node {
    let first = |names: &[&str], default: &str| -> Str {
        let found = names.iter().find_map(|name| read.some_text(name));
        found.unwrap_or_else(|| default.to_owned()).into()
    };
    let mut node = Node {
        pod_name: first(&["POD_NAME"], ""),
        namespace: first(&["POD_NAMESPACE"], ""),
        service_account: first(&["SERVICE_ACCOUNT", "ISTIO_META_SERVICE_ACCOUNT"], ""),
        instance_ip: first(&["INSTANCE_IP"], "1.1.1.1"),
        name: first(&["NODE_NAME", "ISTIO_META_NODE_NAME"], ""),
        cluster_id: first(&["CLUSTER_ID", "ISTIO_META_CLUSTER_ID"], "Kubernetes"),
        network: first(&["NETWORK", "ISTIO_META_NETWORK"], ""),
        cluster_domain: first(&["CLUSTER_DOMAIN"], "cluster.local"),
        trust_domain: TrustDomain::default(),
        gateway: first(&["GATEWAY_NAME", "ISTIO_META_WORKLOAD_NAME"], ""),
        role: Role::default(),
        istio_version: first(&["ISTIO_META_ISTIO_VERSION"], env!("CARGO_PKG_VERSION")).to_string(),
        metadata: BTreeMap::new(),
    };
    node.trust_domain = read.parse_or("TRUST_DOMAIN", TrustDomain::default());
    node.role = read.parse_with("LEYLINE_ROLE", role).unwrap_or_default();
    let version = Str::from(&*node.istio_version);
    node.metadata = [
        ("ISTIO_VERSION", &version),
        ("NAME", &node.pod_name),
        ("NAMESPACE", &node.namespace),
        ("INSTANCE_IPS", &node.instance_ip),
        ("NODE_NAME", &node.name),
        ("CLUSTER_ID", &node.cluster_id),
        ("NETWORK", &node.network),
        ("SERVICE_ACCOUNT", &node.service_account),
        ("WORKLOAD_NAME", &node.gateway),
    ]
    .into_iter()
    .map(|(key, text)| (key.to_owned(), text.to_string().into()))
    .collect();
    for (key, text) in read.family("ISTIO_METAJSON_") {
        match serde_json::from_str(&text) {
            Ok(value) => drop(node.metadata.insert(key, value)),
            Err(error) => read.reject(&format!("ISTIO_METAJSON_{key}"), error.to_string()),
        }
    }
    node
}

fn role(text: &str) -> Result<Role, String> {
    match text {
        "waypoint" => Ok(Role::Waypoint),
        "east-west" => Ok(Role::EastWest),
        _ => Err("waypoint or east-west expected".to_owned()),
    }
}

fn read_ca(read: &mut Reader<'_>, control_plane: &str, in_kubernetes: bool) -> Option<Remote> {
    if read.flag("FAKE_CA", false) {
        return None;
    }
    let remote = Remote::read(read, "CA", control_plane, in_kubernetes);
    if remote.is_none() {
        read.reject("CA_ADDRESS", "empty: certificates have no source");
    }
    remote
}

fn read_listen(read: &mut Reader<'_>) -> Listen {
    let ipv6 = read.flag("IPV6_ENABLED", true);
    let wildcard: IpAddr = match ipv6 {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    };
    let mut admin = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 15000))];
    if ipv6 {
        admin.push((Ipv6Addr::LOCALHOST, 15000).into());
    }
    match read.parse::<SocketAddr>("LEYLINE_ADMIN_ADDRESS") {
        Some(address) if address.ip().is_loopback() => admin = vec![address],
        Some(_) => read.reject("LEYLINE_ADMIN_ADDRESS", "a loopback address expected"),
        None => {}
    }
    Listen {
        hbone: read.parse_or("LEYLINE_HBONE_ADDRESS", (wildcard, HBONE_PORT).into()),
        admin,
        stats: read.parse_or("LEYLINE_STATS_ADDRESS", (wildcard, 15020).into()),
        readiness: read.parse_or("LEYLINE_READINESS_ADDRESS", (wildcard, 15021).into()),
    }
}

fn read_http2(read: &mut Reader<'_>) -> Http2 {
    let config = Http2 {
        max_streams: read.parse_or("LEYLINE_MAX_STREAMS_PER_CONNECTION", 200),
        pool_max_streams: read.parse_or("POOL_MAX_STREAMS_PER_CONNECTION", 100),
        unused_release: read.duration_or("POOL_UNUSED_RELEASE_TIMEOUT", DEFAULT_UNUSED_RELEASE),
        sizes: hbone::Sizes::read(read),
    };
    if config.pool_max_streams == 0 || config.max_streams == 0 {
        read.reject("POOL_MAX_STREAMS_PER_CONNECTION", "at least 1 expected");
    }
    config
}

/// The grace period holds both parts of the end, and a second for what comes after.
fn read_drain(read: &mut Reader<'_>) -> Drain {
    let seconds = read.parse("TERMINATION_DRAIN_DURATION_SECONDS");
    let propagation = read
        .duration("MINIMUM_DRAIN_DURATION")
        .or(seconds.map(Duration::from_secs))
        .unwrap_or(DEFAULT_PROPAGATION);
    let grace = read.parse_or("TERMINATION_GRACE_PERIOD_SECONDS", DEFAULT_GRACE);
    let last = propagation + Duration::from_secs(1);
    Drain {
        propagation,
        deadline: Duration::from_secs(grace)
            .saturating_sub(last)
            .max(Duration::from_secs(1)),
    }
}

fn read_log(read: &mut Reader<'_>) -> Log {
    Log {
        filter: read.log_filter("RUST_LOG"),
        json: read
            .parse_with("LOG_FORMAT", |text| match text {
                "json" => Ok(true),
                "plain" => Ok(false),
                _ => Err("plain or json expected".to_owned()),
            })
            .unwrap_or(false),
    }
}

fn read_worker_threads(read: &mut Reader<'_>) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let limit = read.parse_with("ISTIO_CPU_LIMIT", parse_cpus);
    let asked: Option<usize> = read.parse("LEYLINE_WORKER_THREADS");
    asked.or(limit).unwrap_or(cores).clamp(1, cores.max(1))
}

#[cfg(test)]
mod tests;
