//! What moves in streams: trailers, gRPC, upgrades, mirrors, clients that go away.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use mesh::l7::{
    route::{Action, HttpRule, Mirror, WeightedBackend},
    served::AppProtocol,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    rig::{Answer, AnyBody, Backend, Client, Rig, full},
    routes::{to, two},
};

/// A body with trailers.
fn with_trailers(data: &'static str, name: &'static str, value: &'static str) -> AnyBody {
    let mut trailers = HeaderMap::new();
    trailers.insert(name, HeaderValue::from_static(value));
    let frames = [
        Ok(Frame::data(Bytes::from_static(data.as_bytes()))),
        Ok(Frame::trailers(trailers)),
    ];
    BodyExt::boxed(StreamBody::new(futures_util::stream::iter(frames)))
}

async fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "it never came true");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let backend = Backend::start(Version::HTTP_2, |request| async move {
        let collected = request.into_body().collect().await.unwrap();
        let got = collected.trailers().and_then(|it| it.get("x-sum")).cloned();
        let mut response = Response::new(with_trailers("data", "x-check", "9"));
        response.headers_mut().insert("x-got-trailer", got.unwrap());
        response
    })
    .await;
    let rig = Rig::new(Version::HTTP_2, &[&backend]).await;
    let mut client = rig.client(Version::HTTP_2).await;
    let request = client.request("POST", "/").header("te", "trailers");
    let request = request.body(with_trailers("body", "x-sum", "7")).unwrap();
    let answer = Answer::of(client.send(request).await).await;
    assert_eq!(answer.header("x-got-trailer"), "7");
    assert_eq!(answer.trailers.unwrap()["x-check"], "9");
}

#[tokio::test]
async fn grpc_errors_of_ours_are_trailers_only() {
    let rig = Rig::new(Version::HTTP_2, &[]).await;
    let mut client = rig.client(Version::HTTP_2).await;
    let request = client
        .request("POST", "/pkg.Service/Method")
        .header("content-type", "application/grpc");
    let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("grpc-status"), "14");
    assert_eq!(answer.header("content-type"), "application/grpc");
}

#[tokio::test]
async fn a_call_ends_at_the_time_that_its_client_gave() {
    let never = Backend::start(Version::HTTP_2, |_| std::future::pending()).await;
    let rig = Rig::new(Version::HTTP_2, &[&never]).await;
    let mut client = rig.client(Version::HTTP_2).await;
    let request = client
        .request("POST", "/pkg.Service/Method")
        .header("content-type", "application/grpc")
        .header("grpc-timeout", "50m");
    let answer = Answer::of(client.send(request.body(full("x")).unwrap()).await).await;
    assert_eq!(answer.header("grpc-status"), "4", "{answer:?}");
}

#[tokio::test]
async fn grpc_web_is_translated_both_ways() {
    let backend = Backend::start(Version::HTTP_2, |request| async move {
        assert_eq!(request.headers()["content-type"], "application/grpc+proto");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(&body[..], b"\0\0\0\0\x02hi");
        let body = with_trailers("\0\0\0\0\x02ho", "grpc-status", "0");
        let mut response = Response::new(body);
        let kind = HeaderValue::from_static("application/grpc+proto");
        response.headers_mut().insert("content-type", kind);
        response
    })
    .await;
    let rig = Rig::new(Version::HTTP_2, &[]).await;
    rig.serve(super::rig::SERVICE, AppProtocol::GrpcWeb, &[&backend]);
    let mut client = rig.client(Version::HTTP_11).await;
    let request = client
        .request("POST", "/pkg.Service/Method")
        .header("content-type", "application/grpc-web+proto");
    let request = request.body(full("\0\0\0\0\x02hi")).unwrap();
    let answer = Answer::of(client.send(request).await).await;
    assert_eq!(answer.header("content-type"), "application/grpc-web+proto");
    let expected = b"\0\0\0\0\x02ho\x80\0\0\0\x10grpc-status: 0\r\n";
    assert_eq!(&answer.body[..], expected);
}

/// A backend that switches and says back what it hears.
async fn switching(version: Version) -> Backend {
    Backend::start(version, move |mut request| async move {
        let asked = match version {
            Version::HTTP_2 => *request.method() == Method::CONNECT,
            _ => request.headers().contains_key("sec-websocket-key"),
        };
        assert!(asked, "{request:?}");
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let Ok(upgraded) = upgrade.await else { return };
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
        let response = Response::builder().header("x-backend", "ws");
        match version {
            Version::HTTP_2 => response.body(full("")).unwrap(),
            _ => response
                .status(101)
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .body(full(""))
                .unwrap(),
        }
    })
    .await
}

#[tokio::test]
async fn websockets_pass_in_every_pair_of_versions() {
    for (from, to) in [
        (Version::HTTP_11, Version::HTTP_11),
        (Version::HTTP_11, Version::HTTP_2),
        (Version::HTTP_2, Version::HTTP_11),
        (Version::HTTP_2, Version::HTTP_2),
    ] {
        let backend = switching(to).await;
        let rig = Rig::new(to, &[&backend]).await;
        let mut client = rig.client(from).await;
        let request = match &client {
            Client::Http1(_) => client
                .request("GET", "/chat")
                .header("connection", "Upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-version", "13")
                .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
                .body(full("")),
            Client::Http2(_) => Request::builder()
                .method("CONNECT")
                .uri("http://echo/chat")
                .extension(hyper::ext::Protocol::from_static("websocket"))
                .body(full("")),
        };
        let mut response = client.send(request.unwrap()).await;
        let expected = if from == Version::HTTP_2 { 200 } else { 101 };
        assert_eq!(response.status(), expected, "{from:?} {to:?}");
        if from == Version::HTTP_11 && to == Version::HTTP_2 {
            let accept = &response.headers()["sec-websocket-accept"];
            assert_eq!(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        }
        let upgraded = hyper::upgrade::on(&mut response).await.unwrap();
        let mut stream = TokioIo::new(upgraded);
        stream.write_all(b"ping").await.unwrap();
        let mut heard = [0; 4];
        stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"ping", "{from:?} {to:?}");
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
    }
}

#[tokio::test]
async fn a_mirror_gets_body_and_shadow_host_and_nobody_waits_for_it() {
    let (rig, v1, _v2) = two().await;
    let (send, mut seen) = tokio::sync::mpsc::channel(4);
    let shadow = Backend::start(Version::HTTP_11, move |request| {
        let send = send.clone();
        async move {
            let host = request.headers()["host"].to_str().unwrap().to_owned();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            send.send((host, body)).await.unwrap();
            std::future::pending().await
        }
    })
    .await;
    rig.serve(
        "demo/shadow.demo.svc.cluster.local",
        AppProtocol::Http,
        &[&shadow],
    );
    let action = Action::Forward(vec![WeightedBackend::new(1, to("v1"))]);
    let mut rule = HttpRule::new(Vec::new(), action);
    rule.mirrors = vec![Mirror {
        backend: to("shadow"),
        per_million: 1_000_000,
        shadow_host: true,
    }];
    rig.route(vec![rule]);
    let mut client = rig.client(Version::HTTP_11).await;
    let request = client.request("POST", "/").body(full("copied")).unwrap();
    let answer = Answer::of(client.send(request).await).await;
    assert_eq!(
        (answer.header("x-backend"), &answer.body[..]),
        ("v1", &b"copied"[..])
    );
    let (host, body) = seen.recv().await.unwrap();
    assert_eq!((host.as_str(), &body[..]), ("echo-shadow", &b"copied"[..]));
    assert_eq!(v1.requests(), 1);
}

/// Tells when it is dropped.
struct Told(tokio::sync::mpsc::Sender<()>);

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

/// Where in an exchange a client goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing was answered yet.
    Waiting,
    /// It has sent a part of its body.
    Uploading,
    /// It has read a part of the answer's.
    Downloading,
    /// Both, as in a call of gRPC that streams both ways.
    Talking,
}

/// One piece, and then nothing for as long as it is kept; `kept` is dropped with it.
fn unending<T: Send + Sync + 'static>(kept: T) -> AnyBody {
    let piece = Ok(Frame::data(Bytes::from_static(b"\0\0\0\0\x01x")));
    let first = futures_util::stream::iter([piece]);
    let never = futures_util::stream::poll_fn(move |_| {
        let _kept = &kept;
        std::task::Poll::Pending
    });
    let pieces = futures_util::StreamExt::chain(first, never);
    BodyExt::boxed(StreamBody::new(pieces))
}

/// A backend that tells by `ended` when it learns that its client has gone, once for each direction that was open.
async fn forsaken(version: Version, stage: Stage, ended: tokio::sync::mpsc::Sender<()>) -> Backend {
    Backend::start(version, move |request| {
        let (told, ended) = (ended.clone(), ended.clone());
        let upload = async move {
            let mut body = request.into_body();
            while let Some(frame) = body.frame().await {
                if frame.is_err() {
                    return ended.try_send(());
                }
            }
            Ok(())
        };
        async move {
            match stage {
                Stage::Waiting => {
                    let _told = Told(told);
                    std::future::pending().await
                }
                Stage::Uploading => {
                    tokio::spawn(upload);
                    std::future::pending().await
                }
                Stage::Downloading => Response::new(unending(Told(told))),
                Stage::Talking => {
                    tokio::spawn(upload);
                    Response::new(unending(Told(told)))
                }
            }
        }
    })
    .await
}

/// Sends a request and goes away at `stage`.
async fn ask_and_go(rig: &Rig, from: Version, stage: Stage, backend: &Backend) {
    let (mut client, connection) = rig.client_that_may_go(from).await;
    let sends = matches!(stage, Stage::Uploading | Stage::Talking);
    let body = if sends { unending(()) } else { full("") };
    let request = client.request("POST", "/pkg.Service/Method");
    let request = match stage {
        Stage::Talking => request.header("content-type", "application/grpc"),
        _ => request,
    };
    let request = request.body(body).unwrap();
    if matches!(stage, Stage::Waiting | Stage::Uploading) {
        let asking = tokio::spawn(async move { client.try_send(request).await.map(drop) });
        until(|| backend.requests() == 1).await;
        asking.abort();
        return;
    }
    let mut response = client.send(request).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.body_mut().frame().await.unwrap().is_ok());
    if stage == Stage::Talking {
        connection.abort();
    }
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_request_at_the_backend() {
    let versions = [Version::HTTP_11, Version::HTTP_2];
    let stages = [Stage::Waiting, Stage::Uploading, Stage::Downloading];
    let pairs = versions.map(|from| versions.map(|to| stages.map(|stage| (from, to, stage))));
    let call = [(Version::HTTP_2, Version::HTTP_2, Stage::Talking)];
    for (from, to, stage) in pairs.into_iter().flatten().flatten().chain(call) {
        let (ended, mut waiting) = tokio::sync::mpsc::channel(2);
        let backend = forsaken(to, stage, ended).await;
        let rig = Rig::new(to, &[&backend]).await;
        ask_and_go(&rig, from, stage, &backend).await;
        let directions = if stage == Stage::Talking { 2 } else { 1 };
        for _ in 0..directions {
            let told = tokio::time::timeout(Duration::from_secs(5), waiting.recv()).await;
            assert_eq!(told, Ok(Some(())), "{from:?} {to:?} {stage:?}");
        }
    }
}

#[tokio::test]
async fn a_slow_reader_holds_the_backend_back() {
    let (sent, counted) = tokio::sync::watch::channel(0_u64);
    let backend = Backend::start(Version::HTTP_11, move |_| {
        let sent = sent.clone();
        async move {
            let pieces = futures_util::stream::unfold(0_u64, move |number| {
                sent.send_replace(number);
                let piece = Frame::data(Bytes::from(vec![0; 16 * 1024]));
                async move { (number < 4096).then_some((Ok(piece), number + 1)) }
            });
            Response::new(BodyExt::boxed(StreamBody::new(Box::pin(pieces))))
        }
    })
    .await;
    let rig = Rig::new(Version::HTTP_11, &[&backend]).await;
    let mut client = rig.client(Version::HTTP_2).await;
    let request = client.request("GET", "/").body(full("")).unwrap();
    let response = client.send(request).await;
    // Nobody reads: all windows and buffers fill, and then nothing moves any more.
    let mut before = u64::MAX;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = *counted.borrow();
        if now == before {
            break;
        }
        before = now;
    }
    let held = *counted.borrow() * 16 * 1024;
    assert!(held < 16 * 1024 * 1024, "{held} bytes are somewhere");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body.len(), 4096 * 16 * 1024);
}

/// The backend answers only once the client has its hints.
#[tokio::test]
async fn early_hints_pass_before_the_answer() {
    let told = Arc::new(tokio::sync::Notify::new());
    let heard = Arc::clone(&told);
    let backend = Backend::raw(move |mut stream| {
        let heard = Arc::clone(&heard);
        async move {
            let mut head = [0; 1024];
            let _ = stream.read(&mut head).await;
            let hints =
                b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\nconnection: x\r\nx: y\r\n\r\n";
            stream.write_all(hints).await.unwrap();
            heard.notified().await;
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            stream.write_all(answer).await.unwrap();
            let _ = stream.read(&mut head).await;
        }
    })
    .await;
    let rig = Rig::new(Version::HTTP_11, &[&backend]).await;
    let mut client = rig.dial(Version::HTTP_11);
    let request = b"GET / HTTP/1.1\r\nhost: echo\r\n\r\n";
    client.write_all(request).await.unwrap();
    let hints = heard_until(&mut client, b"\r\n\r\n").await;
    assert_eq!(hints, "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n");
    told.notify_one();
    let answer = heard_until(&mut client, b"ok").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

/// What comes until `end`.
async fn heard_until(stream: &mut tokio::io::DuplexStream, end: &[u8]) -> String {
    let mut got = Vec::new();
    while !got.ends_with(end) {
        got.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(got).unwrap()
}
