//! Which identities a node tunnel may have certificates for: those of the pods on its own node, and no others.

use std::time::Duration;

use mesh::{
    identity::{Identity, ParseIdentityError, TrustDomain},
    names::Str,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    auth::Caller, config::ServiceAccount, output::PodFacts, serve::access::Access, world::World,
};

/// What runs where, as the API server (or the state folder) says.
pub trait Pods: Send + Sync + std::fmt::Debug {
    /// The pod with this uid, if it has not ended.
    fn pod_by_uid(&self, uid: &str) -> Option<PodFacts>;
    /// Whether a pod of this account that has not ended runs on the node.
    fn runs_on_node(&self, node: &str, namespace: &str, service_account: &str) -> bool;
    /// Changes whenever an answer to these questions may have.
    fn changed(&self) -> watch::Receiver<()>;
}

/// The rule's surroundings.
#[derive(Debug)]
pub struct Rule<'a> {
    /// The mesh's trust domain.
    pub trust_domain: &'a TrustDomain,
    /// Who is a node tunnel.
    pub access: &'a Access,
    /// What runs where in the caller's cluster.
    pub pods: &'a dyn Pods,
}

/// Why an identity is refused. For our log only: the peer learns nothing about what runs where.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a node tunnel at all.
    #[error("{0} is not a trusted node account")]
    NotANode(ServiceAccount),
    /// A token that could be used from anywhere.
    #[error("the caller's proof is not bound to a pod")]
    NotPodBound,
    /// Not an identity.
    #[error("read the requested identity")]
    Identity(#[from] ParseIdentityError),
    /// Another mesh's identity.
    #[error("{0} is of another trust domain")]
    TrustDomain(Identity),
    /// Between the caller's proof and this, its cluster was taken away.
    #[error("the caller's cluster {0:?} is no longer known")]
    Cluster(Str),
    /// The caller's pod has ended or never was.
    #[error("no pod has the uid {0:?} of the caller's token")]
    UnknownPod(String),
    /// The pod is not the one that the token names.
    #[error("the pod {uid:?} is {found}, not {claimed}")]
    OtherPod {
        /// The uid both have.
        uid: String,
        /// What it is.
        found: String,
        /// What the token says.
        claimed: String,
    },
    /// Nothing of that identity runs there.
    #[error("no pod of {identity} runs on the caller's node {node}")]
    NotOnNode {
        /// The requested identity.
        identity: Identity,
        /// The caller's node.
        node: String,
    },
}

impl Pods for World {
    fn pod_by_uid(&self, uid: &str) -> Option<PodFacts> {
        World::pod_by_uid(self, uid)
    }

    fn runs_on_node(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        World::runs_on_node(self, node, namespace, service_account)
    }

    fn changed(&self) -> watch::Receiver<()> {
        self.pods_changed()
    }
}

impl Refusal {
    /// Whether a pod that we have not heard of yet would change the answer: kubelet, and so the node, knows of a pod
    /// before its event has come to us.
    fn may_be_early(&self) -> bool {
        matches!(self, Self::UnknownPod(_) | Self::NotOnNode { .. })
    }
}

impl Rule<'_> {
    /// As [`Rule::check`], which is asked again while `patience` lasts when a pod's event may be on its way.
    pub async fn check_patiently(
        &self,
        caller: &Caller,
        requested: &str,
        patience: Duration,
    ) -> Result<Identity, Refusal> {
        let mut changed = self.pods.changed();
        let end = Instant::now() + patience;
        loop {
            changed.mark_unchanged();
            let refusal = match self.check(caller, requested) {
                Err(refusal) if refusal.may_be_early() => refusal,
                decided => return decided,
            };
            match timeout_at(end, changed.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(refusal),
            }
        }
    }

    /// The identity, if `caller` may have a certificate for it. Source: control-plane.md 12, with its weak points closed
    /// (trust domain, ended pods).
    pub fn check(&self, caller: &Caller, requested: &str) -> Result<Identity, Refusal> {
        if !self.access.is_node(&caller.account) {
            return Err(Refusal::NotANode(caller.account.clone()));
        }
        let binding = caller.pod.as_ref().ok_or(Refusal::NotPodBound)?;
        let identity: Identity = requested.parse()?;
        if identity.trust_domain != *self.trust_domain {
            return Err(Refusal::TrustDomain(identity));
        }
        let pod = self.pods.pod_by_uid(&binding.uid);
        let pod = pod.ok_or_else(|| Refusal::UnknownPod(binding.uid.clone()))?;
        let claimed_node = binding.node.as_deref().unwrap_or(&pod.node);
        let place = |namespace: &str, name: &str, account: &str, node: &str| {
            format!("{namespace}/{name} of {account} on {node:?}")
        };
        let found = place(&pod.namespace, &pod.name, &pod.service_account, &pod.node);
        let ServiceAccount { namespace, name } = &caller.account;
        let claimed = place(namespace, &binding.name, name, claimed_node);
        if found != claimed {
            return Err(Refusal::OtherPod {
                uid: binding.uid.clone(),
                found,
                claimed,
            });
        }
        let runs = !pod.node.is_empty()
            && self
                .pods
                .runs_on_node(&pod.node, &identity.namespace, &identity.service_account);
        match runs {
            true => Ok(identity),
            false => Err(Refusal::NotOnNode {
                identity,
                node: pod.node.to_string(),
            }),
        }
    }
}
