//! Between clusters: what this one tells others of, and what it makes of what others tell.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh::names::Str;
use prost::Message as _;
use proto::workload as wire;

use super::{Facts, Inputs, Joins, Made};
use crate::{
    graph::{Collection, Context, Graph, Index, Source},
    object::{Kind, Name, ObjectRef},
    output::{Resource, ResourceKey},
    translate::{
        network::NetworkGateway,
        remote::{self, Beyond, ExportKey, Exported},
        scope::{self, Scope},
        service::Claim,
        service_resource, workload_resource,
    },
};

/// Whose, and what of it.
pub(super) type RemoteKey = (Str, ExportKey);

/// What other clusters tell.
pub(super) type Remotes = Source<RemoteKey, Exported>;

/// What other clusters tell, sorted out.
#[derive(Clone)]
pub(super) struct Others {
    /// Services by their names.
    by_key: Index<Str, RemoteKey, Arc<wire::Service>>,
    workloads: Collection<RemoteKey, Arc<wire::Workload>>,
}

/// A network and a service there.
type BeyondKey = (Str, Str);

impl Others {
    pub(super) fn new(graph: &mut Graph, remotes: &Remotes) -> Self {
        let (services, _) = graph.derive(remotes, |_, key, exported| match &**exported {
            Exported::Service(service) => vec![(key.clone(), service.clone())],
            _ => Vec::new(),
        });
        let (workloads, _) = graph.derive(remotes, |_, key, exported| match &**exported {
            Exported::Workload(workload) => vec![(key.clone(), workload.clone())],
            _ => Vec::new(),
        });
        Self {
            by_key: services.index(|_, service| vec![key_of(service)]),
            workloads,
        }
    }
}

fn key_of(service: &wire::Service) -> Str {
    format!("{}/{}", service.namespace, service.hostname).into()
}

/// Gateways of other clusters, beside those that Gateways of this cluster describe. Their keys cannot be of objects here.
pub(super) fn gateways(graph: &mut Graph, remotes: &Remotes) -> Collection<Name, NetworkGateway> {
    let (found, _) = graph.derive(remotes, |_, (cluster, _), exported| match &**exported {
        Exported::Gateway(gateway) => {
            let namespace = format!("{cluster}//{}", gateway.name.namespace);
            let key = Name::new(namespace, gateway.name.name.clone());
            vec![(key, gateway.clone())]
        }
        _ => Vec::new(),
    });
    found
}

impl Facts {
    /// From where a Kubernetes Service is seen; a ServiceEntry's host is of its own cluster.
    pub(super) fn scope(&self, cx: &Context<'_>, claim: &Claim) -> Scope {
        if claim.kind != Kind::Service {
            return Scope::Local;
        }
        let namespace = self.namespace(cx, &claim.meta.name.namespace);
        let of_namespace = namespace.map(|it| it.labels.clone()).unwrap_or_default();
        let rules = self.settings.service_scopes.as_deref();
        scope::scope(rules, &claim.meta.labels, &of_namespace)
    }
}

/// Of a cluster that others look at: what they are told.
pub(super) fn exports(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    made: &Collection<ObjectRef, Made>,
) -> Collection<ExportKey, Exported> {
    if !joins.facts.settings.is_remote {
        return graph.source().clone();
    }
    let facts = joins.facts.clone();
    let (services, _) = graph.derive(&joins.winners, move |cx, key, claim| {
        match facts.scope(cx, claim) {
            Scope::Global => {
                let service = wire::Service {
                    canonical: true,
                    ..claim.service.clone()
                };
                vec![(
                    ExportKey::Service(key.clone()),
                    Exported::Service(Arc::new(service)),
                )]
            }
            Scope::Local => Vec::new(),
        }
    });
    let global = services.clone();
    let (workloads, _) = graph.derive(made, move |cx, _, made| {
        let is_global = |key: &str| cx.get(&global, &ExportKey::Service(key.into())).is_some();
        let told = |resource: &Arc<Resource>| {
            let workload = remote::exported_workload(decoded(resource)?, is_global)?;
            let key = ExportKey::Workload(workload.uid.as_str().into());
            Some((key, Exported::Workload(Arc::new(workload))))
        };
        let told = made.resources.iter().filter_map(told);
        told.collect::<BTreeMap<_, _>>().into_iter().collect()
    });
    let (facts, classes) = (joins.facts.clone(), inputs.classes.clone());
    // Whichever control plane there deploys it: it is the way in.
    let everyones = graph.join(&[&inputs.gateways, &inputs.gateways_elsewhere]);
    let (gateways, _) = graph.derive(&everyones, move |cx, name, gateway| {
        let class = cx.get(&classes, &gateway.spec.gateway_class_name.as_str().into());
        let network = facts.network(cx);
        let found = NetworkGateway::east_west(gateway, class.as_deref(), &network);
        let keyed = |gateway| {
            let key = ExportKey::Gateway(name.to_string().into());
            (key, Exported::Gateway(gateway))
        };
        found.map(keyed).into_iter().collect()
    });
    graph.join(&[&services, &workloads, &gateways])
}

pub(super) fn decoded(resource: &Resource) -> Option<wire::Workload> {
    let address = wire::Address::decode(resource.body.clone()).ok()?;
    match address.r#type? {
        wire::address::Type::Workload(workload) => Some(workload),
        wire::address::Type::Service(_) => None,
    }
}

/// What proxies are told of other clusters.
pub(super) struct Merged {
    /// Services that only other clusters have, and workloads.
    pub(super) resources: Collection<ResourceKey, Resource>,
    /// What is added to services of this cluster.
    pub(super) additions: Additions,
}

/// What is added to services of this cluster.
#[derive(Clone)]
pub(super) struct Additions {
    facts: Facts,
    others: Others,
    beyond_of: Index<Str, BeyondKey, Beyond>,
    /// Who the endpoints are that this cluster has in other networks, by service and workload.
    own_beyond: Index<Str, (Str, Str), String>,
}

impl Additions {
    /// The service as proxies are told of it, over all clusters.
    pub(super) fn merge(
        &self,
        cx: &Context<'_>,
        claim: &Claim,
        service: wire::Service,
    ) -> wire::Service {
        // A cluster that is alone keeps no account of what each service might become.
        if !self.facts.settings.has_others || self.facts.scope(cx, claim) == Scope::Local {
            return service;
        }
        self.over(cx, &claim.service_key(), Some(&service))
            .unwrap_or(service)
    }

    fn over(
        &self,
        cx: &Context<'_>,
        key: &Str,
        own: Option<&wire::Service>,
    ) -> Option<wire::Service> {
        let others = cx.find(&self.others.by_key, key);
        let others: Vec<Arc<wire::Service>> =
            others.into_iter().map(|(_, it)| (*it).clone()).collect();
        let beyond = cx.find(&self.beyond_of, key);
        let mut identities: BTreeSet<String> = beyond
            .iter()
            .flat_map(|(_, it)| it.identities.iter().cloned())
            .collect();
        let own_beyond = cx.find(&self.own_beyond, key);
        identities.extend(own_beyond.into_iter().map(|(_, it)| String::clone(&it)));
        remote::merged(own, &others, &identities)
    }
}

/// The identities behind a gateway are not seen in the records of the gateway's clients: the service tells them.
fn own_beyond(
    graph: &mut Graph,
    joins: &Joins,
    made: &Collection<ObjectRef, Made>,
) -> Index<Str, (Str, Str), String> {
    let facts = joins.facts.clone();
    // A cluster that is alone keeps no account of what each pod might become.
    if !facts.settings.has_others {
        let nobody: Collection<(Str, Str), String> = graph.source().clone();
        return nobody.index(|(service, _), _| vec![service.clone()]);
    }
    let (identities, _) = graph.derive(made, move |cx, _, made| {
        let own = facts.network(cx);
        // An address that is found by begins with its network.
        let is_beyond = |it: &&Arc<Resource>| {
            let mut addresses = it.aliases.iter().filter_map(|it| it.split_once('/'));
            addresses.any(|(network, _)| *network != *own)
        };
        let mut found = BTreeMap::<(Str, Str), String>::new();
        let workloads = made.resources.iter();
        for workload in workloads.filter(is_beyond).filter_map(|it| decoded(it)) {
            let identity = remote::identity(&workload);
            for service in workload.services.keys() {
                let key = (service.as_str().into(), workload.uid.as_str().into());
                found.insert(key, identity.clone());
            }
        }
        found.into_iter().collect()
    });
    identities.index(|(service, _), _| vec![service.clone()])
}

pub(super) fn merged(
    graph: &mut Graph,
    inputs: &Inputs,
    joins: &Joins,
    made: &Collection<ObjectRef, Made>,
) -> Merged {
    let others = Others::new(graph, &inputs.remotes);
    let admitted = admitted(graph, joins, &others);
    let (near, far) = workloads(graph, joins, &others, &admitted);
    let by_service = far.index(|_, workload| {
        let network = Str::from(workload.network.as_str());
        let services = workload.services.keys();
        services
            .map(|key| (network.clone(), key.as_str().into()))
            .collect()
    });
    let grouped = graph.group(&by_service);
    let (beyond, _) = graph.derive(&grouped, |_, key: &BeyondKey, workloads| {
        let workloads: Vec<_> = workloads.iter().map(|it| (**it).clone()).collect();
        vec![(key.clone(), remote::beyond(&key.1, &workloads))]
    });
    let gateways = joins.facts.gateways_of_network.clone();
    let (horizon, _) = graph.derive(&beyond, move |cx, (network, service), beyond| {
        let gateways = cx.find(&gateways, network);
        let gateways: Vec<_> = gateways.into_iter().map(|(_, it)| it).collect();
        let stand_ins = remote::split_horizon(network, service, beyond, &gateways);
        stand_ins.iter().map(workload_resource).map(keyed).collect()
    });
    let additions = Additions {
        facts: joins.facts.clone(),
        others: others.clone(),
        beyond_of: beyond.index(|(_, service), _| vec![service.clone()]),
        own_beyond: own_beyond(graph, joins, made),
    };
    let services = strangers(graph, joins, &others, &additions);
    Merged {
        resources: graph.join(&[&services, &near, &horizon]),
        additions,
    }
}

fn keyed(resource: Resource) -> (ResourceKey, Resource) {
    (resource.key(), resource)
}

/// The services of other clusters whose workloads may be used here: not those that this cluster has for itself.
fn admitted(graph: &mut Graph, joins: &Joins, others: &Others) -> Collection<Str, ()> {
    let grouped = graph.group(&others.by_key);
    let (winners, facts) = (joins.winners.clone(), joins.facts.clone());
    let (admitted, _) = graph.derive(&grouped, move |cx, key, _| {
        let own = cx.get(&winners, key);
        let is_ours_alone = own.is_some_and(|own| facts.scope(cx, &own) == Scope::Local);
        match is_ours_alone {
            true => Vec::new(),
            false => vec![(key.clone(), ())],
        }
    });
    admitted
}

/// Workloads of this cluster's network as proxies are told of them, and those of other networks.
fn workloads(
    graph: &mut Graph,
    joins: &Joins,
    others: &Others,
    admitted: &Collection<Str, ()>,
) -> (
    Collection<ResourceKey, Resource>,
    Collection<RemoteKey, Arc<wire::Workload>>,
) {
    let (facts, admitted) = (joins.facts.clone(), admitted.clone());
    let (usable, _) = graph.derive(&others.workloads, move |cx, key, workload| {
        let is_admitted = |service: &str| cx.get(&admitted, &service.into()).is_some();
        let workload = remote::exported_workload((***workload).clone(), is_admitted);
        let is_near = |it: &wire::Workload| *it.network == *facts.network(cx);
        let sorted = workload.map(|it| (key.clone(), (is_near(&it), Arc::new(it))));
        sorted.into_iter().collect()
    });
    let (near, _) = graph.derive(&usable, |_, _, sorted| match &**sorted {
        (true, workload) => vec![keyed(workload_resource(workload))],
        (false, _) => Vec::new(),
    });
    let (far, _) = graph.derive(&usable, |_, key, sorted| match &**sorted {
        (true, _) => Vec::new(),
        (false, workload) => vec![(key.clone(), workload.clone())],
    });
    (near, far)
}

/// Services that this cluster does not have.
fn strangers(
    graph: &mut Graph,
    joins: &Joins,
    others: &Others,
    additions: &Additions,
) -> Collection<ResourceKey, Resource> {
    let grouped = graph.group(&others.by_key);
    let (winners, additions) = (joins.winners.clone(), additions.clone());
    let (strangers, _) = graph.derive(&grouped, move |cx, key, _| {
        if cx.get(&winners, key).is_some() {
            return Vec::new();
        }
        let service = additions.over(cx, key, None);
        service
            .map(|service| keyed(service_resource(&service)))
            .into_iter()
            .collect()
    });
    strangers
}
