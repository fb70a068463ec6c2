//! Policies that are only looked at.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Matched {
    result: &'static str,
    policy: String,
}

/// Counts AUDIT policies and policies on trial that matched. Bounded by the policies that the control plane tells.
#[derive(Clone, Debug, Default)]
pub(crate) struct PolicyMatches(Family<Matched, Counter>);

impl PolicyMatches {
    pub(in crate::telemetry) fn register(registry: &mut Registry) -> Self {
        let new = Self::default();
        registry.register(
            "leyline_policy_matches",
            "Requests that an AUDIT policy or a policy on trial matched, by what it would have meant",
            new.0.clone(),
        );
        new
    }

    /// `policy`: `namespace/name`.
    pub(crate) fn count(&self, result: &'static str, policy: &str) {
        let policy = policy.to_owned();
        self.0.get_or_create(&Matched { result, policy }).inc();
    }
}
