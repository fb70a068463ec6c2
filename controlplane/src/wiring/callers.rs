//! Labels of those who call, where a waypoint's routes ask for them (VirtualService `sourceLabels`).

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use mesh::names::Str;

use super::{Inputs, waypoints::PerWaypoint};
use crate::{
    graph::{Collection, Data, Graph},
    object::{Labels, Name},
    translate::{Settings, l7::references, workload},
};

/// Pods are looked through in so many parts, so that one that changes has only its own part looked through again.
const PARTS: u64 = 256;

/// A waypoint, a workload, and what asks for its labels.
pub(super) type Asked = (Name, Str, Str);

/// A waypoint, the resource that asks, which labels, and where to look.
type Part = (Name, Str, Labels, u64);

/// The labels of the pods and WorkloadEntries that routes tell by them, wherever they are.
pub(super) fn labels(
    graph: &mut Graph,
    inputs: &Inputs,
    settings: &Arc<Settings>,
    specified: &PerWaypoint,
) -> Collection<Asked, Arc<Labels>> {
    let (parts, _) = graph.derive(specified, |_, (gateway, name), told| {
        let asked = references::labels_of_callers(told).into_iter();
        let parts = asked.flat_map(|labels| {
            (0..PARTS).map(move |part| ((gateway.clone(), name.clone(), labels.clone(), part), ()))
        });
        parts.collect()
    });
    let pods = Callers {
        settings: settings.clone(),
        labels: |pod: &crate::object::Pod| pod.meta.labels.clone(),
        uid: |settings, name| workload::pod_uid(settings, name).into(),
    };
    let entries = Callers {
        settings: settings.clone(),
        labels: |entry| Arc::new(workload::entry_labels(entry)),
        uid: |settings, name| workload::entry_uid(settings, name).into(),
    };
    let pods = pods.among(graph, &inputs.pods, &parts);
    let entries = entries.among(graph, &inputs.workload_entries, &parts);
    graph.join(&[&pods, &entries])
}

/// One kind of them.
struct Callers<V> {
    settings: Arc<Settings>,
    labels: fn(&V) -> Arc<Labels>,
    uid: fn(&Settings, &Name) -> Str,
}

impl<V: Data> Callers<V> {
    fn among(
        self,
        graph: &mut Graph,
        objects: &Collection<Name, V>,
        parts: &Collection<Part, ()>,
    ) -> Collection<Asked, Arc<Labels>> {
        let by_part = objects.index(|name, _| vec![part_of(name)]);
        let (found, _) = graph.derive(parts, move |cx, (gateway, asker, wanted, part), _| {
            let (of, wanted) = (self.labels, wanted.clone());
            let asker = Str::from(format!("{asker} {wanted:?}"));
            let fits = move |object: &V| has(&of(object), &wanted);
            let found = cx.find_where(&by_part, part, fits).into_iter();
            let told = |(name, object): (Name, Arc<V>)| {
                let uid = (self.uid)(&self.settings, &name);
                ((gateway.clone(), uid, asker.clone()), of(&object))
            };
            found.map(told).collect()
        });
        found
    }
}

fn has(labels: &BTreeMap<Str, Str>, wanted: &BTreeMap<Str, Str>) -> bool {
    let mut wanted = wanted.iter();
    wanted.all(|(name, value)| labels.get(name) == Some(value))
}

fn part_of(name: &Name) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish() % PARTS
}
