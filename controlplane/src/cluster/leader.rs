//! Which replica writes: a Lease of coordination.k8s.io, taken and renewed as Kubernetes' own components do it.
//!
//! A holder counts its time from before it asked for the lease, by the monotonic clock, and stops writing
//! [`RENEW_DEADLINE`] after the last renewal that it knows of; others wait [`LEASE`] from when they saw that renewal. A
//! write in flight when the deadline passes has the time between the two to end. (A machine that is suspended longer
//! than that is beyond any lease; what is written is conditional or idempotent for that case.)

#[cfg(test)]
mod tests;

use std::{future::Future, time::Duration};

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        coordination::v1::{Lease, LeaseSpec},
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::watch, time::Instant};

/// For how long a lease holds when it is not renewed (control-plane.md 13).
pub const LEASE: Duration = Duration::from_secs(30);
/// How long after its last renewal a holder goes on writing.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(15);
/// How often a holder renews, and others look.
const RETRY: Duration = Duration::from_millis(7500);
/// After a try that failed.
const SOON: Duration = Duration::from_secs(2);
/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Takes part in the election.
#[derive(Debug)]
pub struct Elector {
    leases: Api<Lease>,
    name: String,
    me: String,
    /// Whose end is the lease's, too.
    owner: Option<(Api<Deployment>, String)>,
    seen: Option<Seen>,
    until: watch::Sender<Option<Instant>>,
}

/// Whether this replica may write. Clones are of the same election.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<Option<Instant>>);

/// A lease as it was found, and since when it has not changed.
#[derive(Debug)]
struct Seen {
    lease: Lease,
    since: Instant,
}

/// What to do about the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// There is none.
    Create,
    /// It is ours.
    Renew,
    /// It is free, or its holder has not renewed it in time.
    Take,
    /// Somebody holds it.
    Wait,
}

/// Why a try failed.
#[derive(Debug, thiserror::Error)]
enum TryError {
    #[error("ask the API server about the lease")]
    Api(#[from] kube::Error),
    #[error("no answer about the lease within {ANSWER:?}")]
    Slow(#[from] tokio::time::error::Elapsed),
}

/// The decision, from the lease (`None`: there is none) and how long it has been seen unchanged.
fn decide(me: &str, lease: Option<&LeaseSpec>, unchanged: Duration) -> Act {
    let Some(lease) = lease else {
        return Act::Create;
    };
    let holder = lease.holder_identity.as_deref().unwrap_or_default();
    let seconds = lease.lease_duration_seconds.unwrap_or_default();
    let duration = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    match holder {
        "" => Act::Take,
        holder if holder == me => Act::Renew,
        _ if unchanged > duration => Act::Take,
        _ => Act::Wait,
    }
}

impl Elector {
    /// For the lease `name`; `me` names this replica and must not be another's.
    pub fn new(client: Client, namespace: &str, name: String, me: String) -> (Self, Leadership) {
        let until = watch::Sender::new(None);
        let leadership = Leadership(until.subscribe());
        let leases = Api::namespaced(client, namespace);
        let elector = Self {
            leases,
            name,
            me,
            owner: None,
            seen: None,
            until,
        };
        (elector, leadership)
    }

    /// With the Deployment of all replicas. When it is deleted, so is the lease: an uninstallation takes the rights of a
    /// replica, too, before it could give the lease back, and the next installation would wait for it to end.
    #[must_use]
    pub fn of_deployment(self, client: Client, namespace: &str, name: String) -> Self {
        Self {
            owner: Some((Api::namespaced(client, namespace), name)),
            ..self
        }
    }

    /// Takes part until `stop` completes; then gives the lease back, if it is ours, so that another takes over at once.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        loop {
            let pause = tokio::select! {
                pause = self.round() => pause,
                () = stop.as_mut() => break,
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.as_mut() => break,
            }
        }
        // Writers stop first.
        let held = self.until.send_replace(None).is_some();
        if held && let Err(error) = self.release().await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the lease was not given back; it ends by itself");
        }
    }

    /// One look, and the pause until the next.
    async fn round(&mut self) -> Duration {
        let before = Instant::now();
        match self.once(before).await {
            Ok(true) => {
                if self
                    .until
                    .send_replace(Some(before + RENEW_DEADLINE))
                    .is_none()
                {
                    tracing::info!(lease = self.name, "this replica writes from now on");
                }
                RETRY
            }
            Ok(false) => {
                if self.until.send_replace(None).is_some() {
                    tracing::warn!(lease = self.name, "another replica writes from now on");
                }
                RETRY.mul_f64(rand::random_range(0.8..=1.0))
            }
            Err(error) => {
                let lost = |until: &mut Option<Instant>| {
                    until.take_if(|until| *until <= Instant::now()).is_some()
                };
                let error = &error as &dyn std::error::Error;
                match self.until.send_if_modified(lost) {
                    true => tracing::warn!(
                        error,
                        "the lease was not renewed in time; nothing is written"
                    ),
                    false => tracing::debug!(error, "the lease could not be looked at"),
                }
                SOON.mul_f64(rand::random_range(0.5..=1.0))
            }
        }
    }

    /// Whether the lease is ours after this look.
    async fn once(&mut self, now: Instant) -> Result<bool, TryError> {
        let found = answer(self.leases.get_opt(&self.name)).await?;
        let unchanged = self.see(found.as_ref(), now);
        let spec = found
            .as_ref()
            .map(|lease| lease.spec.clone().unwrap_or_default());
        let act = decide(&self.me, spec.as_ref(), unchanged);
        let params = PostParams::default();
        let written = match act {
            Act::Wait => return Ok(false),
            Act::Create => {
                let mut lease = self.lease(None, act);
                // Only here: to change the owners of what is there takes the right to delete it, on some clusters.
                lease.metadata.owner_references = self.owners().await;
                answer(self.leases.create(&params, &lease)).await
            }
            // With the version that was read: of two that try, one succeeds.
            Act::Renew | Act::Take => {
                let lease = self.lease(found, act);
                answer(self.leases.replace(&self.name, &params, &lease)).await
            }
        };
        match written {
            Ok(lease) => {
                self.see(Some(&lease), now);
                Ok(true)
            }
            Err(TryError::Api(kube::Error::Api(status))) if status.is_conflict() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The Deployment as the lease's owner; nobody where there is none, or it cannot be asked for: the lease does without.
    async fn owners(&self) -> Option<Vec<OwnerReference>> {
        let (api, name) = self.owner.as_ref()?;
        let found = match answer(api.get_metadata_opt(name)).await {
            Ok(found) => found?,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(deployment = name, error, "the lease has no owner");
                return None;
            }
        };
        Some(vec![OwnerReference {
            api_version: "apps/v1".to_owned(),
            kind: "Deployment".to_owned(),
            name: name.clone(),
            uid: found.metadata.uid?,
            ..OwnerReference::default()
        }])
    }

    /// Notes the lease, and returns for how long it has not changed.
    fn see(&mut self, lease: Option<&Lease>, now: Instant) -> Duration {
        let same = |seen: &&Seen| lease == Some(&seen.lease);
        if let Some(seen) = self.seen.as_ref().filter(same) {
            return now - seen.since;
        }
        self.seen = lease.map(|lease| Seen {
            lease: lease.clone(),
            since: now,
        });
        Duration::ZERO
    }

    /// The lease with us as its holder.
    fn lease(&self, found: Option<Lease>, act: Act) -> Lease {
        let mut lease = found.unwrap_or_default();
        lease.metadata.name = Some(self.name.clone());
        let spec = lease.spec.get_or_insert_default();
        let now = MicroTime(Timestamp::now());
        if act != Act::Renew {
            spec.acquire_time = Some(now.clone());
            let before = spec.lease_transitions.unwrap_or_default();
            spec.lease_transitions = Some(before.saturating_add(i32::from(act == Act::Take)));
        }
        spec.holder_identity = Some(self.me.clone());
        spec.lease_duration_seconds = i32::try_from(LEASE.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    async fn release(&self) -> Result<(), TryError> {
        let Some(seen) = &self.seen else {
            return Ok(());
        };
        let mut lease = seen.lease.clone();
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        answer(
            self.leases
                .replace(&self.name, &PostParams::default(), &lease),
        )
        .await?;
        Ok(())
    }
}

async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, TryError> {
    Ok(tokio::time::timeout(ANSWER, request).await??)
}

impl Leadership {
    /// Whether this replica may write at this moment.
    pub fn leads(&self) -> bool {
        self.0.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Runs `work` whenever this replica leads, from its beginning each time, and drops it where it stands at the
    /// moment when it does not. Ends only with the election.
    pub async fn while_leading<F, W>(&self, what: &'static str, mut work: F)
    where
        F: FnMut() -> W,
        W: Future<Output = ()>,
    {
        let mut until = self.0.clone();
        loop {
            if until
                .wait_for(|until| until.is_some_and(|until| Instant::now() < until))
                .await
                .is_err()
            {
                return;
            }
            tracing::debug!(what, "starts writing");
            tokio::select! {
                () = lost(until.clone()) => tracing::debug!(what, "stops writing"),
                () = work() => {
                    tracing::warn!(what, "ended by itself; starts again");
                    tokio::time::sleep(SOON).await;
                }
            }
        }
    }

    /// Always leading: for tests of writers, and where there is nobody else.
    #[cfg(test)]
    pub(crate) fn alone() -> Self {
        let far = Instant::now() + Duration::from_secs(365 * 24 * 3600);
        let (sender, receiver) = watch::channel(Some(far));
        // Never dropped: a dropped sender would mean the end of the election.
        std::mem::forget(sender);
        Self(receiver)
    }
}

/// Completes when the lease is lost.
async fn lost(mut until: watch::Receiver<Option<Instant>>) {
    loop {
        let Some(end) = *until.borrow_and_update() else {
            return;
        };
        tokio::select! {
            () = tokio::time::sleep_until(end) => {
                if until.borrow().is_none_or(|end| end <= Instant::now()) {
                    return;
                }
            }
            changed = until.changed() => if changed.is_err() {
                return;
            },
        }
    }
}
