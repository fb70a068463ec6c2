//! How many of a lane's connections are brief, by what has lately ended there, and whether the lane has time for them.

use std::time::{Duration, Instant};

/// A connection that lives no longer is brief. What ended before one such time and the next says nothing of now.
const WINDOW: Duration = Duration::from_millis(100);
/// Brief connections that are left on one lane, however idle it is. More than these are spread as others are: one takes about
/// 0.1 ms of its thread, so that as many that come at once make the last one wait for some 3 ms.
const MOST: usize = 32;
/// Hundredths of a brief connection at a time, below which they say nothing of what comes next.
const CROWD: u128 = 50;

/// Hundredths of a lane's time, above which fewer brief connections are left to it than there are, and at which none are:
/// where lanes are idle, their moving costs less than their waiting. A pod with 16 clients that connect as fast as they can
/// uses some 60 of a lane where two cores are shared with clients and servers; on more cores it would use all of one.
const BUSY: std::ops::RangeInclusive<u32> = 70..=95;

/// By how many hundredths a lane is less busy after a window than before, at most. One that others have relieved would be given
/// everything back at once, and they would relieve it again.
const EASE: u32 = 5;

/// The lives of brief connections that ended in this window of time, and in the one before.
#[derive(Debug)]
pub(super) struct Brief {
    begun: Instant,
    lives: Duration,
    before: Duration,
    work: Work,
}

/// How much of its time a lane's thread works, as far back as the last look but one.
#[derive(Debug, Default)]
struct Work {
    looked: Option<(Instant, Duration)>,
    hundredths: u32,
}

impl Work {
    /// Looks again after a window of time. `used`: what the thread has used of its processor since it began, if that is known.
    /// A time in which nothing brief has ended is none to judge by: a lane that others have relieved would seem idle.
    fn look(&mut self, now: Instant, used: impl FnOnce() -> Option<Duration>) {
        let since = |(then, _): &(Instant, Duration)| now.saturating_duration_since(*then);
        if self.looked.as_ref().is_some_and(|it| since(it) < WINDOW) {
            return;
        }
        let Some(used) = used() else { return };
        let before = self.looked.replace((now, used));
        if let Some(before) = before.filter(|it| since(it) <= 2 * WINDOW) {
            let worked = used.saturating_sub(before.1).as_nanos() * 100;
            let share = worked / since(&before).as_nanos();
            let share = u32::try_from(share).unwrap_or(100).min(100);
            self.hundredths = share.max(self.hundredths.saturating_sub(EASE));
        }
    }
}

/// How many of so many brief connections a lane has time for that works such a share of its time.
fn room(brief: usize, hundredths: u32) -> usize {
    let (from, to) = BUSY.into_inner();
    let left = to.saturating_sub(hundredths).min(to - from);
    let parts = |it: u32| usize::try_from(it).unwrap_or(usize::MAX);
    brief * parts(left) / parts(to - from)
}

impl Brief {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            begun: now,
            lives: Duration::ZERO,
            before: Duration::ZERO,
            work: Work::default(),
        }
    }

    /// A connection has ended after such a life. `used`: what the lane's thread has used of its processor, if the caller can
    /// tell; asked for once in a window.
    pub(super) fn ended(
        &mut self,
        life: Duration,
        now: Instant,
        used: impl FnOnce() -> Option<Duration>,
    ) {
        if life < WINDOW {
            self.turn(now);
            self.lives += life;
            self.work.look(now, used);
        }
    }

    /// How many that are open now are to be left where they are accepted.
    pub(super) fn staying_here(&mut self, now: Instant) -> usize {
        room(self.open(now).min(MOST), self.work.hundredths)
    }

    /// How many that are open now may be brief. On average there are as many at a time as their lives together are longer
    /// than the time in which they ended (Little's law); they come by chance, so now and then there are more, by up to three
    /// times the root of that.
    fn open(&mut self, now: Instant) -> usize {
        self.turn(now);
        let lives = self.lives.max(self.before);
        let hundredths = lives.as_nanos() * 100 / WINDOW.as_nanos();
        if hundredths < CROWD {
            return 0;
        }
        let more = 3 * (hundredths * 100).isqrt();
        let most = (hundredths + more).div_ceil(100);
        usize::try_from(most).unwrap_or(usize::MAX)
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
                brief.ended(life, now, || None);
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
        assert_eq!(brief.staying_here(now), MOST);
        assert_eq!(brief.open(now + 2 * WINDOW), 0);
        let (mut brief, now) = churn(1, WINDOW / 10, 4);
        assert_eq!(brief.open(now), 0);
    }

    #[test]
    fn a_crowd_of_brief_ones_is_spread_beyond_a_bound() {
        let (mut brief, now) = churn(1_000, WINDOW / 100, 1_000);
        assert_eq!(brief.staying_here(now), MOST);
    }

    #[test]
    fn a_busy_lane_keeps_fewer_and_one_without_time_none() {
        for (hundredths, kept) in [
            (0, 28),
            (70, 28),
            (75, 22),
            (90, 5),
            (94, 1),
            (95, 0),
            (100, 0),
        ] {
            assert_eq!(room(28, hundredths), kept, "{hundredths}");
        }
    }

    #[test]
    fn how_busy_a_lane_is_is_looked_at_once_in_a_window() {
        let start = Instant::now();
        let mut work = Work::default();
        let mut look = |at, used| {
            let mut asked = false;
            work.look(start + at, || {
                asked = true;
                used
            });
            (asked, work.hundredths)
        };
        let used = |percent| Some(WINDOW * percent / 100);
        assert_eq!(
            look(Duration::ZERO, used(900)),
            (true, 0),
            "since when is not known"
        );
        assert_eq!(look(WINDOW / 2, used(950)), (false, 0));
        assert_eq!(look(WINDOW, used(960)), (true, 60));
        assert_eq!(
            look(2 * WINDOW, None),
            (true, 60),
            "somebody who cannot tell"
        );
        assert_eq!(look(3 * WINDOW, used(1_160)), (true, 100));
        assert_eq!(look(4 * WINDOW, used(1_170)), (true, 95), "relieved");
        assert_eq!(look(9 * WINDOW, used(1_600)), (true, 95), "too long ago");
        assert_eq!(look(10 * WINDOW, used(0)), (true, 90), "another thread's");
    }
}
