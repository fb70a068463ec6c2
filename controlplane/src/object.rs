//! Objects as translation sees them: Kubernetes' own kinds cut down to what the mesh needs, the custom ones as they are,
//! all with names and labels that are shared and not copied.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{self as core, ServiceAccount},
        discovery::v1 as discovery,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use mesh::{
    names::Str,
    workload::{PodDns, PodHost},
};
use serde::de::DeserializeOwned;

use crate::{
    crd::{self, gateway_api},
    intern,
    source::{
        read::{Fault, read},
        tree::Node,
    },
    translate::l7::credential::Credential,
};

/// The kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "Kubernetes' own names")]
pub enum Kind {
    AuthorizationPolicy,
    BackendTlsPolicy,
    BackendTrafficPolicy,
    ConfigMap,
    Deployment,
    DestinationRule,
    EndpointSlice,
    EnvoyFilter,
    Gateway,
    GatewayClass,
    GrpcRoute,
    HttpRoute,
    Namespace,
    Node,
    PeerAuthentication,
    Pod,
    ReferenceGrant,
    RequestAuthentication,
    Secret,
    Service,
    ServiceAccount,
    ServiceEntry,
    TcpRoute,
    Telemetry,
    TlsRoute,
    VirtualService,
    WasmPlugin,
    WorkloadEntry,
}

/// A namespace and a name; the namespace is empty for cluster-scoped kinds.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Namespace.
    pub namespace: Str,
    /// Name.
    pub name: Str,
}

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
}

/// Labels or annotations.
pub type Labels = BTreeMap<Str, Str>;

/// As an object's spec writes them.
pub fn labels_of(written: &BTreeMap<String, String>) -> Labels {
    let pairs = written.iter();
    pairs
        .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
        .collect()
}

/// TCP ports by name.
pub type Ports = BTreeMap<Str, u16>;

/// An object, and the mistakes in it, with which it came into force for want of an earlier good state: policies then
/// refuse what they select, and other kinds are left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Sourced<T> {
    /// The object.
    pub object: T,
    /// What was wrong; empty for nearly all.
    pub faults: Vec<String>,
}

/// What every object has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meta {
    /// Namespace and name.
    pub name: Name,
    /// Kubernetes' uid, where there is one.
    pub uid: Option<Str>,
    /// All labels.
    pub labels: Arc<Labels>,
    /// The annotations of the mesh (`istio.io` and `leyline.dev` and below them); others are nobody's business here.
    pub annotations: Arc<Labels>,
    /// Seconds since 1970; objects without it count as the newest.
    pub created: Option<i64>,
    /// Being deleted.
    pub deleting: bool,
}

/// One object of any kind.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "as Kind")]
pub enum Object {
    AuthorizationPolicy(Policy),
    BackendTlsPolicy(BackendTlsPolicy),
    BackendTrafficPolicy(BackendTrafficPolicy),
    ConfigMap(ConfigMap),
    DestinationRule(DestinationRule),
    EndpointSlice(EndpointSlice),
    Gateway(Gateway),
    GatewayClass(GatewayClass),
    GrpcRoute(GrpcRoute),
    HttpRoute(HttpRoute),
    Namespace(Meta),
    Node(Meta),
    PeerAuthentication(PeerAuthentication),
    Pod(Pod),
    RequestAuthentication(RequestAuthentication),
    Service(Service),
    Secret(Secret),
    ServiceEntry(ServiceEntry),
    TcpRoute(TcpRoute),
    TlsRoute(TlsRoute),
    Telemetry(Telemetry),
    VirtualService(VirtualService),
    WorkloadEntry(WorkloadEntry),
    /// A kind that is checked and has no part in the mesh itself (Deployment, ServiceAccount; ReferenceGrant, which routes
    /// of the mesh do not need; EnvoyFilter and WasmPlugin, which nothing here can do).
    Other(Kind, Meta),
}

/// A Pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pod {
    /// Names and labels.
    pub meta: Meta,
    /// `spec.nodeName`.
    pub node: Str,
    /// `spec.serviceAccountName`; `default` when absent.
    pub service_account: Str,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Ended: phase `Succeeded` or `Failed`.
    pub ended: bool,
    /// Condition `Ready`.
    pub ready: bool,
    /// `status.podIPs`, or the single `podIP`, as written.
    pub addresses: Box<[Str]>,
    /// TCP ports with a name, of containers and of restartable init containers.
    pub named_ports: Arc<Ports>,
    /// The controlling owner: kind and name.
    pub owner: Option<(Str, Str)>,
    /// `spec.dnsPolicy` and `spec.dnsConfig`, where they say something else than the default.
    pub dns: Option<Arc<PodDns>>,
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Service {
    /// Names and labels.
    pub meta: Meta,
    /// `spec.type: ExternalName`.
    pub external_name: bool,
    /// Labels of its pods; empty: its endpoints are written by others.
    pub selector: Arc<Labels>,
    /// `spec.clusterIPs`, without `None`.
    pub cluster_ips: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<ServicePort>,
    /// `spec.ipFamilies`.
    pub ip_families: Vec<Str>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.internalTrafficPolicy: Local`.
    pub local_only: bool,
    /// `spec.trafficDistribution`.
    pub traffic_distribution: Option<Str>,
}

/// A TCP port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    /// Its name; empty where there is only one.
    pub name: Str,
    /// Its number.
    pub port: u16,
    /// What it is at the pod.
    pub target: TargetPort,
    /// `appProtocol`.
    pub app_protocol: Option<Str>,
}

/// `targetPort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// The service's own number.
    Same,
    /// A number.
    Number(u16),
    /// A name, which each pod resolves.
    Name(Str),
}

/// An EndpointSlice of a service, of addresses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EndpointSlice {
    /// Names and labels.
    pub meta: Meta,
    /// Label `kubernetes.io/service-name`.
    pub service: Option<Str>,
    /// TCP ports by name.
    pub ports: Ports,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SliceEndpoint {
    /// Its addresses that are addresses.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`; true when absent.
    pub ready: bool,
    /// The pod it stands for: name and uid.
    pub pod: Option<(Str, Option<Str>)>,
    /// `nodeName`.
    pub node: Str,
}

macro_rules! with_meta {
    ($($(#[$doc:meta])* $name:ident $spec:ty),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name {
            /// Names and labels.
            pub meta: Meta,
            /// What the user asks for.
            pub spec: $spec,
        }
    )+};
}

with_meta! {
    /// An AuthorizationPolicy.
    Policy crd::AuthorizationPolicySpec,
    /// A PeerAuthentication.
    PeerAuthentication crd::PeerAuthenticationSpec,
    /// A WorkloadEntry.
    WorkloadEntry crd::WorkloadEntrySpec,
    /// A GatewayClass.
    GatewayClass crd::GatewayClassSpec,
    /// An HTTPRoute.
    HttpRoute gateway_api::HttpRouteSpec,
    /// A GRPCRoute.
    GrpcRoute gateway_api::GrpcRouteSpec,
    /// A TLSRoute.
    TlsRoute gateway_api::TlsRouteSpec,
    /// A TCPRoute.
    TcpRoute gateway_api::TcpRouteSpec,
    /// A BackendTLSPolicy.
    BackendTlsPolicy gateway_api::BackendTlsPolicySpec,
    /// An XBackendTrafficPolicy.
    BackendTrafficPolicy gateway_api::BackendTrafficPolicySpec,
    /// A DestinationRule.
    DestinationRule crd::istio::DestinationRuleSpec,
    /// A RequestAuthentication.
    RequestAuthentication crd::istio::RequestAuthenticationSpec,
    /// A Telemetry.
    Telemetry crd::istio::TelemetrySpec,
    /// A VirtualService.
    VirtualService crd::istio::VirtualServiceSpec,
}

/// A ConfigMap, of which only roots of certificates are read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigMap {
    /// Names and labels.
    pub meta: Meta,
    /// `data["ca.crt"]`, PEM.
    pub roots: Option<Arc<str>>,
}

/// A Secret, of which only what is of use for TLS is read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Secret {
    /// Names and labels.
    pub meta: Meta,
    /// Certificates and a key.
    pub credential: Credential,
}

/// A ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceEntry {
    /// Names and labels.
    pub meta: Meta,
    /// What the user asks for.
    pub spec: crd::ServiceEntrySpec,
    /// Addresses allocated earlier.
    pub allocated: Vec<crd::AllocatedAddress>,
}

/// A Gateway of the Gateway API.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gateway {
    /// Names and labels.
    pub meta: Meta,
    /// What the user asks for.
    pub spec: crd::GatewaySpec,
    /// `status.addresses`.
    pub addresses: Vec<crd::GatewayStatusAddress>,
}

impl Default for Name {
    fn default() -> Self {
        Self::new("", "")
    }
}

impl Name {
    /// A name.
    pub fn new(namespace: impl Into<Str>, name: impl Into<Str>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.as_str(), self.name)
    }
}

impl Kind {
    /// The kind of an `apiVersion` and a `kind`, if it is one that is read.
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let known = match (group, kind) {
            ("", "Namespace") => Self::Namespace,
            ("", "Node") => Self::Node,
            ("", "Pod") => Self::Pod,
            ("", "Service") => Self::Service,
            ("", "ServiceAccount") => Self::ServiceAccount,
            ("apps", "Deployment") => Self::Deployment,
            ("discovery.k8s.io", "EndpointSlice") => Self::EndpointSlice,
            ("security.istio.io", "AuthorizationPolicy") => Self::AuthorizationPolicy,
            ("security.istio.io", "PeerAuthentication") => Self::PeerAuthentication,
            ("security.istio.io", "RequestAuthentication") => Self::RequestAuthentication,
            ("telemetry.istio.io", "Telemetry") => Self::Telemetry,
            ("extensions.istio.io", "WasmPlugin") => Self::WasmPlugin,
            ("networking.istio.io", "DestinationRule") => Self::DestinationRule,
            ("networking.istio.io", "EnvoyFilter") => Self::EnvoyFilter,
            ("networking.istio.io", "VirtualService") => Self::VirtualService,
            ("networking.istio.io", "ServiceEntry") => Self::ServiceEntry,
            ("networking.istio.io", "WorkloadEntry") => Self::WorkloadEntry,
            ("gateway.networking.k8s.io", "Gateway") => Self::Gateway,
            ("gateway.networking.k8s.io", "GatewayClass") => Self::GatewayClass,
            ("gateway.networking.k8s.io", "HTTPRoute") => Self::HttpRoute,
            ("gateway.networking.k8s.io", "GRPCRoute") => Self::GrpcRoute,
            ("gateway.networking.k8s.io", "TLSRoute") => Self::TlsRoute,
            ("gateway.networking.k8s.io", "TCPRoute") => Self::TcpRoute,
            ("gateway.networking.k8s.io", "ReferenceGrant") => Self::ReferenceGrant,
            ("gateway.networking.k8s.io", "BackendTLSPolicy") => Self::BackendTlsPolicy,
            ("gateway.networking.x-k8s.io", "XBackendTrafficPolicy") => Self::BackendTrafficPolicy,
            ("", "ConfigMap") => Self::ConfigMap,
            ("", "Secret") => Self::Secret,
            _ => return None,
        };
        let versions: &[&str] = match group {
            "security.istio.io" => &["v1", "v1beta1"],
            "gateway.networking.k8s.io" => &["v1", "v1beta1", "v1alpha3", "v1alpha2"],
            "gateway.networking.x-k8s.io" => &["v1alpha1"],
            "networking.istio.io" => &["v1", "v1beta1", "v1alpha3"],
            "telemetry.istio.io" | "extensions.istio.io" => &["v1", "v1alpha1"],
            _ => &["v1"],
        };
        versions.contains(&version).then_some(known)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::BackendTlsPolicy => "BackendTLSPolicy",
            Self::BackendTrafficPolicy => "XBackendTrafficPolicy",
            Self::ConfigMap => "ConfigMap",
            Self::Deployment => "Deployment",
            Self::DestinationRule => "DestinationRule",
            Self::EnvoyFilter => "EnvoyFilter",
            Self::RequestAuthentication => "RequestAuthentication",
            Self::Telemetry => "Telemetry",
            Self::VirtualService => "VirtualService",
            Self::WasmPlugin => "WasmPlugin",
            Self::EndpointSlice => "EndpointSlice",
            Self::Gateway => "Gateway",
            Self::GatewayClass => "GatewayClass",
            Self::GrpcRoute => "GRPCRoute",
            Self::HttpRoute => "HTTPRoute",
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::Pod => "Pod",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::Secret => "Secret",
            Self::Service => "Service",
            Self::ServiceAccount => "ServiceAccount",
            Self::ServiceEntry => "ServiceEntry",
            Self::TcpRoute => "TCPRoute",
            Self::TlsRoute => "TLSRoute",
            Self::WorkloadEntry => "WorkloadEntry",
        }
    }

    /// Whether its objects live in namespaces.
    pub fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node | Self::GatewayClass)
    }

    /// What becomes of an object of this kind that cannot be read and has no earlier good state.
    pub fn when_unreadable(self) -> &'static str {
        match self {
            Self::GrpcRoute | Self::HttpRoute => "rules that cannot be kept are answered 500",
            Self::TcpRoute | Self::TlsRoute => {
                "connections of rules that cannot be kept are refused"
            }
            other if other.is_policy() => "it is taken at its strictest",
            _ => "it has no effect",
        }
    }

    /// Whether an object that cannot be read must refuse and not be left out.
    pub fn is_policy(self) -> bool {
        matches!(
            self,
            Self::AuthorizationPolicy
                | Self::BackendTlsPolicy
                | Self::PeerAuthentication
                | Self::GrpcRoute
                | Self::HttpRoute
                | Self::TcpRoute
                | Self::TlsRoute
                | Self::RequestAuthentication
                | Self::DestinationRule
        )
    }
}

/// Reads a node as an object of this kind. With faults, the object is what remains without the faulty parts.
pub fn read_object(kind: Kind, node: &Node) -> (Option<Object>, Vec<Fault>) {
    fn of<T: DeserializeOwned>(
        node: &Node,
        make: impl FnOnce(T) -> Object,
    ) -> (Option<Object>, Vec<Fault>) {
        let (value, faults) = read(node);
        (value.map(make), faults)
    }
    let meta = |wire: &ObjectMeta| Meta::new(wire, kind);
    match kind {
        Kind::Namespace => of(node, |o: core::Namespace| {
            Object::Namespace(meta(&o.metadata))
        }),
        Kind::Node => of(node, |o: core::Node| Object::Node(meta(&o.metadata))),
        Kind::Pod => of(node, |o: core::Pod| Object::Pod(Pod::new(&o))),
        Kind::Service => of(node, |o: core::Service| Object::Service(Service::new(&o))),
        Kind::EndpointSlice => of(node, |o: discovery::EndpointSlice| {
            Object::EndpointSlice(EndpointSlice::new(&o))
        }),
        Kind::ConfigMap => of(node, |o: core::ConfigMap| {
            Object::ConfigMap(ConfigMap::new(&o))
        }),
        Kind::Deployment => of(node, |o: Deployment| Object::Other(kind, meta(&o.metadata))),
        Kind::Secret => of(node, |o: core::Secret| {
            Object::Secret(Secret {
                meta: meta(&o.metadata),
                credential: Credential::of(&o),
            })
        }),
        Kind::ServiceAccount => of(node, |o: ServiceAccount| {
            Object::Other(kind, meta(&o.metadata))
        }),
        Kind::AuthorizationPolicy => of(node, |o: crd::AuthorizationPolicy| {
            Object::AuthorizationPolicy(Policy {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::PeerAuthentication => of(node, |o: crd::PeerAuthentication| {
            Object::PeerAuthentication(PeerAuthentication {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::WorkloadEntry => of(node, |o: crd::WorkloadEntry| {
            Object::WorkloadEntry(WorkloadEntry {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::DestinationRule => of(node, |o: crd::istio::DestinationRule| {
            Object::DestinationRule(DestinationRule {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::RequestAuthentication => of(node, |o: crd::istio::RequestAuthentication| {
            Object::RequestAuthentication(RequestAuthentication {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::Telemetry => of(node, |o: crd::istio::Telemetry| {
            Object::Telemetry(Telemetry {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::VirtualService => of(node, |o: crd::istio::VirtualService| {
            Object::VirtualService(VirtualService {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::EnvoyFilter | Kind::WasmPlugin => of(
            node,
            |o: crd::Custom<serde_json::Value, serde_json::Value>| {
                Object::Other(kind, meta(&o.metadata))
            },
        ),
        Kind::GatewayClass => of(node, |o: crd::GatewayClass| {
            Object::GatewayClass(GatewayClass {
                meta: meta(&o.metadata),
                spec: o.spec,
            })
        }),
        Kind::GrpcRoute
        | Kind::HttpRoute
        | Kind::TcpRoute
        | Kind::TlsRoute
        | Kind::ReferenceGrant
        | Kind::BackendTlsPolicy
        | Kind::BackendTrafficPolicy => read_gateway_api(kind, node),
        Kind::ServiceEntry => of(node, |o: crd::ServiceEntry| {
            Object::ServiceEntry(ServiceEntry {
                meta: meta(&o.metadata),
                spec: o.spec,
                allocated: o.status.addresses,
            })
        }),
        Kind::Gateway => of(node, |o: crd::Gateway| {
            Object::Gateway(Gateway {
                meta: meta(&o.metadata),
                spec: o.spec,
                addresses: o.status.addresses,
            })
        }),
    }
}

/// Reads a route or a policy of the Gateway API.
fn read_gateway_api(kind: Kind, node: &Node) -> (Option<Object>, Vec<Fault>) {
    fn of<S, T>(
        node: &Node,
        make: impl FnOnce(Meta, S) -> Object,
        kind: Kind,
    ) -> (Option<Object>, Vec<Fault>)
    where
        crd::Custom<S, T>: DeserializeOwned,
    {
        let (value, faults) = read::<crd::Custom<S, T>>(node);
        let object = value.map(|o| make(Meta::new(&o.metadata, kind), o.spec));
        (object, faults)
    }
    use gateway_api::{PolicyStatus, RouteStatus};
    macro_rules! route {
        ($variant:ident, $status:ty) => {
            of::<_, $status>(
                node,
                |meta, spec| Object::$variant($variant { meta, spec }),
                kind,
            )
        };
    }
    match kind {
        Kind::HttpRoute => route!(HttpRoute, RouteStatus),
        Kind::GrpcRoute => route!(GrpcRoute, RouteStatus),
        Kind::TlsRoute => route!(TlsRoute, RouteStatus),
        Kind::TcpRoute => route!(TcpRoute, RouteStatus),
        Kind::ReferenceGrant => of::<gateway_api::ReferenceGrantSpec, serde_json::Value>(
            node,
            |meta, _| Object::Other(kind, meta),
            kind,
        ),
        Kind::BackendTlsPolicy => route!(BackendTlsPolicy, PolicyStatus),
        Kind::BackendTrafficPolicy => route!(BackendTrafficPolicy, PolicyStatus),
        _ => (None, Vec::new()),
    }
}

impl Object {
    /// Its names and labels.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::AuthorizationPolicy(o) => &o.meta,
            Self::BackendTlsPolicy(o) => &o.meta,
            Self::BackendTrafficPolicy(o) => &o.meta,
            Self::ConfigMap(o) => &o.meta,
            Self::GrpcRoute(o) => &o.meta,
            Self::HttpRoute(o) => &o.meta,
            Self::TcpRoute(o) => &o.meta,
            Self::TlsRoute(o) => &o.meta,
            Self::DestinationRule(o) => &o.meta,
            Self::RequestAuthentication(o) => &o.meta,
            Self::Telemetry(o) => &o.meta,
            Self::VirtualService(o) => &o.meta,
            Self::EndpointSlice(o) => &o.meta,
            Self::Gateway(o) => &o.meta,
            Self::GatewayClass(o) => &o.meta,
            Self::Namespace(meta) | Self::Node(meta) | Self::Other(_, meta) => meta,
            Self::PeerAuthentication(o) => &o.meta,
            Self::Pod(o) => &o.meta,
            Self::Secret(o) => &o.meta,
            Self::Service(o) => &o.meta,
            Self::ServiceEntry(o) => &o.meta,
            Self::WorkloadEntry(o) => &o.meta,
        }
    }
}

impl Meta {
    /// As the API server or a file has it. A namespaced object without a namespace is in `default`.
    pub fn new(wire: &ObjectMeta, kind: Kind) -> Self {
        let namespace = match &wire.namespace {
            _ if !kind.is_namespaced() => "",
            Some(namespace) => namespace,
            None => "default",
        };
        Self {
            name: Name {
                namespace: intern::text(namespace),
                name: intern::text(wire.name.as_deref().unwrap_or_default()),
            },
            uid: wire.uid.as_deref().map(intern::text),
            labels: intern::labels(labels(wire.labels.as_ref(), |_| true)),
            annotations: intern::labels(labels(wire.annotations.as_ref(), of_the_mesh)),
            created: wire
                .creation_timestamp
                .as_ref()
                .map(|time| time.0.as_second()),
            deleting: wire.deletion_timestamp.is_some(),
        }
    }

    /// A label.
    pub fn label(&self, key: &str) -> Option<&Str> {
        self.labels.get(key)
    }

    /// An annotation of the mesh.
    pub fn annotation(&self, key: &str) -> Option<&Str> {
        self.annotations.get(key)
    }

    /// Orders by age, the oldest first; objects of one age by name.
    pub fn age(&self) -> (i64, Name) {
        (self.created.unwrap_or(i64::MAX), self.name.clone())
    }
}

fn of_the_mesh(key: &str) -> bool {
    let domain = key.split('/').next().unwrap_or_default();
    ["istio.io", "leyline.dev"].iter().any(|ours| {
        domain == *ours
            || domain
                .strip_suffix(ours)
                .is_some_and(|above| above.ends_with('.'))
    })
}

fn labels(wire: Option<&BTreeMap<String, String>>, keep: impl Fn(&str) -> bool) -> Labels {
    let pairs = wire.into_iter().flatten().filter(|(key, _)| keep(key));
    pairs
        .map(|(key, value)| (intern::text(key), intern::text(value)))
        .collect()
}

/// Whether every label that is asked for is there.
pub fn selects<K: AsRef<str>>(selector: &BTreeMap<K, K>, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| {
        labels
            .get(key.as_ref())
            .is_some_and(|found| **found == *value.as_ref())
    })
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}

impl ConfigMap {
    /// A ConfigMap as the API server or a file has it.
    pub fn new(wire: &core::ConfigMap) -> Self {
        let roots = wire.data.as_ref().and_then(|data| data.get("ca.crt"));
        Self {
            meta: Meta::new(&wire.metadata, Kind::ConfigMap),
            roots: roots.map(|pem| pem.as_str().into()),
        }
    }
}

impl Pod {
    /// A pod as the API server or a file has it.
    pub fn new(wire: &core::Pod) -> Self {
        let empty = (core::PodSpec::default(), core::PodStatus::default());
        let spec = wire.spec.as_ref().unwrap_or(&empty.0);
        let status = wire.status.as_ref().unwrap_or(&empty.1);
        let phase = status.phase.as_deref().unwrap_or_default();
        let conditions = status.conditions.iter().flatten();
        Self {
            meta: Meta::new(&wire.metadata, Kind::Pod),
            node: intern::text(spec.node_name.as_deref().unwrap_or_default()),
            service_account: intern::text(
                spec.service_account_name.as_deref().unwrap_or("default"),
            ),
            host_network: spec.host_network.unwrap_or_default(),
            ended: matches!(phase, "Succeeded" | "Failed"),
            ready: conditions
                .into_iter()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
            addresses: pod_addresses(status),
            named_ports: intern::ports(named_ports(spec)),
            owner: owner(&wire.metadata),
            dns: pod_dns(&wire.metadata, spec).map(Arc::new),
        }
    }
}

/// A pod on its node's network resolves as its node does, unless it says otherwise; an unknown policy is the default.
fn pod_dns(meta: &ObjectMeta, spec: &core::PodSpec) -> Option<PodDns> {
    let config = spec.dns_config.as_ref();
    let texts = |of: fn(&core::PodDNSConfig) -> &Option<Vec<String>>| {
        config.and_then(|it| of(it).as_deref()).unwrap_or_default()
    };
    let cluster_first = match spec.dns_policy.as_deref() {
        Some("None" | "Default") => false,
        Some("ClusterFirstWithHostNet") => true,
        _ => !spec.host_network.unwrap_or_default(),
    };
    let text = |it: &'_ Option<String>| it.clone().unwrap_or_default();
    let [pod, hostname, subdomain] = [&meta.name, &spec.hostname, &spec.subdomain].map(text);
    PodDns::new(
        cluster_first,
        texts(|it| &it.searches),
        texts(|it| &it.nameservers),
        PodHost::new(&pod, &hostname, &subdomain),
    )
}

fn pod_addresses(status: &core::PodStatus) -> Box<[Str]> {
    let all: Box<[Str]> = status
        .pod_ips
        .iter()
        .flatten()
        .map(|ip| ip.ip.as_str().into())
        .collect();
    match &status.pod_ip {
        Some(one) if all.is_empty() && !one.is_empty() => [one.as_str().into()].into(),
        _ => all,
    }
}

/// Where two containers share a port name, the first wins, as in Kubernetes' own endpoints.
fn named_ports(spec: &core::PodSpec) -> Ports {
    let restartable =
        |container: &&core::Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(restartable);
    let mut ports = Ports::new();
    for declared in spec
        .containers
        .iter()
        .chain(sidecars)
        .flat_map(|c| c.ports.iter().flatten())
    {
        let tcp = declared
            .protocol
            .as_deref()
            .is_none_or(|protocol| protocol == "TCP");
        if let (Some(name), Some(number), true) =
            (&declared.name, port(declared.container_port), tcp)
        {
            ports.entry(intern::text(name)).or_insert(number);
        }
    }
    ports
}

fn owner(wire: &ObjectMeta) -> Option<(Str, Str)> {
    let mut owners = wire.owner_references.iter().flatten();
    let controller = owners.find(|owner| owner.controller == Some(true))?;
    Some((
        intern::text(&controller.kind),
        intern::text(&controller.name),
    ))
}

impl Service {
    /// A service as the API server or a file has it.
    pub fn new(wire: &core::Service) -> Self {
        let empty = core::ServiceSpec::default();
        let spec = wire.spec.as_ref().unwrap_or(&empty);
        let all: Vec<&String> = match spec.cluster_ips.as_deref() {
            Some(all) if !all.is_empty() => all.iter().collect(),
            _ => spec.cluster_ip.iter().collect(),
        };
        let families = spec.ip_families.iter().flatten();
        Self {
            meta: Meta::new(&wire.metadata, Kind::Service),
            external_name: spec.type_.as_deref() == Some("ExternalName"),
            selector: intern::labels(labels(spec.selector.as_ref(), |_| true)),
            cluster_ips: all.iter().filter_map(|ip| ip.parse().ok()).collect(),
            ports: spec
                .ports
                .iter()
                .flatten()
                .filter_map(ServicePort::new)
                .collect(),
            ip_families: families.map(|family| intern::text(family)).collect(),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
            local_only: spec.internal_traffic_policy.as_deref() == Some("Local"),
            traffic_distribution: spec.traffic_distribution.as_deref().map(intern::text),
        }
    }
}

impl ServicePort {
    fn new(wire: &core::ServicePort) -> Option<Self> {
        if wire
            .protocol
            .as_deref()
            .is_some_and(|protocol| protocol != "TCP")
        {
            return None;
        }
        let target = match &wire.target_port {
            Some(IntOrString::Int(number)) => {
                port(*number).map_or(TargetPort::Same, TargetPort::Number)
            }
            Some(IntOrString::String(text)) => match text.parse() {
                Ok(0) => TargetPort::Same,
                Ok(number) => TargetPort::Number(number),
                Err(_) => TargetPort::Name(intern::text(text)),
            },
            None => TargetPort::Same,
        };
        Some(Self {
            name: intern::text(wire.name.as_deref().unwrap_or_default()),
            port: port(wire.port)?,
            target,
            app_protocol: wire.app_protocol.as_deref().map(intern::text),
        })
    }
}

impl EndpointSlice {
    /// A slice as the API server or a file has it. Slices of host names have no endpoints here.
    pub fn new(wire: &discovery::EndpointSlice) -> Self {
        let meta = Meta::new(&wire.metadata, Kind::EndpointSlice);
        let tcp =
            |port: &&discovery::EndpointPort| port.protocol.as_deref().is_none_or(|p| p == "TCP");
        let number = |declared: &discovery::EndpointPort| {
            let name = declared.name.as_deref().unwrap_or_default();
            Some((intern::text(name), port(declared.port?)?))
        };
        let endpoints = match wire.address_type.as_str() {
            "FQDN" => Vec::new(),
            _ => wire
                .endpoints
                .iter()
                .flatten()
                .map(SliceEndpoint::new)
                .collect(),
        };
        Self {
            service: meta.label("kubernetes.io/service-name").cloned(),
            ports: wire
                .ports
                .iter()
                .flatten()
                .filter(tcp)
                .filter_map(number)
                .collect(),
            endpoints,
            meta,
        }
    }
}

impl SliceEndpoint {
    fn new(wire: &discovery::Endpoint) -> Self {
        let conditions = wire.conditions.as_ref();
        let target = wire.target_ref.as_ref();
        let pod = target.filter(|target| target.kind.as_deref() == Some("Pod"));
        Self {
            addresses: wire
                .addresses
                .iter()
                .filter_map(|ip| ip.parse().ok())
                .collect(),
            ready: conditions
                .and_then(|conditions| conditions.ready)
                .unwrap_or(true),
            pod: pod.map(|pod| {
                let name = pod.name.as_deref().unwrap_or_default();
                (intern::text(name), pod.uid.as_deref().map(intern::text))
            }),
            node: intern::text(wire.node_name.as_deref().unwrap_or_default()),
        }
    }
}
