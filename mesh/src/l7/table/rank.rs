//! In which order the rules of a service are tried.

use std::{cmp::Reverse, sync::Arc};

use super::{
    super::route::{HttpMatch, HttpRule, Order, PathMatch, Route, Rules, TextMatch},
    VIRTUAL_SERVICE,
};

/// One match of one rule of one route; a rule without matches has one that holds for every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) route: usize,
    pub(super) rule: usize,
    pub(super) matched: Option<usize>,
}

/// The conditions of an entry; none: every request.
pub(super) fn conditions(routes: &[Arc<Route>], entry: Entry) -> Option<&HttpMatch> {
    rules(&routes[entry.route])[entry.rule]
        .matches
        .get(entry.matched?)
}

fn rules(route: &Route) -> &[HttpRule] {
    match &route.rules {
        Rules::Http { rules, .. } => rules,
        Rules::Tls(_) | Rules::Tcp(_) => &[],
    }
}

/// The greater, the earlier, field by field.
#[derive(Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Specificity {
    /// Exact, prefix, expression, nothing.
    path: u8,
    /// Its characters; of gRPC, the service's.
    length: usize,
    /// Of gRPC, the method's.
    method_length: usize,
    method: bool,
    headers: usize,
    query: usize,
}

fn specificity(conditions: Option<&HttpMatch>) -> Specificity {
    let Some(conditions) = conditions else {
        return specificity(Some(&HttpMatch::default()));
    };
    let (path, length, method_length) = match &conditions.path {
        Some(PathMatch::Exact(it)) => (3, it.chars().count(), 0),
        Some(PathMatch::Segments(it) | PathMatch::Prefix(it)) => (2, it.chars().count(), 0),
        Some(PathMatch::Regex(it)) => (1, it.source().chars().count(), 0),
        Some(PathMatch::Grpc { service, method }) => {
            let (service, method) = (service.as_ref(), method.as_ref());
            let vague = |it: Option<&TextMatch>| matches!(it, Some(TextMatch::Regex(_)));
            let rank = if vague(service) || vague(method) {
                1
            } else {
                2
            };
            (rank, characters(service), characters(method))
        }
        // A request without a condition on its path is one whose path starts with `/`.
        None => (if conditions.grpc { 0 } else { 2 }, 1, 0),
    };
    Specificity {
        path,
        length,
        method_length,
        method: conditions.method.is_some(),
        headers: conditions.headers.len(),
        query: conditions.query.len(),
    }
}

fn characters(text: Option<&TextMatch>) -> usize {
    match text {
        Some(TextMatch::Exact(it) | TextMatch::Prefix(it)) => it.chars().count(),
        Some(TextMatch::Regex(it)) => it.source().chars().count(),
        Some(TextMatch::Present) | None => 0,
    }
}

/// All entries of routes that take effect together, the first to be tried first. Sorts the routes by age, then by
/// name.
pub(super) fn ordered(routes: &mut [Arc<Route>]) -> Vec<Entry> {
    routes.sort_by(|a, b| (a.created, name(a)).cmp(&(b.created, name(b))));
    let written = routes.iter().any(|it| {
        *it.key.kind == *VIRTUAL_SERVICE
            || matches!(
                &it.rules,
                Rules::Http {
                    order: Order::Written,
                    ..
                }
            )
    });
    let mut entries: Vec<_> = (0..routes.len())
        .flat_map(|at| entries(at, &routes[at]))
        .collect();
    if !written {
        // Stable: age, name and position decide between equals.
        entries.sort_by_cached_key(|it| Reverse(specificity(conditions(routes, *it))));
    } else if routes.len() > 1 {
        entries.sort_by_key(|it| takes_all(conditions(routes, *it)));
    }
    entries
}

fn name(route: &Route) -> (&str, &str) {
    (&route.key.namespace, &route.key.name)
}

fn entries(at: usize, route: &Route) -> impl Iterator<Item = Entry> {
    rules(route).iter().enumerate().flat_map(move |(rule, it)| {
        let entry = move |matched| Entry {
            route: at,
            rule,
            matched,
        };
        let every = it.matches.is_empty().then(|| entry(None));
        let each = (0..it.matches.len()).map(move |matched| entry(Some(matched)));
        every.into_iter().chain(each)
    })
}

/// Whether a match of a VirtualService holds for every request: where several are merged, such ones come last.
fn takes_all(conditions: Option<&HttpMatch>) -> bool {
    let Some(conditions) = conditions else {
        return true;
    };
    let path = match &conditions.path {
        None => true,
        Some(PathMatch::Prefix(it) | PathMatch::Segments(it)) => **it == *"/",
        Some(PathMatch::Regex(it)) => matches!(it.source(), ".*" | "/.*"),
        Some(PathMatch::Exact(_) | PathMatch::Grpc { .. }) => false,
    };
    let rest = HttpMatch {
        path: None,
        ignore_path_case: false,
        ..conditions.clone()
    };
    path && rest == HttpMatch::default()
}
