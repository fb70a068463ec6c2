use super::*;
use crate::{
    l7::fixture::{Request, get},
    names::Str,
};

fn header(name: &'static str, value: &'static str) -> (HeaderName, HeaderValue) {
    (
        HeaderName::from_static(name),
        HeaderValue::from_static(value),
    )
}

fn text(headers: &HeaderMap) -> Vec<String> {
    let mut lines: Vec<_> = headers
        .iter()
        .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
        .collect();
    lines.sort();
    lines
}

#[test]
fn headers_are_set_then_added_then_removed() {
    let edit = HeaderEdit {
        set: vec![header("x-a", "set"), header("host", "new.example")],
        add: vec![header("x-a", "added"), header("x-b", "added")],
        remove: vec![HeaderName::from_static("x-c")],
    };
    let mut headers: HeaderMap = [
        header("x-a", "old"),
        header("x-b", "old"),
        header("x-c", "old"),
    ]
    .into_iter()
    .collect();
    let host = edit.apply_request(&mut headers);
    assert_eq!(host, Some(HeaderValue::from_static("new.example")));
    let expected = ["x-a: added", "x-a: set", "x-b: added", "x-b: old"];
    assert_eq!(text(&headers), expected);
}

#[test]
fn a_rule_does_not_touch_what_frames_a_message() {
    let names = ["transfer-encoding", "content-length", "connection", "host"];
    let names = names.map(HeaderName::from_static);
    let edit = HeaderEdit {
        set: vec![header("content-length", "7")],
        add: vec![header("transfer-encoding", "chunked")],
        remove: names.to_vec(),
    };
    let mut headers: HeaderMap = [header("host", "a"), header("content-length", "1")]
        .into_iter()
        .collect();
    assert_eq!(edit.apply_request(&mut headers), None);
    assert_eq!(text(&headers), ["content-length: 1", "host: a"]);
}

#[test]
fn paths_are_rewritten_by_segments() {
    use Matched::Segments;
    for (path, length, to, expected) in [
        ("/foo/bar", 4, "/xyz", "/xyz/bar"),
        ("/foo/bar", 4, "/xyz/", "/xyz/bar"),
        ("/foo/bar", 4, "/", "/bar"),
        ("/foo/bar", 4, "", "/bar"),
        ("/foo", 4, "/", "/"),
        ("/foo", 4, "/xyz", "/xyz"),
        ("/foo", 4, "/xyz/", "/xyz/"),
        ("/foo/", 4, "/xyz", "/xyz/"),
        ("/foo/", 4, "/", "/"),
        ("/foo", 0, "/xyz", "/xyz/foo"),
        ("/", 0, "/xyz", "/xyz/"),
    ] {
        let rewrite = PathRewrite::Prefix(to.into());
        let found = rewrite_path(&rewrite, Segments(length), path);
        assert_eq!(found, expected, "{path} {to}");
    }
}

#[test]
fn paths_are_rewritten_as_text_in_full_and_by_expression() {
    let prefix = |to: &str| PathRewrite::Prefix(to.into());
    let regex = |pattern, replacement: &str| PathRewrite::Regex {
        pattern: Pattern::new(pattern).unwrap(),
        replacement: replacement.into(),
    };
    for (rewrite, matched, path, expected) in [
        (prefix("/v2"), Matched::Prefix(3), "/v1x", "/v2x"),
        (prefix("/"), Matched::Prefix(4), "/v1/a", "/a"),
        (prefix("x"), Matched::Prefix(1), "/a", "/xa"),
        (prefix("/v2"), Matched::Whole, "/v1/a", "/v2"),
        (prefix("/v2"), Matched::Nothing, "/a", "/v2/a"),
        (PathRewrite::Full("/f".into()), Matched::Whole, "/a", "/f"),
        (PathRewrite::Full("f".into()), Matched::Whole, "/a", "/f"),
        (
            regex("/([a-z]+)/([0-9]+)", r"/\2/\1"),
            Matched::Whole,
            "/user/7/x",
            "/7/user/x",
        ),
        (regex("a", r"\0\9$1\\x"), Matched::Whole, "/a", r"/a$1\\x"),
    ] {
        let found = rewrite_path(&rewrite, matched, path);
        assert_eq!(found, expected, "{rewrite:?}");
    }
}

fn location(redirect: &Redirect, request: &Request) -> String {
    let matched = Matched::Segments(4);
    let (status, location) = super::redirect(redirect, matched, &request.facts()).unwrap();
    assert_eq!(status, redirect.status);
    location.to_str().unwrap().to_owned()
}

#[test]
fn a_redirects_port_is_told_where_the_scheme_does_not_say_it() {
    let redirect = |scheme: Option<&str>, hostname: Option<&str>, port| Redirect {
        scheme: scheme.map(Str::from),
        hostname: hostname.map(Str::from),
        path: None,
        port,
        status: StatusCode::FOUND,
    };
    let asked = |authority: &str, port| Request {
        authority: authority.to_owned(),
        port,
        ..get("/foo/a?q=1")
    };
    use RedirectPort::{Derived, FromRequest, Port, ProtocolDefault};
    for (redirect, request, expected) in [
        (
            redirect(None, None, Derived),
            asked("web", 80),
            "http://web",
        ),
        (
            redirect(None, None, Derived),
            asked("web", 8080),
            "http://web:8080",
        ),
        (
            redirect(None, Some("x"), Derived),
            asked("web:99", 80),
            "http://x",
        ),
        (
            redirect(Some("https"), None, Derived),
            asked("web", 8080),
            "https://web",
        ),
        (
            redirect(Some("https"), None, Port(443)),
            asked("web", 80),
            "https://web",
        ),
        (
            redirect(Some("https"), None, Port(80)),
            asked("web", 80),
            "https://web:80",
        ),
        (
            redirect(None, None, Port(80)),
            asked("web:8080", 8080),
            "http://web",
        ),
        (
            redirect(None, None, FromRequest),
            asked("web:8080", 80),
            "http://web:8080",
        ),
        (
            redirect(None, None, FromRequest),
            asked("web", 8080),
            "http://web",
        ),
        (
            redirect(None, None, ProtocolDefault),
            asked("web:1", 1),
            "http://web",
        ),
        (
            redirect(None, None, Derived),
            asked("[::1]:99", 81),
            "http://[::1]:81",
        ),
    ] {
        let expected = format!("{expected}/foo/a?q=1");
        assert_eq!(location(&redirect, &request), expected);
    }
}

#[test]
fn a_redirects_path_is_rewritten_and_the_query_stays() {
    let redirect = Redirect {
        scheme: None,
        hostname: None,
        path: Some(PathRewrite::Prefix("/bar".into())),
        port: RedirectPort::Derived,
        status: StatusCode::SEE_OTHER,
    };
    let found = location(&redirect, &get("/foo/a?q=1"));
    assert_eq!(found, "http://web/bar/a?q=1");
}

#[test]
fn hosts_and_ports_are_told_apart() {
    for (authority, expected) in [
        ("web", ("web", None)),
        ("web:80", ("web", Some(80))),
        ("[::1]:80", ("[::1]", Some(80))),
        ("[::1]", ("[::1]", None)),
        ("::1", ("::1", None)),
        ("web:x", ("web:x", None)),
        ("web:99999", ("web:99999", None)),
    ] {
        assert_eq!(split_authority(authority), expected, "{authority}");
    }
}

#[test]
fn what_concerns_one_connection_is_not_forwarded() {
    let mut headers: HeaderMap = [
        header(
            "connection",
            "close, X-Mine, authorization, x-forwarded-for",
        ),
        header("connection", "te"),
        header("keep-alive", "5"),
        header("te", "gzip, Trailers"),
        header("upgrade", "h2c"),
        header("http2-settings", "x"),
        header("transfer-encoding", "chunked"),
        header("proxy-authorization", "x"),
        header("x-mine", "1"),
        header("x-other", "1"),
        header("authorization", "Bearer x"),
        header("x-forwarded-for", "10.0.0.1"),
    ]
    .into_iter()
    .collect();
    strip_hop_by_hop(&mut headers);
    let expected = [
        "authorization: Bearer x",
        "te: trailers",
        "x-forwarded-for: 10.0.0.1",
        "x-other: 1",
    ];
    assert_eq!(text(&headers), expected);
}

#[test]
fn statuses_of_http_have_a_grpc_status() {
    for (http, grpc) in [
        (400, 13),
        (401, 16),
        (403, 7),
        (404, 12),
        (429, 14),
        (502, 14),
        (500, 2),
    ] {
        assert_eq!(grpc_status(StatusCode::from_u16(http).unwrap()), grpc);
    }
}
