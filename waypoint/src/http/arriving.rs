//! A message's body as the library gives it, but for one thing: the library takes a stream of HTTP/2 that was reset with
//! NO_ERROR for one that has ended. Only a server may reset one so, behind a whole response (RFC 9113 8.1); of any other the end
//! is missing, and what is missing must not look whole to who reads on.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::Version;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

use super::body::BodyError;

/// The end of a body is missing.
#[derive(Debug, thiserror::Error)]
#[error("the stream was reset before its end")]
struct BrokeOff;

/// A body of a message that came by `version`.
#[derive(Debug)]
pub(crate) struct Arriving {
    incoming: Incoming,
    version: Version,
}

impl Arriving {
    pub(crate) fn new(incoming: Incoming, version: Version) -> Self {
        Self { incoming, version }
    }

    /// Of HTTP/1.1 the library tells what is missing.
    fn has_broken_off(&self) -> bool {
        self.version == Version::HTTP_2 && !self.incoming.is_end_stream()
    }
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        Poll::Ready(match frame {
            Some(frame) => Some(frame.map_err(BodyError::from)),
            None if self.has_broken_off() => Some(Err(BrokeOff.into())),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
