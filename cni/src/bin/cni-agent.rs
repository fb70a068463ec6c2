//! The node agent as a process of its own: settings from the environment, ends on SIGTERM or SIGINT.

use std::process::ExitCode;

use anyhow::Context;
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
    let log = net::log::init(&log_options()?)?;
    let config = cni::agent::Config::from_lookup(&|name| std::env::var(name).ok())?;
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let stop = async {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    let result = cni::run(config, stop).await;
    log.flush();
    Ok(result?)
}

fn log_options() -> anyhow::Result<net::log::Options> {
    let mut options = net::log::Options::default();
    if let Ok(format) = std::env::var("LOG_FORMAT") {
        options.format = format.parse().context("LOG_FORMAT")?;
    }
    if let Ok(filter) = std::env::var("RUST_LOG") {
        options.filter = filter;
    }
    Ok(options)
}
