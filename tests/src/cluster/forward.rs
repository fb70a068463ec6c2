//! Lets this machine's loopback reach one address inside a cluster: a listener here, connections from there.

use std::{fs, net::Ipv4Addr, path::Path};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

/// Listens on a port of 127.0.0.1, writes its number to `port`, and passes each connection to `to`, connected in the network
/// namespace `netns`. It goes on until it is killed.
pub fn run(netns: &Path, to: &str, port: &Path) -> Result<()> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    let number = listener.local_addr()?.port();
    let file = fs::File::open(netns).with_context(|| netns.display().to_string())?;
    // One thread does all the work: what it opens from here on is in the cluster.
    setns(file, CloneFlags::CLONE_NEWNET).context("enter the cluster's network")?;
    let whole = port.with_extension("new");
    fs::write(&whole, number.to_string())?;
    fs::rename(whole, port)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(listener, to))
}

async fn serve(listener: std::net::TcpListener, to: &str) -> Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (mut client, _) = listener.accept().await?;
        let to = to.to_owned();
        tokio::spawn(async move {
            // An API server that is down refuses: the client sees its connection end.
            if let Ok(mut server) = TcpStream::connect(&to).await {
                let _ = copy_bidirectional(&mut client, &mut server).await;
            }
        });
    }
}
