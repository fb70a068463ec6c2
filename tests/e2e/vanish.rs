//! A peer that is gone without a word, as a node is that loses its power: only time tells, and what the applications at
//! both ends learn is a reset, never an end.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use rig::{
    Options, holds,
    process::in_network_of,
    yaml::{pod, service},
};
use serde_json::Value;

use crate::{
    interop,
    scene::{Scene, Shop},
};

/// A server that tells how its connections end.
const TELLER: &str = "teller.shop.svc.cluster.local:9000";

/// Three seconds without an acknowledgement.
const SHORT: &str =
    "export USER_TIMEOUT_ENABLED=true KEEPALIVE_TIME=1s KEEPALIVE_INTERVAL=1s KEEPALIVE_RETRIES=2";

/// No packet of a tunnel comes to the pod or leaves it.
const GONE: &str = "table inet gone { \
    chain arriving { type filter hook input priority -300; tcp dport 15008 drop; }; \
    chain leaving { type filter hook output priority -300; tcp sport 15008 drop; }; }";
const BACK: &str = "delete table inet gone";

fn a_peer_vanishes(client: Option<PathBuf>, server: Option<PathBuf>) -> Result<()> {
    let (ours_dials, ours_serves) = (client.is_none(), server.is_none());
    let tunnels = [("node1", client), ("node2", server)];
    let (_folder, options) = Options::prepared(SHORT, &tunnels)?;
    let scene = Scene::start_with(Shop::InMesh, "", &options)?;
    let serve = format!("[{}, serve, '[::]:9001', --tell]", scene.load);
    let teller = [
        pod("shop", "teller", "node2", &serve),
        service("shop", "teller"),
    ];
    scene.mesh.write("teller.yaml", &teller.concat())?;
    scene.mesh.eventually("the server is in the mesh", || {
        scene.enrolment("shop/teller", "yes")?;
        scene.ping("shop/client", TELLER)
    });
    let live = [&scene.load, "live", TELLER, "--connections", "2"];
    let mut held = scene.mesh.spawn("shop/client", &live)?;
    held.json()?;

    in_network_of(&scene.mesh, "shop/teller", &["nft", GONE])?;
    let end = held.json()?;
    ensure!(end["cut"] == 2, "{end}");
    if ours_dials {
        told_to_the_client(&scene, &end)?;
    }
    if ours_serves {
        told_to_the_server(&scene);
    }

    // Where another thread's tunnel has not noticed yet, one more may be lost on it.
    in_network_of(&scene.mesh, "shop/teller", &["nft", BACK])?;
    scene.mesh.eventually("the peer is dialled anew", || {
        scene.ping("shop/client", TELLER)
    });
    Ok(())
}

fn told_to_the_client(scene: &Scene, end: &Value) -> Result<()> {
    holds(&end["errors"].to_string(), "reset by peer")?;
    let line = [
        "teller.shop",
        "direction=\"outbound\"",
        "tunnel lost",
        "timed out",
    ];
    scene.access_line("node1", &line);
    // The applications learn of it first.
    scene.mesh.eventually("both are counted as failed", || {
        let metrics = scene.mesh.metrics("node1")?;
        let failed = metrics.lines().filter(|line| {
            line.starts_with("istio_tcp_connections_failed_total{")
                && line.contains("teller.shop")
                && line.contains("response_flags=\"CONNECT\"")
        });
        let counts = failed.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u32>().ok());
        ensure!(counts.sum::<u32>() >= 2, "{metrics}");
        Ok(())
    });
    Ok(())
}

fn told_to_the_server(scene: &Scene) {
    scene.mesh.eventually("the server is told of resets", || {
        let log = scene.mesh.logs("shop/teller")?;
        let resets = log.matches("{\"end\":\"reset\"}").count();
        ensure!(resets >= 2, "{log}");
        Ok(())
    });
    let line = [
        "sa/teller",
        "direction=\"inbound\"",
        "tunnel lost",
        "timed out",
    ];
    scene.access_line("node2", &line);
}

#[test]
fn a_peer_that_vanishes_is_a_reset_at_both_ends_and_is_dialled_anew() -> Result<()> {
    a_peer_vanishes(None, None)
}

#[test]
fn our_clients_learn_that_the_peers_tunnel_has_vanished() -> Result<()> {
    interop::with_peer(|peer| a_peer_vanishes(None, Some(peer)))
}

#[test]
fn our_servers_learn_that_the_peers_tunnel_has_vanished() -> Result<()> {
    interop::with_peer(|peer| a_peer_vanishes(Some(peer), None))
}
