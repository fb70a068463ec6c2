use std::sync::Arc;

use super::*;
use crate::{
    dns::{Answer, answer, knows},
    fixture::{apply, pod, service, view},
    service::{IpFamilies, PortNames},
    workload::{PodDns, PodHost},
};

const HEADLESS: &str = "headless.ns1.svc.cluster.local";

/// A service whose port 80 is called `http`, and leads to 8080.
fn named(hostname: &str, vips: &[&str]) -> Service {
    Service {
        port_names: PortNames::new([(80, "http"), (81, "")]).map(Arc::new),
        ..service(&format!("ns1/{hostname}"), vips, &[(80, 8080), (81, 81)])
    }
}

/// An endpoint of the headless service, with a name of its own or without.
fn endpoint(name: &str, own: bool, addresses: &[&str], ports: &[(u16, u16)]) -> Workload {
    let key = format!("ns1/{HEADLESS}");
    let mut it = pod(&format!("ns1/{name}"), addresses).serving(&key, ports);
    let host = own.then(|| PodHost::new(name, name, "headless")).flatten();
    it.dns = PodDns::new(true, &[], &[], host).map(Arc::new);
    it
}

fn mesh() -> MeshView {
    view([
        named("web.ns1.svc.cluster.local", &["10.0.0.1", "fd00::1"]).into(),
        named("api.example.org", &["10.0.0.2"]).into(),
        named("*.wild.com", &["10.0.0.3"]).into(),
        named(HEADLESS, &[]).into(),
        service(
            "ns1/plain.ns1.svc.cluster.local",
            &["10.0.0.4"],
            &[(80, 80)],
        )
        .into(),
        endpoint("db-0", true, &["10.2.0.1", "fd00::21"], &[]).into(),
        endpoint("db-x", false, &["10.2.0.2", "fd00::22"], &[(80, 9090)]).into(),
    ])
}

/// `cname? target port addresses; ...`, sorted; `forward`.
fn told(view: &MeshView, question: &str) -> String {
    let client = pod("ns1/client", &["10.2.0.9"]);
    let answered = answer_port(view, &Settings::default(), &client, question, Draw(1));
    let Some(records) = answered else {
        return "forward".to_owned();
    };
    assert_eq!(records.ttl, TTL_SECONDS);
    let line = |it: &Target| {
        let addresses: Vec<_> = it.addresses.iter().map(ToString::to_string).collect();
        format!("{} {} {}", it.name, it.port, addresses.join(","))
    };
    let mut lines: Vec<_> = records.targets.iter().map(line).collect();
    lines.sort_unstable();
    let cname = records.cname.map(|it| format!("{it} -> "));
    format!("{}{}", cname.unwrap_or_default(), lines.join("; "))
}

#[test]
fn a_named_port_of_a_service_is_its_number_at_the_services_whole_name() {
    let whole = "web.ns1.svc.cluster.local. 80 10.0.0.1,fd00::1";
    for name in [
        "web.ns1.svc.cluster.local.",
        "web",
        "WEB.ns1",
        "web.ns1.svc",
    ] {
        assert_eq!(
            told(&mesh(), &format!("_http._tcp.{name}")),
            whole,
            "{name}"
        );
    }
    assert_eq!(told(&mesh(), "_HTTP._TCP.web"), whole);
}

#[test]
fn hosts_of_elsewhere_have_named_ports_and_are_found_below_search_domains() {
    let whole = "api.example.org. 80 10.0.0.2";
    assert_eq!(told(&mesh(), "_http._tcp.api.example.org."), whole);
    assert_eq!(
        told(&mesh(), "_http._tcp.api.example.org.ns1.svc.cluster.local."),
        format!("_http._tcp.api.example.org. -> {whole}")
    );
    assert_eq!(
        told(&mesh(), "_http._tcp.a.wild.com."),
        "a.wild.com. 80 10.0.0.3"
    );
}

#[test]
fn a_headless_services_port_is_at_each_endpoint_under_a_name_of_its_own() {
    let expected = [
        "10-2-0-2.headless.ns1.svc.cluster.local. 9090 10.2.0.2",
        "db-0.headless.ns1.svc.cluster.local. 8080 10.2.0.1,fd00::21",
        "fd00--22.headless.ns1.svc.cluster.local. 9090 fd00::22",
    ];
    assert_eq!(told(&mesh(), "_http._tcp.headless"), expected.join("; "));
    let v4 = Service {
        ip_families: IpFamilies::Ipv4Only,
        ..named(HEADLESS, &[])
    };
    let mut view = mesh();
    apply(&mut view, [v4.into()]);
    let expected = "10-2-0-2.headless.ns1.svc.cluster.local. 9090 10.2.0.2; \
         db-0.headless.ns1.svc.cluster.local. 8080 10.2.0.1";
    assert_eq!(told(&view, "_http._tcp.headless"), expected);
}

#[test]
fn names_of_endpoints_resolve_to_their_own_addresses_alone() {
    let client = pod("ns1/client", &["10.2.0.9"]);
    let (view, settings) = (mesh(), Settings::default());
    let addresses = |name: &str, kind| match answer(&view, &settings, &client, name, kind, Draw(1))
    {
        Answer::Forward => vec!["forward".to_owned()],
        Answer::Local(records) => records.addresses.iter().map(ToString::to_string).collect(),
    };
    for (name, v4, v6) in [
        (
            "db-0.headless.ns1.svc.cluster.local.",
            "10.2.0.1",
            "fd00::21",
        ),
        ("DB-0.headless", "10.2.0.1", "fd00::21"),
        ("10-2-0-2.headless.ns1", "10.2.0.2", ""),
        ("fd00--22.headless", "", "fd00::22"),
        ("db-x.headless", "forward", "forward"),
        ("10-2-0-9.headless", "forward", "forward"),
        ("db-0.web", "forward", "forward"),
    ] {
        assert_eq!(addresses(name, RecordType::A).join(","), v4, "{name}");
        assert_eq!(addresses(name, RecordType::Aaaa).join(","), v6, "{name}");
    }
    assert!(knows(&view, &settings, &client, "db-0.headless"));
}

#[test]
fn what_has_no_name_here_is_forwarded() {
    for question in [
        "_http._udp.web",
        "_grpc._tcp.web",
        "_._tcp.web",
        "_http._tcp",
        "_http._tcp.",
        "http.tcp.web",
        "_http._tcp.plain",
        "_http._tcp.nobody.example",
        "_http._tcp.db-0.headless",
        "",
    ] {
        assert_eq!(told(&mesh(), question), "forward", "{question:?}");
    }
}

#[test]
fn a_service_of_very_many_endpoints_answers_with_a_part_of_them() {
    let many = (0..400).map(|number: u16| {
        let [high, low] = number.to_be_bytes();
        endpoint(
            &format!("p{number}"),
            false,
            &[&format!("10.9.{high}.{low}")],
            &[],
        )
        .into()
    });
    let mut view = mesh();
    apply(&mut view, many);
    let targets = told(&view, "_http._tcp.headless").matches(';').count() + 1;
    assert_eq!(targets, MAX_TARGETS);
}
