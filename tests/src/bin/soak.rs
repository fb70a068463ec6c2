//! `make soak`: churn in an embedded mesh for an hour, and what every part holds all the while. Routes, services, policies
//! and pods come and go; clients connect, idle in thousands, send, break off and go away; parts are killed. Memory that
//! grows after the first third fails the run, and so do files that are not given back.

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rig::{
    Mesh, Options, process, until,
    yaml::{idle_pod, pod, service_of},
};

const USAGE: &str = "usage: soak [--minutes N] [--connections N] [--kill | --waypoint]
  --minutes      how long (60)
  --connections  how many are opened, left idle and closed in each round (10000)
  --kill         agents and tunnels are killed meanwhile; memory is then not judged
  --waypoint     only what passes the waypoint, while its routes and policies change: requests of every kind, bytes, and
                 clients and servers that break off";

/// The parts that are watched.
const ROLES: [&str; 4] = ["waypoint", "ztunnel", "controlplane", "cni-agent"];

/// Clients that hold connections, each with a server of its own: a tunnel gives no pod more than half of the connections that it
/// has files for, and limits of 20,000 files are common.
const PAIRS: u32 = 3;
/// Rounds after which each of them has had its turn with the short ones, and pools are as large as they get.
const TURNS: usize = PAIRS as usize;

/// A round takes no less: the port of a client's connection that is closed rests for a minute, and there are 28,000 of them.
const ROUND: Duration = Duration::from_secs(20);

/// What a part may grow by after the first third: a tenth of what it had by then, and at least so many bytes.
const GROWTH: u64 = 10;
const LEAST: u64 = 2 << 20;
/// Files that a part may have open at the end beyond what it had after the first rounds: pooled connections and the like.
const FILES: usize = 16;
/// How long a part may take to give files back.
const SETTLE: Duration = Duration::from_secs(90);

struct Plan {
    time: Duration,
    connections: u32,
    kill: bool,
    waypoint: bool,
}

impl Plan {
    fn parse(words: &[String]) -> Result<Self> {
        let mut plan = Self {
            time: Duration::from_secs(3600),
            connections: 10_000,
            kill: false,
            waypoint: false,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut number = || -> Result<u32> {
                let value = words.next().with_context(|| USAGE.to_owned())?;
                value.parse().context(USAGE)
            };
            match word.as_str() {
                "--minutes" => plan.time = Duration::from_secs(60) * number()?,
                "--connections" => plan.connections = number()?,
                "--kill" => plan.kill = true,
                "--waypoint" => plan.waypoint = true,
                _ => bail!("{USAGE}"),
            }
        }
        Ok(plan)
    }
}

fn main() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let plan = Plan::parse(&words)?;
    let soak = Soak::start()?;
    if !plan.kill {
        soak.ping_pong()?;
    }
    let samples = soak.run(&plan)?;
    let flat = plan.kill || memory_is_flat(&samples);
    let returned = soak.files_are_returned(samples.get(TURNS - 1).context("no round")?);
    if let Err(error) = &returned {
        println!("{error:#}");
    }
    soak.mesh.down()?;
    Ok(match flat && returned.is_ok() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

struct Soak {
    mesh: Mesh,
    web: String,
    load: String,
}

/// What each role's processes hold together at one time.
#[derive(Clone, Copy, Default)]
struct Held {
    /// Resident memory.
    bytes: u64,
    /// Open files.
    files: usize,
}

type Sample = [Held; ROLES.len()];

impl Soak {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::new()?;
        let own = std::env::current_exe()?;
        let folder = own.parent().context("a program has a folder")?;
        let install = |name: &str| {
            let program = folder.join(name);
            ensure!(program.is_file(), "cargo build -p leyline-tests --bins");
            mesh.install(&program.display().to_string())
        };
        let (web, load) = (install("web")?, install("load")?);
        mesh.write("objects.yaml", &objects(&web, &load))?;
        mesh.up(&Options::default())?;
        let soak = Self { mesh, web, load };
        soak.answers();
        Ok(soak)
    }

    /// Waits until requests pass the waypoint and connections the tunnels.
    fn answers(&self) {
        self.mesh.eventually("requests are answered", || {
            let found = self.get("http://v1.shop/", &[])?;
            rig::holds(&found, "\"200\":")
        });
        self.mesh.eventually("connections are answered", || {
            let ping = [&self.load, "ping", "raw-1.bare:9000", "--count", "3"];
            self.mesh.succeed("bare/caller-1", &ping)
        });
    }

    /// One round at the waypoint alone: five other states of its routes and policies under a steady load that must not
    /// lose a request, and meanwhile every kind of client and of server that breaks off.
    fn churn_waypoint(&self, round: u32, connections: u32) -> Result<()> {
        let steady = ["--until-input-ends", "--rate", "50", "--parallel", "8"];
        let line = [&[self.web.as_str(), "get", "http://v1.shop/"], &steady[..]].concat();
        let steady = self.mesh.spawn("shop/client", &line)?;
        for step in 0..5 {
            let round = round * 5 + step;
            self.mesh
                .write("churn.yaml", &(churn(round) + &policies(round)))?;
            self.requests(round)?;
            self.breaks()?;
        }
        self.bytes(connections)?;
        let told = steady.finish()?;
        let found: serde_json::Value = serde_json::from_str(told.trim())?;
        ensure!(found["failed"] == 0, "the steady load: {found}");
        Ok(())
    }

    /// Clients that go away in the middle, and servers that do at each stage: what they are answered is not judged here.
    fn breaks(&self) -> Result<()> {
        for flags in [
            &["--abort-after", "300000"][..],
            &["--abort-after", "1", "--h2"],
        ] {
            let count = ["--count", "20", "--parallel", "4"];
            self.get("http://v1.shop/stream/10000", &[flags, &count].concat())?;
        }
        for stage in STAGES {
            let url = format!("http://breaks-{stage}.shop/");
            let line = [&self.web, "get", &url, "--count", "10"];
            self.mesh.exec("shop/client", &line)?;
        }
        let wrong = [
            &self.web,
            "raw",
            "v1.shop:80",
            "GET / HTTP/1.1\\r\\nHost: a\\r\\nHost: b\\r\\n\\r\\n",
        ];
        self.mesh.exec("shop/client", &wrong).map(drop)
    }

    /// Connections of bytes through the waypoint: short ones, and some that are held and closed together.
    fn bytes(&self, count: u32) -> Result<()> {
        let count = count.min(500).to_string();
        let hold = [&self.load, "hold", "raw.shop:9000", "--connections", &count];
        let mut held = self.mesh.spawn("shop/client", &hold)?;
        held.json()?;
        held.finish()?;
        let short = [&self.load, "connect", "raw.shop:9000", "--seconds", "2"];
        self.mesh.succeed("shop/client", &short).map(drop)
    }

    fn get(&self, url: &str, flags: &[&str]) -> Result<String> {
        let line = [&[self.web.as_str(), "get", url], flags].concat();
        self.mesh.succeed("shop/client", &line)
    }

    /// Churns until the time is over; a sample after each round.
    fn run(&self, plan: &Plan) -> Result<Vec<Sample>> {
        let began = Instant::now();
        let mut samples = Vec::new();
        let mut round = 0;
        while began.elapsed() < plan.time || samples.len() < TURNS {
            let round_began = Instant::now();
            let churned = match plan.waypoint {
                true => self.churn_waypoint(round, plan.connections),
                false => self.churn(round, plan),
            };
            churned
                .with_context(|| self.mesh.evidence())
                .with_context(|| format!("round {round}"))?;
            round += 1;
            let sample = self.sample()?;
            println!(
                "{:6.0} s  {}",
                began.elapsed().as_secs_f64(),
                shown(&sample)
            );
            samples.push(sample);
            thread::sleep(ROUND.saturating_sub(round_began.elapsed()));
        }
        println!("{round} rounds");
        Ok(samples)
    }

    /// One round: other routes, services, policies and members, and every kind of client.
    fn churn(&self, round: u32, plan: &Plan) -> Result<()> {
        self.mesh.write("churn.yaml", &churn(round))?;
        self.requests(round)?;
        self.connections(round, plan.connections)?;
        let mode = match round % 2 {
            0 => "istio.io/dataplane-mode=ambient",
            _ => "istio.io/dataplane-mode-",
        };
        self.mesh.label("outside", mode)?;
        if plan.kill {
            const PARTS: [&str; 4] = [
                "ztunnel-node1",
                "cni-agent-node1",
                "ztunnel-node2",
                "cni-agent-node2",
            ];
            let next = usize::try_from(round).unwrap_or_default() % PARTS.len();
            self.mesh.kill(PARTS[next])?;
            self.answers();
        }
        Ok(())
    }

    fn requests(&self, round: u32) -> Result<()> {
        let count = ["--count", "200", "--parallel", "8"];
        self.get("http://v1.shop/", &count)?;
        self.get("http://v1.shop/", &[&count[..], &["--h2"]].concat())?;
        let post = ["--method", "POST", "--body", "200000", "--count", "20"];
        self.get("http://v1.shop/", &post)?;
        let abort = ["--abort-after", "200000", "--count", "20"];
        self.get("http://v1.shop/stream/10000", &abort)?;
        // A service that is not there any more, or not yet: whatever the answer is.
        let gone = format!("http://churn-{}.shop/", round % 7);
        let _ = self.get(&gone, &["--count", "5"]);
        let upgrade = [self.web.as_str(), "upgrade", "v1.shop:80"];
        self.mesh.succeed("shop/client", &upgrade).map(drop)
    }

    /// Opened one after the other and held idle all together; and short ones as fast as they go.
    fn connections(&self, round: u32, count: u32) -> Result<()> {
        let each = count.div_ceil(PAIRS).to_string();
        let mut all = Vec::new();
        for number in 1..=PAIRS {
            let server = format!("raw-{number}.bare:9000");
            let hold = [&self.load, "hold", &server, "--connections", &each];
            let mut held = self.mesh.spawn(&format!("bare/caller-{number}"), &hold)?;
            held.json()?;
            all.push(held);
        }
        for held in all {
            held.finish()?;
        }
        let caller = format!("bare/caller-{}", round % PAIRS + 1);
        let short = [&self.load, "connect", "raw-1.bare:9000", "--seconds", "3"];
        self.mesh.succeed(&caller, &short)?;
        let refused = [&self.load, "ping", "raw-1.bare:9999", "--count", "1"];
        ensure!(!self.mesh.exec("bare/caller-1", &refused)?.status.success());
        Ok(())
    }

    /// A minute of messages of one byte, as fast as they go, over a thousand connections at once: what looks like a flood of
    /// small frames to whoever counts them, and is none.
    fn ping_pong(&self) -> Result<()> {
        let words = [
            "live",
            "raw-1.bare:9000",
            "--connections",
            "1000",
            "--beat",
            "0",
            "--seconds",
            "60",
        ];
        let line = [&[self.load.as_str()], &words[..]].concat();
        let told = self.mesh.succeed("bare/caller-1", &line)?;
        let last = told.lines().last().unwrap_or_default();
        println!("a minute of ping-pong: {last}");
        rig::holds(last, "\"cut\":0,")
    }

    fn sample(&self) -> Result<Sample> {
        let supervisor = self.mesh.supervisor()?;
        let mut sample = Sample::default();
        for (role, held) in ROLES.iter().zip(&mut sample) {
            let found = process::of_role(supervisor, role)?;
            ensure!(!found.is_empty(), "no {role} runs");
            for process in found {
                held.bytes += process.resident()?;
                held.files += process.files()?;
            }
        }
        Ok(sample)
    }

    /// An error unless each part soon has about as many files open as after the first rounds.
    fn files_are_returned(&self, first: &Sample) -> Result<()> {
        let last = until(SETTLE, || {
            let now = self.sample()?;
            let each = ROLES.iter().zip(first).zip(&now);
            for ((role, first), now) in each {
                let most = first.files + FILES;
                ensure!(
                    now.files <= most,
                    "{role}: {} files, {most} at most",
                    now.files
                );
            }
            Ok(now)
        })?;
        for ((role, first), last) in ROLES.iter().zip(first).zip(&last) {
            println!(
                "{role}: {} files after the first rounds, {} at the end",
                first.files, last.files
            );
        }
        Ok(())
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn shown(sample: &Sample) -> String {
    let each = ROLES.iter().zip(sample).map(|(role, held)| {
        format!(
            "{role} {:.1} MiB, {} files",
            mebibytes(held.bytes),
            held.files
        )
    });
    each.collect::<Vec<_>>().join("; ")
}

/// Whether no part has grown: what it held in the middle of the last third's samples, against the first third's. A leak moves the
/// middle; a sample that fell into a burst does not.
fn memory_is_flat(samples: &[Sample]) -> bool {
    let third = samples.len().div_ceil(3);
    let (early, late) = (&samples[..third], &samples[samples.len() - third..]);
    let mut flat = true;
    for (at, role) in ROLES.iter().enumerate() {
        let (before, after) = (median(early, at), median(late, at));
        let good = after <= before + (before / GROWTH).max(LEAST);
        flat &= good;
        println!(
            "{role}: {:.1} MiB in the first third, {:.1} MiB in the last: {}",
            mebibytes(before),
            mebibytes(after),
            if good { "flat" } else { "GROWS" }
        );
    }
    flat
}

fn median(of: &[Sample], role: usize) -> u64 {
    let mut all: Vec<u64> = of.iter().map(|sample| sample[role].bytes).collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied().unwrap_or(0)
}

fn objects(web: &str, load: &str) -> String {
    let serve = |name: &str| format!("[{web}, serve, '[::]:8080', {name}]");
    let namespace = |name: &str, labels: &str| {
        format!(
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{ name: {name}, labels: {{ {labels} }} }}\n"
        )
    };
    [
        namespace(
            "shop",
            "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint",
        ),
        namespace("bare", "istio.io/dataplane-mode: ambient"),
        namespace("outside", ""),
        idle_pod("shop", "client", "node1"),
        pod("shop", "v1", "node2", &serve("v1")),
        pod("shop", "v2", "node2", &serve("v2")),
        service("v1", "v1"),
        service("v2", "v2"),
        STAGES.map(|stage| breaking(web, stage)).concat(),
        pod(
            "shop",
            "raw",
            "node2",
            &format!("[{load}, serve, '[::]:9001']"),
        ),
        rig::yaml::service("shop", "raw"),
        (1..=PAIRS).map(|number| pair(load, number)).collect(),
        idle_pod("outside", "comes-and-goes", "node1"),
        idle_pod("outside", "so-does-this", "node2"),
        "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: waypoint, namespace: shop }
spec:
  gatewayClassName: leyline-waypoint
  listeners: [{ name: mesh, port: 15008, protocol: HBONE }]
"
        .to_owned(),
    ]
    .concat()
}

/// Where servers break off.
const STAGES: [&str; 4] = ["accept", "request", "head", "body"];

fn breaking(web: &str, stage: &str) -> String {
    let (name, serve) = (
        format!("breaks-{stage}"),
        format!("[{web}, reset, '[::]:8080', {stage}]"),
    );
    pod("shop", &name, "node2", &serve) + &service(&name, &name)
}

/// How the steady service is reached, who may, and what is told, other ones each round. None of it changes an answer.
fn policies(round: u32) -> String {
    format!(
        "---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: v1, namespace: shop }}
spec:
  host: v1
  trafficPolicy:
    loadBalancer: {{ simple: {} }}
    connectionPool: {{ http: {{ maxRequestsPerConnection: {}, idleTimeout: {}s }} }}
    outlierDetection: {{ consecutive5xxErrors: {} }}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: no-{}, namespace: shop }}
spec:
  targetRefs: [{{ group: '', kind: Service, name: v1 }}]
  action: DENY
  rules: [{{ to: [{{ operation: {{ paths: ['/never/{round}/*'] }} }}] }}]
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{ name: all, namespace: shop }}
spec:
  metrics: [{{ overrides: [{{ tagOverrides: {{ round: {{ value: \"'{}'\" }} }} }}] }}]
",
        ["ROUND_ROBIN", "RANDOM", "LEAST_REQUEST"][usize::try_from(round % 3).unwrap_or_default()],
        10 + round % 50,
        1 + round % 9,
        5 + round % 5,
        round % 3,
        round % 4,
    )
}

/// A client and its server.
fn pair(load: &str, number: u32) -> String {
    let (caller, raw) = (format!("caller-{number}"), format!("raw-{number}"));
    let serve = format!("[{load}, serve, '[::]:9001']");
    [
        idle_pod("bare", &caller, "node1"),
        pod("bare", &raw, "node2", &serve),
        rig::yaml::service("bare", &raw),
    ]
    .concat()
}

fn service(name: &str, app: &str) -> String {
    let port = "name: http, port: 80, targetPort: 8080, appProtocol: http";
    service_of("shop", name, app, port)
}

/// Services that come and go, each with a route; other weights for the one that stays; and a policy of another name.
fn churn(round: u32) -> String {
    let mut text = route("v1", round % 100);
    for number in 0..5 {
        let name = format!("churn-{}", (round + number) % 7);
        text += &service(&name, "v2");
        text += &route(&name, number);
    }
    text + &format!(
        "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: nobody-{}, namespace: bare }}
spec:
  action: DENY
  rules: [{{ from: [{{ source: {{ principals: [cluster.local/ns/bare/sa/nobody-{round}] }} }}] }}]
",
        round % 5
    )
}

fn route(service: &str, weight: u32) -> String {
    format!(
        "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: {service}, namespace: shop }}
spec:
  parentRefs: [{{ group: '', kind: Service, name: {service} }}]
  rules: [{{ backendRefs: [{{ name: v1, port: 80, weight: {weight} }}, {{ name: v2, port: 80, weight: {} }}] }}]
",
        100 - weight
    )
}
