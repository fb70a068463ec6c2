//! HTTP/2 abuse, written frame by frame, against either end: cut off before it costs much, and not taken for what
//! applications do.

use super::*;
use crate::allocations::Peak;

const DATA: u8 = 0;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
/// `:status: 200`, from the static table.
const STATUS_OK: &[u8] = b"\x88";

/// A good CONNECT of this stream to `a:80`.
fn open(stream: u32) -> Vec<u8> {
    let block = [METHOD_CONNECT, b"\x01\x04a:80"].concat();
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// The number of the client's nth stream.
fn stream(number: u32) -> u32 {
    2 * number + 1
}

/// Reads until a frame of this kind has come.
async fn hear(read: &mut (impl tokio::io::AsyncRead + Unpin), kind: u8) {
    loop {
        let mut head = [0; 9];
        read.read_exact(&mut head).await.unwrap();
        let preface = PREFACE.starts_with(&head);
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let length = match preface {
            true => PREFACE.len() - head.len(),
            false => usize::try_from(length).unwrap(),
        };
        read.read_exact(&mut vec![0; length]).await.unwrap();
        if !preface && head[3] == kind {
            return;
        }
    }
}

/// What a peer that misbehaves may make an end hold until it is cut off, what the test itself holds included.
const HELD: usize = 1 << 20;
/// The same with small frames that nobody reads, which applications send too.
const HELD_BY_SMALL_FRAMES: usize = 64 << 20;

/// How a peer that misbehaves was stopped.
struct Cut {
    /// After how many of what it says.
    after: u32,
    /// The most that was held meanwhile, in bytes.
    held: usize,
}

/// Says `opening`, waits for a frame of the kind `ready`, then says `next(0)`, `next(1)` and so on, all the while reading,
/// until the other end hangs up. Fails at `most`.
///
/// A server is ready when it has granted its window: what comes earlier is an offence of another kind.
async fn until_cut(
    io: DuplexStream,
    opening: &[u8],
    ready: u8,
    mut next: impl FnMut(u32) -> Vec<u8>,
    most: u32,
) -> Cut {
    let (mut read, mut write) = tokio::io::split(io);
    let peak = Peak::start();
    let greeting = async {
        write.write_all(opening).await.unwrap();
        hear(&mut read, ready).await;
    };
    soon(greeting).await;
    let listening = tokio::spawn(async move {
        let _ = tokio::io::copy(&mut read, &mut tokio::io::sink()).await;
    });
    let speak = async {
        for number in 0..most {
            if write.write_all(&next(number)).await.is_err() {
                return number;
            }
        }
        panic!("{most} were let through");
    };
    let after = soon(speak).await;
    listening.abort();
    let held = peak.bytes();
    Cut { after, held }
}

/// SETTINGS, and a word that the other end's are taken: its windows hold from then on.
fn settings() -> Vec<u8> {
    [frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, ACK, 0, &[])].concat()
}

fn hello() -> Vec<u8> {
    [PREFACE, &settings()].concat()
}

type Holding = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// A handler that accepts and never reads, and how many were started.
fn stalled() -> (Arc<AtomicUsize>, impl Fn(ConnectRequest) -> Holding + Send) {
    let started = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&started);
    let handler = move |request: ConnectRequest| {
        count.fetch_add(1, Ordering::SeqCst);
        let hold: Holding = Box::pin(async move {
            let _stream = request.accept(HeaderMap::new());
            pending::<()>().await;
        });
        hold
    };
    (started, handler)
}

/// CVE-2025-8671: the client makes the server reset its streams, which its own resets would be counted for.
#[tokio::test]
async fn made_you_reset_is_cut_off() {
    type Offence = fn(u32) -> Vec<u8>;
    let offences: [(&str, Offence); 4] = [
        ("a window of nothing", |stream| {
            [open(stream), frame(WINDOW_UPDATE, 0, stream, &[0; 4])].concat()
        }),
        ("a window beyond all", |stream| {
            let most = 0x7fff_ffff_u32.to_be_bytes();
            [open(stream), frame(WINDOW_UPDATE, 0, stream, &most)].concat()
        }),
        ("bytes after the end", |stream| {
            let ended = frame(DATA, END_STREAM, stream, b"x");
            [open(stream), ended, frame(DATA, 0, stream, b"y")].concat()
        }),
        ("a second head", |stream| {
            [open(stream), open(stream)].concat()
        }),
    ];
    for (about, offence) in offences {
        let (started, handler) = stalled();
        let (io, serving) = on_pipe(Config::default(), handler);
        let cut = until_cut(
            io,
            &hello(),
            WINDOW_UPDATE,
            |number| offence(stream(number)),
            200_000,
        )
        .await;
        assert!(cut.held < HELD, "{about}: {} bytes were held", cut.held);
        let end = soon(serving).await.unwrap();
        assert!(end.is_err(), "{about}: {end:?}");
        let started = started.load(Ordering::SeqCst);
        assert!(started < 3_000, "{about}: {started} handlers");
    }
}

#[tokio::test]
async fn frames_that_say_nothing_are_cut_off() {
    let (_, handler) = stalled();
    let (io, serving) = on_pipe(Config::default(), handler);
    let opening = [hello(), open(1)].concat();
    let cut = until_cut(
        io,
        &opening,
        WINDOW_UPDATE,
        |_| frame(DATA, 0, 1, b""),
        200_000,
    )
    .await;
    assert!(cut.held < HELD, "{} bytes were held", cut.held);
    assert!(soon(serving).await.unwrap().is_err());
}

/// Each byte that nobody reads yet costs a frame's bookkeeping: a bound, and a high one, since an application may well
/// write small messages to one that is busy.
#[tokio::test]
async fn a_flood_of_small_frames_is_cut_off_and_a_slow_reader_is_not() {
    let one = frame(DATA, 0, 1, b"x");
    let flood = one.repeat(1_000);
    let (_, handler) = stalled();
    let (io, serving) = on_pipe(Config::default(), handler);
    let opening = [hello(), open(1)].concat();
    let cut = until_cut(io, &opening, WINDOW_UPDATE, |_| flood.clone(), 4_000).await;
    let end = soon(serving).await.unwrap();
    let (thousands, held) = (cut.after, cut.held);
    assert!(
        end.is_err() && thousands >= 100 && held < HELD_BY_SMALL_FRAMES,
        "{thousands} thousand, {held} bytes were held: {end:?}"
    );

    // A hundred thousand messages wait for a reader; another stream of the connection does not notice.
    let stall = |request: ConnectRequest| async move {
        if request.authority().port() == 80 {
            let _stream = request.accept(HeaderMap::new());
            return pending().await;
        }
        echo(request).await;
    };
    let (io, _serving) = on_pipe(Config::default(), stall);
    let mut requests = raw_client(io).await;
    let connect = |port: u16| {
        let uri = format!("10.0.0.1:{port}");
        let request = Request::builder().method(Method::CONNECT).uri(uri);
        request.body(()).unwrap()
    };
    requests = requests.ready().await.unwrap();
    let (_, mut slow) = requests.send_request(connect(80), false).unwrap();
    requests = requests.ready().await.unwrap();
    let (answer, mut quick) = requests.send_request(connect(81), false).unwrap();
    let mut heard = soon(answer).await.unwrap().into_body();
    for _ in 0..100 {
        for _ in 0..1_000 {
            slow.send_data(Bytes::from_static(b"x"), false).unwrap();
        }
        quick.send_data(Bytes::from_static(b"ping"), false).unwrap();
        let back = soon(heard.data()).await.unwrap().unwrap();
        assert_eq!(&back[..], b"ping");
        heard.flow_control().release_capacity(back.len()).unwrap();
    }
}

/// A client that asks and never reads: what it is owed does not grow, and it is dropped when it answers no ping.
#[tokio::test(start_paused = true)]
async fn answers_that_nobody_reads_are_bounded() {
    for (about, question) in [
        ("pings", frame(PING, 0, 0, &[7; 8])),
        ("settings", frame(SETTINGS, 0, 0, &[])),
    ] {
        let (_, handler) = stalled();
        let (mut io, serving) = on_pipe(Config::default(), handler);
        let opening = [hello(), open(1)].concat();
        io.write_all(&opening).await.unwrap();
        let many = question.repeat(1_000);
        let mut taken = 0;
        let speak = async {
            while io.write_all(&many).await.is_ok() {
                taken += many.len();
                assert!(taken < 64 << 20, "{about}: {taken} bytes were taken");
            }
        };
        tokio::time::timeout(Duration::from_secs(3600), speak)
            .await
            .unwrap_or_else(|_| panic!("{about}: neither taken nor cut"));
        assert!(serving.await.unwrap().is_err(), "{about}");
    }
}

/// What a server may do to a client with one open stream whose bytes nobody reads yet.
#[tokio::test]
async fn a_hostile_server_is_cut_off_by_its_client() {
    let ok = frame(HEADERS, END_HEADERS, 1, STATUS_OK);
    let started = frame(HEADERS, 0, 1, STATUS_OK);
    let field = [&b"\x00\x01a\x7f\x81\x07"[..], &[b'b'; 1024]].concat();
    let small_frames = "small frames";
    let cases: [(&str, Vec<u8>, Vec<u8>); 6] = [
        (
            "endless continuations",
            started,
            frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b"),
        ),
        (
            "frames that say nothing",
            ok.clone(),
            frame(DATA, 0, 1, b"").repeat(100),
        ),
        (
            small_frames,
            ok.clone(),
            frame(DATA, 0, 1, b"x").repeat(1_000),
        ),
        (
            "a head without an end",
            Vec::new(),
            frame(HEADERS, 0, 1, &field.repeat(16)),
        ),
        ("streams that the client never opened", ok.clone(), open(99)),
        (
            "pushes",
            ok,
            frame(
                PUSH_PROMISE,
                END_HEADERS,
                1,
                &[&[0, 0, 0, 2][..], b"\x82\x84\x86"].concat(),
            ),
        ),
    ];
    for (about, opening, next) in cases {
        let (near, far) = duplex(1 << 16);
        let peer = testing::peer("b", "server");
        let handshake = Client::handshake(near, peer, &Config::default()).await;
        let (client, driver) = handshake.unwrap();
        let calling = tokio::spawn(async move { client.connect(head(), DEADLINE).await });
        let driving = tokio::spawn(driver);
        let say = |number| match number {
            0 => [&opening[..], &next].concat(),
            _ => next.clone(),
        };
        let cut = until_cut(far, &settings(), HEADERS, say, 1_000_000).await;
        let most = match about == small_frames {
            true => HELD_BY_SMALL_FRAMES,
            false => HELD,
        };
        assert!(cut.held < most, "{about}: {} bytes were held", cut.held);
        soon(driving)
            .await
            .unwrap_or_else(|error| panic!("{about}: {error}"));
        // Accepted or not, whoever holds the stream learns that it is over.
        if let Ok(mut tunnel) = soon(calling).await.unwrap() {
            let end = soon(tunnel.stream.read_to_end(&mut Vec::new())).await;
            assert!(end.is_err(), "{about}: {end:?}");
        }
    }
}
