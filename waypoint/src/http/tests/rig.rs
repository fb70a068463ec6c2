//! A mesh with one service, a waypoint's engine in front of it, and clients.

use std::{
    collections::HashMap,
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh::{
    authority::Authority,
    flow::Party,
    l7::{
        dispatch::Target,
        name::ObjectRef,
        route::{Attachment, Callers, HttpRule, Order, Route, Rules},
        served::{AppProtocol, Resolution, ServedService},
        via::Via,
        view,
    },
    names::{NamespacedHostname, Str, WorkloadUid},
    service::Service,
    view::{Resource, Update},
    workload::{Health, Workload},
};
use net::{
    ca::{Certificates, CertificatesConfig},
    clock::SystemClock,
    testing::TestCa,
    tls::{self, PeerIdentity},
};
use tokio::{
    io::DuplexStream,
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

use super::super::{body::BodyError, filter::mirror::MAX_MIRRORS, serve};
use crate::{
    Config, connection::Connection, detect::HttpVersion, run::assemble, snapshot::Snapshots,
    testing::soon, waypoint::Waypoint,
};

pub(crate) type AnyBody = BoxBody<Bytes, BodyError>;

pub(crate) fn full(text: impl Into<Bytes>) -> AnyBody {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed()
}

/// The service that the tests address.
pub(crate) const SERVICE: &str = "demo/echo.demo.svc.cluster.local";
pub(crate) const PORT: u16 = 80;

/// A backend on loopback.
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    /// Connections that it accepted.
    pub(crate) connections: Arc<AtomicU32>,
    /// Requests that it got.
    pub(crate) requests: Arc<AtomicU32>,
}

impl Backend {
    /// A backend that answers by `answer`.
    pub(crate) async fn start<F, A>(version: Version, answer: F) -> Self
    where
        F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, requests) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
        let counted = (Arc::clone(&connections), Arc::clone(&requests));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.0.fetch_add(1, Ordering::SeqCst);
                let (answer, requests) = (answer.clone(), Arc::clone(&counted.1));
                let service = service_fn(move |request| {
                    requests.fetch_add(1, Ordering::SeqCst);
                    let answer = answer(request);
                    async move { Ok::<_, BodyError>(answer.await) }
                });
                tokio::spawn(serve_backend(stream, version, service));
            }
        });
        Self {
            address,
            connections,
            requests,
        }
    }

    /// A backend that tells `name` and what it was asked in headers.
    pub(crate) async fn echo(version: Version, name: &'static str) -> Self {
        Self::start(
            version,
            move |request| async move { echo(name, request).await },
        )
        .await
    }

    /// Connections are handed to `handle` as they are.
    pub(crate) async fn raw<F, A>(handle: F) -> Self
    where
        F: Fn(TcpStream) -> A + Send + Sync + 'static,
        A: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<AtomicU32>::default();
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(handle(stream));
            }
        });
        Self {
            address,
            connections,
            requests: Arc::default(),
        }
    }

    pub(crate) fn connections(&self) -> u32 {
        self.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> u32 {
        self.requests.load(Ordering::SeqCst)
    }
}

async fn serve_backend<S, F>(stream: TcpStream, version: Version, service: S)
where
    S: hyper::service::Service<
            Request<Incoming>,
            Response = Response<AnyBody>,
            Error = BodyError,
            Future = F,
        > + Send
        + 'static,
    F: Future<Output = Result<Response<AnyBody>, BodyError>> + Send + 'static,
{
    let io = TokioIo::new(stream);
    // A client that goes away is no failure of a test.
    let _ = match version {
        Version::HTTP_2 => {
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .enable_connect_protocol()
                .serve_connection(io, service)
                .await
        }
        _ => {
            hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(io, service)
                .with_upgrades()
                .await
        }
    };
}

/// What a backend saw, told in its response.
async fn echo(name: &'static str, request: Request<Incoming>) -> Response<AnyBody> {
    let (parts, body) = request.into_parts();
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned();
    let mut response = Response::builder()
        .header("x-backend", name)
        .header("x-method", parts.method.as_str())
        .header("x-target", parts.uri.to_string())
        .header("x-version", format!("{:?}", parts.version));
    for (name, value) in &parts.headers {
        response = response.header(format!("x-got-{name}"), value);
    }
    for (name, value) in trailers.iter().flatten() {
        response = response.header(format!("x-got-trailer-{name}"), value);
    }
    response.body(full(collected.to_bytes())).unwrap()
}

/// A waypoint's engine and what it knows.
pub(crate) struct Rig {
    /// Its metrics.
    pub(crate) registry: Arc<prometheus_client::registry::Registry>,
    pub(crate) waypoint: Arc<Waypoint>,
    pub(crate) target: NamespacedHostname,
}

/// A client of HTTP.
pub(crate) enum Client {
    Http1(http1::SendRequest<AnyBody>),
    Http2(http2::SendRequest<AnyBody>),
}

impl Client {
    async fn over(stream: DuplexStream, version: Version) -> Self {
        let io = TokioIo::new(stream);
        if version == Version::HTTP_2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            return Self::Http2(sender);
        }
        let (sender, connection) = http1::handshake(io).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self::Http1(sender)
    }

    pub(crate) async fn send(&mut self, request: Request<AnyBody>) -> Response<Incoming> {
        self.try_send(request).await.unwrap()
    }

    pub(crate) async fn try_send(
        &mut self,
        request: Request<AnyBody>,
    ) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => sender.clone().send_request(request).await,
        }
    }

    /// `GET path`.
    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        let request = self.request("GET", path);
        Answer::of(self.send(request.body(full("")).unwrap()).await).await
    }

    /// A request with the host that the tests use.
    pub(crate) fn request(&self, method: &str, path: &str) -> http::request::Builder {
        let builder = Request::builder().method(method);
        match self {
            Self::Http1(_) => builder.uri(path).header("host", "echo"),
            Self::Http2(_) => builder.uri(format!("http://echo{path}")),
        }
    }
}

/// A response that was read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<http::HeaderMap>,
}

impl Answer {
    pub(crate) async fn of(response: Response<Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let collected = body.collect().await.unwrap();
        Self {
            status: parts.status,
            headers: parts.headers,
            trailers: collected.trailers().cloned(),
            body: collected.to_bytes(),
        }
    }

    /// A header, or the empty text.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |it| it.to_str().unwrap())
    }
}

impl Rig {
    /// A service whose port is declared to speak `version`, with these endpoints.
    pub(crate) async fn new(version: Version, backends: &[&Backend]) -> Self {
        let protocol = match version {
            Version::HTTP_2 => AppProtocol::Http2,
            _ => AppProtocol::Http,
        };
        let rig = Self::empty().await;
        rig.serve(SERVICE, protocol, backends);
        rig
    }

    /// A waypoint that knows nothing.
    pub(crate) async fn empty() -> Self {
        Self::logging(None).await
    }

    /// The same, with access logs to the output of `logs`.
    pub(crate) async fn logging(logs: Option<net::log::Handle>) -> Self {
        let pod = [
            ("POD_NAME", "wp-1"),
            ("POD_NAMESPACE", "demo"),
            ("SERVICE_ACCOUNT", "waypoint"),
        ];
        let map: HashMap<_, _> = pod.into_iter().collect();
        let config = Config::from_lookup(&|name| map.get(name).map(|it| (*it).to_owned()));
        let config = Arc::new(config.unwrap());
        let clock = Arc::new(SystemClock);
        let policy = tls::Policy::new(
            tls::Versions::Tls12And13,
            tls::KeyExchange::Default,
            clock.clone(),
        );
        let ca = Arc::new(TestCa::new("cluster.local", &policy));
        let certificates = Certificates::new(ca, clock, CertificatesConfig::default());
        let snapshots = Snapshots::new(&config.node);
        let mut registry = prometheus_client::registry::Registry::default();
        let waypoint = assemble(config, snapshots, certificates, logs, &mut registry);
        Self {
            registry: Arc::new(registry),
            waypoint,
            target: SERVICE.parse().unwrap(),
        }
    }

    /// Adds a service with one port, and its endpoints.
    pub(crate) fn serve(&self, key: &str, protocol: AppProtocol, backends: &[&Backend]) {
        let key: NamespacedHostname = key.parse().unwrap();
        let name: Str = key.hostname.split('.').next().unwrap().into();
        let mut service = Service::new(name.clone(), key.namespace.clone(), key.hostname.clone());
        service.ports = [(PORT, 1)].into_iter().collect();
        service.vips = vec!["/10.1.0.1".parse().unwrap()];
        let mut upserts: Vec<Resource> = vec![service.into()];
        for (at, backend) in backends.iter().enumerate() {
            let name = format!("{name}-{at}");
            let uid = WorkloadUid(format!("Kubernetes//Pod/{}/{name}", key.namespace).into());
            let mut workload = Workload::new(uid, name.into(), key.namespace.clone());
            workload.addresses = vec![backend.address.ip()].into();
            let ports = [(PORT, backend.address.port())].into_iter().collect();
            workload.services = [(key.clone(), ports)].into_iter().collect();
            upserts.push(workload.into());
        }
        self.waypoint.snapshots.apply_mesh(Update {
            upserts,
            removals: Vec::new(),
        });
        self.tell([view::Resource::Service(ServedService {
            service: key,
            bound: true,
            ports: [(PORT, protocol)].into(),
            resolution: Resolution::Static,
            external: false,
        })]);
    }

    /// Tells the waypoint how the service's endpoints are.
    pub(crate) fn health(&self, status: Health) {
        let mesh = self.waypoint.snapshots.load().mesh.clone();
        let endpoints = mesh.endpoints(&self.target);
        let upserts = endpoints.iter().map(|endpoint| {
            let mut workload = (*endpoint.workload).clone();
            workload.status = status;
            workload.into()
        });
        self.waypoint.snapshots.apply_mesh(Update {
            upserts: upserts.collect(),
            removals: Vec::new(),
        });
    }

    /// Tells the waypoint of resources of its own.
    pub(crate) fn tell(&self, upserts: impl IntoIterator<Item = view::Resource>) {
        self.waypoint.snapshots.apply(view::Update {
            upserts: upserts.into_iter().collect(),
            removals: Vec::new(),
        });
    }

    /// Attaches rules to the service that the tests address.
    pub(crate) fn route(&self, rules: Vec<HttpRule>) {
        self.tell([view::Resource::Route(Route {
            key: ObjectRef {
                kind: "HTTPRoute".into(),
                namespace: "demo".into(),
                name: "route".into(),
            },
            created: 0,
            attachments: vec![Attachment {
                service: self.target.clone(),
                port: None,
                callers: Callers::All,
            }],
            rules: Rules::Http {
                order: Order::Precedence,
                rules,
            },
        })]);
    }

    /// Resolves when no copy of a request is underway.
    pub(crate) async fn copied(&self) {
        let most = u32::try_from(MAX_MIRRORS).unwrap();
        let all = self.waypoint.http.mirrors.acquire_many(most);
        drop(soon(all).await.unwrap());
    }

    fn connection(&self) -> Arc<Connection> {
        let snapshot = self.waypoint.snapshots.load();
        let service = snapshot.mesh.service(&self.target).unwrap();
        let served = snapshot.l7.service(&self.target).unwrap();
        let destination: SocketAddr = "10.1.0.1:80".parse().unwrap();
        Arc::new(Connection {
            waypoint: Arc::clone(&self.waypoint),
            accepted: std::time::Instant::now(),
            client: "10.0.0.9:4000".parse().unwrap(),
            peer: Arc::new(PeerIdentity {
                identity: "spiffe://cluster.local/ns/web/sa/client".parse().unwrap(),
                not_after: std::time::SystemTime::now() + std::time::Duration::from_secs(3600),
                chain: Arc::from([]),
            }),
            authority: Authority::address(destination.ip(), PORT),
            target: Target::Service {
                service: Arc::clone(service),
                served: Arc::clone(served),
                port: PORT,
                protocol: served.ports[&PORT],
                address: Some(destination.ip()),
            },
            service: Some(self.target.clone()),
            destination,
            trace: None,
            passed_waypoint: false,
            via: Via::default().onward(&self.target),
            subset: None,
            source: Party::default(),
        })
    }

    /// The other end of a connection that is served.
    pub(crate) fn dial(&self, version: Version) -> DuplexStream {
        self.dial_until(version).0
    }

    /// The same, and what begins the drain.
    pub(crate) fn dial_until(&self, version: Version) -> (DuplexStream, net::drain::Trigger) {
        let (client, server) = tokio::io::duplex(256 * 1024);
        let version = match version {
            Version::HTTP_2 => HttpVersion::Http2,
            _ => HttpVersion::Http1,
        };
        let (trigger, watch) = net::drain::channel();
        let connection = self.connection();
        let kept = trigger.clone();
        tokio::spawn(async move {
            serve(server, version, connection, watch).await;
            drop(kept);
        });
        (client, trigger)
    }

    /// A client of this version.
    pub(crate) async fn client(&self, version: Version) -> Client {
        Client::over(self.dial(version), version).await
    }

    /// The same, and what breaks its connection off.
    pub(crate) async fn client_that_may_go(&self, version: Version) -> (Client, AbortHandle) {
        let (near, mut far) = tokio::io::duplex(256 * 1024);
        let mut served = self.dial(version);
        let carrying = tokio::spawn(async move {
            let _ = tokio::io::copy_bidirectional(&mut far, &mut served).await;
        });
        (Client::over(near, version).await, carrying.abort_handle())
    }
}
