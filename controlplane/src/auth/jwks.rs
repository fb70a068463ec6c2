//! Tokens checked against a file of published keys: the embedded mesh's supervisor mints them, shaped as the API server's.

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation,
    errors::ErrorKind,
    jwk::{Jwk, JwkSet, KeyAlgorithm},
};
use parking_lot::Mutex;
use serde::Deserialize;

use super::{AuthenticateError, Authenticator, Caller, PodBinding};
use crate::config::ServiceAccount;

/// Clocks of one mesh differ by less.
const LEEWAY_SECONDS: u64 = 10;
/// A token with an unknown key makes us read the file again, but not more often than this.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Public keys from a JWKS file (RFC 7517), and the audiences that tokens must be meant for.
#[derive(Debug)]
pub struct Jwks {
    path: PathBuf,
    audiences: Vec<String>,
    keys: ArcSwap<Vec<Key>>,
    read: Mutex<Instant>,
}

struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

/// Why a file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JwksError {
    /// Reading it.
    #[error("read the keys in {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is no JWKS.
    #[error("parse the keys in {}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A key cannot be used.
    #[error("key {id:?} in {}", path.display())]
    Key {
        /// Which file.
        path: PathBuf,
        /// Which key.
        id: Option<String>,
        /// The cause.
        source: jsonwebtoken::errors::Error,
    },
    /// No key signs with ES256 or RS256.
    #[error("no ES256 or RS256 key in {}", .0.display())]
    Empty(PathBuf),
}

/// The claims of a bound service account token (Kubernetes `serviceaccount.Claims`).
#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

#[derive(Debug, Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: Reference,
    pod: Option<Reference>,
    node: Option<Reference>,
}

#[derive(Debug, Deserialize)]
struct Reference {
    name: String,
    #[serde(default)]
    uid: String,
}

impl Jwks {
    /// Reads the file. It is read again when a token names a key that is not in it.
    pub fn open(path: PathBuf, audiences: Vec<String>) -> Result<Self, JwksError> {
        let keys = read(&path)?;
        Ok(Self {
            path,
            audiences,
            keys: ArcSwap::from_pointee(keys),
            read: Mutex::new(Instant::now()),
        })
    }

    fn check(&self, token: &str) -> Result<Caller, AuthenticateError> {
        let header = jsonwebtoken::decode_header(token).map_err(AuthenticateError::Token)?;
        match self.try_keys(token, header.kid.as_deref(), header.alg) {
            Err(AuthenticateError::UnknownKey(_)) if self.reload() => {
                self.try_keys(token, header.kid.as_deref(), header.alg)
            }
            result => result,
        }
    }

    /// The key that the header names decides; without a name, each key of the algorithm may.
    fn try_keys(
        &self,
        token: &str,
        id: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Caller, AuthenticateError> {
        let keys = self.keys.load();
        let fits =
            |key: &&Key| key.algorithm == algorithm && (id.is_none() || key.id.as_deref() == id);
        let mut result = Err(AuthenticateError::UnknownKey(id.map(str::to_owned)));
        for key in keys.iter().filter(fits) {
            let mut validation = Validation::new(key.algorithm);
            validation.leeway = LEEWAY_SECONDS;
            validation.validate_nbf = true;
            validation.set_required_spec_claims(&["exp", "aud", "sub"]);
            validation.set_audience(&self.audiences);
            match jsonwebtoken::decode::<Claims>(token, &key.key, &validation) {
                Ok(token) => return caller(token.claims),
                Err(error) => {
                    let wrong_key = matches!(error.kind(), ErrorKind::InvalidSignature);
                    result = Err(AuthenticateError::Token(error));
                    if !wrong_key {
                        break;
                    }
                }
            }
        }
        result
    }

    fn reload(&self) -> bool {
        let mut last = self.read.lock();
        if last.elapsed() < RELOAD_INTERVAL {
            return false;
        }
        *last = Instant::now();
        match read(&self.path) {
            Ok(keys) => self.keys.store(keys.into()),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "keys kept as they were"
                );
                return false;
            }
        }
        true
    }
}

impl Authenticator for Jwks {
    fn authenticate<'a>(
        &'a self,
        token: &'a str,
    ) -> BoxFuture<'a, Result<Caller, AuthenticateError>> {
        Box::pin(std::future::ready(self.check(token)))
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({:?}, {:?})", self.id, self.algorithm)
    }
}

fn read(path: &PathBuf) -> Result<Vec<Key>, JwksError> {
    let text = std::fs::read(path).map_err(|source| JwksError::Read {
        path: path.clone(),
        source,
    })?;
    let set: JwkSet = serde_json::from_slice(&text).map_err(|source| JwksError::Parse {
        path: path.clone(),
        source,
    })?;
    let keys = set.keys.iter().filter_map(|jwk| {
        let algorithm = algorithm(jwk)?;
        let id = jwk.common.key_id.clone();
        Some(match DecodingKey::from_jwk(jwk) {
            Ok(key) => Ok(Key { id, algorithm, key }),
            Err(source) => Err(JwksError::Key {
                path: path.clone(),
                id,
                source,
            }),
        })
    });
    let keys: Vec<Key> = keys.collect::<Result<_, _>>()?;
    if keys.is_empty() {
        return Err(JwksError::Empty(path.clone()));
    }
    Ok(keys)
}

/// Public-key algorithms only: a symmetric key in the file would let its readers mint tokens.
fn algorithm(jwk: &Jwk) -> Option<Algorithm> {
    use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve};
    match (jwk.common.key_algorithm, &jwk.algorithm) {
        (Some(KeyAlgorithm::RS256) | None, AlgorithmParameters::RSA(_)) => Some(Algorithm::RS256),
        (Some(KeyAlgorithm::ES256) | None, AlgorithmParameters::EllipticCurve(curve)) => {
            (curve.curve == EllipticCurve::P256).then_some(Algorithm::ES256)
        }
        _ => None,
    }
}

/// The service account, if subject and claims agree on it.
fn caller(claims: Claims) -> Result<Caller, AuthenticateError> {
    let Claims { sub, kubernetes } = claims;
    let account = ServiceAccount {
        namespace: kubernetes.namespace,
        name: kubernetes.serviceaccount.name,
    };
    let named = format!(
        "system:serviceaccount:{}:{}",
        account.namespace, account.name
    );
    let plain = |part: &str| !part.is_empty() && !part.contains([':', '/']);
    if sub != named || !plain(&account.namespace) || !plain(&account.name) {
        return Err(AuthenticateError::Subject(sub));
    }
    let pod = kubernetes.pod.filter(|pod| !pod.uid.is_empty());
    let node = kubernetes.node.map(|node| node.name);
    let pod = pod.map(|Reference { name, uid }| PodBinding { uid, name, node });
    Ok(Caller {
        account,
        pod,
        cluster: None,
    })
}
