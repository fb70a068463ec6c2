//! The API server's side of admission: the roots to trust our webhook by, and, once the API server has proven that it
//! reaches us, that nothing passes without us.

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::{
    api::admissionregistration::v1::ValidatingWebhookConfiguration as Configuration,
    apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{backoff::Backoff, leader::Leadership};
use crate::{
    ca::Current, gateway::names::REVISION, metrics::Metrics, validate::admission::ALWAYS_REJECT,
};

const MANAGER: &str = "leyline-webhook-controller";
const IGNORE: &str = "Ignore";
const FAIL: &str = "Fail";
/// The revision of objects and control planes that name none.
const DEFAULT: &str = "default";

/// The object with which the API server proves that it asks us.
const PROBE: &str = "leyline-webhook-probe";

/// Between tries of anything that does not work yet.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Keeps one configuration as it should be.
pub(crate) struct WebhookConfig {
    client: Client,
    authority: Arc<Current>,
    metrics: Arc<Metrics>,
    /// Where the probe would be.
    namespace: String,
    /// The configuration's name.
    name: String,
    /// The revision whose objects it is about; `None`: those of none.
    about: Option<String>,
    /// This control plane's revision.
    revision: String,
    state: Mutex<State>,
    changed: tokio::sync::Notify,
}

#[derive(Default)]
struct State {
    found: Option<Configuration>,
    /// The API server has asked us in this term.
    proven: bool,
}

/// What to do about a configuration.
#[derive(Debug, PartialEq)]
enum Step {
    Rest,
    /// Write these roots and this policy.
    Patch(Value),
    /// Ask for something that must be refused.
    Probe,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error("write the webhook configuration {0}")]
    Patch(String, #[source] kube::Error),
    #[error("try what admission says: {0}")]
    Probe(#[source] kube::Error),
    #[error("the API server does not ask our webhook yet")]
    NotAsked,
}

/// The names of the configurations that may be a revision's (control-plane.md 13), each with the revision that it is about.
pub(crate) fn names(namespace: &str, revision: &str) -> [(String, Option<String>); 2] {
    let own = match revision {
        DEFAULT => format!("istio-validator-{namespace}"),
        revision => format!("istio-validator-{revision}-{namespace}"),
    };
    [
        (own, Some(revision.to_owned())),
        ("istiod-default-validator".to_owned(), None),
    ]
}

/// Whether a configuration leads to this revision's control plane: the one for objects without a revision is whose label it
/// bears, so that it can be handed on.
fn is_of(found: &Configuration, revision: &str) -> bool {
    let label = found.labels().get(REVISION);
    label.map_or(DEFAULT, String::as_str) == revision
}

/// The next step, for what was found and the roots in force.
fn step(found: Option<&Configuration>, roots: &str, proven: bool) -> Step {
    let Some(found) = found else {
        return Step::Rest;
    };
    let ours = found
        .webhooks
        .iter()
        .flatten()
        .filter(|webhook| webhook.client_config.service.is_some());
    let mut patches = Vec::new();
    let mut all_fail = true;
    for webhook in ours {
        let trusted = webhook.client_config.ca_bundle.as_ref();
        let trusted = trusted.is_some_and(|bundle| bundle.0 == roots.as_bytes());
        let fails = webhook.failure_policy.as_deref() == Some(FAIL);
        all_fail &= fails;
        // One that fails already goes on: what others have proven, this replica need not.
        let policy = if fails || proven { FAIL } else { IGNORE };
        if !trusted || webhook.failure_policy.as_deref() != Some(policy) {
            let bundle = k8s_openapi::ByteString(roots.as_bytes().to_vec());
            patches.push(json!({
                "name": webhook.name,
                "failurePolicy": policy,
                "clientConfig": {"caBundle": bundle},
            }));
        }
    }
    match (patches.is_empty(), all_fail || proven) {
        (false, _) => Step::Patch(patch(&found.name_any(), found, patches)),
        (true, false) => Step::Probe,
        (true, true) => Step::Rest,
    }
}

/// Gives up what is ours in a configuration, its values staying as they are: else a chart that was rendered just before we
/// made the policy strict, and says the old one, is refused for a conflict. What it undoes is written again.
fn disown(found: &Configuration) -> Option<Value> {
    let owners = found.metadata.managed_fields.as_deref()?;
    let is_anothers = |it: &&ManagedFieldsEntry| it.manager.as_deref() != Some(MANAGER);
    let others: Vec<_> = owners.iter().filter(is_anothers).collect();
    // An empty list would change nothing.
    let some = !others.is_empty() && others.len() < owners.len();
    some.then(|| {
        json!({
            "metadata": {
                "name": found.name_any(),
                "resourceVersion": found.resource_version(),
                "managedFields": others,
            },
        })
    })
}

/// Lists are replaced whole by a merge: every webhook goes with it as it was found.
fn patch(name: &str, found: &Configuration, patches: Vec<Value>) -> Value {
    let mut webhooks = json!(found.webhooks);
    for webhook in webhooks.as_array_mut().into_iter().flatten() {
        let Some(patch) = patches
            .iter()
            .find(|patch| patch["name"] == webhook["name"])
        else {
            continue;
        };
        webhook["failurePolicy"] = patch["failurePolicy"].clone();
        webhook["clientConfig"]["caBundle"] = patch["clientConfig"]["caBundle"].clone();
    }
    // With the version that was read: what others change meanwhile is not undone.
    json!({
        "metadata": {"name": name, "resourceVersion": found.resource_version()},
        "webhooks": webhooks,
    })
}

impl WebhookConfig {
    pub(crate) fn new(
        client: Client,
        (authority, metrics): (Arc<Current>, Arc<Metrics>),
        namespace: &str,
        revision: &str,
        (name, about): (String, Option<String>),
    ) -> Self {
        Self {
            client,
            authority,
            metrics,
            namespace: namespace.to_owned(),
            name,
            about,
            revision: revision.to_owned(),
            state: Mutex::default(),
            changed: tokio::sync::Notify::new(),
        }
    }

    /// Keeps it right whenever this replica leads.
    pub(crate) async fn run(self, leadership: Leadership) {
        leadership
            .while_leading("webhook configuration", || self.lead())
            .await;
    }

    async fn lead(&self) {
        *self.state.lock() = State::default();
        tokio::join!(self.follow(), self.work());
    }

    fn api(&self) -> Api<Configuration> {
        Api::all(self.client.clone())
    }

    async fn follow(&self) {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        let mut events = watcher(self.api(), config).default_backoff().boxed();
        while let Some(event) = events.next().await {
            let found = match event {
                Ok(Event::Apply(found) | Event::InitApply(found)) => Some(found),
                Ok(Event::Delete(_)) => None,
                Ok(Event::Init | Event::InitDone) => continue,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(error, "a watch is interrupted");
                    continue;
                }
            };
            self.state.lock().found = found;
            self.changed.notify_one();
        }
    }

    async fn work(&self) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut roots = self.authority.changes();
        loop {
            let pause = match self.once().await {
                Ok(true) => {
                    backoff.reset();
                    None
                }
                // Something was done: what comes of it is seen by the watch, and if not, looked at again.
                Ok(false) => Some(FIRST_PAUSE),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(configuration = self.name, error, "not yet");
                    Some(backoff.next())
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                _ = roots.changed() => {}
                () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
            }
            // A configuration that others keep changing is not fought over without a pause.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Whether all is as it should be.
    async fn once(&self) -> Result<bool, StepError> {
        let roots = self.authority.load().roots_pem();
        let step = {
            let state = self.state.lock();
            let own = state.found.as_ref();
            let own = own.filter(|found| is_of(found, &self.revision));
            step(own, &roots, state.proven)
        };
        match step {
            Step::Rest => Ok(true),
            Step::Patch(patch) => {
                let mut written = self.write(&patch).await?;
                tracing::info!(configuration = self.name, "webhook configuration written");
                if let Some(patch) = disown(&written) {
                    written = self.write(&patch).await?;
                }
                self.state.lock().found = Some(written);
                Ok(false)
            }
            Step::Probe => {
                self.probe().await?;
                tracing::info!(configuration = self.name, "the API server asks our webhook");
                self.state.lock().proven = true;
                Ok(false)
            }
        }
    }

    async fn write(&self, patch: &Value) -> Result<Configuration, StepError> {
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let (api, patch) = (self.api(), Patch::Merge(patch));
        let written = api.patch(&self.name, &params, &patch).await;
        self.metrics.webhook_configured(written.as_ref().map(drop));
        written.map_err(|error| StepError::Patch(self.name.clone(), error))
    }

    /// Creates, as a dry run, what our webhook refuses. That it is refused proves the whole way.
    async fn probe(&self) -> Result<(), StepError> {
        let kind = GroupVersionKind::gvk("networking.istio.io", "v1", "ServiceEntry");
        let resource = ApiResource::from_gvk_with_plural(&kind, "serviceentries");
        let mut probe = DynamicObject::new(PROBE, &resource).within(&self.namespace);
        probe
            .annotations_mut()
            .insert(ALWAYS_REJECT.to_owned(), "true".to_owned());
        if let Some(revision) = &self.about {
            probe
                .labels_mut()
                .insert(REVISION.to_owned(), revision.clone());
        }
        probe.data = json!({"spec": {"hosts": ["probe.invalid"], "resolution": "STATIC"}});
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
        let params = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        match api.create(&params, &probe).await {
            Ok(_) => Err(StepError::NotAsked),
            Err(kube::Error::Api(status)) if status.message.contains(ALWAYS_REJECT) => Ok(()),
            Err(error) => Err(StepError::Probe(error)),
        }
    }
}
