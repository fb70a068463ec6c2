use serde_json::json;
use tokio::task::JoinHandle;

use super::*;
use crate::{
    gateway::{Args, Checked, Mesh},
    testing::api::{Answer, FakeApi},
};

const GROUP: &str = "apis/gateway.networking.k8s.io/v1";

fn start(api: &FakeApi) -> JoinHandle<()> {
    let args = Args {
        deploy_gateways: true,
        make_gateway_classes: true,
        ..Args::default()
    };
    let mesh = Mesh {
        revision: "default".into(),
        system_namespace: "istio-system".into(),
        cluster_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
        trust_domain: "cluster.local".into(),
        network: String::new(),
    };
    let settings = Checked::new(&args).unwrap().of(mesh);
    tokio::spawn(run(api.client(), Arc::new(settings)))
}

fn gateway(api: &FakeApi, name: &str) {
    let listener = json!({"name": "mesh", "port": 15008, "protocol": "HBONE"});
    api.put(
        GROUP,
        "gateways",
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": name, "namespace": "a", "uid": name, "generation": 1},
            "spec": {"gatewayClassName": "leyline-waypoint", "listeners": [listener]},
        }),
    );
}

/// The reason of a condition; empty: there is none.
fn reason<'v>(object: Option<&'v Value>, kind: &str) -> &'v str {
    let conditions = object.and_then(|object| object["status"]["conditions"].as_array());
    let found = conditions
        .into_iter()
        .flatten()
        .find(|it| it["type"] == *kind);
    found
        .and_then(|it| it["reason"].as_str())
        .unwrap_or_default()
}

async fn until_programmed(api: &FakeApi, name: &str, wanted: &str) -> Value {
    let told = |object: Option<&Value>| reason(object, "Programmed") == wanted;
    api.until(("gateways", "a", name), told).await.unwrap()
}

fn set_ready(api: &FakeApi, name: &str, pods: u32) {
    let mut deployment = api.object("deployments", "a", name).unwrap();
    deployment["status"] = json!({"readyReplicas": pods});
    api.put("apis/apps/v1", "deployments", deployment);
}

#[tokio::test(start_paused = true)]
async fn a_gateway_is_deployed_and_told_its_address_once_a_pod_is_ready() {
    let api = FakeApi::new();
    let _task = start(&api);
    gateway(&api, "w");
    let waiting = until_programmed(&api, "w", "AddressNotAssigned").await;
    assert_eq!(reason(Some(&waiting), "Accepted"), "Accepted");
    for resource in ["serviceaccounts", "deployments", "services"] {
        assert!(api.object(resource, "a", "w").is_some(), "{resource}");
    }
    set_ready(&api, "w", 1);
    let serving = until_programmed(&api, "w", "Programmed").await;
    let address = json!([{"type": "Hostname", "value": "w.a.svc.cluster.local"}]);
    assert_eq!(serving["status"]["addresses"], address);
    set_ready(&api, "w", 0);
    let without = until_programmed(&api, "w", "Pending").await;
    assert_eq!(without["status"]["addresses"], address);
}

#[tokio::test(start_paused = true)]
async fn what_others_delete_is_made_again() {
    let api = FakeApi::new();
    let _task = start(&api);
    gateway(&api, "w");
    until_programmed(&api, "w", "AddressNotAssigned").await;
    for (resource, namespace, name) in [
        ("services", "a", "w"),
        ("deployments", "a", "w"),
        ("gatewayclasses", "", "leyline-waypoint"),
    ] {
        api.remove(resource, namespace, name);
        api.until((resource, namespace, name), |object| object.is_some())
            .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_class_is_accepted_again_when_its_status_is_wiped_and_otherwise_left_as_it_is() {
    let api = FakeApi::new();
    let class = |status: Value| {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
            "metadata": {"name": "leyline-waypoint"},
            "spec": {"controllerName": "leyline.dev/waypoint-controller", "description": "by hand"},
            "status": status,
        })
    };
    api.put(GROUP, "gatewayclasses", class(json!({})));
    let _task = start(&api);
    let key = ("gatewayclasses", "", "leyline-waypoint");
    let accepted = |object: Option<&Value>| reason(object, "Accepted") == "Accepted";
    let first = api.until(key, accepted).await.unwrap();
    let observed = &first["status"]["conditions"][0]["observedGeneration"];
    assert_eq!(*observed, first["metadata"]["generation"]);
    assert_eq!(first["spec"]["description"], "by hand");
    api.put(GROUP, "gatewayclasses", class(json!({})));
    api.until(key, accepted).await;
}

#[tokio::test(start_paused = true)]
async fn objects_of_others_are_left_alone_and_the_gateway_says_so() {
    let api = FakeApi::new();
    let theirs = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "w", "namespace": "a"},
        "spec": {"selector": {"app": "theirs"}},
    });
    api.put("api/v1", "services", theirs.clone());
    let _task = start(&api);
    gateway(&api, "w");
    let refused = until_programmed(&api, "w", "Invalid").await;
    assert!(
        refused["status"]["conditions"]
            .to_string()
            .contains("Service a/w is there already"),
        "{refused}"
    );
    assert_eq!(
        api.object("services", "a", "w").unwrap()["spec"],
        theirs["spec"]
    );
    api.remove("services", "a", "w");
    until_programmed(&api, "w", "AddressNotAssigned").await;
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_fails_holds_up_no_other_and_comes_through_later() {
    let api = FakeApi::new();
    api.on(|call| {
        let fails = call.verb == "patch" && call.resource == "deployments" && call.name == "bad";
        fails.then_some(Answer::Refuse(503, "ServiceUnavailable", "not now"))
    });
    let _task = start(&api);
    gateway(&api, "bad");
    gateway(&api, "good");
    until_programmed(&api, "good", "AddressNotAssigned").await;
    assert_eq!(api.object("deployments", "a", "bad"), None);
    api.heal();
    until_programmed(&api, "bad", "AddressNotAssigned").await;
}

#[tokio::test(start_paused = true)]
async fn a_settled_gateway_is_not_written_again() {
    let api = FakeApi::new();
    let _task = start(&api);
    gateway(&api, "w");
    until_programmed(&api, "w", "AddressNotAssigned").await;
    set_ready(&api, "w", 1);
    until_programmed(&api, "w", "Programmed").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    api.calls();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let writes = api
        .calls()
        .into_iter()
        .filter(|call| !matches!(call.verb, "get" | "list" | "watch"));
    assert_eq!(
        writes.map(|call| call.resource).collect::<Vec<_>>(),
        Vec::<String>::new()
    );
}
