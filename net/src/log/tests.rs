use std::{
    io::Write,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use mesh::flow::{Direction, EndReason, FlowRecord, Party, PartyLabels, Security, ServiceName};
use tracing::{info, info_span, subscriber::with_default};

use super::*;
use crate::{
    fixture::SOON,
    testing::{Output, lines},
};

fn plain(log: impl FnOnce()) -> Vec<String> {
    let lines = lines(Format::Plain, "trace", log);
    let rest = |line: &String| {
        let (time, rest) = line.split_once('\t').expect("columns");
        assert_eq!(time.len(), "2026-01-02T03:04:05.000006Z".len(), "{time}");
        assert!(time.ends_with('Z'), "{time}");
        rest.to_owned()
    };
    lines.iter().map(rest).collect()
}

fn json(log: impl FnOnce()) -> Vec<serde_json::Value> {
    let lines = lines(Format::Json, "trace", log);
    let read = |line: &String| serde_json::from_str(line).expect("one object per line");
    lines.iter().map(read).collect()
}

fn bare() -> FlowRecord {
    let source = "10.1.0.5:40000".parse().expect("an address");
    let destination = "10.1.1.9:15008".parse().expect("an address");
    FlowRecord::new(Direction::Outbound, source, destination)
}

fn record() -> FlowRecord {
    let source = PartyLabels {
        namespace: Some("a".into()),
        principal: Some("spiffe://cluster.local/ns/a/sa/client".into()),
        ..PartyLabels::default()
    };
    FlowRecord {
        source: Party {
            pod: Some("client-1".into()),
            labels: Arc::new(source),
        },
        authority: Some("10.96.0.7:80".parse().expect("an authority")),
        service: Some(ServiceName {
            hostname: "web.b.svc.cluster.local".into(),
            namespace: "b".into(),
            name: "web".into(),
        }),
        security: Security::MutualTls,
        received_bytes: 12,
        sent_bytes: 345,
        duration: Duration::from_micros(6_999),
        end: Some(EndReason::Complete),
        ..bare()
    }
}

#[test]
fn a_plain_line_has_tabs_and_quotes_texts_only() {
    let lines = plain(
        || info!(target: "net::xds::client", addr = %"10.0.0.1:80", name = "web", n = 3, "connected"),
    );
    let expected = "info\txds::client\tconnected\taddr=10.0.0.1:80 name=\"web\" n=3";
    assert_eq!(lines, [expected]);
    let bare = plain(|| info!(target: "hyper::proto", "no fields"));
    assert_eq!(bare, ["info\thyper::proto\tno fields"]);
}

#[test]
fn a_plain_line_names_its_spans() {
    let lines = plain(|| {
        let outer = info_span!("inbound", id = 7, late = tracing::field::Empty);
        outer.record("late", "x");
        let _outer = outer.entered();
        let _inner = info_span!("stream").entered();
        info!(target: "ztunnel", "here");
    });
    assert_eq!(
        lines,
        ["info\tztunnel:inbound{id=7 late=\"x\"}:stream\there"]
    );
}

#[test]
fn a_json_line_has_flat_fields_and_nested_spans() {
    let lines = json(|| {
        let _span = info_span!("inbound", id = 7).entered();
        info!(target: "net::xds", ok = true, n = -3, name = "a\"b", "hello");
    });
    let mut line = lines.into_iter().next().expect("a line");
    let time = line.as_object_mut().and_then(|line| line.remove("time"));
    assert!(time.is_some_and(|time| time.is_string()));
    let expected = serde_json::json!({
        "level": "info", "scope": "xds", "message": "hello",
        "ok": true, "n": -3, "name": "a\"b", "inbound": {"id": 7},
    });
    assert_eq!(line, expected);
}

#[test]
fn a_json_line_begins_with_what_every_line_has_and_keeps_the_order_of_fields() {
    let log = || info!(zebra = 1, ant = 2, level = "forged", "hello");
    let lines = lines(Format::Json, "trace", log);
    let line = &lines[0];
    assert!(
        line.starts_with("{\"level\":\"info\",\"time\":\""),
        "{line}"
    );
    let rest = "\"message\":\"hello\",\"zebra\":1,\"ant\":2}";
    assert!(line.ends_with(rest), "{line}");
}

#[test]
fn an_access_line_is_as_the_specification_shows_it() {
    let lines = plain(|| access::complete(&record()));
    let expected = "info\taccess\tconnection complete\tsrc.addr=10.1.0.5:40000 \
        src.workload=\"client-1\" src.namespace=\"a\" \
        src.identity=\"spiffe://cluster.local/ns/a/sa/client\" dst.addr=10.1.1.9:15008 \
        dst.hbone_addr=10.96.0.7:80 dst.service=\"web.b.svc.cluster.local\" \
        direction=\"outbound\" bytes_sent=12 bytes_recv=345 duration=\"6ms\"";
    assert_eq!(lines, [expected]);
}

/// All that a line may tell.
fn told_whole() -> FlowRecord {
    let end = |name: &str| PartyLabels {
        namespace: Some(format!("{name}-ns").into()),
        principal: Some(format!("spiffe://cluster.local/ns/{name}-ns/sa/{name}").into()),
        cluster: Some(format!("{name}-cluster").into()),
        ..PartyLabels::default()
    };
    let party = |name: &str| Party {
        pod: Some(format!("{name}-1").into()),
        labels: Arc::new(end(name)),
    };
    FlowRecord {
        source: party("client"),
        destination: party("web"),
        end: Some(EndReason::PolicyChanged),
        decided_by: Some(Box::new(mesh::outcome::Object::Policy(
            "b/deny".parse().expect("a key"),
        ))),
        error: Some("denied by: b/deny".to_owned()),
        ..record()
    }
}

#[test]
fn an_access_line_tells_every_field_in_its_place() {
    let lines = plain(|| access::complete(&told_whole()));
    let expected = "error\taccess\tconnection complete\tsrc.addr=10.1.0.5:40000 \
        src.workload=\"client-1\" src.namespace=\"client-ns\" src.cluster=\"client-cluster\" \
        src.identity=\"spiffe://cluster.local/ns/client-ns/sa/client\" dst.addr=10.1.1.9:15008 \
        dst.hbone_addr=10.96.0.7:80 dst.service=\"web.b.svc.cluster.local\" \
        dst.workload=\"web-1\" dst.namespace=\"web-ns\" dst.cluster=\"web-cluster\" \
        dst.identity=\"spiffe://cluster.local/ns/web-ns/sa/web\" policy=\"b/deny\" \
        end=\"connection closed due to policy change\" direction=\"outbound\" bytes_sent=12 \
        bytes_recv=345 duration=\"6ms\" error=\"denied by: b/deny\"";
    assert_eq!(lines, [expected]);
}

#[test]
fn an_access_line_in_json_has_the_same_fields_flat() {
    let mut lines = json(|| access::complete(&told_whole()));
    let time = lines[0]
        .as_object_mut()
        .and_then(|line| line.remove("time"));
    assert!(time.is_some_and(|time| time.is_string()));
    let expected = serde_json::json!({
        "level": "error", "scope": "access", "message": "connection complete",
        "src.addr": "10.1.0.5:40000", "src.workload": "client-1", "src.namespace": "client-ns",
        "src.cluster": "client-cluster",
        "src.identity": "spiffe://cluster.local/ns/client-ns/sa/client",
        "dst.addr": "10.1.1.9:15008", "dst.hbone_addr": "10.96.0.7:80",
        "dst.service": "web.b.svc.cluster.local", "dst.workload": "web-1",
        "dst.namespace": "web-ns", "dst.cluster": "web-cluster",
        "dst.identity": "spiffe://cluster.local/ns/web-ns/sa/web", "policy": "b/deny",
        "end": "connection closed due to policy change", "direction": "outbound",
        "bytes_sent": 12, "bytes_recv": 345, "duration": "6ms", "error": "denied by: b/deny",
    });
    assert_eq!(lines[0], expected);
}

#[test]
fn access_lines_have_the_level_of_their_end() {
    let lines = plain(|| {
        access::opened(&FlowRecord {
            end: None,
            ..record()
        });
        access::complete(&FlowRecord {
            error: Some("reset by the peer".to_owned()),
            ..record()
        });
        access::failed(&FlowRecord {
            error: Some("no healthy upstream".to_owned()),
            ..bare()
        });
    });
    assert!(lines[0].starts_with("debug\taccess\tconnection opened\tsrc.addr="));
    assert!(!lines[0].contains("duration"), "{}", lines[0]);
    assert!(lines[1].starts_with("error\taccess\tconnection complete\t"));
    assert!(lines[1].ends_with(" duration=\"6ms\" error=\"reset by the peer\""));
    let expected = "warn\taccess\tconnection failed\tsrc.addr=10.1.0.5:40000 \
        dst.addr=10.1.1.9:15008 direction=\"outbound\" error=\"no healthy upstream\"";
    assert_eq!(lines[2], expected);
}

#[test]
fn a_peer_cannot_forge_a_line() {
    let evil = "x\n2026-01-01T00:00:00.000000Z\tinfo\taccess\tfaked";
    let lines = plain(|| {
        info!(name = evil, shown = %evil, "{evil}");
    });
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0].matches('\t').count(), 3, "{lines:?}");
}

#[test]
fn a_message_comes_before_fields_that_are_told_first() {
    let lines = plain(|| {
        tracing::event!(
            tracing::Level::INFO,
            a = 1,
            quoted = "say \"é\"",
            message = "later"
        );
    });
    assert!(
        lines[0].ends_with("\tlater\ta=1 quoted=\"say \\\"é\\\"\""),
        "{lines:?}"
    );
}

#[test]
fn the_time_of_a_line_is_written_with_all_its_digits() {
    let time = time::macros::datetime!(2026-01-02 03:04:05.000006 UTC);
    let mut text = String::new();
    format::push_time(&mut text, time);
    assert_eq!(text, "2026-01-02T03:04:05.000006Z");
}

#[test]
fn the_line_of_a_connection_takes_little_memory() {
    let (subscriber, handle) = subscriber(&Options::default(), io::sink()).expect("good");
    let record = record();
    with_default(subscriber, || {
        access::complete(&record);
        handle.flush();
        let count = crate::allocations::Count::start();
        access::complete(&record);
        let asked = count.allocations();
        // Its duration as text, and what the queue lacks.
        assert!(asked <= 4, "memory was asked for {asked} times");
    });
}

#[test]
fn an_error_is_told_with_its_causes_once() {
    let error = LogError::Thread(io::Error::other("out of threads"));
    let lines = plain(|| {
        let error: &(dyn std::error::Error + 'static) = &error;
        info!(error, "oh");
    });
    assert!(
        lines[0].ends_with("\terror=\"start the log writer: out of threads\""),
        "{lines:?}"
    );
}

#[test]
fn a_filter_names_targets_as_lines_show_them() {
    let lines = lines(Format::Plain, "warn,xds=info", || {
        info!(target: "net::xds::client", "shown");
        info!(target: "net::socket", "hidden");
    });
    assert_eq!(lines.len(), 1, "{lines:?}");
}

#[test]
fn a_filter_is_changed_added_to_and_reset() {
    let (subscriber, handle) = subscriber(&Options::default(), io::sink()).expect("good");
    with_default(subscriber, || {
        let shown = || tracing::enabled!(target: "net::xds", tracing::Level::DEBUG);
        assert!(!shown());
        handle.add("xds=debug", Base::Current).expect("good");
        assert!(shown());
        assert_eq!(handle.filter(), "info,xds=debug");
        handle.add("xds=warn,error", Base::Current).expect("good");
        assert_eq!(handle.filter(), "xds=warn,error");
        for bad in ["loud", "xds=loud", "=info", "xds:debug", "a b=info"] {
            assert!(handle.add(bad, Base::Current).is_err(), "{bad}");
        }
        assert_eq!(handle.filter(), "xds=warn,error");
        handle.add("", Base::Default).expect("good");
        assert_eq!(handle.filter(), "info");
        assert!(!shown());
    });
}

/// An output that takes nothing until it is told to.
struct Stalled {
    go: mpsc::Receiver<()>,
    gone: bool,
    output: Output,
}

impl Write for Stalled {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.gone {
            let _ = self.go.recv();
            self.gone = true;
        }
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stalled_output_holds_up_whoever_logs_and_loses_nothing() {
    const MORE: usize = 100;
    let (go, wait) = mpsc::channel();
    let output = Output::default();
    let stalled = Stalled {
        go: wait,
        gone: false,
        output: output.clone(),
    };
    let writer = writer::Writer::start(stalled).expect("a thread");
    let (progress, seen) = mpsc::channel();
    let logging = thread::spawn({
        let writer = writer.clone();
        move || {
            for n in 0..QUEUE_LINES + MORE {
                writer.line(n.to_string().as_bytes());
                let _ = progress.send(n);
            }
        }
    });
    for _ in 0..QUEUE_LINES {
        seen.recv_timeout(SOON).expect("room in the queue");
    }
    assert!(
        seen.recv_timeout(Duration::from_millis(50)).is_err(),
        "it waits"
    );
    assert!(!writer.try_line(b"lost"), "who may not wait is told");
    go.send(()).expect("stalled");
    logging.join().expect("no panic");
    writer.flush();
    let lines = output.text().lines().count();
    assert_eq!(lines, QUEUE_LINES + MORE);
}

/// Tells of each write.
struct Writes(mpsc::Sender<String>);

impl Write for Writes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.0.send(text).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A writer that rests longer than any test takes, and what it writes.
fn resting() -> (writer::Writer, mpsc::Receiver<String>) {
    let (tell, writes) = mpsc::channel();
    let rest = Duration::from_secs(3600);
    let writer = writer::Writer::start_resting(Writes(tell), rest).expect("a thread");
    (writer, writes)
}

fn written(writes: &mpsc::Receiver<String>) -> String {
    writes.recv_timeout(SOON).expect("written soon")
}

#[test]
fn a_line_after_a_silence_is_written_at_once_and_those_that_follow_together() {
    let (writer, writes) = resting();
    writer.line(b"first");
    assert_eq!(written(&writes), "first\n");
    for line in ["a", "b", "c"] {
        writer.line(line.as_bytes());
    }
    writer.flush();
    assert_eq!(written(&writes), "a\nb\nc\n");
    writer.line(b"last");
    drop(writer);
    assert_eq!(
        written(&writes),
        "last\n",
        "the end is waited for by nobody"
    );
    assert!(writes.recv_timeout(SOON).is_err(), "the thread ends");
}

#[test]
fn a_crowd_of_lines_does_not_wait_for_the_rest_to_end() {
    let (writer, writes) = resting();
    writer.line(b"first");
    assert_eq!(written(&writes), "first\n");
    for _ in 0..QUEUE_LINES + 1 {
        writer.line(b"");
    }
    let crowd = written(&writes);
    assert!(crowd.len() >= QUEUE_LINES / 2, "{}", crowd.len());
}
