use super::*;

fn object(version: &str, kind: &str, spec: &str) -> Value {
    let text = format!(
        "{{apiVersion: {version}, kind: {kind}, metadata: {{name: x, namespace: a}}, spec: {spec}}}"
    );
    json_of(&text)
}

/// JSON of a text in YAML's flow style.
fn json_of(text: &str) -> Value {
    fn value(node: &tree::Node) -> Value {
        match &node.value {
            tree::Value::Plain(text) => serde_json::from_str(text).unwrap_or(json!(text)),
            tree::Value::Text(text) => json!(text),
            tree::Value::Sequence(items) => items.iter().map(|item| value(item)).collect(),
            tree::Value::Mapping(entries) => {
                let pairs = entries.iter();
                pairs
                    .map(|entry| (entry.key.to_string(), value(&entry.node)))
                    .collect()
            }
        }
    }
    value(&tree::parse(text).expect(text).remove(0))
}

/// Each row: the spec, and the start of the only problem it has, `E` or `W` first; empty: it has none.
#[track_caller]
fn table(version: &str, kind: &str, rows: &[(&str, &str)]) {
    for (spec, expected) in rows {
        let verdict = check(&object(version, kind, spec));
        let errors = verdict.errors.iter().map(|it| format!("E {}", told(it)));
        let warnings = verdict.warnings.iter().map(|it| format!("W {}", told(it)));
        let found: Vec<String> = errors.chain(warnings).collect();
        match *expected {
            "" => assert_eq!(found, Vec::<String>::new(), "{spec}"),
            start => assert!(
                found.len() == 1 && found[0].starts_with(start),
                "{spec}: {found:?}, expected {start:?}"
            ),
        }
    }
}

fn review(operation: &str, object: &Value, old: &Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {"uid": "u-1", "operation": operation, "object": object, "oldObject": old},
    })
}

fn response(operation: &str, object: &Value, old: &Value) -> Value {
    let (answer, _) = respond(&review(operation, object, old)).unwrap();
    assert_eq!(answer["response"]["uid"], "u-1");
    answer["response"].clone()
}

fn bad_policy() -> Value {
    object(
        "security.istio.io/v1",
        "AuthorizationPolicy",
        "{action: DENY}",
    )
}

#[test]
fn request_authentications_are_checked() {
    table(
        "security.istio.io/v1",
        "RequestAuthentication",
        &[
            ("{}", ""),
            ("{jwtRules: [{issuer: a}]}", ""),
            (
                "{jwtRules: [{}]}",
                "E spec.jwtRules[0]: needs issuer or jwksUri",
            ),
            ("{jwtRules: [{jwksUri: 'https://a/b'}]}", ""),
            (
                "{jwtRules: [{jwksUri: 'ftp://a/b'}]}",
                "E spec.jwtRules[0].jwksUri",
            ),
            (
                "{jwtRules: [{issuer: a, jwks: 'x'}]}",
                "E spec.jwtRules[0].jwks: is no JSON",
            ),
            (
                "{jwtRules: [{issuer: a, jwks: '{}'}]}",
                "E spec.jwtRules[0].jwks: is no key set",
            ),
            (
                r#"{jwtRules: [{issuer: a, jwks: '{"keys": [{"kty": "RSA", "n": "x", "e": "AQAB"}]}'}]}"#,
                "",
            ),
            (
                r#"{jwtRules: [{issuer: a, jwks: '{"keys": [{"kty": "RSA", "d": "secret"}]}'}]}"#,
                "W spec.jwtRules[0].jwks.keys[0]: holds a private key",
            ),
            (
                "{jwtRules: [{issuer: a, audiences: ['']}]}",
                "E spec.jwtRules[0].audiences[0]",
            ),
            (
                "{jwtRules: [{issuer: a, fromHeaders: [{name: ''}]}]}",
                "E spec.jwtRules[0].fromHeaders[0].name",
            ),
            (
                "{jwtRules: [{issuer: a, fromParams: ['']}]}",
                "E spec.jwtRules[0].fromParams[0]",
            ),
            (
                "{jwtRules: [{issuer: a, fromCookies: ['']}]}",
                "E spec.jwtRules[0].fromCookies[0]",
            ),
            (
                "{jwtRules: [{issuer: a, outputClaimToHeaders: [{header: 'x y', claim: c}]}]}",
                "E spec.jwtRules[0].outputClaimToHeaders[0].header",
            ),
            (
                "{jwtRules: [{issuer: a, outputClaimToHeaders: [{header: x}]}]}",
                "E spec.jwtRules[0].outputClaimToHeaders[0].claim",
            ),
            ("{jwtRules: [{issuer: a, timeout: 1m30.5s}]}", ""),
            (
                "{jwtRules: [{issuer: a, timeout: '5'}]}",
                "E spec.jwtRules[0].timeout",
            ),
            ("{rules: []}", "E spec.rules: unknown field"),
            ("{selector: {matchLabels: {a: 'b*'}}}", "E spec.selector"),
            (
                "{targetRefs: [{kind: Pod, group: '', name: x}]}",
                "E spec.targetRefs[0]",
            ),
        ],
    );
}

#[test]
fn workload_groups_are_checked() {
    table(
        "networking.istio.io/v1",
        "WorkloadGroup",
        &[
            ("{}", "E spec.template: is missing"),
            ("{template: {}}", ""),
            (
                "{template: {ports: {http: 0}}}",
                "E spec.template.ports.http",
            ),
            ("{template: {ports: text}}", "E spec.template: "),
            (
                "{template: {}, metadata: {labels: {'a b': c}}}",
                "E spec.metadata.labels",
            ),
            ("{template: {}, probe: {httpGet: {port: 80}}}", ""),
            ("{template: {}, probe: {}}", "E spec.probe: needs one of"),
            (
                "{template: {}, probe: {tcpSocket: {port: 70000}}}",
                "E spec.probe.tcpSocket.port",
            ),
            (
                "{template: {}, probe: {exec: {command: []}}}",
                "E spec.probe.exec.command",
            ),
            (
                "{template: {}, probe: {httpGet: {port: 80}, periodSeconds: -1}}",
                "E spec.probe.periodSeconds",
            ),
        ],
    );
}

#[test]
fn telemetries_are_checked() {
    table(
        "telemetry.istio.io/v1",
        "Telemetry",
        &[
            ("{}", ""),
            ("{tracing: [{randomSamplingPercentage: 100}]}", ""),
            (
                "{tracing: [{randomSamplingPercentage: 101}]}",
                "E spec.tracing[0].randomSamplingPercentage",
            ),
            ("{tracing: [{customTags: {a: {literal: {value: b}}}}]}", ""),
            (
                "{tracing: [{customTags: {a: {}}}]}",
                "E spec.tracing[0].customTags.a: needs one of",
            ),
            (
                "{tracing: [{customTags: {a: {header: {}}}}]}",
                "E spec.tracing[0].customTags.a.header.name",
            ),
            (
                "{metrics: [{overrides: [{tagOverrides: {a: {value: request.host}}}]}]}",
                "",
            ),
            (
                "{metrics: [{overrides: [{tagOverrides: {a: {}}}]}]}",
                "E spec.metrics[0].overrides[0].tagOverrides.a.value: UPSERT",
            ),
            (
                "{metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE, value: b}}}]}]}",
                "E spec.metrics[0].overrides[0].tagOverrides.a.value: REMOVE",
            ),
            (
                "{accessLogging: [{filter: {}}]}",
                "E spec.accessLogging[0].filter.expression",
            ),
        ],
    );
}

#[test]
fn virtual_services_are_checked() {
    table(
        "networking.istio.io/v1",
        "VirtualService",
        &[
            ("{hosts: [a]}", "E spec: needs http, tls or tcp"),
            (
                "{hosts: [a], http: [{route: [{destination: {host: b}}]}]}",
                "",
            ),
            (
                "{hosts: ['*'], http: [{route: [{destination: {host: b}}]}]}",
                "E spec.hosts",
            ),
            ("{hosts: [a], http: [{}]}", "E spec.http[0]: needs route"),
            (
                "{hosts: [a], http: [{route: [{destination: {host: b}}], redirect: {uri: /}}]}",
                "E spec.http[0]: only one of",
            ),
            (
                "{hosts: [a], http: [{match: [{uri: {regex: '('}}], route: [{destination: {host: b}}]}]}",
                "E spec.http[0].match[0].uri.regex",
            ),
            (
                "{hosts: [a], tcp: [{match: [{sourceSubnet: 10.0.0.0/8}], route: [{destination: {host: b}}]}]}",
                "W spec.tcp[0].match[0].sourceSubnet",
            ),
            (
                "{hosts: [a], http: [{route: [{destination: {host: b}}], retries: {attempts: 1, retryOn: never}}]}",
                "E spec.http[0].retries.retryOn",
            ),
            (
                "{hosts: [a], http: [{route: [{destination: {host: b}}], fault: {abort: {percentage: {value: 101}, httpStatus: 500}}}]}",
                "E spec.http[0].fault.abort.percentage.value",
            ),
            (
                "{hosts: [a], http: [{directResponse: {status: 99}}]}",
                "E spec.http[0].directResponse.status",
            ),
            (
                "{hosts: [a], http: [{redirect: {redirectCode: 300}}]}",
                "E spec.http[0].redirect.redirectCode",
            ),
            (
                "{hosts: [a], tls: [{match: [{}], route: [{destination: {host: b}}]}]}",
                "E spec.tls[0].match[0].sniHosts",
            ),
            (
                "{hosts: [a], tcp: [{match: [{destinationSubnets: [x]}], route: [{destination: {host: b}}]}]}",
                "E spec.tcp[0].match[0].destinationSubnets[0]",
            ),
            ("{http: [{delegate: {name: x}}]}", "E spec.http[0].delegate"),
        ],
    );
}

#[test]
fn destination_rules_are_checked() {
    table(
        "networking.istio.io/v1",
        "DestinationRule",
        &[
            ("{}", "E spec.host"),
            ("{host: a}", ""),
            (
                "{host: a, trafficPolicy: {loadBalancer: {simple: FASTEST}}}",
                "E spec.trafficPolicy.loadBalancer.simple",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {}}}}",
                "E spec.trafficPolicy.loadBalancer.consistentHash: needs one of",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 10}}}}}",
                "E spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {b: 90}}]}}}}",
                "E spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to",
            ),
            (
                "{host: a, trafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}}",
                "E spec.trafficPolicy.outlierDetection.maxEjectionPercent",
            ),
            (
                "{host: a, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 0s}}}}",
                "E spec.trafficPolicy.connectionPool.tcp.connectTimeout",
            ),
            (
                "{host: a, trafficPolicy: {tls: {mode: SIMPLE, caCertificates: x}}}",
                "E spec.trafficPolicy.tls",
            ),
            (
                "{host: a, trafficPolicy: {tls: {mode: MUTUAL, credentialName: x, privateKey: /x}}}",
                "E spec.trafficPolicy.tls",
            ),
            (
                "{host: a, trafficPolicy: {tls: {mode: SIMPLE, privateKey: /x}}}",
                "E spec.trafficPolicy.tls",
            ),
            (
                "{host: a, trafficPolicy: {tls: {mode: MUTUAL}}}",
                "E spec.trafficPolicy.tls",
            ),
            (
                "{host: a, trafficPolicy: {tunnel: {protocol: POST, targetHost: b, targetPort: 1}}}",
                "E spec.trafficPolicy.tunnel.protocol",
            ),
            (
                "{host: a, trafficPolicy: {tunnel: {targetHost: \"b c\", targetPort: 1}}}",
                "E spec.trafficPolicy.tunnel.targetHost",
            ),
            (
                "{host: a, trafficPolicy: {tunnel: {targetHost: b}}}",
                "E spec.trafficPolicy.tunnel.targetPort",
            ),
            (
                "{host: a, subsets: [{labels: {a: b}}]}",
                "E spec.subsets[0].name",
            ),
        ],
    );
}

#[test]
fn unknown_fields_are_refused_at_the_top_and_below() {
    let mut policy = object("security.istio.io/v1", "PeerAuthentication", "{}");
    assert!(check(&policy).errors.is_empty());
    policy["sepc"] = json!({});
    assert_eq!(
        told(&check(&policy).errors[0]),
        "sepc: is no field of an object"
    );
    // Also of kinds that are not read.
    let mut other = object("networking.istio.io/v1", "Sidecar", "{any: [a]}");
    assert_eq!(check(&other), Verdict::default());
    other["spce"] = json!({});
    assert_eq!(check(&other).errors.len(), 1);
    table(
        "security.istio.io/v1",
        "PeerAuthentication",
        &[
            ("{mtls: {mod: STRICT}}", "E spec.mtls.mod: "),
            ("{mtls: {mode: STRIKT}}", "E spec.mtls.mode: "),
            ("{mtls: [1]}", "E spec.mtls: "),
        ],
    );
}

#[test]
fn other_groups_and_kinds_pass() {
    for (version, kind) in [
        ("v1", "Pod"),
        ("gateway.networking.k8s.io/v1", "Gateway"),
        ("networking.istio.io/v1alpha9", "ServiceEntry"),
        ("networking.istio.io/v1", "Sidecar"),
        ("", ""),
    ] {
        assert_eq!(
            check(&object(version, kind, "{anything: goes}")),
            Verdict::default()
        );
    }
    for nonsense in [json!(null), json!([]), json!("text"), json!({})] {
        assert_eq!(check(&nonsense), Verdict::default());
    }
}

#[test]
fn a_refusal_names_the_field_and_the_reason() {
    let refused = response("CREATE", &bad_policy(), &Value::Null);
    assert_eq!(refused["allowed"], false);
    assert_eq!(refused["status"]["code"], 422);
    assert_eq!(
        refused["status"]["message"],
        "configuration is invalid: spec: DENY without rules never matches; rules: [{}] matches everything"
    );
    let doubtful = object(
        "security.istio.io/v1",
        "PeerAuthentication",
        "{selector: {}}",
    );
    let warned = response("CREATE", &doubtful, &Value::Null);
    assert_eq!(warned["allowed"], true);
    assert!(
        warned["warnings"][0]
            .as_str()
            .unwrap()
            .starts_with("spec.selector: ")
    );
    assert!(warned["status"].is_null());
}

#[test]
fn only_creation_and_change_of_the_object_itself_are_judged() {
    for operation in ["DELETE", "CONNECT", ""] {
        assert_eq!(
            response(operation, &bad_policy(), &Value::Null)["allowed"],
            true
        );
    }
    let mut status = review("UPDATE", &bad_policy(), &Value::Null);
    status["request"]["subResource"] = json!("status");
    assert!(respond(&status).unwrap().1.errors.is_empty());
}

#[test]
fn a_bad_object_that_is_there_can_be_deleted_and_labelled_by_others_but_not_get_worse() {
    let (old, mut new) = (bad_policy(), bad_policy());
    new["metadata"]["annotations"] = json!({"a": "b"});
    let touched = response("UPDATE", &new, &old);
    assert_eq!(touched["allowed"], true);
    assert_eq!(touched["warnings"].as_array().unwrap().len(), 1);
    let worse = object(
        "security.istio.io/v1",
        "AuthorizationPolicy",
        "{action: DENY, rules: [{from: []}]}",
    );
    assert_eq!(response("UPDATE", &worse, &old)["allowed"], false);
    let mut deleted = worse;
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert_eq!(response("UPDATE", &deleted, &old)["allowed"], true);
}

#[test]
fn the_proof_of_being_asked_is_always_refused() {
    let mut probe = object("security.istio.io/v1", "PeerAuthentication", "{}");
    probe["metadata"]["annotations"] = json!({ALWAYS_REJECT: "true"});
    assert_eq!(response("CREATE", &probe, &Value::Null)["allowed"], false);
}

#[test]
fn what_is_no_review_is_an_error() {
    for (body, error) in [
        (json!({}), ReviewError::NoReview),
        (json!([]), ReviewError::NoReview),
        (
            json!({"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview"}),
            ReviewError::NoReview,
        ),
        (
            json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}),
            ReviewError::NoRequest,
        ),
    ] {
        assert_eq!(respond(&body), Err(error));
    }
}

#[test]
fn answers_are_bounded_whatever_the_object() {
    let hosts: Vec<String> = (0..100)
        .map(|n| format!("'{}_{n} '", "ü".repeat(200)))
        .collect();
    let many = object(
        "networking.istio.io/v1",
        "ServiceEntry",
        &format!("{{hosts: [{}]}}", hosts.join(", ")),
    );
    let refused = response("CREATE", &many, &Value::Null);
    let message = refused["status"]["message"].as_str().unwrap();
    assert!(
        message.contains("more") && message.len() < 20_000,
        "{}",
        message.len()
    );
    let mut deep = json!(1);
    for _ in 0..200 {
        deep = json!([deep]);
    }
    let mut policy = bad_policy();
    policy["spec"] = json!({"rules": deep});
    assert_eq!(check(&policy).errors.len(), 1);
}
