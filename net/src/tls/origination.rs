//! TLS to servers of the world, by DNS name or URI: what a backend policy asks for (DestinationRule `tls`,
//! BackendTLSPolicy).

use std::{
    borrow::Cow,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh::l7::backend::{BackendTls, ClientCertificate, Pem, SubjectAltName};
use parking_lot::Mutex;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::verify_server_name,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    server::ParsedCertificate,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, UnixTime,
    pem::{self, PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::TlsConnector;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    HandshakeError, Policy, RevocationListError, Revocations, control_plane,
    revocation::CertificateId,
};
use crate::clock::TlsTime;

/// A dialled TLS connection with a server outside the mesh.
pub type ClientStream<IO> = tokio_rustls::client::TlsStream<IO>;

/// Configurations that are kept: there are few policies, and one is compared in less than a handshake's time.
const KEPT: usize = 64;
/// Largest file of certificates.
const LARGEST: u64 = 1 << 20;

/// Why there is no TLS with a server.
#[derive(Debug, thiserror::Error)]
pub enum OriginationError {
    /// The policy cannot be kept.
    #[error("the TLS policy cannot be kept: {0}")]
    Invalid(String),
    /// There is no name to ask for or to check.
    #[error("{0:?} is no name that a server could prove")]
    Name(String),
    /// The roots or the certificate that is to be shown cannot be used.
    #[error("the policy's certificates cannot be used")]
    Pem(#[source] pem::Error),
    /// A file that it names cannot be read.
    #[error("read the policy's file {path}")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Who is revoked cannot be read.
    #[error("the policy's list of revoked certificates cannot be used")]
    Revoked(#[source] RevocationListError),
    /// No root is left.
    #[error("there is no root to check the server with")]
    NoRoots,
    /// The certificate and key do not fit.
    #[error("the certificate that is to be shown cannot be used")]
    Certificate(#[source] Error),
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
}

/// Makes client configurations from policies, and keeps them.
#[derive(Debug)]
pub struct Originator {
    policy: Policy,
    system_roots: Vec<PathBuf>,
    kept: Mutex<Vec<Kept>>,
}

#[derive(Debug)]
struct Kept {
    settings: BackendTls,
    alpn: Vec<Vec<u8>>,
    /// The files that it was made of, as they were then.
    files: Vec<(String, Stamp)>,
    config: Arc<ClientConfig>,
}

/// Which file a path leads to, and its state: links are followed, as Kubernetes swaps them. None: to none.
type Stamp = Option<(u64, u64, i64, i64)>;

/// One server's configuration, with its name.
#[derive(Clone, Debug)]
pub struct Origination {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Originator {
    /// Keeps none yet. TLS 1.2 and 1.3, as `policy` says.
    pub fn new(policy: Policy) -> Self {
        let system_roots = control_plane::SYSTEM_ROOTS.map(PathBuf::from);
        Self {
            policy,
            system_roots: system_roots.into(),
            kept: Mutex::default(),
        }
    }

    /// How to speak TLS with a server: `host` is asked for where `settings` name nobody.
    ///
    /// # Errors
    /// The policy cannot be kept.
    pub fn config(
        &self,
        settings: &BackendTls,
        host: &str,
        alpn: &[&[u8]],
    ) -> Result<Origination, OriginationError> {
        let sni = match settings {
            BackendTls::Verify { sni, .. } | BackendTls::Insecure { sni, .. } => sni.as_deref(),
            BackendTls::Invalid(why) => return Err(OriginationError::Invalid(why.to_string())),
        };
        let name = sni.unwrap_or(host);
        let parsed = ServerName::try_from(name.to_owned());
        let name = parsed.map_err(|_| OriginationError::Name(name.to_owned()))?;
        let config = self.kept(settings, alpn)?;
        Ok(Origination { config, name })
    }

    fn kept(
        &self,
        settings: &BackendTls,
        alpn: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, OriginationError> {
        let same = |kept: &Kept| kept.settings == *settings && kept.alpn == alpn;
        // Before they are read: a change meanwhile is seen the next time.
        let files = stamps(settings);
        let is_current = |kept: &&Kept| same(kept) && kept.files == files;
        if let Some(found) = self.kept.lock().iter().find(is_current) {
            return Ok(Arc::clone(&found.config));
        }
        let config = Arc::new(self.build(settings, alpn)?);
        let mut kept = self.kept.lock();
        kept.retain(|kept| !same(kept));
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push(Kept {
            settings: settings.clone(),
            alpn: alpn.iter().map(|name| name.to_vec()).collect(),
            files,
            config: Arc::clone(&config),
        });
        Ok(config)
    }

    fn build(
        &self,
        settings: &BackendTls,
        alpn: &[&[u8]],
    ) -> Result<ClientConfig, OriginationError> {
        let algorithms = self.policy.provider.signature_verification_algorithms;
        let (checks, client) = match settings {
            BackendTls::Verify {
                roots,
                revoked,
                subject_alt_names,
                client,
                ..
            } => {
                let roots = roots.as_ref().map(read).transpose()?;
                let checks = Checks {
                    roots: self.roots(roots.as_deref())?,
                    revoked: revocations(revoked.as_ref())?,
                    names: subject_alt_names.clone(),
                };
                (Some(checks), client)
            }
            BackendTls::Insecure { client, .. } => (None, client),
            BackendTls::Invalid(why) => return Err(OriginationError::Invalid(why.to_string())),
        };
        let verifier = Arc::new(Verifier { checks, algorithms });
        let time = Arc::new(TlsTime(Arc::clone(self.policy.clock())));
        let provider = Arc::clone(&self.policy.provider);
        let builder = ClientConfig::builder_with_details(provider, time)
            .with_protocol_versions(self.policy.versions)
            .expect("every policy has suites and groups for its versions")
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match client {
            None => builder.with_no_client_auth(),
            Some(client) => {
                let (chain, key) = read_client(client)?;
                let built = builder.with_client_auth_cert(chain, key);
                built.map_err(OriginationError::Certificate)?
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(config)
    }

    /// Entries that cannot be used are skipped; an empty rest is an error.
    fn roots(&self, pem: Option<&[u8]>) -> Result<RootCertStore, OriginationError> {
        let mut store = RootCertStore::empty();
        let mut add = |pem: &[u8]| {
            store.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten())
        };
        match pem {
            Some(pem) => drop(add(pem)),
            None => {
                let read = |path: &PathBuf| std::fs::read(Path::new(path)).ok();
                if let Some(pem) = self.system_roots.iter().find_map(read) {
                    add(&pem);
                }
            }
        }
        match store.is_empty() {
            true => Err(OriginationError::NoRoots),
            false => Ok(store),
        }
    }
}

fn read_client(
    client: &ClientCertificate,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), OriginationError> {
    let chain = read(&client.chain)?;
    let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<_, _>>();
    let key = PrivateKeyDer::from_pem_slice(&read(&client.key)?);
    Ok((
        chain.map_err(OriginationError::Pem)?,
        key.map_err(OriginationError::Pem)?,
    ))
}

fn revocations(list: Option<&Pem>) -> Result<Revocations, OriginationError> {
    let revocations = Revocations::default();
    if let Some(list) = list {
        let replaced = revocations.replace(&read(list)?);
        replaced.map_err(OriginationError::Revoked)?;
    }
    Ok(revocations)
}

/// The contents. Files are small and on a local disk, and are read when they are new or have changed: not worth a thread.
fn read(pem: &Pem) -> Result<Cow<'_, [u8]>, OriginationError> {
    let path = match pem {
        Pem::Inline(pem) => return Ok(Cow::Borrowed(pem)),
        Pem::File(path) => path,
    };
    let mut contents = Vec::new();
    let read = File::open(&**path).and_then(|file| file.take(LARGEST).read_to_end(&mut contents));
    let read = read.map(|_| Cow::Owned(contents));
    read.map_err(|source| OriginationError::File {
        path: path.to_string(),
        source,
    })
}

fn stamps(settings: &BackendTls) -> Vec<(String, Stamp)> {
    let (roots, revoked, client) = match settings {
        BackendTls::Verify {
            roots,
            revoked,
            client,
            ..
        } => (roots.as_ref(), revoked.as_ref(), client.as_ref()),
        BackendTls::Insecure { client, .. } => (None, None, client.as_ref()),
        BackendTls::Invalid(_) => (None, None, None),
    };
    let client = client.map(|it| [&it.chain, &it.key]);
    let all = [roots, revoked].into_iter().flatten();
    let files = all.chain(client.into_iter().flatten()).filter_map(|pem| {
        let Pem::File(path) = pem else {
            return None;
        };
        let stamp = |it: Metadata| (it.ino(), it.len(), it.mtime(), it.mtime_nsec());
        Some((path.to_string(), fs::metadata(&**path).ok().map(stamp)))
    });
    files.collect()
}

impl Origination {
    /// Speaks TLS over `io`, within `deadline`.
    ///
    /// # Errors
    /// The handshake's.
    pub async fn connect<IO>(
        &self,
        io: IO,
        deadline: Duration,
    ) -> Result<ClientStream<IO>, OriginationError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let connector = TlsConnector::from(Arc::clone(&self.config));
        let handshake = connector.connect(self.name.clone(), io);
        let stream = timeout(deadline, handshake)
            .await
            .map_err(|_| HandshakeError::Timeout { after: deadline })?;
        Ok(stream.map_err(HandshakeError::from)?)
    }
}

/// What a certificate must be.
#[derive(Debug)]
struct Checks {
    roots: RootCertStore,
    revoked: Revocations,
    /// Any of these; empty: the name that was asked for.
    names: Vec<SubjectAltName>,
}

#[derive(Debug)]
struct Verifier {
    /// None: the user has switched verification off.
    checks: Option<Checks>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Checks {
    fn name(
        &self,
        leaf: &CertificateDer<'_>,
        parsed: &ParsedCertificate<'_>,
        asked: &ServerName<'_>,
    ) -> Result<(), Error> {
        if self.names.is_empty() {
            return verify_server_name(parsed, asked);
        }
        let fits = |name: &SubjectAltName| match name {
            SubjectAltName::Hostname(host) => ServerName::try_from(&**host)
                .is_ok_and(|host| verify_server_name(parsed, &host).is_ok()),
            SubjectAltName::Uri(uri) => has_uri(leaf, uri),
        };
        match self.names.iter().any(fits) {
            true => Ok(()),
            false => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
        }
    }
}

fn has_uri(leaf: &CertificateDer<'_>, wanted: &str) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(leaf) else {
        return false;
    };
    let Ok(Some(names)) = parsed.subject_alternative_name() else {
        return false;
    };
    let names = names.value.general_names.iter();
    let mut uris = names.filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    uris.any(|uri| uri == wanted)
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(checks) = &self.checks else {
            return Ok(ServerCertVerified::assertion());
        };
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &checks.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        checks.name(end_entity, &parsed, server_name)?;
        let chain = std::iter::once(end_entity).chain(intermediates);
        let chain: Vec<CertificateId> = chain.filter_map(CertificateId::of).collect();
        if checks.revoked.find(&chain).is_some() {
            return Err(Error::InvalidCertificate(CertificateError::Revoked));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
