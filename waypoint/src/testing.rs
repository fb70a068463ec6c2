//! A waypoint in the test's own process, with a client that speaks HBONE to it and endpoints that it can reach.

use std::{
    collections::HashMap,
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::HeaderMap;
use mesh::{
    identity::Identity,
    l7::{
        self,
        served::{AppProtocol, Resolution, ServedService},
    },
    names::WorkloadUid,
    service::Service,
    view::Resource,
    workload::{TunnelProtocol, Workload},
};
use net::{
    hbone::{self, ConnectError, ConnectHead, ConnectRequest, Tunnel},
    testing::TestCa,
    tls::{self, Policy, WorkloadCertificate},
};
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::{
    config::Config,
    run::{Process, Running},
    snapshot::Snapshots,
};

/// Everything in a test is done by then.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// The address of the one service, `shop/web`.
pub(crate) const VIP: &str = "10.96.0.1";

/// Fails a test that waits for what does not come.
pub(crate) async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(DEADLINE, what).await.expect("in time")
}

/// A waypoint of `shop`, and who is around it.
pub(crate) struct Rig {
    pub(crate) ca: Arc<TestCa>,
    pub(crate) snapshots: Snapshots,
    pub(crate) running: Option<Running>,
    pub(crate) address: SocketAddr,
    pool: hbone::Pool,
    /// Of clients: one each, as a node has it.
    certificates: Mutex<HashMap<Identity, Arc<WorkloadCertificate>>>,
    tasks: JoinSet<()>,
}

/// The settings of a waypoint on loopback, some of them other than usual.
pub(crate) fn config(settings: &[(&str, &str)]) -> Config {
    let defaults = [
        ("POD_NAME", "wp-1"),
        ("POD_NAMESPACE", "shop"),
        ("SERVICE_ACCOUNT", "wp"),
        ("FAKE_CA", "true"),
        ("XDS_ADDRESS", ""),
        ("MINIMUM_DRAIN_DURATION", "1ms"),
        ("LEYLINE_HBONE_ADDRESS", "127.0.0.1:0"),
        ("LEYLINE_ADMIN_ADDRESS", "127.0.0.1:0"),
        ("LEYLINE_STATS_ADDRESS", "127.0.0.1:0"),
        ("LEYLINE_READINESS_ADDRESS", "127.0.0.1:0"),
    ];
    let find = |name: &str| {
        let all = settings.iter().chain(&defaults);
        let found = all.clone().find(|(key, _)| *key == name);
        found.map(|(_, text)| (*text).to_owned())
    };
    Config::from_lookup(&find).expect("good settings")
}

impl Rig {
    /// Knows nothing but itself.
    pub(crate) fn new() -> Self {
        Self::with(&[])
    }

    /// The same, with settings.
    pub(crate) fn with(settings: &[(&str, &str)]) -> Self {
        let config = config(settings);
        let ca = Arc::new(TestCa::new("cluster.local", &Policy::default()));
        let snapshots = Snapshots::new(&config.node);
        let process = Process::new(config)
            .with_issuer(ca.clone())
            .with_snapshots(snapshots.clone());
        let running = process.start().expect("the waypoint starts");
        Self {
            address: running.address(),
            running: Some(running),
            ca,
            snapshots,
            pool: hbone::Pool::new(hbone::PoolConfig::default(), TcpStream::connect),
            certificates: Mutex::default(),
            tasks: JoinSet::new(),
        }
    }

    /// Tells the waypoint of resources of its own.
    pub(crate) fn tell(&self, upserts: Vec<l7::view::Resource>) {
        self.snapshots.apply(l7::view::Update {
            upserts,
            removals: Vec::new(),
        });
    }

    /// Tells the waypoint of the mesh.
    pub(crate) fn tell_mesh(&self, upserts: Vec<Resource>) {
        self.snapshots.apply_mesh(mesh::view::Update {
            upserts,
            removals: Vec::new(),
        });
    }

    /// Serves `shop/web` at [`VIP`]: these ports, each led to the same port of the endpoints.
    pub(crate) fn serve(&self, ports: &[(u16, AppProtocol)]) {
        let mut service = service();
        service.ports = ports.iter().map(|(port, _)| (*port, *port)).collect();
        self.tell_mesh(vec![service.into()]);
        self.tell(vec![l7::view::Resource::Service(ServedService {
            service: self::service().key(),
            bound: true,
            ports: ports.iter().copied().collect(),
            resolution: Resolution::Static,
            external: false,
        })]);
    }

    /// An endpoint of the service without HBONE, at an address of its own: `port` is where its application listens.
    pub(crate) fn plain_endpoint(&self, name: &str, address: IpAddr) -> Workload {
        let uid = WorkloadUid(format!("Kubernetes//Pod/shop/{name}").into());
        let mut workload = Workload::new(uid, name.into(), "shop".into());
        workload.addresses = vec![address].into();
        workload.service_account = "web".into();
        let key = service().key();
        workload
            .services
            .insert(key, mesh::workload::PortMap::new());
        self.tell_mesh(vec![workload.clone().into()]);
        workload
    }

    /// An endpoint behind a node tunnel, which gives each CONNECT to `handler`.
    pub(crate) async fn hbone_endpoint<H, F>(&mut self, name: &str, handler: H) -> Workload
    where
        H: Fn(ConnectRequest) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (address, listener) = loopback(mesh::outbound::HBONE_PORT).await;
        let mut workload = self.plain_endpoint(name, address);
        workload.tunnel_protocol = TunnelProtocol::Hbone;
        self.tell_mesh(vec![workload.clone().into()]);
        let certificate = self.ca.certificate(&self.ca.identity("shop", "web"));
        self.tasks.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let (tls, handler) = (certificate.server_config(), handler.clone());
                serving.spawn(async move {
                    if let Ok((io, peer)) = tls::accept(tcp, tls, DEADLINE).await {
                        let config = hbone::Config::default();
                        let forever = std::future::pending();
                        let _ = hbone::serve(io, peer, &config, forever, handler, |_| {}).await;
                    }
                });
            }
        });
        workload
    }

    /// Who the waypoint is.
    pub(crate) fn identity(&self) -> Identity {
        self.ca.identity("shop", "wp")
    }

    /// The certificate that a client keeps.
    pub(crate) fn certificate(&self, client: &Identity) -> Arc<WorkloadCertificate> {
        let mut all = self.certificates.lock();
        let made = all.entry(client.clone());
        Arc::clone(made.or_insert_with(|| self.ca.certificate(client)))
    }

    /// A CONNECT of `shop/client`, which has one certificate.
    pub(crate) async fn connect(&self, authority: &str) -> Result<Tunnel, ConnectError> {
        let certificate = self.certificate(&self.ca.identity("shop", "client"));
        self.connect_with(certificate, authority, HeaderMap::new())
            .await
    }

    /// A CONNECT of anybody, with a certificate of its own.
    pub(crate) async fn connect_as(
        &self,
        client: &Identity,
        authority: &str,
        headers: HeaderMap,
    ) -> Result<Tunnel, ConnectError> {
        let certificate = self.ca.certificate(client);
        self.connect_with(certificate, authority, headers).await
    }

    async fn connect_with(
        &self,
        certificate: Arc<WorkloadCertificate>,
        authority: &str,
        headers: HeaderMap,
    ) -> Result<Tunnel, ConnectError> {
        let target = hbone::Target {
            destination: self.address,
            workload: None,
            expected: Arc::from([self.identity()]),
            certificate,
        };
        let head = ConnectHead {
            authority: authority.parse().expect("tests name a destination"),
            headers,
        };
        soon(self.pool.connect(&target, head)).await
    }
}

fn service() -> Service {
    let mut service = Service::new(
        "web".into(),
        "shop".into(),
        "web.shop.svc.cluster.local".into(),
    );
    service.vips = vec![format!("/{VIP}").parse().expect("an address")];
    service
}

/// A loopback address on which nobody has this port yet.
pub(crate) async fn loopback(port: u16) -> (IpAddr, TcpListener) {
    for _ in 0..64 {
        let [a, b, c] = rand::random::<[u8; 3]>();
        let address = IpAddr::V4(Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)));
        if let Ok(listener) = TcpListener::bind((address, port)).await {
            return (address, listener);
        }
    }
    panic!("no address of loopback has port {port} free");
}
