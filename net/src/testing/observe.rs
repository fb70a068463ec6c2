//! What tests look at: lines, metrics, sockets.

use std::{
    io::{self, Write},
    net::SocketAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use prometheus_client::{encoding::text, registry::Registry};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::{log, netns::Netns};

/// Where lines are written to be looked at. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    /// What has been written.
    ///
    /// # Panics
    /// It is no text.
    pub fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).expect("text")
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines that `logging` writes.
///
/// # Panics
/// The filter is none.
pub fn lines(format: log::Format, filter: &str, logging: impl FnOnce()) -> Vec<String> {
    let options = log::Options {
        format,
        filter: filter.to_owned(),
    };
    let output = Output::default();
    let (subscriber, handle) = log::subscriber(&options, output.clone()).expect("a good filter");
    tracing::subscriber::with_default(subscriber, logging);
    handle.flush();
    output.text().lines().map(str::to_owned).collect()
}

/// What a scrape shows.
///
/// # Panics
/// A metric cannot be written.
pub fn encoded(registry: &Registry) -> String {
    let mut told = String::new();
    text::encode(&mut told, registry).expect("encodes");
    told
}

/// Fails where no line of `text` is this one.
#[track_caller]
pub fn assert_line(text: &str, line: &str) {
    assert!(text.lines().any(|it| it == line), "no {line:?} in\n{text}");
}

/// Open sockets of a namespace.
///
/// # Panics
/// It cannot be entered.
pub fn sockets_of(netns: &Netns) -> usize {
    let read = || std::fs::read_to_string("/proc/thread-self/net/sockstat");
    let told = netns.run(read).expect("permitted").expect("readable");
    let mut lines = told.lines();
    let used = lines.find_map(|it| it.strip_prefix("sockets: used "));
    used.and_then(|it| it.trim().parse().ok()).expect("a count")
}

/// A port of loopback on which nobody listens, nor begins to while the socket lives.
///
/// # Panics
/// There is none.
pub fn refusing() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().expect("a socket");
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(anywhere).expect("a port");
    (socket.local_addr().expect("bound"), socket)
}

/// Both ends of a connection over loopback.
///
/// # Panics
/// There is none.
pub async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let dialled = TcpStream::connect(listener.local_addr().expect("bound"));
    let (dialled, accepted) = tokio::join!(dialled, listener.accept());
    let (dialled, accepted) = (dialled.expect("listening"), accepted.expect("a dialler").0);
    for end in [&dialled, &accepted] {
        end.set_nodelay(true).expect("open");
    }
    (dialled, accepted)
}

/// One port of loopback for both, as a name server has it.
///
/// # Panics
/// There is none.
pub async fn tcp_and_udp() -> (TcpListener, UdpSocket) {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().expect("bound")).await {
            return (tcp, udp);
        }
    }
}
