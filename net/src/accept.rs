//! The accept loop: the one copy of it.
//!
//! Accepts until the drain begins, gives each connection to a handler, owns the handlers' tasks, and outlives short
//! storms such as running out of descriptors. What a connection means is the handler's.

use std::{fmt, future::Future, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tracing::{debug, warn};

use crate::drain;

/// The first pause after the process ran out of something; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What an accept loop is called in logs, and how much it takes on.
#[derive(Clone, Debug)]
pub struct Options {
    /// For logs: `outbound`, `admin`.
    pub name: &'static str,
    /// Connections open at a time; more wait in the kernel's backlog. `None`: as many as there are descriptors.
    pub limit: Option<usize>,
}

impl Options {
    /// No limit.
    pub fn named(name: &'static str) -> Self {
        Self { name, limit: None }
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
    let permits = options.limit.map(|n| Arc::new(Semaphore::new(n)));
    let admit = || permit(permits.clone());
    serve_admitted(
        listener,
        options.name,
        drain,
        admit,
        |stream, peer, permit| {
            let work = handler(stream, peer);
            async move {
                work.await;
                drop(permit);
            }
        },
    )
    .await;
}

async fn permit(permits: Option<Arc<Semaphore>>) -> Option<OwnedSemaphorePermit> {
    permits?.acquire_owned().await.ok()
}

/// As [`serve`], but a connection is accepted only once `admit` is ready, and the handler is given what it answers.
/// `admit` is called anew after each turn of the loop, and must be cancel-safe.
pub async fn serve_admitted<A, G, P, H, F>(
    listener: TcpListener,
    name: &'static str,
    drain: drain::Watch,
    admit: A,
    handler: H,
) where
    A: Fn() -> G,
    G: Future<Output = P>,
    H: Fn(TcpStream, SocketAddr, P) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut drain = drain;
    let mut tasks = JoinSet::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let accepted = tokio::select! {
            biased;
            _ = drain.started() => break,
            Some(ended) = tasks.join_next() => {
                report(name, ended);
                continue;
            }
            accepted = next(&listener, admit()) => accepted,
        };
        match accepted {
            Ok((stream, peer, admitted)) => {
                pause = FIRST_PAUSE;
                tasks.spawn(handler(stream, peer, admitted));
            }
            Err(error) if is_of_one_connection(&error) => {
                debug!(listener = name, %error, "a connection ended before it was accepted");
            }
            Err(error) => {
                warn!(listener = name, %error, ?pause, "cannot accept, waiting");
                tokio::select! {
                    _ = drain.started() => break,
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                }
            }
        }
    }
    drop(listener);
    finish(name, tasks, drain).await;
}

async fn next<P>(
    listener: &TcpListener,
    admit: impl Future<Output = P>,
) -> io::Result<(TcpStream, SocketAddr, P)> {
    let admitted = admit.await;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, admitted))
}

async fn finish(name: &'static str, mut tasks: JoinSet<()>, mut drain: drain::Watch) {
    let mut forced = pin!(drain.forced());
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                Some(ended) => report(name, ended),
                None => return,
            },
            () = &mut forced => break,
        }
    }
    tasks.shutdown().await;
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
