//! An intermediate made by others, in Istio's layout of files or cert-manager's (control-plane.md 12).

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject as _};
use x509_parser::{prelude::FromDer as _, revocation_list::CertificateRevocationList};

use super::{
    authority::{Authority, Material, MaterialError},
    pem,
};

/// Names of the files: signing certificate, key, roots, and the rest of the chain where it is a file of its own.
struct Layout {
    certificate: &'static str,
    key: &'static str,
    roots: &'static str,
    chain: Option<&'static str>,
}

const ISTIO: Layout = Layout {
    certificate: "ca-cert.pem",
    key: "ca-key.pem",
    roots: "root-cert.pem",
    chain: Some("cert-chain.pem"),
};

const CERT_MANAGER: Layout = Layout {
    certificate: "tls.crt",
    key: "tls.key",
    roots: "ca.crt",
    chain: None,
};

/// The list of revoked certificates, which may stand beside either layout.
const REVOKED: &str = "ca-crl.pem";

/// Every file of both layouts.
pub(crate) const FILES: [&str; 8] = [
    ISTIO.certificate,
    ISTIO.key,
    ISTIO.roots,
    "cert-chain.pem",
    CERT_MANAGER.certificate,
    CERT_MANAGER.key,
    CERT_MANAGER.roots,
    REVOKED,
];

impl Layout {
    fn files(&self) -> impl Iterator<Item = &'static str> + use<> {
        let files = [self.certificate, self.key, self.roots];
        files.into_iter().chain(self.chain)
    }
}

/// Why the files are no certificate authority.
#[derive(Debug, thiserror::Error)]
pub enum PlugInError {
    /// Some of the files are there, or none.
    #[error("missing: {}", .0.join(", "))]
    Incomplete(Vec<&'static str>),
    /// Reading one.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file has no certificate, or one that does not parse.
    #[error("{0} holds no PEM certificates")]
    Certificates(&'static str),
    /// The list of revoked certificates is none.
    #[error("{REVOKED} holds no PEM list of revoked certificates")]
    Revoked,
    /// The key does not parse.
    #[error("{file} holds no usable PEM private key")]
    Key {
        /// Which file.
        file: &'static str,
        /// The cause.
        source: rcgen::Error,
    },
    /// They do not work together.
    #[error("use the files together")]
    Material(#[from] MaterialError),
}

/// Reads and checks the files in `dir`.
pub fn load(dir: &Path) -> Result<Authority, PlugInError> {
    let layout = match (missing(dir, &ISTIO), missing(dir, &CERT_MANAGER)) {
        (none, _) if none.is_empty() => ISTIO,
        (_, none) if none.is_empty() => CERT_MANAGER,
        // What is there tells which layout was meant.
        (istio, other) if other.len() == CERT_MANAGER.files().count() => {
            return Err(PlugInError::Incomplete(istio));
        }
        (_, other) => return Err(PlugInError::Incomplete(other)),
    };
    let key_text = read(dir, layout.key)?;
    warn_if_exposed(&dir.join(layout.key));
    let key = KeyPair::from_pem(&key_text).map_err(|source| PlugInError::Key {
        file: layout.key,
        source,
    })?;
    let mut chain = certificates(dir, layout.certificate)?;
    let certificate = chain.remove(0);
    if let Some(file) = layout.chain {
        chain.extend(certificates(dir, file)?);
    }
    let roots = certificates(dir, layout.roots)?;
    let authority = Authority::new(Material {
        key,
        certificate,
        chain,
        roots,
    })?;
    Ok(authority.with_revoked(revoked(dir)?))
}

fn revoked(dir: &Path) -> Result<Option<Arc<str>>, PlugInError> {
    if !dir.join(REVOKED).exists() {
        return Ok(None);
    }
    let text = read(dir, REVOKED)?;
    let lists: Result<Vec<_>, _> =
        CertificateRevocationListDer::pem_slice_iter(text.as_bytes()).collect();
    let lists = lists.map_err(|_| PlugInError::Revoked)?;
    let is_read =
        |list: &CertificateRevocationListDer<'_>| CertificateRevocationList::from_der(list).is_ok();
    match !lists.is_empty() && lists.iter().all(is_read) {
        true => Ok(Some(text.into())),
        false => Err(PlugInError::Revoked),
    }
}

fn missing(dir: &Path, layout: &Layout) -> Vec<&'static str> {
    let files = layout.files();
    files.filter(|file| !dir.join(file).exists()).collect()
}

fn read(dir: &Path, file: &'static str) -> Result<String, PlugInError> {
    let path = dir.join(file);
    fs::read_to_string(&path).map_err(|source| PlugInError::Read { path, source })
}

/// At least one.
fn certificates(
    dir: &Path,
    file: &'static str,
) -> Result<Vec<CertificateDer<'static>>, PlugInError> {
    let text = read(dir, file)?;
    match pem::certificates(text.as_bytes()) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(PlugInError::Certificates(file)),
    }
}

/// Only a warning: a mounted Kubernetes Secret is readable within its pod by default.
fn warn_if_exposed(path: &Path) {
    let mode = fs::metadata(path).map_or(0, |known| known.permissions().mode() & 0o777);
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), mode = format_args!("{mode:o}"), "the signing key may be read by others");
    }
}
