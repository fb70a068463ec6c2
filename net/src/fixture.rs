//! What the tests of several modules share.

#![allow(
    unsafe_code,
    reason = "loopback is brought up by an ioctl, rights are given up by capset"
)]

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

/// What `f` answers on a thread that has no rights over networks: neither CAP_NET_ADMIN nor CAP_NET_RAW, nor any other.
pub(crate) fn without_network_rights<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            give_up_rights();
            f()
        });
        thread.join().expect("the thread has an answer")
    })
}

/// Of the calling thread alone: the system call knows no processes.
fn give_up_rights() {
    /// Version 3 of the call (`<linux/capability.h>`), and the thread: our own.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    /// Effective, permitted and inheritable rights, in two halves.
    const NONE: [u32; 6] = [0; 6];
    // SAFETY: both arrays have the layout that this version of the call reads, and outlive it.
    let result = unsafe { libc::syscall(libc::SYS_capset, HEADER.as_ptr(), NONE.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
