//! Carries out a next hop.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh::{
    authority::Authority,
    draw::Draw,
    headers::{self, Baggage},
    identity::Identity,
    l7::via::{self, Via},
    names::Str,
    outbound::{Hop, NextHop, OutboundFacts, Target, to_endpoint, to_waypoint},
    outcome::{Outcome, Reason, Refusal},
    view::MeshView,
    workload::Workload,
};
use net::{
    ca::{Certificates, FetchError, Priority},
    dns::{ResolvConf, Resolver},
    hbone::{self, ConnectHead, Tunnel},
    proxy_protocol,
    socket::{Factory, Keepalive, SourceAddress},
    tls::{self, WorkloadCertificate},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    ConnectError, Connected, Endpoint, Stream, Upstream, forward_proxy, happy_eyeballs,
    stream::InnerTunnel,
};
use crate::{config::Config, connection::header_texts, inbound::TLS_DEADLINE, snapshot::Snapshots};

/// From the inner CONNECT of a double tunnel to its answer.
const INNER_DEADLINE: Duration = Duration::from_secs(20);

/// Dials endpoints, and keeps the tunnels to them.
pub(crate) struct Backend {
    config: Arc<Config>,
    snapshots: Snapshots,
    identity: Identity,
    certificates: Certificates,
    sockets: Factory,
    pool: hbone::Pool,
    http2: hbone::Config,
    resolver: Resolver,
    originator: tls::Originator,
}

impl Backend {
    /// Knows nobody yet. Must be made inside the runtime that will serve it.
    pub(crate) fn new(
        config: Arc<Config>,
        snapshots: Snapshots,
        certificates: Certificates,
        http2: hbone::Config,
        originator: tls::Originator,
    ) -> Self {
        let sockets = Factory::default();
        let pool = hbone::PoolConfig {
            http: http2.clone(),
            max_streams: config.http2.pool_max_streams.into(),
            unused_release: config.http2.unused_release,
            ..hbone::PoolConfig::default()
        };
        let resolv_conf = Arc::new(ResolvConf::new(config.resolv_conf.clone(), true));
        Self {
            identity: config.node.identity(),
            pool: hbone::Pool::new(pool, dialer(sockets.clone())),
            resolver: Resolver::new(sockets.clone(), resolv_conf, true),
            originator,
            config,
            snapshots,
            certificates,
            sockets,
            http2,
        }
    }

    /// How many tunnels there are.
    pub(crate) fn stats(&self) -> hbone::PoolStats {
        self.pool.stats()
    }

    /// Connects, within the deadline. Cancel-safe.
    ///
    /// # Errors
    /// Why not.
    pub(crate) async fn connect(&self, upstream: &Upstream<'_>) -> Result<Connected, ConnectError> {
        let connected = timeout(upstream.deadline, self.open(upstream)).await;
        connected.unwrap_or(Err(ConnectError::Timeout(upstream.deadline)))
    }

    async fn open(&self, upstream: &Upstream<'_>) -> Result<Connected, ConnectError> {
        let mut connected = self.reach(upstream).await?;
        if let Some(version) = upstream.proxy_protocol {
            let header = introduction(version, upstream, connected.address);
            let written = connected.stream.write_all(&header).await;
            written.map_err(ConnectError::Introduce)?;
        }
        if let Some(inside) = upstream.tls {
            let config = self
                .originator
                .config(inside.settings, inside.host, inside.alpn)?;
            let stream = config.connect(connected.stream, TLS_DEADLINE).await?;
            connected.stream = Stream::Tls(Box::new(stream));
        }
        if let Some(authority) = upstream.forward_to {
            forward_proxy::connect(&mut connected.stream, authority).await?;
        }
        Ok(connected)
    }

    async fn reach(&self, upstream: &Upstream<'_>) -> Result<Connected, ConnectError> {
        match &upstream.endpoint {
            Endpoint::Address(address) => self.tcp(*address, upstream.keepalive).await,
            Endpoint::Tunnel { address, .. } => Ok(Connected {
                hop: Hop::DoubleHbone,
                ..self.tcp(*address, None).await?
            }),
            Endpoint::Hostname { name, port } => {
                let prefer_ipv6 = upstream.destination.is_ipv6();
                self.tcp_by_name((name, *port), prefer_ipv6, upstream.keepalive)
                    .await
            }
            Endpoint::Workload { workload, port } => {
                let outgoing = self.outgoing(upstream, |asked, draw| {
                    let endpoint = (workload, *port);
                    to_endpoint(asked.view, asked.facts, upstream.service, endpoint, draw)
                });
                outgoing?.connect().await
            }
            Endpoint::Waypoint { port, subset, via } => {
                let outgoing = self.outgoing(upstream, |asked, draw| match upstream.service {
                    Some(service) => to_waypoint(asked.view, asked.facts, service, *port, draw),
                    None => Refusal::new(Reason::NotServed).into(),
                });
                let outgoing = Outgoing {
                    via: Some(via),
                    subset: subset.as_ref(),
                    ..outgoing?
                };
                outgoing.connect().await
            }
        }
    }

    fn outgoing<'a>(
        &'a self,
        upstream: &'a Upstream<'a>,
        decide: impl FnOnce(Asked<'_>, Draw) -> Outcome<NextHop>,
    ) -> Result<Outgoing<'a>, ConnectError> {
        let snapshot = self.snapshots.load();
        let own = Arc::clone(&snapshot.own);
        let facts = OutboundFacts {
            source: Arc::clone(&own),
            network: self.config.node.network.clone(),
            client: upstream.client.unwrap_or(upstream.destination),
            original_dst: upstream.destination,
        };
        let draw = Draw(rand::random());
        let asked = Asked {
            view: &snapshot.mesh,
            facts: &facts,
        };
        let hop = match decide(asked, draw) {
            Outcome::Go(hop) => hop,
            Outcome::Refuse(refusal) => return Err(ConnectError::NoWay(refusal)),
            Outcome::Need(need) => return Err(ConnectError::NoWay(need.unmet())),
        };
        Ok(Outgoing {
            backend: self,
            own,
            upstream,
            hop,
            via: None,
            subset: None,
        })
    }

    async fn tcp(
        &self,
        address: SocketAddr,
        keepalive: Option<Keepalive>,
    ) -> Result<Connected, ConnectError> {
        let sockets = Factory {
            keepalive: keepalive.or(self.sockets.keepalive),
            ..self.sockets.clone()
        };
        let connecting = sockets.connect(address, SourceAddress::Own);
        let stream = connecting
            .await
            .map_err(|source| ConnectError::Tcp { address, source })?;
        Ok(plain(stream, address))
    }

    async fn tcp_by_name(
        &self,
        (name, port): (&Str, u16),
        prefer_ipv6: bool,
        keepalive: Option<Keepalive>,
    ) -> Result<Connected, ConnectError> {
        let addresses = self.resolver.resolve(name).await;
        let ordered = happy_eyeballs::order(&addresses, prefer_ipv6);
        let ordered = ordered.into_iter().map(|ip| SocketAddr::new(ip, port));
        let dial = |address| self.tcp(address, keepalive);
        let first = happy_eyeballs::first(ordered.collect(), dial).await;
        first.unwrap_or_else(|| Err(ConnectError::Resolve(name.clone())))
    }

    async fn certificate(&self) -> Result<Arc<WorkloadCertificate>, FetchError> {
        match self.certificates.current(&self.identity) {
            Some(certificate) => Ok(certificate),
            None => {
                let identity = &self.identity;
                self.certificates.fetch(identity, Priority::RealTime).await
            }
        }
    }
}

fn dialer(sockets: Factory) -> impl hbone::Dialer {
    move |destination| {
        let sockets = sockets.clone();
        async move {
            let dialled = sockets.connect(destination, SourceAddress::Own).await;
            // The kind is what tells "refused" from "unreachable"; the error keeps its causes.
            dialled.map_err(|error| io::Error::new(error.io_kind(), error))
        }
    }
}

fn plain(stream: TcpStream, address: SocketAddr) -> Connected {
    Connected {
        stream: Stream::Tcp(stream),
        address,
        hop: Hop::Tcp,
        peer: None,
        baggage: None,
    }
}

fn introduction(version: u8, upstream: &Upstream<'_>, address: SocketAddr) -> Vec<u8> {
    let client = upstream.client.unwrap_or(address);
    match version {
        1 => proxy_protocol::header_v1(client, upstream.destination),
        _ => proxy_protocol::header(client, upstream.destination, None),
    }
}

/// What a next hop is decided by.
struct Asked<'a> {
    view: &'a MeshView,
    facts: &'a OutboundFacts,
}

/// One connection on its way to a workload.
struct Outgoing<'a> {
    backend: &'a Backend,
    /// To another waypoint: the way so far.
    via: Option<&'a Via>,
    /// To another waypoint: which of the service's endpoints it is to choose from.
    subset: Option<&'a Str>,
    own: Arc<Workload>,
    upstream: &'a Upstream<'a>,
    hop: NextHop,
}

impl Outgoing<'_> {
    async fn connect(self) -> Result<Connected, ConnectError> {
        let backend = self.backend;
        let keepalive = self.upstream.keepalive;
        let (address, hop) = match (&self.hop.target, self.hop.hop) {
            (Target::Address(address), Hop::Tcp) => return backend.tcp(*address, keepalive).await,
            (Target::Address(address), _) => (*address, self.hop.clone()),
            (
                Target::Hostname {
                    hostname,
                    port,
                    prefer_ipv6,
                },
                kind,
            ) => {
                if kind == Hop::Tcp {
                    let name = (hostname, *port);
                    return backend.tcp_by_name(name, *prefer_ipv6, keepalive).await;
                }
                let addresses = backend.resolver.resolve(hostname).await;
                let ip = happy_eyeballs::order(&addresses, *prefer_ipv6);
                let ip = ip.first().copied();
                let ip = ip.ok_or_else(|| ConnectError::Resolve(hostname.clone()))?;
                ((ip, *port).into(), self.hop.clone().resolved(ip))
            }
        };
        match hop.hop {
            Hop::DoubleHbone => self.double(address, &hop).await,
            Hop::Hbone | Hop::Tcp => {
                let tunnel = self.tunnel(address, &hop, None).await?;
                self.connected(tunnel, address, hop.hop, None)
            }
        }
    }

    async fn tunnel(
        &self,
        address: SocketAddr,
        hop: &NextHop,
        source: Option<&'static str>,
    ) -> Result<Tunnel, ConnectError> {
        let target = hbone::Target {
            destination: address,
            workload: hop.workload.as_ref().map(|workload| workload.uid.clone()),
            expected: hop.expected.clone(),
            certificate: self.backend.certificate().await?,
        };
        let head = self.head(address, hop, source, None);
        let connected = self.backend.pool.connect(&target, head).await;
        connected.map_err(|source| ConnectError::Tunnel { address, source })
    }

    /// A tunnel inside the tunnel: the outer one ends at the gateway, the inner one at a pod behind it.
    async fn double(&self, gateway: SocketAddr, hop: &NextHop) -> Result<Connected, ConnectError> {
        // A gateway goes past the waypoint behind it for those who say that they are one.
        let source = self.via.is_none().then_some("waypoint");
        let outer = self.tunnel(gateway, hop, source).await?;
        let certificate = self.backend.certificate().await?;
        let config = certificate.client_config(&hop.inner_expected);
        let (io, peer) = tls::connect(outer.stream, config, TLS_DEADLINE)
            .await
            .map_err(|source| ConnectError::InnerTls { gateway, source })?;
        let (client, driver) = hbone::Client::handshake(io, peer, &self.backend.http2)
            .await
            .map_err(|source| ConnectError::InnerHttp { gateway, source })?;
        let inner = InnerTunnel {
            _driver: AbortOnDropHandle::new(tokio::spawn(driver)),
        };
        let network = &*self.backend.config.node.network;
        let head = self.head(gateway, hop, None, Some(network));
        let tunnel = client.connect(head, INNER_DEADLINE).await;
        let tunnel = tunnel.map_err(|source| ConnectError::Tunnel {
            address: gateway,
            source,
        })?;
        self.connected(tunnel, gateway, hop.hop, Some(inner))
    }

    fn head(
        &self,
        address: SocketAddr,
        hop: &NextHop,
        source: Option<&str>,
        network: Option<&str>,
    ) -> ConnectHead {
        let authority = hop.authority.clone();
        let host = self.upstream.service.map(|service| &*service.hostname);
        let client = self.upstream.client;
        let forwarded = client.map(|client| headers::forwarded(client, host));
        let baggage = Baggage::from(&*self.own).to_string();
        let trace = self.upstream.trace.map(|trace| trace.to_string());
        let via = self.via.map(ToString::to_string);
        let texts = [
            (headers::BAGGAGE, Some(baggage.as_str())),
            (headers::FORWARDED, forwarded.as_deref()),
            (headers::TRACEPARENT, trace.as_deref()),
            (headers::FORWARDED_NETWORK, network),
            (headers::ISTIO_SOURCE, source),
            (via::HEADER, via.as_deref()),
            (via::SUBSET, self.subset.map(|it| &**it)),
        ];
        ConnectHead {
            authority: authority.unwrap_or(Authority::Address(address)),
            headers: header_map(texts),
        }
    }

    /// What a tunnel that stands is. Endpoints are not asked for a subset: whoever chooses has chosen one of it.
    fn connected(
        &self,
        tunnel: Tunnel,
        address: SocketAddr,
        hop: Hop,
        inner: Option<InnerTunnel>,
    ) -> Result<Connected, ConnectError> {
        let kept = header_texts(&tunnel.headers, via::SUBSET).next();
        if let Some(subset) = self.subset.filter(|it| kept != Some(&***it)) {
            return Err(ConnectError::WholeService(subset.clone()));
        }
        let mut told = header_texts(&tunnel.headers, headers::BAGGAGE).peekable();
        let baggage = told.peek().is_some().then(|| Baggage::parse(told));
        Ok(Connected {
            peer: Some(tunnel.peer.identity.clone()),
            stream: Stream::Tunnel {
                stream: tunnel.stream,
                inner,
            },
            address,
            hop,
            baggage,
        })
    }
}

/// Texts that cannot be header values (control characters in a record's fields) are left out: they are telemetry.
fn header_map<const N: usize>(texts: [(&'static str, Option<&str>); N]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(N);
    for (name, text) in texts {
        if let Some(Ok(value)) = text.map(HeaderValue::from_str) {
            map.insert(HeaderName::from_static(name), value);
        }
    }
    map
}
