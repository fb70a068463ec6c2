//! Health and metrics over HTTP.

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
    routing::get,
};
use net::{metrics::scraped, ready::Ready};
use tokio::net::TcpListener;

use crate::telemetry::Telemetry;

#[derive(Clone)]
struct Context {
    ready: Ready,
    telemetry: Telemetry,
}

/// Serves until dropped.
pub(super) async fn serve(listener: TcpListener, ready: Ready, telemetry: Telemetry) {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Context { ready, telemetry });
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "health and metrics");
    }
}

async fn readyz(State(context): State<Context>) -> (StatusCode, String) {
    match context.ready.pending().as_slice() {
        [] => (StatusCode::OK, "ready\n".to_owned()),
        missing => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready, missing: {}\n", missing.join(", ")),
        ),
    }
}

async fn metrics(State(context): State<Context>, headers: HeaderMap) -> Response {
    scraped(&context.telemetry.exposed(), &headers).await
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderValue, header};

    use super::*;

    #[tokio::test]
    async fn a_scraper_gets_the_text_that_it_accepts() {
        let context = Context {
            ready: Ready::new(),
            telemetry: Telemetry::new("1.2.3"),
        };
        for (accept, kind) in [
            ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
            (
                "application/openmetrics-text; version=1.0.0",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            ),
        ] {
            let asked = [(header::ACCEPT, HeaderValue::from_static(accept))];
            let asked = asked.into_iter().collect();
            let answer = metrics(State(context.clone()), asked).await;
            assert_eq!(answer.headers()[header::CONTENT_TYPE], kind);
        }
    }
}
