//! gRPC-Web for backends that speak gRPC: the client's content types, base64, and trailers as the last piece of the
//! body (gRPC-Web protocol, "HTTP/2 behaviors are not expected").

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONTENT_LENGTH, CONTENT_TYPE, TE},
    request::Parts,
};
use hyper::body::{Body as _, Frame};

use super::super::{
    arriving::Arriving,
    body::{Body, BodyError},
};

/// How a client of gRPC-Web writes bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As they are.
    Binary,
    /// In base64.
    Text,
}

/// The request's, by its content type; none: it is not gRPC-Web.
pub(crate) fn encoding(headers: &HeaderMap) -> Option<Encoding> {
    let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let rest = text.strip_prefix("application/grpc-web")?;
    match rest.strip_prefix("-text") {
        Some(rest) if is_end(rest) => Some(Encoding::Text),
        None if is_end(rest) => Some(Encoding::Binary),
        _ => None,
    }
}

fn is_end(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with(['+', ';', ' '])
}

/// Makes a request one of gRPC.
pub(crate) fn translate(parts: &mut Parts, body: &Body, encoding: Encoding) {
    let headers = &mut parts.headers;
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/grpc+proto"),
    );
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.remove(HeaderName::from_static("accept"));
    if encoding == Encoding::Text {
        headers.remove(CONTENT_LENGTH);
        body.decode_base64();
    }
}

/// Makes the head of a response one of gRPC-Web.
pub(crate) fn translate_response(headers: &mut HeaderMap, encoding: Encoding) {
    headers.remove(CONTENT_LENGTH);
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static(match encoding {
            Encoding::Binary => "application/grpc-web+proto",
            Encoding::Text => "application/grpc-web-text+proto",
        }),
    );
}

/// A response of gRPC as gRPC-Web has it.
#[derive(Debug)]
pub(crate) struct Encoder {
    incoming: Arriving,
    encoding: Encoding,
    over: bool,
}

impl Encoder {
    /// Of this response.
    pub(crate) fn new(incoming: Arriving, encoding: Encoding) -> Self {
        Self {
            incoming,
            encoding,
            over: false,
        }
    }

    /// The next piece.
    pub(crate) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let piece = match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
            None => {
                self.over = true;
                return Poll::Ready(None);
            }
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => data,
                Err(frame) => {
                    self.over = true;
                    trailer_piece(&frame.into_trailers().unwrap_or_default())
                }
            },
        };
        let piece = match self.encoding {
            Encoding::Binary => piece,
            Encoding::Text => BASE64_STANDARD.encode(&piece).into(),
        };
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

/// Trailers as a message with the highest bit of its flags set.
fn trailer_piece(trailers: &HeaderMap) -> Bytes {
    let mut text = BytesMut::new();
    for (name, value) in trailers {
        text.put_slice(name.as_str().as_bytes());
        text.put_slice(b": ");
        text.put_slice(value.as_bytes());
        text.put_slice(b"\r\n");
    }
    let mut piece = BytesMut::with_capacity(text.len() + 5);
    piece.put_u8(0x80);
    // Bounded by the largest list of headers that is accepted.
    piece.put_u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
    piece.put_slice(&text);
    piece.freeze()
}

/// Decodes base64 that arrives in pieces, each of which may end with padding.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    rest: Vec<u8>,
}

/// It is not base64.
#[derive(Debug, thiserror::Error)]
#[error("the body is not base64")]
pub(crate) struct NotBase64;

impl Decoder {
    /// What `data` completes.
    ///
    /// # Errors
    /// If it is not base64.
    pub(crate) fn decode(&mut self, data: &[u8]) -> Result<Bytes, NotBase64> {
        self.rest.extend_from_slice(data);
        let whole = self.rest.len() / 4 * 4;
        let rest = self.rest.split_off(whole);
        let complete = std::mem::replace(&mut self.rest, rest);
        let mut decoded = BytesMut::with_capacity(complete.len() / 4 * 3);
        for part in padded(&complete) {
            let bytes = BASE64_STANDARD.decode(part).map_err(|_| NotBase64)?;
            decoded.put_slice(&bytes);
        }
        Ok(decoded.freeze())
    }
}

/// Cuts after each group that ends with padding.
fn padded(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest
            .chunks(4)
            .position(|group| group.ends_with(b"="))
            .map_or(rest.len(), |at| (at + 1) * 4);
        let (part, later) = rest.split_at(end.min(rest.len()));
        rest = later;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded_however_it_is_cut_and_padded() {
        let text = [
            BASE64_STANDARD.encode(b"hello"),
            BASE64_STANDARD.encode(b"a"),
            BASE64_STANDARD.encode(b"world!"),
        ]
        .concat();
        for size in 1..=text.len() {
            let mut decoder = Decoder::default();
            let decoded: Vec<u8> = text
                .as_bytes()
                .chunks(size)
                .flat_map(|it| decoder.decode(it).unwrap().to_vec())
                .collect();
            assert_eq!(decoded, b"helloaworld!", "in pieces of {size}");
        }
        assert!(Decoder::default().decode(b"a%b=").is_err());
    }

    #[test]
    fn trailers_become_the_last_piece() {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        let piece = trailer_piece(&trailers);
        assert_eq!(&piece[..], b"\x80\0\0\0\x10grpc-status: 0\r\n");
    }

    #[test]
    fn grpc_web_is_told_by_its_content_type() {
        let rows = [
            ("application/grpc-web", Some(Encoding::Binary)),
            ("application/grpc-web+proto", Some(Encoding::Binary)),
            ("application/grpc-web-text", Some(Encoding::Text)),
            ("application/grpc-web-text+proto", Some(Encoding::Text)),
            ("application/grpc", None),
            ("application/grpc-webby", None),
        ];
        for (value, expected) in rows {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(value));
            assert_eq!(encoding(&headers), expected, "{value}");
        }
    }
}
