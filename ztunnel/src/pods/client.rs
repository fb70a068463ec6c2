//! The tunnel's end of ZDS: connects to the node agent, carries out what it asks, and comes back when the link breaks.
//!
//! Pods go on being served while there is no agent; only readiness is lost. A message that breaks the protocol ends the
//! connection and not the process: the snapshot of the next one sets everything right.

use std::{path::PathBuf, time::Duration};

use mesh::outcome::LocalWorkload;
use net::{
    drain,
    netns::Netns,
    ready::Gate,
    zds::{self, Dialer, ProtocolError, Received, TunnelConnection},
};
use rand::RngExt;

use super::reconcile::{Launch, OutOfOrder, PodUid, Pods, Request};

const RETRY_ADDS: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LONGEST_BACKOFF: Duration = Duration::from_secs(15);

/// Why a connection to the agent ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("talk to the node agent")]
    Protocol(#[from] ProtocolError),
    #[error("the node agent's message is out of order")]
    OutOfOrder(#[from] OutOfOrder),
    #[error("the node agent closed the connection")]
    Closed,
}

/// What a turn of the loop came to.
enum Turn {
    GoOn,
    /// The link ended.
    Ended(LinkError),
    /// The drain has started.
    Drain,
}

/// Called after each change, to publish what runs.
type Changed<L> = Box<dyn Fn(&Pods<L>) + Send + Sync>;

/// Keeps the node's pods as the agent says, until the drain starts.
pub(crate) struct Client<L: Launch<Netns = Netns>> {
    dialer: Dialer,
    pods: Pods<L>,
    gate: Gate,
    heard: bool,
    changed: Changed<L>,
}

impl<L: Launch<Netns = Netns>> Client<L> {
    /// Serves at most `most` pods.
    pub(crate) fn new(
        socket: PathBuf,
        launcher: L,
        most: usize,
        gate: Gate,
        changed: Changed<L>,
    ) -> Self {
        Self {
            dialer: Dialer::new(socket),
            pods: Pods::new(launcher, most),
            gate,
            heard: false,
            changed,
        }
    }

    /// Runs until the drain starts; answers what still runs then, and the link to the agent, for their owner to drain.
    pub(crate) async fn run(
        mut self,
        mut drain: drain::Watch,
    ) -> (Vec<(PodUid, L::Running)>, Option<TunnelConnection>) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let (link, ended) = self.serve_one_connection(&mut drain).await;
            let Some(ended) = ended else {
                return (self.pods.take_running(), link);
            };
            self.gate.close();
            if self.pods.complete() {
                backoff = FIRST_BACKOFF;
            }
            let error = net::report::Chain(&ended).to_string();
            self.gate.explain(format!("no node agent: {error}"));
            tracing::warn!(error, retry_in = ?backoff, "no node agent");
            tokio::select! {
                biased;
                _ = drain.started() => return (self.pods.take_running(), None),
                () = self.wait_and_retry(jittered(backoff)) => {}
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    async fn wait_and_retry(&mut self, pause: Duration) {
        tokio::time::sleep(pause).await;
        if self.pods.has_pending() {
            self.retry().await;
        }
    }

    /// Until the link breaks, or the drain starts: then there is no error, and the link may live.
    async fn serve_one_connection(
        &mut self,
        drain: &mut drain::Watch,
    ) -> (Option<TunnelConnection>, Option<LinkError>) {
        let mut link = match self.dialer.connect().await {
            Ok(link) => link,
            Err(_) if drain.mode().is_some() => return (None, None),
            Err(error) => return (None, Some(error.into())),
        };
        self.heard = false;
        self.pods.connected();
        self.gate.explain("waits for the node agent's pods");
        tracing::debug!("connected to the node agent");
        let ended = loop {
            match self.turn(&mut link, drain).await {
                Turn::GoOn => {}
                Turn::Ended(ended) => break ended,
                Turn::Drain => return (Some(link), None),
            }
        };
        if !self.heard {
            self.dialer.hung_up_early();
        }
        (None, Some(ended))
    }

    /// One message, or one round of retries. A message that has come is answered before a drain is noticed: an answer
    /// that is owed would be taken for the next one's.
    async fn turn(&mut self, link: &mut TunnelConnection, drain: &mut drain::Watch) -> Turn {
        let has_pending = self.pods.has_pending();
        let done = tokio::select! {
            biased;
            _ = drain.started() => return Turn::Drain,
            received = link.receive() => self.receive(link, received).await,
            () = tokio::time::sleep(RETRY_ADDS), if has_pending => {
                self.retry().await;
                Ok(())
            }
        };
        match done {
            Ok(()) => Turn::GoOn,
            Err(ended) => Turn::Ended(ended),
        }
    }

    async fn receive(
        &mut self,
        link: &mut TunnelConnection,
        received: Result<Option<Received>, ProtocolError>,
    ) -> Result<(), LinkError> {
        let answer = match received?.ok_or(LinkError::Closed)? {
            Received::Request(request) => self.pods.handle(translate(request)).await?,
            Received::BadNamespace { uid, error } => {
                let error = net::report::Chain(&error).to_string();
                tracing::warn!(uid, error, "the pod's namespace is gone");
                Err(error)
            }
        };
        self.heard = true;
        self.publish();
        link.acknowledge(answer.as_ref().copied().map_err(String::as_str))
            .await?;
        Ok(())
    }

    async fn retry(&mut self) {
        self.pods.retry().await;
        self.publish();
    }

    fn explain(&self) {
        let pending: Vec<String> = self
            .pods
            .pending()
            .map(|(uid, pod)| format!("{}/{} ({uid})", pod.namespace, pod.name))
            .collect();
        match pending.is_empty() {
            true => self.gate.explain("waits for the node agent's pods"),
            false => self.gate.explain(format!(
                "pods that cannot be served yet: {}",
                pending.join(", ")
            )),
        }
    }

    fn publish(&self) {
        if self.pods.complete() {
            self.gate.open();
        } else {
            self.gate.close();
            self.explain();
        }
        (self.changed)(&self.pods);
    }
}

fn translate(request: zds::Request) -> Request<Netns> {
    match request {
        zds::Request::Add { uid, info, netns } => Request::Add {
            uid: uid.into(),
            workload: LocalWorkload {
                name: info.name.into(),
                namespace: info.namespace.into(),
                service_account: info.service_account.into(),
            },
            netns,
        },
        zds::Request::Keep { uid } => Request::Keep { uid: uid.into() },
        zds::Request::Delete { uid } => Request::Del { uid: uid.into() },
        zds::Request::SnapshotSent => Request::SnapshotSent,
        zds::Request::Drain { uid } => Request::Drain { uid: uid.into() },
    }
}

fn jittered(backoff: Duration) -> Duration {
    backoff.mul_f64(rand::rng().random_range(0.8..1.2))
}
