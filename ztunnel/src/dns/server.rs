//! The listeners on a pod's loopback.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::{op::Message, rr::RecordType};
use mesh::dns::PortRecords;
use net::{
    accept,
    dns::{ResolvConf, Transport, Upstreams, addresses, forward, question},
    drain,
    handover::Port,
    report::Chain,
    socket::Factory,
};
use tokio::{
    io,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::message::{self, Addresses, Other, Question, RawCode, Received};

/// Questions of one pod that are being answered at a time; over that, UDP ones are dropped, as a lossy network would.
const CONCURRENT: usize = 1024;
/// TCP connections of one pod at a time.
const CONNECTIONS: usize = 128;
/// How long a TCP client may take for its next question.
const TCP_IDLE: Duration = Duration::from_secs(5);
const MAX_UDP_REQUEST: usize = 4096;

/// What is known about a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// The mesh answers.
    Addresses(Addresses),
    /// The mesh has no say.
    Nothing,
    /// It cannot be told, since the mesh does not know the client (yet).
    UnknownClient,
}

/// What the mesh says about names to one pod, and what is counted.
pub(crate) trait Names: Send + Sync + 'static {
    /// `name` is lower case without a final dot.
    fn lookup(&self, name: &str, ipv6: bool) -> impl Future<Output = Known> + Send;

    /// Where a port is that is asked for as `_port._protocol.name`; `None`: the mesh has no say, or not yet.
    fn lookup_port(&self, name: &str) -> impl Future<Output = Option<PortRecords>> + Send;

    /// What the mesh knows of a name that an alias leads to: looked up as it is written.
    fn lookup_alias(
        &self,
        name: &str,
        ipv6: bool,
    ) -> impl Future<Output = Option<Addresses>> + Send;

    /// Whether the mesh knows the name, of whatever type.
    fn knows(&self, name: &str) -> bool;

    /// Whom to ask what the mesh does not answer, where not the node's own name servers.
    fn upstreams(&self, ours: Arc<Upstreams>) -> Arc<Upstreams>;

    /// A question of this type arrived over this transport.
    fn asked(&self, kind: &str, transport: Transport);

    /// A question was dropped unread, as too many are being answered.
    fn dropped(&self);

    /// It was carried to a name server, which took so long; `answered`: it could say whether the name is there.
    fn forwarded(&self, kind: &str, transport: Transport, took: Duration, answered: bool);
}

/// Answers one pod's questions.
pub(crate) struct Server<N> {
    names: N,
    sockets: Factory,
    upstreams: Arc<ResolvConf>,
    permits: Arc<Semaphore>,
}

impl<N: Names> Server<N> {
    /// Forwards from sockets that `sockets` makes.
    pub(crate) fn new(names: N, sockets: Factory, upstreams: Arc<ResolvConf>) -> Arc<Self> {
        Arc::new(Self {
            names,
            sockets,
            upstreams,
            permits: Arc::new(Semaphore::new(CONCURRENT)),
        })
    }

    /// Serves datagrams until the drain starts, another process gets what is new, and nothing is being answered any
    /// more; or until the drain is forced.
    pub(crate) async fn serve_udp(
        self: Arc<Self>,
        socket: UdpSocket,
        port: Port,
        drain: drain::Watch,
    ) {
        let socket = Arc::new(socket);
        let mut answering = JoinSet::new();
        let mut buffer = vec![0; MAX_UDP_REQUEST];
        let mut forced = std::pin::pin!(forced(drain.clone()));
        let mut handed_over = std::pin::pin!(handed_over(&socket, &port, drain));
        let mut ours = true;
        while ours || !answering.is_empty() {
            tokio::select! {
                biased;
                () = &mut forced => return,
                received = socket.recv_from(&mut buffer), if ours => match received {
                    Ok((length, peer)) => {
                        self.start_answer(&mut answering, &socket, &buffer[..length], peer);
                    }
                    // An ICMP error about an earlier answer: its client is gone.
                    Err(error) => tracing::debug!(%error, "dns socket"),
                },
                () = &mut handed_over, if ours => {
                    ours = false;
                    while let Ok((length, peer)) = socket.try_recv_from(&mut buffer) {
                        self.start_answer(&mut answering, &socket, &buffer[..length], peer);
                    }
                }
                Some(_) = answering.join_next() => {}
            }
        }
    }

    fn start_answer(
        self: &Arc<Self>,
        answering: &mut JoinSet<()>,
        socket: &Arc<UdpSocket>,
        request: &[u8],
        peer: SocketAddr,
    ) {
        if socket.local_addr().is_ok_and(|own| own == peer) {
            // Forged, and what we answer to ourselves would be answered for ever.
            tracing::debug!("dns question in our own name");
            return;
        }
        let Ok(permit) = self.permits.clone().try_acquire_owned() else {
            self.names.dropped();
            tracing::debug!(%peer, "dns question dropped: too many at a time");
            return;
        };
        let (server, socket) = (self.clone(), socket.clone());
        let request = request.to_vec();
        answering.spawn(async move {
            if let Some(reply) = server.answer(Transport::Udp, &request).await
                && let Err(error) = socket.send_to(&reply, peer).await
            {
                tracing::debug!(%peer, %error, "dns answer not sent");
            }
            drop(permit);
        });
    }

    /// Serves connections until the drain starts.
    pub(crate) async fn serve_tcp(
        self: Arc<Self>,
        listener: TcpListener,
        port: Port,
        drain: drain::Watch,
    ) {
        let options = accept::Options::named("dns").limited_to(CONNECTIONS);
        accept::serve_on(listener, port, options, drain, move |stream, _| {
            let server = self.clone();
            async move {
                if let Err(error) = server.serve_connection(stream).await {
                    tracing::debug!(%error, "dns connection");
                }
            }
        })
        .await;
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let request = match timeout(TCP_IDLE, forward::read_message(&mut stream)).await {
                Ok(Ok(request)) => request,
                Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Ok(()),
            };
            let permit = self.permits.acquire().await;
            let reply = self.answer(Transport::Tcp, &request).await;
            drop(permit);
            let Some(reply) = reply else { return Ok(()) };
            timeout(TCP_IDLE, forward::write_message(&mut stream, &reply)).await??;
        }
    }

    /// The addresses that the pod would be told for a name, the name's own aliases followed; IPv4 first.
    pub(crate) async fn resolve(&self, name: &str) -> Vec<IpAddr> {
        let _permit = self.permits.acquire().await;
        let (v4, v6) = tokio::join!(
            self.resolve_family(name, RecordType::A),
            self.resolve_family(name, RecordType::AAAA)
        );
        [v4, v6].concat()
    }

    async fn resolve_family(&self, name: &str, kind: RecordType) -> Vec<IpAddr> {
        let Some(request) = question(name, kind) else {
            return Vec::new();
        };
        for transport in [Transport::Udp, Transport::Tcp] {
            let reply = self.answer(transport, &request).await;
            let reply = reply.and_then(|bytes| Message::from_vec(&bytes).ok());
            match reply {
                Some(cut) if cut.metadata.truncation => {}
                Some(whole) => return addresses(&whole).into_iter().map(|(it, _)| it).collect(),
                None => break,
            }
        }
        Vec::new()
    }

    async fn answer(&self, transport: Transport, request: &[u8]) -> Option<Vec<u8>> {
        match message::inspect(request) {
            Received::Garbage => None,
            Received::NotARequest => message::raw_failure(request, RawCode::FormErr),
            Received::Malformed => {
                self.names.asked(message::UNKNOWN, transport);
                message::raw_failure(request, RawCode::FormErr)
            }
            Received::Other(other) => {
                self.names.asked(&other.kind, transport);
                self.answer_other(&other, transport, request).await
            }
            Received::Address(query) => {
                self.names.asked(query.type_name(), transport);
                self.answer_address(&query, transport, request).await
            }
            Received::Port(query) => {
                self.names.asked(query.type_name(), transport);
                self.answer_port(&query, transport, request).await
            }
        }
    }

    async fn answer_address(
        &self,
        query: &Question,
        transport: Transport,
        request: &[u8],
    ) -> Option<Vec<u8>> {
        match self.names.lookup(&query.name(), query.wants_ipv6()).await {
            Known::Nothing => {
                let reply = self.relay(query.type_name(), transport, request).await?;
                Some(self.through_mesh(query, transport, reply).await)
            }
            Known::UnknownClient => query.failure(),
            Known::Addresses(addresses) => {
                let limit = limit(query, transport);
                query.answer(&addresses, limit).or_else(|| query.failure())
            }
        }
    }

    async fn answer_port(
        &self,
        query: &Question,
        transport: Transport,
        request: &[u8],
    ) -> Option<Vec<u8>> {
        let name = query.name();
        if let Some(known) = self.names.lookup_port(&name).await {
            let limit = limit(query, transport);
            return query.answer_port(&known, limit).or_else(|| query.failure());
        }
        self.relay_of(&name, query.type_name(), transport, request)
            .await
    }

    /// A name server's answer; where its aliases lead to a name of the mesh, as an ExternalName does, with the addresses
    /// that the name has here.
    async fn through_mesh(
        &self,
        query: &Question,
        transport: Transport,
        reply: Vec<u8>,
    ) -> Vec<u8> {
        let aliases = query.aliases(&reply);
        for (at, alias) in aliases.iter().enumerate() {
            let Some(target) = message::target(alias) else {
                continue;
            };
            let known = self.names.lookup_alias(&target, query.wants_ipv6()).await;
            if let Some(known) = known {
                let limit = limit(query, transport);
                let answered = query.answer_through(&aliases[..=at], &known, limit);
                return answered.unwrap_or(reply);
            }
        }
        reply
    }

    /// What has no address for an answer is the name servers' to answer, but not whether the name is there.
    async fn answer_other(
        &self,
        other: &Other,
        transport: Transport,
        request: &[u8],
    ) -> Option<Vec<u8>> {
        match &other.name {
            Some(name) => self.relay_of(name, &other.kind, transport, request).await,
            None => self.forward(&other.kind, transport, request).await,
        }
    }

    /// A name server's answer to a question for `name`, which does not deny what the mesh knows.
    async fn relay_of(
        &self,
        name: &str,
        kind: &str,
        transport: Transport,
        request: &[u8],
    ) -> Option<Vec<u8>> {
        let mut reply = self.relay(kind, transport, request).await?;
        if self.names.knows(name) {
            message::admit_name(&mut reply);
        }
        Some(reply)
    }

    /// A name server's answer to a plain question, as from somebody who only passes it on.
    async fn relay(&self, kind: &str, transport: Transport, request: &[u8]) -> Option<Vec<u8>> {
        let mut reply = self.forward(kind, transport, request).await?;
        message::disclaim(&mut reply);
        Some(reply)
    }

    /// What is no plain question (an update, what is signed, an operation that we do not know) goes both ways as it is.
    async fn forward(&self, kind: &str, transport: Transport, request: &[u8]) -> Option<Vec<u8>> {
        let started = Instant::now();
        let upstreams = self.names.upstreams(self.upstreams.current());
        let replied = forward::exchange(&self.sockets, &upstreams, transport, request).await;
        let answered = replied.as_ref().is_ok_and(|it| !message::is_failure(it));
        self.names
            .forwarded(kind, transport, started.elapsed(), answered);
        match replied {
            Ok(reply) => Some(reply),
            Err(error) => {
                tracing::debug!(
                    error = Chain(&error).to_string(),
                    "dns question not answered upstream"
                );
                message::raw_failure(request, RawCode::ServFail)
            }
        }
    }
}

/// Largest answer that the client takes.
fn limit(query: &Question, transport: Transport) -> usize {
    match transport {
        Transport::Udp => query.max_udp_payload(),
        Transport::Tcp => usize::from(u16::MAX),
    }
}

async fn handed_over(socket: &UdpSocket, port: &Port, mut drain: drain::Watch) {
    drain.started().await;
    port.handed_over(socket).await;
}

async fn forced(mut drain: drain::Watch) {
    drain.forced().await;
}

#[cfg(test)]
mod tests;
