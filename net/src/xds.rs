//! Delta xDS, the client's side: follows resource types of a control plane and keeps following them.
//!
//! It knows names, versions and nonces; what is in a resource is its [`Handler`]'s. Connection and retry are in
//! [`Client::run`], the protocol itself is pure and in `session`. Source: node-tunnel.md 3.1 to 3.4; where upstream's
//! client is known to hang or to fail open (3.3 hazards) this one does not: aliases wake waiters, waiters share one
//! subscription, every wait has a deadline, and a bad resource costs neither the good ones nor readiness.
//!
//! A lost control plane fails static: what was applied last stays applied.

mod backoff;
mod client;
mod demand;
mod session;
mod stream;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mesh::names::Str;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use prost_types::{Struct, Value, value::Kind};
use proto::{xds as wire, xds_core};
use tonic::transport::Channel;

use crate::tls::control_plane;

pub use client::Client;
pub use demand::{Demand, DemandError, Found};

/// The longest response that is accepted, in bytes (node-tunnel.md 3.1).
pub const MAX_RESPONSE: usize = 200 * 1024 * 1024;

/// How to reach a control plane and what to follow.
pub struct Config {
    /// Opens a connection; called anew at each reconnect, so that roots are read again and another replica may answer.
    pub connect: Connect,
    /// Proves who we are; read again at each reconnect.
    pub token: Option<Token>,
    /// More request metadata: `clusterid`, and the `XDS_HEADER_*` settings. Keys are lower-cased.
    pub metadata: Vec<(String, String)>,
    /// Who asks.
    pub node: Node,
    /// The types to follow, in the order of their first requests.
    pub subscriptions: Vec<Subscription>,
    /// A server that accepts the stream and has not said a word by then is left for another try.
    pub answer_deadline: Duration,
    /// Opened once each awaited type has been answered; never closed again.
    pub ready: Option<crate::ready::Gate>,
    /// Counts.
    pub metrics: Metrics,
}

/// Opens a gRPC channel.
pub type Connect = Arc<dyn Fn() -> Result<Channel, BoxError> + Send + Sync>;
/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Connects as `control_plane` says.
pub fn connect_to(control_plane: control_plane::Config) -> Connect {
    Arc::new(move || Ok(control_plane::channel(control_plane.clone())?))
}

/// One followed type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// `type.googleapis.com/...`.
    pub type_url: &'static str,
    /// How much of it.
    pub mode: Mode,
}

/// How much of a type is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All resources.
    Wildcard,
    /// Those asked for by [`Demand::resource`], and what the server adds to them. Not awaited by readiness.
    OnDemand,
}

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// A file, read for each use: Kubernetes rotates it.
    File(PathBuf),
    /// The token itself.
    Static(String),
}

impl Token {
    /// The token now, without surrounding whitespace.
    ///
    /// # Errors
    /// The file's.
    pub async fn read(&self) -> std::io::Result<String> {
        match self {
            Self::Static(token) => Ok(token.trim().to_owned()),
            Self::File(path) => {
                let text = tokio::fs::read_to_string(path).await?;
                Ok(text.trim().to_owned())
            }
        }
    }

    /// The file, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Static(_) => None,
        }
    }
}

/// Never prints the token.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Static(_) => f.write_str("Static(..)"),
        }
    }
}

/// What kind of proxy asks; the first part of a node's id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeKind {
    /// A node tunnel.
    #[default]
    Ztunnel,
    /// A waypoint: the control plane scopes what it is told to what it serves.
    Waypoint,
}

impl fmt::Display for NodeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ztunnel => "ztunnel",
            Self::Waypoint => "waypoint",
        })
    }
}

/// Who asks, as the control plane wants it (node-tunnel.md 3.1).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// Our address.
    pub instance_ip: String,
    /// Our pod.
    pub pod_name: String,
    /// Its namespace.
    pub pod_namespace: String,
    /// The node we serve; selects what the server sends unasked in on-demand mode.
    pub node_name: String,
    /// More metadata, such as `CLUSTER_ID`; JSON.
    pub metadata: BTreeMap<String, serde_json::Value>,
}

impl Node {
    /// `<kind>~<ip>~<pod>.<namespace>~<namespace>.svc.cluster.local`; the suffix is literal.
    pub fn id(&self) -> String {
        let Self {
            kind,
            instance_ip,
            pod_name,
            pod_namespace,
            ..
        } = self;
        format!("{kind}~{instance_ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.cluster.local")
    }

    fn to_wire(&self) -> xds_core::Node {
        let own = [
            ("NAME", &self.pod_name),
            ("NAMESPACE", &self.pod_namespace),
            ("INSTANCE_IPS", &self.instance_ip),
            ("NODE_NAME", &self.node_name),
        ];
        let own = own.map(|(key, text)| (key.to_owned(), string(text)));
        let more = self.metadata.iter();
        let more = more.map(|(key, json)| (key.clone(), value(json)));
        xds_core::Node {
            id: self.id(),
            metadata: Some(Struct {
                fields: own.into_iter().chain(more).collect(),
            }),
            ..Default::default()
        }
    }
}

fn string(text: &str) -> Value {
    let kind = Some(Kind::StringValue(text.to_owned()));
    Value { kind }
}

fn value(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(b) => Kind::BoolValue(*b),
        Json::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(items) => Kind::ListValue(prost_types::ListValue {
            values: items.iter().map(value).collect(),
        }),
        Json::Object(fields) => Kind::StructValue(Struct {
            fields: fields.iter().map(|(k, v)| (k.clone(), value(v))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}

/// One resource as it came: of the followed type, its body not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its name. The client keeps it as long as the resource is there, so a handler that does, too, had better keep this one.
    pub name: Str,
    /// Other names that it answers.
    pub aliases: Vec<String>,
    /// The server's version; may be empty.
    pub version: String,
    /// The message, encoded.
    pub body: Bytes,
}

/// One response: to be applied at once, resources in order, then removals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The type, one of the subscribed ones.
    pub type_url: &'static str,
    /// New or changed.
    pub resources: Vec<Resource>,
    /// Gone, by name; unknown names are no error.
    pub removed: Vec<String>,
}

/// A resource that was not taken over. What was known under its name stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The resource's name.
    pub name: String,
    /// For the server's log, naming the field.
    pub reason: String,
}

/// Takes responses in.
pub trait Handler: Send + 'static {
    /// Applies what is good of one response and tells what is not.
    fn apply(&mut self, response: Response) -> Vec<Rejection>;

    /// Each awaited type has been answered by now. Called after each response from then on.
    fn synced(&mut self) {}
}

/// The client's counters. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    messages: Family<TypeLabel, Counter>,
    message_bytes: Family<TypeLabel, Counter>,
    terminations: Family<TerminationLabel, Counter>,
    rejections: Family<TypeLabel, Counter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    url: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TerminationLabel {
    reason: Termination,
}

/// Why a connection ended, as the metric has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Termination {
    /// It never came about.
    ConnectionError,
    /// The server or the transport failed.
    Error,
    /// The server asked us to come again, or a proxy in between did.
    Reconnect,
    /// The stream ended well.
    Complete,
}

impl EncodeLabelValue for Termination {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        let text = match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        };
        text.encode(encoder)
    }
}

impl Metrics {
    /// New counters in `registry`, under Istio's names.
    pub fn register(registry: &mut Registry) -> Self {
        let new = Self::default();
        registry.register(
            "istio_xds_connection_terminations",
            "Connections to the control plane that ended, by reason",
            new.terminations.clone(),
        );
        registry.register(
            "istio_xds_message",
            "Responses received, by resource type",
            new.messages.clone(),
        );
        registry.register(
            "istio_xds_message_bytes",
            "Bytes of resources received, by resource type",
            new.message_bytes.clone(),
        );
        registry.register(
            "leyline_xds_rejected_resources",
            "Resources refused, by resource type",
            new.rejections.clone(),
        );
        new
    }

    fn received(&self, response: &Response) {
        let label = TypeLabel {
            url: response.type_url,
        };
        let bytes: usize = response.resources.iter().map(|r| r.body.len()).sum();
        self.messages.get_or_create(&label).inc();
        self.message_bytes
            .get_or_create(&label)
            .inc_by(bytes as u64);
    }

    fn rejected(&self, type_url: &'static str, count: usize) {
        let label = TypeLabel { url: type_url };
        self.rejections.get_or_create(&label).inc_by(count as u64);
    }

    fn terminated(&self, reason: Termination) {
        let label = TerminationLabel { reason };
        self.terminations.get_or_create(&label).inc();
    }
}

#[cfg(test)]
mod tests;
