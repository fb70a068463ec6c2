//! The settings of the node tunnel, read once at start-up from an injected lookup.
//!
//! Names and defaults are upstream's (`node-tunnel` settings of the Istio chart), so that the chart's DaemonSet runs this
//! binary unchanged. Durations are written as `5s`, `3m`, `1h`; switches as `true` or `false`. Nothing after start-up
//! reads the environment.

mod mesh_file;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use serde::Serialize;

use mesh::{identity::TrustDomain, names::Str, outcome::LocalWorkload};
use mesh_file::MeshFile;
pub use net::settings::{BadSetting, ConfigError, Lookup, Remote, RootCert, Token};
use net::settings::{Reader, parse_cpus, variable};
use net::{handover::Alone, hbone};

/// Port of captured egress.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of captured plaintext ingress.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// Port of HBONE.
pub const HBONE_PORT: u16 = 15008;

const DEFAULT_DNS_PORT: u16 = 15053;
const DEFAULT_MARK: u32 = 1337;
const DEFAULT_SECRET_TTL: Duration = Duration::from_secs(24 * 3600);
const DEFAULT_UNUSED_RELEASE: Duration = Duration::from_secs(300);
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(180);
const MESH_FILE: &str = "./etc/istio/config/mesh";

/// Everything that can be set.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// For whom we run.
    pub mode: Mode,
    /// Where and as whom we run.
    pub node: Node,
    /// Where mesh state comes from over xDS; `None`: from [`Config::local_state`] alone.
    pub xds: Option<Remote>,
    /// Subscribe to addresses one by one, when needed.
    pub xds_on_demand: bool,
    /// Mesh state from a file, which is followed, or from inline YAML.
    pub local_state: Option<LocalState>,
    /// Who signs certificates; `None` (`FAKE_CA`): an issuer that the caller brings, for tests.
    pub ca: Option<Remote>,
    /// Lifetime asked for; the CA may give less.
    pub secret_ttl: Duration,
    /// Sockets in pods' namespaces, and the agent that names them.
    pub inpod: InPod,
    /// Listeners in our own namespace.
    pub listen: Listen,
    /// HBONE and TCP proxying.
    pub proxy_enabled: bool,
    /// SOCKS5 on pods' loopback.
    pub socks5: bool,
    /// DNS proxying.
    pub dns: Dns,
    /// HTTP/2 and pool limits.
    pub http2: Http2,
    /// TCP keepalive on application-facing and dialled sockets.
    pub keepalive: Keepalive,
    /// Connections of one pod that are carried at a time. `None`: as many as use half of the files that we may open, so
    /// that one pod cannot keep the node's others out.
    pub max_pod_connections: Option<usize>,
    /// Bytes between two pods that we both serve go from socket to socket, as long as the network between them lets a
    /// tunnel through (`LEYLINE_SAME_NODE`).
    pub same_node: bool,
    /// What an application has written already goes with the CONNECT (`LEYLINE_DATA_WITH_CONNECT`).
    pub data_with_connect: bool,
    /// How long connections may take to end once we are told to stop.
    pub drain_deadline: Duration,
    /// Send baggage in responses and believe the peer's, for telemetry only.
    pub response_baggage: bool,
    /// Applications with an application tunnel listen on loopback.
    pub localhost_app_tunnel: bool,
    /// TLS versions and key exchanges.
    pub tls: Tls,
    /// Log lines.
    pub log: Log,
    /// Data-plane threads.
    pub worker_threads: usize,
}

/// For whom we run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// For every pod of the node, each in its own network namespace, as the agent says.
    Shared,
    /// For one workload, in whose network namespace we are. Nobody but its own redirection brings us its connections.
    Dedicated(LocalWorkload),
}

/// Where and as whom we run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Kubernetes node; `None`: every workload counts as local, and no certificate is fetched ahead.
    pub name: Option<Str>,
    /// Network id of the node; empty for the default one.
    pub network: Str,
    /// Cluster id.
    pub cluster_id: Str,
    /// DNS suffix.
    pub cluster_domain: Str,
    /// Our own trust domain.
    pub trust_domain: TrustDomain,
    /// Our address, for the node id.
    pub instance_ip: Str,
    /// Our pod's name, or empty.
    pub pod_name: Str,
    /// Our pod's namespace, or empty.
    pub pod_namespace: Str,
    /// Our service account.
    pub service_account: Option<Str>,
    /// Told to the control plane.
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Version shown in `istio_build`.
    pub istio_version: String,
}

impl Node {
    /// The workload that we are ourselves, for the listener that makes our metrics reachable over HBONE.
    pub fn own_workload(&self) -> Option<LocalWorkload> {
        let named = !self.pod_name.is_empty() && !self.pod_namespace.is_empty();
        named.then_some(LocalWorkload {
            name: self.pod_name.clone(),
            namespace: self.pod_namespace.clone(),
            service_account: self.service_account.clone()?,
        })
    }
}

/// Static mesh state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum LocalState {
    /// A YAML file.
    File(PathBuf),
    /// YAML text.
    Inline(String),
}

/// Sockets in pods' namespaces, and the agent that names them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InPod {
    /// The agent's ZDS socket.
    pub uds: PathBuf,
    /// SO_REUSEPORT on listeners, so that a successor can listen beside us.
    pub port_reuse: bool,
    /// Whether somebody starts a successor when we are told to end, as a DaemonSet does: until it listens, we serve on,
    /// as long as the grace period lasts.
    pub await_successor: bool,
    /// SO_MARK on every socket; `None`: unmarked.
    pub mark: Option<u32>,
    /// Whether applications see the client's address.
    pub original_source: OriginalSource,
    /// IPv6 sockets and AAAA records.
    pub ipv6: bool,
}

/// Whether applications see the client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum OriginalSource {
    /// Where transparent sockets are permitted.
    BestEffort,
    /// Always: an enrolment fails where they are not permitted.
    Required,
    /// Never.
    Never,
}

/// Listeners in our own namespace.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listen {
    /// Admin: loopback only.
    pub admin: Vec<SocketAddr>,
    /// Metrics.
    pub stats: SocketAddr,
    /// Readiness.
    pub readiness: SocketAddr,
}

/// DNS proxying.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dns {
    /// Whether pods' DNS is answered by us.
    pub enabled: bool,
    /// Port on each pod's loopback.
    pub port: u16,
    /// Names the upstream servers; re-read when it changes.
    pub resolv_conf: PathBuf,
    /// Wins ties for a name, after the client's own namespace. Deprecated upstream.
    pub preferred_service_namespace: Option<Str>,
}

/// HTTP/2 and pool limits.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Http2 {
    /// Streams on one pooled connection.
    pub max_streams_per_connection: u16,
    /// When an unused pooled connection is released.
    pub unused_release_timeout: Duration,
    /// Windows and frames.
    #[serde(flatten)]
    pub sizes: hbone::Sizes,
}

/// TCP keepalive.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Keepalive {
    /// Whether at all.
    pub enabled: bool,
    /// Idle time before the first probe.
    pub time: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Probes before giving up.
    pub retries: u32,
    /// TCP_USER_TIMEOUT of time + retries * interval.
    pub user_timeout: bool,
}

/// TLS versions and key exchanges.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Tls {
    /// Post-quantum key exchange only.
    pub post_quantum_only: bool,
    /// TLS 1.2 as well.
    pub tls12: bool,
    /// The list of revoked certificates (`CRL_PATH`).
    pub revocations: Option<PathBuf>,
    /// All names of the mesh's trust domain, where it has more than one: `TRUST_DOMAIN` and
    /// `LEYLINE_TRUST_DOMAIN_ALIASES`, a list with commas.
    pub domain_names: Vec<TrustDomain>,
}

/// Log lines.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Log {
    /// A `tracing` filter.
    pub filter: String,
    /// JSON lines.
    pub json: bool,
    /// Authorization decisions at `info`.
    pub authorization_at_info: bool,
}

impl Config {
    /// Reads the process environment and the mesh config file.
    ///
    /// # Errors
    /// Every bad setting at once.
    pub fn from_env() -> Result<Self, ConfigError> {
        let names: Vec<String> = std::env::vars_os()
            .filter_map(|(name, _)| name.into_string().ok())
            .collect();
        Self::from_reader(Reader::new(&variable, &names))
    }

    /// Reads settings through `lookup`, and the mesh config file that `LEYLINE_MESH_CONFIG_FILE` names
    /// (default: `./etc/istio/config/mesh`). Settings that are families of names (`XDS_HEADER_*`, `ISTIO_META_*`) are
    /// only seen by [`Config::from_env`].
    ///
    /// # Errors
    /// Every bad setting at once.
    pub fn from_lookup(lookup: Lookup<'_>) -> Result<Self, ConfigError> {
        Self::from_reader(Reader::new(lookup, &[]))
    }

    fn from_reader(mut read: Reader<'_>) -> Result<Self, ConfigError> {
        let file = MeshFile::read(&mut read);
        let in_kubernetes = read.some_text("KUBERNETES_SERVICE_HOST").is_some();
        let control_plane = Self::default_control_plane(&file, in_kubernetes);
        let mode = read_mode(&mut read);
        let inpod = read_inpod(&mut read, &mode, in_kubernetes);
        let node = read_node(&mut read, &file);
        let config = Self {
            xds: Remote::read(&mut read, "XDS", &control_plane, in_kubernetes),
            xds_on_demand: read.flag("XDS_ON_DEMAND", false),
            local_state: read_local_state(&mut read),
            ca: read_ca(&mut read, &control_plane, in_kubernetes),
            secret_ttl: read.duration_or("SECRET_TTL", DEFAULT_SECRET_TTL),
            mode,
            listen: read_listen(&mut read, &file, inpod.ipv6),
            inpod,
            proxy_enabled: read.flag("ENABLE_PROXY", true),
            socks5: read.flag("UNSTABLE_ENABLE_SOCKS5", false),
            dns: read_dns(&mut read, &file),
            http2: read_http2(&mut read),
            keepalive: read_keepalive(&mut read),
            max_pod_connections: read_max_pod_connections(&mut read),
            same_node: read.flag("LEYLINE_SAME_NODE", false),
            data_with_connect: read.flag("LEYLINE_DATA_WITH_CONNECT", true),
            drain_deadline: read_drain_deadline(&mut read),
            response_baggage: read.flag("ENABLE_RESPONSE_BAGGAGE", true),
            localhost_app_tunnel: read.flag("LOCALHOST_APP_TUNNEL", true),
            tls: read_tls(&mut read, &node.trust_domain),
            node,
            log: read_log(&mut read),
            worker_threads: read_worker_threads(&mut read, &file),
        };
        config.check(&mut read);
        read.finish(config)
    }

    /// The keepalive of sockets, where there is one.
    pub(crate) fn keepalive(&self) -> Option<net::socket::Keepalive> {
        let Keepalive {
            enabled,
            time,
            interval,
            retries,
            user_timeout,
        } = self.keepalive;
        (enabled || user_timeout).then_some(net::socket::Keepalive {
            probes: enabled,
            time,
            interval,
            retries,
            user_timeout,
        })
    }

    fn default_control_plane(file: &MeshFile, in_kubernetes: bool) -> String {
        file.discovery_address.clone().unwrap_or_else(|| {
            if in_kubernetes {
                "https://istiod.istio-system.svc:15012".to_owned()
            } else {
                "https://localhost:15012".to_owned()
            }
        })
    }

    fn check(&self, read: &mut Reader<'_>) {
        if !self.proxy_enabled && !self.dns.enabled {
            read.reject("ENABLE_PROXY", "proxy and DNS are both off: nothing to do");
        }
    }
}

fn read_node(read: &mut Reader<'_>, file: &MeshFile) -> Node {
    let trust_domain = read.parse_or("TRUST_DOMAIN", TrustDomain::default());
    let text = |name: &str, default: &str| -> Str { read.text_or(name, default).into() };
    let cluster_id = read
        .some_text("ISTIO_META_CLUSTER_ID")
        .or_else(|| read.some_text("CLUSTER_ID"))
        .unwrap_or_else(|| "Kubernetes".to_owned());
    let mut node = Node {
        name: read.some_text("NODE_NAME").map(Into::into),
        network: text("NETWORK", ""),
        cluster_id: cluster_id.into(),
        cluster_domain: text("CLUSTER_DOMAIN", "cluster.local"),
        trust_domain,
        instance_ip: text("INSTANCE_IP", "1.1.1.1"),
        pod_name: text("POD_NAME", ""),
        pod_namespace: text("POD_NAMESPACE", ""),
        service_account: read.some_text("SERVICE_ACCOUNT").map(Into::into),
        metadata: BTreeMap::new(),
        istio_version: read.text_or("ISTIO_META_ISTIO_VERSION", "unknown"),
    };
    node.metadata = metadata_of(&node, file);
    for (key, text) in read.family("ISTIO_METAJSON_") {
        match serde_json::from_str(&text) {
            Ok(value) => drop(node.metadata.insert(key, value)),
            Err(e) => read.reject(&format!("ISTIO_METAJSON_{key}"), e.to_string()),
        }
    }
    node
}

fn metadata_of(node: &Node, file: &MeshFile) -> BTreeMap<String, serde_json::Value> {
    let own = [
        ("NAME", node.pod_name.to_string()),
        ("NAMESPACE", node.pod_namespace.to_string()),
        ("INSTANCE_IPS", node.instance_ip.to_string()),
        (
            "NODE_NAME",
            node.name.as_deref().unwrap_or_default().to_owned(),
        ),
        ("CLUSTER_ID", node.cluster_id.to_string()),
    ];
    let own = own.map(|(key, value)| (key.to_owned(), value.into()));
    let given = file.metadata.iter();
    given
        .map(|(key, value)| (key.clone(), value.clone().into()))
        .chain(own)
        .collect()
}

fn read_local_state(read: &mut Reader<'_>) -> Option<LocalState> {
    let path = read.some_text("LOCAL_XDS_PATH");
    let inline = read.some_text("LOCAL_XDS");
    match (path, inline) {
        (Some(_), Some(_)) => {
            read.reject("LOCAL_XDS", "LOCAL_XDS_PATH is set as well: one of them");
            None
        }
        (Some(path), None) => Some(LocalState::File(path.into())),
        (None, Some(text)) => Some(LocalState::Inline(text)),
        (None, None) => None,
    }
}

fn read_ca(read: &mut Reader<'_>, default_address: &str, in_kubernetes: bool) -> Option<Remote> {
    if read.flag("FAKE_CA", false) {
        return None;
    }
    let remote = Remote::read(read, "CA", default_address, in_kubernetes);
    if remote.is_none() {
        read.reject("CA_ADDRESS", "empty: certificates have no source");
    }
    remote
}

impl InPod {
    pub(crate) fn alone(&self) -> Alone {
        match self.await_successor {
            true => Alone::Stay,
            false => Alone::Close,
        }
    }
}

fn read_mode(read: &mut Reader<'_>) -> Mode {
    const OF: &str = "PROXY_WORKLOAD_INFO";
    match read.some_text("PROXY_MODE").as_deref() {
        None | Some("shared") => Mode::Shared,
        Some("dedicated") => match read.some_text(OF).as_deref().and_then(workload_of) {
            Some(workload) => Mode::Dedicated(workload),
            None => {
                read.reject(
                    OF,
                    "namespace/name/serviceaccount expected, for dedicated mode",
                );
                Mode::Shared
            }
        },
        Some(_) => {
            read.reject("PROXY_MODE", "shared or dedicated expected");
            Mode::Shared
        }
    }
}

fn workload_of(text: &str) -> Option<LocalWorkload> {
    let parts: Vec<&str> = text.split('/').collect();
    let [namespace, name, service_account] = parts[..] else {
        return None;
    };
    let whole = [namespace, name, service_account]
        .iter()
        .all(|it| !it.is_empty());
    whole.then(|| LocalWorkload {
        name: name.into(),
        namespace: namespace.into(),
        service_account: service_account.into(),
    })
}

fn read_inpod(read: &mut Reader<'_>, mode: &Mode, in_kubernetes: bool) -> InPod {
    // Redirection in a node's pods lets the mark pass; that of a single workload, the user that we run as.
    let default_mark = match mode {
        Mode::Shared => DEFAULT_MARK,
        Mode::Dedicated(_) => 0,
    };
    let original_source = match read.optional_flag("ENABLE_ORIG_SRC") {
        None => OriginalSource::BestEffort,
        Some(true) => OriginalSource::Required,
        Some(false) => OriginalSource::Never,
    };
    InPod {
        uds: read
            .text_or("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock")
            .into(),
        port_reuse: read.flag("INPOD_PORT_REUSE", true),
        await_successor: read.flag("LEYLINE_AWAIT_SUCCESSOR", in_kubernetes),
        mark: Some(read.parse_or("PACKET_MARK", default_mark)).filter(|mark| *mark != 0),
        original_source,
        ipv6: read.flag("IPV6_ENABLED", true),
    }
}

fn read_listen(read: &mut Reader<'_>, file: &MeshFile, ipv6: bool) -> Listen {
    let wildcard: IpAddr = if ipv6 {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let admin_port = file.admin_port.unwrap_or(15000);
    let stats_port = file.stats_port.unwrap_or(15020);
    let mut admin = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, admin_port))];
    if wildcard.is_ipv6() {
        admin.push((Ipv6Addr::LOCALHOST, admin_port).into());
    }
    let admin = match read.parse::<SocketAddr>("LEYLINE_ADMIN_ADDRESS") {
        Some(address) if address.ip().is_loopback() => vec![address],
        Some(_) => {
            read.reject("LEYLINE_ADMIN_ADDRESS", "a loopback address expected");
            admin
        }
        None => admin,
    };
    Listen {
        admin,
        stats: read.parse_or("LEYLINE_STATS_ADDRESS", (wildcard, stats_port).into()),
        readiness: read.parse_or("LEYLINE_READINESS_ADDRESS", (wildcard, 15021).into()),
    }
}

fn read_dns(read: &mut Reader<'_>, file: &MeshFile) -> Dns {
    let address = file.metadata.get("DNS_PROXY_ADDR");
    let port = address.and_then(|text| text.rsplit_once(':')?.1.parse().ok());
    // Pods are redirected to one port: any that is free, as the kernel reads 0, is none that they would find.
    let port = port.filter(|port| *port != 0);
    if address.is_some() && port.is_none() {
        read.reject("DNS_PROXY_ADDR", "host:port expected");
    }
    let capture = file.metadata.get("DNS_CAPTURE");
    Dns {
        enabled: capture.is_none_or(|text| text == "true"),
        port: port.unwrap_or(DEFAULT_DNS_PORT),
        resolv_conf: read
            .text_or("LEYLINE_RESOLV_CONF", "/etc/resolv.conf")
            .into(),
        preferred_service_namespace: read.some_text("PREFERED_SERVICE_NAMESPACE").map(Into::into),
    }
}

fn read_http2(read: &mut Reader<'_>) -> Http2 {
    let config = Http2 {
        max_streams_per_connection: read.parse_or("POOL_MAX_STREAMS_PER_CONNECTION", 100),
        unused_release_timeout: read
            .duration_or("POOL_UNUSED_RELEASE_TIMEOUT", DEFAULT_UNUSED_RELEASE),
        sizes: hbone::Sizes::read(read),
    };
    if config.max_streams_per_connection == 0 {
        read.reject("POOL_MAX_STREAMS_PER_CONNECTION", "at least 1 expected");
    }
    config
}

fn read_keepalive(read: &mut Reader<'_>) -> Keepalive {
    let keepalive = Keepalive {
        enabled: read.flag("KEEPALIVE_ENABLED", true),
        time: read.duration_or("KEEPALIVE_TIME", DEFAULT_KEEPALIVE),
        interval: read.duration_or("KEEPALIVE_INTERVAL", DEFAULT_KEEPALIVE),
        retries: read.parse_or("KEEPALIVE_RETRIES", 9),
        user_timeout: read.flag("USER_TIMEOUT_ENABLED", false),
    };
    // What the kernel takes (tcp(7)): a socket that cannot be given these would fail each pod, and tell nobody why.
    for (name, time) in [
        ("KEEPALIVE_TIME", keepalive.time),
        ("KEEPALIVE_INTERVAL", keepalive.interval),
    ] {
        if !(1..=32_767).contains(&time.as_secs()) {
            read.reject(name, "1s to 32767s expected");
        }
    }
    if !(1..=127).contains(&keepalive.retries) {
        read.reject("KEEPALIVE_RETRIES", "1 to 127 expected");
    }
    keepalive
}

/// Leaves the grace period some room: N - 5 s where N > 10 s, else N - 1 s, at least 1 s.
fn read_drain_deadline(read: &mut Reader<'_>) -> Duration {
    let grace: Option<u64> = read.parse("TERMINATION_GRACE_PERIOD_SECONDS");
    let from_grace = grace.map(|seconds| match seconds {
        11.. => seconds - 5,
        _ => seconds.saturating_sub(1).max(1),
    });
    read.duration("CONNECTION_TERMINATION_DEADLINE")
        .unwrap_or_else(|| Duration::from_secs(from_grace.unwrap_or(5)))
}

fn read_max_pod_connections(read: &mut Reader<'_>) -> Option<usize> {
    const NAME: &str = "LEYLINE_MAX_POD_CONNECTIONS";
    let limit = read.parse(NAME);
    if limit == Some(0) {
        read.reject(NAME, "at least 1 expected");
    }
    limit
}

fn read_domain_names(read: &mut Reader<'_>, own: &TrustDomain) -> Vec<TrustDomain> {
    const NAME: &str = "LEYLINE_TRUST_DOMAIN_ALIASES";
    let parse = |text: &str| {
        let names = text.split(',').map(str::trim).filter(|it| !it.is_empty());
        let parsed = names.map(|it| it.parse::<TrustDomain>());
        parsed
            .chain([Ok(own.clone())])
            .collect::<Result<Vec<_>, _>>()
    };
    let names = read.parse_with(NAME, |text| parse(text).map_err(|error| error.to_string()));
    names.unwrap_or_default()
}

fn read_tls(read: &mut Reader<'_>, trust_domain: &TrustDomain) -> Tls {
    Tls {
        post_quantum_only: read
            .parse_with("COMPLIANCE_POLICY", |text| match text {
                "pqc" => Ok(true),
                _ => Err("pqc expected".to_owned()),
            })
            .unwrap_or(false),
        tls12: read.flag("TLS12_ENABLED", false),
        revocations: read.some_text("CRL_PATH").map(PathBuf::from),
        domain_names: read_domain_names(read, trust_domain),
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
        authorization_at_info: read.flag("AUTHZ_POLICY_INFO_LOGGING", false),
    }
}

fn read_worker_threads(read: &mut Reader<'_>, file: &MeshFile) -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let resource_limit = read.parse_with("ZTUNNEL_RESOURCE_CPU_LIMIT", parse_cpus);
    let plain_limit = read.parse_with("ZTUNNEL_CPU_LIMIT", parse_cpus);
    let limits = CpuLimits {
        cores: resource_limit.or(plain_limit).unwrap_or(logical).max(1),
        limit: resource_limit,
        request: read.parse_with("ZTUNNEL_RESOURCE_CPU_REQUEST", parse_cpus),
    };
    let chosen = read.parse_with("ZTUNNEL_WORKER_THREADS", |text| {
        parse_worker_threads(text, limits.cores)
    });
    chosen
        .or_else(|| file.concurrency.map(|n| exact_or_all(n, limits.cores)))
        .unwrap_or_else(|| limits.default_threads())
}

struct CpuLimits {
    cores: usize,
    limit: Option<usize>,
    request: Option<usize>,
}

impl CpuLimits {
    fn default_threads(&self) -> usize {
        let request = self.request.unwrap_or(0);
        match self.limit {
            Some(limit) => limit.max(request).max(1),
            None => self.cores.div_ceil(4).max(request).max(2),
        }
    }
}

fn exact_or_all(threads: u16, cores: usize) -> usize {
    match threads {
        0 => cores,
        exact => exact.into(),
    }
}

fn parse_worker_threads(text: &str, cores: usize) -> Result<usize, String> {
    let Some(percent) = text.strip_suffix('%') else {
        let threads = text.parse::<u16>().map_err(|e| e.to_string())?;
        return Ok(exact_or_all(threads, cores));
    };
    match percent.parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(share_of(cores, percent)),
        _ => Err("more than 0% and up to 100% expected".to_owned()),
    }
}

/// So many percent of the cores, rounded up.
fn share_of(cores: usize, percent: f64) -> usize {
    let most = u32::try_from(cores).unwrap_or(u32::MAX);
    let wanted = f64::from(most) * percent / 100.0;
    let enough = (1..=most).find(|threads| f64::from(*threads) >= wanted);
    enough.map_or(cores, |threads| threads as usize)
}

#[cfg(test)]
mod tests;
