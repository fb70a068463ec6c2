//! Handing a port over from one process to the next, without a connection or a datagram lost.
//!
//! Both have a socket on the port (SO_REUSEPORT), and left alone the kernel spreads what arrives over the two. A socket
//! that closes takes along what waits in it: connections that nobody has accepted yet are reset. So whoever joins draws
//! everything new to itself, which leaves the one before it with an empty queue long before it is told to go; and
//! whoever leaves, also the newest one when it is rolled back, first turns what arrives to another, takes in what has
//! arrived at itself, and only then closes. Both are done by a classic BPF program on the group of sockets that answers
//! the place of the one that is meant.
//!
//! Places: a socket that joins gets the next free one; when one leaves, the last takes its place (Linux,
//! net/core/sock_reuseport.c). A place that does not exist means that the kernel spreads again.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::SockRef;
use tokio::time::sleep;

use crate::netns::Netns;

mod sock_diag;

/// How often somebody who must go looks whether it is alone.
const LOOK: Duration = Duration::from_millis(250);
/// How long handshakes may take that began before new ones were turned to another: the other side has our SYN-ACK, and
/// its answer will come to us.
const SETTLE: Duration = Duration::from_millis(250);

/// What to do when told to leave while nobody else has a socket on the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alone {
    /// Close: nobody will come.
    Close,
    /// Go on until somebody has come, as long as the drain allows: what is new would be refused.
    Stay,
}

/// A port of ours that other processes may share, or not.
#[derive(Clone, Debug)]
pub struct Port {
    place: Option<Place>,
    alone: Alone,
}

/// A socket's place among those that share its port.
#[derive(Clone, Debug)]
struct Place {
    netns: Netns,
    address: SocketAddr,
    /// The kernel's name for the socket (SO_COOKIE).
    cookie: u64,
    /// Those that were there before it.
    older: Vec<u64>,
}

impl Port {
    /// A port that is ours alone: it is closed at once.
    pub fn unshared() -> Self {
        Self {
            place: None,
            alone: Alone::Close,
        }
    }

    /// Finds out who else has a socket on the address of `listener`, a TCP one in `netns`, and draws what is new to it.
    ///
    /// Where the kernel cannot tell, the port counts as unshared: then a hand-over may lose what waits in a queue.
    pub fn join(listener: &impl AsFd, netns: &Netns, alone: Alone) -> Self {
        let place = match Place::find(listener, netns) {
            Ok(place) => place,
            Err(error) => {
                tracing::debug!(%error, ?netns, "who else listens cannot be told");
                return Self::unshared();
            }
        };
        let port = Self {
            place: Some(place),
            alone,
        };
        port.draw(listener);
        port
    }

    /// Draws what is new to `socket`: the listener itself, or a datagram socket that joined on the same address when it
    /// did.
    pub fn draw(&self, socket: &impl AsFd) {
        let Some(place) = &self.place else { return };
        // The first one needs nothing, and has no group yet.
        if !place.older.is_empty() {
            turn_to(socket, place.joined_at());
        }
    }

    /// Whether nobody else has a socket there now, as far as can be told.
    pub fn is_alone(&self) -> bool {
        let others = self.place.as_ref().map(Place::others);
        !matches!(others, Some(Ok(others)) if !others.is_empty())
    }

    /// Resolves when `socket` may close: another one gets what is new, and handshakes that were ours have had time to
    /// end. What has arrived is then to be taken in, and nothing more will. Cancel-safe.
    pub async fn handed_over(&self, socket: &impl AsFd) {
        let Some(place) = &self.place else { return };
        loop {
            match place.others() {
                Ok(others) if others.is_empty() && self.alone == Alone::Stay => sleep(LOOK).await,
                Ok(others) if others.is_empty() => return,
                Ok(others) => {
                    turn_to(socket, place.another(&others));
                    return sleep(SETTLE).await;
                }
                Err(error) => {
                    return tracing::debug!(%error, "who else listens cannot be told any more");
                }
            }
        }
    }
}

impl Place {
    fn find(listener: &impl AsFd, netns: &Netns) -> io::Result<Self> {
        let socket = SockRef::from(listener);
        let address = socket.local_addr()?.as_socket();
        let address = address.ok_or(io::ErrorKind::Unsupported)?;
        let cookie = socket.cookie()?;
        let mut place = Self {
            netns: netns.clone(),
            address,
            cookie,
            older: Vec::new(),
        };
        place.older = place.others()?;
        Ok(place)
    }

    fn others(&self) -> io::Result<Vec<u64>> {
        let mut all = sock_diag::listening(&self.netns, self.address)?;
        all.retain(|cookie| *cookie != self.cookie);
        Ok(all)
    }

    fn joined_at(&self) -> usize {
        self.older.len()
    }

    /// A place that is not ours. Exact while two share the port; among more it may be ours after all, and then the
    /// kernel's own migration is what is left.
    fn another(&self, others: &[u64]) -> usize {
        let still_before = others.iter().any(|it| self.older.contains(it));
        if still_before { 0 } else { 1 }
    }
}

/// Has what is new go to the socket at this place of the group of `socket`. Without that the kernel spreads, which is no
/// error: so it is only told.
fn turn_to(socket: &impl AsFd, place: usize) {
    const RETURN_CONSTANT: u16 = 0x06; // BPF_RET | BPF_K (linux/filter.h)
    let mut program = [libc::sock_filter {
        code: RETURN_CONSTANT,
        jt: 0,
        jf: 0,
        k: u32::try_from(place).unwrap_or(u32::MAX),
    }];
    let program = libc::sock_fprog {
        len: 1,
        filter: program.as_mut_ptr(),
    };
    if let Err(error) = setsockopt(socket, sockopt::AttachReusePortCbpf, &program) {
        tracing::debug!(%error, place, "new connections cannot be turned to one socket");
    }
}

/// Whether a listener bound at `bound` takes part in sharing with one bound at `ours`.
fn same_address(bound: (IpAddr, u16), ours: SocketAddr) -> bool {
    bound == (ours.ip(), ours.port())
}

#[cfg(test)]
mod tests;
