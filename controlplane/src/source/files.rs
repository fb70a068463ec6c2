//! From files to objects: which documents claim which object, what of them is in force, and what there is to say of it.
//!
//! Pure. An object with a mistake does not come into force: its last good state stays. Where there is none, a policy
//! comes into force with its mistakes and then refuses what it selects (fail closed), and any other object is left out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use mesh::names::Str;

use super::{
    read::Fault,
    tree::{Node, ParseError, Place, Value, parse},
};
use crate::{
    object::{Kind, Name, Object, ObjectRef, Sourced, read_object},
    output::{Condition, ObjectStatus, Truth},
    translate::condition,
    validate::{self, Severity},
};

/// All files of all folders.
#[derive(Debug, Default)]
pub struct Files {
    files: BTreeMap<FileId, File>,
    claims: HashMap<ObjectRef, Vec<Claim>>,
    good: HashMap<ObjectRef, Object>,
    /// What there is to say of files, for those of which there is something.
    troubled: BTreeMap<FileId, Vec<ObjectStatus>>,
}

/// A file: the folder's number (0: the user's; others hold what servers write) and the path shown to people.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Number of the folder.
    pub folder: usize,
    /// Its path.
    pub path: Str,
}

/// What a file holds now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// This text.
    Text(String),
    /// It cannot be read, and why. What it held stays in force.
    Unreadable(String),
    /// It is no more.
    Gone,
}

/// What came of one object.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// What is in force.
    pub object: Option<Sourced<Object>>,
    /// What the source has to say of it; `None` when no file claims it.
    pub report: Option<ObjectStatus>,
}

#[derive(Debug, Default)]
struct File {
    claims: BTreeSet<ObjectRef>,
    ignored: Vec<ObjectStatus>,
    problem: Option<String>,
}

#[derive(Clone, Debug)]
struct Claim {
    file: FileId,
    node: Arc<Node>,
}

struct Document {
    object: ObjectRef,
    node: Arc<Node>,
}

impl File {
    fn report(&self, id: &FileId) -> Vec<ObjectStatus> {
        let mut said = self.ignored.clone();
        said.extend(self.problem.as_ref().map(|problem| {
            let message = format!("{problem}; what the file held before stays in force");
            file_report(id, 1, condition("Parsed", Truth::False, "Invalid", message))
        }));
        said
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl Files {
    /// Takes in what a file holds now. Answers with the objects that this may concern.
    pub fn update(&mut self, id: &FileId, content: Content) -> BTreeSet<ObjectRef> {
        let concerned = self.take(id, content);
        let said = self
            .files
            .get(id)
            .map(|file| file.report(id))
            .unwrap_or_default();
        match said.is_empty() {
            true => self.troubled.remove(id),
            false => self.troubled.insert(id.clone(), said),
        };
        concerned
    }

    fn take(&mut self, id: &FileId, content: Content) -> BTreeSet<ObjectRef> {
        let text = match content {
            Content::Text(text) => text,
            Content::Unreadable(why) => return self.keep(id, why),
            Content::Gone => {
                let gone = self.files.remove(id).unwrap_or_default();
                self.withdraw(id, &gone.claims);
                return gone.claims;
            }
        };
        match parse(&text) {
            Ok(documents) => self.replace(id, documents),
            Err(ParseError { place, problem }) => self.keep(
                id,
                format!("{id}:{}:{}: {problem}", place.line, place.column),
            ),
        }
    }

    /// What is in force for an object now. Remembers it as the last good state if it is good.
    pub fn resolve(&mut self, object: &ObjectRef) -> Resolved {
        let Some(claims) = self.claims.get(object) else {
            self.good.remove(object);
            return Resolved {
                object: None,
                report: None,
            };
        };
        let (claim, node) = merged(claims);
        let report = |conditions| ObjectStatus {
            kind: object.kind.as_str().into(),
            namespace: object
                .kind
                .is_namespaced()
                .then(|| object.name.namespace.clone()),
            name: object.name.name.clone(),
            file: claim.file.path.clone(),
            line: claim.node.place.line,
            conditions,
            parents: Arc::default(),
        };
        let (read, faults, warnings) = checked(object.kind, &node);
        let faults: Vec<String> = faults
            .iter()
            .map(|fault| told(&claim.file, object, fault))
            .collect();
        let stale = self
            .files
            .get(&claim.file)
            .and_then(|file| file.problem.as_ref());
        let mut conditions = vec![accepted(
            object.kind,
            &faults,
            stale,
            self.good.contains_key(object),
        )];
        conditions.extend(duplicate(claims));
        conditions.extend(warned(&claim.file, object, &warnings));
        conditions.sort();
        let report = Some(report(conditions));
        let in_force = match read {
            Some(read) if faults.is_empty() => {
                self.good.insert(object.clone(), read.clone());
                Some(Sourced {
                    object: read,
                    faults,
                })
            }
            _ if self.good.contains_key(object) => self.good.get(object).map(|good| Sourced {
                object: good.clone(),
                faults: Vec::new(),
            }),
            Some(read) if object.kind.is_policy() => Some(Sourced {
                object: read,
                faults,
            }),
            _ => None,
        };
        Resolved {
            object: in_force,
            report,
        }
    }

    /// What there is to say of files and of documents that are no objects in force: problems and ignored kinds.
    pub fn reports(&self) -> Vec<ObjectStatus> {
        self.troubled.values().flatten().cloned().collect()
    }

    fn keep(&mut self, id: &FileId, problem: String) -> BTreeSet<ObjectRef> {
        let file = self.files.entry(id.clone()).or_default();
        file.problem = Some(problem);
        file.claims.clone()
    }

    fn replace(&mut self, id: &FileId, documents: Vec<Arc<Node>>) -> BTreeSet<ObjectRef> {
        let mut file = File::default();
        let mut found = Vec::new();
        for document in documents {
            collect(id, &document, None, &mut found, &mut file.ignored);
        }
        file.claims = found
            .iter()
            .map(|document| document.object.clone())
            .collect();
        let before = self.files.remove(id).unwrap_or_default().claims;
        let gone: BTreeSet<_> = before.difference(&file.claims).cloned().collect();
        self.withdraw(id, &gone);
        for object in &file.claims {
            let nodes: Vec<_> = found
                .iter()
                .filter(|document| document.object == *object)
                .map(|document| document.node.clone())
                .collect();
            self.claim(id, object, nodes);
        }
        let concerned = before.union(&file.claims).cloned().collect();
        self.files.insert(id.clone(), file);
        concerned
    }

    /// A file that is edited keeps its place among those that claim the same object.
    fn claim(&mut self, id: &FileId, object: &ObjectRef, nodes: Vec<Arc<Node>>) {
        let claims = self.claims.entry(object.clone()).or_default();
        let at = claims.iter().position(|claim| claim.file == *id);
        claims.retain(|claim| claim.file != *id);
        let at = at.unwrap_or(claims.len());
        let new = nodes.into_iter().map(|node| Claim {
            file: id.clone(),
            node,
        });
        claims.splice(at..at, new);
    }

    fn withdraw(&mut self, id: &FileId, objects: &BTreeSet<ObjectRef>) {
        for object in objects {
            if let Some(claims) = self.claims.get_mut(object) {
                claims.retain(|claim| claim.file != *id);
                if claims.is_empty() {
                    self.claims.remove(object);
                }
            }
        }
    }
}

/// Adds the objects of a document, those of lists each for itself.
fn collect(
    id: &FileId,
    node: &Arc<Node>,
    of_list: Option<(&str, &str)>,
    found: &mut Vec<Document>,
    ignored: &mut Vec<ObjectStatus>,
) {
    let field = |key: &str| node.field(key).and_then(|node| node.text());
    let api_version = field("apiVersion")
        .or(of_list.map(|list| list.0))
        .unwrap_or_default();
    let kind = field("kind")
        .or(of_list.map(|list| list.1))
        .unwrap_or_default();
    if let (Some(of), Some(items)) = (kind.strip_suffix("List"), node.field("items")) {
        let item_kind = (!of.is_empty()).then_some((api_version, of));
        if let Value::Sequence(items) = &items.value {
            for item in items {
                collect(id, item, item_kind, found, ignored);
            }
        }
        return;
    }
    let metadata = |key: &str| {
        node.field("metadata")
            .and_then(|meta| meta.field(key))
            .and_then(|n| n.text())
    };
    let name = metadata("name").unwrap_or_default();
    if api_version.is_empty() || kind.is_empty() || name.is_empty() {
        let message = "not a Kubernetes object: it needs apiVersion, kind and metadata.name";
        let condition = condition("Parsed", Truth::False, "NotAnObject", message);
        ignored.push(file_report(id, node.place.line, condition));
        return;
    }
    match Kind::of(api_version, kind) {
        Some(known) => {
            let namespace = match known.is_namespaced() {
                true => metadata("namespace").unwrap_or("default"),
                false => "",
            };
            found.push(Document {
                object: ObjectRef {
                    kind: known,
                    name: Name::new(namespace, name),
                },
                node: node.clone(),
            });
        }
        None => ignored.push(ObjectStatus {
            kind: kind.into(),
            namespace: metadata("namespace").map(Str::from),
            name: name.into(),
            file: id.path.clone(),
            line: node.place.line,
            conditions: vec![condition(
                "Ignored",
                Truth::True,
                "UnknownKind",
                format!("{kind} of {api_version} is not read and has no effect on the mesh"),
            )],
            parents: Arc::default(),
        }),
    }
}

/// The claim that counts, and its document with what servers write merged over it.
fn merged(claims: &[Claim]) -> (&Claim, Arc<Node>) {
    let users = claims.iter().find(|claim| claim.file.folder == 0);
    let servers = claims.iter().find(|claim| claim.file.folder != 0);
    match (users, servers) {
        (Some(user), Some(server)) => (user, Arc::new(overlay(&user.node, &server.node))),
        (Some(only), None) | (None, Some(only)) => (only, only.node.clone()),
        (None, None) => unreachable!("an entry of claims is never empty"),
    }
}

/// The fields that servers own in an object that the user wrote.
const SERVERS_FIELDS: [&[&str]; 7] = [
    &["status"],
    &["metadata", "uid"],
    // Written only where `leyline local label` changed them: then all of them.
    &["metadata", "labels"],
    &["metadata", "annotations", "ambient.istio.io/redirection"],
    &["spec", "clusterIP"],
    &["spec", "clusterIPs"],
    &["spec", "nodeName"],
];

fn overlay(user: &Node, server: &Node) -> Node {
    let mut merged = user.clone();
    for path in SERVERS_FIELDS {
        let mut value = Some(server);
        for key in path {
            value = value.and_then(|node| node.field(key)).map(|node| &**node);
        }
        if let Some(value) = value {
            merged = set(&merged, path, value);
        }
    }
    merged
}

fn set(node: &Node, path: &[&str], value: &Node) -> Node {
    match path {
        [] => value.clone(),
        [key, rest @ ..] => {
            let below = node.field(key).map_or_else(
                || Node::new(value.place, Value::Mapping(Vec::new())),
                |below| (**below).clone(),
            );
            node.with(key, Arc::new(set(&below, rest, value)))
        }
    }
}

/// Reads and validates: what was read, what is wrong with it, and what is only doubtful.
pub(super) fn checked(kind: Kind, node: &Node) -> (Option<Object>, Vec<Fault>, Vec<Fault>) {
    let (object, mut faults) = read_object(kind, node);
    let mut warnings = Vec::new();
    if faults.is_empty() {
        for problem in object.iter().flat_map(validate::validate) {
            let fault = Fault {
                place: node.locate(&problem.path),
                path: problem.path,
                problem: problem.message,
            };
            match problem.severity {
                Severity::Error => faults.push(fault),
                Severity::Warning => warnings.push(fault),
            }
        }
    }
    (object, faults, warnings)
}

fn told(file: &FileId, object: &ObjectRef, fault: &Fault) -> String {
    let Place { line, column } = fault.place;
    format!("{file}:{line}:{column}: {object}: {fault}")
}

fn accepted(kind: Kind, faults: &[String], stale: Option<&String>, has_good: bool) -> Condition {
    let outcome = match (has_good, kind.is_policy()) {
        (true, _) => "the last good state stays in force",
        (false, true) => &*format!(
            "there is no good state to fall back on, so {}",
            kind.when_unreadable()
        ),
        (false, false) => kind.when_unreadable(),
    };
    let refused = |reason, problem: &str| {
        let message = format!("{problem}; {outcome}");
        condition("Accepted", Truth::False, reason, message)
    };
    match stale {
        Some(problem) => refused("FileInvalid", problem),
        None if !faults.is_empty() => refused("Invalid", &faults.join("; ")),
        None => condition(
            "Accepted",
            Truth::True,
            "Accepted",
            "read without a mistake",
        ),
    }
}

fn duplicate(claims: &[Claim]) -> Option<Condition> {
    let users = claims.iter().any(|claim| claim.file.folder == 0);
    let mut rivals = claims
        .iter()
        .filter(|claim| (claim.file.folder == 0) == users);
    let place = |claim: &Claim| format!("{}:{}", claim.file, claim.node.place.line);
    let kept = rivals.next()?;
    let others: Vec<String> = rivals.map(place).collect();
    (!others.is_empty()).then(|| {
        let message = format!(
            "the one at {} is in force; not read: {}",
            place(kept),
            others.join(", ")
        );
        condition("Unique", Truth::False, "Duplicate", message)
    })
}

fn warned(file: &FileId, object: &ObjectRef, warnings: &[Fault]) -> Option<Condition> {
    let texts: Vec<String> = warnings.iter().map(|w| told(file, object, w)).collect();
    (!texts.is_empty()).then(|| condition("Warned", Truth::True, "Doubtful", texts.join("; ")))
}

fn file_report(id: &FileId, line: u32, condition: Condition) -> ObjectStatus {
    ObjectStatus {
        kind: "File".into(),
        namespace: None,
        name: id.path.clone(),
        file: id.path.clone(),
        line,
        conditions: vec![condition],
        parents: Arc::default(),
    }
}
