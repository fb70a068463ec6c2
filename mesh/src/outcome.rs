//! What a decision answers.

use crate::names::{NamespacedHostname, NetworkAddress, PolicyKey, Str, WorkloadUid};

/// The answer of a decision: do it, refuse it, or come back when something more is known.
///
/// The effects layer fetches what [`Outcome::Need`] names, with a deadline and shared among waiters, and decides
/// again on the new view; when the deadline passes it refuses with [`Need::unmet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<T> {
    /// Do it.
    Go(T),
    /// Do not; why.
    Refuse(Refusal),
    /// Not decidable on this view.
    Need(Need),
}

/// Why a flow is refused, and the object that says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// From the closed list.
    pub reason: Reason,
    /// The policy, service or workload that decided, where there is one, for logs: `policy a/deny-all`.
    pub object: Option<Object>,
}

/// The object behind a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// An authorization policy.
    Policy(PolicyKey),
    /// A service.
    Service(NamespacedHostname),
    /// A workload.
    Workload(WorkloadUid),
    /// An address.
    Address(NetworkAddress),
}

/// The closed list of reasons to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// The CONNECT authority is not an address of the pod.
    AddressMismatch,
    /// The CONNECT authority names a host that is no service of the pod.
    UnknownHostname,
    /// A DENY policy matched.
    PolicyDenied,
    /// ALLOW policies apply, and none matched.
    PolicyNotAllowed,
    /// A policy that the workload names is not known: closed.
    PolicyUnknown,
}

/// What a decision lacks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Need {
    /// The record of the local pod.
    LocalWorkload(LocalWorkload),
    /// A policy that the workload names.
    Policy(PolicyKey),
    /// The addresses of a host name.
    Dns(Str),
    /// An address resource (on-demand xDS), by its resource name.
    Resource(Str),
}

/// How a pod is bound to its record: never by address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
