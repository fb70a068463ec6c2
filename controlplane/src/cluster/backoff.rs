//! Pauses between tries.

use std::time::Duration;

use rand::RngExt as _;

/// Doubles from the first pause up to the longest, each drawn from the upper half, so that replicas part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    tries: u32,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            tries: 0,
        }
    }

    /// The next pause.
    pub(crate) fn next(&mut self) -> Duration {
        let whole = self.first.saturating_mul(1 << self.tries.min(20));
        self.tries = self.tries.saturating_add(1);
        let whole = whole.min(self.longest);
        whole.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// It went well: the next pause is short again.
    pub(crate) fn reset(&mut self) {
        self.tries = 0;
    }
}

/// Whether the same request may succeed later without anybody changing anything: no answer, or one that says so.
pub(crate) fn is_passing(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code >= 500 || status.code == 429,
        kube::Error::Service(_) | kube::Error::HyperError(_) | kube::Error::ReadEvents(_) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_again() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(8));
        for whole in [1, 2, 4, 8, 8, 8] {
            let (pause, whole) = (backoff.next(), Duration::from_secs(whole));
            assert!(
                pause >= whole / 2 && pause <= whole,
                "{pause:?} of {whole:?}"
            );
        }
        backoff.reset();
        assert!(backoff.next() <= Duration::from_secs(1));
    }
}
