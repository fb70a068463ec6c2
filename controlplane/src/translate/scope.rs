//! Which services are one service in all clusters of the mesh: MeshConfig `serviceScopeConfigs`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::Deserialize;

use super::waypoint::matches_selector;
use crate::object::Labels;

/// The label that makes a service global where the mesh has no rules.
const GLOBAL: &str = "istio.io/global";

/// MeshConfig `serviceScopeConfigs[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ScopeRule {
    /// Of the labels of the service's namespace; absent: every namespace.
    pub namespace_selector: Option<LabelSelector>,
    /// Of the service's own labels; absent: every service.
    pub services_selector: Option<LabelSelector>,
    /// What a service is that both match.
    pub scope: Scope,
}

/// From where a service is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Scope {
    /// From its own cluster.
    #[default]
    Local,
    /// From every cluster of the mesh.
    Global,
}

/// The scope of a service. `rules`: the mesh's, `None` where it has none: then the label `istio.io/global=true` on the
/// service, or on its namespace where the service does not have the label, makes it global. As upstream, one rule with
/// GLOBAL is enough, wherever it stands; a rule without any selector matches nothing.
pub fn scope(rules: Option<&[ScopeRule]>, service: &Labels, namespace: &Labels) -> Scope {
    let is_global = match rules {
        Some(rules) => rules
            .iter()
            .any(|rule| rule.scope == Scope::Global && rule.matches(service, namespace)),
        None => {
            let label = service.get(GLOBAL).or_else(|| namespace.get(GLOBAL));
            label.is_some_and(|value| **value == *"true")
        }
    };
    match is_global {
        true => Scope::Global,
        false => Scope::Local,
    }
}

impl ScopeRule {
    fn matches(&self, service: &Labels, namespace: &Labels) -> bool {
        let fits = |selector: &Option<LabelSelector>, labels| {
            selector
                .as_ref()
                .is_none_or(|selector| matches_selector(selector, labels))
        };
        let is_empty = self.namespace_selector.is_none() && self.services_selector.is_none();
        !is_empty
            && fits(&self.namespace_selector, namespace)
            && fits(&self.services_selector, service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> Labels {
        let pairs = text.split_whitespace().filter_map(|it| it.split_once('='));
        pairs
            .map(|(key, value)| (key.into(), value.into()))
            .collect()
    }

    #[test]
    fn a_service_is_global_if_any_rule_says_so_of_it_and_of_its_namespace() {
        let rules: Vec<ScopeRule> = serde_json::from_value(serde_json::json!([
            {"servicesSelector": {"matchLabels": {"hidden": "yes"}}, "scope": "LOCAL"},
            {
                "namespaceSelector": {"matchLabels": {"team": "shop"}},
                "servicesSelector": {"matchExpressions": [{"key": "istio.io/global", "operator": "Exists"}]},
                "scope": "GLOBAL",
            },
            {"scope": "GLOBAL"},
        ]))
        .unwrap();
        let of = |service, namespace| scope(Some(&rules), &labels(service), &labels(namespace));
        assert_eq!(of("istio.io/global=1", "team=shop"), Scope::Global);
        assert_eq!(
            of("istio.io/global=1 hidden=yes", "team=shop"),
            Scope::Global
        );
        assert_eq!(of("istio.io/global=1", "team=other"), Scope::Local);
        assert_eq!(of("", "team=shop"), Scope::Local);
    }

    #[test]
    fn without_rules_the_label_decides_and_the_services_own_before_its_namespaces() {
        let of = |service, namespace| scope(None, &labels(service), &labels(namespace));
        assert_eq!(of("", ""), Scope::Local);
        assert_eq!(of("istio.io/global=true", ""), Scope::Global);
        assert_eq!(of("", "istio.io/global=true"), Scope::Global);
        assert_eq!(
            of("istio.io/global=false", "istio.io/global=true"),
            Scope::Local
        );
        assert_eq!(
            scope(Some(&[]), &labels("istio.io/global=true"), &labels("")),
            Scope::Local
        );
    }
}
