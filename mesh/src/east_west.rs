//! A gateway between networks: to which HBONE port of its own network what came through an outer tunnel is passed on
//! (control-plane.md section 11, node-tunnel 2.8).
//!
//! What is passed on is the inner tunnel, which ends at a pod or at a waypoint and whose policies are enforced there. The
//! gateway never chooses an endpoint of another network, nor one of itself: two gateways cannot send a connection in circles.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use crate::{
    draw::Draw,
    outbound::{HBONE_PORT, drawn_waypoint},
    outcome::{Object, Reason, Refusal},
    select::{Purpose, Reach, Selected, reach, select_among},
    service::Service,
    view::MeshView,
    workload::{GatewayAddress, GatewayDestination, TunnelProtocol, Workload},
};

#[cfg(test)]
mod tests;

/// What is known of one inner tunnel, beside the service that it is for.
#[derive(Clone, Copy, Debug)]
pub struct InnerFacts<'a> {
    /// The gateway's own record.
    pub own: &'a Workload,
    /// The sender is a waypoint (`x-istio-source`): the service's own is not asked again.
    pub passed_waypoint: bool,
}

/// Where the inner tunnel ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Onward {
    /// The pod or waypoint.
    pub workload: Arc<Workload>,
    /// Its HBONE port.
    pub address: SocketAddr,
}

/// Chooses where the inner tunnel for `service` and its port goes: to the service's waypoint, else to one of its endpoints.
/// `is_candidate` leaves out those that have refused already.
///
/// # Errors
/// There is none that could be, for a reason that names the service or its waypoint.
pub fn onward(
    view: &MeshView,
    facts: &InnerFacts<'_>,
    service: &Service,
    port: u16,
    draw: Draw,
    is_candidate: impl Fn(&Workload) -> bool,
) -> Result<Onward, Refusal> {
    let (which, endpoint) = draw.split();
    let own = facts.own;
    // No record says of a waypoint that it takes tunnels: that it is one does.
    let proxy = |workload: &Workload| is_ours(own, workload) && is_candidate(workload);
    let pod =
        |workload: &Workload| workload.tunnel_protocol == TunnelProtocol::Hbone && proxy(workload);
    match drawn_waypoint(service, which).filter(|_| !facts.passed_waypoint) {
        Some(waypoint) => Asked::new(view, own, &proxy).waypoint(waypoint, endpoint),
        None => Asked::new(view, own, &pod).endpoint(service, port, endpoint),
    }
}

/// Of the gateway's network, and not the gateway or its like.
fn is_ours(own: &Workload, workload: &Workload) -> bool {
    workload.network == own.network
        && workload.uid != own.uid
        && workload.identity() != own.identity()
}

struct Asked<'a> {
    view: &'a MeshView,
    own: &'a Workload,
    fits: &'a dyn Fn(&Workload) -> bool,
}

impl<'a> Asked<'a> {
    fn new(view: &'a MeshView, own: &'a Workload, fits: &'a dyn Fn(&Workload) -> bool) -> Self {
        Self { view, own, fits }
    }

    fn endpoint(&self, service: &Service, port: u16, draw: Draw) -> Result<Onward, Refusal> {
        let refused = || Refusal::by(Reason::NoHealthyUpstream, Object::Service(service.key()));
        let selected = self.select(service, port, Purpose::Traffic, draw, |selected| {
            self.at(service, &selected.endpoint.workload, HBONE_PORT)
        });
        selected.ok_or_else(refused)
    }

    /// Closed where there is none: never gone around.
    fn waypoint(&self, waypoint: &GatewayAddress, draw: Draw) -> Result<Onward, Refusal> {
        let object = match &waypoint.destination {
            GatewayDestination::Hostname(key) => Object::Service(key.clone()),
            GatewayDestination::Address(address) => Object::Address(address.clone()),
        };
        let refused = || Refusal::by(Reason::WaypointMissing, object);
        self.behind(waypoint, draw).ok_or_else(refused)
    }

    fn behind(&self, waypoint: &GatewayAddress, draw: Draw) -> Option<Onward> {
        let port = waypoint.hbone_mtls_port;
        let service = match &waypoint.destination {
            GatewayDestination::Hostname(key) => self.view.service(key),
            GatewayDestination::Address(address) => {
                if let Some(workload) = self.view.workload_at(address) {
                    let address = SocketAddr::new(address.address, port);
                    let workload = Arc::clone(workload);
                    return (self.fits)(&workload).then_some(Onward { workload, address });
                }
                self.view.service_at(address, &self.own.namespace)
            }
        }?;
        self.select(service, port, Purpose::Gateway, draw, |selected| {
            self.at(service, &selected.endpoint.workload, selected.port)
        })
    }

    fn select(
        &self,
        service: &Service,
        port: u16,
        purpose: Purpose,
        draw: Draw,
        then: impl FnOnce(Selected<'_>) -> Option<Onward>,
    ) -> Option<Onward> {
        let endpoints = self.view.endpoints(&service.key());
        let has_address = |workload: &Workload| {
            let mut addresses = workload.addresses.iter();
            addresses.any(|it| service.ip_families.allows(*it))
        };
        let fits = |workload: &Workload| has_address(workload) && (self.fits)(workload);
        let selected = select_among(service, &endpoints, self.own, port, purpose, draw, &fits);
        selected.and_then(then)
    }

    fn at(&self, service: &Service, workload: &Arc<Workload>, port: u16) -> Option<Onward> {
        let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let own = self.own.addresses.first().copied().unwrap_or(unspecified);
        match reach(workload, service.ip_families, own)? {
            Reach::Ip(ip) => Some(Onward {
                workload: Arc::clone(workload),
                address: SocketAddr::new(ip, port),
            }),
            Reach::Hostname(_) | Reach::Gateway => None,
        }
    }
}
