//! Hours of rotation on a virtual clock: two nodes, each with its own certificates, talk all the time while the CA
//! changes under them.

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use mesh::identity::Identity;
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::{
    clock::{Clock, TestClock},
    hbone::{self, Client, ConnectHead, ConnectRequest, Tunnel, serve},
    testing::TestCa,
    tls::{self, KeyExchange, PeerIdentity, Policy, TrustBundle, Versions},
};

const MINUTE: Duration = Duration::from_secs(60);
/// How long a leaf lives.
const LIFE: Duration = Duration::from_secs(3600);
/// Between two new connections.
const STEP: Duration = Duration::from_secs(5 * 60);

/// How the CA signs now.
struct Signing {
    signer: Arc<TestCa>,
    /// Above the leaf, without the root.
    chain: Vec<CertificateDer<'static>>,
    trust: TrustBundle,
    down: bool,
    asked: usize,
}

#[derive(Clone)]
struct Ca {
    signing: Arc<Mutex<Signing>>,
    policy: Policy,
}

impl Issuer for Ca {
    fn issue(&self, identity: Identity) -> Issuing {
        let mut signing = self.signing.lock();
        signing.asked += 1;
        let issued = if signing.down {
            let after = Duration::from_secs(10);
            Err(Arc::new(IssueError::Late { after }))
        } else {
            let (leaf, key) = signing.signer.sign(&signing.signer.leaf(&identity));
            let chain = [&[leaf][..], &signing.chain].concat();
            let made = WorkloadCertificate::new(&self.policy, chain, key, signing.trust.clone());
            Ok(made.expect("leaf, key and roots fit"))
        };
        Box::pin(async move { issued })
    }
}

/// A node with one pod.
struct Node {
    certificates: Certificates,
    identity: Identity,
}

impl Node {
    fn new(ca: &Ca, identity: Identity) -> Self {
        let clock = Arc::clone(ca.policy.clock());
        let config = CertificatesConfig::default();
        Self {
            certificates: Certificates::new(Arc::new(ca.clone()), clock, config),
            identity,
        }
    }

    /// As the proxies get it for each connection.
    async fn certificate(&self) -> Result<Arc<WorkloadCertificate>, String> {
        let fetched = self.certificates.fetch(&self.identity, Priority::RealTime);
        fetched.await.map_err(|error| error.to_string())
    }
}

struct World {
    ca: Ca,
    root: Arc<TestCa>,
    client: Node,
    server: Node,
    /// The servers' ends of connections.
    serving: Mutex<JoinSet<()>>,
}

fn new_root(policy: &Policy) -> Arc<TestCa> {
    Arc::new(TestCa::new("cluster.local", policy).with_lifetime(LIFE))
}

fn trust(roots: &[&TestCa]) -> TrustBundle {
    let pem: String = roots.iter().map(|root| root.root_pem()).collect();
    let domain = "cluster.local".parse().expect("a trust domain");
    TrustBundle::from_pem(domain, pem.as_bytes()).expect("roots")
}

impl World {
    fn new() -> Self {
        let clock: Arc<dyn Clock> = TestClock::new(SystemTime::now());
        let policy = Policy::new(Versions::Tls13, KeyExchange::Default, clock);
        let root = new_root(&policy);
        let signing = Signing {
            signer: Arc::clone(&root),
            chain: Vec::new(),
            trust: root.trust(),
            down: false,
            asked: 0,
        };
        let ca = Ca {
            signing: Arc::new(Mutex::new(signing)),
            policy,
        };
        Self {
            client: Node::new(&ca, root.identity("a", "client")),
            server: Node::new(&ca, root.identity("b", "server")),
            serving: Mutex::default(),
            root,
            ca,
        }
    }

    fn change(&self, change: impl FnOnce(&mut Signing)) {
        change(&mut self.ca.signing.lock());
    }

    /// A new connection, on which bytes have passed.
    async fn connect(&self) -> Result<Tunnel, String> {
        let certificate = self.client.certificate().await?;
        self.connect_as(&certificate).await
    }

    async fn connect_as(&self, certificate: &WorkloadCertificate) -> Result<Tunnel, String> {
        let text = |error: &dyn std::fmt::Debug| format!("{error:?}");
        let (near, far) = duplex(64 << 10);
        let serving = answer(far, self.server.certificate().await?);
        self.serving.lock().spawn(serving);
        let expected = Arc::from([self.server.identity.clone()]);
        let tls = tls::connect(near, certificate.client_config(&expected), MINUTE).await;
        let (io, peer) = tls.map_err(|error| text(&error))?;
        let config = hbone::Config::default();
        let opened = Client::handshake(io, peer, &config).await;
        let (client, driver) = opened.map_err(|error| text(&error))?;
        self.serving.lock().spawn(driver);
        let head = ConnectHead {
            authority: "10.0.0.1:80".parse().expect("an authority"),
            headers: HeaderMap::new(),
        };
        let tunnel = client.connect(head, MINUTE).await;
        let mut tunnel = tunnel.map_err(|error| text(&error))?;
        echoes(&mut tunnel).await?;
        Ok(tunnel)
    }

    /// Connects anew every [`STEP`]; each must succeed.
    async fn talk_for(&self, time: Duration) {
        for step in 0..time.as_secs() / STEP.as_secs() {
            if let Err(error) = self.connect().await {
                panic!("connection {step}: {error}");
            }
            sleep(STEP).await;
        }
    }

    fn asked(&self) -> usize {
        self.ca.signing.lock().asked
    }
}

async fn answer(io: DuplexStream, certificate: Arc<WorkloadCertificate>) {
    let accepting = TlsAcceptor::from(certificate.server_config()).accept(io);
    let Ok(io) = accepting.await else { return };
    let peer = PeerIdentity {
        identity: certificate.identity().clone(),
        not_after: certificate.not_after(),
        chain: Arc::from([]),
    };
    // How it ends, the client sees.
    let _ = serve(io, peer, &hbone::Config::default(), pending(), echo, |_| {}).await;
}

async fn echo(request: ConnectRequest) {
    let Ok(stream) = request.accept(HeaderMap::new()) else {
        return;
    };
    let (mut send, mut recv) = stream.into_halves();
    let _ = tokio::io::copy(&mut recv, &mut send).await;
}

async fn echoes(tunnel: &mut Tunnel) -> Result<(), String> {
    let mut back = [0; 5];
    let exchange = async {
        tunnel.stream.write_all(b"hello").await?;
        tunnel.stream.read_exact(&mut back).await
    };
    exchange.await.map_err(|error| format!("{error:?}"))?;
    assert_eq!(&back, b"hello");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn leaves_rotate_for_hours_without_a_refused_or_cut_connection() {
    let world = World::new();
    let mut old = world.connect().await.unwrap();
    world.talk_for(8 * LIFE).await;
    echoes(&mut old).await.unwrap();
    // Two identities, each renewed at about half of a life.
    let asked = world.asked();
    assert!((2 * 12..=2 * 20).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn an_intermediate_is_replaced_under_running_traffic() {
    let world = World::new();
    let install = |intermediate: TestCa| {
        world.change(|signing| {
            signing.chain = vec![intermediate.own()];
            signing.signer = Arc::new(intermediate);
        });
    };
    world.talk_for(LIFE).await;
    let mut old = world.connect().await.unwrap();
    for _ in 0..3 {
        install(world.root.intermediate(24 * LIFE));
        world.talk_for(2 * LIFE).await;
    }
    echoes(&mut old).await.unwrap();
}

/// A CA that signs for longer than its own certificate lives: what counts is what peers accept.
#[tokio::test(start_paused = true)]
async fn a_leaf_is_renewed_before_the_intermediate_above_it_ends() {
    let world = World::new();
    let short = world.root.intermediate(LIFE / 4);
    world.change(|signing| {
        signing.chain = vec![short.own()];
        signing.signer = Arc::new(short);
    });
    world.connect().await.unwrap();
    let next = world.root.intermediate(24 * LIFE);
    world.change(|signing| {
        signing.chain = vec![next.own()];
        signing.signer = Arc::new(next);
    });
    world.talk_for(2 * LIFE).await;
}

#[tokio::test(start_paused = true)]
async fn a_root_is_replaced_in_three_steps_under_running_traffic() {
    let world = World::new();
    let new = new_root(&world.ca.policy);
    let mut old = world.connect().await.unwrap();
    world.talk_for(LIFE).await;
    // Both are trusted before the new one signs, and the old one is dropped when nothing of it is left.
    world.change(|signing| signing.trust = trust(&[&world.root, &new]));
    world.talk_for(2 * LIFE).await;
    world.change(|signing| signing.signer = Arc::clone(&new));
    world.talk_for(2 * LIFE).await;
    world.change(|signing| signing.trust = new.trust());
    world.talk_for(2 * LIFE).await;
    echoes(&mut old).await.unwrap();

    let (leaf, key) = world.root.sign(&world.root.leaf(&world.client.identity));
    let both = trust(&[&world.root, &new]);
    let stale = WorkloadCertificate::new(&world.ca.policy, vec![leaf], key, both).unwrap();
    let refused = world.connect_as(&stale).await.unwrap_err();
    assert!(
        refused.contains("Alert") || refused.contains("alert"),
        "{refused}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_root_that_is_swapped_at_once_heals_as_soon_as_all_renew() {
    let world = World::new();
    let new = new_root(&world.ca.policy);
    let mut old = world.connect().await.unwrap();
    world.change(|signing| {
        signing.signer = Arc::clone(&new);
        signing.trust = new.trust();
    });
    world.client.certificates.renew_all();
    sleep(MINUTE).await;
    // One end trusts the new root, the other still has the old one: refused, and never let through.
    assert!(world.connect().await.is_err());
    world.server.certificates.renew_all();
    sleep(MINUTE).await;
    world.talk_for(LIFE).await;
    echoes(&mut old).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_ca_that_is_down_for_a_whole_life_refuses_new_connections_and_heals() {
    let world = World::new();
    let mut old = world.connect().await.unwrap();
    world.change(|signing| signing.down = true);
    let before = world.asked();
    // What there is serves until it ends.
    world.talk_for(LIFE - STEP).await;
    sleep(LIFE).await;
    for node in [&world.client, &world.server] {
        assert!(node.certificates.current(&node.identity).is_none());
        assert!(node.certificate().await.is_err());
    }
    assert!(world.connect().await.is_err());
    echoes(&mut old).await.unwrap();
    // Slowly while there is something, every 15 seconds without: two identities, two hours.
    let asked = world.asked() - before;
    assert!((20..1_000).contains(&asked), "{asked}");

    world.change(|signing| signing.down = false);
    sleep(MINUTE).await;
    world.talk_for(2 * LIFE).await;
    echoes(&mut old).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_end_whose_certificate_has_expired_is_refused_by_the_other() {
    let world = World::new();
    world.connect().await.unwrap();
    let expired = world.client.certificate().await.unwrap();
    world.talk_for(LIFE + STEP).await;
    assert!(!expired.is_valid());
    assert!(world.connect_as(&expired).await.is_err());
    world.connect().await.unwrap();
}
