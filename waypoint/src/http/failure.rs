//! A try that had no response: whose doing it was, whether the endpoint may have worked on it, what the client is told.

use http::{HeaderName, HeaderValue, StatusCode};
use mesh::l7::response_flags::Flag;

use super::{
    body::{Body, Broken},
    forward::h2_error,
    reply::Reply,
    upstream::{cluster::Unavailable, endpoint::OpenError, pool::SendError},
};

const OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");

/// Why a try had no response.
#[derive(Debug)]
pub(super) enum Cause {
    /// No endpoint to be had.
    Unavailable(Unavailable),
    /// No connection to the endpoint.
    Connect(OpenError),
    /// The endpoint refused the stream, or no byte of the request was sent: it was not processed.
    Refused(hyper::Error),
    /// The connection was an idle one that the endpoint had closed, as it may at any time.
    Stale(hyper::Error),
    /// Reset before response headers. Whether the request had been sent to its end.
    Reset {
        /// What broke.
        error: hyper::Error,
        /// Whether the request had been sent.
        sent: bool,
    },
    /// What came is not HTTP.
    Protocol(hyper::Error),
    /// What follows the answer could be read in two ways (RFC 9112 6.3), or as what nobody asked for (101).
    Ambiguous,
    /// The time for one try.
    PerTryTimeout,
    /// The time for all.
    Deadline,
    /// Nothing moved.
    Idle,
    /// The client broke its request off.
    Client,
}

/// A try without response.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) cause: Cause,
}

impl From<OpenError> for Failed {
    fn from(error: OpenError) -> Self {
        Self::new(Cause::Connect(error))
    }
}

impl Failed {
    pub(super) fn new(cause: Cause) -> Self {
        Self { cause }
    }

    /// What a request that was given to a connection came to. `reused`: the connection had carried others before.
    pub(super) fn sent(error: SendError, reused: bool, body: &Body) -> Self {
        let unsent = error.unsent.is_some();
        let error = error.error;
        let reason = h2_error(&error).map(|it| (it.reason(), it.is_remote(), it.is_go_away()));
        let refused = matches!(
            reason,
            Some((Some(h2::Reason::REFUSED_STREAM), true, _))
                | Some((Some(h2::Reason::NO_ERROR), true, true))
        );
        let cause = if unsent || refused {
            Cause::Refused(error)
        } else if is_clients(&error) {
            Cause::Client
        } else if error.is_parse() {
            Cause::Protocol(error)
        } else if reused && error.is_incomplete_message() {
            Cause::Stale(error)
        } else {
            Cause::Reset {
                error,
                sent: body.complete(),
            }
        };
        Self::new(cause)
    }

    /// Whether it was the endpoint that failed.
    pub(super) fn is_endpoints(&self) -> bool {
        match self.cause {
            Cause::Client | Cause::Unavailable(_) | Cause::Stale(_) => false,
            Cause::Connect(_)
            | Cause::Refused(_)
            | Cause::Reset { .. }
            | Cause::Protocol(_)
            | Cause::Ambiguous
            | Cause::PerTryTimeout
            | Cause::Deadline
            | Cause::Idle => true,
        }
    }

    /// Why the transport failed, for the log.
    pub(super) fn transport(&self) -> Option<String> {
        match &self.cause {
            Cause::Connect(error) => Some(chain(error)),
            Cause::Refused(error) | Cause::Stale(error) | Cause::Protocol(error) => {
                Some(chain(error))
            }
            Cause::Reset { error, .. } => Some(chain(error)),
            _ => None,
        }
    }

    fn flag(&self) -> Option<Flag> {
        Some(match &self.cause {
            Cause::Unavailable(Unavailable::Overflow) => Flag::UpstreamOverflow,
            Cause::Unavailable(Unavailable::NoEndpoint) => Flag::NoHealthyUpstream,
            Cause::Unavailable(Unavailable::Unknown) => Flag::NoCluster,
            Cause::Connect(_) => Flag::UpstreamConnectionFailure,
            Cause::Refused(error) | Cause::Reset { error, .. } => match h2_error(error) {
                Some(it) if it.is_reset() => Flag::UpstreamRemoteReset,
                _ => Flag::UpstreamConnectionTermination,
            },
            Cause::Stale(_) => Flag::UpstreamConnectionTermination,
            Cause::Protocol(_) | Cause::Ambiguous => Flag::UpstreamProtocolError,
            Cause::PerTryTimeout | Cause::Deadline => Flag::UpstreamRequestTimeout,
            Cause::Idle => Flag::StreamIdleTimeout,
            Cause::Client => Flag::DownstreamConnectionTermination,
        })
    }

    /// What the client is told.
    pub(super) fn reply(&self) -> Reply {
        let (status, details, body) = match &self.cause {
            Cause::Unavailable(Unavailable::Overflow) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "upstream_reset_before_response_started{overflow}",
                "upstream connect error or disconnect/reset before headers. reset reason: overflow",
            ),
            Cause::Unavailable(Unavailable::NoEndpoint) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "no_healthy_upstream",
                "no healthy upstream",
            ),
            Cause::Unavailable(Unavailable::Unknown) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "cluster_not_found",
                "no such backend",
            ),
            Cause::Connect(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "upstream_reset_before_response_started{connection_failure}",
                "upstream connect error or disconnect/reset before headers. reset reason: connection failure",
            ),
            Cause::Refused(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "upstream_reset_before_response_started{remote_refused_stream_reset}",
                "upstream connect error or disconnect/reset before headers. reset reason: remote refused stream reset",
            ),
            Cause::Stale(_) | Cause::Reset { .. } => (
                StatusCode::SERVICE_UNAVAILABLE,
                "upstream_reset_before_response_started{connection_termination}",
                "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
            ),
            Cause::Protocol(_) | Cause::Ambiguous => (
                StatusCode::BAD_GATEWAY,
                "upstream_reset_before_response_started{protocol_error}",
                "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
            ),
            Cause::PerTryTimeout => (
                StatusCode::GATEWAY_TIMEOUT,
                "upstream_per_try_timeout",
                "upstream request timeout",
            ),
            Cause::Deadline => (
                StatusCode::GATEWAY_TIMEOUT,
                "response_timeout",
                "upstream request timeout",
            ),
            Cause::Idle => (
                StatusCode::GATEWAY_TIMEOUT,
                "stream_idle_timeout",
                "stream timeout",
            ),
            Cause::Client => (
                StatusCode::BAD_REQUEST,
                "downstream_remote_disconnect",
                "the request broke off",
            ),
        };
        let mut reply = Reply::new(status, details).body(body);
        if let Some(flag) = self.flag() {
            reply = reply.flag(flag);
        }
        match self.cause {
            Cause::Unavailable(Unavailable::Overflow) => {
                reply.header(OVERLOADED, HeaderValue::from_static("true"))
            }
            // A call whose time is over has a status of its own (gRPC DEADLINE_EXCEEDED).
            Cause::Deadline | Cause::PerTryTimeout => reply.grpc_status(4),
            _ => reply,
        }
    }
}

/// Whether it was the client's body that failed, not the endpoint.
fn is_clients(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.is::<Broken>() {
            return true;
        }
        source = error.source();
    }
    false
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
