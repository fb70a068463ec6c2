//! What is wrong with an object that reads well: the rules that Istio's admission webhook has for these kinds, so that a
//! folder, admission and `leyline analyze` refuse the same things.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use crate::{
    crd::{MatchLabels, TargetRef},
    object::{Gateway, Meta, Object},
    translate::{
        l7::{config, rate_limit},
        policy::target_kind,
    },
};

pub mod admission;
mod authorization;
mod entry;
mod gateway_api;
mod istio;
mod others;

/// Something wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field: `spec.rules[0].from[0].source`.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
    /// How bad it is.
    pub severity: Severity,
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The object is refused.
    Error,
    /// It is accepted, and probably does not do what it should.
    Warning,
}

/// Everything wrong with an object.
pub fn validate(object: &Object) -> Vec<Problem> {
    let mut found = Findings::default();
    metadata(object.meta(), &mut found);
    match object {
        Object::AuthorizationPolicy(policy) => authorization::validate(&policy.spec, &mut found),
        Object::PeerAuthentication(policy) => peer_authentication(&policy.spec, &mut found),
        Object::ServiceEntry(entry) => entry::service_entry(entry, &mut found),
        Object::WorkloadEntry(entry) => entry::workload_entry(&entry.spec, "spec", &mut found),
        Object::HttpRoute(route) => gateway_api::http_route(route, &mut found),
        Object::GrpcRoute(route) => gateway_api::grpc_route(route, &mut found),
        Object::TlsRoute(route) => gateway_api::tls_route(route, &mut found),
        Object::TcpRoute(route) => gateway_api::tcp_route(route, &mut found),
        Object::BackendTlsPolicy(policy) => gateway_api::backend_tls(&policy.spec, &mut found),
        Object::Gateway(gateway) => annotations(gateway, &mut found),
        Object::BackendTrafficPolicy(policy) => {
            gateway_api::backend_traffic(&policy.spec, &mut found);
        }
        // Kubernetes' own kinds are validated by their own rules; where a value means nothing, translation leaves it out.
        Object::ConfigMap(_)
        | Object::EndpointSlice(_)
        | Object::GatewayClass(_)
        | Object::Namespace(_)
        | Object::Node(_)
        | Object::Other(..)
        | Object::Pod(_)
        | Object::Secret(_)
        | Object::Service(_) => {}
        Object::DestinationRule(rule) => istio::destination_rule(&rule.spec, &mut found),
        Object::RequestAuthentication(it) => istio::request_authentication(&it.spec, &mut found),
        Object::Telemetry(it) => istio::telemetry(&it.spec, &mut found),
        Object::VirtualService(it) => {
            if let Err(problem) = rate_limit::of(&it.meta) {
                found.error(rate_limit::path(), problem);
            }
            istio::virtual_service(&it.spec, &mut found);
        }
    }
    found.0
}

/// What is found wrong, in order.
#[derive(Default)]
pub struct Findings(Vec<Problem>);

impl Findings {
    /// The problems.
    pub fn into_problems(self) -> Vec<Problem> {
        self.0
    }

    /// Something for which the object is refused.
    pub fn error(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.add(path, message, Severity::Error);
    }

    /// Something that probably does not do what it should.
    pub fn warning(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.add(path, message, Severity::Warning);
    }

    fn add(&mut self, path: impl Into<String>, message: impl Into<String>, severity: Severity) {
        self.0.push(Problem {
            path: path.into(),
            message: message.into(),
            severity,
        });
    }
}

/// RFC 1123 subdomain, as Kubernetes has it.
fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label)
}

/// Whether this is a label as RFC 1123 and Kubernetes have it.
pub fn is_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Kubernetes' label keys: an optional DNS prefix and a name.
fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_label_name(name),
        None => is_label_name(key),
    }
}

fn is_label_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let outer = |c: char| c.is_ascii_alphanumeric();
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(inner)
        && name.starts_with(outer)
        && name.ends_with(outer)
}

fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_label_name(value)
}

/// A host name, with a wildcard as its first label where `wildcard`.
fn is_hostname(name: &str, wildcard: bool) -> bool {
    let name = match name.strip_prefix("*.") {
        Some(rest) if wildcard => rest,
        Some(_) => return false,
        None => name,
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    // Underscores occur in real host names.
    is_subdomain(&name.replace('_', "-").replace("--", "-"))
}

fn metadata(meta: &Meta, found: &mut Findings) {
    let name = &meta.name.name;
    // Kubernetes' path-segment names (RBAC and the like) do not occur among the kinds that are read.
    if !is_subdomain(name) {
        found.error("metadata.name", format!("{name:?} is no DNS name"));
    }
    for (key, value) in &*meta.labels {
        if !is_label_key(key) {
            found.error("metadata.labels", format!("{key:?} is no label key"));
        }
        if !is_label_value(value) {
            found.error(
                format!("metadata.labels[{key:?}]"),
                format!("{value:?} is no label value"),
            );
        }
    }
}

/// A waypoint without the bounds that were asked for serves as well.
fn annotations(gateway: &Gateway, found: &mut Findings) {
    for problem in config::of_gateway(gateway).problems {
        let path = format!("metadata.annotations[{:?}]", config::BUCKETS);
        found.warning(path, problem);
    }
}

/// What a policy selects: by labels, or by targets, but not both.
fn selection(
    selector: Option<&MatchLabels>,
    target: Option<&TargetRef>,
    targets: &[TargetRef],
    found: &mut Findings,
) {
    let ways = [selector.is_some(), target.is_some(), !targets.is_empty()];
    if ways.iter().filter(|way| **way).count() > 1 {
        found.error(
            "spec",
            "only one of selector, targetRef and targetRefs may be set",
        );
    }
    if let Some(selector) = selector {
        match_labels(selector, found);
    }
    if let Some(target) = target {
        target_ref(target, "spec.targetRef", found);
    }
    for (index, target) in targets.iter().enumerate() {
        target_ref(target, &format!("spec.targetRefs[{index}]"), found);
    }
}

fn match_labels(selector: &MatchLabels, found: &mut Findings) {
    const PATH: &str = "spec.selector";
    if selector.match_labels.is_empty() {
        found.warning(
            PATH,
            "an empty selector selects everything in the namespace",
        );
    }
    for (key, value) in &selector.match_labels {
        if key.is_empty() || key.contains('*') || value.contains('*') {
            found.error(
                PATH,
                format!("{key:?}: {value:?}: keys must not be empty, wildcards are not supported"),
            );
        }
    }
}

fn target_ref(target: &TargetRef, path: &str, found: &mut Findings) {
    if target.name.is_empty() {
        found.error(path, "a target needs a name");
    }
    if !target.namespace.is_empty() {
        found.error(
            path,
            "a target in another namespace is not supported; leave the namespace out",
        );
    }
    if target_kind(target).is_none() {
        let (group, kind) = (&target.group, &target.kind);
        found.error(path, format!("{kind} of {group:?} cannot be a target: Service, ServiceEntry, Gateway or GatewayClass can"));
    }
}

fn peer_authentication(spec: &crate::crd::PeerAuthenticationSpec, found: &mut Findings) {
    selection(spec.selector.as_ref(), None, &[], found);
    const PATH: &str = "spec.portLevelMtls";
    let Some(ports) = &spec.port_level_mtls else {
        return;
    };
    let selects = spec
        .selector
        .as_ref()
        .is_some_and(|selector| !selector.match_labels.is_empty());
    if !selects {
        found.error(PATH, "needs a selector that is not empty");
    }
    if ports.is_empty() {
        found.error(PATH, "is empty");
    }
    for port in ports.keys() {
        if !port.parse::<u16>().is_ok_and(|port| port != 0) {
            found.error(format!("{PATH}.{port}"), "is no port from 1 to 65535");
        }
    }
}

fn is_address_or_range(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok() || text.parse::<IpNet>().is_ok()
}

/// The first text that occurs twice.
fn repeated<'t>(texts: impl IntoIterator<Item = &'t str>) -> Option<&'t str> {
    let mut seen = BTreeSet::new();
    texts.into_iter().find(|text| !seen.insert(*text))
}

#[cfg(test)]
mod tests;
