//! Input that no honest client sends, byte for byte.

use std::time::Duration;

use http::Version;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::rig::{Backend, Rig};

/// What a client that sends `bytes` is told: the statuses of all answers until the connection ends.
async fn told(rig: &Rig, bytes: &[u8]) -> Vec<String> {
    let mut stream = rig.dial(Version::HTTP_11);
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let heads = text.split("HTTP/1.").skip(1);
    let statuses = heads.filter_map(|it| it.get(1..)?.strip_prefix(' '));
    statuses.map(|it| it[..3].to_owned()).collect()
}

#[tokio::test]
async fn requests_that_could_be_read_in_two_ways_are_refused() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    let long = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(17 * 1024));
    let many = format!(
        "GET / HTTP/1.1\r\nhost: a\r\n{}\r\n",
        (0..101)
            .map(|it| format!("x{it}: 1\r\n"))
            .collect::<String>()
    );
    let wide = format!(
        "GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n",
        "a".repeat(62 * 1024)
    );
    for (request, expected) in [
        // Two lengths, or a length that is not one (RFC 9112 6.3).
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "400",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
            "400",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
            "400",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
            "400",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\nabc",
            "400",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3, 3\r\n\r\nabc",
            "400",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x3\r\n\r\nabc",
            "400",
        ),
        // Codings other than chunked, once, at the end.
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "501",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "501",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n",
            "400",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
            "400",
        ),
        // Bytes that no header holds (RFC 9112 2.2, 5.1, 5.2).
        ("GET / HTTP/1.1\r\nhost: a\r\nx : 1\r\n\r\n", "400"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n folded\r\n\r\n",
            "400",
        ),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: 1\x002\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: 1\r2\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx\x0b: 1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\nhost: a\n\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\nx: 1\r\n\r\n", "400"),
        // Hosts (RFC 9112 3.2).
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: me@a\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost:\r\n\r\n", "400"),
        ("GET http://me@a/ HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        // Targets and methods.
        ("GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("GET a HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("GET /../.. HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("GET * HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", "400"),
        ("TRACE / HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("GET / HTTP/1.0\r\nhost: a\r\n\r\n", "426"),
        ("GET / HTTP/1.1\r\nhost: a\r\nexpect: more\r\n\r\n", "417"),
        // Too much.
        (&long, "414"),
        (&many, "431"),
        (&wide, "431"),
    ] {
        let shown: String = request.chars().take(90).collect();
        assert_eq!(
            told(&rig, request.as_bytes()).await,
            [expected],
            "{shown:?}"
        );
    }
    assert_eq!(echo.requests(), 0, "none of them got through");
}

#[tokio::test]
async fn nothing_is_read_after_a_request_whose_end_is_in_doubt() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    for coding in ["gzip, chunked", "chunked\r\ntransfer-encoding: chunked"] {
        let doubtful =
            format!("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: {coding}\r\n\r\n0\r\n\r\n");
        let hidden = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
        let told = told(&rig, [&doubtful, hidden].concat().as_bytes()).await;
        assert_eq!(told, ["501"], "{coding:?}");
    }
    assert_eq!(echo.requests(), 0, "what was behind it did not get through");
}

#[tokio::test]
async fn what_chunks_say_beside_their_bytes_is_bounded() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let extension = |bytes: usize| format!("1;x={}\r\na\r\n", "a".repeat(bytes));
    let trailers = |bytes: usize| format!("0\r\nx: {}\r\n\r\n", "a".repeat(bytes));
    for (about, body) in [
        ("a long extension", extension(17 * 1024)),
        ("many extensions", extension(1024).repeat(17)),
        ("long trailers", trailers(61 * 1024)),
        ("no number", "x\r\n".to_owned()),
        ("a signed number", "+1\r\na\r\n0\r\n\r\n".to_owned()),
        (
            "too large a number",
            "fffffffffffffffff\r\na\r\n".to_owned(),
        ),
        ("no end of a chunk", "1\r\nab\r\n0\r\n\r\n".to_owned()),
    ] {
        let hidden = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
        let told = told(&rig, [head, &body, hidden].concat().as_bytes()).await;
        let refused = told.iter().all(|it| it.starts_with(['4', '5']));
        assert!(refused && told.len() <= 1, "{about}: {told:?}");
    }
    let fine = [head, &extension(1024), &trailers(1024)].concat();
    let last = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    assert_eq!(
        told(&rig, [&fine, last].concat().as_bytes()).await,
        ["200"; 2]
    );
}

#[tokio::test]
async fn odd_but_honest_requests_pass() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    for request in [
        "GET / HTTP/1.1\r\nHOST: a\r\nx:1\r\ny:   2  \r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET http://a/b HTTP/1.1\r\nhost: other\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\nabc",
        "GET /a#fragment HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        let last = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let told = told(&rig, [request, last].concat().as_bytes()).await;
        let fine = told.iter().filter(|it| *it == "200").count();
        let asked = request.matches("HTTP/1.1").count() + 1;
        assert_eq!(fine, asked, "{request:?}: {told:?}");
    }
}

#[tokio::test]
async fn a_client_cannot_have_what_a_proxy_added_taken_away() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    let mut client = rig.client(Version::HTTP_11).await;
    let request = client
        .request("GET", "/")
        .header("connection", "x-private, authorization, x-forwarded-for")
        .header("x-private", "1")
        .header("authorization", "kept")
        .header("x-forwarded-for", "10.0.0.1")
        .header("x-forwarded-client-cert", "URI=spiffe://evil")
        .header("proxy-authorization", "secret");
    let request = request.body(super::rig::full("")).unwrap();
    let answer = super::rig::Answer::of(client.send(request).await).await;
    for (name, expected) in [
        ("x-private", ""),
        ("authorization", "kept"),
        ("x-forwarded-for", "10.0.0.1"),
        ("x-forwarded-client-cert", ""),
        ("proxy-authorization", ""),
        ("connection", ""),
    ] {
        let got = answer.header(&format!("x-got-{name}")).to_owned();
        assert_eq!(got, expected, "{name}");
    }
}

/// Paused time passes while nothing else is to be done.
#[tokio::test(start_paused = true)]
async fn a_head_that_trickles_in_is_given_up() {
    let rig = Rig::new(Version::HTTP_11, &[]).await;
    let (mut read, mut write) = tokio::io::split(rig.dial(Version::HTTP_11));
    let trickle = async {
        write
            .write_all(b"GET / HTTP/1.1\r\nhost: echo\r\nx: ")
            .await?;
        for _ in 0..1000 {
            tokio::time::sleep(Duration::from_secs(10)).await;
            write.write_all(b"a").await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let mut answer = Vec::new();
    let closed = async {
        // A reset is an end, too.
        let _ = read.read_to_end(&mut answer).await;
    };
    tokio::select! {
        trickled = trickle => assert!(trickled.is_err(), "still listened to"),
        () = closed => {}
    }
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
}
