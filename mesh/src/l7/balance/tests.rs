use std::{cell::Cell, sync::Arc};

use super::*;
use crate::{
    fixture::{pod, service},
    l7::backend::{Distribution, HashKey},
    service::{LoadBalancing, Scope},
    workload::Locality as Place,
};

fn at(name: &str, place: &str) -> Workload {
    let mut parts = place.split('/').map(Str::from);
    let mut part = || parts.next().unwrap_or_default();
    Workload {
        locality: Arc::new(Place {
            region: part(),
            zone: part(),
            subzone: part(),
        }),
        ..pod(&format!("a/{name}"), &["10.0.0.1"])
    }
}

fn candidates(workloads: &[Workload]) -> Vec<Candidate<'_>> {
    let bare = |workload| Candidate {
        workload,
        labels: None,
    };
    workloads.iter().map(bare).collect()
}

fn policy(balancer: Balancer) -> TrafficPolicy {
    TrafficPolicy {
        balancer,
        ..TrafficPolicy::default()
    }
}

fn plan(policy: &TrafficPolicy, workloads: &[Workload]) -> Plan {
    let source = at("waypoint", "r/z/s");
    let all = candidates(workloads);
    let web = service("a/web.a.svc", &["10.1.0.1"], &[(80, 8080)]);
    let source = candidates(std::slice::from_ref(&source))[0];
    Plan::new(Some(&web), policy, source, &all)
}

const IDLE: Load = Load {
    usable: true,
    active: 0,
    age: None,
};

const GONE: Load = Load {
    usable: false,
    ..IDLE
};

/// How often each is picked among 10,000.
fn shares(plan: &Plan, count: usize, load: impl Fn(usize) -> Load) -> Vec<usize> {
    let mut hits = vec![0; count];
    for turn in 0..10_000 {
        let chance = Chance {
            hash: None,
            draw: Draw(turn).split().0,
            turn,
        };
        if let Some(picked) = plan.pick(chance, &load) {
            hits[picked] += 1;
        }
    }
    hits
}

#[track_caller]
fn near(hits: &[usize], expected: &[usize]) {
    let off = hits.iter().zip(expected).map(|(a, b)| a.abs_diff(*b));
    assert!(
        off.max().unwrap_or(0) <= 300,
        "{hits:?} is not about {expected:?}"
    );
}

fn three() -> Vec<Workload> {
    vec![at("a", "r"), at("b", "r"), at("c", "r")]
}

fn every_balancer() -> [Balancer; 4] {
    let table = HashTable::Ring(64);
    let key = HashKey::SourceIp;
    [
        Balancer::LeastRequest,
        Balancer::RoundRobin,
        Balancer::Random,
        Balancer::ConsistentHash { key, table },
    ]
}

#[test]
fn idle_endpoints_share_alike_and_by_weight() {
    for balancer in every_balancer() {
        let mut workloads = three();
        let even = plan(&policy(balancer.clone()), &workloads);
        near(&shares(&even, 3, |_| IDLE), &[3_333, 3_333, 3_333]);
        workloads[0].capacity = 2;
        workloads[1].capacity = 0;
        let weighted = plan(&policy(balancer), &workloads);
        near(&shares(&weighted, 3, |_| IDLE), &[6_667, 0, 3_333]);
    }
}

#[test]
fn an_endpoint_that_is_not_usable_is_never_picked() {
    for balancer in every_balancer() {
        let plan = plan(&policy(balancer), &three());
        let hits = shares(&plan, 3, |at| if at == 1 { GONE } else { IDLE });
        assert_eq!(hits[1], 0);
        assert_eq!(hits.iter().sum::<usize>(), 10_000);
        assert_eq!(shares(&plan, 3, |_| GONE), [0, 0, 0]);
    }
}

#[test]
fn the_less_loaded_of_two_is_picked() {
    let plan = plan(&policy(Balancer::LeastRequest), &three());
    let hits = shares(&plan, 3, |at| Load {
        active: u32::from(at == 0),
        ..IDLE
    });
    // Only where both draws are the busy one: a ninth.
    near(&hits, &[1_111, 4_444, 4_444]);
}

#[test]
fn turns_are_kept() {
    let plan = plan(&policy(Balancer::RoundRobin), &three());
    let chance = |turn| Chance {
        hash: None,
        draw: Draw(1),
        turn,
    };
    let picked: Vec<_> = (0..6).map(|it| plan.pick(chance(it), |_| IDLE)).collect();
    assert_eq!(picked, [0, 1, 2, 0, 1, 2].map(Some));
}

#[test]
fn a_new_endpoint_starts_slowly() {
    let warm = |balancer| TrafficPolicy {
        warmup: Some(Warmup {
            duration: Duration::from_secs(100),
            minimum_percent: 10,
            aggression_milli: 1000,
        }),
        ..policy(balancer)
    };
    let aged = |seconds| {
        move |at: usize| Load {
            age: Some(Duration::from_secs(if at == 0 { seconds } else { 1000 })),
            ..IDLE
        }
    };
    let workloads = &three()[..2];
    for balancer in [Balancer::LeastRequest, Balancer::RoundRobin] {
        let plan = plan(&warm(balancer), workloads);
        for (seconds, least, most) in [(0, 100, 1_200), (50, 2_300, 3_800), (100, 4_700, 5_300)] {
            let hits = shares(&plan, 2, aged(seconds));
            assert!((least..most).contains(&hits[0]), "{seconds}: {hits:?}");
        }
    }
}

fn hashed(plan: &Plan, key: u32, load: impl Fn(usize) -> Load) -> Option<usize> {
    let chance = Chance {
        hash: Some(hash(&key.to_be_bytes())),
        draw: Draw(1),
        turn: 0,
    };
    plan.pick(chance, load)
}

#[test]
fn equal_keys_stay_where_they_are_when_an_endpoint_goes() {
    for table in [HashTable::Ring(1024), HashTable::Maglev(65537)] {
        let key = HashKey::SourceIp;
        let names: Vec<_> = (0..10).map(|it| at(&format!("w{it}"), "r")).collect();
        let policy = policy(Balancer::ConsistentHash { key, table });
        let (all, fewer) = (plan(&policy, &names), plan(&policy, &names[..9]));
        let mut hits = [0; 10];
        let mut moved = 0;
        for key in 0..10_000 {
            let before = hashed(&all, key, |_| IDLE).unwrap();
            assert_eq!(hashed(&all, key, |_| IDLE), Some(before));
            hits[before] += 1;
            let after = hashed(&fewer, key, |_| IDLE);
            moved += u32::from(before != 9 && after != Some(before));
            let ejected = hashed(&all, key, |at| if at == 9 { GONE } else { IDLE });
            assert!(before == 9 || ejected == Some(before), "the others stay");
            assert_ne!(ejected, Some(9));
        }
        assert!(
            hits.iter().all(|it| (600..1_500).contains(it)),
            "{table:?} {hits:?}"
        );
        // A ring's points are shared out anew, as many as there were.
        assert!(moved < 1_000, "{table:?}: {moved} of 9,000 moved");
    }
}

#[test]
fn a_table_of_any_size_is_filled_and_keeps_weights() {
    for size in [1, 2, 4, 100, 65537] {
        let table = Table::new(HashTable::Maglev(size), &[("a", 3), ("b", 1), ("c", 0)]);
        let Table::Maglev(slots) = table else {
            panic!("a Maglev table");
        };
        assert_eq!(slots.len(), usize::try_from(size).unwrap());
        let share = slots.iter().filter(|it| **it == 0).count() * 100 / slots.len();
        assert!(size < 100 || (74..=76).contains(&share), "{share}%");
        assert!(!slots.contains(&2));
    }
    let none = Table::new(HashTable::Maglev(7), &[]);
    assert_eq!(none.find(1, |_| true), None);
}

fn local(locality: Locality) -> TrafficPolicy {
    TrafficPolicy {
        locality: Some(locality),
        ..policy(Balancer::Random)
    }
}

fn places() -> Vec<Workload> {
    ["r/z/s", "r/z/t", "r/y/s", "q/z/s", "p/z/s"]
        .iter()
        .enumerate()
        .map(|(number, place)| at(&format!("w{number}"), place))
        .collect()
}

/// The order in which endpoints are used as those before them are lost.
fn order(plan: &Plan, count: usize) -> Vec<Vec<usize>> {
    let mut gone: Vec<usize> = Vec::new();
    let mut order = Vec::new();
    loop {
        let hits = shares(
            plan,
            count,
            |at| if gone.contains(&at) { GONE } else { IDLE },
        );
        let used: Vec<_> = (0..count).filter(|it| hits[*it] > 0).collect();
        if used.is_empty() {
            return order;
        }
        gone.extend(&used);
        order.push(used);
    }
}

#[test]
fn the_nearest_endpoints_are_used_first() {
    let failover = |pairs: &[(&str, &str)]| {
        let pairs = pairs
            .iter()
            .map(|(from, to)| (Str::from(*from), Str::from(*to)));
        local(Locality::Failover(pairs.collect()))
    };
    let places = places();
    let of = |policy: &TrafficPolicy| order(&plan(policy, &places), 5);
    let nearest: &[&[usize]] = &[&[0], &[1], &[2], &[3, 4]];
    assert_eq!(of(&failover(&[])), nearest);
    let named: &[&[usize]] = &[&[0], &[1], &[2], &[4], &[3]];
    assert_eq!(of(&failover(&[("r", "p")])), named);
    let all: &[&[usize]] = &[&[0, 1, 2, 3, 4]];
    assert_eq!(of(&local(Locality::Off)), all);
    let labels = vec![
        ("topology.kubernetes.io/zone".into(), None),
        ("topology.kubernetes.io/region".into(), Some("q".into())),
    ];
    let by_label: &[&[usize]] = &[&[3], &[0, 1, 4], &[2]];
    assert_eq!(of(&local(Locality::Priority(labels))), by_label);
}

#[test]
fn labels_of_workloads_are_preferred_in_order() {
    let workloads = three();
    let labels = |version: &str| BTreeMap::from([("version".into(), version.into())]);
    let (one, two) = (labels("1"), labels("2"));
    let all = [&one, &two, &two].into_iter().zip(&workloads);
    let all: Vec<_> = all
        .map(|(labels, workload)| Candidate {
            workload,
            labels: Some(labels),
        })
        .collect();
    let waypoint = at("waypoint", "r");
    let source = Candidate {
        workload: &waypoint,
        labels: Some(&two),
    };
    let policy = local(Locality::Priority(vec![("version".into(), None)]));
    let expected: &[&[usize]] = &[&[1, 2], &[0]];
    assert_eq!(order(&Plan::new(None, &policy, source, &all), 3), expected);
    assert!(has_labels(Some(&one), &labels("1")) && has_labels(None, &BTreeMap::new()));
    assert!(!has_labels(Some(&one), &labels("2")) && !has_labels(None, &labels("1")));
}

#[test]
fn localities_get_their_shares() {
    let share = |from: &str, to: &[(&str, u32)]| Distribution {
        from: from.into(),
        to: to
            .iter()
            .map(|(it, percent)| ((*it).into(), *percent))
            .collect(),
    };
    let mut places = places();
    places[1].capacity = 3;
    let policy = local(Locality::Distribute(vec![
        share("q/*", &[("q/*", 100)]),
        share("r/z/*", &[("r/z/*", 80), ("q/z/s", 20)]),
    ]));
    let hits = shares(&plan(&policy, &places), 5, |_| IDLE);
    near(&hits, &[2_000, 6_000, 0, 2_000, 0]);
    let elsewhere = local(Locality::Distribute(vec![share("x", &[("r", 100)])]));
    let hits = shares(&plan(&elsewhere, &places), 5, |_| IDLE);
    assert!(hits.iter().all(|it| *it > 0), "none applies: {hits:?}");
}

#[test]
fn a_tier_that_is_half_gone_spills_over() {
    let mut workloads: Vec<_> = (0..10).map(|it| at(&format!("w{it}"), "r/z/s")).collect();
    workloads.push(at("far", "q"));
    let plan = plan(&local(Locality::Failover(vec![])), &workloads);
    let far = |gone: usize| {
        let hits = shares(&plan, 11, |at| if at < gone { GONE } else { IDLE });
        hits[10]
    };
    assert_eq!((far(0), far(2)), (0, 0));
    near(&[far(5), far(9), far(10)], &[3_000, 8_600, 10_000]);
}

#[test]
fn a_services_own_preferences_hold_without_a_policy() {
    let balancing = |mode| LoadBalancing {
        routing_preferences: vec![Scope::Region, Scope::Zone],
        mode,
        ..LoadBalancing::default()
    };
    let places = places();
    let waypoint = at("waypoint", "r/z/s");
    let of = |balancing| {
        let mut web = service("a/web.a.svc", &["10.1.0.1"], &[(80, 8080)]);
        web.load_balancing = balancing;
        let source = candidates(std::slice::from_ref(&waypoint))[0];
        let all = candidates(&places);
        order(
            &Plan::new(Some(&web), &policy(Balancer::Random), source, &all),
            5,
        )
    };
    let failover: &[&[usize]] = &[&[0, 1], &[2], &[3, 4]];
    assert_eq!(of(balancing(LoadBalancingMode::Failover)), failover);
    let strict: &[&[usize]] = &[&[0, 1]];
    assert_eq!(of(balancing(LoadBalancingMode::Strict)), strict);
    let all: &[&[usize]] = &[&[0, 1, 2, 3, 4]];
    assert_eq!(of(LoadBalancing::default()), all);
}

#[test]
fn an_unhealthy_endpoint_counts_only_where_all_do() {
    let mut workloads = three();
    workloads[0].status = Health::Unhealthy;
    let members = plan(&policy(Balancer::Random), &workloads)
        .members()
        .count();
    assert_eq!(members, 2);
}

#[test]
fn a_choice_among_many_looks_at_few() {
    let workloads: Vec<_> = (0..2_000).map(|it| at(&format!("w{it}"), "r")).collect();
    for balancer in every_balancer() {
        let plan = plan(&policy(balancer), &workloads);
        let looked = Cell::new(0);
        shares(&plan, 2_000, |_| {
            looked.set(looked.get() + 1);
            IDLE
        });
        assert!(looked.get() <= 10_000 * 8, "{}", looked.get());
    }
}
