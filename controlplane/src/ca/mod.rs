//! The certificate authority: signs workloads' certificates, and the control plane's own.
//!
//! Two sources of the signing key ([`disk`], [`plug_in`]), one way to sign ([`Authority`]). What a request may ask for is
//! decided in [`csr`] (the key) and [`impersonate`] (the identity). Fails closed: every doubt is a refusal; the peer
//! hears little, our log hears why.

pub mod authority;
pub mod csr;
pub mod current;
pub mod disk;
pub mod impersonate;
pub(crate) mod pem;
pub mod plug_in;
pub(crate) mod root;
pub mod service;
pub mod serving;

#[cfg(test)]
mod tests;

pub use authority::{Authority, SignError};
pub use current::Current;
pub use service::CertificateService;

use mesh::identity::TrustDomain;

use crate::config::{CaConfig, CaSource};

/// Why there is no certificate authority.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Our own root.
    #[error("self-signed root in {}", dir.display())]
    SelfSigned {
        /// The folder.
        dir: std::path::PathBuf,
        /// The cause.
        source: disk::DiskError,
    },
    /// An intermediate of others.
    #[error("plug-in certificate authority in {}", dir.display())]
    PlugIn {
        /// The folder.
        dir: std::path::PathBuf,
        /// The cause.
        source: plug_in::PlugInError,
    },
}

/// Loads the signing key, or makes the root at the first start. Blocking.
pub fn load(config: &CaConfig, trust_domain: &TrustDomain) -> Result<Authority, LoadError> {
    let dir = config.source.dir().to_owned();
    let authority = match &config.source {
        CaSource::SelfSigned(_) => disk::load_or_create(&dir, trust_domain)
            .map_err(|source| LoadError::SelfSigned { dir, source })?,
        CaSource::PlugIn(_) | CaSource::Cluster(_) => {
            plug_in::load(&dir).map_err(|source| LoadError::PlugIn { dir, source })?
        }
    };
    Ok(authority.with_lifetimes(config.default_ttl, config.max_ttl))
}
