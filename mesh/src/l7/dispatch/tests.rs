use std::collections::BTreeMap;

use super::*;
use crate::{
    fixture::{pod, service, view},
    l7::view::{Resource, Update},
};

const WAYPOINT: &str = "10.0.9.9";

fn served(key: &str, bound: bool, ports: &[(u16, AppProtocol)]) -> Resource {
    Resource::Service(ServedService {
        service: key.parse().unwrap(),
        bound,
        ports: ports.iter().copied().collect::<BTreeMap<_, _>>(),
        resolution: crate::l7::served::Resolution::Static,
        external: false,
    })
}

/// Two services share an address; a third is only a backend; one pod is served by its own address.
fn world() -> (MeshView, View) {
    let web = service("a/web.a", &["10.1.0.1", "fd00::1"], &[(80, 8080)]);
    let rival = service("z/rival.z", &["10.1.0.1"], &[(80, 8080)]);
    let backend = service("a/back.a", &["10.1.0.2"], &[(80, 8080)]);
    let (alone, other) = (pod("a/alone", &["10.0.0.1"]), pod("a/other", &["10.0.0.2"]));
    let alone_uid = alone.uid.clone();
    let mesh = view([
        rival.into(),
        web.into(),
        backend.into(),
        alone.into(),
        other.into(),
    ]);
    let mut l7 = View::default();
    l7.apply(Update {
        upserts: vec![
            served(
                "a/web.a",
                true,
                &[(80, AppProtocol::Http), (81, AppProtocol::Tcp)],
            ),
            served("a/back.a", false, &[(80, AppProtocol::Http)]),
            Resource::Workload(crate::l7::served::ServedWorkload { uid: alone_uid }),
        ],
        removals: Vec::new(),
    });
    (mesh, l7)
}

fn ask(authority: &str, network: &str) -> String {
    let (mesh, l7) = world();
    let facts = DispatchFacts {
        authority: &authority.parse().unwrap(),
        local: WAYPOINT.parse().unwrap(),
        network: &network.into(),
        namespace: "a",
    };
    match dispatch(&mesh, &l7, &facts) {
        Outcome::Go(Target::Service { served, port, .. }) => format!("{} {port}", served.service),
        Outcome::Go(Target::Workload { workload, address }) => {
            format!("{} {}", workload.name, address.port())
        }
        Outcome::Refuse(refusal) => format!("{:?}", refusal.reason),
        Outcome::Need(need) => format!("{:?}", need.unmet().reason),
    }
}

#[test]
fn only_what_is_bound_here_is_served() {
    for (authority, expected) in [
        ("10.1.0.1:80", "a/web.a 80"),
        ("10.1.0.1:81", "a/web.a 81"),
        ("[fd00::1]:80", "a/web.a 80"),
        ("[::ffff:10.1.0.1]:80", "a/web.a 80"),
        ("10.1.0.1:82", "UnknownPort"),
        // Backends of routes are no front ends, and the rival of the same address is another's.
        ("10.1.0.2:80", "NotServed"),
        ("10.0.0.1:9999", "alone 9999"),
        ("10.0.0.2:80", "NotServed"),
        ("192.0.2.1:80", "NotServed"),
        ("web.a:80", "UnknownHostname"),
    ] {
        assert_eq!(ask(authority, ""), expected, "{authority}");
    }
}

#[test]
fn no_address_leads_into_the_waypoint() {
    for authority in [
        "10.0.9.9:15000",
        "10.0.9.9:80",
        "127.0.0.1:15000",
        "127.8.8.8:80",
        "[::1]:15000",
        "[::ffff:127.0.0.1]:15000",
        "0.0.0.0:15000",
        "[::]:15000",
        "169.254.169.254:80",
        "[fe80::1]:80",
        "224.0.0.1:80",
        "255.255.255.255:80",
    ] {
        assert_eq!(ask(authority, ""), "Recursion", "{authority}");
    }
}

#[test]
fn names_are_authorities_where_networks_are_many() {
    for (authority, expected) in [
        ("web.a:80", "a/web.a 80"),
        ("WEB.A.:80", "a/web.a 80"),
        ("web.a:82", "UnknownPort"),
        ("back.a:80", "NotServed"),
        ("rival.z:80", "NotServed"),
        ("nobody.a:80", "NotServed"),
    ] {
        assert_eq!(ask(authority, "net-1"), expected, "{authority}");
    }
}

#[test]
fn a_gateway_between_networks_takes_names_of_what_it_serves_and_nothing_else() {
    let (mesh, l7) = world();
    for (authority, expected) in [
        ("web.a:80", "a/web.a 80"),
        ("web.a:82", "UnknownPort"),
        ("back.a:80", "NotServed"),
        ("nobody.a:80", "NotServed"),
        ("10.1.0.1:80", "NotServed"),
        ("10.0.0.1:9999", "NotServed"),
        ("127.0.0.1:15000", "NotServed"),
    ] {
        let facts = DispatchFacts {
            authority: &authority.parse().unwrap(),
            local: WAYPOINT.parse().unwrap(),
            network: &"".into(),
            namespace: "a",
        };
        let told = match dispatch_inner(&mesh, &l7, &facts) {
            Outcome::Go(target) => format!("{} {}", target.service().unwrap().key(), target.port()),
            Outcome::Refuse(refusal) => format!("{:?}", refusal.reason),
            Outcome::Need(need) => format!("{:?}", need.unmet().reason),
        };
        assert_eq!(told, expected, "{authority}");
    }
}
