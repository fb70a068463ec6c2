//! The mesh's roots in every namespace, as ConfigMap `istio-ca-root-cert`: what pods are given to know us by; and the list of
//! revoked certificates as `istio-ca-crl`, where the makers of the authority have one.
//!
//! Namespaces and the ConfigMaps are watched; what is not as it should be (absent, edited by hand, of an older root) is
//! written, and nothing else is. Other keys of the ConfigMap are left alone.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use futures_util::{Stream, TryStreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;

use super::{
    Discovery, is_absent,
    leader::Leadership,
    queue::{Outcome, Pace, Queue},
};
use crate::ca::{Authority, Current};

/// The ConfigMap of the roots (control-plane.md 12).
pub(crate) const CONFIG_MAP: &str = "istio-ca-root-cert";

/// What is handed out: a text under one key of one ConfigMap.
#[derive(Clone, Copy)]
pub(crate) struct Handout {
    config_map: &'static str,
    key: &'static str,
    /// `None`: nothing is handed out now. What was before stays: revoked certificates stay revoked until an empty list says
    /// otherwise.
    text: fn(&Authority) -> Option<String>,
}

/// The roots.
pub(crate) const ROOTS: Handout = Handout {
    config_map: CONFIG_MAP,
    key: "root-cert.pem",
    text: |authority| Some(authority.roots_pem()),
};

/// Certificates that are taken back.
pub(crate) const REVOKED: Handout = Handout {
    config_map: "istio-ca-crl",
    key: "ca-crl.pem",
    text: |authority| authority.revoked_pem().map(|text| text.to_string()),
};
const LABEL: (&str, &str) = ("istio.io/config", "true");
const MANAGER: &str = "leyline-namespace-controller";

/// Namespaces without pods of users.
const LEFT_OUT: [&str; 3] = ["kube-public", "kube-node-lease", "local-path-storage"];

const PACE: Pace = Pace {
    parallel: 8,
    per_second: 50,
    burst: 50,
};

/// Hands out the roots, or what else is handed out with them.
pub(crate) struct Roots {
    handout: Handout,
    client: Client,
    authority: Arc<Current>,
    discovery: watch::Receiver<Discovery>,
    state: Mutex<State>,
    /// Every ConfigMap that there is has been seen.
    listed: watch::Sender<bool>,
    queue: Queue<String>,
}

#[derive(Default)]
struct State {
    /// Labels of the namespaces that are not on their way out.
    namespaces: HashMap<String, BTreeMap<String, String>>,
    /// Hash of what each namespace's ConfigMap says; `None`: not labelled as it should be.
    there: HashMap<String, Option<u64>>,
}

/// Where a write has failed, and why.
#[derive(Debug, thiserror::Error)]
#[error("write the ConfigMap {config_map} into namespace {namespace}: {source}")]
struct WriteError {
    config_map: &'static str,
    namespace: String,
    source: kube::Error,
}

impl Roots {
    pub(crate) fn new(
        handout: Handout,
        client: Client,
        authority: Arc<Current>,
        discovery: watch::Receiver<Discovery>,
    ) -> Self {
        Self {
            handout,
            client,
            authority,
            discovery,
            state: Mutex::default(),
            listed: watch::Sender::new(false),
            queue: Queue::new(),
        }
    }

    /// Keeps the ConfigMaps as they should be whenever this replica leads.
    pub(crate) async fn run(self, leadership: Leadership) {
        let name = self.handout.config_map;
        leadership.while_leading(name, || self.lead()).await;
    }

    async fn lead(&self) {
        // What an earlier term has seen is old.
        *self.state.lock() = State::default();
        self.listed.send_replace(false);
        tokio::join!(
            self.follow_namespaces(),
            self.follow_config_maps(),
            self.follow_settings(),
            self.work(),
        );
    }

    async fn follow_namespaces(&self) {
        let api: Api<PartialObjectMeta<Namespace>> = Api::all(self.client.clone());
        let events = watcher(api, watcher::Config::default()).default_backoff();
        follow(events, |event| match event {
            Event::Apply(found) | Event::InitApply(found) => self.see_namespace(found),
            Event::Delete(found) => {
                self.state.lock().namespaces.remove(&found.name_any());
            }
            // One that is gone by the end of the list is found to be gone when it is written into.
            Event::Init | Event::InitDone => {}
        })
        .await;
    }

    fn see_namespace(&self, found: &PartialObjectMeta<Namespace>) {
        let name = found.name_any();
        let mut state = self.state.lock();
        if found.metadata.deletion_timestamp.is_some() {
            state.namespaces.remove(&name);
            return;
        }
        let labels = found.labels().clone();
        state.namespaces.insert(name.clone(), labels);
        drop(state);
        self.queue.add(name);
    }

    async fn follow_config_maps(&self) {
        let api: Api<ConfigMap> = Api::all(self.client.clone());
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={}", self.handout.config_map));
        follow(watcher(api, config).default_backoff(), |event| {
            let mut state = self.state.lock();
            let namespace = match event {
                Event::Init => return state.there.clear(),
                Event::InitDone => {
                    drop(state);
                    self.listed.send_replace(true);
                    return self.look_at_all();
                }
                Event::Apply(found) | Event::InitApply(found) => {
                    let namespace = found.namespace().unwrap_or_default();
                    let print = self.handout.print_of(found);
                    state.there.insert(namespace.clone(), print);
                    namespace
                }
                Event::Delete(found) => {
                    let namespace = found.namespace().unwrap_or_default();
                    state.there.remove(&namespace);
                    namespace
                }
            };
            drop(state);
            self.queue.add(namespace);
        })
        .await;
    }

    /// Other roots, or other namespaces: everything is looked at again.
    async fn follow_settings(&self) {
        let (mut roots, mut discovery) = (self.authority.changes(), self.discovery.clone());
        let mut selectors_may_change = true;
        loop {
            tokio::select! {
                // Its sender is in the authority, which is held here.
                _ = roots.changed() => {}
                changed = discovery.changed(), if selectors_may_change => {
                    selectors_may_change = changed.is_ok();
                }
            }
            self.look_at_all();
        }
    }

    fn look_at_all(&self) {
        let names: Vec<String> = self.state.lock().namespaces.keys().cloned().collect();
        names.into_iter().for_each(|name| self.queue.add(name));
    }

    /// Writes once it is known what is there.
    async fn work(&self) {
        let mut listed = self.listed.subscribe();
        if listed.wait_for(|listed| *listed).await.is_ok() {
            self.queue
                .work(PACE, |namespace| self.write(namespace))
                .await;
        }
    }

    async fn write(&self, namespace: String) -> Outcome<WriteError> {
        let Handout {
            config_map, key, ..
        } = self.handout;
        let Some(text) = (self.handout.text)(&self.authority.load()) else {
            return Outcome::Done;
        };
        if !self.needs(&namespace, &text) {
            return Outcome::Done;
        }
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &namespace);
        let wanted = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": config_map, "labels": {LABEL.0: LABEL.1}},
            "data": {key: text},
        });
        // The name is ours by convention: what others have put under our key is not theirs to keep.
        let params = PatchParams::apply(MANAGER).force();
        match api.patch(config_map, &params, &Patch::Apply(&wanted)).await {
            Ok(written) => {
                let mut state = self.state.lock();
                state
                    .there
                    .insert(namespace, self.handout.print_of(&written));
                Outcome::Done
            }
            Err(kube::Error::Api(status)) if is_absent(&status) => Outcome::Done,
            Err(source) => Outcome::Failed(WriteError {
                config_map,
                namespace,
                source,
            }),
        }
    }

    fn needs(&self, namespace: &str, text: &str) -> bool {
        let state = self.state.lock();
        let Some(labels) = state.namespaces.get(namespace) else {
            return false;
        };
        let allowed =
            !LEFT_OUT.contains(&namespace) && (self.discovery.borrow())(namespace, labels);
        allowed && state.there.get(namespace) != Some(&Some(print(text)))
    }
}

/// Hands every event to `take`, forever; the stream itself waits between tries.
async fn follow<K>(
    events: impl Stream<Item = Result<Event<K>, watcher::Error>>,
    mut take: impl FnMut(&Event<K>),
) {
    let mut events = std::pin::pin!(events);
    loop {
        match events.try_next().await {
            Ok(Some(event)) => take(&event),
            Ok(None) => return,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(error, "a watch is interrupted");
            }
        }
    }
}

impl Handout {
    /// `None`: not labelled as it should be, or without the key.
    fn print_of(&self, found: &ConfigMap) -> Option<u64> {
        let labelled = found
            .labels()
            .get(LABEL.0)
            .is_some_and(|value| value == LABEL.1);
        let text = found.data.as_ref()?.get(self.key)?;
        labelled.then(|| print(text))
    }
}

fn print(text: &str) -> u64 {
    twox_hash::XxHash64::oneshot(0, text.as_bytes())
}
