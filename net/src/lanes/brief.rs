//! How many of a lane's connections are brief, by what has lately ended there.

use std::time::{Duration, Instant};

/// A connection that lives no longer is brief. What ended before one such time and the next says nothing of now.
const WINDOW: Duration = Duration::from_millis(100);
/// Brief connections that are left on one lane. More than these are spread as others are: one takes about 0.1 ms of its
/// thread, so that as many make the next one wait for some 3 ms.
const MOST: usize = 32;
/// Hundredths of a brief connection at a time, below which they say nothing of what comes next.
const CROWD: u128 = 50;

/// The lives of brief connections that ended in this window of time, and in the one before.
#[derive(Debug)]
pub(super) struct Brief {
    begun: Instant,
    lives: Duration,
    before: Duration,
}

impl Brief {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            begun: now,
            lives: Duration::ZERO,
            before: Duration::ZERO,
        }
    }

    /// A connection has ended after such a life.
    pub(super) fn ended(&mut self, life: Duration, now: Instant) {
        if life < WINDOW {
            self.turn(now);
            self.lives += life;
        }
    }

    /// How many that are open now may be brief. On average there are as many at a time as their lives together are longer
    /// than the time in which they ended (Little's law); they come by chance, so now and then there are more, by up to three
    /// times the root of that.
    pub(super) fn open(&mut self, now: Instant) -> usize {
        self.turn(now);
        let lives = self.lives.max(self.before);
        let hundredths = lives.as_nanos() * 100 / WINDOW.as_nanos();
        if hundredths < CROWD {
            return 0;
        }
        let more = 3 * (hundredths * 100).isqrt();
        let most = (hundredths + more).div_ceil(100);
        usize::try_from(most).unwrap_or(MOST).min(MOST)
    }

    /// Begins the next window where this one is over.
    fn turn(&mut self, now: Instant) {
        let windows = now.saturating_duration_since(self.begun).as_nanos() / WINDOW.as_nanos();
        if windows == 0 {
            return;
        }
        let lives = std::mem::take(&mut self.lives);
        self.before = if windows == 1 { lives } else { Duration::ZERO };
        self.begun = now;
    }

    /// As if they had come and gone one at a time until now.
    #[cfg(test)]
    pub(super) fn remember_one_at_a_time(&mut self, now: Instant) {
        self.begun = now;
        self.before = WINDOW;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One connection after the other in so many places at a time, for a while; what is told then, and when that is.
    fn churn(at_a_time: u32, life: Duration, times: u32) -> (Brief, Instant) {
        let mut now = Instant::now();
        let mut brief = Brief::new(now);
        for _ in 0..times {
            now += life;
            for _ in 0..at_a_time {
                brief.ended(life, now);
            }
        }
        (brief, now)
    }

    #[test]
    fn as_many_are_brief_as_may_be_open_at_a_time_whatever_their_life() {
        for life in [1, 4, 20].map(Duration::from_millis) {
            for (at_a_time, most) in [(1, 4), (4, 10), (16, 28)] {
                let (mut brief, now) = churn(at_a_time, life, 2_000);
                assert_eq!(brief.open(now), most, "{at_a_time} of {life:?}");
            }
        }
    }

    #[test]
    fn those_that_live_long_or_ended_long_ago_or_are_few_say_nothing() {
        let (mut brief, now) = churn(16, WINDOW, 10);
        assert_eq!(brief.open(now), 0);
        let (mut brief, now) = churn(32, WINDOW / 100, 1_000);
        assert_eq!(brief.open(now), MOST);
        assert_eq!(brief.open(now + 2 * WINDOW), 0);
        let (mut brief, now) = churn(1, WINDOW / 10, 4);
        assert_eq!(brief.open(now), 0);
    }

    #[test]
    fn a_crowd_of_brief_ones_is_spread_beyond_a_bound() {
        let (mut brief, now) = churn(1_000, WINDOW / 100, 1_000);
        assert_eq!(brief.open(now), MOST);
    }
}
