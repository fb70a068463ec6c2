//! The pod rules as one nftables transaction, in the JSON that `nft -j -f -` reads.
//!
//! Everything is in family `inet`. A comment on the first jump says whose rules these are, in which stage, how many
//! and with what fingerprint, so that a restarted agent can tell without writing ([`Installed`]).

use serde_json::{Value, json};

use super::{
    Action, CONNECTION_MARK, Chain, Family, MARK_MASK, Match, PodRules, Rule, Stage, Table,
};

/// The tables, as Istio names them.
pub const TABLES: [Table; 3] = [Table::Raw, Table::Mangle, Table::Nat];

/// TCP flags (RFC 9293 3.1).
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

const COMMENT_PREFIX: &str = "leyline";
/// Raised when the meaning of the rules changes, so that older ones are replaced.
const RULES_VERSION: u32 = 2;

impl Table {
    /// Its name.
    pub fn nft_name(self) -> &'static str {
        match self {
            Table::Raw => "istio-ambient-raw",
            Table::Mangle => "istio-ambient-mangle",
            Table::Nat => "istio-ambient-nat",
        }
    }
}

impl Chain {
    fn base(self) -> &'static str {
        match self {
            Chain::Prerouting => "prerouting",
            Chain::Output => "output",
        }
    }

    fn jump_target(self) -> &'static str {
        match self {
            Chain::Prerouting => "istio-prerouting",
            Chain::Output => "istio-output",
        }
    }
}

/// What the comment in a pod's namespace says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The stage the rules were written for.
    pub stage: Stage,
    /// How many rules there should be, jumps included.
    pub rules: usize,
    /// Of the rules' text, version included.
    pub fingerprint: u64,
}

impl Installed {
    /// What `rules` would say in `stage`.
    pub fn of(rules: &PodRules, stage: Stage) -> Installed {
        let body = body(rules, stage);
        let fingerprint =
            fnv1a(format!("{RULES_VERSION} {stage} {}", Value::Array(body.clone())).as_bytes());
        let rules = body
            .iter()
            .filter(|command| command.pointer("/add/rule").is_some())
            .count()
            + 1;
        Installed {
            stage,
            rules,
            fingerprint,
        }
    }

    pub(super) fn comment(&self) -> String {
        format!(
            "{COMMENT_PREFIX} {} rules={} {:016x}",
            self.stage, self.rules, self.fingerprint
        )
    }

    /// Reads a rule's comment back; `None` where it is not ours.
    pub fn parse(comment: &str) -> Option<Installed> {
        let mut words = comment.split(' ');
        let ours = words.next()? == COMMENT_PREFIX;
        let stage = match words.next()? {
            "redirect" => Stage::Redirect,
            "leaving" => Stage::Leaving,
            _ => return None,
        };
        let rules = words.next()?.strip_prefix("rules=")?.parse().ok()?;
        let fingerprint = u64::from_str_radix(words.next()?, 16).ok()?;
        ours.then_some(Installed {
            stage,
            rules,
            fingerprint,
        })
    }
}

/// The transaction that makes a namespace hold exactly the rules of `stage`. Counters of a pod's rules start anew;
/// connections do not notice, because tables and hooks stay. `first` goes in front (removal of others' rules).
pub fn install(rules: &PodRules, stage: Stage, first: Vec<Value>) -> Value {
    let mut commands = first;
    if !rules.dns_capture {
        commands.extend([
            table_command("add", Table::Raw),
            table_command("delete", Table::Raw),
        ]);
    }
    let marker = jump_rule(
        Table::Nat,
        Chain::Prerouting,
        Some(Installed::of(rules, stage).comment()),
    );
    let body = body(rules, stage);
    let first_rule = body
        .iter()
        .position(|c| c.pointer("/add/rule").is_some())
        .unwrap_or(body.len());
    commands.extend_from_slice(&body[..first_rule]);
    commands.push(marker);
    commands.extend_from_slice(&body[first_rule..]);
    json!({ "nftables": commands })
}

/// The transaction that leaves nothing of ours. Adding before deleting makes it succeed where there is nothing.
pub fn remove() -> Value {
    let commands: Vec<Value> = TABLES
        .into_iter()
        .flat_map(|table| [table_command("add", table), table_command("delete", table)])
        .collect();
    json!({ "nftables": commands })
}

/// Tables, chains and rules, without the jump that carries the comment.
fn body(rules: &PodRules, stage: Stage) -> Vec<Value> {
    let tables: Vec<Table> = TABLES
        .into_iter()
        .filter(|table| rules.dns_capture || *table != Table::Raw)
        .collect();
    let mut commands = Vec::new();
    for &table in &tables {
        commands.extend([table_command("add", table), table_command("flush", table)]);
        commands.extend(chains(table).map(|chain| base_chain(table, chain)));
        commands.extend(chains(table).map(|chain| regular_chain(table, chain)));
        commands.extend(chain_of_before(table));
    }
    for &table in &tables {
        for chain in chains(table) {
            if (table, chain) != (Table::Nat, Chain::Prerouting) {
                commands.push(jump_rule(table, chain, None));
            }
        }
    }
    commands.extend(rules.rules(stage).iter().map(rule));
    commands
}

/// Those with rules in them: an empty one costs each packet a look.
fn chains(table: Table) -> impl Iterator<Item = Chain> {
    let in_use = move |chain: &Chain| (table, *chain) != (Table::Mangle, Chain::Prerouting);
    [Chain::Prerouting, Chain::Output]
        .into_iter()
        .filter(in_use)
}

/// Rules of version 1 had one more. Adding before deleting makes it succeed where there is none.
fn chain_of_before(table: Table) -> Vec<Value> {
    if table != Table::Mangle {
        return Vec::new();
    }
    let chain = Chain::Prerouting;
    let delete = |name: &str| json!({ "delete": { "chain": { "family": "inet", "table": table.nft_name(), "name": name } } });
    vec![
        base_chain(table, chain),
        regular_chain(table, chain),
        delete(chain.base()),
        delete(chain.jump_target()),
    ]
}

fn table_command(verb: &str, table: Table) -> Value {
    json!({ verb: { "table": { "family": "inet", "name": table.nft_name() } } })
}

fn base_chain(table: Table, chain: Chain) -> Value {
    let (kind, priority) = match (table, chain) {
        (Table::Raw, _) => ("filter", -300),
        (Table::Mangle, Chain::Prerouting) => ("filter", -150),
        // A changed mark must choose the route again.
        (Table::Mangle, Chain::Output) => ("route", -150),
        (Table::Nat, _) => ("nat", -100),
    };
    json!({ "add": { "chain": {
        "family": "inet", "table": table.nft_name(), "name": chain.base(),
        "type": kind, "hook": chain.base(), "prio": priority, "policy": "accept",
    } } })
}

fn regular_chain(table: Table, chain: Chain) -> Value {
    json!({ "add": { "chain": { "family": "inet", "table": table.nft_name(), "name": chain.jump_target() } } })
}

fn jump_rule(table: Table, chain: Chain, comment: Option<String>) -> Value {
    // Its rules are of datagrams: no other packet need look at them.
    let of_interest = (table == Table::Raw).then(|| condition(&Match::Udp));
    let jump = json!({ "jump": { "target": chain.jump_target() } });
    let expr: Vec<Value> = of_interest.into_iter().chain([jump]).collect();
    let mut rule = json!({
        "family": "inet", "table": table.nft_name(), "chain": chain.base(), "expr": expr,
    });
    if let Some(comment) = comment {
        rule["comment"] = comment.into();
    }
    json!({ "add": { "rule": rule } })
}

fn rule(rule: &Rule) -> Value {
    let mut expr: Vec<Value> = rule.matches.iter().map(condition).collect();
    expr.push(json!({ "counter": null }));
    expr.extend(statements(rule.action));
    json!({ "add": { "rule": {
        "family": "inet", "table": rule.table.nft_name(), "chain": rule.chain.jump_target(), "expr": expr,
    } } })
}

fn condition(condition: &Match) -> Value {
    let meta = |key: &str| json!({ "meta": { "key": key } });
    let field = |protocol: &str, field: &str| json!({ "payload": { "protocol": protocol, "field": field } });
    let masked = |what: Value| json!({ "&": [what, MARK_MASK] });
    let (op, left, right) = match condition {
        Match::InInterface(name) => ("==", meta("iifname"), json!(name.as_str())),
        Match::OutLoopback(yes) => (if *yes { "==" } else { "!=" }, meta("oifname"), json!("lo")),
        Match::Tcp => ("==", meta("l4proto"), json!("tcp")),
        Match::Udp => ("==", meta("l4proto"), json!("udp")),
        // In numbers: how `nft` reads an "or" of more than two names has changed between its versions.
        Match::Syn => {
            let flags = json!({ "&": [field("tcp", "flags"), FIN | SYN | RST | ACK] });
            ("==", flags, json!(SYN))
        }
        Match::StateNew => ("in", json!({ "ct": { "key": "state" } }), json!("new")),
        Match::Reply => (
            "==",
            json!({ "ct": { "key": "direction" } }),
            json!("reply"),
        ),
        Match::Source(address) => (
            "==",
            field(ip(address), "saddr"),
            json!(address.to_string()),
        ),
        Match::Destination(address) => (
            "==",
            field(ip(address), "daddr"),
            json!(address.to_string()),
        ),
        Match::NotToLoopback(family) => {
            let loopback = family.loopback();
            (
                "!=",
                field(ip(&loopback), "daddr"),
                json!(loopback.to_string()),
            )
        }
        Match::TcpTo(port) => ("==", field("tcp", "dport"), json!(port)),
        Match::TcpNotTo(port) => ("!=", field("tcp", "dport"), json!(port)),
        Match::UdpTo(port) => ("==", field("udp", "dport"), json!(port)),
        Match::UdpFrom(port) => ("==", field("udp", "sport"), json!(port)),
        Match::Mark(mark) => ("==", masked(meta("mark")), json!(mark)),
        Match::NotMark(mark) => ("!=", masked(meta("mark")), json!(mark)),
        Match::ConnectionMark(mark) => (
            "==",
            masked(json!({ "ct": { "key": "mark" } })),
            json!(mark),
        ),
    };
    json!({ "match": { "op": op, "left": left, "right": right } })
}

fn statements(action: Action) -> Vec<Value> {
    let set = |key: Value, value: Value| json!({ "mangle": { "key": key, "value": value } });
    let accept = || json!({ "accept": null });
    let mark_of = |what: &str| json!({ what: { "key": "mark" } });
    let tag = |what: &str| {
        let others_kept = json!({ "&": [mark_of(what), !MARK_MASK] });
        set(
            mark_of(what),
            json!({ "|": [others_kept, CONNECTION_MARK] }),
        )
    };
    match action {
        Action::Accept => vec![accept()],
        Action::Return => vec![json!({ "return": null })],
        Action::Redirect(port) => vec![json!({ "redirect": { "port": port } })],
        Action::Tag => vec![tag("ct"), tag("meta"), accept()],
        Action::RestoreMark => vec![set(mark_of("meta"), mark_of("ct"))],
        Action::Zone(zone) => vec![set(json!({ "ct": { "key": "zone" } }), json!(zone))],
    }
}

fn ip(address: &std::net::IpAddr) -> &'static str {
    match address {
        std::net::IpAddr::V4(_) => "ip",
        std::net::IpAddr::V6(_) => "ip6",
    }
}

/// FNV-1a, 64 bits: stable between builds, which the standard library's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

impl Family {
    /// As nftables names it.
    pub(crate) fn nft_name(self) -> &'static str {
        match self {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        }
    }
}
