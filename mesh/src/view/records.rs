//! The workloads, and how one is found. No index keeps a key: a record says itself what it is found by.

use std::{collections::BTreeSet, sync::Arc};

use super::shard::{Table, hash_of};
use crate::{
    names::{NetworkAddress, WorkloadUid},
    outcome::LocalWorkload,
    workload::Workload,
};

/// Of each uid one record. `Default` has none.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    by_uid: Table<Arc<Workload>>,
    /// To the hash of the uid, so that a record that changes otherwise is not looked for here.
    by_address: Table<u64>,
    /// Likewise.
    by_binding: Table<u64>,
}

impl Records {
    pub(super) fn len(&self) -> usize {
        self.by_uid.len()
    }

    /// How much the indexes hold.
    #[cfg(test)]
    pub(super) fn indexed(&self) -> usize {
        self.by_address.len() + self.by_binding.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_uid.iter()
    }

    pub(super) fn get(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        let mut found = self.by_uid.find(hash_of(uid));
        found.find(|it| it.uid == *uid)
    }

    /// Every record of this address; a record may come twice.
    pub(super) fn at(&self, address: &NetworkAddress) -> impl Iterator<Item = &Arc<Workload>> {
        let uids = self.by_address.find(hash_of(address));
        let found = uids.flat_map(|uid| self.by_uid.find(*uid));
        found.filter(|it| it.own_addresses().any(|own| own == *address))
    }

    /// Every record that a pod may be bound to; a record may come twice.
    pub(super) fn bound(&self, pod: &LocalWorkload) -> impl Iterator<Item = &Arc<Workload>> {
        let uids = self
            .by_binding
            .find(binding(&pod.name, &pod.namespace, &pod.service_account));
        let found = uids.flat_map(|uid| self.by_uid.find(*uid));
        found.filter(|it| {
            it.name == pod.name
                && it.namespace == pod.namespace
                && it.service_account == pod.service_account
        })
    }

    /// In the place of the one of its uid, which is answered.
    pub(super) fn insert(&mut self, new: Arc<Workload>) -> Option<Arc<Workload>> {
        let uid = hash_of(&new.uid);
        let old = self.by_uid.remove(uid, |it| it.uid == new.uid);
        self.reindex(uid, old.as_deref(), Some(&new));
        self.by_uid.insert(uid, new);
        old
    }

    pub(super) fn remove(&mut self, uid: &WorkloadUid) -> Option<Arc<Workload>> {
        let hash = hash_of(uid);
        let old = self.by_uid.remove(hash, |it| it.uid == *uid)?;
        self.reindex(hash, Some(&old), None);
        Some(old)
    }

    fn reindex(&mut self, uid: u64, old: Option<&Workload>, new: Option<&Workload>) {
        let addresses = |it: &Workload| it.own_addresses().map(|it| hash_of(&it)).collect();
        let bindings =
            |it: &Workload| BTreeSet::from([binding(&it.name, &it.namespace, &it.service_account)]);
        move_hashes(
            &mut self.by_address,
            uid,
            old.map(addresses),
            new.map(addresses),
        );
        move_hashes(
            &mut self.by_binding,
            uid,
            old.map(bindings),
            new.map(bindings),
        );
    }
}

fn binding(name: &str, namespace: &str, service_account: &str) -> u64 {
    hash_of(&(name, namespace, service_account))
}

/// Moves a record from the hashes it had to those it has now; hashes of both are not touched.
fn move_hashes(
    index: &mut Table<u64>,
    uid: u64,
    old: Option<BTreeSet<u64>>,
    new: Option<BTreeSet<u64>>,
) {
    let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
    for hash in old.difference(&new) {
        index.remove(*hash, |it| *it == uid);
    }
    for hash in new.difference(&old) {
        index.insert(*hash, uid);
    }
}
