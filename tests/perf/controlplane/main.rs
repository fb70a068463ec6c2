//! Figures of the control plane alone: a process of its own, fed by an API server that is made up here and read by
//! subscribers over real gRPC.
//!
//! ```text
//! perf-controlplane [--bin FILE] [--pods N] [--services N] [--policies N] [--subscribers N] [--changes N]
//! ```
//!
//! Subscribers speak HTTP/2 over TLS as node tunnels do, and look at each response only as far as they must (nonce,
//! type, names), so that what is measured is the control plane and not its readers; both share the machine.

mod api;
mod proxy;
mod usage;

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use tokio::task::JoinSet;

use api::{Api, Size};
use proxy::{Connector, Landings, Proxy};
use usage::{Spread, Usage};

/// Anything that takes longer is broken.
const LONGEST: Duration = Duration::from_secs(600);

struct Options {
    bin: PathBuf,
    size: Size,
    subscribers: usize,
    changes: usize,
}

impl Options {
    fn parse() -> Result<Self> {
        let own = std::env::current_exe()?;
        let mut options = Self {
            bin: own.with_file_name("controlplane"),
            size: Size {
                pods: 100_000,
                services: 20_000,
                policies: 2_000,
                nodes: 500,
            },
            subscribers: 500,
            changes: 200,
        };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let value = args
                .next()
                .with_context(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--bin" => options.bin = value.into(),
                "--pods" => options.size.pods = value.parse()?,
                "--services" => options.size.services = value.parse()?,
                "--policies" => options.size.policies = value.parse()?,
                "--subscribers" => options.subscribers = value.parse()?,
                "--changes" => options.changes = value.parse()?,
                other => bail!("unknown option {other}"),
            }
        }
        options.size.nodes = options.subscribers.max(1);
        Ok(options)
    }
}

/// A control plane in a process of its own; it ends with this.
struct Plane {
    child: Child,
    usage: Usage,
    connector: Connector,
    _folder: TempDir,
}

impl Drop for Plane {
    fn drop(&mut self) {
        // It is ended one way or the other.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Plane {
    async fn start(options: &Options, api: &Api) -> Result<(Self, Duration)> {
        let folder = tempfile::tempdir()?;
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(&kubeconfig, api.kubeconfig())?;
        let started = Instant::now();
        let (xds, admin, ready) = (free_port()?, free_port()?, free_port()?);
        let log = std::fs::File::create(folder.path().join("log"))?;
        let child = Command::new(&options.bin)
            .arg("discovery")
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .arg(format!("--secureGRPCAddr=127.0.0.1:{xds}"))
            .arg(format!("--monitoringAddr=127.0.0.1:{admin}"))
            .arg(format!("--httpAddr=127.0.0.1:{ready}"))
            .arg(format!("--httpsAddr=127.0.0.1:{}", free_port()?))
            .env("LEYLINE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", options.bin.display()))?;
        let usage = Usage::of(child.id());
        let mut plane = Self {
            child,
            usage,
            connector: Connector::new(xds),
            _folder: folder,
        };
        while !is_ready(ready).await {
            ensure!(started.elapsed() < LONGEST, "not ready in time");
            if let Some(status) = plane.child.try_wait()? {
                let log = std::fs::read_to_string(plane._folder.path().join("log"))?;
                bail!("the control plane ended with {status}: {log}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok((plane, started.elapsed()))
    }
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port())
}

async fn is_ready(port: u16) -> bool {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        let request = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text.starts_with("HTTP/1.1 200"))
    };
    ask.await.unwrap_or_default()
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(measure(options))
}

async fn measure(options: Options) -> Result<()> {
    let size = options.size;
    println!(
        "{} pods, {} services, {} policies, {} subscribers; {} cores",
        size.pods,
        size.services,
        size.policies,
        options.subscribers,
        std::thread::available_parallelism()?
    );
    let api = Api::start(size).await?;
    let (plane, took) = Plane::start(&options, &api).await?;
    let usage = &plane.usage;
    println!(
        "start to ready: {:.2} s, CPU {:.2} s",
        took.as_secs_f64(),
        usage.cpu()?
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    let alone = usage.memory()?;
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    let per_pod = alone as f64 / size.pods as f64;
    println!(
        "memory: {} MiB, {per_pod:.0} bytes per pod with its share of the rest",
        alone >> 20
    );

    quiet_changes(&options, &api, usage).await?;
    let landings = Arc::new(Landings::default());
    let mut readers = join_all(&options, &plane, &landings).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let with_readers = usage.memory()?;
    let per_reader = with_readers.saturating_sub(alone) / options.subscribers.max(1) as u64;
    println!(
        "memory with subscribers: {} MiB (peak {} MiB), {} KiB per subscriber",
        with_readers >> 20,
        usage.peak()? >> 20,
        per_reader >> 10
    );
    one_at_a_time(&options, &api, &landings, usage).await?;
    a_hundred_a_second(&options, &api, &landings, usage).await?;
    readers.abort_all();
    while readers.join_next().await.is_some() {}
    certificates(&options, &plane).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!("memory when all have gone: {} MiB", usage.memory()? >> 20);
    Ok(())
}

/// What a change costs where nobody reads.
async fn quiet_changes(options: &Options, api: &Api, usage: &Usage) -> Result<()> {
    let before = usage.cpu()?;
    let count = options.changes * 5;
    for n in 0..count {
        api.change(n);
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    let each = (usage.cpu()? - before) * 1e3 / count as f64;
    println!("CPU per pod change without subscribers: {each:.3} ms ({count} changes, 4 ms apart)");
    Ok(())
}

/// All subscribers at once, until each has everything.
async fn join_all(
    options: &Options,
    plane: &Plane,
    landings: &Arc<Landings>,
) -> Result<JoinSet<()>> {
    let started = Instant::now();
    let cpu = plane.usage.cpu()?;
    let (whole, mut wholes) = tokio::sync::mpsc::channel(options.subscribers.max(1));
    let mut readers = JoinSet::new();
    let expected = options.size.resources();
    for node in 0..options.subscribers {
        let (connector, landings) = (plane.connector.clone(), landings.clone());
        let whole = whole.clone();
        readers.spawn(async move {
            let outcome = Proxy::open(&connector, node).await;
            match outcome {
                Ok(proxy) => proxy.run(expected, &landings, whole).await,
                // The receiver counts what comes; a lost word of a failure shows as a time-out.
                Err(error) => drop(whole.send(Err(error)).await),
            }
        });
    }
    let (mut joined, mut refused) = (Vec::new(), 0);
    for _ in 0..options.subscribers {
        let word = tokio::time::timeout(LONGEST, wholes.recv()).await?;
        match word.context("subscribers have gone")? {
            Ok(()) => joined.push(started.elapsed().as_secs_f64()),
            Err(error) => {
                if refused == 0 {
                    println!("first refusal: {error:#}");
                }
                refused += 1;
            }
        }
    }
    println!(
        "{} subscribers joining at once: {refused} refused; seconds until each had everything: {}; CPU {:.1} s",
        options.subscribers,
        Spread::of(joined),
        plane.usage.cpu()? - cpu
    );
    Ok(readers)
}

async fn one_at_a_time(
    options: &Options,
    api: &Api,
    landings: &Landings,
    usage: &Usage,
) -> Result<()> {
    let (mut first, mut last) = (Vec::new(), Vec::new());
    let cpu = usage.cpu()?;
    for n in 0..options.changes {
        let name = api.name(n);
        let landed = landings.expect(&name, options.subscribers);
        let changed = Instant::now();
        api.change(n);
        let landed = tokio::time::timeout(LONGEST, landed).await??;
        first.push((landed.first - changed).as_secs_f64() * 1e3);
        last.push((landed.last - changed).as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    let each = (usage.cpu()? - cpu) * 1e3 / options.changes as f64;
    println!(
        "one change at a time, ms to the first subscriber: {}",
        Spread::of(first)
    );
    println!(
        "one change at a time, ms to the last subscriber: {}",
        Spread::of(last)
    );
    println!(
        "CPU per pod change with its writes to {} subscribers: {each:.2} ms",
        options.subscribers
    );
    Ok(())
}

async fn a_hundred_a_second(
    options: &Options,
    api: &Api,
    landings: &Landings,
    usage: &Usage,
) -> Result<()> {
    let cpu = usage.cpu()?;
    let count = options.changes * 5;
    let mut waits = JoinSet::new();
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for n in 0..count {
        tick.tick().await;
        let n = n + options.changes;
        let landed = landings.expect(&api.name(n), options.subscribers);
        let changed = Instant::now();
        api.change(n);
        waits.spawn(async move {
            let landed = tokio::time::timeout(LONGEST, landed).await.ok()?.ok()?;
            Some((landed.last - changed).as_secs_f64() * 1e3)
        });
    }
    let mut last = Vec::new();
    while let Some(landed) = waits.join_next().await {
        last.extend(landed?);
    }
    ensure!(
        last.len() == count,
        "{} of {count} changes arrived",
        last.len()
    );
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    let each = (usage.cpu()? - cpu) * 1e3 / count as f64;
    println!(
        "100 changes/s, ms to the last subscriber: {}",
        Spread::of(last)
    );
    println!("CPU per pod change at 100/s with its writes: {each:.2} ms");
    Ok(())
}

/// As many certificates as come in five seconds over eight connections.
async fn certificates(options: &Options, plane: &Plane) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    let cpu = plane.usage.cpu()?;
    let mut askers = JoinSet::new();
    for node in 0..8.min(options.size.nodes) {
        let connector = plane.connector.clone();
        let identity = api::identity_on(node);
        askers.spawn(async move { proxy::certificates(&connector, node, &identity, end).await });
    }
    let mut total = 0;
    while let Some(count) = askers.join_next().await {
        total += count??;
    }
    println!(
        "certificates: {} per second (CPU {:.2} of the cores' time)",
        total / 5,
        (plane.usage.cpu()? - cpu) / 5.0
    );
    Ok(())
}
