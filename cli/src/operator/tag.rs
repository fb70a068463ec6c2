//! `leyline tag`: names that stand for a revision, so that namespaces need not be labelled anew for an upgrade. A tag is kept as
//! upstream's tools keep it, in the labels of a webhook configuration.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use controlplane::{gateway::names::REVISION, validate::is_label};
use k8s_openapi::api::{
    admissionregistration::v1::MutatingWebhookConfiguration, core::v1::Namespace,
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PartialObjectMeta, Patch, PatchParams},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    access::Access,
    cluster::Cluster,
    output::{self, Form},
};
use crate::screen;

const TAG: &str = "istio.io/tag";
/// istioctl's, so that a tag that it made is ours to move, and the reverse.
const FIELD_MANAGER: &str = "istioctl";

/// Names that stand for a revision of the control plane
#[derive(Debug, Args)]
pub(crate) struct Tag {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    access: Access,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Point a tag to a revision
    Set {
        /// Its name
        tag: String,
        /// The revision
        #[arg(long, short)]
        revision: String,
        /// Also where it points to another revision now
        #[arg(long)]
        overwrite: bool,
    },
    /// Print the object that `set` would send
    Generate {
        /// Its name
        tag: String,
        /// The revision
        #[arg(long, short)]
        revision: String,
    },
    /// Show the tags and the namespaces that use them
    List {
        /// Form of the output
        #[arg(long, short, value_enum, default_value_t)]
        output: Form,
    },
    /// Remove a tag
    Remove {
        /// Its name
        tag: String,
        /// Also where namespaces use it
        #[arg(long, short = 'y', visible_alias = "skip-confirmation")]
        yes: bool,
    },
}

/// A tag, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Known {
    tag: String,
    revision: String,
    /// Those labelled with it.
    namespaces: Vec<String>,
    #[serde(skip)]
    object: String,
}

type Webhook = PartialObjectMeta<MutatingWebhookConfiguration>;

/// Runs the command.
pub(crate) async fn run(command: Tag, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let system = access.istio_namespace().to_owned();
    match command.what {
        What::Generate { tag, revision } => {
            check_name(&tag)?;
            output::print(&output::yaml(&object(&tag, &revision, &system))?)?;
        }
        What::Set {
            tag,
            revision,
            overwrite,
        } => {
            let cluster = Cluster::connect(&access).await?;
            set(&cluster, &tag, &revision, overwrite, &system).await?;
        }
        What::List { output } => {
            let known = known(&Cluster::connect(&access).await?).await?;
            match output.text(&serde_json::to_value(&known)?)? {
                Some(text) => output::print(&text)?,
                None if known.is_empty() => println!("There are no tags."),
                None => output::print(&table(&known))?,
            }
        }
        What::Remove { tag, yes } => {
            remove(&Cluster::connect(&access).await?, &tag, yes).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Tags are values of labels and parts of objects' names.
fn check_name(tag: &str) -> Result<()> {
    match is_label(tag) {
        true => Ok(()),
        false => bail!("{tag:?} cannot be a tag: small letters, digits and dashes in between"),
    }
}

/// What carries a tag. It asks nobody: only its labels count.
fn object(tag: &str, revision: &str, system: &str) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {
            "name": format!("istio-revision-tag-{tag}-{system}"),
            "labels": {TAG: tag, REVISION: revision, "app": "sidecar-injector"},
        },
    })
}

fn webhooks(cluster: &Cluster) -> Api<MutatingWebhookConfiguration> {
    cluster.all()
}

async fn known(cluster: &Cluster) -> Result<Vec<Known>> {
    let tagged = ListParams::default().labels(TAG);
    let api = webhooks(cluster);
    let found = cluster.ask("list the tags", api.list_metadata(&tagged));
    let found = found.await?.items;
    let api = cluster.all::<Namespace>();
    let namespaces = cluster.list("namespaces", &api, REVISION).await?;
    Ok(read(&found, &namespaces.items))
}

fn read(webhooks: &[Webhook], namespaces: &[Namespace]) -> Vec<Known> {
    let mut users: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for namespace in namespaces {
        let labels = namespace.metadata.labels.as_ref();
        if let Some(used) = labels.and_then(|it| it.get(REVISION)) {
            let name = namespace.metadata.name.clone().unwrap_or_default();
            users.entry(used).or_default().push(name);
        }
    }
    let known = |webhook: &Webhook| {
        let labels = webhook.metadata.labels.as_ref()?;
        let tag = labels.get(TAG)?.clone();
        Some(Known {
            namespaces: users.get(&*tag).cloned().unwrap_or_default(),
            revision: labels.get(REVISION).cloned().unwrap_or_default(),
            object: webhook.metadata.name.clone().unwrap_or_default(),
            tag,
        })
    };
    let mut all: Vec<_> = webhooks.iter().filter_map(known).collect();
    all.sort_by(|a, b| (&a.tag, &a.object).cmp(&(&b.tag, &b.object)));
    all
}

async fn set(
    cluster: &Cluster,
    tag: &str,
    revision: &str,
    overwrite: bool,
    system: &str,
) -> Result<()> {
    check_name(tag)?;
    // What no control plane serves would be served by none.
    cluster.ready_control_planes(Some(revision)).await?;
    let others = known(cluster).await?.into_iter();
    let before: Vec<_> = others.filter(|it| it.tag == tag).collect();
    let another = before.iter().find(|it| it.revision != revision);
    if let Some(another) = another.filter(|_| !overwrite) {
        bail!(
            "tag {tag} points to revision {}\n  remedy: --overwrite moves it, and with it what is labelled {REVISION}={tag}",
            another.revision
        );
    }
    let mut object = object(tag, revision, system);
    // One that another tool has made is moved where it is.
    if let Some(before) = before.first() {
        object["metadata"]["name"] = json!(before.object);
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let (api, patch) = (webhooks(cluster), Patch::Apply(&object));
    cluster
        .ask(
            format!("write tag {tag}"),
            api.patch_metadata(name, &params, &patch),
        )
        .await?;
    println!("Tag {tag} points to revision {revision}.");
    Ok(())
}

async fn remove(cluster: &Cluster, tag: &str, yes: bool) -> Result<()> {
    let all = known(cluster).await?.into_iter();
    let found: Vec<_> = all.filter(|it| it.tag == tag).collect();
    let Some(first) = found.first() else {
        bail!("there is no tag {tag}\n  remedy: leyline tag list");
    };
    if !first.namespaces.is_empty() && !yes {
        bail!(
            "namespaces {} are labelled {REVISION}={tag}: no control plane would serve what is theirs\n  remedy: label them \
             otherwise first, or say -y",
            first.namespaces.join(", ")
        );
    }
    let (api, params) = (webhooks(cluster), DeleteParams::default());
    for it in &found {
        cluster
            .ask(format!("remove tag {tag}"), api.delete(&it.object, &params))
            .await?;
    }
    println!("Tag {tag} removed.");
    Ok(())
}

fn table(all: &[Known]) -> String {
    let heading = ["TAG", "REVISION", "NAMESPACES"].map(str::to_owned);
    let row = |it: &Known| {
        let namespaces = it.namespaces.join(",");
        vec![it.tag.clone(), it.revision.clone(), namespaces]
    };
    let mut rows = vec![heading.to_vec()];
    rows.extend(all.iter().map(row));
    screen::table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn webhook(name: &str, labels: &[(&str, &str)]) -> Webhook {
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let mut webhook = Webhook::default();
        webhook.metadata.name = Some(name.to_owned());
        webhook.metadata.labels = Some(labels.collect());
        webhook
    }

    #[test]
    fn tags_are_shown_with_the_namespaces_that_use_them() {
        let webhooks = [
            webhook("b", &[(TAG, "prod"), (REVISION, "1-2")]),
            webhook("a", &[(TAG, "next"), (REVISION, "canary")]),
            webhook("c", &[(REVISION, "canary")]),
        ];
        let namespace = |name: &str, revision: &str| {
            serde_json::from_value::<Namespace>(
                json!({"metadata": {"name": name, "labels": {REVISION: revision}}}),
            )
            .unwrap()
        };
        let namespaces = [namespace("shop", "prod"), namespace("lab", "canary")];
        let text = table(&read(&webhooks, &namespaces));
        let lines: Vec<Vec<_>> = text
            .lines()
            .map(|it| it.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines,
            [
                vec!["TAG", "REVISION", "NAMESPACES"],
                vec!["next", "canary"],
                vec!["prod", "1-2", "shop"]
            ]
        );
    }

    #[test]
    fn a_tag_is_made_as_istioctl_makes_it_and_asks_nobody() {
        let object = object("prod", "1-2", "istio-system");
        let metadata = &object["metadata"];
        assert_eq!(metadata["name"], "istio-revision-tag-prod-istio-system");
        assert_eq!(metadata["labels"][TAG], "prod");
        assert_eq!(metadata["labels"][REVISION], "1-2");
        assert!(object["webhooks"].is_null());
        for wrong in ["", "Prod", "-a", "a-", "a.b"] {
            assert!(check_name(wrong).is_err(), "{wrong:?}");
        }
        check_name("prod-1").unwrap();
    }
}
