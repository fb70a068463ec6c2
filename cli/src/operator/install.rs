//! `leyline install`: the embedded chart through helm, then a wait until every part is ready.

use std::{
    ffi::OsString,
    io::{self, BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::Pod,
};
use kube::Api;
use tokio::time::{Instant, sleep};

use super::{
    access::Access,
    cluster::{Cluster, PodName, problem},
    definitions, duration,
    helm::{self, Helm},
    output,
    shared_parts::{self, Kept},
};
use crate::screen;

/// Install the mesh, or bring it to these settings
#[derive(Debug, Args)]
pub(crate) struct Install {
    #[command(flatten)]
    access: Access,
    /// A setting of the chart, KEY=VALUE; may be repeated
    #[arg(long, short, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// A file of the chart's values; may be repeated
    #[arg(
        long = "filename",
        short = 'f',
        visible_alias = "values",
        value_name = "FILE"
    )]
    files: Vec<PathBuf>,
    /// Revision of the control plane, for canary upgrades: beside another revision it comes alone
    #[arg(long, short)]
    revision: Option<String>,
    /// Print what would be applied, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long, short = 'y', visible_alias = "skip-confirmation")]
    yes: bool,
    /// How long the parts may take to become ready
    #[arg(long, default_value = "5m", value_parser = duration::parse)]
    readiness_timeout: Duration,
    /// The helm program, where it is not on PATH
    #[arg(long, value_name = "PATH")]
    helm: Option<PathBuf>,
    /// A folder or archive of the chart in place of the embedded one
    #[arg(long, short = 'd', visible_alias = "charts", value_name = "PATH")]
    manifests: Option<PathBuf>,
}

/// What an install would apply
#[derive(Debug, Args)]
pub(crate) struct Manifest {
    #[command(subcommand)]
    what: ManifestWhat,
}

#[derive(Debug, Subcommand)]
enum ManifestWhat {
    /// Print the objects; takes what install takes
    Generate(Install),
}

/// `leyline manifest`.
pub(crate) async fn manifest(command: Manifest, before: &Access) -> Result<ExitCode> {
    let ManifestWhat::Generate(install) = command.what;
    let print = Install {
        dry_run: true,
        ..install
    };
    self::install(print, before).await
}

/// `leyline install`.
pub(crate) async fn install(command: Install, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let namespace = access.istio_namespace().to_owned();
    let helm = Helm::find(command.helm.as_deref(), &access)?;
    let folder = tempfile::tempdir().context("make a folder for the chart")?;
    let chart = match &command.manifests {
        Some(path) => path.clone(),
        None => helm::unpack(folder.path())?,
    };
    let release = helm::release(command.revision.as_deref());
    let cluster = Cluster::connect(&access).await;
    if command.dry_run {
        // Without a cluster, there are no others.
        let kept = match &cluster {
            Ok(cluster) => shared_parts::of_others(cluster, &namespace, &release).await,
            Err(_) => Ok(Vec::new()),
        };
        let kept = kept.unwrap_or_default();
        output::print(&helm.run(&arguments(&command, &release, &namespace, &chart, &kept)?)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = cluster?;
    let kept = shared_parts::of_others(&cluster, &namespace, &release).await?;
    let arguments = arguments(&command, &release, &namespace, &chart, &kept)?;
    let releases = helm.releases(&namespace)?.into_iter();
    let mut own = releases.filter(|it| it.name == release);
    if let Some(problem) = own.find_map(|it| it.unfinished()) {
        bail!(problem);
    }
    let client = cluster.client();
    let version = cluster
        .ask("reach the cluster", client.apiserver_version())
        .await?;
    let what = format!(
        "Install Leyline {} as release {release} in namespace {namespace} of {} (Kubernetes {})",
        helm::chart_version().unwrap_or(env!("CARGO_PKG_VERSION")),
        cluster.url,
        version.git_version
    );
    if !command.yes && !confirmed(&what)? {
        bail!("nothing was changed");
    }
    println!("{what}");
    // A chart that was given is applied as it is.
    if command.manifests.is_none() {
        for name in definitions::leave_to_others(&cluster, &chart).await? {
            println!(
                "{} {name}: the cluster has its own, which stays",
                mark(true)
            );
        }
    }
    for Kept { part, release } in &kept {
        println!("{} {part}: release {release} has it", mark(true));
    }
    helm.run(&arguments).context("apply the chart")?;
    println!("{} applied", mark(true));
    let revision = command.revision.as_deref();
    wait(&cluster, &namespace, revision, command.readiness_timeout).await?;
    println!(
        "\nNext: kubectl label namespace NAMESPACE istio.io/dataplane-mode=ambient\nThen: leyline check, and leyline \
         explain POD SERVICE:PORT"
    );
    Ok(ExitCode::SUCCESS)
}

pub(super) fn mark(good: bool) -> String {
    let screen = screen::output();
    match good {
        true => screen.good("ok"),
        false => screen.bad("no"),
    }
}

fn arguments(
    command: &Install,
    release: &str,
    namespace: &str,
    chart: &Path,
    kept: &[Kept],
) -> Result<Vec<OsString>> {
    let verbs: &[&str] = match command.dry_run {
        true => &["template", "--include-crds"],
        false => &["upgrade", "--install", "--create-namespace"],
    };
    let mut arguments: Vec<OsString> = verbs.iter().map(Into::into).collect();
    arguments.extend([
        release.into(),
        chart.into(),
        "--namespace".into(),
        namespace.into(),
    ]);
    for file in &command.files {
        check_values(file)?;
        arguments.extend(["--values".into(), file.into()]);
    }
    // The user's own settings stand over these.
    for kept in kept {
        arguments.extend(["--set".into(), kept.setting().into()]);
    }
    for setting in &command.set {
        arguments.extend(["--set".into(), chart_setting(setting)?.into()]);
    }
    if let Some(revision) = &command.revision {
        arguments.extend(["--set-string".into(), format!("revision={revision}").into()]);
    }
    Ok(arguments)
}

/// Upstream's installer wraps the charts' values; ours are the chart's own. A file in the old form is told so.
fn check_values(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    if text
        .lines()
        .any(|line| line.trim_end() == "kind: IstioOperator")
    {
        bail!(
            "{} is an IstioOperator\n  remedy: give the chart's values instead: what stands under spec.values there",
            file.display()
        );
    }
    Ok(())
}

/// `values.` before a key is upstream's way to say a chart's value.
fn chart_setting(setting: &str) -> Result<&str> {
    let (key, _) = setting
        .split_once('=')
        .with_context(|| format!("--set {setting}: not of the form KEY=VALUE"))?;
    if key.is_empty() {
        bail!("--set {setting}: it has no key");
    }
    Ok(setting.strip_prefix("values.").unwrap_or(setting))
}

/// A part of the mesh that must become ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// What it is, for people.
    pub title: &'static str,
    /// The object behind it.
    pub object: String,
    /// How many of its pods are ready, and how many there should be.
    pub ready: i32,
    pub wanted: i32,
    /// Whether the newest version is the one that runs.
    pub current: bool,
}

impl Part {
    pub(crate) fn is_ready(&self) -> bool {
        self.current && self.ready >= self.wanted
    }
}

/// The parts that are installed: the control plane of a revision, and the node parts.
pub(crate) async fn parts(
    cluster: &Cluster,
    namespace: &str,
    revision: Option<&str>,
) -> Result<Vec<Part>> {
    let mut found = Vec::new();
    let deployment = match revision.filter(|it| !it.is_empty() && *it != "default") {
        Some(revision) => format!("istiod-{revision}"),
        None => "istiod".to_owned(),
    };
    let api: Api<Deployment> = cluster.within(namespace);
    let read = cluster.ask(
        format!("read deployment {deployment}"),
        api.get_opt(&deployment),
    );
    if let Some(deployment) = read.await? {
        found.push(deployment_part(&deployment));
    }
    let api: Api<DaemonSet> = cluster.within(namespace);
    for (title, name) in [("cni", "istio-cni-node"), ("ztunnel", "ztunnel")] {
        let read = cluster.ask(format!("read daemonset {name}"), api.get_opt(name));
        if let Some(set) = read.await? {
            found.push(daemon_part(title, &set));
        }
    }
    Ok(found)
}

fn deployment_part(it: &Deployment) -> Part {
    let status = it.status.clone().unwrap_or_default();
    let wanted = it.spec.replicas.unwrap_or(1);
    Part {
        title: "control plane",
        object: format!(
            "deployment/{}",
            it.metadata.name.as_deref().unwrap_or_default()
        ),
        ready: status.available_replicas.unwrap_or(0),
        wanted,
        current: status.observed_generation >= it.metadata.generation
            && status.updated_replicas.unwrap_or(0) >= wanted,
    }
}

fn daemon_part(title: &'static str, it: &DaemonSet) -> Part {
    let status = it.status.clone().unwrap_or_default();
    let wanted = status.desired_number_scheduled;
    Part {
        title,
        object: format!(
            "daemonset/{}",
            it.metadata.name.as_deref().unwrap_or_default()
        ),
        ready: status.number_ready,
        wanted,
        current: status.observed_generation >= it.metadata.generation
            && status.updated_number_scheduled.unwrap_or(0) >= wanted,
    }
}

/// Waits until every part is ready, telling each as it comes.
async fn wait(
    cluster: &Cluster,
    namespace: &str,
    revision: Option<&str>,
    limit: Duration,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut told = Vec::new();
    loop {
        let parts = parts(cluster, namespace, revision).await?;
        for part in parts.iter().filter(|it| it.is_ready()) {
            if !told.contains(&part.object) {
                println!(
                    "{} {}: {} of {} ready",
                    mark(true),
                    part.title,
                    part.ready,
                    part.wanted
                );
                told.push(part.object.clone());
            }
        }
        let waiting: Vec<_> = parts.iter().filter(|it| !it.is_ready()).collect();
        if waiting.is_empty() && !parts.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(not_ready(cluster, namespace, &waiting).await);
        }
        sleep(Duration::from_millis(500)).await;
    }
}

async fn not_ready(cluster: &Cluster, namespace: &str, waiting: &[&Part]) -> anyhow::Error {
    let mut text = "not everything became ready in time:".to_owned();
    for part in waiting {
        text.push_str(&format!(
            "\n  {}: {} of {} ready",
            part.object, part.ready, part.wanted
        ));
    }
    let api: Api<Pod> = cluster.within(namespace);
    let pods = cluster
        .list("the mesh's pods", &api, "app in (istiod,ztunnel,istio-cni)")
        .await;
    for pod in pods.map(|it| it.items).unwrap_or_default() {
        if let Some(problem) = problem(&pod) {
            text.push_str(&format!("\n  {}: {problem}", PodName::from(&pod)));
        }
    }
    text.push_str(
        "\n  remedy: leyline check says what is missing; the same command again goes on waiting",
    );
    anyhow::Error::msg(text)
}

pub(super) fn confirmed(what: &str) -> Result<bool> {
    if !io::stdin().is_terminal() {
        bail!("{what}?\n  remedy: there is no terminal to ask on: say -y");
    }
    print!("{what}? [y/N] ");
    io::stdout().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(
        answer.trim().to_ascii_lowercase().as_str(),
        "y" | "yes"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_in_upstreams_form_are_the_charts() {
        assert_eq!(
            chart_setting("values.global.hub=x").unwrap(),
            "global.hub=x"
        );
        assert_eq!(
            chart_setting("cni.cniBinDir=/x").unwrap(),
            "cni.cniBinDir=/x"
        );
        for wrong in ["profile", "=x"] {
            assert!(chart_setting(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_part_is_ready_when_its_newest_version_is() {
        let set = |observed: i64, updated: i32, ready: i32| {
            let set = serde_json::json!({
                "metadata": {"name": "ztunnel", "generation": 2},
                "status": {
                    "observedGeneration": observed, "desiredNumberScheduled": 2, "numberReady": ready,
                    "updatedNumberScheduled": updated, "currentNumberScheduled": 2, "numberMisscheduled": 0
                }
            });
            daemon_part("ztunnel", &serde_json::from_value(set).unwrap()).is_ready()
        };
        assert!(set(2, 2, 2));
        assert!(!set(1, 2, 2), "the newest version is not seen yet");
        assert!(!set(2, 1, 2), "a node still runs the one before");
        assert!(!set(2, 2, 1));
    }
}
