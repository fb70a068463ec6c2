//! Who may see what there is to debug: everyone on the machine itself (and whoever may forward a port there), and service
//! accounts of the control plane's namespace with a token for us (control-plane.md 13). It shows the whole mesh.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::Admin;
use crate::auth::{AuthenticateError, Authentication, Caller, PeerCertificate};

/// What is shown to everyone: it tells nothing of the mesh but figures.
const PUBLIC: [&str; 4] = ["/ready", "/metrics", "/version", "/"];

/// The rule, where not everyone may see everything.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Who calls.
    pub authentication: Authentication,
    /// Namespaces whose accounts may see everything.
    pub namespaces: Vec<String>,
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// Nobody is calling.
    #[error("authenticate the caller")]
    Authenticate(#[from] AuthenticateError),
    /// Somebody who may not.
    #[error("{} is not of a namespace that may see this", .0.account)]
    Namespace(Caller),
}

/// Lets a request through, or not.
pub(super) async fn check(
    State(admin): State<Arc<Admin>>,
    request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let is_local = peer.is_some_and(|peer| peer.0.ip().to_canonical().is_loopback());
    let guard = match &admin.guard {
        Some(guard) if !is_local && !PUBLIC.contains(&request.uri().path()) => guard,
        _ => return next.run(request).await,
    };
    let decided = guard.decide(request.headers()).await;
    let Err(refusal) = decided else {
        return next.run(request).await;
    };
    let (path, error) = (request.uri().path(), &refusal as &dyn std::error::Error);
    tracing::info!(peer = ?peer.map(|peer| peer.0), path, error, "request refused");
    match refusal {
        Refusal::Authenticate(_) => {
            let help = "needs a bearer token for the audience istio-ca, or a connection from the pod itself\n";
            (StatusCode::UNAUTHORIZED, help).into_response()
        }
        refusal @ Refusal::Namespace(_) => {
            (StatusCode::FORBIDDEN, format!("{refusal}\n")).into_response()
        }
    }
}

impl Guard {
    async fn decide(&self, headers: &http::HeaderMap) -> Result<(), Refusal> {
        let nobody = PeerCertificate::default();
        let caller = self.authentication.caller(headers, &nobody).await?;
        match self.namespaces.contains(&caller.account.namespace) {
            true => Ok(()),
            false => Err(Refusal::Namespace(caller)),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use mesh::identity::TrustDomain;

    use super::*;
    use crate::{auth::Jwks, clusters::Clusters, testing::Issuer};

    fn headers(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if !authorization.is_empty() {
            headers.insert("authorization", authorization.parse().unwrap());
        }
        headers
    }

    #[tokio::test]
    async fn only_accounts_of_the_named_namespaces_see_the_mesh() {
        let issuer = Issuer::new();
        let jwks = Jwks::open(issuer.path(), vec!["istio-ca".to_owned()]).unwrap();
        let guard = Guard {
            authentication: Authentication {
                trust_domain: TrustDomain::default(),
                tokens: Some(Arc::new(jwks)),
                clusters: Clusters::alone("Kubernetes"),
            },
            namespaces: vec!["istio-system".to_owned()],
        };
        let bearer = |namespace| format!("Bearer {}", issuer.token(namespace, "any", "pod"));
        for (what, authorization, passes) in [
            (
                "the control plane's namespace",
                bearer("istio-system"),
                true,
            ),
            ("another namespace", bearer("shop"), false),
            ("no token", String::new(), false),
            ("a forged token", "Bearer a.b.c".to_owned(), false),
        ] {
            let decided = guard.decide(&headers(&authorization)).await;
            assert_eq!(decided.is_ok(), passes, "{what}");
        }
    }
}
