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
use mesh::explain::{Explanation, Request};
use serde_json::Value;

use super::{
    access::Access,
    cluster::{ADMIN_PORT, Cluster, PodName, is_running, node_of},
    object::{Named, Type},
    output::{self, Form},
    ztunnel_config::{dump::Dump, tunnel_of},
};
use known::{Known, Tunnel, requests};

/// Why a connection is allowed, denied or routed so: the data plane's own decision
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  leyline explain web-0.shop orders.shop:7000
  leyline explain deployment/web.shop 10.96.0.7:80 -o json
  leyline explain web-0.shop orders.shop:7000 --method POST --path /v1/orders --header 'x-canary: 1'
  leyline explain web-0.shop pod/orders-1.shop:7000 -f node1.json -f node2=node2.json")]
pub(crate) struct Explain {
    #[command(flatten)]
    asked: Question,
    #[command(flatten)]
    access: Access,
    /// Decide by this config_dump and ask no cluster: FILE of the source's tunnel, NODE=FILE of another, NAMESPACE/POD=FILE
    /// of a waypoint; may be repeated
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
    #[command(flatten)]
    request: Asks,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
}

const REQUEST: &str = "The request that a waypoint on the way is asked about";

/// The request that waypoints on the way are asked about.
#[derive(Debug, Default, Args)]
struct Asks {
    /// Its method [default: GET]
    #[arg(long, help_heading = REQUEST)]
    method: Option<String>,
    /// Its path, with its query [default: /]
    #[arg(long, help_heading = REQUEST)]
    path: Option<String>,
    /// Its host [default: the service's]
    #[arg(long, help_heading = REQUEST)]
    host: Option<String>,
    /// One of its headers; may be repeated
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", help_heading = REQUEST)]
    headers: Vec<String>,
}

impl Asks {
    /// None: nothing is asked of waypoints.
    fn request(&self) -> Result<Option<Request>> {
        let parts = [&self.method, &self.path, &self.host];
        if parts.iter().all(|it| it.is_none()) && self.headers.is_empty() {
            return Ok(None);
        }
        let method = self.method.as_deref().unwrap_or("GET");
        let mut headers = http::HeaderMap::new();
        for text in &self.headers {
            let (name, value) = header(text)?;
            headers.append(name, value);
        }
        Ok(Some(Request {
            method: method
                .parse()
                .with_context(|| format!("{method:?} is not a method"))?,
            host: self.host.as_deref().map(Into::into),
            path: self.path.as_deref().unwrap_or("/").into(),
            headers,
        }))
    }
}

/// `NAME: VALUE` or `NAME=VALUE`.
fn header(text: &str) -> Result<(http::HeaderName, http::HeaderValue)> {
    let pair = text.split_once([':', '=']);
    let parsed = pair.and_then(|(name, value)| {
        let name = name.trim().parse().ok()?;
        Some((name, value.trim().parse().ok()?))
    });
    parsed.with_context(|| format!("{text:?} is not a header: NAME: VALUE"))
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
    let mut waypoints = BTreeMap::new();
    for file in files {
        let (of, path) = match file.split_once('=') {
            Some((of, path)) => (Some(of.to_owned()), PathBuf::from(path)),
            None => (None, PathBuf::from(file)),
        };
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let place = || path.display().to_string();
        if let Some(pod) = of.as_ref().filter(|it| it.contains('/')) {
            let dump: Value = serde_json::from_slice(&text).with_context(place)?;
            waypoints.insert(pod.clone(), requests(&dump).with_context(place)?);
            continue;
        }
        let dump = Dump::parse(&text).with_context(place)?;
        let tunnel = Tunnel::read(&dump).with_context(place)?;
        match of {
            None if first.is_none() => first = Some(tunnel),
            None => bail!("{file}: a second dump needs its node: NODE={file}"),
            Some(node) => drop(others.insert(node, tunnel)),
        }
    }
    let source = match first {
        Some(first) => first,
        None => bail!("the dump of the source's tunnel is missing: -f FILE without a node"),
    };
    let known = Known {
        source,
        others,
        waypoints,
    };
    asked.of(&known, &asked.source, namespace.unwrap_or("default"))
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
        waypoints: BTreeMap::new(),
    };
    let mut first = asked.of(&known, &source.name, &cluster.namespace)?;
    let (asks, mut tried) = (asked.asks()?, BTreeSet::new());
    // What one waypoint knows may lead to another.
    while let Some(pod) = next_waypoint(&first, &mut tried).filter(|_| asks) {
        match waypoint(cluster, &pod, port).await {
            Ok(view) => drop(known.waypoints.insert(pod, view)),
            Err(error) => eprintln!("warning: waypoint {pod}: {error:#}"),
        }
        first = asked.of(&known, &source.name, &cluster.namespace)?;
    }
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
    asked.of(&known, &source.name, &cluster.namespace)
}

async fn waypoint(cluster: &Cluster, pod: &str, port: u16) -> Result<mesh::l7::view::View> {
    let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
    let pod = PodName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    requests(&cluster.json(&pod, port, "/config_dump").await?)
}

/// A waypoint on the way that is to be asked of the request and was not yet, as `namespace/name`.
fn next_waypoint(explanation: &Explanation, tried: &mut BTreeSet<String>) -> Option<String> {
    if tried.len() >= MAX_NODES {
        return None;
    }
    let paths = explanation.paths.iter();
    let mut on_the_way = paths.flat_map(|it| it.waypoint.iter().chain(&it.further_waypoints));
    let next = on_the_way.find(|it| !tried.contains(*it)).cloned();
    tried.extend(next.clone());
    next
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

/// Of the embedded mesh: `fetch` reads the dump of a node's tunnel, `fetch_waypoint` that of a waypoint's pod, and `place`
/// says where an object stands.
pub(crate) fn local(
    asked: &Question,
    node: &str,
    fetch: &dyn Fn(&str) -> Result<Value>,
    fetch_waypoint: &dyn Fn(&str) -> Result<Value>,
    place: &dyn Fn(&mesh::explain::Decider) -> Option<String>,
) -> Result<ExitCode> {
    let read = |node: &str| Tunnel::read(&Dump::new(fetch(node)?)?);
    let mut known = Known {
        source: read(node)?,
        others: BTreeMap::new(),
        waypoints: BTreeMap::new(),
    };
    let mut first = asked.of(&known, &asked.source, "default")?;
    let (asks, mut tried) = (asked.asks()?, BTreeSet::new());
    while let Some(pod) = next_waypoint(&first, &mut tried).filter(|_| asks) {
        match fetch_waypoint(&pod).and_then(|it| requests(&it)) {
            Ok(view) => drop(known.waypoints.insert(pod, view)),
            Err(error) => eprintln!("warning: waypoint {pod}: {error:#}"),
        }
        first = asked.of(&known, &asked.source, "default")?;
    }
    for other in nodes(&first)
        .into_iter()
        .filter(|it| it != node)
        .take(MAX_NODES)
    {
        if let Ok(tunnel) = read(&other) {
            known.others.insert(other, tunnel);
        }
    }
    let explanation = asked.of(&known, &asked.source, "default")?;
    output::print(&shown(&explanation, asked.output, place)?)?;
    Ok(ExitCode::SUCCESS)
}

impl Question {
    /// Who connects, as it was written.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Whether waypoints are asked of a request.
    fn asks(&self) -> Result<bool> {
        Ok(self.request.request()?.is_some())
    }

    /// The explanation by what is known; `source` as it was found, names without a namespace are of `namespace`.
    fn of(&self, known: &Known, source: &str, namespace: &str) -> Result<Explanation> {
        known.explain(
            source,
            &self.destination,
            namespace,
            self.request.request()?,
        )
    }
}
