//! The cluster's DNS server: services, headless services and their pods, also for pods outside the mesh. It knows nothing
//! else and has no uplink to ask: other names are refused, which is the truth.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
};
use parking_lot::RwLock;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    runtime::Handle,
};

use super::{address, objects::Key, services::ServiceView};

const DOMAIN: &str = "cluster.local";
const TTL: u32 = 5;
/// RFC 1035 4.2.1: what fits into a datagram when the client says nothing else.
const PLAIN_DATAGRAM: usize = 512;

/// What the server answers from, replaced whole when services change.
pub(super) type Zone = Arc<RwLock<Arc<BTreeMap<Key, ServiceView>>>>;

/// Serves on the control plane's namespace until the process ends.
pub(super) fn serve(runtime: &Handle, zone: &Zone) {
    for ip in address::CONTROL.both() {
        let address = SocketAddr::new(ip, 53);
        let (udp, tcp) = (zone.clone(), zone.clone());
        runtime.spawn(async move {
            if let Err(error) = serve_udp(address, udp).await {
                tracing::warn!(%address, %error, "serve DNS over UDP");
            }
        });
        runtime.spawn(async move {
            if let Err(error) = serve_tcp(address, tcp).await {
                tracing::warn!(%address, %error, "serve DNS over TCP");
            }
        });
    }
}

async fn serve_udp(address: SocketAddr, zone: Zone) -> io::Result<()> {
    let socket = UdpSocket::bind(address).await?;
    let mut buffer = [0; 4096];
    loop {
        let (length, client) = socket.recv_from(&mut buffer).await?;
        let reply = respond(&zone.read().clone(), &buffer[..length], true);
        if let Some(reply) = reply {
            let _ = socket.send_to(&reply, client).await;
        }
    }
}

async fn serve_tcp(address: SocketAddr, zone: Zone) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let zone = zone.clone();
        tokio::spawn(async move {
            let limit = std::time::Duration::from_secs(10);
            let _ = tokio::time::timeout(limit, serve_connection(stream, zone)).await;
        });
    }
}

async fn serve_connection(mut stream: TcpStream, zone: Zone) -> io::Result<()> {
    loop {
        let length = stream.read_u16().await?;
        let mut query = vec![0; usize::from(length)];
        stream.read_exact(&mut query).await?;
        let reply = respond(&zone.read().clone(), &query, false);
        let Some(reply) = reply else { return Ok(()) };
        let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
        stream.write_u16(length).await?;
        stream.write_all(&reply).await?;
    }
}

/// The reply to one message; `None` for what is not a query. A reply too long for a datagram is cut, and says so.
pub(super) fn respond(
    zone: &BTreeMap<Key, ServiceView>,
    query: &[u8],
    datagram: bool,
) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok()?;
    if query.metadata.message_type != MessageType::Query {
        return None;
    }
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    for question in &query.queries {
        reply.add_query(question.clone());
    }
    match (query.metadata.op_code, query.queries.as_slice()) {
        (OpCode::Query, [question]) => fill(&mut reply, zone, question),
        (OpCode::Query, _) => reply.metadata.response_code = ResponseCode::FormErr,
        _ => reply.metadata.response_code = ResponseCode::NotImp,
    }
    let limit = query.edns.as_ref().map_or(PLAIN_DATAGRAM, |edns| {
        usize::from(edns.max_payload()).max(PLAIN_DATAGRAM)
    });
    let bytes = reply.to_vec().ok()?;
    if datagram && bytes.len() > limit {
        reply.answers.clear();
        reply.metadata.truncation = true;
        return reply.to_vec().ok();
    }
    Some(bytes)
}

fn fill(reply: &mut Message, zone: &BTreeMap<Key, ServiceView>, question: &Query) {
    let name = question.name();
    match answer(
        zone,
        &name.to_ascii().to_ascii_lowercase(),
        question.query_type(),
    ) {
        Answer::Records(data) => {
            reply.metadata.authoritative = true;
            for data in data {
                let mut record = Record::from_rdata(name.clone(), TTL, data);
                record.dns_class = DNSClass::IN;
                reply.add_answer(record);
            }
        }
        Answer::NoSuchName => {
            reply.metadata.authoritative = true;
            reply.metadata.response_code = ResponseCode::NXDomain;
        }
        Answer::NotOurs => reply.metadata.response_code = ResponseCode::Refused,
    }
}

/// What is known of a name.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    /// The name exists; empty where it has nothing of the type asked for.
    Records(Vec<RData>),
    /// It would be ours, and does not exist.
    NoSuchName,
    /// It is outside the cluster's domain, and there is nobody to ask.
    NotOurs,
}

/// Looks a lower-case name up. Pure.
pub(super) fn answer(zone: &BTreeMap<Key, ServiceView>, name: &str, wanted: RecordType) -> Answer {
    let name = name.trim_end_matches('.');
    if let Some(reverse) = reverse(name) {
        return pointer(zone, reverse, wanted);
    }
    let Some(inner) = name.strip_suffix(DOMAIN) else {
        return Answer::NotOurs;
    };
    let Some(inner) = inner.strip_suffix('.') else {
        return if inner.is_empty() {
            Answer::Records(Vec::new())
        } else {
            Answer::NotOurs
        };
    };
    let labels: Vec<&str> = inner.split('.').collect();
    match labels.as_slice() {
        [rest @ .., namespace, "svc"] => in_service(zone, rest, namespace, wanted),
        ["svc"] => Answer::Records(Vec::new()),
        _ => Answer::NoSuchName,
    }
}

fn in_service(
    zone: &BTreeMap<Key, ServiceView>,
    labels: &[&str],
    namespace: &str,
    wanted: RecordType,
) -> Answer {
    let find = |name: &str| zone.get(&Key::new(namespace, name));
    match labels {
        [] if zone.keys().any(|key| key.namespace == namespace) => Answer::Records(Vec::new()),
        [name] => match find(name) {
            Some(service) => Answer::Records(addresses(service, wanted)),
            None => Answer::NoSuchName,
        },
        [host, name] => match find(name) {
            Some(service) => of_host(service, host, wanted),
            None => Answer::NoSuchName,
        },
        [port, protocol, name] => match (
            find(name),
            port.strip_prefix('_'),
            protocol.strip_prefix('_'),
        ) {
            (Some(service), Some(port), Some(protocol)) => {
                service_records(service, port, protocol, wanted)
            }
            _ => Answer::NoSuchName,
        },
        _ => Answer::NoSuchName,
    }
}

fn addresses(service: &ServiceView, wanted: RecordType) -> Vec<RData> {
    if let Some(other) = &service.external_name {
        let name = Name::from_ascii(format!("{}.", other.trim_end_matches('.')));
        return name
            .into_iter()
            .map(|name| RData::CNAME(rdata::CNAME(name)))
            .collect();
    }
    let ips: Vec<IpAddr> = match service.headless {
        true => service.hosts.iter().map(|(ip, _)| *ip).collect(),
        false => service.addresses.clone(),
    };
    records(ips, wanted)
}

fn of_host(service: &ServiceView, host: &str, wanted: RecordType) -> Answer {
    let named = |(ip, name): &(IpAddr, Option<String>)| {
        let own = name.as_deref() == Some(host) || ip.to_string().replace(['.', ':'], "-") == host;
        own.then_some(*ip)
    };
    let ips: Vec<IpAddr> = service.hosts.iter().filter_map(named).collect();
    if ips.is_empty() {
        Answer::NoSuchName
    } else {
        Answer::Records(records(ips, wanted))
    }
}

fn records(ips: Vec<IpAddr>, wanted: RecordType) -> Vec<RData> {
    let of_type = ips.into_iter().filter_map(|ip| match (ip, wanted) {
        (IpAddr::V4(ip), RecordType::A) => Some(RData::A(rdata::A(ip))),
        (IpAddr::V6(ip), RecordType::AAAA) => Some(RData::AAAA(rdata::AAAA(ip))),
        _ => None,
    });
    of_type.collect()
}

fn service_records(
    service: &ServiceView,
    port: &str,
    protocol: &str,
    wanted: RecordType,
) -> Answer {
    let Some(port) = service
        .ports
        .iter()
        .find(|known| known.name == port && known.protocol == protocol)
    else {
        return Answer::NoSuchName;
    };
    let target = Name::from_ascii(format!(
        "{}.{}.svc.{DOMAIN}.",
        service.key.name, service.key.namespace
    ));
    match (wanted, target) {
        (RecordType::SRV, Ok(target)) => {
            Answer::Records(vec![RData::SRV(rdata::SRV::new(0, 100, port.port, target))])
        }
        _ => Answer::Records(Vec::new()),
    }
}

fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(labels) = name.strip_suffix(".in-addr.arpa") {
        let octets: Vec<&str> = labels.split('.').rev().collect();
        return octets
            .join(".")
            .parse::<std::net::Ipv4Addr>()
            .ok()
            .map(IpAddr::V4);
    }
    let labels = name.strip_suffix(".ip6.arpa")?;
    let digits: String = labels.split('.').rev().collect();
    let bits = u128::from_str_radix(&digits, 16)
        .ok()
        .filter(|_| digits.len() == 32)?;
    Some(IpAddr::V6(bits.into()))
}

fn pointer(zone: &BTreeMap<Key, ServiceView>, ip: IpAddr, wanted: RecordType) -> Answer {
    let Some(service) = zone
        .values()
        .find(|service| service.addresses.contains(&ip))
    else {
        return Answer::NoSuchName;
    };
    let target = Name::from_ascii(format!(
        "{}.{}.svc.{DOMAIN}.",
        service.key.name, service.key.namespace
    ));
    let pointed = target
        .ok()
        .filter(|_| wanted == RecordType::PTR)
        .map(|name| RData::PTR(rdata::PTR(name)));
    Answer::Records(pointed.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::services::{PortView, dns_service};

    fn zone() -> BTreeMap<Key, ServiceView> {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let web = ServiceView {
            key: Key::new("a", "web"),
            addresses: vec![ip("10.96.1.1"), ip("fd00:10:96::101")],
            headless: false,
            external_name: None,
            ports: vec![PortView {
                name: "http".into(),
                protocol: "tcp".into(),
                port: 80,
                backends: [].into(),
            }],
            hosts: Vec::new(),
        };
        let mut headless = web.clone();
        headless.key = Key::new("a", "db");
        headless.addresses.clear();
        headless.headless = true;
        headless.hosts = vec![
            (ip("10.244.1.2"), Some("db-0".to_owned())),
            (ip("10.244.2.2"), None),
        ];
        let mut elsewhere = web.clone();
        elsewhere.key = Key::new("a", "else");
        elsewhere.addresses.clear();
        elsewhere.external_name = Some("example.org".to_owned());
        [dns_service(), web, headless, elsewhere]
            .map(|service| (service.key.clone(), service))
            .into()
    }

    #[track_caller]
    fn check(name: &str, wanted: RecordType, expected: &[&str]) {
        match answer(&zone(), name, wanted) {
            Answer::Records(records) => {
                let texts: Vec<_> = records.iter().map(ToString::to_string).collect();
                assert_eq!(texts, expected, "{name} {wanted}");
            }
            other => panic!("{name} {wanted}: {other:?}"),
        }
    }

    #[test]
    fn names_of_the_cluster_are_answered() {
        check("web.a.svc.cluster.local.", RecordType::A, &["10.96.1.1"]);
        check(
            "web.a.svc.cluster.local",
            RecordType::AAAA,
            &["fd00:10:96::101"],
        );
        check("web.a.svc.cluster.local.", RecordType::MX, &[]);
        check(
            "db.a.svc.cluster.local.",
            RecordType::A,
            &["10.244.1.2", "10.244.2.2"],
        );
        check(
            "db-0.db.a.svc.cluster.local.",
            RecordType::A,
            &["10.244.1.2"],
        );
        check(
            "10-244-2-2.db.a.svc.cluster.local.",
            RecordType::A,
            &["10.244.2.2"],
        );
        check(
            "_http._tcp.web.a.svc.cluster.local.",
            RecordType::SRV,
            &["0 100 80 web.a.svc.cluster.local."],
        );
        check(
            "else.a.svc.cluster.local.",
            RecordType::A,
            &["example.org."],
        );
        check(
            "1.1.96.10.in-addr.arpa.",
            RecordType::PTR,
            &["web.a.svc.cluster.local."],
        );
        check(
            "kube-dns.kube-system.svc.cluster.local.",
            RecordType::A,
            &["10.96.0.10"],
        );
        check("a.svc.cluster.local.", RecordType::A, &[]);
    }

    #[test]
    fn names_that_are_not_there_differ_from_names_of_others() {
        for name in [
            "no.a.svc.cluster.local.",
            "web.a.cluster.local.",
            "web.b.svc.cluster.local.",
            "b.svc.cluster.local.",
        ] {
            assert_eq!(
                answer(&zone(), name, RecordType::A),
                Answer::NoSuchName,
                "{name}"
            );
        }
        for name in ["example.org.", "notcluster.local.", "."] {
            assert_eq!(
                answer(&zone(), name, RecordType::A),
                Answer::NotOurs,
                "{name}"
            );
        }
    }

    #[test]
    fn a_reply_too_long_for_a_datagram_is_cut() {
        let mut zone = zone();
        let db = zone.get_mut(&Key::new("a", "db")).unwrap();
        db.hosts = (0..200)
            .map(|n| (IpAddr::from([10, 244, 1, n]), None))
            .collect();
        let mut query = Message::query();
        query.metadata.id = 7;
        query.add_query(Query::query(
            Name::from_ascii("db.a.svc.cluster.local.").unwrap(),
            RecordType::A,
        ));
        let query = query.to_vec().unwrap();
        let reply = Message::from_vec(&respond(&zone, &query, true).unwrap()).unwrap();
        assert!(reply.metadata.truncation && reply.answers.is_empty());
        let reply = Message::from_vec(&respond(&zone, &query, false).unwrap()).unwrap();
        assert_eq!((reply.answers.len(), reply.metadata.id), (200, 7));
        assert_eq!(respond(&zone, b"garbage", true), None);
    }
}
