//! In which order the rules of a service are tried.

use std::{
    cmp::{Ordering, Reverse},
    sync::Arc,
};

use super::super::{
    name::ObjectRef,
    route::{HttpMatch, HttpRule, PathMatch, Route, Rules, TextMatch},
};

/// One match of one rule of one route; a rule without matches has one that holds for every request. The less of two is
/// tried first: by rank, then by the route's age and name, then by position.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    rank: Rank,
    pub(super) route: Arc<Route>,
    rule: u32,
    matched: Option<u32>,
}

/// What decides before age does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// The more specific first (Gateway API).
    Precedence(Reverse<Specificity>),
    /// As written; where several routes are merged, what takes every request comes last (VirtualService).
    Written { last: bool },
}

/// How the routes of a table are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ranking {
    /// By precedence.
    Precedence,
    /// As written, by one route alone.
    Written,
    /// As written, by several.
    Merged,
}

impl Entry {
    /// None: every request.
    pub(super) fn conditions(&self) -> Option<&HttpMatch> {
        let rule = rules(&self.route).get(self.rule())?;
        rule.matches.get(usize::try_from(self.matched?).ok()?)
    }

    pub(super) fn rule(&self) -> usize {
        usize::try_from(self.rule).unwrap_or(usize::MAX)
    }

    fn place(&self) -> (i64, &str, &str, &str, u32, Option<u32>) {
        let ObjectRef {
            kind,
            namespace,
            name,
        } = &self.route.key;
        let created = self.route.created;
        (created, namespace, name, kind, self.rule, self.matched)
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_rank = self.rank.cmp(&other.rank);
        by_rank.then_with(|| self.place().cmp(&other.place()))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

#[cfg(test)]
thread_local! {
    /// How many routes have been compiled.
    pub(super) static COMPILED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The entries of a route.
pub(super) fn entries(route: &Arc<Route>, ranking: Ranking) -> impl Iterator<Item = Entry> {
    #[cfg(test)]
    COMPILED.set(COMPILED.get() + 1);
    (0..).zip(rules(route)).flat_map(move |(rule, it)| {
        let entry = move |matched, conditions| Entry {
            rank: Rank::new(ranking, conditions),
            route: Arc::clone(route),
            rule,
            matched,
        };
        let every = it.matches.is_empty().then(|| entry(None, None));
        let each = (0..).zip(&it.matches);
        let each = each.map(move |(at, conditions)| entry(Some(at), Some(conditions)));
        every.into_iter().chain(each)
    })
}

impl Rank {
    fn new(ranking: Ranking, conditions: Option<&HttpMatch>) -> Self {
        match ranking {
            Ranking::Precedence => Self::Precedence(Reverse(specificity(conditions))),
            Ranking::Written => Self::Written { last: false },
            Ranking::Merged => Self::Written {
                last: takes_all(conditions),
            },
        }
    }
}

fn rules(route: &Route) -> &[HttpRule] {
    match &route.rules {
        Rules::Http { rules, .. } => rules,
        Rules::Tls(_) | Rules::Tcp(_) => &[],
    }
}

/// The greater, the earlier, field by field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Specificity {
    /// Exact, prefix, expression, nothing.
    path: u8,
    /// Its characters; of gRPC, the service's.
    length: u32,
    /// Of gRPC, the method's.
    method_length: u32,
    method: bool,
    headers: u32,
    query: u32,
}

fn specificity(conditions: Option<&HttpMatch>) -> Specificity {
    let Some(conditions) = conditions else {
        return specificity(Some(&HttpMatch::default()));
    };
    let (path, length, method_length) = match &conditions.path {
        Some(PathMatch::Exact(it)) => (3, count(it.chars()), 0),
        Some(PathMatch::Segments(it) | PathMatch::Prefix(it)) => (2, count(it.chars()), 0),
        Some(PathMatch::Regex(it)) => (1, count(it.source().chars()), 0),
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
        headers: count(conditions.headers.iter()),
        query: count(conditions.query.iter()),
    }
}

fn characters(text: Option<&TextMatch>) -> u32 {
    match text {
        Some(TextMatch::Exact(it) | TextMatch::Prefix(it)) => count(it.chars()),
        Some(TextMatch::Regex(it)) => count(it.source().chars()),
        Some(TextMatch::Present) | None => 0,
    }
}

fn count(of: impl Iterator) -> u32 {
    u32::try_from(of.count()).unwrap_or(u32::MAX)
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
