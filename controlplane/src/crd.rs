//! The custom resources as users write them: Istio's `security.istio.io` and `networking.istio.io`, and the parts of
//! `gateway.networking.k8s.io` that waypoints need. Every field of the published schemas is here, so that any other field
//! is a mistake that can be told.

pub mod gateway_api;
pub mod istio;
#[cfg(test)]
mod published;
#[cfg(test)]
mod shape;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An object of a custom resource.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Custom<S, T> {
    /// Group and version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Name, namespace, labels and so on.
    pub metadata: ObjectMeta,
    /// What the user asks for.
    pub spec: S,
    /// What servers say.
    pub status: T,
}

/// `security.istio.io` `WorkloadSelector`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MatchLabels {
    /// Labels that all must be there.
    pub match_labels: BTreeMap<String, String>,
}

/// `networking.istio.io` `WorkloadSelector`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SelectorLabels {
    /// Labels that all must be there.
    pub labels: BTreeMap<String, String>,
}

/// `istio.type` `PolicyTargetReference`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TargetRef {
    /// API group; empty for core.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Must be empty: the policy's own namespace.
    pub namespace: String,
}

/// `security.istio.io` `AuthorizationPolicy`.
pub type AuthorizationPolicy = Custom<AuthorizationPolicySpec, Value>;

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthorizationPolicySpec {
    /// Workloads by labels.
    pub selector: Option<MatchLabels>,
    /// One target (older form).
    pub target_ref: Option<TargetRef>,
    /// Targets.
    pub target_refs: Vec<TargetRef>,
    /// ORed.
    pub rules: Vec<AuthorizationRule>,
    /// What a match means.
    pub action: AuthorizationAction,
    /// For CUSTOM.
    pub provider: Option<Provider>,
}

/// `AuthorizationPolicy.action`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum AuthorizationAction {
    /// Where any applies, one must match.
    #[default]
    Allow,
    /// A match refuses.
    Deny,
    /// A match is noted.
    Audit,
    /// An external server decides.
    Custom,
}

/// `AuthorizationPolicy.provider`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct Provider {
    /// A provider of the mesh's configuration.
    pub name: String,
}

/// `AuthorizationPolicy.rules[]`. `None` stands for absence, which differs from an empty list (invalid).
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct AuthorizationRule {
    /// ORed.
    pub from: Option<Vec<From>>,
    /// ORed.
    pub to: Option<Vec<To>>,
    /// ANDed.
    pub when: Option<Vec<When>>,
}

/// `rules[].from[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct From {
    /// Its fields are ANDed.
    pub source: Option<PeerSource>,
}

/// `rules[].to[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct To {
    /// Its fields are ANDed.
    pub operation: Option<Operation>,
}

/// A list of texts; `None` where the field is absent.
pub type Texts = Option<Vec<String>>;

/// `rules[].from[].source`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct PeerSource {
    pub principals: Texts,
    pub not_principals: Texts,
    pub request_principals: Texts,
    pub not_request_principals: Texts,
    pub namespaces: Texts,
    pub not_namespaces: Texts,
    pub service_accounts: Texts,
    pub not_service_accounts: Texts,
    pub trust_domains: Texts,
    pub not_trust_domains: Texts,
    pub ip_blocks: Texts,
    pub not_ip_blocks: Texts,
    pub remote_ip_blocks: Texts,
    pub not_remote_ip_blocks: Texts,
}

/// `rules[].to[].operation`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct Operation {
    pub hosts: Texts,
    pub not_hosts: Texts,
    pub ports: Texts,
    pub not_ports: Texts,
    pub methods: Texts,
    pub not_methods: Texts,
    pub paths: Texts,
    pub not_paths: Texts,
}

/// `rules[].when[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct When {
    /// The attribute.
    pub key: String,
    /// It is one of these.
    pub values: Texts,
    /// It is none of these.
    pub not_values: Texts,
}

/// `security.istio.io` `PeerAuthentication`.
pub type PeerAuthentication = Custom<PeerAuthenticationSpec, Value>;

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerAuthenticationSpec {
    /// Workloads by labels.
    pub selector: Option<MatchLabels>,
    /// The mode of every port.
    pub mtls: Option<MutualTls>,
    /// Exceptions, by the workload's port.
    pub port_level_mtls: Option<BTreeMap<String, MutualTls>>,
}

/// `MutualTLS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct MutualTls {
    /// The mode.
    pub mode: MutualTlsMode,
}

/// `MutualTLS.mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MutualTlsMode {
    /// As the level above.
    #[default]
    Unset,
    /// Plaintext is accepted too.
    Disable,
    /// Plaintext is accepted too.
    Permissive,
    /// Only the mesh's TLS.
    Strict,
}

/// `networking.istio.io` `ServiceEntry`.
pub type ServiceEntry = Custom<ServiceEntrySpec, ServiceEntryStatus>;

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct ServiceEntrySpec {
    pub hosts: Vec<String>,
    pub addresses: Vec<String>,
    pub ports: Vec<ServiceEntryPort>,
    pub location: Location,
    pub resolution: Resolution,
    pub endpoints: Vec<WorkloadEntrySpec>,
    pub workload_selector: Option<SelectorLabels>,
    pub export_to: Vec<String>,
    pub subject_alt_names: Vec<String>,
}

/// `ServiceEntry.ports[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct ServiceEntryPort {
    pub number: u32,
    pub protocol: String,
    pub name: String,
    pub target_port: u32,
}

/// `ServiceEntry.location`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "the schema's own names")]
pub enum Location {
    #[default]
    MeshExternal,
    MeshInternal,
}

/// `ServiceEntry.resolution`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "the schema's own names")]
pub enum Resolution {
    #[default]
    None,
    Static,
    Dns,
    DnsRoundRobin,
    DynamicDns,
}

/// `ServiceEntry.status`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct ServiceEntryStatus {
    pub addresses: Vec<AllocatedAddress>,
    pub conditions: Value,
}

/// `ServiceEntry.status.addresses[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AllocatedAddress {
    /// The address.
    pub value: String,
    /// The host it stands for.
    pub host: String,
}

/// `networking.istio.io` `WorkloadEntry`.
pub type WorkloadEntry = Custom<WorkloadEntrySpec, Value>;

/// What it says; also an inline endpoint of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct WorkloadEntrySpec {
    pub address: String,
    pub ports: BTreeMap<String, u32>,
    pub labels: BTreeMap<String, String>,
    pub network: String,
    pub locality: String,
    pub weight: Option<u32>,
    pub service_account: String,
}

/// `gateway.networking.k8s.io` `Gateway`.
pub type Gateway = Custom<GatewaySpec, GatewayStatus>;

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct GatewaySpec {
    pub gateway_class_name: String,
    pub listeners: Vec<Listener>,
    pub addresses: Value,
    pub infrastructure: Value,
    pub allowed_listeners: Value,
    #[serde(rename = "backendTLS")]
    pub backend_tls: Value,
    pub tls: Value,
    pub default_scope: Value,
}

/// `Gateway.listeners[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct Listener {
    pub name: String,
    pub hostname: Option<String>,
    pub port: u32,
    pub protocol: String,
    pub tls: Value,
    pub allowed_routes: Option<AllowedRoutes>,
}

/// `Gateway.listeners[].allowedRoutes`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct AllowedRoutes {
    pub namespaces: Option<RouteNamespaces>,
    pub kinds: Value,
}

/// `Gateway.listeners[].allowedRoutes.namespaces`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteNamespaces {
    /// Which namespaces.
    pub from: FromNamespaces,
    /// For `Selector`.
    pub selector: Option<LabelSelector>,
}

/// `Gateway.listeners[].allowedRoutes.namespaces.from`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[allow(missing_docs, reason = "the schema's own names")]
pub enum FromNamespaces {
    All,
    Selector,
    #[default]
    Same,
    None,
}

/// `Gateway.status`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct GatewayStatus {
    pub addresses: Vec<GatewayStatusAddress>,
    pub conditions: Value,
    pub listeners: Value,
}

/// `Gateway.status.addresses[]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct GatewayStatusAddress {
    /// `IPAddress` (also when absent) or `Hostname`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// The address.
    pub value: String,
}

/// `gateway.networking.k8s.io` `GatewayClass`.
pub type GatewayClass = Custom<GatewayClassSpec, Value>;

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the schema's own names")]
pub struct GatewayClassSpec {
    pub controller_name: String,
    pub description: Value,
    pub parameters_ref: Value,
}
