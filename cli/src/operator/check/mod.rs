//! `leyline check`: is the cluster fit for the mesh, and is the mesh well? Facts are gathered here; what they mean is
//! [`evaluate`]'s.

mod evaluate;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, process::ExitCode};

use anyhow::Result;
use clap::Args;
use futures_util::{StreamExt, stream};
use k8s_openapi::{
    api::{
        admissionregistration::v1::ValidatingWebhookConfiguration,
        authorization::v1::{
            ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
        },
        core::v1::{Namespace, Node, Pod},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::api::{ListParams, PostParams};
use serde_json::{Value, json};
use time::OffsetDateTime;

use self::evaluate::{CertificateFacts, Check, Facts, NodeFacts, Outcome, PodFacts, Webhook};
use super::{
    access::Access,
    cluster::{ADMIN_PORT, Cluster, PodName, is_ready, is_running, node_of, problem},
    output::{self, Form},
    status,
    uninstall::is_enrolled,
    ztunnel_config::{
        dump::{Certificates, Dump},
        tables::instant,
    },
};
use crate::screen;

/// Check the cluster and the mesh in it, in order, with a hint for whatever is wrong
#[derive(Debug, Args)]
pub(crate) struct CheckCommand {
    #[command(flatten)]
    access: Access,
    /// Only what must hold before an install
    #[arg(long)]
    pre: bool,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
}

/// Tunnels whose dump is read at once, and at most.
const DUMPS_AT_ONCE: usize = 8;
const MAX_DUMPS: usize = 64;

/// Runs the command; fails where a check does.
pub(crate) async fn run(command: CheckCommand, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let cluster = Cluster::connect(&access).await?;
    let checks = checks(&cluster, command.pre).await;
    let worst = worst(&checks);
    match command.output.text(&answer(&checks))? {
        Some(text) => output::print(&text)?,
        None => output::print(&text(&checks))?,
    }
    Ok(match worst {
        Outcome::Fail => ExitCode::FAILURE,
        Outcome::Pass | Outcome::Warn => ExitCode::SUCCESS,
    })
}

/// Every check, as JSON.
pub(super) async fn told(cluster: &Cluster) -> Result<Value> {
    Ok(answer(&checks(cluster, false).await))
}

async fn checks(cluster: &Cluster, prerequisites_only: bool) -> Vec<Check> {
    match gather(cluster, prerequisites_only).await {
        Err(error) => vec![evaluate::unreachable(&format!("{error:#}"))],
        Ok(facts) => {
            let mut checks = evaluate::prerequisites(&facts);
            if !prerequisites_only {
                checks.extend(evaluate::mesh(&facts));
            }
            checks
        }
    }
}

fn answer(checks: &[Check]) -> Value {
    json!({"result": worst(checks), "checks": checks})
}

fn worst(checks: &[Check]) -> Outcome {
    checks
        .iter()
        .map(|it| it.result)
        .max()
        .unwrap_or(Outcome::Pass)
}

fn text(checks: &[Check]) -> String {
    let screen = screen::output();
    let mut text = String::new();
    for it in checks {
        let mark = match it.result {
            Outcome::Pass => screen.good("ok"),
            Outcome::Warn => screen.waiting("!!"),
            Outcome::Fail => screen.bad("no"),
        };
        text.push_str(&format!(
            "{mark}  {}  {:<18} {}\n",
            it.code, it.name, it.message
        ));
        if let Some(hint) = it.hint.as_deref().filter(|it| !it.is_empty()) {
            text.push_str(&format!(
                "{:32}{}\n",
                "",
                screen.quiet(&format!("hint: {hint}"))
            ));
        }
    }
    let count = |result| checks.iter().filter(|it| it.result == result).count();
    let (fail, warn) = (count(Outcome::Fail), count(Outcome::Warn));
    text.push_str(&format!(
        "\n{} checks: {fail} failed, {warn} warnings\n",
        checks.len()
    ));
    text
}

/// Only what the API server's address and Kubernetes' version need may fail; what else cannot be had is a fact, too.
async fn gather(cluster: &Cluster, prerequisites_only: bool) -> Result<Facts> {
    let client = cluster.client();
    let version = cluster
        .ask("ask for the version", client.apiserver_version())
        .await?;
    let mut facts = Facts {
        url: cluster.url.clone(),
        kubernetes: version.git_version,
        crds: None,
        forbidden: forbidden(cluster).await?,
        nodes: nodes(cluster).await,
        control_planes: Vec::new(),
        webhook: None,
        agents: Vec::new(),
        tunnels: Vec::new(),
        proxies: Ok(Vec::new()),
        outside: Vec::new(),
        enrolled: 0,
        certificates: Vec::new(),
        unread: Vec::new(),
        now: OffsetDateTime::now_utc(),
    };
    if prerequisites_only {
        return Ok(facts);
    }
    facts.crds = crds(cluster).await;
    facts.control_planes = cluster
        .control_planes()
        .await?
        .iter()
        .map(pod_facts)
        .collect();
    facts.webhook = webhook(cluster).await;
    let api = cluster.within::<Pod>(&cluster.istio_namespace);
    let agents = cluster
        .list("the agents", &api, "k8s-app=istio-cni-node")
        .await?;
    facts.agents = agents.items.iter().map(pod_facts).collect();
    let tunnels = cluster.tunnels().await?;
    facts.tunnels = tunnels.iter().map(pod_facts).collect();
    if facts.control_planes.iter().any(|it| it.ready) {
        facts.proxies = status::proxies(cluster, None)
            .await
            .map_err(|error| format!("{error:#}"));
    }
    enrolment(cluster, &mut facts).await?;
    certificates(cluster, &tunnels, &mut facts).await;
    Ok(facts)
}

fn pod_facts(pod: &Pod) -> PodFacts {
    PodFacts {
        name: pod.metadata.name.clone().unwrap_or_default(),
        node: node_of(pod).unwrap_or_default().to_owned(),
        ready: is_ready(pod),
        problem: problem(pod),
    }
}

/// What the caller may not do.
async fn forbidden(cluster: &Cluster) -> Result<Vec<String>> {
    let istio = Some(cluster.istio_namespace.as_str());
    let needed = [
        ("list", "", "pods", "", None),
        ("list", "", "nodes", "", None),
        ("create", "", "pods", "portforward", istio),
        ("get", "apps", "daemonsets", "", istio),
    ];
    let mut forbidden = Vec::new();
    for (verb, group, resource, subresource, namespace) in needed {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    group: Some(group.to_owned()),
                    resource: Some(resource.to_owned()),
                    subresource: Some(subresource.to_owned()).filter(|it| !it.is_empty()),
                    namespace: namespace.map(str::to_owned),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let api = cluster.all::<SelfSubjectAccessReview>();
        let params = PostParams::default();
        let answer = cluster
            .ask("ask what you may do", api.create(&params, &review))
            .await?;
        if !answer.status.is_some_and(|it| it.allowed) {
            let slash = if subresource.is_empty() { "" } else { "/" };
            forbidden.push(format!("{verb} {resource}{slash}{subresource}"));
        }
    }
    Ok(forbidden)
}

async fn nodes(cluster: &Cluster) -> Vec<NodeFacts> {
    let listed = cluster.list("nodes", &cluster.all::<Node>(), "").await;
    let nodes = listed.map(|it| it.items).unwrap_or_default();
    let facts = nodes.into_iter().map(|node| {
        let status = node.status.unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        let system = status.node_info.unwrap_or_default();
        NodeFacts {
            name: node.metadata.name.unwrap_or_default(),
            ready: conditions
                .iter()
                .any(|it| it.type_ == "Ready" && it.status == "True"),
            kernel: system.kernel_version,
            system: system.operating_system,
        }
    });
    facts.collect()
}

async fn crds(cluster: &Cluster) -> Option<BTreeSet<String>> {
    let api = cluster.all::<CustomResourceDefinition>();
    let params = ListParams::default();
    let listed = cluster
        .ask("list CRDs", api.list_metadata(&params))
        .await
        .ok()?;
    Some(
        listed
            .items
            .into_iter()
            .filter_map(|it| it.metadata.name)
            .collect(),
    )
}

/// The webhook that belongs to the mesh's namespace.
async fn webhook(cluster: &Cluster) -> Option<Webhook> {
    let api = cluster.all::<ValidatingWebhookConfiguration>();
    let listed = cluster.list("webhooks", &api, "").await.ok()?;
    for it in listed.items {
        let webhooks = it.webhooks.unwrap_or_default();
        let ours = webhooks.iter().find(|hook| {
            let service = hook.client_config.service.as_ref();
            service.is_some_and(|it| {
                it.namespace == cluster.istio_namespace && it.name.starts_with("istiod")
            })
        });
        if let Some(hook) = ours {
            return Some(Webhook {
                name: it.metadata.name.unwrap_or_default(),
                trusted: hook
                    .client_config
                    .ca_bundle
                    .as_ref()
                    .is_some_and(|it| !it.0.is_empty()),
                policy: hook
                    .failure_policy
                    .clone()
                    .unwrap_or_else(|| "Fail".to_owned()),
            });
        }
    }
    None
}

const MODE: &str = "istio.io/dataplane-mode";

/// Which running pods are in the mesh, and which should be.
async fn enrolment(cluster: &Cluster, facts: &mut Facts) -> Result<()> {
    let namespaces = cluster
        .list("namespaces", &cluster.all::<Namespace>(), "")
        .await?;
    let ambient = namespaces.items.iter().filter(|it| {
        let labels = it.metadata.labels.as_ref();
        labels
            .and_then(|it| it.get(MODE))
            .is_some_and(|it| it == "ambient")
    });
    let ambient: BTreeSet<_> = ambient.filter_map(|it| it.metadata.name.clone()).collect();
    let pods = cluster.list("pods", &cluster.all::<Pod>(), "").await?;
    for pod in pods.items.iter().filter(|it| is_running(it)) {
        if is_enrolled(pod) {
            facts.enrolled += 1;
        } else if should_be_enrolled(pod, &ambient) {
            let name = PodName::from(pod);
            facts
                .outside
                .push(format!("{}/{}", name.namespace, name.name));
        }
    }
    Ok(())
}

fn should_be_enrolled(pod: &Pod, ambient: &BTreeSet<String>) -> bool {
    let labels = pod.metadata.labels.as_ref();
    let label = |key: &str| labels.and_then(|it| it.get(key)).map(String::as_str);
    let host = pod
        .spec
        .as_ref()
        .and_then(|it| it.host_network)
        .unwrap_or(false);
    let waypoint = label("gateway.istio.io/managed").is_some();
    let wanted = match label(MODE) {
        Some(mode) => mode == "ambient",
        None => pod
            .metadata
            .namespace
            .as_ref()
            .is_some_and(|it| ambient.contains(it)),
    };
    wanted && !host && !waypoint && pod.metadata.deletion_timestamp.is_none()
}

/// The certificates of the tunnels, of a bounded number of nodes.
async fn certificates(cluster: &Cluster, tunnels: &[Pod], facts: &mut Facts) {
    let ready = tunnels.iter().filter(|it| is_ready(it)).take(MAX_DUMPS);
    let names: Vec<_> = ready.map(PodName::from).collect();
    let read = stream::iter(names).map(|name| async move {
        let dump = cluster.json(&name, ADMIN_PORT, "/config_dump").await;
        let found = dump.and_then(|it| certificates_of(&name, &Dump::new(it)?));
        (name, found)
    });
    let read: Vec<_> = read.buffer_unordered(DUMPS_AT_ONCE).collect().await;
    for (name, found) in read {
        match found {
            Ok(found) => facts.certificates.extend(found),
            Err(_) => facts.unread.push(name.to_string()),
        }
    }
}

fn certificates_of(tunnel: &PodName, dump: &Dump) -> Result<Vec<CertificateFacts>> {
    let held = dump.items::<Certificates>("certificates")?;
    let facts = held.into_iter().map(|(_, it)| CertificateFacts {
        tunnel: tunnel.name.clone(),
        leaf_ends: it
            .cert_chain
            .first()
            .and_then(|it| instant(&it.expiration_time)),
        root_ends: it
            .root_certs
            .iter()
            .filter_map(|it| instant(&it.expiration_time))
            .max(),
        identity: it.identity,
        state: it.state,
    });
    Ok(facts.collect())
}
