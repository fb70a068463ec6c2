//! Who may connect to a workload: authorization policies evaluated, with the rule that decided.
//!
//! Fails closed: a policy that the workload names and that is not known yet stops every answer but a refusal.

use std::net::SocketAddr;

use serde::Serialize;

use crate::{
    identity::Identity,
    names::PolicyKey,
    outcome::{MAX_POLICIES, Object, Reason, Refusal},
    policy::{Action, AuthorizationPolicy, Match, Rule, ServiceAccountMatch, StringMatch},
    view::MeshView,
    workload::Workload,
};

#[cfg(test)]
mod tests;

/// What is known of one connection when it is to be authorized.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct AuthorizationFacts {
    /// The identity that the peer has proven by its certificate; none for plaintext.
    pub source_identity: Option<Identity>,
    /// The TCP peer.
    pub source: SocketAddr,
    /// The pod's own address, and the port that its application will be dialled on (not the service's).
    pub destination: SocketAddr,
    /// What a policy that is not known does.
    pub unknown_policies: UnknownPolicies,
}

impl AuthorizationFacts {
    /// Facts under the closed default.
    pub fn new(
        source_identity: Option<Identity>,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Self {
        Self {
            source_identity,
            source,
            destination,
            unknown_policies: UnknownPolicies::Deny,
        }
    }
}

/// What a policy does that the workload names and that is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum UnknownPolicies {
    /// It is waited for, then denies.
    #[default]
    Deny,
    /// It is skipped, as upstream does; for a migration only.
    Skip,
}

/// A rule of a policy, by its position from 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct RuleRef {
    /// The policy.
    pub policy: PolicyKey,
    /// The position of the rule.
    pub rule: usize,
}

/// Whether a connection may be, and what policies on trial say of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What is enforced.
    pub decision: Decision,
    /// What dry-run policies would have done; never enforced.
    pub findings: Vec<Finding>,
}

/// Whether a connection may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Decision {
    /// It may.
    Allow {
        /// The first rule that allows it; none where no ALLOW policy applies.
        by: Option<RuleRef>,
    },
    /// It may not.
    Deny {
        /// Why, and by which policy.
        refusal: Refusal,
        /// The rule of that policy; none where ALLOW policies apply and none matched.
        by: Option<RuleRef>,
    },
    /// Not decidable until this policy is known. The effects layer waits, then denies ([`Decision::unmet`]).
    Need(PolicyKey),
}

impl Decision {
    /// The decision once the wait for what it needs is over; any other is itself.
    pub fn unmet(self) -> Self {
        match self {
            Self::Need(key) => Self::Deny {
                refusal: Refusal::by(Reason::PolicyUnknown, Object::Policy(key)),
                by: None,
            },
            decided => decided,
        }
    }

    /// Whether the connection may be.
    pub fn is_allow(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }
}

/// What a dry-run policy would have done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Finding {
    /// A DENY rule matched.
    WouldDeny(RuleRef),
    /// An ALLOW rule matched.
    WouldAllow(RuleRef),
    /// The only ALLOW policies are on trial, and none matched.
    WouldNotAllow,
}

/// Decides whether a connection to `workload` may be (node-tunnel 5.1 to 5.3).
///
/// Pure: same view, workload and facts, same verdict. A DENY that matches beats every ALLOW, and is given even while
/// another policy is still unknown.
pub fn authorize(view: &MeshView, workload: &Workload, facts: &AuthorizationFacts) -> Verdict {
    let applicable = view.policies_for(workload);
    let policies = Policies(applicable.policies.iter().map(|it| &***it).collect());
    let unknown = applicable
        .unknown
        .filter(|_| facts.unknown_policies == UnknownPolicies::Deny);
    Verdict {
        decision: decide(&policies, unknown, facts),
        findings: findings(&policies, facts),
    }
}

/// The same, by the policies whose selectors pick the workload alone: a waypoint is not meant by one that is for every pod
/// of its namespace or of the mesh, which is for the pods behind it.
pub fn authorize_selected(
    view: &MeshView,
    workload: &Workload,
    facts: &AuthorizationFacts,
) -> Decision {
    let named = &workload.authorization_policies;
    if named.is_empty() {
        return Decision::Allow { by: None };
    }
    let applicable = view.policies_for(workload);
    let selected = applicable.policies.iter().map(|it| &***it);
    let policies = Policies(selected.filter(|it| named.contains(&it.key)).collect());
    decide(&policies, applicable.unknown, facts)
}

fn decide(
    policies: &Policies<'_>,
    unknown: Option<&PolicyKey>,
    facts: &AuthorizationFacts,
) -> Decision {
    if let Some(by) = policies.first_match(Action::Deny, false, facts) {
        let object = Object::Policy(by.policy.clone());
        return Decision::Deny {
            refusal: Refusal::by(Reason::PolicyDenied, object),
            by: Some(by),
        };
    }
    if let Some(key) = unknown {
        return Decision::Need(key.clone());
    }
    let by = policies.first_match(Action::Allow, false, facts);
    if by.is_some() || !policies.any(Action::Allow, false) {
        return Decision::Allow { by };
    }
    let object = Object::Policies(policies.allows());
    Decision::Deny {
        refusal: Refusal::by(Reason::PolicyNotAllowed, object),
        by: None,
    }
}

fn findings(policies: &Policies<'_>, facts: &AuthorizationFacts) -> Vec<Finding> {
    let denies = policies.matches(Action::Deny, true, facts);
    let allows = policies.matches(Action::Allow, true, facts);
    let mut findings: Vec<_> = denies.map(Finding::WouldDeny).collect();
    let denied = findings.len();
    findings.extend(allows.map(Finding::WouldAllow));
    let on_trial = policies.any(Action::Allow, true) && !policies.any(Action::Allow, false);
    if on_trial && findings.len() == denied {
        findings.push(Finding::WouldNotAllow);
    }
    findings
}

struct Policies<'a>(Vec<&'a AuthorizationPolicy>);

impl<'a> Policies<'a> {
    fn of(&self, action: Action, dry_run: bool) -> impl Iterator<Item = &'a AuthorizationPolicy> {
        let policies = self.0.iter().copied();
        policies.filter(move |it| it.action == action && it.dry_run == dry_run)
    }

    fn any(&self, action: Action, dry_run: bool) -> bool {
        self.of(action, dry_run).next().is_some()
    }

    /// The enforced ALLOW policies, as a refusal names them.
    fn allows(&self) -> Vec<PolicyKey> {
        let allows = self.of(Action::Allow, false);
        let mut keys: Vec<_> = allows.map(|it| it.key.clone()).collect();
        keys.sort();
        keys.truncate(MAX_POLICIES);
        keys
    }

    fn matches(
        &self,
        action: Action,
        dry_run: bool,
        facts: &AuthorizationFacts,
    ) -> impl Iterator<Item = RuleRef> {
        self.of(action, dry_run)
            .filter_map(|it| matching_rule(it, facts))
    }

    fn first_match(
        &self,
        action: Action,
        dry_run: bool,
        facts: &AuthorizationFacts,
    ) -> Option<RuleRef> {
        self.matches(action, dry_run, facts).next()
    }
}

/// The first rule of the policy that matches, whatever the policy's action.
pub fn matching_rule(policy: &AuthorizationPolicy, facts: &AuthorizationFacts) -> Option<RuleRef> {
    let rule = policy.rules.iter().position(|it| rule_matches(it, facts))?;
    Some(RuleRef {
        policy: policy.key.clone(),
        rule,
    })
}

fn rule_matches(rule: &Rule, facts: &AuthorizationFacts) -> bool {
    rule.clauses.iter().all(|clause| {
        let matches = &clause.matches;
        matches.is_empty() || matches.iter().any(|it| one_matches(it, facts))
    })
}

fn one_matches(one: &Match, facts: &AuthorizationFacts) -> bool {
    if *one == Match::default() {
        return false;
    }
    let identity = facts.source_identity.as_ref();
    let principal = identity.map(Identity::principal);
    let namespace = |it: &StringMatch| identity.is_some_and(|id| text_matches(it, &id.namespace));
    let principal = |it: &StringMatch| principal.as_deref().is_some_and(|id| text_matches(it, id));
    let account = |it: &ServiceAccountMatch| identity.is_some_and(|id| account_matches(it, id));
    let source = facts.source.ip().to_canonical();
    let destination = facts.destination.ip().to_canonical();
    let port = facts.destination.port();
    holds(&one.namespaces, &one.not_namespaces, namespace)
        && holds(&one.principals, &one.not_principals, principal)
        && holds(&one.service_accounts, &one.not_service_accounts, account)
        && holds(&one.source_ips, &one.not_source_ips, |it| {
            it.contains(&source)
        })
        && holds(&one.destination_ips, &one.not_destination_ips, |it| {
            it.contains(&destination)
        })
        && holds(&one.destination_ports, &one.not_destination_ports, |it| {
            *it == port
        })
}

/// An empty positive list holds; a negative one holds if none of its values matches.
fn holds<T>(positive: &[T], negative: &[T], matches: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&matches)) && !negative.iter().any(&matches)
}

fn text_matches(pattern: &StringMatch, text: &str) -> bool {
    match pattern {
        StringMatch::Exact(exact) => text == &**exact,
        StringMatch::Prefix(prefix) => text.starts_with(&**prefix),
        StringMatch::Suffix(suffix) => text.ends_with(&**suffix),
        StringMatch::Presence => !text.is_empty(),
    }
}

fn account_matches(account: &ServiceAccountMatch, identity: &Identity) -> bool {
    account.namespace == identity.namespace && account.service_account == identity.service_account
}
