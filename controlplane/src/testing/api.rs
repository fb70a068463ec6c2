//! An API server in this process: objects in memory, resource versions, lists, watches, server-side apply with owners
//! of fields. Tests script its faults with [`FakeApi::on`]. What it does not know: schemas, admission, defaulting.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

type ResponseBody = UnsyncBoxBody<Bytes, Infallible>;

/// One request, as the server has seen it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Call {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    pub(crate) verb: &'static str,
    /// `secrets`, `services/status`.
    pub(crate) resource: String,
    pub(crate) namespace: String,
    /// Empty for lists and watches.
    pub(crate) name: String,
    pub(crate) query: HashMap<String, String>,
    pub(crate) body: Value,
}

/// What a test makes of a request instead of the server's own answer.
pub(crate) enum Answer {
    /// This status code, reason and message.
    Refuse(u16, &'static str, &'static str),
    /// Another owner has the condition of this type.
    Conflict(&'static str),
    /// Done, with this as the outcome.
    Say(Value),
    /// Never answered.
    Hang,
    /// Done by the server, but the answer never arrives.
    Lose,
}

type Hook = Box<dyn FnMut(&Call) -> Option<Answer> + Send>;

/// The server. Clones are the same one.
#[derive(Clone, Default)]
pub(crate) struct FakeApi(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
    version: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            hook: Mutex::default(),
            version: watch::Sender::new(0),
        }
    }
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    /// Who owns which leaf, by server-side apply.
    owners: BTreeMap<Key, BTreeMap<Path, String>>,
    events: Vec<(u64, Key, &'static str, Value)>,
    calls: Vec<Call>,
}

/// Group and version, resource, namespace, name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    group: String,
    resource: String,
    namespace: String,
    name: String,
}

/// Keys of objects; an item of a list of conditions is the key `type=NAME`.
type Path = Vec<String>;

type Outcome = Result<(StatusCode, Value), (u16, &'static str, String)>;

impl FakeApi {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A client of this server.
    pub(crate) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.serve(request).await) }
        });
        kube::Client::new(service, "istio-system")
    }

    /// Asks `hook` about each request first.
    pub(crate) fn on(&self, hook: impl FnMut(&Call) -> Option<Answer> + Send + 'static) {
        *self.0.hook.lock() = Some(Box::new(hook));
    }

    /// Answers everything itself again.
    pub(crate) fn heal(&self) {
        *self.0.hook.lock() = None;
    }

    /// Every request since the last call.
    pub(crate) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.state.lock().calls)
    }

    /// Creates or replaces an object as a user would, whatever is there. `group` as in a URL: `api/v1`,
    /// `apis/networking.istio.io/v1`.
    pub(crate) fn put(&self, group: &str, resource: &str, object: Value) {
        let name = |field: &str| object["metadata"][field].as_str().unwrap_or("").to_owned();
        let key = Key {
            group: group.to_owned(),
            resource: resource.to_owned(),
            namespace: name("namespace"),
            name: name("name"),
        };
        self.0.state.lock().store(key, object);
        self.wake();
    }

    /// Deletes an object.
    pub(crate) fn remove(&self, resource: &str, namespace: &str, name: &str) {
        let mut state = self.0.state.lock();
        if let Some(key) = state.key(resource, namespace, name) {
            state.erase(&key);
        }
        drop(state);
        self.wake();
    }

    /// An object as it is.
    pub(crate) fn object(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        let state = self.0.state.lock();
        let key = state.key(resource, namespace, name)?;
        state.objects.get(&key).cloned()
    }

    /// Waits until an object is as asked for; `None` is its absence.
    pub(crate) async fn until(
        &self,
        (resource, namespace, name): (&str, &str, &str),
        mut test: impl FnMut(Option<&Value>) -> bool,
    ) -> Option<Value> {
        let mut version = self.0.version.subscribe();
        let wait = async {
            loop {
                version.borrow_and_update();
                let object = self.object(resource, namespace, name);
                if test(object.as_ref()) {
                    return object;
                }
                version.changed().await.unwrap();
            }
        };
        let waited = tokio::time::timeout(super::DEADLINE, wait).await;
        waited.unwrap_or_else(|_| {
            panic!(
                "{resource} {namespace}/{name} stays {:?}",
                self.object(resource, namespace, name)
            )
        })
    }

    fn wake(&self) {
        let version = self.0.state.lock().version;
        self.0.version.send_replace(version);
    }

    async fn serve(&self, request: Request<Body>) -> Response<ResponseBody> {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await.unwrap_or_default();
        let (key, subresource) = key_of(parts.uri.path());
        let query = url_query(parts.uri.query().unwrap_or_default());
        let call = call_of(&parts.method, &key, subresource, query, &body);
        self.0.state.lock().calls.push(call.clone());
        let answer = self.0.hook.lock().as_mut().and_then(|hook| hook(&call));
        match answer {
            Some(Answer::Refuse(code, reason, message)) => return refusal(code, reason, message),
            Some(Answer::Conflict(type_)) => return conflict(type_),
            Some(Answer::Say(value)) => return response(StatusCode::CREATED, &value),
            Some(Answer::Hang) => return std::future::pending().await,
            _ => {}
        }
        if call.verb == "watch" {
            return self.watch(key, &call);
        }
        let format = parts.headers.get(http::header::CONTENT_TYPE);
        let format = format.and_then(|format| format.to_str().ok()).unwrap_or("");
        let outcome = self.0.state.lock().answer(&key, &call, format);
        self.wake();
        if matches!(answer, Some(Answer::Lose)) {
            return std::future::pending().await;
        }
        match outcome {
            Ok((code, value)) => response(code, &value),
            Err((code, reason, message)) => refusal(code, reason, &message),
        }
    }

    fn watch(&self, key: Key, call: &Call) -> Response<ResponseBody> {
        let from = call.query.get("resourceVersion");
        let from = from.and_then(|from| from.parse().ok()).unwrap_or(0_u64);
        let (api, call) = (self.clone(), call.clone());
        let changes = self.0.version.subscribe();
        let events = stream::unfold((from, changes), move |(from, mut changes)| {
            let (api, key, call) = (api.clone(), key.clone(), call.clone());
            async move {
                loop {
                    changes.borrow_and_update();
                    let (now, text) = api.0.state.lock().events_after(from, &key, &call);
                    if !text.is_empty() {
                        return Some((Ok(Frame::data(Bytes::from(text))), (now, changes)));
                    }
                    changes.changed().await.ok()?;
                }
            }
        });
        let body = StreamBody::new(events.boxed());
        Response::new(UnsyncBoxBody::new(body))
    }
}

impl State {
    fn key(&self, resource: &str, namespace: &str, name: &str) -> Option<Key> {
        let mut keys = self.objects.keys();
        let same =
            |key: &&Key| key.resource == resource && key.namespace == namespace && key.name == name;
        keys.find(same).cloned()
    }

    fn answer(&mut self, key: &Key, call: &Call, format: &str) -> Outcome {
        let dry_run = call.query.contains_key("dryRun");
        match call.verb {
            "list" => Ok((StatusCode::OK, self.list(key, call))),
            "create" => self.create(key, call.body.clone(), dry_run),
            "get" => self.found(key).map(|object| (StatusCode::OK, object)),
            "update" => self.update(key, call.body.clone()),
            "patch" => self.patch(key, call, format),
            "delete" => {
                let object = self.found(key)?;
                self.erase(key);
                Ok((StatusCode::OK, object))
            }
            other => Err((405, "MethodNotAllowed", other.to_owned())),
        }
    }

    fn found(&self, key: &Key) -> Result<Value, (u16, &'static str, String)> {
        let found = self.objects.get(key).cloned();
        found.ok_or_else(|| {
            (
                404,
                "NotFound",
                format!("{} {:?} not found", key.resource, key.name),
            )
        })
    }

    fn list(&self, key: &Key, call: &Call) -> Value {
        let items = self.objects.iter();
        let items: Vec<_> = items
            .filter(|(known, object)| matches(key, known, call, object))
            .map(|(_, object)| object)
            .collect();
        json!({
            "apiVersion": "v1", "kind": "List",
            "metadata": {"resourceVersion": self.version.to_string()},
            "items": items,
        })
    }

    fn create(&mut self, key: &Key, object: Value, dry_run: bool) -> Outcome {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let key = Key {
            name: name.to_owned(),
            ..key.clone()
        };
        if self.objects.contains_key(&key) {
            return Err((409, "AlreadyExists", format!("{name:?} already exists")));
        }
        if dry_run {
            return Ok((StatusCode::CREATED, object));
        }
        Ok((StatusCode::CREATED, self.store(key, object)))
    }

    fn update(&mut self, key: &Key, object: Value) -> Outcome {
        let known = self.found(key)?;
        let asked = &object["metadata"]["resourceVersion"];
        if asked.is_string() && *asked != known["metadata"]["resourceVersion"] {
            return Err((409, "Conflict", "the object has been modified".to_owned()));
        }
        Ok((StatusCode::OK, self.store(key.clone(), object)))
    }

    fn patch(&mut self, key: &Key, call: &Call, format: &str) -> Outcome {
        let known = self.objects.get(key).cloned();
        let patched = match format {
            "application/apply-patch+yaml" => {
                let status = call.resource.ends_with("/status");
                if known.is_none() && status {
                    return Err((404, "NotFound", "not found".to_owned()));
                }
                self.apply(key, known.unwrap_or_else(|| json!({})), call)?
            }
            "application/merge-patch+json" => {
                let mut object = self.found(key)?;
                merge(&mut object, &call.body);
                return self.update(key, object);
            }
            "application/json-patch+json" => {
                let mut object = self.found(key)?;
                json_patch(&mut object, &call.body)?;
                object
            }
            other => return Err((415, "UnsupportedMediaType", other.to_owned())),
        };
        Ok((StatusCode::OK, self.store(key.clone(), patched)))
    }

    /// Server-side apply: conflicts are with other owners' different values, what is no longer applied goes.
    fn apply(
        &mut self,
        key: &Key,
        mut object: Value,
        call: &Call,
    ) -> Result<Value, (u16, &'static str, String)> {
        let manager = call.query.get("fieldManager").cloned().unwrap_or_default();
        let force = call.query.contains_key("force");
        let mut leaves = BTreeMap::new();
        let mut applied = call.body.clone();
        if let Some(metadata) = applied["metadata"].as_object_mut() {
            metadata.retain(|field, _| field == "labels" || field == "annotations");
        }
        flatten(&applied, &mut Vec::new(), &mut leaves);
        let owners = self.owners.entry(key.clone()).or_default();
        let different = |(path, value): &(&Path, &Value)| {
            let owned = owners.get(*path).is_some_and(|owner| *owner != manager);
            owned && at(&object, path) != Some(value)
        };
        if let Some((path, _)) = leaves.iter().find(different).filter(|_| !force) {
            let message = format!(
                "Apply failed with 1 conflict: conflict with {:?}: .{}",
                owners[path],
                path.join(".")
            );
            return Err((409, "Conflict", message));
        }
        let gone = owners
            .iter()
            .filter(|(path, owner)| **owner == manager && !leaves.contains_key(*path));
        for path in gone.map(|(path, _)| path.clone()).collect::<Vec<_>>() {
            owners.remove(&path);
            remove(&mut object, &path);
        }
        for (path, value) in leaves {
            set(&mut object, &path, value);
            owners.insert(path, manager.clone());
        }
        Ok(object)
    }

    fn store(&mut self, key: Key, mut object: Value) -> Value {
        for (field, value) in [("namespace", &key.namespace), ("name", &key.name)] {
            if !value.is_empty() {
                object["metadata"][field] = json!(value);
            }
        }
        let known = self.objects.get(&key);
        let mut before = known.cloned().unwrap_or_default();
        if before["metadata"].is_object() {
            let version = before["metadata"]["resourceVersion"].clone();
            object["metadata"]["resourceVersion"] = version;
            // As the real one: what changes nothing is no change.
            if before == object {
                return object;
            }
        }
        self.version += 1;
        let generation = before["metadata"]["generation"].as_i64().unwrap_or(0);
        let changed = known.is_none() || before["spec"] != object["spec"];
        let metadata = &mut object["metadata"];
        metadata["resourceVersion"] = json!(self.version.to_string());
        metadata["generation"] = json!(generation + i64::from(changed));
        let uid = before["metadata"]["uid"].take();
        if metadata["uid"].is_null() {
            metadata["uid"] = if uid.is_null() {
                json!(format!("uid-{}", self.version))
            } else {
                uid
            };
        }
        let what = if known.is_some() { "MODIFIED" } else { "ADDED" };
        self.events
            .push((self.version, key.clone(), what, object.clone()));
        self.objects.insert(key, object.clone());
        object
    }

    fn erase(&mut self, key: &Key) {
        self.owners.remove(key);
        let Some(mut object) = self.objects.remove(key) else {
            return;
        };
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.events
            .push((self.version, key.clone(), "DELETED", object));
    }

    /// The lines of what happened, and up to when.
    fn events_after(&self, from: u64, key: &Key, call: &Call) -> (u64, String) {
        let events = self.events.iter().filter(|(version, known, _, object)| {
            *version > from && matches(key, known, call, object)
        });
        let lines = events
            .map(|(_, _, what, object)| format!("{}\n", json!({"type": what, "object": object})));
        (self.version, lines.collect())
    }
}

/// Whether an object belongs into a list or a watch.
fn matches(asked: &Key, known: &Key, call: &Call, object: &Value) -> bool {
    let name = call.query.get("fieldSelector");
    let name = name.and_then(|text| text.strip_prefix("metadata.name="));
    let labels = call
        .query
        .get("labelSelector")
        .map(String::as_str)
        .unwrap_or_default();
    let label = |term: &str| match term.split_once('=') {
        Some((key, value)) => object["metadata"]["labels"][key].as_str() == Some(value),
        None => !object["metadata"]["labels"][term].is_null(),
    };
    asked.group == known.group
        && asked.resource == known.resource
        && (asked.namespace.is_empty() || asked.namespace == known.namespace)
        && name.is_none_or(|name| name == known.name)
        && labels.split(',').filter(|term| !term.is_empty()).all(label)
}

/// Splits a URL's path: `/apis/GROUP/VERSION/namespaces/NS/RESOURCE/NAME/SUBRESOURCE`, or shorter.
fn key_of(path: &str) -> (Key, Option<String>) {
    let mut parts = path.trim_matches('/').split('/').map(str::to_owned);
    let group_parts = if path.starts_with("/api/") { 2 } else { 3 };
    let group = parts
        .by_ref()
        .take(group_parts)
        .collect::<Vec<_>>()
        .join("/");
    let rest: Vec<String> = parts.collect();
    let (namespace, rest) = match &rest[..] {
        [first, namespace, resource, ..] if first == "namespaces" && resource != "status" => {
            (namespace.clone(), &rest[2..])
        }
        _ => (String::new(), &rest[..]),
    };
    let part = |index: usize| rest.get(index).cloned();
    let key = Key {
        group,
        resource: part(0).unwrap_or_default(),
        namespace,
        name: part(1).unwrap_or_default(),
    };
    (key, part(2))
}

fn call_of(
    method: &Method,
    key: &Key,
    subresource: Option<String>,
    query: HashMap<String, String>,
    body: &[u8],
) -> Call {
    let verb = match method.as_str() {
        "GET" if query.get("watch").is_some_and(|watch| watch == "true") => "watch",
        "GET" if key.name.is_empty() => "list",
        "GET" => "get",
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        _ => "delete",
    };
    let resource = match subresource {
        Some(subresource) => format!("{}/{subresource}", key.resource),
        None => key.resource.clone(),
    };
    Call {
        verb,
        resource,
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        query,
        body: serde_json::from_slice(body).unwrap_or_default(),
    }
}

fn url_query(query: &str) -> HashMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (key.to_owned(), unescape(value)))
        .collect()
}

fn unescape(text: &str) -> String {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().replace('+', " ");
    for part in parts {
        let (code, rest) = part.split_at(2);
        out.push(char::from(u8::from_str_radix(code, 16).unwrap()));
        out.push_str(&rest.replace('+', " "));
    }
    out
}

fn response(code: StatusCode, value: &Value) -> Response<ResponseBody> {
    let body = Full::new(Bytes::from(value.to_string()));
    let mut response = Response::new(UnsyncBoxBody::new(body));
    *response.status_mut() = code;
    response
}

/// As server-side apply refuses.
fn conflict(type_: &str) -> Response<ResponseBody> {
    let cause = json!({
        "reason": "FieldManagerConflict",
        "message": "conflict with \"other\"",
        "field": format!(".status.conditions[type=\"{type_}\"].message"),
    });
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": 409, "reason": "Conflict",
        "message": "Apply failed with 1 conflict: conflict with \"other\"",
        "details": {"causes": [cause]},
    });
    response(StatusCode::CONFLICT, &status)
}

fn refusal(code: u16, reason: &str, message: &str) -> Response<ResponseBody> {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure",
        "code": code, "reason": reason, "message": message,
    });
    response(StatusCode::from_u16(code).unwrap(), &status)
}

/// RFC 7386.
fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = json!({});
    }
    for (field, value) in fields {
        match value {
            Value::Null => drop(object.as_object_mut().unwrap().remove(field)),
            value => merge(&mut object[field], value),
        }
    }
}

/// RFC 6902: `test`, `add`, `replace`, `remove`.
fn json_patch(object: &mut Value, patch: &Value) -> Result<(), (u16, &'static str, String)> {
    for step in patch.as_array().into_iter().flatten() {
        let pointer = step["path"].as_str().unwrap_or_default();
        let path: Path = pointer
            .split('/')
            .skip(1)
            .map(|part| part.replace("~1", "/").replace("~0", "~"))
            .collect();
        match step["op"].as_str() {
            Some("test") if at(object, &path).unwrap_or(&Value::Null) != &step["value"] => {
                return Err((422, "Invalid", format!("the test of {pointer} failed")));
            }
            Some("test") => {}
            Some("add" | "replace") => set(object, &path, step["value"].clone()),
            Some("remove") => remove(object, &path),
            _ => return Err((400, "BadRequest", step.to_string())),
        }
    }
    Ok(())
}

fn flatten(value: &Value, path: &mut Path, leaves: &mut BTreeMap<Path, Value>) {
    let mut below = |key: String, value: &Value| {
        path.push(key);
        flatten(value, path, leaves);
        path.pop();
    };
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(key, value)| below(key.clone(), value)),
        Value::Array(items) if items.iter().all(|item| item["type"].is_string()) => {
            for item in items {
                below(format!("type={}", item["type"].as_str().unwrap()), item);
            }
        }
        _ => drop(leaves.insert(path.clone(), value.clone())),
    }
}

fn item<'v>(value: &'v Value, key: &str) -> Option<&'v Value> {
    match key.strip_prefix("type=") {
        Some(kind) => value.as_array()?.iter().find(|item| item["type"] == kind),
        None => value.get(key),
    }
}

fn at<'v>(value: &'v Value, path: &[String]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, key| item(value, key))
}

fn set(object: &mut Value, path: &[String], value: Value) {
    let Some((key, rest)) = path.split_first() else {
        *object = value;
        return;
    };
    let Some(kind) = key.strip_prefix("type=") else {
        if !object.is_object() {
            *object = Value::Object(Map::new());
        }
        return set(&mut object[key], rest, value);
    };
    if !object.is_array() {
        *object = json!([]);
    }
    let items = object.as_array_mut().unwrap();
    let index = items.iter().position(|item| item["type"] == kind);
    let index = index.unwrap_or_else(|| {
        items.push(json!({"type": kind}));
        items.len() - 1
    });
    set(&mut items[index], rest, value);
}

fn remove(object: &mut Value, path: &[String]) {
    let [key, rest @ ..] = path else {
        return;
    };
    match (key.strip_prefix("type="), object) {
        (None, Value::Object(fields)) if rest.is_empty() => drop(fields.remove(key)),
        (None, Value::Object(fields)) => {
            if let Some(below) = fields.get_mut(key) {
                remove(below, rest);
            }
        }
        (Some(kind), Value::Array(items)) => {
            if let Some(item) = items.iter_mut().find(|item| item["type"] == kind) {
                remove(item, rest);
            }
            items.retain(|item| !item["type"].is_null());
        }
        _ => {}
    }
}
