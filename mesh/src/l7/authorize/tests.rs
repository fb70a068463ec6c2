use http::{HeaderName, Method};

use super::*;
use crate::l7::{
    authorization::{
        Condition, ConditionKey, Either, OperationMatch, PathTemplate, PolicyRule, SourceMatch,
        TemplatePart, ValueMatch,
    },
    config::{Normalization, ProxyHeaders, WaypointConfig},
    fixture::{Request, get, service},
    name::Target,
    request::Claims,
    view::{Resource, Update},
};

fn policy(name: &str, action: PolicyAction, rules: Vec<PolicyRule>) -> RequestPolicy {
    RequestPolicy {
        key: format!("a/{name}").parse().unwrap(),
        targets: vec![Target::Service(service())],
        action,
        dry_run: false,
        rules,
        faults: vec![],
    }
}

fn config(aliases: &[&str]) -> WaypointConfig {
    WaypointConfig {
        trust_domain_aliases: aliases.iter().map(|it| it.parse().unwrap()).collect(),
        normalization: Normalization::Base,
        authorizers: Default::default(),
        log_providers: Default::default(),
        trace_providers: Default::default(),
        access_logs: vec![],
        tracing: vec![],
        sampling_per_million: 0,
        forward_client_identity: false,
        default_retry: None,
        headers: ProxyHeaders::default(),
        histogram_buckets: Vec::new(),
    }
}

fn view(policies: impl IntoIterator<Item = RequestPolicy>) -> View {
    let mut view = View::default();
    let mut upserts: Vec<_> = policies.into_iter().map(Resource::Policy).collect();
    upserts.push(Resource::Config(config(&["old.example"])));
    view.apply(Update {
        upserts,
        removals: vec![],
    });
    view
}

fn own() -> TrustDomain {
    "mesh.example".parse().unwrap()
}

fn judge(view: &View, request: &Request) -> Verdict {
    super::request(view, &request.facts(), &own())
}

fn exact(text: &str) -> ValueMatch {
    ValueMatch::Exact(text.into())
}

fn is<T>(value: T) -> Either<T> {
    Either {
        values: vec![value],
        not_values: vec![],
    }
}

fn is_not<T>(value: T) -> Either<T> {
    Either {
        values: vec![],
        not_values: vec![value],
    }
}

fn from(from: SourceMatch) -> PolicyRule {
    PolicyRule {
        from: vec![from],
        ..PolicyRule::default()
    }
}

fn to(to: OperationMatch) -> PolicyRule {
    PolicyRule {
        to: vec![to],
        ..PolicyRule::default()
    }
}

fn when(key: ConditionKey, values: Either<ValueMatch>) -> PolicyRule {
    PolicyRule {
        when: vec![Condition { key, values }],
        ..PolicyRule::default()
    }
}

fn path(path: &str) -> PolicyRule {
    to(OperationMatch {
        paths: is(PathTemplate::Value(exact(path))),
        ..OperationMatch::default()
    })
}

/// Whether one rule matches, told by an ALLOW policy that has only it.
#[track_caller]
fn check(rule: PolicyRule, request: Request, expected: bool) {
    let view = view([policy("p", PolicyAction::Allow, vec![rule.clone()])]);
    let verdict = judge(&view, &request);
    assert_eq!(verdict.is_allow(), expected, "{rule:?} {request:?}");
}

fn by(name: &str, rule: usize) -> RuleRef {
    RuleRef {
        policy: format!("a/{name}").parse().unwrap(),
        rule,
    }
}

#[test]
fn deny_comes_before_allow_and_allow_closes() {
    let allow = || policy("allow", PolicyAction::Allow, vec![path("/x"), path("/a")]);
    let deny = |rules| policy("deny", PolicyAction::Deny, rules);
    let all = || vec![PolicyRule::default()];
    let allowed = |rule| Decision::Allow {
        by: Some(by("allow", rule)),
    };
    let request = get("/a");
    for (policies, expected) in [
        (vec![], Decision::Allow { by: None }),
        (vec![allow()], allowed(1)),
        (vec![deny(vec![]), allow()], allowed(1)),
        (
            vec![allow(), deny(vec![path("/b"), path("/a")])],
            Decision::Deny {
                by: Some(by("deny", 1)),
            },
        ),
        (
            vec![policy("p", PolicyAction::Allow, vec![])],
            Decision::Deny { by: None },
        ),
        (
            vec![policy("p", PolicyAction::Allow, all())],
            Decision::Allow {
                by: Some(by("p", 0)),
            },
        ),
        (
            vec![policy("p", PolicyAction::Audit, all())],
            Decision::Allow { by: None },
        ),
    ] {
        assert_eq!(judge(&view(policies), &request).decision, expected);
    }
    let workload = Request {
        service: None,
        ..request
    };
    let verdict = judge(&view([deny(all())]), &workload);
    assert!(verdict.is_allow(), "the policy is the service's");
}

#[test]
fn a_refusal_names_its_policy_and_rule() {
    let deny = policy("deny", PolicyAction::Deny, vec![path("/x"), path("/a")]);
    let verdict = judge(&view([deny]), &get("/a"));
    let expected = "rbac_access_denied_matched_policy[ns[a]-policy[deny]-rule[1]]";
    assert_eq!(verdict.details().as_deref(), Some(expected));
    let verdict = judge(
        &view([policy("p", PolicyAction::Allow, vec![])]),
        &get("/a"),
    );
    let expected = "rbac_access_denied_matched_policy[none]";
    assert_eq!(verdict.details().as_deref(), Some(expected));
    assert_eq!(judge(&View::default(), &get("/a")).details(), None);
}

#[test]
fn audits_and_dry_runs_are_told_and_change_nothing() {
    let all = || vec![PolicyRule::default()];
    let dry = |name, action, rules| RequestPolicy {
        dry_run: true,
        ..policy(name, action, rules)
    };
    let view = view([
        policy("audit", PolicyAction::Audit, all()),
        policy("other", PolicyAction::Audit, vec![path("/b")]),
        dry("deny", PolicyAction::Deny, all()),
        dry("allow", PolicyAction::Allow, vec![path("/b")]),
    ]);
    let verdict = judge(&view, &get("/a"));
    assert_eq!(verdict.decision, Decision::Allow { by: None });
    assert_eq!(verdict.audits, [by("audit", 0)]);
    let findings = [Finding::WouldDeny(by("deny", 0)), Finding::WouldNotAllow];
    assert_eq!(verdict.findings, findings);
    let findings = judge(&view, &get("/b")).findings;
    assert_eq!(findings[1], Finding::WouldAllow(by("allow", 0)));
}

#[test]
fn each_authorizer_is_asked_once_and_an_unknown_one_is_told() {
    let custom =
        |name, provider: &str, rules| policy(name, PolicyAction::Custom(provider.into()), rules);
    let view = view([
        custom("a", "x", vec![path("/a")]),
        custom("b", "x", vec![PolicyRule::default()]),
        custom("c", "y", vec![path("/b")]),
    ]);
    let asked = super::custom(&view, &get("/a").facts(), &own());
    let question = Question {
        provider: "x".into(),
        by: by("a", 0),
        known: false,
    };
    assert_eq!(asked, [question]);
    assert!(judge(&view, &get("/a")).is_allow(), "it is another phase");
    let connection = get("/");
    let asked = super::custom_connection(&view, &connection.connection(), &own());
    assert_eq!(asked.len(), 2, "what only HTTP has is as if not there");
}

fn peer(identity: &str) -> Request {
    Request {
        identity: Some(format!("spiffe://{identity}").parse().unwrap()),
        ..get("/")
    }
}

#[test]
fn sources_are_matched_under_all_names_of_the_mesh() {
    let principal = |text: &str| {
        from(SourceMatch {
            principals: is(exact(text)),
            ..SourceMatch::default()
        })
    };
    for (identity, wanted, expected) in [
        ("mesh.example/ns/b/sa/c", "mesh.example/ns/b/sa/c", true),
        ("mesh.example/ns/b/sa/c", "cluster.local/ns/b/sa/c", true),
        ("mesh.example/ns/b/sa/c", "old.example/ns/b/sa/c", true),
        ("old.example/ns/b/sa/c", "mesh.example/ns/b/sa/c", true),
        ("mesh.example/ns/b/sa/c", "mesh.example/ns/b/sa/d", false),
        ("other.example/ns/b/sa/c", "cluster.local/ns/b/sa/c", false),
        ("other.example/ns/b/sa/c", "other.example/ns/b/sa/c", true),
    ] {
        check(principal(wanted), peer(identity), expected);
    }
    let nobody = || Request {
        identity: None,
        ..get("/")
    };
    let any = from(SourceMatch {
        principals: is(ValueMatch::Present),
        ..SourceMatch::default()
    });
    check(any.clone(), peer("x/ns/b/sa/c"), true);
    check(any, nobody(), false);
    let not = from(SourceMatch {
        principals: is_not(exact("old.example/ns/b/sa/c")),
        ..SourceMatch::default()
    });
    check(not.clone(), peer("mesh.example/ns/b/sa/c"), false);
    check(not.clone(), peer("mesh.example/ns/b/sa/d"), true);
    check(not, nobody(), true);
}

#[test]
fn other_parts_of_a_source_are_matched() {
    let source = SourceMatch::default;
    let me = || peer("mesh.example/ns/b/sa/c");
    let namespace = from(SourceMatch {
        namespaces: is(ValueMatch::Prefix("b".into())),
        ..source()
    });
    check(namespace.clone(), me(), true);
    check(namespace, peer("mesh.example/ns/c/sa/b"), false);
    let account = from(SourceMatch {
        service_accounts: is(("b".into(), "c".into())),
        ..source()
    });
    check(account.clone(), me(), true);
    check(account, peer("mesh.example/ns/c/sa/c"), false);
    let domain = from(SourceMatch {
        trust_domains: is(exact("old.example")),
        ..source()
    });
    check(domain.clone(), me(), true);
    check(domain, peer("other.example/ns/b/sa/c"), false);
    let block = |text: &str| is(text.parse().unwrap());
    let direct = from(SourceMatch {
        ip_blocks: block("10.0.0.0/8"),
        remote_ip_blocks: block("192.0.2.0/24"),
        ..source()
    });
    check(direct.clone(), me(), false);
    let remote = Request {
        remote: [192, 0, 2, 1].into(),
        ..me()
    };
    check(direct, remote, true);
    let token = from(SourceMatch {
        request_principals: is(exact("iss/sub")),
        ..source()
    });
    check(token.clone(), me(), false);
    check(token, with_claims(me()), true);
}

fn with_claims(request: Request) -> Request {
    let claims = Claims {
        principal: "iss/sub".into(),
        audiences: vec!["web".into(), "api".into()],
        presenter: Some("app".into()),
        all: serde_json::json!({"groups": ["dev", "ops"], "nested": {"level": 7}}),
    };
    Request {
        claims: Some(claims),
        ..request
    }
}

#[test]
fn operations_are_matched() {
    let host = |value| {
        to(OperationMatch {
            hosts: is(value),
            ..OperationMatch::default()
        })
    };
    let at = |authority: &str| Request {
        authority: authority.to_owned(),
        ..get("/")
    };
    for (value, authority, expected) in [
        (exact("web.example"), "web.example", true),
        (exact("Web.Example"), "wEB.example:8080", true),
        (exact("web.example:8080"), "web.example:8080", true),
        (exact("web.example:8080"), "web.example", false),
        (
            ValueMatch::Suffix(".example".into()),
            "web.EXAMPLE:80",
            true,
        ),
        (ValueMatch::Prefix("web".into()), "WEB.example", true),
        (ValueMatch::Suffix(".example".into()), "example", false),
        (ValueMatch::Present, "x", true),
    ] {
        check(host(value), at(authority), expected);
    }
    let not_host = to(OperationMatch {
        hosts: is_not(exact("web.example")),
        ..OperationMatch::default()
    });
    check(not_host, at("web.example:80"), false);
    let rest = to(OperationMatch {
        ports: is(80),
        methods: is(exact("GET")),
        ..OperationMatch::default()
    });
    check(rest.clone(), get("/"), true);
    check(
        rest.clone(),
        Request {
            port: 81,
            ..get("/")
        },
        false,
    );
    let post = Request {
        method: Method::POST,
        ..get("/")
    };
    check(rest, post, false);
}

/// As it is written: `{*}`, `{**}`, else a value with `*` at either end.
fn pattern(text: &str) -> PathTemplate {
    if !text.contains('{') {
        return PathTemplate::Value(match (text.strip_suffix('*'), text.strip_prefix('*')) {
            (Some(""), _) => ValueMatch::Present,
            (Some(it), _) => ValueMatch::Prefix(it.into()),
            (_, Some(it)) => ValueMatch::Suffix(it.into()),
            _ => exact(text),
        });
    }
    let parts = text.trim_start_matches('/').split('/').map(|it| match it {
        "{*}" => TemplatePart::One,
        "{**}" => TemplatePart::Any,
        other => TemplatePart::Literal(other.into()),
    });
    PathTemplate::Template(parts.collect())
}

#[test]
fn paths_are_matched_by_value_and_by_template() {
    for (wanted, path, expected) in [
        ("/a", "/a", true),
        ("/a", "/A", false),
        ("/a", "/a/", false),
        ("/a*", "/ab/c", true),
        ("*/b", "/a/b", true),
        ("*", "/", true),
        ("/a/{*}/c", "/a/b/c", true),
        ("/a/{*}/c", "/a//c", false),
        ("/a/{*}/c", "/a/b/b/c", false),
        ("/a/{*}", "/a/", false),
        ("/a/{*}", "/a", false),
        ("/a/{**}", "/a/b/c", true),
        ("/a/{**}", "/a/", true),
        ("/a/{**}", "/a", false),
        ("/{**}", "/", true),
        ("/a/{**}/c", "/a/b/b/c", true),
        ("/a/{**}/c", "/a/b/c/d", false),
        ("/a/{**}/c", "/a/c", false),
        ("/a/{**}/c/{*}", "/a/x/c/y/c/z", true),
        ("/a/{**}/c/{**}", "/a/x/y/c/c", true),
        ("/{*}/{*}", "/a/b/c", false),
    ] {
        let rule = to(OperationMatch {
            paths: is(pattern(wanted)),
            ..OperationMatch::default()
        });
        check(rule, get(path), expected);
    }
}

#[test]
fn conditions_are_matched() {
    let header = || ConditionKey::Header(HeaderName::from_static("x-a"));
    let cidr = |text: &str| is(ValueMatch::Cidr(text.parse().unwrap()));
    let claim = |path: &[&str]| ConditionKey::Claim(path.iter().map(|&it| it.into()).collect());
    let request = || {
        with_claims(
            peer("mesh.example/ns/b/sa/c")
                .with("x-a", "1")
                .with("x-a", "2"),
        )
    };
    let none = || peer("mesh.example/ns/b/sa/c");
    let sni = Request {
        sni: Some("Web.Example"),
        ..none()
    };
    use ConditionKey as Key;
    for (key, values, request, expected) in [
        (header(), is(exact("1,2")), request(), true),
        (header(), is(ValueMatch::Present), none(), false),
        (header(), is_not(exact("1")), none(), true),
        (
            header(),
            is_not(ValueMatch::Prefix("1".into())),
            request(),
            false,
        ),
        (Key::SourceIp, cidr("10.0.0.7/32"), none(), true),
        (Key::SourceIp, cidr("10.0.0.8/32"), none(), false),
        (Key::RemoteIp, cidr("10.0.0.7/32"), none(), true),
        (Key::DestinationIp, is(exact("10.96.0.1")), none(), true),
        (Key::DestinationPort, is(ValueMatch::Port(80)), none(), true),
        (Key::DestinationPort, is(exact("81")), none(), false),
        (Key::SourceNamespace, is(exact("b")), none(), true),
        (
            Key::SourcePrincipal,
            is(ValueMatch::Suffix("/sa/c".into())),
            none(),
            true,
        ),
        (Key::SourceServiceAccount, is(exact("b/c")), none(), true),
        (
            Key::SourceTrustDomain,
            is(exact("cluster.local")),
            none(),
            true,
        ),
        (Key::RequestPrincipal, is(exact("iss/sub")), request(), true),
        (
            Key::RequestPrincipal,
            is(ValueMatch::Present),
            none(),
            false,
        ),
        (
            Key::RequestPrincipal,
            is_not(exact("iss/sub")),
            none(),
            true,
        ),
        (Key::Audiences, is(exact("api")), request(), true),
        (Key::Presenter, is(exact("app")), request(), true),
        (claim(&["groups"]), is(exact("ops")), request(), true),
        (claim(&["groups"]), is_not(exact("ops")), request(), false),
        (claim(&["nested", "level"]), is(exact("7")), request(), true),
        (
            claim(&["absent"]),
            is(ValueMatch::Present),
            request(),
            false,
        ),
        (Key::Sni, is(exact("web.example")), sni, true),
        (Key::Sni, is(ValueMatch::Present), none(), false),
    ] {
        check(when(key, values), request, expected);
    }
}

#[test]
fn what_only_http_has_is_on_the_safe_side_without_http() {
    let request = get("/");
    let judge = |action, rules| {
        let view = view([policy("p", action, rules)]);
        super::connection(&view, &request.connection(), &own()).is_allow()
    };
    let with_port = |port| {
        let mut rule = path("/a");
        rule.to[0].ports = is(port);
        rule
    };
    let header = ConditionKey::Header(HeaderName::from_static("x-a"));
    for rule in [
        path("/a"),
        when(header, is_not(exact("x"))),
        from(SourceMatch {
            request_principals: is_not(exact("x")),
            ..SourceMatch::default()
        }),
        when(ConditionKey::RequestPrincipal, is(exact("x"))),
        with_port(80),
    ] {
        let rules = || vec![rule.clone()];
        assert!(!judge(PolicyAction::Allow, rules()), "ALLOW {rule:?}");
        assert!(!judge(PolicyAction::Deny, rules()), "DENY {rule:?}");
    }
    assert!(judge(PolicyAction::Deny, vec![with_port(81)]));
    let plain = when(ConditionKey::DestinationPort, is(ValueMatch::Port(80)));
    assert!(judge(PolicyAction::Allow, vec![plain]));
}

#[test]
fn parts_of_a_rule_are_all_asked_for_and_their_alternatives_are_not() {
    let mut rule = path("/a");
    rule.to.push(path("/b").to.remove(0));
    rule.from = from(SourceMatch {
        namespaces: is(exact("b")),
        ..SourceMatch::default()
    })
    .from;
    for (namespace, at, expected) in [
        ("b", "/a", true),
        ("b", "/b", true),
        ("b", "/c", false),
        ("c", "/a", false),
    ] {
        let request = Request {
            path: at.to_owned(),
            ..peer(&format!("mesh.example/ns/{namespace}/sa/c"))
        };
        check(rule.clone(), request, expected);
    }
}
