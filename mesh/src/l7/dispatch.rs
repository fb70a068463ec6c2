//! Which service or workload a CONNECT to a waypoint is for, and whether this waypoint serves it (waypoint.md 1.1, 1.4).
//!
//! The sender is not trusted: what is not bound to this waypoint is refused, and so is every address that could lead
//! into the waypoint itself.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    served::{AppProtocol, ServedService},
    view::View,
};
use crate::{
    authority::Authority,
    names::{NetworkAddress, Str},
    outcome::{Need, Object, Outcome, Reason, Refusal},
    service::Service,
    view::MeshView,
    workload::Workload,
};

#[cfg(test)]
mod tests;

/// What is known of one CONNECT, beside its authority who we are.
#[derive(Clone, Debug)]
pub struct DispatchFacts<'a> {
    /// What the client asks for.
    pub authority: &'a Authority,
    /// Our end of the tunnel's connection, unmapped: no destination.
    pub local: IpAddr,
    /// Our network; empty: the default one, where host names are no authorities (upstream's single-network mode).
    pub network: &'a Str,
    /// Our namespace: among services of one address, its own come first.
    pub namespace: &'a str,
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A service's port.
    Service {
        /// In the mesh.
        service: Arc<Service>,
        /// As it is served here.
        served: Arc<ServedService>,
        /// The service's port.
        port: u16,
        /// What the port is declared to speak.
        protocol: AppProtocol,
        /// The address that was asked for; for a host name, one of the service's, or none.
        address: Option<IpAddr>,
    },
    /// A workload, by its own address.
    Workload {
        /// Which.
        workload: Arc<Workload>,
        /// Where.
        address: SocketAddr,
    },
}

impl Target {
    /// The port that is addressed.
    pub fn port(&self) -> u16 {
        match self {
            Self::Service { port, .. } => *port,
            Self::Workload { address, .. } => address.port(),
        }
    }

    /// The service, if it is one.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Service { service, .. } => Some(service),
            Self::Workload { .. } => None,
        }
    }

    /// What the port is declared to speak.
    pub fn protocol(&self) -> AppProtocol {
        match self {
            Self::Service { protocol, .. } => *protocol,
            Self::Workload { .. } => AppProtocol::Unknown,
        }
    }
}

/// Decides what a CONNECT is for. What is not known (yet) to be served is needed: the client's node may have heard of
/// a binding before we did.
pub fn dispatch(mesh: &MeshView, l7: &View, facts: &DispatchFacts<'_>) -> Outcome<Target> {
    match facts.authority {
        Authority::Hostname(host, port) => by_hostname(mesh, l7, facts, host, *port),
        Authority::Address(address) => by_address(mesh, l7, facts, *address),
    }
}

/// The same for a gateway between networks: the inner tunnel ends behind it, so that nothing but a service's name tells
/// where it leads (control-plane.md 11). What it does not serve, among that every service that is local to its cluster, is
/// refused.
pub fn dispatch_inner(mesh: &MeshView, l7: &View, facts: &DispatchFacts<'_>) -> Outcome<Target> {
    match facts.authority {
        Authority::Hostname(host, port) => service_named(mesh, l7, facts, host, *port),
        Authority::Address(address) => {
            let object = Object::Address(in_network(facts, address.ip().to_canonical()));
            Refusal::by(Reason::NotServed, object).into()
        }
    }
}

fn by_hostname(
    mesh: &MeshView,
    l7: &View,
    facts: &DispatchFacts<'_>,
    host: &str,
    port: u16,
) -> Outcome<Target> {
    if facts.network.is_empty() {
        return Refusal::new(Reason::UnknownHostname).into();
    }
    service_named(mesh, l7, facts, host, port)
}

/// A service that is served here, by its name.
fn service_named(
    mesh: &MeshView,
    l7: &View,
    facts: &DispatchFacts<'_>,
    host: &str,
    port: u16,
) -> Outcome<Target> {
    let services = mesh.services_by_hostname(host);
    match preferred(l7, services, facts.namespace) {
        Some(found) => found.on(port, vip(&found.service, facts)),
        None => Outcome::Need(Need::Served(host.into())),
    }
}

fn by_address(
    mesh: &MeshView,
    l7: &View,
    facts: &DispatchFacts<'_>,
    address: SocketAddr,
) -> Outcome<Target> {
    let ip = address.ip().to_canonical();
    if leads_inside(ip, facts.local) {
        let network_address = in_network(facts, ip);
        return Refusal::by(Reason::Recursion, Object::Address(network_address)).into();
    }
    let key = in_network(facts, ip);
    if let Some(found) = preferred(l7, mesh.services_at(&key), facts.namespace) {
        return found.on(address.port(), Some(ip));
    }
    match mesh.workload_at(&key) {
        Some(workload) if l7.serves_workload(&workload.uid) => Outcome::Go(Target::Workload {
            workload: Arc::clone(workload),
            address: SocketAddr::new(ip, address.port()),
        }),
        _ => Outcome::Need(Need::Served(key.to_string().into())),
    }
}

fn in_network(facts: &DispatchFacts<'_>, address: IpAddr) -> NetworkAddress {
    NetworkAddress {
        network: facts.network.clone(),
        address,
    }
}

/// Addresses behind which the waypoint itself may be, or that name nobody in particular.
fn leads_inside(ip: IpAddr, local: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    ip == local.to_canonical()
        || ip.is_loopback()
        || ip.is_unspecified()
        || ip.is_multicast()
        || link_local
}

/// A service that is served here.
struct Found {
    service: Arc<Service>,
    served: Arc<ServedService>,
}

/// Among those that are bound to us: our own namespace's, canonical, first seen.
fn preferred<'a>(
    l7: &View,
    services: impl Iterator<Item = &'a Arc<Service>>,
    namespace: &str,
) -> Option<Found> {
    let bound = services.filter_map(|service| {
        let served = l7.service(&service.key()).filter(|it| it.bound)?;
        Some((service, served))
    });
    let best = bound.min_by_key(|(service, _)| {
        let foreign = &*service.namespace != namespace;
        (foreign, !service.canonical)
    });
    best.map(|(service, served)| Found {
        service: Arc::clone(service),
        served: Arc::clone(served),
    })
}

impl Found {
    fn on(&self, port: u16, address: Option<IpAddr>) -> Outcome<Target> {
        let Some(protocol) = self.served.ports.get(&port) else {
            let object = Object::Service(self.service.key());
            return Refusal::by(Reason::UnknownPort, object).into();
        };
        Outcome::Go(Target::Service {
            service: Arc::clone(&self.service),
            served: Arc::clone(&self.served),
            port,
            protocol: *protocol,
            address,
        })
    }
}

/// One of a service's addresses: of our network first, IPv4 first.
fn vip(service: &Service, facts: &DispatchFacts<'_>) -> Option<IpAddr> {
    let vips = service.vips.iter();
    let best = vips.min_by_key(|it| (it.network != *facts.network, it.address.is_ipv6()));
    best.map(|it| it.address)
}
