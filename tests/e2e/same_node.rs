//! Two pods of one node: from socket to socket once a tunnel has shown the way, under the same policies.

use anyhow::{Context, Result, ensure};
use rig::{NODES, Options, holds, process, yaml::idle_pod};

use crate::scene::{SERVICE, Scene, Shop};

const NEAR: &str = "spiffe://cluster.local/ns/shop/sa/near";

const NOT_NEAR: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: not-near, namespace: shop }
spec:
  action: DENY
  rules: [{ from: [{ source: { principals: ['*/sa/near'] } }] }]
";

/// With a client that runs where the server does.
fn start(options: &Options) -> Result<Scene> {
    let near = idle_pod("shop", "near", "node2");
    let scene = Scene::start_with(Shop::InMesh, &near, options)?;
    scene.mesh.eventually("the neighbour is in the mesh", || {
        scene.enrolment("shop/near", "yes")
    });
    Ok(scene)
}

/// As [`start`], and it was met.
fn scene() -> Result<Scene> {
    let scene = start(&Options::default())?;
    scene
        .mesh
        .eventually("the neighbour is met within the node", || {
            scene.ping("shop/near", SERVICE)?;
            met_within(&scene)
        });
    Ok(scene)
}

/// An error unless both ends of a connection of the neighbour are told to have stayed within the node.
fn met_within(scene: &Scene) -> Result<()> {
    let metrics = scene.mesh.metrics("node2")?;
    for reporter in ["source", "destination"] {
        let counted = |line: &&str| {
            line.starts_with("istio_tcp_connections_opened_total{")
                && line.contains(&format!("reporter=\"{reporter}\""))
                && line.contains("connection_security_policy=\"same_node\"")
                && line.contains(&format!("source_principal=\"{NEAR}\""))
        };
        let found = metrics.lines().find(counted);
        found.with_context(|| format!("the {reporter} tells of none"))?;
    }
    Ok(())
}

#[test]
fn neighbours_meet_within_the_node_and_others_in_tunnels() -> Result<()> {
    let scene = scene()?;
    scene.ping("shop/client", SERVICE)?;
    let line = scene.access_line("node2", &["sa/client", "inbound"]);
    holds(&line, "bytes_")?;
    let metrics = scene.mesh.metrics("node2")?;
    let wrong = metrics
        .lines()
        .find(|line| line.contains("same_node") && line.contains("sa/client"));
    ensure!(wrong.is_none(), "{wrong:?}");
    Ok(())
}

#[test]
fn where_the_switch_is_off_neighbours_meet_in_tunnels_too() -> Result<()> {
    const CONNECTIONS: usize = 10;
    let tunnels = NODES.map(|node| (node, None));
    let (_folder, options) = Options::prepared("export LEYLINE_SAME_NODE=false", &tunnels)?;
    let scene = start(&options)?;
    // One would do to have the way looked at, where the switch is on.
    scene
        .mesh
        .eventually("the neighbour has connected often", || {
            scene.ping("shop/near", SERVICE)?;
            let log = scene.mesh.logs("ztunnel-node2")?;
            let of_near = |line: &&str| line.contains(NEAR) && line.contains("inbound");
            let count = log.lines().filter(of_near).count();
            ensure!(count >= CONNECTIONS, "{count} connections");
            Ok(())
        });
    let metrics = scene.mesh.metrics("node2")?;
    let tunnelled = |line: &str| line.contains(NEAR) && line.contains("\"mutual_tls\"");
    ensure!(metrics.lines().any(tunnelled), "{metrics}");
    ensure!(
        !metrics.contains("\"same_node\""),
        "the switch is passed over"
    );
    Ok(())
}

#[test]
fn a_policy_refuses_and_cuts_a_neighbour_by_name() -> Result<()> {
    let scene = scene()?;
    let held = scene.hold("shop/near")?;
    scene.mesh.write("policy.yaml", NOT_NEAR)?;
    held.cut(&scene);
    scene.mesh.eventually("the neighbour is refused", || {
        scene.refused("shop/near", SERVICE)
    });
    let line = scene.access_line("node2", &[NEAR, "inbound", "error="]);
    holds(&line, "shop/not-near")?;
    scene.mesh.remove("policy.yaml")?;
    scene.mesh.eventually("without the policy it connects", || {
        scene.ping("shop/near", SERVICE)
    });
    Ok(())
}

#[test]
fn what_the_network_between_forbids_is_forbidden_within_the_node() -> Result<()> {
    let scene = scene()?;
    // What a NetworkPolicy does: nothing for HBONE comes in over the server's interface any more.
    let rules = "table inet test { chain arriving { type filter hook input priority -300; \
                 iifname != lo tcp dport 15008 reject with tcp reset; }; }";
    process::in_network_of(&scene.mesh, "shop/server", &["nft", rules])?;
    scene
        .mesh
        .eventually("no new connection passes within the node", || {
            scene.refused("shop/near", SERVICE)
        });
    Ok(())
}

#[test]
fn a_name_asked_for_over_socks5_is_met_within_the_node_too() -> Result<()> {
    let socks5 = "export UNSTABLE_ENABLE_SOCKS5=true";
    let (_folder, options) = Options::prepared(socks5, &[("node2", None)])?;
    let near = idle_pod("shop", "near", "node2");
    let scene = Scene::start_with(Shop::InMesh, &near, &options)?;
    scene.mesh.eventually("the neighbour is in the mesh", || {
        scene.enrolment("shop/near", "yes")
    });
    let ask = [&scene.load, "socks", "127.0.0.1:15080", SERVICE];
    scene
        .mesh
        .eventually("the neighbour is met within the node", || {
            scene.mesh.json("shop/near", &ask)?;
            met_within(&scene)
        });
    scene.mesh.write("policy.yaml", NOT_NEAR)?;
    scene.mesh.eventually("the neighbour is refused", || {
        let asked = scene.mesh.exec("shop/near", &ask)?;
        ensure!(!asked.status.success(), "it is let in");
        Ok(())
    });
    Ok(())
}
