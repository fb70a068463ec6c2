//! Which roots vouch for which trust domain.

use std::{collections::BTreeMap, sync::Arc};

use mesh::identity::TrustDomain;
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, pem::PemObject};

/// Roots by trust domain. A root vouches only for identities of the domain that it is listed under.
#[derive(Clone, Debug, Default)]
pub struct TrustBundle {
    domains: BTreeMap<TrustDomain, Arc<Roots>>,
}

#[derive(Debug)]
pub(super) struct Roots {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) store: Arc<RootCertStore>,
}

/// A set of roots that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustBundleError {
    /// Not one certificate in it can serve as a root.
    #[error("no usable root certificate for {domain} ({skipped} unusable)")]
    NoRoots {
        /// The domain that would have no root.
        domain: TrustDomain,
        /// How many entries could not be read.
        skipped: usize,
    },
}

impl TrustBundle {
    /// A bundle with one domain, vouched for by the certificates in `pem` (any number, concatenated).
    ///
    /// Entries that cannot be parsed are skipped with a warning, as peers do; an empty rest is an error.
    pub fn from_pem(domain: TrustDomain, pem: &[u8]) -> Result<Self, TrustBundleError> {
        let mut bundle = Self::default();
        bundle.insert_pem(domain, pem)?;
        Ok(bundle)
    }

    /// Adds or replaces the roots of one domain. Errors as [`TrustBundle::from_pem`]; the bundle is then unchanged.
    pub fn insert_pem(&mut self, domain: TrustDomain, pem: &[u8]) -> Result<(), TrustBundleError> {
        let mut store = RootCertStore::empty();
        let mut certificates: Vec<CertificateDer<'static>> = Vec::new();
        let mut skipped = 0;
        for entry in CertificateDer::pem_slice_iter(pem) {
            match entry {
                Ok(der) if certificates.contains(&der) => {}
                Ok(der) if store.add(der.clone()).is_ok() => certificates.push(der),
                _ => skipped += 1,
            }
        }
        if skipped > 0 {
            tracing::warn!(%domain, skipped, "skipped unusable root certificates");
        }
        if certificates.is_empty() {
            return Err(TrustBundleError::NoRoots { domain, skipped });
        }
        let roots = Roots {
            certificates,
            store: Arc::new(store),
        };
        self.domains.insert(domain, Arc::new(roots));
        Ok(())
    }

    /// The domains that have roots.
    pub fn domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.domains.keys()
    }

    /// The roots of every domain, in DER.
    pub fn certificates(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.domains.values().flat_map(|roots| &roots.certificates)
    }

    pub(super) fn roots(&self) -> impl Iterator<Item = (&TrustDomain, &Arc<Roots>)> {
        self.domains.iter()
    }
}

impl PartialEq for TrustBundle {
    /// Whether both trust the same certificates for the same domains.
    fn eq(&self, other: &Self) -> bool {
        let key = |bundle: &Self| {
            let roots = bundle.domains.iter();
            roots
                .map(|(domain, roots)| (domain.clone(), roots.certificates.clone()))
                .collect::<Vec<_>>()
        };
        key(self) == key(other)
    }
}
