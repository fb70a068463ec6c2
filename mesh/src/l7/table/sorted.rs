//! A map in the order of its keys whose copies share what they do not change: chunks of some dozens of entries, so that
//! one write to a shared copy copies a list of pointers and one chunk.

use std::sync::Arc;

/// A chunk that grows beyond this is cut in two.
const LONGEST: usize = 64;

#[derive(Debug)]
pub(super) struct Sorted<K, V> {
    /// None is empty; entries rise within each and from one to the next.
    chunks: Vec<Chunk<K, V>>,
}

type Chunk<K, V> = Arc<Vec<(K, V)>>;

impl<K, V> Clone for Sorted<K, V> {
    fn clone(&self) -> Self {
        Self {
            chunks: self.chunks.clone(),
        }
    }
}

impl<K, V> Default for Sorted<K, V> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<K: Ord, V> Sorted<K, V> {
    /// Of entries whose keys rise.
    pub(super) fn of_rising(entries: impl IntoIterator<Item = (K, V)>) -> Self {
        let mut entries = entries.into_iter().peekable();
        let mut chunks = Vec::new();
        while entries.peek().is_some() {
            // Not full, so that the next entries have room.
            let chunk: Vec<_> = entries.by_ref().take(LONGEST / 4 * 3).collect();
            chunks.push(Arc::new(chunk));
        }
        Self { chunks }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        let entries = self.chunks.iter().flat_map(|it| it.iter());
        entries.map(|(key, value)| (key, value))
    }

    /// The last entry among the first ones whose keys are `within`; what is not within must not come before what is.
    pub(super) fn last(&self, within: impl Fn(&K) -> bool) -> Option<(&K, &V)> {
        let first_within = |it: &Chunk<K, V>| it.first().is_some_and(|(key, _)| within(key));
        let after = self.chunks.partition_point(first_within);
        let chunk = self.chunks.get(after.checked_sub(1)?)?;
        let after = chunk.partition_point(|(key, _)| within(key));
        let (key, value) = chunk.get(after.checked_sub(1)?)?;
        Some((key, value))
    }

    /// Which chunk a key is in, or would be put into.
    fn chunk_of(&self, key: &K) -> usize {
        let starts_before = |it: &Chunk<K, V>| it.first().is_some_and(|(first, _)| first <= key);
        self.chunks.partition_point(starts_before).saturating_sub(1)
    }
}

impl<K: Ord + Clone, V: Clone> Sorted<K, V> {
    /// Replaces the value of a key by what `change` makes of it; none: there is none.
    pub(super) fn update(&mut self, key: K, change: impl FnOnce(Option<&V>) -> Option<V>) {
        if self.chunks.is_empty() {
            let first = change(None).map(|value| Arc::new(vec![(key, value)]));
            return self.chunks.extend(first);
        }
        let at = self.chunk_of(&key);
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        match chunk.binary_search_by(|(it, _)| it.cmp(&key)) {
            Ok(found) => match change(Some(&chunk[found].1)) {
                Some(value) => chunk[found].1 = value,
                None => drop(chunk.remove(found)),
            },
            Err(place) => {
                let new = change(None).map(|value| (key, value));
                chunk.splice(place..place, new);
            }
        }
        self.mend(at);
    }

    fn mend(&mut self, at: usize) {
        if self.chunks[at].is_empty() {
            self.chunks.remove(at);
        } else if self.chunks[at].len() > LONGEST {
            let later = Arc::make_mut(&mut self.chunks[at]).split_off(LONGEST / 2);
            self.chunks.insert(at + 1, Arc::new(later));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::draw::Draw;

    #[test]
    fn it_holds_what_a_map_would_and_copies_stay_as_they_were() {
        let mut draw = Draw(7);
        let mut below = |bound| {
            let (now, later) = draw.split();
            draw = later;
            now.below(bound).unwrap()
        };
        let mut expected: BTreeMap<u64, u64> = (0..200).map(|key| (key * 3, key)).collect();
        let mut sorted = Sorted::of_rising(expected.clone());
        let (copy, before) = (sorted.clone(), expected.clone());
        for round in 0..5_000 {
            // It grows first, and then shrinks to nothing.
            let (key, there) = (below(600), below(5_000) > round);
            sorted.update(key, |_| there.then_some(round));
            match there {
                true => expected.insert(key, round),
                false => expected.remove(&key),
            };
            let asked = below(600);
            let last = expected.range(..=asked).next_back();
            assert_eq!(sorted.last(|key| *key <= asked), last);
        }
        assert!(sorted.iter().eq(&expected));
        assert!(copy.iter().eq(&before));
        for key in 0..600 {
            sorted.update(key, |_| None);
        }
        assert!(sorted.is_empty());
        assert_eq!(sorted.last(|_| true), None);
    }
}
