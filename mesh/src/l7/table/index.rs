//! Finds the first entry that holds without looking at all: by exact path, by the prefixes of a path, and within a
//! crowd of equal paths by host or by one header. A lookup allocates nothing but for a repeated header.
//!
//! A copy shares its buckets; one route that comes, goes or changes makes anew the buckets that it is in.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use http::HeaderName;

use super::{
    super::{
        condition::{self, Matched},
        request::RequestFacts,
        route::{HttpMatch, PathMatch, Route, TextMatch},
    },
    Selected,
    rank::{Entry, Ranking, entries},
    sorted::Sorted,
};
use crate::names::Str;

/// From so many entries on a bucket is split.
const CROWD: usize = 16;

#[derive(Clone, Debug)]
pub(super) struct HttpTable {
    exact: Sorted<Str, Arc<Bucket>>,
    prefixes: Sorted<Str, Arc<Bucket>>,
    /// Entries whose path is not indexed.
    rest: Arc<Bucket>,
    /// How many entries look at claims.
    asking: usize,
}

/// Entries of one place, rising.
#[derive(Debug, Default)]
struct Bucket {
    plain: Box<[Entry]>,
    split: Option<Box<Split>>,
}

/// Entries that ask for exactly one value of the same thing.
#[derive(Debug)]
struct Split {
    by: By,
    values: HashMap<Vec<u8>, Vec<Entry>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum By {
    Authority,
    Header(HeaderName),
}

/// Where an entry is found.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
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
    pub(super) fn new(routes: &[Arc<Route>], ranking: Ranking) -> Self {
        let mut places: BTreeMap<Place, Vec<Entry>> = BTreeMap::new();
        let mut asking = 0;
        for entry in routes.iter().flat_map(|it| entries(it, ranking)) {
            asking += asks(&entry);
            let place = place(entry.conditions());
            places.entry(place).or_default().push(entry);
        }
        let (mut exact, mut prefixes, mut rest) = (Vec::new(), Vec::new(), Arc::default());
        for (place, entries) in places {
            let bucket = Arc::new(Bucket::new(entries));
            match place {
                Place::Exact(path) => exact.push((path, bucket)),
                Place::Prefix(path) => prefixes.push((path, bucket)),
                Place::Rest => rest = bucket,
            }
        }
        Self {
            exact: Sorted::of_rising(exact),
            prefixes: Sorted::of_rising(prefixes),
            rest,
            asking,
        }
    }

    /// Takes a route out, and another in.
    pub(super) fn replace(&mut self, old: Option<&Arc<Route>>, new: Option<&Arc<Route>>) {
        let mut places: BTreeMap<Place, Vec<Entry>> = BTreeMap::new();
        let entries = |of| entries(of, Ranking::Precedence);
        for entry in old.into_iter().flat_map(entries) {
            self.asking = self.asking.saturating_sub(asks(&entry));
            places.entry(place(entry.conditions())).or_default();
        }
        for entry in new.into_iter().flat_map(entries) {
            self.asking += asks(&entry);
            let place = place(entry.conditions());
            places.entry(place).or_default().push(entry);
        }
        for (place, entries) in places {
            let stays = |it: &&Entry| old.is_none_or(|old| it.route.key != old.key);
            let change = |bucket: Option<&Arc<Bucket>>| {
                let known = bucket.into_iter().flat_map(|it| it.entries()).filter(stays);
                let all: Vec<_> = known.cloned().chain(entries).collect();
                (!all.is_empty()).then(|| Arc::new(Bucket::new(all)))
            };
            match place {
                Place::Exact(path) => self.exact.update(path, change),
                Place::Prefix(path) => self.prefixes.update(path, change),
                Place::Rest => self.rest = change(Some(&self.rest)).unwrap_or_default(),
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        let rest = self.rest.entries().next();
        self.exact.is_empty() && self.prefixes.is_empty() && rest.is_none()
    }

    pub(super) fn asks_claims(&self) -> bool {
        self.asking > 0
    }

    pub(super) fn select(&self, facts: &RequestFacts<'_>) -> Option<Selected> {
        let mut best = None;
        let exact = self.exact.last(|it| **it <= *facts.path);
        let exact = exact.filter(|(path, _)| ***path == *facts.path);
        let exact = exact.map(|(_, bucket)| &**bucket);
        let buckets = exact.into_iter();
        let buckets = buckets.chain(self.prefixes_of(facts.path));
        for bucket in buckets.chain([&*self.rest]) {
            bucket.first(facts, &mut best);
        }
        let (entry, matched) = best?;
        Some(Selected {
            route: Arc::clone(&entry.route),
            rule: entry.rule(),
            matched,
        })
    }

    /// The buckets of all prefixes of a path, the longest first. The last text that is not after the path is the longest
    /// of them, or no longer one has more in common with the path than it has.
    fn prefixes_of<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a Bucket> {
        let mut within = Some(path.as_bytes());
        std::iter::from_fn(move || {
            loop {
                let path = within?;
                let (text, bucket) = self.prefixes.last(|it| it.as_bytes() <= path)?;
                let shared = common(text.as_bytes(), path);
                if shared == text.len() {
                    within = shared.checked_sub(1).map(|it| &path[..it]);
                    return Some(&**bucket);
                }
                within = Some(&path[..shared]);
            }
        })
    }
}

/// How many bytes two texts begin with alike.
fn common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn asks(entry: &Entry) -> usize {
    let asks = entry.conditions().is_some_and(|it| !it.claims.is_empty());
    usize::from(asks)
}

fn holds(entry: &Entry, facts: &RequestFacts<'_>) -> Option<Matched> {
    match entry.conditions() {
        Some(conditions) => condition::holds(conditions, facts),
        None => Some(Matched::Nothing),
    }
}

impl Bucket {
    fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_unstable();
        let crowd = entries.len() >= CROWD;
        let Some(by) = crowd.then(|| most_asked(&entries)).flatten() else {
            return Self {
                plain: entries.into(),
                split: None,
            };
        };
        let mut values: HashMap<Vec<u8>, Vec<Entry>> = HashMap::new();
        let mut plain = Vec::new();
        for entry in entries {
            match entry.conditions().and_then(|it| by.asked(it)) {
                Some(value) => values.entry(value).or_default().push(entry),
                None => plain.push(entry),
            }
        }
        Self {
            plain: plain.into(),
            split: Some(Box::new(Split { by, values })),
        }
    }

    /// All, in no order.
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        let split = self.split.iter().flat_map(|it| it.values.values());
        self.plain.iter().chain(split.flatten())
    }

    /// Improves `best` by the first entry that holds and comes before it.
    fn first<'a>(&'a self, facts: &RequestFacts<'_>, best: &mut Option<(&'a Entry, Matched)>) {
        let split = self.split.as_ref().and_then(|it| it.entries(facts));
        for entries in [split, Some(&*self.plain)].into_iter().flatten() {
            let bound = best.map(|(entry, _)| entry);
            let mut before = entries
                .iter()
                .take_while(|it| bound.is_none_or(|bound| *it < bound));
            if let Some(found) = before.find_map(|it| Some((it, holds(it, facts)?))) {
                *best = Some(found);
            }
        }
    }
}

/// What most entries ask exactly one value of, if more than half do.
fn most_asked(entries: &[Entry]) -> Option<By> {
    let mut counts: HashMap<By, usize> = HashMap::new();
    for conditions in entries.iter().filter_map(Entry::conditions) {
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
    fn entries(&self, facts: &RequestFacts<'_>) -> Option<&[Entry]> {
        let value: Cow<'_, [u8]> = match &self.by {
            By::Authority if facts.authority.bytes().any(|it| it.is_ascii_uppercase()) => {
                facts.authority.to_ascii_lowercase().into_bytes().into()
            }
            By::Authority => facts.authority.as_bytes().into(),
            By::Header(name) => condition::header_value(facts.headers, name, facts.authority)?,
        };
        self.values.get(&*value).map(Vec::as_slice)
    }
}
