//! What a route is attached to: its parents that are services of the mesh, and which of several kinds of routes on one
//! port takes effect (GAMMA: GRPCRoute before HTTPRoute before TLSRoute before TCPRoute).

use std::{collections::BTreeSet, sync::Arc};

use mesh::{
    l7::{
        route::{Attachment, Callers},
        served::AppProtocol,
    },
    names::{NamespacedHostname, Str},
};

use super::{Problem, RouteObject, Translated, Unresolved};
use crate::{
    crd::gateway_api::ParentRef,
    object::{Kind, Name},
    output::{Condition, Truth},
    translate::{condition, l7::served, service::Claim},
};

/// One parent of a route.
#[derive(Clone, Debug, PartialEq)]
pub struct Parent {
    /// As the user names it.
    pub reference: ParentRef,
    /// What it is.
    pub found: Found,
}

/// What a parent is.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Nothing of this mesh: somebody else's to speak of.
    Foreign,
    /// It should be of this mesh, and is not.
    Refused {
        /// Of the condition `Accepted`.
        reason: &'static str,
        /// Why.
        message: String,
    },
    /// Services of the mesh: one, or several of a ServiceEntry with several hosts.
    Services(Vec<Front>),
}

/// A service that a route is attached to.
#[derive(Clone, Debug, PartialEq)]
pub struct Front {
    /// The service.
    pub service: NamespacedHostname,
    /// The ports that the route is for.
    pub ports: BTreeSet<u16>,
    /// Whether the user named one port.
    pub one_port: bool,
    /// The waypoints that serve it.
    pub waypoints: Vec<Name>,
}

/// A route's parents, as other routes of the same services must know them.
#[derive(Clone, Debug, PartialEq)]
pub struct Attached {
    /// The route's kind.
    pub kind: Kind,
    /// The route's namespace.
    pub namespace: Str,
    /// In the order of the object.
    pub parents: Vec<Parent>,
}

/// Looks up what parents may be.
pub trait Lookup {
    /// The services of a Service or ServiceEntry that are its own; `None`: there is no such object.
    fn services(&self, kind: Kind, name: &Name) -> Option<Vec<Arc<Claim>>>;
    /// Whether a Gateway is a waypoint.
    fn is_waypoint(&self, name: &Name) -> bool;
}

/// What a route is attached to.
pub fn attach(route: &RouteObject, lookup: &impl Lookup) -> Attached {
    let namespace = &route.meta().name.namespace;
    let parents = route.parents().iter().map(|reference| Parent {
        found: find(route.kind(), namespace, reference, lookup),
        reference: reference.clone(),
    });
    Attached {
        kind: route.kind(),
        namespace: namespace.clone(),
        parents: parents.collect(),
    }
}

fn find(kind: Kind, namespace: &Str, reference: &ParentRef, lookup: &impl Lookup) -> Found {
    let group = reference
        .group
        .as_deref()
        .unwrap_or("gateway.networking.k8s.io");
    let name = Name {
        namespace: reference
            .namespace
            .as_deref()
            .map_or_else(|| namespace.clone(), Into::into),
        name: reference.name.as_str().into(),
    };
    let parent = match (group, reference.kind.as_deref().unwrap_or("Gateway")) {
        ("", "Service") => Kind::Service,
        ("networking.istio.io", "ServiceEntry") => Kind::ServiceEntry,
        ("gateway.networking.k8s.io", "Gateway") if lookup.is_waypoint(&name) => {
            let message = format!(
                "Gateway {name} is a waypoint: routes are attached to the services behind it"
            );
            return refused("NoMatchingParent", message);
        }
        _ => return Found::Foreign,
    };
    let Some(claims) = lookup.services(parent, &name) else {
        return refused(
            "NoMatchingParent",
            format!("there is no {} {name}", parent.as_str()),
        );
    };
    let mut fronts = Vec::new();
    for claim in &claims {
        match front(kind, reference, claim) {
            Ok(front) => fronts.push(front),
            Err(message) => {
                return refused(
                    "NoMatchingParent",
                    format!("{} {name} {message}", parent.as_str()),
                );
            }
        }
    }
    match fronts.is_empty() {
        true => refused(
            "NoMatchingParent",
            format!("{} {name} makes no service of the mesh", parent.as_str()),
        ),
        false => Found::Services(fronts),
    }
}

fn refused(reason: &'static str, message: String) -> Found {
    Found::Refused { reason, message }
}

fn front(kind: Kind, reference: &ParentRef, claim: &Claim) -> Result<Front, String> {
    let wanted = reference.port.map(u16::try_from).transpose();
    let wanted = wanted.map_err(|_| "has no such port".to_owned())?;
    let named = |name: &str, section: Option<&str>| section.is_none_or(|section| section == name);
    let served = served::service(claim, true);
    let section = reference.section_name.as_deref();
    let ports = claim.ports.iter().filter(|port| {
        wanted.is_none_or(|wanted| wanted == port.port) && named(&port.name, section)
    });
    let ports: BTreeSet<u16> = ports.map(|port| port.port).collect();
    let one_port = wanted.is_some() || section.is_some();
    if ports.is_empty() {
        return Err(match (wanted, section) {
            (Some(port), _) => format!("has no port {port}"),
            (None, Some(section)) => format!("has no port named {section:?}"),
            (None, None) => "has no ports".to_owned(),
        });
    }
    let fitting: BTreeSet<u16> = ports
        .iter()
        .copied()
        .filter(|port| one_port || fits(kind, served.ports.get(port).copied().unwrap_or_default()))
        .collect();
    if fitting.is_empty() {
        return Err(format!(
            "has no port of a protocol that a {} is for",
            kind.as_str()
        ));
    }
    Ok(Front {
        service: served::key(claim),
        ports: fitting,
        one_port,
        waypoints: claim.served_by.clone(),
    })
}

/// Whether a route without a port is for a port of this protocol.
fn fits(kind: Kind, protocol: AppProtocol) -> bool {
    use AppProtocol::{Grpc, GrpcWeb, Http, Http2, Tcp, Tls, Unknown};
    match kind {
        Kind::HttpRoute | Kind::GrpcRoute => {
            matches!(protocol, Unknown | Http | Http2 | Grpc | GrpcWeb)
        }
        Kind::TlsRoute => matches!(protocol, Unknown | Tls | Tcp),
        _ => true,
    }
}

/// The order of kinds on one port: the first takes effect.
fn rank(kind: Kind) -> u8 {
    match kind {
        Kind::GrpcRoute => 0,
        Kind::HttpRoute => 1,
        Kind::TlsRoute => 2,
        Kind::TcpRoute => 3,
        // VirtualServices.
        _ => 4,
    }
}

impl Attached {
    /// The services it is attached to, each once.
    pub fn services(&self) -> BTreeSet<NamespacedHostname> {
        let fronts = self.parents.iter().flat_map(Parent::fronts);
        fronts.map(|front| front.service.clone()).collect()
    }

    /// The ports of a service on which routes of this kind and namespace take effect in the place of `kind`s.
    pub fn shadows(
        &self,
        kind: Kind,
        namespace: &Str,
        service: &NamespacedHostname,
    ) -> BTreeSet<u16> {
        // A consumer's route is for its own namespace alone, and never in the way of another's.
        let consumer = |of: &Str| (*of != service.namespace).then(|| of.clone());
        if rank(self.kind) >= rank(kind) || consumer(&self.namespace) != consumer(namespace) {
            return BTreeSet::new();
        }
        let fronts = self.parents.iter().flat_map(Parent::fronts);
        fronts
            .filter(|front| front.service == *service)
            .flat_map(|front| front.ports.iter().copied())
            .collect()
    }
}

impl Parent {
    fn fronts(&self) -> &[Front] {
        match &self.found {
            Found::Services(fronts) => fronts,
            Found::Foreign | Found::Refused { .. } => &[],
        }
    }
}

/// What becomes of one parent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effect {
    /// In force.
    pub attachments: Vec<Attachment>,
    /// The waypoints that keep it.
    pub waypoints: BTreeSet<Name>,
    /// Ports that a route of another kind has.
    pub lost: BTreeSet<u16>,
}

/// What becomes of a parent, given the ports of each service that routes of other kinds have.
pub fn effect(
    namespace: &Str,
    parent: &Parent,
    shadowed: impl Fn(&NamespacedHostname) -> BTreeSet<u16>,
) -> Effect {
    let mut effect = Effect::default();
    for front in parent.fronts() {
        let callers = match *namespace == front.service.namespace {
            true => Callers::All,
            false => Callers::Namespace(namespace.clone()),
        };
        let shadowed = shadowed(&front.service);
        let left: Vec<u16> = front.ports.difference(&shadowed).copied().collect();
        effect.lost.extend(front.ports.intersection(&shadowed));
        if !left.is_empty() {
            effect.waypoints.extend(front.waypoints.iter().cloned());
        }
        let whole = left.len() == front.ports.len() && !front.one_port;
        let ports = match whole {
            true => vec![None],
            false => left.into_iter().map(Some).collect(),
        };
        effect
            .attachments
            .extend(ports.into_iter().map(|port| Attachment {
                service: front.service.clone(),
                port,
                callers: callers.clone(),
            }));
    }
    effect
}

/// The conditions of a parent; `None`: it is not ours to speak of.
pub fn conditions(
    parent: &Parent,
    effect: &Effect,
    translated: &Translated,
    rules: usize,
) -> Option<Vec<Condition>> {
    let accepted = match &parent.found {
        Found::Foreign => return None,
        Found::Refused { reason, message } => no(reason, message.clone()),
        Found::Services(_) => accepted(parent, effect, translated, rules),
    };
    let mut conditions = vec![accepted, resolved(&translated.unresolved)];
    let partly = !translated.problems.is_empty() && translated.problems.len() < rules;
    if partly && matches!(parent.found, Found::Services(_)) {
        conditions.push(partially(translated));
    }
    Some(conditions)
}

fn no(reason: &'static str, message: String) -> Condition {
    condition("Accepted", Truth::False, reason, message)
}

fn accepted(parent: &Parent, effect: &Effect, translated: &Translated, rules: usize) -> Condition {
    if effect.attachments.is_empty() {
        let message = format!(
            "not in force: a route of a kind that goes first has {}",
            ports(&effect.lost)
        );
        return no("Conflicted", message);
    }
    if effect.waypoints.is_empty() {
        let name = &parent.reference.name;
        let message =
            format!("not enforced: no waypoint serves {name} (label istio.io/use-waypoint)");
        return no("NoWaypoint", message);
    }
    if rules == 0 {
        return no("UnsupportedValue", "it has no rules".to_owned());
    }
    if translated.problems.len() == rules {
        let first = translated.problems.values().flatten().next();
        let (reason, message) = first.map_or(("UnsupportedValue", String::new()), told);
        return no(reason, format!("every request is answered 500: {message}"));
    }
    let waypoints: Vec<String> = effect.waypoints.iter().map(Name::to_string).collect();
    let mut message = format!("enforced by waypoint {}", waypoints.join(", "));
    if !effect.lost.is_empty() {
        message += &format!(
            "; not for {}, which a route of a kind that goes first has",
            ports(&effect.lost)
        );
    }
    condition("Accepted", Truth::True, "Accepted", message)
}

fn ports(ports: &BTreeSet<u16>) -> String {
    let numbers: Vec<String> = ports.iter().map(u16::to_string).collect();
    format!("port {}", numbers.join(", "))
}

fn told(problem: &Problem) -> (&'static str, String) {
    (
        problem.reason,
        format!("{}: {}", problem.path, problem.message),
    )
}

fn resolved(unresolved: &[Unresolved]) -> Condition {
    let Some(first) = unresolved.first() else {
        let message = "every reference is resolved";
        return condition("ResolvedRefs", Truth::True, "ResolvedRefs", message);
    };
    let messages: BTreeSet<&str> = unresolved.iter().map(|it| it.message.as_str()).collect();
    let messages: Vec<&str> = messages.into_iter().collect();
    let message = format!("{}; answered 500", messages.join("; "));
    condition("ResolvedRefs", Truth::False, first.reason, message)
}

/// The message starts as the Gateway API asks for (`RouteConditionPartiallyInvalid`).
fn partially(translated: &Translated) -> Condition {
    let numbers: Vec<String> = translated.problems.keys().map(usize::to_string).collect();
    let problems = translated
        .problems
        .values()
        .filter_map(|of_rule| of_rule.first());
    let reason = translated
        .problems
        .values()
        .flatten()
        .next()
        .map_or("UnsupportedValue", |it| it.reason);
    let texts: Vec<String> = problems.map(|problem| told(problem).1).collect();
    let message = format!(
        "Dropped Rule(s) {}: answered 500: {}",
        numbers.join(", "),
        texts.join("; ")
    );
    condition("PartiallyInvalid", Truth::True, reason, message)
}
