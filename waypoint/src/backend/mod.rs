//! The way to endpoints: from one that was chosen to a connection that bytes or requests can be sent on.
//!
//! Endpoints of the mesh are reached over HBONE as ourselves, those without over plain TCP, those of other networks
//! through their gateways; what is outside by address or name. PROXY header and TLS, where asked for, come inside.

mod dial;
mod error;
mod forward_proxy;
mod happy_eyeballs;
mod stream;
#[cfg(test)]
mod tests;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh::{
    headers::{Baggage, Traceparent},
    identity::Identity,
    l7::{
        backend::{BackendTls, ConnectionPool},
        via::Via,
    },
    names::Str,
    outbound::Hop,
    service::Service,
    workload::Workload,
};
use net::socket::Keepalive;

pub(crate) use dial::Backend;
pub(crate) use error::{ConnectError, Failure};
pub(crate) use stream::Stream;

/// An endpoint that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A workload of the mesh view, and its port.
    Workload { workload: Arc<Workload>, port: u16 },
    /// A workload's HBONE port, for a tunnel that ends there and not here.
    Tunnel {
        workload: Arc<Workload>,
        address: SocketAddr,
    },
    /// Outside, by address.
    Address(SocketAddr),
    /// Outside, by name.
    Hostname { name: Str, port: u16 },
    /// The waypoint of the service, for this port of it, and for these of its endpoints. The way that the connection came
    /// by keeps it from going round.
    Waypoint {
        port: u16,
        subset: Option<Str>,
        via: Via,
    },
}

/// What to connect to, and for whom.
#[derive(Clone, Debug)]
pub(crate) struct Upstream<'a> {
    /// The service that the endpoint is of; none: a workload on its own.
    pub(crate) service: Option<&'a Arc<Service>>,
    /// What the client addressed: decides between address families, and names the service's port to other networks.
    pub(crate) destination: SocketAddr,
    pub(crate) endpoint: Endpoint,
    /// The client, for `Forwarded` and the PROXY header; none on connections that several clients share.
    pub(crate) client: Option<SocketAddr>,
    /// The trace that the connection belongs to; none on connections that several requests share.
    pub(crate) trace: Option<Traceparent>,
    /// Inside, where asked for.
    pub(crate) tls: Option<Tls<'a>>,
    /// 1 or 2.
    pub(crate) proxy_protocol: Option<u8>,
    /// The endpoint is a forward proxy, which is asked to connect there.
    pub(crate) forward_to: Option<&'a str>,
    /// Of plain connections, where it is not the usual one: tunnels are shared by services and look after themselves.
    pub(crate) keepalive: Option<Keepalive>,
    /// Until bytes can be sent.
    pub(crate) deadline: Duration,
}

/// TLS to the application.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tls<'a> {
    pub(crate) settings: &'a BackendTls,
    /// The name that is asked for where the settings name none: the request's host.
    pub(crate) host: &'a str,
    /// In the order of preference; may be empty.
    pub(crate) alpn: &'a [&'a [u8]],
}

impl Endpoint {
    /// Whether its service's policies for connections are to be kept here. What is between another waypoint and its
    /// endpoints is that one's.
    pub(crate) fn is_ours(&self) -> bool {
        !matches!(self, Self::Waypoint { .. })
    }

    /// Its record, where it has one.
    pub(crate) fn workload(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Workload { workload, .. } | Self::Tunnel { workload, .. } => Some(workload),
            Self::Address(_) | Self::Hostname { .. } | Self::Waypoint { .. } => None,
        }
    }
}

/// A connection to an endpoint.
pub(crate) struct Connected {
    pub(crate) stream: Stream,
    /// What was dialled.
    pub(crate) address: SocketAddr,
    pub(crate) hop: Hop,
    /// Who is there, as its certificate proves; not of TLS inside.
    pub(crate) peer: Option<Identity>,
    /// What the peer tells of the endpoint, for telemetry.
    pub(crate) baggage: Option<Baggage>,
}

/// TCP keepalive as a policy asks for it; what it leaves open is as usual.
pub(crate) fn keepalive(pool: &ConnectionPool) -> Option<Keepalive> {
    let (probes, time, interval) = pool.keepalive?;
    let usual = Keepalive::default();
    Some(Keepalive {
        time: time.unwrap_or(usual.time),
        interval: interval.unwrap_or(usual.interval),
        retries: probes.unwrap_or(usual.retries),
        ..usual
    })
}
