//! Upstream's tunnel in the place of ours on one node, under our agent and control plane. Set `PEER_ZTUNNEL` to its path.

use std::{env, path::PathBuf};

use anyhow::{Result, ensure};
use rig::{Options, holds};

use crate::{
    scene::{CLIENT, INTRUDER, SERVER, SERVICE, Scene, Shop},
    waypoint,
};

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: strict, namespace: shop }
spec: { mtls: { mode: STRICT } }
";

const ONLY_CLIENT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: only-client, namespace: shop }
spec:
  selector: { matchLabels: { app: server } }
  action: ALLOW
  rules: [{ from: [{ source: { principals: [cluster.local/ns/shop/sa/client] } }] }]
";

/// Where the peer's tunnel is; none where it is not there.
pub(crate) fn peer() -> Result<Option<PathBuf>> {
    let Some(path) = env::var_os("PEER_ZTUNNEL").map(PathBuf::from) else {
        println!("not run: PEER_ZTUNNEL is not set");
        return Ok(None);
    };
    ensure!(
        path.exists(),
        "PEER_ZTUNNEL={} does not exist",
        path.display()
    );
    Ok(Some(path))
}

/// Runs a test with the peer's tunnel, where it is there.
pub(crate) fn with_peer(test: impl FnOnce(PathBuf) -> Result<()>) -> Result<()> {
    peer()?.map_or(Ok(()), test)
}

/// The peer's tunnel on these nodes; none where the peer is not there.
fn peer_on(nodes: &[&str]) -> Result<Option<Options>> {
    let Some(path) = peer()? else {
        return Ok(None);
    };
    let ztunnel = nodes.iter().map(|node| ((*node).to_owned(), path.clone()));
    Ok(Some(Options {
        ztunnel: ztunnel.collect(),
        ..Options::default()
    }))
}

/// A mesh with the peer's tunnel on `node`; none where the peer is not there.
fn with_peer_on(node: &str) -> Result<Option<Scene>> {
    let options = peer_on(&[node])?;
    let start = |options| Scene::start_with(Shop::InMesh, "", &options);
    options.map(start).transpose()
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
    names(scene)
}

/// Names of the mesh by whichever tunnel answers: by the client's search path and whole, over IPv4 and IPv6; and those that
/// nobody has.
fn names(scene: &Scene) -> Result<()> {
    for name in ["server", "server.shop", "server.shop.svc.cluster.local"] {
        for family in ["ahostsv4", "ahostsv6"] {
            let found = scene
                .mesh
                .succeed("shop/client", &["getent", family, name])?;
            ensure!(!found.trim().is_empty(), "{family} {name}");
        }
    }
    let nobody = ["getent", "hosts", "nobody.shop.svc.cluster.local"];
    let nobody = scene.mesh.exec("shop/client", &nobody)?;
    ensure!(!nobody.status.success(), "a name of nobody is answered");
    Ok(())
}

/// Whoever is not allowed is refused, and told so in the server's log.
fn refuses_the_intruder(scene: &Scene) -> Result<()> {
    scene.ping("shop/intruder", SERVICE)?;
    scene.mesh.write("policy.yaml", ONLY_CLIENT)?;
    scene.mesh.eventually("the intruder is refused", || {
        scene.refused("shop/intruder", SERVICE)
    });
    scene.access_line("node2", &[INTRUDER, "error="]);
    scene.ping("shop/client", SERVICE)?;
    Ok(())
}

/// A policy reaches connections that are open: whom it denies is cut, and who may stays is not. Where the peer serves, one
/// that selects workloads does not: it looks at open connections when the policy arrives, before the workload names it.
fn policy_reaches_open_connections(scene: &Scene) -> Result<()> {
    let allowed = scene.hold("shop/client")?;
    let denied = scene.hold("shop/intruder")?;
    scene.access_open(INTRUDER)?;
    refuses_the_intruder(scene)?;
    denied.cut(scene);
    allowed.let_go()?;
    scene.mesh.remove("policy.yaml")?;
    scene.mesh.eventually("the intruder is let in again", || {
        scene.ping("shop/intruder", SERVICE)
    });
    Ok(())
}

/// Pods outside the mesh, both ways; and the end of it.
fn plaintext(scene: &Scene) -> Result<()> {
    scene.ping("shop/client", "plain.outside:9000")?;
    scene.ping("outside/stranger", "server.shop:9000")?;
    scene.mesh.write("strict.yaml", STRICT)?;
    scene.mesh.eventually("plaintext is refused", || {
        scene.refused("outside/stranger", "server.shop:9000")
    });
    scene.ping("shop/client", SERVICE)?;
    scene.mesh.remove("strict.yaml")
}

/// Each tunnel drains while the other has connections with it pooled, and comes back with other certificates.
fn tunnels_come_and_go(scene: &Scene) -> Result<()> {
    for tunnel in ["ztunnel-node1", "ztunnel-node2"] {
        scene.mesh.stop(tunnel)?;
        scene.refused("shop/client", SERVICE)?;
        scene.mesh.resume(tunnel)?;
        scene
            .mesh
            .eventually(&format!("traffic flows with another {tunnel}"), || {
                scene.ping("shop/client", SERVICE)
            });
    }
    Ok(())
}

#[test]
fn our_tunnel_reaches_the_peers() -> Result<()> {
    let Some(scene) = with_peer_on("node2")? else {
        return Ok(());
    };
    checks(&scene)?;
    refuses_the_intruder(&scene)
}

#[test]
fn the_peers_tunnel_reaches_ours() -> Result<()> {
    let Some(scene) = with_peer_on("node1")? else {
        return Ok(());
    };
    checks(&scene)?;
    policy_reaches_open_connections(&scene)?;
    plaintext(&scene)?;
    tunnels_come_and_go(&scene)
}

#[test]
fn the_peers_tunnels_pass_our_waypoint() -> Result<()> {
    for nodes in [&["node1"][..], &["node2"], &["node1", "node2"]] {
        let Some(options) = peer_on(nodes)? else {
            return Ok(());
        };
        let shop = waypoint::Shop::open_with(&options, "")?;
        for flags in [&["--count", "20"][..], &["--count", "20", "--h2"]] {
            let found = shop.get("shop/client", "v1", "/", flags)?;
            ensure!(found["statuses"]["200"] == 20, "{nodes:?}: {found}");
        }
        let body = ["--method", "POST", "--body", "300000"];
        shop.get("shop/client", "v1", "/echo", &body)?;
    }
    Ok(())
}
