//! The destination that a CONNECT names.

use std::{fmt, net::SocketAddr, str::FromStr};

use mesh::names::Str;

/// The `:authority` of a CONNECT: always with a port (RFC 9113 8.5).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address; IPv6 is written in brackets.
    Address(SocketAddr),
    /// A service's host name, lower case and without a trailing dot, and its port.
    Host {
        /// The name.
        name: Str,
        /// The service's port.
        port: u16,
    },
}

/// A text that is no destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither IP:PORT nor HOST:PORT")]
pub struct ParseAuthorityError(pub String);

impl FromStr for Authority {
    type Err = ParseAuthorityError;

    fn from_str(text: &str) -> Result<Self, ParseAuthorityError> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            let address = SocketAddr::new(address.ip().to_canonical(), address.port());
            return Ok(Self::Address(address));
        }
        let parse = || {
            let (name, port) = text.rsplit_once(':')?;
            let name = name.strip_suffix('.').unwrap_or(name);
            let label = |b: u8| b.is_ascii_alphanumeric() || b"-_.*".contains(&b);
            let named = !name.is_empty() && name.len() <= 253 && name.bytes().all(label);
            // `+80` parses as a number and is no port.
            let numeric = port.bytes().all(|b| b.is_ascii_digit());
            (named && numeric).then_some(())?;
            Some(Self::Host {
                name: name.to_ascii_lowercase().into(),
                port: port.parse().ok()?,
            })
        };
        parse().ok_or_else(|| ParseAuthorityError(text.to_owned()))
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}
