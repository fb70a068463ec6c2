//! The way to a backend: its endpoints, the connections to them, and what is known of each.

pub(crate) mod ask;
mod budget;
pub(crate) mod cluster;
pub(crate) mod endpoint;
pub(crate) mod members;
mod outlier;
pub(super) mod pool;

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
};

use mesh::names::{NamespacedHostname, Str, WorkloadUid};
use parking_lot::RwLock;
use tokio::sync::OwnedSemaphorePermit;

use cluster::Cluster;
use endpoint::EndpointState;
use outlier::Verdict;

/// Whose endpoints they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ClusterKey {
    /// A service's.
    Service {
        /// The service.
        service: NamespacedHostname,
        /// Its port.
        port: u16,
        /// DestinationRule subset.
        subset: Option<Str>,
    },
    /// A workload by its own address.
    Workload {
        /// The workload.
        uid: WorkloadUid,
        /// Its port.
        port: u16,
    },
}

/// All that is known of backends. Bounded by what routes and clients can name: a cluster that nothing has used for a
/// while is forgotten.
#[derive(Debug, Default)]
pub(crate) struct Upstreams {
    clusters: RwLock<HashMap<ClusterKey, Arc<Cluster>>>,
}

impl Upstreams {
    /// What is known of a cluster; at first nothing.
    pub(crate) fn cluster(&self, key: &ClusterKey) -> Arc<Cluster> {
        if let Some(cluster) = self.clusters.read().get(key) {
            return Arc::clone(cluster);
        }
        let mut clusters = self.clusters.write();
        let cluster = clusters
            .entry(key.clone())
            .or_insert_with(|| Arc::new(Cluster::new(key.clone())));
        Arc::clone(cluster)
    }

    /// Closes connections that were idle for too long, or all that are, and forgets clusters that nothing uses. Cheap;
    /// every few seconds.
    pub(super) fn sweep(&self, all: bool) {
        let clusters: Vec<_> = self.clusters.read().values().cloned().collect();
        let unused = |it: &Arc<Cluster>| it.sweep(all);
        if clusters.iter().any(unused) {
            // Two: the map's and the list's, which is gone by then; a request that has it keeps it.
            drop(clusters);
            self.clusters
                .write()
                .retain(|_, it| Arc::strong_count(it) > 1 || !it.sweep(all));
        }
    }
}

/// One request or connection of bytes to one endpoint, counted while it lives.
#[derive(Debug)]
pub(crate) struct Permit {
    cluster: Arc<Cluster>,
    endpoint: Arc<EndpointState>,
    /// One of a limited number of connections.
    slot: Option<OwnedSemaphorePermit>,
}

impl Permit {
    pub(super) fn new(cluster: Arc<Cluster>, endpoint: Arc<EndpointState>) -> Self {
        endpoint.active.fetch_add(1, Ordering::Relaxed);
        Self {
            cluster,
            endpoint,
            slot: None,
        }
    }

    /// Holds one of a limited number of connections, too.
    pub(super) fn holds(&mut self, slot: Option<OwnedSemaphorePermit>) {
        self.slot = slot;
    }

    /// The endpoint.
    pub(crate) fn endpoint(&self) -> &Arc<EndpointState> {
        &self.endpoint
    }

    /// The endpoint answered.
    pub(crate) fn answered(&self, status: u16) {
        self.cluster
            .report(&self.endpoint, Verdict::Answered(status));
    }

    /// The endpoint did not answer, or broke its answer off.
    pub(crate) fn failed(&self) {
        self.cluster.report(&self.endpoint, Verdict::Failed);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.endpoint.active.fetch_sub(1, Ordering::Relaxed);
        self.cluster.release();
    }
}
