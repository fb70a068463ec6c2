use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};

use super::*;
use crate::{
    accept::{Options, serve_on},
    drain,
    fixture::{SOON, fresh_netns},
    socket::{Factory, SourceAddress},
};

const PORT: u16 = 15001;

fn sockets(netns: &Netns) -> Factory {
    Factory {
        mark: None,
        ..Factory::for_pod(netns.clone())
    }
}

/// A process's part of it: it says its name to whoever connects, and keeps connections for as long as they last.
struct Server {
    drain: drain::Trigger,
    served: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Server {
    fn start(netns: &Netns, name: u8, alone: Alone) -> Self {
        let listener = sockets(netns).listen_any(PORT).expect("a shared port");
        let port = Port::join(&listener, netns, alone);
        Self::on(listener, port, name)
    }

    fn on(listener: TcpListener, port: Port, name: u8) -> Self {
        let (trigger, watch) = drain::channel();
        let served = Arc::new(AtomicUsize::new(0));
        let counted = served.clone();
        let handler = move |mut stream: TcpStream, _| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let _ = stream.write_all(&[name]).await;
                let _ = stream.read(&mut [0]).await;
            }
        };
        let options = Options::named("test");
        let task = tokio::spawn(serve_on(listener, port, options, watch, handler));
        Self {
            drain: trigger,
            served,
            task,
        }
    }

    fn leave(&self) {
        self.drain.start(drain::Mode::graceful(SOON));
    }

    async fn left(self) {
        self.leave();
        timeout(SOON, self.task)
            .await
            .expect("soon")
            .expect("no panic");
    }
}

async fn who(netns: &Netns) -> std::io::Result<u8> {
    let to = ([127, 0, 0, 1], PORT).into();
    let sockets = sockets(netns);
    let connecting = sockets.connect(to, SourceAddress::Own);
    let connected = timeout(SOON, connecting).await.expect("soon");
    let mut stream = connected.map_err(std::io::Error::other)?;
    timeout(SOON, stream.read_u8()).await.expect("soon")
}

async fn all_by(netns: &Netns, name: u8) {
    for _ in 0..20 {
        assert_eq!(who(netns).await.expect("served"), name);
    }
}

#[tokio::test]
async fn who_joins_gets_all_that_is_new_and_gives_it_back_when_it_leaves() {
    let Some(netns) = fresh_netns() else { return };
    let old = Server::start(&netns, 1, Alone::Stay);
    all_by(&netns, 1).await;
    let new = Server::start(&netns, 2, Alone::Stay);
    all_by(&netns, 2).await;
    // Rolled back.
    new.left().await;
    all_by(&netns, 1).await;
    // Upgraded again.
    let newer = Server::start(&netns, 3, Alone::Stay);
    all_by(&netns, 3).await;
    old.left().await;
    all_by(&netns, 3).await;
    let newest = Server::start(&netns, 4, Alone::Stay);
    all_by(&netns, 4).await;
    newer.left().await;
    newest.task.abort();
}

#[tokio::test]
async fn who_is_alone_stays_until_another_has_come() {
    let Some(netns) = fresh_netns() else { return };
    let old = Server::start(&netns, 1, Alone::Stay);
    all_by(&netns, 1).await;
    old.leave();
    tokio::task::yield_now().await;
    all_by(&netns, 1).await;
    let new = Server::start(&netns, 2, Alone::Stay);
    old.left().await;
    all_by(&netns, 2).await;
    new.task.abort();
}

#[tokio::test]
async fn who_is_alone_and_expects_nobody_closes() {
    let Some(netns) = fresh_netns() else { return };
    let only = Server::start(&netns, 1, Alone::Close);
    all_by(&netns, 1).await;
    only.left().await;
    assert!(who(&netns).await.is_err());
}

/// One that knows nothing of hand-overs, such as another maker's, and is told nothing of ours.
#[tokio::test]
async fn a_successor_of_another_make_gets_what_is_new_before_we_close() {
    let Some(netns) = fresh_netns() else { return };
    let ours = Server::start(&netns, 1, Alone::Stay);
    let listener = sockets(&netns).listen_any(PORT).expect("a shared port");
    let theirs = Server::on(listener, Port::unshared(), 2);
    ours.left().await;
    all_by(&netns, 2).await;
    theirs.task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_connection_is_lost_while_servers_come_and_go() {
    let Some(netns) = fresh_netns() else { return };
    let first = Server::start(&netns, 0, Alone::Stay);
    let over = Arc::new(AtomicBool::new(false));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (netns, over) = (netns.clone(), over.clone());
        clients.spawn(async move {
            let mut made = 0;
            while !over.load(Ordering::Relaxed) {
                let served = who(&netns).await;
                assert!(served.is_ok(), "{served:?} after {made}");
                made += 1;
            }
            made
        });
    }
    let mut current = first;
    let mut served = 0;
    for name in 1..=10 {
        let next = Server::start(&netns, name, Alone::Stay);
        let by_next = next.served.clone();
        let begun = async {
            while by_next.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, begun).await.expect("the next one is used");
        // Every other time it is the new one that goes.
        let (leaves, stays) = match name % 2 {
            0 => (next, current),
            _ => (current, next),
        };
        served += leaves.served.load(Ordering::Relaxed);
        leaves.left().await;
        current = stays;
    }
    over.store(true, Ordering::Relaxed);
    let made: usize = clients.join_all().await.into_iter().sum();
    assert!(
        made > 0 && served > 0,
        "{made} connections, {served} served"
    );
    current.task.abort();
}
