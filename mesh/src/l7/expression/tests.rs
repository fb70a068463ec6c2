use std::time::Duration;

use super::*;
use crate::{flow::Party, l7::response_flags::Flag};

fn record() -> RequestRecord {
    RequestRecord {
        path: "/api/v1?x=1".to_owned(),
        authority: "web.default".to_owned(),
        request_headers: [(http::header::USER_AGENT, "probe/1".parse().unwrap())]
            .into_iter()
            .collect(),
        status: Some(503),
        flags: Flag::NoHealthyUpstream.into(),
        duration: Some(Duration::from_millis(1500)),
        route: Some("main".into()),
        source: Party {
            pod: Some("client-1".into()),
            ..Party::default()
        },
        ..RequestRecord::default()
    }
}

#[track_caller]
fn check(source: &str, expected: Option<&str>) {
    let expression = Expression::parse(source).unwrap_or_else(|error| panic!("{source}: {error}"));
    let record = record();
    let value = expression.evaluate(&record).map(|it| it.to_string());
    assert_eq!(value.as_deref(), expected, "{source}");
}

#[test]
fn expressions_of_users_are_evaluated() {
    for (source, expected) in [
        ("response.code >= 400", Some("true")),
        ("response.code >= 400 && response.code < 500", Some("false")),
        ("!(response.code == 200) || false", Some("true")),
        ("response.code in [200, 503]", Some("true")),
        ("request.url_path.startsWith('/healthz')", Some("false")),
        ("request.url_path.startsWith(\"/api\")", Some("true")),
        ("request.path.endsWith('x=1')", Some("true")),
        ("request.path.contains('v1')", Some("true")),
        ("request.path.matches('v[0-9]')", Some("true")),
        ("request.headers['user-agent']", Some("probe/1")),
        (
            "request.useragent == 'probe/1' ? 'probe' : 'user'",
            Some("probe"),
        ),
        ("request.headers['X-Absent']", None),
        ("has(request.headers['x-absent'])", Some("false")),
        (
            "has(request.headers['x-absent']) ? request.headers['x-absent'] : 'none'",
            Some("none"),
        ),
        (
            "request.method + ' ' + request.host",
            Some("GET web.default"),
        ),
        ("request.duration > duration('1s')", Some("true")),
        ("xds.route_name == 'main'", Some("true")),
        ("size(request.method) == 3", Some("true")),
        ("string(response.code) == '503'", Some("true")),
        ("int('5') + -3", Some("2")),
        ("response.flags != 0", Some("true")),
        ("connection.mtls", Some("true")),
        ("1.5 < 2", Some("true")),
        ("downstream_peer.name", Some("client-1")),
        (
            "filter_state['wasm.downstream_peer'].name",
            Some("client-1"),
        ),
        ("filter_state.upstream_peer.cluster", None),
    ] {
        check(source, expected);
    }
}

#[test]
fn what_is_not_known_decides_nothing_that_the_other_side_does_not() {
    check("upstream.address == 'x' || true", Some("true"));
    check("upstream.address == 'x' && false", Some("false"));
    check("upstream.address == 'x' && true", None);
    check("response.code == 'text'", Some("false"));
    check("response.code < 'text'", None);
    assert!(
        !Expression::parse("upstream.address == 'x'")
            .unwrap()
            .holds(&record())
    );
}

#[test]
fn what_is_beyond_the_subset_is_refused_when_parsed() {
    let attribute = |name: &str| InvalidExpression::Attribute(name.to_owned());
    for (source, expected) in [
        ("filter_state.x", attribute("filter_state.x")),
        (
            "upstream_peer.labels['app']",
            attribute("upstream_peer.labels.app"),
        ),
        ("request.nothing", attribute("request.nothing")),
        ("request", attribute("request")),
        (
            "request.path.map('x')",
            InvalidExpression::Function("map".to_owned()),
        ),
        ("f(1)", InvalidExpression::Function("f".to_owned())),
    ] {
        assert_eq!(
            Expression::parse(source).map(|_| ()),
            Err(expected),
            "{source}"
        );
    }
    for source in [
        "",
        "1 +",
        "'open",
        "(1",
        "[1",
        "1 2",
        "request.path.matches('(')",
        "1.2.3",
    ] {
        assert!(Expression::parse(source).is_err(), "{source}");
    }
    let deep = "(".repeat(500) + "1" + &")".repeat(500);
    assert_eq!(
        Expression::parse(&deep).map(|_| ()),
        Err(InvalidExpression::TooLarge)
    );
    let nots = "!".repeat(500) + "true";
    assert_eq!(
        Expression::parse(&nots).map(|_| ()),
        Err(InvalidExpression::TooLarge)
    );
}

#[test]
fn an_expression_tells_which_headers_it_needs() {
    let mut wanted = Wanted::default();
    let source = "has(request.headers['a']) && response.headers['b'] == request.headers['a']";
    Expression::parse(source).unwrap().wanted(&mut wanted);
    assert_eq!(wanted.request, ["a"]);
    assert_eq!(wanted.response, ["b"]);
}
