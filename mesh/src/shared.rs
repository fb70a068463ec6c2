//! Equal values that many records have in common, each kept once.

use std::{collections::HashSet, hash::Hash, sync::Arc};

/// Values in use. Those that nobody has any more are dropped whenever the set has doubled, so that it holds at most twice as
/// many as are in use, and `FLOOR`, below which nothing is dropped.
#[derive(Debug)]
pub struct Shared<T: ?Sized, const FLOOR: usize> {
    known: HashSet<Arc<T>>,
    prune_at: usize,
}

impl<T: ?Sized, const FLOOR: usize> Default for Shared<T, FLOOR> {
    fn default() -> Self {
        Self {
            known: HashSet::new(),
            prune_at: 0,
        }
    }
}

impl<T: ?Sized, const FLOOR: usize> Clone for Shared<T, FLOOR> {
    fn clone(&self) -> Self {
        Self {
            known: self.known.clone(),
            prune_at: self.prune_at,
        }
    }
}

impl<T: ?Sized + Eq + Hash, const FLOOR: usize> Shared<T, FLOOR> {
    /// Below this, nothing is dropped.
    pub const FLOOR: usize = FLOOR;

    /// Puts an equal value that others have, too, in the place of this one.
    pub fn share(&mut self, value: &mut Arc<T>) {
        self.share_prepared(value, |_| {});
    }

    /// The same; one that nobody has is prepared before it is kept, in a way that leaves it equal to what it was.
    pub fn share_prepared(&mut self, value: &mut Arc<T>, prepare: impl FnOnce(&mut Arc<T>)) {
        match self.known.get(value) {
            Some(same) => *value = same.clone(),
            None => {
                prepare(value);
                self.insert(value.clone());
            }
        }
    }

    /// How many are kept.
    pub fn count(&self) -> usize {
        self.known.len()
    }

    fn insert(&mut self, value: Arc<T>) {
        if self.known.len() >= self.prune_at.max(FLOOR) {
            self.known.retain(|it| Arc::strong_count(it) > 1);
            self.prune_at = 2 * self.known.len();
        }
        self.known.insert(value);
    }
}
