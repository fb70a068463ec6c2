//! How long to wait before the next connection, and how often to say that there is none.

use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;

const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(15);
/// Between two warnings of one outage.
const REMINDER: Duration = Duration::from_secs(30);

/// 10 ms, doubling up to 15 s (node-tunnel.md 3.3), spread by half to either side so that a restarted control plane
/// is not met by every node at once.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    pub(super) fn reset(&mut self) {
        self.0 = FIRST;
    }

    /// The wait now; the next one is twice as long.
    pub(super) fn next(&mut self) -> Duration {
        let wait = self.0.mul_f64(rand::rng().random_range(0.5..1.5));
        self.0 = (self.0 * 2).min(LONGEST);
        wait.min(LONGEST)
    }
}

/// A time without a control plane: its first failure is told as a warning, and then one every 30 s.
#[derive(Debug, Default)]
pub(super) struct Outage {
    warned: Option<Instant>,
}

impl Outage {
    /// Whether a failure now is to be told as a warning; it then counts as told.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = self.warned.is_none_or(|warned| now >= warned + REMINDER);
        if due {
            self.warned = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_at_once_and_then_every_thirty_seconds() {
        let mut outage = Outage::default();
        let start = Instant::now();
        let told = [0, 1, 29, 30, 45, 60].map(|s| outage.is_due(start + Duration::from_secs(s)));
        assert_eq!(told, [true, false, false, true, false, true]);
    }

    #[test]
    fn waits_double_to_fifteen_seconds_and_never_agree() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] >= FIRST / 2 && waits[0] < FIRST * 2, "{waits:?}");
        assert!(
            waits[12..]
                .iter()
                .all(|w| *w >= LONGEST / 2 && *w <= LONGEST)
        );
        assert!(waits[12..].windows(2).any(|w| w[0] != w[1]), "{waits:?}");
        backoff.reset();
        assert!(backoff.next() < FIRST * 2);
    }
}
