use tokio::time::timeout;

use super::*;
use crate::{
    fixture::{SOON, fresh_netns},
    testing::{refusing, without_network_rights},
};

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn own() -> Factory {
    Factory::default()
}

async fn accept_one(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let accepted = timeout(SOON, listener.accept()).await;
    accepted.expect("soon").expect("a connection")
}

fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().expect("bound").port()
}

#[tokio::test]
async fn one_listener_takes_both_families() {
    let Some(netns) = fresh_netns() else { return };
    let factory = Factory::for_pod(netns);
    let listener = factory.listen_any(15008).expect("free");
    for address in ["127.0.0.1:15008", "[::1]:15008"] {
        let address: SocketAddr = address.parse().expect("an address");
        let client = factory.connect(address, SourceAddress::Own).await;
        let client = client.expect("listening");
        let (server, peer) = accept_one(&listener).await;
        assert_eq!(unmapped(peer), client.local_addr().expect("bound"));
        let original = original_destination(&server, peer).expect("connected");
        assert_eq!(original, address, "not redirected: its own address");
    }
}

#[tokio::test]
async fn without_ipv6_a_listener_takes_ipv4() {
    let Some(netns) = fresh_netns() else { return };
    let factory = Factory {
        ipv6: false,
        ..Factory::for_pod(netns)
    };
    let listener = factory.listen_any(15001).expect("free");
    assert!(listener.local_addr().expect("bound").is_ipv4());
    assert_eq!(factory.listen_loopback(15053).expect("free").len(), 1);
    assert_eq!(factory.bind_udp_loopback(15053).expect("free").len(), 1);
}

#[tokio::test]
async fn loopback_listeners_share_the_port() {
    let listeners = own().listen_loopback(0).expect("a port");
    let first = port(&listeners[0]);
    assert!(listeners.iter().all(|l| port(l) == first));
    assert!(
        listeners
            .iter()
            .all(|l| l.local_addr().expect("bound").ip().is_loopback())
    );
}

#[tokio::test]
async fn two_instances_of_a_pod_listener_share_its_port() {
    let Some(netns) = fresh_netns() else { return };
    let factory = Factory::for_pod(netns);
    let _old = factory.listen_any(15006).expect("free");
    let _new = factory.listen_any(15006).expect("shared");
    let selfish = Factory {
        reuse_port: false,
        ..factory
    };
    let error = selfish.listen_any(15006).expect_err("taken");
    assert_eq!(error.io_kind(), io::ErrorKind::AddrInUse);
    let operation = match &error {
        SocketError::Io { operation, .. } => *operation,
        SocketError::Netns { .. } => panic!("{error:?}"),
    };
    assert_eq!(operation, Operation::Bind);
    assert_eq!(error.to_string(), "bind tcp socket [::]:15006");
}

#[tokio::test]
async fn sockets_carry_the_mark_and_the_options() {
    let Some(netns) = fresh_netns() else { return };
    let factory = Factory {
        keepalive: Some(Keepalive {
            user_timeout: true,
            ..Keepalive::default()
        }),
        ..Factory::for_pod(netns)
    };
    let listener = factory.listen_any(80).expect("free");
    assert_eq!(SockRef::from(&listener).mark().ok(), Some(PACKET_MARK));
    let address = "127.0.0.1:80".parse().expect("an address");
    let client = factory.connect(address, SourceAddress::Own).await;
    let client = client.expect("listening");
    let (server, _) = accept_one(&listener).await;
    let options = |stream: &TcpStream| {
        let socket = SockRef::from(stream);
        let time = socket.tcp_keepalive_time().expect("open");
        let interval = socket.tcp_keepalive_interval().expect("open");
        (
            time,
            interval,
            socket.tcp_keepalive_retries().expect("open"),
        )
    };
    assert_eq!(options(&server), options(&client), "its listener's");
    factory.adopt(&server).expect("open");
    for stream in [&client, &server] {
        let socket = SockRef::from(stream);
        assert!(socket.tcp_nodelay().expect("open"));
        assert!(socket.keepalive().expect("open"));
        let time = socket.tcp_keepalive_time().expect("open");
        assert_eq!(time, Duration::from_secs(180));
        let longest = Duration::from_secs(180 + 9 * 180);
        assert_eq!(socket.tcp_user_timeout().expect("open"), Some(longest));
    }
    assert_eq!(SockRef::from(&client).mark().ok(), Some(PACKET_MARK));
}

#[tokio::test]
async fn a_connection_of_somebody_elses_listener_is_given_the_options() {
    let foreign = TcpListener::bind("127.0.0.1:0").await.expect("free");
    let address = foreign.local_addr().expect("bound");
    let _client = own().connect(address, SourceAddress::Own).await;
    let (server, _) = accept_one(&foreign).await;
    assert!(!SockRef::from(&server).keepalive().expect("open"));
    own().adopt(&server).expect("open");
    let socket = SockRef::from(&server);
    assert!(socket.keepalive().expect("open") && socket.tcp_nodelay().expect("open"));
    let time = socket.tcp_keepalive_time().expect("open");
    assert_eq!(time, Duration::from_secs(180));
}

#[test]
fn who_may_not_keep_clients_addresses_is_told_so_beforehand() {
    let refused = without_network_rights(|| own().check_transparent());
    let error = refused.expect_err("no right to");
    assert_eq!(error.io_kind(), io::ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("IP_TRANSPARENT"), "{error}");
    let Some(netns) = fresh_netns() else { return };
    Factory::for_pod(netns)
        .check_transparent()
        .expect("whoever makes namespaces may");
}

#[tokio::test]
async fn what_is_not_acknowledged_is_bounded_without_probes_too() {
    let factory = Factory {
        keepalive: Some(Keepalive {
            probes: false,
            user_timeout: true,
            ..Keepalive::default()
        }),
        ..own()
    };
    let listener = factory.listen(LOOPBACK).expect("a port");
    let address = listener.local_addr().expect("bound");
    let client = factory.connect(address, SourceAddress::Own).await;
    let client = client.expect("listening");
    let socket = SockRef::from(&client);
    assert!(!socket.keepalive().expect("open"));
    assert!(socket.tcp_user_timeout().expect("open").is_some());
}

#[tokio::test]
async fn a_connection_keeps_its_clients_address() {
    let Some(netns) = fresh_netns() else { return };
    let factory = Factory::for_pod(netns);
    let listener = factory.listen_any(80).expect("free");
    let source: IpAddr = "127.0.0.9".parse().expect("an address");
    let address = "127.0.0.1:80".parse().expect("an address");
    let required = SourceAddress::Required(source);
    let client = factory.connect(address, required).await;
    let client = client.expect("permitted");
    let (_, peer) = accept_one(&listener).await;
    assert_eq!(unmapped(peer), client.local_addr().expect("bound"));
    assert_eq!(unmapped(peer).ip(), source);
    assert!(
        PORTS.contains(&peer.port()),
        "{peer} is where clients' own ports are"
    );
}

/// Runs `nft -f -` in the namespace; false, and why on standard output, where there is no nft.
fn nft(netns: &Netns, rules: &str) -> bool {
    use std::{
        io::Write,
        process::{Command, Stdio},
    };
    let run = || {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::piped())
            .spawn()?;
        let mut input = child.stdin.take().expect("piped");
        input.write_all(rules.as_bytes())?;
        drop(input);
        child.wait()
    };
    match netns.run(run).expect("permitted") {
        Ok(status) => {
            assert!(status.success(), "nft: {status}");
            true
        }
        Err(error) => {
            println!("skipped: nft: {error}");
            false
        }
    }
}

#[tokio::test]
async fn a_redirected_connection_knows_where_it_was_going() {
    let Some(netns) = fresh_netns() else { return };
    let rules = "table inet t {
        chain output {
            type nat hook output priority -100
            meta mark != 1337 tcp dport 80 redirect to :15001
        }
    }
    ";
    if !nft(&netns, rules) {
        return;
    }
    let factory = Factory::for_pod(netns);
    let application = Factory {
        mark: None,
        ..factory.clone()
    };
    let listener = factory.listen_any(15001).expect("free");
    for address in ["127.0.0.7:80", "[::1]:80"] {
        let address = address.parse().expect("an address");
        let client = application.connect(address, SourceAddress::Own).await;
        let _client = client.expect("redirected");
        let (server, peer) = accept_one(&listener).await;
        let original = original_destination(&server, peer).expect("connected");
        assert_eq!(original, address);
        let marked = factory.connect(address, SourceAddress::Own).await;
        let error = marked.expect_err("not redirected, and nobody listens there");
        assert_eq!(error.io_kind(), io::ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn whoever_bars_the_way_makes_it_unreachable() {
    let Some(netns) = fresh_netns() else { return };
    let rules = "table inet barred {
        chain input {
            type filter hook input priority filter;
            tcp dport 81 reject with icmpx type admin-prohibited
            meta nfproto ipv4 tcp dport 82 reject with icmp type prot-unreachable
        }
    }
    ";
    if !nft(&netns, rules) {
        return;
    }
    let factory = Factory::for_pod(netns);
    for address in ["127.0.0.1:81", "[::1]:81", "127.0.0.1:82"] {
        let address: SocketAddr = address.parse().expect("an address");
        let error = factory.connect(address, SourceAddress::Own).await;
        let error = error.expect_err("barred");
        assert_eq!(error.io_kind(), io::ErrorKind::HostUnreachable, "{error:?}");
        assert_eq!(error.end_reason(), EndReason::ConnectUnreachable);
    }
}

#[tokio::test]
async fn a_source_of_the_other_family_is_required_or_left() {
    let Some(netns) = fresh_netns() else { return };
    let factory = Factory::for_pod(netns);
    let _listener = factory.listen_any(80).expect("free");
    let address: SocketAddr = "127.0.0.1:80".parse().expect("an address");
    let foreign: IpAddr = "::1".parse().expect("an address");
    let required = factory
        .connect(address, SourceAddress::Required(foreign))
        .await;
    assert!(required.is_err(), "{required:?}");
    let preferred = factory
        .connect(address, SourceAddress::Preferred(foreign))
        .await;
    assert!(preferred.is_ok(), "{preferred:?}");
}

#[tokio::test]
async fn a_refused_connection_says_so() {
    let (address, _held) = refusing();
    let error = own().connect(address, SourceAddress::Own).await;
    let error = error.expect_err("nobody listens");
    assert_eq!(error.io_kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(error.to_string(), format!("connect tcp socket {address}"));
}

#[tokio::test]
async fn udp_sockets_of_both_loopbacks_answer() {
    let Some(netns) = fresh_netns() else { return };
    let factory = Factory::for_pod(netns);
    let sockets = factory.bind_udp_loopback(15053).expect("free");
    assert_eq!(sockets.len(), 2);
    for socket in &sockets {
        let address = socket.local_addr().expect("bound");
        let client = SocketAddr::new(address.ip(), 0);
        let client = factory.bind_udp(client).expect("a port");
        client.send_to(b"q", address).await.expect("sent");
        let mut byte = [0; 2];
        let received = timeout(SOON, socket.recv_from(&mut byte)).await;
        let (n, peer) = received.expect("soon").expect("a datagram");
        assert_eq!((n, peer), (1, client.local_addr().expect("bound")));
    }
}

#[test]
fn the_limit_of_open_files_is_the_hard_one() {
    let limit = raise_open_files_limit().expect("lowering is never needed");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("always");
    assert_eq!((soft, hard), (limit, limit));
}

#[tokio::test]
async fn an_address_is_local_where_an_interface_of_the_namespace_has_it() {
    let sockets = own();
    for (address, expected) in [
        ("127.0.0.1", true),
        ("127.9.9.9", true),
        ("::ffff:127.0.0.1", true),
        ("203.0.113.7", false),
        ("2001:db8::7", false),
    ] {
        let address = address.parse().expect("an address");
        assert_eq!(sockets.is_local(address), expected, "{address}");
    }
}
