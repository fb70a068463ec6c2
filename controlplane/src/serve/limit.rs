//! How fast new streams may begin: after a restart, every proxy of the mesh comes back at once.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// A stream that would have to wait longer is refused, and its proxy backs off.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Admits `rate` per second, `rate` of them at once after a quiet time; later ones wait their turn.
#[derive(Debug)]
pub(super) struct Limit {
    interval: Duration,
    burst: Duration,
    next: Mutex<Option<Instant>>,
}

/// There are too many before this one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overloaded;

impl Limit {
    pub(super) fn per_second(rate: u32) -> Self {
        Self {
            interval: Duration::from_secs(1) / rate.max(1),
            burst: Duration::from_secs(1),
            next: Mutex::new(None),
        }
    }

    /// Returns when it is this one's turn. Cancelling leaves its place unused.
    pub(super) async fn admit(&self) -> Result<(), Overloaded> {
        let turn = self.take(Instant::now())?;
        sleep_until(turn).await;
        Ok(())
    }

    fn take(&self, now: Instant) -> Result<Instant, Overloaded> {
        let mut next = self.next.lock();
        let earliest = now.checked_sub(self.burst).unwrap_or(now);
        let turn = next.map_or(earliest, |next| next.max(earliest));
        if turn > now + LONGEST_WAIT {
            return Err(Overloaded);
        }
        *next = Some(turn + self.interval);
        Ok(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_spread_then_refused() {
        let limit = Limit::per_second(10);
        let now = Instant::now() + Duration::from_secs(100);
        let turns: Vec<_> = (0..200).map(|_| limit.take(now)).collect();
        let at_once = turns
            .iter()
            .filter(|turn| turn.as_ref().is_ok_and(|t| *t <= now));
        assert_eq!(at_once.count(), 11);
        assert_eq!(turns[15], Ok(now + Duration::from_millis(500)));
        assert_eq!(turns[199], Err(Overloaded));
        assert!(limit.take(now + Duration::from_secs(60)).is_ok());
    }
}
