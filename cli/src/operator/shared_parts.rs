//! What a cluster has once, however many revisions of the control plane there are: agents, node tunnels and the reader's
//! account. The release that made them keeps them; another revision's brings its control plane alone.

use std::{collections::BTreeMap, fmt::Debug};

use anyhow::Result;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{apps::v1::DaemonSet, core::v1::ServiceAccount},
};
use kube::{Resource, api::PartialObjectMeta};
use serde::de::DeserializeOwned;

use super::cluster::Cluster;

/// Where helm notes whose an object is.
const RELEASE: &str = "meta.helm.sh/release-name";

/// A part that another release has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Its name among the chart's values.
    pub part: &'static str,
    /// That release.
    pub release: String,
}

impl Kept {
    /// The chart's setting that leaves it out.
    pub(crate) fn setting(&self) -> String {
        format!("{}.enabled=false", self.part)
    }
}

/// The parts of the mesh in `namespace` that other releases than `release` have.
pub(crate) async fn of_others(
    cluster: &Cluster,
    namespace: &str,
    release: &str,
) -> Result<Vec<Kept>> {
    let owners = [
        (
            "cni",
            owner::<DaemonSet>(cluster, namespace, "istio-cni-node").await?,
        ),
        (
            "ztunnel",
            owner::<DaemonSet>(cluster, namespace, "ztunnel").await?,
        ),
        (
            "base",
            owner::<ServiceAccount>(cluster, namespace, "istio-reader-service-account").await?,
        ),
    ];
    Ok(kept(owners, release))
}

fn kept(owners: [(&'static str, Option<String>); 3], release: &str) -> Vec<Kept> {
    let owners = owners.into_iter();
    owners
        .filter_map(|(part, owner)| {
            let release = owner.filter(|owner| owner != release)?;
            Some(Kept { part, release })
        })
        .collect()
}

/// The release that an object belongs to; `None` where there is no such object, or no release has made it.
async fn owner<K>(cluster: &Cluster, namespace: &str, name: &str) -> Result<Option<String>>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + DeserializeOwned,
{
    let api = cluster.within::<K>(namespace);
    let read = cluster.ask(format!("read {name}"), api.get_metadata_opt(name));
    let found: Option<PartialObjectMeta<K>> = read.await?;
    let annotations: Option<BTreeMap<_, _>> = found.and_then(|it| it.metadata.annotations);
    Ok(annotations.and_then(|mut it| it.remove(RELEASE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_release_has_is_left_to_it_and_its_own_is_not() {
        let owners = |node: Option<&str>, reader: Option<&str>| {
            let (node, reader) = (node.map(str::to_owned), reader.map(str::to_owned));
            [("cni", node.clone()), ("ztunnel", node), ("base", reader)]
        };
        let settings = |owners, release| -> Vec<_> {
            let kept = kept(owners, release);
            kept.iter().map(Kept::setting).collect()
        };
        let all = owners(Some("leyline"), Some("leyline"));
        assert_eq!(
            settings(all.clone(), "leyline-canary"),
            [
                "cni.enabled=false",
                "ztunnel.enabled=false",
                "base.enabled=false"
            ]
        );
        assert!(settings(all, "leyline").is_empty());
        assert!(settings(owners(None, None), "leyline-canary").is_empty());
        let first = owners(Some("leyline-canary"), None);
        assert!(settings(first, "leyline-canary").is_empty());
    }
}
