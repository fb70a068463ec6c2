//! Watches the node's pods and all namespaces' labels.
//!
//! One task owns both watches. What changed goes to the agent as facts, each pod with the place of its namespace; a
//! pod whose namespace is not found yet is looked for again. While the API server is away the last picture stands.

use std::{
    collections::BTreeSet,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, Event, watcher},
    },
};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::world::{Change, World};
use crate::{
    agent::PodSource,
    facts::{Phase, PodEvent, PodFacts, Policy, REDIRECTION_ANNOTATION, Wanted},
    sandboxes::Sandboxes,
    zds_server::chain,
};

/// Events that wait for the agent; beyond that the watch waits, and with it the API server's connection.
const EVENTS: usize = 1024;
/// How soon a namespace that was not found is looked for again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Pauses of a broken watch: short, since an enrolment may wait for it.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);

/// What the watches know, for whoever must answer about one pod. Clones are the same.
#[derive(Clone)]
pub(crate) struct Known {
    world: Arc<Mutex<World>>,
    /// Counts up with every event.
    pub(super) events: watch::Sender<u64>,
    pub(crate) sandboxes: Arc<Sandboxes>,
    pub(crate) policy: Policy,
}

impl Known {
    pub(crate) fn new(sandboxes: Arc<Sandboxes>, policy: Policy) -> Self {
        Known {
            world: Arc::default(),
            events: watch::channel(0).0,
            sandboxes,
            policy,
        }
    }

    pub(super) fn with_world<T>(&self, action: impl FnOnce(&mut World) -> T) -> T {
        action(&mut self.world.lock())
    }

    /// Completes facts with where the pod's namespace is, if anyone cares. May block for some milliseconds.
    pub(crate) fn complete(&self, mut pod: PodFacts) -> PodFacts {
        if pod.host_network || matches!(pod.phase, Phase::Succeeded | Phase::Failed) {
            return pod;
        }
        let concerned = self.policy.wanted(&pod) == Wanted::In
            || pod.annotations.contains_key(REDIRECTION_ANNOTATION)
            || self.sandboxes.knows(&pod.uid);
        if concerned && let Some(sandbox) = self.sandboxes.find(&pod.uid, &pod.ips) {
            pod.netns = Some(sandbox.netns);
            if pod.ips.is_empty() {
                pod.ips = sandbox.ips;
            }
        }
        pod
    }

    /// It should be in the mesh and has an address, but nobody knows its namespace.
    fn is_lost(&self, pod: &PodFacts) -> bool {
        pod.netns.is_none()
            && !pod.ips.is_empty()
            && !pod.host_network
            && self.policy.wanted(pod) == Wanted::In
    }
}

/// Pods of one node from the API server.
pub struct KubernetesSource {
    events: mpsc::Receiver<PodEvent>,
    sandboxes: Arc<Sandboxes>,
    /// Ends with the source.
    _watch: JoinSet<()>,
}

impl KubernetesSource {
    /// Begins to watch the pods of `node`. The first event comes when the API server has answered.
    pub(crate) fn new(client: Client, node: &str, known: Known) -> Self {
        let (sender, events) = mpsc::channel(EVENTS);
        let sandboxes = known.sandboxes.clone();
        let watching = Watching {
            known,
            sender,
            lost: BTreeSet::new(),
        };
        let mut watch = JoinSet::new();
        watch.spawn(watching.run(pods(client.clone(), node), namespaces(client)));
        KubernetesSource {
            events,
            sandboxes,
            _watch: watch,
        }
    }
}

impl KubernetesSource {
    /// While the event waited, the plugin may have told of a new sandbox: the old one must not be ordered after it.
    fn place(&self, pod: &mut PodFacts) {
        if pod.netns.is_some()
            && let Some(sandbox) = self.sandboxes.last(&pod.uid)
        {
            pod.netns = Some(sandbox.netns);
        }
    }
}

impl PodSource for KubernetesSource {
    async fn next(&mut self) -> Option<PodEvent> {
        let mut event = self.events.recv().await?;
        match &mut event {
            PodEvent::Snapshot(pods) => pods.iter_mut().for_each(|pod| self.place(pod)),
            PodEvent::Upsert(pod) => self.place(pod),
            PodEvent::Remove { .. } => {}
        }
        Some(event)
    }
}

type Events<K> = Result<Event<K>, watcher::Error>;

fn pods(client: Client, node: &str) -> impl Stream<Item = Events<Pod>> + Send + use<> {
    let of_node = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    watcher(Api::<Pod>::all(client), of_node).backoff(Pauses(PAUSE_FIRST))
}

fn namespaces(client: Client) -> impl Stream<Item = Events<PartialObjectMeta<Namespace>>> + Send {
    let labels = Api::<PartialObjectMeta<Namespace>>::all(client);
    watcher(labels, watcher::Config::default()).backoff(Pauses(PAUSE_FIRST))
}

/// Doubling, and less than what is due by chance: all nodes' agents lose their API server in the same moment.
struct Pauses(Duration);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let due = self.0;
        self.0 = (due * 2).min(PAUSE_LONGEST);
        Some(due.mul_f64(rand::random_range(0.5..1.0)))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0 = PAUSE_FIRST;
    }
}

struct Watching {
    known: Known,
    sender: mpsc::Sender<PodEvent>,
    /// Pods whose namespace was not found.
    lost: BTreeSet<String>,
}

impl Watching {
    /// Until the agent no longer listens.
    async fn run(
        mut self,
        pods: impl Stream<Item = Events<Pod>> + Send,
        namespaces: impl Stream<Item = Events<PartialObjectMeta<Namespace>>> + Send,
    ) {
        let (mut pods, mut namespaces) = (pin!(pods), pin!(namespaces));
        loop {
            let change = self.change(pods.as_mut(), namespaces.as_mut()).await;
            self.known.events.send_modify(|count| *count += 1);
            if self.tell(change).await.is_err() {
                return;
            }
        }
    }

    async fn change(
        &mut self,
        mut pods: Pin<&mut (impl Stream<Item = Events<Pod>> + Send)>,
        mut namespaces: Pin<&mut (impl Stream<Item = Events<PartialObjectMeta<Namespace>>> + Send)>,
    ) -> Change {
        tokio::select! {
            Some(event) = pods.next() => match event {
                Ok(event) => self.known.with_world(|world| world.take_pod(event)),
                Err(error) => unreachable("pods", &error),
            },
            Some(event) = namespaces.next() => match event {
                Ok(event) => self.known.with_world(|world| world.take_namespace(event)),
                Err(error) => unreachable("namespaces", &error),
            },
            () = tokio::time::sleep(LOOK_AGAIN), if !self.lost.is_empty() => {
                Change::Pods(std::mem::take(&mut self.lost).into_iter().collect())
            }
        }
    }

    async fn tell(&mut self, change: Change) -> Result<(), mpsc::error::SendError<PodEvent>> {
        match change {
            Change::Nothing => Ok(()),
            Change::Everything => {
                let uids = self.known.with_world(|world| world.uids());
                self.known.sandboxes.keep_only(&uids);
                let pods = self.facts(uids.into_iter().collect()).await;
                self.sender.send(PodEvent::Snapshot(pods)).await
            }
            Change::Pods(uids) => {
                for pod in self.facts(uids).await {
                    self.sender.send(PodEvent::Upsert(Box::new(pod))).await?;
                }
                Ok(())
            }
            Change::Gone(uid) => {
                self.known.sandboxes.forget(&uid);
                self.lost.remove(&uid);
                self.sender.send(PodEvent::Remove { uid }).await
            }
        }
    }

    /// Facts about these pods, complete. Off the runtime's workers: it may enter many namespaces.
    async fn facts(&mut self, uids: Vec<String>) -> Vec<PodFacts> {
        let known = self.known.clone();
        let look = move || {
            let held: Vec<_> =
                known.with_world(|world| uids.iter().filter_map(|uid| world.facts(uid)).collect());
            let pods: Vec<_> = held.into_iter().map(|pod| known.complete(pod)).collect();
            known.sandboxes.save();
            pods
        };
        let pods = match tokio::task::spawn_blocking(look).await {
            Ok(pods) => pods,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down.
                Err(_) => Vec::new(),
            },
        };
        for pod in &pods {
            if !self.known.is_lost(pod) {
                self.lost.remove(&pod.uid);
            } else if self.lost.insert(pod.uid.clone()) {
                tracing::debug!(
                    pod = pod.name,
                    namespace = pod.namespace,
                    "no network namespace with the pod's address yet"
                );
            }
        }
        pods
    }
}

fn unreachable(what: &'static str, error: &watcher::Error) -> Change {
    tracing::warn!(
        what,
        error = chain(error),
        "watch the API server; what was known stands"
    );
    Change::Nothing
}
