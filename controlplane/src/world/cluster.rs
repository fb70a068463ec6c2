//! The thread behind a world that is fed by the API server's informers.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    sync::Arc,
    thread,
    time::Duration,
};

use mesh::names::Str;
use tokio::{
    runtime::Handle,
    sync::mpsc,
    time::{Instant, timeout_at},
};

use super::{Batch, Changed, Publisher, Reported, Selectors, Settings, Shared, view::View};
use crate::{
    object::{Kind, Name, ObjectRef},
    source::cluster::{
        Event, Feed,
        decode::{Report, Told},
    },
    translate::remote::{ExportKey, Exported},
    wiring::{OfPods, Wiring},
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
    /// Whether it is known which tags point to our revision.
    is_tagged: bool,
    view: View,
    known: BTreeMap<Kind, HashSet<Name>>,
    /// Lists that are under way, with what they have named.
    listing: BTreeMap<Kind, HashSet<Name>>,
    reports: BTreeMap<ObjectRef, Reported>,
    taken: u64,
    /// Nothing of the graph was published yet, but something of one before it.
    is_anew: bool,
}

/// Starts the thread. It ends when nobody holds the feed any more.
pub(super) fn spawn(
    shared: Arc<Shared>,
    settings: Settings,
    selectors: Selectors,
) -> io::Result<Feed> {
    let (feed, events) = mpsc::channel(QUEUE);
    // A world has one thread.
    let _ = shared.feed.set(feed.downgrade());
    let runtime = Handle::current();
    let unlisted = shared.unlisted.borrow().clone();
    thread::Builder::new()
        .name("world".to_owned())
        .spawn(move || {
            let mut keeper = Keeper {
                events,
                unlisted,
                is_tagged: false,
                view: View::new(selectors, settings.root_namespace.clone()),
                publisher: Publisher {
                    wiring: Wiring::new(settings, OfPods::KeepSilent),
                    shared,
                },
                known: BTreeMap::new(),
                listing: BTreeMap::new(),
                reports: BTreeMap::new(),
                taken: 0,
                is_anew: false,
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
            Event::Tags(tags) => {
                self.is_tagged = true;
                self.publisher.wiring.tagged(&tags);
                for told in self.view.labelled() {
                    self.publisher.wiring.set(&told.object, told.value);
                }
            }
            // What was fetched is taken with every publication.
            Event::Keys => {}
            Event::Selectors(selectors) => {
                for (namespace, is_chosen) in self.view.select(selectors) {
                    self.turn(&namespace, is_chosen);
                }
            }
            Event::Settings(settings) => self.configure(*settings),
            Event::Remote {
                cluster,
                is_whole,
                changes,
            } => self.remote(&cluster, is_whole, changes),
        }
    }

    fn remote(&self, cluster: &Str, is_whole: bool, changes: Changed<ExportKey, Exported>) {
        let wiring = &self.publisher.wiring;
        let mut gone = match is_whole {
            true => wiring.remote_keys(cluster),
            false => BTreeSet::new(),
        };
        for (key, exported) in changes {
            gone.remove(&key);
            wiring.set_remote(cluster, key, exported.as_deref());
        }
        for key in gone {
            wiring.set_remote(cluster, key, None);
        }
    }

    /// Other settings: everything is computed anew, of the same objects. What comes out as it was is not told again.
    fn configure(&mut self, settings: Settings) {
        let before = &self.publisher.wiring;
        let anew = before.under(settings, OfPods::KeepSilent);
        for (kind, names) in &self.known {
            for name in names {
                let object = ObjectRef {
                    kind: *kind,
                    name: name.clone(),
                };
                // The graph does not hold objects that are another control plane's.
                let value = match self.view.labelled_as(&object) {
                    Some(told) => told.value,
                    None => before.get(&object),
                };
                anew.set(&object, value);
            }
        }
        self.publisher.wiring = anew;
        self.is_anew = true;
    }

    /// Brings a namespace's objects into view, or takes them out of it.
    fn turn(&mut self, namespace: &Str, is_chosen: bool) {
        if is_chosen {
            for told in self.view.take_aside(namespace) {
                self.put(told);
            }
            return;
        }
        let of_namespace = |(kind, names): (&Kind, &HashSet<Name>)| {
            let names = names.iter().filter(|name| name.namespace == *namespace);
            let objects = names.map(|name| ObjectRef {
                kind: *kind,
                name: name.clone(),
            });
            objects.collect::<Vec<_>>()
        };
        let namespaced = self.known.iter().filter(|(kind, _)| kind.is_namespaced());
        let objects: Vec<ObjectRef> = namespaced.flat_map(of_namespace).collect();
        for object in objects {
            // The graph does not hold objects that are another control plane's.
            let told = self.view.labelled_as(&object).unwrap_or_else(|| Told {
                value: self.publisher.wiring.get(&object),
                report: self.report(&object),
                object,
            });
            self.put(told);
        }
    }

    /// What was said of an object, published or about to be.
    fn report(&self, object: &ObjectRef) -> Option<Report> {
        if let Some(reported) = self.reports.get(object) {
            let (status, version) = (reported.status.clone()?, reported.version.clone()?);
            return Some(Report { status, version });
        }
        let state = self.publisher.shared.state.read();
        Some(Report {
            status: state.reports.get(object)?.clone(),
            version: state.versions.get(object)?.clone(),
        })
    }

    fn is(&mut self, told: Told) {
        let object = &told.object;
        if let Some(named) = self.listing.get_mut(&object.kind) {
            named.insert(object.name.clone());
        }
        let known = self.known.entry(object.kind).or_default();
        known.insert(object.name.clone());
        let labels = match (object.kind, &told.value) {
            (Kind::Namespace, Some(value)) => Some(value.object.meta().labels.clone()),
            _ => None,
        };
        let namespace = object.name.name.clone();
        self.put(told);
        if let Some(is_chosen) = labels.and_then(|it| self.view.namespace(&namespace, Some(it))) {
            self.turn(&namespace, is_chosen);
        }
    }

    fn put(&mut self, told: Told) {
        let Told {
            object,
            value,
            report,
        } = self.view.admit(told);
        self.publisher.wiring.set(&object, value);
        let (status, version) = match report {
            Some(report) => (Some(report.status), Some(report.version)),
            None => (None, None),
        };
        if status.is_some() || speaks(object.kind) {
            let reported = Reported {
                object: object.clone(),
                status,
                version,
            };
            self.reports.insert(object, reported);
        }
    }

    fn gone(&mut self, object: ObjectRef) {
        if let Some(known) = self.known.get_mut(&object.kind) {
            known.remove(&object.name);
        }
        self.view.forget(&object);
        self.publisher.wiring.set(&object, None);
        if object.kind == Kind::Namespace
            && let Some(is_chosen) = self.view.namespace(&object.name.name, None)
        {
            self.turn(&object.name.name, is_chosen);
        }
        if speaks(object.kind) {
            let reported = Reported {
                object: object.clone(),
                status: None,
                version: None,
            };
            self.reports.insert(object, reported);
        }
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
        let is_whole = self.unlisted.is_empty() && self.is_tagged;
        if is_whole {
            self.publisher.take_keys();
            self.publisher.wiring.settle();
            let reports = std::mem::take(&mut self.reports).into_values().collect();
            let batch = Batch {
                inputs: std::mem::take(&mut self.taken),
                changed: None,
                is_anew: std::mem::take(&mut self.is_anew),
            };
            self.publisher.publish(reports, None, batch);
        }
        shared.unlisted.send_if_modified(|unlisted| {
            let changed = *unlisted != self.unlisted;
            // Whoever waits for the world waits for the tags, too.
            if is_whole || !self.unlisted.is_empty() {
                unlisted.clone_from(&self.unlisted);
            }
            changed
        });
    }
}

/// Whether something is said of objects of this kind. Pods and their like are too many to speak of each.
fn speaks(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::Pod | Kind::EndpointSlice | Kind::Node | Kind::Namespace
    )
}
