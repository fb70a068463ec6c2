//! Authorization of requests. What cannot be understood never opens anything: an ALLOW or AUDIT rule that holds it is
//! left out, a DENY or CUSTOM rule that holds it matches everything, and a policy of an unknown action denies
//! everything that it is attached to. Each is told in [`RequestPolicy::faults`].

use http::HeaderName;
use proto::waypoint as wire;

use super::{
    InvalidResource, Problem, Result, header_name, list, missing, optional, parsed, range, ranges,
    read, required, small, texts, wire_list, wire_texts,
};
use crate::{
    l7::{
        authorization::{
            Condition, ConditionKey, Either, OperationMatch, PathTemplate, PolicyAction,
            PolicyRule, RequestPolicy, SourceMatch, TemplatePart, ValueMatch,
        },
        name::Target,
    },
    names::Str,
};

impl TryFrom<&wire::RequestPolicy> for RequestPolicy {
    type Error = InvalidResource;

    fn try_from(wire: &wire::RequestPolicy) -> Result<Self> {
        let mut faults = texts(&wire.faults);
        let action = action(wire.action.as_ref());
        if action.is_none() {
            faults.push(missing("action").to_string().into());
        }
        let rules = match &action {
            Some(action) => rules(action, &wire.rules, &mut faults),
            None => vec![PolicyRule::default()],
        };
        Ok(Self {
            key: parsed("key", &wire.key)?,
            targets: targets(&wire.targets, &mut faults)?,
            action: action.unwrap_or(PolicyAction::Deny),
            dry_run: wire.dry_run,
            rules,
            faults,
        })
    }
}

/// One that is not known is told; at least one must be.
fn targets(wire: &[wire::Target], faults: &mut Vec<Str>) -> Result<Vec<Target>> {
    let targets = wire.iter().enumerate().filter_map(|(at, it)| {
        read(&format!("targets[{at}]"), it)
            .map_err(|fault| faults.push(fault.to_string().into()))
            .ok()
    });
    let targets: Vec<_> = targets.collect();
    if targets.is_empty() {
        return Err(missing("targets"));
    }
    Ok(targets)
}

fn action(wire: Option<&wire::request_policy::Action>) -> Option<PolicyAction> {
    use wire::request_policy::Action as Wire;
    Some(match wire? {
        Wire::Allow(()) => PolicyAction::Allow,
        Wire::Deny(()) => PolicyAction::Deny,
        Wire::Audit(()) => PolicyAction::Audit,
        Wire::Custom(it) => PolicyAction::Custom(it.as_str().into()),
    })
}

fn rules(
    action: &PolicyAction,
    wire: &[wire::PolicyRule],
    faults: &mut Vec<Str>,
) -> Vec<PolicyRule> {
    let widen = matches!(action, PolicyAction::Deny | PolicyAction::Custom(_));
    let rules = wire.iter().enumerate().filter_map(|(at, it)| {
        let fault = match read(&format!("rules[{at}]"), it) {
            Ok(rule) => return Some(rule),
            Err(fault) => fault,
        };
        faults.push(fault.to_string().into());
        widen.then(PolicyRule::default)
    });
    rules.collect()
}

impl From<&RequestPolicy> for wire::RequestPolicy {
    fn from(policy: &RequestPolicy) -> Self {
        use wire::request_policy::Action as Wire;
        let action = match &policy.action {
            PolicyAction::Allow => Wire::Allow(()),
            PolicyAction::Deny => Wire::Deny(()),
            PolicyAction::Audit => Wire::Audit(()),
            PolicyAction::Custom(it) => Wire::Custom(it.to_string()),
        };
        Self {
            key: policy.key.to_string(),
            targets: wire_list(&policy.targets),
            action: Some(action),
            dry_run: policy.dry_run,
            rules: wire_list(&policy.rules),
            faults: wire_texts(&policy.faults),
        }
    }
}

impl TryFrom<&wire::PolicyRule> for PolicyRule {
    type Error = InvalidResource;

    fn try_from(wire: &wire::PolicyRule) -> Result<Self> {
        Ok(Self {
            from: list("from", &wire.from)?,
            to: list("to", &wire.to)?,
            when: list("when", &wire.when)?,
        })
    }
}

impl From<&PolicyRule> for wire::PolicyRule {
    fn from(rule: &PolicyRule) -> Self {
        Self {
            from: wire_list(&rule.from),
            to: wire_list(&rule.to),
            when: wire_list(&rule.when),
        }
    }
}

/// None: nothing is asked.
fn either<'a, W, T: 'a>(field: &str, wire: Option<&'a W>) -> Result<Either<T>>
where
    Either<T>: TryFrom<&'a W, Error = InvalidResource>,
{
    Ok(optional(field, wire)?.unwrap_or_default())
}

fn wire_either<'a, T: PartialEq, W: From<&'a Either<T>>>(it: &'a Either<T>) -> Option<W> {
    (!it.values.is_empty() || !it.not_values.is_empty()).then(|| it.into())
}

impl TryFrom<&wire::SourceMatch> for SourceMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::SourceMatch) -> Result<Self> {
        Ok(Self {
            principals: either("principals", wire.principals.as_ref())?,
            request_principals: either("request_principals", wire.request_principals.as_ref())?,
            namespaces: either("namespaces", wire.namespaces.as_ref())?,
            service_accounts: either("service_accounts", wire.service_accounts.as_ref())?,
            trust_domains: either("trust_domains", wire.trust_domains.as_ref())?,
            ip_blocks: either("ip_blocks", wire.ip_blocks.as_ref())?,
            remote_ip_blocks: either("remote_ip_blocks", wire.remote_ip_blocks.as_ref())?,
        })
    }
}

impl From<&SourceMatch> for wire::SourceMatch {
    fn from(it: &SourceMatch) -> Self {
        Self {
            principals: wire_either(&it.principals),
            request_principals: wire_either(&it.request_principals),
            namespaces: wire_either(&it.namespaces),
            service_accounts: wire_either(&it.service_accounts),
            trust_domains: wire_either(&it.trust_domains),
            ip_blocks: wire_either(&it.ip_blocks),
            remote_ip_blocks: wire_either(&it.remote_ip_blocks),
        }
    }
}

impl TryFrom<&wire::OperationMatch> for OperationMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::OperationMatch) -> Result<Self> {
        Ok(Self {
            hosts: either("hosts", wire.hosts.as_ref())?,
            ports: either("ports", wire.ports.as_ref())?,
            methods: either("methods", wire.methods.as_ref())?,
            paths: either("paths", wire.paths.as_ref())?,
        })
    }
}

impl From<&OperationMatch> for wire::OperationMatch {
    fn from(it: &OperationMatch) -> Self {
        Self {
            hosts: wire_either(&it.hosts),
            ports: wire_either(&it.ports),
            methods: wire_either(&it.methods),
            paths: wire_either(&it.paths),
        }
    }
}

impl TryFrom<&wire::Condition> for Condition {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Condition) -> Result<Self> {
        use wire::condition::Key;
        let key = match &wire.key {
            Some(Key::Header(it)) => ConditionKey::Header(header_name("header", it)?),
            Some(Key::Claim(it)) => ConditionKey::Claim(texts(&it.names)),
            Some(Key::Attribute(it)) => attribute(*it)?,
            None => return Err(missing("key")),
        };
        Ok(Self {
            key,
            values: required("values", wire.values.as_ref())?,
        })
    }
}

impl From<&Condition> for wire::Condition {
    fn from(it: &Condition) -> Self {
        Self {
            values: Some((&it.values).into()),
            key: Some(wire_key(&it.key)),
        }
    }
}

fn attribute(number: i32) -> Result<ConditionKey> {
    use wire::Attribute as Wire;
    Ok(match Wire::try_from(number).unwrap_or_default() {
        Wire::Unknown => {
            return Err(InvalidResource::new("attribute", Problem::Unknown(number)));
        }
        Wire::SourceIp => ConditionKey::SourceIp,
        Wire::RemoteIp => ConditionKey::RemoteIp,
        Wire::SourceNamespace => ConditionKey::SourceNamespace,
        Wire::SourcePrincipal => ConditionKey::SourcePrincipal,
        Wire::SourceServiceAccount => ConditionKey::SourceServiceAccount,
        Wire::SourceTrustDomain => ConditionKey::SourceTrustDomain,
        Wire::RequestPrincipal => ConditionKey::RequestPrincipal,
        Wire::Audiences => ConditionKey::Audiences,
        Wire::Presenter => ConditionKey::Presenter,
        Wire::DestinationIp => ConditionKey::DestinationIp,
        Wire::DestinationPort => ConditionKey::DestinationPort,
        Wire::Sni => ConditionKey::Sni,
    })
}

fn wire_key(key: &ConditionKey) -> wire::condition::Key {
    use wire::{Attribute as Wire, condition::Key};
    let header = |it: &HeaderName| Key::Header(it.to_string());
    let attribute = match key {
        ConditionKey::Header(it) => return header(it),
        ConditionKey::Claim(it) => {
            return Key::Claim(wire::ClaimPath {
                names: wire_texts(it),
            });
        }
        ConditionKey::SourceIp => Wire::SourceIp,
        ConditionKey::RemoteIp => Wire::RemoteIp,
        ConditionKey::SourceNamespace => Wire::SourceNamespace,
        ConditionKey::SourcePrincipal => Wire::SourcePrincipal,
        ConditionKey::SourceServiceAccount => Wire::SourceServiceAccount,
        ConditionKey::SourceTrustDomain => Wire::SourceTrustDomain,
        ConditionKey::RequestPrincipal => Wire::RequestPrincipal,
        ConditionKey::Audiences => Wire::Audiences,
        ConditionKey::Presenter => Wire::Presenter,
        ConditionKey::DestinationIp => Wire::DestinationIp,
        ConditionKey::DestinationPort => Wire::DestinationPort,
        ConditionKey::Sni => Wire::Sni,
    };
    Key::Attribute(attribute.into())
}

impl TryFrom<&wire::ValueMatch> for ValueMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::ValueMatch) -> Result<Self> {
        use wire::value_match::Kind;
        match &wire.kind {
            Some(Kind::Exact(it)) => Ok(Self::Exact(it.as_str().into())),
            Some(Kind::Prefix(it)) => Ok(Self::Prefix(it.as_str().into())),
            Some(Kind::Suffix(it)) => Ok(Self::Suffix(it.as_str().into())),
            Some(Kind::Present(())) => Ok(Self::Present),
            Some(Kind::Cidr(it)) => range("cidr", it).map(Self::Cidr),
            Some(Kind::Port(it)) => small("port", *it).map(Self::Port),
            None => Err(missing("kind")),
        }
    }
}

impl From<&ValueMatch> for wire::ValueMatch {
    fn from(it: &ValueMatch) -> Self {
        use wire::value_match::Kind;
        let kind = match it {
            ValueMatch::Exact(it) => Kind::Exact(it.to_string()),
            ValueMatch::Prefix(it) => Kind::Prefix(it.to_string()),
            ValueMatch::Suffix(it) => Kind::Suffix(it.to_string()),
            ValueMatch::Present => Kind::Present(()),
            ValueMatch::Cidr(it) => Kind::Cidr(it.to_string()),
            ValueMatch::Port(it) => Kind::Port((*it).into()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::Values> for Either<ValueMatch> {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Values) -> Result<Self> {
        Ok(Self {
            values: list("values", &wire.values)?,
            not_values: list("not_values", &wire.not_values)?,
        })
    }
}

impl From<&Either<ValueMatch>> for wire::Values {
    fn from(it: &Either<ValueMatch>) -> Self {
        Self {
            values: wire_list(&it.values),
            not_values: wire_list(&it.not_values),
        }
    }
}

impl TryFrom<&wire::Ranges> for Either<ipnet::IpNet> {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Ranges) -> Result<Self> {
        Ok(Self {
            values: ranges("values", &wire.values)?,
            not_values: ranges("not_values", &wire.not_values)?,
        })
    }
}

impl From<&Either<ipnet::IpNet>> for wire::Ranges {
    fn from(it: &Either<ipnet::IpNet>) -> Self {
        Self {
            values: wire_texts(&it.values),
            not_values: wire_texts(&it.not_values),
        }
    }
}

impl TryFrom<&wire::Ports> for Either<u16> {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Ports) -> Result<Self> {
        let ports = |field: &str, wire: &[u32]| -> Result<Vec<u16>> {
            wire.iter().map(|it| small(field, *it)).collect()
        };
        Ok(Self {
            values: ports("values", &wire.values)?,
            not_values: ports("not_values", &wire.not_values)?,
        })
    }
}

impl From<&Either<u16>> for wire::Ports {
    fn from(it: &Either<u16>) -> Self {
        Self {
            values: it.values.iter().map(|it| (*it).into()).collect(),
            not_values: it.not_values.iter().map(|it| (*it).into()).collect(),
        }
    }
}

impl TryFrom<&wire::Accounts> for Either<(Str, Str)> {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Accounts) -> Result<Self> {
        let account = |it: &wire::Account| (it.namespace.as_str().into(), it.name.as_str().into());
        Ok(Self {
            values: wire.values.iter().map(account).collect(),
            not_values: wire.not_values.iter().map(account).collect(),
        })
    }
}

impl From<&Either<(Str, Str)>> for wire::Accounts {
    fn from(it: &Either<(Str, Str)>) -> Self {
        let account = |(namespace, name): &(Str, Str)| wire::Account {
            namespace: namespace.to_string(),
            name: name.to_string(),
        };
        Self {
            values: it.values.iter().map(account).collect(),
            not_values: it.not_values.iter().map(account).collect(),
        }
    }
}

impl TryFrom<&wire::Paths> for Either<PathTemplate> {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Paths) -> Result<Self> {
        Ok(Self {
            values: list("values", &wire.values)?,
            not_values: list("not_values", &wire.not_values)?,
        })
    }
}

impl From<&Either<PathTemplate>> for wire::Paths {
    fn from(it: &Either<PathTemplate>) -> Self {
        Self {
            values: wire_list(&it.values),
            not_values: wire_list(&it.not_values),
        }
    }
}

impl TryFrom<&wire::PathTemplate> for PathTemplate {
    type Error = InvalidResource;

    fn try_from(wire: &wire::PathTemplate) -> Result<Self> {
        use wire::path_template::Kind;
        match &wire.kind {
            Some(Kind::Value(it)) => read("value", it).map(Self::Value),
            Some(Kind::Template(it)) => list("template.parts", &it.parts).map(Self::Template),
            None => Err(missing("kind")),
        }
    }
}

impl From<&PathTemplate> for wire::PathTemplate {
    fn from(it: &PathTemplate) -> Self {
        use wire::path_template::Kind;
        let kind = match it {
            PathTemplate::Value(it) => Kind::Value(it.into()),
            PathTemplate::Template(parts) => Kind::Template(wire::Template {
                parts: wire_list(parts),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::TemplatePart> for TemplatePart {
    type Error = InvalidResource;

    fn try_from(wire: &wire::TemplatePart) -> Result<Self> {
        use wire::template_part::Kind;
        match &wire.kind {
            Some(Kind::Literal(it)) => Ok(Self::Literal(it.as_str().into())),
            Some(Kind::One(())) => Ok(Self::One),
            Some(Kind::Any(())) => Ok(Self::Any),
            None => Err(missing("kind")),
        }
    }
}

impl From<&TemplatePart> for wire::TemplatePart {
    fn from(it: &TemplatePart) -> Self {
        use wire::template_part::Kind;
        let kind = match it {
            TemplatePart::Literal(it) => Kind::Literal(it.to_string()),
            TemplatePart::One => Kind::One(()),
            TemplatePart::Any => Kind::Any(()),
        };
        Self { kind: Some(kind) }
    }
}
