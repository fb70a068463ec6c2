//! AuthorizationPolicy to the policies that node tunnels enforce.
//!
//! A node tunnel sees connections and not requests, so HTTP attributes cannot be judged there. Whatever is lost, the
//! result only ever refuses more than was asked (design 8.2): an ALLOW rule with HTTP parts is dropped, a DENY rule with
//! HTTP parts matches by its other parts alone, CUSTOM denies what it matches, a value that means nothing turns the
//! policy into a refusal of everything it selects. The condition says which of these happened.

use std::{borrow::Cow, collections::BTreeSet};

use ipnet::IpNet;
use mesh::names::Str;
use proto::security::{
    self as wire, Authorization, Clause, Match, Rule, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};

use super::{FailurePolicy, Settings, bytes_of, condition};
use crate::{
    crd::{AuthorizationAction, AuthorizationRule, Operation, PeerSource, TargetRef, Texts, When},
    object::{Kind, Labels, Meta, Policy, Sourced},
    output::{Condition, Truth},
};

/// What a policy comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Names and age.
    pub meta: Meta,
    /// Labels that select workloads; `None`: the whole namespace or mesh.
    pub selector: Option<Labels>,
    /// What node tunnels get; `None`: nothing.
    pub authorization: Option<Authorization>,
    /// What to say of it.
    pub conditions: Vec<Condition>,
}

/// What of a policy a node tunnel cannot judge.
#[derive(Debug, Default)]
struct Lost {
    /// HTTP attributes, by field.
    attributes: BTreeSet<String>,
    /// Values without meaning, by field.
    bad: Vec<String>,
    /// ALLOW rules left out, from 1.
    omitted: Vec<usize>,
    /// Rules that match more than was asked, from 1.
    widened: Vec<usize>,
    /// Rules that match everything for want of other parts, from 1.
    total: Vec<usize>,
    /// Rules without effect, from 1 (only as Istio does).
    inert: Vec<usize>,
}

/// How rules are read: what may be lost in which direction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// A match lets in: parts that are lost take the rule with them.
    Allow,
    /// A match refuses: parts that are lost are left out of the match.
    Deny,
    /// A match refuses: parts that are lost never match.
    DenyAsIstio,
}

/// Translates one policy.
pub fn translate(settings: &Settings, policy: &Sourced<Policy>) -> Outcome {
    let spec = &policy.object.spec;
    let meta = &policy.object.meta;
    let selector = spec.selector.as_ref().map(|selector| {
        let pairs = selector.match_labels.iter();
        pairs
            .map(|(key, value)| (Str::from(key.as_str()), Str::from(value.as_str())))
            .collect()
    });
    let outcome = |authorization, conditions| Outcome {
        meta: meta.clone(),
        selector: selector.clone(),
        authorization,
        conditions,
    };
    let for_waypoints = spec.target_ref.is_some() || !spec.target_refs.is_empty();
    if for_waypoints && selector.is_none() {
        return outcome(None, Vec::new());
    }
    if !policy.faults.is_empty() {
        let message = format!(
            "refuses everything it selects, because of: {}",
            policy.faults.join("; ")
        );
        let refusal = Some(refuse_all(settings, policy, &selector));
        return outcome(refusal, vec![accepted(Truth::False, "Invalid", message)]);
    }
    let dry_run = is_dry_run(meta);
    if let Some(condition) = not_enforced(settings, spec.action, dry_run) {
        return outcome(None, vec![condition]);
    }
    let mut lost = Lost::default();
    let reading = match (spec.action, settings.failure) {
        (AuthorizationAction::Allow, _) => Reading::Allow,
        (_, FailurePolicy::Closed) => Reading::Deny,
        (_, FailurePolicy::AsIstio) => Reading::DenyAsIstio,
    };
    let numbered = spec.rules.iter().zip(1..);
    let rules = numbered
        .flat_map(|(rule, number)| rules(settings, meta, reading, rule, number, &mut lost))
        .collect();
    if !lost.bad.is_empty() && settings.failure == FailurePolicy::Closed {
        let message = format!(
            "refuses everything it selects, because of: {}",
            lost.bad.join("; ")
        );
        let refusal = Some(refuse_all(settings, policy, &selector));
        return outcome(refusal, vec![accepted(Truth::False, "Invalid", message)]);
    }
    let authorization = Authorization {
        rules,
        dry_run,
        ..header(settings, meta, &selector, action(spec.action))
    };
    let condition = lost.condition(spec.action, dry_run);
    outcome(Some(authorization), vec![condition])
}

fn action(action: AuthorizationAction) -> wire::Action {
    match action {
        AuthorizationAction::Allow => wire::Action::Allow,
        AuthorizationAction::Deny | AuthorizationAction::Custom | AuthorizationAction::Audit => {
            wire::Action::Deny
        }
    }
}

fn header(
    settings: &Settings,
    meta: &Meta,
    selector: &Option<Labels>,
    action: wire::Action,
) -> Authorization {
    let in_root = meta.name.namespace == settings.root_namespace;
    let scope = match (selector, in_root) {
        (Some(_), _) => wire::Scope::WorkloadSelector,
        (None, true) => wire::Scope::Global,
        (None, false) => wire::Scope::Namespace,
    };
    Authorization {
        name: meta.name.name.to_string(),
        namespace: meta.name.namespace.to_string(),
        scope: scope.into(),
        action: action.into(),
        ..Authorization::default()
    }
}

fn refuse_all(
    settings: &Settings,
    policy: &Sourced<Policy>,
    selector: &Option<Labels>,
) -> Authorization {
    Authorization {
        rules: vec![Rule::default()],
        ..header(settings, &policy.object.meta, selector, wire::Action::Deny)
    }
}

/// Annotation `istio.io/dry-run`.
pub fn is_dry_run(meta: &Meta) -> bool {
    let truth = |text: &str| matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True");
    meta.annotation("istio.io/dry-run")
        .is_some_and(|text| truth(text))
}

fn not_enforced(
    settings: &Settings,
    action: AuthorizationAction,
    dry_run: bool,
) -> Option<Condition> {
    let unsupported =
        |message: &'static str| Some(accepted(Truth::False, "UnsupportedValue", message));
    match (action, settings.failure) {
        (AuthorizationAction::Audit, _) => {
            unsupported("not sent: AUDIT has no effect at a node tunnel")
        }
        (AuthorizationAction::Custom, FailurePolicy::AsIstio) => {
            unsupported("not sent: CUSTOM needs a waypoint; nothing is enforced")
        }
        _ if dry_run && !settings.send_dry_run => {
            unsupported("not sent: it is a dry run; nothing is enforced")
        }
        _ => None,
    }
}

/// The rules that one rule comes to: several where a source needs clauses of its own.
fn rules(
    settings: &Settings,
    meta: &Meta,
    reading: Reading,
    rule: &AuthorizationRule,
    number: usize,
    lost: &mut Lost,
) -> Vec<Rule> {
    let mut parts = Parts {
        settings,
        namespace: &meta.name.namespace,
        field: format!("rules[{}]", number - 1),
        lost,
        http: 0,
    };
    let to = parts.operations(rule);
    let from = parts.sources(rule);
    let when: Vec<Option<Match>> = rule
        .when
        .iter()
        .flatten()
        .map(|when| parts.when(when))
        .collect();
    let http = parts.http > 0;
    if http && reading == Reading::Allow {
        lost.omitted.push(number);
        return Vec::new();
    }
    let mut clauses = Vec::new();
    clauses.extend(any_of(to, reading));
    clauses.extend(
        when.into_iter()
            .filter_map(|part| any_of(vec![part], reading)),
    );
    let built = combine(clauses, from, reading);
    if http {
        let never = |clause: &Clause| clause.matches.iter().all(|one| *one == Match::default());
        if built.iter().any(|rule| rule.clauses.is_empty()) {
            lost.total.push(number);
        } else if built.iter().all(|rule| rule.clauses.iter().any(never)) {
            lost.inert.push(number);
        } else {
            lost.widened.push(number);
        }
    }
    built
}

/// One clause that holds if any part does. A part of which nothing is left holds always, or as Istio does, never.
fn any_of(parts: Vec<Option<Match>>, reading: Reading) -> Option<Clause> {
    if parts.is_empty() || (reading == Reading::Deny && parts.iter().any(Option::is_none)) {
        return None;
    }
    let matches = parts.into_iter().map(Option::unwrap_or_default).collect();
    Some(Clause { matches })
}

/// Sources are ORed, and each is an AND of matches. Where every source is a single match, they make one clause; else there
/// is a rule for each source.
fn combine(others: Vec<Clause>, from: Vec<Vec<Match>>, reading: Reading) -> Vec<Rule> {
    let rule = |clauses: Vec<Clause>| Rule { clauses };
    if from.iter().all(|source| source.len() <= 1) {
        let parts = from.into_iter().map(|mut source| source.pop()).collect();
        let mut clauses: Vec<Clause> = any_of(parts, reading).into_iter().collect();
        clauses.extend(others);
        return vec![rule(clauses)];
    }
    if reading == Reading::Deny && from.iter().any(Vec::is_empty) {
        return vec![rule(others)];
    }
    let of_source = |source: Vec<Match>| {
        let own = source.into_iter().map(|one| Clause { matches: vec![one] });
        rule(own.chain(others.iter().cloned()).collect())
    };
    from.into_iter().map(of_source).collect()
}

/// Reads the parts of one rule.
struct Parts<'a> {
    settings: &'a Settings,
    namespace: &'a str,
    field: String,
    lost: &'a mut Lost,
    /// Attributes of this rule that are lost.
    http: usize,
}

impl Parts<'_> {
    fn operations(&mut self, rule: &AuthorizationRule) -> Vec<Option<Match>> {
        let empty = Operation::default();
        let operations: Vec<&Operation> = rule
            .to
            .iter()
            .flatten()
            .map(|to| to.operation.as_ref().unwrap_or(&empty))
            .collect();
        operations
            .into_iter()
            .map(|operation| self.operation(operation))
            .collect()
    }

    fn operation(&mut self, operation: &Operation) -> Option<Match> {
        self.http_only(
            "to.operation",
            &[
                ("hosts", &operation.hosts),
                ("notHosts", &operation.not_hosts),
                ("methods", &operation.methods),
                ("notMethods", &operation.not_methods),
                ("paths", &operation.paths),
                ("notPaths", &operation.not_paths),
            ],
        );
        kept(Match {
            destination_ports: self.ports("to.operation.ports", &operation.ports),
            not_destination_ports: self.ports("to.operation.notPorts", &operation.not_ports),
            ..Match::default()
        })
    }

    /// Each source as an AND of matches; an empty list: nothing of it is left.
    fn sources(&mut self, rule: &AuthorizationRule) -> Vec<Vec<Match>> {
        let empty = PeerSource::default();
        let sources: Vec<&PeerSource> = rule
            .from
            .iter()
            .flatten()
            .map(|from| from.source.as_ref().unwrap_or(&empty))
            .collect();
        sources
            .into_iter()
            .map(|source| self.source(source))
            .collect()
    }

    fn source(&mut self, source: &PeerSource) -> Vec<Match> {
        self.http_only(
            "from.source",
            &[
                ("requestPrincipals", &source.request_principals),
                ("notRequestPrincipals", &source.not_request_principals),
                ("remoteIpBlocks", &source.remote_ip_blocks),
                ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
            ],
        );
        let mut not_principals = self.principals(&source.not_principals);
        not_principals
            .extend(self.trust_domains("from.source.notTrustDomains", &source.not_trust_domains));
        let first = Match {
            principals: self.principals(&source.principals),
            not_principals,
            namespaces: strings(&source.namespaces),
            not_namespaces: strings(&source.not_namespaces),
            service_accounts: self.accounts(&source.service_accounts),
            not_service_accounts: self.accounts(&source.not_service_accounts),
            source_ips: self.addresses("from.source.ipBlocks", &source.ip_blocks),
            not_source_ips: self.addresses("from.source.notIpBlocks", &source.not_ip_blocks),
            ..Match::default()
        };
        let domains = self.trust_domains("from.source.trustDomains", &source.trust_domains);
        with_trust_domains(first, domains)
    }

    fn when(&mut self, when: &When) -> Option<Match> {
        let (values, not_values) = (&when.values, &when.not_values);
        let field = format!("when[{}]", when.key);
        let found = match when.key.as_str() {
            "source.ip" => Match {
                source_ips: self.addresses(&field, values),
                not_source_ips: self.addresses(&field, not_values),
                ..Match::default()
            },
            "destination.ip" => Match {
                destination_ips: self.addresses(&field, values),
                not_destination_ips: self.addresses(&field, not_values),
                ..Match::default()
            },
            "destination.port" => Match {
                destination_ports: self.ports(&field, values),
                not_destination_ports: self.ports(&field, not_values),
                ..Match::default()
            },
            "source.namespace" => Match {
                namespaces: strings(values),
                not_namespaces: strings(not_values),
                ..Match::default()
            },
            "source.principal" => Match {
                principals: self.principals(values),
                not_principals: self.principals(not_values),
                ..Match::default()
            },
            "source.serviceAccount" => Match {
                service_accounts: self.accounts(values),
                not_service_accounts: self.accounts(not_values),
                ..Match::default()
            },
            "source.trustDomain" => Match {
                principals: self.trust_domains(&field, values),
                not_principals: self.trust_domains(&field, not_values),
                ..Match::default()
            },
            _ => {
                self.lose(field);
                Match::default()
            }
        };
        kept(found)
    }

    fn http_only(&mut self, of: &str, fields: &[(&str, &Texts)]) {
        for (field, texts) in fields {
            if texts.is_some() {
                self.lose(format!("{of}.{field}"));
            }
        }
    }

    fn lose(&mut self, attribute: String) {
        self.http += 1;
        self.lost.attributes.insert(attribute);
    }

    fn bad(&mut self, field: &str, text: &str, expected: &str) {
        let problem = format!("{}.{field}: {text:?} is no {expected}", self.field);
        self.lost.bad.push(problem);
    }

    fn ports(&mut self, field: &str, texts: &Texts) -> Vec<u32> {
        let mut ports = Vec::new();
        for text in texts.iter().flatten() {
            match text.parse::<u16>() {
                Ok(port) => ports.push(port.into()),
                Err(_) => self.bad(field, text, "port"),
            }
        }
        ports
    }

    fn addresses(&mut self, field: &str, texts: &Texts) -> Vec<wire::Address> {
        let mut addresses = Vec::new();
        for text in texts.iter().flatten() {
            match parse_block(text) {
                Some(block) => addresses.push(wire::Address {
                    address: bytes_of(block.network()),
                    length: block.prefix_len().into(),
                }),
                None => self.bad(field, text, "address or range"),
            }
        }
        addresses
    }

    /// Principals, by every name of the mesh's trust domain.
    fn principals(&self, texts: &Texts) -> Vec<StringMatch> {
        let texts = texts.iter().flatten();
        let named = texts.flat_map(|text| self.settings.in_every_name(text));
        named
            .map(|text| StringMatch {
                match_type: Some(string(&text)),
            })
            .collect()
    }

    /// `namespace/account`, or an account of the policy's own namespace.
    fn accounts(&self, texts: &Texts) -> Vec<ServiceAccountMatch> {
        let account = |text: &String| {
            let (namespace, account) = text.split_once('/').unwrap_or((self.namespace, text));
            ServiceAccountMatch {
                namespace: namespace.to_owned(),
                service_account: account.to_owned(),
            }
        };
        texts.iter().flatten().map(account).collect()
    }

    /// A principal starts with its trust domain and a slash, so most forms can be said of the principal. Not so an ending:
    /// that is lost, and a list of which one alternative is lost says nothing any more.
    fn trust_domains(&mut self, field: &str, texts: &Texts) -> Vec<StringMatch> {
        let mut matches = Vec::new();
        let mut whole = true;
        for text in texts.iter().flatten() {
            match string(text) {
                MatchType::Exact(domain) => matches.push(MatchType::Prefix(domain + "/")),
                MatchType::Suffix(_) => {
                    self.lose(format!("{field} ({text})"));
                    whole = false;
                }
                other => matches.push(other),
            }
        }
        matches.retain(|_| whole);
        matches
            .into_iter()
            .map(|one| StringMatch {
                match_type: Some(one),
            })
            .collect()
    }
}

/// An address or a range. Host bits are allowed, as upstream has it.
pub fn parse_block(text: &str) -> Option<IpNet> {
    match text.parse() {
        Ok(block) => Some(block),
        Err(_) => text.parse::<std::net::IpAddr>().ok().map(IpNet::from),
    }
}

/// Trust domains and principals are both said of the principal, and must both hold.
fn with_trust_domains(mut first: Match, domains: Vec<StringMatch>) -> Vec<Match> {
    if first.principals.is_empty() {
        first.principals = domains;
        return kept(first).into_iter().collect();
    }
    let second = Match {
        principals: domains,
        ..Match::default()
    };
    std::iter::once(first).chain(kept(second)).collect()
}

fn kept(found: Match) -> Option<Match> {
    (found != Match::default()).then_some(found)
}

fn strings(texts: &Texts) -> Vec<StringMatch> {
    let one = |text: &String| StringMatch {
        match_type: Some(string(text)),
    };
    texts.iter().flatten().map(one).collect()
}

/// `*`, `*ending`, `start*`, or the whole.
fn string(text: &str) -> MatchType {
    match (text.strip_prefix('*'), text.strip_suffix('*')) {
        (Some(""), _) => MatchType::Presence(()),
        (Some(ending), _) => MatchType::Suffix(ending.to_owned()),
        (None, Some(start)) => MatchType::Prefix(start.to_owned()),
        (None, None) => MatchType::Exact(text.to_owned()),
    }
}

impl Lost {
    fn condition(&self, action: AuthorizationAction, dry_run: bool) -> Condition {
        let mut said = Vec::new();
        let attributes: Vec<&str> = self.attributes.iter().map(String::as_str).collect();
        if !attributes.is_empty() {
            said.push(format!(
                "node tunnels cannot judge {}, and waypoints enforce policies with targetRefs only",
                attributes.join(", ")
            ));
        }
        let rules = |numbers: &[usize], what: &str| {
            let list: Vec<String> = numbers.iter().map(usize::to_string).collect();
            (!numbers.is_empty()).then(|| format!("rule {} {what}", list.join(", ")))
        };
        said.extend(rules(
            &self.omitted,
            "of ALLOW left out, so that what only it would allow is refused",
        ));
        said.extend(rules(
            &self.widened,
            "matches by its other parts alone, so that more is refused",
        ));
        said.extend(rules(
            &self.total,
            "has no other parts, so that everything is refused",
        ));
        said.extend(rules(&self.inert, "without effect"));
        if !self.bad.is_empty() {
            said.push(format!("left out: {}", self.bad.join("; ")));
        }
        if action == AuthorizationAction::Custom {
            said.push(
                "CUSTOM is refused where it matches: no node tunnel asks a provider".to_owned(),
            );
        }
        if dry_run {
            said.push("dry run: told, not enforced".to_owned());
        }
        match said.is_empty() {
            true => accepted(
                Truth::True,
                "Accepted",
                "enforced by node tunnels as written",
            ),
            false => accepted(Truth::True, "UnsupportedValue", said.join("; ")),
        }
    }
}

/// Lets a waypoint's instances in where ALLOW policies shut out everybody else.
pub fn for_waypoint(
    settings: &Settings,
    namespace: &str,
    name: String,
    accounts: &BTreeSet<Str>,
) -> Authorization {
    let domain = &settings.trust_domain;
    let principal = |account: &Str| StringMatch {
        match_type: Some(MatchType::Exact(format!(
            "{domain}/ns/{namespace}/sa/{account}"
        ))),
    };
    let matches = vec![Match {
        principals: accounts.iter().map(principal).collect(),
        ..Match::default()
    }];
    Authorization {
        name,
        namespace: namespace.to_owned(),
        scope: wire::Scope::WorkloadSelector.into(),
        action: wire::Action::Allow.into(),
        rules: vec![Rule {
            clauses: vec![Clause { matches }],
        }],
        ..Authorization::default()
    }
}

/// The kind of a target, if it may be one.
pub fn target_kind(target: &TargetRef) -> Option<Kind> {
    match (target.group.as_str(), target.kind.as_str()) {
        ("" | "core", "Service") => Some(Kind::Service),
        ("networking.istio.io", "ServiceEntry") => Some(Kind::ServiceEntry),
        ("gateway.networking.k8s.io", "Gateway") => Some(Kind::Gateway),
        ("gateway.networking.k8s.io", "GatewayClass") => Some(Kind::GatewayClass),
        _ => None,
    }
}

fn accepted(
    status: Truth,
    reason: &'static str,
    message: impl Into<Cow<'static, str>>,
) -> Condition {
    condition("ZtunnelAccepted", status, reason, message)
}
