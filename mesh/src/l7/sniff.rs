//! Which protocol a connection speaks, by its first bytes (waypoint.md 1.5).
//!
//! Pure and incremental: asked again with more bytes while it answers [`Sniffed::More`]; never needs more than
//! [`MAX_BYTES`].

/// As much as is ever looked at: the longest ClientHello that is understood (RFC 8446 4.1.2 over several records).
pub const MAX_BYTES: usize = 16 * 1024;

/// RFC 9113 3.4.
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest method that is taken for one (IANA's longest has 17).
const MAX_METHOD: usize = 24;

/// What the bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// Too few to tell.
    More,
    /// A request line's start.
    Http1,
    /// The preface of HTTP/2.
    Http2,
    /// A TLS ClientHello, with the name that it asks for, in lower case.
    Tls(Option<String>),
    /// None of these.
    Opaque,
}

/// Tells what `bytes`, the first that a client sent, are.
pub fn sniff(bytes: &[u8]) -> Sniffed {
    match bytes.first() {
        None => Sniffed::More,
        Some(&RECORD_HANDSHAKE) => sniff_tls(bytes),
        Some(_) if bytes.starts_with(H2_PREFACE) => Sniffed::Http2,
        Some(_) if H2_PREFACE.starts_with(bytes) => Sniffed::More,
        Some(_) => sniff_http1(bytes),
    }
}

/// Tells whether `bytes` begin HTTP/2, where only HTTP is spoken.
pub fn sniff_http(bytes: &[u8]) -> Sniffed {
    match H2_PREFACE.starts_with(bytes) && bytes.len() < H2_PREFACE.len() {
        true => Sniffed::More,
        false if bytes.starts_with(H2_PREFACE) => Sniffed::Http2,
        false => Sniffed::Http1,
    }
}

/// Tells the name of a ClientHello, where only TLS is spoken.
pub fn sniff_tls(bytes: &[u8]) -> Sniffed {
    match client_hello(bytes) {
        Hello::More if bytes.len() >= MAX_BYTES => Sniffed::Opaque,
        Hello::More => Sniffed::More,
        Hello::Not => Sniffed::Opaque,
        Hello::Name(name) => Sniffed::Tls(name),
    }
}

/// A token and a space, then the start of a target: `GET /`, `OPTIONS *`, `GET http://`, `CONNECT a:1`.
fn sniff_http1(bytes: &[u8]) -> Sniffed {
    let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
    let method = bytes.iter().take_while(|b| token(b)).count();
    let upper = bytes[..method].iter().all(|b| !b.is_ascii_lowercase());
    if !upper || method > MAX_METHOD {
        return Sniffed::Opaque;
    }
    match (method, bytes.get(method), bytes.get(method + 1)) {
        (0, ..) => Sniffed::Opaque,
        (_, None, _) | (_, Some(b' '), None) => Sniffed::More,
        (_, Some(b' '), Some(target)) if is_target(*target) => Sniffed::Http1,
        _ => Sniffed::Opaque,
    }
}

fn is_target(byte: u8) -> bool {
    matches!(byte, b'/' | b'*' | b'[') || byte.is_ascii_alphanumeric()
}

const RECORD_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const NAME_HOST: u8 = 0;
/// RFC 8446 5.1.
const MAX_RECORD: usize = 1 << 14;

enum Hello {
    More,
    Not,
    Name(Option<String>),
}

/// Puts the handshake message together from its records, then reads it.
fn client_hello(bytes: &[u8]) -> Hello {
    let mut message = Vec::new();
    let mut rest = bytes;
    loop {
        if let Some(header) = message.first_chunk::<4>() {
            let [kind, high, middle, low] = *header;
            let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            if kind != CLIENT_HELLO || length > MAX_BYTES {
                return Hello::Not;
            }
            if let Some(body) = message.get(4..4 + length) {
                return server_name(body).map_or(Hello::Not, Hello::Name);
            }
        }
        match record(rest) {
            Record::Whole(payload, after) => {
                message.extend_from_slice(payload);
                rest = after;
            }
            Record::More => return Hello::More,
            Record::Not => return Hello::Not,
        }
    }
}

enum Record<'a> {
    Whole(&'a [u8], &'a [u8]),
    More,
    Not,
}

/// RFC 8446 5.1: type, legacy version 3.x, length, fragment. Empty handshake records are not allowed.
fn record(bytes: &[u8]) -> Record<'_> {
    let wrong = [(0, RECORD_HANDSHAKE), (1, 3)]
        .into_iter()
        .any(|(at, expected)| bytes.get(at).is_some_and(|b| *b != expected));
    if wrong || bytes.get(2).is_some_and(|minor| *minor > 4) {
        return Record::Not;
    }
    let Some(length) = bytes.get(3..5) else {
        return Record::More;
    };
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    if length == 0 || length > MAX_RECORD {
        return Record::Not;
    }
    match bytes.get(5..5 + length) {
        Some(payload) => Record::Whole(payload, &bytes[5 + length..]),
        None => Record::More,
    }
}

/// Reads fields off the front; `None` where there are too few bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<usize> {
        Some(self.take(1)?[0].into())
    }

    fn u16(&mut self) -> Option<u16> {
        let bytes = self.take(2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self) -> Option<&'a [u8]> {
        let length = self.u8()?;
        self.take(length)
    }

    fn vector16(&mut self) -> Option<Self> {
        let length = self.u16()?;
        self.take(length.into()).map(Self)
    }
}

/// RFC 8446 4.1.2 and RFC 6066 3: the first host name of the extension. `None`: not a ClientHello.
fn server_name(body: &[u8]) -> Option<Option<String>> {
    let mut fields = Fields(body);
    fields.take(2 + 32)?;
    fields.vector8()?;
    fields.vector16()?;
    fields.vector8()?;
    if fields.0.is_empty() {
        return Some(None);
    }
    let mut extensions = fields.vector16()?;
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let mut content = extensions.vector16()?;
        if kind != EXTENSION_SERVER_NAME {
            continue;
        }
        let mut names = content.vector16()?;
        let kind = names.take(1)?[0];
        let name = names.vector16()?.0;
        return (kind == NAME_HOST).then(|| host_name(name));
    }
    Some(None)
}

/// A name that could not stand in a certificate is as if absent: nothing can match it.
fn host_name(name: &[u8]) -> Option<String> {
    let allowed = |b: &u8| b.is_ascii_alphanumeric() || b"-_.".contains(b);
    let fits = !name.is_empty() && name.len() <= 253 && name.iter().all(allowed);
    let text = std::str::from_utf8(name).ok().filter(|_| fits)?;
    Some(text.trim_end_matches('.').to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ClientHello with these extensions, in records of at most `record` bytes.
    fn hello(extensions: &[u8], record: usize) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend([0, 2, 0x13, 1]);
        body.extend([1, 0]);
        body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
        body.extend(extensions);
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let mut message = vec![CLIENT_HELLO];
        message.extend(&length[1..]);
        message.extend(body);
        message
            .chunks(record)
            .flat_map(|chunk| {
                let length = u16::try_from(chunk.len()).unwrap().to_be_bytes();
                [&[RECORD_HANDSHAKE, 3, 1][..], &length, chunk].concat()
            })
            .collect()
    }

    fn sni(name: &str) -> Vec<u8> {
        let length = |n: usize| u16::try_from(n).unwrap().to_be_bytes();
        let mut extension = vec![0, 0];
        extension.extend(length(name.len() + 5));
        extension.extend(length(name.len() + 3));
        extension.push(NAME_HOST);
        extension.extend(length(name.len()));
        extension.extend(name.as_bytes());
        extension
    }

    #[test]
    fn first_bytes_tell_the_protocol() {
        for (bytes, expected) in [
            (&b""[..], Sniffed::More),
            (b"GET / HTTP/1.1\r\n", Sniffed::Http1),
            (b"GET /", Sniffed::Http1),
            (b"GE", Sniffed::More),
            (b"GET ", Sniffed::More),
            (b"OPTIONS * HTTP/1.1", Sniffed::Http1),
            (b"M-SEARCH /x", Sniffed::Http1),
            (b"PROPFIND http://a/", Sniffed::Http1),
            (b"P", Sniffed::More),
            (b"PRI * HTTP/2.0\r\n\r\n", Sniffed::More),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Sniffed::Http2),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0", Sniffed::Http2),
            (b"PRIVMSG #a :b", Sniffed::Opaque),
            (b"get / HTTP/1.1", Sniffed::Opaque),
            (b"+PING", Sniffed::More),
            (b"+PING\r\n", Sniffed::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Sniffed::Opaque),
            (b" GET /", Sniffed::Opaque),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", Sniffed::Opaque),
            (b"SSH-2.0-OpenSSH_9", Sniffed::Opaque),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Sniffed::Opaque),
        ] {
            let text = String::from_utf8_lossy(bytes);
            assert_eq!(sniff(bytes), expected, "{text:?}");
        }
    }

    #[test]
    fn a_hello_tells_its_name_however_it_is_cut() {
        let name = Sniffed::Tls(Some("a.example".to_owned()));
        for record in [1, 7, 60, MAX_RECORD] {
            let bytes = hello(&sni("A.Example"), record);
            assert_eq!(sniff(&bytes), name, "records of {record}");
            for end in 1..bytes.len() {
                assert_eq!(sniff(&bytes[..end]), Sniffed::More, "{end} of {record}");
            }
        }
        let padded = [&[0, 21, 0x20, 0][..], &[0; 0x2000], &sni("a.example")].concat();
        assert_eq!(sniff(&hello(&padded, 512)), name);
    }

    #[test]
    fn a_hello_without_a_usable_name_has_none() {
        for extensions in [Vec::new(), vec![0, 10, 0, 0], sni("a b"), sni("é")] {
            assert_eq!(sniff(&hello(&extensions, 999)), Sniffed::Tls(None));
        }
    }

    #[test]
    fn what_is_no_hello_is_opaque() {
        let mut other_message = hello(&[], 99);
        other_message[5] = 2;
        let mut cut_short = hello(&sni("a.example"), 99);
        let length = cut_short.len();
        // The extension says that it is longer than the message.
        cut_short[length - 12 - 4] = 0xff;
        for bytes in [
            other_message,
            cut_short,
            vec![RECORD_HANDSHAKE, 2],
            vec![RECORD_HANDSHAKE, 3, 1, 0, 0],
            vec![RECORD_HANDSHAKE, 3, 1, 0xff, 0xff],
            vec![RECORD_HANDSHAKE, 3, 1, 0, 4, 1, 1, 0, 0],
        ] {
            assert_eq!(sniff(&bytes), Sniffed::Opaque, "{bytes:?}");
        }
    }

    #[test]
    fn a_hello_never_needs_more_than_the_bound() {
        let mut bytes = hello(&[], 99);
        // A message that announces nearly all of the bound and never comes.
        bytes[6..9].copy_from_slice(&[0, 0x3f, 0xff]);
        bytes.truncate(9);
        while bytes.len() < MAX_BYTES {
            bytes.extend([RECORD_HANDSHAKE, 3, 1, 0, 1, 0]);
        }
        assert_eq!(sniff(&bytes), Sniffed::Opaque);
    }
}
