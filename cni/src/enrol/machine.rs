//! Which step comes next for one pod. Pure: goal and progress in, step out, asked again after every step, so that a
//! change of mind in the middle (a rejoin during a leave) needs no special case. Source: design 8.1.

use std::time::{Duration, Instant};

use crate::{
    agent::{Enrolment, Timing},
    rules::{PodRules, host::ProbeEntries},
};

/// What should become of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// In the mesh, like this.
    In(Plan),
    /// Out of it, its connections unharmed.
    Out,
    /// It has ended.
    Gone,
}

/// How the pod should be in the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) rules: PodRules,
    pub(crate) probes: ProbeEntries,
}

/// What has been done, as far as is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) announced: Announced,
    pub(crate) rules: Rules,
    /// What the node's set holds for it; `None`: unknown.
    pub(crate) probes: Option<ProbeEntries>,
    pub(crate) told: Option<Enrolment>,
    /// When the leave began; absent after a restart in the middle of one.
    pub(crate) leaving_since: Option<Instant>,
    /// Connections in the tunnel's hands, when last counted.
    pub(crate) connections: Option<usize>,
}

/// What the tunnels know of the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Announced {
    /// Nothing.
    #[default]
    No,
    /// It is in their snapshot, but the newest has not said yes.
    Asked,
    /// The newest has acknowledged it, or has it in its snapshot.
    Yes,
}

/// The rules in the pod's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rules {
    /// None of ours.
    #[default]
    None,
    /// Redirecting like this; `None`: in a way that is not known.
    Redirect(Option<PodRules>),
    /// Those of the leave.
    Leaving,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Hand the namespace to the tunnel and wait until its listeners are open.
    Announce,
    /// Write the redirection.
    Redirect(PodRules),
    /// Make the node's set hold this.
    Probes(ProbeEntries),
    /// Tell it outside.
    Tell(Enrolment),
    /// Swap the redirection for the leave's rules.
    StopRedirecting,
    /// Count what is still in the tunnel.
    CountConnections,
    /// Look again after this time, or when the goal changes.
    Wait(Duration),
    /// Take the pod from the tunnels.
    Withdraw,
    /// Remove what is left of the rules.
    RemoveRules,
    /// Nothing to do until the goal changes.
    Rest,
    /// Nothing to do ever again.
    Done,
}

pub(crate) fn next_step(goal: &Goal, progress: &Progress, timing: &Timing, now: Instant) -> Step {
    match goal {
        Goal::In(plan) => join(plan, progress),
        Goal::Out => leave(progress, timing, now),
        Goal::Gone => gone(progress),
    }
}

/// Listeners first: rules without them would refuse new connections and DNS. Probes before rules: a probe between the
/// two would be captured, and refused where the pod insists on the mesh; without rules its changed source does no harm.
fn join(plan: &Plan, progress: &Progress) -> Step {
    if progress.announced != Announced::Yes {
        return Step::Announce;
    }
    if progress.probes.as_ref() != Some(&plan.probes) {
        return Step::Probes(plan.probes.clone());
    }
    if progress.rules != Rules::Redirect(Some(plan.rules.clone())) {
        return Step::Redirect(plan.rules.clone());
    }
    if progress.told != Some(Enrolment::Enabled) {
        return Step::Tell(Enrolment::Enabled);
    }
    Step::Rest
}

/// New connections go direct at once, peers learn, the tunnel ends what it has, then nothing is left.
fn leave(progress: &Progress, timing: &Timing, now: Instant) -> Step {
    if matches!(progress.rules, Rules::Redirect(_)) {
        return Step::StopRedirecting;
    }
    if let Some(step) = untold(progress) {
        return step;
    }
    if progress.rules == Rules::Leaving
        && let Some(step) = linger(progress, timing, now)
    {
        return step;
    }
    if progress.announced != Announced::No {
        return Step::Withdraw;
    }
    if progress.rules == Rules::Leaving {
        return Step::RemoveRules;
    }
    Step::Rest
}

fn untold(progress: &Progress) -> Option<Step> {
    if progress.told != Some(Enrolment::None) {
        return Some(Step::Tell(Enrolment::None));
    }
    let empty = progress.probes.as_ref().is_some_and(ProbeEntries::is_empty);
    (!empty).then(|| Step::Probes(ProbeEntries::new()))
}

/// How long the tunnel keeps a leaving pod; `None`: no longer.
fn linger(progress: &Progress, timing: &Timing, now: Instant) -> Option<Step> {
    // A restart in the middle does not know when it began: as if it had just then.
    let spent = progress
        .leaving_since
        .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
    if progress.announced == Announced::No || spent >= timing.leave_most {
        return None;
    }
    if spent < timing.leave_least {
        return Some(Step::Wait(timing.leave_least - spent));
    }
    match progress.connections {
        None => Some(Step::CountConnections),
        Some(0) => None,
        Some(_) => Some(Step::Wait(timing.leave_poll.min(timing.leave_most - spent))),
    }
}

/// The namespace is going or gone; nothing in it needs care.
fn gone(progress: &Progress) -> Step {
    let empty = progress.probes.as_ref().is_some_and(ProbeEntries::is_empty);
    if !empty {
        return Step::Probes(ProbeEntries::new());
    }
    if progress.announced != Announced::No {
        return Step::Withdraw;
    }
    if progress.told != Some(Enrolment::None) {
        return Step::Tell(Enrolment::None);
    }
    Step::Done
}
