//! Where the certificate authority's key is kept in a cluster: our own root in a Secret, or an intermediate of others in
//! a mounted folder.
//!
//! The Secret is made by whichever replica is first; the others adopt it. What signs is always what the API server
//! holds, never what we only meant to store. While the program runs, every replica follows the Secret or the folder; a
//! state that would not work, or that would cut off those who trust the present one, leaves the last good one in force.

mod folder;
mod secret;

#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, api::PostParams};
use mesh::identity::TrustDomain;
use parking_lot::Mutex;
use time::OffsetDateTime;
use tokio::sync::Notify;

pub use self::secret::ContentError;
use super::{
    backoff::{Backoff, is_passing},
    leader::Leadership,
};
use crate::{
    ca::{Authority, Current, plug_in::PlugInError},
    metrics::Metrics,
};

/// The Secret of the self-signed root (control-plane.md 12).
pub const SECRET: &str = "istio-ca-secret";

/// How long a start waits for an API server that does not answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Settings of the authority in a cluster.
#[derive(Debug, Clone)]
pub struct CaSettings {
    /// The control plane's own namespace, where the Secret is.
    pub namespace: String,
    /// Named in a new root.
    pub trust_domain: TrustDomain,
    /// A folder of a plug-in intermediate; used if it holds any of its files.
    pub plug_in: Option<PathBuf>,
    /// Lifetime of a certificate when a request names none.
    pub default_ttl: Duration,
    /// Longest lifetime that is granted.
    pub max_ttl: Duration,
}

/// Why there is no certificate authority; the process must not serve.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading the Secret.
    #[error("read the Secret {namespace}/{SECRET} of the root")]
    Read {
        /// The namespace.
        namespace: String,
        /// The cause; `Forbidden` where the role does not allow it.
        source: Box<kube::Error>,
    },
    /// Creating the Secret. A key that is not stored is not used.
    #[error("store a new root in the Secret {namespace}/{SECRET}")]
    Create {
        /// The namespace.
        namespace: String,
        /// The cause.
        source: Box<kube::Error>,
    },
    /// What the Secret holds cannot be used. It is not replaced: certificates may be in use that it signed.
    #[error("use the Secret {namespace}/{SECRET}")]
    Content {
        /// The namespace.
        namespace: String,
        /// The cause.
        source: ContentError,
    },
    /// Generating.
    #[error("make a root")]
    Generate(#[source] rcgen::Error),
    /// The folder.
    #[error("plug-in certificate authority in {}", dir.display())]
    PlugIn {
        /// Which.
        dir: PathBuf,
        /// The cause.
        source: PlugInError,
    },
    /// A thread of ours panicked.
    #[error("a task that reads the keys panicked")]
    Panic(#[from] tokio::task::JoinError),
}

/// The authority of a cluster, and where it is kept.
pub struct CaStore {
    client: Client,
    settings: CaSettings,
    current: Arc<Current>,
    /// Where the keys are in a folder.
    folder: Option<PathBuf>,
    /// The last good Secret, to be written again when somebody deletes it.
    secret: Mutex<Option<Secret>>,
    /// The Secret changed.
    changed: Notify,
}

impl fmt::Debug for CaStore {
    /// Without the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaStore")
            .field("settings", &self.settings)
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

impl CaStore {
    /// Loads the authority; makes the root if there is none. Waits up to a minute for an API server that does not
    /// answer; every other failure is final.
    pub async fn load(client: Client, settings: CaSettings) -> Result<Self, StoreError> {
        let folder = settings.plug_in.clone().filter(|dir| folder::is_used(dir));
        let (authority, secret) = match &folder {
            Some(dir) => {
                tracing::info!(dir = %dir.display(), "plug-in certificate authority");
                (folder::load(dir.clone()).await?, None)
            }
            None => {
                let (authority, secret) = first(&client, &settings).await?;
                (authority, Some(secret))
            }
        };
        let authority = authority.with_lifetimes(settings.default_ttl, settings.max_ttl);
        Ok(Self {
            client,
            settings,
            current: Current::new(authority),
            folder,
            secret: Mutex::new(secret),
            changed: Notify::new(),
        })
    }

    /// The authority in force.
    pub fn current(&self) -> Arc<Current> {
        self.current.clone()
    }

    /// Follows the Secret or the folder, forever, and replaces a root that comes to its end while this replica leads.
    pub async fn keep(self: Arc<Self>, leadership: Leadership, metrics: Arc<Metrics>) {
        self.tell(&metrics);
        match &self.folder {
            Some(dir) => self.follow_folder(dir, &metrics).await,
            None => {
                let rotate = leadership.while_leading("root rotation", || self.rotate());
                tokio::join!(self.follow_secret(&metrics), rotate);
            }
        }
    }

    fn replace(&self, authority: Authority, metrics: &Metrics) {
        let (default_ttl, max_ttl) = (self.settings.default_ttl, self.settings.max_ttl);
        let authority = authority.with_lifetimes(default_ttl, max_ttl);
        self.current.replace(authority);
        self.tell(metrics);
    }

    fn tell(&self, metrics: &Metrics) {
        let (root, chain) = self.current.load().expiries();
        metrics.expiries(root, chain);
    }

    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.settings.namespace)
    }
}

/// The authority of the Secret, made if there is none.
async fn first(client: &Client, settings: &CaSettings) -> Result<(Authority, Secret), StoreError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &settings.namespace);
    let end = tokio::time::Instant::now() + PATIENCE;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        let error = match read_or_create(&secrets, settings).await {
            Ok(stored) => return Ok(stored),
            Err(error) => error,
        };
        let again = match &error {
            StoreError::Read { source, .. } | StoreError::Create { source, .. } => {
                is_passing(source)
            }
            _ => false,
        };
        let pause = backoff.next();
        if !again || tokio::time::Instant::now() + pause > end {
            return Err(error);
        }
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "the root cannot be had yet");
        tokio::time::sleep(pause).await;
    }
}

/// One try. Another replica that creates it between our look and our write wins: its root is the mesh's.
async fn read_or_create(
    secrets: &Api<Secret>,
    settings: &CaSettings,
) -> Result<(Authority, Secret), StoreError> {
    let namespace = || settings.namespace.clone();
    let read = |source| StoreError::Read {
        namespace: namespace(),
        source: Box::new(source),
    };
    let found = match secrets.get_opt(SECRET).await.map_err(read)? {
        Some(found) => found,
        None => {
            let new = secret::new(&settings.trust_domain, OffsetDateTime::now_utc());
            let new = new.map_err(StoreError::Generate)?;
            match secrets.create(&PostParams::default(), &new).await {
                Ok(stored) => {
                    tracing::info!(secret = SECRET, "made a new root");
                    stored
                }
                Err(kube::Error::Api(status)) if status.is_already_exists() => {
                    secrets.get(SECRET).await.map_err(read)?
                }
                Err(source) => {
                    let namespace = namespace();
                    let source = Box::new(source);
                    return Err(StoreError::Create { namespace, source });
                }
            }
        }
    };
    match secret::read(&found) {
        Ok(authority) => Ok((authority, found)),
        Err(source) => Err(StoreError::Content {
            namespace: namespace(),
            source,
        }),
    }
}
