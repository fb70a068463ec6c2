//! What the mesh knows, shared: one immutable view behind a swap, and news of its changes.
//!
//! A connection reads one view and keeps it for a decision. The xDS client writes, one publish per response. Decisions
//! that lack something wait here, with a deadline, and are made again on the view that brings it; live connections are
//! told when a policy or their own workload changes, to be authorized again.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use mesh::{
    names::{NetworkAddress, Str, WorkloadUid},
    outcome::{Need, Outcome, Reason, Refusal},
    policy::AuthorizationPolicy,
    view::{Changes, MeshView, Removal, Resource, Update},
    workload::{Commons, TunnelProtocol, Workload},
};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::xds::{self, Rejection, Response};

/// The current view and who waits for the next. Cheap to clone; one per process.
#[derive(Clone, Default)]
pub struct MeshState(Arc<Inner>);

#[derive(Default)]
struct Inner {
    view: ArcSwap<MeshView>,
    /// The copy that updates are applied to; its lock is what orders publishes. Never held across an await.
    next: Mutex<MeshView>,
    /// Written under the lock of `next`.
    withheld: AtomicBool,
    version: watch::Sender<u64>,
    policies: watch::Sender<u64>,
    /// Per workload that a live connection depends on.
    watched: Mutex<HashMap<WorkloadUid, watch::Sender<u64>>>,
    demand: Mutex<Option<xds::Demand>>,
}

impl fmt::Debug for MeshState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshState")
            .field("version", &self.view().version())
            .finish_non_exhaustive()
    }
}

impl MeshState {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fetches [`Need::Resource`] through `demand` from now on.
    pub fn fetch_through(&self, demand: xds::Demand) {
        *self.0.demand.lock() = Some(demand);
    }

    /// Publishes nothing until a control plane has answered for each type that it is asked for: a view with workloads
    /// and without the policies of their namespaces would let everyone in, and one without the destinations would send
    /// to them in plaintext.
    pub fn withhold(&self) {
        let _next = self.0.next.lock();
        self.0.withheld.store(true, Ordering::Relaxed);
    }

    /// Publishes what was withheld. Nothing happens where nothing is.
    fn release(&self) {
        let next = self.0.next.lock();
        if !self.0.withheld.swap(false, Ordering::Relaxed) {
            return;
        }
        self.0.view.store(Arc::new(next.clone()));
        let version = next.version();
        self.0.policies.send_replace(version);
        for sender in self.0.watched.lock().values() {
            sender.send_replace(version);
        }
        self.0.version.send_replace(version);
    }

    /// Resolves once nothing is withheld. Cancel-safe.
    pub async fn told(&self) {
        let mut versions = self.versions();
        while self.0.withheld.load(Ordering::Relaxed) {
            // The sender is ours, so that the channel cannot close.
            if versions.changed().await.is_err() {
                return;
            }
        }
    }

    /// The view now.
    pub fn view(&self) -> Arc<MeshView> {
        self.0.view.load_full()
    }

    /// Applies one update and publishes the result, if it changed anything and is not withheld. Wakes whom it concerns.
    pub fn publish(&self, update: Update) -> Changes {
        let mut next = self.0.next.lock();
        let changes = next.apply(update);
        if changes.is_empty() || self.0.withheld.load(Ordering::Relaxed) {
            return changes;
        }
        self.0.view.store(Arc::new(next.clone()));
        // Under the lock still, so that watchers hear of versions in order.
        let version = next.version();
        self.tell(version, &changes);
        changes
    }

    fn tell(&self, version: u64, changes: &Changes) {
        if !changes.policies.is_empty() {
            self.0.policies.send_replace(version);
        }
        if !changes.workloads.is_empty() {
            let watched = self.0.watched.lock();
            for uid in &changes.workloads {
                if let Some(sender) = watched.get(uid) {
                    sender.send_replace(version);
                }
            }
        }
        self.0.version.send_replace(version);
    }

    /// Versions of published views, from now on.
    pub fn versions(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// News that bear on the authorization of a connection to `workload`: a change of any policy, or of the workload.
    /// Changes after this call are told; read the view after it.
    pub fn watch(&self, workload: &WorkloadUid) -> AuthorizationWatch {
        let mut watched = self.0.watched.lock();
        let receiver = match watched.entry(workload.clone()) {
            Entry::Occupied(entry) => entry.get().subscribe(),
            Entry::Vacant(entry) => entry.insert(watch::Sender::new(0)).subscribe(),
        };
        AuthorizationWatch {
            state: self.clone(),
            uid: workload.clone(),
            policies: self.0.policies.subscribe(),
            workload: Some(receiver),
        }
    }

    /// Makes a decision, again on each new view while it lacks something, until `deadline`; then it is refused as the
    /// need says. [`Need::Dns`] is not fetched here: the caller handles it inside `decide`. Cancel-safe.
    ///
    /// # Errors
    /// The refusal.
    pub async fn decide<T>(
        &self,
        deadline: Instant,
        mut decide: impl FnMut(&Arc<MeshView>) -> Outcome<T>,
    ) -> Result<(T, Arc<MeshView>), Refusal> {
        let mut versions = None;
        loop {
            let view = self.view();
            let need = match decide(&view) {
                Outcome::Go(go) => return Ok((go, view)),
                Outcome::Refuse(refusal) => return Err(refusal),
                Outcome::Need(need) => need,
            };
            // Subscribed only once something is lacking, and then looked again: nothing can slip in between.
            let Some(versions) = &mut versions else {
                versions = Some(self.versions());
                continue;
            };
            self.wait(&need, deadline, versions).await?;
        }
    }

    /// Asks a control plane that tells only what it is asked for. What it has found is in the view when this returns;
    /// `false`: it has no such resource, or did not say so before `deadline`, or tells everything unasked. Cancel-safe.
    pub async fn fetch(&self, resource: &str, deadline: Instant) -> bool {
        let Some(demand) = self.0.demand.lock().clone() else {
            return false;
        };
        let found = demand.resource(resource, deadline).await;
        found == Ok(xds::Found::Arrived)
    }

    /// Waits for what may meet `need`; refuses when the deadline passed or it is certain that nothing will. Only the
    /// control plane can say that there is no such resource; its silence says nothing.
    async fn wait(
        &self,
        need: &Need,
        deadline: Instant,
        versions: &mut watch::Receiver<u64>,
    ) -> Result<(), Refusal> {
        let demand = self.0.demand.lock().clone();
        match (need, demand) {
            (Need::Resource(key), Some(demand)) => match demand.resource(key, deadline).await {
                Ok(xds::Found::Arrived) => Ok(()),
                Ok(xds::Found::Absent) => Err(need.unmet()),
                Err(_) => Err(Refusal::new(Reason::DestinationUntold)),
            },
            _ => match timeout_at(deadline, versions.changed()).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) | Err(_) => Err(need.unmet()),
            },
        }
    }

    /// Takes xDS responses in; give it to [`xds::Client::new`].
    pub fn handler(&self) -> Handler {
        Handler {
            state: self.clone(),
            commons: Commons::default(),
        }
    }
}

/// Tells a live connection to authorize itself again.
pub struct AuthorizationWatch {
    state: MeshState,
    uid: WorkloadUid,
    policies: watch::Receiver<u64>,
    /// Always there until dropped.
    workload: Option<watch::Receiver<u64>>,
}

impl AuthorizationWatch {
    /// Resolves when a policy, or the workload, has changed since the last call or since the watch was made. Several
    /// changes are told once. Cancel-safe.
    pub async fn changed(&mut self) {
        let Some(workload) = &mut self.workload else {
            return std::future::pending().await;
        };
        // Neither sender can be gone: `state` holds both.
        tokio::select! {
            _ = self.policies.changed() => {}
            _ = workload.changed() => {}
        }
    }

    /// The view to authorize on.
    pub fn view(&self) -> Arc<MeshView> {
        self.state.view()
    }
}

impl fmt::Debug for AuthorizationWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthorizationWatch")
            .field("workload", &self.uid)
            .finish_non_exhaustive()
    }
}

impl Drop for AuthorizationWatch {
    fn drop(&mut self) {
        let mut watched = self.state.0.watched.lock();
        self.workload = None;
        if let Entry::Occupied(entry) = watched.entry(self.uid.clone())
            && entry.get().receiver_count() == 0
        {
            entry.remove();
        }
    }
}

/// Reads responses of the Address, Workload and Authorization types and publishes them.
#[derive(Clone, Debug)]
pub struct Handler {
    state: MeshState,
    commons: Commons,
}

impl xds::Handler for Handler {
    fn apply(&mut self, response: Response) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        let mut update = Update::default();
        for resource in response.resources {
            match read(response.type_url, &resource.body) {
                Ok(mut read) => {
                    match &mut read {
                        Resource::Workload(it) => self.share(it, &resource.name),
                        Resource::Service(it) => it.share(&mut self.commons),
                        Resource::Policy(_) => {}
                    }
                    update
                        .removals
                        .extend(self.barrier_behind(&read, &resource.name));
                    update.upserts.push(read);
                }
                Err(reason) => {
                    update.upserts.extend(self.barrier(&resource));
                    rejected.push(Rejection {
                        name: resource.name.to_string(),
                        reason,
                    });
                }
            }
        }
        let removal = match response.type_url {
            proto::AUTHORIZATION_TYPE_URL => Removal::Policy,
            _ => Removal::Address,
        };
        let removed = response.removed.iter();
        let removed = removed.map(|name| removal(name.as_str().into()));
        update.removals.extend(removed);
        self.state.publish(update);
        rejected
    }

    fn synced(&mut self) {
        self.state.release();
    }
}

impl Handler {
    /// Has a record keep once what others keep too, the xDS client's name for it among that.
    fn share(&mut self, workload: &mut Workload, name: &Str) {
        if workload.uid.0 == *name {
            workload.uid.0 = name.clone();
        }
        workload.share(&mut self.commons);
    }

    /// What stands in for a destination that is new and cannot be read: whatever is unknown counts as outside the mesh,
    /// and is sent to in plaintext, so its addresses, which the resource's aliases tell, are refused instead.
    fn barrier(&self, resource: &xds::Resource) -> Option<Resource> {
        let name: &str = &resource.name;
        let uid = WorkloadUid(name.into());
        let next = self.state.0.next.lock();
        let is_known = next.workload(&uid).is_some_and(|it| !is_barrier(it))
            || name.parse().is_ok_and(|key| next.service(&key).is_some());
        let aliases = resource.aliases.iter();
        let at: Vec<NetworkAddress> = aliases.filter_map(|it| it.parse().ok()).collect();
        let network = at.first()?.network.clone();
        if is_known {
            return None;
        }
        let mut workload = Workload::new(uid, name.into(), BARRIER.into());
        workload.tunnel_protocol = TunnelProtocol::Unsupported;
        workload.addresses = at.iter().map(|it| it.address).collect();
        workload.network = network;
        Some(Resource::Workload(workload))
    }

    /// The removal of a stand-in of this name, where a service comes to be readable. A workload replaces its own.
    fn barrier_behind(&self, read: &Resource, name: &str) -> Option<Removal> {
        if !matches!(read, Resource::Service(_)) {
            return None;
        }
        let uid = WorkloadUid(name.into());
        let next = self.state.0.next.lock();
        let stands = next.workload(&uid).is_some_and(|it| is_barrier(it));
        stands.then(|| Removal::Address(name.into()))
    }
}

/// The namespace of records that stand in for what cannot be read; no namespace of Kubernetes is called so.
const BARRIER: &str = "(unreadable)";

fn is_barrier(workload: &Workload) -> bool {
    &*workload.namespace == BARRIER
}

/// The reason names the field, for the control plane's log.
fn read(type_url: &str, body: &[u8]) -> Result<Resource, String> {
    fn decode<M: Message + Default>(body: &[u8]) -> Result<M, String> {
        M::decode(body).map_err(|error| format!("not readable: {error}"))
    }
    let read = match type_url {
        proto::ADDRESS_TYPE_URL => decode::<proto::workload::Address>(body)?.try_into(),
        proto::WORKLOAD_TYPE_URL => decode::<proto::workload::Workload>(body)?
            .try_into()
            .map(Resource::Workload),
        proto::AUTHORIZATION_TYPE_URL => decode::<proto::security::Authorization>(body)?
            .try_into()
            .map(|policy: AuthorizationPolicy| Resource::Policy(policy)),
        other => return Err(format!("{other:?} is not a type that a node tunnel reads")),
    };
    read.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
