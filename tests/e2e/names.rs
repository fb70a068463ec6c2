//! Names as a pod's own settings have them resolved.

use anyhow::{Result, ensure};
use rig::yaml::{database, idle_pod};

use crate::scene::{SERVICE, Scene, Shop};

/// A pod that looks in another namespace too.
fn searching() -> String {
    let pod = idle_pod("shop", "searching", "node1");
    let settings = "  dnsConfig: { searches: [outside.svc.cluster.local] }\n  containers:";
    pod.replace("  containers:", settings)
}

#[test]
fn a_pods_own_search_domains_find_what_no_other_pod_finds() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, &searching())?;
    scene.mesh.eventually("the pod is in the mesh", || {
        scene.enrolment("shop/searching", "yes")
    });
    let plain = ["getent", "hosts", "plain"];
    scene.mesh.eventually("the short name is found", || {
        scene.mesh.succeed("shop/searching", &plain)
    });
    scene.ping("shop/searching", "plain:9000")?;
    let other = scene.mesh.exec("shop/client", &plain)?;
    ensure!(!other.status.success(), "a pod without settings finds it");
    // Its own namespace comes first still.
    scene.ping("shop/searching", "server:9000")?;
    scene.ping("shop/searching", SERVICE)?;
    Ok(())
}

/// A headless service with a port that has a name, and a host of elsewhere.
fn named_ports() -> String {
    let elsewhere = "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: api, namespace: shop }
spec:
  hosts: [api.example.org]
  addresses: [192.0.2.7]
  ports: [{ number: 443, name: tls, protocol: TLS }]
  location: MESH_EXTERNAL
  resolution: STATIC
  endpoints: [{ address: 192.0.2.8 }]
";
    database("shop") + elsewhere
}

/// A question for a port in hexadecimal digits, escaped for `printf`.
fn question(labels: &[&str]) -> String {
    let mut bytes = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00".to_vec();
    bytes.extend(wire_name(labels));
    bytes.extend(b"\x00\x21\x00\x01");
    bytes.iter().map(|it| format!("\\x{it:02x}")).collect()
}

fn wire_name(labels: &[&str]) -> Vec<u8> {
    let parts = labels.iter().flat_map(|it| {
        let length = u8::try_from(it.len()).expect("a label");
        [&[length], it.as_bytes()].concat()
    });
    parts.chain([0]).collect()
}

/// What a pod is answered, in hexadecimal digits; whom it asks does not matter, since the tunnel takes it.
fn answered(scene: &Scene, labels: &[&str]) -> Result<String> {
    let ask = format!(
        "exec 3<>/dev/udp/192.0.2.53/53; printf '{}' >&3; \
         dd bs=4096 count=1 status=none <&3 | od -An -v -tx1 | tr -d ' \\n'",
        question(labels)
    );
    let command = ["timeout", "10", "bash", "-c", &ask];
    scene.mesh.succeed("shop/client", &command)
}

#[test]
fn named_ports_of_services_are_found_wherever_the_service_comes_from() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, &named_ports())?;
    let rows: [(&[&str], u16, &str); 3] = [
        (
            &["_tcp", "_tcp", "server"],
            9000,
            "server.shop.svc.cluster.local",
        ),
        (
            &["_sql", "_tcp", "db"],
            9001,
            "db-0.db.shop.svc.cluster.local",
        ),
        (
            &["_tls", "_tcp", "api", "example", "org"],
            443,
            "api.example.org",
        ),
    ];
    for (question, port, target) in rows {
        let labels: Vec<_> = target.split('.').collect();
        // All of the weight, since there is one target.
        let mut place = vec![0, 0, 0, 100];
        place.extend(port.to_be_bytes());
        place.extend(wire_name(&labels));
        let place: String = place.iter().map(|it| format!("{it:02x}")).collect();
        scene.mesh.eventually(target, || {
            let told = answered(&scene, question)?;
            ensure!(told.contains(&place), "{target}: {told}");
            Ok(())
        });
    }
    Ok(())
}
