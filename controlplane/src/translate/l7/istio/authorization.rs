//! AuthorizationPolicy with targets to the policies that waypoints enforce.
//!
//! A value without meaning only ever refuses more than was asked: it takes an alternative out of ALLOW, and a condition
//! out of DENY. A policy that could not be read refuses everything that its targets take.

use mesh::{
    l7::{
        authorization::{
            Condition as When, ConditionKey, Either, OperationMatch, PathTemplate, PolicyAction,
            PolicyRule, RequestPolicy, SourceMatch, TemplatePart, ValueMatch,
        },
        view::Resource,
    },
    names::{PolicyKey, Str},
};

use crate::{
    crd::{
        AuthorizationAction, AuthorizationPolicySpec, AuthorizationRule, Operation, PeerSource,
        Texts,
    },
    object::{Meta, Policy, Sourced},
    translate::{
        l7::{Outcome, keyed, target::Aim},
        policy::{is_dry_run, parse_block},
    },
};

/// Which way a value without meaning is left out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// A match lets in.
    Allow,
    /// A match refuses, or asks, or is told.
    Others,
}

/// A rule that could never match as it was meant.
struct Never;

/// Translates one policy; `providers` are the names of external authorizers that there are.
pub fn translate(
    policy: &Sourced<Policy>,
    aim: &Aim,
    is_provider: impl Fn(&str) -> bool,
) -> Outcome {
    let Policy { meta, spec } = &policy.object;
    let mut remarks = Vec::new();
    let (action, rules, faults) = if policy.faults.is_empty() {
        let (rules, faults) = rules(meta, spec);
        (action(spec), rules, faults)
    } else {
        let refusal = vec![PolicyRule::default()];
        let faults = policy.faults.iter().map(|fault| fault.as_str().into());
        (refusing(spec.action), refusal, faults.collect())
    };
    if !policy.faults.is_empty() {
        let problems = policy.faults.join("; ");
        let harmless = spec.action == AuthorizationAction::Audit || is_dry_run(meta);
        let what = if harmless { "told" } else { "refused" };
        remarks.push(format!("everything is {what}, because of: {problems}"));
    } else if !faults.is_empty() {
        remarks.push(format!(
            "more is refused than asked, because of: {}",
            faults.join("; ")
        ));
    }
    let dry_run = is_dry_run(meta);
    remarks.extend(remark(spec, dry_run, is_provider));
    let resource = |(waypoint, targets): (&_, &Vec<_>)| {
        let policy = RequestPolicy {
            key: PolicyKey {
                namespace: meta.name.namespace.clone(),
                name: meta.name.name.clone(),
            },
            targets: targets.clone(),
            action: action.clone(),
            dry_run,
            rules: rules.clone(),
            faults: faults.clone(),
        };
        keyed(waypoint, Resource::Policy(policy))
    };
    Outcome {
        resources: aim.waypoints.iter().map(resource).collect(),
        condition: aim.condition(&remarks),
    }
}

fn action(spec: &AuthorizationPolicySpec) -> PolicyAction {
    match spec.action {
        AuthorizationAction::Allow => PolicyAction::Allow,
        AuthorizationAction::Deny => PolicyAction::Deny,
        AuthorizationAction::Audit => PolicyAction::Audit,
        AuthorizationAction::Custom => {
            let name = spec
                .provider
                .as_ref()
                .map(|provider| provider.name.as_str());
            PolicyAction::Custom(name.unwrap_or_default().into())
        }
    }
}

/// The action of a policy that could not be read. What never refuses anything does not begin to.
fn refusing(action: AuthorizationAction) -> PolicyAction {
    match action {
        AuthorizationAction::Audit => PolicyAction::Audit,
        _ => PolicyAction::Deny,
    }
}

/// What a user should know of a policy that is enforced.
fn remark(
    spec: &AuthorizationPolicySpec,
    dry_run: bool,
    is_provider: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut remarks = Vec::new();
    if dry_run {
        remarks.push("dry run: told, not enforced".to_owned());
    }
    let no_rules = spec.rules.is_empty();
    match spec.action {
        AuthorizationAction::Custom => {
            let provider = spec.provider.as_ref().map(|it| it.name.as_str());
            let name = provider.unwrap_or_default();
            if !is_provider(name) {
                let effect = if dry_run { "would be" } else { "is" };
                remarks.push(format!("what matches {effect} refused: meshConfig.extensionProviders has no external authorizer {name:?}"));
            }
        }
        AuthorizationAction::Allow if no_rules => {
            remarks.push("has no rules: nothing is allowed by it".to_owned());
        }
        AuthorizationAction::Audit => {
            remarks.push("matches are told, nothing is refused".to_owned())
        }
        _ => {}
    }
    remarks
}

fn rules(meta: &Meta, spec: &AuthorizationPolicySpec) -> (Vec<PolicyRule>, Vec<Str>) {
    let reading = match spec.action {
        AuthorizationAction::Allow => Reading::Allow,
        _ => Reading::Others,
    };
    let mut faults = Vec::new();
    let mut rules = Vec::new();
    for (index, rule) in spec.rules.iter().enumerate() {
        let mut parts = Parts {
            namespace: &meta.name.namespace,
            path: format!("rules[{index}]"),
            reading,
            faults: &mut faults,
        };
        rules.extend(parts.rule(rule).ok());
    }
    (rules, faults.into_iter().map(Str::from).collect())
}

/// Reads the parts of one rule.
struct Parts<'a> {
    namespace: &'a Str,
    path: String,
    reading: Reading,
    faults: &'a mut Vec<String>,
}

impl Parts<'_> {
    fn rule(&mut self, rule: &AuthorizationRule) -> Result<PolicyRule, Never> {
        let (source, operation) = (PeerSource::default(), Operation::default());
        let from = rule.from.iter().flatten();
        let from: Vec<_> = from
            .map(|it| it.source.as_ref().unwrap_or(&source))
            .collect();
        let to = rule.to.iter().flatten();
        let to: Vec<_> = to
            .map(|it| it.operation.as_ref().unwrap_or(&operation))
            .collect();
        Ok(PolicyRule {
            from: self.any(&from, Self::source)?,
            to: self.any(&to, Self::operation)?,
            when: self.conditions(rule)?,
        })
    }

    /// Alternatives, without those that can never match.
    fn any<T, U>(
        &mut self,
        items: &[&T],
        read: impl Fn(&mut Self, &T) -> Result<U, Never>,
    ) -> Result<Vec<U>, Never> {
        let read: Vec<U> = items
            .iter()
            .filter_map(|item| read(self, item).ok())
            .collect();
        match read.is_empty() && !items.is_empty() {
            true => Err(Never),
            false => Ok(read),
        }
    }

    fn source(&mut self, it: &PeerSource) -> Result<SourceMatch, Never> {
        let namespace = self.namespace.clone();
        let account = move |text: &str| Some(account(&namespace, text));
        Ok(SourceMatch {
            principals: self.either("principals", &it.principals, &it.not_principals, principal)?,
            request_principals: self.either(
                "requestPrincipals",
                &it.request_principals,
                &it.not_request_principals,
                value,
            )?,
            namespaces: self.either("namespaces", &it.namespaces, &it.not_namespaces, value)?,
            service_accounts: self.either(
                "serviceAccounts",
                &it.service_accounts,
                &it.not_service_accounts,
                account,
            )?,
            trust_domains: self.either(
                "trustDomains",
                &it.trust_domains,
                &it.not_trust_domains,
                value,
            )?,
            ip_blocks: self.either("ipBlocks", &it.ip_blocks, &it.not_ip_blocks, parse_block)?,
            remote_ip_blocks: self.either(
                "remoteIpBlocks",
                &it.remote_ip_blocks,
                &it.not_remote_ip_blocks,
                parse_block,
            )?,
        })
    }

    fn operation(&mut self, it: &Operation) -> Result<OperationMatch, Never> {
        let method = |text: &str| value(&text.to_ascii_uppercase());
        let port = |text: &str| text.parse().ok();
        Ok(OperationMatch {
            hosts: self.either("hosts", &it.hosts, &it.not_hosts, value)?,
            ports: self.either("ports", &it.ports, &it.not_ports, port)?,
            methods: self.either("methods", &it.methods, &it.not_methods, method)?,
            paths: self.either("paths", &it.paths, &it.not_paths, path)?,
        })
    }

    fn conditions(&mut self, rule: &AuthorizationRule) -> Result<Vec<When>, Never> {
        let mut conditions = Vec::new();
        for when in rule.when.iter().flatten() {
            let Some(key) = key(&when.key) else {
                self.faults.push(format!(
                    "{}.when: {:?} is no attribute of a waypoint",
                    self.path, when.key
                ));
                match self.reading {
                    Reading::Allow => return Err(Never),
                    Reading::Others => continue,
                }
            };
            let namespace = self.namespace.clone();
            let read = |text: &str| value_of(&key, &namespace, text);
            let field = format!("when[{}]", when.key);
            let values = self.either(&field, &when.values, &when.not_values, read)?;
            conditions.push(When { key, values });
        }
        Ok(conditions)
    }

    /// Reads values and their negation. In ALLOW a bad value is an alternative less, and a bad exception, or no
    /// alternative at all, leaves nothing to match; elsewhere a list with a bad value is no condition at all.
    fn either<T>(
        &mut self,
        field: &str,
        values: &Texts,
        not_values: &Texts,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Either<T>, Never> {
        let (mut kept, bad) = self.values(field, values, &read);
        let (not_kept, not_bad) = self.values(&format!("not {field}"), not_values, &read);
        match self.reading {
            Reading::Allow if not_bad || (bad && kept.is_empty()) => return Err(Never),
            Reading::Others if bad => kept.clear(),
            _ => {}
        }
        Ok(Either {
            values: kept,
            not_values: not_kept,
        })
    }

    fn values<T>(
        &mut self,
        field: &str,
        texts: &Texts,
        read: impl Fn(&str) -> Option<T>,
    ) -> (Vec<T>, bool) {
        let mut kept = Vec::new();
        let mut bad = false;
        for text in texts.iter().flatten() {
            match read(text) {
                Some(value) => kept.push(value),
                None => {
                    bad = true;
                    self.faults
                        .push(format!("{}.{field}: {text:?} means nothing", self.path));
                }
            }
        }
        (kept, bad)
    }
}

/// `*`, `*ending`, `start*`, or the whole.
#[allow(clippy::unnecessary_wraps, reason = "one of several readers of values")]
fn value(text: &str) -> Option<ValueMatch> {
    Some(match (text.strip_prefix('*'), text.strip_suffix('*')) {
        (Some(""), _) => ValueMatch::Present,
        (Some(ending), _) => ValueMatch::Suffix(ending.into()),
        (None, Some(start)) => ValueMatch::Prefix(start.into()),
        (None, None) => ValueMatch::Exact(text.into()),
    })
}

/// Principals are compared without their scheme.
fn principal(text: &str) -> Option<ValueMatch> {
    value(text.strip_prefix("spiffe://").unwrap_or(text))
}

/// `namespace/account`, or an account of the policy's own namespace.
fn account(namespace: &Str, text: &str) -> (Str, Str) {
    match text.split_once('/') {
        Some((namespace, account)) => (namespace.into(), account.into()),
        None => (namespace.clone(), text.into()),
    }
}

fn path(text: &str) -> Option<PathTemplate> {
    if !text.contains(['{', '}']) {
        return value(text).map(PathTemplate::Value);
    }
    let parts = text.strip_prefix('/')?.split('/').map(|part| match part {
        "{*}" => Some(TemplatePart::One),
        "{**}" => Some(TemplatePart::Any),
        plain if plain.contains(['{', '}', '*']) => None,
        plain => Some(TemplatePart::Literal(plain.into())),
    });
    parts.collect::<Option<_>>().map(PathTemplate::Template)
}

fn key(text: &str) -> Option<ConditionKey> {
    Some(match text {
        "source.ip" => ConditionKey::SourceIp,
        "remote.ip" => ConditionKey::RemoteIp,
        "source.namespace" => ConditionKey::SourceNamespace,
        "source.principal" => ConditionKey::SourcePrincipal,
        "source.serviceAccount" => ConditionKey::SourceServiceAccount,
        "source.trustDomain" => ConditionKey::SourceTrustDomain,
        "request.auth.principal" => ConditionKey::RequestPrincipal,
        "request.auth.audiences" => ConditionKey::Audiences,
        "request.auth.presenter" => ConditionKey::Presenter,
        "destination.ip" => ConditionKey::DestinationIp,
        "destination.port" => ConditionKey::DestinationPort,
        "connection.sni" => ConditionKey::Sni,
        _ => return indexed(text),
    })
}

/// `request.headers[name]`, `request.auth.claims[a][b]`.
fn indexed(text: &str) -> Option<ConditionKey> {
    if let Some(inner) = text.strip_prefix("request.headers[") {
        let name = inner.strip_suffix(']')?;
        return name.parse().ok().map(ConditionKey::Header);
    }
    let inner = text
        .strip_prefix("request.auth.claims[")?
        .strip_suffix(']')?;
    let names: Vec<Str> = inner.split("][").map(Str::from).collect();
    let named = names.iter().all(|name| !name.is_empty());
    named.then_some(ConditionKey::Claim(names))
}

fn value_of(key: &ConditionKey, namespace: &Str, text: &str) -> Option<ValueMatch> {
    match key {
        ConditionKey::SourceIp | ConditionKey::RemoteIp | ConditionKey::DestinationIp => {
            parse_block(text).map(ValueMatch::Cidr)
        }
        ConditionKey::DestinationPort => text.parse().ok().map(ValueMatch::Port),
        ConditionKey::SourcePrincipal => principal(text),
        ConditionKey::SourceServiceAccount => {
            let (namespace, account) = account(namespace, text);
            Some(ValueMatch::Exact(format!("{namespace}/{account}").into()))
        }
        _ => value(text),
    }
}
