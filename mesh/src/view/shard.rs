//! Tables whose copies share what they do not change: 32 branches of 32 shards, so that one write to a shared copy
//! of 100,000 entries copies two short lists of pointers and about a hundred entries.

use std::{
    borrow::Borrow,
    collections::{HashMap, hash_map},
    fmt,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash},
    sync::Arc,
};

use hashbrown::HashTable;

/// Fixed keys: equal content gives an equal order. Keys come from the control plane, not from peers.
type Hasher = BuildHasherDefault<DefaultHasher>;
type Branch<S> = [Arc<S>; WIDTH];

const WIDTH: usize = 32;

/// What [`Shards`] and [`Table`] find things by.
pub(crate) fn hash_of<Q: Hash + ?Sized>(key: &Q) -> u64 {
    Hasher::default().hash_one(key)
}

/// Shards by hash.
struct Shards<S> {
    root: Arc<[Arc<Branch<S>>; WIDTH]>,
}

impl<S> Clone for Shards<S> {
    fn clone(&self) -> Self {
        Self {
            root: Arc::clone(&self.root),
        }
    }
}

impl<S: Default> Default for Shards<S> {
    fn default() -> Self {
        let shard = Arc::new(S::default());
        let branch = Arc::new(std::array::from_fn(|_| Arc::clone(&shard)));
        Self {
            root: Arc::new(std::array::from_fn(|_| Arc::clone(&branch))),
        }
    }
}

impl<S> Shards<S> {
    fn of(&self, hash: u64) -> &S {
        let (branch, shard) = place(hash);
        &self.root[branch][shard]
    }

    fn iter(&self) -> impl Iterator<Item = &S> {
        let shards = self.root.iter().flat_map(|branch| branch.iter());
        shards.map(|shard| &**shard)
    }
}

impl<S: Clone> Shards<S> {
    fn of_mut(&mut self, hash: u64) -> &mut S {
        let (branch, shard) = place(hash);
        let branch = Arc::make_mut(&mut Arc::make_mut(&mut self.root)[branch]);
        Arc::make_mut(&mut branch[shard])
    }
}

/// Where a hash lives. The top bits: the table inside uses the low ones.
fn place(hash: u64) -> (usize, usize) {
    let at = usize::from(u16::try_from(hash >> 54).unwrap_or_default());
    (at / WIDTH, at % WIDTH)
}

/// A map.
pub(crate) struct Sharded<K, V> {
    shards: Shards<HashMap<K, V, Hasher>>,
}

impl<K, V> Clone for Sharded<K, V> {
    fn clone(&self) -> Self {
        Self {
            shards: self.shards.clone(),
        }
    }
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        Self {
            shards: Shards::default(),
        }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Sharded<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.shards.iter().flatten()).finish()
    }
}

/// Values by a hash of something that is in them or that they lead to, which is not kept beside them: whoever finds a value
/// looks whether it is the one that was meant.
#[derive(Clone)]
pub(crate) struct Table<V> {
    shards: Shards<HashTable<(u64, V)>>,
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self {
            shards: Shards::default(),
        }
    }
}

impl<V: fmt::Debug> fmt::Debug for Table<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<V> Table<V> {
    /// What was inserted under this hash.
    pub(crate) fn find(&self, hash: u64) -> impl Iterator<Item = &V> {
        let all = self.shards.of(hash).iter_hash(hash);
        all.filter(move |it| it.0 == hash).map(|(_, value)| value)
    }

    /// In no order that means anything.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flatten().map(|(_, value)| value)
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(HashTable::len).sum()
    }
}

impl<V: Clone> Table<V> {
    /// Beside whatever is under this hash already.
    pub(crate) fn insert(&mut self, hash: u64, value: V) {
        let shard = self.shards.of_mut(hash);
        shard.insert_unique(hash, (hash, value), |it| it.0);
    }

    /// One value under this hash that `is_it`, if there is one.
    pub(crate) fn remove(&mut self, hash: u64, is_it: impl Fn(&V) -> bool) -> Option<V> {
        // Looked up first: a miss must not copy a shard.
        self.find(hash).find(|it| is_it(it))?;
        let shard = self.shards.of_mut(hash);
        let found = shard.find_entry(hash, |it| it.0 == hash && is_it(&it.1));
        found.ok().map(|entry| entry.remove().0.1)
    }
}

impl<K: Hash + Eq, V> Sharded<K, V> {
    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards.of(hash_of(key)).get(key)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flatten()
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(HashMap::len).sum()
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, V> {
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.shard(&key).insert(key, value)
    }

    pub(crate) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // Looked up first: a miss must not copy a shard.
        self.get(key)?;
        self.shard(key).remove(key)
    }

    /// Changes the value of `key`, an absent one from its default; one that `change` answers false for is dropped.
    pub(crate) fn update(&mut self, key: K, change: impl FnOnce(&mut V) -> bool)
    where
        V: Default,
    {
        match self.shard(&key).entry(key) {
            hash_map::Entry::Occupied(mut entry) => {
                if !change(entry.get_mut()) {
                    entry.remove();
                }
            }
            hash_map::Entry::Vacant(entry) => {
                let mut value = V::default();
                if change(&mut value) {
                    entry.insert(value);
                }
            }
        }
    }

    fn shard<Q: Hash + ?Sized>(&mut self, key: &Q) -> &mut HashMap<K, V, Hasher> {
        self.shards.of_mut(hash_of(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_keeps_what_the_original_changes() {
        let mut map = Sharded::default();
        for key in 0..1_000 {
            map.insert(key, key);
        }
        let copy = map.clone();
        for key in 0..1_000 {
            map.update(key, |value| {
                *value += 1;
                key % 2 == 0
            });
        }
        assert_eq!((map.len(), copy.len()), (500, 1_000));
        assert_eq!((map.get(&4), copy.get(&4)), (Some(&5), Some(&4)));
        assert_eq!((map.get(&5), copy.get(&5)), (None, Some(&5)));
        assert_eq!(map.remove(&4), Some(5));
        assert_eq!(map.remove(&5), None);
    }

    #[test]
    fn a_table_tells_values_of_one_hash_apart_by_themselves() {
        let mut table = Table::default();
        for value in 0..1_000 {
            table.insert(value % 3, value);
        }
        let copy = table.clone();
        assert_eq!(table.find(1).count(), 333);
        assert_eq!(table.remove(1, |it| *it == 4), Some(4));
        assert_eq!(table.remove(1, |it| *it == 4), None);
        assert_eq!(table.remove(1, |it| *it == 5), None);
        assert!(table.find(1).all(|it| it % 3 == 1 && *it != 4));
        assert_eq!((table.len(), copy.len()), (999, 1_000));
        assert!(copy.find(1).any(|it| *it == 4));
    }
}
