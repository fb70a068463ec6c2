//! Tunnels that ask the control plane for what they need, when they need it (`XDS_ON_DEMAND`).

use anyhow::{Result, ensure};
use rig::{NODES, Options, holds, yaml::database};

use crate::scene::{CLIENT, DENY_INTRUDER, SERVICE, Scene, Shop};

const PLAIN: &str = "plain.outside.svc.cluster.local";
const HEADLESS: &str = "db.outside.svc.cluster.local";

/// What the client's tunnel knows.
fn known(scene: &Scene) -> Result<String> {
    scene.mesh.admin("ztunnel-node1", "/config_dump")
}

#[test]
fn tunnels_on_demand_resolve_names_and_reach_what_they_have_not_heard_of() -> Result<()> {
    let tunnels = NODES.map(|node| (node, None));
    let (_folder, options) = Options::prepared("export XDS_ON_DEMAND=true", &tunnels)?;
    let extra = format!("{DENY_INTRUDER}---\n{}", database("outside"));
    let scene = Scene::start_with(Shop::InMesh, &extra, &options)?;
    scene.refused("shop/intruder", SERVICE)?;

    // By name: the question for it is what the tunnel asks about. Its server is in another namespace, and not enrolled.
    ensure!(!known(&scene)?.contains(PLAIN), "known without a question");
    scene.ping("shop/client", "plain.outside:9000")?;
    holds(&known(&scene)?, PLAIN)?;

    // A pod by its own name: what is asked about is the headless service above it.
    ensure!(
        !known(&scene)?.contains(HEADLESS),
        "known without a question"
    );
    let database = ["getent", "hosts", "db-0.db.outside"];
    scene.mesh.succeed("shop/client", &database)?;
    holds(&known(&scene)?, HEADLESS)?;

    // By address, of a pod and of the outside of the mesh.
    let server = scene.at("shop/server", 9001)?;
    scene.ping("shop/client", &server)?;
    scene.access_line("node2", &["direction=\"inbound\"", CLIENT]);
    let nobody = ["getent", "hosts", "nobody.shop.svc.cluster.local"];
    let nobody = scene.mesh.exec("shop/client", &nobody)?;
    ensure!(!nobody.status.success(), "a name of nobody is answered");

    // What is known is served on without a control plane, and what is not is not waited for without end.
    scene.mesh.stop("controlplane")?;
    scene.ping("shop/client", SERVICE)?;
    let nobody = ["getent", "hosts", "nobody.outside.svc.cluster.local"];
    let nobody = scene.mesh.exec("shop/client", &nobody)?;
    ensure!(!nobody.status.success(), "a name of nobody is answered");
    scene.mesh.resume("controlplane")
}
