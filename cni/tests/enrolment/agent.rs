//! The whole agent: files in, rules and ZDS out.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use cni::{
    agent::{Config, Timing},
    facts::{DATAPLANE_MODE_LABEL, PodFacts},
    local::{EnrolmentFile, enrolments_folder, pods_folder, write_atomically},
    rules::host::ProbeSource,
};
use net::{netns::Netns, socket::Factory, zds::Version};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::oneshot,
    task::{JoinHandle, JoinSet},
};

use crate::{
    flows::{Held, Load, echoes},
    rig::{
        NODE_V4, PATIENCE, POD_V4, POD_V6, Rig, bare_namespace, dial, eventually, ip, on_a_rig,
        path, picture, run, v4,
    },
    tunnel::{Manners, Told, Tunnel},
};

pub(crate) const UID: &str = "0b1c-1";

struct Agent {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), cni::Error>>,
}

impl Agent {
    fn start(rig: &Rig, folder: &Path) -> Agent {
        let config = Config {
            zds_socket: socket(folder),
            probe_source: Some(ProbeSource::Mark(0x2000)),
            host_netns: Some(path(&rig.node)),
            local_folder: Some(folder.to_owned()),
            timing: Timing {
                leave_least: Duration::from_millis(300),
                leave_most: Duration::from_secs(60),
                leave_poll: Duration::from_millis(20),
                ..Timing::default()
            },
            ..Config::default()
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(cni::run(config, async {
            let _ = stopped.await;
        }));
        Agent { stop, task }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.expect("no panic").expect("no error");
    }

    /// As a crash would: no code of its own runs any more.
    async fn crash(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

pub(crate) fn socket(folder: &Path) -> PathBuf {
    folder.join("ztunnel.sock")
}

pub(crate) fn pod(rig: &Rig, mode: Option<&str>) -> PodFacts {
    PodFacts {
        uid: UID.into(),
        name: "web-0".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        ips: vec![POD_V4.into(), ip(POD_V6)],
        netns: Some(rig.pod_path()),
        labels: mode
            .map(|mode| (DATAPLANE_MODE_LABEL.to_owned(), mode.to_owned()))
            .into_iter()
            .collect(),
        probe_ports: vec![8080],
        ..PodFacts::default()
    }
}

pub(crate) fn write(folder: &Path, pod: &PodFacts) {
    fs::create_dir_all(pods_folder(folder)).expect("make");
    let bytes = serde_json::to_vec(pod).expect("facts are JSON");
    write_atomically(&pods_folder(folder), &pod.uid, &bytes).expect("write");
}

pub(crate) fn enrolment(folder: &Path) -> Option<EnrolmentFile> {
    let bytes = fs::read(enrolments_folder(folder).join(format!("{UID}.json"))).ok()?;
    serde_json::from_slice(&bytes).expect("whole files only")
}

pub(crate) async fn reaches(folder: &Path, redirection: &str) {
    let is = async || enrolment(folder).is_some_and(|file| file.redirection == redirection);
    eventually(redirection, is).await;
}

pub(crate) async fn reaches_none(folder: &Path) {
    eventually("no enrolment", async || enrolment(folder).is_none()).await;
}

on_a_rig! {
    joining_and_leaving_lose_no_connection => join_and_leave,
    rejoining_during_a_leave_keeps_the_tunnel => rejoin,
    a_restarted_agent_disturbs_nothing => restart,
    a_crash_between_steps_is_made_good => crash,
    a_crash_during_a_leave_is_made_good => crash_in_leave,
    a_refused_pod_is_pending_until_it_is_taken => refused,
    without_a_tunnel_a_pod_is_pending_and_unharmed => no_tunnel,
    a_pod_that_ends_is_withdrawn_everywhere => ended,
    a_missing_namespace_is_told => missing_namespace,
    probes_pass_the_tunnel_and_the_set_follows_the_pods => probes,
    a_terminating_pod_is_drained_where_the_tunnel_knows_the_word => terminating,
    the_nodes_own_namespace_is_never_enrolled => own_namespace,
    many_pods_join_at_once_and_a_broken_one_holds_up_none => many_pods,
    dns_goes_to_the_tunnel_and_the_tunnels_own_goes_out => dns,
    readiness_names_what_is_missing => readiness,
}

async fn join_and_leave(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    let before = picture(&rig.pod);
    let agent = Agent::start(rig, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    let mut early = Held::open(rig, 50).await;
    let load = Load::start(rig);
    load.more(50).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    early.all_answer("after the join").await;
    load.more(100).await;
    eventually("the tunnel carries both ways", async || {
        let (outbound, inbound) = tunnel.carried();
        outbound > 10 && inbound > 10
    })
    .await;
    let mut inside = Held::open(rig, 50).await;

    write(folder, &pod(rig, None));
    reaches_none(folder).await;
    early.all_answer("after the leave began").await;
    inside.all_answer("after the leave began").await;
    // The tunnel still carries the held ones, so nothing is removed yet.
    load.more(100).await;
    let at_leave = tunnel.carried();
    load.more(50).await;
    assert_eq!(at_leave, tunnel.carried(), "new connections go direct");
    assert!(!tunnel.told.lock().contains(&Told::Delete(UID.into())));
    inside.all_answer("while the pod leaves").await;
    drop(inside);
    tunnel.hears(&Told::Delete(UID.into())).await;
    eventually("nothing is left", async || picture(&rig.pod) == before).await;
    early.all_answer("after everything is removed").await;
    load.more(50).await;
    assert!(load.finish().await > 300);
    agent.stop().await;
}

async fn rejoin(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    let agent = Agent::start(rig, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V1, Manners::default()).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    let mut inside = Held::open(rig, 8).await;
    let load = Load::start(rig);
    for _ in 0..3 {
        write(folder, &pod(rig, None));
        reaches_none(folder).await;
        load.more(10).await;
        write(folder, &pod(rig, Some("ambient")));
        reaches(folder, "enabled").await;
        let carried = tunnel.carried();
        eventually("the tunnel carries again", async || {
            tunnel.carried() != carried
        })
        .await;
    }
    inside.all_answer("after all that").await;
    load.finish().await;
    assert!(
        !tunnel.told.lock().contains(&Told::Delete(UID.into())),
        "never withdrawn"
    );
    agent.stop().await;
}

async fn restart(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    let agent = Agent::start(rig, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    let mut inside = Held::open(rig, 8).await;
    let load = Load::start(rig);
    let rules = || run(&rig.pod, "nft -j -s list ruleset").expect("list");
    let before = rules();
    agent.stop().await;
    tunnel_is_gone(&tunnel).await;
    load.more(20).await;
    let agent = Agent::start(rig, folder);
    let again = Tunnel::connect_when_ready(&socket(folder)).await;
    again.hears(&Told::SnapshotSent).await;
    assert_eq!(
        *again.told.lock(),
        [Told::Add(UID.into()), Told::SnapshotSent]
    );
    load.more(20).await;
    assert_eq!(before, rules(), "handles and all: nothing was written");
    inside.all_answer("after the restart").await;
    assert_eq!(
        enrolment(folder).map(|file| file.redirection).as_deref(),
        Some("enabled")
    );
    load.finish().await;
    drop(tunnel);
    agent.stop().await;
}

/// The stand-in serves its pods on, as a tunnel does that has lost its agent.
async fn tunnel_is_gone(tunnel: &Tunnel) {
    eventually("the tunnel has noticed", async || tunnel.disconnected()).await;
}

async fn crash(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    // Announced, and crashed before a rule was written: the tunnel refuses, so that the agent stays at that step.
    let manners = Manners {
        refuse_adds: Arc::new(AtomicUsize::new(usize::MAX)),
        ..Manners::default()
    };
    let agent = Agent::start(rig, folder);
    let mut tunnel = Tunnel::connect(&socket(folder), Version::V1, manners).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "pending").await;
    agent.crash().await;
    tunnel.kill().await;
    // Rules written, and crashed before it was told.
    let nft = cni::apply::Nft::find().expect("nft");
    let rules = cni::rules::PodRules::default();
    nft.apply(&rig.pod, &rules, cni::rules::Stage::Redirect)
        .await
        .expect("apply");
    let agent = Agent::start(rig, folder);
    let tunnel = Tunnel::connect_when_ready(&socket(folder)).await;
    reaches(folder, "enabled").await;
    assert!(
        tunnel.told.lock().contains(&Told::Add(UID.into())),
        "enabled only when a tunnel has it"
    );
    Held::open(rig, 4).await;
    assert_ne!(tunnel.carried(), (0, 0));
    agent.stop().await;
}

async fn crash_in_leave(rig: &Rig, folder: &Path) {
    let before = picture(&rig.pod);
    let _echoes = echoes(rig);
    let agent = Agent::start(rig, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    let mut inside = Held::open(rig, 8).await;
    write(folder, &pod(rig, None));
    reaches_none(folder).await;
    agent.crash().await;
    tunnel_is_gone(&tunnel).await;
    inside.all_answer("while no agent runs").await;
    let agent = Agent::start(rig, folder);
    let again = Tunnel::connect_when_ready(&socket(folder)).await;
    again.hears(&Told::SnapshotSent).await;
    assert!(
        again.told.lock().contains(&Told::Add(UID.into())),
        "still served while it leaves"
    );
    inside.all_answer("with the new agent").await;
    drop(inside);
    again.hears(&Told::Delete(UID.into())).await;
    eventually("nothing is left", async || picture(&rig.pod) == before).await;
    agent.stop().await;
}

async fn refused(rig: &Rig, folder: &Path) {
    let agent = Agent::start(rig, folder);
    let manners = Manners {
        refuse_adds: Arc::new(AtomicUsize::new(3)),
        ..Manners::default()
    };
    let _tunnel = Tunnel::connect(&socket(folder), Version::V1, manners).await;
    write(folder, &pod(rig, Some("ambient")));
    let told = async || {
        enrolment(folder)
            .and_then(|file| file.reason)
            .is_some_and(|why| why.contains("thank you"))
    };
    eventually("the reason is told", told).await;
    reaches(folder, "enabled").await;
    assert_eq!(enrolment(folder).and_then(|file| file.reason), None);
    agent.stop().await;
}

async fn no_tunnel(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    let agent = Agent::start(rig, folder);
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "pending").await;
    let reason = enrolment(folder)
        .and_then(|file| file.reason)
        .expect("a reason");
    assert!(reason.contains("no node tunnel"), "{reason}");
    Held::open(rig, 4).await;
    let tunnel = Tunnel::connect_when_ready(&socket(folder)).await;
    reaches(folder, "enabled").await;
    Held::open(rig, 4).await;
    assert_ne!(tunnel.carried(), (0, 0));
    agent.stop().await;
}

async fn ended(rig: &Rig, folder: &Path) {
    let agent = Agent::start(rig, folder);
    let older = Tunnel::connect(&socket(folder), Version::V1, Manners::default()).await;
    older.hears(&Told::SnapshotSent).await;
    let newer = Tunnel::connect(&socket(folder), Version::V1, Manners::default()).await;
    newer.hears(&Told::SnapshotSent).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    assert!(newer.told.lock().contains(&Told::Add(UID.into())));
    assert!(
        !older.told.lock().contains(&Told::Add(UID.into())),
        "Adds go to the newest only"
    );
    assert!(host_set(rig).contains("10.9.0.2"));
    fs::remove_file(pods_folder(folder).join(format!("{UID}.json"))).expect("remove");
    for tunnel in [&older, &newer] {
        tunnel.hears(&Told::Delete(UID.into())).await;
    }
    reaches_none(folder).await;
    eventually("its probes are forgotten", async || {
        !host_set(rig).contains("10.9.0.2")
    })
    .await;
    agent.stop().await;
}

async fn missing_namespace(rig: &Rig, folder: &Path) {
    let agent = Agent::start(rig, folder);
    let _tunnel = Tunnel::connect(&socket(folder), Version::V1, Manners::default()).await;
    let nowhere = folder.join("nowhere");
    write(
        folder,
        &PodFacts {
            netns: Some(nowhere.clone()),
            ..pod(rig, Some("ambient"))
        },
    );
    reaches(folder, "pending").await;
    let reason = enrolment(folder)
        .and_then(|file| file.reason)
        .expect("a reason");
    assert!(reason.contains("nowhere"), "{reason}");
    std::os::unix::fs::symlink(rig.pod_path(), nowhere).expect("link");
    reaches(folder, "enabled").await;
    agent.stop().await;
}

async fn probes(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    run(&rig.node, "sysctl -qw net.ipv4.ip_forward=1").expect("forward");
    let agent = Agent::start(rig, folder);
    let tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    let probe = rig.node.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
            .expect("a socket");
        socket.set_mark(0x2000).expect("CAP_NET_ADMIN");
        socket.set_read_timeout(Some(PATIENCE)).expect("a deadline");
        socket
            .connect(&v4(POD_V4, 8080).into())
            .expect("the probe passes");
        socket
    });
    drop(probe.expect("enter"));
    assert_eq!(tunnel.carried(), (0, 0), "a probe is not carried");
    dial(&rig.node, v4(POD_V4, 8080)).await.expect("others are");
    eventually("carried", async || tunnel.carried() == (0, 1)).await;
    agent.stop().await;
    assert!(
        host_set(rig).contains("10.9.0.2"),
        "probes pass while no agent runs"
    );
    // Gone while no agent ran.
    fs::remove_file(pods_folder(folder).join(format!("{UID}.json"))).expect("remove");
    let agent = Agent::start(rig, folder);
    eventually("stale entries go", async || {
        !host_set(rig).contains("10.9.0.2")
    })
    .await;
    agent.stop().await;
}

async fn terminating(rig: &Rig, folder: &Path) {
    let agent = Agent::start(rig, folder);
    let old = Tunnel::connect(&socket(folder), Version::V1, Manners::default()).await;
    old.hears(&Told::SnapshotSent).await;
    let new = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    new.hears(&Told::SnapshotSent).await;
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    write(
        folder,
        &PodFacts {
            terminating: true,
            ..pod(rig, Some("ambient"))
        },
    );
    new.hears(&Told::Drain(UID.into())).await;
    assert_eq!(
        enrolment(folder).map(|file| file.redirection).as_deref(),
        Some("enabled"),
        "captured to the end"
    );
    fs::remove_file(pods_folder(folder).join(format!("{UID}.json"))).expect("remove");
    old.hears(&Told::Delete(UID.into())).await;
    assert!(
        !old.told.lock().contains(&Told::Drain(UID.into())),
        "version 1 has no such word"
    );
    agent.stop().await;
}

async fn own_namespace(rig: &Rig, folder: &Path) {
    let agent = Agent::start(rig, folder);
    let _tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    write(
        folder,
        &PodFacts {
            netns: Some(path(&rig.node)),
            ..pod(rig, Some("ambient"))
        },
    );
    reaches(folder, "pending").await;
    let reason = enrolment(folder)
        .and_then(|file| file.reason)
        .expect("a reason");
    assert!(reason.contains("node's own"), "{reason}");
    assert!(
        !run(&rig.node, "nft list ruleset")
            .expect("list")
            .contains("15001")
    );
    assert!(dial(&rig.node, v4(NODE_V4, 1)).await.is_err());
    agent.stop().await;
}

async fn many_pods(rig: &Rig, folder: &Path) {
    const PODS: usize = 30;
    let agent = Agent::start(rig, folder);
    let _tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    let namespaces: Vec<Netns> = (0..PODS)
        .map(|_| bare_namespace().expect("as the rig's"))
        .collect();
    let broken = PodFacts {
        uid: "broken".into(),
        netns: Some(folder.join("nowhere")),
        ..pod(rig, Some("ambient"))
    };
    write(folder, &broken);
    let began = Instant::now();
    for (index, netns) in namespaces.iter().enumerate() {
        let uid = format!("many-{index}");
        write(
            folder,
            &PodFacts {
                uid,
                netns: Some(path(netns)),
                ..pod(rig, Some("ambient"))
            },
        );
    }
    let enabled = |index: usize| {
        let file = enrolments_folder(folder).join(format!("many-{index}.json"));
        fs::read_to_string(file).is_ok_and(|text| text.contains("enabled"))
    };
    eventually("all are enabled", async || (0..PODS).all(enabled)).await;
    println!("{PODS} pods joined within {:?}", began.elapsed());
    agent.stop().await;
}

/// A server of the node and the tunnel's listener in the pod answer with one letter each, to tell them apart.
async fn dns(rig: &Rig, folder: &Path) {
    let agent = Agent::start(rig, folder);
    let _tunnel = Tunnel::connect(&socket(folder), Version::V2, Manners::default()).await;
    let mut servers = JoinSet::new();
    let node = rig
        .node
        .run(|| std::net::UdpSocket::bind((NODE_V4, 53)))
        .expect("enter")
        .expect("bind");
    let tunnel = Factory::for_pod(rig.pod.clone())
        .bind_udp(v4(Ipv4Addr::LOCALHOST, 15053))
        .expect("bind");
    node.set_nonblocking(true).expect("a flag");
    servers.spawn(answer(UdpSocket::from_std(node).expect("register"), b"n"));
    servers.spawn(answer(tunnel, b"t"));
    assert_eq!(query(rig, None).await, *b"n");
    write(folder, &pod(rig, Some("ambient")));
    reaches(folder, "enabled").await;
    assert_eq!(query(rig, None).await, *b"t", "an application's query");
    assert_eq!(query(rig, Some(0x539)).await, *b"n", "the tunnel's own");
    let mut plain = pod(rig, Some("ambient"));
    plain
        .annotations
        .insert("ambient.istio.io/dns-capture".into(), "false".into());
    write(folder, &plain);
    eventually("the pod's own annotation counts", async || {
        query(rig, None).await == *b"n"
    })
    .await;
    agent.stop().await;
}

async fn answer(socket: UdpSocket, letter: &[u8; 1]) {
    let mut question = [0; 16];
    while let Ok((_, client)) = socket.recv_from(&mut question).await {
        let _ = socket.send_to(letter, client).await;
    }
}

async fn query(rig: &Rig, mark: Option<u32>) -> [u8; 1] {
    let factory = Factory {
        netns: Some(rig.pod.clone()),
        mark,
        ..Factory::default()
    };
    let socket = factory
        .bind_udp(v4(Ipv4Addr::UNSPECIFIED, 0))
        .expect("a socket");
    socket.connect(v4(NODE_V4, 53)).await.expect("connect");
    socket.send(b"?").await.expect("send");
    let mut letter = [0];
    tokio::time::timeout(PATIENCE, socket.recv(&mut letter))
        .await
        .expect("in time")
        .expect("an answer");
    letter
}

async fn readiness(rig: &Rig, folder: &Path) {
    let admin = own_address();
    let config = Config {
        zds_socket: socket(folder),
        probe_source: Some(ProbeSource::Cgroup {
            path: "no/such/cgroup".into(),
            level: 3,
        }),
        host_netns: Some(path(&rig.node)),
        local_folder: Some(folder.to_owned()),
        admin: vec![admin],
        ..Config::default()
    };
    let agent = tokio::spawn(cni::run(config, std::future::pending()));
    let missing = "missing: the list of pods, the node's rules, the socket for node tunnels";
    eventually("told", async || {
        get(admin, "/readyz").await.contains(missing)
    })
    .await;
    assert!(get(admin, "/healthz").await.starts_with("HTTP/1.1 200"));
    agent.abort();
    let _ = agent.await;
    eventually("its port is free", async || {
        TcpStream::connect(admin).await.is_err()
    })
    .await;
    let config = Config {
        zds_socket: socket(folder),
        probe_source: Some(ProbeSource::Uid(0)),
        host_netns: Some(path(&rig.node)),
        local_folder: Some(folder.to_owned()),
        admin: vec![admin],
        ..Config::default()
    };
    let agent = tokio::spawn(cni::run(config, std::future::pending()));
    eventually("ready", async || {
        get(admin, "/readyz").await.starts_with("HTTP/1.1 200")
    })
    .await;
    let metrics = get(admin, "/metrics").await;
    assert!(
        metrics.contains("content-type: text/plain; version=0.0.4")
            && metrics.contains("\nztunnel_connected 0\n"),
        "{metrics}"
    );
    agent.abort();
}

/// On loopback, and nobody else's: a port that is merely free now may be somebody's before the agent listens on it.
fn own_address() -> SocketAddr {
    let [.., high, middle, low] = std::process::id().to_be_bytes();
    SocketAddr::from(([127, high | 0x80, middle, low], 8000))
}

async fn get(address: SocketAddr, target: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(address).await else {
        return String::new();
    };
    let request = format!("GET {target} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n");
    let mut answer = String::new();
    // An agent that is just being started or ended may cut the answer: asked again then.
    let exchange = async {
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_string(&mut answer).await
    };
    exchange.await.map(|_| answer).unwrap_or_default()
}

fn host_set(rig: &Rig) -> String {
    run(
        &rig.node,
        "nft list set inet istio-ambient-nat istio-inpod-probe-ports-v4",
    )
    .unwrap_or_default()
}
