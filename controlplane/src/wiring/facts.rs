//! The facts that most computations read.

use std::{collections::BTreeSet, sync::Arc};

use mesh::names::Str;
use proto::workload as wire;

use super::{Facts, Inputs, OfPods};
use crate::{
    gateway::{class::is_east_west, names::NETWORK},
    graph::{Collection, Context, Graph},
    object::{Gateway, GatewayClass, Meta, Name, Pod},
    translate::{
        Settings,
        network::{self, NetworkGateway},
        visibility::Visibility,
        waypoint::{self, Bound, Traffic, User, Waypoint},
    },
};

impl Facts {
    pub(super) fn network(&self, cx: &Context<'_>) -> Str {
        cx.get(&self.network, &()).map_or_else(
            || self.settings.network.clone(),
            |network| (*network).clone(),
        )
    }

    pub(super) fn namespace(&self, cx: &Context<'_>, name: &Str) -> Option<Arc<Meta>> {
        cx.get(&self.namespaces, name)
    }

    pub(super) fn bind(&self, cx: &Context<'_>, object: &Meta, traffic: Traffic) -> Bound {
        self.bind_from(cx, object, traffic, false)
    }

    /// A ServiceEntry, which may be seen only from its own namespace.
    pub(super) fn bind_entry(&self, cx: &Context<'_>, entry: &Meta, traffic: Traffic) -> Bound {
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
    pub(super) fn visibility(&self, cx: &Context<'_>, namespace: &Str) -> Option<Visibility> {
        let rules = self.settings.entry_visibility.as_ref()?;
        let namespace = self.namespace(cx, namespace);
        let labels = namespace.map(|namespace| namespace.labels.clone());
        Some(rules.of(&labels.unwrap_or_default()))
    }

    /// Says how a workload of another network is reached.
    pub(super) fn through_gateway(&self, cx: &Context<'_>, workload: &mut wire::Workload) {
        if *workload.network != *self.network(cx) {
            let network = Str::from(workload.network.as_str());
            let gateways = cx.find(&self.gateways_of_network, &network);
            let gateways: Vec<_> = gateways.into_iter().map(|(_, gateway)| gateway).collect();
            workload.network_gateway = network::choose(&gateways, &workload.uid);
        }
    }
}

pub(super) fn facts(
    graph: &mut Graph,
    settings: &Arc<Settings>,
    inputs: &Inputs,
    of_pods: OfPods,
) -> Facts {
    let system = settings.system_namespace.as_ref();
    let root = system.unwrap_or(&settings.root_namespace).clone();
    let configured = !settings.network.is_empty();
    let (network, _) = graph.derive(&inputs.namespaces, move |_, name, meta| {
        let label = meta.label(NETWORK);
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
    let everyones = graph.join(&[&inputs.gateways, &inputs.gateways_elsewhere]);
    let (waypoints, _) = graph.derive(&everyones, move |cx, name, gateway| {
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
    let known_to = |graph: &mut Graph, gateways: &Collection<Name, Gateway>| {
        let facts = (inputs.classes.clone(), waypoints.clone(), network.clone());
        east_west(graph, gateways, facts, settings)
    };
    // Another control plane's is told by that one, and a way for everybody.
    let (told, of_east_west) = (
        known_to(graph, &inputs.gateways),
        known_to(graph, &everyones),
    );
    let classes = inputs.classes.clone();
    let (known, fallback) = (network.clone(), settings.network.clone());
    let (gateways, _) = graph.derive(&everyones, move |cx, name, gateway| {
        let class = cx.get(&classes, &gateway.spec.gateway_class_name.as_str().into());
        // Several networks behind one API server: one of this cluster is the way into a network that is not its own.
        let own = cx.get(&known, &());
        let own = own.as_ref().map_or(&fallback, |network| &**network);
        let beyond = cx.get(&of_east_west, name).filter(|it| **it != *own);
        let found = match beyond {
            Some(network) => NetworkGateway::east_west(gateway, class.as_deref(), &network),
            None => NetworkGateway::new(gateway, class.as_deref()),
        };
        let keyed = found.map(|gateway| (name.clone(), gateway));
        keyed.into_iter().collect()
    });
    let elsewhere = super::remote::gateways(graph, &inputs.remotes);
    let gateways = graph.join(&[&gateways, &elsewhere]);
    Facts {
        settings: settings.clone(),
        of_pods,
        namespaces: inputs.namespaces.clone(),
        network,
        waypoints,
        east_west: told.index(|_, _| vec![()]),
        gateways_of_network: gateways.index(|_, gateway| vec![gateway.network.clone()]),
    }
}

type OfGateways = (
    Collection<Str, GatewayClass>,
    Collection<Name, Waypoint>,
    Collection<(), Str>,
);

/// Those of the gateways that are between networks, and the network behind each: the label's, else the cluster's own.
fn east_west(
    graph: &mut Graph,
    gateways: &Collection<Name, Gateway>,
    (classes, waypoints, known): OfGateways,
    settings: &Settings,
) -> Collection<Name, Str> {
    let fallback = settings.network.clone();
    let (gateways, _) = graph.derive(gateways, move |cx, name, gateway| {
        let class_name = gateway.spec.gateway_class_name.as_str();
        let class = cx.get(&classes, &class_name.into());
        let controller = class.as_ref().map(|it| it.spec.controller_name.as_str());
        if !is_east_west(class_name, controller) || cx.get(&waypoints, name).is_none() {
            return Vec::new();
        }
        let label = gateway.meta.label(NETWORK).cloned();
        let own = || cx.get(&known, &()).map(|network| (*network).clone());
        let network = label.or_else(own).unwrap_or_else(|| fallback.clone());
        vec![(name.clone(), network)]
    });
    gateways
}

/// Who may read for a Gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readers {
    /// Accounts of the pods that a controller of ours deployed for it.
    pub accounts: BTreeSet<Str>,
    /// They get what is for the Gateway alone.
    pub confined: bool,
}

pub(super) fn readers(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
) -> Collection<Name, Readers> {
    let of = |_: &Name, pod: &Pod| {
        waypoint::managed_instance_of(&pod.meta)
            .into_iter()
            .collect()
    };
    let instances = inputs.pods.index(of);
    let instances = graph.group(&instances);
    let (waypoints, own) = (facts.waypoints.clone(), inputs.gateways.clone());
    let east_west = facts.east_west.collection().clone();
    let (readers, _) = graph.derive(&instances, move |cx, gateway, pods| {
        let living = pods.iter().filter(|pod| !pod.ended);
        let accounts: BTreeSet<Str> = living.map(|pod| pod.service_account.clone()).collect();
        // Another control plane's read from it.
        let is_waypoint = cx.get(&waypoints, gateway).is_some() && cx.get(&own, gateway).is_some();
        let readers = Readers {
            confined: cx.get(&east_west, gateway).is_some(),
            accounts,
        };
        let made = is_waypoint && !readers.accounts.is_empty();
        made.then_some((gateway.clone(), readers))
            .into_iter()
            .collect()
    });
    readers
}
