//! Which endpoint a connection goes to: its route's backend, or the service that was addressed.

use std::{net::SocketAddr, sync::Arc};

use mesh::{
    draw::Draw,
    east_west::{self, InnerFacts},
    l7::{
        backend::{BackendPolicy, TrafficPolicy},
        dispatch::Target,
        route::Backend,
        served::Resolution,
        table::ConnectionSelection,
    },
    names::{NamespacedHostname, Str, WorkloadUid},
    outcome::{Reason, Refusal},
    select::{Purpose, select},
    service::{LoadBalancingMode, Service},
    workload::Workload,
};

use super::{Kind, refused};
use crate::{backend::Endpoint, config::Role, connection::Connection, snapshot::Snapshot};

/// Draws until one is found that has not been tried, before it is given up.
const DRAWS: usize = 16;

/// An endpoint that was chosen.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub(super) endpoint: Endpoint,
    /// Of which service; none: a workload on its own.
    pub(super) service: Option<Arc<Service>>,
    /// What the endpoint's way is decided with: the address that was dialled, and the backend's port.
    pub(super) destination: SocketAddr,
    backend: Option<Arc<BackendPolicy>>,
    port: u16,
    subset: Option<Str>,
}

/// Endpoints that refused.
#[derive(Clone, Debug, Default)]
pub(super) struct Tried(Vec<WorkloadUid>);

impl Tried {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there may be another one.
    pub(super) fn add(&mut self, choice: &Choice) -> bool {
        let uid = choice.workload().map(|workload| workload.uid.clone());
        let known = uid.is_some() && choice.service.is_some();
        self.0.extend(uid);
        known
    }
}

impl Choice {
    /// The endpoint's record.
    pub(super) fn workload(&self) -> Option<&Arc<Workload>> {
        self.endpoint.workload()
    }

    /// How the service's endpoints are reached, by subset and port.
    pub(super) fn policy(&self) -> Option<&TrafficPolicy> {
        let backend = self.backend.as_deref()?;
        let subset = self.subset.as_ref();
        let subset = subset.and_then(|name| backend.subsets.get(name));
        let of_subset = subset.and_then(|it| it.ports.get(&self.port).or(it.policy.as_ref()));
        let of_port = || backend.ports.get(&self.port).unwrap_or(&backend.policy);
        Some(of_subset.unwrap_or_else(of_port))
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
                backend: None,
                port: address.port(),
                subset: None,
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
    let untried = |workload: &Workload| !tried.0.contains(&workload.uid);
    let onward = east_west::onward(&snapshot.mesh, &facts, service, port, draw, untried)?;
    Ok(Choice {
        endpoint: Endpoint::Tunnel {
            workload: onward.workload,
            address: onward.address,
        },
        service: Some(Arc::clone(service)),
        destination: connection.destination,
        backend: None,
        port,
        subset: None,
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
    let facts = connection.facts(kind.sni());
    let selection = match kind {
        Kind::Tls(_) => snapshot.l7.select_tls(&facts),
        Kind::Tcp => snapshot.l7.select_tcp(&facts),
    };
    let no_route = || refused(Reason::NoRoute, service.key());
    let rule = match selection {
        ConnectionSelection::NoRoutes => return Ok((Arc::clone(service), port, None)),
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
            Some(found) => Ok((Arc::clone(found), *port, subset.clone())),
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
        let key = self.service.key();
        let served = self.snapshot.l7.service(&key);
        let resolution = served.map_or(Resolution::Static, |it| it.resolution);
        let passthrough = self.service.load_balancing.mode == LoadBalancingMode::Passthrough;
        let endpoint = match resolution {
            Resolution::DynamicDns => self.by_sni(&key)?,
            // Only what was dialled at this very service can be dialled on.
            _ if resolution == Resolution::None || passthrough => {
                Endpoint::Address(self.connection.destination)
            }
            _ => self.drawn(&key, draw, tried)?,
        };
        let ip = self.connection.destination.ip();
        Ok(Choice {
            endpoint,
            destination: (ip, self.port).into(),
            backend: self.snapshot.l7.backend(&key).cloned(),
            port: self.port,
            subset: self.subset,
            service: Some(self.service),
        })
    }

    /// The name that the client asks for, within the service's wildcard: SNI may be forged, so nothing else is dialled.
    fn by_sni(&self, key: &NamespacedHostname) -> Result<Endpoint, Refusal> {
        let name = self.sni.filter(|name| within(name, &self.service.hostname));
        let name = name.ok_or_else(|| refused(Reason::UnknownHostname, key.clone()))?;
        Ok(Endpoint::Hostname {
            name: name.into(),
            port: self.port,
        })
    }

    fn drawn(
        &self,
        key: &NamespacedHostname,
        draw: Draw,
        tried: &Tried,
    ) -> Result<Endpoint, Refusal> {
        let endpoints = self.snapshot.mesh.endpoints(key);
        let own = &self.snapshot.own;
        let mut draw = draw;
        for _ in 0..DRAWS {
            let (now, later) = draw.split();
            draw = later;
            let purpose = Purpose::Traffic;
            let selected = select(&self.service, &endpoints, own, self.port, purpose, now);
            let Some(selected) = selected else { break };
            let workload = &selected.endpoint.workload;
            if !tried.0.contains(&workload.uid) && self.in_subset(key, &workload.uid) {
                return Ok(Endpoint::Workload {
                    workload: Arc::clone(workload),
                    port: selected.port,
                });
            }
        }
        Err(refused(Reason::NoHealthyUpstream, key.clone()))
    }

    fn in_subset(&self, key: &NamespacedHostname, uid: &WorkloadUid) -> bool {
        let Some(name) = &self.subset else {
            return true;
        };
        let backend = self.snapshot.l7.backend(key);
        let Some(subset) = backend.and_then(|it| it.subsets.get(name)) else {
            return false;
        };
        let labels = self.snapshot.l7.labels(uid);
        let has = |(key, wanted): (&Str, &Str)| {
            labels.is_some_and(|labels| labels.get(key) == Some(wanted))
        };
        subset.labels.iter().all(has)
    }
}

/// Whether `name` is within `*.suffix`, one or more labels deep.
fn within(name: &str, wildcard: &str) -> bool {
    let suffix = wildcard.strip_prefix('*').filter(|it| it.starts_with('.'));
    suffix.is_some_and(|suffix| name.len() > suffix.len() && name.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_holds_names_below_its_suffix() {
        for (name, wildcard, expected) in [
            ("a.example.com", "*.example.com", true),
            ("a.b.example.com", "*.example.com", true),
            ("example.com", "*.example.com", false),
            (".example.com", "*.example.com", false),
            ("badexample.com", "*.example.com", false),
            ("a.example.com", "*", false),
            ("a.example.com", "a.example.com", false),
        ] {
            assert_eq!(within(name, wildcard), expected, "{name} {wildcard}");
        }
    }
}
