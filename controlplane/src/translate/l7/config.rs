//! The settings of one waypoint.

use std::sync::Arc;

use mesh::l7::config::{HistogramBuckets, WaypointConfig};
use serde_json::{Map, Value};

use super::istio::mesh::MeshSettings;
use crate::{object::Gateway, translate::Settings};

/// Annotation: the backend gets `x-forwarded-client-cert` with the client's identity.
const CLIENT_IDENTITY: &str = "ambient.istio.io/xfcc-include-client-identity";

/// Annotation: bounds of histograms, as JSON: `{"istiocustom": [1, 5, 10]}`.
pub const BUCKETS: &str = "sidecar.istio.io/statsHistogramBuckets";

/// Said of what [`HistogramBuckets::new`] does not take.
const NO_BOUNDS: &str = "are not 1 to 64 numbers that ascend from above 0";

/// What a Gateway's waypoint is told of the mesh.
pub fn config(settings: &Settings, gateway: &Gateway) -> WaypointConfig {
    let annotated = gateway.meta.annotation(CLIENT_IDENTITY);
    let mesh = settings
        .mesh
        .clone()
        .unwrap_or_else(|| Arc::new(MeshSettings::default()));
    WaypointConfig {
        trust_domain_aliases: mesh.trust_domain_aliases.clone(),
        normalization: mesh.normalization,
        authorizers: mesh.authorizers.clone(),
        log_providers: mesh.log_providers.clone(),
        trace_providers: mesh.trace_providers.clone(),
        access_logs: mesh.access_logs.clone(),
        tracing: mesh.tracing.clone(),
        sampling_per_million: mesh.sampling_per_million,
        forward_client_identity: annotated.is_some_and(|text| &**text == "true"),
        default_retry: mesh.default_retry.clone(),
        headers: mesh.headers.clone(),
        histogram_buckets: of_gateway(gateway).bounds,
    }
}

/// What a Gateway says of the bounds of its waypoint's histograms.
#[derive(Debug, Default)]
pub struct Buckets {
    /// What is in force.
    pub bounds: Vec<HistogramBuckets>,
    /// What is not, and why.
    pub problems: Vec<String>,
}

impl Buckets {
    /// From the Gateway's own annotation, else from the one that its `infrastructure` has for pods.
    pub fn read(own: Option<&str>, infrastructure: &Value) -> Self {
        let of_pods = || infrastructure["annotations"][BUCKETS].as_str();
        let mut read = Self::default();
        let Some(text) = own.or_else(of_pods) else {
            return read;
        };
        let written: Map<String, Value> = match serde_json::from_str(text) {
            Ok(written) => written,
            Err(error) => {
                read.problems = vec![format!("is no JSON object: {error}")];
                return read;
            }
        };
        for (prefix, bounds) in &written {
            match serde_json::from_value(bounds.clone()).map(|it| HistogramBuckets::new(prefix, it))
            {
                Ok(Some(bounds)) => read.bounds.push(bounds),
                Ok(None) | Err(_) => read
                    .problems
                    .push(format!("{prefix}: {bounds} {NO_BOUNDS}")),
            }
        }
        read
    }
}

/// What a Gateway says of the bounds of histograms.
pub fn of_gateway(gateway: &Gateway) -> Buckets {
    let own = gateway.meta.annotation(BUCKETS).map(|text| &**text);
    Buckets::read(own, &gateway.spec.infrastructure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_of_histograms_are_the_annotations() {
        let mut gateway = Gateway::default();
        let text = r#"{"istiocustom": [1, 5.5]}"#;
        gateway.spec.infrastructure = serde_json::json!({"annotations": {BUCKETS: text}});
        let found = config(&Settings::default(), &gateway).histogram_buckets;
        let found = &found[0];
        assert_eq!(
            (&*found.prefix, &*found.bounds),
            ("istiocustom", &[1.0, 5.5][..])
        );
    }

    #[test]
    fn bounds_that_are_none_are_left_out_and_told_and_the_others_stay() {
        let read = |text: &str| Buckets::read(Some(text), &Value::Null);
        let found = read(r#"{"istio_request_bytes": [2, 1], "istiocustom": [1], "x": ["a"]}"#);
        assert_eq!(found.bounds.len(), 1, "{found:?}");
        let expected =
            ["istio_request_bytes: [2,1]", r#"x: ["a"]"#].map(|it| format!("{it} {NO_BOUNDS}"));
        assert_eq!(found.problems, expected);
        for wrong in ["", "[1]", "{", r#"{"istiocustom": [0]}"#, r#"{"x": []}"#] {
            let found = read(wrong);
            assert_eq!(
                (found.bounds.len(), found.problems.len()),
                (0, 1),
                "{wrong}"
            );
        }
        assert!(Buckets::read(None, &Value::Null).problems.is_empty());
    }
}
