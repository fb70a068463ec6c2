//! What is computed: values from values, and groups from indexes.

use std::{cell::RefCell, collections::BTreeSet, rc::Rc, sync::Arc};

use super::{
    Collection, Context, Data, Key, Runs,
    collection::Index,
    numbered::Places,
    watches::{Read, Reader, Shared},
};

pub(super) trait Runnable {
    fn run(&mut self, slots: BTreeSet<u32>);
}

pub(super) struct Grouped<I: Key, K: Key, V: Data> {
    pub(super) index: Index<I, K, V>,
    pub(super) output: Collection<I, Vec<Arc<V>>>,
    pub(super) changed: Rc<RefCell<BTreeSet<I>>>,
}

impl<I: Key, K: Key, V: Data> Runnable for Grouped<I, K, V> {
    fn run(&mut self, _: BTreeSet<u32>) {
        for entry in self.changed.take() {
            let items = self.index.collection.inner.items.borrow();
            let places = self.index.entries.places.borrow();
            let members = places.get(&entry).into_iter().flatten();
            let members = members.filter_map(|place| Some(items.at(*place)?.1.clone()));
            let members: Vec<_> = members.collect();
            drop((items, places));
            let group = (!members.is_empty()).then(|| Arc::new(members));
            self.output.put(&entry, group);
        }
    }
}

/// Slots are places of the input. The place of a value that is gone may be another's by the time this runs, which then
/// takes over what was made of the first.
pub(super) struct Derived<K: Key, V: Data, K2: Key, V2: Data, F> {
    pub(super) node: u32,
    pub(super) input: Collection<K, V>,
    pub(super) output: Collection<K2, V2>,
    pub(super) products: Places<Product>,
    /// Who made what is in a place of the output, the last of them if there were several: nobody else removes it.
    pub(super) owners: Places<u32>,
    pub(super) compute: F,
    pub(super) runs: Runs,
    pub(super) shared: Rc<Shared>,
}

/// What one computation made, by its places in the output, and what it read to make it.
#[derive(Default)]
pub(super) struct Product {
    made: Made,
    reads: Box<[Read]>,
}

/// Nearly every computation makes one value.
#[derive(Default)]
enum Made {
    #[default]
    None,
    One(u32),
    Many(Box<[u32]>),
}

impl Product {
    /// Whether it is as good as none: of what makes nothing of most of its inputs, most places are not worth having.
    fn is_empty(&self) -> bool {
        self.made.as_slice().is_empty() && self.reads.is_empty()
    }
}

impl Made {
    fn as_slice(&self) -> &[u32] {
        match self {
            Self::None => &[],
            Self::One(place) => std::slice::from_ref(place),
            Self::Many(places) => places,
        }
    }
}

impl From<Vec<u32>> for Made {
    fn from(places: Vec<u32>) -> Self {
        match places[..] {
            [] => Self::None,
            [place] => Self::One(place),
            _ => Self::Many(places.into()),
        }
    }
}

impl<K, V, K2, V2, F> Runnable for Derived<K, V, K2, V2, F>
where
    K: Key,
    V: Data,
    K2: Key,
    V2: Data,
    F: Fn(&Context<'_>, &K, &Arc<V>) -> Vec<(K2, Arc<V2>)>,
{
    fn run(&mut self, slots: BTreeSet<u32>) {
        for slot in slots {
            let reader = Reader {
                node: self.node,
                slot,
            };
            let before = self.products.take(slot).unwrap_or_default();
            for read in &before.reads {
                self.shared.forget(*read, reader);
            }
            let input = {
                let items = self.input.inner.items.borrow();
                let input = items.at(slot);
                input.map(|(key, value)| (key.clone(), value.clone()))
            };
            let after = match &input {
                Some((key, value)) => self.produce(reader, key, value),
                None => Product::default(),
            };
            let kept = after.made.as_slice();
            let gone = before.made.as_slice().iter();
            for place in gone.filter(|place| !kept.contains(place)) {
                if self.owners.get(*place) == Some(&slot) {
                    self.owners.take(*place);
                    self.output.clear(*place);
                }
            }
            if !after.is_empty() {
                self.products.put(slot, after);
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
    F: Fn(&Context<'_>, &K, &Arc<V>) -> Vec<(K2, Arc<V2>)>,
{
    fn produce(&mut self, reader: Reader, key: &K, value: &Arc<V>) -> Product {
        let reads = RefCell::default();
        let context = Context {
            reader,
            reads: &reads,
        };
        self.runs.0.set(self.runs.0.get() + 1);
        let computed = (self.compute)(&context, key, value);
        let places = computed
            .into_iter()
            .filter_map(|(key, value)| self.output.put(&key, Some(value)));
        let places: Vec<u32> = places.collect();
        for place in &places {
            self.owners.put(*place, reader.slot);
        }
        Product {
            made: places.into(),
            reads: reads.into_inner().into(),
        }
    }
}
