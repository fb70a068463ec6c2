//! Sockets of a pod's namespace that are made before they are needed.
//!
//! To make a socket there, a thread enters the namespace and comes back. While a pod has many connections, one entry
//! makes several: the others wait here, options and all, for the connections that follow. They are few, they are closed
//! once the pod is quiet, and none outlives the pod's end.

use std::{
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use socket2::{Domain, Socket, Type};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until},
};

use super::{Draft, Factory, SocketAddr, SocketError, SourceAddress, congestion, connect_with};

/// Sockets made by one entry, with the one that is needed at once.
const BATCH: usize = 8;
/// Two connections within this time are many: a quiet pod keeps no files.
const BUSY: Duration = Duration::from_millis(100);
/// What has waited in vain for so long is closed.
const IDLE: Duration = Duration::from_secs(1);

/// Connects from one pod. Cheap to clone; clones share what is prepared.
#[derive(Clone, Debug)]
pub struct Connector {
    sockets: Factory,
    shelf: Arc<Shelf>,
    /// Whether the namespace's congestion control is not for use within the machine; what its first socket says.
    unfit: Arc<OnceLock<bool>>,
}

/// Sockets that wait, all made by one factory.
#[derive(Debug, Default)]
struct Shelf(Mutex<Stock>);

#[derive(Debug, Default)]
struct Stock {
    /// Of one family, the one that was asked for last.
    waiting: Vec<Socket>,
    family: Option<Domain>,
    used: Option<Instant>,
    /// A batch is being made: whoever finds nothing meanwhile makes one socket.
    making: bool,
    /// Somebody will look whether it is idle.
    watched: bool,
    closed: bool,
}

/// What there is for a connection.
enum Found {
    Prepared(Socket),
    /// Nothing: one is to be made, and so many more with it.
    Nothing {
        more: usize,
    },
}

impl Stock {
    fn take(&mut self, family: Domain, now: Instant) -> Found {
        let before = self.used.replace(now);
        if self.family != Some(family) {
            self.waiting.clear();
            self.family = Some(family);
        }
        match self.waiting.pop() {
            Some(socket) => Found::Prepared(socket),
            None => {
                let busy = before.is_some_and(|before| now - before < BUSY);
                let batch = busy && !self.closed && !self.making;
                self.making |= batch;
                let more = if batch { BATCH - 1 } else { 0 };
                Found::Nothing { more }
            }
        }
    }

    /// A batch is made: keeps what there is room for; the rest is closed.
    fn keep(&mut self, family: Domain, made: Vec<Socket>) {
        self.making = false;
        if self.closed || self.family != Some(family) {
            return;
        }
        let room = (BATCH - 1).saturating_sub(self.waiting.len());
        self.waiting.extend(made.into_iter().take(room));
    }

    /// When to look again; `None`: nothing is left to look after.
    fn idle(&mut self, now: Instant) -> Option<Instant> {
        let until = self.used.map(|used| used + IDLE);
        match until.filter(|until| *until > now) {
            Some(until) if !self.waiting.is_empty() => Some(until),
            _ => {
                self.waiting = Vec::new();
                self.watched = false;
                None
            }
        }
    }
}

impl Connector {
    /// One that has prepared nothing.
    pub fn new(sockets: Factory) -> Self {
        Self {
            sockets,
            shelf: Arc::default(),
            unfit: Arc::default(),
        }
    }

    /// As [`Factory::connect`]. Must run within a runtime that keeps time.
    ///
    /// # Errors
    /// As [`Factory::connect`].
    pub async fn connect(
        &self,
        destination: SocketAddr,
        source: SourceAddress,
    ) -> Result<TcpStream, SocketError> {
        connect_with(|| self.draft(destination), destination, source).await
    }

    /// As [`Connector::connect`], to an application of the same machine.
    ///
    /// # Errors
    /// As [`Factory::connect`].
    pub async fn connect_within(
        &self,
        destination: SocketAddr,
        source: SourceAddress,
    ) -> Result<TcpStream, SocketError> {
        let draft = || {
            let draft = self.draft(destination)?;
            self.fit(&draft.socket);
            Ok(draft)
        };
        connect_with(draft, destination, source).await
    }

    /// Before it connects: a connection that was paced once stays so. One that cannot be changed is slower, and nothing else.
    fn fit(&self, socket: &Socket) {
        let unfit = || congestion::is_unfit(socket).unwrap_or(false);
        if *self.unfit.get_or_init(unfit)
            && let Err(error) = congestion::make_fit(socket)
        {
            tracing::debug!(%error, "a connection to an application stays paced");
        }
    }

    /// The pod is gone: what is prepared is closed, and nothing more will be.
    pub fn close(&self) {
        let mut stock = self.shelf.0.lock();
        stock.closed = true;
        stock.waiting = Vec::new();
    }

    fn draft(&self, destination: SocketAddr) -> Result<Draft, SocketError> {
        // In the thread's own namespace a socket costs one call, prepared or not.
        if self.sockets.netns.is_none() {
            return self.sockets.draft(destination);
        }
        let family = Domain::for_address(destination);
        let found = self.shelf.0.lock().take(family, Instant::now());
        match found {
            Found::Prepared(socket) => Ok(Draft::of(socket, destination, Type::STREAM)),
            Found::Nothing { more: 0 } => self.sockets.draft(destination),
            Found::Nothing { more } => self.batch(destination, family, more),
        }
    }

    /// One socket for now and `more` for later, or as many as there are files for.
    fn batch(
        &self,
        destination: SocketAddr,
        family: Domain,
        more: usize,
    ) -> Result<Draft, SocketError> {
        let sockets = &self.sockets;
        let mut made = Vec::new();
        let first = sockets.inside(destination, || {
            let first = sockets.tuned(destination)?;
            let rest = (0..more).map_while(|_| sockets.tuned(destination).ok());
            made.extend(rest.map(|draft| draft.socket));
            Ok(first)
        });
        let mut stock = self.shelf.0.lock();
        stock.keep(family, made);
        if !stock.watched && !stock.waiting.is_empty() {
            stock.watched = true;
            tokio::spawn(close_when_idle(Arc::downgrade(&self.shelf)));
        }
        first
    }

    #[cfg(test)]
    fn prepared(&self) -> usize {
        self.shelf.0.lock().waiting.len()
    }
}

async fn close_when_idle(shelf: Weak<Shelf>) {
    loop {
        let Some(until) = shelf
            .upgrade()
            .and_then(|shelf| shelf.0.lock().idle(Instant::now()))
        else {
            return;
        };
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::{IpAddr, Ipv4Addr, Ipv6Addr},
    };

    use socket2::SockRef;
    use tokio::{net::TcpListener, time::timeout};

    use super::{super::PACKET_MARK, *};
    use crate::{
        fixture::{SOON, fresh_netns},
        netns::Netns,
        testing::sockets_of,
    };

    const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 80);
    const HERE6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 80);

    /// A namespace where somebody listens, and a connector in it.
    struct Scene {
        netns: Netns,
        listener: TcpListener,
        connector: Connector,
    }

    impl Scene {
        fn new() -> Option<Self> {
            let netns = fresh_netns()?;
            let sockets = Factory::for_pod(netns.clone());
            Some(Self {
                netns,
                listener: sockets.listen_any(80).expect("free"),
                connector: Connector::new(sockets),
            })
        }

        /// Both ends of a new connection.
        async fn connect(&self, to: SocketAddr, source: SourceAddress) -> (TcpStream, TcpStream) {
            let connected = self.connector.connect(to, source).await;
            let (server, peer) = self.listener.accept().await.expect("a connection");
            let client = connected.expect("listening");
            let own = client.local_addr().expect("bound");
            assert_eq!(super::super::unmapped(peer), own, "none but this one");
            (client, server)
        }

        /// Connects until sockets are prepared.
        async fn prepare(&self) {
            soon(|| async {
                self.connect(HERE, SourceAddress::Own).await;
                self.connector.prepared() > 0
            })
            .await;
        }

        /// Sockets of the namespace.
        fn sockets(&self) -> usize {
            sockets_of(&self.netns)
        }
    }

    /// Waits until it is so.
    async fn soon<F: Future<Output = bool>>(mut is_so: impl FnMut() -> F) {
        let looking = async {
            while !is_so().await {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, looking).await.expect("soon");
    }

    #[tokio::test]
    async fn sockets_that_were_prepared_are_as_those_that_are_made_at_once() {
        let Some(scene) = Scene::new() else { return };
        let client: IpAddr = "127.0.0.9".parse().expect("an address");
        // Nobody looks whether they are idle.
        scene.connector.shelf.0.lock().watched = true;
        scene.prepare().await;
        for prepared in (0..scene.connector.prepared()).rev() {
            let source = SourceAddress::Required(client);
            let (stream, _server) = scene.connect(HERE, source).await;
            assert_eq!(scene.connector.prepared(), prepared, "one of them is used");
            let socket = SockRef::from(&stream);
            assert_eq!(socket.mark().ok(), Some(PACKET_MARK));
            assert!(socket.tcp_nodelay().expect("open"));
            assert!(socket.keepalive().expect("open"));
            let time = socket.tcp_keepalive_time().expect("open");
            assert_eq!(time, Duration::from_secs(180));
            assert_eq!(stream.local_addr().expect("bound").ip(), client);
        }
    }

    #[tokio::test]
    async fn connections_to_applications_are_not_paced_where_the_namespace_paces_and_others_are() {
        let available = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control");
        let available = available.expect("readable");
        let pacing = available.split_whitespace().any(|it| it == "bbr");
        let Some(scene) = Scene::new().filter(|_| pacing) else {
            return;
        };
        let set = || fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "bbr");
        scene.netns.run(set).expect("permitted").expect("available");
        let control = |stream: &TcpStream| SockRef::from(stream).tcp_congestion().expect("open");
        let (out, _server) = scene.connect(HERE, SourceAddress::Own).await;
        assert!(control(&out).starts_with(b"bbr"));
        for _ in 0..2 * BATCH {
            let within = scene.connector.connect_within(HERE, SourceAddress::Own);
            let within = within.await.expect("listening");
            assert!(control(&within).starts_with(b"reno"));
        }
    }

    #[test]
    fn a_pod_that_connects_now_and_then_has_none_prepared() {
        let mut stock = Stock::default();
        let mut asked = |now| match stock.take(Domain::IPV4, now) {
            Found::Prepared(_) => panic!("nothing was kept"),
            Found::Nothing { more } => more,
        };
        let start = Instant::now();
        assert_eq!(asked(start), 0);
        assert_eq!(asked(start + BUSY), 0);
        let busy = start + BUSY + BUSY / 2;
        assert_eq!(asked(busy), BATCH - 1);
        assert_eq!(asked(busy), 0, "the batch is being made");
    }

    #[test]
    fn no_more_are_kept_than_one_batch_and_none_of_another_family() {
        let made = |n| {
            let new = |_| Socket::new(Domain::IPV4, Type::STREAM, None).expect("a file");
            (0..n).map(new).collect()
        };
        let mut stock = Stock::default();
        stock.take(Domain::IPV4, Instant::now());
        stock.keep(Domain::IPV6, made(1));
        assert_eq!(stock.waiting.len(), 0);
        for _ in 0..3 {
            stock.keep(Domain::IPV4, made(BATCH - 1));
        }
        assert_eq!(stock.waiting.len(), BATCH - 1);
        stock.take(Domain::IPV6, Instant::now());
        assert_eq!(stock.waiting.len(), 0);
    }

    #[tokio::test]
    async fn what_is_prepared_is_closed_once_the_pod_is_quiet() {
        let Some(scene) = Scene::new() else { return };
        let before = scene.sockets();
        // Twice, as the second time takes another look.
        for _ in 0..2 {
            scene.prepare().await;
            soon(|| async { scene.connector.prepared() == 0 }).await;
            soon(|| async { scene.sockets() == before }).await;
        }
    }

    #[tokio::test]
    async fn churn_leaves_no_file() {
        let Some(scene) = Scene::new() else { return };
        let before = scene.sockets();
        for number in 0..100 {
            let to = if number % 10 == 0 { HERE6 } else { HERE };
            scene.connect(to, SourceAddress::Own).await;
            assert!(scene.connector.prepared() < BATCH);
        }
        scene.prepare().await;
        soon(|| async { scene.sockets() == before + scene.connector.prepared() }).await;
    }

    #[tokio::test]
    async fn the_end_of_a_pod_closes_what_is_prepared_and_nothing_more_is() {
        let Some(scene) = Scene::new() else { return };
        let before = scene.sockets();
        let running_pod = scene.connector.clone();
        scene.prepare().await;
        running_pod.close();
        soon(|| async { scene.sockets() == before }).await;
        for _ in 0..BATCH {
            scene.connect(HERE, SourceAddress::Own).await;
            assert_eq!(scene.connector.prepared(), 0);
        }
    }

    #[tokio::test]
    async fn each_pods_connections_are_made_in_its_own_namespace() {
        let (Some(one), Some(two)) = (Scene::new(), Scene::new()) else {
            return;
        };
        for _ in 0..2 * BATCH {
            for scene in [&one, &two] {
                scene.connect(HERE, SourceAddress::Own).await;
            }
        }
    }
}
