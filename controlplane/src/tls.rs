//! Connections of the gRPC listener: TLS, then HTTP/2 with its limits and keepalive. The accept loop is `net`'s.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh::identity::Identity;
use net::drain;
use proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ResolvesServerCert, WebPkiClientVerifier},
};
use rustls_pki_types::CertificateDer;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::body::Body;
use tower::Service as _;
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::{
    auth::PeerCertificate,
    ca::{Authority, CertificateService, Current},
    serve::{self, DiscoveryService},
};

/// A peer that takes longer to shake hands is let go.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// TCP keepalive, and HTTP/2 PING where nothing else is sent: a proxy that is gone is noticed.
const KEEPALIVE: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// A proxy needs one stream for xDS and a few for certificates.
const MAX_STREAMS: u32 = 1000;
/// What a proxy may send before we have read it: the versions of all its resources come at once.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// What is known of a connection; gRPC services find it in a request's extensions.
#[derive(Debug, Clone, Default)]
pub struct ConnectionInfo {
    /// Where it comes from.
    pub address: Option<SocketAddr>,
    /// Whose certificate it has shown, if any.
    pub certificate: PeerCertificate,
}

/// What is served on every connection.
#[derive(Clone)]
pub(crate) struct Services {
    pub(crate) discovery: DiscoveryService,
    pub(crate) certificates: IstioCertificateServiceServer<CertificateService>,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The roots.
    #[error("use the mesh's roots to check client certificates")]
    Roots(#[source] rustls::Error),
    /// The verifier.
    #[error("check client certificates")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
    /// Protocol versions.
    #[error("choose the versions of TLS")]
    Versions(#[source] rustls::Error),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("shake hands within {HANDSHAKE:?}")]
    Slow,
    #[error("shake hands")]
    Handshake(#[source] io::Error),
    #[error("a client certificate without exactly one SPIFFE ID")]
    NoIdentity,
    #[error("serve HTTP/2")]
    Http(#[source] hyper::Error),
}

/// The TLS settings in force: a new authority's roots are trusted by the next connection.
#[derive(Debug)]
pub struct Acceptor {
    authority: Arc<Current>,
    certificate: Arc<dyn ResolvesServerCert>,
    /// The settings, and the authority that they were made for.
    made: ArcSwap<(Arc<Authority>, Arc<ServerConfig>)>,
}

impl Acceptor {
    /// For the authority in force.
    pub fn new(
        authority: Arc<Current>,
        certificate: Arc<dyn ResolvesServerCert>,
    ) -> Result<Self, TlsError> {
        let now = authority.load();
        let config = Arc::new(server_config(&now, certificate.clone())?);
        Ok(Self {
            authority,
            certificate,
            made: ArcSwap::from_pointee((now, config)),
        })
    }

    /// For one connection. Where new roots cannot be used, the old ones stay in force, and the log says why.
    pub fn current(&self) -> TlsAcceptor {
        let (now, made) = (self.authority.load(), self.made.load_full());
        if Arc::ptr_eq(&now, &made.0) {
            return made.1.clone().into();
        }
        match server_config(&now, self.certificate.clone()) {
            Ok(config) => {
                let config = Arc::new(config);
                self.made.store(Arc::new((now, config.clone())));
                config.into()
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "the new roots cannot be used");
                made.1.clone().into()
            }
        }
    }
}

/// TLS 1.2 and 1.3; a client may show a certificate, and if so it must be of the mesh's roots (control-plane.md 1).
pub fn server_config(
    authority: &Authority,
    certificate: Arc<dyn ResolvesServerCert>,
) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let roots = authority.root_store().map_err(TlsError::Roots)?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(TlsError::Verifier)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(TlsError::Versions)?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

impl Services {
    async fn call(mut self, request: Request<Body>) -> Response<Body> {
        if request.uri().path().starts_with(serve::PATH) {
            return self.discovery.call(request).await;
        }
        match self.certificates.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

/// Serves one accepted connection until it ends; a drain lets its calls finish.
pub(crate) async fn serve(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    services: Services,
    drain: drain::Watch,
) {
    if let Err(error) = connection(stream, address, acceptor, services, drain).await {
        let error = &error as &dyn std::error::Error;
        tracing::debug!(%address, error, "connection ended");
    }
}

async fn connection(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    services: Services,
    mut drain: drain::Watch,
) -> Result<(), ConnectionError> {
    let handshake = tokio::time::timeout(HANDSHAKE, handshake(stream, acceptor));
    let stream = handshake.await.map_err(|_| ConnectionError::Slow)?;
    let stream = stream.map_err(ConnectionError::Handshake)?;
    let info = ConnectionInfo {
        address: Some(address),
        certificate: PeerCertificate(identity(&stream)?),
    };
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(info.clone());
        let services = services.clone();
        async move { Ok::<_, Infallible>(services.call(request.map(Body::new)).await) }
    });
    let mut connection = std::pin::pin!(
        http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(PING_TIMEOUT)
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        served = connection.as_mut() => served,
        _ = drain.started() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
    .map_err(ConnectionError::Http)
}

async fn handshake(stream: TcpStream, acceptor: TlsAcceptor) -> io::Result<TlsStream<TcpStream>> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    acceptor.accept(stream).await
}

/// The identity of the certificate that the client has shown, if it has.
fn identity(stream: &TlsStream<TcpStream>) -> Result<Option<Identity>, ConnectionError> {
    let shown = stream.get_ref().1.peer_certificates();
    match shown.and_then(<[_]>::first) {
        None => Ok(None),
        Some(der) => spiffe_id(der).map(Some).ok_or(ConnectionError::NoIdentity),
    }
}

/// The one URI name of a certificate (X509-SVID 2: exactly one).
fn spiffe_id(der: &CertificateDer<'_>) -> Option<Identity> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    let (uri, None) = (uris.next()?, uris.next()) else {
        return None;
    };
    uri.parse().ok()
}
