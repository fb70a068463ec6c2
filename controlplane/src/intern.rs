//! One copy of what many objects say: namespaces, nodes, accounts, labels of a Deployment's pods. A hundred thousand pods
//! have their label maps by the thousand, and names of nodes by the hundred.

use std::{
    borrow::Borrow,
    collections::HashSet,
    hash::Hash,
    sync::{Arc, LazyLock},
};

use mesh::names::Str;
use parking_lot::Mutex;

use crate::object::{Labels, Ports};

/// Copies that are looked through for such as nobody else holds, at the least.
const SWEEP: usize = 4096;

/// The shared copies of one type. What nobody else holds is forgotten when there are twice as many as after the last
/// look through them: bounded by what is in use, and looked through at a cost in proportion to what came.
struct Interner<T: ?Sized + Eq + Hash> {
    known: HashSet<Arc<T>>,
    sweep_at: usize,
}

static TEXTS: LazyLock<Mutex<Interner<str>>> = LazyLock::new(Mutex::default);
static LABELS: LazyLock<Mutex<Interner<Labels>>> = LazyLock::new(Mutex::default);
static PORTS: LazyLock<Mutex<Interner<Ports>>> = LazyLock::new(Mutex::default);

/// The one copy of a text.
pub(crate) fn text(text: &str) -> Str {
    let make = || Str::from(text);
    TEXTS.lock().one(text, make)
}

/// The one copy of labels, or annotations.
pub(crate) fn labels(labels: Labels) -> Arc<Labels> {
    LABELS.lock().owned(labels)
}

/// The one copy of named ports.
pub(crate) fn ports(ports: Ports) -> Arc<Ports> {
    PORTS.lock().owned(ports)
}

impl<T: ?Sized + Eq + Hash> Default for Interner<T> {
    fn default() -> Self {
        Self {
            known: HashSet::new(),
            sweep_at: SWEEP,
        }
    }
}

impl<T: ?Sized + Eq + Hash> Interner<T> {
    fn one<Q: ?Sized + Eq + Hash>(&mut self, value: &Q, make: impl FnOnce() -> Arc<T>) -> Arc<T>
    where
        Arc<T>: Borrow<Q>,
    {
        if let Some(known) = self.known.get(value) {
            return known.clone();
        }
        if self.known.len() >= self.sweep_at {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.sweep_at = SWEEP.max(2 * self.known.len());
            self.known.shrink_to(self.sweep_at);
        }
        let made = make();
        self.known.insert(made.clone());
        made
    }
}

impl<T: Eq + Hash> Interner<T> {
    fn owned(&mut self, value: T) -> Arc<T> {
        match self.known.get(&value) {
            Some(known) => known.clone(),
            None => {
                let made = Arc::new(value);
                self.one(&*made.clone(), || made)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_and_those_that_nobody_holds_are_forgotten() {
        let mut texts = Interner::<str>::default();
        let mut one = |text: &str| texts.one(text, || text.into());
        let first = one("node-1");
        assert!(Arc::ptr_eq(&first, &one("node-1")));
        for n in 0..10 * SWEEP {
            one(&format!("pod-{n}"));
        }
        assert!(texts.known.len() <= SWEEP);
        let again = texts.one("node-1", || unreachable!("it is held"));
        assert!(Arc::ptr_eq(&first, &again));
    }
}
