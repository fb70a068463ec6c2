use std::net::SocketAddr;

use axum::routing::get;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);
/// Longer than any test lasts.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// Where one page is served until the trigger goes.
async fn serving() -> (SocketAddr, drain::Trigger) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/", get(|| async { "here" }));
    let (trigger, drain) = drain::channel();
    tokio::spawn(serve_patiently(listener, router, drain, FOR_EVER));
    (address, trigger)
}

#[tokio::test]
async fn connections_on_which_nothing_is_asked_keep_nobody_out() {
    let (address, _trigger) = serving().await;
    let mut held = Vec::new();
    for number in 0..2 * CONNECTIONS {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Every other one begins.
        let header = if number % 2 == 0 { "GET / HT" } else { "" };
        stream.write_all(header.as_bytes()).await.unwrap();
        held.push(stream);
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    let read = timeout(DEADLINE, stream.read_to_string(&mut answer)).await;
    read.expect("answered within the deadline").unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_connection_is_asked_more_than_once() {
    let (address, _trigger) = serving().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    for _ in 0..3 {
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"here") {
            let read = timeout(DEADLINE, stream.read_buf(&mut answer)).await;
            assert!(read.expect("answered within the deadline").unwrap() > 0);
        }
    }
}
