//! Settings of a control plane on Kubernetes: the flags and variables of upstream's `discovery`, as its charts write them.

use std::{
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ::mesh::identity::TrustDomain;

use super::Problems;
use crate::{
    gateway,
    translate::{FailurePolicy, scope::ScopeRule, visibility::EntryVisibility},
};

/// The flags of `discovery`, by their upstream names. Those that have no meaning here are accepted and have no effect.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "On Kubernetes (as upstream's `discovery`)")]
#[allow(missing_docs, reason = "upstream's own names")]
pub struct Discovery {
    /// Accepted in front of the flags, as upstream's charts write it
    #[arg(value_parser = ["discovery"], hide = true)]
    pub command: Option<String>,

    /// Address of metrics and debug endpoints
    #[arg(long = "monitoringAddr")]
    pub monitoring_addr: Option<String>,

    /// Address of readiness
    #[arg(long = "httpAddr")]
    pub http_addr: Option<String>,

    /// Address of the webhooks
    #[arg(long = "httpsAddr")]
    pub https_addr: Option<String>,

    /// Accepted; xDS is not served in plaintext
    #[arg(long = "grpcAddr", hide = true)]
    pub grpc_addr: Option<String>,

    /// Address of xDS and certificates over TLS
    #[arg(long = "secureGRPCAddr")]
    pub secure_grpc_addr: Option<String>,

    /// How long a proxy's stream lasts before it has to prove itself anew
    #[arg(long = "keepaliveMaxServerConnectionAge")]
    pub connection_age: Option<String>,

    /// DNS suffix of services
    #[arg(long = "domain")]
    pub domain: Option<String>,

    /// Id of this cluster
    #[arg(long = "clusterID", env = "CLUSTER_ID")]
    pub cluster: Option<String>,

    /// Kubeconfig; without it, what every pod is given
    #[arg(long = "kubeconfig")]
    pub kubeconfig: Option<PathBuf>,

    /// Namespace of the control plane
    #[arg(short = 'n', long = "namespace", env = "POD_NAMESPACE")]
    pub namespace: Option<String>,

    /// File of the mesh's configuration, watched
    #[arg(long = "meshConfig")]
    pub mesh_config: Option<PathBuf>,

    /// File of networks, as for sidecars: none of it is served, and what would serve instead is told
    #[arg(long = "networksConfig")]
    pub networks_config: Option<PathBuf>,

    /// How long open streams may last after the end was asked for, as 10s
    #[arg(long = "shutdownDuration")]
    pub shutdown_duration: Option<String>,

    /// JSON log lines
    #[arg(long = "log_as_json", num_args = 0..=1, default_missing_value = "true")]
    pub log_as_json: Option<bool>,

    /// Log levels, as `default:info,SCOPE:debug`
    #[arg(long = "log_output_level")]
    pub log_output_level: Option<String>,

    /// Revision of this control plane
    #[arg(long = "revision", env = "REVISION")]
    pub revision: Option<String>,

    /// Name of the pod
    #[arg(long = "podName", env = "POD_NAME", hide = true)]
    pub pod: Option<String>,

    /// More DNS names of the serving certificate, separated by commas
    #[arg(long = "customHost", env = "ISTIOD_CUSTOM_HOST", hide = true)]
    pub custom_host: Option<String>,

    #[arg(
        long = "trustedNodeAccounts",
        env = "CA_TRUSTED_NODE_ACCOUNTS",
        hide = true
    )]
    pub ca_node_accounts: Option<String>,

    #[arg(long = "tokenAudiences", env = "TOKEN_AUDIENCES", hide = true)]
    pub ca_audiences: Option<String>,

    #[arg(
        long = "defaultWorkloadCertTTL",
        env = "DEFAULT_WORKLOAD_CERT_TTL",
        hide = true
    )]
    pub ca_default_ttl: Option<String>,

    #[arg(
        long = "maxWorkloadCertTTL",
        env = "MAX_WORKLOAD_CERT_TTL",
        hide = true
    )]
    pub ca_max_ttl: Option<String>,

    #[arg(
        long = "maxRequestsPerSecond",
        env = "PILOT_MAX_REQUESTS_PER_SECOND",
        hide = true
    )]
    pub max_requests_per_second: Option<String>,

    #[arg(
        long = "debugAllowedNamespaces",
        env = "DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES",
        hide = true
    )]
    pub debug_allowed_namespaces: Option<String>,

    #[arg(
        long = "enableDryRunPolicies",
        env = "AMBIENT_ENABLE_DRY_RUN_AUTHORIZATION_POLICY",
        hide = true
    )]
    pub dry_run: Option<String>,

    /// Refused when true: not built
    #[arg(long = "plaintextXds", env = "LEYLINE_PLAINTEXT_XDS", hide = true)]
    pub plaintext_xds: Option<String>,

    /// Traffic whose protection cannot be had: `closed` (refused) or `as-istio` (let through, for a migration)
    #[arg(long = "failure-policy", env = "LEYLINE_FAILURE_POLICY")]
    pub failure_policy: Option<String>,

    #[command(flatten)]
    pub gateways: gateway::Args,

    #[command(flatten)]
    pub without_effect: WithoutEffect,
}

/// Flags of upstream that have no meaning here.
#[derive(Debug, Clone, Default, clap::Args)]
#[allow(missing_docs, reason = "upstream's own names")]
pub struct WithoutEffect {
    #[arg(long = "keepaliveInterval", hide = true)]
    pub keepalive_interval: Option<String>,
    #[arg(long = "keepaliveTimeout", hide = true)]
    pub keepalive_timeout: Option<String>,
    #[arg(long = "registries", hide = true)]
    pub registries: Option<String>,
    #[arg(long = "cniNamespace", hide = true)]
    pub cni_namespace: Option<String>,
    #[arg(long = "clusterAliases", hide = true)]
    pub cluster_aliases: Option<String>,
    #[arg(long = "profile", hide = true, num_args = 0..=1, default_missing_value = "true")]
    pub profile: Option<String>,
    #[arg(long = "kubernetesApiQPS", hide = true)]
    pub qps: Option<String>,
    #[arg(long = "kubernetesApiBurst", hide = true)]
    pub burst: Option<String>,
    #[arg(long = "tls-cipher-suites", hide = true)]
    pub tls_cipher_suites: Option<String>,
    #[arg(long = "tls-min-version", hide = true)]
    pub tls_min_version: Option<String>,
    #[arg(long = "ctrlz_address", hide = true)]
    pub ctrlz_address: Option<String>,
    #[arg(long = "ctrlz_port", hide = true)]
    pub ctrlz_port: Option<String>,
    #[arg(long = "log_caller", hide = true)]
    pub log_caller: Option<String>,
    #[arg(long = "log_stacktrace_level", hide = true)]
    pub log_stacktrace_level: Option<String>,
    #[arg(long = "log_target", hide = true)]
    pub log_target: Option<String>,
}

/// Checked settings of a control plane on Kubernetes.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// `None`: what every pod is given.
    pub kubeconfig: Option<PathBuf>,
    /// The control plane's own namespace.
    pub namespace: String,
    /// Its revision; `default` where none is named.
    pub revision: String,
    /// Its pod, which names it among replicas.
    pub pod: String,
    /// Readiness.
    pub ready_listen: SocketAddr,
    /// Webhooks.
    pub https_listen: SocketAddr,
    /// The mesh's configuration; need not exist.
    pub mesh_config: PathBuf,
    /// Networks as for sidecars; need not exist.
    pub networks_config: PathBuf,
    /// Namespaces beside the own one whose accounts may see everything there is to debug.
    pub debug_namespaces: Vec<String>,
    /// Send dry-run policies.
    pub send_dry_run: bool,
    /// What becomes of traffic whose protection cannot be had.
    pub failure: FailurePolicy,
    /// From where hosts of ServiceEntries are seen, as the mesh's configuration says.
    pub entry_visibility: Option<EntryVisibility>,
    /// Which services are global, once the mesh's configuration is read.
    pub service_scopes: Option<Vec<ScopeRule>>,
    /// Other names of the trust domain in policies, as the mesh's configuration says.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// What is deployed for Gateways.
    pub gateways: gateway::Checked,
}

impl Problems {
    pub(super) fn cluster(&mut self, args: &Discovery) -> Option<ClusterConfig> {
        let or = |given: &Option<String>, default: &str| {
            let given = given.as_deref().filter(|text| !text.is_empty());
            given.unwrap_or(default).to_owned()
        };
        let ready = self.listen("httpAddr", &or(&args.http_addr, ":8080"));
        let https = self.listen("httpsAddr", &or(&args.https_addr, ":15017"));
        if self.truth("plaintextXds", args.plaintext_xds.as_deref()) {
            self.add(
                "plaintextXds",
                "xDS in plaintext is not built: it would show the mesh to everyone",
            );
        }
        let send_dry_run = self.truth("enableDryRunPolicies", args.dry_run.as_deref());
        let failure = match args.failure_policy.as_deref() {
            None | Some("" | "closed") => FailurePolicy::Closed,
            Some("as-istio") => FailurePolicy::AsIstio,
            Some(other) => {
                self.add(
                    "failure-policy",
                    format_args!("{other:?} is neither closed nor as-istio"),
                );
                return None;
            }
        };
        let gateways = match gateway::Checked::new(&args.gateways) {
            Ok(gateways) => Some(gateways),
            Err(problem) => {
                self.add("waypoint", problem);
                None
            }
        };
        let pod = args.pod.clone().filter(|pod| !pod.is_empty());
        Some(ClusterConfig {
            kubeconfig: args
                .kubeconfig
                .clone()
                .filter(|path| !path.as_os_str().is_empty()),
            namespace: or(&args.namespace, "istio-system"),
            revision: or(&args.revision, "default"),
            pod: pod.unwrap_or_else(host_name),
            ready_listen: ready?,
            https_listen: https?,
            mesh_config: args
                .mesh_config
                .clone()
                .unwrap_or_else(|| "/etc/istio/config/mesh".into()),
            networks_config: args
                .networks_config
                .clone()
                .unwrap_or_else(|| "/etc/istio/config/meshNetworks".into()),
            debug_namespaces: list(args.debug_allowed_namespaces.as_deref()),
            send_dry_run,
            failure,
            entry_visibility: None,
            service_scopes: None,
            trust_domain_aliases: Vec::new(),
            gateways: gateways?,
        })
    }

    /// An address, also as Go writes it: `:15014` is every address of the machine.
    pub(super) fn listen(&mut self, setting: &'static str, text: &str) -> Option<SocketAddr> {
        match text.strip_prefix(':') {
            Some(port) => {
                let port: u16 = self.parse(setting, port)?;
                Some((Ipv6Addr::UNSPECIFIED, port).into())
            }
            None => self.parse(setting, text),
        }
    }

    /// As Go's `strconv.ParseBool`; absent is false.
    fn truth(&mut self, setting: &'static str, text: Option<&str>) -> bool {
        match text.unwrap_or_default() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
            "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
            other => {
                self.add(setting, format_args!("{other:?} is neither true nor false"));
                false
            }
        }
    }

    pub(super) fn duration(&mut self, setting: &'static str, text: &str) -> Option<Duration> {
        let read = go_duration(text);
        if read.is_none() {
            self.add(
                setting,
                format_args!("{text:?} is not a duration such as 24h0m0s"),
            );
        }
        read
    }
}

/// The items of a list with commas.
pub(super) fn list(text: Option<&str>) -> Vec<String> {
    let items = text.unwrap_or_default().split(',').map(str::trim);
    items
        .filter(|item| !item.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A positive duration as Go writes it: `1h30m`, `500ms`, `0`.
pub(super) fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let amount: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        rest = &rest[letters..];
        total = total.checked_add(Duration::try_from_secs_f64(amount * unit).ok()?)?;
    }
    (!text.is_empty()).then_some(total)
}

/// Upstream's log levels as ours: its scopes are not ours, so only the default one has a meaning.
pub(super) fn log_filter(levels: &str) -> Option<String> {
    let level = levels
        .split(',')
        .find_map(|level| match level.split_once(':') {
            None => Some(level),
            Some(("default" | "all", level)) => Some(level),
            Some(_) => None,
        })?;
    let level = match level.trim() {
        "none" => "off",
        "fatal" | "error" => "error",
        level @ ("warn" | "info" | "debug") => level,
        _ => return None,
    };
    Some(level.to_owned())
}

fn host_name() -> String {
    let name = nix::unistd::gethostname().ok();
    let name = name.and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| "controlplane".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, seconds) in [
            ("24h0m0s", Some(86_400.0)),
            ("1h30m", Some(5400.0)),
            ("500ms", Some(0.5)),
            ("1.5s", Some(1.5)),
            ("0", Some(0.0)),
            ("10", None),
            ("", None),
            ("-1s", None),
            ("1d", None),
        ] {
            let read = go_duration(text).map(|read| read.as_secs_f64());
            assert_eq!(read, seconds, "{text}");
        }
    }

    #[test]
    fn upstream_log_levels_become_ours() {
        for (levels, filter) in [
            ("default:info", Some("info")),
            ("ads:debug,default:warn", Some("warn")),
            ("all:debug", Some("debug")),
            ("debug", Some("debug")),
            ("default:none", Some("off")),
            ("ads:debug", None),
        ] {
            assert_eq!(log_filter(levels).as_deref(), filter, "{levels}");
        }
    }
}
