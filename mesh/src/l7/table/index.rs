//! Finds the first entry that holds without looking at all: by exact path, by the prefixes of a path, and within a
//! crowd of equal paths by host or by one header. A lookup allocates nothing but for a repeated header.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use http::HeaderName;

use super::{
    super::{
        condition::{self, Matched},
        request::RequestFacts,
        route::{HttpMatch, PathMatch, Route, TextMatch},
    },
    Selected,
    rank::{Entry, conditions, ordered},
};
use crate::names::Str;

/// From so many entries on a bucket is split.
const CROWD: usize = 16;

#[derive(Debug)]
pub(super) struct HttpTable {
    routes: Vec<Arc<Route>>,
    /// In the order in which they are tried; buckets hold positions in it.
    entries: Vec<Entry>,
    exact: HashMap<Str, Bucket>,
    /// In the order of their texts.
    prefixes: Vec<Prefix>,
    /// Entries whose path is not indexed.
    rest: Bucket,
    asks_claims: bool,
}

/// A prefix of paths, and its longest proper prefix among the others.
#[derive(Debug)]
struct Prefix {
    text: Str,
    parent: Option<usize>,
    bucket: Bucket,
}

/// Positions of entries, rising.
#[derive(Debug, Default)]
struct Bucket {
    plain: Vec<usize>,
    split: Option<Split>,
}

/// Entries that ask for exactly one value of the same thing.
#[derive(Debug)]
struct Split {
    by: By,
    values: HashMap<Vec<u8>, Vec<usize>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum By {
    Authority,
    Header(HeaderName),
}

/// Where an entry is found.
enum Place {
    Exact(Str),
    Prefix(Str),
    Rest,
}

fn place(conditions: Option<&HttpMatch>) -> Place {
    use PathMatch::{Exact, Grpc, Prefix, Segments};
    let Some(path) = conditions.and_then(|it| it.path.as_ref()) else {
        return Place::Rest;
    };
    let any_case = conditions.is_some_and(|it| it.ignore_path_case);
    match path {
        _ if any_case => Place::Rest,
        Exact(it) => Place::Exact(it.clone()),
        Prefix(it) => Place::Prefix(it.clone()),
        Segments(it) => Place::Prefix(it.strip_suffix('/').unwrap_or(it).into()),
        Grpc {
            service: Some(TextMatch::Exact(service)),
            method,
        } => match method {
            Some(TextMatch::Exact(method)) => Place::Exact(format!("/{service}/{method}").into()),
            _ => Place::Prefix(format!("/{service}/").into()),
        },
        Grpc { .. } | PathMatch::Regex(_) => Place::Rest,
    }
}

impl HttpTable {
    pub(super) fn new(mut routes: Vec<Arc<Route>>) -> Self {
        let entries = ordered(&mut routes);
        let mut exact: HashMap<Str, Vec<usize>> = HashMap::new();
        let mut prefixes: HashMap<Str, Vec<usize>> = HashMap::new();
        let mut rest = Vec::new();
        for (at, entry) in entries.iter().enumerate() {
            match place(conditions(&routes, *entry)) {
                Place::Exact(path) => exact.entry(path).or_default().push(at),
                Place::Prefix(path) => prefixes.entry(path).or_default().push(at),
                Place::Rest => rest.push(at),
            }
        }
        let bucket = |at| Bucket::new(at, |it| conditions(&routes, entries[it]));
        let asks = |it: &Entry| conditions(&routes, *it).is_some_and(|it| !it.claims.is_empty());
        Self {
            exact: exact
                .into_iter()
                .map(|(path, at)| (path, bucket(at)))
                .collect(),
            prefixes: chained(prefixes.into_iter().map(|(path, at)| (path, bucket(at)))),
            rest: bucket(rest),
            asks_claims: entries.iter().any(asks),
            routes,
            entries,
        }
    }

    pub(super) fn asks_claims(&self) -> bool {
        self.asks_claims
    }

    pub(super) fn select(&self, facts: &RequestFacts<'_>) -> Option<Selected> {
        let mut best = None;
        let exact = self.exact.get(facts.path).into_iter();
        let buckets = exact
            .chain(self.prefixes_of(facts.path))
            .chain([&self.rest]);
        for bucket in buckets {
            bucket.first(facts, &mut best, |at| self.holds(at, facts));
        }
        let (at, matched) = best?;
        let entry = self.entries[at];
        Some(Selected {
            route: Arc::clone(&self.routes[entry.route]),
            rule: entry.rule,
            matched,
        })
    }

    fn holds(&self, at: usize, facts: &RequestFacts<'_>) -> Option<Matched> {
        match conditions(&self.routes, self.entries[at]) {
            Some(conditions) => condition::holds(conditions, facts),
            None => Some(Matched::Nothing),
        }
    }

    /// The buckets of all prefixes of a path, the longest first. The last text that is not after the path starts with
    /// the longest of them, which is hence it or one of its parents.
    fn prefixes_of<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a Bucket> {
        let after = self.prefixes.partition_point(|it| *it.text <= *path);
        let last = after.checked_sub(1);
        let chain = std::iter::successors(last, |at| self.prefixes[*at].parent);
        chain
            .map(|at| &self.prefixes[at])
            .filter(move |it| path.starts_with(&*it.text))
            .map(|it| &it.bucket)
    }
}

/// Sorts prefixes and finds their parents.
fn chained(prefixes: impl Iterator<Item = (Str, Bucket)>) -> Vec<Prefix> {
    let mut sorted: Vec<_> = prefixes.collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut chain: Vec<Prefix> = Vec::with_capacity(sorted.len());
    for (text, bucket) in sorted {
        let mut parent = chain.len().checked_sub(1);
        while let Some(at) = parent.filter(|at| !text.starts_with(&*chain[*at].text)) {
            parent = chain[at].parent;
        }
        chain.push(Prefix {
            text,
            parent,
            bucket,
        });
    }
    chain
}

impl Bucket {
    fn new<'a>(entries: Vec<usize>, of: impl Fn(usize) -> Option<&'a HttpMatch>) -> Self {
        let Some(by) = (entries.len() >= CROWD)
            .then(|| most_asked(&entries, &of))
            .flatten()
        else {
            return Self {
                plain: entries,
                split: None,
            };
        };
        let mut values: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
        let mut plain = Vec::new();
        for at in entries {
            match of(at).and_then(|it| by.asked(it)) {
                Some(value) => values.entry(value).or_default().push(at),
                None => plain.push(at),
            }
        }
        Self {
            plain,
            split: Some(Split { by, values }),
        }
    }

    /// Improves `best` by the first entry that holds and comes before it.
    fn first(
        &self,
        facts: &RequestFacts<'_>,
        best: &mut Option<(usize, Matched)>,
        holds: impl Fn(usize) -> Option<Matched>,
    ) {
        let split = self.split.as_ref().and_then(|it| it.entries(facts));
        for entries in [split, Some(&self.plain)].into_iter().flatten() {
            let bound = best.map_or(usize::MAX, |(at, _)| at);
            let mut before = entries.iter().take_while(|at| **at < bound);
            if let Some(found) = before.find_map(|at| Some((*at, holds(*at)?))) {
                *best = Some(found);
            }
        }
    }
}

/// What most entries ask exactly one value of, if more than half do.
fn most_asked<'a>(entries: &[usize], of: impl Fn(usize) -> Option<&'a HttpMatch>) -> Option<By> {
    let mut counts: HashMap<By, usize> = HashMap::new();
    for conditions in entries.iter().filter_map(|at| of(*at)) {
        for by in By::all(conditions) {
            *counts.entry(by).or_default() += 1;
        }
    }
    let (by, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    (count * 2 > entries.len()).then_some(by)
}

impl By {
    fn all(conditions: &HttpMatch) -> impl Iterator<Item = Self> {
        let authority = matches!(conditions.authority, Some(TextMatch::Exact(_)));
        let headers = conditions.headers.iter();
        let headers = headers.filter(|it| matches!(it.value, TextMatch::Exact(_)));
        authority
            .then_some(Self::Authority)
            .into_iter()
            .chain(headers.map(|it| Self::Header(it.name.clone())))
    }

    /// The value that a match asks for.
    fn asked(&self, conditions: &HttpMatch) -> Option<Vec<u8>> {
        let text = match self {
            Self::Authority => conditions.authority.as_ref(),
            Self::Header(name) => {
                let mut headers = conditions.headers.iter();
                headers.find(|it| it.name == *name).map(|it| &it.value)
            }
        };
        match (self, text) {
            (Self::Authority, Some(TextMatch::Exact(it))) => {
                Some(it.to_ascii_lowercase().into_bytes())
            }
            (Self::Header(_), Some(TextMatch::Exact(it))) => Some(it.as_bytes().to_vec()),
            _ => None,
        }
    }
}

impl Split {
    /// The entries that ask for the value that a request has.
    fn entries(&self, facts: &RequestFacts<'_>) -> Option<&Vec<usize>> {
        let value: Cow<'_, [u8]> = match &self.by {
            By::Authority if facts.authority.bytes().any(|it| it.is_ascii_uppercase()) => {
                facts.authority.to_ascii_lowercase().into_bytes().into()
            }
            By::Authority => facts.authority.as_bytes().into(),
            By::Header(name) => condition::header_value(facts.headers, name, facts.authority)?,
        };
        self.values.get(&*value)
    }
}
