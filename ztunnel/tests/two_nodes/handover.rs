//! One tunnel takes over from another under load: nothing that is new fails, and what is open has its grace.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};
use net::{
    netns::Netns,
    socket::{Factory, SourceAddress},
    testing::TestCa,
    tls::Policy,
    zds::Request,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::rig::{
    DEADLINE, Rig, application, connect, eventually, is_reset,
    network::{Pod, in_pod},
    node::{Node, uid},
    passes, rig_with, soon,
};

/// How long open connections live on.
const GRACE: Duration = Duration::from_millis(1500);
type Settings = &'static [(&'static str, &'static str)];
const SETTINGS: Settings = &[
    ("LEYLINE_AWAIT_SUCCESSOR", "true"),
    ("CONNECTION_TERMINATION_DEADLINE", "1500ms"),
];
const LONG_GRACE: Settings = &[
    ("LEYLINE_AWAIT_SUCCESSOR", "true"),
    ("CONNECTION_TERMINATION_DEADLINE", "20s"),
];
const HELD: usize = 50;
/// New connections a second, and questions over UDP and over TCP.
const PER_SECOND: u64 = 150;
/// Where a pod asks: nobody is there, the redirection takes it to the tunnel.
const NAME_SERVER: &str = "10.96.0.10:53";

async fn rig(settings: Settings) -> Option<Rig> {
    rig_with(TestCa::new("cluster.local", &Policy::default()), settings).await
}

async fn successor(rig: &Rig, name: &'static str, pod: &Pod) -> Node {
    let node = Node::start_with(name, &rig.ca, pod, SETTINGS).await;
    node.state.publish(rig.known());
    node
}

/// Echoes for as long as it is not dropped.
fn echo(rig: &Rig) -> JoinSet<()> {
    let listener = rig.listen();
    let mut tasks = JoinSet::new();
    tasks.spawn(echo_on(listener));
    tasks
}

async fn echo_on(listener: TcpListener) {
    let mut open = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        open.spawn(async move {
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
        while open.try_join_next().is_some() {}
    }
}

/// A steady load from a pod: new connections and names, each of which must succeed at once.
struct Load {
    over: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    kinds: JoinSet<Vec<String>>,
}

impl Load {
    fn start(from: &Netns, to: SocketAddr) -> Self {
        let mut load = Self {
            over: Arc::default(),
            done: Arc::default(),
            kinds: JoinSet::new(),
        };
        let sockets = Factory {
            netns: Some(from.clone()),
            ..Factory::default()
        };
        let (a, b, c) = (sockets.clone(), sockets.clone(), sockets);
        load.repeat("connection", move || new_connection(a.clone(), to));
        load.repeat("question over UDP", move || ask_udp(b.clone()));
        load.repeat("question over TCP", move || ask_tcp(c.clone()));
        load
    }

    fn repeat<F>(&mut self, what: &'static str, once: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let (over, done) = (self.over.clone(), self.done.clone());
        self.kinds.spawn(async move {
            let mut turns = interval(Duration::from_micros(1_000_000 / PER_SECOND));
            turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut under_way = JoinSet::new();
            let mut failed = Vec::new();
            while !over.load(Ordering::Relaxed) {
                turns.tick().await;
                under_way.spawn(timeout(DEADLINE, once()));
                while let Some(ended) = under_way.try_join_next() {
                    failed.extend(failure(what, ended.expect("no panic")));
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }
            while let Some(ended) = under_way.join_next().await {
                failed.extend(failure(what, ended.expect("no panic")));
            }
            failed
        });
    }

    /// Waits until that many more have been made.
    async fn more(&self, count: usize) {
        let until = self.done.load(Ordering::Relaxed) + count;
        eventually("the load goes on", async || {
            self.done.load(Ordering::Relaxed) >= until
        })
        .await;
    }

    /// Ends it; nothing must have failed.
    async fn end(self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        let failed = self.kinds.join_all().await.concat();
        let done = self.done.load(Ordering::Relaxed);
        assert!(
            failed.is_empty(),
            "{} of {done} failed: {failed:?}",
            failed.len()
        );
        done
    }
}

fn failure(
    what: &str,
    ended: Result<io::Result<()>, tokio::time::error::Elapsed>,
) -> Option<String> {
    match ended {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{what}: {error}")),
        Err(_) => Some(format!("{what}: no answer")),
    }
}

async fn open(sockets: &Factory, to: SocketAddr) -> io::Result<TcpStream> {
    let connected = sockets.connect(to, SourceAddress::Own).await;
    connected.map_err(|error| io::Error::new(error.io_kind(), error))
}

async fn new_connection(sockets: Factory, to: SocketAddr) -> io::Result<()> {
    let mut stream = open(&sockets, to).await?;
    stream.write_all(b"echo").await?;
    let mut reply = [0; 4];
    stream.read_exact(&mut reply).await.map(drop)
}

fn question() -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii("web.ns.svc.cluster.local.").expect("a name");
    message.add_query(Query::query(name, RecordType::A));
    message.to_vec().expect("a message")
}

fn answered(reply: &[u8]) -> io::Result<()> {
    match Message::from_vec(reply) {
        Ok(reply) if reply.answers.len() == 1 => Ok(()),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

/// Without another try: a lost datagram fails.
async fn ask_udp(sockets: Factory) -> io::Result<()> {
    let anywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let socket = sockets.bind_udp(anywhere).map_err(io::Error::other)?;
    socket.connect(NAME_SERVER).await?;
    socket.send(&question()).await?;
    let mut reply = [0; 512];
    let length = socket.recv(&mut reply).await?;
    answered(&reply[..length])
}

async fn ask_tcp(sockets: Factory) -> io::Result<()> {
    let server = NAME_SERVER.parse().expect("an address");
    let mut stream = open(&sockets, server).await?;
    let question = question();
    let length = u16::try_from(question.len()).expect("short");
    stream.write_u16(length).await?;
    stream.write_all(&question).await?;
    let mut reply = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut reply).await?;
    answered(&reply)
}

/// Connections that are open and used.
async fn held(rig: &Rig) -> Vec<TcpStream> {
    let mut held = Vec::new();
    for _ in 0..HELD {
        held.push(connect(&rig.a, rig.address()).await);
    }
    for stream in &mut held {
        still_works(stream).await;
    }
    held
}

async fn still_works(stream: &mut TcpStream) {
    soon(stream.write_all(b"x")).await.expect("open");
    assert_eq!(soon(stream.read_u8()).await.expect("open"), b'x');
}

/// Used until they are reset, which must not come before the grace is over.
async fn live_until_reset(held: Vec<TcpStream>, from: Instant) {
    let mut all = JoinSet::new();
    for mut stream in held {
        all.spawn(async move {
            let ended = loop {
                if let Err(error) = stream.write_all(b"x").await {
                    break error;
                }
                match stream.read_u8().await {
                    Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    Err(error) => break error,
                }
            };
            (ended, from.elapsed())
        });
    }
    for (ended, after) in soon(all.join_all()).await {
        assert!(
            matches!(
                ended.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ),
            "{ended}"
        );
        assert!(after >= GRACE, "cut after {after:?}: {ended}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_at_either_end_fail_nothing_new_and_give_what_is_open_its_grace() {
    let Some(mut rig) = rig(SETTINGS).await else {
        return;
    };
    let _echo = echo(&rig);
    let load = Load::start(&rig.a.netns, rig.address());
    for round in 0..4 {
        load.more(100).await;
        let held = held(&rig).await;
        let mut old = match round % 2 {
            0 => {
                let next = successor(&rig, "node-a", &rig.a).await;
                std::mem::replace(&mut rig.node_a, next)
            }
            _ => {
                let next = successor(&rig, "node-b", &rig.b).await;
                std::mem::replace(&mut rig.node_b, next)
            }
        };
        // Before it is told: its grace runs from when it hears of it.
        let told = Instant::now();
        old.begin_stop();
        live_until_reset(held, told).await;
        soon(old.stop()).await;
    }
    load.more(100).await;
    println!(
        "{} connections and questions, none failed",
        load.end().await
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_that_is_rolled_back_fails_nothing() {
    let Some(rig) = rig(SETTINGS).await else {
        return;
    };
    let _echo = echo(&rig);
    let load = Load::start(&rig.a.netns, rig.address());
    let mut held = held(&rig).await;
    for _ in 0..2 {
        let on_a = successor(&rig, "node-a", &rig.a).await;
        let on_b = successor(&rig, "node-b", &rig.b).await;
        load.more(200).await;
        soon(on_a.stop()).await;
        soon(on_b.stop()).await;
        load.more(200).await;
    }
    for stream in &mut held {
        still_works(stream).await;
    }
    load.end().await;
}

/// Told to end before there is a successor, as when its pod is deleted by hand.
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_is_told_to_end_serves_on_until_its_successor_listens() {
    let Some(mut rig) = rig(LONG_GRACE).await else {
        return;
    };
    let _echo = echo(&rig);
    let load = Load::start(&rig.a.netns, rig.address());
    load.more(100).await;
    rig.node_a.begin_stop();
    rig.node_b.begin_stop();
    load.more(100).await;
    let on_a = successor(&rig, "node-a", &rig.a).await;
    let on_b = successor(&rig, "node-b", &rig.b).await;
    soon(rig.node_a.stop()).await;
    soon(rig.node_b.stop()).await;
    load.more(300).await;
    load.end().await;
    drop((on_a, on_b));
}

/// Its open connections are lost, and told so; nothing that is new is.
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_dies_beside_its_successor_costs_only_what_it_held() {
    let Some(mut rig) = rig(SETTINGS).await else {
        return;
    };
    let _echo = echo(&rig);
    let load = Load::start(&rig.a.netns, rig.address());
    let mut held = held(&rig).await;
    let next = successor(&rig, "node-a", &rig.a).await;
    load.more(300).await;
    let old = std::mem::replace(&mut rig.node_a, next);
    // Dropped and not drained: as a kill does, it closes every socket where it stands.
    drop(old);
    for stream in &mut held {
        is_reset(stream).await;
    }
    load.more(300).await;
    load.end().await;
}

/// What waits in the queue of a listener that closes without a hand-over is moved, since the pod's namespace says so.
#[tokio::test(flavor = "multi_thread")]
async fn enrolled_namespaces_have_waiting_connections_moved_to_who_still_listens() {
    let Some(rig) = rig(SETTINGS).await else {
        return;
    };
    let is_on = ["grep", "-q", "1", "/proc/sys/net/ipv4/tcp_migrate_req"];
    in_pod(&rig.a, &is_on).expect("on");
    let port = SocketAddr::from(([127, 0, 0, 1], 7777));
    let sockets = Factory {
        reuse_port: true,
        ..application(&rig.a)
    };
    let dies = sockets.listen(port).expect("a shared port");
    let mut waiting = connect(&rig.a, port).await;
    let lives = sockets.listen(port).expect("a shared port");
    drop(dies);
    let (mut served, _) = soon(lives.accept()).await.expect("it was moved");
    passes(&mut waiting, &mut served, b"x").await;
}

/// While nobody else serves them, the agent's word about pods still counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_about_to_end_lets_go_of_a_pod_that_is_deleted_and_takes_no_new_one() {
    let Some(mut rig) = rig(LONG_GRACE).await else {
        return;
    };
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    rig.node_b.begin_stop();
    passes(&mut client, &mut server, b"serves on").await;
    let refused = rig.node_b.agent.try_add(&rig.a).await;
    assert!(
        format!("{refused:?}").contains("about to end"),
        "{refused:?}"
    );
    let deleted = Request::Delete { uid: uid(&rig.b) };
    rig.node_b.agent.call(deleted).await;
    is_reset(&mut server).await;
    // Nothing is left to wait for.
    soon(rig.node_b.stop()).await;
}
