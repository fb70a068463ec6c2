//! Settings of the control plane: flags, each with an environment variable `LEYLINE_*`, parsed once at start.
//!
//! Nothing else reads the environment. Every bad setting is reported at once, because fixing them one restart
//! at a time is misery.

mod cluster;
pub mod mesh;
pub mod networks;

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use ::mesh::identity::TrustDomain;

use crate::serve::MAX_AGE;

pub use cluster::{ClusterConfig, Discovery};

/// A stream that lasts less long costs more than it proves.
const SHORTEST_AGE: Duration = Duration::from_secs(60);

/// Flags and their environment variables as text. [`Config::try_from`] checks them.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "controlplane", version, about = "The control plane of Leyline")]
pub struct Args {
    /// Folder of Kubernetes YAML to watch; repeat it, later ones are merged over earlier ones. Without any: the
    /// Kubernetes API
    #[arg(long = "folder", env = "LEYLINE_FOLDERS", value_delimiter = ':')]
    pub folders: Vec<PathBuf>,

    /// Address of the gRPC listener (delta xDS and certificates, TLS)
    #[arg(long, env = "LEYLINE_XDS_LISTEN", default_value = "[::]:15012")]
    pub xds_listen: String,

    /// Address of the admin listener (HTTP: readiness, metrics, debug, status)
    /// [default: 127.0.0.1:15014, on Kubernetes :15014]
    #[arg(long, env = "LEYLINE_ADMIN_LISTEN")]
    pub admin_listen: Option<String>,

    /// Folder of the self-signed root; made at the first start. `root-cert.pem` in it is for clients
    #[arg(long, env = "LEYLINE_CA_DIR")]
    pub ca_dir: Option<PathBuf>,

    /// Folder of a plug-in intermediate: ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem; or tls.crt, tls.key, ca.crt
    #[arg(long, env = "LEYLINE_CA_PLUG_IN_DIR")]
    pub ca_plug_in_dir: Option<PathBuf>,

    /// Lifetime of a certificate whose request names none, in seconds
    #[arg(long, env = "LEYLINE_WORKLOAD_CERT_TTL", default_value = "86400")]
    pub workload_cert_ttl: String,

    /// Longest lifetime that may be asked for, in seconds
    #[arg(long, env = "LEYLINE_MAX_WORKLOAD_CERT_TTL", default_value = "7776000")]
    pub max_workload_cert_ttl: String,

    /// DNS names and addresses of the control plane's own certificate [default: istiod.NAMESPACE.svc and its other
    /// names, localhost]
    #[arg(
        long = "serving-name",
        env = "LEYLINE_SERVING_NAMES",
        value_delimiter = ','
    )]
    pub serving_names: Vec<String>,

    /// Trust domain of the mesh
    #[arg(long, env = "LEYLINE_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,

    /// Id of this cluster
    #[arg(long, env = "LEYLINE_CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,

    /// Network of this cluster's pods; empty is the default network
    #[arg(long, env = "LEYLINE_NETWORK", default_value = "")]
    pub network: String,

    /// DNS suffix of services
    #[arg(long, env = "LEYLINE_CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,

    /// Namespace whose policies apply to the whole mesh
    #[arg(long, env = "LEYLINE_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,

    /// JWKS file with the keys that sign service account tokens
    #[arg(long, env = "LEYLINE_JWKS")]
    pub jwks: Option<PathBuf>,

    /// Audiences of which a token must name one
    #[arg(
        long = "token-audience",
        env = "LEYLINE_TOKEN_AUDIENCES",
        value_delimiter = ',',
        default_value = "istio-ca"
    )]
    pub token_audiences: Vec<String>,

    /// Service accounts (NAMESPACE/NAME) of node tunnels: they may read the mesh and ask for their pods' certificates
    #[arg(
        long = "trusted-node-account",
        env = "LEYLINE_TRUSTED_NODE_ACCOUNTS",
        value_delimiter = ',',
        default_value = "istio-system/ztunnel"
    )]
    pub trusted_node_accounts: Vec<String>,

    /// New xDS streams per second; 0 is 100 per core, at least 200 and at most 1000
    #[arg(long, env = "LEYLINE_MAX_STREAMS_PER_SECOND", default_value = "0")]
    pub max_streams_per_second: String,

    /// How long open streams may last after the end was asked for, in seconds
    #[arg(long, env = "LEYLINE_SHUTDOWN_SECONDS", default_value = "10")]
    pub shutdown_seconds: String,

    /// Text or JSON log lines: plain, json
    #[arg(long, env = "LEYLINE_LOG_FORMAT", default_value = "plain")]
    pub log_format: String,

    /// What is logged, as `level` or `target=level`, separated by commas
    #[arg(long, env = "LEYLINE_LOG", default_value = "info")]
    pub log: String,

    #[command(flatten)]
    #[allow(missing_docs, reason = "documented there")]
    pub discovery: Discovery,
}

/// Checked settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folders of Kubernetes YAML, in merging order: the user's, then the state folder. Empty on Kubernetes.
    pub folders: Vec<PathBuf>,
    /// Set where the Kubernetes API is the source and not folders.
    pub cluster: Option<ClusterConfig>,
    /// The gRPC listener. Port 0 takes a free one (see [`crate::run::ControlPlane::xds_address`]).
    pub xds_listen: SocketAddr,
    /// The admin listener.
    pub admin_listen: SocketAddr,
    /// The certificate authority.
    pub ca: CaConfig,
    /// DNS names and IP addresses of the serving certificate. Not empty.
    pub serving_names: Vec<String>,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// This cluster's id.
    pub cluster_id: String,
    /// This cluster's network; empty is the default one.
    pub network: String,
    /// DNS suffix of services.
    pub cluster_domain: String,
    /// Namespace whose policies apply to the whole mesh.
    pub root_namespace: String,
    /// File of the mesh's configuration, where it was asked for.
    pub mesh_config: Option<PathBuf>,
    /// What holds for all waypoints, once that file was read.
    pub mesh: Option<std::sync::Arc<crate::translate::l7::istio::mesh::MeshSettings>>,
    /// Keys that sign service account tokens. `None`: only client certificates authenticate.
    pub jwks: Option<PathBuf>,
    /// Audiences of which a token must name one.
    pub token_audiences: Vec<String>,
    /// Who may read the whole mesh and impersonate the pods of its node.
    pub trusted_node_accounts: Vec<ServiceAccount>,
    /// New xDS streams per second.
    pub max_streams_per_second: u32,
    /// How long a proxy's stream lasts before it has to prove itself anew.
    pub max_stream_age: Duration,
    /// How long open streams may last after the end was asked for.
    pub shutdown_grace: Duration,
}

/// Settings of the certificate authority.
#[derive(Debug, Clone)]
pub struct CaConfig {
    /// Where the signing key comes from.
    pub source: CaSource,
    /// Lifetime when a request names none.
    pub default_ttl: Duration,
    /// Longest lifetime that is granted.
    pub max_ttl: Duration,
}

/// Where the signing key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CaSource {
    /// A root of our own, kept in this folder and made at the first start.
    SelfSigned(PathBuf),
    /// An intermediate made by others, in this folder.
    PlugIn(PathBuf),
    /// An intermediate made by others in this folder if there is one, else a root of our own in a Secret.
    Cluster(PathBuf),
}

impl CaSource {
    /// The folder of the keys.
    pub fn dir(&self) -> &std::path::Path {
        match self {
            Self::SelfSigned(dir) | Self::PlugIn(dir) | Self::Cluster(dir) => dir,
        }
    }
}

/// A Kubernetes service account, written `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for ServiceAccount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self {
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                })
            }
            _ => Err("expected NAMESPACE/NAME".to_owned()),
        }
    }
}

/// Every bad setting of one start, not only the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub Vec<BadSetting>);

/// One bad setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSetting {
    /// The flag, without dashes.
    pub setting: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bad settings:")?;
        for BadSetting { setting, problem } in &self.0 {
            write!(f, "\n  --{setting}: {problem}")?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Problems(Vec<BadSetting>);

impl Problems {
    fn add(&mut self, setting: &'static str, problem: impl fmt::Display) {
        self.0.push(BadSetting {
            setting,
            problem: problem.to_string(),
        });
    }

    fn parse<T: FromStr<Err: fmt::Display>>(
        &mut self,
        setting: &'static str,
        text: &str,
    ) -> Option<T> {
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.add(setting, format_args!("{text:?}: {error}"));
                None
            }
        }
    }

    fn seconds(&mut self, setting: &'static str, text: &str, least: u64) -> Option<Duration> {
        let seconds: u64 = self.parse(setting, text)?;
        if seconds < least {
            self.add(setting, format_args!("{seconds} is less than {least}"));
            return None;
        }
        Some(Duration::from_secs(seconds))
    }

    fn ca(&mut self, args: &Args) -> Option<CaConfig> {
        let upstream = &args.discovery;
        let default_ttl = match given(upstream.ca_default_ttl.as_deref()) {
            Some(text) => self.duration("defaultWorkloadCertTTL", text),
            None => self.seconds("workload-cert-ttl", &args.workload_cert_ttl, 60),
        };
        let max_ttl = match given(upstream.ca_max_ttl.as_deref()) {
            Some(text) => self.duration("maxWorkloadCertTTL", text),
            None => self.seconds("max-workload-cert-ttl", &args.max_workload_cert_ttl, 60),
        };
        if let (Some(default), Some(max)) = (default_ttl, max_ttl)
            && default > max
        {
            self.add(
                "workload-cert-ttl",
                format_args!(
                    "{}s is more than the longest, {}s",
                    default.as_secs(),
                    max.as_secs()
                ),
            );
        }
        let source = match args.folders.is_empty() {
            true => self.cluster_ca(args),
            false => self.folder_ca(args),
        };
        Some(CaConfig {
            source: source?,
            default_ttl: default_ttl?,
            max_ttl: max_ttl?,
        })
    }

    fn cluster_ca(&mut self, args: &Args) -> Option<CaSource> {
        if args.ca_dir.is_some() {
            self.add(
                "ca-dir",
                "is for folders; on Kubernetes the root is in a Secret",
            );
            return None;
        }
        // Where the chart mounts the Secret `cacerts`, if there is one.
        let mounted = || "/etc/cacerts".into();
        let dir = args.ca_plug_in_dir.clone().unwrap_or_else(mounted);
        Some(CaSource::Cluster(dir))
    }

    fn folder_ca(&mut self, args: &Args) -> Option<CaSource> {
        match (&args.ca_dir, &args.ca_plug_in_dir) {
            (Some(dir), None) => Some(CaSource::SelfSigned(dir.clone())),
            (None, Some(dir)) => Some(CaSource::PlugIn(dir.clone())),
            (Some(_), Some(_)) => {
                self.add("ca-plug-in-dir", "give either this or --ca-dir");
                None
            }
            (None, None) => {
                self.add("ca-dir", "give this or --ca-plug-in-dir");
                None
            }
        }
    }

    fn accounts(&mut self, texts: &[String]) -> Vec<ServiceAccount> {
        let given = texts.iter().filter(|text| !text.is_empty());
        given
            .filter_map(|text| self.parse("trusted-node-account", text))
            .collect()
    }
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let args = args.with_upstream();
        let mut problems = Problems::default();
        problems.presence(&args);
        let cluster = match args.folders.is_empty() {
            true => problems.cluster(&args.discovery),
            false => None,
        };
        let default_admin = if cluster.is_some() {
            ":15014"
        } else {
            "127.0.0.1:15014"
        };
        let admin_listen = args.admin_listen.as_deref().unwrap_or(default_admin);
        let xds_listen = problems.listen("xds-listen", &args.xds_listen);
        let admin_listen = problems.listen("admin-listen", admin_listen);
        let trust_domain = problems.parse("trust-domain", &args.trust_domain);
        let ca = problems.ca(&args);
        let trusted_node_accounts = problems.accounts(&args.trusted_node_accounts);
        let streams = problems.parse("max-streams-per-second", &args.max_streams_per_second);
        let shutdown_grace = match given(args.discovery.shutdown_duration.as_deref()) {
            Some(text) => problems.duration("shutdownDuration", text),
            None => problems.seconds("shutdown-seconds", &args.shutdown_seconds, 0),
        };
        let max_stream_age = match given(args.discovery.connection_age.as_deref()) {
            Some(text) => problems.duration("keepaliveMaxServerConnectionAge", text),
            None => Some(MAX_AGE),
        };
        if max_stream_age.is_some_and(|age| age < SHORTEST_AGE) {
            problems.add(
                "keepaliveMaxServerConnectionAge",
                format_args!("proxies would do nothing but come back: at least {SHORTEST_AGE:?}"),
            );
        }
        let (
            Some(xds_listen),
            Some(admin_listen),
            Some(trust_domain),
            Some(ca),
            Some(streams),
            Some(max_stream_age),
            Some(shutdown_grace),
            true,
        ) = (
            xds_listen,
            admin_listen,
            trust_domain,
            ca,
            streams,
            max_stream_age,
            shutdown_grace,
            problems.0.is_empty(),
        )
        else {
            return Err(ConfigError(problems.0));
        };
        Ok(Self {
            serving_names: serving_names(args.serving_names, cluster.as_ref(), &args.discovery),
            mesh_config: args.discovery.mesh_config.clone(),
            mesh: None,
            folders: args.folders,
            cluster,
            xds_listen,
            admin_listen,
            ca,
            trust_domain,
            cluster_id: args.cluster_id,
            network: args.network,
            cluster_domain: args.cluster_domain,
            root_namespace: args.root_namespace,
            jwks: args.jwks,
            token_audiences: non_empty(args.token_audiences),
            trusted_node_accounts,
            max_streams_per_second: streams_per_second(streams),
            max_stream_age,
            shutdown_grace,
        })
    }
}

impl Args {
    /// What upstream's flags say, in ours. A folder's control plane does not look at them.
    fn with_upstream(mut self) -> Self {
        if !self.folders.is_empty() {
            return self;
        }
        let upstream = self.discovery.clone();
        let put = |own: &mut String, theirs: &Option<String>| {
            if let Some(text) = given(theirs.as_deref()) {
                text.clone_into(own);
            }
        };
        put(&mut self.xds_listen, &upstream.secure_grpc_addr);
        put(&mut self.cluster_domain, &upstream.domain);
        put(&mut self.cluster_id, &upstream.cluster);
        put(
            &mut self.max_streams_per_second,
            &upstream.max_requests_per_second,
        );
        if self.admin_listen.is_none() {
            self.admin_listen = upstream.monitoring_addr;
        }
        for (own, theirs) in [
            (&mut self.token_audiences, upstream.ca_audiences),
            (&mut self.trusted_node_accounts, upstream.ca_node_accounts),
        ] {
            let theirs = cluster::list(theirs.as_deref());
            if !theirs.is_empty() {
                *own = theirs;
            }
        }
        self
    }

    /// How log lines look and which there are.
    pub fn log(&self) -> (String, String) {
        let levels = self.discovery.log_output_level.as_deref();
        let filter = levels.and_then(cluster::log_filter);
        let format = match self.discovery.log_as_json {
            Some(true) => "json".to_owned(),
            _ => self.log_format.clone(),
        };
        (format, filter.unwrap_or_else(|| self.log.clone()))
    }
}

impl Problems {
    fn presence(&mut self, args: &Args) {
        if args.token_audiences.iter().all(String::is_empty) {
            self.add("token-audience", "name at least one");
        }
        for (setting, text) in [
            ("cluster-id", &args.cluster_id),
            ("cluster-domain", &args.cluster_domain),
            ("root-namespace", &args.root_namespace),
        ] {
            if text.is_empty() {
                self.add(setting, "must not be empty");
            }
        }
    }
}

fn given(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

/// The names that proxies and the API server call a control plane by (control-plane.md 1).
fn serving_names(
    named: Vec<String>,
    cluster: Option<&ClusterConfig>,
    upstream: &Discovery,
) -> Vec<String> {
    let named = non_empty(named);
    if !named.is_empty() {
        return named;
    }
    let namespace = cluster.map_or("istio-system", |cluster| &cluster.namespace);
    let mut services = vec!["istiod".to_owned()];
    if let Some(cluster) = cluster {
        if cluster.revision != "default" {
            services.push(format!("istiod-{}", cluster.revision));
        }
        services.extend(["istiod-remote".to_owned(), "istio-pilot".to_owned()]);
    }
    let services = services
        .iter()
        .map(|name| format!("{name}.{namespace}.svc"));
    let custom = match cluster {
        Some(_) => cluster::list(upstream.custom_host.as_deref()),
        None => Vec::new(),
    };
    let local = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    services.chain(custom).chain(local).collect()
}

fn non_empty(list: Vec<String>) -> Vec<String> {
    list.into_iter().filter(|item| !item.is_empty()).collect()
}

/// A stream costs a cursor and its writes, so many may begin at once: 500 proxies that come back together are all taken.
fn streams_per_second(asked: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match asked {
        0 => u32::try_from(100 * cores).unwrap_or(1000).clamp(200, 1000),
        asked => asked,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        let args = Args::parse_from(["controlplane"].iter().chain(flags));
        Config::try_from(args)
    }

    #[test]
    fn a_folder_and_a_ca_folder_are_enough() {
        let config = config(&["--folder", "/mesh", "--ca-dir", "/ca"]).unwrap();
        assert_eq!(config.ca.source, CaSource::SelfSigned("/ca".into()));
        assert_eq!(config.ca.default_ttl.as_secs(), 24 * 3600);
        assert_eq!(
            config.trusted_node_accounts[0].to_string(),
            "istio-system/ztunnel"
        );
        assert_eq!(config.token_audiences, ["istio-ca"]);
    }

    #[test]
    fn every_bad_setting_is_reported_at_once() {
        let error = config(&[
            "--folder",
            "/mesh",
            "--xds-listen",
            "nowhere",
            "--trust-domain",
            "Upper",
            "--workload-cert-ttl",
            "1",
            "--trusted-node-account",
            "ztunnel",
            "--cluster-id",
            "",
        ])
        .unwrap_err();
        let settings: Vec<_> = error.0.iter().map(|bad| bad.setting).collect();
        assert_eq!(
            settings,
            [
                "cluster-id",
                "xds-listen",
                "trust-domain",
                "workload-cert-ttl",
                "ca-dir",
                "trusted-node-account",
            ]
        );
        assert!(error.to_string().contains("nowhere"), "{error}");
    }

    #[test]
    fn the_arguments_of_upstream_charts_are_read() {
        let config = config(&[
            "discovery",
            "--monitoringAddr=:15014",
            "--log_output_level=default:info",
            "--domain",
            "cluster.example",
            "--keepaliveMaxServerConnectionAge",
            "45m",
            "--clusterID=east",
            "-n",
            "mesh",
            "--revision=canary",
            "--shutdownDuration=20s",
        ])
        .unwrap();
        let cluster = config.cluster.unwrap();
        assert_eq!(config.admin_listen.to_string(), "[::]:15014");
        assert_eq!(config.cluster_domain, "cluster.example");
        assert_eq!((&*config.cluster_id, &*cluster.namespace), ("east", "mesh"));
        assert_eq!(config.shutdown_grace.as_secs(), 20);
        assert_eq!(config.max_stream_age.as_secs(), 45 * 60);
        assert_eq!(cluster.ready_listen.port(), 8080);
        let names = &config.serving_names[..3];
        assert_eq!(
            names,
            [
                "istiod.mesh.svc",
                "istiod-canary.mesh.svc",
                "istiod-remote.mesh.svc"
            ]
        );
        assert_eq!(config.ca.source, CaSource::Cluster("/etc/cacerts".into()));
    }

    #[test]
    fn one_source_of_the_signing_key_only() {
        let error = config(&["--folder", "/m", "--ca-dir", "/a", "--ca-plug-in-dir", "/b"]);
        assert_eq!(error.unwrap_err().0[0].setting, "ca-plug-in-dir");
    }
}
