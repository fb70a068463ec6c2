//! A node's worth of pods, enrolled one right after another.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh::{
    names::WorkloadUid,
    view::{Resource, Update},
    workload::{TunnelProtocol, Workload},
};
use net::{
    mesh_state::MeshState,
    netns::Netns,
    testing::TestCa,
    tls::Policy,
    zds::{Request, WorkloadInfo},
};

use crate::rig::{eventually, network, node::Begun, soon};

/// As many as a node of a large cluster may run, and some.
const PODS: usize = 330;
/// Sockets of one pod: three listeners, and DNS over UDP and TCP on both loopbacks; its namespace; and some room.
const FILES_PER_POD: usize = 9;
/// The agent gives up an answer after 5 s; a crowd must not come near.
const SLOWEST: Duration = Duration::from_secs(1);

fn name(pod: usize) -> String {
    format!("crowd-{pod}")
}

fn record(pod: usize) -> Resource {
    let uid = WorkloadUid(format!("Kubernetes//Pod/ns/{}", name(pod)).into());
    let mut record = Workload::new(uid, name(pod).into(), "ns".into());
    record.service_account = "crowd".into();
    record.node = "node-a".into();
    record.tunnel_protocol = TunnelProtocol::Hbone;
    Resource::Workload(record)
}

fn add(pod: usize, netns: &Netns) -> Request {
    Request::Add {
        uid: name(pod),
        info: WorkloadInfo {
            name: name(pod),
            namespace: "ns".to_owned(),
            service_account: "crowd".to_owned(),
        },
        netns: netns.clone(),
    }
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn resident_kib() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|it| it.parse().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_worth_of_pods_is_served_at_once_with_one_certificate_for_their_account() {
    let pods = match network::bare_pods(PODS + 1) {
        Ok(pods) => pods,
        Err(reason) => return println!("skipped: no network namespaces here: {reason}"),
    };
    let ca = Arc::new(TestCa::new("cluster.local", &Policy::default()));
    let state = MeshState::new();
    state.publish(Update {
        upserts: (0..=PODS).map(record).collect(),
        removals: Vec::new(),
    });
    let begun = Begun::new("node-a", ca.clone(), state, &[]);
    let mut node = begun.connected().await;
    let agent = &mut node.agent;
    // The first one brings what all share.
    soon(agent.link().call(&add(PODS, &pods[PODS])))
        .await
        .expect("served");
    let (files, kib, began) = (open_files(), resident_kib(), Instant::now());
    let mut took = Vec::new();
    for (pod, netns) in pods.iter().take(PODS).enumerate() {
        let asked = Instant::now();
        soon(agent.link().call(&add(pod, netns)))
            .await
            .expect("served");
        took.push(asked.elapsed());
    }
    let all = began.elapsed();
    agent.call(Request::SnapshotSent).await;
    took.sort();
    let files = open_files() - files;
    println!(
        "{PODS} pods in {all:?}: an answer takes {:?} (median), {:?} at most; {:.1} files and {:.1} KiB per pod",
        took[PODS / 2],
        took[PODS - 1],
        ratio(files),
        ratio(resident_kib().saturating_sub(kib)),
    );
    assert!(took[PODS - 1] < SLOWEST, "{:?}", took[PODS - 1]);
    assert!(files <= FILES_PER_POD * PODS, "{files} files");
    assert_eq!(ca.issued(), 1);
    let before = open_files();
    for pod in 0..PODS {
        agent.call(Request::Delete { uid: name(pod) }).await;
    }
    eventually("their sockets are gone", async || {
        open_files() + (FILES_PER_POD - 2) * PODS <= before
    })
    .await;
}

fn ratio(total: usize) -> f64 {
    f64::from(u32::try_from(total).unwrap_or(u32::MAX))
        / f64::from(u32::try_from(PODS).unwrap_or(1))
}
