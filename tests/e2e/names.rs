//! Names as a pod's own settings have them resolved.

use anyhow::{Result, ensure};
use rig::yaml::idle_pod;

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
