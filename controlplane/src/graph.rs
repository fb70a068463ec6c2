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
    collections::BTreeSet,
    fmt,
    hash::Hash,
    rc::Rc,
    sync::Arc,
};

mod collection;
mod node;
mod numbered;
mod watches;

pub use collection::{Collection, Context, Index, Source, Tap};
use node::{Derived, Grouped, Runnable};
use numbered::Places;
use watches::Shared;

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
    shared: Rc<Shared>,
}

/// How often the computations of a node ran, for tests and `/debug`.
#[derive(Clone, Debug, Default)]
pub struct Runs(Rc<Cell<u64>>);

impl Graph {
    /// A graph of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// A collection to be fed.
    pub fn source<K: Key, V: Data>(&self) -> Source<K, V> {
        Source {
            collection: Collection::new(&self.shared),
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
        self.derive_shared(input, move |cx, key, value| {
            let made = compute(cx, key, value).into_iter();
            made.map(|(key, value)| (key, Arc::new(value))).collect()
        })
    }

    /// As [`Graph::derive`], for computations that pass on what others hold, too.
    pub fn derive_shared<K, V, K2, V2>(
        &mut self,
        input: &Collection<K, V>,
        compute: impl Fn(&Context<'_>, &K, &Arc<V>) -> Vec<(K2, Arc<V2>)> + 'static,
    ) -> (Collection<K2, V2>, Runs)
    where
        K: Key,
        V: Data,
        K2: Key,
        V2: Data,
    {
        let node = self.next_node();
        let output = Collection::new(&self.shared);
        let runs = Runs::default();
        input.each(|change| self.shared.mark(node, change.place));
        let shared = self.shared.clone();
        input.listen(move |change| shared.mark(node, change.place));
        self.nodes.push(Box::new(Derived {
            node,
            input: input.clone(),
            output: output.clone(),
            products: Places::default(),
            owners: Places::default(),
            compute,
            runs: runs.clone(),
            shared: self.shared.clone(),
        }));
        (output, runs)
    }

    /// The values of a collection by the entries of an index, each group ordered by key; a group that empties is gone.
    pub fn group<I: Key, K: Key, V: Data>(
        &mut self,
        index: &Index<I, K, V>,
    ) -> Collection<I, Vec<Arc<V>>> {
        let node = self.next_node();
        let output = Collection::new(&self.shared);
        let all: BTreeSet<I> = index.entries.places.borrow().keys().cloned().collect();
        let changed = Rc::new(RefCell::new(all));
        self.shared.mark(node, 0);
        let (marks, entries, shared) =
            (changed.clone(), index.entries.clone(), self.shared.clone());
        index.collection.listen(move |change| {
            marks.borrow_mut().extend(entries.touched(change));
            shared.mark(node, 0);
        });
        self.nodes.push(Box::new(Grouped {
            index: index.clone(),
            output: output.clone(),
            changed,
        }));
        output
    }

    /// All values of several collections, which must not share keys.
    pub fn join<K: Key, V: Data>(&self, inputs: &[&Collection<K, V>]) -> Collection<K, V> {
        let output = Collection::new(&self.shared);
        for input in inputs {
            input.each(|change| {
                output.put(change.key, change.new.cloned());
            });
            let joined = output.clone();
            input.listen(move |change| {
                joined.put(change.key, change.new.cloned());
            });
        }
        output
    }

    /// Runs every computation that something changed for. When it returns, all collections are current.
    pub fn settle(&mut self) {
        for (node, runnable) in self.nodes.iter_mut().enumerate() {
            let slots = std::mem::take(&mut self.shared.dirty.borrow_mut()[node]);
            if !slots.is_empty() {
                runnable.run(slots);
            }
        }
    }

    fn next_node(&self) -> u32 {
        let mut dirty = self.shared.dirty.borrow_mut();
        dirty.push(BTreeSet::new());
        u32::try_from(dirty.len() - 1).expect("nodes are made by hand")
    }
}

impl Runs {
    /// How often, so far.
    pub fn count(&self) -> u64 {
        self.0.get()
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
