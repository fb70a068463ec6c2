//! `leyline ztunnel-config`: what a node's tunnel knows, holds and carries, ours or upstream's.

pub(crate) mod dump;
pub(crate) mod tables;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use k8s_openapi::api::core::v1::Pod;
use time::OffsetDateTime;

use self::{
    dump::Dump,
    tables::{ConnectionFilter, Listing, WorkloadFilter},
};
use super::{
    access::Access,
    cluster::{Cluster, PodName, is_ready, is_running, node_of, problem},
    object::Named,
    output::{self, Form},
};
use crate::screen;

/// What a node tunnel knows
#[derive(Debug, Args)]
pub(crate) struct ZtunnelConfig {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    source: Source,
}

/// Whose dump.
#[derive(Debug, Args)]
struct Source {
    /// Read this config_dump and ask no cluster
    #[arg(long, short, global = true, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The tunnel of this node
    #[arg(long, global = true)]
    node: Option<String>,
    /// Form of the output
    #[arg(long, short, global = true, value_enum, default_value_t)]
    output: Form,
    /// The tunnel's admin port
    #[arg(long, global = true, default_value_t = super::cluster::ADMIN_PORT)]
    proxy_admin_port: u16,
}

/// A tunnel, or a pod whose node's tunnel is meant; any tunnel when not given.
#[derive(Debug, Args)]
struct Target {
    /// [TYPE/]NAME[.NAMESPACE] of a tunnel, or of a pod of the mesh: then its node's tunnel is asked
    target: Option<Named>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Workloads: pods and entries, their nodes and waypoints
    #[command(visible_aliases = ["workloads", "w"])]
    Workload {
        #[command(flatten)]
        target: Target,
        /// Only the workload at this address
        #[arg(long)]
        address: Option<String>,
        /// Only of this namespace
        #[arg(long, value_name = "NAMESPACE")]
        workload_namespace: Option<String>,
        /// Only on this node
        #[arg(long, value_name = "NODE")]
        workload_node: Option<String>,
    },
    /// Services, their addresses and endpoints
    #[command(visible_aliases = ["services", "svc", "s"])]
    Service {
        #[command(flatten)]
        target: Target,
        /// Only of this namespace
        #[arg(long, value_name = "NAMESPACE")]
        service_namespace: Option<String>,
    },
    /// Authorization policies
    #[command(visible_aliases = ["policies", "pol", "p"])]
    Policy {
        #[command(flatten)]
        target: Target,
        /// Only of this namespace
        #[arg(long, value_name = "NAMESPACE")]
        policy_namespace: Option<String>,
    },
    /// Certificates of the node's workloads
    #[command(visible_aliases = ["certificates", "certs", "cert"])]
    Certificate {
        #[command(flatten)]
        target: Target,
    },
    /// Connections that are open now
    #[command(visible_alias = "cons")]
    Connections {
        #[command(flatten)]
        target: Target,
        /// Only inbound or outbound ones
        #[arg(long, value_parser = ["inbound", "outbound"])]
        direction: Option<String>,
        /// Addresses, not names
        #[arg(long)]
        raw: bool,
        /// Only of pods of this namespace
        #[arg(long, value_name = "NAMESPACE")]
        workload_namespace: Option<String>,
    },
    /// Everything
    All {
        #[command(flatten)]
        target: Target,
        /// A line above each table that says what it is
        #[arg(long)]
        with_headers: bool,
    },
    /// Show or change what the tunnel logs (every tunnel when none is named)
    #[command(visible_alias = "o")]
    Log {
        #[command(flatten)]
        target: Target,
        /// LEVEL for everything, or SCOPE:LEVEL, with commas between
        #[arg(long)]
        level: Option<String>,
        /// As at the start
        #[arg(long, short)]
        reset: bool,
    },
}

impl What {
    fn target(&self) -> Option<&Named> {
        match self {
            Self::Workload { target, .. }
            | Self::Service { target, .. }
            | Self::Policy { target, .. }
            | Self::Certificate { target }
            | Self::Connections { target, .. }
            | Self::All { target, .. }
            | Self::Log { target, .. } => target.target.as_ref(),
        }
    }
}

/// Runs the command.
pub(crate) async fn run(command: ZtunnelConfig, before: &Access) -> Result<ExitCode> {
    let ZtunnelConfig {
        what,
        access,
        source,
    } = command;
    let access = access.or(before);
    if let What::Log {
        target,
        level,
        reset,
    } = &what
    {
        let cluster = Cluster::connect(&access).await?;
        return log(&cluster, &source, target, level.as_deref(), *reset).await;
    }
    let (dump, pod) = read(&source, &access, what.target()).await?;
    output::print(&render(&what, &dump, pod, source.output)?)?;
    Ok(ExitCode::SUCCESS)
}

/// The dump, and the pod by which it is to be filtered.
async fn read(
    source: &Source,
    access: &Access,
    target: Option<&Named>,
) -> Result<(Dump, Option<(String, String)>)> {
    if let Some(path) = &source.file {
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let dump = Dump::parse(&text).with_context(|| path.display().to_string())?;
        return Ok((dump, None));
    }
    let cluster = Cluster::connect(access).await?;
    let chosen = choose(&cluster, source.node.as_deref(), target).await?;
    let json = cluster.json(&chosen.tunnel, source.proxy_admin_port, "/config_dump");
    Ok((Dump::new(json.await?)?, chosen.pod))
}

/// A tunnel, and the pod by which it was found.
struct Chosen {
    tunnel: PodName,
    pod: Option<(String, String)>,
}

async fn choose(cluster: &Cluster, node: Option<&str>, target: Option<&Named>) -> Result<Chosen> {
    if let Some(named) = target {
        let pod = named.pod(cluster).await?;
        if is_tunnel(&pod) {
            let tunnel = PodName::from(&pod);
            return Ok(Chosen { tunnel, pod: None });
        }
        let node = node_of(&pod).with_context(|| format!("{} is on no node yet", named.name))?;
        let name = PodName::from(&pod);
        return Ok(Chosen {
            tunnel: tunnel_of(cluster, node).await?,
            pod: Some((name.name, name.namespace)),
        });
    }
    let tunnel = match node {
        Some(node) => tunnel_of(cluster, node).await?,
        None => {
            let tunnels = cluster.tunnels().await?;
            let running = tunnels.iter().filter(|it| is_running(it));
            let first = running.min_by_key(|it| (!is_ready(it), it.metadata.name.clone()));
            PodName::from(first.ok_or_else(|| no_tunnel(&tunnels))?)
        }
    };
    Ok(Chosen { tunnel, pod: None })
}

/// The tunnel of a node, or of a pod's node and then that pod, or the one that is named.
pub(crate) async fn tunnel_for(
    cluster: &Cluster,
    node: Option<&str>,
    target: Option<&Named>,
) -> Result<(PodName, Option<PodName>)> {
    let chosen = choose(cluster, node, target).await?;
    let pod = chosen
        .pod
        .map(|(name, namespace)| PodName { namespace, name });
    Ok((chosen.tunnel, pod))
}

fn no_tunnel(known: &[Pod]) -> anyhow::Error {
    if let Some(pod) = known.first() {
        return anyhow!(
            "no node tunnel runs: {}: {}\n  remedy: leyline check, and the pod's events",
            PodName::from(pod),
            problem(pod).unwrap_or_else(|| "not running".to_owned())
        );
    }
    anyhow!(
        "no node tunnel runs in this cluster (no pod labelled app=ztunnel)\n  remedy: leyline install, then leyline check"
    )
}

fn is_tunnel(pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    labels
        .and_then(|it| it.get("app"))
        .is_some_and(|app| app == "ztunnel")
}

/// The running tunnel of a node: the ready one, where one replaces another.
pub(crate) async fn tunnel_of(cluster: &Cluster, node: &str) -> Result<PodName> {
    let tunnels = cluster.tunnels().await?;
    if !tunnels.iter().any(is_running) {
        return Err(no_tunnel(&tunnels));
    }
    let here = tunnels
        .iter()
        .filter(|it| is_running(it) && node_of(it) == Some(node));
    let best = here.min_by_key(|it| (!is_ready(it), it.metadata.name.clone()));
    best.map(PodName::from).with_context(|| {
        format!(
            "no node tunnel runs on node {node}\n  remedy: see kubectl -n {} get pods -l app=ztunnel -o wide",
            cluster.istio_namespace
        )
    })
}

fn render(what: &What, dump: &Dump, pod: Option<(String, String)>, form: Form) -> Result<String> {
    let now = OffsetDateTime::now_utc();
    let listing = match what {
        What::Workload {
            address,
            workload_namespace,
            workload_node,
            ..
        } => tables::workloads(
            dump,
            &WorkloadFilter {
                address: address.clone(),
                namespace: workload_namespace.clone(),
                node: workload_node.clone(),
                pod,
            },
        )?,
        What::Service {
            service_namespace, ..
        } => tables::services(dump, service_namespace.as_deref())?,
        What::Policy {
            policy_namespace, ..
        } => tables::policies(dump, policy_namespace.as_deref())?,
        What::Certificate { .. } => tables::certificates(dump, now)?,
        What::Connections {
            direction,
            raw,
            workload_namespace,
            ..
        } => {
            let wants = |this: &str| direction.as_deref().is_none_or(|it| it == this);
            let filter = ConnectionFilter {
                inbound: wants("inbound"),
                outbound: wants("outbound"),
                namespace: workload_namespace.clone(),
                pod,
                raw: *raw,
            };
            tables::connections(dump, &filter)?
        }
        What::All { with_headers, .. } => return all(dump, *with_headers, now, form),
        What::Log { .. } => bail!("logging is no part of a dump"),
    };
    text(&listing, form)
}

fn text(listing: &Listing, form: Form) -> Result<String> {
    Ok(match form.text(&listing.json)? {
        Some(text) => text,
        None => screen::table(&listing.rows),
    })
}

fn all(dump: &Dump, with_headers: bool, now: OffsetDateTime, form: Form) -> Result<String> {
    if let Some(text) = form.text(&dump.0)? {
        return Ok(text);
    }
    let every = ConnectionFilter {
        inbound: true,
        outbound: true,
        ..ConnectionFilter::default()
    };
    let parts = [
        (
            "Workloads",
            tables::workloads(dump, &WorkloadFilter::default())?,
        ),
        ("Services", tables::services(dump, None)?),
        ("Policies", tables::policies(dump, None)?),
        ("Certificates", tables::certificates(dump, now)?),
        ("Connections", tables::connections(dump, &every)?),
    ];
    let parts = parts.iter().map(|(title, listing)| {
        let table = screen::table(&listing.rows);
        match with_headers {
            true => format!("{title}:\n{table}"),
            false => table,
        }
    });
    Ok(parts.collect::<Vec<_>>().join("\n"))
}

async fn log(
    cluster: &Cluster,
    source: &Source,
    target: &Target,
    level: Option<&str>,
    reset: bool,
) -> Result<ExitCode> {
    if source.file.is_some() {
        bail!("a file does not log: name a tunnel, or none for all of them");
    }
    let path = log_path(level, reset);
    let tunnels = match (&target.target, &source.node) {
        (None, None) => {
            let running = cluster.tunnels().await?.into_iter().filter(is_running);
            running.map(|it| PodName::from(&it)).collect()
        }
        (target, node) => {
            vec![
                choose(cluster, node.as_deref(), target.as_ref())
                    .await?
                    .tunnel,
            ]
        }
    };
    if tunnels.is_empty() {
        return Err(no_tunnel(&cluster.tunnels().await?));
    }
    for tunnel in tunnels {
        let port = source.proxy_admin_port;
        let answer = cluster
            .call(&tunnel, http::Method::POST, port, &path)
            .await?;
        let text = String::from_utf8_lossy(&answer.body);
        println!("{tunnel}:\n{}", text.trim_end());
        if answer.status != 200 {
            bail!("{tunnel} refuses the level");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `scope:level` is the CLI's form, `scope=level` the tunnel's.
fn log_path(level: Option<&str>, reset: bool) -> String {
    let mut query = Vec::new();
    if let Some(level) = level {
        query.push(format!("level={}", directives(level)));
    }
    if reset {
        query.push("reset".to_owned());
    }
    match query.is_empty() {
        true => "/logging".to_owned(),
        false => format!("/logging?{}", query.join("&")),
    }
}

/// The last colon of each part stands before the level; earlier ones belong to the scope.
fn directives(level: &str) -> String {
    let one = |part: &str| match part.rsplit_once(':') {
        Some((scope, level)) => format!("{scope}%3D{level}"),
        None => part.replace('=', "%3D"),
    };
    level.split(',').map(one).collect::<Vec<_>>().join(",")
}
