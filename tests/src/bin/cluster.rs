//! A Kubernetes cluster on this machine, by hand: the one that the tests start.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use rig::cluster::{
    Cluster, HUB, default_state, forward, machine,
    plan::{Families, ProxyMode, Settings},
};

const USAGE: &str = "usage: cluster [--state FOLDER] COMMAND
  up [--nodes N] [--families v4|v6|dual] [--proxy nftables|iptables]
  down
  env                      what a shell needs: eval \"$(cluster env)\"
  load ARCHIVE...          image archives, on every node
  images                   make the rig's own images anew, and load them
  on NODE COMMAND...       run in a node's namespaces (`cluster` is where the API server runs)
  stop PART | start PART   kill a part, start it again; without PART: list them
  kill-node NODE | boot-node NODE";

fn main() -> Result<ExitCode> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let state = match words.first().map(String::as_str) {
        Some("--state") if words.len() > 1 => {
            words.remove(0);
            PathBuf::from(words.remove(0))
        }
        _ => default_state()?,
    };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    run(&state, &words)?;
    Ok(ExitCode::SUCCESS)
}

fn run(state: &Path, words: &[&str]) -> Result<()> {
    match words {
        ["up", options @ ..] => {
            let cluster = Cluster::up(state, settings(options)?)?;
            print!("{}", cluster.shell_environment());
            Ok(())
        }
        ["down"] => Cluster::down(state),
        ["env"] => {
            print!("{}", Cluster::attach(state)?.shell_environment());
            Ok(())
        }
        ["load", archives @ ..] => {
            let archives: Vec<PathBuf> = archives.iter().map(PathBuf::from).collect();
            Cluster::attach(state)?.load(&archives)
        }
        ["images"] => {
            let cluster = Cluster::attach(state)?;
            cluster.load(&machine::images(cluster.programs())?)?;
            println!("{HUB}/tests:dev and the others are loaded");
            Ok(())
        }
        ["on", node, line @ ..] => on(state, node, line),
        ["stop", part] => Cluster::attach(state)?.parts().kill(part),
        ["start", part] => Cluster::attach(state)?.parts().restart(part),
        ["stop" | "start"] => list(state),
        ["kill-node", node] => Cluster::attach(state)?.kill_node(node),
        ["boot-node", node] => Cluster::attach(state)?.boot_node(node),
        // For the rig itself.
        ["forward", netns, to, port] => forward::run(Path::new(netns), to, Path::new(port)),
        ["keep"] => keep(state),
        _ => bail!("{USAGE}"),
    }
}

fn settings(mut options: &[&str]) -> Result<Settings> {
    let mut settings = Settings::default();
    while let [name, value, rest @ ..] = options {
        match (*name, *value) {
            ("--nodes", count) => settings.nodes = count.parse().context("--nodes")?,
            ("--families", "v4") => settings.families = Families::V4,
            ("--families", "v6") => settings.families = Families::V6,
            ("--families", "dual") => settings.families = Families::Dual,
            ("--proxy", "nftables") => settings.proxy = ProxyMode::Nftables,
            ("--proxy", "iptables") => settings.proxy = ProxyMode::Iptables,
            _ => bail!("{name} {value}\n{USAGE}"),
        }
        options = rest;
    }
    if !options.is_empty() || !(1..=50).contains(&settings.nodes) {
        bail!("{USAGE}");
    }
    Ok(settings)
}

fn on(state: &Path, node: &str, line: &[&str]) -> Result<()> {
    let cluster = Cluster::attach(state)?;
    let output = cluster.run_on(node, line)?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{line:?}: {}", output.status);
    }
    Ok(())
}

fn list(state: &Path) -> Result<()> {
    let cluster = Cluster::attach(state)?;
    for name in cluster.parts().names() {
        let runs = cluster.parts().runs(&name);
        println!("{name:24}{}", if runs { "runs" } else { "stopped" });
    }
    Ok(())
}

/// Takes the cluster down when its input ends: whoever started it has ended, in whatever way.
fn keep(state: &Path) -> Result<()> {
    io::stdin().read_to_end(&mut Vec::new())?;
    Cluster::down(state)
}
