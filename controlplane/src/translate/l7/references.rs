//! Which services a waypoint must know because a resource of its own names them.

use std::collections::{BTreeMap, BTreeSet};

use mesh::{
    l7::{
        config::{LogProvider, WaypointConfig},
        route::{Action, Backend, HttpRule, Route, Rules},
        view::Resource,
    },
    names::{NamespacedHostname, Str},
};

/// The services that a resource leads to.
pub fn services(resource: &Resource) -> BTreeSet<NamespacedHostname> {
    match resource {
        Resource::Route(route) => of_route(route),
        Resource::Config(config) => of_config(config),
        Resource::Service(_)
        | Resource::Workload(_)
        | Resource::Labels(_)
        | Resource::Backend(_)
        | Resource::Policy(_)
        | Resource::Authentication(_)
        | Resource::Telemetry(_) => BTreeSet::new(),
    }
}

fn of_route(route: &Route) -> BTreeSet<NamespacedHostname> {
    let backends: Vec<&Backend> = match &route.rules {
        Rules::Http { rules, .. } => rules.iter().flat_map(of_rule).collect(),
        Rules::Tls(rules) => rules
            .iter()
            .flat_map(|rule| weighted(&rule.backends))
            .collect(),
        Rules::Tcp(rules) => rules
            .iter()
            .flat_map(|rule| weighted(&rule.backends))
            .collect(),
    };
    let service = |backend: &Backend| match backend {
        Backend::Service { service, .. } => Some(service.clone()),
        Backend::Invalid(_) => None,
    };
    backends.into_iter().filter_map(service).collect()
}

/// The labels by which a resource tells callers apart, each set once.
pub fn labels_of_callers(resource: &Resource) -> BTreeSet<BTreeMap<Str, Str>> {
    let Resource::Route(route) = resource else {
        return BTreeSet::new();
    };
    let sources: Vec<_> = match &route.rules {
        Rules::Http { rules, .. } => {
            let matches = rules.iter().flat_map(|rule| &rule.matches);
            matches.map(|it| &it.source).collect()
        }
        Rules::Tls(rules) => rules.iter().map(|rule| &rule.source).collect(),
        Rules::Tcp(rules) => rules.iter().map(|rule| &rule.source).collect(),
    };
    let labels = sources.into_iter().flatten().map(|it| &it.labels);
    labels.filter(|it| !it.is_empty()).cloned().collect()
}

fn weighted(backends: &[(u32, Backend)]) -> impl Iterator<Item = &Backend> {
    backends.iter().map(|(_, backend)| backend)
}

fn of_rule(rule: &HttpRule) -> Vec<&Backend> {
    let mut found: Vec<&Backend> = rule.mirrors.iter().map(|mirror| &mirror.backend).collect();
    if let Action::Forward(backends) = &rule.action {
        for backend in backends {
            found.push(&backend.backend);
            found.extend(backend.mirrors.iter().map(|mirror| &mirror.backend));
        }
    }
    found
}

fn of_config(config: &WaypointConfig) -> BTreeSet<NamespacedHostname> {
    let authorizers = config.authorizers.values().map(|it| &it.service);
    let logs = config.log_providers.values().filter_map(|it| match it {
        LogProvider::OpenTelemetry { service, .. } => Some(service),
        LogProvider::File { .. } => None,
    });
    let traces = config.trace_providers.values().map(|it| &it.service);
    authorizers.chain(logs).chain(traces).cloned().collect()
}
