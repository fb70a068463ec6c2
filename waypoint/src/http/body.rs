//! Bodies in motion: streamed by default, kept only where something asked for it, always bounded.

use std::{
    error::Error as StdError,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::Instant};

use super::{
    arriving::Arriving,
    filter::grpc_web::{Decoder, NotBase64},
    grpc::MessageCounter,
};

/// How much of a request's body is kept for another try, in bytes.
pub(crate) const REPLAY_BYTES: usize = 64 * 1024;
/// How far a mirror may lag behind the request it copies, in bytes; then the copy is given up.
const TEE_BYTES: usize = 256 * 1024;
/// And in pieces.
const TEE_PIECES: usize = 64;

/// What ends a body early.
pub(crate) type BodyError = Box<dyn StdError + Send + Sync>;

/// The client went away, or sent something that is not a body.
#[derive(Debug, thiserror::Error)]
#[error("the request's body broke off")]
pub(crate) struct Broken(#[source] pub(crate) Option<Arc<hyper::Error>>);

/// A body is longer than what may be kept.
#[derive(Debug, thiserror::Error)]
#[error("the body is longer than {limit} bytes")]
pub(crate) struct TooLarge {
    /// What was allowed.
    pub(crate) limit: usize,
}

/// A request's body: the client's, as it arrives, with what was kept of it. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Body(Option<Arc<Mutex<Source>>>);

#[derive(Debug)]
struct Source {
    incoming: Arriving,
    hint: SizeHint,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// Up to which more is kept.
    keep_up_to: usize,
    /// Pieces from the start that are not kept any more: another try cannot have them.
    lost: bool,
    end: Option<End>,
    /// When all of it had come.
    ended: Option<Instant>,
    tees: Vec<Tee>,
    /// Of data that arrived.
    bytes: u64,
    /// gRPC messages that arrived; none: not counted.
    messages: Option<(MessageCounter, u64)>,
    decoder: Option<Decoder>,
}

#[derive(Clone, Debug)]
enum End {
    Trailers(Option<HeaderMap>),
    Broken(Option<Arc<hyper::Error>>),
}

impl Body {
    /// A body that is there as it arrives.
    pub(crate) fn new(incoming: Arriving) -> Self {
        if incoming.is_end_stream() {
            return Self(None);
        }
        let hint = incoming.size_hint();
        Self(Some(Arc::new(Mutex::new(Source {
            incoming,
            hint,
            kept: Vec::new(),
            kept_bytes: 0,
            keep_up_to: REPLAY_BYTES,
            lost: false,
            end: None,
            ended: None,
            tees: Vec::new(),
            bytes: 0,
            messages: None,
            decoder: None,
        }))))
    }

    /// No body.
    pub(crate) fn empty() -> Self {
        Self(None)
    }

    /// Whether there is none at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Whether another upload would be complete.
    pub(crate) fn replayable(&self) -> bool {
        self.0.as_ref().is_none_or(|it| !it.lock().lost)
    }

    /// Bytes that arrived so far.
    pub(crate) fn received(&self) -> u64 {
        self.0.as_ref().map_or(0, |it| it.lock().bytes)
    }

    /// When its last byte came; none: it has not. A request without a body is over with its head.
    pub(crate) fn ended(&self, head: Instant) -> Option<Instant> {
        match &self.0 {
            None => Some(head),
            Some(source) => source.lock().ended,
        }
    }

    /// Counts gRPC messages from here on.
    pub(crate) fn count_messages(&self) {
        if let Some(source) = &self.0 {
            source.lock().messages = Some((MessageCounter::default(), 0));
        }
    }

    /// Decodes from base64 what arrives from here on.
    pub(crate) fn decode_base64(&self) {
        if let Some(source) = &self.0 {
            let mut source = source.lock();
            source.decoder = Some(Decoder::default());
            source.hint = SizeHint::default();
        }
    }

    /// gRPC messages that arrived so far.
    pub(crate) fn messages(&self) -> u64 {
        let counted = |it: &Arc<Mutex<Source>>| it.lock().messages.as_ref().map(|(_, it)| *it);
        self.0.as_ref().and_then(counted).unwrap_or(0)
    }

    /// Whether all of it has arrived.
    pub(crate) fn complete(&self) -> bool {
        self.0.as_ref().is_none_or(|it| it.lock().complete())
    }

    /// Keeps nothing more for another try than what is kept: there will be none.
    pub(crate) fn release(&self) {
        if let Some(source) = &self.0 {
            source.lock().keep_up_to = 0;
        }
    }

    /// Waits for the whole body, which stays there for uploads.
    ///
    /// # Errors
    /// If it is longer than `limit`, or breaks off.
    pub(crate) async fn collect_up_to(&self, limit: usize) -> Result<Bytes, BodyError> {
        let Some(source) = &self.0 else {
            return Ok(Bytes::new());
        };
        source.lock().keep_up_to = limit.max(REPLAY_BYTES);
        loop {
            let more = std::future::poll_fn(|cx| source.lock().poll_more(cx)).await?;
            let source = source.lock();
            if source.kept_bytes > limit || source.lost {
                return Err(TooLarge { limit }.into());
            }
            if !more {
                let mut whole = BytesMut::with_capacity(source.kept_bytes);
                source
                    .kept
                    .iter()
                    .for_each(|it| whole.extend_from_slice(it));
                return Ok(whole.freeze());
            }
        }
    }

    /// Waits for at least `limit` bytes or the end; answers what is there, cut at `limit`, and whether it is all.
    ///
    /// # Errors
    /// If it breaks off.
    pub(crate) async fn peek_up_to(&self, limit: usize) -> Result<(Bytes, bool), BodyError> {
        let Some(source) = &self.0 else {
            return Ok((Bytes::new(), true));
        };
        source.lock().keep_up_to = limit.max(REPLAY_BYTES);
        loop {
            let more = std::future::poll_fn(|cx| source.lock().poll_more(cx)).await?;
            let source = source.lock();
            if !more || source.kept_bytes >= limit || source.lost {
                let mut start = BytesMut::with_capacity(source.kept_bytes.min(limit));
                for piece in &source.kept {
                    let room = limit - start.len();
                    start.extend_from_slice(&piece[..piece.len().min(room)]);
                }
                let all = !more && source.kept_bytes <= limit;
                return Ok((start.freeze(), all));
            }
        }
    }

    /// One upload of the body from its start. Only one may be in motion at a time.
    pub(crate) fn upload(&self) -> Upload {
        match &self.0 {
            None => Upload::Empty,
            Some(source) => Upload::Shared {
                source: Arc::clone(source),
                next: 0,
                ended: false,
            },
        }
    }

    /// A copy of the body as it passes. It never slows the body down: one that lags too far breaks off.
    pub(crate) fn tee(&self) -> Upload {
        let Some(source) = &self.0 else {
            return Upload::Empty;
        };
        let (send, receive) = mpsc::channel(TEE_PIECES);
        let lag = Arc::new(AtomicUsize::new(0));
        let mut source = source.lock();
        let tee = Tee {
            send,
            lag: Arc::clone(&lag),
        };
        let kept = source.kept.clone();
        let sent = kept.into_iter().all(|it| tee.send(Piece::Data(it)));
        if sent {
            source.tees.push(tee);
        }
        Upload::Copy { receive, lag }
    }
}

impl Source {
    /// Takes the next piece from the client; false: that was all.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, BodyError>> {
        match &self.end {
            Some(End::Trailers(_)) => return Poll::Ready(Ok(false)),
            Some(End::Broken(cause)) => {
                return Poll::Ready(Err(Box::new(Broken(cause.clone()))));
            }
            None => {}
        }
        match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => match self.decoded(data) {
                    Ok(data) => self.arrived(data),
                    Err(error) => {
                        self.end = Some(End::Broken(None));
                        self.tees.clear();
                        return Poll::Ready(Err(error.into()));
                    }
                },
                Err(frame) => self.finish(frame.into_trailers().ok()),
            },
            Some(Err(cause)) => {
                let cause = cause.downcast().ok().map(|it| Arc::new(*it));
                self.end = Some(End::Broken(cause.clone()));
                self.tees.clear();
                return Poll::Ready(Err(Box::new(Broken(cause))));
            }
            None => self.finish(None),
        }
        Poll::Ready(Ok(true))
    }

    fn complete(&self) -> bool {
        match &self.end {
            Some(End::Trailers(_)) => true,
            Some(End::Broken(_)) => false,
            None => self.incoming.is_end_stream(),
        }
    }

    fn decoded(&mut self, data: Bytes) -> Result<Bytes, NotBase64> {
        match &mut self.decoder {
            Some(decoder) => decoder.decode(&data),
            None => Ok(data),
        }
    }

    fn arrived(&mut self, data: Bytes) {
        self.bytes += data.len() as u64;
        if let Some((counter, messages)) = &mut self.messages {
            *messages += counter.count(&data);
        }
        self.tees.retain(|tee| tee.send(Piece::Data(data.clone())));
        self.kept_bytes += data.len();
        self.kept.push(data);
        // Nobody asks for more of a body whose length is known.
        if self.incoming.is_end_stream() {
            self.ended = Some(Instant::now());
        }
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) {
        for tee in self.tees.drain(..) {
            tee.send(Piece::End(trailers.clone()));
        }
        self.end = Some(End::Trailers(trailers));
        self.ended.get_or_insert_with(Instant::now);
    }

    /// The piece at `next`, for an upload. Pieces beyond what is kept are forgotten as they are taken.
    fn poll_piece(
        &mut self,
        cx: &mut Context<'_>,
        next: &mut usize,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            if let Some(piece) = self.kept.get(*next) {
                let piece = piece.clone();
                *next += 1;
                if self.kept_bytes > self.keep_up_to || self.lost {
                    self.forget(next);
                }
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            match ready!(self.poll_more(cx)) {
                Ok(true) => {}
                Ok(false) => {
                    let trailers = match &self.end {
                        Some(End::Trailers(trailers)) => trailers.clone(),
                        _ => None,
                    };
                    return Poll::Ready(trailers.map(|it| Ok(Frame::trailers(it))));
                }
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    fn forget(&mut self, next: &mut usize) {
        self.lost = true;
        let gone: usize = self.kept.drain(..*next).map(|it| it.len()).sum();
        self.kept_bytes -= gone;
        *next = 0;
    }
}

#[derive(Debug)]
struct Tee {
    send: mpsc::Sender<Piece>,
    lag: Arc<AtomicUsize>,
}

#[derive(Debug)]
pub(crate) enum Piece {
    Data(Bytes),
    End(Option<HeaderMap>),
}

impl Tee {
    /// False: the copy is given up, or nobody takes it any more.
    fn send(&self, piece: Piece) -> bool {
        if let Piece::Data(data) = &piece {
            let lag = self.lag.fetch_add(data.len(), Ordering::Relaxed) + data.len();
            if lag > TEE_BYTES {
                return false;
            }
        }
        self.send.try_send(piece).is_ok()
    }
}

/// A request's body on its way to an endpoint.
#[derive(Debug)]
pub(crate) enum Upload {
    /// No body.
    Empty,
    /// All at once.
    Full(Bytes),
    /// The client's.
    Shared {
        /// Shared with later tries.
        #[allow(private_interfaces, reason = "opaque to all but this module")]
        source: Arc<Mutex<Source>>,
        /// Index of the next piece.
        next: usize,
        /// Whether the end was told.
        ended: bool,
    },
    /// A mirror's.
    Copy {
        /// Pieces; closed without an end: the copy was given up.
        receive: mpsc::Receiver<Piece>,
        /// Bytes in it.
        lag: Arc<AtomicUsize>,
    },
}

/// A mirror lagged behind the request that it copies.
#[derive(Debug, thiserror::Error)]
#[error("the copy of the request was given up")]
struct GivenUp;

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Shared { ended: true, .. } => Poll::Ready(None),
            Self::Shared {
                source,
                next,
                ended,
            } => {
                let frame = ready!(source.lock().poll_piece(cx, next));
                *ended = !matches!(&frame, Some(Ok(frame)) if frame.is_data());
                Poll::Ready(frame)
            }
            Self::Copy { receive, lag } => match ready!(receive.poll_recv(cx)) {
                Some(Piece::Data(data)) => {
                    lag.fetch_sub(data.len(), Ordering::Relaxed);
                    Poll::Ready(Some(Ok(Frame::data(data))))
                }
                Some(Piece::End(trailers)) => {
                    *this = Self::Empty;
                    Poll::Ready(trailers.map(|it| Ok(Frame::trailers(it))))
                }
                None => Poll::Ready(Some(Err(GivenUp.into()))),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty | Self::Shared { ended: true, .. } => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Shared { .. } | Self::Copy { .. } => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            // Before its first piece: the length that the client told holds for every upload.
            Self::Shared {
                source, next: 0, ..
            } => source.lock().hint,
            Self::Shared { .. } | Self::Copy { .. } => SizeHint::default(),
        }
    }
}
