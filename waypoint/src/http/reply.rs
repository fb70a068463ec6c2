//! Answers that the waypoint gives itself: refusals, faults, failures of backends.

use std::borrow::Cow;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use mesh::l7::response_flags::{Flag, Flags};
use percent::encode;

/// An answer that no backend gave.
///
/// Rendered as plain HTTP, or for a gRPC request as a response without body whose headers tell the gRPC status
/// (gRPC over HTTP/2, "Trailers-Only").
#[derive(Debug)]
pub(crate) struct Reply {
    /// The HTTP status.
    pub(crate) status: StatusCode,
    /// Whose doing it is.
    pub(crate) flags: Flags,
    /// For the log, in Envoy's words where it has some (`route_not_found`).
    pub(crate) details: Cow<'static, str>,
    /// For the client; short.
    pub(crate) body: Bytes,
    /// Added to the answer.
    pub(crate) headers: HeaderMap,
    /// In the place of the one that follows from the status.
    pub(crate) grpc_status: Option<u16>,
}

impl Reply {
    /// An answer of `status` without body or flag; `details` is for the log.
    pub(crate) fn new(status: StatusCode, details: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            flags: Flags::default(),
            details: details.into(),
            body: Bytes::new(),
            headers: HeaderMap::new(),
            grpc_status: None,
        }
    }

    /// Tells whose doing it is.
    pub(crate) fn flag(mut self, flag: Flag) -> Self {
        self.flags.insert(flag);
        self
    }

    /// A text for the client.
    pub(crate) fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// Adds a header.
    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.append(name, value);
        self
    }

    /// The gRPC status, where it is not the one of the HTTP status.
    pub(crate) fn grpc_status(mut self, status: u16) -> Self {
        self.grpc_status = Some(status);
        self
    }

    /// The response. `grpc`: the request is gRPC.
    pub(crate) fn render(self, grpc: bool) -> Response<Bytes> {
        if grpc {
            return self.render_grpc();
        }
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        if !response.body().is_empty() {
            let text = HeaderValue::from_static("text/plain");
            response.headers_mut().entry(CONTENT_TYPE).or_insert(text);
        }
        response
    }

    fn render_grpc(self) -> Response<Bytes> {
        let status = self
            .grpc_status
            .unwrap_or_else(|| mesh::l7::edit::grpc_status(self.status));
        let mut response = Response::new(Bytes::new());
        let headers = response.headers_mut();
        *headers = self.headers;
        headers.remove(CONTENT_LENGTH);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(GRPC_STATUS, HeaderValue::from(status));
        if let Some(message) = encode(&self.body) {
            headers.insert(GRPC_MESSAGE, message);
        }
        response
    }
}

/// `grpc-status`.
pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// `grpc-message`.
pub(crate) const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

mod percent {
    use http::HeaderValue;

    /// A text as `grpc-message` has it: percent-encoded outside of printable ASCII. None: there is none.
    pub(super) fn encode(text: &[u8]) -> Option<HeaderValue> {
        if text.is_empty() {
            return None;
        }
        let mut out = Vec::with_capacity(text.len());
        for byte in text {
            match byte {
                b' '..=b'$' | b'&'..=b'~' => out.push(*byte),
                _ => out.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            }
        }
        HeaderValue::from_maybe_shared(bytes::Bytes::from(out)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_client_gets_a_status_it_understands() {
        let reply = Reply::new(StatusCode::SERVICE_UNAVAILABLE, "no_healthy_upstream")
            .flag(Flag::NoHealthyUpstream)
            .body("no healthy upstream: 100%");
        let response = reply.render(true);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert_eq!(
            response.headers()["grpc-message"],
            "no healthy upstream: 100%25"
        );
        assert!(response.body().is_empty());
    }
}
