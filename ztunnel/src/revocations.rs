//! Connections that end because the certificates under them are revoked.

use std::sync::Arc;

use net::tls::{CertificateId, PeerIdentity, Revocations};

/// The certificates that a connection rests on.
#[derive(Clone, Debug)]
pub(crate) struct RestsOn {
    chain: Arc<[CertificateId]>,
    revocations: Revocations,
}

impl RestsOn {
    pub(crate) fn new(peer: &PeerIdentity, revocations: &Revocations) -> Self {
        Self {
            chain: Arc::clone(&peer.chain),
            revocations: revocations.clone(),
        }
    }

    /// Whether one of them is revoked.
    pub(crate) fn is_revoked(&self) -> bool {
        self.revocations.find(&self.chain).is_some()
    }
}
