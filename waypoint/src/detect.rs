//! Which protocol a stream speaks: as declared, else by its first bytes, in bounded time.

use std::{collections::HashMap, future::Future, pin::pin, time::Duration};

use mesh::{
    l7::{
        served::AppProtocol,
        sniff::{Sniffed, sniff, sniff_http, sniff_tls},
    },
    names::NamespacedHostname,
};
use net::hbone::{Stream, StreamError};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

/// How long the first bytes of a declared protocol may take: as request headers may.
const DECLARED: Duration = Duration::from_secs(60);
/// Well-known ports whose servers speak first (waypoint.md 1.5).
const SERVER_FIRST_PORTS: [u16; 4] = [25, 53, 3306, 27017];
/// How long a port is remembered whose clients kept silent.
const REMEMBERED: Duration = Duration::from_secs(600);
const MAX_REMEMBERED: usize = 1024;

/// What a stream speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http(HttpVersion),
    /// With the name that the ClientHello asks for.
    Tls(Option<String>),
    Tcp,
}

/// Which HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HttpVersion {
    Http1,
    Http2,
}

/// Why it could not be told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DetectError {
    #[error("the client ended the stream")]
    Stream(#[from] StreamError),
    #[error("nothing came within {0:?}, on a port declared to speak {1:?}")]
    Silent(Duration, AppProtocol),
}

/// Ports whose clients kept silent: not waited for again, for a while.
#[derive(Debug, Default)]
pub(crate) struct ServerFirst(Mutex<HashMap<(NamespacedHostname, u16), Instant>>);

impl ServerFirst {
    fn knows(&self, key: &(NamespacedHostname, u16)) -> bool {
        let known = self.0.lock();
        known.get(key).is_some_and(|until| Instant::now() < *until)
    }

    fn remember(&self, key: (NamespacedHostname, u16)) {
        let mut known = self.0.lock();
        let now = Instant::now();
        if known.len() >= MAX_REMEMBERED {
            known.retain(|_, until| now < *until);
        }
        if known.len() < MAX_REMEMBERED {
            known.insert(key, now + REMEMBERED);
        }
    }
}

/// A port, as far as it decides what is spoken there.
pub(crate) struct Port<'a> {
    /// Of which service; none: of a workload.
    pub(crate) service: Option<&'a NamespacedHostname>,
    pub(crate) number: u16,
    pub(crate) declared: AppProtocol,
}

/// Tells what `stream` speaks. What was looked at stays to be read.
///
/// # Errors
/// The client went away, or is silent where it must speak first.
pub(crate) async fn detect(
    stream: &mut Stream,
    port: Port<'_>,
    server_first: &ServerFirst,
    deadline: Duration,
) -> Result<Protocol, DetectError> {
    match port.declared {
        AppProtocol::Tcp => Ok(Protocol::Tcp),
        AppProtocol::Unknown => undeclared(stream, &port, server_first, deadline).await,
        AppProtocol::Tls => declared(stream, &port, sniff_tls).await.map(as_protocol),
        AppProtocol::Http | AppProtocol::Http2 | AppProtocol::Grpc | AppProtocol::GrpcWeb => {
            let told = declared(stream, &port, sniff_http).await?;
            // Whatever else comes on such a port is HTTP that cannot be read, and never bytes that are passed on.
            Ok(Protocol::Http(match told {
                Sniffed::Http2 => HttpVersion::Http2,
                _ => HttpVersion::Http1,
            }))
        }
    }
}

async fn declared(
    stream: &mut Stream,
    port: &Port<'_>,
    sniff: impl Fn(&[u8]) -> Sniffed,
) -> Result<Sniffed, DetectError> {
    let told = told(stream, sniff, DECLARED).await?;
    told.ok_or(DetectError::Silent(DECLARED, port.declared))
}

async fn undeclared(
    stream: &mut Stream,
    port: &Port<'_>,
    server_first: &ServerFirst,
    deadline: Duration,
) -> Result<Protocol, DetectError> {
    let key = port.service.map(|service| (service.clone(), port.number));
    let known = key.as_ref().is_some_and(|key| server_first.knows(key));
    if known || SERVER_FIRST_PORTS.contains(&port.number) {
        return Ok(Protocol::Tcp);
    }
    match told(stream, sniff, deadline).await? {
        Some(told) => Ok(as_protocol(told)),
        None => {
            if let Some(key) = key
                && has_said_nothing(stream).await
            {
                server_first.remember(key);
            }
            Ok(Protocol::Tcp)
        }
    }
}

fn as_protocol(told: Sniffed) -> Protocol {
    match told {
        Sniffed::Http1 => Protocol::Http(HttpVersion::Http1),
        Sniffed::Http2 => Protocol::Http(HttpVersion::Http2),
        Sniffed::Tls(name) => Protocol::Tls(name),
        Sniffed::Opaque | Sniffed::More => Protocol::Tcp,
    }
}

/// Looks at more and more bytes until they tell. `None`: not in time.
async fn told(
    stream: &mut Stream,
    sniff: impl Fn(&[u8]) -> Sniffed,
    deadline: Duration,
) -> Result<Option<Sniffed>, StreamError> {
    let mut late = pin!(sleep(deadline));
    let mut seen = 0;
    loop {
        let bytes = tokio::select! {
            biased;
            bytes = stream.peek(seen) => bytes?,
            () = &mut late => return Ok(None),
        };
        match sniff(bytes) {
            // No more will come: it is what it is.
            Sniffed::More if bytes.len() <= seen => return Ok(Some(Sniffed::Opaque)),
            Sniffed::More => seen = bytes.len(),
            told => return Ok(Some(told)),
        }
    }
}

/// Whether not one byte has come.
async fn has_said_nothing(stream: &mut Stream) -> bool {
    let mut peeking = pin!(stream.peek(0));
    std::future::poll_fn(|cx| std::task::Poll::Ready(peeking.as_mut().poll(cx).is_pending())).await
}
