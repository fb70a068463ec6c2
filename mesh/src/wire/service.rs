//! `istio.workload.Service`.

use std::{net::IpAddr, sync::Arc};

use proto::workload as wire;

use super::{
    InvalidResource, Problem, bytes, cidr, gateway, key, network_address,
    workload::{port_list, port_map},
};
use crate::{
    names::{NamespacedHostname, NetworkAddress, Str},
    service::{
        CidrVip, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, PortNames, Scope,
        Service, Visibility, WeightedWaypoint,
    },
    workload::GatewayAddress,
};

/// Unknown enum numbers: a preference is left out; modes, health policies, families and visibility take their
/// defaults. A SAN that is no SPIFFE ID of the mesh's form can match no peer, and is left out.
impl TryFrom<wire::Service> for Service {
    type Error = InvalidResource;

    fn try_from(wire: wire::Service) -> Result<Self, InvalidResource> {
        if wire.hostname.is_empty() {
            return Err(InvalidResource::new("hostname", Problem::Missing));
        }
        let key: NamespacedHostname = key(&wire.namespace, &wire.hostname)
            .map_err(|problem| InvalidResource::new("hostname", problem))?;
        let (vips, cidr_vips) = addresses(&wire.addresses)?;
        let names = wire.subject_alt_names.iter();
        Ok(Self {
            vips,
            cidr_vips,
            ports: port_map(&wire.ports)?,
            port_names: port_names(&wire.port_names),
            subject_alt_names: names.filter_map(|it| it.parse().ok()).collect(),
            waypoint: gateway("waypoint", wire.waypoint.as_ref())?,
            weighted_waypoints: weighted(&wire.weighted_waypoints)?,
            load_balancing: load_balancing(wire.load_balancing.as_ref()),
            ip_families: families(wire.ip_families),
            canonical: wire.canonical,
            visibility: visibility(wire.visibility),
            name: wire.name.into(),
            namespace: key.namespace,
            hostname: key.hostname,
        })
    }
}

/// One of a number that no port has is passed over.
fn port_names(wire: &[wire::service::PortName]) -> Option<Arc<PortNames>> {
    let named = wire.iter().filter_map(|it| {
        let port = u16::try_from(it.service_port).ok()?;
        Some((port, &it.name))
    });
    PortNames::new(named).map(Arc::new)
}

fn port_name((port, name): (u16, &Str)) -> wire::service::PortName {
    wire::service::PortName {
        service_port: port.into(),
        name: name.to_string(),
    }
}

/// Host addresses and ranges.
fn addresses(
    wire: &[wire::NetworkAddress],
) -> Result<(Vec<NetworkAddress>, Vec<CidrVip>), InvalidResource> {
    let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
    for (at, it) in wire.iter().enumerate() {
        let wrong = |problem| InvalidResource::new(format!("addresses[{at}]"), problem);
        let vip = network_address(it).map_err(wrong)?;
        match it.length.map(|length| cidr(&it.address, length)) {
            None => vips.push(vip),
            Some(range) => {
                let cidr = range.map_err(wrong)?;
                if cidr.prefix_len() == cidr.max_prefix_len() {
                    vips.push(vip);
                } else {
                    let network = vip.network;
                    cidr_vips.push(CidrVip { network, cidr });
                }
            }
        }
    }
    Ok((vips, cidr_vips))
}

fn weighted(wire: &[wire::WeightedWaypoint]) -> Result<Vec<WeightedWaypoint>, InvalidResource> {
    let waypoints = wire.iter().enumerate().map(|(at, it)| {
        let field = format!("weighted_waypoints[{at}].destination");
        let destination = it.destination.as_ref();
        let destination =
            destination.ok_or_else(|| InvalidResource::new(field.as_str(), Problem::Missing))?;
        Ok(WeightedWaypoint {
            destination: GatewayAddress::try_from(destination).map_err(|it| it.within(&field))?,
            weight: it.weight,
        })
    });
    waypoints.collect()
}

fn load_balancing(wire: Option<&wire::LoadBalancing>) -> LoadBalancing {
    use wire::load_balancing as lb;
    let Some(wire) = wire else {
        return LoadBalancing::default();
    };
    let mode = match lb::Mode::try_from(wire.mode) {
        Ok(lb::Mode::UnspecifiedMode) | Err(_) => LoadBalancingMode::Standard,
        Ok(lb::Mode::Strict) => LoadBalancingMode::Strict,
        Ok(lb::Mode::Failover) => LoadBalancingMode::Failover,
        Ok(lb::Mode::Passthrough) => LoadBalancingMode::Passthrough,
    };
    let health_policy = match lb::HealthPolicy::try_from(wire.health_policy) {
        Ok(lb::HealthPolicy::OnlyHealthy) | Err(_) => HealthPolicy::OnlyHealthy,
        Ok(lb::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
    };
    LoadBalancing {
        routing_preferences: wire.routing_preference.iter().filter_map(scope).collect(),
        mode,
        health_policy,
    }
}

fn scope(number: &i32) -> Option<Scope> {
    use wire::load_balancing::Scope as Wire;
    match Wire::try_from(*number).ok()? {
        Wire::UnspecifiedScope => None,
        Wire::Region => Some(Scope::Region),
        Wire::Zone => Some(Scope::Zone),
        Wire::Subzone => Some(Scope::Subzone),
        Wire::Node => Some(Scope::Node),
        Wire::Cluster => Some(Scope::Cluster),
        Wire::Network => Some(Scope::Network),
    }
}

fn families(number: i32) -> IpFamilies {
    match wire::IpFamilies::try_from(number) {
        Ok(wire::IpFamilies::Automatic) | Err(_) => IpFamilies::Automatic,
        Ok(wire::IpFamilies::Ipv4Only) => IpFamilies::Ipv4Only,
        Ok(wire::IpFamilies::Ipv6Only) => IpFamilies::Ipv6Only,
        Ok(wire::IpFamilies::Dual) => IpFamilies::Dual,
    }
}

fn visibility(number: i32) -> Visibility {
    match wire::Visibility::try_from(number) {
        Ok(wire::Visibility::Namespace) => Visibility::Namespace,
        Ok(wire::Visibility::Public) | Err(_) => Visibility::Public,
    }
}

impl From<&Service> for wire::Service {
    fn from(service: &Service) -> Self {
        let vips = service.vips.iter().map(wire::NetworkAddress::from);
        let ranges = service.cidr_vips.iter().map(wire::NetworkAddress::from);
        let names = service.subject_alt_names.iter();
        let waypoints = service.weighted_waypoints.iter();
        let names_of_ports = service.port_names.iter().flat_map(|it| it.iter());
        let balanced = service.load_balancing != LoadBalancing::default();
        Self {
            name: service.name.to_string(),
            namespace: service.namespace.to_string(),
            hostname: service.hostname.to_string(),
            addresses: vips.chain(ranges).collect(),
            ports: port_list(&service.ports),
            subject_alt_names: names.map(ToString::to_string).collect(),
            waypoint: service.waypoint.as_ref().map(Into::into),
            load_balancing: balanced.then(|| wire_load_balancing(&service.load_balancing)),
            ip_families: wire_families(service.ip_families).into(),
            extensions: Vec::new(),
            canonical: service.canonical,
            ingress_use_waypoint: false,
            weighted_waypoints: waypoints.map(Into::into).collect(),
            visibility: wire_visibility(service.visibility).into(),
            port_names: names_of_ports.map(port_name).collect(),
        }
    }
}

impl From<&CidrVip> for wire::NetworkAddress {
    fn from(vip: &CidrVip) -> Self {
        let address: IpAddr = vip.cidr.addr();
        Self {
            network: vip.network.to_string(),
            address: bytes(address),
            length: Some(vip.cidr.prefix_len().into()),
        }
    }
}

impl From<&WeightedWaypoint> for wire::WeightedWaypoint {
    fn from(waypoint: &WeightedWaypoint) -> Self {
        Self {
            destination: Some((&waypoint.destination).into()),
            weight: waypoint.weight,
        }
    }
}

fn wire_load_balancing(balancing: &LoadBalancing) -> wire::LoadBalancing {
    use wire::load_balancing as lb;
    let mode = match balancing.mode {
        LoadBalancingMode::Standard => lb::Mode::UnspecifiedMode,
        LoadBalancingMode::Strict => lb::Mode::Strict,
        LoadBalancingMode::Failover => lb::Mode::Failover,
        LoadBalancingMode::Passthrough => lb::Mode::Passthrough,
    };
    let health_policy = match balancing.health_policy {
        HealthPolicy::OnlyHealthy => lb::HealthPolicy::OnlyHealthy,
        HealthPolicy::AllowAll => lb::HealthPolicy::AllowAll,
    };
    let preferences = balancing
        .routing_preferences
        .iter()
        .map(|it| wire_scope(*it));
    wire::LoadBalancing {
        routing_preference: preferences.map(Into::into).collect(),
        mode: mode.into(),
        health_policy: health_policy.into(),
    }
}

fn wire_scope(scope: Scope) -> wire::load_balancing::Scope {
    use wire::load_balancing::Scope as Wire;
    match scope {
        Scope::Region => Wire::Region,
        Scope::Zone => Wire::Zone,
        Scope::Subzone => Wire::Subzone,
        Scope::Node => Wire::Node,
        Scope::Cluster => Wire::Cluster,
        Scope::Network => Wire::Network,
    }
}

fn wire_families(families: IpFamilies) -> wire::IpFamilies {
    match families {
        IpFamilies::Automatic => wire::IpFamilies::Automatic,
        IpFamilies::Ipv4Only => wire::IpFamilies::Ipv4Only,
        IpFamilies::Ipv6Only => wire::IpFamilies::Ipv6Only,
        IpFamilies::Dual => wire::IpFamilies::Dual,
    }
}

fn wire_visibility(visibility: Visibility) -> wire::Visibility {
    match visibility {
        Visibility::Public => wire::Visibility::Public,
        Visibility::Namespace => wire::Visibility::Namespace,
    }
}
