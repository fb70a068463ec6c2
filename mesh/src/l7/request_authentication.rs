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

/// How tokens of one issuer are verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtRule {
    /// `iss`, exactly.
    pub issuer: Str,
    /// Any of these in `aud`; empty: any.
    pub audiences: Vec<Str>,
    /// The keys.
    pub keys: Jwks,
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
    /// None were ever fetched: every token of the issuer is refused. The text is for the log.
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
