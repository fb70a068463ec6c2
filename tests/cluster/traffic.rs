//! The ways by which a pod may name a destination, and what crosses the wire.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use rig::cluster::{
    HOLDER, OUTSIDE_HOST,
    bed::{Bed, shared},
    plan::OUTSIDE_V4,
};
use serde_json::Value;

use crate::scene::{Scene, Start, pod, service};

#[test]
fn a_service_is_reached_by_vip_of_each_family_by_name_headless_and_by_pod() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "names", Start::InMesh)?;
    scene.apply(&service("server", 80, 8080).replace(
        "name: server}\nspec:",
        "name: headless}\nspec:\n  clusterIP: None",
    ))?;
    let found = scene.object("service", "server")?;
    let vips = found["spec"]["clusterIPs"]
        .as_array()
        .context("addresses")?;
    let mut addresses = vec![
        "server:80".to_owned(),
        "server.names:80".to_owned(),
        scene.service(),
        "headless.names.svc.cluster.local:8080".to_owned(),
        scene.at("server", 8080)?,
    ];
    for vip in vips.iter().filter_map(Value::as_str) {
        addresses.push(if vip.contains(':') {
            format!("[{vip}]:80")
        } else {
            format!("{vip}:80")
        });
    }
    for address in addresses {
        bed.eventually(&format!("{address} is reached"), || {
            bed.ping(&scene.pod("client"), &address)
        });
    }
    Ok(())
}

#[test]
fn a_captured_pod_reaches_itself_and_the_api_server() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "itself", Start::InMesh)?;
    let server = scene.pod("server");
    for address in [scene.at("server", 8080)?, scene.service()] {
        bed.eventually(&format!("a pod reaches itself at {address}"), || {
            bed.ping(&server, &address)
        });
    }
    // Who speaks plain HTTP to it is told so, by whichever address the name has.
    let url = "http://kubernetes.default.svc:443/";
    bed.eventually("the API server answers", || {
        let answer = bed
            .kube()
            .succeed(&server, &["leyline", "tool", "get", url])?;
        ensure!(answer.starts_with("400 "), "{answer}");
        Ok(())
    });
    Ok(())
}

#[test]
fn a_server_that_speaks_first_is_heard_and_udp_passes_untouched() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "first-words", Start::InMesh)?;
    let greeter = pod(
        "server-greeter",
        bed.node(1),
        "[load, greet, '[::]:8025']",
        "",
    );
    let datagrams = pod(
        "server-datagrams",
        bed.node(1),
        "[load, datagrams, '[::]:8053']",
        "",
    );
    scene.apply(&(greeter + &datagrams))?;
    scene.ready(&["server-greeter", "server-datagrams"])?;
    scene.joined(&["server-greeter", "server-datagrams"])?;
    let client = scene.pod("client");
    for (command, server, port) in [
        ("greeted", "server-greeter", 8025),
        ("datagram", "server-datagrams", 8053),
    ] {
        let address = scene.at(server, port)?;
        bed.eventually(&format!("{command} from {server}"), || {
            bed.kube().succeed(&client, &["load", command, &address])
        });
    }
    Ok(())
}

#[test]
fn a_service_entry_gives_an_outside_host_an_address_and_traffic_reaches_it() -> Result<()> {
    let (_turn, bed) = shared()?;
    let Some(rig) =
        bed.rig("a_service_entry_gives_an_outside_host_an_address_and_traffic_reaches_it")
    else {
        return Ok(());
    };
    let scene = Scene::start(bed, "entry", Start::InMesh)?;
    let program = rig::cluster::machine::beside("load")?;
    let mut serve = Command::new(program);
    serve.args(["serve", "[::]:7007"]);
    let _server = rig.on_network(HOLDER, || rig::Running::start(&mut serve))?;
    scene.apply(&format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside}}
spec:
  hosts: [entry.{OUTSIDE_HOST}]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 7000, targetPort: 7007, name: tcp, protocol: TCP}}]
  endpoints: [{{address: {OUTSIDE_V4}}}]
"
    ))?;
    let address = format!("entry.{OUTSIDE_HOST}:7000");
    bed.eventually("the entry's host is reached", || {
        bed.ping(&scene.pod("client"), &address)
    });
    // And the host itself, which no entry names, by the cluster's own DNS.
    bed.eventually("the outside host is reached", || {
        bed.ping(&scene.pod("client"), &format!("{OUTSIDE_HOST}:7007"))
    });
    // With the entry goes its address.
    let delete = ["-n", "entry", "delete", "serviceentry", "outside"];
    bed.kube().run(&delete)?;
    bed.eventually("the entry's host is not known any more", || {
        bed.refused(&scene.pod("client"), &address)
    });
    Ok(())
}

#[test]
fn service_entries_lead_to_their_endpoints_in_the_mesh_and_outside_it() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "endpoints", Start::InMesh)?;
    let apart = pod(
        "server-apart",
        bed.node(1),
        "[load, serve, '[::]:8080']",
        "",
    );
    scene.apply(&apart.replace("labels: {", "labels: {istio.io/dataplane-mode: none, "))?;
    scene.ready(&["server-apart"])?;
    let [inside, outside] = ["server", "server-apart"].map(|name| bed.pod_ip(&scene.pod(name)));
    let endpoint = format!("endpoints: [{{address: '{}'}}]", inside?);
    let entries = [
        entry("inline", &endpoint),
        entry("entries", "workloadSelector: {labels: {of: entries}}"),
        entry("pods", "workloadSelector: {labels: {app: server-apart}}"),
        entry("members", "workloadSelector: {labels: {app: server}}"),
    ];
    scene.apply(&format!(
        "---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: apart}}
spec: {{address: '{}', labels: {{of: entries}}}}
{}",
        outside?,
        entries.concat()
    ))?;
    let client = scene.pod("client");
    for name in ["inline", "entries", "pods", "members"] {
        let address = format!("{name}.endpoints.example:7000");
        bed.eventually(&format!("{name} leads to its endpoint"), || {
            bed.ping(&client, &address)
        });
    }
    // A pod that is in the mesh is reached as such, by whatever name.
    let outbound = [
        "direction=\"outbound\"",
        "members.endpoints.example",
        "dst.hbone_addr=",
    ];
    scene.access_line(bed.node(0), &outbound);
    Ok(())
}

/// A ServiceEntry of the mesh, by whose port 7000 port 8080 of its endpoints is reached.
fn entry(name: &str, endpoints: &str) -> String {
    format!(
        "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}}}
spec:
  hosts: [{name}.endpoints.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 7000, targetPort: 8080, name: tcp, protocol: TCP}}]
  {endpoints}
"
    )
}

#[test]
fn between_nodes_only_ciphertext_crosses_the_wire() -> Result<()> {
    let (_turn, bed) = shared()?;
    let Some(_) = bed.rig("between_nodes_only_ciphertext_crosses_the_wire") else {
        return Ok(());
    };
    let outside = seen(bed, "wire-outside", Start::Outside)?;
    ensure!(outside["marked"] != 0, "the eye sees nothing: {outside}");
    let inside = seen(bed, "wire-inside", Start::InMesh)?;
    ensure!(inside["marked"] == 0, "plaintext on the wire: {inside}");
    ensure!(
        inside["ports"]["15008"] != Value::Null,
        "no HBONE on the wire: {inside}"
    );
    Ok(())
}

/// What the wire between the nodes holds while a client sends a marked text to the server.
fn seen(bed: &Bed, name: &str, start: Start) -> Result<Value> {
    let rig = bed.rig("").context("the rig's own nodes")?;
    let scene = Scene::start(bed, name, start)?;
    let echo = pod(
        "server-echo",
        bed.node(1),
        "[leyline, tool, echo, '8007']",
        "",
    );
    scene.apply(&echo)?;
    scene.ready(&["server-echo"])?;
    if start == Start::InMesh {
        scene.joined(&["server-echo"])?;
    }
    let marker = format!("marked-{name}");
    let address = scene.at("server-echo", 8007)?;
    let client = scene.pod("client");
    let send = |text: &str| {
        let line = ["leyline", "tool", "send", &address, "--text", text];
        bed.kube().succeed(&client, &line).map(drop)
    };
    if start == Start::InMesh {
        // That a server has joined is known to the client's tunnel a moment after it is in the pod's annotation.
        bed.eventually("the client reaches the server by HBONE", || {
            send("before")?;
            rig::holds(&bed.ztunnel_log(bed.node(1))?, scene.identity("client"))
        });
    }
    let ends = [
        bed.pod_ip(&scene.pod("client"))?,
        bed.pod_ip(&scene.pod("server-echo"))?,
    ];
    let mut eye = Command::new(rig::leyline());
    eye.args([
        "tool",
        "capture",
        "--interface",
        "eth0",
        "--marker",
        &marker,
    ]);
    for end in ends {
        let bits = if end.contains(':') { 128 } else { 32 };
        eye.arg("--within").arg(format!("{end}/{bits}"));
    }
    let mut eye = rig.on_network(bed.node(1), || rig::Running::start(&mut eye))?;
    ensure!(eye.line()? == "watching", "the eye does not open");
    send(&marker)?;
    let text = eye.finish()?;
    serde_json::from_str(text.trim()).with_context(|| format!("capture printed {text:?}"))
}
