//! The accept loop: the one copy of it.
//!
//! Accepts until the drain begins and, where others share the port, has been handed over; gives each connection to a
//! handler, owns the handlers' tasks, and outlives short storms such as running out of descriptors. What a connection
//! means is the handler's.

use std::{fmt, future::Future, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures_util::FutureExt;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tracing::{debug, warn};

use crate::{drain, handover::Port, lanes::Lanes};

/// The first pause after the process ran out of something; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Tasks that have ended are taken off so often at most: most end on another thread, and each would wake this one.
const REAP: Duration = Duration::from_millis(50);

/// What an accept loop is called in logs, and how much it takes on.
#[derive(Clone, Debug)]
pub struct Options {
    /// For logs: `outbound`, `admin`.
    pub name: &'static str,
    /// Connections open at a time; more wait in the kernel's backlog. `None`: as many as there are descriptors.
    pub limit: Option<usize>,
    /// Where connections run. `None`: where they are accepted.
    pub lanes: Option<Lanes>,
}

impl Options {
    /// No limit, and everything on the runtime that accepts.
    pub fn named(name: &'static str) -> Self {
        Self {
            name,
            limit: None,
            lanes: None,
        }
    }

    /// At most `limit` connections open at a time.
    pub fn limited_to(self, limit: usize) -> Self {
        Self {
            limit: Some(limit),
            ..self
        }
    }

    /// Connections are spread over `lanes`.
    pub fn spread(self, lanes: &Lanes) -> Self {
        Self {
            lanes: Some(lanes.clone()),
            ..self
        }
    }
}

/// Accepts on `listener` until `drain` starts, then closes the listener at once and waits for the handlers; those
/// still running when the drain is forced are dropped. Returns when no handler is left.
///
/// The handler's future is a task of its own; a panic in one is logged and ends that connection only.
pub async fn serve<H, F>(listener: TcpListener, options: Options, drain: drain::Watch, handler: H)
where
    H: Fn(TcpStream, SocketAddr) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    serve_on(listener, Port::unshared(), options, drain, handler).await;
}

/// As [`serve`], on a port that others may share: the listener is closed only once another one gets what is new.
pub async fn serve_on<H, F>(
    listener: TcpListener,
    port: Port,
    options: Options,
    drain: drain::Watch,
    handler: H,
) where
    H: Fn(TcpStream, SocketAddr) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let permits = options.limit.map(|limit| Arc::new(Semaphore::new(limit)));
    let admit = || permit(permits.clone());
    let handler =
        |stream, peer, permit, _closing| handler(stream, peer).map(move |()| drop(permit));
    serve_admitted(listener, port, options, drain, admit, handler).await;
}

async fn permit(permits: Option<Arc<Semaphore>>) -> Option<OwnedSemaphorePermit> {
    permits?.acquire_owned().await.ok()
}

/// As [`serve_on`], but a connection is accepted only once `admit` is ready, and the handler is given what it answers:
/// that is the limit here. `admit` is called anew after each turn of the loop, and must be cancel-safe.
///
/// The handler is also given a watch that starts when the listener is closed: from then on whoever is told to come again
/// finds another one there.
pub async fn serve_admitted<A, G, P, H, F>(
    listener: TcpListener,
    port: Port,
    options: Options,
    drain: drain::Watch,
    admit: A,
    handler: H,
) where
    A: Fn() -> G,
    G: Future<Output = P>,
    H: Fn(TcpStream, SocketAddr, P, drain::Watch) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut drain = drain;
    let (closing, closed) = drain::channel();
    let mut accepting = Accepting {
        listener: &listener,
        name: options.name,
        lanes: options.lanes.unwrap_or_else(Lanes::here),
        admit,
        handler,
        closed: closed.release(),
        tasks: Tasks::new(options.name),
    };
    let mode = accepting.until(drain.started()).await;
    let handed_over = async {
        let _ = drain
            .clone()
            .until_forced(port.handed_over(&listener))
            .await;
    };
    accepting.until(handed_over).await;
    accepting.take_waiting();
    let tasks = accepting.tasks;
    drop(listener);
    closing.start(mode);
    tasks.finish(drain).await;
}

/// An accept loop under way.
struct Accepting<'a, A, H> {
    listener: &'a TcpListener,
    name: &'static str,
    lanes: Lanes,
    admit: A,
    handler: H,
    closed: drain::Watch,
    tasks: Tasks,
}

/// The tasks of connections.
struct Tasks {
    /// The listener's.
    name: &'static str,
    all: JoinSet<()>,
    /// When those that have ended are looked for again.
    reaped_until: Instant,
}

impl<A, G, P, H, F> Accepting<'_, A, H>
where
    A: Fn() -> G,
    G: Future<Output = P>,
    H: Fn(TcpStream, SocketAddr, P, drain::Watch) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    async fn until<T>(&mut self, end: impl Future<Output = T>) -> T {
        let mut end = pin!(end);
        let mut pause = FIRST_PAUSE;
        loop {
            let accepted = tokio::select! {
                biased;
                ended = &mut end => return ended,
                () = self.tasks.reap() => continue,
                accepted = next(self.listener, (self.admit)()) => accepted,
            };
            match accepted {
                Ok((stream, peer, admitted)) => {
                    pause = FIRST_PAUSE;
                    self.begin(stream, peer, admitted);
                }
                Err(error) if is_of_one_connection(&error) => {
                    debug!(listener = self.name, %error, "a connection ended before it was accepted");
                }
                Err(error) => {
                    warn!(listener = self.name, %error, ?pause, "cannot accept, waiting");
                    tokio::select! {
                        ended = &mut end => return ended,
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                    }
                }
            }
        }
    }

    fn begin(&mut self, stream: TcpStream, peer: SocketAddr, admitted: P) {
        let place = self.lanes.place();
        let (stream, runtime) = match self.lanes.settle(stream, &place) {
            Ok(settled) => settled,
            Err(error) => {
                return warn!(listener = self.name, %error, "cannot serve a connection");
            }
        };
        let handled = (self.handler)(stream, peer, admitted, self.closed.clone());
        // Not an async block: that would keep room for the handler's future twice, for as long as the connection lives.
        self.tasks
            .all
            .spawn_on(handled.map(move |()| drop(place)), runtime);
    }

    /// Takes in what the kernel has accepted already and the runtime has not told us of. What is not admitted now is
    /// left to whoever shares the port, where the kernel is willing to move it.
    fn take_waiting(&mut self) {
        let socket = SockRef::from(self.listener);
        while let Some(admitted) = (self.admit)().now_or_never() {
            let Ok((stream, peer)) = socket.accept() else {
                return;
            };
            let registered = stream
                .set_nonblocking(true)
                .and_then(|()| TcpStream::from_std(stream.into()));
            match (registered, peer.as_socket()) {
                (Ok(stream), Some(peer)) => self.begin(stream, peer, admitted),
                (Err(error), _) => warn!(listener = self.name, %error, "cannot serve a connection"),
                (Ok(_), None) => {}
            }
        }
    }
}

async fn next<P>(
    listener: &TcpListener,
    admit: impl Future<Output = P>,
) -> io::Result<(TcpStream, SocketAddr, P)> {
    let admitted = admit.await;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, admitted))
}

impl Tasks {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            all: JoinSet::new(),
            reaped_until: Instant::now(),
        }
    }

    /// Resolves once some were taken off. Cancel-safe.
    async fn reap(&mut self) {
        sleep_until(self.reaped_until).await;
        match self.all.join_next().await {
            Some(ended) => report(self.name, ended),
            None => std::future::pending().await,
        }
        while let Some(ended) = self.all.try_join_next() {
            report(self.name, ended);
        }
        self.reaped_until = Instant::now() + REAP;
    }

    /// Waits for all, or until the drain is forced; then they are dropped.
    async fn finish(mut self, mut drain: drain::Watch) {
        let mut forced = pin!(drain.forced());
        loop {
            tokio::select! {
                ended = self.all.join_next() => match ended {
                    Some(ended) => report(self.name, ended),
                    None => return,
                },
                () = &mut forced => break,
            }
        }
        self.all.shutdown().await;
    }
}

fn report(name: &'static str, ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        warn!(listener = name, error = %Panic(&error), "a connection's task panicked");
    }
}

struct Panic<'a>(&'a tokio::task::JoinError);

impl fmt::Display for Panic<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Errors that accept(2) passes on from the new connection: it is gone, the listener is well.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted,
        NetworkDown, NetworkUnreachable, TimedOut,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
            | TimedOut
    )
}

#[cfg(test)]
mod tests;
