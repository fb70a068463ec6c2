//! Rules on connections: TLS by SNI, and TCP.

use std::sync::Arc;

use ipnet::IpNet;

use super::{
    super::{
        request::ConnectionFacts,
        route::{CallerMatch, Route, Rules, TlsRule},
    },
    ConnectionSelected, VIRTUAL_SERVICE,
};

/// Routes by age, then by name.
fn sort(routes: &mut [Arc<Route>]) {
    routes.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
}

#[derive(Clone, Debug)]
pub(super) struct TlsTable {
    routes: Vec<Arc<Route>>,
    /// Whether the first rule that fits wins (VirtualService), and not the one with the most specific name.
    written: bool,
}

impl TlsTable {
    pub(super) fn new(mut routes: Vec<Arc<Route>>) -> Self {
        sort(&mut routes);
        let written = routes.iter().any(|it| *it.key.kind == *VIRTUAL_SERVICE);
        Self { routes, written }
    }

    pub(super) fn select(&self, facts: &ConnectionFacts<'_>) -> Option<ConnectionSelected> {
        let mut best: Option<(usize, ConnectionSelected)> = None;
        for (route, at, rule) in self.rules() {
            let better = |fit: usize| best.as_ref().is_none_or(|(it, _)| fit > *it);
            if let Some(fit) = fit(rule, facts).filter(|it| better(*it)) {
                let route = Arc::clone(route);
                best = Some((fit, ConnectionSelected { route, rule: at }));
                if self.written {
                    break;
                }
            }
        }
        best.map(|(_, selected)| selected)
    }

    fn rules(&self) -> impl Iterator<Item = (&Arc<Route>, usize, &TlsRule)> {
        self.routes.iter().flat_map(|route| {
            let rules = match &route.rules {
                Rules::Tls(rules) => rules.as_slice(),
                Rules::Http { .. } | Rules::Tcp(_) => &[],
            };
            let rules = rules.iter().enumerate();
            rules.map(move |(at, rule)| (route, at, rule))
        })
    }
}

/// How well a rule fits: an exact name best, then the longest wildcard, then none at all.
fn fit(rule: &TlsRule, facts: &ConnectionFacts<'_>) -> Option<usize> {
    if !concerns(rule.port, rule.source.as_deref(), &rule.destinations, facts) {
        return None;
    }
    if rule.sni.is_empty() {
        return Some(0);
    }
    let name = facts.sni?.trim_end_matches('.');
    let fits = rule.sni.iter().filter_map(|pattern| sni_fit(pattern, name));
    fits.max()
}

fn sni_fit(pattern: &str, name: &str) -> Option<usize> {
    match pattern.strip_prefix('*') {
        Some("") => Some(1),
        // `*.suffix`: at least one more label.
        Some(suffix) => {
            let start = name.len().checked_sub(suffix.len()).filter(|it| *it > 0)?;
            let end = name.as_bytes().get(start..)?;
            end.eq_ignore_ascii_case(suffix.as_bytes())
                .then_some(1 + suffix.len())
        }
        None => pattern.eq_ignore_ascii_case(name).then_some(usize::MAX),
    }
}

#[derive(Clone, Debug)]
pub(super) struct TcpTable {
    routes: Vec<Arc<Route>>,
}

impl TcpTable {
    pub(super) fn new(mut routes: Vec<Arc<Route>>) -> Self {
        sort(&mut routes);
        Self { routes }
    }

    pub(super) fn select(&self, facts: &ConnectionFacts<'_>) -> Option<ConnectionSelected> {
        self.routes.iter().find_map(|route| {
            let Rules::Tcp(rules) = &route.rules else {
                return None;
            };
            let rule = rules.iter().position(|rule| {
                concerns(rule.port, rule.source.as_deref(), &rule.destinations, facts)
            })?;
            Some(ConnectionSelected {
                route: Arc::clone(route),
                rule,
            })
        })
    }
}

/// Whether port, caller and address are a rule's.
fn concerns(
    port: Option<u16>,
    source: Option<&CallerMatch>,
    destinations: &[IpNet],
    facts: &ConnectionFacts<'_>,
) -> bool {
    let here = |it: &IpNet| it.contains(&facts.destination);
    port.is_none_or(|it| it == facts.port)
        && source.is_none_or(|it| it.holds(facts))
        && (destinations.is_empty() || destinations.iter().any(here))
}
