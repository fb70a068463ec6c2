//! `istio.security.Authorization`.

use proto::security as wire;

use super::{InvalidResource, Problem, bytes, cidr, key, port};
use crate::policy::{
    Action, AuthorizationPolicy, Clause, Match, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};

/// A value that cannot be understood never opens anything (design 8.2): in an ALLOW policy the match that holds it
/// never matches; a DENY policy, or one of an unknown action, denies everything that it selects. Each is told in
/// [`AuthorizationPolicy::faults`]. An unknown scope rejects the policy: what it selects cannot be known, and a
/// workload that names it is denied because the policy is unknown.
impl TryFrom<wire::Authorization> for AuthorizationPolicy {
    type Error = InvalidResource;

    fn try_from(wire: wire::Authorization) -> Result<Self, InvalidResource> {
        if wire.name.is_empty() {
            return Err(InvalidResource::new("name", Problem::Missing));
        }
        let key = key(&wire.namespace, &wire.name)
            .map_err(|problem| InvalidResource::new("name", problem))?;
        let mut faults = Vec::new();
        let rules = rules(&wire.rules, &mut faults);
        let action = action(wire.action, &mut faults);
        let closed = action == Action::Deny && !faults.is_empty();
        Ok(Self {
            key,
            scope: scope(wire.scope)?,
            action,
            rules: if closed { vec![Rule::default()] } else { rules },
            dry_run: wire.dry_run,
            faults,
        })
    }
}

fn scope(number: i32) -> Result<PolicyScope, InvalidResource> {
    match wire::Scope::try_from(number) {
        Ok(wire::Scope::Global) => Ok(PolicyScope::Global),
        Ok(wire::Scope::Namespace) => Ok(PolicyScope::Namespace),
        Ok(wire::Scope::WorkloadSelector) => Ok(PolicyScope::WorkloadSelector),
        Err(_) => Err(InvalidResource::new("scope", Problem::Unknown(number))),
    }
}

fn action(number: i32, faults: &mut Vec<String>) -> Action {
    match wire::Action::try_from(number) {
        Ok(wire::Action::Allow) => Action::Allow,
        Ok(wire::Action::Deny) => Action::Deny,
        Err(_) => {
            faults.push(format!("action: {}", Problem::Unknown(number)));
            Action::Deny
        }
    }
}

fn rules(wire: &[wire::Rule], faults: &mut Vec<String>) -> Vec<Rule> {
    let mut rules = Vec::with_capacity(wire.len());
    for (r, rule) in wire.iter().enumerate() {
        let mut clauses = Vec::with_capacity(rule.clauses.len());
        for (c, clause) in rule.clauses.iter().enumerate() {
            let matches = clause.matches.iter().enumerate();
            let matches = matches.map(|(m, it)| {
                let place = format!("rules[{r}].clauses[{c}].matches[{m}]");
                one_match(it, &place, faults)
            });
            let matches = matches.collect();
            clauses.push(Clause { matches });
        }
        rules.push(Rule { clauses });
    }
    rules
}

/// A match with a value that cannot be understood becomes the empty one, which never matches.
fn one_match(wire: &wire::Match, place: &str, faults: &mut Vec<String>) -> Match {
    let mut reader = Reader {
        place,
        faults: Vec::new(),
    };
    let read = Match {
        namespaces: reader.list("namespaces", &wire.namespaces, text),
        not_namespaces: reader.list("not_namespaces", &wire.not_namespaces, text),
        principals: reader.list("principals", &wire.principals, text),
        not_principals: reader.list("not_principals", &wire.not_principals, text),
        source_ips: reader.list("source_ips", &wire.source_ips, range),
        not_source_ips: reader.list("not_source_ips", &wire.not_source_ips, range),
        destination_ips: reader.list("destination_ips", &wire.destination_ips, range),
        not_destination_ips: reader.list("not_destination_ips", &wire.not_destination_ips, range),
        destination_ports: reader.list("destination_ports", &wire.destination_ports, number),
        not_destination_ports: reader.list(
            "not_destination_ports",
            &wire.not_destination_ports,
            number,
        ),
        service_accounts: reader.list("service_accounts", &wire.service_accounts, account),
        not_service_accounts: reader.list(
            "not_service_accounts",
            &wire.not_service_accounts,
            account,
        ),
    };
    if reader.faults.is_empty() {
        return read;
    }
    faults.extend(reader.faults);
    Match::default()
}

struct Reader<'a> {
    place: &'a str,
    faults: Vec<String>,
}

impl Reader<'_> {
    fn list<W, T>(
        &mut self,
        field: &str,
        wire: &[W],
        read: impl Fn(&W) -> Result<T, Problem>,
    ) -> Vec<T> {
        let mut values = Vec::with_capacity(wire.len());
        for (at, value) in wire.iter().enumerate() {
            match read(value) {
                Ok(value) => values.push(value),
                Err(problem) => {
                    let fault = format!("{}.{field}[{at}]: {problem}", self.place);
                    self.faults.push(fault);
                }
            }
        }
        values
    }
}

fn text(wire: &wire::StringMatch) -> Result<StringMatch, Problem> {
    use wire::string_match::MatchType;
    match wire.match_type.as_ref().ok_or(Problem::Missing)? {
        MatchType::Exact(text) => Ok(StringMatch::Exact(text.as_str().into())),
        MatchType::Prefix(text) => Ok(StringMatch::Prefix(text.as_str().into())),
        MatchType::Suffix(text) => Ok(StringMatch::Suffix(text.as_str().into())),
        MatchType::Presence(()) => Ok(StringMatch::Presence),
    }
}

fn range(wire: &wire::Address) -> Result<ipnet::IpNet, Problem> {
    cidr(&wire.address, wire.length)
}

fn number(wire: &u32) -> Result<u16, Problem> {
    port(*wire)
}

fn account(wire: &wire::ServiceAccountMatch) -> Result<ServiceAccountMatch, Problem> {
    Ok(ServiceAccountMatch {
        namespace: wire.namespace.as_str().into(),
        service_account: wire.service_account.as_str().into(),
    })
}

/// Faults are not on the wire: the policy is sent as it was closed.
impl From<&AuthorizationPolicy> for wire::Authorization {
    fn from(policy: &AuthorizationPolicy) -> Self {
        let scope = match policy.scope {
            PolicyScope::Global => wire::Scope::Global,
            PolicyScope::Namespace => wire::Scope::Namespace,
            PolicyScope::WorkloadSelector => wire::Scope::WorkloadSelector,
        };
        let action = match policy.action {
            Action::Allow => wire::Action::Allow,
            Action::Deny => wire::Action::Deny,
        };
        Self {
            name: policy.key.name.to_string(),
            namespace: policy.key.namespace.to_string(),
            scope: scope.into(),
            action: action.into(),
            rules: policy.rules.iter().map(Into::into).collect(),
            dry_run: policy.dry_run,
            extensions: Vec::new(),
        }
    }
}

impl From<&Rule> for wire::Rule {
    fn from(rule: &Rule) -> Self {
        let clauses = rule.clauses.iter().map(|clause| wire::Clause {
            matches: clause.matches.iter().map(Into::into).collect(),
        });
        Self {
            clauses: clauses.collect(),
        }
    }
}

impl From<&Match> for wire::Match {
    fn from(one: &Match) -> Self {
        Self {
            namespaces: wire_list(&one.namespaces),
            not_namespaces: wire_list(&one.not_namespaces),
            principals: wire_list(&one.principals),
            not_principals: wire_list(&one.not_principals),
            source_ips: wire_ranges(&one.source_ips),
            not_source_ips: wire_ranges(&one.not_source_ips),
            destination_ips: wire_ranges(&one.destination_ips),
            not_destination_ips: wire_ranges(&one.not_destination_ips),
            destination_ports: wire_list(&one.destination_ports),
            not_destination_ports: wire_list(&one.not_destination_ports),
            service_accounts: wire_list(&one.service_accounts),
            not_service_accounts: wire_list(&one.not_service_accounts),
            extensions: Vec::new(),
        }
    }
}

fn wire_list<T: Clone, W: From<T>>(values: &[T]) -> Vec<W> {
    values.iter().cloned().map(W::from).collect()
}

fn wire_ranges(ranges: &[ipnet::IpNet]) -> Vec<wire::Address> {
    let ranges = ranges.iter().map(|net| wire::Address {
        address: bytes(net.addr()),
        length: net.prefix_len().into(),
    });
    ranges.collect()
}

impl From<StringMatch> for wire::StringMatch {
    fn from(value: StringMatch) -> Self {
        use wire::string_match::MatchType;
        Self {
            match_type: Some(match value {
                StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
                StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
                StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
                StringMatch::Presence => MatchType::Presence(()),
            }),
        }
    }
}

impl From<ServiceAccountMatch> for wire::ServiceAccountMatch {
    fn from(value: ServiceAccountMatch) -> Self {
        Self {
            namespace: value.namespace.to_string(),
            service_account: value.service_account.to_string(),
        }
    }
}
