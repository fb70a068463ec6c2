//! The gRPC service: one HTTP/2 stream per subscriber.
//!
//! The response body is written here and not by tonic's encoder, which would copy every message into a buffer of its
//! own for every subscriber. It is polled only when HTTP/2 has room for more, so a slow reader is simply not asked what
//! it is owed until it can take it.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, header::CONTENT_TYPE};
use http_body_util::StreamBody;
use hyper::body::Frame;
use net::drain;
use proto::xds::DeltaDiscoveryRequest;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tonic::{Code, Status, Streaming, body::Body, codec::Codec as _};
use tonic_prost::ProstCodec;

use super::{
    access::{self, Access},
    limit::Limit,
    registry::Registry,
    store::Store,
    subscriber::{Subscriber, WINDOW},
    view::Sequence,
};
use crate::{
    auth::{Authentication, Caller},
    metrics::Metrics,
    tls::ConnectionInfo,
};

/// Largest request: a proxy that comes back sends the version of each of its resources.
const MAX_REQUEST_BYTES: usize = 128 << 20;

/// Tokens end, accounts are taken away: no stream outlives its proof by more than this, give or take a tenth, where
/// nothing else is said.
pub const MAX_AGE: Duration = Duration::from_secs(30 * 60);

/// What is not without bounds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// New streams per second.
    pub streams_per_second: u32,
    /// How long one lasts, give or take a tenth, before its proxy has to prove itself anew.
    pub max_age: Duration,
}

/// Where calls of this service go.
pub(crate) const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/";
const DELTA: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// `envoy.service.discovery.v3.AggregatedDiscoveryService`, the delta half of it.
#[derive(Clone, Debug)]
pub struct DiscoveryService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<Store>,
    registry: Arc<Registry>,
    authentication: Authentication,
    access: Access,
    limit: Limit,
    max_age: Duration,
    metrics: Arc<Metrics>,
    drain: drain::Watch,
}

/// One subscriber's stream.
struct Stream {
    shared: Arc<Shared>,
    caller: Caller,
    info: ConnectionInfo,
    requests: Streaming<DeltaDiscoveryRequest>,
    subscriber: Option<Subscriber>,
    head: watch::Receiver<Sequence>,
    drain: drain::Watch,
    pieces: VecDeque<Bytes>,
    /// Since when there are pieces that the connection has not taken.
    sending: Option<Instant>,
    /// When the store first was ahead of this subscriber.
    behind: Option<Instant>,
    /// When the proxy is sent off to prove itself anew.
    expires: Instant,
    end: Option<Status>,
}

impl DiscoveryService {
    /// Streams end with `Unavailable` once the drain begins.
    pub fn new(
        store: Arc<Store>,
        registry: Arc<Registry>,
        authentication: Authentication,
        access: Access,
        limits: Limits,
        metrics: Arc<Metrics>,
        drain: drain::Watch,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                registry,
                authentication,
                access,
                limit: Limit::per_second(limits.streams_per_second),
                max_age: limits.max_age,
                metrics,
                drain,
            }),
        }
    }
}

impl DiscoveryService {
    /// Answers one call.
    pub async fn call(&self, request: http::Request<Body>) -> http::Response<Body> {
        let response = match request.uri().path() {
            DELTA => self.shared.clone().open(request).await,
            _ => Err(Status::unimplemented("only delta xDS is served")),
        };
        response.unwrap_or_else(Status::into_http)
    }
}

impl Shared {
    async fn open(
        self: Arc<Self>,
        request: http::Request<Body>,
    ) -> Result<http::Response<Body>, Status> {
        let (parts, body) = request.into_parts();
        let info = parts.extensions.get::<ConnectionInfo>();
        let info = info.cloned().unwrap_or_default();
        let caller = self
            .authentication
            .caller(&parts.headers, &info.certificate);
        let caller = caller.await.map_err(|error| {
            let status = error.status("not authenticated");
            let error = &error as &dyn std::error::Error;
            tracing::warn!(peer = ?info.address, error, "xDS caller not believed");
            status
        })?;
        self.access.admit(&caller).map_err(|denied| {
            tracing::warn!(peer = ?info.address, %denied, "xDS caller may not read the mesh");
            Status::permission_denied(denied.to_string())
        })?;
        self.limit
            .admit()
            .await
            .map_err(|_| Status::unavailable("too many new streams"))?;
        let mut codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryRequest>::default();
        let requests = Streaming::new_request(codec.decoder(), body, None, Some(MAX_REQUEST_BYTES));
        let max_age = self.max_age.mul_f64(rand::random_range(0.9..=1.1));
        let stream = Stream {
            head: self.store.watch(),
            drain: self.drain.clone(),
            shared: self,
            caller,
            info,
            requests,
            subscriber: None,
            pieces: VecDeque::new(),
            sending: None,
            behind: None,
            expires: Instant::now() + max_age,
            end: None,
        };
        let body = StreamBody::new(stream::unfold(Some(stream), next_frame));
        let mut response = http::Response::new(Body::new(body));
        let grpc = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(CONTENT_TYPE, grpc);
        Ok(response)
    }
}

/// The next frame of the body; the trailers are the last.
async fn next_frame(
    stream: Option<Stream>,
) -> Option<(Result<Frame<Bytes>, Infallible>, Option<Stream>)> {
    let mut stream = stream?;
    loop {
        if let Some(piece) = stream.pieces.pop_front() {
            return Some((Ok(Frame::data(piece)), Some(stream)));
        }
        if let Some(since) = stream.sending.take() {
            stream.shared.metrics.sent(since.elapsed());
        }
        if let Some(status) = stream.end.take() {
            let mut trailers = http::HeaderMap::new();
            // Fails only for a message that is no header value; the code stands before it.
            drop(status.add_header(&mut trailers));
            return Some((Ok(Frame::trailers(trailers)), None));
        }
        if let Err(status) = stream.step().await {
            stream.end = Some(status);
        }
    }
}

impl Stream {
    /// Does the next thing there is to do. `Err` ends the stream; `Ok` status code means the proxy ended it.
    async fn step(&mut self) -> Result<(), Status> {
        let head = *self.head.borrow_and_update();
        let due = self.subscriber.as_ref().and_then(|known| known.due(head));
        let now = Instant::now();
        if due.is_some() && self.behind.is_none() {
            self.behind = Some(now);
        }
        if due.is_some_and(|due| due + WINDOW <= now) {
            // Requests go first, but a flood of them must not starve the answers.
            return self.flush(now);
        }
        let timer = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = self.drain.started() => {
                Err(Status::unavailable("the control plane is ending"))
            }
            request = self.requests.message() => match request? {
                Some(request) => self.request(request),
                None => Err(Status::new(Code::Ok, "")),
            },
            () = timer => self.flush(Instant::now()),
            // A clean end makes proxies come back at once; with versions that costs little.
            () = sleep_until(self.expires) => Err(Status::new(Code::Ok, "")),
            changed = self.head.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is ending"))
            }
        }
    }

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let subscriber = match &mut self.subscriber {
            Some(subscriber) => subscriber,
            none => {
                let mut peer = access::identify(&self.caller, request.node.as_ref())?;
                if peer.proxy_type == "ztunnel" && !self.shared.access.is_node(&self.caller.account)
                {
                    return Err(Status::permission_denied("not a node tunnel's account"));
                }
                peer.address = self.info.address;
                tracing::info!(proxy = peer.proxy, node = peer.node, "proxy connected");
                // Nodes of other clusters may have the names of ours.
                let node = match &self.caller.cluster {
                    None => peer.node.as_str().into(),
                    Some(_) => "".into(),
                };
                let gateway = self.shared.access.gateway(&self.caller, &peer.proxy);
                let connection = self.shared.registry.connect(peer);
                none.insert(Subscriber::new(connection, node, gateway))
            }
        };
        subscriber.request(request, Instant::now())
    }

    fn flush(&mut self, now: Instant) -> Result<(), Status> {
        let Some(subscriber) = &mut self.subscriber else {
            return Ok(());
        };
        let responses = subscriber.flush(&self.shared.store, now).map_err(|_| {
            Status::unavailable("fell too far behind; come back with the versions you have")
        })?;
        for response in &responses {
            let Some(pieces) = response.pieces() else {
                self.shared.metrics.internal_error();
                return Err(Status::internal("a response of 4 GiB and more"));
            };
            self.pieces.extend(pieces);
        }
        self.sending = (!self.pieces.is_empty()).then(Instant::now);
        self.shared.metrics.computed(now.elapsed());
        if let Some(behind) = self.behind.take()
            && !responses.is_empty()
        {
            self.shared.metrics.queued(now.duration_since(behind));
            self.shared.metrics.converged(behind.elapsed());
        }
        Ok(())
    }
}
