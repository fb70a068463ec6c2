//! Two nodes with one pod each, in this process: real namespaces, sockets, TLS and redirection.

pub(crate) mod network;
pub(crate) mod node;

use std::{future::Future, io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use mesh::{
    policy::{Action, AuthorizationPolicy, Clause, Match, PolicyScope, Rule, StringMatch},
    service::Service,
    view::{Removal, Resource, Update},
    workload::{TunnelProtocol, Workload},
};
use net::{
    socket::{Factory, SourceAddress},
    testing::TestCa,
    tls::{Policy, WorkloadCertificate},
};
use network::Pod;
use node::Node;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// Longest that anything here may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
pub(crate) const APP_PORT: u16 = 8080;
pub(crate) const VIP: &str = "10.96.0.7:80";

/// Pod `a` on node `a`, pod `b` on node `b`; both nodes know both pods, and the service `web` of `b`.
pub(crate) struct Rig {
    pub(crate) a: Pod,
    pub(crate) b: Pod,
    pub(crate) node_a: Node,
    pub(crate) node_b: Node,
    pub(crate) ca: Arc<TestCa>,
}

/// Makes it, or says why it cannot be made here.
pub(crate) async fn rig() -> Option<Rig> {
    rig_with(TestCa::new("cluster.local", &Policy::default()), &[]).await
}

/// The same with another CA, and more settings for both tunnels.
pub(crate) async fn rig_with(ca: TestCa, more: &[(&str, &str)]) -> Option<Rig> {
    let [a, b] = match network::two_pods() {
        Ok(pods) => pods,
        Err(reason) => {
            println!("skipped: no network namespaces here: {reason}");
            return None;
        }
    };
    let ca = Arc::new(ca);
    let node_a = Node::start_with("node-a", &ca, &a, more).await;
    let node_b = Node::start_with("node-b", &ca, &b, more).await;
    let rig = Rig {
        a,
        b,
        node_a,
        node_b,
        ca,
    };
    rig.publish(rig.known().upserts);
    Some(rig)
}

fn workload(pod: &Pod, node: &str) -> Workload {
    let uid = format!("Kubernetes//Pod/ns/{}", pod.name);
    let uid = mesh::names::WorkloadUid(uid.into());
    let mut workload = Workload::new(uid, pod.name.into(), "ns".into());
    workload.addresses = vec![pod.v4, pod.v6].into();
    workload.tunnel_protocol = TunnelProtocol::Hbone;
    workload.service_account = format!("sa-{}", pod.name).into();
    workload.node = node.into();
    workload.canonical_name = pod.name.into();
    workload.set_workload_name(pod.name.into());
    workload
}

fn web() -> Service {
    let yaml = serde_json::json!({
        "name": "web", "namespace": "ns", "hostname": "web.ns.svc.cluster.local",
        "vips": ["/10.96.0.7"], "ports": {"80": APP_PORT}, "portNames": {"80": "http"},
    });
    serde_json::from_value(yaml).expect("a service")
}

impl Rig {
    pub(crate) fn workload_a(&self) -> Workload {
        workload(&self.a, "node-a")
    }

    pub(crate) fn workload_b(&self) -> Workload {
        let mut workload = workload(&self.b, "node-b");
        workload
            .services
            .insert(web().key(), [(80, APP_PORT)].into_iter().collect());
        workload
    }

    /// What every node knows at first.
    pub(crate) fn known(&self) -> Update {
        Update {
            upserts: vec![
                Resource::Workload(self.workload_a()),
                Resource::Workload(self.workload_b()),
                Resource::Service(web()),
            ],
            removals: Vec::new(),
        }
    }

    /// Both nodes learn of it at once.
    pub(crate) fn publish(&self, resources: impl IntoIterator<Item = Resource>) {
        let update = Update {
            upserts: resources.into_iter().collect(),
            removals: Vec::new(),
        };
        for node in [&self.node_a, &self.node_b] {
            node.state.publish(update.clone());
        }
    }

    pub(crate) fn remove_policy(&self, key: &str) {
        let update = Update {
            upserts: Vec::new(),
            removals: vec![Removal::Policy(key.into())],
        };
        for node in [&self.node_a, &self.node_b] {
            node.state.publish(update.clone());
        }
    }

    /// Ends node `a`'s tunnel at once, as a crash would.
    pub(crate) async fn without_node_a(mut self) -> Self {
        self.node_a.crash().await;
        self
    }

    /// Pod `b`'s HBONE port and certificate, for a peer in place of node `b`'s tunnel, which is gone.
    pub(crate) async fn in_place_of_node_b(&mut self) -> (TcpListener, Arc<WorkloadCertificate>) {
        self.node_b.crash().await;
        let listener = listen_once_free(&self.b, ([0, 0, 0, 0], 15008).into()).await;
        (
            listener,
            self.ca.certificate(&self.ca.identity("ns", "sa-b")),
        )
    }

    /// The application of pod `b`.
    pub(crate) fn listen(&self) -> TcpListener {
        listen(&self.b, SocketAddr::new(self.b.v4, APP_PORT))
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::new(self.b.v4, APP_PORT)
    }

    /// One connection from an application in `a` to one in `b`, and both of its ends.
    pub(crate) async fn pair(&self) -> (TcpStream, TcpStream) {
        let to = self.address();
        let listener = listen_once_free(&self.b, to).await;
        let (client, server) = soon(async {
            tokio::join!(connect(&self.a, to), async {
                listener.accept().await.expect("accept").0
            })
        })
        .await;
        (client, server)
    }
}

/// As a program inside the pod would.
pub(crate) fn listen(pod: &Pod, address: SocketAddr) -> TcpListener {
    application(pod).listen(address).expect("listen")
}

/// The same on a port that somebody has just given up: a program that another test starts holds on to it for as long as
/// it takes to become that program.
pub(crate) async fn listen_once_free(pod: &Pod, address: SocketAddr) -> TcpListener {
    let sockets = application(pod);
    let waiting = async {
        loop {
            match sockets.listen(address) {
                Ok(listener) => return listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    soon(waiting).await
}

/// As a program inside the pod would.
pub(crate) async fn connect(pod: &Pod, to: SocketAddr) -> TcpStream {
    let factory = application(pod);
    let connecting = factory.connect(to, SourceAddress::Own);
    soon(connecting).await.expect("connect")
}

/// As a program would that the redirection lets pass, so that nothing stands between it and the link.
pub(crate) async fn connect_outside_the_mesh(pod: &Pod, to: SocketAddr) -> TcpStream {
    let factory = outside_the_mesh(pod);
    let connecting = factory.connect(to, SourceAddress::Own);
    soon(connecting).await.expect("connect")
}

pub(crate) fn outside_the_mesh(pod: &Pod) -> Factory {
    Factory {
        mark: Some(0x539),
        ..application(pod)
    }
}

pub(crate) fn application(pod: &Pod) -> Factory {
    Factory {
        netns: Some(pod.netns.clone()),
        ..Factory::default()
    }
}

pub(crate) async fn soon<T>(work: impl Future<Output = T>) -> T {
    let done = timeout(DEADLINE, work).await;
    done.expect("done within the deadline")
}

/// Sends bytes one way and reads them at the other end.
pub(crate) async fn passes(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    soon(from.write_all(bytes)).await.expect("write");
    let mut received = vec![0; bytes.len()];
    soon(to.read_exact(&mut received)).await.expect("read");
    assert_eq!(received, bytes);
}

/// A connection that a program in the pod opens ends with a reset, before or after it seemed to stand.
pub(crate) async fn connect_is_reset(pod: &Pod, to: SocketAddr) {
    connect_with_is_reset(&application(pod), to).await;
}

/// The same for a program that the redirection lets pass.
pub(crate) async fn connect_outside_the_mesh_is_reset(pod: &Pod, to: SocketAddr) {
    connect_with_is_reset(&outside_the_mesh(pod), to).await;
}

async fn connect_with_is_reset(factory: &Factory, to: SocketAddr) {
    match soon(factory.connect(to, SourceAddress::Own)).await {
        Ok(mut stream) => is_reset(&mut stream).await,
        Err(error) => assert_eq!(error.io_kind(), ErrorKind::ConnectionReset),
    }
}

/// Waits until something holds.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = timeout(DEADLINE, waiting).await;
    waited.unwrap_or_else(|_| panic!("not within the deadline: {what}"));
}

/// The connection ends with a reset, and not with an orderly end.
pub(crate) async fn is_reset(stream: &mut TcpStream) {
    let mut buffer = [0; 1024];
    loop {
        match soon(stream.read(&mut buffer)).await {
            Ok(0) => panic!("an orderly end, and a reset was expected"),
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                return;
            }
        }
    }
}

/// A policy for pod `b`'s namespace that matches one principal.
pub(crate) fn policy(name: &str, action: Action, principal: &str) -> AuthorizationPolicy {
    let one = Match {
        principals: vec![StringMatch::Exact(principal.into())],
        ..Match::default()
    };
    policy_of(name, action, one)
}

pub(crate) fn policy_of(name: &str, action: Action, one: Match) -> AuthorizationPolicy {
    AuthorizationPolicy {
        key: mesh::names::PolicyKey {
            namespace: "ns".into(),
            name: name.into(),
        },
        scope: PolicyScope::Namespace,
        action,
        rules: vec![Rule {
            clauses: vec![Clause { matches: vec![one] }],
        }],
        dry_run: false,
        faults: Vec::new(),
    }
}
