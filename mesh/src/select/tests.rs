use std::{collections::BTreeMap, sync::Arc};

use super::*;
use crate::{
    fixture::{pod, service},
    workload::{Addresses, Health, Locality},
};

const WEB: &str = "a/web.a.svc.cluster.local";

fn at(name: &str, place: &str) -> Workload {
    let parts: Vec<_> = place.split('/').collect();
    let part = |at: usize| parts.get(at).copied().unwrap_or_default().into();
    {
        let mut it = pod(&format!("a/{name}"), &["10.0.0.1"]).serving(WEB, &[]);
        it.locality = Arc::new(Locality {
            region: part(0),
            zone: part(1),
            subzone: part(2),
        });
        it.node = part(3);
        it.network = part(4);
        it.cluster_id = part(5);
        it
    }
}

fn endpoints(workloads: impl IntoIterator<Item = Workload>) -> Endpoints {
    let mut endpoints = Endpoints::default();
    for workload in workloads {
        endpoints.insert(&WEB.parse().unwrap(), Arc::new(workload));
    }
    endpoints
}

fn balanced(mode: LoadBalancingMode, preferences: &[Scope]) -> Service {
    Service {
        load_balancing: LoadBalancing {
            mode,
            routing_preferences: preferences.to_vec(),
            health_policy: HealthPolicy::OnlyHealthy,
        },
        ..service(WEB, &["10.1.0.1"], &[(80, 8080)])
    }
}

fn draws(service: &Service, endpoints: &Endpoints, source: &Workload) -> BTreeMap<String, u32> {
    let mut hits = BTreeMap::new();
    for seed in 0..600 {
        let drawn = select(service, endpoints, source, 80, Purpose::Traffic, Draw(seed));
        let name = drawn.map_or("-".to_owned(), |it| it.endpoint.workload.name.to_string());
        *hits.entry(name).or_default() += 1;
    }
    hits
}

#[track_caller]
fn chooses(mode: LoadBalancingMode, preferences: &[Scope], expected: &[&str]) {
    let client = at("client", "r1/z1/s1/n1//c1");
    let all = endpoints([
        at("node", "r1/z1/s1/n1//c1"),
        at("subzone", "r1/z1/s1/n2//c1"),
        at("zone", "r1/z1/s2/n3//c1"),
        at("region", "r1/z2/s1/n4//c2"),
        at("far", "r2/z1/s1/n1//c2"),
    ]);
    let hits = draws(&balanced(mode, preferences), &all, &client);
    let names: Vec<_> = hits.keys().map(String::as_str).collect();
    assert_eq!(names, expected, "{mode:?} {preferences:?}");
}

#[test]
fn preferences_narrow_the_choice() {
    use LoadBalancingMode::{Failover, Standard, Strict};
    use Scope::{Cluster, Node, Region, Subzone, Zone};
    let everyone = ["far", "node", "region", "subzone", "zone"];
    chooses(Standard, &[Node], &everyone);
    chooses(Strict, &[], &everyone);
    chooses(Failover, &[], &everyone);
    chooses(Strict, &[Region], &["node", "region", "subzone", "zone"]);
    chooses(Strict, &[Zone], &["far", "node", "subzone", "zone"]);
    chooses(Strict, &[Node], &["far", "node"]);
    chooses(Strict, &[Region, Node], &["node"]);
    chooses(Strict, &[Cluster], &["node", "subzone", "zone"]);
    chooses(Failover, &[Region, Zone, Subzone, Node], &["node"]);
    chooses(Failover, &[Region, Zone, Subzone], &["node", "subzone"]);
    chooses(Failover, &[Region, Zone], &["node", "subzone", "zone"]);
    chooses(Failover, &[Subzone], &["far", "node", "region", "subzone"]);
}

#[test]
fn a_failover_takes_the_most_leading_matches_there_are() {
    use Scope::{Network, Node, Region, Subzone, Zone};
    let client = at("client", "r1/z1/s1/n1");
    let all = endpoints([at("region", "r1/z2/s1/n1"), at("far", "r2/z1/s1/n1")]);
    let local = balanced(
        LoadBalancingMode::Failover,
        &[Network, Region, Zone, Subzone, Node],
    );
    assert_eq!(
        draws(&local, &all, &client).into_keys().collect::<Vec<_>>(),
        ["region"]
    );
    let zone_first = balanced(LoadBalancingMode::Failover, &[Zone, Region]);
    assert_eq!(
        draws(&zone_first, &all, &client)
            .into_keys()
            .collect::<Vec<_>>(),
        ["far"]
    );
}

#[test]
fn a_strict_choice_finds_nothing_rather_than_something_else() {
    let client = at("client", "r1/z1/s1/n9");
    let all = endpoints([at("other", "r1/z1/s1/n1")]);
    let strict = balanced(LoadBalancingMode::Strict, &[Scope::Node]);
    assert_eq!(
        draws(&strict, &all, &client)
            .into_keys()
            .collect::<Vec<_>>(),
        ["-"]
    );
}

#[test]
fn a_network_that_matches_outweighs_every_other_preference() {
    use Scope::{Network, Region, Zone};
    let client = at("client", "r1/z1");
    let near = at("near", "r2/z2");
    let far = at("far", "r1/z1///remote");
    let both = endpoints([near, far.clone()]);
    let failover = balanced(LoadBalancingMode::Failover, &[Network, Region, Zone]);
    assert_eq!(
        draws(&failover, &both, &client)
            .into_keys()
            .collect::<Vec<_>>(),
        ["near"]
    );
    let far_only = endpoints([far]);
    assert_eq!(
        draws(&failover, &far_only, &client)
            .into_keys()
            .collect::<Vec<_>>(),
        ["far"]
    );
}

#[test]
fn capacity_is_a_share_and_none_is_never_chosen() {
    let weighted = |name: &str, capacity| {
        let mut it = at(name, "");
        it.capacity = capacity;
        it
    };
    let web = balanced(LoadBalancingMode::Standard, &[]);
    let all = endpoints([
        weighted("one", 1),
        weighted("three", 3),
        weighted("zero", 0),
    ]);
    let hits = draws(&web, &all, &at("client", ""));
    assert!((110..190).contains(&hits["one"]), "{hits:?}");
    assert_eq!(hits["one"] + hits["three"], 600);
    let none = endpoints([weighted("zero", 0)]);
    assert_eq!(draws(&web, &none, &at("client", ""))["-"], 600);
}

#[test]
fn health_is_judged_when_an_endpoint_is_chosen() {
    let sick = Workload {
        status: Health::Unhealthy,
        ..at("sick", "")
    };
    let all = endpoints([sick]);
    let mut web = balanced(LoadBalancingMode::Standard, &[]);
    assert_eq!(draws(&web, &all, &at("client", ""))["-"], 600);
    web.load_balancing.health_policy = HealthPolicy::AllowAll;
    assert_eq!(draws(&web, &all, &at("client", ""))["sick"], 600);
}

#[test]
fn a_rare_usable_endpoint_among_many_is_found() {
    let many = (0..1_000).map(|at_| Workload {
        addresses: Addresses::default(),
        ..at(&format!("w{at_}"), "")
    });
    let all = endpoints(many.chain([at("usable", "")]));
    assert_eq!(all.len(), 1_001);
    let hits = draws(
        &balanced(LoadBalancingMode::Standard, &[]),
        &all,
        &at("client", ""),
    );
    assert_eq!(hits["usable"], 600);
}

#[test]
fn many_endpoints_of_a_node_are_told_from_the_others() {
    let many = (0..1_000).map(|at_| at(&format!("w{at_}"), &format!("///n{}", at_ % 3)));
    let all = endpoints(many);
    let strict = balanced(LoadBalancingMode::Strict, &[Scope::Node]);
    let hits = draws(&strict, &all, &at("client", "///n1"));
    let on_node = |name: &String| name[1..].parse::<u32>().is_ok_and(|number| number % 3 == 1);
    assert!(hits.keys().all(on_node), "{hits:?}");
    assert!(hits.len() > 200);
}

#[test]
fn endpoints_come_and_go_without_a_trace() {
    let mut all = Endpoints::default();
    let workloads: Vec<_> = (0..500)
        .map(|at_| {
            Arc::new(at(
                &format!("w{at_}"),
                &format!("r{}//s/n{}", at_ % 3, at_ % 7),
            ))
        })
        .collect();
    for workload in &workloads {
        all.insert(&WEB.parse().unwrap(), Arc::clone(workload));
        all.insert(&WEB.parse().unwrap(), Arc::clone(workload));
    }
    assert_eq!((all.len(), all.iter().count()), (500, 500));
    for workload in &workloads {
        all.remove(workload);
        all.remove(workload);
    }
    assert!(all.is_empty());
    assert_eq!(all.groups().count(), 0);
}

#[track_caller]
fn reaches(addresses: &[&str], families: IpFamilies, wanted: &str, expected: Option<&str>) {
    let workload = pod("a/w", addresses);
    let reach = reach(&workload, families, wanted.parse().unwrap());
    let expected = expected.map(|it| Reach::Ip(it.parse().unwrap()));
    assert_eq!(reach, expected, "{addresses:?} {families:?} {wanted}");
}

#[test]
fn an_address_of_the_clients_family_is_preferred() {
    use IpFamilies::{Automatic, Dual, Ipv4Only, Ipv6Only};
    let dual = ["10.0.0.1", "fd00::1"];
    reaches(&dual, Automatic, "10.9.9.9", Some("10.0.0.1"));
    reaches(&dual, Dual, "fd00::9", Some("fd00::1"));
    reaches(&dual, Ipv6Only, "10.9.9.9", Some("fd00::1"));
    reaches(&dual, Ipv4Only, "fd00::9", Some("10.0.0.1"));
    reaches(&["10.0.0.1"], Automatic, "fd00::9", Some("10.0.0.1"));
    reaches(&["10.0.0.1"], Ipv6Only, "fd00::9", None);
    reaches(
        &["10.0.0.1", "10.0.0.2"],
        Automatic,
        "10.0.0.2",
        Some("10.0.0.2"),
    );
    reaches(&[], Automatic, "10.0.0.2", None);
}
