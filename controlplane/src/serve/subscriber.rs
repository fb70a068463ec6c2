//! What one proxy is owed: its interest and its place in the log for each type. No sockets, no tasks: requests in, time
//! and store as arguments, responses out.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use mesh::names::Str;
use proto::{AUTHORIZATION_TYPE_URL, xds::DeltaDiscoveryRequest};
use tokio::time::Instant;
use tonic::Status;

use super::{
    encode::{Aliases, Content, Payload, PayloadBuilder, Response},
    registry::Connection,
    store::{Lagged, Reader, State, Store},
    view::{Sequence, View},
};
use crate::output::{GatewayProxy, Resource};

/// Changes within this time of the last push are merged into the next (design: at most 10 ms).
pub(super) const WINDOW: Duration = Duration::from_millis(10);
/// While a response is not acknowledged, changes are merged, but no longer than this.
pub(super) const ACK_PATIENCE: Duration = Duration::from_secs(5);
/// Responses of one type whose acknowledgement is awaited; of older ones it no longer matters.
const MAX_OUTSTANDING: usize = 64;
/// Types one stream may ask for; there are three.
const MAX_TYPES: usize = 16;
/// Names one stream may ask for by name, and the length of each.
const MAX_NAMES: usize = 500_000;
const MAX_NAME_LEN: usize = 1024;

pub(super) struct Subscriber {
    connection: Arc<Connection>,
    /// The proxy's node: its workloads are sent unasked to readers on demand.
    node: Str,
    /// Of which Gateway it is, if it is one's.
    gateway: Option<GatewayProxy>,
    types: BTreeMap<Str, TypeState>,
    nonces: u64,
    opened: Option<Instant>,
    asked: Option<Instant>,
    pushed: Option<Instant>,
}

struct TypeState {
    interest: Interest,
    cursor: Sequence,
    ask: Option<Ask>,
    outstanding: VecDeque<Outstanding>,
}

#[derive(Default)]
struct Interest {
    all: bool,
    /// Keys asked for: names or aliases, known to the store or not.
    wanted: HashSet<Str>,
    /// Names that were sent, and hence are kept current.
    known: HashSet<Str>,
}

/// A request that must be answered, even with nothing.
#[derive(Default)]
struct Ask {
    /// Everything is wanted anew.
    all: bool,
    /// The stream's first request for the type.
    first: bool,
    keys: Vec<Str>,
    /// What the proxy has from an earlier stream.
    versions: BTreeMap<String, String>,
}

struct Outstanding {
    sent: Instant,
    response: Response,
}

impl Subscriber {
    pub(super) fn new(
        connection: Arc<Connection>,
        node: Str,
        gateway: Option<GatewayProxy>,
    ) -> Self {
        Self {
            connection,
            node,
            gateway,
            types: BTreeMap::new(),
            nonces: 0,
            opened: None,
            asked: None,
            pushed: None,
        }
    }

    /// Takes one request in.
    pub(super) fn request(
        &mut self,
        request: DeltaDiscoveryRequest,
        now: Instant,
    ) -> Result<(), Status> {
        self.opened.get_or_insert(now);
        if !self.types.contains_key(&*request.type_url) && self.types.len() >= MAX_TYPES {
            return Err(Status::resource_exhausted("too many types on one stream"));
        }
        let type_url: Str = request.type_url.as_str().into();
        let first = !self.types.contains_key(&type_url);
        let state = self
            .types
            .entry(type_url.clone())
            .or_insert_with(|| TypeState {
                interest: Interest::default(),
                cursor: 0,
                ask: None,
                outstanding: VecDeque::new(),
            });
        if !request.response_nonce.is_empty() {
            state.acknowledge(&self.connection, &type_url, &request);
        }
        state.subscribe(first, request)?;
        if state.ask.is_some() {
            self.asked.get_or_insert(now);
        }
        Ok(())
    }

    /// When [`Self::flush`] is due, given the store's newest place. `None`: not before something happens.
    pub(super) fn due(&self, head: Sequence) -> Option<Instant> {
        let opened = self.opened?;
        if let Some(asked) = self.asked {
            // A stream's first requests come one per type; answering them together keeps the order of types.
            return Some(asked.max(opened + WINDOW));
        }
        if self.types.values().all(|state| state.cursor >= head) {
            return None;
        }
        let window = self.pushed.map_or(opened, |pushed| pushed + WINDOW);
        let unanswered = self
            .types
            .values()
            .filter_map(|state| state.outstanding.back());
        let patience = unanswered.map(|newest| newest.sent + ACK_PATIENCE).max();
        Some(patience.map_or(window, |patience| patience.max(window)))
    }

    /// Everything owed, in an order in which no address precedes a policy that it names, and no policy goes before
    /// the addresses that named it.
    pub(super) fn flush(&mut self, store: &Store, now: Instant) -> Result<Vec<Response>, Lagged> {
        self.asked = None;
        let mut policies_gone = Vec::new();
        let mut policies = Vec::new();
        let mut others = Vec::new();
        let world = store.read();
        for (type_url, state) in &mut self.types {
            let answer = state.ask.is_some();
            let view = View::of(type_url, self.gateway.as_ref());
            let payloads = state.advance(store, &world, view, &self.node)?;
            let before = policies.len() + others.len() + policies_gone.len();
            for payload in payloads {
                let (upserts, removals) = (
                    !payload.upserts.names.is_empty(),
                    !payload.removals.names.is_empty(),
                );
                let add = |list: &mut Vec<_>, content| {
                    list.push((type_url.clone(), payload.clone(), content));
                };
                match (&**type_url == AUTHORIZATION_TYPE_URL, upserts, removals) {
                    (_, false, false) => {}
                    (true, true, true) => {
                        add(&mut policies, Content::Upserts);
                        add(&mut policies_gone, Content::Removals);
                    }
                    (true, true, false) => add(&mut policies, Content::Upserts),
                    (true, false, true) => add(&mut policies_gone, Content::Removals),
                    (false, _, _) => add(&mut others, Content::Both),
                }
            }
            if answer && before == policies.len() + others.len() + policies_gone.len() {
                let nothing = PayloadBuilder::new(view, Aliases::Omit);
                let nothing = Arc::new(nothing.build(state.cursor));
                others.push((type_url.clone(), nothing, Content::Nothing));
            }
        }
        drop(world);
        let ordered = policies.into_iter().chain(others).chain(policies_gone);
        let responses: Vec<_> = ordered.map(|owed| self.send(owed, now)).collect();
        if !responses.is_empty() {
            self.pushed = Some(now);
        }
        Ok(responses)
    }

    fn send(
        &mut self,
        (type_url, payload, content): (Str, Arc<Payload>, Content),
        now: Instant,
    ) -> Response {
        self.nonces += 1;
        let response = Response {
            nonce: format!("{:x}", self.nonces),
            type_url,
            payload,
            content,
        };
        self.connection.sent(&response);
        if let Some(state) = self.types.get_mut(&response.type_url) {
            if state.outstanding.len() >= MAX_OUTSTANDING {
                state.outstanding.pop_front();
            }
            state.outstanding.push_back(Outstanding {
                sent: now,
                response: response.clone(),
            });
        }
        response
    }
}

impl TypeState {
    /// An ACK or NACK of one response, and with it of all before it. One of a response that is not awaited is stale
    /// and ignored.
    fn acknowledge(
        &mut self,
        connection: &Connection,
        type_url: &Str,
        request: &DeltaDiscoveryRequest,
    ) {
        let nonce = &request.response_nonce;
        let awaited = |known: &Outstanding| known.response.nonce == *nonce;
        let Some(position) = self.outstanding.iter().position(awaited) else {
            connection.stale_nonce(type_url);
            return;
        };
        let settled = self.outstanding.drain(..=position);
        let settled: Vec<Response> = settled.map(|known| known.response).collect();
        match &request.error_detail {
            None => connection.accepted(type_url, &settled),
            Some(error) => connection.rejected(type_url, &settled, &error.message),
        }
    }

    fn subscribe(&mut self, first: bool, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let DeltaDiscoveryRequest {
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: versions,
            ..
        } = request;
        if first || !subscribe.is_empty() {
            let ask = self.ask.get_or_insert_default();
            ask.first |= first;
            let was_all = self.interest.all;
            self.interest.all |=
                (first && subscribe.is_empty()) || subscribe.iter().any(|n| n == "*");
            self.interest.all &= !unsubscribe.iter().any(|name| name == "*");
            ask.all |= self.interest.all && !was_all;
            let named = subscribe.into_iter().filter(|name| name != "*");
            let keys: Vec<String> = match self.interest.all {
                true => named.collect(),
                // A reader on demand tells what it follows by the versions it has (node-tunnel.md 3.3).
                false => named.chain(versions.keys().cloned()).collect(),
            };
            let ask = self.ask.get_or_insert_default();
            for key in keys {
                if key.len() > MAX_NAME_LEN || self.interest.wanted.len() >= MAX_NAMES {
                    return Err(Status::resource_exhausted("too many or too long names"));
                }
                let key: Str = key.into();
                self.interest.wanted.insert(key.clone());
                ask.keys.push(key);
            }
            if first {
                ask.versions = versions;
            }
        } else if unsubscribe.iter().any(|name| name == "*") {
            self.interest.all = false;
        }
        for name in unsubscribe {
            self.interest.wanted.remove(&*name);
            self.interest.known.remove(&*name);
        }
        Ok(())
    }

    /// Moves the cursor to the newest place and tells what has to be sent for it.
    fn advance(
        &mut self,
        store: &Store,
        world: &State,
        view: View<'_>,
        node: &str,
    ) -> Result<Vec<Arc<Payload>>, Lagged> {
        let ask = self.ask.take();
        let all_anew = self.interest.all && ask.as_ref().is_some_and(|ask| ask.all);
        let ask = ask.unwrap_or_default();
        let mut payloads = Vec::new();
        if all_anew {
            let payload = match ask.versions.is_empty() {
                true => store.payload(world, view, Reader::Newcomer)?,
                false => Arc::new(difference(world, view, &ask.versions)),
            };
            self.cursor = payload.to;
            payloads.push(payload);
        }
        if !self.interest.all {
            payloads.push(Arc::new(self.named(world, view, node, ask)));
        } else {
            if self.cursor < world.head() {
                payloads.push(store.payload(world, view, Reader::At(self.cursor))?);
            }
            if !ask.keys.is_empty() {
                let mut reply = self.reply(view, &ask);
                reply.asked(world, view, &ask.keys);
                payloads.push(Arc::new(reply.builder.build(world.head())));
            }
        }
        self.cursor = world.head();
        Ok(payloads)
    }

    fn reply<'a>(&'a mut self, view: View<'a>, ask: &'a Ask) -> Reply<'a> {
        Reply {
            builder: PayloadBuilder::new(view, Aliases::Send),
            interest: &mut self.interest,
            versions: &ask.versions,
            sent: HashSet::new(),
        }
    }

    /// What a reader on demand is owed: what it asked for, and what changed of that, of its services' workloads and
    /// of its node.
    fn named(&mut self, world: &State, view: View<'_>, node: &str, ask: Ask) -> Payload {
        let cursor = self.cursor;
        let mut reply = self.reply(view, &ask);
        reply.asked(world, view, &ask.keys);
        if ask.first {
            world
                .on_node(view, node)
                .for_each(|resource| reply.include(resource));
        }
        // A first request has nothing that could have changed.
        let cursor = if ask.first { world.head() } else { cursor };
        match world.since(view, cursor) {
            Ok(changes) => changes.for_each(|(name, resource)| {
                reply.change(world, view, node, name, resource);
            }),
            Err(Lagged) => reply.everything(world, view),
        }
        reply.builder.build(world.head())
    }
}

/// An answer to a reader on demand in the making.
struct Reply<'a> {
    builder: PayloadBuilder<'a>,
    interest: &'a mut Interest,
    versions: &'a BTreeMap<String, String>,
    sent: HashSet<Str>,
}

impl Reply<'_> {
    fn asked(&mut self, world: &State, view: View<'_>, keys: &[Str]) {
        for key in keys {
            let found = world.resolve(view, key);
            if found.is_empty() {
                self.missing(key);
            }
            found
                .into_iter()
                .for_each(|resource| self.include(resource));
        }
    }

    fn include(&mut self, resource: &Arc<Resource>) {
        if !self.sent.insert(resource.name.clone()) {
            return;
        }
        self.interest.known.insert(resource.name.clone());
        let has = self.versions.get(&*resource.name);
        if has.is_none_or(|version| **version != *resource.version) {
            self.builder.upsert(resource);
        }
    }

    fn missing(&mut self, key: &Str) {
        if self.sent.insert(key.clone()) {
            self.interest.known.remove(key);
            self.builder.remove(key);
        }
    }

    fn change(
        &mut self,
        world: &State,
        view: View<'_>,
        node: &str,
        name: &Str,
        resource: Option<&Arc<Resource>>,
    ) {
        match resource {
            None if self.interest.known.contains(name) => self.missing(name),
            Some(resource) if self.interest.concerns(resource, node) => {
                let new = !self.interest.known.contains(name);
                self.include(resource);
                if new {
                    // A service comes with its workloads.
                    let members = world.resolve(view, name);
                    members.into_iter().for_each(|member| self.include(member));
                }
            }
            _ => {}
        }
    }

    /// The log no longer reaches back to this reader; but it is known what it has.
    fn everything(&mut self, world: &State, view: View<'_>) {
        let keys = self.interest.known.union(&self.interest.wanted);
        let keys: Vec<Str> = keys.cloned().collect();
        for key in keys {
            let found = world.resolve(view, &key);
            if found.is_empty() && self.interest.known.contains(&key) {
                self.missing(&key);
            }
            found
                .into_iter()
                .for_each(|resource| self.include(resource));
        }
    }
}

impl Interest {
    fn concerns(&self, resource: &Resource, node: &str) -> bool {
        let follows = |name: &Str| self.known.contains(name) || self.wanted.contains(name);
        follows(&resource.name)
            || resource
                .aliases
                .iter()
                .any(|alias| self.wanted.contains(alias))
            || resource.services.iter().any(follows)
            || (!node.is_empty() && resource.node.as_deref() == Some(node))
    }
}

/// What a proxy that has `versions` lacks: other versions, and what is no more.
fn difference(world: &State, view: View<'_>, versions: &BTreeMap<String, String>) -> Payload {
    let mut builder = PayloadBuilder::new(view, Aliases::Omit);
    for resource in world.live(view) {
        let has = versions.get(&*resource.name);
        if has.is_none_or(|version| **version != *resource.version) {
            builder.upsert(resource);
        }
    }
    for name in versions.keys() {
        if world.get(view, name).is_none() {
            builder.remove(&name.as_str().into());
        }
    }
    builder.build(world.head())
}
