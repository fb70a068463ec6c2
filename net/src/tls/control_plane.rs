//! TLS to the control plane: a server known by its DNS name, trusted by roots from a file, a text or the system.

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use super::policy::Policy;
use crate::clock::TlsTime;

/// How long a connection to the control plane, TLS included, may take to open.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Room for a first push of a whole mesh without a round trip per 64 KiB, in bytes.
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// Where the roots that vouch for the control plane come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootSource {
    /// A PEM file, read again at each connection.
    File(PathBuf),
    /// PEM text.
    Inline(String),
    /// The certificates that the operating system trusts, from their usual file.
    System,
}

/// How to reach the control plane.
#[derive(Clone, Debug)]
pub struct Config {
    /// `https://host:port`; `http://` means plaintext.
    pub address: Uri,
    /// Who vouches for it.
    pub roots: RootSource,
    /// A DNS name to expect in its certificate instead of the address's host.
    pub hostname: Option<String>,
    /// The rules of TLS.
    pub policy: Policy,
}

/// Why the control plane cannot be dialled.
#[derive(Debug, thiserror::Error)]
pub enum ControlPlaneError {
    /// The address has no host, or an unknown scheme.
    #[error("the control plane's address {0} is not https://HOST:PORT")]
    Address(Uri),
    /// The host is no name that a certificate can have.
    #[error("{0:?} is not a server name")]
    Name(String),
    /// The roots cannot be read.
    #[error("read the control plane's roots from {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There are no usable roots.
    #[error("no usable root certificate for the control plane")]
    NoRoots,
    /// No connection.
    #[error("connect to the control plane at {address}")]
    Connect {
        /// Where.
        address: Uri,
        /// Why.
        source: io::Error,
    },
}

/// Where distributions keep the roots that they trust.
pub(super) const SYSTEM_ROOTS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

impl RootSource {
    /// `XDS_ROOT_CA` and `CA_ROOT_CA`: a path that exists, the literal `SYSTEM`, or PEM text.
    pub fn from_setting(value: &str) -> Self {
        if value == "SYSTEM" {
            Self::System
        } else if value.contains("-----BEGIN") {
            Self::Inline(value.to_owned())
        } else {
            Self::File(value.into())
        }
    }

    /// Reads the roots now. Entries that cannot be used are skipped; an empty rest is an error.
    async fn load(&self) -> Result<RootCertStore, ControlPlaneError> {
        let pem = match self {
            Self::Inline(text) => text.clone().into_bytes(),
            Self::File(path) => read(path.clone()).await?,
            Self::System => {
                let present = SYSTEM_ROOTS.iter().map(PathBuf::from).find(|p| p.exists());
                read(present.ok_or(ControlPlaneError::NoRoots)?).await?
            }
        };
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).flatten());
        if store.is_empty() {
            return Err(ControlPlaneError::NoRoots);
        }
        Ok(store)
    }
}

async fn read(path: PathBuf) -> Result<Vec<u8>, ControlPlaneError> {
    let result = tokio::fs::read(&path).await;
    result.map_err(|source| ControlPlaneError::Read { path, source })
}

/// A gRPC channel to the control plane, which connects when first used and reconnects by itself.
///
/// Roots are read anew for each connection, so a rotated file is picked up at the next reconnect. HTTP/2 keepalive is
/// 30 s with a timeout of 10 s.
pub fn channel(config: Config) -> Result<Channel, ControlPlaneError> {
    let host = config.address.host();
    if host.is_none() || !matches!(config.address.scheme_str(), Some("https" | "http")) {
        return Err(ControlPlaneError::Address(config.address));
    }
    let endpoint = Endpoint::from(config.address.clone())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .connect_timeout(CONNECT_DEADLINE);
    let config = Arc::new(config);
    let connector = tower::service_fn(move |_: Uri| connect(Arc::clone(&config)));
    Ok(endpoint.connect_with_connector_lazy(connector))
}

/// One connection, within 5 s: TCP, then TLS unless the scheme is `http`.
async fn connect(config: Arc<Config>) -> Result<TokioIo<Connection>, ControlPlaneError> {
    let address = config.address.clone();
    let connected = timeout(CONNECT_DEADLINE, open(&config)).await;
    let late = || Err(io::Error::from(io::ErrorKind::TimedOut));
    match connected {
        Ok(Ok(connection)) => Ok(TokioIo::new(connection)),
        Ok(Err(OpenError::Config(error))) => Err(error),
        Ok(Err(OpenError::Io(source))) => Err(ControlPlaneError::Connect { address, source }),
        Err(_) => late().map_err(|source| ControlPlaneError::Connect { address, source }),
    }
}

enum OpenError {
    Config(ControlPlaneError),
    Io(io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<ControlPlaneError> for OpenError {
    fn from(error: ControlPlaneError) -> Self {
        Self::Config(error)
    }
}

async fn open(config: &Config) -> Result<Connection, OpenError> {
    let uri = &config.address;
    let host = uri.host().unwrap_or_default();
    let secure = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let tcp = TcpStream::connect((bare, port)).await?;
    tcp.set_nodelay(true)?;
    if !secure {
        return Ok(Connection::Plain(tcp));
    }
    let roots = config.roots.load().await?;
    let name = config.hostname.as_deref().unwrap_or(bare).to_owned();
    let server = ServerName::try_from(name.clone()).map_err(|_| ControlPlaneError::Name(name))?;
    let connector = TlsConnector::from(Arc::new(client_config(&config.policy, roots)));
    Ok(Connection::Tls(Box::new(
        connector.connect(server, tcp).await?,
    )))
}

fn client_config(policy: &Policy, roots: RootCertStore) -> ClientConfig {
    let time = Arc::new(TlsTime(Arc::clone(&policy.clock)));
    let mut config = ClientConfig::builder_with_details(Arc::clone(&policy.provider), time)
        .with_protocol_versions(policy.versions)
        .expect("every policy has suites and groups for its versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// Either kind of connection, as tonic wants one type.
enum Connection {
    Plain(TcpStream),
    Tls(Box<super::ClientStream<TcpStream>>),
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
