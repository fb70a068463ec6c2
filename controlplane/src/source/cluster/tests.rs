//! The whole way from an API server to resources and statuses, over an API server that misbehaves by script.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{Request, Response, StatusCode};
use http_body_util::{Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::{Client, client::Body};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinSet};

use super::{Troubles, kinds, start};
use crate::{
    metrics::KubernetesEvents,
    object::Kind,
    output::{Subscription, Truth},
    testing::DEADLINE,
    world::{Selectors, Settings, World},
};

type ResponseBody = UnsyncBoxBody<Bytes, Infallible>;

const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const POLICIES: &str = "/apis/security.istio.io/v1/authorizationpolicies";
const TAGS: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";

/// An API server whose every answer a test can choose. Unlike a real one it checks nothing.
#[derive(Clone, Default)]
struct Scripted(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    /// The version of everything.
    version: u64,
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    watches: HashMap<String, Vec<mpsc::UnboundedSender<String>>>,
    /// Answers instead of the right one, by path; `None` is a broken connection.
    refused: HashMap<String, Option<u16>>,
    /// Watches from versions below are told that history is compacted.
    compacted: u64,
    lists: HashMap<String, u32>,
    opened: HashMap<String, Vec<u64>>,
    page: usize,
}

impl Scripted {
    fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let answer = server.answer(&request);
            async move { answer.ok_or("connection refused") }
        });
        Client::new(service, "default")
    }

    fn answer(&self, request: &Request<Body>) -> Option<Response<ResponseBody>> {
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or_default();
        let value = |key: &str| {
            let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs
                .find(|(name, _)| *name == key)
                .map(|(_, value)| value.to_owned())
        };
        let mut script = self.0.lock();
        match script.refused.get(&path).or(script.refused.get("")) {
            Some(None) => return None,
            Some(Some(code)) => return Some(status(*code)),
            None => {}
        }
        if value("watch").is_some() {
            let from = value("resourceVersion")?.parse().ok()?;
            return Some(script.watch(&path, from));
        }
        let from = value("continue")
            .and_then(|at| at.parse().ok())
            .unwrap_or(0);
        Some(script.list(&path, from, value("limit").as_deref() == Some("1")))
    }

    /// Puts an object and tells whoever watches.
    fn put(&self, path: &str, object: &Value) {
        let mut script = self.0.lock();
        script.version += 1;
        let mut object = object.clone();
        object["metadata"]["resourceVersion"] = json!(script.version.to_string());
        let known = script.objects.entry(path.to_owned()).or_default();
        let kind = match known.insert(key(&object), object.clone()) {
            Some(_) => "MODIFIED",
            None => "ADDED",
        };
        script.tell(path, kind, &object);
    }

    fn remove(&self, path: &str, key: &str) {
        let mut script = self.0.lock();
        script.version += 1;
        let known = script.objects.entry(path.to_owned()).or_default();
        let Some(mut object) = known.remove(key) else {
            return;
        };
        object["metadata"]["resourceVersion"] = json!(script.version.to_string());
        script.tell(path, "DELETED", &object);
    }

    /// Changes what is there without a word to those who watch.
    fn change_unheard(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.0.lock());
    }

    fn tell(&self, path: &str, kind: &str, object: &Value) {
        self.0.lock().tell(path, kind, object);
    }

    /// Ends all open watches.
    fn cut(&self) {
        self.0.lock().watches.clear();
    }

    fn refuse(&self, path: &str, code: Option<u16>) {
        self.0.lock().refused.insert(path.to_owned(), code);
    }

    fn heal_path(&self, path: &str) {
        self.0.lock().refused.remove(path);
    }

    fn heal(&self) {
        self.0.lock().refused.clear();
    }

    fn lists(&self, path: &str) -> u32 {
        self.0.lock().lists.get(path).copied().unwrap_or_default()
    }

    fn opened(&self, path: &str) -> Vec<u64> {
        self.0.lock().opened.get(path).cloned().unwrap_or_default()
    }
}

impl Script {
    fn watch(&mut self, path: &str, from: u64) -> Response<ResponseBody> {
        if from < self.compacted {
            return status(410);
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        // What happened since then, as a real server replays it.
        for object in self
            .objects
            .get(path)
            .into_iter()
            .flat_map(BTreeMap::values)
        {
            if version(object) > from {
                drop(sender.send(line("MODIFIED", object)));
            }
        }
        self.opened.entry(path.to_owned()).or_default().push(from);
        self.watches
            .entry(path.to_owned())
            .or_default()
            .push(sender);
        let lines = stream::unfold(receiver, |mut receiver| async move {
            let line = receiver.recv().await?;
            Some((Ok(Frame::data(Bytes::from(line))), receiver))
        });
        Response::new(UnsyncBoxBody::new(StreamBody::new(lines.boxed())))
    }

    fn list(&mut self, path: &str, from: usize, is_probe: bool) -> Response<ResponseBody> {
        if !is_probe && from == 0 {
            *self.lists.entry(path.to_owned()).or_default() += 1;
        }
        let all: Vec<&Value> = self
            .objects
            .get(path)
            .into_iter()
            .flat_map(BTreeMap::values)
            .collect();
        let page = if self.page == 0 { all.len() } else { self.page };
        let items: Vec<&&Value> = all.iter().skip(from).take(page).collect();
        let end = from + items.len();
        let next = (end < all.len()).then(|| end.to_string());
        json_response(
            StatusCode::OK,
            &json!({"metadata": {"resourceVersion": self.version.to_string(), "continue": next}, "items": items}),
        )
    }

    fn tell(&mut self, path: &str, kind: &str, object: &Value) {
        let line = line(kind, object);
        if let Some(watches) = self.watches.get_mut(path) {
            watches.retain(|watch| watch.send(line.clone()).is_ok());
        }
    }
}

fn line(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

fn version(object: &Value) -> u64 {
    let text = object["metadata"]["resourceVersion"].as_str();
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

fn key(object: &Value) -> String {
    let part = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", part("namespace"), part("name"))
}

fn json_response(code: StatusCode, value: &Value) -> Response<ResponseBody> {
    let body = UnsyncBoxBody::new(Full::new(Bytes::from(value.to_string())));
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response
}

fn status(code: u16) -> Response<ResponseBody> {
    let message = match code {
        403 => "User \"istiod\" cannot list resource",
        _ => "scripted",
    };
    let body = json!({"kind": "Status", "code": code, "reason": "Scripted", "message": message});
    json_response(StatusCode::from_u16(code).unwrap(), &body)
}

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("{name}-uid"), "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "serviceAccountName": "web", "containers": []},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn namespace(name: &str, labels: &Value) -> Value {
    json!({"metadata": {"name": name, "labels": labels}})
}

fn crd(plural: &str) -> Value {
    json!({"metadata": {"name": plural}})
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop", "uid": "p", "generation": 3},
        "spec": spec,
    })
}

const ENTRIES: &str = "/apis/networking.istio.io/v1/serviceentries";

fn entry(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "resourceVersion": "1"},
        "spec": {"hosts": [format!("{name}.test")], "location": "MESH_EXTERNAL", "resolution": "STATIC",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
            "endpoints": [{"address": "192.0.2.1"}]}})
}

/// A world over a scripted API server.
struct Fed {
    server: Scripted,
    world: World,
    changes: Subscription,
    feed: super::Feed,
    troubles: Troubles,
    _informers: JoinSet<()>,
}

impl Fed {
    fn start(server: &Scripted) -> Self {
        Self::with(server, Selectors::default())
    }

    fn with(server: &Scripted, selectors: Selectors) -> Self {
        let (world, feed) = World::fed(kinds(), Settings::default(), selectors).unwrap();
        let troubles = Troubles::default();
        let informers = start(
            &server.client(),
            "default",
            &feed,
            &troubles,
            &KubernetesEvents::default(),
        );
        Self {
            server: server.clone(),
            changes: world.subscribe(),
            world,
            feed,
            troubles,
            _informers: informers,
        }
    }

    async fn whole(server: &Scripted) -> Self {
        let fed = Self::start(server);
        within(fed.world.listed()).await;
        fed
    }

    /// Waits until there is a resource of this name, or none. A name alone is a pod's.
    async fn until(&self, name: &str, is_there: bool) {
        let wanted = match name.contains('/') {
            true => name.to_owned(),
            false => format!("Kubernetes//Pod/shop/{name}"),
        };
        let there = || {
            // A new reader sees at first everything there is.
            let all = self.world.subscribe().try_next().unwrap_or_default();
            all.upserts.iter().any(|it| *it.name == *wanted)
        };
        poll(|| there() == is_there, name).await;
    }

    async fn until_trouble(&self, resource: &str, part: &str) {
        let there = || {
            let troubles = self.troubles.all();
            troubles
                .get(resource)
                .is_some_and(|text| text.contains(part))
        };
        poll(there, part).await;
    }

    async fn until_opened(&self, path: &str, times: usize) {
        poll(|| self.server.opened(path).len() >= times, path).await;
    }
}

async fn within<T>(wait: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(DEADLINE, wait).await;
    waited.expect("within the deadline")
}

/// Waits for a condition that tells nobody when it comes true.
async fn poll(mut test: impl FnMut() -> bool, what: &str) {
    let wait = async {
        while !test() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let waited = tokio::time::timeout(DEADLINE, wait).await;
    waited.unwrap_or_else(|_| panic!("{what} does not come true"));
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_all_pages_become_resources_and_changes_follow() {
    let server = Scripted::default();
    server.change_unheard(|script| script.page = 2);
    for n in 0..5 {
        server.put(PODS, &pod(&format!("p{n}"), &format!("10.0.0.{n}")));
    }
    let mut fed = Fed::whole(&server).await;
    let first = fed.changes.try_next().unwrap();
    assert_eq!(first.upserts.len(), 5);
    fed.until_opened(PODS, 1).await;
    server.put(PODS, &pod("p9", "10.0.0.9"));
    fed.until("p9", true).await;
    server.remove(PODS, "shop/p9");
    fed.until("p9", false).await;
    assert_eq!(server.lists(PODS), 1);
    assert_eq!(fed.world.pods_on_node("n1").len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_change_that_alters_no_resource_pushes_nothing() {
    let server = Scripted::default();
    server.put(PODS, &pod("web", "10.0.0.1"));
    let mut fed = Fed::whole(&server).await;
    fed.changes.try_next().unwrap();
    fed.until_opened(PODS, 1).await;
    let mut same = pod("web", "10.0.0.1");
    same["metadata"]["annotations"] = json!({"example.org/seen": "now"});
    same["status"]["message"] = json!("still fine");
    server.put(PODS, &same);
    // The next one proves that the first was taken in.
    server.put(PODS, &pod("other", "10.0.0.2"));
    let batch = within(fed.changes.next()).await;
    let names: Vec<_> = batch.upserts.iter().map(|it| &*it.name).collect();
    assert_eq!(names, ["Kubernetes//Pod/shop/other"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_watch_leads_to_a_list_that_tells_what_is_gone() {
    let server = Scripted::default();
    server.put(PODS, &pod("old", "10.0.0.1"));
    server.put(PODS, &pod("kept", "10.0.0.2"));
    let fed = Fed::whole(&server).await;
    fed.until_opened(PODS, 1).await;
    server.change_unheard(|script| {
        script.version += 10;
        script.compacted = script.version;
        script.objects.get_mut(PODS).unwrap().remove("shop/old");
    });
    server.cut();
    fed.until("old", false).await;
    fed.until("kept", true).await;
    assert_eq!(server.lists(PODS), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_told_inside_a_watch_leads_to_a_list() {
    let server = Scripted::default();
    let fed = Fed::whole(&server).await;
    fed.until_opened(PODS, 1).await;
    server.change_unheard(|script| {
        let mut missed = pod("missed", "10.0.0.1");
        script.version += 1;
        missed["metadata"]["resourceVersion"] = json!(script.version.to_string());
        let pods = script.objects.entry(PODS.to_owned()).or_default();
        pods.insert("shop/missed".to_owned(), missed);
    });
    let gone = json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"});
    server.tell(PODS, "ERROR", &gone);
    fed.until("missed", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_restored_from_a_backup_is_believed() {
    let server = Scripted::default();
    server.change_unheard(|script| script.version = 1000);
    server.put(PODS, &pod("late", "10.0.0.1"));
    let fed = Fed::whole(&server).await;
    fed.until_opened(PODS, 1).await;
    // The backup is older than everything that was seen, and knows another pod.
    server.change_unheard(|script| {
        script.version = 10;
        script.objects.clear();
    });
    server.put(PODS, &pod("early", "10.0.0.2"));
    server.cut();
    fed.until("early", true).await;
    fed.until("late", false).await;
    // And its versions, which are low again, are followed.
    fed.until_opened(PODS, 2).await;
    server.put(PODS, &pod("next", "10.0.0.3"));
    fed.until("next", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_repeat_or_go_back_do_not_undo_later_ones() {
    let server = Scripted::default();
    let fed = Fed::whole(&server).await;
    fed.until_opened(PODS, 1).await;
    server.put(PODS, &pod("web", "10.0.0.1"));
    let old = server.0.lock().objects[PODS]["shop/web"].clone();
    server.put(PODS, &pod("web", "10.0.0.2"));
    let new = server.0.lock().objects[PODS]["shop/web"].clone();
    server.tell(PODS, "MODIFIED", &new);
    server.tell(PODS, "MODIFIED", &old);
    fed.until_opened(PODS, 2).await;
    server.put(PODS, &pod("after", "10.0.0.9"));
    fed.until("after", true).await;
    let batch = fed.world.subscribe().try_next().unwrap();
    let web = batch.upserts.iter().find(|it| it.name.ends_with("/web"));
    assert_eq!(*web.unwrap().aliases, ["/10.0.0.2".into()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_watch_goes_on_where_it_was() {
    let server = Scripted::default();
    server.put(PODS, &pod("web", "10.0.0.1"));
    let fed = Fed::whole(&server).await;
    for n in 1..=3 {
        fed.until_opened(PODS, n).await;
        server.cut();
        server.put(PODS, &pod(&format!("p{n}"), &format!("10.0.1.{n}")));
        fed.until(&format!("p{n}"), true).await;
    }
    assert_eq!(server.lists(PODS), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_down_at_the_start_is_waited_for() {
    let server = Scripted::default();
    server.put(PODS, &pod("web", "10.0.0.1"));
    server.refuse("", None);
    let fed = Fed::start(&server);
    fed.until_trouble("pods", "cannot be reached").await;
    assert!(fed.world.unlisted().contains(&Kind::Pod));
    server.heal();
    within(fed.world.listed()).await;
    fed.until("web", true).await;
    poll(|| fed.troubles.all().is_empty(), "no trouble").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_goes_down_later_takes_nothing_away() {
    let server = Scripted::default();
    server.put(PODS, &pod("web", "10.0.0.1"));
    let mut fed = Fed::whole(&server).await;
    fed.until("web", true).await;
    fed.changes.try_next().unwrap();
    fed.until_opened(PODS, 1).await;
    server.refuse("", None);
    server.cut();
    fed.until_trouble("pods", "cannot be reached").await;
    assert!(fed.world.unlisted().is_empty(), "a whole world stays whole");
    fed.until("web", true).await;
    assert_eq!(fed.changes.try_next(), None);
    server.put(PODS, &pod("new", "10.0.0.2"));
    server.heal();
    fed.until("new", true).await;
    fed.until("web", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forbidden_kind_is_named_with_what_is_missing() {
    let server = Scripted::default();
    server.refuse("/api/v1/services", Some(403));
    let fed = Fed::start(&server);
    fed.until_trouble("services", "needs get, list and watch")
        .await;
    poll(
        || fed.world.unlisted() == [Kind::Service].into(),
        "only services",
    )
    .await;
    server.heal();
    within(fed.world.listed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_custom_kind_is_empty_until_its_crd_is_there_and_again_after_it() {
    let server = Scripted::default();
    // Without the CRD, even a list that would be answered is not asked for.
    server.put(
        POLICIES,
        &policy("deny", &json!({"action": "DENY", "rules": [{}]})),
    );
    let fed = Fed::whole(&server).await;
    assert_eq!(server.lists(POLICIES), 0);
    server.refuse(POLICIES, Some(404));
    server.refuse(&POLICIES.replace("/v1/", "/v1beta1/"), Some(404));
    server.put(CRDS, &crd("authorizationpolicies.security.istio.io"));
    let resource = "authorizationpolicies.security.istio.io";
    fed.until_trouble(resource, "does not serve").await;
    server.heal_path(POLICIES);
    fed.until("shop/deny", true).await;
    server.remove(CRDS, "/authorizationpolicies.security.istio.io");
    fed.until("shop/deny", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_with_a_mistake_refuses_and_its_status_says_why() {
    let server = Scripted::default();
    server.put(CRDS, &crd("authorizationpolicies.security.istio.io"));
    let spec =
        json!({"action": "ALLOW", "rules": [{"from": [{"source": {"ipBlocks": ["nonsense"]}}]}]});
    server.put(POLICIES, &policy("bad", &spec));
    let fed = Fed::whole(&server).await;
    fed.until("shop/bad", true).await;
    let mut statuses = fed.world.subscribe_statuses(&[Kind::AuthorizationPolicy]);
    let first = within(statuses.next()).await;
    let [change] = &first[..] else {
        panic!("{first:?}")
    };
    assert_eq!(change.version.as_ref().unwrap().generation, 3);
    let accepted = change.conditions.iter().find(|it| it.type_ == "Accepted");
    let accepted = accepted.unwrap();
    assert_eq!(
        (accepted.status, accepted.reason),
        (Truth::False, "Invalid")
    );
    assert!(
        accepted.message.contains("ipBlocks"),
        "{}",
        accepted.message
    );

    server.remove(POLICIES, "shop/bad");
    let gone = within(statuses.next()).await;
    assert_eq!(
        (gone[0].version.clone(), gone[0].conditions.len()),
        (None, 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_cannot_be_read_is_left_out_alone() {
    let server = Scripted::default();
    let mut bad = pod("bad", "10.0.0.1");
    bad["spec"]["containers"] = json!("none");
    server.put(PODS, &bad);
    server.put(PODS, &pod("good", "10.0.0.2"));
    let fed = Fed::whole(&server).await;
    fed.until("good", true).await;
    fed.until("bad", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_come_into_view_and_leave_it_by_their_labels_and_by_selectors() {
    let server = Scripted::default();
    server.put(NAMESPACES, &namespace("shop", &json!({})));
    server.put(PODS, &pod("web", "10.0.0.1"));
    let selector = |key: &str| {
        let selector = serde_json::from_value(json!({"matchLabels": {key: "yes"}}));
        Selectors::new(vec![selector.unwrap()])
    };
    let fed = Fed::with(&server, selector("mesh"));
    within(fed.world.listed()).await;
    fed.until("web", false).await;
    fed.until_opened(NAMESPACES, 1).await;
    server.put(NAMESPACES, &namespace("shop", &json!({"mesh": "yes"})));
    fed.until("web", true).await;
    server.put(NAMESPACES, &namespace("shop", &json!({"other": "yes"})));
    fed.until("web", false).await;
    // What changes out of view is seen as it is when it comes back.
    server.put(PODS, &pod("more", "10.0.0.2"));
    fed.feed
        .send(super::Event::Selectors(selector("other")))
        .await
        .unwrap();
    fed.until("web", true).await;
    fed.until("more", true).await;
    fed.feed
        .send(super::Event::Selectors(selector("mesh")))
        .await
        .unwrap();
    fed.until("more", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_settings_of_the_mesh_tell_only_what_they_change() {
    let server = Scripted::default();
    server.put(CRDS, &crd("serviceentries.networking.istio.io"));
    server.put(PODS, &pod("web", "10.0.0.1"));
    server.put(ENTRIES, &entry("outside"));
    let mut fed = Fed::whole(&server).await;
    fed.until("web", true).await;
    fed.until("shop/outside.test", true).await;
    while fed.changes.try_next().is_some() {}

    let hidden = serde_json::from_value(json!({"defaultVisibility": "NONE"})).unwrap();
    let settings = Settings {
        entry_visibility: Some(hidden),
        ..Settings::default()
    };
    let settings = super::Event::Settings(Box::new(settings));
    fed.feed.send(settings).await.unwrap();
    let told = within(fed.changes.next()).await;
    let gone: Vec<&str> = told.removals.iter().map(|key| &*key.name).collect();
    assert!(gone.contains(&"shop/outside.test"), "{told:?}");
    let is_of_web = |name: &str| name.contains("Pod/shop/web");
    assert!(
        !told.upserts.iter().any(|it| is_of_web(&it.name)),
        "{told:?}"
    );
    assert!(!gone.iter().any(|name| is_of_web(name)), "{told:?}");

    // What comes later meets the settings that hold now.
    server.put(ENTRIES, &entry("another"));
    server.put(PODS, &pod("more", "10.0.0.2"));
    fed.until("more", true).await;
    fed.until("shop/another.test", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_follow_the_tag_that_points_to_this_revision() {
    let server = Scripted::default();
    server.put(CRDS, &crd("authorizationpolicies.security.istio.io"));
    let mut tagged = policy("deny", &json!({"action": "DENY", "rules": [{}]}));
    tagged["metadata"]["labels"] = json!({"istio.io/rev": "prod"});
    server.put(POLICIES, &tagged);
    let fed = Fed::whole(&server).await;
    fed.until("shop/deny", false).await;
    fed.until_opened(TAGS, 1).await;
    let tag = |revision: &str| {
        json!({"metadata": {"name": "istio-revision-tag-prod",
            "labels": {"istio.io/tag": "prod", "istio.io/rev": revision}}})
    };
    server.put(TAGS, &tag("default"));
    fed.until("shop/deny", true).await;
    server.put(TAGS, &tag("canary"));
    fed.until("shop/deny", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_world_waits_for_the_tags() {
    let server = Scripted::default();
    server.refuse(TAGS, Some(403));
    let fed = Fed::start(&server);
    let resource = "mutatingwebhookconfigurations.admissionregistration.k8s.io";
    fed.until_trouble(resource, "forbidden").await;
    // Every kind of its own accord: what opens a watch has listed.
    for path in [PODS, NAMESPACES, "/api/v1/services", "/api/v1/nodes"] {
        fed.until_opened(path, 1).await;
    }
    assert!(!fed.world.unlisted().is_empty(), "whole without tags");
    server.heal();
    within(fed.world.listed()).await;
}
