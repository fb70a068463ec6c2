//! The metrics of connections and certificates, registered here; requests' are telemetry's.

use std::{borrow::Cow, sync::Arc};

use mesh::flow::{Direction, EndReason, TcpLabels};
use net::metrics::{self, Parties, Tcp};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// The families. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Metrics {
    tcp: Tcp<TcpLabels>,
    /// The ends that open connections are told with.
    pub(crate) parties: Parties,
    refused: Family<RefusedLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reporter: &'static str,
    reason: Cow<'static, str>,
    response_flags: &'static str,
}

impl Metrics {
    /// Registers everything. `before_scrape` brings the byte counters of open connections up to date.
    pub(crate) fn register(
        registry: &mut Registry,
        istio_version: &str,
        before_scrape: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        metrics::register_build(registry, "waypoint", istio_version);
        // Collectors are asked in the order of their registration: this one before the TCP families.
        metrics::before_scrape(registry, before_scrape);
        let new = Self {
            tcp: Tcp::register(registry),
            parties: Parties::default(),
            refused: Family::default(),
        };
        registry.register(
            "leyline_connections_refused",
            "Connections and CONNECTs refused before anything but their ends was known, by reason",
            new.refused.clone(),
        );
        new
    }

    /// Counts a connection as opened; what is returned counts the rest.
    pub(crate) fn open(&self, labels: &TcpLabels) -> metrics::Flow {
        self.tcp.open(labels)
    }

    /// Counts an accepted socket while the guard lives.
    pub(crate) fn socket(&self) -> metrics::SocketGuard {
        self.tcp.socket(Direction::Waypoint)
    }

    /// Counts what was refused early.
    pub(crate) fn refused(&self, reason: EndReason) {
        let labels = RefusedLabels {
            reporter: Direction::Waypoint.reporter(),
            reason: reason.label(),
            response_flags: reason.flag().as_str(),
        };
        self.refused.get_or_create(&labels).inc();
    }
}
