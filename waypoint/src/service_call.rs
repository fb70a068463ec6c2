//! Calls of the waypoint itself to services of the mesh: authorizers, collectors.
//!
//! What makes a call is behind [`Transport`], so that whoever calls is tested without a mesh.

use std::{future::Future, pin::Pin, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header, response};
use mesh::names::NamespacedHostname;
use prost::Message;

/// One call: the whole request is there.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) service: NamespacedHostname,
    pub(crate) port: u16,
    /// Whether it must be HTTP/2, as for gRPC.
    pub(crate) http2: bool,
    pub(crate) request: Request<Bytes>,
    /// The longest body of an answer, in bytes.
    pub(crate) max_answer: usize,
}

/// The whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: response::Parts,
    pub(crate) body: Bytes,
    pub(crate) trailers: HeaderMap,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// No endpoint, no connection, or it broke.
    #[error("{0}")]
    Unreachable(String),
    /// It took longer than it may.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The answer is longer than it may be.
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
    /// gRPC that is none.
    #[error("the answer is no gRPC: {0}")]
    Protocol(&'static str),
    /// The service refused the call.
    #[error("grpc status {0}: {1}")]
    Status(u32, String),
}

/// What is given back; boxed so that transports can be told apart at run time.
pub(crate) type Answering = Pin<Box<dyn Future<Output = Result<Answer, CallError>> + Send>>;

/// Makes calls. One try, no routes, no policies; the caller sets the deadline.
pub(crate) trait Transport: Send + Sync + 'static {
    fn call(&self, call: Call) -> Answering;
}

/// A call that must be over in time.
pub(crate) async fn within(
    transport: &dyn Transport,
    call: Call,
    limit: Duration,
) -> Result<Answer, CallError> {
    match tokio::time::timeout(limit, transport.call(call)).await {
        Ok(answer) => answer,
        Err(_) => Err(CallError::TimedOut(limit)),
    }
}

/// The request of a gRPC call with one message (gRPC over HTTP/2, "Requests").
pub(crate) fn grpc_request(
    service: &NamespacedHostname,
    port: u16,
    path: &'static str,
    message: &impl Message,
) -> Request<Bytes> {
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(length + 5);
    body.put_u8(0);
    body.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    body.put_slice(&message.encode_to_vec());
    let mut request = post(service, port, path, body.freeze());
    let headers = request.headers_mut();
    let grpc = HeaderValue::from_static("application/grpc");
    headers.insert(header::CONTENT_TYPE, grpc);
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    request
}

/// A POST of a body to a path of a service.
pub(crate) fn post(
    service: &NamespacedHostname,
    port: u16,
    path: &str,
    body: Bytes,
) -> Request<Bytes> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    let uri = format!("http://{}:{port}{path}", service.hostname);
    // A host and path that are none stay `/`, and the service answers so.
    *request.uri_mut() = uri.parse().unwrap_or_default();
    request
}

/// The one message of a gRPC answer.
pub(crate) fn grpc_message<M: Message + Default>(answer: &Answer) -> Result<M, CallError> {
    if answer.head.status != StatusCode::OK {
        return Err(CallError::Protocol("its status is not 200"));
    }
    let status = answer
        .trailers
        .get("grpc-status")
        .or_else(|| answer.head.headers.get("grpc-status"));
    let status = status.and_then(|it| it.to_str().ok()?.parse::<u32>().ok());
    match status {
        Some(0) => {}
        Some(status) => {
            let told = answer.trailers.get("grpc-message");
            let told = told.or_else(|| answer.head.headers.get("grpc-message"));
            let told = told.map(|it| String::from_utf8_lossy(it.as_bytes()).into_owned());
            return Err(CallError::Status(status, told.unwrap_or_default()));
        }
        None => return Err(CallError::Protocol("it has no grpc-status")),
    }
    let mut body = answer.body.clone();
    if body.len() < 5 || body.get_u8() != 0 {
        return Err(CallError::Protocol("no message, or a compressed one"));
    }
    let length = usize::try_from(body.get_u32()).unwrap_or(usize::MAX);
    if length != body.len() {
        return Err(CallError::Protocol("not one message"));
    }
    M::decode(body).map_err(|_| CallError::Protocol("its message cannot be read"))
}
