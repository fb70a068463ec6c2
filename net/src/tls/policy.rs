//! What this process accepts of TLS: versions, suites, key exchange groups and the clock.

use std::{collections::BTreeSet, fmt, sync::Arc};

use mesh::identity::{Identity, TrustDomain};
use rustls::{
    CipherSuite, NamedGroup, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    version::{TLS12, TLS13},
};

use super::revocation::Revocations;
use crate::clock::{Clock, SystemClock};

/// The TLS versions that are accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Versions {
    /// TLS 1.3 alone.
    #[default]
    Tls13,
    /// TLS 1.2 as well (`TLS12_ENABLED`).
    Tls12And13,
}

/// The key exchange groups that are offered and accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyExchange {
    /// The library's defaults; the hybrid X25519MLKEM768 is among them.
    #[default]
    Default,
    /// X25519MLKEM768 alone (`COMPLIANCE_POLICY=pqc`).
    PostQuantum,
}

/// The rules of TLS in this process. Cheap to clone.
#[derive(Clone)]
pub struct Policy {
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) versions: &'static [&'static SupportedProtocolVersion],
    pub(super) clock: Arc<dyn Clock>,
    pub(super) revocations: Revocations,
    /// Names of one trust domain.
    names: Arc<BTreeSet<TrustDomain>>,
}

static ONLY_13: [&SupportedProtocolVersion; 1] = [&TLS13];
static BOTH: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

const SUITES: [CipherSuite; 6] = [
    CipherSuite::TLS13_AES_256_GCM_SHA384,
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];

impl Policy {
    /// The rules for `versions` and `key_exchange`; certificates are valid by `clock`.
    pub fn new(versions: Versions, key_exchange: KeyExchange, clock: Arc<dyn Clock>) -> Self {
        let mut provider = aws_lc_rs::default_provider();
        provider
            .cipher_suites
            .retain(|suite| SUITES.contains(&suite.suite()));
        if key_exchange == KeyExchange::PostQuantum {
            provider
                .kx_groups
                .retain(|group| group.name() == NamedGroup::X25519MLKEM768);
        }
        Self {
            provider: Arc::new(provider),
            versions: match versions {
                Versions::Tls13 => &ONLY_13,
                Versions::Tls12And13 => &BOTH,
            },
            clock,
            revocations: Revocations::default(),
            names: Arc::default(),
        }
    }

    /// The same, where all of `names` are names of one trust domain, the mesh's own: what its roots vouch for under one of
    /// them counts under each. So a mesh changes its name while certificates of both are around.
    #[must_use]
    pub fn with_domain_names(mut self, names: impl IntoIterator<Item = TrustDomain>) -> Self {
        self.names = Arc::new(names.into_iter().collect());
        self
    }

    /// The other names of a trust domain.
    pub(super) fn other_names(&self, of: &TrustDomain) -> impl Iterator<Item = &TrustDomain> {
        let names = self.names.iter().filter(|_| self.names.contains(of));
        names.filter(move |name| *name != of)
    }

    /// Whether both are the same service account, by whichever of the trust domain's names.
    pub(super) fn is_same(&self, one: &Identity, other: &Identity) -> bool {
        let named = |it: &Identity| self.names.contains(&it.trust_domain);
        let domain = one.trust_domain == other.trust_domain || (named(one) && named(other));
        domain && one.namespace == other.namespace && one.service_account == other.service_account
    }

    /// Whether every connection is of TLS 1.3, so that its records are our own to seal and open.
    pub(super) fn is_only_13(&self) -> bool {
        self.versions.len() == ONLY_13.len()
    }

    /// The certificates that are refused whoever signed them; shared by the clones of this policy.
    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// The clock by which certificates are valid.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }
}

impl Default for Policy {
    /// TLS 1.3, default groups, the machine's clock.
    fn default() -> Self {
        Self::new(
            Versions::default(),
            KeyExchange::default(),
            Arc::new(SystemClock),
        )
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("versions", &self.versions)
            .field("clock", &self.clock)
            .finish_non_exhaustive()
    }
}
