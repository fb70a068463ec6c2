//! What the world hands to those who serve it: resources encoded once, in batches of changes, and statuses.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::Arc,
};

use bytes::Bytes;
use hashbrown::{HashTable, hash_table::Entry};
use mesh::names::Str;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;

use crate::object::{Kind, Name, ObjectRef};

/// One xDS resource, encoded once and shared by every subscriber.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// [`proto::ADDRESS_TYPE_URL`], [`proto::AUTHORIZATION_TYPE_URL`] or [`proto::WAYPOINT_TYPE_URL`].
    pub type_url: &'static str,
    /// The Gateway whose waypoint alone gets it; `None`: whoever may read the mesh.
    pub scope: Option<Arc<Name>>,
    /// The primary name: a workload's uid, a service's `namespace/hostname`, a policy's `namespace/name`.
    pub name: Str,
    /// Other names it is found by on demand: `network/ip`, `network/ip/length`.
    pub aliases: Box<[Str]>,
    /// Hex xxhash64 of `body`.
    pub version: Str,
    /// The marshalled message, as it stands in `google.protobuf.Any.value`.
    pub body: Bytes,
    /// The node a workload runs on.
    pub node: Option<Str>,
    /// The services a workload is an endpoint of, by their resource names.
    pub services: Box<[Str]>,
}

/// Names a resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceKey {
    /// Its type.
    pub type_url: &'static str,
    /// Whose it is; `None`: everyone's.
    pub scope: Option<Arc<Name>>,
    /// Its primary name.
    pub name: Str,
}

/// A proxy that a controller deployed for a Gateway, as it reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayProxy {
    /// The Gateway.
    pub gateway: Name,
    /// Of every type it gets what is for its Gateway, and nothing of what is everyone's: a gateway between networks, which
    /// must not know more than the services that other networks reach through it.
    pub confined: bool,
}

/// Resources by type, scope and name, which they carry themselves: there are as many as pods, and a key beside each would cost
/// four times the place in the table.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    table: HashTable<Arc<Resource>>,
    hasher: RandomState,
}

/// A batch of changes. Each resource occurs once. Shape: apply `upserts` in order (policies stand before the addresses
/// that name them), then `removals` in order (addresses before the policies they named).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New or altered resources.
    pub upserts: Vec<Arc<Resource>>,
    /// Resources that are no more.
    pub removals: Vec<ResourceKey>,
}

/// What the control plane says of one object of the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ObjectStatus {
    /// For example `AuthorizationPolicy`.
    pub kind: Str,
    /// Absent for cluster-scoped objects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Str>,
    /// Its name.
    pub name: Str,
    /// The file it stands in; empty where the source is no folder.
    pub file: Str,
    /// Its first line, from 1.
    pub line: u32,
    /// Ordered by type.
    pub conditions: Vec<Condition>,
    /// Of routes and policies of the Gateway API: per parent.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub parents: Arc<Vec<ParentStatus>>,
}

/// One condition, as in Kubernetes' `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Condition {
    /// For example `ZtunnelAccepted`.
    #[serde(rename = "type")]
    pub type_: &'static str,
    /// `True` or `False`.
    pub status: Truth,
    /// One word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: Cow<'static, str>,
}

/// What is said of an object at one of those that it is attached to (`status.parents[]`, `status.ancestors[]`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParentStatus {
    /// The parent, as the status names it.
    #[serde(rename = "ref")]
    pub reference: serde_json::Value,
    /// Ordered by type.
    pub conditions: Vec<Condition>,
}

/// The status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Truth {
    /// It holds.
    True,
    /// It does not.
    False,
}

/// One version of an object of the API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectVersion {
    /// `metadata.uid`.
    pub uid: Str,
    /// `metadata.generation`; 0 where the kind has none.
    pub generation: i64,
    /// `metadata.resourceVersion`.
    pub resource_version: Str,
    /// As it was read: `security.istio.io/v1`.
    pub api_version: Str,
    /// `status.conditions` as the API server has them; `None` where there are none.
    pub conditions: Option<Arc<serde_json::Value>>,
}

/// What is to be written into one object's status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusChange {
    /// Which.
    pub object: ObjectRef,
    /// The version that the conditions speak of; `None` when the object is no more.
    pub version: Option<ObjectVersion>,
    /// What the source and translation say, ordered by type.
    pub conditions: Vec<Condition>,
    /// What translation says per parent.
    pub parents: Arc<Vec<ParentStatus>>,
    /// Addresses given to hosts of a ServiceEntry that has none of its own.
    pub addresses: Vec<(Str, IpAddr)>,
}

/// A pod's facts for the certificate authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Kubernetes' uid of the pod.
    pub uid: Str,
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
    /// Its service account.
    pub service_account: Str,
    /// The node it runs on.
    pub node: Str,
}

/// One reader's place in the stream of changes. A slow reader's changes are merged, never queued, so that it holds at
/// most one entry per resource.
#[derive(Debug)]
pub struct Subscription {
    shared: Arc<Pending>,
}

#[derive(Debug, Default)]
pub(crate) struct Pending {
    changes: Mutex<BTreeMap<ResourceKey, Option<Arc<Resource>>>>,
    ready: Notify,
}

impl Subscription {
    pub(crate) fn new(state: &Resources) -> (Self, Arc<Pending>) {
        let shared = Arc::new(Pending::default());
        let all = state.table.iter();
        shared.merge(all.map(|resource| (resource.key(), Some(resource.clone()))));
        let subscription = Self {
            shared: shared.clone(),
        };
        (subscription, shared)
    }

    /// The changes since the last call, at first everything there is. Waits while there are none; never empty. Safe to
    /// cancel: nothing is lost.
    pub async fn next(&mut self) -> Changes {
        loop {
            if let Some(changes) = self.try_next() {
                return changes;
            }
            // A permit is stored for a notification between the look above and this wait.
            self.shared.ready.notified().await;
        }
    }

    /// The changes since the last call, if there are any.
    pub fn try_next(&mut self) -> Option<Changes> {
        let pending = std::mem::take(&mut *self.shared.changes.lock());
        (!pending.is_empty()).then(|| Changes::ordered(pending))
    }
}

/// Objects whose status changed, for one reader. Merged: at most one entry per object, however slow the reader.
#[derive(Debug)]
pub(crate) struct PendingStatuses {
    kinds: Vec<Kind>,
    changed: Mutex<BTreeSet<ObjectRef>>,
    ready: Notify,
}

impl PendingStatuses {
    pub(crate) fn new(kinds: &[Kind]) -> Self {
        Self {
            kinds: kinds.to_vec(),
            changed: Mutex::default(),
            ready: Notify::new(),
        }
    }

    /// Notes objects of the reader's kinds.
    pub(crate) fn note<'a>(&self, objects: impl IntoIterator<Item = &'a ObjectRef>) {
        let wanted = objects
            .into_iter()
            .filter(|object| self.kinds.contains(&object.kind));
        let mut changed = self.changed.lock();
        let before = changed.len();
        changed.extend(wanted.cloned());
        if changed.len() > before {
            self.ready.notify_one();
        }
    }

    /// The objects noted since the last call; never empty.
    pub(crate) async fn take(&self) -> BTreeSet<ObjectRef> {
        loop {
            let changed = std::mem::take(&mut *self.changed.lock());
            if !changed.is_empty() {
                return changed;
            }
            // A permit is stored for a notification between the look above and this wait.
            self.ready.notified().await;
        }
    }
}

impl Pending {
    pub(crate) fn merge(
        &self,
        changes: impl IntoIterator<Item = (ResourceKey, Option<Arc<Resource>>)>,
    ) {
        self.changes.lock().extend(changes);
        self.ready.notify_one();
    }
}

impl Resources {
    /// All keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = ResourceKey> {
        self.table.iter().map(|resource| resource.key())
    }

    /// One, by its key.
    pub(crate) fn get(&self, key: &ResourceKey) -> Option<Arc<Resource>> {
        let hash = self.place(key);
        let found = self.table.find(hash, |known| is_of(known, key));
        found.cloned()
    }

    fn place(&self, key: &ResourceKey) -> u64 {
        self.hasher.hash_one((key.type_url, &key.scope, &key.name))
    }

    /// Sets or removes one.
    pub(crate) fn set(&mut self, key: &ResourceKey, resource: Option<Arc<Resource>>) {
        let hash = self.place(key);
        let is_it = |known: &Arc<Resource>| is_of(known, key);
        let rehash = |known: &Arc<Resource>| {
            self.hasher
                .hash_one((known.type_url, &known.scope, &known.name))
        };
        match (self.table.entry(hash, is_it, rehash), resource) {
            (Entry::Occupied(mut known), Some(resource)) => *known.get_mut() = resource,
            (Entry::Occupied(known), None) => drop(known.remove()),
            (Entry::Vacant(place), Some(resource)) => drop(place.insert(resource)),
            (Entry::Vacant(_), None) => {}
        }
    }
}

/// Waypoints have resources of the same names.
fn is_of(resource: &Resource, key: &ResourceKey) -> bool {
    resource.name == key.name && resource.type_url == key.type_url && resource.scope == key.scope
}

impl Changes {
    fn ordered(pending: BTreeMap<ResourceKey, Option<Arc<Resource>>>) -> Self {
        let mut changes = Self::default();
        for (key, resource) in pending {
            match resource {
                Some(resource) => changes.upserts.push(resource),
                None => changes.removals.push(key),
            }
        }
        let is_address = |type_url: &str| type_url == proto::ADDRESS_TYPE_URL;
        changes.upserts.sort_by_key(|r| is_address(r.type_url));
        changes.removals.sort_by_key(|k| !is_address(k.type_url));
        changes
    }
}

impl Resource {
    /// Its key.
    pub fn key(&self) -> ResourceKey {
        ResourceKey {
            type_url: self.type_url,
            scope: self.scope.clone(),
            name: self.name.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_of_one_name_are_kept_for_each_waypoint() {
        let of = |gateway: &str| Resource {
            type_url: proto::WAYPOINT_TYPE_URL,
            scope: Some(Arc::new(Name::new("shop", gateway))),
            name: "config".into(),
            aliases: Box::default(),
            version: "1".into(),
            body: Bytes::new(),
            node: None,
            services: Box::default(),
        };
        let mut resources = Resources::default();
        for gateway in ["a", "b"] {
            let resource = of(gateway);
            resources.set(&resource.key(), Some(Arc::new(resource)));
        }
        let (mut first, _) = Subscription::new(&resources);
        let told = first.try_next().unwrap().upserts;
        assert_eq!(told.len(), 2, "{told:?}");

        resources.set(&of("a").key(), None);
        let (mut next, _) = Subscription::new(&resources);
        let told = next.try_next().unwrap().upserts;
        assert_eq!(*told[0], of("b"));
        assert_eq!(told.len(), 1, "{told:?}");
    }
}
