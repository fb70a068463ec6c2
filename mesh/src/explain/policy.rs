//! Whether policy lets a connection in, and why not: the data plane's own answer, and for rules that did not match the
//! conditions that failed, each asked of the data plane alone.

use std::net::SocketAddr;

use super::{Decider, Mark, Stage, Step, Verdict, refused};
use crate::{
    authorize::{AuthorizationFacts, Decision, Finding, RuleRef, authorize, matching_rule},
    identity::Identity,
    names::{PolicyKey, Str},
    policy::{
        Action, AuthorizationPolicy, Clause, Match, PolicyScope, Rule, ServiceAccountMatch,
        StringMatch,
    },
    view::MeshView,
    workload::Workload,
};

/// Rules whose failure is told.
const MAX_RULES: usize = 16;
/// Values of a condition that are told.
const MAX_VALUES: usize = 4;

/// What policy says.
pub(super) struct Judged {
    pub step: Step,
    pub verdict: Verdict,
    pub decided_by: Option<Decider>,
}

/// Asks the policies of `workload` about one connection.
pub(super) fn judge(
    view: &MeshView,
    workload: &Workload,
    identity: Option<Identity>,
    source: SocketAddr,
    destination: SocketAddr,
) -> Judged {
    let facts = AuthorizationFacts::new(identity, source, destination);
    let verdict = authorize(view, workload, &facts);
    let mut more: Vec<_> = verdict.findings.iter().map(finding).collect();
    // Waiting is over here, as it is for a connection after some seconds.
    match verdict.decision.unmet() {
        Decision::Allow { by } => {
            let decided_by = by.as_ref().map(decider);
            let detail = match &decided_by {
                Some(by) => format!("allowed by {by}"),
                None => "allowed: no ALLOW policy applies to the destination, and no DENY policy matches".to_owned(),
            };
            judged(Verdict::Allow, detail, more, decided_by)
        }
        Decision::Deny {
            refusal,
            by: Some(by),
        } => {
            let decided_by = decider(&by);
            let detail = match decided_by.kind {
                "PeerAuthentication" => {
                    format!("denied by {decided_by}: plaintext is not accepted here")
                }
                _ => format!("denied by {decided_by}"),
            };
            debug_assert!(refusal.object.is_some());
            judged(Verdict::Deny, detail, more, Some(decided_by))
        }
        Decision::Deny { refusal, by: None } => {
            let (told, decided_by) = refused(&refusal);
            let policies = refusal.object.as_ref().map_or(&[][..], |it| it.policies());
            for key in policies {
                more.extend(failures(view, key, &facts));
            }
            let detail = match &decided_by {
                Some(by) => format!("denied: {told}: {by}"),
                None => format!("denied: {told}"),
            };
            judged(Verdict::Deny, detail, more, decided_by)
        }
        // `unmet` has none left; closed all the same.
        Decision::Need(key) => {
            let detail = format!("denied: policy {key} is not known");
            judged(
                Verdict::Deny,
                detail,
                more,
                Some(Decider::policy(&key, None)),
            )
        }
    }
}

fn judged(
    verdict: Verdict,
    detail: String,
    more: Vec<String>,
    decided_by: Option<Decider>,
) -> Judged {
    let outcome = match verdict {
        Verdict::Allow => Mark::Pass,
        Verdict::Deny | Verdict::Mixed | Verdict::Unknown => Mark::Refuse,
    };
    Judged {
        step: Step {
            step: Stage::Policy,
            outcome,
            detail,
            more,
        },
        verdict,
        decided_by,
    }
}

fn decider(rule: &RuleRef) -> Decider {
    Decider::policy(&rule.policy, Some(rule.rule))
}

fn finding(finding: &Finding) -> String {
    match finding {
        Finding::WouldDeny(by) => format!("dry run: {} would deny it", decider(by)),
        Finding::WouldAllow(by) => format!("dry run: {} would allow it", decider(by)),
        Finding::WouldNotAllow => "dry run: no ALLOW policy on trial would allow it".to_owned(),
    }
}

/// Why each rule of an ALLOW policy did not match.
fn failures(view: &MeshView, key: &PolicyKey, facts: &AuthorizationFacts) -> Vec<String> {
    let Some(policy) = view.policy(key) else {
        return Vec::new();
    };
    if policy.rules.is_empty() {
        return vec![format!("{key} has no rules: it allows nothing")];
    }
    let rules = policy.rules.iter().enumerate().take(MAX_RULES);
    let told = rules.map(|(at, rule)| format!("{key} rule {at}: {}", failure(rule, facts)));
    let mut told: Vec<_> = told.collect();
    if let Some(rest @ 1..) = policy.rules.len().checked_sub(MAX_RULES) {
        told.push(format!("{key}: and {rest} rules more"));
    }
    told
}

/// The conditions of a rule that do not hold.
fn failure(rule: &Rule, facts: &AuthorizationFacts) -> String {
    let failing = rule.clauses.iter().filter(|it| !holds(it, facts));
    let told = failing.map(|clause| {
        let each: Vec<_> = clause
            .matches
            .iter()
            .map(|it| mismatch(it, facts))
            .collect();
        each.join(", or ")
    });
    let told: Vec<_> = told.collect();
    told.join("; and ")
}

/// Asks the data plane about one clause alone.
fn holds(clause: &Clause, facts: &AuthorizationFacts) -> bool {
    let alone = AuthorizationPolicy {
        key: PolicyKey {
            namespace: Str::default(),
            name: Str::default(),
        },
        scope: PolicyScope::Global,
        action: Action::Allow,
        rules: vec![Rule {
            clauses: vec![clause.clone()],
        }],
        dry_run: false,
        faults: Vec::new(),
    };
    matching_rule(&alone, facts).is_some()
}

/// The conditions of a match that do not hold.
fn mismatch(one: &Match, facts: &AuthorizationFacts) -> String {
    if *one == Match::default() {
        return "a condition that a node tunnel cannot judge (L7), which never holds".to_owned();
    }
    let told: Vec<_> = conditions(one)
        .into_iter()
        .filter(|(alone, ..)| {
            let clause = Clause {
                matches: vec![alone.clone()],
            };
            !holds(&clause, facts)
        })
        .map(|(_, what, values)| format!("{} is {what} {values}", actual(what, facts)))
        .collect();
    told.join(" and ")
}

/// What the connection has, of what a condition asks for.
fn actual(what: &str, facts: &AuthorizationFacts) -> String {
    let subject = what.rsplit(' ').next().unwrap_or(what);
    let identity = facts.source_identity.as_ref();
    let none = || "a peer without an identity".to_owned();
    match subject {
        "namespaces" => identity.map_or_else(none, |it| format!("namespace {}", it.namespace)),
        "principals" => identity.map_or_else(none, |it| format!("principal {}", it.principal())),
        "accounts" => identity.map_or_else(none, |it| {
            format!("service account {}/{}", it.namespace, it.service_account)
        }),
        "sources" => format!("source address {}", facts.source.ip()),
        "addresses" => format!("destination address {}", facts.destination.ip()),
        _ => format!("port {}", facts.destination.port()),
    }
}

/// Each condition of a match, alone, with its words.
fn conditions(one: &Match) -> Vec<(Match, &'static str, String)> {
    let mut found = Vec::new();
    macro_rules! condition {
        ($field:ident, $what:literal, $text:expr) => {
            if !one.$field.is_empty() {
                let alone = Match {
                    $field: one.$field.clone(),
                    ..Match::default()
                };
                found.push((alone, $what, values(one.$field.iter().map($text))));
            }
        };
    }
    condition!(namespaces, "not among the namespaces", text);
    condition!(not_namespaces, "among the excluded namespaces", text);
    condition!(principals, "not among the principals", text);
    condition!(not_principals, "among the excluded principals", text);
    condition!(service_accounts, "not among the service accounts", account);
    condition!(
        not_service_accounts,
        "among the excluded service accounts",
        account
    );
    condition!(source_ips, "not in the sources", ToString::to_string);
    condition!(
        not_source_ips,
        "in the excluded sources",
        ToString::to_string
    );
    condition!(destination_ips, "not in the addresses", ToString::to_string);
    condition!(
        not_destination_ips,
        "in the excluded addresses",
        ToString::to_string
    );
    condition!(
        destination_ports,
        "not among the ports",
        ToString::to_string
    );
    condition!(
        not_destination_ports,
        "among the excluded ports",
        ToString::to_string
    );
    found
}

fn values(all: impl Iterator<Item = String>) -> String {
    let all: Vec<_> = all.collect();
    let shown = all
        .iter()
        .take(MAX_VALUES)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    match all.len().saturating_sub(MAX_VALUES) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn text(pattern: &StringMatch) -> String {
    match pattern {
        StringMatch::Exact(text) => text.to_string(),
        StringMatch::Prefix(text) => format!("{text}*"),
        StringMatch::Suffix(text) => format!("*{text}"),
        StringMatch::Presence => "*".to_owned(),
    }
}

fn account(it: &ServiceAccountMatch) -> String {
    format!("{}/{}", it.namespace, it.service_account)
}
