//! DNS messages on the wire: which questions we may answer ourselves, and how the answers are written.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
};
use mesh::dns::PortRecords;

/// Length of the header, and so of the shortest message (RFC 1035 4.1.1).
pub const HEADER_LEN: usize = 12;
/// What a UDP client takes unless it says otherwise (RFC 1035 4.2.1).
const MIN_UDP_PAYLOAD: u16 = 512;

/// The type, for metrics, of what has none that can be told.
pub(super) const UNKNOWN: &str = "unknown";

/// What arrived.
#[derive(Debug)]
pub enum Received {
    /// One question for an address, which the mesh may know.
    Address(Box<Question>),
    /// One question for a service's port, which the mesh may know.
    Port(Box<Question>),
    /// Anything else that asks: forwarded as it is.
    Other(Other),
    /// A question that makes no sense: answered with FORMERR.
    Malformed,
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
            kind: UNKNOWN.to_owned(),
            name: None,
        }
    }
}

/// One question: for the IPv4 or IPv6 addresses of a name, or for a port.
#[derive(Debug)]
pub struct Question {
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
    let Ok(message) = Message::from_vec(bytes) else {
        return match is_question(bytes) {
            true => Received::Malformed,
            // An operation that is not known here may still make sense to a name server.
            false => Received::Other(Other::unknown()),
        };
    };
    let [query] = message.queries.as_slice() else {
        return Received::Other(Other::unknown());
    };
    let is_query = message.metadata.op_code == OpCode::Query;
    let is_internet = query.query_class() == DNSClass::IN;
    let kind = query.query_type();
    let is_plain = is_query && is_internet && message.signature.is_none();
    match kind {
        RecordType::A | RecordType::AAAA if is_plain => {
            Received::Address(Box::new(Question { message }))
        }
        RecordType::SRV if is_plain => Received::Port(Box::new(Question { message })),
        _ => Received::Other(Other {
            kind: kind.to_string().to_ascii_lowercase(),
            name: is_plain.then(|| plain(query.name())),
        }),
    }
}

/// Whether the operation is QUERY, 0 (RFC 1035 4.1.1).
fn is_question(bytes: &[u8]) -> bool {
    const OPCODE: u8 = 0x78;
    bytes[2] & OPCODE == 0
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

/// Takes from a name server's answer that it speaks for the zone (AA): to the client it comes from us, who do not.
pub fn disclaim(reply: &mut [u8]) {
    const AA: u8 = 0x04;
    if let Some(flags) = reply.get_mut(2) {
        *flags &= !AA;
    }
}

/// Whether a name server says that it could not answer, or would not: SERVFAIL or REFUSED (RFC 1035 4.1.1).
pub fn is_failure(reply: &[u8]) -> bool {
    const REFUSED: u8 = 5;
    let code = reply.get(3).map(|flags| flags & 0x0f);
    code.is_some_and(|code| code == RawCode::ServFail as u8 || code == REFUSED)
}

/// The name that an alias leads to, as [`Question::name`] writes it.
pub(super) fn target(alias: &Record) -> Option<String> {
    match &alias.data {
        RData::CNAME(target) => Some(plain(target)),
        _ => None,
    }
}

impl Question {
    /// The name asked for, lower case, without the final dot.
    pub fn name(&self) -> String {
        plain(self.message.queries[0].name())
    }

    /// `a`, `aaaa` or `srv`.
    pub fn type_name(&self) -> &'static str {
        match self.message.queries[0].query_type() {
            RecordType::AAAA => "aaaa",
            RecordType::SRV => "srv",
            _ => "a",
        }
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

    /// The answer where a name server's aliases lead to a name that the mesh knows; [`Question::answer`] otherwise.
    pub fn answer_through(
        &self,
        aliases: &[Record],
        known: &Addresses,
        limit: usize,
    ) -> Option<Vec<u8>> {
        if self.is_of_later_edns() {
            return self.failure();
        }
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
        if self.is_of_later_edns() {
            return self.failure();
        }
        let (mut response, owner) = self.local(known.alias_of.as_deref(), known.ttl)?;
        add_addresses(&mut response, &owner, known);
        encode(&response, limit)
    }

    /// The same for a port: one record for each target, and where they fit the targets' addresses, which the client need not
    /// ask for then (RFC 2782).
    pub fn answer_port(&self, known: &PortRecords, limit: usize) -> Option<Vec<u8>> {
        if self.is_of_later_edns() {
            return self.failure();
        }
        let alias = known.cname.as_deref().map(|it| it.trim_end_matches('.'));
        let (mut response, owner) = self.local(alias, known.ttl)?;
        let weight = weight(known.targets.len());
        let mut more = Vec::new();
        for target in &known.targets {
            let name = Name::from_ascii(&target.name).ok()?;
            let place = rdata::SRV::new(0, weight, target.port, name.clone());
            response.add_answer(Record::from_rdata(
                owner.clone(),
                known.ttl,
                RData::SRV(place),
            ));
            let records = target
                .addresses
                .iter()
                .map(|it| record(&name, known.ttl, *it));
            more.extend(records);
        }
        let mut whole = response.clone();
        whole.add_additionals(more);
        let whole = whole.to_vec().ok().filter(|bytes| bytes.len() <= limit);
        // What is additional may be left out without a word (RFC 2181 9).
        whole.or_else(|| encode(&response, limit))
    }

    /// Our own answer without its records, and whose these are.
    fn local(&self, alias_of: Option<&str>, ttl: u32) -> Option<(Message, Name)> {
        let mut response = self.response(ResponseCode::NoError);
        response.metadata.authoritative = true;
        let asked = self.message.queries[0].name().clone();
        let Some(target) = alias_of else {
            return Some((response, asked));
        };
        let target = Name::from_ascii(format!("{target}.")).ok()?;
        let alias = RData::CNAME(rdata::CNAME(target.clone()));
        response.add_answer(Record::from_rdata(asked, ttl, alias));
        Some((response, target))
    }

    /// An answer without records: that we failed, or which version of EDNS we know.
    pub fn failure(&self) -> Option<Vec<u8>> {
        let code = match self.is_of_later_edns() {
            true => ResponseCode::BADVERS,
            false => ResponseCode::ServFail,
        };
        encode(&self.response(code), self.max_udp_payload())
    }

    /// Whether it follows a version of EDNS that we do not know: its answer must say so, in version 0 (RFC 6891 6.1.3).
    fn is_of_later_edns(&self) -> bool {
        self.message.version() > 0
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
        response.add_answer(record(owner, known.ttl, *address));
    }
}

fn record(owner: &Name, ttl: u32, address: IpAddr) -> Record {
    let data = match address {
        IpAddr::V4(v4) => RData::A(v4.into()),
        IpAddr::V6(v6) => RData::AAAA(v6.into()),
    };
    Record::from_rdata(owner.clone(), ttl, data)
}

/// Equal shares of a hundred, as Kubernetes' own name server gives.
fn weight(targets: usize) -> u16 {
    100_u16
        .checked_div(u16::try_from(targets).unwrap_or(u16::MAX))
        .unwrap_or_default()
        .max(1)
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
/// Works on raw bytes, so that it also answers what does not parse. Without the question, clients such as glibc's take it
/// for an answer to something else, and wait on.
pub fn raw_failure(request: &[u8], code: RawCode) -> Option<Vec<u8>> {
    let header: &[u8; HEADER_LEN] = request.first_chunk()?;
    let mut reply = header.to_vec();
    // QR=1, opcode and RD kept; RA=1 and the code; no record in any section (RFC 1035 4.1.1).
    reply[2] = 0x80 | (header[2] & 0x79);
    reply[3] = 0x80 | code as u8;
    reply[4..].fill(0);
    if let Some(question) = only_question(request) {
        reply[5] = 1;
        reply.extend_from_slice(question);
    }
    Some(reply)
}

/// The question of a message that has one, as it is written (RFC 1035 4.1.2).
fn only_question(request: &[u8]) -> Option<&[u8]> {
    const TYPE_AND_CLASS: usize = 4;
    const LONGEST_LABEL: u8 = 63;
    const LONGEST_NAME: usize = 255;
    let (header, rest) = request.split_first_chunk::<HEADER_LEN>()?;
    if header[4..6] != [0, 1] {
        return None;
    }
    let mut end = 0;
    while end < LONGEST_NAME {
        match *rest.get(end)? {
            0 => return rest.get(..end + 1 + TYPE_AND_CLASS),
            label @ 1..=LONGEST_LABEL => end += 1 + usize::from(label),
            // A pointer: in the first name of a message there is nothing to point at.
            _ => return None,
        }
    }
    None
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

    fn address_query(bytes: &[u8]) -> Box<Question> {
        match inspect(bytes) {
            Received::Address(query) => query,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_later_version_of_edns_is_told_which_one_is_known() {
        let later = |name, kind| {
            let mut message = Message::from_vec(&query(name, kind, Some(1232))).unwrap();
            message.edns.as_mut().unwrap().set_version(1);
            message.to_vec().unwrap()
        };
        let asked = address_query(&later("web.a.", RecordType::A));
        let Received::Port(port) = inspect(&later("_http._tcp.web.a.", RecordType::SRV)) else {
            panic!("a port is asked for");
        };
        let (known, aliases) = (known(None, &["10.0.0.1"]), [alias("web.a.", "b.", 1)]);
        for reply in [
            asked.answer(&known, 1232),
            asked.answer_through(&aliases, &known, 1232),
            port.answer_port(&places(1), 1232),
            asked.failure(),
        ] {
            let reply = Message::from_vec(&reply.unwrap()).unwrap();
            assert_eq!(reply.metadata.id, 7);
            // BADVERS, which is read as BADSIG: they share a number (RFC 6895 2.3).
            assert_eq!(u16::from(reply.metadata.response_code), 16);
            assert_eq!(reply.version(), 0);
            assert!(reply.edns.unwrap().flags().dnssec_ok);
            assert_eq!(reply.queries.len(), 1);
            assert!(reply.answers.is_empty() && reply.additionals.is_empty());
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

    fn port_query() -> Box<Question> {
        match inspect(&query("_Http._tcp.web.a.", RecordType::SRV, None)) {
            Received::Port(query) => query,
            other => panic!("{other:?}"),
        }
    }

    fn places(count: u8) -> PortRecords {
        let target = |last| mesh::dns::Target {
            name: format!("10-0-0-{last}.web.a.svc.cluster.local."),
            port: 8080,
            addresses: vec![[10, 0, 0, last].into()],
        };
        PortRecords {
            service: "a/web".parse().unwrap(),
            cname: Some("_http._tcp.web.".to_owned()),
            targets: (0..count).map(target).collect(),
            ttl: 30,
        }
    }

    #[test]
    fn places_of_a_port_share_its_weight_and_come_with_their_addresses() {
        let query = port_query();
        assert_eq!(
            (query.name().as_str(), query.type_name()),
            ("_http._tcp.web.a", "srv")
        );
        let bytes = query.answer_port(&places(3), 512).unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert!(answer.metadata.authoritative);
        assert_eq!(answer.answers[0].record_type(), RecordType::CNAME);
        let owners = answer.answers[1..].iter().map(|it| it.name.to_ascii());
        assert!(owners.clone().all(|it| it == "_http._tcp.web."));
        assert_eq!((owners.count(), answer.additionals.len()), (3, 3));
        let name = Name::from_ascii("10-0-0-0.web.a.svc.cluster.local.").unwrap();
        let first = RData::SRV(rdata::SRV::new(0, 33, 8080, name.clone()));
        assert_eq!(answer.answers[1].data, first);
        assert_eq!(answer.additionals[0].name, name);
    }

    #[test]
    fn places_that_fit_without_their_addresses_only_come_without_them() {
        let (query, all) = (port_query(), usize::from(u16::MAX));
        let whole = query.answer_port(&places(5), all).unwrap();
        let bytes = query.answer_port(&places(5), whole.len() - 1).unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert!(!answer.metadata.truncation && answer.additionals.is_empty());
        assert_eq!(answer.answers.len(), 6);
        let bytes = query.answer_port(&places(100), 512).unwrap();
        assert!(Message::from_vec(&bytes).unwrap().metadata.truncation);
    }

    #[test]
    fn what_is_not_a_question_for_an_address_is_left_alone() {
        let txt = query("web.a.", RecordType::TXT, None);
        assert!(
            matches!(inspect(&txt), Received::Other(it) if it.kind == "txt" && it.name.as_deref() == Some("web.a"))
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
    fn only_a_question_is_refused_for_its_form() {
        let mut cut = query("web.a.", RecordType::A, None);
        cut.pop();
        assert!(matches!(inspect(&cut), Received::Malformed));
        for operation in 1..16 {
            cut[2] = operation << 3;
            assert!(matches!(inspect(&cut), Received::Other(_)), "{operation}");
        }
        cut[2] = 0x80;
        assert!(matches!(inspect(&cut), Received::NotARequest));
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
    fn a_raw_failure_keeps_the_id_and_the_question() {
        let longest = format!("{}{}.", "abc.".repeat(63), "a");
        for name in ["a.", ".", "db.Shop.", &longest] {
            let request = query(name, RecordType::A, Some(1232));
            let reply = raw_failure(&request, RawCode::ServFail).unwrap();
            let reply = Message::from_vec(&reply).unwrap();
            assert_eq!(reply.metadata.id, 7);
            assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
            assert_eq!(reply.queries, Message::from_vec(&request).unwrap().queries);
        }
    }

    #[test]
    fn a_raw_failure_repeats_no_question_that_makes_no_sense() {
        let whole = query("a.", RecordType::A, None);
        let mut two = whole.clone();
        two[5] = 2;
        let mut pointer = whole.clone();
        pointer[HEADER_LEN] = 0xc0;
        let too_long = [&whole[..HEADER_LEN], &b"\x01a".repeat(128), &[0; 5]].concat();
        for request in [&whole[..whole.len() - 1], &two, &pointer, &too_long] {
            let reply = raw_failure(request, RawCode::FormErr).unwrap();
            assert_eq!(reply.len(), HEADER_LEN);
            assert!(Message::from_vec(&reply).unwrap().queries.is_empty());
        }
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
