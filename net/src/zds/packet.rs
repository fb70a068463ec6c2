//! Packets of a Unix `SOCK_SEQPACKET` socket with descriptors beside the bytes, on the runtime.

#![allow(
    unsafe_code,
    reason = "recvmsg with descriptors: see the SAFETY comments"
)]

use std::{
    io::{self, IoSlice},
    mem,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    ptr,
};

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, listen, sendmsg, socket,
};
use tokio::io::{Interest, unix::AsyncFd};

use super::message::Packet;
use crate::netns::Netns;

/// The longest packet, in bytes, in both directions (node-tunnel.md 7.1).
pub const MAX_PACKET: usize = 1024;
/// The kernel's own limit of descriptors in one message (SCM_MAX_FD): with room for all of them nothing that arrives
/// can be installed without us seeing, and leak.
const MAX_DESCRIPTORS: u32 = 253;
const DESCRIPTOR_LEN: u32 = 4;

/// A packet that could not be moved whole.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// Longer than [`MAX_PACKET`]: the rest is lost.
    #[error("longer than {MAX_PACKET} bytes")]
    TooLong,
    /// Descriptors were lost: we are out of them, or there were too many.
    #[error("descriptors were lost on the way")]
    DescriptorsLost,
    /// The system's.
    #[error("socket call failed")]
    Io(#[from] io::Error),
}

#[derive(Debug)]
pub(super) struct Socket(AsyncFd<OwnedFd>);

fn create() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        flags,
        None,
    )?)
}

impl Socket {
    fn register(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd owns its descriptor and always gives the same one, and we never take it out.
        Ok(Self(unsafe { AsyncFd::register(fd)? }))
    }

    pub(super) fn listen(path: &Path) -> io::Result<Self> {
        let fd = create()?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(16)?)?;
        Self::register(fd)
    }

    /// Does not wait: the connection of a Unix socket is there at once, or refused, or the backlog is full (EAGAIN).
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let fd = create()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::register(fd)
    }

    pub(super) async fn accept(&self) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let accept = |fd: &OwnedFd| {
            let raw = accept4(fd.as_raw_fd(), flags)?;
            // SAFETY: accept4 has just given us this descriptor, and nobody else knows it.
            Ok(unsafe { OwnedFd::from_raw_fd(raw) })
        };
        let fd = self.0.async_io(Interest::READABLE, accept).await?;
        Self::register(fd)
    }

    /// Sends one packet. Cancel-safe: it goes whole or not at all.
    pub(super) async fn send(
        &self,
        bytes: &[u8],
        netns: Option<&Netns>,
    ) -> Result<(), PacketError> {
        if bytes.len() > MAX_PACKET {
            return Err(PacketError::TooLong);
        }
        let descriptors: Vec<RawFd> = netns.iter().map(|n| n.as_fd().as_raw_fd()).collect();
        self.send_raw(bytes, &descriptors).await
    }

    pub(super) async fn send_raw(
        &self,
        bytes: &[u8],
        descriptors: &[RawFd],
    ) -> Result<(), PacketError> {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() {
            &[][..]
        } else {
            &rights[..]
        };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let send = |fd: &OwnedFd| {
            let parts = [IoSlice::new(bytes)];
            Ok(sendmsg::<()>(fd.as_raw_fd(), &parts, control, flags, None)?)
        };
        self.0.async_io(Interest::WRITABLE, send).await?;
        Ok(())
    }

    /// The next packet; `None` at the end. Cancel-safe: a packet is taken whole or not at all.
    pub(super) async fn receive(&self) -> Result<Option<Packet>, PacketError> {
        let receive = |fd: &OwnedFd| receive_now(fd);
        let (mut packet, flags) = self.0.async_io(Interest::READABLE, receive).await?;
        packet.lost = flags & libc::MSG_CTRUNC != 0;
        if flags & libc::MSG_TRUNC != 0 {
            return Err(PacketError::TooLong);
        }
        let ended = packet.bytes.is_empty() && packet.descriptors.is_empty() && !packet.lost;
        Ok((!ended).then_some(packet))
    }
}

/// Room for the control message, aligned as `cmsghdr` must be.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [u8; CONTROL_LEN],
}

// SAFETY: CMSG_SPACE only computes.
const CONTROL_LEN: usize = unsafe { libc::CMSG_SPACE(MAX_DESCRIPTORS * DESCRIPTOR_LEN) } as usize;

/// One recvmsg. By hand and not by nix, whose iterator refuses a truncated control message without taking over the
/// descriptors that did arrive.
fn receive_now(fd: &OwnedFd) -> io::Result<(Packet, i32)> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut control = Control {
        bytes: [0; CONTROL_LEN],
    };
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: msghdr is a C struct of integers and pointers, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = ptr::from_mut(&mut part);
    message.msg_iovlen = 1;
    message.msg_control = ptr::from_mut(&mut control).cast();
    message.msg_controllen = CONTROL_LEN;
    // SAFETY: every pointer in `message` leads to a live local of the length that stands beside it.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    let Ok(length) = usize::try_from(length) else {
        return Err(io::Error::last_os_error());
    };
    bytes.truncate(length);
    // SAFETY: `message` is as recvmsg left it, and its control buffer is alive.
    let descriptors = unsafe { take_descriptors(&message) };
    let packet = Packet {
        bytes,
        descriptors,
        lost: false,
    };
    Ok((packet, message.msg_flags))
}

/// Takes ownership of all descriptors of a received message.
///
/// # Safety
/// `message` must be as recvmsg left it, with its control buffer alive, and this must be called once.
unsafe fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: by the contract, the macros walk a control buffer that the kernel filled in; it writes only whole
    // headers within msg_controllen. Each descriptor is new to this process and taken once.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while let Some(found) = header.as_ref() {
            if found.cmsg_level == libc::SOL_SOCKET && found.cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(found).cast::<RawFd>();
                let length = found.cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..length / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    descriptors
}

#[cfg(test)]
impl Socket {
    pub(super) fn pair() -> (Self, Self) {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (a, b) =
            nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
                .expect("a socket pair");
        let wrap = |fd: OwnedFd| Self::register(fd).expect("within a runtime");
        (wrap(a), wrap(b))
    }
}
