//! A client that speaks HBONE to a proxy, and the endpoint behind it.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{client::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh::{authority::Authority as Destination, outbound::HBONE_PORT};
use net::{
    hbone::{self, ConnectHead, ConnectRequest},
    tls,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::authority::{Authority, account};

/// The service's address.
pub(crate) const VIP: (IpAddr, u16) = (IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
/// The endpoint's.
pub(crate) const BACKEND: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 77, 0, 2));
pub(crate) const BACKEND_PORT: u16 = 8080;
/// Bytes of each answer.
const ANSWER: usize = 1024;
/// The longest that anything may take.
const LONGEST: Duration = Duration::from_secs(10);

/// Serves HTTP/1.1 inside of HBONE, for as long as the program runs.
pub(crate) async fn backend(authority: &Authority) -> Result<()> {
    let listener = TcpListener::bind((BACKEND, HBONE_PORT)).await?;
    let certificate = authority.certificate(&account("web"))?;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let config = certificate.server_config();
            tokio::spawn(async move {
                let Ok((io, peer)) = tls::accept(tcp, config, LONGEST).await else {
                    return;
                };
                let config = hbone::Config::default();
                let forever = std::future::pending();
                // A proxy that ends is no failure of the endpoint.
                let _ = hbone::serve(io, peer, &config, forever, answer, |_| {}).await;
            });
        }
    });
    Ok(())
}

async fn answer(request: ConnectRequest) {
    let Ok(stream) = request.accept(HeaderMap::new()) else {
        return;
    };
    let body = Bytes::from_static(&[b'x'; ANSWER]);
    let service = service_fn(move |_| {
        let response = Response::new(Full::new(body.clone()));
        async move { Ok::<_, Infallible>(response) }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// The client's side: tunnels to one proxy.
pub(crate) struct Client {
    pool: hbone::Pool,
    target: hbone::Target,
}

/// One connection of an application.
pub(crate) struct Connection(http1::SendRequest<Empty<Bytes>>);

/// What came of a load.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    /// In seconds, sorted.
    pub(crate) latencies: Vec<f64>,
}

impl Outcome {
    /// In microseconds.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index within the samples"
    )]
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let at = (last as f64 * part).round() as usize;
        self.latencies.get(at).copied().unwrap_or(f64::NAN) * 1e6
    }
}

impl Client {
    pub(crate) fn new(authority: &Authority, proxy: SocketAddr) -> Result<Self> {
        Ok(Self {
            pool: hbone::Pool::new(hbone::PoolConfig::default(), TcpStream::connect),
            target: hbone::Target {
                destination: proxy,
                workload: None,
                expected: Arc::from([account("waypoint")]),
                certificate: authority.certificate(&account("client"))?,
            },
        })
    }

    pub(crate) async fn connect(&self) -> Result<Connection> {
        let head = ConnectHead {
            authority: Destination::address(VIP.0, VIP.1),
            headers: HeaderMap::new(),
        };
        let tunnel = self.pool.connect(&self.target, head).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(tunnel.stream)).await?;
        tokio::spawn(connection);
        Ok(Connection(sender))
    }

    /// Waits until requests are answered.
    pub(crate) async fn ready(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let tried = async { self.connect().await?.get("/").await };
            let error = match tried.await {
                Ok(200) => return Ok(()),
                Ok(status) => anyhow::anyhow!("answered {status}"),
                Err(error) => error,
            };
            if began.elapsed() > LONGEST {
                return Err(error.context("the proxy does not serve"));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// As many requests as go through `connections`, one at a time on each.
    pub(crate) async fn most(
        &self,
        path: &str,
        connections: usize,
        time: Duration,
    ) -> Result<Outcome> {
        let ended = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let mut workers = JoinSet::new();
        for _ in 0..connections {
            let mut connection = self.connect().await?;
            let (ended, requests) = (Arc::clone(&ended), Arc::clone(&requests));
            let path = path.to_owned();
            workers.spawn(async move {
                while !ended.load(Ordering::Relaxed) {
                    ensure!(connection.get(&path).await? == 200, "not answered with 200");
                    requests.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        sleep(time).await;
        ended.store(true, Ordering::Relaxed);
        while let Some(worker) = workers.join_next().await {
            worker??;
        }
        Ok(Outcome {
            requests: requests.load(Ordering::Relaxed),
            latencies: Vec::new(),
        })
    }

    /// `rate` requests a second over `connections`; a latency counts from when its request was due.
    pub(crate) async fn at_rate(
        &self,
        path: &str,
        connections: u32,
        rate: u32,
        time: Duration,
    ) -> Result<Outcome> {
        let pause = Duration::from_secs(1) * connections / rate;
        let mut workers = JoinSet::new();
        for worker in 0..connections {
            let mut connection = self.connect().await?;
            let path = path.to_owned();
            workers.spawn(async move {
                sleep(pause * worker / connections).await;
                let began = Instant::now();
                let mut ticks = interval(pause);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
                let mut latencies = Vec::new();
                while began.elapsed() < time {
                    let due = ticks.tick().await;
                    ensure!(connection.get(&path).await? == 200, "not answered with 200");
                    latencies.push(due.elapsed().as_secs_f64());
                }
                Ok(latencies)
            });
        }
        let mut outcome = Outcome::default();
        while let Some(worker) = workers.join_next().await {
            outcome.latencies.extend(worker??);
        }
        outcome.requests = outcome.latencies.len().try_into()?;
        outcome.latencies.sort_by(f64::total_cmp);
        Ok(outcome)
    }
}

impl Connection {
    /// The status of the answer, once it has been read.
    pub(crate) async fn get(&mut self, path: &str) -> Result<u16> {
        self.ask(path).await.map(|(status, _)| status)
    }

    /// The same, with the header `x-version`.
    pub(crate) async fn ask(&mut self, path: &str) -> Result<(u16, Option<String>)> {
        timeout(LONGEST, self.0.ready()).await??;
        let request = Request::get(path)
            .header("host", "web.shop")
            .body(Empty::new())?;
        let response = timeout(LONGEST, self.0.send_request(request)).await;
        let response = response.context("no answer in time")??;
        let (parts, body) = response.into_parts();
        body.collect().await?;
        let version = parts.headers.get("x-version");
        let version = version.map(|it| String::from_utf8_lossy(it.as_bytes()).into_owned());
        Ok((parts.status.as_u16(), version))
    }
}
