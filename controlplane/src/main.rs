//! The control plane's program: settings, run, exit code.

use anyhow::Context as _;
use clap::Parser as _;
use controlplane::config::{Args, Config};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (format, filter) = args.log();
    let options = net::log::Options {
        format: format.parse()?,
        filter,
    };
    let log = net::log::init(&options)?;
    let config = Config::try_from(args)?;
    let mut terminate = signal(SignalKind::terminate()).context("watch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch SIGINT")?;
    let result = controlplane::run(config, async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await;
    log.flush();
    Ok(result?)
}
