//! The resources as a log: the newest change of each name, in the order of the changes.
//!
//! A reader is a cursor into the log; what lies behind it is exactly what it misses, each name once. Removed names stay
//! as tombstones so that a reader learns of the removal; the oldest are dropped when they outnumber the living, and a
//! reader that stood before them must start over (it knows what it has, and sends the versions).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map},
    sync::{Arc, Weak},
    time::Duration,
};

use mesh::names::Str;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use proto::ADDRESS_TYPE_URL;
use tokio::{sync::watch, time::Instant};

use super::{
    encode::{Aliases, Payload, PayloadBuilder},
    view::{Sequence, View, is_service},
};
use crate::{
    object::Name,
    output::{Changes, Resource, ResourceKey},
};

/// Tombstones kept at least, however small the world is.
const MIN_TOMBSTONES: usize = 16 * 1024;
/// Gateways without resources that are remembered, so that their waypoints learn what was removed.
const MAX_EMPTY_SCOPES: usize = 256;
/// How old a full world may be and still be given to a newcomer, who then catches up from its place.
const FULL_MAX_AGE: Duration = Duration::from_secs(1);
/// Larger payloads are shared only as long as someone sends them.
const KEPT_PAYLOAD_BYTES: usize = 4 << 20;

/// Everything that is served, shared by all subscribers.
#[derive(Debug)]
pub struct Store {
    state: RwLock<State>,
    payloads: Mutex<HashMap<CacheKey, Cached>>,
    head: watch::Sender<Sequence>,
}

/// One consistent picture of the store; writers wait while it is held, so it is never held across an await.
#[derive(Debug, Default)]
pub(super) struct State {
    head: Sequence,
    logs: Logs,
    /// What only one waypoint gets, by its Gateway.
    scoped: HashMap<Name, Logs>,
    /// The newest place at which a Gateway without resources was forgotten.
    forgotten: Sequence,
    index: Index,
    services: usize,
}

type Logs = HashMap<&'static str, Log>;

/// Type, whose resources, and for whom.
type CacheKey = (String, Option<Name>, Reader);

#[derive(Debug, Default)]
struct Log {
    entries: HashMap<Str, Entry>,
    order: BTreeMap<Sequence, Str>,
    tombstones: BTreeSet<Sequence>,
    floor: Sequence,
}

#[derive(Debug)]
struct Entry {
    sequence: Sequence,
    resource: Option<Arc<Resource>>,
}

/// Other ways to find addresses than by their name.
#[derive(Debug, Default)]
struct Index {
    aliases: Names,
    members: Names,
    nodes: Names,
}

type Names = HashMap<Str, Members>;

/// Names under one key. Nearly every address is one workload's or one service's.
#[derive(Debug)]
enum Members {
    One(Str),
    Many(BTreeSet<Str>),
}

#[derive(Debug)]
struct Cached {
    payload: Weak<Payload>,
    /// Small ones outlive their readers until the next change.
    _kept: Option<Arc<Payload>>,
    made: Instant,
}

/// Whom a payload is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Reader {
    /// Has nothing yet; takes a world that is a little old, and catches up.
    Newcomer,
    /// Has everything up to here.
    At(Sequence),
}

/// The reader's place is gone from the log: what was removed since is no longer known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lagged;

impl Default for Store {
    fn default() -> Self {
        Self {
            state: RwLock::default(),
            payloads: Mutex::default(),
            head: watch::Sender::new(0),
        }
    }
}

impl Store {
    /// Takes a batch in; readers see all of it or nothing.
    pub fn apply(&self, changes: &Changes) {
        let head = {
            let mut state = self.state.write();
            for resource in &changes.upserts {
                state.upsert(resource);
            }
            for key in &changes.removals {
                state.remove(key);
            }
            state.compact();
            state.head
        };
        self.head.send_if_modified(|known| {
            let moved = *known != head;
            *known = head;
            moved
        });
    }

    /// Tells when the log grows.
    pub fn watch(&self) -> watch::Receiver<Sequence> {
        self.head.subscribe()
    }

    /// How many resources of a type there are.
    pub fn count(&self, type_url: &str) -> usize {
        let state = self.read();
        let logs = std::iter::once(&state.logs).chain(state.scoped.values());
        logs.filter_map(|logs| logs.get(type_url))
            .map(Log::live)
            .sum()
    }

    /// How many services there are.
    pub fn services(&self) -> usize {
        self.read().services
    }

    /// How many of the services have no workload. Looks at each service that has one.
    pub fn services_without_workloads(&self) -> usize {
        let state = self.read();
        let view = View::of(ADDRESS_TYPE_URL, None);
        let members = state.index.members.keys();
        let with = members.filter(|name| state.get(view, name).is_some_and(|it| is_service(it)));
        state.services.saturating_sub(with.count())
    }

    /// All resources of a type that are everyone's, in the order of their last change.
    pub fn resources(&self, type_url: &str) -> Vec<Arc<Resource>> {
        let state = self.read();
        state.live(View::of(type_url, None)).cloned().collect()
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read()
    }

    /// The payload that brings a reader of everything up to date: built once, shared by all who stand where it does.
    /// For a newcomer it may be up to a second old; [`Payload::to`] tells the new place.
    pub(super) fn payload(
        &self,
        state: &State,
        view: View<'_>,
        reader: Reader,
    ) -> Result<Arc<Payload>, Lagged> {
        let key = (view.type_url().to_owned(), view.scope().cloned(), reader);
        let usable = |cached: &Cached| {
            let payload = cached.payload.upgrade()?;
            let recent = reader == Reader::Newcomer
                && cached.made.elapsed() < FULL_MAX_AGE
                && state.floor(view) <= payload.to;
            (payload.to == state.head || recent).then_some(payload)
        };
        let mut payloads = self.payloads.lock();
        if let Some(payload) = payloads.get(&key).and_then(usable) {
            return Ok(payload);
        }
        let payload = Arc::new(state.build(view, reader)?);
        payloads.retain(|known, cached| {
            let payload = cached.payload.upgrade();
            let useful = |it: Arc<Payload>| known.2 == Reader::Newcomer || it.to == state.head;
            let other = (&known.0, &known.1) != (&key.0, &key.1);
            other && state.is_known(known.1.as_ref()) || payload.is_some_and(useful)
        });
        let kept = (payload.bytes() <= KEPT_PAYLOAD_BYTES).then(|| payload.clone());
        let cached = Cached {
            payload: Arc::downgrade(&payload),
            _kept: kept,
            made: Instant::now(),
        };
        payloads.insert(key, cached);
        Ok(payload)
    }
}

impl State {
    /// The newest change.
    pub(super) fn head(&self) -> Sequence {
        self.head
    }

    fn log(&self, view: View<'_>) -> Option<&Log> {
        let logs = match view.scope() {
            None => &self.logs,
            Some(scope) => self.scoped.get(scope)?,
        };
        logs.get(view.log())
    }

    fn log_of(&mut self, type_url: &'static str, scope: Option<&Name>) -> &mut Log {
        let logs = match scope {
            None => &mut self.logs,
            Some(scope) => self.scoped.entry(scope.clone()).or_default(),
        };
        // A Gateway that was forgotten and is there again: what its readers have of earlier is unknown.
        let floor = if scope.is_some() { self.forgotten } else { 0 };
        logs.entry(type_url).or_insert_with(|| Log {
            floor,
            ..Log::default()
        })
    }

    fn is_known(&self, scope: Option<&Name>) -> bool {
        scope.is_none_or(|scope| self.scoped.contains_key(scope))
    }

    fn compact(&mut self) {
        let scoped = self.scoped.values_mut().flat_map(HashMap::values_mut);
        for log in self.logs.values_mut().chain(scoped) {
            log.compact(MIN_TOMBSTONES);
        }
        let is_empty = |logs: &Logs| logs.values().all(|log| log.live() == 0);
        let empty = self.scoped.iter().filter(|(_, logs)| is_empty(logs));
        let empty: Vec<Name> = empty.map(|(scope, _)| scope.clone()).collect();
        if empty.len() > MAX_EMPTY_SCOPES {
            self.forgotten = self.head;
            for scope in empty {
                self.scoped.remove(&scope);
            }
        }
    }

    fn floor(&self, view: View<'_>) -> Sequence {
        self.log(view).map_or(0, |log| log.floor)
    }

    /// The resource of exactly this name.
    pub(super) fn get(&self, view: View<'_>, name: &str) -> Option<&Arc<Resource>> {
        let resource = self.log(view)?.entries.get(name)?.resource.as_ref()?;
        view.shows(resource).then_some(resource)
    }

    /// All there is, in the order of the last change.
    pub(super) fn live<'a>(&'a self, view: View<'a>) -> impl Iterator<Item = &'a Arc<Resource>> {
        let log = self.log(view);
        log.into_iter().flat_map(move |log| {
            let entries = log.order.values().filter_map(|name| log.entries.get(name));
            let resources = entries.filter_map(|entry| entry.resource.as_ref());
            resources.filter(move |resource| view.shows(resource))
        })
    }

    /// What changed after `cursor`, oldest first: each name once, with its resource if it is still there.
    pub(super) fn since<'a>(
        &'a self,
        view: View<'a>,
        cursor: Sequence,
    ) -> Result<impl Iterator<Item = (&'a Str, Option<&'a Arc<Resource>>)>, Lagged> {
        let log = self.log(view);
        if log.is_some_and(|log| cursor < log.floor) {
            return Err(Lagged);
        }
        let changes = log.into_iter().flat_map(move |log| {
            let names = log.order.range(cursor + 1..).map(|(_, name)| name);
            names.filter_map(|name| Some((name, log.entries.get(name)?.resource.as_ref())))
        });
        Ok(changes.filter(move |(_, resource)| resource.is_none_or(|r| view.shows(r))))
    }

    /// What a name asked for on demand stands for: a workload by uid or address; a service by name or address with all
    /// its workloads. Empty if nothing has it (control-plane.md 8.2).
    pub(super) fn resolve(&self, view: View<'_>, key: &str) -> Vec<&Arc<Resource>> {
        let mut names: Vec<&str> = Vec::new();
        if self.get(view, key).is_some() {
            names.push(key);
        } else if let Some(found) = self.index.aliases.get(key) {
            names.extend(found.iter().map(|name| &**name));
        }
        let members: Vec<&str> = names
            .iter()
            .filter_map(|name| self.index.members.get(*name))
            .flat_map(|members| members.iter().map(|name| &**name))
            .collect();
        let all = names.into_iter().chain(members);
        all.filter_map(|name| self.get(view, name)).collect()
    }

    /// The workloads of a node.
    pub(super) fn on_node<'a>(
        &'a self,
        view: View<'a>,
        node: &str,
    ) -> impl Iterator<Item = &'a Arc<Resource>> {
        let names = self.index.nodes.get(node);
        let names = names.into_iter().flat_map(Members::iter);
        names.filter_map(move |name| self.get(view, name))
    }

    fn upsert(&mut self, resource: &Arc<Resource>) {
        let head = self.head + 1;
        let log = self.log_of(resource.type_url, resource.scope.as_deref());
        let old = log.entries.get(&resource.name);
        let old = old.and_then(|entry| entry.resource.clone());
        if old
            .as_ref()
            .is_some_and(|old| old.version == resource.version && **old == **resource)
        {
            return;
        }
        log.put(head, &resource.name, Some(resource.clone()));
        self.head = head;
        if resource.type_url == ADDRESS_TYPE_URL && resource.scope.is_none() {
            if let Some(old) = old {
                self.index.forget(&old);
                self.services -= usize::from(is_service(&old));
            }
            self.index.learn(resource);
            self.services += usize::from(is_service(resource));
        }
    }

    fn remove(&mut self, key: &ResourceKey) {
        let (type_url, name, head) = (key.type_url, &key.name, self.head + 1);
        let log = self.log_of(type_url, key.scope.as_deref());
        let entry = log.entries.get(name);
        let Some(old) = entry.and_then(|entry| entry.resource.clone()) else {
            return;
        };
        log.put(head, name, None);
        self.head = head;
        if type_url == ADDRESS_TYPE_URL && key.scope.is_none() {
            self.index.forget(&old);
            self.services -= usize::from(is_service(&old));
        }
    }

    fn build(&self, view: View<'_>, reader: Reader) -> Result<Payload, Lagged> {
        let mut builder = PayloadBuilder::new(view, Aliases::Omit);
        match reader {
            Reader::Newcomer => self
                .live(view)
                .for_each(|resource| builder.upsert(resource)),
            Reader::At(place) => {
                self.since(view, place)?
                    .for_each(|(name, resource)| match resource {
                        Some(resource) => builder.upsert(resource),
                        None => builder.remove(name),
                    })
            }
        }
        Ok(builder.build(self.head))
    }
}

impl Log {
    fn put(&mut self, sequence: Sequence, name: &Str, resource: Option<Arc<Resource>>) {
        if resource.is_none() {
            self.tombstones.insert(sequence);
        }
        self.order.insert(sequence, name.clone());
        let entry = Entry { sequence, resource };
        if let Some(old) = self.entries.insert(name.clone(), entry) {
            self.order.remove(&old.sequence);
            self.tombstones.remove(&old.sequence);
        }
    }

    fn live(&self) -> usize {
        self.entries.len() - self.tombstones.len()
    }

    fn compact(&mut self, least: usize) {
        let live = self.live();
        while self.tombstones.len() > live.max(least)
            && let Some(sequence) = self.tombstones.pop_first()
        {
            if let Some(name) = self.order.remove(&sequence) {
                self.entries.remove(&name);
            }
            self.floor = sequence;
        }
    }
}

impl Members {
    fn iter(&self) -> impl Iterator<Item = &Str> {
        let (one, many) = match self {
            Self::One(name) => (Some(name), None),
            Self::Many(names) => (None, Some(names)),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    fn add(&mut self, name: &Str) {
        match self {
            Self::One(known) if known == name => {}
            Self::One(known) => *self = Self::Many([known.clone(), name.clone()].into()),
            Self::Many(names) => drop(names.insert(name.clone())),
        }
    }

    /// True when none is left.
    fn remove(&mut self, name: &Str) -> bool {
        match self {
            Self::One(known) => known == name,
            Self::Many(names) => {
                names.remove(name);
                names.is_empty()
            }
        }
    }
}

impl Index {
    fn learn(&mut self, resource: &Resource) {
        let name = &resource.name;
        let add = |map: &mut Names, key: &Str| match map.entry(key.clone()) {
            hash_map::Entry::Occupied(mut known) => known.get_mut().add(name),
            hash_map::Entry::Vacant(place) => drop(place.insert(Members::One(name.clone()))),
        };
        resource
            .aliases
            .iter()
            .for_each(|alias| add(&mut self.aliases, alias));
        resource
            .services
            .iter()
            .for_each(|service| add(&mut self.members, service));
        resource
            .node
            .iter()
            .for_each(|node| add(&mut self.nodes, node));
    }

    fn forget(&mut self, resource: &Resource) {
        let remove = |map: &mut Names, key: &Str| {
            if map
                .get_mut(key)
                .is_some_and(|names| names.remove(&resource.name))
            {
                map.remove(key);
            }
        };
        resource
            .aliases
            .iter()
            .for_each(|alias| remove(&mut self.aliases, alias));
        resource
            .services
            .iter()
            .for_each(|service| remove(&mut self.members, service));
        resource
            .node
            .iter()
            .for_each(|node| remove(&mut self.nodes, node));
    }
}
