//! The pods of this node: told by the node agent over ZDS, each with its listeners inside its own network namespace.

mod client;
mod leave;
mod prepare;
mod reconcile;

use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh::outcome::LocalWorkload;
use net::{
    accept, drain,
    handover::Port,
    netns::Netns,
    ready::Gate,
    report::Chain,
    socket::{Factory, SocketError, accept_from_within},
    sysctl::Sysctl,
};
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, UdpSocket},
    task::JoinSet,
};

use crate::{
    application::check_original_source,
    authorize,
    config::{HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT},
    dns,
    identities::Held,
    inbound, inbound_plaintext, outbound,
    pod::{Node, Pod},
    socks5,
};
use client::Client;
pub(crate) use leave::Leaving;
use reconcile::Launch;
pub(crate) use reconcile::{PodUid, Pods};

/// What runs and what waits, for dumps and metrics.
#[derive(Default)]
pub(crate) struct Published {
    pub(crate) up: Vec<Arc<Pod>>,
    pub(crate) pending: Vec<(PodUid, LocalWorkload)>,
}

/// Starts what runs for a pod.
struct Launcher {
    node: Arc<Node>,
    /// Absent where namespaces' settings cannot be written.
    sysctl: Option<Sysctl>,
}

/// What runs for one pod. Dropping it ends every connection of the pod.
pub(crate) struct Running {
    pod: Arc<Pod>,
    drain: drain::Trigger,
    /// One of its ports, which stands for all: a successor opens them together.
    port: Option<Port>,
    listeners: JoinSet<()>,
    _watchers: JoinSet<()>,
    /// Where the pod's record is known already: nobody else may hold it yet.
    _identity: Option<Held>,
}

/// The listening sockets of a pod; opened all, or none.
#[derive(Default)]
struct Listeners {
    outbound: Option<Listener>,
    plaintext: Option<Listener>,
    hbone: Option<Listener>,
    dns_tcp: Vec<Listener>,
    dns_udp: Vec<(UdpSocket, Port)>,
    socks5: Vec<Listener>,
}

/// One of them, with what becomes of its port when we leave.
struct Listener {
    socket: TcpListener,
    port: Port,
}

impl Listener {
    fn unshared(socket: TcpListener) -> Self {
        Self {
            socket,
            port: Port::unshared(),
        }
    }
}

impl Listeners {
    /// Once this returns, everything new in the pod's namespace comes to us.
    fn open(sockets: &Factory, netns: &Netns, node: &Node) -> Result<Self, SocketError> {
        let inpod = &node.config.inpod;
        let (share, alone) = (inpod.port_reuse, inpod.alone());
        Self::open_joined(sockets, node, |socket| match share {
            true => Listener {
                port: Port::join(&socket, netns, alone),
                socket,
            },
            false => Listener::unshared(socket),
        })
    }

    /// `join`: what becomes of each port when we leave.
    fn open_joined(
        sockets: &Factory,
        node: &Node,
        join: impl Fn(TcpListener) -> Listener,
    ) -> Result<Self, SocketError> {
        let config = &node.config;
        let (dns_tcp, dns_udp) = match config.dns.enabled {
            true => (
                sockets.listen_loopback(config.dns.port)?,
                sockets.bind_udp_loopback(config.dns.port)?,
            ),
            false => (Vec::new(), Vec::new()),
        };
        let socks5 = match config.socks5 && config.proxy_enabled {
            true => sockets.listen_loopback(socks5::PORT)?,
            false => Vec::new(),
        };
        let listen = |port| match config.proxy_enabled {
            true => sockets.listen_any(port).map(Some),
            false => Ok(None),
        };
        let [outbound, plaintext, hbone] = [
            listen(OUTBOUND_PORT)?,
            listen(INBOUND_PLAINTEXT_PORT)?,
            listen(HBONE_PORT)?,
        ];
        if let Some(Err(error)) = outbound.as_ref().map(accept_from_within) {
            tracing::debug!(%error, "connections from applications stay paced");
        }
        // What is new is drawn to us only once all are open: an Add that fails must not have taken anything.
        let dns_tcp: Vec<Listener> = dns_tcp.into_iter().map(&join).collect();
        let ports = dns_tcp.iter().map(|it| it.port.clone());
        let dns_udp: Vec<_> = dns_udp.into_iter().zip(ports).collect();
        for (socket, port) in &dns_udp {
            port.draw(socket);
        }
        Ok(Self {
            outbound: outbound.map(&join),
            plaintext: plaintext.map(&join),
            hbone: hbone.map(&join),
            dns_tcp,
            dns_udp,
            socks5: socks5.into_iter().map(join).collect(),
        })
    }
}

impl Listeners {
    fn any_port(&self) -> Option<Port> {
        let any = self.hbone.iter().chain(&self.dns_tcp).next();
        any.map(|it| it.port.clone())
    }
}

impl Launch for Launcher {
    type Netns = Netns;
    type Running = Running;

    async fn launch(
        &self,
        uid: &PodUid,
        workload: &LocalWorkload,
        netns: &Netns,
    ) -> Result<Running, String> {
        // Its listeners and all that is spawned here.
        let _lane = self.node.lanes.in_turn().enter();
        let sockets = self.node.pod_sockets(netns.clone());
        let told = |error: &dyn std::error::Error| Chain(error).to_string();
        let source = self.node.config.inpod.original_source;
        check_original_source(source, &sockets).map_err(|error| told(&error))?;
        self.migrate_requests(netns);
        let listeners =
            Listeners::open(&sockets, netns, &self.node).map_err(|error| told(&error))?;
        let pod = Pod::new(
            self.node.clone(),
            uid.clone(),
            workload.clone(),
            sockets,
            source,
        );
        tracing::info!(%uid, name = &*workload.name, namespace = &*workload.namespace, ?netns, "serving pod");
        self.node.metrics.pods.started();
        self.node.neighbours.enter(&pod);
        Ok(Running::start(pod, listeners))
    }

    fn drain(&self, running: &Running) {
        tracing::info!(uid = %running.pod.uid, "the pod is terminating: peers are told");
        running
            .pod
            .farewell
            .start(drain::Mode::graceful(self.node.config.drain_deadline));
    }
}

impl Launcher {
    /// Has the kernel move what waits at a listener that closes to another one on its port: for processes that die and
    /// cannot see to it themselves. Since Linux 5.14; without it a death costs what waits.
    fn migrate_requests(&self, netns: &Netns) {
        let Some(sysctl) = &self.sysctl else { return };
        if let Err(error) = sysctl.set(netns, "ipv4/tcp_migrate_req", "1") {
            tracing::debug!(%error, ?netns, "tcp_migrate_req stays as it is");
        }
    }
}

impl Running {
    fn start(pod: Arc<Pod>, open: Listeners) -> Self {
        let (trigger, drain) = drain::channel();
        let mut listeners = JoinSet::new();
        let lanes = &pod.node.clone().lanes;
        let port = open.any_port();
        if let Some(listener) = open.outbound {
            let pod = pod.clone();
            listeners.spawn(accept::serve_on(
                listener.socket,
                listener.port,
                accept::Options::named("outbound").spread(lanes),
                drain.clone(),
                move |stream, peer| outbound::serve(pod.clone(), stream, peer),
            ));
        }
        if let Some(listener) = open.plaintext {
            let pod = pod.clone();
            listeners.spawn(accept::serve_on(
                listener.socket,
                listener.port,
                accept::Options::named("inbound plaintext").spread(lanes),
                drain.clone(),
                move |stream, peer| inbound_plaintext::serve(pod.clone(), stream, peer),
            ));
        }
        if let Some(listener) = open.hbone {
            listeners.spawn(serve_hbone(pod.clone(), listener, drain.clone()));
        }
        serve_socks5(&pod, open.socks5, &drain, &mut listeners);
        serve_dns(&pod, open.dns_tcp, open.dns_udp, &drain, &mut listeners);
        let mut watchers = JoinSet::new();
        watchers.spawn(authorize::watch(pod.clone(), trigger.watch()));
        Self {
            _identity: pod.hold_identity(),
            pod,
            drain: trigger,
            port,
            listeners,
            _watchers: watchers,
        }
    }

    /// Only the HBONE listener, for ourselves.
    pub(crate) fn start_self(pod: Arc<Pod>, hbone: TcpListener) -> Self {
        let listeners = Listeners {
            hbone: Some(Listener::unshared(hbone)),
            ..Listeners::default()
        };
        Self::start(pod, listeners)
    }

    /// Whether nobody else serves the pod, as far as can be told.
    fn is_alone(&self) -> bool {
        self.port.as_ref().is_none_or(Port::is_alone)
    }

    /// Stops accepting, lets connections end until the deadline, then cuts the rest.
    pub(crate) async fn drain(mut self, mode: drain::Mode) {
        self.drain.start(mode);
        while self.listeners.join_next().await.is_some() {}
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.pod.inbound.set_removed();
        self.pod.outbound.set_removed();
        self.pod.connector.close();
        self.pod.node.metrics.pods.stopped();
    }
}

fn serve_hbone(
    pod: Arc<Pod>,
    listener: Listener,
    drain: drain::Watch,
) -> impl Future<Output = ()> + Send {
    let handshakes = pod.handshakes.clone();
    let admit = move || handshakes.clone().admit();
    accept::serve_admitted(
        listener.socket,
        listener.port,
        accept::Options::named("inbound").spread(&pod.node.lanes),
        drain,
        admit,
        move |stream, peer, slot, closing| inbound::serve(pod.clone(), stream, peer, slot, closing),
    )
}

fn serve_socks5(
    pod: &Arc<Pod>,
    open: Vec<Listener>,
    drain: &drain::Watch,
    tasks: &mut JoinSet<()>,
) {
    let names = dns_of(pod);
    for Listener { socket, port } in open {
        let (pod, names) = (pod.clone(), names.clone());
        tasks.spawn(accept::serve_on(
            socket,
            port,
            accept::Options::named("socks5").spread(&pod.node.lanes),
            drain.clone(),
            move |stream, peer| socks5::serve(pod.clone(), names.clone(), stream, peer),
        ));
    }
}

/// What answers the pod's questions for names.
fn dns_of(pod: &Arc<Pod>) -> Arc<dns::Server<dns::PodNames>> {
    let names = dns::PodNames::new(pod.clone());
    dns::Server::new(names, pod.sockets.clone(), pod.node.upstreams.clone())
}

fn serve_dns(
    pod: &Arc<Pod>,
    tcp: Vec<Listener>,
    udp: Vec<(UdpSocket, Port)>,
    drain: &drain::Watch,
    tasks: &mut JoinSet<()>,
) {
    let server = dns_of(pod);
    for Listener { socket, port } in tcp {
        tasks.spawn(server.clone().serve_tcp(socket, port, drain.clone()));
    }
    for (socket, port) in udp {
        tasks.spawn(server.clone().serve_udp(socket, port, drain.clone()));
    }
}

/// The one workload of a tunnel of its own, in our own namespace.
pub(crate) struct Dedicated(Running);

impl Dedicated {
    /// Opens its listeners, and serves.
    ///
    /// # Errors
    /// One cannot be opened.
    pub(crate) fn start(
        node: &Arc<Node>,
        workload: LocalWorkload,
        sockets: Factory,
    ) -> Result<Self, SocketError> {
        let listeners = Listeners::open_joined(&sockets, node, Listener::unshared)?;
        let uid = workload.name.as_ref().into();
        let source = node.config.inpod.original_source;
        let pod = Pod::new(node.clone(), uid, workload, sockets, source);
        node.metrics.pods.started();
        node.metrics.pods.set(1, 0);
        Ok(Self(Running::start(pod, listeners)))
    }

    /// Serves until the drain starts.
    pub(crate) async fn run(
        self,
        published: Arc<ArcSwap<Published>>,
        mut drain: drain::Watch,
    ) -> Leaving {
        let pod = self.0.pod.clone();
        let uid = pod.uid.clone();
        published.store(Arc::new(Published {
            up: vec![pod],
            pending: Vec::new(),
        }));
        drain.started().await;
        Leaving {
            link: None,
            pods: vec![(uid, self.0)],
        }
    }
}

/// Follows the agent until the drain starts, once there is something to serve pods with; answers what still runs then.
pub(crate) async fn follow_agent(
    node: Arc<Node>,
    gate: Gate,
    published: Arc<ArcSwap<Published>>,
    mut drain: drain::Watch,
) -> Leaving {
    let held = tokio::select! {
        held = prepare::prepare(&node, &gate) => held,
        _ = drain.started() => return Leaving { link: None, pods: Vec::new() },
    };
    let socket = node.config.inpod.uds.clone();
    let metrics = node.metrics.clone();
    // Until the pods hold their identities themselves.
    let held = Mutex::new(held);
    let changed = move |pods: &Pods<Launcher>| {
        let (running, pending) = pods.counts();
        if pods.complete() {
            held.lock().clear();
        }
        metrics.pods.set(running, pending);
        published.store(Arc::new(Published {
            up: pods.running().map(|(_, _, it)| it.pod.clone()).collect(),
            pending: pods
                .pending()
                .map(|(uid, workload)| (uid.clone(), workload.clone()))
                .collect(),
        }));
    };
    let sysctl = Sysctl::open().inspect_err(
        |error| tracing::debug!(%error, "settings of pods' namespaces cannot be written"),
    );
    let launcher = Launcher {
        node,
        sysctl: sysctl.ok(),
    };
    // Where the limit cannot be read, the system will tell when it is reached.
    let files = net::socket::raise_open_files_limit().unwrap_or(u64::MAX);
    let most = reconcile::most_pods(files);
    let client = Client::new(socket, launcher, most, gate, Box::new(changed));
    let (pods, link) = client.run(drain).await;
    let alone = pods.iter().any(|(_, pod)| pod.is_alone());
    Leaving {
        link: link.filter(|_| alone),
        pods,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use net::{
        socket::SourceAddress,
        testing::{sockets_of, without_network_rights},
    };
    use tokio::runtime::Handle;

    use super::*;
    use crate::{config::OriginalSource, fixture};

    /// The rights are there when the tunnel starts, which asks for its own namespace only, and not in the pod's.
    #[tokio::test]
    async fn a_pod_that_cannot_be_shown_clients_addresses_is_not_enrolled_where_it_has_to_be() {
        let here = Handle::current();
        let node = fixture::node_with(&[("ENABLE_ORIG_SRC", "true")]);
        let launcher = Launcher { node, sysctl: None };
        // Nobody enters where they are, so that it is the right to the socket that is missing, and not to the place.
        let launched = without_network_rights(|| {
            let _here = here.enter();
            let netns = Netns::current().expect("a namespace");
            let (uid, workload) = ("uid".into(), fixture::binding());
            let launched = launcher.launch(&uid, &workload, &netns).now_or_never();
            launched.expect("nothing is waited for").map(|_| ())
        });
        let told = launched.expect_err("no right to");
        for part in ["ENABLE_ORIG_SRC is true", "CAP_NET_ADMIN", "IP_TRANSPARENT"] {
            assert!(told.contains(part), "{part} is not in {told}");
        }
    }

    #[tokio::test]
    async fn the_end_of_a_pod_closes_the_sockets_that_were_prepared_for_it() {
        let Ok(netns) = Netns::create() else {
            println!("skipped: no network namespaces here");
            return;
        };
        let node = fixture::node();
        let of_pod = node.pod_sockets(netns.clone());
        let never = OriginalSource::Never;
        let pod = Pod::new(node, "uid".into(), fixture::binding(), of_pod, never);
        // As a connection that outlives the pod by a moment has it.
        let connector = pod.connector.clone();
        let running = Running::start(pod, Listeners::default());
        let before = sockets_of(&netns);
        // Loopback is down: sockets are made, and lead nowhere.
        let nowhere = ([127, 0, 0, 1], 80).into();
        let connect = async || connector.connect(nowhere, SourceAddress::Own).await;
        for _ in 0..1000 {
            assert!(connect().await.is_err());
            if sockets_of(&netns) > before {
                break;
            }
        }
        assert!(
            sockets_of(&netns) > before,
            "connections in a row prepare some"
        );
        drop(running);
        assert_eq!(sockets_of(&netns), before);
        for _ in 0..3 {
            assert!(connect().await.is_err());
            assert_eq!(sockets_of(&netns), before, "and none are prepared any more");
        }
    }
}
