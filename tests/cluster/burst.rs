//! As many pods on one node as it takes, all at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{
    cluster::bed::{alone, not_run},
    until,
};
use serde_json::Value;

use crate::scene::{Scene, Start};

const PODS: usize = 330;

#[test]
fn a_burst_of_pods_on_one_node_is_taken_in_whole() -> Result<()> {
    if std::env::var_os("LEYLINE_CLUSTER_BURST").is_none() {
        not_run(
            "a_burst_of_pods_on_one_node_is_taken_in_whole",
            "set LEYLINE_CLUSTER_BURST; it takes minutes",
        );
        return Ok(());
    }
    let (_turn, bed) = alone()?;
    if bed
        .rig("a_burst_of_pods_on_one_node_is_taken_in_whole")
        .is_none()
    {
        return Ok(());
    }
    let scene = Scene::empty(bed, "burst", Start::InMesh)?;
    let began = Instant::now();
    scene.apply(&format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: burst}}
spec:
  replicas: {PODS}
  selector: {{matchLabels: {{app: burst}}}}
  template:
    metadata: {{labels: {{app: burst}}}}
    spec:
      serviceAccountName: client
      nodeSelector: {{kubernetes.io/hostname: {}}}
      terminationGracePeriodSeconds: 0
      containers: [{{name: main, image: leyline.dev/pause:dev}}]
",
        bed.node(0)
    ))?;
    until(Duration::from_secs(300), || {
        let pods = scene.bed.kube().json(&["pods", "-n", "burst"])?;
        let pods = pods["items"].as_array().context("a list of pods")?;
        let joined = |pod: &&Value| {
            pod["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled"
                && pod["status"]["phase"] == "Running"
        };
        let joined = pods.iter().filter(joined).count();
        ensure!(joined == PODS, "{joined} of {PODS} are in the mesh");
        Ok(())
    })
    .with_context(|| bed.evidence())?;
    eprintln!(
        "{PODS} pods in the mesh after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}
