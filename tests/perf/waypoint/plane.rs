//! A control plane of a few lines: certificates, and whatever resources it is told to tell.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Instant,
};

use anyhow::Result;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh::{
    l7::{
        served::{AppProtocol, Resolution, ServedService},
        view,
    },
    names::WorkloadUid,
    service::Service,
    workload::{PortMap, TunnelProtocol, Workload},
};
use prost::Message as _;
use prost_types::Any;
use proto::{
    ADDRESS_TYPE_URL, WAYPOINT_TYPE_URL,
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
    workload::{Address, address::Type},
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
        aggregated_discovery_service_server::{
            AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
        },
    },
};
use tokio::{net::TcpListener, sync::broadcast};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming, body::Body, codegen::Service as _};

use crate::{
    authority::{Authority, account},
    load::{BACKEND, BACKEND_PORT, VIP},
};

type Answers = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

/// What is told of each type, and news of it.
#[derive(Clone)]
pub(crate) struct Plane(Arc<Inner>);

struct Inner {
    authority: Arc<Authority>,
    resources: Mutex<BTreeMap<&'static str, Vec<Resource>>>,
    news: broadcast::Sender<DeltaDiscoveryResponse>,
    certified: OnceLock<Instant>,
}

impl Plane {
    /// Serves on loopback; the address.
    pub(crate) async fn start(authority: Arc<Authority>) -> Result<(Self, String)> {
        let plane = Self(Arc::new(Inner {
            authority,
            resources: Mutex::default(),
            news: broadcast::Sender::new(1024),
            certified: OnceLock::new(),
        }));
        plane.keep(ADDRESS_TYPE_URL, mesh());
        plane.keep(WAYPOINT_TYPE_URL, vec![own(&served())]);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let serving = plane.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let plane = serving.clone();
                let service = service_fn(move |request| plane.clone().answer(request));
                let connection = http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service);
                tokio::spawn(connection);
            }
        });
        Ok((plane, address))
    }

    /// When the first certificate was given out.
    pub(crate) fn certified(&self) -> Option<Instant> {
        self.0.certified.get().copied()
    }

    async fn answer(
        self,
        request: http::Request<Incoming>,
    ) -> Result<http::Response<Body>, Infallible> {
        if request.uri().path().contains("IstioCertificateService") {
            let mut service = IstioCertificateServiceServer::new(self);
            return service.call(request).await;
        }
        let mut service = AggregatedDiscoveryServiceServer::new(self);
        service.call(request).await
    }

    fn keep(&self, type_url: &'static str, resources: Vec<Resource>) {
        let mut kept = self
            .0
            .resources
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let kept = kept.entry(type_url).or_default();
        let new: std::collections::HashSet<&str> =
            resources.iter().map(|it| it.name.as_str()).collect();
        kept.retain(|it| !new.contains(it.name.as_str()));
        kept.extend(resources);
    }

    /// Tells resources of the waypoint's own, to those who come and those who are there.
    pub(crate) fn tell(&self, resources: &[view::Resource]) {
        let resources: Vec<Resource> = resources.iter().map(own).collect();
        self.keep(WAYPOINT_TYPE_URL, resources.clone());
        // Nobody may be there.
        let _ = self.0.news.send(DeltaDiscoveryResponse {
            type_url: WAYPOINT_TYPE_URL.to_owned(),
            resources,
            nonce: "news".to_owned(),
            ..DeltaDiscoveryResponse::default()
        });
    }

    fn all(&self, type_url: &str) -> DeltaDiscoveryResponse {
        let kept = self
            .0
            .resources
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            resources: kept.get(type_url).cloned().unwrap_or_default(),
            nonce: "all".to_owned(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    async fn serve(
        self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        answers: tokio::sync::mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) {
        let mut news = self.0.news.subscribe();
        loop {
            let answer = tokio::select! {
                request = requests.message() => match request {
                    // An acknowledgement is no question.
                    Ok(Some(request)) if request.response_nonce.is_empty() => self.all(&request.type_url),
                    Ok(Some(request)) => {
                        if let Some(error) = request.error_detail {
                            eprintln!("the waypoint refuses what it is told: {}", error.message);
                        }
                        continue;
                    }
                    Ok(None) | Err(_) => return,
                },
                Ok(new) = news.recv() => new,
            };
            if answers.send(Ok(answer)).await.is_err() {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Plane {
    type DeltaAggregatedResourcesStream = Answers;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let (answers, outgoing) = tokio::sync::mpsc::channel(16);
        tokio::spawn(self.clone().serve(request.into_inner(), answers));
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
        Ok(Response::new(Box::pin(outgoing)))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Plane {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let request = request.into_inner();
        let chain = self.0.authority.answer(&account("waypoint"), &request.csr);
        let cert_chain = chain.map_err(|error| Status::internal(error.to_string()))?;
        self.0.certified.get_or_init(Instant::now);
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// The one service.
pub(crate) fn service() -> Service {
    let host = "web.shop.svc.cluster.local";
    let mut service = Service::new("web".into(), "shop".into(), host.into());
    service.vips = vec![format!("/{}", VIP.0).parse().expect("an address")];
    service.ports = [(VIP.1, BACKEND_PORT)].into_iter().collect();
    service
}

/// The service and its one endpoint, behind a tunnel.
fn mesh() -> Vec<Resource> {
    let service = service();
    let uid = WorkloadUid("Kubernetes//Pod/shop/web-1".into());
    let mut workload = Workload::new(uid, "web-1".into(), "shop".into());
    workload.addresses = vec![BACKEND].into();
    workload.service_account = "web".into();
    workload.tunnel_protocol = TunnelProtocol::Hbone;
    workload.services = [(service.key(), PortMap::new())].into_iter().collect();
    let address = |it| Address { r#type: Some(it) };
    vec![
        resource(
            ADDRESS_TYPE_URL,
            service.key().to_string(),
            address(Type::Service((&service).into())).encode_to_vec(),
        ),
        resource(
            ADDRESS_TYPE_URL,
            workload.uid.to_string(),
            address(Type::Workload((&workload).into())).encode_to_vec(),
        ),
    ]
}

fn served() -> view::Resource {
    view::Resource::Service(ServedService {
        service: service().key(),
        bound: true,
        ports: [(VIP.1, AppProtocol::Http)].into(),
        resolution: Resolution::Static,
        external: false,
    })
}

fn own(of: &view::Resource) -> Resource {
    let body = proto::waypoint::Resource::from(of).encode_to_vec();
    resource(WAYPOINT_TYPE_URL, of.name(), body)
}

fn resource(type_url: &str, name: String, value: Vec<u8>) -> Resource {
    Resource {
        name,
        version: "1".to_owned(),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value,
        }),
        ..Resource::default()
    }
}
