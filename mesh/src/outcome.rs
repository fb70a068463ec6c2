//! What a decision answers.

use std::{fmt, slice};

use serde::Serialize;

use crate::names::{NamespacedHostname, NetworkAddress, PolicyKey, Str, WorkloadUid};

/// The answer of a decision: do it, refuse it, or come back when something more is known.
///
/// The effects layer fetches what [`Outcome::Need`] names, with a deadline and shared among waiters, and decides
/// again on the new view; when the deadline passes it refuses with [`Need::unmet`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Outcome<T> {
    /// Do it.
    Go(T),
    /// Do not; why.
    Refuse(Refusal),
    /// Not decidable on this view.
    Need(Need),
}

/// Why a flow is refused, and the object that says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// From the closed list.
    pub reason: Reason,
    /// The policy, service or workload that decided, where there is one, for logs: `policy a/deny-all`.
    pub object: Option<Object>,
}

/// The object behind a refusal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Object {
    /// An authorization policy.
    Policy(PolicyKey),
    /// The ALLOW policies of which none allowed it: sorted, at least one and at most [`MAX_POLICIES`].
    Policies(Vec<PolicyKey>),
    /// A service.
    Service(NamespacedHostname),
    /// A workload.
    Workload(WorkloadUid),
    /// An address.
    Address(NetworkAddress),
}

/// How many policies a refusal names.
pub const MAX_POLICIES: usize = 8;

impl Object {
    /// The policies, where it is these that refuse.
    pub fn policies(&self) -> &[PolicyKey] {
        match self {
            Self::Policy(key) => slice::from_ref(key),
            Self::Policies(keys) => keys,
            Self::Service(_) | Self::Workload(_) | Self::Address(_) => &[],
        }
    }
}

/// The closed list of reasons to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Reason {
    /// The destination is one of the tunnel's own ports: the connection would call itself.
    Recursion,
    /// The pod on whose behalf the tunnel acts is not known to the mesh (yet).
    UnknownSource,
    /// A waypoint is required and cannot be found: closed, never bypassed.
    WaypointMissing,
    /// The destination is in another network and no gateway leads there.
    GatewayMissing,
    /// The service has no endpoint to choose, or no such port.
    NoHealthyUpstream,
    /// The chosen workload has no address that can be used.
    NoAddress,
    /// The control plane has not told (in time) what the destination is: closed, as it may be of the mesh.
    DestinationUntold,
    /// The destination asks for a protection that we cannot give: closed, never plaintext
    /// (see [`crate::workload::TunnelProtocol::Unsupported`]).
    ProtocolUnsupported,
    /// The CONNECT authority is not an address of the pod.
    AddressMismatch,
    /// The CONNECT authority names a host that is no service of the pod, or a port that it does not map.
    UnknownHostname,
    /// The waypoint does not serve what was asked for: it is unknown, or bound to another one or none.
    NotServed,
    /// The service has no such port.
    UnknownPort,
    /// The service has routes, and none matches; or the one that does leads nowhere.
    NoRoute,
    /// The service's `connectionPool.tcp.maxConnections` are open.
    TooManyConnections,
    /// A DENY policy matched.
    PolicyDenied,
    /// ALLOW policies apply, and none matched.
    PolicyNotAllowed,
    /// A policy that the workload names is not known: closed.
    PolicyUnknown,
}

/// What a decision lacks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Need {
    /// The record of the local pod.
    LocalWorkload(LocalWorkload),
    /// A policy that the workload names.
    Policy(PolicyKey),
    /// The addresses of a host name.
    Dns(Str),
    /// An address resource (on-demand xDS), by its resource name.
    Resource(Str),
    /// A service or workload that this waypoint serves, by host name or `network/address`.
    Served(Str),
}

/// How a pod is bound to its record: never by address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalWorkload {
    /// Name of the pod.
    pub name: Str,
    /// Its namespace.
    pub namespace: Str,
    /// Its service account.
    pub service_account: Str,
}

impl Refusal {
    /// A refusal with no object behind it.
    pub fn new(reason: Reason) -> Self {
        Self {
            reason,
            object: None,
        }
    }

    /// A refusal by `object`.
    pub fn by(reason: Reason, object: Object) -> Self {
        Self {
            reason,
            object: Some(object),
        }
    }
}

impl Need {
    /// The refusal once the wait for it is over.
    pub fn unmet(&self) -> Refusal {
        match self {
            Self::LocalWorkload(_) => Refusal::new(Reason::UnknownSource),
            Self::Policy(key) => Refusal::by(Reason::PolicyUnknown, Object::Policy(key.clone())),
            Self::Dns(_) | Self::Resource(_) => Refusal::new(Reason::NoAddress),
            Self::Served(_) => Refusal::new(Reason::NotServed),
        }
    }
}

impl<T> Outcome<T> {
    /// Decides the next question, once this one is answered.
    pub fn and_then<U>(self, decide: impl FnOnce(T) -> Outcome<U>) -> Outcome<U> {
        match self {
            Self::Go(value) => decide(value),
            Self::Refuse(refusal) => Outcome::Refuse(refusal),
            Self::Need(need) => Outcome::Need(need),
        }
    }

    /// Changes what is to be done, and nothing else.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Outcome<U> {
        match self {
            Self::Go(value) => Outcome::Go(change(value)),
            Self::Refuse(refusal) => Outcome::Refuse(refusal),
            Self::Need(need) => Outcome::Need(need),
        }
    }
}

impl<T> From<Refusal> for Outcome<T> {
    fn from(refusal: Refusal) -> Self {
        Self::Refuse(refusal)
    }
}

impl Reason {
    /// The status with which a waypoint answers a refused CONNECT: 403 where a node tunnel answers 401 (waypoint.md 1.2).
    pub fn waypoint_status(self) -> u16 {
        match self {
            Self::Recursion => 403,
            other => match other.connect_status() {
                401 => 403,
                status => status,
            },
        }
    }

    /// The status that answers a refused CONNECT; a waypoint answers 403 where a node tunnel answers 401
    /// (node-tunnel 2.5).
    pub fn connect_status(self) -> u16 {
        match self {
            Self::NotServed | Self::UnknownPort => 404,
            Self::AddressMismatch => 400,
            Self::PolicyDenied | Self::PolicyNotAllowed | Self::PolicyUnknown => 401,
            Self::Recursion
            | Self::UnknownSource
            | Self::WaypointMissing
            | Self::GatewayMissing
            | Self::NoHealthyUpstream
            | Self::NoAddress
            | Self::DestinationUntold
            | Self::ProtocolUnsupported
            | Self::NoRoute
            | Self::TooManyConnections
            | Self::UnknownHostname => 503,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recursion => "attempted recursive call to ourselves",
            Self::UnknownSource => "unknown source",
            Self::WaypointMissing => "required waypoint not found",
            Self::GatewayMissing => "no gateway to the destination's network",
            Self::NoHealthyUpstream => "no healthy upstream",
            Self::NoAddress => "destination has no usable address",
            Self::DestinationUntold => "the control plane has not told what the destination is",
            Self::ProtocolUnsupported => "destination asks for an unsupported protocol",
            Self::AddressMismatch => "ip mismatch",
            Self::UnknownHostname => "no such service or port here",
            Self::NotServed => "not served by this waypoint",
            Self::UnknownPort => "the service has no such port",
            Self::NoRoute => "no route leads anywhere",
            Self::TooManyConnections => "the service's connection pool is used up",
            Self::PolicyDenied => "explicitly denied",
            Self::PolicyNotAllowed => "allow policies exist, but none allowed",
            Self::PolicyUnknown => "policy not known",
        })
    }
}

/// Policies as logs name them: `ns/name`, with commas between.
pub fn listed(policies: &[PolicyKey]) -> String {
    let names: Vec<_> = policies.iter().map(ToString::to_string).collect();
    names.join(",")
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(key) => write!(f, "policy {key}"),
            Self::Policies(keys) => write!(f, "policies {}", listed(keys)),
            Self::Service(key) => write!(f, "service {key}"),
            Self::Workload(uid) => write!(f, "workload {uid}"),
            Self::Address(address) => write!(f, "address {address}"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.object, self.reason) {
            // Upstream's words, which log searches rely on.
            (Some(Object::Policy(key)), Reason::PolicyDenied) => {
                write!(f, "explicitly denied by: {key}")
            }
            // The words alone here too; the log has the policies in a field of their own.
            (Some(Object::Policies(_)) | None, reason) => reason.fmt(f),
            (Some(object), reason) => write!(f, "{reason} ({object})"),
        }
    }
}
