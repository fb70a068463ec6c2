//! Tells a pod's enrolment where Istio does: in the annotation `ambient.istio.io/redirection`.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

use crate::{
    agent::{Enrolment, EnrolmentSink, PodRef, SinkError},
    facts::REDIRECTION_ANNOTATION,
};

/// Requests to the API server at once: a burst of enrolments is told in turns.
const REQUESTS: usize = 16;

/// How long a pod that leaves with the whole mesh waits for its annotation.
const LAST_WORD: Duration = Duration::from_secs(2);

/// Writes the annotation.
pub struct AnnotationSink {
    client: Client,
    turns: Semaphore,
    /// The mesh leaves the node.
    leaving: watch::Receiver<bool>,
}

impl AnnotationSink {
    /// With the agent's own account, which may patch `pods/status` and nothing else of a pod. Once `leaving` says so,
    /// telling is tried once and need not succeed: the account may be gone already, and pods must not wait for it.
    pub fn new(client: Client, leaving: watch::Receiver<bool>) -> Self {
        AnnotationSink {
            client,
            turns: Semaphore::new(REQUESTS),
            leaving,
        }
    }

    async fn patch(&self, pod: &PodRef, enrolment: &Enrolment) -> Result<(), kube::Error> {
        let value = match enrolment {
            Enrolment::Enabled => Some("enabled"),
            Enrolment::Pending { .. } => Some("pending"),
            Enrolment::None => None,
        };
        // The uid makes the API server refuse when another pod bears the name by now.
        let patch = json!({ "metadata": {
            "uid": pod.uid,
            "annotations": { REDIRECTION_ANNOTATION: value },
        } });
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let _turn = self.turns.acquire().await;
        let patched = pods
            .patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        patched.map(drop)
    }
}

impl EnrolmentSink for AnnotationSink {
    async fn set(&self, pod: &PodRef, enrolment: &Enrolment) -> Result<(), SinkError> {
        if *self.leaving.borrow() {
            let told = timeout(LAST_WORD, self.patch(pod, enrolment)).await;
            if !matches!(told, Ok(Ok(()))) {
                tracing::debug!(%pod, "a pod that leaves could not be annotated");
            }
            return Ok(());
        }
        match self.patch(pod, enrolment).await {
            Ok(()) => Ok(()),
            Err(kube::Error::Api(status)) if gone(status.code) => {
                tracing::debug!(%pod, code = status.code, "a pod to be annotated is gone");
                Ok(())
            }
            Err(source) => Err(SinkError {
                pod: pod.clone(),
                source: source.into(),
            }),
        }
    }
}

/// Not found; or found with another uid, which the API server calls a conflict, or a change of what cannot change.
fn gone(code: u16) -> bool {
    matches!(code, 404 | 409 | 422)
}
