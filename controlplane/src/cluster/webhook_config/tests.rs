use mesh::identity::TrustDomain;
use tokio::task::JoinHandle;

use super::*;
use crate::{
    ca::{Authority, disk},
    metrics::Metrics,
    testing::api::{Answer, FakeApi},
};

const NAME: &str = "istio-validator-istio-system";
const IT: (&str, &str, &str) = ("validatingwebhookconfigurations", "", NAME);
const GROUP: &str = "apis/admissionregistration.k8s.io/v1";

fn authority() -> Authority {
    let dir = tempfile::tempdir().unwrap();
    disk::load_or_create(dir.path(), &TrustDomain::default()).unwrap()
}

/// As the chart makes it.
fn put(api: &FakeApi) {
    let ours = json!({
        "name": "rev.validation.istio.io",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Ignore",
        "clientConfig": {"service": {"name": "istiod", "namespace": "istio-system", "path": "/validate"}},
        "rules": [{"operations": ["CREATE"], "apiGroups": ["security.istio.io"], "apiVersions": ["*"], "resources": ["*"]}],
    });
    let elsewhere = json!({
        "name": "other.example.com",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Ignore",
        "clientConfig": {"url": "https://example.com/validate"},
    });
    let configuration = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": NAME},
        "webhooks": [ours, elsewhere],
    });
    api.put(GROUP, IT.0, configuration);
}

/// Whether the API server asks our webhook.
fn asked(api: &FakeApi, asked: bool) {
    api.on(move |call| {
        let probe = call.resource == "serviceentries" && call.query.contains_key("dryRun");
        let marked = !call.body["metadata"]["annotations"][ALWAYS_REJECT].is_null();
        let message = "admission webhook denied the request: metadata.annotations[\"internal.istio.io/webhook-always-reject\"]: asks to be refused";
        (probe && marked && asked).then_some(Answer::Refuse(422, "Invalid", message))
    });
}

fn lead(api: &FakeApi) -> (Arc<Current>, JoinHandle<()>) {
    let authority = Current::new(authority());
    let [name, _] = names("istio-system", "default");
    let config = WebhookConfig::new(
        api.client(),
        (authority.clone(), Metrics::new()),
        "istio-system",
        "default",
        name,
    );
    (authority, tokio::spawn(config.run(Leadership::alone())))
}

fn is(authority: &Authority, policy: &'static str) -> impl Fn(Option<&Value>) -> bool {
    let bundle = k8s_openapi::ByteString(authority.roots_pem().into_bytes());
    let bundle = serde_json::to_value(bundle).unwrap();
    move |found| {
        let ours = &found.unwrap()["webhooks"][0];
        ours["failurePolicy"] == policy && ours["clientConfig"]["caBundle"] == bundle
    }
}

#[test]
fn names_are_upstreams() {
    let of = |revision| {
        names("istio-system", revision)
            .into_iter()
            .map(|(name, _)| name)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        of("default"),
        ["istio-validator-istio-system", "istiod-default-validator"]
    );
    assert_eq!(
        of("canary"),
        [
            "istio-validator-canary-istio-system",
            "istiod-default-validator"
        ]
    );
}

#[test]
fn the_validator_of_objects_without_a_revision_is_whose_label_it_bears() {
    let labelled = |label: Option<&str>| {
        let labels = label.map(|label| ("istio.io/rev".to_owned(), label.to_owned()));
        let mut found = Configuration::default();
        found.metadata.labels = Some(labels.into_iter().collect());
        found
    };
    for (label, default, canary) in [
        (None, true, false),
        (Some("default"), true, false),
        (Some("canary"), false, true),
    ] {
        let found = labelled(label);
        let held = (is_of(&found, "default"), is_of(&found, "canary"));
        assert_eq!(held, (default, canary), "{label:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_passes_without_us_once_the_api_server_asks_us_and_not_before() {
    let api = FakeApi::new();
    put(&api);
    asked(&api, false);
    let (authority, task) = lead(&api);
    let before = api
        .until(IT, is(&authority.load(), "Ignore"))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(api.object(IT.0, IT.1, IT.2).unwrap(), before);
    let probes = api
        .calls()
        .iter()
        .filter(|call| call.verb == "create")
        .count();
    assert!(
        (10..25).contains(&probes),
        "asked less and less often: {probes}"
    );
    asked(&api, true);
    tokio::time::sleep(LONGEST_PAUSE).await;
    let after = api.until(IT, is(&authority.load(), "Fail")).await.unwrap();
    let webhooks = |found: &Value| found["webhooks"].clone();
    assert_eq!(
        webhooks(&after)[1],
        webhooks(&before)[1],
        "what is not ours is left"
    );
    assert_eq!(webhooks(&after)[0]["rules"], webhooks(&before)[0]["rules"]);
    assert!(
        api.object("serviceentries", "istio-system", PROBE)
            .is_none()
    );
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn edits_and_new_roots_are_followed() {
    let api = FakeApi::new();
    asked(&api, true);
    let (authority, task) = lead(&api);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(
        api.calls().iter().all(|call| call.verb != "patch"),
        "there is nothing to write"
    );
    put(&api);
    api.until(IT, is(&authority.load(), "Fail")).await;
    // `helm upgrade` writes the chart's own again.
    put(&api);
    api.until(IT, is(&authority.load(), "Fail")).await;
    authority.replace(super::tests::authority());
    api.until(IT, is(&authority.load(), "Fail")).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    let _ = api.calls();
    tokio::time::sleep(Duration::from_secs(600)).await;
    let calls = api.calls();
    let idle = calls.iter().all(|call| call.verb == "watch");
    assert!(idle, "what is right is left alone: {calls:?}");
    task.abort();
}

#[test]
fn what_is_written_is_owned_by_whoever_owned_it_before() {
    let of = |managers: &[&str]| {
        let entries = managers.iter().map(|it| json!({"manager": it}));
        let found = json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": NAME, "managedFields": entries.collect::<Vec<_>>()},
        });
        let found: Configuration = serde_json::from_value(found).unwrap();
        disown(&found).map(|patch| patch["metadata"]["managedFields"].clone())
    };
    assert_eq!(of(&["helm", MANAGER]), Some(json!([{"manager": "helm"}])));
    assert_eq!(of(&["helm"]), None);
    assert_eq!(of(&[MANAGER]), None);
}
