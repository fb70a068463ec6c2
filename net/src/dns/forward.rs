//! Questions that the mesh does not answer: carried to a name server and back as the bytes they are.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::socket::{Factory, SocketError, SourceAddress};

use super::resolv_conf::Upstreams;

/// RFC 1035 4.1.1.
const HEADER_LEN: usize = 12;

/// Largest message over UDP that is carried: what fits in one datagram of EDNS's customary size and then some.
const MAX_UDP_REPLY: usize = 16 << 10;
/// For all servers and attempts together: the client has given up by then.
const OVERALL: Duration = Duration::from_secs(10);

/// How the client asked, and so how the server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One datagram each way.
    Udp,
    /// A message after its length (RFC 1035 4.2.2).
    Tcp,
}

impl Transport {
    /// The value of the metric label `request_protocol`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// Why no answer came.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Nobody to ask.
    #[error("no name server is configured")]
    NoServer,
    /// Nobody answered in time.
    #[error("no name server answered in time")]
    Timeout,
    /// The last server that was asked could not be.
    #[error("ask name server {server}")]
    Io {
        /// Which.
        server: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The socket to the last server that was asked could not be made.
    #[error("reach name server {server}")]
    Socket {
        /// Which.
        server: SocketAddr,
        /// Why.
        source: SocketError,
    },
}

/// Asks the servers in order, round by round, until one answers. The sockets are made by `sockets`, in its namespace.
///
/// # Errors
/// Nobody answered, within 10 s at most.
pub async fn exchange(
    sockets: &Factory,
    upstreams: &Upstreams,
    transport: Transport,
    request: &[u8],
) -> Result<Vec<u8>, ForwardError> {
    let asking = ask_in_turn(sockets, upstreams, transport, request);
    timeout(OVERALL, asking)
        .await
        .unwrap_or(Err(ForwardError::Timeout))
}

async fn ask_in_turn(
    sockets: &Factory,
    upstreams: &Upstreams,
    transport: Transport,
    request: &[u8],
) -> Result<Vec<u8>, ForwardError> {
    let mut last = ForwardError::NoServer;
    for _ in 0..upstreams.attempts {
        for &server in &upstreams.servers {
            match ask_once(sockets, server, transport, request, upstreams.timeout).await {
                Ok(reply) => return Ok(reply),
                Err(error) => last = error,
            }
        }
    }
    Err(last)
}

async fn ask_once(
    sockets: &Factory,
    server: SocketAddr,
    transport: Transport,
    request: &[u8],
    patience: Duration,
) -> Result<Vec<u8>, ForwardError> {
    let asking = async {
        match transport {
            Transport::Udp => ask_udp(sockets, server, request).await,
            Transport::Tcp => ask_tcp(sockets, server, request).await,
        }
    };
    timeout(patience, asking)
        .await
        .unwrap_or(Err(ForwardError::Timeout))
}

async fn ask_udp(
    sockets: &Factory,
    server: SocketAddr,
    request: &[u8],
) -> Result<Vec<u8>, ForwardError> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let private = Factory {
        reuse_port: false,
        ..sockets.clone()
    };
    let socket = private
        .bind_udp((any, 0).into())
        .map_err(|source| ForwardError::Socket { server, source })?;
    let failed = |source| ForwardError::Io { server, source };
    socket.connect(server).await.map_err(failed)?;
    socket.send(request).await.map_err(failed)?;
    let mut reply = vec![0; MAX_UDP_REPLY];
    loop {
        let length = socket.recv(&mut reply).await.map_err(failed)?;
        if answers(request, &reply[..length]) {
            reply.truncate(length);
            return Ok(reply);
        }
    }
}

async fn ask_tcp(
    sockets: &Factory,
    server: SocketAddr,
    request: &[u8],
) -> Result<Vec<u8>, ForwardError> {
    let mut stream = sockets
        .connect(server, SourceAddress::Own)
        .await
        .map_err(|source| ForwardError::Socket { server, source })?;
    let exchanged = async {
        write_message(&mut stream, request).await?;
        let reply = read_message(&mut stream).await?;
        match answers(request, &reply) {
            true => Ok(reply),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    };
    exchanged
        .await
        .map_err(|source| ForwardError::Io { server, source })
}

/// Whether `reply` is a response with the request's id; the socket is connected, so that only the server can send it.
fn answers(request: &[u8], reply: &[u8]) -> bool {
    reply.len() >= HEADER_LEN && reply[..2] == request[..2] && reply[2] & 0x80 != 0
}

/// Writes a message after its length. A longer one than 65535 bytes cannot be.
pub async fn write_message<W: tokio::io::AsyncWrite + Unpin>(
    stream: &mut W,
    message: &[u8],
) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

/// Reads a message after its length.
pub async fn read_message<R: tokio::io::AsyncRead + Unpin>(stream: &mut R) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}
