//! Prometheus metrics: the endpoint, the process's own gauges, and the TCP families that all data planes share.
//!
//! Each binary registers its families in one file of its own. Names and labels are Istio's (node-tunnel.md 1.7).

mod certificates;
mod compression;
mod exposition;
mod parties;
mod process;
mod tcp;

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::any,
};
use mesh::{
    flow::{Direction, ResponseFlag, Security, ServiceName, TcpLabels},
    names::Str,
};
use prometheus_client::{encoding::EncodeLabelSet, metrics::family::Family};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::net::TcpListener;

use crate::{drain, http1};
pub use certificates::register as register_certificates;
pub use exposition::{Bucket, Exemplar, Exposition, Families, Format, Pairs, Text};
pub use parties::Parties;
pub use process::{register as register_process, resident_bytes};
pub use tcp::{Flow, Labels, MAX_SERIES, SocketGuard, Tcp};

/// The metrics' port in the proxy's own namespace.
pub const PORT: u16 = 15020;
/// The value of a label that is not known.
pub const UNKNOWN: &str = "unknown";

/// Serves `/metrics` and `/stats/prometheus` until the drain is forced.
pub async fn serve(listener: TcpListener, exposed: impl Into<Exposition>, drain: drain::Watch) {
    http1::serve(listener, router(exposed), drain).await;
}

/// The two paths; others are 404.
pub fn router(exposed: impl Into<Exposition>) -> Router {
    Router::new()
        .route("/metrics", any(answer))
        .route("/stats/prometheus", any(answer))
        .with_state(exposed.into())
}

async fn answer(State(exposed): State<Exposition>, headers: HeaderMap) -> Response {
    scraped(&exposed, &headers).await
}

/// The answer to a scraper: the text that it accepts, compressed for one that asks.
pub async fn scraped(exposed: &Exposition, headers: &HeaderMap) -> Response {
    let format = Format::accepted(headers);
    let body = match exposed.text(format) {
        Ok(body) => body,
        Err(error) => {
            let text = format!("cannot encode metrics: {error}\n");
            return (StatusCode::INTERNAL_SERVER_ERROR, text).into_response();
        }
    };
    let mut response = match compression::accepts_gzip(headers) {
        true => compression::gzipped(body).await,
        false => body.into_response(),
    };
    let told = response.headers_mut();
    told.insert(header::CONTENT_TYPE, format.content_type());
    let vary = HeaderValue::from_static("accept, accept-encoding");
    told.insert(header::VARY, vary);
    response
}

impl Labels for TcpLabels {
    type Key = (Direction, Security, [usize; 5]);

    fn key(&self) -> Self::Key {
        let text = |part: fn(&ServiceName) -> &Str| {
            let service = self.service.as_ref();
            service.map_or(0, |it| part(it).as_ptr().addr())
        };
        let places = [
            Arc::as_ptr(&self.source).addr(),
            Arc::as_ptr(&self.destination).addr(),
            text(|it| &it.hostname),
            text(|it| &it.namespace),
            text(|it| &it.name),
        ];
        (self.direction, self.security, places)
    }

    fn each(&self, flag: ResponseFlag, each: &mut dyn FnMut(&str, &str)) {
        for (name, value) in self.pairs(flag) {
            each(name, value);
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    component: &'static str,
    tag: String,
}

/// Registers `istio_build`, which is 1 for this component and version.
pub fn register_build(registry: &mut Registry, component: &'static str, tag: &str) {
    let family = Family::<Build, Gauge>::default();
    let label = Build {
        component,
        tag: tag.to_owned(),
    };
    family.get_or_create(&label).set(1);
    registry.register("istio_build", "The component and its version", family);
}

/// Has `what` done at each scrape, before the families that are registered after it are read.
pub fn before_scrape(registry: &mut Registry, what: Arc<dyn Fn() + Send + Sync>) {
    registry.register_collector(Box::new(BeforeScrape(what)));
}

struct BeforeScrape(Arc<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for BeforeScrape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BeforeScrape")
    }
}

impl prometheus_client::collector::Collector for BeforeScrape {
    fn encode(
        &self,
        _: prometheus_client::encoding::DescriptorEncoder<'_>,
    ) -> Result<(), std::fmt::Error> {
        (self.0)();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
