use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use net::{
    netns::Netns,
    zds::{Dialer, Received, Request, TunnelConnection, Version, WorkloadInfo},
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{advance, timeout},
};

use super::{AnnounceError, Announcement, Refusal, Tunnels, tunnels};

/// The agent's end, listening in a folder of its own.
struct Agent {
    tunnels: Tunnels,
    refusals: mpsc::Receiver<Refusal>,
    path: PathBuf,
    server: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Agent {
    fn start() -> Agent {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("run/ztunnel.sock");
        let (tunnels, refusals) = tunnels();
        let server = tokio::spawn(tunnels.listen(&path).expect("listen").run());
        Agent {
            tunnels,
            refusals,
            path,
            server,
            _folder: folder,
        }
    }

    async fn tunnel(&self, version: Version) -> Tunnel {
        Tunnel(
            Dialer::with_version(&self.path, version)
                .connect()
                .await
                .expect("connect"),
        )
    }

    /// A tunnel that has taken its snapshot and answers nothing by itself from here on.
    async fn settled(&self, version: Version) -> (Tunnel, Vec<Request>) {
        let mut tunnel = self.tunnel(version).await;
        let mut snapshot = Vec::new();
        loop {
            match tunnel.next().await {
                Request::SnapshotSent => break,
                other => snapshot.push(other),
            }
            tunnel.answer(Ok(())).await;
        }
        tunnel.answer(Ok(())).await;
        (tunnel, snapshot)
    }

    fn announce(&self, uid: &str) -> JoinHandle<Result<(), AnnounceError>> {
        let tunnels = self.tunnels.clone();
        let pod = pod(uid);
        tokio::spawn(async move { tunnels.announce(pod).await })
    }

    async fn connected(&self, count: usize) {
        let mut connected = self.tunnels.connected();
        let waited = timeout(
            Duration::from_secs(30),
            connected.wait_for(|now| *now == count),
        )
        .await;
        waited.expect("in time").expect("the hub lives");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Tunnel(TunnelConnection);

impl Tunnel {
    async fn next(&mut self) -> Request {
        let received = timeout(Duration::from_secs(30), self.0.receive())
            .await
            .expect("in time");
        match received.expect("a sound connection").expect("not the end") {
            Received::Request(request) => request,
            Received::BadNamespace { uid, error } => panic!("{uid}: {error}"),
        }
    }

    async fn answer(&mut self, result: Result<(), &str>) {
        self.0.acknowledge(result).await.expect("an agent");
    }

    async fn hung_up_on(&mut self) -> bool {
        let received = timeout(Duration::from_secs(30), self.0.receive())
            .await
            .expect("in time");
        !matches!(received, Ok(Some(_)))
    }
}

fn here() -> Netns {
    Netns::open("/proc/thread-self/ns/net").expect("our own")
}

fn pod(uid: &str) -> Announcement {
    let info = WorkloadInfo {
        name: uid.into(),
        namespace: "b".into(),
        service_account: "c".into(),
    };
    Announcement {
        uid: uid.into(),
        info,
        netns: Some(here()),
    }
}

fn add(uid: &str) -> Request {
    super::request(&pod(uid))
}

async fn done<T>(task: JoinHandle<T>) -> T {
    timeout(Duration::from_secs(30), task)
        .await
        .expect("in time")
        .expect("no panic")
}

#[tokio::test]
async fn a_tunnel_gets_the_snapshot_and_then_what_follows() {
    let agent = Agent::start();
    agent.tunnels.remember(pod("1"));
    agent.tunnels.remember(Announcement {
        netns: None,
        ..pod("2")
    });
    let (mut tunnel, snapshot) = agent.settled(Version::V1).await;
    assert_eq!(snapshot, [add("1"), Request::Keep { uid: "2".into() }]);
    let asked = agent.announce("3");
    assert_eq!(tunnel.next().await, add("3"));
    assert!(!asked.is_finished());
    tunnel.answer(Ok(())).await;
    assert_eq!(done(asked).await, Ok(()));
}

#[tokio::test]
async fn the_socket_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let agent = Agent::start();
    let mode = std::fs::metadata(&agent.path)
        .expect("a file")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_pod_announced_without_a_tunnel_is_in_the_next_snapshot() {
    let agent = Agent::start();
    assert_eq!(
        done(agent.announce("1")).await,
        Err(AnnounceError::NoTunnel)
    );
    let (_tunnel, snapshot) = agent.settled(Version::V1).await;
    assert_eq!(snapshot, [add("1")]);
}

#[tokio::test]
async fn a_refusal_is_the_callers_and_one_in_a_snapshot_is_told_to_the_owner() {
    let mut agent = Agent::start();
    let (mut tunnel, _) = agent.settled(Version::V1).await;
    let asked = agent.announce("1");
    tunnel.next().await;
    tunnel.answer(Err("port in use")).await;
    assert_eq!(
        done(asked).await,
        Err(AnnounceError::Refused("port in use".into()))
    );
    let mut second = agent.tunnel(Version::V1).await;
    assert_eq!(second.next().await, add("1"));
    second.answer(Err("still in use")).await;
    assert_eq!(second.next().await, Request::SnapshotSent);
    let refusal = agent.refusals.recv().await;
    assert_eq!(
        refusal,
        Some(Refusal {
            uid: "1".into(),
            reason: "still in use".into()
        })
    );
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_answers_too_late_is_hung_up_on() {
    let agent = Agent::start();
    let (mut tunnel, _) = agent.settled(Version::V1).await;
    let slow = agent.announce("1");
    assert_eq!(tunnel.next().await, add("1"));
    advance(net::zds::REPLY_DEADLINE + Duration::from_millis(1)).await;
    assert_eq!(done(slow).await, Err(AnnounceError::HungUp));
    assert!(tunnel.hung_up_on().await, "so its late answer is nobody's");
    agent.connected(0).await;
    let (_tunnel, snapshot) = agent.settled(Version::V1).await;
    assert_eq!(snapshot, [add("1")], "it gets everything anew");
}

#[tokio::test]
async fn adds_go_to_the_newest_and_dels_to_all() {
    let agent = Agent::start();
    let (mut older, _) = agent.settled(Version::V1).await;
    let (mut newer, _) = agent.settled(Version::V1).await;
    let asked = agent.announce("1");
    assert_eq!(newer.next().await, add("1"));
    newer.answer(Ok(())).await;
    done(asked).await.expect("taken");
    let tunnels = agent.tunnels.clone();
    let withdrawn = tokio::spawn(async move { tunnels.withdraw("1").await });
    for tunnel in [&mut older, &mut newer] {
        assert_eq!(tunnel.next().await, Request::Delete { uid: "1".into() });
        tunnel.answer(Ok(())).await;
    }
    done(withdrawn).await;
}

#[tokio::test]
async fn a_slow_older_tunnel_holds_up_no_announcement() {
    let agent = Agent::start();
    let (mut older, _) = agent.settled(Version::V2).await;
    agent.tunnels.drain("x");
    assert_eq!(older.next().await, Request::Drain { uid: "x".into() });
    let (mut newer, _) = agent.settled(Version::V1).await;
    let asked = agent.announce("1");
    assert_eq!(newer.next().await, add("1"));
    newer.answer(Ok(())).await;
    assert_eq!(done(asked).await, Ok(()));
}

#[tokio::test]
async fn when_the_newest_goes_the_one_before_learns_what_it_missed() {
    let agent = Agent::start();
    agent.tunnels.remember(pod("0"));
    let (mut older, _) = agent.settled(Version::V1).await;
    let (mut newer, _) = agent.settled(Version::V1).await;
    let asked = agent.announce("1");
    newer.next().await;
    newer.answer(Ok(())).await;
    done(asked).await.expect("taken");
    drop(newer);
    assert_eq!(older.next().await, add("1"), "and not 0, which it knows");
    older.answer(Ok(())).await;
    let asked = agent.announce("2");
    assert_eq!(older.next().await, add("2"));
    older.answer(Ok(())).await;
    assert_eq!(done(asked).await, Ok(()));
}

#[tokio::test]
async fn a_tunnel_that_goes_in_the_middle_fails_what_waits_for_it() {
    let agent = Agent::start();
    let (mut tunnel, _) = agent.settled(Version::V1).await;
    let (first, second) = (agent.announce("1"), agent.announce("2"));
    tunnel.next().await;
    drop(tunnel);
    for asked in [first, second] {
        let error = done(asked).await.expect_err("nobody is there");
        assert!(
            matches!(error, AnnounceError::HungUp | AnnounceError::NoTunnel),
            "{error}"
        );
    }
    agent.connected(0).await;
}

#[tokio::test]
async fn only_version_2_hears_of_a_drain() {
    let agent = Agent::start();
    let (mut old, _) = agent.settled(Version::V1).await;
    let (mut new, _) = agent.settled(Version::V2).await;
    agent.tunnels.drain("1");
    assert_eq!(new.next().await, Request::Drain { uid: "1".into() });
    new.answer(Ok(())).await;
    let tunnels = agent.tunnels.clone();
    let withdrawn = tokio::spawn(async move { tunnels.withdraw("1").await });
    assert_eq!(
        old.next().await,
        Request::Delete { uid: "1".into() },
        "and nothing before"
    );
    old.answer(Ok(())).await;
    new.next().await;
    new.answer(Ok(())).await;
    done(withdrawn).await;
}

/// A peer that speaks no ZDS: sends these packets after connecting.
fn raw(path: &std::path::Path, packets: &[&[u8]]) -> OwnedFd {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .expect("a socket");
    connect(fd.as_raw_fd(), &UnixAddr::new(path).expect("an address")).expect("connect");
    for packet in packets {
        send(fd.as_raw_fd(), packet, MsgFlags::empty()).expect("send");
    }
    fd
}

#[tokio::test]
async fn cut_and_foreign_messages_end_their_own_connection_only() {
    let agent = Agent::start();
    let (mut tunnel, _) = agent.settled(Version::V1).await;
    // Hello of version 1 is the bytes 8, 1. One that is cut, one of no version, and after a sound one an answer that
    // is none.
    let peers = [
        raw(&agent.path, &[&[8]]),
        raw(&agent.path, &[&[8, 0]]),
        raw(&agent.path, &[&[8, 1], &[0xff, 0xff]]),
    ];
    for peer in peers {
        done(tokio::task::spawn_blocking(move || until_hung_up(&peer))).await;
    }
    agent.connected(1).await;
    let asked = agent.announce("1");
    assert_eq!(tunnel.next().await, add("1"));
    tunnel.answer(Ok(())).await;
    assert_eq!(done(asked).await, Ok(()));
}

fn until_hung_up(peer: &OwnedFd) {
    let mut packet = [0; 1024];
    while recv(peer.as_raw_fd(), &mut packet, MsgFlags::empty()).is_ok_and(|length| length > 0) {}
}

#[tokio::test]
async fn what_is_announced_while_a_snapshot_is_sent_comes_after_it() {
    let agent = Agent::start();
    agent.tunnels.remember(pod("1"));
    let mut tunnel = agent.tunnel(Version::V1).await;
    assert_eq!(tunnel.next().await, add("1"));
    let asked = agent.announce("2");
    tunnel.answer(Ok(())).await;
    assert_eq!(tunnel.next().await, Request::SnapshotSent);
    tunnel.answer(Ok(())).await;
    assert_eq!(tunnel.next().await, add("2"));
    tunnel.answer(Ok(())).await;
    assert_eq!(done(asked).await, Ok(()));
}
