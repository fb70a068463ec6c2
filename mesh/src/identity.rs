//! Who a workload is: SPIFFE identities and the trust domain that vouches for them.

use std::{fmt, str::FromStr};

use crate::names::{Str, Texts, serde_as_text};

/// A root of trust, the authority part of a SPIFFE ID (SPIFFE-ID 2.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Str);

/// A SPIFFE ID of the form `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The root of trust that vouches for it.
    pub trust_domain: TrustDomain,
    /// Kubernetes namespace.
    pub namespace: Str,
    /// Kubernetes service account.
    pub service_account: Str,
}

/// A text that is not a SPIFFE ID of the mesh's form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
pub struct ParseIdentityError(pub String);

/// A text that cannot be a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a trust domain: lower-case letters, digits, '.', '-' and '_', 1 to 255 of them"
)]
pub struct ParseTrustDomainError(pub String);

impl TrustDomain {
    /// As [`Texts::share`].
    pub(crate) fn share(&mut self, texts: &mut Texts) {
        texts.share(&mut self.0);
    }

    /// The name, as it stands in a SPIFFE ID.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    /// `cluster.local`, which an empty `Workload.trust_domain` means.
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

impl FromStr for TrustDomain {
    type Err = ParseTrustDomainError;

    /// SPIFFE-ID 2.1: at most 255 bytes of `[a-z0-9.-_]`.
    fn from_str(text: &str) -> Result<Self, ParseTrustDomainError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
            return Err(ParseTrustDomainError(text.to_owned()));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Identity {
    /// The text that authorization policies compare: the SPIFFE ID without `spiffe://`.
    pub fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        write!(
            f,
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        )
    }
}

/// SPIFFE-ID 2.3.
const MAX_LENGTH: usize = 2048;

/// SPIFFE-ID 2.2: a part of the path is letters, digits, '.', '-' and '_', and none that stands for another folder.
fn is_segment(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
    !matches!(text, "" | "." | "..") && text.bytes().all(allowed)
}

impl FromStr for Identity {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<Self, ParseIdentityError> {
        let parse = || {
            let mut pieces = text.strip_prefix("spiffe://")?.split('/');
            let trust_domain = pieces.next()?.parse().ok()?;
            let (ns, namespace, sa, account) = (
                pieces.next()?,
                pieces.next()?,
                pieces.next()?,
                pieces.next()?,
            );
            let whole = pieces.next().is_none() && ns == "ns" && sa == "sa";
            let named = is_segment(namespace) && is_segment(account);
            (whole && named && text.len() <= MAX_LENGTH).then(|| Self {
                trust_domain,
                namespace: namespace.into(),
                service_account: account.into(),
            })
        };
        parse().ok_or_else(|| ParseIdentityError(text.to_owned()))
    }
}

serde_as_text!(TrustDomain, Identity);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_round_trips_through_its_spiffe_id() {
        let text = "spiffe://cluster.local/ns/a/sa/client";
        let identity: Identity = text.parse().unwrap();
        assert_eq!(identity.to_string(), text);
        assert_eq!(identity.principal(), "cluster.local/ns/a/sa/client");
    }

    #[test]
    fn an_identity_has_an_end() {
        let of = |length: usize| format!("spiffe://td/ns/a/sa/{}", "b".repeat(length));
        let most = MAX_LENGTH - of(0).len();
        assert!(of(most).parse::<Identity>().is_ok());
        assert!(of(most + 1).parse::<Identity>().is_err());
    }

    #[test]
    fn texts_of_another_form_are_no_identity() {
        for text in [
            "",
            "spiffe://",
            "cluster.local/ns/a/sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe://td/sa/a/ns/b",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe:///ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b c",
            "spiffe://td/ns/a/sa/b\n",
            "spiffe://td/ns/ä/sa/b",
            "spiffe://td/ns/%61/sa/b",
            "spiffe://td/ns/../sa/b",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text:?}");
        }
    }
}
