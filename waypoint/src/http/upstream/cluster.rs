//! The endpoints of one service's port, and what requests to them share: limits, load, health.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use http::Version;
use mesh::{
    draw::Draw,
    l7::{
        backend::{BackendPolicy, TrafficPolicy},
        served::{AppProtocol, ServedService},
    },
    names::Str,
    service::Service,
    view::Endpoints,
    workload::Workload,
};
use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;

use super::{
    ClusterKey, Permit,
    budget::{self, Budget},
    endpoint::EndpointState,
    outlier::{self, Verdict},
    pool::PoolLimits,
};
use crate::{backend::Tls, snapshot::Snapshot};

/// Time for a connection to an endpoint where no DestinationRule says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a cluster that nothing uses is remembered.
const FORGET: Duration = Duration::from_secs(600);

/// One cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    key: ClusterKey,
    began: Instant,
    active: AtomicU32,
    retries: AtomicU32,
    budget: Mutex<Budget>,
    members: RwLock<Arc<Members>>,
    used: Mutex<Instant>,
}

/// Why no endpoint is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unavailable {
    /// The service or its port does not exist.
    Unknown,
    /// It has no endpoint that may be used.
    NoEndpoint,
    /// A limit of its connection pool.
    Overflow,
}

/// The endpoints of a cluster and how they are reached, as of one snapshot.
#[derive(Debug, Default)]
pub(crate) struct Members {
    from: Origin,
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
    endpoints: Vec<Arc<EndpointState>>,
    /// Whether the service and its port exist.
    known: bool,
}

/// What members were made of; made again when one of it is another.
#[derive(Debug, Default)]
struct Origin {
    endpoints: Option<Arc<Endpoints>>,
    service: Option<Arc<Service>>,
    served: Option<Arc<ServedService>>,
    backend: Option<Arc<BackendPolicy>>,
    workload: Option<Arc<Workload>>,
}

impl Origin {
    fn of(key: &ClusterKey, snapshot: &Snapshot) -> Self {
        match key {
            ClusterKey::Service { service, .. } => Self {
                endpoints: Some(snapshot.mesh.endpoints(service)),
                service: snapshot.mesh.service(service).cloned(),
                served: snapshot.l7.service(service).cloned(),
                backend: snapshot.l7.backend(service).cloned(),
                workload: None,
            },
            ClusterKey::Workload { uid, .. } => Self {
                workload: snapshot.mesh.workload(uid).cloned(),
                ..Self::default()
            },
        }
    }

    fn same(&self, other: &Self) -> bool {
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
    }
}

impl Cluster {
    pub(super) fn new(key: ClusterKey) -> Self {
        Self {
            key,
            began: Instant::now(),
            active: AtomicU32::new(0),
            retries: AtomicU32::new(0),
            budget: Mutex::default(),
            members: RwLock::default(),
            used: Mutex::new(Instant::now()),
        }
    }

    /// Its endpoints as `snapshot` has them. Endpoints that stay keep their connections, load and health.
    pub(crate) fn members(&self, snapshot: &Snapshot) -> Arc<Members> {
        let from = Origin::of(&self.key, snapshot);
        let before = Arc::clone(&self.members.read());
        if before.known && before.from.same(&from) {
            return before;
        }
        let members = Arc::new(Members::new(&self.key, snapshot, from, &before));
        *self.members.write() = Arc::clone(&members);
        members
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Draws an endpoint that is not among `tried`, if there is another, and counts a request to it.
    ///
    /// # Errors
    /// If there is none, or too many requests are there already.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        members: &Members,
        tried: &[Arc<EndpointState>],
        hash: Option<u64>,
        draw: Draw,
    ) -> Result<Permit, Unavailable> {
        let most = members.policy.pool.max_requests.unwrap_or(u32::MAX);
        if self.active.fetch_add(1, Ordering::AcqRel) >= most {
            self.release();
            return Err(Unavailable::Overflow);
        }
        match members.pick(tried, hash, draw, self.now()) {
            Ok(endpoint) => Ok(Permit::new(Arc::clone(self), endpoint)),
            Err(unavailable) => {
                self.release();
                Err(unavailable)
            }
        }
    }

    pub(super) fn release(&self) {
        if self.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            *self.used.lock() = Instant::now();
        }
    }

    /// Counts a request, of which retries may be a share.
    pub(crate) fn requested(&self, members: &Members) {
        let policy = members.policy.retry_budget.unwrap_or(budget::DEFAULT);
        self.budget.lock().request(&policy, self.now());
    }

    /// Whether a retry is left, which is then counted.
    pub(crate) fn may_retry(&self, members: &Members) -> bool {
        let most = members.policy.pool.max_retries.unwrap_or(u32::MAX);
        if self.retries.load(Ordering::Relaxed) >= most {
            return false;
        }
        let policy = members.policy.retry_budget.unwrap_or(budget::DEFAULT);
        self.budget.lock().retry(&policy, self.now())
    }

    /// Counts a retry that is underway, until it is dropped.
    pub(crate) fn retrying(self: &Arc<Self>) -> Retrying {
        self.retries.fetch_add(1, Ordering::Relaxed);
        Retrying(Arc::clone(self))
    }

    /// What a request that is over says of an endpoint.
    pub(super) fn report(&self, endpoint: &EndpointState, verdict: Verdict) {
        let members = Arc::clone(&self.members.read());
        let Some(policy) = &members.policy.outlier else {
            return;
        };
        let now = self.now();
        let mut health = endpoint.health.lock();
        if health.is_ejected(now) || !health.judge(policy, verdict) {
            return;
        }
        drop(health);
        let ejected = members.ejected(now);
        if outlier::may_eject(policy, ejected, members.endpoints.len()) {
            endpoint.health.lock().eject(policy, now);
            tracing::info!(
                endpoint = %endpoint.workload.uid,
                port = endpoint.port,
                "an endpoint that failed in a row is passed over"
            );
        }
    }

    /// Closes idle connections. True: nothing uses it any more.
    pub(super) fn sweep(&self) -> bool {
        let members = Arc::clone(&self.members.read());
        for endpoint in &members.endpoints {
            endpoint.sweep(members.limits);
        }
        let unused = members.endpoints.iter().all(|it| it.is_unused());
        let forgotten = self.used.lock().elapsed() > FORGET;
        forgotten && unused && self.active.load(Ordering::Acquire) == 0
    }
}

/// A retry that is underway.
#[derive(Debug)]
pub(crate) struct Retrying(Arc<Cluster>);

impl Drop for Retrying {
    fn drop(&mut self) {
        self.0.retries.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Members {
    fn new(key: &ClusterKey, snapshot: &Snapshot, from: Origin, before: &Self) -> Self {
        let mut members = match key {
            ClusterKey::Service { port, subset, .. } => Self {
                known: from
                    .service
                    .as_ref()
                    .is_some_and(|it| it.ports.contains_key(port)),
                service: from.service.clone(),
                port: *port,
                subset: subset.clone(),
                protocol: declared(&from, *port),
                policy: policy(&from, *port, subset.as_ref()),
                ..Self::default()
            },
            ClusterKey::Workload { port, .. } => Self {
                known: from.workload.is_some(),
                port: *port,
                ..Self::default()
            },
        };
        members.limits = limits(&members.policy);
        members.connect_timeout = members
            .policy
            .pool
            .connect_timeout
            .unwrap_or(CONNECT_TIMEOUT);
        members.endpoints = members.resolve(&from, snapshot, before);
        members.from = from;
        members
    }

    /// The endpoints of which one is chosen.
    fn resolve(
        &self,
        from: &Origin,
        snapshot: &Snapshot,
        before: &Self,
    ) -> Vec<Arc<EndpointState>> {
        let state = |workload: &Arc<Workload>, port: u16| {
            let known = before.endpoints.iter().find(|it| it.serves(workload, port));
            match known {
                Some(known) => Arc::clone(known),
                None => Arc::new(EndpointState::new(Arc::clone(workload), port)),
            }
        };
        if let Some(workload) = &from.workload {
            return vec![state(workload, self.port)];
        }
        let (Some(service), Some(endpoints)) = (&from.service, &from.endpoints) else {
            return Vec::new();
        };
        let _ = snapshot;
        let found = endpoints.iter().filter_map(|endpoint| {
            let own = endpoint.ports().get(&self.port).filter(|it| **it > 0);
            let target = service.ports.get(&self.port).filter(|it| **it > 0);
            let port = own.or(target).copied()?;
            Some(state(&endpoint.workload, port))
        });
        found.collect()
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

    fn ejected(&self, now: Duration) -> usize {
        let ejected = |it: &&Arc<EndpointState>| it.health.lock().is_ejected(now);
        self.endpoints.iter().filter(ejected).count()
    }

    /// The less loaded of two that were drawn.
    fn pick(
        &self,
        tried: &[Arc<EndpointState>],
        hash: Option<u64>,
        draw: Draw,
        now: Duration,
    ) -> Result<Arc<EndpointState>, Unavailable> {
        if !self.known {
            return Err(Unavailable::Unknown);
        }
        let _ = hash;
        let known = |it: &Arc<EndpointState>| tried.iter().any(|tried| Arc::ptr_eq(tried, it));
        let usable: Vec<_> = self
            .endpoints
            .iter()
            .filter(|it| !known(it) && !it.health.lock().is_ejected(now))
            .collect();
        let usable = match usable.is_empty() {
            true => self.endpoints.iter().collect(),
            false => usable,
        };
        let weights: Vec<_> = usable.iter().map(|it| it.workload.capacity).collect();
        let (one, two) = draw.split();
        let first = one.weighted(&weights).ok_or(Unavailable::NoEndpoint)?;
        let second = two.weighted(&weights).unwrap_or(first);
        let less = match usable[second].active() < usable[first].active() {
            true => second,
            false => first,
        };
        Ok(Arc::clone(usable[less]))
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
        max_requests: pool.max_requests_per_connection.filter(|it| *it > 0),
        max_streams: pool.max_concurrent_streams.filter(|it| *it > 0),
    }
}
