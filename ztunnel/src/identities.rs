//! Which identities the pods of this node need: a certificate is fetched when the first one appears, and forgotten with
//! the last.

use std::{collections::HashMap, sync::Arc};

use mesh::identity::Identity;
use net::ca::Certificates;
use parking_lot::Mutex;

/// Counts who needs which identity. Holds no more entries than there are pods.
pub(crate) struct Identities {
    certificates: Certificates,
    holders: Mutex<HashMap<Identity, usize>>,
}

/// Somebody needs the identity, until this is dropped.
pub(crate) struct Held {
    identity: Identity,
    identities: Arc<Identities>,
}

impl Identities {
    pub(crate) fn new(certificates: Certificates) -> Arc<Self> {
        Arc::new(Self {
            certificates,
            holders: Mutex::default(),
        })
    }

    /// Fetches the certificate ahead of its first use, and keeps it fresh while it is held.
    pub(crate) fn hold(self: &Arc<Self>, identity: &Identity) -> Held {
        *self.holders.lock().entry(identity.clone()).or_default() += 1;
        self.certificates.prefetch(identity);
        Held {
            identity: identity.clone(),
            identities: self.clone(),
        }
    }
}

impl Held {
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut holders = self.identities.holders.lock();
        let Some(count) = holders.get_mut(&self.identity) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            holders.remove(&self.identity);
            self.identities.certificates.forget(&self.identity);
        }
    }
}
