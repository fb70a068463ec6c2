//! How long to wait before the next connection.

use std::time::Duration;

use rand::RngExt;

const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(15);

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

#[cfg(test)]
mod tests {
    use super::*;

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
