use super::*;
use crate::fixture::{gateway, pod, service};

fn texts(file: &LocalFile) -> Vec<String> {
    file.findings().iter().map(ToString::to_string).collect()
}

#[test]
fn a_file_whose_names_are_all_there_has_nothing_to_tell() {
    let mut web = pod("a/web", &["10.0.0.1"]).serving("a/web.a.svc", &[(80, 8080)]);
    web.waypoint = Some(gateway("a/waypoint.a.svc", 15008));
    let file = LocalFile {
        workloads: vec![web],
        services: vec![
            service("a/web.a.svc", &["10.1.0.1"], &[(80, 8080)]),
            service("a/waypoint.a.svc", &["10.1.0.2"], &[(15008, 15008)]),
        ],
        policies: Vec::new(),
    };
    assert_eq!(texts(&file), [""; 0]);
}

#[test]
fn every_name_that_leads_nowhere_is_told_with_what_comes_of_it() {
    let mut web = pod("a/web", &["10.0.0.1"])
        .serving("a/web.a.svc", &[(81, 8080)])
        .serving("a/gone.a.svc", &[]);
    web.authorization_policies = vec!["a/p".parse().unwrap()];
    web.waypoint = Some(gateway("/10.9.9.9", 15008));
    let nowhere = pod("a/nowhere", &[]);
    let mut of_waypoint = service("a/web.a.svc", &["10.1.0.1"], &[(80, 8080)]);
    of_waypoint.waypoint = Some(gateway("a/waypoint.a.svc", 15008));
    let (uid, other) = (web.uid.clone(), nowhere.uid.clone());
    let file = LocalFile {
        workloads: vec![web.clone(), web, nowhere],
        services: vec![of_waypoint],
        policies: Vec::new(),
    };
    let expected = [
        format!("workload {uid} is there more than once: the last counts"),
        format!("workload {other} has no address, host name or gateway"),
        format!("workload {uid} serves a/gone.a.svc, which is not there"),
        format!("workload {uid} maps port 81 of a/web.a.svc, which has no such port"),
        format!("workload {uid} names policy a/p, which is not there: connections to it are refused"),
        "service a/web.a.svc has the waypoint a/waypoint.a.svc, which is not there: connections to it are refused"
            .to_owned(),
        format!("workload {uid} has the waypoint /10.9.9.9, which is not there: connections to it are refused"),
    ];
    assert_eq!(texts(&file), expected);
}
