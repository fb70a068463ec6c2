//! Policy: who may connect, told by name, on new and on open connections; closed when in doubt.

use anyhow::{Result, ensure};
use rig::holds;

use crate::scene::{CLIENT, INTRUDER, SERVICE, Scene, Shop};

const ONLY_CLIENT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: only-client, namespace: shop }
spec:
  selector: { matchLabels: { app: server } }
  action: ALLOW
  rules:
    - from: [{ source: { principals: [cluster.local/ns/shop/sa/client] } }]
      to: [{ operation: { ports: ['9001'] } }]
";

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: strict, namespace: shop }
spec: { mtls: { mode: STRICT } }
";

#[test]
fn an_allowed_identity_connects_and_another_is_refused_by_name() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.ping("shop/intruder", SERVICE)?;
    scene.mesh.write("policy.yaml", ONLY_CLIENT)?;
    scene.mesh.eventually("the intruder is refused", || {
        scene.refused("shop/intruder", SERVICE)
    });
    scene.ping("shop/client", SERVICE)?;
    let line = scene.access_line("node2", &[INTRUDER, "error="]);
    holds(&line, "shop/only-client")?;
    scene.mesh.remove("policy.yaml")?;
    scene
        .mesh
        .eventually("without the policy it connects again", || {
            scene.ping("shop/intruder", SERVICE)
        });
    Ok(())
}

#[test]
fn a_policy_that_lands_cuts_open_connections_it_refuses_and_no_other() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let intruder = scene.hold("shop/intruder")?;
    let client = scene.hold("shop/client")?;
    scene.access_open(INTRUDER)?;
    scene.mesh.write("policy.yaml", ONLY_CLIENT)?;
    intruder.cut(&scene);
    let line = scene.access_line("node2", &[INTRUDER, "policy"]);
    holds(&line, "shop/only-client")?;
    client.let_go()
}

#[test]
fn a_label_that_brings_a_workload_under_a_policy_cuts_its_open_connections() -> Result<()> {
    let policy = ONLY_CLIENT.replace("app: server", "tier: guarded");
    let scene = Scene::start(Shop::InMesh, &policy)?;
    let intruder = scene.hold("shop/intruder")?;
    scene.access_open(INTRUDER)?;
    scene.mesh.label("shop/server", "tier=guarded")?;
    intruder.cut(&scene);
    Ok(())
}

#[test]
fn strict_refuses_plaintext_and_takes_mtls() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.ping("outside/stranger", "server.shop:9000")?;
    scene.mesh.write("strict.yaml", STRICT)?;
    scene.mesh.eventually("plaintext is refused", || {
        scene.refused("outside/stranger", "server.shop:9000")
    });
    scene.ping("shop/client", SERVICE)?;
    let line = scene.access_line("node2", &["src.workload=\"stranger\"", "error="]);
    holds(&line, "istio_converted_static_strict")
}

#[test]
fn a_permissive_port_under_strict_stays_open() -> Result<()> {
    let except = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: except, namespace: shop }
spec:
  selector: { matchLabels: { app: server } }
  mtls: { mode: STRICT }
  portLevelMtls: { 9001: { mode: PERMISSIVE } }
";
    let scene = Scene::start(Shop::InMesh, &format!("{STRICT}---{except}"))?;
    scene.ping("outside/stranger", "server.shop:9000")?;
    Ok(())
}

#[test]
fn deny_wins_over_allow() -> Result<()> {
    let deny = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: not-the-client, namespace: shop }
spec:
  action: DENY
  rules: [{ from: [{ source: { principals: ['*/sa/client'] } }] }]
";
    let scene = Scene::start(Shop::InMesh, ONLY_CLIENT)?;
    scene.mesh.write("deny.yaml", deny)?;
    scene.mesh.eventually("the client is refused", || {
        scene.refused("shop/client", SERVICE)
    });
    let line = scene.access_line("node2", &[CLIENT, "error="]);
    holds(&line, "shop/not-the-client")
}

#[test]
fn a_policy_that_cannot_be_translated_whole_denies_and_says_so() -> Result<()> {
    let bad = ONLY_CLIENT.replace(
        "source: { principals: [cluster.local/ns/shop/sa/client] }",
        "source: { ipBlocks: [10.0.0.0/99] }",
    );
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.mesh.write("policy.yaml", &bad)?;
    scene.mesh.eventually("everyone is refused", || {
        scene.refused("shop/client", SERVICE)
    });
    let (_, _, message) =
        scene
            .mesh
            .condition("AuthorizationPolicy", "shop/only-client", "ZtunnelAccepted")?;
    holds(&message, "10.0.0.0/99")
}

#[test]
fn a_waypoint_that_is_required_and_absent_closes_the_service() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.ping("shop/client", SERVICE)?;
    scene.mesh.label("shop", "istio.io/use-waypoint=nobody")?;
    scene.mesh.eventually("traffic is refused", || {
        scene.refused("shop/client", SERVICE)
    });
    let (status, _, message) =
        scene
            .mesh
            .condition("Service", "shop/server", "istio.io/WaypointBound")?;
    ensure!(status == "False", "{status}: {message}");
    holds(&message, "refused")
}
