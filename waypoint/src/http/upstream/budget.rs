//! How many retries a cluster may cost: a share of its requests over a sliding window, so that an outage is not
//! multiplied.

use std::time::Duration;

use mesh::l7::backend::RetryBudget;

/// Parts of the window; the oldest is forgotten as a whole.
const SLOTS: usize = 10;

/// What holds where no policy says otherwise: 20% of the requests of ten seconds, at least 3 (waypoint 4.7).
pub(super) const DEFAULT: RetryBudget = RetryBudget {
    percent: 20,
    interval: Duration::from_secs(10),
    min_retries: 3,
};

/// Requests and retries of the last window. The clock is an argument, in any unit that only grows.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget {
    slots: [(u64, u64); SLOTS],
    /// Index of the current slot since the beginning of time.
    now: u64,
}

impl Budget {
    /// Counts a request.
    pub(super) fn request(&mut self, policy: &RetryBudget, now: Duration) {
        self.advance(policy, now).0 += 1;
    }

    /// Counts a retry if one is left.
    pub(super) fn retry(&mut self, policy: &RetryBudget, now: Duration) -> bool {
        self.advance(policy, now);
        let (requests, retries) = self
            .slots
            .iter()
            .fold((0, 0), |sum, slot| (sum.0 + slot.0, sum.1 + slot.1));
        let share = requests * u64::from(policy.percent) / 100;
        let allowed = retries < share.max(u64::from(policy.min_retries));
        if allowed {
            self.advance(policy, now).1 += 1;
        }
        allowed
    }

    fn advance(&mut self, policy: &RetryBudget, now: Duration) -> &mut (u64, u64) {
        let slot = policy.interval.as_millis().max(SLOTS as u128) / SLOTS as u128;
        let index = u64::try_from(now.as_millis() / slot).unwrap_or(u64::MAX);
        let passed = index.saturating_sub(self.now);
        for step in 1..=passed.min(SLOTS as u64) {
            self.slots[at(self.now + step)] = (0, 0);
        }
        self.now = self.now.max(index);
        &mut self.slots[at(self.now)]
    }
}

fn at(index: u64) -> usize {
    usize::try_from(index % SLOTS as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_outage_is_not_multiplied_by_more_than_the_share() {
        let mut budget = Budget::default();
        let mut retries = 0_u32;
        for request in 0..10_000_u64 {
            let now = Duration::from_millis(request);
            budget.request(&DEFAULT, now);
            for _ in 0..2 {
                retries += u32::from(budget.retry(&DEFAULT, now));
            }
        }
        assert!((1_900..=2_003).contains(&retries), "{retries}");
    }

    #[test]
    fn a_quiet_cluster_has_its_few() {
        let mut budget = Budget::default();
        budget.request(&DEFAULT, Duration::ZERO);
        let granted = (0..10)
            .filter(|_| budget.retry(&DEFAULT, Duration::ZERO))
            .count();
        assert_eq!(granted, 3);
        let later = Duration::from_secs(11);
        assert!(budget.retry(&DEFAULT, later), "the window has passed");
    }
}
