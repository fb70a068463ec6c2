//! Definitions of custom resources that a cluster has from elsewhere (the Gateway API's own, another mesh's): an install leaves
//! them alone. Helm 3 does so for whatever is there, and Helm 4 fails on what another has applied.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, PartialObjectMeta};

use super::cluster::Cluster;

/// The label that the chart's own definitions carry, and its value.
const PART_OF: (&str, &str) = ("app.kubernetes.io/part-of", "leyline");

/// Takes those that the cluster has from elsewhere out of an unpacked chart; their names.
pub(crate) async fn leave_to_others(cluster: &Cluster, chart: &Path) -> Result<Vec<String>> {
    let api = cluster.all::<CustomResourceDefinition>();
    let all = ListParams::default();
    let found = cluster.ask(
        "list definitions of custom resources",
        api.list_metadata(&all),
    );
    let others = of_others(&found.await?.items);
    let mut left = Vec::new();
    let folder = chart.join("crds");
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        // A file is called after the one definition in it.
        let name = path.file_stem().and_then(|it| it.to_str());
        if let Some(name) = name.filter(|it| others.contains(*it)) {
            left.push(name.to_owned());
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    left.sort();
    Ok(left)
}

fn of_others(found: &[PartialObjectMeta<CustomResourceDefinition>]) -> BTreeSet<String> {
    let (label, ours) = PART_OF;
    let is_ours = |it: &PartialObjectMeta<_>| {
        let labels = it.metadata.labels.as_ref();
        labels.and_then(|it| it.get(label)).map(String::as_str) == Some(ours)
    };
    let others = found.iter().filter(|it| !is_ours(it));
    others.filter_map(|it| it.metadata.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The chart's files, which are what is left out of it.
    #[test]
    fn a_definition_of_the_chart_has_its_name_for_a_file_and_our_label() {
        let folder = tempfile::tempdir().unwrap();
        let chart = super::super::helm::unpack(folder.path()).unwrap();
        let mut count = 0;
        for entry in fs::read_dir(chart.join("crds")).unwrap() {
            let path = entry.unwrap().path();
            let text = fs::read_to_string(&path).unwrap();
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(
                text.lines().any(|line| line == format!("  name: {name}")),
                "{name}"
            );
            assert!(text.contains(&format!("{}: {}", PART_OF.0, PART_OF.1)));
            count += 1;
        }
        assert!(count > 0);
    }

    #[test]
    fn only_definitions_without_our_label_are_of_others() {
        let found = |name: &str, labels: &[(&str, &str)]| {
            let labels = labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            let mut it = PartialObjectMeta::<CustomResourceDefinition>::default();
            it.metadata.name = Some(name.to_owned());
            it.metadata.labels = Some(labels.collect());
            it
        };
        let all = [
            found("ours", &[PART_OF]),
            found("bare", &[]),
            found("istio's", &[("app.kubernetes.io/part-of", "istio")]),
        ];
        let others: Vec<_> = of_others(&all).into_iter().collect();
        assert_eq!(others, ["bare", "istio's"]);
    }
}
