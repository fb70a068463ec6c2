//! ZDS: how the node agent hands pods' namespaces to the node tunnel (node-tunnel.md 7.1 and 7.2).
//!
//! One protobuf per packet of a Unix `SOCK_SEQPACKET` socket; an Add carries exactly one namespace descriptor. Both
//! roles are here: [`Listener`] and [`AgentConnection`] for the agent, [`Dialer`] and [`TunnelConnection`] for the
//! tunnel. What to do with a pod is not.
//!
//! Versions: a Hello is one-way, so the tunnel says the highest version it knows and the agent keeps to the lower of
//! that and its own. Version 2 adds one request, Drain. An agent that knows version 1 alone reads the unknown number
//! and goes on with version 1 (checked against istio-cni, which only logs it); should one hang up instead, before its
//! first request, [`Dialer`] says 1 at the next attempt.

pub mod message;
mod packet;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::timeout;

use crate::netns::{Netns, NetnsError};
use message::{decode_hello, decode_request, decode_response, encode_request};
use packet::Socket;
pub use packet::{MAX_PACKET, PacketError};

/// Where the agent listens unless told otherwise.
pub const SOCKET_PATH: &str = "/var/run/ztunnel/ztunnel.sock";
/// How long the agent waits for a Hello, for a write, and for an acknowledgement.
pub const REPLY_DEADLINE: Duration = Duration::from_secs(5);

/// The protocol's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Istio's.
    V1,
    /// Ours: with [`Request::Drain`].
    V2,
}

/// Which pod a namespace belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadInfo {
    /// The pod's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

/// What the agent asks of the tunnel. Pods are named by their Kubernetes uid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Serve this pod.
    Add {
        /// The pod.
        uid: String,
        /// Which workload it is.
        info: WorkloadInfo,
        /// Where its sockets are made.
        netns: Netns,
    },
    /// In a snapshot: the pod still exists, its namespace is not known here.
    Keep {
        /// The pod.
        uid: String,
    },
    /// The pod is gone, or has left the mesh.
    Delete {
        /// The pod.
        uid: String,
    },
    /// The snapshot is complete: pods not named since connect are gone.
    SnapshotSent,
    /// Version 2: the pod began terminating. Send GOAWAY, take what still comes, let requests finish.
    Drain {
        /// The pod.
        uid: String,
    },
}

/// A message that breaks the protocol; the connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The packet could not be read or written.
    #[error("ZDS packet")]
    Packet(#[from] PacketError),
    /// The bytes are no protobuf.
    #[error("{message} is not readable")]
    Decode {
        /// The message that was expected.
        message: &'static str,
        /// Why.
        source: prost::DecodeError,
    },
    /// A request with no payload that we know.
    #[error("a request of an unknown kind")]
    UnknownRequest,
    /// A response with no payload that we know.
    #[error("a response of an unknown kind")]
    UnknownResponse,
    /// A Hello of version 0.
    #[error("a Hello without a version")]
    UnknownVersion,
    /// An Add whose namespace descriptor is missing.
    #[error("Add of pod {uid} carries no namespace descriptor")]
    NoDescriptor {
        /// The pod.
        uid: String,
    },
    /// An Add with several descriptors.
    #[error("Add of pod {uid} carries {count} descriptors instead of 1")]
    ManyDescriptors {
        /// The pod.
        uid: String,
        /// How many.
        count: usize,
    },
    /// Descriptors on a message that takes none.
    #[error("{message} carries {count} descriptors")]
    UnexpectedDescriptor {
        /// The message.
        message: &'static str,
        /// How many.
        count: usize,
    },
    /// An Add without workload_info.
    #[error("Add of pod {uid} does not say which workload it is")]
    NoWorkloadInfo {
        /// The pod.
        uid: String,
    },
    /// A request without a pod uid.
    #[error("{message} names no pod")]
    NoUid {
        /// The message.
        message: &'static str,
    },
    /// The other side hung up.
    #[error("the other side closed the connection")]
    Closed,
    /// A packet arrived where none was asked for.
    #[error("an unexpected packet")]
    Unexpected,
}

/// What the tunnel received.
#[derive(Debug)]
pub enum Received {
    /// A request to carry out and acknowledge.
    Request(Request),
    /// An Add whose descriptor is no network namespace (any more), or could not be taken: to be acknowledged with the
    /// error. The connection is well.
    BadNamespace {
        /// The pod.
        uid: String,
        /// What is wrong with it.
        error: NetnsError,
    },
}

/// Why a request of the agent was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The tunnel says why; the connection is well, and the tunnel retries an Add by itself.
    #[error("the tunnel answered: {0}")]
    Refused(String),
    /// No answer in time. The connection is kept: the late answer is recognised and dropped when it comes.
    #[error("no answer from the tunnel within {0:?}")]
    Timeout(Duration),
    /// The tunnel's version has no such request.
    #[error("the tunnel speaks version 1, which has no Drain")]
    NotInVersion,
    /// The connection is unusable.
    #[error("ZDS connection to the tunnel")]
    Protocol(#[from] ProtocolError),
}

/// The agent's listening socket. Dropping it leaves the file; the next agent removes it.
#[derive(Debug)]
pub struct Listener(Socket);

/// A tunnel, as its agent sees it.
#[derive(Debug)]
pub struct AgentConnection {
    socket: Socket,
    version: Version,
    /// Answers that are still to come for requests that timed out: answers come in order and carry no correlation.
    owed: usize,
}

/// The agent, as a tunnel sees it.
#[derive(Debug)]
pub struct TunnelConnection {
    socket: Socket,
}

/// Connects to the agent and settles on a version.
#[derive(Debug)]
pub struct Dialer {
    path: PathBuf,
    version: Version,
}

impl Listener {
    /// Listens at `path`, replacing a stale socket file. Must run within a runtime.
    ///
    /// # Errors
    /// The system's, naming nothing: the caller knows the path.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Socket::listen(path).map(Self),
        }
    }

    /// The next tunnel, before its Hello: pass it to [`AgentConnection::greet`] in a task of its own, so that a silent
    /// one holds up nobody. Cancel-safe.
    ///
    /// # Errors
    /// The system's; the listener remains usable.
    pub async fn accept(&self) -> io::Result<Incoming> {
        self.0.accept().await.map(Incoming)
    }
}

/// An accepted connection that has not said Hello.
#[derive(Debug)]
pub struct Incoming(Socket);

impl AgentConnection {
    /// Waits for the Hello, at most [`REPLY_DEADLINE`].
    ///
    /// # Errors
    /// [`CallError::Timeout`], or [`CallError::Protocol`] for anything but a Hello. A version above ours counts as ours.
    pub async fn greet(incoming: Incoming) -> Result<Self, CallError> {
        let Incoming(socket) = incoming;
        let packet = timeout(REPLY_DEADLINE, socket.receive())
            .await
            .map_err(|_| CallError::Timeout(REPLY_DEADLINE))?;
        let packet = packet.map_err(ProtocolError::from)?;
        let packet = packet.ok_or(ProtocolError::Closed)?;
        let version = decode_hello(&packet)?;
        Ok(Self {
            socket,
            version,
            owed: 0,
        })
    }

    /// What the connection speaks.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Sends `request` and waits for its acknowledgement, each at most [`REPLY_DEADLINE`].
    ///
    /// Not cancel-safe: a dropped call leaves an answer that would be taken for the next one's.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Protocol`] the connection is to be dropped.
    pub async fn call(&mut self, request: &Request) -> Result<(), CallError> {
        if self.version < Version::V2 && matches!(request, Request::Drain { .. }) {
            return Err(CallError::NotInVersion);
        }
        let bytes = encode_request(request);
        let netns = match request {
            Request::Add { netns, .. } => Some(netns),
            _ => None,
        };
        let late = |_| CallError::Timeout(REPLY_DEADLINE);
        timeout(REPLY_DEADLINE, self.socket.send(&bytes, netns))
            .await
            .map_err(late)?
            .map_err(ProtocolError::from)?;
        self.owed += 1;
        timeout(REPLY_DEADLINE, self.answer()).await.map_err(late)?
    }

    async fn answer(&mut self) -> Result<(), CallError> {
        loop {
            let packet = self.socket.receive().await.map_err(ProtocolError::from)?;
            let error = decode_response(&packet.ok_or(ProtocolError::Closed)?)?;
            self.owed -= 1;
            match (self.owed, error) {
                (0, None) => return Ok(()),
                (0, Some(error)) => return Err(CallError::Refused(error)),
                (_, error) => tracing::debug!(?error, "a late ZDS answer"),
            }
        }
    }

    /// Resolves when the tunnel is gone or breaks the protocol; to be awaited between calls, in place of upstream's
    /// polling. Answers that are owed are taken in. Cancel-safe.
    pub async fn closed(&mut self) -> ProtocolError {
        loop {
            let packet = match self.socket.receive().await {
                Ok(Some(packet)) => packet,
                Ok(None) => return ProtocolError::Closed,
                Err(error) => return error.into(),
            };
            match decode_response(&packet) {
                Ok(_) if self.owed > 0 => self.owed -= 1,
                Ok(_) => return ProtocolError::Unexpected,
                Err(error) => return error,
            }
        }
    }
}

impl Dialer {
    /// To the agent at `path`, with version 2 first.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::with_version(path, Version::V2)
    }

    /// To the agent at `path`, with `version` and none above it.
    pub fn with_version(path: impl Into<PathBuf>, version: Version) -> Self {
        Self {
            path: path.into(),
            version,
        }
    }

    /// Connects and says Hello.
    ///
    /// # Errors
    /// [`ProtocolError`]: the agent does not listen, or hung up at once.
    pub async fn connect(&self) -> Result<TunnelConnection, ProtocolError> {
        let socket = Socket::connect(&self.path).map_err(PacketError::from)?;
        let hello = message::encode_hello(self.version);
        socket.send(&hello, None).await?;
        Ok(TunnelConnection { socket })
    }

    /// To be told when an agent hung up before its first request: the next Hello then says version 1.
    pub fn hung_up_early(&mut self) {
        self.version = Version::V1;
    }
}

impl TunnelConnection {
    /// The next request; `None` when the agent closed the connection. Cancel-safe.
    ///
    /// # Errors
    /// [`ProtocolError`]: the connection cannot go on.
    pub async fn receive(&mut self) -> Result<Option<Received>, ProtocolError> {
        match self.socket.receive().await? {
            Some(packet) => decode_request(packet).map(Some),
            None => Ok(None),
        }
    }

    /// Answers the oldest request that has none yet: done, or why not. The text is cut to fit a packet.
    ///
    /// # Errors
    /// [`ProtocolError::Packet`] when the agent is gone.
    pub async fn acknowledge(&mut self, result: Result<(), &str>) -> Result<(), ProtocolError> {
        let response = message::encode_response(result);
        self.socket.send(&response, None).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
