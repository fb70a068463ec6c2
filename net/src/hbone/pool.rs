//! A pod's connections to its peers: shared, spread when busy, released when unused.

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, Weak},
    time::Duration,
};

use mesh::{identity::Identity, names::WorkloadUid};
use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Client, Config, ConnectError, ConnectHead, DialError, Driver, Tunnel, connection::StreamGuard,
};
use crate::{
    lanes,
    tls::{self, WorkloadCertificate},
};

/// Makes the TCP connections of one pod: in its namespace, with its marks.
pub trait Dialer: Send + Sync + 'static {
    /// Connects to `destination`. The pool sets the deadline, and TCP_NODELAY.
    fn dial(
        &self,
        destination: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;
}

impl<D, F> Dialer for D
where
    D: Fn(SocketAddr) -> F + Send + Sync + 'static,
    F: Future<Output = io::Result<TcpStream>> + Send + 'static,
{
    fn dial(
        &self,
        destination: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>> {
        Box::pin(self(destination))
    }
}

/// How a pool dials and shares.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// HTTP/2.
    pub http: Config,
    /// Streams on one connection at most, where the peer allows as many (`POOL_MAX_STREAMS_PER_CONNECTION`).
    pub max_streams: usize,
    /// Streams on each connection from which another one is opened, so that flows use more cores than one.
    pub spread_after: usize,
    /// Connections to one peer up to which the streams of a lane are spread. More are opened only when all are full.
    pub max_spread: usize,
    /// How long a connection without streams is kept (`POOL_UNUSED_RELEASE_TIMEOUT`).
    pub unused_release: Duration,
    /// TCP connect.
    pub tcp_deadline: Duration,
    /// TLS handshake.
    pub tls_deadline: Duration,
    /// From CONNECT to its answer. The peer connects to its application meanwhile, for which it has 10 s.
    pub response_deadline: Duration,
}

impl Default for PoolConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            http: Config::default(),
            max_streams: 100,
            spread_after: 4,
            max_spread: cores.clamp(2, 8),
            unused_release: Duration::from_secs(300),
            tcp_deadline: Duration::from_secs(10),
            tls_deadline: Duration::from_secs(10),
            response_deadline: Duration::from_secs(20),
        }
    }
}

/// Whom to connect to, and as whom.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where to dial.
    pub destination: SocketAddr,
    /// Whose record led there, where one did: two workloads that had one address in turn share nothing.
    pub workload: Option<WorkloadUid>,
    /// Who may answer. Nobody else is spoken to.
    pub expected: Arc<[Identity]>,
    /// Our certificate. A new generation dials anew; connections of an older one carry no new streams.
    pub certificate: Arc<WorkloadCertificate>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    destination: SocketAddr,
    workload: Option<WorkloadUid>,
    expected: Arc<[Identity]>,
    generation: u64,
    /// A stream and the connection under it wake each other all the time.
    lane: usize,
}

impl From<&Target> for Key {
    fn from(target: &Target) -> Self {
        Self {
            destination: target.destination,
            workload: target.workload.clone(),
            expected: Arc::clone(&target.expected),
            generation: target.certificate.generation(),
            lane: lanes::current(),
        }
    }
}

/// How much a pool holds, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Connections that take new streams.
    pub connections: usize,
    /// Streams open on these.
    pub streams: usize,
    /// Dials under way.
    pub dials: usize,
}

/// The HBONE connections of one pod. Dropping it closes them all, and fails who waits.
pub struct Pool {
    shared: Arc<Shared>,
    _close: DropGuard,
}

struct Shared {
    config: PoolConfig,
    dialer: Box<dyn Dialer>,
    entries: Mutex<HashMap<Key, Entry>>,
    closed: CancellationToken,
}

#[derive(Default)]
struct Entry {
    connections: Vec<Client>,
    dials: Vec<Dial>,
}

type DialResult = Option<Result<(), Arc<DialError>>>;

/// One dial under way and how many wait for it.
struct Dial {
    result: watch::Receiver<DialResult>,
    waiting: usize,
}

/// What a caller is to do.
enum Checkout {
    Use(Client, StreamGuard),
    Wait(watch::Receiver<DialResult>),
}

/// Attempts on connections that turn out to be going away.
const TRIES: usize = 3;

impl Pool {
    /// An empty pool that dials with `dialer`. Use it inside a tokio runtime: its connections are tasks there.
    pub fn new(config: PoolConfig, dialer: impl Dialer) -> Self {
        let closed = CancellationToken::new();
        Self {
            shared: Arc::new(Shared {
                config,
                dialer: Box::new(dialer),
                entries: Mutex::default(),
                closed: closed.clone(),
            }),
            _close: closed.drop_guard(),
        }
    }

    /// Opens a stream to `target`, over a connection that stands or a new one.
    ///
    /// First callers share a dial, and its error. A CONNECT that a peer certainly did not process, because it is
    /// going away, is sent again on another connection. Cancelling resets the stream and leaves a dial under way.
    pub async fn connect(
        &self,
        target: &Target,
        head: ConnectHead,
    ) -> Result<Tunnel, ConnectError> {
        self.connect_for(target, head, None).await
    }

    /// As [`Pool::connect`], for the connection of an `application`, if it is known: what waits in its socket goes with the
    /// CONNECT. It stays there as well, and [`crate::copy`] leaves it out when it reads it: nothing else may do so.
    pub async fn connect_for(
        &self,
        target: &Target,
        head: ConnectHead,
        application: Option<&TcpStream>,
    ) -> Result<Tunnel, ConnectError> {
        let deadline = self.shared.config.response_deadline;
        let mut tries = 1;
        loop {
            let (client, guard) = self.shared.checkout(target).await?;
            let connecting = client.connect_counted(head.clone(), application, deadline, guard);
            match connecting.await {
                Err(error) if error.is_unprocessed() && tries < TRIES => tries += 1,
                result => return result,
            }
        }
    }

    /// Dials `target` apart from the pool, for a connection that proves the way and carries nothing. It ends when both
    /// that are answered are dropped.
    pub async fn dial_apart(&self, target: Target) -> Result<(Client, Driver), DialError> {
        self.shared.dial(target).await
    }

    /// What it holds now.
    pub fn stats(&self) -> PoolStats {
        let entries = self.shared.entries.lock();
        let mut stats = PoolStats::default();
        for entry in entries.values() {
            stats.connections += entry.connections.len();
            stats.dials += entry.dials.len();
            let streams = entry.connections.iter().map(|c| c.state().streams());
            stats.streams += streams.sum::<usize>();
        }
        stats
    }
}

impl Shared {
    /// A connection with room for a stream, which is counted from here on.
    async fn checkout(
        self: &Arc<Self>,
        target: &Target,
    ) -> Result<(Client, StreamGuard), ConnectError> {
        let key = Key::from(target);
        loop {
            let mut result = match self.pick(&key, target) {
                Checkout::Use(client, guard) => return Ok((client, guard)),
                Checkout::Wait(result) => result,
            };
            let done = result.wait_for(Option::is_some).await;
            let outcome = match &done {
                Ok(outcome) => (**outcome).clone(),
                // The dial's task is gone with the runtime or the pool.
                Err(_) => None,
            };
            drop(done);
            match outcome {
                Some(Ok(())) => {}
                Some(Err(error)) => return Err(ConnectError::Dial(error)),
                None => return Err(ConnectError::Dial(Arc::new(DialError::PoolClosed))),
            }
        }
    }

    fn pick(self: &Arc<Self>, key: &Key, target: &Target) -> Checkout {
        let config = &self.config;
        let mut entries = self.entries.lock();
        let entry = entries.entry(key.clone()).or_default();
        entry.connections.retain_mut(Client::is_usable);
        // A dial whose task failed has nobody left to report.
        entry.dials.retain(|dial| dial.result.has_changed().is_ok());
        let total = entry.connections.len() + entry.dials.len();
        let has_room =
            |c: &&Client| c.state().streams() < config.max_streams.min(c.peer_limit().max(1));
        let least = entry.connections.iter().filter(has_room);
        // A peer that owes an answer to a ping may be gone, or the way of this one connection: others come first.
        let order = |c: &&Client| (c.state().is_in_doubt(), c.state().streams());
        if let Some(client) = least.min_by_key(order).cloned() {
            let guard = client.state().open();
            let busy = client.state().streams() > config.spread_after;
            if (busy || client.state().is_in_doubt())
                && entry.dials.is_empty()
                && total < config.max_spread
            {
                let dial = self.start(key.clone(), target);
                entry.dials.push(dial);
            }
            return Checkout::Use(client, guard);
        }
        let crowded = |dial: &Dial| dial.waiting >= config.spread_after;
        if entry.dials.is_empty() || entry.dials.iter().all(crowded) && total < config.max_spread {
            let dial = self.start(key.clone(), target);
            entry.dials.push(dial);
        }
        let dial = entry.dials.iter_mut().min_by_key(|dial| dial.waiting);
        let dial = dial.expect("one was started if there was none");
        dial.waiting += 1;
        Checkout::Wait(dial.result.clone())
    }

    /// Dials in a task of its own, which then carries the connection: nobody who waits can cancel it for the others.
    fn start(self: &Arc<Self>, key: Key, target: &Target) -> Dial {
        let (report, result) = watch::channel(None);
        let shared = Arc::downgrade(self);
        let closed = self.closed.clone();
        let target = target.clone();
        let life = async move { carry(shared, key, target, report).await };
        tokio::spawn(async move { closed.run_until_cancelled(life).await });
        Dial { result, waiting: 0 }
    }

    /// TCP, TLS, HTTP/2, each with its deadline.
    async fn dial(&self, target: Target) -> Result<(Client, Driver), DialError> {
        let config = &self.config;
        let destination = target.destination;
        let tcp = self.dialer.dial(destination);
        let tcp = timeout(config.tcp_deadline, tcp)
            .await
            .map_err(|_| DialError::TcpTimeout {
                destination,
                after: config.tcp_deadline,
            })?
            .and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp))
            .map_err(|source| DialError::Tcp {
                destination,
                source,
            })?;
        let tls = target.certificate.client_config(&target.expected);
        let (io, peer) = tls::connect(tcp, tls, config.tls_deadline)
            .await
            .map_err(|source| DialError::Tls {
                destination,
                source,
            })?;
        Client::handshake(io, peer, &config.http)
            .await
            .map_err(|source| DialError::Http {
                destination,
                source,
            })
    }

    /// Enters the outcome of the dial that `report` belongs to, then wakes who waits for it.
    fn dialed(
        &self,
        key: &Key,
        report: &watch::Sender<DialResult>,
        outcome: Result<Client, DialError>,
    ) {
        let mut entries = self.entries.lock();
        let entry = entries.entry(key.clone()).or_default();
        let mine = report.subscribe();
        entry.dials.retain(|dial| !dial.result.same_channel(&mine));
        let outcome = outcome.map(|client| entry.connections.push(client));
        if entry.connections.is_empty() && entry.dials.is_empty() {
            entries.remove(key);
        }
        drop(entries);
        report.send_replace(Some(outcome.map_err(Arc::new)));
    }

    /// Takes a connection out; where `only_unused` is set, not if it has a stream. Says whether it did.
    fn remove(&self, key: &Key, client: &Client, only_unused: bool) -> bool {
        let mut entries = self.entries.lock();
        if only_unused && client.state().streams() > 0 {
            return false;
        }
        if let Some(entry) = entries.get_mut(key) {
            let same = |c: &Client| Arc::ptr_eq(c.state(), client.state());
            entry.connections.retain(|c| !same(c));
            if entry.connections.is_empty() && entry.dials.is_empty() {
                entries.remove(key);
            }
        }
        true
    }
}

/// The life of one connection: dialled, entered in the pool, driven to its end, taken out.
async fn carry(shared: Weak<Shared>, key: Key, target: Target, report: watch::Sender<DialResult>) {
    let Some(pool) = shared.upgrade() else { return };
    let release = pool.config.unused_release;
    let revocations = target.certificate.policy().revocations().clone();
    let (client, mut driver) = match pool.dial(target).await {
        Ok(dialed) => dialed,
        Err(error) => return pool.dialed(&key, &report, Err(error)),
    };
    pool.dialed(&key, &report, Ok(client.clone()));
    drop((pool, report));
    let peer = client.peer().clone();
    let mut revoked = pin!(revocations.until_revoked(&peer.chain));
    loop {
        let check = client.state().unused_since() + release;
        tokio::select! {
            () = &mut driver => break,
            // With the driver every stream ends at once: nothing more is said to whom the authority has disowned.
            () = &mut revoked => break,
            () = sleep_until(check) => {}
        }
        let unused = client.state().unused_since().elapsed() >= release;
        let Some(pool) = shared.upgrade() else { return };
        if unused && pool.remove(&key, &client, true) {
            drop(client);
            // With the last handle gone it says goodbye and ends.
            return driver.await;
        }
    }
    if let Some(pool) = shared.upgrade() {
        pool.remove(&key, &client, false);
    }
}
