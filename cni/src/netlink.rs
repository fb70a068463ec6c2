//! The few netlink requests that enrolment needs, one blocking socket each: policy routing in a pod's namespace, and
//! who still has sockets on the tunnel's ports. Made in the namespace of the calling thread.

use std::io;

use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkBuffer,
        NetlinkMessage,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
    sys::{Socket, SocketAddr, protocols},
};

use crate::rules::{CONNECTION_MARK, Family, MARK_MASK};

/// Where replies to the tunnel's own connections are routed from.
const ROUTING_TABLE: u8 = 100;
/// Preference of the rule that leads there: before `main` (32766).
const RULE_PREFERENCE: u32 = 32764;
/// `lo` has index 1 in every namespace.
const LOOPBACK_INDEX: u32 = 1;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Subsystem nftables (10), message `NFT_MSG_GETTABLE` (1).
const NFT_GET_TABLE: u16 = 10 << 8 | 1;

/// Add or delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// What exists already is fine.
    Add,
    /// What is absent already is fine.
    Delete,
}

/// The routing that returns replies to the tunnel: packets marked as belonging to one of its connections are
/// delivered locally, wherever they are addressed to. Idempotent.
pub(crate) fn routing(verb: Verb, families: &[Family]) -> io::Result<()> {
    let socket = connect(protocols::NETLINK_ROUTE)?;
    for &family in families {
        let (rule, route) = (mark_rule(family), local_route(family));
        let messages = match verb {
            Verb::Add => [
                RouteNetlinkMessage::NewRule(rule),
                RouteNetlinkMessage::NewRoute(route),
            ],
            Verb::Delete => [
                RouteNetlinkMessage::DelRule(rule),
                RouteNetlinkMessage::DelRoute(route),
            ],
        };
        for message in messages {
            request(&socket, verb, message)?;
        }
    }
    Ok(())
}

/// How many connections have one of `ports` as their local port in this namespace. Listening sockets do not count,
/// nor do those in TIME_WAIT, which nobody holds any more.
pub(crate) fn connections_on(ports: &[u16]) -> io::Result<usize> {
    let socket = connect(protocols::NETLINK_SOCK_DIAG)?;
    let mut total = 0;
    for family in [libc::AF_INET, libc::AF_INET6] {
        for port in ports {
            total += dump(&socket, &sock_diag_request(family, *port))?;
        }
    }
    Ok(total)
}

/// Whether this namespace holds any table of nftables: what a new one does not, and what costs a program to list.
pub(crate) fn has_nft_tables() -> io::Result<bool> {
    let socket = connect(protocols::NETLINK_NETFILTER)?;
    Ok(dump(&socket, &nft_tables_request())? > 0)
}

fn connect(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn mark_rule(family: Family) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = address_family(family);
    rule.header.table = ROUTING_TABLE;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::FwMark(CONNECTION_MARK),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Priority(RULE_PREFERENCE),
    ];
    rule
}

fn local_route(family: Family) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = address_family(family);
    route.header.table = ROUTING_TABLE;
    route.header.protocol = RouteProtocol::Boot;
    route.header.scope = RouteScope::Host;
    route.header.kind = RouteType::Local;
    route.attributes = vec![RouteAttribute::Oif(LOOPBACK_INDEX)];
    route
}

fn request(socket: &Socket, verb: Verb, message: RouteNetlinkMessage) -> io::Result<()> {
    let mut message = NetlinkMessage::from(message);
    let (flags, settled): (u16, &[i32]) = match verb {
        Verb::Add => (NLM_F_CREATE | NLM_F_EXCL, &[libc::EEXIST]),
        Verb::Delete => (0, &[libc::ENOENT, libc::ESRCH]),
    };
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    match exchange(socket, &bytes) {
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|code| settled.contains(&code)) =>
        {
            Ok(())
        }
        result => result.map(drop),
    }
}

fn dump(socket: &Socket, request: &[u8]) -> io::Result<usize> {
    exchange(socket, request)
}

/// Sends a request and reads to its end: an acknowledgement, or the end of a dump. Answers how many messages came.
fn exchange(socket: &Socket, request: &[u8]) -> io::Result<usize> {
    socket.send(request, 0)?;
    let mut messages = 0;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            match message.message_type() {
                NLMSG_DONE => return Ok(messages),
                NLMSG_ERROR => return error_code(message.payload()).map(|()| messages),
                _ => messages += 1,
            }
            let length = usize::try_from(message.length()).map_err(io::Error::other)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn error_code(payload: &[u8]) -> io::Result<()> {
    let code = payload
        .first_chunk::<4>()
        .map(|bytes| i32::from_ne_bytes(*bytes));
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::other("a netlink error without a code")),
    }
}

/// `nlmsghdr` and `nfgenmsg` (linux/netfilter/nfnetlink.h): a dump of the tables of all families.
fn nft_tables_request() -> Vec<u8> {
    const LENGTH: u32 = 16 + 4;
    let mut bytes = Vec::with_capacity(20);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(NFT_GET_TABLE.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend([0; 8]);
    // Family unspecified, version 0, no resource.
    bytes.extend([0; 4]);
    bytes
}

/// `nlmsghdr` and `inet_diag_req_v2` (linux/inet_diag.h): a dump of TCP sockets with this local port.
fn sock_diag_request(family: i32, port: u16) -> Vec<u8> {
    const LENGTH: u32 = 16 + 56;
    const TCP: u8 = 6;
    /// Bits are the kernel's states: all but TIME_WAIT (6), CLOSE (7) and LISTEN (10).
    const STATES: u32 = 0b1_1011_0011_1110;
    let mut bytes = Vec::with_capacity(72);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend([0; 8]);
    let family = u8::try_from(family).unwrap_or_default();
    bytes.extend([family, TCP, 0, 0]);
    bytes.extend(STATES.to_ne_bytes());
    bytes.extend(port.to_be_bytes());
    // Any peer's port, any address, any interface, no cookie.
    bytes.extend([0; 2 + 16 + 16 + 4]);
    bytes.extend([0xff; 8]);
    bytes
}
