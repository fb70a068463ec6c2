//! One rule of a policy on one request.

use super::{
    super::{
        authorization::{Condition, ConditionKey, Either, OperationMatch, PolicyRule, SourceMatch},
        condition::header_value,
        edit::split_authority,
        request::{Claims, ConnectionFacts, RequestFacts},
    },
    value::{self, Value},
};
use crate::{
    identity::{Identity, TrustDomain},
    names::Str,
};

/// What rules are asked about.
pub(super) struct Facts<'a> {
    pub(super) connection: &'a ConnectionFacts<'a>,
    /// None: the connection is not HTTP.
    pub(super) request: Option<&'a RequestFacts<'a>>,
    pub(super) peer: Peer<'a>,
}

/// What a rule makes of parts that only HTTP has, where there is no HTTP.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// They do not match.
    Narrow,
    /// They are not there.
    Wide,
}

/// A peer under all of its names: the own trust domain, its aliases and `cluster.local` are the same.
#[derive(Default)]
pub(super) struct Peer<'a> {
    identity: Option<&'a Identity>,
    trust_domains: Vec<&'a str>,
    principals: Vec<String>,
}

/// What an own trust domain is written as in policies, whatever it is.
const ANY_OWN: &str = "cluster.local";

impl<'a> Peer<'a> {
    pub(super) fn new(
        identity: Option<&'a Identity>,
        own: &'a TrustDomain,
        aliases: &'a [TrustDomain],
    ) -> Self {
        let Some(peer) = identity else {
            return Self::default();
        };
        let mut trust_domains = vec![peer.trust_domain.as_str()];
        if peer.trust_domain == *own || aliases.contains(&peer.trust_domain) {
            trust_domains.push(own.as_str());
            trust_domains.extend(aliases.iter().map(TrustDomain::as_str));
            trust_domains.push(ANY_OWN);
        }
        trust_domains.sort_unstable();
        trust_domains.dedup();
        let (namespace, account) = (&peer.namespace, &peer.service_account);
        let principals = trust_domains
            .iter()
            .map(|it| format!("{it}/ns/{namespace}/sa/{account}"));
        Self {
            identity,
            principals: principals.collect(),
            trust_domains,
        }
    }

    fn principals(&self) -> Vec<Value<'_>> {
        self.principals.iter().map(|it| Value::text(it)).collect()
    }

    fn trust_domains(&self) -> Vec<Value<'_>> {
        let names = self.trust_domains.iter();
        names.map(|it| Value::text(it)).collect()
    }

    fn namespace(&self) -> Vec<Value<'_>> {
        let namespace = self.identity.map(|it| Value::text(&it.namespace));
        namespace.into_iter().collect()
    }

    fn account(&self) -> Option<(&Str, &Str)> {
        self.identity.map(|it| (&it.namespace, &it.service_account))
    }
}

/// Whether a rule matches.
pub(super) fn matches(rule: &PolicyRule, facts: &Facts<'_>, side: Side) -> bool {
    let from = rule.from.is_empty() || rule.from.iter().any(|it| source(it, facts, side));
    from && (rule.to.is_empty() || rule.to.iter().any(|it| operation(it, facts, side)))
        && rule.when.iter().all(|it| condition(it, facts, side))
}

fn none_asked<T>(either: &Either<T>) -> bool {
    either.values.is_empty() && either.not_values.is_empty()
}

/// Any of the values, and none of the others.
fn either<T>(either: &Either<T>, holds: impl Fn(&T) -> bool) -> bool {
    (either.values.is_empty() || either.values.iter().any(&holds))
        && !either.not_values.iter().any(holds)
}

/// A part that only HTTP has.
fn http<'a, T>(
    part: &Either<T>,
    facts: &Facts<'a>,
    side: Side,
    holds: impl Fn(&'a RequestFacts<'a>) -> bool,
) -> bool {
    match facts.request {
        _ if none_asked(part) => true,
        Some(request) => holds(request),
        None => side == Side::Wide,
    }
}

fn source(source: &SourceMatch, facts: &Facts<'_>, side: Side) -> bool {
    let peer = &facts.peer;
    let ip = facts.connection.source.ip();
    let remote = facts.request.map_or(ip, |it| it.remote);
    value::any(&source.principals, || peer.principals())
        && value::any(&source.namespaces, || peer.namespace())
        && value::any(&source.trust_domains, || peer.trust_domains())
        && either(&source.service_accounts, |(namespace, name)| {
            peer.account() == Some((namespace, name))
        })
        && either(&source.ip_blocks, |it| it.contains(&ip))
        && either(&source.remote_ip_blocks, |it| it.contains(&remote))
        && http(&source.request_principals, facts, side, |request| {
            value::any(&source.request_principals, || principal(request.claims))
        })
}

fn operation(operation: &OperationMatch, facts: &Facts<'_>, side: Side) -> bool {
    let port = facts.connection.port;
    either(&operation.ports, |it| *it == port)
        && http(&operation.methods, facts, side, |request| {
            value::any(&operation.methods, || {
                vec![Value::text(request.method.as_str())]
            })
        })
        && http(&operation.paths, facts, side, |request| {
            either(&operation.paths, |it| value::path(it, request.path))
        })
        && http(&operation.hosts, facts, side, |request| {
            value::any(&operation.hosts, || hosts(request.authority))
        })
}

/// As written, and without its port.
fn hosts(authority: &str) -> Vec<Value<'_>> {
    let (host, port) = split_authority(authority);
    let mut hosts = vec![Value::Host(authority)];
    hosts.extend(port.map(|_| Value::Host(host)));
    hosts
}

fn principal(claims: Option<&Claims>) -> Vec<Value<'_>> {
    claims
        .map(|it| Value::text(&it.principal))
        .into_iter()
        .collect()
}

fn condition(condition: &Condition, facts: &Facts<'_>, side: Side) -> bool {
    let values = &condition.values;
    if let Some(of) = of_connection(&condition.key, facts) {
        return value::any(values, || of);
    }
    match facts.request {
        _ if none_asked(values) => true,
        Some(request) => value::any(values, || of_request(&condition.key, request)),
        None => side == Side::Wide,
    }
}

/// The values of a key that connections have; none: only HTTP has it.
fn of_connection<'a>(key: &ConditionKey, facts: &'a Facts<'_>) -> Option<Vec<Value<'a>>> {
    let connection = facts.connection;
    let ip = connection.source.ip();
    Some(match key {
        ConditionKey::SourceIp => vec![Value::Address(ip)],
        ConditionKey::RemoteIp => {
            vec![Value::Address(facts.request.map_or(ip, |it| it.remote))]
        }
        ConditionKey::SourceNamespace => facts.peer.namespace(),
        ConditionKey::SourcePrincipal => facts.peer.principals(),
        ConditionKey::SourceTrustDomain => facts.peer.trust_domains(),
        ConditionKey::SourceServiceAccount => {
            let account = facts.peer.account();
            let text = account.map(|(namespace, name)| Value::owned(format!("{namespace}/{name}")));
            text.into_iter().collect()
        }
        ConditionKey::DestinationIp => vec![Value::Address(connection.destination)],
        ConditionKey::DestinationPort => vec![Value::Port(connection.port)],
        ConditionKey::Sni => connection.sni.map(Value::Host).into_iter().collect(),
        ConditionKey::Header(_)
        | ConditionKey::RequestPrincipal
        | ConditionKey::Audiences
        | ConditionKey::Presenter
        | ConditionKey::Claim(_) => return None,
    })
}

/// The values of a key that only HTTP has.
fn of_request<'a>(key: &ConditionKey, request: &'a RequestFacts<'a>) -> Vec<Value<'a>> {
    let claims = request.claims;
    let value = match key {
        ConditionKey::Header(name) => header_value(request.headers, name, request.authority)
            .map(|it| Value::owned(String::from_utf8_lossy(&it).into_owned())),
        ConditionKey::Presenter => claims
            .and_then(|it| it.presenter.as_deref())
            .map(Value::text),
        ConditionKey::Audiences => {
            let audiences = claims.into_iter().flat_map(|it| &it.audiences);
            return audiences.map(|it| Value::text(it)).collect();
        }
        ConditionKey::Claim(path) => {
            let texts = claims.into_iter().flat_map(|it| it.texts(path));
            return texts.map(Value::Text).collect();
        }
        _ => return principal(claims),
    };
    value.into_iter().collect()
}
