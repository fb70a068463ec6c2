//! Who is connected, what they were sent, and what they said to it. Read by the debug endpoints and by statuses.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use mesh::names::Str;
use parking_lot::Mutex;
use serde::Serialize;

use super::encode::Response;
use crate::metrics::Metrics;

/// All connected subscribers.
#[derive(Debug)]
pub struct Registry {
    connections: Mutex<BTreeMap<u64, Weak<Connection>>>,
    next: AtomicU64,
    metrics: Arc<Metrics>,
}

/// One connected subscriber; it leaves the registry when dropped.
#[derive(Debug)]
pub struct Connection {
    /// Who it is.
    pub peer: Peer,
    id: u64,
    connected: SystemTime,
    types: Mutex<BTreeMap<Str, TypeReport>>,
    registry: Arc<Registry>,
}

/// Who a subscriber is.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// Its node id: `type~ip~pod.namespace~domain`.
    pub node_id: String,
    /// `pod.namespace` of the node id.
    pub proxy: String,
    /// First part of the node id.
    pub proxy_type: String,
    /// Node it runs on, from its metadata.
    pub node: String,
    /// Cluster it says it is of.
    pub cluster_id: String,
    /// Version it says it has.
    pub version: String,
    /// Proven service account, `namespace/name`.
    pub account: String,
    /// Where it connects from.
    pub address: Option<SocketAddr>,
}

/// What was sent of one type, and what came back.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TypeReport {
    /// Nonce of the last response.
    pub sent: String,
    /// Nonce of the last response that was acknowledged.
    pub acked: String,
    /// When the last response was sent.
    pub sent_time: Option<Timestamp>,
    /// Message of the last NACK, until a later response is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Resources it refuses, with its reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rejected: BTreeMap<Str, String>,
    /// Resources sent on this stream.
    pub resources: u64,
}

/// One subscriber, as the debug endpoints show it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Subscription {
    /// Unique while the control plane runs.
    pub connection_id: u64,
    /// Since when.
    pub connected_at: Timestamp,
    /// Who.
    #[serde(flatten)]
    pub peer: Peer,
    /// By type URL.
    pub types: BTreeMap<Str, TypeReport>,
}

/// A moment, written as RFC 3339.
#[derive(Debug, Clone, Copy)]
pub struct Timestamp(SystemTime);

/// A proxy's refusal of one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// `pod.namespace`.
    pub proxy: String,
    /// Its reason.
    pub reason: String,
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let time = time::OffsetDateTime::from(self.0);
        let text = time.format(&time::format_description::well_known::Rfc3339);
        serializer.serialize_str(&text.map_err(serde::ser::Error::custom)?)
    }
}

impl Registry {
    /// An empty one.
    pub fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            connections: Mutex::default(),
            next: AtomicU64::new(1),
            metrics,
        })
    }

    pub(super) fn connect(self: &Arc<Self>, peer: Peer) -> Arc<Connection> {
        let connection = Arc::new(Connection {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            peer,
            connected: SystemTime::now(),
            types: Mutex::default(),
            registry: self.clone(),
        });
        let weak = Arc::downgrade(&connection);
        self.connections.lock().insert(connection.id, weak);
        self.metrics.connected(&connection.peer, 1);
        connection
    }

    /// Everyone who is connected, oldest first.
    pub fn subscriptions(&self) -> Vec<Subscription> {
        let live: Vec<_> = {
            let connections = self.connections.lock();
            connections.values().filter_map(Weak::upgrade).collect()
        };
        live.iter().map(|connection| connection.report()).collect()
    }

    /// Refused resources by type URL and name.
    pub fn rejections(&self) -> HashMap<(Str, Str), Vec<Rejection>> {
        let mut all: HashMap<_, Vec<_>> = HashMap::new();
        for subscription in self.subscriptions() {
            for (type_url, report) in subscription.types {
                for (name, reason) in report.rejected {
                    let proxy = subscription.peer.proxy.clone();
                    let rejections = all.entry((type_url.clone(), name)).or_default();
                    rejections.push(Rejection { proxy, reason });
                }
            }
        }
        all
    }
}

impl Connection {
    fn report(&self) -> Subscription {
        Subscription {
            connection_id: self.id,
            connected_at: Timestamp(self.connected),
            peer: self.peer.clone(),
            types: self.types.lock().clone(),
        }
    }

    pub(super) fn sent(&self, response: &Response) {
        let upserts = response.upserted().len();
        self.registry
            .metrics
            .pushed(&response.type_url, response.bytes());
        self.update(&response.type_url, |report| {
            report.sent.clone_from(&response.nonce);
            report.sent_time = Some(Timestamp(SystemTime::now()));
            report.resources += u64::try_from(upserts).unwrap_or(u64::MAX);
        });
    }

    pub(super) fn stale_nonce(&self, type_url: &str) {
        self.registry.metrics.stale_nonce(type_url);
    }

    pub(super) fn accepted(&self, type_url: &Str, nonce: &str, names: &HashSet<Str>) {
        self.update(type_url, |report| {
            nonce.clone_into(&mut report.acked);
            report.rejected.retain(|name, _| !names.contains(name));
            report.last_error = None;
        });
    }

    pub(super) fn rejected(
        &self,
        type_url: &Str,
        nonce: &str,
        names: &HashSet<Str>,
        message: &str,
        rejected: BTreeMap<Str, String>,
    ) {
        let proxy = &self.peer.proxy;
        tracing::warn!(
            proxy,
            type_url = &**type_url,
            nonce,
            message,
            "proxy rejects resources"
        );
        self.registry.metrics.rejected(type_url);
        self.update(type_url, |report| {
            report.rejected.retain(|name, _| !names.contains(name));
            report.rejected.extend(rejected);
            report.last_error = Some(message.chars().take(4096).collect());
        });
    }

    fn update(&self, type_url: &Str, change: impl FnOnce(&mut TypeReport)) {
        change(self.types.lock().entry(type_url.clone()).or_default());
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.registry.connections.lock().remove(&self.id);
        self.registry.metrics.connected(&self.peer, -1);
    }
}
