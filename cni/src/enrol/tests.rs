use std::time::{Duration, Instant};

use super::machine::{Announced, Goal, Plan, Progress, Rules, Step, next_step};
use crate::{
    agent::{Enrolment, Timing},
    rules::{PodRules, host::ProbeEntries},
};

fn plan() -> Plan {
    let probes =
        ProbeEntries::from([("10.0.0.1:80".parse().expect("an address"), "uid".to_owned())]);
    Plan {
        rules: PodRules::default(),
        probes,
    }
}

/// Carries steps out as if each succeeded; answers their order. Waiting ends after what it asked for.
fn run(goal: &Goal, progress: &mut Progress, connections: &[usize]) -> Vec<Step> {
    let (timing, mut now) = (Timing::default(), Instant::now());
    let mut connections = connections.iter();
    let mut steps = Vec::new();
    loop {
        let step = next_step(goal, progress, &timing, now);
        match &step {
            Step::Announce => progress.announced = Announced::Yes,
            Step::Redirect(rules) => progress.rules = Rules::Redirect(Some(rules.clone())),
            Step::Probes(entries) => progress.probes = Some(entries.clone()),
            Step::Tell(enrolment) => progress.told = Some(enrolment.clone()),
            Step::StopRedirecting => {
                progress.rules = Rules::Leaving;
                progress.leaving_since = Some(now);
            }
            Step::CountConnections => {
                progress.connections = Some(connections.next().copied().unwrap_or(0))
            }
            Step::Wait(time) => {
                now += *time;
                progress.connections = None;
            }
            Step::Withdraw => progress.announced = Announced::No,
            Step::RemoveRules => progress.rules = Rules::None,
            Step::Rest | Step::Done => {
                steps.push(step);
                return steps;
            }
        }
        steps.push(step);
        assert!(steps.len() < 500, "it never ends: {steps:?}");
    }
}

fn inside() -> Progress {
    let mut progress = Progress::default();
    run(&Goal::In(plan()), &mut progress, &[]);
    progress
}

#[test]
fn joining_opens_listeners_and_lets_probes_through_before_rules_and_tells_last() {
    let steps = run(&Goal::In(plan()), &mut Progress::default(), &[]);
    let expected = [
        Step::Announce,
        Step::Probes(plan().probes),
        Step::Redirect(plan().rules),
        Step::Tell(Enrolment::Enabled),
        Step::Rest,
    ];
    assert_eq!(steps, expected);
}

#[test]
fn leaving_stops_redirecting_tells_waits_and_removes() {
    let steps = run(&Goal::Out, &mut inside(), &[2, 1, 0]);
    let poll = Step::Wait(Timing::default().leave_poll);
    let expected = [
        Step::StopRedirecting,
        Step::Tell(Enrolment::None),
        Step::Probes(ProbeEntries::new()),
        Step::Wait(Duration::from_secs(5)),
        Step::CountConnections,
        poll.clone(),
        Step::CountConnections,
        poll,
        Step::CountConnections,
        Step::Withdraw,
        Step::RemoveRules,
        Step::Rest,
    ];
    assert_eq!(steps, expected);
}

#[test]
fn leaving_ends_after_a_minute_whatever_still_flows() {
    let steps = run(&Goal::Out, &mut inside(), &[1; 1000]);
    let waited: Duration = steps
        .iter()
        .filter_map(|step| {
            if let Step::Wait(time) = step {
                Some(*time)
            } else {
                None
            }
        })
        .sum();
    assert_eq!(waited, Duration::from_secs(60));
    assert_eq!(
        steps[steps.len() - 3..],
        [Step::Withdraw, Step::RemoveRules, Step::Rest]
    );
}

#[test]
fn a_rejoin_from_anywhere_in_a_leave_ends_inside() {
    for steps_of_leave in 0..12 {
        let (timing, mut now, mut progress) = (Timing::default(), Instant::now(), inside());
        for _ in 0..steps_of_leave {
            match next_step(&Goal::Out, &progress, &timing, now) {
                Step::StopRedirecting => {
                    progress.rules = Rules::Leaving;
                    progress.leaving_since = Some(now);
                }
                Step::Tell(enrolment) => progress.told = Some(enrolment),
                Step::Probes(entries) => progress.probes = Some(entries),
                Step::CountConnections => progress.connections = Some(0),
                Step::Wait(time) => now += time,
                Step::Withdraw => progress.announced = Announced::No,
                Step::RemoveRules => progress.rules = Rules::None,
                _ => {}
            }
        }
        run(&Goal::In(plan()), &mut progress, &[]);
        assert_eq!(
            progress.rules,
            Rules::Redirect(Some(plan().rules)),
            "after {steps_of_leave}"
        );
        assert_eq!(
            (progress.announced, progress.told),
            (Announced::Yes, Some(Enrolment::Enabled))
        );
    }
}

#[test]
fn a_pod_that_was_only_announced_is_withdrawn_when_it_is_not_wanted_any_more() {
    for goal in [Goal::Out, Goal::Gone] {
        let mut progress = Progress {
            announced: Announced::Asked,
            ..Progress::default()
        };
        assert!(
            run(&goal, &mut progress, &[]).contains(&Step::Withdraw),
            "{goal:?}"
        );
    }
}

#[test]
fn a_changed_plan_changes_only_what_differs() {
    let mut progress = inside();
    let other = Plan {
        rules: PodRules {
            dns_capture: false,
            ..PodRules::default()
        },
        ..plan()
    };
    let steps = run(&Goal::In(other.clone()), &mut progress, &[]);
    assert_eq!(steps, [Step::Redirect(other.rules), Step::Rest]);
}

#[test]
fn an_ended_pod_is_forgotten_without_touching_its_namespace() {
    let steps = run(&Goal::Gone, &mut inside(), &[]);
    let expected = [
        Step::Probes(ProbeEntries::new()),
        Step::Withdraw,
        Step::Tell(Enrolment::None),
        Step::Done,
    ];
    assert_eq!(steps, expected);
}

#[test]
fn a_pod_outside_the_mesh_costs_one_look() {
    let mut progress = Progress {
        told: Some(Enrolment::None),
        ..Progress::default()
    };
    assert_eq!(
        run(&Goal::Out, &mut progress, &[]),
        [Step::Probes(ProbeEntries::new()), Step::Rest]
    );
}
