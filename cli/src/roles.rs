//! The roles that this program takes when it executes itself: every part of the mesh, and the embedded mesh's helpers.
//! Chosen before any thread exists.

use std::{future::Future, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use crate::local;

/// Runs the role called `name`; `None` when there is none, and the command line is for people.
pub(crate) fn run(name: &str) -> Option<ExitCode> {
    match name {
        "ztunnel" => Some(ztunnel::main_with(std::env::args().skip(2))),
        // Without `proxy`, it is the command for people.
        "waypoint" if std::env::args().nth(2).as_deref() == Some("proxy") => {
            Some(waypoint::main_with(std::env::args().skip(2)))
        }
        "controlplane" => Some(ended(name, controlplane())),
        "cni-agent" => Some(ended(name, cni_agent())),
        local::SUPERVISOR_ROLE => Some(local::supervisor_main()),
        local::SHIM_ROLE => Some(local::shim_main()),
        _ => None,
    }
}

fn ended(role: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{role}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn controlplane() -> Result<()> {
    let arguments = std::env::args().skip(1);
    let args = controlplane::config::Args::parse_from(arguments);
    executor()?.block_on(async {
        let format = args.log_format.parse()?;
        let log = net::log::init(&net::log::Options {
            format,
            filter: args.log.clone(),
        })?;
        let config = controlplane::Config::try_from(args)?;
        let result = controlplane::run(config, asked_to_end()?).await;
        log.flush();
        result.context("run the control plane")
    })
}

fn cni_agent() -> Result<()> {
    let lookup = |name: &str| std::env::var(name).ok();
    let command = cni::command::Command::parse(std::env::args().skip(2));
    executor()?.block_on(async {
        let mut options = net::log::Options::default();
        let asked = lookup("RUST_LOG").or_else(|| command.log_filter.clone());
        options.filter = asked.unwrap_or(options.filter);
        if command.log_as_json {
            options.format = "json".parse()?;
        }
        let log = net::log::init(&options)?;
        let result = cni::main(&command, &lookup, asked_to_end()?).await;
        log.flush();
        result.context("run the agent")
    })
}

fn executor() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the executor")
}

/// Completes when the process is asked to end.
pub(crate) fn asked_to_end() -> Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate()).context("watch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
