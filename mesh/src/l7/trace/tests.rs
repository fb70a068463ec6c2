use super::*;

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let pairs = pairs
        .iter()
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()));
    pairs.collect()
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

#[test]
fn a_w3c_parent_is_read_and_a_child_is_written() {
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let mut all = headers(&[("traceparent", &parent), ("tracestate", "a=b")]);
    let span = Span::new(extract(Propagation::W3c, &all), false, Draw(1));
    assert!(span.sampled, "the parent's decision holds");
    assert_eq!(span.parent_id, Some(0x00f0_67aa_0ba9_02b7));
    span.inject(Propagation::W3c, &mut all);
    let child = format!("00-{TRACE}-{:016x}-01", span.span_id);
    assert_eq!(
        all,
        headers(&[("traceparent", &child), ("tracestate", "a=b")])
    );
}

#[test]
fn headers_that_are_no_trace_start_a_new_one() {
    for text in [
        "",
        "00-0-0-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ] {
        assert_eq!(
            extract(Propagation::W3c, &headers(&[("traceparent", text)])),
            None,
            "{text}"
        );
    }
    let later = format!("01-{TRACE}-{SPAN}-00-more");
    let parent = extract(Propagation::W3c, &headers(&[("traceparent", &later)])).unwrap();
    assert_eq!(parent.sampled, Some(false));
}

#[test]
fn b3_is_answered_in_the_form_it_came_in() {
    let mut many = headers(&[
        ("x-b3-traceid", TRACE),
        ("x-b3-spanid", SPAN),
        ("x-b3-sampled", "0"),
    ]);
    let span = Span::new(extract(Propagation::B3, &many), true, Draw(2));
    assert!(!span.sampled);
    span.inject(Propagation::B3, &mut many);
    let child = format!("{:016x}", span.span_id);
    let expected = [
        ("x-b3-traceid", TRACE),
        ("x-b3-spanid", child.as_str()),
        ("x-b3-parentspanid", SPAN),
        ("x-b3-sampled", "0"),
    ];
    assert_eq!(many, headers(&expected));

    let mut single = headers(&[("b3", &format!("{TRACE}-{SPAN}-d"))]);
    let span = Span::new(extract(Propagation::B3, &single), false, Draw(2));
    span.inject(Propagation::B3, &mut single);
    let child = format!("{TRACE}-{:016x}-1-{SPAN}", span.span_id);
    assert_eq!(single, headers(&[("b3", &child)]));
}

#[test]
fn a_b3_parent_without_a_decision_leaves_it_to_us() {
    let short = headers(&[("x-b3-traceid", &TRACE[16..]), ("x-b3-spanid", SPAN)]);
    let parent = extract(Propagation::Both, &short).unwrap();
    assert_eq!(parent.sampled, None);
    assert!(Span::new(Some(parent), true, Draw(3)).sampled);
    let debug = [
        ("x-b3-traceid", TRACE),
        ("x-b3-spanid", SPAN),
        ("x-b3-flags", "1"),
    ];
    assert_eq!(
        extract(Propagation::B3, &headers(&debug)).unwrap().sampled,
        Some(true)
    );
}

#[test]
fn b3_decides_without_a_trace() {
    let alone = |name, value| decision_alone(Propagation::B3, &headers(&[(name, value)]));
    assert_eq!(alone("b3", "0"), Some(false));
    assert_eq!(alone("b3", "1"), Some(true));
    assert_eq!(alone("x-b3-sampled", "0"), Some(false));
    assert_eq!(alone("b3", "x"), None);
    assert_eq!(
        decision_alone(Propagation::W3c, &headers(&[("b3", "0")])),
        None
    );
}

#[test]
fn sampling_is_stable_by_request_id_and_near_its_share() {
    let hit = |id: &str| sampled(Some(id), 10_000, Draw(id.len() as u64));
    let hits = (0..100_000).filter(|id| hit(&format!("id-{id}"))).count();
    assert!((800..1_200).contains(&hits), "{hits}");
    assert_eq!(
        sampled(Some("x"), 500_000, Draw(1)),
        sampled(Some("x"), 500_000, Draw(2))
    );
    assert!(sampled(None, 1_000_000, Draw(9)));
    assert!(!sampled(None, 0, Draw(9)));
}
