//! Calls of the waypoint itself, over the same endpoints and connections as requests.

use std::sync::{Arc, Weak};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Response, Version};
use http_body_util::BodyExt;
use net::report::Chain;

use super::upstream::ask::{Tracked, ask};
use crate::{
    service_call::{Answer, Answering, Call, CallError, Transport},
    waypoint::Waypoint,
};

/// Makes calls to services of the mesh, as long as the waypoint lives.
#[derive(Clone)]
pub(crate) struct MeshTransport(Weak<Waypoint>);

impl MeshTransport {
    pub(crate) fn new(waypoint: &Arc<Waypoint>) -> Self {
        Self(Arc::downgrade(waypoint))
    }

    /// For a waypoint that is still being made.
    pub(crate) fn of(waypoint: Weak<Waypoint>) -> Self {
        Self(waypoint)
    }
}

impl Transport for MeshTransport {
    fn call(&self, call: Call) -> Answering {
        let waypoint = self.0.clone();
        Box::pin(async move {
            let Some(waypoint) = waypoint.upgrade() else {
                return Err(CallError::Unreachable("the waypoint ends".to_owned()));
            };
            make(&waypoint, call).await
        })
    }
}

async fn make(waypoint: &Waypoint, call: Call) -> Result<Answer, CallError> {
    let snapshot = waypoint.snapshots.load();
    let version = match call.http2 {
        true => Version::HTTP_2,
        false => Version::HTTP_11,
    };
    let mut request = call.request;
    *request.version_mut() = version;
    if !call.http2 {
        origin_form(&mut request);
    }
    let asked = ask(
        waypoint,
        &snapshot,
        &call.service,
        call.port,
        version,
        request,
    )
    .await;
    let response = asked.map_err(|error| CallError::Unreachable(Chain(&error).to_string()))?;
    read(response, call.max_answer).await
}

/// HTTP/1.1 has the host in a header (RFC 9112, 3.2.1).
fn origin_form(request: &mut http::Request<Bytes>) {
    let authority = request.uri().authority();
    let host = authority.and_then(|it| http::HeaderValue::from_str(it.as_str()).ok());
    if let Some(host) = host {
        request.headers_mut().insert(http::header::HOST, host);
    }
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.map(http::Uri::from).unwrap_or_default();
}

async fn read(response: Response<Tracked>, limit: usize) -> Result<Answer, CallError> {
    let (head, mut body) = response.into_parts();
    let (mut bytes, mut trailers) = (BytesMut::new(), HeaderMap::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| CallError::Unreachable(error.to_string()))?;
        match frame.into_data() {
            Ok(data) if bytes.len() + data.len() > limit => return Err(CallError::TooLong(limit)),
            Ok(data) => bytes.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    Ok(Answer {
        head,
        body: bytes.freeze(),
        trailers,
    })
}
