//! The stream of one connection: gRPC's framing of requests and responses (PROTOCOL-HTTP2 of gRPC).
//!
//! Not tonic's own, which keeps a buffer as long as the longest response for as long as the stream lives: the first
//! response tells the whole mesh, and the stream lives for hours. Here a response has memory of its own, which goes with it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Status, body::Body, metadata::MetadataMap, transport::Channel};
use tower::ServiceExt;

use super::{
    MAX_RESPONSE,
    wire::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
};

const METHOD: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// What the server says.
#[derive(Debug)]
pub(super) struct Responses {
    body: Body,
    /// Of the next response, what has come.
    come: BytesMut,
}

/// Calls the method over `channel`.
///
/// # Errors
/// The server cannot be reached, or refuses.
pub(super) async fn open(
    channel: Channel,
    metadata: MetadataMap,
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
) -> Result<Responses, Status> {
    let frames = ReceiverStream::new(requests).map(|it| Ok::<_, Status>(Frame::data(framed(&it))));
    let mut request = http::Request::post(METHOD)
        .version(http::Version::HTTP_2)
        .header(header::TE, "trailers")
        .header(header::CONTENT_TYPE, "application/grpc")
        .body(Body::new(StreamBody::new(frames)))
        .map_err(|error| Status::from_error(error.into()))?;
    request.headers_mut().extend(metadata.into_headers());
    let response = channel.oneshot(request).await;
    let (head, body) = response
        .map_err(|error| Status::from_error(error.into()))?
        .into_parts();
    status_of(head.status, &head.headers)?;
    Ok(Responses {
        body,
        come: BytesMut::new(),
    })
}

fn framed(message: &DeltaDiscoveryRequest) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX + length);
    frame.put_u8(0);
    // A request of 4 GiB would name more resources than a response can hold.
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A buffer that grows has room always.
    let _ = message.encode(&mut frame);
    frame.freeze()
}

/// What the head, or the trailers, of a response say of the call.
fn status_of(http: StatusCode, headers: &HeaderMap) -> Result<(), Status> {
    let mut headers = headers.clone();
    // Nobody reads them here, and the library panics at those that are not base64.
    headers.remove("grpc-status-details-bin");
    match Status::from_header_map(&headers) {
        Some(status) if status.code() != Code::Ok => Err(status),
        Some(_) => Ok(()),
        None if http == StatusCode::OK => Ok(()),
        None => Err(Status::new(code_of(http), format!("HTTP status {http}"))),
    }
}

/// As gRPC maps what a proxy before the server answers (http-grpc-status-mapping).
fn code_of(http: StatusCode) -> Code {
    match http.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502..=504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

impl Responses {
    /// The next response; `None` once the server has ended the call well. Cancel-safe.
    ///
    /// # Errors
    /// How the call failed, or what is wrong with the response.
    pub(super) async fn message(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            let Some(frame) = self.body.frame().await else {
                return self.at_end();
            };
            match frame?.into_data() {
                Ok(data) => self.come.extend_from_slice(&data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    status_of(StatusCode::OK, &trailers)?;
                }
            }
        }
    }

    /// A response that has come whole.
    fn take(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let Some(length) = length(&self.come)? else {
            return Ok(None);
        };
        if self.come.len() < PREFIX + length {
            self.come
                .reserve((PREFIX + length).saturating_sub(self.come.len()));
            return Ok(None);
        }
        let rest = BytesMut::from(&self.come[PREFIX + length..]);
        let mut whole = std::mem::replace(&mut self.come, rest);
        whole.advance(PREFIX);
        whole.truncate(length);
        let unreadable = |error| Status::internal(format!("a response is not readable: {error}"));
        DeltaDiscoveryResponse::decode(whole.freeze())
            .map(Some)
            .map_err(unreadable)
    }

    fn at_end(&self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        match self.come.is_empty() {
            true => Ok(None),
            false => Err(Status::internal("the stream ended within a response")),
        }
    }
}

/// How long the response is that begins here, once its prefix has come.
fn length(come: &[u8]) -> Result<Option<usize>, Status> {
    let Some((&[compressed, a, b, c, d], _)) = come.split_first_chunk::<PREFIX>() else {
        return Ok(None);
    };
    if compressed != 0 {
        return Err(Status::internal(
            "a response is compressed, which was not asked for",
        ));
    }
    match usize::try_from(u32::from_be_bytes([a, b, c, d])) {
        Ok(length) if length <= MAX_RESPONSE => Ok(Some(length)),
        _ => Err(Status::out_of_range(format!(
            "a response is longer than {MAX_RESPONSE} bytes"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn responses(come: &[u8]) -> Responses {
        Responses {
            body: Body::empty(),
            come: come.into(),
        }
    }

    fn frame(nonce: &str) -> Vec<u8> {
        let message = DeltaDiscoveryResponse {
            nonce: nonce.to_owned(),
            ..Default::default()
        };
        let encoded = message.encode_to_vec();
        let length = u32::try_from(encoded.len()).unwrap();
        [&[0], &length.to_be_bytes()[..], &encoded].concat()
    }

    #[test]
    fn responses_are_told_apart_wherever_they_are_cut() {
        let all = [frame("one"), frame(""), frame(&"long".repeat(1000))].concat();
        for cut in 0..all.len() {
            let mut reader = responses(&all[..cut]);
            let mut nonces = Vec::new();
            while let Some(message) = reader.take().unwrap() {
                nonces.push(message.nonce);
            }
            reader.come.extend_from_slice(&all[cut..]);
            while let Some(message) = reader.take().unwrap() {
                nonces.push(message.nonce);
            }
            assert_eq!(nonces, ["one", "", &"long".repeat(1000)]);
            assert!(reader.at_end().unwrap().is_none());
        }
    }

    #[test]
    fn a_response_leaves_no_buffer_behind() {
        let mut reader =
            responses(&[frame(&"x".repeat(1 << 20)), frame("y")[..3].to_vec()].concat());
        assert!(reader.take().unwrap().is_some());
        assert_eq!((reader.come.len(), reader.come.capacity()), (3, 3));
    }

    #[test]
    fn what_is_no_response_ends_the_call() {
        let long = u32::try_from(MAX_RESPONSE).unwrap() + 1;
        let long = [&[0], &long.to_be_bytes()[..]].concat();
        let cases: [(&[u8], Code); 3] = [
            (&[1, 0, 0, 0, 0], Code::Internal),
            (&long, Code::OutOfRange),
            (&[0, 0, 0, 0, 1, 0xff], Code::Internal),
        ];
        for (come, code) in cases {
            assert_eq!(responses(come).take().unwrap_err().code(), code, "{come:?}");
        }
        assert_eq!(
            responses(&[0, 0]).at_end().unwrap_err().code(),
            Code::Internal
        );
    }

    #[test]
    fn a_proxys_refusal_has_its_code() {
        let status = |http| status_of(http, &HeaderMap::new()).map_err(|it| it.code());
        assert_eq!(status(StatusCode::OK), Ok(()));
        assert_eq!(status(StatusCode::UNAUTHORIZED), Err(Code::Unauthenticated));
        assert_eq!(status(StatusCode::BAD_GATEWAY), Err(Code::Unavailable));
        let mut told = HeaderMap::new();
        told.insert("grpc-status", "8".parse().unwrap());
        told.insert("grpc-status-details-bin", "?".parse().unwrap());
        let refused = status_of(StatusCode::OK, &told).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
    }
}
