//! RequestAuthentication with targets to what waypoints verify.
//!
//! Keys are the rule's own, or the last that were fetched. Where none were fetched yet, waypoints go on with the last
//! that they were told from the same place, and refuse every token of the issuer where there are none; as they do where
//! the object could not be read.

use std::{fmt, time::Duration};

use mesh::{
    l7::{
        request_authentication::{Jwks, JwtRule, RequestAuthentication, TokenPlace},
        view::Resource,
    },
    names::{PolicyKey, Str},
};
use serde_json::Value;

use super::read::{duration, header};
use crate::{
    crd::istio::{self as crd, RequestAuthenticationSpec},
    object::{RequestAuthentication as Policy, Sourced},
    translate::l7::{Outcome, keyed, target::Aim},
    validate::Findings,
};

/// Of a fetch of keys.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What waypoints do meanwhile.
const NO_KEYS: &str =
    "waypoints go on with the last that they were told, and refuse its tokens where there are none";

/// Where keys are fetched. Its text stands after "keys", and is the place by which waypoints know them again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeySource {
    /// From this URL.
    Url(Str),
    /// From the URL that the issuer's OpenID configuration names.
    Issuer(Str),
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => write!(f, "from {url}"),
            Self::Issuer(issuer) => write!(f, "of issuer {issuer}"),
        }
    }
}

/// What came of fetching keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The last set of keys that was fetched.
    pub keys: Option<Str>,
    /// Why the last try failed; `None`: it did not.
    pub failure: Option<Str>,
}

/// The sources that a policy's keys are fetched from.
pub fn sources(spec: &RequestAuthenticationSpec) -> Vec<KeySource> {
    spec.jwt_rules.iter().filter_map(source).collect()
}

fn source(rule: &crd::JwtRule) -> Option<KeySource> {
    match rule {
        _ if !rule.jwks.is_empty() => None,
        _ if !rule.jwks_uri.is_empty() => Some(KeySource::Url(rule.jwks_uri.as_str().into())),
        _ if !rule.issuer.is_empty() => Some(KeySource::Issuer(rule.issuer.as_str().into())),
        _ => None,
    }
}

/// Translates one policy; `fetched`: what came of fetching from a source, if it was tried.
pub fn translate(
    policy: &Sourced<Policy>,
    aim: &Aim,
    fetched: impl Fn(&KeySource) -> Option<Fetched>,
) -> Outcome {
    let Policy { meta, spec } = &policy.object;
    let mut remarks = Vec::new();
    let mut rules = rules(spec, &mut Findings::default());
    for (rule, written) in rules.iter_mut().zip(&spec.jwt_rules) {
        let Some(source) = source(written) else {
            continue;
        };
        let (keys, remark) = keys(&source, fetched(&source));
        rule.keys = keys;
        rule.keys_from = Some(source.to_string().into());
        remarks.extend(remark);
    }
    if !policy.faults.is_empty() {
        let problems = policy.faults.join("; ");
        for rule in &mut rules {
            rule.keys = Jwks::Unavailable(problems.as_str().into());
            rule.keys_from = None;
        }
        remarks.push(format!(
            "every token of its issuers is refused, because of: {problems}"
        ));
    }
    let resource = |(waypoint, targets): (&_, &Vec<_>)| {
        let policy = RequestAuthentication {
            key: PolicyKey {
                namespace: meta.name.namespace.clone(),
                name: meta.name.name.clone(),
            },
            targets: targets.clone(),
            rules: rules.clone(),
        };
        keyed(waypoint, Resource::Authentication(policy))
    };
    Outcome {
        resources: aim.waypoints.iter().map(resource).collect(),
        condition: aim.condition(&remarks),
    }
}

fn keys(source: &KeySource, fetched: Option<Fetched>) -> (Jwks, Option<String>) {
    match fetched {
        Some(Fetched {
            keys: Some(keys),
            failure: None,
        }) => (Jwks::Keys(keys), None),
        Some(Fetched {
            keys: Some(keys),
            failure: Some(failure),
        }) => {
            let remark = format!("the last good keys {source} stay in force: {failure}");
            (Jwks::Keys(keys), Some(remark))
        }
        Some(Fetched {
            keys: None,
            failure,
        }) => {
            let failure = failure.as_deref().unwrap_or("not fetched yet");
            let remark = format!("no keys {source}: {failure}; {NO_KEYS}");
            (Jwks::Unavailable(failure.into()), Some(remark))
        }
        None => {
            let remark = format!("no keys {source} yet; {NO_KEYS}");
            (Jwks::Unavailable("not fetched yet".into()), Some(remark))
        }
    }
}

/// The rules as written, keys that are to be fetched left out. Also what admission checks.
pub fn rules(spec: &RequestAuthenticationSpec, found: &mut Findings) -> Vec<JwtRule> {
    let numbered = spec.jwt_rules.iter().enumerate();
    numbered
        .map(|(index, rule)| jwt_rule(rule, &format!("spec.jwtRules[{index}]"), found))
        .collect()
}

fn jwt_rule(rule: &crd::JwtRule, path: &str, found: &mut Findings) -> JwtRule {
    if rule.issuer.is_empty() && rule.jwks_uri.is_empty() {
        found.error(path, "needs issuer or jwksUri");
    }
    if !rule.jwks.is_empty() && !rule.jwks_uri.is_empty() {
        found.error(path, "only one of jwks and jwksUri may be set");
    }
    url(&rule.jwks_uri, &format!("{path}.jwksUri"), found);
    key_set(&rule.jwks, &format!("{path}.jwks"), found);
    let lists = [
        ("audiences", &rule.audiences),
        ("fromParams", &rule.from_params),
        ("fromCookies", &rule.from_cookies),
        ("spaceDelimitedClaims", &rule.space_delimited_claims),
    ];
    for (field, texts) in lists {
        for (index, _) in texts.iter().enumerate().filter(|(_, text)| text.is_empty()) {
            found.error(format!("{path}.{field}[{index}]"), "is empty");
        }
    }
    let payload = &rule.output_payload_to_header;
    let payload_path = format!("{path}.outputPayloadToHeader");
    JwtRule {
        issuer: rule.issuer.as_str().into(),
        audiences: texts(&rule.audiences),
        keys: match rule.jwks.is_empty() {
            true => Jwks::Unavailable("not fetched yet".into()),
            false => Jwks::Keys(rule.jwks.as_str().into()),
        },
        keys_from: None,
        from: places(rule, path, found),
        payload_header: match payload.is_empty() {
            true => None,
            false => header(payload, &payload_path, found),
        },
        claim_headers: claim_headers(rule, path, found),
        forward_token: rule.forward_original_token,
        space_delimited_claims: texts(&rule.space_delimited_claims),
        timeout: duration(rule.timeout.as_ref(), &format!("{path}.timeout"), found)
            .unwrap_or(TIMEOUT),
    }
}

fn texts(texts: &[String]) -> Vec<Str> {
    texts.iter().map(|text| text.as_str().into()).collect()
}

fn places(rule: &crd::JwtRule, path: &str, found: &mut Findings) -> Vec<TokenPlace> {
    let mut places = Vec::new();
    for (index, from) in rule.from_headers.iter().enumerate() {
        let name = header(
            &from.name,
            &format!("{path}.fromHeaders[{index}].name"),
            found,
        );
        let prefix = Str::from(from.prefix.as_str());
        places.extend(name.map(|name| TokenPlace::Header { name, prefix }));
    }
    places.extend(texts(&rule.from_params).into_iter().map(TokenPlace::Query));
    places.extend(
        texts(&rule.from_cookies)
            .into_iter()
            .map(TokenPlace::Cookie),
    );
    places
}

fn claim_headers(
    rule: &crd::JwtRule,
    path: &str,
    found: &mut Findings,
) -> Vec<(http::HeaderName, Vec<Str>)> {
    let mut headers = Vec::new();
    for (index, output) in rule.output_claim_to_headers.iter().enumerate() {
        let path = format!("{path}.outputClaimToHeaders[{index}]");
        if output.claim.is_empty() {
            found.error(format!("{path}.claim"), "is missing");
        }
        let name = header(&output.header, &format!("{path}.header"), found);
        let claim = output.claim.split('.').map(Str::from).collect();
        headers.extend(name.map(|name| (name, claim)));
    }
    headers
}

fn url(text: &str, path: &str, found: &mut Findings) {
    let uri: Option<http::Uri> = text.parse().ok();
    let well = uri.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()
    });
    if !text.is_empty() && !well {
        found.error(path, format!("{text:?} is no http or https URL"));
    }
}

/// A JSON Web Key Set (RFC 7517), written inline.
fn key_set(text: &str, path: &str, found: &mut Findings) {
    if text.is_empty() {
        return;
    }
    let set: Value = match serde_json::from_str(text) {
        Ok(set) => set,
        Err(error) => return found.error(path, format!("is no JSON: {error}")),
    };
    let Some(keys) = set["keys"].as_array() else {
        return found.error(path, "is no key set: it has no list of keys");
    };
    for (index, key) in keys.iter().enumerate() {
        let path = format!("{path}.keys[{index}]");
        if key["kty"].as_str().is_none_or(str::is_empty) {
            found.error(&path, "has no kty");
        }
        // RFC 7518 6: `d` of RSA and EC, `k` of a shared key.
        if !key["d"].is_null() || !key["k"].is_null() {
            found.warning(
                &path,
                "holds a private key, which everybody can read who can read this object",
            );
        }
    }
}
