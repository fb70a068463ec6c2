//! Pods' TCP crosses the mesh: by service, pod address and name, over IPv4 and IPv6, whole and faithful.

use anyhow::Result;
use rig::holds;

use crate::scene::{CLIENT, SERVER, SERVICE, Scene, Shop};

#[test]
fn both_ends_log_both_identities() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.ping("shop/client", SERVICE)?;
    for (node, direction) in [("node1", "outbound"), ("node2", "inbound")] {
        let line = scene.access_line(node, &[&format!("direction=\"{direction}\""), CLIENT]);
        holds(&line, format!("dst.identity=\"{SERVER}\""))?;
        holds(&line, "connection complete")?;
    }
    Ok(())
}

#[test]
fn every_way_to_name_the_server_reaches_it_through_the_tunnel() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let pod = scene.mesh.pod_ips("shop/server")?;
    let mut addresses: Vec<String> = pod
        .iter()
        .map(|ip| std::net::SocketAddr::new(*ip, 9001).to_string())
        .collect();
    assert_eq!(
        addresses.len(),
        2,
        "a pod has an IPv4 and an IPv6 address: {addresses:?}"
    );
    addresses.extend(
        [
            "server:9000",
            "server.shop:9000",
            "server.shop.svc:9000",
            SERVICE,
        ]
        .map(str::to_owned),
    );
    for address in addresses {
        let before = tunnelled(&scene)?;
        scene.ping("shop/client", &address)?;
        scene
            .mesh
            .eventually(&format!("{address} went through the tunnel"), || {
                anyhow::ensure!(tunnelled(&scene)? > before, "no new line");
                Ok(())
            });
    }
    Ok(())
}

fn tunnelled(scene: &Scene) -> Result<usize> {
    let log = scene.mesh.logs("ztunnel-node2")?;
    Ok(log
        .lines()
        .filter(|line| line.contains("direction=\"inbound\"") && line.contains(CLIENT))
        .count())
}

#[test]
fn large_and_small_messages_arrive_whole() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    for size in ["1", "1400", "65537", "1000000"] {
        let command = [
            &scene.load,
            "ping",
            SERVICE,
            "--count",
            "20",
            "--size",
            size,
        ];
        scene.mesh.json("shop/client", &command)?;
    }
    // The server answers how many bytes it got after the client's half is closed: a half-close both ways.
    let stream = scene.mesh.json(
        "shop/client",
        &[
            &scene.load,
            "stream",
            SERVICE,
            "--flows",
            "8",
            "--seconds",
            "1",
        ],
    )?;
    assert!(stream["bytes"].as_u64() > Some(1 << 20), "{stream}");
    Ok(())
}

#[test]
fn a_pod_outside_the_mesh_is_reached_in_plain_and_reaches_in() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.ping("shop/client", "plain.outside:9000")?;
    scene.ping("outside/stranger", "server.shop:9000")?;
    let line = scene.access_line(
        "node2",
        &["src.workload=\"stranger\"", "direction=\"inbound\""],
    );
    assert!(
        !line.contains("src.identity"),
        "plaintext shows no identity: {line}"
    );
    Ok(())
}

#[test]
fn a_refused_connection_is_an_error_at_the_client_and_is_logged() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let nobody = scene.at("shop/server", 9999)?;
    scene.refused("shop/client", &nobody)?;
    let line = scene.access_line("node1", &["9999", "error="]);
    holds(&line, "outbound")?;
    // And the next connection is unharmed.
    scene.ping("shop/client", SERVICE)?;
    Ok(())
}

#[test]
fn counters_agree_with_the_bytes_sent() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let before = received(&scene, "node2")?;
    scene.mesh.json(
        "shop/client",
        &[
            &scene.load,
            "ping",
            SERVICE,
            "--count",
            "100",
            "--size",
            "1000",
        ],
    )?;
    // One byte of mode, one exchange to warm up and a hundred counted ones.
    let sent = 1 + 101 * 1000;
    scene
        .mesh
        .eventually("the counter has grown by what was sent", || {
            let grown = received(&scene, "node2")? - before;
            anyhow::ensure!(grown == sent, "{grown} instead of {sent}");
            Ok(())
        });
    Ok(())
}

/// Request bytes that the client's identity has sent to the server, as the node's tunnel counts them.
fn received(scene: &Scene, node: &str) -> Result<u64> {
    let text = scene.mesh.metrics(node)?;
    let series = text.lines().filter(|line| {
        line.starts_with("istio_tcp_received_bytes_total{")
            && line.contains("reporter=\"destination\"")
            && line.contains(&format!("source_principal=\"{CLIENT}\""))
    });
    Ok(series
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum())
}

/// A node tunnel is a workload, too: whoever may reach it reads its metrics from anywhere in the mesh.
#[test]
fn a_tunnels_metrics_are_read_through_hbone() -> Result<()> {
    // The second node's, whose pod is no object in this kind of mesh.
    let entry = "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: { name: ztunnel-node2, namespace: istio-system, labels: { networking.istio.io/tunnel: http } }
spec: { address: 10.100.0.12, serviceAccount: ztunnel }
";
    let scene = Scene::start(Shop::InMesh, entry)?;
    let web = scene.mesh.install(env!("CARGO_BIN_EXE_web"))?;
    let url = "http://10.100.0.12:15020/metrics";
    scene.mesh.eventually("the metrics come by HBONE", || {
        let answer = scene.mesh.succeed("shop/client", &[&web, "get", url])?;
        holds(&answer, "istio_build{component=")?;
        let line = "dst.identity=\"spiffe://cluster.local/ns/istio-system/sa/ztunnel\"";
        holds(&scene.mesh.logs("ztunnel-node1")?, line)
    });
    Ok(())
}
