//! The settings of one waypoint.

use std::sync::Arc;

use mesh::l7::config::{HistogramBuckets, WaypointConfig};
use serde_json::{Map, Value};

use super::istio::mesh::MeshSettings;
use crate::{object::Gateway, translate::Settings};

/// Annotation: the backend gets `x-forwarded-client-cert` with the client's identity.
const CLIENT_IDENTITY: &str = "ambient.istio.io/xfcc-include-client-identity";

/// Annotation: bounds of histograms, as JSON: `{"istiocustom": [1, 5, 10]}`.
const BUCKETS: &str = "sidecar.istio.io/statsHistogramBuckets";

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
        histogram_buckets: buckets(gateway),
    }
}

/// The bounds that a Gateway's annotation gives, its own or one for its pods; those that are none are left out.
fn buckets(gateway: &Gateway) -> Vec<HistogramBuckets> {
    let own = gateway.meta.annotation(BUCKETS).map(|text| &**text);
    let of_pods = gateway.spec.infrastructure["annotations"][BUCKETS].as_str();
    let read = own
        .or(of_pods)
        .map(serde_json::from_str::<Map<String, Value>>);
    let Some(Ok(written)) = read else {
        return Vec::new();
    };
    let bounds = |it: &Value| serde_json::from_value::<Vec<f64>>(it.clone()).ok();
    let all = written.iter();
    all.filter_map(|(prefix, it)| HistogramBuckets::new(prefix, bounds(it)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_of_histograms_are_the_annotations() {
        let read = |text: &str| {
            let mut gateway = Gateway::default();
            let annotations = serde_json::json!({"annotations": {BUCKETS: text}});
            gateway.spec.infrastructure = annotations;
            config(&Settings::default(), &gateway).histogram_buckets
        };
        let found = read(r#"{"istiocustom": [1, 5.5], "istio_request_bytes": [2, 1], "x": []}"#);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            (&*found[0].prefix, &*found[0].bounds),
            ("istiocustom", &[1.0, 5.5][..])
        );
        for wrong in [
            "",
            "[1]",
            "{",
            r#"{"istiocustom": ["a"]}"#,
            r#"{"istiocustom": [0]}"#,
        ] {
            assert!(read(wrong).is_empty(), "{wrong}");
        }
    }
}
