//! The endpoints of one service's port, and what requests to them share: limits, load, health.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;

use super::{
    ClusterKey, Permit,
    budget::{self, Budget},
    endpoint::EndpointState,
    members::{Choice, Members, Origin, Wanted},
    outlier::{self, Verdict},
};
use crate::{backend::Endpoint, snapshot::Snapshot};

/// Endpoints by address or host that are remembered.
const MAX_ELSEWHERE: usize = 1024;
/// How long a cluster that nothing uses is remembered.
const FORGET: Duration = Duration::from_secs(600);

/// One cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    key: ClusterKey,
    began: Instant,
    active: AtomicU32,
    retries: AtomicU32,
    turn: AtomicU64,
    budget: Mutex<Budget>,
    /// Endpoints that no service names: by address or by host.
    elsewhere: Mutex<Vec<Arc<EndpointState>>>,
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

impl Cluster {
    pub(super) fn new(key: ClusterKey) -> Self {
        Self {
            key,
            began: Instant::now(),
            active: AtomicU32::new(0),
            retries: AtomicU32::new(0),
            turn: AtomicU64::new(0),
            budget: Mutex::default(),
            elsewhere: Mutex::default(),
            members: RwLock::default(),
            used: Mutex::new(Instant::now()),
        }
    }

    /// Its endpoints as `snapshot` has them. Endpoints that stay keep their connections, load and health.
    pub(crate) fn members(&self, snapshot: &Snapshot) -> Arc<Members> {
        let from = Origin::of(&self.key, snapshot);
        let before = Arc::clone(&self.members.read());
        if before.choice != Choice::Unknown && before.from.same(&from) {
            return before;
        }
        let members = Arc::new(Members::new(&self.key, snapshot, from, &before));
        if !members.connects_as(&before) {
            self.elsewhere.lock().clear();
        }
        *self.members.write() = Arc::clone(&members);
        members
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Chooses an endpoint that was not tried, if there is another, and counts a request to it.
    ///
    /// # Errors
    /// If there is none, or too many requests are there already.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        members: &Members,
        wanted: &Wanted<'_>,
    ) -> Result<Permit, Unavailable> {
        let most = members.most(wanted.carries);
        if self.active.fetch_add(1, Ordering::AcqRel) >= most {
            self.release();
            return Err(Unavailable::Overflow);
        }
        match self.choose(members, wanted) {
            Ok(endpoint) => Ok(Permit::new(Arc::clone(self), endpoint)),
            Err(unavailable) => {
                self.release();
                Err(unavailable)
            }
        }
    }

    fn choose(
        &self,
        members: &Members,
        wanted: &Wanted<'_>,
    ) -> Result<Arc<EndpointState>, Unavailable> {
        match members.choice {
            Choice::Unknown => Err(Unavailable::Unknown),
            Choice::Known => self.pick(members, wanted),
            Choice::Beyond => match wanted.via {
                None => self.pick(members, wanted),
                Some(via) => Ok(self.elsewhere(Endpoint::Waypoint {
                    port: members.port,
                    subset: members.subset.clone(),
                    via: via.clone(),
                })),
            },
            Choice::Dialled => Ok(self.elsewhere(Endpoint::Address(wanted.destination))),
            Choice::Named => {
                let host = wanted.host.ok_or(Unavailable::Unknown)?;
                let name = members.name(host).ok_or(Unavailable::Unknown)?;
                let port = members.target_port();
                Ok(self.elsewhere(Endpoint::Hostname { name, port }))
            }
        }
    }

    fn pick(
        &self,
        members: &Members,
        wanted: &Wanted<'_>,
    ) -> Result<Arc<EndpointState>, Unavailable> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        members.pick(wanted, turn, self.now())
    }

    /// What is known of an endpoint that no service names. Few are remembered: unused ones make room.
    fn elsewhere(&self, endpoint: Endpoint) -> Arc<EndpointState> {
        let mut known = self.elsewhere.lock();
        if let Some(found) = known.iter().find(|it| it.endpoint == endpoint) {
            return Arc::clone(found);
        }
        if known.len() >= MAX_ELSEWHERE {
            known.retain(|it| !it.is_unused());
            known.truncate(MAX_ELSEWHERE - 1);
        }
        let state = Arc::new(EndpointState::new(endpoint));
        known.push(Arc::clone(&state));
        state
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
                endpoint = ?endpoint.endpoint,
                "an endpoint that failed in a row is passed over"
            );
        }
    }

    /// Closes idle connections. True: nothing uses it any more.
    pub(super) fn sweep(&self, all_idle: bool) -> bool {
        let members = Arc::clone(&self.members.read());
        let mut limits = members.limits;
        if all_idle {
            limits.idle_timeout = Duration::ZERO;
        }
        for endpoint in &members.endpoints {
            endpoint.sweep(limits);
        }
        let elsewhere = self.elsewhere.lock().clone();
        elsewhere.iter().for_each(|it| it.sweep(limits));
        let mut all = members.endpoints.iter().chain(&elsewhere);
        let unused = all.all(|it| it.is_unused());
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
