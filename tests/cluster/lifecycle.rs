//! Restarts, upgrades and losses, with new connections and held ones all the while. Each test that concerns the mesh itself has
//! the cluster to itself.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{
    cluster::bed::{Bed, SYSTEM, Traffic, alone, shared},
    until,
};

use crate::scene::{Scene, Start, pod, service};

/// New connections a second, and held ones, while something restarts.
const RATE: u32 = 50;
const HELD: u32 = 50;

/// Load on the server by pod address, which must come through whatever happens in between.
struct Load {
    new: Traffic,
    held: Traffic,
}

impl Load {
    fn start(scene: &Scene<'_>) -> Result<Self> {
        let (client, server) = (scene.pod("client"), scene.at("server", 8080)?);
        let bed = scene.bed;
        bed.eventually("the client reaches the server by HBONE", || {
            bed.ping(&client, &server)?;
            let log = bed.ztunnel_log(bed.node(1))?;
            rig::holds(&log, scene.identity("client"))
        });
        Ok(Self {
            new: bed.new_connections(&client, &server, RATE)?,
            held: bed.held_connections(&client, &server, HELD)?,
        })
    }

    /// Ends the load: an error if one new connection failed, or one held was cut before its tunnel's grace was over.
    fn lived_through_grace(self) -> Result<()> {
        let held = self.held.lives();
        let made = self.new.none_failed(u64::from(RATE))?;
        let (total, first_cut) = held?;
        ensure!(total == u64::from(HELD), "some were not held");
        if let Some(life) = first_cut {
            // The load began before the restart, and tells its own time.
            ensure!(
                life > GRACE,
                "a connection was cut {life:?} after its start"
            );
        }
        eprintln!("{made} new connections, none failed; first held one cut after {first_cut:?}");
        Ok(())
    }

    /// Ends the load: an error if one connection failed or was cut.
    fn came_through(self) -> Result<()> {
        // Both are ended before either is judged.
        let held = self.held.none_cut();
        let made = self.new.none_failed(u64::from(RATE))?;
        ensure!(held? == u64::from(HELD), "some were not held");
        eprintln!("{made} new connections, {HELD} held: none failed, none cut");
        Ok(())
    }
}

fn restart(bed: &Bed, part: &str) -> Result<()> {
    bed.kube()
        .run(&["-n", SYSTEM, "rollout", "restart", part])?;
    bed.kube().rolled_out(SYSTEM, part, 120)
}

#[test]
fn a_restart_of_the_agents_disturbs_no_connection_and_no_probe() -> Result<()> {
    let (_turn, bed) = alone()?;
    let scene = Scene::start(bed, "agents", Start::InMesh)?;
    let load = Load::start(&scene)?;
    restart(bed, "daemonset/istio-cni-node")?;
    load.came_through()?;
    let server = scene.object("pod", "server")?;
    ensure!(
        server["status"]["containerStatuses"][0]["ready"] == true,
        "{server}"
    );
    // The new agents take pods in as the old ones did.
    joins(&scene, "client-after")
}

/// How long a tunnel that is told to end serves its open connections by default: the chart's 30 s, less its own end.
const GRACE: Duration = Duration::from_secs(20);

#[test]
fn a_restart_of_the_node_tunnels_refuses_no_connection_and_cuts_none_in_their_grace() -> Result<()>
{
    let (_turn, bed) = alone()?;
    let scene = Scene::start(bed, "tunnels", Start::InMesh)?;
    let load = Load::start(&scene)?;
    let began = Instant::now();
    restart(bed, "daemonset/ztunnel")?;
    joins(&scene, "client-after")?;
    load.lived_through_grace()?;
    eprintln!("restarted in {:.1?}", began.elapsed());
    Ok(())
}

#[test]
fn an_upgrade_of_every_part_refuses_no_connection_and_cuts_none_in_their_grace() -> Result<()> {
    let (_turn, bed) = alone()?;
    let scene = Scene::start(bed, "upgrade", Start::InMesh)?;
    let load = Load::start(&scene)?;
    // Another annotation on every part's pods: each rolls, one by one.
    let values =
        ["istiod", "cni", "ztunnel"].map(|part| format!("{part}.podAnnotations.upgraded=again"));
    let values: Vec<&str> = values.iter().map(String::as_str).collect();
    bed.helm(&values)?;
    for part in [
        "deployment/istiod",
        "daemonset/istio-cni-node",
        "daemonset/ztunnel",
    ] {
        bed.kube().rolled_out(SYSTEM, part, 120)?;
    }
    joins(&scene, "client-after")?;
    load.lived_through_grace()
}

#[test]
fn a_roll_out_of_the_server_fails_no_new_connection() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "rollout", Start::InMesh)?;
    scene.apply(&deployment("server", bed.node(1)))?;
    let namespace = scene.namespace.as_str();
    bed.kube().rolled_out(namespace, "deployment/server", 120)?;
    // Only the Deployment's pods are behind the service.
    scene.apply(&service("server", 80, 8080).replace("app: server", "app: rolled"))?;
    let (client, address) = (scene.pod("client"), scene.service());
    bed.eventually("the client reaches the service", || {
        bed.ping(&client, &address)
    });
    let new = bed.new_connections(&client, &address, 25)?;
    bed.kube()
        .run(&["-n", namespace, "rollout", "restart", "deployment/server"])?;
    bed.kube()
        .rolled_out(namespace, "deployment/server", 120)
        .with_context(|| bed.evidence())?;
    bed.eventually("the old pods are gone", || {
        let line = ["pods", "-n", namespace, "-l", "app=rolled"];
        let pods = bed.kube().json(&line)?;
        let count = pods["items"].as_array().map_or(0, Vec::len);
        ensure!(count == 2, "{count} pods");
        Ok(())
    });
    let made = new.none_failed(25)?;
    eprintln!("{made} new connections, none failed");
    Ok(())
}

/// Two servers that go on for some seconds when they are told to end, as who rolls out without loss lets them.
fn deployment(account: &str, node: &str) -> String {
    format!(
        "---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {account}}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: rolled}}}}
  template:
    metadata: {{labels: {{app: rolled}}}}
    spec:
      serviceAccountName: {account}
      nodeSelector: {{kubernetes.io/hostname: {node}}}
      terminationGracePeriodSeconds: 12
      containers:
      - name: main
        image: leyline.dev/tests:dev
        command: [load, serve, '[::]:8080']
        readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
        lifecycle: {{preStop: {{sleep: {{seconds: 10}}}}}}
"
    )
}

#[test]
fn an_uninstall_leaves_pods_with_their_network_and_refuses_no_connection() -> Result<()> {
    let (_turn, bed) = alone()?;
    let scene = Scene::start(bed, "uninstall", Start::InMesh)?;
    let (client, server) = (scene.pod("client"), scene.at("server", 8080)?);
    bed.eventually("the client reaches the server", || {
        bed.ping(&client, &server)
    });
    let new = bed.new_connections(&client, &server, RATE)?;
    bed.uninstall()?;
    let made = new.none_failed(u64::from(RATE));
    let after = bed.ping(&client, &server);
    let policies = bed.kube().run(&["get", "authorizationpolicies", "-A"]);
    // The other tests need the mesh, however this one ended.
    bed.install(&[])?;
    eprintln!("{} new connections, none failed", made?);
    after?;
    // The definitions of custom resources stay, and the user's objects with them.
    policies.map(drop)
}

#[test]
fn without_its_control_plane_the_mesh_goes_on_and_later_catches_up() -> Result<()> {
    let (_turn, bed) = alone()?;
    let scene = Scene::start(bed, "headless-mesh", Start::InMesh)?;
    let scale = |replicas: &str| {
        let replicas = format!("--replicas={replicas}");
        bed.kube()
            .run(&["-n", SYSTEM, "scale", "deployment/istiod", &replicas])
    };
    let load = Load::start(&scene)?;
    has_certificate(&scene, "intruder");
    // An autoscaler leaves a Deployment of no replicas alone.
    scale("0")?;
    bed.eventually("the control plane is gone", || {
        let pods = bed
            .kube()
            .json(&["pods", "-n", SYSTEM, "-l", "app=istiod"])?;
        ensure!(
            pods["items"].as_array().is_some_and(Vec::is_empty),
            "it runs"
        );
        Ok(())
    });
    // New connections of pods that had not spoken before go on, too.
    bed.ping(&scene.pod("intruder"), &scene.service())?;
    scale("1")?;
    bed.kube().rolled_out(SYSTEM, "deployment/istiod", 120)?;
    joins(&scene, "client-after")?;
    load.came_through()
}

#[test]
fn without_the_api_server_or_etcd_the_mesh_goes_on() -> Result<()> {
    let (_turn, bed) = alone()?;
    let Some(rig) = bed.rig("without_the_api_server_or_etcd_the_mesh_goes_on") else {
        return Ok(());
    };
    let scene = Scene::start(bed, "no-api", Start::InMesh)?;
    let load = Load::start(&scene)?;
    has_certificate(&scene, "intruder");
    let server = scene.at("server", 8080)?;
    let in_pod = |seconds: &str| {
        let line = [
            "load",
            "connect",
            &server,
            "--seconds",
            seconds,
            "--rate",
            "20",
        ];
        bed.spawn(&scene.pod("intruder"), &line)
    };
    let meanwhile = in_pod("8")?;
    rig.parts().kill("apiserver")?;
    rig.parts().kill("etcd")?;
    let result: serde_json::Value = serde_json::from_str(meanwhile.finish()?.trim())?;
    ensure!(
        result["failed"] == 0,
        "while the API server was down: {result}"
    );
    rig.parts().restart("etcd")?;
    rig.parts().restart("apiserver")?;
    // How long Kubernetes takes to start is none of the mesh's promises.
    until(Duration::from_secs(120), || {
        bed.kube().run(&["get", "--raw", "/readyz"])
    })
    .context("the API server is not back")?;
    joins(&scene, "client-after")?;
    load.came_through()
}

#[test]
fn a_node_that_lost_power_serves_again() -> Result<()> {
    let (_turn, bed) = alone()?;
    let Some(rig) = bed.rig("a_node_that_lost_power_serves_again") else {
        return Ok(());
    };
    let scene = Scene::start(bed, "power", Start::InMesh)?;
    // By name, and so by IPv6.
    bed.eventually("the client reaches the server", || {
        bed.ping(&scene.pod("client"), &scene.service())
    });
    rig.kill_node(bed.node(1))?;
    let began = Instant::now();
    rig.boot_node(bed.node(1))?;
    let client = scene.pod("client");
    // Most of it is the node's own start.
    until(Duration::from_secs(180), || {
        let server = scene.at("server", 8080)?;
        bed.ping(&client, &server)?;
        let log = bed.ztunnel_log(bed.node(1))?;
        rig::holds(&log, scene.identity("client"))
    })
    .with_context(|| bed.evidence())?;
    eprintln!(
        "served again {:.1} s after power",
        began.elapsed().as_secs_f64()
    );
    bed.eventually("the client reaches the server by name", || {
        bed.ping(&client, &scene.service())
    });
    Ok(())
}

/// Waits until the first node's tunnel has a certificate for an account, which it asks for when the account's pod joins.
#[track_caller]
fn has_certificate(scene: &Scene<'_>, account: &str) {
    let bed = scene.bed;
    bed.eventually(&format!("{account} has a certificate"), || {
        let (_, found) =
            bed.ask_leyline(&["ztunnel-config", "certificate", "--node", bed.node(0)])?;
        let identity = scene.identity(account);
        let all = found.as_array().context("a list of certificates")?;
        let its = all.iter().find(|it| it["identity"] == identity);
        let its = its.with_context(|| format!("{identity} is not in {found:#}"))?;
        let chain = its["certChain"].as_array().map_or(0, Vec::len);
        ensure!(chain > 0, "{its:#}");
        Ok(())
    });
}

/// A pod that starts now joins, and reaches the server with its identity.
fn joins(scene: &Scene<'_>, name: &str) -> Result<()> {
    let bed = scene.bed;
    scene.apply(&pod(name, bed.node(0), "[leyline, tool, echo, '9000']", ""))?;
    scene.ready(&[name])?;
    scene.joined(&[name])?;
    bed.eventually(&format!("{name} reaches the server"), || {
        bed.ping(&scene.pod(name), &scene.service())
    });
    scene.access_line(bed.node(1), &[name, &scene.identity("client")]);
    Ok(())
}
