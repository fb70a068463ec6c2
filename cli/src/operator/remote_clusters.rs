//! `leyline remote-clusters`: the other clusters that each control plane looks at, and how far it is with them.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use controlplane::gateway::names::REVISION;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    access::Access,
    cluster::{Cluster, DEBUG_PORT, PodName},
    output::{self, Form},
};
use crate::screen;

/// List the other clusters that the control plane looks at
#[derive(Debug, Args)]
pub(crate) struct RemoteClusters {
    #[command(flatten)]
    access: Access,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
    /// Only control planes of this revision
    #[arg(long, short)]
    revision: Option<String>,
}

/// What a control plane says of one cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Known {
    id: String,
    secret_name: String,
    sync_status: String,
    /// What is wrong. Upstream's control plane says nothing of it.
    #[serde(default)]
    message: String,
    /// The control plane's pod.
    #[serde(default)]
    istiod: String,
    /// Its revision.
    #[serde(default)]
    revision: String,
}

/// Runs the command. Fails where a cluster is not known.
pub(crate) async fn run(command: RemoteClusters, before: &Access) -> Result<ExitCode> {
    let cluster = Cluster::connect(&command.access.clone().or(before)).await?;
    let mut all = Vec::new();
    for pod in cluster
        .ready_control_planes(command.revision.as_deref())
        .await?
    {
        let labels = pod.metadata.labels.as_ref();
        let revision = labels.and_then(|it| it.get(REVISION));
        let revision = revision.map_or("default", String::as_str).to_owned();
        let pod = PodName::from(&pod);
        let answer = cluster.json(&pod, DEBUG_PORT, "/debug/clusterz").await?;
        all.extend(read(answer, &pod.name, &revision)?);
    }
    all.sort_by(|a, b| (&a.id, &a.istiod).cmp(&(&b.id, &b.istiod)));
    match command.output.text(&serde_json::to_value(&all)?)? {
        Some(text) => output::print(&text)?,
        None if all.is_empty() => println!("The control plane looks at no other cluster."),
        None => output::print(&table(&all))?,
    }
    Ok(match all.iter().all(|it| it.sync_status == "synced") {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn read(answer: Value, istiod: &str, revision: &str) -> Result<Vec<Known>> {
    let read: Vec<Known> =
        serde_json::from_value(answer).context("read what the control plane says of clusters")?;
    let named = read.into_iter().map(|known| Known {
        istiod: istiod.to_owned(),
        revision: revision.to_owned(),
        ..known
    });
    Ok(named.collect())
}

fn table(all: &[Known]) -> String {
    let heading = ["NAME", "SECRET", "STATUS", "ISTIOD", "REVISION", "MESSAGE"];
    let row = |it: &Known| {
        [
            &it.id,
            &it.secret_name,
            &it.sync_status,
            &it.istiod,
            &it.revision,
            &it.message,
        ]
        .map(Clone::clone)
        .to_vec()
    };
    let mut rows: Vec<Vec<String>> = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(all.iter().map(row));
    screen::table(&rows)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn clusters_are_listed_with_what_is_wrong_whoever_the_control_plane_is() {
        let ours = json!([{"id": "west", "secretName": "a", "syncStatus": "refused", "message": "no context"}]);
        let upstreams =
            json!([{"id": "east", "secretName": "istio-system/b", "syncStatus": "synced"}]);
        let mut all = read(ours, "istiod-1", "default").unwrap();
        all.extend(read(upstreams, "istiod-2", "canary").unwrap());
        let text = table(&all);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines[0],
            ["NAME", "SECRET", "STATUS", "ISTIOD", "REVISION", "MESSAGE"]
        );
        assert_eq!(
            lines[1],
            [
                "west", "a", "refused", "istiod-1", "default", "no", "context"
            ]
        );
        assert_eq!(
            lines[2],
            ["east", "istio-system/b", "synced", "istiod-2", "canary"]
        );
        assert!(read(json!({}), "istiod-1", "").is_err());
    }
}
