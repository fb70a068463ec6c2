//! How a service's endpoints are reached: DestinationRule, BackendTLSPolicy and XBackendTrafficPolicy, merged per
//! service by the control plane.

use std::{collections::BTreeMap, time::Duration};

use http::{HeaderName, StatusCode};

use super::name::ObjectRef;
use crate::names::{NamespacedHostname, Str};

/// The policy of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendPolicy {
    /// Key.
    pub service: NamespacedHostname,
    /// The objects it came from, most important first.
    pub sources: Vec<ObjectRef>,
    /// For every port without an own entry.
    pub policy: TrafficPolicy,
    /// By service port; replaces `policy` block by block as the control plane has merged it.
    pub ports: BTreeMap<u16, TrafficPolicy>,
    /// By name.
    pub subsets: BTreeMap<Str, Subset>,
}

impl BackendPolicy {
    /// Whether endpoints are told apart by their labels.
    pub fn asks_labels(&self) -> bool {
        let subsets = self.subsets.values();
        let of_subsets = subsets.flat_map(|it| it.policy.iter().chain(it.ports.values()));
        let mut all = std::iter::once(&self.policy)
            .chain(self.ports.values())
            .chain(of_subsets);
        !self.subsets.is_empty() || all.any(|it| matches!(it.locality, Some(Locality::Priority(_))))
    }
}

/// Endpoints with these labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subset {
    /// All must be equal.
    pub labels: BTreeMap<Str, Str>,
    /// Merged over the service's; none: the service's.
    pub policy: Option<TrafficPolicy>,
    /// By service port.
    pub ports: BTreeMap<u16, TrafficPolicy>,
}

/// How endpoints are chosen and connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficPolicy {
    /// Choice of an endpoint.
    pub balancer: Balancer,
    /// Locality; none: by the service's own preferences in the mesh view.
    pub locality: Option<Locality>,
    /// Slow start.
    pub warmup: Option<Warmup>,
    /// Limits.
    pub pool: ConnectionPool,
    /// Ejection of endpoints that fail; none: off.
    pub outlier: Option<OutlierDetection>,
    /// TLS to the application, inside HBONE where the endpoint speaks it; none: none.
    pub tls: Option<BackendTls>,
    /// 1 or 2: a PROXY header comes first.
    pub proxy_protocol: Option<u8>,
    /// The endpoints are forward proxies, which connections that are not HTTP ask to go on to this host and port by CONNECT
    /// (DestinationRule `tunnel`).
    pub forward_to: Option<Str>,
    /// None: 20% with at least 3.
    pub retry_budget: Option<RetryBudget>,
    /// Keeps a client at its endpoint, where the route does not say it (XBackendTrafficPolicy).
    pub session: Option<super::route::SessionPersistence>,
}

/// Choice of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Balancer {
    /// The less loaded of two drawn ones.
    #[default]
    LeastRequest,
    /// In turn, by weight.
    RoundRobin,
    /// By chance.
    Random,
    /// The address that the client dialled.
    Passthrough,
    /// By a hash of the request; no key: by chance.
    ConsistentHash {
        /// What is hashed.
        key: HashKey,
        /// How.
        table: HashTable,
    },
}

/// What is hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// A header.
    Header(HeaderName),
    /// A cookie, made when it is not there if `ttl` is given (0: for the session).
    Cookie {
        /// Name.
        name: Str,
        /// Path.
        path: Option<Str>,
        /// Life.
        ttl: Option<Duration>,
        /// Other attributes, as written.
        attributes: Vec<(Str, Option<Str>)>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter.
    Query(Str),
}

/// How keys are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HashTable {
    /// At least so many points on the ring.
    Ring(u32),
    /// A table of so many entries, a prime.
    Maglev(u32),
}

/// Locality (DestinationRule `localityLbSetting`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Locality {
    /// All endpoints alike.
    Off,
    /// Nearest first; a region may name the one that follows it.
    Failover(Vec<(Str, Str)>),
    /// Endpoints that share more leading labels with the waypoint come first: `label` or `label=value`.
    Priority(Vec<(Str, Option<Str>)>),
    /// From a locality (`region/zone/subzone`, `*` at the end) shares in percent to others.
    Distribute(Vec<Distribution>),
}

/// Shares of traffic from one locality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    /// Where the waypoint is.
    pub from: Str,
    /// Locality and percent; the sum is 100.
    pub to: Vec<(Str, u32)>,
}

/// Slow start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Warmup {
    /// How long it takes.
    pub duration: Duration,
    /// Percent of the weight at its start.
    pub minimum_percent: u32,
    /// Thousandths; 1000: linear.
    pub aggression_milli: u32,
}

/// Limits; none: without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ConnectionPool {
    /// TCP connections.
    pub max_connections: Option<u32>,
    /// None: 10 s.
    pub connect_timeout: Option<Duration>,
    /// Probes, time to the first, interval.
    pub keepalive: Option<(Option<u32>, Option<Duration>, Option<Duration>)>,
    /// Then it is closed.
    pub max_connection_duration: Option<Duration>,
    /// TCP without traffic; none: 1 h.
    pub tcp_idle_timeout: Option<Duration>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<u32>,
    /// Requests at once.
    pub max_requests: Option<u32>,
    /// Then the connection is closed.
    pub max_requests_per_connection: Option<u32>,
    /// Retries at once.
    pub max_retries: Option<u32>,
    /// HTTP connection without requests.
    pub http_idle_timeout: Option<Duration>,
    /// Which HTTP version the backend gets.
    pub http_version: UpstreamVersion,
    /// Streams at once on a connection.
    pub max_concurrent_streams: Option<u32>,
    /// PINGs on HTTP/2 connections; none: every 30 s, answered within 20 s.
    pub http2_keepalive: Option<Http2Keepalive>,
}

/// PINGs on HTTP/2 connections (`http2KeepAlive`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Http2Keepalive {
    /// Between PINGs; 0: none are sent.
    pub interval: Duration,
    /// Then the connection is closed.
    pub timeout: Duration,
}

/// Which HTTP version a backend gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UpstreamVersion {
    /// By the port's protocol; sniffed: the client's.
    #[default]
    Declared,
    /// HTTP/2 (`h2UpgradePolicy: UPGRADE`).
    Http2,
    /// The client's (`useClientProtocol`).
    Client,
}

/// Ejection of endpoints that fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// In a row; 0: off.
    pub consecutive_5xx: u32,
    /// 502, 503, 504 in a row; 0: off.
    pub consecutive_gateway_errors: u32,
    /// Failures without a response in a row, counted apart; none: together with 5xx.
    pub consecutive_local_failures: Option<u32>,
    /// How often endpoints are looked at.
    pub interval: Duration,
    /// Times the number of ejections.
    pub base_ejection_time: Duration,
    /// Of the endpoints; one may always be.
    pub max_ejection_percent: u32,
    /// Below it all are used; 0: never.
    pub min_health_percent: u32,
    /// Statuses that count as errors; empty: 5xx.
    pub error_codes: Vec<StatusCode>,
}

/// TLS to a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendTls {
    /// Verified TLS.
    Verify {
        /// Name sent as SNI; none: the request's host.
        sni: Option<Str>,
        /// The roots; none: the system's.
        roots: Option<Pem>,
        /// Lists of certificates that are revoked; none: nobody's is.
        revoked: Option<Pem>,
        /// Any of these is in the certificate; empty: the SNI name is.
        subject_alt_names: Vec<SubjectAltName>,
        /// Chain and key that are shown.
        client: Option<ClientCertificate>,
    },
    /// TLS without any verification (DestinationRule `insecureSkipVerify`).
    Insecure {
        /// Name sent as SNI; none: the request's host.
        sni: Option<Str>,
        /// Chain and key that are shown.
        client: Option<ClientCertificate>,
    },
    /// The policy cannot be kept: requests are answered 503 and connections refused. The text is for the log.
    Invalid(Str),
}

/// A name in a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SubjectAltName {
    /// DNS name.
    Hostname(Str),
    /// URI.
    Uri(Str),
}

/// PEM, and where it is.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// Here.
    Inline(Vec<u8>),
    /// In a file of the waypoint, which may change.
    File(Str),
}

impl std::fmt::Debug for Pem {
    /// Contents are long, and may be keys: they are never shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inline(pem) => write!(f, "Inline({} bytes)", pem.len()),
            Self::File(path) => write!(f, "File({path})"),
        }
    }
}

/// A certificate and its key.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// Leaf first.
    pub chain: Pem,
    /// Never shown.
    pub key: Pem,
}

impl std::fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientCertificate").finish_non_exhaustive()
    }
}

/// How many retries may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RetryBudget {
    /// Of the requests of the window.
    pub percent: u32,
    /// Window.
    pub interval: Duration,
    /// So many are always allowed in the window.
    pub min_retries: u32,
}
