//! Which endpoint of a service a request goes to.
//!
//! A [`Plan`] is made when the endpoints or the policy change: it holds the endpoints that may be used at all, in tiers
//! from most to least preferred, and the hash table if there is one. [`Plan::pick`] then costs a few draws, as long as
//! most endpoints are usable.

use std::{collections::BTreeMap, time::Duration};

use super::backend::{Balancer, HashTable, Locality, TrafficPolicy, Warmup};
use crate::{
    draw::Draw,
    names::Str,
    select::is_usable,
    service::{HealthPolicy, LoadBalancingMode, Service},
    workload::{Health, Workload},
};

mod hash;
#[cfg(test)]
mod tests;
mod tier;

use hash::Table;
pub use hash::hash;

/// One endpoint of a service.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The workload.
    pub workload: &'a Workload,
    /// Its labels, where they are known.
    pub labels: Option<&'a BTreeMap<Str, Str>>,
}

/// Where a choice is made: the waypoint itself.
pub type Source<'a> = Candidate<'a>;

/// What an endpoint is like at the time of a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Whether it may be chosen: not ejected, not tried yet.
    pub usable: bool,
    /// Requests to it.
    pub active: u32,
    /// For how long it has been there; none: always.
    pub age: Option<Duration>,
}

/// What a choice depends on beside the endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chance {
    /// Of the request, by [`hash()`]; none: there is nothing to hash.
    pub hash: Option<u64>,
    /// A draw of its own.
    pub draw: Draw,
    /// Counts the choices of this plan, for those in turn.
    pub turn: u64,
}

/// The endpoints of a service that may be used, and how one is chosen. Positions are those of the candidates.
#[derive(Debug, Default)]
pub struct Plan {
    tiers: Vec<Tier>,
    how: How,
    warmup: Option<Warmup>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum How {
    #[default]
    LeastRequest,
    InTurn,
    Random,
    Hash,
}

/// Endpoints that are preferred alike.
#[derive(Debug)]
struct Tier {
    members: Vec<usize>,
    /// Sums of the weights up to and with each member.
    sums: Vec<u64>,
    /// Whether all weights are the same.
    equal: bool,
    table: Option<Table>,
}

/// How often a choice is drawn before all endpoints are looked at.
const DRAWS: usize = 8;

/// Whether an endpoint has the labels of a subset.
pub fn has_labels(labels: Option<&BTreeMap<Str, Str>>, wanted: &BTreeMap<Str, Str>) -> bool {
    let has = |(name, value)| labels.and_then(|it| it.get(name)) == Some(value);
    wanted.iter().all(has)
}

impl Plan {
    /// Sorts out the endpoints of `service`; without one (a workload by its own address) all are alike.
    pub fn new(
        service: Option<&Service>,
        policy: &TrafficPolicy,
        source: Source<'_>,
        candidates: &[Candidate<'_>],
    ) -> Self {
        let (how, table) = how(&policy.balancer);
        let mut tiers: BTreeMap<usize, Vec<(usize, u64)>> = BTreeMap::new();
        let usable = candidates
            .iter()
            .enumerate()
            .filter(|(_, it)| service.is_none_or(|service| may_be_used(service, source, it)));
        let shares = Shares::new(policy.locality.as_ref(), source, candidates);
        for (at, candidate) in usable {
            let Some(tier) = tier::of(service, policy.locality.as_ref(), source, *candidate) else {
                continue;
            };
            let weight = shares.weight(*candidate);
            if weight > 0 {
                tiers.entry(tier).or_default().push((at, weight));
            }
        }
        let name = |at: usize| &*candidates[at].workload.uid.0;
        Self {
            tiers: tiers
                .into_values()
                .map(|members| Tier::new(&members, table, name))
                .collect(),
            how,
            warmup: policy.warmup,
        }
    }

    /// Whether there is no endpoint at all.
    pub fn is_empty(&self) -> bool {
        self.tiers.is_empty()
    }

    /// The positions of the endpoints that may be used, the most preferred first.
    pub fn members(&self) -> impl Iterator<Item = usize> {
        self.tiers.iter().flat_map(|it| it.members.iter().copied())
    }

    /// Chooses an endpoint that is usable; none: there is none.
    ///
    /// A tier keeps all requests while 5 of 7 of its endpoints are usable; below that, a share in proportion goes to
    /// the next ones (as Envoy's priorities do).
    pub fn pick(&self, chance: Chance, load: impl Fn(usize) -> Load) -> Option<usize> {
        let mut draw = chance.draw;
        let mut last = None;
        for (number, tier) in self.tiers.iter().enumerate() {
            let (now, later) = draw.split();
            draw = later;
            let chance = Chance {
                draw: now,
                ..chance
            };
            let (picked, spilled) = self.pick_in(tier, chance, &load);
            let next = number + 1 < self.tiers.len();
            last = picked.or(last);
            if picked.is_some() && !(spilled && next) {
                return picked;
            }
        }
        last
    }

    /// The choice in one tier, and whether it is one of those that spill over to the next.
    fn pick_in(
        &self,
        tier: &Tier,
        chance: Chance,
        load: &impl Fn(usize) -> Load,
    ) -> (Option<usize>, bool) {
        let (probe, rest) = chance.draw.split();
        let (spill, choice) = rest.split();
        let healthy = tier.drawn(probe).is_some_and(|it| load(it).usable);
        let spilled = !healthy && tier.spills(spill, load);
        let chance = Chance {
            draw: choice,
            ..chance
        };
        (self.choose(tier, chance, load), spilled)
    }

    fn choose(&self, tier: &Tier, chance: Chance, load: &impl Fn(usize) -> Load) -> Option<usize> {
        if let (How::Hash, Some(hash), Some(table)) = (self.how, chance.hash, &tier.table) {
            let usable = |at: usize| load(tier.members[at]).usable;
            return table.find(hash, usable).map(|at| tier.members[at]);
        }
        let (first, second) = chance.draw.split();
        match self.how {
            How::InTurn => self.in_turn(tier, chance, load),
            How::Random | How::Hash => tier.one(first, load, |_, _| true),
            How::LeastRequest => {
                let warm = |at, draw| self.is_warm(load(at), draw);
                let one = tier.one(first, load, warm)?;
                let other = tier.one(second, load, warm)?;
                let busier = load(one).active > load(other).active;
                Some(if busier { other } else { one })
            }
        }
    }

    /// Each once in a round where weights are equal; else at points that are spread evenly (multiples of the golden
    /// ratio), so that shares are kept over short runs too.
    fn in_turn(&self, tier: &Tier, chance: Chance, load: &impl Fn(usize) -> Load) -> Option<usize> {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut draw = chance.draw;
        let count = u64::try_from(tier.members.len()).unwrap_or(u64::MAX);
        for step in 0..tier.members.len().min(64) {
            let turn = chance
                .turn
                .wrapping_add(u64::try_from(step).unwrap_or_default());
            let at = match tier.equal {
                true => usize::try_from(turn % count.max(1)).ok()?,
                false => tier.at(scaled(turn.wrapping_mul(GOLDEN), tier.total()))?,
            };
            let (now, later) = draw.split();
            draw = later;
            let (member, last) = (tier.members[at], step + 1 == tier.members.len().min(64));
            let load = load(member);
            if load.usable && (last || self.is_warm(load, now)) {
                return Some(member);
            }
        }
        tier.one(draw, load, |_, _| true)
    }

    /// Whether an endpoint that is new takes this request (slow start).
    fn is_warm(&self, load: Load, draw: Draw) -> bool {
        let (Some(warmup), Some(age)) = (self.warmup, load.age) else {
            return true;
        };
        if age >= warmup.duration {
            return true;
        }
        let aggression = f64::from(warmup.aggression_milli.max(1)) / 1000.0;
        let elapsed = age.as_secs_f64() / warmup.duration.as_secs_f64();
        let least = f64::from(warmup.minimum_percent) / 100.0;
        let share = elapsed.powf(1.0 / aggression).max(least);
        let million = draw.below(1_000_000).and_then(|it| u32::try_from(it).ok());
        million.is_none_or(|it| f64::from(it) < share * 1e6)
    }
}

fn how(balancer: &Balancer) -> (How, Option<HashTable>) {
    match balancer {
        Balancer::LeastRequest => (How::LeastRequest, None),
        Balancer::RoundRobin => (How::InTurn, None),
        Balancer::Random | Balancer::Passthrough => (How::Random, None),
        Balancer::ConsistentHash { table, .. } => (How::Hash, Some(*table)),
    }
}

fn may_be_used(service: &Service, source: Source<'_>, candidate: &Candidate<'_>) -> bool {
    let workload = candidate.workload;
    let health = workload.status != Health::Unhealthy
        || service.load_balancing.health_policy == HealthPolicy::AllowAll;
    health
        && service.load_balancing.mode != LoadBalancingMode::Passthrough
        && is_usable(workload, service.ip_families, &source.workload.network)
}

/// Weights of endpoints where localities have shares.
struct Shares<'a> {
    /// The pattern of a locality, its percent, and the capacity of its endpoints.
    to: Option<Vec<(&'a str, u64, u64)>>,
}

impl<'a> Shares<'a> {
    fn new(
        locality: Option<&'a Locality>,
        source: Source<'_>,
        candidates: &[Candidate<'_>],
    ) -> Self {
        let to = tier::distribution(locality, source).map(|it| {
            let shares = it.to.iter().map(|(pattern, percent)| {
                let here = candidates.iter().filter(|it| tier::lies_in(it, pattern));
                let capacity = here.map(|it| u64::from(it.workload.capacity)).sum();
                (&**pattern, u64::from(*percent), capacity)
            });
            shares.collect()
        });
        Self { to }
    }

    /// In proportion to the capacity, within the share of the first locality that fits; 0: never.
    fn weight(&self, candidate: Candidate<'_>) -> u64 {
        const UNIT: u64 = 1_000_000;
        let capacity = u64::from(candidate.workload.capacity);
        let Some(to) = &self.to else {
            return capacity;
        };
        let share = to
            .iter()
            .find(|(pattern, ..)| tier::lies_in(&candidate, pattern));
        share.map_or(0, |(_, percent, total)| {
            percent * UNIT * capacity / (*total).max(1)
        })
    }
}

/// A number below `bound`, in proportion to `value` among all of its type.
fn scaled(value: u64, bound: u64) -> u64 {
    let product = u128::from(value) * u128::from(bound);
    u64::try_from(product >> 64).unwrap_or_default()
}

impl Tier {
    fn new<'a>(
        members: &[(usize, u64)],
        table: Option<HashTable>,
        name: impl Fn(usize) -> &'a str,
    ) -> Self {
        let mut sum = 0;
        let sums = members.iter().map(|(_, weight)| {
            sum += weight;
            sum
        });
        let weights: Vec<_> = members
            .iter()
            .map(|(at, weight)| (name(*at), *weight))
            .collect();
        Self {
            sums: sums.collect(),
            equal: members.windows(2).all(|it| it[0].1 == it[1].1),
            members: members.iter().map(|(at, _)| *at).collect(),
            table: table.map(|it| Table::new(it, &weights)),
        }
    }

    fn total(&self) -> u64 {
        self.sums.last().copied().unwrap_or_default()
    }

    /// The member at a point of the sums.
    fn at(&self, point: u64) -> Option<usize> {
        let at = self.sums.partition_point(|sum| *sum <= point);
        (at < self.members.len()).then_some(at)
    }

    fn drawn(&self, draw: Draw) -> Option<usize> {
        let at = self.at(draw.below(self.total())?)?;
        Some(self.members[at])
    }

    /// One that is usable, by weight; `takes` may refuse it a few times.
    fn one(
        &self,
        mut draw: Draw,
        load: &impl Fn(usize) -> Load,
        takes: impl Fn(usize, Draw) -> bool,
    ) -> Option<usize> {
        let mut last = None;
        for _ in 0..DRAWS {
            let (now, later) = draw.split();
            let (place, warm) = now.split();
            draw = later;
            let drawn = self.drawn(place)?;
            if load(drawn).usable {
                last = Some(drawn);
                if takes(drawn, warm) {
                    return last;
                }
            }
        }
        last.or_else(|| self.among_usable(draw, load))
    }

    /// Exact, at the cost of looking at all.
    fn among_usable(&self, draw: Draw, load: &impl Fn(usize) -> Load) -> Option<usize> {
        let weight = |at: usize| self.sums[at] - at.checked_sub(1).map_or(0, |it| self.sums[it]);
        let usable = || (0..self.members.len()).filter(|at| load(self.members[*at]).usable);
        let total = usable().map(weight).sum();
        let mut rest = draw.below(total)?;
        let chosen = usable().find(|at| {
            let hit = rest < weight(*at);
            rest = rest.saturating_sub(weight(*at));
            hit
        });
        chosen.map(|at| self.members[at])
    }

    /// Asked after a draw has met an endpoint that is not usable, which happens to a share `1 - h` of the requests
    /// where `h` is usable: so much of them as makes it `1 - 1.4 h` of all.
    fn spills(&self, draw: Draw, load: &impl Fn(usize) -> Load) -> bool {
        let weight = |at: usize| self.sums[at] - at.checked_sub(1).map_or(0, |it| self.sums[it]);
        let members = 0..self.members.len();
        let gone = members.filter(|at| !load(self.members[*at]).usable);
        let gone: u64 = gone.map(weight).sum();
        let healthy = self.total() - gone;
        let spilled = (self.total() * 10).saturating_sub(healthy * 14);
        draw.below(gone * 10).is_some_and(|it| it < spilled)
    }
}
