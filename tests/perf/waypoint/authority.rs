//! Who everyone is: one root, and certificates for the client, the endpoint and both proxies.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use mesh::identity::{Identity, TrustDomain};
use net::tls::{Policy, TrustBundle, WorkloadCertificate};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

const DAY: Duration = Duration::from_secs(86_400);

/// A root with its key.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    policy: Policy,
}

impl Authority {
    pub(crate) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        let now = SystemTime::now();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - DAY).into();
        params.not_after = (now + DAY * 10).into();
        Ok(Self {
            issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)?,
            policy: Policy::default(),
        })
    }

    fn leaf(&self, identity: &Identity, key: &impl PublicKeyData) -> Result<rcgen::Certificate> {
        let mut params = CertificateParams::default();
        let now = SystemTime::now();
        params.not_before = (now - DAY / 24).into();
        params.not_after = (now + DAY).into();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().as_str().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        Ok(params.signed_by(key, &self.issuer)?)
    }

    /// The answer to a request for a certificate: the leaf, and the root.
    pub(crate) fn answer(&self, identity: &Identity, request: &str) -> Result<Vec<String>> {
        let request = CertificateSigningRequestParams::from_pem(request)?;
        let leaf = self.leaf(identity, &request.public_key)?;
        Ok(vec![leaf.pem(), self.issuer.pem()])
    }

    /// A certificate of a party in this process.
    pub(crate) fn certificate(&self, identity: &Identity) -> Result<Arc<WorkloadCertificate>> {
        let key = KeyPair::generate()?;
        let leaf: CertificateDer<'static> = self.leaf(identity, &key)?.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let domain = identity.trust_domain.clone();
        let trust = TrustBundle::from_pem(domain, self.issuer.pem().as_bytes())?;
        let certificate = WorkloadCertificate::new(&self.policy, vec![leaf], key, trust);
        Ok(Arc::new(certificate.context("a certificate")?))
    }

    /// `cert.pem`, `key.pem` and `root.pem` of a party that reads files.
    pub(crate) fn write(&self, identity: &Identity, folder: &Path) -> Result<()> {
        let key = KeyPair::generate()?;
        let leaf = self.leaf(identity, &key)?;
        for (name, text) in [
            ("cert.pem", leaf.pem()),
            ("key.pem", key.serialize_pem()),
            ("root.pem", self.issuer.pem()),
        ] {
            std::fs::write(folder.join(name), text)?;
        }
        Ok(())
    }
}

/// An account of the namespace `shop`.
pub(crate) fn account(name: &str) -> Identity {
    Identity {
        trust_domain: TrustDomain::default(),
        namespace: "shop".into(),
        service_account: name.into(),
    }
}
