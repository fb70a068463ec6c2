use serde_json::json;
use tokio::task::JoinHandle;

use super::*;
use crate::testing::api::{Answer, FakeApi};

const NAMESPACE: &str = "istio-system";
const THE_SECRET: (&str, &str, &str) = ("secrets", NAMESPACE, SECRET);

fn settings() -> CaSettings {
    CaSettings {
        namespace: NAMESPACE.to_owned(),
        trust_domain: TrustDomain::default(),
        plug_in: None,
        default_ttl: Duration::from_secs(24 * 3600),
        max_ttl: Duration::from_secs(90 * 24 * 3600),
    }
}

async fn load(api: &FakeApi) -> Result<CaStore, StoreError> {
    CaStore::load(api.client(), settings()).await
}

/// A replica that has loaded and follows.
async fn replica(api: &FakeApi) -> (Arc<CaStore>, JoinHandle<()>) {
    let store = Arc::new(load(api).await.unwrap());
    let task = tokio::spawn(store.clone().keep(Leadership::alone(), Metrics::new()));
    (store, task)
}

fn roots(store: &CaStore) -> usize {
    store.current().load().roots().len()
}

async fn until(store: &CaStore, test: impl Fn(&Authority) -> bool) {
    let mut changes = store.current().changes();
    let wait = async {
        while !test(&store.current().load()) {
            changes.changed().await.unwrap();
        }
    };
    let waited = tokio::time::timeout(crate::testing::DEADLINE, wait).await;
    waited.expect("the authority in force changes");
}

#[tokio::test]
async fn the_first_start_stores_a_root_and_every_later_one_adopts_it() {
    let api = FakeApi::new();
    let first = load(&api).await.unwrap();
    let secret = api.object("secrets", NAMESPACE, SECRET).unwrap();
    assert_eq!(secret["type"], "istio.io/ca-root");
    let keys: Vec<_> = secret["data"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["ca-cert.pem", "ca-key.pem", "root-cert.pem"]);
    let second = load(&api).await.unwrap();
    let pem = |store: &CaStore| store.current().load().roots_pem();
    assert_eq!(pem(&first), pem(&second));
    assert!(second.current().load().vouches_for(&first.current().load()));
}

#[tokio::test]
async fn replicas_that_start_at_once_agree_on_one_root() {
    let api = FakeApi::new();
    let starts = (0..5).map(|_| load(&api));
    let stores = futures_util::future::join_all(starts).await;
    let mut pems = stores
        .iter()
        .map(|store| store.as_ref().unwrap().current().load().roots_pem());
    let first = pems.next().unwrap();
    assert!(pems.all(|pem| pem == first));
}

#[tokio::test(start_paused = true)]
async fn a_root_whose_storing_was_not_confirmed_is_read_again_and_not_made_twice() {
    let api = FakeApi::new();
    let mut lost = false;
    api.on(move |call| {
        let first = call.verb == "create" && !std::mem::replace(&mut lost, true);
        first.then_some(Answer::Refuse(504, "Timeout", "timed out"))
    });
    load(&api).await.unwrap();
    let creates = |calls: Vec<crate::testing::api::Call>| {
        calls.iter().filter(|call| call.verb == "create").count()
    };
    assert_eq!(creates(api.calls()), 2);
}

#[tokio::test(start_paused = true)]
async fn without_a_stored_key_there_is_no_authority() {
    for (verb, code, reason) in [
        ("create", 403, "Forbidden"),
        ("get", 403, "Forbidden"),
        // A full quota, and an etcd that is out of space: 60 s of tries, then the end.
        ("create", 403, "Forbidden"),
        ("create", 500, "InternalError"),
    ] {
        let api = FakeApi::new();
        api.on(move |call| (call.verb == verb).then_some(Answer::Refuse(code, reason, "no")));
        let error = load(&api).await.unwrap_err();
        let expected = match verb {
            "create" => "store a new root in the Secret istio-system/istio-ca-secret",
            _ => "read the Secret istio-system/istio-ca-secret of the root",
        };
        assert_eq!(error.to_string(), expected);
        assert!(api.object("secrets", NAMESPACE, SECRET).is_none());
    }
}

#[tokio::test]
async fn a_secret_that_cannot_be_used_ends_the_start_and_is_left_alone() {
    let api = FakeApi::new();
    load(&api).await.unwrap();
    let good = api.object("secrets", NAMESPACE, SECRET).unwrap();
    for key in ["ca-cert.pem", "ca-key.pem", "root-cert.pem"] {
        let mut damaged = good.clone();
        damaged["data"][key] = json!("bm9uc2Vuc2U=");
        api.put("api/v1", "secrets", damaged);
        let before = api.object("secrets", NAMESPACE, SECRET);
        let error = load(&api).await.unwrap_err();
        assert!(
            matches!(error, StoreError::Content { .. }),
            "{key}: {error:?}"
        );
        assert_eq!(api.object("secrets", NAMESPACE, SECRET), before);
    }
    // Upstream leaves the bundle empty.
    let mut upstream = good.clone();
    upstream["data"]["root-cert.pem"] = json!("");
    api.put("api/v1", "secrets", upstream);
    load(&api).await.unwrap();
}

#[tokio::test]
async fn a_deleted_or_damaged_secret_leaves_the_root_in_force_and_a_deleted_one_is_written_again() {
    let api = FakeApi::new();
    let (store, task) = replica(&api).await;
    let (before, good) = (
        store.current().load(),
        api.object("secrets", NAMESPACE, SECRET).unwrap(),
    );
    api.remove("secrets", NAMESPACE, SECRET);
    let again = api
        .until(THE_SECRET, |secret| secret.is_some())
        .await
        .unwrap();
    assert_eq!(again["data"], good["data"]);
    let mut damaged = again;
    damaged["data"]["ca-key.pem"] = json!("bm9uc2Vuc2U=");
    api.put("api/v1", "secrets", damaged);
    // Another root altogether: nobody trusts it.
    let other = FakeApi::new();
    load(&other).await.unwrap();
    api.put(
        "api/v1",
        "secrets",
        other.object("secrets", NAMESPACE, SECRET).unwrap(),
    );
    // Seen by now: the watch delivers in order, and what follows has effect.
    let mut asked = good;
    asked["metadata"]["annotations"] = json!({"leyline.dev/rotate-root": "now"});
    api.put("api/v1", "secrets", asked);
    until(&store, |authority| authority.roots().len() == 2).await;
    assert!(store.current().load().vouches_for(&before));
    task.abort();
}

/// Moves the life of the next root, as time would.
fn age_next(secret: &mut serde_json::Value, days: i64) {
    let born = OffsetDateTime::now_utc() - time::Duration::days(days);
    let made = crate::ca::root::generate(&TrustDomain::default(), born).unwrap();
    let bytes = |text: &str| k8s_openapi::ByteString(text.as_bytes().to_vec());
    let signer = k8s_openapi::ByteString::deserialize_from(&secret["data"]["ca-cert.pem"]);
    let bundle = format!(
        "{}{}",
        String::from_utf8(signer.0).unwrap(),
        made.certificate
    );
    for (key, text) in [
        ("next-ca-cert.pem", made.certificate.as_str()),
        ("next-ca-key.pem", &made.key),
        ("root-cert.pem", &bundle),
    ] {
        secret["data"][key] = serde_json::to_value(bytes(text)).unwrap();
    }
}

trait FromJson: Sized {
    fn deserialize_from(value: &serde_json::Value) -> Self;
}

impl<T: serde::de::DeserializeOwned> FromJson for T {
    fn deserialize_from(value: &serde_json::Value) -> Self {
        serde_json::from_value(value.clone()).unwrap()
    }
}

#[tokio::test]
async fn a_new_root_is_trusted_first_signs_later_and_the_old_one_goes_last() {
    let api = FakeApi::new();
    let (store, task) = replica(&api).await;
    let old = store.current().load();
    let mut secret = api.object("secrets", NAMESPACE, SECRET).unwrap();
    secret["metadata"]["annotations"] = json!({"leyline.dev/rotate-root": "now"});
    api.put("api/v1", "secrets", secret);
    // Published: both are trusted, the old one signs.
    until(&store, |authority| authority.roots().len() == 2).await;
    let published = store.current().load();
    assert!(published.expiries() != old.expiries() || published.roots()[0] == old.roots()[0]);
    assert!(
        old.vouches_for(&published),
        "nothing is signed by the new root yet"
    );
    // 91 days later.
    let mut secret = api.object("secrets", NAMESPACE, SECRET).unwrap();
    assert!(secret["metadata"]["annotations"]["leyline.dev/rotate-root"].is_null());
    age_next(&mut secret, 91);
    api.put("api/v1", "secrets", secret);
    until(&store, |authority| !old.vouches_for(authority)).await;
    let promoted = store.current().load();
    assert!(promoted.vouches_for(&old), "the old root stays trusted");
    // And 90 days after that.
    let done = |secret: Option<&serde_json::Value>| {
        secret.is_some_and(|secret| secret["data"]["next-ca-key.pem"].is_null())
    };
    let mut secret = api.until(THE_SECRET, done).await.unwrap();
    secret["metadata"]["annotations"]["leyline.dev/old-roots-until"] =
        json!("2020-01-01T00:00:00Z");
    api.put("api/v1", "secrets", secret);
    let retired = |secret: Option<&serde_json::Value>| {
        secret.is_some_and(|secret| {
            secret["metadata"]["annotations"]["leyline.dev/old-roots-until"].is_null()
        })
    };
    api.until(THE_SECRET, retired).await;
    let last = load(&api).await.unwrap();
    assert_eq!(roots(&last), 1);
    assert!(!last.current().load().vouches_for(&old));
    task.abort();
}

#[tokio::test]
async fn a_folder_with_any_file_of_an_intermediate_must_be_complete() {
    let (api, dir) = (FakeApi::new(), tempfile::tempdir().unwrap());
    let with = || CaSettings {
        plug_in: Some(dir.path().to_owned()),
        ..settings()
    };
    // Mounted from no Secret: empty, and our own root is used.
    let own = CaStore::load(api.client(), with()).await.unwrap();
    assert!(own.folder.is_none());
    std::fs::write(dir.path().join("ca-cert.pem"), "x").unwrap();
    let error = CaStore::load(api.client(), with()).await.unwrap_err();
    assert!(matches!(error, StoreError::PlugIn { .. }), "{error:?}");
}

/// Writes a root made by others as a plug-in set, with more roots in the bundle.
fn plug_in(dir: &std::path::Path, made: &crate::ca::root::Root, more: &str) {
    for (file, text) in [
        ("ca-cert.pem", made.certificate.clone()),
        ("ca-key.pem", made.key.clone()),
        ("cert-chain.pem", made.certificate.clone()),
        ("root-cert.pem", format!("{}{more}", made.certificate)),
    ] {
        std::fs::write(dir.join(file), text).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn changed_files_are_taken_over_in_steps_and_bad_ones_are_not() {
    let (api, dir) = (FakeApi::new(), tempfile::tempdir().unwrap());
    let now = OffsetDateTime::now_utc();
    let make = || crate::ca::root::generate(&TrustDomain::default(), now).unwrap();
    let (first, second) = (make(), make());
    plug_in(dir.path(), &first, "");
    let settings = CaSettings {
        plug_in: Some(dir.path().to_owned()),
        ..settings()
    };
    let store = Arc::new(CaStore::load(api.client(), settings).await.unwrap());
    let old = store.current().load();
    let task = tokio::spawn(store.clone().keep(Leadership::alone(), Metrics::new()));
    let rest = || tokio::time::sleep(Duration::from_secs(30));
    // Half a set; a root that has nothing to do with the one in force.
    std::fs::remove_file(dir.path().join("ca-key.pem")).unwrap();
    rest().await;
    plug_in(dir.path(), &second, "");
    rest().await;
    assert_eq!(store.current().load().roots(), old.roots());
    // As it should be done: the new bundle holds the old root.
    plug_in(dir.path(), &second, &first.certificate);
    until(&store, |authority| authority.roots().len() == 2).await;
    assert!(
        old.vouches_for(&store.current().load()),
        "the new root only is trusted"
    );
    tokio::time::sleep(Duration::from_secs(115)).await;
    until(&store, |authority| !old.vouches_for(authority)).await;
    assert!(store.current().load().vouches_for(&old));
    task.abort();
}
