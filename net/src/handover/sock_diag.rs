//! Who listens on an address: asked of the kernel through sock_diag(7).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use super::same_address;
use crate::netns::Netns;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_AND_DUMP: u16 = 0x0301;
/// Longer than the kernel makes a piece of a dump.
const PIECE: usize = 64 * 1024;

/// The cookies (SO_COOKIE) of the TCP sockets that listen at exactly `address` in the namespace, in no order.
pub(super) fn listening(netns: &Netns, address: SocketAddr) -> io::Result<Vec<u64>> {
    let open = || {
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkSockDiag;
        socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)
    };
    let socket = netns.run(open).map_err(io::Error::other)??;
    send(socket.as_raw_fd(), &request(address), MsgFlags::empty())?;
    let mut found = Vec::new();
    while read_piece(&socket, address, &mut found)? == Dump::GoesOn {}
    Ok(found)
}

#[derive(PartialEq, Eq)]
enum Dump {
    GoesOn,
    Ended,
}

fn read_piece(socket: &OwnedFd, address: SocketAddr, found: &mut Vec<u64>) -> io::Result<Dump> {
    let mut buffer = vec![0; PIECE];
    let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    let mut rest = buffer.get(..length).unwrap_or_default();
    while let Some((kind, body, after)) = message(rest) {
        match kind {
            NLMSG_DONE => return Ok(Dump::Ended),
            NLMSG_ERROR => return Err(error(body)),
            _ => found.extend(
                listener(body)
                    .filter(|(bound, _)| same_address(*bound, address))
                    .map(|(_, it)| it),
            ),
        }
        rest = after;
    }
    Ok(Dump::GoesOn)
}

/// The first message of several (`nlmsghdr`): its type, its body, and the rest.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(array(bytes, 0)?);
    let length = usize::try_from(length).ok()?;
    let kind = u16::from_ne_bytes(array(bytes, 4)?);
    let body = bytes.get(HEADER..length)?;
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, after))
}

fn error(body: &[u8]) -> io::Error {
    match array(body, 0).map(i32::from_ne_bytes) {
        Some(code) => io::Error::from_raw_os_error(code.saturating_neg()),
        None => io::ErrorKind::UnexpectedEof.into(),
    }
}

/// `inet_diag_msg` (linux/inet_diag.h): where the socket is bound, and its cookie.
fn listener(body: &[u8]) -> Option<((IpAddr, u16), u64)> {
    const SOURCE: usize = 8;
    const COOKIE: usize = 44;
    let port = u16::from_be_bytes(array(body, 4)?);
    let address = match i32::from(*body.first()?) {
        libc::AF_INET => IpAddr::from(Ipv4Addr::from(array::<4>(body, SOURCE)?)),
        _ => IpAddr::from(Ipv6Addr::from(array::<16>(body, SOURCE)?)),
    };
    let [low, high] = [COOKIE, COOKIE + 4].map(|at| array(body, at).map(u32::from_ne_bytes));
    let cookie = u64::from(high?) << 32 | u64::from(low?);
    Some(((address, port), cookie))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// `nlmsghdr` and `inet_diag_req_v2`: a dump of the TCP sockets that listen on this port.
fn request(address: SocketAddr) -> Vec<u8> {
    const LENGTH: u32 = 16 + 56;
    const TCP: u8 = 6;
    const LISTENING: u32 = 1 << 10;
    let family = match address {
        SocketAddr::V4(_) => 2_u8,
        SocketAddr::V6(_) => 10,
    };
    let mut bytes = Vec::with_capacity(72);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST_AND_DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, TCP, 0, 0]);
    bytes.extend(LISTENING.to_ne_bytes());
    bytes.extend(address.port().to_be_bytes());
    // Any peer's port, any address, any interface, any cookie.
    bytes.extend([0; 2 + 16 + 16 + 4]);
    bytes.extend([0xff; 8]);
    bytes
}
