use std::os::fd::{AsFd, AsRawFd};

use prost::Message;
use proto::zds as wire;

use super::{message::Packet, *};
use crate::netns::Netns;

fn info() -> WorkloadInfo {
    WorkloadInfo {
        name: "client-1".to_owned(),
        namespace: "a".to_owned(),
        service_account: "client".to_owned(),
    }
}

fn add(uid: &str) -> Request {
    Request::Add {
        uid: uid.to_owned(),
        info: info(),
        netns: Netns::current().expect("/proc"),
    }
}

/// Both ends of a connection whose Hello said `version`.
async fn greeted(version: Version) -> (AgentConnection, TunnelConnection, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("zds.sock");
    let listener = Listener::bind(&path).expect("a free path");
    let tunnel = Dialer::with_version(&path, version).connect().await;
    let incoming = listener.accept().await.expect("a connection");
    let agent = AgentConnection::greet(incoming).await.expect("a hello");
    (agent, tunnel.expect("a listener"), folder)
}

/// A tunnel's end on a raw packet socket, to say wrong things to it.
fn raw() -> (packet::Socket, TunnelConnection) {
    let (agent, tunnel) = packet::Socket::pair();
    (agent, TunnelConnection { socket: tunnel })
}

async fn sent(bytes: &[u8], descriptors: usize) -> Result<Option<Received>, ProtocolError> {
    let (agent, mut tunnel) = raw();
    let here = Netns::current().expect("/proc");
    let descriptors = vec![here.as_fd().as_raw_fd(); descriptors];
    agent.send_raw(bytes, &descriptors).await.expect("sent");
    tunnel.receive().await
}

#[tokio::test]
async fn every_request_arrives_as_it_was_sent() {
    let (mut agent, mut tunnel, _folder) = greeted(Version::V2).await;
    assert_eq!(agent.version(), Version::V2);
    let uid = || "uid-1".to_owned();
    let requests = [
        add("uid-1"),
        Request::Keep { uid: uid() },
        Request::Delete { uid: uid() },
        Request::Drain { uid: uid() },
        Request::SnapshotSent,
    ];
    for request in requests {
        let answer = async {
            let received = tunnel.receive().await.expect("readable");
            tunnel.acknowledge(Ok(())).await.expect("an agent");
            received
        };
        let (called, received) = tokio::join!(agent.call(&request), answer);
        called.expect("acknowledged");
        let Some(Received::Request(received)) = received else {
            panic!("{received:?}");
        };
        assert_eq!(received, request);
    }
}

#[tokio::test]
async fn an_error_reaches_the_agent_and_is_cut_to_a_packet() {
    let (mut agent, mut tunnel, _folder) = greeted(Version::V1).await;
    let long = "é".repeat(2_000);
    for text in ["port 15008 is busy", &long] {
        let answer = async {
            tunnel.receive().await.expect("readable");
            tunnel.acknowledge(Err(text)).await.expect("it fits");
        };
        let (called, ()) = tokio::join!(agent.call(&Request::SnapshotSent), answer);
        let Err(CallError::Refused(told)) = called else {
            panic!("{called:?}");
        };
        assert!(!told.is_empty() && text.starts_with(&told), "{told}");
    }
}

#[tokio::test]
async fn drain_is_not_sent_to_version_one() {
    let (mut agent, _tunnel, _folder) = greeted(Version::V1).await;
    let drain = Request::Drain {
        uid: "uid".to_owned(),
    };
    let called = agent.call(&drain).await;
    assert!(matches!(called, Err(CallError::NotInVersion)), "{called:?}");
}

#[tokio::test]
async fn del_has_field_number_two() {
    let request = Request::Delete {
        uid: "u".to_owned(),
    };
    assert_eq!(encode_request(&request), [0x12, 3, 0x12, 1, b'u']);
}

#[tokio::test]
async fn a_cut_message_is_refused() {
    let whole = encode_request(&add("uid-1"));
    let error = sent(&whole[..whole.len() - 3], 1).await.expect_err("cut");
    assert!(matches!(error, ProtocolError::Decode { .. }), "{error:?}");
}

#[tokio::test]
async fn an_unknown_request_is_refused() {
    // Field 77, an empty message.
    let error = sent(&[0xea, 0x04, 0x00], 0).await.expect_err("unknown");
    assert!(matches!(error, ProtocolError::UnknownRequest), "{error:?}");
}

#[tokio::test]
async fn an_add_takes_exactly_one_descriptor() {
    let bytes = encode_request(&add("uid-1"));
    let none = sent(&bytes, 0).await.expect_err("none");
    assert!(
        matches!(none, ProtocolError::NoDescriptor { .. }),
        "{none:?}"
    );
    for many in [2, 253] {
        let error = sent(&bytes, many).await.expect_err("many");
        let told = matches!(&error, ProtocolError::ManyDescriptors { count, .. } if *count == many);
        assert!(told, "{error:?}");
    }
}

#[tokio::test]
async fn a_descriptor_where_none_belongs_is_refused() {
    let bytes = encode_request(&Request::SnapshotSent);
    let error = sent(&bytes, 1).await.expect_err("one too many");
    let told = matches!(error, ProtocolError::UnexpectedDescriptor { count: 1, .. });
    assert!(told, "{error:?}");
}

#[tokio::test]
async fn an_add_without_workload_info_or_uid_is_refused() {
    let nameless = wire::WorkloadRequest {
        payload: Some(wire::workload_request::Payload::Add(wire::AddWorkload {
            uid: "uid-1".to_owned(),
            workload_info: None,
        })),
    };
    let error = sent(&nameless.encode_to_vec(), 1)
        .await
        .expect_err("no info");
    assert!(
        matches!(error, ProtocolError::NoWorkloadInfo { .. }),
        "{error:?}"
    );
    let error = sent(&encode_request(&add("")), 1)
        .await
        .expect_err("no uid");
    assert!(matches!(error, ProtocolError::NoUid { .. }), "{error:?}");
}

#[tokio::test]
async fn a_packet_beyond_the_limit_is_refused_on_both_sides() {
    let keep = Request::Keep {
        uid: "x".repeat(MAX_PACKET),
    };
    let bytes = encode_request(&keep);
    let error = sent(&bytes, 0).await.expect_err("too long");
    let told = matches!(error, ProtocolError::Packet(PacketError::TooLong));
    assert!(told, "{error:?}");
    let (mut agent, _tunnel, _folder) = greeted(Version::V1).await;
    let called = agent.call(&keep).await;
    assert!(matches!(called, Err(CallError::Protocol(_))), "{called:?}");
}

#[tokio::test]
async fn a_descriptor_that_is_no_namespace_spoils_only_its_pod() {
    let (agent, mut tunnel) = raw();
    let gone = std::fs::File::open("/dev/null").expect("a file");
    let bytes = encode_request(&add("uid-1"));
    agent
        .send_raw(&bytes, &[gone.as_raw_fd()])
        .await
        .expect("sent");
    let received = tunnel.receive().await.expect("the connection is well");
    let told = matches!(&received, Some(Received::BadNamespace { uid, .. }) if uid == "uid-1");
    assert!(told, "{received:?}");
    tunnel.acknowledge(Err("gone")).await.expect("an agent");
}

#[tokio::test]
async fn received_descriptors_are_closed_on_exec_and_leak_nowhere() {
    let open = || {
        std::fs::read_dir("/proc/self/fdinfo")
            .expect("/proc")
            .count()
    };
    let (agent, mut tunnel) = raw();
    let bytes = encode_request(&Request::SnapshotSent);
    let here = Netns::current().expect("/proc");
    agent
        .send_raw(&bytes, &[here.as_fd().as_raw_fd(); 100])
        .await
        .expect("sent");
    let before = open();
    tunnel.receive().await.expect_err("unexpected descriptors");
    // Other tests open and close descriptors beside us; a leak would be a hundred.
    assert!(open() < before + 80);
    agent
        .send_raw(&bytes, &[here.as_fd().as_raw_fd()])
        .await
        .expect("sent");
    let packet = tunnel
        .socket
        .receive()
        .await
        .expect("a packet")
        .expect("one");
    let flags = nix::fcntl::fcntl(&packet.descriptors[0], nix::fcntl::FcntlArg::F_GETFD);
    assert_eq!(flags, Ok(nix::fcntl::FdFlag::FD_CLOEXEC.bits()));
}

#[tokio::test]
async fn a_hangup_is_the_end_for_both() {
    let (mut agent, tunnel, _folder) = greeted(Version::V1).await;
    drop(tunnel);
    assert!(matches!(agent.closed().await, ProtocolError::Closed));
    let (mut agent, mut tunnel, _folder) = greeted(Version::V1).await;
    tunnel.acknowledge(Ok(())).await.expect("an agent");
    assert!(matches!(agent.closed().await, ProtocolError::Unexpected));
    drop(agent);
    assert!(matches!(tunnel.receive().await, Ok(None)));
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_is_not_taken_for_the_next() {
    let (mut agent, mut tunnel, _folder) = greeted(Version::V1).await;
    let late = agent.call(&Request::SnapshotSent).await;
    assert!(matches!(late, Err(CallError::Timeout(_))), "{late:?}");
    let answers = async {
        for text in ["the late one", "the next one"] {
            tunnel.receive().await.expect("readable");
            tunnel.acknowledge(Err(text)).await.expect("an agent");
        }
    };
    let (called, ()) = tokio::join!(agent.call(&Request::SnapshotSent), answers);
    assert!(
        matches!(&called, Err(CallError::Refused(text)) if text == "the next one"),
        "{called:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_silent_tunnel_is_not_waited_for() {
    let (_silent, socket) = packet::Socket::pair();
    let greeted = AgentConnection::greet(Incoming(socket)).await;
    assert!(matches!(greeted, Err(CallError::Timeout(_))), "{greeted:?}");
}

#[tokio::test]
async fn a_hello_of_a_later_version_counts_as_ours_and_none_is_refused() {
    for (number, version) in [(1, Version::V1), (2, Version::V2), (9, Version::V2)] {
        let (tunnel, socket) = packet::Socket::pair();
        let hello = wire::ZdsHello { version: number }.encode_to_vec();
        tunnel.send_raw(&hello, &[]).await.expect("sent");
        let agent = AgentConnection::greet(Incoming(socket)).await;
        assert_eq!(agent.expect("a hello").version(), version);
    }
    let (tunnel, socket) = packet::Socket::pair();
    tunnel.send_raw(&[0x10, 0], &[]).await.expect("sent");
    let greeted = AgentConnection::greet(Incoming(socket)).await;
    let told = matches!(
        greeted,
        Err(CallError::Protocol(ProtocolError::UnknownVersion))
    );
    assert!(told, "{greeted:?}");
}

#[tokio::test]
async fn a_stale_socket_file_is_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("zds.sock");
    drop(Listener::bind(&path).expect("a free path"));
    assert!(
        Dialer::new(&path).connect().await.is_err(),
        "nobody listens"
    );
    let _listener = Listener::bind(&path).expect("stale, so replaced");
    Dialer::new(&path)
        .connect()
        .await
        .expect("somebody listens");
}

#[tokio::test]
async fn after_an_early_hangup_the_dialer_says_version_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("zds.sock");
    let listener = Listener::bind(&path).expect("a free path");
    let mut dialer = Dialer::new(&path);
    for expected in [Version::V2, Version::V1] {
        let _tunnel = dialer.connect().await.expect("a listener");
        let incoming = listener.accept().await.expect("a connection");
        let agent = AgentConnection::greet(incoming).await.expect("a hello");
        assert_eq!(agent.version(), expected);
        dialer.hung_up_early();
    }
}

#[test]
fn no_cut_or_changed_packet_makes_the_reader_panic() {
    let info = wire::AddWorkload {
        uid: "uid-1".to_owned(),
        workload_info: Some(wire::WorkloadInfo::default()),
    };
    let add = wire::WorkloadRequest {
        payload: Some(wire::workload_request::Payload::Add(info)),
    };
    let whole = add.encode_to_vec();
    let read = |bytes: &[u8]| {
        let packet = || Packet {
            bytes: bytes.to_vec(),
            descriptors: Vec::new(),
            lost: false,
        };
        let request = decode_request(packet());
        assert!(!matches!(
            request,
            Ok(Received::Request(Request::Add { .. }))
        ));
        let _ = decode_response(&packet());
        let _ = decode_hello(&packet());
    };
    for end in 0..=whole.len() {
        read(&whole[..end]);
    }
    for at in 0..whole.len() {
        for value in 0..=u8::MAX {
            let mut changed = whole.clone();
            changed[at] = value;
            read(&changed);
        }
    }
}

#[test]
fn a_lost_descriptor_spoils_only_its_pod_and_is_told() {
    let packet = |request: &Request| Packet {
        bytes: encode_request(request),
        descriptors: Vec::new(),
        lost: true,
    };
    match decode_request(packet(&add("uid-1"))) {
        Ok(Received::BadNamespace { uid, error }) => {
            assert_eq!(uid, "uid-1");
            assert!(error.to_string().contains("open files"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(decode_request(packet(&Request::SnapshotSent)).is_err());
}
