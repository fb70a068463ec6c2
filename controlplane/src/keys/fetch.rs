//! One fetch of a set of keys: bounded in time, size and redirects, and never of an address of this machine.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mesh::l7::backend::BackendTls;
use net::tls::{OriginationError, Originator};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    time::timeout,
};

use crate::translate::l7::istio::request_authentication::KeySource;

/// Of one fetch, with its redirects and the issuer's configuration.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Sets of keys are a few KiB.
const MOST_BYTES: usize = 1024 * 1024;
/// Of one document.
const MOST_REDIRECTS: usize = 3;
/// Where an issuer's configuration is (OpenID Connect Discovery 4).
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// Which addresses may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All but this machine's own and those of the link, where a cloud's metadata is.
    Others,
    /// This machine's too: where the whole mesh is on it.
    Local,
}

/// Fetches keys.
#[derive(Debug)]
pub struct Fetcher {
    tls: Originator,
    reach: Reach,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It took too long.
    #[error("no answer within {}s", TIMEOUT.as_secs())]
    Timeout,
    /// Not http or https, or without a host.
    #[error("{0:?} is no http or https URL")]
    Url(String),
    /// The host has no address that may be asked.
    #[error("{0} has no address that may be asked")]
    Address(String),
    /// Its name is unknown.
    #[error("look up {0}")]
    Lookup(String, #[source] io::Error),
    /// Nobody answers.
    #[error("connect to {0}")]
    Connect(String, #[source] io::Error),
    /// It is not who it should be.
    #[error("TLS with {0}")]
    Tls(String, #[source] OriginationError),
    /// The exchange failed.
    #[error("ask {0}")]
    Http(String, #[source] hyper::Error),
    /// The body did not come whole.
    #[error("read the answer of {0}")]
    Body(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another answer than 200.
    #[error("{0} answers {1}")]
    Status(String, StatusCode),
    /// Redirects that lead nowhere, to plaintext, or too far.
    #[error("{0} redirects: {1}")]
    Redirect(String, &'static str),
    /// What came is something else.
    #[error("{0} answers with no {1}")]
    Shape(String, &'static str),
}

/// Whether a text is a JSON Web Key Set (RFC 7517, 5) with any key.
pub(super) fn is_set_of_keys(text: &str) -> bool {
    let set: Option<Value> = serde_json::from_str(text).ok();
    let keys = set.as_ref().and_then(|set| set["keys"].as_array());
    keys.is_some_and(|keys| !keys.is_empty() && keys.iter().all(Value::is_object))
}

impl Fetcher {
    /// TLS is checked against the system's roots.
    pub fn new(tls: Originator, reach: Reach) -> Self {
        Self { tls, reach }
    }

    /// A JWK set (RFC 7517), as text.
    ///
    /// # Errors
    /// See [`FetchError`]; whatever was fetched before is none of its business.
    pub async fn fetch(&self, source: &KeySource) -> Result<String, FetchError> {
        timeout(TIMEOUT, self.keys(source))
            .await
            .map_err(|_| FetchError::Timeout)?
    }

    async fn keys(&self, source: &KeySource) -> Result<String, FetchError> {
        let url = match source {
            KeySource::Url(url) => url.to_string(),
            KeySource::Issuer(issuer) => self.discover(issuer).await?,
        };
        let text = self.document(&url).await?;
        match is_set_of_keys(&text) {
            true => Ok(text),
            false => Err(FetchError::Shape(url, "set of keys")),
        }
    }

    /// The URL of the keys in the issuer's configuration, which must be the issuer's own.
    async fn discover(&self, issuer: &str) -> Result<String, FetchError> {
        let url = format!("{}{DISCOVERY}", issuer.trim_end_matches('/'));
        let text = self.document(&url).await?;
        let found: Value = serde_json::from_str(&text).unwrap_or_default();
        match (found["issuer"].as_str(), found["jwks_uri"].as_str()) {
            (Some(own), Some(keys)) if own == issuer => Ok(keys.to_owned()),
            _ => Err(FetchError::Shape(url, "configuration of this issuer")),
        }
    }

    async fn document(&self, url: &str) -> Result<String, FetchError> {
        let mut target = Target::parse(url)?;
        for _ in 0..=MOST_REDIRECTS {
            match self.get(&target).await? {
                Answer::Document(text) => return Ok(text),
                Answer::Moved(location) => {
                    let next = target.resolve(&location)?;
                    if target.secure && !next.secure {
                        return Err(FetchError::Redirect(
                            url.to_owned(),
                            "from https to plaintext",
                        ));
                    }
                    target = next;
                }
            }
        }
        Err(FetchError::Redirect(url.to_owned(), "too often"))
    }

    async fn get(&self, target: &Target) -> Result<Answer, FetchError> {
        let tcp = self.connect(target).await?;
        if !target.secure {
            return exchange(tcp, target).await;
        }
        let settings = BackendTls::Verify {
            sni: None,
            roots: None,
            revoked: None,
            subject_alt_names: Vec::new(),
            client: None,
        };
        let failed = |error| FetchError::Tls(target.told(), error);
        let origination = self
            .tls
            .config(&settings, &target.host, &[b"http/1.1"])
            .map_err(failed)?;
        let stream = origination.connect(tcp, TIMEOUT).await.map_err(failed)?;
        exchange(stream, target).await
    }

    async fn connect(&self, target: &Target) -> Result<TcpStream, FetchError> {
        let found = lookup_host((target.host.as_str(), target.port)).await;
        let found = found.map_err(|error| FetchError::Lookup(target.told(), error))?;
        let mut last = None;
        for address in found.filter(|address: &SocketAddr| self.may_ask(address.ip())) {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = Some(error),
            }
        }
        Err(match last {
            Some(error) => FetchError::Connect(target.told(), error),
            None => FetchError::Address(target.told()),
        })
    }

    /// Whoever may write a policy must not be able to ask the control plane's own machine by it.
    fn may_ask(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let link = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let nobody = address.is_unspecified() || address.is_multicast() || link;
        !nobody && (self.reach == Reach::Local || !address.is_loopback())
    }
}

enum Answer {
    Document(String),
    Moved(String),
}

/// What is asked for.
#[derive(Clone, Debug)]
struct Target {
    secure: bool,
    host: String,
    port: u16,
    authority: String,
    path: String,
}

impl Target {
    fn parse(url: &str) -> Result<Self, FetchError> {
        let bad = || FetchError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad()),
        };
        let authority = uri
            .authority()
            .filter(|it| !it.as_str().contains('@'))
            .ok_or_else(bad)?;
        let host = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']');
        if host.is_empty() {
            return Err(bad());
        }
        Ok(Self {
            secure,
            host: host.to_owned(),
            port: authority
                .port_u16()
                .unwrap_or(if secure { 443 } else { 80 }),
            authority: authority.to_string(),
            path: uri
                .path_and_query()
                .map_or("/", |it| it.as_str())
                .to_owned(),
        })
    }

    fn told(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}", self.authority)
    }

    /// Where a redirect leads: a whole URL, or a path of the same host.
    fn resolve(&self, location: &str) -> Result<Self, FetchError> {
        match location.starts_with('/') && !location.starts_with("//") {
            true => Self::parse(&format!("{}{location}", self.told())),
            false => Self::parse(location),
        }
    }
}

async fn exchange<IO>(io: IO, target: &Target) -> Result<Answer, FetchError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |error| FetchError::Http(target.told(), error);
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(failed)?;
    let request = Request::get(&target.path)
        .header(header::HOST, &target.authority)
        .header(header::ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|_| FetchError::Url(target.told()))?;
    let ask = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        answer(response, target).await
    };
    // The connection ends with the exchange: it is not kept.
    tokio::pin!(connection);
    tokio::pin!(ask);
    tokio::select! {
        answer = &mut ask => answer,
        ended = &mut connection => match ended {
            Ok(()) => ask.await,
            Err(error) => Err(failed(error)),
        },
    }
}

async fn answer(
    response: http::Response<hyper::body::Incoming>,
    target: &Target,
) -> Result<Answer, FetchError> {
    let status = response.status();
    if status.is_redirection() {
        let location = response.headers().get(header::LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        let nowhere = || FetchError::Redirect(target.told(), "to nowhere");
        return location
            .map(|it| Answer::Moved(it.to_owned()))
            .ok_or_else(nowhere);
    }
    if status != StatusCode::OK {
        return Err(FetchError::Status(target.told(), status));
    }
    let body = Limited::new(response.into_body(), MOST_BYTES)
        .collect()
        .await;
    let body = body.map_err(|error| match error.is::<LengthLimitError>() {
        true => FetchError::Shape(target.told(), "set of keys, but with more than 1 MiB"),
        false => FetchError::Body(target.told(), error),
    })?;
    let text = String::from_utf8(body.to_bytes().to_vec());
    text.map(Answer::Document)
        .map_err(|_| FetchError::Shape(target.told(), "text"))
}
