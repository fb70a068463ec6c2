//! The gRPC service: `istio.v1.auth.IstioCertificateService`.

use std::{sync::Arc, time::Duration};

use mesh::identity::{Identity, TrustDomain};
use prost_types::{Struct, value::Kind};
use proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use super::{
    authority::SignError,
    csr::{Csr, CsrError},
    current::Current,
    impersonate::{Pods, Refusal, Rule},
};
use crate::{
    auth::{AuthenticateError, Authentication, Caller},
    metrics::{CsrOutcome, Metrics},
    serve::access::Access,
    tls::ConnectionInfo,
};

/// How long the event of a pod may be on its way to us: a node that asks for a pod's certificate has it already.
/// Tunnels ask again by themselves; this only spares them the first refusal.
const EVENT_LAG: Duration = Duration::from_millis(500);

/// Issues certificates to proven callers.
#[derive(Debug)]
pub struct CertificateService {
    /// Who signs.
    pub authority: Arc<Current>,
    /// Who calls.
    pub authentication: Authentication,
    /// Who may ask for others.
    pub access: Access,
    /// What runs where in this cluster.
    pub pods: Arc<dyn Pods>,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Where outcomes are counted.
    pub metrics: Arc<Metrics>,
}

/// Why a request for a certificate fails.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Nobody is calling.
    #[error("authenticate the caller")]
    Authenticate(#[from] AuthenticateError),
    /// The caller may not have that identity.
    #[error("{caller} asks for {requested:?}")]
    Impersonate {
        /// Who.
        caller: String,
        /// What for.
        requested: String,
        /// Why not.
        source: Box<Refusal>,
    },
    /// Its own name is not one.
    #[error("the caller's account {0} makes no identity")]
    Account(String),
    /// A signer by name, of which there are none.
    #[error("there is no signer {0:?}")]
    Signer(String),
    /// The request itself.
    #[error("the request for a certificate is refused")]
    Csr(#[from] CsrError),
    /// Signing.
    #[error("issue a certificate")]
    Sign(#[from] SignError),
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let info = request.extensions().get::<ConnectionInfo>();
        let info = info.cloned().unwrap_or_default();
        match self.create(request, &info).await {
            Ok(cert_chain) => {
                self.metrics.csr(CsrOutcome::Issued);
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(error) => {
                self.metrics.csr(error.outcome());
                let status = error.status();
                let error = &error as &dyn std::error::Error;
                tracing::warn!(peer = ?info.address, error, "no certificate issued");
                Err(status)
            }
        }
    }
}

impl CertificateService {
    async fn create(
        &self,
        request: Request<IstioCertificateRequest>,
        info: &ConnectionInfo,
    ) -> Result<Vec<String>, CreateError> {
        let (metadata, _, request) = request.into_parts();
        let headers = metadata.into_headers();
        let caller = self
            .authentication
            .caller(&headers, &info.certificate)
            .await?;
        let signer = text(request.metadata.as_ref(), "CertSigner");
        if !signer.is_empty() {
            return Err(CreateError::Signer(signer));
        }
        let requested = text(request.metadata.as_ref(), "ImpersonatedIdentity");
        let identity = self.identity(&caller, &requested).await?;
        let csr = Csr::parse(&request.csr)?;
        let ttl = u64::try_from(request.validity_duration)
            .ok()
            .map(Duration::from_secs);
        let now = OffsetDateTime::now_utc();
        let authority = self.authority.load();
        let issued = authority.workload(&csr, &identity, ttl, now)?;
        tracing::debug!(%identity, caller = %caller.account, not_after = %issued.not_after, "certificate issued");
        Ok(authority.response(&issued))
    }

    /// The caller's own identity, or the one it asks for and may have.
    async fn identity(&self, caller: &Caller, requested: &str) -> Result<Identity, CreateError> {
        let account = &caller.account;
        if requested.is_empty() {
            let own = format!(
                "spiffe://{}/ns/{}/sa/{}",
                self.trust_domain, account.namespace, account.name
            );
            return own
                .parse()
                .map_err(|_| CreateError::Account(account.to_string()));
        }
        let impersonated = self.impersonated(caller, requested).await;
        impersonated.map_err(|source| CreateError::Impersonate {
            caller: account.to_string(),
            requested: requested.chars().take(512).collect(),
            source: Box::new(source),
        })
    }

    /// Judged by the pods and nodes of the caller's cluster, and by no others.
    async fn impersonated(&self, caller: &Caller, requested: &str) -> Result<Identity, Refusal> {
        let elsewhere = match &caller.cluster {
            None => None,
            Some(cluster) => {
                let member = self.authentication.clusters.member(cluster);
                Some(member.ok_or_else(|| Refusal::Cluster(cluster.clone()))?)
            }
        };
        let rule = Rule {
            trust_domain: &self.trust_domain,
            access: &self.access,
            pods: elsewhere.as_ref().map_or(&*self.pods, |it| &*it.pods),
        };
        rule.check_patiently(caller, requested, EVENT_LAG).await
    }
}

impl CreateError {
    /// What the peer hears: refusals of identity are opaque, faults of its request, and of the cluster it names, are not.
    fn status(&self) -> Status {
        match self {
            Self::Authenticate(cause) => cause.status("request authenticate failure"),
            Self::Impersonate { .. } | Self::Account(_) => {
                Status::unauthenticated("request impersonation authentication failure")
            }
            Self::Signer(_) => Status::invalid_argument(self.to_string()),
            Self::Csr(cause) => Status::invalid_argument(format!("{self}: {cause}")),
            Self::Sign(cause @ SignError::TtlTooLong { .. }) => {
                Status::invalid_argument(format!("{self}: {cause}"))
            }
            Self::Sign(_) => Status::internal("the certificate could not be signed"),
        }
    }

    fn outcome(&self) -> CsrOutcome {
        match self {
            Self::Authenticate(_) => CsrOutcome::Unauthenticated,
            Self::Impersonate { .. } | Self::Account(_) => CsrOutcome::IdentityRefused,
            Self::Signer(_) | Self::Csr(_) => CsrOutcome::BadRequest,
            Self::Sign(SignError::TtlTooLong { .. }) => CsrOutcome::TtlTooLong,
            Self::Sign(_) => CsrOutcome::Internal,
        }
    }
}

/// A text of the request's metadata; empty if absent. Anything but a text is nonsense that is refused as a name is.
fn text(metadata: Option<&Struct>, key: &str) -> String {
    let value = metadata.and_then(|metadata| metadata.fields.get(key));
    match value.and_then(|value| value.kind.as_ref()) {
        None | Some(Kind::NullValue(_)) => String::new(),
        Some(Kind::StringValue(text)) => text.clone(),
        Some(_) => "(not a text)".to_owned(),
    }
}
