//! Tunnels replaced under load, at either node, with a successor that has a network namespace of its own as a new pod of a
//! DaemonSet has: the old one tells its peers to go (GOAWAY) and finishes what it holds, and nothing that is new fails.
//! With `PEER_ZTUNNEL` also between ours and upstream's, and from one to the other.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rig::{Options, Running, leyline, program};
use serde_json::Value;

use crate::{
    interop,
    scene::{SERVICE, Scene, Shop},
};

/// What a node runs first and then.
type Succession = [Option<PathBuf>; 2];

/// Starts the first, and once `go` is there the next one beside it in a namespace behind the node's; when that is ready,
/// the first is told to end. `done` then says so, and `gone` that it has ended.
const SCRIPT: &str = r#"#!/bin/bash
export CONNECTION_TERMINATION_DEADLINE=60s
at=$(dirname "$0")/$NODE_NAME
FIRST & first=$!
until [ -e $at-go ]; do sleep 0.1; done
unshare -n bash -c 'until ip link set way1 up 2>/dev/null; do sleep 0.05; done
ip link set lo up && ip addr add 169.254.77.2/30 dev way1 && ip route add default via 169.254.77.1 && exec NEXT' & next=$!
ip link add way0 type veth peer name way1 && ip addr add 169.254.77.1/30 dev way0 && ip link set way0 up
nft 'table ip way { chain out { type nat hook postrouting priority 100; ip saddr 169.254.77.2 masquerade; }; }'
echo 1 >/proc/sys/net/ipv4/ip_forward
# The child may not have left our namespace yet, where the link is already.
until [ "$(readlink /proc/$next/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set way1 netns $next
ready() { nsenter -n -t $next bash -c 'exec 3<>/dev/tcp/127.0.0.1/15021 && printf "GET /healthz/ready HTTP/1.0\r\n\r\n" >&3 && head -n 1 <&3 | grep -q " 200 "' 2>/dev/null; }
until ready; do sleep 0.1; done
kill -TERM $first
touch $at-done
wait $first
touch $at-gone
wait $next
"#;

fn command(of: Option<&Path>) -> String {
    match of {
        None => format!("{} ztunnel", leyline().display()),
        Some(path) => format!("{} proxy ztunnel", path.display()),
    }
}

fn script(folder: &Path, node: &str, [first, next]: &Succession) -> Result<(String, PathBuf)> {
    let path = folder.join(format!("ztunnel-{node}"));
    let text = SCRIPT
        .replace("FIRST", &command(first.as_deref()))
        .replace("NEXT", &command(next.as_deref()));
    program::script(&text, &path)?;
    Ok((node.to_owned(), path))
}

struct Bed {
    scene: Scene,
    folder: tempfile::TempDir,
}

impl Bed {
    fn start(client: &Succession, server: &Succession) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let scripts = [
            script(folder.path(), "node1", client)?,
            script(folder.path(), "node2", server)?,
        ];
        let options = Options {
            ztunnel: scripts.into(),
            ..Options::default()
        };
        let scene = Scene::start_with(Shop::InMesh, "", &options)?;
        Ok(Self { scene, folder })
    }

    fn step(&self, node: &str, step: &str) -> PathBuf {
        self.folder.path().join(format!("{node}-{step}"))
    }

    /// Replaces the tunnel of a node. The old one has been told to end, and holds what it held.
    fn replace(&self, node: &str) -> Result<()> {
        fs::write(self.step(node, "go"), "")?;
        self.wait(node, "done");
        Ok(())
    }

    fn wait(&self, node: &str, step: &str) {
        let there = || {
            ensure!(self.step(node, step).exists(), "not yet");
            Ok(())
        };
        self.scene
            .mesh
            .eventually(&format!("{node}: {step}"), there);
    }

    fn spawn(&self, words: &[&str]) -> Result<Running> {
        let line = [&[self.scene.load.as_str()], words].concat();
        self.scene.mesh.spawn("shop/client", &line)
    }
}

/// Replaces the tunnel of `node` while connections are held and others are made, of which at most `lost` may fail.
fn replaced_under_load(bed: &Bed, node: &str, lost: u64) -> Result<()> {
    let mut held = bed.spawn(&["live", SERVICE, "--connections", "20"])?;
    held.json()?;
    let new = [
        "connect",
        SERVICE,
        "--seconds",
        "0",
        "--parallel",
        "4",
        "--rate",
        "40",
    ];
    let made = bed.spawn(&new)?;
    bed.replace(node)?;
    // Those that are made from now on are the next one's.
    for _ in 0..5 {
        bed.scene.ping("shop/client", SERVICE)?;
    }
    ensure!(held.is_running()?, "{node}: what was held has been cut");
    let made: Value = serde_json::from_str(&made.finish()?)?;
    let few = made["failed"].as_u64().is_some_and(|failed| failed <= lost);
    ensure!(
        few && made["connections"] != 0,
        "{node}: {made}\n{}",
        bed.scene.mesh.evidence()
    );
    let held: Value = serde_json::from_str(&held.finish()?)?;
    ensure!(held["cut"] == 0, "{node}: {held}");
    // With nothing left to hold it ends, long before its deadline.
    bed.wait(node, "gone");
    let after = bed.scene.ping("shop/client", SERVICE);
    after.with_context(|| format!("{node}: once the first is gone"))?;
    Ok(())
}

/// What may be lost: one connection of each of the four that connect.
const FEW: u64 = 4;

/// Where upstream's follows upstream's, what waits in the first one's accept queue when it closes is lost. Ours takes everything
/// new to itself when it joins, and turns it away before it goes.
fn lost([first, next]: &Succession) -> u64 {
    if first.is_some() && next.is_some() {
        FEW
    } else {
        0
    }
}

/// As [`lost`], of the server's tunnel. Upstream's client's fails a connection for which it has just chosen a tunnel that the
/// server says goodbye to ("h2 failed: connection error received: not a result of an error"); ours takes another one.
fn lost_at_server(client: &Succession, server: &Succession) -> u64 {
    match client[0] {
        Some(_) => FEW,
        None => lost(server),
    }
}

fn both_ends(client: Succession, server: Succession) -> Result<()> {
    let bed = Bed::start(&client, &server)?;
    replaced_under_load(&bed, "node2", lost_at_server(&client, &server))?;
    replaced_under_load(&bed, "node1", lost(&client))
}

#[test]
fn a_tunnel_is_replaced_at_either_end_and_no_connection_fails() -> Result<()> {
    both_ends([None, None], [None, None])
}

#[test]
fn our_clients_tunnel_and_the_peers_servers_are_replaced() -> Result<()> {
    interop::with_peer(|peer| both_ends([None, None], [Some(peer.clone()), Some(peer)]))
}

#[test]
fn the_peers_clients_tunnel_and_our_servers_are_replaced() -> Result<()> {
    interop::with_peer(|peer| both_ends([Some(peer.clone()), Some(peer)], [None, None]))
}

#[test]
fn our_tunnel_takes_over_from_the_peers_and_the_peers_from_ours() -> Result<()> {
    interop::with_peer(|peer| both_ends([Some(peer.clone()), None], [None, Some(peer)]))
}
