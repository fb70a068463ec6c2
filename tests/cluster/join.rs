//! Joining and leaving by label, with traffic flowing, and what must not be taken in.

use anyhow::{Context, Result, ensure};
use rig::cluster::bed::{alone, shared};

use crate::scene::{Scene, Start, job, pod, strangers};

#[test]
fn joining_and_leaving_refuses_no_connection_and_cuts_none() -> Result<()> {
    let (_turn, bed) = alone()?;
    let scene = Scene::start(bed, "join", Start::Outside)?;
    let (client, server) = (scene.pod("client"), scene.at("server", 8080)?);
    let new = bed.new_connections(&client, &server, 100)?;
    let held = bed.held_connections(&client, &server, 50)?;

    scene.label(Start::InMesh)?;
    scene.joined(&["client", "server"])?;
    // The mesh carries what is opened from now on, and the others live on beside it.
    scene.access_line(
        bed.node(1),
        &[&scene.identity("client"), "direction=\"inbound\""],
    );
    let through = bed.held_connections(&client, &server, 50)?;
    scene.label(Start::Outside)?;
    scene.left(&["client", "server"]);

    new.none_failed(100)?;
    // All are ended before any is judged.
    let (held, through) = (held.none_cut(), through.none_cut());
    ensure!(
        held.context("opened before the join")? == 50,
        "some were not held"
    );
    ensure!(
        through.context("opened in the mesh")? == 50,
        "some were not held"
    );
    Ok(())
}

#[test]
fn a_job_and_its_init_container_run_to_their_end_in_the_mesh() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "job", Start::InMesh)?;
    let line = format!("[load, ping, '{}', --count, '3']", scene.service());
    scene.apply(&job("client-job", bed.node(0), &line))?;
    bed.kube().wait(
        &scene.namespace,
        "job/client-job",
        "condition=Complete",
        120,
    )?;
    scene.access_line(bed.node(1), &["client-job", &scene.identity("client")]);
    Ok(())
}

#[test]
fn a_pod_that_says_none_and_a_pod_on_the_host_network_stay_outside() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "outside", Start::InMesh)?;
    scene.apply(&strangers(bed.node(0), bed.node(0), 9321))?;
    scene.ready(&["client-apart", "client-host"])?;
    for name in ["client-apart", "client-host"] {
        // Strangers are let in while no policy says otherwise, from when the server's tunnel knows the server.
        let server = scene.at("server", 8080)?;
        bed.eventually(&format!("{name} reaches the server"), || {
            bed.ping(&scene.pod(name), &server)
        });
        let found = scene.object("pod", name)?;
        let annotation = &found["metadata"]["annotations"]["ambient.istio.io/redirection"];
        ensure!(annotation.is_null(), "{name} was taken in");
    }
    Ok(())
}

#[test]
fn pods_of_an_excluded_namespace_stay_outside_whatever_their_labels_say() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::empty(bed, "beside-excluded", Start::InMesh)?;
    let label = "labels: {istio.io/dataplane-mode: ambient, ";
    let name = "client-excluded";
    let echo = "[leyline, tool, echo, '9000']";
    let excluded = pod(name, bed.node(0), echo, "")
        .replace("labels: {", label)
        .replace("  serviceAccountName: client\n", "");
    bed.kube().apply_in(EXCLUDED, &excluded)?;
    let taken = bed
        .kube()
        .wait(EXCLUDED, &format!("pod/{name}"), "condition=Ready", 120)
        .and_then(|()| {
            // What the same agent takes in after it has been taken in.
            scene.apply(&pod("client", bed.node(0), echo, ""))?;
            scene.ready(&["client"])?;
            scene.joined(&["client"])?;
            bed.kube().json(&["-n", EXCLUDED, "pod", name])
        });
    let delete = ["-n", EXCLUDED, "delete", "pod", name, "--wait=false"];
    bed.kube().run(&delete)?;
    let annotations = taken?["metadata"]["annotations"].clone();
    let redirection = &annotations["ambient.istio.io/redirection"];
    ensure!(redirection.is_null(), "it was taken in: {annotations}");
    Ok(())
}

/// The chart's `cni.excludeNamespaces`.
const EXCLUDED: &str = "kube-system";
