//! The control plane's own certificate: issued by its authority, renewed while it runs.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rustls::{
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use super::{
    authority::{Authority, SignError},
    current::Current,
};

const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// After a renewal that failed. There are many of these in the second half of a lifetime.
const RETRY: Duration = Duration::from_secs(60);

/// A server certificate that is always valid as long as [`Self::renew`] runs.
#[derive(Debug)]
pub struct ServingCertificate {
    authority: Arc<Current>,
    names: Vec<String>,
    held: ArcSwap<Held>,
}

#[derive(Debug)]
struct Held {
    key: Arc<CertifiedKey>,
    /// Renewed when this long is over, counted from its issue.
    half: Duration,
}

/// Why there is no certificate to serve with.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// Signing.
    #[error("sign the control plane's own certificate")]
    Sign(#[from] SignError),
    /// The key.
    #[error("use the control plane's own key")]
    Key(#[from] rustls::Error),
}

impl ServingCertificate {
    /// Issues the first one.
    pub fn issue(authority: Arc<Current>, names: Vec<String>) -> Result<Self, ServingError> {
        let held = ArcSwap::from_pointee(Held::issue(&authority.load(), &names)?);
        Ok(Self {
            authority,
            names,
            held,
        })
    }

    /// Replaces it at about half of its lifetime, and when another authority comes into force, forever. A failed renewal keeps what there is and tries again.
    pub async fn renew(self: Arc<Self>) {
        let mut wait = jittered(self.held.load().half);
        let mut rotated = self.authority.changes();
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // Its sender is in `self`: it never ends. The old certificate's signer may be on its way out.
                _ = rotated.changed() => {}
            }
            wait = match Held::issue(&self.authority.load(), &self.names) {
                Ok(next) => {
                    let half = next.half;
                    self.held.store(Arc::new(next));
                    tracing::info!("own certificate renewed");
                    jittered(half)
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, "own certificate not renewed");
                    RETRY
                }
            };
        }
    }
}

impl Held {
    fn issue(authority: &Authority, names: &[String]) -> Result<Self, ServingError> {
        let now = OffsetDateTime::now_utc();
        let (issued, key) = authority.server(names, LIFETIME, now)?;
        let half = Duration::try_from((issued.not_after - now) / 2).unwrap_or(RETRY);
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut chain = vec![issued.leaf];
        chain.extend(issued.chain);
        let provider = aws_lc_rs::default_provider();
        let key = CertifiedKey::from_der(chain, der, &provider)?;
        Ok(Self {
            key: Arc::new(key),
            half: half.max(Duration::from_secs(1)),
        })
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.held.load().key.clone())
    }
}

/// Up to a tenth earlier, so that replicas do not renew as one.
fn jittered(half: Duration) -> Duration {
    half.mul_f64(rand::random_range(0.9..=1.0))
}

#[cfg(test)]
mod tests {
    use mesh::identity::TrustDomain;

    use super::*;
    use crate::ca::disk;

    #[tokio::test(start_paused = true)]
    async fn the_own_certificate_is_renewed_at_half_of_its_life() {
        let dir = tempfile::tempdir().unwrap();
        let authority = disk::load_or_create(dir.path(), &TrustDomain::default()).unwrap();
        let names = vec!["istiod.istio-system.svc".to_owned()];
        let serving = Arc::new(ServingCertificate::issue(Current::new(authority), names).unwrap());
        let leaf = || serving.held.load().key.cert[0].clone();
        let first = leaf();
        let task = tokio::spawn(serving.clone().renew());
        tokio::time::sleep(LIFETIME.mul_f64(0.44)).await;
        assert_eq!(leaf(), first, "not before nine tenths of the half");
        tokio::time::sleep(LIFETIME.mul_f64(0.07)).await;
        assert_ne!(leaf(), first);
        task.abort();
    }
}
