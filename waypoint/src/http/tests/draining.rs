//! How connections end when the waypoint does. Answers are our own, so that no socket makes the paused clock run.

use std::time::Duration;

use http::Version;
use net::drain::{Mode, Trigger};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    time::{Instant, sleep},
};

use super::rig::Rig;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: echo\r\n\r\n";

/// A client of HTTP/1.1 that was answered once, and what begins the drain.
async fn client() -> (DuplexStream, Trigger) {
    let rig = Rig::new(Version::HTTP_11, &[]).await;
    let (mut client, trigger) = rig.dial_until(Version::HTTP_11);
    let head = ask(&mut client).await;
    assert!(!head.contains("connection: close"), "{head}");
    (client, trigger)
}

/// Sends a request; the head of its response. Fails where the connection ends before.
async fn ask(client: &mut DuplexStream) -> String {
    client.write_all(GET).await.expect("it is open");
    let mut read = Vec::new();
    while !read.windows(4).any(|four| four == b"\r\n\r\n") {
        let bytes = client.read_buf(&mut read).await.expect("it is open");
        assert!(
            bytes > 0,
            "it was closed: {}",
            String::from_utf8_lossy(&read)
        );
    }
    String::from_utf8_lossy(&read).into_owned()
}

fn graceful() -> Mode {
    Mode::graceful(Duration::from_secs(24))
}

#[tokio::test(start_paused = true)]
async fn a_request_on_its_way_when_the_drain_begins_is_answered_and_is_the_last() {
    let (mut client, trigger) = client().await;
    trigger.start(graceful());
    // Sent before the client could know; it arrives when we have long heard of the drain.
    sleep(Duration::from_secs(1)).await;
    let head = ask(&mut client).await;
    assert!(head.contains("connection: close"), "{head}");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.expect("a clean end");
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_only_when_it_was_quiet_for_long() {
    let (mut client, trigger) = client().await;
    sleep(Duration::from_secs(100)).await;
    trigger.start(graceful());
    let began = Instant::now();
    assert_eq!(client.read(&mut [0]).await.expect("a clean end"), 0);
    // However long it was idle before: a client that polls gets its turn.
    let waited = began.elapsed();
    assert!((5..10).contains(&waited.as_secs()), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_never_idle_is_told_to_come_again_when_it_is_old() {
    let (mut client, _trigger) = client().await;
    let began = Instant::now();
    let mut head = ask(&mut client).await;
    while !head.contains("connection: close") {
        assert!(began.elapsed() < Duration::from_secs(40 * 60), "it is old");
        sleep(Duration::from_secs(60)).await;
        head = ask(&mut client).await;
    }
    // Half an hour, and a fifth of it either way.
    let age = began.elapsed().as_secs() / 60;
    assert!((23..=37).contains(&age), "{age} minutes");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.expect("a clean end");
}
