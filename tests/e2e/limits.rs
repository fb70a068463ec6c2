//! A tunnel that may open 256 files: it serves what it can, leaves alone what it cannot, and says why.

use anyhow::{Result, ensure};
use rig::{Options, holds, yaml::idle_pod};

use crate::scene::{SERVICE, Scene, Shop};

/// With the two that are there, more pods than half of 256 files have listeners for.
const PODS: usize = 16;

/// A mesh whose first node's tunnel has few files.
fn with_few_files() -> Result<(tempfile::TempDir, Scene)> {
    let limit = "ulimit -Sn 256 && ulimit -Hn 256";
    let (folder, options) = Options::prepared(limit, &[("node1", None)])?;
    Ok((folder, Scene::start_with(Shop::InMesh, "", &options)?))
}

#[test]
fn a_tunnel_out_of_files_serves_whom_it_has_and_says_why() -> Result<()> {
    let (_folder, scene) = with_few_files()?;
    let live = [&scene.load, "live", SERVICE, "--connections", "2"];
    let mut held = scene.mesh.spawn("shop/client", &live)?;
    held.json()?;

    // Pods beyond what there are files for are pending, with the reason; those that were there are served on.
    let more = (0..PODS).map(|number| idle_pod("shop", &format!("more-{number}"), "node1"));
    scene.mesh.write("more.yaml", &more.collect::<String>())?;
    scene
        .mesh
        .eventually("a pod is pending for want of files", || {
            holds(&scene.mesh.status()?.to_string(), "open files")
        });
    ensure!(held.is_running()?, "the first pod's connection was cut");
    scene.ping("shop/intruder", SERVICE)?;
    scene.mesh.eventually("the tunnel says why", || {
        holds(&scene.mesh.logs("ztunnel-node1")?, "no files are left")
    });
    Ok(())
}

#[test]
fn more_connections_than_files_wait_or_fail_and_the_tunnel_recovers() -> Result<()> {
    let (_folder, scene) = with_few_files()?;
    let live = [&scene.load, "live", SERVICE, "--connections", "2"];
    let mut held = scene.mesh.spawn("shop/client", &live)?;
    held.json()?;
    scene.ping("shop/client", SERVICE)?;
    // Nobody gets 400 connections out of 256 files: the client is left waiting or told, which both end it.
    let many = ["hold", SERVICE, "--connections", "400"];
    let many = [&[scene.load.as_str()], &many[..]].concat();
    let output = scene.mesh.exec("shop/intruder", &many)?;
    ensure!(!output.status.success(), "400 connections over 256 files");
    ensure!(held.is_running()?, "the first pod's connection was cut");
    scene.mesh.eventually("there is room again", || {
        scene.ping("shop/intruder", SERVICE)
    });
    Ok(())
}
