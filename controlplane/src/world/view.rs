//! Which objects this control plane looks at: those of namespaces that the discovery selectors choose, and of those the
//! ones that are not labelled with another control plane's revision. What is out of view is kept, so that it can come
//! into view when labels, selectors or tags change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use mesh::names::Str;

use crate::{
    gateway::names::REVISION,
    object::{Kind, Labels, ObjectRef},
    source::cluster::decode::Told,
    translate::waypoint::matches_selector,
};

/// Selectors of namespaces, ORed; none selects every namespace.
pub type Selectors = Arc<Vec<LabelSelector>>;

/// Whether a namespace is chosen. The root namespace always is: its policies are the whole mesh's.
pub fn selects(selectors: &[LabelSelector], root: &str, name: &str, labels: &Labels) -> bool {
    let chosen = |selector: &LabelSelector| matches_selector(selector, labels);
    selectors.is_empty() || name == root || selectors.iter().any(chosen)
}

/// The state behind the decision.
#[derive(Debug)]
pub(super) struct View {
    pub(super) selectors: Selectors,
    root: Str,
    namespaces: HashMap<Str, Arc<Labels>>,
    /// Objects of namespaces that are not chosen.
    aside: HashMap<Str, BTreeMap<ObjectRef, Told>>,
    /// Objects in view with a revision label, as they were told.
    labelled: BTreeMap<ObjectRef, Told>,
}

impl View {
    pub(super) fn new(selectors: Selectors, root: Str) -> Self {
        Self {
            selectors,
            root,
            namespaces: HashMap::new(),
            aside: HashMap::new(),
            labelled: BTreeMap::new(),
        }
    }

    /// Takes in a namespace's labels; `None`: it is no more. Answers with whether it is chosen now, if that changed.
    pub(super) fn namespace(&mut self, name: &Str, labels: Option<Arc<Labels>>) -> Option<bool> {
        let before = self.is_chosen(name);
        match labels {
            Some(labels) => self.namespaces.insert(name.clone(), labels),
            None => self.namespaces.remove(name),
        };
        let now = self.is_chosen(name);
        (now != before).then_some(now)
    }

    /// Takes in other selectors. Answers with the namespaces whose choice changed, and what it is now.
    pub(super) fn select(&mut self, selectors: Selectors) -> Vec<(Str, bool)> {
        let known: BTreeSet<Str> = self
            .namespaces
            .keys()
            .chain(self.aside.keys())
            .cloned()
            .collect();
        let before: Vec<bool> = known.iter().map(|name| self.is_chosen(name)).collect();
        self.selectors = selectors;
        let changed = known.into_iter().zip(before);
        let now = |(name, before): (Str, bool)| {
            let now = self.is_chosen(&name);
            (now != before).then_some((name, now))
        };
        changed.filter_map(now).collect()
    }

    fn is_chosen(&self, namespace: &Str) -> bool {
        match self.namespaces.get(namespace) {
            Some(labels) => selects(&self.selectors, &self.root, namespace, labels),
            None => self.selectors.is_empty() || *namespace == self.root,
        }
    }

    /// What of a told object is in view: itself, or that it is not.
    pub(super) fn admit(&mut self, told: Told) -> Told {
        let object = &told.object;
        if !object.kind.is_namespaced() || self.is_chosen(&object.name.namespace) {
            let is_labelled = told
                .value
                .as_ref()
                .is_some_and(|value| value.object.meta().label(REVISION).is_some());
            match is_labelled && is_revised(object.kind) {
                true => self.labelled.insert(object.clone(), told.clone()),
                false => self.labelled.remove(object),
            };
            return told;
        }
        let out = Told {
            object: object.clone(),
            value: None,
            report: None,
        };
        self.put_aside(told);
        out
    }

    /// Puts an object of a namespace that is not chosen aside.
    pub(super) fn put_aside(&mut self, told: Told) {
        self.labelled.remove(&told.object);
        let namespace = told.object.name.namespace.clone();
        let of_namespace = self.aside.entry(namespace).or_default();
        of_namespace.insert(told.object.clone(), told);
    }

    /// Forgets an object that is no more.
    pub(super) fn forget(&mut self, object: &ObjectRef) {
        self.labelled.remove(object);
        if let Some(of_namespace) = self.aside.get_mut(&object.name.namespace) {
            of_namespace.remove(object);
            if of_namespace.is_empty() {
                self.aside.remove(&object.name.namespace);
            }
        }
    }

    /// Everything that was put aside of a namespace.
    pub(super) fn take_aside(&mut self, namespace: &Str) -> Vec<Told> {
        let aside = self.aside.remove(namespace).unwrap_or_default();
        aside.into_values().collect()
    }

    /// An object in view that is labelled with a revision.
    pub(super) fn labelled_as(&self, object: &ObjectRef) -> Option<Told> {
        self.labelled.get(object).cloned()
    }

    /// Everything in view that is labelled with a revision.
    pub(super) fn labelled(&self) -> Vec<Told> {
        self.labelled.values().cloned().collect()
    }
}

/// Whether the revision label means something on this kind (control-plane.md 2).
pub(crate) fn is_revised(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::AuthorizationPolicy
            | Kind::DestinationRule
            | Kind::EnvoyFilter
            | Kind::PeerAuthentication
            | Kind::RequestAuthentication
            | Kind::Telemetry
            | Kind::VirtualService
            | Kind::WasmPlugin
            | Kind::ServiceEntry
            | Kind::WorkloadEntry
            | Kind::Gateway
            | Kind::GrpcRoute
            | Kind::HttpRoute
            | Kind::TcpRoute
            | Kind::TlsRoute
            | Kind::BackendTlsPolicy
            | Kind::BackendTrafficPolicy
    )
}
