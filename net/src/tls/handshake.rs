//! TLS handshakes with a deadline, and whose fault it is when one fails.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{AlertDescription, ClientConfig, InvalidMessage, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    agree,
    stream::RecordStream,
    verify::{PeerCertificateError, PeerIdentity, chain_identity},
};

/// A TLS connection with a workload whose identity is proven.
pub struct Stream<IO>(Kind<IO>);

#[allow(
    clippy::large_enum_variant,
    reason = "the large one is what nearly every connection is"
)]
enum Kind<IO> {
    Records(RecordStream<IO>),
    /// Where TLS 1.2 is allowed, whose records are others.
    Library(Box<tokio_rustls::TlsStream<IO>>),
}

/// Whose doing a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The other end sent or presented something wrong.
    Peer,
    /// The connection broke, or was too slow.
    Network,
    /// The other end refuses us, or we are misconfigured.
    Us,
}

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer took too long.
    #[error("the TLS handshake was not finished within {after:?}")]
    Timeout {
        /// The deadline.
        after: Duration,
    },
    /// What arrived is not TLS: plaintext on a TLS port.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// A client without a certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// A certificate that is refused.
    #[error("the peer's certificate is refused")]
    PeerCertificate(#[source] PeerCertificateError),
    /// The peer refuses what we presented.
    #[error("the peer refused the handshake with the alert {0:?}")]
    Alert(AlertDescription),
    /// The peer breaks the protocol, or shares no version, suite, group or ALPN with us.
    #[error("the TLS handshake failed")]
    Protocol(#[source] rustls::Error),
    /// The connection broke.
    #[error("the connection broke in the TLS handshake")]
    Io(#[source] io::Error),
}

impl HandshakeError {
    /// Whose doing it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NotTls | Self::NoCertificate | Self::PeerCertificate(_) | Self::Protocol(_) => {
                Blame::Peer
            }
            Self::Timeout { .. } | Self::Io(_) => Blame::Network,
            Self::Alert(_) => Blame::Us,
        }
    }
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.downcast::<rustls::Error>() {
            Ok(error) => Self::from(error),
            Err(error) => Self::Io(error),
        }
    }
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::InvalidCertificate(inner) => {
                Self::PeerCertificate(PeerCertificateError::from_rustls(inner))
            }
            rustls::Error::AlertReceived(alert) => Self::Alert(alert),
            rustls::Error::InvalidMessage(
                InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
            ) => Self::NotTls,
            other => Self::Protocol(other),
        }
    }
}

impl<IO> fmt::Debug for Stream<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

/// Accepts TLS on `tcp` and says who the client is. Sets TCP_NODELAY.
///
/// The whole handshake must be done within `deadline`. Cancelling drops the connection.
pub async fn accept(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    deadline: Duration,
) -> Result<(Stream<TcpStream>, PeerIdentity), HandshakeError> {
    tcp.set_nodelay(true).map_err(HandshakeError::Io)?;
    within(deadline, async {
        if config.enable_secret_extraction {
            let (stream, peer) = agree::server(tcp, config).await?;
            return Ok((Stream(Kind::Records(stream)), peer));
        }
        let stream = TlsAcceptor::from(config).accept(tcp).await?;
        of_library(stream.into())
    })
    .await
}

/// Dials TLS over `io` and says who the server is. No server name is sent.
///
/// The whole handshake must be done within `deadline`. In TLS 1.3 a server that refuses our certificate says so only
/// after this has succeeded: the first read then fails.
pub async fn connect<IO>(
    io: IO,
    config: Arc<ClientConfig>,
    deadline: Duration,
) -> Result<(Stream<IO>, PeerIdentity), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    // Never sent: SNI is off, and the verifier looks at identities alone.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    within(deadline, async {
        if config.enable_secret_extraction {
            let (stream, peer) = agree::client(io, config, name).await?;
            return Ok((Stream(Kind::Records(stream)), peer));
        }
        let stream = TlsConnector::from(config).connect(name, io).await?;
        of_library(stream.into())
    })
    .await
}

async fn within<T>(
    deadline: Duration,
    handshake: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    let done = timeout(deadline, handshake).await;
    done.unwrap_or(Err(HandshakeError::Timeout { after: deadline }))
}

fn of_library<IO>(
    stream: tokio_rustls::TlsStream<IO>,
) -> Result<(Stream<IO>, PeerIdentity), HandshakeError> {
    let peer = peer_of(stream.get_ref().1.peer_certificates())?;
    Ok((Stream(Kind::Library(Box::new(stream))), peer))
}

pub(super) fn peer_of(
    chain: Option<&[CertificateDer<'_>]>,
) -> Result<PeerIdentity, HandshakeError> {
    let (leaf, intermediates) = chain
        .and_then(<[_]>::split_first)
        .ok_or(HandshakeError::NoCertificate)?;
    chain_identity(leaf, intermediates).map_err(HandshakeError::PeerCertificate)
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Records(stream) => Pin::new(stream).poll_read(cx, buf),
            Kind::Library(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Kind::Records(stream) => Pin::new(stream).poll_write(cx, buf),
            Kind::Library(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Kind::Records(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Kind::Library(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Records(stream) => Pin::new(stream).poll_flush(cx),
            Kind::Library(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Records(stream) => Pin::new(stream).poll_shutdown(cx),
            Kind::Library(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
