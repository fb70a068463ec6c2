//! The mesh as derived collections: which facts each translation reads, and so what a change costs.
//!
//! Decisions are in `translate`; here is only what is fetched for them. The order below is the order of dependencies.

use std::{collections::BTreeMap, collections::BTreeSet, net::IpAddr, sync::Arc};

use mesh::names::Str;

use proto::{
    security::{self, Authorization},
    workload as wire,
};

use crate::{
    graph::{Collection, Context, Data, Graph, Index, Key, Runs, Source, Tap},
    object::{
        BackendTlsPolicy, BackendTrafficPolicy, ConfigMap, EndpointSlice, Gateway, GatewayClass,
        Kind, Labels, Meta, Name, Object, ObjectRef, PeerAuthentication, Pod, Policy, Service,
        ServiceEntry, Sourced, WorkloadEntry,
    },
    output::{Condition, Resource, ResourceKey, Truth},
    translate::{
        Settings, allocate, condition,
        l7::gateway_api::RouteObject,
        l7::istio::request_authentication::{Fetched, KeySource},
        network::{self, NetworkGateway},
        peer, policy, policy_resource,
        service::{self, Claim, ClaimKey},
        service_resource,
        visibility::Visibility,
        waypoint::{self, Bound, Traffic, User, Waypoint},
        workload::{self, Surroundings},
        workload_resource,
    },
    world::is_revised,
};

/// The graph of one mesh: objects go in through [`Wiring::set`], resources and conditions come out of the taps.
pub struct Wiring {
    graph: Graph,
    settings: Arc<Settings>,
    inputs: Inputs,
    /// Conditions of objects that take no part.
    apart: Source<ObjectRef, Conditions>,
    /// The names that mean this control plane in the label `istio.io/rev`: its revision, and tags that point to it.
    revisions: BTreeSet<Str>,
    /// Changed resources.
    pub resources: Tap<ResourceKey, Resource>,
    /// Changed conditions.
    pub conditions: Tap<ObjectRef, Conditions>,
    /// Changed statuses of routes and policies, per parent.
    pub parents: Tap<ObjectRef, Parents>,
    /// Changed pods.
    pub pods: Tap<Name, Pod>,
    /// Changed service accounts of the pods of managed waypoints.
    pub waypoint_accounts: Tap<Name, BTreeSet<Str>>,
    /// Changed sources of keys that are to be fetched.
    pub key_sources: istio::KeySources,
    /// Changed addresses of ServiceEntries' hosts that have none of their own.
    pub allocated: Tap<allocate::Host, Vec<IpAddr>>,
    /// How often each kind was computed.
    pub runs: BTreeMap<&'static str, Runs>,
}

struct Inputs {
    namespaces: Source<Str, Meta>,
    nodes: Source<Str, Meta>,
    pods: Source<Name, Pod>,
    services: Source<Name, Service>,
    slices: Source<Name, EndpointSlice>,
    entries: Source<Name, ServiceEntry>,
    workload_entries: Source<Name, WorkloadEntry>,
    gateways: Source<Name, Gateway>,
    classes: Source<Str, GatewayClass>,
    policies: Source<Name, Sourced<Policy>>,
    peers: Source<Name, Sourced<PeerAuthentication>>,
    routes: Source<ObjectRef, Sourced<RouteObject>>,
    backend_tls: Source<Name, Sourced<BackendTlsPolicy>>,
    backend_traffic: Source<Name, BackendTrafficPolicy>,
    config_maps: Source<Name, ConfigMap>,
    istio: istio::Inputs,
}

/// What an object that makes services comes to.
#[derive(Clone, Debug, PartialEq)]
struct Offer {
    claims: Vec<Arc<Claim>>,
    bound: Bound,
    served: Option<Condition>,
    /// Where the mesh has a rule for it.
    visibility: Option<Visibility>,
}

/// What an object that makes workloads comes to.
#[derive(Clone, Debug, PartialEq)]
struct Made {
    resources: Vec<Arc<Resource>>,
    /// The waypoints that its traffic goes through.
    served_by: Vec<Name>,
    conditions: Conditions,
}

/// What there is to say of an object; shared, for there are as many as pods.
type Conditions = Arc<Vec<Condition>>;

/// Whether something is said of each pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfPods {
    /// Yes: whoever reads a folder asks.
    Speak,
    /// No: nobody writes it into a hundred thousand statuses, and nobody asks.
    KeepSilent,
}

/// The common facts and the collections that most computations read. Cheap to clone: handles.
#[derive(Clone)]
struct Facts {
    settings: Arc<Settings>,
    of_pods: OfPods,
    namespaces: Collection<Str, Meta>,
    network: Collection<(), Str>,
    waypoints: Collection<Name, Waypoint>,
    gateways_of_network: Index<Str, Name, NetworkGateway>,
}

/// What workloads are joined with.
#[derive(Clone)]
struct Joins {
    facts: Facts,
    winners: Collection<Str, Arc<Claim>>,
    winners_of_namespace: Index<Str, Str, Arc<Claim>>,
    policies_of_namespace: Index<Str, Name, policy::Outcome>,
    peers_of_namespace: Index<Str, Name, peer::Outcome>,
    levels: Collection<Str, peer::Level>,
    accounts: Collection<Name, BTreeSet<Str>>,
}

impl Facts {
    fn network(&self, cx: &Context<'_>) -> Str {
        cx.get(&self.network, &()).map_or_else(
            || self.settings.network.clone(),
            |network| (*network).clone(),
        )
    }

    fn namespace(&self, cx: &Context<'_>, name: &Str) -> Option<Arc<Meta>> {
        cx.get(&self.namespaces, name)
    }

    fn bind(&self, cx: &Context<'_>, object: &Meta, traffic: Traffic) -> Bound {
        self.bind_from(cx, object, traffic, false)
    }

    /// A ServiceEntry, which may be seen only from its own namespace.
    fn bind_entry(&self, cx: &Context<'_>, entry: &Meta, traffic: Traffic) -> Bound {
        let visibility = self.visibility(cx, &entry.name.namespace);
        self.bind_from(
            cx,
            entry,
            traffic,
            visibility == Some(Visibility::Namespace),
        )
    }

    fn bind_from(&self, cx: &Context<'_>, object: &Meta, traffic: Traffic, private: bool) -> Bound {
        let namespace = self.namespace(cx, &object.name.namespace);
        let user = User {
            object,
            namespace: namespace.as_deref(),
            traffic,
            private,
        };
        waypoint::resolve(&self.settings, &user, |name| cx.get(&self.waypoints, name))
    }

    /// Of the ServiceEntries of a namespace, where the mesh has a rule for it.
    fn visibility(&self, cx: &Context<'_>, namespace: &Str) -> Option<Visibility> {
        let rules = self.settings.entry_visibility.as_ref()?;
        let namespace = self.namespace(cx, namespace);
        let labels = namespace.map(|namespace| namespace.labels.clone());
        Some(rules.of(&labels.unwrap_or_default()))
    }

    /// Says how a workload of another network is reached.
    fn through_gateway(&self, cx: &Context<'_>, workload: &mut wire::Workload) {
        if *workload.network != *self.network(cx) {
            let network = Str::from(workload.network.as_str());
            let gateways = cx.find(&self.gateways_of_network, &network);
            let gateways: Vec<_> = gateways.into_iter().map(|(_, gateway)| gateway).collect();
            workload.network_gateway = network::choose(&gateways, &workload.uid);
        }
    }
}

impl Wiring {
    /// A mesh without objects.
    pub fn new(settings: Settings, of_pods: OfPods) -> Self {
        let settings = Arc::new(settings);
        let mut graph = Graph::new();
        let inputs = Inputs::new(&graph);
        let apart = graph.source();
        let mut runs = BTreeMap::new();
        let facts = facts(&mut graph, &settings, &inputs, of_pods);
        let allocated = allocations(&mut graph, &inputs);
        let offers = offers(&mut graph, &inputs, &facts, &allocated, &mut runs);
        let winners = winners(&mut graph, &offers);
        let joins = joins(&mut graph, &inputs, &facts, &winners, &mut runs);
        let made = made(&mut graph, &inputs, &joins, &mut runs);
        let resources = resources(&mut graph, &joins, &made, &inputs);
        let targets = Targets::new(&inputs, &joins, &offers);
        let istio = istio::istio(&mut graph, &inputs, &joins, &targets);
        let routes =
            gateway_api::gateway_api(&mut graph, &inputs, &joins, &offers, &targets, &mut runs);
        let configs = waypoints::configs(&mut graph, &inputs, &facts, &routes.authorizers);
        let specified = graph.join(&[&configs, &routes.resources, &istio.resources]);
        let (of_waypoints, of_backends) = waypoints::resources(
            &mut graph,
            &inputs,
            &joins,
            &made,
            &specified,
            &routes.overlays,
            &mut runs,
        );
        let of_rules = istio::rule_conditions(&mut graph, &inputs, &facts, &of_backends);
        let resources = graph.join(&[&resources, &of_waypoints]);
        let conditions = conditions(
            &mut graph, &inputs, &joins, &offers, &made, &allocated, &istio,
        );
        let all_conditions = graph.join(&[&conditions, &of_rules, &apart]);
        Self {
            resources: resources.tap(),
            conditions: all_conditions.tap(),
            parents: routes.parents.tap(),
            pods: inputs.pods.tap(),
            allocated: allocated.tap(),
            key_sources: istio.key_sources.tap(),
            waypoint_accounts: readers(&mut graph, &inputs, &facts).tap(),
            graph,
            settings,
            inputs,
            apart,
            revisions: BTreeSet::new(),
            runs,
        }
    }

    /// The tags that point to this control plane's revision now. Objects that are labelled with one must be set again.
    pub fn tagged(&mut self, tags: &BTreeSet<Str>) {
        self.revisions.clone_from(tags);
    }

    /// An object as it was set, if it takes part.
    pub fn get(&self, object: &ObjectRef) -> Option<Sourced<Object>> {
        self.inputs.get(object)
    }

    /// Sets or removes an object. Takes effect with the next [`Wiring::settle`].
    pub fn set(&self, object: &ObjectRef, value: Option<Sourced<Object>>) {
        let revised = is_revised(object.kind);
        let other = value.as_ref().filter(|_| revised).and_then(|value| {
            let revision = value.object.meta().label("istio.io/rev")?;
            let ours = *revision == self.settings.revision || self.revisions.contains(revision);
            (!ours).then(|| revision.clone())
        });
        let apart = other.as_ref().map(|revision| {
            let message = format!("left to the control plane of revision {revision}");
            vec![condition("Ignored", Truth::True, "OtherRevision", message)]
        });
        self.apart.set(object, apart.map(Conditions::new));
        self.inputs.set(object, value.filter(|_| other.is_none()));
    }

    /// Sets what came of fetching keys. Takes effect with the next [`Wiring::settle`].
    pub fn set_keys(&self, source: &KeySource, fetched: Option<Fetched>) {
        self.inputs.istio.keys.set(source, fetched);
    }

    /// Computes what the objects set since the last time change.
    pub fn settle(&mut self) {
        self.graph.settle();
    }
}

macro_rules! take {
    ($value:expr, $variant:ident) => {
        $value.and_then(|sourced| match sourced.object {
            Object::$variant(object) if sourced.faults.is_empty() => Some(object),
            _ => None,
        })
    };
    ($value:expr, $variant:ident, faulty) => {
        $value.and_then(|sourced| match sourced.object {
            Object::$variant(object) => Some(Sourced {
                object,
                faults: sourced.faults,
            }),
            _ => None,
        })
    };
}

mod gateway_api;
mod istio;
mod waypoints;

pub use gateway_api::Parents;
use istio::{Istio, Targets};

impl Inputs {
    fn new(graph: &Graph) -> Self {
        Self {
            namespaces: graph.source(),
            nodes: graph.source(),
            pods: graph.source(),
            services: graph.source(),
            slices: graph.source(),
            entries: graph.source(),
            workload_entries: graph.source(),
            gateways: graph.source(),
            classes: graph.source(),
            policies: graph.source(),
            peers: graph.source(),
            routes: graph.source(),
            backend_tls: graph.source(),
            backend_traffic: graph.source(),
            config_maps: graph.source(),
            istio: istio::Inputs::new(graph),
        }
    }

    fn get(&self, object: &ObjectRef) -> Option<Sourced<Object>> {
        let name = &object.name;
        let good = |object: Object| Sourced {
            object,
            faults: Vec::new(),
        };
        match object.kind {
            Kind::AuthorizationPolicy => self.policies.peek(name).map(|it| Sourced {
                object: Object::AuthorizationPolicy(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::PeerAuthentication => self.peers.peek(name).map(|it| Sourced {
                object: Object::PeerAuthentication(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::EndpointSlice => copy(&self.slices, name, Object::EndpointSlice).map(good),
            Kind::Gateway => copy(&self.gateways, name, Object::Gateway).map(good),
            Kind::GatewayClass => copy(&self.classes, &name.name, Object::GatewayClass).map(good),
            Kind::Namespace => copy(&self.namespaces, &name.name, Object::Namespace).map(good),
            Kind::Node => copy(&self.nodes, &name.name, Object::Node).map(good),
            Kind::Pod => copy(&self.pods, name, Object::Pod).map(good),
            Kind::Service => copy(&self.services, name, Object::Service).map(good),
            Kind::ServiceEntry => copy(&self.entries, name, Object::ServiceEntry).map(good),
            Kind::WorkloadEntry => {
                copy(&self.workload_entries, name, Object::WorkloadEntry).map(good)
            }
            Kind::GrpcRoute | Kind::HttpRoute | Kind::TcpRoute | Kind::TlsRoute => {
                self.routes.peek(object).map(|it| Sourced {
                    object: it.object.clone().into_object(),
                    faults: it.faults.clone(),
                })
            }
            Kind::BackendTlsPolicy => self.backend_tls.peek(name).map(|it| Sourced {
                object: Object::BackendTlsPolicy(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::BackendTrafficPolicy => {
                copy(&self.backend_traffic, name, Object::BackendTrafficPolicy).map(good)
            }
            Kind::ConfigMap => copy(&self.config_maps, name, Object::ConfigMap).map(good),
            Kind::Deployment | Kind::ReferenceGrant | Kind::ServiceAccount => None,
            _ => self.istio.get(object),
        }
    }

    fn set(&self, object: &ObjectRef, value: Option<Sourced<Object>>) {
        let name = &object.name;
        match object.kind {
            Kind::AuthorizationPolicy => self
                .policies
                .set(name, take!(value, AuthorizationPolicy, faulty)),
            Kind::PeerAuthentication => self
                .peers
                .set(name, take!(value, PeerAuthentication, faulty)),
            Kind::EndpointSlice => self.slices.set(name, take!(value, EndpointSlice)),
            Kind::Gateway => self.gateways.set(name, take!(value, Gateway)),
            Kind::GatewayClass => self.classes.set(&name.name, take!(value, GatewayClass)),
            Kind::Namespace => self.namespaces.set(&name.name, take!(value, Namespace)),
            Kind::Node => self.nodes.set(&name.name, take!(value, Node)),
            Kind::Pod => self.pods.set(name, take!(value, Pod)),
            Kind::Service => self.services.set(name, take!(value, Service)),
            Kind::ServiceEntry => self.entries.set(name, take!(value, ServiceEntry)),
            Kind::WorkloadEntry => self.workload_entries.set(name, take!(value, WorkloadEntry)),
            Kind::GrpcRoute | Kind::HttpRoute | Kind::TcpRoute | Kind::TlsRoute => {
                let route = value.and_then(|sourced| {
                    Some(Sourced {
                        object: RouteObject::of(sourced.object)?,
                        faults: sourced.faults,
                    })
                });
                self.routes.set(object, route);
            }
            Kind::BackendTlsPolicy => self
                .backend_tls
                .set(name, take!(value, BackendTlsPolicy, faulty)),
            Kind::BackendTrafficPolicy => self
                .backend_traffic
                .set(name, take!(value, BackendTrafficPolicy)),
            Kind::ConfigMap => self.config_maps.set(name, take!(value, ConfigMap)),
            Kind::Deployment | Kind::ReferenceGrant | Kind::ServiceAccount => {}
            _ => self.istio.set(object, value),
        }
    }
}

fn copy<K: Key, V: Data + Clone>(
    source: &Source<K, V>,
    key: &K,
    of: impl FnOnce(V) -> Object,
) -> Option<Object> {
    source.peek(key).map(|value| of((*value).clone()))
}

fn facts(graph: &mut Graph, settings: &Arc<Settings>, inputs: &Inputs, of_pods: OfPods) -> Facts {
    let system = settings.system_namespace.as_ref();
    let root = system.unwrap_or(&settings.root_namespace).clone();
    let configured = !settings.network.is_empty();
    let (network, _) = graph.derive(&inputs.namespaces, move |_, name, meta| {
        let label = meta.label("topology.istio.io/network");
        let network = label.filter(|_| *name == root && !configured);
        network
            .map(|network| ((), network.clone()))
            .into_iter()
            .collect()
    });
    let (classes, known, fallback) = (
        inputs.classes.clone(),
        network.clone(),
        settings.network.clone(),
    );
    let (waypoints, _) = graph.derive(&inputs.gateways, move |cx, name, gateway| {
        let class = cx.get(&classes, &gateway.spec.gateway_class_name.as_str().into());
        let network = cx
            .get(&known, &())
            .map_or_else(|| fallback.clone(), |network| (*network).clone());
        let waypoint = Waypoint::new(&network, gateway, class.as_deref());
        waypoint
            .map(|waypoint| (name.clone(), waypoint))
            .into_iter()
            .collect()
    });
    let classes = inputs.classes.clone();
    let (gateways, _) = graph.derive(&inputs.gateways, move |cx, name, gateway| {
        let class = cx.get(&classes, &gateway.spec.gateway_class_name.as_str().into());
        let found = NetworkGateway::new(gateway, class.as_deref());
        let keyed = found.map(|gateway| (name.clone(), gateway));
        keyed.into_iter().collect()
    });
    Facts {
        settings: settings.clone(),
        of_pods,
        namespaces: inputs.namespaces.clone(),
        network,
        waypoints,
        gateways_of_network: gateways.index(|_, gateway| vec![gateway.network.clone()]),
    }
}

/// The accounts that may read the mesh as waypoints: those of pods that a controller of ours deployed for one.
fn readers(graph: &mut Graph, inputs: &Inputs, facts: &Facts) -> Collection<Name, BTreeSet<Str>> {
    let of = |_: &Name, pod: &Pod| {
        waypoint::managed_instance_of(&pod.meta)
            .into_iter()
            .collect()
    };
    let instances = inputs.pods.index(of);
    let instances = graph.group(&instances);
    let waypoints = facts.waypoints.clone();
    let (readers, _) = graph.derive(&instances, move |cx, gateway, pods| {
        let living = pods.iter().filter(|pod| !pod.ended);
        let accounts: BTreeSet<Str> = living.map(|pod| pod.service_account.clone()).collect();
        let is_waypoint = cx.get(&waypoints, gateway).is_some();
        let made = (is_waypoint && !accounts.is_empty()).then_some((gateway.clone(), accounts));
        made.into_iter().collect()
    });
    readers
}

type Allocated = Collection<allocate::Host, Vec<IpAddr>>;

/// One computation for all entries: addresses must differ from each other.
fn allocations(graph: &mut Graph, inputs: &Inputs) -> Allocated {
    let all = inputs.entries.index(|_, _| vec![()]);
    let all = graph.group(&all);
    let (allocated, _) = graph.derive(&all, |_, (), entries| {
        allocate::allocate(entries).into_iter().collect()
    });
    allocated
}

fn offers(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
    allocated: &Allocated,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Collection<ObjectRef, Offer> {
    let known = facts.clone();
    let (of_services, counted) = graph.derive(&inputs.services, move |cx, name, service| {
        let bound = known.bind(cx, &service.meta, Traffic::Service);
        let namespace = known.namespace(cx, &name.namespace);
        let network = known.network(cx);
        let claim = service::of_service(
            &known.settings,
            &network,
            service,
            namespace.as_deref(),
            &bound,
        );
        let offer = Offer {
            served: Some(service::served(service)),
            claims: claim.into_iter().map(Arc::new).collect(),
            bound,
            visibility: None,
        };
        vec![(reference(Kind::Service, name), offer)]
    });
    runs.insert("services", counted);
    let (known, given) = (facts.clone(), allocated.clone());
    let (of_entries, counted) = graph.derive(&inputs.entries, move |cx, name, entry| {
        let visibility = known.visibility(cx, &name.namespace);
        let namespace = known.namespace(cx, &name.namespace);
        let (namespace, network) = (namespace.as_deref(), known.network(cx));
        let addresses = |host: &str| addresses(cx, &given, name, host);
        let wire = visibility.unwrap_or_default().wire();
        let bound = match wire {
            Some(_) => known.bind_entry(cx, &entry.meta, Traffic::Service),
            None => Bound::default(),
        };
        let claims = wire.map_or_else(Vec::new, |wire| {
            service::of_service_entry(&network, entry, namespace, &bound, wire, addresses)
        });
        let offer = Offer {
            claims: claims.into_iter().map(Arc::new).collect(),
            bound,
            served: None,
            visibility,
        };
        vec![(reference(Kind::ServiceEntry, name), offer)]
    });
    runs.insert("serviceentries", counted);
    graph.join(&[&of_services, &of_entries])
}

fn addresses(cx: &Context<'_>, allocated: &Allocated, name: &Name, host: &str) -> Vec<IpAddr> {
    let given = cx.get(allocated, &(name.clone(), host.into()));
    given
        .map(|addresses| (*addresses).clone())
        .unwrap_or_default()
}

fn reference(kind: Kind, name: &Name) -> ObjectRef {
    ObjectRef {
        kind,
        name: name.clone(),
    }
}

/// The claim that counts, per `namespace/hostname`.
fn winners(
    graph: &mut Graph,
    offers: &Collection<ObjectRef, Offer>,
) -> Collection<Str, Arc<Claim>> {
    let (claims, _) = graph.derive(offers, |_, _, offer| {
        let keyed = offer
            .claims
            .iter()
            .map(|claim| (claim.key(), claim.clone()));
        keyed
            .collect::<BTreeMap<ClaimKey, Arc<Claim>>>()
            .into_iter()
            .collect()
    });
    let by_service = claims.index(|_, claim| vec![claim.service_key()]);
    let rivals = graph.group(&by_service);
    let (winners, _) = graph.derive(&rivals, |_, key, claims| {
        let claims: Vec<Arc<Claim>> = claims.iter().map(|claim| (**claim).clone()).collect();
        let winner = service::winner(&claims);
        winner
            .map(|winner| (key.clone(), winner))
            .into_iter()
            .collect()
    });
    winners
}

fn joins(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
    winners: &Collection<Str, Arc<Claim>>,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Joins {
    let settings = facts.settings.clone();
    let (policies, counted) = graph.derive(&inputs.policies, move |_, name, policy| {
        vec![(name.clone(), policy::translate(&settings, policy))]
    });
    runs.insert("policies", counted);
    let whole = inputs.peers.index(|name, policy| {
        let is_whole = peer::selector(&policy.object).is_none();
        is_whole
            .then(|| name.namespace.clone())
            .into_iter()
            .collect()
    });
    let whole = graph.group(&whole);
    let (levels, _) = graph.derive(&whole, |_, namespace, policies| {
        let level = peer::level(policies);
        level
            .map(|level| (namespace.clone(), level))
            .into_iter()
            .collect()
    });
    let (settings, known) = (facts.settings.clone(), levels.clone());
    let (peers, _) = graph.derive(&inputs.peers, move |cx, name, policy| {
        let levels = levels_above(cx, &settings, &known, &name.namespace);
        vec![(name.clone(), peer::outcome(&settings, policy, &levels))]
    });
    let instances = inputs
        .pods
        .index(|_, pod| waypoint::instance_of(&pod.meta).into_iter().collect());
    let instances = graph.group(&instances);
    let waypoints = facts.waypoints.clone();
    let (accounts, _) = graph.derive(&instances, move |cx, gateway, pods| {
        if cx.get(&waypoints, gateway).is_none() {
            return Vec::new();
        }
        let accounts: BTreeSet<Str> = pods.iter().map(|pod| pod.service_account.clone()).collect();
        vec![(gateway.clone(), accounts)]
    });
    Joins {
        facts: facts.clone(),
        winners: winners.clone(),
        winners_of_namespace: winners.index(|_, claim| vec![claim.meta.name.namespace.clone()]),
        policies_of_namespace: policies.index(|name, _| vec![name.namespace.clone()]),
        peers_of_namespace: peers.index(|name, _| vec![name.namespace.clone()]),
        levels,
        accounts,
    }
}

type Levels = Vec<Option<Arc<peer::Level>>>;

/// The levels over a namespace's workloads, the nearest first.
fn levels_above(
    cx: &Context<'_>,
    settings: &Settings,
    levels: &Collection<Str, peer::Level>,
    namespace: &Str,
) -> Levels {
    let mut above = vec![cx.get(levels, namespace)];
    if *namespace != settings.root_namespace {
        above.push(cx.get(levels, &settings.root_namespace));
    }
    above
}

impl Joins {
    /// The services that select what has these labels.
    fn selecting(
        &self,
        cx: &Context<'_>,
        namespace: &Str,
        labels: &Arc<Labels>,
    ) -> Vec<Arc<Claim>> {
        let labels = labels.clone();
        let filter = move |claim: &Arc<Claim>| claim.selects(&labels);
        let found = cx.find_where(&self.winners_of_namespace, namespace, filter);
        found
            .into_iter()
            .map(|(_, claim)| (*claim).clone())
            .collect()
    }

    /// The policies that a workload must name, sorted.
    fn policies(
        &self,
        cx: &Context<'_>,
        namespace: &Str,
        labels: &Arc<Labels>,
        through: &[Name],
    ) -> Vec<Str> {
        let mut keys: BTreeSet<Str> = BTreeSet::new();
        let mut allowed = false;
        for policy in self.applying(cx, namespace, labels) {
            let authorization = policy.authorization.as_ref();
            allowed |= authorization.is_some_and(|a| a.action() == security::Action::Allow);
            if policy.selector.is_some() {
                keys.insert(policy.meta.name.to_string().into());
            }
        }
        keys.extend(self.peer_key(cx, namespace, labels));
        // Where only some may enter, the waypoint in front must be one of them (design 8.2).
        let known = |name: &&Name| cx.get(&self.accounts, name).is_some();
        for name in through.iter().filter(|_| allowed).filter(known) {
            keys.insert(format!("{}/{}", name.namespace, waypoint_policy_name(name)).into());
        }
        keys.into_iter().collect()
    }

    /// The policies in force that apply to what has these labels, by whichever scope.
    fn applying(
        &self,
        cx: &Context<'_>,
        namespace: &Str,
        labels: &Arc<Labels>,
    ) -> Vec<Arc<policy::Outcome>> {
        let root = &self.facts.settings.root_namespace;
        let homes: BTreeSet<&Str> = [namespace, root].into();
        let mut found = Vec::new();
        for home in homes {
            let labels = labels.clone();
            let filter = move |policy: &policy::Outcome| {
                let selector = policy.selector.as_ref();
                policy.authorization.is_some()
                    && selector.is_none_or(|s| crate::object::selects(s, &labels))
            };
            found.extend(cx.find_where(&self.policies_of_namespace, home, filter));
        }
        found.into_iter().map(|(_, policy)| policy).collect()
    }

    fn peer_key(&self, cx: &Context<'_>, namespace: &Str, labels: &Arc<Labels>) -> Option<Str> {
        let wanted = labels.clone();
        let filter = move |outcome: &peer::Outcome| {
            outcome
                .selector
                .as_ref()
                .is_some_and(|s| crate::object::selects(s, &wanted))
        };
        let found = cx.find_where(&self.peers_of_namespace, namespace, filter);
        let outcomes: Vec<_> = found.into_iter().map(|(_, outcome)| outcome).collect();
        match peer::oldest(&outcomes, labels) {
            Some(outcome) => outcome.key.clone(),
            None => {
                let settings = &self.facts.settings;
                peer::level_key(
                    settings,
                    &levels_above(cx, settings, &self.levels, namespace),
                )
            }
        }
    }
}

/// The waypoints that traffic to a workload may come through.
fn through(bound: &Bound, claims: &[Arc<Claim>]) -> Vec<Name> {
    let of_services = claims.iter().flat_map(|claim| &claim.waypoints);
    let all: BTreeSet<&Name> = bound.names.iter().chain(of_services).collect();
    all.into_iter().cloned().collect()
}

fn waypoint_policy_name(gateway: &Name) -> String {
    format!(
        "istio_allow_waypoint_{}_{}",
        gateway.namespace, gateway.name
    )
}

fn made(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Collection<ObjectRef, Made> {
    let (pods, counted) = pods(graph, inputs, joins);
    runs.insert("pods", counted);
    let of_entries = workload_entries(graph, inputs, joins);
    let inline = inline_endpoints(graph, inputs, joins);
    let bare = bare_endpoints(graph, inputs, joins);
    let gateways = network_gateways(graph, joins);
    graph.join(&[&pods, &of_entries, &inline, &bare, &gateways])
}

/// Gateways of other networks; where several describe one address, the first by name counts.
fn network_gateways(graph: &mut Graph, joins: &Joins) -> Collection<ObjectRef, Made> {
    let gateways = joins.facts.gateways_of_network.collection();
    let by_uid = gateways.index(|_, gateway| gateway.uids());
    let by_uid = graph.group(&by_uid);
    let settings = joins.facts.settings.clone();
    let (made, _) = graph.derive(&by_uid, move |_, uid, gateways| {
        let workload = gateways
            .first()
            .and_then(|gateway| gateway.workload(&settings, uid));
        let made = Made {
            served_by: Vec::new(),
            resources: workload.iter().map(shared_resource).collect(),
            conditions: Conditions::default(),
        };
        vec![(reference(Kind::Gateway, &Name::new("", uid.clone())), made)]
    });
    made
}

fn pods(graph: &mut Graph, inputs: &Inputs, joins: &Joins) -> (Collection<ObjectRef, Made>, Runs) {
    let by_pod = inputs.slices.index(|name, slice| {
        let pods = slice
            .endpoints
            .iter()
            .filter_map(|endpoint| endpoint.pod.as_ref());
        let names: BTreeSet<Name> = pods
            .map(|(pod, _)| Name::new(name.namespace.clone(), pod.clone()))
            .collect();
        names.into_iter().collect()
    });
    let (joins, nodes) = (joins.clone(), inputs.nodes.clone());
    let silence = Conditions::default();
    graph.derive(&inputs.pods, move |cx, name, pod| {
        let facts = &joins.facts;
        let (namespace, labels) = (&name.namespace, &pod.meta.labels);
        let selecting = joins.selecting(cx, namespace, labels);
        let adopting: Vec<_> = cx
            .find(&by_pod, name)
            .into_iter()
            .filter(|(_, slice)| {
                slice
                    .endpoints
                    .iter()
                    .any(|endpoint| workload::stands_for(endpoint, &pod.meta))
            })
            .filter_map(|(_, slice)| Some((selectorless(cx, &joins, &slice)?, slice)))
            .collect();
        let gateway =
            waypoint::instance_of(&pod.meta).and_then(|gateway| cx.get(&facts.waypoints, &gateway));
        let bound = match gateway {
            Some(_) => Bound::default(),
            None => facts.bind(cx, &pod.meta, Traffic::Workload),
        };
        let mut claims = selecting.clone();
        claims.extend(adopting.iter().map(|(claim, _)| claim.clone()));
        let object_namespace = facts.namespace(cx, namespace);
        let around = Surroundings {
            settings: &facts.settings,
            network: &facts.network(cx),
            namespace: object_namespace.as_deref(),
            services: workload::pod_services(pod, &selecting, &adopting),
            policies: joins.policies(cx, namespace, labels, &through(&bound, &claims)),
            bound: &bound,
        };
        let node = cx.get(&nodes, &pod.node);
        let tunnel = gateway.and_then(|gateway| gateway.binding);
        let mut outcome = workload::of_pod(pod, node.as_deref(), tunnel, around);
        let conditions = match facts.of_pods {
            OfPods::Speak => Conditions::new(std::mem::take(&mut outcome.conditions)),
            OfPods::KeepSilent => silence.clone(),
        };
        let made = Made {
            conditions,
            ..Made::of(outcome, bound)
        };
        vec![(reference(Kind::Pod, name), made)]
    })
}

/// The service of a slice, if it is one without a selector.
fn selectorless(cx: &Context<'_>, joins: &Joins, slice: &EndpointSlice) -> Option<Arc<Claim>> {
    service_of(cx, joins, slice).filter(|claim| claim.selector.is_none())
}

fn service_of(cx: &Context<'_>, joins: &Joins, slice: &EndpointSlice) -> Option<Arc<Claim>> {
    let namespace = &slice.meta.name.namespace;
    let hostname = joins
        .facts
        .settings
        .service_hostname(namespace, slice.service.as_ref()?);
    let winner = cx.get(&joins.winners, &format!("{namespace}/{hostname}").into())?;
    Some((*winner).clone()).filter(|claim| claim.kind == Kind::Service)
}

fn encoded(workloads: &[wire::Workload]) -> Vec<Arc<Resource>> {
    workloads.iter().map(shared_resource).collect()
}

fn shared_resource(workload: &wire::Workload) -> Arc<Resource> {
    Arc::new(workload_resource(workload))
}

impl Made {
    fn of(outcome: workload::Outcome, bound: Bound) -> Self {
        Self {
            served_by: bound.served_by,
            resources: outcome.workload.iter().map(shared_resource).collect(),
            conditions: Arc::new(outcome.conditions),
        }
    }
}

fn workload_entries(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
) -> Collection<ObjectRef, Made> {
    let joins = joins.clone();
    let (made, _) = graph.derive(&inputs.workload_entries, move |cx, name, entry| {
        let facts = &joins.facts;
        let labels = Arc::new(workload::entry_labels(entry));
        let claims = joins.selecting(cx, &name.namespace, &labels);
        let bound = facts.bind(cx, &entry.meta, Traffic::Workload);
        let around = Surroundings {
            settings: &facts.settings,
            network: &facts.network(cx),
            namespace: None,
            services: workload::entry_services(&entry.spec, &claims),
            policies: joins.policies(cx, &name.namespace, &labels, &through(&bound, &claims)),
            bound: &bound,
        };
        let mut outcome = workload::of_workload_entry(entry, around);
        if let Some(workload) = &mut outcome.workload {
            facts.through_gateway(cx, workload);
        }
        vec![(
            reference(Kind::WorkloadEntry, name),
            Made::of(outcome, bound),
        )]
    });
    made
}

fn inline_endpoints(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
) -> Collection<ObjectRef, Made> {
    let joins = joins.clone();
    let (made, _) = graph.derive(&inputs.entries, move |cx, name, entry| {
        let facts = &joins.facts;
        let won: Vec<Arc<Claim>> = won(cx, &joins.winners, entry)
            .into_values()
            .filter(|claim| claim.kind == Kind::ServiceEntry && claim.meta.name == *name)
            .collect();
        let bound = facts.bind_entry(cx, &entry.meta, Traffic::Workload);
        let around = Surroundings {
            settings: &facts.settings,
            network: &facts.network(cx),
            namespace: None,
            services: workload::Services::new(),
            policies: joins.policies(
                cx,
                &name.namespace,
                &entry.meta.labels,
                &through(&bound, &won),
            ),
            bound: &bound,
        };
        let mut workloads = workload::of_service_entry(entry, &won, &around);
        for workload in &mut workloads {
            facts.through_gateway(cx, workload);
        }
        let made = Made {
            served_by: bound.served_by,
            resources: encoded(&workloads),
            conditions: Conditions::default(),
        };
        vec![(reference(Kind::ServiceEntry, name), made)]
    });
    made
}

/// The claims that count for the hosts of an entry.
fn won(
    cx: &Context<'_>,
    winners: &Collection<Str, Arc<Claim>>,
    entry: &ServiceEntry,
) -> BTreeMap<Str, Arc<Claim>> {
    let namespace = &entry.meta.name.namespace;
    let winner = |host: &String| {
        let winner = cx.get(winners, &format!("{namespace}/{host}").into())?;
        Some((Str::from(host.as_str()), (*winner).clone()))
    };
    entry.spec.hosts.iter().filter_map(winner).collect()
}

fn bare_endpoints(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
) -> Collection<ObjectRef, Made> {
    let joins = joins.clone();
    let (made, _) = graph.derive(&inputs.slices, move |cx, name, slice| {
        let facts = &joins.facts;
        let claim = service_of(cx, &joins, slice);
        let network = facts.network(cx);
        let of_claim =
            |claim: Arc<Claim>| workload::of_slice(slice, &claim, &facts.settings, &network);
        let made = Made {
            served_by: Vec::new(),
            resources: encoded(&claim.map(of_claim).unwrap_or_default()),
            conditions: Conditions::default(),
        };
        vec![(reference(Kind::EndpointSlice, name), made)]
    });
    made
}

fn resources(
    graph: &mut Graph,
    joins: &Joins,
    made: &Collection<ObjectRef, Made>,
    inputs: &Inputs,
) -> Collection<ResourceKey, Resource> {
    let keyed = |resource: Resource| (resource.key(), resource);
    let (workloads, _) = graph.derive_shared(made, move |_, _, made| {
        let resources = made.resources.iter();
        let keyed = resources.map(|resource| (resource.key(), resource.clone()));
        keyed.collect::<BTreeMap<_, _>>().into_iter().collect()
    });
    let by_host = joins.winners.index(|_, claim| vec![claim.hostname.clone()]);
    let (services, _) = graph.derive(&joins.winners, move |cx, _, claim| {
        let same = cx.find(&by_host, &claim.hostname);
        let same: Vec<Arc<Claim>> = same
            .into_iter()
            .map(|(_, claim)| (*claim).clone())
            .collect();
        let service = wire::Service {
            canonical: service::is_canonical(claim, &same),
            ..claim.service.clone()
        };
        vec![keyed(service_resource(&service))]
    });
    let encode = move |policy: Option<&Authorization>| {
        policy.map(policy_resource).map(keyed).into_iter().collect()
    };
    let policies = joins.policies_of_namespace.collection();
    let (policies, _) = graph.derive(policies, move |_, _, outcome| {
        encode(outcome.authorization.as_ref())
    });
    let peers = joins.peers_of_namespace.collection();
    let (peers, _) = graph.derive(peers, move |_, _, outcome| {
        encode(outcome.authorization.as_ref())
    });
    let any_peer = inputs.peers.index(|_, _| vec![()]);
    let any_peer = graph.group(&any_peer);
    let settings = joins.facts.settings.clone();
    let (strict, _) = graph.derive(&any_peer, move |_, (), _| {
        encode(Some(&peer::static_strict(&settings)))
    });
    let settings = joins.facts.settings.clone();
    let (waypoints, _) = graph.derive(&joins.accounts, move |_, gateway, accounts| {
        let name = waypoint_policy_name(gateway);
        encode(Some(&policy::for_waypoint(
            &settings,
            &gateway.namespace,
            name,
            accounts,
        )))
    });
    graph.join(&[
        &workloads, &services, &policies, &peers, &strict, &waypoints,
    ])
}

fn conditions(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    offers: &Collection<ObjectRef, Offer>,
    made: &Collection<ObjectRef, Made>,
    allocated: &Allocated,
    istio: &Istio,
) -> Collection<ObjectRef, Conditions> {
    let (services, _) = graph.derive(offers, |_, object, offer| {
        let of_service = object.kind == Kind::Service;
        let said = offer
            .served
            .iter()
            .chain(&offer.bound.condition)
            .filter(|_| of_service);
        told(object.clone(), said.cloned().collect::<Vec<_>>())
    });
    let (winners, given, offers) = (joins.winners.clone(), allocated.clone(), offers.clone());
    let (entries, _) = graph.derive(&inputs.entries, move |cx, name, entry| {
        let object = reference(Kind::ServiceEntry, name);
        let Some(offer) = cx.get(&offers, &object) else {
            return Vec::new();
        };
        let won = won(cx, &winners, entry);
        let won = won
            .into_iter()
            .map(|(host, claim)| (host, claim.key()))
            .collect();
        let addresses = |host: &str| addresses(cx, &given, name, host);
        told(
            object,
            service::entry_conditions(entry, &offer.bound, offer.visibility, &won, addresses),
        )
    });
    let (made, _) = graph.derive(made, |_, object, made| {
        told(object.clone(), made.conditions.clone())
    });
    let policies = joins.policies_of_namespace.collection();
    let at_waypoints = istio.policies.clone();
    let (policies, _) = graph.derive(policies, move |cx, name, outcome| {
        let mut said = outcome.conditions.clone();
        let at_waypoints = cx.get(&at_waypoints, name);
        said.extend(at_waypoints.and_then(|outcome| outcome.condition.clone()));
        told(reference(Kind::AuthorizationPolicy, name), said)
    });
    let peers = joins.peers_of_namespace.collection();
    let (peers, _) = graph.derive(peers, |_, name, outcome| {
        told(
            reference(Kind::PeerAuthentication, name),
            outcome.conditions.clone(),
        )
    });
    graph.join(&[
        &services,
        &entries,
        &made,
        &policies,
        &peers,
        &istio.conditions,
    ])
}

/// Objects of which there is nothing to say have no entry, so that one object may be told of by one computation only.
fn told(object: ObjectRef, conditions: impl Into<Conditions>) -> Vec<(ObjectRef, Conditions)> {
    let conditions = conditions.into();
    match conditions.is_empty() {
        true => Vec::new(),
        false => vec![(object, conditions)],
    }
}

#[cfg(test)]
mod tests;
