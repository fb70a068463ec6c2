use std::collections::BTreeMap;

use super::*;

type Labels = BTreeMap<&'static str, &'static str>;

/// Pods with a namespace and an app label; services that select an app in a namespace.
struct Small {
    graph: Graph,
    pods: Source<String, Labels>,
    services: Source<&'static str, Labels>,
    names: Source<&'static str, u32>,
    workloads: Collection<String, Vec<&'static str>>,
    runs: Runs,
    tap: Tap<String, Vec<&'static str>>,
}

fn small() -> Small {
    let mut graph = Graph::new();
    let pods: Source<String, Labels> = graph.source();
    let services: Source<&'static str, Labels> = graph.source();
    let names = graph.source();
    let by_namespace = services.index(|_, labels| vec![labels["namespace"]]);
    let known = names.clone();
    let (workloads, runs) = graph.derive(&pods, move |cx, key, pod| {
        let app = pod["app"];
        let selecting = cx.find_where(&by_namespace, &pod["namespace"], move |s: &Labels| {
            s["app"] == app
        });
        let _ = cx.get(&known, &app);
        vec![(
            key.clone(),
            selecting.into_iter().map(|(name, _)| name).collect(),
        )]
    });
    let tap = workloads.tap();
    Small {
        graph,
        pods,
        services,
        names,
        workloads,
        runs,
        tap,
    }
}

fn labels(namespace: &'static str, app: &'static str) -> Labels {
    BTreeMap::from([("namespace", namespace), ("app", app)])
}

#[test]
fn a_change_recomputes_only_its_dependants() {
    let mut small = small();
    for n in 0..10_000 {
        let app = if n % 100 == 0 { "web" } else { "db" };
        small.pods.set(&format!("p{n}"), Some(labels("a", app)));
    }
    small.graph.settle();
    assert_eq!(small.runs.count(), 10_000);
    assert_eq!(small.tap.take().len(), 10_000);

    small.services.set(&"web", Some(labels("a", "web")));
    small.graph.settle();
    assert_eq!(small.runs.count(), 10_100, "the hundred pods it selects");
    assert_eq!(small.tap.take().len(), 100);

    small.services.set(&"other", Some(labels("b", "web")));
    small.graph.settle();
    assert_eq!(small.runs.count(), 10_100, "another namespace");

    small.pods.set(&"p1".into(), Some(labels("a", "web")));
    small.graph.settle();
    assert_eq!(small.runs.count(), 10_101);
    assert_eq!(*small.workloads.peek(&"p1".into()).unwrap(), vec!["web"]);
}

#[test]
fn an_output_that_does_not_differ_is_not_passed_on() {
    let mut small = small();
    small.pods.set(&"p".into(), Some(labels("a", "web")));
    small.graph.settle();
    small.tap.take();

    let mut annotated = labels("a", "web");
    annotated.insert("note", "nothing that matters");
    small.pods.set(&"p".into(), Some(annotated.clone()));
    small.graph.settle();
    assert_eq!(small.runs.count(), 2);
    assert_eq!(small.tap.take(), []);

    small.pods.set(&"p".into(), Some(annotated));
    small.graph.settle();
    assert_eq!(small.runs.count(), 2, "an equal input is no change");
}

#[test]
fn reads_of_absent_keys_are_dependencies_too() {
    let mut small = small();
    small.pods.set(&"p".into(), Some(labels("a", "web")));
    small.graph.settle();
    small.names.set(&"web", Some(1));
    small.graph.settle();
    assert_eq!(small.runs.count(), 2);
    small.names.set(&"db", Some(1));
    small.graph.settle();
    assert_eq!(small.runs.count(), 2);
}

#[test]
fn what_is_no_longer_read_no_longer_wakes() {
    let mut small = small();
    small.pods.set(&"p".into(), Some(labels("a", "web")));
    small.graph.settle();
    small.pods.set(&"p".into(), Some(labels("b", "web")));
    small.graph.settle();
    small.services.set(&"web", Some(labels("a", "web")));
    small.graph.settle();
    assert_eq!(small.runs.count(), 2);
    small.pods.set(&"p".into(), None);
    small.services.set(&"web", Some(labels("b", "web")));
    small.graph.settle();
    assert_eq!(small.runs.count(), 2);
    assert_eq!(small.workloads.snapshot().len(), 0);
}

#[test]
fn groups_follow_their_members_and_empty_groups_are_gone() {
    let mut small = small();
    let by_app = small.pods.index(|_, pod| vec![pod["app"]]);
    let groups = small.graph.group(&by_app);
    let (sizes, runs) = small
        .graph
        .derive(&groups, |_, app, members| vec![(*app, members.len())]);
    small.pods.set(&"p".into(), Some(labels("a", "web")));
    small.pods.set(&"q".into(), Some(labels("b", "web")));
    small.pods.set(&"r".into(), Some(labels("b", "db")));
    small.graph.settle();
    assert_eq!(sizes.peek(&"web").as_deref(), Some(&2));
    assert_eq!(runs.count(), 2);

    small.pods.set(&"q".into(), Some(labels("b", "db")));
    small.pods.set(&"p".into(), None);
    small.graph.settle();
    assert_eq!(sizes.peek(&"web"), None);
    assert_eq!(sizes.peek(&"db").as_deref(), Some(&2));
}

#[test]
fn a_removed_input_takes_its_outputs_along_and_its_slot_is_used_again() {
    let mut small = small();
    for round in 0..3 {
        small.pods.set(&"p".into(), Some(labels("a", "web")));
        small.graph.settle();
        assert_eq!(small.workloads.snapshot().len(), 1, "{round}");
        small.pods.set(&"p".into(), None);
        small.graph.settle();
        assert_eq!(small.workloads.snapshot().len(), 0, "{round}");
    }
    let gone = small.tap.take();
    assert_eq!(gone, [("p".to_owned(), None)]);
}

#[test]
fn a_place_that_another_takes_over_before_the_graph_settles_leaves_nothing_behind() {
    let mut small = small();
    small.pods.set(&"p".into(), Some(labels("a", "web")));
    small.graph.settle();
    small.tap.take();
    small.pods.set(&"p".into(), None);
    small.pods.set(&"q".into(), Some(labels("a", "db")));
    small.graph.settle();
    let known: Vec<String> = small.workloads.snapshot().into_keys().collect();
    assert_eq!(known, ["q"]);
    let changed: Vec<_> = small.tap.take().into_iter().map(|(key, _)| key).collect();
    assert_eq!(changed, ["p", "q"]);
}

#[test]
fn of_two_that_make_the_same_key_the_one_that_goes_does_not_take_others_along() {
    let mut graph = Graph::new();
    let inputs: Source<u32, &'static str> = graph.source();
    let (made, _) = graph.derive(&inputs, |_, _, name| vec![(**name, ())]);
    inputs.set(&1, Some("same"));
    inputs.set(&2, Some("same"));
    graph.settle();
    inputs.set(&1, Some("other"));
    graph.settle();
    let known: Vec<&str> = made.snapshot().into_keys().collect();
    assert_eq!(known, ["other", "same"], "the last one made it");
    inputs.set(&2, None);
    inputs.set(&3, Some("third"));
    inputs.set(&1, None);
    graph.settle();
    let known: Vec<&str> = made.snapshot().into_keys().collect();
    assert_eq!(known, ["third"]);
}

#[test]
fn what_one_computation_reads_twice_with_filters_concerns_it_where_either_passes() {
    let mut graph = Graph::new();
    let inputs: Source<u32, ()> = graph.source();
    let numbers: Source<u32, u32> = graph.source();
    let all = numbers.index(|_, _| vec![()]);
    let (_, runs) = graph.derive(&inputs, move |cx, key, _| {
        let even = cx.find_where(&all, &(), |n| n % 2 == 0);
        let large = cx.find_where(&all, &(), |n| *n > 10);
        vec![(*key, even.len() + large.len())]
    });
    for input in 0..3 {
        inputs.set(&input, Some(()));
    }
    graph.settle();
    for (number, expected) in [(1, 3), (2, 6), (13, 9), (3, 9)] {
        numbers.set(&number, Some(number));
        graph.settle();
        assert_eq!(runs.count(), expected, "{number}");
    }
}

#[test]
fn a_tap_of_several_collections_tells_what_is_in_any_of_them() {
    let graph = Graph::new();
    let (first, second): (Source<u32, u32>, Source<u32, u32>) = (graph.source(), graph.source());
    first.set(&1, Some(10));
    let tap = Tap::of(&[&first, &second]);
    second.set(&2, Some(20));
    let told = |changes: Vec<(u32, Option<Arc<u32>>)>| -> Vec<(u32, Option<u32>)> {
        let plain = |(key, value): (u32, Option<Arc<u32>>)| (key, value.as_deref().copied());
        changes.into_iter().map(plain).collect()
    };
    assert_eq!(told(tap.take()), [(1, Some(10)), (2, Some(20))]);

    first.set(&1, None);
    second.set(&1, Some(11));
    second.set(&2, None);
    assert_eq!(told(tap.take()), [(1, Some(11)), (2, None)]);
    assert_eq!(told(tap.take()), []);
}
