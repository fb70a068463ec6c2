//! Who calls: a service account proven by a bearer token or by a client certificate. What a caller may do is decided
//! elsewhere ([`crate::serve::access`], [`crate::ca`]). Fails closed: a caller without proof is nobody.

mod jwks;
mod review;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use http::{HeaderMap, header::AUTHORIZATION};
use mesh::identity::{Identity, TrustDomain};

pub use jwks::{Jwks, JwksError};
pub use review::{Review, ReviewError};

use crate::config::ServiceAccount;

/// Longest token that is looked at.
const MAX_TOKEN: usize = 16 * 1024;

/// A proven caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Its service account.
    pub account: ServiceAccount,
    /// Its pod, where the proof is bound to one.
    pub pod: Option<PodBinding>,
}

/// The pod a token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodBinding {
    /// Kubernetes' uid.
    pub uid: String,
    /// Name, in the account's namespace.
    pub name: String,
    /// Node it runs on, where the token says so.
    pub node: Option<String>,
}

/// Why a caller is not believed. Goes to our log; the caller hears only that it is not.
#[derive(Debug, thiserror::Error)]
pub enum AuthenticateError {
    /// Neither token nor certificate.
    #[error("no bearer token and no client certificate")]
    NoCredentials,
    /// The header is not `Bearer TOKEN`.
    #[error("the authorization header is not \"Bearer TOKEN\"")]
    Header,
    /// The token is longer than any real one.
    #[error("a token of {0} bytes is too long")]
    TooLong(usize),
    /// The token's signature, time or audience.
    #[error("check the token")]
    Token(#[source] jsonwebtoken::errors::Error),
    /// The token names a key that nobody published.
    #[error("the token is signed by the unknown key {0:?}")]
    UnknownKey(Option<String>),
    /// The subject is no service account, or disagrees with the other claims.
    #[error("the token's subject {0:?} is not the service account that its other claims name")]
    Subject(String),
    /// A certificate of another trust domain.
    #[error("{0} is of another trust domain")]
    TrustDomain(Identity),
    /// The API server's review of the token.
    #[error("review the token")]
    Review(#[from] ReviewError),
    /// There is nobody who could check a token.
    #[error("no key is configured that could check a token")]
    NoKeys,
}

/// Checks bearer tokens: a static set of keys, or the API server's TokenReview.
pub trait Authenticator: Send + Sync + fmt::Debug {
    /// Who presents `token`. `cluster` is the caller's cluster, where it names one (header `clusterid`).
    fn authenticate<'a>(
        &'a self,
        token: &'a str,
        cluster: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Caller, AuthenticateError>>;
}

/// What a connection has proven by TLS.
#[derive(Debug, Clone, Default)]
pub struct PeerCertificate(pub Option<Identity>);

/// The chain of proofs: a client certificate of our own trust domain, else a bearer token.
#[derive(Debug, Clone)]
pub struct Authentication {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Who checks tokens; nobody if absent.
    pub tokens: Option<Arc<dyn Authenticator>>,
}

impl Authentication {
    /// Who sends a request with these headers over a connection with this certificate. A token, where there is one,
    /// decides alone: it may be bound to a pod, which a certificate never is.
    pub async fn caller(
        &self,
        headers: &HeaderMap,
        certificate: &PeerCertificate,
    ) -> Result<Caller, AuthenticateError> {
        let Some(header) = headers.get(AUTHORIZATION) else {
            return self.certified(certificate);
        };
        let token = header.to_str().ok().and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let token = token.ok_or(AuthenticateError::Header)?;
        if token.len() > MAX_TOKEN {
            return Err(AuthenticateError::TooLong(token.len()));
        }
        let tokens = self.tokens.as_ref().ok_or(AuthenticateError::NoKeys)?;
        let cluster = headers.get("clusterid").and_then(|id| id.to_str().ok());
        tokens.authenticate(token, cluster).await
    }

    fn certified(&self, certificate: &PeerCertificate) -> Result<Caller, AuthenticateError> {
        match &certificate.0 {
            None => Err(AuthenticateError::NoCredentials),
            Some(identity) if identity.trust_domain != self.trust_domain => {
                Err(AuthenticateError::TrustDomain(identity.clone()))
            }
            Some(identity) => Ok(Caller {
                account: ServiceAccount {
                    namespace: identity.namespace.to_string(),
                    name: identity.service_account.to_string(),
                },
                pod: None,
            }),
        }
    }
}
