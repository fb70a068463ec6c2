//! Collections, ways to find their values, and taps for readers outside the graph.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    rc::{Rc, Weak},
    sync::Arc,
};

use super::{
    Data, Key,
    numbered::Numbered,
    watches::{Filter, Read, Reader, Shared, Watched, Watches},
};

/// Keyed values, kept current. Cheap to clone: a handle.
pub struct Collection<K: Key, V: Data> {
    pub(super) inner: Rc<Inner<K, V>>,
}

/// A collection that is fed from outside.
pub struct Source<K: Key, V: Data> {
    pub(super) collection: Collection<K, V>,
}

/// A second way to find the values of a collection. Cheap to clone: a handle.
pub struct Index<I: Key, K: Key, V: Data> {
    pub(super) collection: Collection<K, V>,
    pub(super) entries: Rc<Entries<I, K, V>>,
}

/// The changes of collections since they were last taken, for readers outside the graph.
pub struct Tap<K: Key, V: Data> {
    collections: Vec<Collection<K, V>>,
    changed: Rc<RefCell<HashSet<K>>>,
}

/// What a computation reads through, so that it is run again when that changes.
pub struct Context<'a> {
    pub(super) reader: Reader,
    pub(super) reads: &'a RefCell<Vec<Read>>,
}

/// Names the index entries under which a value is found.
type Entry<I, K, V> = Box<dyn Fn(&K, &V) -> Vec<I>>;
type OnChange<K, V> = Box<dyn Fn(&Change<'_, K, V>)>;

/// One value that is another now.
pub(super) struct Change<'c, K, V> {
    pub(super) key: &'c K,
    /// The key's place; when the value is gone, the one that it had.
    pub(super) place: u32,
    pub(super) old: Option<&'c Arc<V>>,
    pub(super) new: Option<&'c Arc<V>>,
}

pub(super) struct Inner<K: Key, V: Data> {
    pub(super) items: RefCell<Numbered<K, Arc<V>>>,
    by_key: Watches<K, V>,
    listeners: RefCell<Vec<OnChange<K, V>>>,
    table: u32,
    shared: Rc<Shared>,
}

pub(super) struct Entries<I: Key, K: Key, V: Data> {
    of: Entry<I, K, V>,
    /// Places in the collection, ordered by key.
    pub(super) places: RefCell<HashMap<I, Vec<u32>>>,
    watches: Watches<I, V>,
    table: u32,
}

impl<K: Key, V: Data> Clone for Collection<K, V> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<I: Key, K: Key, V: Data> Clone for Index<I, K, V> {
    fn clone(&self) -> Self {
        Self {
            collection: self.collection.clone(),
            entries: self.entries.clone(),
        }
    }
}

impl<K: Key, V: Data> Source<K, V> {
    /// Sets or removes a value. Equal values change nothing.
    pub fn set(&self, key: &K, value: Option<V>) {
        self.collection.put(key, value.map(Arc::new));
    }
}

impl<K: Key, V: Data> std::ops::Deref for Source<K, V> {
    type Target = Collection<K, V>;

    fn deref(&self) -> &Collection<K, V> {
        &self.collection
    }
}

impl<K: Key, V: Data> Collection<K, V> {
    pub(super) fn new(shared: &Rc<Shared>) -> Self {
        let inner = Rc::new_cyclic(|inner: &Weak<Inner<K, V>>| Inner {
            items: RefCell::default(),
            by_key: Watches::default(),
            listeners: RefCell::default(),
            table: shared.register(inner.clone()),
            shared: shared.clone(),
        });
        Self { inner }
    }

    /// The value of a key, for readers outside the graph.
    pub fn peek(&self, key: &K) -> Option<Arc<V>> {
        self.inner.items.borrow().get(key).cloned()
    }

    /// All values, ordered by key, for readers outside the graph.
    pub fn snapshot(&self) -> BTreeMap<K, Arc<V>> {
        let items = self.inner.items.borrow();
        let pairs = items.iter();
        pairs.map(|(key, it)| (key.clone(), it.clone())).collect()
    }

    /// An index: `of` names the entries under which a value is found.
    pub fn index<I: Key>(&self, of: impl Fn(&K, &V) -> Vec<I> + 'static) -> Index<I, K, V> {
        let shared = &self.inner.shared;
        let entries = Rc::new_cyclic(|entries: &Weak<Entries<I, K, V>>| Entries {
            of: Box::new(of),
            places: RefCell::default(),
            watches: Watches::default(),
            table: shared.register(entries.clone()),
        });
        self.each(|change| entries.change(&self.inner.items.borrow(), change));
        let (listening, inner) = (entries.clone(), Rc::downgrade(&self.inner));
        self.listen(move |change| {
            let Some(inner) = inner.upgrade() else {
                return;
            };
            listening.change(&inner.items.borrow(), change);
            for entry in listening.touched(change) {
                let watches = &listening.watches;
                watches.wake(&entry, change.old, change.new, &inner.shared);
            }
        });
        Index {
            collection: self.clone(),
            entries,
        }
    }

    /// The changes from now on, and as the first ones everything there is.
    pub fn tap(&self) -> Tap<K, V> {
        Tap::of(&[self])
    }

    pub(super) fn listen(&self, listener: impl Fn(&Change<'_, K, V>) + 'static) {
        self.inner.listeners.borrow_mut().push(Box::new(listener));
    }

    /// Tells of everything there is as if it had just come.
    pub(super) fn each(&self, tell: impl Fn(&Change<'_, K, V>)) {
        let items = self.inner.items.borrow();
        for (key, value) in items.iter() {
            let Some(place) = items.place(key) else {
                continue;
            };
            tell(&Change {
                key,
                place,
                old: None,
                new: Some(value),
            });
        }
    }

    /// Sets or removes a value, and answers with the key's place if it has one now.
    pub(super) fn put(&self, key: &K, value: Option<Arc<V>>) -> Option<u32> {
        let known = self.inner.items.borrow().place(key);
        let old = known.and_then(|place| {
            let items = self.inner.items.borrow();
            items.at(place).map(|(_, value)| value.clone())
        });
        if old == value {
            return known;
        }
        let place = match (&value, known) {
            (Some(value), _) => {
                let mut items = self.inner.items.borrow_mut();
                items.insert(key.clone(), value.clone())
            }
            (None, Some(place)) => {
                self.inner.items.borrow_mut().remove(place);
                place
            }
            (None, None) => return None,
        };
        self.tell(&Change {
            key,
            place,
            old: old.as_ref(),
            new: value.as_ref(),
        });
        value.is_some().then_some(place)
    }

    /// Removes what is in a place.
    pub(super) fn clear(&self, place: u32) {
        let removed = self.inner.items.borrow_mut().remove(place);
        if let Some((key, old)) = removed {
            self.tell(&Change {
                key: &key,
                place,
                old: Some(&old),
                new: None,
            });
        }
    }

    fn tell(&self, change: &Change<'_, K, V>) {
        let inner = &self.inner;
        let by_key = &inner.by_key;
        by_key.wake(change.key, change.old, change.new, &inner.shared);
        for listener in &*inner.listeners.borrow() {
            listener(change);
        }
    }
}

impl<I: Key, K: Key, V: Data> Index<I, K, V> {
    /// The collection it is an index of.
    pub fn collection(&self) -> &Collection<K, V> {
        &self.collection
    }
}

impl<K: Key, V: Data> Tap<K, V> {
    /// As [`Collection::tap`], of several collections, which must not share keys: a join of them would hold a copy of each.
    pub fn of(collections: &[&Collection<K, V>]) -> Self {
        let changed = Rc::new(RefCell::new(HashSet::new()));
        for collection in collections {
            let items = collection.inner.items.borrow();
            let all = items.iter().map(|(key, _)| key.clone());
            changed.borrow_mut().extend(all);
            let marks = changed.clone();
            collection.listen(move |change| {
                marks.borrow_mut().insert(change.key.clone());
            });
        }
        Self {
            collections: collections.iter().copied().cloned().collect(),
            changed,
        }
    }

    /// The changed keys with their values now, ordered by key.
    pub fn take(&self) -> Vec<(K, Option<Arc<V>>)> {
        let mut changed: Vec<K> = self.changed.take().into_iter().collect();
        changed.sort();
        let value = |key: K| {
            let value = self.collections.iter().find_map(|it| it.peek(&key));
            (key, value)
        };
        changed.into_iter().map(value).collect()
    }
}

impl<I: Key, K: Key, V: Data> Entries<I, K, V> {
    fn change(&self, items: &Numbered<K, Arc<V>>, change: &Change<'_, K, V>) {
        let of = |value: Option<&Arc<V>>| -> BTreeSet<I> {
            let entries = value.map(|value| (self.of)(change.key, value));
            entries.unwrap_or_default().into_iter().collect()
        };
        let (old, new) = (of(change.old), of(change.new));
        let mut places = self.places.borrow_mut();
        for entry in old.difference(&new) {
            if let Some(members) = places.get_mut(entry) {
                members.retain(|place| *place != change.place);
                if members.is_empty() {
                    places.remove(entry);
                }
            }
        }
        for entry in new.difference(&old) {
            let members = places.entry(entry.clone()).or_default();
            let before = |place: &u32| items.at(*place).is_some_and(|(key, _)| key < change.key);
            let at = members.partition_point(before);
            members.reserve_exact(grown(members.len()));
            members.insert(at, change.place);
        }
    }

    /// The entries under which a value was or is found.
    pub(super) fn touched(&self, change: &Change<'_, K, V>) -> BTreeSet<I> {
        let values = change.old.into_iter().chain(change.new);
        values
            .flat_map(|value| (self.of)(change.key, value))
            .collect()
    }
}

/// Room for how many more: most entries have one member only.
fn grown(len: usize) -> usize {
    match len.is_power_of_two() {
        true => len,
        false => 1,
    }
}

impl<K: Key, V: Data> Watched for Inner<K, V> {
    fn forget(&self, watch: u32, reader: Reader) {
        self.by_key.forget(watch, reader);
    }
}

impl<I: Key, K: Key, V: Data> Watched for Entries<I, K, V> {
    fn forget(&self, watch: u32, reader: Reader) {
        self.watches.forget(watch, reader);
    }
}

impl Context<'_> {
    /// The value of a key.
    pub fn get<K: Key, V: Data>(&self, collection: &Collection<K, V>, key: &K) -> Option<Arc<V>> {
        let inner = &collection.inner;
        self.note(inner.table, inner.by_key.watch(key, self.reader, None));
        collection.peek(key)
    }

    /// The values under an index entry, ordered by key.
    pub fn find<I: Key, K: Key, V: Data>(
        &self,
        index: &Index<I, K, V>,
        entry: &I,
    ) -> Vec<(K, Arc<V>)> {
        self.search(index, entry, None)
    }

    /// The values under an index entry that pass a filter, ordered by key. Changes that pass it neither before nor after
    /// do not concern this computation.
    pub fn find_where<I: Key, K: Key, V: Data>(
        &self,
        index: &Index<I, K, V>,
        entry: &I,
        filter: impl Fn(&V) -> bool + 'static,
    ) -> Vec<(K, Arc<V>)> {
        self.search(index, entry, Some(Rc::new(filter)))
    }

    /// As [`Context::find_where`], under several entries: the filter is kept once.
    pub fn find_where_any<I: Key, K: Key, V: Data>(
        &self,
        index: &Index<I, K, V>,
        entries: &BTreeSet<&I>,
        filter: impl Fn(&V) -> bool + 'static,
    ) -> Vec<(K, Arc<V>)> {
        let filter: Filter<V> = Rc::new(filter);
        let found = entries.iter();
        found
            .flat_map(|entry| self.search(index, entry, Some(filter.clone())))
            .collect()
    }

    fn search<I: Key, K: Key, V: Data>(
        &self,
        index: &Index<I, K, V>,
        entry: &I,
        filter: Option<Filter<V>>,
    ) -> Vec<(K, Arc<V>)> {
        let entries = &index.entries;
        let (places, items) = (
            entries.places.borrow(),
            index.collection.inner.items.borrow(),
        );
        let members = places.get(entry).into_iter().flatten();
        let found = members.filter_map(|place| items.at(*place));
        let passes = |value: &V| filter.as_ref().is_none_or(|filter| filter(value));
        let found = found
            .filter(|(_, value)| passes(value))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let watch = entries.watches.watch(entry, self.reader, filter);
        self.note(entries.table, watch);
        found
    }

    fn note(&self, table: u32, watch: Option<u32>) {
        let read = watch.map(|watch| Read { table, watch });
        self.reads.borrow_mut().extend(read);
    }
}
