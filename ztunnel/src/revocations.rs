//! Connections that end because the certificates under them are revoked.

use std::sync::Arc;

use net::tls::{CertificateId, Revocations};

/// The certificates that a connection rests on.
#[derive(Clone, Debug)]
pub(crate) struct RestsOn {
    chain: Arc<[CertificateId]>,
    revocations: Revocations,
}

impl RestsOn {
    pub(crate) fn new(chain: Arc<[CertificateId]>, revocations: &Revocations) -> Self {
        Self {
            chain,
            revocations: revocations.clone(),
        }
    }

    /// Resolves once one of them is revoked. Cancel-safe.
    pub(crate) async fn until_revoked(&self) {
        self.revocations.until_revoked(&self.chain).await;
    }

    /// Whether one of them is revoked.
    pub(crate) fn is_revoked(&self) -> bool {
        self.revocations.find(&self.chain).is_some()
    }
}
