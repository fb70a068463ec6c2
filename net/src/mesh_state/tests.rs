use std::time::Duration;

use mesh::{
    names::{PolicyKey, Str},
    outcome::LocalWorkload,
};
use proto::{security, workload};
use tokio::time::timeout;

use super::*;
use crate::{fixture::SOON, xds::Handler as _};

const UID: &str = "Kubernetes//Pod/a/client-1";

fn workload(name: &str) -> workload::Address {
    workload::Address {
        r#type: Some(workload::address::Type::Workload(workload::Workload {
            uid: format!("Kubernetes//Pod/a/{name}"),
            name: name.to_owned(),
            namespace: "a".to_owned(),
            addresses: vec![vec![10, 0, 0, 1]],
            ..Default::default()
        })),
    }
}

fn policy(name: &str) -> security::Authorization {
    security::Authorization {
        name: name.to_owned(),
        namespace: "a".to_owned(),
        ..Default::default()
    }
}

fn resource(name: &str, body: Vec<u8>) -> xds::Resource {
    xds::Resource {
        name: name.into(),
        aliases: Vec::new(),
        version: String::new(),
        body: body.into(),
    }
}

fn addresses(resources: Vec<xds::Resource>, removed: &[&str]) -> Response {
    Response {
        type_url: proto::ADDRESS_TYPE_URL,
        resources,
        removed: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn policies(resources: Vec<xds::Resource>, removed: &[&str]) -> Response {
    Response {
        type_url: proto::AUTHORIZATION_TYPE_URL,
        ..addresses(resources, removed)
    }
}

fn client() -> Response {
    let body = workload("client-1").encode_to_vec();
    addresses(vec![resource(UID, body)], &[])
}

fn uid() -> WorkloadUid {
    WorkloadUid(UID.into())
}

#[tokio::test]
async fn nothing_is_known_before_the_control_plane_has_answered_for_every_type() {
    let state = MeshState::new();
    state.withhold();
    let mut handler = state.handler();
    handler.apply(client());
    assert!(
        state.view().workload(&uid()).is_none(),
        "its namespace's policies are still to come"
    );
    let waiting = {
        let state = state.clone();
        tokio::spawn(async move {
            let deadline = Instant::now() + SOON;
            let decided = state.decide(deadline, |view| match view.workload(&uid()) {
                Some(_) => Outcome::Go(()),
                None => Outcome::Need(Need::LocalWorkload(LocalWorkload {
                    name: "client-1".into(),
                    namespace: "a".into(),
                    service_account: "default".into(),
                })),
            });
            decided.await.map(|((), view)| view.policies().count())
        })
    };
    let own = security::Authorization {
        scope: security::Scope::Namespace.into(),
        ..policy("deny")
    };
    handler.apply(policies(vec![resource("a/deny", own.encode_to_vec())], &[]));
    assert!(state.view().workload(&uid()).is_none());
    handler.synced();
    assert_eq!(waiting.await.expect("no panic"), Ok(1), "both come at once");
    handler.apply(policies(vec![], &["a/deny"]));
    assert_eq!(
        state.view().policies().count(),
        0,
        "and changes are in force as they come"
    );
}

#[test]
fn a_response_is_one_publish_and_its_bad_resources_are_named() {
    let state = MeshState::new();
    let mut handler = state.handler();
    let unreadable = resource("x", vec![0xff, 0xff]);
    let empty = resource("y", workload::Address::default().encode_to_vec());
    let mut response = client();
    response.resources.extend([unreadable, empty]);
    let before = state.view().version();
    let rejected = handler.apply(response);
    let names: Vec<_> = rejected.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["x", "y"]);
    assert_eq!(rejected[1].reason, "type: missing");
    assert_eq!(state.view().version(), before + 1);
    assert!(state.view().workload(&uid()).is_some());
}

#[test]
fn removals_go_by_the_type_they_came_with() {
    let state = MeshState::new();
    let mut handler = state.handler();
    handler.apply(client());
    handler.apply(policies(
        vec![resource("a/p", policy("p").encode_to_vec())],
        &[],
    ));
    handler.apply(addresses(Vec::new(), &[UID, "a/p", "unknown"]));
    let view = state.view();
    assert!(view.workload(&uid()).is_none());
    assert_eq!(
        view.policies().count(),
        1,
        "an address's name is no policy's"
    );
    handler.apply(policies(Vec::new(), &["a/p"]));
    assert_eq!(state.view().policies().count(), 0);
}

#[test]
fn a_view_in_use_does_not_change() {
    let state = MeshState::new();
    let view = state.view();
    state.handler().apply(client());
    assert!(view.workload(&uid()).is_none());
    assert!(state.view().workload(&uid()).is_some());
}

#[test]
fn an_update_that_changes_nothing_is_not_told() {
    let state = MeshState::new();
    state.handler().apply(client());
    let versions = state.versions();
    state.handler().apply(client());
    assert!(!versions.has_changed().expect("the state lives"));
}

fn find(view: &MeshView) -> Outcome<WorkloadUid> {
    match view.workload(&uid()) {
        Some(found) => Outcome::Go(found.uid.clone()),
        None => Outcome::Need(Need::LocalWorkload(LocalWorkload {
            name: "client-1".into(),
            namespace: "a".into(),
            service_account: "client".into(),
        })),
    }
}

#[tokio::test]
async fn a_decision_waits_for_the_view_that_brings_what_it_lacks() {
    let state = MeshState::new();
    let deciding = tokio::spawn({
        let state = state.clone();
        async move {
            let deadline = Instant::now() + SOON;
            state.decide(deadline, |view| find(view)).await
        }
    });
    let other = workload("other").encode_to_vec();
    state
        .handler()
        .apply(addresses(vec![resource("other", other)], &[]));
    state.handler().apply(client());
    let (found, view) = deciding.await.expect("no panic").expect("it came");
    assert_eq!(found, uid());
    assert!(view.workload(&uid()).is_some());
}

#[tokio::test(start_paused = true)]
async fn silence_of_the_control_plane_is_not_absence() {
    let state = MeshState::new();
    state.fetch_through(xds::Demand::of_nobody());
    let deadline = Instant::now() + Duration::from_secs(5);
    let decided = state.decide(deadline, |_| {
        Outcome::<()>::Need(Need::Resource("net/10.0.0.7".into()))
    });
    let refusal = decided.await.expect_err("nobody answers");
    assert_eq!(refusal.reason, Reason::DestinationUntold);
}

#[tokio::test(start_paused = true)]
async fn a_decision_is_refused_at_its_deadline() {
    let state = MeshState::new();
    let start = Instant::now();
    let deadline = start + Duration::from_secs(5);
    let refused = state.decide(deadline, |view| find(view)).await;
    let refusal = refused.expect_err("it never came");
    assert_eq!(refusal.reason, Reason::UnknownSource);
    assert_eq!(start.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_policy_is_waited_for_and_then_denies() {
    let state = MeshState::new();
    let key = PolicyKey {
        namespace: Str::from("a"),
        name: Str::from("p"),
    };
    let decide = |view: &Arc<MeshView>| match view.policy(&key) {
        Some(_) => Outcome::Go(()),
        None => Outcome::Need(Need::Policy(key.clone())),
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    let refused = state.decide(deadline, decide).await;
    assert_eq!(refused.expect_err("unknown").reason, Reason::PolicyUnknown);
    let body = policy("p").encode_to_vec();
    state
        .handler()
        .apply(policies(vec![resource("a/p", body)], &[]));
    let deadline = Instant::now() + Duration::from_secs(5);
    assert!(state.decide(deadline, decide).await.is_ok());
}

#[tokio::test]
async fn live_connections_hear_of_policies_and_of_their_own_workload() {
    let state = MeshState::new();
    state.handler().apply(client());
    let mut watch = state.watch(&uid());
    let other = workload("other").encode_to_vec();
    state
        .handler()
        .apply(addresses(vec![resource("other", other)], &[]));
    let quiet = timeout(Duration::ZERO, watch.changed()).await;
    assert!(quiet.is_err(), "another workload is no news");
    let body = policy("p").encode_to_vec();
    state
        .handler()
        .apply(policies(vec![resource("a/p", body)], &[]));
    timeout(SOON, watch.changed()).await.expect("a policy is");
    state.handler().apply(addresses(Vec::new(), &[UID]));
    timeout(SOON, watch.changed()).await.expect("so is its own");
    assert!(watch.view().workload(&uid()).is_none());
    let quiet = timeout(Duration::ZERO, watch.changed()).await;
    assert!(quiet.is_err(), "each is told once");
}

#[test]
fn a_watch_that_is_dropped_leaves_nothing_behind() {
    let state = MeshState::new();
    let (first, second) = (state.watch(&uid()), state.watch(&uid()));
    drop(first);
    assert_eq!(state.0.watched.lock().len(), 1);
    drop(second);
    assert!(state.0.watched.lock().is_empty());
}

const BROKEN: &[u8] = b"\xff";

fn alias(name: &str, body: &[u8], aliases: &[&str]) -> xds::Resource {
    let aliases = aliases.iter().map(|it| (*it).to_owned());
    xds::Resource {
        aliases: aliases.collect(),
        ..resource(name, body.to_vec())
    }
}

fn at(state: &MeshState, address: &str) -> Option<TunnelProtocol> {
    let address = address.parse().expect("network/ip");
    let view = state.view();
    view.workload_at(&address).map(|it| it.tunnel_protocol)
}

/// What is unknown is outside the mesh, and gets plaintext: a new destination that cannot be read must not become that.
#[test]
fn a_new_destination_that_cannot_be_read_is_refused_until_it_can() {
    let state = MeshState::new();
    let mut handler = state.handler();
    let broken = alias(UID, BROKEN, &["/10.0.0.1", "/fd00::1"]);
    let rejected = handler.apply(addresses(vec![broken], &[]));
    assert_eq!(rejected.len(), 1);
    assert_eq!(at(&state, "/10.0.0.1"), Some(TunnelProtocol::Unsupported));
    assert_eq!(at(&state, "/fd00::1"), Some(TunnelProtocol::Unsupported));
    handler.apply(client());
    assert_eq!(at(&state, "/10.0.0.1"), Some(TunnelProtocol::None));
    assert_eq!(at(&state, "/fd00::1"), None);
    // What was known stays as it was.
    let broken = alias(UID, BROKEN, &["/10.0.0.1"]);
    assert_eq!(handler.apply(addresses(vec![broken], &[])).len(), 1);
    assert_eq!(at(&state, "/10.0.0.1"), Some(TunnelProtocol::None));
}

#[test]
fn a_new_service_that_cannot_be_read_is_refused_until_it_can_or_is_gone() {
    const NAME: &str = "a/web.a.svc.cluster.local";
    let state = MeshState::new();
    let mut handler = state.handler();
    let broken = || alias(NAME, BROKEN, &["/10.96.0.7"]);
    handler.apply(addresses(vec![broken()], &[]));
    assert_eq!(at(&state, "/10.96.0.7"), Some(TunnelProtocol::Unsupported));
    handler.apply(addresses(Vec::new(), &[NAME]));
    assert_eq!(at(&state, "/10.96.0.7"), None);
    handler.apply(addresses(vec![broken()], &[]));
    let service = workload::Service {
        name: "web".to_owned(),
        namespace: "a".to_owned(),
        hostname: "web.a.svc.cluster.local".to_owned(),
        ..Default::default()
    };
    let good = workload::Address {
        r#type: Some(workload::address::Type::Service(service)),
    };
    let good = alias(NAME, &good.encode_to_vec(), &["/10.96.0.7"]);
    handler.apply(addresses(vec![good], &[]));
    assert_eq!(at(&state, "/10.96.0.7"), None);
    let key = NAME.parse().expect("a key");
    assert!(state.view().service(&key).is_some());
    // Known by now, so what is there stays.
    handler.apply(addresses(vec![broken()], &[]));
    assert_eq!(at(&state, "/10.96.0.7"), None);
}
