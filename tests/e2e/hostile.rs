//! Bad input on 15008: refused or bounded, and other connections are unharmed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::{Running, holds, process};
use serde_json::Value;

use crate::scene::{SERVICE, Scene, Shop};

/// Runs one case from a pod that is outside the mesh, against the server's tunnel port; what came of it, and after how long.
fn attack(scene: &Scene, case: &str) -> Result<(String, Duration)> {
    outcome(&begin(scene, case, &scene.mesh.authority()?)?.finish()?)
}

/// Starts a case, and goes on. `ca`: the authority's file.
fn begin(scene: &Scene, case: &str, ca: &str) -> Result<Running> {
    let address = scene.at("shop/server", 15008)?;
    let authority = scene.at("shop/server", 9001)?;
    let command = [
        &scene.hostile,
        &address,
        case,
        "--ca",
        ca,
        "--authority",
        &authority,
    ];
    scene.mesh.spawn("outside/stranger", &command)
}

fn outcome(told: &str) -> Result<(String, Duration)> {
    let answer: Value = serde_json::from_str(told.trim()).with_context(|| told.to_owned())?;
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
    let told = ["connection failed", "GET ", "is no CONNECT to HOST:PORT"];
    for told in [&told[..], &["connection failed", "ip mismatch"]] {
        let line = scene.access_line("node2", told);
        holds(
            &line,
            "src.identity=\"spiffe://cluster.local/ns/hostile/sa/default\"",
        )?;
    }
    let counted = "leyline_connections_refused_total{reporter=\"destination\",\
        reason=\"invalid CONNECT request\",response_flags=\"CONNECT\"} 1";
    holds(&scene.mesh.metrics("node2")?, counted)?;
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
    for case in FLOODS {
        cut_off(case, &attack(&scene, case)?.0)?;
    }
    held.finish()?;
    Ok(())
}

const FLOODS: [&str; 5] = [
    "header-flood",
    "continuation-flood",
    "rapid-reset",
    "settings-flood",
    "ping-flood",
];

fn cut_off(case: &str, outcome: &str) -> Result<()> {
    ensure!(
        !outcome.contains("status 200") && outcome != "taken" && outcome != "open",
        "{case}: {outcome}"
    );
    Ok(())
}

/// Each of them alone sends a hundred megabytes, if it is let.
#[test]
fn many_floods_at_once_are_held_in_bounded_memory() -> Result<()> {
    const EACH: usize = 6;
    /// As much as one of each may hold, and no more for being many.
    const MOST: u64 = 30 << 20;
    let scene = Scene::start(Shop::InMesh, "")?;
    // What is resident then is also the code that they meet.
    for case in FLOODS {
        attack(&scene, case)?;
    }
    let tunnels = process::tunnels(scene.mesh.supervisor()?)?;
    let tunnel = tunnels.iter().find(|(node, _)| node == "node2");
    let growth = tunnel.context("the server's tunnel")?.1.growth()?;
    let ca = scene.mesh.authority()?;
    let mut begun = Vec::new();
    for case in FLOODS.repeat(EACH) {
        begun.push((case, begin(&scene, case, &ca)?));
    }
    for (case, attacking) in begun {
        cut_off(case, &outcome(&attacking.finish()?)?.0)?;
    }
    let held = growth()?;
    ensure!(held <= MOST, "the tunnel held {held} bytes more");
    scene.ping("shop/client", SERVICE)?;
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
