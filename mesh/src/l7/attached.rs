//! Objects that are attached to a waypoint or to services, found by what they are attached to.

use std::sync::Arc;

use super::{
    authorization::RequestPolicy, name::Target, request_authentication::RequestAuthentication,
    telemetry::Telemetry,
};
use crate::{
    names::{NamespacedHostname, PolicyKey},
    view::shard::Sharded,
};

/// An object with a key and targets.
pub(super) trait Targeted: PartialEq {
    fn key(&self) -> &PolicyKey;
    fn targets(&self) -> &[Target];
}

macro_rules! targeted {
    ($($type:ty),+) => {$(
        impl Targeted for $type {
            fn key(&self) -> &PolicyKey {
                &self.key
            }

            fn targets(&self) -> &[Target] {
                &self.targets
            }
        }
    )+};
}

targeted!(RequestPolicy, RequestAuthentication, Telemetry);

#[derive(Debug)]
pub(super) struct Attached<T> {
    by_key: Sharded<PolicyKey, Arc<T>>,
    /// Each list in the order of its keys.
    by_target: Sharded<Target, Vec<Arc<T>>>,
}

impl<T> Clone for Attached<T> {
    fn clone(&self) -> Self {
        Self {
            by_key: self.by_key.clone(),
            by_target: self.by_target.clone(),
        }
    }
}

impl<T> Default for Attached<T> {
    fn default() -> Self {
        Self {
            by_key: Sharded::default(),
            by_target: Sharded::default(),
        }
    }
}

impl<T: Targeted> Attached<T> {
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<T>> {
        self.by_key.iter().map(|(_, it)| it)
    }

    pub(super) fn get(&self, key: &PolicyKey) -> Option<&Arc<T>> {
        self.by_key.get(key)
    }

    /// The waypoint's, then the service's own.
    pub(super) fn of(&self, service: Option<&NamespacedHostname>) -> impl Iterator<Item = &Arc<T>> {
        let waypoint = self.by_target.get(&Target::Waypoint);
        waypoint
            .into_iter()
            .chain(self.of_service(service))
            .flatten()
    }

    /// The first of the service's own, else of the waypoint's.
    pub(super) fn own(&self, service: Option<&NamespacedHostname>) -> Option<&Arc<T>> {
        let waypoint = self.by_target.get(&Target::Waypoint);
        self.of_service(service)
            .and_then(|list| list.first())
            .or_else(|| waypoint.and_then(|list| list.first()))
    }

    fn of_service(&self, service: Option<&NamespacedHostname>) -> Option<&Vec<Arc<T>>> {
        let target = Target::Service(service?.clone());
        self.by_target.get(&target)
    }

    /// The key, if the object is a new one.
    pub(super) fn put(&mut self, object: T) -> Option<PolicyKey> {
        let (key, new) = (object.key().clone(), Arc::new(object));
        let old = self.by_key.insert(key.clone(), Arc::clone(&new));
        if old.as_ref() == Some(&new) {
            return None;
        }
        self.withdraw(old.as_deref());
        for target in new.targets() {
            self.by_target.update(target.clone(), |list| {
                let at = list.partition_point(|it| it.key() < new.key());
                // A target that is named twice counts once.
                if list.get(at).is_none_or(|it| it.key() != new.key()) {
                    list.insert(at, Arc::clone(&new));
                }
                true
            });
        }
        Some(key)
    }

    /// The key, if there was one.
    pub(super) fn take(&mut self, key: &str) -> Option<PolicyKey> {
        let key: PolicyKey = key.parse().ok()?;
        let old = self.by_key.remove(&key)?;
        self.withdraw(Some(&old));
        Some(key)
    }

    fn withdraw(&mut self, old: Option<&T>) {
        let Some(old) = old else { return };
        for target in old.targets() {
            self.by_target.update(target.clone(), |list| {
                list.retain(|it| it.key() != old.key());
                !list.is_empty()
            });
        }
    }
}
