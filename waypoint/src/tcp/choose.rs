//! Which endpoint a connection goes to: its route's backend, or the service that was addressed. Endpoints are chosen, counted
//! and passed over as those of requests are.

use std::{net::SocketAddr, sync::Arc};

use mesh::{
    draw::Draw,
    east_west::{self, InnerFacts},
    l7::{
        backend::{Balancer, HashKey, TrafficPolicy},
        balance,
        dispatch::Target,
        route::Backend,
        served::Resolution,
        table::ConnectionSelection,
    },
    names::{Str, WorkloadUid},
    outcome::{Reason, Refusal},
    service::Service,
    workload::Workload,
};

use super::{Kind, refused};
use crate::{
    backend::Endpoint,
    config::Role,
    connection::Connection,
    http::upstream::{
        ClusterKey, Permit,
        cluster::Unavailable,
        endpoint::EndpointState,
        members::{Carries, Members, Wanted},
    },
    snapshot::Snapshot,
};

/// An endpoint that was chosen.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) endpoint: Endpoint,
    /// Of which service; none: a workload on its own.
    pub(super) service: Option<Arc<Service>>,
    /// What the endpoint's way is decided with: the address that was dialled, and the backend's port.
    pub(super) destination: SocketAddr,
    /// How the service's endpoints are reached.
    members: Option<Arc<Members>>,
    /// Counts the connection.
    permit: Option<Permit>,
}

/// Endpoints that refused.
#[derive(Debug, Default)]
pub(super) struct Tried {
    known: Vec<Arc<EndpointState>>,
    workloads: Vec<WorkloadUid>,
}

impl Tried {
    pub(super) fn len(&self) -> usize {
        self.workloads.len()
    }

    /// Whether there may be another one.
    pub(super) fn add(&mut self, choice: &Choice) -> bool {
        let permit = choice.permit.as_ref();
        self.known
            .extend(permit.map(|it| Arc::clone(it.endpoint())));
        let uid = choice.workload().map(|workload| workload.uid.clone());
        let is_one_of_many = uid.is_some() && choice.service.is_some();
        self.workloads.extend(uid);
        is_one_of_many
    }
}

impl Choice {
    /// The endpoint's record.
    pub(super) fn workload(&self) -> Option<&Arc<Workload>> {
        self.endpoint.workload()
    }

    /// How the service's endpoints are reached, where that is ours to say.
    pub(super) fn policy(&self) -> Option<&TrafficPolicy> {
        let members = self.members.as_ref()?;
        self.endpoint.is_ours().then_some(&members.policy)
    }

    /// The connection stands: it is counted while what is answered lives.
    pub(super) fn connected(&mut self) -> Option<Permit> {
        let permit = self.permit.take();
        permit.inspect(|permit| permit.answered(200))
    }

    /// The endpoint could not be reached.
    pub(super) fn failed(&self) {
        if let Some(permit) = &self.permit {
            permit.failed();
        }
    }
}

/// Chooses for one try.
pub(super) fn choose(
    connection: &Connection,
    snapshot: &Snapshot,
    kind: &Kind,
    draw: Draw,
    tried: &Tried,
) -> Result<Choice, Refusal> {
    let (route, endpoint) = draw.split();
    if let (Role::EastWest, Target::Service { service, port, .. }) =
        (connection.waypoint.config.node.role, &connection.target)
    {
        return onward(connection, snapshot, (service, *port), draw, tried);
    }
    let (service, port, subset) = match &connection.target {
        Target::Workload { workload, address } => {
            return Ok(Choice {
                endpoint: Endpoint::Workload {
                    workload: Arc::clone(workload),
                    port: address.port(),
                },
                service: None,
                destination: connection.destination,
                members: None,
                permit: None,
            });
        }
        Target::Service { service, port, .. } => {
            routed(connection, snapshot, kind, service, *port, route)?
        }
    };
    let chosen = OfService {
        connection,
        snapshot,
        sni: kind.sni(),
        service,
        port,
        subset,
    };
    chosen.choose(endpoint, tried)
}

/// Where an inner tunnel ends: nothing but the service's name decides, no route and no backend's policy.
fn onward(
    connection: &Connection,
    snapshot: &Snapshot,
    (service, port): (&Arc<Service>, u16),
    draw: Draw,
    tried: &Tried,
) -> Result<Choice, Refusal> {
    let facts = InnerFacts {
        own: &snapshot.own,
        passed_waypoint: connection.passed_waypoint,
    };
    let untried = |workload: &Workload| !tried.workloads.contains(&workload.uid);
    let onward = east_west::onward(&snapshot.mesh, &facts, service, port, draw, untried)?;
    Ok(Choice {
        endpoint: Endpoint::Tunnel {
            workload: onward.workload,
            address: onward.address,
        },
        service: Some(Arc::clone(service)),
        destination: connection.destination,
        members: None,
        permit: None,
    })
}

/// The backend of the route that matches, else the service itself.
fn routed(
    connection: &Connection,
    snapshot: &Snapshot,
    kind: &Kind,
    service: &Arc<Service>,
    port: u16,
    draw: Draw,
) -> Result<(Arc<Service>, u16, Option<Str>), Refusal> {
    let facts = connection.facts(snapshot, kind.sni());
    let selection = match kind {
        Kind::Tls(_) => snapshot.l7.select_tls(&facts),
        Kind::Tcp => snapshot.l7.select_tcp(&facts),
    };
    let no_route = || refused(Reason::NoRoute, service.key());
    let rule = match selection {
        ConnectionSelection::NoRoutes => {
            return Ok((Arc::clone(service), port, connection.subset.clone()));
        }
        ConnectionSelection::NoMatch => return Err(no_route()),
        ConnectionSelection::Rule(rule) => rule,
    };
    let backends = rule.backends();
    let weights: Vec<_> = backends.iter().map(|(weight, _)| *weight).collect();
    let drawn = draw.weighted(&weights).ok_or_else(no_route)?;
    match &backends[drawn].1 {
        Backend::Invalid(_) => Err(no_route()),
        Backend::Service {
            service,
            port,
            subset,
        } => match snapshot.mesh.service(service) {
            Some(found) => {
                let subset = connection.subset_of(service, subset.as_ref());
                Ok((Arc::clone(found), *port, subset))
            }
            None => Err(refused(Reason::NoHealthyUpstream, service.clone())),
        },
    }
}

/// One service's port, to be reached.
struct OfService<'a> {
    connection: &'a Connection,
    snapshot: &'a Snapshot,
    sni: Option<&'a str>,
    service: Arc<Service>,
    port: u16,
    subset: Option<Str>,
}

impl OfService<'_> {
    fn choose(self, draw: Draw, tried: &Tried) -> Result<Choice, Refusal> {
        let upstreams = &self.connection.waypoint.http.upstreams;
        let cluster = upstreams.cluster(&ClusterKey::Service {
            service: self.service.key(),
            port: self.port,
            subset: self.subset.clone(),
        });
        let members = cluster.members(self.snapshot);
        let wanted = Wanted {
            tried: &tried.known,
            hash: self.hash(&members.policy.balancer),
            session: None,
            destination: self.connection.destination,
            // SNI may be forged, so nothing is dialled but names within the service's wildcard.
            host: self.sni,
            via: Some(&self.connection.via),
            carries: Carries::Bytes,
            draw,
        };
        let permit = cluster.acquire(&members, &wanted);
        let permit = permit.map_err(|why| self.unavailable(why))?;
        let ip = self.connection.destination.ip();
        Ok(Choice {
            endpoint: permit.endpoint().endpoint.clone(),
            destination: (ip, self.port).into(),
            service: Some(self.service),
            members: Some(members),
            permit: Some(permit),
        })
    }

    /// Of all that a hash may be of, bytes have only their client's address.
    fn hash(&self, balancer: &Balancer) -> Option<u64> {
        let by_address = matches!(
            balancer,
            Balancer::ConsistentHash {
                key: HashKey::SourceIp,
                ..
            }
        );
        let address = self.connection.client.ip().to_string();
        by_address.then(|| balance::hash(address.as_bytes()))
    }

    fn unavailable(&self, why: Unavailable) -> Refusal {
        let key = self.service.key();
        let served = self.snapshot.l7.service(&key);
        let by_name = served.is_some_and(|it| it.resolution == Resolution::DynamicDns);
        let reason = match why {
            Unavailable::Unknown if by_name => Reason::UnknownHostname,
            Unavailable::Unknown | Unavailable::NoEndpoint => Reason::NoHealthyUpstream,
            Unavailable::Overflow => Reason::TooManyConnections,
        };
        refused(reason, key)
    }
}
