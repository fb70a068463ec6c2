//! DNS messages on the wire: which questions we may answer ourselves, and how the answers are written.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
};

/// Length of the header, and so of the shortest message (RFC 1035 4.1.1).
pub const HEADER_LEN: usize = 12;
/// What a UDP client takes unless it says otherwise (RFC 1035 4.2.1).
const MIN_UDP_PAYLOAD: u16 = 512;

/// What arrived.
#[derive(Debug)]
pub enum Received {
    /// One question for an address, which the mesh may know.
    Address(Box<AddressQuery>),
    /// Anything else that asks: forwarded as it is.
    Other(Other),
    /// Not a request at all: answered with FORMERR.
    NotARequest,
    /// Too short to answer.
    Garbage,
}

/// What is not ours to answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Other {
    /// The type's name, for metrics.
    pub kind: String,
    /// The name of a plain question: lower case, without the final dot.
    pub name: Option<String>,
}

impl Other {
    fn unknown() -> Self {
        Self {
            kind: "unknown".to_owned(),
            name: None,
        }
    }
}

/// One question for the IPv4 or IPv6 addresses of a name.
#[derive(Debug)]
pub struct AddressQuery {
    message: Message,
}

/// What the mesh knows about the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// A name that the question's name stands for, and that owns the addresses.
    pub alias_of: Option<String>,
    /// Addresses of the asked family; may be empty.
    pub addresses: Vec<IpAddr>,
    /// Seconds.
    pub ttl: u32,
}

/// Looks at a message without trusting it.
pub fn inspect(bytes: &[u8]) -> Received {
    if bytes.len() < HEADER_LEN {
        return Received::Garbage;
    }
    if bytes[2] & 0x80 != 0 {
        return Received::NotARequest;
    }
    // What does not parse here may still make sense to a name server.
    let Ok(message) = Message::from_vec(bytes) else {
        return Received::Other(Other::unknown());
    };
    let [query] = message.queries.as_slice() else {
        return Received::Other(Other::unknown());
    };
    let is_query = message.metadata.op_code == OpCode::Query;
    let is_internet = query.query_class() == DNSClass::IN;
    let is_address = matches!(query.query_type(), RecordType::A | RecordType::AAAA);
    let is_plain = is_query && is_internet && message.signature.is_none();
    if is_plain && is_address {
        return Received::Address(Box::new(AddressQuery { message }));
    }
    Received::Other(Other {
        kind: query.query_type().to_string().to_ascii_lowercase(),
        name: is_plain.then(|| plain(query.name())),
    })
}

/// Lower case, without the final dot.
fn plain(name: &Name) -> String {
    let mut name = name.to_ascii();
    name.make_ascii_lowercase();
    if name.ends_with('.') {
        name.pop();
    }
    name
}

/// Turns "there is no such name" into "there is nothing of that type" (RFC 8020 2): the name is one of the mesh's, and a
/// resolver that believes the first would not ask for its addresses any more.
pub fn admit_name(reply: &mut [u8]) {
    const NXDOMAIN: u8 = 3;
    /// Authenticated data (RFC 4035 3.2.3): no longer what was signed.
    const AD: u8 = 0x20;
    if let Some(flags) = reply.get_mut(3)
        && *flags & 0x0f == NXDOMAIN
    {
        *flags &= !(0x0f | AD);
    }
}

/// Whether a name server says that it could not answer, or would not: SERVFAIL or REFUSED (RFC 1035 4.1.1).
pub fn is_failure(reply: &[u8]) -> bool {
    const REFUSED: u8 = 5;
    let code = reply.get(3).map(|flags| flags & 0x0f);
    code.is_some_and(|code| code == RawCode::ServFail as u8 || code == REFUSED)
}

/// The name that an alias leads to, as [`AddressQuery::name`] writes it.
pub(super) fn target(alias: &Record) -> Option<String> {
    match &alias.data {
        RData::CNAME(target) => Some(plain(target)),
        _ => None,
    }
}

impl AddressQuery {
    /// The name asked for, lower case, without the final dot.
    pub fn name(&self) -> String {
        plain(self.message.queries[0].name())
    }

    /// `a` or `aaaa`.
    pub fn type_name(&self) -> &'static str {
        if self.wants_ipv6() { "aaaa" } else { "a" }
    }

    /// Whether the question is for IPv6 addresses.
    pub fn wants_ipv6(&self) -> bool {
        self.message.queries[0].query_type() == RecordType::AAAA
    }

    /// Largest answer that the client takes over UDP.
    pub fn max_udp_payload(&self) -> usize {
        let offered = self.message.edns.as_ref().map(Edns::max_payload);
        offered
            .unwrap_or(MIN_UDP_PAYLOAD)
            .max(MIN_UDP_PAYLOAD)
            .into()
    }

    /// The aliases of a name server's answer, in the order in which they lead away from the question; empty where it has
    /// none, or makes no sense.
    pub fn aliases(&self, reply: &[u8]) -> Vec<Record> {
        /// More than any sane zone has in a row.
        const MOST: usize = 8;
        let Ok(reply) = Message::from_vec(reply) else {
            return Vec::new();
        };
        let mut chain: Vec<Record> = Vec::new();
        let mut owner = self.message.queries[0].name().clone();
        while chain.len() < MOST
            && let Some(next) = reply.answers.iter().find(|it| it.name == owner)
            && let RData::CNAME(target) = &next.data
        {
            owner = target.0.clone();
            chain.push(next.clone());
        }
        chain
    }

    /// The answer where a name server's aliases lead to a name that the mesh knows; [`AddressQuery::answer`] otherwise.
    pub fn answer_through(
        &self,
        aliases: &[Record],
        known: &Addresses,
        limit: usize,
    ) -> Option<Vec<u8>> {
        let mut response = self.response(ResponseCode::NoError);
        let mut owner = self.message.queries[0].name().clone();
        for alias in aliases {
            if let RData::CNAME(target) = &alias.data {
                owner = target.0.clone();
            }
            response.add_answer(alias.clone());
        }
        add_addresses(&mut response, &owner, known);
        encode(&response, limit)
    }

    /// The answer on the wire; over `limit` bytes it is cut and says so (RFC 2181 9).
    pub fn answer(&self, known: &Addresses, limit: usize) -> Option<Vec<u8>> {
        let mut response = self.response(ResponseCode::NoError);
        response.metadata.authoritative = true;
        let asked = self.message.queries[0].name().clone();
        let owner = match &known.alias_of {
            Some(target) => {
                let target = Name::from_ascii(format!("{target}.")).ok()?;
                let alias = RData::CNAME(rdata::CNAME(target.clone()));
                response.add_answer(Record::from_rdata(asked, known.ttl, alias));
                target
            }
            None => asked,
        };
        add_addresses(&mut response, &owner, known);
        encode(&response, limit)
    }

    /// An answer without records.
    pub fn failure(&self) -> Option<Vec<u8>> {
        encode(
            &self.response(ResponseCode::ServFail),
            self.max_udp_payload(),
        )
    }

    fn response(&self, code: ResponseCode) -> Message {
        let request = &self.message;
        let mut response = Message::new(request.metadata.id, MessageType::Response, OpCode::Query);
        response.metadata.response_code = code;
        response.metadata.recursion_desired = request.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.metadata.checking_disabled = request.metadata.checking_disabled;
        response.add_query(request.queries[0].clone());
        if let Some(theirs) = &request.edns {
            let mut ours = Edns::new();
            ours.set_max_payload(theirs.max_payload().max(MIN_UDP_PAYLOAD));
            ours.set_dnssec_ok(theirs.flags().dnssec_ok);
            response.set_edns(ours);
        }
        response
    }
}

fn add_addresses(response: &mut Message, owner: &Name, known: &Addresses) {
    for address in &known.addresses {
        let data = match address {
            IpAddr::V4(v4) => RData::A((*v4).into()),
            IpAddr::V6(v6) => RData::AAAA((*v6).into()),
        };
        response.add_answer(Record::from_rdata(owner.clone(), known.ttl, data));
    }
}

fn encode(response: &Message, limit: usize) -> Option<Vec<u8>> {
    let whole = response.to_vec().ok()?;
    if whole.len() <= limit {
        return Some(whole);
    }
    let mut cut = response.truncate();
    cut.answers.clear();
    cut.metadata.truncation = true;
    cut.to_vec().ok().filter(|bytes| bytes.len() <= limit)
}

/// The answer to a message that we cannot answer and could not forward: its header and question, and a code.
///
/// Works on raw bytes, so that it also answers what does not parse.
pub fn raw_failure(request: &[u8], code: RawCode) -> Option<Vec<u8>> {
    let header: &[u8; HEADER_LEN] = request.first_chunk()?;
    let mut reply = header.to_vec();
    // QR=1, opcode and RD kept; RA=1 and the code; no record in any section (RFC 1035 4.1.1).
    reply[2] = 0x80 | (header[2] & 0x79);
    reply[3] = 0x80 | code as u8;
    reply[4..].fill(0);
    Some(reply)
}

/// Response codes of [`raw_failure`] (RFC 1035 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawCode {
    /// The message makes no sense.
    FormErr = 1,
    /// We failed.
    ServFail = 2,
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;

    use super::*;

    fn query(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        if let Some(payload) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            edns.set_dnssec_ok(true);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    }

    fn address_query(bytes: &[u8]) -> Box<AddressQuery> {
        match inspect(bytes) {
            Received::Address(query) => query,
            other => panic!("{other:?}"),
        }
    }

    fn known(alias_of: Option<&str>, addresses: &[&str]) -> Addresses {
        Addresses {
            alias_of: alias_of.map(Into::into),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ttl: 30,
        }
    }

    #[test]
    fn an_answer_is_authoritative_and_echoes_edns() {
        let query = address_query(&query("Web.a.", RecordType::A, Some(1232)));
        assert_eq!(query.name(), "web.a");
        let bytes = query.answer(&known(None, &["10.0.0.1"]), 1232).unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.metadata.id, 7);
        assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
        assert_eq!(answer.answers.len(), 1);
        assert_eq!(answer.answers[0].ttl, 30);
        let edns = answer.edns.unwrap();
        assert_eq!(edns.max_payload(), 1232);
        assert!(edns.flags().dnssec_ok);
    }

    #[test]
    fn an_alias_owns_the_records() {
        let query = address_query(&query("www.x.com.a.svc.d.", RecordType::AAAA, None));
        let bytes = query
            .answer(&known(Some("www.x.com"), &["fd00::1"]), 512)
            .unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.answers[0].record_type(), RecordType::CNAME);
        assert_eq!(answer.answers[1].name.to_ascii(), "www.x.com.");
    }

    #[test]
    fn an_answer_too_long_for_the_client_is_cut_and_says_so() {
        let many: Vec<String> = (0..100).map(|n| format!("10.0.0.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let query = address_query(&query("web.", RecordType::A, None));
        let bytes = query
            .answer(&known(None, &many), query.max_udp_payload())
            .unwrap();
        assert!(bytes.len() <= 512);
        assert!(Message::from_vec(&bytes).unwrap().metadata.truncation);
        assert!(
            query
                .answer(&known(None, &many), usize::from(u16::MAX))
                .unwrap()
                .len()
                > 512
        );
    }

    #[test]
    fn what_is_not_a_question_for_an_address_is_left_alone() {
        let srv = query("web.a.", RecordType::SRV, None);
        assert!(
            matches!(inspect(&srv), Received::Other(it) if it.kind == "srv" && it.name.as_deref() == Some("web.a"))
        );
        let mut update = query("web.a.", RecordType::A, None);
        update[2] |= 5 << 3;
        assert!(matches!(inspect(&update), Received::Other(it) if it.name.is_none()));
        let mut answer = query("web.a.", RecordType::A, None);
        answer[2] |= 0x80;
        assert!(matches!(inspect(&answer), Received::NotARequest));
        assert!(matches!(inspect(&[0; 11]), Received::Garbage));
        assert!(matches!(inspect(&[0xff; 30]), Received::NotARequest));
        assert!(matches!(inspect(&[0x7f; 30]), Received::Other(_)));
    }

    #[test]
    fn a_name_server_that_cannot_answer_has_failed_and_one_that_denies_has_not() {
        let mut reply = query("web.a.", RecordType::A, None);
        for (code, failed) in [(0, false), (2, true), (3, false), (5, true)] {
            reply[3] = 0x80 | code;
            assert_eq!(is_failure(&reply), failed, "{code}");
        }
        assert!(!is_failure(&[]));
    }

    #[test]
    fn a_raw_failure_keeps_the_id() {
        let reply = raw_failure(&query("a.", RecordType::A, None), RawCode::ServFail).unwrap();
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!(reply.metadata.id, 7);
        assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    }

    fn alias(from: &str, to: &str, ttl: u32) -> Record {
        let target = RData::CNAME(rdata::CNAME(Name::from_ascii(to).unwrap()));
        Record::from_rdata(Name::from_ascii(from).unwrap(), ttl, target)
    }

    #[test]
    fn aliases_are_followed_from_the_question_on_and_keep_their_ttl() {
        let asked = address_query(&query("ext.a.", RecordType::A, None));
        let mut reply = Message::new(7, MessageType::Response, OpCode::Query);
        reply.metadata.response_code = ResponseCode::NXDomain;
        reply.add_answer(alias("other.", "elsewhere.", 1));
        reply.add_answer(alias("b.example.com.", "c.example.com.", 20));
        reply.add_answer(alias("EXT.a.", "b.example.com.", 10));
        let aliases = asked.aliases(&reply.to_vec().unwrap());
        let targets: Vec<_> = aliases.iter().filter_map(target).collect();
        assert_eq!(targets, ["b.example.com", "c.example.com"]);
        let known = known(None, &["10.0.0.1"]);
        let bytes = asked.answer_through(&aliases[..1], &known, 512).unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        let told: Vec<_> = answer
            .answers
            .iter()
            .map(|it| (it.name.to_ascii().to_lowercase(), it.record_type(), it.ttl))
            .collect();
        let expected = [
            ("ext.a.".to_owned(), RecordType::CNAME, 10),
            ("b.example.com.".to_owned(), RecordType::A, 30),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn aliases_in_a_circle_end() {
        let asked = address_query(&query("a.", RecordType::A, None));
        let mut reply = Message::new(7, MessageType::Response, OpCode::Query);
        reply.add_answer(alias("a.", "b.", 1));
        reply.add_answer(alias("b.", "a.", 1));
        assert_eq!(asked.aliases(&reply.to_vec().unwrap()).len(), 8);
        assert!(asked.aliases(b"nonsense").is_empty());
    }

    #[test]
    fn a_name_of_the_mesh_is_not_denied() {
        let mut reply = query("web.a.", RecordType::TXT, None);
        reply[3] |= 0x23;
        admit_name(&mut reply);
        assert_eq!(reply[3] & 0x2f, 0);
        reply[3] |= 2;
        admit_name(&mut reply);
        assert_eq!(reply[3] & 0x0f, 2, "another failure stays");
    }
}
