//! What all connections share.

use std::sync::Arc;

use mesh::identity::Identity;
use net::{
    ca::{Certificates, FetchError, Priority},
    hbone,
    tls::WorkloadCertificate,
};

use crate::{
    authentication::Authentication,
    backend::Backend,
    config::Config,
    detect::ServerFirst,
    flow::Registry,
    limits::{Handshakes, Peers},
    metrics::Metrics,
    overload::Overload,
    snapshot::Snapshots,
    telemetry::Telemetry,
};

/// One waypoint.
pub(crate) struct Waypoint {
    pub(crate) config: Arc<Config>,
    pub(crate) snapshots: Snapshots,
    pub(crate) identity: Identity,
    pub(crate) certificates: Certificates,
    pub(crate) backend: Backend,
    /// Connections that are carried as bytes; HTTP tells each request.
    pub(crate) connections: Arc<Registry>,
    pub(crate) server_first: ServerFirst,
    pub(crate) handshakes: Handshakes,
    pub(crate) peers: Arc<Peers>,
    pub(crate) overload: Overload,
    pub(crate) http2: hbone::Config,
    pub(crate) metrics: Metrics,
    pub(crate) http: crate::http::Engine,
    pub(crate) authentication: Authentication,
    pub(crate) telemetry: Telemetry,
}

impl Waypoint {
    /// Our certificate, asked for where there is none yet.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn certificate(&self) -> Result<Arc<WorkloadCertificate>, FetchError> {
        match self.certificates.current(&self.identity) {
            Some(certificate) => Ok(certificate),
            None => {
                let identity = &self.identity;
                self.certificates.fetch(identity, Priority::RealTime).await
            }
        }
    }
}
