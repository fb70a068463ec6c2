//! What is known of one CONNECT stream, for everyone who works on what is in it.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh::{
    authority::Authority,
    flow::{Party, peer_workload},
    headers::{self, Baggage, Traceparent},
    l7::{
        dispatch::Target,
        request::{ConnectionFacts, source_labels},
        via::{self, Via},
    },
    names::{NamespacedHostname, NetworkAddress, Str},
    workload::Workload,
};
use net::tls::PeerIdentity;

use crate::{snapshot::Snapshot, waypoint::Waypoint};

/// One CONNECT stream that has been dispatched.
pub(crate) struct Connection {
    pub(crate) waypoint: Arc<Waypoint>,
    pub(crate) accepted: Instant,
    /// The peer's end of the TCP connection; the client pod's address, unless it came through a gateway.
    pub(crate) client: SocketAddr,
    /// Who asks, as its certificate proves.
    pub(crate) peer: Arc<PeerIdentity>,
    pub(crate) authority: Authority,
    /// What it is for.
    pub(crate) target: Target,
    /// The service's key, where it is for one.
    pub(crate) service: Option<NamespacedHostname>,
    /// Where the client went: the service's address and port, or the workload's.
    pub(crate) destination: SocketAddr,
    pub(crate) trace: Option<Traceparent>,
    /// The sender is a waypoint, and says so.
    pub(crate) passed_waypoint: bool,
    /// The way that what is passed on to another waypoint has come by: the client's, and the service that it is for.
    pub(crate) via: Via,
    /// Another waypoint's route asks for this subset of the service's endpoints: kept to where our own routes leave the
    /// choice among all of them.
    pub(crate) subset: Option<Str>,
    /// The client, for telemetry: the record of its address, else what its identity and baggage tell.
    pub(crate) source: Party,
}

impl Connection {
    /// What routes and policies are asked about. `sni`: of TLS that is passed through.
    pub(crate) fn facts<'a>(
        &'a self,
        snapshot: &'a Snapshot,
        sni: Option<&'a str>,
    ) -> ConnectionFacts<'a> {
        let at = NetworkAddress {
            network: self.waypoint.config.node.network.clone(),
            address: self.client.ip(),
        };
        let identity = &self.peer.identity;
        ConnectionFacts {
            service: self.service.as_ref(),
            port: self.target.port(),
            destination: self.destination.ip(),
            source: self.client,
            identity: Some(identity),
            source_labels: source_labels(&snapshot.mesh, &snapshot.l7, &at, identity),
            sni,
        }
    }

    /// What a CONNECT that is accepted is told: what the client's tunnel labels its metrics with (the endpoint, or until one
    /// is chosen, us), and whether we keep to the subset that it asked for.
    pub(crate) fn response_headers(&self, endpoint: &Workload) -> HeaderMap {
        let baggage = Baggage::from(endpoint).to_string();
        let subset = self.subset.as_ref().map(|it| it.to_string());
        let told = [(headers::BAGGAGE, Some(baggage)), (via::SUBSET, subset)];
        let told = told.into_iter().filter_map(|(name, text)| {
            let value = HeaderValue::try_from(text?).ok()?;
            Some((HeaderName::from_static(name), value))
        });
        told.collect()
    }

    /// The subset to choose from where a route names `service` and maybe a subset of it.
    pub(crate) fn subset_of(
        &self,
        service: &NamespacedHostname,
        named: Option<&Str>,
    ) -> Option<Str> {
        let asked = self.subset.as_ref();
        let asked = asked.filter(|_| self.service.as_ref() == Some(service));
        named.or(asked).cloned()
    }
}

/// Who connects, for telemetry: the record of its address, unless it came through a gateway; then what it tells.
pub(crate) fn source_of(
    waypoint: &Waypoint,
    snapshot: &Snapshot,
    client: SocketAddr,
    peer: &PeerIdentity,
    told: &HeaderMap,
) -> Party {
    let network = header_texts(told, headers::FORWARDED_NETWORK).next();
    let own = &waypoint.config.node.network;
    match peer_workload(&snapshot.mesh, own, client.ip(), network) {
        Some(workload) => Party::of_workload(workload, Some(&peer.identity)),
        None => {
            let baggage = Baggage::parse(header_texts(told, headers::BAGGAGE));
            Party::of_baggage(&baggage, Some(&peer.identity))
        }
    }
}

/// The values of a header that are text.
pub(crate) fn header_texts<'a>(
    headers: &'a HeaderMap,
    name: &'static str,
) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter();
    values.filter_map(|value| value.to_str().ok())
}
