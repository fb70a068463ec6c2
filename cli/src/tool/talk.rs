//! Clients of the echo server.

use std::{
    io::{Read, Write, stdout},
    net::{Shutdown, TcpStream, ToSocketAddrs},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

fn connect(address: &str, limit: Duration) -> Result<TcpStream> {
    let addresses = address
        .to_socket_addrs()
        .with_context(|| format!("resolve {address}"))?;
    let mut last = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(limit))?;
                stream.set_write_timeout(Some(limit))?;
                return Ok(stream);
            }
            Err(error) => {
                last = Some(anyhow::Error::new(error).context(format!("connect to {address}")))
            }
        }
    }
    Err(last.unwrap_or_else(|| anyhow::anyhow!("{address} has no address")))
}

/// Sends, half-closes, and expects the same back, then the end.
pub(super) fn send(
    address: &str,
    text: &str,
    bytes: Option<usize>,
    limit: Duration,
) -> Result<ExitCode> {
    let length = bytes.unwrap_or(text.len());
    let message: Vec<u8> = text.bytes().cycle().take(length).collect();
    let started = Instant::now();
    let mut stream = connect(address, limit)?;
    let peer = stream.peer_addr()?;
    let mut writing = stream.try_clone()?;
    let sent = message.clone();
    let writer = thread::spawn(move || {
        writing.write_all(&sent)?;
        writing.shutdown(Shutdown::Write)
    });
    let mut echoed = Vec::with_capacity(length);
    stream.read_to_end(&mut echoed).context("read the echo")?;
    if let Ok(result) = writer.join() {
        result.context("send")?;
    }
    if echoed != message {
        bail!("{} of {length} bytes came back", echoed.len());
    }
    println!(
        "{length} bytes to {peer} and back in {:?}",
        started.elapsed()
    );
    Ok(ExitCode::SUCCESS)
}

/// Talks on one connection until it breaks or we are killed.
pub(super) fn hold(address: &str, every: Duration) -> Result<ExitCode> {
    let mut stream = connect(address, Duration::from_secs(5))?;
    let own = stream.local_addr()?;
    for word in 1_u64.. {
        let sent = word.to_be_bytes();
        stream
            .write_all(&sent)
            .context("the held connection broke")?;
        let mut echoed = [0; 8];
        stream
            .read_exact(&mut echoed)
            .context("the held connection broke")?;
        if echoed != sent {
            bail!("another word came back");
        }
        writeln!(stdout(), "{word} {own}")?;
        thread::sleep(every);
    }
    Ok(ExitCode::SUCCESS)
}
