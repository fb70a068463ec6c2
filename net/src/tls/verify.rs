//! Who the other end is: SPIFFE certificates checked against the roots of their own trust domain.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use mesh::identity::{Identity, ParseIdentityError, TrustDomain};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    server::{
        ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    policy::Policy,
    revocation::{CertificateId, PeerEnd},
    trust::TrustBundle,
};

/// The proven identity of the other end of a TLS connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The one URI SAN of its certificate.
    pub identity: Identity,
    /// When its certificate ends. The connection may outlive it.
    pub not_after: SystemTime,
    /// Its certificates, leaf first, as revocations name them.
    pub chain: Arc<[CertificateId]>,
}

/// Why a peer's certificate is refused. All of these are the peer's doing, or its CA's.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PeerCertificateError {
    /// Not a certificate.
    #[error("the certificate cannot be parsed")]
    Malformed,
    /// SPIFFE X.509-SVID 2: exactly one URI SAN. Two would let the one checked differ from the one used.
    #[error("the certificate has {0} URI names, and must have exactly one")]
    UriNames(usize),
    /// The one URI SAN is not of the mesh's form.
    #[error("the certificate's name is no identity")]
    NotSpiffe(#[source] ParseIdentityError),
    /// No roots are known for the domain that the certificate claims.
    #[error("the trust domain {0} is not trusted here")]
    UntrustedDomain(TrustDomain),
    /// Not signed by a root of the trust domain that it claims.
    #[error("no root of {0} vouches for the certificate")]
    UnknownIssuer(TrustDomain),
    /// Its time is over.
    #[error("the certificate has expired")]
    Expired,
    /// Its time has not come.
    #[error("the certificate is not valid yet")]
    NotValidYet,
    /// Its authority has taken it, or an intermediate, back.
    #[error("the certificate with the serial number {0} is revoked")]
    Revoked(String),
    /// Its extended key usage leaves out this use.
    #[error("the certificate is not for this use")]
    WrongUse,
    /// Proven, but not who was dialled.
    #[error("the peer is {presented}, expected {}", list(expected))]
    Unexpected {
        /// Who it is.
        presented: Identity,
        /// Who would have been right.
        expected: Arc<[Identity]>,
    },
    /// Anything else that the chain's verification found.
    #[error("the certificate is refused: {0:?}")]
    Chain(CertificateError),
}

fn list(identities: &[Identity]) -> String {
    match identities {
        [] => "nobody".to_owned(),
        [one] => one.to_string(),
        [first, rest @ ..] => format!("{first} or {} others", rest.len()),
    }
}

impl PeerCertificateError {
    fn of(error: CertificateError, domain: Option<&TrustDomain>) -> Self {
        match error {
            CertificateError::BadEncoding => Self::Malformed,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotValidYet
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                Self::WrongUse
            }
            // A root of another domain with the same name fails on the signature, not on the name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature
                if domain.is_some() =>
            {
                Self::UnknownIssuer(domain.cloned().unwrap_or_default())
            }
            CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<Self>() {
                Some(own) => own.clone(),
                None => Self::Chain(CertificateError::Other(OtherError(inner))),
            },
            other => Self::Chain(other),
        }
    }

    /// Takes back what a verifier of this module handed to rustls.
    pub(super) fn from_rustls(error: CertificateError) -> Self {
        Self::of(error, None)
    }
}

impl From<PeerCertificateError> for Error {
    fn from(error: PeerCertificateError) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

/// Reads the one identity of a leaf certificate.
pub(super) fn leaf_identity(
    leaf: &CertificateDer<'_>,
) -> Result<PeerIdentity, PeerCertificateError> {
    let (_, parsed) =
        X509Certificate::from_der(leaf).map_err(|_| PeerCertificateError::Malformed)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| PeerCertificateError::Malformed)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris.as_slice() else {
        return Err(PeerCertificateError::UriNames(uris.len()));
    };
    Ok(PeerIdentity {
        identity: uri.parse().map_err(PeerCertificateError::NotSpiffe)?,
        not_after: time_of(parsed.validity().not_after.timestamp()),
        chain: Arc::from([]),
    })
}

/// Reads who a chain, leaf first, speaks for.
pub(super) fn chain_identity(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<PeerIdentity, PeerCertificateError> {
    let mut peer = leaf_identity(leaf)?;
    let chain = std::iter::once(leaf).chain(intermediates);
    peer.chain = chain.filter_map(CertificateId::of).collect();
    Ok(peer)
}

/// A certificate's time, in seconds since the epoch; before it counts as the epoch.
pub(super) fn time_of(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// What one trust domain's certificates are checked with.
#[derive(Debug)]
struct Domain {
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

/// The roots of one certificate generation, ready to verify either end.
#[derive(Debug)]
pub(super) struct Verifier {
    domains: BTreeMap<TrustDomain, Domain>,
    algorithms: WebPkiSupportedAlgorithms,
    policy: Policy,
}

impl Verifier {
    pub(super) fn new(trust: &TrustBundle, policy: &Policy) -> Result<Self, VerifierBuilderError> {
        let mut domains = BTreeMap::new();
        for (name, roots) in trust.roots() {
            let clients = WebPkiClientVerifier::builder_with_provider(
                Arc::clone(&roots.store),
                Arc::clone(&policy.provider),
            )
            .build()?;
            let roots = Arc::clone(&roots.store);
            domains.insert(name.clone(), Domain { roots, clients });
        }
        Ok(Self {
            domains,
            algorithms: policy.provider.signature_verification_algorithms,
            policy: policy.clone(),
        })
    }

    fn domain(&self, name: &TrustDomain) -> Result<&Domain, PeerCertificateError> {
        let missing = || PeerCertificateError::UntrustedDomain(name.clone());
        let other = || {
            let mut others = self.policy.other_names(name);
            others.find_map(|it| self.domains.get(it))
        };
        self.domains.get(name).or_else(other).ok_or_else(missing)
    }

    fn is_expected(&self, expected: &[Identity], presented: &Identity) -> bool {
        expected.iter().any(|it| self.policy.is_same(it, presented))
    }

    fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let peer = chain_identity(leaf, intermediates)?;
        let domain = self.domain(&peer.identity.trust_domain)?;
        let verified = domain.clients.verify_client_cert(leaf, intermediates, now);
        let verified = verified.map_err(|error| attribute(error, &peer.identity.trust_domain))?;
        self.not_revoked(&peer, PeerEnd::Client)?;
        Ok(verified)
    }

    fn not_revoked(&self, peer: &PeerIdentity, end: PeerEnd) -> Result<(), PeerCertificateError> {
        match self.policy.revocations.refuse(&peer.chain, end) {
            Some(serial) => Err(PeerCertificateError::Revoked(serial)),
            None => Ok(()),
        }
    }

    fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<PeerIdentity, Error> {
        let peer = chain_identity(leaf, intermediates)?;
        let domain = self.domain(&peer.identity.trust_domain)?;
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &domain.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(|error| attribute(error, &peer.identity.trust_domain))?;
        self.not_revoked(&peer, PeerEnd::Server)?;
        Ok(peer)
    }
}

/// Names the trust domain in what the chain's verification found.
fn attribute(error: Error, domain: &TrustDomain) -> Error {
    match error {
        Error::InvalidCertificate(inner) => PeerCertificateError::of(inner, Some(domain)).into(),
        other => other,
    }
}

/// Verifies clients: any identity of a trusted domain. Who may do what is the authorization's business.
#[derive(Debug)]
pub(super) struct ClientVerifier(pub(super) Arc<Verifier>);

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.0.verify_client(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.algorithms.supported_schemes()
    }
}

/// Verifies a server: its identity must be among the expected. DNS names, addresses and common names count for nothing.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) verifier: Arc<Verifier>,
    pub(super) expected: Arc<[Identity]>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let peer = self
            .verifier
            .verify_server(end_entity, intermediates, now)?;
        if !self.verifier.is_expected(&self.expected, &peer.identity) {
            let expected = Arc::clone(&self.expected);
            let presented = peer.identity;
            return Err(PeerCertificateError::Unexpected {
                presented,
                expected,
            }
            .into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.verifier.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.verifier.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.algorithms.supported_schemes()
    }
}
