//! The node agent as a process of its own: settings from the environment, ends on SIGTERM or SIGINT.

use std::process::ExitCode;

use anyhow::Context;
use cni::command::{self, Command};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cni-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(worker_threads = 2)]
async fn run() -> anyhow::Result<()> {
    let command = Command::parse(std::env::args().skip(1));
    let log = net::log::init(&log_options(&command)?)?;
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let stop = async {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    let result = cni::main(&command, &|name| std::env::var(name).ok(), stop).await;
    log.flush();
    Ok(result?)
}

fn log_options(command: &Command) -> anyhow::Result<net::log::Options> {
    let mut options = net::log::Options::default();
    if command.log_as_json {
        options.format = "json".parse().context("--log_as_json")?;
    }
    if let Ok(format) = std::env::var("LOG_FORMAT") {
        options.format = format.parse().context("LOG_FORMAT")?;
    }
    let level = std::env::var("LOG_LEVEL").ok();
    let level = level.as_deref().and_then(command::filter);
    let asked = std::env::var("RUST_LOG").ok();
    let asked = asked.or_else(|| command.log_filter.clone()).or(level);
    options.filter = asked.unwrap_or(options.filter);
    Ok(options)
}
