//! One endpoint of a cluster: the connections to it, its load, its health.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use http::Version;
use mesh::workload::Workload;
use parking_lot::Mutex;

use super::{
    outlier::Health,
    pool::{Lease, Pool, PoolLimits},
};
use crate::backend::{Backend, ConnectError, Connected, Endpoint, Upstream};

/// What is known of one endpoint.
#[derive(Debug)]
pub(crate) struct EndpointState {
    /// The workload.
    pub(crate) workload: Arc<Workload>,
    /// Where it listens.
    pub(crate) port: u16,
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
    pub(super) fn new(workload: Arc<Workload>, port: u16) -> Self {
        Self {
            workload,
            port,
            active: AtomicU32::new(0),
            health: Mutex::default(),
            http1: Arc::default(),
            http2: Arc::default(),
        }
    }

    /// What is dialled.
    pub(super) fn address(&self) -> Endpoint {
        Endpoint::Workload {
            workload: Arc::clone(&self.workload),
            port: self.port,
        }
    }

    /// Whether `workload` is reached and proven as this one is, so that connections to this one can serve it.
    pub(super) fn serves(&self, workload: &Workload, port: u16) -> bool {
        let own = &self.workload;
        self.port == port
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
