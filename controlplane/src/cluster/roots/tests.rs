use std::time::Duration;

use mesh::identity::TrustDomain;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::*;
use crate::{
    ca::{Authority, disk},
    testing::api::{Answer, FakeApi},
};

fn authority() -> Authority {
    let dir = tempfile::tempdir().unwrap();
    disk::load_or_create(dir.path(), &TrustDomain::default()).unwrap()
}

fn namespace(api: &FakeApi, name: &str, labels: Value) {
    let metadata = json!({"name": name, "labels": labels});
    api.put(
        "api/v1",
        "namespaces",
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}),
    );
}

struct Running {
    authority: Arc<Current>,
    discovery: Option<watch::Sender<Discovery>>,
    task: JoinHandle<()>,
}

fn start(api: &FakeApi) -> Running {
    let all: Discovery = Arc::new(|_, _| true);
    let (discovery, allowed) = watch::channel(all);
    let authority = Current::new(authority());
    let roots = Roots::new(ROOTS, api.client(), authority.clone(), allowed);
    Running {
        authority,
        discovery: Some(discovery),
        task: tokio::spawn(roots.run(Leadership::alone())),
    }
}

impl Running {
    async fn given(&self, api: &FakeApi, namespace: &str) -> Value {
        let roots = self.authority.load().roots_pem();
        let right = |found: Option<&Value>| {
            found.is_some_and(|found| {
                found["data"][ROOTS.key] == json!(roots)
                    && found["metadata"]["labels"][LABEL.0] == LABEL.1
            })
        };
        let found = api
            .until(("configmaps", namespace, CONFIG_MAP), right)
            .await;
        found.unwrap()
    }
}

fn writes(api: &FakeApi) -> usize {
    api.calls()
        .iter()
        .filter(|call| call.verb == "patch")
        .count()
}

#[tokio::test(start_paused = true)]
async fn every_namespace_gets_the_roots_and_a_new_one_within_a_second() {
    let api = FakeApi::new();
    for name in [
        "istio-system",
        "kube-system",
        "kube-public",
        "kube-node-lease",
        "shop",
    ] {
        namespace(&api, name, json!({}));
    }
    let running = start(&api);
    for name in ["istio-system", "kube-system", "shop"] {
        running.given(&api, name).await;
    }
    let before = tokio::time::Instant::now();
    namespace(&api, "new", json!({}));
    running.given(&api, "new").await;
    assert!(before.elapsed() < Duration::from_secs(1));
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(writes(&api), 4, "nothing is written twice");
    running.task.abort();
    // Another replica becomes the leader and finds everything as it should be.
    let authority = Current::new(authority());
    let roots = running.authority.load().trusting(&running.authority.load());
    authority.replace(roots);
    let (_sender, allowed) = watch::channel::<Discovery>(Arc::new(|_, _| true));
    let other =
        tokio::spawn(Roots::new(ROOTS, api.client(), authority, allowed).run(Leadership::alone()));
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(writes(&api), 0, "what is right is not written");
    other.abort();
    for name in ["kube-public", "kube-node-lease"] {
        assert_eq!(api.object("configmaps", name, CONFIG_MAP), None);
    }
    running.task.abort();
}

#[tokio::test(start_paused = true)]
async fn edits_by_hand_are_reverted_and_what_is_not_ours_is_left() {
    let api = FakeApi::new();
    namespace(&api, "shop", json!({}));
    let running = start(&api);
    let good = running.given(&api, "shop").await;
    let mut edited = good.clone();
    edited["data"] = json!({ROOTS.key: "mine", "other": "kept"});
    api.put("api/v1", "configmaps", edited);
    assert_eq!(running.given(&api, "shop").await["data"]["other"], "kept");
    let mut unlabelled = good;
    unlabelled["metadata"]["labels"] = json!({});
    api.put("api/v1", "configmaps", unlabelled);
    running.given(&api, "shop").await;
    api.remove("configmaps", "shop", CONFIG_MAP);
    running.given(&api, "shop").await;
    running.task.abort();
}

#[tokio::test(start_paused = true)]
async fn new_roots_go_everywhere() {
    let api = FakeApi::new();
    namespace(&api, "shop", json!({}));
    let mut running = start(&api);
    running.given(&api, "shop").await;
    // Also where the selectors are fixed for good.
    running.discovery = None;
    running.authority.replace(authority());
    running.given(&api, "shop").await;
    running.task.abort();
}

#[tokio::test(start_paused = true)]
async fn only_namespaces_of_the_mesh_get_the_roots() {
    let api = FakeApi::new();
    namespace(&api, "in", json!({"mesh": "yes"}));
    namespace(&api, "out", json!({}));
    let running = start(&api);
    let labelled: Discovery = Arc::new(|_, labels| labels.contains_key("mesh"));
    let selectors = running.discovery.as_ref().unwrap();
    selectors.send_replace(labelled);
    running.given(&api, "in").await;
    namespace(&api, "later", json!({}));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(api.object("configmaps", "later", CONFIG_MAP), None);
    namespace(&api, "later", json!({"mesh": "yes"}));
    running.given(&api, "later").await;
    running.task.abort();
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_refuses_is_asked_again_less_and_less_often() {
    let api = FakeApi::new();
    namespace(&api, "full", json!({}));
    namespace(&api, "shop", json!({}));
    api.on(|call| {
        let full = call.verb == "patch" && call.namespace == "full";
        full.then_some(Answer::Refuse(403, "Forbidden", "exceeded quota"))
    });
    let running = start(&api);
    running.given(&api, "shop").await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!((8..=14).contains(&writes(&api)));
    api.heal();
    tokio::time::sleep(Duration::from_secs(301)).await;
    running.given(&api, "full").await;
    running.task.abort();
}

#[tokio::test(start_paused = true)]
async fn revoked_certificates_are_told_everywhere_once_there_is_a_list() {
    let api = FakeApi::new();
    namespace(&api, "shop", json!({}));
    let (_sender, allowed) = watch::channel::<Discovery>(Arc::new(|_, _| true));
    let current = Current::new(authority());
    let revoked = Roots::new(REVOKED, api.client(), current.clone(), allowed);
    let task = tokio::spawn(revoked.run(Leadership::alone()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(api.object("configmaps", "shop", REVOKED.config_map), None);
    for list in ["first", "second"] {
        current.replace(authority().with_revoked(Some(list.into())));
        let is_told = |found: Option<&Value>| {
            found.is_some_and(|found| found["data"][REVOKED.key] == json!(list))
        };
        let at = ("configmaps", "shop", REVOKED.config_map);
        api.until(at, is_told).await;
    }
    task.abort();
}
