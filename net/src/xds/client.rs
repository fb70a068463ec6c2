//! The connection: opens, serves, ends, and again.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue},
};
use tracing::{debug, info, warn};

use super::{
    BoxError, Config, Demand, Found, Handler, Termination,
    backoff::{Backoff, Outage},
    demand::Waiters,
    session::{Session, Taken, Versions, answer},
    stream::{self, Responses},
    wire::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
};
use crate::{
    drain,
    report::{Chain, causes},
};

/// Requests under way to the server; a server that does not read them stops us reading its responses.
const REQUESTS: usize = 64;
/// After a reconnect without versions: how long resources may stay unconfirmed before they count as gone. A server
/// may send the whole in several responses.
const CONFIRM: Duration = Duration::from_secs(10);
/// Reasons in one NACK are cut to this many bytes.
const MAX_REASONS: usize = 16 * 1024;

/// Follows a control plane. Made with [`Client::new`], driven by [`Client::run`].
pub struct Client<H> {
    config: Config,
    handler: H,
    session: Session,
    waiters: Arc<Waiters>,
    versions: Versions,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("open a channel to the control plane")]
    Connect(#[source] BoxError),
    #[error("read the token")]
    Token(#[source] std::io::Error),
    #[error("request metadata {key:?} is not allowed")]
    Metadata { key: String },
    #[error("the control plane did not answer within {0:?}")]
    Silent(Duration),
    #[error("the control plane ended the stream")]
    Status(#[source] Box<Status>),
    #[error("the control plane ended the stream")]
    Complete,
}

impl<H: Handler> Client<H> {
    /// A client that is not running yet, and the handle to demand resources with.
    pub fn new(config: Config, handler: H) -> (Self, Demand) {
        let waiters = Arc::new(Waiters::default());
        let client = Self {
            session: Session::new(&config.subscriptions),
            config,
            handler,
            waiters: Arc::clone(&waiters),
            versions: Versions::Told,
        };
        (client, Demand(waiters))
    }

    /// Follows the control plane until a drain is forced: policy that changes meanwhile holds for draining connections
    /// too. Does not hold the drain open.
    pub async fn run(mut self, drain: drain::Watch) {
        let mut drain = drain.release();
        let mut backoff = Backoff::new();
        let mut outage = Outage::default();
        loop {
            let mut heard = false;
            let ended = tokio::select! {
                () = drain.forced() => return,
                ended = self.connection(&mut heard) => ended,
            };
            if heard {
                outage = Outage::default();
            }
            let wait = self.after(&ended, heard, &mut backoff, &mut outage);
            tokio::select! {
                () = drain.forced() => return,
                () = sleep(wait) => {}
            }
        }
    }

    /// Counts and logs the end of a connection; the answer is how long to wait (node-tunnel.md 3.3).
    fn after(
        &mut self,
        ended: &Ended,
        heard: bool,
        backoff: &mut Backoff,
        outage: &mut Outage,
    ) -> Duration {
        let reason = ended.termination();
        self.config.metrics.terminated(reason);
        if ended.too_long() {
            self.versions = Versions::Withheld;
        }
        let error: &(dyn std::error::Error + 'static) = ended;
        match reason {
            // A stream that bore fruit starts afresh; one that ends at once, however politely, must not spin.
            _ if heard => backoff.reset(),
            Termination::Reconnect => backoff.reset(),
            _ => {}
        }
        let wait = backoff.next();
        if let Some(ready) = &self.config.ready {
            ready.explain(format!("no control plane: {}", Chain(error)));
        }
        match reason {
            Termination::Reconnect | Termination::Complete => {
                debug!(error, ?wait, "the control plane asks to reconnect");
            }
            _ if outage.is_due(Instant::now()) => warn!(
                error,
                ?wait,
                "no control plane: going on with what is known"
            ),
            _ => debug!(error, ?wait, "still no control plane"),
        }
        wait
    }

    /// One connection, from dial to end.
    async fn connection(&mut self, heard: &mut bool) -> Ended {
        match self.serve(heard).await {
            Ok(()) => Ended::Complete,
            Err(ended) => ended,
        }
    }

    async fn serve(&mut self, heard: &mut bool) -> Result<(), Ended> {
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        self.waiters.take_fresh();
        let waited = self.waiters.all();
        let withheld = self.versions == Versions::Withheld;
        let first = self
            .session
            .first_requests(&self.config.node, self.versions, &waited);
        for request in first {
            // The channel is longer than the list of types.
            let _ = requests.send(request).await;
        }
        let deadline = Instant::now() + self.config.answer_deadline;
        let mut responses = self.open(outgoing).await?;
        info!("connected to the control plane");
        if let Some(ready) = &self.config.ready {
            ready.explain("the control plane has not told all yet");
        }
        let mut silence = pin!(sleep_until(deadline));
        let mut confirm = pin!(sleep(CONFIRM));
        let mut confirming = withheld;
        loop {
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        if !*heard && withheld {
                            confirm.as_mut().reset(Instant::now() + CONFIRM);
                        }
                        *heard = true;
                        self.take(response, &requests).await;
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(Ended::Status(Box::new(status))),
                },
                names = self.waiters.fresh() => {
                    if let Some(request) = self.session.demand(names) {
                        let _ = requests.send(request).await;
                    }
                }
                () = &mut silence, if !*heard => {
                    return Err(Ended::Silent(self.config.answer_deadline));
                }
                () = &mut confirm, if confirming && *heard => {
                    confirming = false;
                    self.forget_unconfirmed();
                }
            }
        }
    }

    async fn open(
        &self,
        outgoing: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> Result<Responses, Ended> {
        let deadline = self.config.answer_deadline;
        let metadata = self.metadata().await?;
        let channel = (self.config.connect)().map_err(Ended::Connect)?;
        match timeout(deadline, stream::open(channel, metadata, outgoing)).await {
            Ok(Ok(responses)) => Ok(responses),
            Ok(Err(status)) => Err(Ended::Status(Box::new(status))),
            Err(_) => Err(Ended::Silent(deadline)),
        }
    }

    async fn metadata(&self) -> Result<MetadataMap, Ended> {
        let mut metadata = MetadataMap::new();
        for (key, value) in &self.config.metadata {
            let bad = || Ended::Metadata { key: key.clone() };
            let parsed: MetadataKey<Ascii> = key.to_ascii_lowercase().parse().map_err(|_| bad())?;
            metadata.insert(parsed, value.parse().map_err(|_| bad())?);
        }
        if let Some(token) = &self.config.token {
            let token = token.read().await.map_err(Ended::Token)?;
            let value: Result<MetadataValue<Ascii>, _> = format!("Bearer {token}").parse();
            let mut value = value.map_err(|_| Ended::Metadata {
                key: "authorization".to_owned(),
            })?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        Ok(metadata)
    }

    async fn take(
        &mut self,
        response: DeltaDiscoveryResponse,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) {
        let (type_url, nonce) = (response.type_url.clone(), response.nonce.clone());
        let Some(incoming) = self.session.read(response) else {
            warn!(%type_url, "a response of a type that was not asked for");
            let _ = requests.send(answer(&type_url, nonce, &[])).await;
            return;
        };
        self.config.metrics.received(&incoming.response);
        let taken = self.session.take(incoming, &mut self.handler);
        self.tell(&taken);
        for mut reply in taken.replies {
            shorten(&mut reply);
            let _ = requests.send(reply).await;
        }
    }

    fn tell(&mut self, taken: &Taken) {
        if let Some((type_url, count)) = taken.rejected {
            self.config.metrics.rejected(type_url, count);
            let detail = taken.replies.first().and_then(|r| r.error_detail.as_ref());
            let reasons = detail.map_or("", |detail| detail.message.as_str());
            warn!(
                type_url,
                count, reasons, "resources refused, the others are in force"
            );
        }
        if self.session.synced() {
            self.handler.synced();
            if let Some(ready) = &self.config.ready {
                ready.open();
            }
        }
        for name in &taken.arrived {
            self.waiters.answer(name, Found::Arrived);
        }
        for name in &taken.absent {
            self.waiters.answer(name, Found::Absent);
        }
    }

    fn forget_unconfirmed(&mut self) {
        for response in self.session.unconfirmed() {
            let (type_url, count) = (response.type_url, response.removed.len());
            info!(
                type_url,
                count, "resources that the control plane no longer has"
            );
            self.handler.apply(response);
        }
    }
}

impl Ended {
    fn termination(&self) -> Termination {
        match self {
            Self::Connect(_) | Self::Token(_) | Self::Metadata { .. } => {
                Termination::ConnectionError
            }
            Self::Silent(_) => Termination::Error,
            Self::Complete => Termination::Complete,
            Self::Status(status) if never_connected(status) => Termination::ConnectionError,
            Self::Status(status) => match status.code() {
                Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => Termination::Reconnect,
                Code::Unavailable if asks_to_reconnect(status.message()) => Termination::Reconnect,
                _ => Termination::Error,
            },
        }
    }

    /// The request that names what we have was longer than the server takes (node-tunnel.md 3.3, hazard d).
    fn too_long(&self) -> bool {
        matches!(self, Self::Status(status) if status.code() == Code::ResourceExhausted)
    }
}

fn never_connected(status: &Status) -> bool {
    causes(status).any(|error| error.is::<tonic::ConnectError>())
}

fn asks_to_reconnect(message: &str) -> bool {
    ["transport is closing", "received prior goaway"]
        .iter()
        .any(|text| message.contains(text))
}

/// A NACK for a thousand resources must not itself be too long.
fn shorten(request: &mut DeltaDiscoveryRequest) {
    if let Some(detail) = &mut request.error_detail
        && detail.message.len() > MAX_REASONS
    {
        let end = (0..=MAX_REASONS)
            .rev()
            .find(|&at| detail.message.is_char_boundary(at));
        detail.message.truncate(end.unwrap_or(0));
        detail.message.push_str("...");
    }
}
