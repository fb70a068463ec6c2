//! Where a connection goes: through the source's tunnel, or past it.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use super::{
    Asked, Decider, End, Mark, Nodes, Path, Stage, Step, Verdict, name_of, policy, refused, request,
};
use crate::{
    authority::Authority,
    draw::Draw,
    identity::Identity,
    inbound::{InboundTarget, PlaintextFacts, TunnelFacts, plaintext, tunnel},
    l7::{balance::has_labels, via::Via},
    names::{NamespacedHostname, NetworkAddress, Str},
    outbound::{HBONE_PORT, Hop, NextHop, OutboundFacts, Route, Target, next_hop},
    outcome::{Object, Outcome, Reason, Refusal},
    select::{Purpose, Reach, reach, select},
    service::Service,
    view::MeshView,
    workload::{Health, TunnelProtocol, Workload},
};

/// Draws of chance that are walked through: enough to meet each of some dozen endpoints.
const DRAWS: u64 = 512;
/// Paths that are told apart.
const MAX_PATHS: usize = 32;

/// What arrives at an endpoint.
struct Arrival {
    workload: Arc<Workload>,
    /// The endpoint's own address and port.
    address: SocketAddr,
    /// What the peer has proven; none for plaintext.
    identity: Option<Identity>,
    /// The TCP peer.
    peer: SocketAddr,
    /// Of a CONNECT.
    authority: Option<Authority>,
}

/// How a request comes to a waypoint: past the waypoints of which services, and for which subset of this one.
#[derive(Default)]
struct Way {
    via: Via,
    subset: Option<Str>,
}

/// A path that is being told.
#[derive(Default)]
struct Told {
    steps: Vec<Step>,
}

impl Told {
    fn tell(&mut self, step: Stage, outcome: Mark, detail: impl Into<String>) {
        self.steps.push(Step {
            step,
            outcome,
            detail: detail.into(),
            more: Vec::new(),
        });
    }

    fn path(
        self,
        endpoint: String,
        workload: Option<&Workload>,
        verdict: Verdict,
        decided_by: Option<Decider>,
    ) -> Path {
        let node = workload.map(|it| it.node.clone());
        Path {
            endpoint,
            node: node.filter(|it| !it.is_empty()),
            waypoint: None,
            further_waypoints: Vec::new(),
            verdict,
            decided_by,
            steps: self.steps,
        }
    }
}

impl<N: Nodes> Asked<'_, N> {
    /// The ways of a connection that the source's tunnel carries.
    pub(super) fn captured(&mut self, destination: SocketAddr) -> Result<Vec<Path>, End> {
        self.capture();
        let identity = self.identity()?;
        let source = &self.question.source;
        let facts = OutboundFacts {
            source: Arc::clone(source),
            network: source.network.clone(),
            client: self.client(destination.ip()),
            original_dst: destination,
        };
        let mut paths = self.ways(&facts, &identity, &Way::default());
        paths.sort_by(|a, b| a.endpoint.cmp(&b.endpoint));
        Ok(paths)
    }

    /// The ways of what a tunnel, or a waypoint, sends on.
    fn ways(&self, facts: &OutboundFacts, identity: &Identity, way: &Way) -> Vec<Path> {
        let mut seen = BTreeSet::new();
        let mut paths = Vec::new();
        for seed in 0..DRAWS {
            if paths.len() >= MAX_PATHS {
                break;
            }
            match next_hop(self.here.view, facts, Draw(seed)) {
                Outcome::Go(hop) => {
                    let key = (
                        format!("{:?}", hop.target),
                        hop.workload.as_ref().map(|it| it.uid.clone()),
                    );
                    if seen.insert(key) {
                        paths.extend(self.through(facts, &hop, identity, way));
                    }
                }
                Outcome::Refuse(refusal) => {
                    let (mut detail, by) = refused(&refusal);
                    if let Some(why) = self.shortage(&refusal, facts.original_dst.port()) {
                        detail.push_str(&format!(": {why}"));
                    }
                    if seen.insert((detail.clone(), None)) {
                        let mut told = Told::default();
                        told.tell(Stage::NextHop, Mark::Refuse, format!("refused: {detail}"));
                        let endpoint = facts.original_dst.to_string();
                        paths.push(told.path(endpoint, None, Verdict::Deny, by));
                    }
                }
                // Never asked of a tunnel that is told everything.
                Outcome::Need(_) => {}
            }
        }
        paths
    }

    fn capture(&mut self) {
        let source = &self.question.source;
        let tunnel = match source.node.is_empty() {
            true => "the node's tunnel".to_owned(),
            false => format!("the tunnel of {}", source.node),
        };
        let state = self.here.pods.map(|it| it.get(&name_of(source)));
        match state {
            Some(Some(state)) if state == "Up" => {
                self.tell(Stage::Capture, Mark::Pass, format!("captured by {tunnel}"));
            }
            Some(Some(state)) => {
                let detail = format!(
                    "{tunnel} does not serve the pod yet ({state}): its connections wait or are refused"
                );
                self.tell(Stage::Capture, Mark::Warn, detail);
            }
            Some(None) => {
                let detail = format!(
                    "the pod is in the mesh, but {tunnel} does not have it: see the log of istio-cni-node on that node"
                );
                self.tell(Stage::Capture, Mark::Warn, detail);
            }
            None => self.tell(Stage::Capture, Mark::Pass, format!("captured by {tunnel}")),
        }
    }

    /// What a service lacks that has no endpoint to give: the port, or endpoints that are healthy.
    fn shortage(&self, refusal: &Refusal, port: u16) -> Option<String> {
        let (Reason::NoHealthyUpstream, Some(Object::Service(key))) =
            (refusal.reason, &refusal.object)
        else {
            return None;
        };
        let service = self.here.view.service(key)?;
        if !service.ports.contains_key(&port) {
            let ports: Vec<_> = service.ports.keys().map(ToString::to_string).collect();
            return Some(format!("it has no port {port}, but {}", ports.join(", ")));
        }
        let endpoints = self.here.view.endpoints(key);
        let healthy = endpoints
            .iter()
            .filter(|it| it.workload.status == Health::Healthy);
        Some(format!(
            "{} of its {} endpoints are healthy",
            healthy.count(),
            endpoints.len()
        ))
    }

    /// One next hop, to its end or ends: a waypoint goes on to each of the endpoints.
    fn through(
        &self,
        facts: &OutboundFacts,
        hop: &NextHop,
        identity: &Identity,
        way: &Way,
    ) -> Vec<Path> {
        let mut told = Told::default();
        told.tell(Stage::NextHop, Mark::Pass, described(hop));
        let dialled = match &hop.target {
            Target::Address(address) => Some(*address),
            Target::Hostname { .. } => None,
        };
        match hop.route {
            Route::ServicePassthrough | Route::UnknownPassthrough => {
                vec![self.passed(told, facts)]
            }
            Route::Gateway | Route::WaypointGateway => {
                let detail = "what happens in the other network is not known here";
                told.tell(Stage::Inbound, Mark::Warn, detail);
                let workload = hop.workload.as_deref();
                let endpoint = workload.map_or_else(|| target(&hop.target), name_of);
                vec![told.path(endpoint, workload, Verdict::Unknown, None)]
            }
            Route::ServiceWaypoint | Route::WorkloadWaypoint => {
                self.behind(told, facts, hop, identity, way)
            }
            Route::Direct => {
                let (Some(workload), Some(dialled)) = (&hop.workload, dialled) else {
                    let detail = "outside the mesh: no policy is enforced there";
                    told.tell(Stage::Policy, Mark::Pass, detail);
                    return vec![told.path(target(&hop.target), None, Verdict::Allow, None)];
                };
                let hbone = hop.hop == Hop::Hbone;
                let port = hop
                    .authority
                    .as_ref()
                    .map_or(dialled.port(), Authority::port);
                let arrival = Arrival {
                    workload: Arc::clone(workload),
                    address: SocketAddr::new(dialled.ip(), port),
                    identity: hbone.then(|| identity.clone()),
                    peer: facts.client,
                    authority: hop.authority.clone(),
                };
                vec![self.arrive(told, &arrival)]
            }
        }
    }

    /// What the mesh passes on as it is: nothing is known of it, or a service that wants its own addresses dialled.
    fn passed(&self, mut told: Told, facts: &OutboundFacts) -> Path {
        let address = NetworkAddress {
            network: facts.source.network.clone(),
            address: facts.original_dst.ip(),
        };
        let Some(workload) = self.here.view.workload_at(&address) else {
            let detail = format!(
                "{} is outside the mesh: no policy is enforced there",
                facts.original_dst
            );
            told.tell(Stage::Policy, Mark::Pass, detail);
            return told.path(facts.original_dst.to_string(), None, Verdict::Allow, None);
        };
        let arrival = Arrival {
            workload: Arc::clone(workload),
            address: facts.original_dst,
            identity: None,
            peer: facts.client,
            authority: None,
        };
        self.arrive(told, &arrival)
    }

    /// Past a waypoint: what it lets through comes from it, with its identity.
    fn behind(
        &self,
        mut told: Told,
        facts: &OutboundFacts,
        hop: &NextHop,
        identity: &Identity,
        way: &Way,
    ) -> Vec<Path> {
        let Some(waypoint) = &hop.workload else {
            return Vec::new();
        };
        let key = hop.service.as_ref().map(|it| it.key());
        if key.as_ref().is_some_and(|it| !way.via.admits(it)) {
            let name = name_of(waypoint);
            let detail = format!(
                "refused by waypoint {name}: it came by {}, and would go round",
                way.via
            );
            told.tell(Stage::Waypoint, Mark::Refuse, detail);
            return vec![told.path(name, Some(waypoint), Verdict::Deny, None)];
        }
        if let Some(subset) = &way.subset {
            let detail = format!("the waypoint is asked for subset {subset}");
            told.tell(Stage::Waypoint, Mark::Pass, detail);
        }
        let (end, decided_by) = match self.ruling(facts, hop, waypoint, identity) {
            Some(ruling) => {
                told.steps.extend(ruling.steps);
                (ruling.end, ruling.decided_by)
            }
            None => {
                let detail = format!(
                    "L7 routes and policies of waypoint {} decide here; they are not in a node tunnel's view",
                    name_of(waypoint)
                );
                told.tell(Stage::Waypoint, Mark::Warn, detail);
                (request::End::Own, None)
            }
        };
        let name = name_of(waypoint);
        let mut paths = match &end {
            request::End::Here(verdict) => {
                let by = decided_by.clone();
                return vec![Path {
                    waypoint: Some(name.clone()),
                    ..told.path(name, Some(waypoint), *verdict, by)
                }];
            }
            request::End::Own => {
                let ends = self.own_ends(facts, hop, waypoint, way);
                self.sent_on(&told, facts, waypoint, ends)
            }
            request::End::Backends(backends) => {
                let to = |sent| self.to_backend(&told, facts, waypoint, sent, (key.as_ref(), way));
                backends.iter().flat_map(to).collect()
            }
        };
        if paths.is_empty() {
            let detail = "the waypoint finds no healthy endpoint";
            told.tell(Stage::Inbound, Mark::Refuse, detail);
            paths.push(told.path(name.clone(), Some(waypoint), Verdict::Deny, None));
        }
        for path in &mut paths {
            if let Some(next) = path.waypoint.replace(name.clone()) {
                path.further_waypoints.insert(0, next);
            }
            if path.verdict == Verdict::Allow && decided_by.is_some() {
                path.decided_by.clone_from(&decided_by);
            }
        }
        paths
    }

    /// What the waypoint decides of the request, where both are known.
    fn ruling(
        &self,
        facts: &OutboundFacts,
        hop: &NextHop,
        waypoint: &Arc<Workload>,
        identity: &Identity,
    ) -> Option<request::Ruling> {
        let service = hop.service.as_ref().map(|it| it.key());
        let view = self.nodes.waypoint(waypoint)?;
        Some(request::ask(&request::Asked {
            view,
            labels: view.labels(&facts.source.uid).map(Arc::as_ref),
            waypoint,
            request: self.question.request.as_ref()?,
            service: service.as_ref(),
            destination: facts.original_dst,
            source: facts.client,
            identity,
        }))
    }

    /// The endpoints that the waypoint may choose of what was addressed.
    fn own_ends(
        &self,
        facts: &OutboundFacts,
        hop: &NextHop,
        waypoint: &Workload,
        way: &Way,
    ) -> Vec<(Arc<Workload>, SocketAddr)> {
        let Some(service) = &hop.service else {
            return self.workload_at(facts).into_iter().collect();
        };
        let mut ends = self.endpoints(service, facts.original_dst.port(), waypoint);
        ends.retain(|(it, _)| self.is_of(waypoint, &service.key(), way.subset.as_ref(), it));
        ends
    }

    /// To a backend's endpoints, or to the waypoint that it has of its own.
    fn to_backend(
        &self,
        told: &Told,
        facts: &OutboundFacts,
        waypoint: &Arc<Workload>,
        sent: &request::Sent,
        (own, way): (Option<&NamespacedHostname>, &Way),
    ) -> Vec<Path> {
        let Some(service) = self.here.view.service(&sent.service) else {
            return Vec::new();
        };
        let asked = way.subset.as_ref().filter(|_| own == Some(&sent.service));
        let subset = sent.subset.as_ref().or(asked);
        if service.waypoint.is_some() && !self.serves(waypoint, &sent.service) {
            let on = Way {
                via: own.map_or_else(Via::default, |it| way.via.onward(it)),
                subset: subset.cloned(),
            };
            return self.to_its_waypoint(told, waypoint, service, sent.port, &on);
        }
        let mut ends = self.endpoints(service, sent.port, waypoint);
        ends.retain(|(it, _)| self.is_of(waypoint, &sent.service, subset, it));
        self.sent_on(told, facts, waypoint, ends)
    }

    /// Whether a service is the waypoint's own.
    fn serves(&self, waypoint: &Workload, service: &NamespacedHostname) -> bool {
        let view = self.nodes.waypoint(waypoint);
        let served = view.and_then(|it| it.service(service));
        served.is_some_and(|it| it.bound)
    }

    fn to_its_waypoint(
        &self,
        told: &Told,
        waypoint: &Arc<Workload>,
        service: &Service,
        port: u16,
        way: &Way,
    ) -> Vec<Path> {
        let from = waypoint.addresses.first();
        let (Some(from), Some(to)) = (from, service.vips.first()) else {
            return Vec::new();
        };
        let facts = OutboundFacts {
            source: Arc::clone(waypoint),
            network: waypoint.network.clone(),
            client: SocketAddr::new(*from, 0),
            original_dst: SocketAddr::new(to.address, port),
        };
        let mut paths = self.ways(&facts, &waypoint.identity(), way);
        for path in &mut paths {
            path.steps.splice(0..0, told.steps.iter().cloned());
        }
        paths
    }

    /// Whether a workload is of a subset as the waypoint knows it; one that it does not know has none.
    fn is_of(
        &self,
        waypoint: &Workload,
        service: &NamespacedHostname,
        subset: Option<&Str>,
        workload: &Workload,
    ) -> bool {
        let (Some(subset), Some(view)) = (subset, self.nodes.waypoint(waypoint)) else {
            return true;
        };
        let backend = view.backend(service);
        let known = backend.and_then(|it| it.subsets.get(subset));
        known.is_some_and(|it| {
            let labels = view.labels(&workload.uid).map(Arc::as_ref);
            has_labels(labels, &it.labels)
        })
    }

    fn sent_on(
        &self,
        told: &Told,
        facts: &OutboundFacts,
        waypoint: &Workload,
        ends: Vec<(Arc<Workload>, SocketAddr)>,
    ) -> Vec<Path> {
        let from = waypoint.addresses.first().copied();
        let peer = SocketAddr::new(from.unwrap_or(facts.client.ip()), 0);
        let paths = ends.into_iter().map(|(workload, address)| {
            let hbone = workload.tunnel_protocol == TunnelProtocol::Hbone;
            let arrival = Arrival {
                authority: hbone.then(|| Authority::address(address.ip(), address.port())),
                identity: hbone.then(|| waypoint.identity()),
                peer,
                workload,
                address,
            };
            let steps = told.steps.clone();
            self.arrive(Told { steps }, &arrival)
        });
        paths.collect()
    }

    fn workload_at(&self, facts: &OutboundFacts) -> Option<(Arc<Workload>, SocketAddr)> {
        let address = NetworkAddress {
            network: facts.source.network.clone(),
            address: facts.original_dst.ip(),
        };
        let workload = self.here.view.workload_at(&address)?;
        Some((Arc::clone(workload), facts.original_dst))
    }

    /// The endpoints that `client` may get of a service, each with its own address and port.
    fn endpoints(
        &self,
        service: &Service,
        port: u16,
        client: &Workload,
    ) -> Vec<(Arc<Workload>, SocketAddr)> {
        let endpoints = self.here.view.endpoints(&service.key());
        let wanted = client.addresses.first().copied();
        let wanted = wanted.unwrap_or_else(|| self.client([0, 0, 0, 0].into()).ip());
        let mut found = Vec::new();
        for seed in 0..DRAWS {
            let draw = Draw(seed);
            let selected = select(service, &endpoints, client, port, Purpose::Traffic, draw);
            let Some(selected) = selected else { break };
            let workload = &selected.endpoint.workload;
            let known = found
                .iter()
                .any(|(it, _): &(Arc<Workload>, _)| it.uid == workload.uid);
            if let (false, Some(Reach::Ip(ip))) =
                (known, reach(workload, service.ip_families, wanted))
            {
                found.push((Arc::clone(workload), SocketAddr::new(ip, selected.port)));
            }
            if found.len() >= MAX_PATHS {
                break;
            }
        }
        found
    }

    /// The ways of a connection of a pod outside the mesh: what Kubernetes' own services do, in plaintext.
    pub(super) fn plain(&mut self, destination: SocketAddr) -> Result<Vec<Path>, End> {
        let detail = self.uncaptured();
        self.tell(Stage::Capture, Mark::Warn, detail);
        let source = &self.question.source;
        let address = NetworkAddress {
            network: source.network.clone(),
            address: destination.ip(),
        };
        let view = self.here.view;
        let ends = match view.service_at(&address, &source.namespace) {
            Some(service) => self.endpoints(service, destination.port(), source),
            None => {
                let workload = view.workload_at(&address);
                workload
                    .map(|it| (Arc::clone(it), destination))
                    .into_iter()
                    .collect()
            }
        };
        if ends.is_empty() {
            if let Some(service) = view.service_at(&address, &source.namespace) {
                let detail = format!(
                    "service {} has no healthy endpoint for port {}",
                    service.key(),
                    destination.port()
                );
                return Err(self.end(Stage::NextHop, Verdict::Deny, detail));
            }
            let detail = format!("{destination} is outside the mesh: no policy is enforced there");
            return Err(self.end(Stage::Policy, Verdict::Allow, detail));
        }
        let peer = self.client(destination.ip());
        let mut paths: Vec<_> = ends
            .into_iter()
            .map(|(workload, address)| {
                let mut told = Told::default();
                told.tell(
                    Stage::NextHop,
                    Mark::Pass,
                    format!("plaintext to {address} of {}", name_of(&workload)),
                );
                let arrival = Arrival {
                    workload,
                    address,
                    identity: None,
                    peer,
                    authority: None,
                };
                self.arrive(told, &arrival)
            })
            .collect();
        paths.sort_by(|a, b| a.endpoint.cmp(&b.endpoint));
        Ok(paths)
    }

    /// The destination's side: its tunnel's view, where it is known.
    fn arrive(&self, mut told: Told, arrival: &Arrival) -> Path {
        let workload = &arrival.workload;
        let name = name_of(workload);
        if workload.tunnel_protocol != TunnelProtocol::Hbone {
            let detail = format!("{name} is not in the mesh: no policy is enforced there");
            told.tell(Stage::Policy, Mark::Pass, detail);
            return told.path(name, Some(workload), Verdict::Allow, None);
        }
        let known = self.nodes.node(&workload.node);
        let view = known.map_or(self.here.view, |it| it.view);
        // The destination's own tunnel decides by its own record of the pod.
        let record = view.workload(&workload.uid).unwrap_or(workload);
        let target = match arriving(view, record, arrival) {
            Ok(target) => target,
            Err((detail, by)) => {
                told.tell(
                    Stage::Inbound,
                    Mark::Refuse,
                    format!("refused on arrival: {detail}"),
                );
                return told.path(name, Some(workload), Verdict::Deny, by);
            }
        };
        let (mark, whose) = match known {
            Some(_) => (Mark::Pass, ""),
            None => (
                Mark::Warn,
                " (its own tunnel could not be asked: told by the source's)",
            ),
        };
        let how = match &arrival.identity {
            Some(identity) => format!("with the identity {identity}"),
            None => "in plaintext, without an identity".to_owned(),
        };
        told.tell(
            Stage::Inbound,
            mark,
            format!("{name} gets it on {} {how}{whose}", target.destination),
        );
        let judged = policy::judge(
            view,
            record,
            arrival.identity.clone(),
            arrival.peer,
            target.destination,
        );
        told.steps.push(judged.step);
        told.path(name, Some(workload), judged.verdict, judged.decided_by)
    }
}

fn arriving(
    view: &MeshView,
    record: &Arc<Workload>,
    arrival: &Arrival,
) -> Result<InboundTarget, (String, Option<Decider>)> {
    let outcome = match &arrival.authority {
        Some(authority) => {
            let facts = TunnelFacts {
                workload: Arc::clone(record),
                network: record.network.clone(),
                local: SocketAddr::new(arrival.address.ip(), HBONE_PORT),
                authority: authority.clone(),
                forwarded_host: None,
                socks5: None,
            };
            tunnel(view, &facts)
        }
        None => {
            let facts = PlaintextFacts {
                workload: Arc::clone(record),
                original_dst: arrival.address,
                socks5: None,
            };
            plaintext(view, &facts)
        }
    };
    match outcome {
        Outcome::Go(target) => Ok(target),
        Outcome::Refuse(refusal) => Err(refused(&refusal)),
        Outcome::Need(need) => Err(refused(&need.unmet())),
    }
}

fn target(target: &Target) -> String {
    match target {
        Target::Address(address) => address.to_string(),
        Target::Hostname { hostname, port, .. } => format!("{hostname}:{port}"),
    }
}

fn described(hop: &NextHop) -> String {
    let to = target(&hop.target);
    let of = hop
        .workload
        .as_ref()
        .map(|it| format!(" of {}", name_of(it)));
    let of = of.unwrap_or_default();
    let service = hop
        .service
        .as_ref()
        .map(|it| format!(", service {}", it.key()));
    let service = service.unwrap_or_default();
    let expected: Vec<_> = hop.expected.iter().map(ToString::to_string).collect();
    let expected = match expected.is_empty() {
        true => String::new(),
        false => format!(", which must prove {}", expected.join(" or ")),
    };
    match hop.route {
        Route::ServicePassthrough => format!("passed through to {to}{service}"),
        Route::UnknownPassthrough => {
            format!("no object of the mesh has this address: passed through to {to}")
        }
        Route::Direct if hop.hop == Hop::Hbone => format!("HBONE to {to}{of}{service}{expected}"),
        Route::Direct => format!("plaintext to {to}{of}{service}"),
        Route::ServiceWaypoint => format!("HBONE to {to}{of}, the waypoint{service}{expected}"),
        Route::WorkloadWaypoint => format!("HBONE to {to}{of}, the workload's waypoint{expected}"),
        Route::Gateway => {
            format!("HBONE to {to}{of}, another network's gateway{service}{expected}")
        }
        Route::WaypointGateway => {
            format!("HBONE to {to}{of}, the gateway to the waypoint's network{service}{expected}")
        }
    }
}
