//! One endpoint of a cluster: the connections to it, its load, its health.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::digest;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::Version;
use mesh::{service::Service, workload::Workload};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    outlier::Health,
    pool::{Lease, Pool, PoolLimits},
};
use crate::backend::{Backend, ConnectError, Connected, Endpoint, Upstream};

/// What is known of one endpoint.
#[derive(Debug)]
pub(crate) struct EndpointState {
    /// What is dialled.
    pub(crate) endpoint: Endpoint,
    since: Instant,
    token: OnceLock<String>,
    /// Requests that it is working on.
    pub(super) active: AtomicU32,
    /// How it did so far.
    pub(super) health: Mutex<Health>,
    http1: Arc<Pool>,
    http2: Arc<Pool>,
}

/// A connection that could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// The endpoint could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It does not speak HTTP/2.
    #[error("begin HTTP/2")]
    Handshake(#[source] hyper::Error),
}

impl EndpointState {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            since: Instant::now(),
            token: OnceLock::new(),
            active: AtomicU32::new(0),
            health: Mutex::default(),
            http1: Arc::default(),
            http2: Arc::default(),
        }
    }

    /// The workload, if it is one.
    pub(crate) fn workload(&self) -> Option<&Arc<Workload>> {
        self.endpoint.workload()
    }

    /// Its address, where it has one.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match &self.endpoint {
            Endpoint::Workload { workload, port } => {
                let address = workload.addresses.first();
                address.map(|it| (*it, *port).into())
            }
            Endpoint::Address(address) | Endpoint::Tunnel { address, .. } => Some(*address),
            Endpoint::Hostname { .. } | Endpoint::Waypoint { .. } => None,
        }
    }

    /// For how long it has been known.
    pub(super) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// What names it in a session of `service`.
    ///
    /// A digest of service, workload and port: every replica of the waypoint makes the same without sharing a secret, it
    /// tells nothing of the endpoint, and whoever makes one up can name only what the service's clients may reach
    /// anyway.
    pub(crate) fn token(&self, service: &Service) -> &str {
        self.token.get_or_init(|| {
            let mut context = digest::Context::new(&digest::SHA256);
            let port = match &self.endpoint {
                Endpoint::Workload { port, .. }
                | Endpoint::Hostname { port, .. }
                | Endpoint::Waypoint { port, .. } => *port,
                Endpoint::Address(address) | Endpoint::Tunnel { address, .. } => address.port(),
            };
            let workload = self.workload().map_or("", |it| &it.uid.0);
            let port = port.to_be_bytes();
            let parts: [&[u8]; 4] = [
                b"leyline session",
                service.hostname.as_bytes(),
                workload.as_bytes(),
                &port,
            ];
            for part in parts {
                context.update(&u64::try_from(part.len()).unwrap_or(0).to_be_bytes());
                context.update(part);
            }
            BASE64_URL_SAFE_NO_PAD.encode(&context.finish().as_ref()[..18])
        })
    }

    /// Whether `workload` is reached and proven as this one is, so that connections to this one can serve it.
    pub(super) fn serves(&self, workload: &Workload, port: u16) -> bool {
        let Endpoint::Workload {
            workload: own,
            port: own_port,
        } = &self.endpoint
        else {
            return false;
        };
        *own_port == port
            && own.uid == workload.uid
            && own.addresses == workload.addresses
            && own.hostname == workload.hostname
            && own.network == workload.network
            && own.network_gateway == workload.network_gateway
            && own.tunnel_protocol == workload.tunnel_protocol
            && own.trust_domain == workload.trust_domain
            && own.namespace == workload.namespace
            && own.service_account == workload.service_account
    }

    /// Requests that it is working on.
    pub(crate) fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    /// A connection of `version`: one that is there, or a new one.
    ///
    /// # Errors
    /// If none can be made.
    pub(crate) async fn lease(
        &self,
        version: Version,
        backend: &Backend,
        upstream: &Upstream<'_>,
        limits: PoolLimits,
    ) -> Result<Lease, OpenError> {
        match version {
            Version::HTTP_2 => self.lease_http2(backend, upstream, limits).await,
            _ => self.lease_http1(backend, upstream, limits).await,
        }
    }

    async fn lease_http1(
        &self,
        backend: &Backend,
        upstream: &Upstream<'_>,
        limits: PoolLimits,
    ) -> Result<Lease, OpenError> {
        if let Some(lease) = self.http1.idle(limits).await {
            return Ok(lease);
        }
        let Connected { stream, .. } = connect(backend, upstream).await?;
        let opened = self.http1.open_http1(stream, limits).await;
        opened.map_err(OpenError::Handshake)
    }

    async fn lease_http2(
        &self,
        backend: &Backend,
        upstream: &Upstream<'_>,
        limits: PoolLimits,
    ) -> Result<Lease, OpenError> {
        if let Some(lease) = self.http2.stream(limits) {
            return Ok(lease);
        }
        let _turn = self.http2.turn().await;
        if let Some(lease) = self.http2.stream(limits) {
            return Ok(lease);
        }
        let Connected { stream, .. } = connect(backend, upstream).await?;
        let opened = self.http2.open_http2(stream, limits).await;
        opened.map_err(OpenError::Handshake)
    }

    /// Closes idle connections.
    pub(super) fn sweep(&self, limits: PoolLimits) {
        self.http1.sweep(limits);
        self.http2.sweep(limits);
    }

    /// Whether nothing uses it.
    pub(super) fn is_unused(&self) -> bool {
        self.active() == 0 && self.http1.len().0 == 0 && self.http2.len().1 == 0
    }
}

/// Boxed: connections are rare, and a request that needs none should not carry the room for one.
fn connect<'a>(
    backend: &'a Backend,
    upstream: &'a Upstream<'a>,
) -> Pin<Box<dyn Future<Output = Result<Connected, ConnectError>> + Send + 'a>> {
    Box::pin(backend.connect(upstream))
}
