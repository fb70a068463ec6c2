//! Health and metrics over HTTP.

use axum::{
    Router, extract::State, http::StatusCode, http::header, response::IntoResponse, routing::get,
};
use net::{metrics::Format, ready::Ready};
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

async fn metrics(State(context): State<Context>) -> impl IntoResponse {
    let kind = Format::OpenMetrics.content_type();
    ([(header::CONTENT_TYPE, kind)], context.telemetry.text())
}
