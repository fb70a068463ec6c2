//! Load for the performance figures and the rigs: one server and four clients, each printing one line of JSON.
//!
//! The first byte of a connection says what the server does with it: `E` echoes, `S` counts what it gets and answers the
//! count (8 bytes, big-endian) once the client has closed its half.

use std::{
    env, io,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};

const USAGE: &str = "usage: load serve ADDR
       load ping ADDR --size BYTES --count N --connections K [--rate PER_SECOND]
       load stream ADDR --flows N --seconds S
       load connect ADDR --seconds S --parallel K [--rate PER_SECOND]
       load hold ADDR --connections N    (prints a line, then holds them until standard input ends)
       load watch ADDR                   (a line with the time whenever new connections fare otherwise than before)";

/// How long a single answer may take before the run is called failed.
const ANSWER: Duration = Duration::from_secs(20);

struct Arguments {
    address: SocketAddr,
    rest: Vec<String>,
}

impl Arguments {
    fn number(&self, name: &str, default: u64) -> Result<u64> {
        let mut rest = self.rest.iter();
        while let Some(argument) = rest.next() {
            if argument == name {
                let value = rest
                    .next()
                    .with_context(|| format!("{name} needs a number"))?;
                return value.parse().with_context(|| format!("{name} {value}"));
            }
        }
        Ok(default)
    }

    fn size(&self, name: &str, default: u64) -> Result<usize> {
        Ok(usize::try_from(self.number(name, default)?)?)
    }

    fn seconds(&self) -> Result<Duration> {
        Ok(Duration::from_secs(self.number("--seconds", 5)?))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut words = env::args().skip(1);
    let (Some(command), Some(address)) = (words.next(), words.next()) else {
        bail!("{USAGE}")
    };
    let mut found = tokio::net::lookup_host(&address)
        .await
        .with_context(|| format!("resolve {address}"))?;
    let address = found
        .next()
        .with_context(|| format!("{address} has no address"))?;
    let arguments = Arguments {
        address,
        rest: words.collect(),
    };
    match command.as_str() {
        "serve" => serve(address).await,
        "ping" => ping(&arguments).await,
        "stream" => stream(&arguments).await,
        "connect" => connect(&arguments).await,
        "hold" => hold(&arguments).await,
        "watch" => watch(address).await,
        _ => bail!("{USAGE}"),
    }
}

async fn serve(address: SocketAddr) -> Result<()> {
    let socket = if address.is_ipv6() {
        TcpSocket::new_v6()?
    } else {
        TcpSocket::new_v4()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let listener = socket.listen(4096)?;
    loop {
        let stream = accept(&listener).await;
        tokio::spawn(async move {
            // A client that resets is part of the load.
            let _ = answer(stream).await;
        });
    }
}

/// Accepts through shortages of files: what the load holds open is the client's to close.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                eprintln!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    match stream.read_u8().await? {
        b'E' => echo(stream).await,
        b'S' => sink(stream).await,
        other => bail!("unknown mode {other}"),
    }
}

async fn echo(mut stream: TcpStream) -> Result<()> {
    // Idle connections are counted in memory figures: no buffer until something comes.
    loop {
        stream.readable().await?;
        let mut buffer = vec![0; 64 << 10];
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..n]).await?;
    }
}

async fn sink(mut stream: TcpStream) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0u64;
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        total += n as u64;
    }
    stream.write_u64(total).await?;
    Ok(())
}

async fn dial(address: SocketAddr, mode: u8) -> Result<TcpStream> {
    let mut stream = timeout(ANSWER, TcpStream::connect(address))
        .await
        .context("connect timed out")??;
    stream.set_nodelay(true)?;
    stream.write_u8(mode).await?;
    Ok(stream)
}

/// One request and its answer.
async fn exchange(stream: &mut TcpStream, message: &[u8], answer: &mut [u8]) -> Result<Duration> {
    let began = Instant::now();
    let (mut reader, mut writer) = stream.split();
    // Both at once: a large message may be answered before it is all sent.
    let both = async { tokio::try_join!(writer.write_all(message), reader.read_exact(answer)) };
    timeout(ANSWER, both).await.context("no answer")??;
    Ok(began.elapsed())
}

async fn ping(arguments: &Arguments) -> Result<()> {
    let size = arguments.size("--size", 64)?;
    let count = arguments.number("--count", 1000)?;
    let connections = arguments.number("--connections", 1)?.max(1);
    let rate = arguments.number("--rate", 0)?;
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for index in 0..connections {
        let pace = (rate > 0).then(|| Pace::new(rate, connections, index));
        tasks.spawn(ping_one(arguments.address, size, count / connections, pace));
    }
    let mut latencies = Vec::new();
    while let Some(result) = tasks.join_next().await {
        latencies.extend(result??);
    }
    let elapsed = began.elapsed();
    latencies.sort_unstable();
    let at = |permille: usize| {
        let index = (latencies.len() * permille / 1000).min(latencies.len().saturating_sub(1));
        latencies
            .get(index)
            .map_or(0.0, |latency| latency.as_secs_f64() * 1e6)
    };
    let per_second = latencies.len() as f64 / elapsed.as_secs_f64();
    println!(
        "{}",
        json!({"p50_us": at(500), "p90_us": at(900), "p99_us": at(990), "max_us": at(1000), "per_second": per_second})
    );
    Ok(())
}

/// When each request of one connection is due, so that a slow answer does not lower the rate unseen.
struct Pace {
    first: Instant,
    every: Duration,
}

impl Pace {
    fn new(rate: u64, connections: u64, index: u64) -> Self {
        let every = Duration::from_secs_f64(connections as f64 / rate as f64);
        let offset = every.mul_f64(index as f64 / connections as f64);
        Self {
            first: Instant::now() + Duration::from_millis(50) + offset,
            every,
        }
    }

    fn due(&self, number: u64) -> Instant {
        self.first + self.every.mul_f64(number as f64)
    }
}

async fn ping_one(
    address: SocketAddr,
    size: usize,
    count: u64,
    pace: Option<Pace>,
) -> Result<Vec<Duration>> {
    let mut stream = dial(address, b'E').await?;
    let message = vec![7; size];
    let mut answer = vec![0; size];
    let mut latencies = Vec::new();
    // The first exchange carries the tunnel's set-up; it is measured by `connect`.
    exchange(&mut stream, &message, &mut answer).await?;
    for number in 0..count {
        let mut late = Duration::ZERO;
        if let Some(pace) = &pace {
            let due = pace.due(number);
            tokio::time::sleep_until(due.into()).await;
            // Late by the previous answer: part of what a client at this rate sees. The timer's own lateness is not.
            late = due.elapsed().saturating_sub(Duration::from_millis(2));
        }
        latencies.push(exchange(&mut stream, &message, &mut answer).await? + late);
    }
    Ok(latencies)
}

async fn stream(arguments: &Arguments) -> Result<()> {
    let flows = arguments.number("--flows", 1)?;
    let length = arguments.seconds()?;
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..flows {
        tasks.spawn(stream_one(arguments.address, began + length));
    }
    let mut total = 0u64;
    while let Some(result) = tasks.join_next().await {
        total += result??;
    }
    let rate = total as f64 / began.elapsed().as_secs_f64();
    println!("{}", json!({"bytes": total, "bytes_per_second": rate}));
    Ok(())
}

async fn stream_one(address: SocketAddr, until: Instant) -> Result<u64> {
    let mut stream = dial(address, b'S').await?;
    let block = vec![42; 128 << 10];
    let mut sent = 0u64;
    while Instant::now() < until {
        stream.write_all(&block).await?;
        sent += block.len() as u64;
    }
    stream.shutdown().await?;
    let received = timeout(ANSWER, stream.read_u64())
        .await
        .context("no count")??;
    if received != sent {
        bail!("sent {sent} bytes, and {received} arrived");
    }
    Ok(received)
}

async fn connect(arguments: &Arguments) -> Result<()> {
    let length = arguments.seconds()?;
    let parallel = arguments.number("--parallel", 16)?.max(1);
    let rate = arguments.number("--rate", 0)?;
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for index in 0..parallel {
        let pace = (rate > 0).then(|| Pace::new(rate, parallel, index));
        tasks.spawn(connect_one(arguments.address, began + length, pace));
    }
    let (mut made, mut failed) = (0u64, 0u64);
    while let Some(result) = tasks.join_next().await {
        let (good, bad) = result?;
        made += good;
        failed += bad;
    }
    let rate = made as f64 / began.elapsed().as_secs_f64();
    println!(
        "{}",
        json!({"connections": made, "failed": failed, "per_second": rate})
    );
    Ok(())
}

async fn connect_one(address: SocketAddr, until: Instant, pace: Option<Pace>) -> (u64, u64) {
    let (mut made, mut failed) = (0, 0);
    while Instant::now() < until {
        if let Some(pace) = &pace {
            tokio::time::sleep_until(pace.due(made + failed).into()).await;
        }
        match one_byte(address).await {
            Ok(()) => made += 1,
            Err(error) => {
                failed += 1;
                eprintln!("{error:#}");
            }
        }
    }
    (made, failed)
}

async fn one_byte(address: SocketAddr) -> Result<()> {
    let mut stream = dial(address, b'E').await?;
    exchange(&mut stream, b"x", &mut [0]).await?;
    Ok(())
}

async fn hold(arguments: &Arguments) -> Result<()> {
    let connections = arguments.size("--connections", 1000)?;
    let mut held = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = dial(arguments.address, b'E').await?;
        exchange(&mut stream, b"x", &mut [0]).await?;
        held.push(stream);
    }
    println!("{}", json!({"held": held.len()}));
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}

/// How a new connection fares: `answered`, `refused` (nobody listens: what a closed port answers outside the mesh), or
/// `failed` (accepted and ended, which is how a tunnel or a policy refuses). Ends with standard input.
async fn watch(address: SocketAddr) -> Result<()> {
    let mut input = tokio::io::stdin();
    let mut rest = Vec::new();
    tokio::select! {
        result = report_changes(address) => result,
        _ = input.read_to_end(&mut rest) => Ok(()),
    }
}

async fn report_changes(address: SocketAddr) -> Result<()> {
    let mut before = "";
    loop {
        let now = match timeout(Duration::from_secs(1), one_byte(address)).await {
            Ok(Ok(())) => "answered",
            Ok(Err(error)) if is_refused(&error) => "refused",
            Ok(Err(_)) | Err(_) => "failed",
        };
        if now != before {
            let time = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)?
                .as_secs_f64();
            println!("{}", json!({"state": now, "time": time}));
            before = now;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn is_refused(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
