//! Where an outbound connection goes next (node-tunnel 4.1), and through what.
//!
//! Fails closed: a waypoint, gateway or protocol that is required and not there refuses; it is never gone around.
//! Only what no record describes is passed through as it is.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::Serialize;

use crate::{
    authority::Authority,
    draw::Draw,
    identity::Identity,
    names::{NetworkAddress, Str},
    outcome::{Object, Outcome, Reason, Refusal},
    select::{Purpose, Reach, reach, select},
    service::{IpFamilies, LoadBalancingMode, Service},
    view::MeshView,
    workload::{GatewayAddress, GatewayDestination, TunnelProtocol, Workload},
};

#[cfg(test)]
mod tests;

/// Where HBONE is spoken.
pub const HBONE_PORT: u16 = 15008;

/// The tunnel's own listeners: a connection to one of them from inside would come back for ever.
pub const RECURSION_PORTS: [u16; 3] = [15001, 15006, HBONE_PORT];

/// What is known of one outbound connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OutboundFacts {
    /// The record of the pod that connects.
    pub source: Arc<Workload>,
    /// The network of this node; must be the source's.
    pub network: Str,
    /// The pod's end of the connection.
    pub client: SocketAddr,
    /// Where the pod connected to; an IPv4-mapped address is unwrapped.
    pub original_dst: SocketAddr,
}

/// How bytes travel to the next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Hop {
    /// As they are.
    Tcp,
    /// In an HBONE stream.
    Hbone,
    /// In an HBONE stream inside an HBONE stream, through another network's gateway.
    DoubleHbone,
}

/// Why the next hop is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Route {
    /// The service asks for its original destinations to be dialled.
    ServicePassthrough,
    /// Nothing is known of the destination.
    UnknownPassthrough,
    /// Straight to the workload.
    Direct,
    /// To the waypoint of the service.
    ServiceWaypoint,
    /// To the waypoint of the workload.
    WorkloadWaypoint,
    /// To the gateway of another network, for an endpoint there.
    Gateway,
    /// To the gateway of another network, for the service's waypoint there.
    WaypointGateway,
}

/// What to dial.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name to resolve; then see [`NextHop::resolved`].
    Hostname {
        /// The name.
        hostname: Str,
        /// The port.
        port: u16,
        /// Which family to take where the name has both.
        prefer_ipv6: bool,
    },
}

/// The next hop of one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NextHop {
    /// Why this one.
    pub route: Route,
    /// How bytes travel.
    pub hop: Hop,
    /// What to dial.
    pub target: Target,
    /// The authority of the CONNECT request; for double HBONE of both; none for plain TCP.
    pub authority: Option<Authority>,
    /// The TLS server must prove one of these. Empty for plain TCP.
    pub expected: Arc<[Identity]>,
    /// For double HBONE: what the server of the inner TLS must prove. Empty: it cannot succeed.
    pub inner_expected: Arc<[Identity]>,
    /// The service that the client addressed.
    pub service: Option<Arc<Service>>,
    /// The record of the next hop itself: a workload, a waypoint or a gateway.
    pub workload: Option<Arc<Workload>>,
}

impl NextHop {
    /// The hop once its host name is resolved to `address`.
    pub fn resolved(self, address: IpAddr) -> Self {
        let Target::Hostname { hostname, port, .. } = &self.target else {
            return self;
        };
        let authority = match self.authority {
            // Only a direct hop names the workload itself.
            Some(Authority::Hostname(name, port))
                if name == *hostname && self.hop == Hop::Hbone =>
            {
                Some(Authority::address(address, port))
            }
            other => other,
        };
        Self {
            target: Target::Address(SocketAddr::new(address, *port)),
            authority,
            ..self
        }
    }
}

/// Chooses the next hop of one outbound connection. Pure: same view, facts and draw, same answer.
///
/// Draws for the waypoint and for the endpoint are independent. Never answers plaintext for a destination whose
/// record speaks HBONE or asks for a protection that we cannot give. Source: Istio workload.proto, node-tunnel 4.1.
pub fn next_hop(view: &MeshView, facts: &OutboundFacts, draw: Draw) -> Outcome<NextHop> {
    let destination = canonical(facts.original_dst);
    if is_our_own(facts, destination.ip()) && RECURSION_PORTS.contains(&destination.port()) {
        return Refusal::new(Reason::Recursion).into();
    }
    let asked = Asked {
        view,
        facts,
        destination,
    };
    match asked.decide(draw) {
        Ok(hop) => Outcome::Go(hop),
        Err(refusal) => refusal.into(),
    }
}

/// The next hop to an endpoint that has been chosen already, for its port `port`: of `service`, or a workload on its own.
/// Never a waypoint. `facts` are those of the connection that is passed on: its destination is what the client addressed.
pub fn to_endpoint(
    view: &MeshView,
    facts: &OutboundFacts,
    service: Option<&Arc<Service>>,
    endpoint: (&Arc<Workload>, u16),
    draw: Draw,
) -> Outcome<NextHop> {
    let asked = Asked {
        view,
        facts,
        destination: canonical(facts.original_dst),
    };
    let (workload, port) = endpoint;
    let hop = match workload.network == facts.source.network {
        true => asked.direct(workload, service, port),
        false => {
            let inner = names_of(service.map(|it| &**it));
            asked.through_gateway(workload, service, inner, draw)
        }
    };
    match hop {
        Ok(hop) => Outcome::Go(hop),
        Err(refusal) => refusal.into(),
    }
}

/// The next hop to a service that another waypoint serves, from the waypoint that `facts.source` is, for its port `port`:
/// that one's policies count, so that it is never gone around. `facts.original_dst` prefers a family.
pub fn to_waypoint(
    view: &MeshView,
    facts: &OutboundFacts,
    service: &Arc<Service>,
    port: u16,
    draw: Draw,
) -> Outcome<NextHop> {
    let wanted = canonical(facts.original_dst).ip();
    let here = service.vips.iter().filter(|it| it.network == facts.network);
    let here: Vec<IpAddr> = here.map(|it| it.address).collect();
    let same = here.iter().find(|it| it.is_ipv6() == wanted.is_ipv6());
    let Some(vip) = same.or(here.first()) else {
        return Refusal::by(Reason::NoAddress, Object::Service(service.key())).into();
    };
    let asked = Asked {
        view,
        facts,
        destination: SocketAddr::new(*vip, port),
    };
    match asked.to_service_waypoint(service, draw) {
        Ok(hop) => Outcome::Go(hop),
        Err(refusal) => refusal.into(),
    }
}

/// Whether the address is the pod itself. Its loopback is the usual case; its own address is dialled by whoever reaches
/// the outbound port from outside, while the rules are not in place.
fn is_our_own(facts: &OutboundFacts, ip: IpAddr) -> bool {
    let client = facts.client.ip().to_canonical();
    ip.is_loopback() || ip == client || facts.source.addresses.contains(&ip)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// One question and what is known for it.
struct Asked<'a> {
    view: &'a MeshView,
    facts: &'a OutboundFacts,
    destination: SocketAddr,
}

impl Asked<'_> {
    fn decide(&self, draw: Draw) -> Result<NextHop, Refusal> {
        let (waypoint, endpoint) = draw.split();
        if let Some(service) = self.service_with_waypoint() {
            return self.to_service_waypoint(service, waypoint);
        }
        let source = &self.facts.source;
        let address = self.address_in(&source.network);
        let workload = self.view.workload_at(&address);
        if let Some(service) = self.view.service_at(&address, &source.namespace) {
            // A tunnel that is told of another network than its pods' has not found it above, and still may not go around.
            if workload.is_none() && has_waypoint(service) {
                return self.to_service_waypoint(service, waypoint);
            }
            return self.to_service(service, endpoint);
        }
        match workload {
            Some(workload) => self.to_workload(workload, waypoint),
            None => Ok(self.passthrough(Route::UnknownPassthrough, None)),
        }
    }

    fn address_in(&self, network: &Str) -> NetworkAddress {
        NetworkAddress {
            network: network.clone(),
            address: self.destination.ip(),
        }
    }

    /// Row 3: here a workload at the address comes before a service.
    fn service_with_waypoint(&self) -> Option<&Arc<Service>> {
        let address = self.address_in(&self.facts.network);
        if self.view.workload_at(&address).is_some() {
            return None;
        }
        let service = self
            .view
            .service_at(&address, &self.facts.source.namespace)?;
        has_waypoint(service).then_some(service)
    }

    /// Rows 3 to 5.
    fn to_service_waypoint(&self, service: &Arc<Service>, draw: Draw) -> Result<NextHop, Refusal> {
        let (which, endpoint) = draw.split();
        let waypoint = drawn_waypoint(service, which);
        let waypoint = waypoint.ok_or_else(|| Refusal::new(Reason::WaypointMissing))?;
        let gateway = self.waypoint(waypoint, endpoint)?;
        let service = Some(Arc::clone(service));
        if gateway.workload.network == self.facts.source.network {
            return self.through_waypoint(gateway, service, Route::ServiceWaypoint);
        }
        // The inner TLS ends at the waypoint: its service's names, since no record of it is here.
        let inner = gateway.service_identities();
        let (_, draw) = endpoint.split();
        let hop = self.through_gateway(&gateway.workload, service.as_ref(), inner, draw)?;
        Ok(NextHop {
            route: Route::WaypointGateway,
            ..hop
        })
    }

    /// Rows 6, 7, 9, 11, 12 for a service.
    fn to_service(&self, service: &Arc<Service>, draw: Draw) -> Result<NextHop, Refusal> {
        let (endpoint, gateway) = draw.split();
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return Ok(self.passthrough(Route::ServicePassthrough, Some(Arc::clone(service))));
        }
        let refused = || self.no_endpoint(service);
        let endpoints = self.view.endpoints_of(&service.key()).ok_or_else(refused)?;
        let port = self.destination.port();
        let source = &self.facts.source;
        let selected = select(service, endpoints, source, port, Purpose::Traffic, endpoint);
        let selected = selected.ok_or_else(refused)?;
        let workload = &selected.endpoint.workload;
        if workload.network != source.network {
            let inner = names_of(Some(service));
            return self.through_gateway(workload, Some(service), inner, gateway);
        }
        self.direct(workload, Some(service), selected.port)
    }

    fn no_endpoint(&self, service: &Service) -> Refusal {
        let key = service.key();
        let endpoints = self.view.endpoints(&key);
        let unsupported = endpoints.iter().next().is_some()
            && endpoints
                .iter()
                .all(|it| it.workload.tunnel_protocol == TunnelProtocol::Unsupported);
        let reason = if unsupported {
            Reason::ProtocolUnsupported
        } else {
            Reason::NoHealthyUpstream
        };
        Refusal::by(reason, Object::Service(key))
    }

    /// Rows 10 to 12 for a workload's own address.
    fn to_workload(&self, workload: &Arc<Workload>, draw: Draw) -> Result<NextHop, Refusal> {
        if let Some(waypoint) = &workload.waypoint
            && !self.is_from(waypoint)
        {
            let gateway = self.waypoint(waypoint, draw)?;
            return self.through_waypoint(gateway, None, Route::WorkloadWaypoint);
        }
        self.direct(workload, None, self.destination.port())
    }

    /// Whether the source is the waypoint itself: by identity and by address.
    fn is_from(&self, waypoint: &GatewayAddress) -> bool {
        let source = &self.facts.source;
        let client = self.facts.client.ip().to_canonical();
        let same =
            |it: &Workload| it.identity() == source.identity() && it.addresses.contains(&client);
        is_behind(self.view, &waypoint.destination, &source.namespace, same)
    }

    fn passthrough(&self, route: Route, service: Option<Arc<Service>>) -> NextHop {
        NextHop {
            route,
            hop: Hop::Tcp,
            target: Target::Address(self.destination),
            authority: None,
            expected: Arc::default(),
            inner_expected: Arc::default(),
            service,
            workload: None,
        }
    }

    /// Rows 11 and 12.
    fn direct(
        &self,
        workload: &Arc<Workload>,
        service: Option<&Arc<Service>>,
        port: u16,
    ) -> Result<NextHop, Refusal> {
        let families = service.map_or(IpFamilies::Automatic, |it| it.ip_families);
        let hbone = match workload.tunnel_protocol {
            TunnelProtocol::None => false,
            TunnelProtocol::Hbone => true,
            TunnelProtocol::Unsupported => {
                return Err(refused(Reason::ProtocolUnsupported, workload));
            }
        };
        let dialled = if hbone { HBONE_PORT } else { port };
        let target = self.target(workload, families, self.destination.ip(), dialled)?;
        let authority = match &target {
            Target::Address(address) => Authority::address(address.ip(), port),
            Target::Hostname { hostname, .. } => Authority::Hostname(hostname.clone(), port),
        };
        let expected = if hbone {
            expected(service.map(|it| &**it), workload)
        } else {
            Arc::default()
        };
        Ok(NextHop {
            route: Route::Direct,
            hop: if hbone { Hop::Hbone } else { Hop::Tcp },
            target,
            authority: hbone.then_some(authority),
            expected,
            inner_expected: Arc::default(),
            service: service.cloned(),
            workload: Some(Arc::clone(workload)),
        })
    }

    fn target(
        &self,
        workload: &Workload,
        families: IpFamilies,
        wanted: IpAddr,
        port: u16,
    ) -> Result<Target, Refusal> {
        match reach(workload, families, wanted) {
            Some(Reach::Ip(ip)) => Ok(Target::Address(SocketAddr::new(ip, port))),
            Some(Reach::Hostname(hostname)) => Ok(Target::Hostname {
                hostname,
                port,
                prefer_ipv6: wanted.is_ipv6(),
            }),
            Some(Reach::Gateway) | None => Err(refused(Reason::NoAddress, workload)),
        }
    }

    /// Rows 5 and 10: the destination stays what the client asked for.
    fn through_waypoint(
        &self,
        gateway: Resolved,
        service: Option<Arc<Service>>,
        route: Route,
    ) -> Result<NextHop, Refusal> {
        Ok(NextHop {
            route,
            hop: Hop::Hbone,
            target: self.gateway_target(&gateway)?,
            authority: Some(Authority::Address(self.destination)),
            expected: gateway.expected(),
            inner_expected: Arc::default(),
            service,
            workload: Some(gateway.workload),
        })
    }

    /// Rows 4 and 9.
    fn through_gateway(
        &self,
        remote: &Workload,
        service: Option<&Arc<Service>>,
        inner_expected: Arc<[Identity]>,
        draw: Draw,
    ) -> Result<NextHop, Refusal> {
        let missing = || refused(Reason::GatewayMissing, remote);
        let address = remote.network_gateway.as_ref().ok_or_else(missing)?;
        let gateway = self.resolve(address, draw).ok_or_else(missing)?;
        let service = service.ok_or_else(missing)?;
        let port = self.destination.port();
        Ok(NextHop {
            route: Route::Gateway,
            hop: Hop::DoubleHbone,
            target: self.gateway_target(&gateway)?,
            authority: Some(Authority::Hostname(service.hostname.clone(), port)),
            expected: gateway.expected(),
            inner_expected,
            service: Some(Arc::clone(service)),
            workload: Some(gateway.workload),
        })
    }

    fn gateway_target(&self, gateway: &Resolved) -> Result<Target, Refusal> {
        let service = gateway.service.as_ref();
        let families = service.map_or(IpFamilies::Automatic, |it| it.ip_families);
        self.target(&gateway.workload, families, gateway.wanted, gateway.port)
    }

    fn waypoint(&self, waypoint: &GatewayAddress, draw: Draw) -> Result<Resolved, Refusal> {
        let missing = || {
            let object = match &waypoint.destination {
                GatewayDestination::Hostname(key) => Object::Service(key.clone()),
                GatewayDestination::Address(address) => Object::Address(address.clone()),
            };
            Refusal::by(Reason::WaypointMissing, object)
        };
        self.resolve(waypoint, draw).ok_or_else(missing)
    }

    /// Finds the workload behind a waypoint's or gateway's reference. One given by address keeps that address, which
    /// may be of another family; one given by name adapts to the client's.
    fn resolve(&self, gateway: &GatewayAddress, draw: Draw) -> Option<Resolved> {
        let port = gateway.hbone_mtls_port;
        match &gateway.destination {
            GatewayDestination::Hostname(key) => {
                let service = self.view.service(key)?;
                self.resolve_service(service, port, self.destination.ip(), draw)
            }
            GatewayDestination::Address(address) => match self.view.workload_at(address) {
                Some(workload) => Some(Resolved {
                    workload: Arc::clone(workload),
                    service: None,
                    wanted: address.address,
                    port,
                }),
                None => {
                    let namespace = &self.facts.source.namespace;
                    let service = self.view.service_at(address, namespace)?;
                    self.resolve_service(service, port, address.address, draw)
                }
            },
        }
    }

    fn resolve_service(
        &self,
        service: &Arc<Service>,
        port: u16,
        wanted: IpAddr,
        draw: Draw,
    ) -> Option<Resolved> {
        let endpoints = self.view.endpoints_of(&service.key())?;
        let source = &self.facts.source;
        let selected = select(service, endpoints, source, port, Purpose::Gateway, draw)?;
        Some(Resolved {
            workload: Arc::clone(&selected.endpoint.workload),
            service: Some(Arc::clone(service)),
            wanted,
            port: selected.port,
        })
    }
}

/// The workload that stands behind a waypoint's or gateway's reference.
struct Resolved {
    workload: Arc<Workload>,
    service: Option<Arc<Service>>,
    wanted: IpAddr,
    port: u16,
}

impl Resolved {
    fn expected(&self) -> Arc<[Identity]> {
        expected(self.service.as_deref(), &self.workload)
    }

    fn service_identities(&self) -> Arc<[Identity]> {
        names_of(self.service.as_deref())
    }
}

/// The identities that the service goes by beside its workloads'.
fn names_of(service: Option<&Service>) -> Arc<[Identity]> {
    service.map_or_else(Arc::default, |it| it.subject_alt_names.as_slice().into())
}

/// The service's names and the workload's identity, which comes first.
fn expected(service: Option<&Service>, workload: &Workload) -> Arc<[Identity]> {
    let own = workload.identity();
    let names = service.map_or(&[][..], |it| &it.subject_alt_names);
    if names.is_empty() {
        return Arc::new([own]);
    }
    let mut expected = vec![own];
    for name in names {
        if !expected.contains(name) {
            expected.push(name.clone());
        }
    }
    expected.into()
}

fn refused(reason: Reason, workload: &Workload) -> Refusal {
    Refusal::by(reason, Object::Workload(workload.uid.clone()))
}

/// Whether a service is for a waypoint to serve.
pub fn has_waypoint(service: &Service) -> bool {
    service.waypoint.is_some() || service.weighted_waypoints.iter().any(|it| it.weight > 0)
}

/// By weight; without weights, the one.
pub(crate) fn drawn_waypoint(service: &Service, draw: Draw) -> Option<&GatewayAddress> {
    let weighted = &service.weighted_waypoints;
    let weights: Vec<_> = weighted.iter().map(|it| it.weight).collect();
    match draw.weighted(&weights) {
        Some(at) => Some(&weighted[at].destination),
        None => service.waypoint.as_ref(),
    }
}

/// Whether a workload with this property stands behind a waypoint's reference.
pub(crate) fn is_behind(
    view: &MeshView,
    destination: &GatewayDestination,
    client: &str,
    property: impl Fn(&Workload) -> bool,
) -> bool {
    let service = match destination {
        GatewayDestination::Hostname(key) => view.service(key),
        GatewayDestination::Address(address) => {
            if let Some(workload) = view.workload_at(address) {
                return property(workload);
            }
            view.service_at(address, client)
        }
    };
    let endpoints = service.and_then(|it| view.endpoints_of(&it.key()));
    endpoints.is_some_and(|it| it.iter().any(|it| property(&it.workload)))
}
