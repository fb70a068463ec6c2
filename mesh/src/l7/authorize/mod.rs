//! Whether a request, or a connection that is not HTTP, may pass: policies on requests evaluated, with the rule that
//! decided.
//!
//! Order: CUSTOM ([`custom`]) before authentication, then DENY, then ALLOW; AUDIT and dry-run policies change nothing.
//! On connections the parts of a rule that only HTTP has are on the safe side: an ALLOW rule with one never matches, a
//! DENY or CUSTOM rule is matched as if it were not there.

use std::borrow::Cow;

use super::{
    authorization::{PolicyAction, RequestPolicy},
    request::{ConnectionFacts, RequestFacts},
    view::View,
};
use crate::{
    authorize::{Finding, RuleRef},
    identity::TrustDomain,
    names::Str,
};

mod rule;
#[cfg(test)]
mod tests;
mod value;

use rule::{Facts, Peer, Side};

/// Whether a request may pass, and what is told beside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What is enforced.
    pub decision: Decision,
    /// Rules of AUDIT policies that matched.
    pub audits: Vec<RuleRef>,
    /// What dry-run policies would have done; never enforced.
    pub findings: Vec<Finding>,
}

/// Whether a request may pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may.
    Allow {
        /// The first rule that allows it; none where no ALLOW policy applies.
        by: Option<RuleRef>,
    },
    /// It may not: 403, gRPC PERMISSION_DENIED, a connection is closed.
    Deny {
        /// The DENY rule that matched; none where ALLOW policies apply and none matched.
        by: Option<RuleRef>,
    },
}

impl Verdict {
    /// Whether the request may pass.
    pub fn is_allow(&self) -> bool {
        matches!(self.decision, Decision::Allow { .. })
    }

    /// Envoy's response code details of a refusal.
    pub fn details(&self) -> Option<String> {
        match &self.decision {
            Decision::Allow { .. } => None,
            Decision::Deny { by } => Some(denied(by.as_ref())),
        }
    }
}

/// `rbac_access_denied_matched_policy[...]` with the rule, or `none`.
pub fn denied(by: Option<&RuleRef>) -> String {
    let matched = by.map_or(Cow::Borrowed("none"), |it| {
        let policy = &it.policy;
        let (namespace, name) = (&policy.namespace, &policy.name);
        format!("ns[{namespace}]-policy[{name}]-rule[{}]", it.rule).into()
    });
    format!("rbac_access_denied_matched_policy[{matched}]")
}

/// A question to an external authorizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Name of the authorizer.
    pub provider: Str,
    /// The first rule that asks for it.
    pub by: RuleRef,
    /// Whether the settings know it; if not, the request is refused.
    pub known: bool,
}

/// Decides on a request by its DENY and ALLOW policies. Pure: same view and facts, same verdict.
///
/// `own` is the waypoint's trust domain.
pub fn request(view: &View, facts: &RequestFacts<'_>, own: &TrustDomain) -> Verdict {
    verdict(view, &facts.connection, Some(facts), own)
}

/// Decides on a connection that is not HTTP.
pub fn connection(view: &View, facts: &ConnectionFacts<'_>, own: &TrustDomain) -> Verdict {
    verdict(view, facts, None, own)
}

/// The external authorizers that a request is to be asked of, each once; all must approve.
pub fn custom(view: &View, facts: &RequestFacts<'_>, own: &TrustDomain) -> Vec<Question> {
    questions(view, &facts.connection, Some(facts), own)
}

/// The external authorizers that a connection is to be asked of. One that cannot be asked refuses.
pub fn custom_connection(
    view: &View,
    facts: &ConnectionFacts<'_>,
    own: &TrustDomain,
) -> Vec<Question> {
    questions(view, facts, None, own)
}

fn questions(
    view: &View,
    connection: &ConnectionFacts<'_>,
    request: Option<&RequestFacts<'_>>,
    own: &TrustDomain,
) -> Vec<Question> {
    let policies = Policies::new(view, connection, request, own);
    let mut questions: Vec<Question> = Vec::new();
    for policy in policies.all.iter().filter(|it| !it.dry_run) {
        let PolicyAction::Custom(provider) = &policy.action else {
            continue;
        };
        if questions.iter().any(|it| it.provider == *provider) {
            continue;
        }
        let matched = policies.matched(policy).map(|by| Question {
            provider: provider.clone(),
            by,
            known: view
                .config()
                .is_some_and(|it| it.authorizers.contains_key(provider)),
        });
        questions.extend(matched);
    }
    questions
}

fn verdict(
    view: &View,
    connection: &ConnectionFacts<'_>,
    request: Option<&RequestFacts<'_>>,
    own: &TrustDomain,
) -> Verdict {
    let policies = Policies::new(view, connection, request, own);
    let audits = policies.matches(&PolicyAction::Audit, false);
    Verdict {
        decision: policies.decide(),
        audits: audits.collect(),
        findings: policies.findings(),
    }
}

/// The policies that apply, and what they are asked about.
struct Policies<'a> {
    all: Vec<&'a RequestPolicy>,
    facts: Facts<'a>,
}

impl<'a> Policies<'a> {
    fn new(
        view: &'a View,
        connection: &'a ConnectionFacts<'a>,
        request: Option<&'a RequestFacts<'a>>,
        own: &'a TrustDomain,
    ) -> Self {
        let mut all: Vec<&RequestPolicy> = Vec::new();
        for policy in view.policies_for(connection.service) {
            // One that names the waypoint and the service is asked once.
            if !all.iter().any(|it| it.key == policy.key) {
                all.push(policy);
            }
        }
        let aliases = view.config().map(|it| it.trust_domain_aliases.as_slice());
        let peer = match all.is_empty() {
            true => Peer::default(),
            false => Peer::new(connection.identity, own, aliases.unwrap_or_default()),
        };
        Self {
            all,
            facts: Facts {
                connection,
                request,
                peer,
            },
        }
    }

    fn of(&self, action: &PolicyAction, dry_run: bool) -> impl Iterator<Item = &'a RequestPolicy> {
        self.all
            .iter()
            .copied()
            .filter(move |it| it.action == *action && it.dry_run == dry_run)
    }

    fn matches(&self, action: &PolicyAction, dry_run: bool) -> impl Iterator<Item = RuleRef> {
        self.of(action, dry_run)
            .filter_map(|policy| self.matched(policy))
    }

    /// The first rule of a policy that matches.
    fn matched(&self, policy: &RequestPolicy) -> Option<RuleRef> {
        let side = match policy.action {
            PolicyAction::Allow | PolicyAction::Audit => Side::Narrow,
            PolicyAction::Deny | PolicyAction::Custom(_) => Side::Wide,
        };
        let rule = policy
            .rules
            .iter()
            .position(|it| rule::matches(it, &self.facts, side))?;
        Some(RuleRef {
            policy: policy.key.clone(),
            rule,
        })
    }

    fn decide(&self) -> Decision {
        if let Some(by) = self.matches(&PolicyAction::Deny, false).next() {
            return Decision::Deny { by: Some(by) };
        }
        let by = self.matches(&PolicyAction::Allow, false).next();
        if by.is_some() || self.of(&PolicyAction::Allow, false).next().is_none() {
            return Decision::Allow { by };
        }
        Decision::Deny { by: None }
    }

    fn findings(&self) -> Vec<Finding> {
        let denies = self.matches(&PolicyAction::Deny, true);
        let allows = self.matches(&PolicyAction::Allow, true);
        let mut findings: Vec<_> = denies.map(Finding::WouldDeny).collect();
        let denied = findings.len();
        findings.extend(allows.map(Finding::WouldAllow));
        let on_trial = self.of(&PolicyAction::Allow, true).next().is_some();
        let enforced = self.of(&PolicyAction::Allow, false).next().is_some();
        if on_trial && !enforced && findings.len() == denied {
            findings.push(Finding::WouldNotAllow);
        }
        findings
    }
}
