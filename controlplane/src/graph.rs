//! Derived collections: keyed values in, keyed values out, dependencies recorded.
//!
//! A computation reads other collections through its [`Context`], by key or by index with a filter; what it read is
//! remembered. When something changes, only the computations that read it run again, and only outputs that differ are
//! passed on. The graph knows nothing of Kubernetes, of files or of the mesh: a folder and an API server feed it alike.
//!
//! Shape: single-threaded; nodes run in the order in which they were made, and can only read what was made before them,
//! so one pass settles everything. Cost of a change: the computations that read it, plus one filter call per reader of
//! the same index entry.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    hash::Hash,
    rc::Rc,
    sync::Arc,
};

/// A key of a collection.
pub trait Key: Clone + Eq + Hash + Ord + fmt::Debug + 'static {}
impl<T: Clone + Eq + Hash + Ord + fmt::Debug + 'static> Key for T {}

/// A value of a collection. Equality decides whether a change is passed on.
pub trait Data: PartialEq + fmt::Debug + 'static {}
impl<T: PartialEq + fmt::Debug + 'static> Data for T {}

/// The derived collections of one world.
#[derive(Default)]
pub struct Graph {
    nodes: Vec<Box<dyn Runnable>>,
    dirty: Dirty,
}

/// Keyed values, kept current. Cheap to clone: a handle.
pub struct Collection<K: Key, V: Data> {
    inner: Rc<Inner<K, V>>,
}

/// A collection that is fed from outside.
pub struct Source<K: Key, V: Data> {
    collection: Collection<K, V>,
}

/// A second way to find the values of a collection. Cheap to clone: a handle.
pub struct Index<I: Key, K: Key, V: Data> {
    collection: Collection<K, V>,
    entries: Rc<Entries<I, K, V>>,
}

/// The changes of a collection since they were last taken, for readers outside the graph.
pub struct Tap<K: Key, V: Data> {
    collection: Collection<K, V>,
    changed: Rc<RefCell<HashSet<K>>>,
}

/// What a computation reads through, so that it is run again when that changes.
pub struct Context<'a> {
    reader: Reader,
    reads: &'a RefCell<Vec<Read>>,
}

/// How often the computations of a node ran, for tests and `/debug`.
#[derive(Clone, Debug, Default)]
pub struct Runs(Rc<Cell<u64>>);

/// Marks of computations that must run again: per node, its slots.
type Dirty = Rc<RefCell<Vec<BTreeSet<u32>>>>;

/// A computation: a node and one of its inputs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Reader {
    node: u32,
    slot: u32,
}

/// One thing a computation read, so that it can be forgotten.
struct Read {
    from: Rc<dyn Watched>,
    watch: u64,
}

trait Watched {
    fn forget(&self, watch: u64);
}

trait Runnable {
    fn run(&mut self, slots: BTreeSet<u32>);
}

type Filter<V> = Rc<dyn Fn(&V) -> bool>;
/// Names the index entries under which a value is found.
type Entry<I, K, V> = Box<dyn Fn(&K, &V) -> Vec<I>>;
/// Who looked under one key, by the number of the watch.
type Readers<V> = HashMap<u64, (Reader, Option<Filter<V>>)>;
type OnChange<K, V> = Box<dyn Fn(&K, Option<&Arc<V>>, Option<&Arc<V>>)>;

struct Inner<K: Key, V: Data> {
    items: RefCell<HashMap<K, Arc<V>>>,
    by_key: Watches<K, V>,
    listeners: RefCell<Vec<OnChange<K, V>>>,
    dirty: Dirty,
}

struct Entries<I: Key, K: Key, V: Data> {
    of: Entry<I, K, V>,
    keys: RefCell<HashMap<I, BTreeMap<K, Arc<V>>>>,
    watches: Watches<I, V>,
}

/// Who read what under which key, and with which filter.
struct Watches<I: Key, V: Data>(RefCell<WatchTable<I, V>>);

struct WatchTable<I: Key, V: Data> {
    next: u64,
    keys: HashMap<u64, I>,
    readers: HashMap<I, Readers<V>>,
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

impl Graph {
    /// A graph of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// A collection to be fed.
    pub fn source<K: Key, V: Data>(&self) -> Source<K, V> {
        Source {
            collection: Collection::new(&self.dirty),
        }
    }

    /// A collection whose values are computed from each value of `input`, and from whatever the computation reads.
    ///
    /// `compute` is pure but for its context. Two inputs must not produce the same key (build keys from the input's, and
    /// [`Graph::group`] what belongs together).
    pub fn derive<K, V, K2, V2>(
        &mut self,
        input: &Collection<K, V>,
        compute: impl Fn(&Context<'_>, &K, &Arc<V>) -> Vec<(K2, V2)> + 'static,
    ) -> (Collection<K2, V2>, Runs)
    where
        K: Key,
        V: Data,
        K2: Key,
        V2: Data,
    {
        let node = self.next_node();
        let output = Collection::new(&self.dirty);
        let slots: Rc<RefCell<Slots<K>>> = Rc::default();
        let runs = Runs::default();
        self.feed(node, input, &slots);
        self.nodes.push(Box::new(Derived {
            node,
            input: input.clone(),
            output: output.clone(),
            slots,
            outputs: HashMap::new(),
            compute,
            runs: runs.clone(),
        }));
        (output, runs)
    }

    /// The values of a collection by the entries of an index, each group ordered by key; a group that empties is gone.
    pub fn group<I: Key, K: Key, V: Data>(
        &mut self,
        index: &Index<I, K, V>,
    ) -> Collection<I, Vec<Arc<V>>> {
        let node = self.next_node();
        let output = Collection::new(&self.dirty);
        let all: BTreeSet<I> = index.entries.keys.borrow().keys().cloned().collect();
        let changed = Rc::new(RefCell::new(all));
        self.dirty.borrow_mut()[node as usize].insert(0);
        let (marks, entries, dirty) = (changed.clone(), index.entries.clone(), self.dirty.clone());
        index.collection.listen(move |key, old, new| {
            marks.borrow_mut().extend(entries.touched(key, old, new));
            dirty.borrow_mut()[node as usize].insert(0);
        });
        self.nodes.push(Box::new(Grouped {
            entries: index.entries.clone(),
            output: output.clone(),
            changed,
        }));
        output
    }

    /// All values of several collections, which must not share keys.
    pub fn join<K: Key, V: Data>(&self, inputs: &[&Collection<K, V>]) -> Collection<K, V> {
        let output = Collection::new(&self.dirty);
        for input in inputs {
            for (key, value) in &*input.inner.items.borrow() {
                output.put(key, Some(value.clone()));
            }
            let joined = output.clone();
            input.listen(move |key, _, new| joined.put(key, new.cloned()));
        }
        output
    }

    /// Runs every computation that something changed for. When it returns, all collections are current.
    pub fn settle(&mut self) {
        for (node, runnable) in self.nodes.iter_mut().enumerate() {
            let slots = std::mem::take(&mut self.dirty.borrow_mut()[node]);
            if !slots.is_empty() {
                runnable.run(slots);
            }
        }
    }

    fn next_node(&self) -> u32 {
        let mut dirty = self.dirty.borrow_mut();
        dirty.push(BTreeSet::new());
        u32::try_from(dirty.len() - 1).expect("nodes are made by hand")
    }

    fn feed<K: Key, V: Data>(
        &self,
        node: u32,
        input: &Collection<K, V>,
        slots: &Rc<RefCell<Slots<K>>>,
    ) {
        let (slots, dirty) = (slots.clone(), self.dirty.clone());
        let mark = move |key: &K| {
            let slot = slots.borrow_mut().of(key);
            dirty.borrow_mut()[node as usize].insert(slot);
        };
        input.inner.items.borrow().keys().for_each(&mark);
        input.listen(move |key, _, _| mark(key));
    }
}

impl Runs {
    /// How often, so far.
    pub fn count(&self) -> u64 {
        self.0.get()
    }
}

impl<K: Key, V: Data> Source<K, V> {
    /// Sets or removes a value. Equal values change nothing.
    pub fn set(&self, key: &K, value: Option<V>) {
        self.collection.set(key, value);
    }
}

impl<K: Key, V: Data> std::ops::Deref for Source<K, V> {
    type Target = Collection<K, V>;

    fn deref(&self) -> &Collection<K, V> {
        &self.collection
    }
}

impl<K: Key, V: Data> Collection<K, V> {
    fn new(dirty: &Dirty) -> Self {
        let inner = Inner {
            items: RefCell::default(),
            by_key: Watches::default(),
            listeners: RefCell::default(),
            dirty: dirty.clone(),
        };
        Self {
            inner: Rc::new(inner),
        }
    }

    /// The value of a key, for readers outside the graph.
    pub fn peek(&self, key: &K) -> Option<Arc<V>> {
        self.inner.items.borrow().get(key).cloned()
    }

    /// All values, ordered by key, for readers outside the graph.
    pub fn snapshot(&self) -> BTreeMap<K, Arc<V>> {
        self.inner.items.borrow().clone().into_iter().collect()
    }

    /// An index: `of` names the entries under which a value is found.
    pub fn index<I: Key>(&self, of: impl Fn(&K, &V) -> Vec<I> + 'static) -> Index<I, K, V> {
        let entries = Rc::new(Entries {
            of: Box::new(of),
            keys: RefCell::default(),
            watches: Watches::default(),
        });
        for (key, value) in &*self.inner.items.borrow() {
            entries.change(key, None, Some(value));
        }
        let (listening, dirty) = (entries.clone(), self.inner.dirty.clone());
        self.listen(move |key, old, new| {
            listening.change(key, old, new);
            for entry in listening.touched(key, old, new) {
                listening.watches.wake(&entry, old, new, &dirty);
            }
        });
        Index {
            collection: self.clone(),
            entries,
        }
    }

    /// The changes from now on, and as the first ones everything there is.
    pub fn tap(&self) -> Tap<K, V> {
        let all: HashSet<K> = self.inner.items.borrow().keys().cloned().collect();
        let changed = Rc::new(RefCell::new(all));
        let marks = changed.clone();
        self.listen(move |key, _, _| {
            marks.borrow_mut().insert(key.clone());
        });
        Tap {
            collection: self.clone(),
            changed,
        }
    }

    fn listen(&self, listener: impl Fn(&K, Option<&Arc<V>>, Option<&Arc<V>>) + 'static) {
        self.inner.listeners.borrow_mut().push(Box::new(listener));
    }

    fn set(&self, key: &K, value: Option<V>) {
        self.put(key, value.map(Arc::new));
    }

    fn put(&self, key: &K, value: Option<Arc<V>>) {
        let old = self.inner.items.borrow().get(key).cloned();
        if old == value {
            return;
        }
        match &value {
            Some(value) => self
                .inner
                .items
                .borrow_mut()
                .insert(key.clone(), value.clone()),
            None => self.inner.items.borrow_mut().remove(key),
        };
        let (old, new) = (old.as_ref(), value.as_ref());
        self.inner.by_key.wake(key, old, new, &self.inner.dirty);
        for listener in &*self.inner.listeners.borrow() {
            listener(key, old, new);
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
    /// The changed keys with their values now, ordered by key.
    pub fn take(&self) -> Vec<(K, Option<Arc<V>>)> {
        let mut changed: Vec<K> = self.changed.take().into_iter().collect();
        changed.sort();
        let value = |key: K| {
            let value = self.collection.peek(&key);
            (key, value)
        };
        changed.into_iter().map(value).collect()
    }
}

impl<I: Key, K: Key, V: Data> Entries<I, K, V> {
    fn change(&self, key: &K, old: Option<&Arc<V>>, new: Option<&Arc<V>>) {
        let mut keys = self.keys.borrow_mut();
        for entry in old.map(|old| (self.of)(key, old)).unwrap_or_default() {
            if let Some(members) = keys.get_mut(&entry) {
                members.remove(key);
                if members.is_empty() {
                    keys.remove(&entry);
                }
            }
        }
        if let Some(new) = new {
            for entry in (self.of)(key, new) {
                keys.entry(entry)
                    .or_default()
                    .insert(key.clone(), new.clone());
            }
        }
    }

    /// The entries under which a value was or is found.
    fn touched(&self, key: &K, old: Option<&Arc<V>>, new: Option<&Arc<V>>) -> BTreeSet<I> {
        let entries = [old, new].into_iter().flatten();
        entries.flat_map(|value| (self.of)(key, value)).collect()
    }
}

impl<I: Key, V: Data> Default for Watches<I, V> {
    fn default() -> Self {
        Self(RefCell::new(WatchTable {
            next: 0,
            keys: HashMap::new(),
            readers: HashMap::new(),
        }))
    }
}

impl<I: Key, V: Data> Watches<I, V> {
    fn watch(&self, key: &I, reader: Reader, filter: Option<Filter<V>>) -> u64 {
        let mut table = self.0.borrow_mut();
        table.next += 1;
        let watch = table.next;
        table.keys.insert(watch, key.clone());
        let readers = table.readers.entry(key.clone()).or_default();
        readers.insert(watch, (reader, filter));
        watch
    }

    fn forget(&self, watch: u64) {
        let mut table = self.0.borrow_mut();
        let Some(key) = table.keys.remove(&watch) else {
            return;
        };
        if let Some(readers) = table.readers.get_mut(&key) {
            readers.remove(&watch);
            if readers.is_empty() {
                table.readers.remove(&key);
            }
        }
    }

    fn wake(&self, key: &I, old: Option<&Arc<V>>, new: Option<&Arc<V>>, dirty: &Dirty) {
        let table = self.0.borrow();
        let Some(readers) = table.readers.get(key) else {
            return;
        };
        let mut dirty = dirty.borrow_mut();
        for (reader, filter) in readers.values() {
            let concerns = |value: Option<&Arc<V>>| {
                value.is_some_and(|value| filter.as_ref().is_none_or(|filter| filter(value)))
            };
            if concerns(old) || concerns(new) {
                dirty[reader.node as usize].insert(reader.slot);
            }
        }
    }
}

impl<K: Key, V: Data> Watched for Inner<K, V> {
    fn forget(&self, watch: u64) {
        self.by_key.forget(watch);
    }
}

impl<I: Key, K: Key, V: Data> Watched for Entries<I, K, V> {
    fn forget(&self, watch: u64) {
        self.watches.forget(watch);
    }
}

impl Context<'_> {
    /// The value of a key.
    pub fn get<K: Key, V: Data>(&self, collection: &Collection<K, V>, key: &K) -> Option<Arc<V>> {
        let inner = &collection.inner;
        let watch = inner.by_key.watch(key, self.reader, None);
        self.note(inner.clone(), watch);
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

    fn search<I: Key, K: Key, V: Data>(
        &self,
        index: &Index<I, K, V>,
        entry: &I,
        filter: Option<Filter<V>>,
    ) -> Vec<(K, Arc<V>)> {
        let keys = index.entries.keys.borrow();
        let members = keys.get(entry).into_iter().flatten();
        let passes = |value: &V| filter.as_ref().is_none_or(|filter| filter(value));
        let found = members
            .filter(|(_, value)| passes(value))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let watch = index.entries.watches.watch(entry, self.reader, filter);
        self.note(index.entries.clone(), watch);
        found
    }

    fn note(&self, from: Rc<dyn Watched>, watch: u64) {
        self.reads.borrow_mut().push(Read { from, watch });
    }
}

/// Numbers for keys, so that marks and watches are small.
struct Slots<K: Key> {
    numbers: HashMap<K, u32>,
    keys: HashMap<u32, K>,
    next: u32,
}

impl<K: Key> Default for Slots<K> {
    fn default() -> Self {
        Self {
            numbers: HashMap::new(),
            keys: HashMap::new(),
            next: 0,
        }
    }
}

impl<K: Key> Slots<K> {
    fn of(&mut self, key: &K) -> u32 {
        if let Some(slot) = self.numbers.get(key) {
            return *slot;
        }
        let slot = (self.next..=u32::MAX)
            .chain(0..self.next)
            .find(|slot| !self.keys.contains_key(slot))
            .expect("fewer than 2^32 keys live at once");
        self.next = slot.wrapping_add(1);
        self.numbers.insert(key.clone(), slot);
        self.keys.insert(slot, key.clone());
        slot
    }

    fn free(&mut self, slot: u32) {
        if let Some(key) = self.keys.remove(&slot) {
            self.numbers.remove(&key);
        }
    }
}

struct Grouped<I: Key, K: Key, V: Data> {
    entries: Rc<Entries<I, K, V>>,
    output: Collection<I, Vec<Arc<V>>>,
    changed: Rc<RefCell<BTreeSet<I>>>,
}

impl<I: Key, K: Key, V: Data> Runnable for Grouped<I, K, V> {
    fn run(&mut self, _: BTreeSet<u32>) {
        for entry in self.changed.take() {
            let members: Vec<_> = match self.entries.keys.borrow().get(&entry) {
                Some(members) => members.values().cloned().collect(),
                None => Vec::new(),
            };
            self.output
                .set(&entry, (!members.is_empty()).then_some(members));
        }
    }
}

struct Derived<K: Key, V: Data, K2: Key, V2: Data, F> {
    node: u32,
    input: Collection<K, V>,
    output: Collection<K2, V2>,
    slots: Rc<RefCell<Slots<K>>>,
    outputs: HashMap<u32, Product<K2>>,
    compute: F,
    runs: Runs,
}

/// What one computation made, and what it read to make it.
struct Product<K2> {
    keys: Vec<K2>,
    reads: Vec<Read>,
}

impl<K2> Product<K2> {
    fn forget_reads(&mut self) {
        for read in self.reads.drain(..) {
            read.from.forget(read.watch);
        }
    }
}

impl<K, V, K2, V2, F> Runnable for Derived<K, V, K2, V2, F>
where
    K: Key,
    V: Data,
    K2: Key,
    V2: Data,
    F: Fn(&Context<'_>, &K, &Arc<V>) -> Vec<(K2, V2)>,
{
    fn run(&mut self, slots: BTreeSet<u32>) {
        for slot in slots {
            let Some(key) = self.slots.borrow().keys.get(&slot).cloned() else {
                continue;
            };
            let mut before = self.outputs.remove(&slot).unwrap_or(Product {
                keys: Vec::new(),
                reads: Vec::new(),
            });
            before.forget_reads();
            let input = self.input.peek(&key);
            let after = match &input {
                Some(value) => self.produce(slot, &key, value),
                None => {
                    self.slots.borrow_mut().free(slot);
                    Vec::new()
                }
            };
            let kept: HashSet<&K2> = after.iter().collect();
            for gone in before.keys.iter().filter(|key| !kept.contains(key)) {
                self.output.set(gone, None);
            }
        }
    }
}

impl<K, V, K2, V2, F> Derived<K, V, K2, V2, F>
where
    K: Key,
    V: Data,
    K2: Key,
    V2: Data,
    F: Fn(&Context<'_>, &K, &Arc<V>) -> Vec<(K2, V2)>,
{
    fn produce(&mut self, slot: u32, key: &K, value: &Arc<V>) -> Vec<K2> {
        let reads = RefCell::default();
        let context = Context {
            reader: Reader {
                node: self.node,
                slot,
            },
            reads: &reads,
        };
        self.runs.0.set(self.runs.0.get() + 1);
        let mut keys = Vec::new();
        for (key, value) in (self.compute)(&context, key, value) {
            self.output.set(&key, Some(value));
            keys.push(key);
        }
        let product = Product {
            keys: keys.clone(),
            reads: reads.into_inner(),
        };
        self.outputs.insert(slot, product);
        keys
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph")
            .field("nodes", &self.nodes.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
