//! Which pods take part: Istio's enablement selectors. Pure.
//!
//! A list of pairs of label selectors, one for the pod and one for its namespace. A pair matches when both of its
//! selectors do (an absent one matches everything), and a pod takes part when any pair matches (`spec/cni.md` 2).

use std::{collections::BTreeMap, str::FromStr};

use saphyr::{LoadableYamlNode as _, Yaml};
use serde::Deserialize;
use serde_json::Value;

use crate::facts::DATAPLANE_MODE_LABEL;

type Labels = BTreeMap<String, String>;

/// The selectors, ORed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enablement(Vec<Pair>);

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Pair {
    pod_selector: Selector,
    namespace_selector: Selector,
}

/// Kubernetes `LabelSelector`: everything in it must hold; an empty one holds always.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Selector {
    match_labels: Labels,
    match_expressions: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Requirement {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

/// Why a text is no list of enablement selectors.
#[derive(Debug, thiserror::Error)]
pub enum ParseEnablementError {
    /// Neither YAML nor JSON.
    #[error("not YAML: {0}")]
    Yaml(String),
    /// Another shape.
    #[error("not a list of podSelector and namespaceSelector: {0}")]
    Shape(#[source] serde_json::Error),
}

impl Default for Enablement {
    /// The pod says `ambient`, or its namespace does and the pod does not say `none`.
    fn default() -> Self {
        let says = |mode: &str| Selector {
            match_labels: [(DATAPLANE_MODE_LABEL.to_owned(), mode.to_owned())].into(),
            match_expressions: Vec::new(),
        };
        let not_none = Requirement {
            key: DATAPLANE_MODE_LABEL.to_owned(),
            operator: Operator::NotIn,
            values: vec!["none".to_owned()],
        };
        Enablement(vec![
            Pair {
                pod_selector: says("ambient"),
                namespace_selector: Selector::default(),
            },
            Pair {
                pod_selector: Selector {
                    match_labels: Labels::new(),
                    match_expressions: vec![not_none],
                },
                namespace_selector: says("ambient"),
            },
        ])
    }
}

impl Enablement {
    /// Nobody takes part.
    pub fn nobody() -> Self {
        Enablement(Vec::new())
    }

    /// Whether a pod with these labels, in a namespace with those, takes part.
    pub fn matches(&self, pod: &Labels, namespace: &Labels) -> bool {
        let pair = |pair: &Pair| {
            pair.pod_selector.matches(pod) && pair.namespace_selector.matches(namespace)
        };
        self.0.iter().any(pair)
    }
}

impl Selector {
    fn matches(&self, labels: &Labels) -> bool {
        let same = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        self.match_labels.iter().all(same)
            && self
                .match_expressions
                .iter()
                .all(|requirement| requirement.holds(labels))
    }
}

impl Requirement {
    fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let listed = value.is_some_and(|value| self.values.contains(value));
        match self.operator {
            Operator::In => listed,
            Operator::NotIn => !listed,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl FromStr for Enablement {
    type Err = ParseEnablementError;

    /// YAML, and JSON with it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let documents =
            Yaml::load_from_str(text).map_err(|e| ParseEnablementError::Yaml(e.to_string()))?;
        let value = documents.first().map_or(Value::Null, json);
        serde_json::from_value(value)
            .map(Enablement)
            .map_err(ParseEnablementError::Shape)
    }
}

/// Selectors hold texts only: a number or a boolean that was written bare counts as the text it shows.
fn json(yaml: &Yaml<'_>) -> Value {
    if let Some(list) = yaml.as_sequence() {
        return list.iter().map(json).collect();
    }
    if let Some(fields) = yaml.as_mapping() {
        let named = fields
            .iter()
            .filter_map(|(key, value)| Some((key.as_str()?.to_owned(), json(value))));
        return Value::Object(named.collect());
    }
    if let Some(text) = yaml.as_str() {
        return text.into();
    }
    if let Some(flag) = yaml.as_bool() {
        return flag.to_string().into();
    }
    yaml.as_integer()
        .map_or(Value::Null, |number| number.to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> Labels {
        let pairs = text.split(' ').filter_map(|pair| pair.split_once('='));
        pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }

    #[track_caller]
    fn check(selectors: &str, pod: &str, namespace: &str, expected: bool) {
        let enablement: Enablement = selectors.parse().expect("selectors");
        let matches = enablement.matches(&labels(pod), &labels(namespace));
        assert_eq!(
            matches, expected,
            "{selectors} pod {pod:?} namespace {namespace:?}"
        );
    }

    const UPSTREAM: &str = "
- podSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
- podSelector:
    matchExpressions: [{key: istio.io/dataplane-mode, operator: NotIn, values: [none]}]
  namespaceSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
";

    #[test]
    fn the_default_is_what_istios_chart_writes() {
        assert_eq!(
            UPSTREAM.parse::<Enablement>().expect("YAML"),
            Enablement::default()
        );
        let json = r#"[{"podSelector":{"matchLabels":{"istio.io/dataplane-mode":"ambient"}}},
            {"podSelector":{"matchExpressions":[{"key":"istio.io/dataplane-mode","operator":"NotIn","values":["none"]}]},
             "namespaceSelector":{"matchLabels":{"istio.io/dataplane-mode":"ambient"}}}]"#;
        assert_eq!(
            json.parse::<Enablement>().expect("JSON"),
            Enablement::default()
        );
    }

    #[test]
    fn pairs_are_ored_and_their_halves_anded() {
        let two = r#"[{"podSelector":{"matchLabels":{"a":"1"}},"namespaceSelector":{"matchLabels":{"b":"1"}}},
            {"podSelector":{"matchExpressions":[{"key":"c","operator":"Exists"}]}}]"#;
        check(two, "a=1", "b=1", true);
        check(two, "a=1", "", false);
        check(two, "", "b=1", false);
        check(two, "c=x", "", true);
        check("[{}]", "", "", true);
        check("[]", "a=1", "b=1", false);
        let expressions = |operator: &str| {
            format!(
                r#"[{{"podSelector":{{"matchExpressions":[{{"key":"k","operator":"{operator}","values":["v"]}}]}}}}]"#
            )
        };
        for (operator, absent, listed, other) in [
            ("In", false, true, false),
            ("NotIn", true, false, true),
            ("Exists", false, true, true),
            ("DoesNotExist", true, false, false),
        ] {
            check(&expressions(operator), "", "", absent);
            check(&expressions(operator), "k=v", "", listed);
            check(&expressions(operator), "k=w", "", other);
        }
        check(
            "- podSelector: {matchLabels: {mesh: true, gen: 2}}",
            "mesh=true gen=2",
            "",
            true,
        );
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for bad in [
            "",
            "ambient",
            "{}",
            "[{podSelector: {matchExpressions: [{key: a, operator: Near}]}}]",
            "[",
        ] {
            assert!(bad.parse::<Enablement>().is_err(), "{bad}");
        }
    }
}
