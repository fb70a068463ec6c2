//! The thread behind a world that is fed by the API server's informers.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    sync::Arc,
    thread,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::mpsc,
    time::{Instant, timeout_at},
};

use super::{Batch, Publisher, Reported, Settings, Shared};
use crate::{
    object::{Kind, Name, ObjectRef},
    source::cluster::{Event, Feed, decode::Told},
    wiring::Wiring,
};

/// Events that wait for the thread; informers wait for room.
const QUEUE: usize = 1024;
/// Changes that follow each other this closely belong together.
const QUIET: Duration = Duration::from_millis(2);
/// The longest a change is held back for others to join it.
const WINDOW: Duration = Duration::from_millis(10);
/// The most events taken together, so that a flood does not hold back what is published.
const MOST: usize = 20_000;

struct Keeper {
    events: mpsc::Receiver<Event>,
    publisher: Publisher,
    /// Kinds of which no whole list has come yet. Until there is none left, nothing is computed or published.
    unlisted: BTreeSet<Kind>,
    known: BTreeMap<Kind, HashSet<Name>>,
    /// Lists that are under way, with what they have named.
    listing: BTreeMap<Kind, HashSet<Name>>,
    reports: BTreeMap<ObjectRef, Reported>,
    taken: u64,
}

/// Starts the thread. It ends when nobody holds the feed any more.
pub(super) fn spawn(shared: Arc<Shared>, settings: Settings) -> io::Result<Feed> {
    let (feed, events) = mpsc::channel(QUEUE);
    let runtime = Handle::current();
    let unlisted = shared.unlisted.borrow().clone();
    thread::Builder::new()
        .name("world".to_owned())
        .spawn(move || {
            let mut keeper = Keeper {
                events,
                unlisted,
                publisher: Publisher {
                    wiring: Wiring::new(settings),
                    shared,
                },
                known: BTreeMap::new(),
                listing: BTreeMap::new(),
                reports: BTreeMap::new(),
                taken: 0,
            };
            while runtime.block_on(keeper.gather()) {
                keeper.publish();
            }
        })?;
    Ok(feed)
}

impl Keeper {
    /// Takes in the next event and those that follow it closely. False at the end.
    async fn gather(&mut self) -> bool {
        let Some(first) = self.events.recv().await else {
            return false;
        };
        self.take(first);
        let end = Instant::now() + WINDOW;
        for _ in 0..MOST {
            let quiet = (Instant::now() + QUIET).min(end);
            match timeout_at(quiet, self.events.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) | Err(_) => break,
            }
        }
        true
    }

    fn take(&mut self, event: Event) {
        self.taken += 1;
        match event {
            Event::Listing(kind) => {
                self.listing.insert(kind, HashSet::new());
            }
            Event::Is(told) => self.is(*told),
            Event::Gone(object) => {
                if let Some(named) = self.listing.get_mut(&object.kind) {
                    named.remove(&object.name);
                }
                self.gone(object);
            }
            Event::Listed(kind) => self.whole(kind),
        }
    }

    fn is(&mut self, told: Told) {
        let Told {
            object,
            value,
            report,
        } = told;
        if let Some(named) = self.listing.get_mut(&object.kind) {
            named.insert(object.name.clone());
        }
        let known = self.known.entry(object.kind).or_default();
        known.insert(object.name.clone());
        self.publisher.wiring.set(&object, value);
        if let Some(report) = report {
            let reported = Reported {
                object: object.clone(),
                status: Some(report.status),
                version: Some(report.version),
            };
            self.reports.insert(object, reported);
        }
    }

    fn gone(&mut self, object: ObjectRef) {
        if let Some(known) = self.known.get_mut(&object.kind) {
            known.remove(&object.name);
        }
        self.publisher.wiring.set(&object, None);
        let reported = Reported {
            object: object.clone(),
            status: None,
            version: None,
        };
        self.reports.insert(object, reported);
    }

    /// A list is complete: what it has not named is no more.
    fn whole(&mut self, kind: Kind) {
        let Some(named) = self.listing.remove(&kind) else {
            return;
        };
        let known = self.known.remove(&kind).unwrap_or_default();
        let gone: Vec<Name> = known.difference(&named).cloned().collect();
        self.known.insert(kind, named);
        for name in gone {
            self.gone(ObjectRef { kind, name });
        }
        self.unlisted.remove(&kind);
    }

    fn publish(&mut self) {
        let shared = self.publisher.shared.clone();
        if self.unlisted.is_empty() {
            self.publisher.wiring.settle();
            let reports = std::mem::take(&mut self.reports).into_values().collect();
            let batch = Batch {
                inputs: std::mem::take(&mut self.taken),
                changed: None,
            };
            self.publisher.publish(reports, None, batch);
        }
        shared.unlisted.send_if_modified(|unlisted| {
            let changed = *unlisted != self.unlisted;
            unlisted.clone_from(&self.unlisted);
            changed
        });
    }
}
