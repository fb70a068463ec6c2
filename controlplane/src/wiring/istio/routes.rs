//! VirtualServices: which services each is attached to, and what their hosts mean.

use std::{collections::BTreeSet, sync::Arc};

use mesh::{
    l7::{
        route::{Attachment, Callers},
        view::Resource,
    },
    names::{NamespacedHostname, Str},
};

use super::{Inputs, service_of};
use crate::{
    crd::istio::Delegate,
    graph::{Collection, Context, Graph, Index},
    object::{Kind, Name, VirtualService},
    output::{Condition, Truth},
    translate::{
        Settings, condition,
        l7::{
            Outcome,
            istio::virtual_service::{
                self, Around, Known, choose, is_for_mesh, is_visible, patterns, qualified,
            },
            keyed,
        },
        service::Claim,
    },
    wiring::{Joins, gateway_api::Attachments},
};

/// A VirtualService's hold on a service.
#[derive(Clone, Debug, PartialEq)]
struct Held {
    service: NamespacedHostname,
    waypoints: Vec<Name>,
    ports: Vec<u16>,
    callers: Vec<Callers>,
}

/// What routes are computed with.
#[derive(Clone)]
struct Hosts {
    settings: Arc<Settings>,
    routes: Collection<Name, VirtualService>,
    services: Index<Str, Str, Arc<Claim>>,
    held: Index<Name, (Name, Str), Held>,
    roots: Index<Name, Name, VirtualService>,
    attached: Attachments,
}

pub(super) fn routes(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    attached: &Attachments,
) -> Collection<Name, Outcome> {
    let settings = joins.facts.settings.clone();
    let known = settings.clone();
    let by_host = inputs.routes.index(move |name, route| {
        let hosts = route.spec.hosts.iter();
        let hosts: BTreeSet<Str> = hosts
            .map(|host| qualified(&known, &name.namespace, host))
            .collect();
        let for_mesh = is_for_mesh(&route.spec.gateways);
        hosts.into_iter().filter(|_| for_mesh).collect()
    });
    let (held, _) = graph.derive(&joins.winners, move |cx, key, claim| {
        let held = holders(cx, &by_host, claim);
        held.into_iter()
            .map(|(name, held)| ((name, key.clone()), held))
            .collect()
    });
    let roots = inputs.routes.index(|name, route| {
        let delegates = route
            .spec
            .http
            .iter()
            .filter_map(|http| http.delegate.as_ref());
        let names: BTreeSet<Name> = delegates
            .map(|it| delegate_name(&name.namespace, it))
            .collect();
        names.into_iter().collect()
    });
    let hosts = Hosts {
        settings,
        routes: inputs.routes.clone(),
        services: joins.winners.index(|_, claim| vec![claim.hostname.clone()]),
        held: held.index(|(name, _), _| vec![name.clone()]),
        roots,
        attached: attached.clone(),
    };
    let (outcomes, _) = graph.derive(&inputs.routes, move |cx, name, route| {
        vec![(name.clone(), hosts.outcome(cx, name, route))]
    });
    outcomes
}

fn delegate_name(namespace: &str, it: &Delegate) -> Name {
    match it.namespace.as_str() {
        "" => Name::new(namespace, it.name.as_str()),
        other => Name::new(other, it.name.as_str()),
    }
}

/// The VirtualServices for a service: those for the most specific host that has any for everyone.
fn holders(
    cx: &Context<'_>,
    by_host: &Index<Str, Name, VirtualService>,
    claim: &Arc<Claim>,
) -> Vec<(Name, Held)> {
    if claim.served_by.is_empty() {
        return Vec::new();
    }
    let mut held = Vec::new();
    for host in patterns(&claim.hostname) {
        for (name, route) in cx.find(by_host, &host) {
            let callers = callers(
                &route.spec.export_to,
                &name.namespace,
                &claim.meta.name.namespace,
            );
            if !callers.is_empty() {
                let hold = Held {
                    service: service_of(claim),
                    waypoints: claim.served_by.clone(),
                    ports: claim.ports.iter().map(|port| port.port).collect(),
                    callers,
                };
                held.push((name, hold));
            }
        }
        // Beside routes for some namespaces, the less exact ones for everyone stay in force.
        if held
            .iter()
            .any(|(_, hold)| hold.callers.contains(&Callers::All))
        {
            break;
        }
    }
    // An object may name a service by two of its hosts.
    let mut known = BTreeSet::new();
    held.retain(|(name, _)| known.insert(name.clone()));
    held
}

/// Whose requests a route is for: everyone's where the service's namespace sees it, else those of the namespaces that do.
fn callers(export_to: &[String], own: &Str, service: &str) -> Vec<Callers> {
    if is_visible(export_to, own, service) {
        return vec![Callers::All];
    }
    let namespaces = export_to
        .iter()
        .filter(|to| *to != "~")
        .map(|to| match to.as_str() {
            "." => own.clone(),
            other => Str::from(other),
        });
    namespaces.map(Callers::Namespace).collect()
}

impl Hosts {
    fn outcome(&self, cx: &Context<'_>, name: &Name, route: &VirtualService) -> Outcome {
        if !is_for_mesh(&route.spec.gateways) {
            let message = "its gateways do not hold mesh: it is for gateways, and nothing of it is in force at waypoints";
            return said(Truth::False, "NotForMesh", message.to_owned());
        }
        if route.spec.hosts.is_empty() {
            return self.delegated(cx, name);
        }
        let held: Vec<Arc<Held>> = cx
            .find(&self.held, name)
            .into_iter()
            .map(|(_, held)| held)
            .collect();
        if held.is_empty() {
            let hosts = route.spec.hosts.join(", ");
            let message = format!(
                "no waypoint serves {hosts}, or another VirtualService is for its host more exactly; nothing of it is in force"
            );
            return said(Truth::False, "AncestorNotBound", message);
        }
        let (http, problems) =
            virtual_service::with_delegates(route, |it| self.delegate(cx, &name.namespace, it));
        let waypoints: BTreeSet<&Name> = held.iter().flat_map(|held| &held.waypoints).collect();
        let mut resources = Vec::new();
        for waypoint in &waypoints {
            let there: Vec<_> = held
                .iter()
                .filter(|held| held.waypoints.contains(waypoint))
                .collect();
            let ports: BTreeSet<u16> = there
                .iter()
                .flat_map(|held| held.ports.iter().copied())
                .collect();
            let attachments: Vec<Attachment> =
                there.iter().flat_map(|held| attachments(held)).collect();
            let resolve = |host: &str| self.resolve(cx, &name.namespace, host);
            let around = Around {
                settings: &self.settings,
                namespace: &name.namespace,
                ports: &ports.into_iter().collect::<Vec<_>>(),
                resolve: &resolve,
            };
            let routes = virtual_service::routes(route, &http, &attachments, around);
            resources.extend(
                routes
                    .into_iter()
                    .map(|route| keyed(waypoint, Resource::Route(route))),
            );
        }
        let lost: Vec<Lost> = held.iter().map(|held| self.lost(cx, held)).collect();
        let condition = told(&waypoints, &held, &lost, problems, &resources);
        Outcome {
            resources,
            condition: Some(condition),
        }
    }

    /// What of its hold on a service the Gateway API's routes have, which go first (`mesh::l7`): for the same callers.
    fn lost(&self, cx: &Context<'_>, held: &Held) -> Lost {
        let mut lost = Lost::default();
        let mut everywhere = true;
        for callers in &held.callers {
            let namespace = match callers {
                Callers::All => &held.service.namespace,
                Callers::Namespace(namespace) => namespace,
            };
            let kind = Kind::VirtualService;
            let routes = self.attached.in_front(cx, kind, namespace, &held.service);
            let ports: BTreeSet<u16> = routes.iter().flat_map(|(_, it)| it.clone()).collect();
            everywhere &= held.ports.iter().all(|port| ports.contains(port));
            lost.ports.extend(ports);
            lost.to.extend(
                routes
                    .iter()
                    .map(|(route, _)| format!("{} {}", route.kind.as_str(), route.name)),
            );
        }
        lost.whole = everywhere && !lost.to.is_empty();
        lost
    }

    fn delegated(&self, cx: &Context<'_>, name: &Name) -> Outcome {
        let roots = cx.find(&self.roots, name);
        let names: Vec<String> = roots.iter().map(|(name, _)| name.to_string()).collect();
        match names.is_empty() {
            true => said(
                Truth::False,
                "AncestorNotBound",
                "has no hosts, and no VirtualService delegates to it; nothing of it is in force"
                    .to_owned(),
            ),
            false => said(
                Truth::True,
                "Accepted",
                format!("delegated to by {}", names.join(", ")),
            ),
        }
    }

    fn delegate(
        &self,
        cx: &Context<'_>,
        namespace: &Str,
        it: &Delegate,
    ) -> Result<(Str, Vec<crate::crd::istio::HttpRoute>), String> {
        let name = delegate_name(namespace, it);
        let found = cx
            .get(&self.routes, &name)
            .ok_or_else(|| format!("there is no VirtualService {name}"))?;
        if !found.spec.hosts.is_empty() {
            return Err(format!("{name} has hosts of its own"));
        }
        if !is_visible(&found.spec.export_to, &name.namespace, namespace) {
            return Err(format!("{name} is not exported to {namespace}"));
        }
        if found.spec.http.iter().any(|http| http.delegate.is_some()) {
            return Err(format!("{name} delegates itself"));
        }
        Ok((name.namespace, found.spec.http.clone()))
    }

    /// The service of a host as seen from a namespace.
    fn resolve(&self, cx: &Context<'_>, namespace: &str, host: &str) -> Option<Known> {
        let claims = cx.find(&self.services, &host.into());
        let claims: Vec<Arc<Claim>> = claims
            .into_iter()
            .map(|(_, claim)| (*claim).clone())
            .collect();
        let private =
            |claim: &Claim| claim.service.visibility() == proto::workload::Visibility::Namespace;
        let chosen = choose(namespace, &claims, |claim| {
            (
                claim.meta.name.namespace.clone(),
                claim.kind == Kind::Service,
                private(claim),
            )
        })?;
        Some(Known {
            service: service_of(chosen),
            ports: chosen.ports.iter().map(|port| port.port).collect(),
        })
    }
}

/// What of a hold on a service others have.
#[derive(Default)]
struct Lost {
    ports: BTreeSet<u16>,
    /// Who they are.
    to: BTreeSet<String>,
    /// Nothing is left.
    whole: bool,
}

impl Lost {
    fn text(&self, held: &Held) -> Option<String> {
        let to: Vec<&str> = self.to.iter().map(String::as_str).collect();
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        (!to.is_empty()).then(|| {
            let (host, ports) = (&held.service.hostname, ports.join(", "));
            let to = to.join(", ");
            format!("not in force on {host} at {ports}: {to} goes first")
        })
    }
}

fn attachments(held: &Held) -> Vec<Attachment> {
    let attachment = |callers: &Callers| Attachment {
        service: held.service.clone(),
        port: None,
        callers: callers.clone(),
    };
    held.callers.iter().map(attachment).collect()
}

fn told(
    waypoints: &BTreeSet<&Name>,
    held: &[Arc<Held>],
    lost: &[Lost],
    problems: Vec<String>,
    resources: &[(crate::translate::l7::Key, Arc<Resource>)],
) -> Condition {
    let names: Vec<String> = waypoints.iter().map(|name| name.to_string()).collect();
    let services: Vec<String> = held
        .iter()
        .map(|held| held.service.hostname.to_string())
        .collect();
    let mut said = vec![format!(
        "bound to {} for {}",
        names.join(", "),
        services.join(", ")
    )];
    let taken = held.iter().zip(lost);
    said.extend(taken.filter_map(|(held, lost)| lost.text(held)));
    if lost.iter().all(|lost| lost.whole) {
        return condition(
            "WaypointAccepted",
            Truth::False,
            "Conflicted",
            said.join("; "),
        );
    }
    let failing: BTreeSet<String> = resources
        .iter()
        .flat_map(|(_, resource)| invalid(resource))
        .collect();
    let right = problems.is_empty() && failing.is_empty();
    said.extend(
        problems
            .into_iter()
            .map(|problem| format!("left out: {problem}")),
    );
    if !failing.is_empty() {
        let failing: Vec<String> = failing.into_iter().collect();
        said.push(format!(
            "requests for these destinations fail: {}",
            failing.join("; ")
        ));
    }
    match right {
        true => condition("WaypointAccepted", Truth::True, "Accepted", said.join("; ")),
        false => condition(
            "WaypointAccepted",
            Truth::False,
            "InvalidDestination",
            said.join("; "),
        ),
    }
}

/// Destinations of a route that lead nowhere.
fn invalid(resource: &Resource) -> Vec<String> {
    use mesh::l7::route::{Action, Backend, Rules};
    let Resource::Route(route) = resource else {
        return Vec::new();
    };
    let mut backends: Vec<&Backend> = Vec::new();
    match &route.rules {
        Rules::Http { rules, .. } => {
            for rule in rules {
                if let Action::Forward(forward) = &rule.action {
                    backends.extend(forward.iter().map(|it| &it.backend));
                }
                backends.extend(rule.mirrors.iter().map(|it| &it.backend));
            }
        }
        Rules::Tls(rules) => backends.extend(
            rules
                .iter()
                .flat_map(|rule| &rule.backends)
                .map(|(_, it)| it),
        ),
        Rules::Tcp(rules) => backends.extend(
            rules
                .iter()
                .flat_map(|rule| &rule.backends)
                .map(|(_, it)| it),
        ),
    }
    let text = |backend: &&Backend| match backend {
        Backend::Invalid(text) => Some(text.to_string()),
        Backend::Service { .. } => None,
    };
    backends.iter().filter_map(text).collect()
}

fn said(status: Truth, reason: &'static str, message: String) -> Outcome {
    Outcome {
        resources: Vec::new(),
        condition: Some(condition("WaypointAccepted", status, reason, message)),
    }
}
