//! Which pods run, which wait to be retried, and what each message of the node agent changes. No sockets here: how a pod
//! is started is the [`Launch`]er's matter.
//!
//! Source: the ZDS rules of Istio's in-pod mode (snapshot, then increments; one answer to each request, in order).

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
};

use mesh::{names::Str, outcome::LocalWorkload};

/// Kubernetes' UID of a pod.
pub(crate) type PodUid = Str;

/// More pods than a node can hold; a guard against an agent gone wrong.
const MAX_PODS: usize = 16_384;

/// What a pod's listeners, its name servers' sockets and its namespace take.
const FILES_PER_POD: u64 = 12;

/// How many pods so many open files allow: half of the files, the other half is for connections. Pods beyond are refused
/// with the reason, so that those that are served stay so.
pub(crate) fn most_pods(files: u64) -> usize {
    let pods = files / 2 / FILES_PER_POD;
    usize::try_from(pods).map_or(MAX_PODS, |pods| pods.clamp(1, MAX_PODS))
}

/// Starts and stops what runs for one pod.
pub(crate) trait Launch: Send + Sync {
    /// A network namespace; equal where it is the same one.
    type Netns: Clone + PartialEq + Send + Sync;
    /// What runs for one pod. Dropping it ends everything at once.
    type Running: Send;

    /// Opens the listeners. An error leaves nothing behind.
    fn launch(
        &self,
        uid: &PodUid,
        workload: &LocalWorkload,
        netns: &Self::Netns,
    ) -> impl Future<Output = Result<Self::Running, String>> + Send;

    /// Tells peers that the pod is about to end; nothing is refused.
    fn drain(&self, running: &Self::Running);
}

/// One message of the agent.
#[derive(Debug)]
pub(crate) enum Request<N> {
    /// The pod is enrolled, and this is its namespace.
    Add {
        uid: PodUid,
        workload: LocalWorkload,
        netns: N,
    },
    /// The pod is enrolled; its namespace was given before.
    Keep { uid: PodUid },
    /// The pod is gone or left.
    Del { uid: PodUid },
    /// The pod starts to terminate.
    Drain { uid: PodUid },
    /// Everything enrolled has been named since we connected.
    SnapshotSent,
}

/// A message out of order: the connection cannot be trusted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OutOfOrder {
    /// SnapshotSent twice.
    #[error("a second snapshot on one connection")]
    SecondSnapshot,
    /// Keep after the snapshot.
    #[error("Keep after the snapshot")]
    LateKeep,
}

struct Pod<L: Launch> {
    workload: LocalWorkload,
    netns: L::Netns,
    running: L::Running,
}

struct Pending<L: Launch> {
    workload: LocalWorkload,
    netns: L::Netns,
}

/// The pods of the node.
pub(crate) struct Pods<L: Launch> {
    launcher: L,
    running: BTreeMap<PodUid, Pod<L>>,
    pending: BTreeMap<PodUid, Pending<L>>,
    named: BTreeSet<PodUid>,
    snapshot_received: bool,
    most: usize,
}

impl<L: Launch> Pods<L> {
    /// At most `most` pods, by [`most_pods`].
    pub(crate) fn new(launcher: L, most: usize) -> Self {
        Self {
            launcher,
            most,
            running: BTreeMap::new(),
            pending: BTreeMap::new(),
            named: BTreeSet::new(),
            snapshot_received: false,
        }
    }

    /// A new connection begins: its snapshot will name all pods again. What runs goes on meanwhile.
    pub(crate) fn connected(&mut self) {
        self.pending.clear();
        self.named.clear();
        self.snapshot_received = false;
    }

    /// Whether every enrolled pod is served.
    pub(crate) fn complete(&self) -> bool {
        self.snapshot_received && self.pending.is_empty()
    }

    /// Whether [`Pods::retry`] has anything to do.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// How many run and how many wait.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.running.len(), self.pending.len())
    }

    /// What runs, for dumps.
    pub(crate) fn running(&self) -> impl Iterator<Item = (&PodUid, &LocalWorkload, &L::Running)> {
        let each = self.running.iter();
        each.map(|(uid, pod)| (uid, &pod.workload, &pod.running))
    }

    /// What waits, for dumps.
    pub(crate) fn pending(&self) -> impl Iterator<Item = (&PodUid, &LocalWorkload)> {
        self.pending.iter().map(|(uid, pod)| (uid, &pod.workload))
    }

    /// Applies one message. The inner error is the text of the answer; the outer one ends the connection.
    pub(crate) async fn handle(
        &mut self,
        request: Request<L::Netns>,
    ) -> Result<Result<(), String>, OutOfOrder> {
        match request {
            Request::Add {
                uid,
                workload,
                netns,
            } => Ok(self.add(uid, workload, netns).await),
            Request::Keep { uid } => self.keep(uid).map(Ok),
            Request::Del { uid } => {
                self.delete(&uid);
                Ok(Ok(()))
            }
            Request::Drain { uid } => {
                if let Some(pod) = self.running.get(&uid) {
                    self.launcher.drain(&pod.running);
                }
                Ok(Ok(()))
            }
            Request::SnapshotSent => self.reconcile().map(Ok),
        }
    }

    async fn add(
        &mut self,
        uid: PodUid,
        workload: LocalWorkload,
        netns: L::Netns,
    ) -> Result<(), String> {
        self.remember(&uid);
        if let Some(pod) = self.running.get(&uid) {
            if pod.netns == netns && pod.workload == workload {
                return Ok(());
            }
            // The sandbox was made anew: what runs in the old namespace serves nobody.
            self.running.remove(&uid);
        }
        let others = self.running.len() + self.pending.len();
        if others - usize::from(self.pending.contains_key(&uid)) >= self.most {
            tracing::warn!(%uid, most = self.most, "no files are left for one more pod");
            return Err(format!(
                "{} pods are served already, all that the limit of open files allows",
                self.most
            ));
        }
        let launched = self.launcher.launch(&uid, &workload, &netns).await;
        self.settle(uid, workload, netns, launched)
    }

    fn settle(
        &mut self,
        uid: PodUid,
        workload: LocalWorkload,
        netns: L::Netns,
        launched: Result<L::Running, String>,
    ) -> Result<(), String> {
        match launched {
            Ok(running) => {
                self.pending.remove(&uid);
                let pod = Pod {
                    workload,
                    netns,
                    running,
                };
                self.running.insert(uid, pod);
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%uid, error, "cannot serve the pod yet, will retry");
                self.pending.insert(uid, Pending { workload, netns });
                Err(error)
            }
        }
    }

    fn remember(&mut self, uid: &PodUid) {
        if !self.snapshot_received {
            self.named.insert(uid.clone());
        }
    }

    fn keep(&mut self, uid: PodUid) -> Result<(), OutOfOrder> {
        if self.snapshot_received {
            return Err(OutOfOrder::LateKeep);
        }
        if !self.running.contains_key(&uid) {
            tracing::warn!(%uid, "told to keep a pod that is not served: it needs its namespace");
        }
        self.named.insert(uid);
        Ok(())
    }

    fn delete(&mut self, uid: &PodUid) {
        self.pending.remove(uid);
        if self.snapshot_received {
            self.running.remove(uid);
        } else {
            // The snapshot decides: what it does not name ends then.
            self.named.remove(uid);
        }
    }

    fn reconcile(&mut self) -> Result<(), OutOfOrder> {
        if self.snapshot_received {
            return Err(OutOfOrder::SecondSnapshot);
        }
        self.snapshot_received = true;
        let named = std::mem::take(&mut self.named);
        self.running.retain(|uid, _| named.contains(uid));
        self.pending.retain(|uid, _| named.contains(uid));
        Ok(())
    }

    /// Tries again to serve the pods that could not be served.
    pub(crate) async fn retry(&mut self) {
        for (uid, Pending { workload, netns }) in std::mem::take(&mut self.pending) {
            let launched = self.launcher.launch(&uid, &workload, &netns).await;
            if self.settle(uid.clone(), workload, netns, launched).is_ok() {
                tracing::info!(%uid, "the pod is served now");
            }
        }
    }

    /// Ends: hands out everything that runs, to be drained.
    pub(crate) fn take_running(&mut self) -> Vec<(PodUid, L::Running)> {
        self.pending.clear();
        let running = std::mem::take(&mut self.running).into_iter();
        running.map(|(uid, pod)| (uid, pod.running)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use parking_lot::Mutex;

    use super::*;

    #[derive(Default)]
    struct Fake {
        fail: Arc<AtomicBool>,
        launched: Arc<AtomicUsize>,
        drained: Arc<Mutex<Vec<u32>>>,
    }

    impl Launch for Fake {
        type Netns = u32;
        type Running = u32;

        async fn launch(&self, _: &PodUid, _: &LocalWorkload, netns: &u32) -> Result<u32, String> {
            if self.fail.load(Ordering::SeqCst) {
                return Err("port busy".into());
            }
            self.launched.fetch_add(1, Ordering::SeqCst);
            Ok(*netns)
        }

        fn drain(&self, running: &u32) {
            self.drained.lock().push(*running);
        }
    }

    fn workload(name: &str) -> LocalWorkload {
        LocalWorkload {
            name: name.into(),
            namespace: "ns".into(),
            service_account: "sa".into(),
        }
    }

    fn add(uid: &str, netns: u32) -> Request<u32> {
        Request::Add {
            uid: uid.into(),
            workload: workload(uid),
            netns,
        }
    }

    fn uids(pods: &Pods<Fake>) -> Vec<String> {
        pods.running().map(|(uid, ..)| uid.to_string()).collect()
    }

    async fn ok(pods: &mut Pods<Fake>, request: Request<u32>) {
        assert_eq!(pods.handle(request).await, Ok(Ok(())));
    }

    #[tokio::test]
    async fn pods_beyond_the_limit_of_files_are_refused_and_the_others_stay() {
        assert_eq!(most_pods(256), 10);
        assert_eq!(most_pods(0), 1);
        let mut pods = Pods::new(Fake::default(), 2);
        pods.connected();
        for uid in ["a", "b"] {
            ok(&mut pods, add(uid, 1)).await;
        }
        let refused = pods.handle(add("c", 1)).await.unwrap().unwrap_err();
        assert!(refused.contains("open files"), "{refused}");
        ok(&mut pods, Request::SnapshotSent).await;
        assert!(pods.complete(), "the node is not held up");
        ok(&mut pods, add("b", 2)).await;
        ok(&mut pods, Request::Del { uid: "a".into() }).await;
        ok(&mut pods, add("c", 1)).await;
        assert_eq!(pods.counts(), (2, 0));
    }

    async fn with_snapshot(uids: &[(&str, u32)]) -> Pods<Fake> {
        let mut pods = Pods::new(Fake::default(), MAX_PODS);
        pods.connected();
        for (uid, netns) in uids {
            ok(&mut pods, add(uid, *netns)).await;
        }
        ok(&mut pods, Request::SnapshotSent).await;
        pods
    }

    #[tokio::test]
    async fn a_snapshot_ends_the_pods_it_does_not_name() {
        let mut pods = with_snapshot(&[("a", 1), ("b", 2), ("c", 3)]).await;
        pods.connected();
        assert!(!pods.complete());
        ok(&mut pods, Request::Keep { uid: "a".into() }).await;
        ok(&mut pods, add("b", 2)).await;
        assert_eq!(uids(&pods), ["a", "b", "c"]);
        ok(&mut pods, Request::SnapshotSent).await;
        assert_eq!(uids(&pods), ["a", "b"]);
        assert!(pods.complete());
        assert_eq!(pods.launcher.launched.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_deletion_before_the_snapshot_waits_for_it() {
        let mut pods = with_snapshot(&[("a", 1)]).await;
        pods.connected();
        ok(&mut pods, Request::Keep { uid: "a".into() }).await;
        ok(&mut pods, Request::Del { uid: "a".into() }).await;
        assert_eq!(uids(&pods), ["a"]);
        ok(&mut pods, Request::SnapshotSent).await;
        assert!(uids(&pods).is_empty());
        ok(
            &mut pods,
            Request::Del {
                uid: "unknown".into(),
            },
        )
        .await;
    }

    #[tokio::test]
    async fn another_namespace_replaces_what_runs() {
        let mut pods = with_snapshot(&[("a", 1)]).await;
        ok(&mut pods, add("a", 1)).await;
        assert_eq!(pods.launcher.launched.load(Ordering::SeqCst), 1);
        ok(&mut pods, add("a", 2)).await;
        let netns: Vec<u32> = pods.running().map(|(_, _, netns)| *netns).collect();
        assert_eq!(netns, [2]);
    }

    #[tokio::test]
    async fn a_failed_add_is_told_and_retried() {
        let mut pods = with_snapshot(&[]).await;
        pods.launcher.fail.store(true, Ordering::SeqCst);
        let answer = pods.handle(add("a", 1)).await;
        assert_eq!(answer, Ok(Err("port busy".into())));
        assert!(!pods.complete() && pods.has_pending());
        pods.retry().await;
        assert!(pods.has_pending());
        pods.launcher.fail.store(false, Ordering::SeqCst);
        pods.retry().await;
        assert!(pods.complete());
        assert_eq!(uids(&pods), ["a"]);
    }

    #[tokio::test]
    async fn messages_out_of_order_end_the_connection() {
        let mut pods = with_snapshot(&[]).await;
        let late = pods.handle(Request::Keep { uid: "a".into() }).await;
        assert_eq!(late, Err(OutOfOrder::LateKeep));
        let second = pods.handle(Request::SnapshotSent).await;
        assert_eq!(second, Err(OutOfOrder::SecondSnapshot));
    }

    #[tokio::test]
    async fn a_terminating_pod_is_drained_and_goes_on() {
        let mut pods = with_snapshot(&[("a", 1)]).await;
        ok(&mut pods, Request::Drain { uid: "a".into() }).await;
        assert_eq!(*pods.launcher.drained.lock(), [1]);
        assert_eq!(uids(&pods), ["a"]);
    }
}
