//! The world: the sources and the graph over them, kept current by a thread of its own.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Weak, mpsc},
    thread,
    time::SystemTime,
};

use mesh::names::Str;
use parking_lot::RwLock;

use crate::{
    object::{Name, ObjectRef, Pod},
    output::{Condition, ObjectStatus, Pending, PodFacts, Resource, ResourceKey, Subscription},
    source::{
        files::Files,
        watch::{Change, Watcher},
    },
    wiring::Wiring,
};

pub use crate::translate::{FailurePolicy, Settings};

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
    /// Closed with the last handle, which wakes the thread for its end.
    _stop: Arc<io::PipeWriter>,
}

/// Figures of the work done, for metrics.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Batches of changes taken in.
    pub batches: u64,
    /// Files read.
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
}

#[derive(Debug, Default)]
struct State {
    resources: HashMap<ResourceKey, Arc<Resource>>,
    subscribers: Vec<Weak<Pending>>,
    /// What the source says, and what translation says.
    reports: BTreeMap<ObjectRef, ObjectStatus>,
    conditions: HashMap<ObjectRef, Arc<Vec<Condition>>>,
    file_reports: Vec<ObjectStatus>,
    pods: Pods,
    figures: Figures,
}

/// Pods that have not ended, with the ways in which the certificate authority looks for them.
#[derive(Debug, Default)]
struct Pods {
    by_name: HashMap<Name, PodFacts>,
    by_uid: HashMap<Str, Name>,
    by_node: HashMap<Str, BTreeSet<Name>>,
}

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
            _stop: Arc::new(stop),
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

    /// What there is to say of every object, ordered by kind, namespace and name; then of files and ignored kinds.
    pub fn statuses(&self) -> Vec<ObjectStatus> {
        let state = self.shared.state.read();
        let objects = state.reports.iter().map(|(object, report)| {
            let mut status = report.clone();
            let derived = state.conditions.get(object);
            status
                .conditions
                .extend(derived.into_iter().flat_map(|list| list.iter().cloned()));
            status.conditions.sort();
            status
        });
        objects.chain(state.file_reports.iter().cloned()).collect()
    }

    /// The pods on a node that have not ended (phase neither `Succeeded` nor `Failed`).
    pub fn pods_on_node(&self, node: &str) -> Vec<PodFacts> {
        let pods = &self.shared.state.read().pods;
        let names = pods.by_node.get(node).into_iter().flatten();
        names
            .filter_map(|name| pods.by_name.get(name).cloned())
            .collect()
    }

    /// The pod with Kubernetes' uid `uid`, if it has not ended.
    pub fn pod_by_uid(&self, uid: &str) -> Option<PodFacts> {
        let pods = &self.shared.state.read().pods;
        pods.by_name.get(pods.by_uid.get(uid)?).cloned()
    }

    /// Whether a pod of this service account that has not ended runs on the node (the check behind impersonation).
    pub fn runs_on_node(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let pods = &self.shared.state.read().pods;
        let names = pods.by_node.get(node).into_iter().flatten();
        names
            .filter_map(|name| pods.by_name.get(name))
            .any(|pod| &*pod.namespace == namespace && &*pod.service_account == service_account)
    }

    /// Figures of the work done so far.
    pub fn figures(&self) -> Figures {
        self.shared.state.read().figures.clone()
    }
}

impl Pods {
    fn set(&mut self, name: &Name, pod: Option<&Pod>) {
        if let Some(old) = self.by_name.remove(name) {
            self.by_uid.remove(&old.uid);
            if let Some(names) = self.by_node.get_mut(&old.node) {
                names.remove(name);
                if names.is_empty() {
                    self.by_node.remove(&old.node);
                }
            }
        }
        let Some(pod) = pod.filter(|pod| !pod.ended) else {
            return;
        };
        let facts = PodFacts {
            uid: pod.meta.uid.clone().unwrap_or_default(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            service_account: pod.service_account.clone(),
            node: pod.node.clone(),
        };
        if !facts.uid.is_empty() {
            self.by_uid.insert(facts.uid.clone(), name.clone());
        }
        if !facts.node.is_empty() {
            self.by_node
                .entry(facts.node.clone())
                .or_default()
                .insert(name.clone());
        }
        self.by_name.insert(name.clone(), facts);
    }
}

/// What the thread owns.
struct Keeper {
    watcher: Watcher,
    files: Files,
    wiring: Wiring,
    shared: Arc<Shared>,
}

impl Keeper {
    fn start(folders: &[PathBuf], settings: Settings, shared: Arc<Shared>) -> io::Result<Self> {
        let mut keeper = Self {
            watcher: Watcher::new(folders)?,
            files: Files::default(),
            wiring: Wiring::new(settings),
            shared,
        };
        let changes = keeper.watcher.rescan()?;
        keeper.take_in(changes);
        Ok(keeper)
    }

    fn run(&mut self, wake: &io::PipeReader) {
        while !woken(wake) {
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
        let changed = changes.iter().filter_map(|change| change.changed).max();
        let count = changes.len() as u64;
        let mut objects = BTreeSet::new();
        for change in changes {
            objects.extend(self.files.update(&change.file, change.content));
        }
        let mut reports = Vec::new();
        for object in objects {
            let resolved = self.files.resolve(&object);
            self.wiring.set(&object, resolved.object);
            reports.push((object, resolved.report));
        }
        self.wiring.settle();
        self.publish(reports, count, changed);
    }

    /// One lock for everything, so that nobody sees resources and statuses of different states.
    fn publish(
        &self,
        reports: Vec<(ObjectRef, Option<ObjectStatus>)>,
        files: u64,
        changed: Option<(i64, i64)>,
    ) {
        let resources: Vec<_> = self.wiring.resources.take();
        let conditions = self.wiring.conditions.take();
        let pods = self.wiring.pods.take();
        let file_reports = self.files.reports();
        let mut state = self.shared.state.write();
        for (object, report) in reports {
            match report {
                Some(report) => state.reports.insert(object, report),
                None => state.reports.remove(&object),
            };
        }
        for (object, list) in conditions {
            match list {
                Some(list) => state.conditions.insert(object, (*list).clone()),
                None => state.conditions.remove(&object),
            };
        }
        for (name, pod) in pods {
            state.pods.set(&name, pod.as_deref());
        }
        for (key, resource) in &resources {
            match resource {
                Some(resource) => state.resources.insert(key.clone(), resource.clone()),
                None => state.resources.remove(key),
            };
        }
        state.file_reports = file_reports;
        let figures = &mut state.figures;
        figures.batches += 1;
        figures.files += files;
        figures.resources += resources.len() as u64;
        figures.computed = self
            .wiring
            .runs
            .iter()
            .map(|(kind, runs)| (*kind, runs.count()))
            .collect();
        figures.last_seconds = changed.map_or(figures.last_seconds, seconds_since);
        if !resources.is_empty() {
            state.subscribers.retain(|known| known.strong_count() > 0);
            for subscriber in state.subscribers.iter().filter_map(Weak::upgrade) {
                subscriber.merge(resources.iter().cloned());
            }
        }
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
