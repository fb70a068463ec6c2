use super::*;
use crate::{
    object::{Kind, read_object},
    source::tree::parse,
};

fn problems(kind: &str, spec: &str) -> Vec<String> {
    let group = match kind {
        "ServiceEntry" | "WorkloadEntry" => "networking.istio.io/v1",
        _ => "security.istio.io/v1",
    };
    let text = format!(
        "{{apiVersion: {group}, kind: {kind}, metadata: {{name: x, namespace: a}}, spec: {spec}}}"
    );
    let document = parse(&text).expect(spec).remove(0);
    let (object, faults) = read_object(Kind::of(group, kind).unwrap(), &document);
    assert_eq!(faults, [], "{spec}");
    let of = |problem: Problem| match problem.severity {
        Severity::Error => format!("E {}: {}", problem.path, problem.message),
        Severity::Warning => format!("W {}: {}", problem.path, problem.message),
    };
    validate(&object.unwrap()).into_iter().map(of).collect()
}

/// Each row: the spec, and the start of the only problem it has; empty: it has none.
#[track_caller]
fn table(kind: &str, rows: &[(&str, &str)]) {
    for (spec, expected) in rows {
        let found = problems(kind, spec);
        match *expected {
            "" => assert_eq!(found, Vec::<String>::new(), "{spec}"),
            start => assert!(
                found.len() == 1 && found[0].starts_with(start),
                "{spec}: {found:?}, expected {start:?}"
            ),
        }
    }
}

#[test]
fn bounds_of_histograms_that_are_none_are_told() {
    let text = r#"{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway,
        metadata: {name: w, namespace: a, annotations: {sidecar.istio.io/statsHistogramBuckets: "[1]"}},
        spec: {gatewayClassName: leyline-waypoint, listeners: []}}"#;
    let document = parse(text).unwrap().remove(0);
    let (object, faults) = read_object(Kind::Gateway, &document);
    assert_eq!(faults, []);
    let found = validate(&object.unwrap());
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].severity, Severity::Warning);
    assert!(found[0].message.starts_with("is no JSON object"));
}

#[test]
fn limits_of_routes_that_are_none_are_mistakes() {
    for kind in ["VirtualService", "HTTPRoute"] {
        let (version, spec) = match kind {
            "HTTPRoute" => ("gateway.networking.k8s.io/v1", "{rules: [{}]}"),
            _ => (
                "networking.istio.io/v1",
                "{hosts: [a], http: [{route: [{destination: {host: a}}]}]}",
            ),
        };
        let text = format!(
            r#"{{apiVersion: {version}, kind: {kind}, spec: {spec},
                metadata: {{name: r, namespace: a, annotations: {{leyline.dev/local-rate-limit: "100/s"}}}}}}"#
        );
        let document = parse(&text).unwrap().remove(0);
        let (object, _) = read_object(Kind::of(version, kind).unwrap(), &document);
        let found = validate(&object.unwrap());
        let told = found.iter().find(|it| it.path.contains("local-rate-limit"));
        let is_error = told.is_some_and(|it| it.severity == Severity::Error);
        assert!(is_error, "{kind}: {found:?}");
    }
}

#[test]
fn authorization_policies_are_checked_as_the_webhook_checks_them() {
    table(
        "AuthorizationPolicy",
        &[
            ("{}", ""),
            ("{rules: [{}]}", ""),
            ("{action: DENY}", "E spec: DENY without rules"),
            (
                "{action: CUSTOM, rules: [{}]}",
                "E spec.provider: CUSTOM needs",
            ),
            (
                "{action: CUSTOM, provider: {name: p}}",
                "E spec: CUSTOM needs rules",
            ),
            ("{provider: {name: p}}", "E spec.provider: only CUSTOM"),
            (
                "{action: CUSTOM, provider: {name: p}, rules: [{from: [{source: {namespaces: [b]}}]}]}",
                "E spec.rules[0].from[0].source.namespaces: cannot be used with CUSTOM",
            ),
            ("{rules: [{from: []}]}", "E spec.rules[0].from: is empty"),
            (
                "{rules: [{from: [{}]}]}",
                "E spec.rules[0].from[0].source: is missing",
            ),
            (
                "{rules: [{from: [{source: {}}]}]}",
                "E spec.rules[0].from[0].source: is empty",
            ),
            (
                "{rules: [{from: [{source: {namespaces: []}}]}]}",
                "E spec.rules[0].from[0].source.namespaces: is empty",
            ),
        ],
    );
    table(
        "AuthorizationPolicy",
        &[
            ("{rules: [{to: [{operation: {ports: ['80']}}]}]}", ""),
            (
                "{rules: [{to: [{operation: {ports: ['65536']}}]}]}",
                "E spec.rules[0].to[0].operation.ports[0]",
            ),
            (
                "{rules: [{to: [{operation: {paths: ['/a/{*}/{**}']}}]}]}",
                "",
            ),
            (
                "{rules: [{to: [{operation: {paths: ['/{**}/a']}}]}]}",
                "E spec.rules[0].to[0].operation.paths[0]",
            ),
            (
                "{rules: [{to: [{operation: {paths: ['/a{*}']}}]}]}",
                "E spec.rules[0].to[0].operation.paths[0]",
            ),
            (
                "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, 1.2.3.4]}}]}]}",
                "",
            ),
            (
                "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}",
                "E spec.rules[0].from[0].source.ipBlocks[0]",
            ),
            (
                "{rules: [{from: [{source: {serviceAccounts: [a, b/c]}}]}]}",
                "",
            ),
            (
                "{rules: [{from: [{source: {serviceAccounts: ['b/*']}}]}]}",
                "E spec.rules[0].from[0].source.serviceAccounts[0]",
            ),
            (
                "{rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}",
                "E spec.rules[0].from[0].source: serviceAccounts cannot be combined",
            ),
            (
                "{rules: [{from: [{source: {trustDomains: ['*.a', 'b*', '*', c]}}]}]}",
                "",
            ),
            (
                "{rules: [{from: [{source: {trustDomains: ['a/b']}}]}]}",
                "E spec.rules[0].from[0].source.trustDomains[0]",
            ),
            (
                "{rules: [{when: [{key: 'request.headers[x]', values: [y]}]}]}",
                "",
            ),
            (
                "{rules: [{when: [{key: request.headers, values: [y]}]}]}",
                "E spec.rules[0].when[0].key",
            ),
            (
                "{rules: [{when: [{key: source.ipp, values: [y]}]}]}",
                "E spec.rules[0].when[0].key",
            ),
            (
                "{rules: [{when: [{key: source.ip}]}]}",
                "E spec.rules[0].when[0]: needs values",
            ),
            (
                "{rules: [{when: [{key: source.ip, values: [y]}]}]}",
                "E spec.rules[0].when[0].values[0]",
            ),
            (
                "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
                "W spec.rules[0]: has a part",
            ),
            (
                "{action: DENY, rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}",
                "W spec.rules[0]: has a part",
            ),
            (
                "{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}]}",
                "",
            ),
        ],
    );
}

#[test]
fn selectors_and_targets_are_checked() {
    table(
        "AuthorizationPolicy",
        &[
            ("{selector: {}}", "W spec.selector: an empty selector"),
            ("{selector: {matchLabels: {app: 'a*'}}}", "E spec.selector"),
            ("{targetRefs: [{kind: Service, name: x, group: ''}]}", ""),
            (
                "{targetRefs: [{kind: Pod, name: x, group: ''}]}",
                "E spec.targetRefs[0]: Pod",
            ),
            (
                "{targetRefs: [{kind: Service, group: ''}]}",
                "E spec.targetRefs[0]: a target needs a name",
            ),
            (
                "{targetRefs: [{kind: Service, name: x, namespace: b}]}",
                "E spec.targetRefs[0]: a target in another",
            ),
            (
                "{selector: {matchLabels: {app: a}}, targetRefs: [{kind: Service, name: x}]}",
                "E spec: only one of",
            ),
        ],
    );
    table(
        "PeerAuthentication",
        &[
            ("{mtls: {mode: STRICT}}", ""),
            (
                "{portLevelMtls: {'80': {mode: STRICT}}}",
                "E spec.portLevelMtls: needs a selector",
            ),
            (
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {}}",
                "E spec.portLevelMtls: is empty",
            ),
            (
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {mode: STRICT}}}",
                "E spec.portLevelMtls.0",
            ),
            (
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {8080: {mode: DISABLE}}}",
                "",
            ),
        ],
    );
}

#[test]
fn service_entries_are_checked() {
    let ports = "ports: [{number: 80, name: http, protocol: HTTP}]";
    let rows: Vec<(String, &str)> = [
        ("hosts: [a.b]", ""),
        ("hosts: []", "E spec.hosts: needs"),
        ("hosts: ['*'], resolution: STATIC", "E spec.hosts[0]"),
        ("hosts: ['a.*.b']", "E spec.hosts[0]"),
        ("hosts: ['*.b']", "W spec.hosts[0]"),
        ("hosts: [a.b], addresses: [10.0.0.0/8]", ""),
        ("hosts: [a.b], addresses: [10.0.0.0/8], resolution: DNS", "E spec.addresses[0]: a range"),
        ("hosts: [a.b], addresses: [x]", "E spec.addresses[0]"),
        ("hosts: [a.b], endpoints: [{address: 1.1.1.1}]", "E spec.endpoints: cannot be combined with resolution NONE"),
        ("hosts: [a.b], resolution: STATIC, endpoints: [{address: x.y}]", "E spec.endpoints[0].address"),
        ("hosts: [a.b], resolution: STATIC, endpoints: [{address: 1.1.1.1, ports: {https: 1}}]", "E spec.endpoints[0].ports.https"),
        ("hosts: [a.b], resolution: DNS_ROUND_ROBIN, endpoints: [{address: x.y}, {address: y.z}]", "E spec.endpoints: DNS_ROUND_ROBIN"),
        ("hosts: ['*.a.b'], resolution: DYNAMIC_DNS", ""),
        ("hosts: [a.b], resolution: DYNAMIC_DNS", "E spec.hosts[0]: DYNAMIC_DNS"),
        ("hosts: [a.b], exportTo: ['*', x]", "E spec.exportTo"),
        ("hosts: [a.b], exportTo: [x, x]", "E spec.exportTo"),
    ]
    .into_iter()
    .map(|(spec, expected)| (format!("{{{spec}, {ports}}}"), expected))
    .collect();
    let rows: Vec<(&str, &str)> = rows
        .iter()
        .map(|(spec, expected)| (spec.as_str(), *expected))
        .collect();
    table("ServiceEntry", &rows);
    table(
        "ServiceEntry",
        &[
            (
                "{hosts: [a.b], ports: [{number: 0, name: x}], addresses: [1.1.1.1]}",
                "E spec.ports[0].number",
            ),
            (
                "{hosts: [a.b], ports: [{number: 1, name: x}, {number: 1, name: y}], addresses: [1.1.1.1]}",
                "E spec.ports: the number 1",
            ),
            (
                "{hosts: [a.b], ports: [{number: 1, name: x, protocol: TCP}]}",
                "W spec.addresses: TCP without",
            ),
            (
                "{hosts: [a.b], resolution: DNS, ports: [{number: 1, name: x, protocol: TCP}]}",
                "",
            ),
            (
                "{hosts: [a.b, c.d], resolution: DNS, ports: [{number: 1, name: x, protocol: TCP}]}",
                "E spec.hosts: several hosts",
            ),
        ],
    );
}

#[test]
fn workload_entries_are_checked() {
    table(
        "WorkloadEntry",
        &[
            ("{address: 10.0.0.1, ports: {http: 80}}", ""),
            ("{address: vm.example.com}", ""),
            ("{address: 'unix:///run/x'}", ""),
            (
                "{address: 'unix:///run/x', ports: {http: 80}}",
                "E spec.ports",
            ),
            ("{}", "E spec.address: is missing"),
            ("{network: n}", "W spec.address: is missing"),
            ("{address: 'a b'}", "E spec.address"),
            (
                "{address: 10.0.0.1, ports: {http: 70000}}",
                "E spec.ports.http",
            ),
            ("{address: 10.0.0.1, labels: {'a b': c}}", "E spec.labels"),
        ],
    );
}

#[test]
fn names_are_checked() {
    let text = "{apiVersion: v1, kind: Service, metadata: {name: Web, labels: {x: 'a b'}}}";
    let document = parse(text).unwrap().remove(0);
    let (object, _) = read_object(Kind::Service, &document);
    let paths: Vec<String> = validate(&object.unwrap())
        .into_iter()
        .map(|problem| problem.path)
        .collect();
    assert_eq!(paths, ["metadata.name", "metadata.labels[\"x\"]"]);
}
