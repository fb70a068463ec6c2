//! HTTP/2 that no honest client sends, frame by frame (RFC 9113 5, 8).

use http::{Response, Version};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::rig::{Backend, Rig, full};
use crate::testing::soon;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    [&head, body].concat()
}

/// Fields as literals that enter no table (RFC 7541 6.2.2), each shorter than 127 bytes.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let text = |it: &str| [&[u8::try_from(it.len()).unwrap()], it.as_bytes()].concat();
    let field = |(name, value): &(&str, &str)| [vec![0], text(name), text(value)].concat();
    fields.iter().flat_map(field).collect()
}

const GET: [(&str, &str); 4] = [
    (":method", "GET"),
    (":scheme", "http"),
    (":path", "/"),
    (":authority", "echo"),
];

/// A request without a body.
fn request(stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &block(fields))
}

/// A connection after its preface.
async fn opened(rig: &Rig) -> DuplexStream {
    let mut stream = rig.dial(Version::HTTP_2);
    let preface = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &frame(SETTINGS, 0, 0, &[])[..],
    ];
    stream.write_all(&preface.concat()).await.unwrap();
    stream
}

/// The next frame: its kind, its stream and what it holds.
async fn next(stream: &mut DuplexStream) -> Option<(u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let [a, b, c, kind, _, id @ ..] = head;
    let mut body = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    stream.read_exact(&mut body).await.ok()?;
    Some((kind, u32::from_be_bytes(id), body))
}

/// What became of the request on `id`, or of the connection.
async fn outcome(stream: &mut DuplexStream, id: u32) -> String {
    while let Some((kind, of, body)) = next(stream).await {
        match (kind, body.as_slice()) {
            // The codes of `:status` that the static table has (RFC 7541 A).
            (HEADERS, [0x88, ..]) if of == id => return "200".to_owned(),
            (HEADERS, [0x8c, ..]) if of == id => return "400".to_owned(),
            (HEADERS, _) if of == id => return "another status".to_owned(),
            (RST_STREAM, [.., code]) if of == id => return format!("reset {code}"),
            (GOAWAY, [_, _, _, _, _, _, _, code, ..]) => return format!("goaway {code}"),
            _ => {}
        }
    }
    "closed".to_owned()
}

/// What a client is told that sends these frames.
async fn told(rig: &Rig, frames: &[u8]) -> String {
    let mut stream = opened(rig).await;
    stream.write_all(frames).await.unwrap();
    outcome(&mut stream, 1).await
}

fn with(field: (&'static str, &'static str)) -> Vec<(&'static str, &'static str)> {
    [&GET[..], &[field]].concat()
}

fn without(name: &str) -> Vec<(&'static str, &'static str)> {
    GET.into_iter().filter(|it| it.0 != name).collect()
}

fn instead(field: (&'static str, &'static str)) -> Vec<(&'static str, &'static str)> {
    let change = |it: (&'static str, &'static str)| if it.0 == field.0 { field } else { it };
    GET.into_iter().map(change).collect()
}

#[tokio::test]
async fn http2_that_could_be_read_in_two_ways_is_refused() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    assert_eq!(told(&rig, &request(1, &GET)).await, "200");
    assert_eq!(
        told(&rig, &request(1, &with(("te", "trailers")))).await,
        "200"
    );
    let rows = [
        // Names and values (RFC 9113 8.2.1).
        (with(("X-Upper", "1")), "goaway 1"),
        (with(("x y", "1")), "goaway 1"),
        (with(("x", "a\r\nsmuggled: 1")), "goaway 1"),
        (with(("x", "a\0b")), "goaway 1"),
        (with(("", "1")), "goaway 1"),
        // What belongs to one connection of HTTP/1.1 (8.2.2).
        (with(("connection", "close")), "reset 1"),
        (with(("keep-alive", "1")), "reset 1"),
        (with(("proxy-connection", "close")), "reset 1"),
        (with(("transfer-encoding", "chunked")), "reset 1"),
        (with(("upgrade", "h2c")), "reset 1"),
        (with(("te", "gzip")), "reset 1"),
        // Pseudo headers (8.3).
        (with((":path", "/other")), "reset 1"),
        (with((":status", "200")), "reset 1"),
        (with((":other", "1")), "goaway 1"),
        (without(":method"), "reset 1"),
        (without(":path"), "reset 1"),
        (without(":scheme"), "reset 1"),
        (without(":authority"), "400"),
        (instead((":path", "")), "reset 1"),
        (instead((":path", "a")), "reset 1"),
        (instead((":path", "/a b")), "reset 1"),
        (instead((":path", "/\r\nx: 1")), "reset 1"),
        (instead((":path", "/../a")), "400"),
        (instead((":path", "/%00")), "400"),
        (instead((":method", "G T")), "goaway 1"),
        (instead((":method", "TRACE")), "400"),
        (instead((":authority", "me@echo")), "400"),
        (instead((":authority", "a/b")), "reset 1"),
        ([&[("x", "1")], &GET[..]].concat(), "reset 1"),
        // Hosts (8.3.1).
        (with(("host", "other")), "400"),
        // Lengths (8.1.1): a request that ends with its head has none.
        (with(("content-length", "3")), "reset 1"),
        (with(("content-length", "+0")), "reset 1"),
    ];
    let mut others = Vec::new();
    for (fields, expected) in rows {
        let told = told(&rig, &request(1, &fields)).await;
        if told != expected {
            others.push((fields, told));
        }
    }
    assert!(others.is_empty(), "{others:#?}");
    assert_eq!(echo.requests(), 2, "none of them got through");
}

#[tokio::test]
async fn a_body_of_http2_has_the_length_that_was_told() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    let head = block(
        &[
            &instead((":method", "POST"))[..],
            &[("content-length", "3")],
        ]
        .concat(),
    );
    for (body, expected) in [("abc", "200"), ("ab", "reset 1"), ("abcd", "reset 1")] {
        let frames = [
            frame(HEADERS, END_HEADERS, 1, &head),
            frame(DATA, END_STREAM, 1, body.as_bytes()),
        ];
        assert_eq!(told(&rig, &frames.concat()).await, expected, "{body}");
    }
}

/// CVE-2025-8671: it is we who reset each stream, for what the client did wrong.
#[tokio::test]
async fn a_client_that_makes_us_reset_its_streams_is_cut_off() {
    let rig = Rig::new(Version::HTTP_11, &[]).await;
    let mut stream = opened(&rig).await;
    for id in (1..2_000).step_by(2) {
        // A window beyond what there can be (RFC 9113 6.9.1).
        let too_wide = frame(WINDOW_UPDATE, 0, id, &[0x7f, 0xff, 0xff, 0xff]);
        let frames = [frame(HEADERS, END_HEADERS, id, &block(&GET)), too_wide];
        // It may be cut off by now.
        if stream.write_all(&frames.concat()).await.is_err() {
            break;
        }
    }
    assert_eq!(outcome(&mut stream, 0).await, "goaway 11");
}

#[tokio::test]
async fn a_connection_has_a_hundred_streams_at_once() {
    let never = Backend::start(Version::HTTP_11, |_| std::future::pending()).await;
    let rig = Rig::new(Version::HTTP_11, &[&never]).await;
    let mut stream = opened(&rig).await;
    for id in (1..203).step_by(2) {
        stream.write_all(&request(id, &GET)).await.unwrap();
    }
    assert_eq!(outcome(&mut stream, 201).await, "reset 7");
}

/// One entry of the table, told again and again: 50 bytes that stand for 200,000.
#[tokio::test]
async fn a_head_that_is_small_only_on_the_wire_is_refused() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    // A literal that enters the table (RFC 7541 6.2.1), whose value has 3,900 = 127 + 3,773 bytes.
    let entry = [&[0x40, 1, b'x', 127, 0xbd, 0x1d][..], &[b'a'; 3_900]].concat();
    let head = [block(&GET), entry, vec![0x80 | 62; 50]].concat();
    let outcome = told(&rig, &frame(HEADERS, END_HEADERS | END_STREAM, 1, &head)).await;
    assert_eq!(outcome, "another status");
    assert_eq!(echo.requests(), 0);
}

/// Any code: the end of the body is missing, also where the client says that there was no error.
#[tokio::test]
async fn a_stream_that_is_reset_ends_at_the_backend_and_never_looks_complete() {
    const CANCEL: u8 = 8;
    const NO_ERROR: u8 = 0;
    for version in [Version::HTTP_11, Version::HTTP_2] {
        for code in [CANCEL, NO_ERROR] {
            let (ended, mut told) = tokio::sync::mpsc::channel(1);
            let backend = Backend::start(version, move |request| {
                let ended = ended.clone();
                async move {
                    let body = request.into_body().collect().await;
                    ended.send(body.is_ok()).await.unwrap();
                    Response::new(full(""))
                }
            })
            .await;
            let rig = Rig::new(version, &[&backend]).await;
            let mut stream = opened(&rig).await;
            let frames = [
                frame(
                    HEADERS,
                    END_HEADERS,
                    1,
                    &block(&instead((":method", "POST"))),
                ),
                frame(DATA, 0, 1, b"a part"),
            ];
            stream.write_all(&frames.concat()).await.unwrap();
            soon(async {
                while backend.requests() == 0 {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            let reset = frame(RST_STREAM, 0, 1, &[0, 0, 0, code]);
            stream.write_all(&reset).await.unwrap();
            let whole = soon(told.recv()).await;
            assert_ne!(whole, Some(true), "{version:?}, code {code}");
        }
    }
}

/// A server that resets its answer before its end, whatever it gives as its reason.
#[tokio::test]
async fn an_answer_that_is_reset_never_looks_complete() {
    let backend = Backend::raw(|mut stream| async move {
        let mut seen = [0; 1024];
        let _ = stream.read(&mut seen).await;
        let frames = [
            frame(SETTINGS, 0, 0, &[]),
            frame(HEADERS, END_HEADERS, 1, &[0x88]),
            frame(DATA, 0, 1, b"a part"),
            frame(RST_STREAM, 0, 1, &[0; 4]),
        ];
        let _ = stream.write_all(&frames.concat()).await;
        while stream.read(&mut seen).await.is_ok_and(|it| it > 0) {}
    })
    .await;
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let rig = Rig::new(Version::HTTP_2, &[&backend]).await;
        let mut client = rig.client(version).await;
        let request = client.request("GET", "/").body(full("")).unwrap();
        // HTTP/1.1 may be closed before the head was written.
        let Ok(response) = client.try_send(request).await else {
            continue;
        };
        let body = response.into_body().collect().await;
        assert!(body.is_err(), "{version:?}");
    }
}
