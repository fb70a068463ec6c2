//! How long a change takes until connections fare by it: a pod that joins, a policy that lands in the folder.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use rig::{Mesh, Running, yaml::idle_pod};

use crate::modes::Lab;

const TIMES: usize = 100;
/// Pods that join in turn, so that one's leaving (which takes seconds, for its peers' sake) is not waited for.
const PODS: usize = 20;

const DENY_ALL: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: deny-all, namespace: shop }
spec: { action: ALLOW }
";

pub(crate) fn measure(lab: &Lab) -> Result<String> {
    let policies = policies(lab)?;
    let joins = joins(lab)?;
    Ok(format!(
        "| change | p50 | p99 | of |\n|---|---|---|---|\n{}{}",
        row("folder change (a policy) to the data plane", policies),
        row("label on a live pod to traffic in the tunnel", joins),
    ))
}

fn row(name: &str, mut seconds: Vec<f64>) -> String {
    seconds.sort_by(f64::total_cmp);
    let at =
        |percent: usize| seconds[(seconds.len() * percent / 100).min(seconds.len() - 1)] * 1000.0;
    format!(
        "| {name} | {:.1} ms | {:.1} ms | {} |\n",
        at(50),
        at(99),
        seconds.len()
    )
}

/// A client that tries new connections all the time and prints when they fare otherwise.
struct Watch {
    running: Running,
}

impl Watch {
    fn start(lab: &Lab, pod: &str, address: &str) -> Result<Self> {
        Ok(Self {
            running: lab.mesh.spawn(pod, &[&lab.load, "watch", address])?,
        })
    }

    /// When connections began to fare as `state` says.
    fn until(&mut self, state: &str) -> Result<f64> {
        loop {
            let change = self.running.json()?;
            if change["state"] == state {
                return change["time"].as_f64().context("a time");
            }
        }
    }
}

fn now() -> Result<f64> {
    Ok(SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs_f64())
}

fn policies(lab: &Lab) -> Result<Vec<f64>> {
    let mut watch = Watch::start(lab, "shop/client", "server.shop:9000")?;
    watch.until("answered")?;
    let mut seconds = Vec::new();
    for _ in 0..TIMES / 2 {
        let began = now()?;
        lab.mesh.write("deny.yaml", DENY_ALL)?;
        seconds.push(watch.until("failed")? - began);
        let began = now()?;
        lab.mesh.remove("deny.yaml")?;
        seconds.push(watch.until("answered")? - began);
    }
    Ok(seconds)
}

/// Outside the mesh nobody listens, and connections are refused; the tunnel accepts first, and fails then.
fn joins(lab: &Lab) -> Result<Vec<f64>> {
    let names: Vec<String> = (0..PODS).map(|number| format!("joiner{number}")).collect();
    let yaml: Vec<String> = names
        .iter()
        .map(|name| idle_pod("outside", name, "node1"))
        .collect();
    lab.mesh.write("joiners.yaml", &yaml.concat())?;
    let closed = std::net::SocketAddr::new(lab.mesh.pod_ip("outside/plain")?, 9999).to_string();
    let pods: Vec<String> = names.iter().map(|name| format!("outside/{name}")).collect();
    let mut seconds = Vec::new();
    for _ in 0..TIMES / PODS {
        for pod in &pods {
            lab.mesh
                .eventually(&format!("{pod} is outside"), || is(&lab.mesh, pod, "no"));
            seconds.push(join(lab, pod, &closed)?);
        }
    }
    Ok(seconds)
}

fn join(lab: &Lab, pod: &str, closed: &str) -> Result<f64> {
    let mut watch = Watch::start(lab, pod, closed)?;
    watch.until("refused")?;
    let began = now()?;
    lab.mesh.label(pod, "istio.io/dataplane-mode=ambient")?;
    let joined = watch.until("failed")? - began;
    lab.mesh
        .json(
            pod,
            &[&lab.load, "ping", "server.shop:9000", "--count", "1"],
        )
        .context("it is served")?;
    lab.mesh.label(pod, "istio.io/dataplane-mode-")?;
    Ok(joined)
}

fn is(mesh: &Mesh, pod: &str, wanted: &str) -> Result<()> {
    let found = mesh.pod(pod)?;
    ensure!(found["mesh"] == wanted && found["ready"] == true, "{found}");
    Ok(())
}
