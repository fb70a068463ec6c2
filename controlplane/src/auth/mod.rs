//! Who calls: a service account proven by a bearer token or by a client certificate. What a caller may do is decided
//! elsewhere ([`crate::serve::access`], [`crate::ca`]). Fails closed: a caller without proof is nobody.

mod jwks;
mod review;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use mesh::{
    identity::{Identity, TrustDomain},
    names::Str,
};
use tonic::Status;

pub use jwks::{Jwks, JwksError};
pub use review::{Review, ReviewError};

use crate::{
    clusters::{ClusterError, Clusters},
    config::ServiceAccount,
};

/// Longest token that is looked at.
const MAX_TOKEN: usize = 16 * 1024;

/// A proven caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Its service account.
    pub account: ServiceAccount,
    /// Its pod, where the proof is bound to one.
    pub pod: Option<PodBinding>,
    /// The cluster that it is of; absent: this one. Where the proof is a token, that cluster's API server vouches for it.
    pub cluster: Option<Str>,
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
    /// The cluster that the caller names.
    #[error("find the caller's cluster")]
    Cluster(#[from] ClusterError),
    /// Another cluster does not vouch for the caller.
    #[error("ask the API server of cluster {cluster:?} about the caller")]
    Elsewhere {
        /// Which.
        cluster: Str,
        /// Why.
        source: Box<Self>,
    },
}

impl AuthenticateError {
    /// What the caller hears: `what`, and of clusters, which is its own business to have named well, why.
    pub fn status(&self, what: &str) -> Status {
        match self {
            Self::Cluster(why) => Status::unauthenticated(format!("{what}: {why}")),
            Self::Elsewhere { cluster, source } if source.is_silence() => Status::unavailable(
                format!("{what}: the API server of cluster {cluster:?} does not answer"),
            ),
            Self::Elsewhere { cluster, .. } => Status::unauthenticated(format!(
                "{what}: cluster {cluster:?} does not vouch for the caller"
            )),
            _ => Status::unauthenticated(what),
        }
    }

    /// Whether nobody said anything of the caller.
    fn is_silence(&self) -> bool {
        matches!(self, Self::Review(ReviewError::Ask(_) | ReviewError::Slow))
    }
}

/// Checks bearer tokens: a static set of keys, or the API server's TokenReview.
pub trait Authenticator: Send + Sync + fmt::Debug {
    /// Who presents `token`, in the cluster whose tokens these are.
    fn authenticate<'a>(
        &'a self,
        token: &'a str,
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
    /// Who checks this cluster's tokens; nobody if absent.
    pub tokens: Option<Arc<dyn Authenticator>>,
    /// Who checks those of other clusters.
    pub clusters: Clusters,
}

impl Authentication {
    /// Who sends a request with these headers over a connection with this certificate. A token, where there is one,
    /// decides alone: it may be bound to a pod, which a certificate never is. The cluster that the caller names (header
    /// `clusterid`) decides who is asked about the token, and nobody else is.
    pub async fn caller(
        &self,
        headers: &HeaderMap,
        certificate: &PeerCertificate,
    ) -> Result<Caller, AuthenticateError> {
        let member = self.clusters.named(named_cluster(headers)?)?;
        let Some(header) = headers.get(AUTHORIZATION) else {
            return self.certified(certificate, member.map(|(cluster, _)| cluster));
        };
        let token = header.to_str().ok().and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let token = token.ok_or(AuthenticateError::Header)?;
        if token.len() > MAX_TOKEN {
            return Err(AuthenticateError::TooLong(token.len()));
        }
        let Some((cluster, member)) = member else {
            let tokens = self.tokens.as_ref().ok_or(AuthenticateError::NoKeys)?;
            return tokens.authenticate(token).await;
        };
        match member.tokens.authenticate(token).await {
            Ok(caller) => Ok(Caller {
                cluster: Some(cluster),
                ..caller
            }),
            Err(source) => Err(AuthenticateError::Elsewhere {
                cluster,
                source: Box::new(source),
            }),
        }
    }

    fn certified(
        &self,
        certificate: &PeerCertificate,
        cluster: Option<Str>,
    ) -> Result<Caller, AuthenticateError> {
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
                cluster,
            }),
        }
    }
}

fn named_cluster(headers: &HeaderMap) -> Result<Option<&str>, ClusterError> {
    let name = headers.get("clusterid").map(HeaderValue::to_str);
    name.transpose().map_err(|_| ClusterError::Name)
}
