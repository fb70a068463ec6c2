//! The settings of one waypoint.

use std::collections::BTreeMap;

use mesh::l7::config::{Normalization, ProxyHeaders, WaypointConfig};

use crate::{object::Gateway, translate::Settings};

/// Annotation: the backend gets `x-forwarded-client-cert` with the client's identity.
const CLIENT_IDENTITY: &str = "ambient.istio.io/xfcc-include-client-identity";
/// Istio's default share of requests that are traced: 1%.
const SAMPLING_PER_MILLION: u32 = 10_000;

/// What a Gateway's waypoint is told of the mesh.
pub fn config(_settings: &Settings, gateway: &Gateway) -> WaypointConfig {
    let annotated = gateway.meta.annotation(CLIENT_IDENTITY);
    WaypointConfig {
        trust_domain_aliases: Vec::new(),
        normalization: Normalization::default(),
        authorizers: BTreeMap::new(),
        log_providers: BTreeMap::new(),
        trace_providers: BTreeMap::new(),
        access_logs: Vec::new(),
        tracing: Vec::new(),
        sampling_per_million: SAMPLING_PER_MILLION,
        forward_client_identity: annotated.is_some_and(|text| &**text == "true"),
        default_retry: None,
        headers: ProxyHeaders::default(),
    }
}
