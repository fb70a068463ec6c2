//! Arguments that name an object: `[type/]name[.namespace]`, as istioctl takes them; a pod for what is behind it.

use std::{collections::BTreeMap, str::FromStr};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::LabelSelector};
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::json;

use super::cluster::{Cluster, is_ready, is_running};

/// The kinds that lead to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Pod,
    Service,
    Deployment,
    DaemonSet,
    StatefulSet,
    ReplicaSet,
    Job,
}

impl FromStr for Type {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "po" | "pod" | "pods" => Self::Pod,
            "svc" | "service" | "services" => Self::Service,
            "deploy" | "deployment" | "deployments" | "deployments.apps" => Self::Deployment,
            "ds" | "daemonset" | "daemonsets" => Self::DaemonSet,
            "sts" | "statefulset" | "statefulsets" => Self::StatefulSet,
            "rs" | "replicaset" | "replicasets" => Self::ReplicaSet,
            "job" | "jobs" => Self::Job,
            other => {
                return Err(format!(
                    "{other:?} leads to no pod: use pod, service, deployment, daemonset, statefulset, replicaset or job"
                ));
            }
        })
    }
}

impl Type {
    fn resource(self) -> ApiResource {
        let (group, kind) = match self {
            Self::Pod => ("", "Pod"),
            Self::Service => ("", "Service"),
            Self::Deployment => ("apps", "Deployment"),
            Self::DaemonSet => ("apps", "DaemonSet"),
            Self::StatefulSet => ("apps", "StatefulSet"),
            Self::ReplicaSet => ("apps", "ReplicaSet"),
            Self::Job => ("batch", "Job"),
        };
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, "v1", kind))
    }
}

/// An object that an argument names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// Its kind.
    pub kind: Type,
    /// Its name.
    pub name: String,
    /// Its namespace, where the argument says it.
    pub namespace: Option<String>,
}

impl FromStr for Named {
    type Err = String;

    /// `name`, `name.namespace`, `type/name`, `type/name.namespace`; also `namespace/name`, where the first part is no
    /// type: a habit of other tools.
    fn from_str(text: &str) -> Result<Self, String> {
        let (first, rest) = match text.split_once('/') {
            Some((first, rest)) => (Some(first), rest),
            None => (None, text),
        };
        let (name, namespace) = match rest.rsplit_once('.') {
            Some((name, namespace)) => (name, Some(namespace.to_owned())),
            None => (rest, None),
        };
        if name.is_empty() || namespace.as_deref() == Some("") || rest.contains('/') {
            return Err(format!(
                "{text:?} is not of the form [type/]name[.namespace]"
            ));
        }
        let name = name.to_owned();
        match first.map(|it| (it, it.parse::<Type>())) {
            None => Ok(Self {
                kind: Type::Pod,
                name,
                namespace,
            }),
            Some((_, Ok(kind))) => Ok(Self {
                kind,
                name,
                namespace,
            }),
            Some((first, Err(_))) if namespace.is_none() && !first.is_empty() => Ok(Self {
                kind: Type::Pod,
                name,
                namespace: Some(first.to_owned()),
            }),
            Some((_, Err(problem))) => Err(problem),
        }
    }
}

impl Named {
    /// The pod, or the first ready pod behind the object.
    pub(crate) async fn pod(&self, cluster: &Cluster) -> Result<Pod> {
        let namespace = self.namespace.as_deref().unwrap_or(&cluster.namespace);
        let name = &self.name;
        let what = format!("find {name} in namespace {namespace}");
        if self.kind == Type::Pod {
            let api = cluster.within::<Pod>(namespace);
            let pod = cluster.ask(&what, api.get_opt(name)).await?;
            return pod.ok_or_else(|| {
                anyhow!(
                    "there is no pod {name} in namespace {namespace}\n  remedy: name it as NAME.NAMESPACE, or \
                     deployment/NAME.NAMESPACE"
                )
            });
        }
        let selector = self.selector(cluster, namespace, &what).await?;
        let api = cluster.within::<Pod>(namespace);
        let pods = cluster.list(format!("the pods of {name}"), &api, &selector);
        let mut pods = pods.await?.items;
        pods.sort_by_key(|it| (!is_ready(it), !is_running(it), it.metadata.name.clone()));
        let first = pods.into_iter().next();
        first.with_context(|| format!("no pod of {name} in namespace {namespace} ({selector})"))
    }

    async fn selector(&self, cluster: &Cluster, namespace: &str, what: &str) -> Result<String> {
        let api = Api::<DynamicObject>::namespaced_with(
            cluster.client(),
            namespace,
            &self.kind.resource(),
        );
        let object = cluster.ask(what, api.get(&self.name)).await?;
        let selector = &object.data["spec"]["selector"];
        let labels = match self.kind {
            Type::Service => json!({ "matchLabels": selector }),
            _ => selector.clone(),
        };
        let labels: Option<LabelSelector> = serde_json::from_value(labels)?;
        let text = labels.as_ref().map(selector_text).transpose()?;
        text.filter(|it| !it.is_empty())
            .with_context(|| format!("{} in namespace {namespace} selects no pods", self.name))
    }
}

/// A selector in the form of a query.
fn selector_text(selector: &LabelSelector) -> Result<String> {
    let none = BTreeMap::new();
    let labels = selector.match_labels.as_ref().unwrap_or(&none);
    let mut terms: Vec<_> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    for it in selector.match_expressions.as_deref().unwrap_or_default() {
        let values = it.values.as_deref().unwrap_or_default().join(",");
        terms.push(match it.operator.as_str() {
            "In" => format!("{} in ({values})", it.key),
            "NotIn" => format!("{} notin ({values})", it.key),
            "Exists" => it.key.clone(),
            "DoesNotExist" => format!("!{}", it.key),
            other => bail!("a selector with the operator {other:?}"),
        });
    }
    Ok(terms.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn reads(text: &str, kind: Type, name: &str, namespace: Option<&str>) {
        let expected = Named {
            kind,
            name: name.to_owned(),
            namespace: namespace.map(str::to_owned),
        };
        assert_eq!(text.parse(), Ok(expected), "{text:?}");
    }

    #[test]
    fn an_argument_names_a_type_a_name_and_a_namespace() {
        reads("web-1", Type::Pod, "web-1", None);
        reads("web-1.shop", Type::Pod, "web-1", Some("shop"));
        reads("pod/web.v1.shop", Type::Pod, "web.v1", Some("shop"));
        reads("deployment/web", Type::Deployment, "web", None);
        reads("deploy/web.shop", Type::Deployment, "web", Some("shop"));
        reads(
            "ds/ztunnel.istio-system",
            Type::DaemonSet,
            "ztunnel",
            Some("istio-system"),
        );
        reads("svc/web.shop", Type::Service, "web", Some("shop"));
        reads("shop/web-1", Type::Pod, "web-1", Some("shop"));
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for text in ["", ".shop", "web.", "secret/web.shop", "a/b/c"] {
            assert!(text.parse::<Named>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_selector_is_told_as_a_query() {
        let selector: LabelSelector = serde_json::from_value(serde_json::json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["a", "b"]},
                {"key": "old", "operator": "DoesNotExist"}
            ]
        }))
        .unwrap();
        assert_eq!(
            selector_text(&selector).unwrap(),
            "app=web,tier in (a,b),!old"
        );
    }
}
