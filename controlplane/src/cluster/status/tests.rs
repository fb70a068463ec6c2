use clap::Parser as _;
use futures_util::stream;
use tokio::{sync::mpsc, task::JoinHandle};

use super::*;
use crate::{
    output::{Condition, ObjectVersion, ParentStatus, Truth},
    testing::api::{Answer, Call, FakeApi},
};

const POLICY: (&str, &str, &str) = ("authorizationpolicies", "shop", "p");

fn condition(type_: &'static str, status: Truth, message: &str) -> Condition {
    Condition {
        type_,
        status,
        reason: "Reason",
        message: message.to_owned().into(),
    }
}

fn change(kind: Kind, name: &str, generation: i64, conditions: Vec<Condition>) -> StatusChange {
    StatusChange {
        parents: std::sync::Arc::default(),
        object: ObjectRef {
            kind,
            name: Name::new("shop", name),
        },
        version: Some(ObjectVersion {
            generation,
            ..ObjectVersion::default()
        }),
        conditions,
        addresses: Vec::new(),
    }
}

fn policy(generation: i64, conditions: Vec<Condition>) -> StatusChange {
    change(Kind::AuthorizationPolicy, "p", generation, conditions)
}

/// An object as its user made it.
fn put(api: &FakeApi, group: &str, plural: &str, kind: &str, name: &str) {
    let version = group.trim_start_matches("apis/").trim_start_matches("api/");
    let metadata = json!({"name": name, "namespace": "shop"});
    let object = json!({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": {}});
    api.put(group, plural, object);
}

fn put_policy(api: &FakeApi) {
    put(
        api,
        "apis/security.istio.io/v1",
        POLICY.0,
        "AuthorizationPolicy",
        "p",
    );
}

/// A leader whose world is what the test sends.
struct Leader {
    changes: mpsc::UnboundedSender<Vec<StatusChange>>,
    task: JoinHandle<()>,
}

fn lead(api: &FakeApi, first: Vec<StatusChange>) -> Leader {
    let (changes, received) = mpsc::unbounded_channel();
    changes.send(first).unwrap();
    let received = std::sync::Mutex::new(Some(received));
    let source = move || {
        let received = received.lock().unwrap().take().unwrap();
        stream::unfold(received, |mut received| async move {
            let next: Vec<StatusChange> = received.recv().await?;
            Some((next, received))
        })
        .chain(stream::pending())
        .boxed()
    };
    let statuses = Statuses::new(api.client(), source);
    Leader {
        changes,
        task: tokio::spawn(statuses.run(Leadership::alone())),
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn patches(api: &FakeApi) -> Vec<Call> {
    let calls = api.calls().into_iter();
    calls.filter(|call| call.verb == "patch").collect()
}

fn has(type_: &'static str, message: &'static str) -> impl Fn(Option<&Value>) -> bool {
    move |object| {
        let conditions = object.and_then(|object| object["status"]["conditions"].as_array());
        let mut conditions = conditions.into_iter().flatten();
        conditions.any(|it| it["type"] == type_ && it["message"] == message)
    }
}

fn has_none(object: Option<&Value>) -> bool {
    let conditions = &object.unwrap()["status"]["conditions"];
    conditions.as_array().is_none_or(Vec::is_empty)
}

#[tokio::test(start_paused = true)]
async fn conditions_are_applied_by_their_owner_once_and_follow_the_generation() {
    let api = FakeApi::new();
    put_policy(&api);
    let told = |generation, message: &str| {
        policy(
            generation,
            vec![
                condition("WaypointAccepted", Truth::False, "no such target"),
                condition("ZtunnelAccepted", Truth::True, message),
                condition("Accepted", Truth::True, "nothing to tell"),
            ],
        )
    };
    let leader = lead(&api, vec![told(1, "taken")]);
    api.until(POLICY, has("ZtunnelAccepted", "taken")).await;
    let object = api
        .until(POLICY, has("WaypointAccepted", "no such target"))
        .await
        .unwrap();
    let conditions = object["status"]["conditions"].as_array().unwrap();
    assert_eq!(
        conditions.len(),
        2,
        "what has nothing to tell is not written"
    );
    assert!(conditions.iter().all(|it| it["observedGeneration"] == 1));
    let mut managers: Vec<_> = patches(&api)
        .into_iter()
        .map(|it| it.query["fieldManager"].clone())
        .collect();
    managers.sort();
    assert_eq!(
        managers,
        [
            "istio-ambient-waypoint-policy",
            "istio-ambient-ztunnel-policy"
        ]
    );
    // The same again is not written, a new generation is.
    leader.changes.send(vec![told(1, "taken")]).unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(patches(&api), []);
    leader.changes.send(vec![told(2, "taken")]).unwrap();
    let second = |object: Option<&Value>| {
        let conditions = object.unwrap()["status"]["conditions"].as_array().unwrap();
        conditions.iter().all(|it| it["observedGeneration"] == 2)
    };
    let object = api.until(POLICY, second).await.unwrap();
    let times = |object: &Value| {
        let conditions = object["status"]["conditions"].as_array().unwrap().iter();
        conditions
            .map(|it| it["lastTransitionTime"].clone())
            .collect::<Vec<_>>()
    };
    assert!(times(&object).iter().all(Value::is_string));
}

#[test]
fn a_transition_keeps_its_time_while_the_status_is_the_same() {
    let standing = |status: &str| {
        vec![Standing {
            type_: "ZtunnelAccepted".to_owned(),
            status: status.to_owned(),
            reason: "Reason".to_owned(),
            message: "old".to_owned(),
            generation: 1,
            since: "2020-01-01T00:00:00Z".to_owned(),
        }]
    };
    let wanted = condition("ZtunnelAccepted", Truth::True, "new");
    let object = policy(1, Vec::new()).object;
    let time = |standing: &[Standing]| {
        let body = plan::body(&object, "security.istio.io/v1", 2, &[&wanted], standing);
        body["status"]["conditions"][0]["lastTransitionTime"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(time(&standing("True")), "2020-01-01T00:00:00Z");
    assert_ne!(time(&standing("False")), "2020-01-01T00:00:00Z");
    assert_ne!(time(&[]), "");
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_writes_only_what_differs() {
    let api = FakeApi::new();
    let names: Vec<String> = (0..1200).map(|n| format!("s{n}")).collect();
    for name in &names {
        put(&api, "api/v1", "services", "Service", name);
    }
    let all = |message: &str| -> Vec<StatusChange> {
        let told = || vec![condition("istio.io/WaypointBound", Truth::True, message)];
        names
            .iter()
            .map(|name| change(Kind::Service, name, 0, told()))
            .collect()
    };
    let start = tokio::time::Instant::now();
    let first = lead(&api, all("bound"));
    for name in &names {
        api.until(
            ("services", "shop", name),
            has("istio.io/WaypointBound", "bound"),
        )
        .await;
    }
    // Paced: 160 at once, then 80 a second.
    assert!(
        start.elapsed() >= Duration::from_secs(12),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(patches(&api).len(), 1200);
    drop(first);
    let mut next = all("bound");
    next[7].conditions = vec![condition("istio.io/WaypointBound", Truth::False, "lost")];
    let _second = lead(&api, next);
    api.until(
        ("services", "shop", "s7"),
        has("istio.io/WaypointBound", "lost"),
    )
    .await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(patches(&api).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_to_be_said_any_more_is_taken_away_and_what_others_say_stays() {
    let api = FakeApi::new();
    put_policy(&api);
    let leader = lead(
        &api,
        vec![policy(
            1,
            vec![condition("ZtunnelAccepted", Truth::True, "taken")],
        )],
    );
    let mut object = api
        .until(POLICY, has("ZtunnelAccepted", "taken"))
        .await
        .unwrap();
    let others = json!({"type": "example.com/Seen", "status": "True", "message": "kept"});
    object["status"]["conditions"]
        .as_array_mut()
        .unwrap()
        .push(others);
    api.put("apis/security.istio.io/v1", POLICY.0, object);
    leader.changes.send(vec![policy(1, Vec::new())]).unwrap();
    let gone = |object: Option<&Value>| !has("ZtunnelAccepted", "taken")(object);
    let object = api.until(POLICY, gone).await;
    assert!(has("example.com/Seen", "kept")(object.as_ref()));
}

#[tokio::test(start_paused = true)]
async fn a_condition_that_another_owns_stays_theirs_and_the_rest_is_written() {
    let api = FakeApi::new();
    put(
        &api,
        "apis/networking.istio.io/v1",
        "serviceentries",
        "ServiceEntry",
        "e",
    );
    let entry = ("serviceentries", "shop", "e");
    api.on(|call| {
        let conditions = call.body["status"]["conditions"].as_array();
        let mut conditions = conditions.into_iter().flatten();
        let bound = conditions.any(|it| it["type"] == "istio.io/WaypointBound");
        (call.verb == "patch" && bound).then_some(Answer::Conflict("istio.io/WaypointBound"))
    });
    let told = vec![
        condition("istio.io/WaypointBound", Truth::True, "ours"),
        condition("HostsClaimed", Truth::False, "lost"),
    ];
    let _leader = lead(&api, vec![change(Kind::ServiceEntry, "e", 1, told)]);
    api.until(entry, has("HostsClaimed", "lost")).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(!has("istio.io/WaypointBound", "ours")(
        api.object(entry.0, entry.1, entry.2).as_ref()
    ));
    // Two requests a try, and less and less often.
    let tries = patches(&api).len();
    assert!((20..60).contains(&tries), "{tries}");
}

#[tokio::test(start_paused = true)]
async fn while_the_api_server_is_away_each_object_waits_once_with_its_newest_state() {
    let api = FakeApi::new();
    put_policy(&api);
    let told = |message: &str| policy(1, vec![condition("ZtunnelAccepted", Truth::True, message)]);
    let leader = lead(&api, vec![told("first")]);
    api.until(POLICY, has("ZtunnelAccepted", "first")).await;
    api.on(|_| Some(Answer::Refuse(503, "ServiceUnavailable", "away")));
    for round in 0..200 {
        leader
            .changes
            .send(vec![told(&format!("round {round}"))])
            .unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(patches(&api).len() < 12, "tried less and less often");
    leader.changes.send(vec![told("last")]).unwrap();
    api.heal();
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert!(has("ZtunnelAccepted", "last")(
        api.object(POLICY.0, POLICY.1, POLICY.2).as_ref()
    ));
    assert_eq!(patches(&api).len(), 1, "the newest state only");
}

#[tokio::test(start_paused = true)]
async fn objects_of_other_revisions_and_objects_that_are_gone_are_left_alone() {
    let api = FakeApi::new();
    put_policy(&api);
    let ignored = policy(
        1,
        vec![
            condition("Ignored", Truth::True, "of revision canary"),
            condition("ZtunnelAccepted", Truth::True, "taken"),
        ],
    );
    let gone = change(
        Kind::Service,
        "gone",
        1,
        vec![condition("istio.io/WaypointBound", Truth::True, "x")],
    );
    let _leader = lead(&api, vec![ignored, gone]);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let tried = patches(&api);
    assert_eq!(tried.len(), 1, "not found, and not tried again");
    assert!(has_none(api.object(POLICY.0, POLICY.1, POLICY.2).as_ref()));
}

#[tokio::test(start_paused = true)]
async fn writers_of_two_revisions_write_once_if_they_agree_and_once_a_look_if_not() {
    for (newer, most) in [("the same", 1), ("otherwise", 2 * 7)] {
        let api = FakeApi::new();
        put(&api, "api/v1", "services", "Service", "web");
        let web = ("services", "shop", "web");
        let says = |message| {
            let told = condition("istio.io/WaypointBound", Truth::True, message);
            vec![change(Kind::Service, "web", 1, vec![told])]
        };
        let _default = lead(&api, says("the same"));
        api.until(web, has("istio.io/WaypointBound", "the same"))
            .await;
        let _canary = lead(&api, says(newer));
        tokio::time::sleep(LOOK_AGAIN * 6).await;
        let written = patches(&api).len();
        assert!((1..=most).contains(&written), "{newer}: {written}");
    }
}

#[tokio::test(start_paused = true)]
async fn addresses_are_written_and_stale_ones_taken_away() {
    let api = FakeApi::new();
    put(
        &api,
        "apis/networking.istio.io/v1",
        "serviceentries",
        "ServiceEntry",
        "e",
    );
    let entry = ("serviceentries", "shop", "e");
    let with = |addresses: &[&str]| {
        let mut change = change(Kind::ServiceEntry, "e", 1, Vec::new());
        let pairs = addresses.iter();
        change.addresses = pairs
            .map(|ip| ("h.example".into(), ip.parse().unwrap()))
            .collect();
        change
    };
    let leader = lead(&api, vec![with(&["240.240.0.1", "2001:2::1"])]);
    let has = |wanted: Value| {
        move |object: Option<&Value>| object.unwrap()["status"]["addresses"] == wanted
    };
    let both = json!([
        {"value": "240.240.0.1", "host": "h.example"},
        {"value": "2001:2::1", "host": "h.example"},
    ]);
    api.until(entry, has(both)).await;
    // Somebody writes in between: the test of the version fails, and it is tried again.
    let mut raced = false;
    let other = api.clone();
    api.on(move |call| {
        if call.verb == "patch" && !std::mem::replace(&mut raced, true) {
            put(
                &other,
                "apis/networking.istio.io/v1",
                "serviceentries",
                "ServiceEntry",
                "e",
            );
        }
        None
    });
    leader.changes.send(vec![with(&["240.240.0.2"])]).unwrap();
    api.until(
        entry,
        has(json!([{"value": "240.240.0.2", "host": "h.example"}])),
    )
    .await;
    leader.changes.send(vec![with(&[])]).unwrap();
    api.until(entry, has(Value::Null)).await;
}

#[tokio::test(start_paused = true)]
async fn parents_are_written_beside_those_of_others_and_taken_away_with_the_last() {
    let api = FakeApi::new();
    let (group, route) = (
        "apis/gateway.networking.k8s.io/v1",
        ("httproutes", "shop", "r"),
    );
    let other = json!({
        "controllerName": "example.com/ingress",
        "parentRef": {"name": "gateway"},
        "conditions": [],
    });
    api.put(
        group,
        "httproutes",
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "r", "namespace": "shop"},
            "status": {"parents": [other]},
        }),
    );
    let with = |generation, parents: &[&str]| {
        let mut change = change(Kind::HttpRoute, "r", generation, Vec::new());
        let parents = parents.iter().map(|name| ParentStatus {
            reference: json!({"group": "", "kind": "Service", "name": name}),
            conditions: vec![condition("Accepted", Truth::True, "kept")],
        });
        change.parents = std::sync::Arc::new(parents.collect());
        change
    };
    let names = |wanted: Value| {
        move |object: Option<&Value>| {
            let parents = object.unwrap()["status"]["parents"].as_array().unwrap();
            let names = parents.iter().map(|it| it["parentRef"]["name"].clone());
            Value::from_iter(names) == wanted
        }
    };
    let leader = lead(&api, vec![with(1, &["web", "api"])]);
    let written = api
        .until(route, names(json!(["gateway", "web", "api"])))
        .await;
    let parents = &written.unwrap()["status"]["parents"];
    assert_eq!(parents[0], other);
    assert_eq!(
        parents[1]["controllerName"],
        "leyline.dev/waypoint-controller"
    );
    assert_eq!(parents[1]["conditions"][0]["observedGeneration"], 1);
    assert_eq!(patches(&api).len(), 1);
    leader.changes.send(vec![with(1, &["web", "api"])]).unwrap();
    leader.changes.send(vec![with(2, &["web"])]).unwrap();
    api.until(route, names(json!(["gateway", "web"]))).await;
    assert_eq!(patches(&api).len(), 1, "what stands is not written");
    leader.changes.send(vec![with(3, &[])]).unwrap();
    api.until(route, names(json!(["gateway"]))).await;
}

#[tokio::test(start_paused = true)]
async fn leadership_lost_in_the_middle_of_a_write_ends_it() {
    let api = FakeApi::new();
    put_policy(&api);
    api.on(|call| (call.verb == "patch").then_some(Answer::Hang));
    let told = policy(1, vec![condition("ZtunnelAccepted", Truth::True, "taken")]);
    let leader = lead(&api, vec![told.clone()]);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(patches(&api).len(), 1);
    drop(leader);
    api.heal();
    // The next leader finds what was not written.
    let _next = lead(&api, vec![told]);
    api.until(POLICY, has("ZtunnelAccepted", "taken")).await;
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_cannot_be_listed_does_not_keep_others_from_being_written() {
    let api = FakeApi::new();
    put_policy(&api);
    api.on(|call| {
        let listed = call.verb == "list" && call.resource == "services";
        listed.then_some(Answer::Refuse(403, "Forbidden", "no"))
    });
    let told = policy(1, vec![condition("ZtunnelAccepted", Truth::True, "taken")]);
    let _leader = lead(&api, vec![told]);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let object = api.object(POLICY.0, POLICY.1, POLICY.2);
    assert!(has("ZtunnelAccepted", "taken")(object.as_ref()));
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_the_cluster_does_not_have_holds_nothing_up_and_is_not_looked_for_again() {
    let api = FakeApi::new();
    put_policy(&api);
    // As the client has it of the API server's page for a group that it does not know.
    api.on(|call| {
        let unknown = call.resource == "wasmplugins";
        let (reason, message) = ("Failed to parse error data", "404 page not found");
        unknown.then_some(Answer::Refuse(404, reason, message))
    });
    let told = policy(1, vec![condition("ZtunnelAccepted", Truth::True, "taken")]);
    let _leader = lead(&api, vec![told]);
    // Before the first look would be made again.
    tokio::time::sleep(LOOK_SOON / 2).await;
    let object = api.object(POLICY.0, POLICY.1, POLICY.2);
    assert!(has("ZtunnelAccepted", "taken")(object.as_ref()));
    tokio::time::sleep(LOOK_AGAIN / 2).await;
    let calls = api.calls();
    let looks = calls
        .iter()
        .filter(|call| call.verb == "list" && call.resource == "wasmplugins");
    assert_eq!(looks.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_came_in_past_admission_is_told_what_is_wrong_with_it() {
    let api = FakeApi::new();
    for (group, plural, kind) in [
        ("security.istio.io", POLICY.0, "AuthorizationPolicy"),
        ("networking.istio.io", "serviceentries", "ServiceEntry"),
    ] {
        let crd = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}")},
            "spec": {
                "group": group, "scope": "Namespaced", "names": {"plural": plural, "kind": kind},
                "versions": [{"name": "v1", "served": true, "storage": true}],
            },
            "status": {"conditions": [{"type": "Established", "status": "True"}]},
        });
        api.put(
            "apis/apiextensions.k8s.io/v1",
            "customresourcedefinitions",
            crd,
        );
    }
    let mut policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": {"action": "DENY"},
    });
    api.put("apis/security.istio.io/v1", POLICY.0, policy.clone());
    let args = ["controlplane", "--meshConfig=absent"];
    let config = crate::config::Args::parse_from(args);
    let config = crate::config::Config::try_from(config).unwrap();
    let (client, mesh) = (api.client(), crate::config::mesh::MeshConfig::default());
    let metrics = crate::metrics::Metrics::new();
    let started = crate::run::kubernetes::Source::start(&client, config, mesh, &metrics);
    let (world, _source) = started.unwrap();
    let listed = tokio::time::timeout(crate::testing::DEADLINE, world.listed());
    listed.await.expect("the world is whole");
    let statuses = Statuses::new(api.client(), move || changes(&world));
    let task = tokio::spawn(statuses.run(Leadership::alone()));
    let refused = |object: Option<&Value>| {
        let conditions = object.unwrap()["status"]["conditions"].as_array();
        let mut conditions = conditions.into_iter().flatten();
        conditions.any(|it| {
            let message = it["message"].as_str().unwrap_or_default();
            it["type"] == "Accepted"
                && it["status"] == "False"
                && message.contains("DENY without rules never matches")
        })
    };
    api.until(POLICY, refused).await;
    // Mended: what was wrong is taken away, and what it does is told.
    policy["spec"] =
        json!({"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["a"]}}]}]});
    let known = api.object(POLICY.0, POLICY.1, POLICY.2).unwrap();
    policy["status"] = known["status"].clone();
    policy["metadata"] = known["metadata"].clone();
    api.put("apis/security.istio.io/v1", POLICY.0, policy);
    let mended = |object: Option<&Value>| {
        let conditions = object.unwrap()["status"]["conditions"].as_array().unwrap();
        conditions.len() == 1
            && conditions[0]["type"] == "ZtunnelAccepted"
            && conditions[0]["status"] == "True"
    };
    api.until(POLICY, mended).await;
    task.abort();
}
