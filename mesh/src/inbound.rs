//! Where an inbound connection ends (node-tunnel 4.3, 4.4). Whether it may be is [`crate::authorize`]'s question, put
//! next, for the address that this module answers.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::Serialize;

use crate::{
    authority::Authority,
    names::{NetworkAddress, Str},
    outbound::{RECURSION_PORTS, is_behind},
    outcome::{Object, Outcome, Reason, Refusal},
    service::Service,
    view::MeshView,
    workload::{ApplicationProtocol, GatewayAddress, Workload},
};

#[cfg(test)]
mod tests;

/// What is known of one plaintext connection to the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlaintextFacts {
    /// The record of the pod.
    pub workload: Arc<Workload>,
    /// Where the peer connected to; an IPv4-mapped address is unwrapped.
    pub original_dst: SocketAddr,
    /// The port on which the tunnel serves SOCKS5, where it does: one more of its own.
    pub socks5: Option<u16>,
}

/// What is known of one CONNECT request to the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TunnelFacts {
    /// The record of the pod.
    pub workload: Arc<Workload>,
    /// The network of this node.
    pub network: Str,
    /// The pod's end of the tunnel's connection.
    pub local: SocketAddr,
    /// The authority of the request.
    pub authority: Authority,
    /// `host=` of the Forwarded header.
    pub forwarded_host: Option<Str>,
    /// The port on which the tunnel serves SOCKS5, where it does: one more of its own.
    pub socks5: Option<u16>,
}

/// Where the bytes go inside the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InboundTarget {
    /// The pod's address and its application's port: what policies see, and what is dialled, unless a PROXY header
    /// is wanted and the application listens on loopback.
    pub destination: SocketAddr,
    /// The service that the client addressed, as far as can be told; for telemetry only.
    pub service: Option<Arc<Service>>,
    /// The application wants a PROXY protocol header, with this destination.
    pub proxy_destination: Option<SocketAddr>,
}

/// Whether a port is the tunnel's own: what is sent to it would come back.
fn is_own(port: u16, socks5: Option<u16>) -> bool {
    RECURSION_PORTS.contains(&port) || socks5 == Some(port)
}

/// Decides for one plaintext connection.
pub fn plaintext(view: &MeshView, facts: &PlaintextFacts) -> Outcome<InboundTarget> {
    let address = facts.original_dst;
    let destination = SocketAddr::new(address.ip().to_canonical(), address.port());
    if is_own(destination.port(), facts.socks5) {
        return Refusal::new(Reason::Recursion).into();
    }
    // A neighbour on the link can send to any address of this pod's loopback: the redirect hides that from the kernel's
    // own check. What listens there is for the pod alone.
    if destination.ip().is_loopback() {
        return Refusal::new(Reason::AddressMismatch).into();
    }
    Outcome::Go(InboundTarget {
        destination,
        service: service_of(view, &facts.workload, None, destination.port()),
        proxy_destination: None,
    })
}

/// Decides for one CONNECT request.
pub fn tunnel(view: &MeshView, facts: &TunnelFacts) -> Outcome<InboundTarget> {
    match decide(view, facts) {
        Ok(target) => Outcome::Go(target),
        Err(refusal) => refusal.into(),
    }
}

fn decide(view: &MeshView, facts: &TunnelFacts) -> Result<InboundTarget, Refusal> {
    let local = facts.local.ip().to_canonical();
    let (port, service) = match &facts.authority {
        Authority::Address(address) => {
            check_address(view, facts, local, address.ip())?;
            let host = facts.forwarded_host.as_deref();
            let service = service_of(view, &facts.workload, host, address.port());
            (address.port(), service)
        }
        Authority::Hostname(host, port) => {
            let service = named_service(view, facts, host)?;
            (port_here(&facts.workload, &service, *port)?, Some(service))
        }
    };
    let tunnel = facts.workload.application_tunnel;
    let last = tunnel.and_then(|it| it.port).unwrap_or(port);
    if [port, last].iter().any(|it| is_own(*it, facts.socks5)) {
        return Err(Refusal::new(Reason::Recursion));
    }
    let proxied = tunnel.is_some_and(|it| it.protocol == ApplicationProtocol::Proxy);
    Ok(InboundTarget {
        destination: SocketAddr::new(local, last),
        proxy_destination: if proxied {
            Some(proxy_destination(facts, service.as_deref())?)
        } else {
            None
        },
        service,
    })
}

/// Rows 3 to 6: an address that is not ours is for us only where we stand in for what it belongs to.
fn check_address(
    view: &MeshView,
    facts: &TunnelFacts,
    local: IpAddr,
    authority: IpAddr,
) -> Result<(), Refusal> {
    let ours = authority == local || facts.workload.application_tunnel.is_some();
    let address = NetworkAddress {
        network: facts.network.clone(),
        address: authority,
    };
    if ours || is_waypoint_of(view, &facts.workload, local, &address) {
        return Ok(());
    }
    Err(Refusal::by(
        Reason::AddressMismatch,
        Object::Address(address),
    ))
}

/// Whether the pod is a waypoint of what has this address: a member of the waypoint's service, or the record that
/// holds the pod's address.
fn is_waypoint_of(
    view: &MeshView,
    pod: &Workload,
    local: IpAddr,
    address: &NetworkAddress,
) -> bool {
    let us = |it: &Workload| it.uid == pod.uid || it.addresses.contains(&local);
    let behind = |it: &GatewayAddress| is_behind(view, &it.destination, &pod.namespace, us);
    if let Some(workload) = view.workload_at(address) {
        return workload.waypoint.as_ref().is_some_and(behind);
    }
    let Some(service) = view.service_at(address, &pod.namespace) else {
        return false;
    };
    let weighted = service.weighted_waypoints.iter();
    let waypoints = weighted.map(|it| &it.destination).chain(&service.waypoint);
    waypoints.into_iter().any(behind)
}

fn named_service(
    view: &MeshView,
    facts: &TunnelFacts,
    hostname: &str,
) -> Result<Arc<Service>, Refusal> {
    let service = view.service_by_hostname(hostname, &facts.workload.namespace);
    service
        .cloned()
        .ok_or_else(|| Refusal::new(Reason::UnknownHostname))
}

/// The pod's own map first, then the service's target; 0 is no port.
fn port_here(workload: &Workload, service: &Service, port: u16) -> Result<u16, Refusal> {
    let key = service.key();
    let own = workload.services.get(&key).and_then(|it| it.get(&port));
    let target = own.or_else(|| service.ports.get(&port));
    target
        .copied()
        .filter(|port| *port > 0)
        .ok_or_else(|| Refusal::by(Reason::UnknownHostname, Object::Service(key)))
}

/// What the PROXY header names: the address that was asked for, or for a host name one of its service's: this
/// network's first, IPv4 before IPv6.
fn proxy_destination(
    facts: &TunnelFacts,
    service: Option<&Service>,
) -> Result<SocketAddr, Refusal> {
    let port = match &facts.authority {
        Authority::Address(address) => return Ok(*address),
        Authority::Hostname(_, port) => *port,
    };
    let vips = service.map_or(&[][..], |it| &it.vips);
    let vip = vips
        .iter()
        .min_by_key(|it| (it.network != facts.network, it.address.is_ipv6()));
    vip.map(|it| SocketAddr::new(it.address, port))
        .ok_or_else(|| Refusal::new(Reason::NoAddress))
}

/// The service that a connection to the pod's `port` was for: the one that the sender names, if the pod belongs to
/// it; else the first of the pod's that leads to that port.
fn service_of(
    view: &MeshView,
    workload: &Workload,
    named: Option<&str>,
    port: u16,
) -> Option<Arc<Service>> {
    let own = || workload.services.iter();
    let by_name = named.and_then(|host| own().find(|(key, _)| &*key.hostname == host));
    if let Some(service) = by_name.and_then(|(key, _)| view.service(key)) {
        return Some(Arc::clone(service));
    }
    let leads = |service: &Arc<Service>, ports: &crate::workload::PortMap| {
        let mut targets = service.ports.iter();
        targets.any(|(from, to)| *ports.get(from).unwrap_or(to) == port)
    };
    own()
        .filter_map(|(key, ports)| Some((view.service(key)?, ports)))
        .find(|(service, ports)| leads(service, ports))
        .map(|(service, _)| Arc::clone(service))
}
