//! Certificates of the workloads on this node: asked of the CA, kept, renewed, and handed out.
//!
//! [`CaClient`] asks once; [`Certificates`] decides when to ask and what to serve meanwhile. Keys are made here, one per
//! request, and leave only as signing handles.

mod certificates;
mod client;
mod queue;

use std::{future::Future, pin::Pin, sync::Arc};

use mesh::identity::Identity;

pub use certificates::{
    Backoff, CertificateState, Certificates, CertificatesConfig, FetchError, Priority,
};
pub use client::{CaClient, CaConfig, Impersonation, IssueError, Token};

use crate::tls::WorkloadCertificate;

#[cfg(test)]
mod rotation;
#[cfg(test)]
mod tests;

/// Whoever can certify an identity.
pub trait Issuer: Send + Sync + 'static {
    /// A certificate for `identity` with a new key. Must resolve in bounded time.
    fn issue(&self, identity: Identity) -> Issuing;
}

/// A certificate in the making.
pub type Issuing =
    Pin<Box<dyn Future<Output = Result<WorkloadCertificate, Arc<IssueError>>> + Send>>;
