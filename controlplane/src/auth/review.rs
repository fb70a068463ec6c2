//! Tokens checked by the API server (TokenReview), remembered for a little while.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use aws_lc_rs::digest;
use futures_util::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::Instant};

use super::{AuthenticateError, Authenticator, Caller, PodBinding};
use crate::config::ServiceAccount;

/// How long an accepted token is believed without asking again. A node tunnel asks for the certificates of all its pods
/// with one token; a token that was revoked is of use for at most this long.
const MEMORY: Duration = Duration::from_secs(10);
/// Tokens remembered: more than the design's 2,000 nodes with as many waypoints.
const MOST: usize = 8192;
/// Reviews at a time; more wait.
const AT_ONCE: usize = 64;
/// A review that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);

const USERNAME: &str = "system:serviceaccount:";
const GROUP: &str = "system:serviceaccounts";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// The API server as judge of tokens.
pub struct Review {
    client: Client,
    audiences: Vec<String>,
    known: Mutex<HashMap<[u8; 32], Arc<Entry>>>,
    turns: Semaphore,
}

/// A token, by its hash, and who presents it. The lock is held while the API server is asked, so that it is asked once
/// however many wait.
#[derive(Default)]
struct Entry(tokio::sync::Mutex<Option<(Caller, Instant)>>);

/// Why the API server's answer is not to be believed, or there is none.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// It could not be asked.
    #[error("ask the API server to review a token")]
    Ask(#[source] kube::Error),
    /// It did not answer in time.
    #[error("no review of a token within {PATIENCE:?}")]
    Slow,
    /// It says no.
    #[error("the API server does not accept the token: {0}")]
    Refused(String),
    /// It accepts the token for others.
    #[error("the token is for the audiences {0:?}")]
    Audience(Vec<String>),
    /// The token is a person's, or a node's.
    #[error("{0:?} is no service account")]
    NoServiceAccount(String),
}

impl fmt::Debug for Review {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Review")
            .field("audiences", &self.audiences)
            .finish_non_exhaustive()
    }
}

impl Review {
    /// With the audiences of which a token must name one.
    pub fn new(client: Client, audiences: Vec<String>) -> Self {
        Self {
            client,
            audiences,
            known: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
        }
    }

    async fn check(&self, token: &str) -> Result<Caller, ReviewError> {
        let hash = hash(token);
        let entry = self.entry(hash);
        let mut known = entry.0.lock().await;
        if let Some((caller, until)) = &*known
            && *until > Instant::now()
        {
            return Ok(caller.clone());
        }
        let asked = Instant::now();
        match self.ask(token).await {
            Ok(caller) => {
                *known = Some((caller.clone(), asked + MEMORY));
                Ok(caller)
            }
            Err(error) => {
                *known = None;
                drop(known);
                self.forget(&hash, &entry);
                Err(error)
            }
        }
    }

    fn entry(&self, hash: [u8; 32]) -> Arc<Entry> {
        let mut known = self.known.lock();
        if let Some(entry) = known.get(&hash) {
            return entry.clone();
        }
        if known.len() >= MOST {
            let now = Instant::now();
            // One that is locked is being asked about.
            known.retain(|_, entry| match entry.0.try_lock() {
                Ok(known) => known.as_ref().is_some_and(|(_, until)| *until > now),
                Err(_) => true,
            });
        }
        let entry = Arc::<Entry>::default();
        // A full memory only costs questions.
        if known.len() < MOST {
            known.insert(hash, entry.clone());
        }
        entry
    }

    fn forget(&self, hash: &[u8; 32], entry: &Arc<Entry>) {
        let mut known = self.known.lock();
        if known
            .get(hash)
            .is_some_and(|known| Arc::ptr_eq(known, entry))
        {
            known.remove(hash);
        }
    }

    async fn ask(&self, token: &str) -> Result<Caller, ReviewError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(self.audiences.clone()),
                token: token.to_owned(),
            },
            ..TokenReview::default()
        };
        let exchange = async {
            let _turn = self.turns.acquire().await;
            let api: Api<TokenReview> = Api::all(self.client.clone());
            api.create(&PostParams::default(), &review).await
        };
        let answer = tokio::time::timeout(PATIENCE, exchange).await;
        let answer = answer.map_err(|_| ReviewError::Slow)?;
        let review = answer.map_err(ReviewError::Ask)?;
        judge(review, &self.audiences)
    }
}

fn hash(token: &str) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, token.as_bytes());
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}

/// Who the API server says it is (control-plane.md 12).
fn judge(review: TokenReview, audiences: &[String]) -> Result<Caller, ReviewError> {
    let status = review.status.unwrap_or_default();
    if status.authenticated != Some(true) {
        let why = status.error.filter(|why| !why.is_empty());
        let why = why.unwrap_or_else(|| "not authenticated".to_owned());
        return Err(ReviewError::Refused(why));
    }
    let granted = status.audiences.unwrap_or_default();
    if !granted.iter().any(|audience| audiences.contains(audience)) {
        return Err(ReviewError::Audience(granted));
    }
    let user = status.user.unwrap_or_default();
    let account = account(&user);
    let account = account
        .ok_or_else(|| ReviewError::NoServiceAccount(user.username.clone().unwrap_or_default()))?;
    let extra = |key: &str| {
        let values = user.extra.as_ref()?.get(key)?;
        values.first().filter(|value| !value.is_empty()).cloned()
    };
    let pod = extra(POD_NAME).zip(extra(POD_UID));
    Ok(Caller {
        account,
        pod: pod.map(|(name, uid)| PodBinding {
            uid,
            name,
            node: extra(NODE_NAME),
        }),
        cluster: None,
    })
}

fn account(user: &UserInfo) -> Option<ServiceAccount> {
    let is_account = user.groups.iter().flatten().any(|group| group == GROUP);
    let (namespace, name) = user
        .username
        .as_deref()?
        .strip_prefix(USERNAME)?
        .split_once(':')?;
    let plain = |part: &str| !part.is_empty() && !part.contains([':', '/']);
    (is_account && plain(namespace) && plain(name)).then(|| ServiceAccount {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

impl Authenticator for Review {
    fn authenticate<'a>(
        &'a self,
        token: &'a str,
    ) -> BoxFuture<'a, Result<Caller, AuthenticateError>> {
        Box::pin(async move { Ok(self.check(token).await?) })
    }
}

#[cfg(test)]
mod tests;
