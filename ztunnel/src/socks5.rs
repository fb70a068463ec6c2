//! SOCKS5 on a pod's loopback (15080), for applications that are not redirected, or want names resolved here: what they
//! ask for is decided and carried as any connection that the pod opens.
//!
//! An application is told that it is connected once it is, and why it is not as far as the protocol has words for that.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh::{
    flow::{Direction, EndReason},
    outcome::{Outcome, Reason, Refusal},
};
use net::{
    socket,
    socks5::{self, Destination, Reply, RequestError},
};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    dns::{self, PodNames},
    flow::Early,
    outbound::{self, Established, Outbound},
    pod::Pod,
};

/// The port, on the pod's loopback.
pub(crate) const PORT: u16 = 15080;
/// How long an application may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// Addresses of one name that are tried.
const TRIES: usize = 3;

/// One connection of the pod.
struct Asked {
    pod: Arc<Pod>,
    names: Arc<dns::Server<PodNames>>,
    client: SocketAddr,
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(
    pod: Arc<Pod>,
    names: Arc<dns::Server<PodNames>>,
    mut stream: TcpStream,
    peer: SocketAddr,
) {
    let _open = pod.node.metrics.socket(Direction::Outbound);
    let peer = socket::unmapped(peer);
    let client = seen_from_outside(&pod, peer);
    if let Err(error) = pod.sockets.adopt(&stream) {
        // The client is gone already.
        return tracing::debug!(%client, %error, "socks5 connection");
    }
    let asked = Asked { pod, names, client };
    let Some(destination) = asked.request(&mut stream).await else {
        return;
    };
    let Ok(_room) = asked.pod.enter().map_err(|error| {
        let reason = EndReason::TooMany;
        asked
            .early(None)
            .failed(&asked.pod.node.metrics, reason, &error);
    }) else {
        return answer(&mut stream, Reply::GeneralFailure).await;
    };
    // Boxed: the decision and the dial need far more room than an idle connection.
    match Box::pin(asked.establish(destination)).await {
        Ok(established) => carry(stream, established).await,
        Err(reason) => answer(&mut stream, reason.into()).await,
    }
}

async fn carry(mut stream: TcpStream, established: Established) {
    match socks5::reply(&mut stream, Reply::Succeeded, None).await {
        Ok(()) => outbound::carry(stream, established).await,
        Err(error) => {
            let (flow, _) = established;
            flow.finish(EndReason::SourceReset, Some(error.to_string()));
        }
    }
}

async fn answer(stream: &mut TcpStream, reply: Reply) {
    if let Err(error) = socks5::reply(stream, reply, None).await {
        tracing::debug!(%error, ?reply, "socks5 answer not sent");
    }
}

/// The application's port at the pod's own address: nobody else could tell who `127.0.0.1` is.
fn seen_from_outside(pod: &Pod, peer: SocketAddr) -> SocketAddr {
    let own = match pod.node.record(&pod.node.state.view(), &pod.binding) {
        Outcome::Go(record) => record.addresses.first().copied(),
        Outcome::Refuse(_) | Outcome::Need(_) => None,
    };
    (own.unwrap_or(peer.ip()), peer.port()).into()
}

/// A client that says nothing.
#[derive(Debug, thiserror::Error)]
#[error("no SOCKS5 request within {PATIENCE:?}")]
struct Silent;

/// A name that leads nowhere.
#[derive(Debug, thiserror::Error)]
#[error("no address of {0}")]
struct Unresolved(String);

impl Asked {
    /// What the application wants. What is no request that is served is told here.
    async fn request(&self, stream: &mut TcpStream) -> Option<Destination> {
        let metrics = &self.pod.node.metrics;
        let refused = |error: &dyn std::error::Error| {
            let reason = EndReason::BadRequest;
            self.early(None).failed(metrics, reason, error);
        };
        match timeout(PATIENCE, socks5::request(stream)).await {
            Ok(Ok(destination)) => return Some(destination),
            Ok(Err(RequestError::Io(error))) => {
                tracing::debug!(client = %self.client, %error, "socks5 client is gone");
            }
            Ok(Err(error)) => refused(&error),
            Err(_) => refused(&Silent),
        }
        None
    }

    /// Tries one address after the other, as long as nobody is there.
    async fn establish(&self, destination: Destination) -> Result<Established, EndReason> {
        let addresses = self.addresses(destination).await?;
        let mut last = EndReason::ResolveFailed;
        for address in addresses.into_iter().take(TRIES) {
            if self.is_ourselves(address) {
                return Err(self.recursion(address));
            }
            let outbound = Outbound::new(self.pod.clone(), self.client, address);
            match outbound.establish().await {
                Ok(established) => return Ok(established),
                Err(reason) => last = reason,
            }
            if !matches!(
                last,
                EndReason::ConnectRefused | EndReason::ConnectUnreachable
            ) {
                break;
            }
        }
        Err(last)
    }

    /// What the application means: what the name would be answered as, if it asked.
    async fn addresses(&self, destination: Destination) -> Result<Vec<SocketAddr>, EndReason> {
        let (name, port) = match destination {
            Destination::Address(address) => return Ok(vec![address]),
            Destination::Name(name, port) => (name, port),
        };
        let mut found = self.names.resolve(&name).await;
        found.retain(|it| it.is_ipv4() || self.pod.node.config.inpod.ipv6);
        if found.is_empty() {
            let reason = EndReason::ResolveFailed;
            let metrics = &self.pod.node.metrics;
            self.early(None).failed(metrics, reason, &Unresolved(name));
            return Err(reason);
        }
        Ok(found.into_iter().map(|it| (it, port).into()).collect())
    }

    /// Our own port: it would call itself.
    fn is_ourselves(&self, address: SocketAddr) -> bool {
        let here = address.ip().is_loopback() || self.pod.sockets.is_local(address.ip());
        here && address.port() == PORT
    }

    fn recursion(&self, address: SocketAddr) -> EndReason {
        let refusal = Refusal::new(Reason::Recursion);
        let early = self.early(Some(address));
        early.refused(&self.pod.node.metrics, &refusal);
        EndReason::Refused(refusal.reason)
    }

    fn early(&self, destination: Option<SocketAddr>) -> Early<'_> {
        Early {
            pod: &self.pod,
            direction: Direction::Outbound,
            source: self.client,
            destination: destination.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, 0).into()),
            client: None,
        }
    }
}
