//! From where a ServiceEntry's hosts are seen: the mesh setting `serviceEntryVisibility`, which goes by the entry's namespace.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use proto::workload as wire;
use serde::Deserialize;

use super::{condition, waypoint::matches_selector};
use crate::{
    object::Labels,
    output::{Condition, Truth},
};

/// MeshConfig `serviceEntryVisibility`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EntryVisibility {
    /// The first that matches counts.
    pub policies: Vec<Policy>,
    /// Where none matches.
    pub default_visibility: Visibility,
}

/// MeshConfig `serviceEntryVisibility.policies[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Policy {
    /// Any of them must match.
    pub matching_rules: Vec<Rule>,
    /// What it is then.
    pub visibility: Visibility,
}

/// MeshConfig `serviceEntryVisibility.policies[].matchingRules[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// Of the labels of the entry's namespace; an empty one matches every namespace, none matches nothing.
    pub namespace_selector: Option<LabelSelector>,
}

/// From where hosts are seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Visibility {
    /// From the whole mesh.
    #[default]
    Public,
    /// From the entry's own namespace.
    Namespace,
    /// From nowhere.
    None,
}

impl EntryVisibility {
    /// The visibility of the entries of a namespace with these labels.
    pub fn of(&self, namespace: &Labels) -> Visibility {
        let matches = |rule: &Rule| {
            let selector = rule.namespace_selector.as_ref();
            selector.is_some_and(|selector| matches_selector(selector, namespace))
        };
        let mut policies = self.policies.iter();
        let first = policies.find(|policy| policy.matching_rules.iter().any(matches));
        first.map_or(self.default_visibility, |policy| policy.visibility)
    }
}

impl Visibility {
    /// As the wire has it; `None`: not at all.
    pub fn wire(self) -> Option<wire::Visibility> {
        match self {
            Self::Public => Some(wire::Visibility::Public),
            Self::Namespace => Some(wire::Visibility::Namespace),
            Self::None => None,
        }
    }

    /// What the entry is told.
    pub fn condition(self) -> Condition {
        let (reason, message) = match self {
            Self::Public => ("Public", "its hosts are known in the whole mesh"),
            Self::Namespace => (
                "Namespace",
                "its hosts are known in its own namespace alone",
            ),
            Self::None => (
                "None",
                "no proxy is told of its hosts: the mesh's serviceEntryVisibility is NONE for its namespace",
            ),
        };
        condition("istio.io/VisibilityApplied", Truth::True, reason, message)
    }
}
