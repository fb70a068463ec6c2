use std::time::Duration;

use super::*;
use crate::{names::PolicyKey, outcome::Reason};

fn at(second: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(second)
}

fn ended(from: &str, end: EndReason) -> FlowRecord {
    let record = FlowRecord::new(
        Direction::Inbound,
        from.parse().unwrap(),
        "10.0.0.9:80".parse().unwrap(),
    );
    FlowRecord {
        end: Some(end),
        ..record
    }
}

const DENIED: EndReason = EndReason::Refused(Reason::PolicyDenied);

fn deny(journal: &mut Journal, second: u64, from: &str) {
    journal.tell(What::Refused, at(second), ended(from, DENIED), None);
}

fn close(journal: &mut Journal, second: u64, from: &str) {
    let record = ended(from, EndReason::Complete);
    journal.tell(What::Closed, at(second), record, None);
}

fn told(news: &News) -> Vec<(What, u64, IpAddr)> {
    let told = |it: &Arc<Event>| (it.what, it.count, it.record.source_addr.ip());
    news.events.iter().map(told).collect()
}

fn ip(last: u8) -> IpAddr {
    [10, 0, 0, last].into()
}

#[test]
fn a_reader_is_told_what_happens_in_its_order() {
    let mut journal = Journal::default();
    close(&mut journal, 0, "10.0.0.1:1");
    let reader = journal.follow(Interest::All, Begin::Now).unwrap();
    close(&mut journal, 1, "10.0.0.2:1");
    deny(&mut journal, 2, "10.0.0.3:1");
    close(&mut journal, 3, "10.0.0.4:1");
    let first = journal.read(reader, 2);
    let expected = [(What::Closed, 1, ip(2)), (What::Refused, 1, ip(3))];
    assert_eq!(told(&first), expected);
    let rest = journal.read(reader, 2);
    assert_eq!(told(&rest), [(What::Closed, 1, ip(4))]);
    assert_eq!(journal.read(reader, 2), News::default());
}

#[test]
fn nothing_of_a_flood_of_one_denial_is_lost_and_it_takes_the_room_of_one() {
    let mut journal = Journal::with_room(1, 2);
    let reader = journal.follow(Interest::All, Begin::Now).unwrap();
    deny(&mut journal, 0, "10.0.0.1:1");
    for port in 2..=10_000 {
        deny(&mut journal, port, &format!("10.0.0.2:{port}"));
    }
    let news = journal.read(reader, 10);
    let expected = [(What::Refused, 1, ip(1)), (What::Refused, 9_999, ip(2))];
    assert_eq!(told(&news), expected);
    assert!(news.missed.is_empty());
    assert_eq!(
        (news.events[1].first, news.events[1].at),
        (at(2), at(10_000))
    );
    deny(&mut journal, 10_001, "10.0.0.2:1");
    assert_eq!(
        told(&journal.read(reader, 10)),
        [(What::Refused, 10_000, ip(2))]
    );
    assert_eq!(journal.dropped(), (0, 0));
}

#[test]
fn another_reason_or_another_policy_is_another_denial() {
    let mut journal = Journal::default();
    let by = |name: &str| FlowRecord {
        decided_by: Some(Box::new(Object::Policy(PolicyKey {
            namespace: "ns".into(),
            name: name.into(),
        }))),
        ..ended("10.0.0.1:1", DENIED)
    };
    journal.tell(What::Refused, at(0), by("one"), None);
    journal.tell(What::Refused, at(1), by("two"), None);
    let late = ended("10.0.0.1:1", EndReason::PolicyChanged);
    journal.tell(What::Refused, at(2), late, None);
    assert_eq!(journal.failures().count(), 3);
}

#[test]
fn a_slow_reader_is_told_how_much_traffic_it_missed() {
    let mut journal = Journal::with_room(2, 2);
    let reader = journal.follow(Interest::All, Begin::Now).unwrap();
    for last in 1..=5 {
        close(&mut journal, last, &format!("10.0.0.{last}:1"));
    }
    let news = journal.read(reader, 10);
    assert_eq!(news.missed.traffic, 3);
    assert_eq!(news.events.len(), 2);
    assert!(journal.read(reader, 10).missed.is_empty(), "told once");
    assert_eq!(journal.dropped(), (3, 0));
}

#[test]
fn denials_beyond_what_is_kept_are_told_by_reason_and_number() {
    let mut journal = Journal::with_room(1, 2);
    let reader = journal.follow(Interest::Failures, Begin::Now).unwrap();
    for last in 1..=3 {
        deny(&mut journal, 0, &format!("10.0.0.{last}:1"));
        deny(&mut journal, 0, &format!("10.0.0.{last}:2"));
    }
    let news = journal.read(reader, 10);
    let missed = BTreeMap::from([(DENIED.to_string(), 2)]);
    assert_eq!(news.missed.failures, missed);
    assert_eq!(news.events.len(), 2);
    assert_eq!(journal.dropped(), (0, 1));
}

#[test]
fn what_a_reader_has_read_is_not_missed_when_it_goes() {
    let mut journal = Journal::with_room(1, 1);
    let reader = journal.follow(Interest::All, Begin::Now).unwrap();
    for last in 1..=9 {
        deny(&mut journal, 0, &format!("10.0.0.{last}:1"));
        close(&mut journal, 0, "10.0.0.1:1");
        assert!(journal.read(reader, 10).missed.is_empty());
    }
    assert_eq!(journal.dropped(), (0, 0));
}

#[test]
fn who_comes_late_is_told_the_denials_that_are_kept() {
    let mut journal = Journal::default();
    deny(&mut journal, 0, "10.0.0.1:1");
    close(&mut journal, 1, "10.0.0.2:1");
    let late = journal.follow(Interest::All, Begin::Kept).unwrap();
    let expected = [(What::Refused, 1, ip(1))];
    assert_eq!(told(&journal.read(late, 10)), expected);
}

#[test]
fn who_wants_failures_is_told_of_no_traffic() {
    let mut journal = Journal::default();
    let all = journal.follow(Interest::All, Begin::Now).unwrap();
    let some = journal.follow(Interest::Failures, Begin::Now).unwrap();
    close(&mut journal, 0, "10.0.0.2:1");
    assert_eq!(journal.read(some, 10), News::default());
    assert_eq!(journal.read(all, 10).events.len(), 1);
    journal.unfollow(all);
    assert!(!journal.wants_traffic());
}

#[test]
fn there_are_only_so_many_readers() {
    let mut journal = Journal::default();
    let readers = [(); MAX_READERS].map(|()| journal.follow(Interest::All, Begin::Now));
    let refused = journal.follow(Interest::All, Begin::Now);
    assert_eq!(refused, Err(TooManyReaders));
    journal.unfollow(readers[0].unwrap());
    assert!(journal.follow(Interest::All, Begin::Now).is_ok());
}

#[test]
fn an_end_is_told_as_what_it_is() {
    for (end, what) in [
        (EndReason::Complete, What::Closed),
        (EndReason::Drained, What::Closed),
        (EndReason::SourceReset, What::Closed),
        (DENIED, What::Refused),
        (EndReason::PolicyChanged, What::Refused),
        (EndReason::TooMany, What::Refused),
        (EndReason::ConnectRefused, What::Failed),
        (EndReason::TlsFailed, What::Failed),
    ] {
        assert_eq!(What::of_end(end), what, "{end:?}");
    }
}
