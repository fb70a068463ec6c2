//! The first thing a user does: label a namespace, and its pods speak mutual TLS.

use anyhow::{Result, ensure};
use rig::{cluster::bed::shared, holds};

use crate::scene::{Scene, Start};

#[test]
fn pods_of_a_labelled_namespace_reach_each_other_with_their_identities() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "connect", Start::InMesh)?;
    let (client, server) = (scene.identity("client"), scene.identity("server"));
    bed.eventually("the client reaches the service", || {
        bed.ping(&scene.pod("client"), &scene.service())
    });
    let line = scene.access_line(bed.node(1), &[&client, &server, "direction=\"inbound\""]);
    holds(&line, "dst.hbone_addr=")?;
    bed.ping(&scene.pod("client"), &scene.at("server", 8080)?)
}

#[test]
fn a_denied_identity_is_refused_by_the_policy_that_names_it() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "denied", Start::InMesh)?;
    let (client, intruder) = (scene.pod("client"), scene.pod("intruder"));
    bed.eventually("the intruder reaches the service before", || {
        bed.ping(&intruder, &scene.service())
    });
    scene.apply(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-intruder}
spec:
  action: DENY
  rules: [{from: [{source: {principals: ['*/sa/intruder']}}]}]
",
    )?;
    bed.eventually("the intruder is refused", || {
        bed.refused(&intruder, &scene.service())
    });
    bed.ping(&client, &scene.service())?;
    let line = scene.access_line(bed.node(1), &[&scene.identity("intruder"), "error="]);
    ensure!(line.contains("denied/no-intruder"), "{line}");
    Ok(())
}
