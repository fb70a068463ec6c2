//! Parts that die and come back: what is open goes on where it can, and nothing is let in meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::{process, until};

use crate::scene::{DENY_INTRUDER, SERVICE, Scene, Shop};

#[test]
fn a_control_plane_that_dies_is_not_missed_and_catches_up() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, DENY_INTRUDER)?;
    let held = scene.hold("shop/client")?;
    scene.mesh.stop("controlplane")?;
    scene.ping("shop/client", SERVICE)?;
    scene.refused("shop/intruder", SERVICE)?;
    scene.mesh.remove("extra.yaml")?;
    scene.refused("shop/intruder", SERVICE)?;
    scene.mesh.resume("controlplane")?;
    scene
        .mesh
        .eventually("the change made meanwhile arrives", || {
            scene.ping("shop/intruder", SERVICE)
        });
    held.let_go()?;
    Ok(())
}

#[test]
fn an_agent_that_dies_disturbs_nothing_and_goes_on() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let held = scene.hold("shop/client")?;
    let new = [
        "connect",
        SERVICE,
        "--seconds",
        "5",
        "--parallel",
        "4",
        "--rate",
        "100",
    ];
    let new = scene
        .mesh
        .spawn("shop/client", &[&[scene.load.as_str()], &new[..]].concat())?;
    for agent in ["cni-agent-node1", "cni-agent-node2"] {
        scene.mesh.kill(agent)?;
    }
    held.let_go()?;
    let new: serde_json::Value = serde_json::from_str(&new.finish()?)?;
    ensure!(new["failed"] == 0, "{new}");
    scene
        .mesh
        .label("outside/stranger", "istio.io/dataplane-mode=ambient")?;
    scene.mesh.eventually("the new agent enrols", || {
        scene.enrolment("outside/stranger", "yes")
    });
    scene.mesh.eventually("and its pod is served", || {
        scene.ping("outside/stranger", "server.shop:9000")
    });
    Ok(())
}

#[test]
fn a_tunnel_that_dies_comes_back_with_its_pods() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, DENY_INTRUDER)?;
    for tunnel in ["ztunnel-node2", "ztunnel-node1"] {
        scene.mesh.kill(tunnel)?;
        scene
            .mesh
            .eventually(&format!("traffic flows again after {tunnel}"), || {
                scene.ping("shop/client", SERVICE)
            });
        scene.refused("shop/intruder", SERVICE)?;
    }
    Ok(())
}

#[test]
fn a_pod_whose_process_dies_is_started_again_and_stays_in_the_mesh() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.ping("shop/client", SERVICE)?;
    // With the container's first process all of it ends, and that may include who killed it before it can say so.
    scene
        .mesh
        .exec("shop/server", &["pkill", "-9", "-x", "load"])?;
    scene.mesh.eventually("the server answers again", || {
        scene.ping("shop/client", SERVICE)
    });
    scene.enrolment("shop/server", "yes")
}

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: strict, namespace: shop }
spec: { mtls: { mode: STRICT } }
";

/// The files that each role's processes have open.
fn files(scene: &Scene) -> Result<[usize; 2]> {
    let supervisor = scene.mesh.supervisor()?;
    let mut counts = [0; 2];
    for (role, count) in ["cni-agent", "ztunnel"].iter().zip(&mut counts) {
        for process in process::of_role(supervisor, role)? {
            *count += process.files()?;
        }
    }
    Ok(counts)
}

/// A part that was killed is started again, and a pod leaves only once its connections have: that takes seconds, and more
/// on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The server takes no plaintext, so whoever reaches it speaks with its identity.
#[test]
fn parts_killed_while_a_pod_joins_or_leaves_leave_nothing_behind() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, STRICT)?;
    scene.mesh.eventually("plaintext is refused", || {
        scene.refused("outside/stranger", SERVICE)
    });
    let before = files(&scene)?;
    for part in ["cni-agent-node1", "ztunnel-node1"] {
        scene
            .mesh
            .label("outside/stranger", "istio.io/dataplane-mode=ambient")?;
        scene.mesh.kill(part)?;
        until(PATIENCE, || {
            scene.enrolment("outside/stranger", "yes")?;
            scene.ping("outside/stranger", SERVICE)
        })
        .with_context(|| format!("the pod joins though {part} died"))?;
        scene
            .mesh
            .label("outside/stranger", "istio.io/dataplane-mode-")?;
        scene.mesh.kill(part)?;
        until(PATIENCE, || {
            scene.enrolment("outside/stranger", "no")?;
            scene.ping("outside/stranger", "plain.outside:9000")?;
            scene.refused("outside/stranger", SERVICE)
        })
        .with_context(|| format!("the pod leaves though {part} died"))?;
    }
    let unlistened = || {
        let sockets = ["cat", "/proc/net/tcp", "/proc/net/tcp6"];
        let sockets = scene.mesh.succeed("outside/stranger", &sockets)?;
        // Port 15001 in the notation of /proc/net/tcp.
        ensure!(!sockets.contains(":3A99 "), "{sockets}");
        Ok(())
    };
    until(PATIENCE, unlistened).context("no listener is left")?;
    scene.ping("outside/stranger", "plain.outside:9000")?;
    // Its tunnel was killed last, and comes back.
    scene.mesh.eventually("the client is served again", || {
        scene.ping("shop/client", SERVICE)
    });
    // What a process opens when it is first used stays; what it opens for a pod does not.
    const SLACK: usize = 12;
    until(PATIENCE, || {
        let now = files(&scene)?;
        let returned = now
            .iter()
            .zip(before)
            .all(|(now, then)| *now <= then + SLACK);
        ensure!(returned, "files: {before:?} before, {now:?} after");
        Ok(())
    })
}
