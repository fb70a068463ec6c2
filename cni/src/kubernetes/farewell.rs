//! Is this agent replaced, or does the mesh leave? Its own DaemonSet tells.

use std::time::Duration;

use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::Pod};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams},
    core::PartialObjectMeta,
};
use tokio::time::{Instant, sleep, timeout};

use super::Error;
use crate::{agent::Cluster, agent::Ending, zds_server::chain};

/// The API server has this long to say; then the agent is taken for one that is replaced.
const ASK_WITHIN: Duration = Duration::from_secs(3);
/// The label of the agents' pods. Source: `spec/cni.md` 1.
const AGENTS: &str = "k8s-app=istio-cni-node";
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What the end of this agent means.
pub(super) async fn ending(client: Client, cluster: &Cluster) -> Ending {
    if cluster.always_leave {
        return Ending::Leave;
    }
    let sets: Api<PartialObjectMeta<DaemonSet>> = Api::namespaced(client, &cluster.namespace);
    match timeout(ASK_WITHIN, sets.get(&cluster.daemon_set)).await {
        Ok(answer) => judge(
            answer
                .as_ref()
                .map(|set| set.metadata.deletion_timestamp.is_some()),
        ),
        Err(_) => Ending::Stay,
    }
}

/// `Ok`: the DaemonSet is there, and is being deleted or not. That it is gone, or that our account is (401, which is what
/// `helm uninstall` leads to), is the end of the mesh. That we may not ask is a mistake in a role, which must not take
/// a node's pods out of the mesh; and an API server that cannot say changes nothing.
fn judge(being_deleted: Result<bool, &kube::Error>) -> Ending {
    match being_deleted {
        Ok(false) => Ending::Stay,
        Ok(true) => Ending::Leave,
        Err(kube::Error::Api(status)) if matches!(status.code, 401 | 404) => Ending::Leave,
        Err(kube::Error::Api(status)) if status.code == 403 => {
            tracing::error!(
                message = status.message,
                "the agent may not read its own DaemonSet, and so cannot tell a restart from an uninstall; pods stay in the mesh. Its Role needs get on daemonsets; if the mesh is being removed, run `cni-agent leave-cluster` with a role that has it"
            );
            Ending::Stay
        }
        Err(error) => {
            tracing::warn!(
                error = chain(error),
                "ask for our own DaemonSet; everything stays"
            );
            Ending::Stay
        }
    }
}

/// Deletes the agents' DaemonSet and waits until each agent has taken its node's pods out of the mesh: what has to come
/// before the tunnels are removed.
///
/// # Errors
/// [`Error::Leave`], [`Error::AgentsStay`].
pub async fn leave_cluster(
    client: Client,
    namespace: &str,
    daemon_set: &str,
    patience: Duration,
) -> Result<(), Error> {
    let failed = |error: kube::Error| Error::Leave(Box::new(error));
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    match sets.delete(daemon_set, &DeleteParams::background()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        result => result.map(drop).map_err(failed)?,
    }
    let pods: Api<PartialObjectMeta<Pod>> = Api::namespaced(client, namespace);
    let agents = ListParams::default().labels(AGENTS);
    let give_up = Instant::now() + patience;
    loop {
        let left = pods.list(&agents).await.map_err(failed)?.items.len();
        if left == 0 {
            return Ok(());
        }
        if Instant::now() >= give_up {
            return Err(Error::AgentsStay { left, patience });
        }
        sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn only_a_daemon_set_that_stays_or_cannot_be_asked_for_keeps_pods_enrolled() {
        let refused =
            |code: u16| kube::Error::Api(Box::new(Status::failure("", "").with_code(code)));
        let table = [
            (Ok(false), Ending::Stay),
            (Ok(true), Ending::Leave),
            (Err(refused(404)), Ending::Leave),
            (Err(refused(401)), Ending::Leave),
            (Err(refused(403)), Ending::Stay),
            (Err(refused(500)), Ending::Stay),
            (Err(refused(429)), Ending::Stay),
        ];
        for (answer, expected) in table {
            assert_eq!(judge(answer.as_ref().copied()), expected, "{answer:?}");
        }
    }
}
