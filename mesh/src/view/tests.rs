use super::*;
use crate::{
    fixture::{apply, gateway, pod, service, view},
    policy::{Action, Rule},
    service::Visibility,
    workload::{Health, NetworkMode, PortsOfServices},
};

const WEB: &str = "a/web.a.svc.cluster.local";

fn key(text: &str) -> NamespacedHostname {
    text.parse().unwrap()
}

fn at(text: &str) -> NetworkAddress {
    format!("/{text}").parse().unwrap()
}

fn policy(text: &str, scope: PolicyScope) -> AuthorizationPolicy {
    AuthorizationPolicy {
        key: text.parse().unwrap(),
        scope,
        action: Action::Allow,
        rules: vec![Rule::default()],
        dry_run: false,
        faults: Vec::new(),
    }
}

fn remove(view: &mut MeshView, removal: Removal) -> Changes {
    view.apply(Update {
        upserts: Vec::new(),
        removals: vec![removal],
    })
}

fn names(endpoints: &Endpoints) -> Vec<String> {
    let mut names: Vec<_> = endpoints
        .iter()
        .map(|it| it.workload.name.to_string())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_workload_is_found_by_uid_address_and_binding_until_it_is_removed() {
    let web = pod("a/web", &["10.0.0.1", "fd00::1"]);
    let mut view = view([web.clone().into()]);
    let binding = LocalWorkload {
        name: web.name.clone(),
        namespace: web.namespace.clone(),
        service_account: web.service_account.clone(),
    };
    let found = |view: &MeshView| {
        let ways = [
            view.workload(&web.uid),
            view.workload_at(&at("10.0.0.1")),
            view.workload_at(&at("fd00::1")),
            view.local_workload(&binding, "n1"),
            view.local_workload(&binding, ""),
        ];
        ways.map(|it| it.is_some())
    };
    assert_eq!(found(&view), [true; 5]);
    assert!(view.local_workload(&binding, "n2").is_none());
    let elsewhere = "far/10.0.0.1".parse().unwrap();
    assert!(view.workload_at(&elsewhere).is_none());
    let before = view.clone();
    let changes = remove(&mut view, Removal::Address(web.uid.0.clone()));
    assert_eq!(changes.workloads, std::slice::from_ref(&web.uid));
    assert_eq!(found(&view), [false; 5]);
    assert_eq!(found(&before), [true; 5], "a clone keeps what it saw");
}

#[test]
fn a_workload_that_moves_leaves_its_old_address() {
    let mut view = view([pod("a/web", &["10.0.0.1"]).into()]);
    apply(&mut view, [pod("a/web", &["10.0.0.2"]).into()]);
    assert!(view.workload_at(&at("10.0.0.1")).is_none());
    assert!(view.workload_at(&at("10.0.0.2")).is_some());
}

#[test]
fn of_workloads_with_one_address_a_pod_wins_then_one_that_speaks_hbone() {
    let entry = |name: &str, tunnel_protocol| {
        let mut it = pod(&format!("a/{name}"), &["10.0.0.1"]);
        it.uid =
            WorkloadUid(format!("Kubernetes/networking.istio.io/WorkloadEntry/a/{name}").into());
        it.tunnel_protocol = tunnel_protocol;
        it
    };
    let found = |view: &MeshView| {
        view.workload_at(&at("10.0.0.1"))
            .map(|it| it.name.to_string())
    };
    let mut view = view([entry("a-plain", TunnelProtocol::None).into()]);
    assert_eq!(found(&view).as_deref(), Some("a-plain"));
    apply(&mut view, [entry("z-hbone", TunnelProtocol::Hbone).into()]);
    assert_eq!(found(&view).as_deref(), Some("z-hbone"));
    let plain_pod = {
        let mut it = pod("a/pod", &["10.0.0.1"]);
        it.tunnel_protocol = TunnelProtocol::None;
        it
    };
    apply(&mut view, [plain_pod.clone().into()]);
    assert_eq!(found(&view).as_deref(), Some("pod"));
    remove(&mut view, Removal::Address(plain_pod.uid.0));
    assert_eq!(found(&view).as_deref(), Some("z-hbone"));
}

#[test]
fn a_workload_on_its_nodes_address_is_never_found_by_it() {
    let host = {
        let mut it = pod("a/web", &["10.0.0.1"]);
        it.network_mode = NetworkMode::HostNetwork;
        it
    };
    let mut view = view([host.into()]);
    assert!(view.workload_at(&at("10.0.0.1")).is_none());
    apply(&mut view, [pod("a/web", &["10.0.0.1"]).into()]);
    assert!(view.workload_at(&at("10.0.0.1")).is_some());
}

#[test]
fn endpoints_wait_for_their_service_and_outlive_it() {
    let mut view = view([pod("a/web-1", &["10.0.0.1"])
        .serving(WEB, &[(80, 8080)])
        .into()]);
    assert_eq!(view.staged().collect::<Vec<_>>(), [&key(WEB)]);
    apply(&mut view, [service(WEB, &["10.1.0.1"], &[(80, 0)]).into()]);
    assert_eq!(view.staged().count(), 0);
    assert_eq!(names(&view.endpoints(&key(WEB))), ["web-1"]);
    remove(&mut view, Removal::Address(WEB.into()));
    assert!(view.service(&key(WEB)).is_none());
    assert!(view.service_at(&at("10.1.0.1"), "a").is_none());
    assert_eq!(view.staged().collect::<Vec<_>>(), [&key(WEB)]);
}

#[test]
fn endpoints_follow_their_workload() {
    let web = |name: &str| pod(&format!("a/{name}"), &["10.0.0.1"]).serving(WEB, &[(80, 1)]);
    let endpoints = |view: &MeshView| names(&view.endpoints(&key(WEB)));
    let mut view = view([web("one").into(), web("two").into()]);
    assert_eq!(endpoints(&view), ["one", "two"]);
    let sick = Workload {
        status: Health::Unhealthy,
        node: "n9".into(),
        ..web("two")
    };
    apply(&mut view, [sick.into()]);
    assert_eq!(endpoints(&view), ["one", "two"], "unhealthy ones are kept");
    let left = {
        let mut it = web("two");
        it.services = PortsOfServices::new();
        it
    };
    apply(&mut view, [left.into()]);
    assert_eq!(endpoints(&view), ["one"]);
    apply(&mut view, [web("one").serving(WEB, &[(80, 2)]).into()]);
    let all = view.endpoints(&key(WEB));
    assert_eq!(all.iter().next().unwrap().ports()[&80], 2);
    remove(&mut view, Removal::Address("Kubernetes//Pod/a/one".into()));
    assert_eq!(endpoints(&view), Vec::<String>::new());
    assert_eq!(view.staged().count(), 0);
}

#[test]
fn upserts_come_before_removals_and_unknown_names_are_no_error() {
    let mut view = MeshView::default();
    let changes = view.apply(Update {
        upserts: vec![pod("a/web", &["10.0.0.1"]).into()],
        removals: vec![
            Removal::Address("Kubernetes//Pod/a/web".into()),
            Removal::Address("a/unknown".into()),
            Removal::Address("nonsense".into()),
            Removal::Policy("a/unknown".into()),
            Removal::Policy("nonsense".into()),
        ],
    });
    assert_eq!(view.sizes(), [0, 0, 0]);
    assert_eq!(changes.workloads.len(), 2);
}

#[test]
fn a_policy_and_a_service_of_one_name_are_removed_apart() {
    let shared = service("a/web", &["10.1.0.1"], &[]);
    let mut view = view([shared.into(), policy("a/web", PolicyScope::Global).into()]);
    remove(&mut view, Removal::Policy("a/web".into()));
    assert_eq!(view.sizes(), [0, 1, 0]);
    remove(&mut view, Removal::Address("a/web".into()));
    assert_eq!(view.sizes(), [0, 0, 0]);
}

#[test]
fn what_is_sent_again_unchanged_changes_nothing() {
    let all: [Resource; 3] = [
        pod("a/web", &["10.0.0.1"]).into(),
        service(WEB, &["10.1.0.1"], &[]).into(),
        policy("a/p", PolicyScope::Namespace).into(),
    ];
    let mut view = view(all.clone());
    let changes = view.apply(Update {
        upserts: all.into(),
        removals: Vec::new(),
    });
    assert!(changes.is_empty());
    assert_eq!(view.version(), 1);
}

/// The namespace of the service that a client of `client` reaches at an address.
#[track_caller]
fn reaches(view: &MeshView, address: &str, client: &str, expected: Option<&str>) {
    let service = view.service_at(&at(address), client);
    assert_eq!(
        service.map(|it| &*it.hostname),
        expected,
        "{address} from {client}"
    );
}

#[test]
fn of_services_with_one_address_the_nearest_wins() {
    let shared = |key: &str, canonical, visibility| Service {
        canonical,
        visibility,
        ..service(key, &["10.1.0.1"], &[])
    };
    use Visibility::{Namespace, Public};
    let mut view = view([shared("x/first", false, Public).into()]);
    apply(&mut view, [shared("y/hidden", true, Namespace).into()]);
    reaches(&view, "10.1.0.1", "z", Some("first"));
    reaches(&view, "10.1.0.1", "y", Some("hidden"));
    apply(&mut view, [shared("w/canonical", true, Public).into()]);
    reaches(&view, "10.1.0.1", "z", Some("canonical"));
    reaches(&view, "10.1.0.1", "x", Some("first"));
    let hostnames = view.services_by_hostname("first").count();
    assert_eq!(hostnames, 1);
}

fn ranged(key: &str, cidrs: &[&str], canonical: bool) -> Service {
    let cidr_vips = cidrs.iter().map(|it| CidrVip {
        network: "".into(),
        cidr: it.parse().unwrap(),
    });
    Service {
        cidr_vips: cidr_vips.collect(),
        canonical,
        ..service(key, &[], &[])
    }
}

#[test]
fn an_exact_address_beats_a_range_and_of_ranges_the_nearest_then_longest_wins() {
    let mut view = view([
        ranged("x/wide", &["10.1.0.0/16", "fd00::/16"], false).into(),
        ranged("x/narrow", &["10.1.2.0/24"], false).into(),
        ranged("y/own", &["10.0.0.0/8"], false).into(),
        service("x/exact", &["10.1.2.3"], &[]).into(),
    ]);
    reaches(&view, "10.1.2.3", "z", Some("exact"));
    reaches(&view, "10.1.2.4", "z", Some("narrow"));
    reaches(&view, "10.1.3.4", "z", Some("wide"));
    reaches(&view, "10.1.2.4", "y", Some("own"));
    reaches(&view, "fd00::1", "z", Some("wide"));
    reaches(&view, "11.0.0.1", "z", None);
    apply(
        &mut view,
        [ranged("w/canonical", &["10.1.2.0/24"], true).into()],
    );
    reaches(&view, "10.1.2.4", "z", Some("canonical"));
}

#[test]
fn a_range_that_a_service_gave_up_is_gone() {
    let mut view = view([ranged("x/a", &["10.1.0.0/16"], false).into()]);
    apply(&mut view, [ranged("x/a", &["10.2.0.0/16"], false).into()]);
    reaches(&view, "10.1.0.1", "x", None);
    reaches(&view, "10.2.0.1", "x", Some("a"));
    remove(&mut view, Removal::Address("x/a".into()));
    reaches(&view, "10.2.0.1", "x", None);
    assert!(view.cidr_lengths.is_empty());
}

#[test]
fn policies_apply_by_scope_once_each_and_a_named_one_may_be_unknown() {
    let mut view = view([
        policy("root/global", PolicyScope::Global).into(),
        policy("a/own", PolicyScope::Namespace).into(),
        policy("b/other", PolicyScope::Namespace).into(),
        policy("a/selected", PolicyScope::WorkloadSelector).into(),
        policy("a/not-selected", PolicyScope::WorkloadSelector).into(),
    ]);
    let mut web = pod("a/web", &[]);
    web.authorization_policies = ["a/own", "a/selected", "a/late"]
        .map(|it| it.parse().unwrap())
        .into();
    let applying = |view: &MeshView| {
        let applicable = view.policies_for(&web);
        let keys = applicable.policies.iter().map(|it| it.key.to_string());
        (
            keys.collect::<Vec<_>>(),
            applicable.unknown.map(ToString::to_string),
        )
    };
    let expected = ["root/global", "a/own", "a/selected"].map(str::to_owned);
    assert_eq!(applying(&view), (expected.into(), Some("a/late".into())));
    apply(
        &mut view,
        [policy("root/global", PolicyScope::Namespace).into()],
    );
    apply(
        &mut view,
        [policy("a/late", PolicyScope::WorkloadSelector).into()],
    );
    let expected = ["a/own", "a/selected", "a/late"].map(str::to_owned);
    assert_eq!(applying(&view), (expected.into(), None));
    for key in [
        "root/global",
        "a/own",
        "b/other",
        "a/selected",
        "a/not-selected",
        "a/late",
    ] {
        remove(&mut view, Removal::Policy(key.into()));
    }
    assert!(view.global.is_empty() && view.by_namespace.len() == 0);
}

/// Every index, by how much it holds.
fn footprint(view: &MeshView) -> Vec<usize> {
    vec![
        view.workloads.len(),
        view.workloads.indexed(),
        view.services.len(),
        view.by_vip.len(),
        view.by_cidr.len(),
        view.cidr_lengths.len(),
        view.by_hostname.len(),
        view.endpoints.len(),
        view.policies.len(),
        view.by_namespace.len(),
        view.global.len(),
        view.by_vip.iter().map(|(_, keys)| keys.len()).sum(),
        view.by_cidr.iter().map(|(_, keys)| keys.len()).sum(),
        view.endpoints.iter().map(|(_, it)| it.len()).sum(),
        view.cidr_lengths.values().sum(),
    ]
}

#[test]
fn an_object_that_is_updated_a_hundred_thousand_times_leaves_no_trace() {
    let resources = |round: u32| -> [Resource; 3] {
        let last = round % 200 + 1;
        let web = Workload {
            node: format!("n{}", round % 7).into(),
            status: if round.is_multiple_of(2) {
                Health::Healthy
            } else {
                Health::Unhealthy
            },
            ..pod("a/web", &[&format!("10.0.0.{last}")]).serving(WEB, &[(80, 8080)])
        };
        let ranged = Service {
            vips: vec![at(&format!("10.1.0.{last}"))],
            waypoint: Some(gateway(WEB, 15008)),
            ..ranged(WEB, &[&format!("10.{last}.0.0/16")], true)
        };
        let scope = [
            PolicyScope::Global,
            PolicyScope::Namespace,
            PolicyScope::WorkloadSelector,
        ];
        [
            web.into(),
            ranged.into(),
            policy("a/p", scope[(round % 3) as usize]).into(),
        ]
    };
    let mut view = view(resources(0));
    let (first, kept) = (footprint(&view), view.clone());
    for round in 1..=100_002 {
        apply(&mut view, resources(round));
    }
    // 100,002 is 0 modulo 2, 3, and its last scope is that of round 0.
    assert_eq!(footprint(&view), first);
    assert_eq!(footprint(&kept), first);
    remove(&mut view, Removal::Address("Kubernetes//Pod/a/web".into()));
    remove(&mut view, Removal::Address(WEB.into()));
    remove(&mut view, Removal::Policy("a/p".into()));
    assert!(
        footprint(&view).iter().all(|size| *size == 0),
        "{:?}",
        footprint(&view)
    );
}

/// The order in which resources and removals come does not matter for where the view ends.
#[test]
fn any_order_of_the_same_upserts_gives_the_same_answers() {
    let resources: Vec<Resource> = (0..40)
        .flat_map(|number: u32| {
            let address = format!("10.0.0.{}", number % 8 + 1);
            let serving = format!("a/s{}.a.svc.cluster.local", number % 3);
            [
                Resource::from(
                    pod(&format!("a/p{number}"), &[&address]).serving(&serving, &[(80, 1)]),
                ),
                service(&serving, &[&format!("10.1.0.{}", number % 3)], &[(80, 0)]).into(),
            ]
        })
        .collect();
    let answers = |view: &MeshView| {
        let dump = crate::dump::ConfigDump::from(view);
        let owners = (1..=8).map(|last| view.workload_at(&at(&format!("10.0.0.{last}"))).cloned());
        (
            serde_json::to_string(&dump).unwrap(),
            owners.collect::<Vec<_>>(),
        )
    };
    let expected = answers(&view(resources.clone()));
    for seed in 0..20 {
        let mut shuffled = resources.clone();
        crate::draw::Draw(seed).shuffle(&mut shuffled);
        assert_eq!(answers(&view(shuffled)), expected);
    }
}
