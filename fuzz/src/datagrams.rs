//! Messages that arrive whole: DNS and ZDS; and the PROXY header that we write.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
};

use mesh::{
    dns::{PortRecords, Target},
    identity::Identity,
};
use net::{
    proxy_protocol,
    zds::{
        MAX_PACKET, Received as ZdsReceived, Request,
        message::{Packet, decode_hello, decode_request, decode_response, encode_request},
    },
};
use ztunnel::dns::message::{
    Addresses, Question, RawCode, Received, admit_name, inspect, raw_failure,
};

use crate::text_of;

const DNS_HEADER: usize = 12;

/// A DNS message of a pod. Whatever we answer has the question's id, is a response, and fits.
pub fn dns_message(bytes: &[u8]) {
    match inspect(bytes) {
        Received::Address(query) => check_answers(bytes, &query),
        Received::Port(query) => check_ports(bytes, &query),
        Received::Other(other) => {
            let kind = other.kind;
            assert!(!kind.is_empty() && kind.len() < 64, "{kind:?}");
        }
        Received::Malformed => assert_eq!(bytes[2] & 0xf8, 0, "a question"),
        Received::NotARequest => assert!(bytes[2] & 0x80 != 0),
        Received::Garbage => assert!(bytes.len() < DNS_HEADER),
    }
    for code in [RawCode::FormErr, RawCode::ServFail] {
        match raw_failure(bytes, code) {
            Some(reply) => check_reply(bytes, &reply, DNS_HEADER + 255 + 4),
            None => assert!(bytes.len() < DNS_HEADER),
        }
    }
}

fn check_answers(bytes: &[u8], query: &Question) {
    let (name, limit) = (query.name(), query.max_udp_payload());
    assert_eq!(name, name.to_ascii_lowercase());
    assert!((512..=65_535).contains(&limit), "{limit}");
    let some = Addresses {
        alias_of: None,
        addresses: addresses(query.wants_ipv6(), 2),
        ttl: 30,
    };
    let many = Addresses {
        alias_of: Some("web.default.svc.cluster.local".to_owned()),
        addresses: addresses(query.wants_ipv6(), 64),
        ttl: 30,
    };
    for known in [&some, &many] {
        // None: a question so long that not even it fits.
        if let Some(reply) = query.answer(known, limit) {
            check_reply(bytes, &reply, limit);
        }
        let whole = query.answer(known, usize::from(u16::MAX));
        let whole = whole.expect("64 addresses fit a TCP answer");
        check_reply(bytes, &whole, usize::from(u16::MAX));
    }
    // The same bytes as a name server's answer, which may have aliases.
    let mut answered = bytes.to_vec();
    answered[2] |= 0x80;
    let aliases = query.aliases(&answered);
    assert!(aliases.len() <= 8);
    if let Some(reply) = query.answer_through(&aliases, &some, limit) {
        check_reply(bytes, &reply, limit);
    }
    admit_name(&mut answered);
    assert_ne!(answered[3] & 0x0f, 3, "a name of the mesh is not denied");
    if let Some(reply) = query.failure() {
        check_reply(bytes, &reply, limit);
    }
}

fn check_ports(bytes: &[u8], query: &Question) {
    let limit = query.max_udp_payload();
    for (cname, count) in [(None, 1), (Some("_http._tcp.web.default.".to_owned()), 64)] {
        let target = |address: IpAddr| Target {
            name: format!(
                "{}.web.default.svc.cluster.local.",
                address.to_string().replace('.', "-")
            ),
            port: 80,
            addresses: vec![address],
        };
        let known = PortRecords {
            service: "default/web".parse().expect("a key"),
            cname,
            targets: addresses(false, count).into_iter().map(target).collect(),
            ttl: 30,
        };
        if let Some(reply) = query.answer_port(&known, limit) {
            check_reply(bytes, &reply, limit);
        }
        let whole = query.answer_port(&known, usize::from(u16::MAX));
        let whole = whole.expect("64 targets fit a TCP answer");
        check_reply(bytes, &whole, usize::from(u16::MAX));
    }
}

fn addresses(ipv6: bool, count: u8) -> Vec<IpAddr> {
    (0..count)
        .map(|last| match ipv6 {
            true => [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)].into(),
            false => [10, 0, 0, last].into(),
        })
        .collect()
}

fn check_reply(request: &[u8], reply: &[u8], limit: usize) {
    assert!(
        (DNS_HEADER..=limit).contains(&reply.len()),
        "{}",
        reply.len()
    );
    assert_eq!(reply[..2], request[..2], "the id");
    assert!(reply[2] & 0x80 != 0, "a response");
}

/// A ZDS packet: how many descriptors came with it, then its bytes. What is read is written as the same again.
pub fn zds_packet(bytes: &[u8]) {
    let Some((descriptors, bytes)) = bytes.split_first() else {
        return;
    };
    let packet = || Packet {
        bytes: bytes[..bytes.len().min(MAX_PACKET)].to_vec(),
        descriptors: (0..descriptors % 3).filter_map(|_| namespace()).collect(),
        lost: descriptors & 0x80 != 0,
    };
    let _ = decode_hello(&packet());
    let _ = decode_response(&packet());
    match decode_request(packet()) {
        Ok(ZdsReceived::Request(request)) => check_request(&request),
        Ok(ZdsReceived::BadNamespace { uid, .. }) => assert!(!uid.is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn namespace() -> Option<OwnedFd> {
    File::open("/proc/self/ns/net").ok().map(Into::into)
}

fn check_request(request: &Request) {
    let descriptors = match request {
        Request::Add { .. } => namespace().into_iter().collect(),
        _ => Vec::new(),
    };
    let bytes = encode_request(request);
    let again = decode_request(Packet {
        bytes,
        descriptors,
        lost: false,
    });
    assert!(
        matches!(&again, Ok(ZdsReceived::Request(again)) if again == request),
        "{request:?} became {again:?}"
    );
}

/// The PROXY header for two ends and an identity that the bytes name, as a reader of the specification sees it.
pub fn proxy_header(bytes: &[u8]) {
    let Some((source, rest)) = endpoint(bytes) else {
        return;
    };
    let Some((destination, rest)) = endpoint(rest) else {
        return;
    };
    let identity: Option<Identity> = text_of(rest).and_then(|text| text.parse().ok());
    let header = proxy_protocol::header(source, destination, identity.as_ref());
    let read = read_v2(&header).expect("a header of version 2");
    let canonical = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
    assert_eq!(
        read.ends.map(canonical),
        [source, destination].map(canonical)
    );
    assert_eq!(read.identity, identity.map(|it| it.to_string()));
    let line = proxy_protocol::header_v1(source, destination);
    let line = String::from_utf8(line).expect("text");
    assert!(line.len() <= 107 && line.ends_with("\r\n"), "{line:?}");
    let words: Vec<_> = line.trim_end().split(' ').collect();
    assert_eq!(words.len(), 6, "{line:?}");
    for (at, end) in [(2, source), (3, destination)] {
        let ip: IpAddr = words[at].parse().expect("an address");
        let port: u16 = words[at + 2].parse().expect("a port");
        assert_eq!(ip.is_ipv4(), words[1] == "TCP4", "{line:?}");
        assert_eq!(
            (ip.to_canonical(), port),
            (end.ip().to_canonical(), end.port())
        );
    }
}

/// A byte that says the family, then address and port.
fn endpoint(bytes: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let (family, bytes) = bytes.split_first()?;
    let (ip, bytes) = if family.is_multiple_of(2) {
        let (ip, bytes) = bytes.split_first_chunk::<4>()?;
        (IpAddr::from(*ip), bytes)
    } else {
        let (ip, bytes) = bytes.split_first_chunk::<16>()?;
        (IpAddr::from(*ip), bytes)
    };
    let (port, bytes) = bytes.split_first_chunk::<2>()?;
    Some((SocketAddr::new(ip, u16::from_be_bytes(*port)), bytes))
}

struct Header {
    ends: [SocketAddr; 2],
    identity: Option<String>,
}

/// Reads a whole header of version 2 (PROXY protocol 2.2), and nothing behind it.
fn read_v2(bytes: &[u8]) -> Option<Header> {
    let rest = bytes.strip_prefix(b"\r\n\r\n\0\r\nQUIT\n\x21")?;
    let (family, rest) = rest.split_first()?;
    let (length, body) = rest.split_first_chunk::<2>()?;
    if body.len() != usize::from(u16::from_be_bytes(*length)) {
        return None;
    }
    let (ends, mut rest) = match family {
        0x11 => {
            let (source, body) = body.split_first_chunk::<4>()?;
            let (destination, body) = body.split_first_chunk::<4>()?;
            ([IpAddr::from(*source), IpAddr::from(*destination)], body)
        }
        0x21 => {
            let (source, body) = body.split_first_chunk::<16>()?;
            let (destination, body) = body.split_first_chunk::<16>()?;
            ([IpAddr::from(*source), IpAddr::from(*destination)], body)
        }
        _ => return None,
    };
    let mut port = || {
        let (port, after) = rest.split_first_chunk::<2>()?;
        rest = after;
        Some(u16::from_be_bytes(*port))
    };
    let ends = [(ends[0], port()?).into(), (ends[1], port()?).into()];
    let mut identity = None;
    while let Some(([kind, high, low], after)) = rest.split_first_chunk::<3>() {
        let (value, after) = after.split_at_checked(u16::from_be_bytes([*high, *low]).into())?;
        if *kind == 0xD0 {
            identity = Some(text_of(value)?.to_owned());
        }
        rest = after;
    }
    rest.is_empty().then_some(Header { ends, identity })
}
