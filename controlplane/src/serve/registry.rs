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

/// Refused resources remembered per subscriber and type, and the length of its last message.
const MAX_REJECTIONS: usize = 1024;
const MAX_MESSAGE: usize = 4096;

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
        connection.count(1);
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
    /// Counts it as come (1) or gone (-1).
    fn count(&self, change: i64) {
        let metrics = &self.registry.metrics;
        metrics.connected(&self.peer.proxy_type, &self.peer.version, change);
    }

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

    /// Responses that the proxy has taken whole; the last of them is the one it acknowledges.
    pub(super) fn accepted(&self, type_url: &Str, settled: &[Response]) {
        self.update(type_url, |report| {
            if let Some(last) = settled.last() {
                report.acked.clone_from(&last.nonce);
            }
            report.forget(settled);
            report.last_error = None;
        });
    }

    /// Responses of the last of which the proxy refuses a part.
    pub(super) fn rejected(&self, type_url: &Str, settled: &[Response], message: &str) {
        let proxy = &self.peer.proxy;
        tracing::warn!(
            proxy,
            type_url = &**type_url,
            message,
            "proxy rejects resources"
        );
        self.registry.metrics.rejected(type_url);
        self.update(type_url, |report| {
            report.forget(settled);
            report.rejected.extend(rejections(message, settled));
            report.last_error = Some(message.chars().take(MAX_MESSAGE).collect());
        });
    }

    fn update(&self, type_url: &Str, change: impl FnOnce(&mut TypeReport)) {
        change(self.types.lock().entry(type_url.clone()).or_default());
    }
}

impl TypeReport {
    /// What was sent anew is refused no more, until the proxy says so again.
    fn forget(&mut self, settled: &[Response]) {
        if self.rejected.is_empty() {
            return;
        }
        for name in settled.iter().flat_map(Response::upserted) {
            self.rejected.remove(name);
        }
    }
}

/// The resources that a NACK names, as `name: reason; name: reason`, of those that were sent.
fn rejections(message: &str, settled: &[Response]) -> BTreeMap<Str, String> {
    let sent: HashSet<&Str> = settled.iter().flat_map(Response::upserted).collect();
    let named = message.split("; ").filter_map(|piece| {
        let (name, reason) = piece.split_once(": ")?;
        let name = sent.get(&Str::from(name))?;
        Some((Str::clone(name), reason.to_owned()))
    });
    named.take(MAX_REJECTIONS).collect()
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.registry.connections.lock().remove(&self.id);
        self.count(-1);
    }
}
