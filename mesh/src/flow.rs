//! One connection through a tunnel, told once: the log line, the metrics, `/connections` and `explain` are all views
//! of a [`FlowRecord`].

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

use crate::{
    authority::Authority,
    headers::Baggage,
    identity::Identity,
    names::Str,
    outbound::Hop,
    outcome::{Object, Reason, listed},
    service::Service,
    workload::Workload,
};

#[cfg(test)]
mod tests;

/// The version of [`FlowRecord`]'s JSON. A change that a reader would notice raises it.
pub const VERSION: u32 = 1;

/// Whose connection it is, seen from the pod that this tunnel serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Away from the pod: the tunnel reports as the source.
    Outbound,
    /// Toward the pod: the tunnel reports as the destination.
    Inbound,
    /// Through a waypoint, which reports as itself.
    Waypoint,
}

impl Direction {
    /// The label `reporter`.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
            Self::Waypoint => "waypoint",
        }
    }

    /// The log field `direction`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Waypoint => "waypoint",
        }
    }
}

/// What protects the bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// Both ends have proven their identities by certificates.
    MutualTls,
    /// Nothing.
    Plaintext,
    /// The bytes never leave the node, whose tunnel serves both ends and attests both identities.
    SameNode,
}

impl Security {
    /// The label `connection_security_policy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Plaintext => "unknown",
            Self::SameNode => "same_node",
        }
    }
}

/// The label `response_flags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum ResponseFlag {
    /// `-`: nothing to tell.
    #[default]
    None,
    /// Policy.
    Deny,
    /// The other side could not be had, and any failure without a flag of its own.
    Connect,
    /// TLS with the next hop.
    TlsFailure,
    /// HTTP/2 with the next hop.
    H2HandshakeFailure,
    /// The tunnel's port did not answer: most often a NetworkPolicy.
    NetworkPolicy,
    /// Our own certificate.
    IdentityError,
    /// A revoked certificate.
    CertRevoked,
}

impl ResponseFlag {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::CertRevoked,
    ];

    /// The text of the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

/// Whose doing an end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// Nobody's: that is how connections end.
    Nobody,
    /// The side that connected.
    Source,
    /// The side that was connected to.
    Destination,
    /// What lies between the nodes.
    Network,
    /// A user's policy, doing what it says.
    Policy,
    /// The mesh's configuration: something it names is not there.
    Configuration,
    /// The operation of the mesh: upgrades, removals.
    Operation,
    /// Us.
    Ours,
}

/// Why a connection ended: the closed list behind log fields and metric labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Both sides said all they had.
    Complete,
    /// A decision refused it.
    Refused(Reason),
    /// It was allowed once; policy or its workload changed.
    PolicyChanged,
    /// The peer's CONNECT request was none that can be served.
    BadRequest,
    /// The next hop refused TCP.
    ConnectRefused,
    /// The next hop did not answer TCP in time.
    ConnectTimedOut,
    /// There is no way to the next hop.
    ConnectUnreachable,
    /// The next hop's tunnel port did not answer TCP in time.
    TunnelTimedOut,
    /// The name of the next hop could not be resolved.
    ResolveFailed,
    /// TLS with the next hop failed, as its identity may have.
    TlsFailed,
    /// HTTP/2 with the next hop failed.
    Http2Failed,
    /// The next hop answered CONNECT with this status.
    PeerRefused(u16),
    /// The tunnel under the connection broke.
    TunnelLost,
    /// There is no certificate for the pod.
    NoCertificate,
    /// The pod has as many connections open as one may have.
    TooMany,
    /// A certificate of the tunnel has been revoked.
    CertificateRevoked,
    /// The source reset it.
    SourceReset,
    /// The destination reset it.
    DestinationReset,
    /// Nothing was sent for too long.
    Idle,
    /// The tunnel was draining, and the deadline came.
    Drained,
    /// The pod was removed.
    PodRemoved,
    /// Something went wrong here.
    Internal,
}

impl EndReason {
    /// The label `response_flags`.
    pub fn flag(self) -> ResponseFlag {
        match self {
            Self::Complete
            | Self::SourceReset
            | Self::DestinationReset
            | Self::Idle
            | Self::Drained
            | Self::PodRemoved => ResponseFlag::None,
            Self::Refused(reason) => refusal_flag(reason),
            Self::PolicyChanged => ResponseFlag::Deny,
            Self::TunnelTimedOut => ResponseFlag::NetworkPolicy,
            Self::TlsFailed => ResponseFlag::TlsFailure,
            Self::Http2Failed => ResponseFlag::H2HandshakeFailure,
            Self::NoCertificate => ResponseFlag::IdentityError,
            Self::CertificateRevoked => ResponseFlag::CertRevoked,
            Self::BadRequest
            | Self::ConnectRefused
            | Self::ConnectTimedOut
            | Self::ConnectUnreachable
            | Self::ResolveFailed
            | Self::PeerRefused(_)
            | Self::TunnelLost
            | Self::TooMany
            | Self::Internal => ResponseFlag::Connect,
        }
    }

    /// Whose doing it is.
    pub fn blame(self) -> Blame {
        match self {
            Self::Complete | Self::Idle => Blame::Nobody,
            Self::Refused(reason) => refusal_blame(reason),
            Self::PolicyChanged => Blame::Policy,
            Self::BadRequest | Self::SourceReset => Blame::Source,
            Self::ConnectRefused
            | Self::TlsFailed
            | Self::Http2Failed
            | Self::PeerRefused(_)
            | Self::CertificateRevoked
            | Self::DestinationReset => Blame::Destination,
            Self::ConnectTimedOut
            | Self::ConnectUnreachable
            | Self::TunnelTimedOut
            | Self::ResolveFailed
            | Self::TunnelLost => Blame::Network,
            Self::Drained | Self::PodRemoved => Blame::Operation,
            Self::NoCertificate | Self::TooMany => Blame::Configuration,
            Self::Internal => Blame::Ours,
        }
    }

    /// The label `reason`. Lines tell the status that a peer has answered, whatever it is; metrics tell the usual ones, and
    /// of the others their class, so that no peer makes series as it likes.
    pub fn label(self) -> Cow<'static, str> {
        match self {
            Self::PeerRefused(status) => Cow::Borrowed(usual_status(status)),
            other => Cow::Owned(other.to_string()),
        }
    }

    /// Whether it is told as an error: in the log at ERROR, and in the counter of failed connections.
    pub fn is_failure(self) -> bool {
        self.flag() != ResponseFlag::None
    }
}

/// Those that tunnels and waypoints answer a CONNECT with, and proxies in front of them.
fn usual_status(status: u16) -> &'static str {
    match status {
        400 => "http status: 400",
        401 => "http status: 401",
        403 => "http status: 403",
        404 => "http status: 404",
        429 => "http status: 429",
        502 => "http status: 502",
        503 => "http status: 503",
        504 => "http status: 504",
        other => match other / 100 {
            2 => "http status: 2xx",
            3 => "http status: 3xx",
            4 => "http status: 4xx",
            5 => "http status: 5xx",
            _ => "http status: other",
        },
    }
}

fn refusal_flag(reason: Reason) -> ResponseFlag {
    match reason {
        Reason::PolicyDenied | Reason::PolicyNotAllowed | Reason::PolicyUnknown => {
            ResponseFlag::Deny
        }
        Reason::Recursion
        | Reason::UnknownSource
        | Reason::WaypointMissing
        | Reason::GatewayMissing
        | Reason::NoHealthyUpstream
        | Reason::NoAddress
        | Reason::DestinationUntold
        | Reason::ProtocolUnsupported
        | Reason::AddressMismatch
        | Reason::NotServed
        | Reason::UnknownPort
        | Reason::NoRoute
        | Reason::TooManyConnections
        | Reason::UnknownHostname => ResponseFlag::Connect,
    }
}

fn refusal_blame(reason: Reason) -> Blame {
    match reason {
        Reason::PolicyDenied | Reason::PolicyNotAllowed => Blame::Policy,
        Reason::Recursion
        | Reason::AddressMismatch
        | Reason::NotServed
        | Reason::UnknownPort
        | Reason::UnknownHostname => Blame::Source,
        Reason::NoHealthyUpstream => Blame::Destination,
        Reason::UnknownSource
        | Reason::WaypointMissing
        | Reason::GatewayMissing
        | Reason::NoAddress
        | Reason::DestinationUntold
        | Reason::ProtocolUnsupported
        | Reason::NoRoute
        | Reason::TooManyConnections
        | Reason::PolicyUnknown => Blame::Configuration,
    }
}

impl fmt::Display for EndReason {
    /// The log field `error`, for an end that is one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Refused(reason) => return reason.fmt(f),
            Self::PeerRefused(status) => return write!(f, "http status: {status}"),
            Self::Complete => "complete",
            Self::PolicyChanged => "connection closed due to policy change",
            Self::BadRequest => "invalid CONNECT request",
            Self::ConnectRefused => "connection refused",
            Self::ConnectTimedOut => "connection timed out",
            Self::ConnectUnreachable => "destination unreachable",
            Self::TunnelTimedOut => {
                "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008"
            }
            Self::ResolveFailed => "name resolution failed",
            Self::TlsFailed => "tls handshake failed",
            Self::Http2Failed => "http2 handshake failed",
            Self::TunnelLost => "tunnel lost",
            Self::NoCertificate => "no certificate",
            Self::TooMany => "too many connections of the pod",
            Self::CertificateRevoked => "certificate revoked",
            Self::SourceReset => "reset by source",
            Self::DestinationReset => "reset by destination",
            Self::Idle => "idle for too long",
            Self::Drained => "connection closed by drain",
            Self::PodRemoved => "pod removed",
            Self::Internal => "internal error",
        };
        f.write_str(text)
    }
}

/// The labels of one end. `None` is told as `unknown`. Cheap to hash: no pod name, which is no label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct PartyLabels {
    /// What owns the pod.
    pub workload: Option<Str>,
    /// Canonical service.
    pub canonical_service: Option<Str>,
    /// Canonical revision; also the label `version`.
    pub canonical_revision: Option<Str>,
    /// Namespace.
    pub namespace: Option<Str>,
    /// SPIFFE ID.
    pub principal: Option<Str>,
    /// Cluster.
    pub cluster: Option<Str>,
    /// Region and zone; `None` where nothing is known of the workload.
    pub place: Option<(Str, Str)>,
    /// Whether it is known by its own baggage alone.
    #[serde(skip)]
    pub by_baggage: bool,
}

impl PartyLabels {
    /// The label `app`: the canonical service; of an end that is known by baggage, what owns the pod (node-tunnel 1.7).
    pub fn app(&self) -> Option<&Str> {
        let told = match self.by_baggage {
            true => &self.workload,
            false => &self.canonical_service,
        };
        told.as_ref()
    }
}

/// One end of a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Party {
    /// Name of the pod.
    pub pod: Option<Str>,
    /// What metrics tell of it.
    pub labels: Arc<PartyLabels>,
}

fn told(text: &Str) -> Option<Str> {
    (!text.is_empty()).then(|| text.clone())
}

fn principal(identity: Option<&Identity>) -> Option<Str> {
    identity.map(|it| it.to_string().into())
}

impl Party {
    /// An end whose record is known. `identity`: what it has proven, or for a destination what its record says.
    pub fn of_workload(workload: &Workload, identity: Option<&Identity>) -> Self {
        let locality = &workload.locality;
        Self {
            pod: told(&workload.name),
            labels: Arc::new(PartyLabels {
                workload: told(workload.workload_name()),
                canonical_service: told(&workload.canonical_name),
                canonical_revision: told(&workload.canonical_revision),
                namespace: told(&workload.namespace),
                principal: principal(identity),
                cluster: told(&workload.cluster_id),
                place: Some((locality.region.clone(), locality.zone.clone())),
                by_baggage: false,
            }),
        }
    }

    /// An end that only tells of itself: behind a gateway, or not known here. Its identity is still what TLS proves,
    /// and its namespace is the identity's.
    pub fn of_baggage(baggage: &Baggage, identity: Option<&Identity>) -> Self {
        let namespace = identity.map(|it| it.namespace.clone());
        let place = |text: &Option<Str>| text.clone().unwrap_or_default();
        let known = *baggage != Baggage::default();
        Self {
            pod: None,
            labels: Arc::new(PartyLabels {
                workload: baggage.workload_name.clone(),
                canonical_service: baggage.service_name.clone(),
                canonical_revision: baggage.service_version.clone(),
                namespace: namespace.or_else(|| baggage.namespace.clone()),
                principal: principal(identity),
                cluster: baggage.cluster.clone(),
                place: known.then(|| (place(&baggage.region), place(&baggage.zone))),
                by_baggage: known,
            }),
        }
    }

    fn fields(&self, security: Security) -> PartyFields<'_> {
        let labels = &self.labels;
        let name = self.pod.as_ref().or(labels.canonical_service.as_ref());
        let principal = labels.principal.as_deref();
        PartyFields {
            workload: name.map(|it| &**it),
            namespace: labels.namespace.as_deref(),
            cluster: labels.cluster.as_deref(),
            identity: principal.filter(|_| security != Security::Plaintext),
        }
    }
}

/// The service that a client addressed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ServiceName {
    /// Host name.
    pub hostname: Str,
    /// Namespace.
    pub namespace: Str,
    /// Short name.
    pub name: Str,
}

impl From<&Service> for ServiceName {
    fn from(service: &Service) -> Self {
        Self {
            hostname: service.hostname.clone(),
            namespace: service.namespace.clone(),
            name: service.name.clone(),
        }
    }
}

/// The labels of the `istio_tcp_*` metrics, but for the flag, which is known at the end. Clone, hash and compare
/// without building text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// Whose tunnel reports.
    pub direction: Direction,
    /// The end that connected.
    pub source: Arc<PartyLabels>,
    /// The end that was connected to: outbound, the next hop.
    pub destination: Arc<PartyLabels>,
    /// The service that the client addressed.
    pub service: Option<ServiceName>,
    /// What protects the bytes.
    pub security: Security,
}

const UNKNOWN: &str = "unknown";

impl TcpLabels {
    /// Name and value of each label, in Istio's order (node-tunnel 1.7). `flag`: none while the flow is open.
    pub fn pairs(&self, flag: ResponseFlag) -> Vec<(&'static str, &str)> {
        let (from, to, service) = (&*self.source, &*self.destination, self.service.as_ref());
        let mut pairs = vec![
            ("reporter", self.direction.reporter()),
            ("source_workload", or_unknown(&from.workload)),
            (
                "source_canonical_service",
                or_unknown(&from.canonical_service),
            ),
            (
                "source_canonical_revision",
                or_unknown(&from.canonical_revision),
            ),
            ("source_workload_namespace", or_unknown(&from.namespace)),
            ("source_principal", or_unknown(&from.principal)),
            ("source_app", from.app().map_or(UNKNOWN, |it| it)),
            ("source_version", or_unknown(&from.canonical_revision)),
            ("source_cluster", or_unknown(&from.cluster)),
            (
                "destination_service",
                service.map_or(UNKNOWN, |it| &it.hostname),
            ),
            (
                "destination_service_namespace",
                service.map_or(UNKNOWN, |it| &it.namespace),
            ),
            (
                "destination_service_name",
                service.map_or(UNKNOWN, |it| &it.name),
            ),
            ("destination_workload", or_unknown(&to.workload)),
            (
                "destination_canonical_service",
                or_unknown(&to.canonical_service),
            ),
            (
                "destination_canonical_revision",
                or_unknown(&to.canonical_revision),
            ),
            ("destination_workload_namespace", or_unknown(&to.namespace)),
            ("destination_principal", or_unknown(&to.principal)),
            ("destination_app", to.app().map_or(UNKNOWN, |it| it)),
            ("destination_version", or_unknown(&to.canonical_revision)),
            ("destination_cluster", or_unknown(&to.cluster)),
            ("request_protocol", "tcp"),
            ("response_flags", flag.as_str()),
            ("connection_security_policy", self.security.as_str()),
        ];
        pairs.extend(self.places());
        pairs
    }

    /// Only where anything is known of either end.
    fn places(&self) -> Vec<(&'static str, &str)> {
        let (from, to) = (&self.source.place, &self.destination.place);
        if from.is_none() && to.is_none() {
            return Vec::new();
        }
        vec![
            ("source_region", place(from.as_ref().map(|it| &it.0))),
            ("source_zone", place(from.as_ref().map(|it| &it.1))),
            ("destination_region", place(to.as_ref().map(|it| &it.0))),
            ("destination_zone", place(to.as_ref().map(|it| &it.1))),
        ]
    }
}

fn or_unknown(text: &Option<Str>) -> &str {
    text.as_deref().unwrap_or(UNKNOWN)
}

fn place(text: Option<&Str>) -> &str {
    text.map(|it| &**it)
        .filter(|it| !it.is_empty())
        .unwrap_or(UNKNOWN)
}

/// One connection: who, to whom, through what, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowRecord {
    /// [`VERSION`].
    pub version: u32,
    /// Whose connection it is.
    pub direction: Direction,
    /// The end that connected.
    pub source: Party,
    /// Its address.
    pub source_addr: SocketAddr,
    /// The end that was connected to: outbound, the next hop.
    pub destination: Party,
    /// Its address: outbound, what is dialled; inbound over HBONE, the pod's port 15008.
    pub destination_addr: SocketAddr,
    /// The authority of the CONNECT request.
    pub authority: Option<Authority>,
    /// The service that the client addressed.
    pub service: Option<ServiceName>,
    /// How bytes travel.
    pub hop: Hop,
    /// What protects them.
    pub security: Security,
    /// What refused or ended it, where an object did.
    pub decided_by: Option<Box<Object>>,
    /// Payload toward the destination, in bytes.
    pub received_bytes: u64,
    /// Payload toward the source, in bytes.
    pub sent_bytes: u64,
    /// Since it was accepted.
    pub duration: Duration,
    /// Why it ended; `None` while it is open.
    pub end: Option<EndReason>,
    /// The whole chain of causes, where the end has one.
    pub error: Option<String>,
}

impl FlowRecord {
    /// A plaintext connection that has just been accepted; the rest is filled in as it becomes known.
    pub fn new(
        direction: Direction,
        source_addr: SocketAddr,
        destination_addr: SocketAddr,
    ) -> Self {
        let nobody = Party::default();
        let (source, destination) = ((nobody.clone(), source_addr), (nobody, destination_addr));
        Self::between(direction, source, destination)
    }

    /// As [`FlowRecord::new`], where both ends are known.
    pub fn between(
        direction: Direction,
        (source, source_addr): (Party, SocketAddr),
        (destination, destination_addr): (Party, SocketAddr),
    ) -> Self {
        Self {
            version: VERSION,
            direction,
            source,
            source_addr,
            destination,
            destination_addr,
            authority: None,
            service: None,
            hop: Hop::Tcp,
            security: Security::Plaintext,
            decided_by: None,
            received_bytes: 0,
            sent_bytes: 0,
            duration: Duration::ZERO,
            end: None,
            error: None,
        }
    }

    /// The labels of its metrics.
    pub fn labels(&self) -> TcpLabels {
        TcpLabels {
            direction: self.direction,
            source: Arc::clone(&self.source.labels),
            destination: Arc::clone(&self.destination.labels),
            service: self.service.clone(),
            security: self.security,
        }
    }

    /// What the access log says of it.
    pub fn fields(&self) -> AccessFields<'_> {
        let failure = self.end.filter(|end| end.is_failure());
        let error = match &self.error {
            Some(error) => Some(Cow::Borrowed(&**error)),
            None => failure.map(|end| Cow::Owned(end.to_string())),
        };
        let unusual = self.end.filter(|end| *end != EndReason::Complete);
        let policies = self.decided_by.as_deref().map_or(&[][..], Object::policies);
        let bytes = self.end.map(|_| self.bytes_of_pod());
        AccessFields {
            source_addr: self.source_addr,
            source: self.source.fields(self.security),
            destination_addr: self.destination_addr,
            authority: self.authority.as_ref(),
            service: self.service.as_ref().map(|it| &*it.hostname),
            destination: self.destination.fields(self.security),
            policy: (!policies.is_empty()).then(|| listed(policies)),
            end: unusual.map(|end| end.to_string()),
            direction: self.direction,
            bytes_sent: bytes.map(|(sent, _)| sent),
            bytes_received: bytes.map(|(_, received)| received),
            duration: self.end.map(|_| self.duration),
            error,
        }
    }

    /// Sent and received from the point of view of the pod that this tunnel serves, as logs tell them; metrics count
    /// by direction of the request.
    fn bytes_of_pod(&self) -> (u64, u64) {
        match self.direction {
            Direction::Outbound => (self.received_bytes, self.sent_bytes),
            Direction::Inbound | Direction::Waypoint => (self.sent_bytes, self.received_bytes),
        }
    }
}

/// What the access log says of a flow, in the order of the line (node-tunnel 1.8). What is `None` is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessFields<'a> {
    /// `src.addr`.
    pub source_addr: SocketAddr,
    /// `src.workload` and so on.
    pub source: PartyFields<'a>,
    /// `dst.addr`.
    pub destination_addr: SocketAddr,
    /// `dst.hbone_addr`.
    pub authority: Option<&'a Authority>,
    /// `dst.service`: host name.
    pub service: Option<&'a str>,
    /// `dst.workload` and so on.
    pub destination: PartyFields<'a>,
    /// `policy`: the policies that decided, with commas between.
    pub policy: Option<String>,
    /// `end`: how it ended, from the closed list, where that is not the usual end. Also where `error` says no more than
    /// that: whoever looks for a reason looks in one field.
    pub end: Option<String>,
    /// `direction`.
    pub direction: Direction,
    /// `bytes_sent`: payload that the pod sent.
    pub bytes_sent: Option<u64>,
    /// `bytes_recv`: payload that the pod received.
    pub bytes_received: Option<u64>,
    /// `duration`: from accept to end, told in milliseconds.
    pub duration: Option<Duration>,
    /// `error`: why it failed, in full.
    pub error: Option<Cow<'a, str>>,
}

/// What the access log says of one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartyFields<'a> {
    /// Name of the pod, else canonical service.
    pub workload: Option<&'a str>,
    /// Namespace.
    pub namespace: Option<&'a str>,
    /// Cluster.
    pub cluster: Option<&'a str>,
    /// SPIFFE ID; only where it has been proven or attested.
    pub identity: Option<&'a str>,
}

/// The record of an inbound connection's peer: by its address in our own network, unless it came through a gateway
/// (node-tunnel 1.7). Telemetry only.
pub fn peer_workload<'a>(
    view: &'a crate::view::MeshView,
    own_network: &Str,
    peer: IpAddr,
    forwarded_network: Option<&str>,
) -> Option<&'a Arc<Workload>> {
    let through_gateway =
        forwarded_network.is_some_and(|network| !network.eq_ignore_ascii_case(own_network));
    if through_gateway {
        return None;
    }
    view.workload_at(&crate::names::NetworkAddress {
        network: own_network.clone(),
        address: peer.to_canonical(),
    })
}
