//! The node's pods and all namespaces' labels, as the API server tells them. Pure: watch events in, what changed out.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{core::PartialObjectMeta, runtime::watcher::Event};

use super::facts::pod_facts;
use crate::facts::PodFacts;

type Labels = BTreeMap<String, String>;

/// What an event changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing that enrolment cares for.
    Nothing,
    /// Both lists are there, or one came anew: everything is to be looked at.
    Everything,
    /// These pods, by uid.
    Pods(Vec<String>),
    /// This pod no longer exists.
    Gone(String),
}

/// A copy of what the API server holds, bounded by the node's pods and the cluster's namespaces.
#[derive(Debug, Default)]
pub(super) struct World {
    pods: HashMap<String, PodFacts>,
    namespaces: HashMap<String, Labels>,
    pods_listed: bool,
    namespaces_listed: bool,
    /// A list in the middle of its coming: replaces what is held when it is whole.
    incoming_pods: HashMap<String, PodFacts>,
    incoming_namespaces: HashMap<String, Labels>,
}

impl World {
    pub(super) fn take_pod(&mut self, event: Event<Pod>) -> Change {
        match event {
            Event::Init => {
                self.incoming_pods.clear();
                Change::Nothing
            }
            Event::InitApply(pod) => {
                let facts = pod_facts(&pod);
                self.incoming_pods
                    .extend(facts.map(|facts| (facts.uid.clone(), facts)));
                Change::Nothing
            }
            Event::InitDone => {
                self.pods = std::mem::take(&mut self.incoming_pods);
                self.pods_listed = true;
                self.everything()
            }
            Event::Apply(pod) => match pod_facts(&pod) {
                Some(facts) => self.upsert(facts),
                None => Change::Nothing,
            },
            Event::Delete(pod) => match pod.metadata.uid {
                Some(uid) if self.pods.remove(&uid).is_some() => Change::Gone(uid),
                _ => Change::Nothing,
            },
        }
    }

    pub(super) fn take_namespace(&mut self, event: Event<PartialObjectMeta<Namespace>>) -> Change {
        match event {
            Event::Init => {
                self.incoming_namespaces.clear();
                Change::Nothing
            }
            Event::InitApply(namespace) => {
                self.incoming_namespaces.extend(named_labels(namespace));
                Change::Nothing
            }
            Event::InitDone => {
                self.namespaces = std::mem::take(&mut self.incoming_namespaces);
                self.namespaces_listed = true;
                self.everything()
            }
            Event::Apply(namespace) => match named_labels(namespace) {
                Some((name, labels)) => self.label(name, labels),
                None => Change::Nothing,
            },
            // Its pods went before it.
            Event::Delete(namespace) => {
                let name = namespace.metadata.name.unwrap_or_default();
                self.namespaces.remove(&name);
                Change::Nothing
            }
        }
    }

    /// Takes a pod that was asked for, because its event has not come yet.
    pub(super) fn upsert(&mut self, facts: PodFacts) -> Change {
        let uid = facts.uid.clone();
        if self.pods.get(&uid) == Some(&facts) {
            return Change::Nothing;
        }
        self.pods.insert(uid.clone(), facts);
        self.when_listed(Change::Pods(vec![uid]))
    }

    /// Takes a namespace's labels, as an event of its own or because a pod came before it.
    pub(super) fn label(&mut self, name: String, labels: Labels) -> Change {
        let before = self.namespaces.insert(name.clone(), labels);
        if before.as_ref() == self.namespaces.get(&name) {
            return Change::Nothing;
        }
        let inside = self.pods.values().filter(|pod| pod.namespace == name);
        let uids: Vec<_> = inside.map(|pod| pod.uid.clone()).collect();
        if uids.is_empty() {
            return Change::Nothing;
        }
        self.when_listed(Change::Pods(uids))
    }

    pub(super) fn listed(&self) -> bool {
        self.pods_listed && self.namespaces_listed
    }

    pub(super) fn uids(&self) -> BTreeSet<String> {
        self.pods.keys().cloned().collect()
    }

    /// The pod with its namespace's labels. A namespace that is not known counts as one without labels; the pod's
    /// facts change when it comes.
    pub(super) fn facts(&self, uid: &str) -> Option<PodFacts> {
        let pod = self.pods.get(uid)?;
        Some(PodFacts {
            namespace_labels: self
                .namespaces
                .get(&pod.namespace)
                .cloned()
                .unwrap_or_default(),
            ..pod.clone()
        })
    }

    pub(super) fn knows_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name)
    }

    /// The pod that bears the name now; `uid`, where the caller knows it, must be its own. One that is ending is not
    /// meant while there is another: a StatefulSet gives the name to the next pod at once.
    pub(super) fn named(
        &self,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
    ) -> Option<&PodFacts> {
        if let Some(uid) = uid {
            return self
                .pods
                .get(uid)
                .filter(|pod| pod.namespace == namespace && pod.name == name);
        }
        let named = self
            .pods
            .values()
            .filter(|pod| pod.namespace == namespace && pod.name == name);
        named.min_by_key(|pod| pod.terminating)
    }

    fn everything(&self) -> Change {
        self.when_listed(Change::Everything)
    }

    /// Before both lists are there, no pod can be judged.
    fn when_listed(&self, change: Change) -> Change {
        if self.listed() {
            change
        } else {
            Change::Nothing
        }
    }
}

fn named_labels(namespace: PartialObjectMeta<Namespace>) -> Option<(String, Labels)> {
    let metadata = namespace.metadata;
    Some((metadata.name?, metadata.labels.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(uid: &str, name: &str, extra: &serde_json::Value) -> Pod {
        let mut metadata = json!({ "name": name, "namespace": "shop", "uid": uid });
        if let (Some(metadata), Some(extra)) = (metadata.as_object_mut(), extra.as_object()) {
            metadata.extend(extra.clone());
        }
        let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": { "containers": [] } });
        serde_json::from_value(pod).expect("a pod")
    }

    fn namespace(name: &str, mode: &str) -> PartialObjectMeta<Namespace> {
        let object = json!({ "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": name, "labels": { "istio.io/dataplane-mode": mode } } });
        serde_json::from_value(object).expect("a namespace")
    }

    fn listed() -> World {
        let mut world = World::default();
        world.take_pod(Event::Init);
        world.take_pod(Event::InitApply(pod("1", "a", &json!({}))));
        assert_eq!(world.take_pod(Event::InitDone), Change::Nothing);
        world.take_namespace(Event::Init);
        world.take_namespace(Event::InitApply(namespace("shop", "ambient")));
        assert_eq!(world.take_namespace(Event::InitDone), Change::Everything);
        world
    }

    #[test]
    fn nothing_is_judged_before_both_lists_are_there() {
        let mut world = World::default();
        assert_eq!(
            world.take_pod(Event::Apply(pod("1", "a", &json!({})))),
            Change::Nothing
        );
        assert_eq!(
            world.take_namespace(Event::Apply(namespace("shop", "x"))),
            Change::Nothing
        );
        assert!(!world.listed());
    }

    #[test]
    fn a_change_that_enrolment_does_not_see_is_none() {
        let mut world = listed();
        let noisy = pod("1", "a", &json!({ "annotations": { "other": "1" } }));
        assert_eq!(world.take_pod(Event::Apply(noisy)), Change::Nothing);
        assert_eq!(
            world.take_namespace(Event::Apply(namespace("shop", "ambient"))),
            Change::Nothing
        );
    }

    #[test]
    fn a_namespaces_label_concerns_its_pods_alone() {
        let mut world = listed();
        let change = world.take_namespace(Event::Apply(namespace("shop", "none")));
        assert_eq!(change, Change::Pods(vec!["1".into()]));
        assert_eq!(
            world.take_namespace(Event::Apply(namespace("other", "ambient"))),
            Change::Nothing
        );
        let facts = world.facts("1").expect("known");
        assert_eq!(facts.namespace_labels["istio.io/dataplane-mode"], "none");
    }

    #[test]
    fn a_new_list_replaces_the_old_when_it_is_whole() {
        let mut world = listed();
        world.take_pod(Event::Init);
        world.take_pod(Event::InitApply(pod("2", "b", &json!({}))));
        assert!(
            world.facts("1").is_some(),
            "half a list says nothing of what is absent"
        );
        assert_eq!(world.take_pod(Event::InitDone), Change::Everything);
        assert_eq!(world.uids(), BTreeSet::from(["2".to_owned()]));
    }

    #[test]
    fn deletion_is_told_once() {
        let mut world = listed();
        assert_eq!(
            world.take_pod(Event::Delete(pod("1", "a", &json!({})))),
            Change::Gone("1".into())
        );
        assert_eq!(
            world.take_pod(Event::Delete(pod("1", "a", &json!({})))),
            Change::Nothing
        );
    }

    #[test]
    fn a_name_means_the_pod_that_is_not_ending() {
        let mut world = listed();
        let ending = json!({ "deletionTimestamp": "2026-01-01T00:00:00Z" });
        world.take_pod(Event::Apply(pod("1", "a", &ending)));
        assert_eq!(
            world.named("shop", "a", None).map(|pod| pod.uid.as_str()),
            Some("1")
        );
        world.take_pod(Event::Apply(pod("2", "a", &json!({}))));
        assert_eq!(
            world.named("shop", "a", None).map(|pod| pod.uid.as_str()),
            Some("2")
        );
        assert_eq!(
            world
                .named("shop", "a", Some("1"))
                .map(|pod| pod.uid.as_str()),
            Some("1")
        );
        assert_eq!(world.named("shop", "a", Some("3")), None);
        assert_eq!(world.named("bank", "a", Some("1")), None);
    }
}
