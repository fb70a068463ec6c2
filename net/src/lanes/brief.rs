//! How many of a lane's connections are brief, by what has lately ended there.

use std::time::{Duration, Instant};

/// A connection that lives no longer is brief. What ended before one such time and the next says nothing of now.
const WINDOW: Duration = Duration::from_millis(100);
/// Brief connections that are left on one lane. More than these are spread as others are: they may be more than one thread
/// can serve.
const MOST: usize = 16;

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

    /// How many that are open now are brief. On average there are as many at a time as their lives together are longer than
    /// the time in which they ended (Little's law), and often twice as many.
    pub(super) fn open(&mut self, now: Instant) -> usize {
        self.turn(now);
        let average = self.lives.max(self.before).as_nanos() * 2 / WINDOW.as_nanos();
        usize::try_from(average).unwrap_or(MOST).min(MOST)
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

    /// As if so many at a time had come and gone until now.
    #[cfg(test)]
    pub(super) fn remember(&mut self, open: u32, now: Instant) {
        self.begun = now;
        self.before = WINDOW * open / 2;
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
    fn as_many_are_brief_as_were_open_at_a_time_whatever_their_life() {
        for life in [1, 4, 20].map(Duration::from_millis) {
            let (mut brief, now) = churn(6, life, 2_000);
            let told = brief.open(now);
            assert!((10..=12).contains(&told), "{told} of twice 6, {life:?}");
        }
    }

    #[test]
    fn nothing_is_told_of_those_that_live_long_or_ended_long_ago() {
        let (mut brief, now) = churn(16, WINDOW, 10);
        assert_eq!(brief.open(now), 0);
        let (mut brief, now) = churn(16, WINDOW / 100, 1_000);
        assert_eq!(brief.open(now), MOST);
        assert_eq!(brief.open(now + 2 * WINDOW), 0);
    }

    #[test]
    fn a_crowd_of_brief_ones_is_spread_beyond_a_bound() {
        let (mut brief, now) = churn(1_000, WINDOW / 100, 1_000);
        assert_eq!(brief.open(now), MOST);
    }
}
