//! A node's worth of pods, enrolled one right after another.

use std::{
    collections::HashSet,
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
    testing::{TestCa, sockets_of},
    tls::Policy,
    zds::{Request, WorkloadInfo},
};

use crate::rig::{eventually, network, node::Begun, soon};

/// As many as a node of a large cluster may run, and some.
const PODS: usize = 330;
/// Sockets of one pod: three listeners, and DNS over UDP and TCP on both loopbacks; its namespace; and some room.
const FILES_PER_POD: usize = 9;
/// The agent gives up an answer after 5 s; nine of ten in a crowd must not come near. One slow answer may be the machine's.
const SLOW: Duration = Duration::from_secs(1);

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

/// What is open for these pods: sockets in their namespaces, and the namespaces themselves. Of this process's files, as tests
/// that run at the same time have files, too.
fn open_files(pods: &[Netns]) -> usize {
    let namespaces: HashSet<_> = pods.iter().map(|pod| pod.id().to_string()).collect();
    let files = std::fs::read_dir("/proc/self/fd").expect("/proc");
    let held = files
        .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
        .filter(|to| to.to_str().is_some_and(|it| namespaces.contains(it)));
    held.count() + pods.iter().map(sockets_of).sum::<usize>()
}

fn resident_kib() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|it| it.parse().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_worth_of_pods_is_served_at_once_with_one_certificate_for_their_account() {
    let mut pods = match network::bare_pods(PODS + 1) {
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
    let first = pods.pop().expect("one more than those");
    soon(agent.link().call(&add(PODS, &first)))
        .await
        .expect("served");
    let before = open_files(&pods);
    let (kib, began) = (resident_kib(), Instant::now());
    let mut took = Vec::new();
    for (pod, netns) in pods.iter().enumerate() {
        let asked = Instant::now();
        soon(agent.link().call(&add(pod, netns)))
            .await
            .expect("served");
        took.push(asked.elapsed());
    }
    let all = began.elapsed();
    agent.call(Request::SnapshotSent).await;
    took.sort();
    let files = open_files(&pods) - before;
    println!(
        "{PODS} pods in {all:?}: an answer takes {:?} (median), {:?} at most; {:.1} files and {:.1} KiB per pod",
        took[PODS / 2],
        took[PODS - 1],
        ratio(files),
        ratio(resident_kib().saturating_sub(kib)),
    );
    let slow = took[PODS * 9 / 10];
    assert!(slow < SLOW, "{slow:?}");
    assert!(files <= FILES_PER_POD * PODS, "{files} files");
    assert_eq!(ca.issued(), 1);
    for pod in 0..PODS {
        agent.call(Request::Delete { uid: name(pod) }).await;
    }
    // Fewer, where another thread held one of them for a moment at the first look.
    eventually("nothing of them is open", async || {
        open_files(&pods) <= before
    })
    .await;
}

fn ratio(total: usize) -> f64 {
    f64::from(u32::try_from(total).unwrap_or(u32::MAX))
        / f64::from(u32::try_from(PODS).unwrap_or(1))
}
