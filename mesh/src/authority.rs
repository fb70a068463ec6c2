//! The authority of a CONNECT request: where the tunnel's sender wants the bytes to go.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use crate::names::{Str, serde_as_text};

/// An `ip:port` or `host:port` (RFC 9113 8.5; RFC 3986 3.2). IPv6 stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// Never IPv4-mapped.
    Address(SocketAddr),
    /// A host name, without a trailing dot, in lower case.
    Hostname(Str, u16),
}

/// A text that is no authority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither ip:port nor host:port")]
pub struct ParseAuthorityError(pub String);

impl Authority {
    /// An address, with an IPv4-mapped one unwrapped.
    pub fn address(ip: IpAddr, port: u16) -> Self {
        Self::Address(SocketAddr::new(ip.to_canonical(), port))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Hostname(_, port) => *port,
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl FromStr for Authority {
    type Err = ParseAuthorityError;

    fn from_str(text: &str) -> Result<Self, ParseAuthorityError> {
        let wrong = || ParseAuthorityError(text.chars().take(MAX_HOSTNAME).collect());
        if let Ok(address) = text.parse::<SocketAddr>() {
            let plain = address.port() > 0 && !text.contains('%');
            let address = Self::address(address.ip(), address.port());
            return plain.then_some(address).ok_or_else(wrong);
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port: u16 = port.parse().map_err(|_| wrong())?;
        let host = host.strip_suffix('.').unwrap_or(host);
        if !digits || port == 0 || !is_hostname(host) {
            return Err(wrong());
        }
        Ok(Self::Hostname(host.to_ascii_lowercase().into(), port))
    }
}

serde_as_text!(Authority);

/// RFC 1035 2.3.4.
const MAX_HOSTNAME: usize = 253;

/// Letters, digits, `-`, `_` and single dots; at least one letter, so that a mistyped address is no name.
fn is_hostname(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let label = |label: &str| (1..=63).contains(&label.len()) && label.bytes().all(allowed);
    let letter = text.bytes().any(|b| b.is_ascii_alphabetic());
    text.len() <= MAX_HOSTNAME && letter && text.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_round_trip() {
        for text in [
            "10.0.0.1:80",
            "[ff06::c3]:80",
            "web.a.svc.cluster.local:8080",
        ] {
            assert_eq!(text.parse::<Authority>().unwrap().to_string(), text);
        }
        let mapped: Authority = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.1:80");
        assert_eq!(
            "Web.A.:1".parse::<Authority>().unwrap().to_string(),
            "web.a:1"
        );
    }

    #[test]
    fn other_texts_are_no_authority() {
        for text in [
            "",
            ":",
            "a",
            "a:",
            ":80",
            "10.0.0.1",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "a:+80",
            "ff06::c3:80",
            "[::1]",
            "u@a:80",
            "a b:80",
            "a..b:80",
            "10.0.0.256:80",
            "a/b:80",
            "[fe80::1%3]:80",
            "*.a:80",
        ] {
            assert!(text.parse::<Authority>().is_err(), "{text:?}");
        }
    }
}
