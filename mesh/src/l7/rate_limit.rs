//! A token bucket: how many requests a rule lets through.

use std::time::Duration;

use super::route::RateLimit;

/// The state of one bucket. Full at first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// None: nothing was taken yet.
    state: Option<State>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    tokens: u32,
    /// The last fill.
    filled: Duration,
}

/// What a request got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Whether it may pass.
    pub allowed: bool,
    /// What is left.
    pub remaining: u32,
    /// Until the next fill.
    pub reset: Duration,
}

impl Bucket {
    /// Takes one token, at a time that never goes back.
    pub fn take(&mut self, limit: &RateLimit, now: Duration) -> Taken {
        let interval = limit.fill_interval.max(Duration::from_millis(1));
        let state = self.state.get_or_insert(State {
            tokens: limit.max_tokens,
            filled: now,
        });
        let fills = now.saturating_sub(state.filled).as_nanos() / interval.as_nanos();
        let fills = u32::try_from(fills).unwrap_or(u32::MAX);
        if fills > 0 {
            let tokens = limit.tokens_per_fill.saturating_mul(fills);
            state.tokens = state.tokens.saturating_add(tokens);
            // Far behind: the rhythm of fills begins anew.
            let step = interval.checked_mul(fills);
            state.filled = step.map_or(now, |step| state.filled.saturating_add(step));
        }
        state.tokens = state.tokens.min(limit.max_tokens);
        let left = state.tokens.checked_sub(1);
        state.tokens = left.unwrap_or(0);
        Taken {
            allowed: left.is_some(),
            remaining: state.tokens,
            reset: (state.filled + interval).saturating_sub(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: RateLimit = RateLimit {
        max_tokens: 3,
        tokens_per_fill: 2,
        fill_interval: Duration::from_secs(10),
    };

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_bucket_lets_through_what_it_holds_and_is_filled_in_steps() {
        let mut bucket = Bucket::default();
        let mut take = |at| {
            let taken = bucket.take(&LIMIT, seconds(at));
            (taken.allowed, taken.remaining, taken.reset.as_secs())
        };
        assert_eq!(take(100), (true, 2, 10));
        assert_eq!(take(101), (true, 1, 9));
        assert_eq!(take(105), (true, 0, 5));
        assert_eq!(take(109), (false, 0, 1));
        assert_eq!(take(110), (true, 1, 10));
        assert_eq!(take(111), (true, 0, 9));
        assert_eq!(take(119), (false, 0, 1));
        assert_eq!(take(100_000), (true, 2, 10), "never more than it holds");
    }

    #[test]
    fn a_bucket_of_nothing_lets_nothing_through() {
        let none = RateLimit {
            max_tokens: 0,
            ..LIMIT
        };
        let mut bucket = Bucket::default();
        assert!(!bucket.take(&none, seconds(1)).allowed);
        assert!(!bucket.take(&none, seconds(1_000)).allowed);
    }

    #[test]
    fn over_a_long_time_the_share_is_the_limits() {
        let mut bucket = Bucket::default();
        let passed =
            (0..100_000).filter(|at| bucket.take(&LIMIT, Duration::from_millis(at * 10)).allowed);
        // 1000 s: 2 per 10 s, and the first bucketful.
        assert_eq!(passed.count(), 201);
    }
}
