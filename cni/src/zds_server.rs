//! The agent's side of ZDS: which pods the node tunnel should serve, told to every tunnel that connects.
//!
//! A tunnel that connects gets a snapshot; from then on pods are announced to the newest tunnel and withdrawn from
//! all (`spec/cni.md` 9). Each connection has one task and one bounded queue, so a slow tunnel holds up nobody else.
//! A tunnel that owes an answer for too long is hung up on: it reconnects and gets a snapshot, and its late answer can
//! never be taken for another message's. When the newest tunnel goes, the one before it is told what it has missed.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use net::{
    netns::Netns,
    zds::{AgentConnection, CallError, Incoming, Listener, Request, Version, WorkloadInfo},
};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// At most five tunnels a second: a tunnel that crashes in a loop must not starve the others.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Requests that wait for one tunnel. An announcement beyond that waits for room, a withdrawal too.
const QUEUE: usize = 1024;
/// Refusals that wait for their pods' owners; one that finds no room is in the log alone.
const REFUSALS: usize = 1024;

/// A pod that tunnels should serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Kubernetes uid.
    pub uid: String,
    /// Which workload it is.
    pub info: WorkloadInfo,
    /// Its namespace; `None` where it is not known (any more): a tunnel that serves the pod is to keep it.
    pub netns: Option<Netns>,
}

/// Why a pod is not with a tunnel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AnnounceError {
    /// Nothing is connected. The pod is in the next tunnel's snapshot.
    #[error("no node tunnel is connected")]
    NoTunnel,
    /// The tunnel says why. It retries by itself, and so does the caller.
    #[error("the node tunnel refused the pod: {0}")]
    Refused(String),
    /// The connection went before the answer came.
    #[error("the node tunnel hung up")]
    HungUp,
}

/// A pod that a tunnel refused in a snapshot, or when it became the newest.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The pod.
    pub uid: String,
    /// The tunnel's words.
    pub reason: String,
}

/// Tells tunnels about pods. Clones are the same.
#[derive(Clone)]
pub struct Tunnels(Arc<Shared>);

/// The listening side; [`Server::run`] drives it.
pub struct Server {
    path: PathBuf,
    listener: Listener,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    connected: watch::Sender<usize>,
    refusals: mpsc::Sender<Refusal>,
}

#[derive(Default)]
struct State {
    pods: BTreeMap<String, Announcement>,
    /// Oldest first; the last one gets announcements.
    tunnels: Vec<Tunnel>,
    next_id: u64,
}

struct Tunnel {
    id: u64,
    version: Version,
    queue: mpsc::Sender<Job>,
    /// Pods that it was told of.
    named: HashSet<String>,
}

struct Job {
    request: Request,
    /// Absent: a refusal goes to the pod's owner.
    answer: Option<oneshot::Sender<Result<(), AnnounceError>>>,
}

/// A hub without tunnels, and where refusals come out.
pub fn tunnels() -> (Tunnels, mpsc::Receiver<Refusal>) {
    let (refusals, receiver) = mpsc::channel(REFUSALS);
    let connected = watch::channel(0).0;
    (
        Tunnels(Arc::new(Shared {
            state: Mutex::default(),
            connected,
            refusals,
        })),
        receiver,
    )
}

impl Tunnels {
    /// Listens at `path`: mode 0600, a stale file removed, missing folders made. Nothing is accepted before
    /// [`Server::run`], so that the first snapshot can be complete.
    ///
    /// # Errors
    /// The system's, naming the path.
    pub fn listen(&self, path: &Path) -> io::Result<Server> {
        let named = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("listen at {}: {error}", path.display()),
            )
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(named)?;
        }
        let listener = Listener::bind(path).map_err(named)?;
        restrict(path).map_err(named)?;
        Ok(Server {
            path: path.to_owned(),
            listener,
            shared: self.0.clone(),
        })
    }

    /// How many tunnels are connected, and changes of that.
    pub fn connected(&self) -> watch::Receiver<usize> {
        self.0.connected.subscribe()
    }

    /// Puts a pod into the next snapshots without telling anyone now: for pods that tunnels already serve.
    pub fn remember(&self, pod: Announcement) {
        self.0.state.lock().pods.insert(pod.uid.clone(), pod);
    }

    /// Announces the pod to the newest tunnel and waits for its answer. From now on it is in every snapshot, whatever
    /// the answer is.
    ///
    /// # Errors
    /// [`AnnounceError`]; trying again is harmless.
    pub async fn announce(&self, pod: Announcement) -> Result<(), AnnounceError> {
        let (queue, request) = self.0.state.lock().announce(pod)?;
        let (answer, answered) = oneshot::channel();
        let job = Job {
            request,
            answer: Some(answer),
        };
        queue.send(job).await.map_err(|_| AnnounceError::HungUp)?;
        answered.await.unwrap_or(Err(AnnounceError::HungUp))
    }

    /// Withdraws the pod from every tunnel and waits until each has answered or gone.
    pub async fn withdraw(&self, uid: &str) {
        let queues = self.0.state.lock().withdraw(uid);
        let mut answers = Vec::new();
        for queue in queues {
            let (answer, answered) = oneshot::channel();
            let request = Request::Delete {
                uid: uid.to_owned(),
            };
            if queue
                .send(Job {
                    request,
                    answer: Some(answer),
                })
                .await
                .is_ok()
            {
                answers.push(answered);
            }
        }
        for answer in answers {
            if let Ok(Err(AnnounceError::Refused(reason))) = answer.await {
                tracing::warn!(uid, reason, "a tunnel refused to let a pod go");
            }
        }
    }

    /// Tells tunnels that know the word (version 2) that the pod has begun to terminate. Waits for nothing.
    pub fn drain(&self, uid: &str) {
        let state = self.0.state.lock();
        for tunnel in state
            .tunnels
            .iter()
            .filter(|tunnel| tunnel.version >= Version::V2)
        {
            let request = Request::Drain {
                uid: uid.to_owned(),
            };
            if tunnel
                .queue
                .try_send(Job {
                    request,
                    answer: None,
                })
                .is_err()
            {
                tracing::warn!(
                    uid,
                    "a tunnel has no room for a drain: its peers learn when the pod is gone"
                );
            }
        }
    }
}

impl State {
    fn announce(
        &mut self,
        pod: Announcement,
    ) -> Result<(mpsc::Sender<Job>, Request), AnnounceError> {
        let request = request(&pod);
        let uid = pod.uid.clone();
        let before = self.pods.insert(uid.clone(), pod.clone());
        if before.is_some_and(|before| before.netns != pod.netns) {
            // Older tunnels know another namespace: should one of them become the newest, it is told again.
            for tunnel in &mut self.tunnels {
                tunnel.named.remove(&uid);
            }
        }
        let newest = self.tunnels.last_mut().ok_or(AnnounceError::NoTunnel)?;
        newest.named.insert(uid);
        Ok((newest.queue.clone(), request))
    }

    fn withdraw(&mut self, uid: &str) -> Vec<mpsc::Sender<Job>> {
        self.pods.remove(uid);
        let queue = |tunnel: &mut Tunnel| {
            tunnel.named.remove(uid);
            tunnel.queue.clone()
        };
        self.tunnels.iter_mut().map(queue).collect()
    }

    /// From here on the tunnel is the newest; what it must be told first is the answer.
    fn join(&mut self, version: Version) -> (u64, mpsc::Receiver<Job>, Vec<Announcement>) {
        let (queue, jobs) = mpsc::channel(QUEUE);
        self.next_id += 1;
        let named = self.pods.keys().cloned().collect();
        self.tunnels.push(Tunnel {
            id: self.next_id,
            version,
            queue,
            named,
        });
        (self.next_id, jobs, self.pods.values().cloned().collect())
    }

    fn leave(&mut self, id: u64) {
        let was_newest = self.tunnels.last().is_some_and(|tunnel| tunnel.id == id);
        self.tunnels.retain(|tunnel| tunnel.id != id);
        if was_newest {
            self.catch_up();
        }
    }

    /// The tunnel that is the newest again was not told of what came while it was not.
    fn catch_up(&mut self) {
        let Some(newest) = self.tunnels.last_mut() else {
            return;
        };
        for pod in self.pods.values() {
            if newest.named.insert(pod.uid.clone()) {
                let job = Job {
                    request: request(pod),
                    answer: None,
                };
                if newest.queue.try_send(job).is_err() {
                    tracing::warn!(
                        uid = pod.uid,
                        "a tunnel has no room for a pod it has missed"
                    );
                    newest.named.remove(&pod.uid);
                }
            }
        }
    }
}

fn request(pod: &Announcement) -> Request {
    let uid = pod.uid.clone();
    match &pod.netns {
        Some(netns) => Request::Add {
            uid,
            info: pod.info.clone(),
            netns: netns.clone(),
        },
        None => Request::Keep { uid },
    }
}

impl Server {
    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts tunnels until dropped; connections end with it.
    pub async fn run(self) {
        let mut connections = JoinSet::new();
        loop {
            let next_accept = Instant::now() + ACCEPT_PAUSE;
            tokio::select! {
                incoming = self.listener.accept() => match incoming {
                    Ok(incoming) => {
                        connections.spawn(serve(self.shared.clone(), incoming));
                    }
                    Err(error) => tracing::warn!(%error, "accept a node tunnel"),
                },
                Some(_) = connections.join_next() => continue,
            }
            sleep_until(next_accept).await;
        }
    }
}

async fn serve(shared: Arc<Shared>, incoming: Incoming) {
    let connection = match AgentConnection::greet(incoming).await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::warn!(error = chain(&error), "a connection that is no node tunnel");
            return;
        }
    };
    let (id, jobs, snapshot) = shared.state.lock().join(connection.version());
    let _leave = Leave {
        shared: shared.clone(),
        id,
    };
    shared.count();
    tracing::info!(tunnel = id, version = ?connection.version(), pods = snapshot.len(), "node tunnel connected");
    let end = Session {
        shared: &shared,
        connection,
    }
    .run(jobs, snapshot)
    .await;
    tracing::info!(tunnel = id, reason = chain(&end), "node tunnel gone");
    if shared.state.lock().tunnels.len() == 1 {
        tracing::warn!(
            "no node tunnel is connected any more: enrolled pods lose their network with its listeners"
        );
    }
}

struct Session<'a> {
    shared: &'a Shared,
    connection: AgentConnection,
}

impl Session<'_> {
    /// Ends with the reason why the connection cannot go on.
    async fn run(
        mut self,
        mut jobs: mpsc::Receiver<Job>,
        snapshot: Vec<Announcement>,
    ) -> CallError {
        for pod in snapshot {
            if let Err(error) = self
                .carry_out(Job {
                    request: request(&pod),
                    answer: None,
                })
                .await
            {
                return error;
            }
        }
        if let Err(error) = self
            .carry_out(Job {
                request: Request::SnapshotSent,
                answer: None,
            })
            .await
        {
            return error;
        }
        loop {
            let job = tokio::select! {
                biased;
                gone = self.connection.closed() => return gone.into(),
                job = jobs.recv() => job,
            };
            // The state drops the queue only when this task has ended.
            let Some(job) = job else {
                return net::zds::ProtocolError::Closed.into();
            };
            if let Err(error) = self.carry_out(job).await {
                return error;
            }
        }
    }

    async fn carry_out(&mut self, job: Job) -> Result<(), CallError> {
        let (outcome, end) = match self.connection.call(&job.request).await {
            Ok(()) => (Ok(()), None),
            Err(CallError::Refused(reason)) => (Err(AnnounceError::Refused(reason)), None),
            // Asked between the check of the version and now: nothing to do.
            Err(CallError::NotInVersion) => (Ok(()), None),
            Err(error) => (Err(AnnounceError::HungUp), Some(error)),
        };
        match (job.answer, outcome) {
            (Some(answer), outcome) => {
                let _ = answer.send(outcome);
            }
            (None, Err(AnnounceError::Refused(reason))) => self.refused(&job.request, reason),
            (None, _) => {}
        }
        end.map_or(Ok(()), Err)
    }

    fn refused(&self, request: &Request, reason: String) {
        let uid = match request {
            Request::Add { uid, .. } | Request::Keep { uid } => uid.clone(),
            Request::Delete { .. } | Request::Drain { .. } | Request::SnapshotSent => return,
        };
        tracing::warn!(uid, reason, "the node tunnel refused a pod of its snapshot");
        let _ = self.shared.refusals.try_send(Refusal { uid, reason });
    }
}

/// Takes the tunnel off the list, however its task ends.
struct Leave {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.shared.state.lock().leave(self.id);
        self.shared.count();
    }
}

impl Shared {
    fn count(&self) {
        let now = self.state.lock().tunnels.len();
        // Waiters care that something changed, also where the number is the same again.
        self.connected.send_modify(|count| *count = now);
    }
}

fn restrict(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
}

/// An error with its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    net::report::Chain(error).to_string()
}

#[cfg(test)]
mod tests;
