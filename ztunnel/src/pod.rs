//! What the parts that serve one pod share: who it is, its sockets, its tunnels, its open connections.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::HeaderValue;
use mesh::{
    headers::Baggage,
    identity::Identity,
    outcome::{LocalWorkload, Need, Outcome, Refusal},
    view::MeshView,
    workload::Workload,
};
use net::{
    ca::{Certificates, FetchError, Priority},
    dns::{ResolvConf, Resolver},
    drain, hbone,
    lanes::Lanes,
    mesh_state::MeshState,
    netns::Netns,
    socket::{Connector, Factory, SourceAddress},
    tls::{Revocations, WorkloadCertificate},
};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    config::{Config, OriginalSource},
    connect,
    flow::Registry,
    handshakes::Handshakes,
    identities::{Held, Identities},
    metrics::Metrics,
    neighbours::{Neighbours, Witnesses},
    pods::PodUid,
};

/// How long a decision waits for what it lacks: the pod's record, a policy that it names.
pub(crate) const WAIT: Duration = Duration::from_secs(5);
/// TCP connect, to whatever.
pub(crate) const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// TLS handshake, either side.
pub(crate) const TLS_DEADLINE: Duration = Duration::from_secs(10);

/// What all pods of the node share.
pub(crate) struct Node {
    pub(crate) config: Arc<Config>,
    pub(crate) state: MeshState,
    pub(crate) certificates: Certificates,
    pub(crate) identities: Arc<Identities>,
    pub(crate) metrics: Metrics,
    pub(crate) resolver: Resolver,
    pub(crate) upstreams: Arc<ResolvConf>,
    pub(crate) http2: hbone::Config,
    /// Where connections run.
    pub(crate) lanes: Lanes,
    pub(crate) revocations: Revocations,
    pub(crate) neighbours: Neighbours,
    /// Connections of one pod at a time.
    pub(crate) max_pod_connections: usize,
}

/// A pod has as many connections as it may.
#[derive(Debug, thiserror::Error)]
#[error("the pod has {limit} connections open already, as many as one may have")]
pub(crate) struct TooMany {
    limit: usize,
}

/// One pod, or ourselves as one.
pub(crate) struct Pod {
    pub(crate) uid: PodUid,
    pub(crate) binding: LocalWorkload,
    pub(crate) node: Arc<Node>,
    pub(crate) sockets: Factory,
    /// Sockets of connections that are not tunnels.
    pub(crate) connector: Connector,
    pub(crate) pool: hbone::Pool,
    pub(crate) handshakes: Arc<Handshakes>,
    /// Neighbours that are reached from socket to socket.
    pub(crate) witnesses: Witnesses,
    /// Room for connections.
    room: Arc<Semaphore>,
    pub(crate) inbound: Arc<Registry>,
    pub(crate) outbound: Arc<Registry>,
    /// Whether applications see their clients' addresses.
    pub(crate) original_source: OriginalSource,
    /// What headers tell of the pod's record, as it was last.
    told: Mutex<Option<Told>>,
    /// Started when the pod begins to terminate: peers are told to open no new streams.
    pub(crate) farewell: drain::Trigger,
}

/// A record, and the baggage that tells of it.
struct Told {
    record: Arc<Workload>,
    baggage: Option<HeaderValue>,
}

impl Node {
    /// Sockets of a pod of this node.
    pub(crate) fn pod_sockets(&self, netns: Netns) -> Factory {
        Factory {
            netns: Some(netns),
            mark: self.config.inpod.mark,
            reuse_port: self.config.inpod.port_reuse,
            ipv6: self.config.inpod.ipv6,
            keepalive: self.config.keepalive(),
        }
    }

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
    /// A pod that nothing listens for yet. Must be made inside the runtime that will serve it.
    pub(crate) fn new(
        node: Arc<Node>,
        uid: PodUid,
        binding: LocalWorkload,
        sockets: Factory,
        original_source: OriginalSource,
    ) -> Arc<Self> {
        let config = hbone::PoolConfig {
            http: node.http2.clone(),
            max_streams: node.config.http2.max_streams_per_connection.into(),
            unused_release: node.config.http2.unused_release_timeout,
            max_spread: most_tunnels(node.lanes.count()),
            tcp_deadline: CONNECT_DEADLINE,
            tls_deadline: TLS_DEADLINE,
            ..hbone::PoolConfig::default()
        };
        let room = node.max_pod_connections;
        let dialing = sockets.clone();
        let dial = move |destination| {
            let dialing = dialing.clone();
            async move {
                let dialled = dialing.connect(destination, SourceAddress::Own).await;
                // The kind is what tells "refused" from "unreachable"; the error keeps its causes.
                dialled.map_err(|error| io::Error::new(error.io_kind(), error))
            }
        };
        Arc::new(Self {
            uid,
            binding,
            pool: hbone::Pool::new(config, dial),
            node,
            connector: Connector::new(sockets.clone()),
            sockets,
            handshakes: Arc::default(),
            witnesses: Witnesses::default(),
            room: Arc::new(Semaphore::new(room)),
            inbound: Arc::default(),
            outbound: Arc::default(),
            original_source,
            told: Mutex::default(),
            farewell: drain::channel().0,
        })
    }

    /// The pod's record, waited for.
    pub(crate) async fn record(&self) -> Result<(Arc<Workload>, Arc<MeshView>), Refusal> {
        let deadline = Instant::now() + WAIT;
        let decide = |view: &Arc<MeshView>| self.node.record(view, &self.binding);
        self.node.state.decide(deadline, decide).await
    }

    /// Room for one connection, until what is answered is dropped.
    pub(crate) fn enter(&self) -> Result<OwnedSemaphorePermit, TooMany> {
        let limit = self.node.max_pod_connections;
        let room = self.room.clone().try_acquire_owned();
        room.map_err(|_| TooMany { limit })
    }

    /// Keeps the pod's certificate fresh, where the pod's record is known now.
    pub(crate) fn hold_identity(&self) -> Option<Held> {
        match self.node.record(&self.node.state.view(), &self.binding) {
            Outcome::Go(record) => Some(self.node.identities.hold(&record.identity())),
            Outcome::Refuse(_) | Outcome::Need(_) => None,
        }
    }

    /// The baggage that tells peers of the pod: written once for each version of its record.
    pub(crate) fn baggage(&self, record: &Arc<Workload>) -> Option<HeaderValue> {
        let mut told = self.told.lock();
        if let Some(known) = &*told
            && Arc::ptr_eq(&known.record, record)
        {
            return known.baggage.clone();
        }
        let baggage = connect::value(Baggage::from(&**record).to_string());
        *told = Some(Told {
            record: record.clone(),
            baggage: baggage.clone(),
        });
        baggage
    }

    /// The certificate of a workload of this pod, waited for.
    pub(crate) async fn certificate(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, FetchError> {
        let certificates = &self.node.certificates;
        certificates.fetch(identity, Priority::RealTime).await
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

/// Tunnels to one peer over which the streams of a lane are spread: those of several lanes are apart already.
fn most_tunnels(lanes: usize) -> usize {
    match lanes {
        1 => 2,
        _ => 1,
    }
}
