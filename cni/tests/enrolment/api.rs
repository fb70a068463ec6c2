//! A stand-in for the API server: pods and namespaces in memory, listed, watched, read and patched over HTTP.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, patch},
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// Clones are the same server.
#[derive(Clone)]
pub(crate) struct Api {
    objects: Arc<Mutex<Objects>>,
    changed: watch::Sender<u64>,
    /// Answers nothing but errors, and ends watches.
    down: Arc<AtomicBool>,
    /// The agents' DaemonSet is there no more.
    uninstalled: Arc<AtomicBool>,
    /// Watches hear nothing.
    hidden: Arc<AtomicBool>,
    pub(crate) address: SocketAddr,
}

#[derive(Default)]
struct Objects {
    version: u64,
    /// By kind (`pods`, `namespaces`), namespace and name.
    held: BTreeMap<(String, String, String), Value>,
    /// Every change, with its version: what watches read.
    log: Vec<(u64, String, Value)>,
    /// What was asked, in order: `PATCH shop/web-0`.
    requests: Vec<String>,
}

impl Api {
    pub(crate) async fn start() -> Api {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let api = Api {
            objects: Arc::default(),
            changed: watch::channel(0).0,
            down: Arc::default(),
            uninstalled: Arc::default(),
            hidden: Arc::default(),
            address: listener.local_addr().expect("an address"),
        };
        let router = Router::new()
            .route("/api/v1/{kind}", get(list))
            .route("/api/v1/namespaces/{namespace}", get(read_namespace))
            .route("/api/v1/namespaces/{namespace}/pods/{name}", get(read_pod))
            .route(
                "/api/v1/namespaces/{namespace}/pods/{name}/status",
                patch(annotate),
            )
            .route(
                "/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}",
                get(read_daemon_set),
            )
            .with_state(api.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        api
    }

    pub(crate) fn client(&self) -> kube::Client {
        let url = format!("http://{}", self.address).parse().expect("a URL");
        kube::Client::try_from(kube::Config::new(url)).expect("a client")
    }

    /// Creates or replaces.
    pub(crate) fn put(&self, kind: &str, mut object: Value) {
        let mut objects = self.objects.lock();
        let key = key(kind, &object);
        objects.version += 1;
        let version = objects.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let word = if objects.held.contains_key(&key) {
            "MODIFIED"
        } else {
            "ADDED"
        };
        objects.held.insert(key, object.clone());
        let event = json!({ "type": word, "object": object });
        objects.log.push((version, kind.to_owned(), event));
        drop(objects);
        self.changed.send_modify(|count| *count += 1);
    }

    pub(crate) fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let mut objects = self.objects.lock();
        let key = (kind.to_owned(), namespace.to_owned(), name.to_owned());
        let Some(mut object) = objects.held.remove(&key) else {
            return;
        };
        objects.version += 1;
        let version = objects.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let event = json!({ "type": "DELETED", "object": object });
        objects.log.push((version, kind.to_owned(), event));
        drop(objects);
        self.changed.send_modify(|count| *count += 1);
    }

    pub(crate) fn label(&self, namespace: &str, mode: Option<&str>) {
        let labels = mode.map(|mode| json!({ "istio.io/dataplane-mode": mode }));
        let metadata = json!({ "name": namespace, "labels": labels.unwrap_or_else(|| json!({})) });
        self.put(
            "namespaces",
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }),
        );
    }

    /// The pod's annotation `ambient.istio.io/redirection`.
    pub(crate) fn redirection(&self, namespace: &str, name: &str) -> Option<String> {
        let objects = self.objects.lock();
        let key = ("pods".to_owned(), namespace.to_owned(), name.to_owned());
        let annotations = &objects.held.get(&key)?["metadata"]["annotations"];
        annotations["ambient.istio.io/redirection"]
            .as_str()
            .map(str::to_owned)
    }

    pub(crate) fn requests(&self, beginning: &str) -> usize {
        let objects = self.objects.lock();
        let asked = objects.requests.iter();
        asked.filter(|line| line.starts_with(beginning)).count()
    }

    /// Goes away, or comes back.
    pub(crate) fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
        self.changed.send_modify(|count| *count += 1);
    }

    pub(crate) fn uninstall(&self) {
        self.uninstalled.store(true, Ordering::SeqCst);
    }

    pub(crate) fn hide_from_watches(&self, hidden: bool) {
        self.hidden.store(hidden, Ordering::SeqCst);
    }

    fn refuse(&self) -> Option<Response> {
        self.down
            .load(Ordering::SeqCst)
            .then(|| status(StatusCode::SERVICE_UNAVAILABLE, "etcd is away"))
    }

    fn asked(&self, line: String) {
        self.objects.lock().requests.push(line);
    }

    fn read(&self, kind: &str, namespace: &str, name: &str) -> Response {
        self.asked(format!("GET {namespace}/{name}"));
        let key = (kind.to_owned(), namespace.to_owned(), name.to_owned());
        match self.objects.lock().held.get(&key) {
            Some(object) => Json(object.clone()).into_response(),
            None => status(StatusCode::NOT_FOUND, "not found"),
        }
    }
}

fn key(kind: &str, object: &Value) -> (String, String, String) {
    let text = |field: &str| {
        object["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    (kind.to_owned(), text("namespace"), text("name"))
}

fn status(code: StatusCode, message: &str) -> Response {
    let body = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": message, "code": code.as_u16() });
    (code, Json(body)).into_response()
}

async fn list(
    State(api): State<Api>,
    Path(kind): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    if let Some(refusal) = api.refuse() {
        return refusal;
    }
    let node = query.get("fieldSelector").cloned();
    let node = node.and_then(|selector| selector.strip_prefix("spec.nodeName=").map(str::to_owned));
    let here = move |object: &Value| {
        node.as_ref()
            .is_none_or(|node| object["spec"]["nodeName"].as_str() == Some(node))
    };
    if query.contains_key("watch") {
        let since = query
            .get("resourceVersion")
            .and_then(|text| text.parse().ok());
        return stream(api, kind, since.unwrap_or(0), here);
    }
    api.asked(format!("LIST {kind}"));
    let objects = api.objects.lock();
    let items: Vec<_> = objects
        .held
        .iter()
        .filter(|((held, _, _), object)| *held == kind && here(object))
        .map(|(_, object)| object.clone())
        .collect();
    Json(json!({ "kind": "List", "apiVersion": "v1",
        "metadata": { "resourceVersion": objects.version.to_string() }, "items": items }))
    .into_response()
}

fn stream(
    api: Api,
    kind: String,
    since: u64,
    here: impl Fn(&Value) -> bool + Send + 'static,
) -> Response {
    let (sender, receiver) = mpsc::channel::<Result<String, std::io::Error>>(64);
    tokio::spawn(async move {
        let mut changed = api.changed.subscribe();
        let mut sent = since;
        while !api.down.load(Ordering::SeqCst) {
            let hidden = api.hidden.load(Ordering::SeqCst);
            let news: Vec<_> = if hidden {
                Vec::new()
            } else {
                let objects = api.objects.lock();
                let fresh = objects.log.iter().filter(|(version, of, event)| {
                    *version > sent && *of == kind && here(&event["object"])
                });
                fresh
                    .map(|(version, _, event)| (*version, event.to_string()))
                    .collect()
            };
            for (version, event) in news {
                sent = version;
                if sender.send(Ok(event + "\n")).await.is_err() {
                    return;
                }
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    });
    Body::from_stream(tokio_stream(receiver)).into_response()
}

fn tokio_stream(
    receiver: mpsc::Receiver<Result<String, std::io::Error>>,
) -> impl futures_util::Stream<Item = Result<String, std::io::Error>> {
    futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|item| (item, receiver))
    })
}

async fn read_namespace(State(api): State<Api>, Path(name): Path<String>) -> Response {
    api.refuse()
        .unwrap_or_else(|| api.read("namespaces", "", &name))
}

async fn read_pod(
    State(api): State<Api>,
    Path((namespace, name)): Path<(String, String)>,
) -> Response {
    api.refuse()
        .unwrap_or_else(|| api.read("pods", &namespace, &name))
}

async fn read_daemon_set(
    State(api): State<Api>,
    Path((namespace, name)): Path<(String, String)>,
) -> Response {
    if let Some(refusal) = api.refuse() {
        return refusal;
    }
    if api.uninstalled.load(Ordering::SeqCst) {
        return status(StatusCode::NOT_FOUND, "not found");
    }
    Json(
        json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": name, "namespace": namespace } }),
    )
    .into_response()
}

/// A merge patch of annotations; a uid that is another's is refused as Kubernetes does.
async fn annotate(
    State(api): State<Api>,
    Path((namespace, name)): Path<(String, String)>,
    Json(patch): Json<Value>,
) -> Response {
    if let Some(refusal) = api.refuse() {
        return refusal;
    }
    api.asked(format!("PATCH {namespace}/{name}"));
    let key = ("pods".to_owned(), namespace, name);
    let Some(mut object) = api.objects.lock().held.get(&key).cloned() else {
        return status(StatusCode::NOT_FOUND, "not found");
    };
    if object["metadata"]["uid"] != patch["metadata"]["uid"] {
        return status(StatusCode::UNPROCESSABLE_ENTITY, "uid is immutable");
    }
    for (name, value) in patch["metadata"]["annotations"]
        .as_object()
        .into_iter()
        .flatten()
    {
        object["metadata"]["annotations"][name] = value.clone();
        if value.is_null()
            && let Some(all) = object["metadata"]["annotations"].as_object_mut()
        {
            all.remove(name);
        }
    }
    api.put("pods", object.clone());
    Json(object).into_response()
}
