//! `leyline flows`: connections as they open, close, fail and are refused, as the node tunnels that carry them tell it.

mod line;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use futures_util::{StreamExt, stream::FuturesUnordered};
use serde_json::Value;

use self::line::Filter;
use super::{
    access::Access,
    cluster::{ADMIN_PORT, Cluster, PodName, is_running, node_of},
    object::Named,
    output, ztunnel_config,
};
use crate::screen;

/// Follow connections as they open, close, fail and are refused: who, whom, by which policy, and why
///
/// Both ends of a connection tell of it: its source's tunnel as outbound, its destination's as inbound. Refusals of
/// before are shown with --recent; what happens again and again between the same two is one line that counts.
#[derive(Debug, Args)]
pub(crate) struct Flows {
    /// [TYPE/]NAME[.NAMESPACE] of a pod: only its connections; or of a tunnel; all tunnels when not given
    target: Option<Named>,
    #[command(flatten)]
    access: Access,
    /// Only the tunnel of this node
    #[arg(long)]
    node: Option<String>,
    /// Only refusals and failures
    #[arg(long, visible_alias = "denied")]
    failures: bool,
    /// Begin with the refusals and failures that the tunnels still know
    #[arg(long)]
    recent: bool,
    /// Only with an end in this namespace
    #[arg(long, value_name = "NAMESPACE")]
    workload_namespace: Option<String>,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
    /// The tunnels' admin port
    #[arg(long, default_value_t = ADMIN_PORT)]
    proxy_admin_port: u16,
}

/// Form of an endless output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Form {
    /// One line each, for people
    #[default]
    Lines,
    /// One JSON object each, for programs
    Json,
}

impl Flows {
    fn path(&self) -> &'static str {
        match (self.failures, self.recent) {
            (false, false) => "/flows",
            (false, true) => "/flows?kept",
            (true, false) => "/flows?only=failures",
            (true, true) => "/flows?only=failures&kept",
        }
    }
}

/// Runs the command, until it is interrupted or no tunnel tells any more.
pub(crate) async fn run(command: Flows, before: &Access) -> Result<ExitCode> {
    let cluster = Cluster::connect(&command.access.clone().or(before)).await?;
    let (tunnels, pod) = tunnels(&cluster, &command).await?;
    let filter = Filter {
        namespace: command.workload_namespace.clone(),
        pod,
    };
    let path = command.path();
    let several = tunnels.len() > 1;
    let following: FuturesUnordered<_> = tunnels
        .iter()
        .map(|(tunnel, node)| {
            let prefix = several.then_some(node.as_str());
            let (cluster, filter, form) = (&cluster, &filter, command.output);
            let print = move |line: &str| print(line, prefix, filter, form);
            let followed = cluster.follow(tunnel, command.proxy_admin_port, path, print);
            async move { (tunnel, followed.await) }
        })
        .collect();
    let mut following = following;
    while let Some((tunnel, ended)) = following.next().await {
        match ended {
            Ok(()) => eprintln!("{tunnel}: the stream has ended"),
            Err(error) => eprintln!("{tunnel}: {error:#}"),
        }
    }
    bail!("no tunnel tells any more\n  remedy: leyline check, then this command again")
}

/// Whom to ask, each with its node, and the pod that is meant.
async fn tunnels(
    cluster: &Cluster,
    command: &Flows,
) -> Result<(Vec<(PodName, String)>, Option<PodName>)> {
    if command.target.is_none() && command.node.is_none() {
        let running = cluster.tunnels().await?.into_iter().filter(is_running);
        let named = running.map(|it| {
            let node = node_of(&it).unwrap_or_default().to_owned();
            (PodName::from(&it), node)
        });
        let named: Vec<_> = named.collect();
        if named.is_empty() {
            bail!(
                "no node tunnel runs in this cluster\n  remedy: leyline install, then leyline check"
            );
        }
        return Ok((named, None));
    }
    let node = command.node.as_deref();
    let (tunnel, pod) = ztunnel_config::tunnel_for(cluster, node, command.target.as_ref()).await?;
    Ok((vec![(tunnel, String::new())], pod))
}

fn print(text: &str, node: Option<&str>, filter: &Filter, form: Form) -> Result<()> {
    let Ok(event) = serde_json::from_str::<Value>(text) else {
        bail!(
            "a line that is not JSON: {text}\n  remedy: a tunnel that tells of flows (leyline version)"
        );
    };
    if !filter.wants(&event) {
        return Ok(());
    }
    match form {
        Form::Json => output::print(&format!("{text}\n")),
        Form::Lines => output::print(&line::render(&event, node, screen::output())),
    }
}
