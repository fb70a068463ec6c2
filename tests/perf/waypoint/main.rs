//! The waypoint against Envoy: a client that speaks HBONE, one proxy, an endpoint behind a tunnel, all on loopback.
//!
//! `perf-waypoint [--envoy PATH] [--bin PATH] [--rounds N] [--seconds N] [--only ready,requests,rate,memory,routes,changes]`. The proxies
//! run in turn, round by round, each with one worker thread; ratios are taken within a round. Prints Markdown.

mod authority;
mod figures;
mod load;
mod plane;
mod proxies;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use authority::Authority;
use figures::Table;
use load::Client;
use proxies::Proxy;

/// Connections of the application, of which a node has a handful to one waypoint.
const CONNECTIONS: u32 = 16;
/// Requests a second of the fixed rate.
const RATE: u32 = 1000;
/// How many routes a large mesh has.
const MANY: usize = 5_000;
/// How many nobody should notice.
const MOST: usize = 10_000;
/// Changes of a route that are timed.
const CHANGES: u64 = 100;

struct Options {
    ours: PathBuf,
    envoy: Option<PathBuf>,
    rounds: usize,
    time: Duration,
    only: Option<Vec<String>>,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            ours: std::env::current_exe()?.with_file_name("waypoint"),
            envoy: None,
            rounds: 3,
            time: Duration::from_secs(3),
            only: None,
        };
        let mut words = std::env::args().skip(1);
        while let Some(name) = words.next() {
            let value = words
                .next()
                .with_context(|| format!("{name} takes a value"))?;
            match name.as_str() {
                "--bin" => options.ours = value.into(),
                "--envoy" => options.envoy = Some(value.into()),
                "--rounds" => options.rounds = value.parse()?,
                "--seconds" => options.time = Duration::from_secs(value.parse()?),
                "--only" => options.only = Some(value.split(',').map(str::to_owned).collect()),
                other => bail!("unknown option {other}"),
            }
        }
        Ok(options)
    }

    fn wants(&self, part: &str) -> bool {
        let named = |only: &Vec<String>| only.iter().any(|it| it == part);
        self.only.as_ref().is_none_or(named)
    }
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let table = runtime.block_on(measure(&options))?;
    println!("{}", table.markdown());
    Ok(())
}

async fn measure(options: &Options) -> Result<Table> {
    let authority = Arc::new(Authority::new()?);
    load::backend(&authority).await?;
    let mut table = Table::default();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        let ours = Proxy::ours(&options.ours, &authority).await?;
        let part = part(&authority, ours, options, &mut table);
        part.await.context("leyline")?;
        if let Some(program) = &options.envoy {
            let envoy = Proxy::envoy(program, &authority)?;
            let part = self::part(&authority, envoy, options, &mut table);
            part.await.context("envoy")?;
        }
    }
    Ok(table)
}

/// One proxy in one round.
async fn part(
    authority: &Authority,
    proxy: Proxy,
    options: &Options,
    table: &mut Table,
) -> Result<()> {
    let client = Client::new(authority, proxy.address)?;
    client.ready().await?;
    if let Some(after) = proxy.ready_after.filter(|_| options.wants("ready")) {
        let after = after.as_secs_f64() * 1000.0;
        table.add("ready after its certificate", "ms", proxy.name, after);
    }
    if options.wants("memory") {
        settle().await;
        table.add("memory, idle", "MiB", proxy.name, mebibytes(&proxy)?);
    }
    if options.wants("requests") {
        let per_core = per_core(&client, &proxy, options, "/").await?;
        table.add(
            "requests/s per core of the proxy",
            "1/s",
            proxy.name,
            per_core,
        );
    }
    if options.wants("rate") {
        let outcome = client.at_rate("/", CONNECTIONS, RATE, options.time).await?;
        for (part, name) in [(0.5, "p50"), (0.99, "p99")] {
            let name = format!("{RATE} requests/s, {name}");
            table.add(name, "us", proxy.name, outcome.quantile(part));
        }
    }
    if options.wants("changes") {
        changes(&client, &proxy, 0, table).await?;
    }
    many(&client, &proxy, options, table).await
}

/// With many routes.
async fn many(client: &Client, proxy: &Proxy, options: &Options, table: &mut Table) -> Result<()> {
    if options.wants("memory") || options.wants("changes") {
        told(client, proxy, MANY).await?;
        settle().await;
        let name = format!("memory, {MANY} routes");
        table.add(name, "MiB", proxy.name, mebibytes(proxy)?);
    }
    if options.wants("changes") {
        changes(client, proxy, MANY, table).await?;
    }
    if options.wants("routes") {
        told(client, proxy, 1).await?;
        let few = per_core(client, proxy, options, &proxies::path(0)).await?;
        told(client, proxy, MOST).await?;
        let many = per_core(client, proxy, options, &proxies::path(MOST / 2)).await?;
        table.add(
            format!("requests/s per core, {MOST} routes"),
            "1/s",
            proxy.name,
            many,
        );
        table.add(
            format!("cost of a request, {MOST} routes to 1"),
            "x",
            proxy.name,
            few / many,
        );
    }
    Ok(())
}

/// Gives it the routes and waits until they are in force.
async fn told(client: &Client, proxy: &Proxy, count: usize) -> Result<()> {
    let version = u64::try_from(count)? + 1_000_000;
    proxy.route(count, version)?;
    seen(client, version, Duration::from_secs(30))
        .await
        .map(drop)
}

/// Waits until answers tell of a version.
async fn seen(client: &Client, version: u64, limit: Duration) -> Result<Instant> {
    let mut connection = client.connect().await?;
    let (wanted, began) = (version.to_string(), Instant::now());
    loop {
        let (_, found) = connection.ask("/").await?;
        if found.as_deref() == Some(&wanted) {
            return Ok(Instant::now());
        }
        ensure!(
            began.elapsed() < limit,
            "version {wanted} is not seen: {found:?}"
        );
    }
}

/// What it handles for each second of processor time that it takes.
#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
async fn per_core(client: &Client, proxy: &Proxy, options: &Options, path: &str) -> Result<f64> {
    let connections = usize::try_from(CONNECTIONS)?;
    client.most(path, connections, options.time / 4).await?;
    let before = proxy.process.cpu()?;
    let outcome = client.most(path, connections, options.time).await?;
    let spent = proxy.process.cpu()? - before;
    Ok(outcome.requests as f64 / spent)
}

/// How long a change of one route takes until a request is answered by it, while others go on.
async fn changes(client: &Client, proxy: &Proxy, count: usize, table: &mut Table) -> Result<()> {
    let mut connection = client.connect().await?;
    let mut taken = Vec::new();
    for version in 1..=CHANGES {
        let wanted = version.to_string();
        let began = Instant::now();
        proxy.change(count, version)?;
        while connection.ask("/").await?.1.as_deref() != Some(&wanted) {
            ensure!(
                began.elapsed() < Duration::from_secs(30),
                "a change is not seen"
            );
        }
        taken.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    taken.sort_by(f64::total_cmp);
    for (at, name) in [(taken.len() / 2, "p50"), (taken.len() - 1, "p99")] {
        let name = format!("a route changes, {count} others, {name}");
        table.add(name, "ms", proxy.name, taken[at]);
    }
    Ok(())
}

/// What it frees after start or change is handed back meanwhile: the allocator takes ten seconds.
async fn settle() {
    tokio::time::sleep(Duration::from_secs(12)).await;
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn mebibytes(proxy: &Proxy) -> Result<f64> {
    Ok(proxy.process.resident()? as f64 / f64::from(1 << 20))
}
