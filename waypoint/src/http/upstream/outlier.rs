//! Endpoints that fail are passed over for a while (DestinationRule `outlierDetection`). Pure: the clock is an
//! argument.

use std::time::Duration;

use mesh::l7::backend::OutlierDetection;

/// Envoy's `max_ejection_time`, which Istio leaves as it is; a base time above it counts alone.
const MAX_EJECTION: Duration = Duration::from_secs(300);

/// What one request says of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It answered with this status.
    Answered(u16),
    /// It did not answer: no connection, a reset, a time-out.
    Failed,
}

/// What is remembered of an endpoint.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    errors: u32,
    gateway_errors: u32,
    local_failures: u32,
    ejections: u32,
    ejected_until: Option<Duration>,
}

impl Health {
    /// Whether it is passed over.
    pub(super) fn is_ejected(&self, now: Duration) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }

    /// Counts a verdict. True: it should be ejected, if so many may be.
    pub(super) fn judge(&mut self, policy: &OutlierDetection, verdict: Verdict) -> bool {
        let apart = policy.consecutive_local_failures;
        if let (Verdict::Failed, Some(most)) = (verdict, apart) {
            self.local_failures += 1;
            return most > 0 && self.local_failures >= most;
        }
        let (error, gateway) = match verdict {
            Verdict::Failed => (true, true),
            Verdict::Answered(status) => (is_error(policy, status), (502..=504).contains(&status)),
        };
        self.local_failures = 0;
        self.errors = if error { self.errors + 1 } else { 0 };
        self.gateway_errors = if gateway { self.gateway_errors + 1 } else { 0 };
        let reached = |count: u32, most: u32| most > 0 && count >= most;
        reached(self.errors, policy.consecutive_5xx)
            || reached(self.gateway_errors, policy.consecutive_gateway_errors)
    }

    /// Passes it over for the base time, as many times as it was ejected.
    pub(super) fn eject(&mut self, policy: &OutlierDetection, now: Duration) {
        // An endpoint that was well for as long as it was last ejected begins anew.
        let quiet = self
            .ejected_until
            .is_some_and(|until| now > until + ejection(policy, self.ejections));
        self.ejections = if quiet { 1 } else { self.ejections + 1 };
        self.ejected_until = Some(now + ejection(policy, self.ejections));
        self.errors = 0;
        self.gateway_errors = 0;
        self.local_failures = 0;
    }
}

/// How long an endpoint is passed over that is for the so many-th time.
fn ejection(policy: &OutlierDetection, times: u32) -> Duration {
    let base = policy.base_ejection_time;
    base.saturating_mul(times).min(MAX_EJECTION.max(base))
}

fn is_error(policy: &OutlierDetection, status: u16) -> bool {
    match policy.error_codes.as_slice() {
        [] => status >= 500,
        codes => codes.iter().any(|it| it.as_u16() == status),
    }
}

/// Whether another endpoint may be ejected: one always may if there are two, more up to the share.
pub(super) fn may_eject(policy: &OutlierDetection, ejected: usize, all: usize) -> bool {
    let share = all * policy.max_ejection_percent as usize / 100;
    ejected < share.max(1).min(all.saturating_sub(1))
}

/// Whether ejections are ignored because too few endpoints are left.
pub(super) fn panics(policy: &OutlierDetection, ejected: usize, all: usize) -> bool {
    let healthy = (all - ejected) * 100;
    policy.min_health_percent > 0 && healthy < all * policy.min_health_percent as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> OutlierDetection {
        OutlierDetection {
            consecutive_5xx: 3,
            consecutive_gateway_errors: 0,
            consecutive_local_failures: None,
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(30),
            max_ejection_percent: 10,
            min_health_percent: 0,
            error_codes: Vec::new(),
        }
    }

    #[test]
    fn only_errors_in_a_row_eject() {
        let mut health = Health::default();
        let verdicts = [500, 500, 200, 503, 502, 500];
        let judged: Vec<_> = verdicts
            .iter()
            .map(|it| health.judge(&policy(), Verdict::Answered(*it)))
            .collect();
        assert_eq!(judged, [false, false, false, false, false, true]);
    }

    #[test]
    fn each_ejection_is_longer_than_the_last() {
        let mut health = Health::default();
        let secs = Duration::from_secs;
        health.eject(&policy(), secs(0));
        assert!(health.is_ejected(secs(29)) && !health.is_ejected(secs(30)));
        health.eject(&policy(), secs(31));
        assert!(health.is_ejected(secs(90)) && !health.is_ejected(secs(91)));
        health.eject(&policy(), secs(1000));
        assert!(!health.is_ejected(secs(1030)), "it was well for long");
    }

    #[test]
    fn no_ejection_is_longer_than_five_minutes_or_the_base_time() {
        let secs = Duration::from_secs;
        let mut health = Health::default();
        for _ in 0..20 {
            health.eject(&policy(), secs(0));
        }
        assert!(health.is_ejected(secs(299)) && !health.is_ejected(secs(300)));
        let long = OutlierDetection {
            base_ejection_time: secs(3600),
            ..policy()
        };
        let mut health = Health::default();
        health.eject(&long, secs(0));
        health.eject(&long, secs(0));
        assert!(health.is_ejected(secs(3599)) && !health.is_ejected(secs(3600)));
    }

    #[test]
    fn one_of_two_may_be_ejected_and_never_the_last() {
        assert!(may_eject(&policy(), 0, 2));
        assert!(!may_eject(&policy(), 1, 2));
        assert!(!may_eject(&policy(), 0, 1));
        assert!(may_eject(&policy(), 1, 20));
        assert!(!may_eject(&policy(), 2, 20));
    }

    #[test]
    fn failures_without_response_count_apart_where_it_is_asked() {
        let apart = OutlierDetection {
            consecutive_local_failures: Some(2),
            ..policy()
        };
        let mut health = Health::default();
        assert!(!health.judge(&apart, Verdict::Failed));
        assert!(health.judge(&apart, Verdict::Failed));
        let mut health = Health::default();
        assert!(!health.judge(&policy(), Verdict::Failed));
        assert!(!health.judge(&policy(), Verdict::Failed));
        assert!(health.judge(&policy(), Verdict::Failed));
    }
}
