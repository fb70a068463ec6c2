//! What the tunnel costs on one machine: handshakes, bytes, round trips and memory, both proxies in this process.
//!
//! `cargo run --release -p leyline-net --features testing --example tunnel`

use std::{
    future::{Future, pending},
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderMap;
use mesh::authority::Authority;
use net::{
    copy::{Counters, bidirectional},
    hbone::{Config, ConnectHead, ConnectRequest, Pool, PoolConfig, Target, serve},
    testing::TestCa,
    tls::{self, Policy, WorkloadCertificate},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

const DEADLINE: Duration = Duration::from_secs(10);

async fn listen() -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Accepts for ever, each connection in a task of its own.
fn accept<H, F>(listener: TcpListener, handler: H)
where
    H: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let _ = tcp.set_nodelay(true);
            tokio::spawn(handler(tcp));
        }
    });
}

/// The application: its first byte says whether to echo, to echo once and sit idle without a buffer, or to swallow.
async fn application(mut tcp: TcpStream) {
    match tcp.read_u8().await {
        Ok(b'e') => {
            let (mut read, mut write) = tcp.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
        Ok(b'i') => {
            if let Ok(byte) = tcp.read_u8().await {
                let _ = tcp.write_u8(byte).await;
                let _ = tcp.read_u8().await;
            }
        }
        Ok(_) => {
            let mut buffer = vec![0; 256 * 1024];
            while matches!(tcp.read(&mut buffer).await, Ok(read) if read > 0) {}
            let _ = tcp.write_all(b".").await;
        }
        Err(_) => {}
    }
}

async fn inbound(request: ConnectRequest, application: SocketAddr) {
    let Ok(upstream) = TcpStream::connect(application).await else {
        return request.refuse(http::StatusCode::SERVICE_UNAVAILABLE);
    };
    let _ = upstream.set_nodelay(true);
    if let Ok(stream) = request.accept(HeaderMap::new()) {
        bidirectional(stream, upstream, &Counters::default(), pending()).await;
    }
}

struct Rig {
    direct: SocketAddr,
    tunnelled: SocketAddr,
    hbone: SocketAddr,
    target: Target,
}

async fn rig() -> io::Result<Rig> {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let client = ca.certificate(&ca.identity("a", "client"));
    let server = ca.certificate(&ca.identity("b", "server"));
    let (listener, direct) = listen().await?;
    accept(listener, application);
    let (listener, hbone) = listen().await?;
    serve_hbone(listener, Arc::clone(&server), direct);
    let target = Target {
        destination: hbone,
        workload: None,
        expected: Arc::from([server.identity().clone()]),
        certificate: client,
    };
    let (listener, tunnelled) = listen().await?;
    let pool = Arc::new(Pool::new(PoolConfig::default(), TcpStream::connect));
    let to = target.clone();
    accept(listener, move |tcp| {
        let (pool, target) = (Arc::clone(&pool), to.clone());
        async move {
            let head = ConnectHead {
                authority: Authority::Address(direct),
                headers: HeaderMap::new(),
            };
            match pool.connect(&target, head).await {
                Ok(tunnel) => {
                    bidirectional(tcp, tunnel.stream, &Counters::default(), pending()).await;
                }
                Err(error) => eprintln!("{error}"),
            }
        }
    });
    Ok(Rig {
        direct,
        tunnelled,
        hbone,
        target,
    })
}

fn serve_hbone(listener: TcpListener, server: Arc<WorkloadCertificate>, direct: SocketAddr) {
    accept(listener, move |tcp| {
        let server = Arc::clone(&server);
        async move {
            if let Ok((io, peer)) = tls::accept(tcp, server.server_config(), DEADLINE).await {
                let handler = move |request| inbound(request, direct);
                let _ = serve(io, peer, &Config::default(), pending(), handler, |_| {}).await;
            }
        }
    });
}

async fn handshakes(rig: &Rig) {
    let begin = Instant::now();
    let mut done = 0_u32;
    let mut tasks = JoinSet::new();
    while begin.elapsed() < Duration::from_secs(3) {
        while tasks.len() < 16 {
            let (address, target) = (rig.hbone, rig.target.clone());
            tasks.spawn(async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let config = target.certificate.client_config(&target.expected);
                let connected = tls::connect(tcp, config, DEADLINE).await;
                connected.map(drop).map_err(io::Error::other)
            });
        }
        done += u32::from(matches!(tasks.join_next().await, Some(Ok(Ok(())))));
    }
    let rate = f64::from(done) / begin.elapsed().as_secs_f64();
    println!("mutual TLS handshakes, both ends: {rate:.0}/s");
}

/// Gigabits per second of `flows` at once.
async fn throughput(address: SocketAddr, flows: u32) -> io::Result<f64> {
    const BYTES: usize = 1 << 30;
    let mut tasks = JoinSet::new();
    let begin = Instant::now();
    for _ in 0..flows {
        tasks.spawn(async move {
            let mut tcp = TcpStream::connect(address).await?;
            tcp.write_all(b"s").await?;
            let block = vec![0; 128 * 1024];
            let mut left = BYTES / usize::try_from(flows).unwrap_or(1);
            while left > 0 {
                let piece = left.min(block.len());
                tcp.write_all(&block[..piece]).await?;
                left -= piece;
            }
            tcp.shutdown().await?;
            tcp.read_u8().await.map(drop)
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.map_err(io::Error::other)??;
    }
    Ok(8.0 * 1.073_741_824 / begin.elapsed().as_secs_f64())
}

/// The median round trip of `size` bytes.
async fn round_trip(address: SocketAddr, size: usize) -> io::Result<Duration> {
    let mut tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    tcp.write_all(b"e").await?;
    let message = vec![7; size];
    let mut back = vec![0; size];
    let mut times = Vec::new();
    for _ in 0..2000 {
        let begin = Instant::now();
        let (mut read, mut write) = tcp.split();
        let (sent, got) = tokio::join!(write.write_all(&message), read.read_exact(&mut back));
        sent.and(got.map(drop))?;
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

/// New connections per second, each with one byte there and back.
async fn connections(address: SocketAddr) -> io::Result<f64> {
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    let mut done = 0_u32;
    while begin.elapsed() < Duration::from_secs(3) {
        while tasks.len() < 16 {
            tasks.spawn(async move {
                let mut tcp = TcpStream::connect(address).await?;
                tcp.write_all(b"ex").await?;
                tcp.read_u8().await
            });
        }
        let Some(one) = tasks.join_next().await else {
            break;
        };
        one.map_err(io::Error::other)??;
        done += 1;
    }
    Ok(f64::from(done) / begin.elapsed().as_secs_f64())
}

fn resident_bytes() -> io::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.unwrap_or_default() * 1024.0)
}

async fn hold(address: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    let mut held = Vec::new();
    for _ in 0..count {
        let mut tcp = TcpStream::connect(address).await?;
        tcp.write_all(b"ix").await?;
        tcp.read_u8().await?;
        held.push(tcp);
    }
    Ok(held)
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let rig = rig().await?;
    let _warm = hold(rig.tunnelled, 100).await?;
    let before = resident_bytes()?;
    let held = hold(rig.tunnelled, 1500).await?;
    let each = (resident_bytes()? - before) / 1500.0 / 1024.0;
    println!("idle connection, both proxies and both applications: {each:.1} KiB");
    drop(held);
    handshakes(&rig).await;
    for (name, address) in [("plain", rig.direct), ("tunnel", rig.tunnelled)] {
        let rate = connections(address).await?;
        println!("{name}: {rate:.0} new connections/s");
        for flows in [1, 16] {
            let rate = throughput(address, flows).await?;
            println!("{name}: {flows} flows {rate:.2} Gbit/s");
        }
        for size in [1, 1024, 16 * 1024, 256 * 1024, 1024 * 1024] {
            let time = round_trip(address, size).await?;
            println!("{name}: round trip of {size} bytes {time:?}");
        }
    }
    Ok(())
}
