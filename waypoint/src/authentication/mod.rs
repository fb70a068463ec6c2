//! Authentication of requests by tokens (Istio RequestAuthentication): a phase of each request before authorization.
//!
//! A request without a token passes as nobody's. One with a token that no rule accepts is refused: it never passes as
//! nobody's. What goes on to the backend in headers that rules write has been written here, never by the client.

mod keys;
mod place;
mod token;

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts};
use mesh::{
    l7::{
        request::Claims,
        request_authentication::{Jwks, JwtRule, RequestAuthentication, TokenPlace},
    },
    names::Str,
};
use parking_lot::RwLock;
use serde_json::{Map, Value};

use keys::Key;
pub(crate) use token::InvalidToken;
use token::Unverified;

/// Tokens that are looked at in one request: each may cost several verifications.
const MAX_TOKENS: usize = 4;

/// Verifies tokens. Keys of a policy are read once, and kept as long as the policy is.
#[derive(Debug, Default)]
pub(crate) struct Authentication {
    /// By the policy's address, which is its own as long as the policy is held here.
    sets: RwLock<HashMap<usize, Arc<Compiled>>>,
}

#[derive(Debug)]
struct Compiled {
    policy: Arc<RequestAuthentication>,
    /// Of each rule; none: there are no keys.
    keys: Vec<Option<Vec<Key>>>,
}

/// What became of a request's tokens.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// There were none.
    Anonymous,
    /// What the first one says.
    Verified(Box<Claims>),
    /// One is not accepted.
    Refused(Refusal),
}

/// The answer to a request with a token that is not accepted.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// 401, or 403 where only the audience is wrong.
    pub(crate) status: StatusCode,
    /// `www-authenticate`.
    pub(crate) challenge: HeaderValue,
    /// Why; its text is the body.
    pub(crate) reason: InvalidToken,
}

impl Refusal {
    /// `response_code_details`, in Envoy's form.
    pub(crate) fn details(&self) -> String {
        let reason = self.reason.to_string();
        format!("jwt_authn_access_denied{{{}}}", reason.replace(' ', "_"))
    }
}

/// A token that a rule accepts.
struct Accepted<'a> {
    rule: &'a JwtRule,
    place: &'a TokenPlace,
    payload: String,
    raw: Map<String, Value>,
}

impl Authentication {
    /// Looks at a request's tokens by the policies of its service; `authority`: what the client asked. Removes what clients must
    /// not forge, and tokens that are not forwarded; writes the headers that rules ask for.
    pub(crate) fn check<'a>(
        &self,
        policies: impl Iterator<Item = &'a Arc<RequestAuthentication>>,
        parts: &mut Parts,
        authority: &str,
        now: SystemTime,
    ) -> Verdict {
        let policies: Vec<_> = policies.map(|policy| self.compiled(policy)).collect();
        let rules: Vec<_> = policies.iter().flat_map(|it| it.rules()).collect();
        for (rule, _) in &rules {
            remove_forgeries(rule, &mut parts.headers);
        }
        if rules.is_empty() || is_preflight(parts) {
            return Verdict::Anonymous;
        }
        match accept(&rules, parts, now) {
            Ok(accepted) => apply(&accepted, parts),
            Err(reason) => Verdict::Refused(refusal(reason, authority, parts)),
        }
    }

    fn compiled(&self, policy: &Arc<RequestAuthentication>) -> Arc<Compiled> {
        let address = Arc::as_ptr(policy) as usize;
        if let Some(found) = self.sets.read().get(&address) {
            return Arc::clone(found);
        }
        let new = Arc::new(Compiled::new(Arc::clone(policy)));
        let mut sets = self.sets.write();
        // What only this table still holds was replaced or removed.
        sets.retain(|_, it| Arc::strong_count(&it.policy) > 1);
        sets.insert(address, Arc::clone(&new));
        new
    }
}

impl Compiled {
    fn new(policy: Arc<RequestAuthentication>) -> Self {
        let keys = policy.rules.iter().map(|rule| match &rule.keys {
            Jwks::Keys(text) => keys::parse(text),
            Jwks::Unavailable(_) => None,
        });
        Self {
            keys: keys.collect(),
            policy,
        }
    }

    fn rules(&self) -> impl Iterator<Item = (&JwtRule, Option<&[Key]>)> {
        let keys = self.keys.iter().map(Option::as_deref);
        self.policy.rules.iter().zip(keys)
    }
}

fn remove_forgeries(rule: &JwtRule, headers: &mut HeaderMap) {
    let claims = rule.claim_headers.iter().map(|(name, _)| name);
    for name in rule.payload_header.iter().chain(claims) {
        headers.remove(name);
    }
}

/// A CORS preflight carries no credentials (Fetch, "CORS-preflight request").
fn is_preflight(parts: &Parts) -> bool {
    let has = |name| parts.headers.contains_key(name);
    parts.method == Method::OPTIONS
        && has(header::ORIGIN)
        && has(header::ACCESS_CONTROL_REQUEST_METHOD)
}

type Rule<'a> = (&'a JwtRule, Option<&'a [Key]>);

/// The tokens of a request, each with the rule that accepts it; in the order of rules.
fn accept<'a>(
    rules: &[Rule<'a>],
    parts: &Parts,
    now: SystemTime,
) -> Result<Vec<Accepted<'a>>, InvalidToken> {
    let mut places: Vec<&TokenPlace> = Vec::new();
    for place in rules.iter().flat_map(|(rule, _)| place::of(rule)) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let mut tokens: Vec<(&TokenPlace, String)> = Vec::new();
    for place in places {
        let found = place::find(place, parts);
        tokens.extend(found.into_iter().map(|token| (place, token)));
    }
    if tokens.len() > MAX_TOKENS {
        return Err(InvalidToken::TooMany);
    }
    let mut accepted = Vec::with_capacity(tokens.len());
    for (place, text) in &tokens {
        accepted.push(verify(rules, place, text, now)?);
    }
    Ok(accepted)
}

/// By the first rule that looks there, has its issuer, and finds it valid; else why the first one does not.
fn verify<'a>(
    rules: &[Rule<'a>],
    found_at: &TokenPlace,
    text: &str,
    now: SystemTime,
) -> Result<Accepted<'a>, InvalidToken> {
    let token = Unverified::parse(text)?;
    let mut reason = None;
    for (rule, keys) in rules {
        let place = place::of(rule).iter().find(|place| *place == found_at);
        let (Some(place), true) = (place, token.issuer() == Some(&rule.issuer)) else {
            continue;
        };
        match verify_by(rule, *keys, &token, now) {
            Ok(()) => {
                return Ok(Accepted {
                    rule,
                    place,
                    payload: token.payload.to_owned(),
                    raw: token.claims,
                });
            }
            Err(error) => reason = reason.or(Some(error)),
        }
    }
    Err(reason.unwrap_or(InvalidToken::Issuer))
}

fn verify_by(
    rule: &JwtRule,
    keys: Option<&[Key]>,
    token: &Unverified<'_>,
    now: SystemTime,
) -> Result<(), InvalidToken> {
    token.check_times(now)?;
    let audiences = token.audiences();
    let wanted = |audience: &Str| audiences.contains(&&**audience);
    if !rule.audiences.is_empty() && !rule.audiences.iter().any(wanted) {
        return Err(InvalidToken::Audience);
    }
    token.check_signature(keys.ok_or(InvalidToken::KeysUnavailable)?)
}

fn apply(accepted: &[Accepted<'_>], parts: &mut Parts) -> Verdict {
    for token in accepted {
        if !token.rule.forward_token {
            place::remove(token.place, parts);
        }
        write_headers(token, &mut parts.headers);
    }
    match accepted.first() {
        None => Verdict::Anonymous,
        Some(first) => Verdict::Verified(Box::new(claims(first))),
    }
}

fn write_headers(token: &Accepted<'_>, headers: &mut HeaderMap) {
    let mut write = |name: &http::HeaderName, text: &str| {
        if let Ok(value) = HeaderValue::from_str(text) {
            headers.insert(name, value);
        }
    };
    if let Some(name) = &token.rule.payload_header {
        write(name, &token.payload);
    }
    for (name, path) in &token.rule.claim_headers {
        let Some((first, rest)) = path.split_first() else {
            continue;
        };
        let found = token.raw.get(&**first);
        let found = rest.iter().fold(found, |value, name| value?.get(&**name));
        match found {
            Some(Value::String(text)) => write(name, text),
            Some(value @ (Value::Bool(_) | Value::Number(_))) => write(name, &value.to_string()),
            _ => {}
        }
    }
}

fn claims(token: &Accepted<'_>) -> Claims {
    let text = |name: &str| token.raw.get(name).and_then(Value::as_str);
    // Without a subject there is no principal (empty: none matches).
    let principal = text("sub").map(|subject| format!("{}/{subject}", token.rule.issuer));
    let audiences = match token.raw.get("aud") {
        Some(Value::String(one)) => vec![one.as_str().into()],
        Some(Value::Array(many)) => many
            .iter()
            .filter_map(|it| Some(it.as_str()?.into()))
            .collect(),
        _ => Vec::new(),
    };
    Claims {
        principal: principal.unwrap_or_default().into(),
        audiences,
        presenter: text("azp").map(Into::into),
        all: Value::Object(with_lists(token)),
    }
}

/// Claims that are lists with spaces between, as lists.
fn with_lists(token: &Accepted<'_>) -> Map<String, Value> {
    let mut all = token.raw.clone();
    let configured = token.rule.space_delimited_claims.iter().map(|it| &**it);
    for name in ["scope", "permission"].into_iter().chain(configured) {
        if let Some(value) = all.get_mut(name)
            && let Value::String(text) = value
        {
            *value = text.split_whitespace().map(Value::from).collect();
        }
    }
    all
}

fn refusal(reason: InvalidToken, authority: &str, parts: &Parts) -> Refusal {
    let status = match reason {
        InvalidToken::Audience => StatusCode::FORBIDDEN,
        _ => StatusCode::UNAUTHORIZED,
    };
    let realm = format!("http://{authority}{}", parts.uri.path());
    let realm: String = realm.chars().filter(|c| !matches!(c, '"' | '\\')).collect();
    let text = format!("Bearer realm=\"{realm}\", error=\"invalid_token\"");
    let fallback = || HeaderValue::from_static("Bearer error=\"invalid_token\"");
    Refusal {
        status,
        challenge: HeaderValue::try_from(text).unwrap_or_else(|_| fallback()),
        reason,
    }
}

#[cfg(test)]
mod tests;
