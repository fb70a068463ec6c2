//! Authentication of requests by JWT (Istio RequestAuthentication): the model.

use std::time::Duration;

use http::HeaderName;

use super::name::Target;
use crate::names::{PolicyKey, Str};

/// One policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestAuthentication {
    /// Key.
    pub key: PolicyKey,
    /// At least one.
    pub targets: Vec<Target>,
    /// Of all policies of a target together.
    pub rules: Vec<JwtRule>,
}

impl RequestAuthentication {
    /// Takes over keys of an earlier state of the policy for rules whose own have not been fetched (yet): a control
    /// plane that begins anew while the server of the keys is down knows none, and that revokes nothing.
    ///
    /// Only what was fetched from the very same place is taken over. A rule that is to have no keys names no place.
    pub fn keep_keys(&mut self, last: &Self) {
        for rule in &mut self.rules {
            if let Some(keys) = rule.kept(&last.rules) {
                rule.keys = keys.clone();
            }
        }
    }
}

impl JwtRule {
    fn kept<'a>(&self, last: &'a [Self]) -> Option<&'a Jwks> {
        let (Jwks::Unavailable(_), Some(from)) = (&self.keys, &self.keys_from) else {
            return None;
        };
        let fetched =
            |it: &&Self| it.keys_from.as_ref() == Some(from) && matches!(it.keys, Jwks::Keys(_));
        last.iter().find(fetched).map(|it| &it.keys)
    }
}

/// How tokens of one issuer are verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtRule {
    /// `iss`, exactly.
    pub issuer: Str,
    /// Any of these in `aud`; empty: any.
    pub audiences: Vec<Str>,
    /// The keys.
    pub keys: Jwks,
    /// Where the control plane fetches them; `None`: nowhere.
    pub keys_from: Option<Str>,
    /// Where tokens are looked for, in order; empty: `Authorization: Bearer`, then query `access_token`.
    pub from: Vec<TokenPlace>,
    /// Gets the payload in base64url.
    pub payload_header: Option<HeaderName>,
    /// Get claims (path of names) as text.
    pub claim_headers: Vec<(HeaderName, Vec<Str>)>,
    /// Whether the token is forwarded.
    pub forward_token: bool,
    /// Claims whose text is a list with spaces, beside `scope` and `permission`.
    pub space_delimited_claims: Vec<Str>,
    /// Of a fetch of keys.
    pub timeout: Duration,
}

/// Keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Jwks {
    /// A JWK set: the rule's own, or the last that the control plane has fetched.
    Keys(Str),
    /// None were fetched yet, or none can be: every token of the issuer is refused, unless there were keys before
    /// ([`RequestAuthentication::keep_keys`]). The text is for the log.
    Unavailable(Str),
}

/// Where a token is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TokenPlace {
    /// In a header, after a prefix.
    Header {
        /// Name.
        name: HeaderName,
        /// For example `Bearer `; may be empty.
        prefix: Str,
    },
    /// In a query parameter.
    Query(Str),
    /// In a cookie.
    Cookie(Str),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(from: Option<&str>, keys: Jwks) -> JwtRule {
        JwtRule {
            issuer: "https://issuer".into(),
            audiences: Vec::new(),
            keys,
            keys_from: from.map(Into::into),
            from: Vec::new(),
            payload_header: None,
            claim_headers: Vec::new(),
            forward_token: false,
            space_delimited_claims: Vec::new(),
            timeout: Duration::from_secs(5),
        }
    }

    fn none() -> Jwks {
        Jwks::Unavailable("not fetched yet".into())
    }

    fn keys(text: &str) -> Jwks {
        Jwks::Keys(text.into())
    }

    /// The keys of `new` after `last`.
    fn after(last: Vec<JwtRule>, new: Vec<JwtRule>) -> Vec<Jwks> {
        let policy = |rules| RequestAuthentication {
            key: "a/jwt".parse().unwrap(),
            targets: vec![Target::Waypoint],
            rules,
        };
        let mut new = policy(new);
        new.keep_keys(&policy(last));
        new.rules.into_iter().map(|rule| rule.keys).collect()
    }

    #[test]
    fn keys_that_were_not_fetched_again_are_kept_rule_by_rule() {
        let last = vec![rule(Some("a"), keys("1")), rule(Some("b"), keys("2"))];
        let new = ["b", "c", "a"].map(|from| rule(Some(from), none()));
        assert_eq!(after(last, new.into()), [keys("2"), none(), keys("1")]);
    }

    #[test]
    fn fetched_keys_replace_earlier_ones_also_where_there_are_none_in_them() {
        let last = || vec![rule(Some("a"), keys("1"))];
        for new in ["2", r#"{"keys": []}"#] {
            assert_eq!(after(last(), vec![rule(Some("a"), keys(new))]), [keys(new)]);
        }
    }

    #[test]
    fn no_keys_are_kept_that_came_from_elsewhere_or_were_written_in_the_rule() {
        for last in [Some("https://other"), None] {
            let last = vec![rule(last, keys("1"))];
            assert_eq!(after(last, vec![rule(Some("a"), none())]), [none()]);
        }
    }

    #[test]
    fn a_rule_that_is_to_have_no_keys_keeps_none() {
        for last in [Some("a"), None] {
            let last = vec![rule(last, keys("1"))];
            assert_eq!(after(last, vec![rule(None, none())]), [none()]);
        }
    }
}
