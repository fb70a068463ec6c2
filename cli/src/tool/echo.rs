//! A server that sends back what comes in.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::ExitCode,
    thread,
};

use anyhow::{Context, Result};

/// Serves until killed.
pub(super) fn serve(ports: &[u16]) -> Result<ExitCode> {
    let mut threads = Vec::new();
    for port in ports {
        let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
        let listener =
            TcpListener::bind(both).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)));
        let listener = listener.with_context(|| format!("listen on port {port}"))?;
        println!("echoing on port {port}");
        threads.push(thread::spawn(move || accept(&listener)));
    }
    threads.into_iter().for_each(|thread| drop(thread.join()));
    Ok(ExitCode::SUCCESS)
}

fn accept(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || match echo(&stream) {
            Ok(()) | Err(_) => drop(stream.shutdown(Shutdown::Write)),
        });
    }
}

/// Until the client has said everything, and then its half is closed: so is ours.
fn echo(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}
