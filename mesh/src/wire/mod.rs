//! The edge where wire types become mesh types and mesh types become wire types: `TryFrom` and `From`.
//!
//! Bad input is told once, here, and nothing inside checks it again. What this version does not know degrades one
//! field and not the resource, and always toward the closed side: see each conversion.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;

mod l7;
mod policy;
mod service;
#[cfg(test)]
mod tests;
mod workload;

pub use workload::pod_dns_extension;

use crate::names::{NetworkAddress, ParseKeyError};
use crate::view::Resource;
use crate::workload::{GatewayAddress, GatewayDestination};

/// Why a resource of the wire is rejected, naming the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidResource {
    /// The field, as the protocol names it, with the position of a repeated one: `addresses[1]`.
    pub field: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It must be there.
    #[error("missing")]
    Missing,
    /// Neither 4 nor 16 bytes.
    #[error("an address of {0} bytes")]
    AddressLength(usize),
    /// More bits than the address has.
    #[error("a prefix of {0} bits")]
    PrefixLength(u32),
    /// More than 65535.
    #[error("port {0} is out of range")]
    Port(u32),
    /// Not a key.
    #[error(transparent)]
    Key(#[from] ParseKeyError),
    /// Not a trust domain.
    #[error(transparent)]
    TrustDomain(#[from] crate::identity::ParseTrustDomainError),
    /// A number that this version does not know, in a field without which the resource has no meaning.
    #[error("unknown value {0}")]
    Unknown(i32),
    /// Not an expression that is accepted.
    #[error(transparent)]
    Pattern(#[from] crate::l7::pattern::InvalidPattern),
    /// Not a header's name.
    #[error("{0:?} is not a header's name")]
    HeaderName(String),
    /// Not a header's value.
    #[error("not a header's value")]
    HeaderValue,
    /// Not an HTTP status.
    #[error("{0} is not an HTTP status")]
    Status(u32),
    /// Not a host and a port.
    #[error("{0:?} is not a host and a port")]
    Authority(String),
    /// Not a range of addresses.
    #[error("{0:?} is not a range of addresses")]
    Range(String),
    /// Negative or too long.
    #[error("a time that cannot be")]
    Duration,
}

impl InvalidResource {
    fn new(field: impl Into<String>, problem: impl Into<Problem>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// The same, seen from the message around it.
    fn within(mut self, outer: &str) -> Self {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

impl TryFrom<proto::workload::Address> for Resource {
    type Error = InvalidResource;

    fn try_from(wire: proto::workload::Address) -> Result<Self, InvalidResource> {
        use proto::workload::address::Type;
        match wire.r#type {
            Some(Type::Workload(it)) => Ok(Self::Workload(it.try_into()?)),
            Some(Type::Service(it)) => Ok(Self::Service(it.try_into()?)),
            None => Err(InvalidResource::new("type", Problem::Missing)),
        }
    }
}

/// 4 or 16 bytes, never left IPv4-mapped.
fn address(bytes: &[u8]) -> Result<IpAddr, Problem> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(v4));
    }
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| Problem::AddressLength(bytes.len()))?;
    Ok(IpAddr::from(v6).to_canonical())
}

/// A range without host bits. An IPv4-mapped one becomes IPv4.
fn cidr(bytes: &[u8], length: u32) -> Result<IpNet, Problem> {
    let address = address(bytes)?;
    let mapped = bytes.len() == 16 && address.is_ipv4();
    let bits = if mapped {
        length.checked_sub(96)
    } else {
        Some(length)
    };
    let bits = bits.and_then(|bits| u8::try_from(bits).ok());
    let net = bits.and_then(|bits| IpNet::new(address, bits).ok());
    net.map(|net| net.trunc())
        .ok_or(Problem::PrefixLength(length))
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(it) => it.octets().to_vec(),
        IpAddr::V6(it) => it.octets().to_vec(),
    }
}

fn port(number: u32) -> Result<u16, Problem> {
    u16::try_from(number).map_err(|_| Problem::Port(number))
}

fn network_address(wire: &proto::workload::NetworkAddress) -> Result<NetworkAddress, Problem> {
    Ok(NetworkAddress {
        network: wire.network.as_str().into(),
        address: address(&wire.address)?,
    })
}

/// A key of two parts. Parts that hold a slash are refused: the key's text, which removes it again, would not be read as
/// the same key.
fn key<T: FromStr<Err = ParseKeyError>>(namespace: &str, name: &str) -> Result<T, Problem> {
    Ok(format!("{namespace}/{name}").parse()?)
}

impl TryFrom<&proto::workload::GatewayAddress> for GatewayAddress {
    type Error = InvalidResource;

    fn try_from(wire: &proto::workload::GatewayAddress) -> Result<Self, InvalidResource> {
        use proto::workload::gateway_address::Destination;
        let destination = match &wire.destination {
            Some(Destination::Hostname(it)) => key(&it.namespace, &it.hostname)
                .map(GatewayDestination::Hostname)
                .map_err(|problem| InvalidResource::new("destination.hostname", problem))?,
            Some(Destination::Address(it)) => network_address(it)
                .map(GatewayDestination::Address)
                .map_err(|problem| InvalidResource::new("destination.address", problem))?,
            None => return Err(InvalidResource::new("destination", Problem::Missing)),
        };
        Ok(Self {
            destination,
            hbone_mtls_port: port(wire.hbone_mtls_port)
                .map_err(|problem| InvalidResource::new("hbone_mtls_port", problem))?,
        })
    }
}

impl From<&GatewayAddress> for proto::workload::GatewayAddress {
    fn from(gateway: &GatewayAddress) -> Self {
        use proto::workload::{NamespacedHostname, gateway_address::Destination};
        let destination = match &gateway.destination {
            GatewayDestination::Hostname(key) => Destination::Hostname(NamespacedHostname {
                namespace: key.namespace.to_string(),
                hostname: key.hostname.to_string(),
            }),
            GatewayDestination::Address(address) => Destination::Address(address.into()),
        };
        Self {
            destination: Some(destination),
            hbone_mtls_port: gateway.hbone_mtls_port.into(),
        }
    }
}

impl From<&NetworkAddress> for proto::workload::NetworkAddress {
    fn from(address: &NetworkAddress) -> Self {
        Self {
            network: address.network.to_string(),
            address: bytes(address.address),
            length: None,
        }
    }
}

fn gateway(
    field: &str,
    wire: Option<&proto::workload::GatewayAddress>,
) -> Result<Option<GatewayAddress>, InvalidResource> {
    wire.map(GatewayAddress::try_from)
        .transpose()
        .map_err(|it| it.within(field))
}
