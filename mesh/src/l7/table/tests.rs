use std::collections::BTreeMap;

use http::{HeaderName, Method};

use super::*;
use crate::{
    draw::Draw,
    l7::{
        condition::ASKED,
        fixture::{Request, get, route, rule, service},
        pattern::Pattern,
        request::Claims,
        route::{
            CallerMatch, HeaderMatch, HttpMatch, PathMatch, QueryMatch, TcpRule, TextMatch, TlsRule,
        },
        view::{Resource, Update},
    },
};

fn view(routes: impl IntoIterator<Item = Route>) -> View {
    let mut view = View::default();
    view.apply(Update {
        upserts: routes.into_iter().map(Resource::Route).collect(),
        removals: Vec::new(),
    });
    view
}

/// The chosen rule's name.
fn chosen(view: &View, request: &Request) -> String {
    match view.select(&request.facts()) {
        Selection::NoRoutes => "no routes".to_owned(),
        Selection::NoMatch => "no match".to_owned(),
        Selection::Rule(selected) => selected.name().unwrap_or("?").to_owned(),
    }
}

fn on(path: PathMatch) -> HttpMatch {
    HttpMatch {
        path: Some(path),
        ..HttpMatch::default()
    }
}

fn exact(path: &str) -> HttpMatch {
    on(PathMatch::Exact(path.into()))
}

fn segments(path: &str) -> HttpMatch {
    on(PathMatch::Segments(path.into()))
}

fn text(text: &str) -> TextMatch {
    TextMatch::Exact(text.into())
}

fn regex(source: &str) -> Pattern {
    Pattern::new(source).unwrap()
}

fn header(name: &'static str, value: TextMatch) -> HeaderMatch {
    HeaderMatch {
        name: HeaderName::from_static(name),
        value,
    }
}

#[test]
fn the_more_specific_rule_wins_wherever_it_stands() {
    let rules = vec![
        rule("all", vec![]),
        rule("regex", vec![on(PathMatch::Regex(regex("/foo/.*")))]),
        rule("foo", vec![segments("/foo")]),
        rule("foo/bar", vec![segments("/foo/bar")]),
        rule("exact", vec![exact("/foo/bar")]),
        rule(
            "get",
            vec![HttpMatch {
                method: Some(text("GET")),
                ..segments("/foo/bar")
            }],
        ),
        rule(
            "header",
            vec![HttpMatch {
                headers: vec![header("x-a", text("1"))],
                ..segments("/foo/bar")
            }],
        ),
        rule(
            "query",
            vec![HttpMatch {
                query: vec![QueryMatch {
                    name: "q".into(),
                    value: text("a b"),
                }],
                ..segments("/foo/bar")
            }],
        ),
    ];
    let view = view([route("HTTPRoute/a/r", rules)]);
    let post = |path| Request {
        method: Method::POST,
        ..get(path)
    };
    for (request, expected) in [
        (get("/"), "all"),
        (get("/foobar"), "all"),
        (get("/foo"), "foo"),
        (get("/foo/"), "foo"),
        (get("/foo/x"), "foo"),
        (get("/foo/bar"), "exact"),
        (get("/foo/bar/"), "get"),
        (post("/foo/bar/"), "foo/bar"),
        (post("/foo/bar/x").with("x-a", "1"), "header"),
        (post("/foo/bar/x?q=a%20b&q=c"), "query"),
        (post("/foo/bar/x?q=c&q=a%20b"), "foo/bar"),
        (get("/foo/bar/x?q=a%20b").with("x-a", "1"), "get"),
    ] {
        assert_eq!(chosen(&view, &request), expected, "{request:?}");
    }
}

#[test]
fn age_name_and_position_decide_between_equals() {
    let old = |key, to: &str, created| Route {
        created,
        ..route(key, vec![rule(to, vec![segments("/a")])])
    };
    let both = |a: Route, b: Route| view([a, b]);
    let a = get("/a");
    let older = both(
        old("HTTPRoute/a/x", "young", 2),
        old("HTTPRoute/a/y", "old", 1),
    );
    assert_eq!(chosen(&older, &a), "old");
    let named = both(old("HTTPRoute/a/y", "y", 1), old("HTTPRoute/a/x", "x", 1));
    assert_eq!(chosen(&named, &a), "x");
    let twice = vec![
        rule("1", vec![segments("/a")]),
        rule("2", vec![segments("/a/")]),
    ];
    let length = view([route("HTTPRoute/a/x", twice)]);
    assert_eq!(chosen(&length, &a), "2", "its path is longer");
}

#[test]
fn written_order_is_kept_and_what_takes_all_comes_last_among_several() {
    let prefix = |path: &str| on(PathMatch::Prefix(path.into()));
    let one = || {
        let rules = vec![
            rule("foo", vec![prefix("/foo")]),
            rule("foobar", vec![exact("/foobar")]),
            rule("all", vec![prefix("/")]),
            rule("never", vec![exact("/x")]),
        ];
        route("VirtualService/a/one", rules)
    };
    let alone = view([one()]);
    assert_eq!(chosen(&alone, &get("/foobar")), "foo");
    assert_eq!(chosen(&alone, &get("/x")), "all");
    let other = Route {
        created: 1,
        ..route("VirtualService/a/two", vec![rule("y", vec![exact("/y")])])
    };
    let merged = view([one(), other]);
    assert_eq!(chosen(&merged, &get("/y")), "y");
    assert_eq!(chosen(&merged, &get("/x")), "never");
    assert_eq!(chosen(&merged, &get("/z")), "all");
}

#[test]
fn routes_that_none_match_are_no_match_and_no_routes_are_none() {
    let view = view([route("HTTPRoute/a/r", vec![rule("a", vec![exact("/a")])])]);
    assert_eq!(chosen(&view, &get("/b")), "no match");
    let other = Request {
        service: Some("a/other".parse().unwrap()),
        ..get("/a")
    };
    assert_eq!(chosen(&view, &other), "no routes");
    let workload = Request {
        service: None,
        ..get("/a")
    };
    assert_eq!(chosen(&view, &workload), "no routes");
}

fn attached(route: Route, port: Option<u16>, callers: Callers) -> Route {
    let attachment = Attachment {
        service: service(),
        port,
        callers,
    };
    Route {
        attachments: vec![attachment],
        ..route
    }
}

#[test]
fn a_route_is_for_its_port_and_its_callers() {
    let to = |to: &str| route(&format!("HTTPRoute/a/{to}"), vec![rule(to, vec![])]);
    let view = view([
        attached(to("every-port"), None, Callers::All),
        attached(to("a81"), Some(81), Callers::All),
        attached(to("consumer"), Some(82), Callers::Namespace("b".into())),
    ]);
    let of = |namespace: &str, port| Request {
        port,
        identity: Some(
            format!("spiffe://cluster.local/ns/{namespace}/sa/x")
                .parse()
                .unwrap(),
        ),
        ..get("/")
    };
    assert_eq!(chosen(&view, &of("b", 80)), "every-port");
    assert_eq!(chosen(&view, &of("b", 81)), "a81", "by name: equals");
    assert_eq!(chosen(&view, &of("b", 82)), "consumer");
    assert_eq!(chosen(&view, &of("c", 82)), "every-port");
    let stranger = Request {
        identity: None,
        ..of("b", 82)
    };
    assert_eq!(chosen(&view, &stranger), "every-port");
}

#[test]
fn the_most_specific_kind_takes_effect_alone() {
    let kinds = [
        "VirtualService/a/v",
        "TCPRoute/a/t",
        "HTTPRoute/a/h",
        "GRPCRoute/a/g",
    ];
    let of = |key: &str| match key.split_once('/') {
        Some(("TCPRoute", _)) => Route {
            rules: Rules::Tcp(vec![tcp("t", vec![])]),
            ..route(key, vec![])
        },
        _ => route(key, vec![rule(key, vec![])]),
    };
    let request = get("/");
    let mut routes = Vec::new();
    for (key, expected) in kinds
        .iter()
        .zip([kinds[0], "no routes", kinds[2], kinds[3]])
    {
        routes.push(of(key));
        let view = view(routes.clone());
        assert_eq!(chosen(&view, &request), expected);
        let opaque = view.treats_as_tcp(&request.connection());
        assert_eq!(opaque, key.starts_with("TCP"), "{key}");
    }
}

#[test]
fn grpc_rules_are_ordered_by_service_then_method_then_headers() {
    let grpc = |service: Option<TextMatch>, method: Option<TextMatch>| HttpMatch {
        grpc: true,
        ..on(PathMatch::Grpc { service, method })
    };
    let rules = vec![
        rule("any method", vec![grpc(Some(text("pkg.Svc")), None)]),
        rule("method", vec![grpc(None, Some(text("Get")))]),
        rule("both", vec![grpc(Some(text("pkg.Svc")), Some(text("Get")))]),
        rule(
            "regex",
            vec![grpc(Some(TextMatch::Regex(regex("pkg\\..*"))), None)],
        ),
        rule(
            "header",
            vec![HttpMatch {
                headers: vec![header("x-a", TextMatch::Present)],
                ..grpc(Some(text("pkg.Svc")), Some(text("Get")))
            }],
        ),
    ];
    let view = view([route("GRPCRoute/a/g", rules)]);
    let call = |path| {
        let request = Request {
            http2: true,
            ..get(path)
        };
        request.with("content-type", "application/grpc")
    };
    for (request, expected) in [
        (call("/pkg.Svc/Get"), "both"),
        (call("/pkg.Svc/Get").with("x-a", "1"), "header"),
        (call("/pkg.Svc/Put"), "any method"),
        (call("/other.Svc/Get"), "method"),
        (call("/pkg.Other/Put"), "regex"),
        (call("/other.Svc/Put"), "no match"),
        (call("/pkg.Svc/Get/x"), "no match"),
        (get("/pkg.Svc/Get"), "no match"),
    ] {
        assert_eq!(chosen(&view, &request), expected, "{}", request.path);
    }
}

#[test]
fn every_condition_is_asked() {
    #[track_caller]
    fn check(conditions: HttpMatch, holds: &[Request], not: &[Request]) {
        let view = view([route(
            "VirtualService/a/v",
            vec![rule("it", vec![conditions])],
        )]);
        for request in holds {
            assert_eq!(chosen(&view, request), "it", "{request:?}");
        }
        for request in not {
            assert_eq!(chosen(&view, request), "no match", "{request:?}");
        }
    }
    let any = HttpMatch::default;
    let a = || get("/a");
    check(
        HttpMatch {
            authority: Some(text("Web.Example")),
            ..any()
        },
        &[Request {
            authority: "web.example".to_owned(),
            ..a()
        }],
        &[a()],
    );
    check(
        HttpMatch {
            authority: Some(TextMatch::Prefix("WE".into())),
            scheme: Some(text("http")),
            port: Some(80),
            source: CallerMatch::new(Some("b".into()), labels(&["app"])),
            ..any()
        },
        &[a()],
        &[
            Request { port: 81, ..a() },
            Request {
                identity: None,
                ..a()
            },
            Request {
                scheme: "https",
                ..a()
            },
            Request {
                source_labels: None,
                ..a()
            },
            Request {
                source_labels: Some(labels(&["other"])),
                ..a()
            },
        ],
    );
    check(
        HttpMatch {
            ignore_path_case: true,
            ..on(PathMatch::Prefix("/Foo".into()))
        },
        &[get("/fOObar")],
        &[get("/fo")],
    );
    check(
        HttpMatch {
            headers: vec![
                header("x-a", text("1,2")),
                header("host", TextMatch::Regex(regex("we."))),
            ],
            without_headers: vec![
                header("x-b", TextMatch::Prefix("no".into())),
                header("x-c", TextMatch::Present),
            ],
            ..any()
        },
        &[
            a().with("x-a", "1").with("x-a", "2"),
            a().with("x-a", "1,2").with("x-b", "yes"),
        ],
        &[
            a().with("x-a", "1"),
            a().with("x-a", "1,2").with("x-b", "not"),
            a().with("x-a", "1,2").with("x-c", ""),
        ],
    );
    check(
        HttpMatch {
            without_headers: vec![header("x-b", TextMatch::Regex(regex("")))],
            ..any()
        },
        &[a().with("x-b", "x")],
        &[a(), a().with("x-b", "")],
    );
    let claims = |groups: &[&str]| Request {
        claims: Some(Claims {
            principal: "i/s".into(),
            audiences: vec![],
            presenter: None,
            all: serde_json::json!({"groups": groups}),
        }),
        ..a()
    };
    check(
        HttpMatch {
            claims: vec![(vec!["groups".into()], text("dev"))],
            ..any()
        },
        &[claims(&["ops", "dev"])],
        &[a(), claims(&["ops"])],
    );
}

#[test]
fn routes_tell_whether_they_ask_for_claims() {
    let asks = HttpMatch {
        claims: vec![(vec!["sub".into()], TextMatch::Present)],
        ..HttpMatch::default()
    };
    for (matches, expected) in [(vec![asks], true), (vec![], false)] {
        let view = view([route("VirtualService/a/v", vec![rule("it", matches)])]);
        let request = get("/");
        assert_eq!(view.routes_ask_claims(&request.connection()), expected);
    }
}

#[test]
fn the_matched_part_of_the_path_is_told() {
    let matched = |conditions, path| {
        let view = view([route("HTTPRoute/a/r", vec![rule("it", conditions)])]);
        match view.select(&get(path).facts()) {
            Selection::Rule(selected) => Some(selected.matched),
            _ => None,
        }
    };
    let prefix = on(PathMatch::Prefix("/f".into()));
    assert_eq!(matched(vec![], "/a"), Some(Matched::Nothing));
    assert_eq!(matched(vec![exact("/a")], "/a"), Some(Matched::Whole));
    assert_eq!(
        matched(vec![segments("/a")], "/a/b"),
        Some(Matched::Segments(2))
    );
    assert_eq!(
        matched(vec![segments("/")], "/a/b"),
        Some(Matched::Segments(0))
    );
    assert_eq!(matched(vec![prefix], "/foo"), Some(Matched::Prefix(2)));
}

fn named(route: &str, rules: Rules) -> Route {
    Route {
        rules,
        ..super::super::fixture::route(route, vec![])
    }
}

fn tls(name: &str, sni: &[&str]) -> TlsRule {
    TlsRule {
        name: Some(name.into()),
        sni: sni.iter().map(|&it| it.into()).collect(),
        port: None,
        source: None,
        destinations: vec![],
        backends: vec![],
    }
}

fn labels(names: &[&str]) -> BTreeMap<Str, Str> {
    names
        .iter()
        .map(|name| ((*name).into(), "x".into()))
        .collect()
}

fn tcp(name: &str, destinations: Vec<&str>) -> TcpRule {
    TcpRule {
        name: Some(name.into()),
        port: None,
        source: None,
        destinations: destinations.iter().map(|it| it.parse().unwrap()).collect(),
        backends: vec![],
    }
}

fn connection(selection: ConnectionSelection) -> String {
    match selection {
        ConnectionSelection::NoRoutes => "no routes".to_owned(),
        ConnectionSelection::NoMatch => "no match".to_owned(),
        ConnectionSelection::Rule(selected) => selected.name().unwrap_or("?").to_owned(),
    }
}

#[test]
fn tls_is_routed_by_the_most_specific_name_or_as_written() {
    let rules = || {
        Rules::Tls(vec![
            tls("wide", &["*.example.com"]),
            tls("narrow", &["*.a.example.com"]),
            tls("exact", &["x.a.example.com", "other"]),
        ])
    };
    let of = |view: &View, sni| {
        let request = Request { sni, ..get("/") };
        connection(view.select_tls(&request.connection()))
    };
    let gateway = view([named("TLSRoute/a/t", rules())]);
    assert_eq!(of(&gateway, Some("X.a.example.com.")), "exact");
    assert_eq!(of(&gateway, Some("y.a.example.com")), "narrow");
    assert_eq!(of(&gateway, Some("a.example.com")), "wide");
    assert_eq!(of(&gateway, Some("example.com")), "no match");
    assert_eq!(of(&gateway, None), "no match");
    let istio = view([named("VirtualService/a/t:tls", rules())]);
    assert_eq!(of(&istio, Some("x.a.example.com")), "wide");
    let both = view([
        named("VirtualService/a/t:tls", rules()),
        named(
            "VirtualService/a/t:tcp",
            Rules::Tcp(vec![tcp("tcp", vec![])]),
        ),
    ]);
    assert_eq!(of(&both, Some("z")), "tcp");
    assert_eq!(of(&View::default(), Some("z")), "no routes");
}

#[test]
fn tcp_is_routed_by_address_port_and_caller() {
    let rules = Rules::Tcp(vec![
        tcp("elsewhere", vec!["10.97.0.0/16"]),
        TcpRule {
            port: Some(81),
            ..tcp("port", vec![])
        },
        TcpRule {
            source: CallerMatch::new(Some("b".into()), labels(&["app"])),
            ..tcp("caller", vec!["10.96.0.0/16"])
        },
    ]);
    let view = view([named("TCPRoute/a/t", rules)]);
    let of = |request: Request| connection(view.select_tcp(&request.connection()));
    assert_eq!(of(get("/")), "caller");
    assert_eq!(
        of(Request {
            port: 81,
            ..get("/")
        }),
        "port"
    );
    let stranger = Request {
        identity: None,
        ..get("/")
    };
    assert_eq!(of(stranger), "no match");
}

/// A source of small numbers.
struct Source(Draw);

impl Source {
    fn below(&mut self, bound: u64) -> u64 {
        let (now, later) = self.0.split();
        self.0 = later;
        now.below(bound).unwrap()
    }

    fn one<T: Copy>(&mut self, items: &[T]) -> T {
        let at = self.below(items.len().try_into().unwrap());
        items[usize::try_from(at).unwrap()]
    }

    fn path(&mut self) -> String {
        let depth = self.below(4);
        let path: String = (0..depth)
            .map(|_| format!("/{}", self.one(&["a", "b", "ab", ""])))
            .collect();
        if path.is_empty() {
            "/".to_owned()
        } else {
            path
        }
    }

    fn conditions(&mut self) -> HttpMatch {
        let path = self.path();
        let path = match self.below(6) {
            0 => Some(PathMatch::Exact(path.into())),
            1 | 2 => Some(PathMatch::Segments(path.into())),
            3 => Some(PathMatch::Prefix(path.into())),
            4 => Some(PathMatch::Regex(regex(self.one(&["/a.*", "/b/.", ".*b"])))),
            _ => None,
        };
        let values = ["1", "2"];
        let headers = (0..self.below(2)).map(|_| header("x-a", text(self.one(&values))));
        HttpMatch {
            path,
            ignore_path_case: false,
            headers: headers.collect(),
            authority: (self.below(2) == 0).then(|| text(self.one(&["web", "api"]))),
            method: (self.below(4) == 0).then(|| text("GET")),
            ..HttpMatch::default()
        }
    }

    fn route(&mut self, at: usize, kind: &str) -> Route {
        let rules = (0..=self.below(4)).map(|number| {
            let matches = (0..self.below(3)).map(|_| self.conditions()).collect();
            rule(&format!("{at}.{number}"), matches)
        });
        let rules = rules.collect();
        Route {
            created: i64::try_from(self.below(2)).unwrap(),
            ..route(&format!("{kind}/a/r{at:03}"), rules)
        }
    }

    /// The route, attached to some port for some callers.
    fn somewhere(&mut self, route: Route) -> Route {
        let port = self.one(&[None, None, Some(81)]);
        let callers = match self.below(4) {
            0 => Callers::Namespace("b".into()),
            _ => Callers::All,
        };
        attached(route, port, callers)
    }

    fn request(&mut self) -> Request {
        let mut request = get(&self.path());
        self.one(&["web", "API"]).clone_into(&mut request.authority);
        if self.below(2) == 0 {
            request = request.with("x-a", self.one(&["1", "2"]));
        }
        request
    }
}

/// Path's kind and length, method, headers.
type Rank = (u8, usize, bool, usize);

fn rank(conditions: &HttpMatch) -> Rank {
    let (kind, length) = match &conditions.path {
        Some(PathMatch::Exact(it)) => (3, it.len()),
        Some(PathMatch::Segments(it) | PathMatch::Prefix(it)) => (2, it.len()),
        Some(PathMatch::Regex(it)) => (1, it.source().len()),
        _ => (2, 1),
    };
    let headers = conditions.headers.len();
    (kind, length, conditions.method.is_some(), headers)
}

/// Every match of every route is asked, and the first of the best is kept.
fn naive(routes: &[Route], request: &Request) -> String {
    let facts = request.facts();
    let mut sorted: Vec<_> = routes.iter().collect();
    sorted.sort_by_key(|it| (it.created, it.key.name.clone()));
    let mut best: Option<(Rank, &str)> = None;
    for route in sorted {
        let Rules::Http { rules, .. } = &route.rules else {
            continue;
        };
        for rule in rules {
            let every = [HttpMatch::default()];
            let matches = match rule.matches.as_slice() {
                [] => &every[..],
                some => some,
            };
            let holding = matches
                .iter()
                .filter(|it| crate::l7::condition::holds(it, &facts).is_some());
            for rank in holding.map(rank) {
                if best.is_none_or(|(its, _)| its < rank) {
                    best = Some((rank, rule.name.as_deref().unwrap()));
                }
            }
        }
    }
    best.map_or("no match", |(_, name)| name).to_owned()
}

#[test]
fn the_index_finds_what_asking_every_rule_finds() {
    for seed in 0..60 {
        let mut source = Source(Draw(seed));
        let count = source.one(&[1, 3, 40]);
        let routes: Vec<_> = (0..count).map(|at| source.route(at, "HTTPRoute")).collect();
        let view = view(routes.clone());
        for _ in 0..100 {
            let request = source.request();
            let expected = naive(&routes, &request);
            assert_eq!(
                chosen(&view, &request),
                expected,
                "seed {seed}: {request:?}"
            );
        }
    }
}

#[test]
fn routes_that_come_and_go_one_by_one_are_found_as_if_told_together() {
    for seed in 0..12 {
        let mut source = Source(Draw(1_000 + seed));
        let kinds: &[&str] = match seed % 4 {
            0 => &["HTTPRoute", "GRPCRoute"],
            1 => &["HTTPRoute", "VirtualService"],
            _ => &["HTTPRoute"],
        };
        let (mut live, mut known) = (View::default(), BTreeMap::new());
        for step in 0..80 {
            let (at, kind) = (source.below(40), source.one(kinds));
            let mut update = Update::default();
            // It grows first, and then shrinks.
            if source.below(80) > step {
                let mut route = source.route(usize::try_from(at).unwrap(), kind);
                if seed % 3 == 0 {
                    route = source.somewhere(route);
                }
                known.insert(route.key.to_string(), route.clone());
                update.upserts.push(Resource::Route(route));
            } else if let Some(key) = known.keys().nth(usize::try_from(at).unwrap()).cloned() {
                known.remove(&key);
                update.removals.push(format!("route/{key}").as_str().into());
            }
            live.apply(update);
            if step % 4 != 0 {
                continue;
            }
            let together = view(known.values().cloned());
            for _ in 0..16 {
                let request = Request {
                    port: source.one(&[80, 81]),
                    ..source.request()
                };
                let (found, expected) = (chosen(&live, &request), chosen(&together, &request));
                assert_eq!(found, expected, "seed {seed}, step {step}: {request:?}");
            }
        }
    }
}

#[test]
fn a_route_that_changes_is_compiled_alone_among_thousands() {
    let of = |at: usize, name: &str| {
        let rules = vec![rule(name, vec![segments(&format!("/team-{at}"))])];
        route(&format!("HTTPRoute/a/r{at}"), rules)
    };
    let mut live = view((0..2_000).map(|at| of(at, "before")));
    let published = live.clone();
    let mut change = |update: Update| {
        rank::COMPILED.set(0);
        live.apply(update);
        (rank::COMPILED.get(), live.clone())
    };
    let new = |route| Update {
        upserts: vec![Resource::Route(route)],
        removals: vec![],
    };
    let (compiled, changed) = change(new(of(7, "after")));
    assert!(compiled <= 2, "{compiled}");
    assert_eq!(chosen(&changed, &get("/team-7/x")), "after");
    let (compiled, added) = change(new(of(2_000, "new")));
    assert!(compiled <= 1, "{compiled}");
    assert_eq!(chosen(&added, &get("/team-2000")), "new");
    let (compiled, removed) = change(Update {
        upserts: vec![],
        removals: vec!["route/HTTPRoute/a/r8".into()],
    });
    assert!(compiled <= 1, "{compiled}");
    assert_eq!(chosen(&removed, &get("/team-8")), "no match");
    assert_eq!(chosen(&published, &get("/team-7/x")), "before");
    assert_eq!(chosen(&published, &get("/team-8")), "before");
}

/// How many conditions are asked for one request.
fn asked(view: &View, request: &Request) -> usize {
    ASKED.set(0);
    view.select(&request.facts());
    ASKED.get()
}

#[test]
fn a_request_is_asked_of_few_among_ten_thousand_routes() {
    let by_path = |at: usize| segments(&format!("/team-{at}/api"));
    let by_host = |at: usize| HttpMatch {
        authority: Some(text(&format!("team-{at}.example"))),
        ..HttpMatch::default()
    };
    let by_header = |at: usize| HttpMatch {
        headers: vec![header("x-tenant", text(&format!("t{at}")))],
        ..segments("/")
    };
    let makes: [(&str, &dyn Fn(usize) -> HttpMatch); 3] = [
        ("path", &by_path),
        ("host", &by_host),
        ("header", &by_header),
    ];
    for (name, make) in makes {
        let routes = (0..10_000).map(|at| {
            let rules = vec![rule(&at.to_string(), vec![make(at)])];
            route(&format!("HTTPRoute/a/r{at}"), rules)
        });
        let view = view(routes);
        let request = Request {
            authority: "team-7.example".to_owned(),
            ..get("/team-7/api/orders")
        };
        let request = request.with("x-tenant", "t7");
        assert_eq!(chosen(&view, &request), "7", "{name}");
        assert_eq!(asked(&view, &request), 1, "{name}");
    }
}
