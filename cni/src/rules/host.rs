//! The node's rules: probes of enrolled pods appear to come from one address that the pods' rules let pass.
//!
//! Written in nft's own language, not in JSON: its JSON reader knows no `socket cgroupv2` (nftables 1.0.6). The sets
//! hold (pod address, probe port) and not whole pods, each entry with the pod's uid as its comment, so that an
//! entry of an address that was given to another pod meanwhile is told apart.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use super::{Family, ProbeAddresses, Table};

/// The chain that marks probes; only used with [`ProbeSource::Cgroup`].
const MARK_CHAIN: &str = "leyline-probe-mark";
/// The chain that rewrites their source; Istio's name.
const SNAT_CHAIN: &str = "postrouting";
/// The bit that carries the verdict of the cgroup match from output to postrouting. No other well-known user of
/// marks has it (kube-proxy 0x4000 and 0x8000, Cilium 0xf00, Calico 0xffff0000), and it is set only on probes.
pub const PROBE_MARK: u32 = 0x1000;

/// How the node's probes are recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeSource {
    /// By the prober's cgroup (v2): its path below the mount, and how many components that has. Matched in an output
    /// chain, because the kernel refuses it in postrouting.
    Cgroup {
        /// Path without a leading slash; on hosts with both versions it starts with `unified/`.
        path: String,
        /// Depth of the path in the version 2 hierarchy.
        level: u32,
    },
    /// By the prober's user id. Weaker: everything of that user passes.
    Uid(u32),
    /// By a mark that the prober sets itself (all 32 bits).
    Mark(u32),
}

/// The entries of both sets: who is probed where, with the pod's uid.
pub type ProbeEntries = BTreeMap<SocketAddr, String>;

/// Name of the set for a family.
pub fn set_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "istio-inpod-probe-ports-v4",
        Family::V6 => "istio-inpod-probe-ports-v6",
    }
}

/// Rules and (empty) sets. Sets that exist keep their entries, so that a restart leaves no moment without them.
pub fn install(source: &ProbeSource, addresses: &ProbeAddresses) -> String {
    let table = Table::Nat.nft_name();
    let mut text = format!("add table inet {table}\n");
    for (family, kind) in [(Family::V4, "ipv4_addr"), (Family::V6, "ipv6_addr")] {
        let set = set_name(family);
        line(
            &mut text,
            format_args!("add set inet {table} {set} {{ type {kind} . inet_service; }}"),
        );
    }
    line(
        &mut text,
        format_args!(
            "add chain inet {table} {MARK_CHAIN} {{ type filter hook output priority -150; }}"
        ),
    );
    line(
        &mut text,
        format_args!("flush chain inet {table} {MARK_CHAIN}"),
    );
    line(
        &mut text,
        format_args!(
            "add chain inet {table} {SNAT_CHAIN} {{ type nat hook postrouting priority 100; }}"
        ),
    );
    line(
        &mut text,
        format_args!("flush chain inet {table} {SNAT_CHAIN}"),
    );
    for family in [Family::V4, Family::V6] {
        let ip = family.nft_name();
        let probed = format!("{ip} daddr . tcp dport @{}", set_name(family));
        if let ProbeSource::Cgroup { path, level } = source {
            let ours = format!("{probed} socket cgroupv2 level {level} \"{path}\" counter");
            let set = format!("meta mark set meta mark or {PROBE_MARK:#x}");
            line(
                &mut text,
                format_args!("add rule inet {table} {MARK_CHAIN} {ours} {set}"),
            );
        }
        let who = match source {
            ProbeSource::Cgroup { .. } => {
                format!("meta mark and {PROBE_MARK:#x} == {PROBE_MARK:#x}")
            }
            ProbeSource::Uid(uid) => format!("meta skuid {uid}"),
            ProbeSource::Mark(mark) => format!("meta mark {mark:#x}"),
        };
        let to: IpAddr = match family {
            Family::V4 => addresses.v4.into(),
            Family::V6 => addresses.v6.into(),
        };
        line(
            &mut text,
            format_args!(
                "add rule inet {table} {SNAT_CHAIN} {who} {probed} counter snat {ip} to {to}"
            ),
        );
    }
    text
}

/// Removes rules and sets. Probes of pods that insist on the mesh fail from then on.
pub fn remove() -> String {
    let table = Table::Nat.nft_name();
    format!("add table inet {table}\ndelete table inet {table}\n")
}

/// The changes that turn `now` into `wanted`: additions first, then deletions, never a flush. An entry that changes
/// hands is deleted and added in the same transaction, since adding alone would keep the old pod's comment.
pub fn change(now: &ProbeEntries, wanted: &ProbeEntries) -> Option<String> {
    let mut text = String::new();
    for (probed, uid) in wanted {
        match now.get(probed) {
            Some(owner) if owner == uid => {}
            Some(_) => {
                element(&mut text, "delete", probed, None);
                element(&mut text, "add", probed, Some(uid));
            }
            None => element(&mut text, "add", probed, Some(uid)),
        }
    }
    for probed in now.keys().filter(|probed| !wanted.contains_key(*probed)) {
        element(&mut text, "delete", probed, None);
    }
    (!text.is_empty()).then_some(text)
}

fn element(text: &mut String, verb: &str, probed: &SocketAddr, uid: Option<&str>) {
    let family = if probed.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    let comment = uid
        .map(|uid| format!(" comment \"{}\"", comment(uid)))
        .unwrap_or_default();
    let (table, set) = (Table::Nat.nft_name(), set_name(family));
    let (address, port) = (probed.ip(), probed.port());
    line(
        text,
        format_args!("{verb} element inet {table} {set} {{ {address} . {port}{comment} }}"),
    );
}

/// A uid as a comment: whatever could end the quotes is left out, and nft's limit of 128 bytes is kept.
pub fn comment(uid: &str) -> String {
    uid.chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        .take(127)
        .collect()
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{arguments}");
}
