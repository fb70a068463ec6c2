//! The world: the sources and the graph over them, kept current by a thread of its own.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::{Hash, Hasher},
    io::{self, Read as _, Write as _},
    net::IpAddr,
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, OnceLock, Weak, mpsc},
    thread,
    time::SystemTime,
};

use mesh::names::Str;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, mpsc::WeakSender, watch};

use crate::{
    graph::Runs,
    object::{Kind, Name, ObjectRef, Pod},
    output::{
        Condition, GatewayProxy, ObjectStatus, ObjectVersion, ParentStatus, Pending,
        PendingStatuses, PodFacts, Resource, ResourceKey, Resources, StatusChange, Subscription,
    },
    source::{
        cluster::{Event, Feed},
        files::Files,
        watch::{Change, Watcher},
    },
    translate::l7::credential,
    translate::l7::istio::request_authentication::{Fetched, KeySource},
    translate::{
        allocate,
        remote::{ExportKey, Exported},
        waypoint,
    },
    wiring::{OfPods, Parents, Readers, Wiring},
};

mod cluster;
mod view;

pub use crate::translate::{FailurePolicy, Settings};
pub(crate) use view::is_revised;
pub use view::{Selectors, selects};

/// Why the world did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The folders cannot be read or watched.
    #[error("watch the folders {folders:?}")]
    Folders {
        /// Which.
        folders: Vec<PathBuf>,
        /// The cause.
        source: io::Error,
    },
    /// The system refused what the thread needs.
    #[error("start the thread that keeps the world current")]
    Thread(#[source] io::Error),
}

/// The mesh as computed from its sources. Cheap to clone; the last clone dropped ends the thread behind it.
#[derive(Clone, Debug)]
pub struct World {
    shared: Arc<Shared>,
    /// Wakes the thread of a folder's world; closed with the last handle, for its end.
    wake: Option<Arc<io::PipeWriter>>,
}

/// One reader's place in the stream of statuses. The newest state of each object is told, never an older one.
#[derive(Debug)]
pub struct StatusSubscription {
    shared: Arc<Shared>,
    pending: Arc<PendingStatuses>,
}

/// Figures of the work done, for metrics.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Batches of changes taken in.
    pub batches: u64,
    /// Files read, or events of the API server.
    pub files: u64,
    /// Resources changed.
    pub resources: u64,
    /// Seconds from the last changed file to its resources being published.
    pub last_seconds: f64,
    /// How often each kind was computed.
    pub computed: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Default)]
struct Shared {
    state: RwLock<State>,
    /// Kinds of which no whole list has come yet; empty once the world is whole.
    unlisted: watch::Sender<BTreeSet<Kind>>,
    /// Told whenever pods changed.
    pods_changed: watch::Sender<()>,
    /// Where keys of tokens are to be fetched.
    key_sources: watch::Sender<BTreeSet<KeySource>>,
    /// What came of fetching, until the thread takes it.
    keys: Mutex<BTreeMap<KeySource, Option<Fetched>>>,
    /// Secrets that are to be read.
    secrets: watch::Sender<BTreeSet<Name>>,
    /// What came of reading them, until the thread takes it.
    credentials: Mutex<BTreeMap<Name, Option<credential::Found>>>,
    /// How many sources of keys and Secrets nothing has come of yet.
    unanswered: watch::Sender<usize>,
    /// What other clusters are to be told, until they are.
    exports: Exports,
    /// Wakes the thread of a world that is fed.
    feed: OnceLock<WeakSender<Event>>,
}

#[derive(Debug, Default)]
struct State {
    resources: Resources,
    subscribers: Vec<Weak<Pending>>,
    status_subscribers: Vec<Weak<PendingStatuses>>,
    /// What the source says, and what translation says.
    reports: BTreeMap<ObjectRef, ObjectStatus>,
    /// Which versions of the API server's objects the reports speak of.
    versions: HashMap<ObjectRef, ObjectVersion>,
    /// Addresses given to hosts of ServiceEntries, by entry.
    addresses: HashMap<Name, BTreeMap<Str, Vec<IpAddr>>>,
    conditions: HashMap<ObjectRef, Arc<Vec<Condition>>>,
    /// Of routes and policies of the Gateway API.
    parents: HashMap<ObjectRef, Arc<Vec<ParentStatus>>>,
    file_reports: Vec<ObjectStatus>,
    pods: Pods,
    /// Who may read as a waypoint or a gateway between networks, by Gateway.
    readers: HashMap<Name, Arc<Readers>>,
    figures: Figures,
}

/// Pods that have not ended, with the ways in which the certificate authority looks for them.
#[derive(Debug, Default)]
struct Pods {
    by_name: HashSet<ByName>,
    by_uid: HashSet<ByUid>,
    by_node: HashMap<Str, Vec<Arc<Pod>>>,
}

/// A pod that is found by its name, which it carries itself.
#[derive(Debug)]
struct ByName(Arc<Pod>);

/// A pod that is found by its uid, if it has one.
#[derive(Debug)]
struct ByUid(Arc<Pod>);

impl World {
    /// Reads the folders once and keeps watching them. Blocking: when it returns, the first state is complete.
    ///
    /// The first folder is the user's; objects of later ones (the supervisor's state) are merged over those of the same
    /// kind, namespace and name for what an API server would own: `status`, `metadata.uid`, the redirection annotation,
    /// `spec.clusterIP(s)` and `spec.nodeName`.
    pub fn start(folders: &[PathBuf], settings: Settings) -> Result<Self, StartError> {
        let shared = Arc::<Shared>::default();
        let (wake, stop) = io::pipe().map_err(StartError::Thread)?;
        let (report, started) = mpsc::channel();
        let keeper = (folders.to_vec(), shared.clone(), wake);
        thread::Builder::new()
            .name("world".to_owned())
            .spawn(move || {
                let (folders, shared, wake) = keeper;
                match Keeper::start(&folders, settings, shared) {
                    Ok(mut keeper) => {
                        // The starter may have gone: then `wake` ends the loop.
                        let _ = report.send(Ok(()));
                        keeper.run(&wake);
                    }
                    Err(error) => drop(report.send(Err(error))),
                }
            })
            .map_err(StartError::Thread)?;
        let failed = |source| StartError::Folders {
            folders: folders.to_vec(),
            source,
        };
        started
            .recv()
            .map_err(|_| StartError::Thread(io::Error::other("the thread ended at once")))?
            .map_err(failed)?;
        Ok(Self {
            shared,
            wake: Some(Arc::new(stop)),
        })
    }

    /// A world that is fed by others, empty until every kind has been listed once (see [`World::listed`]). Its thread
    /// ends with the last clone of the feed. Needs a runtime.
    pub fn fed(
        kinds: BTreeSet<Kind>,
        settings: Settings,
        selectors: Selectors,
    ) -> Result<(Self, Feed), StartError> {
        let shared = Arc::<Shared>::default();
        shared.unlisted.send_replace(kinds);
        let feed =
            cluster::spawn(shared.clone(), settings, selectors).map_err(StartError::Thread)?;
        let world = Self { shared, wake: None };
        Ok((world, feed))
    }

    /// Waits until the world is whole.
    pub async fn listed(&self) {
        let mut unlisted = self.shared.unlisted.subscribe();
        // The sender lives as long as this handle.
        let _ = unlisted.wait_for(BTreeSet::is_empty).await;
    }

    /// The kinds that the world waits for before it is whole.
    pub fn unlisted(&self) -> BTreeSet<Kind> {
        self.shared.unlisted.borrow().clone()
    }

    /// A reader of what is to be written into the statuses of objects of these kinds: at first of all there are.
    pub fn subscribe_statuses(&self, kinds: &[Kind]) -> StatusSubscription {
        let pending = Arc::new(PendingStatuses::new(kinds));
        let mut state = self.shared.state.write();
        pending.note(state.reports.keys());
        state
            .status_subscribers
            .retain(|known| known.strong_count() > 0);
        state.status_subscribers.push(Arc::downgrade(&pending));
        StatusSubscription {
            shared: self.shared.clone(),
            pending,
        }
    }

    /// A reader of everything there is and of every change from now on.
    pub fn subscribe(&self) -> Subscription {
        let mut state = self.shared.state.write();
        let (subscription, pending) = Subscription::new(&state.resources);
        state.subscribers.retain(|known| known.strong_count() > 0);
        state.subscribers.push(Arc::downgrade(&pending));
        subscription
    }

    /// How many objects of a kind there are of which something is said: all but pods and their like.
    pub fn count(&self, kind: Kind) -> usize {
        let state = self.shared.state.read();
        let of_kind = state.reports.keys().filter(|object| object.kind == kind);
        of_kind.count()
    }

    /// What there is to say of every object, ordered by kind, namespace and name; then of files and ignored kinds.
    pub fn statuses(&self) -> Vec<ObjectStatus> {
        let state = self.shared.state.read();
        let objects = state.reports.iter().map(|(object, report)| ObjectStatus {
            conditions: state.conditions_of(object),
            parents: state.parents.get(object).cloned().unwrap_or_default(),
            ..report.clone()
        });
        objects.chain(state.file_reports.iter().cloned()).collect()
    }

    /// The pods on a node that have not ended (phase neither `Succeeded` nor `Failed`).
    pub fn pods_on_node(&self, node: &str) -> Vec<PodFacts> {
        let pods = &self.shared.state.read().pods;
        let mut found: Vec<_> = pods.by_node.get(node).into_iter().flatten().collect();
        found.sort_by(|a, b| a.meta.name.cmp(&b.meta.name));
        found.into_iter().map(|pod| facts(pod)).collect()
    }

    /// The pod with Kubernetes' uid `uid`, if it has not ended.
    pub fn pod_by_uid(&self, uid: &str) -> Option<PodFacts> {
        let pods = &self.shared.state.read().pods;
        pods.by_uid.get(uid).map(|ByUid(pod)| facts(pod))
    }

    /// Whether a pod of this service account that has not ended runs on the node (the check behind impersonation).
    pub fn runs_on_node(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let pods = &self.shared.state.read().pods;
        let mut found = pods.by_node.get(node).into_iter().flatten();
        found.any(|pod| {
            &*pod.meta.name.namespace == namespace && &*pod.service_account == service_account
        })
    }

    /// Changes whenever pods have come, gone or moved.
    pub fn pods_changed(&self) -> watch::Receiver<()> {
        self.shared.pods_changed.subscribe()
    }

    /// The Gateway of whose managed proxy's pods this account is. Where it is of several Gateways', the pod of that
    /// name decides, else the first by name.
    pub fn gateway_of(
        &self,
        namespace: &str,
        service_account: &str,
        pod: Option<&str>,
    ) -> Option<GatewayProxy> {
        let state = self.shared.state.read();
        let of_account = |gateway: &Name| {
            let readers = state.readers.get(gateway);
            &*gateway.namespace == namespace
                && readers.is_some_and(|it| it.accounts.contains(service_account))
        };
        let of_pod = pod.and_then(|pod| {
            let pod = Name::new(namespace, pod);
            let ByName(pod) = state.pods.by_name.get(&pod)?;
            let is_its = &*pod.service_account == service_account;
            let gateway = waypoint::managed_instance_of(&pod.meta)?;
            (is_its && of_account(&gateway)).then_some(gateway)
        });
        let gateway = of_pod.or_else(|| {
            let all = state.readers.keys().filter(|gateway| of_account(gateway));
            all.min().cloned()
        })?;
        Some(GatewayProxy {
            confined: state.readers.get(&gateway).is_none_or(|it| it.confined),
            gateway,
        })
    }

    /// What is told other clusters since the last call: at first everything. Waits while there is nothing; never empty. For one
    /// reader. Safe to cancel: nothing is lost.
    pub async fn next_exports(&self) -> Changed<ExportKey, Exported> {
        loop {
            let changed = self.take_exports();
            if !changed.is_empty() {
                return changed;
            }
            // A permit is stored for a notification between the look above and this wait.
            self.shared.exports.ready.notified().await;
        }
    }

    /// As [`World::next_exports`], without waiting; may be empty.
    pub fn take_exports(&self) -> Changed<ExportKey, Exported> {
        let changed = std::mem::take(&mut *self.shared.exports.changed.lock());
        changed.into_iter().collect()
    }

    /// Where keys of tokens are to be fetched.
    pub fn key_sources(&self) -> watch::Receiver<BTreeSet<KeySource>> {
        self.shared.key_sources.subscribe()
    }

    /// Takes in what came of fetching keys; `None`: nobody fetches them any more.
    pub fn set_keys(&self, source: KeySource, fetched: Option<Fetched>) {
        self.shared.keys.lock().insert(source, fetched);
        self.wake();
    }

    /// Secrets that are to be read for waypoints.
    pub fn secrets(&self) -> watch::Receiver<BTreeSet<Name>> {
        self.shared.secrets.subscribe()
    }

    /// Takes in what came of reading a Secret; `None`: nobody reads it any more.
    pub fn set_credential(&self, secret: Name, found: Option<credential::Found>) {
        self.shared.credentials.lock().insert(secret, found);
        self.wake();
    }

    /// Waits until something has come of every source of keys and every Secret. Who tells proxies before would take away
    /// from them what they were told by a control plane before this one.
    pub async fn answered(&self) {
        let mut unanswered = self.shared.unanswered.subscribe();
        // The sender lives as long as this handle.
        let _ = unanswered.wait_for(|count| *count == 0).await;
    }

    fn wake(&self) {
        if let Some(mut wake) = self.wake.as_deref() {
            // A pipe that cannot be written to has lost its thread.
            let _ = wake.write_all(&[0]);
        }
        if let Some(feed) = self.shared.feed.get().and_then(WeakSender::upgrade) {
            // Where the queue is full, the thread is about to look anyway.
            let _ = feed.try_send(Event::Keys);
        }
    }

    /// Figures of the work done so far.
    pub fn figures(&self) -> Figures {
        self.shared.state.read().figures.clone()
    }
}

impl StatusSubscription {
    /// The objects whose conditions or generation changed since the last call, as they are now. Waits while there are
    /// none; never empty. Safe to cancel: nothing is lost.
    pub async fn next(&mut self) -> Vec<StatusChange> {
        let changed = self.pending.take().await;
        let state = self.shared.state.read();
        changed
            .into_iter()
            .map(|object| state.status_change(object))
            .collect()
    }
}

impl State {
    /// What the source and translation say of an object, ordered by type.
    fn conditions_of(&self, object: &ObjectRef) -> Vec<Condition> {
        let read = self.reports.get(object).into_iter();
        let derived = self.conditions.get(object).into_iter();
        let mut conditions: Vec<Condition> = read
            .flat_map(|report| report.conditions.iter().cloned())
            .chain(derived.flat_map(|list| list.iter().cloned()))
            .collect();
        conditions.sort();
        // The writer of statuses keeps them, of each object.
        conditions.shrink_to_fit();
        conditions
    }

    fn status_change(&self, object: ObjectRef) -> StatusChange {
        let hosts = match object.kind {
            Kind::ServiceEntry => self.addresses.get(&object.name),
            _ => None,
        };
        let pairs = |(host, addresses): (&Str, &Vec<IpAddr>)| {
            let host = host.clone();
            addresses
                .clone()
                .into_iter()
                .map(move |ip| (host.clone(), ip))
        };
        StatusChange {
            version: self.versions.get(&object).cloned(),
            conditions: self.conditions_of(&object),
            parents: self.parents.get(&object).cloned().unwrap_or_default(),
            addresses: hosts.into_iter().flatten().flat_map(pairs).collect(),
            object,
        }
    }

    fn allocate(&mut self, (entry, host): allocate::Host, addresses: Option<&Vec<IpAddr>>) {
        let hosts = self.addresses.entry(entry.clone()).or_default();
        match addresses {
            Some(addresses) => hosts.insert(host, addresses.clone()),
            None => hosts.remove(&host),
        };
        if hosts.is_empty() {
            self.addresses.remove(&entry);
        }
    }
}

impl Pods {
    fn set(&mut self, name: &Name, pod: Option<Arc<Pod>>) {
        if let Some(ByName(old)) = self.by_name.take(name) {
            self.by_uid.remove(uid(&old));
            if let Some(pods) = self.by_node.get_mut(&old.node) {
                pods.retain(|known| !Arc::ptr_eq(known, &old));
                if pods.is_empty() {
                    self.by_node.remove(&old.node);
                }
            }
        }
        let Some(pod) = pod.filter(|pod| !pod.ended) else {
            return;
        };
        if !uid(&pod).is_empty() {
            self.by_uid.replace(ByUid(pod.clone()));
        }
        if !pod.node.is_empty() {
            let of_node = self.by_node.entry(pod.node.clone()).or_default();
            of_node.push(pod.clone());
        }
        self.by_name.insert(ByName(pod));
    }
}

fn uid(pod: &Pod) -> &str {
    pod.meta.uid.as_deref().unwrap_or_default()
}

fn name(pod: &Pod) -> &Name {
    &pod.meta.name
}

macro_rules! found_by {
    ($pod:ty, $key:ty, $of:expr) => {
        impl Borrow<$key> for $pod {
            fn borrow(&self) -> &$key {
                $of(&self.0)
            }
        }

        impl Hash for $pod {
            fn hash<H: Hasher>(&self, state: &mut H) {
                Borrow::<$key>::borrow(self).hash(state);
            }
        }

        impl PartialEq for $pod {
            fn eq(&self, other: &Self) -> bool {
                Borrow::<$key>::borrow(self) == Borrow::<$key>::borrow(other)
            }
        }

        impl Eq for $pod {}
    };
}

found_by!(ByName, Name, name);
found_by!(ByUid, str, uid);

fn facts(pod: &Pod) -> PodFacts {
    PodFacts {
        uid: pod.meta.uid.clone().unwrap_or_default(),
        namespace: pod.meta.name.namespace.clone(),
        name: pod.meta.name.name.clone(),
        service_account: pod.service_account.clone(),
        node: pod.node.clone(),
    }
}

/// What the thread of a folder's world owns.
struct Keeper {
    watcher: Watcher,
    files: Files,
    publisher: Publisher,
}

/// The graph, and where what comes out of it goes.
struct Publisher {
    wiring: Wiring,
    shared: Arc<Shared>,
}

/// What the source says of one object: `None` when it is no more.
struct Reported {
    object: ObjectRef,
    status: Option<ObjectStatus>,
    version: Option<ObjectVersion>,
}

/// What changed of what other clusters are told. Merged: at most one entry per key, however slow the reader.
#[derive(Debug, Default)]
struct Exports {
    changed: Mutex<BTreeMap<ExportKey, Option<Arc<Exported>>>>,
    ready: Notify,
}

/// Keys with their values now; `None`: no more.
pub type Changed<K, V> = Vec<(K, Option<Arc<V>>)>;

/// What changed in the graph.
struct Taken {
    resources: Changed<ResourceKey, Resource>,
    conditions: Changed<ObjectRef, Arc<Vec<Condition>>>,
    parents: Changed<ObjectRef, Parents>,
    pods: Changed<Name, Pod>,
    allocated: Changed<allocate::Host, Vec<IpAddr>>,
    readers: Changed<Name, Readers>,
    sources: Changed<KeySource, ()>,
    secrets: Changed<Name, ()>,
    exports: Changed<ExportKey, Exported>,
}

impl Taken {
    /// Adds everything that was published and is not among it.
    fn add_gone(&mut self, state: &State, shared: &Shared) {
        let hosts = state.addresses.iter().flat_map(|(entry, hosts)| {
            let of_entry = hosts.keys().map(|host| (entry.clone(), host.clone()));
            of_entry.collect::<Vec<_>>()
        });
        gone(&mut self.resources, state.resources.keys());
        gone(&mut self.conditions, state.conditions.keys().cloned());
        gone(&mut self.parents, state.parents.keys().cloned());
        let pods = state.pods.by_name.iter();
        gone(
            &mut self.pods,
            pods.map(|ByName(pod)| pod.meta.name.clone()),
        );
        gone(&mut self.allocated, hosts);
        gone(&mut self.readers, state.readers.keys().cloned());
        gone(
            &mut self.sources,
            shared.key_sources.borrow().iter().cloned(),
        );
        gone(&mut self.secrets, shared.secrets.borrow().iter().cloned());
    }
}

fn gone<K: Ord + Clone, V>(changed: &mut Changed<K, V>, known: impl Iterator<Item = K>) {
    let there: BTreeSet<K> = changed.iter().map(|(key, _)| key.clone()).collect();
    let gone = known.filter(|key| !there.contains(key));
    changed.extend(gone.map(|key| (key, None)));
}

/// What a batch cost, for figures.
#[derive(Clone, Copy, Debug, Default)]
struct Batch {
    /// Files read, or events of the API server.
    inputs: u64,
    /// When the last of them changed, seconds and nanoseconds since 1970.
    changed: Option<(i64, i64)>,
    /// The graph is another one than the last time: what it does not hold is no more.
    is_anew: bool,
}

impl Keeper {
    fn start(folders: &[PathBuf], settings: Settings, shared: Arc<Shared>) -> io::Result<Self> {
        let mut keeper = Self {
            watcher: Watcher::new(folders)?,
            files: Files::default(),
            publisher: Publisher {
                wiring: Wiring::new(settings, OfPods::Speak),
                shared,
            },
        };
        let changes = keeper.watcher.rescan()?;
        keeper.take_in(changes);
        Ok(keeper)
    }

    fn run(&mut self, wake: &io::PipeReader) {
        loop {
            if woken(wake) {
                match (&*wake).read(&mut [0; 64]) {
                    Ok(0) | Err(_) => return,
                    Ok(_) => self.take_in(Vec::new()),
                }
            }
            match self.watcher.next(wake) {
                Ok(changes) if changes.is_empty() => {}
                Ok(changes) => self.take_in(changes),
                // The last state stays in force; a folder that comes back is seen again.
                Err(error) => {
                    tracing::error!(%error, "watching the folders failed; the last state stays in force");
                    thread::sleep(std::time::Duration::from_secs(1));
                }
            }
        }
    }

    fn take_in(&mut self, changes: Vec<Change>) {
        let batch = Batch {
            changed: changes.iter().filter_map(|change| change.changed).max(),
            inputs: changes.len() as u64,
            is_anew: false,
        };
        let mut objects = BTreeSet::new();
        for change in changes {
            objects.extend(self.files.update(&change.file, change.content));
        }
        let mut reports = Vec::new();
        for object in objects {
            let resolved = self.files.resolve(&object);
            self.publisher.wiring.set(&object, resolved.object);
            reports.push(Reported {
                object,
                status: resolved.report,
                version: None,
            });
        }
        self.publisher.take_keys();
        self.publisher.wiring.settle();
        let file_reports = self.files.reports();
        self.publisher.publish(reports, Some(file_reports), batch);
    }
}

impl Publisher {
    /// Hands what was fetched and read to the graph.
    fn take_keys(&self) {
        let keys = std::mem::take(&mut *self.shared.keys.lock());
        for (source, fetched) in keys {
            self.wiring.set_keys(&source, fetched);
        }
        let credentials = std::mem::take(&mut *self.shared.credentials.lock());
        for (secret, found) in credentials {
            self.wiring.set_credential(&secret, found);
        }
    }

    /// What changed in the graph; of one that is another than the last time, what is other than what was published.
    fn take(&self, is_anew: bool) -> Taken {
        let wiring = &self.wiring;
        let mut taken = Taken {
            resources: wiring.resources.take(),
            conditions: wiring.conditions.take(),
            parents: wiring.parents.take(),
            pods: wiring.pods.take(),
            allocated: wiring.allocated.take(),
            readers: wiring.readers.take(),
            sources: wiring.key_sources.take(),
            secrets: wiring.secrets.take(),
            exports: wiring.exports.take(),
        };
        if is_anew {
            let state = self.shared.state.read();
            taken.add_gone(&state, &self.shared);
            let is_news = |resource: &Option<Arc<Resource>>| {
                let known = resource.as_ref().map(|new| state.resources.get(&new.key()));
                known.flatten().as_ref() != resource.as_ref() || resource.is_none()
            };
            taken.resources.retain(|(_, resource)| is_news(resource));
        }
        taken
    }

    /// One lock for everything, so that nobody sees resources and statuses of different states.
    fn publish(
        &self,
        reports: Vec<Reported>,
        file_reports: Option<Vec<ObjectStatus>>,
        batch: Batch,
    ) {
        let Taken {
            resources,
            conditions,
            parents,
            pods,
            allocated,
            readers,
            sources,
            secrets,
            exports,
        } = self.take(batch.is_anew);
        let mut guard = self.shared.state.write();
        let state = &mut *guard;
        let mut told: BTreeSet<ObjectRef> = BTreeSet::new();
        for reported in reports {
            told.extend(state.report(reported));
        }
        for (object, list) in conditions {
            match list {
                Some(list) => state.conditions.insert(object.clone(), (*list).clone()),
                None => state.conditions.remove(&object),
            };
            told.insert(object);
        }
        for (object, list) in parents {
            match list {
                Some(list) => state.parents.insert(object.clone(), (*list).clone()),
                None => state.parents.remove(&object),
            };
            told.insert(object);
        }
        for (host, addresses) in allocated {
            told.insert(ObjectRef {
                kind: Kind::ServiceEntry,
                name: host.0.clone(),
            });
            state.allocate(host, addresses.as_deref());
        }
        let pods_changed = !pods.is_empty();
        for (name, pod) in pods {
            state.pods.set(&name, pod);
        }
        for (gateway, readers) in readers {
            match readers {
                Some(readers) => state.readers.insert(gateway, readers),
                None => state.readers.remove(&gateway),
            };
        }
        for (key, resource) in &resources {
            state.resources.set(key, resource.clone());
        }
        if let Some(file_reports) = file_reports {
            state.file_reports = file_reports;
        }
        state.count(batch, resources.len(), &self.wiring.runs);
        for subscriber in state.status_subscribers.iter().filter_map(Weak::upgrade) {
            subscriber.note(&told);
        }
        if !resources.is_empty() {
            state.subscribers.retain(|known| known.strong_count() > 0);
            for subscriber in state.subscribers.iter().filter_map(Weak::upgrade) {
                subscriber.merge(resources.iter().cloned());
            }
        }
        drop(guard);
        if !exports.is_empty() {
            self.shared.exports.changed.lock().extend(exports);
            self.shared.exports.ready.notify_one();
        }
        follow(&self.shared.key_sources, sources);
        follow(&self.shared.secrets, secrets);
        self.count_unanswered();
        if pods_changed {
            self.shared.pods_changed.send_replace(());
        }
    }
}

impl Publisher {
    fn count_unanswered(&self) {
        let (sources, secrets) = (&self.shared.key_sources, &self.shared.secrets);
        let sources = sources
            .borrow()
            .iter()
            .filter(|it| !self.wiring.has_keys(it))
            .count();
        let secrets = secrets
            .borrow()
            .iter()
            .filter(|it| !self.wiring.has_credential(it))
            .count();
        // A folder's Secrets are there or not.
        let secrets = self.shared.feed.get().map_or(0, |_| secrets);
        self.shared.unanswered.send_replace(sources + secrets);
    }
}

/// Adds what is wanted now, and takes out what is not.
fn follow<K: Ord>(wanted: &watch::Sender<BTreeSet<K>>, changed: Changed<K, ()>) {
    if changed.is_empty() {
        return;
    }
    wanted.send_modify(|all| {
        for (key, is_wanted) in changed {
            match is_wanted {
                Some(_) => all.insert(key),
                None => all.remove(&key),
            };
        }
    });
}

impl State {
    /// Takes in what the source says of an object; answers with it if that is news for its status.
    fn report(&mut self, reported: Reported) -> Option<ObjectRef> {
        let Reported {
            object,
            status,
            version,
        } = reported;
        // A new resource version alone says nothing that would have to be written.
        let relevant = |version: &ObjectVersion| ObjectVersion {
            resource_version: "".into(),
            ..version.clone()
        };
        let known = self.versions.get(&object).map(relevant);
        let mut is_news = known != version.as_ref().map(relevant);
        match version {
            Some(version) => self.versions.insert(object.clone(), version),
            None => self.versions.remove(&object),
        };
        is_news |= self.reports.get(&object) != status.as_ref();
        match status {
            Some(status) => self.reports.insert(object.clone(), status),
            None => self.reports.remove(&object),
        };
        is_news.then_some(object)
    }

    fn count(&mut self, batch: Batch, resources: usize, runs: &BTreeMap<&'static str, Runs>) {
        let figures = &mut self.figures;
        figures.batches += 1;
        figures.files += batch.inputs;
        figures.resources += resources as u64;
        figures.computed = runs
            .iter()
            .map(|(kind, runs)| (*kind, runs.count()))
            .collect();
        figures.last_seconds = batch.changed.map_or(figures.last_seconds, seconds_since);
    }
}

fn woken(wake: &io::PipeReader) -> bool {
    let mut fds = [nix::poll::PollFd::new(
        wake.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn seconds_since((seconds, nanoseconds): (i64, i64)) -> f64 {
    let since = || {
        let changed = std::time::Duration::new(
            u64::try_from(seconds).ok()?,
            u32::try_from(nanoseconds).ok()?,
        );
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .ok()?;
        Some(now.saturating_sub(changed).as_secs_f64())
    };
    since().unwrap_or_default()
}

#[cfg(test)]
mod tests;
