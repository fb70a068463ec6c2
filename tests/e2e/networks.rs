//! Another network, reached in two tunnels, one inside the other: through its gateway, whose tunnel ends the outer one, to
//! the pod's tunnel, which ends the inner one. Where `PEER_ZTUNNEL` is set, upstream's tunnel also takes either end.
//!
//! The tunnels read what is beyond the gateway from a file: the service, and one endpoint of another network. The gateway
//! is a pod whose application passes what comes out of the outer tunnel on, by way of a pod outside the mesh, to the
//! server's HBONE port.

use std::{fs, path::PathBuf};

use anyhow::Result;
use rig::{
    Options, holds,
    yaml::{pod, service, service_of},
};

use crate::{
    interop,
    scene::{CLIENT, SERVER, Scene, Shop},
};

/// The service over there; 9001 is the port of the gateway's application and of the server's.
const FAR: &str = "far.shop.svc.cluster.local";

const BEYOND: &str = "
services:
- name: far
  namespace: shop
  hostname: far.shop.svc.cluster.local
  vips: [/240.1.2.3]
  ports: { 9000: 9001 }
  subjectAltNames: [spiffe://cluster.local/ns/shop/sa/server]
workloads:
- uid: elsewhere/SplitHorizonWorkload/far
  name: far
  namespace: shop
  serviceAccount: server
  network: elsewhere
  protocol: HBONE
  workloadIps: []
  networkGateway: { destination: shop/gateway.shop.svc.cluster.local, hboneMtlsPort: 15008 }
  services:
    shop/far.shop.svc.cluster.local: { 9000: 9001 }
";

/// A service that leads to a pod's HBONE port.
fn hbone(name: &str, of: &str) -> String {
    service_of(
        "shop",
        name,
        of,
        "name: hbone, port: 15008, targetPort: 15008",
    )
}

fn through_the_gateway(client: Option<PathBuf>, server: Option<PathBuf>) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), BEYOND)?;
    let local = format!("export LOCAL_XDS_PATH={}", file.path().display());
    let tunnels = [("node1", client), ("node2", server)];
    let (_folder, options) = Options::prepared(&local, &tunnels)?;
    let scene = Scene::start_with(Shop::InMesh, "", &options)?;
    let forward = |to: &str| format!("[{}, forward, '[::]:9001', '{to}']", scene.load);
    let objects = [
        pod("shop", "gateway", "node2", &forward("relay.outside:9000")),
        pod("outside", "relay", "node2", &forward("behind.shop:15008")),
        service("outside", "relay"),
        hbone("gateway", "gateway"),
        hbone("behind", "server"),
    ];
    scene.mesh.write("gateway.yaml", &objects.concat())?;
    scene.mesh.eventually("the gateway is in the mesh", || {
        scene.enrolment("shop/gateway", "yes")
    });
    let far = format!("{FAR}:9000");
    scene
        .mesh
        .eventually("the server answers from elsewhere", || {
            scene.ping("shop/client", &far)
        });
    // One connection at either tunnel of the far side: the outer one for the gateway, the inner one for the server. The
    // client's own identity is in both.
    let gateway = "spiffe://cluster.local/ns/shop/sa/gateway";
    for end in [gateway, SERVER] {
        let parts = ["direction=\"inbound\"", "connection complete", CLIENT, end];
        scene.access_line("node2", &parts);
    }
    let outbound = ["direction=\"outbound\"", "connection complete", FAR];
    let outbound = scene.access_line("node1", &outbound);
    holds(&outbound, CLIENT)?;
    // Bytes both ways, and a half-close, all the way through.
    let stream = ["stream", &far, "--flows", "2", "--seconds", "1"];
    let stream = [&[scene.load.as_str()], &stream[..]].concat();
    scene.mesh.json("shop/client", &stream)?;
    Ok(())
}

#[test]
fn another_network_is_reached_in_two_tunnels_through_its_gateway() -> Result<()> {
    through_the_gateway(None, None)
}

#[test]
fn the_peers_tunnel_reaches_another_network_through_our_gateway() -> Result<()> {
    match interop::peer()? {
        Some(peer) => through_the_gateway(Some(peer), None),
        None => Ok(()),
    }
}

#[test]
fn our_tunnel_reaches_another_network_through_the_peers_gateway() -> Result<()> {
    match interop::peer()? {
        Some(peer) => through_the_gateway(None, Some(peer)),
        None => Ok(()),
    }
}
