use std::{
    future::pending,
    sync::atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};

use super::*;
use crate::{
    drain::{Completion, Mode},
    fixture::SOON,
};

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

async fn echo(mut stream: TcpStream, _peer: SocketAddr) {
    let mut byte = [0];
    while matches!(stream.read(&mut byte).await, Ok(1)) {
        let _ = stream.write_all(&byte).await;
    }
}

async fn ping(stream: &mut TcpStream) {
    stream.write_all(b"x").await.expect("open");
    let mut byte = [0];
    let read = timeout(SOON, stream.read_exact(&mut byte)).await;
    read.expect("soon").expect("open");
}

#[tokio::test]
async fn a_drain_closes_the_listener_and_lets_connections_finish() {
    let (listener, address) = listen().await;
    let (trigger, watch) = drain::channel();
    tokio::spawn(serve(listener, Options::named("test"), watch, echo));
    let mut open = TcpStream::connect(address).await.expect("listening");
    ping(&mut open).await;
    trigger.start(Mode::graceful(SOON));
    let refused = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, refused).await.expect("the listener closes");
    ping(&mut open).await;
    drop(open);
    let ended = trigger.drain(Mode::graceful(SOON)).await;
    assert_eq!(ended, Completion::Finished);
}

#[tokio::test]
async fn a_forced_drain_drops_the_connections() {
    let (listener, address) = listen().await;
    let (trigger, watch) = drain::channel();
    tokio::spawn(serve(listener, Options::named("test"), watch, echo));
    let mut open = TcpStream::connect(address).await.expect("listening");
    ping(&mut open).await;
    assert_eq!(trigger.drain(Mode::Immediate).await, Completion::Forced);
    let mut byte = [0];
    let read = timeout(SOON, open.read(&mut byte)).await.expect("soon");
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

#[tokio::test]
async fn a_panicking_handler_costs_its_connection_only() {
    let (listener, address) = listen().await;
    let (_trigger, watch) = drain::channel();
    let seen = Arc::new(AtomicUsize::new(0));
    let handler = move |stream, peer| {
        let first = seen.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            assert!(!first, "on purpose");
            echo(stream, peer).await;
        }
    };
    tokio::spawn(serve(listener, Options::named("test"), watch, handler));
    drop(TcpStream::connect(address).await.expect("listening"));
    let mut second = TcpStream::connect(address).await.expect("listening");
    ping(&mut second).await;
}

#[tokio::test]
async fn beyond_the_limit_connections_wait_for_their_turn() {
    let (listener, address) = listen().await;
    let (_trigger, watch) = drain::channel();
    let (started, mut starts) = mpsc::channel(8);
    let handler = move |stream: TcpStream, _| {
        let started = started.clone();
        async move {
            let _ = started.send(()).await;
            let mut byte = [0];
            let mut stream = stream;
            let _ = stream.read(&mut byte).await;
        }
    };
    let options = Options::named("test").limited_to(1);
    tokio::spawn(serve(listener, options, watch, handler));
    let first = TcpStream::connect(address).await.expect("listening");
    let _second = TcpStream::connect(address).await.expect("backlog");
    starts.recv().await.expect("the first");
    assert!(starts.try_recv().is_err(), "the second waits");
    drop(first);
    let second = timeout(SOON, starts.recv()).await;
    second.expect("the second has its turn").expect("open");
}

#[tokio::test(start_paused = true)]
async fn a_drain_with_stuck_connections_ends_at_the_deadline() {
    let (listener, address) = listen().await;
    let (trigger, watch) = drain::channel();
    let (started, mut starts) = mpsc::channel(1);
    let handler = move |stream: TcpStream, _| {
        let started = started.clone();
        async move {
            let _ = started.send(()).await;
            pending::<()>().await;
            drop(stream);
        }
    };
    tokio::spawn(serve(listener, Options::named("test"), watch, handler));
    let _open = TcpStream::connect(address).await.expect("listening");
    starts.recv().await.expect("accepted");
    let ended = trigger.drain(Mode::graceful(SOON)).await;
    assert_eq!(ended, Completion::Forced);
}

#[test]
fn only_errors_of_the_one_connection_are_passed_over() {
    for (number, passed) in [
        (libc::ECONNABORTED, true),
        (libc::ENETDOWN, true),
        (libc::EMFILE, false),
        (libc::ENFILE, false),
        (libc::ENOBUFS, false),
        (libc::ENOMEM, false),
    ] {
        let error = io::Error::from_raw_os_error(number);
        assert_eq!(is_of_one_connection(&error), passed, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn tasks_that_have_ended_are_taken_off_together() {
    let mut tasks = Tasks::new("test");
    for _ in 0..3 {
        tasks.all.spawn(async {});
    }
    tasks.all.spawn(pending());
    tokio::task::yield_now().await;
    tasks.reap().await;
    assert_eq!(tasks.all.len(), 1);
    // The next one wakes nobody until the time has come, which then takes it off by itself.
    tasks.all.spawn(async {});
    tokio::task::yield_now().await;
    let reaped = Instant::now();
    tasks.reap().await;
    assert!(reaped.elapsed() >= REAP);
    assert_eq!(tasks.all.len(), 1);
}
