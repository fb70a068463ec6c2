//! The whole agent on a cluster: an API server's objects in, rules, ZDS and annotations out.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cni::{
    agent::{Cluster, Config, Timing},
    install,
    kubernetes::Error,
    rules::host::ProbeSource,
};
use net::zds::Version;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
};

use crate::{
    api::Api,
    flows::{Held, Load, echoes},
    rig::{POD_V4, POD_V6, Rig, bare_namespace, eventually, path, picture, run, scratch},
    tunnel::{Manners, Told, Tunnel},
};

const UID: &str = "0b1c2d3e-0000-4000-8000-000000000001";

struct Agent {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), Error>>,
}

impl Agent {
    fn start(rig: &Rig, api: &Api, folder: &Path) -> Agent {
        let config = Config {
            zds_socket: folder.join("ztunnel.sock"),
            probe_source: Some(ProbeSource::Mark(0x2000)),
            host_netns: Some(path(&rig.node)),
            host_proc: folder.join("proc"),
            timing: Timing {
                leave_least: Duration::from_millis(300),
                leave_most: Duration::from_secs(60),
                leave_poll: Duration::from_millis(20),
                ..Timing::default()
            },
            ..Config::default()
        };
        let cluster = Cluster {
            node: "node1".into(),
            netns_folder: folder.join("netns"),
            run_folder: folder.to_owned(),
            install: settings(folder),
            namespace: "istio-system".into(),
            daemon_set: "istio-cni-node".into(),
            always_leave: false,
        };
        // The second agent of a test finds it.
        let _ = std::os::unix::fs::symlink("/proc", folder.join("proc"));
        let (stop, stopped) = oneshot::channel::<()>();
        let client = api.client();
        let task = tokio::spawn(async move {
            let stop = async {
                let _ = stopped.await;
            };
            cni::kubernetes::run(client, config, &cluster, stop).await
        });
        Agent { stop, task }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.expect("no panic").expect("no error");
    }
}

/// Folders of the host's plugins, in tests that made them.
fn settings(folder: &Path) -> Option<install::Settings> {
    let bin_folder = folder.join("bin");
    bin_folder.exists().then(|| install::Settings {
        plugin: folder.join("plugin"),
        bin_folder,
        config_folder: folder.join("net.d"),
        config_name: None,
        way: install::Way::Chained,
        group_may_read: false,
        entry: install::Entry {
            run_folder: folder.display().to_string(),
            ambient_enabled: true,
            excluded_namespaces: Vec::new(),
            agent_namespace: "istio-system".into(),
        },
    })
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("ztunnel.sock")
}

/// The runtime's file of the pod's namespace.
fn sandbox(rig: &Rig, folder: &Path) {
    let netns = folder.join("netns");
    fs::create_dir_all(&netns).expect("make");
    std::os::unix::fs::symlink(rig.pod_path(), netns.join("cni-1")).expect("link");
}

fn pod(uid: &str, name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop", "uid": uid, "annotations": { "other": "kept" } },
        "spec": { "nodeName": node, "serviceAccountName": "web", "containers": [
            { "name": "app", "ports": [{ "name": "web", "containerPort": 8080 }],
              "readinessProbe": { "httpGet": { "port": "web" } } } ] },
        "status": { "phase": "Running", "podIP": POD_V4.to_string(),
            "podIPs": [{ "ip": POD_V4.to_string() }, { "ip": POD_V6 }] },
    })
}

/// What a plugin hears: the status and the words.
async fn ask(folder: &Path, request: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(folder.join("pluginevent.sock"))
        .await
        .expect("the agent listens");
    stream.write_all(request.as_bytes()).await.expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answered");
    let status = answer.get(9..12).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status.expect("a status"), body.to_owned())
}

fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

async fn add(folder: &Path, uid: Option<&str>, netns: &Path) -> (u16, String) {
    let body = json!({ "Netns": netns, "PodName": "web-0", "PodNamespace": "shop", "PodUID": uid,
        "IPs": [{ "Interface": 0, "Address": { "IP": POD_V4, "Mask": "////AA==" }, "Gateway": null }] });
    ask(folder, &post("/cmdadd", &body.to_string())).await
}

/// As a pod is before its sandbox is made.
fn starting(uid: &str) -> Value {
    let mut pod = pod(uid, "web-0", "node1");
    pod["status"] = json!({ "phase": "Pending" });
    pod
}

async fn reaches(api: &Api, redirection: Option<&str>) {
    let what = format!("annotation {redirection:?}");
    eventually(&what, async || {
        api.redirection("shop", "web-0").as_deref() == redirection
    })
    .await;
}

/// Two workers, as the agent has.
macro_rules! on_a_cluster {
    ($($name:ident => $body:ident),* $(,)?) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let Some(rig) = Rig::new() else { return };
            let folder = scratch();
            $body(&rig, &Api::start().await, folder.path()).await;
        })*
    };
}

on_a_cluster! {
    a_label_on_the_namespace_enrols_a_running_pod_and_its_removal_lets_it_go => by_label,
    pods_of_other_nodes_and_of_the_host_network_are_left_alone => others,
    an_api_server_that_goes_away_changes_nothing => api_away,
    a_pod_that_took_anothers_name_is_not_told_of => renamed,
    a_sandbox_is_used_only_when_its_pod_is_redirected_and_acknowledged => plugin_asks,
    a_pod_that_the_watch_has_not_told_is_asked_for => watch_lags,
    a_sandbox_made_anew_starts_from_nothing => sandbox_again,
    what_the_plugin_should_not_say_is_refused => bad_questions,
    the_end_of_the_daemon_set_takes_pods_out_and_leaves_them_working => uninstall,
    a_restarted_agent_finds_pods_without_looking => restart,
}

async fn by_label(rig: &Rig, api: &Api, folder: &Path) {
    let _echoes = echoes(rig);
    let before = picture(&rig.pod);
    sandbox(rig, folder);
    api.label("shop", None);
    api.put("pods", pod(UID, "web-0", "node1"));
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    tunnel.hears(&Told::SnapshotSent).await;
    assert_eq!(
        *tunnel.told.lock(),
        [Told::SnapshotSent],
        "not labelled yet"
    );
    api.label("shop", Some("ambient"));
    reaches(api, Some("enabled")).await;
    Held::open(rig, 4).await;
    assert_ne!(tunnel.carried(), (0, 0));
    let set = run(&rig.node, "nft list table inet istio-ambient-nat").expect("list");
    assert!(
        set.contains("10.9.0.2 . 8080") && set.contains("fd09::2 . 8080"),
        "{set}"
    );
    api.label("shop", None);
    reaches(api, None).await;
    tunnel.hears(&Told::Delete(UID.into())).await;
    eventually("nothing is left", async || picture(&rig.pod) == before).await;
    agent.stop().await;
}

async fn others(rig: &Rig, api: &Api, folder: &Path) {
    sandbox(rig, folder);
    api.label("shop", Some("ambient"));
    api.put("pods", pod("2", "elsewhere", "node2"));
    let mut host = pod("3", "host", "node1");
    host["spec"]["hostNetwork"] = true.into();
    api.put("pods", host);
    let mut ended = pod("4", "job", "node1");
    ended["status"]["phase"] = "Succeeded".into();
    api.put("pods", ended);
    api.put("pods", pod(UID, "web-0", "node1"));
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V1, Manners::default()).await;
    reaches(api, Some("enabled")).await;
    let added = Told::Add(UID.into());
    let pods = tunnel.told.lock().clone();
    assert!(
        pods.iter()
            .all(|told| *told == added || *told == Told::SnapshotSent),
        "{pods:?}"
    );
    assert_eq!(api.requests("PATCH"), api.requests("PATCH shop/web-0"));
    agent.stop().await;
}

async fn api_away(rig: &Rig, api: &Api, folder: &Path) {
    let _echoes = echoes(rig);
    sandbox(rig, folder);
    api.label("shop", Some("ambient"));
    api.put("pods", pod(UID, "web-0", "node1"));
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    reaches(api, Some("enabled")).await;
    let mut inside = Held::open(rig, 4).await;
    api.set_down(true);
    let rules = run(&rig.pod, "nft -j -s list ruleset").expect("list");
    inside.all_answer("without an API server").await;
    let again = Tunnel::connect_when_ready(&socket(folder)).await;
    again.hears(&Told::Add(UID.into())).await;
    drop(tunnel);
    assert_eq!(
        rules,
        run(&rig.pod, "nft -j -s list ruleset").expect("list")
    );
    let lists = api.requests("LIST");
    api.label("shop", None);
    api.set_down(false);
    reaches(api, None).await;
    assert_eq!(
        lists,
        api.requests("LIST"),
        "the watch goes on where it was"
    );
    agent.stop().await;
}

async fn renamed(rig: &Rig, api: &Api, folder: &Path) {
    sandbox(rig, folder);
    api.label("shop", Some("ambient"));
    api.put("pods", pod(UID, "web-0", "node1"));
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V1, Manners::default()).await;
    reaches(api, Some("enabled")).await;
    // A StatefulSet gives the name to a pod on another node; this node hears of the old one's end.
    api.delete("pods", "shop", "web-0");
    api.put("pods", pod("2", "web-0", "node2"));
    tunnel.hears(&Told::Delete(UID.into())).await;
    eventually("the end is told to nobody", async || {
        api.requests("PATCH shop/web-0") >= 2
    })
    .await;
    assert_eq!(api.redirection("shop", "web-0"), None);
    agent.stop().await;
}

async fn plugin_asks(rig: &Rig, api: &Api, folder: &Path) {
    let _echoes = echoes(rig);
    api.label("shop", Some("ambient"));
    api.put("pods", starting(UID));
    let agent = Agent::start(rig, api, folder);
    let refuse = Arc::new(AtomicUsize::new(2));
    let manners = Manners {
        refuse_adds: refuse.clone(),
        ..Manners::default()
    };
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, manners).await;
    tunnel.hears(&Told::SnapshotSent).await;
    assert_eq!(
        api.requests("PATCH"),
        0,
        "a pod without a sandbox is not pending"
    );
    let (status, why) = add(folder, Some(UID), &rig.pod_path()).await;
    assert_eq!((status, why.as_str()), (200, ""));
    assert_eq!(
        refuse.load(Ordering::SeqCst),
        0,
        "tried until the tunnel said yes"
    );
    let rules = run(&rig.pod, "nft list ruleset").expect("list");
    assert!(rules.contains("istio-ambient-nat"), "{rules}");
    Held::open(rig, 2).await;
    assert_ne!(tunnel.carried(), (0, 0));
    reaches(api, Some("enabled")).await;
    // The status comes later and changes nothing; asking again neither.
    api.put("pods", annotated(api, pod(UID, "web-0", "node1")));
    let handles = run(&rig.pod, "nft -j -s list ruleset").expect("list");
    assert_eq!(add(folder, Some(UID), &rig.pod_path()).await.0, 200);
    assert_eq!(
        handles,
        run(&rig.pod, "nft -j -s list ruleset").expect("list")
    );
    // Whoever does not take part passes.
    api.label("shop", None);
    reaches(api, None).await;
    assert_eq!(add(folder, None, &rig.pod_path()).await.0, 200);
    agent.stop().await;
}

/// The object with the annotations that it has by now.
fn annotated(api: &Api, mut object: Value) -> Value {
    let redirection = api.redirection("shop", "web-0");
    object["metadata"]["annotations"]["ambient.istio.io/redirection"] = redirection.into();
    object
}

async fn watch_lags(rig: &Rig, api: &Api, folder: &Path) {
    api.label("shop", Some("ambient"));
    let agent = Agent::start(rig, api, folder);
    let _tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    api.hide_from_watches(true);
    let (status, why) = add(folder, Some(UID), &rig.pod_path()).await;
    assert_eq!(status, 503);
    assert!(why.contains("not found"), "{why}");
    api.put("pods", starting(UID));
    let (status, why) = add(folder, Some("another"), &rig.pod_path()).await;
    assert_eq!(status, 503, "{why}");
    assert_eq!(add(folder, Some(UID), &rig.pod_path()).await.0, 200);
    reaches(api, Some("enabled")).await;
    agent.stop().await;
}

async fn sandbox_again(rig: &Rig, api: &Api, folder: &Path) {
    api.label("shop", Some("ambient"));
    api.put("pods", starting(UID));
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    let first = bare_namespace().expect("a namespace");
    for netns in [path(&first), rig.pod_path()] {
        let (status, why) = add(folder, Some(UID), &netns).await;
        assert_eq!(status, 200, "{why}");
    }
    for netns in [&first, &rig.pod] {
        let rules = run(netns, "nft list ruleset").expect("list");
        assert!(rules.contains("istio-ambient-nat"), "{rules}");
    }
    let adds = tunnel
        .told
        .lock()
        .iter()
        .filter(|told| **told == Told::Add(UID.into()))
        .count();
    assert_eq!(adds, 2, "the tunnel has the new one too");
    agent.stop().await;
}

async fn bad_questions(rig: &Rig, api: &Api, folder: &Path) {
    api.label("shop", Some("ambient"));
    api.put("pods", starting(UID));
    let agent = Agent::start(rig, api, folder);
    let _tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    for (question, status) in [
        (post("/cmdadd", ""), 400),
        (post("/cmdadd", "{}"), 400),
        (post("/cmdadd", &"x".repeat(70_000)), 400),
        (post("/other", "{}"), 404),
        (
            "GET /cmdadd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(),
            405,
        ),
    ] {
        assert_eq!(ask(folder, &question).await.0, status);
    }
    let (status, why) = add(folder, Some(UID), &folder.join("nowhere")).await;
    assert_eq!(status, 400);
    assert!(why.contains("nowhere"), "{why}");
    let (status, why) = add(folder, Some(UID), &path(&rig.node)).await;
    assert_eq!(status, 503);
    assert!(why.contains("node's own"), "{why}");
    agent.stop().await;
}

async fn restart(rig: &Rig, api: &Api, folder: &Path) {
    api.label("shop", Some("ambient"));
    api.put("pods", starting(UID));
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    assert_eq!(add(folder, Some(UID), &rig.pod_path()).await.0, 200);
    reaches(api, Some("enabled")).await;
    agent.stop().await;
    drop(tunnel);
    let rules = run(&rig.pod, "nft -j -s list ruleset").expect("list");
    let patches = api.requests("PATCH");
    // No address in the status yet, and no file to be found: only what the first agent knew.
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect_when_ready(&socket(folder)).await;
    tunnel.hears(&Told::SnapshotSent).await;
    assert_eq!(
        *tunnel.told.lock(),
        [Told::Add(UID.into()), Told::SnapshotSent]
    );
    assert_eq!(
        rules,
        run(&rig.pod, "nft -j -s list ruleset").expect("list")
    );
    assert_eq!(patches, api.requests("PATCH"));
    agent.stop().await;
}

async fn uninstall(rig: &Rig, api: &Api, folder: &Path) {
    let _echoes = echoes(rig);
    let before = picture(&rig.pod);
    for name in ["bin", "net.d"] {
        fs::create_dir_all(folder.join(name)).expect("make");
    }
    fs::write(folder.join("plugin"), "#!plugin").expect("write");
    let list = folder.join("net.d/10-rig.conflist");
    fs::write(&list, r#"{"name":"rig","plugins":[{"type":"bridge"}]}"#).expect("write");
    let chained = || {
        fs::read_to_string(&list)
            .expect("a list")
            .contains("istio-cni")
    };
    sandbox(rig, folder);
    api.label("shop", Some("ambient"));
    api.put("pods", pod(UID, "web-0", "node1"));
    let agent = Agent::start(rig, api, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    reaches(api, Some("enabled")).await;
    eventually("the plugin is installed", async || chained()).await;
    let mut inside = Held::open(rig, 8).await;
    let load = Load::start(rig);
    load.more(20).await;
    api.uninstall();
    let ends = tokio::spawn(agent.stop());
    reaches(api, None).await;
    eventually("new pods start outside", async || !chained()).await;
    assert_eq!(add(folder, Some(UID), &rig.pod_path()).await.0, 200);
    load.more(20).await;
    inside.all_answer("while the node leaves").await;
    drop(inside);
    ends.await.expect("no panic");
    assert!(tunnel.told.lock().contains(&Told::Delete(UID.into())));
    load.more(20).await;
    load.finish().await;
    assert_eq!(before, picture(&rig.pod));
    let host = run(&rig.node, "nft list ruleset").expect("list");
    assert!(!host.contains("istio"), "{host}");
    for left in [
        "bin/istio-cni",
        "pluginevent.sock",
        "log.sock",
        "leyline-pods.json",
    ] {
        assert!(!folder.join(left).exists(), "{left}");
    }
}
