//! TLSRoute and TCPRoute.

use mesh::l7::route::{Backend, Rules, TcpRule, TlsRule};

use super::Notes;
use crate::crd::gateway_api::{HttpBackendRef, StreamRule, TcpRouteSpec, TlsRouteSpec};

pub(super) fn tls(spec: &TlsRouteSpec, notes: &mut Notes<'_>) -> Rules {
    let sni = spec.hostnames.iter();
    let sni: Vec<_> = sni.map(|name| name.to_ascii_lowercase().into()).collect();
    let mut rules = Vec::new();
    for (index, rule) in spec.rules.iter().enumerate() {
        rules.push(TlsRule {
            name: rule.name.as_deref().map(Into::into),
            sni: sni.clone(),
            port: None,
            source: None,
            destinations: Vec::new(),
            backends: backends(index, rule, notes),
        });
    }
    Rules::Tls(rules)
}

pub(super) fn tcp(spec: &TcpRouteSpec, notes: &mut Notes<'_>) -> Rules {
    let mut rules = Vec::new();
    for (index, rule) in spec.rules.iter().enumerate() {
        rules.push(TcpRule {
            name: rule.name.as_deref().map(Into::into),
            port: None,
            source: None,
            destinations: Vec::new(),
            backends: backends(index, rule, notes),
        });
    }
    Rules::Tcp(rules)
}

/// Connections of a rule that cannot be kept have nowhere to go.
fn backends(rule: usize, wanted: &StreamRule, notes: &mut Notes<'_>) -> Vec<(u32, Backend)> {
    let mut all = Vec::new();
    for (index, backend) in wanted.backend_refs.iter().enumerate() {
        let backend = HttpBackendRef::from(backend);
        let weight = notes.weight(rule, index, &backend);
        all.push((weight, notes.backend(&backend.object())));
    }
    match notes.invalid(rule) {
        Some(problem) => vec![(1, Backend::Invalid(problem))],
        None => all,
    }
}
