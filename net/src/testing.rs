//! What tests share, other crates' too: a CA, with roots and leaves of any names, times and uses, good and bad, and what is looked
//! at.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use mesh::identity::{Identity, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PublicKeyData, RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    DigitallySignedStruct, NamedGroup, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

use x509_parser::prelude::{FromDer, X509Certificate};

mod observe;
mod rights;

pub use observe::{
    Output, assert_line, encoded, lines, refusing, sockets_of, tcp_and_udp, tcp_pair,
};
pub use rights::without_network_rights;

use crate::{
    ca::{Issuer, Issuing},
    tls::{PeerIdentity, Policy, TrustBundle, WorkloadCertificate},
};

/// A root of one trust domain, with its key.
pub struct TestCa {
    domain: TrustDomain,
    issuer: CertifiedIssuer<'static, KeyPair>,
    policy: Policy,
    lifetime: Duration,
    issued: AtomicUsize,
}

/// What is in a leaf.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// URI names, in order. A good leaf has one.
    pub uris: Vec<String>,
    /// DNS names.
    pub dns: Vec<String>,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
    /// Extended key usage; none leaves the extension out.
    pub uses: Vec<ExtendedKeyUsagePurpose>,
}

/// Who TLS would have shown, where a test has none below.
///
/// # Panics
/// One of the names is none.
pub fn peer(namespace: &str, service_account: &str) -> PeerIdentity {
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{service_account}");
    PeerIdentity {
        identity: identity.parse().expect("an identity"),
        not_after: SystemTime::now(),
        chain: Arc::from([]),
    }
}

impl TestCa {
    /// A new root for `domain`. Certificates run by the clock of `policy`.
    pub fn new(domain: &str, policy: &Policy) -> Self {
        let key = KeyPair::generate().expect("keys can be made");
        let params = authority("test root", policy, Duration::from_secs(10 * 365 * 86_400));
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a root can be made");
        Self::of(domain.parse().expect("tests name a domain"), issuer, policy)
    }

    /// An authority below this one, whose own certificate lives for `lifetime`. It signs leaves, and is no root.
    pub fn intermediate(&self, lifetime: Duration) -> Self {
        let key = KeyPair::generate().expect("keys can be made");
        let params = authority("test intermediate", &self.policy, lifetime);
        let issuer = CertifiedIssuer::signed_by(params, key, &self.issuer);
        let issuer = issuer.expect("an intermediate can be signed");
        Self::of(self.domain.clone(), issuer, &self.policy).with_lifetime(self.lifetime)
    }

    fn of(domain: TrustDomain, issuer: CertifiedIssuer<'static, KeyPair>, policy: &Policy) -> Self {
        Self {
            domain,
            issuer,
            policy: policy.clone(),
            lifetime: Duration::from_secs(86_400),
            issued: AtomicUsize::new(0),
        }
    }

    /// Its own certificate.
    pub fn own(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    /// The same, whose leaves live for `lifetime`.
    pub fn with_lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// The root, in PEM.
    pub fn root_pem(&self) -> String {
        self.issuer.pem()
    }

    /// Trust in this root, for its domain alone.
    pub fn trust(&self) -> TrustBundle {
        TrustBundle::from_pem(self.domain.clone(), self.root_pem().as_bytes())
            .expect("the root is one")
    }

    /// How many leaves it has signed.
    pub fn issued(&self) -> usize {
        self.issued.load(Ordering::SeqCst)
    }

    /// The identity of a service account in this domain.
    pub fn identity(&self, namespace: &str, service_account: &str) -> Identity {
        Identity {
            trust_domain: self.domain.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    /// A good leaf, to be changed.
    pub fn leaf(&self, identity: &Identity) -> Leaf {
        let now = self.policy.clock().wall();
        Leaf {
            uris: vec![identity.to_string()],
            dns: Vec::new(),
            not_before: now,
            not_after: now + self.lifetime,
            uses: vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        }
    }

    /// Signs `leaf` for a new key.
    pub fn sign(&self, leaf: &Leaf) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().expect("keys can be made");
        let certificate = self.sign_for(leaf, &key);
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        (certificate, PrivateKeyDer::Pkcs8(key))
    }

    /// Signs `leaf` for somebody's key, such as a CSR's.
    pub fn sign_for(&self, leaf: &Leaf, key: &impl PublicKeyData) -> CertificateDer<'static> {
        self.issued.fetch_add(1, Ordering::SeqCst);
        let mut params = CertificateParams::new(leaf.dns.clone()).expect("tests use DNS names");
        params.distinguished_name = DistinguishedName::new();
        for uri in &leaf.uris {
            let uri = uri.as_str().try_into().expect("tests use ASCII names");
            params.subject_alt_names.push(SanType::URI(uri));
        }
        params.not_before = leaf.not_before.into();
        params.not_after = leaf.not_after.into();
        params.extended_key_usages.clone_from(&leaf.uses);
        let signed = params.signed_by(key, &self.issuer);
        signed.expect("a leaf can be signed").der().clone()
    }

    /// A list that takes these leaves back, in PEM.
    pub fn revoke(&self, leaves: &[&CertificateDer<'_>]) -> String {
        let now = self.policy.clock().wall();
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + self.lifetime).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: leaves.iter().map(|leaf| revoked(leaf, now)).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).expect("a list can be signed");
        list.pem().expect("DER becomes PEM")
    }

    /// A good certificate of `identity`, trusting this CA.
    pub fn certificate(&self, identity: &Identity) -> Arc<WorkloadCertificate> {
        Arc::new(self.build(identity))
    }

    fn build(&self, identity: &Identity) -> WorkloadCertificate {
        let (leaf, key) = self.sign(&self.leaf(identity));
        WorkloadCertificate::new(&self.policy, vec![leaf], key, self.trust())
            .expect("leaf, key and root fit")
    }
}

fn authority(name: &str, policy: &Policy, lifetime: Duration) -> CertificateParams {
    let now = policy.clock().wall();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - Duration::from_secs(3600)).into();
    params.not_after = (now + lifetime).into();
    params
}

fn revoked(leaf: &CertificateDer<'_>, now: SystemTime) -> RevokedCertParams {
    let (_, parsed) = X509Certificate::from_der(leaf).expect("a leaf is a certificate");
    RevokedCertParams {
        serial_number: SerialNumber::from_slice(parsed.raw_serial()),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    }
}

impl Issuer for TestCa {
    fn issue(&self, identity: Identity) -> Issuing {
        let made = self.build(&identity);
        Box::pin(async move { Ok(made) })
    }
}

impl fmt::Debug for TestCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestCa")
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

/// A client's TLS that presents anything, or nothing, and takes any server: for tests of what a server refuses.
pub fn reckless_client(
    presents: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    alpn: &[&[u8]],
) -> Arc<rustls::ClientConfig> {
    reckless_client_with(presents, alpn, &[])
}

/// As [`reckless_client`], of a library that knows no post-quantum key exchange.
pub fn reckless_classic_client(
    presents: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    alpn: &[&[u8]],
) -> Arc<rustls::ClientConfig> {
    reckless_client_with(presents, alpn, &[NamedGroup::X25519])
}

/// As [`reckless_client`], offering only `groups` for the key exchange where any are named.
pub fn reckless_client_with(
    presents: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    alpn: &[&[u8]],
    groups: &[NamedGroup],
) -> Arc<rustls::ClientConfig> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    if !groups.is_empty() {
        provider.kx_groups.retain(|g| groups.contains(&g.name()));
    }
    let provider = Arc::new(provider);
    let algorithms = provider.signature_verification_algorithms;
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider supports them")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(algorithms)));
    let mut config = match presents {
        Some((leaf, key)) => builder
            .with_client_auth_cert(vec![leaf], key)
            .expect("the key is the leaf's"),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

#[derive(Debug)]
struct AnyServer(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
