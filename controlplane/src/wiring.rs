//! The mesh as derived collections: which facts each translation reads, and so what a change costs.
//!
//! Decisions are in `translate`; here is only what is fetched for them. The order below is the order of dependencies.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use mesh::names::Str;

use crate::{
    gateway::names::REVISION,
    graph::{Collection, Graph, Index, Runs, Source, Tap},
    object::{
        BackendTlsPolicy, BackendTrafficPolicy, ConfigMap, EndpointSlice, Gateway, GatewayClass,
        Kind, Meta, Name, Object, ObjectRef, PeerAuthentication, Pod, Policy, Service,
        ServiceEntry, Sourced, WorkloadEntry,
    },
    output::{Condition, Resource, ResourceKey, Truth},
    translate::{
        Settings, allocate, condition,
        l7::credential,
        l7::gateway_api::RouteObject,
        l7::istio::request_authentication::{Fetched, KeySource},
        network::NetworkGateway,
        peer, policy,
        remote::{ExportKey, Exported},
        service::Claim,
        visibility::Visibility,
        waypoint::{Bound, Waypoint},
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
    /// Changed accounts of those who may read for a Gateway.
    pub readers: Tap<Name, Readers>,
    /// Changed sources of keys that are to be fetched.
    pub key_sources: istio::KeySources,
    /// Changed Secrets that are to be read.
    pub secrets: Tap<Name, ()>,
    /// Changed addresses of ServiceEntries' hosts that have none of their own.
    pub allocated: Tap<allocate::Host, Vec<IpAddr>>,
    /// Of a cluster that others look at: what they are told, where it changed.
    pub exports: Tap<ExportKey, Exported>,
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
    /// Those of other control planes.
    gateways_elsewhere: Source<Name, Gateway>,
    classes: Source<Str, GatewayClass>,
    policies: Source<Name, Sourced<Policy>>,
    peers: Source<Name, Sourced<PeerAuthentication>>,
    routes: Source<ObjectRef, Sourced<RouteObject>>,
    backend_tls: Source<Name, Sourced<BackendTlsPolicy>>,
    backend_traffic: Source<Name, BackendTrafficPolicy>,
    config_maps: Source<Name, ConfigMap>,
    /// What other clusters tell.
    remotes: remote::Remotes,
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
    resources: Box<[Arc<Resource>]>,
    /// The waypoints that its traffic goes through.
    served_by: Box<[Name]>,
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
    /// Of all control planes: who deploys a waypoint does not matter to those whose traffic goes through it.
    waypoints: Collection<Name, Waypoint>,
    /// Gateways between networks that are run here, and the network behind each.
    east_west: Index<(), Name, Str>,
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

impl Wiring {
    /// A mesh without objects.
    pub fn new(settings: Settings, of_pods: OfPods) -> Self {
        let settings = Arc::new(settings);
        let mut graph = Graph::new();
        let inputs = Inputs::new(&graph);
        let apart = graph.source();
        let mut runs = BTreeMap::new();
        let facts = facts::facts(&mut graph, &settings, &inputs, of_pods);
        let allocated = services::allocations(&mut graph, &inputs);
        let offers = services::offers(&mut graph, &inputs, &facts, &allocated, &mut runs);
        let winners = services::winners(&mut graph, &offers);
        let joins = joins::joins(&mut graph, &inputs, &facts, &winners, &mut runs);
        let made = workloads::made(&mut graph, &inputs, &joins, &mut runs);
        let exports = remote::exports(&mut graph, &inputs, &joins, &made);
        let merged = remote::merged(&mut graph, &inputs, &joins, &made);
        let resources = outputs::resources(&mut graph, &joins, &made, &inputs, merged.additions);
        let targets = Targets::new(&inputs, &joins, &offers);
        let attached =
            gateway_api::Attachments::new(&mut graph, &inputs, &joins, &offers, &targets);
        let istio = istio::istio(&mut graph, &inputs, &joins, &targets, &attached);
        let routes = gateway_api::gateway_api(&mut graph, &inputs, &joins, &attached, &mut runs);
        let configs = waypoints::configs(&mut graph, &inputs, &facts, &routes.authorizers);
        let specified = graph.join(&[&configs, &routes.resources, &istio.resources]);
        let inner = east_west::Inner::new(&mut graph, &inputs, &joins);
        let (of_waypoints, of_backends) = waypoints::resources(
            &mut graph,
            &inputs,
            &joins,
            &made,
            (&specified, &inner),
            &routes.overlays,
            &mut runs,
        );
        let (of_rules, secrets) = istio::rule_conditions(&mut graph, &inputs, &facts, &of_backends);
        let mut served: Vec<_> = resources.iter().chain([&merged.resources]).collect();
        let of_gateways = inner.resources(&mut graph, &served);
        served.extend([&of_waypoints, &of_gateways]);
        if settings.is_remote {
            // Nobody asks a cluster that is only looked at for resources.
            served.clear();
        }
        let conditions = outputs::conditions(
            &mut graph, &inputs, &joins, &offers, &made, &allocated, &istio,
        );
        let all_conditions = graph.join(&[&conditions, &of_rules, &apart]);
        Self {
            resources: Tap::of(&served),
            conditions: all_conditions.tap(),
            parents: routes.parents.tap(),
            exports: exports.tap(),
            pods: inputs.pods.tap(),
            allocated: allocated.tap(),
            key_sources: istio.key_sources.tap(),
            secrets: secrets.tap(),
            readers: facts::readers(&mut graph, &inputs, &facts).tap(),
            graph,
            settings,
            inputs,
            apart,
            revisions: BTreeSet::new(),
            runs,
        }
    }

    /// A graph under other settings, with the same tags and fetched keys, and without objects yet: whoever has names of
    /// objects sets them, as [`Wiring::get`] knows them here.
    pub fn under(&self, settings: Settings, of_pods: OfPods) -> Self {
        let mut anew = Self::new(settings, of_pods);
        anew.revisions.clone_from(&self.revisions);
        for (source, fetched) in self.inputs.istio.keys.snapshot() {
            anew.set_keys(&source, Some((*fetched).clone()));
        }
        for (secret, found) in self.inputs.istio.credentials.snapshot() {
            anew.set_credential(&secret, Some((*found).clone()));
        }
        for (key, exported) in self.inputs.remotes.snapshot() {
            anew.inputs.remotes.set(&key, Some((*exported).clone()));
        }
        anew
    }

    /// Sets or removes what another cluster tells. Takes effect with the next [`Wiring::settle`].
    pub fn set_remote(&self, cluster: &Str, key: ExportKey, exported: Option<&Exported>) {
        let key = (cluster.clone(), key);
        self.inputs.remotes.set(&key, exported.cloned());
    }

    /// What is known of another cluster, by name.
    pub fn remote_keys(&self, cluster: &Str) -> BTreeSet<ExportKey> {
        let all = self.inputs.remotes.snapshot().into_keys();
        let of_cluster = all.filter(|(of, _)| of == cluster);
        of_cluster.map(|(_, key)| key).collect()
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
            let revision = value.object.meta().label(REVISION)?;
            let ours = *revision == self.settings.revision || self.revisions.contains(revision);
            (!ours).then(|| revision.clone())
        });
        let apart = other.as_ref().map(|revision| {
            let message = format!("left to the control plane of revision {revision}");
            vec![condition("Ignored", Truth::True, "OtherRevision", message)]
        });
        self.apart.set(object, apart.map(Conditions::new));
        self.inputs
            .set_elsewhere(object, value.as_ref().filter(|_| other.is_some()));
        self.inputs.set(object, value.filter(|_| other.is_none()));
    }

    /// Sets what came of fetching keys. Takes effect with the next [`Wiring::settle`].
    pub fn set_keys(&self, source: &KeySource, fetched: Option<Fetched>) {
        self.inputs.istio.keys.set(source, fetched);
    }

    /// Sets what came of reading a Secret. Takes effect with the next [`Wiring::settle`].
    pub fn set_credential(&self, secret: &Name, found: Option<credential::Found>) {
        self.inputs.istio.credentials.set(secret, found);
    }

    /// Whether something came of it, once it was asked for: a source of keys.
    pub fn has_keys(&self, source: &KeySource) -> bool {
        self.inputs.istio.keys.peek(source).is_some()
    }

    /// As [`Wiring::has_keys`], of a Secret.
    pub fn has_credential(&self, secret: &Name) -> bool {
        self.inputs.istio.credentials.peek(secret).is_some()
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

mod callers;
mod east_west;
mod facts;
mod gateway_api;
mod inputs;
mod istio;
mod joins;
mod outputs;
mod remote;
mod services;
mod waypoints;
mod workloads;

pub use facts::Readers;
pub use gateway_api::Parents;
use istio::Targets;

fn reference(kind: Kind, name: &Name) -> ObjectRef {
    ObjectRef {
        kind,
        name: name.clone(),
    }
}

#[cfg(test)]
mod tests;
