use std::{
    future::{Future, pending},
    os::fd::AsRawFd,
    sync::Arc,
};

use bytes::Bytes;
use http::HeaderMap;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

use super::*;
use crate::{
    hbone::{Client, Config, ConnectHead, ConnectRequest, serve},
    testing::{self, tcp_pair},
};

const DEADLINE: Duration = Duration::from_secs(20);

async fn soon<F: Future>(what: F) -> F::Output {
    timeout(DEADLINE, what).await.expect("in time")
}

/// A connection over which tunnels can be opened, both ends at hand.
pub(super) struct Tunnels {
    client: Client,
    accepted: mpsc::UnboundedReceiver<Stream>,
}

impl Tunnels {
    pub(super) async fn new() -> Self {
        let (near, far) = duplex(1 << 20);
        let peer = testing::peer("a", "b");
        let (report, accepted) = mpsc::unbounded_channel();
        let handler = move |request: ConnectRequest| {
            let report = report.clone();
            async move {
                let _ = report.send(request.accept(HeaderMap::new()).unwrap());
            }
        };
        let of_server = peer.clone();
        tokio::spawn(async move {
            serve(
                far,
                of_server,
                &Config::default(),
                pending(),
                handler,
                |_| {},
            )
            .await
        });
        let (client, driver) = Client::handshake(near, peer, &Config::default())
            .await
            .unwrap();
        tokio::spawn(driver);
        Self { client, accepted }
    }

    pub(super) async fn open(&mut self) -> (Stream, Stream) {
        let head = ConnectHead {
            authority: "a.b:80".parse().unwrap(),
            headers: HeaderMap::new(),
        };
        let tunnel = soon(self.client.connect(head, DEADLINE)).await.unwrap();
        (tunnel.stream, self.accepted.recv().await.unwrap())
    }
}

/// A copy under way.
struct Copy {
    counters: Arc<Counters>,
    cancel: Option<oneshot::Sender<()>>,
    end: JoinHandle<End>,
}

fn copy(downstream: impl Into<Endpoint>, upstream: impl Into<Endpoint>) -> Copy {
    let counters = Arc::new(Counters::default());
    let (cancel, cancelled) = oneshot::channel::<()>();
    let end = {
        let (downstream, upstream) = (downstream.into(), upstream.into());
        let counters = Arc::clone(&counters);
        tokio::spawn(async move {
            let cancelled = async {
                if cancelled.await.is_err() {
                    pending::<()>().await;
                }
            };
            bidirectional(downstream, upstream, &counters, cancelled).await
        })
    };
    Copy {
        counters,
        cancel: Some(cancel),
        end,
    }
}

/// Both proxies between two applications: TCP, copy, tunnel, copy, TCP.
struct Path {
    client: TcpStream,
    server: TcpStream,
    outbound: Copy,
    inbound: Copy,
    _tunnels: Tunnels,
}

async fn path() -> Path {
    let mut tunnels = Tunnels::new().await;
    let (near, far) = tunnels.open().await;
    let (client, captured) = tcp_pair().await;
    let (delivered, server) = tcp_pair().await;
    Path {
        client,
        server,
        outbound: copy(captured, near),
        inbound: copy(far, delivered),
        _tunnels: tunnels,
    }
}

fn reset(tcp: TcpStream) {
    socket2::SockRef::from(&tcp)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251).try_into().unwrap()).collect()
}

#[tokio::test]
async fn bytes_and_both_ends_pass_and_are_counted() {
    let Path {
        mut client,
        mut server,
        outbound,
        inbound,
        ..
    } = path().await;
    let (up, down) = (pattern(3_000_000), pattern(1_000_001));
    let talk = async {
        let (mut client_read, mut client_write) = client.split();
        let (mut server_read, mut server_write) = server.split();
        let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
        let sending = async {
            client_write.write_all(&up).await.unwrap();
            client_write.shutdown().await.unwrap();
        };
        let answering = async {
            // The client's end arrives; the other direction goes on after it.
            server_read.read_to_end(&mut got_up).await.unwrap();
            server_write.write_all(&down).await.unwrap();
            server_write.shutdown().await.unwrap();
        };
        let receiving = client_read.read_to_end(&mut got_down);
        let ((), (), received) = tokio::join!(sending, answering, receiving);
        received.unwrap();
        assert!(got_up == up && got_down == down);
    };
    soon(talk).await;
    for copy in [outbound, inbound] {
        let end = soon(copy.end).await.unwrap();
        assert!(matches!(end, End::Finished(Side::Downstream)), "{end:?}");
        assert_eq!(copy.counters.received(), 3_000_000);
        assert_eq!(copy.counters.sent(), 1_000_001);
    }
}

/// A read stops at urgent data, as it does at the last there is.
async fn write_around_urgent(tcp: &mut TcpStream) {
    tcp.write_all(b"before").await.unwrap();
    let urgent = socket2::SockRef::from(&*tcp).send_out_of_band(b"!");
    assert_eq!(urgent.unwrap(), 1);
    tcp.write_all(b"behind").await.unwrap();
}

#[tokio::test]
async fn what_is_written_behind_urgent_data_does_not_wait_for_more() {
    let mut tunnels = Tunnels::new().await;
    let (near, mut far) = tunnels.open().await;
    let (mut client, captured) = tcp_pair().await;
    let (mut other, plain) = tcp_pair().await;
    let (delivered, mut server) = tcp_pair().await;
    let _copies = [copy(captured, near), copy(plain, delivered)];
    // Once the copies wait, all that is written without a pause is one event to them.
    client.write_all(b"1").await.unwrap();
    assert_eq!(soon(far.read_u8()).await.unwrap(), b'1');
    other.write_all(b"2").await.unwrap();
    assert_eq!(soon(server.read_u8()).await.unwrap(), b'2');
    write_around_urgent(&mut client).await;
    write_around_urgent(&mut other).await;
    let mut got = [[0; 12]; 2];
    soon(far.read_exact(&mut got[0])).await.unwrap();
    soon(server.read_exact(&mut got[1])).await.unwrap();
    assert_eq!(got, [*b"beforebehind"; 2]);
}

#[tokio::test]
async fn a_reset_by_the_client_reaches_the_server_as_a_reset() {
    let mut path = path().await;
    path.client.write_all(b"x").await.unwrap();
    soon(path.server.read_u8()).await.unwrap();
    reset(path.client);
    let error = soon(path.server.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    for copy in [path.outbound, path.inbound] {
        let end = soon(copy.end).await.unwrap();
        assert!(matches!(end, End::Reset(Side::Downstream)), "{end:?}");
    }
}

#[tokio::test]
async fn a_reset_by_the_server_reaches_the_client_as_a_reset() {
    let mut path = path().await;
    path.server.write_all(b"x").await.unwrap();
    soon(path.client.read_u8()).await.unwrap();
    reset(path.server);
    let error = soon(path.client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    for copy in [path.outbound, path.inbound] {
        let end = soon(copy.end).await.unwrap();
        assert!(matches!(end, End::Reset(Side::Upstream)), "{end:?}");
    }
}

#[tokio::test]
async fn a_reset_after_the_servers_own_end_is_still_told() {
    let mut path = path().await;
    path.server.shutdown().await.unwrap();
    assert_eq!(soon(path.client.read(&mut [0])).await.unwrap(), 0);
    reset(path.server);
    let end = soon(path.outbound.end).await.unwrap();
    assert!(matches!(end, End::Reset(Side::Upstream)), "{end:?}");
    let error = soon(async {
        loop {
            if let Err(error) = path.client.write_all(b"x").await {
                return error;
            }
        }
    })
    .await;
    assert!(matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    ));
}

#[tokio::test]
async fn plain_connections_are_copied_as_faithfully() {
    let (mut client, captured) = tcp_pair().await;
    let (delivered, mut server) = tcp_pair().await;
    let Copy { end, .. } = copy(captured, delivered);
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = Vec::new();
    soon(server.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"hello");
    server.write_all(b"x").await.unwrap();
    assert_eq!(soon(client.read_u8()).await.unwrap(), b'x');
    reset(server);
    let error = soon(client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(
        soon(end).await.unwrap(),
        End::Reset(Side::Upstream)
    ));
}

#[tokio::test]
async fn a_reset_is_told_also_while_the_other_side_reads_nothing() {
    let (client, captured) = tcp_pair().await;
    let (delivered, server) = tcp_pair().await;
    let Copy { end, .. } = copy(captured, delivered);
    // Until nothing fits in any more, on the whole way.
    while timeout(Duration::from_millis(200), fill_once(&client))
        .await
        .is_ok()
    {}
    reset(client);
    assert!(matches!(
        soon(end).await.unwrap(),
        End::Reset(Side::Downstream)
    ));
    drop(server);
}

/// Writes what fits, once something does.
async fn fill_once(tcp: &TcpStream) {
    loop {
        tcp.writable().await.unwrap();
        if tcp.try_write(&[0; 1 << 16]).is_ok() {
            return;
        }
    }
}

#[tokio::test]
async fn cancelling_cuts_both_sides_at_once() {
    let mut path = path().await;
    path.client.write_all(b"x").await.unwrap();
    soon(path.server.read_u8()).await.unwrap();
    path.inbound.cancel.take().unwrap().send(()).unwrap();
    assert!(matches!(
        soon(path.inbound.end).await.unwrap(),
        End::Cancelled
    ));
    let at_server = soon(path.server.read_u8()).await.unwrap_err();
    let at_client = soon(path.client.read_u8()).await.unwrap_err();
    assert_eq!(at_server.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(at_client.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_peer_that_wants_no_more_after_its_end_is_no_failure() {
    let mut tunnels = Tunnels::new().await;
    let (near, far) = tunnels.open().await;
    let (mut client, captured) = tcp_pair().await;
    let Copy { end, .. } = copy(captured, near);
    let (mut send, recv) = far.into_halves();
    send.send(Bytes::from_static(b"bye")).unwrap();
    send.finish().unwrap();
    let mut got = Vec::new();
    soon(client.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"bye");
    send.reset(ResetCode::NO_ERROR);
    drop((send, recv));
    let end = soon(end).await.unwrap();
    assert!(matches!(end, End::Finished(Side::Upstream)), "{end:?}");
}

/// Small writes that pile up behind a reader that stalls must not look like an attack to the peer: each is a frame,
/// and too many unread ones end the whole connection with ENHANCE_YOUR_CALM.
#[tokio::test]
async fn a_slow_reader_of_tiny_writes_does_not_cost_the_connection() {
    let mut tunnels = Tunnels::new().await;
    let (near, far) = tunnels.open().await;
    let (delivered, server) = tcp_pair().await;
    // Small, so that what nobody reads piles up behind them.
    let small = socket2::SockRef::from(&delivered).set_send_buffer_size(4096);
    small
        .and_then(|()| socket2::SockRef::from(&server).set_recv_buffer_size(4096))
        .unwrap();
    let _copy = copy(far, delivered);
    let (mut send, _recv) = near.into_halves();
    soon(send.write_all(&vec![0; 256 * 1024])).await.unwrap();
    for _ in 0..200_000 {
        soon(send.write_all(b"x")).await.unwrap();
        tokio::task::yield_now().await;
    }
    let (mut near, mut far) = tunnels.open().await;
    near.write_all(b"x").await.unwrap();
    assert_eq!(soon(far.read_u8()).await.unwrap(), b'x');
}

#[tokio::test]
async fn no_message_size_stalls() {
    let mut path = path().await;
    for size in [
        1, 2, 100, 1000, 1023, 1024, 1025, 1448, 4096, 16_383, 16_384, 16_385, 65_535, 65_536,
        100_000, 262_144, 262_145, 500_000, 1_000_000,
    ] {
        let message = pattern(size);
        let mut got = vec![0; size];
        // A slow round may be the machine's, which has others' work to do; a stall by delayed acknowledgement shows in every one.
        let began = std::time::Instant::now();
        while there_and_back(&mut path, &message, &mut got).await >= Duration::from_millis(40) {
            assert!(began.elapsed() < DEADLINE, "every time with {size} bytes");
        }
    }
}

/// How long a message takes both ways.
async fn there_and_back(path: &mut Path, message: &[u8], got: &mut [u8]) -> Duration {
    let begin = std::time::Instant::now();
    let (sent, received) =
        soon(async { tokio::join!(path.client.write_all(message), path.server.read_exact(got)) })
            .await;
    sent.and(received.map(drop)).unwrap();
    let (sent, received) =
        soon(async { tokio::join!(path.server.write_all(message), path.client.read_exact(got)) })
            .await;
    sent.and(received.map(drop)).unwrap();
    begin.elapsed()
}

#[tokio::test]
async fn the_future_of_a_copy_is_small() {
    let (a, b) = tcp_pair().await;
    let counters = Counters::default();
    let size = size_of_val(&bidirectional(a, b, &counters, pending()));
    assert!(size <= 2048, "{size}");
}

/// Segments that a connection has received (tcp_info, tcpi_segs_in: RFC 4898 tcpEStatsPerfSegsIn).
#[allow(unsafe_code, reason = "no library reads this option whole")]
fn segments_received(tcp: &TcpStream) -> u32 {
    const SEGS_IN: usize = 140;
    let mut info = [0u8; 256];
    let mut length = libc::socklen_t::try_from(info.len()).unwrap();
    // SAFETY: the kernel writes at most `length` bytes into `info`.
    let result = unsafe {
        libc::getsockopt(
            tcp.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut length,
        )
    };
    assert_eq!(result, 0);
    u32::from_ne_bytes(info[SEGS_IN..SEGS_IN + 4].try_into().unwrap())
}

#[tokio::test]
async fn the_last_bytes_and_the_end_are_one_segment() {
    let mut tunnels = Tunnels::new().await;
    let (near, mut far) = tunnels.open().await;
    let (delivered, mut server) = tcp_pair().await;
    let (mut send, _recv) = near.into_halves();
    send.write_all(b"all of it").await.unwrap();
    send.finish().unwrap();
    // Both have arrived before the copy looks.
    assert_eq!(soon(far.peek(usize::MAX)).await.unwrap(), b"all of it");
    let before = segments_received(&server);
    let _copy = copy(far, delivered);
    let mut got = Vec::new();
    soon(server.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"all of it");
    assert_eq!(segments_received(&server) - before, 1);
}
