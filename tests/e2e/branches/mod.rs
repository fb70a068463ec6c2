//! Every branch of the tunnels' decisions that two tunnels can meet in (docs/interop.md): what the client sees, and what
//! each tunnel says of it. One mesh, many rows; with `PEER_ZTUNNEL` set, upstream's tunnel is also at either end.

mod rows;
mod state;

use std::{cmp::Reverse, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use rig::{Mesh, NODES, Options, holds, yaml};
use rows::{Fate, ROWS, Row};
use serde_json::Value;
use state::Addresses;

use crate::{interop, scene::CLIENT};

struct Bed {
    mesh: Mesh,
    load: String,
    addresses: Addresses,
    _folder: tempfile::TempDir,
    _told: tempfile::TempDir,
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
        }
        let local = format!(
            "export XDS_ADDRESS= LOCAL_XDS_PATH={}/$NODE_NAME",
            told.path().display()
        );
        let (folder, options) = Options::prepared(&local, &[("node1", client), ("node2", server)])?;
        let mut mesh = Mesh::new()?;
        let load = mesh.install(env!("CARGO_BIN_EXE_load"))?;
        mesh.write("objects.yaml", &objects(&load))?;
        mesh.up(&options)?;
        let addresses = addresses(&mesh)?;
        for node in NODES {
            fs::write(told.path().join(node), state::told(node, &addresses))?;
            mesh.kill(&format!("ztunnel-{node}"))?;
        }
        Ok(Self {
            mesh,
            load,
            addresses,
            _folder: folder,
            _told: told,
        })
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
        let services = state::SERVICES.map(|name| (format!("@{name}"), state::vip(name)));
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
        let mut left: Vec<&Row> = ROWS.iter().filter(|row| row.from == from).collect();
        self.mesh.eventually("every branch is met", || {
            let fates = self.fates(from, &left)?;
            let logs = NODES.map(|node| {
                self.mesh
                    .logs(&format!("ztunnel-{node}"))
                    .unwrap_or_default()
            });
            let mut wrong = Vec::new();
            for (row, fate) in left.iter().zip(&fates) {
                let fits = ends.fits(row.fate, fate);
                let told = self.told(row, ends, &logs);
                let met = ensure_fits(fits, fate)
                    .and(told)
                    .with_context(|| row.branch);
                wrong.extend(met.err().map(|error| (*row, format!("{error:#}"))));
            }
            let (rows, complaints): (Vec<_>, Vec<_>) = wrong.into_iter().unzip();
            left = rows;
            ensure!(left.is_empty(), "{complaints:#?}");
            Ok(())
        });
    }

    /// An error unless the tunnels have said of a row what they should. `logs`: of the nodes, in their order.
    fn told(&self, row: &Row, ends: Ends, logs: &[String; 2]) -> Result<()> {
        let tunnels = [
            (&logs[0], ends.client_is_ours),
            (&logs[1], ends.server_is_ours),
        ];
        let (near, far) = if row.from == "client" { (0, 1) } else { (1, 0) };
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

fn ensure_fits(fits: bool, fate: &str) -> Result<()> {
    ensure!(fits, "it was {fate}");
    Ok(())
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
    for pod in ["client", "server"] {
        bed.meet(pod, ends);
    }
    bed.proxied()
}

#[test]
fn every_branch_that_two_tunnels_can_meet_in() -> Result<()> {
    every_branch(None, None)
}

#[test]
fn every_branch_from_our_tunnel_to_the_peers() -> Result<()> {
    match interop::peer()? {
        Some(peer) => every_branch(None, Some(peer)),
        None => Ok(()),
    }
}

#[test]
fn every_branch_from_the_peers_tunnel_to_ours() -> Result<()> {
    match interop::peer()? {
        Some(peer) => every_branch(Some(peer), None),
        None => Ok(()),
    }
}

#[test]
fn every_branch_is_written_down() -> Result<()> {
    let page = include_str!("../../../docs/interop.md");
    ROWS.iter()
        .try_for_each(|row| holds(page, format!("| {} |", row.branch)))
}
