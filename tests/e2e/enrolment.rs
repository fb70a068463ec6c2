//! Joining and leaving: live, and without breaking one open connection or one new one.

use anyhow::{Result, ensure};
use rig::Running;

use crate::scene::{SERVICE, Scene, Shop};

/// Longer than joining, leaving and its grace together.
const EXCHANGES: &str = "2400";

/// Load that lasts some 24 s: 50 connections held, each used twice a second, and 100 new ones a second.
struct Load {
    held: Running,
    new: Running,
    pair: String,
}

impl Load {
    fn start(scene: &Scene, from: &str, to: &str) -> Result<Self> {
        let held = [
            &scene.load,
            "ping",
            to,
            "--connections",
            "50",
            "--rate",
            "100",
            "--count",
            EXCHANGES,
        ];
        let new = [
            &scene.load,
            "connect",
            to,
            "--seconds",
            "24",
            "--parallel",
            "10",
            "--rate",
            "100",
        ];
        let pair = format!("{from} to {to}");
        Ok(Self {
            held: scene.mesh.spawn(from, &held)?,
            new: scene.mesh.spawn(from, &new)?,
            pair,
        })
    }

    fn finish(self) -> Result<()> {
        let pair = self.pair;
        self.held
            .finish()
            .map_err(|error| error.context(format!("held connections, {pair}")))?;
        let new: serde_json::Value = serde_json::from_str(&self.new.finish()?)?;
        ensure!(new["failed"] == 0, "new connections, {pair}: {new}");
        // At least a tenth of what was asked for: a busy machine makes fewer.
        ensure!(
            new["connections"].as_u64() > Some(240),
            "too few connections to tell, {pair}: {new}"
        );
        Ok(())
    }
}

#[test]
fn joining_and_leaving_lose_no_connection() -> Result<()> {
    let scene = Scene::start(Shop::Outside, "")?;
    // Within the namespace that joins, out of it, and into it.
    let loads = [
        Load::start(&scene, "shop/client", SERVICE)?,
        Load::start(&scene, "shop/intruder", "plain.outside:9000")?,
        Load::start(&scene, "outside/stranger", "server.shop:9000")?,
    ];
    scene.mesh.eventually("the client reaches the server", || {
        scene.ping("shop/client", SERVICE)
    });
    scene
        .mesh
        .label("shop", "istio.io/dataplane-mode=ambient")?;
    scene.joined(&["shop/client", "shop/server", "shop/intruder"]);
    scene.mesh.label("shop", "istio.io/dataplane-mode-")?;
    for pod in ["shop/client", "shop/server", "shop/intruder"] {
        scene
            .mesh
            .eventually(&format!("{pod} has left"), || scene.enrolment(pod, "no"));
    }
    for load in loads {
        load.finish()?;
    }
    Ok(())
}

#[test]
fn leaving_takes_every_rule_and_listener_away() -> Result<()> {
    let scene = Scene::start(Shop::Outside, "")?;
    let listeners = || {
        scene
            .mesh
            .succeed("shop/client", &["cat", "/proc/net/tcp", "/proc/net/tcp6"])
    };
    // Port 15001 in the notation of /proc/net/tcp, listening.
    let tunnel = |text: &str| {
        text.lines()
            .any(|line| line.contains(":3A99 ") && line.contains(" 0A "))
    };
    assert!(!tunnel(&listeners()?));
    scene
        .mesh
        .label("shop", "istio.io/dataplane-mode=ambient")?;
    scene.joined(&["shop/client", "shop/server"]);
    assert!(tunnel(&listeners()?));
    scene.mesh.label("shop", "istio.io/dataplane-mode-")?;
    // The listeners stay for a grace, for peers that have not heard yet.
    scene.mesh.eventually("the listeners are gone", || {
        ensure!(!tunnel(&listeners()?), "15001 still listens");
        Ok(())
    });
    scene.ping("shop/client", SERVICE)?;
    scene.refused("shop/client", &scene.at("shop/server", 9999)?)
}

#[test]
fn a_pod_joins_and_leaves_by_its_own_label() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene
        .mesh
        .label("outside/stranger", "istio.io/dataplane-mode=ambient")?;
    scene.mesh.eventually("the stranger has joined", || {
        scene.enrolment("outside/stranger", "yes")
    });
    scene.mesh.eventually("it speaks with its identity", || {
        scene.ping("outside/stranger", "server.shop:9000")?;
        rig::holds(
            &scene.mesh.logs("ztunnel-node2")?,
            "spiffe://cluster.local/ns/outside/sa/stranger",
        )
    });
    scene
        .mesh
        .label("shop/client", "istio.io/dataplane-mode=none")?;
    scene.mesh.eventually("the client has left", || {
        scene.enrolment("shop/client", "no")
    });
    scene.ping("shop/client", SERVICE)?;
    Ok(())
}
