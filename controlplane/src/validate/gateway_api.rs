//! Routes and policies of the Gateway API: what translation could not keep, and what has no effect in a mesh.

use super::Findings;
use crate::{
    crd::gateway_api::{
        BackendTlsPolicySpec, BackendTrafficPolicySpec, ParentRef, PolicyTargetRef,
    },
    object::{GrpcRoute, HttpRoute, TcpRoute, TlsRoute},
    translate::l7::gateway_api::{self, RouteObject, backend_tls},
};

/// Limits of the Gateway API's own definitions.
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 128;
const MAX_MATCHES_OF_RULE: usize = 64;
const MAX_ITEMS: usize = 16;
const MAX_PARENTS: usize = 32;

pub(super) fn http_route(route: &HttpRoute, found: &mut Findings) {
    let spec = &route.spec;
    parents(&spec.parent_refs, found);
    hostnames(&spec.hostnames, found);
    most("spec.rules", spec.rules.len(), MAX_RULES, found);
    for (index, rule) in spec.rules.iter().enumerate() {
        let path = |field| format!("spec.rules[{index}].{field}");
        most(
            &path("matches"),
            rule.matches.len(),
            MAX_MATCHES_OF_RULE,
            found,
        );
        most(&path("filters"), rule.filters.len(), MAX_ITEMS, found);
        most(
            &path("backendRefs"),
            rule.backend_refs.len(),
            MAX_ITEMS,
            found,
        );
    }
    let matches = spec.rules.iter().map(|rule| rule.matches.len()).sum();
    most("spec.rules[].matches", matches, MAX_MATCHES, found);
    rules(RouteObject::Http(route.clone()), found);
}

pub(super) fn grpc_route(route: &GrpcRoute, found: &mut Findings) {
    let spec = &route.spec;
    parents(&spec.parent_refs, found);
    hostnames(&spec.hostnames, found);
    most("spec.rules", spec.rules.len(), MAX_RULES, found);
    for (index, rule) in spec.rules.iter().enumerate() {
        let path = |field| format!("spec.rules[{index}].{field}");
        most(
            &path("matches"),
            rule.matches.len(),
            MAX_MATCHES_OF_RULE,
            found,
        );
        most(&path("filters"), rule.filters.len(), MAX_ITEMS, found);
        most(
            &path("backendRefs"),
            rule.backend_refs.len(),
            MAX_ITEMS,
            found,
        );
    }
    rules(RouteObject::Grpc(route.clone()), found);
}

pub(super) fn tls_route(route: &TlsRoute, found: &mut Findings) {
    let spec = &route.spec;
    parents(&spec.parent_refs, found);
    most("spec.rules", spec.rules.len(), MAX_RULES, found);
    most("spec.hostnames", spec.hostnames.len(), MAX_ITEMS, found);
    for (index, name) in spec.hostnames.iter().enumerate() {
        if !super::is_hostname(name, true) {
            found.error(
                format!("spec.hostnames[{index}]"),
                format!("{name:?} is no host name"),
            );
        }
    }
    rules(RouteObject::Tls(route.clone()), found);
}

pub(super) fn tcp_route(route: &TcpRoute, found: &mut Findings) {
    parents(&route.spec.parent_refs, found);
    most("spec.rules", route.spec.rules.len(), MAX_RULES, found);
    rules(RouteObject::Tcp(route.clone()), found);
}

pub(super) fn backend_tls(spec: &BackendTlsPolicySpec, found: &mut Findings) {
    targets(&spec.target_refs, found);
    for problem in backend_tls::problems(spec) {
        found.error("spec.validation", problem);
    }
}

pub(super) fn backend_traffic(spec: &BackendTrafficPolicySpec, found: &mut Findings) {
    targets(&spec.target_refs, found);
    if let Err(problem) = backend_tls::asked(spec) {
        found.error("spec", problem);
    }
}

fn rules(route: RouteObject, found: &mut Findings) {
    for problem in gateway_api::problems(route) {
        found.error(problem.path, problem.message);
    }
}

fn most(path: &str, count: usize, limit: usize, found: &mut Findings) {
    if count > limit {
        found.error(path, format!("{count} items; at most {limit}"));
    }
}

fn parents(parents: &[ParentRef], found: &mut Findings) {
    most("spec.parentRefs", parents.len(), MAX_PARENTS, found);
    for (index, parent) in parents.iter().enumerate() {
        let group = parent
            .group
            .as_deref()
            .unwrap_or("gateway.networking.k8s.io");
        let kind = parent.kind.as_deref().unwrap_or("Gateway");
        let path = format!("spec.parentRefs[{index}]");
        if parent.name.is_empty() {
            found.error(format!("{path}.name"), "is missing");
        }
        match (group, kind) {
            ("", "Service") | ("networking.istio.io", "ServiceEntry") => {}
            (_, "Gateway") => found.warning(
                path,
                "waypoints take routes from services (kind: Service, group: \"\")",
            ),
            (_, kind) => found.warning(path, format!("nobody in the mesh serves a {kind}")),
        }
    }
}

fn hostnames(hostnames: &[String], found: &mut Findings) {
    if !hostnames.is_empty() {
        found.warning(
            "spec.hostnames",
            "do not restrict what a route of a service is for",
        );
    }
}

fn targets(targets: &[PolicyTargetRef], found: &mut Findings) {
    most("spec.targetRefs", targets.len(), MAX_ITEMS, found);
    for (index, target) in targets.iter().enumerate() {
        let known = matches!(
            (target.group.as_str(), target.kind.as_str()),
            ("" | "core", "Service") | ("networking.istio.io", "ServiceEntry")
        );
        if !known {
            let path = format!("spec.targetRefs[{index}]");
            found.warning(
                path,
                format!("a {} has no endpoints of the mesh", target.kind),
            );
        }
    }
}
