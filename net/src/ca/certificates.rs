//! The certificates of this node, each watched over by a task of its own until it is forgotten.

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh::identity::Identity;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
    time::{Instant, sleep, timeout_at},
};

use super::{
    IssueError, Issuer,
    queue::{Place, Queue},
};
use crate::{clock::Clock, tls::WorkloadCertificate};

/// How urgent a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A renewal: the old one is still good.
    Background,
    /// No connection waits yet.
    Warmup,
    /// A connection waits.
    RealTime,
}

/// How certificates are kept.
#[derive(Clone, Debug)]
pub struct CertificatesConfig {
    /// Requests to the CA at one time.
    pub parallel: usize,
    /// Identities kept at most; more are refused.
    pub max_identities: usize,
    /// How long a caller waits for its certificate.
    pub wait_deadline: Duration,
    /// For how long, from the first request for an identity, callers wait through refusals: the CA may not yet know of
    /// a pod that has just been made.
    pub patience: Duration,
    /// How renewals that fail are tried again: what there is still serves.
    pub renewing: Backoff,
    /// How it is tried again where there is nothing that serves.
    pub lacking: Backoff,
}

/// Pauses between attempts.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// After a first failure; doubled by each further one, and varied by a fifth either way.
    pub first: Duration,
    /// The longest.
    pub longest: Duration,
}

impl Default for CertificatesConfig {
    fn default() -> Self {
        Self {
            parallel: 8,
            max_identities: 10_000,
            wait_deadline: Duration::from_secs(10),
            patience: Duration::from_secs(5),
            renewing: Backoff {
                first: Duration::from_secs(1),
                longest: Duration::from_secs(150),
            },
            lacking: Backoff {
                first: Duration::from_millis(100),
                longest: Duration::from_secs(15),
            },
        }
    }
}

/// Where an identity's certificate stands. Displayed as `config_dump` wants it.
#[derive(Clone, Debug)]
pub enum CertificateState {
    /// Asked for, no answer yet.
    Initializing,
    /// Valid when it was published; it stays here while renewals fail, until it expires.
    Available(Arc<WorkloadCertificate>),
    /// There is none, and why.
    Unavailable(Arc<IssueError>),
}

impl fmt::Display for CertificateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Initializing => f.write_str("Initializing"),
            Self::Available(_) => f.write_str("Available"),
            Self::Unavailable(error) => write!(f, "Unavailable: {error}"),
        }
    }
}

/// Why a caller gets no certificate.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// The CA did not give one.
    #[error("no certificate for {identity}")]
    Issue {
        /// For whom.
        identity: Identity,
        /// Why.
        source: Arc<IssueError>,
    },
    /// It did not come in time.
    #[error("no certificate for {identity} within {after:?}")]
    Late {
        /// For whom.
        identity: Identity,
        /// The deadline.
        after: Duration,
    },
    /// The identity's last workload left this node meanwhile.
    #[error("{0} is no longer wanted")]
    Forgotten(Identity),
    /// The node has more identities than it may.
    #[error("no certificate for {identity}: {limit} identities are kept already")]
    TooMany {
        /// For whom.
        identity: Identity,
        /// [`CertificatesConfig::max_identities`].
        limit: usize,
    },
}

/// The certificates of this node. Cheap to clone; when the last clone is gone, the tasks end.
#[derive(Clone)]
pub struct Certificates(Arc<Shared>);

struct Shared {
    issuer: Arc<dyn Issuer>,
    clock: Arc<dyn Clock>,
    config: CertificatesConfig,
    queue: Arc<Queue>,
    entries: Mutex<HashMap<Identity, Entry>>,
}

struct Entry {
    state: watch::Receiver<CertificateState>,
    first_asked: Instant,
    place: Arc<Place>,
    renew: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The longest sleep between looks at the time of day, which may jump.
const LOOK: Duration = Duration::from_secs(30);

impl Certificates {
    /// Keeps none yet. Must be used inside a tokio runtime: each identity has a task there.
    pub fn new(issuer: Arc<dyn Issuer>, clock: Arc<dyn Clock>, config: CertificatesConfig) -> Self {
        let queue = Queue::new(config.parallel);
        Self(Arc::new(Shared {
            issuer,
            clock,
            config,
            queue,
            entries: Mutex::default(),
        }))
    }

    /// The identity's certificate, asked for where there is none.
    ///
    /// Callers share one request. Where the last attempt failed they fail at once, with its error, until a later one
    /// succeeds, but for an identity that is new ([`CertificatesConfig::patience`]). Waits at most
    /// [`CertificatesConfig::wait_deadline`]. Cancelling leaves the request under way.
    pub async fn fetch(
        &self,
        identity: &Identity,
        priority: Priority,
    ) -> Result<Arc<WorkloadCertificate>, FetchError> {
        let (mut state, first_asked) = self.enter(identity, priority)?;
        let after = self.0.config.wait_deadline;
        let deadline = Instant::now() + after;
        let clock = &self.0.clock;
        let valid = |state: &CertificateState| match state {
            CertificateState::Available(certificate) => clock.wall() < certificate.not_after(),
            CertificateState::Initializing | CertificateState::Unavailable(_) => false,
        };
        let patient_until = deadline.min(first_asked + self.0.config.patience);
        // Whether it came is found out below.
        let _ = timeout_at(patient_until, state.wait_for(valid)).await;
        let settled = state.wait_for(|state| match state {
            CertificateState::Unavailable(_) => true,
            other => valid(other),
        });
        let identity = identity.clone();
        match timeout_at(deadline, settled).await {
            Err(_) => Err(FetchError::Late { identity, after }),
            Ok(Err(_)) => Err(FetchError::Forgotten(identity)),
            Ok(Ok(state)) => match &*state {
                CertificateState::Available(certificate) => Ok(Arc::clone(certificate)),
                CertificateState::Unavailable(source) => Err(FetchError::Issue {
                    identity,
                    source: Arc::clone(source),
                }),
                CertificateState::Initializing => Err(FetchError::Late { identity, after }),
            },
        }
    }

    /// Asks for the identity's certificate before anyone needs it. Beyond the limit it does nothing.
    pub fn prefetch(&self, identity: &Identity) {
        if let Err(error) = self.enter(identity, Priority::Warmup) {
            tracing::warn!(%error, "not prefetched");
        }
    }

    /// Follows the identity's certificate, renewals included. `None` where it is not kept.
    pub fn watch(&self, identity: &Identity) -> Option<watch::Receiver<CertificateState>> {
        let entries = self.0.entries.lock();
        entries.get(identity).map(|entry| entry.state.clone())
    }

    /// The identity's certificate, if there is one that is valid now. Never waits, never asks.
    pub fn current(&self, identity: &Identity) -> Option<Arc<WorkloadCertificate>> {
        let entries = self.0.entries.lock();
        match &*entries.get(identity)?.state.borrow() {
            CertificateState::Available(certificate)
                if self.0.clock.wall() < certificate.not_after() =>
            {
                Some(Arc::clone(certificate))
            }
            _ => None,
        }
    }

    /// Drops the identity's certificate and its key: its last workload left the node.
    pub fn forget(&self, identity: &Identity) {
        self.0.entries.lock().remove(identity);
    }

    /// Renews everything now, in the background: the CA's roots have changed.
    pub fn renew_all(&self) {
        for entry in self.0.entries.lock().values() {
            entry.renew.notify_one();
        }
    }

    /// Renews everything whenever the CA's root in this file changes, forever.
    ///
    /// New roots of the control plane mean new roots of the mesh: certificates carry the roots that peers are checked
    /// with, and tunnels are pooled by certificate, so renewing moves both without waiting for half of a lifetime.
    pub async fn follow_root(self, path: PathBuf) {
        const LOOK: Duration = Duration::from_secs(5);
        let mut known = tokio::fs::read(&path).await.ok();
        loop {
            tokio::time::sleep(LOOK).await;
            // A file that is gone for a moment, as while a volume is swapped, is no change.
            let Ok(now) = tokio::fs::read(&path).await else {
                continue;
            };
            if known.as_ref().is_some_and(|known| *known != now) {
                tracing::info!(path = %path.display(), "the CA's root has changed: renewing all certificates");
                self.renew_all();
            }
            known = Some(now);
        }
    }

    /// Where every identity stands, sorted, for `config_dump`.
    pub fn states(&self) -> Vec<(Identity, CertificateState)> {
        let entries = self.0.entries.lock();
        let state = |entry: &Entry| entry.state.borrow().clone();
        let mut states: Vec<_> = entries.iter().map(|(i, e)| (i.clone(), state(e))).collect();
        drop(entries);
        states.sort_by(|(a, _), (b, _)| a.cmp(b));
        states
    }

    fn enter(
        &self,
        identity: &Identity,
        priority: Priority,
    ) -> Result<(watch::Receiver<CertificateState>, Instant), FetchError> {
        let mut entries = self.0.entries.lock();
        if let Some(entry) = entries.get(identity) {
            entry.place.raise(priority);
            if self.expired(&entry.state.borrow()) {
                // The machine was suspended; the task has not looked at the time yet.
                entry.renew.notify_one();
            }
            return Ok((entry.state.clone(), entry.first_asked));
        }
        let limit = self.0.config.max_identities;
        if entries.len() >= limit {
            let identity = identity.clone();
            return Err(FetchError::TooMany { identity, limit });
        }
        let (publish, state) = watch::channel(CertificateState::Initializing);
        let keeper = Keeper {
            identity: identity.clone(),
            issuer: Arc::clone(&self.0.issuer),
            clock: Arc::clone(&self.0.clock),
            config: self.0.config.clone(),
            queue: Arc::clone(&self.0.queue),
            place: Place::new(priority),
            renew: Arc::new(Notify::new()),
            publish,
        };
        let first_asked = Instant::now();
        let entry = Entry {
            state: state.clone(),
            first_asked,
            place: Arc::clone(&keeper.place),
            renew: Arc::clone(&keeper.renew),
            task: tokio::spawn(keeper.run()).abort_handle(),
        };
        entries.insert(identity.clone(), entry);
        Ok((state, first_asked))
    }

    fn expired(&self, state: &CertificateState) -> bool {
        matches!(state, CertificateState::Available(c) if self.0.clock.wall() >= c.not_after())
    }
}

/// Keeps one identity's certificate fresh.
struct Keeper {
    identity: Identity,
    issuer: Arc<dyn Issuer>,
    clock: Arc<dyn Clock>,
    config: CertificatesConfig,
    queue: Arc<Queue>,
    place: Arc<Place>,
    renew: Arc<Notify>,
    publish: watch::Sender<CertificateState>,
}

impl Keeper {
    async fn run(self) {
        let mut failures = 0;
        loop {
            let turn = self.queue.enter(&self.place).await;
            let issued = self.issuer.issue(self.identity.clone()).await;
            drop(turn);
            self.place.lower(Priority::Background);
            let next = match issued.and_then(|certificate| self.accept(certificate)) {
                Ok(renewal) => {
                    failures = 0;
                    renewal
                }
                Err(error) => {
                    failures += 1;
                    self.failed(error, failures)
                }
            };
            self.wait_until(next).await;
        }
    }

    /// Publishes what is valid; answers when to renew it.
    fn accept(&self, certificate: WorkloadCertificate) -> Result<SystemTime, Arc<IssueError>> {
        let renewal = self
            .renewal(&certificate, rand::random())
            .ok_or(IssueError::NotValidNow)?;
        self.publish(certificate);
        Ok(renewal)
    }

    fn publish(&self, certificate: WorkloadCertificate) {
        tracing::debug!(identity = %self.identity, "certificate obtained");
        let state = CertificateState::Available(Arc::new(certificate));
        self.publish.send_replace(state);
    }

    /// At half of its life, varied by a twentieth of it either way, so that a fleet does not renew at once. `draw` is
    /// the chance, even over `u32`.
    fn renewal(&self, certificate: &WorkloadCertificate, draw: u32) -> Option<SystemTime> {
        let life = certificate
            .not_after()
            .duration_since(certificate.not_before())
            .ok()?;
        let fraction = 0.45 + 0.1 * f64::from(draw) / f64::from(u32::MAX);
        let planned = certificate.not_before() + life.mul_f64(fraction);
        let now = self.clock.wall();
        if planned > now {
            return Some(planned);
        }
        // It came late in its life: half of what is left, and never at once.
        let left = certificate.not_after().duration_since(now).ok()?;
        if left.is_zero() {
            return None;
        }
        Some(now + (left / 2).max(self.config.renewing.first))
    }

    /// Keeps what is valid and says why there is nothing otherwise; answers when to try again.
    fn failed(&self, error: Arc<IssueError>, failures: u32) -> SystemTime {
        let now = self.clock.wall();
        let expiry = self.valid_until().filter(|expiry| now < *expiry);
        let backoff = match expiry {
            Some(_) => self.config.renewing,
            None => self.config.lacking,
        };
        let pause = backoff.after(failures, rand::random());
        tracing::warn!(identity = %self.identity, failures, retry_in = ?pause, expires_in = ?expiry.and_then(|it| it.duration_since(now).ok()), error = &error as &dyn std::error::Error, "no certificate from the CA");
        if expiry.is_none() {
            self.publish
                .send_replace(CertificateState::Unavailable(error));
        }
        let retry = now + pause;
        expiry.map_or(retry, |expiry| retry.min(expiry))
    }

    fn valid_until(&self) -> Option<SystemTime> {
        match &*self.publish.borrow() {
            CertificateState::Available(certificate) => Some(certificate.not_after()),
            _ => None,
        }
    }

    /// Sleeps until `at` by the time of day, or until told to renew.
    async fn wait_until(&self, at: SystemTime) {
        loop {
            let Ok(left) = at.duration_since(self.clock.wall()) else {
                return;
            };
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = self.renew.notified() => return,
                () = sleep(left.min(LOOK)) => {}
            }
        }
    }
}

impl Backoff {
    /// The pause after `failures` in a row, at least one: doubled each time, capped, varied by a fifth. `draw` is the
    /// chance, even over `u32`.
    fn after(self, failures: u32, draw: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
        let pause = self.first.saturating_mul(doubled).min(self.longest);
        pause.mul_f64(0.8 + 0.4 * f64::from(draw) / f64::from(u32::MAX))
    }
}
