//! What the waypoint knows: the mesh and its own resources as one immutable snapshot, and news of its changes.
//!
//! The xDS client is the only writer, one publish per response. A connection or request reads one snapshot and keeps it
//! for its decisions. What lacks something waits here, with a deadline, and is decided again on the snapshot that
//! brings it.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;
use mesh::{
    l7::view::{self, View},
    names::WorkloadUid,
    outcome::{Outcome, Refusal},
    view::MeshView,
    workload::{TunnelProtocol, Workload},
};
use net::{
    mesh_state::{self, MeshState},
    xds::{self, Rejection, Response},
};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::config::Node;

/// One state of knowledge.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// Our own record: as the mesh has it, else what the settings say, so that a control plane that has not heard of our
    /// pod (any longer) costs nothing but preferences of place.
    pub(crate) own: Arc<Workload>,
    /// Workloads, services, L4 policies.
    pub(crate) mesh: Arc<MeshView>,
    /// What this waypoint serves, and how.
    pub(crate) l7: Arc<View>,
}

/// The current snapshot and who waits for the next. Cheap to clone; one per process.
#[derive(Clone)]
pub(crate) struct Snapshots(Arc<Inner>);

struct Inner {
    node: Node,
    current: ArcSwap<Snapshot>,
    /// Counts publishes.
    version: watch::Sender<u64>,
    next: Mutex<Next>,
}

/// What updates are applied to; its lock is what orders publishes. Never held across an await.
#[derive(Default)]
struct Next {
    mesh: MeshState,
    l7: View,
    /// Until each type has been told: routes without the policies on them would let everyone in.
    withheld: bool,
}

impl fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshots")
            .field("version", &*self.0.version.borrow())
            .finish_non_exhaustive()
    }
}

impl Snapshots {
    /// Knows nothing yet.
    pub(crate) fn new(node: &Node) -> Self {
        let nothing = Snapshot {
            own: own_record(node, &MeshView::default()),
            mesh: Arc::default(),
            l7: Arc::default(),
        };
        Self(Arc::new(Inner {
            node: node.clone(),
            current: ArcSwap::from_pointee(nothing),
            version: watch::Sender::default(),
            next: Mutex::default(),
        }))
    }

    /// The snapshot now.
    pub(crate) fn load(&self) -> Arc<Snapshot> {
        self.0.current.load_full()
    }

    /// Counts publishes, from now on.
    pub(crate) fn versions(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// Publishes nothing until the control plane has told each type.
    pub(crate) fn withhold(&self) {
        self.0.next.lock().withheld = true;
    }

    /// Makes a decision, again on each new snapshot while it lacks something, until `deadline`; then it is refused as
    /// the need says. Cancel-safe.
    ///
    /// # Errors
    /// The refusal.
    pub(crate) async fn decide<T>(
        &self,
        deadline: Instant,
        mut decide: impl FnMut(&Arc<Snapshot>) -> Outcome<T>,
    ) -> Result<(T, Arc<Snapshot>), Refusal> {
        let mut versions = None;
        loop {
            let snapshot = self.load();
            let need = match decide(&snapshot) {
                Outcome::Go(go) => return Ok((go, snapshot)),
                Outcome::Refuse(refusal) => return Err(refusal),
                Outcome::Need(need) => need,
            };
            // Subscribed only once something is lacking, and then looked again: nothing can slip in between.
            let Some(versions) = &mut versions else {
                versions = Some(self.versions());
                continue;
            };
            match timeout_at(deadline, versions.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(need.unmet()),
            }
        }
    }

    /// Takes xDS responses in; give it to [`xds::Client::new`].
    pub(crate) fn handler(&self) -> Handler {
        Handler {
            snapshots: self.clone(),
            mesh: self.0.next.lock().mesh.handler(),
        }
    }

    /// Applies one update of our own resources, as a control plane would tell it.
    pub(crate) fn apply(&self, update: view::Update) {
        let mut next = self.0.next.lock();
        next.l7.apply(update);
        self.publish(&next);
    }

    /// Applies one update of the mesh, as a control plane would tell it.
    #[cfg(test)]
    pub(crate) fn apply_mesh(&self, update: mesh::view::Update) {
        let next = self.0.next.lock();
        next.mesh.publish(update);
        self.publish(&next);
    }

    fn publish(&self, next: &Next) {
        if next.withheld {
            return;
        }
        let mesh = next.mesh.view();
        let version = *self.0.version.borrow() + 1;
        self.0.current.store(Arc::new(Snapshot {
            own: own_record(&self.0.node, &mesh),
            mesh,
            l7: Arc::new(next.l7.clone()),
        }));
        self.0.version.send_replace(version);
    }
}

/// Reads responses of the Address, Authorization and waypoint types, and publishes them.
#[derive(Debug)]
pub(crate) struct Handler {
    snapshots: Snapshots,
    mesh: mesh_state::Handler,
}

impl xds::Handler for Handler {
    fn apply(&mut self, response: Response) -> Vec<Rejection> {
        if response.type_url == proto::WAYPOINT_TYPE_URL {
            return self.apply_own(response);
        }
        let rejected = self.mesh.apply(response);
        self.snapshots.publish(&self.snapshots.0.next.lock());
        rejected
    }

    fn synced(&mut self) {
        let mut next = self.snapshots.0.next.lock();
        if std::mem::replace(&mut next.withheld, false) {
            self.snapshots.publish(&next);
        }
    }
}

impl Handler {
    /// A resource that cannot be read is refused alone: what was known under its name stays, the others are in force.
    fn apply_own(&mut self, response: Response) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        let mut update = view::Update::default();
        for resource in response.resources {
            match read(&resource) {
                Ok(read) => update.upserts.push(read),
                Err(reason) => rejected.push(Rejection {
                    name: resource.name.to_string(),
                    reason,
                }),
            }
        }
        let removed = response.removed.iter();
        update.removals = removed.map(|name| name.as_str().into()).collect();
        self.snapshots.apply(update);
        rejected
    }
}

/// The reason names the field, for the control plane's log.
fn read(resource: &xds::Resource) -> Result<view::Resource, String> {
    let message = proto::waypoint::Resource::decode(resource.body.clone())
        .map_err(|error| format!("not readable: {error}"))?;
    let read = view::Resource::try_from(message).map_err(|error| error.to_string())?;
    // Removals come by name: one that is not the resource's own would leave it behind.
    match *read.name() == *resource.name {
        true => Ok(read),
        false => Err(format!("is named {:?}", read.name())),
    }
}

fn own_record(node: &Node, mesh: &MeshView) -> Arc<Workload> {
    if let Some(record) = mesh.local_workload(&node.binding(), "") {
        return Arc::clone(record);
    }
    let uid = format!(
        "{}//Pod/{}/{}",
        node.cluster_id, node.namespace, node.pod_name
    );
    let uid = WorkloadUid(uid.into());
    Arc::new({
        let mut it = Workload::new(uid, node.pod_name.clone(), node.namespace.clone());
        it.service_account = node.service_account.clone();
        it.trust_domain = node.trust_domain.clone();
        it.network = node.network.clone();
        it.cluster_id = node.cluster_id.clone();
        it.node = node.name.clone();
        it.addresses = node.instance_ip.parse().into_iter().collect();
        it.tunnel_protocol = TunnelProtocol::Hbone;
        it.canonical_name = node.gateway.clone();
        it.set_workload_name(node.gateway.clone());
        it
    })
}
