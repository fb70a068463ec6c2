//! Other networks and other clusters: pods of another network behind the same API server are reached by global services through
//! our gateway between networks, and a cluster that is added by a Secret is known.

use anyhow::{Result, ensure};
use rig::{
    cluster::bed::{Bed, SYSTEM, alone},
    holds,
};

use crate::scene::{Scene, Start, pod, service};

/// In the other network, and the way into it.
const GATEWAY: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: east-west
  labels: {topology.istio.io/network: elsewhere}
  annotations: {networking.istio.io/service-type: ClusterIP}
spec:
  gatewayClassName: leyline-east-west
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
";

/// The control plane, told of several networks until the value goes.
struct Several<'a>(&'a Bed);

impl<'a> Several<'a> {
    fn allow(bed: &'a Bed) -> Result<Self> {
        bed.helm(&[
            "istiod.env.AMBIENT_ENABLE_MULTI_NETWORK=true",
            "global.enableReaderRBAC=true",
        ])?;
        let several = Self(bed);
        bed.kube().rolled_out(SYSTEM, "deployment/istiod", 120)?;
        Ok(several)
    }
}

impl Drop for Several<'_> {
    fn drop(&mut self) {
        let back = self
            .0
            .helm(&[])
            .and_then(|()| self.0.kube().rolled_out(SYSTEM, "deployment/istiod", 120));
        if let Err(error) = back {
            eprintln!("several networks stay allowed: {error:#}");
        }
    }
}

#[test]
fn another_network_is_reached_through_our_gateway_by_global_services_alone() -> Result<()> {
    let (_turn, bed) = alone()?;
    let scene = Scene::empty(bed, "networks", Start::InMesh)?;
    // Its node's tunnel takes what comes to its pods, whatever their network.
    let server = pod("server", bed.node(1), "[load, serve, '[::]:8080']", "").replacen(
        "labels: {",
        "labels: {topology.istio.io/network: elsewhere, ",
        1,
    );
    let client = pod("client", bed.node(0), "[leyline, tool, echo, '9000']", "");
    let global = service("server", 80, 8080).replacen(
        "name: server",
        "name: server, labels: {istio.io/global: 'true'}",
        1,
    );
    let hidden = service("server", 80, 8080).replacen("name: server", "name: hidden", 1);
    scene.apply(&[server, client, global, hidden, GATEWAY.to_owned()].concat())?;
    let _several = Several::allow(bed)?;
    scene.ready(&["client", "server"])?;
    scene.joined(&["client", "server"])?;
    scene.programmed("east-west")?;

    let client = scene.pod("client");
    bed.eventually("the other network answers", || {
        bed.ping(&client, &scene.service())
    });
    // The pod's own tunnel sees who asks, and the gateway what for.
    let inbound = scene.identity("client");
    scene.access_line(
        bed.node(1),
        &["direction=\"inbound\"", "connection complete", &inbound],
    );
    bed.eventually("the gateway tells of it", || {
        let line = ["-n", "networks", "logs", "deployment/east-west"];
        holds(&bed.kube().run(&line)?, "server.networks.svc.cluster.local")
    });
    bed.refused(&client, "hidden.networks.svc.cluster.local:80")?;
    a_cluster_that_is_added_is_known(bed)
}

/// Another cluster's name for this very one: its API server is asked once more, with its reader's rights.
fn a_cluster_that_is_added_is_known(bed: &Bed) -> Result<()> {
    let known = || bed.ask_leyline(&["remote-clusters"]);
    bed.eventually("no cluster is known", || {
        let (well, found) = known()?;
        ensure!(well && found == serde_json::json!([]), "{found:#}");
        Ok(())
    });
    let server = "https://kubernetes.default.svc";
    let made = ["create-remote-secret", "--name", "west", "--server", server];
    let secret = bed.leyline(&made)?;
    bed.kube().apply(&secret)?;
    bed.eventually("west is in sync", || {
        let (well, found) = known()?;
        let west = &found[0];
        ensure!(
            well && west["id"] == "west" && west["syncStatus"] == "synced",
            "{found:#}"
        );
        Ok(())
    });
    bed.kube().delete(&secret)?;
    bed.eventually("west is forgotten", || {
        let (_, found) = known()?;
        ensure!(found == serde_json::json!([]), "{found:#}");
        Ok(())
    });
    Ok(())
}
