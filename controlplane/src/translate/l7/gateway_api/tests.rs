use mesh::l7::route::{Action, Rules};
use serde_json::{Value, json};

use super::*;
use crate::{object::read_object, source::tree};

fn route(spec: &Value) -> RouteObject {
    let object = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": spec,
    });
    let node = tree::parse(&object.to_string()).unwrap().remove(0);
    let (read, faults) = read_object(Kind::HttpRoute, &node);
    assert_eq!(faults, []);
    RouteObject::of(read.unwrap()).unwrap()
}

fn with_rule(rule: &Value) -> RouteObject {
    route(&json!({"rules": [rule]}))
}

fn filter(type_: &str, field: &str, value: &Value) -> Value {
    let mut filter = json!({"type": type_});
    filter[field] = value.clone();
    json!({"filters": [filter]})
}

#[test]
fn what_cannot_be_kept_is_told_with_its_field() {
    let prefix = |field: &str, text: &str| (field.to_owned(), text.to_owned());
    let path =
        |type_: &str, value: &str| json!({"matches": [{"path": {"type": type_, "value": value}}]});
    let replace = json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/x"}});
    let mut by_exact = filter("URLRewrite", "urlRewrite", &replace);
    by_exact["matches"] = json!([{"path": {"type": "Exact", "value": "/a"}}]);
    let table = [
        (
            path("Exact", "api"),
            prefix("matches[0].path", "does not start with a slash"),
        ),
        (
            path("RegularExpression", "("),
            prefix("matches[0].path", "no usable expression"),
        ),
        (
            path("Glob", "/"),
            prefix("matches[0].path", "no type of a path match"),
        ),
        (
            json!({"matches": [{"method": "G T"}]}),
            prefix("matches[0].method", "no method"),
        ),
        (
            json!({"matches": [{"headers": [{"name": "a b", "value": "x"}]}]}),
            prefix("matches[0].headers[0]", "no header's name"),
        ),
        (
            json!({"timeouts": {"request": "1.5s"}}),
            prefix("timeouts.request", "no duration"),
        ),
        (
            json!({"timeouts": {"request": "1s", "backendRequest": "2s"}}),
            prefix("timeouts.backendRequest", "longer than the whole"),
        ),
        (
            json!({"retry": {"codes": [200]}}),
            prefix("retry.codes[0]", "none of 400 to 599"),
        ),
        (
            json!({"sessionPersistence": {"cookie": {"lifetimeType": "Permanent"}}}),
            prefix("sessionPersistence.absoluteTimeout", "needs it"),
        ),
        (
            json!({"sessionPersistence": {"idleTimeout": "1h"}}),
            prefix("sessionPersistence.idleTimeout", "not supported"),
        ),
        (by_exact, prefix("filters", "needs matches by PathPrefix")),
        (
            filter(
                "RequestRedirect",
                "requestRedirect",
                &json!({"statusCode": 200}),
            ),
            prefix("filters[0]", "none of 301"),
        ),
        (
            filter(
                "RequestHeaderModifier",
                "requestHeaderModifier",
                &json!({"remove": ["Transfer-Encoding"]}),
            ),
            prefix("filters[0]", "belongs to the connection"),
        ),
        (
            filter(
                "ResponseHeaderModifier",
                "responseHeaderModifier",
                &json!({"set": [{"name": "host", "value": "x"}]}),
            ),
            prefix("filters[0]", "host can only be set"),
        ),
        (
            filter(
                "RequestMirror",
                "requestMirror",
                &json!({"backendRef": {"name": "x", "port": 1}, "percent": 101}),
            ),
            prefix("filters[0]", "no share"),
        ),
        (
            filter(
                "ExtensionRef",
                "extensionRef",
                &json!({"group": "x", "kind": "Magic", "name": "y"}),
            ),
            prefix("filters[0]", "no extension of kind \"Magic\""),
        ),
        (
            json!({"filters": [{"type": "RequestRedirect", "requestRedirect": {}}], "backendRefs": [{"name": "x", "port": 1}]}),
            prefix("backendRefs", "forwards to nobody"),
        ),
    ];
    for (rule, (field, text)) in table {
        let found = problems(with_rule(&rule));
        let told = found
            .first()
            .unwrap_or_else(|| panic!("{rule}: nothing is wrong"));
        assert_eq!(told.path, format!("spec.rules[0].{field}"), "{rule}");
        assert!(told.message.contains(&text), "{rule}: {}", told.message);
    }
}

#[test]
fn a_broken_condition_makes_its_rule_answer_for_more() {
    let rule = json!({"matches": [{
        "path": {"value": "/admin"},
        "headers": [{"name": "x", "type": "RegularExpression", "value": "("}],
    }]});
    let resolver = |_: &BackendObjectRef| -> Resolved { unreachable!("there is no backend") };
    let object = with_rule(&rule);
    let route = Sourced {
        object,
        faults: Vec::new(),
    };
    let translated = translate(&route, &resolver);
    let Rules::Http { rules, .. } = translated.rules else {
        panic!("an HTTPRoute has HTTP rules");
    };
    assert!(matches!(rules[0].action, Action::Invalid(_)));
    assert!(rules[0].matches[0].path.is_some());
    assert!(rules[0].matches[0].headers.is_empty());
}

#[test]
fn a_fault_outside_of_rules_spoils_all_of_them_and_one_inside_its_own() {
    let spec = json!({"rules": [{}, {}]});
    let resolver = |_: &BackendObjectRef| -> Resolved { unreachable!("there is no backend") };
    let table = [
        (
            "a.yaml:3:4: HTTPRoute shop/web: spec.rules[1].form: is unknown",
            vec![1],
        ),
        ("spec.hostnames[0]: is no text", vec![0, 1]),
    ];
    for (fault, spoilt) in table {
        let route = Sourced {
            object: route(&spec),
            faults: vec![fault.to_owned()],
        };
        let translated = translate(&route, &resolver);
        let found: Vec<usize> = translated.problems.keys().copied().collect();
        assert_eq!(found, spoilt, "{fault}");
    }
}
