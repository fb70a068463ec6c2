//! What a waypoint knows beside the mesh view: an immutable snapshot of its L7 resources, with the indexes that
//! decisions ask and the compiled routes.
//!
//! A clone is cheap and shares everything; [`View::apply`] copies only the shards that it touches and compiles only
//! the routes that a change touches, so a waypoint keeps one copy to change and publishes a clone after each xDS
//! response.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    attached::Attached,
    authorization::RequestPolicy,
    backend::BackendPolicy,
    config::WaypointConfig,
    name::ObjectRef,
    request_authentication::RequestAuthentication,
    route::Route,
    served::{ServedService, ServedWorkload, WorkloadLabels},
    table::{self, Move, ServiceRoutes},
    telemetry::Telemetry,
};
use crate::{
    names::{NamespacedHostname, PolicyKey, Str, WorkloadUid},
    view::shard::Sharded,
};

#[cfg(test)]
mod tests;

/// One resource of the waypoint's own type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Settings; one.
    Config(WaypointConfig),
    /// A service.
    Service(ServedService),
    /// A workload.
    Workload(ServedWorkload),
    /// Labels.
    Labels(WorkloadLabels),
    /// A route.
    Route(Route),
    /// How a service's endpoints are reached.
    Backend(Box<BackendPolicy>),
    /// Who may.
    Policy(RequestPolicy),
    /// Tokens.
    Authentication(RequestAuthentication),
    /// What is told.
    Telemetry(Telemetry),
}

impl Resource {
    /// The name on the wire: `kind/` and the key of that kind; unique among all kinds.
    pub fn name(&self) -> String {
        match self {
            Self::Config(_) => CONFIG.to_owned(),
            Self::Service(it) => format!("service/{}", it.service),
            Self::Workload(it) => format!("workload/{}", it.uid),
            Self::Labels(it) => format!("labels/{}", it.uid),
            Self::Route(it) => format!("route/{}", it.key),
            Self::Backend(it) => format!("backend/{}", it.service),
            Self::Policy(it) => format!("policy/{}", it.key),
            Self::Authentication(it) => format!("authentication/{}", it.key),
            Self::Telemetry(it) => format!("telemetry/{}", it.key),
        }
    }
}

const CONFIG: &str = "config/";

/// One response of the control plane.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// New or changed resources.
    pub upserts: Vec<Resource>,
    /// Names on the wire of what is no more. One that is not known is ignored.
    pub removals: Vec<Str>,
}

/// What a response changed; a key may be there twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Whether the settings changed.
    pub config: bool,
    /// Services.
    pub services: Vec<NamespacedHostname>,
    /// Workloads.
    pub workloads: Vec<WorkloadUid>,
    /// Workloads whose labels changed.
    pub labels: Vec<WorkloadUid>,
    /// Services whose routes changed.
    pub routed: BTreeSet<NamespacedHostname>,
    /// Services whose endpoints are reached in another way.
    pub backends: Vec<NamespacedHostname>,
    /// Policies.
    pub policies: Vec<PolicyKey>,
    /// Authentications.
    pub authentications: Vec<PolicyKey>,
    /// Telemetry.
    pub telemetry: Vec<PolicyKey>,
}

impl Changes {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// An immutable snapshot. `Default` knows nothing.
#[derive(Clone, Debug, Default)]
pub struct View {
    config: Option<Arc<WaypointConfig>>,
    services: Sharded<NamespacedHostname, Arc<ServedService>>,
    workloads: Sharded<WorkloadUid, ()>,
    labels: Sharded<WorkloadUid, Arc<BTreeMap<Str, Str>>>,
    /// Whether there are any: requests ask.
    labelled: bool,
    labels_version: u64,
    routes: Sharded<ObjectRef, Arc<Route>>,
    compiled: Sharded<NamespacedHostname, Arc<ServiceRoutes>>,
    backends: Sharded<NamespacedHostname, Arc<BackendPolicy>>,
    policies: Attached<RequestPolicy>,
    authentications: Attached<RequestAuthentication>,
    telemetry: Attached<Telemetry>,
}

/// Asking.
impl View {
    /// The settings; none: nothing is served yet.
    pub fn config(&self) -> Option<&Arc<WaypointConfig>> {
        self.config.as_ref()
    }

    /// A service that is served or led to.
    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<ServedService>> {
        self.services.get(key)
    }

    /// Whether a workload is served by its own address.
    pub fn serves_workload(&self, uid: &WorkloadUid) -> bool {
        self.workloads.get(uid).is_some()
    }

    /// Whether no workload's labels are needed.
    pub fn knows_no_labels(&self) -> bool {
        !self.labelled
    }

    /// Another one after each change of any workload's labels.
    pub fn labels_version(&self) -> u64 {
        self.labels_version
    }

    /// A workload's labels, where they are needed.
    pub fn labels(&self, uid: &WorkloadUid) -> Option<&Arc<BTreeMap<Str, Str>>> {
        self.labels.get(uid)
    }

    /// A route.
    pub fn route(&self, key: &ObjectRef) -> Option<&Arc<Route>> {
        self.routes.get(key)
    }

    /// The compiled routes of a service; none: there are no routes.
    pub fn routes_of(&self, service: &NamespacedHostname) -> Option<&Arc<ServiceRoutes>> {
        self.compiled.get(service)
    }

    /// How a service's endpoints are reached.
    pub fn backend(&self, service: &NamespacedHostname) -> Option<&Arc<BackendPolicy>> {
        self.backends.get(service)
    }

    /// Policies on requests to a service (none: to a workload's address): the waypoint's, then the service's, each in
    /// the order of their keys.
    pub fn policies_for(
        &self,
        service: Option<&NamespacedHostname>,
    ) -> impl Iterator<Item = &Arc<RequestPolicy>> {
        self.policies.of(service)
    }

    /// Authentications of requests, ordered alike.
    pub fn authentications_for(
        &self,
        service: Option<&NamespacedHostname>,
    ) -> impl Iterator<Item = &Arc<RequestAuthentication>> {
        self.authentications.of(service)
    }

    /// Telemetry of requests: the service's own, else the waypoint's.
    pub fn telemetry_for(&self, service: Option<&NamespacedHostname>) -> Option<&Arc<Telemetry>> {
        self.telemetry.own(service)
    }

    /// Every service, in no order that means anything.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServedService>> {
        self.services.iter().map(|(_, it)| it)
    }

    /// Every workload that is served, in no order that means anything.
    pub fn workloads(&self) -> impl Iterator<Item = &WorkloadUid> {
        self.workloads.iter().map(|(uid, ())| uid)
    }

    /// Every route, in no order that means anything.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.routes.iter().map(|(_, it)| it)
    }

    /// Every way to a service, in no order that means anything.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<BackendPolicy>> {
        self.backends.iter().map(|(_, it)| it)
    }

    /// Every policy, in no order that means anything.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<RequestPolicy>> {
        self.policies.all()
    }

    /// Every authentication, in no order that means anything.
    pub fn authentications(&self) -> impl Iterator<Item = &Arc<RequestAuthentication>> {
        self.authentications.all()
    }

    /// Every telemetry, in no order that means anything.
    pub fn telemetry(&self) -> impl Iterator<Item = &Arc<Telemetry>> {
        self.telemetry.all()
    }

    /// All resources, copied: for dumps.
    pub(super) fn resources(&self) -> impl Iterator<Item = Resource> {
        let config = self
            .config
            .iter()
            .map(|it| Resource::Config((**it).clone()));
        let services = self.services().map(|it| Resource::Service((**it).clone()));
        let workloads = self.workloads().map(|uid| {
            let uid = uid.clone();
            Resource::Workload(ServedWorkload { uid })
        });
        let labels = self.labels.iter().map(|(uid, labels)| {
            let (uid, labels) = (uid.clone(), (**labels).clone());
            Resource::Labels(WorkloadLabels { uid, labels })
        });
        let backends = self.backends();
        let backends = backends.map(|it| Resource::Backend(Box::new((**it).clone())));
        let authentications = self.authentications();
        let authentications = authentications.map(|it| Resource::Authentication((**it).clone()));
        config
            .chain(services)
            .chain(workloads)
            .chain(labels)
            .chain(self.routes().map(|it| Resource::Route((**it).clone())))
            .chain(backends)
            .chain(self.policies().map(|it| Resource::Policy((**it).clone())))
            .chain(authentications)
            .chain(
                self.telemetry()
                    .map(|it| Resource::Telemetry((**it).clone())),
            )
    }
}

/// Changing.
impl View {
    /// Applies one response, and tells what it changed.
    ///
    /// Cost: in proportion to what changes, plus about a hundred entries per index that is touched where the view is
    /// shared. Many routes of a service at once, and changes of where routes take effect, compile all of that service.
    pub fn apply(&mut self, update: Update) -> Changes {
        let (mut changes, mut moves) = (Changes::default(), Moves::new());
        for resource in update.upserts {
            self.upsert(resource, &mut changes, &mut moves);
        }
        for name in update.removals {
            self.remove(&name, &mut changes, &mut moves);
        }
        if !changes.labels.is_empty() {
            self.labels_version += 1;
            self.labelled = self.labels.iter().next().is_some();
        }
        for (service, moves) in moves {
            self.compiled.update(service.clone(), |routes| {
                let routes = Arc::make_mut(routes);
                routes.apply(&service, &moves);
                !routes.is_empty()
            });
            changes.routed.insert(service);
        }
        changes
    }

    fn upsert(&mut self, resource: Resource, changes: &mut Changes, moves: &mut Moves) {
        match resource {
            Resource::Config(it) => {
                changes.config |= self.config.as_deref() != Some(&it);
                self.config = Some(Arc::new(it));
            }
            Resource::Service(it) => {
                let key = it.service.clone();
                changes.services.extend(put(&mut self.services, key, it));
            }
            Resource::Workload(it) => {
                let known = self.workloads.insert(it.uid.clone(), ()).is_some();
                changes.workloads.extend((!known).then_some(it.uid));
            }
            Resource::Labels(it) => {
                changes
                    .labels
                    .extend(put(&mut self.labels, it.uid, it.labels));
            }
            Resource::Route(it) => self.put_route(it, moves),
            Resource::Backend(it) => {
                let key = it.service.clone();
                changes.backends.extend(put(&mut self.backends, key, *it));
            }
            Resource::Policy(it) => changes.policies.extend(self.policies.put(it)),
            Resource::Authentication(mut it) => {
                if let Some(last) = self.authentications.get(&it.key) {
                    it.keep_keys(last);
                }
                changes.authentications.extend(self.authentications.put(it));
            }
            Resource::Telemetry(it) => changes.telemetry.extend(self.telemetry.put(it)),
        }
    }

    fn remove(&mut self, name: &str, changes: &mut Changes, moves: &mut Moves) {
        let Some((kind, key)) = name.split_once('/') else {
            return;
        };
        let uid = || WorkloadUid(key.into());
        match kind {
            "config" => changes.config |= self.config.take().is_some(),
            "service" => changes
                .services
                .extend(take(&mut self.services, key.parse().ok())),
            "workload" => changes
                .workloads
                .extend(take(&mut self.workloads, Some(uid()))),
            "labels" => changes.labels.extend(take(&mut self.labels, Some(uid()))),
            "route" => self.take_route(key, moves),
            "backend" => changes
                .backends
                .extend(take(&mut self.backends, key.parse().ok())),
            "policy" => changes.policies.extend(self.policies.take(key)),
            "authentication" => {
                changes
                    .authentications
                    .extend(self.authentications.take(key));
            }
            "telemetry" => changes.telemetry.extend(self.telemetry.take(key)),
            _ => {}
        }
    }

    fn put_route(&mut self, route: Route, moves: &mut Moves) {
        let (key, new) = (route.key.clone(), Arc::new(route));
        let old = self.routes.insert(key, Arc::clone(&new));
        if old.as_ref() != Some(&new) {
            move_route(old.as_ref(), Some(&new), moves);
        }
    }

    fn take_route(&mut self, key: &str, moves: &mut Moves) {
        let key: Option<ObjectRef> = key.parse().ok();
        if let Some(old) = key.and_then(|key| self.routes.remove(&key)) {
            move_route(Some(&old), None, moves);
        }
    }
}

/// What becomes of the routes of each service.
type Moves = BTreeMap<NamespacedHostname, Vec<Move>>;

fn move_route(old: Option<&Arc<Route>>, new: Option<&Arc<Route>>, moves: &mut Moves) {
    let attachments = old.into_iter().chain(new).flat_map(|it| &it.attachments);
    let services: BTreeSet<_> = attachments.map(|it| &it.service).collect();
    for service in services {
        let attached = |it: &&Arc<Route>| table::own(it, service).next().is_some();
        moves.entry(service.clone()).or_default().push(Move {
            old: old.filter(attached).cloned(),
            new: new.filter(attached).cloned(),
        });
    }
}

/// The key, if the value is a new one.
fn put<K, V>(map: &mut Sharded<K, Arc<V>>, key: K, value: V) -> Option<K>
where
    K: std::hash::Hash + Eq + Clone,
    V: PartialEq,
{
    if map.get(&key).is_some_and(|old| **old == value) {
        return None;
    }
    map.insert(key.clone(), Arc::new(value));
    Some(key)
}

/// The key, if there was one.
fn take<K, V: Clone>(map: &mut Sharded<K, V>, key: Option<K>) -> Option<K>
where
    K: std::hash::Hash + Eq + Clone,
{
    let key = key?;
    map.remove(&key).map(|_| key)
}
