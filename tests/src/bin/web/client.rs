//! Clients that print a line of JSON.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::Words;

/// How long one answer may take before its request is called failed.
const ANSWER: Duration = Duration::from_secs(30);

/// How many errors are shown.
const SHOWN: usize = 5;

/// What came of all requests.
#[derive(Default, Serialize)]
struct Outcome {
    requests: u64,
    /// Without a whole answer.
    failed: u64,
    statuses: BTreeMap<u16, u64>,
    /// Answers by the server's name.
    names: BTreeMap<String, u64>,
    errors: Vec<String>,
    /// The last answer.
    last: Value,
    seconds: f64,
}

struct Plan {
    request: Request<Full<Bytes>>,
    client: Client<HttpConnector, Full<Bytes>>,
    count: u64,
    abort_after: Option<usize>,
    sent: AtomicU64,
    ended: AtomicBool,
    pause: Duration,
    outcome: Mutex<Outcome>,
}

/// `web get`.
pub(crate) async fn get(url: &str, words: &Words) -> Result<()> {
    let endless = words.has("--until-input-ends");
    let parallel = words.number("--parallel", 1)?.max(1);
    let rate = words.number("--rate", 0)?;
    let mut builder = Client::builder(TokioExecutor::new());
    builder.http2_only(words.has("--h2"));
    let abort_after = words.number("--abort-after", 0)?;
    let plan = Arc::new(Plan {
        request: request(url, words)?,
        client: builder.build(HttpConnector::new()),
        count: if endless {
            u64::MAX
        } else {
            words.number("--count", 1)?
        },
        abort_after: (abort_after > 0)
            .then(|| usize::try_from(abort_after))
            .transpose()?,
        sent: AtomicU64::new(0),
        ended: AtomicBool::new(false),
        pause: match rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(1.0 / rate as f64) * u32::try_from(parallel)?,
        },
        outcome: Mutex::default(),
    });
    let began = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..parallel {
        workers.spawn(plan.clone().work());
    }
    if endless {
        tokio::io::copy(&mut tokio::io::stdin(), &mut tokio::io::sink()).await?;
        plan.ended.store(true, Ordering::SeqCst);
    }
    while let Some(worker) = workers.join_next().await {
        worker?;
    }
    let mut outcome = plan.outcome();
    outcome.seconds = began.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string(&*outcome)?);
    Ok(())
}

fn request(url: &str, words: &Words) -> Result<Request<Full<Bytes>>> {
    let size = usize::try_from(words.number("--body", 0)?)?;
    let method = words.values("--method").next().unwrap_or("GET");
    let mut request = Request::builder()
        .method(method)
        .uri(url)
        .body(Full::new(Bytes::from(vec![b'b'; size])))?;
    for header in words.values("--header") {
        let (name, value) = header.split_once(": ").context("--header 'NAME: VALUE'")?;
        let name: HeaderName = name.parse()?;
        request
            .headers_mut()
            .append(name, HeaderValue::from_str(value)?);
    }
    Ok(request)
}

impl Plan {
    fn outcome(&self) -> std::sync::MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn work(self: Arc<Self>) {
        let mut ticks = (!self.pause.is_zero()).then(|| interval(self.pause));
        if let Some(ticks) = &mut ticks {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        while !self.ended.load(Ordering::SeqCst)
            && self.sent.fetch_add(1, Ordering::SeqCst) < self.count
        {
            if let Some(ticks) = &mut ticks {
                ticks.tick().await;
            }
            let answer = timeout(ANSWER, self.once()).await;
            let answer = answer.unwrap_or_else(|_| bail!("no answer in {ANSWER:?}"));
            self.outcome().learn(answer);
        }
    }

    async fn once(&self) -> Result<Answer> {
        let response = self.client.request(self.request.clone()).await?;
        match self.abort_after {
            Some(bytes) => abort(response, bytes).await,
            None => whole(response).await,
        }
    }
}

struct Answer {
    status: u16,
    shown: Value,
}

async fn whole(response: Response<Incoming>) -> Result<Answer> {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.context("the answer's body")?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let bytes = body.to_bytes();
    let pairs = |map: &http::HeaderMap| -> BTreeMap<String, String> {
        let pair = |(name, value): (&HeaderName, &HeaderValue)| {
            (
                name.to_string(),
                String::from_utf8_lossy(value.as_bytes()).into_owned(),
            )
        };
        map.iter().map(pair).collect()
    };
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]).into_owned();
    Ok(Answer {
        status: parts.status.as_u16(),
        shown: json!({
            "status": parts.status.as_u16(),
            "version": format!("{:?}", parts.version),
            "headers": pairs(&parts.headers),
            "trailers": pairs(&trailers),
            "bytes": bytes.len(),
            "body": serde_json::from_str(&text).unwrap_or(Value::String(text)),
        }),
    })
}

/// Goes away in the middle of the answer.
async fn abort(response: Response<Incoming>, bytes: usize) -> Result<Answer> {
    let status = response.status().as_u16();
    let (mut body, mut taken) = (response.into_body(), 0);
    while taken < bytes {
        let frame = body.frame().await.context("it ended before")??;
        taken += frame.data_ref().map_or(0, Bytes::len);
    }
    Ok(Answer {
        status,
        shown: json!({"taken": taken}),
    })
}

impl Outcome {
    fn learn(&mut self, answer: Result<Answer>) {
        self.requests += 1;
        match answer {
            Ok(answer) => {
                *self.statuses.entry(answer.status).or_default() += 1;
                if let Some(name) = answer.shown["body"]["name"].as_str() {
                    *self.names.entry(name.to_owned()).or_default() += 1;
                }
                self.last = answer.shown;
            }
            Err(error) => {
                self.failed += 1;
                if self.errors.len() < SHOWN {
                    self.errors.push(format!("{error:#}"));
                }
            }
        }
    }
}

/// `web upgrade`: a handshake, and an echo through what it opens.
pub(crate) async fn upgrade(address: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "GET /upgrade HTTP/1.1\r\nhost: {address}\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        let read = timeout(ANSWER, stream.read_buf(&mut head)).await??;
        ensure!(read > 0, "it ended: {:?}", String::from_utf8_lossy(&head));
    }
    let line = String::from_utf8_lossy(&head);
    let line = line.lines().next().unwrap_or_default().to_owned();
    let mut echoed = [0; 5];
    if line.contains(" 101 ") {
        stream.write_all(b"hello").await?;
        timeout(ANSWER, stream.read_exact(&mut echoed)).await??;
    }
    println!(
        "{}",
        json!({"line": line, "echoed": String::from_utf8_lossy(&echoed)})
    );
    Ok(())
}
