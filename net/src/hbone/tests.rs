use std::{
    future::pending,
    io,
    net::Ipv4Addr,
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, Method, Request, StatusCode};
use mesh::flow::EndReason;
use rustls::AlertDescription;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use super::{
    connection::{ConnectionState, Metered},
    *,
};
use crate::{
    testing::{self, TestCa},
    tls::{self, Policy, WorkloadCertificate},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};

mod abuse;
mod ahead;

const DEADLINE: Duration = Duration::from_secs(20);

/// Fails a test that waits for what does not come.
async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(DEADLINE, what).await.expect("in time")
}

/// Waits until `condition` holds, looking again whenever other tasks had their turn.
async fn until(condition: impl Fn() -> bool) {
    soon(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// An echo server on loopback, over TLS.
struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    drain: Arc<Notify>,
    ends: mpsc::UnboundedReceiver<Result<ServeEnd, ServeError>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn echo(request: ConnectRequest) {
    let Ok(stream) = request.accept(HeaderMap::new()) else {
        return;
    };
    let (mut send, mut recv) = stream.into_halves();
    let _ = tokio::io::copy(&mut recv, &mut send).await;
    let _ = send.shutdown().await;
}

async fn serve_on_loopback<H, F>(
    certificate: &Arc<WorkloadCertificate>,
    config: Config,
    handler: H,
) -> Server
where
    H: Fn(ConnectRequest) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (report, ends) = mpsc::unbounded_channel();
    let connections = Arc::new(AtomicUsize::new(0));
    let open = Arc::new(AtomicUsize::new(0));
    let drain = Arc::new(Notify::new());
    let task = {
        let (connections, open, drain) = (connections.clone(), open.clone(), drain.clone());
        let certificate = certificate.clone();
        tokio::spawn(async move {
            let mut serving = tokio::task::JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                connections.fetch_add(1, Ordering::SeqCst);
                open.fetch_add(1, Ordering::SeqCst);
                let tls = certificate.server_config();
                let (config, handler, report) = (config.clone(), handler.clone(), report.clone());
                let (open, drain) = (open.clone(), drain.clone());
                serving.spawn(async move {
                    if let Ok((io, peer)) = tls::accept(tcp, tls, DEADLINE).await {
                        let end = serve(io, peer, &config, drain.notified(), handler, |_| {}).await;
                        let _ = report.send(end);
                    }
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        })
    };
    Server {
        address,
        connections,
        open,
        drain,
        ends,
        task,
    }
}

/// Two identities of one CA.
struct Mesh {
    ca: TestCa,
    client: Arc<WorkloadCertificate>,
    server: Arc<WorkloadCertificate>,
}

impl Mesh {
    fn new() -> Self {
        let ca = TestCa::new("cluster.local", &Policy::default());
        let client = ca.certificate(&ca.identity("a", "client"));
        let server = ca.certificate(&ca.identity("b", "server"));
        Self { ca, client, server }
    }

    async fn echo(&self) -> Server {
        serve_on_loopback(&self.server, Config::default(), echo).await
    }

    fn target(&self, destination: SocketAddr) -> Target {
        Target {
            destination,
            workload: None,
            expected: Arc::from([self.server.identity().clone()]),
            certificate: self.client.clone(),
        }
    }
}

fn head() -> ConnectHead {
    ConnectHead {
        authority: "127.0.0.1:80".parse().unwrap(),
        headers: HeaderMap::new(),
    }
}

fn pool(config: PoolConfig) -> Pool {
    Pool::new(config, TcpStream::connect)
}

async fn ping_pong(stream: &mut Stream, rounds: u8) {
    for round in 0..rounds {
        stream.write_all(&[round]).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), round);
    }
}

#[tokio::test]
async fn a_tunnel_carries_bytes_headers_and_identities() {
    let mesh = Mesh::new();
    let seen = Arc::new(parking_lot::Mutex::new(None));
    let handler = {
        let seen = seen.clone();
        move |request: ConnectRequest| {
            let peer = request.peer().identity.clone();
            let baggage = request.headers()["baggage"].clone();
            *seen.lock() = Some((request.authority().clone(), peer, baggage));
            async move {
                let headers = HeaderMap::from_iter([(
                    http::HeaderName::from_static("baggage"),
                    http::HeaderValue::from_static("k8s.namespace.name=b"),
                )]);
                let mut stream = request.accept(headers).unwrap();
                stream.write_all(b"hello").await.unwrap();
                stream.shutdown().await.unwrap();
            }
        }
    };
    let server = serve_on_loopback(&mesh.server, Config::default(), handler).await;
    let pool = pool(PoolConfig::default());
    let mut head = head();
    head.headers.insert("baggage", "x=1".parse().unwrap());
    let tunnel = soon(pool.connect(&mesh.target(server.address), head)).await;
    let mut tunnel = tunnel.unwrap();
    assert_eq!(tunnel.headers["baggage"], "k8s.namespace.name=b");
    assert_eq!(&tunnel.peer.identity, mesh.server.identity());
    let mut text = String::new();
    soon(tunnel.stream.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "hello");
    let (authority, peer, baggage) = seen.lock().take().unwrap();
    assert_eq!(authority, "127.0.0.1:80".parse().unwrap());
    assert_eq!(&peer, mesh.client.identity());
    assert_eq!(baggage, "x=1");
}

#[tokio::test]
async fn a_refusal_names_its_status_and_peer() {
    let mesh = Mesh::new();
    let handler = |request: ConnectRequest| async { request.refuse(StatusCode::UNAUTHORIZED) };
    let server = serve_on_loopback(&mesh.server, Config::default(), handler).await;
    let pool = pool(PoolConfig::default());
    let error = soon(pool.connect(&mesh.target(server.address), head()))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ConnectError::Refused { status, peer }
            if *status == StatusCode::UNAUTHORIZED && &peer.identity == mesh.server.identity()),
        "{error:?}"
    );
}

#[tokio::test]
async fn first_callers_share_one_dial() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig {
        spread_after: 100,
        ..PoolConfig::default()
    });
    let target = mesh.target(server.address);
    let tunnels = join_all((0..50).map(|_| pool.connect(&target, head())));
    let tunnels = soon(tunnels).await;
    assert!(tunnels.iter().all(Result::is_ok));
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
    assert_eq!(pool.stats().streams, 50);
}

#[tokio::test]
async fn busy_flows_spread_over_several_connections_and_no_more() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig {
        spread_after: 4,
        max_spread: 4,
        ..PoolConfig::default()
    });
    let target = mesh.target(server.address);
    let first = soon(join_all((0..16).map(|_| pool.connect(&target, head())))).await;
    assert!(first.iter().all(Result::is_ok));
    let mut more = Vec::new();
    for _ in 0..48 {
        until(|| pool.stats().dials == 0).await;
        more.push(soon(pool.connect(&target, head())).await.unwrap());
    }
    until(|| pool.stats().dials == 0).await;
    assert_eq!(pool.stats().connections, 4);
    assert_eq!(server.connections.load(Ordering::SeqCst), 4);
}

/// Carries bytes until it is told to stop, as a way through the network does that is lost, and goes on holding both ends.
async fn way(mut near: TcpStream, mut far: TcpStream, lost: Arc<Notify>) {
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
        () = lost.notified() => std::future::pending().await,
    }
}

#[tokio::test]
async fn a_connection_that_owes_an_answer_gets_no_streams_where_another_can_be_had() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let lost = Arc::new(Notify::new());
    let (first, of_first) = (AtomicUsize::new(0), lost.clone());
    let dialer = move |destination: SocketAddr| {
        let is_first = first.fetch_add(1, Ordering::SeqCst) == 0;
        let lost = of_first.clone();
        async move {
            let far = TcpStream::connect(destination).await?;
            if !is_first {
                return Ok(far);
            }
            let (near, middle) = crate::testing::tcp_pair().await;
            tokio::spawn(way(middle, far, lost));
            Ok(near)
        }
    };
    let http = Config {
        ping_after: Duration::from_millis(20),
        ping_timeout: DEADLINE,
        ..Config::default()
    };
    let config = PoolConfig {
        http,
        max_spread: 2,
        response_deadline: Duration::from_millis(500),
        ..PoolConfig::default()
    };
    let pool = Pool::new(config, dialer);
    let target = mesh.target(server.address);
    let connected = async || while pool.connect(&target, head()).await.is_err() {};
    soon(connected()).await;
    lost.notify_one();
    let another = async {
        while server.connections.load(Ordering::SeqCst) < 2 {
            let _ = pool.connect(&target, head()).await;
        }
    };
    tokio::time::timeout(DEADLINE / 2, another)
        .await
        .expect("another is dialled long before the first is given up");
    soon(connected()).await;
}

#[tokio::test]
async fn a_full_connection_is_not_given_more_streams() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig {
        max_streams: 2,
        spread_after: 100,
        max_spread: 1,
        ..PoolConfig::default()
    });
    let target = mesh.target(server.address);
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(soon(pool.connect(&target, head())).await.unwrap());
    }
    assert_eq!(server.connections.load(Ordering::SeqCst), 3);
    // Room that becomes free is used again.
    held.truncate(5);
    until(|| pool.stats().streams == 5).await;
    held.push(soon(pool.connect(&target, head())).await.unwrap());
    assert_eq!(server.connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_failed_dial_wakes_everyone_with_the_same_error() {
    let mesh = Mesh::new();
    let dials = Arc::new(AtomicUsize::new(0));
    let gate = Arc::new(Notify::new());
    let dialer = {
        let (dials, gate) = (dials.clone(), gate.clone());
        move |_| {
            dials.fetch_add(1, Ordering::SeqCst);
            let gate = gate.clone();
            async move {
                gate.notified().await;
                Err(std::io::ErrorKind::ConnectionRefused.into())
            }
        }
    };
    let config = PoolConfig {
        spread_after: 100,
        ..PoolConfig::default()
    };
    let pool = Pool::new(config, dialer);
    let target = mesh.target("127.0.0.1:1".parse().unwrap());
    let waiting = join_all((0..20).map(|_| pool.connect(&target, head())));
    let (errors, ()) = tokio::join!(soon(waiting), async { gate.notify_one() });
    let errors: Vec<_> = errors
        .into_iter()
        .map(|result| match result.unwrap_err() {
            ConnectError::Dial(error) => error,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(errors.iter().all(|error| Arc::ptr_eq(error, &errors[0])));
    assert!(matches!(*errors[0], DialError::Tcp { .. }));
    assert_eq!(dials.load(Ordering::SeqCst), 1);
    assert_eq!(pool.stats(), PoolStats::default());
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_nobody_answers_times_out_as_such() {
    let mesh = Mesh::new();
    let pool = Pool::new(PoolConfig::default(), |_| pending());
    let target = mesh.target("192.0.2.1:15008".parse().unwrap());
    let error = pool.connect(&target, head()).await.unwrap_err();
    let ConnectError::Dial(error) = error else {
        panic!("{error:?}");
    };
    assert!(matches!(*error, DialError::TcpTimeout { after, .. } if after.as_secs() == 10));
    assert!(error.to_string().contains("15008"));
}

#[tokio::test]
async fn the_kernels_own_patience_is_told_as_ours_is() {
    let mesh = Mesh::new();
    let late = |_| async { Err(io::ErrorKind::TimedOut.into()) };
    let pool = Pool::new(PoolConfig::default(), late);
    let target = mesh.target("192.0.2.1:15008".parse().unwrap());
    let error = pool.connect(&target, head()).await.unwrap_err();
    assert_eq!(error.end_reason(), EndReason::TunnelTimedOut);
}

/// A peer that has refused our certificate and hung up: writes fail, and its alert can still be read.
struct Refusing;

impl AsyncRead for Refusing {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateUnknown);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, alert)))
    }
}

impl AsyncWrite for Refusing {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_refusal_of_our_certificate_is_heard_by_who_writes_first() {
    for flushed in [false, true] {
        let state = ConnectionState::new();
        let mut io = Metered {
            io: Refusing,
            state: Arc::clone(&state),
        };
        let failed = match flushed {
            true => io.flush().await,
            false => io.write(b"PRI").await.map(drop),
        };
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(state.alert(), Some(AlertDescription::CertificateUnknown));
    }
}

#[tokio::test]
async fn whoever_is_not_expected_gets_no_stream() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig::default());
    let mut target = mesh.target(server.address);
    target.expected = Arc::from([mesh.ca.identity("b", "another")]);
    let error = soon(pool.connect(&target, head())).await.unwrap_err();
    assert!(
        matches!(&error, ConnectError::Dial(dial) if matches!(**dial, DialError::Tls { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_server_that_refuses_our_certificate_is_named() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let stranger = TestCa::new("elsewhere", &Policy::default());
    let id = stranger.identity("a", "client");
    let (leaf, key) = stranger.sign(&stranger.leaf(&id));
    let certificate =
        WorkloadCertificate::new(&Policy::default(), vec![leaf], key, mesh.ca.trust()).unwrap();
    let mut target = mesh.target(server.address);
    target.certificate = Arc::new(certificate);
    let pool = pool(PoolConfig::default());
    let error = soon(pool.connect(&target, head())).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::CertificateRefused { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_new_certificate_dials_anew_and_the_old_streams_live_on() {
    let mut mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig::default());
    let target = mesh.target(server.address);
    let connect = pool.connect(&target, head());
    let mut old = soon(connect).await.unwrap();
    mesh.client = mesh.ca.certificate(mesh.client.identity());
    let target = mesh.target(server.address);
    let connect = pool.connect(&target, head());
    let mut new = soon(connect).await.unwrap();
    assert_eq!(server.connections.load(Ordering::SeqCst), 2);
    soon(ping_pong(&mut old.stream, 3)).await;
    soon(ping_pong(&mut new.stream, 3)).await;
}

#[tokio::test]
async fn a_draining_server_keeps_its_streams_and_gets_no_new_ones() {
    let mesh = Mesh::new();
    let mut server = mesh.echo().await;
    let pool = pool(PoolConfig::default());
    let target = mesh.target(server.address);
    let mut old = soon(pool.connect(&target, head())).await.unwrap();
    soon(ping_pong(&mut old.stream, 1)).await;
    server.drain.notify_waiters();
    // Until GOAWAY has arrived new streams may still go there, and are served.
    soon(async {
        while server.connections.load(Ordering::SeqCst) == 1 {
            let mut tunnel = pool.connect(&target, head()).await.unwrap();
            ping_pong(&mut tunnel.stream, 1).await;
        }
    })
    .await;
    soon(ping_pong(&mut old.stream, 3)).await;
    drop(old);
    let end = soon(server.ends.recv()).await.unwrap();
    assert_eq!(end.unwrap(), ServeEnd::Drained);
}

#[tokio::test]
async fn a_dropped_pool_closes_its_connections() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig::default());
    let mut tunnel = soon(pool.connect(&mesh.target(server.address), head()))
        .await
        .unwrap();
    drop(pool);
    assert!(soon(tunnel.stream.read_u8()).await.is_err());
    until(|| server.open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn an_unused_connection_is_released_and_a_used_one_is_not() {
    let mesh = Mesh::new();
    let mut server = mesh.echo().await;
    let pool = pool(PoolConfig {
        unused_release: Duration::from_millis(50),
        ..PoolConfig::default()
    });
    let target = mesh.target(server.address);
    let mut tunnel = soon(pool.connect(&target, head())).await.unwrap();
    let used_since = tokio::time::Instant::now();
    soon(async {
        while used_since.elapsed() < Duration::from_millis(200) {
            ping_pong(&mut tunnel.stream, 1).await;
        }
    })
    .await;
    assert_eq!(pool.stats().connections, 1);
    drop(tunnel);
    let end = soon(server.ends.recv()).await.unwrap();
    assert_eq!(end.unwrap(), ServeEnd::Closed);
    assert_eq!(pool.stats(), PoolStats::default());
}

#[tokio::test]
async fn one_byte_ping_pong_on_a_thousand_tunnels_is_not_cut() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig::default());
    let target = mesh.target(server.address);
    let talk = (0..1000).map(|_| async {
        let mut tunnel = pool.connect(&target, head()).await.unwrap();
        ping_pong(&mut tunnel.stream, 30).await;
        tunnel
    });
    let tunnels = tokio::time::timeout(Duration::from_secs(60), join_all(talk));
    assert_eq!(tunnels.await.unwrap().len(), 1000);
    let connections = server.connections.load(Ordering::SeqCst);
    assert!((10..=20).contains(&connections), "{connections}");
}

#[tokio::test]
async fn each_half_ends_on_its_own() {
    let mesh = Mesh::new();
    let handler = |request: ConnectRequest| async {
        let mut stream = request.accept(HeaderMap::new()).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        // The client's half is over; ours still carries.
        stream.write_all(&all).await.unwrap();
        stream.shutdown().await.unwrap();
    };
    let server = serve_on_loopback(&mesh.server, Config::default(), handler).await;
    let pool = pool(PoolConfig::default());
    let target = mesh.target(server.address);
    let connect = pool.connect(&target, head());
    let mut stream = soon(connect).await.unwrap().stream;
    stream.write_all(b"all of it").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = Vec::new();
    soon(stream.read_to_end(&mut back)).await.unwrap();
    assert_eq!(back, b"all of it");
}

#[tokio::test]
async fn a_reset_arrives_with_its_code_either_way() {
    let mesh = Mesh::new();
    let (report, mut reports) = mpsc::unbounded_channel();
    let handler = move |request: ConnectRequest| {
        let report = report.clone();
        async move {
            let resets = request.headers().contains_key("reset");
            let mut stream = request.accept(HeaderMap::new()).unwrap();
            if resets {
                // The client has its answer by then.
                stream.read_u8().await.unwrap();
                return stream.reset(ResetCode::CONNECT_ERROR);
            }
            let (mut send, _recv) = stream.into_halves();
            let error = std::future::poll_fn(|cx| send.poll_reset(cx)).await;
            let _ = report.send(error);
        }
    };
    let server = serve_on_loopback(&mesh.server, Config::default(), handler).await;
    let pool = pool(PoolConfig::default());
    let target = mesh.target(server.address);

    let mut asks = head();
    asks.headers.insert("reset", "1".parse().unwrap());
    let mut stream = soon(pool.connect(&target, asks)).await.unwrap().stream;
    stream.write_all(b"x").await.unwrap();
    let error = soon(stream.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let told = error.downcast::<StreamError>().unwrap();
    assert!(matches!(told, StreamError::Reset(ResetCode::CONNECT_ERROR)));

    let stream = soon(pool.connect(&target, head())).await.unwrap().stream;
    stream.reset(ResetCode::CONNECT_ERROR);
    let told = soon(reports.recv()).await.unwrap();
    assert!(matches!(told, StreamError::Reset(ResetCode::CONNECT_ERROR)));

    drop(soon(pool.connect(&target, head())).await.unwrap());
    let told = soon(reports.recv()).await.unwrap();
    assert!(matches!(told, StreamError::Reset(ResetCode::CANCEL)));
}

#[tokio::test]
async fn streams_that_nobody_reads_do_not_stop_the_others() {
    let mesh = Mesh::new();
    // Pushes without end where asked to.
    let handler = |request: ConnectRequest| async {
        if !request.headers().contains_key("push") {
            return echo(request).await;
        }
        let mut stream = request.accept(HeaderMap::new()).unwrap();
        let block = vec![0; 256 * 1024];
        while stream.write_all(&block).await.is_ok() {}
    };
    let server = serve_on_loopback(&mesh.server, Config::default(), handler).await;
    let pool = pool(PoolConfig {
        max_spread: 1,
        ..PoolConfig::default()
    });
    let target = mesh.target(server.address);
    let mut push = head();
    push.headers.insert("push", "1".parse().unwrap());
    let mut unread = Vec::new();
    // Eight full streams of 4 MiB are twice the connection's first window.
    for _ in 0..8 {
        let tunnel = soon(pool.connect(&target, push.clone())).await.unwrap();
        unread.push(tunnel.stream);
    }
    let mut lively = soon(pool.connect(&target, head())).await.unwrap().stream;
    let full = Config::default().stream_window_bytes;
    soon(async {
        for stream in &mut unread {
            while stream.recv_used() < usize::try_from(full).unwrap() {
                ping_pong(&mut lively, 1).await;
            }
        }
    })
    .await;
    soon(ping_pong(&mut lively, 100)).await;
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
}

/// A reset leaves data in flight behind. Where the library has forgotten the stream by then, it counts each late frame
/// as an error, and so many of these end the connection: applications that reset often must not reach that.
#[tokio::test]
async fn streams_that_applications_reset_do_not_cost_the_connection() {
    let mesh = Mesh::new();
    let handler = |request: ConnectRequest| async {
        let mut stream = request.accept(HeaderMap::new()).unwrap();
        if stream.read_u8().await.is_ok() {
            stream.reset(ResetCode::CONNECT_ERROR);
        }
    };
    let server = serve_on_loopback(&mesh.server, Config::default(), handler).await;
    let pool = pool(PoolConfig {
        max_spread: 1,
        ..PoolConfig::default()
    });
    let target = mesh.target(server.address);
    for _ in 0..30 {
        let sending = (0..90).map(|_| async {
            let mut stream = pool.connect(&target, head()).await.unwrap().stream;
            while stream.write_all(&[0; 4096]).await.is_ok() {}
        });
        soon(join_all(sending)).await;
    }
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
}

/// A server on a pipe, with no TLS, and what it makes of the connection.
fn on_pipe<H, F>(
    config: Config,
    handler: H,
) -> (DuplexStream, JoinHandle<Result<ServeEnd, ServeError>>)
where
    H: Fn(ConnectRequest) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (near, far) = duplex(1 << 20);
    let peer = testing::peer("a", "client");
    let task =
        tokio::spawn(async move { serve(far, peer, &config, pending(), handler, |_| {}).await });
    (near, task)
}

async fn never(_: ConnectRequest) {
    panic!("no request may come through");
}

type Requests = h2::client::SendRequest<Bytes>;

async fn raw_client(io: DuplexStream) -> Requests {
    let (requests, connection) = h2::client::Builder::new()
        .initial_max_send_streams(10_000)
        .handshake(io)
        .await
        .unwrap();
    tokio::spawn(connection);
    requests
}

async fn status_of(requests: &mut Requests, request: Request<()>) -> Result<StatusCode, h2::Error> {
    *requests = requests.clone().ready().await?;
    let (response, _send) = requests.send_request(request, false)?;
    Ok(soon(response).await?.status())
}

/// What ten streams of 100,000 bytes each may send to a server that reads nothing.
async fn in_flight(connection_window_size: u32, connection_window_grows: bool) -> usize {
    let config = Config::sized(&Sizes {
        stream_window_size: 100_000,
        connection_window_size,
        connection_window_grows,
        frame_size: 16_384,
    });
    let hold = |request: ConnectRequest| async {
        let _unread = request.accept(HeaderMap::new()).unwrap();
        pending().await
    };
    let (io, _serving) = on_pipe(config, hold);
    let mut requests = raw_client(io).await;
    let mut streams = Vec::new();
    for _ in 0..10 {
        requests = requests.ready().await.unwrap();
        let connect = Request::connect("10.0.0.1:80").body(()).unwrap();
        let (response, mut stream) = requests.send_request(connect, false).unwrap();
        soon(response).await.unwrap();
        stream.reserve_capacity(100_000);
        streams.push(stream);
    }
    // Behind this answer is nothing of what the last stream changed.
    let request = Request::get("http://10.0.0.1/").body(()).unwrap();
    status_of(&mut requests, request).await.unwrap();
    streams.iter().map(h2::SendStream::capacity).sum()
}

#[tokio::test]
async fn a_peer_has_as_much_in_flight_as_was_asked_for_and_no_more() {
    assert_eq!(in_flight(150_000, false).await, 150_000);
    assert_eq!(in_flight(150_000, true).await, 1_000_000);
}

#[tokio::test]
async fn what_is_no_connect_to_a_host_and_port_gets_400() {
    let (io, _serving) = on_pipe(Config::default(), never);
    let mut requests = raw_client(io).await;
    let table = [
        (Method::GET, "http://127.0.0.1:80/"),
        (Method::POST, "http://127.0.0.1:80/"),
        (Method::CONNECT, "127.0.0.1"),
        (Method::CONNECT, "web.b.svc"),
        (Method::CONNECT, "[::1]"),
        (Method::CONNECT, "user@10.0.0.1:80"),
    ];
    for (method, uri) in table {
        let request = Request::builder().method(method.clone()).uri(uri);
        let status = status_of(&mut requests, request.body(()).unwrap()).await;
        assert_eq!(status.unwrap(), StatusCode::BAD_REQUEST, "{method} {uri}");
    }
}

#[tokio::test]
async fn what_gets_400_is_told_and_not_in_full() {
    let (near, far) = duplex(1 << 20);
    let (tell, mut told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let refused = |error: &NotConnect| tell.send(error.to_string()).unwrap();
        let config = Config::default();
        serve(
            far,
            testing::peer("a", "client"),
            &config,
            pending(),
            never,
            refused,
        )
        .await
    });
    let mut requests = raw_client(near).await;
    let uri = format!("http://127.0.0.1:80/{}", "x".repeat(1000));
    let request = Request::builder().uri(&uri).body(()).unwrap();
    status_of(&mut requests, request).await.unwrap();
    let told = soon(told.recv()).await.unwrap();
    let expected = format!("GET {} is no CONNECT to HOST:PORT", &uri[..128]);
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_peer_that_speaks_no_http2_is_refused_by_that_name() {
    let (mut io, serving) = on_pipe(Config::default(), never);
    io.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let error = soon(serving).await.unwrap().unwrap_err();
    assert!(matches!(error, ServeError::Rules(_)), "{error:?}");
    assert_eq!(error.end_reason(), Some(EndReason::BadRequest));
}

#[tokio::test]
async fn a_peer_that_hangs_up_is_no_refusal() {
    let (io, serving) = on_pipe(Config::default(), never);
    drop(io);
    if let Err(error) = soon(serving).await.unwrap() {
        assert_eq!(error.end_reason(), None, "{error:?}");
    }
}

/// An HTTP/2 frame (RFC 9113 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
/// `:method: CONNECT` as a literal, with the name from the static table (RFC 7541 6.2.2).
const METHOD_CONNECT: &[u8] = b"\x02\x07CONNECT";

async fn preface(io: &mut DuplexStream) {
    io.write_all(PREFACE).await.unwrap();
    io.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
}

/// What the other end announces: its settings by number (RFC 9113 6.5.2), and by how much its connection's window grows.
async fn announced(io: &mut DuplexStream) -> (Vec<(u16, u32)>, u32) {
    const WINDOW_UPDATE: u8 = 8;
    let (mut settings, mut grown) = (Vec::new(), None);
    while settings.is_empty() || grown.is_none() {
        let mut head = [0; 9];
        io.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        io.read_exact(&mut payload).await.unwrap();
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        match head[3] {
            SETTINGS => settings.extend(payload.chunks(6).map(|it| {
                let id = u16::from_be_bytes([it[0], it[1]]);
                (id, number(&it[2..]))
            })),
            WINDOW_UPDATE => grown = Some(number(&payload)),
            _ => {}
        }
    }
    settings.sort_unstable();
    (settings, grown.unwrap())
}

const PUSH: u16 = 2;
const STREAMS: u16 = 3;
const WINDOW: u16 = 4;
const FRAME: u16 = 5;
const HEADER_LIST: u16 = 6;
/// Beyond the 65,535 bytes that every connection begins with: 16 MiB.
const GROWN: u32 = (16 << 20) - 65_535;

#[tokio::test]
async fn a_server_announces_what_the_specification_says() {
    let (mut io, _serving) = on_pipe(Config::default(), never);
    preface(&mut io).await;
    let expected = vec![
        (STREAMS, 200),
        (WINDOW, 4 << 20),
        (FRAME, 1 << 20),
        (HEADER_LIST, 64 << 10),
    ];
    assert_eq!(soon(announced(&mut io)).await, (expected, GROWN));
}

/// A client on a pipe, and the server's end of it.
async fn client_on_pipe() -> (Client, DuplexStream) {
    let (near, far) = duplex(1 << 20);
    let made = Client::handshake(near, testing::peer("a", "client"), &Config::default()).await;
    let (client, driver) = made.unwrap();
    tokio::spawn(driver);
    (client, far)
}

#[tokio::test]
async fn a_client_announces_what_the_specification_says() {
    let (_client, mut io) = client_on_pipe().await;
    let mut greeting = [0; PREFACE.len()];
    soon(io.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(greeting, PREFACE);
    let expected = vec![
        (PUSH, 0),
        (WINDOW, 4 << 20),
        (FRAME, 1 << 20),
        (HEADER_LIST, 16 << 10),
    ];
    // Eight streams' windows at once: a stream that nobody reads is never a quarter of it.
    let grown = 8 * (4 << 20) - 65_535;
    assert_eq!(soon(announced(&mut io)).await, (expected, grown));
}

#[tokio::test(start_paused = true)]
async fn a_connect_that_is_not_answered_is_given_up_at_its_deadline() {
    let (client, mut io) = client_on_pipe().await;
    // The peer lives: it only says nothing to the request.
    io.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    let start = tokio::time::Instant::now();
    let deadline = Duration::from_secs(5);
    let error = client.connect(head(), deadline).await.map(drop);
    assert!(matches!(error, Err(ConnectError::Late { .. })), "{error:?}");
    assert_eq!(start.elapsed(), deadline);
}

#[tokio::test]
async fn a_connect_without_authority_reaches_no_handler() {
    let (mut io, _serving) = on_pipe(Config::default(), never);
    preface(&mut io).await;
    io.write_all(&frame(HEADERS, END_HEADERS, 1, METHOD_CONNECT))
        .await
        .unwrap();
    // The first frame on stream 1 is the answer: 400, or a reset.
    let answer = soon(async {
        loop {
            let mut head = [0; 9];
            io.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            io.read_exact(&mut payload).await.unwrap();
            if head[8] == 1 {
                return (head[3], payload);
            }
        }
    })
    .await;
    let (kind, payload) = answer;
    // 0x8c is `:status: 400` in the static table; 3 is RST_STREAM.
    assert!(
        kind == 3 || kind == HEADERS && payload[0] == 0x8c,
        "{kind} {payload:?}"
    );
}

#[tokio::test]
async fn a_flood_of_headers_is_refused_and_the_connection_goes_on() {
    let (io, _serving) = on_pipe(Config::default(), echo);
    let mut requests = raw_client(io).await;
    let flood = |bytes: usize| {
        Request::builder()
            .method(Method::CONNECT)
            .uri("127.0.0.1:80")
            .header("baggage", "x".repeat(bytes))
            .body(())
            .unwrap()
    };
    let fits = status_of(&mut requests, flood(16 * 1024)).await;
    assert_eq!(fits.unwrap(), StatusCode::OK);
    match status_of(&mut requests, flood(100 * 1024)).await {
        Ok(status) => assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        Err(error) => assert!(error.is_reset(), "{error:?}"),
    }
    let again = status_of(&mut requests, flood(1)).await;
    assert_eq!(again.unwrap(), StatusCode::OK);
}

#[tokio::test]
async fn endless_continuations_end_the_connection() {
    let (mut io, serving) = on_pipe(Config::default(), never);
    preface(&mut io).await;
    io.write_all(&frame(HEADERS, 0, 1, METHOD_CONNECT))
        .await
        .unwrap();
    let more = frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b");
    let (mut read, mut write) = tokio::io::split(io);
    let drain =
        tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
    soon(async { while write.write_all(&more).await.is_ok() {} }).await;
    let end = soon(serving).await.unwrap();
    assert!(matches!(end, Err(ServeError::Rules(_))), "{end:?}");
    drain.abort();
}

#[tokio::test]
async fn rapid_reset_is_cut_off() {
    let started = Arc::new(AtomicUsize::new(0));
    let handler = {
        let started = started.clone();
        move |mut request: ConnectRequest| {
            started.fetch_add(1, Ordering::SeqCst);
            async move { request.cancelled().await }
        }
    };
    let (io, serving) = on_pipe(Config::default(), handler);
    let mut requests = raw_client(io).await;
    let attack = async {
        for _ in 0..1_000_000 {
            let Ok(ready) = requests.clone().ready().await else {
                return;
            };
            requests = ready;
            let request = Request::builder()
                .method(Method::CONNECT)
                .uri("127.0.0.1:80");
            let Ok((_, mut send)) = requests.send_request(request.body(()).unwrap(), false) else {
                return;
            };
            send.send_reset(h2::Reason::CANCEL);
            tokio::task::yield_now().await;
        }
        panic!("a million resets were let through");
    };
    soon(attack).await;
    let end = soon(serving).await.unwrap();
    assert!(
        matches!(
            end,
            Err(ServeError::RapidReset | ServeError::Rules(_) | ServeError::Http(_))
        ),
        "{end:?}"
    );
    assert!(started.load(Ordering::SeqCst) < 2000);
}

#[tokio::test(start_paused = true)]
async fn a_peer_without_a_preface_is_dropped() {
    let (_io, serving) = on_pipe(Config::default(), never);
    let end = serving.await.unwrap();
    assert!(matches!(end, Err(ServeError::Preface { .. })), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_dropped_after_its_ping() {
    let (mut io, serving) = on_pipe(Config::default(), never);
    preface(&mut io).await;
    let begin = tokio::time::Instant::now();
    let end = serving.await.unwrap();
    assert!(matches!(end, Err(ServeError::Silent)), "{end:?}");
    let after = begin.elapsed().as_secs();
    assert!((29..=51).contains(&after), "{after} s");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_heard_is_not_pinged() {
    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;
    let (mut io, serving) = on_pipe(Config::default(), never);
    preface(&mut io).await;
    for _ in 0..12 {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let life = frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes());
        io.write_all(&life).await.unwrap();
    }
    serving.abort();
    let mut heard = Vec::new();
    io.read_to_end(&mut heard).await.unwrap();
    let mut rest = &heard[..];
    while let [a, b, c, kind, ..] = *rest {
        assert_ne!(kind, PING);
        let length = u32::from_be_bytes([0, a, b, c]);
        rest = &rest[9 + usize::try_from(length).unwrap()..];
    }
    assert!(!heard.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_pings_stays_until_it_is_unused_too_long() {
    let (io, serving) = on_pipe(Config::default(), never);
    let _requests = raw_client(io).await;
    let begin = tokio::time::Instant::now();
    assert_eq!(serving.await.unwrap().unwrap(), ServeEnd::Unused);
    assert!(begin.elapsed() >= Config::default().unused_deadline);
}

#[tokio::test]
async fn a_handler_that_fails_ends_its_stream_alone() {
    let handler = |request: ConnectRequest| async {
        assert!(!request.headers().contains_key("fail"), "asked to");
        echo(request).await;
    };
    let (io, _serving) = on_pipe(Config::default(), handler);
    let mut requests = raw_client(io).await;
    let request = |fail: bool| {
        let mut request = Request::builder().method(Method::CONNECT).uri("a.b:80");
        if fail {
            request = request.header("fail", "1");
        }
        request.body(()).unwrap()
    };
    assert!(status_of(&mut requests, request(true)).await.is_err());
    let fine = status_of(&mut requests, request(false)).await;
    assert_eq!(fine.unwrap(), StatusCode::OK);
}

#[tokio::test]
async fn a_host_name_that_no_request_can_carry_is_refused_here() {
    let mesh = Mesh::new();
    let server = mesh.echo().await;
    let pool = pool(PoolConfig::default());
    let mut head = head();
    head.authority = mesh::authority::Authority::Hostname("we b\r\n".into(), 80);
    let error = soon(pool.connect(&mesh.target(server.address), head)).await;
    assert!(
        matches!(error, Err(ConnectError::Authority(_))),
        "{error:?}"
    );
}

#[test]
fn futures_of_a_stream_are_small() {
    let pool = pool(PoolConfig::default());
    let mesh = Mesh::new();
    let target = mesh.target("127.0.0.1:1".parse().unwrap());
    let size = size_of_val(&pool.connect(&target, head()));
    assert!(size <= 2048, "connect: {size}");
    let size = size_of::<Stream>();
    assert!(size <= 160, "Stream: {size}");
}

#[tokio::test]
async fn what_was_peeked_at_is_read_again_whole() {
    let mesh = Mesh::new();
    let handler = |request: ConnectRequest| async {
        let mut stream = request.accept(HeaderMap::new()).unwrap();
        assert_eq!(stream.peek(0).await.unwrap(), b"GET");
        stream.write_all(b"1").await.unwrap();
        assert_eq!(stream.peek(3).await.unwrap(), b"GET /");
        stream.write_all(b"2").await.unwrap();
        // Its end ends the wait for more.
        assert_eq!(stream.peek(5).await.unwrap(), b"GET /");
        let (mut send, mut recv) = stream.into_halves();
        tokio::io::copy(&mut recv, &mut send).await.unwrap();
        send.shutdown().await.unwrap();
    };
    let server = serve_on_loopback(&mesh.server, Config::default(), handler).await;
    let pool = pool(PoolConfig::default());
    let target = mesh.target(server.address);
    let connect = pool.connect(&target, head());
    let mut stream = soon(connect).await.unwrap().stream;
    stream.write_all(b"GET").await.unwrap();
    assert_eq!(soon(stream.read_u8()).await.unwrap(), b'1');
    stream.write_all(b" /").await.unwrap();
    assert_eq!(soon(stream.read_u8()).await.unwrap(), b'2');
    stream.shutdown().await.unwrap();
    let mut back = Vec::new();
    soon(stream.read_to_end(&mut back)).await.unwrap();
    assert_eq!(back, b"GET /");
}
