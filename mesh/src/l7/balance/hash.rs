//! Consistent hashing: rings and Maglev tables. The same endpoints give the same table on every replica.

use super::{super::backend::HashTable, scaled};

/// The most points of a ring: a policy's wish for more is not followed.
const MAX_POINTS: u64 = 1 << 18;
/// The most entries of a Maglev table.
const MAX_ENTRIES: u32 = 5_000_011;

/// The hash of a request's key.
pub fn hash(key: &[u8]) -> u64 {
    seeded(0, key)
}

/// FNV-1a, then a finalizer, since the upper bits are what is compared.
fn seeded(seed: u64, bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x100_0000_01b3;
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    let start = BASIS ^ mix(seed);
    mix(bytes.iter().fold(start, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(PRIME)
    }))
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let value = (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}

/// Members by hash; they are numbers from 0.
#[derive(Debug)]
pub(super) enum Table {
    /// Points of members, rising.
    Ring(Vec<(u64, usize)>),
    /// Members by slot.
    Maglev(Vec<usize>),
}

impl Table {
    /// Of members with their names and weights.
    pub(super) fn new(kind: HashTable, members: &[(&str, u64)]) -> Self {
        match kind {
            HashTable::Ring(least) => Self::Ring(ring(u64::from(least), members)),
            HashTable::Maglev(size) => Self::Maglev(maglev(size.clamp(1, MAX_ENTRIES), members)),
        }
    }

    /// The first usable member from the hash on.
    pub(super) fn find(&self, hash: u64, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let (start, count) = match self {
            Self::Ring(points) => (points.partition_point(|(at, _)| *at < hash), points.len()),
            Self::Maglev(slots) => {
                let count = u64::try_from(slots.len()).ok()?;
                (usize::try_from(scaled(hash, count)).ok()?, slots.len())
            }
        };
        let member = |at: usize| match self {
            Self::Ring(points) => points[at].1,
            Self::Maglev(slots) => slots[at],
        };
        let mut before = None;
        (start..start + count)
            .map(|at| member(at % count))
            .filter(|it| before.replace(*it) != Some(*it))
            .find(|it| usable(*it))
    }
}

/// At least one point for each member, and points in proportion to weights.
fn ring(least: u64, members: &[(&str, u64)]) -> Vec<(u64, usize)> {
    let total: u64 = members.iter().map(|(_, weight)| weight).sum();
    let count = u64::try_from(members.len()).unwrap_or(u64::MAX);
    // Enough for the lightest member to be there by its share, as far as the bound allows.
    let points = least.max(count).min(MAX_POINTS);
    let mut ring = Vec::new();
    for (at, (name, weight)) in members.iter().enumerate() {
        let share = u128::from(points) * u128::from(*weight);
        let own = share.div_ceil(u128::from(total.max(1))).max(1);
        let own = u64::try_from(own).unwrap_or(MAX_POINTS);
        ring.extend((1..=own).map(|point| (seeded(point, name.as_bytes()), at)));
    }
    ring.sort_unstable();
    ring
}

/// Eisenbud et al. 2016, 3.4; a member takes a slot whenever its weights add up to the heaviest one's.
fn maglev(size: u32, members: &[(&str, u64)]) -> Vec<usize> {
    let heaviest = members.iter().map(|(_, weight)| *weight).max();
    let Some(heaviest) = heaviest.filter(|it| *it > 0) else {
        return Vec::new();
    };
    let size = u64::from(size);
    let mut turns: Vec<_> = members
        .iter()
        .map(|(name, _)| Turns::new(name, size))
        .collect();
    let mut slots: Vec<Option<usize>> = (0..size).map(|_| None).collect();
    let mut free = slots.len();
    while free > 0 {
        for (at, turn) in turns.iter_mut().enumerate() {
            turn.saved += members[at].1;
            if free == 0 || turn.saved < heaviest {
                continue;
            }
            turn.saved -= heaviest;
            turn.take(&mut slots, at);
            free -= 1;
        }
    }
    slots.into_iter().flatten().collect()
}

/// One member's order of slots.
struct Turns {
    offset: u64,
    skip: u64,
    next: u64,
    size: u64,
    saved: u64,
}

impl Turns {
    fn new(name: &str, size: u64) -> Self {
        let skips = size.saturating_sub(1).max(1);
        Self {
            offset: seeded(1, name.as_bytes()) % size,
            skip: seeded(2, name.as_bytes()) % skips + 1,
            next: 0,
            size,
            saved: 0,
        }
    }

    /// Takes the first free slot of its order. Where the size is no prime an order may miss slots: then any.
    fn take(&mut self, slots: &mut [Option<usize>], member: usize) {
        while self.next < self.size {
            let at = (self.offset + self.next * self.skip) % self.size;
            self.next += 1;
            let slot = usize::try_from(at).ok().and_then(|at| slots.get_mut(at));
            if let Some(slot @ None) = slot {
                *slot = Some(member);
                return;
            }
        }
        if let Some(slot) = slots.iter_mut().find(|it| it.is_none()) {
            *slot = Some(member);
        }
    }
}
