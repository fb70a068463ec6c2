//! The end of a tunnel: pods are drained, and the agent is still listened to while nobody else serves them.

use std::collections::HashMap;

use net::{
    drain,
    zds::{Received, Request, TunnelConnection},
};
use tokio::task::{AbortHandle, JoinSet};

use super::{PodUid, Running};

/// What still runs when the drain starts.
pub(crate) struct Leaving {
    /// Absent where a successor serves already: then the agent must not take us for the newest.
    pub(super) link: Option<TunnelConnection>,
    pub(super) pods: Vec<(PodUid, Running)>,
}

impl Leaving {
    /// Drains every pod. One that the agent deletes meanwhile ends at once.
    pub(crate) async fn drain(self, mode: drain::Mode) {
        let mut draining = JoinSet::new();
        let started = self.pods.into_iter();
        let started = started.map(|(uid, pod)| (uid, draining.spawn(pod.drain(mode))));
        let pods: HashMap<PodUid, AbortHandle> = started.collect();
        let listening = async {
            if let Some(link) = self.link {
                listen(link, &pods).await;
            }
            std::future::pending().await
        };
        let all = async { while draining.join_next().await.is_some() {} };
        tokio::select! {
            () = all => {}
            () = listening => {}
        }
    }
}

/// Answers the agent until it hangs up.
async fn listen(mut link: TunnelConnection, pods: &HashMap<PodUid, AbortHandle>) {
    while let Ok(Some(received)) = link.receive().await {
        let answer = match received {
            Received::Request(Request::Delete { uid }) => {
                if let Some(pod) = pods.get(uid.as_str()) {
                    pod.abort();
                }
                Ok(())
            }
            Received::Request(Request::Add { .. }) | Received::BadNamespace { .. } => {
                Err("this tunnel is about to end; the next one will get the pod")
            }
            Received::Request(_) => Ok(()),
        };
        if link.acknowledge(answer).await.is_err() {
            return;
        }
    }
}
