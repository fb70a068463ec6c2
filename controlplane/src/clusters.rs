//! The mesh's other clusters, as their proxies need them here: each has an API server of its own that vouches for its callers,
//! and pods of its own on nodes of its own. A caller names its cluster (header `clusterid`), and is judged by that cluster
//! alone: what one API server says of a token counts for no other cluster, and so do its nodes. Fails closed.

use std::{collections::BTreeMap, fmt, sync::Arc};

use mesh::names::Str;
use tokio::sync::watch;

use crate::{auth::Authenticator, ca::impersonate::Pods, serve::access::GatewayOf};

/// The longest name of a cluster that is repeated to who names it.
const MAX_NAME: usize = 128;

/// Another cluster that is wholly read.
#[derive(Clone)]
pub struct Member {
    /// Its API server, as judge of tokens.
    pub tokens: Arc<dyn Authenticator>,
    /// What runs there.
    pub pods: Arc<dyn Pods>,
    /// Whose proxies run there.
    pub gateway_of: Arc<GatewayOf>,
}

/// Other clusters by their names; `None`: a Secret names it, but not everything there is known yet.
pub type Members = BTreeMap<Str, Option<Member>>;

/// This cluster, and the others.
#[derive(Clone)]
pub struct Clusters {
    own: Str,
    others: watch::Receiver<Members>,
}

/// Why a caller's cluster vouches for nobody. Repeats what the caller said.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Its name is no text.
    #[error("the name of the caller's cluster is not printable ASCII")]
    Name,
    /// There is none of this name.
    #[error("cluster {0:?} is not known here: no Secret names it")]
    Unknown(String),
    /// It is being read, or cannot be.
    #[error("cluster {0:?} is not wholly read yet")]
    Early(String),
}

impl Clusters {
    /// This cluster, by its name, and those that come and go with the channel.
    pub fn new(own: &str, others: watch::Receiver<Members>) -> Self {
        Self {
            own: own.into(),
            others,
        }
    }

    /// This cluster and no others.
    pub fn alone(own: &str) -> Self {
        // What a channel holds outlives its sender.
        Self::new(own, watch::channel(Members::new()).1)
    }

    /// The cluster that a caller names; `None`: this one, which is also meant where none is named.
    pub fn named(&self, name: Option<&str>) -> Result<Option<(Str, Member)>, ClusterError> {
        let Some(name) = name.filter(|name| !name.is_empty() && **name != *self.own) else {
            return Ok(None);
        };
        let repeated = || name.chars().take(MAX_NAME).collect();
        match self.others.borrow().get_key_value(name) {
            Some((name, Some(member))) => Ok(Some((name.clone(), member.clone()))),
            Some((_, None)) => Err(ClusterError::Early(repeated())),
            None => Err(ClusterError::Unknown(repeated())),
        }
    }

    /// Another cluster, if it is still one and wholly read.
    pub fn member(&self, cluster: &str) -> Option<Member> {
        self.others.borrow().get(cluster).cloned().flatten()
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").finish_non_exhaustive()
    }
}

impl fmt::Debug for Clusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others: Vec<Str> = self.others.borrow().keys().cloned().collect();
        f.debug_struct("Clusters")
            .field("own", &self.own)
            .field("others", &others)
            .finish()
    }
}

#[cfg(test)]
mod tests;
