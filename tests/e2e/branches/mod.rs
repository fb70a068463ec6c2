//! Every branch of the tunnels' decisions that two tunnels can meet in (docs/interop.md): what the client sees, and what
//! each tunnel says of it. One mesh, many rows; with `PEER_ZTUNNEL` set, upstream's tunnel is also at either end.

mod domains;
mod rows;
mod state;

use std::{cmp::Reverse, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use rig::{Mesh, NODES, Options, holds, process, yaml};
use rows::{Fate, Row};
use serde_json::Value;
use state::Addresses;

use crate::{interop, scene::CLIENT};

struct Bed {
    mesh: Mesh,
    load: String,
    addresses: Addresses,
    _folder: tempfile::TempDir,
    /// What the tunnels read at their start, by node.
    told: tempfile::TempDir,
}

fn addresses(mesh: &Mesh) -> Result<Addresses> {
    let names = state::PODS.map(|(name, ..)| ("shop", name));
    let names = names.into_iter().chain([("outside", "plain")]);
    let found = names.map(|(namespace, name)| {
        let ips = mesh.pod_ips(&format!("{namespace}/{name}"))?;
        Ok((name, ips.try_into().ok().context("two addresses")?))
    });
    found.collect()
}

impl Bed {
    fn start(client: Option<PathBuf>, server: Option<PathBuf>) -> Result<Self> {
        let told = tempfile::tempdir()?;
        for node in NODES {
            fs::write(told.path().join(node), "{}")?;
            fs::write(told.path().join(node).with_extension("env"), "")?;
        }
        let local = format!(
            "cd {} && export XDS_ADDRESS= LOCAL_XDS_PATH=$PWD/$NODE_NAME && . ./$NODE_NAME.env && cd /",
            told.path().display()
        );
        let tunnels = [("node1", client), ("node2", server)];
        let (folder, mut options) = Options::prepared(&local, &tunnels)?;
        options.mesh_config = Some(domains::config(domains::OWN));
        let mut mesh = Mesh::new()?;
        let load = mesh.install(env!("CARGO_BIN_EXE_load"))?;
        mesh.write("objects.yaml", &objects(&load))?;
        mesh.up(&options)?;
        let addresses = addresses(&mesh)?;
        let bed = Self {
            mesh,
            load,
            addresses,
            _folder: folder,
            told,
        };
        bed.wall()?;
        for node in NODES {
            bed.tell(node, &state::told(node, &bed.addresses, domains::OWN), "")?;
        }
        Ok(bed)
    }

    /// Starts a node's tunnel anew, with what it is told and its settings, as a shell reads them.
    fn tell(&self, node: &str, state: &str, settings: &str) -> Result<()> {
        let file = self.told.path().join(node);
        fs::write(&file, state)?;
        fs::write(file.with_extension("env"), settings)?;
        self.mesh.kill(&format!("ztunnel-{node}"))
    }

    /// What comes to HBONE's port of one pod is dropped on its way, as a NetworkPolicy does it.
    fn wall(&self) -> Result<()> {
        let rules = "table inet test { chain arriving { type filter hook input priority -300; \
                     tcp dport 15008 drop; }; }";
        process::in_network_of(&self.mesh, "shop/walled", &["nft", rules])
    }
}

fn objects(load: &str) -> String {
    let serve = |port: u16| format!("[{load}, serve, '[::]:{port}']");
    let shop = "apiVersion: v1\nkind: Namespace\nmetadata: { name: shop, labels: { istio.io/dataplane-mode: ambient } }\n";
    let outside = "---\napiVersion: v1\nkind: Namespace\nmetadata: { name: outside }\n";
    let pods = state::PODS.map(|(name, node, port)| match (name, port) {
        ("gateway", _) => {
            let line = format!("[{load}, forward, '[::]:9001', 'relay.outside:9000']");
            yaml::pod("shop", name, node, &line)
        }
        (_, Some(port)) => yaml::pod("shop", name, node, &serve(port)),
        (_, None) => yaml::idle_pod("shop", name, node),
    });
    let relay = format!("[{load}, forward, '[::]:9001', 'behind.shop:15008']");
    let behind = yaml::service_of(
        "shop",
        "behind",
        "server",
        "name: hbone, port: 15008, targetPort: 15008",
    );
    let outsiders = [
        yaml::pod("outside", "plain", "node2", &serve(9001)),
        yaml::pod("outside", "relay", "node2", &relay),
        yaml::service("outside", "relay"),
        behind,
    ];
    [
        shop.to_owned(),
        outside.to_owned(),
        pods.concat(),
        outsiders.concat(),
    ]
    .concat()
}

impl Bed {
    /// A text of the table with its addresses put in. The longest names first: one may begin another.
    fn filled(&self, text: &str) -> String {
        let pods = self.addresses.iter().flat_map(|(name, [v4, v6])| {
            [
                (format!("@{name}"), v4.to_string()),
                (format!("@{name}6"), v6.to_string()),
            ]
        });
        let services = state::vips(&self.addresses);
        let services = services.map(|(name, vip)| (format!("@{name}"), vip));
        let mut all: Vec<_> = pods.chain(services).collect();
        all.sort_by_key(|(name, _)| Reverse(name.len()));
        let fill = |text: String, (name, address): &(String, String)| text.replace(name, address);
        all.iter().fold(text.to_owned(), fill)
    }

    /// What becomes of a connection to each address of `rows`, all from one pod.
    fn fates(&self, from: &str, rows: &[&Row]) -> Result<Vec<String>> {
        let addresses = rows.iter().map(|row| self.filled(row.to));
        let words: Vec<String> = [self.load.clone(), "fate".to_owned()]
            .into_iter()
            .chain(addresses)
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let printed = self.mesh.succeed(&format!("shop/{from}"), &words)?;
        let fate = |line: &str| {
            let value: Value = serde_json::from_str(line)?;
            Ok(value["fate"].as_str().context("a fate")?.to_owned())
        };
        printed.lines().map(fate).collect()
    }

    /// Asks until each row of one pod fares as it should and is told as it should: at first the tunnels have just been
    /// started, and a line is written once the connection has ended.
    fn meet(&self, from: &str, ends: Ends) {
        let mut left: Vec<&Row> = rows::all().filter(|row| row.from == from).collect();
        self.mesh.eventually("every branch is met", || {
            let fates = self.fates(from, &left)?;
            let logs = self.logs();
            let mut wrong = Vec::new();
            for (row, fate) in left.iter().zip(&fates) {
                let met = self.judge(row, ends, fate, &logs);
                let met = met.with_context(|| row.branch);
                wrong.extend(met.err().map(|error| (*row, format!("{error:#}"))));
            }
            let (rows, complaints): (Vec<_>, Vec<_>) = wrong.into_iter().unzip();
            left = rows;
            ensure!(left.is_empty(), "{complaints:#?}");
            Ok(())
        });
    }

    /// The logs of the nodes' tunnels, in their order.
    fn logs(&self) -> [String; 2] {
        let log = |node| self.mesh.logs(&format!("ztunnel-{node}"));
        NODES.map(|node| log(node).unwrap_or_default())
    }

    /// An error unless a row's connection, which fared as `fate` says, did so as it should, and the tunnels tell so.
    fn judge(&self, row: &Row, ends: Ends, fate: &str, logs: &[String; 2]) -> Result<()> {
        ensure!(ends.fits(row.fate, fate), "it was {fate}");
        self.told(row, ends, logs)
    }

    /// An error unless the tunnels have said of a row what they should. `logs`: of the nodes, in their order.
    fn told(&self, row: &Row, ends: Ends, logs: &[String; 2]) -> Result<()> {
        let tunnels = [
            (&logs[0], ends.client_is_ours),
            (&logs[1], ends.server_is_ours),
        ];
        let is_from_first = state::node_of(row.from) == Some(NODES[0]);
        let (near, far) = if is_from_first { (0, 1) } else { (1, 0) };
        for (end, parts) in [(near, row.client), (far, row.server)] {
            let (log, ours) = tunnels[end];
            let parts: Vec<String> = parts
                .iter()
                .map(|part| self.filled(said(part, ours)))
                .collect();
            let fits = |line: &str| parts.iter().all(|part| line.contains(part));
            ensure!(
                parts.is_empty() || log.lines().any(fits),
                "{} has no line with {parts:?}",
                NODES[end]
            );
        }
        Ok(())
    }

    /// The header that the application got before the client's bytes.
    fn proxied(&self) -> Result<()> {
        let log = self.mesh.logs("shop/proxied")?;
        holds(&log, self.filled("\"proxied\":\"@proxied:9001\""))?;
        holds(&log, self.filled("\"for\":\"@client:"))?;
        holds(&log, CLIENT)
    }
}

/// Whose tunnel is at which end.
#[derive(Clone, Copy)]
struct Ends {
    client_is_ours: bool,
    server_is_ours: bool,
}

impl Ends {
    fn fits(self, wanted: Fate, fate: &str) -> bool {
        match wanted {
            Fate::Echoed => fate == "echoed",
            // A silent close looks like the end of what was said: ours never is.
            Fate::Ended => fate == "reset" || (fate == "closed" && !self.is_all_ours()),
            Fate::ByServer { ours, .. } if self.server_is_ours => self.fits(*ours, fate),
            Fate::ByServer { peers, .. } => self.fits(*peers, fate),
        }
    }

    fn is_all_ours(self) -> bool {
        self.client_is_ours && self.server_is_ours
    }
}

/// What ours or upstream's says.
fn said(part: &'static str, ours: bool) -> &'static str {
    match part.split_once(" || ") {
        Some((first, _)) if ours => first,
        Some((_, second)) => second,
        None => part,
    }
}

fn every_branch(client: Option<PathBuf>, server: Option<PathBuf>) -> Result<()> {
    let ends = Ends {
        client_is_ours: client.is_none(),
        server_is_ours: server.is_none(),
    };
    let bed = Bed::start(client, server)?;
    // The last asks for what takes ten seconds, once the rest is known to be there.
    for pod in ["client", "server", "backend"] {
        bed.meet(pod, ends);
    }
    bed.proxied()?;
    bed.another_trust_domain(ends)
}

#[test]
fn every_branch_that_two_tunnels_can_meet_in() -> Result<()> {
    every_branch(None, None)
}

#[test]
fn every_branch_from_our_tunnel_to_the_peers() -> Result<()> {
    interop::with_peer(|peer| every_branch(None, Some(peer)))
}

#[test]
fn every_branch_from_the_peers_tunnel_to_ours() -> Result<()> {
    interop::with_peer(|peer| every_branch(Some(peer), None))
}

#[test]
fn every_branch_is_written_down() -> Result<()> {
    let page = include_str!("../../../docs/interop.md");
    rows::all().try_for_each(|row| holds(page, format!("| {} |", row.branch)))
}
