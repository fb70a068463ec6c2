//! One generation of a workload's certificate, and the TLS configurations made from it.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use mesh::identity::Identity;
use parking_lot::Mutex;
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    server::{NoServerSessionStorage, VerifierBuilderError},
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    policy::Policy,
    revocation::CertificateId,
    trust::TrustBundle,
    verify::{
        ClientVerifier, PeerCertificateError, ServerVerifier, Verifier, leaf_identity, time_of,
    },
};
use crate::clock::TlsTime;

/// How many client configurations (one per set of expected identities) a generation keeps.
const CLIENT_CONFIGS: usize = 1024;

static GENERATIONS: AtomicU64 = AtomicU64::new(1);

/// A workload's certificate, the handle of its key, and the roots it trusts. One value is one generation.
///
/// The key can sign handshakes and nothing else: it is neither printed nor exported.
pub struct WorkloadCertificate {
    generation: u64,
    identity: Identity,
    not_before: SystemTime,
    not_after: SystemTime,
    key: Arc<CertifiedKey>,
    trust: TrustBundle,
    policy: Policy,
    verifier: Arc<Verifier>,
    server: OnceLock<Arc<ServerConfig>>,
    clients: Mutex<HashMap<Arc<[Identity]>, Arc<ClientConfig>>>,
}

/// A certificate as `config_dump` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PemCertificate {
    /// Base64 of the PEM text.
    pub pem: String,
    /// Decimal.
    pub serial_number: String,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
}

/// A chain, key and roots that do not make a workload certificate.
#[derive(Debug, thiserror::Error)]
pub enum BuildCertificateError {
    /// There is no leaf.
    #[error("the certificate chain is empty")]
    Empty,
    /// The leaf is not one that peers would accept.
    #[error("the leaf certificate is unusable")]
    Leaf(#[source] PeerCertificateError),
    /// The key cannot be used, or is not the leaf's.
    #[error("the private key is unusable")]
    Key(#[source] rustls::Error),
    /// The roots cannot verify anything.
    #[error("the roots are unusable")]
    Roots(#[source] VerifierBuilderError),
}

impl WorkloadCertificate {
    /// Binds `chain` (leaf first, then intermediates, no root) to its `key` and to the roots of its peers.
    pub fn new(
        policy: &Policy,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        trust: TrustBundle,
    ) -> Result<Self, BuildCertificateError> {
        let leaf = chain.first().ok_or(BuildCertificateError::Empty)?;
        let own = leaf_identity(leaf).map_err(BuildCertificateError::Leaf)?;
        let not_before = shown(leaf)
            .ok_or(BuildCertificateError::Leaf(PeerCertificateError::Malformed))?
            .not_before;
        // Peers refuse a chain as soon as any part of it has expired.
        let ends = chain.iter().filter_map(shown).map(|it| it.not_after);
        let not_after = ends.min().unwrap_or(own.not_after);
        let key = CertifiedKey::from_der(chain, key, &policy.provider)
            .map_err(BuildCertificateError::Key)?;
        let verifier = Verifier::new(&trust, policy).map_err(BuildCertificateError::Roots)?;
        Ok(Self {
            generation: GENERATIONS.fetch_add(1, Ordering::Relaxed),
            identity: own.identity,
            not_before,
            not_after,
            key: Arc::new(key),
            trust,
            policy: policy.clone(),
            verifier: Arc::new(verifier),
            server: OnceLock::new(),
            clients: Mutex::default(),
        })
    }

    /// Unique in this process; a later certificate has a higher one.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Who the certificate speaks for.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// When it begins.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When it ends, or an intermediate that vouches for it if that is earlier.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether it may be used now, by the policy's clock.
    pub fn is_valid(&self) -> bool {
        let now = self.policy.clock.wall();
        self.not_before <= now && now < self.not_after
    }

    /// The rules of TLS that it is used under.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The roots that vouch for peers.
    pub fn trust(&self) -> &TrustBundle {
        &self.trust
    }

    /// Leaf and intermediates, as revocations name them.
    pub fn certificate_ids(&self) -> impl Iterator<Item = CertificateId> {
        self.key.cert.iter().filter_map(CertificateId::of)
    }

    /// Leaf and intermediates, as `config_dump` shows them.
    pub fn chain(&self) -> Vec<PemCertificate> {
        self.key.cert.iter().filter_map(shown).collect()
    }

    /// The roots, as `config_dump` shows them.
    pub fn roots(&self) -> Vec<PemCertificate> {
        self.trust.certificates().filter_map(shown).collect()
    }

    /// The configuration for accepting peers, made on first use and shared after.
    ///
    /// A client certificate is required. ALPN is `h2`; a client that offers none is tolerated (peers do), one that
    /// offers only others is refused. No resumption.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(self.server.get_or_init(|| Arc::new(self.make_server())))
    }

    /// The configuration for dialling a peer that must be one of `expected`, made once per set and shared.
    ///
    /// An empty set matches nobody, so every handshake fails. The order of `expected` is part of the set's name.
    pub fn client_config(&self, expected: &Arc<[Identity]>) -> Arc<ClientConfig> {
        let mut clients = self.clients.lock();
        if let Some(config) = clients.get(expected) {
            return Arc::clone(config);
        }
        if clients.len() >= CLIENT_CONFIGS {
            clients.clear();
        }
        let config = Arc::new(self.make_client(Arc::clone(expected)));
        clients.insert(Arc::clone(expected), Arc::clone(&config));
        config
    }

    fn make_server(&self) -> ServerConfig {
        let time = Arc::new(TlsTime(Arc::clone(&self.policy.clock)));
        let builder = ServerConfig::builder_with_details(Arc::clone(&self.policy.provider), time);
        let mut config = builder
            .with_protocol_versions(self.policy.versions)
            .expect("every policy has suites and groups for its versions")
            .with_client_cert_verifier(Arc::new(ClientVerifier(Arc::clone(&self.verifier))))
            .with_cert_resolver(self.resolver());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = self.policy.is_only_13();
        config
    }

    fn make_client(&self, expected: Arc<[Identity]>) -> ClientConfig {
        let time = Arc::new(TlsTime(Arc::clone(&self.policy.clock)));
        let verifier = ServerVerifier {
            verifier: Arc::clone(&self.verifier),
            expected,
        };
        let builder = ClientConfig::builder_with_details(Arc::clone(&self.policy.provider), time);
        let mut config = builder
            .with_protocol_versions(self.policy.versions)
            .expect("every policy has suites and groups for its versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(self.resolver());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.enable_secret_extraction = self.policy.is_only_13();
        config
    }

    fn resolver(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(Arc::clone(&self.key)))
    }
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("generation", &self.generation)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn shown(der: &CertificateDer<'static>) -> Option<PemCertificate> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    Some(PemCertificate {
        pem: BASE64.encode(pem_text(der)),
        serial_number: parsed.tbs_certificate.serial.to_string(),
        not_before: time_of(parsed.validity().not_before.timestamp()),
        not_after: time_of(parsed.validity().not_after.timestamp()),
    })
}

/// RFC 7468 2: lines of 64 characters.
fn pem_text(der: &[u8]) -> String {
    let body = BASE64.encode(der);
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in body.as_bytes().chunks(64) {
        text.extend(line.iter().copied().map(char::from));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}
