//! The control plane's program: settings, run, exit code.

use clap::Parser as _;
use controlplane::config::{Args, Config};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::try_from(Args::parse())?;
    controlplane::run(config, async {
        drop(tokio::signal::ctrl_c().await);
    })
    .await?;
    Ok(())
}
