//! What an application has written before its tunnel is answered. It goes with the CONNECT (optimistic data), so that the first
//! answer costs one round trip between the nodes and not two.
//!
//! It is only looked at, and stays in the application's socket until the tunnel stands: where the peer refuses, nothing is
//! lost, and another endpoint can have it.

use std::{io, os::fd::AsRawFd};

use bytes::Bytes;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use tokio::net::TcpStream;

/// The head of most requests, and a ClientHello with a post-quantum key. It bounds what is in flight unanswered.
pub(super) const MOST: usize = 4096;

/// What waits in `application`'s socket, at most [`MOST`] bytes. Fails when the application has reset its connection.
pub(super) fn waiting(application: &TcpStream) -> io::Result<Bytes> {
    let mut room = [0; MOST];
    // Not through the runtime, which has not asked the kernel yet whether there is anything.
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(application.as_raw_fd(), &mut room, flags) {
        Ok(read) => Ok(Bytes::copy_from_slice(&room[..read])),
        Err(Errno::EAGAIN) => Ok(Bytes::new()),
        Err(error) => Err(error.into()),
    }
}
