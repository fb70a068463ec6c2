//! The settings of one waypoint.

use std::sync::Arc;

use mesh::l7::config::WaypointConfig;

use super::istio::mesh::MeshSettings;
use crate::{object::Gateway, translate::Settings};

/// Annotation: the backend gets `x-forwarded-client-cert` with the client's identity.
const CLIENT_IDENTITY: &str = "ambient.istio.io/xfcc-include-client-identity";

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
    }
}
