//! A map whose copies share what they do not change: 32 branches of 32 shards, so that one write to a shared copy
//! of 100,000 entries copies two short lists of pointers and about a hundred entries.

use std::{
    borrow::Borrow,
    collections::{HashMap, hash_map},
    fmt,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash},
    sync::Arc,
};

/// Fixed keys: equal content gives an equal order. Keys come from the control plane, not from peers.
type Hasher = BuildHasherDefault<DefaultHasher>;
type Shard<K, V> = HashMap<K, V, Hasher>;
type Branch<K, V> = [Arc<Shard<K, V>>; WIDTH];

const WIDTH: usize = 32;

pub(crate) struct Sharded<K, V> {
    root: Arc<[Arc<Branch<K, V>>; WIDTH]>,
}

impl<K, V> Clone for Sharded<K, V> {
    fn clone(&self) -> Self {
        Self {
            root: Arc::clone(&self.root),
        }
    }
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        let shard = Arc::new(Shard::default());
        let branch = Arc::new(std::array::from_fn(|_| Arc::clone(&shard)));
        Self {
            root: Arc::new(std::array::from_fn(|_| Arc::clone(&branch))),
        }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Sharded<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shards = self.root.iter().flat_map(|branch| branch.iter());
        f.debug_map()
            .entries(shards.flat_map(|it| it.iter()))
            .finish()
    }
}

/// Where a key lives. The top bits of the hash: the map inside uses the low ones.
fn place<Q: Hash + ?Sized>(key: &Q) -> (usize, usize) {
    let hash = Hasher::default().hash_one(key);
    let at = usize::from(u16::try_from(hash >> 54).unwrap_or_default());
    (at / WIDTH, at % WIDTH)
}

impl<K: Hash + Eq, V> Sharded<K, V> {
    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let (branch, shard) = place(key);
        self.root[branch][shard].get(key)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        let shards = self.root.iter().flat_map(|branch| branch.iter());
        shards.flat_map(|shard| shard.iter())
    }

    pub(crate) fn len(&self) -> usize {
        let shards = self.root.iter().flat_map(|branch| branch.iter());
        shards.map(|shard| shard.len()).sum()
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

    fn shard<Q: Hash + ?Sized>(&mut self, key: &Q) -> &mut Shard<K, V> {
        let (branch, shard) = place(key);
        let branch = Arc::make_mut(&mut Arc::make_mut(&mut self.root)[branch]);
        Arc::make_mut(&mut branch[shard])
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
}
