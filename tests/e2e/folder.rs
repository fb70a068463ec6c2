//! Editing the folder changes the running mesh, and a mistake in it changes nothing but the status.

use anyhow::{Result, ensure};
use rig::{holds, yaml::idle_pod};

use crate::scene::{DENY_INTRUDER, INTRUDER, SERVICE, Scene, Shop};

#[test]
fn a_pod_that_is_added_runs_and_joins_and_one_that_is_removed_goes() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene
        .mesh
        .write("late.yaml", &idle_pod("shop", "late", "node1"))?;
    scene.mesh.eventually("the new pod is in the mesh", || {
        scene.enrolment("shop/late", "yes")
    });
    scene
        .mesh
        .eventually("it reaches the server", || scene.ping("shop/late", SERVICE));
    scene.access_line("node2", &["spiffe://cluster.local/ns/shop/sa/late"]);
    scene.mesh.remove("late.yaml")?;
    scene.mesh.eventually("it is gone", || {
        ensure!(scene.mesh.pod("shop/late").is_err(), "still there");
        Ok(())
    });
    Ok(())
}

#[test]
fn an_unknown_field_is_named_with_its_place_and_the_last_good_state_stays() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.mesh.write("policy.yaml", DENY_INTRUDER)?;
    scene.mesh.eventually("the intruder is refused", || {
        scene.refused("shop/intruder", SERVICE)
    });
    let typo = DENY_INTRUDER.replace("from:", "form:");
    scene.mesh.write("policy.yaml", &typo)?;
    scene
        .mesh
        .eventually("status names file, line and field", || {
            let status = scene.mesh.status()?.to_string();
            holds(&status, "policy.yaml")?;
            holds(&status, "form")
        });
    // An ALLOW for all would be what remains of the rule: the old policy must still hold.
    scene.refused("shop/intruder", SERVICE)?;
    scene.mesh.remove("policy.yaml")?;
    scene
        .mesh
        .eventually("removing the file removes the policy", || {
            scene.ping("shop/intruder", SERVICE)
        });
    Ok(())
}

#[test]
fn malformed_yaml_is_named_with_its_line_and_the_last_good_state_stays() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, DENY_INTRUDER)?;
    scene.refused("shop/intruder", SERVICE)?;
    scene.mesh.write(
        "extra.yaml",
        &format!("{DENY_INTRUDER}\n---\nkind: [unclosed\n  more: {{\n"),
    )?;
    scene.mesh.eventually("status names file and line", || {
        let status = scene.mesh.status()?.to_string();
        holds(&status, "extra.yaml:")
    });
    scene.refused("shop/intruder", SERVICE)?;
    scene.ping("shop/client", SERVICE)?;
    scene.access_line("node2", &[INTRUDER, "shop/no-intruder"]);
    Ok(())
}
