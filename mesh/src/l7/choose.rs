//! What chance decides of a request: its backend, its copies, its faults. Each takes a draw of its own.

use std::time::Duration;

use super::route::{Abort, Backend, Fault, Mirror, WeightedBackend};
use crate::draw::Draw;

const MILLION: u64 = 1_000_000;

/// One of a rule's backends by weight; none: there is none, or all weights are 0 (answered 500).
pub fn backend(backends: &[WeightedBackend], draw: Draw) -> Option<&WeightedBackend> {
    by_weight(backends, |it| it.weight, draw)
}

/// One of a connection's backends by weight; none: there is none, or all weights are 0 (refused).
pub fn connection_backend(backends: &[(u32, Backend)], draw: Draw) -> Option<&Backend> {
    by_weight(backends, |it| it.0, draw).map(|(_, backend)| backend)
}

/// Without a list of weights: nothing is allocated.
fn by_weight<T>(items: &[T], weight: impl Fn(&T) -> u32, draw: Draw) -> Option<&T> {
    let total = items.iter().map(|it| u64::from(weight(it))).sum();
    let mut rest = draw.below(total)?;
    items.iter().find(|it| {
        let weight = u64::from(weight(it));
        let hit = rest < weight;
        rest = rest.saturating_sub(weight);
        hit
    })
}

/// Whether something that happens so often, in parts per million, happens now.
pub fn happens(per_million: u32, draw: Draw) -> bool {
    draw.below(MILLION)
        .is_some_and(|it| it < u64::from(per_million))
}

/// The mirrors that get a copy, each drawn by itself.
pub fn mirrors(mirrors: &[Mirror], draw: Draw) -> impl Iterator<Item = &Mirror> {
    let mut draw = draw;
    mirrors.iter().filter(move |mirror| {
        let (now, later) = draw.split();
        draw = later;
        happens(mirror.per_million, now)
    })
}

/// The wait and the answer that a fault means for one request; each drawn by itself.
pub fn fault(fault: &Fault, draw: Draw) -> (Option<Duration>, Option<Abort>) {
    let (wait, answer) = draw.split();
    let delay = fault.delay.filter(|(often, _)| happens(*often, wait));
    let abort = fault.abort.filter(|(often, _)| happens(*often, answer));
    (delay.map(|(_, time)| time), abort.map(|(_, answer)| answer))
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    fn invalid(text: &str) -> Backend {
        Backend::Invalid(text.into())
    }

    fn draws() -> impl Iterator<Item = Draw> {
        (0..10_000).map(|seed| Draw(seed).split().0)
    }

    #[test]
    fn a_weight_is_a_share_and_nothing_has_none() {
        let backends = [("a", 1), ("b", 0), ("c", 3)].map(|(name, weight)| (weight, invalid(name)));
        let mut hits = [0; 3];
        for draw in draws() {
            let chosen = connection_backend(&backends, draw).unwrap();
            let at = backends.iter().position(|(_, it)| it == chosen);
            hits[at.unwrap()] += 1;
        }
        assert_eq!(hits[1], 0);
        assert!((2_300..2_700).contains(&hits[0]), "{hits:?}");
        assert_eq!(connection_backend(&backends[1..2], Draw(1)), None);
        assert_eq!(connection_backend(&[], Draw(1)), None);
    }

    #[test]
    fn backends_of_requests_are_drawn_alike() {
        let backends = [0, 5].map(|weight| WeightedBackend::new(weight, invalid("x")));
        for draw in draws().take(100) {
            assert_eq!(backend(&backends, draw), Some(&backends[1]));
        }
        assert_eq!(backend(&[], Draw(1)), None);
    }

    #[test]
    fn mirrors_and_faults_are_drawn_apart() {
        let mirror = |per_million| Mirror {
            backend: invalid("x"),
            per_million,
            shadow_host: false,
        };
        let all = [
            mirror(0),
            mirror(500_000),
            mirror(500_000),
            mirror(1_000_000),
        ];
        let counts = draws().map(|draw| mirrors(&all, draw).count());
        let mut seen = [0; 5];
        counts.for_each(|it| seen[it] += 1);
        assert_eq!((seen[0], seen[4]), (0, 0), "never, always");
        for (count, expected) in [(1, 2_500), (2, 5_000), (3, 2_500)] {
            assert!(
                seen[count] > expected - 200 && seen[count] < expected + 200,
                "{seen:?}"
            );
        }
        let both = Fault {
            delay: Some((500_000, Duration::from_secs(1))),
            abort: Some((500_000, Abort::Http(StatusCode::IM_A_TEAPOT))),
        };
        let one = draws().filter(|draw| {
            let (delay, abort) = fault(&both, *draw);
            delay.is_some() != abort.is_some()
        });
        assert!((4_700..5_300).contains(&one.count()));
        assert_eq!(fault(&Fault::default(), Draw(1)), (None, None));
    }
}
