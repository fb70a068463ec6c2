//! The PROXY protocol header that tells an application who calls.
//!
//! Source: the HAProxy PROXY protocol specification, sections 2.1 and 2.2.

use std::net::{IpAddr, SocketAddr};

use mesh::identity::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2_PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// TLV type of the peer's SPIFFE ID, Istio's own.
const TLV_SOURCE_IDENTITY: u8 = 0xD0;

/// The header of version 1, in text.
pub fn header_v1(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let family = match source.is_ipv4() && destination.is_ipv4() {
        true => "TCP4",
        false => "TCP6",
    };
    let ip = |address: SocketAddr| match (family, address.ip()) {
        ("TCP6", IpAddr::V4(v4)) => IpAddr::V6(v4.to_ipv6_mapped()),
        (_, ip) => ip,
    };
    let (from, to) = (source.port(), destination.port());
    format!(
        "PROXY {family} {} {} {from} {to}\r\n",
        ip(source),
        ip(destination)
    )
    .into_bytes()
}

/// The header of version 2, to write before the application's first byte.
///
/// The header carries one address family: where source and destination differ, both are written as IPv6, the IPv4 one
/// in its mapped form.
pub fn header(source: SocketAddr, destination: SocketAddr, identity: Option<&Identity>) -> Vec<u8> {
    let mut body = addresses(source, destination);
    if let Some(identity) = identity {
        push_tlv(
            &mut body,
            TLV_SOURCE_IDENTITY,
            identity.to_string().as_bytes(),
        );
    }
    let family = if source.is_ipv4() && destination.is_ipv4() {
        TCP_OVER_IPV4
    } else {
        TCP_OVER_IPV6
    };
    let length = u16::try_from(body.len()).expect("addresses and one bounded TLV are below 64 KiB");
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend_from_slice(&SIGNATURE);
    header.extend_from_slice(&[VERSION_2_PROXY, family]);
    header.extend_from_slice(&length.to_be_bytes());
    header.append(&mut body);
    header
}

fn addresses(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut body = Vec::with_capacity(36);
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.extend_from_slice(&source.octets());
            body.extend_from_slice(&destination.octets());
        }
        (source, destination) => {
            body.extend_from_slice(&as_ipv6(source));
            body.extend_from_slice(&as_ipv6(destination));
        }
    }
    body.extend_from_slice(&source.port().to_be_bytes());
    body.extend_from_slice(&destination.port().to_be_bytes());
    body
}

fn as_ipv6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn push_tlv(body: &mut Vec<u8>, kind: u8, value: &[u8]) {
    // A SPIFFE ID is at most 2048 bytes (SPIFFE-ID 2.3); a longer text is left out rather than cut.
    let Some(length) = u16::try_from(value.len()).ok().filter(|n| *n <= 2048) else {
        return;
    };
    body.push(kind);
    body.extend_from_slice(&length.to_be_bytes());
    body.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_header_names_both_ends_and_the_identity() {
        let identity = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        let bytes = header(
            "10.0.0.1:1000".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
            Some(&identity),
        );
        assert_eq!(bytes[..12], SIGNATURE);
        assert_eq!(bytes[12..16], [0x21, 0x11, 0, 12 + 3 + 32]);
        assert_eq!(bytes[16..28], [10, 0, 0, 1, 10, 0, 0, 2, 3, 232, 0, 80]);
        assert_eq!(bytes[28..31], [0xD0, 0, 32]);
        assert_eq!(&bytes[31..], b"spiffe://cluster.local/ns/a/sa/b");
    }

    #[test]
    fn version_1_is_one_line() {
        for (source, destination, line) in [
            (
                "10.0.0.1:1000",
                "10.0.0.2:80",
                "PROXY TCP4 10.0.0.1 10.0.0.2 1000 80\r\n",
            ),
            (
                "[fd00::1]:1",
                "[fd00::2]:2",
                "PROXY TCP6 fd00::1 fd00::2 1 2\r\n",
            ),
            (
                "10.0.0.1:1",
                "[fd00::2]:2",
                "PROXY TCP6 ::ffff:10.0.0.1 fd00::2 1 2\r\n",
            ),
        ] {
            let bytes = header_v1(source.parse().unwrap(), destination.parse().unwrap());
            assert_eq!(String::from_utf8(bytes).unwrap(), line);
        }
    }

    #[test]
    fn mixed_families_are_written_as_ipv6() {
        let bytes = header(
            "10.0.0.1:1".parse().unwrap(),
            "[fd00::2]:2".parse().unwrap(),
            None,
        );
        assert_eq!(bytes[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!(bytes[26..32], [0xff, 0xff, 10, 0, 0, 1]);
        assert_eq!(bytes.len(), 16 + 36);
    }
}
