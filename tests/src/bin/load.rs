//! Load for the performance figures and the rigs: servers, and clients that each print a line of JSON.
//!
//! The first byte of a connection says what the server does with it: `E` echoes, `O` echoes one byte and ends, `S` counts what
//! it gets and answers the count (8 bytes, big-endian) once the client has closed its half. A PROXY header before it is told
//! on standard output.

use std::{
    env,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    task::JoinSet,
    time::timeout,
};

const USAGE: &str = "usage: load serve ADDR [--tell]      (--tell: a line with the end of each connection, `closed` or `reset`)
       load ping ADDR --size BYTES --count N --connections K [--rate PER_SECOND]
       load stream ADDR --flows N --seconds S
       load connect ADDR --seconds S --parallel K [--rate PER_SECOND] [--server-ends]   (--seconds 0: until standard input ends;
                                         --server-ends: the server closes first, so that the client's ports are free again)
       load hold ADDR --connections N    (prints a line, then holds them until standard input ends)
       load live ADDR --connections N [--beat MS] [--seconds S]    (holds N that exchange a byte every MS, 100 where not said, and
                                         prints a line; at the end of input, or of the time: how many live)
       load greet ADDR, load greeted ADDR       (a server that speaks first, and its client)
       load datagrams ADDR, load datagram ADDR  (a server that echoes over UDP, and its client)
       load forward ADDR TO              (a server that passes each connection on)
       load socks ADDR NAME:PORT         (asks the SOCKS5 server there for the name, and exchanges a byte with it)
       load fate ADDR [ADDR...]          (what becomes of a connection to each: `echoed`, `answered`, `refused`, `reset`, `closed`, `silent`)
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
        "serve" => serve(&arguments).await,
        "ping" => ping(&arguments).await,
        "stream" => stream(&arguments).await,
        "connect" => connect(&arguments).await,
        "hold" => hold(&arguments).await,
        "live" => live(&arguments).await,
        "greet" => greet(address).await,
        "greeted" => greeted(address).await,
        "datagrams" => datagrams(address).await,
        "datagram" => datagram(address).await,
        "forward" => forward(&arguments).await,
        "socks" => socks(&arguments).await,
        "fate" => fates(&arguments).await,
        "watch" => watch(address).await,
        _ => bail!("{USAGE}"),
    }
}

async fn serve(arguments: &Arguments) -> Result<()> {
    let (address, tell) = (
        arguments.address,
        arguments.rest.iter().any(|it| it == "--tell"),
    );
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
            let end = answer(stream).await.map_or("reset", |()| "closed");
            if tell {
                println!("{}", json!({"end": end}));
            }
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
        PROXY => {
            tell_proxied(&mut stream).await?;
            Box::pin(answer(stream)).await
        }
        b'E' => echo(stream).await,
        b'O' => echo_one(stream).await,
        b'S' => sink(stream).await,
        other => bail!("unknown mode {other}"),
    }
}

/// How a PROXY header of version 2 begins.
const PROXY: u8 = b'\r';

/// Reads the rest of a PROXY header: eleven bytes of its signature, version, family, and what follows by length.
async fn tell_proxied(stream: &mut TcpStream) -> Result<()> {
    let mut head = [0; 15];
    stream.read_exact(&mut head).await?;
    let length = u16::from_be_bytes([head[13], head[14]]);
    let mut rest = vec![0; length.into()];
    stream.read_exact(&mut rest).await?;
    let (source, destination) = match (head[12], &rest[..]) {
        (0x11, [a, b, c, d, e, f, g, h, i, j, k, l, ..]) => {
            let address = |ip: [u8; 4], port: [u8; 2]| {
                SocketAddr::new(ip.into(), u16::from_be_bytes(port)).to_string()
            };
            let source = address([*a, *b, *c, *d], [*i, *j]);
            (source, address([*e, *f, *g, *h], [*k, *l]))
        }
        (family, _) => bail!("family {family:#x}"),
    };
    let more = String::from_utf8_lossy(&rest[12..]).into_owned();
    println!(
        "{}",
        json!({"proxied": destination, "for": source, "more": more})
    );
    Ok(())
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

async fn echo_one(mut stream: TcpStream) -> Result<()> {
    let byte = stream.read_u8().await?;
    stream.write_u8(byte).await?;
    stream.shutdown().await?;
    // Closed with bytes unread it would be a reset.
    stream.read_to_end(&mut Vec::new()).await?;
    Ok(())
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

/// When a client of several tasks ends: at a time, or with standard input.
#[derive(Clone)]
struct End(Arc<AtomicBool>);

impl End {
    fn after(length: Duration) -> Self {
        let end = Self(Arc::default());
        let flag = end.0.clone();
        // A thread of its own, which nobody waits for when all else has ended.
        std::thread::spawn(move || {
            if length.is_zero() {
                // Whatever happens to the input, it has ended.
                let _ = io::stdin().lock().read_to_end(&mut Vec::new());
            } else {
                std::thread::sleep(length);
            }
            flag.store(true, Ordering::Relaxed);
        });
        end
    }

    fn has_come(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What came of the new connections of one task, or of all.
#[derive(Default)]
struct Tally {
    made: u64,
    failed: u64,
    /// Seconds since the start, and what happened; the first few.
    errors: Vec<String>,
}

impl Tally {
    fn fail(&mut self, began: Instant, error: &anyhow::Error) {
        self.failed += 1;
        if self.errors.len() < 5 {
            let after = began.elapsed().as_secs_f64();
            self.errors.push(format!("after {after:.3} s: {error:#}"));
        }
    }

    fn add(&mut self, mut other: Self) {
        self.made += other.made;
        self.failed += other.failed;
        self.errors.append(&mut other.errors);
    }
}

async fn connect(arguments: &Arguments) -> Result<()> {
    let end = End::after(arguments.seconds()?);
    let parallel = arguments.number("--parallel", 16)?.max(1);
    let rate = arguments.number("--rate", 0)?;
    let ends = match arguments.rest.iter().any(|it| it == "--server-ends") {
        true => Ends::Server,
        false => Ends::Client,
    };
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for index in 0..parallel {
        let pace = (rate > 0).then(|| Pace::new(rate, parallel, index));
        tasks.spawn(connect_one(arguments.address, ends, end.clone(), pace));
    }
    let mut all = Tally::default();
    while let Some(result) = tasks.join_next().await {
        all.add(result?);
    }
    let rate = all.made as f64 / began.elapsed().as_secs_f64();
    println!(
        "{}",
        json!({"connections": all.made, "failed": all.failed, "per_second": rate, "errors": all.errors})
    );
    Ok(())
}

/// Who closes a connection first, and keeps its ports for a minute (TIME-WAIT, RFC 9293 3.6.1). A client that has none free
/// searches for one for longer than all else takes.
#[derive(Clone, Copy)]
enum Ends {
    Client,
    Server,
}

async fn connect_one(address: SocketAddr, ends: Ends, end: End, pace: Option<Pace>) -> Tally {
    let began = Instant::now();
    let mut tally = Tally::default();
    while !end.has_come() {
        if let Some(pace) = &pace {
            tokio::time::sleep_until(pace.due(tally.made + tally.failed).into()).await;
        }
        let answered = match ends {
            Ends::Client => one_byte(address).await,
            Ends::Server => one_byte_and_end(address).await,
        };
        match answered {
            Ok(()) => tally.made += 1,
            Err(error) => tally.fail(began, &error),
        }
    }
    tally
}

async fn live(arguments: &Arguments) -> Result<()> {
    let connections = arguments.size("--connections", 50)?;
    let beat = Duration::from_millis(arguments.number("--beat", 100)?);
    let end = End::after(Duration::from_secs(arguments.number("--seconds", 0)?));
    let began = Instant::now();
    let exchanged = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let mut stream = dial(arguments.address, b'E').await?;
        exchange(&mut stream, b"x", &mut [0]).await?;
        let (end, exchanged) = (end.clone(), exchanged.clone());
        tasks.spawn(async move {
            while !end.has_come() {
                exchange(&mut stream, b"x", &mut [0]).await?;
                exchanged.fetch_add(1, Ordering::Relaxed);
                if !beat.is_zero() {
                    tokio::time::sleep(beat).await;
                }
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    println!("{}", json!({"held": tasks.len()}));
    let mut all = Tally::default();
    while let Some(result) = tasks.join_next().await {
        match result? {
            Ok(()) => all.made += 1,
            Err(error) => all.fail(began, &error),
        }
    }
    println!(
        "{}",
        json!({
            "live": all.made, "cut": all.failed, "errors": all.errors,
            "exchanged": exchanged.load(Ordering::Relaxed),
        })
    );
    Ok(())
}

async fn socks(arguments: &Arguments) -> Result<()> {
    let to = arguments.rest.first().context(USAGE)?;
    let (name, port) = to.rsplit_once(':').context(USAGE)?;
    let mut request = vec![5, 1, 0, 5, 1, 0, 3, u8::try_from(name.len())?];
    request.extend(name.as_bytes());
    request.extend(port.parse::<u16>()?.to_be_bytes());
    let connect = TcpStream::connect(arguments.address);
    let mut stream = timeout(ANSWER, connect).await??;
    stream.write_all(&request).await?;
    let mut answer = [0; 12];
    timeout(ANSWER, stream.read_exact(&mut answer)).await??;
    if answer[3] != 0 {
        bail!("{to}: answered {}", answer[3]);
    }
    stream.write_all(b"E").await?;
    exchange(&mut stream, b"x", &mut [0]).await?;
    println!("{}", json!({"answered": to}));
    Ok(())
}

async fn forward(arguments: &Arguments) -> Result<()> {
    let to = arguments.rest.first().context(USAGE)?;
    let listener = TcpListener::bind(arguments.address).await?;
    loop {
        let mut stream = accept(&listener).await;
        let to = to.clone();
        tokio::spawn(async move {
            let mut onward = timeout(ANSWER, TcpStream::connect(to)).await??;
            tokio::io::copy_bidirectional(&mut stream, &mut onward).await?;
            Ok::<_, anyhow::Error>(())
        });
    }
}

const GREETING: &[u8] = b"220 hello\r\n";

async fn greet(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).await?;
    loop {
        let mut stream = accept(&listener).await;
        tokio::spawn(async move {
            stream.write_all(GREETING).await?;
            echo(stream).await
        });
    }
}

async fn greeted(address: SocketAddr) -> Result<()> {
    let mut stream = timeout(ANSWER, TcpStream::connect(address))
        .await
        .context("connect timed out")??;
    let mut greeting = vec![0; GREETING.len()];
    timeout(ANSWER, stream.read_exact(&mut greeting))
        .await
        .context("no greeting")??;
    if greeting != GREETING {
        bail!("it greeted with {greeting:?}");
    }
    exchange(&mut stream, b"x", &mut [0]).await?;
    println!("{}", json!({"greeted": true}));
    Ok(())
}

async fn datagrams(address: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(address).await?;
    let mut buffer = vec![0; 2048];
    loop {
        let (n, peer) = socket.recv_from(&mut buffer).await?;
        socket.send_to(&buffer[..n], peer).await?;
    }
}

async fn datagram(address: SocketAddr) -> Result<()> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(address).await?;
    socket.send(b"x").await?;
    let answer = timeout(Duration::from_secs(2), socket.recv(&mut [0; 16])).await;
    answer.context("no answer over UDP")??;
    println!("{}", json!({"answered": true}));
    Ok(())
}

async fn one_byte(address: SocketAddr) -> Result<()> {
    let mut stream = dial(address, b'E').await?;
    exchange(&mut stream, b"x", &mut [0]).await?;
    Ok(())
}

async fn one_byte_and_end(address: SocketAddr) -> Result<()> {
    let mut stream = dial(address, b'O').await?;
    exchange(&mut stream, b"x", &mut [0]).await?;
    match timeout(ANSWER, stream.read(&mut [0])).await?? {
        0 => Ok(()),
        _ => bail!("more than was sent"),
    }
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

async fn fates(arguments: &Arguments) -> Result<()> {
    let first = arguments.address.to_string();
    for to in std::iter::once(&first).chain(&arguments.rest) {
        println!("{}", json!({"to": to, "fate": fate(to).await}));
    }
    Ok(())
}

async fn fate(to: &str) -> &'static str {
    let asked = async {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(b"Ex").await?;
        stream.read_u8().await
    };
    match timeout(ANSWER, asked).await {
        Ok(Ok(b'x')) => "echoed",
        Ok(Ok(_)) => "answered",
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused => "refused",
            io::ErrorKind::UnexpectedEof => "closed",
            _ => "reset",
        },
        Err(_) => "silent",
    }
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
