//! What makes workloads.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proto::workload as wire;

use super::{Conditions, Inputs, Joins, Made, OfPods, joins::through, reference, services::won};
use crate::{
    graph::{Collection, Context, Graph, Runs},
    object::{EndpointSlice, Kind, Name, ObjectRef},
    output::Resource,
    translate::{
        service::Claim,
        waypoint::{self, Bound, Traffic},
        workload::{self, Surroundings},
        workload_resource,
    },
};

pub(super) fn made(
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
            served_by: Box::default(),
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
        if let Some(workload) = outcome
            .workload
            .as_mut()
            .filter(|_| facts.settings.has_others)
        {
            facts.through_gateway(cx, workload);
        }
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

fn encoded(workloads: &[wire::Workload]) -> Box<[Arc<Resource>]> {
    workloads.iter().map(shared_resource).collect()
}

fn shared_resource(workload: &wire::Workload) -> Arc<Resource> {
    Arc::new(workload_resource(workload))
}

impl Made {
    fn of(outcome: workload::Outcome, bound: Bound) -> Self {
        Self {
            served_by: bound.served_by.into(),
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
            served_by: bound.served_by.into(),
            resources: encoded(&workloads),
            conditions: Conditions::default(),
        };
        vec![(reference(Kind::ServiceEntry, name), made)]
    });
    made
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
            served_by: Box::default(),
            resources: encoded(&claim.map(of_claim).unwrap_or_default()),
            conditions: Conditions::default(),
        };
        vec![(reference(Kind::EndpointSlice, name), made)]
    });
    made
}
