//! `leyline explain SRC DST:PORT`: what the node tunnels themselves decide of a connection, from their own dumps. What is
//! decided is [`mesh::explain`]; here dumps are fetched, arguments understood, and the answer shown.

mod known;
mod show;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use mesh::explain::Explanation;
use serde_json::Value;

use super::{
    access::Access,
    cluster::{ADMIN_PORT, Cluster, is_running, node_of},
    object::{Named, Type},
    output::{self, Form},
    ztunnel_config::{dump::Dump, tunnel_of},
};
use known::{Known, Tunnel};

/// Why a connection is allowed, denied or routed so: the data plane's own decision
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  leyline explain web-0.shop orders.shop:7000
  leyline explain deployment/web.shop 10.96.0.7:80 -o json
  leyline explain web-0.shop pod/orders-1.shop:7000 -f node1.json -f node2=node2.json")]
pub(crate) struct Explain {
    #[command(flatten)]
    asked: Question,
    #[command(flatten)]
    access: Access,
    /// Decide by this config_dump and ask no cluster: FILE of the source's tunnel, NODE=FILE of another; may be repeated
    #[arg(long = "file", short, value_name = "[NODE=]FILE")]
    files: Vec<String>,
    /// The tunnels' admin port
    #[arg(long, default_value_t = ADMIN_PORT)]
    proxy_admin_port: u16,
}

/// The question, wherever the mesh is.
#[derive(Debug, Args)]
pub(crate) struct Question {
    /// Who connects: [TYPE/]NAME[.NAMESPACE], NAMESPACE/NAME, or a pod's address
    #[arg(value_name = "SRC")]
    source: String,
    /// To what: HOST:PORT, IP:PORT, service/NAME[.NAMESPACE]:PORT or pod/NAME[.NAMESPACE]:PORT
    #[arg(value_name = "DST:PORT")]
    destination: String,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
}

/// Nodes whose tunnels are asked for one explanation.
const MAX_NODES: usize = 8;

/// Runs the command.
pub(crate) async fn run(command: Explain, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let explanation = match command.files.is_empty() {
        false => from_files(&command.asked, &command.files, access.namespace.as_deref())?,
        true => {
            let cluster = Cluster::connect(&access).await?;
            from_cluster(&cluster, &command.asked, command.proxy_admin_port).await?
        }
    };
    output::print(&shown(&explanation, command.asked.output, &|_| None)?)?;
    Ok(ExitCode::SUCCESS)
}

fn shown(
    explanation: &Explanation,
    form: Form,
    place: &dyn Fn(&mesh::explain::Decider) -> Option<String>,
) -> Result<String> {
    let mut json = serde_json::to_value(explanation)?;
    let stands = explanation.decided_by.as_ref().and_then(place);
    if let Some(stands) = &stands {
        json["decidedBy"]["place"] = stands.as_str().into();
    }
    Ok(match form.text(&json)? {
        Some(text) => text,
        None => show::text(explanation, stands.as_deref()),
    })
}

fn from_files(asked: &Question, files: &[String], namespace: Option<&str>) -> Result<Explanation> {
    let mut first = None;
    let mut others = BTreeMap::new();
    for file in files {
        let (node, path) = match file.split_once('=') {
            Some((node, path)) => (Some(node.to_owned()), PathBuf::from(path)),
            None => (None, PathBuf::from(file)),
        };
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let dump = Dump::parse(&text).with_context(|| path.display().to_string())?;
        let tunnel = Tunnel::read(&dump).with_context(|| path.display().to_string())?;
        match node {
            None if first.is_none() => first = Some(tunnel),
            None => bail!("{file}: a second dump needs its node: NODE={file}"),
            Some(node) => drop(others.insert(node, tunnel)),
        }
    }
    let source = match first {
        Some(first) => first,
        None => bail!("the dump of the source's tunnel is missing: -f FILE without a node"),
    };
    let known = Known { source, others };
    let namespace = namespace.unwrap_or("default");
    known.explain(&asked.source, &asked.destination, namespace)
}

async fn from_cluster(cluster: &Cluster, asked: &Question, port: u16) -> Result<Explanation> {
    let source = source(cluster, &asked.source).await?;
    let tunnel = match &source.node {
        Some(node) => tunnel_of(cluster, node).await?,
        None => any_tunnel(cluster).await?,
    };
    let read = |json: Value| Tunnel::read(&Dump::new(json)?);
    let dump = cluster.json(&tunnel, port, "/config_dump").await?;
    let mut known = Known {
        source: read(dump).with_context(|| tunnel.to_string())?,
        others: BTreeMap::new(),
    };
    let first = known.explain(&source.name, &asked.destination, &cluster.namespace)?;
    let own = source.node.unwrap_or_default();
    for node in nodes(&first)
        .into_iter()
        .filter(|it| **it != *own)
        .take(MAX_NODES)
    {
        // A node whose tunnel cannot be asked is told so in the explanation.
        let Ok(tunnel) = tunnel_of(cluster, &node).await else {
            continue;
        };
        match cluster
            .json(&tunnel, port, "/config_dump")
            .await
            .and_then(read)
        {
            Ok(tunnel) => drop(known.others.insert(node, tunnel)),
            Err(error) => eprintln!("warning: {error:#}"),
        }
    }
    known.explain(&source.name, &asked.destination, &cluster.namespace)
}

/// The nodes of the endpoints.
fn nodes(explanation: &Explanation) -> BTreeSet<String> {
    let nodes = explanation.paths.iter().filter_map(|it| it.node.as_ref());
    nodes.map(ToString::to_string).collect()
}

/// The source, once it is found in the cluster.
struct Source {
    /// `namespace/name`, or an address.
    name: String,
    node: Option<String>,
}

async fn source(cluster: &Cluster, text: &str) -> Result<Source> {
    if let Ok(address) = text.parse::<IpAddr>() {
        let text = address.to_string();
        return Ok(Source {
            name: text,
            node: None,
        });
    }
    let named: Named = text.parse().map_err(|error: String| anyhow!(error))?;
    if named.kind == Type::Service {
        bail!("a service does not connect: name a pod of it, as deployment/NAME.NAMESPACE");
    }
    let pod = named.pod(cluster).await?;
    let metadata = &pod.metadata;
    let (namespace, name) = (metadata.namespace.as_deref(), metadata.name.as_deref());
    Ok(Source {
        name: format!(
            "{}/{}",
            namespace.unwrap_or_default(),
            name.unwrap_or_default()
        ),
        node: node_of(&pod).map(str::to_owned),
    })
}

async fn any_tunnel(cluster: &Cluster) -> Result<super::cluster::PodName> {
    let tunnels = cluster.tunnels().await?;
    let running = tunnels.iter().find(|it| is_running(it));
    running
        .map(Into::into)
        .context("no node tunnel runs in this cluster\n  remedy: leyline check")
}

/// Of the embedded mesh: `fetch` reads the dump of a node's tunnel, `place` says where an object stands.
pub(crate) fn local(
    asked: &Question,
    node: &str,
    fetch: &dyn Fn(&str) -> Result<Value>,
    place: &dyn Fn(&mesh::explain::Decider) -> Option<String>,
) -> Result<ExitCode> {
    let read = |node: &str| Tunnel::read(&Dump::new(fetch(node)?)?);
    let mut known = Known {
        source: read(node)?,
        others: BTreeMap::new(),
    };
    let first = known.explain(&asked.source, &asked.destination, "default")?;
    for other in nodes(&first)
        .into_iter()
        .filter(|it| it != node)
        .take(MAX_NODES)
    {
        if let Ok(tunnel) = read(&other) {
            known.others.insert(other, tunnel);
        }
    }
    let explanation = known.explain(&asked.source, &asked.destination, "default")?;
    output::print(&shown(&explanation, asked.output, place)?)?;
    Ok(ExitCode::SUCCESS)
}

impl Question {
    /// Who connects, as it was written.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }
}
