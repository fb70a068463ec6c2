//! The Istio API at L7 as derived collections.

use std::{collections::BTreeSet, sync::Arc};

use mesh::{
    l7::{backend::BackendPolicy, view::Resource},
    names::{NamespacedHostname, Str},
};

use super::{Claim, Facts, Joins, Offer, gateway_api::Attachments, reference};
use crate::{
    gateway::class,
    graph::{Collection, Context, Graph, Index, Source, Tap},
    object::{
        DestinationRule, Gateway, GatewayClass, Kind, Meta, Name, Object, ObjectRef,
        RequestAuthentication, Secret, Sourced, Telemetry, VirtualService,
    },
    output::{Condition, Truth},
    translate::{
        Settings, condition,
        l7::{
            self, Outcome, credential,
            istio::{
                authorization,
                destination_rule::{self, Defaults},
                request_authentication::{self as authentication, Fetched, KeySource},
                virtual_service::{is_visible, patterns, qualified},
            },
            target::{Aim, Found, aim},
        },
    },
};

mod routes;
mod told;

/// Objects of the Istio API at L7.
pub(super) struct Inputs {
    pub(super) authentications: Source<Name, Sourced<RequestAuthentication>>,
    pub(super) rules: Source<Name, Sourced<DestinationRule>>,
    pub(super) routes: Source<Name, VirtualService>,
    pub(super) telemetries: Source<Name, Telemetry>,
    /// EnvoyFilters and WasmPlugins.
    pub(super) unsupported: Source<ObjectRef, Meta>,
    /// What came of fetching keys.
    pub(super) keys: Source<KeySource, Fetched>,
    /// What came of reading Secrets.
    pub(super) credentials: Source<Name, credential::Found>,
}

/// What the Istio API comes to at the waypoints.
pub(super) struct Istio {
    /// Resources of all waypoints.
    pub(super) resources: Collection<l7::Key, Arc<Resource>>,
    /// What AuthorizationPolicies with targets come to.
    pub(super) policies: Collection<Name, Outcome>,
    /// What there is to say of the other objects.
    pub(super) conditions: Collection<ObjectRef, super::Conditions>,
    /// Where keys are to be fetched.
    pub(super) key_sources: Collection<KeySource, ()>,
}

/// What targets are looked up in.
#[derive(Clone)]
pub(super) struct Targets {
    facts: Facts,
    offers: Collection<ObjectRef, Offer>,
    winners: Collection<Str, Arc<Claim>>,
    gateways: Collection<Name, Gateway>,
    classes: Collection<Str, GatewayClass>,
    gateways_of_class: Index<Str, Name, Gateway>,
}

/// The DestinationRules by namespace and host.
#[derive(Clone)]
pub(super) struct Rules {
    settings: Arc<Settings>,
    credentials: Collection<Name, credential::Found>,
    by_host: Index<(Str, Str), Name, Sourced<DestinationRule>>,
}

impl Inputs {
    pub(super) fn new(graph: &Graph) -> Self {
        Self {
            authentications: graph.source(),
            rules: graph.source(),
            routes: graph.source(),
            telemetries: graph.source(),
            unsupported: graph.source(),
            keys: graph.source(),
            credentials: graph.source(),
        }
    }

    pub(super) fn get(&self, object: &ObjectRef) -> Option<Sourced<Object>> {
        let name = &object.name;
        let good = |object: Object| Sourced {
            object,
            faults: Vec::new(),
        };
        match object.kind {
            Kind::RequestAuthentication => self.authentications.peek(name).map(|it| Sourced {
                object: Object::RequestAuthentication(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::DestinationRule => self.rules.peek(name).map(|it| Sourced {
                object: Object::DestinationRule(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::VirtualService => {
                super::inputs::copy(&self.routes, name, Object::VirtualService).map(good)
            }
            Kind::Telemetry => {
                super::inputs::copy(&self.telemetries, name, Object::Telemetry).map(good)
            }
            Kind::Secret => match self.credentials.peek(name).as_deref() {
                Some(credential::Found::Is(held)) => Some(good(Object::Secret(Secret {
                    meta: Meta {
                        name: name.clone(),
                        ..Meta::default()
                    },
                    credential: held.clone(),
                }))),
                _ => None,
            },
            kind => {
                super::inputs::copy(&self.unsupported, object, |meta| Object::Other(kind, meta))
                    .map(good)
            }
        }
    }

    pub(super) fn set(&self, object: &ObjectRef, value: Option<Sourced<Object>>) {
        let name = &object.name;
        match object.kind {
            Kind::RequestAuthentication => self
                .authentications
                .set(name, take!(value, RequestAuthentication, faulty)),
            Kind::DestinationRule => self.rules.set(name, take!(value, DestinationRule, faulty)),
            Kind::VirtualService => self.routes.set(name, take!(value, VirtualService)),
            Kind::Telemetry => self.telemetries.set(name, take!(value, Telemetry)),
            Kind::Secret => {
                let secret = take!(value, Secret);
                let found = secret.map(|it| credential::Found::Is(it.credential));
                self.credentials.set(name, found);
            }
            _ => self
                .unsupported
                .set(object, value.map(|it| it.object.meta().clone())),
        }
    }
}

impl Targets {
    pub(super) fn new(
        inputs: &super::Inputs,
        joins: &Joins,
        offers: &Collection<ObjectRef, Offer>,
    ) -> Self {
        let class =
            |_: &Name, gateway: &Gateway| vec![gateway.spec.gateway_class_name.as_str().into()];
        Self {
            facts: joins.facts.clone(),
            offers: offers.clone(),
            winners: joins.winners.clone(),
            gateways: inputs.gateways.clone(),
            classes: inputs.classes.clone(),
            gateways_of_class: inputs.gateways.index(class),
        }
    }

    /// What the targets of a policy come to.
    pub(super) fn aim<'t>(
        &self,
        cx: &Context<'_>,
        namespace: &str,
        targets: impl IntoIterator<Item = &'t crate::crd::TargetRef>,
    ) -> Aim {
        aim(&self.facts.settings, namespace, targets, |kind, name| {
            self.look(cx, kind, name)
        })
    }

    fn look(&self, cx: &Context<'_>, kind: Kind, name: &Name) -> Found {
        match kind {
            Kind::Service | Kind::ServiceEntry => self.services(cx, &reference(kind, name)),
            Kind::Gateway => match cx.get(&self.gateways, name) {
                None => Found::Absent,
                Some(gateway) if self.is_waypoint(cx, &gateway.spec.gateway_class_name) => {
                    Found::Waypoints(vec![name.clone()])
                }
                Some(_) => Found::NoWaypoint,
            },
            _ => self.of_class(cx, name),
        }
    }

    fn of_class(&self, cx: &Context<'_>, name: &Name) -> Found {
        let class = &name.name;
        if cx.get(&self.classes, class).is_none() && !class::is_waypoint(class, None) {
            return Found::Absent;
        }
        if !self.is_waypoint(cx, class) {
            return Found::NoWaypoint;
        }
        let gateways = cx.find(&self.gateways_of_class, class);
        Found::Waypoints(gateways.into_iter().map(|(name, _)| name).collect())
    }

    /// Whether a Gateway is a waypoint.
    pub(super) fn is_waypoint_gateway(&self, cx: &Context<'_>, name: &Name) -> bool {
        let gateway = cx.get(&self.gateways, name);
        gateway.is_some_and(|gateway| self.is_waypoint(cx, &gateway.spec.gateway_class_name))
    }

    /// Whether Gateways of this class are waypoints.
    fn is_waypoint(&self, cx: &Context<'_>, class: &str) -> bool {
        let found = cx.get(&self.classes, &class.into());
        let controller = found.map(|class| class.spec.controller_name.clone());
        class::is_waypoint(class, controller.as_deref())
    }

    fn services(&self, cx: &Context<'_>, object: &ObjectRef) -> Found {
        let Some(offer) = cx.get(&self.offers, object) else {
            return Found::Absent;
        };
        let mut services = BTreeSet::new();
        for claim in &offer.claims {
            let winner = cx.get(&self.winners, &claim.service_key());
            if winner.is_some_and(|winner| winner.key() == claim.key()) {
                services.insert(service_of(claim));
            }
        }
        Found::Services(
            services.into_iter().collect(),
            offer.bound.served_by.clone(),
        )
    }
}

fn service_of(claim: &Claim) -> NamespacedHostname {
    NamespacedHostname {
        namespace: claim.meta.name.namespace.clone(),
        hostname: claim.hostname.clone(),
    }
}

impl Rules {
    pub(super) fn new(inputs: &super::Inputs, facts: &Facts) -> Self {
        let settings = facts.settings.clone();
        let host = move |name: &Name, rule: &Sourced<DestinationRule>| {
            let host = qualified(&settings, &name.namespace, &rule.object.spec.host);
            vec![(name.namespace.clone(), host)]
        };
        Self {
            settings: facts.settings.clone(),
            credentials: inputs.istio.credentials.clone(),
            by_host: inputs.istio.rules.index(host),
        }
    }

    /// How a waypoint reaches the endpoints of a service: by the rules of the service's namespace, else of the root
    /// namespace, there by those for the most specific host.
    pub(super) fn policy(
        &self,
        cx: &Context<'_>,
        waypoint: &Name,
        claim: &Claim,
    ) -> Option<BackendPolicy> {
        let rules = self.rules(cx, claim);
        let rules: Vec<&Sourced<DestinationRule>> = rules.iter().map(|rule| &**rule).collect();
        let none = Defaults::default();
        let mesh = self.settings.mesh.as_ref();
        let base = mesh.map_or(&none, |mesh| &mesh.connections);
        let root = &*self.settings.root_namespace;
        let balancing = claim.service.load_balancing.as_ref();
        let prefers = balancing.is_some_and(|it| !it.routing_preference.is_empty());
        destination_rule::policy(&service_of(claim), &rules, base, prefers, |rule, name| {
            let asking = credential::Asking {
                waypoint,
                rule,
                root,
            };
            asking.resolve(name, |secret| {
                cx.get(&self.credentials, secret).map(|it| (*it).clone())
            })
        })
    }

    /// The oldest first.
    fn rules(&self, cx: &Context<'_>, claim: &Claim) -> Vec<Arc<Sourced<DestinationRule>>> {
        let home = &claim.meta.name.namespace;
        let root = &self.settings.root_namespace;
        let homes: Vec<&Str> = match home == root {
            true => vec![home],
            false => vec![home, root],
        };
        for namespace in homes {
            for host in patterns(&claim.hostname) {
                let found = cx.find(&self.by_host, &(namespace.clone(), host));
                let visible = found.into_iter().filter(|(name, rule)| {
                    is_visible(&rule.object.spec.export_to, &name.namespace, home)
                });
                let mut rules: Vec<_> = visible.map(|(_, rule)| rule).collect();
                rules.sort_by_key(|rule| rule.object.meta.age());
                if !rules.is_empty() {
                    return rules;
                }
            }
        }
        Vec::new()
    }
}

pub(super) fn istio(
    graph: &mut Graph,
    inputs: &super::Inputs,
    joins: &Joins,
    targets: &Targets,
    attached: &Attachments,
) -> Istio {
    let policies = policies(graph, inputs, targets);
    let authentications = authentications(graph, &inputs.istio, targets);
    let routes = routes::routes(graph, &inputs.istio, joins, attached);
    let telemetry = told::told(graph, inputs, targets);
    let (resources, conditions) = parts(graph, &policies);
    let mut all_resources = vec![resources, telemetry.resources];
    // Conditions of AuthorizationPolicies are said with those of node tunnels.
    drop(conditions);
    let mut all_conditions = vec![telemetry.conditions, unsupported(graph, &inputs.istio)];
    for (kind, outcomes) in [
        (Kind::RequestAuthentication, &authentications),
        (Kind::VirtualService, &routes),
    ] {
        let (resources, conditions) = parts(graph, outcomes);
        all_resources.push(resources);
        let (conditions, _) = graph.derive(&conditions, move |_, name, condition| {
            super::outputs::told(reference(kind, name), vec![(**condition).clone()])
        });
        all_conditions.push(conditions);
    }
    Istio {
        resources: graph.join(&all_resources.iter().collect::<Vec<_>>()),
        conditions: graph.join(&all_conditions.iter().collect::<Vec<_>>()),
        policies,
        key_sources: key_sources(graph, &inputs.istio),
    }
}

/// The resources and the conditions of outcomes.
fn parts(
    graph: &mut Graph,
    outcomes: &Collection<Name, Outcome>,
) -> (
    Collection<l7::Key, Arc<Resource>>,
    Collection<Name, Condition>,
) {
    let (resources, _) = graph.derive(outcomes, |_, _, outcome| outcome.resources.clone());
    let (conditions, _) = graph.derive(outcomes, |_, name, outcome| {
        let condition = outcome.condition.clone();
        condition
            .map(|condition| (name.clone(), condition))
            .into_iter()
            .collect()
    });
    (resources, conditions)
}

fn policies(
    graph: &mut Graph,
    inputs: &super::Inputs,
    targets: &Targets,
) -> Collection<Name, Outcome> {
    let aimed = targets.clone();
    let mesh = targets.facts.settings.mesh.clone();
    let (policies, _) = graph.derive(&inputs.policies, move |cx, name, policy| {
        let spec = &policy.object.spec;
        let refs = spec.target_refs.iter().chain(&spec.target_ref);
        let aim = aimed.aim(cx, &name.namespace, refs);
        let is_provider = |name: &str| {
            mesh.as_ref()
                .is_some_and(|mesh| mesh.authorizers.contains_key(name))
        };
        match aim.is_aimed() {
            true => vec![(
                name.clone(),
                authorization::translate(policy, &aim, is_provider),
            )],
            false => Vec::new(),
        }
    });
    policies
}

fn authentications(
    graph: &mut Graph,
    inputs: &Inputs,
    targets: &Targets,
) -> Collection<Name, Outcome> {
    let (aimed, keys) = (targets.clone(), inputs.keys.clone());
    let (outcomes, _) = graph.derive(&inputs.authentications, move |cx, name, policy| {
        let spec = &policy.object.spec;
        let refs = spec.target_refs.iter().chain(&spec.target_ref);
        let aim = aimed.aim(cx, &name.namespace, refs);
        let fetched = |source: &KeySource| cx.get(&keys, source).map(|it| (*it).clone());
        let outcome = match aim.is_aimed() {
            true => authentication::translate(policy, &aim, fetched),
            false => Outcome {
                resources: Vec::new(),
                condition: Some(condition(
                    "WaypointAccepted",
                    Truth::False,
                    "UnsupportedValue",
                    "nothing is enforced: waypoints verify tokens for targetRefs only, and nothing else here reads tokens",
                )),
            },
        };
        vec![(name.clone(), outcome)]
    });
    outcomes
}

/// The sources that keys are to be fetched from.
fn key_sources(graph: &mut Graph, inputs: &Inputs) -> Collection<KeySource, ()> {
    let by_source = inputs.authentications.index(|_, policy| {
        let sources: BTreeSet<KeySource> = authentication::sources(&policy.object.spec)
            .into_iter()
            .collect();
        sources.into_iter().collect()
    });
    let grouped = graph.group(&by_source);
    let (sources, _) = graph.derive(&grouped, |_, source, _| vec![(source.clone(), ())]);
    sources
}

/// What is said of DestinationRules, given what waypoints are told of services; and the Secrets that are to be read for
/// them.
pub(super) fn rule_conditions(
    graph: &mut Graph,
    inputs: &super::Inputs,
    facts: &Facts,
    of_services: &Collection<l7::Key, Arc<Resource>>,
) -> (
    Collection<ObjectRef, super::Conditions>,
    Collection<Name, ()>,
) {
    let by_rule = of_services.index(|_, resource| match &**resource {
        Resource::Backend(policy) => policy
            .sources
            .iter()
            .filter(|source| &*source.kind == "DestinationRule")
            .map(|source| Name::new(source.namespace.clone(), source.name.clone()))
            .collect(),
        _ => Vec::new(),
    });
    let secrets = secrets(graph, inputs, facts, &by_rule);
    let settings = facts.settings.clone();
    let credentials = inputs.istio.credentials.clone();
    let (conditions, _) = graph.derive(&inputs.istio.rules, move |cx, name, rule| {
        let used = cx.find(&by_rule, name);
        let used: Vec<_> = used
            .into_iter()
            .map(|((waypoint, _), it)| (waypoint, (*it).clone()))
            .collect();
        let root = &*settings.root_namespace;
        let said = destination_rule::condition(&settings, rule, &used, |waypoint, held| {
            let asking = credential::Asking {
                waypoint,
                rule: name,
                root,
            };
            asking.resolve(held, |secret| {
                cx.get(&credentials, secret).map(|it| (*it).clone())
            })
        });
        super::outputs::told(reference(Kind::DestinationRule, name), vec![said])
    });
    (conditions, secrets)
}

/// The Secrets that waypoints are to have by DestinationRules: of their own namespaces, and no others.
fn secrets(
    graph: &mut Graph,
    inputs: &super::Inputs,
    facts: &Facts,
    by_rule: &Index<Name, l7::Key, Arc<Resource>>,
) -> Collection<Name, ()> {
    let settings = facts.settings.clone();
    let by_rule = by_rule.clone();
    let (wanted, _) = graph.derive(&inputs.istio.rules, move |cx, rule, written| {
        let names = destination_rule::credentials(&written.object.spec);
        if names.is_empty() {
            return Vec::new();
        }
        let used = cx.find(&by_rule, rule);
        let waypoints: BTreeSet<Name> = used.into_iter().map(|((it, _), _)| it).collect();
        let mut secrets = BTreeSet::new();
        for waypoint in &waypoints {
            let asking = credential::Asking {
                waypoint,
                rule,
                root: &settings.root_namespace,
            };
            let allowed = names.iter().filter(|name| asking.allowed(name).is_ok());
            secrets.extend(allowed.flat_map(|it| credential::secrets(&waypoint.namespace, it)));
        }
        let keyed = secrets.into_iter().map(|it| ((it, rule.clone()), ()));
        keyed.collect()
    });
    let by_secret = wanted.index(|(secret, _), ()| vec![secret.clone()]);
    let grouped = graph.group(&by_secret);
    let (secrets, _) = graph.derive(&grouped, |_, secret, _| vec![(secret.clone(), ())]);
    secrets
}

fn unsupported(graph: &mut Graph, inputs: &Inputs) -> Collection<ObjectRef, super::Conditions> {
    let (conditions, _) = graph.derive(&inputs.unsupported, |_, object, _| {
        let message = match object.kind {
            Kind::EnvoyFilter => {
                "nothing of it is in force: it changes Envoy's own configuration, and waypoints here are not Envoy; use routes, DestinationRule, AuthorizationPolicy and Telemetry"
            }
            _ => "nothing of it is in force: waypoints here run no WebAssembly",
        };
        let said = condition("Accepted", Truth::False, "Unsupported", message);
        super::outputs::told(object.clone(), vec![said])
    });
    conditions
}

/// Where the sources of keys are told, to be fetched.
pub(super) type KeySources = Tap<KeySource, ()>;
