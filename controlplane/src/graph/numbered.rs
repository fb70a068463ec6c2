//! Keyed values in numbered places: what there are hundreds of thousands of is told apart by four bytes and not by a copy
//! of its key, and grows without being moved.

use std::hash::{BuildHasher as _, Hash, RandomState};

use hashbrown::HashTable;

/// Places per chunk.
const CHUNK: usize = 256;

/// Values by number. Chunked, so that growing neither copies what is there nor doubles what is held.
pub(super) struct Places<T> {
    chunks: Vec<Box<[Option<T>]>>,
}

/// Keyed values, each in a place that is its own while the key is there. The place of a key that is gone is used again.
pub(super) struct Numbered<K, T> {
    table: HashTable<u32>,
    places: Places<(K, T)>,
    free: Vec<u32>,
    len: u32,
    hasher: RandomState,
}

impl<T> Default for Places<T> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<T> Places<T> {
    pub(super) fn get(&self, place: u32) -> Option<&T> {
        let (chunk, within) = split(place);
        self.chunks.get(chunk)?.get(within)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, place: u32) -> Option<&mut T> {
        let (chunk, within) = split(place);
        self.chunks.get_mut(chunk)?.get_mut(within)?.as_mut()
    }

    pub(super) fn take(&mut self, place: u32) -> Option<T> {
        let (chunk, within) = split(place);
        self.chunks.get_mut(chunk)?.get_mut(within)?.take()
    }

    pub(super) fn put(&mut self, place: u32, value: T) {
        let (chunk, within) = split(place);
        while self.chunks.len() <= chunk {
            self.chunks.push((0..CHUNK).map(|_| None).collect());
        }
        self.chunks[chunk][within] = Some(value);
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().flatten().flatten()
    }
}

fn split(place: u32) -> (usize, usize) {
    let place = place as usize;
    (place / CHUNK, place % CHUNK)
}

impl<K: Eq + Hash, T> Default for Numbered<K, T> {
    fn default() -> Self {
        Self {
            table: HashTable::new(),
            places: Places::default(),
            free: Vec::new(),
            len: 0,
            hasher: RandomState::new(),
        }
    }
}

impl<K: Eq + Hash, T> Numbered<K, T> {
    /// The place of a key.
    pub(super) fn place(&self, key: &K) -> Option<u32> {
        let is_it = |place: &u32| {
            self.places
                .get(*place)
                .is_some_and(|(known, _)| known == key)
        };
        self.table.find(self.hasher.hash_one(key), is_it).copied()
    }

    pub(super) fn get(&self, key: &K) -> Option<&T> {
        self.places.get(self.place(key)?).map(|(_, value)| value)
    }

    pub(super) fn at(&self, place: u32) -> Option<(&K, &T)> {
        self.places.get(place).map(|(key, value)| (key, value))
    }

    pub(super) fn at_mut(&mut self, place: u32) -> Option<&mut T> {
        self.places.get_mut(place).map(|(_, value)| value)
    }

    /// Sets a value, and answers with its place.
    pub(super) fn insert(&mut self, key: K, value: T) -> u32
    where
        K: Clone,
    {
        if let Some(place) = self.place(&key) {
            self.places.put(place, (key, value));
            return place;
        }
        let place = self.free.pop().unwrap_or(self.len);
        if place == self.len {
            self.len = self.len.checked_add(1).expect("fewer than 2^32 at once");
        }
        let (places, hasher) = (&self.places, &self.hasher);
        let hash = hasher.hash_one(&key);
        let rehash = |place: &u32| {
            places
                .get(*place)
                .map_or(0, |(key, _)| hasher.hash_one(key))
        };
        self.table.insert_unique(hash, place, rehash);
        self.places.put(place, (key, value));
        place
    }

    pub(super) fn remove(&mut self, place: u32) -> Option<(K, T)> {
        let (key, value) = self.places.take(place)?;
        let hash = self.hasher.hash_one(&key);
        if let Ok(entry) = self.table.find_entry(hash, |known| *known == place) {
            entry.remove();
        }
        self.free.push(place);
        Some((key, value))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &T)> {
        self.places.iter().map(|(key, value)| (key, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_keeps_its_place_until_it_goes_and_the_next_takes_it() {
        let mut numbered = Numbered::default();
        let places: Vec<u32> = (0..1000).map(|n| numbered.insert(n, n)).collect();
        assert_eq!(numbered.insert(7, 70), places[7]);
        assert_eq!(numbered.get(&7), Some(&70));
        assert_eq!(numbered.remove(places[7]), Some((7, 70)));
        assert_eq!((numbered.get(&7), numbered.place(&7)), (None, None));
        assert_eq!(numbered.insert(5000, 1), places[7]);
        assert_eq!(numbered.at(places[7]), Some((&5000, &1)));
        for n in (0..1000).filter(|n| *n != 7) {
            assert_eq!(numbered.at(places[n]), Some((&n, &n)));
        }
        assert_eq!(numbered.iter().count(), 1000);
    }
}
