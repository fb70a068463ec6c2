//! The commands for operators of a mesh on Kubernetes. One file each; the cluster is met in [`cluster`] alone, and what is
//! decided of what was found there is pure.

pub(crate) mod access;
mod analyze;
mod bug_report;
mod check;
pub(crate) mod cluster;
mod create_remote_secret;
mod definitions;
mod duration;
pub(crate) mod explain;
mod flows;
mod helm;
mod install;
mod object;
pub(crate) mod output;
mod remote_clusters;
mod shared_parts;
mod status;
mod stream;
mod tag;
mod uninstall;
mod version;
mod waypoint;
pub(crate) mod ztunnel_config;

use std::{future::Future, process::ExitCode};

use anyhow::{Context, Result};
use clap::Subcommand;

use self::access::Access;

/// A command for operators.
#[derive(Debug, Subcommand)]
pub(crate) enum Operator {
    #[command(visible_aliases = ["apply", "upgrade"])]
    Install(install::Install),
    Manifest(install::Manifest),
    Uninstall(uninstall::Uninstall),
    Version(version::Version),
    #[command(visible_aliases = ["proxy-status", "ps"])]
    Status(status::Status),
    #[command(visible_alias = "zc")]
    ZtunnelConfig(ztunnel_config::ZtunnelConfig),
    Waypoint(waypoint::Waypoint),
    Flows(flows::Flows),
    Explain(explain::Explain),
    Check(check::CheckCommand),
    Analyze(analyze::Analyze),
    Validate(analyze::validate::Validate),
    RemoteClusters(remote_clusters::RemoteClusters),
    Tag(tag::Tag),
    BugReport(bug_report::BugReport),
    CreateRemoteSecret(create_remote_secret::CreateRemoteSecret),
}

/// Runs a command; its exit code. `before` is what stood before the command's name.
pub(crate) fn run(command: Operator, before: &Access) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the executor")?;
    runtime.block_on(until_interrupted(async {
        match command {
            Operator::Install(it) => install::install(it, before).await,
            Operator::Manifest(it) => install::manifest(it, before).await,
            Operator::Uninstall(it) => uninstall::uninstall(it, before).await,
            Operator::Version(it) => version::run(it, before).await,
            Operator::Status(it) => status::run(it, before).await,
            Operator::ZtunnelConfig(it) => ztunnel_config::run(it, before).await,
            Operator::Waypoint(it) => waypoint::run(it, before).await,
            Operator::Flows(it) => flows::run(it, before).await,
            Operator::Explain(it) => explain::run(it, before).await,
            Operator::Check(it) => check::run(it, before).await,
            Operator::Analyze(it) => analyze::run(it, before).await,
            Operator::Validate(it) => analyze::validate::run(it, before).await,
            Operator::RemoteClusters(it) => remote_clusters::run(it, before).await,
            Operator::Tag(it) => tag::run(it, before).await,
            Operator::BugReport(it) => bug_report::run(it, before).await,
            Operator::CreateRemoteSecret(it) => create_remote_secret::run(it, before).await,
        }
    }))
}

async fn until_interrupted(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
    }
}
