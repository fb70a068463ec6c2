//! The GatewayClasses that this control plane makes and serves.

use serde_json::{Value, json};

use super::Deployed;

/// `spec.controllerName` of waypoints (design 8.5).
pub const WAYPOINT_CONTROLLER: &str = "leyline.dev/waypoint-controller";
/// `spec.controllerName` of gateways between networks.
pub const EAST_WEST_CONTROLLER: &str = "leyline.dev/east-west-controller";
/// Upstream's name for Gateways that only describe what others run.
pub const UNMANAGED_CONTROLLER: &str = "istio.io/unmanaged-gateway";
const ISTIO_WAYPOINT_CONTROLLER: &str = "istio.io/mesh-controller";
const ISTIO_EAST_WEST_CONTROLLER: &str = "istio.io/eastwest-controller";

/// Features of the Gateway API that waypoints have, in the order of the API: by name. Only those of a mesh: a waypoint is
/// nobody's ingress.
pub const WAYPOINT_FEATURES: [&str; 45] = [
    "BackendTLSPolicy",
    "BackendTLSPolicySANValidation",
    "GRPCRoute",
    "GRPCRouteNamedRouteRule",
    "GRPCRouteRequestHeaderModifier",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendRequestHeaderModification",
    "HTTPRouteBackendRequestRedirect",
    "HTTPRouteBackendTimeout",
    "HTTPRouteBackendURLRewrite",
    "HTTPRouteCORS",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite",
    "HTTPRoutePortRedirect",
    "HTTPRouteQueryParamMatching",
    "HTTPRouteRequestMirror",
    "HTTPRouteRequestMultipleMirrors",
    "HTTPRouteRequestPercentageMirror",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteRetry",
    "HTTPRouteRetryBackendTimeout",
    "HTTPRouteRetryConnectionError",
    "HTTPRouteSchemeRedirect",
    "Mesh",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "TCPRoute",
    "TLSRoute",
];

/// What a Gateway of a class is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An L7 proxy for services and workloads.
    Waypoint,
    /// Takes traffic of other networks in.
    EastWest,
    /// Describes a gateway that others run.
    Remote,
}

/// A class that is made when it is absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its name.
    pub name: &'static str,
    /// `spec.controllerName`.
    pub controller: &'static str,
    /// For people: at most 64 bytes (Gateway API `GatewayClass.spec.description`).
    pub description: &'static str,
}

/// The classes to make, where they are absent. What is there is never changed.
pub fn made(settings: &Deployed) -> Vec<Made> {
    let waypoint = |name| Made {
        name,
        controller: WAYPOINT_CONTROLLER,
        description: "Leyline waypoint: L7 proxy for services and workloads",
    };
    let east_west = |name| Made {
        name,
        controller: EAST_WEST_CONTROLLER,
        description: "Leyline gateway for traffic from other networks",
    };
    let mut classes = vec![waypoint("leyline-waypoint")];
    if settings.istio_classes {
        classes.push(waypoint("istio-waypoint"));
    }
    if settings.multi_network {
        classes.push(east_west("leyline-east-west"));
        classes.push(Made {
            name: "istio-remote",
            controller: UNMANAGED_CONTROLLER,
            description: "Gateway of another network, deployed elsewhere",
        });
    }
    if settings.multi_network && settings.istio_classes {
        classes.push(east_west("istio-east-west"));
    }
    classes
}

impl Made {
    /// As it is written.
    pub fn object(&self) -> Value {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GatewayClass",
            "metadata": {"name": self.name},
            "spec": {"controllerName": self.controller, "description": self.description},
        })
    }
}

/// What Gateways of a class are, by its `spec.controllerName`. `None`: the class is served by somebody else.
pub fn role(settings: &Deployed, controller: &str) -> Option<Role> {
    match controller {
        WAYPOINT_CONTROLLER => Some(Role::Waypoint),
        EAST_WEST_CONTROLLER if settings.multi_network => Some(Role::EastWest),
        UNMANAGED_CONTROLLER if settings.multi_network => Some(Role::Remote),
        // Left by an istiod that the user says is gone.
        ISTIO_WAYPOINT_CONTROLLER if settings.istio_classes => Some(Role::Waypoint),
        ISTIO_EAST_WEST_CONTROLLER if settings.istio_classes && settings.multi_network => {
            Some(Role::EastWest)
        }
        _ => None,
    }
}

/// Whether Gateways of a class are waypoints, of ours or of istiod. `controller`: the class's, where the class is known.
pub fn is_waypoint(class: &str, controller: Option<&str>) -> bool {
    match controller {
        Some(controller) => [WAYPOINT_CONTROLLER, ISTIO_WAYPOINT_CONTROLLER].contains(&controller),
        None => matches!(class, "leyline-waypoint" | "istio-waypoint"),
    }
}

/// Whether Gateways of a class take traffic of other networks in, of ours or of istiod.
pub fn is_east_west(class: &str, controller: Option<&str>) -> bool {
    match controller {
        Some(controller) => {
            [EAST_WEST_CONTROLLER, ISTIO_EAST_WEST_CONTROLLER].contains(&controller)
        }
        None => matches!(class, "leyline-east-west" | "istio-east-west"),
    }
}

impl Role {
    /// Label `gateway.istio.io/managed`: upstream's values, by which its tools and proxies know waypoints.
    pub fn managed_by(self) -> &'static str {
        match self {
            Self::Waypoint => "istio.io-mesh-controller",
            Self::EastWest => "istio.io-eastwest-controller",
            Self::Remote => "istio.io-unmanaged-gateway",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_told_in_the_order_of_the_api() {
        assert!(WAYPOINT_FEATURES.is_sorted());
        assert!(WAYPOINT_FEATURES.len() <= 64, "the API's limit");
    }
}
