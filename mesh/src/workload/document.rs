//! A workload as JSON: flat, in the order of the wire, with fields at their default left out as `config_dump` does.
//!
//! There `services` is a list of keys, since a dump tells an endpoint's ports with the service; a local file gives a map
//! with the ports. Both are read.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    Addresses, ApplicationTunnel, GatewayAddress, Health, Locality, NetworkMode, PodDns,
    PortsOfServices, Template, TunnelProtocol, Workload, WorkloadType, default_capacity,
    default_cluster_id, default_service_account, owner_name,
};
use crate::{
    dump::{is_default, workload_services},
    identity::TrustDomain,
    names::{PolicyKey, Str, WorkloadUid},
};

/// The fields of a [`Workload`] and of its template.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    uid: WorkloadUid,
    name: Str,
    namespace: Str,
    #[serde(rename = "workloadIps", default)]
    addresses: Addresses,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hostname: Option<Str>,
    #[serde(default, skip_serializing_if = "is_default")]
    network: Str,
    #[serde(rename = "protocol", default)]
    tunnel_protocol: TunnelProtocol,
    #[serde(default)]
    trust_domain: TrustDomain,
    #[serde(default = "default_service_account")]
    service_account: Str,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayAddress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    network_gateway: Option<GatewayAddress>,
    #[serde(default, skip_serializing_if = "is_default")]
    node: Str,
    #[serde(default, skip_serializing_if = "is_default")]
    canonical_name: Str,
    #[serde(default, skip_serializing_if = "is_default")]
    canonical_revision: Str,
    #[serde(default, skip_serializing_if = "is_default")]
    workload_type: WorkloadType,
    #[serde(default, skip_serializing_if = "is_default")]
    workload_name: Str,
    #[serde(default, skip_serializing_if = "is_default")]
    native_tunnel: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<ApplicationTunnel>,
    #[serde(
        default,
        with = "workload_services",
        skip_serializing_if = "PortsOfServices::is_empty"
    )]
    services: PortsOfServices,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    authorization_policies: Vec<PolicyKey>,
    #[serde(default)]
    status: Health,
    #[serde(default = "default_cluster_id")]
    cluster_id: Str,
    #[serde(default, skip_serializing_if = "is_default")]
    locality: Arc<Locality>,
    #[serde(default)]
    network_mode: NetworkMode,
    #[serde(default = "default_capacity")]
    capacity: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dns: Option<Arc<PodDns>>,
}

impl From<Document> for Workload {
    fn from(document: Document) -> Self {
        let template = Template {
            namespace: document.namespace,
            hostname: document.hostname,
            network: document.network,
            tunnel_protocol: document.tunnel_protocol,
            trust_domain: document.trust_domain,
            service_account: document.service_account,
            waypoint: document.waypoint,
            network_gateway: document.network_gateway,
            canonical_name: document.canonical_name,
            canonical_revision: document.canonical_revision,
            workload_type: document.workload_type,
            owner_name: owner_name(&document.name, document.workload_name),
            native_tunnel: document.native_tunnel,
            application_tunnel: document.application_tunnel,
            services: document.services,
            authorization_policies: document.authorization_policies,
            cluster_id: document.cluster_id,
            network_mode: document.network_mode,
            capacity: document.capacity,
            dns: document.dns,
        };
        Self {
            uid: document.uid,
            name: document.name,
            addresses: document.addresses,
            node: document.node,
            locality: document.locality,
            status: document.status,
            template: Arc::new(template),
        }
    }
}

impl From<Workload> for Document {
    fn from(workload: Workload) -> Self {
        let template = Arc::unwrap_or_clone(workload.template);
        Self {
            uid: workload.uid,
            name: workload.name.clone(),
            addresses: workload.addresses,
            node: workload.node,
            locality: workload.locality,
            status: workload.status,
            namespace: template.namespace,
            hostname: template.hostname,
            network: template.network,
            tunnel_protocol: template.tunnel_protocol,
            trust_domain: template.trust_domain,
            service_account: template.service_account,
            waypoint: template.waypoint,
            network_gateway: template.network_gateway,
            canonical_name: template.canonical_name,
            canonical_revision: template.canonical_revision,
            workload_type: template.workload_type,
            workload_name: template.owner_name.unwrap_or_else(|| workload.name.clone()),
            native_tunnel: template.native_tunnel,
            application_tunnel: template.application_tunnel,
            services: template.services,
            authorization_policies: template.authorization_policies,
            cluster_id: template.cluster_id,
            network_mode: template.network_mode,
            capacity: template.capacity,
            dns: template.dns,
        }
    }
}
