//! What the mesh's own configuration asks for and does not get: the ConfigMap `istio` of the root namespace, or `istio-REVISION`. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use controlplane::{
    config::mesh::MeshConfig,
    source::tree::{self, Node},
    translate::l7::istio::mesh::MeshSettings,
    world::Settings,
};
use serde_json::Value;

use super::{
    documents,
    findings::{self, Finding},
    selectors::Told,
};

/// The ConfigMap's name, before a revision.
const NAME: &str = "istio";
const CODE: &str = "LEY-A09";

/// One of the mesh's configurations.
pub(super) struct Written {
    name: String,
    text: String,
    reference: Option<String>,
}

/// A file that holds the mesh's configuration alone, without a ConfigMap around it.
#[derive(Debug)]
pub(super) struct MeshFile {
    pub name: String,
    pub text: String,
}

/// The given one; else those of files, and of the cluster where no file has them.
pub(super) fn written(
    given: Option<&MeshFile>,
    texts: &BTreeMap<String, String>,
    objects: &[Value],
    root: &str,
) -> Vec<Written> {
    if let Some(given) = given {
        return vec![Written {
            name: NAME.to_owned(),
            text: given.text.clone(),
            reference: Some(given.name.clone()),
        }];
    }
    let in_files = texts.iter().flat_map(|(file, text)| {
        let found = documents(text);
        let of = |it: &Arc<Node>| Written::of(it, root, Some(file));
        found.iter().filter_map(of).collect::<Vec<_>>()
    });
    let maps = objects.iter().filter(|it| it["kind"] == "ConfigMap");
    let in_cluster = maps.filter_map(|it| {
        // JSON is YAML.
        let read = tree::parse(&it.to_string()).unwrap_or_default();
        Written::of(read.first()?, root, None)
    });
    let mut seen = BTreeSet::new();
    let mut all: Vec<_> = in_files.chain(in_cluster).collect();
    all.retain(|it| seen.insert(it.name.clone()));
    all
}

/// Whether a ConfigMap of the root namespace may be one, by its name.
pub(super) fn is_name(name: &str) -> bool {
    let rest = name.strip_prefix(NAME);
    rest.is_some_and(|it| it.is_empty() || it.starts_with('-'))
}

/// The control plane's settings, with what they say of policies and routes; the one without a revision counts.
pub(super) fn settings(written: &[Written], root: &str) -> Settings {
    let mut settings = Settings {
        root_namespace: root.into(),
        ..Settings::default()
    };
    let plain = written.iter().find(|it| it.name == NAME);
    let config = plain.or(written.first());
    let config = config.and_then(|it| MeshConfig::parse(&it.text).ok());
    settings.mesh = config.map(|config| {
        let read = MeshSettings::read(&settings, &config.document, &mut Vec::new());
        Arc::new(read)
    });
    settings
}

/// The findings of each.
pub(super) fn findings(written: &[Written], settings: &Settings) -> Vec<Told> {
    let of = |it: &Written| {
        let problems = it.problems(settings);
        let told = problems.into_iter().filter_map(|problem| {
            let analyzer = findings::of(CODE)?;
            Some(Told {
                namespace: settings.root_namespace.to_string(),
                finding: Finding {
                    level: analyzer.level,
                    code: analyzer.code,
                    message: problem,
                    origin: format!("ConfigMap {}.{}", it.name, settings.root_namespace),
                    reference: it.reference.clone(),
                },
            })
        });
        told.collect::<Vec<_>>()
    };
    written.iter().flat_map(of).collect()
}

impl Written {
    fn of(node: &Node, root: &str, file: Option<&String>) -> Option<Self> {
        let text = |node: &Node, field: &str| Some(node.field(field)?.text()?.to_owned());
        let metadata = node.field("metadata")?;
        let name = text(metadata, "name")?;
        let is_it = text(node, "kind")? == "ConfigMap"
            && text(metadata, "namespace").as_deref() == Some(root)
            && is_name(&name);
        Some(Self {
            text: text(node.field("data")?, "mesh")?,
            reference: file.map(|file| format!("{file}:{}", node.place.line)),
            name,
        })
        .filter(|_| is_it)
    }

    /// The control plane's own words, which it logs.
    fn problems(&self, settings: &Settings) -> Vec<String> {
        let mut problems = Vec::new();
        match MeshConfig::parse(&self.text) {
            Ok(config) => {
                MeshSettings::read(settings, &config.document, &mut problems);
            }
            Err(error) => {
                problems.push(format!("the control plane does not start with it: {error}"))
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(name: &str, mesh: &str) -> Value {
        json!({"kind": "ConfigMap", "metadata": {"name": name, "namespace": "istio-system"}, "data": {"mesh": mesh}})
    }

    fn told(texts: &BTreeMap<String, String>, objects: &[Value]) -> Vec<String> {
        told_with(None, texts, objects)
    }

    fn told_with(
        given: Option<&MeshFile>,
        texts: &BTreeMap<String, String>,
        objects: &[Value],
    ) -> Vec<String> {
        let written = written(given, texts, objects, "istio-system");
        let found = findings(&written, &Settings::default());
        found.iter().map(|it| it.finding.to_string()).collect()
    }

    #[test]
    fn what_of_the_meshs_configuration_is_not_kept_is_told() {
        let bad = map(
            "istio",
            "accessLogFile: /dev/stdout\naccessLogFormat: '%NOPE%'",
        );
        let worse = map("istio-canary", "trustDomain: '/'");
        let other = map("istio-ca-root-cert", "accessLogFormat: '%NOPE%'");
        let found = told(
            &BTreeMap::new(),
            &[bad, worse, map("other", "accessLogFormat: '%NOPE%'")],
        );
        assert_eq!(found.len(), 2, "{found:#?}");
        assert!(
            found[0]
                .starts_with("Warning [LEY-A09] (ConfigMap istio.istio-system) accessLogFormat: ")
                && found[0].contains("NOPE"),
            "{}",
            found[0]
        );
        assert!(
            found[1].contains("istio-canary") && found[1].contains("trustDomain"),
            "{}",
            found[1]
        );
        // A name alone does not make it one.
        let mut without = other;
        without["data"] = json!({"root-cert.pem": ""});
        assert!(
            told(
                &BTreeMap::new(),
                &[without, map("istio", "enableTracing: true")]
            )
            .is_empty()
        );
    }

    #[test]
    fn a_file_is_told_of_by_its_line_and_stands_for_the_clusters() {
        let file = "kind: ConfigMap\napiVersion: v1\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    \
                    defaultProviders: {tracing: [gone]}\n";
        let texts = BTreeMap::from([("mesh.yaml".to_owned(), format!("---\n{file}"))]);
        let found = told(&texts, &[map("istio", "accessLogFormat: '%NOPE%'")]);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(
            found[0].contains("mesh.yaml:2") && found[0].contains("\"gone\""),
            "{}",
            found[0]
        );
    }

    #[test]
    fn a_configuration_that_is_given_stands_for_those_of_files_and_of_the_cluster() {
        let given = MeshFile {
            name: "mesh.yaml".to_owned(),
            text: "defaultProviders: {tracing: [gone]}".to_owned(),
        };
        let in_cluster = [map("istio", "accessLogFormat: '%NOPE%'")];
        let found = told_with(Some(&given), &BTreeMap::new(), &in_cluster);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(
            found[0].contains("istio.istio-system mesh.yaml)") && found[0].contains("\"gone\""),
            "{}",
            found[0]
        );
    }
}
