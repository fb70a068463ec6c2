//! The admission webhook: HTTPS for the API server, with our serving certificate. What is said is decided in
//! [`crate::validate::admission`]; here are only the connection and its bounds.

#[cfg(test)]
mod tests;

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use net::{accept, drain};
use rustls::{ServerConfig, crypto::aws_lc_rs, server::ResolvesServerCert};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    metrics::Metrics,
    validate::admission::{self, Verdict},
};

/// Where reviews are posted (control-plane.md 13).
const PATH: &str = "/validate";
/// An object of etcd's largest size, twice (old and new), and what is around it.
const MAX_BODY: usize = 8 << 20;
/// The API servers of a cluster, several connections each.
const MAX_CONNECTIONS: usize = 256;
/// Reviews judged at a time: they take the processor, not time.
const MAX_AT_ONCE: usize = 8;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// For a whole request and its answer; the API server waits as long.
const ANSWER: Duration = Duration::from_secs(5);

/// Answers reviews.
#[derive(Debug)]
pub(crate) struct Webhook {
    metrics: Arc<Metrics>,
    judging: Semaphore,
}

/// Why a request is not answered with a review.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("there is only POST {PATH}")]
    NotFound,
    #[error("more than {MAX_BODY} bytes")]
    TooLarge,
    #[error("read a body of at most {MAX_BODY} bytes")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("read the body as JSON")]
    Json(#[source] serde_json::Error),
    #[error("read the body as a review")]
    Review(#[from] admission::ReviewError),
    #[error("no answer within {ANSWER:?}")]
    Slow,
    #[error("judge the review")]
    Panic(#[source] tokio::task::JoinError),
}

impl Webhook {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            metrics,
            judging: Semaphore::new(MAX_AT_ONCE),
        })
    }

    /// Serves until the drain starts.
    pub(crate) async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        certificate: Arc<dyn ResolvesServerCert>,
        drain: drain::Watch,
    ) -> Result<(), rustls::Error> {
        let acceptor = TlsAcceptor::from(Arc::new(tls(certificate)?));
        let options = accept::Options::named("webhook").limited_to(MAX_CONNECTIONS);
        let connections = drain.clone();
        accept::serve(listener, options, drain, move |stream, peer| {
            let (webhook, acceptor) = (self.clone(), acceptor.clone());
            let drain = connections.clone();
            async move {
                if let Err(error) = webhook.connection(stream, acceptor, drain).await {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(%peer, error, "webhook connection ended");
                }
            }
        })
        .await;
        Ok(())
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        acceptor: TlsAcceptor,
        mut drain: drain::Watch,
    ) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let stream = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await??;
        let service = service_fn(move |request| {
            let webhook = self.clone();
            async move { Ok::<_, Infallible>(webhook.answer(request).await) }
        });
        let mut connection = std::pin::pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(90))
                .serve_connection(TokioIo::new(stream), service)
        );
        tokio::select! {
            served = connection.as_mut() => served,
            _ = drain.started() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
        .map_err(io::Error::other)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let judged = tokio::time::timeout(ANSWER, self.judge(request)).await;
        match judged.unwrap_or(Err(RequestError::Slow)) {
            Ok((answer, verdict)) => {
                self.metrics.reviewed(verdict.errors.is_empty());
                respond(StatusCode::OK, "application/json", answer.to_string())
            }
            Err(error) => {
                self.metrics.review_failed();
                let code = error.code();
                tracing::debug!(error = &error as &dyn std::error::Error, "no review");
                respond(code, "text/plain", error.to_string())
            }
        }
    }

    async fn judge(
        &self,
        request: Request<Incoming>,
    ) -> Result<(serde_json::Value, Verdict), RequestError> {
        if request.uri().path() != PATH || request.method() != Method::POST {
            return Err(RequestError::NotFound);
        }
        if request.body().size_hint().lower() > MAX_BODY as u64 {
            return Err(RequestError::TooLarge);
        }
        let body = Limited::new(request.into_body(), MAX_BODY).collect().await;
        let body = body.map_err(RequestError::Body)?.to_bytes();
        // Never closed.
        let _turn = self.judging.acquire().await;
        let judged = tokio::task::spawn_blocking(move || {
            let review = serde_json::from_slice(&body).map_err(RequestError::Json)?;
            Ok(admission::respond(&review)?)
        });
        judged.await.map_err(RequestError::Panic)?
    }
}

impl RequestError {
    fn code(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::TooLarge | Self::Body(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Json(_) | Self::Review(_) => StatusCode::BAD_REQUEST,
            Self::Slow => StatusCode::SERVICE_UNAVAILABLE,
            Self::Panic(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// The API server shows no certificate by default, and what it says decides nothing: anyone may ask what we would say.
fn tls(certificate: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn respond(code: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = code;
    let kind = http::HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
