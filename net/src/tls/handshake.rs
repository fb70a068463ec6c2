//! TLS handshakes with a deadline, and whose fault it is when one fails.

use std::{io, sync::Arc, time::Duration};

use rustls::{AlertDescription, ClientConfig, InvalidMessage, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::verify::{PeerCertificateError, PeerIdentity, chain_identity};

/// An accepted TLS connection.
pub type ServerStream<IO> = tokio_rustls::server::TlsStream<IO>;
/// A dialled TLS connection.
pub type ClientStream<IO> = tokio_rustls::client::TlsStream<IO>;

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

/// Accepts TLS on `tcp` and says who the client is. Sets TCP_NODELAY.
///
/// The whole handshake must be done within `deadline`. Cancelling drops the connection.
pub async fn accept(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    deadline: Duration,
) -> Result<(ServerStream<TcpStream>, PeerIdentity), HandshakeError> {
    tcp.set_nodelay(true).map_err(HandshakeError::Io)?;
    let handshake = TlsAcceptor::from(config).accept(tcp);
    let stream = timeout(deadline, handshake)
        .await
        .map_err(|_| HandshakeError::Timeout { after: deadline })??;
    let peer = peer_of(stream.get_ref().1.peer_certificates())?;
    Ok((stream, peer))
}

/// Dials TLS over `io` and says who the server is. No server name is sent.
///
/// The whole handshake must be done within `deadline`. In TLS 1.3 a server that refuses our certificate says so only
/// after this has succeeded: the first read then fails.
pub async fn connect<IO>(
    io: IO,
    config: Arc<ClientConfig>,
    deadline: Duration,
) -> Result<(ClientStream<IO>, PeerIdentity), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    // Never sent: SNI is off, and the verifier looks at identities alone.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let handshake = TlsConnector::from(config).connect(name, io);
    let stream = timeout(deadline, handshake)
        .await
        .map_err(|_| HandshakeError::Timeout { after: deadline })??;
    let peer = peer_of(stream.get_ref().1.peer_certificates())?;
    Ok((stream, peer))
}

fn peer_of(chain: Option<&[CertificateDer<'_>]>) -> Result<PeerIdentity, HandshakeError> {
    let (leaf, intermediates) = chain
        .and_then(<[_]>::split_first)
        .ok_or(HandshakeError::NoCertificate)?;
    chain_identity(leaf, intermediates).map_err(HandshakeError::PeerCertificate)
}
