//! What a tunnel must have before it asks the agent for pods.
//!
//! Whoever listens in a pod's namespace draws its connections, also away from a tunnel that could serve them. So one that
//! knows no mesh yet, or has no certificates for what runs on its node, does not come between: after an upgrade under a
//! control plane that is gone, the old tunnel goes on with what it knows, and the new one is not ready and says why.

use std::time::Duration;

use futures_util::future::join_all;
use mesh::{identity::Identity, view::MeshView, workload::TunnelProtocol};
use net::{
    ca::{FetchError, Priority},
    ready::Gate,
    report::Chain,
};

use crate::{identities::Held, pod::Node};

/// Between looks at a CA that does not answer.
const AGAIN: Duration = Duration::from_secs(1);

/// Waits for the mesh state, and for certificates of the node's workloads that are enrolled already. What it answers is
/// to be kept until their pods hold them. Cancel-safe.
pub(super) async fn prepare(node: &Node, gate: &Gate) -> Vec<Held> {
    gate.explain("waits for the mesh state");
    node.state.told().await;
    let wanted = identities_here(&node.state.view(), node.config.node.name.as_deref());
    let held: Vec<Held> = wanted.iter().map(|it| node.identities.hold(it)).collect();
    while let Some(error) = unanswered(node, &wanted).await {
        let error = Chain(&error).to_string();
        tracing::warn!(error, "the CA does not answer: pods are not taken over yet");
        gate.explain(format!("the CA does not answer: {error}"));
        tokio::time::sleep(AGAIN).await;
    }
    held
}

/// Whose certificates the pods will need. None where the node has no name: nobody knows then which pods are here.
fn identities_here(view: &MeshView, node: Option<&str>) -> Vec<Identity> {
    let Some(node) = node else { return Vec::new() };
    let here = view.workloads().filter(|it| &*it.node == node);
    let enrolled = here.filter(|it| it.tunnel_protocol == TunnelProtocol::Hbone);
    let mut identities: Vec<_> = enrolled.map(|it| it.identity()).collect();
    identities.sort();
    identities.dedup();
    identities
}

/// The last error, where the CA has answered about none of them. A refusal is an answer: that pod has to live with it,
/// and must not keep the others from being served.
async fn unanswered(node: &Node, wanted: &[Identity]) -> Option<FetchError> {
    let fetch = |it| node.certificates.fetch(it, Priority::Warmup);
    let fetched = join_all(wanted.iter().map(fetch)).await;
    let mut last = None;
    for result in fetched {
        match result {
            Err(error) if !is_answer(&error) => last = Some(error),
            _ => return None,
        }
    }
    last
}

fn is_answer(error: &FetchError) -> bool {
    match error {
        FetchError::Issue { source, .. } => source.is_answer(),
        FetchError::Late { .. } => false,
        FetchError::Forgotten(_) | FetchError::TooMany { .. } => true,
    }
}

#[cfg(test)]
mod tests {
    use mesh::{
        names::WorkloadUid,
        view::{Resource, Update},
        workload::Workload,
    };

    use super::*;

    fn workload(name: &str, account: &str, node: &str, protocol: TunnelProtocol) -> Resource {
        let mut it = Workload::new(WorkloadUid(name.into()), name.into(), "ns".into());
        it.service_account = account.into();
        it.node = node.into();
        it.tunnel_protocol = protocol;
        Resource::Workload(it)
    }

    #[test]
    fn one_certificate_each_for_the_accounts_of_enrolled_pods_of_this_node() {
        use TunnelProtocol::{Hbone, None as Plain};
        let mut view = MeshView::default();
        view.apply(Update {
            upserts: vec![
                workload("a", "one", "here", Hbone),
                workload("b", "one", "here", Hbone),
                workload("c", "two", "here", Hbone),
                workload("d", "three", "here", Plain),
                workload("e", "four", "elsewhere", Hbone),
            ],
            removals: Vec::new(),
        });
        let accounts = |node| -> Vec<String> {
            let found = identities_here(&view, node);
            found
                .iter()
                .map(|it| it.service_account.to_string())
                .collect()
        };
        assert_eq!(accounts(Some("here")), ["one", "two"]);
        assert!(accounts(None).is_empty());
    }
}
