//! The bytes of a TLS connection once its handshake is done.
//!
//! rustls moves a record at a time: it reads 4 KiB at once, and copies what it opened twice more. A tunnel is nothing but
//! these bytes, so here they are read and written in large pieces, and opened and sealed on the way from one buffer to the next,
//! or where they are.
//! Buffers exist only while bytes are in them.

use std::{
    io::{self, IoSlice},
    mem::{self, MaybeUninit},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use rustls::{
    AlertDescription, ContentType, Error, HandshakeType, PeerMisbehaved, SupportedCipherSuite,
    kernel::KernelConnection,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::record::{HEADER, MAX_PLAIN, MAX_RECORD, OVERHEAD, RecordKey, SealError, alert_of};

/// The first read after silence, the factor by which reads grow while they come back full, and the largest.
const FIRST_READ: usize = 4 * 1024;
const READ_GROWTH: usize = 4;
const MAX_READ: usize = 256 * 1024;
/// Bytes for the socket from which on no more are taken: what a copy reads at once goes out in one call.
const WRITE_ROOM: usize = 256 * 1024;
/// Records in a row that may come without content: a peer could keep us busy with nothing.
const QUIET_RECORDS: u32 = 32;
/// The longest message after the handshake that is skipped: a session ticket.
const MAX_TICKET: usize = 1 << 16;
/// RFC 8446 4.6.3: `update_not_requested` and `update_requested`.
const NOT_REQUESTED: u8 = 0;
const REQUESTED: u8 = 1;
/// RFC 8446 6: the levels of an alert.
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// The keys after these, in each direction.
pub(super) trait Rekey: Send + Sync {
    /// The key with which we seal from now on.
    fn next_tx(&mut self) -> Result<RecordKey, Error>;
    /// The key with which the peer does.
    fn next_rx(&mut self) -> Result<RecordKey, Error>;
    /// How many records may be sealed with one key.
    fn confidentiality_limit(&self) -> u64;
}

impl<Data: Send + Sync> Rekey for KernelConnection<Data> {
    fn next_tx(&mut self) -> Result<RecordKey, Error> {
        let (sequence, secrets) = self.update_tx_secret()?;
        RecordKey::new(sequence, &secrets)
    }

    fn next_rx(&mut self) -> Result<RecordKey, Error> {
        let (sequence, secrets) = self.update_rx_secret()?;
        RecordKey::new(sequence, &secrets)
    }

    fn confidentiality_limit(&self) -> u64 {
        match self.negotiated_cipher_suite() {
            SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
            SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
        }
    }
}

/// A TLS 1.3 connection after its handshake, over `IO`.
pub(super) struct RecordStream<IO> {
    io: IO,
    inbound: Inbound,
    outbound: Outbound,
    rekey: Box<dyn Rekey>,
}

/// What comes from the peer.
struct Inbound {
    key: RecordKey,
    /// What was received before the handshake was over, already opened.
    early: BytesMut,
    /// An opened record's content and trailer, then what has arrived and is still sealed.
    buffer: BytesMut,
    /// Opened bytes at the front of the buffer, and those after them that belong to their record.
    plain: usize,
    trailer: usize,
    next_read: usize,
    /// Records without content since the last with.
    quiet: u32,
    /// Bytes of a session ticket that are still to come.
    ticket: usize,
    /// The peer has said that no more follows.
    ended: bool,
    failed: Option<Error>,
}

/// What goes to the peer.
struct Outbound {
    key: RecordKey,
    /// Records; the last one may still be filled.
    buffer: Vec<u8>,
    /// What the socket has taken of it.
    sent: usize,
    /// Where the record begins that is still filled.
    filling: Option<usize>,
    limit: u64,
    /// A key update that the peer asked for is among the records.
    updated: bool,
    closed: bool,
}

impl Inbound {
    /// Hands out what is opened.
    fn give(&mut self, into: &mut ReadBuf<'_>) {
        give(&mut self.early, usize::MAX, into);
        self.plain -= give(&mut self.buffer, self.plain, into);
        if self.plain == 0 {
            self.buffer.advance(mem::take(&mut self.trailer));
        }
    }

    /// Reads from the socket; the number of bytes.
    fn poll_fill<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let read = if self.buffer.is_empty() && self.next_read == FIRST_READ {
            ready!(self.poll_first(io, cx))?
        } else {
            self.buffer.reserve(self.next_read);
            match poll_read_buf(Pin::new(io), cx, &mut self.buffer) {
                Poll::Ready(read) => read?,
                Poll::Pending if self.buffer.is_empty() => {
                    self.buffer = BytesMut::new();
                    return Poll::Pending;
                }
                Poll::Pending => return Poll::Pending,
            }
        };
        self.fit(read);
        Poll::Ready(Ok(read))
    }

    /// Reads onto the stack and keeps what came: most reads after silence find nothing yet, or little.
    fn poll_first<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut memory = [MaybeUninit::uninit(); FIRST_READ];
        let mut first = ReadBuf::uninit(&mut memory);
        ready!(Pin::new(io).poll_read(cx, &mut first))?;
        self.buffer = BytesMut::from(first.filled());
        Poll::Ready(Ok(first.filled().len()))
    }

    /// Sizes the next read by this one.
    fn fit(&mut self, read: usize) {
        if read >= self.next_read {
            self.next_read = (self.next_read * READ_GROWTH).min(MAX_READ);
        } else if read < self.next_read / 8 {
            self.next_read = (self.next_read / READ_GROWTH).max(FIRST_READ);
        }
    }

    fn count_quiet(&mut self) -> Result<(), Error> {
        self.quiet += 1;
        match self.quiet {
            0..=QUIET_RECORDS => Ok(()),
            _ => Err(PeerMisbehaved::TooManyWarningAlertsReceived.into()),
        }
    }

    /// RFC 8446 6: what an alert says.
    fn alert(&mut self, content: &[u8]) -> Result<(), Error> {
        let &[_, description] = content else {
            return Err(rustls::InvalidMessage::MessageTooShort.into());
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => self.ended = true,
            AlertDescription::UserCanceled => {}
            fatal => return Err(Error::AlertReceived(fatal)),
        }
        Ok(())
    }
}

fn give(from: &mut BytesMut, most: usize, into: &mut ReadBuf<'_>) -> usize {
    let given = from.len().min(most).min(into.remaining());
    into.put_slice(&from[..given]);
    from.advance(given);
    given
}

impl Outbound {
    /// Sealed bytes that the socket has not taken.
    fn waiting(&self) -> usize {
        self.buffer.len() - self.sent
    }

    /// Takes what there is room for.
    fn push(&mut self, data: &[u8]) -> Result<usize, SealError> {
        let taken = data.len().min(WRITE_ROOM.saturating_sub(self.waiting()));
        self.make_room(taken);
        let mut left = &data[..taken];
        while !left.is_empty() {
            if self.filling.is_none() && left.len() >= MAX_PLAIN {
                let (now, later) = left.split_at(MAX_PLAIN);
                self.key.seal_from(now, &mut self.buffer)?;
                left = later;
                continue;
            }
            let start = self.fill_from();
            let content = self.buffer.len() - start - HEADER;
            let (now, later) = left.split_at(left.len().min(MAX_PLAIN - content));
            self.buffer.extend_from_slice(now);
            left = later;
            if content + now.len() == MAX_PLAIN {
                self.seal(ContentType::ApplicationData)?;
            }
        }
        Ok(taken)
    }

    /// Room for `content` in records, where possible in what the socket has taken already.
    fn make_room(&mut self, content: usize) {
        let more = content + (content / MAX_PLAIN + 2) * OVERHEAD;
        if self.sent > 0 && self.buffer.capacity() - self.buffer.len() < more {
            self.buffer.drain(..self.sent);
            self.filling = self.filling.map(|start| start - self.sent);
            self.sent = 0;
        }
        self.buffer.reserve(more);
    }

    /// Where the record begins that is filled; a new one if none is.
    fn fill_from(&mut self) -> usize {
        *self.filling.get_or_insert_with(|| {
            let start = self.buffer.len();
            self.buffer.extend_from_slice(&[0; HEADER]);
            start
        })
    }

    /// Ends the record that is filled.
    fn seal(&mut self, content_type: ContentType) -> Result<(), SealError> {
        match self.filling.take() {
            Some(start) => self.key.seal(&mut self.buffer, start, content_type),
            None => Ok(()),
        }
    }

    /// Adds a record of its own.
    fn message(&mut self, content_type: ContentType, content: &[u8]) -> Result<(), SealError> {
        self.seal(ContentType::ApplicationData)?;
        self.fill_from();
        self.buffer.extend_from_slice(content);
        self.seal(content_type)
    }

    fn alert(&mut self, level: u8, description: AlertDescription) -> Result<(), SealError> {
        if mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        self.message(ContentType::Alert, &[level, description.into()])
    }

    /// Writes what is sealed until all but `leave` bytes are with the socket.
    fn poll_send<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
        leave: usize,
    ) -> Poll<io::Result<()>> {
        let sealed = self.filling.unwrap_or(self.buffer.len());
        while self.sent < sealed && self.waiting() > leave {
            let written =
                ready!(Pin::new(&mut *io).poll_write(cx, &self.buffer[self.sent..sealed]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        Poll::Ready(Ok(()))
    }
}

impl From<SealError> for io::Error {
    fn from(error: SealError) -> Self {
        Self::other(error)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> RecordStream<IO> {
    /// Goes on with `io` where the handshake ended: `early` was opened already, `sealed` has arrived and was not.
    pub(super) fn new(
        io: IO,
        (tx, rx): (RecordKey, RecordKey),
        rekey: Box<dyn Rekey>,
        (early, sealed): (BytesMut, BytesMut),
    ) -> Self {
        // A key is renewed well before its last record.
        let limit = rekey.confidentiality_limit().saturating_sub(1 << 10);
        Self {
            io,
            inbound: Inbound {
                key: rx,
                early,
                buffer: sealed,
                plain: 0,
                trailer: 0,
                next_read: FIRST_READ,
                quiet: 0,
                ticket: 0,
                ended: false,
                failed: None,
            },
            outbound: Outbound {
                key: tx,
                buffer: Vec::new(),
                sent: 0,
                filling: None,
                limit,
                updated: false,
                closed: false,
            },
            rekey,
        }
    }

    /// Opens the next record that is there; whether one was. Content goes into `room` at once where it has room for the record.
    fn open(&mut self, room: &mut ReadBuf<'_>) -> Result<bool, Error> {
        let inbound = &mut self.inbound;
        if inbound.ended {
            return Ok(false);
        }
        if let Some(opened) = inbound.key.open_into(&inbound.buffer, room)? {
            inbound.buffer.advance(opened.whole);
            if opened.is_data() {
                inbound.quiet = 0;
                room.advance(opened.content);
                return Ok(true);
            }
            inbound.count_quiet()?;
            let content = room.initialize_unfilled_to(opened.content).to_vec();
            self.control(opened.content_type, &content)?;
            return Ok(true);
        }
        let Some(opened) = inbound.key.open(&mut inbound.buffer)? else {
            return Ok(false);
        };
        if opened.is_data() {
            inbound.quiet = 0;
            inbound.buffer.advance(HEADER);
            inbound.plain = opened.content;
            inbound.trailer = opened.whole - HEADER - opened.content;
            return Ok(true);
        }
        inbound.count_quiet()?;
        let mut record = inbound.buffer.split_to(opened.whole);
        record.advance(HEADER);
        self.control(opened.content_type, &record[..opened.content])?;
        Ok(true)
    }

    fn control(&mut self, content_type: ContentType, content: &[u8]) -> Result<(), Error> {
        match content_type {
            ContentType::ApplicationData => Ok(()),
            ContentType::Alert => self.inbound.alert(content),
            ContentType::Handshake => self.handshake(content),
            got_type => Err(Error::InappropriateMessage {
                expect_types: vec![ContentType::ApplicationData],
                got_type,
            }),
        }
    }

    /// What may follow a handshake (RFC 8446 4.6): tickets, which nobody asked for, and new keys.
    fn handshake(&mut self, mut content: &[u8]) -> Result<(), Error> {
        loop {
            let skipped = content.len().min(self.inbound.ticket);
            self.inbound.ticket -= skipped;
            content = &content[skipped..];
            let Some((&[kind, high, middle, low], rest)) = content.split_first_chunk() else {
                return match content {
                    [] => Ok(()),
                    _ => Err(rustls::InvalidMessage::MessageTooShort.into()),
                };
            };
            let length = usize::try_from(u32::from_be_bytes([0, high, middle, low]));
            match (HandshakeType::from(kind), length) {
                (HandshakeType::NewSessionTicket, Ok(length)) if length <= MAX_TICKET => {
                    self.inbound.ticket = length;
                    content = rest;
                }
                // New keys begin with the next record, so nothing may follow in this one.
                (HandshakeType::KeyUpdate, Ok(1)) if rest.len() == 1 => {
                    return self.key_update(rest[0]);
                }
                (got_type, _) => {
                    return Err(Error::InappropriateHandshakeMessage {
                        expect_types: vec![HandshakeType::KeyUpdate],
                        got_type,
                    });
                }
            }
        }
    }

    fn key_update(&mut self, request: u8) -> Result<(), Error> {
        match request {
            NOT_REQUESTED => {}
            REQUESTED if self.outbound.updated || self.outbound.closed => {}
            REQUESTED => {
                self.outbound.updated = true;
                self.renew()?;
            }
            _ => return Err(rustls::InvalidMessage::InvalidKeyUpdate.into()),
        }
        self.inbound.key = self.rekey.next_rx()?;
        Ok(())
    }

    /// Tells the peer that our next record has a new key.
    fn renew(&mut self) -> Result<(), Error> {
        let message = [HandshakeType::KeyUpdate.into(), 0, 0, 1, NOT_REQUESTED];
        let told = self.outbound.message(ContentType::Handshake, &message);
        told.map_err(|_| Error::EncryptError)?;
        self.outbound.key = self.rekey.next_tx()?;
        Ok(())
    }

    /// Tells the peer what it did, as far as the socket takes it, and keeps failing.
    fn fail(&mut self, error: Error, cx: &mut Context<'_>) -> io::Error {
        if !matches!(error, Error::AlertReceived(_)) {
            let told = self.outbound.alert(FATAL, alert_of(&error));
            // The error that is returned matters more than whether the peer could be told.
            let _ = told.map(|()| self.outbound.poll_send(&mut self.io, cx, 0));
        }
        self.inbound.failed = Some(error.clone());
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    fn poll_flush_records(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outbound.seal(ContentType::ApplicationData)?;
        ready!(self.outbound.poll_send(&mut self.io, cx, 0))?;
        self.outbound.buffer = Vec::new();
        self.outbound.sent = 0;
        self.outbound.updated = false;
        Pin::new(&mut self.io).poll_flush(cx)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for RecordStream<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        if let Some(error) = &this.inbound.failed {
            let error = io::Error::new(io::ErrorKind::InvalidData, error.clone());
            return Poll::Ready(Err(error));
        }
        loop {
            this.inbound.give(buf);
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match this.open(buf) {
                Ok(true) => continue,
                Ok(false) => {}
                // What came before is not lost: the error waits for the next call.
                Err(error) if buf.filled().len() > before => {
                    this.fail(error, cx);
                    return Poll::Ready(Ok(()));
                }
                Err(error) => return Poll::Ready(Err(this.fail(error, cx))),
            }
            if buf.filled().len() > before || this.inbound.ended {
                return Poll::Ready(Ok(()));
            }
            if ready!(this.inbound.poll_fill(&mut this.io, cx))? == 0 {
                // A connection that was cut must not look complete.
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for RecordStream<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    /// Takes bytes into records; a record that is not full goes out with the next flush.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.outbound.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.outbound.key.used() >= this.outbound.limit {
            this.renew().map_err(io::Error::other)?;
        }
        ready!(this.outbound.poll_send(&mut this.io, cx, WRITE_ROOM / 2))?;
        let mut taken = 0;
        for buf in bufs {
            let now = this.outbound.push(buf)?;
            taken += now;
            if now < buf.len() {
                break;
            }
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_flush_records(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.outbound
            .alert(WARNING, AlertDescription::CloseNotify)?;
        ready!(this.poll_flush_records(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

const _: () = assert!(MAX_RECORD < MAX_READ, "a read holds a record");

#[cfg(test)]
mod tests;
