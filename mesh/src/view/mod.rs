//! What the mesh knows: an immutable snapshot of workloads, services and policies, with the indexes that decisions
//! ask. It never decides anything.
//!
//! A clone is cheap and shares everything; [`MeshView::apply`] copies only the shards that it touches, so a proxy
//! keeps one copy to change and publishes a clone after each xDS response. One connection reads one clone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    names::{NamespacedHostname, NetworkAddress, PolicyKey, Str, WorkloadUid},
    outcome::LocalWorkload,
    policy::{AuthorizationPolicy, PolicyScope},
    service::{CidrVip, Service},
    workload::{TunnelProtocol, Workload},
};

mod endpoints;
mod records;
pub(crate) mod shard;
#[cfg(test)]
mod tests;

pub use endpoints::{Endpoint, Endpoints};
pub(crate) use endpoints::{Place, Run};
use records::Records;
use shard::Sharded;

/// An immutable snapshot of the mesh. `Default` knows nothing.
#[derive(Clone, Debug, Default)]
pub struct MeshView {
    version: u64,
    workloads: Records,
    services: Sharded<NamespacedHostname, Arc<Service>>,
    by_vip: Sharded<NetworkAddress, Vec<NamespacedHostname>>,
    by_cidr: Sharded<CidrVip, Vec<NamespacedHostname>>,
    /// How many CIDR VIPs there are of each prefix length, by family: what a lookup has to try.
    cidr_lengths: Arc<BTreeMap<(bool, u8), usize>>,
    by_hostname: Sharded<Str, Vec<NamespacedHostname>>,
    /// Of known services, and staged for those to come.
    endpoints: Sharded<NamespacedHostname, Arc<Endpoints>>,
    policies: Sharded<PolicyKey, Arc<AuthorizationPolicy>>,
    by_namespace: Sharded<Str, BTreeSet<PolicyKey>>,
    global: Arc<BTreeSet<PolicyKey>>,
}

/// One resource, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A workload.
    Workload(Workload),
    /// A service.
    Service(Service),
    /// An authorization policy.
    Policy(AuthorizationPolicy),
}

impl From<Workload> for Resource {
    fn from(workload: Workload) -> Self {
        Self::Workload(workload)
    }
}

impl From<Service> for Resource {
    fn from(service: Service) -> Self {
        Self::Service(service)
    }
}

impl From<AuthorizationPolicy> for Resource {
    fn from(policy: AuthorizationPolicy) -> Self {
        Self::Policy(policy)
    }
}

/// A resource that is gone, by its name on the wire. Policies and services share a form of name, so the type that the
/// name came with is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Of the Address type: a workload's uid, or a service's `namespace/hostname`.
    Address(Str),
    /// Of the Authorization type: `namespace/name`.
    Policy(Str),
}

/// What one xDS response changes, in the order of the wire: upserts, then removals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// Resources that are new or changed.
    pub upserts: Vec<Resource>,
    /// Resources that are gone; unknown names are no error.
    pub removals: Vec<Removal>,
}

/// What an update changed: resources sent again unchanged are not in it. Not sorted; a key may occur twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Added, changed or removed.
    pub workloads: Vec<WorkloadUid>,
    /// Added, changed or removed.
    pub services: Vec<NamespacedHostname>,
    /// Added, changed or removed.
    pub policies: Vec<PolicyKey>,
}

impl Changes {
    /// Whether the view is as before.
    pub fn is_empty(&self) -> bool {
        self.workloads.is_empty() && self.services.is_empty() && self.policies.is_empty()
    }
}

/// The policies that apply to a workload.
#[derive(Clone, Debug, Default)]
pub struct Applicable<'a> {
    /// Without repetition: global ones, its namespace's, those it names.
    pub policies: Vec<&'a Arc<AuthorizationPolicy>>,
    /// The first policy that it names and that is not known (yet).
    pub unknown: Option<&'a PolicyKey>,
}

/// Reading.
impl MeshView {
    /// How many workloads, services and policies it holds.
    pub fn sizes(&self) -> [usize; 3] {
        [
            self.workloads.len(),
            self.services.len(),
            self.policies.len(),
        ]
    }

    /// Counts the updates that changed something.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The workload of this uid.
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload at this address. Where several share it: a pod first, then one that speaks HBONE, then the
    /// first by uid (node-tunnel 4.6). Never one in host-network mode.
    pub fn workload_at(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.workloads.at(address).min_by_key(|it| {
            let hbone = it.tunnel_protocol == TunnelProtocol::Hbone;
            (!it.uid.is_pod(), !hbone, &it.uid)
        })
    }

    /// The record that a pod of this node is bound to, never by address. An empty `node` takes every record for local.
    pub fn local_workload(&self, pod: &LocalWorkload, node: &str) -> Option<&Arc<Workload>> {
        let records = self.workloads.bound(pod);
        let here = records.filter(|it| node.is_empty() || &*it.node == node);
        here.min_by_key(|it| (!it.uid.is_pod(), &it.uid))
    }

    /// The service of this key, seen by everyone or not.
    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service that clients of namespace `client` reach at this address. An exact address beats a range. Among
    /// services of one address: own namespace, canonical, first seen; among ranges: own namespace, longest prefix,
    /// canonical (node-tunnel 3.7).
    pub fn service_at(&self, address: &NetworkAddress, client: &str) -> Option<&Arc<Service>> {
        let exact = self.by_vip.get(address);
        exact
            .and_then(|keys| best(self.visible(keys, client), client))
            .or_else(|| self.service_of_range(address, client))
    }

    /// Every service at exactly this address, first seen first, whoever may see it.
    pub fn services_at(&self, address: &NetworkAddress) -> impl Iterator<Item = &Arc<Service>> {
        let keys = self.by_vip.get(address).into_iter().flatten();
        keys.filter_map(|key| self.services.get(key))
    }

    fn service_of_range(&self, address: &NetworkAddress, client: &str) -> Option<&Arc<Service>> {
        let v6 = address.address.is_ipv6();
        let lengths = self.cidr_lengths.range((v6, 0)..=(v6, u8::MAX)).rev();
        let ranges = lengths.filter_map(|((_, length), _)| range(address, *length));
        let keys = ranges.filter_map(|range| Some((range.cidr, self.by_cidr.get(&range)?)));
        let found = keys.flat_map(|(cidr, keys)| {
            let services = self.visible(keys, client);
            services.map(move |service| (cidr.prefix_len(), service))
        });
        found
            .min_by_key(|(length, service)| {
                let foreign = &*service.namespace != client;
                (foreign, u8::MAX - length, !service.canonical)
            })
            .map(|(_, service)| service)
    }

    fn visible<'a>(
        &'a self,
        keys: &'a [NamespacedHostname],
        client: &str,
    ) -> impl Iterator<Item = &'a Arc<Service>> {
        let services = keys.iter().filter_map(|key| self.services.get(key));
        services.filter(move |service| service.visible_to(client))
    }

    /// Every service of this host name, first seen first, whoever may see it.
    pub fn services_by_hostname(&self, hostname: &str) -> impl Iterator<Item = &Arc<Service>> {
        let keys = self.by_hostname.get(hostname).into_iter().flatten();
        keys.filter_map(|key| self.services.get(key))
    }

    /// The service that clients of namespace `client` mean by this host name: own namespace, canonical, first seen.
    pub fn service_by_hostname(&self, hostname: &str, client: &str) -> Option<&Arc<Service>> {
        best(
            self.visible(self.by_hostname.get(hostname)?, client),
            client,
        )
    }

    /// The endpoints of a service, known already or not; none for a service that has none.
    pub fn endpoints(&self, key: &NamespacedHostname) -> Arc<Endpoints> {
        self.endpoints.get(key).cloned().unwrap_or_default()
    }

    pub(crate) fn endpoints_of(&self, key: &NamespacedHostname) -> Option<&Endpoints> {
        self.endpoints.get(key).map(|endpoints| &**endpoints)
    }

    /// Services that have endpoints and are not known yet, sorted.
    pub fn staged(&self) -> impl Iterator<Item = &NamespacedHostname> {
        let keys = self.endpoints.iter().map(|(key, _)| key);
        let staged: BTreeSet<_> = keys.filter(|key| self.service(key).is_none()).collect();
        staged.into_iter()
    }

    /// The policy of this key.
    pub fn policy(&self, key: &PolicyKey) -> Option<&Arc<AuthorizationPolicy>> {
        self.policies.get(key)
    }

    /// The policies that apply to a workload (node-tunnel 5.1).
    pub fn policies_for<'a>(&'a self, workload: &'a Workload) -> Applicable<'a> {
        let own = self.by_namespace.get(&*workload.namespace);
        let named = &workload.authorization_policies;
        let mut keys: Vec<_> = self
            .global
            .iter()
            .chain(own.into_iter().flatten())
            .collect();
        let implied = keys.len();
        for key in named {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let unknown = keys[implied..]
            .iter()
            .find(|key| self.policy(key).is_none());
        Applicable {
            unknown: unknown.copied(),
            policies: keys.iter().filter_map(|key| self.policy(key)).collect(),
        }
    }

    /// Every workload, in no order that means anything.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter()
    }

    /// Every service, in no order that means anything.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().map(|(_, service)| service)
    }

    /// Every policy, in no order that means anything.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<AuthorizationPolicy>> {
        self.policies.iter().map(|(_, policy)| policy)
    }
}

/// Own namespace, then canonical, then first seen.
fn best<'a>(
    services: impl Iterator<Item = &'a Arc<Service>>,
    client: &str,
) -> Option<&'a Arc<Service>> {
    services.min_by_key(|service| (&*service.namespace != client, !service.canonical))
}

/// The range of this prefix length that holds the address.
fn range(address: &NetworkAddress, length: u8) -> Option<CidrVip> {
    let cidr = IpNet::new(address.address, length).ok()?;
    Some(CidrVip {
        network: address.network.clone(),
        cidr: cidr.trunc(),
    })
}

/// Changing.
impl MeshView {
    /// Applies one response in the order of the wire, and tells what it changed.
    ///
    /// Cost: in proportion to what changes, plus about a hundred entries per index that is touched where the view is
    /// shared.
    pub fn apply(&mut self, update: Update) -> Changes {
        let mut changes = Changes::default();
        for resource in update.upserts {
            match resource {
                Resource::Workload(it) => changes.workloads.extend(self.upsert_workload(it)),
                Resource::Service(it) => changes.services.extend(self.upsert_service(it)),
                Resource::Policy(it) => changes.policies.extend(self.upsert_policy(it)),
            }
        }
        for removal in update.removals {
            match removal {
                Removal::Address(name) => self.remove_address(name, &mut changes),
                Removal::Policy(name) => changes.policies.extend(self.remove_policy(&name)),
            }
        }
        self.version += u64::from(!changes.is_empty());
        changes
    }

    /// A known uid is a workload; anything else may be a service.
    fn remove_address(&mut self, name: Str, changes: &mut Changes) {
        let uid = WorkloadUid(name);
        if let Some(workload) = self.workloads.remove(&uid) {
            self.move_workload(Some(&workload), None);
            changes.workloads.push(uid);
        } else if let Ok(key) = uid.0.parse()
            && let Some(service) = self.services.remove(&key)
        {
            self.move_service(Some(&service), None);
            changes.services.push(key);
        }
    }

    fn upsert_workload(&mut self, workload: Workload) -> Option<WorkloadUid> {
        let (uid, new) = (workload.uid.clone(), Arc::new(workload));
        let old = self.workloads.get(&uid).cloned();
        if old.as_ref() == Some(&new) {
            return None;
        }
        self.workloads.insert(Arc::clone(&new));
        self.move_workload(old.as_ref(), Some(&new));
        Some(uid)
    }

    /// Brings the endpoints from one version of a workload to the next.
    fn move_workload(&mut self, old: Option<&Arc<Workload>>, new: Option<&Arc<Workload>>) {
        if let Some(old) = old {
            self.withdraw(old, new);
        }
        if let Some(new) = new {
            for key in new.services.keys() {
                let workload = Arc::clone(new);
                self.change_endpoints(key, |it| it.insert(key, workload));
            }
        }
    }

    /// Takes out the endpoints of the old version that the new one will not simply replace.
    fn withdraw(&mut self, old: &Workload, new: Option<&Arc<Workload>>) {
        for key in old.services.keys() {
            let stays = new.is_some_and(|it| same_place(old, it, key));
            if !stays {
                self.change_endpoints(key, |endpoints| endpoints.remove(old));
            }
        }
    }

    fn change_endpoints(&mut self, key: &NamespacedHostname, change: impl FnOnce(&mut Endpoints)) {
        self.endpoints.update(key.clone(), |endpoints| {
            let endpoints = Arc::make_mut(endpoints);
            change(endpoints);
            !endpoints.is_empty()
        });
    }

    fn upsert_service(&mut self, service: Service) -> Option<NamespacedHostname> {
        let (key, new) = (service.key(), Arc::new(service));
        let old = self.services.get(&key).cloned();
        if old.as_ref() == Some(&new) {
            return None;
        }
        self.services.insert(key.clone(), Arc::clone(&new));
        self.move_service(old.as_ref(), Some(&new));
        Some(key)
    }

    /// Brings the indexes from one version of a service to the next.
    fn move_service(&mut self, old: Option<&Arc<Service>>, new: Option<&Arc<Service>>) {
        let Some(key) = old.or(new).map(|it| it.key()) else {
            return;
        };
        let vips = |it: &Arc<Service>| it.vips.iter().cloned().collect();
        move_keys(&mut self.by_vip, &key, old.map(vips), new.map(vips));
        let host = |it: &Arc<Service>| BTreeSet::from([it.hostname.clone()]);
        move_keys(&mut self.by_hostname, &key, old.map(host), new.map(host));
        let cidrs = |it: &Arc<Service>| it.cidr_vips.iter().cloned().collect::<BTreeSet<_>>();
        let (old, new) = (old.map(cidrs), new.map(cidrs));
        self.count_lengths(old.as_ref(), new.as_ref());
        move_keys(&mut self.by_cidr, &key, old, new);
    }

    fn count_lengths(&mut self, old: Option<&BTreeSet<CidrVip>>, new: Option<&BTreeSet<CidrVip>>) {
        if old.map_or(0, BTreeSet::len) == 0 && new.map_or(0, BTreeSet::len) == 0 {
            return;
        }
        let lengths = Arc::make_mut(&mut self.cidr_lengths);
        for length in new.into_iter().flatten().map(length) {
            *lengths.entry(length).or_default() += 1;
        }
        for length in old.into_iter().flatten().map(length) {
            if let Some(count) = lengths.get_mut(&length) {
                *count -= 1;
            }
        }
        lengths.retain(|_, count| *count > 0);
    }

    fn upsert_policy(&mut self, policy: AuthorizationPolicy) -> Option<PolicyKey> {
        let (key, new) = (policy.key.clone(), Arc::new(policy));
        let old = self.policies.get(&key).cloned();
        if old.as_ref() == Some(&new) {
            return None;
        }
        self.policies.insert(key.clone(), Arc::clone(&new));
        self.move_policy(&key, old.as_ref(), Some(&new));
        Some(key)
    }

    fn remove_policy(&mut self, name: &str) -> Option<PolicyKey> {
        let key: PolicyKey = name.parse().ok()?;
        let old = self.policies.remove(&key)?;
        self.move_policy(&key, Some(&old), None);
        Some(key)
    }

    fn move_policy(
        &mut self,
        key: &PolicyKey,
        old: Option<&Arc<AuthorizationPolicy>>,
        new: Option<&Arc<AuthorizationPolicy>>,
    ) {
        let (old, new) = (old.map(|it| it.scope), new.map(|it| it.scope));
        if old == new {
            return;
        }
        let global = |scope| scope == Some(PolicyScope::Global);
        if global(old) || global(new) {
            let keys = Arc::make_mut(&mut self.global);
            keys.remove(key);
            keys.extend(global(new).then(|| key.clone()));
        }
        let own = new == Some(PolicyScope::Namespace);
        self.by_namespace.update(key.namespace.clone(), |keys| {
            keys.remove(key);
            keys.extend(own.then(|| key.clone()));
            !keys.is_empty()
        });
    }
}

/// Whether the new version of a workload simply takes the place of the old one among a service's endpoints.
fn same_place(old: &Workload, new: &Workload, service: &NamespacedHostname) -> bool {
    new.services.contains_key(service)
        && old.node == new.node
        && Place::from(old) == Place::from(new)
}

fn length(vip: &CidrVip) -> (bool, u8) {
    let v6 = matches!(vip.cidr.addr(), IpAddr::V6(_));
    (v6, vip.cidr.prefix_len())
}

/// Moves `item` from the keys it had to the keys it has now; keys of both are not touched.
fn move_keys<K, T>(
    index: &mut Sharded<K, Vec<T>>,
    item: &T,
    old: Option<BTreeSet<K>>,
    new: Option<BTreeSet<K>>,
) where
    K: std::hash::Hash + Ord + Clone,
    T: Clone + PartialEq,
{
    let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
    for key in old.difference(&new) {
        index.update(key.clone(), |items| {
            items.retain(|it| it != item);
            !items.is_empty()
        });
    }
    for key in new.difference(&old) {
        index.update(key.clone(), |items| {
            // Nearly every key has one item, and a vector that grows by itself starts with room for four.
            items.reserve_exact(1);
            items.push(item.clone());
            true
        });
    }
}
