//! Decides about a sandbox that is being made: does its pod take part, and is it enrolled?
//!
//! The watch knows the pod, or will in a moment: it is waited for, and then asked for. A pod that takes part may start
//! when its namespace is redirected and a tunnel has acknowledged it; one of whom nothing can be learnt may not.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, Client, core::PartialObjectMeta};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

use super::{facts::pod_facts, source::Known};
use crate::{
    agent::Admission,
    enrol::Standing,
    facts::{PodFacts, Wanted},
    plugin_server::{Gatekeeper, Refusal, SandboxRequest},
    sandboxes::Sandbox,
    telemetry::Telemetry,
    zds_server::chain,
};

/// How long the watch may lag before the API server is asked. It is some milliseconds behind as a rule.
const LAG: Duration = Duration::from_millis(500);
/// Less than the plugin waits (10 s), so that it hears why.
const DECIDE_WITHIN: Duration = Duration::from_secs(9);

pub(super) struct Gate {
    pub(super) client: Client,
    pub(super) node: String,
    pub(super) known: Known,
    pub(super) admissions: mpsc::Sender<Admission>,
    /// The mesh leaves the node: every pod passes.
    pub(super) leaving: watch::Receiver<bool>,
    pub(super) telemetry: Telemetry,
}

impl Gatekeeper for Gate {
    async fn admit(&self, sandbox: SandboxRequest) -> Result<(), Refusal> {
        let deadline = Instant::now() + DECIDE_WITHIN;
        let mut leaving = self.leaving.clone();
        tokio::select! {
            decided = self.decide(&sandbox, deadline) => decided,
            _ = leaving.wait_for(|leaving| *leaving) => Ok(()),
        }
    }

    fn answered(&self, status: u16, took: Duration) {
        self.telemetry.plugin_answered(status, took);
    }
}

impl Gate {
    async fn decide(&self, sandbox: &SandboxRequest, deadline: Instant) -> Result<(), Refusal> {
        let found = timeout_at(deadline, self.find(sandbox)).await;
        let late = |_| not_yet("the API server did not answer in time");
        let pod = found.map_err(late)??;
        if pod.host_network || self.known.policy.wanted(&pod) != Wanted::In {
            return Ok(());
        }
        let uid = pod.uid.clone();
        let placed = self.place(&uid, sandbox).await?;
        let netns = placed.netns_id();
        let standing = self.order(pod, placed).await?;
        enrolled(standing, netns, deadline).await
    }

    /// The pod, from the watch or, when that lags, from the API server.
    async fn find(&self, sandbox: &SandboxRequest) -> Result<PodFacts, Refusal> {
        match tokio::time::timeout(LAG, self.watched(sandbox)).await {
            Ok(pod) => Ok(pod),
            Err(_) => self.asked(sandbox).await,
        }
    }

    async fn watched(&self, sandbox: &SandboxRequest) -> PodFacts {
        let mut events = self.known.events.subscribe();
        loop {
            events.mark_unchanged();
            let (namespace, name) = (&sandbox.pod_namespace, &sandbox.pod_name);
            let uid = sandbox.pod_uid.as_deref();
            let known = self.known.with_world(|world| {
                let uid = world.named(namespace, name, uid)?.uid.clone();
                world
                    .knows_namespace(namespace)
                    .then(|| world.facts(&uid))?
            });
            if let Some(pod) = known {
                return pod;
            }
            // The sender lives as long as we do.
            let _ = events.changed().await;
        }
    }

    async fn asked(&self, sandbox: &SandboxRequest) -> Result<PodFacts, Refusal> {
        let failed = |error: kube::Error| not_yet(&format!("ask for the pod: {}", chain(&error)));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &sandbox.pod_namespace);
        let pod = pods.get(&sandbox.pod_name).await.map_err(failed)?;
        let facts = pod_facts(&pod).ok_or_else(|| not_yet("the pod has no uid"))?;
        let meant = sandbox.pod_uid.as_ref().is_none_or(|uid| *uid == facts.uid);
        if !meant || facts.node != self.node {
            return Err(not_yet("another pod bears the name by now"));
        }
        let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all(self.client.clone());
        let namespace = namespaces.get(&facts.namespace).await.map_err(failed)?;
        Ok(PodFacts {
            namespace_labels: namespace.metadata.labels.unwrap_or_default(),
            ..facts
        })
    }

    async fn place(&self, uid: &str, sandbox: &SandboxRequest) -> Result<Sandbox, Refusal> {
        let (sandboxes, uid) = (self.known.sandboxes.clone(), uid.to_owned());
        let (path, ips) = (sandbox.netns.clone(), sandbox.ips());
        let admitted = tokio::task::spawn_blocking(move || {
            let admitted = sandboxes.admit(&uid, &path, ips);
            sandboxes.save();
            admitted
        });
        match admitted.await {
            Ok(Ok(placed)) => Ok(placed),
            Ok(Err(error)) => Err(Refusal::Bad(chain(&error))),
            Err(error) => Err(not_yet(&error.to_string())),
        }
    }

    async fn order(
        &self,
        pod: PodFacts,
        placed: Sandbox,
    ) -> Result<watch::Receiver<Standing>, Refusal> {
        let (standing, answer) = oneshot::channel();
        let pod = PodFacts {
            netns: Some(placed.netns),
            ips: if pod.ips.is_empty() {
                placed.ips
            } else {
                pod.ips
            },
            ..pod
        };
        let stopping = || not_yet("the agent is stopping");
        let admission = Admission { pod, standing };
        self.admissions
            .send(admission)
            .await
            .map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }
}

/// Waits until the pod is in the mesh in this very namespace.
async fn enrolled(
    mut standing: watch::Receiver<Standing>,
    netns: net::netns::NetnsId,
    deadline: Instant,
) -> Result<(), Refusal> {
    let there = Standing::In(netns);
    let arrives = standing.wait_for(|now| *now == there);
    let waited = timeout_at(deadline, arrives).await;
    match waited.map(|arrived| arrived.map(drop)) {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(_)) => return Err(not_yet("the pod has ended")),
        Err(_) => {}
    }
    match &*standing.borrow() {
        Standing::Moving(Some(reason)) => Err(not_yet(reason)),
        _ => Err(not_yet("enrolling took too long")),
    }
}

fn not_yet(why: &str) -> Refusal {
    Refusal::NotYet(why.to_owned())
}
