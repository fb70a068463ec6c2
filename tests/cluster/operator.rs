//! What an operator asks of a live cluster: `leyline check`, `explain` and `analyze`. `leyline install` is how the bed came to be.

use anyhow::{Context, Result, ensure};
use rig::cluster::bed::{Bed, shared};
use serde_json::Value;

use crate::scene::{Scene, Start};

#[test]
fn a_check_of_the_installed_mesh_passes_every_check_of_its_parts() -> Result<()> {
    let (_turn, bed) = shared()?;
    // API server; control plane, node tunnels, what they were sent, versions: each is looked at, and is well. Not at once: a test
    // before this one may have left a pod that is on its way out.
    bed.eventually("every check passes", || {
        let (well, found) = bed.ask_leyline(&["check"])?;
        ensure!(well && found["result"] != "fail", "{found:#}");
        let checks = found["checks"].as_array().context("a list of checks")?;
        for code in ["LEY-101", "LEY-201", "LEY-203", "LEY-204", "LEY-206"] {
            let check = checks.iter().find(|check| check["code"] == code);
            let check = check.with_context(|| format!("no {code} in {found:#}"))?;
            ensure!(check["result"] == "pass", "{check}");
        }
        Ok(())
    });
    Ok(())
}

#[test]
fn a_node_tunnel_holds_what_is_served() -> Result<()> {
    let (_turn, bed) = shared()?;
    let tunnel = format!("{}.istio-system", bed.daemon("ztunnel", bed.node(0))?);
    bed.eventually("nothing is held otherwise", || {
        let (well, found) = bed.ask_leyline(&["status", &tunnel])?;
        let proxies = found.as_array().context("a list of proxies")?;
        let compared = proxies
            .first()
            .is_some_and(|it| it["differences"] == serde_json::json!([]));
        ensure!(well && compared && proxies.len() == 1, "{found:#}");
        Ok(())
    });
    Ok(())
}

#[test]
fn an_explanation_names_the_policy_that_denies_and_says_what_traffic_meets() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "explained", Start::InMesh)?;
    allowed_by(&scene, "intruder", None);
    // Tunnels are told a moment later than who explains.
    bed.eventually("the intruder is served", || {
        bed.ping(&scene.pod("intruder"), &scene.service())
    });

    scene.apply(
        "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-intruder}
spec: {action: DENY, rules: [{from: [{source: {principals: ['*/sa/intruder']}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: clients}
spec: {action: ALLOW, rules: [{from: [{source: {principals: ['*/sa/client']}}]}]}
",
    )?;
    let denied = bed.eventually("the intruder is explained to be denied", || {
        let found = explain(bed, &scene, "intruder")?;
        ensure!(found["verdict"] == "DENY", "{found:#}");
        Ok(found)
    });
    let decider = &denied["decidedBy"];
    for (field, value) in [
        ("kind", "AuthorizationPolicy"),
        ("namespace", "explained"),
        ("name", "no-intruder"),
    ] {
        ensure!(decider[field] == value, "{field}: {denied:#}");
    }
    ensure!(denied["source"] == "explained/intruder", "{denied:#}");
    allowed_by(&scene, "client", Some("clients"));
    // Traffic meets what was told.
    bed.eventually("the intruder is refused", || {
        bed.refused(&scene.pod("intruder"), &scene.service())
    });
    bed.eventually("the client is served", || {
        bed.ping(&scene.pod("client"), &scene.service())
    });
    Ok(())
}

/// Waits until the explanation of `pod` to the server is ALLOW, by a policy where one decides.
#[track_caller]
fn allowed_by(scene: &Scene<'_>, pod: &str, policy: Option<&str>) {
    scene.bed.eventually(&format!("{pod} is allowed"), || {
        let found = explain(scene.bed, scene, pod)?;
        let name = found["decidedBy"]["name"].as_str();
        ensure!(found["verdict"] == "ALLOW" && name == policy, "{found:#}");
        Ok(())
    });
}

fn explain(bed: &Bed, scene: &Scene<'_>, pod: &str) -> Result<Value> {
    let (_, found) = bed.ask_leyline(&["explain", &scene.pod(pod), &scene.service()])?;
    Ok(found)
}

#[test]
fn an_analysis_finds_the_mistake_in_the_cluster_and_nothing_where_there_is_none() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::empty(bed, "analyzed", Start::InMesh)?;
    let analyze = || bed.ask_leyline(&["analyze", "--namespace", "analyzed"]);
    bed.eventually("nothing is found", || {
        let (well, found) = analyze()?;
        ensure!(well && found == serde_json::json!([]), "{found:#}");
        Ok(())
    });
    // No node tunnel can enforce a path, and this policy selects pods, so that no waypoint is asked to.
    scene.apply(
        "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: by-path}
spec: {selector: {matchLabels: {app: server}}, action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: bound, labels: {istio.io/use-waypoint: nowhere}}
spec: {ports: [{port: 80}]}
",
    )?;
    for (code, origin) in [
        ("LEY-A02", "AuthorizationPolicy by-path.analyzed"),
        ("IST0101", "Service bound.analyzed"),
    ] {
        bed.eventually(&format!("{code} is found at {origin}"), || {
            let (_, found) = analyze()?;
            let all = found.as_array().context("a list of findings")?;
            let hit = |it: &&Value| it["code"] == code && it["origin"] == origin;
            all.iter().find(hit).with_context(|| format!("{found:#}"))?;
            Ok(())
        });
    }
    let (well, found) = analyze()?;
    ensure!(
        !well,
        "an error was found, and the exit status says none: {found:#}"
    );
    Ok(())
}

#[test]
fn a_bug_report_has_each_parts_log_and_what_it_knows() -> Result<()> {
    let (_turn, bed) = shared()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().display().to_string();
    bed.leyline(&["bug-report", "--output-dir", &path])?;
    let archive = folder.path().join("bug-report.tar.gz");
    let mut tar = std::process::Command::new("tar");
    let listed = tar.arg("-tzf").arg(archive).output()?;
    ensure!(listed.status.success(), "{listed:?}");
    let listed = String::from_utf8(listed.stdout)?;
    let tunnel = bed.daemon("ztunnel", bed.node(0))?;
    let agent = bed.daemon("istio-cni-node", bed.node(1))?;
    for file in [
        "check.json".to_owned(),
        "analyze.json".to_owned(),
        "objects/Pod.json".to_owned(),
        format!("istio-system/{tunnel}/istio-proxy.log"),
        format!("istio-system/{tunnel}/config_dump"),
        format!("istio-system/{agent}/install-cni.log"),
    ] {
        let file = format!("bug-report/{file}");
        ensure!(listed.lines().any(|it| it == file), "no {file}:\n{listed}");
    }
    rig::holds(&listed, "/debug/syncz")
}
