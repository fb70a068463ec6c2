//! Connections across joining and leaving: none is cut, none is refused.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use net::netns::Netns;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::rig::{NODE_V4, NODE_V6, PATIENCE, POD_V4, POD_V6, Rig, dial, listen, v4, v6};

const POD_PORT: u16 = 8080;
const NODE_PORT: u16 = 8081;

/// Echoes on both sides, for both families.
pub(crate) struct Echoes {
    _tasks: JoinSet<()>,
}

pub(crate) fn echoes(rig: &Rig) -> Echoes {
    let mut tasks = JoinSet::new();
    for (netns, port) in [(&rig.pod, POD_PORT), (&rig.node, NODE_PORT)] {
        tasks.spawn(echo(listen(netns, &format!("[::]:{port}"))));
    }
    Echoes { _tasks: tasks }
}

async fn echo(listener: TcpListener) {
    let mut connections = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        connections.spawn(async move {
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// From where to where, for every pair of side and family.
pub(crate) fn routes(rig: &Rig) -> [(Netns, SocketAddr); 4] {
    [
        (rig.node.clone(), v4(POD_V4, POD_PORT)),
        (rig.node.clone(), v6(POD_V6, POD_PORT)),
        (rig.pod.clone(), v4(NODE_V4, NODE_PORT)),
        (rig.pod.clone(), v6(NODE_V6, NODE_PORT)),
    ]
}

pub(crate) async fn ping(stream: &mut TcpStream) -> Result<(), String> {
    let exchange = async {
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.map(|_| answer)
    };
    match timeout(PATIENCE, exchange).await {
        Ok(Ok(answer)) if &answer == b"ping" => Ok(()),
        Ok(Ok(answer)) => Err(format!("answered {answer:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer".into()),
    }
}

/// Connections that stay open.
pub(crate) struct Held(Vec<(SocketAddr, TcpStream)>);

impl Held {
    pub(crate) async fn open(rig: &Rig, count: usize) -> Held {
        let routes = routes(rig);
        let mut held = Vec::new();
        for index in 0..count {
            let (netns, to) = &routes[index % routes.len()];
            let stream = dial(netns, *to)
                .await
                .unwrap_or_else(|error| panic!("connect to {to}: {error}"));
            held.push((*to, stream));
        }
        let mut held = Held(held);
        held.all_answer("at first").await;
        held
    }

    pub(crate) async fn all_answer(&mut self, when: &str) {
        for (to, stream) in &mut self.0 {
            let answer = ping(stream).await;
            answer.unwrap_or_else(|error| panic!("a held connection to {to}, {when}: {error}"));
        }
    }
}

/// New connections at a steady rate, each used once and closed.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<Vec<String>>,
}

impl Load {
    /// A hundred each second, over all routes in turn.
    pub(crate) fn start(rig: &Rig) -> Load {
        let (stop, done) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        let task = tokio::spawn(load(routes(rig), stop.clone(), done.clone()));
        Load { stop, done, task }
    }

    /// Waits for so many more connections.
    pub(crate) async fn more(&self, count: usize) {
        let aim = self.done.load(Ordering::SeqCst) + count;
        crate::rig::eventually("more connections", async || {
            self.done.load(Ordering::SeqCst) >= aim
        })
        .await;
    }

    /// How many were made; none may have failed.
    pub(crate) async fn finish(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        let failures = self.task.await.expect("the load does not panic");
        let done = self.done.load(Ordering::SeqCst);
        assert!(
            failures.is_empty(),
            "{} of {done} failed: {failures:?}",
            failures.len()
        );
        done
    }
}

async fn load(
    routes: [(Netns, SocketAddr); 4],
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
) -> Vec<String> {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let mut running = JoinSet::new();
    let began = Instant::now();
    for (netns, to) in routes.iter().cycle() {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        ticks.tick().await;
        let (netns, to, done) = (netns.clone(), *to, done.clone());
        running.spawn(async move {
            let at = began.elapsed();
            let result = match dial(&netns, to).await {
                Ok(mut stream) => ping(&mut stream).await,
                Err(error) => Err(error.to_string()),
            };
            done.fetch_add(1, Ordering::SeqCst);
            result.err().map(|error| format!("{at:?} to {to}: {error}"))
        });
    }
    running.join_all().await.into_iter().flatten().collect()
}
