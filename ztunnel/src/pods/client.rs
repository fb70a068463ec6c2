//! The tunnel's end of ZDS: connects to the node agent, carries out what it asks, and comes back when the link breaks.
//!
//! Pods go on being served while there is no agent; only readiness is lost. A message that breaks the protocol ends the
//! connection and not the process: the snapshot of the next one sets everything right.

use std::{ops::ControlFlow, path::PathBuf, time::Duration};

use mesh::outcome::LocalWorkload;
use net::{
    drain,
    netns::Netns,
    ready::Gate,
    zds::{self, Dialer, ProtocolError, Received, TunnelConnection},
};
use rand::RngExt;

use super::reconcile::{Launch, OutOfOrder, Pods, Request};

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
    pub(crate) fn new(socket: PathBuf, launcher: L, gate: Gate, changed: Changed<L>) -> Self {
        Self {
            dialer: Dialer::new(socket),
            pods: Pods::new(launcher),
            gate,
            heard: false,
            changed,
        }
    }

    /// Runs until the drain starts; answers what still runs then, for its owner to drain.
    pub(crate) async fn run(mut self, mut drain: drain::Watch) -> Vec<L::Running> {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let ended = tokio::select! {
                biased;
                _ = drain.started() => break,
                ended = self.serve_one_connection() => ended,
            };
            self.gate.close();
            if self.pods.complete() {
                backoff = FIRST_BACKOFF;
            }
            tracing::warn!(error = net::report::Chain(&ended).to_string(), retry_in = ?backoff, "no node agent");
            tokio::select! {
                biased;
                _ = drain.started() => break,
                () = self.wait_and_retry(jittered(backoff)) => {}
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
        self.pods.take_running()
    }

    async fn wait_and_retry(&mut self, pause: Duration) {
        tokio::time::sleep(pause).await;
        if self.pods.has_pending() {
            self.retry().await;
        }
    }

    async fn serve_one_connection(&mut self) -> LinkError {
        let mut link = match self.dialer.connect().await {
            Ok(link) => link,
            Err(error) => return error.into(),
        };
        self.heard = false;
        self.pods.connected();
        tracing::debug!("connected to the node agent");
        let ended = loop {
            if let ControlFlow::Break(ended) = self.step(&mut link).await {
                break ended;
            }
        };
        if !self.heard {
            self.dialer.hung_up_early();
        }
        ended
    }

    /// One message, or one round of retries.
    async fn step(&mut self, link: &mut TunnelConnection) -> ControlFlow<LinkError> {
        let has_pending = self.pods.has_pending();
        let done = tokio::select! {
            received = link.receive() => self.receive(link, received).await,
            () = tokio::time::sleep(RETRY_ADDS), if has_pending => {
                self.retry().await;
                Ok(())
            }
        };
        match done {
            Ok(()) => ControlFlow::Continue(()),
            Err(ended) => ControlFlow::Break(ended),
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

    fn publish(&self) {
        if self.pods.complete() {
            self.gate.open();
        } else {
            self.gate.close();
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
