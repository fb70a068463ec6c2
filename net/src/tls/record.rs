//! TLS 1.3 records (RFC 8446 5), sealed and opened in the buffers that they travel in.
//!
//! rustls makes the handshake and derives every key; what is done here with a key is the one AEAD call per record. One
//! [`RecordKey`] is one direction under one traffic secret.

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, InvalidMessage, PeerMisbehaved,
};
use tokio::io::ReadBuf;

/// Type, legacy version and length.
pub(super) const HEADER: usize = 5;
/// The AEAD's tag, which is the same size for every suite of TLS 1.3.
const TAG: usize = 16;
/// The most that one record carries (RFC 8446 5.1).
pub(super) const MAX_PLAIN: usize = 1 << 14;
/// The most that a record may hold after its header (RFC 8446 5.2).
const MAX_SEALED: usize = MAX_PLAIN + 256;
/// The largest record on the wire.
pub(super) const MAX_RECORD: usize = HEADER + MAX_SEALED;
/// What a record adds to its content: header, true type, tag.
pub(super) const OVERHEAD: usize = HEADER + 1 + TAG;
/// TLS 1.2, which is what every record of TLS 1.3 calls itself.
const LEGACY_VERSION: [u8; 2] = [3, 3];

/// The key of one direction, and how often it has been used.
pub(super) struct RecordKey {
    key: LessSafeKey,
    iv: [u8; 12],
    /// The number of the next record.
    sequence: u64,
}

/// A record that has been opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opened {
    /// Its true type.
    pub(super) content_type: ContentType,
    /// Its content's length; opened in place, the content begins [`HEADER`] bytes after the record.
    pub(super) content: usize,
    /// Its length on the wire.
    pub(super) whole: usize,
}

/// The AEAD refused to work: a bug, or a record number that is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a TLS record cannot be sealed")]
pub(super) struct SealError;

impl Opened {
    /// Whether it brings what the connection is for.
    pub(super) fn is_data(&self) -> bool {
        self.content_type == ContentType::ApplicationData && self.content > 0
    }
}

impl RecordKey {
    /// The key of `secrets`, whose next record is number `sequence`.
    pub(super) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Error> {
        let (algorithm, key, iv): (&'static Algorithm, _, _) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a suite that is not of TLS 1.3".into())),
        };
        let unusable = || Error::General("a traffic secret of the wrong length".into());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unusable())?;
        Ok(Self {
            key: LessSafeKey::new(key),
            iv: iv.as_ref().try_into().map_err(|_| unusable())?,
            sequence,
        })
    }

    /// How many records it has sealed or opened.
    pub(super) fn used(&self) -> u64 {
        self.sequence
    }

    /// RFC 8446 5.3: the record's number, over the initialisation vector.
    fn nonce(&self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Turns `buffer[start..]`, a header's room and then content, into a record of `content_type`.
    ///
    /// The content may not be longer than [`MAX_PLAIN`].
    pub(super) fn seal(
        &mut self,
        buffer: &mut Vec<u8>,
        start: usize,
        content_type: ContentType,
    ) -> Result<(), SealError> {
        buffer.push(content_type.into());
        let header = header(buffer.len() - start - HEADER + TAG)?;
        buffer[start..start + HEADER].copy_from_slice(&header);
        let content = &mut buffer[start + HEADER..];
        let tag = self
            .key
            .seal_in_place_separate_tag(self.nonce(), Aad::from(header), content)
            .map_err(|_| SealError)?;
        buffer.extend_from_slice(tag.as_ref());
        self.count_sealed()
    }

    /// Adds a record of application data to `buffer`, whose content is elsewhere: it is read once and not copied.
    ///
    /// The content may not be longer than [`MAX_PLAIN`].
    pub(super) fn seal_from(
        &mut self,
        content: &[u8],
        buffer: &mut Vec<u8>,
    ) -> Result<(), SealError> {
        let header = header(content.len() + OVERHEAD - HEADER)?;
        buffer.extend_from_slice(&header);
        let start = buffer.len();
        buffer.resize(start + content.len() + OVERHEAD - HEADER, 0);
        let (sealed, type_and_tag) = buffer[start..].split_at_mut(content.len());
        let content_type = [ContentType::ApplicationData.into()];
        self.key
            .seal_out_of_place_scatter(
                self.nonce(),
                Aad::from(header),
                content,
                sealed,
                &content_type,
                type_and_tag,
            )
            .map_err(|_| SealError)?;
        self.count_sealed()
    }

    fn count_sealed(&mut self) -> Result<(), SealError> {
        self.sequence = self.sequence.checked_add(1).ok_or(SealError)?;
        Ok(())
    }

    /// Opens the record at the front of `bytes` into `room`, at whose front its content is then; `None` while the record is not
    /// whole, or `room` is less than what was sealed, type and padding included.
    pub(super) fn open_into(
        &mut self,
        bytes: &[u8],
        room: &mut ReadBuf<'_>,
    ) -> Result<Option<Opened>, Error> {
        let Some(record) = length(bytes)?.and_then(|whole| bytes.get(..whole)) else {
            return Ok(None);
        };
        let (header, rest) = record.split_at(HEADER);
        let (content, tag) = rest.split_at(rest.len() - TAG);
        if room.remaining() < content.len() {
            return Ok(None);
        }
        let into = room.initialize_unfilled_to(content.len());
        self.key
            .open_separate_gather(self.nonce(), Aad::from(header), content, tag, into)
            .map_err(|_| Error::DecryptError)?;
        self.opened(record.len(), into).map(Some)
    }

    /// Opens the record at the front of `bytes`; `None` while it is not whole.
    pub(super) fn open(&mut self, bytes: &mut [u8]) -> Result<Option<Opened>, Error> {
        let Some(record) = length(bytes)?.and_then(|whole| bytes.get_mut(..whole)) else {
            return Ok(None);
        };
        let whole = record.len();
        let (header, content) = record.split_at_mut(HEADER);
        let plain = self
            .key
            .open_in_place(self.nonce(), Aad::from(&*header), content)
            .map_err(|_| Error::DecryptError)?;
        self.opened(whole, plain).map(Some)
    }

    /// Counts a record that `plain` came out of.
    fn opened(&mut self, whole: usize, plain: &[u8]) -> Result<Opened, Error> {
        self.sequence = self.sequence.checked_add(1).ok_or(Error::DecryptError)?;
        let (content_type, content) = unpadded(plain)?;
        Ok(Opened {
            content_type,
            content,
            whole,
        })
    }
}

/// Of a record that has `length` bytes after it.
fn header(length: usize) -> Result<[u8; HEADER], SealError> {
    let [high, low] = u16::try_from(length).map_err(|_| SealError)?.to_be_bytes();
    let [major, minor] = LEGACY_VERSION;
    Ok([ContentType::ApplicationData.into(), major, minor, high, low])
}

/// Of the record whose header is at the front of `bytes`; `None` while that is not whole.
fn length(bytes: &[u8]) -> Result<Option<usize>, Error> {
    let Some(&[kind, _, _, high, low]) = bytes.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    match ContentType::from(kind) {
        ContentType::ApplicationData => {}
        // After the handshake every record is sealed, and a sealed one calls itself application data.
        got_type
        @ (ContentType::Alert | ContentType::Handshake | ContentType::ChangeCipherSpec) => {
            return Err(Error::InappropriateMessage {
                expect_types: vec![ContentType::ApplicationData],
                got_type,
            });
        }
        _ => return Err(InvalidMessage::InvalidContentType.into()),
    }
    match usize::from(u16::from_be_bytes([high, low])) {
        0..=TAG => Err(Error::DecryptError),
        sealed @ ..=MAX_SEALED => Ok(Some(HEADER + sealed)),
        _ => Err(Error::PeerSentOversizedRecord),
    }
}

/// The true type and the content's length of what was sealed: content, type, zeros (RFC 8446 5.4).
fn unpadded(plain: &[u8]) -> Result<(ContentType, usize), Error> {
    let end = plain.iter().rposition(|&byte| byte != 0);
    let end = end.ok_or(PeerMisbehaved::IllegalTlsInnerPlaintext)?;
    if end > MAX_PLAIN {
        return Err(Error::PeerSentOversizedRecord);
    }
    Ok((ContentType::from(plain[end]), end))
}

/// The alert that tells the peer of `error` (RFC 8446 6.2).
pub(super) fn alert_of(error: &Error) -> AlertDescription {
    match error {
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        _ => AlertDescription::UnexpectedMessage,
    }
}

#[cfg(test)]
mod tests {
    use rustls::crypto::cipher::{AeadKey, Iv};

    use super::*;

    fn key(sequence: u64) -> RecordKey {
        let secrets = ConnectionTrafficSecrets::Aes256Gcm {
            key: AeadKey::from([7; 32]),
            iv: Iv::new([9; 12]),
        };
        RecordKey::new(sequence, &secrets).unwrap()
    }

    fn sealed(content: &[u8], content_type: ContentType) -> Vec<u8> {
        let mut buffer = vec![0; HEADER];
        buffer.extend_from_slice(content);
        key(3).seal(&mut buffer, 0, content_type).unwrap();
        buffer
    }

    #[test]
    fn what_is_sealed_opens_with_its_type_and_content() {
        for size in [0, 1, 1000, MAX_PLAIN] {
            let content = vec![5; size];
            let mut record = sealed(&content, ContentType::ApplicationData);
            assert_eq!(record.len(), size + OVERHEAD);
            let opened = key(3).open(&mut record).unwrap().unwrap();
            assert_eq!(opened.content_type, ContentType::ApplicationData);
            assert_eq!((opened.content, opened.whole), (size, record.len()));
            assert_eq!(&record[HEADER..HEADER + size], content);
        }
    }

    #[test]
    fn a_record_is_the_same_whether_it_was_sealed_in_place_or_from_elsewhere() {
        for size in [0, 1, 1000, MAX_PLAIN] {
            let content = vec![5; size];
            let mut record = b"before".to_vec();
            key(3).seal_from(&content, &mut record).unwrap();
            let in_place = sealed(&content, ContentType::ApplicationData);
            assert!(record == [b"before".as_slice(), &in_place].concat());
        }
        let mut buffer = Vec::new();
        let mut counted = key(3);
        counted.seal_from(b"one", &mut buffer).unwrap();
        assert_eq!(counted.used(), 4);
        let too_long = vec![0; 1 << 16];
        assert_eq!(key(3).seal_from(&too_long, &mut buffer), Err(SealError));
    }

    #[test]
    fn a_record_opens_into_room_that_holds_what_was_sealed_and_into_no_less() {
        let record = sealed(b"content", ContentType::Alert);
        for (room, fits) in [(7, false), (8, true), (100, true)] {
            let mut memory = vec![0; room];
            let mut room = ReadBuf::new(&mut memory);
            let mut key = key(3);
            let opened = key.open_into(&record, &mut room).unwrap();
            assert_eq!(opened.is_some(), fits);
            assert_eq!(key.used(), 3 + u64::from(fits));
            if let Some(opened) = opened {
                assert_eq!(opened.content_type, ContentType::Alert);
                assert_eq!((opened.content, opened.whole), (7, record.len()));
                assert_eq!(room.filled().len(), 0);
                assert_eq!(&memory[..7], b"content");
            }
        }
        let mut memory = [0; 100];
        let part = key(3).open_into(&record[..record.len() - 1], &mut ReadBuf::new(&mut memory));
        assert_eq!(part, Ok(None));
        let mut changed = record.clone();
        *changed.last_mut().unwrap() ^= 1;
        let changed = key(3).open_into(&changed, &mut ReadBuf::new(&mut memory));
        assert_eq!(changed, Err(Error::DecryptError));
    }

    #[test]
    fn a_record_that_is_not_whole_is_left_as_it_is() {
        let record = sealed(b"content", ContentType::Alert);
        for end in 0..record.len() {
            let mut part = record[..end].to_vec();
            assert_eq!(key(3).open(&mut part), Ok(None));
            assert_eq!(part, record[..end]);
        }
    }

    #[test]
    fn one_changed_bit_or_another_number_does_not_open() {
        let record = sealed(b"content", ContentType::ApplicationData);
        for index in HEADER..record.len() {
            let mut changed = record.clone();
            changed[index] ^= 1;
            assert_eq!(key(3).open(&mut changed), Err(Error::DecryptError));
        }
        // The header is authenticated, too.
        let mut changed = record.clone();
        changed[1] ^= 1;
        assert_eq!(key(3).open(&mut changed), Err(Error::DecryptError));
        assert_eq!(key(4).open(&mut record.clone()), Err(Error::DecryptError));
    }

    #[test]
    fn headers_that_no_sealed_record_has_are_refused() {
        let open = |header: [u8; HEADER]| key(0).open(&mut header.to_vec()).unwrap_err();
        let oversized = Error::PeerSentOversizedRecord;
        assert_eq!(open([23, 3, 3, 0x41, 0x01]), oversized);
        assert_eq!(open([23, 3, 3, 0, 16]), Error::DecryptError);
        let plaintext_alert = open([21, 3, 3, 0, 2]);
        assert_eq!(
            alert_of(&plaintext_alert),
            AlertDescription::UnexpectedMessage
        );
        let no_type = open([99, 3, 3, 0, 20]);
        assert_eq!(no_type, InvalidMessage::InvalidContentType.into());
    }

    #[test]
    fn padding_is_taken_off_and_nothing_but_padding_refused() {
        let with_type = |plain: &[u8]| unpadded(plain);
        let padded = with_type(&[1, 2, 0, 23, 0, 0]);
        assert_eq!(padded, Ok((ContentType::ApplicationData, 3)));
        assert!(with_type(&[0; 8]).is_err());
        assert!(with_type(&[]).is_err());
        let mut long = vec![1; MAX_PLAIN + 1];
        long.push(23);
        assert_eq!(with_type(&long), Err(Error::PeerSentOversizedRecord));
    }
}
