//! The pod rules as `iptables-restore --noflush` reads them, one text for each family.

use super::{
    Action, CONNECTION_MARK, Chain, Family, MARK_MASK, Match, PodRules, Rule, Stage, Table,
};

/// The chain that [`Chain::Prerouting`] jumps to.
pub const PREROUTING_CHAIN: &str = "ISTIO_PRERT";
/// The chain that [`Chain::Output`] jumps to.
pub const OUTPUT_CHAIN: &str = "ISTIO_OUTPUT";

/// The text for one family. Declaring a chain empties it, so running it again changes nothing but the jumps, which a
/// caller removes first ([`remove`]).
pub fn install(rules: &PodRules, stage: Stage, family: Family) -> String {
    let all = rules.rules(stage);
    let mut text = String::new();
    for table in [Table::Raw, Table::Mangle, Table::Nat] {
        let here: Vec<&Rule> = all
            .iter()
            .filter(|rule| rule.table == table && rule.family.is_none_or(|only| only == family))
            .collect();
        if !here.is_empty() {
            section(&mut text, table, &here);
        }
    }
    text
}

/// The text that undoes [`install`]; each line may fail on its own where its rule is absent.
pub fn remove(family: Family) -> Vec<String> {
    let program = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    let mut lines = Vec::new();
    for table in [Table::Raw, Table::Mangle, Table::Nat].map(table_name) {
        for chain in [Chain::Prerouting, Chain::Output] {
            lines.push(format!(
                "{program} -t {table} -D {} -j {}",
                hook(chain),
                target(chain)
            ));
            lines.push(format!("{program} -t {table} -F {}", target(chain)));
            lines.push(format!("{program} -t {table} -X {}", target(chain)));
        }
    }
    lines
}

fn section(text: &mut String, table: Table, rules: &[&Rule]) {
    text.push_str(&format!("*{}\n", table_name(table)));
    for chain in [Chain::Prerouting, Chain::Output] {
        text.push_str(&format!(":{} - [0:0]\n", target(chain)));
    }
    for chain in [Chain::Prerouting, Chain::Output] {
        text.push_str(&format!("-A {} -j {}\n", hook(chain), target(chain)));
    }
    for chain in [Chain::Prerouting, Chain::Output] {
        for rule in rules.iter().filter(|rule| rule.chain == chain) {
            text.extend(jumps(rule.action).iter().map(|jump| line(rule, jump)));
        }
    }
    text.push_str("COMMIT\n");
}

fn line(rule: &Rule, jump: &str) -> String {
    let mut words = vec![format!("-A {}", target(rule.chain))];
    if let Some(protocol) = protocol(&rule.matches) {
        words.push(format!("-p {protocol}"));
    }
    words.extend(rule.matches.iter().filter_map(condition));
    words.push(format!("-j {jump}"));
    words.join(" ") + "\n"
}

fn protocol(matches: &[Match]) -> Option<&'static str> {
    matches.iter().find_map(|condition| match condition {
        Match::Tcp | Match::Syn | Match::TcpTo(_) | Match::TcpNotTo(_) => Some("tcp"),
        Match::Udp | Match::UdpTo(_) | Match::UdpFrom(_) => Some("udp"),
        _ => None,
    })
}

fn condition(condition: &Match) -> Option<String> {
    Some(match condition {
        Match::Tcp | Match::Udp => return None,
        Match::InInterface(name) => format!("-i {}", name.as_str()),
        Match::OutLoopback(true) => "-o lo".to_owned(),
        Match::OutLoopback(false) => "! -o lo".to_owned(),
        Match::Syn => "--tcp-flags FIN,SYN,RST,ACK SYN".to_owned(),
        Match::StateNew => "-m conntrack --ctstate NEW".to_owned(),
        Match::Reply => "-m conntrack --ctdir REPLY".to_owned(),
        Match::Source(address) => format!("-s {address}"),
        Match::Destination(address) => format!("-d {address}"),
        Match::NotToLoopback(Family::V4) => "! -d 127.0.0.1/32".to_owned(),
        Match::NotToLoopback(Family::V6) => "! -d ::1/128".to_owned(),
        Match::TcpTo(port) | Match::UdpTo(port) => format!("--dport {port}"),
        Match::TcpNotTo(port) => format!("! --dport {port}"),
        Match::UdpFrom(port) => format!("--sport {port}"),
        Match::Mark(mark) => format!("-m mark --mark {mark:#x}/{MARK_MASK:#x}"),
        Match::NotMark(mark) => format!("-m mark ! --mark {mark:#x}/{MARK_MASK:#x}"),
        Match::ConnectionMark(mark) => format!("-m connmark --mark {mark:#x}/{MARK_MASK:#x}"),
    })
}

/// One for each line: the mark is changed last, as the others match the old one.
fn jumps(action: Action) -> Vec<String> {
    let tag = |target: &str| format!("{target} --set-xmark {CONNECTION_MARK:#x}/{MARK_MASK:#x}");
    match action {
        Action::Accept => vec!["ACCEPT".to_owned()],
        Action::Return => vec!["RETURN".to_owned()],
        Action::Redirect(port) => vec![format!("REDIRECT --to-ports {port}")],
        Action::Tag => vec![tag("CONNMARK"), tag("MARK")],
        Action::RestoreMark => {
            vec!["CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff".to_owned()]
        }
        Action::Zone(zone) => vec![format!("CT --zone {zone}")],
    }
}

fn table_name(table: Table) -> &'static str {
    match table {
        Table::Raw => "raw",
        Table::Mangle => "mangle",
        Table::Nat => "nat",
    }
}

fn hook(chain: Chain) -> &'static str {
    match chain {
        Chain::Prerouting => "PREROUTING",
        Chain::Output => "OUTPUT",
    }
}

fn target(chain: Chain) -> &'static str {
    match chain {
        Chain::Prerouting => PREROUTING_CHAIN,
        Chain::Output => OUTPUT_CHAIN,
    }
}
