//! `leyline bug-report`: what whoever is to find a fault needs to see, in one archive: the mesh's objects, its parts' logs and
//! what they know, and what our own checks say. No Secret is read, and of others' pods neither commands nor environments.

mod archive;

use std::{
    future::Future,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use clap::Args;
use controlplane::gateway::names::REVISION;
use futures_util::{StreamExt as _, future::BoxFuture, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Pod};
use kube::api::LogParams;
use serde_json::Value;

use self::archive::Archive;
use super::{
    access::Access,
    analyze, check,
    cluster::{ADMIN_PORT, Cluster, DEBUG_PORT, PodName},
    duration, version,
};

/// Pods that are asked at once.
const AT_ONCE: usize = 8;
/// The most that is kept of one log.
const LOG_BYTES: i64 = 16 << 20;
/// Where node tunnels and waypoints tell what they have counted.
const METRICS_PORT: u16 = 15020;
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Gather what is needed to find a fault into an archive
#[derive(Debug, Args)]
pub(crate) struct BugReport {
    #[command(flatten)]
    access: Access,
    /// Folder for bug-report.tar.gz
    #[arg(long, default_value = ".", value_name = "FOLDER")]
    output_dir: PathBuf,
    /// Of logs only what is younger
    #[arg(long, value_parser = duration::parse)]
    duration: Option<Duration>,
    /// Of each log the last so many lines
    #[arg(long, default_value_t = 20_000, value_name = "LINES")]
    tail: i64,
    /// When to stop, and keep what there is by then
    #[arg(long, default_value = "30m", value_parser = duration::parse)]
    timeout: Duration,
    /// Only tell which pods would be asked
    #[arg(long)]
    dry_run: bool,
}

/// A file of the archive, or why there is none.
type Item = (String, Result<Vec<u8>>);

/// What a pod is to the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    ControlPlane,
    Tunnel,
    Agent,
    Waypoint,
}

/// Runs the command.
pub(crate) async fn run(command: BugReport, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let cluster = Cluster::connect(&access).await?;
    let parts = parts(&cluster).await?;
    if command.dry_run {
        for (part, pod) in &parts {
            println!("{part:?} {}", PodName::from(pod));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let path = command.output_dir.join("bug-report.tar.gz");
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut archive =
        Archive::create(&path, now).with_context(|| format!("make {}", path.display()))?;
    let mut missed = String::new();
    {
        let gathered = gather(&cluster, &parts, &command);
        let mut keep = |(name, found): Item| match found {
            Ok(content) => archive.add(&format!("bug-report/{name}"), &content),
            Err(error) => {
                missed.push_str(&format!("{name}: {error:#}\n"));
                Ok(())
            }
        };
        let whole = tokio::time::timeout(command.timeout, each(gathered, &mut keep)).await;
        match whole {
            Ok(written) => written.context("write the archive")?,
            Err(_) => missed.push_str("the time was over before everything was gathered\n"),
        }
    }
    archive.add("bug-report/missed.txt", missed.as_bytes())?;
    let files = archive.files();
    archive.finish()?.sync_all().context("write the archive")?;
    println!(
        "{}: {files} files of {} pods and the cluster",
        path.display(),
        parts.len()
    );
    if !missed.is_empty() {
        println!("Not all could be gathered; missed.txt in it says what and why.");
    }
    Ok(ExitCode::SUCCESS)
}

async fn each(
    items: impl stream::Stream<Item = Item>,
    keep: &mut impl FnMut(Item) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut items = std::pin::pin!(items);
    while let Some(item) = items.next().await {
        keep(item)?;
    }
    Ok(())
}

/// The mesh's own pods, wherever they run.
async fn parts(cluster: &Cluster) -> Result<Vec<(Part, Pod)>> {
    let mut parts = Vec::new();
    let system = cluster.within::<Pod>(&cluster.istio_namespace);
    for (part, label) in [
        (Part::ControlPlane, "app=istiod"),
        (Part::Agent, "k8s-app=istio-cni-node"),
        (Part::Tunnel, "app=ztunnel"),
    ] {
        let found = cluster.list("the mesh's pods", &system, label).await?;
        parts.extend(found.items.into_iter().map(|pod| (part, pod)));
    }
    let label = "gateway.istio.io/managed";
    let waypoints = cluster
        .list("waypoints", &cluster.all::<Pod>(), label)
        .await?;
    parts.extend(waypoints.items.into_iter().map(|pod| (Part::Waypoint, pod)));
    Ok(parts)
}

/// Everything, in the order in which it comes.
fn gather<'a>(
    cluster: &'a Cluster,
    parts: &'a [(Part, Pod)],
    command: &'a BugReport,
) -> impl stream::Stream<Item = Item> + 'a {
    let general: Vec<BoxFuture<'a, Vec<Item>>> = vec![
        Box::pin(one("versions.json", version::told(cluster))),
        Box::pin(one("check.json", check::told(cluster))),
        Box::pin(objects(cluster)),
        Box::pin(one("events.json", events(cluster))),
        Box::pin(one("mesh-config.json", mesh_config(cluster))),
    ];
    let of_pods = parts.iter().map(move |(part, pod)| {
        let all: BoxFuture<'a, Vec<Item>> = Box::pin(of_pod(cluster, *part, pod, command));
        all
    });
    let all = general.into_iter().chain(of_pods);
    stream::iter(all)
        .buffer_unordered(AT_ONCE)
        .flat_map(stream::iter)
}

async fn one(name: &str, value: impl Future<Output = Result<Value>>) -> Vec<Item> {
    vec![(name.to_owned(), value.await.and_then(|it| text(&it)))]
}

fn text(value: &Value) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec_pretty(value)?)
}

/// What the control plane reads, one file per kind, and what we would say of it.
async fn objects(cluster: &Cluster) -> Vec<Item> {
    let objects = match analyze::exported(cluster).await {
        Ok(objects) => objects,
        Err(error) => return vec![("objects".to_owned(), Err(error))],
    };
    let found = analyze::judged(&objects, &cluster.istio_namespace).await;
    let mut items = vec![("analyze.json".to_owned(), found.and_then(|it| text(&it)))];
    let kinds: std::collections::BTreeSet<&str> = objects
        .iter()
        .filter_map(|it| it["kind"].as_str())
        .collect();
    for kind in kinds {
        let of_kind = objects.iter().filter(|it| it["kind"] == kind);
        let shown = of_kind.map(|it| shown(it.clone(), &cluster.istio_namespace));
        let list = Value::Array(shown.collect());
        items.push((format!("objects/{kind}.json"), text(&list)));
    }
    items
}

/// An object without what may be somebody's secret.
fn shown(mut object: Value, system: &str) -> Value {
    if let Some(annotations) = object["metadata"]["annotations"].as_object_mut() {
        annotations.remove(LAST_APPLIED);
    }
    if object["kind"] == "Pod" && object["metadata"]["namespace"] != system {
        for list in ["containers", "initContainers", "ephemeralContainers"] {
            for container in object["spec"][list].as_array_mut().into_iter().flatten() {
                for field in ["env", "envFrom", "command", "args"] {
                    container.as_object_mut().map(|it| it.remove(field));
                }
            }
        }
    }
    object
}

async fn events(cluster: &Cluster) -> Result<Value> {
    let found = cluster.list("events", &cluster.all::<Event>(), "").await?;
    Ok(serde_json::to_value(found.items)?)
}

/// The mesh's configuration of every revision.
async fn mesh_config(cluster: &Cluster) -> Result<Value> {
    let api = cluster.within::<ConfigMap>(&cluster.istio_namespace);
    let found = cluster
        .list("the mesh's configuration", &api, REVISION)
        .await?;
    Ok(serde_json::to_value(found.items)?)
}

/// A pod's logs, and what it says of itself.
async fn of_pod(cluster: &Cluster, part: Part, pod: &Pod, command: &BugReport) -> Vec<Item> {
    let name = PodName::from(pod);
    let folder = format!("{}/{}", name.namespace, name.name);
    let mut items = logs(cluster, pod, &folder, command).await;
    let asked: &[(u16, &str)] = match part {
        Part::ControlPlane => &[
            (DEBUG_PORT, "/metrics"),
            (DEBUG_PORT, "/debug/syncz"),
            (DEBUG_PORT, "/debug/connections"),
            (DEBUG_PORT, "/debug/clusterz"),
            (DEBUG_PORT, "/debug/ambientz"),
            (DEBUG_PORT, "/debug/configz"),
        ],
        Part::Tunnel | Part::Waypoint => {
            &[(METRICS_PORT, "/metrics"), (ADMIN_PORT, "/config_dump")]
        }
        Part::Agent => &[],
    };
    for (port, path) in asked {
        let answer = cluster.call(&name, http::Method::GET, *port, path).await;
        let body = answer.and_then(|answer| answer.success(&format!("{name}{path}")));
        items.push((format!("{folder}{path}"), body.map(Vec::from)));
    }
    items
}

async fn logs(cluster: &Cluster, pod: &Pod, folder: &str, command: &BugReport) -> Vec<Item> {
    let api = cluster.within::<Pod>(pod.metadata.namespace.as_deref().unwrap_or_default());
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let statuses = pod.status.iter();
    let statuses = statuses.flat_map(|it| it.container_statuses.iter().flatten());
    let mut items = Vec::new();
    for status in statuses {
        for previous in [false, true] {
            if previous && status.restart_count == 0 {
                continue;
            }
            let params = LogParams {
                container: Some(status.name.clone()),
                previous,
                since_seconds: since(command.duration).filter(|_| !previous),
                tail_lines: Some(command.tail),
                limit_bytes: Some(LOG_BYTES),
                timestamps: true,
                ..LogParams::default()
            };
            let read = cluster.ask(format!("read the log of {name}"), api.logs(name, &params));
            let when = if previous { ".previous" } else { "" };
            let file = format!("{folder}/{}{when}.log", status.name);
            items.push((file, read.await.map(String::into_bytes)));
        }
    }
    items
}

fn since(duration: Option<Duration>) -> Option<i64> {
    i64::try_from(duration?.as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_may_be_a_secret_is_not_shown() {
        let pod = |namespace: &str| {
            json!({
                "kind": "Pod",
                "metadata": {"namespace": namespace, "annotations": {LAST_APPLIED: "all of it", "a": "b"}},
                "spec": {"containers": [{"name": "main", "args": ["--password=x"], "env": [{"name": "A", "value": "x"}]}]},
            })
        };
        let others = shown(pod("shop"), "istio-system");
        let container = &others["spec"]["containers"][0];
        assert_eq!(container, &json!({"name": "main"}));
        assert_eq!(others["metadata"]["annotations"], json!({"a": "b"}));
        let own = shown(pod("istio-system"), "istio-system");
        assert!(own["spec"]["containers"][0]["env"].is_array());
        assert!(own["metadata"]["annotations"][LAST_APPLIED].is_null());
    }
}
