//! How long it takes to join, as a user sees it by the label and a kubelet by its sandboxes. Figures, not claims: they are printed,
//! and stand in docs/performance.md.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use controlplane::source::cluster::client;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams, WatchEvent, WatchParams},
};
use rig::cluster::bed::{Bed, SYSTEM, alone, not_run};
use serde_json::json;
use tokio_stream::StreamExt;

use crate::scene::{Scene, Start};

const PODS: usize = 20;
const ROUNDS: usize = 10;
/// Sandboxes that are made one after the other.
const SANDBOXES: usize = 30;
const LONG: Duration = Duration::from_secs(120);

#[test]
fn the_time_from_label_to_enabled_and_the_delay_of_sandboxes_are_measured() -> Result<()> {
    if std::env::var_os("LEYLINE_CLUSTER_MEASURE").is_none() {
        not_run(
            "the_time_from_label_to_enabled_and_the_delay_of_sandboxes_are_measured",
            "set LEYLINE_CLUSTER_MEASURE",
        );
        return Ok(());
    }
    let (_turn, bed) = alone()?;
    let scene = Scene::empty(bed, "measured", Start::Outside)?;
    scene.apply(&pods())?;
    bed.kube()
        .rolled_out("measured", "deployment/measured", 180)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut times = runtime.block_on(async {
        let client = client::client(Some(bed.kube().kubeconfig())).await?;
        rounds(client).await
    })?;
    times.sort();
    let at = |percent: usize| {
        let place = (times.len() - 1) * percent / 100;
        times[place].as_secs_f64() * 1e3
    };
    eprintln!(
        "label of a namespace of {PODS} pods to enabled: p50 {:.0} ms, p99 {:.0} ms, longest {:.0} ms of {}",
        at(50),
        at(99),
        at(100),
        times.len()
    );
    sandboxes(bed, &scene)
}

/// Labels the namespace, and tells after what time each of its pods was enabled; takes them out again; several times.
async fn rounds(client: Client) -> Result<Vec<Duration>> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let pods: Api<Pod> = Api::namespaced(client, "measured");
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let listed = pods.list(&Default::default()).await?;
        let version = listed.metadata.resource_version.unwrap_or_default();
        let parameters = WatchParams::default().timeout(290);
        let mut events = Box::pin(pods.watch(&parameters, &version).await?);
        label(&namespaces, json!("ambient")).await?;
        let began = Instant::now();
        let mut enabled = BTreeSet::new();
        while enabled.len() < PODS {
            let event = tokio::time::timeout(LONG, events.next()).await;
            let event = event
                .context("no event in time")?
                .context("the watch ended")?;
            if let WatchEvent::Modified(pod) = event?
                && is_enabled(&pod)
                && enabled.insert(pod.name_any())
            {
                times.push(began.elapsed());
            }
        }
        label(&namespaces, json!(null)).await?;
        let end = Instant::now() + LONG;
        while pods.list(&Default::default()).await?.iter().any(is_enabled) {
            ensure!(Instant::now() < end, "pods do not leave");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(times)
}

fn is_enabled(pod: &Pod) -> bool {
    let redirection = pod.annotations().get("ambient.istio.io/redirection");
    redirection.is_some_and(|it| it == "enabled")
}

async fn label(namespaces: &Api<Namespace>, value: serde_json::Value) -> Result<()> {
    let patch = json!({"metadata": {"labels": {"istio.io/dataplane-mode": value}}});
    let parameters = PatchParams::default();
    namespaces
        .patch("measured", &parameters, &Patch::Merge(&patch))
        .await?;
    Ok(())
}

/// How long sandboxes waited for the agents, pods started one by one.
fn sandboxes(bed: &Bed, scene: &Scene<'_>) -> Result<()> {
    scene.label(Start::InMesh)?;
    let before = waits(bed)?;
    for number in 0..SANDBOXES {
        let name = format!("client-{number}");
        let node = bed.node(number);
        scene.apply(&crate::scene::pod(
            &name,
            node,
            "[leyline, tool, echo, '9000']",
            "",
        ))?;
        scene.ready(&[&name])?;
        bed.kube()
            .run(&["-n", "measured", "delete", "pod", &name, "--wait=false"])?;
    }
    let after = waits(bed)?;
    for (bound, count) in &after {
        let earlier = before.iter().find(|(known, _)| known == bound);
        let new = count - earlier.map_or(0.0, |(_, count)| *count);
        eprintln!("sandboxes: {bound}: {new}");
    }
    Ok(())
}

/// The agents' histogram of sandboxes' waits, added up: each bound with its count, then the sum of seconds.
fn waits(bed: &Bed) -> Result<Vec<(String, f64)>> {
    let mut all: Vec<(String, f64)> = Vec::new();
    for node in bed.nodes() {
        let agent = bed.daemon("istio-cni-node", node)?;
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{agent}:15014/proxy/metrics");
        let text = bed.kube().run(&["get", "--raw", &path])?;
        let ours = text
            .lines()
            .filter_map(|line| line.strip_prefix("leyline_cni_sandbox_wait_seconds_"));
        for line in ours {
            let (name, value) = line.rsplit_once(' ').context("a value")?;
            let value: f64 = value.parse()?;
            match all.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += value,
                None => all.push((name.to_owned(), value)),
            }
        }
    }
    Ok(all)
}

fn pods() -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: measured}}
spec:
  replicas: {PODS}
  selector: {{matchLabels: {{app: measured}}}}
  template:
    metadata: {{labels: {{app: measured}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{{name: main, image: leyline.dev/pause:dev}}]
"
    )
}
