//! A request of the waypoint's own to a service, or a copy of a client's: one try, no route, no policy.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, Version};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use mesh::{draw::Draw, l7::via::Via, names::NamespacedHostname};

use super::{
    ClusterKey, Permit,
    cluster::{Cluster, Unavailable},
    endpoint::{EndpointState, OpenError},
    members::{Carries, Members, Wanted},
    pool::{Held, Lease},
};
use crate::{
    backend::{Upstream, keepalive},
    http::{
        arriving::Arriving,
        body::{BodyError, Upload},
    },
    snapshot::Snapshot,
    waypoint::Waypoint,
};

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// There is no endpoint to ask.
    #[error("no endpoint: {0:?}")]
    Unavailable(Unavailable),
    /// It could not be reached.
    #[error("connect")]
    Open(#[from] OpenError),
    /// It did not answer.
    #[error("send the request")]
    Send(#[source] hyper::Error),
}

/// To whom a request goes.
pub(crate) struct Call<'a> {
    pub(crate) waypoint: &'a Waypoint,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) members: Arc<Members>,
    pub(crate) version: Version,
    /// The address that counts for the choice between families.
    pub(crate) destination: SocketAddr,
    /// The way of the client's request that it is a copy of, which no service's waypoint is gone around with; none: it is
    /// the waypoint's own.
    pub(crate) via: Option<&'a Via>,
}

impl Call<'_> {
    /// Sends it to one endpoint.
    ///
    /// # Errors
    /// If there is no response.
    pub(crate) async fn send(
        &self,
        request: Request<Upload>,
    ) -> Result<Response<Tracked>, AskError> {
        let wanted = Wanted {
            tried: &[],
            hash: None,
            session: None,
            destination: self.destination,
            host: request.uri().host(),
            via: self.via,
            carries: Carries::request(self.version),
            draw: Draw(rand::random()),
        };
        let permit = self.cluster.acquire(&self.members, &wanted);
        let permit = permit.map_err(AskError::Unavailable)?;
        let lease = open(
            self.waypoint,
            &self.members,
            permit.endpoint(),
            self.version,
            self.destination,
            None,
        );
        let lease = lease.await.inspect_err(|_| permit.failed())?;
        let (response, held) = lease.send(request).await.map_err(|failed| {
            permit.failed();
            AskError::Send(failed.error)
        })?;
        permit.answered(response.status().as_u16());
        Ok(response.map(|incoming| Tracked {
            incoming,
            held,
            _permit: permit,
        }))
    }
}

/// Asks `service`. The time that it may take is the caller's to give.
///
/// # Errors
/// If there is no response.
pub(crate) async fn ask(
    waypoint: &Waypoint,
    snapshot: &Snapshot,
    service: &NamespacedHostname,
    port: u16,
    version: Version,
    request: Request<Bytes>,
) -> Result<Response<Tracked>, AskError> {
    let cluster = waypoint.http.upstreams.cluster(&ClusterKey::Service {
        service: service.clone(),
        port,
        subset: None,
    });
    let members = cluster.members(snapshot);
    let call = Call {
        waypoint,
        cluster,
        members,
        version,
        destination: (std::net::Ipv4Addr::UNSPECIFIED, port).into(),
        via: None,
    };
    call.send(request.map(Upload::Full)).await
}

/// A connection to an endpoint of `members`: one that is there, or a new one.
///
/// # Errors
/// If none can be made.
pub(in crate::http) async fn open(
    waypoint: &Waypoint,
    members: &Members,
    endpoint: &EndpointState,
    version: Version,
    destination: SocketAddr,
    client: Option<SocketAddr>,
) -> Result<Lease, OpenError> {
    let is_ours = endpoint.endpoint.is_ours();
    let proxy_protocol = members.policy.proxy_protocol.filter(|_| is_ours);
    let upstream = Upstream {
        service: members.service.as_ref(),
        destination,
        endpoint: endpoint.endpoint.clone(),
        // Others will use the connection too, unless it begins with the client's address.
        client: proxy_protocol.and(client),
        trace: None,
        tls: members.tls(version).filter(|_| is_ours),
        proxy_protocol,
        // Requests are for the service itself.
        forward_to: None,
        keepalive: keepalive(&members.policy.pool),
        deadline: members.connect_timeout,
    };
    endpoint
        .lease(version, &waypoint.backend, &upstream, members.limits)
        .await
}

/// A response's body; its connection is used again when it was read to its end.
#[derive(Debug)]
pub(crate) struct Tracked {
    incoming: Arriving,
    held: Held,
    _permit: Permit,
}

impl HttpBody for Tracked {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.incoming).poll_frame(cx);
        let over = matches!(polled, Poll::Ready(None)) || this.incoming.is_end_stream();
        if over {
            this.held.finish(true);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
