//! SOCKS version 5 (RFC 1928), the server's side of what comes before the bytes: no authentication, CONNECT alone.
//!
//! Nothing is answered to a request here before its outcome is known: whoever dials says so with [`reply`].

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use mesh::{
    flow::{EndReason, ResponseFlag},
    outcome::Reason,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

#[cfg(test)]
mod tests;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NONE_ACCEPTABLE: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// Where a client wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An address.
    Address(SocketAddr),
    /// A host name, lower case and without a final dot, and a port.
    Name(String, u16),
}

/// Why a client is not served. It has been told so where the protocol has words for it.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The first byte is not 5: another protocol, or version 4.
    #[error("not SOCKS version 5, but {0}")]
    Version(u8),
    /// It insists on authentication.
    #[error("the client offers no method without authentication")]
    Authentication,
    /// BIND, UDP ASSOCIATE or unknown.
    #[error("command {0} is not supported")]
    Command(u8),
    /// Neither IPv4 nor IPv6 nor a name.
    #[error("address type {0} is not supported")]
    AddressType(u8),
    /// A name that is empty or no text.
    #[error("a host name that is none")]
    Name,
    /// The client is gone.
    #[error("read the request")]
    Io(#[from] io::Error),
}

/// What a request comes to (RFC 1928 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Bytes follow.
    Succeeded = 0,
    /// Anything without a code of its own.
    GeneralFailure = 1,
    /// A policy, or a limit, is against it.
    NotAllowed = 2,
    /// No way leads there.
    NetworkUnreachable = 3,
    /// The host is not known, or does not answer.
    HostUnreachable = 4,
    /// It refused.
    ConnectionRefused = 5,
    /// Not CONNECT.
    CommandNotSupported = 7,
    /// An address of another kind.
    AddressTypeNotSupported = 8,
}

impl From<EndReason> for Reply {
    fn from(reason: EndReason) -> Self {
        match reason {
            EndReason::Refused(Reason::NoAddress | Reason::NoHealthyUpstream) => {
                Self::HostUnreachable
            }
            EndReason::Refused(Reason::Recursion) => Self::NotAllowed,
            denied if denied.flag() == ResponseFlag::Deny => Self::NotAllowed,
            EndReason::ConnectRefused => Self::ConnectionRefused,
            EndReason::ConnectUnreachable => Self::NetworkUnreachable,
            EndReason::ConnectTimedOut | EndReason::TunnelTimedOut | EndReason::ResolveFailed => {
                Self::HostUnreachable
            }
            // What the destination's tunnel answers for policy (node-tunnel 2.5).
            EndReason::PeerRefused(401 | 403) => Self::NotAllowed,
            _ => Self::GeneralFailure,
        }
    }
}

/// Reads the greeting and the request. Reads no byte that follows them. Not cancel-safe.
///
/// # Errors
/// The client is gone, speaks something else, or asks for what is not served, of which it has been told.
pub async fn request<S>(stream: &mut S) -> Result<Destination, RequestError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    greet(stream).await?;
    version(stream).await?;
    let command = stream.read_u8().await?;
    stream.read_u8().await?;
    let kind = stream.read_u8().await?;
    if command != CONNECT {
        reply(stream, Reply::CommandNotSupported, None).await?;
        return Err(RequestError::Command(command));
    }
    match kind {
        IPV4 => {
            let ip = Ipv4Addr::from_bits(stream.read_u32().await?);
            Ok(Destination::Address((ip, stream.read_u16().await?).into()))
        }
        IPV6 => {
            let ip: IpAddr = Ipv6Addr::from_bits(stream.read_u128().await?).into();
            let port = stream.read_u16().await?;
            Ok(Destination::Address((ip.to_canonical(), port).into()))
        }
        NAME => named(stream).await,
        other => {
            reply(stream, Reply::AddressTypeNotSupported, None).await?;
            Err(RequestError::AddressType(other))
        }
    }
}

async fn version<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(), RequestError> {
    match stream.read_u8().await? {
        VERSION => Ok(()),
        other => Err(RequestError::Version(other)),
    }
}

async fn greet<S>(stream: &mut S) -> Result<(), RequestError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    version(stream).await?;
    let count = stream.read_u8().await?;
    let mut methods = vec![0; count.into()];
    stream.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[VERSION, NONE_ACCEPTABLE]).await?;
        return Err(RequestError::Authentication);
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    Ok(())
}

/// A name; an address that is written as one is an address.
async fn named<S>(stream: &mut S) -> Result<Destination, RequestError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let length = stream.read_u8().await?;
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await?;
    let port = stream.read_u16().await?;
    let text = std::str::from_utf8(&bytes).ok();
    let text = text.map(|it| it.strip_suffix('.').unwrap_or(it));
    let sane = |it: &&str| !it.is_empty() && it.bytes().all(|byte| byte.is_ascii_graphic());
    let Some(text) = text.filter(sane) else {
        reply(stream, Reply::GeneralFailure, None).await?;
        return Err(RequestError::Name);
    };
    Ok(match text.parse::<IpAddr>() {
        Ok(ip) => Destination::Address((ip.to_canonical(), port).into()),
        Err(_) => Destination::Name(text.to_ascii_lowercase(), port),
    })
}

/// Tells the client what its request came to; `from`: the address from which it was connected, where there is one.
///
/// # Errors
/// The client is gone.
pub async fn reply<S: AsyncWrite + Unpin>(
    stream: &mut S,
    reply: Reply,
    from: Option<SocketAddr>,
) -> io::Result<()> {
    let from = from.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, 0).into());
    let mut message = vec![VERSION, reply as u8, 0];
    match from.ip() {
        IpAddr::V4(ip) => {
            message.push(IPV4);
            message.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            message.push(IPV6);
            message.extend(ip.octets());
        }
    }
    message.extend(from.port().to_be_bytes());
    stream.write_all(&message).await
}
