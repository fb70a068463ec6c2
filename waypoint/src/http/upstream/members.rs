//! The endpoints of a cluster as one snapshot has them, and the choice among them.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use http::Version;
use mesh::{
    draw::Draw,
    l7::{
        backend::{BackendPolicy, Balancer, TrafficPolicy},
        balance::{self, Candidate, Chance, Load, Plan},
        served::{AppProtocol, Resolution, ServedService},
        via::Via,
    },
    names::Str,
    outbound::has_waypoint,
    service::{LoadBalancingMode, Service},
    view::Endpoints,
    workload::Workload,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{ClusterKey, cluster::Unavailable, endpoint::EndpointState, outlier, pool::PoolLimits};
use crate::{
    backend::{Endpoint, Tls},
    snapshot::Snapshot,
};

/// Time for a connection to an endpoint where no DestinationRule says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The endpoints of a cluster and how they are reached, as of one snapshot.
#[derive(Debug, Default)]
pub(crate) struct Members {
    pub(super) from: Origin,
    /// None: a workload by its own address.
    pub(crate) service: Option<Arc<Service>>,
    /// The service's port, or the workload's.
    pub(crate) port: u16,
    /// DestinationRule subset.
    pub(crate) subset: Option<Str>,
    /// What the port is declared to speak.
    pub(crate) protocol: AppProtocol,
    /// How endpoints are chosen and connected to.
    pub(crate) policy: TrafficPolicy,
    /// Time for a connection to one.
    pub(crate) connect_timeout: Duration,
    /// How connections to them are used.
    pub(crate) limits: PoolLimits,
    pub(super) endpoints: Vec<Arc<EndpointState>>,
    plan: Plan,
    pub(super) choice: Choice,
    /// Connections of HTTP/1.1 that may be, where they are limited.
    connections: Option<Arc<Semaphore>>,
}

/// How an endpoint is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Choice {
    /// Not at all: the service or its port does not exist.
    #[default]
    Unknown,
    /// Among those that are known.
    Known,
    /// The address that the client dialled.
    Dialled,
    /// The name that the request is for, within the service's wildcard.
    Named,
    /// Its own waypoint's to make; among those that are known for what is the waypoint's own.
    Beyond,
}

/// What a choice depends on.
pub(crate) struct Wanted<'a> {
    /// These are avoided.
    pub(crate) tried: &'a [Arc<EndpointState>],
    /// Of the request, where endpoints are chosen by one.
    pub(crate) hash: Option<u64>,
    /// The endpoint of the client's session.
    pub(crate) session: Option<&'a str>,
    /// The address that the client dialled.
    pub(crate) destination: SocketAddr,
    /// The host of the request.
    pub(crate) host: Option<&'a str>,
    /// The way that the client's request has come by; none: it is the waypoint's own.
    pub(crate) via: Option<&'a Via>,
    /// What is sent there.
    pub(crate) carries: Carries,
    /// Chance.
    pub(crate) draw: Draw,
}

/// What is sent to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carries {
    /// A request that shares a connection.
    Shared,
    /// A request that has a connection of its own.
    Alone,
    /// Bytes: a whole connection.
    Bytes,
}

impl Carries {
    /// A request of this version.
    pub(crate) fn request(version: Version) -> Self {
        match version {
            Version::HTTP_2 => Self::Shared,
            _ => Self::Alone,
        }
    }
}

/// What members were made of; made again when one of it is another.
#[derive(Debug, Default)]
pub(super) struct Origin {
    endpoints: Option<Arc<Endpoints>>,
    service: Option<Arc<Service>>,
    served: Option<Arc<ServedService>>,
    backend: Option<Arc<BackendPolicy>>,
    workload: Option<Arc<Workload>>,
    /// The version of all labels, where endpoints are told apart by theirs.
    labels: Option<u64>,
}

impl Origin {
    pub(super) fn of(key: &ClusterKey, snapshot: &Snapshot) -> Self {
        match key {
            ClusterKey::Service { service, .. } => {
                let backend = snapshot.l7.backend(service).cloned();
                let by_labels = backend.as_ref().is_some_and(|it| it.asks_labels());
                Self {
                    endpoints: Some(snapshot.mesh.endpoints(service)),
                    service: snapshot.mesh.service(service).cloned(),
                    served: snapshot.l7.service(service).cloned(),
                    backend,
                    workload: None,
                    labels: by_labels.then(|| snapshot.l7.labels_version()),
                }
            }
            ClusterKey::Workload { uid, .. } => Self {
                workload: snapshot.mesh.workload(uid).cloned(),
                ..Self::default()
            },
        }
    }

    pub(super) fn same(&self, other: &Self) -> bool {
        fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
            match (one, other) {
                (Some(one), Some(other)) => Arc::ptr_eq(one, other),
                (None, None) => true,
                _ => false,
            }
        }
        same(self.endpoints.as_ref(), other.endpoints.as_ref())
            && same(self.service.as_ref(), other.service.as_ref())
            && same(self.served.as_ref(), other.served.as_ref())
            && same(self.backend.as_ref(), other.backend.as_ref())
            && same(self.workload.as_ref(), other.workload.as_ref())
            && self.labels == other.labels
    }
}

impl Members {
    pub(super) fn new(key: &ClusterKey, snapshot: &Snapshot, from: Origin, before: &Self) -> Self {
        let mut members = match key {
            ClusterKey::Service { port, subset, .. } => Self {
                service: from.service.clone(),
                port: *port,
                subset: subset.clone(),
                protocol: declared(&from, *port),
                policy: policy(&from, *port, subset.as_ref()),
                ..Self::default()
            },
            ClusterKey::Workload { port, .. } => Self {
                port: *port,
                ..Self::default()
            },
        };
        members.choice = choice(&from, &members);
        members.limits = limits(&members.policy);
        members.connect_timeout = members
            .policy
            .pool
            .connect_timeout
            .unwrap_or(CONNECT_TIMEOUT);
        let connections = members.policy.pool.max_connections;
        members.connections = connections.map(|it| Arc::new(Semaphore::new(it as usize)));
        let resolved = members.resolve(&from, snapshot, before);
        members.plan = members.plan(snapshot, &resolved);
        members.endpoints = resolved.into_iter().map(|(state, _)| state).collect();
        members.from = from;
        members
    }

    /// The endpoints of which one is chosen, each with its record as it is now. Those that stay are the same as before;
    /// what they were made from is not: whether an endpoint is healthy, or how far, is its record's to say.
    fn resolve(
        &self,
        from: &Origin,
        snapshot: &Snapshot,
        before: &Self,
    ) -> Vec<(Arc<EndpointState>, Arc<Workload>)> {
        // What was connected in another way must not be used on: it may be plaintext where TLS is asked for now.
        let stay = before.endpoints.iter().filter(|_| self.connects_as(before));
        let known: HashMap<_, _> = stay
            .filter_map(|it| Some((&it.workload()?.uid, it)))
            .collect();
        let state = |workload: &Arc<Workload>, port: u16| {
            let known = known.get(&workload.uid);
            let state = match known.filter(|it| it.serves(workload, port)) {
                Some(known) => Arc::clone(known),
                None => Arc::new(EndpointState::new(Endpoint::Workload {
                    workload: Arc::clone(workload),
                    port,
                })),
            };
            (state, Arc::clone(workload))
        };
        if let Some(workload) = &from.workload {
            return vec![state(workload, self.port)];
        }
        let (Some(service), Some(endpoints)) = (&from.service, &from.endpoints) else {
            return Vec::new();
        };
        let subset = self.subset.as_ref().map(|name| {
            let backend = from.backend.as_ref();
            backend.and_then(|it| it.subsets.get(name))
        });
        let chosen = |workload: &Workload| match subset {
            None => true,
            // A subset that no DestinationRule names has no endpoints.
            Some(None) => false,
            Some(Some(subset)) => {
                let labels = snapshot.l7.labels(&workload.uid).map(Arc::as_ref);
                balance::has_labels(labels, &subset.labels)
            }
        };
        let found = endpoints.iter().filter_map(|endpoint| {
            let own = endpoint.ports().get(&self.port).filter(|it| **it > 0);
            let target = service.ports.get(&self.port).filter(|it| **it > 0);
            let port = own.or(target).copied()?;
            chosen(&endpoint.workload).then(|| state(&endpoint.workload, port))
        });
        found.collect()
    }

    /// Whether connections made for `other` are as those made now.
    pub(super) fn connects_as(&self, other: &Self) -> bool {
        let (now, then) = (&self.policy, &other.policy);
        now.tls == then.tls
            && now.proxy_protocol == then.proxy_protocol
            && now.pool.keepalive == then.pool.keepalive
            && now.pool.http2_keepalive == then.pool.http2_keepalive
    }

    fn plan(&self, snapshot: &Snapshot, resolved: &[(Arc<EndpointState>, Arc<Workload>)]) -> Plan {
        let candidates: Vec<_> = resolved
            .iter()
            .map(|(_, workload)| candidate(workload, snapshot))
            .collect();
        Plan::new(
            self.service.as_deref(),
            &self.policy,
            candidate(&snapshot.own, snapshot),
            &candidates,
        )
    }

    /// Requests at once: as the policy says, and no more than there are connections and places to wait for one.
    pub(super) fn most(&self, carries: Carries) -> u32 {
        let pool = &self.policy.pool;
        let requests = pool.max_requests.unwrap_or(u32::MAX);
        let waiting = pool.max_pending_requests.unwrap_or(u32::MAX);
        let connections = pool.max_connections.unwrap_or(u32::MAX);
        match carries {
            Carries::Shared => requests,
            Carries::Alone => requests.min(connections.saturating_add(waiting)),
            Carries::Bytes => connections,
        }
    }

    /// Waits for one of the connections of HTTP/1.1, where they are limited.
    pub(crate) async fn connection(&self) -> Option<OwnedSemaphorePermit> {
        let connections = Arc::clone(self.connections.as_ref()?);
        // Never closed.
        connections.acquire_owned().await.ok()
    }

    /// The session's endpoint if it is still there, else one of the plan.
    pub(super) fn pick(
        &self,
        wanted: &Wanted<'_>,
        turn: u64,
        now: Duration,
    ) -> Result<Arc<EndpointState>, Unavailable> {
        let tried =
            |it: &Arc<EndpointState>| wanted.tried.iter().any(|tried| Arc::ptr_eq(tried, it));
        if let Some(session) = wanted.session
            && let Some(endpoint) = self.of_session(session)
            && !tried(endpoint)
        {
            return Ok(Arc::clone(endpoint));
        }
        let chance = Chance {
            hash: wanted.hash,
            draw: wanted.draw,
            turn,
        };
        let outlier = self.policy.outlier.as_ref();
        let ignored = outlier.is_none_or(|policy| {
            policy.min_health_percent > 0
                && outlier::panics(policy, self.ejected(now), self.endpoints.len())
        });
        let load = |at: usize, usable: bool| Load {
            usable,
            active: self.endpoints[at].active(),
            age: self.policy.warmup.map(|_| self.endpoints[at].age()),
        };
        let healthy = |at: usize| ignored || !self.endpoints[at].health.lock().is_ejected(now);
        let plan = &self.plan;
        let fresh = |at| load(at, healthy(at) && !tried(&self.endpoints[at]));
        // Better one that was tried or failed before than none.
        let picked = plan.pick(chance, fresh);
        let picked = picked.or_else(|| plan.pick(chance, |at| load(at, healthy(at))));
        let picked = picked.or_else(|| plan.pick(chance, |at| load(at, true)));
        let at = picked.ok_or(Unavailable::NoEndpoint)?;
        Ok(Arc::clone(&self.endpoints[at]))
    }

    /// The endpoint that a session's token names, if it may be used.
    pub(crate) fn of_session(&self, token: &str) -> Option<&Arc<EndpointState>> {
        let service = self.service.as_ref()?;
        let mut usable = self.plan.members().map(|at| &self.endpoints[at]);
        usable.find(|it| it.token(service) == token)
    }

    /// The host of a request, if it is within the service's wildcard.
    pub(super) fn name(&self, host: &str) -> Option<Str> {
        let pattern = &self.service.as_ref()?.hostname;
        let suffix = pattern.strip_prefix('*').unwrap_or(pattern);
        let host = host.to_ascii_lowercase();
        let within = match pattern.starts_with('*') {
            true => host.len() > suffix.len() && host.ends_with(suffix),
            false => host == suffix,
        };
        within.then(|| host.into())
    }

    pub(super) fn target_port(&self) -> u16 {
        let target = self
            .service
            .as_ref()
            .and_then(|it| it.ports.get(&self.port));
        target.copied().filter(|it| *it > 0).unwrap_or(self.port)
    }

    /// TLS with the application, where it is asked for. The name that is asked for is the service's: connections are
    /// shared by requests for any host.
    pub(super) fn tls(&self, version: Version) -> Option<Tls<'_>> {
        const HTTP1: &[&[u8]] = &[b"http/1.1"];
        const HTTP2: &[&[u8]] = &[b"h2"];
        let settings = self.policy.tls.as_ref()?;
        Some(Tls {
            settings,
            host: self.service.as_ref().map_or("", |it| &it.hostname),
            alpn: match version {
                Version::HTTP_2 => HTTP2,
                _ => HTTP1,
            },
        })
    }

    pub(super) fn ejected(&self, now: Duration) -> usize {
        let ejected = |it: &&Arc<EndpointState>| it.health.lock().is_ejected(now);
        self.endpoints.iter().filter(ejected).count()
    }
}

fn candidate<'a>(workload: &'a Workload, snapshot: &'a Snapshot) -> Candidate<'a> {
    Candidate {
        workload,
        labels: snapshot.l7.labels(&workload.uid).map(Arc::as_ref),
    }
}

fn choice(from: &Origin, members: &Members) -> Choice {
    let Some(service) = &from.service else {
        return match from.workload {
            Some(_) => Choice::Known,
            None => Choice::Unknown,
        };
    };
    if !service.ports.contains_key(&members.port) {
        return Choice::Unknown;
    }
    let is_ours = from.served.as_ref().is_some_and(|it| it.bound);
    if !is_ours && has_waypoint(service) {
        return Choice::Beyond;
    }
    let resolution = from.served.as_ref().map(|it| it.resolution);
    let passes = service.load_balancing.mode == LoadBalancingMode::Passthrough
        || members.policy.balancer == Balancer::Passthrough;
    match resolution {
        Some(Resolution::DynamicDns) => Choice::Named,
        Some(Resolution::None) => Choice::Dialled,
        _ if passes => Choice::Dialled,
        _ => Choice::Known,
    }
}

fn declared(from: &Origin, port: u16) -> AppProtocol {
    let served = from.served.as_ref();
    served
        .and_then(|it| it.ports.get(&port).copied())
        .unwrap_or_default()
}

/// The port's policy in place of the service's, the subset's over both.
fn policy(from: &Origin, port: u16, subset: Option<&Str>) -> TrafficPolicy {
    let Some(backend) = &from.backend else {
        return TrafficPolicy::default();
    };
    let subset = subset.and_then(|it| backend.subsets.get(it));
    let own = subset.and_then(|it| it.ports.get(&port).or(it.policy.as_ref()));
    let service = || backend.ports.get(&port).unwrap_or(&backend.policy);
    own.unwrap_or_else(service).clone()
}

fn limits(policy: &TrafficPolicy) -> PoolLimits {
    let pool = &policy.pool;
    let default = PoolLimits::default();
    PoolLimits {
        idle_timeout: pool.http_idle_timeout.unwrap_or(default.idle_timeout),
        max_requests: match policy.proxy_protocol {
            // The connection names one client.
            Some(_) => Some(1),
            None => pool.max_requests_per_connection.filter(|it| *it > 0),
        },
        max_streams: pool.max_concurrent_streams.filter(|it| *it > 0),
        pings: pool.http2_keepalive.unwrap_or(default.pings),
    }
}
