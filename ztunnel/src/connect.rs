//! Carries out a next hop: from a decision to a connection that bytes can be copied to.

use std::{io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use mesh::{
    authority::Authority,
    flow::{EndReason, Security},
    headers::{self, Baggage, Traceparent},
    outbound::{Hop, NextHop},
    workload::Workload,
};
use net::{
    ca::FetchError,
    copy::Endpoint,
    hbone::{self, ConnectHead, DialError, Tunnel},
    socket::{SocketError, SourceAddress},
    tls::{self, HandshakeError, PeerIdentity},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    inbound::{self, Admitted, Asked},
    neighbours::{self, Neighbour},
    pod::{CONNECT_DEADLINE, Pod, TLS_DEADLINE},
    revocations::RestsOn,
};

/// From the inner CONNECT of a double tunnel to its answer.
const INNER_DEADLINE: Duration = Duration::from_secs(20);

/// Where the bytes go, and who was found there.
pub(crate) struct Connected {
    pub(crate) endpoint: Endpoint,
    /// Proven by TLS; for a double tunnel, the inner one.
    pub(crate) peer: Option<Arc<PeerIdentity>>,
    /// What a peer behind a gateway tells of itself, for telemetry: of others there are records.
    pub(crate) baggage: Option<Baggage>,
    /// To be kept as long as the connection.
    pub(crate) inner: Option<InnerTunnel>,
}

impl Connected {
    /// What bytes are copied to, and what has to be kept meanwhile.
    pub(crate) fn into_parts(self: Box<Self>) -> (Endpoint, Option<InnerTunnel>) {
        (self.endpoint, self.inner)
    }
}

/// What there is to carry bytes to.
pub(crate) enum Onward {
    /// One end of a connection whose other end someone else tells of.
    Out(Box<Connected>),
    /// Both ends of a connection within the node.
    Within(Box<Within>),
}

/// A connection to a pod of the same node.
pub(crate) struct Within {
    pub(crate) admitted: Admitted,
    pub(crate) peer: Arc<PeerIdentity>,
    pub(crate) rests_on: RestsOn,
}

impl Onward {
    /// Who was found there, as TLS proved it.
    pub(crate) fn peer(&self) -> Option<&Arc<PeerIdentity>> {
        match self {
            Self::Out(connected) => connected.peer.as_ref(),
            Self::Within(within) => Some(&within.peer),
        }
    }

    /// What a peer behind a gateway tells of itself.
    pub(crate) fn baggage(&self) -> Option<&Baggage> {
        match self {
            Self::Out(connected) => connected.baggage.as_ref(),
            Self::Within(_) => None,
        }
    }
}

/// Keeps the inner connection of a double tunnel moving.
pub(crate) struct InnerTunnel {
    _driver: AbortOnDropHandle<()>,
}

/// Why there is no connection to the next hop.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// We cannot prove who we are.
    #[error("cannot prove the source's identity")]
    Certificate(#[from] FetchError),
    /// Plain TCP failed.
    #[error("connect to {address}")]
    Tcp {
        address: SocketAddr,
        #[source]
        source: SocketError,
    },
    /// Plain TCP got no answer.
    #[error("connect to {address} timed out after {CONNECT_DEADLINE:?}")]
    TcpTimeout { address: SocketAddr },
    /// The tunnel did not come about.
    #[error("tunnel to {address}")]
    Tunnel {
        address: SocketAddr,
        #[source]
        source: hbone::ConnectError,
    },
    /// A pod of the same node may not be connected to, or its application could not be.
    #[error("{address}, which is on this node, refused with {status}")]
    Neighbour {
        address: SocketAddr,
        status: StatusCode,
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
    /// The inner CONNECT of a double tunnel failed.
    #[error("tunnel through the gateway {gateway}")]
    InnerTunnel {
        gateway: SocketAddr,
        #[source]
        source: hbone::ConnectError,
    },
}

impl ConnectError {
    /// What the metric and the log line say.
    pub(crate) fn end_reason(&self) -> EndReason {
        match self {
            Self::Certificate(_) => EndReason::NoCertificate,
            Self::Tcp { source, .. } => source.end_reason(),
            Self::TcpTimeout { .. } => EndReason::ConnectTimedOut,
            Self::Tunnel { source, .. } | Self::InnerTunnel { source, .. } => source.end_reason(),
            Self::Neighbour { status, .. } => EndReason::PeerRefused(status.as_u16()),
            Self::InnerTls { .. } => EndReason::TlsFailed,
            Self::InnerHttp { .. } => EndReason::Http2Failed,
        }
    }

    /// Whether another endpoint may be tried: this one is not there, or lost the connection before it took it, as one
    /// that is ending does. Not where it may have passed on what the application wrote first, nor where time ran out, nor
    /// where anyone's identity is at stake.
    pub(crate) fn is_of_this_endpoint(&self) -> bool {
        match self {
            Self::Tcp { source, .. } => refused(source.io_kind()),
            Self::Neighbour { status, .. } => *status == StatusCode::SERVICE_UNAVAILABLE,
            Self::Tunnel { source, .. } => match source {
                hbone::ConnectError::Dial(dial) => is_of_this_peer(dial),
                // The other end could not reach its application.
                hbone::ConnectError::Refused { status, .. } => {
                    *status == StatusCode::SERVICE_UNAVAILABLE
                }
                hbone::ConnectError::Stream { .. } => !source.may_have_delivered(),
                hbone::ConnectError::Authority(_)
                | hbone::ConnectError::Application(_)
                | hbone::ConnectError::CertificateRefused { .. }
                | hbone::ConnectError::Late { .. } => false,
            },
            _ => false,
        }
    }
}

fn is_of_this_peer(dial: &DialError) -> bool {
    match dial {
        DialError::Tcp { source, .. } => refused(source.kind()),
        DialError::Tls { source, .. } => matches!(source, HandshakeError::Io(_)),
        DialError::Http { .. } => true,
        DialError::TcpTimeout { .. } | DialError::PoolClosed => false,
    }
}

fn refused(kind: ErrorKind) -> bool {
    use ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable};
    matches!(
        kind,
        ConnectionRefused | ConnectionReset | HostUnreachable | NetworkUnreachable
    )
}

/// One connection of an application that is to be carried on.
pub(crate) struct Outgoing<'a> {
    pub(crate) pod: &'a Arc<Pod>,
    pub(crate) source: &'a Arc<Workload>,
    pub(crate) client: SocketAddr,
    /// Its connection, where what it wrote already may go ahead.
    pub(crate) application: Option<&'a TcpStream>,
    pub(crate) hop: &'a NextHop,
    pub(crate) address: SocketAddr,
    pub(crate) trace: Traceparent,
}

impl Outgoing<'_> {
    /// Connects as the hop says.
    pub(crate) async fn connect(&self) -> Result<Onward, ConnectError> {
        let connected = match self.hop.hop {
            Hop::Tcp => self.tcp().await,
            Hop::Hbone => return self.hbone().await,
            Hop::DoubleHbone => self.double().await,
        };
        connected.map(|it| Onward::Out(Box::new(it)))
    }

    /// Within the node where that is possible, else in a tunnel.
    async fn hbone(&self) -> Result<Onward, ConnectError> {
        let target = self.target().await?;
        if let Some(neighbour) = self.neighbour(&target) {
            return self.within(neighbour).await;
        }
        let tunnel = self.tunnel_to(&target, self.application).await?;
        Ok(Onward::Out(Box::new(Self::single(tunnel))))
    }

    fn neighbour(&self, target: &hbone::Target) -> Option<Neighbour> {
        let config = &self.pod.node.config;
        let workload = self.hop.workload.as_ref()?;
        let here = config.node.name.as_ref()? == &workload.node;
        (config.same_node && here)
            .then(|| neighbours::find(self.pod, workload, target))
            .flatten()
    }

    async fn within(&self, neighbour: Neighbour) -> Result<Onward, ConnectError> {
        let head = self.head(None);
        let rests_on = RestsOn::new(neighbour.rests_on, &self.pod.node.revocations);
        let asked = Asked {
            authority: &head.authority,
            headers: &head.headers,
            identity: &self.source.identity(),
            security: Security::SameNode,
            rests_on: rests_on.clone(),
        };
        let admitted = inbound::admit_neighbour(neighbour.pod, self.client, self.address, asked);
        let admitted = admitted.await.map_err(|status| ConnectError::Neighbour {
            address: self.address,
            status,
        })?;
        Ok(Onward::Within(Box::new(Within {
            admitted,
            peer: neighbour.peer,
            rests_on,
        })))
    }

    async fn tcp(&self) -> Result<Connected, ConnectError> {
        let address = self.address;
        let connecting = self.pod.connector.connect(address, SourceAddress::Own);
        let stream = timeout(CONNECT_DEADLINE, connecting)
            .await
            .map_err(|_| ConnectError::TcpTimeout { address })?
            .map_err(|source| ConnectError::Tcp { address, source })?;
        Ok(Connected {
            endpoint: stream.into(),
            peer: None,
            baggage: None,
            inner: None,
        })
    }

    fn single(tunnel: Tunnel) -> Connected {
        Connected {
            baggage: None,
            peer: Some(tunnel.peer),
            endpoint: tunnel.stream.into(),
            inner: None,
        }
    }

    fn baggage_of(&self, headers: &HeaderMap) -> Option<Baggage> {
        let believed = self.pod.node.config.response_baggage;
        believed.then(|| parse_baggage(headers)).flatten()
    }

    async fn tunnel(&self) -> Result<Tunnel, ConnectError> {
        self.tunnel_to(&self.target().await?, None).await
    }

    async fn target(&self) -> Result<hbone::Target, ConnectError> {
        let certificate = self.pod.certificate(&self.source.identity()).await?;
        let workload = self.hop.workload.as_ref();
        Ok(hbone::Target {
            destination: self.address,
            workload: workload.map(|workload| workload.uid.clone()),
            expected: self.hop.expected.clone(),
            certificate,
        })
    }

    async fn tunnel_to(
        &self,
        target: &hbone::Target,
        application: Option<&TcpStream>,
    ) -> Result<Tunnel, ConnectError> {
        let pool = &self.pod.pool;
        let connecting = pool.connect_for(target, self.head(None), application);
        connecting.await.map_err(|source| ConnectError::Tunnel {
            address: self.address,
            source,
        })
    }

    /// A tunnel inside the tunnel: the outer one ends at the gateway, the inner one at a pod behind it, which alone is
    /// told the bytes. The inner connection is not shared, so that each one may land on another pod.
    async fn double(&self) -> Result<Connected, ConnectError> {
        let gateway = self.address;
        let outer = self.tunnel().await?;
        let certificate = self.pod.certificate(&self.source.identity()).await?;
        let config = certificate.client_config(&self.hop.inner_expected);
        let (io, peer) = tls::connect(outer.stream, config, TLS_DEADLINE)
            .await
            .map_err(|source| ConnectError::InnerTls { gateway, source })?;
        let (client, driver) = hbone::Client::handshake(io, peer, &self.pod.node.http2)
            .await
            .map_err(|source| ConnectError::InnerHttp { gateway, source })?;
        let inner_tunnel = InnerTunnel {
            _driver: AbortOnDropHandle::new(tokio::spawn(driver)),
        };
        let network = &self.pod.node.config.node.network;
        let inner = client
            .connect(self.head(Some(network)), INNER_DEADLINE)
            .await
            .map_err(|source| ConnectError::InnerTunnel { gateway, source })?;
        Ok(Connected {
            baggage: self.baggage_of(&inner.headers),
            inner: Some(inner_tunnel),
            ..Self::single(inner)
        })
    }

    fn head(&self, network: Option<&str>) -> ConnectHead {
        let authority = self.hop.authority.as_ref();
        let authority = authority
            .cloned()
            .unwrap_or(Authority::Address(self.address));
        let service = self.hop.service.as_ref();
        let host = service.map(|service| &*service.hostname);
        let forwarded = headers::forwarded(self.client, host);
        let network = network.map(str::to_owned);
        let values = [
            (headers::BAGGAGE, self.pod.baggage(self.source)),
            (headers::FORWARDED, value_once(forwarded)),
            (headers::TRACEPARENT, value_once(self.trace.header())),
            (headers::FORWARDED_NETWORK, network.and_then(value)),
        ];
        ConnectHead {
            authority,
            headers: header_map(values),
        }
    }
}

/// A text that cannot be a header's value (control characters in a record's fields) is left out: it is telemetry.
pub(crate) fn value(text: String) -> Option<HeaderValue> {
    HeaderValue::try_from(text).ok()
}

/// One that no other connection will have. HPACK is not to remember it (RFC 7541 6.2.3): both ends would enter it in their
/// tables, compare the next one with all of its name, and lose what does come again, the baggage, to make room.
fn value_once(text: String) -> Option<HeaderValue> {
    let mut value = value(text)?;
    value.set_sensitive(true);
    Some(value)
}

fn header_map<const N: usize>(values: [(&'static str, Option<HeaderValue>); N]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(N);
    for (name, value) in values {
        if let Some(value) = value {
            map.insert(HeaderName::from_static(name), value);
        }
    }
    map
}

/// The headers of a 200: what we tell of the workload that answers.
pub(crate) fn response_headers(pod: &Pod, workload: &Arc<Workload>) -> HeaderMap {
    header_map([(headers::BAGGAGE, pod.baggage(workload))])
}

/// What a peer tells of itself, if it does.
pub(crate) fn parse_baggage(headers: &HeaderMap) -> Option<Baggage> {
    let mut texts = header_texts(headers, headers::BAGGAGE).peekable();
    texts.peek()?;
    Some(Baggage::parse(texts))
}

/// The values of a header that are text.
pub(crate) fn header_texts<'a>(
    headers: &'a HeaderMap,
    name: &'static str,
) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter();
    values.filter_map(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use std::io;

    use net::hbone::{ResetCode, StreamError};

    use super::*;

    fn dialled(error: DialError) -> ConnectError {
        ConnectError::Tunnel {
            address: address(),
            source: hbone::ConnectError::Dial(Arc::new(error)),
        }
    }

    fn address() -> SocketAddr {
        (std::net::Ipv4Addr::LOCALHOST, 15008).into()
    }

    #[test]
    fn what_comes_once_is_not_to_be_remembered() {
        let trace = Traceparent::new(1, 2).header();
        assert!(value_once(trace.clone()).is_some_and(|it| it == trace && it.is_sensitive()));
        assert!(!value(trace).is_some_and(|it| it.is_sensitive()));
        assert_eq!(value_once("a\nb".to_owned()), None);
    }

    #[test]
    fn a_peer_that_ends_under_a_handshake_is_gone_around() {
        let destination = address();
        let tls = |source| DialError::Tls {
            destination,
            source,
        };
        let broken = HandshakeError::Io(io::ErrorKind::UnexpectedEof.into());
        assert!(dialled(tls(broken)).is_of_this_endpoint());
        let source = StreamError::GoAway(ResetCode::NO_ERROR);
        let goaway = DialError::Http {
            destination,
            source,
        };
        assert!(dialled(goaway).is_of_this_endpoint());
        let refused = DialError::Tcp {
            destination,
            source: io::ErrorKind::ConnectionRefused.into(),
        };
        assert!(dialled(refused).is_of_this_endpoint());
    }

    #[test]
    fn a_wrong_identity_and_a_lost_time_are_not() {
        let destination = address();
        let tls = DialError::Tls {
            destination,
            source: HandshakeError::NotTls,
        };
        assert!(!dialled(tls).is_of_this_endpoint());
        let late = DialError::TcpTimeout {
            destination,
            after: CONNECT_DEADLINE,
        };
        assert!(!dialled(late).is_of_this_endpoint());
    }
}
