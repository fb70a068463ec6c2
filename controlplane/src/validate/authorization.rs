//! AuthorizationPolicy.

use super::{Findings, selection};
use crate::{
    crd::{
        AuthorizationAction, AuthorizationPolicySpec, AuthorizationRule, From, Operation,
        PeerSource, Texts, To, When,
    },
    translate::policy::parse_block,
};

/// The attributes that `when` knows.
const WHEN_KEYS: [&str; 14] = [
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.serviceAccount",
    "source.principal",
    "source.trustDomain",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "request.headers",
    "request.auth.claims",
];

/// A field's name and its values.
type Field<'s> = (&'static str, &'s Texts);

pub(super) fn validate(spec: &AuthorizationPolicySpec, found: &mut Findings) {
    selection(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
        found,
    );
    let provider = spec
        .provider
        .as_ref()
        .map(|provider| provider.name.as_str());
    match spec.action {
        AuthorizationAction::Custom => {
            if provider.is_none_or(str::is_empty) {
                found.error("spec.provider", "CUSTOM needs the name of a provider");
            }
            if spec.rules.is_empty() {
                found.error("spec", "CUSTOM needs rules");
            }
        }
        _ if provider.is_some() => found.error("spec.provider", "only CUSTOM has a provider"),
        AuthorizationAction::Deny if spec.rules.is_empty() => {
            found.error(
                "spec",
                "DENY without rules never matches; rules: [{}] matches everything",
            );
        }
        _ => {}
    }
    let for_ztunnel = spec.target_ref.is_none() && spec.target_refs.is_empty();
    for (index, checked) in spec.rules.iter().enumerate() {
        let path = format!("spec.rules[{index}]");
        rule(checked, &path, found);
        if spec.action == AuthorizationAction::Custom {
            custom(checked, &path, found);
        }
        if spec.action == AuthorizationAction::Deny && for_ztunnel && http_only(checked) {
            found.warning(
                &path,
                "has a part with only HTTP attributes, which node tunnels cannot judge: at L4 the rule matches by its other parts alone",
            );
        }
    }
}

fn rule(rule: &AuthorizationRule, path: &str, found: &mut Findings) {
    listed(&rule.from, &format!("{path}.from"), found, source);
    listed(&rule.to, &format!("{path}.to"), found, operation);
    listed(&rule.when, &format!("{path}.when"), found, when);
}

/// Checks each item of a list that must not be empty.
fn listed<T>(
    items: &Option<Vec<T>>,
    path: &str,
    found: &mut Findings,
    check: impl Fn(&T, &str, &mut Findings),
) {
    let Some(items) = items else {
        return;
    };
    if items.is_empty() {
        found.error(path, "is empty; leave it out to match everything");
    }
    for (index, item) in items.iter().enumerate() {
        check(item, &format!("{path}[{index}]"), found);
    }
}

fn source_fields(source: &PeerSource) -> [Field<'_>; 14] {
    [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ]
}

fn operation_fields(operation: &Operation) -> [Field<'_>; 8] {
    [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ]
}

fn source(from: &From, path: &str, found: &mut Findings) {
    let path = format!("{path}.source");
    let Some(source) = &from.source else {
        return found.error(path, "is missing");
    };
    let fields = source_fields(source);
    filled(&fields, &path, found);
    for (field, texts) in fields {
        let check: fn(&str) -> Option<String> = match field {
            "ipBlocks" | "notIpBlocks" | "remoteIpBlocks" | "notRemoteIpBlocks" => block,
            "serviceAccounts" | "notServiceAccounts" => account,
            "trustDomains" | "notTrustDomains" => trust_domain,
            _ => continue,
        };
        each(texts, &format!("{path}.{field}"), found, check);
    }
    accounts(source, &path, found);
}

/// Service accounts name a namespace already, and principals name both.
fn accounts(source: &PeerSource, path: &str, found: &mut Findings) {
    let set = |texts: &Texts| texts.is_some();
    let accounts = set(&source.service_accounts) || set(&source.not_service_accounts);
    let others = set(&source.principals)
        || set(&source.not_principals)
        || set(&source.namespaces)
        || set(&source.not_namespaces);
    if accounts && others {
        found.error(
            path,
            "serviceAccounts cannot be combined with principals or namespaces",
        );
    }
    for (field, texts) in [
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
    ] {
        if texts.as_ref().is_some_and(|texts| texts.len() > 16) {
            found.error(format!("{path}.{field}"), "more than 16 entries");
        }
    }
}

fn operation(to: &To, path: &str, found: &mut Findings) {
    let path = format!("{path}.operation");
    let Some(operation) = &to.operation else {
        return found.error(path, "is missing");
    };
    let fields = operation_fields(operation);
    filled(&fields, &path, found);
    for (field, texts) in fields {
        let check: fn(&str) -> Option<String> = match field {
            "ports" | "notPorts" => port,
            "paths" | "notPaths" => template,
            _ => continue,
        };
        each(texts, &format!("{path}.{field}"), found, check);
    }
}

fn when(when: &When, path: &str, found: &mut Findings) {
    let key = when.key.as_str();
    let base = key.split('[').next().unwrap_or_default();
    let indexed = matches!(base, "request.headers" | "request.auth.claims");
    let known = WHEN_KEYS.contains(&base) && indexed == (key.ends_with(']') && key.contains('['));
    if !known && !base.starts_with("experimental.envoy.filters.") {
        found.error(format!("{path}.key"), format!("{key:?} is no attribute"));
    }
    if when.values.is_none() && when.not_values.is_none() {
        found.error(path, "needs values or notValues");
    }
    for (field, texts) in [("values", &when.values), ("notValues", &when.not_values)] {
        let path = format!("{path}.{field}");
        no_empty_text(texts, &path, found);
        let check: fn(&str) -> Option<String> = match key {
            "source.ip" | "destination.ip" | "remote.ip" => block,
            "destination.port" => port,
            "source.serviceAccount" => account,
            "source.trustDomain" => trust_domain,
            _ => continue,
        };
        each(texts, &path, found, check);
    }
}

/// At least one field, none of them empty, no empty value in any.
fn filled(fields: &[Field<'_>], path: &str, found: &mut Findings) {
    if fields.iter().all(|(_, texts)| texts.is_none()) {
        found.error(path, "is empty");
    }
    for (field, texts) in fields {
        no_empty_text(texts, &format!("{path}.{field}"), found);
    }
}

fn no_empty_text(texts: &Texts, path: &str, found: &mut Findings) {
    listed(texts, path, found, |text, path, found| {
        if text.is_empty() {
            found.error(path, "is empty");
        }
    });
}

fn each(texts: &Texts, path: &str, found: &mut Findings, check: impl Fn(&str) -> Option<String>) {
    for (index, text) in texts.iter().flatten().enumerate() {
        if let Some(problem) = check(text) {
            found.error(format!("{path}[{index}]"), problem);
        }
    }
}

fn block(text: &str) -> Option<String> {
    parse_block(text)
        .is_none()
        .then(|| format!("{text:?} is no address or range"))
}

fn port(text: &str) -> Option<String> {
    text.parse::<u16>()
        .is_err()
        .then(|| format!("{text:?} is no port from 0 to 65535"))
}

fn account(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split('/').collect();
    let shaped = matches!(parts.len(), 1 | 2) && parts.iter().all(|part| !part.is_empty());
    let problem =
        || format!("{text:?} is not of the form account or namespace/account, without wildcards");
    (!shaped || text.contains('*') || text.len() > 320).then(problem)
}

fn trust_domain(text: &str) -> Option<String> {
    let inner = text.strip_prefix('*').unwrap_or(text);
    let inner = match inner.len() == text.len() {
        true => inner.strip_suffix('*').unwrap_or(inner),
        false => inner,
    };
    let problem = || format!("{text:?} is no trust domain, nor one with a wildcard at one end");
    (text.is_empty() || inner.contains(['*', '/'])).then(problem)
}

/// A path with `{*}` (one segment) and `{**}` (the rest, last).
fn template(text: &str) -> Option<String> {
    if !text.contains(['{', '}']) {
        return None;
    }
    let segments: Vec<&str> = text.split('/').collect();
    let last = segments.len() - 1;
    let well = |(index, segment): (usize, &&str)| match *segment {
        "{*}" => true,
        "{**}" => index == last,
        plain => !plain.contains(['{', '}', '*']),
    };
    let problem =
        || format!("{text:?}: a template has whole segments {{*}}, and {{**}} as its last");
    (!segments.iter().enumerate().all(well)).then(problem)
}

/// A CUSTOM rule goes to a provider before the peer's identity is judged.
fn custom(rule: &AuthorizationRule, path: &str, found: &mut Findings) {
    const FORBIDDEN: [&str; 10] = [
        "namespaces",
        "notNamespaces",
        "serviceAccounts",
        "notServiceAccounts",
        "trustDomains",
        "notTrustDomains",
        "principals",
        "notPrincipals",
        "requestPrincipals",
        "notRequestPrincipals",
    ];
    const FORBIDDEN_KEYS: [&str; 5] = [
        "source.namespace",
        "source.serviceAccount",
        "source.principal",
        "source.trustDomain",
        "request.auth.principal",
    ];
    for (index, from) in rule.from.iter().flatten().enumerate() {
        for (field, texts) in from.source.iter().flat_map(source_fields) {
            if texts.is_some() && FORBIDDEN.contains(&field) {
                found.error(
                    format!("{path}.from[{index}].source.{field}"),
                    "cannot be used with CUSTOM",
                );
            }
        }
    }
    for (index, when) in rule.when.iter().flatten().enumerate() {
        if FORBIDDEN_KEYS.contains(&when.key.as_str()) {
            found.error(
                format!("{path}.when[{index}].key"),
                format!("{:?} cannot be used with CUSTOM", when.key),
            );
        }
    }
}

/// Whether `to`, or `from` without `to`, has only HTTP attributes.
fn http_only(rule: &AuthorizationRule) -> bool {
    let is_http = |field: &str| !matches!(field, "ports" | "notPorts");
    let all_http = |operation: &Operation| {
        let mut set = operation_fields(operation)
            .into_iter()
            .filter(|(_, texts)| texts.is_some());
        set.all(|(field, _)| is_http(field))
    };
    let source_http = |source: &PeerSource| {
        let mut set = source_fields(source)
            .into_iter()
            .filter(|(_, texts)| texts.is_some());
        set.all(|(field, _)| {
            field.to_ascii_lowercase().contains("request") || field.contains("emoteIpBlocks")
        })
    };
    match (&rule.to, &rule.from) {
        (Some(to), _) => to
            .iter()
            .filter_map(|to| to.operation.as_ref())
            .any(all_http),
        (None, Some(from)) => from
            .iter()
            .filter_map(|from| from.source.as_ref())
            .any(source_http),
        (None, None) => false,
    }
}
