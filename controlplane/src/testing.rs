//! What the tests of several modules need: a control plane over made-up facts, and clients for it.

pub(crate) mod api;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh::{identity::TrustDomain, names::Str};
use net::{accept, drain};
use parking_lot::Mutex;
use prost::Message as _;
use prost_types::{Struct, Value, value::Kind};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
        istio_certificate_service_server::IstioCertificateServiceServer,
    },
    workload::{Address, Service, Workload, address},
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    xds_core::Node,
};
use rcgen::{CertificateParams, KeyPair, PublicKeyData as _};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::TlsConnector;
use tonic::{Request, Status, Streaming, transport::Channel};

use crate::{
    auth::{Authentication, Jwks},
    ca::{self, CertificateService, Current, impersonate::Pods, serving::ServingCertificate},
    clusters::{Clusters, Members},
    config::ServiceAccount,
    metrics::Metrics,
    object::Name,
    output::{Changes, GatewayProxy, PodFacts, Resource, ResourceKey},
    serve::{DiscoveryService, Limits, MAX_AGE, access::Access, registry::Registry, store::Store},
    tls::{self, Services},
};

pub(crate) const NAME: &str = "istiod.istio-system.svc";
/// Nothing in these tests takes this long; what does is broken.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A key that signs tokens, and the file that publishes it.
pub(crate) struct Issuer {
    pub(crate) dir: TempDir,
    key: KeyPair,
}

impl Issuer {
    pub(crate) fn new() -> Self {
        let issuer = Self {
            dir: tempfile::tempdir().unwrap(),
            key: KeyPair::generate().unwrap(),
        };
        std::fs::write(issuer.path(), issuer.jwks()).unwrap();
        issuer
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("jwks.json")
    }

    fn id(&self) -> String {
        let print = digest::digest(&digest::SHA256, self.key.der_bytes());
        URL_SAFE_NO_PAD.encode(print)
    }

    pub(crate) fn jwks(&self) -> String {
        let point = self.key.der_bytes();
        let (x, y) = point[1..].split_at(32);
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        let key = json!({"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.id(), "x": x, "y": y});
        json!({"keys": [key]}).to_string()
    }

    pub(crate) fn sign(&self, claims: &serde_json::Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.id());
        let key = EncodingKey::from_ec_pem(self.key.serialize_pem().as_bytes()).unwrap();
        jsonwebtoken::encode(&header, claims, &key).unwrap()
    }

    /// A token as the API server would bind it to a pod.
    pub(crate) fn token(&self, namespace: &str, account: &str, pod: &str) -> String {
        self.sign(&claims(namespace, account, pod))
    }
}

/// Claims of a valid token; tests spoil one of them.
pub(crate) fn claims(namespace: &str, account: &str, pod: &str) -> serde_json::Value {
    let now = jsonwebtoken::get_current_timestamp();
    json!({
        "aud": ["istio-ca"],
        "iss": "https://kubernetes.default.svc",
        "iat": now,
        "nbf": now,
        "exp": now + 3600,
        "sub": format!("system:serviceaccount:{namespace}:{account}"),
        "kubernetes.io": {
            "namespace": namespace,
            "serviceaccount": {"name": account, "uid": "sa-uid"},
            "pod": {"name": pod, "uid": format!("{pod}-uid")},
        },
    })
}

/// Pods as a test puts them.
#[derive(Debug, Default)]
pub(crate) struct FakePods(
    pub(crate) Mutex<HashMap<String, PodFacts>>,
    pub(crate) tokio::sync::watch::Sender<()>,
);

impl FakePods {
    pub(crate) fn put(&self, namespace: &str, name: &str, account: &str, node: &str) {
        let facts = PodFacts {
            uid: format!("{name}-uid").into(),
            namespace: namespace.into(),
            name: name.into(),
            service_account: account.into(),
            node: node.into(),
        };
        self.0.lock().insert(facts.uid.to_string(), facts);
        self.1.send_replace(());
    }
}

impl Pods for FakePods {
    fn pod_by_uid(&self, uid: &str) -> Option<PodFacts> {
        self.0.lock().get(uid).cloned()
    }

    fn changed(&self) -> tokio::sync::watch::Receiver<()> {
        self.1.subscribe()
    }

    fn runs_on_node(&self, node: &str, namespace: &str, account: &str) -> bool {
        self.0.lock().values().any(|pod| {
            &*pod.node == node && &*pod.namespace == namespace && &*pod.service_account == account
        })
    }
}

/// A control plane over a store and pods that the test fills.
pub(crate) struct Plane {
    pub(crate) issuer: Issuer,
    pub(crate) store: Arc<Store>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) pods: Arc<FakePods>,
    pub(crate) authority: Arc<Current>,
    pub(crate) address: SocketAddr,
    pub(crate) drain: drain::Trigger,
    pub(crate) ca_dir: TempDir,
    /// Other clusters.
    pub(crate) members: watch::Sender<Members>,
}

impl Plane {
    pub(crate) async fn start() -> Self {
        Self::with(tempfile::tempdir().unwrap()).await
    }

    /// With the authority in this folder, made if it is not there.
    pub(crate) async fn with(ca_dir: TempDir) -> Self {
        let trust_domain = TrustDomain::default();
        let authority = ca::disk::load_or_create(ca_dir.path(), &trust_domain).unwrap();
        let authority = Current::new(authority);
        let issuer = Issuer::new();
        let metrics = Metrics::new();
        let registry = Registry::new(metrics.clone());
        let (store, pods) = (Arc::new(Store::default()), Arc::new(FakePods::default()));
        let jwks = Jwks::open(issuer.path(), vec!["istio-ca".to_owned()]).unwrap();
        let (members, others) = watch::channel(Members::new());
        let clusters = Clusters::new("Kubernetes", others);
        let authentication = Authentication {
            trust_domain: trust_domain.clone(),
            tokens: Some(Arc::new(jwks)),
            clusters: clusters.clone(),
        };
        let node: ServiceAccount = "istio-system/ztunnel".parse().unwrap();
        let gateway = |account: &ServiceAccount, _: Option<&str>| {
            let is_waypoint = account.to_string() == "shop/waypoint";
            is_waypoint.then(|| GatewayProxy {
                gateway: Name::new("shop", "waypoint"),
                confined: false,
            })
        };
        let access = Access::new(&[node], clusters, gateway);
        let (trigger, draining) = drain::channel();
        let discovery = DiscoveryService::new(
            store.clone(),
            registry.clone(),
            authentication.clone(),
            access.clone(),
            Limits {
                streams_per_second: 1000,
                max_age: MAX_AGE,
            },
            metrics.clone(),
            draining.clone(),
        );
        let certificates = CertificateService {
            authority: authority.clone(),
            authentication,
            access,
            pods: pods.clone(),
            trust_domain,
            metrics: metrics.clone(),
        };
        let services = Services {
            discovery,
            certificates: IstioCertificateServiceServer::new(certificates),
        };
        let serving = ServingCertificate::issue(authority.clone(), vec![NAME.to_owned()]).unwrap();
        let acceptor = tls::Acceptor::new(authority.clone(), Arc::new(serving)).unwrap();
        let acceptor = Arc::new(acceptor);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = draining.clone();
        let accepting = accept::serve(
            listener,
            accept::Options::named("test"),
            draining,
            move |stream, peer| {
                let (acceptor, services) = (acceptor.current(), services.clone());
                tls::serve(stream, peer, acceptor, services, connections.clone())
            },
        );
        tokio::spawn(accepting);
        Self {
            issuer,
            store,
            registry,
            metrics,
            pods,
            authority,
            address,
            drain: trigger,
            ca_dir,
            members,
        }
    }

    /// A channel that trusts the control plane's root and shows a certificate, if given one.
    pub(crate) async fn channel(&self, own: Option<OwnCertificate>) -> Channel {
        channel(
            self.address,
            self.authority.load().root_store().unwrap(),
            own,
        )
        .await
        .unwrap()
    }

    /// The token of the node tunnel on a node.
    pub(crate) fn node_token(&self) -> String {
        self.issuer.token("istio-system", "ztunnel", "ztunnel-1")
    }

    /// An xDS stream of the node tunnel `ztunnel-1`.
    pub(crate) async fn subscriber(&self) -> Subscriber {
        self.subscriber_as(&self.node_token()).await.unwrap()
    }

    pub(crate) async fn subscriber_as(&self, token: &str) -> Result<Subscriber, Status> {
        let channel = self.channel(None).await;
        Subscriber::open(channel, token).await
    }

    /// Asks for a certificate.
    pub(crate) async fn certificate(
        &self,
        token: &str,
        request: IstioCertificateRequest,
    ) -> Result<Vec<String>, Status> {
        let mut client = IstioCertificateServiceClient::new(self.channel(None).await);
        let response = client.create_certificate(bearer(request, token)).await?;
        Ok(response.into_inner().cert_chain)
    }

    pub(crate) fn apply(&self, upserts: &[Arc<Resource>], removals: &[&Arc<Resource>]) {
        self.store.apply(&changes(upserts, removals));
    }
}

pub(crate) type OwnCertificate = (
    Vec<rustls::pki_types::CertificateDer<'static>>,
    rustls::pki_types::PrivateKeyDer<'static>,
);

pub(crate) async fn channel(
    address: SocketAddr,
    roots: RootCertStore,
    own: Option<OwnCertificate>,
) -> Result<Channel, tonic::transport::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match own {
        None => config.with_no_client_auth(),
        Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{NAME}")).unwrap();
    endpoint
        .connect_with_connector(tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from(NAME).unwrap();
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
            }
        }))
        .await
}

pub(crate) fn bearer<T>(message: T, token: &str) -> Request<T> {
    bearer_of(message, token, None)
}

/// As [`bearer`], from a proxy that names its cluster.
pub(crate) fn bearer_of<T>(message: T, token: &str, cluster: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(cluster) = cluster {
        let cluster = tonic::metadata::MetadataValue::try_from(cluster.as_bytes()).unwrap();
        request.metadata_mut().insert("clusterid", cluster);
    }
    if !token.is_empty() {
        let value = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    request
}

/// A request for a certificate with a new key.
pub(crate) fn csr(impersonated: Option<&str>) -> IstioCertificateRequest {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    IstioCertificateRequest {
        csr: csr.pem().unwrap(),
        validity_duration: 0,
        metadata: impersonated.map(|id| texts(&[("ImpersonatedIdentity", id)])),
    }
}

pub(crate) fn texts(pairs: &[(&str, &str)]) -> Struct {
    let value = |text: &str| Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let fields = pairs
        .iter()
        .map(|(key, text)| ((*key).to_owned(), value(text)));
    Struct {
        fields: fields.collect::<BTreeMap<_, _>>(),
    }
}

/// One xDS stream, driven by hand.
pub(crate) struct Subscriber {
    requests: Option<tokio::sync::mpsc::UnboundedSender<DeltaDiscoveryRequest>>,
    responses: Streaming<DeltaDiscoveryResponse>,
    pub(crate) node: Option<Node>,
}

impl Subscriber {
    pub(crate) async fn open(channel: Channel, token: &str) -> Result<Self, Status> {
        Self::open_of(channel, token, None).await
    }

    /// As [`Subscriber::open`], from a proxy that names its cluster.
    pub(crate) async fn open_of(
        channel: Channel,
        token: &str,
        cluster: Option<&str>,
    ) -> Result<Self, Status> {
        let (requests, receiver) = tokio::sync::mpsc::unbounded_channel();
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(256 << 20);
        let stream = tokio_stream::wrappers::UnboundedReceiverStream::new(receiver);
        let response = client
            .delta_aggregated_resources(bearer_of(stream, token, cluster))
            .await?;
        Ok(Self {
            requests: Some(requests),
            responses: response.into_inner(),
            node: Some(node()),
        })
    }

    /// Sends a request; the first one carries the node.
    pub(crate) fn send(&mut self, type_url: &str, request: DeltaDiscoveryRequest) {
        let request = DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            node: self.node.take(),
            ..request
        };
        let requests = self.requests.as_ref().expect("not closed");
        requests.send(request).unwrap();
    }

    /// Sends no more.
    pub(crate) fn close(&mut self) {
        self.requests = None;
    }

    pub(crate) fn subscribe(&mut self, type_url: &str, names: &[&str], not: &[&str]) {
        self.send(
            type_url,
            DeltaDiscoveryRequest {
                resource_names_subscribe: owned(names),
                resource_names_unsubscribe: owned(not),
                ..Default::default()
            },
        );
    }

    /// Both types, wildcard, as a node tunnel begins.
    pub(crate) fn subscribe_all(&mut self) {
        self.subscribe(ADDRESS_TYPE_URL, &[], &[]);
        self.subscribe(AUTHORIZATION_TYPE_URL, &[], &[]);
    }

    pub(crate) async fn message(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let message = tokio::time::timeout(DEADLINE, self.responses.message());
        message.await.expect("a response within the deadline")
    }

    pub(crate) async fn next(&mut self) -> DeltaDiscoveryResponse {
        self.message().await.unwrap().expect("the stream goes on")
    }

    /// The next response, acknowledged.
    pub(crate) async fn acked(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        self.ack(&response);
        response
    }

    pub(crate) fn ack(&mut self, response: &DeltaDiscoveryResponse) {
        self.answer(response, None);
    }

    pub(crate) fn nack(&mut self, response: &DeltaDiscoveryResponse, message: &str) {
        self.answer(response, Some(message));
    }

    fn answer(&mut self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        self.send(
            &response.type_url,
            DeltaDiscoveryRequest {
                response_nonce: response.nonce.clone(),
                error_detail: error.map(|message| proto::google::rpc::Status {
                    message: message.to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            },
        );
    }
}

/// What the node tunnel `ztunnel-1` on `node-1` says it is.
pub(crate) fn node() -> Node {
    Node {
        id: "ztunnel~10.0.0.9~ztunnel-1.istio-system~istio-system.svc.cluster.local".to_owned(),
        metadata: Some(texts(&[
            ("NODE_NAME", "node-1"),
            ("CLUSTER_ID", "Kubernetes"),
        ])),
        ..Default::default()
    }
}

pub(crate) fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub(crate) fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    let mut names: Vec<_> = response
        .resources
        .iter()
        .map(|it| it.name.as_str())
        .collect();
    names.sort_unstable();
    names
}

pub(crate) fn changes(upserts: &[Arc<Resource>], removals: &[&Arc<Resource>]) -> Changes {
    Changes {
        upserts: upserts.to_vec(),
        removals: removals
            .iter()
            .map(|it| ResourceKey {
                type_url: it.type_url,
                scope: it.scope.clone(),
                name: it.name.clone(),
            })
            .collect(),
    }
}

fn resource(type_url: &'static str, name: &str, body: Vec<u8>) -> Resource {
    let hash = twox_hash::XxHash64::oneshot(0, &body);
    Resource {
        type_url,
        scope: None,
        name: name.into(),
        aliases: Box::default(),
        version: format!("{hash:x}").into(),
        body: Bytes::from(body),
        node: None,
        services: Box::default(),
    }
}

/// A pod `pod-N` at 10.1.0.N; `canonical` only makes it differ.
pub(crate) fn pod(n: u8, node: &str, services: &[&str], canonical: &str) -> Arc<Resource> {
    let uid = format!("Kubernetes//Pod/shop/pod-{n}");
    let workload = Workload {
        uid: uid.clone(),
        name: format!("pod-{n}"),
        namespace: "shop".to_owned(),
        addresses: vec![Bytes::from(vec![10, 1, 0, n]).into()],
        canonical_name: canonical.to_owned(),
        node: node.to_owned(),
        ..Default::default()
    };
    let address = Address {
        r#type: Some(address::Type::Workload(workload)),
    };
    Arc::new(Resource {
        aliases: [format!("/10.1.0.{n}").into()].into(),
        node: Some(node.into()),
        services: services.iter().map(|name| Str::from(*name)).collect(),
        ..resource(ADDRESS_TYPE_URL, &uid, address.encode_to_vec())
    })
}

/// A service with the VIP 10.96.0.N.
pub(crate) fn service(name: &str, n: u8) -> Arc<Resource> {
    let hostname = format!("{name}.shop.svc.cluster.local");
    let service = Service {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        hostname: hostname.clone(),
        ..Default::default()
    };
    let address = Address {
        r#type: Some(address::Type::Service(service)),
    };
    let name = format!("shop/{hostname}");
    Arc::new(Resource {
        aliases: [format!("/10.96.0.{n}").into()].into(),
        ..resource(ADDRESS_TYPE_URL, &name, address.encode_to_vec())
    })
}

/// A policy; `variant` only makes it differ.
pub(crate) fn policy(name: &str, variant: i32) -> Arc<Resource> {
    let policy = proto::security::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        action: variant,
        ..Default::default()
    };
    let name = format!("shop/{name}");
    Arc::new(resource(
        AUTHORIZATION_TYPE_URL,
        &name,
        policy.encode_to_vec(),
    ))
}
