use mesh::{
    flow::{Direction, EndReason},
    names::PolicyKey,
    outcome::{Object, Reason},
};
use serde_json::Value;

use super::*;
use crate::testing::encoded;

fn open() -> FlowRecord {
    FlowRecord::new(
        Direction::Inbound,
        "10.0.0.1:1".parse().unwrap(),
        "10.0.0.9:80".parse().unwrap(),
    )
}

fn key(name: &str) -> PolicyKey {
    PolicyKey {
        namespace: "ns".into(),
        name: name.into(),
    }
}

fn denied() -> FlowRecord {
    FlowRecord {
        end: Some(EndReason::Refused(Reason::PolicyDenied)),
        decided_by: Some(Box::new(Object::Policy(key("deny-all")))),
        ..open()
    }
}

async fn next(reader: &mut Reader) -> Vec<Value> {
    let text = reader.lines().await;
    let text = std::str::from_utf8(&text).unwrap().to_owned();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn a_reader_waits_for_what_happens_and_is_told_who_whom_and_by_which_policy() {
    let flows = Flows::default();
    let mut reader = flows.follow(Interest::All, Begin::Now).unwrap();
    assert_eq!(next(&mut reader).await[0]["event"], "alive");
    let (told, ()) = tokio::join!(next(&mut reader), async {
        tokio::task::yield_now().await;
        flows.ended(&denied(), None);
    });
    let one = &told[0];
    assert_eq!(
        (&one["event"], &one["count"]),
        (&"refused".into(), &1.into())
    );
    assert_eq!(one["reason"], "explicitly denied");
    assert_eq!(one["policies"], serde_json::json!(["ns/deny-all"]));
    assert_eq!(one["source_addr"], "10.0.0.1:1");
    assert!(one["time"].as_str().unwrap().ends_with('Z'));
}

#[tokio::test]
async fn an_allowed_connection_is_told_with_the_policy_that_allowed_it() {
    let flows = Flows::default();
    let mut reader = flows.follow(Interest::All, Begin::Now).unwrap();
    next(&mut reader).await;
    let by = RuleRef {
        policy: key("allow-web"),
        rule: 0,
    };
    flows.opened(open, Some(&by));
    let one = &next(&mut reader).await[0];
    assert_eq!(one["event"], "opened");
    assert_eq!(one["policies"], serde_json::json!(["ns/allow-web"]));
}

#[tokio::test]
async fn without_a_reader_traffic_is_not_recorded_and_denials_are() {
    let flows = Flows::default();
    flows.opened(|| panic!("nobody wants it"), None);
    flows.ended(&denied(), None);
    let mut reader = flows.follow(Interest::All, Begin::Kept).unwrap();
    next(&mut reader).await;
    assert_eq!(next(&mut reader).await[0]["event"], "refused");
}

#[tokio::test]
async fn a_reader_that_is_gone_leaves_nothing_behind() {
    let flows = Flows::default();
    drop(flows.follow(Interest::All, Begin::Now).unwrap());
    flows.opened(|| panic!("nobody wants it any more"), None);
}

#[tokio::test(start_paused = true)]
async fn a_quiet_stream_says_that_it_lives() {
    let flows = Flows::default();
    let mut reader = flows.follow(Interest::All, Begin::Now).unwrap();
    next(&mut reader).await;
    assert_eq!(next(&mut reader).await[0]["event"], "alive");
}

#[tokio::test]
async fn what_a_slow_reader_missed_is_told_and_counted() {
    let flows = Flows::default();
    let mut reader = flows.follow(Interest::All, Begin::Now).unwrap();
    next(&mut reader).await;
    for _ in 0..mesh::journal::KEPT_TRAFFIC + 5 {
        flows.opened(open, None);
    }
    let first = &next(&mut reader).await[0];
    assert_eq!(
        (&first["event"], &first["traffic"]),
        (&"missed".into(), &5.into())
    );
    let mut registry = Registry::default();
    flows.register(&mut registry);
    let text = encoded(&registry);
    assert!(
        text.contains("leyline_flow_events_dropped_total{kind=\"traffic\"} 5"),
        "{text}"
    );
}

#[test]
fn a_query_is_understood_or_its_unknown_word_named() {
    assert_eq!(parse(""), Ok((Interest::All, Begin::Now)));
    assert_eq!(
        parse("only=failures&kept"),
        Ok((Interest::Failures, Begin::Kept))
    );
    assert_eq!(parse("kept&only=denied"), Err("only=denied"));
}

#[tokio::test]
async fn one_reader_too_many_is_told_so() {
    let flows = Flows::default();
    let readers: Vec<_> = std::iter::repeat_with(|| flows.follow(Interest::All, Begin::Now))
        .take(mesh::journal::MAX_READERS)
        .collect();
    assert!(readers.iter().all(Result::is_ok));
    let refused = flows.clone().stream(RawQuery(None)).await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
}
