//! Congestion control of connections that stay within the machine.
//!
//! A sender under `bbr` keeps to the pace of its own clock, which is right for a network, and halves what two processes of one
//! machine can tell each other. Where that is a namespace's default, connections between us and its applications have
//! another; those that leave the machine keep the default, which is the operator's choice.

use std::{io, os::fd::AsFd};

use socket2::SockRef;

/// Every kernel has it, and everybody may use it (`net.ipv4.tcp_allowed_congestion_control`).
const WITHIN: &[u8] = b"reno";

/// Whether what sends under this control is kept back by a clock, as far as we know.
fn is_paced(control: &[u8]) -> bool {
    !matches!(control, b"reno" | b"cubic")
}

/// Whether the control that a socket was born with is not for use within the machine.
pub(super) fn is_unfit(socket: &impl AsFd) -> io::Result<bool> {
    let control = SockRef::from(socket).tcp_congestion()?;
    Ok(is_paced(
        control.split(|byte| *byte == 0).next().unwrap_or_default(),
    ))
}

/// Makes a connection fit for use within the machine.
pub(super) fn make_fit(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_tcp_congestion(WITHIN)
}

/// Makes what a listener accepts fit for use within the machine, where it is not.
pub fn accept_from_within(listener: &impl AsFd) -> io::Result<()> {
    match is_unfit(listener)? {
        true => make_fit(listener),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn only_controls_that_are_known_to_send_at_once_are_fit() {
        assert!(!is_paced(b"cubic") && !is_paced(b"reno"));
        assert!(is_paced(b"bbr") && is_paced(b"dctcp") && is_paced(b""));
    }

    #[test]
    fn what_a_listener_accepts_is_fit() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        make_fit(&listener).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let control = SockRef::from(&accepted).tcp_congestion().unwrap();
        assert!(control.starts_with(WITHIN), "{control:?}");
        assert!(!is_unfit(&accepted).unwrap());
    }
}
