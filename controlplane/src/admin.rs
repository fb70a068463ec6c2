//! The admin API (HTTP): readiness, metrics, what is served to whom, and what became of every object.
//!
//! A folder's control plane listens on loopback unless told otherwise; on Kubernetes a [`Guard`] decides who sees more
//! than figures. It never shows a key or a token.

mod guard;
#[cfg(test)]
mod tests;

pub use guard::Guard;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use mesh::{
    dump::ConfigDump,
    names::Str,
    view::{MeshView, Resource, Update},
};
use net::metrics::scraped;
use prost::Message as _;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use serde_json::{Map, Value, json};

use crate::{
    metrics::Metrics,
    object::Kind,
    output::{Condition, ObjectStatus, Truth},
    run::remotes,
    serve::{
        registry::{Registry, Rejection, TypeReport},
        store::Store,
    },
    source::cluster::Troubles,
    world::World,
};

/// What the endpoints read.
#[derive(Debug)]
pub struct Admin {
    /// The world, once it is computed.
    pub world: World,
    /// What is served.
    pub store: Arc<Store>,
    /// To whom.
    pub registry: Arc<Registry>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// True between the first whole world with a listener, and the end.
    pub ready: Arc<AtomicBool>,
    /// What of the API server cannot be watched, where it is the source.
    pub troubles: Option<Troubles>,
    /// What is known of other clusters.
    pub remotes: Option<remotes::Status>,
    /// Who may see what there is to debug; `None`: everyone who reaches the listener.
    pub guard: Option<Guard>,
    /// For the names of resources.
    pub cluster_id: String,
    /// For the names of services.
    pub cluster_domain: String,
}

const ENDPOINTS: [(&str, &str); 10] = [
    ("/ready", "200 once the world is computed and served"),
    ("/metrics", "Prometheus's text, or OpenMetrics"),
    ("/version", "version of this control plane"),
    ("/status", "every object with its conditions, file and line"),
    (
        "/debug/syncz",
        "what each proxy was sent and has acknowledged",
    ),
    (
        "/debug/ambientz",
        "workloads, services and policies as served",
    ),
    (
        "/debug/configz",
        "every object that was read, with its file and line",
    ),
    ("/debug/connections", "connected proxies"),
    (
        "/debug/clusterz",
        "other clusters that are looked at, and how far they are",
    ),
    ("/debug/list", "this list"),
];

/// The endpoints.
pub fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/", get(list))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .route("/status", get(status))
        .route("/debug/syncz", get(syncz))
        .route("/debug/ambientz", get(ambientz))
        .route("/debug/configz", get(configz))
        .route("/debug/connections", get(connections))
        .route("/debug/clusterz", get(clusterz))
        .route("/debug/list", get(list))
        .layer(middleware::from_fn_with_state(admin.clone(), guard::check))
        .with_state(admin)
}

/// What kubelet asks, on an address of its own.
pub fn readiness_router(admin: Arc<Admin>) -> Router {
    Router::new().route("/ready", get(ready)).with_state(admin)
}

async fn list() -> Json<Value> {
    let entry = |(path, what): (&str, &str)| json!({"path": path, "description": what});
    Json(ENDPOINTS.map(entry).to_vec().into())
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    match admin.ready.load(Ordering::Acquire) {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, admin.pending()).into_response(),
    }
}

impl Admin {
    /// What readiness waits for.
    fn pending(&self) -> String {
        let waiting: Vec<&str> = self
            .world
            .unlisted()
            .into_iter()
            .map(Kind::as_str)
            .collect();
        let mut text = "not ready\n".to_owned();
        if !waiting.is_empty() {
            text.push_str(&format!("no list yet: {}\n", waiting.join(", ")));
        }
        let troubles = self.troubles.as_ref().map(Troubles::all);
        for (resource, trouble) in troubles.into_iter().flatten() {
            text.push_str(&format!("{resource}: {trouble}\n"));
        }
        text
    }
}

async fn metrics(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response {
    if let Some(known) = &admin.remotes {
        let known = known.borrow().clone();
        let states = known.iter();
        let states = states.map(|(cluster, known)| (&**cluster, known.sync_status.as_str()));
        admin.metrics.other_clusters(states);
    }
    let idle = admin.store.services_without_workloads();
    let virtual_services = admin.world.count(Kind::VirtualService);
    admin.metrics.counted(idle, virtual_services);
    scraped(&admin.metrics.exposed(), &headers).await
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "component": "controlplane"}))
}

/// Objects with their conditions; one that proxies refuse says so.
async fn status(State(admin): State<Arc<Admin>>) -> Json<Vec<ObjectStatus>> {
    let mut statuses = admin.world.statuses();
    let rejections = admin.registry.rejections();
    if !rejections.is_empty() {
        for status in &mut statuses {
            let names = Names {
                cluster_id: &admin.cluster_id,
                cluster_domain: &admin.cluster_domain,
            };
            status
                .conditions
                .extend(names.rejected(status, &rejections));
        }
    }
    Json(statuses)
}

async fn configz(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let objects = admin.world.statuses().into_iter().map(|status| {
        json!({
            "kind": status.kind,
            "namespace": status.namespace,
            "name": status.name,
            "file": status.file,
            "line": status.line,
        })
    });
    Json(objects.collect())
}

/// Which resources an object becomes (control-plane.md 5 and 6).
struct Names<'a> {
    cluster_id: &'a str,
    cluster_domain: &'a str,
}

impl Names<'_> {
    fn is_of(&self, status: &ObjectStatus, type_url: &str, resource: &str) -> bool {
        let namespace = status.namespace.as_deref().unwrap_or_default();
        let (name, cluster) = (&status.name, self.cluster_id);
        let address = type_url != AUTHORIZATION_TYPE_URL;
        match &*status.kind {
            "AuthorizationPolicy" => !address && resource == format!("{namespace}/{name}"),
            "PeerAuthentication" => {
                let converted = format!("{namespace}/converted_peer_authentication_{name}");
                !address && resource == converted
            }
            "Pod" => address && resource == format!("{cluster}//Pod/{namespace}/{name}"),
            "Service" => {
                let domain = self.cluster_domain;
                address && resource == format!("{namespace}/{name}.{namespace}.svc.{domain}")
            }
            kind @ ("WorkloadEntry" | "ServiceEntry") => {
                let uid = format!("{cluster}/networking.istio.io/{kind}/{namespace}/{name}");
                let rest = resource.strip_prefix(&uid);
                address && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            "EndpointSlice" => {
                let uid = format!("{cluster}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/");
                address && resource.starts_with(&uid)
            }
            _ => false,
        }
    }

    fn rejected(
        &self,
        status: &ObjectStatus,
        rejections: &HashMap<(Str, Str), Vec<Rejection>>,
    ) -> Option<Condition> {
        let of_object = rejections
            .iter()
            .filter(|((type_url, name), _)| self.is_of(status, type_url, name));
        let refusals: Vec<&Rejection> = of_object.flat_map(|(_, refusals)| refusals).collect();
        let first = refusals.first()?;
        let mut proxies: Vec<_> = refusals.iter().map(|refusal| &refusal.proxy).collect();
        proxies.sort();
        proxies.dedup();
        Some(Condition {
            type_: "ProxiesAccepted",
            status: Truth::False,
            reason: "RejectedByProxies",
            message: format!(
                "rejected by {} proxies; {} says: {}",
                proxies.len(),
                first.proxy,
                first.reason
            )
            .into(),
        })
    }
}

/// In the shape that `istioctl proxy-status` reads, with refused resources added.
async fn syncz(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let items = admin.registry.subscriptions().into_iter().map(|known| {
        let short = |type_url: &str| type_url.rsplit('/').next().unwrap_or(type_url).to_owned();
        let mut item = Map::new();
        let mut resources = Map::new();
        for (type_url, report) in &known.types {
            item.insert(
                format!("{}_sent", short(type_url)),
                report.sent.clone().into(),
            );
            item.insert(
                format!("{}_acked", short(type_url)),
                report.acked.clone().into(),
            );
            resources.insert(type_url.to_string(), synced(report));
        }
        for (key, value) in [
            ("cluster_id", known.peer.cluster_id),
            ("proxy", known.peer.proxy),
            ("proxy_type", known.peer.proxy_type),
            ("istio_version", known.peer.version.clone()),
            ("proxy_version", known.peer.version),
            ("node", known.peer.node),
        ] {
            item.insert(key.to_owned(), value.into());
        }
        item.insert("resources".to_owned(), resources.into());
        Value::Object(item)
    });
    Json(items.collect())
}

fn synced(report: &TypeReport) -> Value {
    json!({
        "sent": report.sent,
        "acked": report.acked,
        "sentTime": report.sent_time,
        "lastError": report.last_error,
        "rejected": report.rejected,
        "resourcesSent": report.resources,
    })
}

/// Workloads, services and policies as proxies get them, in `config_dump`'s shape.
async fn ambientz(State(admin): State<Arc<Admin>>) -> Response {
    let mut view = MeshView::default();
    let update = Update {
        upserts: served(&admin.store),
        removals: Vec::new(),
    };
    view.apply(update);
    Json(ConfigDump::from(&view)).into_response()
}

fn served(store: &Store) -> Vec<Resource> {
    let addresses = store
        .resources(ADDRESS_TYPE_URL)
        .into_iter()
        .filter_map(|it| {
            let wire = proto::workload::Address::decode(it.body.clone()).ok()?;
            Resource::try_from(wire).ok()
        });
    let policies = store
        .resources(AUTHORIZATION_TYPE_URL)
        .into_iter()
        .filter_map(|it| {
            let wire = proto::security::Authorization::decode(it.body.clone()).ok()?;
            Some(Resource::Policy(wire.try_into().ok()?))
        });
    addresses.chain(policies).collect()
}

/// As upstream's, with what is wrong beside it.
async fn clusterz(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let known = admin.remotes.as_ref().map(|known| known.borrow().clone());
    let cluster = |(id, known): (Str, remotes::Known)| {
        json!({
            "id": id,
            "secretName": known.secret_name,
            "syncStatus": known.sync_status.as_str(),
            "message": known.message,
        })
    };
    Json(known.into_iter().flatten().map(cluster).collect())
}

async fn connections(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let clients = admin.registry.subscriptions().into_iter().map(|known| {
        json!({
            "connectionId": known.connection_id,
            "connectedAt": known.connected_at,
            "address": known.peer.address,
            "metadata": {"nodeId": known.peer.node_id, "nodeName": known.peer.node, "account": known.peer.account},
            "watches": known.types.keys().collect::<Vec<_>>(),
        })
    });
    let clients: Vec<_> = clients.collect();
    Json(json!({"totalClients": clients.len(), "clients": clients}))
}
