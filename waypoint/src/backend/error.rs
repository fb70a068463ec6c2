//! Why there is no connection to an endpoint, and what that means.

use std::{io, net::SocketAddr, time::Duration};

use http::StatusCode;
use mesh::{
    flow::EndReason,
    names::Str,
    outcome::{Reason, Refusal},
};
use net::{
    ca::FetchError,
    hbone::{self, DialError},
    socket::SocketError,
    tls::{HandshakeError, OriginationError},
};

use super::forward_proxy::ProxyError;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// There is no way to the endpoint.
    #[error("no way to the endpoint: {0}")]
    NoWay(Refusal),
    /// The service's waypoint would choose among all endpoints.
    #[error("the service's waypoint does not keep to the subset {0}")]
    WholeService(Str),
    /// The name has no address.
    #[error("{0} has no address")]
    Resolve(Str),
    /// We cannot prove who we are.
    #[error("no certificate of our own")]
    Certificate(#[from] FetchError),
    /// Plain TCP failed.
    #[error("connect to {address}")]
    Tcp {
        address: SocketAddr,
        #[source]
        source: SocketError,
    },
    /// The tunnel did not come about.
    #[error("tunnel to {address}")]
    Tunnel {
        address: SocketAddr,
        #[source]
        source: hbone::ConnectError,
    },
    /// The inner TLS of a double tunnel failed.
    #[error("TLS through the gateway {gateway}")]
    InnerTls {
        gateway: SocketAddr,
        #[source]
        source: HandshakeError,
    },
    /// The inner HTTP/2 of a double tunnel failed.
    #[error("HTTP/2 through the gateway {gateway}")]
    InnerHttp {
        gateway: SocketAddr,
        #[source]
        source: hbone::StreamError,
    },
    /// The PROXY header could not be written.
    #[error("introduce the client")]
    Introduce(#[source] io::Error),
    /// TLS with the application failed, or is not configured as it should be.
    #[error("TLS with the application")]
    Tls(#[from] OriginationError),
    /// The forward proxy is no way on.
    #[error(transparent)]
    ForwardProxy(#[from] ProxyError),
    /// Not in time.
    #[error("no connection within {0:?}")]
    Timeout(Duration),
}

/// What a failure means to whoever wants to try again or has to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nobody took the connection: nothing was sent, another endpoint may.
    Connect,
    /// The peer's policy, or the peer itself, refused with this status.
    Refused(StatusCode),
    /// The connection broke before it stood.
    Reset,
    /// Not in time.
    Timeout,
    /// One end could not prove who it is, or TLS failed.
    Tls,
    /// The name has no address.
    Resolve,
    /// Configuration leads nowhere.
    NoWay,
}

impl ConnectError {
    /// What it means.
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::NoWay(_) | Self::WholeService(_) => Failure::NoWay,
            Self::Resolve(_) => Failure::Resolve,
            Self::Certificate(_) | Self::InnerTls { .. } | Self::Tls(_) => Failure::Tls,
            Self::Tcp { source, .. } => of_io(source.io_kind()),
            Self::Tunnel { source, .. } => of_tunnel(source),
            Self::InnerHttp { .. } | Self::Introduce(_) => Failure::Reset,
            Self::ForwardProxy(ProxyError::Refused(status)) => match *status {
                // It could not reach what it was asked for.
                StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT => Failure::Connect,
                status => Failure::Refused(status),
            },
            Self::ForwardProxy(ProxyError::Io(_) | ProxyError::Malformed) => Failure::Reset,
            Self::Timeout(_) => Failure::Timeout,
        }
    }

    /// What the metric and the log line say.
    pub(crate) fn end_reason(&self) -> EndReason {
        match self {
            Self::NoWay(refusal) => EndReason::Refused(refusal.reason),
            Self::WholeService(_) => EndReason::Refused(Reason::NoHealthyUpstream),
            Self::Resolve(_) => EndReason::ResolveFailed,
            Self::Certificate(_) => EndReason::NoCertificate,
            Self::Tcp { source, .. } => source.end_reason(),
            Self::Tunnel { source, .. } => source.end_reason(),
            Self::InnerTls { .. } | Self::Tls(_) => EndReason::TlsFailed,
            Self::InnerHttp { .. } => EndReason::Http2Failed,
            Self::ForwardProxy(ProxyError::Refused(status)) => {
                EndReason::PeerRefused(status.as_u16())
            }
            Self::Introduce(_) | Self::ForwardProxy(_) => EndReason::DestinationReset,
            Self::Timeout(_) => EndReason::ConnectTimedOut,
        }
    }
}

fn of_io(kind: io::ErrorKind) -> Failure {
    match kind {
        io::ErrorKind::TimedOut => Failure::Timeout,
        _ => Failure::Connect,
    }
}

fn of_tunnel(error: &hbone::ConnectError) -> Failure {
    use hbone::ConnectError as E;
    match error {
        E::Dial(dial) => match &**dial {
            DialError::TcpTimeout { .. } => Failure::Timeout,
            DialError::Tcp { source, .. } => of_io(source.kind()),
            DialError::Tls { .. } => Failure::Tls,
            DialError::Http { .. } => Failure::Reset,
            DialError::PoolClosed => Failure::NoWay,
        },
        E::CertificateRefused { .. } => Failure::Tls,
        // The other end could not reach its application.
        E::Refused { status, .. } if *status == StatusCode::SERVICE_UNAVAILABLE => Failure::Connect,
        E::Refused { status, .. } => Failure::Refused(*status),
        E::Late { .. } => Failure::Timeout,
        E::Stream { .. } | E::Application(_) => Failure::Reset,
        E::Authority(_) => Failure::NoWay,
    }
}
