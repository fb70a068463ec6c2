use super::*;
use crate::l7::{
    authorization::PolicyAction,
    fixture::{get, route, rule, service},
    name::Target,
    table::Selection,
    telemetry::MetricOptions,
};

fn upsert(view: &mut View, resource: Resource) -> Changes {
    view.apply(Update {
        upserts: vec![resource],
        removals: vec![],
    })
}

fn remove(view: &mut View, name: &str) -> Changes {
    view.apply(Update {
        upserts: vec![],
        removals: vec![name.into()],
    })
}

fn policy(key: &str, targets: Vec<Target>) -> RequestPolicy {
    RequestPolicy {
        key: key.parse().unwrap(),
        targets,
        action: PolicyAction::Allow,
        dry_run: false,
        rules: vec![],
        faults: vec![],
    }
}

fn of_service() -> Target {
    Target::Service(service())
}

fn keys<'a>(policies: impl Iterator<Item = &'a Arc<RequestPolicy>>) -> Vec<String> {
    policies.map(|it| it.key.to_string()).collect()
}

#[test]
fn policies_are_found_by_what_they_are_attached_to() {
    let mut view = View::default();
    for (key, targets) in [
        ("a/z", vec![of_service(), of_service()]),
        ("a/y", vec![of_service()]),
        ("r/w", vec![Target::Waypoint, of_service()]),
        ("r/v", vec![Target::Waypoint]),
    ] {
        upsert(&mut view, Resource::Policy(policy(key, targets)));
    }
    let of = |view: &View, service| keys(view.policies_for(service));
    let own = service();
    assert_eq!(of(&view, None), ["r/v", "r/w"]);
    assert_eq!(of(&view, Some(&own)), ["r/v", "r/w", "a/y", "a/z", "r/w"]);
    let moved = policy("a/z", vec![Target::Waypoint]);
    upsert(&mut view, Resource::Policy(moved));
    assert_eq!(of(&view, None), ["a/z", "r/v", "r/w"]);
    assert!(!remove(&mut view, "policy/r/v").is_empty());
    assert!(remove(&mut view, "policy/r/v").is_empty());
    assert_eq!(of(&view, None), ["a/z", "r/w"]);
}

#[test]
fn the_telemetry_of_a_service_wins_over_the_waypoints() {
    let telemetry = |key: &str, target| {
        Resource::Telemetry(Telemetry {
            key: key.parse().unwrap(),
            targets: vec![target],
            metrics: MetricOptions::default(),
            access_logs: None,
            tracing: None,
        })
    };
    let mut view = View::default();
    let of = |view: &View| {
        let found = view.telemetry_for(Some(&service()));
        found.map(|it| it.key.to_string())
    };
    assert_eq!(of(&view), None);
    upsert(&mut view, telemetry("r/all", Target::Waypoint));
    assert_eq!(of(&view).as_deref(), Some("r/all"));
    upsert(&mut view, telemetry("a/own", of_service()));
    assert_eq!(of(&view).as_deref(), Some("a/own"));
}

#[test]
fn a_change_compiles_the_services_it_touches_and_no_other() {
    let other: NamespacedHostname = "a/other".parse().unwrap();
    let on = |key, services: &[&NamespacedHostname]| {
        let mut route = route(key, vec![rule(key, vec![])]);
        let attachment = route.attachments[0].clone();
        let attachments = services.iter().map(|&it| crate::l7::route::Attachment {
            service: it.clone(),
            ..attachment.clone()
        });
        route.attachments = attachments.collect();
        Resource::Route(route)
    };
    let mut view = View::default();
    let first = on("HTTPRoute/a/one", &[&service(), &other]);
    let changes = upsert(&mut view, first.clone());
    assert_eq!(changes.routed, BTreeSet::from([service(), other.clone()]));
    assert!(upsert(&mut view, first).is_empty(), "nothing new");
    let compiled = |view: &View, key: &NamespacedHostname| view.routes_of(key).map(Arc::as_ptr);
    let before = view.clone();
    upsert(&mut view, on("HTTPRoute/a/two", &[&other]));
    assert_eq!(compiled(&view, &service()), compiled(&before, &service()));
    assert_ne!(compiled(&view, &other), compiled(&before, &other));
    upsert(&mut view, on("HTTPRoute/a/one", &[&other]));
    assert!(view.routes_of(&service()).is_none());
    remove(&mut view, "route/HTTPRoute/a/one");
    remove(&mut view, "route/HTTPRoute/a/two");
    assert!(view.routes_of(&other).is_none());
    assert_eq!(view.routes().count(), 0);
    let request = get("/");
    assert!(
        matches!(before.select(&request.facts()), Selection::Rule(_)),
        "the old snapshot is as it was"
    );
}

#[test]
fn every_kind_comes_and_goes_by_its_name() {
    let mut view = View::default();
    let uid = WorkloadUid("c//Pod/a/web".into());
    let resources = [
        Resource::Workload(ServedWorkload { uid: uid.clone() }),
        Resource::Labels(WorkloadLabels {
            uid: uid.clone(),
            labels: BTreeMap::new(),
        }),
        Resource::Service(ServedService {
            service: service(),
            bound: true,
            ports: BTreeMap::new(),
            resolution: crate::l7::served::Resolution::Static,
            external: false,
        }),
        Resource::Backend(Box::new(BackendPolicy {
            service: service(),
            sources: vec![],
            policy: crate::l7::backend::TrafficPolicy::default(),
            ports: BTreeMap::new(),
            subsets: BTreeMap::new(),
        })),
        Resource::Policy(policy("a/p", vec![of_service()])),
        Resource::Authentication(RequestAuthentication {
            key: "a/p".parse().unwrap(),
            targets: vec![of_service()],
            rules: vec![],
        }),
        Resource::Route(route("HTTPRoute/a/r", vec![])),
    ];
    for resource in resources {
        let name = resource.name();
        assert!(!upsert(&mut view, resource.clone()).is_empty(), "{name}");
        assert!(upsert(&mut view, resource).is_empty(), "{name}: the same");
        assert!(!remove(&mut view, &name).is_empty(), "{name}");
        assert!(remove(&mut view, &name).is_empty(), "{name}: it is gone");
    }
    assert!(!view.serves_workload(&uid));
    for name in ["", "nothing", "route/a", "other/a/b"] {
        assert!(remove(&mut view, name).is_empty(), "{name:?}");
    }
}
