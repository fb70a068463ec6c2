//! `istio.workload.Workload`.

use std::{collections::BTreeMap, sync::Arc};

use prost::Message;
use proto::{workload as wire, workload_extension as extension};

use super::{InvalidResource, Problem, address, bytes, gateway, port};
use crate::{
    identity::TrustDomain,
    names::{NamespacedHostname, Str, WorkloadUid},
    workload::{
        Addresses, ApplicationProtocol, ApplicationTunnel, DEFAULT_CLUSTER,
        DEFAULT_SERVICE_ACCOUNT, Health, Locality, NetworkMode, PodDns, PodHost, PortMap,
        PortsOfServices, Template, TunnelProtocol, Workload, WorkloadType, owner_name,
    },
};

/// Unknown enum numbers: the tunnel protocol becomes [`TunnelProtocol::Unsupported`], which is refused and never
/// plaintext; a status becomes unhealthy; a type becomes a pod; a network mode and an application protocol become
/// the standard ones. Unknown policy keys are kept as they are: a key that names nothing denies.
impl TryFrom<wire::Workload> for Workload {
    type Error = InvalidResource;

    fn try_from(wire: wire::Workload) -> Result<Self, InvalidResource> {
        let (tunnel_protocol, network_mode) = (protocol(&wire), network_mode(&wire));
        let (workload_type, status) = (workload_type(&wire), status(&wire));
        let (uid, addresses) = (uid(&wire)?, addresses(&wire)?);
        let template = Template {
            dns: pod_dns(&wire.extensions),
            hostname: present(&wire.hostname),
            tunnel_protocol,
            trust_domain: trust_domain(&wire.trust_domain)?,
            service_account: or(&wire.service_account, DEFAULT_SERVICE_ACCOUNT),
            waypoint: gateway("waypoint", wire.waypoint.as_ref())?,
            network_gateway: gateway("network_gateway", wire.network_gateway.as_ref())?,
            workload_type,
            native_tunnel: wire.native_tunnel,
            application_tunnel: application_tunnel(wire.application_tunnel.as_ref())?,
            services: services(&wire.services)?,
            authorization_policies: policy_keys(&wire.authorization_policies)?,
            cluster_id: or(&wire.cluster_id, DEFAULT_CLUSTER),
            network_mode,
            capacity: wire.capacity.unwrap_or(1),
            network: wire.network.into(),
            canonical_name: wire.canonical_name.into(),
            canonical_revision: wire.canonical_revision.into(),
            owner_name: owner_name(&wire.name, wire.workload_name),
            namespace: wire.namespace.into(),
        };
        Ok(Self {
            uid,
            addresses,
            status,
            node: wire.node.into(),
            locality: Arc::new(wire.locality.map(Locality::from).unwrap_or_default()),
            name: wire.name.into(),
            template: Arc::new(template),
        })
    }
}

fn uid(wire: &wire::Workload) -> Result<WorkloadUid, InvalidResource> {
    if wire.uid.is_empty() {
        return Err(InvalidResource::new("uid", Problem::Missing));
    }
    Ok(WorkloadUid(wire.uid.as_str().into()))
}

fn addresses(wire: &wire::Workload) -> Result<Addresses, InvalidResource> {
    let addresses = wire.addresses.iter().enumerate().map(|(at, bytes)| {
        address(bytes).map_err(|problem| InvalidResource::new(format!("addresses[{at}]"), problem))
    });
    addresses.collect()
}

fn present(text: &str) -> Option<Str> {
    (!text.is_empty()).then(|| text.into())
}

fn or(text: &str, default: &str) -> Str {
    if text.is_empty() { default } else { text }.into()
}

fn trust_domain(text: &str) -> Result<TrustDomain, InvalidResource> {
    if text.is_empty() {
        return Ok(TrustDomain::default());
    }
    text.parse()
        .map_err(|error: crate::identity::ParseTrustDomainError| {
            InvalidResource::new("trust_domain", error)
        })
}

fn protocol(wire: &wire::Workload) -> TunnelProtocol {
    match wire::TunnelProtocol::try_from(wire.tunnel_protocol) {
        Ok(wire::TunnelProtocol::None) => TunnelProtocol::None,
        Ok(wire::TunnelProtocol::Hbone) => TunnelProtocol::Hbone,
        Ok(wire::TunnelProtocol::LegacyIstioMtls) | Err(_) => TunnelProtocol::Unsupported,
    }
}

fn status(wire: &wire::Workload) -> Health {
    match wire::WorkloadStatus::try_from(wire.status) {
        Ok(wire::WorkloadStatus::Healthy) => Health::Healthy,
        Ok(wire::WorkloadStatus::Unhealthy) | Err(_) => Health::Unhealthy,
    }
}

fn workload_type(wire: &wire::Workload) -> WorkloadType {
    match wire::WorkloadType::try_from(wire.workload_type) {
        Ok(wire::WorkloadType::Deployment) => WorkloadType::Deployment,
        Ok(wire::WorkloadType::Cronjob) => WorkloadType::CronJob,
        Ok(wire::WorkloadType::Job) => WorkloadType::Job,
        Ok(wire::WorkloadType::Pod) | Err(_) => WorkloadType::Pod,
    }
}

fn network_mode(wire: &wire::Workload) -> NetworkMode {
    match wire::NetworkMode::try_from(wire.network_mode) {
        Ok(wire::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
        Ok(wire::NetworkMode::Standard) | Err(_) => NetworkMode::Standard,
    }
}

fn application_tunnel(
    wire: Option<&wire::ApplicationTunnel>,
) -> Result<Option<ApplicationTunnel>, InvalidResource> {
    use wire::application_tunnel::Protocol;
    let tunnel = |wire: &wire::ApplicationTunnel| {
        let port = port(wire.port)
            .map_err(|problem| InvalidResource::new("application_tunnel.port", problem))?;
        let protocol = match Protocol::try_from(wire.protocol) {
            Ok(Protocol::Proxy) => ApplicationProtocol::Proxy,
            Ok(Protocol::None) | Err(_) => ApplicationProtocol::None,
        };
        Ok(ApplicationTunnel {
            protocol,
            port: (port > 0).then_some(port),
        })
    };
    wire.map(tunnel).transpose()
}

/// One that cannot be read is passed over: the pod's names are answered as by default then.
fn pod_dns(extensions: &[wire::Extension]) -> Option<Arc<PodDns>> {
    let configs = extensions.iter().filter_map(|it| it.config.as_ref());
    let mut ours = configs.filter(|it| it.type_url == proto::POD_DNS_TYPE_URL);
    let told = extension::PodDns::decode(&*ours.next()?.value).ok()?;
    let host = (!told.subdomain.is_empty()).then(|| PodHost {
        subdomain: told.subdomain.into(),
        name: present(&told.hostname),
    });
    PodDns::new(told.cluster_first, &told.searches, &told.nameservers, host).map(Arc::new)
}

/// How a pod's resolver is set up, on the wire.
pub fn pod_dns_extension(dns: &PodDns) -> wire::Extension {
    let told = extension::PodDns {
        cluster_first: dns.cluster_first,
        searches: dns.searches.iter().map(ToString::to_string).collect(),
        nameservers: dns.nameservers.iter().map(ToString::to_string).collect(),
        subdomain: text(dns.host.as_ref().map(|it| &it.subdomain)),
        hostname: text(dns.host.as_ref().and_then(|it| it.name.as_ref())),
    };
    wire::Extension {
        name: "leyline.dev/pod-dns".to_owned(),
        config: Some(prost_types::Any {
            type_url: proto::POD_DNS_TYPE_URL.to_owned(),
            value: told.encode_to_vec(),
        }),
    }
}

fn text(text: Option<&Str>) -> String {
    text.map(ToString::to_string).unwrap_or_default()
}

fn services(wire: &BTreeMap<String, wire::PortList>) -> Result<PortsOfServices, InvalidResource> {
    let mut services = PortsOfServices::with_capacity(wire.len());
    for (key, ports) in wire {
        let field = || format!("services[{key:?}]");
        let name = key.parse();
        let name: NamespacedHostname = name
            .map_err(|error: crate::names::ParseKeyError| InvalidResource::new(field(), error))?;
        let ports = port_map(&ports.ports).map_err(|it| it.within(&field()))?;
        services.insert(name, ports);
    }
    Ok(services)
}

/// Where a service port occurs twice, the last one counts.
pub(super) fn port_map(wire: &[wire::Port]) -> Result<PortMap, InvalidResource> {
    let mut ports = PortMap::with_capacity(wire.len());
    for (at, it) in wire.iter().enumerate() {
        let wrong = |problem| InvalidResource::new(format!("ports[{at}]"), problem);
        let service_port = port(it.service_port).map_err(wrong)?;
        ports.insert(service_port, port(it.target_port).map_err(wrong)?);
    }
    Ok(ports)
}

pub(super) fn port_list(ports: &PortMap) -> Vec<wire::Port> {
    let list = ports.iter().map(|(service_port, target_port)| wire::Port {
        service_port: (*service_port).into(),
        target_port: (*target_port).into(),
        app_protocol: wire::AppProtocol::Unknown.into(),
    });
    list.collect()
}

fn policy_keys(wire: &[String]) -> Result<Vec<crate::names::PolicyKey>, InvalidResource> {
    let keys = wire.iter().enumerate().map(|(at, key)| {
        key.parse().map_err(|error: crate::names::ParseKeyError| {
            InvalidResource::new(format!("authorization_policies[{at}]"), error)
        })
    });
    keys.collect()
}

impl From<wire::Locality> for Locality {
    fn from(wire: wire::Locality) -> Self {
        Self {
            region: wire.region.into(),
            zone: wire.zone.into(),
            subzone: wire.subzone.into(),
        }
    }
}

/// Defaults are left out, as istiod does.
impl From<&Workload> for wire::Workload {
    fn from(workload: &Workload) -> Self {
        let services = workload.services.iter().map(|(key, ports)| {
            let ports = port_list(ports);
            (key.to_string(), wire::PortList { ports })
        });
        let policies = workload.authorization_policies.iter();
        let default_domain = workload.trust_domain == TrustDomain::default();
        let trust_domain = (!default_domain).then(|| workload.trust_domain.to_string());
        let default_account = &*workload.service_account == DEFAULT_SERVICE_ACCOUNT;
        let service_account = (!default_account).then(|| workload.service_account.to_string());
        Self {
            uid: workload.uid.to_string(),
            name: workload.name.to_string(),
            namespace: workload.namespace.to_string(),
            addresses: workload.addresses.iter().map(|it| bytes(*it)).collect(),
            hostname: workload.hostname.as_deref().unwrap_or_default().to_owned(),
            network: workload.network.to_string(),
            tunnel_protocol: wire_protocol(workload.tunnel_protocol).into(),
            trust_domain: trust_domain.unwrap_or_default(),
            service_account: service_account.unwrap_or_default(),
            waypoint: workload.waypoint.as_ref().map(Into::into),
            network_gateway: workload.network_gateway.as_ref().map(Into::into),
            node: workload.node.to_string(),
            canonical_name: workload.canonical_name.to_string(),
            canonical_revision: workload.canonical_revision.to_string(),
            workload_type: wire_type(workload.workload_type).into(),
            workload_name: workload.workload_name().to_string(),
            native_tunnel: workload.native_tunnel,
            application_tunnel: workload.application_tunnel.map(wire_tunnel),
            services: services.collect(),
            authorization_policies: policies.map(ToString::to_string).collect(),
            status: wire_status(workload.status).into(),
            cluster_id: workload.cluster_id.to_string(),
            locality: wire_locality(&workload.locality),
            network_mode: wire_mode(workload.network_mode).into(),
            extensions: workload
                .dns
                .iter()
                .map(|it| pod_dns_extension(it))
                .collect(),
            capacity: (workload.capacity != 1).then_some(workload.capacity),
        }
    }
}

fn wire_protocol(protocol: TunnelProtocol) -> wire::TunnelProtocol {
    match protocol {
        TunnelProtocol::None => wire::TunnelProtocol::None,
        TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone,
        TunnelProtocol::Unsupported => wire::TunnelProtocol::LegacyIstioMtls,
    }
}

fn wire_type(kind: WorkloadType) -> wire::WorkloadType {
    match kind {
        WorkloadType::Deployment => wire::WorkloadType::Deployment,
        WorkloadType::CronJob => wire::WorkloadType::Cronjob,
        WorkloadType::Pod => wire::WorkloadType::Pod,
        WorkloadType::Job => wire::WorkloadType::Job,
    }
}

fn wire_status(status: Health) -> wire::WorkloadStatus {
    match status {
        Health::Healthy => wire::WorkloadStatus::Healthy,
        Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
    }
}

fn wire_mode(mode: NetworkMode) -> wire::NetworkMode {
    match mode {
        NetworkMode::Standard => wire::NetworkMode::Standard,
        NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
    }
}

fn wire_tunnel(tunnel: ApplicationTunnel) -> wire::ApplicationTunnel {
    use wire::application_tunnel::Protocol;
    let protocol = match tunnel.protocol {
        ApplicationProtocol::None => Protocol::None,
        ApplicationProtocol::Proxy => Protocol::Proxy,
    };
    wire::ApplicationTunnel {
        protocol: protocol.into(),
        port: tunnel.port.unwrap_or_default().into(),
    }
}

fn wire_locality(locality: &Locality) -> Option<wire::Locality> {
    (*locality != Locality::default()).then(|| wire::Locality {
        region: locality.region.to_string(),
        zone: locality.zone.to_string(),
        subzone: locality.subzone.to_string(),
    })
}
