//! When the self-signed root is replaced. Pure: the state of the Secret and the time in, the next step out.
//!
//! A new root is first only published: everybody learns to trust it, and nothing is signed by it. When even the longest
//! certificate has been renewed, it signs, and the old one is only trusted, until the last certificate that it signed
//! has ended. No step depends on all replicas doing it at the same moment.

use std::time::Duration;

use time::OffsetDateTime;

/// A root is replaced when less than this part of its life is left (control-plane.md 12).
const LEFT: f64 = 0.2;

/// What the decision needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) now: OffsetDateTime,
    /// Life of the signing root.
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
    /// Since when the next root has been published, if there is one.
    pub(crate) next: Option<OffsetDateTime>,
    /// When the earliest of the old roots may go, if there are any.
    pub(crate) retired: Option<OffsetDateTime>,
    /// Somebody asks for a rotation now.
    pub(crate) asked: bool,
    /// The longest life of a certificate.
    pub(crate) longest: Duration,
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing to do.
    Rest,
    /// Make a next root and publish it.
    Publish,
    /// Let the next root sign; keep trusting the old one.
    Promote,
    /// Stop trusting old roots whose time has come.
    Retire,
}

/// The step that is due.
pub(crate) fn step(facts: &Facts) -> Step {
    if facts.retired.is_some_and(|until| facts.now >= until) {
        return Step::Retire;
    }
    if let Some(published) = facts.next {
        return match facts.now >= promotion(facts, published) {
            true => Step::Promote,
            false => Step::Rest,
        };
    }
    match facts.asked || facts.now >= renewal(facts) {
        true => Step::Publish,
        false => Step::Rest,
    }
}

/// After the longest certificate's life; in any case in the middle of what was left of the old root.
fn promotion(facts: &Facts, published: OffsetDateTime) -> OffsetDateTime {
    let middle: OffsetDateTime = published + (facts.not_after - published) / 2;
    middle.min(published + facts.longest)
}

fn renewal(facts: &Facts) -> OffsetDateTime {
    facts.not_after - (facts.not_after - facts.not_before) * LEFT
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// A root of 1000 days, with certificates of at most 90; times in days of its life.
    fn at(day: u32, next: Option<u32>, retired: Option<u32>) -> Facts {
        let born = OffsetDateTime::UNIX_EPOCH;
        Facts {
            now: born + DAY * day,
            not_before: born,
            not_after: born + DAY * 1000,
            next: next.map(|day| born + DAY * day),
            retired: retired.map(|day| born + DAY * day),
            asked: false,
            longest: DAY * 90,
        }
    }

    #[test]
    fn each_step_waits_for_what_the_one_before_has_spread() {
        for (facts, expected) in [
            (at(0, None, None), Step::Rest),
            (at(799, None, None), Step::Rest),
            (at(800, None, None), Step::Publish),
            (at(1001, None, None), Step::Publish),
            (at(800, Some(800), None), Step::Rest),
            (at(889, Some(800), None), Step::Rest),
            (at(890, Some(800), None), Step::Promote),
            // Published late: what is left of the old root is halved.
            (at(994, Some(990), None), Step::Rest),
            (at(995, Some(990), None), Step::Promote),
            (at(1, None, Some(2)), Step::Rest),
            (at(2, None, Some(2)), Step::Retire),
        ] {
            assert_eq!(step(&facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn somebody_who_asks_gets_a_new_root_published_but_not_used_early() {
        let asked = |facts: Facts| {
            step(&Facts {
                asked: true,
                ..facts
            })
        };
        assert_eq!(asked(at(10, None, None)), Step::Publish);
        assert_eq!(asked(at(11, Some(10), None)), Step::Rest);
        assert_eq!(asked(at(100, Some(10), None)), Step::Promote);
    }
}
