//! What the parts that serve one pod share: who it is, its sockets, its tunnels, its open connections.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh::{
    identity::Identity,
    outcome::{LocalWorkload, Need, Outcome, Refusal},
    view::MeshView,
    workload::Workload,
};
use net::{
    ca::Certificates,
    drain, hbone,
    mesh_state::MeshState,
    socket::{Factory, SourceAddress},
    tls::WorkloadCertificate,
};
use tokio::time::{Instant, timeout};

use crate::{
    config::{Config, OriginalSource},
    connections::Registry,
    dns::{ResolvConf, Resolver},
    flow::Live,
    metrics::Metrics,
    pods::PodUid,
};

/// How long a decision waits for what it lacks: the pod's record, a policy that it names.
pub(crate) const WAIT: Duration = Duration::from_secs(5);
/// TCP connect, to whatever.
pub(crate) const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// TLS handshake, either side.
pub(crate) const TLS_DEADLINE: Duration = Duration::from_secs(10);
/// Until there is a certificate for a pod.
const CERTIFICATE_DEADLINE: Duration = Duration::from_secs(10);

/// What all pods of the node share.
pub(crate) struct Node {
    pub(crate) config: Arc<Config>,
    pub(crate) state: MeshState,
    pub(crate) certificates: Certificates,
    pub(crate) metrics: Metrics,
    pub(crate) resolver: Resolver,
    pub(crate) upstreams: Arc<ResolvConf>,
    pub(crate) http2: hbone::Config,
}

/// One pod, or ourselves as one.
pub(crate) struct Pod {
    pub(crate) uid: PodUid,
    pub(crate) binding: LocalWorkload,
    pub(crate) node: Arc<Node>,
    pub(crate) sockets: Factory,
    pub(crate) pool: hbone::Pool,
    pub(crate) inbound: Arc<Registry<Live>>,
    pub(crate) outbound: Arc<Registry<Live>>,
    /// Whether applications see their clients' addresses.
    pub(crate) original_source: OriginalSource,
    /// Started when the pod begins to terminate: peers are told to open no new streams.
    pub(crate) farewell: drain::Trigger,
}

impl Node {
    /// Who is local: every workload, where the node has no name.
    fn name(&self) -> &str {
        self.config.node.name.as_deref().unwrap_or_default()
    }

    /// The record that a pod of this node is bound to, on this view.
    pub(crate) fn record(
        &self,
        view: &MeshView,
        binding: &LocalWorkload,
    ) -> Outcome<Arc<Workload>> {
        match view.local_workload(binding, self.name()) {
            Some(workload) => Outcome::Go(workload.clone()),
            None => Outcome::Need(Need::LocalWorkload(binding.clone())),
        }
    }
}

impl Pod {
    /// The pod's record, waited for.
    pub(crate) async fn record(&self) -> Result<(Arc<Workload>, Arc<MeshView>), Refusal> {
        let deadline = Instant::now() + WAIT;
        let decide = |view: &Arc<MeshView>| self.node.record(view, &self.binding);
        self.node.state.decide(deadline, decide).await
    }

    /// The certificate of a workload of this pod, waited for.
    pub(crate) async fn certificate(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let fetched = self.node.certificates.get(identity);
        match timeout(CERTIFICATE_DEADLINE, fetched).await {
            Ok(Ok(certificate)) => Ok(certificate),
            Ok(Err(source)) => Err(CertificateError::Fetch {
                identity: identity.clone(),
                source,
            }),
            Err(_) => Err(CertificateError::Late {
                identity: identity.clone(),
                after: CERTIFICATE_DEADLINE,
            }),
        }
    }

    /// How to dial the application on behalf of `client`. A connection that comes back to its own address cannot have
    /// that address as a foreign source.
    pub(crate) fn source_for(&self, client: SocketAddr, destination: SocketAddr) -> SourceAddress {
        let address = client.ip().to_canonical();
        if address == destination.ip() || destination.ip().is_loopback() {
            return SourceAddress::Own;
        }
        match self.original_source {
            OriginalSource::BestEffort => SourceAddress::Preferred(address),
            OriginalSource::Required => SourceAddress::Required(address),
            OriginalSource::Never => SourceAddress::Own,
        }
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateError {
    /// The CA refuses or cannot be asked.
    #[error("no certificate for {identity}")]
    Fetch {
        identity: Identity,
        #[source]
        source: net::ca::FetchError,
    },
    /// The CA takes too long.
    #[error("no certificate for {identity} within {after:?}")]
    Late { identity: Identity, after: Duration },
}
