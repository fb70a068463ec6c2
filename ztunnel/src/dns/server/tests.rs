use std::{
    io::Write,
    sync::atomic::{AtomicUsize, Ordering},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use parking_lot::Mutex;

use net::{handover::Port, testing::tcp_and_udp};

use super::*;
use net::dns::Upstreams;

const DEADLINE: Duration = Duration::from_secs(10);

struct Fake {
    asked: Mutex<Vec<String>>,
    failures: AtomicUsize,
    dropped: Semaphore,
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            asked: Mutex::default(),
            failures: AtomicUsize::default(),
            dropped: Semaphore::new(0),
        }
    }
}

impl Names for Arc<Fake> {
    async fn lookup(&self, name: &str, ipv6: bool) -> Known {
        match name {
            "web.a" => Known::Addresses(Addresses {
                alias_of: None,
                addresses: if ipv6 {
                    Vec::new()
                } else {
                    vec!["10.0.0.1".parse().unwrap()]
                },
                ttl: 30,
            }),
            "many.a" => Known::Addresses(Addresses {
                alias_of: None,
                addresses: (0..if ipv6 { 0 } else { 100 })
                    .map(|last| [10, 0, 0, last].into())
                    .collect(),
                ttl: 30,
            }),
            "early.a" => Known::UnknownClient,
            _ => Known::Nothing,
        }
    }

    async fn lookup_port(&self, name: &str) -> Option<PortRecords> {
        (name == "_http._tcp.web.a").then(|| PortRecords {
            service: "a/web.a".parse().unwrap(),
            cname: None,
            targets: vec![mesh::dns::Target {
                name: "web.a.".to_owned(),
                port: 80,
                addresses: vec!["10.0.0.1".parse().unwrap()],
            }],
            ttl: 30,
        })
    }

    async fn lookup_alias(&self, name: &str, ipv6: bool) -> Option<Addresses> {
        (name == "api.example.com" && !ipv6).then(|| Addresses {
            alias_of: None,
            addresses: vec!["240.240.0.1".parse().unwrap()],
            ttl: 30,
        })
    }

    fn knows(&self, name: &str) -> bool {
        name == "web.a"
    }

    fn upstreams(&self, ours: Arc<Upstreams>) -> Arc<Upstreams> {
        ours
    }

    fn asked(&self, kind: &str, _: Transport) {
        self.asked.lock().push(kind.to_owned());
    }

    fn dropped(&self) {
        self.dropped.add_permits(1);
    }

    fn forwarded(&self, _: &str, _: Transport, _: Duration, answered: bool) {
        if !answered {
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
    }
}

struct Rig {
    server: Arc<Server<Arc<Fake>>>,
    /// The server's own socket.
    own: std::net::UdpSocket,
    address: SocketAddr,
    tcp_address: SocketAddr,
    names: Arc<Fake>,
    permits: Arc<Semaphore>,
    drain: drain::Trigger,
    _file: tempfile::NamedTempFile,
    serving: JoinSet<()>,
}

/// A server on loopback that forwards to `upstream`.
async fn rig(upstream: impl IntoIterator<Item = SocketAddr>) -> Rig {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "options timeout:1 attempts:1").unwrap();
    let upstreams = ResolvConf::with_servers(file.path().to_owned(), upstream);
    let names = Arc::new(Fake::default());
    let server = Server::new(names.clone(), Factory::default(), Arc::new(upstreams));
    let permits = Arc::clone(&server.permits);
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.set_nonblocking(true).unwrap();
    let own = udp.try_clone().unwrap();
    let udp = UdpSocket::from_std(udp).unwrap();
    let address = udp.local_addr().unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tcp_address = tcp.local_addr().unwrap();
    let (drain, watch) = drain::channel();
    let mut serving = JoinSet::new();
    serving.spawn(
        server
            .clone()
            .serve_udp(udp, Port::unshared(), watch.clone()),
    );
    serving.spawn(server.clone().serve_tcp(tcp, Port::unshared(), watch));
    Rig {
        server,
        own,
        address,
        tcp_address,
        names,
        permits,
        drain,
        _file: file,
        serving,
    }
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn ask_udp(rig: &Rig, request: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(request, rig.address).await.unwrap();
    let mut reply = vec![0; 65_536];
    let length = timeout(DEADLINE, socket.recv(&mut reply))
        .await
        .expect("an answer within the deadline")
        .unwrap();
    reply.truncate(length);
    reply
}

/// Answers each datagram with its own bytes, but for the bit that makes it a response.
async fn echoing_upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            buffer[2] |= 0x80;
            socket.send_to(&buffer[..length], peer).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn the_mesh_answers_its_names_and_a_missing_family_with_nothing() {
    let rig = rig(None).await;
    let reply = ask_udp(&rig, &question("web.a.", RecordType::A).to_vec().unwrap()).await;
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!(reply.answers.len(), 1);
    let reply = ask_udp(
        &rig,
        &question("web.a.", RecordType::AAAA).to_vec().unwrap(),
    )
    .await;
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert!(reply.answers.is_empty());
    assert_eq!(*rig.names.asked.lock(), ["a", "aaaa"]);
}

#[tokio::test]
async fn a_port_that_the_mesh_knows_is_answered_with_the_addresses_of_its_place() {
    let rig = rig(None).await;
    let request = question("_http._tcp.web.a.", RecordType::SRV);
    let reply = ask_udp(&rig, &request.to_vec().unwrap()).await;
    let reply = Message::from_vec(&reply).unwrap();
    assert!(reply.metadata.authoritative);
    let place = rdata::SRV::new(0, 100, 80, Name::from_ascii("web.a.").unwrap());
    assert_eq!(reply.answers[0].data, RData::SRV(place));
    let address = RData::A("10.0.0.1".parse().unwrap());
    assert_eq!(reply.additionals[0].data, address);
    assert_eq!(*rig.names.asked.lock(), ["srv"]);
}

#[tokio::test]
async fn the_rest_is_forwarded_untouched() {
    let rig = rig(Some(echoing_upstream().await)).await;
    let mut requests = vec![
        question("example.com.", RecordType::A).to_vec().unwrap(),
        question("web.a.", RecordType::SRV).to_vec().unwrap(),
        // A type that nobody knows, with bytes after the question that nobody understands.
        b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01x\x00\xfe\x01\x00\x01rest".to_vec(),
    ];
    let mut later = question("example.com.", RecordType::A);
    later.set_edns(Edns::new().set_version(1).clone());
    requests.push(later.to_vec().unwrap());
    let mut update = question("web.a.", RecordType::A).to_vec().unwrap();
    update[2] |= 5 << 3;
    let cut = update[..update.len() - 1].to_vec();
    requests.extend([update, cut]);
    for request in requests {
        let mut expected = request.clone();
        expected[2] |= 0x80;
        assert_eq!(ask_udp(&rig, &request).await, expected);
    }
}

async fn ask_tcp(rig: &Rig, request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(rig.tcp_address).await.unwrap();
    forward::write_message(&mut stream, request).await.unwrap();
    let read = timeout(DEADLINE, forward::read_message(&mut stream)).await;
    read.expect("an answer within the deadline").unwrap()
}

/// A name server whose answers do not fit into a datagram: there it says so, and over TCP it sends the question's bytes back.
async fn lengthy_upstream() -> SocketAddr {
    let (tcp, udp) = tcp_and_udp().await;
    let address = tcp.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, peer)) = udp.recv_from(&mut buffer).await {
            // QR and TC (RFC 1035 4.1.1).
            buffer[2] |= 0x82;
            udp.send_to(&buffer[..length], peer).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let mut message = forward::read_message(&mut stream).await.unwrap();
            message[2] |= 0x80;
            forward::write_message(&mut stream, &message).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn what_a_name_server_cuts_is_told_as_cut_and_fetched_over_tcp() {
    let rig = rig([lengthy_upstream().await]).await;
    let request = question("example.com.", RecordType::TXT).to_vec().unwrap();
    let cut = ask_udp(&rig, &request).await;
    assert_eq!(cut[2] & 0x82, 0x82, "a response, and cut");
    let whole = ask_tcp(&rig, &request).await;
    assert_eq!(whole[2] & 0x82, 0x80, "a response, and whole");
    assert_eq!(whole[..2], request[..2]);
    assert_eq!(whole[3..], request[3..]);
}

#[tokio::test]
async fn every_operation_but_a_question_goes_both_ways_as_it_is() {
    let upstream = lengthy_upstream().await;
    let rig = rig([upstream]).await;
    for operation in 1..16 {
        let mut request = question("web.a.", RecordType::A).to_vec().unwrap();
        request[2] |= operation << 3;
        let mut expected = request.clone();
        expected[2] |= 0x80;
        assert_eq!(ask_tcp(&rig, &request).await, expected, "{operation}");
        expected[2] |= 0x82;
        assert_eq!(ask_udp(&rig, &request).await, expected, "{operation}");
    }
}

#[tokio::test]
async fn a_name_server_that_is_gone_is_passed_over() {
    let gone = {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.local_addr().unwrap()
    };
    let rig = rig([gone, echoing_upstream().await]).await;
    let request = question("example.com.", RecordType::A).to_vec().unwrap();
    let reply = ask_udp(&rig, &request).await;
    assert_eq!(reply[2] & 0x80, 0x80);
    assert_eq!(reply[3..], request[3..]);
    assert_eq!(rig.names.failures.load(Ordering::SeqCst), 0);
}

/// Says that no name is there; that one of them stands for another.
async fn denying_upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let mut message = Message::from_vec(&buffer[..length]).unwrap();
            message.metadata.message_type = MessageType::Response;
            message.metadata.response_code = ResponseCode::NXDomain;
            message.metadata.authoritative = true;
            let asked = message.queries[0].name().clone();
            if asked.to_ascii() == "ext.a." {
                let target = Name::from_ascii("api.example.com.").unwrap();
                let alias = RData::CNAME(rdata::CNAME(target));
                message.add_answer(Record::from_rdata(asked, 5, alias));
            }
            let reply = message.to_vec().unwrap();
            socket.send_to(&reply, peer).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn an_alias_that_leads_into_the_mesh_gets_the_meshs_addresses() {
    let rig = rig(Some(denying_upstream().await)).await;
    let request = question("ext.a.", RecordType::A).to_vec().unwrap();
    let reply = Message::from_vec(&ask_udp(&rig, &request).await).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    let ttls: Vec<_> = reply.answers.iter().map(|it| it.ttl).collect();
    assert_eq!(ttls, [5, 30], "each its own");
    assert_eq!(
        reply.answers[1].data,
        RData::A("240.240.0.1".parse().unwrap())
    );
    // The mesh knows nothing of that family: what the name server says stands.
    let request = question("ext.a.", RecordType::AAAA).to_vec().unwrap();
    let reply = Message::from_vec(&ask_udp(&rig, &request).await).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_name_that_is_resolved_here_has_the_addresses_that_the_pod_would_be_told() {
    let rig = rig(Some(denying_upstream().await)).await;
    for (name, expected) in [
        ("web.a", Some("10.0.0.1")),
        ("Web.a.", Some("10.0.0.1")),
        ("ext.a", Some("240.240.0.1")),
        ("example.com", None),
        ("early.a", None),
        ("a..b", None),
    ] {
        let found = rig.server.resolve(name).await;
        let expected: Vec<IpAddr> = expected.map(|it| it.parse().unwrap()).into_iter().collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[tokio::test]
async fn what_does_not_fit_a_datagram_is_resolved_here_all_the_same() {
    let rig = rig(None).await;
    assert_eq!(rig.server.resolve("many.a").await.len(), 100);
}

#[tokio::test]
async fn a_name_server_cannot_deny_a_name_of_the_mesh() {
    let rig = rig(Some(denying_upstream().await)).await;
    for (name, kind, expected) in [
        ("web.a.", RecordType::TXT, ResponseCode::NoError),
        ("web.a.", RecordType::HTTPS, ResponseCode::NoError),
        ("example.com.", RecordType::TXT, ResponseCode::NXDomain),
        ("example.com.", RecordType::A, ResponseCode::NXDomain),
        (
            "_http._tcp.example.com.",
            RecordType::SRV,
            ResponseCode::NXDomain,
        ),
    ] {
        let request = question(name, kind).to_vec().unwrap();
        let reply = Message::from_vec(&ask_udp(&rig, &request).await).unwrap();
        assert_eq!(reply.metadata.response_code, expected, "{name} {kind}");
        assert!(
            !reply.metadata.authoritative,
            "{name} {kind}: ours it is not"
        );
    }
}

#[tokio::test]
async fn without_a_name_server_the_answer_is_a_failure() {
    let rig = rig(None).await;
    let request = question("example.com.", RecordType::A).to_vec().unwrap();
    let reply = Message::from_vec(&ask_udp(&rig, &request).await).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    let asked = question("example.com.", RecordType::A).queries;
    assert_eq!(reply.queries, asked, "or resolvers pass it over");
    assert_eq!(rig.names.failures.load(Ordering::SeqCst), 1);
    let request = question("early.a.", RecordType::A).to_vec().unwrap();
    let reply = Message::from_vec(&ask_udp(&rig, &request).await).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn a_question_that_makes_no_sense_is_refused_at_once_and_not_passed_on() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let rig = rig([silent.local_addr().unwrap()]).await;
    let mut request = question("example.com.", RecordType::A).to_vec().unwrap();
    // RD (RFC 1035 4.1.1), and more records than there are.
    request[2] |= 1;
    request[7] = 1;
    let reply = ask_udp(&rig, &request).await;
    assert_eq!(reply, ask_tcp(&rig, &request).await);
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!(reply.metadata.id, 77);
    assert_eq!(reply.metadata.op_code, OpCode::Query);
    assert!(reply.metadata.recursion_desired);
    assert_eq!(reply.metadata.response_code, ResponseCode::FormErr);
    assert_eq!(*rig.names.asked.lock(), ["unknown", "unknown"]);
    let passed_on = silent.recv(&mut [0; 512]);
    assert_eq!(passed_on.unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn tcp_clients_are_served_on_one_connection_after_the_other_question() {
    let rig = rig(None).await;
    let mut stream = TcpStream::connect(rig.tcp_address).await.unwrap();
    for _ in 0..2 {
        let request = question("web.a.", RecordType::A).to_vec().unwrap();
        forward::write_message(&mut stream, &request).await.unwrap();
        let reply = timeout(DEADLINE, forward::read_message(&mut stream))
            .await
            .expect("an answer within the deadline")
            .unwrap();
        assert_eq!(Message::from_vec(&reply).unwrap().answers.len(), 1);
    }
}

#[tokio::test]
async fn a_question_beyond_those_that_are_being_answered_is_dropped_and_counted() {
    let rig = rig(None).await;
    let busy = rig.permits.acquire_many(1024).await.unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let request = question("web.a.", RecordType::A).to_vec().unwrap();
    for _ in 0..2 {
        socket.send_to(&request, rig.address).await.unwrap();
    }
    let counted = timeout(DEADLINE, rig.names.dropped.acquire_many(2)).await;
    let _both = counted.expect("counted within the deadline").unwrap();
    drop(busy);
    let reply = Message::from_vec(&ask_udp(&rig, &request).await).unwrap();
    assert_eq!(reply.answers.len(), 1, "there is room again");
    assert_eq!(*rig.names.asked.lock(), ["a"], "the others were dropped");
    assert_eq!(rig.names.dropped.available_permits(), 0, "and nothing else");
}

#[tokio::test]
async fn what_is_forged_to_come_from_the_server_itself_is_not_answered() {
    let rig = rig(None).await;
    let request = question("web.a.", RecordType::A).to_vec().unwrap();
    rig.own.send_to(&request, rig.address).unwrap();
    let reply = Message::from_vec(&ask_udp(&rig, &request).await).unwrap();
    assert_eq!(reply.answers.len(), 1);
    assert_eq!(*rig.names.asked.lock(), ["a"], "the later one alone");
}

#[tokio::test]
async fn a_drain_ends_both_listeners() {
    let mut rig = rig(None).await;
    rig.drain.start(drain::Mode::graceful(DEADLINE));
    let ended = async { while rig.serving.join_next().await.is_some() {} };
    timeout(DEADLINE, ended).await.expect("both listeners end");
}

#[test]
fn the_default_patience_leaves_time_for_a_second_server() {
    let upstreams = Upstreams::parse("", true);
    assert!(upstreams.timeout * 2 < Duration::from_secs(5));
}
