//! An eye on a link: which ports are spoken to, and whether a text passes in the clear.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
        sockopt,
    },
    time::TimeVal,
};
use serde::{Deserialize, Serialize};

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// TCP packets between addresses of the network.
    pub packets: u64,
    /// Of those, packets that hold the marker.
    pub marked: u64,
    /// By the lower port of the two: packets.
    pub ports: BTreeMap<u16, u64>,
    /// By the port connected to: connections that were opened.
    pub opened: BTreeMap<u16, u64>,
}

/// Watches until standard input ends, then prints a [`Seen`].
pub(super) fn watch(interface: &str, marker: &[u8], within: &[IpNet]) -> Result<ExitCode> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        flags,
        SockProtocol::EthAll,
    )
    .context("open a packet socket")?;
    let mut interfaces = nix::ifaddrs::getifaddrs().context("list the interfaces")?;
    let link = interfaces.find_map(|found| {
        let link = found.address?.as_link_addr().copied()?;
        (found.interface_name == interface).then_some(link)
    });
    bind(
        socket.as_raw_fd(),
        &link.with_context(|| format!("find the interface {interface}"))?,
    )
    .context("watch the interface")?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
    let ended = Arc::new(AtomicBool::new(false));
    let ending = ended.clone();
    thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        ending.store(true, Ordering::Relaxed);
    });
    println!("watching");
    let mut seen = Seen::default();
    let mut frame = vec![0; 128 << 10];
    loop {
        // What was sent before the end of standard input is in the queue by then. It is read without waiting: on a link
        // that is never quiet, waiting for silence would not end.
        let over = ended.load(Ordering::Relaxed);
        let flags = match over {
            true => MsgFlags::MSG_DONTWAIT,
            false => MsgFlags::empty(),
        };
        match recv(socket.as_raw_fd(), &mut frame, flags) {
            Ok(length) => seen.take(&frame[..length], marker, within),
            Err(_) if over => break,
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
    println!("{}", serde_json::to_string(&seen)?);
    Ok(ExitCode::SUCCESS)
}

impl Seen {
    fn take(&mut self, frame: &[u8], marker: &[u8], within: &[IpNet]) {
        let Some(segment) = Segment::parse(frame) else {
            return;
        };
        let inside = |ip: IpAddr| within.iter().any(|network| network.contains(&ip));
        if !inside(segment.source) || !inside(segment.destination) {
            return;
        }
        self.packets += 1;
        let found = !marker.is_empty()
            && segment
                .payload
                .windows(marker.len())
                .any(|window| window == marker);
        self.marked += u64::from(found);
        let (from, to) = segment.ports;
        *self.ports.entry(from.min(to)).or_default() += 1;
        if segment.opens {
            *self.opened.entry(to).or_default() += 1;
        }
    }
}

/// A TCP segment in an Ethernet frame.
struct Segment<'a> {
    source: IpAddr,
    destination: IpAddr,
    ports: (u16, u16),
    opens: bool,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let packet = frame.get(14..)?;
        match frame.get(12..14)? {
            [0x08, 0x00] => Self::ipv4(packet),
            [0x86, 0xdd] => Self::ipv6(packet),
            _ => None,
        }
    }

    /// RFC 791 3.1.
    fn ipv4(packet: &'a [u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0xf) * 4;
        let address = |at: usize| {
            <[u8; 4]>::try_from(packet.get(at..at + 4)?)
                .ok()
                .map(Ipv4Addr::from)
        };
        (*packet.get(9)? == TCP).then_some(())?;
        Self::tcp(
            address(12)?.into(),
            address(16)?.into(),
            packet.get(header..)?,
        )
    }

    /// RFC 8200 3. Nobody here sends extension headers before TCP.
    fn ipv6(packet: &'a [u8]) -> Option<Self> {
        let address = |at: usize| {
            <[u8; 16]>::try_from(packet.get(at..at + 16)?)
                .ok()
                .map(Ipv6Addr::from)
        };
        (*packet.get(6)? == TCP).then_some(())?;
        Self::tcp(address(8)?.into(), address(24)?.into(), packet.get(40..)?)
    }

    /// RFC 9293 3.1.
    fn tcp(source: IpAddr, destination: IpAddr, segment: &'a [u8]) -> Option<Self> {
        let port = |at: usize| {
            <[u8; 2]>::try_from(segment.get(at..at + 2)?)
                .ok()
                .map(u16::from_be_bytes)
        };
        let flags = *segment.get(13)?;
        let header = usize::from(segment.get(12)? >> 4) * 4;
        Some(Self {
            source,
            destination,
            ports: (port(0)?, port(2)?),
            opens: flags & (SYN | ACK) == SYN,
            payload: segment.get(header..)?,
        })
    }
}

const TCP: u8 = 6;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(source: [u8; 4], port: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45]);
        frame.extend([0; 8]);
        frame.extend([TCP, 0, 0]);
        frame.extend(source);
        frame.extend([10, 244, 2, 2]);
        frame.extend(40_000_u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend([0; 8]);
        frame.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn what_passes_between_pods_is_counted_by_port_and_searched() {
        let within = ["10.244.0.0/16".parse().unwrap()];
        let mut seen = Seen::default();
        let pod = [10, 244, 1, 2];
        seen.take(&frame(pod, 7000, SYN, b""), b"secret", &within);
        seen.take(&frame(pod, 7000, ACK, b"a secret here"), b"secret", &within);
        seen.take(&frame(pod, 15008, ACK, b"\x17\x03\x03"), b"secret", &within);
        seen.take(
            &frame([10, 100, 0, 2], 15012, SYN, b"secret"),
            b"secret",
            &within,
        );
        seen.take(b"short", b"secret", &within);
        let ports = BTreeMap::from([(7000, 2), (15008, 1)]);
        assert_eq!(
            seen,
            Seen {
                packets: 3,
                marked: 1,
                ports,
                opened: BTreeMap::from([(7000, 1)])
            }
        );
    }
}
