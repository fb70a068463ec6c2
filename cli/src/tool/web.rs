//! An HTTP server that tells who it is and what it was asked, and a client that shows what came back.

use std::{
    convert::Infallible,
    net::{Ipv6Addr, SocketAddr},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1::SendRequest,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

/// The longest answer that is read.
const LIMIT_BYTES: usize = 64 << 10;

/// What the server does.
#[derive(Debug)]
struct Server {
    name: String,
    fail_every: Option<u64>,
    asked: AtomicU64,
}

/// Serves until killed: every request is answered with the server's name, and each `fail_every`th with 503.
pub(super) fn serve(port: u16, name: String, fail_every: Option<u64>) -> Result<ExitCode> {
    let server = Arc::new(Server {
        name,
        fail_every,
        asked: AtomicU64::new(0),
    });
    runtime()?.block_on(async {
        let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = TcpListener::bind(both).await;
        let listener = listener.with_context(|| format!("listen on port {port}"))?;
        println!("serving HTTP on port {port}");
        loop {
            let (stream, _) = listener.accept().await.context("accept")?;
            tokio::spawn(answer(stream, Arc::clone(&server)));
        }
    })
}

async fn answer(stream: TcpStream, server: Arc<Server>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = server.response(&request);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    // Who goes away is no concern of an echo.
    let _ = connection.await;
}

impl Server {
    fn response(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        let fails = self
            .fail_every
            .is_some_and(|every| number.is_multiple_of(every));
        let text = format!("{} {} {}\n", self.name, request.method(), request.uri());
        let mut response = Response::new(Full::from(text));
        if fails {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        response
    }
}

/// What the client asks.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) url: Uri,
    pub(super) count: u32,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) timeout: Duration,
}

/// `name: value`.
pub(super) fn header(text: &str) -> Result<(HeaderName, HeaderValue)> {
    let Some((name, value)) = text.split_once(':') else {
        bail!("{text:?} is not NAME:VALUE");
    };
    Ok((name.trim().parse()?, value.trim().parse()?))
}

/// Sends the requests one after the other over one connection; a line for each: status, milliseconds, body.
pub(super) fn get(question: &Question) -> Result<ExitCode> {
    runtime()?.block_on(async {
        let mut client = None;
        for _ in 0..question.count {
            let started = Instant::now();
            let asking = ask(question, &mut client);
            let (status, body) = tokio::time::timeout(question.timeout, asking)
                .await
                .with_context(|| format!("no answer within {:?}", question.timeout))??;
            let took = started.elapsed().as_millis();
            println!("{} {took} {}", status.as_u16(), body.trim_end());
        }
        Ok(ExitCode::SUCCESS)
    })
}

type Client = SendRequest<Empty<Bytes>>;

async fn ask(question: &Question, kept: &mut Option<Client>) -> Result<(StatusCode, String)> {
    let url = &question.url;
    let host = url.authority().context("the URL has no host")?;
    let mut client = match kept.take().filter(|client| !client.is_closed()) {
        Some(client) => client,
        None => connect(host.host(), host.port_u16().unwrap_or(80)).await?,
    };
    let path = url.path_and_query().map_or("/", |it| it.as_str());
    let mut request = Request::get(path).header(http::header::HOST, host.as_str());
    for (name, value) in &question.headers {
        request = request.header(name, value);
    }
    client.ready().await.context("wait for the connection")?;
    let response = client.send_request(request.body(Empty::new())?).await;
    let (head, body) = response.context("send the request")?.into_parts();
    let body = Limited::new(body, LIMIT_BYTES).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("read the answer: {error}"))?;
    *kept = Some(client);
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    Ok((head.status, text))
}

async fn connect(host: &str, port: u16) -> Result<Client> {
    let stream = TcpStream::connect((host, port)).await;
    let stream = stream.with_context(|| format!("connect to {host}:{port}"))?;
    let (client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .context("speak HTTP")?;
    tokio::spawn(connection);
    Ok(client)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("start a runtime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_a_name_and_a_value() {
        let (name, value) = header("X-Canary: yes, twice").unwrap();
        assert_eq!(
            (name.as_str(), value.to_str().unwrap()),
            ("x-canary", "yes, twice")
        );
        for bad in ["x-canary", "no name: x", ": x", "x: a\u{1}b"] {
            assert!(header(bad).is_err(), "{bad:?}");
        }
    }
}
