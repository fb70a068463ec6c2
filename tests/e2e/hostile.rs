//! Bad input on 15008: refused or bounded, and other connections are unharmed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::scene::{SERVICE, Scene, Shop};

/// Runs one case from a pod that is outside the mesh, against the server's tunnel port; what came of it, and after how long.
fn attack(scene: &Scene, case: &str) -> Result<(String, Duration)> {
    let address = scene.at("shop/server", 15008)?;
    let authority = scene.at("shop/server", 9001)?;
    let ca = scene.mesh.authority()?;
    let command = [
        &scene.hostile,
        &address,
        case,
        "--ca",
        &ca,
        "--authority",
        &authority,
    ];
    let answer = scene.mesh.json("outside/stranger", &command)?;
    let outcome = answer["outcome"].as_str().context("an outcome")?.to_owned();
    let seconds = answer["seconds"].as_f64().context("a time")?;
    Ok((outcome, Duration::from_secs_f64(seconds)))
}

/// How long a peer that says nothing may keep a connection before it is in.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// An error unless the tunnel ends what the case attempts, and soon enough.
fn closed_in_time(scene: &Scene, case: &str) -> Result<()> {
    let (outcome, took) = attack(scene, case)?;
    let refused = outcome.starts_with("error") || outcome == "closed";
    ensure!(
        refused && took < HANDSHAKE,
        "{case}: {outcome} after {took:?}"
    );
    Ok(())
}

#[test]
fn only_a_certificate_of_the_mesh_opens_the_tunnel() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let (outcome, _) = attack(&scene, "good")?;
    assert_eq!(outcome, "status 200", "the attacker's own tools work");
    for case in [
        "no-certificate",
        "other-domain",
        "other-root",
        "expired",
        "two-uris",
    ] {
        closed_in_time(&scene, case)?;
    }
    scene.ping("shop/client", SERVICE)?;
    Ok(())
}

#[test]
fn what_is_no_tls_is_closed_in_time() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    for case in ["plaintext", "garbage", "stall"] {
        closed_in_time(&scene, case)?;
    }
    scene.ping("shop/client", SERVICE)?;
    Ok(())
}

#[test]
fn requests_that_are_no_tunnel_are_answered_400_or_reset() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    for case in ["wrong-address", "get"] {
        let (outcome, _) = attack(&scene, case)?;
        assert_eq!(outcome, "status 400", "{case}");
    }
    let (outcome, _) = attack(&scene, "no-authority")?;
    ensure!(
        outcome == "status 400" || outcome.starts_with("reset"),
        "no-authority: {outcome}"
    );
    Ok(())
}

#[test]
fn floods_are_cut_off_and_harm_nobody() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let held = scene.mesh.spawn(
        "shop/client",
        &[
            &scene.load,
            "ping",
            SERVICE,
            "--rate",
            "50",
            "--count",
            "250",
        ],
    )?;
    for case in [
        "header-flood",
        "continuation-flood",
        "rapid-reset",
        "settings-flood",
        "ping-flood",
    ] {
        let (outcome, _) = attack(&scene, case)?;
        ensure!(
            !outcome.contains("status 200") && outcome != "taken" && outcome != "open",
            "{case}: {outcome}"
        );
    }
    held.finish()?;
    Ok(())
}

#[test]
fn a_peer_that_stops_reading_is_held_at_a_bound() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let (outcome, _) = attack(&scene, "stop-reading")?;
    let held = outcome
        .strip_prefix("held at ")
        .and_then(|rest| rest.strip_suffix(" MiB"));
    let megabytes: u32 = held.with_context(|| outcome.clone())?.parse()?;
    ensure!(megabytes <= 32, "it took {megabytes} MiB");
    scene.ping("shop/client", SERVICE)?;
    Ok(())
}
