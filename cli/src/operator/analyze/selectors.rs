//! Policies whose selector does not do what it looks like: it matches nobody, or a waypoint, which looks at targetRefs
//! alone. Pure.

use std::collections::{BTreeMap, BTreeSet};

use controlplane::source::tree::{self, Node, Value as Tree};
use serde_json::Value;

use super::{
    documents,
    findings::{self, Finding},
};

/// Whose pods belong to a Gateway.
const GATEWAY: &str = "gateway.networking.k8s.io/gateway-name";
/// Kinds whose `spec.selector.matchLabels` select workloads.
const SELECTING: [&str; 5] = [
    "AuthorizationPolicy",
    "PeerAuthentication",
    "RequestAuthentication",
    "Telemetry",
    "WasmPlugin",
];

type Labels = BTreeMap<String, String>;

/// A finding, and the namespace of its object.
pub(super) struct Told {
    pub(super) namespace: String,
    pub(super) finding: Finding,
}

/// A policy with a selector and without targetRefs.
struct Policy {
    kind: String,
    namespace: String,
    name: String,
    selector: Labels,
    reference: Option<String>,
}

/// What policies select: pods, entries, and what makes pods.
struct Workload {
    namespace: String,
    labels: Labels,
}

/// The findings of all objects; files stand before the cluster's objects of the same name.
pub(super) fn findings(
    texts: &BTreeMap<String, String>,
    objects: &[Value],
    root: &str,
) -> Vec<Told> {
    let (mut policies, mut workloads, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    let mut take = |node: &Node, file: Option<&str>| {
        if let Some(policy) = Policy::of(node, file) {
            let key = (
                policy.kind.clone(),
                policy.namespace.clone(),
                policy.name.clone(),
            );
            if seen.insert(key) {
                policies.push(policy);
            }
        }
        workloads.extend(Workload::of(node));
    };
    for (file, text) in texts {
        documents(text)
            .iter()
            .for_each(|node| take(node, Some(file)));
    }
    for object in objects {
        // JSON is YAML; what cannot be read of an API server's object is none of a user's mistakes.
        let read = tree::parse(&object.to_string()).unwrap_or_default();
        read.iter().for_each(|node| take(node, None));
    }
    if workloads.is_empty() {
        // Files alone, of policies alone: nothing is known of whom they select.
        return Vec::new();
    }
    policies
        .iter()
        .filter_map(|policy| policy.judge(&workloads, root))
        .collect()
}

impl Policy {
    fn of(node: &Node, file: Option<&str>) -> Option<Self> {
        let kind = text(node, "kind")?;
        if !SELECTING.contains(&kind) {
            return None;
        }
        let (metadata, spec) = (node.field("metadata")?, node.field("spec")?);
        let selector = labels(spec.field("selector")?.field("matchLabels"));
        let targets = ["targetRefs", "targetRef"];
        if selector.is_empty() || targets.iter().any(|it| spec.field(it).is_some()) {
            return None;
        }
        Some(Self {
            kind: kind.to_owned(),
            namespace: text(metadata, "namespace").unwrap_or("default").to_owned(),
            name: text(metadata, "name")?.to_owned(),
            selector,
            reference: file.map(|file| format!("{file}:{}", node.place.line)),
        })
    }

    fn judge(&self, workloads: &[Workload], root: &str) -> Option<Told> {
        let in_scope = |it: &&Workload| self.namespace == root || it.namespace == self.namespace;
        let selects = |it: &&Workload| {
            let mut pairs = self.selector.iter();
            pairs.all(|(key, value)| it.labels.get(key) == Some(value))
        };
        let selected: Vec<_> = workloads.iter().filter(in_scope).filter(selects).collect();
        let gateways: BTreeSet<&str> = selected
            .iter()
            .filter_map(|it| it.labels.get(GATEWAY))
            .map(String::as_str)
            .collect();
        let within = match self.namespace == root {
            true => "the mesh".to_owned(),
            false => format!("namespace {}", self.namespace),
        };
        if selected.is_empty() {
            let message = format!("no workload of {within} has the labels {}", self.wish());
            return self.told("IST0127", message);
        }
        let name = gateways.iter().next()?;
        let message = format!(
            "{} selects pods of Gateway {name}, which looks at policies with targetRefs alone: name it there",
            self.wish()
        );
        self.told("IST0166", message)
    }

    fn wish(&self) -> String {
        let pairs = self.selector.iter();
        let pairs: Vec<_> = pairs.map(|(key, value)| format!("{key}={value}")).collect();
        pairs.join(",")
    }

    fn told(&self, code: &str, message: String) -> Option<Told> {
        let analyzer = findings::of(code)?;
        Some(Told {
            namespace: self.namespace.clone(),
            finding: Finding {
                level: analyzer.level,
                code: analyzer.code,
                message,
                origin: format!("{} {}.{}", self.kind, self.name, self.namespace),
                reference: self.reference.clone(),
            },
        })
    }
}

impl Workload {
    fn of(node: &Node) -> Option<Self> {
        let metadata = node.field("metadata")?;
        let own = || labels(metadata.field("labels"));
        let spec = node.field("spec");
        let labels = match text(node, "kind")? {
            "Pod" => own(),
            "WorkloadEntry" => {
                let mut all = labels(spec.and_then(|spec| spec.field("labels")));
                all.extend(own());
                all
            }
            // What makes pods stands for them in files, where there are none.
            _ => {
                let template = spec?.field("template")?.field("metadata")?;
                labels(template.field("labels"))
            }
        };
        Some(Self {
            namespace: text(metadata, "namespace").unwrap_or("default").to_owned(),
            labels,
        })
    }
}

fn text<'n>(node: &'n Node, key: &str) -> Option<&'n str> {
    node.field(key)?.text()
}

fn labels(node: Option<&std::sync::Arc<Node>>) -> Labels {
    let Some(Tree::Mapping(entries)) = node.map(|node| &node.value) else {
        return Labels::new();
    };
    let pair = |entry: &tree::Entry| Some((entry.key.to_string(), entry.node.text()?.to_owned()));
    entries.iter().filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(policies: &str, objects: &[Value]) -> Vec<(String, String)> {
        let texts = [("a.yaml".to_owned(), policies.to_owned())].into();
        let found = findings(&texts, objects, "istio-system");
        let pair = |it: Told| (it.finding.code.to_owned(), it.finding.to_string());
        found.into_iter().map(pair).collect()
    }

    fn policy(namespace: &str, spec: &str) -> String {
        format!(
            "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p, namespace: {namespace}}}, spec: {{{spec}}}}}"
        )
    }

    #[test]
    fn a_selector_of_nobody_and_one_of_a_waypoint_are_told() {
        let web = json!({"kind": "Pod", "metadata": {"name": "web-1", "namespace": "shop", "labels": {"app": "web"}}});
        let waypoint = json!({"kind": "Pod", "metadata": {"name": "w-1", "namespace": "shop",
            "labels": {"app": "edge", GATEWAY: "edge"}}});
        let deployment = json!({"kind": "Deployment", "metadata": {"name": "api", "namespace": "shop"},
            "spec": {"template": {"metadata": {"labels": {"app": "api"}}}}});
        let objects = [web, waypoint, deployment];
        let by = |app: &str| format!("selector: {{matchLabels: {{app: {app}}}}}");
        let table = [
            ("shop", by("web"), None),
            ("shop", by("api"), None),
            ("other", by("web"), Some("IST0127")),
            ("istio-system", by("web"), None),
            ("shop", by("webb"), Some("IST0127")),
            ("shop", by("edge"), Some("IST0166")),
            ("shop", "selector: {}".to_owned(), None),
            (
                "shop",
                by("webb") + ", targetRefs: [{kind: Service, name: x}]",
                None,
            ),
        ];
        for (namespace, spec, expected) in table {
            let found = told(&policy(namespace, &spec), &objects);
            let code = found.first().map(|(code, _)| code.as_str());
            assert_eq!(code, expected, "{namespace} {spec}: {found:?}");
        }
        let found = told(&policy("shop", &by("webb")), &objects);
        assert_eq!(
            found[0].1,
            "Warning [IST0127] (AuthorizationPolicy p.shop a.yaml:1) no workload of namespace shop has the labels app=webb"
        );
    }

    #[test]
    fn of_policies_alone_it_is_not_said_that_they_select_nobody() {
        let found = told(&policy("shop", "selector: {matchLabels: {app: web}}"), &[]);
        assert!(found.is_empty(), "{found:?}");
    }
}
