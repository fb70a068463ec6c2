//! Asking policies, at the beginning of a connection and again whenever what they say may have changed.

use std::{fmt, sync::Arc, time::Duration};

use mesh::{
    authorize::{self as policy, AuthorizationFacts, Decision, Finding, RuleRef},
    names::WorkloadUid,
    outcome::{Need, Outcome, Refusal},
    view::MeshView,
    workload::Workload,
};
use net::{drain, mesh_state::AuthorizationWatch};
use tokio::time::{Instant, sleep_until};

use crate::{
    identities::Held,
    pod::{Pod, WAIT},
};

/// Policies forbid a connection.
#[derive(Clone, Debug)]
pub(crate) struct Denied {
    pub(crate) refusal: Refusal,
    /// The rule that matched, where one did.
    by: Option<RuleRef>,
}

impl Denied {
    fn new(refusal: Refusal, by: Option<RuleRef>) -> Self {
        Self { refusal, by }
    }

    /// Forbidden for want of something that a decision needed.
    pub(crate) fn unmet(refusal: Refusal) -> Self {
        Self::new(refusal, None)
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            Some(by) => write!(f, "{} (rule {})", self.refusal, by.rule),
            None => self.refusal.fmt(f),
        }
    }
}

/// Asks whether a connection to the pod may be; by which rule, where one says so. A policy that is not known is waited for, then denies.
///
/// The connection must be registered already: a change of policy from here on finds it there.
pub(crate) async fn authorize(
    pod: &Pod,
    facts: &AuthorizationFacts,
) -> Result<Option<RuleRef>, Denied> {
    let deadline = Instant::now() + WAIT;
    let node = &pod.node;
    let decide = |view: &Arc<MeshView>| {
        node.record(view, &pod.binding).and_then(|workload| {
            match decide(pod, view, &workload, facts) {
                Decision::Allow { by } => Outcome::Go(Ok(by)),
                Decision::Need(key) => Outcome::Need(Need::Policy(key)),
                Decision::Deny { refusal, by } => Outcome::Go(Err(Denied::new(refusal, by))),
            }
        })
    };
    match node.state.decide(deadline, decide).await {
        Ok((decided, _)) => decided,
        Err(refusal) => Err(Denied::unmet(refusal)),
    }
}

fn decide(pod: &Pod, view: &MeshView, workload: &Workload, facts: &AuthorizationFacts) -> Decision {
    let verdict = policy::authorize(view, workload, facts);
    let at_info = pod.node.config.log.authorization_at_info;
    tell(&verdict.decision, facts, at_info);
    for finding in &verdict.findings {
        tell_finding(finding, facts, at_info);
    }
    verdict.decision
}

/// One log line at debug, or at info where the operator asks for it.
macro_rules! decision_line {
    ($at_info:expr, $($line:tt)*) => {
        if $at_info {
            tracing::info!(target: "rbac", $($line)*);
        } else {
            tracing::debug!(target: "rbac", $($line)*);
        }
    };
}

fn tell(decision: &Decision, facts: &AuthorizationFacts, at_info: bool) {
    let (source, destination) = (facts.source, facts.destination);
    let policy = |by: &RuleRef| by.policy.to_string();
    match decision {
        Decision::Allow { by: Some(by) } => {
            decision_line!(at_info, policy = policy(by), rule = by.rule, %source, %destination, "allow policy match");
        }
        Decision::Allow { by: None } => {
            decision_line!(at_info, %source, %destination, "no allow policies, allow");
        }
        Decision::Deny { by: Some(by), .. } => {
            decision_line!(at_info, policy = policy(by), rule = by.rule, %source, %destination, "deny policy match");
        }
        Decision::Deny { by: None, .. } => {
            decision_line!(at_info, %source, %destination, "no policies matched, deny");
        }
        Decision::Need(key) => {
            decision_line!(at_info, policy = key.to_string(), %source, %destination, "policy not known yet");
        }
    }
}

fn tell_finding(finding: &Finding, facts: &AuthorizationFacts, at_info: bool) {
    let (source, destination) = (facts.source, facts.destination);
    match finding {
        Finding::WouldDeny(by) => {
            decision_line!(at_info, policy = by.policy.to_string(), rule = by.rule, %source, %destination, "dry-run: would deny");
        }
        Finding::WouldAllow(by) => {
            decision_line!(at_info, policy = by.policy.to_string(), rule = by.rule, %source, %destination, "dry-run: would allow");
        }
        Finding::WouldNotAllow => {
            decision_line!(at_info, %source, %destination, "dry-run: would deny, no allow policy matched");
        }
    }
}

/// Asks policies again about the pod's open inbound connections whenever a policy or the pod's record changes, and
/// cuts those that are forbidden now. Goes on while the pod drains; ends when that is forced.
pub(crate) async fn watch(pod: Arc<Pod>, drain: drain::Watch) {
    drain.until_forced(watch_forever(pod)).await;
}

async fn watch_forever(pod: Arc<Pod>) {
    loop {
        let mut versions = pod.node.state.versions();
        let view = pod.node.state.view();
        let Outcome::Go(record) = pod.node.record(&view, &pod.binding) else {
            // No record, so no connection has been allowed yet; or it is gone, and the pod soon will be.
            if versions.changed().await.is_err() {
                return;
            }
            continue;
        };
        let mut watch = pod.node.state.watch(&record.uid);
        let held = pod.node.identities.hold(&record.identity());
        let uid = record.uid.clone();
        drop((versions, view, record));
        watch_record(&pod, &uid, &mut watch, &held).await;
    }
}

/// Until the pod's record is gone, or is another one, or speaks for another identity.
async fn watch_record(pod: &Pod, uid: &WorkloadUid, watch: &mut AuthorizationWatch, held: &Held) {
    let mut unmet_since: Option<Instant> = None;
    loop {
        let view = watch.view();
        let record = match pod.node.record(&view, &pod.binding) {
            Outcome::Go(record) if record.uid == *uid => record,
            _ => return,
        };
        if record.identity() != *held.identity() {
            return;
        }
        let late = unmet_since.is_some_and(|since| since.elapsed() >= WAIT);
        let needs = recheck(pod, &view, &record, late);
        drop((view, record));
        unmet_since = match (needs, unmet_since) {
            (true, None) => Some(Instant::now()),
            (true, since) if !late => since,
            _ => None,
        };
        tokio::select! {
            () = watch.changed() => {}
            () = until(unmet_since.map(|since| since + WAIT)) => {}
        }
        // Changes come in bursts: one look serves all of this moment.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Cuts what is forbidden now. A policy that is not known is given its time, and then denies. Answers whether one is
/// still missing.
fn recheck(pod: &Pod, view: &MeshView, workload: &Workload, late: bool) -> bool {
    let mut needs = false;
    for (id, live) in pod.inbound.open() {
        let decision = policy::authorize(view, workload, &live.facts()).decision;
        let decision = match late {
            true => decision.unmet(),
            false => decision,
        };
        match decision {
            Decision::Allow { by } => live.set_allowed_by(by.as_ref()),
            Decision::Need(_) => needs = true,
            Decision::Deny { refusal, by } => {
                pod.inbound.cut(id, Box::new(Denied::new(refusal, by)));
            }
        }
    }
    needs
}

#[cfg(test)]
mod tests {
    use mesh::outcome::{Object, Reason};

    use super::*;
    use crate::fixture::lines;

    fn by() -> RuleRef {
        RuleRef {
            policy: "shop/p".parse().expect("a key"),
            rule: 2,
        }
    }

    /// Everything that can come of asking, with its line.
    fn lines_of_everything(at_info: bool) -> Vec<String> {
        let facts = AuthorizationFacts::new(
            None,
            ([10, 0, 0, 1], 40000).into(),
            ([10, 0, 0, 2], 8080).into(),
        );
        let deny = |by| Decision::Deny {
            refusal: Refusal::by(
                Reason::PolicyDenied,
                Object::Policy("shop/p".parse().expect("a key")),
            ),
            by,
        };
        lines("rbac=debug", || {
            for decision in [
                Decision::Allow { by: Some(by()) },
                Decision::Allow { by: None },
                deny(Some(by())),
                deny(None),
                Decision::Need("shop/p".parse().expect("a key")),
            ] {
                tell(&decision, &facts, at_info);
            }
            for finding in [
                Finding::WouldDeny(by()),
                Finding::WouldAllow(by()),
                Finding::WouldNotAllow,
            ] {
                tell_finding(&finding, &facts, at_info);
            }
        })
    }

    #[test]
    fn what_policies_say_is_logged_with_the_policy_at_the_level_that_was_asked_for() {
        let ends = "source=10.0.0.1:40000 destination=10.0.0.2:8080";
        let of_rule = format!("policy=\"shop/p\" rule=2 {ends}");
        for (at_info, level) in [(false, "debug"), (true, "info")] {
            let expected = [
                format!("{level}\trbac\tallow policy match\t{of_rule}"),
                format!("{level}\trbac\tno allow policies, allow\t{ends}"),
                format!("{level}\trbac\tdeny policy match\t{of_rule}"),
                format!("{level}\trbac\tno policies matched, deny\t{ends}"),
                format!("{level}\trbac\tpolicy not known yet\tpolicy=\"shop/p\" {ends}"),
                format!("{level}\trbac\tdry-run: would deny\t{of_rule}"),
                format!("{level}\trbac\tdry-run: would allow\t{of_rule}"),
                format!("{level}\trbac\tdry-run: would deny, no allow policy matched\t{ends}"),
            ];
            assert_eq!(lines_of_everything(at_info), expected);
        }
    }
}
