//! PEM text (RFC 7468), written and read.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

/// One `CERTIFICATE` block.
pub(crate) fn certificate(der: &[u8]) -> String {
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let body = STANDARD.encode(der);
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = more;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// Several blocks, one after the other.
pub(crate) fn bundle(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|der| certificate(der)).collect()
}

/// Every `CERTIFICATE` block of a text, in order. `Err` if one does not parse.
pub(crate) fn certificates(
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, rustls_pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(text).collect()
}
