//! Mutual TLS between workloads, by SPIFFE identity, and TLS to the control plane, by DNS name.
//!
//! A [`WorkloadCertificate`] holds everything one generation of a workload's certificate needs, and makes its rustls
//! configurations once. Roots are kept per trust domain: a root of one never vouches for another. Private keys are
//! turned into signing handles when they arrive; nothing here prints or serialises them.

mod agree;
mod certificate;
pub mod control_plane;
mod handshake;
mod origination;
mod policy;
mod record;
mod revocation;
pub mod revocation_file;
mod stream;
mod trust;
mod verify;

pub use certificate::{BuildCertificateError, PemCertificate, WorkloadCertificate};
pub use handshake::{Blame, HandshakeError, Stream, accept, connect};
pub use origination::{ClientStream, Origination, OriginationError, Originator};
pub use policy::{KeyExchange, Policy, Versions};
pub use revocation::{CertificateId, PeerEnd, RevocationListError, Revocations};
pub use trust::{TrustBundle, TrustBundleError};
pub use verify::{PeerCertificateError, PeerIdentity};

#[cfg(test)]
mod tests;
