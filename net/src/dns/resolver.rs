//! Host names of workloads that have no address: resolved by us, through the node's name servers.
//!
//! Waiters for one name share one question; answers are kept for their TTL, a refusal for a short while.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use mesh::names::Str;

use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::{ResolvConf, Transport, forward};
use crate::{report::Chain, socket::Factory};

const CACHED_NAMES: usize = 4096;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(300);
/// How long "no address" is believed.
const NEGATIVE: Duration = Duration::from_secs(2);

/// The addresses of a name, while they hold.
#[derive(Clone, Debug)]
struct Resolved {
    addresses: Arc<[IpAddr]>,
    until: Instant,
}

type Slot = Arc<OnceCell<Resolved>>;

/// Resolves through the name servers of the node's `resolv.conf`, from sockets in our own namespace.
pub struct Resolver {
    sockets: Factory,
    upstreams: Arc<ResolvConf>,
    ipv6: bool,
    slots: Mutex<HashMap<Str, Slot>>,
}

impl Resolver {
    /// Knows nothing yet.
    pub fn new(sockets: Factory, upstreams: Arc<ResolvConf>, ipv6: bool) -> Self {
        Self {
            sockets,
            upstreams,
            ipv6,
            slots: Mutex::default(),
        }
    }

    /// The addresses of a host name, of both families, in the order of the answers; empty: none. Bounded by the
    /// patience of `resolv.conf`.
    pub async fn resolve(&self, hostname: &Str) -> Arc<[IpAddr]> {
        let slot = self.slot(hostname);
        let resolved = slot.get_or_init(|| self.ask(hostname)).await;
        resolved.addresses.clone()
    }

    fn slot(&self, hostname: &Str) -> Slot {
        let now = Instant::now();
        let mut slots = self.slots.lock();
        let fresh = |slot: &Slot| slot.get().is_none_or(|resolved| now < resolved.until);
        if let Some(slot) = slots.get(hostname).filter(|slot| fresh(slot)) {
            return slot.clone();
        }
        if slots.len() >= CACHED_NAMES {
            slots.retain(|_, slot| fresh(slot));
        }
        if slots.len() >= CACHED_NAMES {
            slots.clear();
        }
        let slot = Slot::default();
        slots.insert(hostname.clone(), slot.clone());
        slot
    }

    async fn ask(&self, hostname: &str) -> Resolved {
        let (v4, v6) = tokio::join!(self.ask_family(hostname, RecordType::A), async {
            match self.ipv6 {
                true => self.ask_family(hostname, RecordType::AAAA).await,
                false => Vec::new(),
            }
        });
        let records = [v4, v6].concat();
        let ttl = records.iter().map(|(_, ttl)| *ttl).min();
        let lifetime = ttl.map_or(NEGATIVE, |ttl| ttl.clamp(SHORTEST, LONGEST));
        Resolved {
            addresses: records.into_iter().map(|(address, _)| address).collect(),
            until: Instant::now() + lifetime,
        }
    }

    async fn ask_family(&self, hostname: &str, kind: RecordType) -> Vec<(IpAddr, Duration)> {
        let Some(request) = question(hostname, kind) else {
            return Vec::new();
        };
        let upstreams = self.upstreams.current();
        let mut transport = Transport::Udp;
        loop {
            let asked = forward::exchange(&self.sockets, &upstreams, transport, &request).await;
            let reply = match asked.map(|bytes| Message::from_vec(&bytes)) {
                Ok(Ok(reply)) => reply,
                Ok(Err(error)) => {
                    tracing::debug!(hostname, %error, "unreadable answer of a name server");
                    return Vec::new();
                }
                Err(error) => {
                    tracing::debug!(
                        hostname,
                        error = Chain(&error).to_string(),
                        "host name not resolved"
                    );
                    return Vec::new();
                }
            };
            if reply.metadata.truncation && transport == Transport::Udp {
                transport = Transport::Tcp;
                continue;
            }
            return addresses(&reply);
        }
    }
}

/// A question for a host name, from its root on; `None` where it can be none.
pub fn question(hostname: &str, kind: RecordType) -> Option<Vec<u8>> {
    let mut name = Name::from_ascii(hostname).ok()?;
    name.set_fqdn(true);
    let mut message = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    message.to_vec().ok()
}

/// The addresses that an answer holds, whatever they are called there, and for how long each may be used.
pub fn addresses(reply: &Message) -> Vec<(IpAddr, Duration)> {
    if reply.metadata.response_code != ResponseCode::NoError {
        return Vec::new();
    }
    let address = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    };
    let records = reply.answers.iter();
    records
        .filter_map(|record| {
            let ttl = Duration::from_secs(record.ttl.into());
            Some((address(&record.data)?, ttl))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use hickory_proto::rr::Record;
    use tokio::net::UdpSocket;

    use super::*;
    use crate::testing::tcp_and_udp;

    /// The answer to a question: 192.0.2.1 for A, nothing for AAAA.
    fn answered(question: &[u8]) -> Message {
        let mut message = Message::from_vec(question).unwrap();
        message.metadata.message_type = MessageType::Response;
        let query = message.queries[0].clone();
        if query.query_type() == RecordType::A {
            let data = RData::A("192.0.2.1".parse().unwrap());
            message.add_answer(Record::from_rdata(query.name().clone(), 60, data));
        }
        message
    }

    /// Answers, and counts the questions.
    async fn name_server(asked: Arc<AtomicUsize>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                asked.fetch_add(1, Ordering::SeqCst);
                let reply = answered(&buffer[..length]).to_vec().unwrap();
                socket.send_to(&reply, peer).await.unwrap();
            }
        });
        address
    }

    /// Its answers do not fit into a datagram.
    async fn lengthy_name_server() -> SocketAddr {
        let (tcp, udp) = tcp_and_udp().await;
        let address = tcp.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((length, peer)) = udp.recv_from(&mut buffer).await {
                let mut cut = answered(&buffer[..length]);
                cut.answers.clear();
                cut.metadata.truncation = true;
                udp.send_to(&cut.to_vec().unwrap(), peer).await.unwrap();
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                let question = forward::read_message(&mut stream).await.unwrap();
                let reply = answered(&question).to_vec().unwrap();
                forward::write_message(&mut stream, &reply).await.unwrap();
            }
        });
        address
    }

    fn resolver(server: SocketAddr) -> Resolver {
        // A file that never is there never changes.
        let upstreams = ResolvConf::with_servers("/no/such/resolv.conf".into(), [server]);
        Resolver::new(Factory::default(), Arc::new(upstreams), true)
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_is_fetched_over_tcp() {
        let resolver = resolver(lengthy_name_server().await);
        let expected: [IpAddr; 1] = ["192.0.2.1".parse().unwrap()];
        let found = resolver.resolve(&"db.example.com".into()).await;
        assert_eq!(*found, expected);
    }

    #[tokio::test]
    async fn waiters_share_one_question_and_its_answer_is_kept() {
        let asked = Arc::new(AtomicUsize::new(0));
        let resolver = resolver(name_server(asked.clone()).await);
        let host: Str = "db.example.com".into();
        let (first, second) = tokio::join!(resolver.resolve(&host), resolver.resolve(&host));
        let expected: [IpAddr; 1] = ["192.0.2.1".parse().unwrap()];
        assert_eq!((&*first, &*second), (&expected[..], &expected[..]));
        assert_eq!(*resolver.resolve(&host).await, expected);
        assert_eq!(asked.load(Ordering::SeqCst), 2, "one question per family");
    }
}
