//! One request to the CA: a new key, a CSR, and a suspicious look at the answer.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use mesh::identity::Identity;
use proto::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use tokio::time::timeout;
use tonic::{
    Code, Request,
    metadata::{Ascii, MetadataKey, MetadataValue},
    transport::Channel,
};

use super::{Issuer, Issuing};
use crate::{
    report::add_causes,
    tls::{
        BuildCertificateError, Policy, TrustBundle, TrustBundleError, WorkloadCertificate,
        control_plane::{self, ControlPlaneError},
    },
};

/// More than any chain needs.
const MAX_ANSWER: usize = 1024 * 1024;

/// The proof of who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// A file, read at each request, as the kubelet rotates it.
    File(PathBuf),
    /// The token's text.
    Text(String),
    /// None: the CA knows us otherwise.
    None,
}

/// Whether the CA is asked for another's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Impersonation {
    /// For workloads of the node; the CA checks that they run there.
    Workloads,
    /// For ourselves alone.
    No,
}

/// How to ask the CA.
#[derive(Clone, Debug)]
pub struct CaConfig {
    /// Where it is, and who vouches for it.
    pub control_plane: control_plane::Config,
    /// Who we are.
    pub token: Token,
    /// The cluster's name, sent as `clusterid`.
    pub cluster_id: String,
    /// Further metadata (`CA_HEADER_*`).
    pub headers: Vec<(String, String)>,
    /// Wanted lifetime (`SECRET_TTL`). The CA may give less.
    pub lifetime: Duration,
    /// Whose certificates are asked for.
    pub impersonation: Impersonation,
    /// How long an answer may take.
    pub deadline: Duration,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The token's file cannot be read.
    #[error("read the token {path:?}")]
    ReadToken {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The token or a header has bytes that a header cannot carry.
    #[error("the header {0:?} cannot be sent")]
    Header(String),
    /// No key or CSR could be made.
    #[error("make a certificate request")]
    Request(#[source] rcgen::Error),
    /// The CA cannot be reached, or says no.
    #[error("the CA answered {code:?}: {message}")]
    Ca {
        /// The gRPC code. `Unavailable` also where there is no connection.
        code: Code,
        /// Its words, with the causes behind them.
        message: String,
    },
    /// The CA is too slow.
    #[error("the CA did not answer within {after:?}")]
    Late {
        /// The deadline.
        after: Duration,
    },
    /// No certificate, or no root after it.
    #[error("the CA answered with {0} certificates; a leaf and a root are the least")]
    Incomplete(usize),
    /// An element of the chain is not PEM.
    #[error("the CA answered with something that is no certificate, at place {0} of the chain")]
    NotPem(usize),
    /// A certificate for somebody else.
    #[error("the CA certified {given} and not {asked}")]
    WrongIdentity {
        /// Whom we asked for.
        asked: Identity,
        /// Whom we got.
        given: Identity,
    },
    /// The certificate's time is over, or has not come: one of the clocks is wrong.
    #[error("the CA issued a certificate that is not valid now")]
    NotValidNow,
    /// The roots are unusable.
    #[error("the CA's roots are unusable")]
    Roots(#[source] TrustBundleError),
    /// Leaf, key and chain do not fit.
    #[error("the CA's certificate is unusable")]
    Unusable(#[source] BuildCertificateError),
}

impl IssueError {
    /// Whether the CA has spoken, were it only to refuse. Otherwise it, or the way to it, is gone.
    pub fn is_answer(&self) -> bool {
        match self {
            Self::Ca { code, .. } => !matches!(
                code,
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
            ),
            Self::Late { .. } | Self::ReadToken { .. } | Self::Header(_) | Self::Request(_) => {
                false
            }
            Self::Incomplete(_)
            | Self::NotPem(_)
            | Self::WrongIdentity { .. }
            | Self::NotValidNow
            | Self::Roots(_)
            | Self::Unusable(_) => true,
        }
    }
}

/// A client of `IstioCertificateService`. Cheap to clone; connects when first used.
#[derive(Clone)]
pub struct CaClient(Arc<Shared>);

struct Shared {
    config: CaConfig,
    channel: Channel,
}

impl CaClient {
    /// A client that has not connected yet.
    pub fn new(config: CaConfig) -> Result<Self, ControlPlaneError> {
        let channel = control_plane::channel(config.control_plane.clone())?;
        Ok(Self(Arc::new(Shared { config, channel })))
    }
}

impl Issuer for CaClient {
    fn issue(&self, identity: Identity) -> Issuing {
        let shared = Arc::clone(&self.0);
        Box::pin(async move { shared.issue(&identity).await.map_err(Arc::new) })
    }
}

impl Shared {
    async fn issue(&self, identity: &Identity) -> Result<WorkloadCertificate, IssueError> {
        let (csr, key) = make_request(identity)?;
        let request = self.request(identity, csr).await?;
        let chain = self.call(request).await?;
        let policy = &self.config.control_plane.policy;
        check(policy, identity, &chain, key)
    }

    async fn request(
        &self,
        identity: &Identity,
        csr: String,
    ) -> Result<Request<IstioCertificateRequest>, IssueError> {
        let seconds = self.config.lifetime.as_secs();
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(seconds).unwrap_or(i64::MAX),
            metadata: (self.config.impersonation == Impersonation::Workloads)
                .then(|| impersonate(identity)),
        });
        let metadata = request.metadata_mut();
        if let Some(token) = self.config.token.read().await? {
            metadata.insert("authorization", sensitive(&format!("Bearer {token}"))?);
        }
        let cluster = value("clusterid", &self.config.cluster_id)?;
        metadata.insert("clusterid", cluster);
        for (name, text) in &self.config.headers {
            let key = MetadataKey::<Ascii>::from_bytes(name.to_ascii_lowercase().as_bytes())
                .map_err(|_| IssueError::Header(name.clone()))?;
            metadata.insert(key, value(name, text)?);
        }
        Ok(request)
    }

    async fn call(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Vec<String>, IssueError> {
        let after = self.config.deadline;
        let mut client = IstioCertificateServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_ANSWER);
        let answer = timeout(after, client.create_certificate(request))
            .await
            .map_err(|_| IssueError::Late { after })?
            .map_err(|status| refused(&status))?;
        Ok(answer.into_inner().cert_chain)
    }
}

/// The CA's answer with the causes that tonic keeps behind it, such as a refused connection.
fn refused(status: &tonic::Status) -> IssueError {
    let mut message = status.message().to_owned();
    add_causes(&mut message, status);
    IssueError::Ca {
        code: status.code(),
        message,
    }
}

impl Token {
    /// `AUTH_TOKEN`: a path that exists, or the text itself.
    pub fn from_setting(value: &str) -> Self {
        if std::path::Path::new(value).exists() {
            Self::File(value.into())
        } else {
            Self::Text(value.to_owned())
        }
    }

    async fn read(&self) -> Result<Option<String>, IssueError> {
        match self {
            Self::None => Ok(None),
            Self::Text(text) => Ok(Some(text.trim().to_owned())),
            Self::File(path) => {
                let text = tokio::fs::read_to_string(path).await;
                let text = text.map_err(|source| IssueError::ReadToken {
                    path: path.clone(),
                    source,
                })?;
                Ok(Some(text.trim().to_owned()))
            }
        }
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "File({path:?})"),
            Self::Text(_) => f.write_str("Text(..)"),
            Self::None => f.write_str("None"),
        }
    }
}

fn value(name: &str, text: &str) -> Result<MetadataValue<Ascii>, IssueError> {
    text.parse()
        .map_err(|_| IssueError::Header(name.to_owned()))
}

fn sensitive(text: &str) -> Result<MetadataValue<Ascii>, IssueError> {
    let mut value = value("authorization", text)?;
    value.set_sensitive(true);
    Ok(value)
}

fn impersonate(identity: &Identity) -> prost_types::Struct {
    let kind = prost_types::value::Kind::StringValue(identity.to_string());
    let value = prost_types::Value { kind: Some(kind) };
    prost_types::Struct {
        fields: [("ImpersonatedIdentity".to_owned(), value)].into(),
    }
}

/// A CSR with a new P-256 key: empty subject, one critical URI SAN.
fn make_request(identity: &Identity) -> Result<(String, PrivateKeyDer<'static>), IssueError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(IssueError::Request)?;
    let name = identity.to_string().try_into();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(name.map_err(IssueError::Request)?)];
    let csr = params
        .serialize_request(&key)
        .map_err(IssueError::Request)?;
    let pem = csr.pem().map_err(IssueError::Request)?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    Ok((pem, PrivateKeyDer::Pkcs8(key)))
}

/// Leaf, intermediates, and the bundle of roots last. The roots vouch for the trust domain of the identity.
fn check(
    policy: &Policy,
    asked: &Identity,
    chain: &[String],
    key: PrivateKeyDer<'static>,
) -> Result<WorkloadCertificate, IssueError> {
    let [certificates @ .., roots] = chain else {
        return Err(IssueError::Incomplete(0));
    };
    if certificates.is_empty() {
        return Err(IssueError::Incomplete(1));
    }
    let mut ders = Vec::with_capacity(certificates.len());
    for (place, pem) in certificates.iter().enumerate() {
        let der = CertificateDer::from_pem_slice(pem.as_bytes());
        ders.push(der.map_err(|_| IssueError::NotPem(place))?);
    }
    let trust = TrustBundle::from_pem(asked.trust_domain.clone(), roots.as_bytes())
        .map_err(IssueError::Roots)?;
    let made = WorkloadCertificate::new(policy, ders, key, trust).map_err(IssueError::Unusable)?;
    if made.identity() != asked {
        return Err(IssueError::WrongIdentity {
            asked: asked.clone(),
            given: made.identity().clone(),
        });
    }
    // A CA whose clock runs ahead of ours by a little is common; peers check the beginning, not we.
    if policy.clock().wall() >= made.not_after() {
        return Err(IssueError::NotValidNow);
    }
    Ok(made)
}
