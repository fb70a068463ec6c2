//! On real folders.

use super::*;
use net::ready::Ready;

const LIST: &str = r#"{"cniVersion":"1.0.0","name":"rig","plugins":[{"type":"bridge"}]}"#;

struct Node {
    folder: tempfile::TempDir,
    settings: Settings,
}

impl Node {
    fn new(way: Way) -> Node {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("bin")).expect("make");
        fs::create_dir_all(path("net.d")).expect("make");
        fs::write(path("plugin"), b"#!plugin").expect("write");
        let settings = Settings {
            plugin: path("plugin"),
            bin_folder: path("bin"),
            config_folder: path("net.d"),
            config_name: None,
            way,
            group_may_read: false,
            entry: Entry {
                run_folder: "/var/run/istio-cni".into(),
                ambient_enabled: true,
                excluded_namespaces: vec!["kube-system".into()],
                agent_namespace: "istio-system".into(),
            },
        };
        Node { folder, settings }
    }

    fn config(&self, name: &str, text: &str) {
        fs::write(self.settings.config_folder.join(name), text).expect("write");
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.settings.config_folder.join(name)).ok()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.settings.config_folder).expect("list");
        let mut names: Vec<_> = entries
            .map(|entry| file_name(&entry.expect("an entry").path()))
            .collect();
        names.sort();
        names
    }

    fn has_entry(&self, name: &str) -> bool {
        self.read(name).is_some_and(|text| text.contains(PLUGIN))
    }
}

fn owned() -> Way {
    Way::Owned {
        file: "02-istio-cni.conflist".into(),
    }
}

#[test]
fn the_first_usable_configuration_is_chained_into_and_others_are_not() {
    let node = Node::new(Way::Chained);
    node.config("01-broken.conflist", "{");
    node.config("05-notes.txt", LIST);
    node.config("10-rig.conflist", LIST);
    node.config("20-other.conflist", LIST);
    assert!(install(&node.settings).expect("installed"));
    assert!(node.has_entry("10-rig.conflist"));
    assert_eq!(node.read("20-other.conflist").as_deref(), Some(LIST));
    assert_eq!(node.read("01-broken.conflist").as_deref(), Some("{"));
    assert!(
        !install(&node.settings).expect("installed"),
        "nothing left to do"
    );
    let plugin = node.settings.bin_folder.join(PLUGIN);
    assert_eq!(fs::read(&plugin).expect("copied"), b"#!plugin");
    assert_eq!(files::mode(&plugin).expect("mode"), 0o755);
    remove_entry(&node.settings).expect("removed");
    assert!(!node.has_entry("10-rig.conflist"));
    assert!(plugin.exists(), "a runtime may still call it");
    remove_plugin(&node.settings).expect("removed");
    remove_plugin(&node.settings).expect("twice is harmless");
    assert!(!plugin.exists());
}

#[test]
fn a_single_plugins_file_is_renamed_when_it_becomes_a_list() {
    let node = Node::new(Way::Chained);
    node.config("10-weave.conf", r#"{"name":"weave","type":"weave-net"}"#);
    install(&node.settings).expect("installed");
    assert_eq!(node.names(), ["10-weave.conflist"]);
    let mut named = node.settings.clone();
    named.config_name = Some("10-weave.conf".into());
    assert!(!install(&named).expect("found under its new name"));
}

#[test]
fn a_list_of_our_own_comes_first_and_leaves_the_clusters_alone() {
    let node = Node::new(owned());
    node.config("10-rig.conflist", LIST);
    install(&node.settings).expect("installed");
    assert_eq!(node.read("10-rig.conflist").as_deref(), Some(LIST));
    assert!(node.has_entry("02-istio-cni.conflist"));
    assert!(
        !install(&node.settings).expect("installed"),
        "it is not its own primary"
    );
    remove_entry(&node.settings).expect("removed");
    assert_eq!(node.names(), ["10-rig.conflist"]);
    node.config("01-early.conflist", LIST);
    let error = install(&node.settings).expect_err("never read by a runtime");
    assert!(
        error.to_string().contains("ISTIO_OWNED_CNI_CONF_FILENAME"),
        "{error}"
    );
}

#[test]
fn for_others_to_chain_a_configuration_of_its_own_is_written() {
    let node = Node::new(Way::Standalone);
    install(&node.settings).expect("installed");
    assert_eq!(node.names(), [STANDALONE_FILE]);
    remove_entry(&node.settings).expect("removed");
    assert!(node.names().is_empty());
}

#[test]
fn without_a_network_plugin_there_is_nothing_to_chain_into() {
    let node = Node::new(Way::Chained);
    let error = install(&node.settings).expect_err("nothing there");
    assert!(matches!(error, InstallError::NoPrimary { .. }), "{error}");
    assert_eq!(error.result(), "CREATE_CNI_CONFIG_FAILURE");
}

#[test]
fn a_failed_write_leaves_what_was_there_and_no_rest() {
    let node = Node::new(Way::Chained);
    node.config("10-rig.conflist", LIST);
    let mut settings = node.settings.clone();
    settings.plugin = node.folder.path().join("absent");
    let error = install(&settings).expect_err("nothing to copy");
    assert_eq!(error.result(), "COPY_BINARIES_FAILURE");
    assert_eq!(node.read("10-rig.conflist").as_deref(), Some(LIST));
    // Half-written by an agent that was killed.
    fs::write(
        node.settings
            .bin_folder
            .join("istio-cni.leyline-unfinished"),
        "x",
    )
    .expect("write");
    install(&node.settings).expect("installed");
    let left: Vec<_> = fs::read_dir(&node.settings.bin_folder)
        .expect("list")
        .collect();
    assert_eq!(left.len(), 1);
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    within(Duration::from_secs(30), what, holds).await;
}

/// Sooner than what nobody was seen to change is looked at.
async fn before_the_next_look(what: &str, holds: impl Fn() -> bool) {
    within(LOOK_EVERY / 2, what, holds).await;
}

async fn within(time: Duration, what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < time, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_others_rewrite_is_put_right_and_readiness_tells() {
    let node = Node::new(Way::Chained);
    let (ready, telemetry) = (Ready::new(), Telemetry::new("1.2.3"));
    let gate = ready.gate("the CNI plugin");
    let keeper = Keeper::new(node.settings.clone(), gate, telemetry.clone());
    let (leave, leaving) = watch::channel(false);
    let task = tokio::spawn(keeper.run(leaving));
    eventually("the missing configuration is counted", || {
        telemetry
            .text()
            .contains(r#"result="CREATE_CNI_CONFIG_FAILURE""#)
    })
    .await;
    assert_eq!(ready.pending(), ["the CNI plugin"]);
    node.config("10-rig.conflist", LIST);
    eventually("installed", || {
        ready.is_ready() && node.has_entry("10-rig.conflist")
    })
    .await;
    node.config("10-rig.conflist", LIST);
    eventually("put back", || node.has_entry("10-rig.conflist")).await;
    fs::remove_file(node.settings.bin_folder.join(PLUGIN)).expect("remove");
    eventually("copied again", || {
        node.settings.bin_folder.join(PLUGIN).exists()
    })
    .await;
    node.config("05-new.conflist", LIST);
    eventually("the new first one is chained into", || {
        node.has_entry("05-new.conflist")
    })
    .await;
    assert!(
        telemetry
            .text()
            .contains(r#"istio_cni_installs_total{result="SUCCESS"}"#)
    );
    leave.send_replace(true);
    task.await.expect("no panic");
    assert!(!node.has_entry("05-new.conflist") && !node.has_entry("10-rig.conflist"));
}

#[tokio::test]
async fn a_folder_that_is_mounted_late_is_installed_into_without_a_restart() {
    let node = Node::new(Way::Chained);
    node.config("10-rig.conflist", LIST);
    fs::remove_dir(&node.settings.bin_folder).expect("empty so far");
    let (ready, telemetry) = (Ready::new(), Telemetry::new("1.2.3"));
    let gate = ready.gate("the CNI plugin");
    let keeper = Keeper::new(node.settings.clone(), gate, telemetry.clone());
    let (leave, leaving) = watch::channel(false);
    let task = tokio::spawn(keeper.run(leaving));
    eventually("what is missing is counted", || {
        telemetry
            .text()
            .contains(r#"result="COPY_BINARIES_FAILURE""#)
    })
    .await;
    // Without the plugin its entry would fail every new pod of the node.
    assert!(!ready.is_ready() && !node.has_entry("10-rig.conflist"));
    fs::create_dir(&node.settings.bin_folder).expect("make");
    eventually("installed", || {
        ready.is_ready() && node.has_entry("10-rig.conflist")
    })
    .await;
    let plugin = node.settings.bin_folder.join(PLUGIN);
    fs::remove_file(&plugin).expect("remove");
    before_the_next_look("it is watched from then on", || plugin.exists()).await;
    leave.send_replace(true);
    task.await.expect("no panic");
}

#[tokio::test]
async fn a_folder_is_seen_to_come_and_go_by_what_is_above_it() {
    let node = tempfile::tempdir().expect("a folder");
    let path = |below: &str| node.path().join(below);
    let mut watch = Watch::new(&[&path("etc/cni/net.d")]).expect("a watch");
    let by = async |watch: &mut Watch, below: &str| {
        while !watch.watched.contains_key(&path(below)) {
            let told = timeout(Duration::from_secs(10), watch.next()).await;
            told.unwrap_or_else(|_| panic!("{below:?} was not seen"));
            watch.follow().expect("follow");
        }
        assert_eq!(watch.watched.len(), 1);
    };
    watch.follow().expect("follow");
    assert!(watch.watched.contains_key(node.path()));
    fs::create_dir(path("etc")).expect("make");
    by(&mut watch, "etc").await;
    for _ in 0..2 {
        fs::create_dir_all(path("etc/cni/net.d")).expect("make");
        by(&mut watch, "etc/cni/net.d").await;
        fs::remove_dir(path("etc/cni/net.d")).expect("remove");
        by(&mut watch, "etc/cni").await;
    }
}

#[test]
fn a_fight_is_told_once() {
    let mut fight = Fight::default();
    let told: Vec<bool> = (0..8).map(|_| fight.again()).collect();
    assert_eq!(
        told,
        [false, false, false, false, true, false, false, false]
    );
}
