//! Certificates that their authority has taken back before their time (RFC 5280 5).
//!
//! The list comes from a file that the operator mounts beside the roots, and is trusted as these are: signatures and
//! `nextUpdate` are not looked at, so that a list that is late revokes no less.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use tokio::sync::watch;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

/// A certificate by its issuer's name (DER) and its serial number: unique (RFC 5280 4.1.2.2).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CertificateId {
    issuer: Box<[u8]>,
    serial: Box<[u8]>,
}

impl CertificateId {
    fn new(issuer: &[u8], serial: &[u8]) -> Self {
        Self {
            issuer: issuer.into(),
            serial: serial.into(),
        }
    }

    /// Of a certificate in DER; none if it cannot be parsed.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        Some(Self::new(parsed.issuer().as_raw(), parsed.raw_serial()))
    }

    /// The serial number in hexadecimal, for logs.
    pub fn serial(&self) -> String {
        self.serial
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Which end of a handshake a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerEnd {
    /// It dialled us.
    Client,
    /// We dialled it.
    Server,
}

/// A file that is no list of revoked certificates.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevocationListError {
    /// Neither PEM blocks `X509 CRL` nor one list in DER.
    #[error("neither an X509 CRL in PEM nor one in DER")]
    NoList,
    /// One of the lists cannot be read.
    #[error("list {position} cannot be parsed")]
    Malformed {
        /// From 1.
        position: usize,
    },
}

/// The revoked certificates, shared by everyone who verifies. Cheap to clone; none are revoked in a new one.
#[derive(Clone)]
pub struct Revocations(Arc<Inner>);

struct Inner {
    revoked: ArcSwap<HashSet<CertificateId>>,
    version: watch::Sender<u64>,
    refused_clients: AtomicU64,
    refused_servers: AtomicU64,
}

impl Default for Revocations {
    fn default() -> Self {
        Self(Arc::new(Inner {
            revoked: ArcSwap::default(),
            version: watch::Sender::new(0),
            refused_clients: AtomicU64::new(0),
            refused_servers: AtomicU64::new(0),
        }))
    }
}

impl Revocations {
    /// Takes the place of all that was revoked. PEM with any number of lists, or one in DER; empty: none are revoked.
    ///
    /// # Errors
    /// If any list in it cannot be read; what was revoked stays so.
    pub fn replace(&self, file: &[u8]) -> Result<usize, RevocationListError> {
        let revoked = parse(file)?;
        let count = revoked.len();
        self.0.revoked.store(Arc::new(revoked));
        self.0.version.send_modify(|version| *version += 1);
        Ok(count)
    }

    /// The first certificate of a chain that is revoked.
    pub fn find<'a>(&self, chain: &'a [CertificateId]) -> Option<&'a CertificateId> {
        let revoked = self.0.revoked.load();
        match revoked.is_empty() {
            true => None,
            false => chain.iter().find(|id| revoked.contains(*id)),
        }
    }

    /// Resolves once a certificate of the chain is revoked. Cancel-safe.
    pub async fn until_revoked(&self, chain: &[CertificateId]) {
        let mut version = self.0.version.subscribe();
        while self.find(chain).is_none() {
            if version.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// How many handshakes were refused because of them.
    pub fn refused(&self, end: PeerEnd) -> u64 {
        self.counter(end).load(Ordering::Relaxed)
    }

    /// Checks a chain that is being verified; the serial number of what is revoked.
    pub(super) fn refuse(&self, chain: &[CertificateId], end: PeerEnd) -> Option<String> {
        let serial = self.find(chain)?.serial();
        self.counter(end).fetch_add(1, Ordering::Relaxed);
        Some(serial)
    }

    fn counter(&self, end: PeerEnd) -> &AtomicU64 {
        match end {
            PeerEnd::Client => &self.0.refused_clients,
            PeerEnd::Server => &self.0.refused_servers,
        }
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revocations")
            .field("revoked", &self.0.revoked.load().len())
            .finish_non_exhaustive()
    }
}

fn parse(file: &[u8]) -> Result<HashSet<CertificateId>, RevocationListError> {
    if file.trim_ascii().is_empty() {
        return Ok(HashSet::new());
    }
    let is_pem = file.windows(5).any(|window| window == b"-----");
    let lists: Vec<_> = match is_pem {
        true => CertificateRevocationListDer::pem_slice_iter(file).collect(),
        false => vec![Ok(file.into())],
    };
    if lists.is_empty() {
        return Err(RevocationListError::NoList);
    }
    let mut revoked = HashSet::new();
    for (index, list) in lists.into_iter().enumerate() {
        let malformed = RevocationListError::Malformed {
            position: index + 1,
        };
        let list = list.map_err(|_| malformed.clone())?;
        revoked.extend(entries(&list).ok_or(malformed)?);
    }
    Ok(revoked)
}

fn entries(list: &[u8]) -> Option<Vec<CertificateId>> {
    let (rest, parsed) = CertificateRevocationList::from_der(list).ok()?;
    let issuer = parsed.issuer().as_raw();
    let revoked = parsed.iter_revoked_certificates();
    let ids = revoked.map(|it| CertificateId::new(issuer, it.raw_serial()));
    rest.is_empty().then(|| ids.collect())
}
