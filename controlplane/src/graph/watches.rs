//! Who read what, so that it is run again when that changes.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap, HashSet},
    rc::{Rc, Weak},
    sync::Arc,
};

use super::{Data, Key, numbered::Numbered};

/// A computation: a node and the place of one of its inputs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Reader {
    pub(super) node: u32,
    pub(super) slot: u32,
}

/// One thing that a computation read, so that it can be forgotten.
#[derive(Clone, Copy)]
pub(super) struct Read {
    pub(super) table: u32,
    pub(super) watch: u32,
}

/// What all parts of a graph share.
#[derive(Default)]
pub(super) struct Shared {
    /// Marks of computations that must run again: per node, its slots.
    pub(super) dirty: RefCell<Vec<BTreeSet<u32>>>,
    /// Everything that can be read, by the number of its table.
    tables: RefCell<Vec<Weak<dyn Watched>>>,
}

pub(super) trait Watched {
    fn forget(&self, watch: u32, reader: Reader);
}

pub(super) type Filter<V> = Rc<dyn Fn(&V) -> bool>;

/// Who read what under which key, and with which filter.
pub(super) struct Watches<I: Key, V: Data>(RefCell<Numbered<I, Readers<V>>>);

/// Most keys have one reader, and a few have as many as there are pods.
enum Readers<V> {
    One(Reader, Option<Filter<V>>),
    Many(Box<Many<V>>),
}

struct Many<V> {
    /// Whom every change concerns.
    all: HashSet<Reader>,
    /// Whom only those concern that pass their filter.
    some: HashMap<Reader, Filter<V>>,
}

impl Shared {
    /// A number for what can be read.
    pub(super) fn register(&self, table: Weak<dyn Watched>) -> u32 {
        let mut tables = self.tables.borrow_mut();
        tables.push(table);
        u32::try_from(tables.len() - 1).expect("collections are made by hand")
    }

    pub(super) fn forget(&self, read: Read, reader: Reader) {
        let table = self.tables.borrow()[read.table as usize].upgrade();
        if let Some(table) = table {
            table.forget(read.watch, reader);
        }
    }

    pub(super) fn mark(&self, node: u32, slot: u32) {
        self.dirty.borrow_mut()[node as usize].insert(slot);
    }
}

impl<I: Key, V: Data> Default for Watches<I, V> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<I: Key, V: Data> Watches<I, V> {
    /// Answers with the watch if the reader does not watch this key already.
    pub(super) fn watch(&self, key: &I, reader: Reader, filter: Option<Filter<V>>) -> Option<u32> {
        let mut table = self.0.borrow_mut();
        let Some(place) = table.place(key) else {
            return Some(table.insert(key.clone(), Readers::One(reader, filter)));
        };
        let readers = table.at_mut(place)?;
        readers.add(reader, filter).then_some(place)
    }

    pub(super) fn forget(&self, watch: u32, reader: Reader) {
        let mut table = self.0.borrow_mut();
        let is_last = table.at_mut(watch).is_some_and(|it| it.remove(reader));
        if is_last {
            table.remove(watch);
        }
    }

    pub(super) fn wake(
        &self,
        key: &I,
        old: Option<&Arc<V>>,
        new: Option<&Arc<V>>,
        shared: &Shared,
    ) {
        let table = self.0.borrow();
        let concerns = |filter: &Filter<V>| old.into_iter().chain(new).any(|value| filter(value));
        let wake = |reader: &Reader| shared.mark(reader.node, reader.slot);
        match table.get(key) {
            None => {}
            Some(Readers::One(reader, filter)) if filter.as_ref().is_none_or(concerns) => {
                wake(reader);
            }
            Some(Readers::One(..)) => {}
            Some(Readers::Many(many)) => {
                many.all.iter().for_each(wake);
                let concerned = many.some.iter().filter(|(_, filter)| concerns(filter));
                concerned.for_each(|(reader, _)| wake(reader));
            }
        }
    }
}

impl<V: 'static> Readers<V> {
    /// False if it is a reader already, whose filter then is the wider for it.
    fn add(&mut self, reader: Reader, filter: Option<Filter<V>>) -> bool {
        if let Self::One(known, before) = self {
            if *known == reader {
                *before = either(before.take(), filter);
                return false;
            }
            let mut many = Box::new(Many {
                all: HashSet::new(),
                some: HashMap::new(),
            });
            many.add(*known, before.take());
            *self = Self::Many(many);
        }
        match self {
            Self::One(..) => false,
            Self::Many(many) => many.add(reader, filter),
        }
    }

    /// True when nobody is left.
    fn remove(&mut self, reader: Reader) -> bool {
        match self {
            Self::One(known, _) => *known == reader,
            Self::Many(many) => {
                many.all.remove(&reader);
                many.some.remove(&reader);
                many.all.is_empty() && many.some.is_empty()
            }
        }
    }
}

impl<V: 'static> Many<V> {
    fn add(&mut self, reader: Reader, filter: Option<Filter<V>>) -> bool {
        if self.all.contains(&reader) {
            return false;
        }
        match (self.some.remove(&reader), filter) {
            (None, None) => self.all.insert(reader),
            (None, Some(filter)) => self.some.insert(reader, filter).is_none(),
            (Some(_), None) => {
                self.all.insert(reader);
                false
            }
            (before @ Some(_), filter) => {
                self.some
                    .extend(either(before, filter).map(|it| (reader, it)));
                false
            }
        }
    }
}

/// What passes either filter; without one, everything does.
fn either<V: 'static>(a: Option<Filter<V>>, b: Option<Filter<V>>) -> Option<Filter<V>> {
    let (a, b) = (a?, b?);
    Some(Rc::new(move |value| a(value) || b(value)))
}
