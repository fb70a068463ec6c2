//! Conditions and allocated addresses, written into the statuses of users' objects by the leader.
//!
//! A term begins with a look at what stands there; after that only differences are written, each object's newest state,
//! paced, and with growing pauses where the API server refuses. Conditions go by server-side apply, so that each writer
//! owns its own and others' are never touched: a condition that somebody else owns stays theirs, and is told of.

mod parents;
mod plan;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, time::Duration};

use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use http::{Request, header::CONTENT_TYPE};
use kube::Client;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use self::{
    parents::List,
    plan::{Part, Place, Standing},
};
use super::{
    is_absent,
    leader::Leadership,
    queue::{Outcome, Pace, Queue},
};
use crate::{
    object::{Kind, Name, ObjectRef},
    output::StatusChange,
    world::World,
};

/// As many as upstream allows itself: a mesh of 20,000 services that is new to us is written within some minutes.
const PACE: Pace = Pace {
    parallel: 16,
    per_second: 80,
    burst: 160,
};

/// How often a leader looks whether what it has written still stands.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);
/// After a look that failed, and longer after each more.
const LOOK_SOON: Duration = Duration::from_secs(10);
/// Looks that may fail before it is written without.
const PATIENCE: u32 = 3;
/// Objects per answer.
const PAGE: usize = 500;

/// All statuses, then their changes.
pub(crate) type Changes = BoxStream<'static, Vec<StatusChange>>;

/// A world's statuses, as [`Statuses`] reads them: from their beginning, for each term.
pub(crate) fn changes(world: &World) -> Changes {
    let subscription = world.subscribe_statuses(&plan::KINDS);
    stream::unfold(subscription, |mut subscription| async move {
        Some((subscription.next().await, subscription))
    })
    .boxed()
}

/// Writes statuses.
pub(crate) struct Statuses {
    client: Client,
    source: Box<dyn Fn() -> Changes + Send + Sync>,
    state: Mutex<State>,
    /// What stands has been looked at.
    looked: watch::Sender<bool>,
    queue: Queue<Key>,
}

type Key = (ObjectRef, Part);

#[derive(Default)]
struct State {
    wanted: HashMap<ObjectRef, StatusChange>,
    standing: HashMap<Key, Vec<Standing>>,
    /// Allocated addresses in the status of ServiceEntries that have some.
    addresses: HashMap<Name, Vec<(String, String)>>,
    /// Our entries in lists of several controllers.
    entries: HashMap<Key, Vec<Value>>,
}

/// Why a status is not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("write the status of {object}: {source}")]
    Refused {
        object: ObjectRef,
        source: kube::Error,
    },
    #[error("{}: the conditions {} are owned by others and stay theirs: {message}", object, types.join(", "))]
    Conflict {
        object: ObjectRef,
        types: Vec<String>,
        message: String,
    },
    #[error("write the status of {object}")]
    Request {
        object: ObjectRef,
        source: http::Error,
    },
}

/// A page of a list, cut down to what is looked at.
#[derive(Deserialize)]
struct Page {
    metadata: PageMeta,
    items: Vec<Found>,
}

#[derive(Deserialize)]
struct PageMeta {
    #[serde(default, rename = "continue")]
    more: String,
}

#[derive(Deserialize)]
struct Found {
    metadata: FoundMeta,
    #[serde(default)]
    status: Value,
}

#[derive(Deserialize)]
struct FoundMeta {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default, rename = "resourceVersion")]
    version: String,
}

impl Statuses {
    pub(crate) fn new(
        client: Client,
        source: impl Fn() -> Changes + Send + Sync + 'static,
    ) -> Self {
        Self {
            client,
            source: Box::new(source),
            state: Mutex::default(),
            looked: watch::Sender::new(false),
            queue: Queue::new(),
        }
    }

    /// Writes whenever this replica leads.
    pub(crate) async fn run(self, leadership: Leadership) {
        leadership.while_leading("statuses", || self.lead()).await;
    }

    async fn lead(&self) {
        // What an earlier term knew is old.
        *self.state.lock() = State::default();
        self.looked.send_replace(false);
        tokio::join!(self.follow(), self.look(), self.work());
    }

    async fn follow(&self) {
        let mut changes = (self.source)();
        while let Some(batch) = changes.next().await {
            for change in batch {
                let object = change.object.clone();
                let known = self.state.lock().take(change);
                // Before the first look nothing is known of what stands; the look itself finds the differences.
                if known && *self.looked.borrow() {
                    self.ask(&object);
                }
            }
        }
    }

    /// Asks for the writes that an object needs.
    fn ask(&self, object: &ObjectRef) {
        for part in Part::of(object.kind) {
            let key = (object.clone(), *part);
            let needed = self.state.lock().is_needed(&key);
            if needed {
                self.queue.add(key);
            }
        }
    }

    async fn work(&self) {
        let mut looked = self.looked.subscribe();
        if looked.wait_for(|looked| *looked).await.is_ok() {
            self.queue.work(PACE, |key| self.write(key)).await;
        }
    }

    async fn write(&self, key: Key) -> Outcome<WriteError> {
        let written = match key.1 {
            Part::Addresses => self.write_addresses(&key).await,
            Part::Parents | Part::Ancestors => self.write_entries(&key).await,
            _ => self.write_conditions(&key).await,
        };
        match written {
            Ok(()) => Outcome::Done,
            // It is gone, or its status cannot be written at all (a CRD without the subresource).
            Err(WriteError::Refused {
                source: kube::Error::Api(status),
                ..
            }) if is_absent(&status) => Outcome::Done,
            Err(error) => Outcome::Failed(error),
        }
    }
}

/// What is there already.
impl Statuses {
    async fn look(&self) {
        let mut failures = 0;
        loop {
            match self.look_at_all().await {
                true => failures = 0,
                false => failures += 1,
            }
            // A kind that cannot be listed does not keep the others from being written, and is written without a look.
            if failures == 0 || failures >= PATIENCE {
                self.looked.send_replace(true);
                let objects: Vec<_> = self.state.lock().wanted.keys().cloned().collect();
                objects.iter().for_each(|object| self.ask(object));
            }
            let pause = if failures == 0 {
                LOOK_AGAIN
            } else {
                LOOK_SOON * failures.min(60)
            };
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.9..=1.0))).await;
        }
    }

    /// Whether every kind could be listed.
    async fn look_at_all(&self) -> bool {
        let mut all = true;
        for kind in plan::KINDS {
            if let Err(error) = self.look_at(kind).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(kind = kind.as_str(), error, "statuses cannot be looked at");
                all = false;
            }
        }
        all
    }

    async fn look_at(&self, kind: Kind) -> Result<(), kube::Error> {
        let Some(place) = plan::place(kind, "") else {
            return Ok(());
        };
        let (root, plural) = (place.root(), place.plural);
        let mut more = String::new();
        loop {
            let url = format!("{root}/{plural}?limit={PAGE}&continue={more}");
            let request = Request::get(url).body(Vec::new());
            let request = request.map_err(kube::Error::HttpError)?;
            let page: Page = match self.client.request(request).await {
                // Its CRD is not installed.
                Err(kube::Error::Api(status)) if is_absent(&status) => return Ok(()),
                page => page?,
            };
            let mut state = self.state.lock();
            for found in page.items {
                state.see(kind, &found);
            }
            more = page.metadata.more;
            if more.is_empty() {
                return Ok(());
            }
        }
    }
}

impl State {
    /// Takes over a change. Whether it is one to act on.
    fn take(&mut self, change: StatusChange) -> bool {
        let object = change.object.clone();
        if change.version.is_none() || plan::is_anothers(&change) {
            self.wanted.remove(&object);
            for part in Part::of(object.kind) {
                self.standing.remove(&(object.clone(), *part));
                self.entries.remove(&(object.clone(), *part));
            }
            self.addresses.remove(&object.name);
            return false;
        }
        self.wanted.insert(object, change);
        true
    }

    /// Takes over what stands at the API server.
    fn see(&mut self, kind: Kind, found: &Found) {
        let name = Name::new(&*found.metadata.namespace, &*found.metadata.name);
        let object = ObjectRef {
            kind,
            name: name.clone(),
        };
        for part in Part::of(kind) {
            let standing = plan::standing(*part, &found.status);
            let key = (object.clone(), *part);
            self.see_entries(&key, &found.status);
            match standing.is_empty() {
                true => self.standing.remove(&key),
                false => self.standing.insert(key, standing),
            };
        }
        if kind == Kind::ServiceEntry {
            self.see_addresses(name, &found.status);
        }
    }

    fn see_entries(&mut self, key: &Key, status: &Value) {
        let ours = List::of(key.1).map(|list| list.ours(status));
        match ours.filter(|ours| !ours.is_empty()) {
            Some(ours) => self.entries.insert(key.clone(), ours),
            None => self.entries.remove(key),
        };
    }

    fn see_addresses(&mut self, name: Name, status: &Value) {
        let items = status["addresses"].as_array().into_iter().flatten();
        let text = |item: &Value, field: &str| item[field].as_str().unwrap_or("").to_owned();
        let standing: Vec<_> = items
            .map(|item| (text(item, "host"), text(item, "value")))
            .collect();
        match standing.is_empty() {
            true => self.addresses.remove(&name),
            false => self.addresses.insert(name, standing),
        };
    }

    fn is_needed(&self, (object, part): &Key) -> bool {
        let Some(change) = self.wanted.get(object) else {
            return false;
        };
        if let Some(list) = List::of(*part) {
            let standing = self.entries.get(&(object.clone(), *part));
            return !list.is_right(change, standing.map_or(&[], Vec::as_slice));
        }
        if *part == Part::Addresses {
            let standing = self.addresses.get(&object.name);
            return standing.map_or(&[][..], Vec::as_slice) != addresses(change);
        }
        let generation = change
            .version
            .as_ref()
            .map_or(0, |version| version.generation);
        let wanted = plan::wanted(*part, &change.conditions);
        let standing = self.standing.get(&(object.clone(), *part));
        !plan::is_right(&wanted, generation, standing.map_or(&[], Vec::as_slice))
    }
}

fn addresses(change: &StatusChange) -> Vec<(String, String)> {
    let pairs = change.addresses.iter();
    pairs
        .map(|(host, address)| (host.to_string(), address.to_string()))
        .collect()
}

/// Conditions.
impl Statuses {
    async fn write_conditions(&self, key: &Key) -> Result<(), WriteError> {
        let mut left = Vec::new();
        // Twice at most: once more without what others own.
        let conflict = match self.apply(key, &left).await {
            Err(WriteError::Refused {
                source: kube::Error::Api(status),
                object,
            }) if status.is_conflict() => match plan::conflicts(&status) {
                Some(types) => {
                    left = types;
                    status.message
                }
                None => {
                    let source = kube::Error::Api(status);
                    return Err(WriteError::Refused { object, source });
                }
            },
            written => return written,
        };
        self.apply(key, &left).await?;
        Err(WriteError::Conflict {
            object: key.0.clone(),
            types: left,
            message: conflict,
        })
    }

    async fn apply(&self, key: &Key, left: &[String]) -> Result<(), WriteError> {
        let (object, part) = key;
        let Some((place, body)) = self.body(key, left) else {
            return Ok(());
        };
        let refused = |source| WriteError::Refused {
            object: object.clone(),
            source,
        };
        let path = place.status(&object.name);
        let url = format!("{path}?fieldManager={}", part.manager());
        let request = patch(url, "application/apply-patch+yaml", &body);
        let request = request.map_err(|source| WriteError::Request {
            object: object.clone(),
            source,
        })?;
        let found: Found = self.client.request(request).await.map_err(refused)?;
        let standing = plan::standing(*part, &found.status);
        self.state.lock().standing.insert(key.clone(), standing);
        Ok(())
    }

    /// What to apply, and where; `None` where all is right.
    fn body(&self, key: &Key, left: &[String]) -> Option<(Place, Value)> {
        let (object, part) = key;
        let state = self.state.lock();
        if left.is_empty() && !state.is_needed(key) {
            return None;
        }
        let change = state.wanted.get(object)?;
        let version = change.version.as_ref()?;
        let mut wanted = plan::wanted(*part, &change.conditions);
        wanted.retain(|condition| !left.iter().any(|type_| type_ == condition.type_));
        let standing = state.standing.get(key).map_or(&[][..], Vec::as_slice);
        let place = plan::place(object.kind, &version.api_version)?;
        let (api_version, generation) = (&place.api_version, version.generation);
        let body = plan::body(object, api_version, generation, &wanted, standing);
        Some((place, body))
    }
}

/// Allocated addresses.
impl Statuses {
    /// Written over the version that was read, and over no other.
    async fn write_addresses(&self, key: &Key) -> Result<(), WriteError> {
        let (object, part) = key;
        let Some((place, wanted)) = self.wanted_addresses(key) else {
            return Ok(());
        };
        let refused = |source| WriteError::Refused {
            object: object.clone(),
            source,
        };
        let request = |source| WriteError::Request {
            object: object.clone(),
            source,
        };
        let url = place.status(&object.name);
        let get = Request::get(&url).body(Vec::new()).map_err(request)?;
        let found: Found = self.client.request(get).await.map_err(refused)?;
        let steps = address_steps(&found, &wanted);
        let url = format!("{url}?fieldManager={}", part.manager());
        let patch = patch(url, "application/json-patch+json", &steps).map_err(request)?;
        let found: Found = self.client.request(patch).await.map_err(refused)?;
        let name = object.name.clone();
        self.state.lock().see_addresses(name, &found.status);
        Ok(())
    }
}

impl Statuses {
    /// `None` where all is right.
    fn wanted_addresses(&self, key: &Key) -> Option<(Place, Vec<(String, String)>)> {
        let state = self.state.lock();
        let change = state.wanted.get(&key.0)?;
        let version = change.version.as_ref()?;
        let place = plan::place(key.0.kind, &version.api_version)?;
        state.is_needed(key).then(|| (place, addresses(change)))
    }
}

/// Entries in lists of several controllers.
impl Statuses {
    /// Written over the version that was read, and over no other: such a list has one owner for the API server.
    async fn write_entries(&self, key: &Key) -> Result<(), WriteError> {
        let (object, part) = key;
        let Some((list, url)) = self.entries_to_write(key) else {
            return Ok(());
        };
        let refused = |source| WriteError::Refused {
            object: object.clone(),
            source,
        };
        let request = |source| WriteError::Request {
            object: object.clone(),
            source,
        };
        let get = Request::get(&url).body(Vec::new()).map_err(request)?;
        let found: Found = self.client.request(get).await.map_err(refused)?;
        let Some(change) = self.state.lock().wanted.get(object).cloned() else {
            return Ok(());
        };
        let now = k8s_openapi::jiff::Timestamp::now();
        let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let wanted = list.wanted(&change, &list.ours(&found.status), &now);
        let steps = list.steps(&found.metadata.version, &found.status, wanted);
        let url = format!("{url}?fieldManager={}", part.manager());
        let patch = patch(url, "application/json-patch+json", &steps).map_err(request)?;
        let found: Found = self.client.request(patch).await.map_err(refused)?;
        self.state.lock().see_entries(key, &found.status);
        Ok(())
    }

    /// `None` where all is right.
    fn entries_to_write(&self, key: &Key) -> Option<(List, String)> {
        let state = self.state.lock();
        let version = state.wanted.get(&key.0)?.version.as_ref()?;
        let place = plan::place(key.0.kind, &version.api_version)?;
        let url = place.status(&key.0.name);
        state.is_needed(key).then_some(())?;
        Some((List::of(key.1)?, url))
    }
}

/// The steps (RFC 6902) from what was found to the wanted addresses.
fn address_steps(found: &Found, wanted: &[(String, String)]) -> Value {
    let item = |(host, value): &(String, String)| json!({"value": value, "host": host});
    let wanted: Vec<Value> = wanted.iter().map(item).collect();
    let change = match (wanted.is_empty(), found.status.is_object()) {
        (false, true) => json!({"op": "add", "path": "/status/addresses", "value": wanted}),
        (false, false) => json!({"op": "add", "path": "/status", "value": {"addresses": wanted}}),
        (true, _) if found.status["addresses"].is_array() => {
            json!({"op": "remove", "path": "/status/addresses"})
        }
        (true, _) => return json!([]),
    };
    let unchanged = json!({
        "op": "test", "path": "/metadata/resourceVersion", "value": found.metadata.version,
    });
    json!([unchanged, change])
}

fn patch(url: String, format: &str, body: &Value) -> Result<Request<Vec<u8>>, http::Error> {
    Request::patch(url)
        .header(CONTENT_TYPE, format)
        .body(body.to_string().into_bytes())
}
