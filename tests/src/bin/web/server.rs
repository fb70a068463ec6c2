//! Servers: one that tells what it got, and ones that break off.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Body = BoxBody<Bytes, Error>;

/// How many requests are remembered.
const SEEN: usize = 200;

#[derive(Default)]
struct State {
    name: String,
    seen: Mutex<VecDeque<String>>,
    /// How often each key of `/fail` came.
    tries: Mutex<BTreeMap<String, u64>>,
    /// Answers of `/stream` that have not ended.
    live: AtomicU64,
}

/// Serves until it is killed.
pub(crate) async fn serve(address: &str, name: &str) -> Result<()> {
    let listener = TcpListener::bind(address).await.context("listen")?;
    let state = Arc::new(State {
        name: name.to_owned(),
        ..State::default()
    });
    loop {
        let (stream, _) = listener.accept().await?;
        let state = state.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request| answer(state.clone(), request));
            let builder = auto::Builder::new(TokioExecutor::new());
            // A client that goes away is its own affair.
            let _ = builder
                .serve_connection_with_upgrades(TokioIo::new(stream), answer)
                .await;
        });
    }
}

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let words: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    if words != ["seen"] {
        state.remember(format!("{} {}", request.method(), request.uri().path()));
    }
    Ok(match words.as_slice() {
        ["seen"] => json_of(StatusCode::OK, &state.told()),
        ["status", code] => state.tell(code.parse().unwrap_or_default(), request).await,
        ["slow", milliseconds] => {
            sleep(Duration::from_millis(milliseconds.parse().unwrap_or(0))).await;
            state.tell(StatusCode::OK, request).await
        }
        ["fail", times, key] => {
            let status = match state.count(key) <= times.parse().unwrap_or(0) {
                true => StatusCode::SERVICE_UNAVAILABLE,
                false => StatusCode::OK,
            };
            state.tell(status, request).await
        }
        ["stream", blocks] => state.stream(blocks.parse().unwrap_or(0)),
        ["echo"] => Response::new(request.into_body().map_err(Error::from).boxed()),
        ["upgrade"] => upgraded(request),
        ["keys", x] => json_of(
            StatusCode::OK,
            &json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}]}),
        ),
        _ => state.tell(StatusCode::OK, request).await,
    })
}

impl State {
    fn remember(&self, request: String) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() == SEEN {
            seen.pop_front();
        }
        seen.push_back(request);
    }

    fn told(&self) -> Value {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        json!({"name": self.name, "seen": *seen, "live": self.live.load(Ordering::SeqCst)})
    }

    fn count(&self, key: &str) -> u64 {
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        let count = tries.entry(key.to_owned()).or_default();
        *count += 1;
        *count
    }

    /// What the request was.
    async fn tell(&self, status: StatusCode, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await;
        let body = body.map(|it| (it.trailers().cloned(), it.to_bytes().len()));
        // Nobody reads the answer to a request that broke off.
        let (trailers, bytes) = body.unwrap_or_default();
        let text = json!({
            "name": self.name,
            "method": parts.method.as_str(),
            "path": parts.uri.path_and_query().map(ToString::to_string),
            "authority": parts.uri.authority().map(ToString::to_string),
            "version": format!("{:?}", parts.version),
            "headers": fields(&parts.headers),
            "trailers": trailers.as_ref().map(fields),
            "bytes": bytes,
        });
        json_of(status, &text)
    }

    /// Blocks as fast as they are taken, counted as live until the last is, or the client goes away.
    fn stream(self: Arc<Self>, blocks: u64) -> Response<Body> {
        let (sender, receiver) = mpsc::channel::<Result<Frame<Bytes>, Error>>(4);
        self.live.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            let block = Bytes::from_static(&[b's'; 64 << 10]);
            for _ in 0..blocks {
                if sender.send(Ok(Frame::data(block.clone()))).await.is_err() {
                    break;
                }
            }
            self.live.fetch_sub(1, Ordering::SeqCst);
        });
        Response::new(BodyExt::boxed(StreamBody::new(ReceiverStream::new(
            receiver,
        ))))
    }
}

fn fields(headers: &HeaderMap) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::<String, Vec<String>>::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        all.entry(name.to_string()).or_default().push(value);
    }
    all
}

fn json_of(status: StatusCode, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(value.to_string()));
    let mut response = Response::new(body.map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// Takes the protocol that is offered, and echoes.
fn upgraded(mut request: Request<Incoming>) -> Response<Body> {
    let offered = request.headers().get(header::UPGRADE).cloned();
    let Some(offered) = offered else {
        return json_of(StatusCode::UPGRADE_REQUIRED, &json!({}));
    };
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(stream) = upgrade.await {
            let (mut reader, mut writer) = tokio::io::split(TokioIo::new(stream));
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        }
    });
    let mut response = json_of(StatusCode::SWITCHING_PROTOCOLS, &json!({}));
    *response.body_mut() = Full::new(Bytes::new())
        .map_err(|never: Infallible| match never {})
        .boxed();
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_TYPE);
    headers.insert(header::UPGRADE, offered);
    let upgrade = header::HeaderValue::from_static("upgrade");
    headers.insert(header::CONNECTION, upgrade);
    response
}

/// Where a connection is reset.
const STAGES: [&str; 4] = ["accept", "request", "head", "body"];

/// Resets each connection at a stage: before anything, after the request's head, in the middle of the answer's head, or of its
/// body.
pub(crate) async fn reset(address: &str, stage: &str) -> Result<()> {
    ensure!(STAGES.contains(&stage), "stages: {STAGES:?}");
    let listener = TcpListener::bind(address).await.context("listen")?;
    loop {
        let (stream, _) = listener.accept().await?;
        let stage = stage.to_owned();
        tokio::spawn(async move {
            // The other side may be quicker.
            let _ = break_off(stream, &stage).await;
        });
    }
}

async fn break_off(mut stream: TcpStream, stage: &str) -> Result<()> {
    // Closing with a linger of zero sends RST.
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    if stage == "accept" {
        return Ok(());
    }
    let mut read = Vec::new();
    while !read.windows(4).any(|four| four == b"\r\n\r\n") {
        ensure!(stream.read_buf(&mut read).await? > 0, "it ended");
    }
    let answer: &[u8] = match stage {
        "head" => b"HTTP/1.1 200 OK\r\ncontent-le",
        "body" => b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nbroken off",
        _ => b"",
    };
    stream.write_all(answer).await?;
    stream.flush().await?;
    // What was written is to arrive before the reset does.
    sleep(Duration::from_millis(50)).await;
    Ok(())
}
