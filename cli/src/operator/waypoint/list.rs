//! `leyline waypoint list` and `status`.

use std::{collections::HashMap, process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use kube::api::DynamicObject;
use serde::Serialize;
use serde_json::Value;

use super::{FOR, REVISION, USE, condition, until_programmed, waypoints};
use crate::{
    operator::{
        cluster::{Cluster, is_ready},
        output::{self, Form},
    },
    screen,
};

/// A waypoint, as list tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    namespace: String,
    name: String,
    revision: String,
    /// Which traffic it takes in effect.
    traffic_type: String,
    programmed: String,
    /// Services that use it.
    services: usize,
    ready_pods: usize,
    pods: usize,
}

pub(super) async fn list(cluster: &Cluster, all: bool, form: Form) -> Result<ExitCode> {
    let namespace = (!all).then_some(cluster.namespace.as_str());
    let found = waypoints(cluster, namespace).await?;
    let users = match found.is_empty() {
        true => HashMap::new(),
        false => users(cluster).await?,
    };
    let mut listed = Vec::new();
    for gateway in &found {
        listed.push(describe(cluster, gateway, &users).await?);
    }
    if let Some(text) = form.text(&serde_json::to_value(&listed)?)? {
        output::print(&text)?;
    } else if listed.is_empty() {
        println!("No waypoints found.");
    } else {
        output::print(&table(&listed, all))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn describe(
    cluster: &Cluster,
    gateway: &DynamicObject,
    users: &HashMap<(String, String), usize>,
) -> Result<Listed> {
    let namespace = gateway.metadata.namespace.clone().unwrap_or_default();
    let name = gateway.metadata.name.clone().unwrap_or_default();
    let label = |key: &str| {
        gateway
            .metadata
            .labels
            .as_ref()
            .and_then(|it| it.get(key).cloned())
    };
    let api = cluster.within::<Pod>(&namespace);
    let selector = format!("gateway.networking.k8s.io/gateway-name={name}");
    let pods = cluster
        .list("the waypoint's pods", &api, &selector)
        .await?
        .items;
    let programmed = condition(gateway, "Programmed").and_then(|it| it["status"].as_str());
    Ok(Listed {
        revision: label(REVISION).unwrap_or_else(|| "default".to_owned()),
        traffic_type: label(FOR).unwrap_or_else(|| "service".to_owned()),
        programmed: programmed.unwrap_or("Unknown").to_owned(),
        services: users
            .get(&(namespace.clone(), name.clone()))
            .copied()
            .unwrap_or(0),
        ready_pods: pods.iter().filter(|it| is_ready(it)).count(),
        pods: pods.len(),
        namespace,
        name,
    })
}

/// How many services use each waypoint, by `(namespace, name)`.
pub(super) async fn users(cluster: &Cluster) -> Result<HashMap<(String, String), usize>> {
    let namespaces = cluster
        .list("namespaces", &cluster.all::<Namespace>(), "")
        .await?;
    let inherited: HashMap<_, _> = namespaces
        .items
        .iter()
        .map(|it| {
            (
                it.metadata.name.clone().unwrap_or_default(),
                used(&it.metadata),
            )
        })
        .collect();
    let services = cluster
        .list("services", &cluster.all::<Service>(), "")
        .await?;
    let mut users = HashMap::new();
    // A waypoint's own Service is behind none.
    let own = |it: &&Service| {
        let labels = it.metadata.labels.as_ref();
        labels.is_some_and(|labels| labels.contains_key("gateway.istio.io/managed"))
    };
    for service in services.items.iter().filter(|it| !own(it)) {
        let namespace = service.metadata.namespace.clone().unwrap_or_default();
        let own = used(&service.metadata);
        let reference = own.or_else(|| inherited.get(&namespace).cloned().flatten());
        let Some((of, name)) = reference.filter(|(_, name)| name != "none") else {
            continue;
        };
        *users.entry((of.unwrap_or(namespace), name)).or_insert(0) += 1;
    }
    Ok(users)
}

/// The waypoint that an object names: its namespace, where that is said, and its name.
fn used(
    object: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
) -> Option<(Option<String>, String)> {
    let labels = object.labels.as_ref()?;
    let namespace = labels.get("istio.io/use-waypoint-namespace").cloned();
    Some((namespace, labels.get(USE)?.clone()))
}

fn table(listed: &[Listed], with_namespace: bool) -> String {
    let row = |namespace: &str, rest: [String; 6]| {
        let namespace = with_namespace.then(|| namespace.to_owned());
        namespace.into_iter().chain(rest).collect::<Vec<_>>()
    };
    let heading = [
        "NAME",
        "REVISION",
        "TRAFFIC TYPE",
        "PROGRAMMED",
        "SERVICES",
        "READY PODS",
    ];
    let mut rows = vec![row("NAMESPACE", heading.map(str::to_owned))];
    rows.extend(listed.iter().map(|it| {
        row(
            &it.namespace,
            [
                it.name.clone(),
                it.revision.clone(),
                it.traffic_type.clone(),
                it.programmed.clone(),
                it.services.to_string(),
                format!("{}/{}", it.ready_pods, it.pods),
            ],
        )
    }));
    screen::table(&rows)
}

/// Which waypoints' status.
pub(super) struct Scope {
    pub all_namespaces: bool,
    pub names: Vec<String>,
    pub wait: Option<Duration>,
}

pub(super) async fn status(cluster: &Cluster, scope: &Scope, form: Form) -> Result<ExitCode> {
    let mut found = chosen(cluster, scope).await?;
    if let Some(limit) = scope.wait {
        for gateway in &found {
            let namespace = gateway.metadata.namespace.as_deref().unwrap_or_default();
            let name = gateway.metadata.name.as_deref().unwrap_or_default();
            until_programmed(cluster, namespace, name, limit).await?;
        }
        found = chosen(cluster, scope).await?;
    }
    let json: Value = found
        .iter()
        .map(|it| {
            serde_json::json!({
                "namespace": it.metadata.namespace,
                "name": it.metadata.name,
                "conditions": it.data["status"]["conditions"],
                "addresses": it.data["status"]["addresses"],
            })
        })
        .collect();
    match form.text(&json)? {
        Some(text) => output::print(&text)?,
        None if found.is_empty() => println!("No waypoints found."),
        None => output::print(&conditions(&found, scope.all_namespaces))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn chosen(cluster: &Cluster, scope: &Scope) -> Result<Vec<DynamicObject>> {
    let namespace = (!scope.all_namespaces).then_some(cluster.namespace.as_str());
    let mut found = waypoints(cluster, namespace).await?;
    let is = |it: &DynamicObject, name: &String| it.metadata.name.as_ref() == Some(name);
    if let Some(name) = scope
        .names
        .iter()
        .find(|name| !found.iter().any(|it| is(it, name)))
    {
        bail!("there is no waypoint {name} here\n  remedy: leyline waypoint list -A");
    }
    found.retain(|it| scope.names.is_empty() || scope.names.iter().any(|name| is(it, name)));
    Ok(found)
}

fn conditions(found: &[DynamicObject], with_namespace: bool) -> String {
    let row = |namespace: &str, rest: [&str; 5]| {
        let namespace = with_namespace.then(|| namespace.to_owned());
        namespace
            .into_iter()
            .chain(rest.map(str::to_owned))
            .collect::<Vec<_>>()
    };
    let mut rows = vec![row(
        "NAMESPACE",
        ["NAME", "STATUS", "TYPE", "REASON", "MESSAGE"],
    )];
    for gateway in found {
        let namespace = gateway.metadata.namespace.as_deref().unwrap_or_default();
        let name = gateway.metadata.name.as_deref().unwrap_or_default();
        let told = gateway.data["status"]["conditions"].as_array();
        let told = told.map(Vec::as_slice).unwrap_or_default();
        if told.is_empty() {
            let nothing = "no control plane has taken it up";
            rows.push(row(
                namespace,
                [name, "Unknown", "Programmed", "Pending", nothing],
            ));
        }
        for it in told {
            let text = |key: &str| it[key].as_str().unwrap_or_default();
            rows.push(row(
                namespace,
                [
                    name,
                    text("status"),
                    text("type"),
                    text("reason"),
                    text("message"),
                ],
            ));
        }
    }
    screen::table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_tells_the_effective_traffic_and_who_uses_it() {
        let listed = Listed {
            namespace: "shop".to_owned(),
            name: "waypoint".to_owned(),
            revision: "default".to_owned(),
            traffic_type: "service".to_owned(),
            programmed: "True".to_owned(),
            services: 3,
            ready_pods: 1,
            pods: 2,
        };
        assert_eq!(
            table(&[listed], true),
            "\
NAMESPACE  NAME      REVISION  TRAFFIC TYPE  PROGRAMMED  SERVICES  READY PODS
shop       waypoint  default   service       True        3         1/2
"
        );
    }

    #[test]
    fn a_status_has_a_row_for_each_condition() {
        let gateway: DynamicObject = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "w", "namespace": "shop"},
            "status": {"conditions": [
                {"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""},
                {"type": "Programmed", "status": "False", "reason": "AddressNotAssigned", "message": "waiting for pods"}
            ]}
        }))
        .unwrap();
        assert_eq!(
            conditions(&[gateway], false),
            "\
NAME  STATUS  TYPE        REASON              MESSAGE
w     True    Accepted    Accepted
w     False   Programmed  AddressNotAssigned  waiting for pods
"
        );
    }
}
