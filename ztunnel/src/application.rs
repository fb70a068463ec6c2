//! Connecting to the application inside its pod, as if its client did.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use mesh::{flow::EndReason, identity::Identity, inbound::InboundTarget};
use net::{
    proxy_protocol,
    socket::{Factory, Operation, SocketError},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use crate::{
    config::OriginalSource,
    pod::{CONNECT_DEADLINE, Pod},
};

/// What is to be dialled, and for whom.
pub(crate) struct Dial<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) client: SocketAddr,
    /// What the client has proven.
    pub(crate) identity: Option<Identity>,
    pub(crate) target: &'a InboundTarget,
    /// The application has an application tunnel.
    pub(crate) tunnelled: bool,
}

/// A connection to the application, which may have to be told who calls.
pub(crate) struct Dialled {
    stream: TcpStream,
    introduction: Option<Vec<u8>>,
}

/// Why the application could not be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// Refused, unreachable, or no socket to be had.
    #[error("connect to the application at {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: SocketError,
    },
    /// No answer.
    #[error("connect to the application at {address} timed out after {CONNECT_DEADLINE:?}")]
    Timeout { address: SocketAddr },
}

impl DialError {
    /// What the metric and the log line say.
    pub(crate) fn end_reason(&self) -> EndReason {
        match self {
            Self::Connect { source, .. } => source.end_reason(),
            Self::Timeout { .. } => EndReason::ConnectTimedOut,
        }
    }
}

/// Connections in their clients' names are asked for, and cannot be had: told before there is one, instead of by each.
#[derive(Debug, thiserror::Error)]
#[error(
    "ENABLE_ORIG_SRC is true, but applications cannot be shown their clients' addresses, which takes CAP_NET_ADMIN"
)]
pub struct OriginalSourceError(#[source] SocketError);

/// Whether `sockets` may do what the setting asks for. That there are no sockets at all, listeners will tell.
pub(crate) fn check_original_source(
    asked: OriginalSource,
    sockets: &Factory,
) -> Result<(), OriginalSourceError> {
    if asked != OriginalSource::Required {
        return Ok(());
    }
    match sockets.check_transparent() {
        Err(
            error @ SocketError::Io {
                operation: Operation::Set(_),
                ..
            },
        ) => Err(OriginalSourceError(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Dial<'_> {
    /// Connects, with the client's address as source where that is possible.
    pub(crate) async fn connect(&self) -> Result<Dialled, DialError> {
        let address = self.address();
        let source = self.pod.source_for(self.client, address);
        let connecting = self.pod.connector.connect_within(address, source);
        let stream = timeout(CONNECT_DEADLINE, connecting)
            .await
            .map_err(|_| DialError::Timeout { address })?
            .map_err(|source| DialError::Connect { address, source })?;
        Ok(Dialled {
            stream,
            introduction: self.introduction(),
        })
    }

    /// An application behind a PROXY header listens on loopback, so that nobody else can send it one.
    fn address(&self) -> SocketAddr {
        let target = self.target.destination;
        let local = self.pod.node.config.localhost_app_tunnel;
        if !(local && self.tunnelled && self.target.proxy_destination.is_some()) {
            return target;
        }
        let loopback: IpAddr = match target.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        (loopback, target.port()).into()
    }

    fn introduction(&self) -> Option<Vec<u8>> {
        let destination = self.target.proxy_destination?;
        let identity = self.identity.as_ref();
        Some(proxy_protocol::header(self.client, destination, identity))
    }
}

impl Dialled {
    /// Hands the connection out to a client that is not introduced.
    pub(crate) fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Says who calls, where the application wants to know, and hands the connection out.
    pub(crate) async fn introduce(mut self) -> io::Result<TcpStream> {
        if let Some(introduction) = &self.introduction {
            self.stream.write_all(introduction).await?;
        }
        Ok(self.stream)
    }
}
