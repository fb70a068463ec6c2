//! Another network, reached in two tunnels, one inside the other: through our gateway between networks, where the outer one
//! ends, to the pod's own tunnel, which ends the inner one. Where `PEER_ZTUNNEL` is set, upstream's tunnel also takes either
//! end.
//!
//! The client's node and the control plane are of the default network. The server, its node's tunnel and the gateway are of
//! `elsewhere`, behind the same control plane: the client's tunnel knows the server only by its service and the gateway.

use std::path::PathBuf;

use anyhow::{Context, Result};
use rig::{
    Mesh, Options, holds,
    yaml::{idle_pod, pod, service, service_of},
};

use crate::{
    interop,
    scene::{CLIENT, INTRUDER, Scene},
};

const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/far";

/// The service over there, of the whole mesh, and one of the same pod that is its own network's alone.
const FAR: &str = "far.shop.svc.cluster.local:9000";
const FAR_HOST: &str = "far.shop.svc.cluster.local";
const HIDDEN: &str = "hidden.shop.svc.cluster.local:9000";

/// A gateway, on the server's node.
const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: east-west, namespace: shop, labels: { topology.istio.io/network: elsewhere } }
spec:
  gatewayClassName: istio-east-west
  listeners: [{ name: mesh, port: 15008, protocol: HBONE }]
";

/// Keeps one identity away from the server, and nobody from the gateway.
const DENY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-intruder, namespace: shop }
spec:
  selector: { matchLabels: { app: far } }
  action: DENY
  rules: [{ from: [{ source: { principals: ['*/sa/intruder'] } }] }]
";

fn objects(load: &str) -> String {
    let server = pod(
        "shop",
        "far",
        "node2",
        &format!("[{load}, serve, '[::]:9001']"),
    );
    let global = service("shop", "far").replacen(
        "name: far,",
        "name: far, labels: { istio.io/global: \"true\" },",
        1,
    );
    [
        "apiVersion: v1\nkind: Namespace\nmetadata: { name: shop, labels: { istio.io/dataplane-mode: ambient } }\n",
        &idle_pod("shop", "client", "node1"),
        &idle_pod("shop", "intruder", "node1"),
        &server.replacen(
            "app: far",
            "app: far, topology.istio.io/network: elsewhere",
            1,
        ),
        &global,
        &service_of("shop", "hidden", "far", "name: tcp, port: 9000, targetPort: 9001"),
        "---",
        GATEWAY,
        "---",
        DENY,
    ]
    .concat()
}

fn through_the_gateway(client: Option<PathBuf>, server: Option<PathBuf>) -> Result<()> {
    // Each node's tunnel is told the network of its pods.
    let prepare = "case $0 in *node2) export NETWORK=elsewhere;; esac";
    let (_folder, options) = Options::prepared(prepare, &[("node1", client), ("node2", server)])?;
    let mut mesh = Mesh::new()?;
    let load = mesh.install(env!("CARGO_BIN_EXE_load"))?;
    let hostile = mesh.install(env!("CARGO_BIN_EXE_hostile"))?;
    mesh.write("objects.yaml", &objects(&load))?;
    mesh.up(&options)?;
    let scene = Scene {
        mesh,
        load,
        hostile,
    };
    for pod in ["shop/client", "shop/intruder", "shop/far"] {
        scene.mesh.eventually(&format!("{pod} is in the mesh"), || {
            scene.enrolment(pod, "yes")
        });
    }
    scene
        .mesh
        .eventually("the server answers from elsewhere", || {
            scene.ping("shop/client", FAR)
        });
    // The client's own identity reaches the server, by way of the gateway, which tells of the same connection.
    let inbound = [
        "direction=\"inbound\"",
        "connection complete",
        CLIENT,
        SERVER,
    ];
    scene.access_line("node2", &inbound);
    let outbound = ["direction=\"outbound\"", "connection complete", FAR_HOST];
    holds(&scene.access_line("node1", &outbound), CLIENT)?;
    told_by_the_gateway(&scene)?;
    // Bytes both ways, and a half-close, all the way through.
    let stream = ["stream", FAR, "--flows", "2", "--seconds", "1"];
    let stream = [&[scene.load.as_str()], &stream[..]].concat();
    scene.mesh.json("shop/client", &stream)?;
    // The server's policy judges who asked, not who passed it on.
    scene.refused("shop/intruder", FAR)?;
    let denied = ["direction=\"inbound\"", "shop/no-intruder", INTRUDER];
    scene.access_line("node2", &denied);
    // What is not of the whole mesh is not for other networks.
    scene.refused("shop/client", HIDDEN)
}

fn told_by_the_gateway(scene: &Scene) -> Result<()> {
    let status = scene.mesh.status()?;
    let pods = status["pods"].as_array().context("status has pods")?;
    let names = pods.iter().filter_map(|pod| pod["name"].as_str());
    let mut gateways = names.filter(|name| name.starts_with("east-west"));
    let gateway = format!("shop/{}", gateways.next().context("the gateway runs")?);
    scene.mesh.eventually("the gateway tells of it", || {
        holds(&scene.mesh.logs(&gateway)?, FAR_HOST)
    });
    Ok(())
}

#[test]
fn another_network_is_reached_in_two_tunnels_through_its_gateway() -> Result<()> {
    through_the_gateway(None, None)
}

#[test]
fn the_peers_tunnel_reaches_another_network_through_our_gateway() -> Result<()> {
    interop::with_peer(|peer| through_the_gateway(Some(peer), None))
}

#[test]
fn our_tunnel_reaches_the_peers_behind_our_gateway() -> Result<()> {
    interop::with_peer(|peer| through_the_gateway(None, Some(peer)))
}
