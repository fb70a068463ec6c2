//! The Kubernetes objects that the embedded mesh itself acts upon: what should run, and under which names it is found.
//! Everything else in the user's folder is the control plane's business.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{Namespace, Node, Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

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
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The key in an object's metadata; `None` where it has no name.
    pub fn of(metadata: &ObjectMeta) -> Option<Self> {
        let namespace = metadata.namespace.clone().unwrap_or_else(|| "default".to_owned());
        Some(Self { namespace, name: metadata.name.clone().filter(|name| !name.is_empty())? })
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
}

/// Something in the folder that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it, with the line where it is known.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.message)
    }
}

/// The user's folder as last read. A file that cannot be used keeps its last good content in force.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    files: HashMap<PathBuf, Content>,
}

#[derive(Debug, Default)]
struct Content {
    stamp: Option<(SystemTime, u64)>,
    documents: Vec<Value>,
    problem: Option<String>,
}

impl Folder {
    /// A folder, not read yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), files: HashMap::new() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what has changed since the last time, and answers with everything.
    pub fn read(&mut self) -> io::Result<(Objects, Vec<Problem>)> {
        let mut paths = BTreeSet::new();
        yaml_files(&self.path, &mut paths)?;
        self.files.retain(|path, _| paths.contains(path));
        for path in &paths {
            self.files.entry(path.clone()).or_default().refresh(path);
        }
        let mut objects = Objects::default();
        let mut problems = Vec::new();
        for path in &paths {
            let content = &self.files[path];
            let mut problem = |message: String| problems.push(Problem { file: path.clone(), message });
            content.problem.iter().cloned().for_each(&mut problem);
            for document in &content.documents {
                objects.add(document).unwrap_or_else(&mut problem);
            }
        }
        Ok((objects, problems))
    }
}

impl Content {
    fn refresh(&mut self, path: &Path) {
        let stamp = fs::metadata(path).and_then(|meta| Ok((meta.modified()?, meta.len()))).ok();
        if stamp.is_some() && stamp == self.stamp {
            return;
        }
        self.stamp = stamp;
        let parsed = fs::read_to_string(path).map_err(|error| error.to_string()).and_then(|text| documents(&text));
        match parsed {
            Ok(documents) => (self.documents, self.problem) = (documents, None),
            Err(problem) => self.problem = Some(problem),
        }
    }
}

fn yaml_files(folder: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            // A folder that vanishes or may not be entered takes only its own files away.
            let _ = yaml_files(&path, found);
        } else if path.extension().is_some_and(|ending| ["yaml", "yml", "json"].iter().any(|known| ending == *known)) {
            found.insert(path);
        }
    }
    Ok(())
}

/// The YAML documents of a text, empty ones left out.
pub fn documents(text: &str) -> Result<Vec<Value>, String> {
    use saphyr::LoadableYamlNode;
    let parsed = saphyr::Yaml::load_from_str(text).map_err(|error| {
        let place = error.marker();
        format!("line {}, column {}: {}", place.line(), place.col() + 1, error.info())
    })?;
    Ok(parsed.iter().map(value).filter(|value| !value.is_null()).collect())
}

fn value(node: &saphyr::Yaml<'_>) -> Value {
    use saphyr::{Scalar, Yaml};
    match node {
        Yaml::Value(Scalar::Boolean(truth)) => (*truth).into(),
        Yaml::Value(Scalar::Integer(number)) => (*number).into(),
        Yaml::Value(Scalar::FloatingPoint(number)) => number.into_inner().into(),
        Yaml::Value(Scalar::String(text)) => text.as_ref().into(),
        Yaml::Sequence(items) => items.iter().map(value).collect(),
        Yaml::Mapping(pairs) => {
            let pairs = pairs.iter().map(|(key, item)| (name_of(key), value(item)));
            Value::Object(pairs.collect())
        }
        Yaml::Tagged(_, inner) => value(inner),
        _ => Value::Null,
    }
}

fn name_of(key: &saphyr::Yaml<'_>) -> String {
    match value(key) {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

impl Objects {
    /// Takes one document in. Kinds that the supervisor does not act on only make their namespace known.
    fn add(&mut self, document: &Value) -> Result<(), String> {
        let kind = document["kind"].as_str().unwrap_or_default();
        if kind.ends_with("List")
            && let Some(items) = document["items"].as_array()
        {
            return items.iter().try_for_each(|item| self.add(item));
        }
        match kind {
            "Namespace" => {
                let namespace: Namespace = typed(document)?;
                let name = namespace.metadata.name.ok_or("a Namespace has no metadata.name")?;
                self.namespaces.insert(name, namespace.metadata.labels.unwrap_or_default());
                return Ok(());
            }
            "Node" => {
                let node: Node = typed(document)?;
                let name = node.metadata.name.ok_or("a Node has no metadata.name")?;
                self.nodes.insert(name, node.metadata.labels.unwrap_or_default());
                return Ok(());
            }
            "Pod" => insert(&mut self.pods, document, |pod: &Pod| &pod.metadata)?,
            "Deployment" => insert(&mut self.deployments, document, |object: &Deployment| &object.metadata)?,
            "Service" => insert(&mut self.services, document, |object: &Service| &object.metadata)?,
            "EndpointSlice" => insert(&mut self.slices, document, |object: &EndpointSlice| &object.metadata)?,
            _ => {}
        }
        if let Some(namespace) = document["metadata"]["namespace"].as_str() {
            self.namespaces.entry(namespace.to_owned()).or_default();
        } else if matches!(kind, "Pod" | "Deployment" | "Service") {
            self.namespaces.entry("default".to_owned()).or_default();
        }
        Ok(())
    }

    /// The labels of a namespace, none for one that is not declared.
    pub fn namespace_labels(&self, namespace: &str) -> Labels {
        self.namespaces.get(namespace).cloned().unwrap_or_default()
    }
}

fn insert<T: DeserializeOwned>(
    into: &mut BTreeMap<Key, T>,
    document: &Value,
    metadata: impl Fn(&T) -> &ObjectMeta,
) -> Result<(), String> {
    let object: T = typed(document)?;
    let key = Key::of(metadata(&object)).ok_or_else(|| format!("a {} has no metadata.name", document["kind"]))?;
    into.insert(key, object);
    Ok(())
}

fn typed<T: DeserializeOwned>(document: &Value) -> Result<T, String> {
    T::deserialize(document).map_err(|error| {
        let (kind, name) = (&document["kind"], &document["metadata"]["name"]);
        format!("{} {}: {error}", kind.as_str().unwrap_or("?"), name.as_str().unwrap_or("?"))
    })
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
    use super::*;

    #[test]
    fn a_broken_file_keeps_its_last_good_content_and_names_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.yaml");
        fs::write(&file, "kind: Namespace\nmetadata: {name: a, labels: {x: \"1\"}}\n---\n---\nkind: Gateway\n").unwrap();
        let mut watched = Folder::new(folder.path());
        let (objects, problems) = watched.read().unwrap();
        assert_eq!(objects.namespaces["a"]["x"], "1");
        assert_eq!(problems, []);
        fs::write(&file, "kind: Namespace\nmetadata: {name: a, labels: [\n").unwrap();
        let (objects, problems) = watched.read().unwrap();
        assert_eq!(objects.namespaces["a"]["x"], "1");
        assert!(problems[0].message.starts_with("line "), "{problems:?}");
        fs::remove_file(&file).unwrap();
        assert!(watched.read().unwrap().0.namespaces.is_empty());
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
