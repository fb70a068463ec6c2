//! Chance as an argument: a splittable source, so that independent choices of one decision stay independent.

use serde::Serialize;

/// A draw of chance. The effects layer makes one per connection from its random source; equal seeds give equal
/// decisions, which is how a decision is explained afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Draw(pub u64);

impl Draw {
    /// Two draws that tell nothing of each other: one choice each.
    pub fn split(self) -> (Self, Self) {
        (
            Self(mix(self.0.wrapping_add(GOLDEN))),
            Self(mix(self.0.wrapping_add(GOLDEN.wrapping_mul(2)))),
        )
    }

    /// A number in `0..bound`; `None` if there is none.
    pub fn below(self, bound: u64) -> Option<u64> {
        if bound == 0 {
            return None;
        }
        // The high half of the product: no modulo bias worth a retry at 64 bits.
        let product = u128::from(mix(self.0)) * u128::from(bound);
        u64::try_from(product >> 64).ok()
    }

    /// An index, each in proportion to its weight; weight 0 never; `None` if all are 0.
    pub fn weighted(self, weights: &[u32]) -> Option<usize> {
        let total = weights.iter().map(|weight| u64::from(*weight)).sum();
        let mut rest = self.below(total)?;
        weights.iter().position(|weight| {
            let weight = u64::from(*weight);
            let hit = rest < weight;
            rest = rest.saturating_sub(weight);
            hit
        })
    }

    /// Brings `items` into an order of chance.
    pub fn shuffle<T>(self, items: &mut [T]) {
        let mut draw = self;
        for last in (1..items.len()).rev() {
            let (now, later) = draw.split();
            let bound = u64::try_from(last + 1).unwrap_or(u64::MAX);
            let chosen = now.below(bound).and_then(|at| usize::try_from(at).ok());
            items.swap(last, chosen.unwrap_or(last));
            draw = later;
        }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_a_share() {
        let mut hits = [0u32; 3];
        for seed in 0..10_000 {
            hits[Draw(seed).split().0.weighted(&[1, 0, 3]).unwrap()] += 1;
        }
        assert_eq!(hits[1], 0);
        assert!((2_300..2_700).contains(&hits[0]), "{hits:?}");
    }

    #[test]
    fn nothing_to_choose_gives_nothing() {
        assert_eq!(Draw(7).weighted(&[]), None);
        assert_eq!(Draw(7).weighted(&[0, 0]), None);
        assert_eq!(Draw(7).below(0), None);
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<_> = (0..20).collect();
        Draw(3).shuffle(&mut items);
        assert_ne!(items, (0..20).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn the_halves_of_a_split_differ_in_their_choices() {
        let agree = (0..1_000)
            .map(|seed| Draw(seed).split())
            .filter(|(a, b)| a.below(2) == b.below(2))
            .count();
        assert!((400..600).contains(&agree), "{agree}");
    }
}
