//! Virtual addresses of services, for whoever is not in the mesh (and for the tunnels themselves): one nftables table in
//! every node's namespace, rewritten in one transaction. What kube-proxy is on a cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{self, Write as _},
    net::IpAddr,
    process::{Command, Stdio},
};

use super::{
    netns::Netns,
    objects::Key,
    services::{PortView, ServiceView},
};

/// The table's name, in the family `inet`.
const TABLE: &str = "leyline-services";

/// The table's beginning: what stays the same whatever services there are. An address of the services' range that no rule
/// has rewritten leads nowhere, and is refused at once instead of being lost.
const HEAD: &str = "\
\tchain prerouting {
\t\ttype nat hook prerouting priority dstnat; policy accept;
\t\tjump services
\t}
\tchain output {
\t\ttype nat hook output priority -100; policy accept;
\t\tjump services
\t}
\tchain refuse {
\t\ttype filter hook prerouting priority -90; policy accept;
\t\tjump unserved
\t}
\tchain refuse-own {
\t\ttype filter hook output priority -90; policy accept;
\t\tjump unserved
\t}
\tchain unserved {
\t\tip daddr 10.96.0.0/16 meta l4proto tcp reject with tcp reset
\t\tip daddr 10.96.0.0/16 reject
\t\tip6 daddr fd00:10:96::/112 meta l4proto tcp reject with tcp reset
\t\tip6 daddr fd00:10:96::/112 reject
\t}
";

/// The whole table as text for `nft -f`. Pure, and the same for the same view.
///
/// `local` are the addresses of the node's own pods: one that reaches itself through a service must see its answer come
/// back through the node, so its source is rewritten.
pub(super) fn render(services: &BTreeMap<Key, ServiceView>, local: &BTreeSet<IpAddr>) -> String {
    let mut text =
        format!("add table inet {TABLE}\nflush table inet {TABLE}\ntable inet {TABLE} {{\n{HEAD}");
    text.push_str(
        "\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n",
    );
    for ip in local {
        let family = family(ip);
        let rule = format!("{family} saddr {ip} {family} daddr {ip} masquerade");
        let _ = writeln!(text, "\t\tct status dnat {rule}");
    }
    text.push_str("\t}\n\tchain services {\n");
    each_port(services, |service, address, port| {
        let backends = backends(port, address);
        if !backends.is_empty() {
            let (matched, rule) = (matches(address, port), dnat(&backends, address));
            let _ = writeln!(text, "\t\t{matched} {rule} comment \"{}\"", service.key);
        }
    });
    text.push_str("\t}\n}\n");
    text
}

fn each_port<'a>(
    services: &'a BTreeMap<Key, ServiceView>,
    mut visit: impl FnMut(&'a ServiceView, &'a IpAddr, &'a PortView),
) {
    for service in services.values() {
        for address in &service.addresses {
            for port in service
                .ports
                .iter()
                .filter(|port| ["tcp", "udp"].contains(&port.protocol.as_str()))
            {
                visit(service, address, port);
            }
        }
    }
}

fn matches(address: &IpAddr, port: &PortView) -> String {
    format!(
        "{} daddr {address} {} dport {}",
        family(address),
        port.protocol,
        port.port
    )
}

fn backends(port: &PortView, address: &IpAddr) -> Vec<(IpAddr, u16)> {
    port.backends
        .iter()
        .filter(|(ip, _)| ip.is_ipv4() == address.is_ipv4())
        .copied()
        .collect()
}

fn dnat(backends: &[(IpAddr, u16)], address: &IpAddr) -> String {
    let family = family(address);
    match backends {
        [(ip @ IpAddr::V4(_), port)] => format!("dnat {family} to {ip}:{port}"),
        [(ip, port)] => format!("dnat {family} to [{ip}]:{port}"),
        many => {
            let choices = many
                .iter()
                .enumerate()
                .map(|(index, (ip, port))| format!("{index} : {ip} . {port}"));
            let choices = choices.collect::<Vec<_>>().join(", ");
            format!(
                "dnat {family} to numgen random mod {} map {{ {choices} }}",
                many.len()
            )
        }
    }
}

fn family(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// Puts the rules into force in a node's namespace, all or nothing.
pub(super) fn apply(node: &Netns, rules: String) -> io::Result<()> {
    node.run(move |_| {
        let mut nft = Command::new(nft_program());
        let mut child = nft
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .map(|mut input| input.write_all(rules.as_bytes()))
            .transpose()?;
        let output = child.wait_with_output()?;
        match output.status.success() {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "nft: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ))),
        }
    })
}

/// `nft`, also where `/usr/sbin` is not in an ordinary user's `PATH`.
pub(super) fn nft_program() -> std::path::PathBuf {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let known = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(std::path::PathBuf::from);
    let mut candidates = std::env::split_paths(&folders)
        .chain(known)
        .map(|folder| folder.join("nft"));
    candidates
        .find(|path| path.is_file())
        .unwrap_or_else(|| "nft".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_as_reviewed() {
        let port = |protocol: &str, port, backends: &[(&str, u16)]| PortView {
            name: String::new(),
            protocol: protocol.to_owned(),
            port,
            backends: backends
                .iter()
                .map(|(ip, port)| (ip.parse().unwrap(), *port))
                .collect(),
        };
        let service = |name: &str, addresses: &[&str], ports| ServiceView {
            key: Key::new("a", name),
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            headless: false,
            external_name: None,
            ports,
            hosts: Vec::new(),
        };
        let two = [
            ("10.244.1.2", 8080),
            ("10.244.2.2", 8080),
            ("fd00:10:244:1::2", 8080),
        ];
        let services = [
            service(
                "web",
                &["10.96.1.1", "fd00:10:96::101"],
                vec![port("tcp", 80, &two)],
            ),
            service(
                "gone",
                &["10.96.1.2"],
                vec![port("tcp", 80, &[]), port("udp", 53, &[])],
            ),
        ];
        let services = services
            .into_iter()
            .map(|service| (service.key.clone(), service))
            .collect();
        let local = ["10.244.1.2", "fd00:10:244:1::2"]
            .map(|ip| ip.parse().unwrap())
            .into();
        let golden = include_str!("testdata/services.nft");
        assert_eq!(render(&services, &local), golden);
    }
}
