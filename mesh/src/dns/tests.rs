use super::*;
use crate::{
    fixture::{apply, pod, service, view},
    service::{IpFamilies, LoadBalancing, Visibility},
    workload::PodDns,
};

fn named(hostname: &str, namespace: &str, vips: &[&str]) -> Service {
    Service {
        canonical: hostname.ends_with(".cluster.local"),
        ..service(&format!("{namespace}/{hostname}"), vips, &[(80, 80)])
    }
}

fn mesh() -> MeshView {
    let headless = "ns1/headless.ns1.svc.cluster.local";
    view([
        named(
            "productpage.ns1.svc.cluster.local",
            "ns1",
            &["10.0.0.1", "fd00::1"],
        )
        .into(),
        named("details.ns2.svc.cluster.local", "ns2", &["10.0.0.2"]).into(),
        named("www.google.com", "ns1", &["10.0.0.3"]).into(),
        named("*.wild.com", "ns1", &["10.0.0.4"]).into(),
        named("*.deep.wild.com", "ns1", &["10.0.0.5"]).into(),
        named("external.com", "ns1", &[]).into(),
        named("headless.ns1.svc.cluster.local", "ns1", &[]).into(),
        pod("ns1/h-1", &["10.2.0.1", "10.2.0.2", "fd00::21"])
            .serving(headless, &[])
            .into(),
        pod("ns1/h-2", &["10.2.0.3"]).serving(headless, &[]).into(),
        Workload {
            status: Health::Unhealthy,
            ..pod("ns1/h-3", &["10.2.0.4"]).serving(headless, &[])
        }
        .into(),
    ])
}

fn ask(view: &MeshView, name: &str, kind: RecordType) -> Answer {
    let client = pod("ns1/client", &["10.2.0.9"]);
    answer(view, &Settings::default(), &client, name, kind, Draw(1))
}

/// `cname owner addresses`, sorted; `forward`.
#[track_caller]
fn answers_as(view: &MeshView, name: &str, kind: RecordType, expected: &str) {
    let told = match ask(view, name, kind) {
        Answer::Forward => "forward".to_owned(),
        Answer::Local(mut records) => {
            assert_eq!(records.ttl, 30);
            records.addresses.sort_unstable();
            let addresses: Vec<_> = records.addresses.iter().map(ToString::to_string).collect();
            let cname = records.cname.as_deref().unwrap_or("-");
            format!("{cname} {} {}", records.owner, addresses.join(","))
        }
    };
    assert_eq!(told.trim_end(), expected, "{name}");
}

#[track_caller]
fn a(name: &str, expected: &str) {
    answers_as(&mesh(), name, RecordType::A, expected);
}

#[track_caller]
fn aaaa(name: &str, expected: &str) {
    answers_as(&mesh(), name, RecordType::Aaaa, expected);
}

#[test]
fn names_are_answered_in_their_short_and_long_forms() {
    a("productpage.", "- productpage. 10.0.0.1");
    a("productpage", "- productpage. 10.0.0.1");
    a("ProductPage.", "- productpage. 10.0.0.1");
    a("productpage.ns1.", "- productpage.ns1. 10.0.0.1");
    a("productpage.ns1.svc.", "- productpage.ns1.svc. 10.0.0.1");
    a(
        "productpage.ns1.svc.cluster.local.",
        "- productpage.ns1.svc.cluster.local. 10.0.0.1",
    );
    a("details.ns2.", "- details.ns2. 10.0.0.2");
    a("details.", "forward");
    aaaa("productpage.", "- productpage. fd00::1");
}

#[test]
fn what_the_mesh_does_not_know_is_forwarded() {
    a("example.org.", "forward");
    a("", "forward");
    a(".", "forward");
    a("missing.ns1.svc.cluster.local.", "forward");
    // Without address and not the cluster's own: not ours to answer.
    a("external.com.", "forward");
    answers_as(&mesh(), "productpage.", RecordType::Other, "forward");
}

#[test]
fn a_known_name_without_an_address_of_the_family_has_an_empty_answer() {
    aaaa("details.ns2.", "- details.ns2.");
    aaaa("www.google.com.", "- www.google.com.");
}

#[test]
fn a_search_domains_expansion_is_answered_by_a_cname_to_what_was_meant() {
    a(
        "www.google.com.ns1.svc.cluster.local.",
        "www.google.com. www.google.com. 10.0.0.3",
    );
    a(
        "www.google.com.svc.cluster.local.",
        "www.google.com. www.google.com. 10.0.0.3",
    );
    a(
        "www.google.com.cluster.local.",
        "www.google.com. www.google.com. 10.0.0.3",
    );
    a(
        "details.ns2.ns1.svc.cluster.local.",
        "details.ns2. details.ns2. 10.0.0.2",
    );
    a("www.google.com.ns2.svc.cluster.local.", "forward");
}

#[test]
fn the_most_specific_wildcard_answers_under_the_questions_own_name() {
    a("a.wild.com.", "- a.wild.com. 10.0.0.4");
    a("a.b.wild.com.", "- a.b.wild.com. 10.0.0.4");
    a("a.deep.wild.com.", "- a.deep.wild.com. 10.0.0.5");
    a("wild.com.", "forward");
    a(
        "a.wild.com.ns1.svc.cluster.local.",
        "- a.wild.com.ns1.svc.cluster.local. 10.0.0.4",
    );
}

#[test]
fn a_headless_service_is_one_address_of_each_healthy_endpoint() {
    a("headless.", "- headless. 10.2.0.1,10.2.0.3");
    aaaa("headless.", "- headless. fd00::21");
    let mut view = mesh();
    let all = Service {
        load_balancing: LoadBalancing {
            health_policy: HealthPolicy::AllowAll,
            ..LoadBalancing::default()
        },
        ..named("headless.ns1.svc.cluster.local", "ns1", &[])
    };
    apply(&mut view, [all.into()]);
    answers_as(
        &view,
        "headless.",
        RecordType::A,
        "- headless. 10.2.0.1,10.2.0.3,10.2.0.4",
    );
}

#[test]
fn families_that_the_service_or_the_setting_exclude_are_empty() {
    let mut view = mesh();
    let v6 = Service {
        ip_families: IpFamilies::Ipv6Only,
        ..named(
            "productpage.ns1.svc.cluster.local",
            "ns1",
            &["10.0.0.1", "fd00::1"],
        )
    };
    apply(&mut view, [v6.into()]);
    answers_as(&view, "productpage.", RecordType::A, "- productpage.");
    answers_as(
        &view,
        "productpage.",
        RecordType::Aaaa,
        "- productpage. fd00::1",
    );
    let settings = Settings {
        ipv6: false,
        ..Settings::default()
    };
    let client = pod("ns1/client", &["10.2.0.9"]);
    let answer = answer(
        &view,
        &settings,
        &client,
        "productpage.",
        RecordType::Aaaa,
        Draw(1),
    );
    assert!(matches!(answer, Answer::Local(records) if records.addresses.is_empty()));
}

#[test]
fn only_addresses_of_the_clients_network_are_given() {
    let mut view = mesh();
    let both = Service {
        vips: vec![
            "/10.0.0.9".parse().unwrap(),
            "far/10.0.0.10".parse().unwrap(),
        ],
        ..named("details.ns2.svc.cluster.local", "ns2", &[])
    };
    apply(&mut view, [both.into()]);
    answers_as(
        &view,
        "details.ns2.",
        RecordType::A,
        "- details.ns2. 10.0.0.9",
    );
}

#[test]
fn a_name_of_several_namespaces_means_the_nearest() {
    let shared = |namespace: &str, vip: &str, canonical, visibility| Service {
        canonical,
        visibility,
        ..service(&format!("{namespace}/shared.com"), &[vip], &[])
    };
    use Visibility::{Namespace, Public};
    let first = shared("ns7", "10.0.7.1", false, Public);
    let hidden = shared("ns6", "10.0.6.1", true, Namespace);
    let preferred = shared("ns5", "10.0.5.1", false, Public);
    let canonical = shared("ns4", "10.0.4.1", true, Public);
    let own = shared("ns1", "10.0.1.1", false, Namespace);
    let mut view = view([first.into(), hidden.into()]);
    let settings = Settings {
        preferred_namespace: Some("ns5".into()),
        ..Settings::default()
    };
    let client = pod("ns1/client", &["10.2.0.9"]);
    let mut check = |more: Option<Service>, expected: &str| {
        apply(&mut view, more.map(Into::into));
        let told = answer(
            &view,
            &settings,
            &client,
            "shared.com",
            RecordType::A,
            Draw(1),
        );
        let Answer::Local(records) = told else {
            panic!("forwarded");
        };
        assert_eq!(&*records.service.namespace, expected);
    };
    check(None, "ns7");
    check(Some(preferred), "ns5");
    check(Some(canonical), "ns4");
    check(Some(own), "ns1");
}

#[test]
fn a_name_that_no_one_here_may_see_is_forwarded() {
    let mut view = mesh();
    let hidden = Service {
        visibility: Visibility::Namespace,
        ..named("details.ns2.svc.cluster.local", "ns2", &["10.0.0.2"])
    };
    apply(&mut view, [hidden.into()]);
    answers_as(&view, "details.ns2.", RecordType::A, "forward");
}

#[test]
fn a_dedicated_proxys_search_list_replaces_kubernetes_own() {
    let settings = Settings {
        search: vec!["corp.example".into()],
        ..Settings::default()
    };
    let client = pod("ns1/client", &["10.2.0.9"]);
    let ask = |name| answer(&mesh(), &settings, &client, name, RecordType::A, Draw(1));
    let found = ask("www.google.com.corp.example.");
    assert!(matches!(found, Answer::Local(it) if it.cname.as_deref() == Some("www.google.com.")));
    assert_eq!(
        ask("www.google.com.ns1.svc.cluster.local."),
        Answer::Forward
    );
}

fn with_dns(cluster_first: bool, searches: &[&str]) -> Workload {
    let searches: Vec<_> = searches.iter().map(|it| (*it).to_owned()).collect();
    let dns = crate::workload::PodDns::new(cluster_first, &searches, &[], None);
    {
        let mut it = pod("ns1/client", &["10.2.0.9"]);
        it.dns = dns.map(Into::into);
        it
    }
}

/// The addresses that a client is told, `-` where that is not ours to say.
fn told(client: &Workload, name: &str) -> String {
    let answered = answer(
        &mesh(),
        &Settings::default(),
        client,
        name,
        RecordType::A,
        Draw(1),
    );
    match answered {
        Answer::Forward => "-".to_owned(),
        Answer::Local(records) => records.addresses[0].to_string(),
    }
}

#[test]
fn a_pods_own_search_domains_are_taken_off_too() {
    let client = with_dns(true, &["Corp.Example."]);
    assert_eq!(told(&client, "www.google.com.corp.example"), "10.0.0.3");
    assert_eq!(
        told(&client, "www.google.com.ns1.svc.cluster.local"),
        "10.0.0.3"
    );
    assert_eq!(told(&client, "www.google.com.other.example"), "-");
}

#[test]
fn a_short_name_below_a_domain_of_somebody_elses_is_that_ones() {
    let client = with_dns(true, &["corp.example"]);
    assert_eq!(told(&client, "productpage"), "10.0.0.1");
    assert_eq!(told(&client, "productpage.corp.example"), "-");
}

#[test]
fn a_pod_with_a_resolver_of_its_own_has_no_short_names_but_whole_ones() {
    let client = with_dns(false, &["corp.example"]);
    assert_eq!(told(&client, "productpage"), "-");
    assert_eq!(told(&client, "www.google.com.ns1.svc.cluster.local"), "-");
    assert_eq!(
        told(&client, "productpage.ns1.svc.cluster.local"),
        "10.0.0.1"
    );
    assert_eq!(told(&client, "www.google.com.corp.example"), "10.0.0.3");
    let in_cluster = with_dns(false, &["ns1.svc.cluster.local"]);
    assert_eq!(
        told(&in_cluster, "www.google.com.ns1.svc.cluster.local"),
        "10.0.0.3"
    );
}

#[test]
fn a_name_that_another_one_stands_for_is_taken_as_it_is_written() {
    let client = pod("ns1/client", &["10.2.0.9"]);
    let exactly = |name: &str| {
        let (view, settings) = (mesh(), Settings::default());
        answer_exactly(&view, &settings, &client, name, RecordType::A, Draw(1))
    };
    let Answer::Local(records) = exactly("WWW.google.com.") else {
        panic!("a name of the mesh");
    };
    assert_eq!(
        (records.owner.as_str(), records.cname),
        ("www.google.com.", None)
    );
    assert!(matches!(exactly("a.wild.com"), Answer::Local(_)));
    assert_eq!(exactly("productpage"), Answer::Forward);
    assert_eq!(
        exactly("www.google.com.ns1.svc.cluster.local"),
        Answer::Forward
    );
}

#[test]
fn what_the_mesh_knows_it_knows_whatever_the_type() {
    let client = pod("ns1/client", &["10.2.0.9"]);
    let knows = |name: &str| knows(&mesh(), &Settings::default(), &client, name);
    assert!(knows("productpage.") && knows("www.google.com.ns1.svc.cluster.local"));
    assert!(!knows("example.com") && !knows("_http._tcp.productpage"));
}

fn wanted_of(name: &str) -> Vec<String> {
    let client = pod("ns1/client", &["10.2.0.9"]);
    let wanted = wanted(&mesh(), &Settings::default(), &client, name);
    wanted.iter().map(ToString::to_string).collect()
}

#[test]
fn an_unknown_name_is_asked_for_in_the_namespace_that_it_tells() {
    let own = "ns1/new.ns1.svc.cluster.local";
    assert_eq!(wanted_of("new"), [own]);
    assert_eq!(
        wanted_of("new.ns1.svc.cluster.local.")[0],
        own,
        "whole names first"
    );
    assert!(wanted_of("new.ns2").contains(&"ns2/new.ns2.svc.cluster.local".to_owned()));
    assert_eq!(wanted_of("new.ns2.svc")[1], "ns2/new.ns2.svc.cluster.local");
}

#[test]
fn an_unknown_name_of_elsewhere_is_asked_for_in_the_clients_own_namespace() {
    assert_eq!(wanted_of("api.b.example.org"), ["ns1/api.b.example.org"]);
    // As well the short form of an endpoint's name, below the service `example` of the namespace `org`.
    let short = "org/example.org.svc.cluster.local";
    assert_eq!(wanted_of("api.example.org"), ["ns1/api.example.org", short]);
    let expanded = wanted_of("api.example.org.ns1.svc.cluster.local");
    assert!(expanded.contains(&"ns1/api.example.org".to_owned()));
}

#[test]
fn a_name_of_an_endpoint_asks_for_the_headless_service_above_it() {
    let above = "ns2/db.ns2.svc.cluster.local".to_owned();
    for name in [
        "db-0.db.ns2.svc.cluster.local",
        "db-0.db.ns2.svc",
        "db-0.db.ns2",
        "10-2-0-9.db.ns2.svc.cluster.local.ns1.svc.cluster.local",
    ] {
        assert!(
            wanted_of(name).contains(&above),
            "{name}: {:?}",
            wanted_of(name)
        );
    }
    assert!(wanted_of("db-0.db").contains(&"ns1/db.ns1.svc.cluster.local".to_owned()));
    let deeper = wanted_of("a.db-0.db.ns2.svc.cluster.local");
    assert!(!deeper.contains(&above), "{deeper:?}");
    let known = wanted_of("nobody.headless.ns1.svc.cluster.local");
    assert!(!known.contains(&"ns1/headless.ns1.svc.cluster.local".to_owned()));
}

#[test]
fn what_is_known_is_not_asked_for() {
    assert_eq!(
        wanted_of("productpage.ns1.svc.cluster.local"),
        [""; 0],
        "the whole name"
    );
    assert_eq!(wanted_of("productpage"), [""; 0]);
    assert_eq!(wanted_of(""), [""; 0]);
    assert_eq!(wanted_of("x.wild.com"), [""; 0], "a wildcard of it");
}

#[test]
fn one_question_asks_for_few_services_whatever_the_search_domains() {
    let searches: Vec<_> = (0..40).map(|i| format!("corp{i}.example")).collect();
    let client = {
        let mut it = pod("ns1/client", &["10.2.0.9"]);
        it.dns = PodDns::new(true, &searches, &[], None).map(Into::into);
        it
    };
    let name = "a.b.corp0.example";
    let wanted = wanted(&mesh(), &Settings::default(), &client, name);
    assert!((1..=MAX_WANTED).contains(&wanted.len()), "{wanted:?}");
}
