//! The whole agent on a cluster: an API server's objects in, rules, ZDS and annotations out.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use cni::{
    agent::{Cluster, Config, RunError, Timing},
    rules::host::ProbeSource,
};
use net::zds::Version;
use serde_json::{Value, json};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    api::Api,
    flows::{Held, echoes},
    rig::{POD_V4, POD_V6, Rig, eventually, path, picture, run, scratch},
    tunnel::{Manners, Told, Tunnel},
};

const UID: &str = "0b1c2d3e-0000-4000-8000-000000000001";

struct Agent {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
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
                leave_most: Duration::from_secs(8),
                leave_poll: Duration::from_millis(20),
                ..Timing::default()
            },
            ..Config::default()
        };
        let cluster = Cluster {
            node: "node1".into(),
            netns_folder: folder.join("netns"),
            run_folder: folder.to_owned(),
        };
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
