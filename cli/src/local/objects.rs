//! The Kubernetes objects that the embedded mesh itself acts upon: what should run, and under which names it is found.
//! Everything else in the user's folder is the control plane's business.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use controlplane::{
    crd::Gateway,
    source::{
        files::Content,
        read::read,
        tree::{self, Node},
        watch::Change,
    },
};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Namespace, Node as ApiNode, Pod, Service},
    discovery::v1::EndpointSlice,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Labels, annotations, selectors.
pub type Labels = BTreeMap<String, String>;

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// Its namespace, `default` where the object names none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Key {
    /// A key from its two halves.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What the user wants, as far as the supervisor acts on it.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Labels of every namespace that is declared or that an object stands in.
    pub namespaces: BTreeMap<String, Labels>,
    /// Labels of nodes that are declared (the nodes themselves come from `--nodes`).
    pub nodes: BTreeMap<String, Labels>,
    /// Pods written out by the user.
    pub pods: BTreeMap<Key, Pod>,
    /// Deployments, which become pods.
    pub deployments: BTreeMap<Key, Deployment>,
    /// Services.
    pub services: BTreeMap<Key, Service>,
    /// Endpoints written out by the user, for services without a selector.
    pub slices: BTreeMap<Key, EndpointSlice>,
    /// Gateways.
    pub gateways: BTreeMap<Key, Gateway>,
    /// Gateways that are waypoints, which run here.
    pub waypoints: BTreeSet<Key>,
    /// Services that were made for these, and are in no file of the user's.
    pub made_services: BTreeSet<Key>,
}

/// Something in the folder that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// The line, from 1; 0 where the file as a whole is meant.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}: {}", self.file, self.message),
        }
    }
}

/// The user's folder as last read. What cannot be used keeps its last good content in force.
#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<String, File>,
    good: HashMap<(String, Key), Arc<Node>>,
}

#[derive(Debug, Default)]
struct File {
    documents: Vec<Arc<Node>>,
    problem: Option<Problem>,
}

impl Folder {
    /// Takes changed files in.
    pub fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            let path = change.file.path.to_string();
            match change.content {
                Content::Gone => {
                    self.files.remove(&path);
                }
                Content::Text(text) => self
                    .files
                    .entry(path.clone())
                    .or_default()
                    .read(&path, &text),
                Content::Unreadable(message) => {
                    let problem = Problem {
                        file: path.clone(),
                        line: 0,
                        message,
                    };
                    self.files.entry(path).or_default().problem = Some(problem);
                }
            }
        }
    }

    /// Everything that is in force, and what is wrong.
    pub fn objects(&mut self) -> (Objects, Vec<Problem>) {
        let mut reading = Reading {
            good: &mut self.good,
            objects: Objects::default(),
            problems: Vec::new(),
            seen: HashSet::new(),
        };
        for (path, file) in &self.files {
            reading.problems.extend(file.problem.clone());
            for document in &file.documents {
                reading.document(path, document);
            }
        }
        let Reading {
            objects,
            problems,
            seen,
            ..
        } = reading;
        self.good.retain(|known, _| seen.contains(known));
        (objects, problems)
    }
}

impl File {
    fn read(&mut self, path: &str, text: &str) {
        match tree::parse(text) {
            Ok(documents) => (self.documents, self.problem) = (documents, None),
            Err(error) => {
                self.problem = Some(Problem {
                    file: path.to_owned(),
                    line: error.place.line,
                    message: error.problem,
                });
            }
        }
    }
}

struct Reading<'a> {
    good: &'a mut HashMap<(String, Key), Arc<Node>>,
    objects: Objects,
    problems: Vec<Problem>,
    seen: HashSet<(String, Key)>,
}

impl Reading<'_> {
    /// Takes one document in. Kinds that the supervisor does not act on only make their namespace known.
    fn document(&mut self, path: &str, node: &Arc<Node>) {
        let text = |node: &Node, key: &str| {
            node.field(key)
                .and_then(|field| field.text())
                .map(str::to_owned)
        };
        let kind = text(node, "kind").unwrap_or_default();
        if kind.ends_with("List")
            && let Some(items) = node.field("items")
            && let tree::Value::Sequence(items) = &items.value
        {
            items.iter().for_each(|item| self.document(path, item));
            return;
        }
        let metadata = node.field("metadata");
        let namespace = metadata.and_then(|metadata| text(metadata, "namespace"));
        let name = metadata.and_then(|metadata| text(metadata, "name"));
        let acted_on = [
            "Namespace",
            "Node",
            "Pod",
            "Deployment",
            "Service",
            "EndpointSlice",
            "Gateway",
        ]
        .contains(&kind.as_str());
        if !matches!(kind.as_str(), "Namespace" | "Node") && (acted_on || namespace.is_some()) {
            let namespace = namespace
                .clone()
                .unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
            self.objects.namespaces.entry(namespace).or_default();
        }
        if acted_on && let Some(name) = name {
            let key = Key::new(
                namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
                name,
            );
            self.object(path, &kind, key, node);
        }
    }

    fn object(&mut self, path: &str, kind: &str, key: Key, node: &Arc<Node>) {
        match kind {
            "Namespace" => {
                if let Some(object) = self.typed::<Namespace>(path, kind, &key, node) {
                    self.objects
                        .namespaces
                        .insert(key.name, object.metadata.labels.unwrap_or_default());
                }
            }
            "Node" => {
                if let Some(object) = self.typed::<ApiNode>(path, kind, &key, node) {
                    self.objects
                        .nodes
                        .insert(key.name, object.metadata.labels.unwrap_or_default());
                }
            }
            "Pod" => {
                let object = self.typed(path, kind, &key, node);
                self.objects.pods.extend(object.map(|object| (key, object)));
            }
            "Deployment" => {
                let object = self.typed(path, kind, &key, node);
                self.objects
                    .deployments
                    .extend(object.map(|object| (key, object)));
            }
            "Service" => {
                let object = self.typed(path, kind, &key, node);
                self.objects
                    .services
                    .extend(object.map(|object| (key, object)));
            }
            "Gateway" => {
                let object = self.typed(path, kind, &key, node);
                self.objects
                    .gateways
                    .extend(object.map(|object| (key, object)));
            }
            _ => {
                let object = self.typed(path, kind, &key, node);
                self.objects
                    .slices
                    .extend(object.map(|object| (key, object)));
            }
        }
    }

    /// The object, or, where it has mistakes, what it was before; `None` where it never was without.
    fn typed<T: DeserializeOwned>(
        &mut self,
        path: &str,
        kind: &str,
        key: &Key,
        node: &Arc<Node>,
    ) -> Option<T> {
        let known = (kind.to_owned(), key.clone());
        self.seen.insert(known.clone());
        let (object, faults) = read::<T>(node);
        if faults.is_empty() {
            self.good.insert(known, node.clone());
            return object;
        }
        let before = self.good.get(&known).and_then(|node| read::<T>(node).0);
        let now = if before.is_some() {
            "its last good state stays in force"
        } else {
            "it is left out"
        };
        self.problems
            .extend(faults.into_iter().map(|fault| Problem {
                file: path.to_owned(),
                line: fault.place.line,
                message: format!("{kind} {key}: {fault} ({now})"),
            }));
        before
    }
}

/// Where an object stands that names no namespace.
const DEFAULT_NAMESPACE: &str = "default";

impl Objects {
    /// The labels of a namespace, none for one that is not declared.
    pub fn namespace_labels(&self, namespace: &str) -> Labels {
        self.namespaces.get(namespace).cloned().unwrap_or_default()
    }
}

/// Label edits made by `leyline local label`, laid over the folder's objects. `None` takes a label away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelEdits {
    /// By namespace.
    pub namespaces: BTreeMap<String, BTreeMap<String, Option<String>>>,
    /// By pod, written `namespace/name`.
    pub pods: BTreeMap<String, BTreeMap<String, Option<String>>>,
}

impl LabelEdits {
    /// Applies the edits of `namespace`, if any.
    pub fn namespace(&self, namespace: &str, labels: &mut Labels) {
        if let Some(edits) = self.namespaces.get(namespace) {
            edit(labels, edits);
        }
    }

    /// Applies the edits of a pod, if any.
    pub fn pod(&self, pod: &Key, labels: &mut Labels) {
        if let Some(edits) = self.pods.get(&pod.to_string()) {
            edit(labels, edits);
        }
    }
}

fn edit(labels: &mut Labels, edits: &BTreeMap<String, Option<String>>) {
    for (key, value) in edits {
        match value {
            Some(value) => labels.insert(key.clone(), value.clone()),
            None => labels.remove(key),
        };
    }
}

#[cfg(test)]
mod tests {
    use controlplane::source::files::FileId;

    use super::*;

    fn write(folder: &mut Folder, text: &str) -> (Objects, Vec<Problem>) {
        let file = FileId {
            folder: 0,
            path: "a.yaml".into(),
        };
        folder.apply(vec![Change {
            file,
            content: Content::Text(text.to_owned()),
            changed: None,
        }]);
        folder.objects()
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_content_and_names_the_line() {
        let mut folder = Folder::default();
        let good = "kind: Namespace\nmetadata: {name: a, labels: {x: \"1\"}}\n---\nkind: Gateway\n";
        let (objects, problems) = write(&mut folder, good);
        assert_eq!(objects.namespaces["a"]["x"], "1");
        assert_eq!(problems, []);
        let (objects, problems) = write(
            &mut folder,
            "kind: Namespace\nmetadata: {name: a, labels: [\n",
        );
        assert_eq!(objects.namespaces["a"]["x"], "1");
        assert!(problems[0].line > 1, "{problems:?}");
        assert!(write(&mut folder, "").0.namespaces.is_empty());
    }

    #[test]
    fn an_unknown_field_leaves_the_object_as_it_was() {
        let mut folder = Folder::default();
        let pod = |extra: &str| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a}}\nspec:\n  hostname: one\n  containers: []\n{extra}"
            )
        };
        let (objects, problems) = write(&mut folder, &pod("  hostnam: two\n"));
        assert!(objects.pods.is_empty());
        assert_eq!(problems[0].line, 7, "{problems:?}");
        write(&mut folder, &pod(""));
        let (objects, problems) = write(&mut folder, &pod("  hostnam: two\n"));
        let pod = &objects.pods[&Key::new("a", "p")];
        assert_eq!(pod.spec.as_ref().unwrap().hostname.as_deref(), Some("one"));
        assert!(
            problems[0].to_string().starts_with("a.yaml:7: Pod a/p: "),
            "{problems:?}"
        );
    }

    #[test]
    fn label_edits_set_and_take_away() {
        let mut edits = LabelEdits::default();
        let of_a = edits.namespaces.entry("a".to_owned()).or_default();
        of_a.insert("new".to_owned(), Some("1".to_owned()));
        of_a.insert("old".to_owned(), None);
        let mut labels = Labels::from([("old".to_owned(), "x".to_owned())]);
        edits.namespace("a", &mut labels);
        edits.namespace("b", &mut labels);
        assert_eq!(labels, Labels::from([("new".to_owned(), "1".to_owned())]));
    }
}
