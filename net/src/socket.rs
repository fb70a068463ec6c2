//! Sockets with the options the tunnel needs, made in the right network namespace.
//!
//! Every socket of the tunnel carries the mark that the redirect rules exempt, or it would be redirected to itself.
//! Options, order and fallbacks: node-tunnel.md 7.3. Which address to use is decided elsewhere.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use mesh::flow::EndReason;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rand::RngExt;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::{
    netns::{Netns, NetnsError},
    report::Chain,
};

mod congestion;
mod prepared;

pub use congestion::accept_from_within;
pub use prepared::Connector;

/// The mark of all the tunnel's packets: the redirect rules let it pass.
pub const PACKET_MARK: u32 = 1337;
/// Connections that wait to be accepted, per listener; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// TCP keepalive of application-facing and upstream sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Whether a silent connection is probed at all.
    pub probes: bool,
    /// Silence before the first probe.
    pub time: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is reset.
    pub retries: u32,
    /// Also set TCP_USER_TIMEOUT to time + retries * interval, which bounds unacknowledged data too.
    pub user_timeout: bool,
}

impl Default for Keepalive {
    /// 180 s, 180 s, 9 and no user timeout (node-tunnel.md 1.3).
    fn default() -> Self {
        Self {
            probes: true,
            time: Duration::from_secs(180),
            interval: Duration::from_secs(180),
            retries: 9,
            user_timeout: false,
        }
    }
}

impl Keepalive {
    fn longest_silence(&self) -> Duration {
        self.time + self.interval * self.retries
    }
}

/// Whether an outbound connection keeps its client's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceAddress {
    /// The kernel chooses.
    #[default]
    Own,
    /// This one if the system permits, else the kernel chooses.
    Preferred(IpAddr),
    /// This one, or the connection fails.
    Required(IpAddr),
}

/// Makes sockets: in which namespace, with which options. Cheap to clone; one per pod.
#[derive(Clone, Debug)]
pub struct Factory {
    /// Where; `None`: in the namespace of the calling thread.
    pub netns: Option<Netns>,
    /// SO_MARK of every socket.
    pub mark: Option<u32>,
    /// SO_REUSEPORT on listeners, so that an upgrade's new instance can listen beside the old one.
    pub reuse_port: bool,
    /// Whether listeners use IPv6 where the namespace has it.
    pub ipv6: bool,
    /// Keepalive of connections.
    pub keepalive: Option<Keepalive>,
}

impl Default for Factory {
    /// The process's own namespace, no mark, no shared ports.
    fn default() -> Self {
        Self {
            netns: None,
            mark: None,
            reuse_port: false,
            ipv6: true,
            keepalive: Some(Keepalive::default()),
        }
    }
}

/// What was being done with a socket; see [`SocketError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// socket(2).
    Create,
    /// bind(2).
    Bind,
    /// listen(2).
    Listen,
    /// connect(2).
    Connect,
    /// An option, by its name in `<sys/socket.h>`.
    Set(&'static str),
    /// Handing it to the runtime.
    Register,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create => f.write_str("create"),
            Self::Bind => f.write_str("bind"),
            Self::Listen => f.write_str("listen on"),
            Self::Connect => f.write_str("connect"),
            Self::Set(option) => write!(f, "set {option} on"),
            Self::Register => f.write_str("register"),
        }
    }
}

/// A socket that could not be made or connected; names it.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A system call failed.
    #[error("{operation} {protocol} socket {address}")]
    Io {
        /// The call.
        operation: Operation,
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// The address it is bound or connected to.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The namespace could not be entered.
    #[error("make a socket for {address} in a pod's namespace")]
    Netns {
        /// The address it was for.
        address: SocketAddr,
        /// Why.
        source: NetnsError,
    },
}

impl SocketError {
    /// The system's error, for telling "refused" from "timed out".
    pub fn io_kind(&self) -> io::ErrorKind {
        match self {
            Self::Io {
                operation: Operation::Connect,
                source,
                ..
            } => connect_kind(source),
            Self::Io { source, .. } => source.kind(),
            Self::Netns { .. } => io::ErrorKind::Other,
        }
    }

    /// What the metric and the log line say of a connection that did not come about.
    pub fn end_reason(&self) -> EndReason {
        connect_end(self.io_kind())
    }
}

/// The kind of what connect(2) said. Whoever bars the way, a router, a filter or the peer, may say so in many words (ICMP, as
/// `icmp_err_convert` and `tab_unreach` of the kernel put it), of which the standard library knows two.
pub fn connect_kind(error: &io::Error) -> io::ErrorKind {
    match error.raw_os_error() {
        Some(
            libc::EACCES
            | libc::EPERM
            | libc::EINVAL
            | libc::EHOSTDOWN
            | libc::ENETDOWN
            | libc::ENONET
            | libc::ENOPROTOOPT
            | libc::EOPNOTSUPP
            | libc::EPROTO,
        ) => io::ErrorKind::HostUnreachable,
        _ => error.kind(),
    }
}

/// Why a TCP connection did not come about. The system's errors are an open list, hence the rest.
pub(crate) fn connect_end(kind: io::ErrorKind) -> EndReason {
    use io::ErrorKind;
    match kind {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => EndReason::ConnectRefused,
        ErrorKind::TimedOut => EndReason::ConnectTimedOut,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => EndReason::ConnectUnreachable,
        _ => EndReason::Internal,
    }
}

fn name_of(kind: Type) -> &'static str {
    match kind {
        Type::STREAM => "tcp",
        _ => "udp",
    }
}

/// A socket in the making: gives every failure its name.
struct Draft {
    socket: Socket,
    address: SocketAddr,
    protocol: &'static str,
}

impl Draft {
    fn new(address: SocketAddr, kind: Type) -> Result<Self, SocketError> {
        let protocol = match kind {
            Type::STREAM => Protocol::TCP,
            _ => Protocol::UDP,
        };
        let domain = Domain::for_address(address);
        match Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol)) {
            Ok(socket) => Ok(Self::of(socket, address, kind)),
            Err(source) => Err(SocketError::Io {
                operation: Operation::Create,
                protocol: name_of(kind),
                address,
                source,
            }),
        }
    }

    fn of(socket: Socket, address: SocketAddr, kind: Type) -> Self {
        Self {
            socket,
            address,
            protocol: name_of(kind),
        }
    }

    fn named<T>(&self, operation: Operation, result: io::Result<T>) -> Result<T, SocketError> {
        result.map_err(|source| SocketError::Io {
            operation,
            protocol: self.protocol,
            address: self.address,
            source,
        })
    }

    fn mark(&self, mark: Option<u32>) -> Result<(), SocketError> {
        match mark {
            Some(mark) => self.named(Operation::Set("SO_MARK"), self.socket.set_mark(mark)),
            None => Ok(()),
        }
    }

    fn reuse_port(&self, reuse: bool) -> Result<(), SocketError> {
        let result = match reuse {
            true => self.socket.set_reuse_port(true),
            false => Ok(()),
        };
        self.named(Operation::Set("SO_REUSEPORT"), result)
    }

    fn bind(&self) -> Result<(), SocketError> {
        self.named(Operation::Bind, self.socket.bind(&self.address.into()))
    }
}

impl Factory {
    /// Sockets inside `netns`, marked, with shared listening ports: those of a pod.
    pub fn for_pod(netns: Netns) -> Self {
        Self {
            netns: Some(netns),
            mark: Some(PACKET_MARK),
            reuse_port: true,
            ..Self::default()
        }
    }

    /// A TCP listener at exactly `address`.
    ///
    /// IP_TRANSPARENT is set where permitted, for connections redirected by TPROXY. Must run within a runtime.
    ///
    /// # Errors
    /// [`SocketError`], for instance when another process listens there without sharing the port.
    pub fn listen(&self, address: SocketAddr) -> Result<TcpListener, SocketError> {
        let draft = self.inside(address, || {
            let draft = Draft::new(address, Type::STREAM)?;
            draft.mark(self.mark)?;
            let reuse = draft.socket.set_reuse_address(true);
            draft.named(Operation::Set("SO_REUSEADDR"), reuse)?;
            draft.reuse_port(self.reuse_port)?;
            if address.is_ipv6() {
                let dual = draft.socket.set_only_v6(!address.ip().is_unspecified());
                draft.named(Operation::Set("IPV6_V6ONLY"), dual)?;
            }
            // Best effort: only TPROXY needs it, and it takes CAP_NET_ADMIN.
            let _ = set_transparent(&draft.socket, address.ip());
            // Accepted connections have the options of their listener: five calls for each are saved.
            self.tune(&draft.socket)
                .or_else(|(option, error)| draft.named(Operation::Set(option), Err(error)))?;
            draft.bind()?;
            let listening = draft.socket.listen(BACKLOG);
            draft.named(Operation::Listen, listening)?;
            Ok(draft)
        })?;
        let listener = std::net::TcpListener::from(draft.socket);
        TcpListener::from_std(listener).map_err(|source| SocketError::Io {
            operation: Operation::Register,
            protocol: "tcp",
            address,
            source,
        })
    }

    /// A TCP listener for every address of the namespace: one dual-stack socket on `[::]`, or IPv4 alone where IPv6 is
    /// off or absent.
    ///
    /// # Errors
    /// As [`Factory::listen`].
    pub fn listen_any(&self, port: u16) -> Result<TcpListener, SocketError> {
        let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        if !self.ipv6 {
            return self.listen(v4);
        }
        match self.listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
            Err(error) if lacks_ipv6(&error) => self.listen(v4),
            other => other,
        }
    }

    /// TCP listeners on 127.0.0.1 and, where the namespace has it, ::1. With port 0 both get the same one.
    ///
    /// # Errors
    /// As [`Factory::listen`]; the absence of IPv6 is none.
    pub fn listen_loopback(&self, port: u16) -> Result<Vec<TcpListener>, SocketError> {
        let first = self.listen(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        let port = first.local_addr().map_or(port, |bound| bound.port());
        let second = self.on_ipv6_loopback(port, |address| self.listen(address))?;
        Ok([Some(first), second].into_iter().flatten().collect())
    }

    /// A UDP socket bound at exactly `address`. Must run within a runtime.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind_udp(&self, address: SocketAddr) -> Result<UdpSocket, SocketError> {
        let draft = self.inside(address, || {
            let draft = Draft::new(address, Type::DGRAM)?;
            draft.mark(self.mark)?;
            draft.reuse_port(self.reuse_port)?;
            if address.is_ipv6() {
                let dual = draft.socket.set_only_v6(!address.ip().is_unspecified());
                draft.named(Operation::Set("IPV6_V6ONLY"), dual)?;
            }
            draft.bind()?;
            Ok(draft)
        })?;
        let socket = std::net::UdpSocket::from(draft.socket);
        UdpSocket::from_std(socket).map_err(|source| SocketError::Io {
            operation: Operation::Register,
            protocol: "udp",
            address,
            source,
        })
    }

    /// UDP sockets on 127.0.0.1 and, where the namespace has it, ::1.
    ///
    /// # Errors
    /// As [`Factory::bind_udp`]; the absence of IPv6 is none.
    pub fn bind_udp_loopback(&self, port: u16) -> Result<Vec<UdpSocket>, SocketError> {
        let first = self.bind_udp(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        let port = first.local_addr().map_or(port, |bound| bound.port());
        let second = self.on_ipv6_loopback(port, |address| self.bind_udp(address))?;
        Ok([Some(first), second].into_iter().flatten().collect())
    }

    /// Connects to `destination`; the connection is the namespace's even though the caller has left it. Has no timeout
    /// of its own beyond the kernel's. Cancel-safe: dropping it closes the socket.
    ///
    /// # Errors
    /// [`SocketError`]; `Connect` is the destination's doing, the others are ours.
    pub async fn connect(
        &self,
        destination: SocketAddr,
        source: SourceAddress,
    ) -> Result<TcpStream, SocketError> {
        connect_with(|| self.draft(destination), destination, source).await
    }

    /// A socket to connect with, and its options.
    fn draft(&self, destination: SocketAddr) -> Result<Draft, SocketError> {
        self.inside(destination, || self.tuned(destination))
    }

    /// As [`Factory::draft`], in the namespace that the thread is in.
    fn tuned(&self, destination: SocketAddr) -> Result<Draft, SocketError> {
        let draft = Draft::new(destination, Type::STREAM)?;
        draft.mark(self.mark)?;
        self.tune(&draft.socket)
            .or_else(|(option, error)| draft.named(Operation::Set(option), Err(error)))?;
        Ok(draft)
    }

    /// Fails where a connection cannot keep its client's address, for want of a right.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn check_transparent(&self) -> Result<(), SocketError> {
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        self.inside(address, || {
            let draft = Draft::new(address, Type::STREAM)?;
            let set = set_transparent(&draft.socket, address.ip());
            draft.named(Operation::Set("IP_TRANSPARENT"), set)
        })
    }

    /// Whether the address is one of the namespace's own. Where that cannot be told, it is.
    pub fn is_local(&self, address: IpAddr) -> bool {
        let address = SocketAddr::new(address.to_canonical(), 0);
        let bound = self.inside(address, || Draft::new(address, Type::DGRAM)?.bind());
        !matches!(bound, Err(SocketError::Io { source, .. }) if source.kind() == io::ErrorKind::AddrNotAvailable)
    }

    /// Sees to it that an accepted connection has the options of a connection: TCP_NODELAY and keepalive. It has those of
    /// its listener, which may be somebody else's from whom it was moved to ours. The mark is inherited.
    pub fn adopt(&self, stream: &TcpStream) -> io::Result<()> {
        let socket = SockRef::from(stream);
        let has_them = match &self.keepalive {
            Some(keepalive) if keepalive.probes => socket.keepalive()?,
            _ => socket.tcp_nodelay()?,
        };
        match has_them {
            true => Ok(()),
            false => self.tune(&socket).map_err(|(_, source)| source),
        }
    }

    fn tune(&self, socket: &Socket) -> Result<(), (&'static str, io::Error)> {
        let named = |option| move |source| (option, source);
        socket.set_tcp_nodelay(true).map_err(named("TCP_NODELAY"))?;
        let Some(keepalive) = &self.keepalive else {
            return Ok(());
        };
        if keepalive.probes {
            let probes = TcpKeepalive::new()
                .with_time(keepalive.time)
                .with_interval(keepalive.interval)
                .with_retries(keepalive.retries);
            socket
                .set_tcp_keepalive(&probes)
                .map_err(named("SO_KEEPALIVE"))?;
        }
        if keepalive.user_timeout {
            socket
                .set_tcp_user_timeout(Some(keepalive.longest_silence()))
                .map_err(named("TCP_USER_TIMEOUT"))?;
        }
        Ok(())
    }

    fn inside<T>(
        &self,
        address: SocketAddr,
        make: impl FnOnce() -> Result<T, SocketError>,
    ) -> Result<T, SocketError> {
        match &self.netns {
            None => make(),
            Some(netns) => netns
                .run(make)
                .map_err(|source| SocketError::Netns { address, source })?,
        }
    }

    fn on_ipv6_loopback<T>(
        &self,
        port: u16,
        make: impl FnOnce(SocketAddr) -> Result<T, SocketError>,
    ) -> Result<Option<T>, SocketError> {
        if !self.ipv6 {
            return Ok(None);
        }
        match make(SocketAddr::from((Ipv6Addr::LOCALHOST, port))) {
            Err(error) if lacks_ipv6(&error) => Ok(None),
            other => other.map(Some),
        }
    }
}

/// Connects with a socket that `draft` answers; another one where the ends are taken.
async fn connect_with(
    draft: impl Fn() -> Result<Draft, SocketError>,
    destination: SocketAddr,
    source: SourceAddress,
) -> Result<TcpStream, SocketError> {
    if source != SourceAddress::Own {
        for _ in 0..PORT_TRIES {
            match connect_from(draft()?, destination, source, SourcePort::Ours).await {
                // Another connection has the very same ends.
                Err(error) if error.io_kind() == io::ErrorKind::AddrNotAvailable => {}
                connected => return connected,
            }
        }
    }
    connect_from(draft()?, destination, source, SourcePort::Kernels).await
}

/// A socket is bound in its own namespace, wherever the thread is.
async fn connect_from(
    draft: Draft,
    destination: SocketAddr,
    source: SourceAddress,
    port: SourcePort,
) -> Result<TcpStream, SocketError> {
    match source {
        SourceAddress::Own => {}
        SourceAddress::Preferred(address) => {
            if let Err(error) = bind_source(&draft, address, port) {
                tracing::debug!(%address, error = %Chain(&error), "source address not kept");
            }
        }
        SourceAddress::Required(address) => bind_source(&draft, address, port)?,
    }
    let Draft {
        socket, protocol, ..
    } = draft;
    let connected = TcpSocket::from_std_stream(socket.into()).connect(destination);
    connected.await.map_err(|source| SocketError::Io {
        operation: Operation::Connect,
        protocol,
        address: destination,
        source,
    })
}

/// Ports for connections in a client's name: below those that clients take for themselves (Linux's default of
/// `net.ipv4.ip_local_port_range`). A client that later connects to the same application, past us or to be captured, from
/// a port that we have taken in its name would have the very same ends as our connection: its packets would be taken for
/// ours, and it would never be answered.
const PORTS: std::ops::RangeInclusive<u16> = 10_240..=32_767;
/// Ports that are tried before the kernel chooses one.
const PORT_TRIES: usize = 4;

/// Who chooses the port of a connection in a client's name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SourcePort {
    Ours,
    Kernels,
}

fn bind_source(draft: &Draft, source: IpAddr, port: SourcePort) -> Result<(), SocketError> {
    let socket = &draft.socket;
    let transparent = set_transparent(socket, source);
    // That alone lets it bind to what is nobody's here (`inet_can_nonlocal_bind`): IP_FREEBIND would add nothing.
    draft.named(Operation::Set("IP_TRANSPARENT"), transparent)?;
    match port {
        SourcePort::Ours => bind_to_our_port(draft, source),
        SourcePort::Kernels => bind_to_any_port(draft, source),
    }
}

fn bind_to_our_port(draft: &Draft, source: IpAddr) -> Result<(), SocketError> {
    // A port is taken per pair of ends and not per client, and an application may listen on it.
    let reuse = draft.socket.set_reuse_address(true);
    draft.named(Operation::Set("SO_REUSEADDR"), reuse)?;
    for _ in 0..PORT_TRIES {
        let port = rand::rng().random_range(PORTS);
        match draft.socket.bind(&SocketAddr::new(source, port).into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return draft.named(Operation::Bind, bound),
        }
    }
    bind_to_any_port(draft, source)
}

/// With a port chosen at connect, so that ports run out per destination and not per client (IP_BIND_ADDRESS_NO_PORT).
fn bind_to_any_port(draft: &Draft, source: IpAddr) -> Result<(), SocketError> {
    let socket = &draft.socket;
    let late_port = nix::sys::socket::setsockopt(
        &socket.as_fd(),
        nix::sys::socket::sockopt::IpBindAddressNoPort,
        &true,
    );
    draft.named(
        Operation::Set("IP_BIND_ADDRESS_NO_PORT"),
        late_port.map_err(io::Error::from),
    )?;
    let bound = socket.bind(&SocketAddr::new(source, 0).into());
    draft.named(Operation::Bind, bound)
}

fn set_transparent(socket: &Socket, address: IpAddr) -> io::Result<()> {
    match address {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true),
        // A dual-stack socket takes IPv4 connections too, under the same flag of the socket.
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}

/// Where a redirected connection was going: what the kernel's NAT recorded, unmapped.
///
/// A connection that was not redirected answers its own local address, which is what it was going to; the recursion
/// guard then refuses it on the tunnel's ports. Source: SO_ORIGINAL_DST, then IP6T_SO_ORIGINAL_DST.
///
/// `peer`: where it comes from. A mapped IPv4 connection on a dual-stack listener is recorded as IPv4.
///
/// # Errors
/// Only when the socket is no longer connected.
pub fn original_destination(stream: &TcpStream, peer: SocketAddr) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let recorded = match peer.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    let found = recorded.ok().and_then(|address| address.as_socket());
    match found {
        Some(address) => Ok(unmapped(address)),
        None => stream.local_addr().map(unmapped),
    }
}

/// The same address without the `::ffff:` form.
pub fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Raises the soft limit of open files to the hard one; returns the limit now in force.
///
/// # Errors
/// The system's, which leaves the old limit.
pub fn raise_open_files_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// Whether SO_MARK is permitted, to fail at start-up and not at the first connection.
///
/// # Errors
/// [`SocketError`] naming the option: CAP_NET_ADMIN is missing.
pub fn check_mark(mark: u32) -> Result<(), SocketError> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Draft::new(address, Type::STREAM)?.mark(Some(mark))
}

fn lacks_ipv6(error: &SocketError) -> bool {
    let SocketError::Io { source, .. } = error else {
        return false;
    };
    matches!(
        source.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT)
    )
}

#[cfg(test)]
mod tests;
