//! Upstream's tunnel in the place of ours on one node, under our agent and control plane. Set `PEER_ZTUNNEL` to its path.

use std::{env, path::PathBuf};

use anyhow::{Result, ensure};
use rig::{Options, holds};

use crate::scene::{CLIENT, INTRUDER, SERVER, SERVICE, Scene, Shop};

const ONLY_CLIENT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: only-client, namespace: shop }
spec:
  selector: { matchLabels: { app: server } }
  action: ALLOW
  rules: [{ from: [{ source: { principals: [cluster.local/ns/shop/sa/client] } }] }]
";

/// A mesh with the peer's tunnel on `node`; none where the peer is not there.
fn with_peer_on(node: &str) -> Result<Option<Scene>> {
    let Some(path) = env::var_os("PEER_ZTUNNEL").map(PathBuf::from) else {
        println!("not run: PEER_ZTUNNEL is not set");
        return Ok(None);
    };
    ensure!(
        path.exists(),
        "PEER_ZTUNNEL={} does not exist",
        path.display()
    );
    let options = Options {
        ztunnel: vec![(node.to_owned(), path)],
    };
    Scene::start_with(Shop::InMesh, "", &options).map(Some)
}

fn checks(scene: &Scene) -> Result<()> {
    // Messages of every kind, and a half-close: the server counts what it got once the client's half is closed.
    scene.ping("shop/client", SERVICE)?;
    scene.mesh.json(
        "shop/client",
        &[
            &scene.load,
            "ping",
            SERVICE,
            "--size",
            "1000000",
            "--count",
            "10",
        ],
    )?;
    scene.mesh.json(
        "shop/client",
        &[
            &scene.load,
            "stream",
            SERVICE,
            "--flows",
            "4",
            "--seconds",
            "1",
        ],
    )?;
    for (node, direction) in [("node1", "outbound"), ("node2", "inbound")] {
        let line = scene.access_line(
            node,
            &[
                &format!("direction=\"{direction}\""),
                CLIENT,
                "connection complete",
            ],
        );
        holds(&line, SERVER)?;
    }
    scene.ping("shop/intruder", SERVICE)?;
    scene.mesh.write("policy.yaml", ONLY_CLIENT)?;
    scene.mesh.eventually("the intruder is refused", || {
        scene.refused("shop/intruder", SERVICE)
    });
    scene.access_line("node2", &[INTRUDER, "error="]);
    scene.ping("shop/client", SERVICE)?;
    Ok(())
}

#[test]
fn our_tunnel_reaches_the_peers() -> Result<()> {
    with_peer_on("node2")?.map_or(Ok(()), |scene| checks(&scene))
}

#[test]
fn the_peers_tunnel_reaches_ours() -> Result<()> {
    with_peer_on("node1")?.map_or(Ok(()), |scene| checks(&scene))
}
