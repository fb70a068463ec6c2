//! What an application has written before its tunnel is answered.

use std::future::pending;

use h2::{Reason, RecvStream, server::SendResponse};
use http::Response;

use super::*;
use crate::{
    copy::{self, Counters, bidirectional},
    hbone::{ahead::MOST, client::Client},
    testing::tcp_pair,
};

type Peer = h2::server::Connection<DuplexStream, Bytes>;

/// A client without TLS below it, and its peer, whose every word the test says.
struct Ends {
    client: Client,
    peer: Peer,
}

async fn ends(config: &Config) -> Ends {
    let (near, far) = duplex(1 << 20);
    let peer = testing::peer("b", "server");
    let (client, driver) = Client::handshake(near, peer, config).await.unwrap();
    tokio::spawn(driver);
    let peer = soon(h2::server::handshake(far)).await.unwrap();
    Ends { client, peer }
}

/// An application that has written `text`, and the other end of its connection.
async fn written(text: &[u8]) -> (TcpStream, TcpStream) {
    let (mut application, captured) = tcp_pair().await;
    application.write_all(text).await.unwrap();
    soon(captured.readable()).await.unwrap();
    (application, captured)
}

/// A CONNECT for `captured`, under way.
fn connect(client: &Client, captured: TcpStream) -> JoinHandle<(Outcome, TcpStream)> {
    let client = client.clone();
    tokio::spawn(async move {
        let guard = client.state().open();
        let connecting = client.connect_counted(head(), Some(&captured), DEADLINE, guard);
        (connecting.await, captured)
    })
}

type Outcome = Result<Tunnel, ConnectError>;

async fn asked(peer: &mut Peer) -> (RecvStream, SendResponse<Bytes>) {
    let (request, answer) = soon(peer.accept()).await.unwrap().unwrap();
    (request.into_body(), answer)
}

/// The next bytes of a request, for which its connection has to be moved.
async fn next(peer: &mut Peer, body: &mut RecvStream) -> Bytes {
    let data = async {
        tokio::select! {
            data = body.data() => data.unwrap().unwrap(),
            _ = peer.accept() => panic!("the connection ended"),
        }
    };
    soon(data).await
}

/// All that is left of a request.
async fn rest(peer: &mut Peer, body: &mut RecvStream) -> Vec<u8> {
    let mut rest = Vec::new();
    while let Some(data) = tokio::select! {
        data = body.data() => data,
        _ = peer.accept() => panic!("the connection ended"),
    } {
        let data = data.unwrap();
        let _ = body.flow_control().release_capacity(data.len());
        rest.extend_from_slice(&data);
    }
    rest
}

fn answer(answer: &mut SendResponse<Bytes>, status: StatusCode) -> h2::SendStream<Bytes> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    answer.send_response(response, false).unwrap()
}

/// What `captured` still holds, once the application has ended its half.
async fn left_in(mut application: TcpStream, mut captured: TcpStream) -> Vec<u8> {
    application.shutdown().await.unwrap();
    let mut left = Vec::new();
    soon(captured.read_to_end(&mut left)).await.unwrap();
    left
}

#[tokio::test]
async fn it_arrives_before_the_answer_and_once() {
    let Ends { client, mut peer } = ends(&Config::default()).await;
    let (mut application, captured) = written(b"first").await;
    let connecting = connect(&client, captured);
    let (mut body, mut response) = asked(&mut peer).await;
    assert_eq!(next(&mut peer, &mut body).await, "first");

    let _send = answer(&mut response, StatusCode::OK);
    let serving = tokio::spawn(async move { rest(&mut peer, &mut body).await });
    let (tunnel, captured) = soon(connecting).await.unwrap();
    application.write_all(b", second").await.unwrap();
    let counters = Arc::new(Counters::default());
    let of_copy = counters.clone();
    tokio::spawn(async move {
        bidirectional(captured, tunnel.unwrap().stream, &of_copy, pending()).await
    });
    until(|| counters.received() == 13).await;
    application.write_all(b", third").await.unwrap();
    application.shutdown().await.unwrap();
    assert_eq!(soon(serving).await.unwrap(), b", second, third");
    assert_eq!(counters.received(), 20);
}

#[tokio::test]
async fn what_is_longer_than_may_go_ahead_follows_in_its_place() {
    let Ends { client, mut peer } = ends(&Config::default()).await;
    let text: Vec<u8> = (0..50_000u32).flat_map(u32::to_be_bytes).collect();
    let (mut application, captured) = written(&text[..10_000]).await;
    let connecting = connect(&client, captured);
    let (mut body, mut response) = asked(&mut peer).await;
    let mut told = next(&mut peer, &mut body).await.to_vec();
    assert_eq!(told, text[..MOST]);

    let _send = answer(&mut response, StatusCode::OK);
    let writing = async move {
        application.write_all(&text[10_000..]).await.unwrap();
        application.shutdown().await.unwrap();
        text
    };
    let writing = tokio::spawn(writing);
    let reading = async {
        told.extend(rest(&mut peer, &mut body).await);
        told
    };
    let copying = async {
        let (tunnel, captured) = connecting.await.unwrap();
        let counters = Counters::default();
        bidirectional(captured, tunnel.unwrap().stream, &counters, pending()).await
    };
    let told = soon(async {
        tokio::select! {
            told = reading => told,
            end = copying => panic!("{end:?}"),
        }
    })
    .await;
    assert_eq!(told, writing.await.unwrap());
}

#[tokio::test]
async fn a_refusal_leaves_it_to_another_endpoint() {
    let Ends { client, mut peer } = ends(&Config::default()).await;
    let (application, captured) = written(b"hello").await;
    let connecting = connect(&client, captured);
    let (mut body, mut response) = asked(&mut peer).await;
    assert_eq!(next(&mut peer, &mut body).await, "hello");
    answer(&mut response, StatusCode::SERVICE_UNAVAILABLE);
    let driving = tokio::spawn(async move { peer.accept().await.is_none() });
    let (outcome, captured) = soon(connecting).await.unwrap();
    let error = outcome.unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error:?}");
    assert!(!error.may_have_delivered());
    assert_eq!(left_in(application, captured).await, b"hello");
    driving.abort();
}

#[tokio::test]
async fn a_peer_that_breaks_off_may_have_passed_it_on_unless_it_says_not() {
    for (text, reason, expected) in [
        ("hello", Reason::CANCEL, true),
        ("hello", Reason::REFUSED_STREAM, false),
        ("", Reason::CANCEL, false),
    ] {
        let Ends { client, mut peer } = ends(&Config::default()).await;
        let (_application, captured) = match text.is_empty() {
            true => tcp_pair().await,
            false => written(text.as_bytes()).await,
        };
        let connecting = connect(&client, captured);
        let (_body, mut response) = asked(&mut peer).await;
        response.send_reset(reason);
        let driving = tokio::spawn(async move { peer.accept().await.is_none() });
        let error = soon(connecting).await.unwrap().0.unwrap_err();
        assert_eq!(error.may_have_delivered(), expected, "{text:?} {reason}");
        driving.abort();
    }
}

#[tokio::test]
async fn an_application_that_is_gone_is_not_connected_for() {
    let Ends { client, mut peer } = ends(&Config::default()).await;
    let (application, captured) = tcp_pair().await;
    socket2::SockRef::from(&application)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(application);
    soon(captured.ready(tokio::io::Interest::ERROR))
        .await
        .unwrap();
    let connecting = connect(&client, captured);
    let outcome = soon(async {
        tokio::select! {
            outcome = connecting => outcome.unwrap().0,
            _ = peer.accept() => panic!("it was connected for"),
        }
    });
    let error = outcome.await.unwrap_err();
    assert!(matches!(error, ConnectError::Application(_)), "{error:?}");
    assert_eq!(error.end_reason(), EndReason::SourceReset);
}

#[tokio::test]
async fn nothing_goes_ahead_while_the_peer_owes_an_answer() {
    let config = Config {
        ping_after: Duration::from_millis(20),
        ping_timeout: DEADLINE,
        ..Config::default()
    };
    let Ends { client, mut peer } = ends(&config).await;
    // The peer does not see the ping, as nobody moves it.
    until(|| client.state().is_in_doubt()).await;
    let (application, captured) = written(b"hello").await;
    let connecting = connect(&client, captured);
    let (mut body, mut response) = asked(&mut peer).await;
    answer(&mut response, StatusCode::OK);
    let driving = tokio::spawn(async move {
        let _ = peer.accept().await;
    });
    let (outcome, captured) = soon(connecting).await.unwrap();
    outcome.unwrap();
    assert!(body.data().await.is_none_or(|data| data.is_err()));
    assert_eq!(left_in(application, captured).await, b"hello");
    until(|| !client.state().is_in_doubt()).await;
    driving.abort();
}

/// What a server refuses it never reads, and must not owe its room to the client for good.
#[tokio::test]
async fn what_is_refused_with_it_keeps_no_room_of_the_connection() {
    let config = Config {
        stream_window_bytes: 65_535,
        connection_window_bytes: 65_535,
        max_connection_window_bytes: 65_535,
        ..Config::default()
    };
    let mesh = Mesh::new();
    let handler = |request: ConnectRequest| async move {
        match request.authority().port() {
            81 => request.refuse(StatusCode::UNAUTHORIZED),
            _ => echo(request).await,
        }
    };
    let server = serve_on_loopback(&mesh.server, config, handler).await;
    let pool = pool(PoolConfig::default());
    let target = mesh.target(server.address);
    let refused = ConnectHead {
        authority: "127.0.0.1:81".parse().unwrap(),
        headers: HeaderMap::new(),
    };
    let (_application, captured) = written(&[1; 4000]).await;
    for _ in 0..100 {
        let connecting = pool.connect_for(&target, refused.clone(), Some(&captured));
        let error = soon(connecting).await.unwrap_err();
        assert!(matches!(error, ConnectError::Refused { .. }), "{error:?}");
    }
    let (mut application, captured) = written(&[2; 4000]).await;
    let tunnel = soon(pool.connect_for(&target, head(), Some(&captured))).await;
    let copying = tokio::spawn(async move {
        let counters = Counters::default();
        copy::bidirectional(captured, tunnel.unwrap().stream, &counters, pending()).await
    });
    let mut back = vec![0; 4000];
    soon(application.read_exact(&mut back)).await.unwrap();
    assert_eq!(back, [2; 4000]);
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
    copying.abort();
}
