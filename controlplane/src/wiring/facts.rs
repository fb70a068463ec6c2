//! The facts that most computations read.

use std::{collections::BTreeSet, sync::Arc};

use mesh::names::Str;
use proto::workload as wire;

use super::{Facts, Inputs, OfPods};
use crate::{
    graph::{Collection, Context, Graph},
    object::{Meta, Name, Pod},
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
    let elsewhere = super::remote::gateways(graph, &inputs.remotes);
    let gateways = graph.join(&[&gateways, &elsewhere]);
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
pub(super) fn readers(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
) -> Collection<Name, BTreeSet<Str>> {
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
