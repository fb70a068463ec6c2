//! The control plane's program: settings, run, exit code.

use anyhow::Context as _;
use clap::Parser as _;
use controlplane::config::{Args, Config};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (format, filter) = args.log();
    let options = net::log::Options {
        format: format.parse()?,
        filter,
    };
    let log = net::log::init(&options)?;
    give_back_freed_memory();
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

/// Lets the allocator hand freed memory back by itself. Without a thread of its own it does so only when it is called,
/// and a control plane whose proxies have left is hardly called at all.
fn give_back_freed_memory() {
    if let Err(error) = tikv_jemalloc_ctl::background_thread::write(true) {
        // Memory is kept longer, and nothing else.
        tracing::debug!(%error, "the allocator has no thread of its own");
    }
}
