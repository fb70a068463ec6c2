//! The node's rules and sets.

use std::collections::BTreeMap;

use cni::{
    apply::Nft,
    host,
    rules::{ProbeAddresses, host::ProbeSource},
};

use crate::rig::{Rig, picture, run, run_with_input};

fn set(rig: &Rig) -> String {
    run(
        &rig.node,
        "nft list set inet istio-ambient-nat istio-inpod-probe-ports-v4",
    )
    .unwrap_or_default()
}

fn entries(list: &[&str]) -> cni::rules::host::ProbeEntries {
    let entry = |text: &&str| (text.parse().expect("an address"), String::new());
    list.iter().map(entry).collect::<BTreeMap<_, _>>()
}

async fn start(rig: &Rig) -> (host::ProbeSets, tokio::task::JoinHandle<()>) {
    let nft = Nft::find().expect("nft, as the rig has found it");
    let source = ProbeSource::Mark(0x2000);
    let (sets, keeper) = host::install(
        nft,
        Some(rig.node.clone()),
        &source,
        &ProbeAddresses::default(),
    )
    .await
    .expect("install");
    (sets, tokio::spawn(keeper.run()))
}

#[tokio::test]
async fn an_address_that_changed_hands_is_not_taken_from_its_new_pod() {
    let Some(rig) = Rig::new() else { return };
    let (sets, _keeper) = start(&rig).await;
    sets.set("old", entries(&["10.9.0.2:80", "10.9.0.2:81"]))
        .await
        .expect("set");
    sets.set("new", entries(&["10.9.0.2:80"]))
        .await
        .expect("set");
    sets.set("old", entries(&[])).await.expect("set");
    let held = set(&rig);
    assert!(
        held.contains("10.9.0.2 . 80 comment \"new\"") && !held.contains("81"),
        "{held}"
    );
}

#[tokio::test]
async fn a_new_agent_keeps_what_is_there_and_drops_what_is_stale() {
    let Some(rig) = Rig::new() else { return };
    let (sets, keeper) = start(&rig).await;
    sets.set("stays", entries(&["10.9.0.2:80"]))
        .await
        .expect("set");
    sets.set("went", entries(&["10.9.0.3:80"]))
        .await
        .expect("set");
    keeper.abort();
    let (sets, _keeper) = start(&rig).await;
    assert!(
        set(&rig).contains("stays") && set(&rig).contains("went"),
        "no moment without entries"
    );
    sets.keep_only(["stays"]).await;
    sets.set("other", entries(&[])).await.expect("set");
    assert!(
        set(&rig).contains("stays") && !set(&rig).contains("went"),
        "{}",
        set(&rig)
    );
}

#[tokio::test]
async fn a_set_that_someone_else_changed_is_put_right() {
    let Some(rig) = Rig::new() else { return };
    let (sets, _keeper) = start(&rig).await;
    sets.set("a", entries(&["10.9.0.2:80"])).await.expect("set");
    run(
        &rig.node,
        "nft flush set inet istio-ambient-nat istio-inpod-probe-ports-v4",
    )
    .expect("someone's flush");
    // Deleting what is not there fails once; the next try knows.
    assert!(sets.set("a", entries(&[])).await.is_err());
    sets.set("a", entries(&["10.9.0.2:81"])).await.expect("set");
    assert!(set(&rig).contains("10.9.0.2 . 81"));
}

#[tokio::test]
async fn upstreams_sets_are_taken_over_and_removal_leaves_nothing() {
    let Some(rig) = Rig::new() else { return };
    let before = picture(&rig.node);
    let theirs = "add table inet istio-ambient-nat\n\
        add set inet istio-ambient-nat istio-inpod-probes-v4 { type ipv4_addr; }\n\
        add chain inet istio-ambient-nat postrouting { type nat hook postrouting priority 100; }\n\
        add rule inet istio-ambient-nat postrouting meta skuid 0 ip daddr @istio-inpod-probes-v4 \
        counter snat ip to 169.254.7.127\n";
    run_with_input(&rig.node, "nft -f -", theirs);
    let (_sets, _keeper) = start(&rig).await;
    let rules = run(&rig.node, "nft list ruleset").expect("list");
    assert!(
        !rules.contains("probes-v4") && !rules.contains("skuid"),
        "{rules}"
    );
    let nft = Nft::find().expect("nft");
    host::uninstall(&nft, Some(&rig.node))
        .await
        .expect("uninstall");
    assert_eq!(before, picture(&rig.node));
}
