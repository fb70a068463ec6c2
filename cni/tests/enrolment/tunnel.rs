//! A stand-in for the node tunnel: takes pods over ZDS, listens in them and passes bytes on, without HBONE.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    ops::ControlFlow,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use cni::rules::{INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};
use net::{
    netns::Netns,
    socket::{Factory, SourceAddress, original_destination, unmapped},
    zds::{Dialer, Received, Request, TunnelConnection, Version},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::rig::eventually;

/// What happened at the tunnel, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Add(String),
    Keep(String),
    Delete(String),
    SnapshotSent,
    Drain(String),
}

/// How the tunnel answers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manners {
    /// Refuse this many Adds first.
    pub(crate) refuse_adds: Arc<AtomicUsize>,
    /// Who dies at which message.
    pub(crate) death: Arc<Mutex<Option<Death>>>,
    /// The agent's process, where it has one of its own.
    pub(crate) agent: Arc<AtomicU32>,
}

/// A death at a message of the agent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Death {
    /// So many messages are heard before.
    pub(crate) after: usize,
    /// Whether that message is answered still.
    pub(crate) answered: bool,
    pub(crate) whose: Whose,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Agent,
    Tunnel,
}

impl Manners {
    /// Whether it is time; then for this one time alone.
    fn is_time(&self, answered: bool) -> Option<Death> {
        let mut death = self.death.lock();
        let next = death.as_mut().filter(|it| it.answered == answered)?;
        match next.after {
            0 => death.take(),
            _ => {
                next.after -= 1;
                None
            }
        }
    }
}

pub(crate) struct Tunnel {
    pub(crate) told: Arc<Mutex<Vec<Told>>>,
    /// Connections carried from the pod's applications.
    pub(crate) outbound: Arc<AtomicUsize>,
    /// Plaintext connections carried to them.
    pub(crate) inbound: Arc<AtomicUsize>,
    gone: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Tunnel {
    /// Version 2, with good manners.
    pub(crate) async fn connect_when_ready(socket: &Path) -> Tunnel {
        Self::connect(socket, Version::V2, Manners::default()).await
    }

    /// The agent has hung up; pods are served on.
    pub(crate) fn disconnected(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    pub(crate) async fn connect(socket: &Path, version: Version, manners: Manners) -> Tunnel {
        Self::start(Dialer::with_version(socket, version), manners, false).await
    }

    /// One that comes again whenever the agent has gone, with the pods that it serves.
    pub(crate) async fn follow(socket: &Path, manners: Manners) -> Tunnel {
        Self::start(Dialer::with_version(socket, Version::V2), manners, true).await
    }

    async fn start(dialer: Dialer, manners: Manners, again: bool) -> Tunnel {
        let mut connection = None;
        // The socket of an agent that has ended may still be there.
        eventually("the agent listens", async || {
            connection = dialer.connect().await.ok();
            connection.is_some()
        })
        .await;
        let connection = connection.expect("connected");
        let again = again.then_some(dialer);
        let told = Arc::new(Mutex::new(Vec::new()));
        let (outbound, inbound, gone) = (Arc::default(), Arc::default(), Arc::default());
        let serving = Serving {
            told: told.clone(),
            outbound: Arc::clone(&outbound),
            inbound: Arc::clone(&inbound),
            gone: Arc::clone(&gone),
            manners,
            pods: BTreeMap::new(),
            named: BTreeSet::new(),
        };
        let task = tokio::spawn(serving.run(connection, again));
        Tunnel {
            told,
            outbound,
            inbound,
            gone,
            task,
        }
    }

    /// Until it has been told so.
    pub(crate) async fn hears(&self, what: &Told) {
        eventually(&format!("{what:?}"), async || {
            self.told.lock().contains(what)
        })
        .await;
    }

    pub(crate) fn carried(&self) -> (usize, usize) {
        (
            self.outbound.load(Ordering::SeqCst),
            self.inbound.load(Ordering::SeqCst),
        )
    }

    /// Whether it has died.
    pub(crate) fn is_dead(&self) -> bool {
        self.task.is_finished()
    }

    /// Ends at once, with all it carries.
    pub(crate) async fn kill(&mut self) {
        self.task.abort();
        // It may have ended before.
        let _ = (&mut self.task).await;
    }
}

struct Serving {
    told: Arc<Mutex<Vec<Told>>>,
    outbound: Arc<AtomicUsize>,
    inbound: Arc<AtomicUsize>,
    gone: Arc<AtomicBool>,
    manners: Manners,
    /// Named since the agent was connected to.
    named: BTreeSet<String>,
    /// Dropping a pod's set ends its listeners and connections.
    pods: BTreeMap<String, (Netns, JoinSet<()>)>,
}

impl Serving {
    async fn run(mut self, connection: TunnelConnection, again: Option<Dialer>) {
        let mut connection = Some(connection);
        loop {
            if let Some(connection) = connection.take()
                && self.talk(connection).await.is_break()
            {
                return self.close().await;
            }
            self.gone.store(true, Ordering::SeqCst);
            let Some(dialer) = &again else {
                return std::future::pending().await;
            };
            tokio::time::sleep(Duration::from_millis(5)).await;
            connection = dialer.connect().await.ok();
        }
    }

    /// Listens nowhere any more: dropped, tasks would only be told to end.
    async fn close(&mut self) {
        for (_, tasks) in self.pods.values_mut() {
            tasks.shutdown().await;
        }
    }

    /// Until the agent has gone; breaks where the tunnel is to die.
    async fn talk(&mut self, mut connection: TunnelConnection) -> ControlFlow<()> {
        self.named.clear();
        while let Ok(Some(Received::Request(request))) = connection.receive().await {
            self.die(false)?;
            let (told, result) = self.obey(request);
            self.told.lock().push(told);
            let answer = result.as_ref().map(|_| ()).map_err(String::as_str);
            if connection.acknowledge(answer).await.is_err() {
                break;
            }
            self.die(true)?;
        }
        ControlFlow::Continue(())
    }

    fn die(&self, answered: bool) -> ControlFlow<()> {
        match self.manners.is_time(answered).map(|death| death.whose) {
            None => ControlFlow::Continue(()),
            Some(Whose::Tunnel) => ControlFlow::Break(()),
            Some(Whose::Agent) => {
                let agent = self.manners.agent.load(Ordering::SeqCst);
                let agent = i32::try_from(agent).expect("a process");
                kill(Pid::from_raw(agent), Signal::SIGKILL).expect("it runs");
                ControlFlow::Continue(())
            }
        }
    }

    fn obey(&mut self, request: Request) -> (Told, Result<(), String>) {
        match request {
            Request::Add { uid, netns, .. } => {
                self.named.insert(uid.clone());
                (Told::Add(uid.clone()), self.add(uid, netns))
            }
            Request::Keep { uid } => {
                self.named.insert(uid.clone());
                (Told::Keep(uid), Ok(()))
            }
            Request::Delete { uid } => {
                self.pods.remove(&uid);
                (Told::Delete(uid), Ok(()))
            }
            Request::SnapshotSent => {
                let named = std::mem::take(&mut self.named);
                self.pods.retain(|uid, _| named.contains(uid));
                (Told::SnapshotSent, Ok(()))
            }
            Request::Drain { uid } => (Told::Drain(uid), Ok(())),
        }
    }

    fn add(&mut self, uid: String, netns: Netns) -> Result<(), String> {
        let refused = |left: usize| left.checked_sub(1);
        if self
            .manners
            .refuse_adds
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, refused)
            .is_ok()
        {
            return Err("no, thank you".into());
        }
        if self.pods.get(&uid).is_some_and(|(held, _)| *held == netns) {
            return Ok(());
        }
        let factory = Factory {
            mark: Some(cni::rules::TUNNEL_MARK),
            ..Factory::for_pod(netns.clone())
        };
        let listen = |port| factory.listen_any(port).map_err(|error| error.to_string());
        let listeners = [
            listen(OUTBOUND_PORT)?,
            listen(INBOUND_PLAINTEXT_PORT)?,
            listen(INBOUND_HBONE_PORT)?,
        ];
        let [outbound, plaintext, hbone] = listeners;
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(
            outbound,
            factory.clone(),
            Keep::Own,
            self.outbound.clone(),
        ));
        tasks.spawn(accept(
            plaintext,
            factory.clone(),
            Keep::Client,
            self.inbound.clone(),
        ));
        tasks.spawn(accept(hbone, factory, Keep::Own, Arc::default()));
        self.pods.insert(uid, (netns, tasks));
        Ok(())
    }
}

/// Whose address the second half of a connection has.
#[derive(Clone, Copy)]
enum Keep {
    Own,
    Client,
}

async fn accept(listener: TcpListener, factory: Factory, keep: Keep, carried: Arc<AtomicUsize>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, client)) = listener.accept().await {
        carried.fetch_add(1, Ordering::SeqCst);
        let source = match keep {
            Keep::Own => SourceAddress::Own,
            Keep::Client => SourceAddress::Required(unmapped(client).ip()),
        };
        connections.spawn(carry(stream, client, factory.clone(), source));
        while connections.try_join_next().is_some() {}
    }
}

async fn carry(mut stream: TcpStream, client: SocketAddr, factory: Factory, source: SourceAddress) {
    let destination = original_destination(&stream, client).expect("a redirected connection");
    if let Ok(mut far) = factory.connect(unmapped(destination), source).await {
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut far).await;
    }
}
