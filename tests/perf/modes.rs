//! The ways a connection can go, and what is measured on each.

use std::{env, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use rig::{
    Mesh, NODES, Options, Running,
    process::{Process, in_network_of, of_role, tunnels},
    yaml::{idle_pod, pod, service},
};

use crate::figures::{OURS, PEER, PLAIN, Table};

/// A mesh, and the pair of pods in it that talk one way.
pub(crate) struct Mode<'a> {
    pub(crate) name: &'static str,
    pub(crate) lab: &'a Lab,
    client: &'static str,
    server: &'static str,
}

/// The pods that are not in the mesh.
const OUTSIDE: [&str; 3] = ["outside/client", "outside/near", "outside/plain"];

/// A running mesh with the load programs in its pods.
pub(crate) struct Lab {
    pub(crate) mesh: Mesh,
    pub(crate) load: String,
}

/// Ours, and the peer's where there is one.
pub(crate) struct Modes {
    ours: Lab,
    peer: Option<Lab>,
}

impl Modes {
    /// Starts them; pods use the congestion control of this name.
    pub(crate) fn start(congestion_control: &str) -> Result<Self> {
        // The program that a cluster's nodes run, and not `leyline`, which holds every part.
        let named = env::var_os("OWN_ZTUNNEL").map(PathBuf::from);
        let ours = named.map_or_else(|| beside("ztunnel").map(PathBuf::from), Ok)?;
        let ours = Lab::start(&with_tunnels(ours), congestion_control).context("our mesh")?;
        let peer = env::var_os("PEER_ZTUNNEL").map(PathBuf::from);
        let peer = peer.map(|path| {
            Lab::start(&with_tunnels(path), congestion_control).context("the peer's mesh")
        });
        let peer = peer.transpose()?;
        Ok(Self { ours, peer })
    }

    pub(crate) fn ours(&self) -> &Lab {
        &self.ours
    }

    /// Plain TCP in our mesh's namespaces, ours, the peer's, each through two nodes.
    pub(crate) fn all(&self) -> Vec<Mode<'_>> {
        self.from("outside/client", "shop/client")
    }

    /// The same, from clients on the servers' node.
    pub(crate) fn near(&self) -> Vec<Mode<'_>> {
        self.from("outside/near", "shop/near")
    }

    fn from(&self, outside: &'static str, inside: &'static str) -> Vec<Mode<'_>> {
        let mode = |name, lab, client, server| Mode {
            name,
            lab,
            client,
            server,
        };
        let mut all = vec![
            mode(PLAIN, &self.ours, outside, "plain.outside:9000"),
            mode(OURS, &self.ours, inside, "server.shop:9000"),
        ];
        all.extend(
            self.peer
                .as_ref()
                .map(|lab| mode(PEER, lab, inside, "server.shop:9000")),
        );
        all
    }
}

impl Lab {
    fn start(options: &Options, congestion_control: &str) -> Result<Self> {
        let mut mesh = Mesh::new()?;
        let load = mesh.install(&beside("load")?)?;
        let serve = format!("[{load}, serve, '[::]:9001']");
        let namespace = |name, labels| {
            format!(
                "---\napiVersion: v1\nkind: Namespace\nmetadata: {{ name: {name}, labels: {labels} }}\n"
            )
        };
        let yaml = [
            namespace("shop", "{ istio.io/dataplane-mode: ambient }"),
            namespace("outside", "{}"),
            idle_pod("shop", "client", "node1"),
            idle_pod("shop", "near", "node2"),
            pod("shop", "server", "node2", &serve),
            service("shop", "server"),
            idle_pod("outside", "client", "node1"),
            idle_pod("outside", "near", "node2"),
            pod("outside", "plain", "node2", &serve),
            service("outside", "plain"),
        ];
        mesh.write("objects.yaml", &yaml.concat())?;
        mesh.up(options)?;
        let lab = Self { mesh, load };
        let inside = ["shop/client", "shop/near", "shop/server"];
        for pod in inside.iter().chain(&OUTSIDE) {
            lab.use_congestion_control(pod, congestion_control)?;
        }
        for pod in inside {
            lab.mesh.eventually(&format!("{pod} is in the mesh"), || {
                ensure!(lab.mesh.pod(pod)?["mesh"] == "yes", "not yet");
                Ok(())
            });
        }
        Ok(lab)
    }

    /// Of sockets that are made in the pod from now on, by whichever process.
    fn use_congestion_control(&self, pod: &str, name: &str) -> Result<()> {
        let write = format!("echo {name} > /proc/sys/net/ipv4/tcp_congestion_control");
        in_network_of(&self.mesh, pod, &["sh", "-c", &write])
            .with_context(|| format!("{pod}: congestion control {name}"))
    }

    pub(crate) fn tunnels(&self) -> Result<Vec<(String, Process)>> {
        tunnels(self.mesh.supervisor()?)
    }

    pub(crate) fn resident(&self) -> Result<f64> {
        let sizes = self
            .tunnels()?
            .into_iter()
            .map(|(_, process)| process.resident());
        Ok(sizes.sum::<Result<u64>>()? as f64)
    }

    pub(crate) fn cpu(&self) -> Result<f64> {
        self.tunnels()?
            .into_iter()
            .map(|(_, process)| process.cpu())
            .sum()
    }

    /// Processor time of the tunnels and of the control plane that tells them what they know.
    pub(crate) fn told(&self) -> Result<f64> {
        let control = of_role(self.mesh.supervisor()?, "controlplane")?;
        let control = control.into_iter().map(Process::cpu);
        Ok(self.cpu()? + control.sum::<Result<f64>>()?)
    }
}

fn with_tunnels(program: PathBuf) -> Options {
    let ztunnel = NODES.map(|node| (node.to_owned(), program.clone()));
    Options {
        ztunnel: ztunnel.to_vec(),
        ..Options::default()
    }
}

/// A program that was built with this one.
fn beside(name: &str) -> Result<String> {
    let path = env::current_exe()?.with_file_name(name);
    ensure!(path.exists(), "{} is missing: make perf", path.display());
    Ok(path.display().to_string())
}

impl Mode<'_> {
    fn run(&self, command: &str, flags: &[&str]) -> Result<serde_json::Value> {
        let line = [&[self.lab.load.as_str(), command, self.server], flags].concat();
        self.lab
            .mesh
            .json(self.client, &line)
            .with_context(|| format!("{command} {flags:?}, {}", self.name))
    }

    fn number(&self, command: &str, flags: &[&str], field: &str) -> Result<f64> {
        self.run(command, flags)?[field]
            .as_f64()
            .with_context(|| format!("{command} says no {field}"))
    }
}

/// One round of everything that is measured in turn.
pub(crate) fn round(mode: Mode<'_>, table: &mut Table, wants: impl Fn(&str) -> bool) -> Result<()> {
    if wants("latency") {
        latency(&mode, table)?;
    }
    if wants("sizes") {
        sizes(&mode, table)?;
    }
    if wants("throughput") {
        throughput(&mode, table)?;
    }
    if wants("connections") {
        connections(&mode, table)?;
    }
    Ok(())
}

/// As many requests as go, for a second at least.
const FULL: [&str; 4] = ["--count", "120000", "--connections", "16"];

fn latency(mode: &Mode<'_>, table: &mut Table) -> Result<()> {
    let one = mode.run("ping", &["--count", "3000"])?;
    let steady = mode.run(
        "ping",
        &["--count", "3000", "--connections", "16", "--rate", "1000"],
    )?;
    let full = mode.run("ping", &FULL)?;
    for (field, name) in [("p50_us", "p50"), ("p99_us", "p99")] {
        let value = |from: &serde_json::Value| from[field].as_f64().context("a latency");
        table.add(
            format!("ping-pong of 64 B, {name}"),
            "µs",
            mode.name,
            value(&one)?,
        );
        table.add(
            format!("1,000 requests/s over 16 connections, {name}"),
            "µs",
            mode.name,
            value(&steady)?,
        );
    }
    let most = full["per_second"].as_f64().context("a rate")?;
    table.add("most requests/s, 16 connections", "1/s", mode.name, most);
    Ok(())
}

/// Client and server on one node.
pub(crate) fn same_node(mode: &Mode<'_>, table: &mut Table) -> Result<()> {
    // The first connection goes another way than those that are measured.
    mode.run("ping", &["--count", "100"])?;
    let one = mode.number(
        "stream",
        &["--flows", "1", "--seconds", "4"],
        "bytes_per_second",
    )?;
    let most = mode.number("ping", &FULL, "per_second")?;
    let mut add = |name, unit, value| table.add(name, unit, mode.name, value);
    add("same node: throughput, 1 flow", "MB/s", one / 1e6);
    add("same node: most requests/s, 16 connections", "1/s", most);
    Ok(())
}

fn sizes(mode: &Mode<'_>, table: &mut Table) -> Result<()> {
    for size in [
        "1", "100", "1000", "1400", "4000", "16000", "64000", "256000", "1000000",
    ] {
        let p99 = mode.number("ping", &["--size", size, "--count", "100"], "p99_us")?;
        table.add(
            format!("ping-pong by size, p99: {size:>7} B"),
            "µs",
            mode.name,
            p99,
        );
    }
    Ok(())
}

fn throughput(mode: &Mode<'_>, table: &mut Table) -> Result<()> {
    for flows in ["1", "4", "16"] {
        let before = mode.lab.cpu()?;
        let run = mode.run("stream", &["--flows", flows, "--seconds", "4"])?;
        let rate = run["bytes_per_second"].as_f64().context("a rate")?;
        table.add(
            format!("throughput, {flows:>2} flows"),
            "MB/s",
            mode.name,
            rate / 1e6,
        );
        let bytes = run["bytes"].as_f64().context("a count")?;
        if mode.name != PLAIN {
            let spent = mode.lab.cpu()? - before;
            table.add(
                format!("tunnels' CPU per GB, {flows:>2} flows"),
                "s",
                mode.name,
                spent / (bytes / 1e9),
            );
        }
    }
    Ok(())
}

fn connections(mode: &Mode<'_>, table: &mut Table) -> Result<()> {
    let before = mode.lab.cpu()?;
    let run = mode.run(
        "connect",
        &["--seconds", "4", "--parallel", "16", "--server-ends"],
    )?;
    ensure!(run["failed"] == 0, "{}: {run}", mode.name);
    table.add(
        "new connections/s",
        "1/s",
        mode.name,
        run["per_second"].as_f64().context("a rate")?,
    );
    if mode.name != PLAIN {
        let spent = mode.lab.cpu()? - before;
        let thousands = run["connections"].as_f64().context("a count")? / 1000.0;
        table.add(
            "tunnels' CPU per 1,000 new connections",
            "s",
            mode.name,
            spent / thousands,
        );
    }
    Ok(())
}

/// Resident memory of a fresh tunnel, with connections that do nothing, and after they are gone.
pub(crate) fn memory(mode: Mode<'_>, table: &mut Table) -> Result<()> {
    const HELD: u32 = 4000;
    if mode.name == PLAIN {
        return Ok(());
    }
    for node in NODES {
        // A tunnel that has served no load yet.
        mode.lab.mesh.kill(&format!("ztunnel-{node}"))?;
    }
    mode.lab.mesh.eventually("the tunnels are back", || {
        mode.run("ping", &["--count", "10"])
    });
    let idle = settled(mode.lab)?;
    table.add(
        "resident memory of both tunnels, idle",
        "MiB",
        mode.name,
        idle / f64::from(1 << 20),
    );
    let hold = [
        mode.lab.load.as_str(),
        "hold",
        mode.server,
        "--connections",
        &HELD.to_string(),
    ];
    let mut hold: Running = mode.lab.mesh.spawn(mode.client, &hold)?;
    hold.json()?;
    let busy = settled(mode.lab)?;
    let each = (busy - idle) / f64::from(HELD) / 1024.0;
    table.add(
        "resident memory per idle connection, both ends",
        "KiB",
        mode.name,
        each,
    );
    hold.finish()?;
    let after = settled(mode.lab)?;
    table.add(
        "resident memory of both tunnels, connections closed",
        "MiB",
        mode.name,
        after / f64::from(1 << 20),
    );
    Ok(())
}

/// Resident memory once it no longer changes by more than a percent in two seconds, or after 30 s.
pub(crate) fn settled(lab: &Lab) -> Result<f64> {
    let mut before = lab.resident()?;
    for _ in 0..15 {
        thread::sleep(Duration::from_secs(2));
        let now = lab.resident()?;
        if (now - before).abs() < before / 100.0 {
            return Ok(now);
        }
        before = now;
    }
    Ok(before)
}
