//! `leyline uninstall`: releases through helm, and what helm does not own.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Namespace, Pod},
};
use kube::{Api, api::DeleteParams};

use super::{
    access::Access,
    cluster::{Cluster, PodName},
    helm::{self, Helm},
    install::{confirmed, mark},
};

/// Remove the mesh
#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    #[command(flatten)]
    access: Access,
    /// Only the control plane of this revision
    #[arg(long, short)]
    revision: Option<String>,
    /// Every revision, and what the mesh left in the cluster: the certificate authority's key, root certificates, leases
    #[arg(long, conflicts_with = "revision")]
    purge: bool,
    /// Do not ask
    #[arg(long, short = 'y', visible_alias = "skip-confirmation")]
    yes: bool,
    /// The helm program, where it is not on PATH
    #[arg(long, value_name = "PATH")]
    helm: Option<PathBuf>,
}

/// `leyline uninstall`.
pub(crate) async fn uninstall(command: Uninstall, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let namespace = access.istio_namespace().to_owned();
    let cluster = Cluster::connect(&access).await?;
    let helm = Helm::find(command.helm.as_deref(), &access)?;
    let ours = helm.releases(&namespace)?;
    let wanted = helm::release(command.revision.as_deref());
    let chosen: Vec<_> = ours
        .iter()
        .map(|it| it.name.clone())
        .filter(|name| command.purge || *name == wanted)
        .collect();
    if chosen.is_empty() && !command.purge {
        let known: Vec<_> = ours.iter().map(|it| it.name.as_str()).collect();
        bail!(
            "no release {wanted} of Leyline in namespace {namespace}{}",
            match known.is_empty() {
                true => "\n  remedy: was it installed to another namespace (-i)?".to_owned(),
                false => format!("\n  remedy: there are: {}", known.join(", ")),
            }
        );
    }
    let left = ours.len() - chosen.len();
    let what = consequences(&cluster, &chosen, &namespace, left == 0).await?;
    if !command.yes && !confirmed(&what)? {
        bail!("nothing was changed");
    }
    for release in &chosen {
        let arguments = ["uninstall", release, "--namespace", &namespace, "--wait"];
        helm.run(&arguments.map(OsString::from))
            .with_context(|| {
                format!(
                    "remove release {release}\n  remedy: if node agents did not leave in time, see why (kubectl -n \
                     {namespace} get pods -l k8s-app=istio-cni-node), then leyline uninstall once more"
                )
            })?;
        println!("{} release {release} removed", mark(true));
        // Its control plane could not give it back: helm takes its rights first. Whoever comes next would wait.
        let lease = release.replacen(helm::NAME, "leyline-leader", 1);
        let leases: Api<Lease> = cluster.within(&namespace);
        gone(&cluster, &leases, &lease, &DeleteParams::default()).await?;
    }
    if command.purge {
        purge(&cluster, &namespace).await?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the removal does, with the pods that it concerns.
async fn consequences(
    cluster: &Cluster,
    releases: &[String],
    namespace: &str,
    last: bool,
) -> Result<String> {
    let what = format!(
        "Remove {} from namespace {namespace} of {}",
        releases.join(", "),
        cluster.url
    );
    if !last {
        return Ok(what);
    }
    let pods = cluster.list("pods", &cluster.all::<Pod>(), "").await?.items;
    let enrolled: Vec<_> = pods.iter().filter(|it| is_enrolled(it)).collect();
    if enrolled.is_empty() {
        return Ok(what);
    }
    let mut namespaces: Vec<_> = enrolled
        .iter()
        .map(|it| PodName::from(*it).namespace)
        .collect();
    namespaces.sort();
    namespaces.dedup();
    Ok(format!(
        "{} pods of {} are in the mesh. They leave it: their traffic is plaintext from then on, and no policy is enforced.\n\
         {what}",
        enrolled.len(),
        namespaces.join(", ")
    ))
}

/// Whether the agent has told that the pod's traffic goes through its node's tunnel.
pub(crate) fn is_enrolled(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations
        .and_then(|it| it.get("ambient.istio.io/redirection"))
        .is_some_and(|it| it == "enabled")
}

/// What helm does not own: written by the control plane while it ran.
async fn purge(cluster: &Cluster, namespace: &str) -> Result<()> {
    const ROOT: &str = "istio-ca-root-cert";
    let params = DeleteParams::default();
    let namespaces = cluster
        .list("namespaces", &cluster.all::<Namespace>(), "")
        .await?;
    let mut removed = 0;
    for name in namespaces
        .items
        .into_iter()
        .filter_map(|it| it.metadata.name)
    {
        let api: Api<ConfigMap> = cluster.within(&name);
        removed += usize::from(gone(cluster, &api, ROOT, &params).await?);
    }
    println!(
        "{} root certificates removed from {removed} namespaces",
        mark(true)
    );
    let secrets: Api<k8s_openapi::api::core::v1::Secret> = cluster.within(namespace);
    if gone(cluster, &secrets, "istio-ca-secret", &params).await? {
        println!("{} the certificate authority's own key removed", mark(true));
    }
    let leases: Api<Lease> = cluster.within(namespace);
    let held = cluster.list("leases", &leases, "").await?.items;
    let names = held.into_iter().filter_map(|it| it.metadata.name);
    for name in names.filter(|it| it.starts_with("istio-") || it.starts_with("leyline-")) {
        gone(cluster, &leases, &name, &params).await?;
    }
    Ok(())
}

/// Deletes an object; false where there is none.
async fn gone<K>(cluster: &Cluster, api: &Api<K>, name: &str, params: &DeleteParams) -> Result<bool>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let call = async {
        match api.delete(name, params).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(error),
        }
    };
    cluster.ask(format!("delete {name}"), call).await
}
