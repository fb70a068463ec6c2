//! What the tests of several modules share.

#![allow(unsafe_code, reason = "loopback is brought up by an ioctl")]

use std::{net::UdpSocket, os::fd::AsRawFd, time::Duration};

use crate::netns::Netns;

/// Longer than anything here takes; a test that waits for it has failed.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// An unnamed namespace with loopback up, or `None`, and why on standard output, where that is not permitted.
pub(crate) fn fresh_netns() -> Option<Netns> {
    match Netns::create() {
        Ok(netns) => {
            netns.run(loopback_up).expect("one may enter one's own");
            Some(netns)
        }
        Err(error) => {
            println!("skipped: {error}: {:?}", std::error::Error::source(&error));
            None
        }
    }
}

fn loopback_up() {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    // SAFETY: ifreq is a C struct for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = i8::try_from(*from).expect("ASCII");
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP).expect("a low bit");
    // SAFETY: the descriptor is open and the request is a whole ifreq that outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
