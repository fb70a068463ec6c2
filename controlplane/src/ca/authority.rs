//! The signing key and what it signs.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use mesh::identity::Identity;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::{RootCertStore, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{csr::Csr, pem};

/// Peers' clocks may be behind ours.
const BACKDATE: Duration = Duration::from_secs(120);

/// A signing certificate with its key, chain and roots, checked to work together.
pub struct Authority {
    issuer: Arc<Issuer<'static, KeyPair>>,
    not_after: OffsetDateTime,
    root_not_after: OffsetDateTime,
    /// From the signing certificate up, without roots.
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    /// PEM of the certificates that its makers have taken back.
    revoked: Option<Arc<str>>,
    default_ttl: Duration,
    max_ttl: Duration,
}

/// What an authority is made of.
pub(crate) struct Material {
    pub(crate) key: KeyPair,
    pub(crate) certificate: CertificateDer<'static>,
    /// Certificates between the signing one and the roots; those among the roots are left out.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
}

/// Why a key and certificates do not make an authority.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// A certificate does not parse.
    #[error("parse the {what}")]
    Parse {
        /// Which.
        what: &'static str,
        /// The cause.
        source: x509_parser::nom::Err<x509_parser::error::X509Error>,
    },
    /// The key is another certificate's.
    #[error("the key is not that of the signing certificate")]
    KeyMismatch,
    /// It may not sign certificates.
    #[error("the signing certificate is not a CA certificate that may sign certificates")]
    NotACa,
    /// Its time is over.
    #[error("the signing certificate ended at {0}")]
    Expired(OffsetDateTime),
    /// No roots.
    #[error("there is no root certificate")]
    NoRoot,
    /// The issuer cannot be rebuilt from its certificate.
    #[error("use the signing certificate")]
    Issuer(#[source] rcgen::Error),
    /// What it signs would not be believed.
    #[error("a certificate signed by it does not verify against the roots")]
    Chain(#[source] rustls::Error),
    /// A root cannot be used.
    #[error("use the roots")]
    Roots(#[source] rustls::Error),
    /// The probe could not be signed.
    #[error("sign a probe")]
    Probe(#[source] SignError),
}

/// Why a certificate is not issued.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// Longer than allowed.
    #[error("a lifetime of {asked:?} is longer than the longest, {longest:?}")]
    TtlTooLong {
        /// What was asked for.
        asked: Duration,
        /// What may be.
        longest: Duration,
    },
    /// Our own certificate is over.
    #[error("the signing certificate ended at {0}")]
    Expired(OffsetDateTime),
    /// A name cannot stand in a certificate.
    #[error("write the name {0:?}")]
    Name(String),
    /// The signature.
    #[error("sign")]
    Sign(#[source] rcgen::Error),
}

/// A signed certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate itself.
    pub leaf: CertificateDer<'static>,
    /// What stands between it and the roots.
    pub chain: Vec<CertificateDer<'static>>,
    /// Since when.
    pub not_before: OffsetDateTime,
    /// Until when.
    pub not_after: OffsetDateTime,
}

impl Authority {
    pub(crate) fn new(material: Material) -> Result<Self, MaterialError> {
        let Material {
            key,
            certificate,
            chain,
            roots,
        } = material;
        let signer = parse("signing certificate", &certificate)?;
        if signer.public_key().raw != key.subject_public_key_info() {
            return Err(MaterialError::KeyMismatch);
        }
        let may_sign = signer.key_usage().ok().flatten();
        if !signer.is_ca() || may_sign.is_some_and(|usage| !usage.value.key_cert_sign()) {
            return Err(MaterialError::NotACa);
        }
        let not_after = signer.validity().not_after.to_datetime();
        let mut root_ends = Vec::new();
        for root in &roots {
            root_ends.push(parse("root", root)?.validity().not_after.to_datetime());
        }
        let root_not_after = *root_ends.iter().max().ok_or(MaterialError::NoRoot)?;
        let whole =
            std::iter::once(&certificate).chain(chain.iter().filter(|c| **c != certificate));
        let chain = whole
            .filter(|link| !roots.contains(link))
            .cloned()
            .collect();
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(MaterialError::Issuer)?;
        let authority = Self {
            issuer: Arc::new(issuer),
            not_after,
            root_not_after,
            chain,
            roots,
            revoked: None,
            default_ttl: Duration::from_secs(24 * 3600),
            max_ttl: Duration::from_secs(90 * 24 * 3600),
        };
        authority.probe()?;
        Ok(authority)
    }

    /// With a list (PEM) of the certificates that its makers have taken back.
    pub(crate) fn with_revoked(self, revoked: Option<Arc<str>>) -> Self {
        Self { revoked, ..self }
    }

    /// The list (PEM) of the certificates that its makers have taken back, where there is one.
    pub(crate) fn revoked_pem(&self) -> Option<Arc<str>> {
        self.revoked.clone()
    }

    pub(crate) fn with_lifetimes(self, default_ttl: Duration, max_ttl: Duration) -> Self {
        Self {
            default_ttl,
            max_ttl,
            ..self
        }
    }

    /// A workload's certificate: its SPIFFE ID is the only name, the subject is empty, and nothing of the request but
    /// its key is used (SPIFFE X509-SVID 2 to 4; control-plane.md 12). `ttl` of `None` or zero means the default; the
    /// end is never after the signer's.
    pub fn workload(
        &self,
        csr: &Csr,
        identity: &Identity,
        ttl: Option<Duration>,
        now: OffsetDateTime,
    ) -> Result<Issued, SignError> {
        let asked = ttl.filter(|ttl| !ttl.is_zero()).unwrap_or(self.default_ttl);
        if asked > self.max_ttl {
            return Err(SignError::TtlTooLong {
                asked,
                longest: self.max_ttl,
            });
        }
        let name = identity.to_string();
        let uri = name
            .as_str()
            .try_into()
            .map_err(|_| SignError::Name(name.clone()))?;
        self.sign(csr.public_key(), vec![SanType::URI(uri)], asked, now)
    }

    /// A server's certificate for DNS names and IP addresses, with a new key that never leaves this process.
    pub fn server(
        &self,
        names: &[String],
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<(Issued, KeyPair), SignError> {
        let key = KeyPair::generate().map_err(SignError::Sign)?;
        let names = names.iter().map(|name| match name.parse::<IpAddr>() {
            Ok(address) => Ok(SanType::IpAddress(address)),
            Err(_) => match name.as_str().try_into() {
                Ok(dns) => Ok(SanType::DnsName(dns)),
                Err(_) => Err(SignError::Name(name.clone())),
            },
        });
        let names = names.collect::<Result<_, _>>()?;
        let issued = self.sign(&key, names, ttl, now)?;
        Ok((issued, key))
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<Issued, SignError> {
        if now >= self.not_after {
            return Err(SignError::Expired(self.not_after));
        }
        let mut params = CertificateParams::default();
        params.not_before = now - BACKDATE;
        params.not_after = (now + ttl).min(self.not_after);
        params.serial_number = Some(serial_number());
        params.subject_alt_names = names;
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let certificate = params
            .signed_by(key, &*self.issuer)
            .map_err(SignError::Sign)?;
        Ok(Issued {
            leaf: certificate.der().clone(),
            chain: self.chain.clone(),
            not_before: params.not_before,
            not_after: params.not_after,
        })
    }

    /// Whether what it signs verifies against its own roots: finds a wrong root, a broken chain, a name that does not
    /// survive re-encoding, all before the first workload does.
    fn probe(&self) -> Result<(), MaterialError> {
        let now = OffsetDateTime::now_utc();
        if now >= self.not_after {
            return Err(MaterialError::Expired(self.not_after));
        }
        let probe = self.server(&["probe.invalid".to_owned()], BACKDATE, now);
        let (probe, _) = probe.map_err(MaterialError::Probe)?;
        self.verify(&probe)
    }

    /// Whether whoever trusts these roots believes what `other` signs.
    pub(crate) fn vouches_for(&self, other: &Self) -> bool {
        let now = OffsetDateTime::now_utc();
        let probe = other.server(&["probe.invalid".to_owned()], BACKDATE, now);
        probe.is_ok_and(|(probe, _)| self.verify(&probe).is_ok())
    }

    /// Whether its signing certificate is over.
    pub(crate) fn has_ended(&self, now: OffsetDateTime) -> bool {
        now >= self.not_after
    }

    /// The same signer, with the roots of `other` beside its own.
    pub(crate) fn trusting(&self, other: &Self) -> Self {
        let mut roots = self.roots.clone();
        let more = other.roots.iter().filter(|root| !self.roots.contains(root));
        roots.extend(more.cloned());
        Self {
            issuer: self.issuer.clone(),
            not_after: self.not_after,
            root_not_after: self.root_not_after.max(other.root_not_after),
            chain: self.chain.clone(),
            roots,
            revoked: other.revoked.clone(),
            default_ttl: self.default_ttl,
            max_ttl: self.max_ttl,
        }
    }

    fn verify(&self, probe: &Issued) -> Result<(), MaterialError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = Arc::new(self.root_store().map_err(MaterialError::Roots)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|error| MaterialError::Roots(rustls::Error::General(error.to_string())))?;
        verifier
            .verify_client_cert(&probe.leaf, &probe.chain, UnixTime::now())
            .map_err(MaterialError::Chain)?;
        Ok(())
    }

    /// The roots, as rustls wants them.
    pub fn root_store(&self) -> Result<RootCertStore, rustls::Error> {
        let mut store = RootCertStore::empty();
        for root in &self.roots {
            store.add(root.clone())?;
        }
        Ok(store)
    }

    /// All roots.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// All roots as PEM.
    pub fn roots_pem(&self) -> String {
        pem::bundle(&self.roots)
    }

    /// When the last root and the signing certificate end, in seconds since the epoch.
    pub fn expiries(&self) -> (i64, i64) {
        (
            self.root_not_after.unix_timestamp(),
            self.not_after.unix_timestamp(),
        )
    }

    /// The chain as the certificate service sends it: leaf, intermediates one per element, last the bundle of roots.
    pub fn response(&self, issued: &Issued) -> Vec<String> {
        let own = std::iter::once(&issued.leaf).chain(&issued.chain);
        let certificates = own.map(|der| pem::certificate(der));
        certificates.chain([self.roots_pem()]).collect()
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// 127 random bits: positive, and unique without a counter on disk.
pub(super) fn serial_number() -> SerialNumber {
    let mut bytes = rand::random::<[u8; 16]>();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn parse<'a>(
    what: &'static str,
    der: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, MaterialError> {
    let parsed = X509Certificate::from_der(der);
    let (_, certificate) = parsed.map_err(|source| MaterialError::Parse { what, source })?;
    Ok(certificate)
}
