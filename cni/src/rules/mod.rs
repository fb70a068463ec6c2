//! What is written into a pod's network namespace, as plain facts: one model of the redirection rules, rendered for
//! nftables ([`nft`]) and for iptables ([`iptables`]). Nothing here runs a program or opens a socket.
//!
//! Table and chain names, ports and marks are Istio's, so that a pod can be taken over in both directions. Two things
//! are ours. Every TCP redirect matches connection attempts only (a SYN and nothing else), because the first NAT
//! rule starts connection tracking and packets of connections that are already open would otherwise look new and be
//! diverted mid-stream. And leaving has a stage of its own ([`Stage::Leaving`]), because deleting the NAT table
//! would cut what still flows through the tunnel.

pub mod host;
pub mod iptables;
pub mod nft;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// The tunnel's listener for what a pod sends.
pub const OUTBOUND_PORT: u16 = 15001;
/// The tunnel's listener for plaintext that a pod receives.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// The tunnel's listener for HBONE; never redirected.
pub const INBOUND_HBONE_PORT: u16 = 15008;
/// The tunnel's DNS listener.
pub const DNS_PORT: u16 = 15053;
/// What DNS clients call.
pub const DNS_CLIENT_PORT: u16 = 53;
/// Mark of every packet that the tunnel itself sends.
pub const TUNNEL_MARK: u32 = 0x539;
/// Mark of connections that the tunnel opened, and of the replies that must return to it.
pub const CONNECTION_MARK: u32 = 0x111;
/// The bits of a mark that the mesh uses.
pub const MARK_MASK: u32 = 0xfff;
/// Connection tracking zone of the tunnel's own DNS queries.
pub const DNS_ZONE: u16 = 1;
/// The setting of a network namespace by which an accepted socket has the mark of the attempt (Linux `ip-sysctl`).
pub const ACCEPTED_MARK: &str = "ipv4/tcp_fwmark_accept";
/// Source of the kubelet's probes as a pod sees them.
pub const PROBE_SOURCE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// Source of the kubelet's probes as a pod sees them, IPv6.
pub const PROBE_SOURCE_V6: Ipv6Addr = Ipv6Addr::new(
    0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff,
);

/// Where probes appear to come from; pods accept them past the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeAddresses {
    /// IPv4 source.
    pub v4: Ipv4Addr,
    /// IPv6 source.
    pub v6: Ipv6Addr,
}

impl Default for ProbeAddresses {
    fn default() -> Self {
        ProbeAddresses {
            v4: PROBE_SOURCE_V4,
            v6: PROBE_SOURCE_V6,
        }
    }
}

/// What one pod's redirection depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRules {
    /// DNS queries go to the tunnel.
    pub dns_capture: bool,
    /// No redirection of what arrives (Istio `ambient.istio.io/bypass-inbound-capture`): for ingress gateways.
    pub ingress_mode: bool,
    /// Interfaces of virtual machines inside the pod, whose traffic is outbound
    /// (Istio `istio.io/reroute-virtual-interfaces`).
    pub virtual_interfaces: Vec<InterfaceName>,
    /// Write the IPv6 rules too.
    pub ipv6: bool,
    /// Sources that are probes.
    pub probes: ProbeAddresses,
}

impl Default for PodRules {
    fn default() -> Self {
        PodRules {
            dns_capture: true,
            ingress_mode: false,
            virtual_interfaces: Vec::new(),
            ipv6: true,
            probes: ProbeAddresses::default(),
        }
    }
}

/// What the rules of a pod do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// New connections go to the tunnel.
    Redirect,
    /// New connections go their own way; those in the tunnel live on.
    Leaving,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Redirect => "redirect",
            Stage::Leaving => "leaving",
        })
    }
}

/// The name of a network interface: 1 to 15 bytes, none of them special to a shell, nft or iptables.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text is no interface name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not an interface name (1 to 15 letters, digits, '.', '_', '-', '@')")]
pub struct ParseInterfaceNameError(String);

impl FromStr for InterfaceName {
    type Err = ParseInterfaceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@');
        let known = !matches!(text, "" | "." | "..") && !text.starts_with('-');
        if known && text.len() <= 15 && text.chars().all(plain) {
            Ok(InterfaceName(text.to_owned()))
        } else {
            Err(ParseInterfaceNameError(text.to_owned()))
        }
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The address that stands for "myself" in the rules. Only this one address: the rest of 127/8 leaves by `lo`,
    /// which is never captured.
    fn loopback(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }
}

/// The netfilter tables in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Before connection tracking.
    Raw,
    /// Marks.
    Mangle,
    /// Redirection.
    Nat,
}

/// The hooks in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Chain {
    /// What arrives.
    Prerouting,
    /// What local processes send.
    Output,
}

/// One condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// Arrived by this interface.
    InInterface(InterfaceName),
    /// Leaves by `lo`, or not.
    OutLoopback(bool),
    /// Is TCP.
    Tcp,
    /// Is UDP.
    Udp,
    /// A connection attempt: SYN without FIN, RST and ACK.
    Syn,
    /// First packet of a tracked connection.
    StateNew,
    /// Comes from this address.
    Source(IpAddr),
    /// Goes to this address.
    Destination(IpAddr),
    /// Does not go to the loopback address of this family.
    NotToLoopback(Family),
    /// TCP to this port.
    TcpTo(u16),
    /// TCP to any port but this.
    TcpNotTo(u16),
    /// UDP to this port.
    UdpTo(u16),
    /// UDP from this port.
    UdpFrom(u16),
    /// The packet's mark under [`MARK_MASK`] is this.
    Mark(u32),
    /// The packet's mark under [`MARK_MASK`] is anything but this.
    NotMark(u32),
    /// The connection's mark under [`MARK_MASK`] is this.
    ConnectionMark(u32),
    /// Is of a tracked connection that the other side opened.
    Reply,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leave it alone, ask no further rule.
    Accept,
    /// Leave the mesh's chain.
    Return,
    /// To this port of the same host.
    Redirect(u16),
    /// Set the connection's mark and the packet's to [`CONNECTION_MARK`], other bits kept, and ask no further rule.
    Tag,
    /// Copy the connection's mark to the packet.
    RestoreMark,
    /// Track in this zone.
    Zone(u16),
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its table.
    pub table: Table,
    /// Its chain.
    pub chain: Chain,
    /// The family it is for; `None`: both.
    pub family: Option<Family>,
    /// All of them must hold.
    pub matches: Vec<Match>,
    /// What then happens.
    pub action: Action,
}

impl PodRules {
    /// The rules of `stage` in their order within each chain. Source: `spec/cni.md` 7, design 8.1.
    pub fn rules(&self, stage: Stage) -> Vec<Rule> {
        let mut rules = Vec::new();
        marks(&mut rules);
        match stage {
            Stage::Redirect => self.redirects(&mut rules),
            Stage::Leaving => leaving(&mut rules),
        }
        if self.dns_capture {
            dns_zones(&mut rules);
        }
        rules
    }

    /// The families that rules are written for.
    pub fn families(&self) -> &'static [Family] {
        if self.ipv6 {
            &[Family::V4, Family::V6]
        } else {
            &[Family::V4]
        }
    }

    fn probe_source(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.probes.v4.into(),
            Family::V6 => self.probes.v6.into(),
        }
    }

    fn redirects(&self, rules: &mut Vec<Rule>) {
        self.prerouting(rules);
        self.output(rules);
    }

    fn prerouting(&self, rules: &mut Vec<Rule>) {
        let nat = |family, matches, action| Rule {
            table: Table::Nat,
            chain: Chain::Prerouting,
            family,
            matches,
            action,
        };
        for name in &self.virtual_interfaces {
            let arrived = Match::InInterface(name.clone());
            let redirect = vec![arrived.clone(), Match::Tcp, Match::Syn];
            rules.push(nat(None, redirect, Action::Redirect(OUTBOUND_PORT)));
            rules.push(nat(None, vec![arrived, Match::Tcp], Action::Return));
        }
        if self.ingress_mode {
            return;
        }
        for &family in self.families() {
            let probe = vec![Match::Tcp, Match::Source(self.probe_source(family))];
            rules.push(nat(Some(family), probe, Action::Accept));
            let plaintext = vec![
                Match::NotToLoopback(family),
                Match::TcpNotTo(INBOUND_HBONE_PORT),
                Match::NotMark(TUNNEL_MARK),
                Match::Syn,
            ];
            rules.push(nat(
                Some(family),
                plaintext,
                Action::Redirect(INBOUND_PLAINTEXT_PORT),
            ));
        }
    }

    fn output(&self, rules: &mut Vec<Rule>) {
        let nat = |family, matches, action| Rule {
            table: Table::Nat,
            chain: Chain::Output,
            family,
            matches,
            action,
        };
        for &family in self.families() {
            let probe = vec![Match::Tcp, Match::Destination(self.probe_source(family))];
            rules.push(nat(Some(family), probe, Action::Accept));
        }
        if self.dns_capture {
            let udp = vec![
                Match::UdpTo(DNS_CLIENT_PORT),
                Match::OutLoopback(false),
                Match::NotMark(TUNNEL_MARK),
            ];
            rules.push(nat(None, udp, Action::Redirect(DNS_PORT)));
            for &family in self.families() {
                let tcp = vec![
                    Match::TcpTo(DNS_CLIENT_PORT),
                    Match::NotToLoopback(family),
                    Match::NotMark(TUNNEL_MARK),
                    Match::Syn,
                ];
                rules.push(nat(Some(family), tcp, Action::Redirect(DNS_PORT)));
            }
        }
        rules.push(nat(
            None,
            vec![Match::Tcp, Match::Mark(CONNECTION_MARK)],
            Action::Accept,
        ));
        for &family in self.families() {
            let own_address = vec![Match::OutLoopback(true), Match::NotToLoopback(family)];
            rules.push(nat(Some(family), own_address, Action::Accept));
        }
        for &family in self.families() {
            let outbound = vec![
                Match::Tcp,
                Match::NotToLoopback(family),
                Match::NotMark(TUNNEL_MARK),
                Match::Syn,
            ];
            rules.push(nat(Some(family), outbound, Action::Redirect(OUTBOUND_PORT)));
        }
    }
}

/// Nothing is diverted, and connection tracking stays alive for what already is.
fn leaving(rules: &mut Vec<Rule>) {
    for chain in [Chain::Prerouting, Chain::Output] {
        let matches = vec![Match::StateNew];
        rules.push(Rule {
            table: Table::Nat,
            chain,
            family: None,
            matches,
            action: Action::Accept,
        });
    }
}

/// Replies to connections that the tunnel opened with a client's address must return to the tunnel.
///
/// The attempt is tagged where only first packets pass (NAT), and arrives with the mark that its replies need: under
/// [`ACCEPTED_MARK`] the application's socket takes it over, and they have their route with no rule asked. The rule in mangle
/// is for what does not: sockets of before, listeners with a mark of their own, what the kernel itself answers.
fn marks(rules: &mut Vec<Rule>) {
    let output = |table, matches, action| Rule {
        table,
        chain: Chain::Output,
        family: None,
        matches,
        action,
    };
    rules.push(output(
        Table::Nat,
        vec![
            Match::Tcp,
            Match::OutLoopback(true),
            Match::Mark(TUNNEL_MARK),
        ],
        Action::Tag,
    ));
    rules.push(output(
        Table::Mangle,
        // A changed mark costs each packet a choice of route: not where the mark is right, nor for the tunnel's own.
        // Theirs tells nothing here: a socket that took a repeated attempt has it, too.
        vec![
            Match::ConnectionMark(CONNECTION_MARK),
            Match::Reply,
            Match::NotMark(CONNECTION_MARK),
        ],
        Action::RestoreMark,
    ));
}

/// The tunnel's own queries are tracked apart from the redirected ones, which may have the same ports.
fn dns_zones(rules: &mut Vec<Rule>) {
    let raw = |chain, matches| Rule {
        table: Table::Raw,
        chain,
        family: None,
        matches,
        action: Action::Zone(DNS_ZONE),
    };
    rules.push(raw(
        Chain::Output,
        vec![Match::UdpTo(DNS_CLIENT_PORT), Match::Mark(TUNNEL_MARK)],
    ));
    rules.push(raw(
        Chain::Prerouting,
        vec![Match::UdpFrom(DNS_CLIENT_PORT), Match::NotMark(TUNNEL_MARK)],
    ));
}

#[cfg(test)]
mod tests;
