//! A root of our own, wherever it is kept.

use mesh::identity::TrustDomain;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use super::{authority::serial_number, pem};

/// Ten years, as upstream.
pub(crate) const LIFETIME: Duration = Duration::days(3650);

/// A new root and its key, as PEM.
pub(crate) struct Root {
    pub(crate) key: String,
    pub(crate) certificate: String,
}

/// Makes a key (EC P-256) and a certificate for it, signed by itself.
pub(crate) fn generate(
    trust_domain: &TrustDomain,
    now: OffsetDateTime,
) -> Result<Root, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.not_before = now - Duration::minutes(2);
    params.not_after = now + LIFETIME;
    params.serial_number = Some(serial_number());
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain.as_str());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?;
    Ok(Root {
        key: key.serialize_pem(),
        certificate: pem::certificate(certificate.der()),
    })
}
