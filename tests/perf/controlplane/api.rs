//! An API server that is made up: as many pods, services and policies as asked for, in pages, and watches of pods.
//! Everything else is empty, every token is good, and what is written is thanked for.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Result;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::broadcast};
use tokio_stream::StreamExt as _;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// How much there is.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) pods: usize,
    pub(crate) services: usize,
    pub(crate) policies: usize,
    pub(crate) nodes: usize,
}

impl Size {
    /// Resources that a subscriber gets: one of each, and the node tunnels' own pods.
    pub(crate) fn resources(self) -> usize {
        self.pods + self.nodes + self.services + self.policies
    }
}

/// The server.
#[derive(Clone)]
pub(crate) struct Api {
    size: Size,
    port: u16,
    version: Arc<AtomicU64>,
    changes: broadcast::Sender<String>,
}

/// The identity of a pod on this node.
pub(crate) fn identity_on(node: usize) -> String {
    format!(
        "spiffe://cluster.local/ns/ns-{}/sa/sa-{}",
        node % 100,
        node % 10
    )
}

impl Api {
    pub(crate) async fn start(size: Size) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let api = Self {
            size,
            port: listener.local_addr()?.port(),
            version: Arc::new(AtomicU64::new(1)),
            changes: broadcast::channel(4096).0,
        };
        let server = api.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let server = server.clone();
                        async move { Ok::<_, Infallible>(server.answer(request).await) }
                    });
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    // A control plane that has ended.
                    drop(connection.await);
                });
            }
        });
        Ok(api)
    }

    pub(crate) fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{}", self.port)}}],
            "users": [{"name": "u", "user": {"token": "any"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        })
        .to_string()
    }

    /// The resource that the `n`th change alters.
    pub(crate) fn name(&self, n: usize) -> String {
        let pod = self.changed(n);
        format!("Kubernetes//Pod/ns-{}/pod-{pod}", pod % 100)
    }

    fn changed(&self, n: usize) -> usize {
        // Spread over all pods, and each only once in a while.
        (n * 7919) % self.size.pods.max(1)
    }

    /// A pod becomes unready, or ready again: both alter its workload.
    pub(crate) fn change(&self, n: usize) {
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let pod = self.changed(n);
        let object = self.pod(pod, version, version.is_multiple_of(2), version);
        let line = json!({"type": "MODIFIED", "object": object});
        // Without a watch there is nobody to tell.
        drop(self.changes.send(format!("{line}\n")));
    }

    fn pod(&self, n: usize, version: u64, is_ready: bool, revision: u64) -> Value {
        let (namespace, app) = (n % 100, n % self.size.services.max(1));
        let [_, a, b, c] = u32::try_from(n).unwrap_or_default().to_be_bytes();
        let ip = format!("10.{a}.{b}.{c}");
        let ready = if is_ready { "True" } else { "False" };
        let container = json!({
            "name": "app", "image": "registry.example/app:1", "ports": [{"name": "http", "containerPort": 8080}],
            "resources": {"limits": {"cpu": "1", "memory": "128Mi"}},
            "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets", "readOnly": true}],
        });
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("pod-{n}"), "namespace": format!("ns-{namespace}"), "uid": format!("uid-{n}"),
                "resourceVersion": version.to_string(), "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"app": format!("app-{app}"), "pod-template-hash": "5d8f7c9b4", "version": format!("r{revision}")},
                "annotations": {"ambient.istio.io/redirection": "enabled"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("app-{app}-5d8f7c9b4"),
                    "uid": "r", "controller": true}],
                "managedFields": [{"manager": "kubelet", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
                    "fieldsV1": {"f:status": {"f:conditions": {"k:{\"type\":\"Ready\"}": {".": {}, "f:status": {}}}}}}],
            },
            "spec": {"nodeName": format!("node-{}", n % self.size.nodes), "serviceAccountName": format!("sa-{}", n % 10),
                "containers": [container]},
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                "conditions": [{"type": "Ready", "status": ready}]},
        })
    }

    fn tunnel(n: usize) -> Value {
        let ip = format!("172.16.{}.{}", n / 250, n % 250);
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("ztunnel-{n}"), "namespace": "istio-system", "uid": format!("ztunnel-{n}"),
                "resourceVersion": "1", "labels": {"app": "ztunnel"}},
            "spec": {"nodeName": format!("node-{n}"), "serviceAccountName": "ztunnel", "containers": []},
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                "conditions": [{"type": "Ready", "status": "True"}]},
        })
    }

    fn service(n: usize) -> Value {
        let [_, _, b, c] = u32::try_from(n).unwrap_or_default().to_be_bytes();
        let ip = format!("10.200.{b}.{c}");
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("svc-{n}"), "namespace": format!("ns-{}", n % 100), "uid": format!("s-{n}"),
                "resourceVersion": "1"},
            "spec": {"selector": {"app": format!("app-{n}")}, "clusterIP": ip, "clusterIPs": [ip],
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        })
    }

    fn policy(n: usize) -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("policy-{n}"), "namespace": format!("ns-{}", n % 100), "uid": format!("p-{n}"),
                "resourceVersion": "1", "generation": 1},
            "spec": {"selector": {"matchLabels": {"app": format!("app-{n}")}}, "action": "ALLOW",
                "rules": [{"from": [{"source": {"principals": [format!("cluster.local/ns/ns-{}/sa/sa-1", n % 100)]}}]}]},
        })
    }

    fn namespace(n: usize) -> Value {
        let name = if n < 100 {
            format!("ns-{n}")
        } else {
            "istio-system".to_owned()
        };
        json!({"metadata": {"name": name, "resourceVersion": "1", "uid": format!("n-{n}")}})
    }

    fn count(&self, path: &str) -> usize {
        match path.rsplit('/').next().unwrap_or_default() {
            "pods" => self.size.pods + self.size.nodes,
            "services" => self.size.services,
            "authorizationpolicies" => self.size.policies,
            "namespaces" => 101,
            "customresourcedefinitions" => 1,
            _ => 0,
        }
    }

    fn item(&self, path: &str, n: usize) -> Value {
        match path.rsplit('/').next().unwrap_or_default() {
            "pods" if n < self.size.nodes => Self::tunnel(n),
            "pods" => self.pod(n - self.size.nodes, 1, true, 0),
            "services" => Self::service(n),
            "authorizationpolicies" => Self::policy(n),
            "namespaces" => Self::namespace(n),
            _ => json!({"metadata": {"name": "authorizationpolicies.security.istio.io"}}),
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path();
        if parts.method != Method::GET {
            return accept(path, body).await;
        }
        let query: HashMap<&str, &str> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        if query.contains_key("watch") {
            return self.watch(path);
        }
        let is_list = path.starts_with("/api/v1/") && path.matches('/').count() == 3
            || path.starts_with("/apis/") && path.matches('/').count() == 4;
        if !is_list {
            return reply(
                StatusCode::NOT_FOUND,
                &json!({"kind": "Status", "code": 404, "reason": "NotFound"}),
            );
        }
        let number = |key: &str| query.get(key).and_then(|text| text.parse().ok());
        let (from, limit): (usize, usize) = (
            number("continue").unwrap_or(0),
            number("limit").unwrap_or(500),
        );
        let all = self.count(path);
        let end = all.min(from + limit);
        let items: Vec<Value> = (from..end).map(|n| self.item(path, n)).collect();
        let next = (end < all).then(|| end.to_string());
        let version = self.version.load(Ordering::Relaxed).to_string();
        reply(
            StatusCode::OK,
            &json!({"metadata": {"resourceVersion": version, "continue": next}, "items": items}),
        )
    }

    fn watch(&self, path: &str) -> Response<Body> {
        let is_pods = path.ends_with("/pods");
        let changes = tokio_stream::wrappers::BroadcastStream::new(self.changes.subscribe());
        let lines = changes.filter_map(move |line| {
            let line = line.ok().filter(|_| is_pods)?;
            Some(Ok::<_, Infallible>(Frame::data(Bytes::from(line))))
        });
        Response::new(StreamBody::new(lines).boxed_unsync())
    }
}

fn reply(code: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync());
    *response.status_mut() = code;
    response
}

/// Takes what is written; a token is that of the node tunnel that it names.
async fn accept(path: &str, body: Incoming) -> Response<Body> {
    let body = body
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes);
    let mut object: Value = body
        .ok()
        .and_then(|body| serde_json::from_slice(&body).ok())
        .unwrap_or_default();
    if path.ends_with("/tokenreviews") {
        let pod = object["spec"]["token"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        object["status"] = json!({
            "authenticated": true, "audiences": ["istio-ca"],
            "user": {"username": "system:serviceaccount:istio-system:ztunnel", "groups": ["system:serviceaccounts"],
                "extra": {"authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [pod]}},
        });
    } else {
        object["metadata"]["resourceVersion"] = json!("1");
    }
    reply(StatusCode::CREATED, &object)
}
