//! What a certificate signing request (RFC 2986) must be. Only its key is ever used; names in it are not even read.

use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use x509_parser::{
    certification_request::X509CertificationRequest, prelude::FromDer as _, public_key::PublicKey,
};

/// No request of an allowed key is longer.
const MAX_BYTES: usize = 32 * 1024;
const MIN_RSA_BITS: usize = 2048;
const MAX_RSA_BITS: usize = 8192;
/// Bits of the curves that are allowed.
const CURVES: [usize; 2] = [256, 384];

/// A request whose key is of an allowed kind and signed it.
#[derive(Debug)]
pub struct Csr {
    public_key: SubjectPublicKeyInfo,
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// Too long to be one.
    #[error("{0} bytes are no request for a certificate")]
    TooLong(usize),
    /// No PEM block `CERTIFICATE REQUEST`.
    #[error("read the PEM of the request")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// Not the structure of a request.
    #[error("parse the request")]
    Parse(#[source] x509_parser::nom::Err<x509_parser::error::X509Error>),
    /// Bytes after it.
    #[error("{0} bytes follow the request")]
    Trailing(usize),
    /// Its sender does not have the key.
    #[error("check the request's signature")]
    Signature(#[source] x509_parser::error::X509Error),
    /// A key that we do not sign.
    #[error("a key of kind {0}; allowed are EC P-256 and P-384, RSA of 2048 to 8192 bits")]
    Key(String),
    /// A key that cannot be written into a certificate.
    #[error("take over the request's key")]
    KeyForm(#[source] rcgen::Error),
}

impl Csr {
    /// Parses PEM text and checks the request.
    pub fn parse(text: &str) -> Result<Self, CsrError> {
        if text.len() > MAX_BYTES {
            return Err(CsrError::TooLong(text.len()));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(text.as_bytes());
        let der = der.map_err(CsrError::Pem)?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(CsrError::Parse)?;
        if !rest.is_empty() {
            return Err(CsrError::Trailing(rest.len()));
        }
        let key = &request.certification_request_info.subject_pki;
        if let Some(kind) = refused(&key.parsed()) {
            return Err(CsrError::Key(kind));
        }
        request.verify_signature().map_err(CsrError::Signature)?;
        let public_key = SubjectPublicKeyInfo::from_der(key.raw).map_err(CsrError::KeyForm)?;
        Ok(Self { public_key })
    }

    pub(super) fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public_key
    }
}

/// What a key is, if it is not allowed.
fn refused(key: &Result<PublicKey<'_>, x509_parser::error::X509Error>) -> Option<String> {
    match key {
        Ok(PublicKey::EC(point)) if CURVES.contains(&point.key_size()) => None,
        Ok(PublicKey::RSA(rsa)) if (MIN_RSA_BITS..=MAX_RSA_BITS).contains(&rsa.key_size()) => None,
        Ok(PublicKey::EC(point)) => Some(format!("EC with {} bits", point.key_size())),
        Ok(PublicKey::RSA(rsa)) => Some(format!("RSA with {} bits", rsa.key_size())),
        Ok(_) => Some("neither EC nor RSA".to_owned()),
        Err(error) => Some(format!("unreadable ({error})")),
    }
}
